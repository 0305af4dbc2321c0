"""A table and a picture of several runs of one environment, side by side.

    python tools/compare.py RUN RUN ..                  a table on the screen, and compare.png
    python tools/compare.py runs/Bandit5-v0__* --after 0 --out first_episode.png

Runs with equal flags, apart from the seed, are one row and one curve. A number is the interquartile mean over seeds and
its 95 % bootstrap interval (benchmark/seeds.py), at the last evaluation that all seeds of the row have. A run's own
number is the mean over its test tasks, so the interval is about seeds, not about tasks. Curves of up to three seeds
show their mean and their range.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.curves import over_seeds, plural, save, together, told  # noqa: E402
from benchmark.rl2 import refuse_mixed  # noqa: E402
from benchmark.seeds import estimate  # noqa: E402
from envs import records  # noqa: E402
from envs.own import is_same  # noqa: E402
from envs.render import steps_of  # noqa: E402

# Flags that do not change what is learned, or only which draw of it a run is.
WITHOUT_EFFECT = ("seed", "resume", "evaluate", "capture_video", "track", "wandb_mode", "cuda", "physics", "compile")
ALGORITHMS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
MARKERS = "osv^DPX<>*"


@dataclass
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs"""
    after: int | None = None
    """units of adaptation (inner steps, episodes) after which curves are drawn; unless given, each row's last (0 where
    the task is given)"""
    out: Path = Path("compare.png")
    """the picture to write"""


class Run(NamedTuple):
    folder: Path
    algorithm: str
    flags: dict
    rows: list[dict]  # evaluations

    @property
    def learned_by(self) -> dict:
        """What runs of one group have in common."""
        return {"algorithm": self.algorithm} | {k: x for k, x in self.flags.items() if k not in WITHOUT_EFFECT}


def read(folder: Path) -> Run:
    """A run's flags and evaluations; SystemExit, with one line, for a folder that is no run or has no evaluation."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder")
    starts = records.read_starts(folder / "args.json")
    if not starts or not (folder / "metrics.jsonl").is_file():
        raise SystemExit(f"{folder}: no run, it lacks a readable args.json or metrics.jsonl")
    flags = starts[-1].get("flags", {})
    if not {"env_id", "seed"} <= flags.keys():
        raise SystemExit(f"{folder}: no run, its args.json names no environment and seed")
    rows = [row for row in records.read_metrics(folder)[0] if steps_of(row)]
    if not rows:
        raise SystemExit(f"{folder}: no evaluation in its metrics.jsonl yet")
    return Run(folder, algorithm_of(folder), flags, rows)


def algorithm_of(folder: Path) -> str:
    """From the folder's name, or where that has been changed from the checkpoint."""
    parts = folder.resolve().name.split("__")
    if len(parts) > 2 and parts[1] in ALGORITHMS:
        return parts[1]
    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["algorithm"]
    except Exception:
        raise SystemExit(
            f"{folder}: neither its name nor a checkpoint.pt says of which algorithm it is; a run is called "
            "ENV__ALGORITHM__SEED__.."
        ) from None


def refuse_incomparable(runs: list[Run]) -> None:
    """SystemExit, with one line, for runs of several environments or test sets, or for one that is there twice."""
    first = runs[0]
    for run in runs:
        if not is_same(run.flags["env_id"], first.flags["env_id"]):
            raise SystemExit(f"runs of two environments: {first.flags['env_id']} and {run.flags['env_id']}")
    refuse_mixed((run.rows for run in runs), "these runs")
    seen = {}
    for run in runs:
        key = repr((sorted(run.learned_by.items()), run.flags["seed"]))
        if key in seen:
            raise SystemExit(f"{seen[key]} and {run.folder}: the same flags and seed; give one of them")
        seen[key] = run.folder


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by what they are called, in the order given: the algorithm and the flags in which groups differ."""
    groups = []
    for run in runs:
        same = next((group for group in groups if group[0].learned_by == run.learned_by), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    names = {}
    for group in groups:
        flags, others = group[0].learned_by, [other[0].learned_by for other in groups]
        siblings = [other for other in others if other["algorithm"] == flags["algorithm"]]
        differ = [name for name in flags if any(other.get(name) != flags[name] for other in siblings)]
        names[" ".join([flags["algorithm"], *(written(name, flags[name]) for name in differ)])] = group
    return names


def written(name: str, value) -> str:
    """A flag as on the command line."""
    flag = records.flag(name)
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag} {value}"


def shortened(name: str, runs: list[Run]) -> list[list[dict]]:
    """Each run's evaluations in iterations in which all of a group were evaluated; says what is left out."""
    iterations = set.intersection(*({row["iteration"] for row in run.rows} for run in runs))
    if not iterations:
        raise SystemExit(f"{name}: no iteration in which all its seeds were evaluated")
    for run in runs:
        if run.rows[-1]["iteration"] > max(iterations):
            print(f"{run.folder}: only up to iteration {max(iterations)}, as far as its seeds go", file=sys.stderr)
    return [[row for row in run.rows if row["iteration"] in iterations] for run in runs]


