"""Proves what the Makefile, .ci/venv and .ci/run do, with stand-ins for Python, so that nothing is installed: another Python is
refused by name, .venv is made once, completed after an interruption and then left alone, the variables of `make train` arrive,
and a failing test makes `make test` fail."""
import os, re, shutil

import pytest
from repo_tools import ROOT, copy_repo, sh

# Answers what .ci/venv asks of an interpreter; `-m venv` makes an environment of more stand-ins. Each call is a line of calls.log.
STAND_IN = r'''#!/bin/sh
here="{log}"
echo "$(basename "$0") $*" | head -n 1 >> "$here/calls.log"
case "$*" in
    "-c import sys"*) echo "{version} {able} $0" ;;
    *"-m venv"*) mkdir -p .venv/bin
        for name in python nbdev_test nbdev_export nbdev_clean nbdev_update dl2lib-train jupyter-lab; do cp "$0" .venv/bin/$name; done ;;
    *) for a in "$@"; do echo "[$a]" >> "$here/args.log"; done
       case "$(basename "$0") $*" in *"$(cat "$here/fails" 2>/dev/null || echo nothing)"*) echo "told to fail"; exit 3 ;; esac ;;
esac
'''

class Machine:
    "A copy of the repository, and a PATH on which the only Pythons are stand-ins."
    def __init__(self, tmp):
        self.tmp, self.repo, self.bin = tmp, copy_repo(tmp/'a copy', exported=False), tmp/'bin'
        self.bin.mkdir()
        for name in 'sh bash make cat rm mkdir cp dirname basename head sed find env echo printf touch'.split():
            if exe := shutil.which(name): (self.bin/name).symlink_to(exe)
    def python(self, name='python3', version='3.11.9', able='yes', folder=None):
        exe = (folder or self.bin)/name
        exe.write_text(STAND_IN.format(log=self.tmp, version=version, able=able))
        exe.chmod(0o755)
        return exe
    def make(self, *args, ok=True, cwd=None, **env):
        (self.tmp/'calls.log').write_text('')
        (self.tmp/'args.log').write_text('')
        return sh(['make', *args], cwd or self.repo, ok=ok, PATH=str(self.bin), **env)
    def calls(self, has=''): return [c for c in (self.tmp/'calls.log').read_text().splitlines() if has in c]
    def args(self): return re.findall(r'^\[(.*)\]$', (self.tmp/'args.log').read_text(), re.M)
    def fail(self, on): (self.tmp/'fails').write_text(on)

@pytest.fixture
def machine(tmp_path): return Machine(tmp_path)

INSTALL = 'python -m pip install --disable-pip-version-check -c constraints.txt -e .[dev]'


# Which Python

@pytest.mark.parametrize('version', ['3.10.13', '3.15.0', '2.7.18', '3.1.2', '3.111.0', '4.11.0'])
def test_another_python_is_refused_by_name(machine, version):
    other = machine.python('python3.x', version, folder=machine.tmp)
    res = machine.make('test', f'PYTHON={other}', ok=False)
    assert res.returncode and f'Python {version} at {other} will not do: dl2lib needs Python 3.11 to 3.14: make PYTHON=' in res.stderr
    assert not (machine.repo/'.venv').exists()

@pytest.mark.parametrize('version', ['3.11.0', '3.12.4', '3.13.0', '3.14.1'])
def test_each_version_that_settings_allow_is_taken(machine, version):
    machine.python('python3', version)
    assert f'with Python {version} at' in machine.make('export').stdout

def test_settings_without_a_range_of_versions_are_refused(machine):
    machine.python()
    settings = machine.repo/'settings.ini'
    settings.write_text(settings.read_text().replace('below_python = 3.15', 'below_python = 4.0'))
    res = machine.make('test', ok=False)
    assert res.returncode and 'settings.ini must say min_python = 3.N and below_python = 3.M' in res.stderr and not (machine.repo/'.venv').exists()

