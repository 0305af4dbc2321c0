"""benchmark/in_context.py: the tables and pictures of the docs come from what runs left and from the files' own
functions; benchmark/speed.py measures both files."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from algos import ad, dpt, rl2_ppo, varibad_ppo
from benchmark import in_context, speed
from envs.hidden_goals import DarkRoomSmall
from tests.test_dpt_math import best_returns

SMALL = ["--meta-batch-size", "8", "--iterations", "2", "--hidden-size", "16", "--layers", "1"]
SOURCE = ["--learners", "6", "--source-episodes", "8", "--keep-every", "2"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a tiny run of a file: its folder."""
    monkeypatch.setattr(in_context, "IMAGES", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(module, *flags):
        module.main([*SMALL, *(SOURCE if module is ad else []), *flags])
        return max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    run.home = tmp_path
    return run


@pytest.mark.parametrize("env_id", ["Bandit5-v0", "UniformGaussianBandit5-v0"])
def test_bandits_are_played_beside_the_classic_algorithms(finished, env_id, capsys):
    flags = ["--env-id", env_id, "--episodes-per-trial", "12"]
    folders = finished(dpt, *flags), finished(ad, *flags, "--context", "2")
    capsys.readouterr()
    in_context.bandits(in_context.Options("bandits", folders, tasks=200))
    first, second, classic = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for line in (first, second, classic):
        assert (line["env_id"], line["pulls"], line["tasks"]) == (env_id, 12, 200)
    assert set(first) > {"DPT, drawn", "DPT, greedy"}
    assert set(second) > {"AD, drawn", "AD, greedy"}
    best = "Gittins" if env_id == "Bandit5-v0" else "UCB1"
    assert set(classic) - {"env_id", "pulls", "tasks"} == {"Thompson", "UCB1", best}
    assert classic[best]["regret"][0] < first["DPT, drawn"]["regret"][0]  # that run has learned nothing yet
    assert (in_context.IMAGES / f"in_context_regret_{env_id.removesuffix('-v0')}_12.png").exists()
    with pytest.raises(SystemExit, match="as many pulls are needed"):
        in_context.bandits(in_context.Options("bandits", (folders[0], finished(dpt, "--episodes-per-trial", "11"))))


def test_regret_is_what_the_best_arm_would_have_paid_more():
    p, arm = torch.tensor([[0.2, 0.7]]), torch.tensor([[0, 1, 0]])
    torch.testing.assert_close(in_context.regret(p, arm), torch.tensor([[0.5, 0.5, 1.0]]))


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.3), (0.95, 0.15), (-0.3, 0.2), (1.2, 0.05)])
def test_draws_of_the_truncated_normal_have_its_moments(mean, std):
    """By integration of the density over [0, 1]."""
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    weight = (-0.5 * ((x - mean) / std).square()).exp()
    weight /= weight.sum()
    expected, size = (weight * x).sum(), 200_000
    variance = (weight * (x - expected).square()).sum()
    numbers = torch.full((size,), mean, dtype=torch.float64), torch.full((size,), std, dtype=torch.float64)
    drawn = in_context.truncated_normal(*numbers, torch.Generator().manual_seed(0))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert (drawn.mean() - expected).abs() < 4 * (variance / size) ** 0.5
    assert drawn.var().item() == pytest.approx(variance.item(), rel=0.02)


def test_normal_yardsticks_know_what_they_saw():
    generator = torch.Generator().manual_seed(0)
    sums, pulls = torch.tensor([[0.0, 8.0, 3.0]]).double(), torch.tensor([[0.0, 10.0, 10.0]]).double()
    scores = in_context.normal_ucb(sums, pulls, 20, generator, strength=0.2)[0].tolist()
    bound = 0.2 * (2 * math.log(21) / 10) ** 0.5
    assert scores == [math.inf, pytest.approx(0.8 + bound), pytest.approx(0.3 + bound)]
    drawn = torch.cat([in_context.normal_thompson(sums, pulls, 20, generator) for _ in range(4000)])
    assert drawn.mean(0).tolist() == pytest.approx([0.5, 0.8, 0.3], abs=0.02)
    assert drawn.std(0).tolist() == pytest.approx([1 / 12**0.5, 0.3 / 10**0.5, 0.3 / 10**0.5], rel=0.1)


