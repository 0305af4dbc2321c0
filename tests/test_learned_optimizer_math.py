"""The mathematics of algos/learned_optimizer.py against torch.nn.LSTM, central differences and loops, in float64; and
the functions of envs/optimisees.py against their formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from algos import learned_optimizer
from envs import fewshot, summarise
from envs.optimisees import GlyphNets, Quadratics
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64: by being here)
from tests.test_gpu_path import images
from tests.test_supervised_math import close, relative_error

N = 3


def make_args(**kwargs):
    usual = {"meta_batch_size": N, "hidden_size": 5, "steps": 6, "unroll": 3, "eval_steps": 4, "eval_tasks": 7}
    return learned_optimizer.Args(**usual | kwargs)


def quadratics():
    return Quadratics(dtype=torch.float64)


def make_theta(args, seed=0):
    theta = learned_optimizer.init_optimizer(quadratics(), args, seeded(seed))
    return {name: value + 0.1 * torch.randn(value.shape, generator=seeded(seed)) for name, value in theta.items()}


def make_start(args, seed=0):
    """Tasks, and parameters with the memory that belongs to them."""
    tasks = quadratics().sample_tasks(N, seeded(seed))
    params = quadratics().start(tasks, seeded(seed))
    return tasks, (params, learned_optimizer.first_memory(params, args))


def test_preprocessing_is_that_of_the_paper():
    small = math.exp(-10)
    g = torch.tensor([[0.0, 3.0, -3.0, small, -small, small / 3, -small / 5, 1e-30, -1e20, 0.99 * small]])
    expected = []
    for x in g[0].tolist():
        large = abs(x) >= small
        expected.append([math.log(abs(x)) / 10, math.copysign(1, x)] if large else [-1, math.exp(10) * x])
    close(learned_optimizer.preprocess(g), torch.tensor(expected))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_updates_are_those_of_torch_lstm_on_each_coordinate_alone(layers):
    args = make_args(layers=layers)
    theta, gradients = make_theta(args), torch.randn(4, N, 10, generator=seeded(1))
    lstm = nn.LSTM(2, 5, num_layers=layers)
    for i in range(layers):
        for ours, name in (("w_input", "ih"), ("w_hidden", "hh"), ("b_input", "ih"), ("b_hidden", "hh")):
            kind = "weight" if ours[0] == "w" else "bias"
            getattr(lstm, f"{kind}_{name}_l{i}").data = theta[f"{ours}{i}"]
    memory, changes = learned_optimizer.first_memory(gradients[0], args), []
    for gradient in gradients:
        change, memory = learned_optimizer.update(theta, gradient, memory, args)
        changes.append(change)
    for i, k in ((0, 0), (1, 7), (2, 9)):
        sequence = learned_optimizer.preprocess(gradients[:, i, k])[:, None]
        output = functional.linear(lstm(sequence)[0], theta["w_out"], theta["b_out"]).flatten()
        close(torch.stack(changes)[:, i, k], 0.1 * output.detach())


def test_the_gradient_is_that_of_the_losses_with_gradients_as_data():
    """Central differences of the sum of f, the optimisee's gradients being those that were seen at theta itself."""
    args = make_args()
    theta, (tasks, start) = make_theta(args), make_start(args)
    gradient, end, last = learned_optimizer.meta_gradient(quadratics(), theta, start, tasks, [None] * 6, args)
    seen, (params, memory) = [], start
    for _ in range(5):
        seen.append(torch.stack([2 * w.T @ (w @ x - y) for w, x, y in matrices(tasks, params)]))
        change, memory = learned_optimizer.update(theta, seen[-1], memory, args)
        params = params + change
    close(end[0], params)
    close(last, quadratics().loss(params, tasks, None).mean())

    def objective(theta, gradients):
        total, (params, memory) = 0.0, start
        for known in gradients or [None] * 5:
            if known is None:
                known = torch.stack([2 * w.T @ (w @ x - y) for w, x, y in matrices(tasks, params)])
            change, memory = learned_optimizer.update(theta, known, memory, args)
            params = params + change
            total += sum(float((w @ x - y) @ (w @ x - y)) for w, x, y in matrices(tasks, params)) / N
        return total

    actual, expected, through = [], [], []
    for name in theta:
        direction = torch.randn(theta[name].shape, generator=seeded(0))
        direction, h = direction / direction.norm(), 1e-6
        for known, found in ((seen, expected), (None, through)):
            ends = [objective(theta | {name: theta[name] + step * direction}, known) for step in (h, -h)]
            found.append((ends[0] - ends[1]) / (2 * h))
        actual.append(float((gradient[name] * direction).sum()))
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) < 1e-6
    # The control: with the derivative through the optimisee's gradients it is another one.
    assert relative_error(torch.tensor(actual), torch.tensor(through)) > 1e-4


def matrices(tasks, params):
    return [(task[:100].reshape(10, 10), x, task[100:]) for task, x in zip(tasks, params, strict=True)]


