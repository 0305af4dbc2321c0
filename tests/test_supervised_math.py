"""The mathematics of algos/maml.py, fomaml.py and reptile.py against independent oracles, in float64: closed forms of
linear regression, central differences, the series of Nichol et al. 2018, torch.nn, torch.optim, and plain loops over
tasks with torch.autograd."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional

from algos import fomaml, maml, reptile
from envs import records, summarise
from envs.fewshot import Glyphs
from envs.regression import Sinusoid
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64 is used by being here)

FILES = (maml, fomaml, reptile)
N = 3
ADAM = {"inner_optimizer": "adam", "inner_lr": 0.02}
each_file = pytest.mark.parametrize("ours", FILES, ids=lambda module: module.__name__.split(".")[-1])
each_net = pytest.mark.parametrize("net", ["curves", "conv", "mlp"])
each_batch_norm_net = pytest.mark.parametrize("net", ["conv", "mlp"])


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def item(sets, i):
    """Task i of a list of sets of examples."""
    return [(x[i], y[i]) for x, y in sets]


def one(sets, i):
    """Task i as a batch of one task."""
    return [(x[i : i + 1], y[i : i + 1]) for x, y in sets]


# ---------------------------------------------------------------------------------------------------------------------
# Small tasks and networks
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def glyphs():
    return Glyphs(classes=40, instances=4, dtype=torch.float64)


def make_tasks(net):
    return Sinusoid(dtype=torch.float64) if net == "curves" else glyphs()


def make_args(ours, net, **kwargs):
    """A large inner step, so that the derivative through it counts."""
    usual = {"env_id": "Sinusoid-v0" if net == "curves" else "Glyphs-v0", "mlp": net == "mlp", "meta_batch_size": N}
    usual |= {"hidden_sizes": (8, 6) if net == "curves" else (4, 4, 4, 4), "inner_lr": 0.05 if net == "curves" else 0.4}
    usual |= {"inner_optimizer": "sgd", "inner_shots": 3 if net == "curves" else 2} if ours is reptile else {}
    return ours.Args(**{**usual, "shots": 4 if net == "curves" else 1, **kwargs})


def make_theta(ours, net, args, seed=0):
    """All parameters are away from their special values, 0 and 1."""
    theta = ours.init_params(make_tasks(net), args, seeded(seed))
    return {name: value + 0.2 * torch.randn(value.shape, generator=seeded(seed)) for name, value in theta.items()}


def make_sets(net, sizes, seed=0, num_tasks=N):
    tasks, generator = make_tasks(net), seeded(seed)
    return tasks.sample(tasks.sample_tasks(num_tasks, generator), sizes, generator)


def sizes_of(net, count):
    return (4 if net == "curves" else 1,) * count


def as_used(ours, sets):
    """One set for each inner step: Reptile takes another one each time, MAML and FOMAML the first; their last is the
    query."""
    return sets if ours is reptile else [sets[0]] * (len(sets) - 1) + [sets[-1]]


def some_moments(theta, steps=7):
    squares = {name: torch.rand(value.shape, generator=seeded(1)) for name, value in theta.items()}
    return reptile.Moments(second_moment=squares, steps=steps)


def gradient_of(ours, theta, sets, args):
    """The file's meta-gradient and loss, from sets `as_used`."""
    if ours is reptile:
        gradient, _, loss = reptile.reptile_gradient(theta, reptile.no_moments(theta), sets, args)
        return gradient, loss
    function = maml.maml_gradient if ours is maml else fomaml.fomaml_gradient
    return function(theta, sets[0], sets[-1], replace(args, inner_steps=len(sets) - 1))


def evaluate_of(ours, tasks, theta, args):
    """The file's evaluation; of Reptile with the moments of a first step."""
    return ours.evaluate(tasks, theta, *([reptile.no_moments(theta)] if ours is reptile else []), args)


@pytest.fixture
def smooth(monkeypatch):
    """No kinks, so that central differences are accurate."""
    monkeypatch.setattr(torch, "relu", functional.softplus)


# ---------------------------------------------------------------------------------------------------------------------
# Reference: one task at a time, torch's layers, torch.autograd, torch.optim
# ---------------------------------------------------------------------------------------------------------------------


def ref_network(params, x):
    hidden = x.reshape(-1, 1, 28, 28) if params["w0"].ndim == 4 else x
    for i in range(sum(name.startswith("w") for name in params) - 1):
        w, scale = params[f"w{i}"], params.get(f"scale{i}")
        b = params[f"b{i}"] if scale is None else params[f"shift{i}"]
        hidden = functional.conv2d(hidden, w, None, 2, 1) if w.ndim == 4 else functional.linear(hidden, w.T)
        hidden = hidden + b if scale is None else functional.batch_norm(hidden, None, None, scale, b, training=True)
        hidden = torch.relu(hidden)
    return torch.addmm(params[f"b{i + 1}"], hidden.reshape(len(x), -1), params[f"w{i + 1}"])


