"""benchmark/emergence.py: agents against loops over one world, the regression against a simulation whose weights are
known and the bootstrap, and what is read off a network's trials against what its worlds did."""

import json
import math
import os
import random

import pytest
import torch

from algos import rl2_ppo
from benchmark import emergence
from benchmark.emergence import Choices, Options
from envs.experiments import TwoStep

SMALL = ["--meta-batch-size", "8", "--minibatches", "2", "--iterations", "2"]
SMALL += ["--hidden-size", "16", "--eval-every", "1"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def some_past(trials=12, worlds=7):
    """Choice, place and reward of each trial, by chance."""
    generator = seeded(1)
    draw = torch.randint(2, (trials, 3, worlds), generator=generator)
    return [(choice, place, reward.float()) for choice, place, reward in draw]


@pytest.mark.parametrize(("rate", "slope"), [(0.2, 3.0), (0.9, 10.0)])
def test_model_free_against_loop(rate, slope):
    past = some_past()
    for world in range(7):
        q = [0.5, 0.5]
        for choice, _, reward in past:
            q[int(choice[world])] = (1 - rate) * q[int(choice[world])] + rate * float(reward[world])
        expected = math.exp(slope * q[1]) / (math.exp(slope * q[0]) + math.exp(slope * q[1]))
        assert float(emergence.model_free(past, rate, slope)[world]) == pytest.approx(expected, rel=1e-5)
    assert emergence.model_free([], rate, slope).tolist() == [0.5]


def test_belief_against_every_history():
    """Sums over all sequences of the better place, of their prior times the likelihood of the rewards."""
    past = some_past(trials=6)
    for world in range(7):
        total = [0.0, 0.0]
        for code in range(2**7):
            better = [code >> t & 1 for t in range(7)]  # before each trial, and now
            weight = 0.5
            for t, (_, place, reward) in enumerate(past):
                p = 0.9 if int(place[world]) == better[t] else 0.1
                weight *= p if float(reward[world]) else 1 - p
                weight *= 0.025 if better[t + 1] != better[t] else 0.975
            total[better[6]] += weight
        assert float(emergence.belief(past)[world]) == pytest.approx(total[1] / sum(total), rel=1e-5)
    one_N = emergence.belief(past)
    assert emergence.planner(past).tolist() == (one_N > 0.5).float().tolist()
    assert emergence.planner([]).tolist() == [0.5]


def test_regression_finds_the_weights_and_their_spread():
    """Trials of a world share an error: intervals are those of a bootstrap of worlds, not those of single trials."""
    generator = seeded(2)
    x = torch.cat([torch.ones(200, 30, 1), torch.randn(200, 30, 2, generator=generator)], -1).double()
    x[..., 2] += torch.randn(200, 1, generator=generator)  # a predictor that is much the same in all trials of a world
    error = torch.randn(200, 1, generator=generator) + torch.randn(200, 30, generator=generator)
    y = x @ torch.tensor([0.3, -1.0, 2.0]).double() + error
    weight, half = emergence.regression(x, y)
    expected = torch.linalg.lstsq(x.flatten(0, 1), y.flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)
    repeats = []
    for _ in range(400):
        rows = torch.randint(200, (200,), generator=generator)
        repeats.append(torch.linalg.lstsq(x[rows].flatten(0, 1), y[rows].flatten()[:, None]).solution[:, 0])
    torch.testing.assert_close(half, 1.96 * torch.stack(repeats).std(0), rtol=0.15, atol=0)
    assert (weight - torch.tensor([0.3, -1.0, 2.0]).double()).abs().le(1.5 * half).all()


def test_findings_are_of_the_right_trials():
    """Three agents that choose by the last trial alone, as told in four trials of five, else the opposite."""
    generator = random.Random(0)
    for rule, name in (
        (lambda c, r, w: c if r else 1 - c, "choice x reward 1"),
        (lambda c, r, w: c if w else 1 - c, "choice x way 1"),
        (lambda c, r, w: c if r == w else 1 - c, "choice x reward x way 1"),
    ):
        choice = [[generator.randrange(2)] for _ in range(400)]
        way, reward = ([[generator.randrange(2) for _ in range(60)] for _ in range(400)] for _ in range(2))
        for row, ways, rewards in zip(choice, way, reward, strict=True):
            for t in range(59):
                told = rule(row[t], rewards[t], ways[t])
                row.append(told if generator.random() < 0.8 else 1 - told)
        choice, way, reward = (torch.tensor(x) for x in (choice, way, reward))
        found = emergence.findings(Choices(choice, torch.where(way == 1, choice, 1 - choice), reward.float()))
        weights = dict(found["weights"])
        assert weights.pop(name)[0] == pytest.approx(0.6, abs=0.03)
        assert all(abs(weight) < 0.03 for weight, _ in weights.values())
        for kind, share in found["stay"].items():
            paid, common = int(kind.endswith(" rewarded")), int(kind.startswith("common"))
            assert share == pytest.approx(0.8 if rule(1, paid, common) == 1 else 0.2, abs=0.03)
        assert found["reward"][0] == pytest.approx(float(reward.float().mean()), abs=1e-3)


def test_only_who_knows_the_ways_lets_them_count():
    options = Options("two_step", (), worlds=300)
    free = emergence.findings(emergence.play(lambda past: emergence.model_free(past, 0.2, 32.0), options, 5))
    planned = emergence.findings(emergence.play(emergence.planner, options, 5))
    name = "choice x reward x way 1"
    assert abs(free["weights"][name][0]) < 0.02 < 0.1 < free["weights"]["choice x reward 1"][0]
    assert abs(planned["weights"]["choice x reward 1"][0]) < 0.02 < 0.2 < planned["weights"][name][0]
    assert 0.63 < free["reward"][0] < 0.68 < 0.69 < planned["reward"][0] < 0.73


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Runs a file to its end, in a folder of its own; the run's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emergence, "IMAGES", tmp_path)

    def run(*flags):
        rl2_ppo.main([*SMALL, *flags])
        return max((tmp_path / "runs").iterdir(), key=os.path.getmtime)

    return run


def test_a_networks_trials_are_what_its_worlds_did(finished, monkeypatch):
    folder = finished("--env-id", "TwoStep-v0", "--episodes-per-trial", "1")
    seen, advance = [], TwoStep._advance

    def watch(self, action):
        before = self._obs.clone()
        result = advance(self, action)
        seen.append((before, action.clone(), result[0].clone(), self._paid.clone()))
        return result

    monkeypatch.setattr(TwoStep, "_advance", watch)
    played = emergence.play_run(folder, Options("two_step", (folder,), worlds=20))
    assert len(seen) == 200
    for trial in range(100):
        start, choice, place, _ = seen[2 * trial]
        assert start[:, 0].all()
        assert torch.equal(played.choice[:, trial], choice)
        assert torch.equal(played.place[:, trial], place[:, 1:].argmax(1))
        assert torch.equal(played.reward[:, trial], seen[2 * trial + 1][3])


def test_results_and_pictures(finished, tmp_path):
    folder = finished("--env-id", "TwoStep-v0", "--episodes-per-trial", "1")
    found = emergence.two_step(Options("two_step", (folder,), worlds=20))
    assert set(found["agents"]) == {"model-free", "planner", f"RL2, {folder.name}"}
    assert 0.4 < found["agents"][f"RL2, {folder.name}"]["reward"][0] < 0.6
    assert json.loads(json.dumps(found)) == found
    folder = finished("--env-id", "Harlow-v0", "--episodes-per-trial", "6")
    rows = emergence.harlow(Options("harlow", (folder,)))["runs"][folder.name]
    assert [(row["iteration"], row["tasks"]) for row in rows] == [(1, 8), (2, 16)]
    assert all(len(row["right"]) == 6 for row in rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {"emergence_two_step.png", "emergence_harlow.png"}
    with pytest.raises(SystemExit, match="is a run on Harlow-v0"):
        emergence.two_step(Options("two_step", (folder,)))
