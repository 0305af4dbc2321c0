"""Adaptation at test time: returns on each test task after inner steps, and the step size of fine-tuning.

Fine-tuning, of a policy trained for all tasks or of a random one, is given its best step size: `search` tries a grid
that grows as long as the best is at an edge of it. benchmark/curves.py keeps what comes out.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Generator, Tensor

from benchmark.rl2 import load
from envs import TaskGiven, make
from envs.core import NotFinite

STEPS = 10  # inner steps of the adaptation curve
RANDOM = "random"  # the label of the policies with which `multitask` begins; not trained
# Step sizes of fine-tuning, by factors of about 3. Those beyond 0.01 and 10 only where the best are at the edge.
ALPHAS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FIRST_ALPHAS = tuple(alpha for alpha in ALPHAS if 0.01 <= alpha <= 10)
LATER = {"full": 1.0, "halved": 0.5}  # what later steps of fine-tuning take of alpha; the meta-learners: 0.5
SWEPT = 3  # steps of fine-tuning that step sizes are chosen for


def rounded(x: Tensor) -> list | float:
    """Numbers with five digits, in lists as deep as the tensor."""
    return [rounded(row) for row in x] if x.ndim else float(f"{x.item():.5g}")


class Start(NamedTuple):
    """Parameters to adapt, with all that this takes, and the checkpoint that they are of."""

    module: object
    envs: object
    args: object
    theta: dict[str, Tensor]
    checkpoint: dict


def starts(folder: Path, label: str, sizes: dict[str, int]) -> dict[str, Start]:
    """By label: a finished run's parameters; beside `multitask`, as `random`, those with which it began.

    `sizes` are those flags of an evaluation that are not the run's: how many test tasks, how many episodes of each.
    """
    module, args, state = load(folder)
    if not hasattr(args, "eval_steps"):
        return {}  # it has no inner steps
    if state["iteration"] != args.iterations:
        raise SystemExit(f"{folder}: its checkpoint is of iteration {state['iteration']}")
    args = replace(args, **sizes)
    envs = make(args.env_id, args.meta_batch_size * args.episodes_per_task, args.horizon, False, args.action_scale)
    envs = TaskGiven(envs) if getattr(args, "task_given", False) else envs

    def start(theta: dict[str, Tensor], iteration: int, env_steps: int) -> Start:
        checkpoint = {"iteration": iteration, "env_steps": env_steps, "theta": digest(theta)}
        return Start(module, envs, args, theta, checkpoint)

    found = {label: start(state["theta"], iteration=state["iteration"], env_steps=state["env_steps"])}
    if label == "multitask":
        theta = module.init_policy(envs, args.hidden_size, Generator().manual_seed(args.seed))
        found[RANDOM] = start(theta, iteration=0, env_steps=0)
    return found


def digest(theta: dict[str, Tensor]) -> str:
    """Twelve hexadecimal digits that tell these parameters from others."""
    content = hashlib.sha256()
    for name, value in sorted(theta.items()):
        content.update(name.encode() + value.cpu().numpy().tobytes())
    return content.hexdigest()[:12]


class Played(NamedTuple):
    """Episodes of the test set, and what goes on from there."""

    params: dict[str, Tensor]
    batch: tuple
    noise: Tensor
    """the generator's state afterwards"""


def play(start: Start, params: dict[str, Tensor], noise: Tensor | None = None) -> Played | None:
    """Episodes of the test set with these parameters; None where actions are not finite."""
    tasks, generator = start.envs.unwrapped.test_set(start.args.meta_batch_size)
    if noise is not None:
        generator.set_state(noise)
    try:
        batch = start.module.collect(start.envs, tasks, params, start.args, generator)
    except NotFinite:
        return None
    return Played(params, batch, generator.get_state())


def tune(start: Start, played: Played | None, alpha: float) -> Played | None:
    """A step of fine-tuning on these episodes, and episodes after it; None where parameters have diverged."""
    if played is None:
        return None
    params = start.module.ppo_step(played.params, played.batch, replace(start.args, inner_lr=alpha))
    return play(start, params, played.noise)


def returns_of(played: Played | None, number: int) -> list[float | None]:
    """Mean returns on each of so many test tasks; None where parameters have diverged."""
    return [None] * number if played is None else rounded(played.batch.reward.sum(-1).mean(1))


def adapted(start: Start, checkpoint: dict) -> list[list[float | None]]:
    """Returns [STEPS + 1][N] on each test task by the file's own `evaluate`; with a step size that was swept, by it."""
    if "inner_lr" not in checkpoint:
        stats, _ = start.module.evaluate(start.envs, start.theta, replace(start.args, eval_steps=STEPS))
        return [rounded(stats[f"test/return_k{k}"]) for k in range(STEPS + 1)]
    number = start.args.meta_batch_size
    played = play(start, start.theta)
    returns = [returns_of(played, number)]
    for k in range(STEPS):
        scale = LATER[checkpoint["later"]] if k else 1.0
        played = tune(start, played, scale * checkpoint["inner_lr"])
        returns.append(returns_of(played, number))
    return returns


class Choice(NamedTuple):
    """A step size, as it is written in the file, and what later steps take of it."""

    alpha: str
    later: str


Returns = dict[str, dict[str, dict[str, list]]]  # seed -> alpha -> later -> [SWEPT + 1][N]


def mean_after(returns: Returns, choice: Choice, k: int) -> float:
    """The mean return over seeds and test tasks after k steps; minus infinity where some have diverged."""
    mean = np.mean([np.array(alphas[choice.alpha][choice.later][k], float).mean() for alphas in returns.values()])
    return float(mean) if np.isfinite(mean) else -np.inf


def best_choice(returns: Returns, alphas: list[float], k: int) -> Choice:
    """The best of these step sizes, in full or halved after the first step, for k steps."""
    choices = [Choice(f"{alpha:g}", later) for alpha in alphas for later in LATER]
    return max(choices, key=lambda choice: mean_after(returns, choice, k))


def beyond(alphas: list[float], best: set[float]) -> list[float]:
    """The next step sizes beyond those ends of sorted `alphas` at which one of the best is; [] at last."""
    found = []
    first, last = ALPHAS.index(alphas[0]), ALPHAS.index(alphas[-1])
    if alphas[0] in best and first > 0:
        found.append(ALPHAS[first - 1])
    if alphas[-1] in best and last < len(ALPHAS) - 1:
        found.append(ALPHAS[last + 1])
    return found


def search(returns: Returns, measure: Callable[[float], None]) -> dict[int, Choice]:
    """The best choice for 1, .., SWEPT steps; `measure` puts a step size's returns into `returns`.

    The grid grows at an end as long as one of the best is there, so that in the end none is, unless at the limits.
    """
    alphas = []
    wanted = list(FIRST_ALPHAS)
    while wanted:
        for alpha in wanted:
            measure(alpha)
        alphas = sorted([*alphas, *wanted])
        best = {k: best_choice(returns, alphas, k) for k in range(1, SWEPT + 1)}
        wanted = beyond(alphas, {float(choice.alpha) for choice in best.values()})
    return best


def returns_after(start: Start, first: Played, alpha: float) -> dict[str, list]:
    """Returns [SWEPT + 1][N] after 0, 1, .. steps, for each way of later steps, which begins after the first step."""
    number = start.args.meta_batch_size
    second = tune(start, first, alpha)
    found = {}
    for later, scale in LATER.items():
        returns = [returns_of(first, number), returns_of(second, number)]
        played = second
        while len(returns) <= SWEPT:
            played = tune(start, played, scale * alpha)
            returns.append(returns_of(played, number))
        found[later] = returns
    return found