def test_where_no_python_fits_each_that_was_found_is_named(machine):
    machine.python('python3', '3.15.0'); machine.python('python', '2.7.18', 'no'); machine.python('python3.12', '3.12.1', able='no')
    res = machine.make('test', ok=False)
    assert res.returncode and not (machine.repo/'.venv').exists()
    for part in ('Python 3.15.0 at', 'Python 2.7.18 at', 'python3.11 does not run', 'python3.14 does not run', 'cannot make environments', 'dl2lib needs Python 3.11 to 3.14'): assert part in res.stderr

def test_a_name_that_exists_and_does_not_run_is_passed_over(machine):
    for name in ('python3', 'python3.11'): (machine.bin/name).write_text('#!/bin/sh\necho "pyenv: command not found" >&2; exit 127\n'); (machine.bin/name).chmod(0o755)
    machine.python('python3.12', '3.12.4')
    assert 'with Python 3.12.4 at' in machine.make('export').stdout

def test_a_given_python_is_not_silently_left_out(machine):
    machine.python('python3', '3.11.9'); machine.make('export')
    other = machine.python('python3.12', '3.12.4')
    res = machine.make('export', f'PYTHON={other}', ok=False)
    assert res.returncode and '.venv holds Python 3.11.9' in res.stderr and 'is 3.12.4' in res.stderr
    wrong = machine.python('python3.15', '3.15.0')
    assert 'Python 3.15.0' in machine.make('export', f'PYTHON={wrong}', ok=False).stderr
    machine.make('export', 'PYTHON=python3')
    assert not machine.calls('pip install')

def test_an_environment_made_by_hand_with_another_python_is_refused_and_kept(machine):
    machine.python('python3')
    (machine.repo/'.venv'/'bin').mkdir(parents=True)
    by_hand = machine.python('python', '3.15.1', folder=machine.repo/'.venv'/'bin')
    res = machine.make('test', ok=False)
    assert res.returncode and 'Python 3.15.1 at .venv/bin/python will not do' in res.stderr and 'rm -r .venv' in res.stderr
    assert by_hand.exists()


# The environment

def test_it_is_installed_once(machine):
    machine.python()
    machine.make('test')
    assert machine.calls('venv') == ['python3 -m venv --clear .venv'] and machine.calls('pip install') == [INSTALL]
    machine.make('test')
    assert not machine.calls('pip') and not machine.calls('venv') and machine.calls('pytest')

def test_an_interrupted_installation_is_done_again(machine):
    machine.python(); machine.fail('pip install')
    res = machine.make('test', ok=False)
    assert res.returncode and 'the installation stopped before its end' in res.stderr and not machine.calls('pytest')
    machine.fail('nothing')
    machine.make('test')
    assert machine.calls('pip install') == [INSTALL] and not machine.calls('-m venv') and machine.calls('pytest')

@pytest.mark.parametrize('name', ['constraints.txt', 'settings.ini', 'setup.py'])
def test_it_follows_what_it_is_made_from(machine, name):
    machine.python(); machine.make('export')
    stamp = machine.repo/'.venv'/'.dl2lib-installed'
    os.utime(machine.repo/name, (stamp.stat().st_mtime+5,)*2)
    machine.make('export')
    assert machine.calls('pip install') == [INSTALL] and not machine.calls('-m venv')

def test_an_environment_made_by_hand_is_completed_and_kept(machine):
    machine.python(); machine.make('export')
    (machine.repo/'.venv'/'.dl2lib-installed').unlink()
    mine = machine.repo/'.venv'/'mine'; mine.touch()
    machine.make('export')
    assert machine.calls('pip install') == [INSTALL] and not machine.calls('-m venv') and mine.exists()

def test_a_moved_repository_gets_a_new_environment(machine):
    machine.python(); machine.make('export')
    machine.repo = machine.repo.rename(machine.tmp/'elsewhere')
    machine.make('export')
    assert machine.calls('-m venv --clear') and machine.calls('pip install') == [INSTALL]
    machine.make('export')
    assert not machine.calls('pip')

