"""A corridor with a small reward near by and a large one far away: how far to look ahead decides. Plain torch."""

import torch
from torch import Tensor

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
