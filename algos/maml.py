"""MAML for supervised learning: an initialisation from which a few gradient steps learn a new task.

Paper: Finn, Abbeel, Levine 2017, Model-Agnostic Meta-Learning, arXiv:1703.03400, Algorithm 2.
Run: python algos/maml.py                           sinusoids; --help explains every flag; --cuda: on the GPU
     python algos/maml.py --env-id Glyphs-v0        5-way 1-shot characters, drawn on the spot
     python algos/maml.py --env-id Omniglot-v0 --data DIR       the real ones
Result: sinusoid, 10 shots: MSE 0.42 after 1 step, 0.14 after 10 (pretraining: 2.27, 1.49; paper's figure:
    about 0.4, 0.2). Glyphs, 5-way 1-shot: 93.8 % (nearest pixel mean: 45.3 %; the paper, on Omniglot: 98.7 %)
Algorithm:
    [1] repeat: draw N tasks
    [2]     per task: a support set D_i and a query set D'_i of `shots` examples each, disjoint
    [3]     theta'_i = theta - alpha grad L(theta; D_i), `inner_steps` times
    [4]     L_meta(theta) = mean_i L(theta'_i; D'_i), theta'_i a function of theta
    [5]     g = grad L_meta(theta), through the inner steps: it contains the Hessians of L(.; D_i)
    [6]     theta <- Adam(theta, g)
    [7]     now and then: result on the test tasks after 0, 1, .. inner steps
Symbols: theta'_i = params, alpha = inner_lr, beta = outer_lr; L: mean squared error or cross-entropy.
Shapes: a suffix names a tensor's axes (x_NBX): N tasks, B examples, X inputs, Y outputs, K counts of inner
    steps, from 0. Entries of parameter dicts gain N by adaptation; inside vmap functions see one task, no N.
Differs from the paper: torch's usual initialisation (its code: standard deviation 0.01); test amplitudes are
    never trained on; the conv net keeps its last 2 x 2 pixels (its code averages them); fewer iterations.
"""

import math
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.nn import functional

Params = dict[str, Tensor]  # one net for all tasks: w0 [X, H], b0 [H], ..; one net per task: w0 [N, X, H], ..
Examples = tuple[Tensor, Tensor]  # x [N, B, X] and y [N, B, Y]; booleans y are classes, one-hot
CURVES = {"iterations": 10000, "meta_batch_size": 25, "shots": 10, "inner_lr": 0.01, "inner_steps": 1}
IMAGES = {"iterations": 3000, "meta_batch_size": 32, "shots": 1, "inner_lr": 0.4, "inner_steps": 1}


@dataclass
class Args:
    env_id: str = "Sinusoid-v0"
    """Sinusoid-v0, SinusoidAllPhases-v0, SinusoidOrLine-v0 (curves), Glyphs-v0, Omniglot-v0 (images)"""
    data: str = ""
    """folder of Omniglot-v0, with images_background and images_evaluation, unpacked or as zips"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, examples"""
    iterations: int | None = None
    """meta-updates; default 10000 for curves, 3000 for images; in MAML's paper 70000 and 60000"""
    meta_batch_size: int | None = None
    """tasks per meta-update (N); default 25 for curves, 32 for images, as in MAML's paper (20-way: 16)"""
    ways: int = 5
    """classes of an image task; 5 and 20 in MAML's paper"""
    shots: int | None = None
    """support examples, of each class, and as many queries; default 10 for curves, 1 for images"""
    mlp: bool = False
    """fully connected layers for images, too, in place of 3x3 filters with stride 2"""
    hidden_sizes: tuple[int, ...] = ()
    """units or filters of layers; default 40 40 for curves, 64 64 64 64 for images, --mlp 256 128 64 64"""
    inner_lr: float | None = None
    """step size of adaptation (alpha); default and MAML's paper: 0.01 for curves, 0.4 for images"""
    inner_steps: int | None = None
    """inner steps in training; default and MAML's paper: 1 (20-way: 5)"""
    outer_lr: float = 1e-3
    """step size of the meta-update (beta); 1e-3 in MAML's paper"""
    eval_every: int = 500
    """iterations from one evaluation and checkpoint to the next"""
    eval_tasks: int = 600
    """test tasks of an evaluation; 600 in MAML's paper"""
    eval_split: Literal["test", "valid"] = "test"
    """classes of an evaluation; valid, of images only: others than the test's, to choose step sizes by"""
    eval_steps: int = 10
    """inner steps of an evaluation; 10 for curves, 3 for images in MAML's paper"""
    transductive: bool = True
    """batch norm sees all queries of a task, as in the papers; if not, one at a time beside the support"""
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
        images = self.env_id in ("Glyphs-v0", "Omniglot-v0")
        for name, value in (IMAGES if images else CURVES).items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        usual = ((256, 128, 64, 64) if self.mlp else (64, 64, 64, 64)) if images else (40, 40)
        self.hidden_sizes = tuple(self.hidden_sizes) or usual
        for name, value in vars(self).items():
            low, high = (1e-12, 1e6) if isinstance(value, float) else (1, 10**9)
            if name == "seed":
                low, high = 0, 2**31
            for x in value if isinstance(value, tuple) else (value,):
                if not isinstance(x, bool | str) and not low <= x <= high:
                    allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                    raise ValueError(f"--{name.replace('_', '-')} {x}: allowed is {allowed}")


