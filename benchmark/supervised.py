"""The tables and pictures of docs/maml.md, docs/fomaml.md and docs/reptile.md.

    python benchmark/supervised.py sinusoid     MAML, FOMAML, Reptile, pretraining and random weights on 1,000 new tasks
    python benchmark/supervised.py stream       SGD against Reptile on minibatches
    python benchmark/supervised.py mixtures     Reptile's sum of gradients taken apart: g1, g1 + g2, ..
    python benchmark/supervised.py glyphs       a sheet of characters, and the nearest-pixel-mean classifier

Each trains what it needs with the files' own functions, writes docs/images/ and benchmark/results/supervised/, and
prints what it wrote. Runs on glyphs are made with the files themselves (docs/maml.md has the commands).
"""

import importlib
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch.func import grad, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from envs import make_supervised, summarise  # noqa: E402
from envs.records import Follower  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/supervised"


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["sinusoid", "stream", "mixtures", "glyphs"]]
    """table and picture to make"""
    iterations: int = 0
    """meta-updates; 0: as many as the files do by default (mixtures: 5000)"""
    shots: int = 10
    """support examples of the sinusoid"""
    seed: int = 1
    """seed of everything"""
    tasks: int = 1000
    """held-out tasks of the sinusoid and of glyphs; stream and mixtures take half as many"""


class Record(Follower):
    """Stands in for a run: keeps the metrics of every iteration that was evaluated."""

    def __init__(self, args):
        super().__init__(args)
        self.rows = []

    def log(self, state: dict, stats: dict) -> None:
        self.rows += [{"iteration": state["iteration"], **summarise(stats)}] if len(stats) > 1 else []


def initial(module, args):
    tasks = make_supervised(args.env_id, args.ways, 2 * args.shots)
    generator = torch.Generator().manual_seed(args.seed)
    return tasks, generator, module.init_params(tasks, args, generator)


def trained(name: str, **flags):
    """The module, its Args, the tasks, theta and the recorded rows of a training run."""
    module = importlib.import_module(f"algos.{name}")
    args = module.Args(**{"eval_every": 10**9} | flags)
    record = Record(args)
    tasks, generator, theta = initial(module, args)
    state = {"iteration": 0, "env_steps": 0, "seconds": 0.0, "theta": theta, "generator": generator.get_state()}
    if name == "reptile":
        state["moments"] = module.no_moments(theta)._asdict()
    module.train(tasks, args, record, state)
    return module, args, tasks, state["theta"], record.rows


def pretrained(args):
    """MAML's network trained by Adam on all tasks at once, on as many examples: the baseline of the paper."""
    module = importlib.import_module("algos.maml")
    tasks, generator, theta = initial(module, args)
    optimizer = torch.optim.Adam(theta.values(), args.outer_lr)
    for _ in range(args.iterations):
        batch = tasks.sample_tasks(args.meta_batch_size, generator, "train")
        ((x_NBX, y_NBY),) = tasks.sample(batch, (2 * args.shots,), generator)
        for name, gradient in grad(module.loss)(theta, x_NBX.flatten(0, 1), y_NBY.flatten(0, 1)).items():
            theta[name].grad = gradient
        optimizer.step()
    return theta


def evaluated(module, tasks, theta, args) -> dict:
    """The module's evaluation; Reptile's fine-tuning is by SGD here, which takes no moments."""
    moments = [module.no_moments(theta)] if hasattr(module, "no_moments") else []
    return module.evaluate(tasks, theta, *moments, args)


