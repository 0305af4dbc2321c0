"""The environment contract on every registered family, and the physics against Gymnasium's own environments."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import envs
from envs import locomotion
from envs.core import ScaleActions, TaskVectorEnv
from envs.locomotion import HumanoidDir
from envs.navigation import Navigation2D

ROOT = Path(__file__).parent.parent
FAMILIES = {family.__name__: family for family in envs.HORIZONS}
MUJOCO = [name for name, family in FAMILIES.items() if issubclass(family, locomotion.MujocoTaskVectorEnv)]
SAME_TASKS = {"HalfCheetahDir", "AntDir", "NonstationaryABC", "TwoStep"}  # train and test are the same two tasks
FORWARD = ["HalfCheetahForward", "AntForward", "SwimmerForward", "HopperForward", "Walker2dForward"]
ONE_TASK = {**{name: [1.0] for name in FORWARD}, "CartPoleFixed": [0.5], "FixedABC": [1.0, -0.5, 0.5]}
ONE_TASK |= {"Corridor": [0.25, 1.0], "NoisyLights": [3.0]}
# Chance decides rewards and states; tests/test_envs_discrete.py has the oracles.
RANDOM = ["Bandit5", "Bandit10", "Bandit50", "GaussianBandit5", "UniformGaussianBandit5", "DependentBandit"]
RANDOM += ["TabularMDP", "TwoStep", "Harlow", "NoisyLights"]
POLES = ["CartPoleLength", "CartPoleFixed"]  # tests/test_gridworlds.py has the oracles of these and of the grid worlds
SWAPPED = ["RandomABCReversed", "RandomABCDiagonal", "SymABCReversed", "SymABCDiagonal"]
ABC = ["RandomABC", "SymABC", *SWAPPED, "FixedABC", "NonstationaryABC", "KeyBox"]
# Goals in training, in tests, in both; tests/test_envs_discrete.py has the oracles.
HIDDEN_GOALS = {"GridNavi": (21, 21, 21), "GridNaviUnseen": (17, 4, 21)}
HIDDEN_GOALS |= {
    "DarkRoom": (80, 20, 100),
    "DarkRoomSmall": (64, 17, 81),
}
DISCRETE = [*RANDOM, *HIDDEN_GOALS, "MouseCheese", *POLES, "EmptyRooms", *ABC, "Corridor"]
FALLING = ["AntDir", "AntDir2D", "AntVel", "HumanoidDir", "HopperRandParams", "WalkerRandParams"]
FALLING += ["AntForward", "HopperForward", "Walker2dForward"]
ENDING = [
    *FALLING,
    "MouseCheese",
    *POLES,
    "EmptyRooms",
    *ABC,
    "Corridor",
]  # by random actions: none leads Navigation2D to its goal
every_family = pytest.mark.parametrize("name", FAMILIES)
every_discrete = pytest.mark.parametrize("name", DISCRETE)
every_box = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DISCRETE])
# Observations of these do not tell of an end.
SILENT = [*RANDOM, *HIDDEN_GOALS, "MouseCheese", "EmptyRooms", "Navigation2D"]
every_telling = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SILENT])
every_determined = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in RANDOM])
every_mujoco = pytest.mark.parametrize("name", MUJOCO)
every_falling = pytest.mark.parametrize("name", FALLING)


def make(name, num_envs, horizon=None, **kwargs):
    if horizon is not None:
        kwargs["max_episode_steps"] = horizon
    return gym.make_vec(f"{name}-v0", num_envs, vectorization_mode="vector_entry_point", **kwargs).unwrapped


def random_actions(venv, steps, seed=0):
    """Uniform within the bounds [T, B, A], or among the choices [T, B]."""
    if venv.is_discrete:
        return torch.randint(int(venv.single_action_space.n), (steps, venv.num_envs), generator=seeded(seed))
    unit = torch.rand(steps, *venv.action_space.shape, generator=seeded(seed), dtype=venv.dtype)
    return (venv._low + unit.to(venv.device) * (venv._high - venv._low)).to(venv.dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def play(venv, actions, tasks, seed=0):
    """Observations [T + 1, B, O], rewards, terminated, truncated [T, B]."""
    obs, _ = venv.reset(seed=seed, options={"tasks": tasks})
    record = [venv.step(action)[:4] for action in actions]
    columns = [torch.stack(column) for column in zip(*record, strict=True)]
    return torch.cat([obs[None], columns[0]]), *columns[1:]


# ---------------------------------------------------------------- the contract


@every_family
def test_spaces_dtypes_and_metadata(name):
    for dtype in (torch.float32, torch.float64):
        venv = make(name, 3, dtype=dtype)
        assert venv.metadata["autoreset_mode"] == AutoresetMode.DISABLED
        assert venv.horizon == envs.HORIZONS[FAMILIES[name]]
        obs, info = venv.reset(seed=0)
        assert obs.shape == venv.observation_space.shape == (3, *venv.single_observation_space.shape)
        assert venv.tasks.shape == (3, venv.task_dim)
        assert info == {}
        action = random_actions(venv, 1)[0]
        assert venv.action_space.contains(action.numpy() if venv.is_discrete else action.float().numpy())
        obs, reward, terminated, truncated, _ = venv.step(action)
        assert obs.dtype == reward.dtype == venv.tasks.dtype == dtype
        assert terminated.dtype == truncated.dtype == torch.bool
        assert reward.shape == terminated.shape == truncated.shape == (3,)
        assert venv.observation_space.contains(obs.float().numpy())


@every_family
def test_seeds_decide_everything(name):
    venv, other = make(name, 4), make(name, 4)
    torch.manual_seed(1)
    first = venv.reset(seed=5)[0]
    torch.manual_seed(2)
    np.random.seed(3)
    assert torch.equal(first, other.reset(seed=5)[0])
    assert torch.equal(venv.tasks, other.tasks)
    assert torch.equal(venv.reset()[0], other.reset()[0])  # the second episodes, unseeded, follow from the first seed
    assert torch.equal(venv.tasks, other.tasks)
    assert not torch.equal(venv.tasks, make(name, 4).sample_tasks(4, seeded(99))) or name in {*SAME_TASKS, *ONE_TASK}
    if name in (*MUJOCO, *POLES):
        assert not torch.equal(first, venv.reset(seed=6)[0])


@every_family
def test_the_task_is_never_in_the_observation(name):
    venv = make(name, 4)
    tasks = venv.sample_tasks(8, seeded(0))
    if name == "MouseCheese":
        tasks[:, :4] = tasks[0, :4]  # the maze is seen, the cheese is not
    if name == "Harlow":
        tasks[:, :-1] = tasks[0, :-1]  # the objects are seen, the food is not
        tasks[:, -1] = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0])
    first = venv.reset(seed=1, options={"tasks": tasks[:4]})[0]
    assert torch.equal(first, venv.reset(seed=1, options={"tasks": tasks[4:]})[0])
    if name not in ("MouseCheese", "Harlow"):
        assert torch.equal(first, venv.reset(seed=1)[0])  # tasks drawn by reset do not disturb the start states


@every_family
def test_returned_tensors_are_not_reused(name):
    venv = make(name, 3, horizon=10)
    action = random_actions(venv, 1)[0]
    kept = [venv.reset(seed=0)[0]]
    for _ in range(3):
        *tensors, info = venv.step(action)
        kept += [*tensors, *info.values()]
    copies = [tensor.clone() for tensor in kept]
    venv.step(action)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(kept, copies, strict=True))
    # Nor does the environment read them again: what a caller does to them changes nothing.
    undisturbed = venv.step(action)
    venv.reset(seed=0)[0].zero_()
    for _ in range(4):
        *tensors, info = venv.step(action)
        for tensor in (*tensors, *info.values()):
            tensor.fill_(1)
    again = venv.step(action)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed[:4], again[:4], strict=True))


@every_family
def test_horizon_is_the_only_truncation(name):
    venv = make(name, 2, horizon=3)
    with pytest.raises(gym.error.ResetNeeded):
        venv.step(random_actions(venv, 1)[0])
    for _ in range(2):
        venv.reset(seed=0)
        flags = [venv.step(action)[3].tolist() for action in random_actions(venv, 3)]
        assert flags == [[False, False], [False, False], [True, True]]
        with pytest.raises(gym.error.ResetNeeded):
            venv.step(random_actions(venv, 1)[0])


@every_family
def test_an_early_end_is_latched_and_pays_nothing(name):
    venv = make(name, 24, horizon=60, dtype=torch.float64)
    obs, reward, terminated, truncated = play(venv, random_actions(venv, 60), venv.sample_tasks(24, seeded(0)))
    assert bool(terminated.any()) == (name in ENDING)
    assert not truncated[:-1].any()
    for world in range(24):
        ends = terminated[:, world].nonzero()
        if len(ends):
            end = int(ends[0])
            assert terminated[end:, world].all()
            assert reward[end, world] != 0  # the step that ends an episode is paid
            assert (reward[end + 1 :, world] == 0).all()
            assert (obs[end + 1 :, world] == obs[end + 1, world]).all()


@every_telling
def test_the_observation_tells_which_episodes_have_ended(name):
    """`ended`, a pure function, against the flags of real episodes; both say so from the end on."""
    family, venv = FAMILIES[name], make(name, 24, horizon=60, dtype=torch.float64)
    obs, _, terminated, _ = play(venv, random_actions(venv, 60), venv.sample_tasks(24, seeded(0)))
    ended = family.ended(obs)
    assert (ended.shape, ended.dtype) == ((61, 24), torch.bool)
    assert not ended[0].any()
    assert torch.equal(ended[1:], terminated)
    assert bool(ended.any()) == (name in ENDING)
    assert family.ended(obs[-1, 3]) == ended[-1, 3]
    if name not in ENDING:
        assert not family.ended(1e6 * torch.randn(1000, obs.shape[-1], generator=seeded(0))).any()


@every_determined
def test_reward_is_the_pure_function(name):
    venv = make(name, 4, horizon=19, dtype=torch.float64)
    tasks = venv.sample_tasks(4, seeded(3))
    actions = random_actions(venv, 19)
    obs, reward, terminated, _ = play(venv, actions, tasks)
    pure = FAMILIES[name].reward(obs[:-1], actions, obs[1:], tasks.expand(19, *tasks.shape))
    paid = torch.cat([torch.zeros_like(terminated[:1]), terminated[:-1]]).logical_not()
    torch.testing.assert_close(reward, pure * paid, rtol=0, atol=0)


@every_determined
def test_a_world_does_not_depend_on_its_neighbours(name):
    """World 2 of a batch is, bit for bit, the one world of a batch of one that starts in the same state."""
    venv, alone = make(name, 4, horizon=19, dtype=torch.float64), make(name, 1, horizon=19, dtype=torch.float64)
    tasks, actions = venv.sample_tasks(4, seeded(0)), random_actions(venv, 19)
    venv.reset(seed=0, options={"tasks": tasks})
    start = venv._state[2].clone() if name in MUJOCO else None
    batch = play(venv, actions, tasks)
    alone.reset(seed=0, options={"tasks": tasks[2:3]})
    if start is not None:
        alone._state[0] = start
    alone._obs = batch[0][0, 2:3]
    for step in range(19):
        obs, reward, terminated, _, _ = alone.step(actions[step, 2:3])
        assert torch.equal(obs[0], batch[0][step + 1, 2])
        assert reward[0] == batch[1][step, 2]
        assert terminated[0] == batch[2][step, 2]


@every_family
def test_single_environment_equals_the_batch(name):
    venv = make(name, 1, horizon=15)
    single = gym.make(f"{name}-v0", max_episode_steps=15)
    task, actions = venv.sample_tasks(1, seeded(0)), random_actions(venv, 15)
    obs, reward, terminated, _ = play(venv, actions, task, seed=4)
    first, info = single.reset(seed=4, options={"task": task[0].numpy()})
    np.testing.assert_array_equal(first, obs[0, 0].numpy())
    np.testing.assert_array_equal(info["task"], task[0].numpy())
    for step in range(15):
        single_obs, single_reward, single_terminated, truncated, _ = single.step(actions[step, 0].numpy())
        np.testing.assert_array_equal(single_obs, obs[step + 1, 0].numpy())
        assert single_reward == float(reward[step, 0])
        assert single_terminated == bool(terminated[step, 0])
        assert truncated == (step == 14)


@every_family
@pytest.mark.filterwarnings("ignore:.*Box observation space (minimum|maximum) value is.*infinity")
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized")
@pytest.mark.filterwarnings("ignore:.*not having a spec")
def test_gymnasium_checks_the_single_environment(name):
    check_env(gym.make(f"{name}-v0").unwrapped, skip_render_check=True)


@every_family
def test_test_tasks_are_held_out(name):
    venv = make(name, 1, dtype=torch.float64)
    train, test = (venv.sample_tasks(3000, seeded(seed), split) for seed, split in ((0, "train"), (1, "test")))
    if name in SAME_TASKS:
        assert {*train[:, 0].tolist()} == {*test[:, 0].tolist()} == {1.0, -1.0}
        assert train[:, 0].sum() == 0
        assert len(torch.cat([train, test]).unique(dim=0)) == 2
        return
    if name in ONE_TASK:
        assert torch.equal(train, torch.tensor(ONE_TASK[name], dtype=torch.float64).expand(3000, -1))
        assert torch.equal(test, train)
        return
    if name == "MouseCheese":
        train_mazes, test_mazes = ({tuple(doors) for doors in tasks[:, :4].tolist()} for tasks in (train, test))
        assert (len(train_mazes), len(test_mazes), len(train_mazes | test_mazes)) == (54, 27, 81)
        return
    if name in ("EmptyRooms", *HIDDEN_GOALS):
        train_goals, test_goals = ({tuple(goal) for goal in tasks.tolist()} for tasks in (train, test))
        numbers = HIDDEN_GOALS.get(name, (82, 21, 103))
        assert (len(train_goals), len(test_goals), len(train_goals | test_goals)) == numbers
        return
    if name in ("SparseNavigation2D", "AntDir2D", "AntGoal", "HumanoidDir"):
        turns = [torch.atan2(tasks[:, 1], tasks[:, 0]) for tasks in (train, test)]
        span = 1.0 if name == "SparseNavigation2D" else 2.0
        train_part, test_part = ((turn / (span * torch.pi)) % 1 for turn in turns)
    elif name in RANDOM and name != "Harlow":
        strips = 10 if name in ("GaussianBandit5", "TabularMDP") else 1
        train_part, test_part = (strips * tasks[:, 0] % 1 for tasks in (train, test))
    else:
        ranges = dict.fromkeys(("Navigation2D", "Navigation2DEndless"), (-0.5, 0.5)) | dict.fromkeys(ABC, (-1, 1))
        ranges |= {"HalfCheetahVel": (0, 2), "HalfCheetahVel3": (0, 3), "AntVel": (0, 3), "CartPoleLength": (0.5, 5)}
        ranges |= {"Harlow": (-1, 1)}
        low, high = ranges.get(name, (-3, 3))
        train_part, test_part = ((tasks[:, 0] - low) / (high - low) for tasks in (train, test))
    # In fiftieths of the range, no interval holds tasks of both kinds, and together they cover all of it.
    train_cells, test_cells = ({*(50 * part).floor().int().tolist()} for part in (train_part, test_part))
    assert not train_cells & test_cells
    assert train_cells | test_cells == set(range(50))
    assert len(test_cells) == 10


def test_task_distributions():
    """Means and extremes of what the papers draw from."""
    draw = {name: make(name, 1).sample_tasks(4000, seeded(0)) for name in FAMILIES}
    assert draw["AntGoal"].norm(dim=1).max() <= 3
    assert draw["AntGoal"].norm(dim=1).mean() == pytest.approx(2, abs=0.05)  # 2/3 of the radius, uniform in the disc
    assert draw["HumanoidDir"].norm(dim=1).sub(1).abs().max() < 1e-6
    assert draw["HumanoidDir"].mean(0).abs().max() < 0.05
    assert draw["SparseNavigation2D"][:, 1].min() >= 0
    assert draw["SparseNavigation2D"][:, 1].mean() == pytest.approx(2 / np.pi, abs=0.03)
    assert draw["HalfCheetahVel"].mean() == pytest.approx(1, abs=0.05)
    assert draw["HalfCheetahVel3"].mean() == pytest.approx(1.5, abs=0.075)
    assert draw["HalfCheetahVel"].max() <= 2 < 2.9 < draw["HalfCheetahVel3"].max() <= 3
    for name in ("HopperRandParams", "WalkerRandParams"):
        assert draw[name].mean(0).abs().max() < 0.15
        assert draw[name].std(0).sub(6 / 12**0.5).abs().max() < 0.1


@every_family
def test_bad_input_is_refused(name):
    venv = make(name, 2)
    good = venv.sample_tasks(2, seeded(0))
    with pytest.raises(ValueError, match="split must be"):
        venv.sample_tasks(2, seeded(0), "validation")
    with pytest.raises(ValueError, match="tasks must have shape"):
        venv.reset(options={"tasks": good[:1]})
    with pytest.raises(ValueError, match="non-finite task"):
        venv.reset(options={"tasks": good * float("nan")})
    venv.reset(seed=0)
    actions = random_actions(venv, 1)[0]
    with pytest.raises(ValueError, match="action must have shape"):
        venv.step(actions[:1])
    for bad in () if name in DISCRETE else (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="non-finite action"):
            venv.step(torch.full_like(actions, bad))
    with pytest.raises(ValueError, match="num_envs and max_episode_steps"):
        make(name, 2, horizon=0)


@every_box
def test_actions_are_clipped_to_their_bounds(name):
    venv = make(name, 3, horizon=5)
    tasks = venv.sample_tasks(3, seeded(0))
    actions = random_actions(venv, 5)
    outside = 50 * actions
    clipped = torch.minimum(torch.maximum(outside, venv._low), venv._high)
    assert all(torch.equal(a, b) for a, b in zip(play(venv, outside, tasks), play(venv, clipped, tasks), strict=True))


@every_discrete
def test_choices_that_do_not_exist_are_refused(name):
    venv = make(name, 2)
    choices = int(venv.single_action_space.n)
    venv.reset(seed=0)
    for bad in (torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool), np.zeros(2)):
        with pytest.raises(ValueError, match="action must be int64"):
            venv.step(bad)
    for bad in (-1, choices):
        with pytest.raises(ValueError, match=f"action must be 0 to {choices - 1}, .* in world 1, step 1$"):
            venv.step(torch.tensor([0, bad]))
    for bad in (torch.zeros(2, 1, dtype=torch.int64), torch.tensor(0)):
        with pytest.raises(ValueError, match="action must have shape"):
            venv.step(bad)
    assert venv._steps == 0  # a refused step is none
    venv.step(torch.tensor([0, choices - 1]))


@every_discrete
def test_discrete_actions_are_not_scaled(name):
    venv = envs.make(f"{name}-v0", 3, horizon=2, action_scale=10.0, discrete=True)
    assert type(venv.unwrapped) is type(venv) is FAMILIES[name]
    assert venv.single_action_space == FAMILIES[name](1).single_action_space
    venv.reset(seed=0)
    assert venv.step(torch.zeros(3, dtype=torch.int64))[0].shape == venv.observation_space.shape
    assert (venv.single_world().num_envs, venv.single_world().horizon) == (1, 2)
    with pytest.raises(TypeError, match="Box"):
        ScaleActions(venv, 1.0)


def test_scaled_actions_span_the_bounds():
    scaled = ScaleActions(make("HumanoidDir", 2, dtype=torch.float64), 10.0)
    plain = make("HumanoidDir", 2, dtype=torch.float64)
    assert scaled.single_action_space.high.tolist() == [10.0] * 17
    for environment in (scaled, plain):
        environment.reset(seed=0)
    action = 20 * torch.rand(2, 17, generator=seeded(0), dtype=torch.float64) - 10
    torch.testing.assert_close(scaled.step(action)[0], plain.step(action * plain._high / 10)[0], rtol=0, atol=1e-9)


class Lopsided(Navigation2D):
    """Bounds that are symmetric neither about 0 nor to each other."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        low, high = np.array([-1, 2], np.float32), np.array([3, 2.5], np.float32)
        TaskVectorEnv.__init__(self, num_envs, self.single_observation_space, Box(low, high), **kwargs)


