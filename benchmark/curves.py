"""Learning curves over seeds: algorithm x environment x seed from the table below, in parallel, resumable.

    python benchmark/curves.py run      what is unfinished of the table, as many runs at a time as there are cores
    python benchmark/curves.py run --env HalfCheetahDir --label maml rl2 --seeds 1 2 3 --jobs 2
    python benchmark/curves.py keep     metrics, args, command and versions of finished runs, into benchmark/results/
    python benchmark/curves.py adapt    held-out return after 0 to 10 inner steps, from the checkpoints of finished runs
    python benchmark/curves.py draw     the pictures in docs/images/, from benchmark/results/
    python benchmark/curves.py table    held-out return before and after adaptation at the end, likewise

A run lives in runs/curves/ENV/LABEL/SEED/: its `log`, and runs/NAME/ as the script makes it. Ctrl-C lets every run
finish its iteration and save; the same command goes on from there. A folder in which a process works is left alone.
"""

import fcntl
import gzip
import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from torch import Generator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.rl2 import load, refuse_mixed, tests_of  # noqa: E402
from envs import TaskGiven, make, records, summarise  # noqa: E402

RUNS, RESULTS, IMAGES = ROOT / "runs/curves", ROOT / "benchmark/results/curves", ROOT / "docs/images"
STEPS = 10  # inner steps of the adaptation curve
# Student's t, 0.975 quantile, for n seeds (n - 1 degrees of freedom): NIST/SEMATECH e-Handbook, 1.3.6.7.2
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Row(NamedTuple):
    """What is run: a script, its flags in each environment, and flags in all of them."""

    script: str
    flags: dict[str, str]
    more: str = ""


class Curve(NamedTuple):
    """What is drawn: a run's label, its metric after adaptation, in which pictures it is, and how its line is drawn."""

    label: str
    after: str = "test/return_k3"
    pictures: tuple[str, ...] = ("curves",)
    line: str | tuple = "-"


CHEETAH = "--meta-batch-size 20 --episodes-per-task 10 --iterations 75 --eval-every 5"
POINT = "--action-scale 1 --meta-batch-size 20 --iterations 60 --eval-every 5"
MEMORY = "--episodes-per-trial 2 --horizon 100 --entropy-coef 0 --epochs 5 --lr 0.001 --gae-lambda 0.95 --eval-every 5"
CHEETAH_MEMORY = f"{MEMORY} --action-scale 4 --meta-batch-size 60 --minibatches 12 --hidden-size 128 --iterations 50"
POINT_MEMORY = f"{MEMORY} --action-scale 1 --meta-batch-size 100 --minibatches 10 --hidden-size 64 --iterations 60"
POSTERIOR = "--horizon 100 --tasks-per-iteration 20 --iterations 10"
POINT_POSTERIOR = f"{POSTERIOR} --hidden-size 64 --gamma 0.9 --kl-weight 0.01 --tau 0.02 --lr 0.003 --reward-scale 20"

ENVS = "Navigation2D", "HalfCheetahDir", "HalfCheetahVel"
GRADIENT = dict(zip(ENVS, (POINT, CHEETAH, CHEETAH), strict=True))
RL2 = dict(zip(ENVS, (POINT_MEMORY, CHEETAH_MEMORY, CHEETAH_MEMORY), strict=True))
PEARL = {
    "Navigation2D": f"{POINT_POSTERIOR} --updates 700",
    "HalfCheetahDir": f"{POSTERIOR} --updates 1500 --train-tasks 20",
    "HalfCheetahVel": f"{POSTERIOR} --updates 1500",
}


def iterations(point: int, cheetah: int) -> dict[str, str]:
    """Flags of a file that samples other batches in an iteration than maml_trpo.py."""
    changed = {env: flags.replace("--iterations 75", f"--iterations {cheetah}") for env, flags in GRADIENT.items()}
    return changed | {"Navigation2D": POINT.replace("--iterations 60", f"--iterations {point}")}


