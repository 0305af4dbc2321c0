"""Learning curves over seeds: algorithm x environment x seed from the table below, in parallel, resumable.

    python benchmark/curves.py run      what is unfinished of the table, as many runs at a time as there are cores
    python benchmark/curves.py run --env HalfCheetahDir --label maml promp --seeds 1 2 3 --jobs 2
    python benchmark/curves.py keep     metrics, args, command and versions of finished runs, into benchmark/results/
    python benchmark/curves.py sweep    step sizes of fine-tuning, of `multitask` and of random policies, likewise
    python benchmark/curves.py adapt    return on each test task after 0 to 10 inner steps, from the checkpoints
    python benchmark/curves.py draw     the pictures in docs/images/, from benchmark/results/
    python benchmark/curves.py table    returns, paired differences and sustained crossings, likewise

A run lives in runs/curves/ENV/LABEL/SEED/ (--runs DIR: DIR/ENV/LABEL/SEED/): its `log`, and runs/NAME/ as the script
makes it. Ctrl-C lets every run finish its iteration and save; the same command goes on from there. A folder in which a
process works is left alone. `sweep` and `adapt` measure only what their files lack, or what has another checkpoint.
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
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.adaptation import (  # noqa: E402
    LATER,
    RANDOM,
    STEPS,
    SWEPT,
    Choice,
    Start,
    adapted,
    mean_after,
    play,
    returns_after,
    rounded,
    search,
    starts,
)
from benchmark.rl2 import refuse_mixed, tests_of  # noqa: E402
from benchmark.seeds import T975, difference, distinct, estimate, iqm, sustained  # noqa: E402
from benchmark.seeds import common as common  # noqa: E402  (other studies have it from here)
from benchmark.seeds import interval as interval  # noqa: E402  (likewise)
from envs import records  # noqa: E402
from envs.core import NotFinite  # noqa: E402
from envs.files import replace_file  # noqa: E402

RUNS, RESULTS, IMAGES = ROOT / "runs/curves", ROOT / "benchmark/results/curves", ROOT / "docs/images"
LARGE = 200_000  # bytes from which on a result is compressed


class Row(NamedTuple):
    """What is run: a script, its flags in each environment, and flags in all of them."""

    script: str
    flags: dict[str, str]
    more: str = ""


class Scale(NamedTuple):
    """How much is played in an environment; `iterations`, also between evaluations, are MAML's, two batches each."""

    sizes: str
    iterations: int
    eval_every: int


class Curve(NamedTuple):
    """How a label is shown."""

    name: str
    """in tables, and beside curves over steps of adaptation"""
    color: str
    line: str | tuple = "-"
    marker: str = "o"
    after: str = "test/return_k3"
    """metric of curves over training"""
    training: str = ""
    """name beside curves over training, if that is another one"""
    pictures: tuple[str, ...] = ("curves",)
    """over training; in all but the first it is there for comparison"""


SCALES = {
    "Navigation2D": Scale(
        sizes="--action-scale 1 --meta-batch-size 20 --episodes-per-task 20 --horizon 100",
        iterations=120,
        eval_every=10,
    ),
    "HalfCheetahDir": Scale(
        sizes="--meta-batch-size 40 --episodes-per-task 20 --horizon 200",
        iterations=100,
        eval_every=10,
    ),
    "HalfCheetahVel": Scale(
        sizes="--meta-batch-size 40 --episodes-per-task 10 --horizon 200",
        iterations=200,
        eval_every=20,
    ),
}
SCALES |= dict.fromkeys(
    ("AntDir", "AntDir2D"),
    Scale(
        sizes="--meta-batch-size 20 --episodes-per-task 20 --horizon 200",
        iterations=80,
        eval_every=10,
    ),
)
ENVS = tuple(SCALES)
POINT = ("Navigation2D",)
MAIN = ("Navigation2D", "HalfCheetahDir", "HalfCheetahVel")
TRPO = {"Navigation2D": " --max-kl 0.01"}  # of MAML in all its forms; elsewhere the default
PPO = {"HalfCheetahDir": " --lr 0.003"}  # of the multi-task policies, likewise


