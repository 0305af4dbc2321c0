"""benchmark/gridnavi.py: the Bayes-optimal returns against planning in belief space, and what it makes from runs."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from algos import rl2_ppo, varibad_ppo
from benchmark import gridnavi
from envs.hidden_goals import MOVES, GridNavi

SMALL = ["--env-id", "GridNavi-v0", "--iterations", "2", "--meta-batch-size", "8", "--minibatches", "2"]


def planned(grid: gridnavi.Grid) -> float:
    """The best expected return of a trial: every action in every step of every history, nothing assumed."""

    def moved(cell: int, action: int) -> int:
        column = cell % grid.columns + MOVES[action][0]
        row = cell // grid.columns + MOVES[action][1]
        return grid.columns * row + column if 0 <= column < grid.columns and 0 <= row < grid.rows else cell

    @cache
    def value(possible: frozenset, cell: int, step: int) -> float:
        if step == grid.episodes * grid.horizon:
            return 0.0
        if step % grid.horizon == 0:
            cell = grid.start
        totals = []
        for action in range(5):
            after = moved(cell, action)
            total = 0.0
            for reward, part in ((1.0, possible & {after}), (grid.off, possible - {after})):
                if part:
                    total += len(part) / len(possible) * (reward + value(part, after, step + 1))
            totals.append(total)
        return max(totals)

    return value(frozenset(grid.goals), grid.start, 0)


@pytest.mark.parametrize("goals", [(3, 4, 5), (2, 3), (1, 2, 3, 4, 5), (0, 2, 5), (5,)], ids=str)
@pytest.mark.parametrize(("horizon", "episodes"), [(1, 1), (2, 3), (3, 2), (4, 1), (4, 2), (5, 3)])
def test_two_by_three_cells_against_every_policy(goals, horizon, episodes):
    grid = gridnavi.Grid(3, 2, 0, goals, -0.1, horizon, episodes)
    walk = gridnavi.best_walk(grid)
    assert len(walk) == horizon * episodes
    for step, cell in enumerate(walk):
        before = walk[step - 1] if step % horizon else grid.start
        assert cell in [grid.after(before, action) for action in range(5)]
    assert gridnavi.returns(grid, walk).sum() == pytest.approx(planned(grid))


@pytest.mark.parametrize(("start", "off"), [(4, -0.5), (2, 0.0)])
def test_other_starts_and_rewards(start, off):
    grid = gridnavi.Grid(3, 2, start, tuple({0, 1, 2, 3, 4, 5} - {start}), off, 4, 2)
    assert gridnavi.returns(grid, gridnavi.best_walk(grid)).sum() == pytest.approx(planned(grid))


def test_a_beam_is_no_better_and_nothing_is_lost_by_the_bound():
    grid = gridnavi.Grid(3, 3, 0, (2, 4, 5, 6, 7, 8), -0.1, 4, 3)
    exact, _ = gridnavi.search(grid, floor=0)
    assert gridnavi.search(grid, floor=0, beam=1)[0] <= exact
    assert gridnavi.search(grid, floor=exact)[0] == exact
    assert gridnavi.returns(grid, gridnavi.best_walk(grid)).sum() == pytest.approx(planned(grid))


def expected_of_sampling(goals: tuple, goal: int) -> list[float]:
    """Posterior sampling in a corridor, where there is one way to each goal: by enumeration of what is drawn."""
    T, off, totals = 4, -0.1, np.zeros(3)

    def go(episode: int, possible: frozenset, weight: float) -> None:
        if episode == 3:
            return
        for target in possible:
            cells = [min(step + 1, target) for step in range(T)]
            totals[episode] += weight / len(possible) * sum(1.0 if cell == goal else off for cell in cells)
            after = frozenset({goal}) if goal in cells else possible - set(cells)
            go(episode + 1, after, weight / len(possible))

    go(0, frozenset(goals), 1.0)
    return totals.tolist()


@pytest.mark.parametrize("goal", [1, 2, 3])
def test_posterior_sampling_against_enumeration(goal):
    grid = gridnavi.Grid(4, 1, 0, (1, 2, 3), -0.1, 4, 3)
    generator = np.random.default_rng(0)
    returns = np.array([gridnavi.posterior_sampling(grid, goal, generator) for _ in range(4000)])
    error = 4 * returns.std(0) / len(returns) ** 0.5 + 1e-9
    assert (np.abs(returns.mean(0) - expected_of_sampling((1, 2, 3), goal)) <= error).all()


def test_posterior_sampling_takes_a_shortest_way_and_stays():
    grid = gridnavi.gridnavi(1)._replace(goals=(24,))  # the far corner, eight steps from the start
    assert gridnavi.posterior_sampling(grid, 24, np.random.default_rng(0)) == [pytest.approx(8 - 0.7)]


def test_moves_and_returns_are_those_of_the_family():
    grid, envs = gridnavi.gridnavi(), GridNavi(1)
    assert (grid.horizon, grid.episodes) == (envs.horizon, 4)
    assert [list(divmod(goal, 5)) for goal in grid.goals] == sorted(GridNavi.goals().flip(1).int().tolist())
    for action in range(5):
        obs, _ = envs.reset(seed=0, options={"tasks": torch.tensor([[4.0, 4.0]])})
        cell = grid.start
        for move in (1, 1, 2, action, 3, 3, 3, action, 4, 4):
            cell = grid.after(cell, move)
            obs, *_ = envs.step(torch.tensor([move]))
            assert int(obs.argmax()) == cell
    walk = gridnavi.best_walk(grid)
    totals = np.zeros(15)
    for goal in GridNavi.goals():  # the first episode, in the family itself: stay where it pays
        envs.reset(seed=0, options={"tasks": goal[None].float()})
        reward, cell = torch.tensor([-0.1]), grid.start
        for step in range(15):
            action = next(a for a in range(5) if grid.after(cell, a) == walk[step]) if reward < 0 else 0
            obs, reward, *_ = envs.step(torch.tensor([action]))
            cell = int(obs.argmax())
            totals[step] += float(reward) / 21
    assert totals.sum() == pytest.approx(gridnavi.returns(grid, walk)[0], abs=1e-5)


@pytest.mark.parametrize("module", [varibad_ppo, rl2_ppo], ids=["varibad_ppo", "rl2_ppo"])
def test_runs_stand_beside_the_optimum(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gridnavi, "IMAGES", tmp_path)
    module.main([*SMALL, "--episodes-per-trial", "4", *(["--buffer-size", "8"] if module is varibad_ppo else [])])
    (folder,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    options = gridnavi.Options("table", (folder,), trials=42)
    gridnavi.table(options)
    best, sampled, line = (json.loads(x) for x in capsys.readouterr().out.splitlines())
    assert sampled["trials"] == 42
    assert all(low <= high for low, high in zip(sampled["returns"], best["returns"], strict=True))
    assert best["returns"] == pytest.approx([4.0, 11.071, 11.071, 11.071])
    tasks = GridNavi.goals().float().repeat(2, 1)
    *_, returns = gridnavi.play(folder, tasks, options.seed)
    assert line["returns"] == pytest.approx(returns.mean(0).tolist(), abs=1e-3)
    assert (line["trials"], line["env_steps"]) == (42, 2 * 8 * 60)
    if module is varibad_ppo:
        gridnavi.belief(options)
        assert (tmp_path / "varibad_belief.png").stat().st_size > 5000
