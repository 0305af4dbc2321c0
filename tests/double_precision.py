"""What the tests of the mathematics share."""

from collections import defaultdict

import numpy as np
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


def interval(x, tasks):
    """Half the width of the 95 % interval of a mean over different tasks: t s / sqrt(n), with n - 1 degrees of freedom.

    The fraction of Student's distribution that lies between -t and t is that of the integral of cos^(n - 2) from 0 to
    the angle whose tangent is t / sqrt(n - 1).
    """
    values = defaultdict(list)
    for value, task in zip(x, tasks.tolist(), strict=True):
        values[tuple(task)].append(float(value))
    means = [np.mean(group) for group in values.values()]
    n = len(means)
    edges = np.linspace(0, np.pi / 2, 10**5)
    mass = (np.cos((edges[1:] + edges[:-1]) / 2) ** (n - 2)).cumsum()
    t = np.sqrt(n - 1) * np.tan(np.interp(0.95, mass / mass[-1], edges[1:]))
    return t * np.std(means, ddof=1) / np.sqrt(n)


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

    def test_set(self, num_tasks):
        generator = seeded(1)
        return self.sample_tasks(num_tasks, generator, "test"), generator

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
