"""The mathematics of algos/protonet.py against loops over tasks, queries and examples, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from algos import protonet
from envs import summarise
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64: by being here)
from tests.test_supervised_math import Spy, close, glyphs, item, relative_error

N, WAYS, SHOTS, QUERIES = 3, 4, 2, 1
each_rule = pytest.mark.parametrize("matching", [False, True], ids=["prototypes", "matching"])
each_net = pytest.mark.parametrize("mlp", [False, True], ids=["conv", "mlp"])


def make_args(**kwargs):
    usual = {"meta_batch_size": N, "train_ways": WAYS, "shots": SHOTS, "queries": QUERIES, "hidden_sizes": (4, 5, 6)}
    return protonet.Args(**usual | kwargs)


def make_theta(args, seed=0):
    """All parameters are away from their special values, 0 and 1."""
    theta = protonet.init_embedding(glyphs(), args, seeded(seed))
    return {name: value + 0.2 * torch.randn(value.shape, generator=seeded(seed)) for name, value in theta.items()}


def make_sets(ways=WAYS, shots=SHOTS, num_tasks=N, seed=0):
    tasks, generator = protonet.copy(glyphs()), seeded(seed)
    tasks.num_outputs = ways
    return tasks.sample(tasks.sample_tasks(num_tasks, generator), (shots, QUERIES), generator)


def ref_embed(theta, x):
    """By torch's own layers."""
    hidden = x.reshape(-1, 1, 28, 28) if theta["w0"].ndim == 4 else x
    for i in range(len(theta) // 3):
        w, scale, shift = (theta[f"{name}{i}"] for name in ("w", "scale", "shift"))
        hidden = functional.conv2d(hidden, w, None, 2, 1) if w.ndim == 4 else hidden @ w
        hidden = torch.relu(functional.batch_norm(hidden, None, None, scale, shift, training=True))
    return hidden.reshape(len(x), -1)


def ref_probabilities(theta, support, x, matching):
    """p(y = k | x) of one task's queries, written as a loop over queries, classes and examples."""
    features = ref_embed(theta, torch.cat([support[0], x])).detach().numpy()
    examples, queries, label = features[: len(support[0])], features[len(support[0]) :], support[1].int().argmax(1)
    ways, table = support[1].shape[1], []
    for query in queries:
        weight = [0.0] * ways
        if matching:
            for example, k in zip(examples, label.tolist(), strict=True):
                weight[k] += math.exp(query @ example / math.sqrt((query @ query) * (example @ example)))
        else:
            for k in range(ways):
                mean = sum(x for x, j in zip(examples, label.tolist(), strict=True) if j == k) / int((label == k).sum())
                weight[k] = math.exp(-sum((query - mean) ** 2))
        table.append([x / sum(weight) for x in weight])
    return torch.tensor(table)


@each_rule
@each_net
def test_probabilities_are_a_loop_over_classes_and_examples(mlp, matching):
    args = make_args(mlp=mlp, matching=matching)
    # Small features, whose distances leave no probability at 0.
    theta = {name: 0.3 * x if name in ("scale2", "shift2") else x for name, x in make_theta(args).items()}
    support, query = make_sets()
    for i in range(N):
        (x, y), (queries, _) = item([support, query], i)
        order = torch.randperm(len(x), generator=seeded(i))  # which examples come first does not matter
        logits = protonet.classify(theta, (x[order], y[order]), queries, args)
        expected = ref_probabilities(theta, (x, y), queries, matching)
        assert 0.01 < float(expected.min()) < float(expected.max()) < 0.99
        close(logits.softmax(1), expected)
    if matching:
        close(logits.exp().sum(1), torch.ones(len(logits)))


@each_rule
def test_classes_may_have_different_numbers_of_examples(matching):
    args = make_args(matching=matching)
    theta, ((x, y), (queries, _)) = make_theta(args), item(make_sets(shots=2), 0)
    theta = {name: 0.3 * x if name in ("scale2", "shift2") else x for name, x in theta.items()}
    kept = torch.tensor([0, 1, 2, 3, 5, 6])  # two of class 1 and 2, one of 0 and 3
    logits = protonet.classify(theta, (x[kept], y[kept]), queries, args)
    close(logits.softmax(1), ref_probabilities(theta, (x[kept], y[kept]), queries, matching))


@each_rule
@each_net
def test_the_gradient_against_central_differences(mlp, matching, monkeypatch):
    monkeypatch.setattr(torch, "relu", functional.softplus)  # no kinks
    args = make_args(mlp=mlp, matching=matching)
    theta, (support, query) = make_theta(args), make_sets()

    def objective(theta):
        losses = []
        for i in range(N):
            one, (x, y) = item([support, query], i)
            losses += [-math.log(p[k]) for p, k in zip(ref_probabilities(theta, one, x, matching), y, strict=True)]
        return np.mean(losses)

    gradient, stats = protonet.protonet_gradient(theta, support, query, args)
    assert float(stats["train/loss_post"]) == pytest.approx(objective(theta), rel=1e-10)
    actual, expected = [], []
    for name in theta:
        direction = torch.randn(theta[name].shape, generator=seeded(0))
        direction, h = direction / direction.norm(), 3e-6
        ends = [objective(theta | {name: theta[name] + step * direction}) for step in (h, -h)]
        expected.append((ends[0] - ends[1]) / (2 * h))
        actual.append(float((gradient[name] * direction).sum()))
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) < 1e-6


