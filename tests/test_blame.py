"""Errors name the one whose fault it is, where it is, and before any work is lost."""

import math
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

import envs
from envs import Imagined, Lifetimes, NotFinite, ScaleActions, TaskVectorEnv, Unsuitable, adaptation_gif, locomotion
from envs.adapter import AdaptedVectorEnv
from envs.locomotion import HalfCheetahDir, available_cpus, cpu_quota
from envs.navigation import Navigation2D

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*are training tasks, too")  # here all have one task
B, T = 4, 6
WRONG = (math.nan, math.inf, -math.inf)


def seeded(seed):
    return Generator().manual_seed(seed)


class Planted(TaskVectorEnv):
    """Worlds that count their steps, with numbers planted where a test says.

    `planted` is {(what, world, step): number}; an episode of world w ends early in step `ends[w]`.
    """

    task_dim = 1
    can_terminate = True
    world_state = ("_count",)

    def __init__(self, num_envs=B, max_episode_steps=T, device="cpu", dtype=torch.float32, choices=0, late=False):
        actions = Discrete(choices) if choices else Box(-1, 1, (2,), np.float32)
        super().__init__(num_envs, Box(-np.inf, np.inf, (3,), np.float32), actions, max_episode_steps, device, dtype)
        self.planted, self.ends, self.checks_late = {}, {}, late

    def sample_tasks(self, num_tasks, generator, split="train"):
        return torch.rand(num_tasks, 1, generator=generator).to(self.dtype)

    @staticmethod
    def reward(obs, action, next_obs, task):
        return next_obs[..., 0]

    def _plant(self, what, numbers):
        for (where, world, step), number in self.planted.items():
            if where == what and self._count[world] == step:
                numbers.view(self.num_envs, -1)[world, -1] = number
        return numbers

    def _start(self, task, generator):
        self._count = torch.zeros(self.num_envs, dtype=torch.int64)
        return self._plant("observation", torch.ones(self.num_envs, 3, dtype=self.dtype))

    def _advance(self, action):
        self._count = self._count + 1
        ended = torch.tensor([self._count[world] >= self.ends.get(world, T + 1) for world in range(self.num_envs)])
        obs = torch.ones(self.num_envs, 3, dtype=self.dtype)
        if not self.is_discrete:
            obs[:, :2] += action  # a wrong action spoils what follows
        return self._plant("observation", obs), ended, {}

    def _transition_reward(self, action, next_obs):
        return self._plant("reward", self.reward(None, None, next_obs, None).clone())


def still(venv):
    return torch.zeros(venv.action_space.shape, dtype=torch.int64 if venv.is_discrete else venv.dtype)


def play(venv, actions=None, steps=T):
    """Reset and steps; where the first error came, in how many steps, and what it says."""
    step = 0
    try:
        venv.reset(seed=0)
        for step in range(1, steps + 1):
            venv.step(still(venv) if actions is None else actions[step - 1])
    except (FloatingPointError, ValueError) as error:
        return step, type(error), str(error)
    return None


# ---------------------------------------------------------------- observations and rewards


@pytest.mark.parametrize("number", WRONG)
@pytest.mark.parametrize("choices", [0, 3])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_a_wrong_number_is_told_in_its_step_with_its_world_and_its_origin(what, number, choices):
    for world, step in product((0, B - 1), (1, 3, T)):
        venv = Planted(choices=choices)
        venv.planted = {(what, world, step): number}
        assert play(venv) == (step, NotFinite, f"{what} {number} in world {world}, step {step}, from Planted")
        venv.planted = {}
        assert play(venv) is None


@pytest.mark.parametrize("number", WRONG)
def test_a_reset_is_step_0(number):
    for late in (False, True):
        venv = Planted(late=late)
        venv.planted = {("observation", 2, 0): number}
        assert play(venv) == (0, NotFinite, f"observation {number} in world 2, step 0, from Planted")


def test_the_observation_is_blamed_before_the_reward_that_follows_from_it():
    venv = Planted()
    venv.planted = {("reward", 1, 2): math.nan, ("observation", 1, 2): math.inf, ("reward", 0, 3): math.nan}
    assert play(venv)[2] == "observation inf in world 1, step 2, from Planted"
    venv.planted = {("reward", 1, 2): math.nan, ("reward", 3, 2): math.inf}
    assert play(venv)[2] == "reward nan in world 1, step 2, from Planted"


