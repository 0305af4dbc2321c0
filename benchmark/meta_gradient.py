"""The numbers and the picture of docs/meta_gradient_a2c.md: the path of gamma beside every fixed gamma of a grid.

python benchmark/meta_gradient.py runs --env-id Corridor-v0 --seeds 1 2 3       fixed and learned, into results/
python benchmark/meta_gradient.py runs --env-id NoisyLights-v0 --seeds 1 2 3    what is there already is not run again
python benchmark/meta_gradient.py table                                         mean returns, and where gamma ended
python benchmark/meta_gradient.py picture                                       docs/images/meta_gradient.png
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import meta_gradient_a2c as algorithm  # noqa: E402
from envs import records  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/meta_gradient"
USUAL = ["--gae-lambda", "0.95", "--iterations", "250", "--eval-every", "250"]
# Of each task: its own flags, and the gammas at which learned ones begin.
TASKS = {
    "Corridor-v0": (["--lr", "0.001", "--entropy-coef", "0.03"], (0.5, 0.8, 0.99)),
    "NoisyLights-v0": (["--lr", "0.003", "--entropy-coef", "0.01"], (0.8, 0.99)),
}
FIXED = (0.01, 0.5, 0.8, 0.95, 0.99)
COLOURS = {0.5: "C2", 0.8: "C1", 0.99: "C0"}  # of learned gammas, by their first value
PARTS = 25  # points of a kept curve


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["runs", "table", "picture"]]
    """what to make"""
    env_id: Literal["Corridor-v0", "NoisyLights-v0"] = "Corridor-v0"
    """task of `runs`"""
    seeds: tuple[int, ...] = (1,)
    """of `runs`"""
    meta_lr: float = 0.03
    """of the learned gammas of `runs`"""


def kept(env_id: str, seed: int | str = "*") -> list[dict]:
    """The runs that are kept, of one seed or of all."""
    paths = sorted(RESULTS.glob(f"{env_id}_seed{seed}.json"))
    return [run for path in paths for run in json.loads(path.read_text())]


def in_parts(values: list[float | None], parts: int = PARTS) -> list[float | None]:
    """Means of equal parts of a curve; None where a part has no value."""
    cut = [[x for x in part if x is not None] for part in np.array_split(np.array(values, object), parts)]
    return [round(float(np.mean(part)), 4) if part else None for part in cut]


def play(env_id: str, seed: int, gamma: float, meta_lr: float) -> dict:
    """A run by the script's own `main`, into runs/ of the working directory: its curves."""
    flags = ["--env-id", env_id, *USUAL, *TASKS[env_id][0], "--seed", str(seed)]
    flags += ["--gamma", str(gamma), "--meta-lr", str(meta_lr)]
    before = set(Path("runs").glob("*"))
    algorithm.main(flags)
    (folder,) = set(Path("runs").glob("*")) - before
    rows, _ = records.read_metrics(folder)
    if rows[-1]["iteration"] < records.last_flags(folder / "args.json")["iterations"]:
        raise SystemExit(f"{folder} was stopped, and is not kept")
    keys = {"gamma": "train/gamma", "lambda": "train/lambda", "return": "train/return_post"}
    return {"seed": seed, "first_gamma": gamma, "meta_lr": meta_lr, "command": " ".join(flags)} | {
        name: in_parts([row.get(key) for row in rows]) for name, key in keys.items()
    }


def runs(options: Options) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    wanted = [(gamma, options.meta_lr) for gamma in TASKS[options.env_id][1]] + [(gamma, 0.0) for gamma in FIXED]
    for seed in options.seeds:
        for gamma, meta_lr in wanted:
            found = kept(options.env_id, seed)
            if not any((x["first_gamma"], x["meta_lr"]) == (gamma, meta_lr) for x in found):
                found.append(play(options.env_id, seed, gamma, meta_lr))
                lines = ",\n".join(json.dumps(x) for x in found)
                (RESULTS / f"{options.env_id}_seed{seed}.json").write_text(f"[\n{lines}\n]\n")


def grouped(env_id: str) -> dict[tuple[float, float], list[dict]]:
    """The kept runs by (first gamma, meta step size), fixed ones first."""
    groups = {}
    for x in sorted(kept(env_id), key=lambda x: (x["meta_lr"], x["first_gamma"], x["seed"])):
        groups.setdefault((x["first_gamma"], x["meta_lr"]), []).append(x)
    return groups


def mean(values: list[float | None]) -> float:
    return float(np.mean([x for x in values if x is not None]))


def table(options: Options) -> dict:
    """Of each kind of run: the mean return of all steps and of the last fifth, and gamma at the end, by seed."""
    result = {}
    for env_id in TASKS:
        for (gamma, meta_lr), found in grouped(env_id).items():
            name = f"{env_id} {'from' if meta_lr else 'fixed'} {gamma}"
            result[name] = {
                "all": [round(mean(x["return"]), 3) for x in found],
                "last fifth": [round(mean(x["return"][-PARTS // 5 :]), 3) for x in found],
                "gamma": [x["gamma"][-1] for x in found],
                "lambda": [x["lambda"][-1] for x in found],
            }
            print(name, json.dumps(result[name]))
    return result


def picture(options: Options) -> None:
    """Above gamma, below the return, over steps: means over seeds; learned ones in colours, each seed's gamma thin."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, len(TASKS), sharex="col")
    for column, env_id in enumerate(TASKS):
        for i, ((gamma, meta_lr), found) in enumerate(grouped(env_id).items()):
            returns = np.array([[np.nan if y is None else y for y in x["return"]] for x in found], float)
            steps = (np.arange(PARTS) + 0.5) / PARTS * 250 * 16 * 20 / 1000
            colour = COLOURS[gamma] if meta_lr else str(0.85 - 0.14 * i)
            label = f"learned, from {gamma:g}" if meta_lr else f"fixed at {gamma:g}"
            style = {"color": colour, "linewidth": 2.5 if meta_lr else 1.2, "label": label}
            paths = np.array([x["gamma"] for x in found])
            axes[0, column].plot(steps, paths.mean(0), **style)
            if meta_lr:
                axes[0, column].plot(steps, paths.T, color=colour, linewidth=0.6, alpha=0.6)
            axes[1, column].plot(steps, np.nanmean(returns, 0), **style)
        axes[0, column].set(title=env_id.removesuffix("-v0"), ylabel="discount gamma", ylim=(0, 1.02))
        axes[1, column].set(ylabel="return of training episodes", xlabel="thousand environment steps")
        axes[1, column].legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "meta_gradient.png", dpi=100)
    print(IMAGES / "meta_gradient.png")


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    globals()[options.what](options)


if __name__ == "__main__":
    main()
