"""Prototypical networks: an embedding in which a new class is the mean of its examples.

Paper: Snell, Swersky, Zemel 2017, Prototypical Networks, arXiv:1703.05175, Algorithm 1; --matching: Vinyals
    et al. 2016, Matching Networks, arXiv:1606.04080, equation 1.
Run: python algos/protonet.py                       5-way 1-shot characters, drawn on the spot
     python algos/protonet.py --env-id Omniglot-v0 --data DIR   the real ones
     python algos/protonet.py --matching            by attention to the examples; --help explains every flag
Result: Omniglot, 5-way 1-shot: 96.1 % after 5,000 meta-updates (165 CPU seconds), with --halve-every 1000
    (the paper, as others quote it: 98.8 %); --matching, a shorter run: 88.6 % (98.1 %)
Algorithm:
    [1] repeat: draw N tasks of `train_ways` classes, more than the test tasks have
    [2]     per task: a support set D_i of `shots` examples of each class, and other ones, queries D'_i
    [3]     c_k = mean of f(x), x the support examples of class k
    [4]     log p(y = k | x) = log softmax_k(-|f(x) - c_k|^2); --matching: p is the sum over the support
            examples x_j of class k of a(x, x_j) = softmax_j(cos(f(x), f(x_j)))
    [5]     J(theta) = mean over tasks i and queries (x, y) in D'_i of -log p(y | x)
    [6]     theta <- Adam(theta, grad J(theta)); its step size is halved now and then
    [7]     now and then: accuracy on the test tasks with 0, 1, .. examples of each class
Symbols: f = embed, with the weights theta (the paper: f_phi); N_C = train_ways, N_S = shots, N_Q = queries.
Shapes: a suffix names a tensor's axes (x_NBX): N tasks, B support examples, Q queries, X inputs, Y classes, F
    features, K counts of examples from 0. Inside vmap functions see one task, no N.
Differs from the paper: 4 layers of stride 2 keep 2 x 2 pixels of 64 filters (its: max pooling, 1 pixel);
    batch norm with a task's statistics, in tests, too (its code: running ones); 20 classes in training (its:
    60); fewer updates. --matching: an example is embedded by itself, but for batch norm, with no second
    network that reads the whole support set.
"""

import math
import os
import sys
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
from torch import Generator, Tensor
from torch.func import vmap
from torch.nn import functional

Params = dict[str, Tensor]  # w0 [64, 1, 3, 3] or [X, H], scale0 and shift0 of its batch norm, w1, ..
Examples = tuple[Tensor, Tensor]  # x [N, B, X] and y [N, B, Y]: booleans, the class one-hot