TABLE = {
    "maml": Row("maml_trpo", GRADIENT),
    "fomaml": Row("maml_trpo", GRADIENT, "--first-order"),
    "e_maml": Row("maml_trpo", GRADIENT, "--estimator e_maml"),
    "promp": Row("promp", GRADIENT),
    "reptile": Row("reptile_ppo", iterations(30, 38)),  # of four batches each, not two
    "reptile_1": Row("reptile_ppo", {"Navigation2D": iterations(120, 0)["Navigation2D"]}, "--inner-steps 1"),
    "reptile_2": Row("reptile_ppo", {"Navigation2D": iterations(60, 0)["Navigation2D"]}, "--inner-steps 2"),
    "reptile_8": Row("reptile_ppo", {"Navigation2D": iterations(15, 0)["Navigation2D"]}, "--inner-steps 8"),
    "rl2": Row("rl2_ppo", RL2),
    "pearl": Row("pearl_sac", PEARL),
    "multitask": Row("multitask_ppo", iterations(60, 150)),
    "entropy": Row("multitask_ppo", {"HalfCheetahVel": iterations(60, 150)["HalfCheetahVel"]}, "--entropy-coef 0.01"),
    "oracle": Row("multitask_ppo", iterations(30, 150), "--task-given"),
}
# On HalfCheetahDir two yardsticks and E-MAML coincide. The yardsticks' dashes are 5 of 9 long and begin at 2 and at 0,
# so that the lower ones show in the gaps.
LOWER_DASHES, UPPER_DASHES = (7, (5, 4)), (0, (5, 4))
CURVES = {  # by name in the legend; the last one of a label names its adaptation curve
    "MAML": Curve("maml", pictures=("curves", "reptile")),
    "first-order MAML": Curve("fomaml", pictures=("curves", "reptile")),
    "E-MAML": Curve("e_maml"),
    "ProMP": Curve("promp"),
    "Reptile (k = 4)": Curve("reptile", pictures=("curves", "reptile")),
    "RL²": Curve("rl2", "test/return_k1"),
    "PEARL": Curve("pearl", "test/return_k2"),
    "domain randomisation": Curve("multitask", "test/return_k0", line=LOWER_DASHES),
    "fine-tuning": Curve("multitask", line=UPPER_DASHES),
    "fine-tuning, entropy kept up": Curve("entropy"),
    "oracle": Curve("oracle", "test/return_k0", line="--"),
    "Reptile, k = 1": Curve("reptile_1", pictures=("reptile",), line="--"),
    "Reptile, k = 2": Curve("reptile_2", pictures=("reptile",), line="--"),
    "Reptile, k = 8": Curve("reptile_8", pictures=("reptile",), line="--"),
}
RANDOM = "fine-tuning of a random policy"  # an adaptation curve only
TESTS = dict.fromkeys(ENVS, "held-out tasks") | {"HalfCheetahDir": "both directions"}  # there all tasks are trained on
TITLE = "mean over seeds, with its 95 % interval from three seeds on"


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["run", "keep", "adapt", "draw", "table"]]
    """what to do"""
    env: tuple[str, ...] = ()
    """environments, without -v0; none: all of the table"""
    label: tuple[str, ...] = ()
    """labels of runs; none: all of the table"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds, at most 10"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, each with one thread; unless given, the number of cores"""


