"""Does augmentation help? The lesson's CNN and recipe on Imagenette, with and without it: one training a call.

    python benchmarks/augment_imagenette.py FOLDER --run none|flip|pil|batch|all [--seed 42] [--epochs 5]

adds the run to results/augment_imagenette.json and writes results/augment_imagenette.md anew. Five epochs take about eight minutes on two CPU cores."""
import argparse, json, time
from functools import partial

from common import machine, results, table
from dl2lib.batch_warp import AugmentBatch, RandomBrightness, RandomContrast, RandomCrop, RandomFlip, RandomRotate, RandomTilt
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, ChannelsLastCallback, CudaCallback, ParamScheduler, accuracy
from dl2lib.convnet import conv_layer
from dl2lib.core import default_device
from dl2lib.state import set_seed
from dl2lib.datablock import (CategoryProcessor, ImageList, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, norm_imagenette,
                              parent_labeler, to_byte_tensor)
from dl2lib.learner import get_learner
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal

BS, SIZE, LARGE = 64, 128, 160 # LARGE: what the batch transform crops from
WHAT = dict(none='none', flip='left and right, every second image', pil='PIL: `RandomResizedCrop` (0.35 to 1 of the area), flip',
            batch='batch: flip, turn, tilt, crop (0.35 to 1), brightness, contrast, in one warp')


def still(size): return [make_rgb, ResizeFixed(size), to_byte_tensor]

def arm(run): # transforms of a training image, and of a training batch. Validation images are the same in all runs
    if run == 'none': return still(SIZE), AugmentBatch(norm=norm_imagenette)
    if run == 'flip': return still(SIZE), AugmentBatch([RandomFlip()], norm=norm_imagenette)
    if run == 'pil':
        from dl2lib.augmentation import PilRandomFlip, RandomResizedCrop
        return [make_rgb, RandomResizedCrop(SIZE, scale=(.35, 1)), PilRandomFlip(), to_byte_tensor], AugmentBatch(norm=norm_imagenette)
    ops = [RandomFlip(), RandomRotate(10, p=.75), RandomTilt(.1, p=.75), RandomCrop((.35, 1)), RandomBrightness(.2, p=.75), RandomContrast(.2, p=.75)]
    return still(LARGE), AugmentBatch(ops, SIZE, norm_imagenette)


def train(folder, run, seed, epochs): # rows: train loss and accuracy, validation loss and accuracy, seconds; one an epoch
    set_seed(seed)
    item_tfms, batch_tfm = arm(run)
    sd = SplitData.split_by_func(ImageList.from_files(folder, tfms=item_tfms), partial(grandparent_splitter, valid_name='val'))
    sd.valid.tfms = still(SIZE)
    device = default_device()
    data = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor()).to_databunch(BS, c_in=3, seed=seed, num_workers=0 if device.type == 'cpu' else 8)
    sched = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))
    cbfs = [partial(AvgStatsCallback, accuracy), partial(CudaCallback, device), ChannelsLastCallback, partial(BatchTransformXCallback, batch_tfm),
            partial(ParamScheduler, 'lr', sched)]
    learn, rows, start = get_learner([64, 64, 128, 256], data, 0.1, conv_layer, cb_funcs=cbfs), [], time.time()
    def logger(row):
        print(run, *row, flush=True)
        if row[0].isdigit(): rows.append([*map(float, row[1:5]), time.time()-start-sum(r[-1] for r in rows)])
    learn.logger = logger
    learn.fit(epochs)
    return rows


def write(runs): # the table of all runs so far
    head = ['augmentation', 'seed', 'epochs', 'train loss', 'train accuracy', 'valid loss', 'valid accuracy', 'valid accuracy after each epoch', 'minutes']
    order = list(WHAT)
    rows = [[WHAT[r['run']], r['seed'], len(r['rows']), *(f'{v:.3f}' for v in r['rows'][-1][:4]), ' '.join(f'{e[3]:.3f}' for e in r['rows']),
             f'{sum(e[4] for e in r["rows"])/60:.1f}'] for r in sorted(runs, key=lambda r: (len(r['rows']), order.index(r['run']), r['seed']))]
    machines = '\n\n'.join(dict.fromkeys(r['machine'] for r in runs))
    (results/'augment_imagenette.md').write_text(TEXT + table(head, rows) + f'\n\n{machines}\n')


TEXT = """# Does augmentation help? The lesson's first CNN on Imagenette (second edition: 9,469 training, 3,925 validation images)

`python benchmarks/augment_imagenette.py FOLDER --run all`: nfs=[64,64,128,256], plain SGD, cos_1cycle_anneal(0.1,0.3,0.05) over [0.3,0.7], 128 pixels,
batches of 64. Validation images are the same in all runs, squashed to 128x128. Where the batch transform crops, training images are squashed to 160x160
first. "Train" numbers are of augmented images. Minutes are of a machine that other jobs may have shared. One seed: differences of a point or two mean nothing.

Where it hurts: in five epochs, flips alone bring more than flips with crops, turns, tilts and light. Those keep the training accuracy down by a quarter, and so
few epochs do not pay that back.

"""


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder')
    p.add_argument('--run', choices=[*WHAT, 'all'], default='all')
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--epochs', type=int, default=5)
    args, kept = p.parse_args(argv), results/'augment_imagenette.json'
    for run in WHAT if args.run == 'all' else [args.run]:
        new = dict(run=run, seed=args.seed, rows=train(args.folder, run, args.seed, args.epochs), machine=machine())
        runs = json.loads(kept.read_text()) if kept.exists() else []
        key = lambda r: (r['run'], r['seed'], len(r['rows']))
        runs = [r for r in runs if key(r) != key(new)] + [new]
        kept.write_text(json.dumps(runs, indent=1) + '\n')
        write(runs)
    print((results/'augment_imagenette.md').read_text())


if __name__ == '__main__': main()
