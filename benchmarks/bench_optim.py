"""A step of each optimizer against its references: torch's fused, foreach and default forms, timm, fastai, a compiled form, and the limit.

    python benchmarks/bench_optim.py [--case cnn resnet50 big] [--group momentum adamw lamb own zoo] [--rounds 9] [--compiled]

Each pair of case and group is a part that takes a minute or two on an idle machine; its lines go to results/bench_optim.jsonl, in the place of earlier ones of the
same part, and results/bench_optim.md is written anew from all. `--compiled` adds a compiled LAMB (which takes a minute to compile). timm and fastai take part
where they are installed. The machine should be idle: torch's threads wait for each other."""
import argparse, gc, json, math, statistics, time
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import nn

from common import interleaved, machine, ratios, results, table
from dl2lib.convnet import conv_layer, get_cnn_model
from dl2lib.optimizers import AverageGrad, AverageSqrGrad, StatefulOptimizer, StepCount, debias, weight_decay
from dl2lib.zoo import OPTIMIZERS

T, DEVICE = torch.optim, 'cuda' if torch.cuda.is_available() else 'cpu'
CASES = dict(cnn="the lesson's CNN", resnet50='ResNet-50', big='40 tensors of 1M')
STEPS = dict(cnn=30, resnet50=5, big=5) if DEVICE == 'cpu' else dict(cnn=100, resnet50=20, big=20) # in a turn
LINES = results/'bench_optim.jsonl'


def shapes(case):
    if case == 'big': return [(1000, 1000)]*40
    if case == 'cnn': model = get_cnn_model(SimpleNamespace(c_in=3, c_out=10), [64, 64, 128, 256], conv_layer)
    else:
        from torchvision.models import resnet50
        with torch.device('meta'): model = resnet50()
    return [tuple(p.shape) for p in model.parameters()]


def params(case):
    gen, ps = torch.Generator().manual_seed(0), []
    for s in shapes(case):
        p = nn.Parameter(torch.randn(s, generator=gen).to(DEVICE))
        p.grad = (torch.randn(s, generator=gen)*.01).to(DEVICE)
        ps.append(p)
    return ps


def sync():
    if DEVICE == 'cuda': torch.cuda.synchronize()


def arm(make, case, steps=None): # -> a function that times so many steps (None: as STEPS says): seconds a step
    opt, steps = make(params(case)), steps or STEPS[case]
    def turn(_):
        sync()
        start = time.perf_counter()
        for _ in range(steps): opt.step()
        sync()
        return (time.perf_counter()-start)/steps
    return turn


# A user's own chain: torch's AdamW written as parts, of which our library has no kernel
def own_adam_step(p, lr, mom, mom_damp, step, sqr_mom, sqr_damp, grad_avg, sqr_avg, eps, **kwargs):
    d1, root = debias(mom, mom_damp, step), math.sqrt(debias(sqr_mom, sqr_damp, step))
    p.data.addcdiv_(grad_avg, sqr_avg.sqrt().add_(eps*root), value=-lr*root/d1)
    return p

own_adam_step.foreach = True

def own_chain(ps, engine=None):
    return StatefulOptimizer(ps, [weight_decay, own_adam_step], [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()], engine=engine,
                             lr=1e-3, wd=.01, sqr_mom=.999, eps=1e-8)


# LAMB through torch.compile: the plain formula over all tensors, numbers that change as tensors, so that nothing is compiled twice
def lamb_formula(ps, gs, ms, vs, lr, d1, d2, mom:float, sqr_mom:float, eps:float, wd:float, max_ratio:float):
    for p, g, m, v in zip(ps, gs, ms, vs):
        m.lerp_(g, 1-mom)
        v.mul_(sqr_mom).addcmul_(g, g, value=1-sqr_mom)
        u = (m/d1)/((v/d2).sqrt() + eps) + wd*p
        a, b = p.norm(), u.norm()
        p.sub_(u*(torch.where((a > 0) & (b > 0), a/b, 1.).clamp(max=max_ratio)*lr))

class CompiledLamb:
    def __init__(self, ps):
        self.ps, self.gs, self.t = [p.detach() for p in ps], [p.grad for p in ps], 0
        self.ms, self.vs = ([torch.zeros_like(p) for p in self.ps] for _ in range(2))
        self.f = torch.compile(lamb_formula, fullgraph=True, dynamic=False)
        self.step()

    @torch.no_grad()
    def step(self):
        self.t += 1
        self.f(self.ps, self.gs, self.ms, self.vs, *(torch.tensor(v, device=DEVICE) for v in (1e-3, 1-.9**self.t, 1-.999**self.t)), .9, .999, 1e-6, .01, 10.)


