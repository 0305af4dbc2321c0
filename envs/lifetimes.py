"""Lifetimes: every world plays episode after episode of its own task, on its own clock."""

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from torch import Generator, Tensor

from .core import Unsuitable


class Lifetimes(gym.vector.VectorWrapper):
    """Restarts a world in the step that ends its episode, and gives it another task after `episodes` episodes.

        envs = Lifetimes(envs.make("RandomABC-v0", B, horizon=10, discrete=True), episodes=50)
        obs, info = envs.reset(seed=0, options={"tasks": tasks})                # all lifetimes begin
        obs, reward, terminated, truncated, info = envs.step(action)            # for ever

    This is Gymnasium's autoreset in the same step: where an episode ended (`terminated`: early, `truncated`: at the
    horizon), `obs` is the next episode's first observation. `info` holds

    * "final_obs" [B, O]: the observation that the action led to, before any restart; elsewhere equal to `obs`;
    * "episode" [B] (int64): the number, from 0, of the episode in its lifetime in which the step was taken;
    * "born" [B] (bool): the world's lifetime ended in this step, and a new one with a fresh training task began.

    Between the episodes of a lifetime the task stays, except where the family lets it change (`task_in_episode`).

    Args:
        envs: a `TaskVectorEnv`, or one in a `ScaleActions`; Unsuitable (a TypeError) if its worlds can only start
            together.
        episodes: of a lifetime, at least 1 (else ValueError).
    """

    def __init__(self, envs: gym.vector.VectorEnv, episodes: int):
        super().__init__(envs)
        if envs.unwrapped.world_state is None:
            source = envs.unwrapped.source
            raise Unsuitable(f"worlds of {source} can only start together, and in lifetimes they must start singly")
        if episodes < 1:
            raise ValueError(f"a lifetime has at least 1 episode, got {episodes}")
        self.episodes, self._births = episodes, Generator()
        self.metadata = {**envs.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Begin all lifetimes: as the family's own `reset`; `options={"episode": [B]}` begins in later episodes.

        ValueError for other numbers than those of episodes, and for a "reset_mask": lifetimes begin together."""
        family = self.unwrapped
        if "reset_mask" in (options or {}):
            raise ValueError("reset_mask: lifetimes begin together")
        begin = (options or {}).get("episode", torch.zeros(self.num_envs, dtype=torch.int64))
        begin = torch.as_tensor(begin, device=family.device)
        if (
            begin.shape != (self.num_envs,)
            or begin.dtype != torch.int64
            or not 0 <= begin.min() <= begin.max() < self.episodes
        ):
            raise ValueError(
                f"episode must be [{self.num_envs}] numbers (int64) from 0 to {self.episodes - 1}, got {begin}"
            )
        obs, info = self.env.reset(seed=seed, options=options)
        self._births.manual_seed(int(torch.randint(2**62, (1,), generator=family._generator)))
        self._episode, self._task = begin, family.tasks
        if begin.any():
            obs = self._restart(torch.ones_like(begin, dtype=torch.bool))
        return obs, info

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """Advance all worlds, into the next episode or the next lifetime where one ends."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        over = terminated | truncated
        born = over & (self._episode == self.episodes - 1)
        info |= {"final_obs": obs, "episode": self._episode.clone(), "born": born}
        if bool(over.any()):
            self._episode = torch.where(born, 0, self._episode + over)
            if bool(born.any()):
                fresh = self.unwrapped.sample_tasks(self.num_envs, self._births)
                self._task = torch.where(born[:, None], fresh, self._task)
            obs = self._restart(over)
        return obs, reward, terminated, truncated, info

    def _restart(self, worlds: Tensor) -> Tensor:
        tasks = self.unwrapped.task_in_episode(self._task, self._episode)
        return self.env.reset(options={"tasks": tasks, "reset_mask": worlds})[0]

    def save_worlds(self) -> dict[str, Tensor]:
        """Everything that coming steps depend on, for checkpoints."""
        own = {"episode": self._episode, "task": self._task, "births": self._births.get_state()}
        return self.unwrapped.save_worlds() | own

    def load_worlds(self, saved: dict[str, Tensor]) -> Tensor:
        """Continue where `save_worlds` was called, bit-identically on the CPU; the observation [B, O] there."""
        device = self.unwrapped.device
        self.reset(seed=0)
        self.unwrapped.load_worlds(saved)
        self._episode, self._task = saved["episode"].to(device), saved["task"].to(device)
        self._births.set_state(saved["births"])
        return self.unwrapped._obs.clone()

    def single_world(self) -> "Lifetimes":
        """One world of the same family, horizon, episodes and device, for pictures."""
        return Lifetimes(self.env.single_world(), self.episodes)