def ref_loss(params, x, y):
    output = ref_network(params, x)
    if y.dtype == torch.bool:
        return -output.log_softmax(1)[y].sum() / len(y)
    return ((output - y) ** 2).sum() / y.numel()


def leaves(params):
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}


def ref_steps(theta, sets, args, create_graph=False):
    """All weights on one task's way: before, and after each of the sets."""
    path = [theta]
    if getattr(args, "inner_optimizer", "sgd") == "adam":
        params = leaves(theta)
        optimizer = torch.optim.Adam(params.values(), args.inner_lr, betas=(0.0, 0.999))
        for x, y in sets:
            optimizer.zero_grad()
            ref_loss(params, x, y).backward()
            optimizer.step()
            path.append({name: value.detach().clone() for name, value in params.items()})
        return path
    for x, y in sets:
        params = path[-1] if create_graph else leaves(path[-1])
        slopes = torch.autograd.grad(ref_loss(params, x, y), list(params.values()), create_graph=create_graph)
        moved = [value - args.inner_lr * slope for value, slope in zip(params.values(), slopes, strict=True)]
        path.append(dict(zip(params, moved if create_graph else [x.detach() for x in moved], strict=True)))
    return path


def ref_gradient(ours, theta, sets, args):
    """`gradient_of` by a loop over tasks, flattened, and the mean loss."""
    total, losses = 0.0, []
    for i in range(len(sets[0][0])):
        *supports, query = item(sets, i)
        if ours is reptile:
            phi = ref_steps(theta, [*supports, query], args)[-1]
            losses.append(ref_loss(phi, *query))
            total = total + flat(theta) - flat(phi)
            continue
        start = leaves(theta)
        phi = ref_steps(start, supports, args, create_graph=ours is maml)[-1]
        source = start if ours is maml else (phi := leaves(phi))
        losses.append(ref_loss(phi, *query))
        slopes = torch.autograd.grad(losses[-1], list(source.values()))
        total = total + torch.cat([slope.flatten() for slope in slopes])
    return total / len(losses), sum(x.detach() for x in losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# Linear regression: closed forms
# ---------------------------------------------------------------------------------------------------------------------

B, X, Y = 6, 2, 2


@pytest.fixture
def linear(monkeypatch):
    for module in FILES:
        monkeypatch.setattr(module, "network", lambda params, x: x @ params["w"] + params["b"])


def linear_tasks(count, seed=0):
    """Random sets of examples, and for each the Hessian H [N, F, F] and b [N, F, Y]: grad L(W) = H W - b."""
    rng, sets, forms = np.random.default_rng(seed), [], []
    for _ in range(count):
        x, y = rng.normal(size=(N, B, X)), rng.normal(size=(N, B, Y))
        design = np.concatenate([x, np.ones((N, B, 1))], 2)
        transposed = 2 / (B * Y) * design.transpose(0, 2, 1)
        sets.append((torch.tensor(x), torch.tensor(y)))
        forms.append((transposed @ design, transposed @ y))
    W = rng.normal(size=(X + 1, Y))
    return sets, forms, W, {"w": torch.tensor(W[:X]), "b": torch.tensor(W[X])}


def stacked(params):
    return torch.cat([params["w"], params["b"][None]])


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("ours", [maml, fomaml], ids=["maml", "fomaml"])
def test_meta_gradient_of_linear_regression(ours, inner_steps, linear):
    alpha = 0.3
    sets, forms, W, theta = linear_tasks(inner_steps + 1)
    sets, forms = as_used(ours, sets), as_used(ours, forms)
    gradients, losses = [], []
    for i in range(N):
        adapted, jacobian = W, np.eye(X + 1)
        for H, b in forms[:-1]:
            adapted = adapted - alpha * (H[i] @ adapted - b[i])
            jacobian = jacobian @ (np.eye(X + 1) - alpha * H[i])  # transposed: the first step is the last factor
        H, b = forms[-1]
        slope = H[i] @ adapted - b[i]
        gradients.append(jacobian @ slope if ours is maml else slope)
        x, y = sets[-1][0][i].numpy(), sets[-1][1][i].numpy()
        losses.append(np.mean((x @ adapted[:X] + adapted[X] - y) ** 2))
    actual, loss = gradient_of(ours, theta, sets, make_args(ours, "curves", inner_lr=alpha))
    close(stacked(actual), torch.tensor(np.mean(gradients, 0)), 1e-12)
    close(loss, torch.tensor(np.mean(losses)), 1e-12)


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_reptile_gradient_of_linear_regression(inner_steps, linear):
    alpha = 0.3
    sets, [(H, b)], W, theta = linear_tasks(1)
    phis = []
    for i in range(N):
        optimum = np.linalg.solve(H[i], b[i])
        phis.append(optimum + np.linalg.matrix_power(np.eye(X + 1) - alpha * H[i], inner_steps) @ (W - optimum))
    args = make_args(reptile, "curves", inner_lr=alpha)
    actual, loss = gradient_of(reptile, theta, sets * inner_steps, args)
    close(stacked(actual), torch.tensor(W - np.mean(phis, 0)), 1e-12)
    x, y = (tensor.numpy() for tensor in sets[0])
    expected = np.mean([(x[i] @ phi[:X] + phi[X] - y[i]) ** 2 for i, phi in enumerate(phis)])
    close(loss, torch.tensor(expected), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Nonlinear networks: central differences
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_steps", [1, 2])
@each_net
def test_maml_gradient_against_central_differences(net, inner_steps, smooth):
    args = make_args(maml, net, inner_steps=inner_steps)
    theta, sets = make_theta(maml, net, args), as_used(maml, make_sets(net, sizes_of(net, inner_steps + 1)))

    def objective(params):
        return np.mean(
            [
                float(ref_loss(ref_steps(params, item(sets[:-1], i), args)[-1], *(z[i] for z in sets[-1])).detach())
                for i in range(N)
            ]
        )

    gradient, loss = maml.maml_gradient(theta, sets[0], sets[-1], args)
    close(loss, torch.tensor(objective(theta)))
    first_order, _ = fomaml.fomaml_gradient(theta, sets[0], sets[-1], args)
    expected, actual, control = [], [], []
    for name, seed in itertools.product(theta, range(1 if net == "mlp" else 2)):  # random directions, by parameter
        direction = torch.randn(theta[name].shape, generator=seeded(seed))
        direction, h = direction / direction.norm(), 3e-6
        ends = [objective(theta | {name: theta[name] + step * direction}) for step in (h, -h)]
        expected.append((ends[0] - ends[1]) / (2 * h))
        actual.append(float((gradient[name] * direction).sum()))
        control.append(float((first_order[name] * direction).sum()))
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) < 1e-6
    # Negative control: without the derivative through the inner steps the same comparison fails.
    assert relative_error(torch.tensor(control), torch.tensor(expected)) > 1e-2


@pytest.mark.parametrize("inner_steps", [1, 2])
@each_batch_norm_net
def test_the_library_batch_norm_would_be_wrong(net, inner_steps, smooth, monkeypatch):
    """Why it is written out; where torch has mended its second derivative under vmap, this fails: then use torch's."""
    args = make_args(maml, net, inner_steps=inner_steps)
    theta, sets = make_theta(maml, net, args), as_used(maml, make_sets(net, sizes_of(net, inner_steps + 1)))
    right, loss = maml.maml_gradient(theta, sets[0], sets[-1], args)

    def library(x, scale, shift):
        return functional.batch_norm(x, None, None, scale, shift, training=True)

    monkeypatch.setattr(maml, "batch_norm", library)
    wrong, same_loss = maml.maml_gradient(theta, sets[0], sets[-1], args)
    close(same_loss, loss)
    assert 5e-3 < relative_error(flat(wrong), flat(right)) < 6e-2


# ---------------------------------------------------------------------------------------------------------------------
# Nichol et al. 2018: the leading terms in alpha, all sequences of minibatches enumerated
# ---------------------------------------------------------------------------------------------------------------------

COEFFICIENTS = {  # of AvgGrad and of AvgGradInner, for k minibatches
    maml: lambda k, alpha: (1, -2 * (k - 1) * alpha),
    fomaml: lambda k, alpha: (1, -(k - 1) * alpha),
    reptile: lambda k, alpha: (k, -k * (k - 1) / 2 * alpha),
}


@pytest.mark.parametrize("k", [2, 3, 4])
@each_file
def test_leading_terms_of_the_mean_gradient(ours, k, monkeypatch):
    monkeypatch.setattr(torch, "relu", torch.tanh)
    args = make_args(ours, "curves")
    theta = make_theta(ours, "curves", args)
    x = torch.randn(4, 3, 5, 1, generator=seeded(0))  # 4 tasks, 3 minibatches of 5 examples
    y = torch.randn(4, 1, 1, 1, generator=seeded(1)) * (x + torch.randn(4, 1, 1, 1, generator=seeded(2))).sin()
    avg_grad, avg_grad_inner = 0.0, 0.0
    for i in range(4):
        start = leaves(theta)
        loss = sum(ref_loss(start, x[i, j], y[i, j]) for j in range(3)) / 3
        slope = torch.autograd.grad(loss, list(start.values()), create_graph=True)
        half_square = sum((z**2).sum() for z in slope) / 2  # its gradient: the mean Hessian times the mean gradient
        inner = torch.autograd.grad(half_square, list(start.values()))
        avg_grad = avg_grad + torch.cat([z.detach().flatten() for z in slope]) / 4
        avg_grad_inner = avg_grad_inner + torch.cat([z.flatten() for z in inner]) / 4
    sequences = torch.tensor(list(itertools.product(range(3), repeat=k)))  # [3^k, k]
    sets = [(x[:, column].flatten(0, 1), y[:, column].flatten(0, 1)) for column in sequences.T]
    sets = as_used(ours, sets)

    def error(alpha, change=0.0):
        args.inner_lr = alpha
        first, second = COEFFICIENTS[ours](k, alpha)
        actual = flat(gradient_of(ours, theta, sets, args)[0]) / (alpha if ours is reptile else 1)
        return (actual - first * avg_grad - (second + change * alpha) * avg_grad_inner).norm()

    assert 3.8 < error(4e-4) / error(2e-4) < 4.2
    # Negative control: with another coefficient of AvgGradInner the error is of first order.
    assert 1.8 < error(4e-4, change=-1) / error(2e-4, change=-1) < 2.2
    assert 1.8 < error(4e-4, change=1) / error(2e-4, change=1) < 2.2


# ---------------------------------------------------------------------------------------------------------------------
# A batch of tasks is a loop over tasks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "options"),
    [(maml, {}), (fomaml, {}), (reptile, {}), (reptile, ADAM)],
    ids=["maml", "fomaml", "reptile", "reptile-adam"],
)
@each_net
def test_the_gradient_of_a_batch_is_the_mean_over_its_tasks(ours, net, options):
    args = make_args(ours, net, **options)
    theta, sets = make_theta(ours, net, args), as_used(ours, make_sets(net, sizes_of(net, 3)))
    gradient, loss = gradient_of(ours, theta, sets, args)
    assert list(gradient) == list(theta)
    singles = [gradient_of(ours, theta, one(sets, i), args) for i in range(N)]
    close(flat(gradient), sum(flat(single) for single, _ in singles) / N)
    close(loss, sum(single for _, single in singles) / N)
    expected, mean_loss = ref_gradient(ours, theta, sets, args)
    close(flat(gradient), expected)
    close(loss, mean_loss)


