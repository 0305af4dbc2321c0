"""Several processes under torchrun: the result of one, and orderly ends. The oracle is the run in a single process."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from gymnasium.spaces import Box

from envs import HORIZONS
from envs.adapter import AdaptedVectorEnv

ROOT = Path(__file__).resolve().parent.parent
NAVIGATION = "--env-id Navigation2D-v0 --horizon 7"
RUNS = {  # several of them with physics, early ends, chance during episodes, unequal shares of minibatches
    "maml_trpo": "--env-id HopperRandParams-v0 --horizon 20 --meta-batch-size 4 --episodes-per-task 3 --inner-steps 2 "
    "--estimator e_maml --eval-steps 1",
    "promp": f"{NAVIGATION} --meta-batch-size 6 --episodes-per-task 2 --target-kl 0.01",
    "rl2_ppo": "--env-id WalkerRandParams-v0 --horizon 40 --meta-batch-size 10 --minibatches 2 --episodes-per-trial 2",
    "rl2_transformer_ppo": "--env-id Bandit5-v0 --meta-batch-size 8 --minibatches 2 --episodes-per-trial 4",
    "pearl_sac": "--env-id AntDir-v0 --horizon 25 --train-tasks 6 --tasks-per-iteration 4 --meta-batch-size 4 "
    "--updates 3 --batch-size 5 --context-size 6 --hidden-size 8 --auto-entropy",
    "mbmpo": "--env-id HopperForward-v0 --horizon 25 --num-models 4 --meta-steps 1 --episodes-per-task 3 "
    "--model-size 8 --model-epochs 100 --model-lr 0.1 --real-episodes 2 --fisher-fraction 1",
}


def command(processes: int, script: str, *words: str) -> list[str]:
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *run, str(ROOT / script), *words]


def start(where: Path, *words) -> subprocess.Popen:
    where.mkdir(exist_ok=True)
    with open(where / "log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command(*words), cwd=where, env=env, stdout=log, stderr=subprocess.STDOUT)


def rows(where: Path) -> list[dict]:
    (path,) = where.glob("runs/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint(where: Path) -> dict:
    (path,) = where.glob("runs/*/checkpoint.pt")
    return torch.load(path, weights_only=True)


def leaves(state, name="") -> dict:
    """All numbers and tensors of nested dicts and lists, by their path."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: leaf for key, value in items for path, leaf in leaves(value, f"{name}/{key}").items()}
    return {name: state}


@pytest.mark.parametrize(("name", "processes"), [*((name, 2) for name in RUNS), ("promp", 3)])
def test_several_processes_compute_what_one_computes(name, processes, tmp_path):
    flags = [*RUNS[name].split(), "--iterations", "2"]
    for where, count in (("one", 1), ("several", processes)):
        run = start(tmp_path / where, count, "tests/torchrun_double.py", name, *flags)
        assert run.wait(300) == 0, (tmp_path / where / "log").read_text()
    found, expected = rows(tmp_path / "several"), rows(tmp_path / "one")
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        one["seconds"] = other["seconds"] = 0
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    found, expected = (leaves(checkpoint(tmp_path / where)) for where in ("several", "one"))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.allclose(found[path], value, rtol=1e-6, atol=1e-7), path
        elif path != "/seconds":
            assert bool(torch.as_tensor(found[path] == value).all()), path
    log = (tmp_path / "several/log").read_text()
    assert log.count(": return unadapted ") == 1  # only one process speaks


class Single(gym.Env):
    """A single world for envs/adapter.py; chance in its start and in its steps."""

    observation_space, action_space = Box(-9, 9, (2,)), Box(-1, 1, (2,))

    def sample_tasks(self, num_tasks, rng, split):
        return rng.uniform(size=(num_tasks, 1))

    def set_task(self, task):
        self.task = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(size=2), {}

    def step(self, action):
        return self.np_random.uniform(size=2) + self.task, float(action.sum()), False, False, {}