class Job(NamedTuple):
    """One run of the table."""

    env: str
    label: str
    seed: int

    @property
    def home(self) -> Path:
        return RUNS / self.env / self.label / str(self.seed)

    @property
    def kept(self) -> str:
        return f"{self.env}_{self.label}_seed{self.seed}"

    @property
    def flags(self) -> list[str]:
        row = TABLE[self.label]
        return shlex.split(f"--env-id {self.env}-v0 --seed {self.seed} {row.flags[self.env]} {row.more}")

    def __str__(self) -> str:
        return f"{self.env} {self.label} seed {self.seed}"

    def folder(self) -> Path | None:
        """The run's own folder, if it has one."""
        found = self.home.glob("runs/*")
        return max(found, key=lambda path: ((path / "checkpoint.pt").exists(), path.name), default=None)

    def state(self) -> str:
        """What is to be done: "finished", "resume" or "start"."""
        if (folder := self.folder()) is None:
            return "start"
        rows, _ = records.read_metrics(folder)
        starts = records.read_starts(folder / "args.json")
        if rows and starts:
            # A run that was stopped in its last evaluation makes up for it when it goes on.
            is_tested = any(name.startswith("test/") for name in rows[-1])
            if is_tested and rows[-1]["iteration"] == starts[-1]["flags"]["iterations"]:
                return "finished"
        return "resume" if (folder / "checkpoint.pt").exists() else "start"

    def is_busy(self) -> bool:
        """Whether a process works there: it holds the lock (see `start`), or started otherwise has it as its cwd."""
        try:
            with open(self.home / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except BlockingIOError:
            return True
        home = str(self.home.resolve())
        return any(os.path.realpath(link) == home for link in Path("/proc").glob("[0-9]*/cwd"))

    def check(self) -> None:
        """Refuse a run that was made with other flags than the table's."""
        if not (path := (self.folder() or self.home) / "args.json").exists():
            return
        wanted = vars(tyro.cli(importlib.import_module(f"algos.{TABLE[self.label].script}").Args, args=self.flags))
        wanted, saved = json.loads(json.dumps(wanted)), records.last_flags(path)
        known = wanted.keys() & saved.keys() - {"resume", "evaluate"}
        names = [name for name in known if wanted[name] != saved[name]]
        if names:
            other = ", ".join(f"{name} {saved[name]}, not {wanted[name]}" for name in sorted(names))
            raise SystemExit(f"{path.parent}: not a run of the table, it has {other}; move it away or mend the table")


def jobs(options: Options) -> list[Job]:
    """The table's jobs in the order in which they run: all algorithms with a seed before the next seed."""
    for flag, names, allowed in (("env", options.env, ENVS), ("label", options.label, TABLE)):
        if wrong := [name for name in names if name not in allowed]:
            raise SystemExit(f"--{flag} {' '.join(wrong)}: allowed is {', '.join(allowed)}")
    seeds = dict.fromkeys(options.seeds)
    if not 1 <= len(seeds) <= max(T975) or min(seeds) < 0:
        raise SystemExit(f"--seeds {' '.join(map(str, seeds))}: allowed is 1 to {max(T975)} seeds, none below 0")
    if options.jobs < 1:
        raise SystemExit(f"--jobs {options.jobs}: allowed is 1 or more")
    pairs = [(env, label) for env in options.env or ENVS for label in options.label or TABLE]
    found = [Job(*pair, seed) for seed in seeds for pair in pairs if pair[0] in TABLE[pair[1]].flags]
    if not found:
        raise SystemExit(f"the table has no {' '.join(options.label)} in {' '.join(options.env)}")
    return list(dict.fromkeys(found))


def start(job: Job) -> subprocess.Popen | None:
    """Start or resume a job in its folder, which stays locked as long as the process lives; None where one works."""
    job.home.mkdir(parents=True, exist_ok=True)
    with open(job.home / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if (state := job.state()) == "finished":
            return None
        if state == "start":
            shutil.rmtree(job.home / "runs", ignore_errors=True)
        flags = job.flags if state == "start" else ["--resume", f"runs/{job.folder().name}"]
        command = [sys.executable, str(ROOT / f"algos/{TABLE[job.label].script}.py"), *flags]
        print(f"{state} {job}", flush=True)
        with open(job.home / "log", "ab" if state == "resume" else "wb") as log:
            # The child's copy of the lock holds it, even when this process is killed; in a session of its own the child
            # does not get the terminal's Ctrl-C, only what is passed on.
            where = {"cwd": job.home, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            where |= {"pass_fds": [lock.fileno()], "start_new_session": True}
            return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **where)


def run(options: Options) -> None:
    """Everything unfinished, `--jobs` at a time; signals are passed on as SIGTERM, a second one aborts the runs."""
    plan = {name: [] for name in ("finished", "resume", "start", "busy")}
    for job in jobs(options):
        job.check()
        plan["busy" if job.is_busy() else job.state()].append(job)
    print("; ".join(f"{name}: {len(some)}" for name, some in plan.items()), flush=True)
    waiting, running, failed, signals, passed = plan["resume"] + plan["start"], {}, [], [], 0
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: signals.append(number)) for number in numbers]
    while (waiting and not signals) or running:
        while waiting and not signals and len(running) < options.jobs:
            job = waiting.pop(0)
            if not job.is_busy() and (process := start(job)):
                running[job] = process, time.time()
            else:
                print(f"left alone: {job}, another process has taken it", flush=True)
        if len(signals) > passed:
            passed = len(signals)
            for process, _ in running.values():
                process.terminate()
        for job, (process, since) in list(running.items()):
            if (status := process.poll()) is not None:
                print(f"end {job}: exit status {status}, {time.time() - since:.0f} s", flush=True)
                is_whole = status in (0, -signal.SIGTERM) if signals else status == 0 and job.state() == "finished"
                failed += [] if is_whole else [job]
                del running[job]
        time.sleep(0.1)
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    lines = [f"failed: {job}, see {job.home / 'log'}" for job in failed]
    if lines := lines + ["interrupted; the same command goes on"] * bool(signals):
        raise SystemExit("\n".join(lines))


def origin(command: str) -> dict:
    """What a kept result says of its making."""
    versions = {name: version(name) for name in ("torch", "mujoco", "gymnasium", "numpy")}
    machine = {"cores": os.cpu_count(), "system": platform.platform()}
    return {"command": command, "versions": {"python": platform.python_version()} | versions, "machine": machine}


