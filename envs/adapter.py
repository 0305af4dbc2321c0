"""Your own Gymnasium environments as a batch of worlds with tasks, for every algorithm that can use them.

The protocol. A single environment, or a wrapper around one, with two more methods:

    def sample_tasks(self, num_tasks: int, rng: np.random.Generator, split: str) -> array [num_tasks, task_dim]
        # plain numbers; split is "train" or "test", raise ValueError for another one
    def set_task(self, task: array [task_dim]) -> None
        # float64; called before every reset(seed=...); the task must not show in the observation

Observations are a one-dimensional Box, actions a one-dimensional Box with finite bounds, or Discrete. `--env-id` makes
it a batch by itself (envs/own.py), and in Python this does:

    envs = AdaptedVectorEnv(MyEnv, num_envs=40, max_episode_steps=100, device="cuda")

For `mbmpo`, which practises in models, two more, both static, on tensors with any leading axes:

    def reward(obs, action, next_obs, task) -> Tensor [..]  # what `step` returns
    def ended(obs) -> Tensor [..] (bool)                    # which observations end an episode; not needed if none does

* Wrappers are welcome. Of `ClipAction` the bounds are those that it clips to. `NormalizeObservation` and
  `NormalizeReward` are refused, unless their `update_running_mean` is off: their statistics would differ from world to
  world, and no checkpoint has them. A `TimeLimit` must not be shorter than the horizon.
* Test tasks should not be training tasks; a warning says how many of 1,000 are. (In ranges that overlap hardly any two
  tasks are equal, and nothing can be said.)
* Tasks are kept as float64: whole numbers, such as seeds, up to 2^53 stay what they are, and larger ones are refused.
* A resumed run plays the episodes at hand again, from their seeds, by the actions taken; Unsuitable if an environment
  is not the same then. (Only lifetime_rewards, lirpg and meta_critic save their worlds.)
* An environment with a class attribute `workers = 4` is stepped in four processes, each with a part of the worlds. This
  pays where a step takes long; the numbers are the same.
* For pictures make the environments with render_mode="rgb_array"; `--env-id` does.
"""

import inspect
import warnings
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import ClipAction, NormalizeObservation, NormalizeReward, TimeLimit
from torch import Generator, Tensor

from .core import TaskVectorEnv, Unsuitable, refuse_unbounded
from .workers import Workers, Worlds, layers, method

LARGEST = 2**53  # float64 holds every whole number up to here
DRAWN = 1000  # tasks of each split that are compared

EXAMPLE = '''
    class MyTask(gym.Env):  # beside its reset, step, observation_space and action_space
        def sample_tasks(self, num_tasks, rng, split):
            """Masses [num_tasks, 1]; those of tests are not trained on."""
            if split not in ("train", "test"):
                raise ValueError(f"split must be train or test, got {split}")
            low, high = (0.5, 1.5) if split == "train" else (1.5, 2.0)
            return rng.uniform(low, high, size=(num_tasks, 1))

        def set_task(self, task):
            """Called before each reset(seed=..); the observation must not show it."""
            self.mass = float(task[0])
'''

_compared: set[type] = set()  # environments whose training and test tasks have been compared


def pure(env: gym.Env, name: str) -> Callable | None:
    """The outermost static function of this name; a wrapper's usual method of the same name is none."""
    found = (inspect.getattr_static(type(layer), name, None) for layer in layers(env))
    return next((x.__func__ for x in found if isinstance(x, staticmethod)), None)


def bounded_actions(env: gym.Env) -> gym.Space:
    """The space of actions; of `ClipAction`, which takes the bounds away, the one that it clips to."""
    while isinstance(env, gym.Wrapper) and (isinstance(env, ClipAction) or env.action_space is env.env.action_space):
        env = env.env
    return env.action_space


