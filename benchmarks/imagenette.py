"What the scripts share that train on the real Imagenette, a run a call: a trial of a few batches, and a fit whose rows go into a file."
import os, time
from datetime import date

from dl2lib.callbacks import Callback, CancelTrainException


class Stop(Callback):
    "Ends training after so many batches, and says how long they took."
    def __init__(self, batches): self.batches, self.losses = batches, []
    def begin_fit(self): self.start = time.time()
    def after_batch(self):
        self.losses.append(self.loss.item())
        if len(self.losses) < self.batches: return
        print(f'{self.batches} batches: {time.time()-self.start:.1f} s, losses', *(f'{v:.2f}' for v in self.losses))
        raise CancelTrainException


def fit(learn, epochs)->dict:
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
