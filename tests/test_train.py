"""The commands: each option reaches what it names, what is wrong is one line, an interrupted training goes on, and predictions are those of
the training. Each command runs in a process of its own where that matters."""
import csv, os, re, signal, subprocess, sys, time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dl2lib.batch_warp import AugmentBatch, MixUp
from dl2lib.callbacks import BatchTransformXCallback
from dl2lib.datacache import CachedList
from dl2lib.datasets import shapes
from dl2lib.inference import load_learner
from dl2lib.practice import MixedPrecision
from dl2lib.resnet import ResBlock
from dl2lib.train import Settings, find_splits, main, make_data, make_learner, make_schedule, predict_main, train
from dl2lib.zoo import OPTIMIZERS

ROOT = Path(__file__).parents[1]
SMALL = dict(epochs=1, size=16, bs=32, device='cpu')


@pytest.fixture(autouse=True, scope='module')
def one_thread(): # as the commands that run in processes of their own: the same to the bit
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return shapes(root=tmp_path_factory.mktemp('data'), n_train=160, n_valid=40)

@pytest.fixture(scope='module')
def data(folder): return make_data(folder, size=16, bs=32, seed=1)[0]

@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')
    return out, train(folder, out=out, **SMALL)

def start(*args, name='main'):
    "A command in a process of its own, which takes interrupts also where this process was told not to."
    code = f'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from dl2lib.train import {name}; sys.exit({name}(sys.argv[1:]))'
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

def run(*args, **kw): # exit status, output, errors
    p = start(*args, **kw)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err

def log(out): # without times
    with open(out/'log.csv', newline='') as f: return [r[:-1] for r in csv.reader(f)]


# --- options ----------------------------------------------------------------------------------------------------------------------------

def tfm(learn): return next(cb.tfm for cb in learn.cbs if isinstance(cb, BatchTransformXCallback))
def ops(learn): return [type(o).__name__ for o in getattr(tfm(learn), 'ops', [])]
def has(learn, cls): return any(isinstance(cb, cls) for cb in learn.cbs)

@pytest.mark.parametrize('option, shows', [
    (dict(arch='resnet'), lambda l: any(isinstance(m, ResBlock) for m in l.model.modules())),
    (dict(opt='adamw', wd=.3), lambda l: l.opt.hypers[0]['wd'] == .3 and [f.__name__ for f in l.opt.steppers] == ['weight_decay', 'adam_step']),
    (dict(lr=.25), lambda l: l.opt.hypers[0]['lr'] == .25),
    (dict(augment='flip'), lambda l: ops(l) == ['RandomFlip']),
    (dict(augment='crop'), lambda l: ops(l) == ['RandomFlip', 'RandomCrop']),
    (dict(augment='all'), lambda l: {'RandomTilt', 'RandomRotate', 'RandomContrast'} < {*ops(l)}),
    (dict(mixup=.4), lambda l: has(l, MixUp)),
    (dict(amp='bf16'), lambda l: [cb.dtype for cb in l.cbs if isinstance(cb, MixedPrecision)] == [torch.bfloat16])], ids=str)
def test_an_option_reaches_what_it_names(data, option, shows):
    assert shows(make_learner(data, Settings(device='cpu', **option))) and not shows(make_learner(data, Settings(device='cpu')))

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_of_the_zoo_is_an_option(data, name):
    assert make_learner(data, Settings(opt=name, device='cpu')).opt.param_groups

def test_without_a_rate_the_lessons_is_taken_or_one_is_found():
    assert Settings().lr == .3 and Settings(opt='adam').lr == 'find' and Settings(opt='adam', lr=.01).lr == .01

def test_schedules():
    one, cos = make_schedule('one_cycle', .3), make_schedule('cosine', .3)
    assert [round(one(p), 6) for p in (0, .3, 1)] == [.1, .3, .05] and cos(0) == .3 and abs(cos(1)) < 1e-9
    assert make_schedule('constant', .3)(.7) == .3

def test_augmentation_ends_in_what_the_model_gets_without_it(data): # in validation
    xb = torch.stack([data.valid_ds.x[i] for i in range(4)])
    plain, flips = (tfm(make_learner(data, Settings(augment=a, device='cpu'))) for a in ('none', 'crop'))
    assert isinstance(flips, AugmentBatch)
    torch.testing.assert_close(flips.valid(xb), plain[1](plain[0](xb)), rtol=1e-5, atol=1e-5)