def test_from_another_folder_and_through_a_link(machine, tmp_path):
    machine.python(); machine.make('-C', machine.repo, 'export', cwd=tmp_path)
    assert (machine.repo/'.venv'/'.dl2lib-installed').exists()
    (tmp_path/'link').symlink_to(machine.repo)
    machine.make('-C', tmp_path/'link', 'export', cwd=tmp_path)
    assert not machine.calls('pip')


# The commands

def test_train_hands_on_what_it_is_given(machine):
    machine.python(); machine.make('export')
    machine.make('train')
    assert machine.calls() == ['dl2lib-train ']
    machine.make('train', 'DATA=/some where/my "images"', 'EPOCHS=2', 'SIZE=64', 'BS=32', 'DEVICE=cpu', 'SEED=7', 'OUT=my out')
    assert machine.args() == ['/some where/my "images"', '--epochs', '2', '--size', '64', '--bs', '32', '--device', 'cpu', '--seed', '7', '--out', 'my out']
    machine.make('train', 'ARGS=--opt adam --lsuv')
    assert machine.args() == ['--opt', 'adam', '--lsuv']
    machine.make('train', EPOCHS='1')
    assert machine.args() == ['--epochs', '1']

def test_test_runs_the_notebooks_and_then_pytest(machine):
    machine.python(); machine.make('test')
    assert [c for c in machine.calls() if 'nbdev_test' in c or 'pytest' in c] == ['nbdev_test --n_workers 2', 'python -m pytest']

@pytest.mark.parametrize('step', ['pytest', 'dl2lib-train'])
def test_what_fails_makes_make_fail(machine, step):
    machine.python(); machine.make('export'); machine.fail(step)
    assert machine.make('test' if step == 'pytest' else 'train', ok=False).returncode

def test_pytest_hears_that_a_notebook_failed(machine):
    machine.python(); machine.make('export'); machine.fail('nbdev_test')
    (machine.repo/'.venv'/'bin'/'python').write_text('#!/bin/sh\ncase "$*" in *pytest*) echo "told: $NBDEV_TEST";; esac\n')
    assert machine.make('test').stdout.splitlines()[-1] == 'told: failed'
    machine.fail('nothing')
    assert machine.make('test').stdout.splitlines()[-1] == 'told: passed'

def test_export_and_update(machine):
    machine.python(); machine.make('export'); machine.make('export')
    assert machine.calls() == ['python .ci/check.py notebooks', 'nbdev_clean ', 'nbdev_export ']
    machine.make('update')
    assert machine.calls() == ['python .ci/check.py modules', 'python .ci/check.py notebooks', 'nbdev_update ', 'nbdev_export ']

@pytest.mark.parametrize('command', ['export', 'update'])
def test_nothing_is_written_from_what_is_broken(machine, command):
    machine.python(); machine.make('export'); machine.fail('check.py notebooks')
    assert machine.make(command, ok=False).returncode and not [c for c in machine.calls() if c.startswith('nbdev')]

def test_make_alone_lists_the_commands_and_does_nothing(machine):
    listed = re.findall(r'^  (\w+)\t', machine.make().stdout, re.M)
    assert listed == ['train', 'test', 'lab', 'browser', 'export', 'update', 'clean'] and not (machine.repo/'.venv').exists()

@pytest.mark.parametrize('status', [0, 2])
def test_ci_calls_make_test_in_the_repository(tmp_path, status):
    exe = tmp_path/'make'
    exe.write_text(f'#!/bin/sh\necho "make $* in $(pwd -P)"; exit {status}\n'); exe.chmod(0o755)
    res = sh([ROOT/'.ci'/'run'], tmp_path, ok=False, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert res.stdout == f'make test in {ROOT}\n' and res.returncode == status