@each_net
@each_file
def test_adaptation_is_a_loop_of_gradient_steps(ours, net):
    args = make_args(ours, net)
    theta, sets = make_theta(ours, net, args), make_sets(net, sizes_of(net, 3))
    if ours is reptile:
        path = vmap(lambda batches: reptile.fit(theta, reptile.no_moments(theta), batches, args)[0])(sets)
    else:
        sets = [sets[0]] * 3
        path = [
            vmap(lambda support, steps=steps: ours.inner_loop(theta, support, steps, args))(sets[0])
            for steps in (1, 2, 3)
        ]
    for i in range(N):
        expected = ref_steps(theta, item(sets, i), args)
        for params, reference in zip(path, expected if ours is reptile else expected[1:], strict=True):
            close(torch.cat([value[i].flatten() for value in params.values()]), flat(reference))


# ---------------------------------------------------------------------------------------------------------------------
# Reptile
# ---------------------------------------------------------------------------------------------------------------------


@each_net
def test_one_step_of_reptile_is_joint_training(net):
    args = make_args(reptile, net)
    theta, sets = make_theta(reptile, net, args), make_sets(net, sizes_of(net, 1))
    start = leaves(theta)
    joint = sum(ref_loss(start, *examples) for i in range(N) for examples in item(sets, i)) / N
    expected = args.inner_lr * torch.cat([x.flatten() for x in torch.autograd.grad(joint, list(start.values()))])
    close(flat(gradient_of(reptile, theta, sets, args)[0]), expected, 1e-12)