def zoo(name, engine=None, **hypers): return lambda ps: OPTIMIZERS[name].make(lr=1e-3, **hypers)(ps, engine=engine)
def ours(name, **hypers): return {'ours': zoo(name, **hypers), 'ours, as a list': zoo(name, 'list', **hypers), 'ours, tensor by tensor': zoo(name, 'tensor', **hypers)}
def torchs(cls, **kwargs): return {k: partial(cls, lr=1e-3, **kwargs, **how) for k, how in (('torch fused', dict(fused=True)), ('torch foreach', dict(foreach=True)), ('torch default', {}))}


@cache
def peer(name): # timm.optim or fastai.optimizer; None where it is not installed
    try: return __import__(name, fromlist=['x'])
    except ImportError: return None

def fastais(name): # label -> function of parameters to an optimizer
    fa = peer('fastai.optimizer')
    return {} if fa is None else {'fastai': {'momentum': partial(fa.SGD, lr=1e-3, mom=.9), 'adamw': partial(fa.Adam, lr=1e-3, wd=.01), 'lamb': partial(fa.Lamb, lr=1e-3, wd=.01)}[name]}


def timm_lambs():
    timm = peer('timm.optim')
    if timm is None: raise SystemExit('LAMB is compared with timm: pip install timm')
    return {'timm default': partial(timm.Lamb, lr=1e-3, weight_decay=.01, max_grad_norm=None),
            'timm foreach': partial(timm.Lamb, lr=1e-3, weight_decay=.01, max_grad_norm=None, foreach=True)}


def lamb_arms(compiled):
    return {**timm_lambs(), 'ours': zoo('lamb', wd=.01), 'ours, tensor by tensor': zoo('lamb', 'tensor', wd=.01), **fastais('lamb'),
            **({'the formula through torch.compile': CompiledLamb} if compiled else {})}

# group: arms, the first of which is what the others are divided by; target; bytes an element that a step has to move
GROUPS = dict(
    momentum=(lambda _: {**torchs(T.SGD, momentum=.9), **ours('momentum'), **fastais('momentum')}, '1.0', 20),
    adamw=(lambda _: {**torchs(T.AdamW), **ours('adamw'), **fastais('adamw')}, '1.0', 28),
    lamb=(lamb_arms, '1.0', 40),
    own=(lambda _: {'torch foreach': partial(T.AdamW, lr=1e-3, foreach=True), 'ours': own_chain, 'ours, tensor by tensor': partial(own_chain, engine='tensor')}, '1.0', 28))


def references(case): # name in the zoo -> label, its reference's default
    A, t = partial(T.Adam), peer('timm.optim')
    res = dict(sgd=T.SGD, dampened=partial(T.SGD, momentum=.9, dampening=.1), nesterov=partial(T.SGD, momentum=.9, nesterov=True), rmsprop=T.RMSprop,
               rmsprop_centred=partial(T.RMSprop, centered=True), adagrad=T.Adagrad, adadelta=T.Adadelta, rprop=T.Rprop, adam=A, amsgrad=partial(A, amsgrad=True),
               adamax=T.Adamax, nadam=T.NAdam, radam=T.RAdam, **(dict(muon=T.Muon) if case == 'big' else {})) # Muon takes matrices alone
    res = {k: ('torch', partial(f, lr=1e-3)) for k, f in res.items()}
    if t is None: return res
    return {**res, 'lars': ('timm', partial(t.Lars, lr=1e-3, momentum=.9, always_adapt=True)), 'lion': ('timm', partial(t.Lion, lr=1e-3)),
            'lookahead': ('timm around torch', lambda ps: t.Lookahead(A(ps, lr=1e-3)))}


def limit(case, n_bytes, rounds=15)->float: # seconds that moving `n_bytes` an element takes, at the bandwidth of `b.add_(a)`, which moves 12
    n = sum(math.prod(s) for s in shapes(case))
    a, b = (torch.randn(n, device=DEVICE) for _ in range(2))
    def once(_): b.add_(a); sync()
    return min(interleaved(dict(add=once), rounds)['add'])*n_bytes/12


def summary(values): return [round(float(f'{v:.4g}'), 6) for v in (statistics.median(values), min(values), max(values))]

