"""Bias and variance of the inner estimators of algos/maml_trpo.py: the tables and the picture of docs/estimators.md.

    python benchmark/estimators.py tabular                    beside the exact meta-gradient of two tabular MDPs
    python benchmark/estimators.py cheetah                    beside a huge batch's on HalfCheetahDir, after 40 updates
    python benchmark/estimators.py cheetah --iterations 0     the same at the initial parameters
    python benchmark/estimators.py draw                       the picture, and the page's tables, from the results

The first three add what they measure to benchmark/results/estimators.json, under their own command.
"""

import itertools
import json
import math
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mujoco
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.func import grad, jacrev, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import maml_trpo  # noqa: E402
from envs import make, summarise  # noqa: E402
from envs.records import Follower  # noqa: E402

RESULTS, PICTURE = ROOT / "benchmark/results/estimators.json", ROOT / "docs/images/estimators.png"
ESTIMATORS = ("score", "lvc", "dice", "loaded", "first-order", "e_maml")
SETTINGS = {  # of the tabular study: baseline of the inner step, and what is added to every reward
    "exact value": (True, 0.0),
    "exact value, rewards + 5": (True, 5.0),
    "no baseline": (False, 0.0),
}


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["tabular", "cheetah", "draw"]]
    """what to make"""
    repetitions: int = 0
    """meta-gradients; tabular: of each size (0: 50,000); cheetah: of 20 episodes (0: 160), of E 20 / E times"""
    iterations: int = 40
    """cheetah: updates of MAML-TRPO (20 tasks, 10 episodes) behind which theta is taken; 0: initial parameters"""
    gamma: float = 1.0
    """cheetah: discount of the estimates; below 1 dice adapts to other parameters than the rest, and is left out"""
    reference_episodes: int = 1000
    """cheetah: episodes per task of one part of the reference"""
    reference_parts: int = 10
    """cheetah: parts of the reference, each with its own support and query; 10 at least"""
    seed: int = 1
    """seed of everything"""


def cosine(x_RW: Tensor, y_W: Tensor) -> Tensor:
    return (x_RW @ y_W) / (x_RW.norm(dim=-1) * y_W.norm())


def spread(x_RW: Tensor) -> float:
    """Root of the mean squared distance of an estimate from the mean."""
    return float((x_RW - x_RW.mean(0)).square().sum() / (len(x_RW) - 1)) ** 0.5


def interval(x_R: Tensor) -> float:
    """Half the 95 % interval of a mean."""
    return 1.96 * float(x_R.std()) / len(x_R) ** 0.5


def product_of_means(x_RW: Tensor, y_RW: Tensor) -> float:
    """E x . E y from pairs (x, y) that share their noise: different pairs do not, so only their products count."""
    return float(x_RW.sum(0) @ y_RW.sum(0) - (x_RW * y_RW).sum()) / (len(x_RW) * (len(x_RW) - 1))


def cosine_of_means(x_RW: Tensor, y_PW: Tensor, paired: bool) -> float:
    """Cosine of E x and E y, corrected for the noise in both means (so it may exceed 1); nan: all is noise."""
    product = product_of_means(x_RW, y_PW) if paired else float(x_RW.mean(0) @ y_PW.mean(0))
    squares = [product_of_means(z, z) for z in (x_RW, y_PW)]
    return product / (squares[0] * squares[1]) ** 0.5 if min(squares) > 0 else float("nan")


def jackknife(x_RW: Tensor, y_PW: Tensor, paired: bool) -> list[float] | None:
    """cosine_of_means() and half its 95 % interval, from leaving out a tenth of x and y at a time; None: all noise."""
    left = []
    for block in range(10):
        kept = [z[torch.arange(len(z)) % 10 != block] for z in (x_RW, y_PW)]
        left.append(cosine_of_means(*kept, paired))
    half = 2.26 * (9 * float(np.var(left))) ** 0.5  # Student's t with 9 degrees of freedom
    return [cosine_of_means(x_RW, y_PW, paired), half] if math.isfinite(half) else None


