"""Meta-World's ML1, ML10 and ML45 (Yu et al. 2019, arXiv:1910.10897) as batches of worlds, through envs/adapter.py.

Meta-World pins mujoco 3.3.0, so it lives in an environment of its own, see requirements-metaworld.txt.
"""

import pickle
from collections import defaultdict
from functools import cache

import gymnasium as gym
import torch

from .adapter import AdaptedVectorEnv
from .locomotion import RENDER_HINT, choose_opengl

INSTALL_HINT = (
    "Meta-World is not installed here. It needs its own environment, since it pins an older mujoco:\n"
    "  python3 -m venv .venv-metaworld && .venv-metaworld/bin/pip install -r requirements-metaworld.txt"
)


def _goals(tasks: list) -> set[tuple[str, bytes]]:
    """Class and goal of each task; Meta-World keeps the goal pickled."""
    return {(task.env_name, pickle.loads(task.data)["rand_vec"].tobytes()) for task in tasks}


@cache
def load_tasks(benchmark: str, seed: int) -> tuple[dict, list, list]:
    """Environment classes by name, training tasks and test tasks of "ML10", "ML45" or, for ML1, a name as "reach-v3".

    Raises ImportError without Meta-World, ValueError for an unknown benchmark, and RuntimeError should a test goal be a
    training goal: `gym.make_vec("Meta-World/ML1-train")` of Meta-World 3.1.1 returns the test goals, so we check.
    """
    try:
        import metaworld
    except ImportError as error:
        raise ImportError(INSTALL_HINT) from error
    if benchmark in ("ML10", "ML45"):
        source = getattr(metaworld, benchmark)(seed=seed)
    elif benchmark in metaworld.ML1.ENV_NAMES:
        source = metaworld.ML1(benchmark, seed=seed)
    else:
        raise ValueError(
            f'benchmark must be "ML10", "ML45" or an ML1 environment such as "reach-v3", got {benchmark!r}'
        )
    if _goals(source.train_tasks) & _goals(source.test_tasks):
        raise RuntimeError(f"Meta-World's test goals of {benchmark} overlap its training goals")
    return dict(source.train_classes) | dict(source.test_classes), source.train_tasks, source.test_tasks


class MetaWorldEnv(gym.Env):
    """One Meta-World arm whose task may be of any class of the benchmark.

    Observation: [39] as Meta-World's, the goal zeroed. Action: gripper motion (3) and grip (1) in +-1. Reward: that of
    Meta-World. `info["success"]` is 1 in steps that solve the task.
    Tasks: [1] = position in the list of training tasks followed by test tasks; 50 goals for each class.
    """

    def __init__(self, benchmark: str, seed: int, spare: dict[str, list]):
        self.classes, train, test = load_tasks(benchmark, seed)
        self.tasks, self.num_train = [*train, *test], len(train)
        self.spare = spare  # idle environments by class: making one takes a second and tens of megabytes
        self.name = None
        self._use(train[0].env_name)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space

    def _use(self, name: str) -> None:
        if name == self.name:
            return
        if self.name is not None:
            self.spare[self.name].append(self.env)
        self.name = name
        self.env = self.spare[name].pop() if self.spare[name] else self.classes[name](render_mode="rgb_array")

    def sample_tasks(self, num_tasks, rng, split):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        first, last = (0, self.num_train) if split == "train" else (self.num_train, len(self.tasks))
        return rng.integers(first, last, size=(num_tasks, 1))

    def set_task(self, task):
        chosen = self.tasks[round(float(task[0]))]
        self._use(chosen.env_name)
        self.env.set_task(chosen)

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed)

    def step(self, action):
        return self.env.step(action)

    def render(self):
        try:
            choose_opengl()
            return self.env.render()
        except Exception as error:  # the type depends on which OpenGL library is missing
            raise RuntimeError(RENDER_HINT) from error

    def close(self):
        self.env.close()


def make_metaworld(
    benchmark: str, num_envs: int, max_episode_steps: int = 500, device="cpu", dtype=torch.float32, seed: int = 0
) -> AdaptedVectorEnv:
    """A batch of Meta-World arms: `benchmark` is "ML10", "ML45" or an ML1 environment's name such as "reach-v3".

    `seed` draws the goals: 50 for training and 50 others for testing of every class. For ML1 the test goals of seed n
    are the training goals of seed n + 1 (Meta-World's own rule), so compare runs with one seed. Horizon: at most 500.
    """
    if not 1 <= max_episode_steps <= 500:
        raise ValueError(f"Meta-World's episodes have at most 500 steps, got max_episode_steps = {max_episode_steps}")
    spare = defaultdict(list)
    return AdaptedVectorEnv(
        lambda: MetaWorldEnv(benchmark, seed, spare), num_envs, max_episode_steps, device=device, dtype=dtype
    )
