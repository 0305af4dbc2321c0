"""benchmark/fisher.py: what it compares, on a tiny run."""

import json
import sys

import pytest
import torch

from algos import maml_trpo
from benchmark import fisher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one iteration, with large inner steps, so that the second order matters."""
    here = tmp_path_factory.mktemp("run")
    flags = "--env-id Navigation2D-v0 --action-scale 1 --meta-batch-size 8 --episodes-per-task 8 --horizon 10 "
    flags += "--iterations 1 --hidden-size 16 --inner-lr 5 --cg-damping 1e-3"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        maml_trpo.main(flags.split())
    (run,) = (here / "runs").iterdir()
    return run


def test_flags_and_policy_are_those_of_the_run(folder):
    args, theta = fisher.saved(folder)
    assert (args.meta_batch_size, args.horizon, args.inner_lr) == (8, 10, 5)
    assert theta["w0"].shape == (2, 16)
    assert not torch.equal(theta["log_std"], torch.zeros(2))  # trained, not new


def test_the_data_of_a_choice():
    batch = maml_trpo.Episodes(*(torch.arange(80.0).view(8, 10, 1) for _ in range(8)))
    for name, (support, query, _) in fisher.choices(batch, batch, None).items():
        tasks = 2 if "quarter of the tasks" in name else 4 if "half" in name else 8
        queries = 2 if "quarter of the query" in name or "and query" in name else 1 if "tenth" in name else 10
        assert support.mask.shape[:2] == (tasks, 2 if "support and" in name else 10), name
        assert query.mask.shape[:2] == (tasks, queries), name
        assert query.mask[0, 0] == 0


def test_it_measures(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fisher.py", str(folder), "--batches", "2"])
    fisher.main()
    result = json.loads(capsys.readouterr().out)
    choices = result.pop("choices")
    assert result == {"env_id": "Navigation2D-v0", "tasks": 8, "episodes": 8, "batches": 2}
    assert choices["everything"]["cosine"] == choices["everything"]["lowest_cosine"] == pytest.approx(1)
    for name, found in choices.items():
        assert found["lowest_cosine"] <= found["cosine"] <= 1
        assert found["rise"] > 0, name
    assert choices["a quarter of the query"]["cosine"] > choices["a quarter of support and query"]["cosine"]
    assert choices["a quarter of the query"]["cosine"] > choices["everything, first order"]["cosine"]
