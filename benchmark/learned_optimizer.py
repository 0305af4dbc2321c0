"""A learned optimiser beside Adam, NAG, RMSprop, SGD, each at the best step size of a grid (docs/learned_optimizer.md).

    python benchmark/learned_optimizer.py                          trains algos/learned_optimizer.py, then compares
    python benchmark/learned_optimizer.py --run runs/FOLDER        takes a finished run of it

Step sizes are chosen on training functions, by the mean loss after as many steps as the learned one was trained for. A
grid grows until its best is not at an edge. Then all minimise the test functions, from the same starts and on the same
batches, for twice as many steps and more. Writes docs/images/ and benchmark/results/learned_optimizer/.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import learned_optimizer  # noqa: E402
from envs import make_optimisees  # noqa: E402
from envs.optimisees import Optimisees  # noqa: E402
from envs.records import Follower, load_checkpoint  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/learned_optimizer"
FACTOR = 10**0.25  # from one step size of a grid to the next
CLASSIC: dict[str, tuple[float, Callable]] = {  # where a grid begins, and the optimiser for a step size
    "Adam": (0.1, lambda x, lr: torch.optim.Adam([x], lr)),
    "NAG": (0.01, lambda x, lr: torch.optim.SGD([x], lr, momentum=0.9, nesterov=True)),
    "RMSprop": (0.1, lambda x, lr: torch.optim.RMSprop([x], lr)),
    "SGD": (0.01, lambda x, lr: torch.optim.SGD([x], lr)),
}


@dataclass
class Options:
    env_id: str = "Quadratics-v0"
    """family of functions"""
    run: str = ""
    """folder of a finished run of algos/learned_optimizer.py; none: train one here"""
    iterations: int = 300
    """of that training"""
    meta_batch_size: int = 64
    """functions minimised at once in that training"""
    seed: int = 1
    """of that training"""
    tasks: int = 200
    """test functions, and as many training functions to choose step sizes on"""
    steps: int = 300
    """steps on a test function"""


def learned(options: Options) -> tuple[dict, learned_optimizer.Args]:
    """phi and the flags of a run, or of a training here."""
    if options.run:
        state = load_checkpoint(options.run, "learned_optimizer", learned_optimizer.Args, flag="--run")
        return state["theta"], state["args"]
    flags = {"env_id": options.env_id, "iterations": options.iterations, "seed": options.seed}
    args = learned_optimizer.Args(**flags, meta_batch_size=options.meta_batch_size, eval_every=10**9, eval_steps=1)
    optimisees, generator = make_optimisees(args.env_id), torch.Generator().manual_seed(args.seed)
    theta = learned_optimizer.init_optimizer(optimisees, args, generator)
    state = {"iteration": 0, "env_steps": 0, "theta": theta, "generator": generator.get_state()}
    learned_optimizer.train(optimisees, args, Follower(args), state)
    return state["theta"], args


def descend(
    optimisees: Optimisees, optimizer: Callable, lr: float, start: Tensor, tasks: Tensor, batches: list
) -> Tensor:
    """Mean loss at every place of a classic optimiser's way; infinite from where a number is not finite."""
    params = start.clone().requires_grad_()
    steps, losses = optimizer(params, lr), []
    for batch in batches:  # all coordinates of all functions are independent in these four
        steps.zero_grad()
        loss = optimisees.loss(params, tasks, batch)
        losses.append(loss.detach().mean())
        loss.sum().backward()
        steps.step()
    return torch.stack(losses).nan_to_num(nan=math.inf, posinf=math.inf)


def best_step_size(measure: Callable[[float], float], start: float) -> dict[float, float]:
    """A grid of step sizes and the mean losses that they lead to; the best one is not at an edge."""
    exponents = [-2, -1, 0, 1, 2]
    grid = {k: measure(start * FACTOR**k) for k in exponents}
    # Of equals the smallest counts: where all diverge, the grid grows downwards.
    while (best := min(sorted(grid), key=grid.get)) in (min(grid), max(grid)):
        further = best - 1 if best == min(grid) else best + 1
        grid[further] = measure(start * FACTOR**further)
    return {start * FACTOR**k: grid[k] for k in sorted(grid)}


def compare(options: Options) -> dict:
    """For each optimiser its step size, the grid, and its curve on the test functions."""
    theta, args = learned(options)
    optimisees = make_optimisees(args.env_id)
    generator = torch.Generator().manual_seed(options.seed)
    tried = optimisees.sample_tasks(options.tasks, generator, "train")
    tried_start, tried_batches = (
        optimisees.start(tried, generator),
        optimisees.batches(tried, args.steps + 1, generator),
    )
    tasks, generator = optimisees.test_set(options.tasks)
    start, batches = optimisees.start(tasks, generator), optimisees.batches(tasks, options.steps + 1, generator)
    result = {}
    for name, (first, optimizer) in CLASSIC.items():

        def measure(lr: float, optimizer=optimizer) -> float:
            return float(descend(optimisees, optimizer, lr, tried_start, tried, tried_batches)[-1])

        grid = best_step_size(measure, first)
        lr = min(grid, key=grid.get)
        curve = descend(optimisees, optimizer, lr, start, tasks, batches)
        result[name] = {
            "lr": lr,
            "grid": {f"{k:.3g}": round(x, 5) if math.isfinite(x) else "diverges" for k, x in grid.items()},
            "loss": curve.tolist(),
        }
    with torch.no_grad():
        place = start, learned_optimizer.first_memory(start, args)
        _, losses = learned_optimizer.minimise(optimisees, theta, place, tasks, batches, args)
    result["learned"] = {"trained for": args.steps, "loss": torch.stack(losses).mean(1).tolist()}
    result["flags"] = {name: value for name, value in vars(args).items() if name not in ("resume", "evaluate")}
    return result


def draw(result: dict, path: Path) -> None:
    """Curves over steps, with a line where the training ended."""
    axis = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name in ("learned", *CLASSIC):
        label = name if name == "learned" else f"{name}, step size {result[name]['lr']:.2g}"
        axis.plot(result[name]["loss"], label=label, linewidth=2.5 if name == "learned" else 1.2)
    axis.axvline(result["learned"]["trained for"], color="0.7", linestyle=":", label="trained for so many steps")
    axis.set(xlabel="steps", ylabel="mean loss of the test functions", yscale="log")
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    result = compare(options)
    family = result["flags"]["env_id"].removesuffix("-v0")
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = f"python benchmark/learned_optimizer.py {' '.join(sys.argv[1:])}".strip()
    (RESULTS / f"{family}.json").write_text(json.dumps({"command": command} | result, indent=1) + "\n")
    draw(result, IMAGES / f"learned_optimizer_{family}.png")
    for name in ("learned", *CLASSIC):
        curve = result[name]["loss"]
        told = {k: f"{curve[k]:.4g}" for k in (20, 50, 100, 200, 300) if k < len(curve)}
        print(f"{name:<10} {result[name].get('lr', ''):<8.3} {told}" if name in CLASSIC else f"{name:<19} {told}")


if __name__ == "__main__":
    main()