def test_lsuv_workers_and_cache_reach_the_training(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DL2LIB_DATA', str(tmp_path/'data'))
    seen, ours = {}, make_learner
    def spy(data, s):
        seen.update(data=data, learn=ours(data, s))
        seen['before'] = {k: v.clone() for k, v in seen['learn'].model.state_dict().items()}
        return seen['learn']
    monkeypatch.setattr('dl2lib.train.make_learner', spy)
    monkeypatch.setattr('dl2lib.train.fit_or_go_on', lambda *args: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError): train(folder, lsuv=True, cache=True, workers=2, out=tmp_path/'out', **SMALL)
    assert isinstance(seen['data'].train_ds.x, CachedList) and seen['data'].train_dl.num_workers == 2
    assert any(not torch.equal(v, seen['before'][k]) for k, v in seen['learn'].model.state_dict().items())
    assert 'LSUV on' in capsys.readouterr().out

def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    said = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0 and all(f'--{f.name}' in said for f in fields(Settings)) and all(n in said for n in OPTIMIZERS)
    assert all(f'(default: {f.default})' in said for f in fields(Settings) if f.default not in (None, False))


# --- what is wrong is one line ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('args, text', [
    (['no/such/folder'], 'no/such/folder: there is no such folder'), (['FOLDER', '--bs', '0'], 'bs=0'),
    (['FOLDER', '--device', 'abacus'], "device='abacus'"), (['FOLDER', '--size', '0'], 'size=0'), (['FOLDER', '--size', 'big'], '--size: invalid int'),
    (['FOLDER', '--opt', 'adm'], "--opt: invalid choice: 'adm'"), (['FOLDER', '--lr', 'fast'], '--lr'), (['FOLDER', '--mixup', '-1'], 'mixup=-1'),
    (['FOLDER', '--epoch', 'x'], 'invalid int'), (['FOLDER', '--warp', '9'], 'unrecognized arguments: --warp 9'), (['EMPTY'], 'EMPTY')], ids=str)
def test_a_bad_folder_or_option_is_one_line(folder, tmp_path, capsys, args, text):
    (tmp_path/'EMPTY').mkdir()
    places = dict(FOLDER=str(folder), EMPTY=str(tmp_path/'EMPTY'))
    try: status = main([*(places.get(a, a) for a in args), '--out', str(tmp_path/'out')])
    except SystemExit as e: status = e.code
    said = capsys.readouterr()
    assert status == 2 and len(said.err.splitlines()) == 1 and said.err.startswith('dl2lib-train: ') and text in said.err

def test_an_out_that_is_a_file(folder, tmp_path, capsys):
    (tmp_path/'out').write_text('mine')
    assert main([str(folder), '--out', str(tmp_path/'out'), '--size', '16', '--epochs', '1', '--device', 'cpu']) == 2
    assert str(tmp_path/'out') in capsys.readouterr().err and (tmp_path/'out').read_text() == 'mine'

@pytest.mark.parametrize('names, text', [(['val'], 'has val/ but no train/'), (['train'], 'neither val/ nor valid/'), (['train', 'val', 'valid'], 'both val/ and valid/')])
def test_half_a_split_is_refused(tmp_path, names, text):
    for n in names: (tmp_path/n).mkdir()
    with pytest.raises(FileNotFoundError, match=text): find_splits(tmp_path)


# --- what it leaves ----------------------------------------------------------------------------------------------------------------------

def test_what_a_training_leaves(trained, folder):
    out, acc = trained
    assert {p.name for p in out.iterdir()} >= {'log.csv', 'curves.png', 'predictions.png', 'confusion.png', 'worst.png', 'command.txt', 'training.ckpt', 'model.dl2lib'}
    rows = log(out)
    assert len(rows) == 2 and float(rows[1][rows[0].index('valid_accuracy')]) == pytest.approx(acc)

def test_the_command_that_it_leaves_gives_the_same_again(trained, folder, tmp_path):
    import shlex
    out, _ = trained
    args = shlex.split((out/'command.txt').read_text())
    assert args[0] == 'dl2lib-train' and args[-2:] == ['--out', str(out)]
    status, said, err = run(*args[1:-1], tmp_path)
    assert status == 0, err
    again = load_learner(tmp_path/'model.dl2lib', device='cpu').model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in load_learner(out/'model.dl2lib', device='cpu').model.state_dict().items())
    assert re.fullmatch(r'validation accuracy \d\.\d{3}', said.splitlines()[-1])

