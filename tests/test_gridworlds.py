"""Cart-poles against Gymnasium's own, grid worlds against slow ones made from coordinates, as the docstrings say."""

import math
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

import envs

FAMILIES = {family.__name__: family for family in envs.HORIZONS}
POLES = ["CartPoleLength", "CartPoleFixed"]
ABC = ["RandomABC", "RandomABCReversed", "RandomABCDiagonal", "SymABC", "SymABCReversed", "SymABCDiagonal"]
ABC += ["FixedABC", "NonstationaryABC", "KeyBox"]
GRIDS = ["EmptyRooms", *ABC]
each_grid = pytest.mark.parametrize("name", GRIDS)
each_abc = pytest.mark.parametrize("name", ABC)
each_pole = pytest.mark.parametrize("name", POLES)
each_split = pytest.mark.parametrize("split", ["train", "test"])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def choices(venv, steps, seed=0):
    """Uniform actions [T, B]."""
    return torch.randint(int(venv.single_action_space.n), (steps, venv.num_envs), generator=seeded(seed))


def play(venv, actions, tasks, seed=0):
    """Observations [T + 1, B, O], rewards, terminated [T, B]."""
    obs, _ = venv.reset(seed=seed, options={"tasks": tasks})
    record = [venv.step(action)[:3] for action in actions]
    columns = [torch.stack(column) for column in zip(*record, strict=True)]
    return torch.cat([obs[None], columns[0]]), *columns[1:]


def assert_uniform(points, low, high):
    points = ((points.double() - low) / (high - low)).sort().values
    assert points[0] >= -1e-6
    assert points[-1] <= 1 + 1e-6
    gap = (points - torch.linspace(0, 1, len(points), dtype=torch.float64)).abs().max()
    assert gap * len(points) ** 0.5 < 1.95  # Kolmogorov-Smirnov, p = 0.001


def assert_even(points, low, high):
    """As `assert_uniform`, for the coordinate in whose tenths strips are held out."""
    tenths = ((points.double() - low) / (high - low) * 10).floor().long()
    assert (tenths.bincount(minlength=10) / len(points) - 0.1).abs().max() < 0.02
    assert tenths.max() == 9


# ---------------------------------------------------------------- cart-poles


def gymnasiums(length):
    pole = CartPoleEnv()
    pole.length, pole.polemass_length = length, pole.masspole * length
    pole.reset(seed=0)
    return pole


def test_poles_fall_as_gymnasiums():
    """Whole episodes in float64, of several lengths, pushed at random, balanced, drifting away and to one side."""
    lengths = [0.5, 0.73, 1.9, 3.3, 5.0]
    habits = 6  # of each length as many worlds, each pushed in its own way
    tasks = torch.tensor(lengths, dtype=torch.float64).repeat_interleave(habits)[:, None]
    venv = FAMILIES["CartPoleLength"](len(tasks), dtype=torch.float64)
    singles = [gymnasiums(float(task)) for task in tasks]
    obs, _ = venv.reset(seed=3, options={"tasks": tasks})
    for single, start in zip(singles, obs, strict=True):
        single.state = start.numpy().copy()
    over, ends, steps = [False] * len(tasks), set(), torch.zeros(len(tasks))
    pushes = choices(venv, 200, seed=1)
    for step in range(200):
        lean = obs[:, 2] + 0.3 * obs[:, 3]
        balanced = torch.stack([lean > 0, lean > 0.05, lean > -0.05, lean + 0.02 * obs[:, 0] + 0.04 * obs[:, 1] > 0], 1)
        habit = torch.arange(len(tasks)) % habits
        action = torch.where(habit < 4, balanced.gather(1, habit.clamp(max=3)[:, None])[:, 0], pushes[step] > 0).long()
        action = torch.where(habit == 4, 1, action)
        obs, reward, terminated, truncated, _ = venv.step(action)
        assert truncated.all() == truncated.any() == (step == 199)
        for world, single in enumerate(singles):
            if over[world]:
                assert reward[world] == 0
                assert terminated[world]
                continue
            *_, paid, fell, _, _ = single.step(int(action[world]))
            np.testing.assert_allclose(obs[world].numpy(), single.state, rtol=0, atol=1e-12)
            assert (bool(terminated[world]), float(reward[world])) == (fell, paid) == (fell, 1)
            steps[world], over[world] = step + 1, fell
            if fell:
                ends.add("right" if single.state[0] > 2.4 else "left" if single.state[0] < -2.4 else "fallen")
    assert ends == {"left", "right", "fallen"}
    by_length = steps.unflatten(0, (len(lengths), habits))
    assert (by_length == 200).any(1).all()
    assert (by_length[:, 4] == by_length[:, 4].sort().values).all()  # long poles fall slowly
    assert by_length[0, 4] < 11 < 20 < by_length[-1, 4]


