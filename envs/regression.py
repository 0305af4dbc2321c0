"""Regression tasks: learn a curve from a few of its points. Plain torch, on the run's device."""

import math

import torch
from torch import Tensor

from .core import SupervisedTasks, held_out_uniform


class Sinusoid(SupervisedTasks):
    """A sine wave of hidden amplitude and phase.

    Source: Finn, Abbeel, Levine 2017 (arXiv:1703.03400), section 5.1; cbfinn/maml `data_generator.py`.
    Input: x [1], uniform in [-5, 5]. Target: a sin(x - phase) [1].
    Tasks: (a, phase) [2], a uniform in [0.1, 5], phase uniform in [0, pi]; test amplitudes lie in strips that training
    never sees.
    Differs: the authors draw test tasks from the training distribution.
    """

    num_inputs, num_outputs = 1, 1
    max_phase = math.pi

    def sample_tasks(self, num_tasks, generator, split="train"):
        unit = held_out_uniform(num_tasks, 2, generator, split)
        return torch.stack([0.1 + 4.9 * unit[:, 0], self.max_phase * unit[:, 1]], 1).to(self.device, self.dtype)

    @staticmethod
    def target(x: Tensor, task: Tensor) -> Tensor:
        """Targets [.., 1] for x [.., 1] and task [.., 2]."""
        return task[..., :1] * torch.sin(x - task[..., 1:])

    def sample(self, tasks, sizes, generator):
        x = (10 * torch.rand(len(tasks), sum(sizes), 1, generator=generator) - 5).to(tasks)
        y = self.target(x, tasks[:, None])
        return list(zip(x.split(sizes, 1), y.split(sizes, 1), strict=True))


class SinusoidAllPhases(Sinusoid):
    """A sine wave of hidden amplitude and of any phase.

    Source: Nichol, Achiam, Schulman 2018 (arXiv:1803.02999), section 4.
    Input, target, tasks: those of `Sinusoid`, with the phase uniform in [0, 2 pi].
    Differs: the authors' training points are 50 fixed ones, evenly spaced.
    """

    max_phase = 2 * math.pi


class SinusoidOrLine(Sinusoid):
    """A sine wave or a straight line.

    Source: Sung, Zhang, Xiang, Hospedales, Yang 2017 (Meta-Critic Networks, arXiv:1706.09529), section 4.1.
    Input: x [1], uniform in [-5, 5]. Target [1]: a sin(x + b) with a uniform in [1, 5], b in [0, pi]; or c x + d with
    c and d uniform in [-3, 3].
    Tasks: (kind, a or c, b or d) [3], kind 0 for a wave and 1 for a line, alternating; test amplitudes and slopes lie
    in strips that training never sees.
    Differs: the authors draw test tasks from the training distribution.
    """

    def sample_tasks(self, num_tasks, generator, split="train"):
        unit = held_out_uniform(num_tasks, 2, generator, split)
        kind = (torch.arange(num_tasks) + torch.randint(2, (1,), generator=generator)) % 2
        wave = torch.tensor([1.0, 0.0]) + unit * torch.tensor([4.0, math.pi])
        task = torch.where(kind[:, None] == 1, 6 * unit - 3, wave)
        return torch.cat([kind[:, None], task], 1).to(self.device, self.dtype)

    @staticmethod
    def target(x, task):
        """Targets [.., 1] for x [.., 1] and task [.., 3]."""
        kind, first, second = task.split(1, -1)
        return torch.where(kind == 1, first * x + second, first * torch.sin(x + second))
