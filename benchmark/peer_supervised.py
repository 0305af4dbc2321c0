"""Supervised files as they are usually written: the references of benchmark/speed_supervised.py.

Each function computes what the function of the same place in algos/ does, from the same arguments
(tests/test_peer_supervised.py compares the gradients), with a Python loop over tasks:

* LOOP: torch alone. The network is built from torch's fused layers; inner steps by `torch.autograd.grad`, for MAML with
  `create_graph=True`, the queries' losses are added up, then one backward pass. Reptile trains a copy of the weights
  with `torch.optim`.
* TORCHOPT: the same with torchopt's optimisers: for MAML a module and `MetaSGD`, its state extracted before each task
  and recovered after it, as in torchopt's own MAML example; for the others its functional optimisers, the parameters
  and moments updated in place where nothing is differentiated through them.
"""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    import torchopt
except ImportError:  # requirements-benchmark.txt
    torchopt = None

Params = dict[str, Tensor]
Examples = tuple[Tensor, Tensor]  # x [N, B, X] and y [N, B, Y]


def network(params: Params, x: Tensor) -> Tensor:
    depth = sum(name.startswith("w") for name in params) - 1
    return torch.addmm(params[f"b{depth}"], embed(params, x, depth), params[f"w{depth}"])


def embed(params: Params, x: Tensor, depth: int | None = None) -> Tensor:
    """What `depth` layers make of x, by default all of them."""
    depth, conv = depth or sum(name.startswith("w") for name in params), params["w0"].ndim == 4
    hidden = x.view(len(x), 1, math.isqrt(x.shape[1]), -1) if conv else x
    for i in range(depth):
        w, scale = params[f"w{i}"], params.get(f"scale{i}")
        b = params[f"b{i}"] if scale is None else params[f"shift{i}"]
        if scale is None:
            hidden = torch.addmm(b, hidden, w)
        else:
            hidden = functional.conv2d(hidden, w, stride=2, padding=1) if conv else hidden @ w
            hidden = functional.batch_norm(hidden, None, None, scale, b, training=True)
        hidden = functional.relu(hidden)
    return hidden.flatten(1)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    output = network(params, x)
    return functional.cross_entropy(output, y.to(output)) if y.dtype == torch.bool else functional.mse_loss(output, y)


class Net(nn.Module):
    """The same as a module, with weights of its own."""

    def __init__(self, theta: Params):
        super().__init__()
        for name, value in theta.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return loss(self._parameters, x, y)


def result(theta: Params, grads, total: Tensor, tasks: int) -> tuple[Params, Tensor]:
    return dict(zip(theta, grads, strict=True)), total.detach() / tasks


# ---------------------------------------------------------------- torch alone


def maml(theta: Params, support: Examples, query: Examples, args, first_order=False) -> tuple[Params, Tensor]:
    theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
    (x, y), tasks, total = support, len(query[0]), 0.0
    for i in range(tasks):
        params = theta
        for _ in range(args.inner_steps):
            inner = loss(params, x[i], y[i])
            grads = torch.autograd.grad(inner, list(params.values()), create_graph=not first_order)
            params = {name: value - args.inner_lr * g for (name, value), g in zip(params.items(), grads, strict=True)}
        total = total + loss(params, query[0][i], query[1][i])
    return result(theta, torch.autograd.grad(total / tasks, list(theta.values())), total, tasks)


def reptile(theta: Params, moments, batches: list[Examples], args) -> tuple[Params, Tensor]:
    tasks, total, sums = len(batches[0][0]), 0.0, [torch.zeros_like(value) for value in theta.values()]
    for i in range(tasks):
        net = Net(theta)
        if args.inner_optimizer == "adam":
            optimizer = torch.optim.Adam(net.parameters(), args.inner_lr, betas=(0.0, 0.999))
            for value, squares in zip(net.parameters(), moments.second_moment.values(), strict=True):
                memory = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": squares.clone()}
                optimizer.state[value] = {"step": torch.tensor(float(moments.steps)), **memory}
        else:
            optimizer = torch.optim.SGD(net.parameters(), args.inner_lr)
        for x, y in batches:
            optimizer.zero_grad()
            net.loss(x[i], y[i]).backward()
            optimizer.step()
        with torch.no_grad():
            total = total + net.loss(batches[-1][0][i], batches[-1][1][i])
            for value, start, trained in zip(sums, theta.values(), net.parameters(), strict=True):
                value += start - trained
    return result(theta, [value / tasks for value in sums], total, tasks)