def init_params(tasks, args: Args, generator: Generator) -> Params:
    """Weights and biases uniform in +-1 / sqrt(fan-in); batch norm in networks for images."""
    depth = len(args.hidden_sizes)
    convolutional = tasks.is_classification and not args.mlp
    sizes = 1 if convolutional else tasks.num_inputs, *args.hidden_sizes, tasks.num_outputs
    params = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        is_last = i == depth
        if convolutional and is_last:  # it sees all pixels that are left after `depth` strides of 2
            n = n * math.ceil(math.isqrt(tasks.num_inputs) / 2**depth) ** 2
        filters = convolutional and not is_last
        bound = 1 / math.sqrt(9 * n if filters else n)
        shape = (m, n, 3, 3) if filters else (n, m)
        params[f"w{i}"] = bound * (2 * torch.rand(shape, generator=generator) - 1)
        bias = bound * (2 * torch.rand(m, generator=generator) - 1)
        if tasks.is_classification and not is_last:
            params |= {f"shift{i}": bias, f"scale{i}": torch.ones(m)}
        else:
            params[f"b{i}"] = bias
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


def network(params: Params, x_BX: Tensor) -> Tensor:
    """Outputs [B, Y] of ReLU layers: fully connected, or 3x3 convolutions with stride 2 on square images."""
    convolutional = params["w0"].ndim == 4
    last = sum(name.startswith("w") for name in params) - 1
    hidden = x_BX.unflatten(1, (1, math.isqrt(x_BX.shape[1]), -1)) if convolutional else x_BX
    for i in range(last):
        w = params[f"w{i}"]
        hidden = functional.conv2d(hidden, w, stride=2, padding=1) if convolutional else hidden @ w
        if f"scale{i}" in params:
            hidden = batch_norm(hidden, params[f"scale{i}"], params[f"shift{i}"])
        else:
            hidden = hidden + params[f"b{i}"]
        hidden = torch.relu(hidden)
    return hidden.flatten(1) @ params[f"w{last}"] + params[f"b{last}"]


def loss(params: Params, x_BX: Tensor, y_BY: Tensor) -> Tensor:
    """L: cross-entropy where y is boolean, mean squared error elsewhere."""
    output_BY = network(params, x_BX)
    if y_BY.dtype == torch.bool:
        return functional.cross_entropy(output_BY, y_BY.to(output_BY))
    return (output_BY - y_BY).square().mean()


def inner_loop(params: Params, support: Examples, steps: int, args: Args) -> Params:
    """The inner steps on one task's support."""
    x_BX, y_BY = support
    for _ in range(steps):
        gradient = grad(loss)(params, x_BX, y_BY)
        params = {name: value - args.inner_lr * gradient[name] for name, value in params.items()}  # [3]
    return params


