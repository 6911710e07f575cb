"Answers to the exercises of engine/09_foreach: other right ones, and wrong ones with a word of the sentence that must reject them."
CLIP = 'def clip_norm_(g, most): '
RUN = """def declares_rightly(f):
    one, many = ([torch.tensor([3., -4.]), torch.tensor([.5])] for _ in range(2))
    for ts in (one, many):
        for t in ts: t.grad = torch.ones_like(t)
    for t in one: f(t, lr=.1)
    """
LIST = 'f(TensorList(many, grad=TensorList([t.grad for t in many])), lr=.1)'
REFUSED = '\n    except NotForListsError: return False\n    '
SAME = 'return all(map(torch.equal, one, many))'
ANSWERS = {
    'check_clip_norm': dict(right=[CLIP + '\n    factor = (most/g.norm()).clamp(max=1.)\n    g.mul_(factor)\n    return g'],
        wrong=[(CLIP + '\n    if g.norm() > most: g.mul_(most/g.norm())\n    return g', 'for all of them at once'), (CLIP + 'return g.mul_(most/g.norm())', 'stay as it is'),
               (CLIP + 'return g*(most/g.norm()).clamp(max=1.)', 'work in place'), (CLIP + 'g.mul_((most/g.norm()).clamp(max=1.))', 'yours returns None'),
               (CLIP + 'return g.clamp_(-most, most)', '[0.6, 0.8]'), (CLIP + 'return g.mul_((g.norm()/most).clamp(max=1.))', 'norm 5')]),
    'check_declares': dict(right=[RUN + 'try: ' + LIST + REFUSED + 'return bool(torch.equal(torch.cat(one), torch.cat(many)))'],
        wrong=[('def declares_rightly(f): return True', 'is refused over a list'), (RUN + LIST + '\n    ' + SAME, 'then the answer is False'),
               (RUN + 'try: ' + LIST + REFUSED + 'return True', 'compare all of them'), (RUN + 'try: ' + LIST + REFUSED + 'return torch.equal(one[0], many[0])', 'compare all of them'),
               ('def declares_rightly(f): return False', 'should be True'), (RUN + 'try: ' + LIST + '\n    except NotForListsError: return True\n    ' + SAME, 'is refused over a list')]),
}