def protonet(theta: Params, support: Examples, query: Examples, args) -> tuple[Params, dict]:
    net, total, right = Net(theta), 0.0, []
    for x, y, queries, classes in zip(*support, *query, strict=True):
        features = embed(net._parameters, torch.cat([x, queries]))
        examples, queries = features[: len(x)], features[len(x) :]
        if args.matching:
            cosine = functional.cosine_similarity(queries[:, None], examples[None], dim=2)
            logits = (cosine.softmax(1) @ y.to(x)).log()
        else:
            prototypes = torch.stack([examples[y[:, k]].mean(0) for k in range(y.shape[1])])
            logits = -torch.cdist(queries, prototypes).square()
        total = total + functional.cross_entropy(logits, classes.int().argmax(1))
        right.append((logits.argmax(1) == classes.int().argmax(1)).to(x).mean())
    gradient, loss = result(theta, torch.autograd.grad(total / len(right), list(net.parameters())), total, len(right))
    return gradient, {"train/loss_post": loss, "train/accuracy_post": torch.stack(right).mean()}


def in_context(theta: Params, support: Examples, query: Examples, args) -> tuple[Params, dict]:
    """The transformer on sets of points of curves, with an attention written out."""
    if args.encoder != "transformer" or args.sequential or "w0" in theta:
        raise SystemExit("no peer is written for other encoders, --sequential and images")
    net, total = Net(theta), 0.0
    for x, y, queries, targets in zip(*support, *query, strict=True):
        output = transformer(net._parameters, x, y, queries, args.layers)
        total = total + functional.mse_loss(output, targets)
    tasks = len(support[0])
    gradient, loss = result(theta, torch.autograd.grad(total / tasks, list(net.parameters())), total, tasks)
    return gradient, {"train/loss_post": loss}


def transformer(theta: Params, x: Tensor, y: Tensor, queries: Tensor, layers: int) -> Tensor:
    """Predictions of one task's queries."""
    shown = torch.cat([torch.cat([y, torch.ones(len(y), 1).to(y)], 1), torch.zeros(len(queries), y.shape[1] + 1).to(y)])
    hidden = torch.cat([x, queries]) @ theta["w_x"].T + shown @ theta["w_y"].T
    hides = torch.ones(len(hidden), len(hidden), dtype=torch.bool, device=x.device)
    hides[:, : len(x)] = False
    hides.fill_diagonal_(fill_value=False)
    size = hidden.shape[1:]
    for i in range(layers):
        normed = functional.layer_norm(hidden, size, theta[f"scale_attention{i}"], theta[f"shift_attention{i}"])
        q, k, v = (part.unflatten(1, (-1, 16)).transpose(0, 1) for part in (normed @ theta[f"w_qkv{i}"].T).chunk(3, 1))
        weight = (q @ k.mT / 4).masked_fill(hides, -math.inf).softmax(2)  # 4: the root of a head's width
        hidden = hidden + (weight @ v).transpose(0, 1).flatten(1) @ theta[f"w_read{i}"].T
        normed = functional.layer_norm(hidden, size, theta[f"scale_mlp{i}"], theta[f"shift_mlp{i}"])
        hidden = hidden + functional.gelu(normed @ theta[f"w_wide{i}"].T) @ theta[f"w_narrow{i}"].T
    hidden = functional.layer_norm(hidden, size, theta["scale_out"], theta["shift_out"])
    return hidden[len(x) :] @ theta["w_head"].T + theta["b_head"]