def finished(options: Options) -> list[Job]:
    """Those of the table that are; the others are named."""
    found = []
    for job in jobs(options):
        if job.state() != "finished" or job.is_busy():
            print(f"not finished: {job}", file=sys.stderr)
            continue
        job.check()
        found.append(job)
    return found


def keep(options: Options) -> None:
    """Copies in results/ of all that is finished; equal runs give equal bytes."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for job in finished(options):
        command = f"OMP_NUM_THREADS=1 python algos/{TABLE[job.label].script}.py {shlex.join(job.flags)}"
        flags = records.last_flags(job.folder() / "args.json") | {"resume": ""}
        tests = tests_of(records.read_metrics(job.folder())[0])
        record = origin(command) | {"tests": tests, "args": flags}
        (RESULTS / f"{job.kept}.args.json").write_text(json.dumps(record, indent=2) + "\n")
        with open(RESULTS / f"{job.kept}.metrics.jsonl.gz", "wb") as file:
            file.write(gzip.compress((job.folder() / "metrics.jsonl").read_bytes(), 9, mtime=0))
        print(job.kept)


def adapt(options: Options) -> None:
    """Into results/adapt_ENV.json: returns after 0 to 10 inner steps by each file's own `evaluate`, a row a seed.

    Beside `multitask`, as `random`, from the parameters that its runs began with."""
    returns: dict[str, dict[str, dict[int, list[float]]]] = {}
    for job in finished(options):
        module, args, state = load(job.folder())
        if "eval_steps" not in {field.name for field in fields(args)}:
            continue
        if state["iteration"] != args.iterations:
            raise SystemExit(f"{job.folder()}: its checkpoint is of iteration {state['iteration']}")
        envs = make(args.env_id, args.meta_batch_size * args.episodes_per_task, args.horizon, False, args.action_scale)
        envs = TaskGiven(envs) if getattr(args, "task_given", False) else envs
        starts = {job.label: state["theta"]}
        if job.label == "multitask":
            starts["random"] = module.init_policy(envs, args.hidden_size, Generator().manual_seed(args.seed))
        for label, theta in starts.items():
            stats = summarise(module.evaluate(envs, theta, replace(args, eval_steps=STEPS))[0])
            row = [stats[f"test/return_k{k}"] for k in range(STEPS + 1)]
            returns.setdefault(job.env, {}).setdefault(label, {})[job.seed] = row
            print(job, label, " ".join(f"{value:.4g}" for value in row), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for env, found in returns.items():
        labels = f" --label {' '.join(options.label)}" if options.label else ""
        command = f"python benchmark/curves.py adapt --env {env}{labels} --seeds {' '.join(map(str, options.seeds))}"
        record = origin(command) | {"tests": "fixed"}
        record |= {"seeds": {label: list(rows) for label, rows in found.items()}}
        record |= {"returns": {label: list(rows.values()) for label, rows in found.items()}}
        (RESULTS / f"adapt_{env}.json").write_text(json.dumps(record, indent=1) + "\n")
        draw_adaptation(env)


def interval(values) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean over the first axis, the seeds, and half of its 95 % interval; None for a single seed."""
    values = np.asarray(values, float)
    n = len(values)
    return values.mean(0), T975[n] * values.std(0, ddof=1) / n**0.5 if n > 1 else None