def test_rooms_are_played_beside_the_source_and_the_optimum(finished, capsys):
    flags = ["--env-id", "DarkRoomSmall-v0", "--horizon", "6", "--episodes-per-trial", "4", "--context", "2"]
    sizes = ["--env-id", "DarkRoomSmall-v0", "--horizon", "6", "--episodes-per-trial", "3", "--meta-batch-size", "8"]
    for module in (rl2_ppo, varibad_ppo):
        module.main([*sizes, "--iterations", "2", "--minibatches", "2"])
    memories = sorted((finished.home / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    folders = finished(dpt, *flags), finished(ad, *flags), *memories, finished(dpt, *flags, "--seed", "2")
    capsys.readouterr()
    options = in_context.Options("rooms", folders, tasks=100)
    in_context.rooms(options)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    runs, means = [line for line in lines if "goals" in line], {}
    manners = ["drawn", "greedy", "drawn", "greedy", "drawn", "drawn", "drawn", "greedy"]
    assert [line["actions"] for line in runs] == manners
    assert [len(line["episodes"]) for line in runs] == [4, 4, 4, 4, 3, 3, 4, 4]
    assert all(line["goals"] == 17 for line in runs)
    (source,) = (line for line in lines if "source" in line)
    assert len(source["episodes"]) == 8
    means = {(line["algorithm"], line["actions"]): line for line in lines if "algorithm" in line}
    assert set(means) == {
        ("dpt", "drawn"), ("dpt", "greedy"), ("ad", "drawn"), ("ad", "greedy"), ("rl2_ppo", "drawn"),
        ("varibad_ppo", "drawn"),
    }  # fmt: skip
    both = np.array([runs[0]["episodes"], runs[6]["episodes"]])
    assert means["dpt", "drawn"]["episodes"] == pytest.approx(both.mean(0), abs=0.011)
    half = 12.706 * both.std(0, ddof=1) / 2**0.5
    assert means["dpt", "drawn"]["half_widths"] == pytest.approx(
        half, abs=0.1
    )  # two runs: one degree of freedom; rounded
    assert "half_widths" not in means["ad", "drawn"]
    tasks = in_context.test_tasks(DarkRoomSmall(1), options)
    best = sum(max(0, x) for x in best_returns(DarkRoomSmall, tasks, 6)) / 100
    assert lines[-1]["optimum"][0] == pytest.approx(best, abs=1e-3)
    with pytest.raises(SystemExit, match="allowed are Bandit5-v0"):
        in_context.bandits(in_context.Options("bandits", folders))
    with pytest.raises(SystemExit, match=r"is a run of (rl2|varibad)_ppo; allowed are dpt, ad"):
        in_context.bandits(in_context.Options("bandits", tuple(memories)))
    longer = finished(dpt, *flags, "--horizon", "7")
    with pytest.raises(SystemExit, match="runs in one room and of one horizon are needed"):
        in_context.rooms(in_context.Options("rooms", (folders[0], longer), tasks=10))


@pytest.mark.parametrize("name", ["dpt", "ad"])
def test_speed_prints_one_line(name, monkeypatch, capsys):
    flags = "--meta-batch-size 6 --episodes-per-trial 5 --context 3 --iterations 2 --hidden-size 16"
    flags += " --learners 4 --source-episodes 8 --keep-every 2 --horizon 5" if name == "ad" else ""
    monkeypatch.setattr(sys, "argv", ["speed.py", name, *flags.split()])
    speed.main()
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["algorithm"] == name
    assert result["positions_per_iteration"] == 6 * {"dpt": 3 + 1, "ad": 4 * 5}[name]
    assert result["positions_per_s"] > 0 < result["update_s"]
    assert name == "dpt" or (result["histories_steps"], result["histories_s"] > 0) == (4 * 8 * 5, True)