def test_worlds_of_their_own_clocks_count_their_own_steps():
    for late in (False, True):  # with clocks of their own they are told at once, late or not
        venv = Planted(late=late)
        venv.reset(seed=0)
        for _ in range(3):
            venv.step(still(venv))
        venv.reset(options={"reset_mask": torch.arange(B) == 1})
        venv.planted = {("reward", 1, 2): math.nan}
        venv.step(still(venv))
        with pytest.raises(NotFinite, match=r"^reward nan in world 1, step 2, from Planted$"):
            venv.step(still(venv))
        venv.planted = {("observation", 3, 0): math.nan}
        with pytest.raises(NotFinite, match=r"^observation nan in world 3, step 0, from Planted$"):
            venv.reset(options={"reset_mask": torch.arange(B) == 3})


@pytest.mark.parametrize("late", [False, True])
def test_worlds_that_are_over_may_hold_anything(late):
    venv = Planted(late=late)
    venv.ends = {1: 2}
    venv.planted = {(what, 1, step): math.nan for what in ("observation", "reward") for step in range(3, T + 1)}
    assert play(venv) is None
    venv.ends = {1: 3}  # the step that ends an episode still counts
    assert play(venv)[2] == "observation nan in world 1, step 3, from Planted"


@pytest.mark.parametrize("late", [False, True])
def test_numbers_whose_sum_is_too_large_are_no_error(late):
    venv = Planted(late=late)
    large = {(what, world, step): 3e38 for what in ("observation", "reward") for world in range(B) for step in (0, 2)}
    venv.planted = large
    assert play(venv) is None
    venv.planted = large | {("observation", 0, 4): -3e38, ("reward", 2, 4): math.nan}
    assert play(venv)[2] == "reward nan in world 2, step 4, from Planted"


def test_the_families_names_are_told(monkeypatch):
    for family, name in ((Navigation2D, "Navigation2D"), (HalfCheetahDir, "HalfCheetahDir")):
        monkeypatch.setattr(family, "reward", staticmethod(lambda obs, action, next_obs, task: obs[:, 0] * math.nan))
        venv = envs.make(f"{name}-v0", 3, 5)
        venv.reset(seed=0)
        with pytest.raises(NotFinite, match=f"^reward nan in world 0, step 1, from {name}$"):
            venv.step(torch.zeros(venv.action_space.shape))


# ---------------------------------------------------------------- actions


@pytest.mark.parametrize("number", WRONG)
@pytest.mark.parametrize("late", [False, True])
def test_a_wrong_action_is_the_policys_though_it_spoils_the_observation(number, late):
    for world, step in product((0, 2), (1, 4)):
        venv, actions = Planted(late=late), torch.zeros(T, B, 2)
        actions[step - 1, world, 1] = number
        told = f"non-finite action in world {world}, step {step}, from the policy"
        assert play(venv, actions) == (T if late else step, NotFinite, told)
    actions = torch.full((T, B, 2), 3e38)
    assert play(Planted(late=late), actions) is None  # finite, though not their sum


@pytest.mark.parametrize("late", [False, True])
def test_a_choice_that_does_not_exist_is_told(late):
    for choice in (-1, 3, 2**40):
        venv, actions = Planted(choices=3, late=late), torch.full((T, B), 2)
        actions[1, 3] = choice
        told = "action must be 0 to 2, which it is not in world 3, step 2"
        assert play(venv, actions) == (T if late else 2, ValueError, told)


# ---------------------------------------------------------------- on a GPU: late, and nothing waits