def test_truncation_that_covers_all_steps_is_none():
    """And shorter parts lead to the same places, with another gradient."""
    args = make_args()
    theta, (tasks, start) = make_theta(args), make_start(args)
    whole, end, _ = learned_optimizer.meta_gradient(quadratics(), theta, start, tasks, [None] * 7, args)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    _, losses = learned_optimizer.minimise(quadratics(), leaves, start, tasks, [None] * 7, args)
    expected = torch.autograd.grad(sum(x.mean() for x in losses), list(leaves.values()))
    close(flat(whole), torch.cat([x.flatten() for x in expected]))
    place, parts = start, []
    for _ in range(2):
        part, place, _ = learned_optimizer.meta_gradient(quadratics(), theta, place, tasks, [None] * 4, args)
        parts.append(flat(part))
    close(place[0], end[0])
    for name, value in end[1].items():
        close(place[1][name], value)
        assert not place[1][name].requires_grad
    assert relative_error(sum(parts), flat(whole)) > 1e-3


def test_training_is_the_obvious_loop():
    args, run = make_args(iterations=2, eval_every=2, lr=0.01), Recorder(make_args(iterations=2, eval_every=2))
    theta, optimisees = make_theta(args), quadratics()
    state = {"iteration": 0, "env_steps": 0, "theta": dict(theta), "generator": seeded(5).get_state()}
    learned_optimizer.train(optimisees, args, run, state)
    generator, params = seeded(5), {name: value.clone().requires_grad_() for name, value in theta.items()}
    adam, lasts = torch.optim.Adam(params.values()), []
    for iteration in range(2):
        adam.param_groups[0]["lr"] = (0.01, 0.005)[iteration]
        tasks = optimisees.sample_tasks(N, generator)
        x = optimisees.start(tasks, generator)
        memory = learned_optimizer.first_memory(x, args)
        for _ in range(2):
            x, memory, total = x.detach(), {name: value.detach() for name, value in memory.items()}, 0.0
            for _ in range(3):
                gradient = torch.stack([2 * w.T @ (w @ z - y) for w, z, y in matrices(tasks, x.detach())])
                change, memory = learned_optimizer.update(params, gradient, memory, args)
                x = x + change
                total = total + optimisees.loss(x, tasks, None).mean()
            adam.zero_grad()
            total.backward()
            adam.step()
        lasts.append(float(optimisees.loss(x.detach(), tasks, None).mean()))
    close(flat(state["theta"]), flat(params).detach(), 1e-8)
    assert [entry[:2] for entry in run.logged] == [(1, N * 6), (2, 2 * N * 6)]
    assert [stats["train/loss_post"] for *_, stats in run.logged] == pytest.approx(lasts)


def test_evaluation_is_the_fixed_test_set_and_its_losses():
    args = make_args()
    theta, optimisees = make_theta(args), quadratics()
    actual = learned_optimizer.evaluate(optimisees, theta, args)
    tasks, generator = quadratics().test_set(7)
    x = optimisees.start(tasks, generator)
    memory, table = learned_optimizer.first_memory(x, args), []
    for _ in range(5):
        table.append(torch.stack([(w @ z - y) @ (w @ z - y) for w, z, y in matrices(tasks, x)]))
        gradient = torch.stack([2 * w.T @ (w @ z - y) for w, z, y in matrices(tasks, x)])
        change, memory = learned_optimizer.update(theta, gradient, memory, args)
        x = x + change
    assert list(actual) == [*(f"test/loss_k{k}" for k in range(5)), "test/ci95", "test/gain_ci95"]
    for k, expected in enumerate(table):
        close(actual[f"test/loss_k{k}"], expected)
    assert summarise(actual)["test/ci95"] == pytest.approx(interval(table[-1], tasks), rel=1e-4)
    assert summarise(actual)["test/gain_ci95"] == pytest.approx(interval(table[-1] - table[0], tasks), rel=1e-4)


def test_the_nets_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(fewshot, "draw_glyphs", images)
    nets = GlyphNets(dtype=torch.float64)
    tasks = nets.sample_tasks(N, seeded(0), "test")
    params, (batch, _) = nets.start(tasks, seeded(1)), nets.batches(tasks, 2, seeded(2))
    assert params.shape == (N, nets.num_coordinates)
    for i in range(N):
        net = nn.Sequential(nn.Linear(49, 20), nn.Sigmoid(), nn.Linear(20, 5))
        w1, b1, w2, b2 = params[i].split([980, 20, 100, 5])
        net[0].weight.data, net[0].bias.data = w1.view(49, 20).T, b1
        net[2].weight.data, net[2].bias.data = w2.view(20, 5).T, b2
        x, y = [], []
        for index in batch[i].tolist():
            picture = nets.glyphs.images[tasks[i, index // 20], index % 20].view(7, 4, 7, 4).double()
            x.append(picture.mean((1, 3)).flatten() / 255)
            y.append(index // 20)
        expected = functional.cross_entropy(net(torch.stack(x)), torch.tensor(y)).detach()
        close(nets.loss(params, tasks, batch)[i], expected)
    assert 0.9 * 49**-0.5 < float(params[:, :1000].abs().max()) <= 49**-0.5
    assert 0.9 * 20**-0.5 < float(params[:, 1000:].abs().max()) <= 20**-0.5


def test_test_functions_are_no_training_functions():
    optimisees = quadratics()
    assert optimisees.test_set_name() == "held-out tasks"
    train, test = (optimisees.sample_tasks(2000, seeded(0), split) for split in ("train", "test"))
    assert train.shape == (2000, 110)
    assert test[:, 1:].std() == pytest.approx(1, abs=0.02)
    assert train.mean() == pytest.approx(0, abs=0.02)
    with pytest.raises(ValueError, match="split must be"):
        optimisees.sample_tasks(1, seeded(0), "other")