def flags(envs: tuple[str, ...], batches: int = 2, more: dict[str, str] | None = None) -> dict[str, str]:
    """Flags in each environment: as many steps in all and between evaluations; an iteration has so many batches."""
    found = {}
    for env in envs:
        scale = SCALES[env]
        iterations = scale.iterations * 2 // batches
        eval_every = max(1, scale.eval_every * 2 // batches)
        found[env] = f"{scale.sizes} --iterations {iterations} --eval-every {eval_every}"
        found[env] += (more or {}).get(env, "")
    return found


TABLE = {
    "maml": Row("maml_trpo", flags(ENVS, more=TRPO)),
    "fomaml": Row("maml_trpo", flags(MAIN, more=TRPO), "--first-order"),
    "maml_half": Row("maml_trpo", flags(POINT, more=TRPO), "--inner-lr 0.5"),  # as the authors' script
    "e_maml": Row("maml_trpo", flags(POINT, more=TRPO), "--estimator e_maml"),
    "promp": Row("promp", flags(MAIN)),
    "reptile": Row("reptile_ppo", flags(MAIN, batches=4)),
    "reptile_1": Row("reptile_ppo", flags(POINT, batches=1), "--inner-steps 1"),
    "reptile_2": Row("reptile_ppo", flags(POINT, batches=2), "--inner-steps 2"),
    "reptile_8": Row("reptile_ppo", flags(POINT, batches=8), "--inner-steps 8"),
    "multitask": Row("multitask_ppo", flags(MAIN, batches=1, more=PPO)),
    "oracle": Row("multitask_ppo", flags(ENVS, batches=1, more=PPO), "--task-given"),
}
TUNED = ("multitask", RANDOM)  # their step sizes are swept
# Curves can coincide: open markers of different shapes lie on each other and show, and so do dashes that begin
# elsewhere.
CURVES = {
    "maml": Curve("MAML", "C0", pictures=("curves", "reptile")),
    "fomaml": Curve("first-order MAML", "C1", marker="s", pictures=("curves", "reptile")),
    "maml_half": Curve("MAML, alpha 0.5", "C9", marker="D"),
    "e_maml": Curve("E-MAML", "C2", marker="^"),
    "promp": Curve("ProMP", "C3", marker="v"),
    "reptile": Curve("Reptile (k = 4)", "C4", marker="P", pictures=("curves", "reptile")),
    "reptile_1": Curve("Reptile, k = 1", "C6", line="--", marker="<", pictures=("reptile",)),
    "reptile_2": Curve("Reptile, k = 2", "C7", line="-.", marker=">", pictures=("reptile",)),
    "reptile_8": Curve("Reptile, k = 8", "navy", line=":", marker="p", pictures=("reptile",)),
    "multitask": Curve(
        "fine-tuning", "C8", line=(7, (5, 4)), marker="X", after="test/return_k0", training="domain randomisation"
    ),
    RANDOM: Curve("fine-tuning of a random policy", "black", line=(0, (5, 4)), marker="+", pictures=()),
    "oracle": Curve("oracle", "C5", line="--", marker="*", after="test/return_k0"),
}
BOTH = "both directions"  # all tasks of the family, trained on
TESTS = dict.fromkeys(ENVS, "held-out tasks") | {"HalfCheetahDir": BOTH, "AntDir": BOTH}
# What is played at test time where that is not as in the run: the paper's 40 episodes, and enough goals.
TEST_SIZES = {"Navigation2D": {"meta_batch_size": 100, "episodes_per_task": 40}}
BELOW_ZERO = ("Navigation2D", "HalfCheetahVel")  # returns, so that shares are from the untrained policy's on
PAIRS = (("maml", "fomaml"), ("promp", "maml"), ("maml", "multitask"))  # whose differences the table shows
SHARES = (0.5, 0.75, 1.0)  # levels of the crossings, of what MAML gains
NOTE = "step sizes are chosen by these returns on the test set itself, which favours fine-tuning"


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["run", "keep", "sweep", "adapt", "draw", "table"]]
    """what to do"""
    env: tuple[str, ...] = ()
    """environments, without -v0; none: all of the table"""
    label: tuple[str, ...] = ()
    """labels of runs; none: all of the table"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds, at most 10"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, each with one thread; unless given, the number of cores"""
    runs: Path | None = None
    """folder of the runs, ENV/LABEL/SEED/runs/NAME; unless given, runs/curves"""
    again: bool = False
    """sweep and adapt: measure also what is in their files"""