@pytest.mark.parametrize("number", WRONG)
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_late_checks_tell_the_same_at_the_horizon_and_at_the_next_reset(what, number):
    for world, step in product((0, B - 1), (1, 3, T)):
        venv = Planted(late=True)
        venv.planted = {(what, world, step): number}
        venv.planted |= {("reward", 1, later): math.nan for later in range(step + 1, T + 1)}  # the first one counts
        told = f"{what} {number} in world {world}, step {step}, from Planted"
        assert play(venv) == (T, NotFinite, told)
        venv.planted = {(what, world, step): number}
        if step < T:
            assert play(venv, steps=step) is None
            with pytest.raises(NotFinite, match=f"^{re.escape(told)}$"):
                venv.reset(seed=0)
        venv.planted = {}
        assert play(venv) is None  # told once


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers and shapes that depend on data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        self.count += any(tag in function.tags for tag in tags)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "at_once"), [("Navigation2D", 3), ("Bandit5", 4)])
def test_no_late_check_waits(name, at_once):
    """At once it is one wait for actions (for choices: the least and the largest), one each for what comes of them."""
    for late, expected in ((False, at_once), (True, 0)):
        venv = envs.make(f"{name}-v0", 5, 9, discrete=True).unwrapped
        venv.checks_late = late
        venv.reset(seed=0)
        for _ in range(7):
            with Waits() as waits:
                venv.step(still(venv))
            assert waits.count == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_tells_at_the_horizon_and_waits_in_no_step(monkeypatch):
    venv, actions = Navigation2D(3, 4, device="cuda"), torch.zeros(3, 2, device="cuda")
    wrong = torch.tensor([0.0, torch.nan, 0.0], device="cuda")
    venv.reset(seed=0)
    venv._transition_reward = lambda action, next_obs: wrong
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            venv.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(NotFinite, match=r"^reward nan in world 1, step 1, from Navigation2D$"):
        venv.step(actions)


# ---------------------------------------------------------------- imagined worlds


def test_imagined_worlds_end_where_a_prediction_is_not_finite_whatever_the_bounds():
    for number in WRONG:
        imagined = Imagined(ScaleActions(Navigation2D(2, 5), 1.0), 3)

        def dynamics(obs, action, number=number):
            return torch.where(torch.tensor([[False], [True], [False]]), number, obs)

        imagined.follow(dynamics, torch.full((2,), -torch.inf), torch.full((2,), torch.inf))
        imagined.reset(seed=0)
        obs, reward, terminated, *_ = imagined.step(torch.zeros(3, 2))
        assert terminated.tolist() == [False, True, False]
        assert torch.isfinite(obs).all()
        assert torch.isfinite(reward).all()


def test_what_an_imagined_world_earns_is_the_models_fault():
    imagined = Imagined(ScaleActions(Navigation2D(2, 5), 1.0), 3)
    imagined.follow(lambda obs, action: obs + 3e38, torch.full((2,), -torch.inf), torch.full((2,), torch.inf))
    imagined.reset(seed=0)
    with pytest.raises(NotFinite, match=r"^reward -inf in world 0, step 1, from a model of Navigation2D$"):
        imagined.step(torch.zeros(3, 2))


# ---------------------------------------------------------------- a user's own environment


