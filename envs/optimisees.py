"""Optimisees: functions for an optimiser to minimise, many at once. Plain torch, on the run's device."""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

from .core import TestSet, held_out_normal
from .fewshot import SIDE, Glyphs


class Optimisees(TestSet):
    """The contract of families of functions f of C numbers (the coordinates); a family implements the methods below.

        tasks = family.sample_tasks(N, generator, split="train")          # [N, P], "test" is held out
        params = family.start(tasks, generator)                           # [N, C]
        batches = family.batches(tasks, T, generator)                     # what f depends on in each of T steps
        loss = family.loss(params, tasks, batches[0])                     # [N], differentiable

    Args:
        device: where all of it lives; random numbers are drawn on the CPU, the same for all devices.
        dtype: the floating-point type.
    """

    num_coordinates: int  # C

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype

    @property
    def unwrapped(self) -> "Optimisees":
        """Itself, as a batch of worlds without a wrapper."""
        return self


class Quadratics(Optimisees):
    """f(x) = |W x - y|^2 in ten dimensions.

    Source: Andrychowicz et al. 2016 (arXiv:1606.04474).
    Start: standard normal. Batches: none, f is the same in all steps.
    Tasks: (W, y) [110], standard normal; the first number of test tasks lies in strips that training never sees.
    Differs: the start is ours.
    """

    num_coordinates = 10

    def sample_tasks(self, num_tasks: int, generator: Generator, split: str = "train") -> Tensor:
        return held_out_normal(num_tasks, 110, generator, split).to(self.device, self.dtype)

    def start(self, tasks: Tensor, generator: Generator) -> Tensor:
        return torch.randn(len(tasks), 10, generator=generator).to(tasks)

    def batches(self, tasks: Tensor, steps: int, generator: Generator) -> list[None]:
        return [None] * steps

    def loss(self, params: Tensor, tasks: Tensor, batch: None) -> Tensor:
        matrix = tasks[:, :100].unflatten(1, (10, 10))
        return ((matrix @ params[..., None]).squeeze(2) - tasks[:, 100:]).square().sum(1)


class GlyphNets(Optimisees):
    """The cross-entropy of a small net that tells five drawn characters apart.

    Source: ours, after the nets on MNIST of Andrychowicz et al. 2016.
    Input: a character of `Glyphs` on 7 x 7 pixels (means of 4 x 4). One hidden layer of 20 sigmoid units.
    Start: weights and biases uniform in +-1 / sqrt(fan-in).
    Batches: 25 of the task's 100 drawings, drawn anew in each step.
    Tasks: the classes [5]; those of test tasks are never trained on.
    """

    sizes = (49, 20, 5)
    num_coordinates = 49 * 20 + 20 + 20 * 5 + 5

    def __init__(self, device="cpu", dtype=torch.float32):
        super().__init__(device, dtype)
        self.glyphs = Glyphs(5, device)
        images = self.glyphs.images.unflatten(2, (SIDE, SIDE)).to(self.dtype) / 255
        self.images = functional.avg_pool2d(images, 4).flatten(2)  # [classes, 20, 49]

    def sample_tasks(self, num_tasks: int, generator: Generator, split: str = "train") -> Tensor:
        return self.glyphs.sample_tasks(num_tasks, generator, split)

    def start(self, tasks: Tensor, generator: Generator) -> Tensor:
        inputs, hidden, outputs = self.sizes
        first = (2 * torch.rand(len(tasks), (inputs + 1) * hidden, generator=generator) - 1) / math.sqrt(inputs)
        second = (2 * torch.rand(len(tasks), (hidden + 1) * outputs, generator=generator) - 1) / math.sqrt(hidden)
        return torch.cat([first, second], 1).to(self.device, self.dtype)

    def batches(self, tasks: Tensor, steps: int, generator: Generator) -> list[Tensor]:
        return list(torch.randint(100, (steps, len(tasks), 25), generator=generator).to(self.device))

    def loss(self, params: Tensor, tasks: Tensor, batch: Tensor) -> Tensor:
        inputs, hidden, outputs = self.sizes
        x = self.images[tasks.take_along_dim(batch // 20, 1), batch % 20]  # [N, 25, 49]
        w1, b1, w2, b2 = params.split([inputs * hidden, hidden, hidden * outputs, outputs], 1)
        h = torch.sigmoid(x @ w1.unflatten(1, (inputs, hidden)) + b1[:, None])
        logit = h @ w2.unflatten(1, (hidden, outputs)) + b2[:, None]
        return -logit.log_softmax(2).take_along_dim((batch // 20)[..., None], 2).mean((1, 2))
