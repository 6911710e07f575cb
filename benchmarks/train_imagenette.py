"""The lesson's CNN and recipe on Imagenette, by the command behind `make train`: accuracy after each epoch.

    python benchmarks/train_imagenette.py FOLDER [SEED ...]

writes results/train_imagenette.md. One seed takes about seven minutes on two CPU cores."""
import contextlib, io, statistics, sys, tempfile

from common import save, table
from dl2lib.train import train

EPOCHS, SIZE, BS = 5, 128, 64


class Tee(io.StringIO):
    "Keeps what is printed, and prints it."
    def write(self, s):
        sys.__stdout__.write(s); sys.__stdout__.flush()
        return super().write(s)


def run(folder, seed):
    "One training; the rows that it prints, an epoch each: train loss and accuracy, validation loss and accuracy, time."
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(Tee()) as said:
        train(folder, epochs=EPOCHS, size=SIZE, bs=BS, seed=seed, out=out)
    return [line.split() for line in said.getvalue().splitlines() if line[:1].isdigit() and len(line.split()) == 6]


def main(folder, *seeds):
    seeds = [int(s) for s in seeds] or [42]
    runs = {seed: run(folder, seed) for seed in seeds}
    rows = [[seed, int(r[0])+1, *(f'{float(v):.3f}' for v in r[1:5]), r[5]] for seed, rs in runs.items() for r in rs]
    final = [float(rs[-1][4]) for rs in runs.values()]
    spread = f', standard deviation {statistics.stdev(final):.3f}' if len(final) > 1 else ''
    save('train_imagenette', '# The lesson\'s first CNN on Imagenette (second edition: 9,469 training, 3,925 validation images)\n\n'
         f'`make train DATA=... EPOCHS={EPOCHS} SIZE={SIZE} BS={BS}`: nfs=[64,64,128,256], plain SGD, cos_1cycle_anneal(0.1,0.3,0.05) over '
         '[0.3,0.7], images squashed to a square, no augmentation.\n\n'
         + table(['seed', 'epoch', 'train loss', 'train accuracy', 'valid loss', 'valid accuracy', 'min:s'], rows)
         + f'\n\nValidation accuracy after {EPOCHS} epochs: mean {statistics.mean(final):.3f} over {len(final)} seed{"s"*(len(final) > 1)}{spread}.')


if __name__ == '__main__': main(*sys.argv[1:])
