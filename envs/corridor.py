"""How far to look ahead: a corridor with a small reward near by, and lights that have no consequences. Plain torch."""

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.nn.functional import one_hot

from .core import TaskVectorEnv
from .gridworlds import GridWorld


class Corridor(GridWorld):
    """A corridor of 12 cells. Its near end pays little at once, its far end pays more, after a walk.

    Source: this project's, after the chains on which discounts are explained (Sutton and Barto 2018, section 10.3).
    Observation: the cell [12], one-hot; each episode starts in the third. Action: left, right.
    Reward: the task's first number for the step into the first cell, 2 steps from the start, its second one for the
    step into the last cell, 9 steps from the start; either ends the episode. Else 0.
    Tasks: one, [2] = (0.25, 1). At the start the far end is worth more if gamma^7 > 1/4, so above gamma = 0.82.
    Horizon: 40.
    Differs: it has no original.
    """

    task_dim = 2
    map = ("..s.........",)
    moves = ((0, -1), (0, 1))
    pays = (0.25, 1.0)

    def __init__(self, num_envs, max_episode_steps=40, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        return torch.tensor(self.pays, dtype=self.dtype, device=self.device).repeat(num_tasks, 1)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return next_obs[..., 0] * task[..., 0] + next_obs[..., -1] * task[..., 1]

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return obs[..., 0] + obs[..., -1] > 0

    def colours(self, index):
        return {0: (205, 127, 50), self.num_cells - 1: (240, 190, 40)}  # copper and gold


class NoisyLights(TaskVectorEnv):
    """One of five lights is on, and its button pays; nothing that is done has consequences, and rewards are noisy.

    Source: this project's: a contextual bandit, played for many steps (Sutton and Barto 2018, section 2.9).
    Observation: which light is on [5], one-hot, drawn anew in each step. Action: one of five buttons.
    Reward: 1 for the button of the light, else 0, and normal noise, drawn from the environment's generator; the pure
    function `reward` gives the mean.
    Tasks: one, [1] = 3, the noise's standard deviation. A return of k steps has the noise of k steps, so every look
    ahead only makes it harder to see which button pays.
    Horizon: 40. No early end.
    Differs: it has no original.
    """

    lights = 5
    noise_std = 3.0
    task_dim = 1
    world_state = ()

    def __init__(self, num_envs, max_episode_steps=40, device="cpu", dtype=torch.float32):
        space = Box(0, 1, (self.lights,), np.float32)
        super().__init__(num_envs, space, Discrete(self.lights), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        return torch.full((num_tasks, 1), self.noise_std, dtype=self.dtype, device=self.device)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return obs.gather(-1, action[..., None]).squeeze(-1)

    def _lit(self, generator):
        light = (self._draw(torch.rand, generator) * self.lights).long().clamp(max=self.lights - 1)
        return one_hot(light, self.lights).to(self.device, self.dtype)

    def _start(self, task, generator):
        return self._lit(generator)

    def _advance(self, action):
        noise = self._draw(torch.randn, self._generator).to(self._obs)
        self._paid = self.reward(self._obs, action, None, self.tasks) + noise * self.tasks[:, 0]
        return self._lit(self._generator), self._over, {}

    def _transition_reward(self, action, next_obs):
        return self._paid