@each_pole
def test_steps_in_single_precision_are_gymnasiums(name):
    venv = FAMILIES[name](50, 60)
    tasks = venv.sample_tasks(50, seeded(0))
    singles = [gymnasiums(float(task)) for task in tasks]
    obs, _, terminated = play(venv, (actions := choices(venv, 60)), tasks)
    assert obs.dtype == torch.float32
    assert terminated[-1].float().mean() > 0.2
    for step, world in (~terminated).nonzero().tolist():
        singles[world].state = obs[step, world].double().numpy()
        singles[world].step(int(actions[step, world]))
        np.testing.assert_allclose(obs[step + 1, world].numpy(), singles[world].state, rtol=1e-6, atol=1e-6)


def test_the_fixed_pole_is_gymnasiums_as_it_comes():
    venv, single = FAMILIES["CartPoleFixed"](1, dtype=torch.float64), gym.make("CartPole-v1").unwrapped
    obs, _ = venv.reset(seed=0)
    single.reset(seed=0)
    single.state, fell = obs[0].numpy().copy(), False
    for action in choices(venv, 200):
        obs, _, terminated, *_ = venv.step(action)
        _, _, fell, _, _ = single.step(int(action))
        np.testing.assert_allclose(obs[0].numpy(), single.state, rtol=0, atol=1e-12)
        assert bool(terminated) == fell
        if fell:
            break
    assert fell


@each_pole
def test_poles_start_near_rest(name):
    obs, _ = FAMILIES[name](4000).reset(seed=0)
    for coordinate in obs.T:
        assert_uniform(coordinate, -0.05, 0.05)
    assert (obs.T.corrcoef() - torch.eye(4)).abs().max() < 0.07


@pytest.mark.parametrize(
    ("obs", "ends"),
    [((2.4, 0, 0, 0), False), ((2.41, 0, 0, 0), True), ((-2.39, 0, 0, 0), False), ((-2.41, 0, 0, 0), True)]
    + [((0, 9, sign * angle, 9), angle > 12) for sign in (1, -1) for angle in (11.9, 12.1)],
)
def test_limits_of_a_pole(obs, ends):
    state = torch.tensor(obs, dtype=torch.float64)
    if abs(obs[2]) > 1:
        state[2] *= math.pi / 180
    assert FAMILIES["CartPoleLength"].ended(state) == ends


@each_split
def test_lengths_are_uniform(split):
    tasks = FAMILIES["CartPoleLength"](1).sample_tasks(5000, seeded(0), split)
    assert tasks.shape == (5000, 1)
    assert_even(tasks[:, 0], 0.5, 5)
    assert torch.equal(FAMILIES["CartPoleFixed"](1).sample_tasks(4, seeded(0), split), torch.full((4, 1), 0.5))


def test_the_picture_shows_cart_and_pole():
    venv = FAMILIES["CartPoleLength"](3, dtype=torch.float64)
    venv.reset(options={"tasks": torch.tensor([[0.5], [0.5], [0.9]], dtype=torch.float64)})
    venv._obs[1:] = torch.tensor([[1.2, 0, -0.2, 0], [-0.5, 0, 0.15, 0]])
    for world, (position, angle, length) in enumerate([(0, 0, 0.5), (1.2, -0.2, 0.5), (-0.5, 0.15, 0.9)]):
        frame = venv.render_frame(world)
        assert (frame.shape, frame.dtype) == ((240, 480, 3), np.uint8)
        cart, pole = (np.argwhere((frame == colour).all(-1)) for colour in ((30, 30, 30), (200, 150, 100)))
        np.testing.assert_allclose(cart.mean(0), [200, 240 + 100 * position], atol=6)
        tip = pole[pole[:, 0].argmin()]
        np.testing.assert_allclose(tip, [200 - 200 * length * math.cos(angle), 240 + 100 * position
                                         + 200 * length * math.sin(angle)], atol=7)  # fmt: skip


# ---------------------------------------------------------------- grid worlds by hand

WAYS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
ACTIONS = {name: ["up", "down", "left", "right"] for name in GRIDS}
for body in ("RandomABC", "SymABC"):
    ACTIONS[f"{body}Reversed"] = ["down", "up", "right", "left"]
    ACTIONS[f"{body}Diagonal"] = ["up", "down", "left", "right", "up left", "up right", "down left", "down right"]
