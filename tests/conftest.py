"""What holds for every test: pictures are drawn without a screen, tests marked `cuda` skip where there is no CUDA device,
and tests marked `slow` run with --slow."""
import os

import pytest

os.environ.setdefault('MPLBACKEND', 'agg')


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')

def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in items:
            if item.get_closest_marker('slow'): item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))
    on_cuda = [item for item in items if item.get_closest_marker('cuda')]
    if not on_cuda: return
    import torch
    if torch.cuda.is_available(): return
    for item in on_cuda: item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