def test_the_embedding_is_that_of_torch():
    args = make_args(hidden_sizes=(3, 5, 4, 6))
    theta, ((x, _), _) = make_theta(args), item(make_sets(), 0)
    layers, sizes = [nn.Unflatten(1, (1, 28, 28))], (1, *args.hidden_sizes)
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Conv2d(n, m, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU()]
        layers[-3].weight.data, layers[-2].weight.data = theta[f"w{i}"], theta[f"scale{i}"]
        layers[-2].bias.data = theta[f"shift{i}"]
    features = protonet.embed(theta, x)
    assert features.shape == (WAYS * SHOTS, 6 * 2 * 2)
    close(features, nn.Sequential(*layers, nn.Flatten()).train()(x).detach())


@each_net
def test_initial_parameters_are_uniform_in_one_over_root_fan_in(mlp):
    args = make_args(mlp=mlp, hidden_sizes=(64, 32))
    theta = protonet.init_embedding(glyphs(), args, seeded(0))
    shapes = [(784, 64), (64, 32)] if mlp else [(64, 1, 3, 3), (32, 64, 3, 3)]
    for i, (shape, fan_in) in enumerate(zip(shapes, (784, 64) if mlp else (9, 576), strict=True)):
        w, shift = theta[f"w{i}"], theta[f"shift{i}"]
        assert w.shape == shape
        assert 0.95 * fan_in**-0.5 < float(w.abs().max()) <= fan_in**-0.5
        assert 0.5 * fan_in**-0.5 < float(shift.abs().max()) <= fan_in**-0.5
        assert torch.equal(theta[f"scale{i}"], torch.ones(len(shift)))
    assert len(theta) == 6


@each_rule
@pytest.mark.parametrize("transductive", [True, False])
def test_evaluation_is_a_loop_over_tasks_and_numbers_of_examples(transductive, matching):
    args = make_args(eval_tasks=7, transductive=transductive, matching=matching)
    spy, theta = Spy(glyphs()), make_theta(args)
    spy.num_outputs = 5
    actual = protonet.evaluate(spy, theta, args)
    [(num_tasks, drawn, sizes, sets)] = spy.calls
    assert (num_tasks, sizes) == (7, (SHOTS, QUERIES))
    assert torch.equal(drawn, glyphs().test_set(7)[0])
    table = np.full((7, SHOTS + 1), 0.2)
    for i, k in itertools.product(range(7), range(1, SHOTS + 1)):
        (x, y), (queries, label) = item(sets, i)
        first = torch.cat([torch.where(y[:, c])[0][:k] for c in range(5)])  # k of each class
        shown = (x[first], y[first])
        groups = [queries] if transductive else [query[None] for query in queries]
        found = torch.cat([ref_probabilities(theta, shown, group, matching) for group in groups]).argmax(1)
        table[i, k] = float((found == label.int().argmax(1)).double().mean())
    names = [f"test/accuracy_k{k}" for k in range(SHOTS + 1)]
    assert list(actual) == [*names, *(f"{name}_ci95" for name in names), "test/ci95", "test/gain_ci95"]
    for k in range(SHOTS + 1):
        close(actual[f"test/accuracy_k{k}"], torch.from_numpy(table[:, k]))
    assert table[:, 1:].std() > 0
    assert summarise(actual)["test/ci95"] == pytest.approx(interval(table[:, -1], drawn), rel=1e-4)
    assert summarise(actual)["test/gain_ci95"] == pytest.approx(interval(table[:, -1] - 0.2, drawn), rel=1e-4)


def test_training_is_the_obvious_loop():
    args = make_args(iterations=4, halve_every=2, lr=0.01, eval_tasks=2, eval_every=3)
    theta, run = make_theta(args), Recorder(args)
    state = {"iteration": 0, "env_steps": 0, "theta": dict(theta), "generator": seeded(5).get_state()}
    protonet.train(glyphs(), args, run, state)
    assert glyphs().num_outputs == 5  # the test's, as before

    generator, losses, tasks = seeded(5), [], protonet.copy(glyphs())
    tasks.num_outputs = WAYS
    params = {name: value.clone().requires_grad_() for name, value in theta.items()}
    optimizer = torch.optim.Adam(params.values(), 0.01)
    for iteration in range(4):
        support, query = tasks.sample(tasks.sample_tasks(N, generator), (SHOTS, QUERIES), generator)
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = (0.01, 0.01, 0.005, 0.005)[iteration]
        total = 0.0
        for i in range(N):
            (x, y), (queries, label) = item([support, query], i)
            features = ref_embed(params, torch.cat([x, queries]))
            means = torch.stack([features[: len(x)][y[:, k]].mean(0) for k in range(WAYS)])
            logits = -torch.cdist(features[len(x) :], means).square()
            total = total + functional.cross_entropy(logits, label.int().argmax(1)) / N
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    close(flat(state["theta"]), flat(params).detach(), 1e-7)
    assert [stats["train/loss_post"] for *_, stats in run.logged] == pytest.approx(losses, rel=1e-8)
    examples = N * WAYS * (SHOTS + QUERIES)
    assert [entry[:2] for entry in run.logged] == [(i, i * examples) for i in (1, 2, 3, 4)]
    assert run.saved == [3, 4]
