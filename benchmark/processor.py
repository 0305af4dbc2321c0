"""What the settings of envs/processor.py and GOMP_SPINCOUNT are worth on this machine; one line of JSON a measurement.

    OMP_NUM_THREADS=1 python benchmark/processor.py products       matrix products by MKL and by oneDNN
    python benchmark/processor.py waiting                          threads that wait: alone, and of two runs at once

The tables made of it are in docs/speed.md. `products`: milliseconds of a product in single precision, and its error
relative to double precision. `waiting`: seconds of MAML-TRPO's update (40 tasks x 20 episodes x 100 steps) and
microseconds of a small operation, the least of several, by all cores, in processes of their own.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from envs import processor  # noqa: E402

SHAPES = (  # of the factors
    ((80_000, 64), (64, 64)), ((40, 2000, 64), (40, 64, 64)), ((800, 64), (64, 64)), ((16, 256, 128), (16, 128, 128)),
    ((400, 64), (64, 64)), ((20, 64), (64, 192)), ((25, 10, 40), (25, 40, 40)),
)  # fmt: skip
WAITING = {"default": {}, "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}}
WAITING |= {f"GOMP_SPINCOUNT={turns}": {"GOMP_SPINCOUNT": str(turns)} for turns in (1_000, 10_000)}


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["products", "waiting", "work"]]
    """what to measure; "work" is one process of "waiting" """
    repeats: int = 5
    """timed calls, of which the quickest counts"""


def quickest(function, repeats: int) -> float:
    """Seconds."""
    times = []
    for _ in range(repeats):
        since = time.perf_counter()
        function()
        times.append(time.perf_counter() - since)
    return min(times)


def products(options: Options) -> None:
    settings = torch.backends.mkldnn.matmul
    for left, right in SHAPES:
        x, y = torch.randn(left), torch.randn(right)
        exact = x.double() @ y.double()
        record = {"left": left, "right": right}
        for name in ("mkl", "onednn"):
            settings.fp32_precision = "none"
            if name == "onednn" and not processor.multiply_by_onednn():
                continue  # it would round to bfloat16 here
            calls = max(1, 2_000_000 // exact.numel())
            seconds = quickest(lambda x=x, y=y, calls=calls: [x @ y for _ in range(calls)], 4 * options.repeats) / calls
            record[f"{name}_ms"] = float(f"{1e3 * seconds:.3g}")
            record[f"{name}_error"] = float(f"{((x @ y - exact).norm() / exact.norm()).item():.2g}")
        print(json.dumps(record), flush=True)


def work(options: Options) -> None:
    """One process: the update, and a product of 40,000 numbers by one."""
    import envs as task_envs
    from algos import maml_trpo

    processor.keep_memory()
    processor.multiply_by_onednn()
    args = maml_trpo.Args()
    envs = task_envs.make(args.env_id, args.meta_batch_size * args.episodes_per_task, args.horizon)
    generator = torch.Generator().manual_seed(0)
    theta = maml_trpo.init_policy(envs, args.hidden_size, generator)
    tasks = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")
    support = maml_trpo.collect(envs, tasks, theta, args, generator)
    query = maml_trpo.collect(envs, tasks, maml_trpo.adapt(theta, support, args), args, generator)
    print("ready", flush=True)
    sys.stdin.readline()  # so that two begin together
    update = quickest(lambda: maml_trpo.trpo_step(theta, maml_trpo.surrogate, [support], query, args), options.repeats)
    x = torch.randn(40_000)
    small = quickest(lambda: [x * 1.0001 for _ in range(1000)], 4 * options.repeats) / 1000
    print(json.dumps({"update_s": round(update, 3), "small_operation_us": round(1e6 * small, 1)}), flush=True)


def waiting(options: Options) -> None:
    outside = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for name, settings in WAITING.items():
        for count in (1, 2):
            command = [sys.executable, __file__, "work", "--repeats", str(options.repeats)]
            runs = [
                subprocess.Popen(command, env=outside | settings, stdin=-1, stdout=-1, text=True) for _ in range(count)
            ]
            for run in runs:
                assert run.stdout.readline() == "ready\n"
            for run in runs:
                run.stdin.write("go\n")
                run.stdin.flush()
            found = [json.loads(run.communicate()[0]) for run in runs]
            slowest = {key: max(record[key] for record in found) for key in found[0]}
            print(json.dumps({"waiting": name, "at_once": count} | slowest), flush=True)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    {"products": products, "waiting": waiting, "work": work}[options.what](options)


if __name__ == "__main__":
    main()
