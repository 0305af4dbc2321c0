"""What becomes of runs that are killed, stopped or watched: figures for docs/reliability.md.

    python benchmark/reliability.py kill --kills 50      kill -9 at random moments, then a comparison with a whole run
    python benchmark/reliability.py stop                 at each file's defaults: the first line; Ctrl-C to the end
    python benchmark/reliability.py tests                what drawing test tasks by a seed does to one policy's return

Each result is a line of benchmark/results/reliability.jsonl. Run it on a machine that does nothing else.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark/results/reliability.jsonl"
sys.path.insert(0, str(ROOT))

from algos import maml_trpo  # noqa: E402
from envs import make  # noqa: E402
from tests.test_runs import FLAGS  # noqa: E402, the small settings of every file

FILES = tuple(FLAGS)


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["kill", "stop", "tests"]]
    """what to measure"""
    files: tuple[str, ...] = field(default=())
    """algorithms; kill: three by default, stop: all"""
    kills: int = 50
    """of each file"""
    iterations: int = 150
    """of the runs that are killed"""
    seed: int = 1
    """of the moments"""


def command(name: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / f"algos/{name}.py"), *flags]


def only_folder() -> Path | None:
    """The run's folder here, if it has begun."""
    found = sorted(Path().glob("runs/*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def contents(folder: Path) -> tuple[list[dict], dict]:
    """A run's metrics without the clock, and its checkpoint without clock and flags."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: x for key, x in row.items() if key != "seconds"} for row in rows]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return rows, {key: x for key, x in state.items() if key not in ("seconds", "args", "keys")}


def equal(one, other) -> bool:
    """Whether nested dicts and lists hold the same bits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(x, other[key]) for key, x in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(x, y) for x, y in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def killed(name: str, options: Options) -> dict:
    """Kill and resume a run until it has been killed often enough, let it end, and compare."""
    flags = [*FLAGS[name][0], "--iterations", str(options.iterations)]
    flags += ["--eval-every", "5"] if name != "mbmpo" else []
    chance = random.Random(options.seed)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.time()
    subprocess.run(command(name, *flags), check=True, **quiet)
    whole = time.time() - start
    expected = contents(only_folder())
    home = Path.cwd()
    found = {"kills": 0, "ends": 0, "before_a_checkpoint": 0}
    unequal = 0
    while found["kills"] < options.kills:
        os.chdir(tempfile.mkdtemp(dir=home))  # another run, from its beginning
        folder, process = None, None
        while found["kills"] < options.kills:
            going = folder is not None and (folder / "checkpoint.pt").exists()
            found["before_a_checkpoint"] += folder is not None and not going
            process = subprocess.Popen(command(name, *(["--resume", str(folder)] if going else flags)), **quiet)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(whole * (0.3 + 0.7 * chance.random()))  # while it starts, plays, saves or ends
            if process.poll() is None:
                process.kill()
                found["kills"] += 1
            process.wait()
            folder = only_folder()
            if process.returncode == 0:
                found["ends"] += 1
                break
        if folder is not None and (folder / "checkpoint.pt").exists():
            subprocess.run(command(name, "--resume", str(folder)), check=True, **quiet)
            unequal += not equal(contents(folder), expected)
    return found | {"runs_that_differ": unequal}


def stopped(name: str) -> dict:
    """At the file's defaults: seconds to the first line, and from Ctrl-C to the end, in training."""
    start = time.time()
    with open("log", "wb") as log:
        process = subprocess.Popen(command(name), stdout=log, stderr=subprocess.STDOUT)
    while not Path("log").stat().st_size:
        time.sleep(0.01)
    first = time.time() - start
    time.sleep(25)
    start = time.time()
    process.send_signal(signal.SIGINT)
    code = process.wait()
    end = time.time() - start
    lines = Path("log").read_text().splitlines()
    doing = next((line for line in reversed(lines) if "iterations," in line), "")
    folder = only_folder()
    resumed = subprocess.Popen(command(name, "--resume", str(folder)), stderr=subprocess.PIPE, text=True)
    goes_on = any("goes on after" in resumed.stderr.readline() or k > 3 for k in range(5))
    resumed.kill()
    resumed.communicate()
    told = {"first_line_s": round(first, 2), "ctrl_c_to_end_s": round(end, 2), "exit_status": code}
    return told | {"doing": doing, "goes_on": goes_on, "log_bytes": Path("log").stat().st_size}


def keep(row: dict) -> None:
    """Print a result, and add it to the others."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    row |= {"cpus": os.cpu_count(), "torch": torch.__version__, "commit": commit.stdout.strip()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def drawn_tests() -> dict:
    """Mean return of one untrained policy on 40 test tasks of HalfCheetahVel, drawn by ten seeds, and fixed."""
    args = maml_trpo.Args(env_id="HalfCheetahVel-v0", episodes_per_task=5)
    envs = make(args.env_id, 40 * args.episodes_per_task, args.horizon, action_scale=args.action_scale)
    theta = maml_trpo.init_policy(envs, args.hidden_size, torch.Generator().manual_seed(1))

    def mean_return(tasks_NP: torch.Tensor, generator: torch.Generator) -> float:
        played = maml_trpo.rollout(envs, tasks_NP, theta, args, generator)
        return round(float(played["reward"].sum(-1).mean()), 2)

    drawn = []
    for seed in range(1, 11):
        generator = torch.Generator().manual_seed(seed + 1)
        drawn.append(mean_return(envs.unwrapped.sample_tasks(40, generator, "test"), generator))
    fixed = [mean_return(*envs.unwrapped.test_set(40)) for _ in range(2)]
    return {"by_seed": drawn, "fixed": fixed}


def main() -> None:
    options = tyro.cli(Options)
    if options.what == "tests":
        keep({"what": "tests", "file": "maml_trpo"} | drawn_tests())
        return
    names = options.files or (("maml_trpo", "rl2_ppo", "pearl_sac") if options.what == "kill" else FILES)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            figures = killed(name, options) if options.what == "kill" else stopped(name)
        keep({"what": options.what, "file": name} | figures)


if __name__ == "__main__":
    main()
