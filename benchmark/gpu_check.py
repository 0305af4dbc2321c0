"""Whether every file of algos/ computes on the GPU what it computes on the CPU: PASS or FAIL for each, at once.

    python benchmark/gpu_check.py --cuda                     all files at the same time, a process for each
    python benchmark/gpu_check.py --cuda --only promp        one of them
    python benchmark/gpu_check.py                            a rehearsal, of the CPU beside itself

Each file's process

1. runs it in single precision as its user does: an iteration, its evaluation and checkpoint, `--resume` from there for
   a second iteration, `--evaluate`;
2. makes the runs of tests/test_golden.py in double precision, with --cuda and without, and compares all numbers of
   metrics.jsonl but the seconds: two iterations, each with an evaluation.

They are equal to rounding, for random numbers come from generators on the CPU. One file draws on the device, PEARL in
its updates, and is made to draw on the CPU here. In double precision rounding is 1e-16, and two processors' runs agree
within 1e-6 (tests/test_golden.py); what differs by more than RELATIVE and ABSOLUTE fails. Bodies are moved by `mujoco`
here; what `mujoco_warp` does is checked by tests/test_warp.py. The case maml_trpo_warp is step 1 with it, where it is
installed, and on a new machine waits for its compiler.

Results: a line of JSON for each file the moment it is there, with the ends of tracebacks where something failed.
`largest` is the largest difference, as a part of what is allowed.
"""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RELATIVE, ABSOLUTE = 1e-5, 1e-8  # differences of two numbers up to this are rounding
WARP = "maml_trpo_warp"
WARP_FLAGS = "--env-id HalfCheetahDir-v0 --meta-batch-size 4 --episodes-per-task 2 --horizon 20 --hidden-size 8"


@dataclass
class Options:
    cuda: bool = False
    """on the GPU; without it the CPU is compared with itself"""
    only: tuple[str, ...] = ()
    """files of algos/, and maml_trpo_warp; none: all"""
    limit: int = 100
    """seconds that a file may take"""
    jobs: int = 0
    """files at the same time; 0: one for each core"""
    results: Path | None = None
    """where the lines of JSON are appended"""


# ---------------------------------------------------------------- one file, in a process of its own


class Same:
    """What two runs have in common: how many numbers, and the largest difference as a part of what is allowed."""

    def __init__(self):
        self.runs, self.numbers, self.largest = 0, 0, 0.0

    def compare(self, found: list[dict], expected: list[dict], flags: str) -> None:
        """AssertionError, with the name of the number, where lines of metrics differ by more than rounding."""
        self.runs += 1
        for row, wanted in zip(found, expected, strict=True):
            assert row.keys() == wanted.keys(), f"other names in metrics.jsonl: {sorted(row.keys() ^ wanted.keys())}"
            for name, value in wanted.items():
                part = abs(row[name] - value) / (RELATIVE * abs(value) + ABSOLUTE)
                self.numbers, self.largest = self.numbers + 1, max(self.largest, part)
                where = f"iteration {wanted['iteration']} of {flags}"
                assert part <= 1, f"{name} is {row[name]} and not {value} as on the CPU, in {where}"


