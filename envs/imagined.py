"""Imagined: worlds of a family that move as a learned model says, for algorithms that practise in their models."""

from collections.abc import Callable

import torch
from torch import Tensor

from .core import ScaleActions, TaskVectorEnv


class Imagined(ScaleActions):
    """A batch of the same family, horizon and action scale as another, whose transitions come from a function.

        imagined = Imagined(envs.make("HalfCheetahForward-v0", 20, horizon=200), num_envs=100)
        imagined.follow(dynamics, low, high)               # next_obs [B, O] = dynamics(obs [B, O], action [B, A])
        obs, info = imagined.reset(seed=0, options={"tasks": tasks})      # the family's own start states and tasks
        obs, reward, terminated, truncated, info = imagined.step(action)  # its rewards, early ends and horizon

    An imagined world whose prediction leaves [low, high], or is not finite, has diverged: as in the physics, it ends
    there, stays at the last good observation, and `info["diverged"]` [B] (bool) stays true for it until the reset.
    Where rewards are negative an early end would be worth having, so the step in which a world diverges is charged for
    the steps that are left: with its own reward for each of them, if that is negative. A positive one ends with it.

    Args:
        envs: a `TaskVectorEnv` in a `ScaleActions`; it is not changed. TypeError for another, or if its reward is not a
            function of observations, action and task.
        num_envs: number of imagined worlds B.
    """

    def __init__(self, envs: ScaleActions, num_envs: int):
        family = envs.unwrapped
        if not family.knows_reward or not isinstance(envs, ScaleActions):
            raise TypeError("its reward is not known as a function of what is observed, or its actions are choices")
        family.check_reward()
        super().__init__(family.another(num_envs), envs.scale)
        self.unwrapped.can_terminate, self.unwrapped.shard = True, family.shard
        self.unwrapped.source = f"a model of {family.source}"
        self.unwrapped._advance = self._predict  # all else is the family's own
        self.unwrapped._transition_reward = self._charged_reward

    def follow(self, dynamics: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor) -> None:
        """Move by `dynamics` from now on, within [low, high] ([O] each); actions are within the family's bounds."""
        self.dynamics, self.lowest, self.highest = dynamics, low, high

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """As the family's own `reset`; ValueError for a "reset_mask", since imagined worlds start together."""
        if "reset_mask" in (options or {}):
            raise ValueError("imagined worlds start together: no reset_mask")
        obs, info = self.env.reset(seed=seed, options=options)
        self.diverged = torch.zeros(self.num_envs, dtype=torch.bool, device=obs.device)
        return obs, info

    @property
    def diverged_share(self) -> float:
        """Of the worlds, how many have diverged since the reset, from 0 to 1."""
        return float(self.unwrapped.gather(self.diverged).float().mean())

    def _predict(self, action: Tensor) -> tuple[Tensor, Tensor, dict]:
        family = self.unwrapped
        next_obs = self.dynamics(family._obs, action)
        is_inside = (next_obs >= self.lowest) & (next_obs <= self.highest) & (next_obs.abs() < torch.inf)
        wild = ~is_inside.all(-1)
        self._diverges = wild & ~family._over  # in this step
        self.diverged = self.diverged | self._diverges
        next_obs = torch.where(wild[:, None], family._obs, next_obs)
        return next_obs, family.ended(next_obs) | wild, {"diverged": self.diverged.clone()}

    def _charged_reward(self, action: Tensor, next_obs: Tensor) -> Tensor:
        family = self.unwrapped
        reward = TaskVectorEnv._transition_reward(family, action, next_obs)
        charge = (family.horizon - family._steps - 1) * reward.clamp(max=0)  # _steps: before this one
        return torch.where(self._diverges, reward + charge, reward)
