"""Trials: several episodes of one task in a row, which a learner with a memory sees as one."""

import gymnasium as gym
import torch
from torch import Tensor

from .processes import in_any_process


class Trials(gym.vector.VectorWrapper):
    """Plays `episodes` episodes of every world's task, one after the other; works for every family of the contract.

        envs = Trials(envs.make("HalfCheetahDir-v0", N, horizon=200), episodes=2)
        obs, info = envs.reset(seed=0, options={"tasks": tasks})                # a trial begins
        while not envs.is_over:
            obs, reward, terminated, truncated, info = envs.step(action)

    Between two episodes the worlds start again in fresh states, with the tasks they have, and the observation that
    `step` returns is the new episode's first one. An episode begins for all worlds together, when the one before is
    over in all of them; until then the others wait. A trial ends at its last episode's end, never earlier:
    `terminated` is always false, `truncated` is true for all worlds in the trial's last step. `info` holds

    * "done" [B] (bool): this step ended the world's episode, early or at the horizon;
    * "waits" [B] (bool): the world waits, so that its next action is without effect: reward 0, the observation repeats;
    * "final_obs" [B, O]: the observation that the step led to, also where the next episode begins behind it;
    * "episode": the number of the episode, from 0, in which the step was taken.

    Args:
        envs: a `TaskVectorEnv`, or one in a `ScaleActions`.
        episodes: of a trial, at least 1 (else ValueError).
    """

    def __init__(self, envs: gym.vector.VectorEnv, episodes: int):
        super().__init__(envs)
        if episodes < 1:
            raise ValueError(f"a trial has at least 1 episode, got {episodes}")
        self.episodes, self._episode = episodes, episodes

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended (or none has begun), so that `reset` must come next."""
        return self._episode == self.episodes

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Begin a trial: as the family's own `reset`; ValueError for a "reset_mask": trials begin together."""
        if "reset_mask" in (options or {}):
            raise ValueError("a trial begins in all worlds at once: no reset_mask")
        obs, info = self.env.reset(seed=seed, options=options)
        self._episode, self._waits = 0, torch.zeros(self.num_envs, dtype=torch.bool, device=obs.device)
        return obs, info

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """Advance all worlds, into the next episode where one ends; ResetNeeded after the trial's last step."""
        if self.is_over:
            raise gym.error.ResetNeeded("call reset() before the first step and after every trial")
        obs, reward, terminated, truncated, info = self.env.step(action)
        over, family = terminated | truncated, self.unwrapped
        info |= {"done": over & ~self._waits, "final_obs": obs, "episode": self._episode}
        self._waits = over
        if family.at_horizon or (family.can_terminate and not in_any_process(not over.all(), over.device)):
            self._episode += 1
            self._waits = torch.zeros_like(over)
            if not self.is_over:
                obs, _ = self.env.reset(options={"tasks": family.tasks})
        info["waits"] = self._waits
        return obs, reward, torch.zeros_like(over), torch.full_like(over, self.is_over), info

    def single_world(self) -> "Trials":
        """One world of the same family, horizon, episodes and device, for pictures."""
        return Trials(self.env.single_world(), self.episodes)
