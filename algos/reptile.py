"""Reptile: move the initialisation towards the weights that ordinary training on each task leads to.

Paper: Nichol, Achiam, Schulman 2018, On First-Order Meta-Learning Algorithms, arXiv:1803.02999, Algorithm 2.
Run: python algos/reptile.py                        sinusoids; --help explains every flag; --cuda: on the GPU
     python algos/reptile.py --env-id Glyphs-v0     5-way 1-shot characters, drawn on the spot
     python algos/reptile.py --env-id Omniglot-v0 --data DIR    the real ones
Result: sinusoid, 10 shots: MSE 0.60, 0.14, 0.11 after 1, 10, 50 steps (maml.py: 0.42, 0.14 after 1, 10).
    Omniglot, 5-way 1-shot: 87.8 % after 750 meta-updates (paper: 97.7 % after 100,000).
Algorithm:
    [1] repeat: draw N tasks, and k disjoint minibatches of each
    [2]     phi_i = U^k(theta): k steps of SGD, or of Adam with beta1 = 0, one on each minibatch
    [3]     theta <- theta + epsilon mean_i (phi_i - theta), epsilon falling linearly to 0
    [4]     Adam: v <- mean_i v_i, the second moments at the end of task i; all tasks begin with v
    [5]     now and then: result on the test tasks, which begin with v, too, after 0, 1, .. inner steps
Symbols: phi_i = params, k = inner_steps, alpha = inner_lr, epsilon = outer_lr, v = second_moment; L: mean
    squared error or cross-entropy. With SGD, theta - phi_i is alpha times the sum of the gradients on the
    way. For k = 1 it is joint training; for k > 1 it also makes the gradients of a task's minibatches alike
    (section 5), as MAML.
Shapes: a suffix names a tensor's axes (x_NBX): N tasks, B examples, X inputs, Y outputs, K counts of inner
    steps, from 0. Entries of parameter dicts gain N by adaptation; inside vmap functions see one task, no N.
Differs from the paper: the tasks of an update begin with the same v (its code: each with the last one's); a
    minibatch of images has equally many of each class; all steps of an evaluation use the whole support set
    (its code: for 5-way 5-shot 5 of 25 examples); curves have random points (its code: 50 fixed ones), MAML's
    phases (--env-id SinusoidAllPhases-v0: the paper's) and ReLU networks (its code: tanh).
"""

import math
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.nn import functional

Params = dict[str, Tensor]  # one net for all tasks: w0 [X, H], b0 [H], ..; one net per task: w0 [N, X, H], ..
Examples = tuple[Tensor, Tensor]  # x [N, B, X] and y [N, B, Y]; booleans y are classes, one-hot
CURVES = {"meta_batch_size": 25, "shots": 10, "inner_lr": 0.02, "inner_shots": 10, "eval_queries": 10}
IMAGES = {"meta_batch_size": 5, "shots": 1, "inner_lr": 3e-3, "inner_shots": 2, "eval_queries": 1}


class Moments(NamedTuple):
    """What the inner Adam knows of earlier tasks; SGD does not use it."""

    second_moment: Params  # v
    steps: int  # how many are in it


@dataclass
class Args:
    env_id: str = "Sinusoid-v0"
    """Sinusoid-v0, SinusoidAllPhases-v0, SinusoidOrLine-v0 (curves), Glyphs-v0, Omniglot-v0 (images)"""
    data: str = ""
    """folder of Omniglot-v0, with images_background and images_evaluation, unpacked or as zips"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, examples"""
    iterations: int = 10000
    """meta-updates; in the paper 30000 for curves, 100000 for images (20-way: 200000)"""
    meta_batch_size: int | None = None
    """tasks per meta-update (N); default 25 for curves (paper: 1), 5 for images as in the paper"""
    ways: int = 5
    """classes of an image task; 5 and 20 in MAML's paper"""
    shots: int | None = None
    """support examples, of each class, of an evaluation; default 10 for curves, 1 for images"""
    mlp: bool = False
    """fully connected layers for images, too, in place of 3x3 filters with stride 2"""
    hidden_sizes: tuple[int, ...] = ()
    """units or filters of layers; default 40 40 for curves, 64 64 64 64 for images, --mlp 256 128 64 64"""
    inner_optimizer: Literal["sgd", "adam"] | None = None
    """adam: with beta1 = 0; default, paper: sgd for curves, adam for images"""
    inner_lr: float | None = None
    """step size on a task (alpha); default 0.02 for curves, as in the paper, 0.003 for images (0.001)"""
    inner_steps: int = 5
    """minibatches of a task, disjoint, one step on each (k); 5 in the paper (20-way: 10)"""
    inner_shots: int | None = None
    """examples of a minibatch; default and paper: 10 for curves, for images 2 of each class (20-way: 1)"""
    outer_lr: float = 1.0
    """step size of the first meta-update (epsilon); in the paper 1 for images, 0.1 for single curves"""
    eval_every: int = 1000
    """iterations from one evaluation and checkpoint to the next"""
    eval_tasks: int = 200
    """test tasks of an evaluation"""
    eval_split: Literal["test", "valid"] = "test"
    """classes of an evaluation; valid, of images only: others than the test's, to choose step sizes by"""
    eval_steps: int = 50
    """inner steps of an evaluation; in the paper 32 for curves, 50 for images"""
    eval_queries: int | None = None
    """queries, of each class, of an evaluation; default 10 for curves, 1 for images as in the paper's code"""
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
        self.inner_optimizer = self.inner_optimizer or ("adam" if images else "sgd")
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


