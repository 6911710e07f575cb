"Answers to the exercises of engine/01_datasets: other right ones, and wrong ones with a word of the sentence that must reject them."

def accuracy_at(train='train', n_train="range(10)", hard_train='hard', valid='valid', hard_valid='hard', map_='gray_map', sign=''): # code, with one part replaced
    def draw(what, ns, hard): return f"[(shape_image(c, {what!r}, i, hard={hard}), c) for c in shape_names for i in {ns}]"
    return f"def accuracy_at(hard): return {sign}nearest_mean({draw(train, n_train, hard_train)}, {draw(valid, 'range(5)', hard_valid)}, {map_})"

def hexagon(pts): return f'def hexagon(rng): return {pts}'

ANSWERS = {
    'check_levels': dict(right=['levels = 65'],
        wrong=[('levels = 64', 'not at all'), ('levels = 9', '8 rows'), ('levels = 17', 'ss=4'), ('levels = 34', 'both directions'), ('levels = 256', 'only 64 pixels'),
               ('levels = "65"', 'give a number'), ('levels = 16', 'how many pixels')]),
    'check_hexagon': dict(right=[hexagon('[(math.cos(k*math.pi/3+.2), math.sin(k*math.pi/3+.2)) for k in range(6)]').replace('def', 'import math\ndef'), hexagon('3*_polar(np.arange(6)*np.pi/3)[::-1]')],
        wrong=[(hexagon('_polar(np.arange(7)*np.pi/3)'), '7 corners'), (hexagon('_polar(np.arange(5)*2*np.pi/5)'), '(5, 2)'), (hexagon('_polar(np.arange(6)*60)'), 'radians'),
               (hexagon('_polar(np.arange(6)*np.pi/6)'), 'sides differ'), (hexagon('_polar(np.arange(6)*np.pi/3)*[1, .7]'), 'equally far'), (hexagon('_polar(np.arange(6)*np.pi/3)+[1, 0]'), 'center'),
               (hexagon('_polar(np.arange(6)*np.pi/3).T'), '(2, 6)'), (hexagon('_polar(np.array([0, 2, 4, 1, 3, 5])*np.pi/3)'), 'in order'), (hexagon('"hexagon"'), 'returns a str'),
               ('hexagon = lambda: _polar(np.arange(6)*np.pi/3)', 'take a random generator'), (hexagon('None'), 'returns nothing'), (hexagon('_polar(np.linspace(0, 2*np.pi, 6))'), '6 corners, and the last is the first again'),
               (hexagon('_polar(np.arange(7)*2*np.pi/7)'), '(7, 2)')]),
    'check_accuracy_at': dict(right=['def accuracy_at(hard):\n    sets = [[(shape_image(name, part, i, hard=hard), name) for i in range(n) for name in shape_names] for part, n in dict(train=10, valid=5).items()]\n'
                                     '    return nearest_mean(*sets, gray_map)', accuracy_at().replace('return ', 'return np.float32(') + ')'],
        wrong=[(accuracy_at(hard_train='None', hard_valid='None'), 'passed on'), (accuracy_at(valid='train'), 'validate on training images'), (accuracy_at(sign='1-'), 'error rate'),
               (accuracy_at(hard_train='None'), 'other numbers'), (accuracy_at(hard_valid='None'), 'other numbers'), (accuracy_at(map_='color_map'), 'other numbers'),
               (accuracy_at(train='valid', valid='train'), 'swapped'), (accuracy_at(n_train='[0]*10'), 'other numbers'), (accuracy_at().replace('return ', 'print(') + ')', 'returns None'),
               (accuracy_at(sign='100*'), 'in percent'), (accuracy_at().replace('return ', 'return round(') + ', 1)', 'rounded'), (accuracy_at().replace('return ', 'return round(') + ')', 'rounded'),
               (accuracy_at(train='valid', valid='train', n_train='range(5)').replace("'train', i, hard=hard), c) for c in shape_names for i in range(5)", "'train', i, hard=hard), c) for c in shape_names for i in range(10)"), 'swapped'),
               ('def accuracy_at(): return .48', 'yours fails')]),
}