@pytest.mark.parametrize("steps", [0, 7])
@each_net
def test_inner_adam_is_torch_adam_without_momentum(net, steps):
    args = make_args(reptile, net, **ADAM)
    theta, sets = make_theta(reptile, net, args), make_sets(net, sizes_of(net, 4))
    moments = some_moments(theta, steps) if steps else reptile.no_moments(theta)
    path, second_moment = vmap(lambda batches: reptile.fit(theta, moments, batches, args), out_dims=(0, 0))(sets)
    assert len(path) == 5
    for i in range(N):
        params, optimizer = adam_with(theta, args, *moments)
        for step, ours in enumerate(path):
            if step:
                take_step(params, optimizer, *item(sets, i)[step - 1])
            close(torch.cat([value[i].flatten() for value in ours.values()]), flat(params).detach())
        close(torch.cat([value[i].flatten() for value in second_moment.values()]), flat(squares_in(params, optimizer)))


def adam_with(theta, args, second_moment, steps):
    """Weights of one's own, and torch's Adam with the memory of earlier steps."""
    params = leaves(theta)
    optimizer = torch.optim.Adam(params.values(), args.inner_lr, betas=(0.0, 0.999))
    for name, value in params.items() if steps else ():
        told = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": second_moment[name].clone()}
        optimizer.state[value] = {"step": torch.tensor(float(steps)), **told}
    return params, optimizer