@pytest.mark.parametrize("family", [*HORIZONS, partial(AdaptedVectorEnv, Single)], ids=str)
@pytest.mark.parametrize("drawn", [False, True])
def test_parts_of_a_batch_are_its_worlds(family, drawn):
    """Each part moves as its worlds in the whole do, with given tasks and with tasks that the batch draws itself."""
    whole, *parts = (family(num_envs=number, max_episode_steps=10) for number in (6, 2, 2, 2))
    for number, part in enumerate(parts):
        part.shard = number, 3
    given = whole.sample_tasks(6, torch.Generator().manual_seed(1))

    whole.action_space.seed(5)
    for _ in range(2):
        obs, _ = whole.reset(seed=3, options=None if drawn else {"tasks": given})
        starts = [x.reset(seed=3, options=None if drawn else {"tasks": x.share(given)})[0] for x in parts]
        assert torch.equal(obs, torch.cat(starts))
        assert torch.equal(whole.tasks, torch.cat([part.tasks for part in parts]))
        for _ in range(4):
            action = torch.as_tensor(whole.action_space.sample())
            pieces = zip(*(part.step(part.share(action))[:4] for part in parts), strict=True)
            for one, piece in zip(whole.step(action)[:4], pieces, strict=True):  # obs, reward, terminated, truncated
                assert torch.equal(one, torch.cat(piece))


@pytest.fixture
def running(tmp_path):
    """Two processes of MAML-TRPO that have saved something; torchrun, and the processes' numbers."""
    flags = f"{NAVIGATION} --meta-batch-size 4 --episodes-per-task 2 --eval-every 1 --iterations 100000".split()
    launcher, deadline = start(tmp_path, 2, "algos/maml_trpo.py", *flags), time.time() + 120
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    yield launcher, [int(child) for child in children]
    launcher.kill()


def resumed(where: Path, iterations: int) -> dict:
    """The checkpoint of the run after as many iterations, the rest in a single process."""
    (folder,) = where.glob("runs/*")
    flags = ["--resume", f"runs/{folder.name}", "--iterations", str(iterations)]
    assert start(where, 1, "algos/maml_trpo.py", *flags).wait(120) == 0
    return checkpoint(where)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(running, victim, tmp_path):
    launcher, children = running
    assert len(children) == 2
    os.kill(children[victim], signal.SIGKILL)
    assert launcher.wait(60) == 1
    log = (tmp_path / "log").read_text()
    message = rf"process {1 - victim}: another one has ended \(.+\); --resume goes on from what was saved"
    assert len(re.findall(message, log)) == 1
    assert 'algos/maml_trpo.py", line' not in log  # no trace of ours
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    state = checkpoint(tmp_path)
    assert resumed(tmp_path, state["iteration"] + 1)["iteration"] == state["iteration"] + 1


@pytest.mark.parametrize("to", ["torchrun", "leader", "follower"])
def test_a_signal_ends_all_processes_with_a_checkpoint(running, to, tmp_path):
    launcher, children = running
    os.kill({"torchrun": launcher.pid, "leader": children[0], "follower": children[1]}[to], signal.SIGTERM)
    launcher.wait(60)
    state, logged = checkpoint(tmp_path), rows(tmp_path)
    assert state["iteration"] == len(logged) == logged[-1]["iteration"] < 100000
    log = (tmp_path / "log").read_text()
    assert ("SIGTERM: saves and ends soon" in log) == (to != "follower")
    assert f"stopped and saved after iteration {len(logged)}; --resume runs/" in log
    assert "held-out tasks: return unadapted " in log  # the leader came to its end
    assert "another one has ended" not in log
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_a_signal_in_the_midst_of_an_iteration_loses_nothing(tmp_path):
    """Of PEARL, whose processes stop before the same round or update: the oracle is the run that nobody has stopped."""
    flags = f"{RUNS['pearl_sac']} --updates 400 --iterations 1 --eval-every 1".split()
    names = "tests/torchrun_double.py", "pearl_sac"
    whole, cut = start(tmp_path / "whole", 2, *names, *flags), start(tmp_path / "cut", 2, *names, *flags)
    deadline = time.time() + 120
    while "collecting" not in (tmp_path / "cut/log").read_text() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    children = Path(f"/proc/{cut.pid}/task/{cut.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    assert cut.wait(120) == 0, (tmp_path / "cut/log").read_text()
    state = checkpoint(tmp_path / "cut")
    assert (state["iteration"], state["unfinished"], rows(tmp_path / "cut")) == (1, 1, [])
    assert "stopped and saved after iteration 0; --resume runs/" in (tmp_path / "cut/log").read_text()
    (folder,) = (tmp_path / "cut").glob("runs/*")
    assert start(tmp_path / "cut", 2, *names, "--resume", f"runs/{folder.name}").wait(120) == 0
    assert whole.wait(120) == 0
    found, expected = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    assert [row | {"seconds": 0} for row in found] == [row | {"seconds": 0} for row in expected]
    found, expected = (leaves(checkpoint(tmp_path / where)) for where in ("cut", "whole"))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[path], value), path
        elif path not in ("/seconds", "/args/resume"):
            assert found[path] == value, path