@pytest.mark.parametrize("family", [Lopsided, Navigation2D, HumanoidDir])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_executed_actions_are_those_of_the_family(family, scale):
    scaled, plain = ScaleActions(family(3, dtype=torch.float64), scale), family(3, dtype=torch.float64)
    low, high = (bound.astype(np.float64) for bound in (plain.single_action_space.low, plain.single_action_space.high))
    # Uniform in +-2 scale: about half the numbers are out of bounds, and are clipped.
    unit = 4 * torch.rand(5, 3, len(low), generator=seeded(0), dtype=torch.float64) - 2
    executed = scaled.executed(scale * unit)
    expected = low + (unit.numpy() + 1) / 2 * (high - low)
    np.testing.assert_allclose(scaled.mapped(scale * unit), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(executed, np.clip(expected, low, high), rtol=0, atol=1e-12)
    assert 0.3 < float((executed != scaled.mapped(scale * unit)).double().mean()) < 0.7
    tasks = plain.sample_tasks(3, seeded(0))
    scaled.reset(seed=0, options={"tasks": tasks}), plain.reset(seed=0, options={"tasks": tasks})
    for action, units in zip(scale * unit, executed, strict=True):
        results = scaled.step(action)[:4], plain.step(units)[:4]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_family
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_sees_the_same_worlds(name):
    on_cpu, on_gpu = make(name, 4, horizon=15), make(name, 4, horizon=15, device="cuda")
    tasks, actions = on_cpu.sample_tasks(4, seeded(0)), random_actions(on_cpu, 15)
    assert torch.equal(on_gpu.sample_tasks(4, seeded(0)).cpu(), tasks)
    for ours, theirs in zip(play(on_cpu, actions, tasks), play(on_gpu, actions.cuda(), tasks), strict=True):
        assert theirs.is_cuda
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- navigation


@pytest.mark.parametrize("name", ["Navigation2D", "Navigation2DEndless", "SparseNavigation2D"])
def test_navigation_against_numpy(name):
    venv = make(name, 5, horizon=20, dtype=torch.float64)
    tasks = venv.sample_tasks(5, seeded(0))
    actions = 0.1 * tasks + 0.03 * torch.randn(20, 5, 2, generator=seeded(1), dtype=torch.float64)
    obs, reward, terminated, _ = play(venv, actions, tasks)
    assert not terminated.any()
    venv.reset(seed=0, options={"tasks": tasks})
    infos = [venv.step(action)[4] for action in actions]
    position, goal = np.zeros((5, 2)), tasks.numpy()
    paid = 0
    for step in range(20):
        position = position + np.clip(actions[step].numpy(), -0.1, 0.1)
        distance = np.sqrt(((position - goal) ** 2).sum(1))
        expected = np.where(distance <= 0.2, 1 - distance, 0) if name == "SparseNavigation2D" else -distance
        paid += (expected != 0).sum()
        # The bounds are float32 numbers: 0.1 is only known to 1e-9 there.
        np.testing.assert_allclose(obs[step + 1].numpy(), position, atol=1e-7)
        np.testing.assert_allclose(reward[step].numpy(), expected, atol=1e-7)
        if name == "SparseNavigation2D":
            np.testing.assert_allclose(infos[step]["dense_reward"].numpy(), -distance, atol=1e-7)
        else:
            assert infos[step] == {}
    assert paid > 0


def towards(tasks, steps, seed=1):
    """Steps of 0.05 along each coordinate that is further than that from the goal, with noise [T, B, 2]."""
    whole = (tasks.abs() / 0.05).floor()
    number = torch.arange(steps, dtype=torch.float64)[:, None, None]
    straight = torch.where(number < whole, 0.05, torch.where(number == whole, tasks.abs() - 0.05 * whole, 0.0))
    return tasks.sign() * straight + 0.003 * torch.randn(steps, *tasks.shape, generator=seeded(seed), dtype=tasks.dtype)


def test_navigation_ends_at_the_goal():
    """One world after the other, in numpy: at the first step to within 0.01 of both of the goal's coordinates."""
    venv, steps = make("Navigation2D", 200, horizon=30, dtype=torch.float64), 30
    tasks = venv.sample_tasks(200, seeded(0))
    actions = towards(tasks, steps)
    obs, reward, terminated, truncated = (x.numpy() for x in play(venv, actions, tasks))
    ends = set()
    for world, goal in enumerate(tasks.numpy()):
        position, over = np.zeros(2), False
        for step in range(steps):
            if over:
                paid = 0
            else:
                position = position + np.clip(actions[step, world].numpy(), -0.1, 0.1)
                paid = -np.sqrt(((position - goal) ** 2).sum())  # of the step that ends it, too
                over = abs(position[0] - goal[0]) < 0.01 and abs(position[1] - goal[1]) < 0.01
                ends |= {step} if over else set()
            assert terminated[step, world] == over
            np.testing.assert_allclose(obs[step + 1, world], position, atol=1e-9)
            np.testing.assert_allclose(reward[step, world], paid, atol=1e-9)
    assert 0.3 < terminated[-1].mean() < 1
    assert len(ends) > 10
    assert truncated.any(1).tolist() == [False] * 29 + [True]
    # Without the end it is the same world until there.
    endless = [
        x.numpy() for x in play(make("Navigation2DEndless", 200, horizon=30, dtype=torch.float64), actions, tasks)
    ]
    runs = np.concatenate([np.ones((1, 200), bool), ~terminated[:-1]])
    assert not endless[2].any()
    np.testing.assert_array_equal(endless[0][1:][runs], obs[1:][runs])
    np.testing.assert_array_equal(endless[1] * runs, reward)
    assert (endless[1] < 0).all()


def test_the_goal_of_navigation_is_a_square():
    """How far one step from the start ends from the goal, on either side of the square's border and of the disc's."""
    inside = [(0.0, 0.0), (0.0099, 0.0), (0.0, -0.0099), (0.008, 0.008), (-0.0099, 0.0099)]
    outside = [(0.0101, 0.0), (0.0, -0.0101), (-0.0101, 0.0099), (0.5, 0.0), (0.0, 0.05)]
    offsets = torch.tensor(inside + outside, dtype=torch.float64)
    assert [(x**2 + y**2) ** 0.5 < 0.01 for x, y in inside] == [True, True, True, False, False]
    actions = torch.tensor([[0.03, -0.02]], dtype=torch.float64).expand(10, -1)
    for name in ("Navigation2D", "Navigation2DEndless", "SparseNavigation2D"):
        venv = make(name, 10, dtype=torch.float64)
        venv.reset(seed=0, options={"tasks": actions - offsets})
        expected = [True] * 5 + [False] * 5 if name == "Navigation2D" else [False] * 10
        assert venv.step(actions)[2].tolist() == expected
        assert venv.step(actions)[2].tolist() == expected
        assert venv.can_terminate == any(expected)


# ---------------------------------------------------------------- MuJoCo against Gymnasium

ORIGINAL = {
    "HalfCheetahDir": "HalfCheetah-v5",
    "HalfCheetahVel": "HalfCheetah-v5",
    "HalfCheetahVel3": "HalfCheetah-v5",
    "AntDir": "Ant-v5",
    "AntDir2D": "Ant-v5",
    "AntVel": "Ant-v5",
    "AntGoal": "Ant-v5",
    "HumanoidDir": "Humanoid-v5",
    "HopperRandParams": "Hopper-v5",
    "WalkerRandParams": "Walker2d-v5",
    "HalfCheetahForward": "HalfCheetah-v5",
    "AntForward": "Ant-v5",
    "SwimmerForward": "Swimmer-v5",
    "HopperForward": "Hopper-v5",
    "Walker2dForward": "Walker2d-v5",
}


def expected_reward(name, before, after, dt, action, task):
    """The formulas of the docstrings, from Gymnasium's positions before and after."""
    velocity, cost = (after - before)[:2] / dt, (action**2).sum()
    match name:
        case "HalfCheetahDir":
            return task[0] * velocity[0] - 0.05 * cost
        case "HalfCheetahVel" | "HalfCheetahVel3":
            return -abs(velocity[0] - task[0]) - 0.05 * cost
        case "AntDir":
            return task[0] * velocity[0] - 0.5 * cost + 1
        case "AntDir2D":
            return velocity @ task - 0.5 * cost + 1
        case "AntVel":
            return -abs(velocity[0] - task[0]) + 1 - 0.005 * cost + 0.05
        case "AntGoal":
            return -abs(after[0] - task[0]) - abs(after[1] - task[1]) - 0.1 * cost
        case "HumanoidDir":
            return 1.25 * velocity @ task - 0.1 * cost + 5
        case "HalfCheetahForward":
            return velocity[0] - 0.1 * cost
        case "AntForward":
            return velocity[0] + 1 - 0.005 * cost
        case "SwimmerForward":
            return velocity[0] - 1e-4 * cost
        case _:
            return velocity[0] + 1 - 1e-3 * cost


def expected_obs(name, before, after, velocity_after, dt):
    velocity = (after - before)[:2] / dt
    if name == "AntGoal":
        return np.concatenate([after, velocity_after])
    if name.startswith(("Hopper", "Walker")):
        return np.concatenate([after[1:], np.clip(velocity_after, -10, 10), velocity[:1]])
    if name.startswith("HalfCheetah"):
        return np.concatenate([after[1:], velocity_after, velocity[:1]])
    return np.concatenate([after[2:], velocity_after, velocity[: 1 if name in ONE_TASK else 2]])


def original(name):
    # Without the wrappers: Gymnasium's checkers and time limit play no part.
    return gym.make(ORIGINAL[name]).unwrapped


def compare(name, single, venv, tasks, actions, atol=1e-8, warm_start=True, start=None):
    """Play one world and Gymnasium's environment side by side; returns the step in which the world ended, or None.

    `warm_start=False` makes Gymnasium's contact solver begin from nothing in every control step, as ours does.
    """
    obs, _ = venv.reset(seed=2, options={"tasks": tasks})
    nq = single.model.nq
    if start is not None:
        venv._state[0, 1:] = torch.from_numpy(start)
        obs = venv._observe(venv._state, venv._state)
    single.reset(seed=0)
    single.set_state(venv._state[0, 1 : 1 + nq].numpy(), venv._state[0, 1 + nq :].numpy())
    task = tasks[0].numpy()
    dt = single.dt
    before = single.data.qpos.copy()
    np.testing.assert_allclose(obs[0], expected_obs(name, before, before, single.data.qvel, dt), rtol=0, atol=1e-12)
    for step, action in enumerate(actions):
        before = single.data.qpos.copy()
        if not warm_start:
            single.data.qacc_warmstart[:] = 0
        single_terminated = single.step(action[0].numpy())[2]
        obs, reward, terminated, _, info = venv.step(action)
        np.testing.assert_allclose(venv._state[0, 1 : 1 + nq], single.data.qpos, rtol=0, atol=atol)
        np.testing.assert_allclose(venv._state[0, 1 + nq :], single.data.qvel, rtol=0, atol=atol)
        after = single.data.qpos.copy()
        np.testing.assert_allclose(
            obs[0], expected_obs(name, before, after, single.data.qvel, dt), rtol=0, atol=atol / dt
        )
        expected = expected_reward(name, before, after, dt, action[0].numpy(), task)
        assert float(reward[0]) == pytest.approx(expected, abs=atol / dt)
        assert not info["diverged"].any()
        if name != "AntGoal":  # which never ends
            assert bool(terminated[0]) == single_terminated
        if terminated[0]:
            return step
    return None


@pytest.fixture(autouse=True)
def _outside_the_repository(tmp_path, monkeypatch):
    """MuJoCo's deprecation warning (Gymnasium's own loading) writes MUJOCO_LOG.TXT into the working directory."""
    monkeypatch.chdir(tmp_path)


@every_mujoco
@pytest.mark.parametrize("seed", [0, 1])
def test_physics_equal_gymnasium(name, seed):
    venv = make(name, 1, horizon=20, dtype=torch.float64)
    tasks = venv.sample_tasks(1, seeded(seed))
    if name.endswith("RandParams"):
        tasks = torch.zeros(1, venv.task_dim, dtype=torch.float64)  # 1.5 ** 0 = 1: Gymnasium's own body
    actions = random_actions(venv, 20, seed)
    compare(name, original(name), venv, tasks, actions, atol=1e-10, warm_start=False)
    # Gymnasium's solver continues from its last solution. The humanoid's (projected Gauss-Seidel, 50 iterations) stops
    # short of convergence, so there the beginning shows in the seventh digit.
    compare(name, original(name), venv, tasks, actions, atol=1e-5 if name == "HumanoidDir" else 1e-8)


@pytest.mark.parametrize("name", ["HalfCheetahForward", "SwimmerForward", "HopperForward", "Walker2dForward"])
@pytest.mark.parametrize("seed", [1, 2])  # with 2 the hopper and the walker fall within 20 steps, with 1 they do not
def test_forward_rewards_are_gymnasiums_own(name, seed):
    """What Gymnasium's `step` returns; where a fall ends the episode it withholds the bonus of 1, and ours does not."""
    venv, single = make(name, 1, horizon=20, dtype=torch.float64), original(name)
    venv.reset(seed=seed)
    single.reset(seed=0)
    single.set_state(venv.qpos(venv._state)[0].numpy(), venv.qvel(venv._state)[0].numpy())
    paid = 0
    for action in random_actions(venv, 20, seed):
        _, expected, single_terminated, _, _ = single.step(action[0].numpy())
        _, reward, terminated, truncated, _ = venv.step(action)
        assert bool(terminated[0]) == single_terminated
        assert float(reward[0]) == pytest.approx(expected + float(terminated[0]), abs=1e-8)
        if terminated[0]:
            break
        paid += 1
    assert bool(terminated[0]) == (seed == 2 and name in FALLING)
    assert truncated[0] or (terminated[0] and paid >= 10)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_families_go_on_for_gymnasiums_horizon(name):
    assert make(name, 1).horizon == 200
    assert gym.spec(ORIGINAL[name]).max_episode_steps == 1000
    venv = make(name, 1, horizon=1000)
    venv.reset(seed=0)
    truncated = [bool(venv.step(torch.zeros(1, *venv.single_action_space.shape))[3][0]) for _ in range(1000)]
    assert truncated == [False] * 999 + [True]
    with pytest.raises(gym.error.ResetNeeded):
        venv.step(torch.zeros(1, *venv.single_action_space.shape))


@pytest.mark.parametrize("name", FORWARD)
def test_the_one_task_means_nothing(name):
    venv = make(name, 3, horizon=5, dtype=torch.float64)
    one, other = (play(venv, random_actions(venv, 5), torch.full((3, 1), number)) for number in (1.0, -7.0))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("name", "coordinate", "value", "speed"),
    [
        ("AntDir", 2, 0.85, 2.2),
        ("HumanoidDir", 2, 1.96, 1.0),
        ("HopperRandParams", 2, 0.19, 0.5),
        ("WalkerRandParams", 2, -0.99, -1.0),
        ("AntForward", 2, 0.85, 2.2),
        ("HopperForward", 2, 0.19, 0.5),
        ("Walker2dForward", 2, -0.99, -1.0),
    ],
)
def test_falls_end_episodes_when_gymnasiums_do(name, coordinate, value, speed):
    """Bodies started on their way across a limit of health."""
    venv, single = make(name, 1, horizon=20, dtype=torch.float64), original(name)
    tasks = torch.zeros(1, venv.task_dim, dtype=torch.float64)
    position, velocity = single.init_qpos.copy(), single.init_qvel.copy()
    position[coordinate], velocity[coordinate] = value, speed
    start = np.concatenate([position, velocity])
    assert compare(name, single, venv, tasks, random_actions(venv, 20), warm_start=False, start=start) in range(1, 19)


