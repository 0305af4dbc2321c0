"""Point navigation in the plane: the smallest continuous meta-RL problem. Plain torch, on the run's device."""

import math

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from .core import TaskVectorEnv, held_out_uniform


class Navigation2D(TaskVectorEnv):
    """A point walks to a hidden goal in the square [-0.5, 0.5]^2; there the episode ends. This is the paper's.

    Source: Finn, Abbeel, Levine 2017 (arXiv:1703.03400), section 5.3.1; cbfinn/maml_rl `point_env_randgoal.py`.
    Observation: the position [2], starting at the origin. Action: a displacement [2], clipped to +-0.1.
    Reward: -||next position - goal||_2 (the paper's text says squared distance; its code and table use the distance).
    Tasks: the goal [2], uniform in the square; test goals lie in strips of x that training never sees.
    Ends: where both coordinates are within 0.01 of the goal's, as in the authors' code. A policy that has found the
    goal need not stay there against its own noise, so returns are far above those in `Navigation2DEndless`.
    Horizon: 100.
    Differs: nothing known. Observations do not tell the end, so imagined worlds (envs/imagined.py) go on at the goal.
    """

    task_dim = 2
    can_terminate = True
    world_state = ()
    radius = 0.5  # half the side of the drawn square
    end_within = 0.01  # of the goal, in both coordinates

    def __init__(self, num_envs, max_episode_steps=100, device="cpu", dtype=torch.float32):
        space = Box(-np.inf, np.inf, (2,), np.float32)
        super().__init__(num_envs, space, Box(-0.1, 0.1, (2,), np.float32), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        return (held_out_uniform(num_tasks, 2, generator, split) - 0.5).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return -torch.linalg.vector_norm(next_obs - task, dim=-1)

    def _start(self, task, generator):
        self._trace = []
        return torch.zeros(self.num_envs, 2, dtype=self.dtype, device=self.device)

    def _advance(self, action):
        position = self._obs + action
        is_at_goal = (position - self.tasks).abs().amax(-1) < self.end_within
        return position, is_at_goal, {}

    def render_frame(self, index=0):
        """The plane from above: the goal in green, the point in blue, its path in grey."""
        size, scale = 240, 100 / (2 * self.radius) if self.radius > 0.5 else 200
        frame = np.full((size, size, 3), 255, np.uint8)
        self._trace.append(self._obs[index].cpu().numpy().copy())
        rows, columns = np.mgrid[:size, :size]

        def disc(position, radius, colour):
            x, y = size / 2 + position[0] * scale, size / 2 - position[1] * scale
            frame[(columns - x) ** 2 + (rows - y) ** 2 <= radius**2] = colour

        for position in self._trace:
            disc(position, 2, (190, 190, 190))
        disc(self.tasks[index].cpu().numpy()[:2], 6, (40, 160, 70))
        disc(self._trace[-1], 5, (40, 80, 200))
        return frame


class Navigation2DEndless(Navigation2D):
    """The same without an end at the goal: all episodes last to the horizon, and the point has to stay at the goal.

    Source: none; it is the environment of our results of before `Navigation2D` ended.
    """

    can_terminate = False
    end_within = 0.0


class SparseNavigation2D(Navigation2DEndless):
    """A point looks for a hidden goal on a half circle and is paid only near it: exploration must be learned.

    Source: Rakelly et al. 2019 (PEARL, arXiv:1903.08254), section 6.3; katerakelly/oyster `point_robot.py`.
    Observation: the position [2], starting at the origin. Action: a displacement [2], clipped to +-0.1.
    Reward: 1 - d if d = ||next position - goal||_2 is at most 0.2, else 0. `info["dense_reward"]` [B] is -d, for
    algorithms that train on what they will not see at test time.
    Tasks: the goal [2] = (cos a, sin a), a uniform in [0, pi]; test angles lie in arcs that training never sees.
    Horizon: 20.
    Differs: goals are drawn afresh from the whole half circle; the authors' code shuffles 100 fixed angles.
    """

    radius = 1.0

    def __init__(self, num_envs, max_episode_steps=20, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        angle = math.pi * held_out_uniform(num_tasks, 1, generator, split)
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        distance = torch.linalg.vector_norm(next_obs - task, dim=-1)
        return torch.where(distance <= 0.2, 1 - distance, torch.zeros_like(distance))

    dense_reward = staticmethod(Navigation2D.reward)

    def _advance(self, action):
        next_obs, ended, info = super()._advance(action)
        return next_obs, ended, info | {"dense_reward": self.dense_reward(self._obs, action, next_obs, self.tasks)}