def take_step(params, optimizer, x, y):
    optimizer.zero_grad()
    ref_loss(params, x, y).backward()
    optimizer.step()


def squares_in(params, optimizer):
    return {name: optimizer.state[value]["exp_avg_sq"] for name, value in params.items()}


@pytest.mark.parametrize("num_tasks", [1, N])
@pytest.mark.parametrize("net", ["curves", "conv"])
def test_moments_are_kept_as_the_authors_describe(net, num_tasks):
    """One optimiser for the whole run, whose memory only the weights' return leaves alone (their issue 28). With one
    task an update nothing differs from theirs; of several, each begins with the same memory, and the mean is kept."""
    args = make_args(reptile, net, inner_steps=2, iterations=4, outer_lr=0.4, meta_batch_size=num_tasks, **ADAM)
    args.eval_tasks, args.eval_steps = 3, 2
    tasks, theta, run = make_tasks(net), make_theta(reptile, net, args), Recorder(args)
    state = start_state(theta)
    reptile.train(tasks, args, run, state)

    generator, params = seeded(5), leaves(theta)
    size = 3 if net == "curves" else 2
    memory, steps = reptile.no_moments(theta)
    for iteration in range(4):
        sets = tasks.sample(tasks.sample_tasks(num_tasks, generator, "train"), (size, size), generator)
        ends, memories = [], []
        for i in range(num_tasks):
            phi, optimizer = adam_with(params, args, memory, steps)
            for examples in item(sets, i):
                take_step(phi, optimizer, *examples)
            ends.append(flat(phi).detach())
            memories.append(squares_in(phi, optimizer))
        memory = {name: sum(x[name] for x in memories) / num_tasks for name in theta}
        steps += 2
        epsilon = 0.4 * (1.0, 0.75, 0.5, 0.25)[iteration]
        moved = flat(params).detach() + epsilon * (sum(ends) / num_tasks - flat(params).detach())
        parts = moved.split([value.numel() for value in params.values()])
        params = {name: part.view_as(x) for (name, x), part in zip(params.items(), parts, strict=True)}
    close(flat(state["theta"]), moved, 1e-8)
    close(flat(state["moments"]["second_moment"]), flat(memory), 1e-8)
    assert state["moments"]["steps"] == steps == 8

    # A test task begins with this memory, and leaves it as it is.
    before = flat(state["moments"]["second_moment"]).clone()
    actual = reptile.evaluate_state(tasks, state, args)
    assert torch.equal(flat(state["moments"]["second_moment"]), before)
    name = "loss" if net == "curves" else "accuracy"
    support, query = tasks.sample(*tasks.test_set(3)[:1], (args.shots, args.eval_queries), tasks.test_set(3)[1])
    for i in range(3):
        phi, optimizer = adam_with(params, args, memory, steps)
        for k in range(3):
            if k:
                take_step(phi, optimizer, *item([support], i)[0])
            output, (_, y) = ref_network(phi, query[0][i]).detach(), item([query], i)[0]
            hits = (output.argmax(1) == y.to(torch.int).argmax(1)).double()
            expected = float(((output - y.to(output)) ** 2).mean() if net == "curves" else hits.mean())
            assert float(actual[f"test/{name}_k{k}"][i]) == pytest.approx(expected, rel=1e-6)


def test_what_earlier_tasks_left_matters():
    """The test above could not pass with moments that are new for each task."""
    args = make_args(reptile, "curves", **ADAM)
    theta, sets = make_theta(reptile, "curves", args), make_sets("curves", (4, 4))
    new, kept = (
        flat(reptile.reptile_gradient(theta, moments, sets, args)[0])
        for moments in (reptile.no_moments(theta), some_moments(theta))
    )
    assert relative_error(kept, new) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------------


def start_state(theta, seed=5):
    theta = {name: value.clone() for name, value in theta.items()}
    moments = reptile.no_moments(theta)._asdict()  # of Reptile alone
    return {"iteration": 0, "env_steps": 0, "theta": theta, "moments": moments, "generator": seeded(seed).get_state()}


def train_args(ours, net, **kwargs):
    args = make_args(ours, net, iterations=4, inner_steps=2, eval_tasks=2, eval_steps=1, eval_every=3, **kwargs)
    args.outer_lr = {maml: 0.01, fomaml: 0.01, reptile: 0.4}[ours]
    return args