@every_falling
def test_early_ends_equal_gymnasium(name):
    """States put on either side of each limit of health, and on it."""
    single, body = original(name), ORIGINAL[name]
    venv = make(name, 2)
    venv.reset(seed=0)
    limits = {"Ant-v5": (0.2, 1.0), "Humanoid-v5": (1.0, 2.0), "Hopper-v5": (0.7,), "Walker2d-v5": (0.8, 2.0)}[body]
    height = 2 if body in ("Ant-v5", "Humanoid-v5") else 1
    # Gymnasium's humanoid is unhealthy at its limits, ours is not.
    sides = (-1e-3, 1e-3) if body == "Humanoid-v5" else (-1e-3, 0, 1e-3)
    cases = [(height, limit + side) for limit in limits for side in sides]
    if height == 1:
        limit, knee = 0.2 if body == "Hopper-v5" else 1.0, 4
        cases += [(2, sign * (limit + side)) for sign in (1, -1) for side in sides]
        cases += [(knee, sign * value) for sign in (1, -1) for value in (99.9, 100, 100.1)]
        cases += [(0, 101), (0, -101), (height, 101)]  # x and the hopper's height are not limited
        # Of velocities, clipped to +-10 in the observation, only HopperRandParams looks at the unclipped ones.
        speeds = (-99.0, 99.0) if name == "HopperForward" else (-101.0, -100.0, -99.0, 99.0, 100.0, 101.0)
        cases += [(len(single.init_qpos) + 3, speed) for speed in speeds]
    seen = set()
    for coordinate, value in cases:
        state = np.concatenate([single.init_qpos, single.init_qvel])
        state[coordinate] = value
        single.set_state(state[: single.model.nq], state[single.model.nq :])
        healthy = bool(single.is_healthy)
        state = torch.from_numpy(np.concatenate([[0.0], state]))[None]
        assert bool(venv._fallen(state, venv._observe(state, state))[0]) != healthy, (coordinate, value)
        seen.add(healthy)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["HopperRandParams", "WalkerRandParams", "HopperForward", "Walker2dForward"])