def refuse_unsuitable(env: gym.Env, horizon: int) -> None:
    """Unsuitable with all that an environment lacks, and lines that would do; or with what else is wrong with it."""
    if not isinstance(env, gym.Env):
        raise Unsuitable(f"{type(env).__name__} is no gymnasium.Env")
    source = type(env.unwrapped).__name__
    lacks = [f"a method {name}" for name in ("sample_tasks", "set_task") if method(env, name) is None]
    faults = [f"{source} needs {' and '.join(lacks)}; see envs/adapter.py"] if lacks else []
    for name, allowed in (("observation_space", "Box"), ("action_space", "Box or a Discrete space")):
        space = getattr(env, name, None)
        is_choice = name == "action_space" and isinstance(space, Discrete)
        if not is_choice and (not isinstance(space, Box) or len(space.shape) != 1):
            hint = "; gymnasium.wrappers.FlattenObservation may help" if name == "observation_space" else ""
            faults.append(f"{source}'s {name} must be a one-dimensional {allowed}, got {space}{hint}")
    if faults:
        error = Unsuitable("; ".join(faults))
        error.example = f"\nSuch lines would do:\n{EXAMPLE}" if lacks else ""
        raise error
    if isinstance(env.action_space, Box):
        refuse_unbounded(bounded_actions(env), source)
    for layer in layers(env):
        name = type(layer).__name__
        if isinstance(layer, NormalizeObservation | NormalizeReward) and layer.update_running_mean:
            raise Unsuitable(
                f"{source}'s wrapper {name} keeps statistics that differ from world to world and that no checkpoint "
                "has: leave it out, or set its update_running_mean to False"
            )
        if isinstance(layer, TimeLimit) and layer._max_episode_steps < horizon:
            raise Unsuitable(
                f"{source}'s wrapper {name} ends episodes after {layer._max_episode_steps} steps, before the horizon "
                f"of {horizon}: make it without a time limit, or lower --horizon (max_episode_steps)"
            )


def workers_of(env: gym.Env, workers: int | None, num_envs: int) -> int:
    """Processes to step worlds in: as asked, else as the outermost attribute `workers` says, else 1."""
    if workers is None:
        workers = next((layer.workers for layer in layers(env) if hasattr(layer, "workers")), 1)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise Unsuitable(f"{type(env.unwrapped).__name__}.workers must be a whole number from 1 on, got {workers!r}")
    return min(workers, num_envs)


def to_float64(tasks: np.ndarray, source: str) -> Tensor:
    """Tasks [N, P] as float64; Unsuitable for what is no number and for whole numbers that it may not hold."""
    numbers = tasks.flatten().tolist()
    odd = next((x for x in numbers if not isinstance(x, int | float | np.number | np.bool_)), None)
    if odd is not None or None in numbers:
        raise Unsuitable(f"{source}.sample_tasks must return numbers, got {odd!r}")
    large = next((x for x in numbers if isinstance(x, int) and abs(x) > LARGEST), None)  # Python compares exactly
    if large is not None:
        raise Unsuitable(
            f"{source}.sample_tasks gives {large}, but tasks are kept as float64, which holds whole numbers up to "
            f"{LARGEST} (2^53): take smaller ones (of seeds, fewer) or split one into two numbers"
        )
    return torch.from_numpy(tasks.astype(np.float64))


