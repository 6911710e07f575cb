"What the scripts share that train on the real Imagenette, a run a call: the command, a trial of a few batches, and a fit whose rows go into a file."
import argparse, json, os, time
from datetime import date

from common import machine
from dl2lib.callbacks import Callback, CancelTrainException
from dl2lib.core import default_device
from dl2lib.train import make_data


class Stop(Callback):
    "Ends training after so many batches, and says how long they took."
    def __init__(self, batches): self.batches, self.losses = batches, []
    def begin_fit(self): self.start = time.time()
    def after_batch(self):
        self.losses.append(self.loss.item())
        if len(self.losses) < self.batches: return
        print(f'{self.batches} batches: {time.time()-self.start:.1f} s, losses', *(f'{v:.2f}' for v in self.losses))
        raise CancelTrainException


def fit(learn, epochs, run=None)->dict: # run: its name, for a script that does one of them otherwise
    "Losses and accuracies after each epoch, seconds, the machine's load at the end, the date. Each row is printed as it comes."
    rows, start = [], time.time()
    def log(row):
        rows.append(row)
        print(*row, flush=True)
    learn.logger = log
    learn.fit(epochs)
    cols = ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy']
    return dict({c: [float(r[i]) for r in rows[1:]] for i, c in enumerate(cols, 1)}, seconds=round(time.time()-start), load=round(os.getloadavg()[0], 1),
                date=str(date.today()))


def command(runs,    # names
            learner, # (args, data) to a Learner
            lines,   # a file, with a line for each run so far
            write,   # of all lines, as dicts, to a table
            size, bs, # pixels, images in a batch
            fit=fit, # (learn, epochs, run) to a dict
            argv=None):
    "One run from the command line: FOLDER --run NAME [--epochs 5] [--seed 42] [--batches N]. It is kept as a line of `lines`, and the table is written anew."
    p = argparse.ArgumentParser()
    p.add_argument('folder'); p.add_argument('--run', required=True, choices=runs); p.add_argument('--epochs', type=int, default=5)
    p.add_argument('--seed', type=int, default=42); p.add_argument('--batches', type=int, help='a trial of so many batches')
    args = p.parse_args(argv)
    workers = 0 if default_device().type == 'cpu' else 8
    learn = learner(args, make_data(args.folder, size, bs, args.seed, cache=True, num_workers=workers)[0])
    print(f'{args.run}, seed {args.seed}, {len(learn.data.train_dl)} batches an epoch', flush=True)
    if args.batches: return learn.fit(args.epochs, cbs=[Stop(args.batches)])
    row = dict(run=args.run, seed=args.seed, epochs=args.epochs, parameters=sum(p.numel() for p in learn.model.parameters()),
               **fit(learn, args.epochs, args.run), machine=machine())
    with open(lines, 'a') as f: f.write(json.dumps(row) + '\n')
    write([json.loads(l) for l in lines.read_text().splitlines()])
