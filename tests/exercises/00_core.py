"Answers to the exercises of engine/00_core: other right ones, and wrong ones with a word of the sentence that must reject them."
ANSWERS = {
    'check_pipeline': dict(
        right=['class Pipeline:\n    def __init__(self, funcs): self.funcs = funcs\n    def __call__(self, x): return compose(x, list(self.funcs))\n\n'
               'def pipeline(*funcs): return Pipeline(funcs)'],
        wrong=[('def pipeline(*funcs): return lambda x: compose(x, funcs)', 'pickle'),
               ('def pipeline(*funcs):\n    def run(x): return compose(x, funcs)\n    return run', 'pickle'),
               ('def one_by_one(x, funcs):\n    for f in funcs: x = f(x)\n    return x\n\ndef pipeline(*funcs): return partial(one_by_one, funcs=funcs)', '_order'),
               ('def each_alone(x, funcs):\n    for f in sorted(funcs, key=lambda o: getattr(o, "_order", 0)): res = f(x)\n    return res if funcs else x\n\n'
                'def pipeline(*funcs): return partial(each_alone, funcs=funcs)', 'the one before it'),
               ('def pipeline(*funcs): return compose(picture, funcs)', 'should return a function'),
               ('def pipeline(*funcs): return partial(compose, funcs)', 'fails when it is called'), ('def pipeline(funcs): return partial(compose, funcs=funcs)', 'any number of functions'),
               ('def last_alone(x, funcs):\n    for f in sorted(funcs, key=lambda g: getattr(g, "_order", 0)): y = f(x)\n    return y if funcs else x\n\n'
                'def pipeline(*funcs): return partial(last_alone, funcs=funcs)', 'the result of the one before'),
               ('def by_order(x, funcs):\n    for f in sorted(funcs, key=lambda g: g._order): x = f(x)\n    return x\n\ndef pipeline(*funcs): return partial(by_order, funcs=funcs)', 'without an _order'),
               ('def pipeline(*funcs): return partial(compose, funcs=[*funcs, gray])', 'should return what it gets')]),
    'check_snake2camel': dict(
        right=['def snake2camel(name): return re.sub(r"(^|_)(.)", lambda m: m[2].upper(), name)\nlost = "LR_Find".replace("_", "")',
               'def snake2camel(name): return "".join(o.capitalize() for o in name.split("_"))\nlost = "LR_Find"'],
        wrong=[('def snake2camel(name): return name.title()\nlost = "CSVLog"', "'Train_Eval'"),
               ('def snake2camel(name): return name.capitalize().replace("_", "")\nlost = "CSVLog"', "'Traineval'"),
               ('def snake2camel(name):\n    first, *rest = name.split("_")\n    return first + "".join(map(str.capitalize, rest))\nlost = "CSVLog"', "'trainEval'"),
               ('def snake2camel(name): return "".join(o.capitalize() for o in name.split("_"))\nlost = "TrainEval"', 'survives'),
               ('def snake2camel(name): return "".join(o.capitalize() for o in name.split("_"))\nlost = Frame', 'as a string'),
               ('def snake2camel(name): return "".join(o.capitalize() for o in name.split("_"))\nlost = "csv_log"', 'name of a class'),
               ('def snake2camel(name): print("".join(o.capitalize() for o in name.split("_")))\nlost = "CSVLog"', 'yours gives None')]),
    'check_guess': dict(
        right=['my_guess = list(dict.fromkeys("abracadabra"))'],
        wrong=[('my_guess = ["a", "b", "c", "d", "r"]', 'sort=True'), ('my_guess = {"a", "b", "r", "c", "d"}', 'always gives a list'),
               ('my_guess = ["abracadabra"]', 'letter by letter'), ('my_guess = list("abracadabra")', 'only once'),
               ('my_guess = ["c", "d", "a", "b", "r"]', 'first appear in the word'), ('my_guess = ["b", "r", "c", "d"]', '5 different letters')]),
}