class AdaptedVectorEnv(TaskVectorEnv):
    """`TaskVectorEnv` over single environments, stepped one after the other, in the calling process or in workers.

    * A world that terminates is not stepped again, and not reset before it is told to.
    * The horizon is this class's. An environment that truncates before it is an error: make it without a time limit.
    * Numbers that all environments report in `info` come back as tensors `info[name]` [B] (the last ones reported, for
      a world that is over); other entries are dropped.
    * The reward is whatever the environments return; as a function it is known where they have a static `reward`.

    Args:
        make_env: returns a new environment; called num_envs times.
        num_envs, max_episode_steps, device, dtype: see `TaskVectorEnv`. Tasks are float64 in any case.
        workers: processes that share the worlds; None: what the environment's attribute `workers` says, else 1, the
            calling process. Workers end with `close` or with the calling process.
    Raises:
        Unsuitable: a TypeError and ValueError: an environment lacks a method of the protocol, has other spaces, actions
            without bounds or a wrapper that cannot work, or draws tasks of a wrong shape or with numbers too large.
    """

    can_terminate = True
    world_state = "_seeds", "_played"

    def __init__(
        self,
        make_env: Callable[[], gym.Env],
        num_envs: int,
        max_episode_steps: int = 200,
        device="cpu",
        dtype=torch.float32,
        workers: int | None = None,
    ):
        self._make_env = make_env
        first = make_env()
        refuse_unsuitable(first, max_episode_steps)
        actions = bounded_actions(first)
        self._least = int(actions.start) if isinstance(actions, Discrete) else 0  # of the choices; here they are from 0
        actions = Discrete(int(actions.n)) if isinstance(actions, Discrete) else actions
        super().__init__(num_envs, first.observation_space, actions, max_episode_steps, device, dtype)
        self.task_dtype = torch.float64
        self.source = type(first.unwrapped).__name__
        workers = workers_of(first, workers, num_envs)
        self._worlds = Workers(make_env, num_envs, workers) if workers > 1 else Worlds(make_env, num_envs, first)
        self.envs = self._worlds.envs if workers == 1 else [first]  # those in this process
        self._sample_tasks = method(first, "sample_tasks")
        self.task_dim = self._draw_tasks(1, 0, "train").shape[1]
        self._warn_of_shared_tasks()
        self._pure_reward, self._pure_ended = pure(first, "reward"), pure(first, "ended")
        if self._pure_reward is not None:
            self.reward = self._known_reward
        if self._pure_ended is not None:
            self.ended = self._pure_ended

    # ------------------------------------------------------------ tasks

    def _draw_tasks(self, num_tasks: int, seed: int, split: str) -> Tensor:
        tasks = np.asarray(self._sample_tasks(num_tasks, np.random.default_rng(seed), split))
        if tasks.ndim != 2 or len(tasks) != num_tasks:
            raise Unsuitable(
                f"{self.source}.sample_tasks({num_tasks}, ..) must return [{num_tasks}, task_dim], got {tasks.shape}"
            )
        return to_float64(tasks, self.source)

    def _warn_of_shared_tasks(self) -> None:
        """A warning, once for each kind of environment, if test tasks are training tasks."""
        kind = type(self.envs[0].unwrapped)
        if kind in _compared:
            return
        _compared.add(kind)
        train, test = (
            {tuple(task) for task in self._draw_tasks(DRAWN, seed, split).tolist()}
            for seed, split in ((0, "train"), (1, "test"))
        )
        if train & test:
            warnings.warn(
                f"{self.source}.sample_tasks: {len(train & test)} of {len(test)} different test tasks, of {DRAWN} that "
                "were drawn, are training tasks, too; results on them do not show what is learned about new tasks",
                stacklevel=3,
            )

    def sample_tasks(self, num_tasks, generator: Generator, split="train"):
        seed = int(torch.randint(2**62, (1,), generator=generator))
        return self._draw_tasks(num_tasks, seed, split).to(self.device)

    # ------------------------------------------------------------ rewards as a function

    @staticmethod
    def reward(obs, action, next_obs, task):
        raise NotImplementedError("an adapted environment's reward is not known as a function; use what step returns")

    @property
    def knows_reward(self) -> bool:
        return self._pure_reward is not None

    def _known_reward(self, obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return self._pure_reward(obs, action, next_obs, task.to(obs.dtype)).to(obs.dtype)

    def check_reward(self, steps: int = 10) -> None:
        """Unsuitable unless the static `reward` is what `step` returns, of two worlds with random actions."""
        worlds = self.another(2)
        obs, _ = worlds.reset(seed=0)
        worlds.action_space.seed(0)
        for _ in range(min(steps, self.horizon)):
            action, playing = torch.as_tensor(worlds.action_space.sample(), device=self.device), ~worlds._over
            next_obs, found, *_ = worlds.step(action)
            told = worlds.reward(obs, action, next_obs, worlds.tasks)
            if told.shape != found.shape:
                raise Unsuitable(
                    f"{self.source}.reward must return [..], here {list(found.shape)}, got {list(told.shape)}"
                )
            wrong = playing & ~torch.isclose(told, found, rtol=1e-3, atol=1e-3)
            if wrong.any():
                world = int(wrong.nonzero()[0])
                raise Unsuitable(
                    f"{self.source}'s static reward says {float(told[world]):.6g} where step returned "
                    f"{float(found[world]):.6g}"
                )
            obs = next_obs
        worlds.close()

    # ------------------------------------------------------------ episodes

    def _start(self, task, generator):
        number = self.num_envs * self.shard[1]
        self._seeds = self.share(torch.randint(2**31, (number,), generator=generator))
        self._played = torch.zeros(
            self.num_envs, self.horizon, *self.single_action_space.shape, dtype=self._action_dtype
        )
        begin = np.ones(self.num_envs, dtype=bool)
        if self.starting is None:
            self._make_records()
        else:
            begin = self.starting.cpu().numpy()
        self._begin(np.flatnonzero(begin), task.cpu())
        return self._to_device(self._observations)

    @property
    def _action_dtype(self) -> torch.dtype:
        return torch.int64 if self.is_discrete else self.dtype

    def _make_records(self) -> None:
        self._infos = [{} for _ in range(self.num_envs)]
        self._alive = np.ones(self.num_envs, dtype=bool)
        self._observations = np.zeros(self.observation_space.shape)

    def _begin(self, worlds: np.ndarray, tasks: Tensor) -> None:
        """Reset these worlds, of all worlds' tasks each to its own."""
        seeds = [int(self._seeds[world]) for world in worlds]
        for world, (obs, info) in zip(worlds, self._worlds.begin(worlds, tasks.numpy()[worlds], seeds), strict=True):
            self._observations[world] = self._of_space(obs)
            self._infos[world] = info
            self._alive[world] = True

    def _of_space(self, obs) -> np.ndarray:
        shape = self.single_observation_space.shape
        if np.shape(obs) != shape:
            raise Unsuitable(f"{self.source} returns observations {np.shape(obs)}, its observation_space says {shape}")
        return obs

    def _to_device(self, array: np.ndarray):
        return torch.tensor(array, dtype=self.dtype, device=self.device)  # always a copy

    def _move(self, worlds: np.ndarray, actions: Tensor, steps: Tensor) -> np.ndarray:
        """Move these worlds, which are not over, of all worlds' actions and steps (from 0) each by its own: rewards."""
        given = [self._of_actions(actions[world]) for world in worlds]
        rewards = []
        for world, result in zip(worlds, self._worlds.step(worlds, given), strict=True):
            obs, reward, terminated, truncated, self._infos[world] = result
            self._observations[world] = self._of_space(obs)
            step = int(steps[world]) + 1
            if truncated and not terminated and step < self.horizon:
                raise RuntimeError(
                    f"environment {world} truncated its episode after {step} of {self.horizon} steps: "
                    "make it without a time limit, or lower max_episode_steps"
                )
            self._alive[world] = not terminated
            if np.size(reward) != 1:
                raise Unsuitable(f"{self.source}.step must return one number as the reward, got {np.shape(reward)}")
            rewards.append(float(np.asarray(reward).reshape(())))
        return np.array(rewards)

    def _of_actions(self, action: Tensor) -> np.ndarray:
        """An action as the environment takes it."""
        given = action.numpy().astype(self.single_action_space.dtype)
        return given[()] + self._least if self.is_discrete else given

    def _advance(self, action):
        action = action.cpu()
        steps = torch.as_tensor(self._steps).expand(self.num_envs).cpu()
        self._played[torch.arange(self.num_envs), steps] = action
        rewards = np.zeros(self.num_envs)
        playing = np.flatnonzero(self._alive)
        rewards[playing] = self._move(playing, action, steps)
        self._rewards = self._to_device(rewards)
        info = {
            name: self._to_device(np.array([float(single[name]) for single in self._infos]))
            for name, value in self._infos[0].items()
            if all(isinstance(single.get(name), int | float | np.number | np.bool_) for single in self._infos)
        }
        return self._to_device(self._observations), torch.tensor(~self._alive, device=self.device), info

    def _transition_reward(self, action, next_obs):
        return self._rewards

    # ------------------------------------------------------------ checkpoints

    def save_worlds(self):
        return super().save_worlds() | {"_played": self._played.clone()}  # it is filled step by step

    def load_worlds(self, saved):
        """Continue where `save_worlds` was called, by playing the episodes at hand again.

        Unsuitable if an environment with the same task, seed and actions is not where it was then."""
        super().load_worlds(saved)
        self._make_records()
        steps = torch.as_tensor(self._steps).expand(self.num_envs).cpu()
        self._begin(np.arange(self.num_envs), self.tasks.cpu())
        for step in range(int(steps.max())):
            playing = np.flatnonzero(self._alive & (step < steps.numpy()))
            self._move(playing, self._played[:, step], torch.full_like(steps, step))
        wrong = (self._to_device(self._observations) != self._obs).any(1)
        if wrong.any():
            raise Unsuitable(
                f"{self.source} does something else with the same task, seed and actions (world "
                f"{int(wrong.nonzero()[0])}), so that a run cannot go on: let chance come from reset's seed alone"
            )

    # ------------------------------------------------------------ pictures

    def render_frame(self, index=0):
        """What the user's environment draws; RuntimeError if that is no picture."""
        try:
            frame = self._worlds.render(index)
        except NotImplementedError as error:  # Gymnasium's own, of an environment without the method
            raise RuntimeError(f"{self.source} has no method render") from error
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise RuntimeError(
                f"{self.source}.render() gives no picture but {type(frame).__name__}: make it with "
                "render_mode='rgb_array'"
            )
        return frame

    def another(self, num_envs: int) -> "AdaptedVectorEnv":
        """Another batch of the same kind, horizon and device; to close it closes no other."""
        return AdaptedVectorEnv(self._make_env, num_envs, self.horizon, self.device, self.dtype, workers=1)

    def close_extras(self, **kwargs):
        self._worlds.close()
        if self.envs is not getattr(self._worlds, "envs", None):
            self.envs[0].close()
