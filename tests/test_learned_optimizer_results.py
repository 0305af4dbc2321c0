"""benchmark/learned_optimizer.py: grids whose best is not at an edge, classic optimisers one by one, the files."""

import json
import math
import sys

import pytest
import torch

from algos import learned_optimizer as algorithm
from benchmark import learned_optimizer
from envs import summarise
from envs.optimisees import Quadratics


@pytest.mark.parametrize("best", [0.03, 1.0, 1.9, 60.0])
def test_a_grid_grows_until_its_best_is_inside(best):
    grid = learned_optimizer.best_step_size(
        lambda lr: math.inf if lr > 2 * best else abs(math.log(lr / best)), start=1.0
    )
    chosen = min(grid, key=grid.get)
    assert min(grid) < chosen < max(grid)
    assert abs(math.log10(chosen / best)) <= 0.126  # half of a grid's distance
    assert list(grid) == sorted(grid)


@pytest.mark.parametrize("name", learned_optimizer.CLASSIC)
def test_all_functions_at_once_are_each_by_itself(name):
    generator, family = torch.Generator().manual_seed(0), Quadratics()
    tasks = family.sample_tasks(3, generator)
    start, optimizer = family.start(tasks, generator), learned_optimizer.CLASSIC[name][1]
    together = learned_optimizer.descend(family, optimizer, 0.003, start, tasks, [None] * 6)
    alone = [
        learned_optimizer.descend(family, optimizer, 0.003, start[i : i + 1], tasks[i : i + 1], [None] * 6)
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-4)
    assert together[-1] < together[0]
    x, (matrix, y) = start[0].clone(), (tasks[0, :100].view(10, 10), tasks[0, 100:])
    if name == "SGD":
        for _ in range(5):
            x = x - 0.003 * 2 * matrix.T @ (matrix @ x - y)
        assert float(alone[0][-1]) == pytest.approx(float((matrix @ x - y).square().sum()), rel=1e-4)


def test_what_diverges_is_infinite():
    generator, family = torch.Generator().manual_seed(0), Quadratics()
    tasks = family.sample_tasks(3, generator)
    start = family.start(tasks, generator)
    curve = learned_optimizer.descend(family, learned_optimizer.CLASSIC["SGD"][1], 1e3, start, tasks, [None] * 40)
    assert math.isinf(curve[-1])


def test_the_comparison_is_written_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learned_optimizer, "IMAGES", tmp_path)
    monkeypatch.setattr(learned_optimizer, "RESULTS", tmp_path)
    flags = ["--iterations", "1", "--meta-batch-size", "2", "--tasks", "20", "--steps", "120"]
    monkeypatch.setattr(sys, "argv", ["learned_optimizer.py", *flags])
    learned_optimizer.main()
    result = json.loads((tmp_path / "Quadratics.json").read_text())
    assert (tmp_path / "learned_optimizer_Quadratics.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == 5
    for name in learned_optimizer.CLASSIC:
        grid = {float(lr): math.inf if x == "diverges" else x for lr, x in result[name]["grid"].items()}
        best = min(grid, key=grid.get)
        assert min(grid) < best < max(grid)
        assert result[name]["lr"] == pytest.approx(best, rel=1e-2)
        assert len(result[name]["loss"]) == 121
    # The learned one's curve is that of the file's own evaluation, and all begin at the same places.
    args = algorithm.Args(eval_tasks=20, eval_steps=120, meta_batch_size=2, iterations=1)
    theta, _ = learned_optimizer.learned(learned_optimizer.Options(iterations=1, meta_batch_size=2))
    stats = summarise(algorithm.evaluate(Quadratics(), theta, args))
    assert result["learned"]["loss"][0] == pytest.approx(result["SGD"]["loss"][0], rel=1e-5)
    assert result["learned"]["loss"][100] == pytest.approx(stats["test/loss_k100"], rel=1e-3)