@pytest.mark.parametrize("net", ["curves", "conv"])
@each_file
def test_training_is_the_obvious_loop(ours, net):
    args = train_args(ours, net)
    tasks, theta, run = make_tasks(net), make_theta(ours, net, make_args(ours, net)), Recorder(args)
    state = start_state(theta)
    ours.train(tasks, args, run, state)

    generator, losses = seeded(5), []
    params = leaves(theta)
    optimizer = torch.optim.Adam(params.values(), 0.01)
    for iteration in range(4):
        batch = tasks.sample_tasks(N, generator, "train")
        if ours is reptile:
            sets = tasks.sample(batch, (3, 3) if net == "curves" else (2, 2), generator)
        else:
            support, query = tasks.sample(batch, sizes_of(net, 2), generator)
            sets = [support, support, query]
        gradient, loss = ref_gradient(ours, params, sets, args)
        losses.append(loss)
        parts = gradient.detach().split([value.numel() for value in params.values()])
        with torch.no_grad():
            for value, part in zip(params.values(), parts, strict=True):
                if ours is reptile:
                    value -= 0.4 * (1.0, 0.75, 0.5, 0.25)[iteration] * part.view_as(value)
                else:
                    value.grad = part.view_as(value)
        if ours is not reptile:
            optimizer.step()
    close(flat(state["theta"]), flat(params).detach(), 1e-8)
    close(torch.stack([torch.tensor(stats["train/loss_post"]) for *_, stats in run.logged]), torch.stack(losses), 1e-8)
    sizes = {"curves": 3, "conv": 2 * 5} if ours is reptile else {"curves": 4, "conv": 5}
    examples = N * 2 * sizes[net]
    assert [entry[:2] for entry in run.logged] == [(i, i * examples) for i in (1, 2, 3, 4)]
    assert run.saved == [3, 4]
    assert [any(name.startswith("test/") for name in stats) for *_, stats in run.logged] == [True, False, True, True]


@each_file
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(ours):
    args, tasks = train_args(ours, "curves", **(ADAM if ours is reptile else {})), make_tasks("curves")
    theta, whole, part, rest = make_theta(ours, "curves", args), *(Recorder(args) for _ in range(3))
    expected, state = start_state(theta), start_state(theta)
    ours.train(tasks, args, whole, expected)
    part.should_stop = lambda: state["iteration"] == 2
    with pytest.raises(records.Stopped):
        ours.train(tasks, args, part, state)
    assert state["iteration"] == 2
    assert part.saved == [2]
    ours.train(tasks, args, rest, state)
    assert part.logged + rest.logged == whole.logged
    assert torch.equal(flat(state["theta"]), flat(expected["theta"]))
    assert state["env_steps"] == expected["env_steps"]


# ---------------------------------------------------------------------------------------------------------------------
# Networks, loss, accuracy
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4, 6)])
@each_file
def test_batch_norm_is_that_of_torch(ours, shape):
    x, scale, shift = (torch.randn(n, generator=seeded(i)) for i, n in enumerate((shape, (3,), (3,))))
    x = 3 * x + torch.arange(3.0).view(-1, *(1,) * (len(shape) - 2))
    expected = functional.batch_norm(x, None, None, scale, shift, training=True)
    close(ours.batch_norm(x, scale, shift), expected, 1e-12)
    weight = torch.randn(shape, generator=seeded(3))
    close(
        grad(lambda x: (weight * ours.batch_norm(x, scale, shift)).sum())(x),
        grad(lambda x: (weight * functional.batch_norm(x, None, None, scale, shift, training=True)).sum())(x),
    )


@each_file
def test_batch_norm_of_a_constant_channel_is_the_shift(ours):
    x = torch.full((5, 3, 2, 2), 7.0)
    normed = ours.batch_norm(x, torch.full((3,), 2.0), torch.arange(3.0))
    close(normed, torch.arange(3.0).view(3, 1, 1).expand(5, 3, 2, 2), 1e-12)
    assert grad(lambda x: ours.batch_norm(x, torch.ones(3), torch.ones(3)).square().sum())(x).isfinite().all()


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@each_file
def test_conv_network_is_that_of_torch(ours, depth):
    args = make_args(ours, "conv", hidden_sizes=(3, 5, 4, 6, 2)[:depth])
    theta, [(x, _)] = make_theta(ours, "conv", args), make_sets("conv", (2,), num_tasks=1)
    layers, sizes = [nn.Unflatten(1, (1, 28, 28))], (1, *args.hidden_sizes)
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Conv2d(n, m, 3, stride=2, padding=1), nn.BatchNorm2d(m), nn.ReLU()]
        layers[-3].bias.data.zero_()  # batch norm takes the mean away
        layers[-3].weight.data, layers[-2].weight.data = theta[f"w{i}"], theta[f"scale{i}"]
        layers[-2].bias.data = theta[f"shift{i}"]
    side = (14, 7, 4, 2, 1)[depth - 1]
    layers += [nn.Flatten(), nn.Linear(sizes[-1] * side**2, 5)]
    assert layers[-1].weight.T.shape == theta[f"w{depth}"].shape
    layers[-1].weight.data, layers[-1].bias.data = theta[f"w{depth}"].T, theta[f"b{depth}"]
    close(ours.network(theta, x[0]), nn.Sequential(*layers).train()(x[0]).detach())


