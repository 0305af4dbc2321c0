"""Your own Gymnasium environments as a batch of worlds with tasks, for most algorithms of this repository.

Their worlds start together, their actions are no choices, and their rewards are not known as a function: so
lifetime_rewards, lirpg and meta_critic, and mbmpo, refuse them in one line.

The protocol. A single environment with one-dimensional Box observations and actions and two more methods:

    def sample_tasks(self, num_tasks: int, rng: np.random.Generator, split: str) -> array [num_tasks, task_dim]
        # plain numbers; split is "train" or "test", raise ValueError for another one
    def set_task(self, task: array [task_dim]) -> None
        # called before every reset(seed=...); the task must not show in the observation

    envs = AdaptedVectorEnv(lambda: MyEnv(), num_envs=40, max_episode_steps=100, device="cuda")

Wrappers are welcome: the methods are looked for in `env.unwrapped`. `envs/metaworld.py` is a worked example.

* Actions need finite bounds. They are clipped to them here, so leave out `ClipAction`, which takes the bounds away.
* Test tasks should not be training tasks. Nobody checks that, since small families may have the same tasks in both.
* Tasks become numbers of type `dtype`. Whole numbers that it cannot hold, as float32 most above 2^24, are an error.
* For pictures make the environments with render_mode="rgb_array".
"""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Generator, Tensor

from envs.core import TaskVectorEnv, Unsuitable, refuse_unbounded


def to_type(tasks: np.ndarray, dtype: torch.dtype, source: str) -> Tensor:
    """Tasks [N, P] as tensors of this type; Unsuitable where rounding makes another task of one.

    Whole numbers, such as seeds, must stay what they are; others may change by a millionth.
    """
    numbers = tasks.astype(np.float64)
    converted = torch.from_numpy(numbers).to(dtype)
    after = converted.double().numpy()
    if tasks.dtype.kind == "f":
        differ = after != numbers
    else:  # float64 does not hold them all either, but Python compares whole numbers exactly
        differ = (after.astype(object) != tasks.astype(object)).astype(bool)
    with np.errstate(invalid="ignore"):
        is_close = np.abs(after - numbers) <= 1e-6 * np.abs(numbers)
    wrong = differ & ~(is_close & (numbers != np.rint(numbers))) & np.isfinite(numbers)
    if wrong.any():
        numbers = tasks[wrong].tolist()[0], after[wrong].tolist()[0]
        before, then = (str(int(x)) if float(x).is_integer() else str(x) for x in numbers)
        name, largest = str(dtype).removeprefix("torch."), round(2 / torch.finfo(dtype).eps)
        raise Unsuitable(
            f"{source}.sample_tasks gives {before}, which is {then} in {name}, another task: whole numbers are safe up "
            f"to {largest}, so take smaller ones (of seeds, fewer) or split one into two numbers"
        )
    return converted