@dataclass
class Args:
    env_id: str = "Glyphs-v0"
    """Glyphs-v0, Omniglot-v0 (images)"""
    data: str = ""
    """folder of Omniglot-v0: it holds images_background/ and images_evaluation/"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, examples"""
    iterations: int = 5000
    """meta-updates"""
    meta_batch_size: int = 1
    """tasks per meta-update (N); 1 in the paper's code"""
    ways: int = 5
    """classes of a test task (paper: 5 and 20)"""
    train_ways: int = 20
    """classes of a training task (N_C); more of them than in a test are a harder training; paper: 60"""
    shots: int = 1
    """support examples of each class (N_S); 1 and 5 in the paper"""
    queries: int = 5
    """queries of each class (N_Q), in training and evaluation; 5 in the paper's code"""
    mlp: bool = False
    """fully connected layers in place of 3x3 filters with stride 2"""
    hidden_sizes: tuple[int, ...] = ()
    """filters or units of layers; default 64 64 64 64, --mlp 256 128 64 64; F: the last, times pixels left"""
    matching: bool = False
    """attention to the support examples by cosine, as in matching networks, in place of prototypes"""
    lr: float = 1e-3
    """Adam's step size at first; 1e-3 in the paper's code"""
    halve_every: int = 2000
    """meta-updates until the step size is halved; 2000 in the paper's code"""
    eval_every: int = 500
    """iterations from one evaluation and checkpoint to the next"""
    eval_tasks: int = 600
    """test tasks of an evaluation"""
    eval_split: Literal["test", "valid"] = "test"
    """classes of an evaluation; valid, of images only: others than the test's, to choose step sizes by"""
    transductive: bool = True
    """batch norm sees all queries of a task; if not, one at a time beside the support"""
    cuda: bool = False
    """everything on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        self.hidden_sizes = tuple(self.hidden_sizes) or ((256, 128, 64, 64) if self.mlp else (64, 64, 64, 64))
        for name, value in vars(self).items():
            low, high = (1e-12, 1e6) if isinstance(value, float) else (1, 10**9)
            if name == "seed":
                low, high = 0, 2**31
            for x in value if isinstance(value, tuple) else (value,):
                if not isinstance(x, bool | str) and not low <= x <= high:
                    allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                    raise ValueError(f"--{name.replace('_', '-')} {x}: allowed is {allowed}")


def init_embedding(tasks, args: Args, generator: Generator) -> Params:
    """Weights uniform in +-1 / sqrt(fan-in), and scale and shift of a norm for each layer."""
    sizes = tasks.num_inputs if args.mlp else 1, *args.hidden_sizes
    params = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        bound = 1 / math.sqrt(n if args.mlp else 9 * n)
        shape = (n, m) if args.mlp else (m, n, 3, 3)
        params[f"w{i}"] = bound * (2 * torch.rand(shape, generator=generator) - 1)
        params[f"shift{i}"] = bound * (2 * torch.rand(m, generator=generator) - 1)
        params[f"scale{i}"] = torch.ones(m)
    return params


def batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise each channel (axis 1) over this very batch, in evaluation, too: no running statistics.

    Written out, because the second derivative of torch's own, which MAML takes, is wrong under vmap.
    """
    axes = (0, *range(2, x.ndim))
    channels = (-1, *(1,) * (x.ndim - 2))
    part = x.shape[1] / x.numel()  # part * sum is .mean(), but quicker under vmap and grad
    centred = x - part * x.sum(axes, keepdim=True)
    rstd = torch.rsqrt(part * centred.square().sum(axes, keepdim=True) + 1e-5)
    return centred * (rstd * scale.view(channels)) + shift.view(channels)