def test_a_finished_training_begins_anew(trained, folder):
    out, acc = trained
    assert train(folder, out=out, **SMALL) == acc and len(log(out)) == 2

def test_an_interrupted_training_goes_on_and_ends_as_one_that_was_not(folder, tmp_path):
    args = [folder, '--epochs', 3, '--size', 16, '--bs', 8, '--opt', 'adam', '--augment', 'crop', '--device', 'cpu', '--out']
    assert run(*args, tmp_path/'a')[0] == 0
    p = start(*args, tmp_path/'b')
    end = time.time()+200
    while not ((tmp_path/'b'/'log.csv').exists() and len(log(tmp_path/'b')) > 1) and time.time() < end and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=100)
    assert p.returncode == 130 and err.splitlines()[-1] == 'dl2lib-train: interrupted; the same command goes on'
    status, said, err = run(*args[:-1], '--wd', .1, '--out', tmp_path/'b')
    assert status == 2 and 'wd None there, 0.1 here' in err and len(err.splitlines()) == 1
    status, said, err = run(*args, tmp_path/'b')
    assert status == 0 and 'going on. 1 of 3 epochs are done' in said, err
    a, b = (load_learner(tmp_path/k/'model.dl2lib', device='cpu').model.state_dict() for k in 'ab')
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and log(tmp_path/'a') == log(tmp_path/'b')

def test_restart_begins_anew(folder, tmp_path):
    from dl2lib.callbacks import Callback
    class Stop(Callback):
        def after_epoch(self): raise KeyboardInterrupt
    import dl2lib.train as t
    ours = t.make_learner
    t.make_learner = lambda *args: (lambda l: (l.add_cbs(Stop()), l)[1])(ours(*args))
    try:
        with pytest.raises(KeyboardInterrupt): train(folder, out=tmp_path, **SMALL | dict(epochs=2))
    finally: t.make_learner = ours
    with pytest.raises(ValueError, match='epochs 2 there, 1 here'): train(folder, out=tmp_path, **SMALL)
    train(folder, out=tmp_path, restart=True, **SMALL)
    assert len(log(tmp_path)) == 2


# --- predicting --------------------------------------------------------------------------------------------------------------------------

def test_predict_says_what_the_learner_says(trained, folder, capsys):
    out, _ = trained
    files = sorted(map(str, (folder/'val').glob('*/*')))[:5]
    assert predict_main([str(out/'model.dl2lib'), *files, '--top', '2', '--device', 'cpu']) == 0
    lines, learn = capsys.readouterr().out.splitlines(), load_learner(out/'model.dl2lib', device='cpu')
    for line, fn in zip(lines, files, strict=True):
        pred = learn.predict(fn)
        assert re.fullmatch(rf'{re.escape(fn)}: {pred.label} {pred.probs.max():.3f}, \w+ 0\.\d+', line)

@pytest.mark.parametrize('model, files, text', [
    ('model.dl2lib', ['nowhere.jpg'], 'nowhere.jpg'), ('model.dl2lib', ['log.csv'], 'log.csv'), ('curves.png', ['curves.png'], 'curves.png'),
    ('none.dl2lib', ['curves.png'], 'none.dl2lib'), ('training.ckpt', ['curves.png'], 'training.ckpt'), ('model.dl2lib', ['.'], 'out')], ids=str)
def test_predict_names_what_it_cannot_use(trained, capsys, model, files, text):
    out, _ = trained
    assert predict_main([str(out/model), *(str(out/f) for f in files), '--device', 'cpu']) == 2
    err = capsys.readouterr().err
    assert text in err and err.startswith('dl2lib-predict: ') and 'Traceback' not in err

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_train_and_predict_on_cuda(folder, tmp_path, capsys):
    train(folder, out=tmp_path, augment='all', mixup=.4, amp='bf16', **SMALL | dict(device='cuda'))
    assert 'on cuda' in capsys.readouterr().out
    assert predict_main([str(tmp_path/'model.dl2lib'), *map(str, (folder/'val').glob('ring/*')), '--device', 'cuda']) == 0
