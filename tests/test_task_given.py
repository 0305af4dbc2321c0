"""TaskGiven against the same families without it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector.utils import batch_space

import envs
from envs import ScaleActions, TaskGiven, Trials, adaptation_gif
from envs.locomotion import HalfCheetahVel
from envs.mouse_cheese import MouseCheese
from envs.navigation import Navigation2D

FAMILIES = {family.__name__: family for family in envs.HORIZONS}
RIGHT, DOWN = 3, 1


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_actions(venv, steps, seed=0):
    """Uniform actions [S, B] or [S, B, A]."""
    space, generator = venv.single_action_space, seeded(seed)
    if not space.shape:
        return torch.randint(int(space.n), (steps, venv.num_envs), generator=generator)
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    return low + (high - low) * torch.rand(steps, venv.num_envs, *space.shape, generator=generator)


def play(venv, actions, tasks=None, seed=0):
    """For the beginning and each step, what `reset` and `step` return."""
    rows = [venv.reset(seed=seed, options=None if tasks is None else {"tasks": tasks})]
    return rows + [venv.step(action) for action in actions]


def assert_task_appended(rows, expected, tasks):
    """Every observation is the expected one and then the task; all else is the same."""
    assert len(rows) == len(expected)
    for (obs, *rest, info), (plain, *other, other_info) in zip(rows, expected, strict=True):
        width = plain.shape[1]
        assert obs.shape == (len(tasks), width + tasks.shape[1])
        assert obs.dtype == plain.dtype
        assert torch.equal(obs[:, :width], plain)
        assert torch.equal(obs[:, width:], tasks.to(plain))
        assert len(rest) == len(other)
        assert all(torch.equal(x, y) for x, y in zip(rest, other, strict=True))
        assert info.keys() == other_info.keys()
        if "final_obs" in other_info:  # of `Trials`: an observation, too
            other_info = other_info | {"final_obs": torch.cat([other_info["final_obs"], tasks.to(plain)], 1)}
        assert all(torch.equal(torch.as_tensor(info[k]), torch.as_tensor(x)) for k, x in other_info.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_task_stands_behind_the_observation(name):
    given, plain = TaskGiven(FAMILIES[name](3, 3)), FAMILIES[name](3, 3)
    tasks, actions = plain.sample_tasks(3, seeded(0)), draw_actions(plain, 3)
    rows = play(given, actions, tasks)
    assert_task_appended(rows, play(plain, actions, tasks), tasks)
    with pytest.raises(gym.error.ResetNeeded):
        given.step(actions[0])
    others = plain.sample_tasks(3, seeded(1))  # another episode with other tasks
    assert not torch.equal(others, tasks) or name.endswith(
        ("Forward", "CartPoleFixed", "FixedABC", "Corridor", "NoisyLights")
    )  # with one task
    assert_task_appended(play(given, actions, others, 1), play(plain, actions, others, 1), others)


@pytest.mark.parametrize("name", FAMILIES)
def test_spaces(name):
    given, plain = TaskGiven(FAMILIES[name](3, 3)), FAMILIES[name](3, 3)
    space, family = given.single_observation_space, plain.single_observation_space
    obs_dim, task_dim = family.shape[0], plain.task_dim
    assert space.shape == (obs_dim + task_dim,)
    assert space.dtype == family.dtype
    assert np.array_equal(space.low, [*family.low, *[-np.inf] * task_dim])
    assert np.array_equal(space.high, [*family.high, *[np.inf] * task_dim])
    assert given.observation_space == batch_space(space, 3)
    assert given.single_action_space == plain.single_action_space
    assert given.action_space == plain.action_space
    assert given.num_envs == 3
    obs, _ = given.reset(seed=0)
    assert obs.numpy() in given.observation_space
    # The family below it, and its usual single environment, are as they were.
    assert given.unwrapped.single_observation_space == family
    assert given.unwrapped.observation_space == plain.observation_space


@pytest.mark.parametrize("family", [Navigation2D, HalfCheetahVel])
def test_through_scaled_actions(family):
    """The task is given in the family's own units, whatever the actions' are, on either side of the scaling."""
    plain = family(3, 4)
    tasks, low, high = plain.sample_tasks(3, seeded(0)), plain._low, plain._high
    actions = 10 * torch.randn(4, 3, len(low), generator=seeded(1)).clamp(-0.9, 0.9)
    by_hand = low + (actions + 10) / 20 * (high - low)
    expected = play(plain, by_hand, tasks)
    rows = play(TaskGiven(ScaleActions(family(3, 4), 10.0)), actions, tasks)
    for (obs, reward, *_), (other, other_reward, *_) in zip(rows[1:], expected[1:], strict=True):
        torch.testing.assert_close(obs, torch.cat([other, tasks], 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reward, other_reward, rtol=1e-4, atol=1e-4)
    assert_task_appended(rows, play(ScaleActions(family(3, 4), 10.0), actions, tasks), tasks)
    assert_task_appended(play(TaskGiven(family(3, 4)), by_hand, tasks), expected, tasks)


def test_what_the_wrapper_passes_on():
    given = TaskGiven(ScaleActions(HalfCheetahVel(2, 5), 10.0))
    assert float(given.single_action_space.high[0]) == 10
    assert isinstance(given.unwrapped, HalfCheetahVel)
    assert given.unwrapped.task_dim == 1
    with pytest.raises(ValueError, match="tasks must have shape"):
        given.reset(options={"tasks": torch.zeros(2, 2)})


@pytest.mark.parametrize("name", ["Navigation2D", "HalfCheetahVel"])
def test_tasks_that_reset_draws_are_given(name):
    given, plain = TaskGiven(FAMILIES[name](3, 4)), FAMILIES[name](3, 4)
    actions = draw_actions(plain, 4)
    expected = play(plain, actions)
    rows = play(given, actions)
    assert_task_appended(rows, expected, plain.tasks)
    assert len(rows[0][0][:, -plain.task_dim :].unique(dim=0)) == 3
    obs, _ = given.reset()  # an episode without a seed draws others
    assert torch.equal(obs[:, -plain.task_dim :], given.unwrapped.tasks)
    assert not torch.equal(given.unwrapped.tasks, plain.tasks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype):
    given = TaskGiven(Navigation2D(2, 3, dtype=dtype))
    tasks = torch.tensor([[0.1, 0.2], [0.3, -1 / 3]], dtype=torch.float64)
    obs, _ = given.reset(options={"tasks": tasks})
    assert obs.dtype == given.step(torch.zeros(2, 2))[0].dtype == dtype
    assert torch.equal(obs[:, 2:], tasks.to(dtype))


def test_the_task_stays_behind_an_early_end():
    near = torch.tensor([[0.0, 0, 0, 0, *place] for place in ((1, 2), (1, 3), (3, 2))])  # 1, 2, 3 steps from the start
    actions = torch.tensor([[RIGHT, RIGHT, DOWN], [RIGHT, RIGHT, DOWN], [RIGHT, RIGHT, RIGHT]])
    rows = play(TaskGiven(MouseCheese(3, 5)), actions, near)
    assert [row[2].tolist() for row in rows[1:]] == [[True, False, False], [True, True, False], [True] * 3]
    assert all(torch.equal(row[0][:, -6:], near) for row in rows)
    assert_task_appended(rows, play(MouseCheese(3, 5), actions, near), near)


def test_observations_are_not_those_of_the_step_before():
    """A batch keeps what it was given; the next step does not write into it."""
    given = TaskGiven(Navigation2D(2, 3))
    first, _ = given.reset(seed=0)
    kept = first.clone()
    given.step(torch.full((2, 2), 0.1))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("scale", [None, 10.0])
def test_single_world(scale):
    batch = HalfCheetahVel(4, 6)
    given = TaskGiven(ScaleActions(batch, scale) if scale else batch)
    one = given.single_world()
    assert isinstance(one, TaskGiven)
    assert isinstance(one.unwrapped, HalfCheetahVel)
    assert (one.num_envs, one.unwrapped.horizon) == (1, 6)
    assert one.observation_space.shape == (1, given.single_observation_space.shape[0])
    assert one.single_action_space == given.single_action_space
    task = torch.tensor([[1.25]])
    obs, _ = one.reset(seed=0, options={"tasks": task})
    assert torch.equal(obs[:, -1:], task)
    alone = ScaleActions(HalfCheetahVel(1, 6), scale) if scale else HalfCheetahVel(1, 6)
    actions = draw_actions(given, 3)[:, :1]
    assert_task_appended(play(one, actions, task), play(alone, actions, task), task)


def test_a_gif_of_a_policy_that_is_given_the_task(tmp_path):
    given, seen = TaskGiven(ScaleActions(Navigation2D(4, 3), 1.0)), []
    given.reset(seed=0)

    def act(obs):
        seen.append(obs)
        return torch.zeros(1, 2)

    adaptation_gif(tmp_path / "a.gif", given, {"oracle": act})
    assert (tmp_path / "a.gif").stat().st_size > 0
    assert all(torch.equal(obs, torch.cat([torch.zeros(1, 2), given.unwrapped.tasks[:1]], 1)) for obs in seen)
    assert len(seen) == 3


def test_trials_of_a_given_task():
    """Around it as around the family: second episodes, too, begin with the task in sight."""
    trials, plain = Trials(TaskGiven(HalfCheetahVel(3, 2)), 2), Trials(HalfCheetahVel(3, 2), 2)
    tasks, actions = plain.unwrapped.sample_tasks(3, seeded(0)), draw_actions(plain, 4)
    assert_task_appended(play(trials, actions, tasks), play(plain, actions, tasks), tasks)
    assert trials.is_over
    one = trials.single_world()
    assert one.reset(options={"tasks": tasks[:1]})[0].shape == (1, trials.single_observation_space.shape[0])


@pytest.mark.parametrize("name", ["Navigation2D", "HalfCheetahVel"])
def test_the_usual_single_environment_hides_the_task(name):
    single, family = gym.make(f"{name}-v0"), FAMILIES[name](1)
    TaskGiven(single.unwrapped.batch)
    obs, info = single.reset(seed=0)
    assert obs.shape == family.single_observation_space.shape == single.observation_space.shape
    assert len(info["task"]) == family.task_dim
    assert obs in single.observation_space