def learned_optimizer(optimisees, theta: Params, start: tuple, tasks: Tensor, batches: list, args) -> tuple:
    """One function at a time, by cells of torch.nn."""
    sizes = [2] + [args.hidden_size] * args.layers
    cells, head = [nn.LSTMCell(n, m) for n, m in pairwise(sizes)], nn.Linear(args.hidden_size, 1)
    for i, cell in enumerate(cells):
        names = ("w_input", "w_hidden", "b_input", "b_hidden")
        for name, parameter in zip(names, cell.parameters(), strict=True):
            parameter.data = theta[f"{name}{i}"].detach().clone()
    head.weight.data, head.bias.data = theta["w_out"].detach().clone(), theta["b_out"].detach().clone()
    weights = [parameter for module in (*cells, head) for parameter in module.parameters()]
    (params, memory), total, ends = start, 0.0, []
    C = params.shape[1]
    for i in range(len(params)):
        one, rows = slice(i, i + 1), slice(i * C, i * C + C)
        x, state = params[one], [(memory[f"h{j}"][rows], memory[f"c{j}"][rows]) for j in range(args.layers)]
        for now, following in pairwise(batches):
            now, following = (None if batch is None else batch[one] for batch in (now, following))
            leaf = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(optimisees.loss(leaf, tasks[one], now).sum(), leaf)
            hidden = torch.cat([g.abs().clamp_min(math.exp(-10)).log() / 10, (math.exp(10) * g).clamp(-1, 1)]).T
            for j, cell in enumerate(cells):
                state[j] = cell(hidden, state[j])
                hidden = state[j][0]
            x = x + args.output_scale * head(hidden).T
            last = optimisees.loss(x, tasks[one], following).sum()
            total = total + last
        ends.append((x, state, last))
    names = [f"{name}{i}" for i in range(args.layers) for name in ("w_input", "w_hidden", "b_input", "b_hidden")]
    gradient = torch.autograd.grad(total / len(params), weights)
    memory = {
        f"{name}{j}": torch.cat([state[j][k] for _, state, _ in ends]).detach()
        for j in range(args.layers)
        for k, name in enumerate("hc")
    }
    end = torch.cat([x for x, *_ in ends]).detach(), memory
    last = torch.stack([last for *_, last in ends]).mean().detach()
    return dict(zip([*names, "w_out", "b_out"], gradient, strict=True)), end, last


# ---------------------------------------------------------------- torchopt


def torchopt_maml(theta: Params, support: Examples, query: Examples, args) -> tuple[Params, Tensor]:
    net, tasks, total = Net(theta), len(query[0]), 0.0
    leaves, optimizer = list(net.parameters()), torchopt.MetaSGD(net, lr=args.inner_lr)
    starts = [torchopt.extract_state_dict(x, by="reference") for x in (net, optimizer)]
    x, y = support
    for i in range(tasks):
        for _ in range(args.inner_steps):
            optimizer.step(net.loss(x[i], y[i]))
        total = total + net.loss(query[0][i], query[1][i])
        for x, start in zip((net, optimizer), starts, strict=True):
            torchopt.recover_state_dict(x, start)
    return result(theta, torch.autograd.grad(total / tasks, leaves), total, tasks)


def torchopt_fomaml(theta: Params, support: Examples, query: Examples, args) -> tuple[Params, Tensor]:
    leaves = [value.detach().requires_grad_() for value in theta.values()]
    tasks, total, optimizer = len(query[0]), 0.0, torchopt.sgd(args.inner_lr)
    x, y = support
    for i in range(tasks):
        params, state = leaves, optimizer.init(leaves)
        for _ in range(args.inner_steps):
            grads = list(torch.autograd.grad(loss(dict(zip(theta, params, strict=True)), x[i], y[i]), params))
            updates, state = optimizer.update(grads, state, inplace=True)
            params = torchopt.apply_updates(params, updates, inplace=False)
        total = total + loss(dict(zip(theta, params, strict=True)), query[0][i], query[1][i])
    return result(theta, torch.autograd.grad(total / tasks, leaves), total, tasks)


def torchopt_reptile(theta: Params, moments, batches: list[Examples], args) -> tuple[Params, Tensor]:
    """With torchopt's Adam as it begins, whatever `moments` are: the same work, and the same steps at the start."""
    adam = args.inner_optimizer == "adam"
    optimizer = torchopt.adam(args.inner_lr, betas=(0.0, 0.999)) if adam else torchopt.sgd(args.inner_lr)
    tasks, total, sums = len(batches[0][0]), 0.0, [torch.zeros_like(value) for value in theta.values()]
    for i in range(tasks):
        net = Net(theta)
        state = optimizer.init(params := list(net.parameters()))
        for x, y in batches:
            grads = list(torch.autograd.grad(net.loss(x[i], y[i]), params))
            updates, state = optimizer.update(grads, state, inplace=True)
            torchopt.apply_updates(params, updates, inplace=True)
        with torch.no_grad():
            total = total + net.loss(batches[-1][0][i], batches[-1][1][i])
            for value, start, trained in zip(sums, theta.values(), params, strict=True):
                value += start - trained
    return result(theta, [value / tasks for value in sums], total, tasks)


LOOP = {"maml": maml, "fomaml": partial(maml, first_order=True), "reptile": reptile, "protonet": protonet}
LOOP |= {"in_context": in_context, "learned_optimizer": learned_optimizer}
TORCHOPT = {"maml": torchopt_maml, "fomaml": torchopt_fomaml, "reptile": torchopt_reptile} if torchopt else {}
