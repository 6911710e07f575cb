"""`kill -9` at random moments of a training run, each time followed by a run that goes on from the checkpoint and has to end, to the bit, as one
that was never killed: weights, optimizer, losses, rates, table, CSV file.

    python benchmarks/kill_resume.py [KILLS]

writes results/kill_resume.md. 50 kills take about eight minutes on two CPU cores. A kill comes at a random time, after which it may wait until the
run is where it is wanted: writing a checkpoint, validating, between epochs. Where it fell is what the run had noted last, read after its death."""
import collections, hashlib, json, mmap, os, random, shutil, signal, statistics, struct, subprocess, sys, tempfile, time
from pathlib import Path

EPOCHS, EVERY, WARM = 4, 3, 0.25 # epochs of 40 batches; batches between checkpoints; share of the fit in which the rate rises
PLACES = dict(S='starting up: first checkpoint, workers', W='training, the rate rising', T='training', V='validation', E='between epochs: table, log, new workers',
              C='a checkpoint being written')
SHARES = {'C': 0.35, 'any': 0.2, 'V': 0.1, 'E': 0.1, 'W': 0.1, 'T': 0.05, 'S': 0.1} # of the kills: where they are wanted; one comes where most are lacking
NOTE = struct.Struct('cI')                                     # place, training batches begun


# The run that is killed

def data():
    import torch
    from dl2lib.datablock import DataBunch, get_dls

    class Images: # small ones: shifted, flipped and noisy, each time otherwise
        def __init__(self, n, seed, train):
            g = torch.Generator().manual_seed(seed)
            self.y, self.train = torch.randint(4, (n,), generator=g), train
            self.x = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))[self.y] + torch.randn(n, 3, 20, 20, generator=g)
        def __len__(self): return len(self.x)
        def __getitem__(self, i):
            if not self.train: return self.x[i, :, 2:18, 2:18], self.y[i]
            dy, dx = torch.randint(5, (2,)).tolist()
            x = self.x[i, :, dy:dy+16, dx:dx+16] + random.gauss(0, 0.1)*torch.randn(3, 16, 16)
            return x.flip(2) if torch.rand(()) < 0.5 else x, self.y[i]

    return DataBunch(*get_dls(Images(1280, 1, True), Images(1600, 2, False), 32, seed=7, num_workers=2))


def learner():
    from functools import partial
    from torch import nn
    from torch.nn import functional as F
    from dl2lib.callbacks import AvgStatsCallback, ParamScheduler, Recorder, accuracy
    from dl2lib.state import set_seed
    from dl2lib.learner import Learner
    from dl2lib.optimizers import sgd_mom_opt
    from dl2lib.practice import CSVLog, GradientClip, KeepBest
    from dl2lib.schedules import combine_scheds, cos_1cycle_anneal
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(),
                          nn.Flatten(), nn.Dropout(0.2), nn.Linear(288, 4))
    sched = combine_scheds([WARM, 1-WARM], cos_1cycle_anneal(0.01, 0.1, 0.001))
    return Learner(model, data(), F.cross_entropy, opt_func=partial(sgd_mom_opt, mom=0.9), lr=0.1,
                   cbs=[AvgStatsCallback(accuracy), Recorder(), ParamScheduler('lr', sched), GradientClip(2.), KeepBest(), CSVLog('log.csv')])


def noter(note): # a callback that keeps `note`, shared memory, up to date; it notes the writing of checkpoints too
    from dl2lib import checkpoints
    from dl2lib.callbacks import Callback
    begun, real = [0], checkpoints.write_state

    def set_place(c): note[:NOTE.size] = NOTE.pack(c.encode(), begun[0])

    def write_state(*args):
        before = note[:1].decode()
        set_place('C')
        try: return real(*args)
        finally: set_place(before)
    checkpoints.write_state = write_state

    class Note(Callback):
        _order = -1e6
        def begin_fit(self): set_place('S')
        def begin_batch(self):
            if not self.in_train: return
            begun[0] = self.epoch*self.iters + self.iter + 1
            set_place('W' if self.n_epochs < WARM*self.epochs else 'T')
        def begin_validate(self): set_place('V')
        def after_epoch(self): set_place('E')
        def after_fit(self): set_place('F')
    return Note()