def family(group, case, rounds, compiled):
    arms, _, n_bytes = GROUPS[group]
    turns = {k: arm(f, case) for k, f in arms(compiled).items()}
    gc.freeze() # what the peers' packages hold is not to be searched at each turn
    times = interleaved(turns, rounds)
    base = next(iter(turns))
    for k in turns: yield dict(name=group, arm=k, base=base, ratio=summary(ratios(times, k, base)), ms=summary([1e3*t for t in times[k]]))
    yield dict(name=group, arm=f'limit ({n_bytes} bytes an element)', base=base, ratio=[round(limit(case, n_bytes)/min(times[base]), 3)]*3)


def others(case, rounds):
    for name, (whose, ref) in references(case).items():
        steps = 1 if name == 'muon' and DEVICE == 'cpu' else None # which takes seconds
        turns = {'reference': arm(ref, case, steps), 'ours': arm(zoo(name), case, steps)}
        gc.freeze()
        times = interleaved(turns, rounds)
        yield dict(name=name, arm='ours', base=f'default of {whose}', ratio=summary(ratios(times, 'ours', 'reference')), ms=summary([1e3*t for t in times['ours']]))
        print(name, times and f"{statistics.median(ratios(times, 'ours', 'reference')):.2f}", flush=True)


def part(group, case, rounds, compiled):
    start = time.time()
    rows = list(others(case, rounds) if group == 'zoo' else family(group, case, rounds, compiled))
    how = dict(group=group, case=case, device=DEVICE, rounds=rounds, machine=machine('timm', 'fastai'))
    old = [r for r in done() if (r['group'], r['case'], r['device']) != (group, case, DEVICE)]
    LINES.write_text('\n'.join(json.dumps(r) for r in old + [{**how, **r} for r in rows]) + '\n')
    write()
    for r in rows: print(f"{group:9} {case:9} {r['name']:16} {r['arm']:36} {cell(r)}", flush=True)
    print(f'{time.time()-start:.0f} s', flush=True)


def done(): return [json.loads(l) for l in LINES.read_text().splitlines()] if LINES.exists() else []

def cell(r): # '' for a case that was not measured
    if r is None: return ''
    med, lo, hi = (f'{v:.2f}' for v in r['ratio'])
    if r['arm'].startswith('limit'): return med
    return f"1 = {r['ms'][0]:.3g} ms" if r['arm'] == r['base'] else f'{med} ({lo} to {hi})'


def write():
    lines, text = done(), ["# A step of each optimizer\n\nTime of a step as a ratio to the first arm of each group, or to the default form of the reference, within the same round: "
                           'median (range) of interleaved rounds. Small is quick. `python benchmarks/bench_optim.py`']
    for device in dict.fromkeys(r['device'] for r in lines):
        found = {(r['group'], r['name'], r['arm'], r['case']): r for r in lines if r['device'] == device}
        cases = {c: CASES[c] for c in CASES if any(r['case'] == c and r['device'] == device for r in lines)}
        def rows(group):
            for g, name, k in dict.fromkeys((g, n, a) for g, n, a, _ in found if g == group):
                one = next(found[g, name, k, c] for c in cases if (g, name, k, c) in found)
                yield [f"{name}, {one['base']}" if group == 'zoo' else k, *(cell(found.get((g, name, k, c))) for c in cases)]
        for g, (_, target, _) in GROUPS.items():
            if rs := list(rows(g)): text.append(f'## {g}, on {device}\n\nTarget for "ours": {target}.\n\n' + table(['arm', *cases.values()], rs))
        if rs := list(rows('zoo')): text.append(f'## The rest of the zoo, on {device}\n\nOurs to the default of its reference; target 1.1.\n\n' + table(['optimizer', *cases.values()], rs))
        text += dict.fromkeys(f"{r['rounds']} rounds; {r['machine']}" for r in lines if r['device'] == device)
    (results/'bench_optim.md').write_text('\n\n'.join(text) + '\n')


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--case', nargs='+', choices=CASES, default=list(CASES)); p.add_argument('--group', nargs='+', choices=[*GROUPS, 'zoo'], default=[*GROUPS, 'zoo'])
    p.add_argument('--rounds', type=int, default=9); p.add_argument('--compiled', action='store_true')
    args = p.parse_args()
    for case in args.case:
        for group in args.group: part(group, case, args.rounds, args.compiled)
