"""Two experiments of psychology that a learner with a memory can be put through. Plain torch, on the run's device."""

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from .core import TaskVectorEnv, alternating_signs, held_out_uniform

COMMON = 0.8  # probability that a choice leads where it usually does
HIGH, LOW = 0.9, 0.1  # probabilities of a reward in the better and in the worse of the two places
REVERSAL = 0.025  # probability, after each trial, that the two change places


class TwoStep(TaskVectorEnv):
    """The two-step task: a choice leads to one of two places, usually to its own, and one of the places pays better.

    Does a learner repeat what was rewarded, or does it know by which way it came? After a rare way a reward speaks for
    the *other* choice; only who knows the ways takes it so.

    Source: Daw et al. 2011, as in Wang et al. 2016 (arXiv:1611.05763) and 2018 (Nature Neuroscience 21).
    Observation: one-hot [3] of the start, the first and the second place. Action: 0 or 1 at the start, where action k
    leads to place k with probability 0.8 and to the other one with 0.2; without effect in a place.
    Reward: in a place 1 or 0, by chance: 1 with probability 0.9 in the better place, 0.1 in the other. At the start 0.
    After each visit the two change places with probability 0.025, unseen. The pure function `reward` knows
    nothing of the changes and gives the mean over both, 0.5.
    Tasks: +1 where the first place pays better at first, -1 where the second does; every second task is +1. There are
    no others for tests.
    Horizon: 200, that is 100 trials of two steps, in one episode.
    Differs: from Wang et al. nothing known; from Daw et al., who have two more choices in each place and payoffs that
    drift.
    """

    task_dim = 1
    world_state = ("_better",)  # what a step depends on beside task and observation

    def __init__(self, num_envs, max_episode_steps=200, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, Box(0, 1, (3,), np.float32), Discrete(2), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        return alternating_signs(num_tasks, generator, split).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return 0.5 * (1 - obs[..., 0])

    def _one_hot(self, state):
        return torch.nn.functional.one_hot(state, 3).to(self.dtype)

    def _start(self, task, generator):
        self._better = (task[:, 0] < 0).long()  # the number of the place that pays better now
        return self._one_hot(torch.zeros_like(self._better))

    def _advance(self, action):
        ways, pays, reversal = self._draw(torch.rand, self._generator, 3).to(self._obs).unbind(1)  # [B] each
        is_start = self._obs[:, 0] > 0
        place = self._obs[:, 2].long()  # 0 at the start, too, where it has no effect
        leads_to = torch.where(ways < COMMON, action, 1 - action)
        probability = torch.where(place == self._better, HIGH, LOW)
        self._paid = (~is_start & (pays < probability)).to(self._obs)
        changes = ~is_start & (reversal < REVERSAL)
        self._better = torch.where(changes, 1 - self._better, self._better)
        return self._one_hot(torch.where(is_start, 1 + leads_to, 0)), self._over, {}

    def _transition_reward(self, action, next_obs):
        return self._paid  # what `step` pays; `reward` gives the mean


class Harlow(TaskVectorEnv):
    """Two objects, one of which always hides food: after one look under either, a learner can know which.

    A new pair of objects comes with every task, so no object's worth can be learned; what can be learned is to learn
    from the first trial.

    Source: Harlow 1949, "The formation of learning sets", as in Wang et al. 2016 (arXiv:1611.05763).
    Observation: [2 * 8], features of the left object, then of the right one. Action: 0 for the left, 1 for the right.
    Reward: 1 under the object with food, else 0.
    Tasks: [2 * 8 + 1], features of two objects, uniform in [-1, 1], and the number (0, 1) of the one with food. Every
    task has objects of its own; of test tasks the first object's first feature lies in strips, a fifth of [-1, 1],
    that training never draws. The objects show in the observation, never the food; which of them is on the left is
    drawn anew for every choice.
    Horizon: 1, a choice; a task's trials are episodes (`Trials`), six in the sources.
    Differs: objects are vectors, chosen by number; in the paper they are pictures, chosen by looking at them.
    """

    features = 8
    task_dim = 2 * features + 1
    world_state = ()

    def __init__(self, num_envs, max_episode_steps=1, device="cpu", dtype=torch.float32):
        space = Box(-1, 1, (2 * self.features,), np.float32)
        super().__init__(num_envs, space, Discrete(2), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        objects = 2 * held_out_uniform(num_tasks, 2 * self.features, generator, split) - 1
        food = torch.randint(2, (num_tasks, 1), generator=generator)
        return torch.cat([objects, food], dim=1).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        left, right = obs.chunk(2, dim=-1)
        first, second = task[..., :-1].chunk(2, dim=-1)
        chosen = torch.where(action[..., None] == 0, left, right)
        fed = torch.where(task[..., -1:] == 0, first, second)
        return (chosen == fed).all(dim=-1).to(obs.dtype)

    def _show(self):
        swapped = self._draw(torch.rand, self._generator, 1).to(self.tasks) < 0.5
        objects = self.tasks[:, :-1]
        return torch.where(swapped, objects.roll(self.features, dims=1), objects)

    def _start(self, task, generator):
        return self._show()  # `task` is self.tasks

    def _advance(self, action):
        return self._show(), self._over, {}