class Own(gym.Env):
    """A user's environment; class attributes say what is wrong with it."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,), np.float32), Box(-1, 1, (2,), np.float32)
    wrong, task = {}, 0.5
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode, self.closed = render_mode, False

    def sample_tasks(self, num_tasks, rng, split):
        return np.full((num_tasks, 1), self.task)

    def set_task(self, task):
        self.goal = task

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.array([self.wrong.get("reset", 0.0), 0.0]), {}

    def step(self, action):
        self.count += 1
        wrong = {name: number for name, number in self.wrong.items() if self.count == 2}
        return np.array([0.0, wrong.get("observation", 0.0)]), wrong.get("reward", 0.0), False, False, {}

    def render(self):
        return np.full((8, 8, 3), 20 * self.count, np.uint8) if self.render_mode == "rgb_array" else None

    def close(self):
        self.closed = True


def own(**attributes):
    return type("MyEnv", (Own,), attributes)


def adapted(kind, num_envs=2, **kwargs):
    return AdaptedVectorEnv(lambda: gym.wrappers.TransformReward(kind(), lambda r: r), num_envs, T, **kwargs)


@pytest.fixture
def register():
    """Registers a vector environment as a user would; forgets it after the test."""
    known = set(gym.registry)

    def add(vector_entry_point, name="Own-v0"):
        gym.register(name, entry_point=Own, vector_entry_point=vector_entry_point)
        return name

    yield add
    for name in set(gym.registry) - known:
        del gym.registry[name]


def test_a_users_environment_is_named():
    cases = (("reset", 0, "observation"), ("observation", 2, "observation"), ("reward", 2, "reward"))
    for (where, step, what), number in product(cases, WRONG):
        found = play(adapted(own(wrong={where: number})))
        assert found == (step, NotFinite, f"{what} {number} in world 0, step {step}, from MyEnv")
    assert play(adapted(own())) is None


def test_actions_without_bounds_are_refused_before_work_starts(register):
    endless = own(action_space=Box(-np.inf, np.inf, (2,)))
    with pytest.raises(TypeError, match=r"number 0 of MyEnv's actions is from -inf to inf"):
        AdaptedVectorEnv(lambda: gym.wrappers.ClipAction(endless()), 2, T)
    for low, high, number in (([-1, 0], [1, np.inf], 1), ([-np.inf, 0], [1, 1], 0), ([-3e38, 0], [3e38, 1], 0)):
        space = Box(np.array(low, np.float32), np.array(high, np.float32))
        with pytest.raises(ValueError, match=f"number {number} of MyEnv's actions is from"):
            adapted(own(action_space=space))
        venv = Planted()
        venv.single_action_space = space
        with pytest.raises(TypeError, match=f"number {number} of Planted's actions is from"):
            ScaleActions(venv, 1.0)
    space = Box(-1, 1, (2,))
    space.high[1] = np.nan
    with pytest.raises(Unsuitable, match="number 1 of MyEnv's actions is from"):
        adapted(own(action_space=space))
    name = register(lambda num_envs, **kw: AdaptedVectorEnv(endless, num_envs, **kw))
    with pytest.raises(
        SystemExit, match=rf"^--env-id {name}: number 0 of MyEnv's actions is from -inf to inf, [^\n]*$"
    ):
        envs.make(name, 2, T)


def test_what_the_adapter_refuses_is_one_line_and_what_the_user_does_wrong_keeps_its_trace(register):
    class Buttons(Own):
        action_space = MultiDiscrete([2])

    for number, (kind, message) in enumerate(((Buttons, "must be a one-dimensional Box"), (own(task="a"), "numbers"))):
        name = register(lambda num_envs, kind=kind, **kw: AdaptedVectorEnv(kind, num_envs, **kw), f"Wrong{number}-v0")
        with pytest.raises(SystemExit, match=rf"^--env-id {name}: [^\n]*{message}[^\n]*$"):
            envs.make(name, 2, T)

    def fails(num_envs, error, **kwargs):
        raise error

    for number, kind in enumerate((TypeError, ValueError, RuntimeError, OSError)):
        error = kind("the user's own")
        name = register(lambda num_envs, error=error, **kw: fails(num_envs, error, **kw), f"Fails{number}-v0")
        with pytest.raises(kind, match=r"^the user's own$"):
            envs.make(name, 2, T)


def test_a_users_environment_can_be_made(register):
    name = register(lambda num_envs, **kwargs: AdaptedVectorEnv(Own, num_envs, **kwargs))
    assert envs.make(name, 2, T).unwrapped.source == "Own"


# ---------------------------------------------------------------- ids


def test_no_id_of_gymnasiums_own_is_taken_for_one_of_ours():
    ours = {f"{family.__name__}-v0" for family in envs.HORIZONS}
    others = {"CartPole-v1", "Pendulum-v1", "phys2d/CartPole-v1", "NoSuchThing-v0", "CartPole"}
    assert others - {"NoSuchThing-v0", "CartPole"} < set(gym.registry)
    for env_id in (set(gym.registry) | others) - ours:
        with pytest.raises(SystemExit) as refused:
            envs.make(env_id, 2, T)
        assert str(refused.value).startswith(f"--env-id {env_id} is no batched task environment; allowed: Navigation2D")
        assert "\n" not in str(refused.value)


def test_vector_environments_of_others_are_refused(register, monkeypatch):
    monkeypatch.setattr(Own, "sample_tasks", None)
    name = register(lambda num_envs, **kwargs: gym.vector.SyncVectorEnv([lambda: gym.make("Pendulum-v1")]))
    with pytest.raises(SystemExit, match=f"^--env-id {name} is no batched task environment"):
        envs.make(name, 2, T)
    name = register(gym.vector.SyncVectorEnv, "Class-v0")  # whose arguments are others
    with pytest.raises(SystemExit, match=f"^--env-id {name}: Own needs a method sample_tasks; "):
        envs.make(name, 2, T)


# ---------------------------------------------------------------- worlds that start singly


def test_families_whose_worlds_start_together_are_refused_where_they_must_start_singly(register):
    together = {family for family in envs.HORIZONS if family.world_state is None}
    assert {family.__name__ for family in together} == {"HopperRandParams", "WalkerRandParams", "MouseCheese"}
    for family in envs.HORIZONS:
        name = f"{family.__name__}-v0"
        if family in together:
            told = "its worlds can only start together; this algorithm needs worlds that start singly"
            with pytest.raises(SystemExit, match=f"^--env-id {name}: {told}$"):
                envs.make(name, 2, T, discrete=True, singly=True)
            with pytest.raises(TypeError, match=f"^worlds of {family.__name__} can only start together"):
                Lifetimes(envs.make(name, 2, T, discrete=True), 2)
    assert Lifetimes(envs.make("SymABC-v0", 2, T, discrete=True, singly=True), 2).num_envs == 2
    name = register(lambda num_envs, **kwargs: AdaptedVectorEnv(Own, num_envs, **kwargs))
    assert Lifetimes(envs.make(name, 2, T, singly=True), 2).unwrapped.source == "Own"


# ---------------------------------------------------------------- pictures of a user's environment


def test_a_single_world_draws_and_closes_without_the_batch(tmp_path):
    made = []
    batch = ScaleActions(
        AdaptedVectorEnv(lambda: made.append(Own("rgb_array")) or made[-1], 2, T, dtype=torch.float64), 3.0
    )
    batch.reset(seed=0)
    batch.step(torch.zeros(2, 2))
    one = batch.single_world()
    assert (type(one), one.num_envs, one.scale, one.unwrapped.horizon) == (ScaleActions, 1, 3.0, T)
    assert one.unwrapped.dtype == torch.float64
    assert one.reset(seed=0)[0].shape == (1, 2)
    one.step(torch.zeros(1, 2))
    one.step(torch.zeros(1, 2))
    assert one.unwrapped.render_frame().max() == 40
    assert batch.unwrapped.render_frame(1).max() == 20
    one.close()
    assert [env.closed for env in made] == [False, False, True]
    batch.step(torch.zeros(2, 2))
    adaptation_gif(tmp_path / "own.gif", batch, {"still": lambda obs: torch.zeros(1, 2)})
    assert (tmp_path / "own.gif").stat().st_size > 0
    assert [env.closed for env in made] == [False, False, True, True]
    batch.close()
    assert all(env.closed for env in made)


def test_an_environment_that_draws_nothing_says_how_it_could():
    for kind in (Own, own(render=lambda self: [np.zeros((8, 8, 3))]), own(render=lambda self: "a text")):
        venv = AdaptedVectorEnv(kind, 1, T)
        venv.reset(seed=0)
        with pytest.raises(RuntimeError, match=r"gives no picture but \w+: make it with render_mode='rgb_array'$"):
            venv.render_frame()
    venv = AdaptedVectorEnv(own(render=gym.Env.render), 1, T)
    with pytest.raises(RuntimeError, match=r"^MyEnv has no method render$"):
        venv.render_frame()


# ---------------------------------------------------------------- tasks that rounding changes


def test_tasks_that_are_not_finite_are_refused_as_ever():
    venv = AdaptedVectorEnv(own(task=math.nan), 2, T)
    with pytest.raises(ValueError, match=r"^non-finite task$"):
        venv.reset(seed=0)


# ---------------------------------------------------------------- cores


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GROUPS = "sys/fs/cgroup"
V1 = f"{GROUPS}/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": ""}, math.inf),
        ({"proc/self/cgroup": "0::/\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "150000 100000\n"}, 1.5),
        ({f"{GROUPS}/cpu.max": "150000 100000\n"}, math.inf),  # without knowing the own group nothing is known
        (
            {
                "proc/self/cgroup": "0::/kube/pod:one/box\n",
                f"{GROUPS}/kube/cpu.max": "800000 100000\n",
                f"{GROUPS}/kube/pod:one/cpu.max": "300000 100000\n",
                f"{GROUPS}/kube/pod:one/box/cpu.max": "max 100000\n",
                f"{GROUPS}/kube/pod:one/box/inside/cpu.max": "10000 100000\n",
                f"{GROUPS}/other/cpu.max": "10000 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{GROUPS}/a/cpu.max": "max 100000\n",
                f"{GROUPS}/a/b/cpu.max": "25000 50000\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "0::/host/id\n", f"{GROUPS}/cpu.max": "200000 100000\n"}, 2),  # the host's name
        (
            {
                "proc/self/cgroup": "0::/../../other\n",
                f"{GROUPS}/cpu.max": "200000 100000\n",
                "sys/cpu.max": "10000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n3:cpu,cpuacct:/docker/id\n1:name=systemd:/x\n0::/\n",
                f"{V1}/docker/id/cpu.cfs_quota_us": "250000\n",
                f"{V1}/docker/id/cpu.cfs_period_us": "100000\n",
                f"{V1}/cpu.cfs_quota_us": "-1\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
                f"{GROUPS}/memory/m/cpu.cfs_quota_us": "1000\n",
                f"{GROUPS}/memory/m/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/docker/id\n",  # in a container: mounted as "cpu", its group on top
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "400000\n",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/\n",  # both versions: the other one lies in "unified"
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1\n",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000\n",
                f"{GROUPS}/unified/cpu.max": "700000 100000\n",
            },
            7,
        ),
        ({"proc/self/cgroup": "1:cpu:/\n", f"{GROUPS}/cpu/cpu.cfs_quota_us": "100000\n"}, math.inf),  # half of it
        ({"proc/self/cgroup": "2:cpuset:/\n", f"{GROUPS}/cpuset/cpu.max": "100000 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "what is this\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "100000 0\n"}, math.inf),
        ({"proc/self/cgroup": "nonsense\n\n0::/\n", f"{GROUPS}/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max/is_a_folder": ""}, math.inf),
    ],
)
def test_the_quota_of_control_groups(files, cores, tmp_path):
    assert cpu_quota(tree(tmp_path, files)) == cores


def test_available_cpus_are_the_least_of_all_limits(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for quota, cpus in ((math.inf, 6), (8.0, 6), (2.0, 2), (2.1, 3), (0.3, 1)):
        monkeypatch.setattr(locomotion, "cpu_quota", lambda quota=quota: quota)
        assert available_cpus() == cpus
    monkeypatch.setattr(locomotion, "cpu_quota", lambda: 4.0)
    for processes, cpus in ((1, 4), (3, 1), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert available_cpus() == cpus


def test_one_thread_gives_threads_back_after_an_error():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for one_thread in (envs.one_thread, Navigation2D(1).one_thread):
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
            with pytest.raises(KeyError), one_thread():
                raise KeyError
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("platform", "variables", "chosen"),
    [
        ("linux", {}, "egl"),
        ("linux", {"DISPLAY": ":0"}, None),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, None),
        ("linux", {"MUJOCO_GL": "osmesa"}, "osmesa"),
        ("darwin", {}, None),
        ("win32", {}, None),
    ],
)
def test_egl_is_chosen_on_linux_without_a_display(platform, variables, chosen, monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(locomotion.sys, "platform", platform)
    monkeypatch.setattr(locomotion.importlib, "reload", lambda module: module)
    monkeypatch.setattr(locomotion.mujoco, "Renderer", lambda *_: os.environ.get("MUJOCO_GL"))
    assert locomotion.make_renderer(None, 1, 1) == chosen


def test_nothing_else_sets_mujocos_way_to_draw():
    sets = re.compile(r"""["']MUJOCO_GL["']\]\s*=|(setdefault|putenv)\(\s*["']MUJOCO_GL""")
    files = [path for folder in ("envs", "algos", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files for _ in sets.findall(path.read_text())] == ["locomotion.py"]


# ---------------------------------------------------------------- packages that are missing

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Block())
"""
SCRIPT = """
class Args:
    pass
def main():
    import envs
main()
"""


def ends_with(command, blocked, tmp_path):
    """What a command writes to standard error, and its exit code, where a package cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(name=blocked))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    return result.stderr, result.returncode


@pytest.mark.parametrize("name", ["gymnasium", "mujoco", "PIL", "tyro", "tqdm", "matplotlib"])
def test_a_script_says_in_one_line_which_package_is_missing(name, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    told = f"{name} is not installed: pip install -r requirements.txt"
    assert ends_with([script], name, tmp_path) == (f"{told}\n", 1)


@pytest.mark.parametrize("name", ["gymnasium", "mujoco", "PIL"])
def test_a_library_gets_an_import_error(name, tmp_path):
    error, code = ends_with(["-c", "import envs"], name, tmp_path)
    assert code == 1
    told = f"ImportError: {name} is not installed: pip install -r requirements.txt"
    assert error.startswith("Traceback")
    assert error.splitlines()[-1] == told


def test_an_algorithm_says_it_too_and_a_library_needs_no_command_line(tmp_path):
    told = "tyro is not installed: pip install -r requirements.txt\n"
    assert ends_with([ROOT / "algos" / "maml.py"], "tyro", tmp_path) == (told, 1)
    assert ends_with(["-c", "import envs"], "tyro", tmp_path) == ("", 0)