class Job(NamedTuple):
    """One run of the table."""

    env: str
    label: str
    seed: int
    runs: Path | None = None

    @property
    def home(self) -> Path:
        return (self.runs or RUNS) / self.env / self.label / str(self.seed)

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
    runs = options.runs.resolve() if options.runs else None
    found = [Job(env, label, seed, runs) for seed in seeds for env, label in pairs if env in TABLE[label].flags]
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


# ---------------------------------------------------------------- adaptation at test time


def read_result(kind: str, env: str) -> dict:
    """What `sweep` or `adapt` has written; {} where there is nothing."""
    path = RESULTS / f"{kind}_{env}.json"
    if path.exists():
        return json.loads(path.read_text())
    packed = path.with_suffix(".json.gz")
    return json.loads(gzip.decompress(packed.read_bytes())) if packed.exists() else {}


def write_result(kind: str, env: str, record: dict) -> None:
    """Into results/KIND_ENV.json, or .json.gz where it is large."""
    options = "" if kind == "sweep" else f" --label {' '.join(name for name in record['returns'] if name != RANDOM)}"
    seeds = sorted({int(seed) for rows in record["returns"].values() for seed in rows})
    command = f"python benchmark/curves.py {kind} --env {env}{options} --seeds {' '.join(map(str, seeds))}"
    text = (json.dumps(origin(command) | record) + "\n").encode()
    path = RESULTS / f"{kind}_{env}.json"
    packed = path.with_suffix(".json.gz")
    RESULTS.mkdir(parents=True, exist_ok=True)
    if len(text) > LARGE:
        replace_file(packed, gzip.compress(text, 9, mtime=0))
        path.unlink(missing_ok=True)
    else:
        replace_file(path, text)
        packed.unlink(missing_ok=True)


def opened(kind: str, env: str, start: Start) -> dict:
    """The record in a result's file, if it is of the test set and the episodes of `start`; else a new one."""
    tasks, _ = start.envs.unwrapped.test_set(start.args.meta_batch_size)
    setting = {"tests": "fixed", "episodes": start.args.episodes_per_task, "horizon": start.args.horizon}
    setting |= {"tasks": rounded(tasks)}
    record = read_result(kind, env)
    if any(record.get(name) != value for name, value in setting.items()):
        if record:
            print(f"{kind}_{env}: what is kept is of another test set and is dropped", file=sys.stderr)
        record = setting | {"checkpoints": {}, "returns": {}}
    return record


def adapt(options: Options) -> None:
    """Into results/adapt_ENV.json: returns on each test task after 0 to 10 inner steps."""
    found = finished(options)
    for job in found:
        for label in TUNED if job.label == "multitask" else ():
            swept(job.env, label)  # it may refuse: before all the work
    for job in found:
        for label, start in starts(job.folder(), job.label, TEST_SIZES.get(job.env, {})).items():
            adapt_one(job, label, start, options.again)


def adapt_one(job: Job, label: str, start: Start, again: bool) -> None:
    """The returns of a label's seed into its file, unless they are there."""
    checkpoint = start.checkpoint | (swept(job.env, label) if label in TUNED else {})
    record = opened("adapt", job.env, start)
    seed = str(job.seed)
    if record["checkpoints"].get(label, {}).get(seed) == checkpoint and not again:
        print(f"{job.env} {label} seed {seed}: kept", flush=True)
        return
    try:
        rows = adapted(start, checkpoint)
    except NotFinite as error:
        print(f"left out: {job.env} {label} seed {seed}, {error}", file=sys.stderr)
        return
    record["checkpoints"].setdefault(label, {})[seed] = checkpoint
    record["returns"].setdefault(label, {})[seed] = rows
    write_result("adapt", job.env, record)
    means = np.array(rows, float).mean(1)
    print(f"{job.env} {label} seed {seed}:", " ".join(f"{value:.4g}" for value in means), flush=True)


# ---------------------------------------------------------------- the step size of fine-tuning