def child(keep):
    import torch
    from dl2lib.checkpoints import CheckpointCallback
    torch.set_num_threads(1)
    with open('note', 'r+b') as f: note = mmap.mmap(f.fileno(), NOTE.size)
    learn, resume = learner(), os.path.exists('fit.ckpt')
    learn.logger = lambda row: None
    learn.fit(EPOCHS, [noter(note), *([CheckpointCallback('fit.ckpt', every_batches=EVERY)] if keep else [])], resume='fit.ckpt' if resume else None)
    def digest(o):
        h = hashlib.sha256()
        def feed(o):
            if isinstance(o, torch.Tensor): h.update(o.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            elif isinstance(o, dict): [feed(x) for kv in o.items() for x in kv]
            elif isinstance(o, (list, tuple)): [feed(x) for x in o]
            else: h.update(repr(o).encode())
        feed(o)
        return h.hexdigest()
    rec, log = learn.recorder, [l.rsplit(',', 1)[0] for l in Path('log.csv').read_text().splitlines()] # times aside
    res = dict(weights=learn.model.state_dict(), optimizer=learn.opt.state_dict(), losses=rec.losses, rates=rec.group_lrs, norms=learn.gradient_clip.norms,
               table=[r[:-1] for r in learn.avg_stats.rows], log=log, best=learn.keep_best.best_epoch, generators=torch.get_rng_state())
    Path('result.json').write_text(json.dumps({k: digest(v) for k, v in res.items()} | dict(batches=len(rec.losses), rows=len(log))))


# Who kills

def start(folder, keep=True):
    (folder/'note').write_bytes(NOTE.pack(b'I', 0))
    with open(folder/'errors', 'w') as f: # a pipe would stay open until the workers of a killed run have noticed
        return subprocess.Popen([sys.executable, os.path.abspath(__file__), 'child', str(int(keep))], cwd=folder, stdout=subprocess.DEVNULL, stderr=f)

def look(folder): # place, batches begun
    c, n = NOTE.unpack((folder/'note').read_bytes())
    return c.decode(), n

def finish(p, folder):
    assert p.wait() == 0, f'the run failed in {folder}:\n{(folder/"errors").read_text()}'
    return json.loads((folder/'result.json').read_text())

def measure(folder): # seconds from the first checkpoint to the end
    p = start(folder)
    while look(folder)[0] == 'I' and p.poll() is None: time.sleep(0.001)
    began = time.time()
    result = finish(p, folder)
    return time.time()-began, result

def kill(folder, wanted, seconds, rng): # -> where it fell and the batches begun; None: the run was over before
    p, wait = start(folder), rng.uniform(0, seconds)
    while look(folder)[0] == 'I' and p.poll() is None: time.sleep(0.0005)
    if wanted != 'S': time.sleep(wait)
    while wanted not in ('any', look(folder)[0]) and p.poll() is None: time.sleep(0.0002)
    time.sleep(rng.uniform(0, {'C': 0.002, 'E': 0.01, 'S': 0.3}.get(wanted, 0.03)))
    p.send_signal(signal.SIGKILL)
    p.wait()
    return look(folder) if p.returncode == -signal.SIGKILL and look(folder)[0] in PLACES else None

def readable(folder): # checkpoints that are there: all must be whole -> training batches that the last one has done
    from dl2lib.checkpoints import read_state
    done = None
    for name in 'fit.ckpt.prev', 'fit.ckpt':
        if not (folder/name).exists(): continue
        s = read_state(folder/name, 'checkpoint') # an error ends this script
        done = 40*(EPOCHS if s['epoch'] is None else s['epoch']) + s['batch']
    assert done is None or (folder/'fit.ckpt').exists(), f'{folder} has a checkpoint before the last one and no last one'
    return done


def main(kills=50):
    from common import save, table
    kills, rng, root = int(kills), random.Random(1), Path(tempfile.mkdtemp(prefix='kill_resume'))
    def fresh(name):
        shutil.rmtree(root/name, ignore_errors=True)
        (root/name).mkdir()
        return root/name
    want = finish(start(f := fresh('never_killed'), keep=False), f)
    seconds, same = measure(fresh('measured'))
    assert same == want, 'checkpoints change the training'
    fell, alike, again, halves, missed, anywhere, began = collections.Counter(), collections.Counter(), [], 0, 0, 0, time.time()
    while sum(fell.values()) < kills:
        folder = fresh('killed')
        wanted = max(SHARES, key=lambda k: SHARES[k]*(sum(fell.values())+missed+1) - (anywhere if k == 'any' else fell[k]))
        anywhere += wanted == 'any'
        at = kill(folder, wanted, seconds, rng)
        if at is None: missed += 1; continue
        (place, begun), done = at, readable(folder)
        fell[place] += 1; halves += any(folder.glob('.fit.ckpt.*.tmp'))
        again.append(begun - (done or 0))
        got = finish(start(folder), folder)
        alike[place] += got == want
        if got != want: print('differs:', place, [k for k in want if got.get(k) != want[k]], folder); shutil.copytree(folder, root/f'differs {len(again)}')
        left = [o.name for o in folder.iterdir() if o.name.startswith('fit.ckpt') and o.name not in ('fit.ckpt', 'fit.ckpt.prev')]
        assert not left, f'left behind: {left}'
        print(f'{sum(fell.values())}: killed in {PLACES[place]}, {begun} batches begun, {done} in the checkpoint: {"the same" if got == want else "ANOTHER RESULT"}', flush=True)
    rows = [[v, fell[k], alike[k]] for k, v in PLACES.items()] + [['all', sum(fell.values()), sum(alike.values())]]
    save('kill_resume', f'# Killed, and gone on\n\nA small network (convolutions, BatchNorm, dropout) trains for {EPOCHS} epochs of 40 batches: two workers, shuffling, samples shifted, flipped and noisy at random, '
         f'momentum, clipped gradients, a one-cycle schedule, the best weights kept, a table and a CSV file. A checkpoint every {EVERY} batches, and around validation. `kill -9` at a random moment, then a new '
         'process goes on. Compared to the bit with a run without checkpoints that was never killed: weights, optimizer with its hyperparameters, losses and rates of each batch, gradient norms, table and CSV file (times '
         'aside), best epoch, torch\'s generator. `python benchmarks/kill_resume.py`\n\n' + table(['killed in', 'kills', 'ended the same, to the bit'], rows) +
         f'\n\nNo checkpoint was unreadable after a kill, {halves} kills left a half-written file beside it, which the next writer took away. Batches done again: median {statistics.median(again):g}, at most {max(again)}. '
         f'{missed} more runs were over before their kill came. One run without a kill takes {seconds:.1f} s, all of this took {(time.time()-began)/60:.1f} minutes.')
    assert sum(alike.values()) == sum(fell.values()), 'some ended otherwise'
    if kills >= 50: assert fell['C'] >= 10 and min(fell[k] for k in PLACES) > 0, f'they have not fallen everywhere: {dict(fell)}'
    shutil.rmtree(root)


if __name__ == '__main__':
    if sys.argv[1:2] == ['child']: child(sys.argv[2] == '1')
    else: main(*sys.argv[1:])
