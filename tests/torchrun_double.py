"""Runs a file of algos/ in double precision, for tests/test_processes.py: torchrun .. torchrun_double.py NAME FLAGS.

What --compile compiles is traced, but runs as torch's own operators: the compiler takes minutes.
"""

import importlib
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_default_dtype(torch.float64)
gym.make_vec = partial(gym.make_vec, dtype=torch.float64)
compile_with = torch.compile
torch.compile = lambda function, mode: compile_with(function, backend="aot_eager")
importlib.import_module(f"algos.{sys.argv[1]}").main(sys.argv[2:])
