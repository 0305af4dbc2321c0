"""Throughput and memory of MAML-TRPO against tasks, episodes per task and processes, with the physics' own limit.

    python benchmark/scaling.py run                                   1, 2, 4, .. processes, up to the cores
    python benchmark/scaling.py run --cuda --physics warp             .., up to the GPUs (--physics mujoco: likewise)
    python benchmark/scaling.py run --tasks 40 --episodes --processes 1 --threads 1 2 --horizon 200
    python benchmark/scaling.py draw                                  docs/images/scaling.png, from the results
    python benchmark/scaling.py table                                 the same numbers in markdown
    python benchmark/scaling.py point maml_trpo --meta-batch-size 20  one point in this process, a line of JSON

`run` measures each point in processes of their own, started by torchrun where there are several, and appends what they
say to benchmark/results/scaling.jsonl, one point a line. A point is a run of the algorithm's own `train()` as
benchmark/speed.py does it: an iteration that warms up, then `--iterations` of them, and between two of them the physics
alone, in all processes at the same time. Every flag of the algorithm's file is accepted, too. Figures are medians over
iterations, with the lowest and highest beside them; the slowest process counts.

end_to_end_, sampling_, physics_steps_per_s: steps of all processes. memory_mb: the most that the processes held until
the end of the first iteration (resident, summed: pages that they share count in each), start_memory_mb: before there
were worlds. cuda_memory_mb: the most that torch's tensors took on the GPUs, summed; cuda_device_mb: all that
was in use there at the end of the first iteration, by warp, by libraries and by others, too. sample_s, update_s: the
first process's.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import speed  # noqa: E402
from envs import join  # noqa: E402
from envs.locomotion import available_cpus  # noqa: E402
from envs.processes import gather  # noqa: E402

RATES = {"end_to_end": "o-", "sampling": "s--", "physics": "^:"}  # and how their points and lines are drawn


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["run", "draw", "table"]]
    """what to do"""
    algorithm: Literal["maml_trpo", "promp"] = "maml_trpo"
    """file of algos/"""
    tasks: tuple[int, ...] = (4, 10, 20, 40, 80)
    """numbers of tasks, each with the episodes of --at"""
    episodes: tuple[int, ...] = (5, 10, 20, 40)
    """numbers of episodes per task, each with the tasks of --at"""
    at: tuple[int, int] = (20, 20)
    """the tasks and the episodes where the other one varies"""
    processes: tuple[int, ...] = ()
    """numbers of processes; none: 1, 2, 4, .. up to the cores, with --cuda up to the GPUs"""
    threads: tuple[int, ...] = (1,)
    """numbers of torch's threads, only tried where the processes' threads have a core each"""
    cuda: bool = False
    """on the GPU"""
    iterations: int = 3
    """measured iterations of a point, after one that warms up"""
    limit: int = 600
    """seconds that a point may take"""
    results: Path = ROOT / "benchmark/results/scaling.jsonl"
    """where measured points are appended, and what is drawn"""
    image: Path = ROOT / "docs/images/scaling.png"
    """the picture"""


# ---------------------------------------------------------------- one point


class SharedStopwatch(speed.Stopwatch):
    """A stopwatch of each process, all started together; the first iteration's memory."""

    def restart(self) -> None:
        if dist.is_initialized():
            dist.barrier()
        super().restart()

    def log(self, state: dict, stats: dict) -> None:
        if not self.times["total"]:
            on_gpu = (torch.cuda.max_memory_allocated() / 2**20, device_mb()) if self.cuda else (0, 0)
            self.memory = resident_mb(), *on_gpu
        super().log(state, stats)


def resident_mb() -> float:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage counts what the process that started this one held
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_mb() -> float:
    """The memory of this process's GPU that is in use now, whoever uses it."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def figures(watch: SharedStopwatch, worlds: int, horizon: int, start_mb: float) -> dict:
    """What all processes measured together."""
    names = "total", "sample", "physics"
    slowest = {name: gather(torch.tensor([watch.times[name][1:]])).max(0).values.tolist() for name in names}
    steps = {"physics": [worlds * horizon] * watch.iterations} | dict.fromkeys(names[:2], watch.times["steps"][1:])
    result = {"iteration_s": median(slowest["total"])}
    for rate, name in zip(RATES, ("total", "sample", "physics"), strict=True):
        values = [n / seconds for n, seconds in zip(steps[name], slowest[name], strict=True)]
        summaries = {"": median(values), "_lowest": min(values), "_highest": max(values)}
        result |= {f"{rate}_steps_per_s{which}": value for which, value in summaries.items()}
    result["end_to_end_over_physics"] = result["end_to_end_steps_per_s"] / result["physics_steps_per_s"]
    result["sampling_over_physics"] = result["sampling_steps_per_s"] / result["physics_steps_per_s"]
    memory = gather(torch.tensor([[start_mb, *watch.memory]])).sum(0).tolist()
    result |= dict(zip(("start_memory_mb", "memory_mb", "cuda_memory_mb", "cuda_device_mb"), memory, strict=True))
    return {name: float(f"{value:.5g}") for name, value in result.items()}


def point(flags: list[str]) -> None:
    """Measure in this process, together with torchrun's others if there are any; the first one prints."""
    options, algorithm, args, run = speed.parse(flags)
    leads, start_mb = join(args.cuda, meta_batch_size=args.meta_batch_size), resident_mb()
    watch = SharedStopwatch(options, args)
    about = run(options, algorithm, args, watch)
    about |= figures(watch, args.meta_batch_size * args.episodes_per_task, args.horizon, start_mb)
    if leads:
        print(json.dumps({"algorithm": options.algorithm, "processes": int(os.environ.get("WORLD_SIZE", 1))} | about))


