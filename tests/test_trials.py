"""Trials against the same families played by hand, one episode after the other."""

from itertools import pairwise

import gymnasium as gym
import pytest
import torch

import envs
from envs import Trials
from envs.mouse_cheese import MouseCheese
from envs.navigation import Navigation2D

FAMILIES = {family.__name__: family for family in envs.HORIZONS}
MOVING = ("locomotion", "random_params", "forward", "cartpole")  # start states are drawn
PHYSICS = [name for name, family in FAMILIES.items() if family.__module__.endswith(MOVING)]
UP, DOWN, RIGHT = 0, 1, 3


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_actions(venv, steps, seed=0):
    """Uniform actions [S, B] or [S, B, A]."""
    space, generator = venv.single_action_space, seeded(seed)
    if not space.shape:
        return torch.randint(int(space.n), (steps, venv.num_envs), generator=generator)
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    return low + (high - low) * torch.rand(steps, venv.num_envs, *space.shape, generator=generator)


def play(trials, actions, tasks=None, seed=0):
    """A trial: for its beginning and each of its steps what is known then; actions left over stay unused."""
    obs, _ = trials.reset(seed=seed, options={"tasks": tasks})
    rows = [{"obs": obs}]
    for action in actions:
        obs, reward, terminated, truncated, info = trials.step(action)
        row = {"obs": obs, "reward": reward, "done": info["done"], "waits": info["waits"], "episode": info["episode"]}
        rows.append({**row, "terminated": terminated, "truncated": truncated, "tasks": trials.unwrapped.tasks})
        if trials.is_over:
            break
    return rows


def play_by_hand(venv, actions, tasks, episodes, seed=0):
    """The same rows from the family alone."""
    rows, actions, nobody = [{}], iter(actions), [False] * venv.num_envs
    for episode in range(episodes):
        rows[-1]["obs"], _ = venv.reset(seed=None if episode else seed, options={"tasks": tasks})
        over = nobody
        for step in range(venv.horizon):
            obs, reward, terminated, _, _ = venv.step(next(actions))
            over, before = [bool(x) or step == venv.horizon - 1 for x in terminated], over
            done = [now and not then for now, then in zip(over, before, strict=True)]
            rows.append({"obs": obs, "reward": reward, "done": done, "waits": over, "episode": episode, "tasks": tasks})
            if all(over):
                break
        rows[-1]["waits"] = nobody
    for row in rows[1:]:
        row |= {"terminated": nobody, "truncated": [row is rows[-1]] * venv.num_envs}
    return rows


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