START, KEY, OBJECTS = (2, 2), (0, 0), [(0, 4), (4, 0), (4, 4)]  # of both maps; the key's and the objects' of the small


def free_places(name):
    if name != "EmptyRooms":
        return {(row, column) for row in range(5) for column in range(5)}
    rooms = {(row, column) for row in range(11) for column in range(11) if row != 5 and column != 5}
    return rooms | {(2, 5), (8, 5), (5, 2), (5, 8)}


def side(name):
    return 11 if name == "EmptyRooms" else 5


def moved(name, place, action):
    steps = [WAYS[way] for way in ACTIONS[name][action].split()]
    there = (place[0] + sum(step[0] for step in steps), place[1] + sum(step[1] for step in steps))
    return there if there in free_places(name) else place


def walk_by_hand(name, task, actions):
    """For the start and each step the observation, the reward, and whether the episode is over."""
    worth = {tuple(map(int, task)): 1.0} if name == "EmptyRooms" else dict(zip(OBJECTS, task, strict=True))
    place, has_key, over = START, name != "KeyBox", False
    rows = []
    for action in [None, *actions]:
        paid = 0.0
        if action is not None and not over:
            place = moved(name, place, action)
            if place == KEY and not has_key:
                has_key, paid = True, -0.1
            elif place in worth and has_key:
                over, paid = True, worth[place]
        seen = [1.0 if (row, column) == place else 0.0 for row in range(side(name)) for column in range(side(name))]
        rows.append(([*seen, float(has_key)] if name == "KeyBox" else seen, paid, over))
    return rows


@each_grid
def test_random_walks_are_those_by_hand(name):
    horizon, worlds = (100, 60) if name in ("EmptyRooms", "KeyBox") else (40, 80)
    venv = FAMILIES[name](worlds, horizon, dtype=torch.float64)
    assert venv.single_action_space.n == len(ACTIONS[name])
    tasks, actions = venv.sample_tasks(worlds, seeded(0)), choices(venv, horizon)
    obs, reward, terminated = play(venv, actions, tasks)
    for world in range(worlds):
        rows = walk_by_hand(name, tasks[world].tolist(), actions[:, world].tolist())
        assert obs[:, world].tolist() == [row[0] for row in rows]
        assert reward[:, world].tolist() == [row[1] for row in rows[1:]]
        assert terminated[:, world].tolist() == [row[2] for row in rows[1:]]
    cells = obs[..., : side(name) ** 2].argmax(-1)
    assert ((cells[1:] == cells[:-1]) & ~terminated).sum() > 100  # bumps
    assert terminated[-1].sum() > 5
    if name == "KeyBox":
        boxes = sum(obs[..., 5 * row + column] for row, column in OBJECTS)
        assert (boxes * (1 - obs[..., 25])).sum() > 50  # visits without the key
        assert (reward == -0.1).sum() > 20
    if name != "EmptyRooms":
        assert set(reward.unique().tolist()) > {0.0}
        for row, column in OBJECTS:
            assert (obs[-1, :, 5 * row + column] * terminated[-1]).any()


@each_grid
def test_in_single_precision_the_same(name):
    venv, other = FAMILIES[name](30, 50), FAMILIES[name](30, 50, dtype=torch.float64)
    tasks, actions = venv.sample_tasks(30, seeded(0)), choices(venv, 50)
    for a, b in zip(play(venv, actions, tasks), play(other, actions, tasks.double()), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-7)


@each_grid
def test_the_task_is_not_seen_before_an_episode_ends(name):
    venv = FAMILIES[name](400, 40)
    tasks = torch.cat([venv.sample_tasks(200, seeded(0)), venv.sample_tasks(200, seeded(1))])
    obs, _, terminated = play(venv, choices(venv, 40)[:, :200].repeat(1, 2), tasks)
    before = torch.cat([torch.zeros(1, 400, dtype=torch.bool), terminated])
    both = ~(before[:, :200] | before[:, 200:])
    assert torch.equal(obs[:, :200][both], obs[:, 200:][both])
    assert both.float().mean() > 0.2
    assert terminated.any()
    if name != "EmptyRooms":  # where only the rewards tell
        assert torch.equal(obs[:, :200], obs[:, 200:])


@each_grid
def test_thousands_of_worlds_are_as_one(name):
    assert_batch_as_singles(FAMILIES[name], 4096, 30)


