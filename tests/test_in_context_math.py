"""The mathematics of algos/in_context.py against loops, torch.nn and central differences, in float64; and who sees
whom: a query its examples, never another query."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from algos import in_context
from envs import summarise
from envs.regression import Sinusoid
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64: by being here)
from tests.test_supervised_math import Spy, close, glyphs, relative_error

N, H = 3, 16
each_encoder = pytest.mark.parametrize("encoder", in_context.ENCODERS)
each_data = pytest.mark.parametrize("data", ["curves", "images"])
each_order = pytest.mark.parametrize("sequential", [False, True], ids=["sets", "sequential"])


def make_tasks(data):
    return Sinusoid(dtype=torch.float64) if data == "curves" else glyphs()


def make_args(data="curves", **kwargs):
    usual = {"env_id": "Sinusoid-v0" if data == "curves" else "Glyphs-v0", "meta_batch_size": N, "layers": 2}
    usual |= {"hidden_size": H, "hidden_sizes": (4, 5, 6), "shots": 4 if data == "curves" else 2}
    return in_context.Args(**usual | kwargs)


def make_theta(args, data="curves", seed=0):
    """All parameters are away from their special values, 0 and 1."""
    theta = in_context.init_reader(make_tasks(data), args, seeded(seed))
    return {name: value + 0.2 * torch.randn(value.shape, generator=seeded(seed)) for name, value in theta.items()}


def make_sets(args, data="curves", seed=0):
    tasks, generator = make_tasks(data), seeded(seed)
    return in_context.draw_sets(tasks, tasks.sample_tasks(N, generator), args, generator)


def jacobian_support(args, data):
    """Which outputs [Q] depend on which examples' x [B], their y [B], and on which queries' x [Q]."""
    theta = make_theta(args, data)
    (x, y), (u, _) = make_sets(args, data)
    x, y, u = x[:1], y[:1].to(x), u[:1]

    def depends(function, at):
        jacobian = torch.autograd.functional.jacobian(function, at)  # [1, Q, Y, 1, B, X]
        return jacobian.abs().sum(5)[0, :, :, 0].sum(1) > 0

    on_x = depends(lambda x: in_context.predict_queries(theta, (x, y), x if args.sequential else u, args), x)
    on_y = depends(lambda y: in_context.predict_queries(theta, (x, y), u, args), y)
    on_u = None if args.sequential else depends(lambda u: in_context.predict_queries(theta, (x, y), u, args), u)
    return on_x, on_y, on_u


@each_data
@each_encoder
def test_a_query_sees_all_examples_and_no_other_query(encoder, data):
    on_x, on_y, on_u = jacobian_support(make_args(data, encoder=encoder), data)
    assert on_x.all()
    assert on_y.all()
    assert torch.equal(on_u, torch.eye(len(on_u), dtype=torch.bool))


@each_data
@each_encoder
def test_in_a_sequence_a_query_sees_what_came_before(encoder, data):
    on_x, on_y, _ = jacobian_support(make_args(data, encoder=encoder, sequential=True), data)
    ones = torch.ones_like(on_x)
    expected = ones.tril()
    expected[0, 0] = data == "curves"  # the first image is its own mean, which is taken away
    assert torch.equal(on_x, expected)
    assert torch.equal(on_y, ones.tril(-1))


@each_order
@each_data
@each_encoder
def test_predictions_are_those_of_each_query_alone(encoder, data, sequential):
    """A loop over tasks and queries; in a sequence over its beginnings, each one a set of examples."""
    args = make_args(data, encoder=encoder, sequential=sequential)
    theta, ((x, y), (u, _)) = make_theta(args, data), make_sets(args, data)
    together, alone = in_context.predict_queries(theta, (x, y), u, args), make_args(data, encoder=encoder)
    for i, t in itertools.product(range(N), range(u.shape[1])):
        one = slice(i, i + 1)
        if sequential and encoder == "transformer":  # as a set, each example would also read those behind it
            part = slice(0, t + 1)
            output = in_context.predict_queries(theta, (x[one, part], y[one, part]), u[one, part], args)[:, t:]
        else:
            part = slice(0, t if sequential else x.shape[1])
            output = in_context.predict_queries(theta, (x[one, part], y[one, part]), u[one, t : t + 1], alone)
        close(output[0, 0], together[i, t])


@each_data
def test_the_order_of_examples_means_nothing_to_a_transformer_alone(data):
    for encoder in in_context.ENCODERS:
        args = make_args(data, encoder=encoder)
        theta, ((x, y), (u, _)) = make_theta(args, data), make_sets(args, data)
        order = torch.randperm(x.shape[1], generator=seeded(1))
        first, second = (
            in_context.predict_queries(theta, (a, b), u, args) for a, b in ((x, y), (x[:, order], y[:, order]))
        )
        assert torch.allclose(first, second, rtol=1e-10, atol=1e-10) == (encoder == "transformer")


def test_attention_is_a_loop():
    qkv, seen = torch.randn(N, 7, 3 * H, generator=seeded(0)), torch.tensor([0, 1, 2, 4, 4, 0, 3])
    actual = in_context.masked_attention(qkv, seen, heads=2)
    q, k, v = qkv.chunk(3, 2)
    for i, s, g in itertools.product(range(N), range(7), range(2)):
        part = slice(8 * g, 8 * g + 8)
        visible = sorted({*range(int(seen[s])), s})
        weights = [math.exp(float(q[i, s, part] @ k[i, j, part]) / math.sqrt(8)) for j in visible]
        expected = sum(w * v[i, j, part] for w, j in zip(weights, visible, strict=True)) / sum(weights)
        close(actual[i, s, part], expected)


def test_a_transformer_block_is_that_of_torch():
    args = make_args(layers=1)
    theta = make_theta(args)
    block = nn.TransformerEncoderLayer(
        H, H // in_context.HEAD_WIDTH, 4 * H, 0.0, "gelu", batch_first=True, norm_first=True
    )
    for value in block.parameters():
        value.data.zero_()  # ours has no biases but those of layer norm
    block.self_attn.in_proj_weight.data, block.self_attn.out_proj.weight.data = theta["w_qkv0"], theta["w_read0"]
    block.linear1.weight.data, block.linear2.weight.data = theta["w_wide0"], theta["w_narrow0"]
    for norm, name in ((block.norm1, "attention0"), (block.norm2, "mlp0")):
        norm.weight.data, norm.bias.data = theta[f"scale_{name}"], theta[f"shift_{name}"]
    token = torch.randn(N, 6, H, generator=seeded(0))
    seen = torch.tensor([4, 4, 4, 4, 4, 4])
    hidden_by = torch.ones(6, 6, dtype=torch.bool)
    hidden_by[:, :4] = False
    hidden_by.fill_diagonal_(fill_value=False)
    expected = block(token, src_mask=hidden_by)
    expected = functional.layer_norm(expected, (H,), theta["scale_out"], theta["shift_out"])
    close(in_context.transformer_reader(theta, token, seen, 4, args), expected.detach())


def test_the_gru_is_that_of_torch():
    args = make_args(encoder="gru")
    theta = make_theta(args)
    gru = nn.GRU(H, H, num_layers=2, batch_first=True)
    for i in range(2):
        for ours, name in (
            ("w_input", "weight_ih"),
            ("w_hidden", "weight_hh"),
            ("b_input", "bias_ih"),
            ("b_hidden", "bias_hh"),
        ):
            getattr(gru, f"{name}_l{i}").data = theta[f"{ours}{i}"]
    token, seen = torch.randn(N, 7, H, generator=seeded(0)), torch.tensor([0, 1, 2, 3, 4, 2, 0])
    actual = in_context.gru_reader(theta, token, seen, 4, args)
    close(actual[:, :4], gru(token[:, :4])[0].detach())
    for query, count in ((4, 4), (5, 2), (6, 0)):
        sequence = torch.cat([token[:, :count], token[:, query : query + 1]], 1)
        close(actual[:, query], gru(sequence)[0][:, -1].detach())


def test_snail_is_causal_convolutions_and_attention():
    args = make_args(encoder="snail", layers=1)
    theta, sequence = make_theta(args), torch.randn(N, 5, H, generator=seeded(0))
    actual = in_context.snail_reader(theta, sequence, torch.arange(5), 4, args)  # the last one is the query
    hidden = sequence
    for j in range(3):  # 1, 2, 4 span five tokens
        now, earlier = theta[f"w_conv0_{j}"].chunk(2)
        kernel = torch.stack([earlier, now], 2)
        padded = functional.pad(hidden.mT, (2**j, 0))
        f, g = functional.conv1d(padded, kernel, theta[f"b_conv0_{j}"], dilation=2**j).mT.chunk(2, 2)
        hidden = torch.cat([hidden, f.tanh() * g.sigmoid()], 2)
    assert "w_conv0_3" not in theta
    q, k, v = (hidden @ theta["w_qkv0"].mT).chunk(3, 2)
    hidden = torch.cat([hidden, functional.scaled_dot_product_attention(q, k, v, is_causal=True)], 2)
    close(actual, hidden @ theta["w_out"].mT + theta["b_out"])


@pytest.mark.parametrize("mlp", [False, True], ids=["conv", "mlp"])
def test_the_embedding_is_that_of_torch(mlp):
    args = make_args("images", mlp=mlp)
    theta, ((x, _), _) = make_theta(args, "images"), make_sets(args, "images")
    layers = [] if mlp else [nn.Unflatten(1, (1, 28, 28))]
    for i, (n, m) in enumerate(itertools.pairwise((784 if mlp else 1, 4, 5, 6))):
        layers += [nn.Linear(n, m, bias=False) if mlp else nn.Conv2d(n, m, 3, stride=2, padding=1, bias=False)]
        layers[-1].weight.data = theta[f"w{i}"].T if mlp else theta[f"w{i}"]
        layers += [nn.GroupNorm(1, m), nn.ReLU()]
        layers[-2].weight.data, layers[-2].bias.data = theta[f"scale{i}"], theta[f"shift{i}"]
    layers.pop()  # the last layer has none
    expected = nn.Sequential(*layers, nn.Flatten())(x.flatten(0, 1)).detach().unflatten(0, x.shape[:2])
    close(in_context.embed_alone(theta, x, args), expected)


@each_order
@each_data
@each_encoder
def test_the_gradient_against_central_differences(encoder, data, sequential, monkeypatch):
    monkeypatch.setattr(torch, "relu", functional.softplus)  # no kinks
    args = make_args(data, encoder=encoder, sequential=sequential)
    theta, (support, query) = make_theta(args, data), make_sets(args, data)

    def objective(theta):
        output, y = in_context.predict_queries(theta, support, query[0], args), query[1]
        if data == "curves":
            return float(((output - y) ** 2).sum()) / y.numel()
        return float(functional.cross_entropy(output.flatten(0, 1), y.flatten(0, 1).int().argmax(1)))

    gradient, stats = in_context.in_context_gradient(theta, support, query, args)
    assert float(stats["train/loss_post"]) == pytest.approx(objective(theta), rel=1e-10)
    actual, expected = [], []
    for name in theta:
        direction = torch.randn(theta[name].shape, generator=seeded(0))
        direction, h = direction / direction.norm(), 1e-6
        ends = [objective(theta | {name: theta[name] + step * direction}) for step in (h, -h)]
        expected.append((ends[0] - ends[1]) / (2 * h))
        actual.append(float((gradient[name] * direction).sum()))
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) < 1e-6


def test_features_are_centred_over_what_a_token_sees_and_itself():
    feature, seen = torch.randn(N, 7, 4, generator=seeded(0)), torch.tensor([0, 1, 2, 4, 4, 0, 3])
    actual = in_context.centred(feature, seen, 4)
    for i, s in itertools.product(range(N), range(7)):
        group = [*feature[i, : seen[s]], feature[i, s]]
        close(actual[i, s], feature[i, s] - sum(group) / len(group))


def test_at_first_keys_are_queries():
    args = make_args()
    theta = in_context.init_reader(make_tasks("curves"), args, seeded(0))
    for i in range(args.layers):
        w_q, w_k, w_v = theta[f"w_qkv{i}"].chunk(3)
        assert torch.equal(w_q, w_k)
        assert not torch.equal(w_q, w_v)


@each_data
@each_order
def test_evaluation_is_a_loop_over_tasks_and_numbers_of_examples(sequential, data):
    args = make_args(data, sequential=sequential, eval_tasks=53 if data == "curves" else 7)  # 53: more than a chunk
    spy, theta = Spy(make_tasks(data)), make_theta(args, data)
    actual = in_context.evaluate(spy, theta, args)
    [(num_tasks, drawn, sizes, sets)] = spy.calls
    assert sizes == ((args.shots,) if sequential else (args.shots, args.shots))
    assert torch.equal(drawn, make_tasks(data).test_set(num_tasks)[0])
    name, ways = ("loss", 1) if data == "curves" else ("accuracy", 5)
    table = []
    for i in range(num_tasks):
        row, (x, y) = [], (z[i : i + 1] for z in sets[0])
        if sequential:  # of the set as it was drawn; the file shuffles it, which changes no sum over random orders
            break
        for k in range(args.shots + 1):
            u, v = (z[i : i + 1] for z in sets[1])
            output = in_context.predict_queries(theta, (x[:, : k * ways], y[:, : k * ways]), u, args)[0]
            right = output.argmax(1) == v[0].int().argmax(1)
            row.append(float(right.double().mean() if ways == 5 else ((output - v[0]) ** 2).mean()))
        table.append(row)
    counts = range(args.shots if sequential else args.shots + 1)
    names = [f"test/{name}_k{k}" for k in counts]
    assert list(actual) == [*names, *(f"{name}_ci95" for name in names), "test/ci95", "test/gain_ci95"]
    if not sequential:
        close(torch.stack([actual[f"test/{name}_k{k}"] for k in counts], 1), torch.tensor(table))
    last, first = actual[f"test/{name}_k{counts[-1]}"], actual[f"test/{name}_k0"]
    assert summarise(actual)["test/ci95"] == pytest.approx(interval(last, drawn), rel=1e-4)
    assert summarise(actual)["test/gain_ci95"] == pytest.approx(interval(last - first, drawn), rel=1e-4)


def test_a_sequence_is_scored_by_the_number_of_its_class_seen_before():
    args = make_args("images", sequential=True, shots=3)
    theta, ((x, y), _) = make_theta(args, "images"), make_sets(args, "images")
    actual = in_context.learn_tasks(theta, (x, y), (x, y), args)
    output, label = in_context.predict_queries(theta, (x, y), x, args), y.int().argmax(2)
    table = np.zeros((N, 3))
    for i in range(N):
        seen = [0] * 5
        for t, k in enumerate(label[i].tolist()):
            table[i, seen[k]] += float(output[i, t].argmax() == k) / 5
            seen[k] += 1
        assert seen == [3] * 5
    close(actual, torch.from_numpy(table))
    assert len({tuple(row.tolist()) for row in label}) == N  # in random order, not by class


def test_a_sequence_holds_the_set_that_was_drawn():
    args, tasks = make_args("images", sequential=True), make_tasks("images")
    (x, y), again = make_sets(args, "images", seed=3)
    generator = seeded(3)
    ((u, v),) = tasks.sample(tasks.sample_tasks(N, generator), (2,), generator)
    assert again[0] is x
    for i in range(N):
        found = {(*a.tolist(), *b.tolist()) for a, b in zip(x[i], y[i], strict=True)}
        assert found == {(*a.tolist(), *b.tolist()) for a, b in zip(u[i], v[i], strict=True)}


@each_order
def test_training_is_the_obvious_loop(sequential):
    args = make_args(iterations=4, lr=0.01, eval_tasks=2, eval_every=3, sequential=sequential)
    theta, run, tasks = make_theta(args), Recorder(args), make_tasks("curves")
    state = {"iteration": 0, "env_steps": 0, "theta": dict(theta), "generator": seeded(5).get_state()}
    in_context.train(tasks, args, run, state)
    generator, params = seeded(5), {name: value.clone().requires_grad_() for name, value in theta.items()}
    optimizer = torch.optim.Adam(params.values())
    for iteration in range(4):
        optimizer.param_groups[0]["lr"] = (0.01, 0.0075, 0.005, 0.0025)[iteration]
        support, (x, y) = in_context.draw_sets(tasks, tasks.sample_tasks(N, generator), args, generator)
        optimizer.zero_grad()
        functional.mse_loss(in_context.predict_queries(params, support, x, args), y).backward()
        optimizer.step()
    close(flat(state["theta"]), flat(params).detach(), 1e-8)
    examples = N * 4 * (1 if sequential else 2)
    assert [entry[:2] for entry in run.logged] == [(i, i * examples) for i in (1, 2, 3, 4)]
    assert run.saved == [3, 4]
