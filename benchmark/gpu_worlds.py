"""Control steps per second against the number of worlds, by warp and by MuJoCo on the CPU's threads.

    python benchmark/gpu_worlds.py run --cuda --env-id HalfCheetahDir-v0 --physics warp       (mujoco: likewise)
    python benchmark/gpu_worlds.py table                                     both, and what `auto` should choose

`run` plays episodes of `--horizon` steps with actions of a standard normal policy, which lie on the run's device
already, and times them from the reset's end to the last reward: physics, observation, reward, and with `mujoco` on a
GPU the copies to the host and back, as `--cuda --physics mujoco` has them in training. All worlds play to the end (of
ants, AntGoal's do). A line of JSON for each number of worlds the moment it is measured: steps of all worlds per second,
the median over episodes; start_s is what it takes to make the worlds and to play two steps, which the first time waits
for warp's compiler. Numbers that fail, for want of memory say, are lines with an error.
"""

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import mujoco
import torch
import tyro
from torch import Generator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from envs import make  # noqa: E402
from envs.locomotion import available_cpus  # noqa: E402


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["run", "table"]]
    """what to do"""
    env_id: str = "HalfCheetahDir-v0"
    """a family that MuJoCo moves"""
    physics: Literal["warp", "mujoco"] = "mujoco"
    """what moves them"""
    worlds: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536)
    """numbers of worlds"""
    horizon: int = 50
    """steps of an episode"""
    seconds: float = 1.0
    """episodes are played until they have taken this long, at least one"""
    cuda: bool = False
    """on the GPU"""
    results: Path = ROOT / "benchmark/results/gpu/worlds.jsonl"
    """where measured points are appended, and what the table is made of"""


def clock(options: Options) -> float:
    if options.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(options: Options, worlds: int) -> dict:
    """What is measured with this number of worlds."""
    since, generator = clock(options), Generator().manual_seed(0)
    envs = make(options.env_id, worlds, options.horizon, options.cuda, physics=options.physics)
    shape = options.horizon, worlds, *envs.single_action_space.shape
    action_TBA = torch.randn(shape, generator=generator).to(envs.unwrapped.device)
    tasks = {"tasks": envs.unwrapped.sample_tasks(worlds, generator)}
    envs.reset(seed=0, options=tasks)
    for action_BA in action_TBA[:2]:
        envs.step(action_BA)
    start_s, times = clock(options) - since, []
    while not times or sum(times) < options.seconds:
        envs.reset(seed=0, options=tasks)
        since = clock(options)
        for action_BA in action_TBA:
            envs.step(action_BA)
        times.append(clock(options) - since)
    rates = [options.horizon * worlds / seconds for seconds in times]
    result = {"steps_per_s": median(rates), "lowest": min(rates), "highest": max(rates), "start_s": start_s}
    return {"episodes": len(times)} | {name: float(f"{value:.5g}") for name, value in result.items()}


def run(options: Options) -> int:
    """Measure all numbers of worlds; how many failed."""
    failed = 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for worlds in options.worlds:
        record = {"env_id": options.env_id, "physics": options.physics, "worlds": worlds, "horizon": options.horizon}
        try:
            record |= measure(options, worlds)
        except (RuntimeError, MemoryError, FloatingPointError) as error:  # the next number may do
            record |= {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            failed += 1
        record |= {"device": torch.cuda.get_device_name() if options.cuda else platform.machine()}
        record |= {"cpus": available_cpus(), "load": round(os.getloadavg()[0], 2), "cuda": options.cuda}
        record |= {"versions": {"torch": torch.__version__, "mujoco": mujoco.__version__}}
        with open(options.results, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{options.env_id}, {options.physics}, {worlds} worlds:", told(record), flush=True)
    return failed


def told(record: dict) -> str:
    return record.get("error") or f"{record['steps_per_s']:,.0f} steps/s, start {record['start_s']:.1f} s"


# ---------------------------------------------------------------- both beside each other


def verdict(warp: dict[int, float], mujoco: dict[int, float]) -> str:
    """From which number of worlds on warp is faster, by steps per second at each number."""
    both = sorted(warp.keys() & mujoco.keys())
    if not both:
        return "no number of worlds was measured with both"
    faster = [n for n in both if all(warp[m] >= mujoco[m] for m in both if m >= n)]
    if not faster:
        return f"mujoco is faster at {both[-1]:,} worlds: `auto` should take mujoco up to there"
    if len(faster) == len(both):
        return f"warp is faster from {both[0]:,} worlds on: `auto` should take warp with --cuda, as it does"
    slower = both[len(both) - len(faster) - 1]
    return f"warp is faster from {faster[0]:,} worlds on, mujoco at {slower:,}: `auto` should switch between the two"


def table(options: Options) -> None:
    """Of points that were measured several times, the last."""
    records = [json.loads(line) for line in options.results.read_text().splitlines()]
    last = {(record["env_id"], record["physics"], record["worlds"]): record for record in records}
    print("| environment | worlds | warp, steps/s | mujoco, steps/s | warp / mujoco |\n|---|---|---|---|---|")
    verdicts = []
    for env_id in dict.fromkeys(record["env_id"] for record in records):
        rates = {"warp": {}, "mujoco": {}}
        for (family, physics, n), record in last.items():
            if family == env_id and "error" not in record:
                rates[physics][n] = record["steps_per_s"]
        for n in sorted({n for family, _, n in last if family == env_id}):
            values = [rates[physics].get(n) for physics in rates]
            cells = [f"{value:,.0f}" if value else "failed or left out" for value in values]
            ratio = f"{values[0] / values[1]:.2f}" if all(values) else ""
            print(f"| {env_id} | {n:,} | {' | '.join(cells)} | {ratio} |")
        verdicts.append(f"{env_id}: {verdict(*rates.values())}.")
    print("", *verdicts, sep="\n")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.what == "table":
        return table(options)
    if failed := run(options):
        raise SystemExit(f"{failed} numbers of worlds failed")


if __name__ == "__main__":
    main()
