"""What `gym.make` calls for each family, by its class's name: in a module, so that specs can be pickled."""

from functools import partial

from . import HORIZONS
from .core import SingleTaskEnv

globals().update({family.__name__: partial(SingleTaskEnv, family) for family in HORIZONS})
