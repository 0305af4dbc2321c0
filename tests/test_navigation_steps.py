"""benchmark/navigation_steps.py, what later steps of MAML bring on Navigation2D, and its table in the docs."""

import json
import os
from pathlib import Path

import pytest
import torch

from algos import maml_trpo
from benchmark import navigation_steps as study
from envs import make

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--env-id", "Navigation2D-v0", "--action-scale", "1", "--meta-batch-size", "3", "--episodes-per-task", "2"]
FLAGS += ["--horizon", "5", "--hidden-size", "8", "--iterations", "1", "--eval-steps", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home, before = tmp_path_factory.mktemp("run"), Path.cwd()
    os.chdir(home)
    try:
        maml_trpo.main(FLAGS)
    finally:
        os.chdir(before)
    return next(home.glob("runs/*"))


def test_steps_have_the_schedules_lengths_and_both_ways_of_playing_the_same_policies(folder, monkeypatch):
    played, seen, collect, adapt = [], [], maml_trpo.collect, maml_trpo.adapt

    def spy(envs, tasks, params, args, generator):
        batch = collect(envs, tasks, params, args, generator)
        played.append((params, batch))
        seen.append(tasks)
        return batch

    monkeypatch.setattr(maml_trpo, "collect", spy)
    sampled, means = study.returns(folder, (1, 0.5, 0.25))
    assert sampled == pytest.approx([float(batch.reward.sum(-1).mean()) for _, batch in played[::2]])
    assert means == pytest.approx([float(batch.reward.sum(-1).mean()) for _, batch in played[1::2]])
    assert len(sampled) == len(means) == 4
    _, args, _ = study.load(folder)
    goals, _ = make("Navigation2D-v0", 1, 5, False, 1.0).unwrapped.test_set(100)
    for (_, batch), given in zip(played, seen, strict=True):
        assert batch.reward.shape == (100, 40, 5)
        assert torch.equal(given, goals)
    for k, scale in enumerate((1, 0.5, 0.25)):
        expected = adapt(*played[2 * k], args, scale)
        assert all(torch.equal(value, expected[name]) for name, value in played[2 * k + 2][0].items())
    for (noisy, _), (still, batch) in zip(played[::2], played[1::2], strict=True):
        assert all(torch.equal(still[name], value) for name, value in noisy.items() if name != "log_std")
        mean, std = maml_trpo.policy(still, batch.obs.flatten(1, 2))
        assert std.max() < 2e-6
        assert (batch.action.flatten(1, 2) - mean).abs().max() < 1e-5


def test_runs_of_other_files_are_refused(folder, monkeypatch):
    monkeypatch.setattr(study, "load", lambda path: (json, None, None))
    with pytest.raises(SystemExit, match="not of maml_trpo"):
        study.returns(folder, (1,))


@pytest.mark.skipif(not study.RESULT.exists(), reason="no result is kept")
def test_the_pages_table_is_the_kept_result():
    page, result = (ROOT / "docs/curves.md").read_text(), json.loads(study.RESULT.read_text())
    assert list(result["schedules"]) == list(study.SCHEDULES)
    for shown in result["schedules"].values():
        cells = [" / ".join(f"{value:.1f}" for value in shown[what]["mean"]) for what in ("sampled", "means")]
        assert f"| {cells[0]} | {cells[1]} |" in page
    low, high = min(result["standard_deviations"]), max(result["standard_deviations"])
    assert f"a standard deviation of {low:.2f} to {high:.2f}" in page
