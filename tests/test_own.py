"""Environments of a user's own by --env-id: modules, files, classes, functions; the oracle is the class itself."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from envs import own
from envs.adapter import EXAMPLE, AdaptedVectorEnv
from envs.flags import default_horizon

ROOT = Path(__file__).resolve().parents[1]

FILE = '''
import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from envs.core import TaskVectorEnv

class Push(gym.Env):
    """A number moves by the action; the reward is minus its distance from the task."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = Box(-9, 9, (1,)), Box(-1, 1, (1,))

    def __init__(self, render_mode=None, start=0.0):
        self.render_mode, self.start = render_mode, start

    def sample_tasks(self, num_tasks, rng, split):
        return rng.uniform(*{"train": (0, 1), "test": (1, 2)}[split], (num_tasks, 1))

    def set_task(self, task):
        self.goal = float(task[0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = self.np_random.uniform(-0.1, 0.1) + self.start
        return np.array([self.number], np.float32), {}

    def step(self, action):
        self.number = float(np.clip(self.number + action[0], -9, 9))
        return np.array([self.number], np.float32), -abs(self.number - self.goal), False, False, {}

    def render(self):
        return np.full((8, 8, 3), 100, np.uint8)

class Buttons(Push):
    action_space = Discrete(3)

    def step(self, action):
        assert action in self.action_space
        return super().step([float(action) - 1])

class NeedsMass(Push):
    def __init__(self, mass):
        super().__init__()

class NoTasks(gym.Env):
    observation_space, action_space = Push.observation_space, Push.action_space

def wrapped():
    return gym.wrappers.ClipAction(Push(start=5.0))

class Batched(TaskVectorEnv):
    task_dim = 1
    world_state = ()

    def __init__(self, num_envs, max_episode_steps=17, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, Push.observation_space, Push.action_space, max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        return torch.rand(num_tasks, 1, generator=generator) + (split == "test")

    @staticmethod
    def reward(obs, action, next_obs, task):
        return -(next_obs - task).abs()[..., 0]

    def _start(self, task, generator):
        return self._draw(torch.rand, generator, 1)

    def _advance(self, action):
        return self._obs + action, torch.zeros(self.num_envs, dtype=torch.bool), {}

gym.register("Push-v3", entry_point=Push, max_episode_steps=13, kwargs={"start": 2.0})
gym.register("name/Push-v4", entry_point=f"{__name__}:Push")
gym.register("Batched-v0", entry_point=Push, vector_entry_point=Batched, max_episode_steps=14)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with modules of a user's, in which one works; afterwards they are forgotten."""
    known = set(gym.registry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine/__init__.py").write_text("")
    (tmp_path / "package_of_mine/tasks.py").write_text(FILE)
    yield tmp_path
    for name in set(gym.registry) - known:
        del gym.registry[name]
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


MODULE, PATH = "package_of_mine.tasks", "package_of_mine/tasks.py"


@pytest.mark.parametrize(
    ("env_id", "start", "horizon"),
    [
        (f"{MODULE}:Push-v3", 2, 13),
        (f"{MODULE}:name/Push-v4", 0, 100),
        (f"{MODULE}:Push", 0, 100),
        (f"{PATH}:Push", 0, 100),
        (f"{PATH}:Push-v3", 2, 13),
        (f"{PATH}:wrapped", 5, 100),
    ],
)
def test_a_single_environment_becomes_a_batch(here, env_id, start, horizon):
    assert default_horizon(env_id) == horizon
    worlds = envs.make(env_id, 3, 4)
    family = worlds.unwrapped
    assert isinstance(family, AdaptedVectorEnv)
    assert family.source == "Push"
    tasks = family.sample_tasks(3, seeded(0), "test")
    obs, _ = worlds.reset(seed=0, options={"tasks": tasks})
    number = obs[:, 0].double().numpy()
    assert np.abs(number - start).max() < 0.1
    for action in ([0.5, -0.25, 2.0], [1.0, 1.0, 1.0], [0, 0, 0], [0, 0, 0]):  # more than 13 do not fit in any case
        number = number + np.clip(action, -1, 1)
        obs, reward, _, truncated, _ = worlds.step(torch.tensor(action, dtype=torch.float32)[:, None])
        np.testing.assert_allclose(obs[:, 0], number, atol=1e-5)
        np.testing.assert_allclose(reward, -np.abs(number - tasks[:, 0].numpy()), atol=1e-5)
    assert truncated.all()
    frame = worlds.single_world().unwrapped
    frame.reset(seed=0)
    assert frame.render_frame().mean() == 100
    assert all(env.unwrapped.render_mode == ("rgb_array" if "wrapped" not in env_id else None) for env in family.envs)


@pytest.mark.parametrize(
    ("env_id", "horizon"), [(f"{MODULE}:Batched-v0", 14), (f"{PATH}:Batched", 17), (f"{MODULE}:Batched", 17)]
)
def test_a_batch_of_our_contract_is_used_as_it_is(here, env_id, horizon):
    assert default_horizon(env_id) == horizon
    worlds = envs.make(env_id, 3, 4)
    assert type(worlds.unwrapped).__name__ == "Batched"
    assert worlds.unwrapped.horizon == 4


def test_the_registered_time_limit_gives_way_to_the_horizon(here):
    worlds = envs.make(f"{MODULE}:Push-v3", 1, 20)
    worlds.reset(seed=0)
    assert [bool(worlds.step(torch.zeros(1, 1))[3]) for _ in range(20)] == [False] * 19 + [True]


def test_a_file_runs_once_and_may_have_any_name_and_neighbours(here):
    (here / "neighbour.py").write_text("LIMIT = 7\n")
    (here / "random.py").write_text(f"import neighbour\nprint('runs')\n{FILE}\nLIMIT = neighbour.LIMIT\n")
    import random

    found = own.find("random.py:Push")
    assert own.find(str(here / "random.py:Push")) is found
    assert own.find("./random.py:Push") is found
    assert sys.modules["random"] is random
    assert found.__module__ == "random_"


def said(env_id, **options):
    with pytest.raises(SystemExit) as refused:
        envs.make(env_id, 2, 4, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    ("env_id", "told"),
    [
        ("no_such_module:Push-v0", "no module no_such_module, neither where Python looks nor in /"),
        ("package_of_mine.nothing:Push-v0", "no module package_of_mine.nothing, "),
        ("path/to/file:Push", "for a file write path/to/file.py:MyTask"),
        ("nothing.py:Push", "no file /"),
        ("package_of_mine:Push", "package_of_mine neither registers nor defines Push; there is no environment in it"),
        (f"{MODULE}:Pushh-v0", f"{MODULE} neither registers nor defines Pushh-v0; its environments: Push, Buttons, "),
        (f"{PATH}:", "write it as my_package.my_module:MyTask-v0 ("),
        (PATH, "write it as my_package.my_module:MyTask-v0 ("),
        (":Push-v0", "write it as "),
        (f"{PATH}:NeedsMass", "NeedsMass needs mass: give its arguments defaults"),
        (f"{PATH}:Buttons", "its actions are choices; this algorithm's are continuous"),
        (f"{PATH}:seven", "seven is no gymnasium.Env|int is no gymnasium.Env"),
        ("gymnasium.vector:SyncVectorEnv", "is no batched task environment"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(here, env_id, told):
    (here / PATH).write_text(f"{FILE}\ndef seven():\n    return 7\n")
    line = said(env_id)
    assert line.startswith(f"--env-id {env_id}")
    assert "\n" not in line
    assert re.search("|".join(re.escape(x) for x in told.split("|")), line)


def test_what_is_lacking_is_named_with_ten_lines_that_would_do(here):
    line, *example = said(f"{PATH}:NoTasks").split("\n")
    told = "NoTasks needs a method sample_tasks and a method set_task; see envs/adapter.py"
    assert line == f"--env-id {PATH}:NoTasks: {told}"
    assert 10 <= sum(bool(x.strip()) for x in example) <= 12
    assert "\n".join(example[1:]) == EXAMPLE
    assert "needs a method sample_tasks" in said("gymnasium.envs.classic_control:PendulumEnv")
    assert "is no batched task environment" in said("Pendulum-v1")  # of no module: a slip rather than one's own
    assert said("HalfCheetahDirr-v0").endswith("; perhaps you meant HalfCheetahDir-v0")


def test_the_ten_lines_do(here):
    names = {"gym": gym}
    exec(re.sub("^    ", "", EXAMPLE, flags=re.MULTILINE), names)
    pendulum = gym.make("Pendulum-v1").unwrapped
    kind = type("Mine", (names["MyTask"], type(pendulum)), {})
    worlds = AdaptedVectorEnv(kind, 2, 5)
    train, test = (worlds.sample_tasks(500, seeded(0), split) for split in ("train", "test"))
    assert train.max() < 1.5 < test.min()
    worlds.reset(seed=0)
    assert [env.mass for env in worlds.envs] == worlds.tasks[:, 0].tolist()
    with pytest.raises(ValueError, match="split must be train or test"):
        worlds.sample_tasks(1, seeded(0), "valid")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import not_installed_here", ModuleNotFoundError),
        ("1 / 0", ZeroDivisionError),
        ("raise SystemExit(3)", SystemExit),
    ],
)
def test_errors_of_a_users_own_code_keep_their_trace(here, text, error):
    (here / "broken.py").write_text(text)
    for env_id in ("broken:Push-v0", "broken.py:Push"):
        for _ in range(2):  # it has not been half loaded
            with pytest.raises(error) as raised:
                own.find(env_id)
            assert "--env-id" not in str(raised.value)
            assert raised.traceback[-1].path.name == "broken.py"


def test_a_module_that_python_finds_comes_before_the_working_directory(here):
    (here / "json.py").write_text("raise AssertionError\n")
    assert own.find("json:dumps") is json.dumps


def test_ids_that_are_the_same():
    assert own.is_same("a/b.py:C", "/x/b.py:C")
    assert own.is_same("a.b:C-v0", "a.b:C-v0")
    for other in ("a/c.py:C", "a/b.py:D", "b:C", "b.py", "C"):
        assert not own.is_same("a/b.py:C", other)


TINY = ["--iterations", "2", "--horizon", "5", "--meta-batch-size", "2"]


def run(name, *flags):
    import_module(f"algos.{name}").main([str(x) for x in flags])


@pytest.mark.parametrize("env_id", [f"{MODULE}:Push-v3", f"{PATH}:Push"])
def test_runs_are_named_after_the_environment_and_go_on(here, env_id, monkeypatch, capsys):
    flags = ["--env-id", env_id, *TINY, "--episodes-per-task", 2]
    run("maml_trpo", *flags)
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith(f"{own.short_name(env_id)}__maml_trpo__1__")
    run("maml_trpo", "--resume", folder, "--iterations", 3)
    twin = [*flags, "--iterations", 3]
    run("maml_trpo", *twin)
    (other,) = set((here / "runs").iterdir()) - {folder}
    assert other.name.startswith(f"{own.short_name(env_id)}__maml_trpo__1__")
    rows = [[json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (folder, other)]
    assert len(rows[0]) == len(rows[1]) == 3
    for one, two in zip(*rows, strict=True):
        assert {k: x for k, x in one.items() if k != "seconds"} == {k: x for k, x in two.items() if k != "seconds"} or (
            one["iteration"] == 2  # which the resumed run evaluated as its last
        )
    assert rows[0][2]["test/return_k0"] == rows[1][2]["test/return_k0"]
    with pytest.raises(SystemExit, match="must be the run's: --env-id"):
        run("maml_trpo", "--resume", folder, "--env-id", f"{PATH}:wrapped", "--iterations", 4)
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if env_id == f"{PATH}:Push":
        with pytest.raises(SystemExit, match=f"no file {elsewhere / PATH}"):
            run("maml_trpo", "--resume", folder, "--iterations", 4)
        run("maml_trpo", "--resume", folder, "--iterations", 4, "--env-id", f"{here / PATH}:Push")
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_script_finds_the_modules_of_the_folder_in_which_it_is_started(here):
    """In a process of its own, whose Python does not look into the working directory."""
    command = [sys.executable, str(ROOT / "algos/maml_trpo.py"), "--env-id", f"{MODULE}:Push-v3", *TINY]
    result = subprocess.run(
        [*command, "--iterations", "1", "--episodes-per-task", "2"],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert [x.name.split("__")[0] for x in (here / "runs").iterdir()] == ["Push-v3"]


# ---------------------------------------------------------------- every algorithm

COMMON = "--iterations 1 --horizon 5 "
RUNS = {
    "maml_trpo": "Push --meta-batch-size 2 --episodes-per-task 2",
    "promp": "Push --meta-batch-size 2 --episodes-per-task 2",
    "reptile_ppo": "Push --meta-batch-size 2 --episodes-per-task 2",
    "multitask_ppo": "Push --meta-batch-size 2 --episodes-per-task 2 --task-given --capture-video",
    "rl2_ppo": "Buttons --meta-batch-size 2 --minibatches 1 --hidden-size 16",
    "rl2_transformer_ppo": "Push --meta-batch-size 2 --minibatches 1 --hidden-size 16",
    "varibad_ppo": "Buttons --meta-batch-size 2 --minibatches 1 --hidden-size 8 --vae-updates 1 --vae-batch-size 2",
    "pearl_sac": "Push --train-tasks 2 --tasks-per-iteration 2 --meta-batch-size 2 --updates 1 --batch-size 4 "
    "--context-size 4 --hidden-size 8",
    "mbmpo": "Known --num-models 2 --real-episodes 2 --episodes-per-task 2 --horizon 8 --model-epochs 1 --meta-steps 1 "
    "--model-size 8",
    "lirpg": "Buttons --num-worlds 2 --rollout-steps 8 --minibatches 1",
    "meta_gradient_a2c": "Push --num-worlds 2 --rollout-steps 8",
    "lifetime_rewards": "Buttons --meta-batch-size 2 --episodes-per-lifetime 2",
    "meta_critic": "Buttons --meta-batch-size 2 --lifetime 3 --eval-episodes 1 --eval-windows 1",
}
KNOWN = """
class Known(Push):
    @staticmethod
    def reward(obs, action, next_obs, task):
        return -(next_obs - task)[..., 0].abs()
"""


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def test_no_algorithm_is_forgotten():
    names = {path.stem for path in (ROOT / "algos").glob("*.py")}
    supervised = {"maml", "fomaml", "reptile", "protonet", "in_context", "learned_optimizer"}
    assert set(RUNS) == names - supervised - {"dpt", "ad"}  # whose labels are looked up in tables


@pytest.mark.parametrize("name", RUNS)
def test_every_algorithm_runs_and_goes_on_as_if_it_had_never_stopped(name, here):
    (here / PATH).write_text(FILE + KNOWN)
    kind, *flags = RUNS[name].split()
    flags = ["--env-id", f"{PATH}:{kind}", *COMMON.split(), *flags]
    run(name, *flags)
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith(f"{kind}__{name}__1__")
    assert (folder / "adaptation.gif").exists() == ("--capture-video" in flags)
    run(name, "--resume", folder, "--iterations", 2)
    run(name, *flags, "--iterations", 2)
    (other,) = set((here / "runs").iterdir()) - {folder}
    assert metrics(folder)[-1] == metrics(other)[-1]


def test_a_run_whose_worlds_cannot_go_on_says_so_in_one_line(here):
    unseeded = "class Unseeded(Push):\n    def reset(self, **_):\n        return super().reset()\n"
    (here / PATH).write_text(FILE + unseeded)
    run("lirpg", "--env-id", f"{PATH}:Unseeded", *COMMON.split(), *RUNS["lirpg"].split()[1:])
    (folder,) = (here / "runs").iterdir()
    told = rf"^iteration 1: Unseeded does something else with the same task[^\n]*; [^\n]*--resume {folder}$"
    with pytest.raises(SystemExit, match=told):
        run("lirpg", "--resume", folder, "--iterations", 2)


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("maml_trpo", "Buttons", "its actions are choices; this algorithm's are continuous"),
        ("meta_critic", "Push", "its actions are continuous, not choices"),
        ("lifetime_rewards", "Push", "its actions are continuous, not choices"),
        ("mbmpo", "Push", "its reward is not known as a function"),
        ("maml", "Push", "is no supervised task family"),
        ("learned_optimizer", "Push", "is no family of functions to minimise"),
        ("dpt", "Buttons", "it is not tabular; this algorithm needs few states, and their optimal actions"),
    ],
)
def test_what_an_algorithm_cannot_use_it_refuses_in_one_line(name, kind, told, here):
    with pytest.raises(SystemExit, match=rf"^--env-id[^\n]*{re.escape(told)}[^\n]*$"):
        run(name, "--env-id", f"{PATH}:{kind}")
    assert not (here / "runs").exists()