# ---------------------------------------------------------------- all points


def commands(options: Options, rest: list[str]) -> list[tuple[int, int, list[str]]]:
    """For each point the processes, the threads of each, and the words behind `python`."""
    most = torch.cuda.device_count() if options.cuda else available_cpus()
    counts = options.processes or [2**k for k in range(max(1, most).bit_length())]
    sizes = [(n, options.at[1]) for n in options.tasks] + [(options.at[0], n) for n in options.episodes]
    result = []
    for n, e in dict.fromkeys(sizes):
        for count in counts:
            if n % count:
                print(f"left out: {n} tasks are no multiple of {count} processes", flush=True)
                continue
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
            flags = f"--iterations {options.iterations} --meta-batch-size {n} --episodes-per-task {e}".split()
            words = [*run, "benchmark/scaling.py", "point", options.algorithm, *flags]
            words += ["--cuda"] if options.cuda else []
            threads = [k for k in options.threads if k == 1 or count * k <= available_cpus()]
            result += [(count, k, [*words, f"--torch-threads={k}", *rest]) for k in threads]
    return result


def measure(words: list[str], threads: int, limit: int) -> tuple[str, str]:
    """The line of JSON that a point prints, and what went wrong, if something did."""
    env = {"GOMP_SPINCOUNT": "1000"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes then; a kill would leave them behind
        process.communicate()
        return "", f"ran into the limit of {limit} s"
    return out, errors.strip() or f"exit status {process.returncode}" if process.returncode else ""


def keep(words: list[str], threads: int, limit: int, results: Path) -> dict:
    """What a command measures, appended to the results; {} and a message where it fails."""
    command = f"OMP_NUM_THREADS={threads} python {' '.join(words)}"
    out, error = measure(words, threads, limit)
    if error:
        print(f"failed: {command}\n{error}", file=sys.stderr, flush=True)
        return {}
    record = {"command": command} | json.loads(out)
    results.parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def run(options: Options, rest: list[str]) -> None:
    failed = 0
    for count, threads, words in commands(options, rest):
        if not (record := keep(words, threads, options.limit, options.results)):
            failed += 1
            continue
        args, names = record["args"], ("end_to_end_steps_per_s", "physics_steps_per_s", "memory_mb", "cuda_memory_mb")
        size = f"{count} x {threads} threads, {args['meta_batch_size']} tasks x {args['episodes_per_task']} episodes"
        print(size, *(f"{name} {record[name]:g}" for name in names), flush=True)
    if failed:
        raise SystemExit(f"{failed} points failed")


# ---------------------------------------------------------------- table and picture


def label(record: dict) -> str:
    """What the points of one line share."""
    count, threads = record["processes"], record["torch_threads"]
    where = f"{record['device']}, {record['physics']} physics" if record["args"]["cuda"] else f"{threads} thread"
    where += "s" * (threads > 1 and not record["args"]["cuda"])
    return f"{count} process{'es' * (count > 1)}, {where}"


def read(options: Options) -> dict[str, dict[tuple[int, int], dict]]:
    """For each label, by tasks and episodes: the record; of a point measured often, medians."""
    found = defaultdict(lambda: defaultdict(list))
    for line in options.results.read_text().splitlines():
        record = json.loads(line)
        if record["algorithm"] == options.algorithm:
            size = record["args"]["meta_batch_size"], record["args"]["episodes_per_task"]
            found[label(record)][size].append(record)
    if not found:
        raise SystemExit(f"{options.results} holds no points of {options.algorithm}")

    def together(records: list[dict]) -> dict:
        names = [name for name, value in records[0].items() if isinstance(value, float)]
        return records[0] | {name: median(record[name] for record in records) for name in names}

    return {who: {size: together(many) for size, many in sorted(sizes.items())} for who, sizes in found.items()}


def table(options: Options) -> None:
    names = "tasks x episodes", "processes", *(f"{name.replace('_', ' ')} steps/s" for name in RATES)
    print("| " + " | ".join((*names, "end to end / physics", "s per iteration", "memory, MB")) + " |")
    print("|---" * (len(names) + 3) + "|")
    for who, sizes in sorted(read(options).items()):
        for (n, e), record in sizes.items():
            cells = [f"{n} x {e}", who]
            for rate in RATES:
                values = (record[f"{rate}_steps_per_s{which}"] for which in ("", "_lowest", "_highest"))
                cells.append("{:,.0f} ({:,.0f} to {:,.0f})".format(*values))
            cells += [f"{record['end_to_end_over_physics']:.2f}", f"{record['iteration_s']:.2f}"]
            memory = f"{record['memory_mb']:,.0f}"
            memory += f", GPU {record['cuda_memory_mb']:,.0f}" if record["args"]["cuda"] else ""
            print("| " + " | ".join([*cells, memory]) + " |")


def is_busy(record: dict) -> bool:
    """Whether other work than the point's own took cores while it was measured."""
    return record["load_at_start"] > record["processes"] * record["cpus"]


def draw_rates(axes, points: dict, color: str) -> None:
    """The rates of points {x: record}, with bars from the lowest to the highest; busy ones hollow, without a line."""
    for rate, (mark, *style) in RATES.items():
        quiet = {x: record[f"{rate}_steps_per_s"] for x, record in points.items() if not is_busy(record)}
        axes.plot([*quiet], [*quiet.values()], color=color, linestyle="".join(style))
        for x, record in points.items():
            lowest, y, highest = (record[f"{rate}_steps_per_s{which}"] for which in ("_lowest", "", "_highest"))
            bars = [[abs(y - lowest)], [abs(highest - y)]]
            fill = "none" if is_busy(record) else color
            axes.errorbar(x, y, bars, fmt=mark, color=color, markerfacecolor=fill, markersize=5, capsize=2)


def draw(options: Options) -> None:
    """Colours are processes, threads and devices, in all panels; points of one x stand a little apart."""
    lines, (tasks, episodes) = read(options), options.at
    figure = Figure(figsize=(13, 9.6), layout="constrained")
    by_tasks, by_episodes, by_processes, memory = figure.subplots(2, 2).flat
    at = defaultdict(dict)  # by threads, device and physics: {processes: record}
    colors = {who: f"C{number}" for number, who in enumerate(sorted(lines))}
    for number, (who, color) in enumerate(colors.items()):
        sizes, apart = lines[who], 1.02 ** (number - (len(lines) - 1) / 2)
        draw_rates(by_tasks, {n * apart: record for (n, e), record in sizes.items() if e == episodes}, color)
        draw_rates(by_episodes, {e * apart: record for (n, e), record in sizes.items() if n == tasks}, color)
        if (tasks, episodes) in sizes:
            record = sizes[tasks, episodes]
            at[who.partition(", ")[2]][record["processes"] * apart] = record
            draw_rates(by_processes, {record["processes"] * apart: record}, color)
        largest = {}
        for (n, e), record in sizes.items():
            largest[n * e] = record["cuda_memory_mb" if record["args"]["cuda"] else "memory_mb"]
        worlds = sorted(largest)
        memory.plot(worlds, [largest[n] for n in worlds], "D-", color=color, markersize=4)
    for points in at.values():
        quiet = {number: record for number, record in sorted(points.items()) if not is_busy(record)}
        for rate, (_, *style) in RATES.items():
            y = [record[f"{rate}_steps_per_s"] for record in quiet.values()]
            by_processes.plot([*quiet], y, color="0.6", linestyle="".join(style), zorder=1)
    by_tasks.set(xlabel=f"tasks, of {episodes} episodes", ylabel="steps per second", xscale="log")
    by_episodes.set(xlabel=f"episodes of each of {tasks} tasks", ylabel="steps per second", xscale="log")
    by_processes.set(xlabel=f"processes, {tasks} tasks of {episodes} episodes", ylabel="steps per second")
    memory.set(xlabel="worlds", ylabel="memory, MB (GPU: of torch's tensors)", xscale="log")
    records = [record for sizes in lines.values() for record in sizes.values()]
    sizes = {size for points in lines.values() for size in points}
    ticks = {by_tasks: {n for n, e in sizes if e == episodes}, by_episodes: {e for n, e in sizes if n == tasks}}
    ticks |= {by_processes: {record["processes"] for record in records}, memory: {n * e for n, e in sizes}}
    for axes, values in ticks.items():
        axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    by_processes.margins(x=0.2)
    handles = [Line2D([], [], color=color, linewidth=4, label=who) for who, color in colors.items()]
    for rate, (mark, *style) in RATES.items():
        look = {"marker": mark, "linestyle": "".join(style), "markersize": 5}
        handles.append(Line2D([], [], color="0.3", label=rate.replace("_", " "), **look))
    if any(map(is_busy, records)):
        look = {"marker": "o", "linestyle": "", "markerfacecolor": "none", "color": "0.3"}
        handles.append(Line2D([], [], label="hollow: measured beside other work, too slow", **look))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    options.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.image, dpi=110)
    print(options.image)


def main() -> None:
    if sys.argv[1:2] == ["point"]:
        return point(sys.argv[2:])
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    if options.what == "run":
        return run(options, rest)
    if rest:
        raise SystemExit(f"{options.what}: unknown {' '.join(rest)}")
    {"draw": draw, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
