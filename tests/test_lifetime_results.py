"""benchmark/lifetime_rewards.py: the baselines and the numbers of docs/lifetime_rewards.md."""

import json
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import Generator

from algos import lifetime_rewards as algorithm
from benchmark import lifetime_rewards as benchmark
from envs import Lifetimes, make, records
from envs.gridworlds import GOALS, ROOMS, SIDE, EmptyRooms

SIZE = {"horizon": 6, "episodes_per_lifetime": 4, "steps": 3, "policy_size": 8, "hidden_size": 5}


@pytest.mark.parametrize("by", ["r", "the learned reward"])
def test_lifetimes_are_those_of_the_algorithm(by):
    args = algorithm.Args(env_id="SymABC-v0", **SIZE)
    envs = Lifetimes(make(args.env_id, 5, args.horizon, discrete=True), args.episodes_per_lifetime)
    tasks = benchmark.drawn(args.env_id, 5, 3)
    eta = None if by == "r" else algorithm.init_history(envs, args, Generator().manual_seed(1))
    eta = eta and {name: 5 * x for name, x in eta.items()}
    reward = benchmark.partial(benchmark.learned, eta) if eta else benchmark.extrinsic
    seed = int(torch.randint(2**31, (1,), generator=(generator := Generator().manual_seed(2))))
    expected = algorithm.whole_lifetimes(envs, tasks, eta, args, Generator().manual_seed(2))
    # The same noise: whole_lifetimes draws the worlds' seed first, the benchmark is given it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "Generator", lambda: SimpleNamespace(manual_seed=lambda _: generator))
        returns, in_a = benchmark.lifetimes(args.env_id, args, reward, tasks, seed)
    assert torch.equal(returns, expected)
    ended_in_a = (expected - tasks[:, :1]).abs() < 1e-6
    assert torch.equal(in_a > 0, ended_in_a)
    assert ended_in_a.any()


def test_the_count_based_bonus_counts_each_lifetime():
    cells = torch.tensor([[0, 1, 0], [2, 2, 2]])
    reward = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, -1.0]])
    x = torch.cat([torch.eye(3)[cells.roll(1, -1)], torch.eye(3)[cells], torch.zeros(2, 3, 2)], -1)
    data = SimpleNamespace(x=x, reward=reward, died=torch.tensor([[0.0, 0, 0], [0, 0, 1]]))
    first, seen = benchmark.counting(0.3, data, None)
    root = [1, 2**-0.5, 3**-0.5]
    expected = torch.tensor([[root[0], root[0], root[1]], root])
    torch.testing.assert_close(first, reward + 0.3 * expected)
    again, _ = benchmark.counting(0.3, data, seen)  # the first lifetime goes on, the second was another's
    expected = torch.tensor([[root[2], root[1], 4**-0.5], root])
    torch.testing.assert_close(again, reward + 0.3 * expected)