def test_speeds_beyond_the_clipped_observation(name):
    """A body at 150 m/s: Gymnasium's hopper is unhealthy from 100 on. The forward hopper looks at what is observed."""
    venv, single = make(name, 2, horizon=3, dtype=torch.float64), original(name)
    tasks = torch.zeros(2, venv.task_dim, dtype=torch.float64)
    action = torch.zeros(venv.action_space.shape, dtype=torch.float64)
    start = np.concatenate([single.init_qpos, single.init_qvel])
    start[single.model.nq] = 150
    single.set_state(start[: single.model.nq], start[single.model.nq :])
    venv.reset(seed=0, options={"tasks": tasks})
    venv._state[0, 1:] = torch.from_numpy(start)
    obs, _, terminated, _, info = venv.step(action)
    assert obs[0, -1] > 140  # the mean velocity is not clipped, and is no coordinate
    assert obs[0, venv.model.nq - 1 : -1].abs().max() == 10
    assert not venv.ended(obs).any()
    assert single.step(action[0].numpy())[2] == (ORIGINAL[name] == "Hopper-v5")
    assert terminated.tolist() == [name == "HopperRandParams", False]
    assert not info["diverged"].any()


@pytest.mark.parametrize("name", ["HopperRandParams", "WalkerRandParams"])
def test_random_bodies_equal_gymnasium_edited_by_hand(name):
    venv = make(name, 1, horizon=20, dtype=torch.float64)
    for seed in (0, 1):
        tasks = venv.sample_tasks(1, seeded(seed))
        single = original(name)
        model, exponent = single.model, iter(tasks[0].tolist())
        for body in range(1, model.nbody):
            model.body_mass[body] *= 1.5 ** next(exponent)
        for body in range(1, model.nbody):
            for axis in range(3):
                model.body_inertia[body, axis] *= 1.5 ** next(exponent)
        for dof in range(model.nv):
            model.dof_damping[dof] *= 1.3 ** next(exponent)
        for geom in range(model.ngeom):
            for kind in range(3):
                model.geom_friction[geom, kind] *= 1.5 ** next(exponent)
        assert next(exponent, None) is None
        mujoco.mj_setConst(model, single.data)
        actions = random_actions(venv, 20, seed)
        compare(name, single, venv, tasks, actions)
        with pytest.raises(AssertionError):  # and Gymnasium's own body moves otherwise
            compare(name, original(name), venv, tasks, actions)


