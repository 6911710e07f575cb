"Answers to the exercise of engine/09_groups: another right one, and wrong ones with a word of the sentence that must reject them."
def grow(p='torch.cat([p.data, torch.zeros(n, p.shape[1])])', avg='torch.cat([s["avg"], torch.zeros(n, p.shape[1])])', put='opt.state[p] = dict(avg={avg})'):
    return f'def grow(opt, p, n):\n    s = opt.state[p]\n    p.data = {p}\n    ' + put.format(avg=avg)

ANSWERS = {
    'check_grow': dict(
        right=['def grow(opt, p, n):\n    old = opt.state.pop(p)["avg"]\n    p.data = torch.nn.functional.pad(p.data, (0, 0, 0, n))\n    opt.state[p] = dict(avg=p.new_zeros(p.shape).detach())\n'
               '    opt.state[p]["avg"][:len(old)] = old'],
        wrong=[(grow(put='pass'), 'still has the old state'), (grow(put='opt.state.pop(p)'), 'began again'), (grow(avg='s["avg"]'), 'cannot go on'),
               (grow(p='torch.cat([torch.zeros(n, p.shape[1]), p.data])'), 'at the end'), (grow(p='torch.cat([p.data, torch.ones(n, p.shape[1])])'), 'should be zeros'),
               (grow(avg='torch.cat([s["avg"], s["avg"][:n]])'), 'without a gradient'), ('def grow(opt, p, n): p = nn.Parameter(torch.cat([p.data, torch.zeros(n, p.shape[1])]))', 'change p.data'),
               (grow(avg='torch.cat([2*s["avg"], torch.zeros(n, p.shape[1])])'), 'stay as it was')]),
}
