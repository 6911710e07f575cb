"Answers to the exercises of 09_optimizers: other right ones, and wrong ones with a word of the sentence that must reject them."
def lars(scale='trust*a/(b + wd*a)', where='torch.where((a > 0) & (b > 0), {}, 1.)', grad='(p.grad + wd*p.data)*scale', order='-1', put='p.grad = {}',
         step='momentum_step', stats='AverageGrad()'): # code, with one part replaced
    return (f"def lars_grad(p, wd, trust, **kwargs):\n    a, b = p.data.norm(), p.grad.norm()\n    scale = {where.format(scale)}\n    {put.format(grad)}\n    return p\n"
            f"lars_grad._order, lars_grad._defaults = {order}, dict(wd=0., trust=.001)\n"
            f"lars = partial(StatefulOptimizer, steppers=[lars_grad, {step}], stats={stats})")

def nesterov(step='p.grad + mom*grad_avg', lr='-lr', do='p.data.add_({step}, alpha={lr})'):
    return f"def nesterov(p, lr, mom, grad_avg, **kwargs):\n    {do.format(step=step, lr=lr)}\n    return p"

def weights(init='p.detach().clone()', update='mul_(ema).add_(p.data, alpha=1-ema)', more='', name='slow_avg', defaults='_defaults = dict(ema=.9)', args='ema, ', n='-.29'):
    return (f"class AverageWeights(Stat):\n    {defaults}\n    def init_state(self, p): return {{'{name}': {init}}}\n"
            f"    def update(self, p, state, {args}**kwargs):\n        state['{name}'].{update}{more}\n        return state\nafter_three = {n}")

ANSWERS = {
    'check_lars': dict(
        right=[lars(where='({} if a > 0 and b > 0 else 1.)'), lars(put='g = {}; p.grad = g', stats='[AverageGrad()]')],
        wrong=[(lars(order='1'), '_order below 0'), (lars(where='{}'), 'from zeros'), (lars(scale='trust*a/b'), 'missing in the scale'), (lars(grad='p.grad*scale'), 'missing in the gradient'),
               (lars(grad='p.grad*scale + wd*p.data'), 'after the scaling'), (lars(scale='trust*a/(p.grad + wd*p.data).norm()'), 'norm of the sum'),
               (lars(step='sgd_step'), 'along the average'), (lars(put='p.grad.add_(p.data, alpha=wd).mul_(scale)'), 'in place'), (lars(scale='trust*b/a'), 'should become'),
               (lars(where='torch.where(a > 0, {}, 1.)'), 'a gradient of zeros')]),
    'check_nesterov': dict(
        right=['def nesterov(p, lr, mom, grad_avg, **kwargs):\n    p.data -= lr*p.grad\n    p.data -= lr*mom*grad_avg'],
        wrong=[(nesterov('grad_avg'), 'plain momentum'), (nesterov('p.grad'), 'plain SGD'), (nesterov('p.grad + grad_avg'), 'counts fully'), (nesterov('mom*p.grad + grad_avg'), 'not the gradient'),
               (nesterov(lr='lr'), 'uphill'), (nesterov(lr='-1'), 'not used'), (nesterov(do='p = p - lr*(p.grad + mom*grad_avg)'), 'something new'),
               (nesterov(do='p.data - lr*(p.grad + mom*grad_avg)'), 'has not changed')]),
    'check_average_weights': dict(
        right=[weights(update='lerp_(p.data, 1-ema)'), weights(init='torch.clone(p.data)', update='copy_(lin_comb(state["slow_avg"], p.data, ema))')],
        wrong=[(weights(init='p.data'), 'the parameter itself'), (weights(init='torch.zeros_like(p)'), 'not at zero'), (weights(update='mul_(1-ema).add_(p.data, alpha=ema)'), 'exchanged'),
               (weights(more='; p.data.copy_(state["slow_avg"])'), 'as without the stat'), (weights(name='avg'), "'slow_avg'"), (weights(defaults='pass'), 'cannot run'),
               (weights(update='mul_(.9).add_(p.data, alpha=.1)', args=''), 'another number'), (weights(update='copy_(p.data)'), 'should be -0.29'),
               (weights(n='-3'), 'behind'), (weights(n='-.561'), 'before the steppers'), (weights(n='-1'), 'off')]),
}