class AdaptedVectorEnv(TaskVectorEnv):
    """`TaskVectorEnv` over single environments, stepped one after the other in the calling process.

    * A world that terminates is not stepped again, and not reset before the batch is.
    * The horizon is this class's. An environment that truncates before it is an error: make it without a time limit.
    * Numbers that all environments report in `info` come back as tensors `info[name]` [B] (the last ones reported, for
      a world that is over); other entries are dropped.
    * The reward is whatever the environments return, so there is no pure `reward` function here.

    Args:
        make_env: returns a new environment; called num_envs times.
        num_envs, max_episode_steps, device, dtype: see `TaskVectorEnv`.
    Raises:
        Unsuitable: a TypeError and ValueError: an environment lacks a method of the protocol, has spaces that are not
            one-dimensional boxes or actions without bounds, or draws tasks of a wrong shape or with numbers too large.
    """

    can_terminate = True

    def __init__(
        self,
        make_env: Callable[[], gym.Env],
        num_envs: int,
        max_episode_steps: int = 200,
        device="cpu",
        dtype=torch.float32,
    ):
        self._make_env = make_env
        self.envs = [make_env() for _ in range(num_envs)]
        first = self.envs[0]
        source = type(first.unwrapped).__name__
        for method in ("sample_tasks", "set_task"):
            if not callable(getattr(first.unwrapped, method, None)):
                raise Unsuitable(f"{source} needs a method {method}; see envs/adapter.py")
        for name in ("observation_space", "action_space"):
            space = getattr(first, name)
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise Unsuitable(f"{source}'s {name} must be a one-dimensional Box, got {space}")
        refuse_unbounded(first.action_space, source)
        super().__init__(num_envs, first.observation_space, first.action_space, max_episode_steps, device, dtype)
        self.source = source
        self.task_dim = self._draw_tasks(1, 0, "train").shape[1]

    def _draw_tasks(self, num_tasks: int, seed: int, split: str) -> Tensor:
        tasks = np.asarray(self.envs[0].unwrapped.sample_tasks(num_tasks, np.random.default_rng(seed), split))
        if tasks.ndim != 2 or len(tasks) != num_tasks:
            raise Unsuitable(
                f"{self.source}.sample_tasks({num_tasks}, ..) must return [{num_tasks}, task_dim], got {tasks.shape}"
            )
        return to_type(tasks, self.dtype, self.source)

    def sample_tasks(self, num_tasks, generator: Generator, split="train"):
        seed = int(torch.randint(2**62, (1,), generator=generator))
        return self._draw_tasks(num_tasks, seed, split).to(self.device)

    @staticmethod
    def reward(obs, action, next_obs, task):
        raise NotImplementedError("an adapted environment's reward is not known as a function; use what step returns")

    def _start(self, task, generator):
        seeds = self.share(torch.randint(2**31, (self.num_envs * self.shard[1],), generator=generator)).tolist()
        self._infos = [{} for _ in self.envs]
        self._alive = np.ones(self.num_envs, dtype=bool)
        self._observations = np.zeros(self.observation_space.shape)
        for world, (env, vector) in enumerate(zip(self.envs, task.double().cpu().numpy(), strict=True)):
            env.unwrapped.set_task(vector)
            self._observations[world], self._infos[world] = env.reset(seed=seeds[world])
        return self._to_device(self._observations)

    def _to_device(self, array: np.ndarray):
        return torch.tensor(array, dtype=self.dtype, device=self.device)  # always a copy

    def _advance(self, action):
        action = action.cpu().numpy().astype(self.single_action_space.dtype)
        rewards = np.zeros(self.num_envs)
        for world in np.flatnonzero(self._alive):
            result = self.envs[world].step(action[world])
            self._observations[world], rewards[world], terminated, truncated, self._infos[world] = result
            if truncated and not terminated and self._steps + 1 < self.horizon:
                raise RuntimeError(
                    f"environment {world} truncated its episode after {self._steps + 1} of {self.horizon} steps: "
                    "make it without a time limit, or lower max_episode_steps"
                )
            self._alive[world] = not terminated
        self._rewards = self._to_device(rewards)
        info = {
            name: self._to_device(np.array([float(single[name]) for single in self._infos]))
            for name, value in self._infos[0].items()
            if all(isinstance(single.get(name), int | float | np.number | np.bool_) for single in self._infos)
        }
        return self._to_device(self._observations), torch.tensor(~self._alive, device=self.device), info

    def _transition_reward(self, action, next_obs):
        return self._rewards

    def render_frame(self, index=0):
        """What the user's environment draws; RuntimeError if that is no picture."""
        try:
            frame = self.envs[index].render()
        except NotImplementedError as error:  # Gymnasium's own, of an environment without the method
            raise RuntimeError(f"{self.source} has no method render") from error
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise RuntimeError(
                f"{self.source}.render() gives no picture but {type(frame).__name__}: make it with "
                "render_mode='rgb_array'"
            )
        return frame

    def single_world(self) -> "AdaptedVectorEnv":
        """One more environment of the same kind, horizon and device, for pictures; to close it closes no other."""
        return AdaptedVectorEnv(self._make_env, 1, self.horizon, self.device, self.dtype)

    def close_extras(self, **kwargs):
        for env in self.envs:
            env.close()
