"""benchmark/supervised.py: the pictures and tables of the docs are made, from what the files' own functions give."""

import json

import pytest
import torch

from algos import maml, reptile
from benchmark import supervised
from envs import summarise
from envs.regression import Sinusoid


@pytest.fixture
def made(tmp_path, monkeypatch):
    """What a command writes, in small."""
    monkeypatch.setattr(supervised, "IMAGES", tmp_path)
    monkeypatch.setattr(supervised, "RESULTS", tmp_path)
    for module in (maml, reptile):
        small = module.CURVES | {"meta_batch_size": 3}
        monkeypatch.setattr(module, "CURVES", small)

    def run(what, name, **flags):
        getattr(supervised, what)(supervised.Options(what, tasks=20, **flags))
        return json.loads((tmp_path / f"{name}.json").read_text()), {path.name for path in tmp_path.glob("*.png")}

    return run


def test_sinusoid(made):
    result, pictures = made("sinusoid", "sinusoid_7shot", iterations=20, shots=7)
    assert pictures == {"sinusoid_7shot_fits.png", "sinusoid_7shot_steps.png"}
    lengths = {name: len(result[name]["loss"]) for name in ("maml", "fomaml", "reptile", "pretrained", "random")}
    assert lengths == {"maml": 11, "fomaml": 11, "reptile": 51, "pretrained": 11, "random": 11}
    args = maml.Args(shots=7, eval_tasks=20)
    theta = maml.init_params(Sinusoid(), args, torch.Generator().manual_seed(1))
    stats = summarise(maml.evaluate(Sinusoid(), theta, args))
    assert result["random"]["loss"][0] == pytest.approx(stats["test/loss_k0"], abs=1e-4)
    assert result["random"]["inner_lr"] in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)
    assert result["pretrained"]["loss"][0] < result["random"]["loss"][0]  # it has learned the mean of all tasks


def test_pretraining_is_joint_training(made):
    args = maml.Args(iterations=3)
    theta = maml.init_params(Sinusoid(), args, generator := torch.Generator().manual_seed(args.seed))
    params = {name: value.clone().requires_grad_() for name, value in theta.items()}
    optimizer = torch.optim.Adam(params.values(), args.outer_lr)
    for _ in range(3):
        tasks = Sinusoid().sample_tasks(3, generator)
        ((x, y),) = Sinusoid().sample(tasks, (20,), generator)
        optimizer.zero_grad()
        sum(maml.loss(params, x[i], y[i]) / 3 for i in range(3)).backward()
        optimizer.step()
    for name, value in supervised.pretrained(args).items():
        torch.testing.assert_close(value, params[name].detach(), rtol=1e-4, atol=1e-6)


def test_stream(made):
    result, pictures = made("stream", "stream", iterations=20)
    assert pictures == {"reptile_stream.png"}
    assert len(result) == 4
    for label in result.keys() - {"command"}:
        assert result[label]["minibatches per task slot"] == list(range(5, 101, 5))  # as many for each method
        assert len(result[label]["loss after 32 steps"]) == 20


def test_mixtures(made):
    result, pictures = made("mixtures", "mixtures", iterations=10)
    assert pictures == {"reptile_mixtures.png"}
    args = reptile.Args(inner_steps=4, outer_lr=0.25, eval_tasks=10, eval_steps=10)  # all four: Reptile, not annealed
    theta = reptile.init_params(Sinusoid(), args, generator := torch.Generator().manual_seed(args.seed))
    for expected in result["loss after 10 steps"]["g1+g2+g3+g4"]:
        loss = float(reptile.evaluate(Sinusoid(), theta, reptile.no_moments(theta), args)["test/loss_k10"].mean())
        assert loss == pytest.approx(expected, abs=2e-3)
        batches = Sinusoid().sample(Sinusoid().sample_tasks(3, generator), (10,) * 4, generator)
        gradient, _, _ = reptile.reptile_gradient(theta, reptile.no_moments(theta), batches, args)
        theta = {name: value - 0.25 * gradient[name] for name, value in theta.items()}
