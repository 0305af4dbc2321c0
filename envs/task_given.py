"""TaskGiven: the task vector beside the observation, for a policy that need not find out (the oracle)."""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector.utils import batch_space
from torch import Tensor


class TaskGiven(gym.vector.VectorWrapper):
    """Observations [B, O + P], the family's own [B, O] followed by the world's task [B, P]; works for every family.

        envs = TaskGiven(envs.make("HalfCheetahVel-v0", N * E, horizon=100))
        obs, info = envs.reset(seed=0, options={"tasks": tasks})

    Args:
        envs: a `TaskVectorEnv` with observations in a Box, or one in a `ScaleActions`.
    """

    def __init__(self, envs: gym.vector.VectorEnv):
        super().__init__(envs)
        space, unbounded = envs.single_observation_space, np.full(envs.unwrapped.task_dim, np.inf)
        low, high = np.concatenate([space.low, -unbounded]), np.concatenate([space.high, unbounded])
        self.single_observation_space = Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype)
        self.observation_space = batch_space(self.single_observation_space, envs.num_envs)

    def _beside(self, obs: Tensor) -> Tensor:
        return torch.cat([obs, self.unwrapped.tasks.to(obs)], -1)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """As the family's own `reset`."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._beside(obs), info

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """As the family's own `step`."""
        obs, *rest = self.env.step(action)
        return self._beside(obs), *rest

    def single_world(self) -> "TaskGiven":
        """One world of the same family, horizon and device, for pictures."""
        return TaskGiven(self.env.single_world())