def write(name: str, result: dict) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = f"python benchmark/supervised.py {' '.join(sys.argv[1:])}"
    (RESULTS / f"{name}.json").write_text(json.dumps({"command": command} | result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def scores(stats: dict) -> list[float]:
    return [round(value, 4) for name, value in stats.items() if re.search(r"_k\d+$", name)]


def sinusoid(options: Options) -> None:
    """Losses after 0, 1, .. steps, ten times as many as in training, and the fitted curves of two held-out tasks."""
    flags = {"shots": options.shots, "seed": options.seed, "eval_tasks": options.tasks}
    flags |= {"iterations": options.iterations} if options.iterations else {}
    thetas, curves = {}, {}

    def measure(name: str, module, args, **shown) -> None:
        stats = summarise(evaluated(module, tasks, thetas[name], args))
        widths = {"ci95 after 1": stats["test/loss_k1_ci95"], "ci95 after all": stats["test/ci95"]}
        curves[name] = {**shown, "loss": scores(stats), **widths}

    for name, steps in (("reptile", 50), ("fomaml", 10), ("maml", 10)):
        module, args, tasks, thetas[name], _ = trained(name, **flags)
        args = replace(args, eval_steps=steps)
        measure(name, module, args, iterations=args.iterations)
    thetas["pretrained"], thetas["random"] = pretrained(args), initial(module, args)[2]
    for name in ("pretrained", "random"):  # fine-tuned with the step size that suits them best
        rates = {lr: replace(args, inner_lr=lr) for lr in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)}
        best = min(
            rates, key=lambda lr: float(evaluated(module, tasks, thetas[name], rates[lr])["test/loss_k10"].mean())
        )
        measure(name, module, rates[best], inner_lr=best)
    write(f"sinusoid_{options.shots}shot", curves)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    generator = torch.Generator().manual_seed(5)
    hidden = tasks.sample_tasks(2, generator, "test")
    (support,) = tasks.sample(hidden, (options.shots,), generator)
    grid = torch.linspace(-5, 5, 200)[:, None]
    for row, name in zip(axes, ("maml", "pretrained"), strict=True):
        rate = args if name == "maml" else rates[curves[name]["inner_lr"]]
        for i, axis in enumerate(row):
            task = (support[0][i], support[1][i])
            axis.plot(grid, tasks.target(grid, hidden[i]), "k", alpha=0.3, linewidth=4, label="task")
            for steps, style in ((0, "C7:"), (1, "C0--"), (10, "C3-")):
                params = module.inner_loop(thetas[name], task, steps, rate)
                axis.plot(grid, module.network(params, grid), style, label=f"after {steps} steps")
            axis.plot(*task, "k^")
            axis.set(title={"maml": "MAML", "pretrained": "pretraining"}[name])
    axes[0, 0].legend(fontsize=8)
    figure.savefig(IMAGES / f"sinusoid_{options.shots}shot_fits.png", dpi=110)
    axis = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name, curve in curves.items():
        axis.plot(curve["loss"], ".-", label=name)
    axis.set(
        xlabel="inner steps (MAML, FOMAML trained with 1, Reptile with 5)", ylabel="MSE on held-out tasks", yscale="log"
    )
    axis.legend()
    figure.savefig(IMAGES / f"sinusoid_{options.shots}shot_steps.png", dpi=110)


def stream(options: Options) -> None:
    """The same number of minibatches, spent by SGD one a step or by Reptile five of a task at a time."""
    iterations, result = options.iterations or 10000, {}
    axis = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for label, k, rate in (
        ("SGD, step size 0.02", 1, 1.0),
        ("SGD, step size 0.002", 1, 0.1),
        ("Reptile, k = 5", 5, 0.5),
    ):
        updates = iterations * 5 // k
        flags = {
            "iterations": updates,
            "inner_steps": k,
            "outer_lr": rate,
            "eval_every": updates // 20,
            "eval_tasks": options.tasks // 2,
        }
        rows = trained("reptile", seed=options.seed, **flags)[-1]
        rows = [row for row in rows if row["iteration"] >= flags["eval_every"]]  # without the first iteration's
        seen, losses = [row["iteration"] * k for row in rows], [round(row["test/loss_k32"], 4) for row in rows]
        result[label] = {"minibatches per task slot": seen, "loss after 32 steps": losses}
        axis.plot(seen, losses, label=label)
    axis.set(xlabel="minibatches of 10 points (x 25 tasks)", ylabel="MSE after 32 steps, held-out tasks", yscale="log")
    axis.legend()
    figure.savefig(IMAGES / "reptile_stream.png", dpi=110)
    write("stream", result)


def mixtures(options: Options) -> None:
    """theta moves along sums of the gradients g1, .., g4 of four consecutive minibatches."""
    reptile = importlib.import_module("algos.reptile")
    mixed = {"g1": [1], "g2": [0, 1], "(g1+g2)/2": [0.5, 0.5], "g1+g2": [1, 1], "g3": [0, 0, 1], "g1+g2+g3": [1, 1, 1]}
    mixed |= {"g4": [0, 0, 0, 1], "g1+g2+g3+g4": [1, 1, 1, 1], "(g1+..+g4)/4": [0.25] * 4}
    iterations, result = options.iterations or 5000, {}
    axis = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for label, weights in mixed.items():
        flags = {"eval_tasks": options.tasks // 2, "eval_steps": 10, "seed": options.seed}
        args = reptile.Args(inner_steps=len(weights), outer_lr=0.25, **flags)
        tasks, generator, theta = initial(reptile, args)
        moments = reptile.no_moments(theta)  # SGD takes none
        losses = []
        for iteration in range(iterations + 1):
            if iteration % (iterations // 10) == 0:
                stats = evaluated(reptile, tasks, theta, args)
                losses.append(round(float(stats["test/loss_k10"].mean()), 4))
            batch = tasks.sample_tasks(args.meta_batch_size, generator, "train")
            batches = tasks.sample(batch, (args.inner_shots,) * args.inner_steps, generator)
            fit = vmap(reptile.fit, in_dims=(None, None, 0, None), out_dims=(0, None))
            path, _ = fit(theta, moments, batches, args)
            for weight, before, after in zip(weights, path, path[1:], strict=False):
                steps = {name: (after[name] - before[name]).mean(0) for name in theta}  # - alpha g_i
                theta = {name: value + args.outer_lr * weight * steps[name] for name, value in theta.items()}
        result[label] = losses
        axis.plot(
            [i * iterations // 10 for i in range(11)], losses, label=label, linestyle="--" if "/" in label else "-"
        )
    axis.set(xlabel="iterations", ylabel="MSE after 10 steps, held-out tasks", yscale="log")
    axis.legend(fontsize=8)
    figure.savefig(IMAGES / "reptile_mixtures.png", dpi=110)
    write("mixtures", {"iterations": iterations, "loss after 10 steps": result})


def glyphs(options: Options) -> None:
    """Twelve characters of each kind as drawn ten times, and how far pixels alone get."""
    tasks, generator = make_supervised("Glyphs-v0", 20, 2), torch.Generator().manual_seed(options.seed)
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for axis, title, first in zip(
        figure.subplots(1, 2), ("training", "held out"), (0, tasks.classes["test"][0]), strict=True
    ):
        sheet = tasks.images[first : first + 12, :10].view(12, 10, 28, 28).permute(0, 2, 1, 3).reshape(12 * 28, 280)
        axis.imshow(255 - sheet, cmap="gray", vmin=0, vmax=255)
        axis.set(title=f"{title}: 12 classes x 10 drawings", xticks=[], yticks=[])
    figure.savefig(IMAGES / "glyphs.png", dpi=110)
    result = {}
    for ways in (5, 20):
        for shots in (1, 5):
            tasks.num_outputs = ways
            (x_NBX, _), (query_NBX, y_NBY) = tasks.sample(
                tasks.sample_tasks(options.tasks, generator, "test"), (shots,) * 2, generator
            )
            means_NYX = x_NBX.unflatten(1, (shots, ways)).mean(1)
            right_NB = torch.cdist(query_NBX, means_NYX).argmin(-1) == y_NBY.int().argmax(-1)
            share_N = right_NB.float().mean(1)
            result[f"{ways}-way {shots}-shot"] = [
                round(float(share_N.mean()), 4),
                round(1.96 * float(share_N.std()) / options.tasks**0.5, 4),
            ]
    write("nearest_pixel_mean", result)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    {"sinusoid": sinusoid, "stream": stream, "mixtures": mixtures, "glyphs": glyphs}[options.what](options)
