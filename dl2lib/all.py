"""The front door: every public name of every chapter, in the chapters' order. Written by hand, not exported."""
from torch import tensor  # code of the lesson uses it bare

from dl2lib.state import *
from dl2lib.core import *
from dl2lib.safefile import *
from dl2lib.scoreboard import *
from dl2lib.files import *
from dl2lib.images import *
from dl2lib.datasets import *
from dl2lib.schedules import *
from dl2lib.callbacks import *
from dl2lib.runner import *
from dl2lib.hooks import *
from dl2lib.convnet import *
from dl2lib.lsuv import *
from dl2lib.resnet import *
from dl2lib.splits import *
from dl2lib.loader import *
from dl2lib.datablock import *
from dl2lib.check import *
from dl2lib.datacache import *
from dl2lib.foreach import *
from dl2lib.groups import *
from dl2lib.optimizers import *
from dl2lib.zoo import *
from dl2lib.learner import *
from dl2lib.progress import *
from dl2lib.practice import *
from dl2lib.checkpoints import *
from dl2lib.inference import *
from dl2lib.augmentation import *
from dl2lib.batch_warp import *
from dl2lib.train import *