def slow_guided(order, told, pull, rows, known):
    """Bonuses of one lifetime's steps, (cell before, cell after, reward) each, and what it knows after them."""
    corners, bonuses = {4: 0, 20: 1, 24: 2}, []
    for before, after, reward in rows:
        left = [k for k in order if k not in known]
        wanted = told if told is not None else left[0] if left else max(known, key=known.get)
        row, column = divmod({v: k for k, v in corners.items()}[wanted], 5)
        distance = [abs(cell // 5 - row) + abs(cell % 5 - column) for cell in (before, after)]
        if after in corners:
            bonuses.append(1.0 if corners[after] == wanted else -1.0)
            known = known | {corners[after]: reward}
        else:
            bonuses.append(pull * (distance[0] - distance[1]))
    return bonuses, known


@pytest.mark.parametrize("told", [None, 1])
def test_the_hand_made_rewards_lead_to_one_object_after_another(told):
    """Walks to random corners, with detours, against a few lines of Python for each; some lifetimes end on the way."""
    number, pieces, length = 12, 12, 5
    generator = Generator().manual_seed(0)
    envs = Lifetimes(make("SymABC-v0", number, 9, discrete=True), 8)
    tasks = benchmark.drawn("SymABC-v0", number, 3)
    obs, _ = envs.reset(seed=0, options={"tasks": tasks})
    given = None if told is None else torch.full((number,), told)
    steps, memory, known = benchmark.shortest(benchmark.RandomABC), None, [{} for _ in range(number)]
    order, learned, died = benchmark.tries("SymABC-v0"), 0, 0
    for _ in range(pieces):
        records, alive = [], torch.ones(number)
        wishes = torch.stack([torch.randint(low, low + 2, (number,), generator=generator) for low in (0, 2)])
        for _ in range(length):
            wish = wishes.gather(0, torch.randint(2, (1, number), generator=generator))[0]
            detour = torch.rand(number, generator=generator) < 0.15
            action = torch.where(detour, torch.randint(4, (number,), generator=generator), wish)
            after, reward, ended, late, info = envs.step(action)
            x = torch.cat([obs, info["final_obs"], reward[:, None], (ended | late).float()[:, None]], 1)
            records.append((x, reward, info["born"] * alive))
            alive, obs = alive * ~info["born"], after
        x, reward, dead = (torch.stack(part, 1) for part in zip(*records, strict=True))
        data = SimpleNamespace(x=x, reward=reward, died=dead)
        found, memory = benchmark.guided(order, given, steps, 0.25, data, memory)
        for n in range(number):
            cells = x[n, :, :25].argmax(-1).tolist(), x[n, :, 25:50].argmax(-1).tolist()
            rows = list(zip(*cells, reward[n].tolist(), strict=True))
            bonus, known[n] = slow_guided(order, told, 0.25, rows, known[n])
            torch.testing.assert_close(found[n] - reward[n], torch.tensor(bonus))
            learned += len(known[n]) == 3
            died += int(dead[n].any())
            known[n] = {} if dead[n].any() else known[n]
    assert learned > 5
    assert died > 3


def test_ceilings_are_there_for_families_of_objects_alone(monkeypatch):
    args = algorithm.Args(env_id="RandomABC-v0", **SIZE)
    monkeypatch.setattr(benchmark, "tuned", lambda env_id, args, rewards: (args, 0.5))
    tasks = benchmark.drawn("RandomABC-v0", 5, 3)
    found = benchmark.ceilings("RandomABC-v0", tasks, args, 1)
    names = [f"{name}, pull = 0.5, alpha = 1" for name in ("hand-made", "told the best", "told C")]
    assert list(found) == names
    assert all(returns.shape == in_a.shape == (5, 4) for returns, in_a in found.values())
    assert list(benchmark.ceilings("SymABC-v0", tasks, args, 1)) == names[:2]
    assert benchmark.ceilings("KeyBox-v0", None, args, 1) == benchmark.ceilings("EmptyRooms-v0", None, args, 1) == {}


def test_shortest_ways_are_those_of_a_breadth_first_search():
    steps = benchmark.shortest(EmptyRooms)
    for start in (0, 24, 60 + 5, 120):
        free, distance, queue = {(r, c) for r in range(SIDE) for c in range(SIDE) if ROOMS[r][c] != "#"}, {}, deque()
        if divmod(start, SIDE) in free:
            distance[divmod(start, SIDE)] = 0
            queue.append(divmod(start, SIDE))
        while queue:
            row, column = queue.popleft()
            for there in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if there in free and there not in distance:
                    distance[there] = distance[row, column] + 1
                    queue.append(there)
        for (row, column), expected in distance.items():
            assert steps[start, SIDE * row + column] == expected


def test_ways_into_a_cell_come_from_its_neighbours():
    table, ends = EmptyRooms(1)._table, torch.zeros(SIDE * SIDE, dtype=torch.bool)
    ends[24] = True
    start, to = benchmark.ways_in(table, ends)
    found = set(zip(start.tolist(), to.tolist(), strict=True))
    assert len(found) == len(start)
    free = [(r, c) for r in range(SIDE) for c in range(SIDE) if ROOMS[r][c] != "#"]
    near = {(SIDE * r + c, SIDE * x + y) for r, c in free for x, y in free if abs(r - x) + abs(c - y) == 1}
    assert {pair for pair in found if ROOMS[pair[0] // SIDE][pair[0] % SIDE] != "#"} == {p for p in near if p[0] != 24}
    assert 24 not in start.tolist()
    assert 24 in to.tolist()


@pytest.mark.parametrize(("task", "frames"), [(0, 6), (-1, 0)])
def test_visits_are_drawn_on_one_scale(task, frames, tmp_path, monkeypatch):
    """Of one goal, which is framed, or of many; each panel's squares are shares of all its visits."""
    args = algorithm.Args(env_id="EmptyRooms-v0", **SIZE | {"horizon": 9, "episodes_per_lifetime": 30})
    eta = algorithm.init_history(make(args.env_id, 1, 9, discrete=True), args, Generator().manual_seed(1))
    monkeypatch.setattr(benchmark, "load", lambda _: (None, args, {"eta": eta}))
    monkeypatch.setattr(benchmark, "IMAGES", tmp_path)
    panels, scales, framed, paint = [], set(), [], benchmark.paint

    def painted(axes, values, marked, family, colours, *scale):
        panels.append(values)
        scales.add(scale)
        framed.extend(marked)
        return paint(axes, values, marked, family, colours, *scale)

    monkeypatch.setattr(benchmark, "paint", painted)
    benchmark.visits(benchmark.Options("visits", ("run",), task=task))
    assert [*tmp_path.glob("*.png")]
    assert scales == {(0, max(float(x.max()) for x in panels))}
    assert [float(x.square().sum()) for x in panels] == pytest.approx([1.0] * 6, abs=1e-5)
    assert len(framed) == frames
    with pytest.raises(SystemExit, match="--task -1"):
        benchmark.rewards(benchmark.Options("rewards", ("run",), task=-1))


def test_the_explorer_tries_and_then_takes_the_best():
    tasks = torch.tensor([[0.9, -0.1, 0.3], [-0.5, -0.4, 0.2], [-0.9, 0.8, -0.3]])
    returns = benchmark.explorer("RandomABC-v0", tasks, 5, 10)
    torch.testing.assert_close(returns[:2], torch.tensor([[0.9, 0.3, 0.9, 0.9, 0.9], [-0.5, 0.2, 0.2, 0.2, 0.2]]))
    returns = benchmark.explorer("SymABC-v0", tasks, 4, 10)
    torch.testing.assert_close(returns[2], torch.tensor([-0.9, -0.3, 0.8, 0.8]))
    tasks = torch.tensor([divmod(goal, SIDE) for goal in GOALS]).float()
    for horizon in (20, 100):
        returns = benchmark.explorer("EmptyRooms-v0", tasks, 30, horizon)
        assert (returns.diff(dim=1) >= 0).all()  # once found, found for ever
        assert (returns[:, -1] == 1).all()
        reach = benchmark.shortest(EmptyRooms)[EmptyRooms(1).start, GOALS]
        assert (returns[:, 0] <= (reach <= horizon)).all()
        assert 5 < returns[:, 0].sum() <= horizon  # a step sees one cell


def test_the_summary():
    returns = torch.arange(40.0).view(2, 20)
    in_a = torch.zeros(2, 20)
    in_a[1, -5:] = 1
    found = benchmark.summary(torch.tensor([[-0.2, 0, 0], [0.7, 0, 0]]), returns, in_a)
    assert found["first"] == (4.5 + 24.5) / 2
    assert found["last"] == (14.5 + 34.5) / 2
    assert found["all"] == 19.5
    assert found["ci95"] == pytest.approx(1.96 * 200**0.5 / 2**0.5, abs=1e-3)
    assert (found["A if worth > 0.5"], found["A if < 0"]) == (0.5, 0.0)


def test_kept_runs_say_what_the_page_says():
    """The last evaluations of the kept runs lie within their noise of the tables' numbers, by more lifetimes."""
    page = {"SymABC_alpha0.5_U5_seed1": 0.364, "SymABC_alpha0.5_U5_seed2": 0.350, "RandomABC_alpha1_U10_seed1": 0.319}
    page |= {
        "RandomABC_alpha1_U20_seed1": 0.305,
        "RandomABC_alpha1_U20_seed2": 0.288,
        "EmptyRooms_alpha1_U5_seed1": 0.621,
    }
    text = (benchmark.ROOT / "docs/lifetime_rewards.md").read_text()
    for name, value in page.items():
        rows = [json.loads(line) for line in (benchmark.RESULTS / f"{name}.metrics.jsonl").read_text().splitlines()]
        args = records.last_flags(benchmark.RESULTS / f"{name}.args.json")
        assert rows[-1]["iteration"] == args["iterations"]
        assert rows[-1]["test/return_k9"] == pytest.approx(value, abs=0.08)
        assert rows[-1]["test/return_lifetime"] > rows[-1]["extrinsic/return_lifetime"] + 0.05
        assert f"{value:.3f}" in text