def embed(theta: Params, x_BX: Tensor) -> Tensor:
    """f: features [B, F] of ReLU layers: fully connected, or 3x3 convolutions with stride 2 on images."""
    convolutional = theta["w0"].ndim == 4
    hidden = x_BX.unflatten(1, (1, math.isqrt(x_BX.shape[1]), -1)) if convolutional else x_BX
    for i in range(len(theta) // 3):
        w = theta[f"w{i}"]
        hidden = functional.conv2d(hidden, w, stride=2, padding=1) if convolutional else hidden @ w
        hidden = torch.relu(batch_norm(hidden, theta[f"scale{i}"], theta[f"shift{i}"]))
    return hidden.flatten(1)


def classify(theta: Params, support: Examples, x_QX: Tensor, args: Args) -> Tensor:
    """Logits [Q, Y] of the classes of one task's queries."""
    x_BX, y_BY = support
    support_BF, query_QF = embed(theta, torch.cat([x_BX, x_QX])).split([len(x_BX), len(x_QX)])
    class_BY = y_BY.to(x_BX)
    if args.matching:
        cosine_QB = functional.normalize(query_QF, dim=1) @ functional.normalize(support_BF, dim=1).mT
        return torch.log(cosine_QB.softmax(1) @ class_BY)  # log p itself
    prototype_YF = class_BY.mT @ support_BF / class_BY.sum(0)[:, None]  # [3]
    return -(query_QF[:, None] - prototype_YF).square().sum(2)


def protonet_gradient(theta: Params, support: Examples, query: Examples, args: Args) -> tuple[Params, dict]:
    """The gradient of J, and the mean loss and accuracy of a batch of tasks."""
    theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
    x_NQX, y_NQY = query
    logit_NQY = vmap(lambda support, x_QX: classify(theta, support, x_QX, args))(support, x_NQX)
    log_prob_NQY = logit_NQY.log_softmax(2)  # [4]
    loss = -(log_prob_NQY * y_NQY).sum(2).mean()  # [5]
    gradient = torch.autograd.grad(loss, list(theta.values()))
    right_NQ = y_NQY.take_along_dim(logit_NQY.argmax(2, keepdim=True), 2).squeeze(2).to(loss)
    stats = {"train/loss_post": loss.detach(), "train/accuracy_post": right_NQ.mean()}
    return dict(zip(theta, gradient, strict=True)), stats


def accuracy(theta: Params, support: Examples, query: Examples, args: Args) -> Tensor:
    """On the queries of one task."""
    x_QX, y_QY = query

    def alone(x_X: Tensor) -> Tensor:
        """One query beside the support, so that batch norm cannot learn from the other queries."""
        return classify(theta, support, x_X[None], args)[0]

    logit_QY = classify(theta, support, x_QX, args) if args.transductive else vmap(alone)(x_QX)
    return y_QY.take_along_dim(logit_QY.argmax(1, keepdim=True), 1).to(x_QX).mean()


@torch.no_grad()
def evaluate(tasks, theta: Params, args: Args) -> dict:
    """Accuracy on the test tasks with 0, 1, .. examples of each class, the same tasks in every run."""
    test_tasks, generator = tasks.test_set(args.eval_tasks)
    support, query = tasks.sample(test_tasks, (args.shots, args.queries), generator)
    ways = tasks.num_outputs

    def learn_one_task(support: Examples, query: Examples) -> Tensor:
        x_BX, y_BY = support
        results = [x_BX.new_full((), 1 / ways)]  # by chance: nothing tells the classes apart
        for k in range(1, args.shots + 1):
            first = x_BX[: k * ways], y_BY[: k * ways]  # they are ordered by example, then class
            results.append(accuracy(theta, first, query, args))
        return torch.stack(results)

    result_NK = vmap(learn_one_task, chunk_size=50)(support, query)  # [7]
    stats = {f"test/accuracy_k{k}": result_N for k, result_N in enumerate(result_NK.unbind(1))}
    # A run logs means, and of names that end in ci95 half the width of a 95 % interval over different tasks.
    stats |= {f"{key}_ci95": (result_N, test_tasks) for key, result_N in stats.items()}
    stats["test/ci95"] = result_NK[:, -1], test_tasks
    stats["test/gain_ci95"] = result_NK[:, -1] - result_NK[:, 0], test_tasks
    return stats


def train(tasks, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 1, from `state` on."""
    theta = {name: value.to(tasks.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, fused=True)
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    generator = Generator()
    generator.set_state(state["generator"])
    train_tasks = copy(tasks)  # of the same images
    train_tasks.num_outputs = args.train_ways  # classes of the tasks that it draws
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        batch = train_tasks.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        support, query = train_tasks.sample(batch, (args.shots, args.queries), generator)  # [2]
        gradient, stats = protonet_gradient(theta, support, query, args)
        for name, value in theta.items():
            value.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** ((iteration - 1) // args.halve_every)
        optimizer.step()  # [6]
        sets = support, query
        state["env_steps"] += sum(x_NBX.shape[0] * x_NBX.shape[1] for x_NBX, _ in sets)  # examples seen
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        run.end_iteration(state, stats, evaluate=lambda: evaluate(tasks, state["theta"], args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import make_supervised, records

    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    tasks = make_supervised(args.env_id, args.ways, 2, args.data, args.cuda, args.eval_split)
    generator = Generator().manual_seed(args.seed)
    if not tasks.is_classification:
        raise records.refusal(f"--env-id {args.env_id}: it has no classes; allowed is Glyphs-v0, Omniglot-v0")
    first, last = tasks.classes["train"]
    if not 2 <= args.train_ways <= last - first:
        hint = f"allowed is 2 to {last - first}, the training classes"
        raise records.refusal(f"--train-ways {args.train_ways}: {hint}")
    if (drawings := tasks.images.shape[1]) < args.shots + args.queries:
        hint = f"allowed are {drawings} in all, the drawings of a class"
        raise records.refusal(f"--shots {args.shots} --queries {args.queries}: {hint}")
    theta = init_embedding(tasks, args, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, tasks.device)

    def examine() -> dict:
        return evaluate(tasks, state["theta"], args)

    with records.open_run(args, state, tasks, unit="examples of each class", evaluate=examine) as run:
        if not args.evaluate:
            train(tasks, args, run, state)


if __name__ == "__main__":
    main()