float64 = {"dtype": torch.float64}
START = torch.tensor([0.6, 0.4], **float64)
MOVES = torch.tensor([[[0.8, 0.2], [0.3, 0.7]], [[0.5, 0.5], [0.1, 0.9]]], **float64)  # state, action, next state
REWARDS = ([[1.0, 0.0], [-0.5, 2.0]], [[0.0, 1.5], [1.0, -1.0]])  # of the two tasks: state, action
HORIZON, GAMMA, ALPHA = 3, 0.9, 0.3
THETA = torch.tensor([0.2, -0.1, -0.3, 0.4], **float64)  # logits of state 0, then of state 1


class Task:
    """All M trajectories of one task; rewards, returns and values carry gamma^t. theta is [4], or [R, 4]."""

    def __init__(self, rewards, baseline: bool = True, shift: float = 0.0):
        path = torch.tensor(list(itertools.product((0, 1), repeat=2 * HORIZON)))  # s, a, s, a, s, a
        self.state, self.action = path[:, ::2], path[:, 1::2]
        steps = MOVES[self.state[:, :-1], self.action[:, :-1], self.state[:, 1:]]
        self.chance = START[self.state[:, 0]] * steps.prod(1)  # what the world adds to a trajectory's probability
        self.discount = GAMMA ** torch.arange(HORIZON, **float64)
        self.payoff = torch.tensor(rewards, **float64) + shift
        self.reward = self.payoff[self.state, self.action] * self.discount
        self.to_go = self.reward.flip(1).cumsum(1).flip(1)
        self.value = self.values(THETA) * baseline  # of the inner step
        self.derivatives = {name: self.differentiate(name) for name in ESTIMATORS}

    def log_prob(self, theta: Tensor) -> Tensor:
        return torch.log_softmax(theta.unflatten(-1, (2, 2)), -1)[..., self.state, self.action]  # [.., M, H]

    def prob(self, theta: Tensor) -> Tensor:
        return self.chance * self.log_prob(theta).sum(-1).exp()  # [.., M]

    def expected_return(self, theta: Tensor) -> Tensor:
        return self.prob(theta) @ self.to_go[:, 0]

    def values(self, theta: Tensor) -> Tensor:
        """Exact values of the states along every trajectory, [.., M, H]."""
        pi, value, table = torch.softmax(theta.unflatten(-1, (2, 2)), -1), torch.zeros(2, **float64), []
        for t in reversed(range(HORIZON)):
            value = (pi * (self.discount[t] * self.payoff + torch.einsum("san,...n->...sa", MOVES, value))).sum(-1)
            table.insert(0, value[..., self.state[:, t]])
        return torch.stack(table, -1)

    def differentiate(self, estimator: str) -> tuple[Tensor, Tensor]:
        """First and second derivatives [M, 4] and [M, 4, 4] of every trajectory's surrogate at THETA, by the file's
        own inner_objective()."""
        batch = maml_trpo.Episodes(
            obs=None,
            action=None,
            log_prob=self.log_prob(THETA),
            mask=torch.ones_like(self.reward),
            reward=self.reward,
            value=self.value,
            std=torch.ones_like(self.chance),
            advantage=self.to_go - self.value,
        )
        args = maml_trpo.Args(estimator="score" if estimator == "first-order" else estimator, gamma=1.0)

        def surrogate(theta):
            return maml_trpo.inner_objective(self.log_prob(theta), batch, args)

        second = jacrev(jacrev(surrogate))(THETA)
        return jacrev(surrogate)(THETA), second * (estimator != "first-order")

    def outer_gradient(self, theta_R4: Tensor, weight_RM: Tensor) -> Tensor:
        """Policy gradient of every adapted policy on its own query, [R, 4]; the baseline is the exact value."""

        def surrogate(theta, weight_M):
            return weight_M @ (self.log_prob(theta) * (self.to_go - self.values(theta).detach())).sum(-1)

        return vmap(grad(surrogate))(theta_R4, weight_RM)


def exact(tasks: list[Task]) -> Tensor:
    """Meta-gradient of formulation I: the mean over tasks of grad J(theta + alpha grad J(theta))."""

    def objective(theta):
        adapted = [theta + ALPHA * grad(task.expected_return)(theta) for task in tasks]
        return sum(task.expected_return(x) for task, x in zip(tasks, adapted, strict=True)) / len(tasks)

    return grad(objective)(THETA)


def exact_of_one_episode(tasks: list[Task]) -> Tensor:
    """Meta-gradient of formulation II with a support of one episode: what e_maml estimates."""

    def objective(theta, task):
        steps = jacrev(lambda x: (task.log_prob(x) * (task.to_go - task.value)).sum(-1))(theta)
        return task.prob(theta) @ task.expected_return(theta + ALPHA * steps)

    return sum(grad(objective)(THETA, task) for task in tasks) / len(tasks)


