"""envs/check.py: our families keep to the contract; every check finds an environment that breaks what it looks at."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import envs
from envs import check
from envs.adapter import AdaptedVectorEnv
from envs.core import TaskVectorEnv

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {family.__name__: family for family in envs.HORIZONS}
SHOW_A_PART = {"MouseCheese", "Harlow"}  # of their tasks, as envs/core.py says
HIDDEN = "the first observation does not show the task"
ON_GPU = "the CPU and the GPU agree"


def verdicts(family) -> dict[str, str]:
    return {line.title: line.verdict for line in check.check(family)}


@pytest.mark.parametrize("name", FAMILIES)
def test_our_families_keep_to_the_contract(name):
    lines = check.check(envs.make(f"{name}-v0", 1, min(envs.HORIZONS[FAMILIES[name]], 40), discrete=True).unwrapped)
    wrong = {line.title: line.text for line in lines if line.verdict == "no"}
    assert set(wrong) == ({HIDDEN} if name in SHOW_A_PART else set()), wrong


# ---------------------------------------------------------------- what is broken is found


class Point(TaskVectorEnv):
    """A number that moves by the action; the reward is minus its distance from the task; beyond 2 it ends."""

    task_dim, can_terminate, world_state = 1, True, ()

    def __init__(self, num_envs, max_episode_steps=20, device="cpu", dtype=torch.float32):
        space = Box(-np.inf, np.inf, (1,))
        super().__init__(num_envs, space, Box(-1, 1, (1,)), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        if split not in ("train", "test"):
            raise ValueError(split)
        return (torch.rand(num_tasks, 1, generator=generator) + (split == "test")).to(self.device, self.dtype)

    @staticmethod
    def reward(obs, action, next_obs, task):
        return -(next_obs - task)[..., 0].abs()

    def _start(self, task, generator):
        return self._draw(torch.rand, generator, 1).to(self.device, self.dtype)

    def _advance(self, action):
        obs = self._obs + action
        return obs, obs[:, 0].abs() > 2, {}


def broken(title: str, **methods):
    """A mutation of Point and the checks that must find it."""
    return pytest.param(methods, title, id=title.replace(" ", "-") + "-" + "-".join(methods))


def unlatched(self, action):
    before = self._over.clone()
    obs, reward, terminated, *rest = TaskVectorEnv.step(self, action)
    return obs, reward, terminated & ~before, *rest


def paid(self, action):
    obs, reward, terminated, *rest = TaskVectorEnv.step(self, action)
    return obs, reward - terminated.float(), terminated, *rest


def reused(self, action):
    self._obs, *rest = TaskVectorEnv.step(self, action)
    return self._obs, *rest


def in_place(self, action):
    self._buffer = getattr(self, "_buffer", torch.zeros_like(self._obs))
    obs, *rest = TaskVectorEnv.step(self, action)
    return self._buffer.copy_(obs), *rest


def late(self, action):
    *results, truncated, info = TaskVectorEnv.step(self, action)
    return *results, truncated & False, info


def mixing(self, action):
    obs = self._obs + action - 0.1 * action.mean()
    return obs, obs[:, 0].abs() > 2, {}


def unclipped(self, action):
    return TaskVectorEnv.step(self, action.nan_to_num(0.0))


def global_chance(self, action):
    obs = self._obs + action * torch.rand(1)
    return obs, obs[:, 0].abs() > 2, {}


def hidden_state(self, action):
    self.count = getattr(self, "count", 0) + 1
    return self._obs + action * (1 + self.count), torch.zeros(self.num_envs, dtype=torch.bool), {}


MUTATIONS = [
    broken("shapes, types and spaces are as promised", _start=lambda self, task, generator: torch.zeros(8, 2)),
    broken(
        "shapes, types and spaces are as promised",
        reward=staticmethod(lambda obs, action, next_obs, task: -(next_obs - task).abs()[:, 0].double()),
    ),
    broken("tasks are drawn from the generator, for two splits", sample_tasks=lambda self, n, *_: torch.rand(n, 1)),
    broken(
        "tasks are drawn from the generator, for two splits",
        sample_tasks=lambda self, n, generator, split="train": torch.rand(n, 1, generator=generator).to(self.dtype),
    ),
    broken(
        "test tasks are no training tasks",
        sample_tasks=lambda self, n, generator, split="train": torch.randint(
            300, (n, 1), generator=generator
        ).to(self.dtype),
    ),
    broken("seeds decide everything", _start=lambda self, task, generator: torch.rand(self.num_envs, 1).to(self.dtype)),
    broken("seeds decide everything", _advance=global_chance),
    broken(HIDDEN, _start=lambda self, task, generator: task.clone()),
    broken("the horizon is the only truncation", step=late),
    broken("early ends are latched and pay nothing", step=unlatched),
    broken("early ends are latched and pay nothing", step=paid),
    broken("returned tensors are not used again", step=reused),
    broken("returned tensors are not used again", step=in_place),
    broken("a world does not depend on its neighbours", _advance=mixing),
    broken("a batch does what single worlds do", _advance=mixing),
    broken("some worlds can start again", _keep=lambda self, before, kept: None),
    broken("saved worlds go on", load_worlds=lambda self, saved: None),
    broken("saved worlds go on", _advance=hidden_state),
    broken("wrong actions are refused, large ones clipped", step=unclipped),
    broken("the reward is a function", step=lambda self, action: (
        lambda obs, reward, *rest: (obs, reward + 1, *rest))(*TaskVectorEnv.step(self, action))),
]  # fmt: skip


def test_the_unbroken_point_holds():
    expected = dict.fromkeys(check.CHECKS, "yes") | {ON_GPU: "yes" if torch.cuda.is_available() else "note"}
    assert verdicts(Point(1)) == expected


@pytest.mark.parametrize(("methods", "title"), MUTATIONS)
def test_what_is_broken_is_found(methods, title):
    found = verdicts(type("Broken", (Point,), methods)(1, 20))
    assert found[title] == "no", found


def test_every_check_has_a_mutation():
    tried = {parameters.values[1] for parameters in MUTATIONS}
    assert tried == set(check.CHECKS) - {"the task makes a difference", ON_GPU}


def test_a_task_without_effect_is_noted():
    idle = type("Idle", (Point,), {"reward": staticmethod(lambda obs, action, next_obs, task: next_obs[..., 0])})
    assert verdicts(idle(1))["the task makes a difference"] == "note"


# ---------------------------------------------------------------- single environments


class Walk(gym.Env):
    """The same as a single environment; chance in its steps, too."""

    observation_space, action_space = Box(-np.inf, np.inf, (1,)), Box(-1, 1, (1,))

    def sample_tasks(self, num_tasks, rng, split):
        if split not in ("train", "test"):
            raise ValueError(split)
        return rng.random((num_tasks, 1)) + (split == "test")

    def set_task(self, task):
        self.task = float(task[0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = self.np_random.uniform(-0.1, 0.1)
        return self.seen(), {}

    def seen(self):
        return np.array([self.number], np.float32)

    def step(self, action):
        self.number += float(np.ravel(action)[0]) + 0.1 * self.np_random.normal()
        return self.seen(), -abs(self.number - self.task), abs(self.number) > 2, False, {}


class Buttons(Walk):
    action_space = Discrete(3, start=-1)


def adapted(kind, **methods):
    return AdaptedVectorEnv(type(kind.__name__, (kind,), methods), 1, 20)


@pytest.mark.parametrize("kind", [Walk, Buttons])
def test_adapted_environments_hold(kind):
    found = verdicts(adapted(kind))
    assert {title for title, verdict in found.items() if verdict != "yes"} <= {"the reward is a function", ON_GPU}


def shows_task(self):
    return np.array([self.number + getattr(self, "task", 0)], np.float32)


def unseeded(self, *, seed=None, options=None):
    return Walk.reset(self, seed=None)


def raises(self, action):
    raise KeyError("mine")


shared = {}  # by all worlds


def sharing(self, action):
    shared["sum"] = shared.get("sum", 0) + float(action[0])
    obs, *rest = Walk.step(self, action)
    return obs + np.float32(shared["sum"]), *rest


@pytest.mark.parametrize(
    ("methods", "titles"),
    [
        ({"seen": shows_task}, {HIDDEN}),
        ({"reset": unseeded}, {"seeds decide everything", "saved worlds go on", "a batch does what single worlds do"}),
        ({"step": raises}, {"shapes, types and spaces are as promised", "early ends are latched and pay nothing"}),
        ({"step": sharing}, {"a world does not depend on its neighbours", "a batch does what single worlds do"}),
        ({"observation_space": Box(-0.01, 0.01, (1,))}, {"shapes, types and spaces are as promised"}),
        ({"reward": staticmethod(lambda *x: x[2][..., 0])}, {"the reward is a function"}),
    ],
)
def test_what_is_wrong_with_a_users_environment_is_found(methods, titles):
    found = verdicts(adapted(Walk, **methods))
    assert titles <= {title for title, verdict in found.items() if verdict == "no"}


def test_errors_of_a_users_own_keep_their_trace():
    lines = check.check(adapted(Walk, step=raises))
    line = next(x for x in lines if x.title == "shapes, types and spaces are as promised")
    assert line.text == "KeyError: 'mine'"
    assert "in raises" in line.trace


# ---------------------------------------------------------------- the command


def test_the_exit_status_and_the_lines(monkeypatch, capsys, tmp_path):
    assert check.main(["Navigation2D-v0", "--horizon", "7"]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "Navigation2D, 8 worlds, 7 steps"
    assert [line[6:].partition(": ")[0] for line in lines] == list(check.CHECKS)
    assert {line[:6] for line in lines} <= {"yes   ", "note  "}
    assert last == "all hold"
    assert check.main(["MouseCheese-v0"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"1 of {len(check.CHECKS)} do not hold"
    with pytest.raises(SystemExit, match=r"^--env-id nothing.py:A: no file "):
        check.main(["nothing.py:A"])
    with pytest.raises(SystemExit) as refused:
        check.main(["Navigation2D-v0", "--horizon", "0"])
    assert refused.value.code == 2


def test_a_users_module_is_checked_from_its_own_folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Bare(gym.Env):\n    pass\n"
        "class Task(PendulumEnv):\n"
        "    def sample_tasks(self, num_tasks, rng, split):\n"
        "        return rng.uniform(size=(num_tasks, 1)) + {'train': 1, 'test': 2}[split]\n"
        "    def set_task(self, task):\n"
        "        self.m = float(task[0])\n"
        "gym.register('Mine-v0', entry_point=Task)\n"
    )
    for env_id, code, told in (
        ("mine:Mine-v0", 0, "Task through envs/adapter.py, 8 worlds, 60 steps"),
        ("mine.py:Bare", 1, ""),
    ):
        command = [sys.executable, "-m", "envs.check", env_id]
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == code, result.stderr
        assert result.stdout.partition("\n")[0] == told
        assert ("needs a method sample_tasks and a method set_task" in result.stderr) == (env_id == "mine.py:Bare")