def sweep(options: Options) -> None:
    """Into results/sweep_ENV.json: fine-tuning from `multitask` and from random policies with many step sizes.

    The best for 1, 2 and 3 steps is that with the best mean return over the seeds asked for and the test tasks.
    """
    found = finished(replace(options, label=("multitask",)))
    if not found:
        raise SystemExit("a sweep needs a finished run of multitask")
    for env in dict.fromkeys(job.env for job in found):
        sizes = TEST_SIZES.get(env, {})
        seeds = {str(job.seed): starts(job.folder(), job.label, sizes) for job in found if job.env == env}
        for label in TUNED:
            sweep_label(env, label, {seed: labels[label] for seed, labels in seeds.items()}, options.again)


def sweep_label(env: str, label: str, seeds: dict[str, Start], again: bool) -> None:
    """What the file lacks of these seeds' returns, and the best choices among all; other seeds leave the file."""
    record = opened("sweep", env, next(iter(seeds.values())))
    before, returns = record["returns"].get(label, {}), {}
    for seed, start in seeds.items():
        is_known = record["checkpoints"].get(label, {}).get(seed) == start.checkpoint
        returns[seed] = before[seed] if is_known and not again else {}
    record["checkpoints"][label] = {seed: start.checkpoint for seed, start in seeds.items()}
    record["returns"][label] = returns
    record.setdefault("best", {}).pop(label, None)
    record["note"] = NOTE
    first = {}

    def measure(alpha: float) -> None:
        name = f"{alpha:g}"
        for seed, start in seeds.items():
            if name not in returns[seed]:
                if seed not in first:
                    first[seed] = play(start, start.theta)
                returns[seed][name] = returns_after(start, first[seed], alpha)
        write_result("sweep", env, record)
        means = [f"{mean_after(returns, Choice(name, later), SWEPT):.4g} {later}" for later in LATER]
        print(f"{env} {label} alpha {name}, {SWEPT} steps: {', '.join(means)}", flush=True)

    best = search(returns, measure)
    record["best"][label] = {
        str(k): choice._asdict() | {"mean": mean_after(returns, choice, k)} for k, choice in best.items()
    }
    write_result("sweep", env, record)
    told = ", ".join(f"{choice.alpha} {choice.later} for {k}" for k, choice in best.items())
    print(f"{env} {label}: best alpha {told} steps; {NOTE}", flush=True)


def swept(env: str, label: str, k: int = SWEPT) -> dict:
    """The step size that is best for k steps, and what later steps take of it; SystemExit where none was swept."""
    best = read_result("sweep", env).get("best", {})
    if label not in best:
        raise SystemExit(f"{label} in {env}: first `python benchmark/curves.py sweep --env {env}`, for its step size")
    return {"inner_lr": float(best[label][str(k)]["alpha"]), "later": best[label][str(k)]["later"]}


# ---------------------------------------------------------------- what is kept


def kept_rows(env: str, label: str, seed: int) -> list[dict]:
    """The evaluations of a kept run; [] where none is."""
    path = RESULTS / f"{Job(env, label, seed).kept}.metrics.jsonl.gz"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows = [row for row in rows if CURVES[label].after in row]
    if not rows:
        raise SystemExit(f"{path}: no {CURVES[label].after} in it")
    return rows


Curves = dict[str, dict[int, list[dict]]]  # label -> seed -> evaluations


def kept_curves(options: Options) -> dict[str, Curves]:
    """By environment, what is kept of what is asked for."""
    found = {}
    for job in jobs(options):
        if rows := kept_rows(job.env, job.label, job.seed):
            found.setdefault(job.env, {}).setdefault(job.label, {})[job.seed] = rows
    if not found:
        raise SystemExit(f"nothing of that is kept in {RESULTS}; `keep` puts it there")
    for env, curves in found.items():
        refuse_mixed((rows for runs in curves.values() for rows in runs.values()), f"{env} (--label, --seeds choose)")
    return {env: {label: curves[label] for label in CURVES if label in curves} for env, curves in found.items()}


def is_asked(label: str, options: Options) -> bool:
    """Whether a label is among those asked for; random policies come with `multitask`."""
    return not options.label or label in options.label or (label == RANDOM and "multitask" in options.label)


def adaptation(env: str, options: Options) -> dict[str, np.ndarray]:
    """By label, returns [S, STEPS + 1, M] of seeds asked for on the M distinct test tasks, from adapt_ENV.json."""
    record = read_result("adapt", env)
    found = {}
    for label in CURVES:
        rows = record.get("returns", {}).get(label, {})
        seeds = [str(seed) for seed in dict.fromkeys(options.seeds) if str(seed) in rows]
        if seeds and is_asked(label, options):
            found[label] = distinct([rows[seed] for seed in seeds], record["tasks"])
    return found