def differ(rows, others):
    return len(rows) != len(others) or any(not torch.equal(a["obs"], b["obs"]) or not torch.equal(
        a.get("reward", a["obs"]), b.get("reward", b["obs"])) for a, b in zip(rows, others, strict=True))  # fmt: skip


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trial_is_its_episodes_played_by_hand(name):
    trials, venv = Trials(FAMILIES[name](3, 3), 2), FAMILIES[name](3, 3)
    tasks, actions = venv.sample_tasks(3, seeded(0)), draw_actions(venv, 6)
    rows = play(trials, actions, tasks)
    assert_same(rows, play_by_hand(venv, actions, tasks, 2))
    assert trials.is_over
    assert [bool(row["truncated"].all()) for row in rows[1:]] == [False] * 5 + [True]
    assert_same(play(trials, actions, tasks), rows)  # equal seeds, equal trials, whatever was played before
    if name in PHYSICS:
        assert differ(play(trials, actions, tasks, seed=1), rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_second_episodes_start_afresh(name):
    """In new states where the family draws them, in the one start state where it does not."""
    trials = Trials(FAMILIES[name](2, 2), 3)
    rows = play(trials, draw_actions(trials, 6), FAMILIES[name](1).sample_tasks(1, seeded(0)).expand(2, -1))
    starts = torch.stack([rows[step]["obs"] for step in (0, 2, 4)])
    if name in PHYSICS:
        assert len(starts.flatten(0, 1).unique(dim=0)) == 6
        assert starts[..., :3].std() < 1  # near the pose at rest, not where the episode before ended
    elif name == "NoisyLights":  # one of five lights
        assert len(starts.flatten(0, 1).unique(dim=0)) > 1
    else:
        assert torch.equal(starts, starts[:1].expand_as(starts))


@pytest.mark.parametrize("name", ["Bandit5", "HalfCheetahVel", "TabularMDP"])
def test_chance_is_fresh_in_every_episode(name):
    trials = Trials(FAMILIES[name](50, 3), 3)
    actions = draw_actions(trials, 3).repeat(3, *[1] * (1 + len(trials.single_action_space.shape)))
    rewards = torch.stack([row["reward"] for row in play(trials, actions)[1:]]).unflatten(0, (3, 3))
    assert not torch.equal(rewards[0], rewards[1])
    assert not torch.equal(rewards[1], rewards[2])


@pytest.mark.parametrize("name", ["Bandit5", "SparseNavigation2D", "MouseCheese", "HalfCheetahVel"])
def test_drawn_tasks_stay_for_the_trial_and_change_between_trials(name):
    trials = Trials(FAMILIES[name](20, 2), 3)
    actions = draw_actions(trials, 6)
    rows, others = play(trials, actions), play(trials, actions, seed=None)
    assert all(torch.equal(row["tasks"], rows[-1]["tasks"]) for row in rows[1:])
    assert not torch.equal(others[-1]["tasks"], rows[-1]["tasks"])
    assert_same(play(trials, actions), rows)


# ---------------------------------------------------------------- early ends

NEAR = torch.tensor([[0.0, 0, 0, 0, *place] for place in ((1, 2), (1, 3), (3, 2))])  # 1, 2 and 3 steps from the start


def mouse(rows):
    """The mouse's cells [S + 1, B] as 10 * row + column."""
    cells = torch.stack([row["obs"] for row in rows])[..., 81:].argmax(-1)
    return (10 * (cells // 9) + cells % 9).tolist()


def test_worlds_wait_for_the_last_one():
    trials = Trials(MouseCheese(3, 5), 3)
    first = [[RIGHT, RIGHT, DOWN], [UP, RIGHT, DOWN], [DOWN, DOWN, RIGHT]]  # all over in 3 steps of 5
    second = [[RIGHT, UP, DOWN], [RIGHT, RIGHT, UP], *[[DOWN, UP, UP]] * 3]  # the third never gets there
    third = [[RIGHT, RIGHT, DOWN], [DOWN, RIGHT, DOWN], [RIGHT, DOWN, RIGHT]]
    rows = play(trials, torch.tensor(first + second + third + third), NEAR)
    assert mouse(rows) == [
        *([11, 11, 11], [12, 12, 21], [12, 13, 31]),
        *([11, 11, 11], [12, 11, 21], [12, 12, 11], [12, 12, 11], [12, 12, 11]),
        *([11, 11, 11], [12, 12, 21], [12, 13, 31], [12, 13, 32]),
    ]
    columns = {name: torch.stack([torch.as_tensor(row[name]) for row in rows[1:]]) for name in rows[-1]}
    step, none = -0.01, 0.0
    rewards = [[1, step, step], [none, 1, step], [none, none, 1]]
    expected = [*rewards, [1, step, step], *[[none, step, step]] * 4, *rewards]
    assert torch.equal(columns["reward"], torch.tensor(expected))
    one, two, three, ends = [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]
    assert columns["done"].int().tolist() == [one, two, three, one, *[[0, 0, 0]] * 3, ends, one, two, three]
    waits = [one, [1, 1, 0], [0, 0, 0]]
    assert columns["waits"].int().tolist() == [*waits, *[one] * 4, [0, 0, 0], *waits]
    assert columns["episode"].tolist() == [0] * 3 + [1] * 5 + [2] * 3
    assert columns["truncated"].any(1).tolist() == [False] * 10 + [True]
    assert not columns["terminated"].any()
    with pytest.raises(gym.error.ResetNeeded):  # the family itself has steps left
        trials.step(torch.tensor([UP, UP, UP]))


@pytest.mark.parametrize(("worlds", "horizon"), [(40, 12), (3, 60), (1, 30)])
def test_random_walks_are_those_by_hand(worlds, horizon):
    trials, venv = Trials(MouseCheese(worlds, horizon), 4), MouseCheese(worlds, horizon)
    tasks, actions = NEAR.repeat(14, 1)[:worlds], draw_actions(venv, 4 * horizon)
    rows = play(trials, actions, tasks)
    assert_same(rows, play_by_hand(venv, actions, tasks, 4))
    assert (len(rows) - 1 < 4 * horizon) == (worlds < 40)
    for world in range(worlds):
        ends = [row["episode"] for row in rows[1:] if row["done"][world]]
        assert ends == [0, 1, 2, 3]
    waiting = [(now, then) for now, then in pairwise(rows) if "waits" in now and now["waits"].any()]
    assert len(waiting) > 0 or worlds == 1
    for now, then in waiting:
        waits = now["waits"]
        assert not then["reward"][waits].any()
        assert not then["done"][waits].any()
        if then["episode"] == now["episode"] and then["waits"].any():
            assert torch.equal(then["obs"][waits], now["obs"][waits])


def test_actions_of_waiting_worlds_have_no_effect():
    trials = Trials(MouseCheese(30, 10), 3)
    tasks, actions = NEAR.repeat(10, 1), draw_actions(trials, 30)
    rows = play(trials, actions, tasks)
    waits = torch.stack([row["waits"] for row in rows[1:-1]])
    changed = actions.clone()
    changed[1 : len(rows) - 1][waits] = (changed[1 : len(rows) - 1][waits] + 1) % 4
    assert waits.float().mean() > 0.2
    assert_same(play(trials, changed, tasks), rows)


def test_a_trial_can_be_broken_off():
    """Nothing of it is left in the next one."""
    trials = Trials(MouseCheese(3, 5), 3)
    actions = draw_actions(trials, 15)
    actions[0] = RIGHT  # at the cheese at once, in a world that waits when the other trial is broken off
    fresh = play(trials, actions, NEAR)
    play(trials, torch.full((7, 3), RIGHT), NEAR)
    assert not trials.is_over
    assert_same(play(trials, actions, NEAR), fresh)


# ---------------------------------------------------------------- the wrapper


@pytest.mark.parametrize("episodes", [0, -1])
def test_a_trial_without_episodes_is_refused(episodes):
    with pytest.raises(ValueError, match=f"at least 1 episode, got {episodes}"):
        Trials(Navigation2D(2, 3), episodes)


def test_reset_is_needed_before_the_first_step_and_after_a_trial():
    trials = Trials(Navigation2D(2, 3), 2)
    action = torch.zeros(2, 2)
    assert trials.is_over
    with pytest.raises(gym.error.ResetNeeded):
        trials.step(action)
    for _ in range(2):
        trials.reset()
        for _ in range(6):
            assert not trials.is_over
            trials.step(action)
        assert trials.is_over
        with pytest.raises(gym.error.ResetNeeded):
            trials.step(action)


def test_a_trial_of_one_episode_is_an_episode():
    trials, venv = Trials(Navigation2D(2, 3), 1), Navigation2D(2, 3)
    tasks, actions = venv.sample_tasks(2, seeded(0)), draw_actions(venv, 4)
    rows = play(trials, actions, tasks)
    assert len(rows) == 4
    assert_same(rows, play_by_hand(venv, actions, tasks, 1))


def test_scaled_actions_reach_the_family():
    trials = Trials(envs.make("Navigation2D-v0", 4, 3, action_scale=2.0), 2)
    assert trials.single_action_space.high.tolist() == [2, 2]
    assert trials.action_space.shape == (4, 2)
    actions = draw_actions(trials, 6)
    rows = play(trials, actions)
    for start in (0, 3):
        assert not rows[start]["obs"].any()
        torch.testing.assert_close(rows[start + 2]["obs"], 0.05 * actions[start : start + 2].sum(0))


def test_choices_reach_the_family_as_algorithms_make_it():
    trials, venv = Trials(envs.make("MouseCheese-v0", 3, 5, discrete=True), 2), MouseCheese(3, 5)
    actions = draw_actions(trials, 10)
    assert_same(play(trials, actions, NEAR), play_by_hand(venv, actions, NEAR, 2))


def test_the_single_world_is_of_the_same_kind():
    trials = Trials(envs.make("Navigation2D-v0", 4, 3, action_scale=2.0), 2)
    trials.reset()
    single = trials.single_world()
    assert (type(single), single.num_envs, single.episodes, single.unwrapped.horizon) == (Trials, 1, 2, 3)
    assert single.is_over
    assert not trials.is_over
    rows = play(single, torch.ones(9, 1, 2))
    assert len(rows) == 7
    torch.testing.assert_close(rows[2]["obs"], torch.tensor([[0.1, 0.1]]))
    assert Trials(MouseCheese(4, 5), 2).single_world().num_envs == 1
