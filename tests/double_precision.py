"""What the tests of the mathematics share."""

import pytest
import torch
from torch import Generator


@pytest.fixture(autouse=True)
def float64():
    """Every test of a module that imports this runs in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seeded(seed):
    return Generator().manual_seed(seed)


def flat(params):
    return torch.cat([value.flatten() for value in params.values()])


class Alone:
    """Of worlds in a single process, what updates need."""

    @property
    def unwrapped(self):
        return self

    def share(self, x, dim=0):
        return x

    def gather(self, x):
        return x

    def in_any_process(self, condition):
        return bool(condition)


ALONE = Alone()


class Recorder:
    """In place of Run."""

    stopping = False

    def __init__(self):
        self.logged, self.saved = [], []

    def log(self, state, stats):
        self.logged.append((state["iteration"], state["env_steps"], stats))

    def save(self, state):
        self.saved.append(state["iteration"])