def tuned(env: str, label: str, k: int, options: Options) -> np.ndarray:
    """Returns [S, M] after k steps of fine-tuning with the step size that is best for k, from sweep_ENV.json."""
    choice = swept(env, label, max(k, 1))
    record = read_result("sweep", env)
    rows = record["returns"][label]
    seeds = [str(seed) for seed in dict.fromkeys(options.seeds) if str(seed) in rows]
    if not seeds or record["tasks"] != read_result("adapt", env)["tasks"]:
        raise SystemExit(f"sweep_{env}.json is of other seeds or test tasks than adapt_{env}.json; sweep again")
    alpha = f"{choice['inner_lr']:g}"
    return distinct([rows[seed][alpha][choice["later"]][k] for seed in seeds], record["tasks"])


# ---------------------------------------------------------------- pictures


def together(runs: list[list[dict]], what: str, after: str) -> tuple[np.ndarray, np.ndarray]:
    """What evaluations of all seeds have in common: x [G], the mean over seeds of `what`, and returns [S, G]."""
    by_iteration = [{row["iteration"]: row for row in rows} for rows in runs]
    iterations = sorted(set.intersection(*(set(rows) for rows in by_iteration)))
    x, y = (np.array([[rows[i][name] for i in iterations] for rows in by_iteration], float) for name in (what, after))
    return x.mean(0), y


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middle, low and high [G] of curves [S, G]: the mean and the range of up to three seeds, else the interquartile
    mean and its bootstrap interval."""
    if len(values) < 4:
        return values.mean(0), values.min(0), values.max(0)
    estimates = [estimate(column[:, None]) for column in values.T]
    return tuple(np.array([getattr(x, name) for x in estimates]) for name in ("value", "low", "high"))


def told(numbers: list[int]) -> str:
    """What lines and bands of `over_seeds` are, in a picture of curves of so many seeds."""
    few = "mean over seeds, band: their range"
    many = "interquartile mean over seeds, band: its 95 % bootstrap interval"
    if max(numbers) < 4:
        return few
    return many if min(numbers) >= 4 else f"up to 3 seeds: {few};\n4 and more: {many}"


def draw_line(axes, label: str, name: str, x, middle, low, high) -> None:
    """A curve with its band. Markers of curves that lie on each other are at different points, if there are many."""
    curve = CURVES[label]
    every = max(1, len(x) // 10)
    style = {"color": curve.color, "linestyle": curve.line, "marker": curve.marker, "fillstyle": "none"}
    style |= {"markevery": (list(CURVES).index(label) % every, every), "label": name}
    axes.plot(x, middle, **style)
    axes.fill_between(x, low, high, color=curve.color, alpha=0.12, linewidth=0)


def plural(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds > 1)}"


def save(figure: Figure, path: Path) -> None:
    """With a legend that names each curve of all panels once."""
    handles = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    columns = 4 if figure.get_figwidth() > 10 else 3
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


def draw_adaptation(axes, env: str, found: dict[str, np.ndarray], counts_seeds: bool = True) -> None:
    """Returns over 0 to 10 steps of adaptation; the axes hold all of every curve. The oracle does not adapt."""
    for label, returns in found.items():
        if not steps_shown(label):
            returns = np.repeat(returns[:, :1], STEPS + 1, axis=1)
        name = CURVES[label].name + (f" ({plural(len(returns))})" if counts_seeds else "")
        estimates = [estimate(returns[:, k]) for k in range(STEPS + 1)]
        middle = np.array([x.value for x in estimates])
        low = np.array([x.value if x.low is None else x.low for x in estimates])
        high = np.array([x.value if x.high is None else x.high for x in estimates])
        draw_line(axes, label, name, range(STEPS + 1), middle, low, high)
    axes.set(xlabel="gradient steps at test time", ylabel=f"return, {TESTS[env]}", title=env)


def draw(options: Options) -> None:
    """Pictures of each environment: over env_steps and seconds, and over steps of adaptation; of these one of all."""
    curves = kept_curves(options)
    for env, found in curves.items():
        for picture in dict.fromkeys(picture for curve in CURVES.values() for picture in curve.pictures):
            labels = [label for label in found if picture in CURVES[label].pictures]
            draw_training(env, picture, {label: found[label] for label in labels})
    returns = {env: found for env in curves if (found := adaptation(env, options))}
    for env, found in returns.items():
        axes = (figure := Figure(figsize=(8, 6), layout="constrained")).subplots()
        draw_adaptation(axes, env, found)
        save(titled(figure), IMAGES / f"adaptation_{env}.png")
    if len(returns) > 1:
        columns = 2 if len(returns) in (2, 4) else 3
        rows = -(-len(returns) // columns)
        figure = Figure(figsize=(5 * columns, 4 * rows + 1.2), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (env, found) in zip(panels, returns.items(), strict=False):
            draw_adaptation(axes, env, found, counts_seeds=False)
        for axes in panels[len(returns) :]:
            axes.remove()
        save(titled(figure), IMAGES / "adaptation.png")


def titled(figure: Figure) -> Figure:
    figure.suptitle(
        "interquartile mean over seeds and test tasks, band: its 95 % bootstrap interval", fontsize="medium"
    )
    return figure


def draw_training(env: str, picture: str, curves: Curves) -> None:
    """One picture; none where all its curves are there for comparison with others that are missing."""
    if not any(CURVES[label].pictures[0] == picture for label in curves):
        return
    panels = (figure := Figure(figsize=(11, 6), layout="constrained")).subplots(1, 2, sharey=True)
    for axes, what in zip(panels, ("env_steps", "seconds"), strict=True):
        for label, runs in curves.items():
            curve = CURVES[label]
            x, values = together(list(runs.values()), what, curve.after)
            name = f"{curve.training or curve.name} ({plural(len(runs))})"
            draw_line(axes, label, name, x, *over_seeds(values))
        ends = [rows[-1][what] for runs in curves.values() for rows in runs.values()]
        axes.set(xlabel=what, xscale="log" if max(ends) > 20 * min(ends) else "linear")
    panels[0].set(ylabel=f"return after adaptation, {TESTS[env]}")
    figure.suptitle(f"{env}: {told([len(runs) for runs in curves.values()])}", fontsize="medium")
    save(figure, IMAGES / f"{picture}_{env}.png")


# ---------------------------------------------------------------- tables


class Line(NamedTuple):
    """A row of the table: returns [S, M] after 0, 1, .. steps."""

    label: str
    returns: list[np.ndarray]


def steps_shown(label: str) -> int:
    return 0 if label == "oracle" else SWEPT  # it knows the task


def lines_of(env: str, curves: Curves, options: Options) -> list[Line]:
    """Returns of each label; of fine-tuning each with the step size that is best for so many steps."""
    found = []
    for label, returns in adaptation(env, options).items():
        numbers = range(steps_shown(label) + 1)
        if label in TUNED:
            found.append(Line(label, [tuned(env, label, k, options) for k in numbers]))
        else:
            check_checkpoints(env, label, curves.get(label, {}))
            found.append(Line(label, [returns[:, k] for k in numbers]))
    return found


def check_checkpoints(env: str, label: str, runs: dict[int, list[dict]]) -> None:
    """SystemExit where the returns of `adapt` are not of the run that is kept."""
    checkpoints = read_result("adapt", env)["checkpoints"][label]
    for seed, rows in runs.items():
        steps = checkpoints.get(str(seed), rows[-1])["env_steps"]
        if steps != rows[-1]["env_steps"]:
            raise SystemExit(f"{env} {label} seed {seed}: adapt_{env}.json is of {steps} env steps; adapt it again")


def table(options: Options) -> None:
    """Markdown: returns at the end of training, paired differences, and sustained crossings."""
    for env, curves in kept_curves(options).items():
        lines = lines_of(env, curves, options)
        for label in curves:
            if label not in [line.label for line in lines]:
                print(f"{env} {label}: `adapt` has no returns of it", file=sys.stderr)
        untrained = [iqm(line.returns[0]) for line in lines if line.label == RANDOM]
        base = 0.0
        if env in BELOW_ZERO:
            base = float(untrained[0]) if untrained else None
        parts = [list(shown_returns(env, lines, curves, base))]
        parts += [list(shown_differences(env, lines))]
        parts += [list(shown_crossings(env, curves, base))]
        for part in parts:
            if part:
                print("", *part, sep="\n")


def shown_returns(env: str, lines: list[Line], curves: Curves, base: float | None) -> Iterator[str]:
    """The table of returns: interquartile means over seeds and distinct test tasks, and 95 % bootstrap intervals."""
    if not lines:
        return
    last = {line.label: float(iqm(line.returns[-1])) for line in lines}
    horizon = read_result("adapt", env)["horizon"]
    share = "share of the oracle"
    if env in BELOW_ZERO and base is not None:
        share += f", (x - r) / (o - r), r = {base:.4g} untrained"
    head = [env, "seeds", "env steps", "seconds", *map(str, range(SWEPT + 1)), "last, per step", share]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for label, returns in lines:
        ends = [rows[-1] for rows in curves.get(label, {}).values()]
        cells = [CURVES[label].name, str(len(returns[0]))]
        cells += [f"{np.mean([row[what] for row in ends]):,.0f}" if ends else "" for what in ("env_steps", "seconds")]
        cells += [str(estimate(values)) for values in returns] + [""] * (SWEPT + 1 - len(returns))
        cells.append(f"{last[label] / horizon:.3g}")
        has_share = "oracle" in last and base is not None
        cells.append(f"{(last[label] - base) / (last['oracle'] - base):.0%}" if has_share else "")
        yield f"| {' | '.join(cells)} |"
    told = []
    for label in (line.label for line in lines if line.label in TUNED):
        choices = [swept(env, label, k) for k in range(1, SWEPT + 1)]
        shown = ", ".join(f"{choice['inner_lr']:g} {choice['later']}" for choice in choices)
        told.append(f"{CURVES[label].name} {shown}")
    if told:
        note = f"alpha and later steps, best for 1 / .. / {SWEPT} steps: {'; '.join(told)}; {NOTE}."
        yield "\n" + textwrap.fill(note, 118, break_on_hyphens=False)


def shown_differences(env: str, lines: list[Line]) -> Iterator[str]:
    """The table of paired differences; fine-tuning with the step size that is best for so many steps."""
    returns = {line.label: line.returns for line in lines}
    pairs = [(first, second) for first, second in PAIRS if first in returns and second in returns]
    if not pairs:
        return
    yield f"| {env}: difference, paired by test task | after 1 step | after {SWEPT} steps |"
    yield "|---|---|---|"
    for first, second in pairs:
        cells = [str(difference(returns[first][k], returns[second][k])) for k in (1, SWEPT)]
        yield f"| {CURVES[first].name} - {CURVES[second].name} | {' | '.join(cells)} |"


def shown_crossings(env: str, curves: Curves, base: float | None) -> Iterator[str]:
    """The table of env steps from which on the return in evaluations stays at or above shares of MAML's last one."""
    if "maml" not in curves or base is None:
        return
    after = CURVES["maml"].after
    goal = float(iqm([[rows[-1][after]] for rows in curves["maml"].values()]))
    levels = [base + share * (goal - base) for share in SHARES]
    of = f"of MAML's way from {base:.4g} to {goal:.4g}" if env in BELOW_ZERO else f"of MAML's {goal:.4g}"
    heads = [f"{share:.0%} {of}: {level:.4g}" for share, level in zip(SHARES, levels, strict=True)]
    yield f"| {env}: env steps from which on the return stays at or above | {' | '.join(heads)} |"
    yield "|---" * (1 + len(levels)) + "|"
    for label, runs in curves.items():
        name = CURVES[label].training or CURVES[label].name
        yield f"| {name} | {' | '.join(crossing(label, runs, level) for level in levels)} |"


def crossing(label: str, runs: dict[int, list[dict]], level: float) -> str:
    """The median over seeds, of which those that end below count as infinite, and how many do not."""
    after = CURVES[label].after
    since = [sustained([(row["env_steps"], row[after]) for row in rows], level) for rows in runs.values()]
    median = np.median(since)
    steps = f"{median:,.0f}" if np.isfinite(median) else "-"
    return f"{steps} ({np.isfinite(since).sum()} of {len(since)})"


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    what = {"run": run, "keep": keep, "sweep": sweep, "adapt": adapt, "draw": draw, "table": table}
    what[options.what](options)


if __name__ == "__main__":
    main()
