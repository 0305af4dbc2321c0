"""Bandits, tabular decision processes and the mouse's maze, against statistics and slow implementations."""

from collections import deque
from itertools import pairwise, product

import numpy as np
import pytest
import torch

import envs
from envs.core import held_out_normal
from envs.mouse_cheese import MouseCheese, shortest_path, walls
from envs.tabular_mdp import TabularMDP, optimal_value, tables

FAMILIES = {family.__name__: family for family in envs.HORIZONS}
BERNOULLI = {"Bandit5": 5, "Bandit10": 10, "Bandit50": 50, "DependentBandit": 2}
BANDITS = {**BERNOULLI, "GaussianBandit5": 5, "UniformGaussianBandit5": 5}
each_split = pytest.mark.parametrize("split", ["train", "test"])
each_random = pytest.mark.parametrize("name", [*BANDITS, "TabularMDP"])


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


# ---------------------------------------------------------------- chance


@pytest.mark.parametrize("name", BERNOULLI)
def test_arms_pay_with_their_probabilities(name):
    arms, pulls = BERNOULLI[name], 100 if BERNOULLI[name] < 50 else 200
    venv = FAMILIES[name](200, pulls)
    assert venv.single_action_space.n == venv.task_dim == arms
    task = venv.sample_tasks(1, seeded(0))
    actions = choices(venv, pulls)
    obs, paid, _ = play(venv, actions, task.expand(200, -1))
    assert (obs == 0).all()
    assert {*paid.flatten().tolist()} == {0.0, 1.0}
    for arm, chance in enumerate(task[0].tolist()):
        times = int((actions == arm).sum())
        assert paid[actions == arm].mean().item() == pytest.approx(chance, abs=4.5 * (0.25 / times) ** 0.5)
    # Chance is fresh in every world and at every step: sums over either vary as independent Bernoulli draws do.
    actions = torch.zeros_like(actions)
    chance = 0.4
    paid = play(venv, actions, torch.full((200, arms), chance))[1]
    for length, sums in ((200, paid.sum(1)), (pulls, paid.sum(0))):
        assert sums.var().item() == pytest.approx(length * chance * (1 - chance), rel=0.6)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_sure_arms_are_sure(chance):
    venv = FAMILIES["Bandit5"](1000, 5)
    assert (play(venv, choices(venv, 5), torch.full((1000, 5), chance))[1] == chance).all()


@pytest.mark.parametrize(("name", "std"), [("GaussianBandit5", 1.0), ("UniformGaussianBandit5", 0.3)])
def test_gaussian_arms_pay_their_mean_and_normal_noise(name, std):
    venv = FAMILIES[name](2000, 20, dtype=torch.float64)
    tasks, actions = venv.sample_tasks(2000, seeded(0)), choices(venv, 20)
    paid = play(venv, actions, tasks)[1].numpy()
    noise = (paid - tasks.numpy()[np.arange(2000), actions.numpy()]) / std
    assert abs(noise.mean()) < 0.02
    assert noise.var() == pytest.approx(1, abs=0.03)
    assert (noise**4).mean() == pytest.approx(3, abs=0.2)
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.02


@each_random
def test_the_pure_reward_is_the_mean_reward(name):
    venv = FAMILIES[name](3, 4, dtype=torch.float64)
    tasks, actions = venv.sample_tasks(3, seeded(0)), choices(venv, 4)
    obs, *_ = play(venv, actions, tasks)
    pure = FAMILIES[name].reward(obs[:-1], actions, obs[1:], tasks.expand(4, -1, -1))
    for step, world in product(range(4), range(3)):
        first = 5 * obs[step, world].tolist().index(1) if name == "TabularMDP" else 0
        assert pure[step, world] == tasks[world, first + actions[step, world]]