def maml_gradient(theta: Params, support: Examples, query: Examples, args: Args) -> tuple[Params, Tensor]:
    """The meta-gradient and the meta-loss of a batch of tasks."""
    theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
    params = vmap(lambda support: inner_loop(theta, support, args.inner_steps, args))(support)
    meta_loss = vmap(loss)(params, *query).mean()  # [4]
    gradient = torch.autograd.grad(meta_loss, list(theta.values()))  # [5]
    return dict(zip(theta, gradient, strict=True)), meta_loss.detach()


def accuracy_or_error(params: Params, support: Examples, query: Examples, args: Args) -> Tensor:
    """On the queries of one task: the accuracy where y is boolean, the mean squared error elsewhere."""
    x_BX, y_BY = query

    def alone(x_X: Tensor) -> Tensor:
        """One query beside the support, so that batch norm cannot learn from the other queries."""
        return network(params, torch.cat([support[0], x_X[None]]))[-1]

    output_BY = network(params, x_BX) if args.transductive else vmap(alone)(x_BX)
    if y_BY.dtype == torch.bool:
        return y_BY.take_along_dim(output_BY.argmax(1, keepdim=True), 1).to(x_BX).mean()
    return (output_BY - y_BY).square().mean()


@torch.no_grad()
def evaluate(tasks, theta: Params, args: Args) -> dict:
    """Accuracy or error on the test tasks after 0, 1, .. inner steps, the same tasks in every run."""
    test_tasks, generator = tasks.test_set(args.eval_tasks)
    support, query = tasks.sample(test_tasks, (args.shots, args.shots), generator)

    def learn_one_task(support: Examples, query: Examples) -> Tensor:
        params = theta
        results = [accuracy_or_error(params, support, query, args)]
        for _ in range(args.eval_steps):
            params = inner_loop(params, support, 1, args)
            results.append(accuracy_or_error(params, support, query, args))
        return torch.stack(results)

    result_NK = vmap(learn_one_task, chunk_size=50)(support, query)  # [7]
    name = "accuracy" if tasks.is_classification else "loss"
    stats = {f"test/{name}_k{k}": result_N for k, result_N in enumerate(result_NK.unbind(1))}
    # A run logs means, and of names that end in ci95 half the width of a 95 % interval over different tasks.
    stats |= {f"{key}_ci95": (result_N, test_tasks) for key, result_N in stats.items()}
    stats["test/ci95"] = result_NK[:, -1], test_tasks
    stats["test/gain_ci95"] = result_NK[:, -1] - result_NK[:, 0], test_tasks
    return stats


def train(tasks, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 2, from `state` on."""
    theta = {name: value.to(tasks.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.outer_lr, fused=True)
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = args.outer_lr  # a flag beside --resume
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        batch = tasks.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        support, query = tasks.sample(batch, (args.shots, args.shots), generator)  # [2]
        gradient, meta_loss = maml_gradient(theta, support, query, args)
        for name, value in theta.items():
            value.grad = gradient[name]
        optimizer.step()  # [6]
        x_NBX, _ = support
        state["env_steps"] += 2 * x_NBX.shape[0] * x_NBX.shape[1]  # examples seen
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        stats = {"train/loss_post": meta_loss}
        run.end_iteration(state, stats, evaluate=lambda: evaluate(tasks, state["theta"], args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import make_supervised, records

    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    tasks = make_supervised(args.env_id, args.ways, 2 * args.shots, args.data, args.cuda, args.eval_split)
    generator = Generator().manual_seed(args.seed)
    theta = init_params(tasks, args, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, tasks.device)

    def examine() -> dict:
        return evaluate(tasks, state["theta"], args)

    with records.open_run(args, state, tasks, unit="inner steps", evaluate=examine) as run:
        if not args.evaluate:
            train(tasks, args, run, state)


if __name__ == "__main__":
    main()