def tabular_gradients(tasks: list[Task], supports: list[Tensor], draw, episodes: int) -> dict:
    """Meta-gradients [R, 4] of every estimator from the same supports and queries. A support is the share of each
    trajectory in R samples, [R, M]; `draw` samples such shares from probabilities."""
    slopes, queries, returns = [], [], []
    for task, support in zip(tasks, supports, strict=True):
        first = task.derivatives["lvc"][0]
        for other, _ in task.derivatives.values():  # the same first derivative, hence the same policy and query
            torch.testing.assert_close(other, first)
        theta = THETA + ALPHA * support @ first
        queries.append(draw(task.prob(theta)))
        slopes.append(task.outer_gradient(theta, queries[-1]))
        returns.append(queries[-1] @ task.to_go[:, 0])
    result = {}
    for name in ESTIMATORS:
        each = []
        for task, support, slope, own in zip(tasks, supports, slopes, returns, strict=True):
            curvature = torch.einsum("rm,mvw->rvw", support, task.derivatives[name][1])
            each.append(slope + ALPHA * torch.einsum("rvw,rw->rv", curvature, slope))
            if name == "e_maml":  # credit for the support, as in maml_trpo.surrogate()
                score = episodes * support @ jacrev(lambda x, task=task: task.log_prob(x).sum(-1))(THETA)
                each[-1] += (own - (sum(returns) - own) / max(1, len(tasks) - 1))[:, None] * score
        result[name] = sum(each) / len(tasks)
    return result


def tabular(options: Options) -> dict:
    repetitions, rows = options.repetitions or 50_000, []
    for setting, (baseline, shift) in SETTINGS.items():
        tasks = [Task(rewards, baseline, shift) for rewards in REWARDS]
        target, own, rng = exact(tasks), exact_of_one_episode(tasks), np.random.default_rng(options.seed)

        def error(x_W, goal_W=target):
            return float((x_W - goal_W).norm() / goal_W.norm())

        limits = tabular_gradients(tasks, [task.prob(THETA)[None] for task in tasks], lambda p: p, 1)
        for name in ESTIMATORS[:5]:  # e_maml has none: its score is a sum over all episodes
            row = {"setting": setting, "estimator": name, "error_of_mean": error(limits[name])}
            rows.append(row | {"cosine_of_means_exact": [float(cosine(limits[name], target)), 0.0]})
        for K in (1, 5, 20, 100, 500):

            def draw(prob, K=K, rng=rng):
                prob = (prob / prob.sum(-1, keepdim=True)).expand(repetitions, -1).numpy()
                return torch.from_numpy(rng.multinomial(K, prob) / K)

            gradients = tabular_gradients(tasks, [draw(task.prob(THETA)) for task in tasks], draw, K)
            for name, x in gradients.items():
                values, width = cosine(x, target), spread(x) / float(target.norm())
                row = {"setting": setting, "episodes": K, "estimator": name, "spread": width}
                row |= {"cosine_exact": [float(values.mean()), interval(values)]}
                row |= {"error_of_mean": error(x.mean(0)), "noise_of_mean": width / repetitions**0.5}
                row |= {"error_from_own_target": error(x.mean(0), own)} if (K, name) == (1, "e_maml") else {}
                rows.append(row)
    return {"repetitions": repetitions, "exact": target.tolist(), "rows": rows}


def trained(iterations: int, seed: int) -> tuple[maml_trpo.Params, maml_trpo.Args, dict]:
    """theta after some updates of maml_trpo, its Args, and the last logged returns."""
    args = maml_trpo.Args(meta_batch_size=20, episodes_per_task=10, seed=seed)
    args = replace(args, iterations=max(1, iterations), eval_every=10**9)
    envs, generator, logged = make(args.env_id, 200, args.horizon, False, args.action_scale), Generator(), [{}]
    theta = maml_trpo.init_policy(envs, args.hidden_size, generator.manual_seed(seed))
    state = {"iteration": 0 if iterations else 1, "env_steps": 0, "theta": theta, "generator": generator.get_state()}
    run = Follower(args)
    run.log = lambda state, stats: logged.append(summarise(stats))
    maml_trpo.train(envs, args, run, state)
    return state["theta"], args, {name: x for name, x in logged[-1].items() if "return" in name}