@pytest.mark.parametrize("net", ["curves", "mlp"])
@each_file
def test_fully_connected_network_is_that_of_torch(ours, net):
    args = make_args(ours, net, hidden_sizes=(3, 5, 4))
    theta, [(x, y)] = make_theta(ours, net, args), make_sets(net, (2,), num_tasks=1)
    layers, sizes = [], (x.shape[-1], 3, 5, 4, y.shape[-1])
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(n, m))
        layers[-1].weight.data = theta[f"w{i}"].T
        layers[-1].bias.data = theta.get(f"b{i}", torch.zeros(m))
        if net == "mlp" and i < 3:
            layers.append(nn.BatchNorm1d(m))
            layers[-1].weight.data, layers[-1].bias.data = theta[f"scale{i}"], theta[f"shift{i}"]
        layers += [nn.ReLU()] if i < 3 else []
    close(ours.network(theta, x[0]), nn.Sequential(*layers).train()(x[0]).detach())


@each_net
@each_file
def test_initial_parameters_are_uniform_in_one_over_root_fan_in(ours, net):
    hidden = {"curves": (40, 30), "conv": (16, 24, 20, 12), "mlp": (64, 32)}[net]
    theta = ours.init_params(make_tasks(net), args := make_args(ours, net, hidden_sizes=hidden), seeded(0))
    if net == "conv":
        torch_layers = [nn.Conv2d(n, m, 3) for n, m in itertools.pairwise((1, *hidden))] + [nn.Linear(12 * 2 * 2, 5)]
    else:
        sizes = (1, *hidden, 1) if net == "curves" else (784, *hidden, 5)
        torch_layers = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    names = set()
    for i, layer in enumerate(torch_layers):
        bias = f"shift{i}" if net != "curves" and i < len(hidden) else f"b{i}"
        w, b, fan_in = theta[f"w{i}"], theta[bias], layer.weight[0].numel()
        assert w.shape == (layer.weight if w.ndim == 4 else layer.weight.T).shape
        assert b.shape == layer.bias.shape
        assert float(w.abs().max()) <= fan_in**-0.5
        assert float(b.abs().max()) <= fan_in**-0.5
        if w.numel() > 1000:
            assert float(w.max()) > 0.98 * fan_in**-0.5
            assert float(w.min()) < -0.98 * fan_in**-0.5
            assert float(w.var()) == pytest.approx(1 / (3 * fan_in), rel=0.1)
        if len(b) > 10:
            assert float(b.max()) > 0.5 * fan_in**-0.5
            assert float(b.min()) < -0.5 * fan_in**-0.5
        names |= {f"w{i}", bias}
        if net != "curves" and i < len(hidden):
            assert torch.equal(theta[f"scale{i}"], torch.ones(hidden[i]))
            names.add(f"scale{i}")
    assert set(theta) == names
    again, other = (ours.init_params(make_tasks(net), args, seeded(seed)) for seed in (0, 1))
    assert torch.equal(flat(again), flat(theta))
    assert not torch.equal(flat(other), flat(theta))


