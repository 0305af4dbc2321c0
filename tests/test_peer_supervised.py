"""benchmark/peer_supervised.py computes what algos/ does for supervised files; benchmark/speed.py runs."""

import importlib
import json
import sys

import pytest
import torch
from torch import Generator

from benchmark import peer_supervised, speed
from envs import fewshot
from envs.fewshot import Glyphs
from envs.optimisees import Quadratics
from envs.regression import Sinusoid
from tests.double_precision import seeded
from tests.test_gpu_path import images

NAMES = ("maml", "fomaml", "reptile")
CASES = [(name, env_id, {}) for name in NAMES for env_id in ("Sinusoid-v0", "Glyphs-v0")]
CASES += [(name, "Glyphs-v0", {"mlp": True}) for name in NAMES]
CASES += [("reptile", "Sinusoid-v0", {"inner_optimizer": "adam"}), ("reptile", "Glyphs-v0", {"inner_optimizer": "sgd"})]


@pytest.fixture(scope="module")
def families():
    return {"Sinusoid-v0": Sinusoid(dtype=torch.float64), "Glyphs-v0": Glyphs(3, "cpu", torch.float64, 40, 4)}


@pytest.fixture
def _float64():
    """torchopt's Adam takes beta2 ** step in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize(("name", "env_id", "flags"), CASES, ids=str)
@pytest.mark.parametrize("other", ["LOOP", "TORCHOPT"])
def test_gradients_agree(other, name, env_id, flags, inner_steps, families):
    if other == "TORCHOPT":
        pytest.importorskip("torchopt")
    algorithm, tasks, generator = importlib.import_module(f"algos.{name}"), families[env_id], Generator().manual_seed(3)
    sizes = {"meta_batch_size": 3, "ways": 3, "inner_steps": inner_steps, "hidden_sizes": (6, 5), "inner_lr": 0.05}
    args = algorithm.Args(env_id=env_id, **sizes, **flags)
    theta = {name: value.double() for name, value in algorithm.init_params(tasks, args, generator).items()}
    theta = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in theta.items()}
    batch = tasks.sample_tasks(args.meta_batch_size, generator)
    if name == "reptile":
        moments = algorithm.no_moments(theta)
        if other == "LOOP":
            squares = {name: torch.rand(value.shape, generator=generator) for name, value in theta.items()}
            moments = moments._replace(second_moment=squares, steps=5)
        inputs = (theta, moments, tasks.sample(batch, (2,) * inner_steps, generator), args)
    else:
        support, query = tasks.sample(batch, (2, 2), generator)
        inputs = (theta, support, query, args)
    before = {name: value.clone() for name, value in theta.items()}
    gradient, *_, mean_loss = getattr(algorithm, f"{name}_gradient")(*inputs)
    peer_gradient, peer_loss = getattr(peer_supervised, other)[name](*inputs)
    assert gradient.keys() == peer_gradient.keys()
    for key, value in gradient.items():
        assert value.abs().max() > 1e-6
        torch.testing.assert_close(peer_gradient[key], value, rtol=1e-8, atol=1e-8)
        assert torch.equal(theta[key], before[key])
    torch.testing.assert_close(peer_loss, mean_loss, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [{}, {"matching": True}, {"mlp": True}], ids=str)
def test_gradients_of_prototypes_agree(flags, families):
    algorithm, tasks, generator = importlib.import_module("algos.protonet"), families["Glyphs-v0"], seeded(3)
    args = algorithm.Args(hidden_sizes=(6, 5), **flags)
    theta = {name: 0.5 * value for name, value in algorithm.init_embedding(tasks, args, generator).items()}
    sets = tasks.sample(tasks.sample_tasks(3, generator), (2, 2), generator)
    gradient, stats = algorithm.protonet_gradient(theta, *sets, args)
    peer_gradient, peer_stats = peer_supervised.LOOP["protonet"](theta, *sets, args)
    assert min(float(value.abs().max()) for value in gradient.values()) > 1e-6
    torch.testing.assert_close(peer_gradient, gradient, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(peer_stats, stats, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("_float64")
def test_gradients_of_a_reader_agree(families):
    algorithm, tasks, generator = importlib.import_module("algos.in_context"), families["Sinusoid-v0"], seeded(3)
    args = algorithm.Args(hidden_size=32, layers=2)
    theta = algorithm.init_reader(tasks, args, generator)
    theta = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in theta.items()}
    sets = tasks.sample(tasks.sample_tasks(3, generator), (4, 5), generator)
    gradient, stats = algorithm.in_context_gradient(theta, *sets, args)
    peer_gradient, peer_stats = peer_supervised.LOOP["in_context"](theta, *sets, args)
    assert min(float(value.abs().max()) for value in gradient.values()) > 1e-6
    torch.testing.assert_close(peer_gradient, gradient, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(peer_stats, stats, rtol=1e-8, atol=1e-8)


def test_speed_of_a_reader(monkeypatch, capsys):
    flags = "in_context --meta-batch-size 2 --hidden-size 16 --layers 1 --iterations 1"
    result = speed_line(flags, monkeypatch, capsys)
    assert result["loop_tasks_per_s"] > 0 < result["tasks_per_s"]


def test_speed_of_a_learned_optimizer(monkeypatch, capsys):
    flags = "learned_optimizer --meta-batch-size 2 --hidden-size 4 --steps 4 --unroll 2 --iterations 1"
    result = speed_line(flags, monkeypatch, capsys)
    assert result["loop_tasks_per_s"] > 0 < result["tasks_per_s"]
    assert "torchopt_tasks_per_s" not in result


def test_the_gradient_of_a_learned_optimizer_agrees():
    module, optimisees = importlib.import_module("algos.learned_optimizer"), Quadratics(dtype=torch.float64)
    args, generator = module.Args(hidden_size=4), seeded(0)
    theta = {name: x.double() for name, x in module.init_optimizer(optimisees, args, generator).items()}
    tasks = optimisees.sample_tasks(3, generator)
    params = optimisees.start(tasks, generator)
    inputs = (optimisees, theta, (params, module.first_memory(params, args)), tasks, [None] * 5, args)
    ours, peers = module.meta_gradient(*inputs), peer_supervised.LOOP["learned_optimizer"](*inputs)
    torch.testing.assert_close(peers, ours, rtol=1e-8, atol=1e-8)


def test_speed_of_prototypes(monkeypatch, capsys):
    monkeypatch.setattr(fewshot, "draw_glyphs", images)
    flags = "protonet --meta-batch-size 2 --train-ways 3 --hidden-sizes 4 --iterations 1"
    result = speed_line(flags, monkeypatch, capsys)
    assert result["loop_tasks_per_s"] > 0 < result["tasks_per_s"]
    assert "torchopt_tasks_per_s" not in result


def speed_line(flags: str, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split()])
    speed.main()
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name", NAMES)
def test_speed_prints_one_line(name, monkeypatch, capsys):
    flags = f"{name} --meta-batch-size 2 --hidden-sizes 4 --shots 2 --iterations 1"
    result = speed_line(flags, monkeypatch, capsys)
    others = ["loop"] + ["torchopt"] * bool(peer_supervised.torchopt)
    assert (result["torchopt"] == "not installed") == (len(others) == 1)
    for key in ("tasks_per_s", "iteration_s", "gradient_s", "gradient_cpu_s", "cpu_s_per_iteration"):
        assert result[key] > 0
    assert result["tasks_per_s"] == pytest.approx(2 / result["iteration_s"], rel=1e-3)
    for other in others:
        assert result[f"{other}_gradient_s"] > 0 < result[f"{other}_gradient_cpu_s"]
        rate = result["tasks_per_s"] / result[f"speedup_over_{other}"]
        assert result[f"{other}_tasks_per_s"] == pytest.approx(rate, rel=1e-3)
    assert result["algorithm"] == name
    assert result["args"]["meta_batch_size"] == 2
    assert {"iterations", "torch_threads", "cpus", "omp", "load_at_start", "device", "versions"} <= result.keys()


def test_torchopt_is_left_out_where_it_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(peer_supervised, "torchopt", None)
    result = speed_line("maml --meta-batch-size 2 --hidden-sizes 4 --iterations 1", monkeypatch, capsys)
    assert result["torchopt"] == "not installed"
    assert [key for key in result if "torchopt" in key] == ["torchopt"]
