"""What the tests of the mathematics share."""

import pytest
import torch
from torch import Generator

from envs import TaskVectorEnv, summarise
from envs.records import Follower


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
    """What algorithms need of worlds in a single process, for doubles; the methods are those of real worlds."""

    device, shard = torch.device("cpu"), (0, 1)
    share = TaskVectorEnv.share
    gather = TaskVectorEnv.gather
    noise = TaskVectorEnv.noise
    minibatches = TaskVectorEnv.minibatches
    choose = TaskVectorEnv.choose
    total = TaskVectorEnv.total
    one_thread = TaskVectorEnv.one_thread

    @property
    def unwrapped(self):
        return self

    @property
    def dtype(self):
        return torch.get_default_dtype()


ALONE = Alone()


class Recorder(Follower):
    """In place of Run: keeps what is logged, and the iterations that were saved."""

    def __init__(self, args):
        super().__init__(args)
        self.logged, self.saved = [], []

    def log(self, state, stats):
        self.logged.append((state["iteration"], state["env_steps"], summarise(stats)))

    def save(self, state):
        self.saved.append(state["iteration"])