@each_pole
def test_thousands_of_poles_are_as_one(name):
    assert_batch_as_singles(FAMILIES[name], 4096, 30)


def assert_batch_as_singles(family, worlds, steps):
    venv, alone = family(worlds, steps), family(1, steps)
    tasks, actions = venv.sample_tasks(worlds, seeded(0)), choices(venv, steps)
    obs, reward, terminated = play(venv, actions, tasks)
    for world in (0, 777, worlds - 1):
        alone.reset(options={"tasks": tasks[world, None]})
        alone._obs = obs[0, world, None]
        for step in range(steps):
            seen, paid, over, *_ = alone.step(actions[step, world, None])
            torch.testing.assert_close(seen[0], obs[step + 1, world], rtol=1e-5, atol=1e-6)
            assert (paid[0], over[0]) == (reward[step, world], terminated[step, world])


# ---------------------------------------------------------------- ways to goals


def shortest_ways(name):
    """Place -> actions of a shortest way there from the start."""
    found, queue = {START: []}, deque([START])
    while queue:
        place = queue.popleft()
        for action in range(len(ACTIONS[name])):
            there = moved(name, place, action)
            if there not in found:
                found[there] = [*found[place], action]
                queue.append(there)
    return found


def test_every_goal_can_be_reached():
    """All 103 of them, each on the shortest way, in time for the next episode."""
    ways = shortest_ways("EmptyRooms")
    goals = sorted(free_places("EmptyRooms") - {START})
    assert len(goals) == 103
    assert max(len(ways[goal]) for goal in goals) <= envs.HORIZONS[FAMILIES["EmptyRooms"]] / 4
    venv = FAMILIES["EmptyRooms"](103, dtype=torch.float64)
    venv.reset(options={"tasks": torch.tensor(goals, dtype=torch.float64)})
    for step in range(max(len(ways[goal]) for goal in goals)):
        action = torch.tensor([ways[goal][step] if step < len(ways[goal]) else 0 for goal in goals])
        _, reward, terminated, *_ = venv.step(action)
        assert reward.tolist() == [float(len(ways[goal]) == step + 1) for goal in goals]
        assert terminated.tolist() == [len(ways[goal]) <= step + 1 for goal in goals]
    assert terminated.all()