def meta_gradients(envs, theta, args: maml_trpo.Args, estimators, generator: Generator) -> dict[str, Tensor]:
    """[R, W] from N = 2 R tasks, alternately forward and backward: every pair's mean, by the file's own functions."""
    tasks_N1 = torch.tensor([[1.0], [-1.0]]).repeat(args.meta_batch_size // 2, 1)
    each = {name: value.expand(len(tasks_N1), *value.shape) for name, value in theta.items()}
    support = maml_trpo.collect(envs, tasks_N1, theta, args, generator)
    params = maml_trpo.adapt(each, support, args)
    query = maml_trpo.collect(envs, tasks_N1, params, args, generator)
    result = {}
    for name in estimators:
        first = name == "first-order"
        own = replace(args, estimator="score" if first else name, first_order=first)
        for key, value in maml_trpo.adapt(each, support, own).items():  # one query serves all
            torch.testing.assert_close(value, params[key], rtol=1e-3, atol=1e-4)

        def objective(each, own=own):
            return maml_trpo.surrogate(each, [support], query, own)[0].sum()

        gradient = grad(objective)(each)
        gradient_NW = torch.cat([value.flatten(1) for value in gradient.values()], 1)
        result[name] = gradient_NW.view(-1, 2, gradient_NW.shape[1]).mean(1)
    return result


def sample(theta, args: maml_trpo.Args, repetitions: int, estimators, generator) -> dict[str, Tensor]:
    """Meta-gradients [R, W] of both directions with args.episodes_per_task episodes, up to 20 pairs at a time."""
    args, parts = replace(args, meta_batch_size=2 * min(repetitions, 20 if args.episodes_per_task < 100 else 1)), []
    envs = make(args.env_id, args.meta_batch_size * args.episodes_per_task, args.horizon, False, args.action_scale)
    for _ in range(max(1, 2 * repetitions // args.meta_batch_size)):
        parts.append(meta_gradients(envs, theta, args, estimators, generator))
    return {name: torch.cat([part[name] for part in parts]).double() for name in estimators}


def cheetah(options: Options) -> dict:
    theta, args, returns = trained(options.iterations, options.seed)
    args = replace(args, gamma=options.gamma)
    estimators = [name for name in ESTIMATORS if args.gamma == 1 or name != "dice"]
    compared, generator = [name for name in estimators if name != "e_maml"], Generator().manual_seed(options.seed + 1)
    big = replace(args, episodes_per_task=options.reference_episodes)
    references = sample(theta, big, options.reference_parts, compared, generator)
    if (square := product_of_means(references["loaded"], references["loaded"])) <= 0:
        raise SystemExit("the reference is all noise: more --reference-episodes or --reference-parts")
    unit = square**0.5

    def describe(x_RW):
        length = max(product_of_means(x_RW, x_RW), 0) ** 0.5
        return {"parts": len(x_RW), "spread": spread(x_RW) / unit, "length_of_mean": length / unit}

    rows = []
    for name, x in references.items():
        own = {"estimator": name, "episodes": big.episodes_per_task, "accuracy": describe(x)["length_of_mean"] * unit}
        own["accuracy"] /= float(x.mean(0).norm())  # cosine of the reference with its own expectation
        between = {f"cosine_of_means_{key}": jackknife(x, references[key], True) for key in compared}
        rows.append(own | describe(x) | between)
    for E in (10, 20, 40):
        repetitions = (options.repetitions or 160) * 20 // E
        small = sample(theta, replace(args, episodes_per_task=E), repetitions, estimators, generator)
        for name, x in small.items():
            row = {"estimator": name, "episodes": E} | describe(x)
            for key in ("loaded", "lvc"):
                values = cosine(x, references[key].mean(0))
                row[f"cosine_{key}"] = [float(values.mean()), interval(values)]
                row[f"cosine_of_means_{key}"] = jackknife(x, references[key], False)
            rows.append(row)
    return {"tests": "fixed", "returns": returns, "unit": unit, "rows": rows}  # older returns: tasks drawn by the seed


COMMAND = "python benchmark/estimators.py"


def table(rows: list[dict], columns: list[tuple[str, str, int | None]]) -> str:
    """Markdown: a line for each estimator; a column is a heading, the key of the number, and the row's episodes."""

    def cell(x):
        return " +- ".join(map(cell, x)) if isinstance(x, list) else "" if x is None else f"{x:.3f}"

    lines = [["estimator", *(heading for heading, *_ in columns)], ["---"] * (len(columns) + 1)]
    for name in ESTIMATORS:
        own = {row.get("episodes"): row for row in rows if row["estimator"] == name}
        lines.append([f"`{name}`", *(cell(own.get(episodes, {}).get(key)) for _, key, episodes in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def whole_batch(row: dict) -> dict:
    """The row with the cosine that a mean over 20 independent pairs of tasks would have, from what one pair shows."""
    if not (pair := row.get("cosine_of_means_loaded")):
        return row
    return row | {"batch": pair[0] * row["length_of_mean"] / math.hypot(row["length_of_mean"], row["spread"] / 20**0.5)}


def tables(results: dict) -> dict[str, str]:
    """The tables of docs/estimators.md."""
    made = {}
    for command, result in results.items():
        rows, tabular = result["rows"], command.endswith("tabular")
        sizes = (5, 20, 100) if tabular else (10, 20, 40)
        columns = [(f"cosine, {K}", "cosine_exact" if tabular else "cosine_loaded", K) for K in sizes]
        columns += [(f"spread, {K}", "spread", K) for K in sizes]
        if tabular:
            for setting in SETTINGS:
                own = [row for row in rows if row["setting"] == setting]
                made[setting] = table(own, [("bias", "error_of_mean", None), *columns])
            continue
        rows, columns = [whole_batch(row) for row in rows], [*columns, ("40 tasks, 20", "batch", 20)]
        made[command], E = table(rows, columns), rows[0]["episodes"]  # the reference comes first
        means = [(f"cosine with `{name}`", f"cosine_of_means_{name}", E) for name in ("loaded", "lvc")]
        means = [("length", "length_of_mean", E), *means, ("accuracy", "accuracy", E)]
        made[f"{command}, means"] = table([row for row in rows if row["episodes"] == E], means)
    return made


def draw(results: dict) -> None:
    """Cosine of single estimates and their spread over the number of episodes; dashed: cosine of the expectation.

    The later lines are thinner: where some coincide, each shows beside the next."""
    axes = (figure := Figure(figsize=(11, 7.5), layout="constrained")).subplots(2, 2, sharex="col")
    for (above, below), (what, key) in zip(axes.T, (("tabular", "exact"), ("cheetah", "loaded")), strict=True):
        rows = [row for row in results[f"{COMMAND} {what}"]["rows"] if row.get("setting") in (None, "exact value")]
        for i, name in enumerate(ESTIMATORS):
            own = [row for row in rows if row["estimator"] == name]
            single = [row for row in own if f"cosine_{key}" in row]
            y, half = zip(*(row[f"cosine_{key}"] for row in single), strict=True)
            x = [row["episodes"] for row in single]
            width = 4.5 - 0.6 * i
            above.errorbar(x, y, half, fmt=f"C{i}-", label=name, capsize=2, linewidth=width, elinewidth=1)
            below.plot(x, [row["spread"] for row in single], f"C{i}-", linewidth=width)
            for limit in [row[f"cosine_of_means_{key}"] for row in own if row not in single]:
                above.axhline(limit[0], color=f"C{i}", linestyle="--", linewidth=0.8)
        above.set(ylabel="cosine of single estimates with the reference", ylim=(-0.2, 1.05))
        below.set(ylabel="spread / length of the reference", xlabel="episodes per task", xscale="log", yscale="log")
    axes[0, 0].set_title("two tabular MDPs; reference: the exact meta-gradient")
    axes[0, 1].set_title("HalfCheetahDir; reference: a huge batch of loaded")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.what == "draw":
        draw(results := json.loads(RESULTS.read_text()))
        print("\n\n".join(f"{name}\n\n{text}" for name, text in tables(results).items()))
        return
    start, cpu = time.time(), time.process_time()
    result = {"tabular": tabular, "cheetah": cheetah}[options.what](options)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "mujoco": mujoco.__version__}
    result = {"versions": versions, "seconds": time.time() - start, "cpu": time.process_time() - cpu} | result
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = " ".join((COMMAND, *sys.argv[1:]))
    RESULTS.write_text(json.dumps(results | {command: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