def drawn_step(rows: list[list[dict]], after: int | None) -> str:
    """The metric to draw: after so many units of adaptation, or after the last one that all evaluations have."""
    names = [name for name in steps_of(rows[0][-1]) if all(name in row for run in rows for row in run)]
    if after is None:
        return names[-1]
    found = [name for name in names if name.endswith(f"_k{after}")]
    if not found:
        raise SystemExit(f"--after {after}: allowed is {', '.join(name.rpartition('_k')[2] for name in names)}")
    return found[0]


def table(groups: dict[str, list[list[dict]]]) -> list[str]:
    """Lines of Markdown: a row for each group, its numbers at its last common evaluation."""
    steps = max((steps_of(rows[0][-1]) for rows in groups.values()), key=len)
    what = steps[0].removeprefix("test/").rpartition("_k")[0]
    heads = [f"{what} on test tasks", "seeds", "iteration", "env steps", "seconds", "tasks"]
    heads += [f"after {name.rpartition('_k')[2]}" for name in steps]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, rows in groups.items():
        ends = [run[-1] for run in rows]
        cells = [name, str(len(rows)), str(ends[0]["iteration"])]
        cells += [f"{np.mean([row[column] for row in ends]):,.0f}" for column in ("env_steps", "seconds")]
        cells.append(", ".join(dict.fromkeys(f"{row.get('test/tasks', 1):.0f}" for row in ends)))
        for step in steps:
            values = [[row[step]] for row in ends if step in row]
            cells.append(str(estimate(values)) if len(values) == len(ends) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(groups: dict[str, list[list[dict]]], metrics: dict[str, str], env_id: str, path: Path) -> None:
    """Curves of each group's metric over steps and over seconds."""
    panels = (figure := Figure(figsize=(11, 6), layout="constrained")).subplots(1, 2, sharey=True)
    for axes, x_name in zip(panels, ("env_steps", "seconds"), strict=True):
        for number, (name, rows) in enumerate(groups.items()):
            x, values = together(rows, x_name, metrics[name])
            middle, low, high = over_seeds(values)
            after = metrics[name].rpartition("_k")[2]
            label = f"{name}, after {after} ({plural(len(rows))})"
            style = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "fillstyle": "none"}
            axes.plot(x, middle, label=label, markevery=max(1, len(x) // 10), **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set(xlabel=x_name)
    what = next(iter(metrics.values())).removeprefix("test/").rpartition("_k")[0]
    panels[0].set(ylabel=f"{what} on test tasks")
    figure.suptitle(f"{env_id}: {told([len(rows) for rows in groups.values()])}", fontsize="medium")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    if not options.runs:
        raise SystemExit("usage: python tools/compare.py RUN RUN ..   (folders of runs)")
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        raise SystemExit(f"--out {options.out}: allowed is a name that ends in .png, .pdf or .svg")
    runs = [read(folder) for folder in options.runs]
    refuse_incomparable(runs)
    by_name = grouped(runs)
    groups = {name: shortened(name, group) for name, group in by_name.items()}
    metrics = {}
    for name, rows in groups.items():
        knows_task = by_name[name][0].flags.get("task_given", False)  # an oracle, which need not adapt
        metrics[name] = drawn_step(rows, 0 if knows_task and options.after is None else options.after)
    print("\n".join(table(groups)))
    draw(groups, metrics, runs[0].flags["env_id"], options.out)


if __name__ == "__main__":
    main()