@each_random
def test_equal_seeds_give_equal_chances(name):
    venv, other = FAMILIES[name](300, 4), FAMILIES[name](300, 4, dtype=torch.float64)
    tasks, actions = venv.sample_tasks(300, seeded(0)), choices(venv, 4)
    torch.manual_seed(1)
    first = play(venv, actions, tasks, seed=5)
    torch.manual_seed(2)
    for a, b in zip(first, play(other, actions, tasks, seed=5), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
    second = play(venv, actions, tasks, seed=None)  # the next episode of the same tasks has other chances ...
    assert not torch.equal(first[1], second[1])
    torch.testing.assert_close(second[1].double(), play(other, actions, tasks, None)[1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(first[1], play(venv, actions, tasks, seed=6)[1])  # ... and so has another seed


@each_random
def test_a_world_does_not_depend_on_its_neighbours_tasks_and_choices(name):
    venv = FAMILIES[name](6, 10)
    tasks, actions = venv.sample_tasks(6, seeded(0)), choices(venv, 10)
    first = play(venv, actions, tasks)
    others = torch.arange(6) != 2
    tasks[others], actions[:, others] = venv.sample_tasks(5, seeded(1)), choices(venv, 10, seed=1)[:, others]
    second = play(venv, actions, tasks)
    assert all(torch.equal(a[:, 2], b[:, 2]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1][:, others], second[1][:, others])


# ---------------------------------------------------------------- tasks


@each_split
def test_bernoulli_tasks_are_uniform(split):
    for name in ("Bandit5", "Bandit10", "Bandit50"):
        tasks = FAMILIES[name](1).sample_tasks(5000, seeded(0), split)
        assert tasks.min() >= 0
        assert tasks.max() <= 1
        assert (tasks.mean(0) - 0.5).abs().max() < 0.02
        assert (tasks.var(0) - 1 / 12).abs().max() < 0.005
        assert (tasks.T.corrcoef() - torch.eye(BANDITS[name])).abs().max() < 0.075
    pair = FAMILIES["DependentBandit"](1).sample_tasks(5000, seeded(0), split)
    assert (pair.sum(1) - 1).abs().max() < 1e-6
    assert pair[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert pair[:, 0].var() == pytest.approx(1 / 12, abs=0.005)


def assert_standard_normal(points):
    points = points.flatten().double().sort().values
    expected = torch.distributions.Normal(0.0, 1.0).cdf(points)
    gap = (expected - torch.linspace(0, 1, len(points), dtype=torch.float64)).abs().max()
    assert gap * len(points) ** 0.5 < 1.95  # Kolmogorov-Smirnov, p = 0.001


@each_split
def test_normal_tasks_are_normal(split):
    points = held_out_normal(4000, 5, seeded(0), split)
    assert points.dtype == torch.float32
    assert torch.equal(FAMILIES["GaussianBandit5"](1).sample_tasks(4000, seeded(0), split), points)
    assert (points.T.corrcoef() - torch.eye(5)).abs().max() < 0.07
    assert_standard_normal(points[:, 1:])
    assert_standard_normal(points[:, 0])  # the held-out strips are too thin to show
    assert held_out_normal(200_000, 1, seeded(1), split).var() == pytest.approx(1, abs=0.015)


@each_split
def test_mdp_tasks_have_normal_means_and_flat_dirichlet_rows(split):
    venv = TabularMDP(1)
    tasks = venv.sample_tasks(600, seeded(0), split)
    mean, transition = tables(tasks)
    assert tasks.shape == (600, 550)
    assert_standard_normal(mean[:, 1:] - 1)  # all states but the held-out one's
    assert transition.shape == (600, 10, 5, 10)
    assert (transition.sum(-1) - 1).abs().max() < 1e-5
    assert transition.min() >= 0
    # A coordinate of Dirichlet(1, .., 1) is Beta(1, 9): P(x > t) = (1 - t)^9; two have the covariance -1 / 1100.
    for level in (0.02, 0.1, 0.3, 0.5):
        shares = (transition > level).float().mean(dim=(0, 1, 2))
        assert (shares - (1 - level) ** 9).abs().max() < 0.015
    covariance = transition.flatten(0, 2).T.cov()
    expected = torch.full((10, 10), -1 / 1100).fill_diagonal_(9 / 1100)
    assert (covariance - expected).abs().max() < 3e-4
    other = transition[:, 0, 1, 0]  # of another row: independent
    assert (transition[:, 0, 0, 0] * other).mean() == pytest.approx(0.01, abs=0.002)


# ---------------------------------------------------------------- tabular MDP


def test_mdp_moves_and_pays_as_its_tables_say():
    venv = TabularMDP(3000, 40, dtype=torch.float64)
    task, actions = venv.sample_tasks(1, seeded(0)), choices(venv, 40)
    obs, paid, _ = play(venv, actions, task.expand(3000, -1))
    assert (obs.sum(-1) == 1).all()
    assert (obs.max(-1).values == 1).all()
    states = obs.argmax(-1).numpy()
    assert (states[0] == 0).all()
    mean = task[0, :50].numpy().reshape(10, 5)
    chance = task[0, 50:].numpy().reshape(10, 5, 10)
    here, there, action, noise = states[:-1].ravel(), states[1:].ravel(), actions.numpy().ravel(), paid.numpy().ravel()
    counts = np.zeros((10, 5, 10))
    np.add.at(counts, (here, action, there), 1)
    times = counts.sum(-1)
    assert times.min() > 300
    errors = (counts / times[..., None] - chance) / np.sqrt(chance * (1 - chance) / times[..., None])
    assert abs(errors).max() < 4.5
    assert (errors**2).mean() == pytest.approx(1, abs=0.25)  # 450 free numbers
    noise = noise - mean[here, action]
    sums = np.zeros((10, 5))
    np.add.at(sums, (here, action), noise)
    assert abs(sums / np.sqrt(times)).max() < 4.5
    assert noise.var() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(noise, mean[there, 0])[0, 1]) < 0.015  # what is paid tells nothing about what comes


def test_optimal_value_is_what_policy_iteration_finds():
    """Policy iteration on the process unrolled in time: linear systems of horizon * states unknowns, no recursion."""
    tasks = TabularMDP(1, dtype=torch.float64).sample_tasks(4, seeded(0))
    for horizon in (1, 2, 10):
        for task, ours in zip(tasks.numpy(), optimal_value(tasks, horizon).tolist(), strict=True):
            mean, chance = task[:50].reshape(10, 5), task[50:].reshape(10, 5, 10)
            policy = np.random.default_rng(0).integers(5, size=(horizon, 10))
            for _ in range(50):
                system = np.eye(10 * horizon)
                for t in range(horizon - 1):
                    system[10 * t : 10 * t + 10, 10 * t + 10 : 10 * t + 20] = -chance[np.arange(10), policy[t]]
                gain = mean[np.arange(10), policy].ravel()
                value = np.linalg.solve(system, gain).reshape(horizon, 10)
                action_value = mean + np.einsum("sau,tu->tsa", chance, np.vstack([value[1:], np.zeros((1, 10))]))
                better = action_value.argmax(-1)
                if (better == policy).all():
                    break
                policy = better
            else:
                raise AssertionError("policy iteration did not settle")
            assert ours == pytest.approx(value[0, 0], abs=1e-9)


def test_the_optimal_policy_earns_the_optimal_value():
    venv = TabularMDP(4000, 10, dtype=torch.float64)
    task = venv.sample_tasks(1, seeded(3))
    mean, chance = task[0, :50].reshape(10, 5), task[0, 50:].reshape(10, 5, 10)
    value, plan = torch.zeros(10, dtype=torch.float64), []
    for _ in range(10):
        best = (mean + chance @ value).max(-1)
        value, plan = best.values, [best.indices, *plan]
    obs, _ = venv.reset(seed=0, options={"tasks": task.expand(4000, -1)})
    total = 0
    for rule in plan:
        obs, reward, *_ = venv.step(rule[obs.argmax(-1)])
        total = total + reward
    error = total.std().item() / 4000**0.5
    assert error < 0.1
    assert total.mean().item() == pytest.approx(optimal_value(task, 10).item(), abs=4 * error)


# ---------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize("name", ["Bandit5", "Bandit10", "Bandit50"])
def test_random_pulls_earn_what_the_paper_says(name):
    venv = FAMILIES[name](4000, 10)
    total = play(venv, choices(venv, 10), venv.sample_tasks(4000, seeded(1), "test"))[1].sum(0)
    assert total.mean().item() == pytest.approx(5.0, abs=0.15)  # Duan et al. 2016, table 1: 5.0, 5.0, 5.1


def test_random_choices_in_mdps_earn_what_the_paper_says():
    venv = TabularMDP(3000)
    tasks = venv.sample_tasks(3000, seeded(1), "test")
    total = sum(play(venv, choices(venv, 10, seed), tasks, seed)[1].sum(0) for seed in range(10))
    assert total.mean().item() == pytest.approx(100.1, abs=1.5)  # Duan et al. 2016, table 2: 10 episodes


# ---------------------------------------------------------------- mouse and cheese

MAZE = """
#########
#...#...#
#.......#
#...#...#
#.####.##
#...#...#
#...#...#
#.......#
#########
"""  # doors: the upper at its second cell, the lower at its third, the left at its first, the right at its second
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right


def every_task():
    """All 81 mazes with all 35 places of the cheese [2835, 6], from the docstring."""
    rooms = [(row, column) for row in range(1, 8) for column in range(1, 8) if row != 4 and column != 4]
    places = [place for place in rooms if place != (1, 1)]
    return torch.tensor([(*doors, *place) for doors in product(range(3), repeat=4) for place in places]).float()


def picture(task):
    """The maze's cells (row, column) that are free, from the docstring."""
    upper, lower, left, right = (int(position) for position in task[:4])
    free = {(row, column) for row in range(1, 8) for column in range(1, 8) if row != 4 and column != 4}
    return free | {(1 + upper, 4), (5 + lower, 4), (4, 1 + left), (4, 5 + right)}


def distances(free, origin):
    found, queue = {origin: 0}, deque([origin])
    while queue:
        row, column = queue.popleft()
        for down, right in STEPS:
            place = (row + down, column + right)
            if place in free and place not in found:
                found[place] = found[row, column] + 1
                queue.append(place)
    return found


def test_mazes_are_as_drawn():
    (drawn,) = walls(torch.tensor([[1.0, 2, 0, 1, 1, 2]]))
    assert "".join("#" if cell else "." for cell in drawn.tolist()) == MAZE.replace("\n", "")
    for task, blocked in zip(every_task()[::35], walls(every_task()[::35]), strict=True):
        assert {divmod(cell, 9) for cell in range(81) if not blocked[cell]} == picture(task)


def test_every_cheese_is_reachable_and_its_distance_is_known():
    tasks = every_task()
    ours = shortest_path(tasks).tolist()
    for first in range(0, len(tasks), 35):  # one maze, all places
        found = distances(picture(tasks[first].tolist()), (1, 1))
        for index in range(first, first + 35):
            assert ours[index] == found[tuple(tasks[index, 4:].int().tolist())]
    assert 1 <= min(ours) <= max(ours) <= envs.HORIZONS[MouseCheese] / 2


@each_split
def test_mouse_tasks_are_uniform_and_split_by_mazes(split):
    tasks = [tuple(task) for task in MouseCheese(1).sample_tasks(20000, seeded(0), split).int().tolist()]
    allowed = [tuple(task) for task in every_task().int().tolist() if (sum(task[:4]) % 3 == 0) == (split == "test")]
    counts = dict.fromkeys(allowed, 0)
    for task in tasks:
        counts[task] += 1
    counts, expected = np.array([*counts.values()]), 20000 / len(allowed)
    assert len(counts) == (54 if split == "train" else 27) * 35
    statistic = ((counts - expected) ** 2 / expected).sum()  # chi-squared: mean n - 1, variance 2 (n - 1)
    assert abs(statistic - (len(counts) - 1)) < 4 * (2 * len(counts)) ** 0.5
    for door in range(4):  # what is new in a test maze is the combination, not a door
        share = np.bincount([task[door] for task in allowed]) / len(allowed)
        np.testing.assert_allclose(share, 1 / 3)


def test_mouse_walks_as_drawn():
    venv = MouseCheese(80, 60)
    tasks, actions = venv.sample_tasks(80, seeded(0)), choices(venv, 60)
    obs, paid, terminated = play(venv, actions, tasks)
    bumps = ends = 0
    for world in range(80):
        free, cheese = picture(tasks[world].tolist()), tuple(tasks[world, 4:].int().tolist())
        place, over = (1, 1), False
        for step in range(61):
            board = obs[step, world].reshape(2, 9, 9)
            assert {tuple(cell) for cell in (board[0] == 0).nonzero().tolist()} == free
            assert board[1].nonzero().tolist() == [[*place]]
            assert board.unique().tolist() == [0, 1]
            if step == 60:
                break
            there = tuple(np.add(place, STEPS[actions[step, world]]).tolist())
            bumps += there not in free
            place = there if there in free and not over else place
            expected = 0 if over else 1 if place == cheese else -0.01
            assert paid[step, world].item() == pytest.approx(expected, abs=1e-7)
            over = over or place == cheese  # latched: afterwards the mouse stays, whatever is done
            assert terminated[step, world] == over
        ends += over
    assert torch.equal(torch.stack(venv.path), obs[..., 81:].argmax(-1))  # what the picture draws
    assert bumps > 500
    assert 10 < ends < 70


def test_the_cheese_is_never_seen():
    """Two worlds that differ in the cheese only show the same until one of them ends."""
    venv = MouseCheese(400, 30)
    tasks = venv.sample_tasks(200, seeded(0)).repeat(2, 1)
    tasks[200:, 4:] = venv.sample_tasks(200, seeded(1))[:, 4:]
    obs, _, terminated = play(venv, choices(venv, 30)[:, :200].repeat(1, 2), tasks)
    before = torch.cat([torch.zeros(1, 400, dtype=torch.bool), terminated])
    both = ~(before[:, :200] | before[:, 200:])
    assert torch.equal(obs[:, :200][both], obs[:, 200:][both])
    assert both.float().mean() > 0.5
    assert terminated.any()


def test_a_shortest_path_ends_at_the_cheese_and_earns_the_most():
    tasks = MouseCheese(1).sample_tasks(60, seeded(0), "test")
    venv = MouseCheese(60, 30)
    venv.reset(options={"tasks": tasks})
    places, totals, steps = [(1, 1)] * 60, torch.zeros(60), torch.zeros(60)
    maps = [distances(picture(task), tuple(map(int, task[4:]))) for task in tasks.tolist()]
    for _ in range(30):
        going = [min(range(4), key=lambda k: far.get(tuple(np.add(at, STEPS[k])), 99))
                 for far, at in zip(maps, places, strict=True)]  # fmt: skip
        obs, paid, terminated, *_ = venv.step(torch.tensor(going))
        places = [divmod(cell, 9) for cell in obs[:, 81:].argmax(1).tolist()]
        totals, steps = totals + paid, steps + (paid != 0)
    assert terminated.all()
    assert torch.equal(steps.long(), shortest_path(tasks))
    torch.testing.assert_close(totals, 1 - 0.01 * (steps - 1))


def test_the_picture_shows_cheese_mouse_and_path():
    venv = MouseCheese(2, 5)
    venv.reset(options={"tasks": torch.tensor([[0.0, 0, 0, 0, 7, 7], [1, 2, 0, 1, 1, 2]])})
    for action in (1, 1, 3):
        venv.step(torch.tensor([0, action]))
    frame = venv.render_frame(1)
    colours = {"cheese": (240, 190, 40), "mouse": (40, 80, 200), "path": (200, 200, 200), "wall": (60, 60, 60)}
    shown = {name: {tuple(cell) for cell in np.argwhere((frame[13::26, 13::26] == colour).all(-1)).tolist()}
             for name, colour in colours.items()}  # fmt: skip
    assert shown["cheese"] == {(1, 2)}
    assert shown["mouse"] == {(3, 2)}
    assert shown["path"] == {(1, 1), (2, 1), (3, 1)}
    assert shown["wall"] == {divmod(i, 9) for i, cell in enumerate(MAZE.replace("\n", "")) if cell == "#"}


# ---------------------------------------------------------------- the two-step task and Harlow's objects


def test_two_step_ways_pay_and_reversals():
    """3,000 worlds of 40 trials that always choose by a fixed pattern: all frequencies are those of the source."""
    venv = FAMILIES["TwoStep"](3000, 80, dtype=torch.float64)
    tasks = venv.sample_tasks(3000, seeded(0))
    obs, _ = venv.reset(seed=1, options={"tasks": tasks})
    assert torch.equal(obs, torch.tensor([1.0, 0, 0]).double().expand(3000, 3))
    common, paid_by_place = [], []
    for trial in range(40):
        choice = torch.full((3000,), trial % 2)
        obs, reward, terminated, truncated, _ = venv.step(choice)
        assert not reward.any()
        assert torch.equal(obs.sum(1), torch.ones(3000).double())
        assert not obs[:, 0].any()
        place = obs[:, 2].long()
        common.append((place == choice).double())
        obs, reward, terminated, truncated, _ = venv.step(torch.randint(2, (3000,), generator=seeded(trial)))
        assert obs[:, 0].all()
        assert {*reward.tolist()} == {0.0, 1.0}
        better_at_first = (tasks[:, 0] < 0).long()
        paid_by_place.append([reward[place == better_at_first].mean(), reward[place != better_at_first].mean()])
    assert not terminated.any()
    assert truncated.all()
    assert torch.stack(common).mean() == pytest.approx(0.8, abs=4 * 0.4 / 120000**0.5)
    # The place that paid better at first still does after t trials with probability (1 + 0.95^t) / 2.
    for trial, (first, other) in enumerate(paid_by_place):
        still = (1 + 0.95**trial) / 2
        assert float(first) == pytest.approx(0.9 * still + 0.1 * (1 - still), abs=0.05)
        assert float(other) == pytest.approx(0.1 * still + 0.9 * (1 - still), abs=0.05)


def test_two_step_is_worth_what_a_planner_earns():
    """Choosing by Bayes' rule earns far more than the half of all trials that chance does."""
    venv = FAMILIES["TwoStep"](1000, 200, dtype=torch.float64)
    venv.reset(seed=1, options={"tasks": venv.sample_tasks(1000, seeded(0))})
    first_B, total_B = torch.full((1000,), 0.5), torch.zeros(1000)  # the probability that the first place is better
    for _ in range(100):
        obs, *_ = venv.step((first_B < 0.5).long())
        place = obs[:, 2].long()
        _, reward, *_ = venv.step(torch.zeros_like(place))
        like_first = torch.where(place == 0, 0.9, 0.1)  # of a reward here, if the first place is better
        like_first = torch.where(reward > 0, like_first, 1 - like_first)
        odds = first_B * like_first / (first_B * like_first + (1 - first_B) * (1 - like_first))
        first_B = odds * 0.975 + (1 - odds) * 0.025
        total_B += reward.float()
    assert 60 < total_B.mean() < 74  # 74 = 100 (0.8 0.9 + 0.2 0.1), with the better place always known


def test_harlow_shows_both_objects_and_pays_one():
    venv = FAMILIES["Harlow"](2000, 6, dtype=torch.float64)
    tasks = venv.sample_tasks(2000, seeded(0), "test")
    first, second, food = tasks[:, :8], tasks[:, 8:16], tasks[:, 16].long()
    assert {*food.tolist()} == {0, 1}
    assert tasks[:, :16].min() >= -1
    assert tasks[:, :16].max() <= 1
    assert tasks[:, 1:16].mean().abs() < 0.02
    obs, _ = venv.reset(seed=1, options={"tasks": tasks})
    sides = []
    for trial in range(6):
        left, right = obs[:, :8], obs[:, 8:]
        first_is_left = (left == first).all(1)
        assert torch.equal(left, torch.where(first_is_left[:, None], first, second))
        assert torch.equal(right, torch.where(first_is_left[:, None], second, first))
        sides.append(first_is_left)
        action = torch.randint(2, (2000,), generator=seeded(trial))
        obs, reward, *_ = venv.step(action)
        chose_first = first_is_left == (action == 0)
        assert torch.equal(reward > 0, chose_first == (food == 0))
    assert torch.stack(sides).double().mean() == pytest.approx(0.5, abs=0.02)
    stays = torch.stack([(a == b).double() for a, b in pairwise(sides)])
    assert stays.mean() == pytest.approx(0.5, abs=0.02)


# ---------------------------------------------------------------- grids with hidden goals


@pytest.mark.parametrize(
    ("name", "side", "start", "elsewhere", "near"),
    [
        ("GridNavi", 5, (0, 0), -0.1, 1),
        ("GridNaviUnseen", 5, (0, 0), -0.1, 1),
        ("DarkRoom", 10, (0, 0), 0.0, -1),
        ("DarkRoomSmall", 9, (4, 4), 0.0, -1),
    ],
)
def test_grids_with_hidden_goals_against_a_walk_by_hand(name, side, start, elsewhere, near):
    venv = FAMILIES[name](60, 40, dtype=torch.float64)
    tasks = venv.sample_tasks(60, seeded(0))
    actions = torch.randint(5, (40, 60), generator=seeded(1))
    obs, _ = venv.reset(seed=0, options={"tasks": tasks})
    places = [list(start) for _ in range(60)]
    step_of = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1), 4: (-1, 0)}  # stay, up, right, down, left
    found = 0
    for action in actions:
        for world in range(60):
            assert obs[world].nonzero().tolist() == [[side * places[world][1] + places[world][0]]]
        obs, reward, terminated, _, _ = venv.step(action)
        for world in range(60):
            for axis in (0, 1):
                moved = places[world][axis] + step_of[int(action[world])][axis]
                places[world][axis] = min(max(moved, 0), side - 1)
            is_there = places[world] == tasks[world].int().tolist()
            found += is_there
            assert reward[world] == pytest.approx(1.0 if is_there else elsewhere, abs=1e-12)
        assert not terminated.any()
    assert found > 5
    goals = {tuple(goal) for split in ("train", "test") for goal in FAMILIES[name].goals(split).tolist()}
    allowed = [(x, y) for x in range(side) for y in range(side) if max(abs(x - start[0]), abs(y - start[1])) > near]
    assert goals == set(allowed)
