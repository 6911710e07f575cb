"""A deep learning library in notebooks. `from dl2lib.all import *` brings every public name; this file loads no chapter."""

__version__ = "0.0.1"
