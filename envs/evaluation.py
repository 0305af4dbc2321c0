"""What `--evaluate RUN` leaves: a table on the screen, evaluation.json and evaluation.png in the run's folder."""

import json
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from torch import Tensor

from .core import refuse_not_finite
from .files import CannotWriteError, replace_file
from .processes import summarise
from .render import OWN_TASK, evaluation_picture, steps_of
from .screen import Lenient


def intervals(stats: dict) -> dict[str, Tensor | tuple]:
    """For each metric x that is a tensor over tasks an entry x_ci95, of which `summarise` makes its 95 % interval.

    An evaluation pairs its gain with the tasks; the other metrics are of the same tasks, in the same order.
    """
    tasks = next((x[1] for x in stats.values() if isinstance(x, tuple)), None)
    metrics = {name: x for name, x in stats.items() if isinstance(x, Tensor) and x.ndim and not name.endswith("ci95")}
    return {f"{name}_ci95": x if tasks is None else (x, tasks) for name, x in metrics.items()}


def table(summary: dict[str, float], unit: str) -> str:
    """An evaluation in lines: what came after 0, 1, .. units of adaptation, and the other metrics."""
    names = steps_of(summary)
    what = names[0][5:-3]
    lines = [f"{unit:<24} {what:>10}    95 % interval"]
    for k, name in enumerate(names):
        lines.append(f"{k:<24} {summary[name]:>10.4g}    {interval(summary, name)}")
    lines.append(
        f"{'change':<24} {summary[names[-1]] - summary[names[0]]:>10.4g}    +- {summary['test/gain_ci95']:.2g}"
    )
    for name in summary:
        if name not in names and not name.endswith("ci95"):
            lines.append(f"{name:<24} {summary[name]:>10.4g}    {interval(summary, name)}")
    return "\n".join(lines)


def unused(folder: Path, name: str) -> Path:
    """A new file of this name in the folder, or with a number if there is one."""
    stem, suffix = name.split(".")
    for k in count(1):
        path = folder / (name if k == 1 else f"{stem}-{k}.{suffix}")
        with suppress(FileExistsError), open(path, "x"):  # claimed: two processes get two names
            return path


def interval(summary: dict[str, float], name: str) -> str:
    width = summary.get(f"{name}_ci95")
    return "" if width is None else f"+- {width:.2g}"


def tell(args, state: dict, tests: str, stats: dict, unit: str, leads: bool) -> None:
    """Print an evaluation, and write it into the run's folder, beside older ones.

    Args:
        args: the flags, the run's and those beside --evaluate.
        state: of the run.
        tests: what the test tasks are called.
        stats: the metrics; tensors are over tasks.
        unit: what adaptation is counted in.
        leads: whether this process is the one that prints and writes; all of them must call.
    """
    summary = summarise(stats | intervals(stats))
    if not leads:
        return
    folder = Path(args.evaluate)
    tests = tests if "test/tasks" in summary else OWN_TASK
    refuse_not_finite(summary)
    number = int(summary.get("test/tasks", 0))
    over = f"{number} {tests}" if number > 1 else tests
    stdout = Lenient(sys.stdout)
    stdout.write(f"{folder}, iteration {state['iteration']}: {over}\n{table(summary, unit)}\n")
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "iteration": state["iteration"]}
    record |= {"tests": tests, "changed": state.get("changed", {}), "flags": vars(args), "metrics": summary}
    try:
        written = unused(folder, "evaluation.json")
    except OSError as error:
        raise CannotWriteError(str(error)) from error
    replace_file(written, f"{json.dumps(record, indent=2)}\n".encode())
    names = steps_of(summary)
    means = [summary[name] for name in names]
    widths = [summary.get(f"{name}_ci95", 0.0) for name in names]
    title = f"{folder.name}\niteration {state['iteration']}, {tests}"
    evaluation_picture(written.with_suffix(".png"), means, widths, title, unit, what=names[0][5:-3])
    stdout.write(f"written: {written}\n")