def common(runs: list[list[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of points (x, y) on one grid [G], all x between the last start and the first end: y [seeds, G]."""
    points = [np.array(run, float) for run in runs]
    low, high = max(run[0, 0] for run in points), min(run[-1, 0] for run in points)
    grid = np.unique(np.concatenate([run[:, 0] for run in points]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.stack([np.interp(grid, *run.T) for run in points])


def kept_rows(env: str, curve: Curve, seeds) -> list[list[dict]]:
    """The evaluations of each kept seed."""
    paths = [RESULTS / f"{Job(env, curve.label, seed).kept}.metrics.jsonl.gz" for seed in seeds]
    runs = []
    for path in (path for path in paths if path.exists()):
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        runs.append([row for row in rows if curve.after in row])
        if not runs[-1]:
            raise SystemExit(f"{path}: no {curve.after} in it")
    return runs


def kept_curves(options: Options) -> dict[str, dict[str, list[list[dict]]]]:
    """By environment and name in the legend, what is kept of what is asked for."""
    found, seeds = {}, dict.fromkeys(options.seeds)
    for env, label in dict.fromkeys((job.env, job.label) for job in jobs(options)):
        for name, curve in CURVES.items():
            if curve.label == label and (runs := kept_rows(env, curve, seeds)):
                found.setdefault(env, {})[name] = runs
    if not found:
        raise SystemExit(f"nothing of that is kept in {RESULTS}; `keep` puts it there")
    for env, curves in found.items():
        refuse_mixed((rows for runs in curves.values() for rows in runs), f"{env} (--label, --seeds choose)")
    return found


def draw_line(axes, name: str, x, values) -> None:
    """A mean with its band, in the colour that belongs to the name in all pictures; of two seeds, whose interval would
    cover everything (t is 12.7), only the mean."""
    mean, half = interval(values)
    i, n = [*CURVES, RANDOM].index(name), len(values)
    legend, color = f"{name} ({n} seed{'s' * (n > 1)})", "black" if name == RANDOM else f"C{i % 10}"
    axes.plot(x, mean, color, linestyle="--" if name == RANDOM else CURVES[name].line, label=legend)
    if n > 2:
        axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)


def save(figure: Figure, axes, path: Path) -> None:
    """With a legend, and cut to where the means are: bands of few seeds are wide where runs begin."""
    means = np.concatenate([np.ravel(line.get_ydata()) for panel in figure.axes for line in panel.lines])
    margin = 0.1 * np.ptp(means) + 1e-9
    axes.set_ylim(means.min() - margin, means.max() + margin)
    columns = 4 if figure.get_figwidth() > 10 else 3
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


def draw_adaptation(env: str) -> None:
    returns = json.loads((RESULTS / f"adapt_{env}.json").read_text())["returns"]
    names = {curve.label: name for name, curve in CURVES.items()} | {"random": RANDOM}
    axes = (figure := Figure(figsize=(8, 5.5), layout="constrained")).subplots()
    for label, name in names.items():
        if label in returns:
            draw_line(axes, name, range(STEPS + 1), returns[label])
    axes.set(xlabel="gradient steps at test time", ylabel=f"return, {TESTS[env]}")
    axes.set(title=f"{env}: {TITLE}")
    save(figure, axes, IMAGES / f"adaptation_{env}.png")


def draw(options: Options) -> None:
    """Pictures of each environment, over env_steps and over seconds; and of each adaptation curve."""
    for env, found in kept_curves(options).items():
        for picture in dict.fromkeys(picture for curve in CURVES.values() for picture in curve.pictures):
            draw_learning(
                env, picture, {name: runs for name, runs in found.items() if picture in CURVES[name].pictures}
            )
        if (RESULTS / f"adapt_{env}.json").exists():
            draw_adaptation(env)


def draw_learning(env: str, picture: str, curves: dict[str, list[list[dict]]]) -> None:
    """One picture; none where all its curves are in another one, too."""
    if any(CURVES[name].pictures == (picture,) for name in curves):
        panels = (figure := Figure(figsize=(11, 5.5), layout="constrained")).subplots(1, 2, sharey=True)
        for axes, what in zip(panels, ("env_steps", "seconds"), strict=True):
            for name, runs in curves.items():
                after = CURVES[name].after
                draw_line(axes, name, *common([[(row[what], row[after]) for row in rows] for rows in runs]))
            ends = [rows[-1][what] for runs in curves.values() for rows in runs]
            axes.set(xlabel=what, xscale="log" if max(ends) > 20 * min(ends) else "linear")
        panels[0].set(ylabel=f"return after adaptation, {TESTS[env]}")
        figure.suptitle(f"{env}: {TITLE}")
        save(figure, panels[0], IMAGES / f"{picture}_{env}.png")


def table(options: Options) -> None:
    """Markdown: returns at the end of the runs, after 0, 1 and the curve's steps or episodes; mean +- half of the 95 %
    interval over seeds."""

    def cell(values: list[float]) -> str:
        mean, half = interval(values)
        return f"{mean:.4g}" if half is None else f"{mean:.4g} +- {half:.2g}"

    for env, curves in kept_curves(options).items():
        print(f"\n| {env} | seeds | env steps | seconds | 0 | 1 | last |\n|---|---|---|---|---|---|---|")
        for name, runs in curves.items():
            last, after = [rows[-1] for rows in runs], CURVES[name].after
            steps, seconds = (np.mean([row[what] for row in last]) for what in ("env_steps", "seconds"))
            columns = (f"test/return_k{k}" if k <= int(after[-1]) else "" for k in (0, 1))
            cells = (cell([row[what] for row in last]) if what else "" for what in (*columns, after))
            print(f"| {name} | {len(runs)} | {steps:,.0f} | {seconds:,.0f} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    {"run": run, "keep": keep, "adapt": adapt, "draw": draw, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