@each_file
def test_loss_is_squared_error_or_cross_entropy(ours, monkeypatch):
    rng = np.random.default_rng(0)
    output, target, label = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), rng.integers(4, size=6)
    monkeypatch.setattr(ours, "network", lambda params, x: params["shift"] + x)
    params, x = {"shift": torch.tensor(2.0)}, torch.tensor(output - 2)
    actual = float(ours.loss(params, x, torch.tensor(target)))
    assert actual == pytest.approx(np.mean((output - target) ** 2), rel=1e-12)
    log_prob = output - np.log(np.exp(output).sum(1, keepdims=True))
    expected = -np.mean([log_prob[j, label[j]] for j in range(6)])
    one_hot = torch.tensor(np.eye(4)[label] == 1)
    assert float(ours.loss(params, x, one_hot)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("classes", [True, False])
@each_batch_norm_net
@each_file
def test_score_against_a_loop_over_queries(ours, net, classes, transductive):
    args = make_args(ours, net, transductive=transductive)
    sets = make_sets(net, (2, 2), num_tasks=6)
    seen = set()
    for i in range(6):
        theta = make_theta(ours, net, args, seed=i)
        support, (x, _) = item(sets, i)
        label = torch.randint(5, (10,), generator=seeded(i))
        y = functional.one_hot(label, 5).bool() if classes else torch.randn(10, 5, generator=seeded(i))
        if transductive:
            output = ref_network(theta, x)
        else:
            output = torch.stack([ref_network(theta, torch.cat([support[0], x[j : j + 1]]))[-1] for j in range(10)])
        if classes:
            expected = sum(int(np.argmax(output[j].numpy())) == int(label[j]) for j in range(10)) / 10
        else:
            expected = float(((output - y) ** 2).mean())
        assert float(ours.accuracy_or_error(theta, support, (x, y), args)) == pytest.approx(expected, rel=1e-10)
        seen.add(expected)
    assert len(seen) > 1


@each_batch_norm_net
@each_file
def test_only_transductive_predictions_depend_on_the_other_queries(ours, net):
    (support, (x, _)) = item(make_sets(net, (2, 2), num_tasks=1), 0)
    y = torch.randn(10, 5, generator=seeded(0))  # squared errors: every change shows

    def scores(queries, transductive):
        args = make_args(ours, net, transductive=transductive)
        return ours.accuracy_or_error(make_theta(ours, net, args), support, (x[queries], y[queries]), args)

    for transductive in (False, True):
        together = scores(list(range(10)), transductive)
        pairs = sum(scores([j, j + 1], transductive) for j in range(0, 10, 2)) / 5
        assert (abs(float(together / pairs) - 1) < 1e-10) == (not transductive)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate
# ---------------------------------------------------------------------------------------------------------------------


class Spy:
    """Tasks that keep what was drawn; none can be drawn but the test set."""

    def __init__(self, tasks):
        self.tasks, self.calls, self.is_classification = tasks, [], tasks.is_classification

    def test_set(self, num_tasks):
        drawn, generator = self.tasks.test_set(num_tasks)
        self.calls.append((num_tasks, drawn))
        return drawn, generator

    def sample(self, tasks, sizes, generator):
        sets = self.tasks.sample(tasks, sizes, generator)
        self.calls[-1] += (tuple(sizes), sets)
        return sets


@pytest.mark.parametrize("transductive", [True, False])
@each_net
@each_file
def test_evaluation_is_a_loop_over_tasks_and_steps(ours, net, transductive):
    count = {"curves": 53, "conv": 7, "mlp": 7}[net]  # 53: more than a chunk of Reptile's evaluation
    kwargs = ADAM if ours is reptile and net == "conv" else {}
    args = make_args(ours, net, eval_tasks=count, eval_steps=3, transductive=transductive, **kwargs)
    spy, theta = Spy(make_tasks(net)), make_theta(ours, net, args)
    before = flat(theta).clone()
    actual = evaluate_of(ours, spy, theta, args)
    assert torch.equal(flat(theta), before)
    [(num_tasks, drawn, sizes, (support, query))] = spy.calls
    assert (num_tasks, sizes) == (count, (args.shots, getattr(args, "eval_queries", args.shots)))
    expected, generator = make_tasks(net).test_set(count)
    assert torch.equal(drawn, expected)
    examples = make_tasks(net).sample(drawn, sizes, generator)
    assert all(torch.equal(a, b) for a, b in zip(support + query, examples[0] + examples[1], strict=True))

    table = np.zeros((count, 4))
    for i in range(count):
        ((x, y), (u, v)) = item([support, query], i)
        for k, params in enumerate(ref_steps(theta, [(x, y)] * 3, args)):
            output = ref_network(params, u)
            if not transductive:
                output = torch.stack([ref_network(params, torch.cat([x, z[None]]))[-1] for z in u])
            hits, squares = output.argmax(1) == v.to(torch.int).argmax(1), (output - v.to(u)) ** 2
            table[i, k] = float(squares.mean() if net == "curves" else hits.double().mean())
    name, last, gain = "loss" if net == "curves" else "accuracy", table[:, -1], table[:, -1] - table[:, 0]
    assert gain.std() > 0
    results = {f"test/{name}_k{k}": table[:, k] for k in range(4)}
    intervals = {f"{key}_ci95": x for key, x in results.items()} | {"test/ci95": last, "test/gain_ci95": gain}
    assert list(actual) == [*results, *intervals]
    for name, x in results.items():
        close(actual[name], torch.from_numpy(x))
    expected = {name: x.mean() for name, x in results.items()} | {"test/tasks": count}
    summary = summarise(actual)
    for name, x in intervals.items():
        close(actual[name][0], torch.from_numpy(x))
        assert summary[name] == pytest.approx(interval(x, drawn), rel=1e-4)
        expected[name] = summary[name]
    assert summary == pytest.approx(expected, rel=1e-9)

    args.meta_batch_size, args.eval_every, args.seed = 2, 7, 9  # the test set is that of every run
    assert summarise(evaluate_of(ours, spy, theta, args)) == summary


@each_file
def test_evaluation_leaves_random_numbers_alone(ours):
    args, tasks = train_args(ours, "curves"), make_tasks("curves")
    state = torch.get_rng_state()
    stats = evaluate_of(ours, tasks, make_theta(ours, "curves", args), args)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(stats["test/loss_k0"]).all()