def no_moments(theta: Params) -> Moments:
    """Those before the first step."""
    return Moments(second_moment={name: torch.zeros_like(value) for name, value in theta.items()}, steps=0)


def fit(theta: Params, moments: Moments, batches: list[Examples], args: Args) -> tuple[list[Params], Params]:
    """U^k: the weights before and after each step on one task's minibatches, one on each; and the last v.

    Adam has beta1 = 0: a step is the gradient over the root of its second moment, a running mean of squares.
    That starts at 0 and is too small at first; 1 - beta2^step makes up for it, as in Adam's paper. It goes on
    from task to task: the sizes of gradients tell more of the network than of the task.
    """
    beta2 = 0.999
    path = [theta]
    second_moment = dict(moments.second_moment)
    for step, (x_BX, y_BY) in enumerate(batches, start=moments.steps + 1):
        direction = grad(loss)(path[-1], x_BX, y_BY)
        if args.inner_optimizer == "adam":
            for name, gradient in direction.items():
                second_moment[name] = beta2 * second_moment[name] + 0.001 * gradient.square()
                direction[name] = gradient / ((second_moment[name] / (1 - beta2**step)).sqrt() + 1e-8)
        path.append({name: x - args.inner_lr * direction[name] for name, x in path[-1].items()})  # [2]
    return path, second_moment


def reptile_gradient(
    theta: Params, moments: Moments, batches: list[Examples], args: Args
) -> tuple[Params, Moments, Tensor]:
    """theta - mean_i phi_i, the moments to go on with, and the mean loss of the last minibatches at phi_i."""

    def last(batches: list[Examples]) -> tuple[Params, Params]:
        path, second_moment = fit(theta, moments, batches, args)
        return path[-1], second_moment

    params, second_moment = vmap(last, out_dims=(0, 0))(batches)
    gradient = {name: value - params[name].mean(0) for name, value in theta.items()}
    mean_moment = {name: value.mean(0) for name, value in second_moment.items()}  # [4]
    moments = Moments(second_moment=mean_moment, steps=moments.steps + len(batches))
    return gradient, moments, vmap(loss)(params, *batches[-1]).mean()


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
def evaluate(tasks, theta: Params, moments: Moments, args: Args) -> dict:
    """Accuracy or error on the test tasks after 0, 1, .. inner steps, the same tasks in every run."""
    test_tasks, generator = tasks.test_set(args.eval_tasks)
    support, query = tasks.sample(test_tasks, (args.shots, args.eval_queries), generator)

    def learn_one_task(support: Examples, query: Examples) -> Tensor:
        path, _ = fit(theta, moments, [support] * args.eval_steps, args)
        return torch.stack([accuracy_or_error(params, support, query, args) for params in path])

    result_NK = vmap(learn_one_task, chunk_size=50)(support, query)  # [5]
    name = "accuracy" if tasks.is_classification else "loss"
    stats = {f"test/{name}_k{k}": result_N for k, result_N in enumerate(result_NK.unbind(1))}
    # A run logs means, and of names that end in ci95 half the width of a 95 % interval over different tasks.
    stats |= {f"{key}_ci95": (result_N, test_tasks) for key, result_N in stats.items()}
    stats["test/ci95"] = result_NK[:, -1], test_tasks
    stats["test/gain_ci95"] = result_NK[:, -1] - result_NK[:, 0], test_tasks
    return stats


def evaluate_state(tasks, state: dict, args: Args) -> dict:
    """The evaluation of what a run has learned so far."""
    return evaluate(tasks, state["theta"], Moments(**state["moments"]), args)


def train(tasks, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 2, from `state` on."""
    theta = {name: value.to(tasks.device) for name, value in state["theta"].items()}
    moments = Moments(**state["moments"])
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        batch = tasks.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        batches = tasks.sample(batch, (args.inner_shots,) * args.inner_steps, generator)  # [1]
        gradient, moments, train_loss = reptile_gradient(theta, moments, batches, args)
        epsilon = args.outer_lr * (1 - (iteration - 1) / args.iterations)
        theta = {name: x - epsilon * gradient[name] for name, x in theta.items()}  # [3], gradient = -change
        state["env_steps"] += sum(x_NBX.shape[0] * x_NBX.shape[1] for x_NBX, _ in batches)  # examples seen
        state.update(theta=theta, moments=moments._asdict(), generator=generator.get_state())
        stats = {"train/loss_post": train_loss}
        run.end_iteration(state, stats, evaluate=lambda: evaluate_state(tasks, state, args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import make_supervised, records

    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    tasks = make_supervised(args.env_id, args.ways, 2, args.data, args.cuda, args.eval_split)
    if tasks.is_classification:  # what is disjoint uses up a class's drawings
        drawings = tasks.images.shape[1]
        if args.inner_steps > (most := drawings // args.inner_shots):
            hint = f"allowed is 1 to {most} disjoint minibatches"
            raise records.refusal(f"--inner-steps {args.inner_steps}: {hint}")
        if drawings < args.shots + args.eval_queries:
            hint = f"allowed are {drawings} in all, the drawings of a class"
            raise records.refusal(f"--shots {args.shots} --eval-queries {args.eval_queries}: {hint}")
    generator = Generator().manual_seed(args.seed)
    theta = init_params(tasks, args, generator)
    moments = no_moments(theta)._asdict()
    fresh = {"theta": theta, "moments": moments, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, tasks.device, evaluates=("theta", "moments"))

    def examine() -> dict:
        return evaluate_state(tasks, state, args)

    with records.open_run(args, state, tasks, unit="inner steps", evaluate=examine) as run:
        if not args.evaluate:
            train(tasks, args, run, state)


if __name__ == "__main__":
    main()
