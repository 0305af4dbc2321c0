"""Worlds in worker processes: the same numbers as in one, ends in order, errors by name, resumed runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs.adapter import AdaptedVectorEnv, Unsuitable

ROOT = Path(__file__).resolve().parents[1]
SOURCE = '''
import os
import time

import gymnasium as gym
import numpy as np


class Walk(gym.Env):
    """A random walk with a hidden drift; it ends beyond 2."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    wait = 0

    def sample_tasks(self, num_tasks, rng, split):
        return rng.uniform(0, 0.1, (num_tasks, 1)) + (split == "test")

    def set_task(self, task):
        self.drift = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2) / 10
        return self.place.copy(), {"pid": os.getpid(), "text": "x"}

    def step(self, action):
        time.sleep(self.wait)
        self.place = self.place + self.drift + action + self.np_random.normal(size=2) / 10
        return self.place.copy(), -abs(self.place[0]), bool(self.place[0] > 2), False, {"pid": os.getpid(), "text": "x"}


class InTwo(Walk):
    workers = 2


class Choosing(InTwo):
    action_space = gym.spaces.Discrete(2)

    def step(self, action):
        if self.drift > 50:
            raise ArithmeticError(f"a fault of mine at {self.drift}")
        return super().step(action - 0.5)


class InOne(Choosing):
    workers = 1


class Wrong(Walk):
    workers = 0