REFUSED = {
    "--meta-batch-size 5": (["--meta-batch-size 5: must be a multiple of 2, the number of torchrun's processes"], 1),
    "--inner-lr -1": (["--inner-lr -1.0: allowed is above 0, up to 1,000,000"], 5),
    "--nonsense 3": (["Unrecognized options", "--nonsense, 3"], 5),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_the_last_lines_under_torchrun_say_what_is_refused(flags, tmp_path):
    """Below torchrun's own report; once more above it, and no more than that. Reading to the end does not wait long."""
    words = command(2, "algos/maml_trpo.py", *flags.split())
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=tmp_path, env=env, timeout=120, check=False, **pipe)
    lines, (parts, number) = done.stdout.rstrip().splitlines(), REFUSED[flags]
    assert done.returncode == 1
    assert any("ChildFailedError" in line for line in lines[:-number])
    for part in parts:
        assert any(part in line for line in lines[-number:])
        assert sum(part in line for line in lines[:-number]) in (1, 2)  # a frame's title says it again
    if number == 1:
        assert lines[-1:] == parts
    assert 'algos/maml_trpo.py", line' not in done.stdout  # no trace of ours
    assert not (tmp_path / "runs").exists()


def test_a_refusal_is_said_though_the_leader_is_late(tmp_path):
    """torchrun ends the others as soon as one has ended, before this leader has read its flags."""
    words = command(2, "algos/maml_trpo.py", "--inner-lr", "-1")
    late = f'[ "$RANK" = 0 ] && sleep 60; exec {sys.executable} "$@"'
    words[5:] = ["--no-python", "sh", "-c", late, "sh", *words[5:]]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=tmp_path, timeout=50, check=False, **pipe)
    assert done.returncode == 1
    assert any("--inner-lr -1.0: allowed is above 0" in line for line in done.stdout.rstrip().splitlines()[-5:])


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("maml_trpo", "--meta-batch-size 5", "--meta-batch-size 5: must be a multiple of 2"),
        ("promp", "--meta-batch-size 5", "--meta-batch-size 5: must be a multiple of 2"),
        ("rl2_ppo", "--minibatches 6 --meta-batch-size 6", "--minibatches 6: --meta-batch-size 6 leaves less than one"),
        ("pearl_sac", "--tasks-per-iteration 3", "--tasks-per-iteration 3: must be a multiple of 2"),
        ("mbmpo", "--num-models 5", "--num-models 5: must be a multiple of 2"),
        ("reptile_ppo", "", "torchrun: this algorithm runs in one process"),
        ("varibad_ppo", "", "torchrun: this algorithm runs in one process"),
        ("meta_gradient_a2c", "", "torchrun: this algorithm runs in one process"),
        ("lirpg", "", "torchrun: this algorithm runs in one process"),
        ("maml", "", "torchrun: this algorithm runs in one process"),
    ],
)
def test_what_cannot_be_shared_is_refused(name, flags, message, tmp_path, monkeypatch):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        importlib.import_module(f"algos.{name}").main(flags.split())
    assert error.value.code.startswith(message)
    assert "\n" not in error.value.code
    assert not (tmp_path / "runs").exists()
