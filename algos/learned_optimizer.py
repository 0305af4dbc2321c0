"""A learned optimiser: a recurrent net that turns gradients into updates, trained to make losses fall fast.

Paper: Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, arXiv:1606.04474.
Run: python algos/learned_optimizer.py              ten-dimensional quadratics; --help explains every flag
     python algos/learned_optimizer.py --env-id GlyphNets-v0 --meta-batch-size 4    small nets on characters
     python benchmark/learned_optimizer.py          beside Adam, NAG, RMSprop, SGD, each at its best step size
Result: unseen quadratics, from a mean loss of 106 in 100 steps: 0.245, trained for 300 iterations; at their
    best step sizes Adam 0.398, NAG 0.491, RMSprop 0.958, SGD 1.073
Algorithm:
    [1] repeat: draw N functions f and where to start, theta_0; the net's state is h_0 = 0
    [2]     for t = 0, 1, .. T - 1: nabla_t = grad f(theta_t), taken as data: no gradient goes through it
    [3]         each number n of it becomes (log|n| / p, sgn n) where |n| >= e^-p, else (-1, e^p n); p = 10
    [4]         (g_t, h_(t+1)) = m(nabla_t, h_t, phi), the same LSTM for each coordinate by itself
    [5]         theta_(t+1) = theta_t + g_t
    [6]     after every `unroll` steps: L(phi) = the sum of f(theta_t) over these steps, phi <- Adam(phi,
            grad L(phi)), backwards through these steps only; its step size falls to 0
    [7]     now and then: f on the test tasks after 0, 1, .. steps
Symbols: phi = theta, theta_t = params, f = optimisees.loss, m = update, T = steps.
Shapes: a suffix names a tensor's axes (params_NC): N functions, C coordinates of each, R = N C coordinates, I
    inputs of the LSTM, H its units, K = eval_steps + 1 counts of steps, from 0.
Differs from the paper: the output is scaled by --output-scale; quadratics start at standard normal points;
    the nets (GlyphNets-v0) are on drawn characters in place of MNIST.
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
from torch.func import grad

Params = dict[str, Tensor]
P = 10  # p: gradients below e^-p are told by their value, others by their logarithm and sign


@dataclass
class Args:
    env_id: str = "Quadratics-v0"
    """Quadratics-v0, GlyphNets-v0"""
    seed: int = 1
    """seed of everything but the test set: parameters, functions, starts"""
    iterations: int = 1000
    """batches of functions that are minimised in training"""
    meta_batch_size: int = 64
    """functions minimised at once (N)"""
    steps: int = 100
    """steps of the optimiser on a function in training (T); 100 in the paper"""
    unroll: int = 20
    """steps between two updates of phi, and how far the gradient reaches back; 20 in the paper"""
    hidden_size: int = 20
    """units of an LSTM layer (H); 20 in the paper"""
    layers: int = 2
    """LSTM layers; 2 in the paper"""
    output_scale: float = 0.1
    """an update is this times the net's output; small ones make the first updates harmless"""
    lr: float = 3e-3
    """Adam's step size for phi at first; it falls linearly to 0"""
    eval_every: int = 100
    """iterations from one evaluation and checkpoint to the next"""
    eval_tasks: int = 200
    """test functions of an evaluation"""
    eval_steps: int = 100
    """steps of an evaluation; more than --steps show what was not trained for"""
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
        ranges = {"seed": (0, 2**31), "unroll": (1, self.steps)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


def init_optimizer(optimisees, args: Args, generator: Generator) -> Params:
    """phi: LSTM layers and a linear output, uniform in +-1 / sqrt(H)."""
    H = args.hidden_size
    shapes = {}
    for i in range(args.layers):
        shapes |= {f"w_input{i}": (4 * H, H if i else 2), f"w_hidden{i}": (4 * H, H)}
        shapes |= {f"b_input{i}": (4 * H,), f"b_hidden{i}": (4 * H,)}
    shapes |= {"w_out": (1, H), "b_out": (1,)}
    return {name: (2 * torch.rand(x, generator=generator) - 1) / math.sqrt(H) for name, x in shapes.items()}


def first_memory(params_NC: Tensor, args: Args) -> Params:
    """h_0: of every layer h and c, for each coordinate."""
    zeros_RH = params_NC.new_zeros(params_NC.numel(), args.hidden_size)
    return {f"{name}{i}": zeros_RH for i in range(args.layers) for name in ("h", "c")}


def preprocess(gradient_NC: Tensor) -> Tensor:
    """What the net sees of each coordinate's gradient [R, I]: two numbers of size about 1."""
    g_R = gradient_NC.flatten()
    size_R = torch.log(g_R.abs().clamp_min(math.exp(-P))) / P
    direction_R = (math.exp(P) * g_R).clamp(-1, 1)  # the sign, except of the smallest
    return torch.stack([size_R, direction_R], 1)  # [3]


def update(theta: Params, gradient_NC: Tensor, memory: Params, args: Args) -> tuple[Tensor, Params]:
    """m: what to add to the parameters [N, C], and the new memory."""
    hidden_RH = preprocess(gradient_NC)
    new = {}
    for i in range(args.layers):
        weights = [theta[f"{name}{i}"] for name in ("w_input", "w_hidden", "b_input", "b_hidden")]
        h_RH, c_RH = torch.lstm_cell(hidden_RH, (memory[f"h{i}"], memory[f"c{i}"]), *weights)  # [4]
        new |= {f"h{i}": h_RH, f"c{i}": c_RH}
        hidden_RH = h_RH
    output_R1 = hidden_RH @ theta["w_out"].mT + theta["b_out"]
    return args.output_scale * output_R1.view_as(gradient_NC), new


def gradients(optimisees, params_NC: Tensor, tasks: Tensor, batch) -> Tensor:
    """Of f, for each function [N, C]; they are data: nothing is differentiated through them."""
    return grad(lambda params_NC: optimisees.loss(params_NC, tasks, batch).sum())(params_NC.detach())  # [2]


def minimise(optimisees, theta: Params, start: tuple, tasks: Tensor, batches: list, args: Args) -> tuple:
    """A step on each batch but the last, from parameters and memory: those at the end, and all f [N]."""
    params_NC, memory = start
    losses = [optimisees.loss(params_NC, tasks, batches[0])]
    for batch, following in pairwise(batches):
        gradient_NC = gradients(optimisees, params_NC, tasks, batch)
        change_NC, memory = update(theta, gradient_NC, memory, args)
        params_NC = params_NC + change_NC  # [5]
        losses.append(optimisees.loss(params_NC, tasks, following))
    return (params_NC, memory), losses


def meta_gradient(optimisees, theta: Params, start: tuple, tasks: Tensor, batches: list, args: Args) -> tuple:
    """The gradient of L over some steps, parameters and memory at their end, and the mean of f there."""
    theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
    (params_NC, memory), losses = minimise(optimisees, theta, start, tasks, batches, args)
    total = torch.stack(losses[1:]).sum(0).mean()  # f(theta_t) at the start does not depend on phi
    gradient = torch.autograd.grad(total, list(theta.values()))
    end = params_NC.detach(), {name: value.detach() for name, value in memory.items()}
    return dict(zip(theta, gradient, strict=True)), end, losses[-1].detach().mean()


@torch.no_grad()
def evaluate(optimisees, theta: Params, args: Args) -> dict:
    """f on the test tasks after 0, 1, .. steps, the same functions, starts and batches in every run."""
    tasks, generator = optimisees.test_set(args.eval_tasks)
    params_NC = optimisees.start(tasks, generator)
    batches = optimisees.batches(tasks, args.eval_steps + 1, generator)
    start = params_NC, first_memory(params_NC, args)
    _, losses = minimise(optimisees, theta, start, tasks, batches, args)  # [7]
    result_NK = torch.stack(losses, 1)
    stats = {f"test/loss_k{k}": result_N for k, result_N in enumerate(result_NK.unbind(1))}
    # A run logs means, and of names that end in ci95 half the width of a 95 % interval over different tasks.
    stats["test/ci95"] = result_NK[:, -1], tasks
    stats["test/gain_ci95"] = result_NK[:, -1] - result_NK[:, 0], tasks
    return stats


def train(optimisees, args: Args, run, state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    theta = {name: value.to(optimisees.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, fused=True)
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        optimizer.param_groups[0]["lr"] = args.lr * (1 - (iteration - 1) / args.iterations)
        tasks = optimisees.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        params_NC = optimisees.start(tasks, generator)
        batches = optimisees.batches(tasks, args.steps + 1, generator)
        place = params_NC, first_memory(params_NC, args)
        for first in range(0, args.steps, args.unroll):
            part = batches[first : first + args.unroll + 1]
            gradient, place, last_loss = meta_gradient(optimisees, theta, place, tasks, part, args)
            for name, value in theta.items():
                value.grad = gradient[name]
            optimizer.step()  # [6]
        state["env_steps"] += len(params_NC) * args.steps  # steps on a function
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        stats = {"train/loss_post": last_loss}
        run.end_iteration(state, stats, evaluate=lambda: evaluate(optimisees, state["theta"], args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import make_optimisees, records

    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    optimisees = make_optimisees(args.env_id, args.cuda)
    generator = Generator().manual_seed(args.seed)
    theta = init_optimizer(optimisees, args, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, optimisees.device)

    def examine() -> dict:
        return evaluate(optimisees, state["theta"], args)

    with records.open_run(args, state, optimisees, unit="steps", evaluate=examine) as run:
        if not args.evaluate:
            train(optimisees, args, run, state)


if __name__ == "__main__":
    main()