'''


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walks")
    (folder / "walks.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import walks

        yield walks


def played(venv, steps=12, mask_at=None) -> list:
    """All that an episode gives: observations, rewards, ends."""
    tasks = venv.sample_tasks(venv.num_envs, torch.Generator().manual_seed(3), "train")
    found = [venv.reset(seed=5, options={"tasks": tasks})[0]]
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        action = 0.5 + torch.rand(venv.num_envs, 1, generator=generator)
        obs, reward, terminated, truncated, _ = venv.step(action)
        found += [obs, reward, terminated, truncated]
        if step == mask_at:
            over = terminated | truncated
            found.append(venv.reset(options={"reset_mask": over, "tasks": tasks})[0])
    return found


@pytest.mark.parametrize(("number", "workers"), [(7, 2), (7, 3), (3, 8)])
def test_numbers_are_those_of_one_process(walks, number, workers):
    one, several = (AdaptedVectorEnv(walks.Walk, number, 12, workers=n) for n in (1, workers))
    for x, y in zip(played(one), played(several), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(played(one, 6, mask_at=3), played(several, 6, mask_at=3), strict=True):
        assert torch.equal(x, y)  # worlds that begin singly
    one.close()
    several.close()


def test_the_class_says_how_many_and_each_has_its_part(walks):
    venv = AdaptedVectorEnv(walks.InTwo, 5, 12)
    venv.reset(seed=0, options={"tasks": venv.sample_tasks(5, torch.Generator(), "train")})
    *_, info = venv.step(torch.zeros(5, 1))
    pids = info["pid"].long().tolist()
    assert len(set(pids)) == 2
    assert pids == sorted(pids, key=pids.index)  # side by side
    assert os.getpid() not in pids
    assert "text" not in info
    wrapped = AdaptedVectorEnv(lambda: gym.wrappers.ClipAction(walks.InTwo()), 2, 12)
    assert wrapped._worlds.processes.num_envs == 2
    wrapped.close()
    assert venv.single_world()._worlds.envs  # for pictures: in this process
    venv.close()
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_other_numbers_of_workers_are_refused_by_name(walks, workers):
    with pytest.raises(Unsuitable, match=r"Walk\.workers must be a whole number from 1 on"):
        AdaptedVectorEnv(walks.Walk, 2, 12, workers=workers)
    with pytest.raises(Unsuitable, match=r"Wrong\.workers must be a whole number from 1 on, got 0"):
        AdaptedVectorEnv(walks.Wrong, 2, 12)


def test_saved_worlds_go_on_in_others(walks):
    tasks = torch.full((5, 1), 0.05, dtype=torch.float64)
    several = AdaptedVectorEnv(walks.Walk, 5, 12, workers=2)
    several.reset(seed=1, options={"tasks": tasks})
    for _ in range(4):
        several.step(torch.full((5, 1), 0.6))
    saved = several.save_worlds()
    ahead = several.step(torch.zeros(5, 1))
    for workers in (1, 3):
        fresh = AdaptedVectorEnv(walks.Walk, 5, 12, workers=workers)
        fresh.reset(seed=9, options={"tasks": tasks})
        fresh.load_worlds(saved)
        for x, y in zip(ahead[:4], fresh.step(torch.zeros(5, 1))[:4], strict=True):
            assert torch.equal(x, y)
        fresh.close()
    several.close()


@pytest.mark.filterwarnings("ignore")  # Gymnasium shows the worker's trace as a warning
def test_errors_of_the_environment_come_back(walks):
    venv = AdaptedVectorEnv(walks.Choosing, 4, 12)
    tasks = torch.tensor([[0.0], [0.0], [0.0], [99.0]], dtype=torch.float64)
    venv.reset(seed=0, options={"tasks": tasks})
    with pytest.raises(ArithmeticError, match="a fault of mine at 99"):
        venv.step(torch.ones(4, dtype=torch.int64))
    venv.close()


RUN = [sys.executable, str(ROOT / "algos/maml_trpo.py")]
SMALL = "--meta-batch-size 2 --episodes-per-task 3 --hidden-size 4 --horizon 5 --iterations"


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in found]


def test_a_resumed_run_with_workers_is_that_of_one_process_bit_by_bit(walks, tmp_path):
    where = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    file = Path(walks.__file__)
    for name, iterations in (("Walk", "2"), ("InTwo", "1")):
        done = subprocess.run([*RUN, "--env-id", f"{file}:{name}", *SMALL.split(), iterations], **where)
        assert done.returncode == 0, done.stderr
    (one,) = (tmp_path / "runs").glob("Walk*")
    (several,) = (tmp_path / "runs").glob("InTwo*")
    done = subprocess.run([*RUN, "--resume", str(several), "--iterations", "2"], **where)
    assert done.returncode == 0, done.stderr
    for first, second in zip(rows(one), rows(several), strict=True):
        assert {x for x in second if not x.startswith("test/")} <= first.keys()
        assert {name: second[name] for name in first.keys() & second.keys()} == {
            name: first[name] for name in first.keys() & second.keys()
        }
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, several)]
    assert torch.equal(*(state["generator"] for state in states))
    for name, x in states[0]["theta"].items():
        assert torch.equal(x, states[1]["theta"][name])


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
def test_workers_outlive_no_run_and_let_it_save(walks, tmp_path, number):
    file = Path(walks.__file__)
    slow = file.with_name("slow.py")
    slow.write_text("from walks import InTwo\n\n\nclass Slow(InTwo):\n    wait = 0.01\n")
    command = [*RUN, "--env-id", f"{slow}:Slow", *SMALL.split(), "10000"]
    # In a session of its own, so that a signal to the group is what Ctrl-C is to all of a terminal's processes.
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not (found := list(tmp_path.glob("runs/*/metrics.jsonl"))) or not rows(found[0].parent):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    if number == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGKILL)
    _, told = process.communicate(timeout=200)
    if number == "SIGINT":
        assert process.returncode == 0, told.decode()
        assert (found[0].parent / "checkpoint.pt").is_file()
        assert b"Traceback" not in told
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").is_dir() for child in children):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.2)


def test_numpy_actions_arrive_as_the_space_has_them(walks):
    venv = AdaptedVectorEnv(walks.Choosing, 2, 12)
    plain = AdaptedVectorEnv(walks.InOne, 2, 12)
    found = []
    for worlds in (venv, plain):
        worlds.reset(seed=0, options={"tasks": torch.zeros(2, 1, dtype=torch.float64)})
        found.append(worlds.step(torch.tensor([0, 1]))[0])
        worlds.close()
    assert torch.equal(*found)
    assert np.diff(found[0][:, 0].numpy())[0] > 0.3