def test_one_model_per_task():
    venv = make("HopperRandParams", 6)
    tasks = venv.sample_tasks(2, seeded(0)).repeat_interleave(3, 0)
    venv.reset(options={"tasks": tasks})
    models = venv._models(np.arange(6))
    assert len({id(model) for model in models}) == 2
    assert models[0] is models[2]
    assert models[3] is models[5]
    venv.reset(options={"tasks": tasks.flip(0)})
    assert venv._models(np.arange(6))[0] is models[3]  # tasks seen in the last episode are not compiled again


@every_mujoco
def test_threads_do_not_change_results(name):
    results = []
    for num_threads in (1, 2, 3):
        venv = make(name, 7, horizon=15, num_threads=num_threads)
        results.append(play(venv, random_actions(venv, 15), venv.sample_tasks(7, seeded(0))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_instances_share_one_pool():
    for number in range(3):
        venv = make("HalfCheetahDir", 4 + number, num_threads=3)
        venv.reset(seed=0)
        venv.step(torch.zeros(4 + number, 6))
    if Path("/proc/self/task").exists():
        before = len(os.listdir("/proc/self/task"))
        venvs = [make("HalfCheetahDir", 5, num_threads=3) for _ in range(5)]
        for venv in venvs:
            venv.reset(seed=0)
            venv.step(torch.zeros(5, 6))
        assert len(os.listdir("/proc/self/task")) == before


@every_mujoco
def test_start_states_have_gymnasiums_distribution(name):
    venv = make(name, 2000, dtype=torch.float64)
    venv.reset(seed=0)
    single = original(name)
    starts = []
    for seed in range(300):
        single.reset(seed=seed)
        starts.append(single.state_vector())
    starts, ours = np.array(starts), venv._state[:, 1:].numpy()
    nq = single.model.nq
    scale = starts.std(0).max()
    for part in (slice(0, nq), slice(nq, None)):
        np.testing.assert_allclose(ours[:, part].mean(0), starts[:, part].mean(0), atol=0.25 * scale)
        # Width of the middle 80 % pooled over coordinates tells uniform from normal; 300 x nq draws are plenty.
        centred = [states[:, part] - states[:, part].mean(0) for states in (ours, starts)]
        for quantile in (0.1, 0.9, 0.99):
            expected = np.quantile(centred[1], quantile)
            assert np.quantile(centred[0], quantile) == pytest.approx(expected, rel=0.08)


@every_mujoco
def test_divergence_ends_a_world_and_is_told(name):
    venv = make(name, 5, horizon=6)
    tasks, actions = venv.sample_tasks(5, seeded(0)), random_actions(venv, 6)
    healthy = play(venv, actions, tasks)
    venv.reset(seed=0, options={"tasks": tasks})
    diverged = []
    for step, action in enumerate(actions):
        if step == 2:
            venv._state[1, -venv.model.nv :] = 1e12
        obs, reward, terminated, truncated, info = venv.step(action)
        diverged.append(info["diverged"].tolist())
        assert torch.isfinite(obs).all()
        assert torch.isfinite(reward).all()
        assert bool(terminated[1]) == (step >= 2)
        assert truncated.all() == (step == 5)
        for world in (0, 2, 3, 4):  # the neighbours do not notice
            assert torch.equal(obs[world], healthy[0][step + 1, world])
        if step > 2:
            assert reward[1] == 0
    assert diverged == [[False] * 5] * 2 + [[False, True, False, False, False]] * 4
    venv.reset(seed=0, options={"tasks": tasks})
    obs, *_, info = venv.step(actions[0])
    assert not info["diverged"].any()
    assert torch.equal(obs, healthy[0][1])


def test_worlds_that_are_over_are_not_simulated():
    venv = make("HopperRandParams", 12, horizon=60)
    venv.reset(seed=0)
    actions = random_actions(venv, 60)
    for action in actions[:30]:
        over = venv.step(action)[2]
    assert 0 < over.sum() < 12
    before = venv._state.clone()
    for action in actions[30:]:
        venv.step(action)
    assert (venv._state[over] == before[over]).all()
    assert (venv._state[~over] != before[~over]).any(axis=1).all()


def test_silence(tmp_path):
    """Nothing is printed and no MUJOCO_LOG.TXT is written: when loading, at a divergence, at the end."""
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import envs, gymnasium as gym, torch
for family in envs.HORIZONS:
    venv = gym.make_vec(f"{{family.__name__}}-v0", 4, vectorization_mode="vector_entry_point").unwrapped
    venv.reset(seed=0)
    if hasattr(venv, "model"):
        venv._state[0, -venv.model.nv:] = 1e12
    info = venv.step(torch.zeros(venv.action_space.shape, dtype=torch.int64 if venv.is_discrete else None))[4]
    assert not hasattr(venv, "model") or info["diverged"][0]
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_import_has_no_side_effects_on_torch(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch; torch.manual_seed(0); state = torch.get_rng_state()
import envs
assert torch.equal(state, torch.get_rng_state()) and "metaworld" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60).returncode == 0


def test_wrong_actions_are_told_at_the_horizon_where_asking_would_wait():
    """What GPUs do: the first wrong action of an episode is the error, at its horizon or at the next reset."""
    venv, told = make("Navigation2D", 3, horizon=4), "^non-finite action in world 1, step 3, from the policy$"
    venv.checks_late = True
    good = torch.zeros(3, 2)
    wrong, later = good.clone(), good.clone()
    wrong[1, 0], later[0, 1] = torch.nan, torch.inf
    venv.reset(seed=0)
    for action in (good, good, wrong):
        venv.step(action)
    with pytest.raises(FloatingPointError, match=told):
        venv.step(later)
    venv.reset(seed=0)  # told once
    for action in (good, good, wrong, later)[:3]:
        venv.step(action)
    with pytest.raises(FloatingPointError, match=told):
        venv.reset(seed=0)
    venv.reset(seed=0)
    for _ in range(4):
        *_, truncated, _ = venv.step(good)
    assert truncated.all()
    venv.reset(seed=0)
    venv.reset(options={"reset_mask": torch.tensor([True, False, False])})  # worlds have their own clocks: at once
    with pytest.raises(FloatingPointError, match=r"^non-finite action in world 1, step 1, from the policy$"):
        venv.step(wrong)


def test_wrong_choices_are_told_at_the_horizon_where_asking_would_wait():
    venv = make("Bandit5", 3, horizon=2)
    venv.checks_late = True
    for wrong in (-1, 5):
        venv.reset(seed=0)
        venv.step(torch.tensor([4, 0, wrong]))
        with pytest.raises(ValueError, match=r"^action must be 0 to 4, which it is not in world 2, step 1$"):
            venv.step(torch.tensor([0, 4, 0]))


# ---------------------------------------------------------------- pictures

DRAWS = """
import sys; sys.path.insert(0, {root!r})
from itertools import cycle
import gymnasium as gym, numpy as np, torch, envs
from envs.render import adaptation_gif
pictured = [family for family in envs.HORIZONS if family.render_frame is not envs.TaskVectorEnv.render_frame]
assert set(envs.HORIZONS) - set(pictured) == {{f for f in envs.HORIZONS if f.__name__ in {unpictured!r}}}
for family in pictured:
    single = gym.make(f"{{family.__name__}}-v0", render_mode="rgb_array")
    single.reset(seed=0)
    first = single.render()
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3 and first.std() > 5, family
    space = single.action_space
    later = []
    for k in range(5):
        single.step(k % space.n if hasattr(space, "n") else space.high)
        later.append(single.render())
    assert not all(np.array_equal(first, x) for x in later), family
    single.close()
still, push = lambda obs: torch.zeros(1, 6), lambda obs: torch.ones(1, 6) * obs.sum().sign()
cheetahs, points = envs.make("HalfCheetahDir-v0", 2, 12), envs.make("Navigation2D-v0", 2, 7)
cheetahs.reset(), points.reset()
adaptation_gif("a.gif", cheetahs, {{"before": still, "after": push}})
adaptation_gif("b.gif", points, {{"x": lambda obs: torch.ones(1, 2)}}, every=1)
for family in (f for f in pictured if hasattr(f(1).single_action_space, "n")):
    worlds = envs.make(f"{{family.__name__}}-v0", 2, 7, discrete=True)
    worlds.reset()
    in_turn = cycle(range(worlds.action_space.nvec[0] - 1, -1, -1))  # some have no effect at first
    adaptation_gif(f"{{family.__name__}}.gif", worlds, {{"in turn": lambda obs: np.full(1, next(in_turn))}}, every=1)
"""


def egl_works(tmp_path):
    program = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).close()"
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True)
    return result.returncode == 0