@each_abc
def test_every_object_can_be_reached(name):
    """In half of the horizon; the key, first, too."""
    ways, horizon = shortest_ways(name), envs.HORIZONS[FAMILIES[name]]
    venv = FAMILIES[name](3, dtype=torch.float64)
    tasks = venv.sample_tasks(3, seeded(0))
    venv.reset(options={"tasks": tasks})
    routes = [ways[place] for place in OBJECTS]
    if name == "KeyBox":
        to_key = ways[KEY]
        back = [{0: 1, 1: 0, 2: 3, 3: 2}[action] for action in reversed(to_key)]
        routes = [to_key + back + route for route in routes]
    assert len({len(route) for route in routes}) == 1
    assert len(routes[0]) == (2 if name.endswith("Diagonal") else 12 if name == "KeyBox" else 4) <= horizon / 2
    total = 0
    for action in torch.tensor(routes).T:
        assert not venv._over.any()
        _, reward, terminated, *_ = venv.step(action)
        total = total + reward
    assert terminated.all()
    torch.testing.assert_close(total, tasks.diagonal() - (0.1 if name == "KeyBox" else 0), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- tasks


def test_goals_are_uniform_and_split():
    allowed = {}
    for seed, split in enumerate(("train", "test")):
        tasks = FAMILIES["EmptyRooms"](1).sample_tasks(20000, seeded(seed), split)
        goals, counts = np.unique(tasks.numpy(), axis=0, return_counts=True)
        allowed[split] = {tuple(goal) for goal in goals.astype(int).tolist()}
        expected = 20000 / len(counts)
        statistic = ((counts - expected) ** 2 / expected).sum()  # chi-squared: mean n - 1, variance 2 (n - 1)
        assert abs(statistic - (len(counts) - 1)) < 4 * (2 * len(counts)) ** 0.5
    assert not allowed["train"] & allowed["test"]
    assert allowed["train"] | allowed["test"] == free_places("EmptyRooms") - {START}
    assert (len(allowed["train"]), len(allowed["test"])) == (82, 21)
    for goals in allowed.values():  # all rooms in both
        assert {(row > 5, column > 5) for row, column in goals if row != 5 and column != 5} == {
            (low, right) for low in (False, True) for right in (False, True)
        }


@each_split
@each_abc
def test_worths_have_their_ranges(name, split):
    tasks = FAMILIES[name](1).sample_tasks(4000, seeded(0), split)
    assert tasks.shape == (4000, 3)
    if name == "FixedABC":
        assert torch.equal(tasks, torch.tensor([1, -0.5, 0.5]).expand(4000, -1))
        return
    if name == "NonstationaryABC":
        assert tasks.unique(dim=0).tolist() == [[-1, -0.5, 1], [1, -0.5, -1]]
        assert tasks[:, 0].sum() == 0
        return
    ranges = ((-1, 1), (-1, 1), (-1, 1)) if name.startswith("Sym") else ((-1, 1), (-0.5, 0), (0, 0.5))
    assert_even(tasks[:, 0], *ranges[0])
    assert_uniform(tasks[:, 1], *ranges[1])
    assert_uniform(tasks[:, 2], *ranges[2])
    assert (tasks.T.corrcoef() - torch.eye(3)).abs().max() < 0.07


@each_grid
def test_tasks_in_the_episodes_of_a_lifetime(name):
    """They change in `NonstationaryABC` only, where A and C swap signs before episodes 250, 500, 750, .."""
    family = FAMILIES[name]
    numbers = [0, 1, 249, 250, 251, 499, 500, 749, 750, 999, 1000, 4321]
    task = family(1).sample_tasks(len(numbers), seeded(0))
    then = family.task_in_episode(task, torch.tensor(numbers))
    if name != "NonstationaryABC":
        assert torch.equal(then, task)
        return
    for before, after, number in zip(task.tolist(), then.tolist(), numbers, strict=True):
        swaps = sum(1 for border in range(250, 5000, 250) if number >= border)
        a, b, c = before
        assert after == ([a, b, c] if swaps % 2 == 0 else [c, b, a])
    assert then.dtype == task.dtype


# ---------------------------------------------------------------- pictures

COLOURS = {"wall": (90, 90, 90), "agent": (40, 80, 200), "gold": (240, 190, 40)}
COLOURS |= {"A": (210, 60, 60), "B": (120, 120, 120), "C": (60, 160, 80)}


def shown(frame, cells):
    """For each colour the places where it is the cell's own, and where it is the disc's in the middle."""
    size = len(frame) // cells
    assert frame.shape == (size * cells, size * cells, 3)
    assert frame.dtype == np.uint8
    places = {}
    for what, colour in COLOURS.items():
        offset = size // 2 if what == "agent" else 1
        same = (frame[offset::size, offset::size] == colour).all(-1)
        places[what] = {tuple(place) for place in np.argwhere(same).tolist()}
    return places


@each_grid
def test_the_picture_shows_what_is_where(name):
    venv = FAMILIES[name](3, 30)
    tasks, actions = venv.sample_tasks(3, seeded(0)), choices(venv, 30)
    actions[2:10] = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])[:, None]  # to the key
    venv.reset(options={"tasks": tasks})
    world, keys = 1, set()
    everything = {(row, column) for row in range(side(name)) for column in range(side(name))}
    rows = walk_by_hand(name, tasks[world].tolist(), actions[:, world].tolist())
    for step, (seen, *_) in enumerate(rows):
        if step:
            venv.step(actions[step - 1])
        places = shown(venv.render_frame(world), side(name))
        assert places["agent"] == {divmod(seen.index(1), side(name))}
        assert places["wall"] == everything - free_places(name)
        if name == "EmptyRooms":
            assert places["gold"] == {tuple(tasks[world].int().tolist())}
        else:
            assert [places[letter] for letter in "ABC"] == [{place} for place in OBJECTS]
            assert places["gold"] == ({KEY} if name == "KeyBox" and not seen[25] else set())
            keys.add(seen[-1])
    assert keys == {0, 1} or name != "KeyBox"


@pytest.mark.parametrize("name", [*POLES, *GRIDS])
def test_pictures_do_not_disturb(name):
    venv, other = FAMILIES[name](2, 20), FAMILIES[name](2, 20)
    tasks, actions = venv.sample_tasks(2, seeded(0)), choices(venv, 20)
    venv.reset(seed=0, options={"tasks": tasks}), other.reset(seed=0, options={"tasks": tasks})
    for action in actions:
        venv.render_frame(0), venv.render_frame(1)
        assert all(torch.equal(a, b) for a, b in zip(venv.step(action)[:4], other.step(action)[:4], strict=True))