def play(algorithm, flags: str, *more: str) -> Path:
    """The folder of a run, in the working directory."""
    iterations = [] if algorithm.__name__ == "algos.mbmpo" else ["--eval-every", "1"]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        algorithm.main([*flags.split(), *iterations, *more])
    return max(Path("runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the clock's seconds."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in lines]


def run_as_a_user(algorithm, flags: str, device: list[str]) -> None:
    """An iteration with evaluation and checkpoint, another one from there, and an evaluation alone."""
    folder = play(algorithm, flags, *device, "--iterations", "1")
    play(algorithm, "", *device, "--resume", str(folder), "--iterations", "2")
    found = rows(folder)
    assert [row["iteration"] for row in found] == [1, 2], f"iterations {[row['iteration'] for row in found]}"
    assert any(name.startswith("test/") for name in found[0]), "no evaluation in the first iteration"
    play(algorithm, "", *device, "--evaluate", str(folder))
    assert (folder / "evaluation.json").exists(), "--evaluate wrote no evaluation.json"


@contextlib.contextmanager
def double_precision():
    """Worlds, tasks and networks in double precision, all random numbers from the CPU, and few characters drawn."""
    import torch

    import envs
    from algos import pearl_sac
    from envs import SupervisedTasks, TaskVectorEnv, fewshot

    make_vec, init = partial(envs.gym.make_vec, dtype=torch.float64), SupervisedTasks.__init__
    choose, draw = TaskVectorEnv.choose, fewshot.draw_glyphs

    def supervised(self, device="cpu", _=None):
        init(self, device, torch.float64)

    def on_the_cpu(device="cpu"):
        return torch.Generator()

    def few(classes, *rest):
        return draw(40, *rest).repeat(-(-classes // 40), 1, 1, 1)[:classes]  # all of them would take ten seconds

    with (
        mock.patch.object(envs.gym, "make_vec", make_vec),
        mock.patch.object(SupervisedTasks, "__init__", supervised),
        mock.patch.object(fewshot, "draw_glyphs", few),
        mock.patch.object(pearl_sac, "Generator", on_the_cpu),
        mock.patch.object(TaskVectorEnv, "choose", lambda self, *given: choose(self, *given).to(self.device)),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def compare_with_the_cpu(algorithm, flags: str, device: list[str], same: Same) -> None:
    with double_precision():
        physics = ["--physics", "mujoco"] if hasattr(algorithm.Args, "physics") else []
        found, expected = (rows(play(algorithm, flags, *physics, "--iterations", "2", *on)) for on in (device, []))
        same.compare(found, expected, flags)


def one(name: str, device: list[str]) -> None:
    """Check a file, and print what was found as a line of JSON; what fails does not keep the rest from being tried."""
    import torch

    from tests.test_golden import RUNS

    since, same, failures = time.monotonic(), Same(), []
    on_gpu = device and torch.cuda.is_available()
    record = {"file": name, "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}
    torch.set_num_threads(1)

    def attempt(what: str, function, *given) -> None:
        try:
            function(*given)
        except BaseException as error:  # SystemExit, too: a flag that is refused
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append({"in": what, "error": told, "traceback": traceback.format_exc().splitlines()[-24:]})

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        algorithm = importlib.import_module(f"algos.{name.removesuffix('_warp')}")
        runs = RUNS.get(name, [])
        flags = runs[0] if runs else f"{WARP_FLAGS} --physics warp"
        attempt(f"a user's run, {flags}", run_as_a_user, algorithm, flags, device)
        record["user_s"] = round(time.monotonic() - since, 1)
        for flags in runs:
            attempt(f"the comparison, {flags}", compare_with_the_cpu, algorithm, flags, device, same)
    record |= {"passed": not failures, "failures": failures, "runs": same.runs, "numbers": same.numbers}
    record |= {"largest": float(f"{same.largest:.2g}"), "seconds": round(time.monotonic() - since, 1)}
    print(json.dumps(record))


# ---------------------------------------------------------------- all files


class Case:
    """A file's process. What it prints goes into files, so that it never waits for a reader."""

    def __init__(self, name: str, cuda: bool, folder: str):
        self.name, self.since = name, time.monotonic()
        self.printed = [Path(folder) / f"{name}.{kind}" for kind in ("out", "errors")]
        command = [sys.executable, str(Path(__file__).resolve()), "one", name, *(["--cuda"] if cuda else [])]
        env = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"} | os.environ
        with open(self.printed[0], "w") as out, open(self.printed[1], "w") as errors:
            self.process = subprocess.Popen(command, stdout=out, stderr=errors, env=env)

    def result(self, limit: float) -> dict | None:
        """What was found; None as long as it runs. It is killed at the limit."""
        seconds, status = round(time.monotonic() - self.since, 1), self.process.poll()
        if status is None and seconds < limit:
            return None
        self.process.kill()
        self.process.wait()
        lines, errors = (path.read_text(errors="replace").splitlines() for path in self.printed)
        if status == 0 and lines:
            return json.loads(lines[-1])
        error = f"exit status {status}: {''.join(errors[-1:])}" if status else f"ran into the limit of {limit} s"
        failure = {"in": "its process", "error": error, "traceback": errors[-24:]}
        return {"file": self.name, "passed": False, "failures": [failure], "seconds": seconds}


def told(record: dict) -> str:
    """A line for a reader."""
    about = f"{record['file']}, {record['seconds']} s"
    if not record["passed"]:
        first, *others = record["failures"]
        where = next((line.strip() for line in reversed(first["traceback"]) if line.startswith("  File ")), "")
        more = f" (and {len(others)} more)" if others else ""
        return f"FAIL {about}: {first['error']}{more}; {where} in {first['in']}"
    if not record["runs"]:
        return f"PASS {about}: it ran, and nothing was compared"
    numbers = f"{record['numbers']} numbers of {record['runs']} runs"
    return f"PASS {about}: {numbers}, the largest difference {record['largest']:.2g} of what is allowed"


def names() -> list[str]:
    """The cases, the slow ones first."""
    files = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
    files.sort(key=lambda name: name != "maml_trpo")
    return ([WARP] if find_spec("mujoco_warp") else []) + files


def check(options: Options) -> int:
    """Check all files; how many failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = options.jobs or len(os.sched_getaffinity(0))
    waiting, running, failed = list(options.only or names()), [], 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(Case(waiting.pop(0), options.cuda, folder))
                time.sleep(0.1)
                for case in list(running):
                    if (record := case.result(options.limit)) is not None:
                        running.remove(case)
                        failed += not record["passed"]
                        print(told(record), flush=True)
                        keep(record, options.results)
        finally:
            for case in running:
                case.process.kill()
    return failed


def keep(record: dict, results: Path | None) -> None:
    if results:
        with open(results, "a") as file:
            file.write(json.dumps(record) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(sys.argv[2], sys.argv[3:])
    import tyro

    options = tyro.cli(Options, description=__doc__)
    if failed := check(options):
        raise SystemExit(f"{failed} failed")


if __name__ == "__main__":
    main()