def test_rendering(tmp_path):
    from PIL import Image

    if not egl_works(tmp_path):
        pytest.skip("EGL cannot be initialised here: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri")
    unset = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")  # as on a server: envs/locomotion.py then chooses EGL
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRAWS.format(root=str(ROOT), unpictured=RANDOM)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 7  # steps 0, 2, .., 12
        assert gif.size == (640, 264)
        assert gif.info["duration"] == 100
    with Image.open(tmp_path / "b.gif") as gif:
        assert gif.n_frames == 8
        assert gif.size == (240, 264)
    for name in DISCRETE:
        if name not in RANDOM:
            with Image.open(tmp_path / f"{name}.gif") as gif:
                assert gif.n_frames > 1


def test_rendering_without_opengl_gives_a_hint(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import gymnasium as gym, envs
single = gym.make("HalfCheetahDir-v0", render_mode="rgb_array")
single.reset(seed=0)
try:
    single.render()
except RuntimeError as error:
    assert "MUJOCO_GL=egl" in str(error) and "libegl1" in str(error)
else:
    raise SystemExit("rendering should have failed")
"""
    environment = {**os.environ, "MUJOCO_GL": "disable"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr + result.stdout


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is not None, reason="Meta-World is installed")
def test_metaworld_missing_gives_a_hint():
    from envs.metaworld import make_metaworld

    with pytest.raises(ImportError, match=r"requirements-metaworld\.txt"):
        make_metaworld("ML10", num_envs=2)
