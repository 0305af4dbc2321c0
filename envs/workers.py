"""Single environments side by side, in this process or in several: what envs/adapter.py moves.

`Worlds` steps them one after the other. `Workers` does the same in worker processes, each with a part of them, by
`gymnasium.vector.AsyncVectorEnv`; an environment sees the same calls in the same order, so the numbers are the same.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from multiprocessing import parent_process

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from .core import Unsuitable

ORPHANED = 0.5  # seconds between two looks whether the main process is still there


def layers(env: gym.Env) -> Iterable[gym.Env]:
    """An environment's wrappers, from outside to inside, and the environment itself."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def method(env: gym.Env, name: str) -> Callable | None:
    """The outermost method of this name, of a wrapper or of the environment; None if there is none."""
    return next((x for x in (getattr(layer, name, None) for layer in layers(env)) if callable(x)), None)


class Worlds:
    """`number` environments that `make_env` makes, each call a new one, with `first` among them if it is given.

    Raises Unsuitable if they are not all different.
    """

    def __init__(self, make_env: Callable[[], gym.Env], number: int, first: gym.Env | None = None):
        self.envs = [] if first is None else [first]
        self.envs += [make_env() for _ in range(number - len(self.envs))]
        if len({id(env.unwrapped) for env in self.envs}) < number:
            source = type(self.envs[0].unwrapped).__name__
            raise Unsuitable(f"make_env must make a new {source} in each call, and returns one that it has made")

    def begin(self, worlds: Iterable[int], tasks: np.ndarray, seeds: Iterable[int]) -> list[tuple]:
        """Give each of these worlds its task (a row) and its seed: what `reset` returns."""
        found = []
        for world, task, seed in zip(worlds, tasks, seeds, strict=True):
            method(self.envs[world], "set_task")(task.copy())
            found.append(self.envs[world].reset(seed=seed))
        return found

    def step(self, worlds: Iterable[int], actions: Iterable) -> list[tuple]:
        """Move each of these worlds by its action: what `step` returns."""
        return [self.envs[world].step(action) for world, action in zip(worlds, actions, strict=True)]

    def render(self, world: int):
        return self.envs[world].render()

    def close(self) -> None:
        for env in self.envs:
            env.close()


class Part(gym.Env):
    """A worker's part of the worlds, as an environment that is only called, never stepped.

    They are made at the first call, that is in the worker, which ends with the main process, and not by what the
    terminal sends to all: the main process has to save first.
    """

    observation_space = action_space = Box(0, 1, (1,))

    def __init__(self, make_env: Callable[[], gym.Env], first: int, number: int):
        self.make_env, self.first, self.number = make_env, first, number
        self.worlds = None
        if parent_process() is not None:
            torch.set_num_threads(1)  # the other cores are for the other workers
            for name in ("SIGINT", "SIGHUP"):
                if hasattr(signal, name):  # Windows has no SIGHUP
                    signal.signal(getattr(signal, name), signal.SIG_IGN)
            threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    def do(self, name: str, worlds: list[int], *rows) -> list[tuple]:
        """`begin`, `step` or `render` of those of the worlds that are in this part."""
        if self.worlds is None:
            self.worlds = Worlds(self.make_env, self.number)
        mine = [k for k, world in enumerate(worlds) if self.first <= world < self.first + self.number]
        places = [worlds[k] - self.first for k in mine]
        if name == "render":
            return [self.worlds.render(place) for place in places]
        found = getattr(self.worlds, name)(places, *([row[k] for k in mine] for row in rows))
        return [(*result[:-1], plain(result[-1])) for result in found]

    def close(self):
        if self.worlds is not None:
            self.worlds.close()


def plain(info: dict) -> dict:
    """The numbers in `info`, which are all that the adapter takes of it; the rest need not travel."""
    return {name: x for name, x in info.items() if isinstance(x, int | float | np.number | np.bool_)}


def end_with(parent: int) -> None:
    """End this process when its parent has ended, however that came."""
    while os.getppid() == parent:
        time.sleep(ORPHANED)
    os._exit(1)


class Workers:
    """`Worlds` in several processes, each of which has a part of them. `number` must be at least `workers`.

    Errors of an environment come back as they are; their trace is logged.
    """

    def __init__(self, make_env: Callable[[], gym.Env], number: int, workers: int):
        ends = np.linspace(0, number, workers + 1).astype(int).tolist()
        parts = [partial(Part, make_env, low, high - low) for low, high in pairwise(ends)]
        self.processes = AsyncVectorEnv(parts, shared_memory=False, autoreset_mode=AutoresetMode.DISABLED)

    def do(self, name: str, worlds: Iterable[int], *rows) -> list:
        worlds = [int(world) for world in worlds]  # ascending, as the parts are
        found = self.processes.call("do", name, worlds, *(list(row) for row in rows))
        return [result for part in found for result in part]

    def begin(self, worlds: Iterable[int], tasks: np.ndarray, seeds: Iterable[int]) -> list[tuple]:
        return self.do("begin", worlds, tasks, seeds)

    def step(self, worlds: Iterable[int], actions: Iterable) -> list[tuple]:
        return self.do("step", worlds, actions)

    def render(self, world: int):
        return self.do("render", [world])[0]

    def close(self) -> None:
        with suppress(gym.error.ClosedEnvironmentError):
            self.processes.close()
