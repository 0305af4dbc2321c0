"""Every algorithm's speed beside the same algorithm written the usual way: the table of docs/speed.md.

    python benchmark/speed_all.py run                  each command of RUNS once, into benchmark/results/speed_all.jsonl
    python benchmark/speed_all.py run --only promp     those that name promp
    python benchmark/speed_all.py table                the table, from the results

Each command is one of benchmark/speed.py, in a process of its own in which ours and the usual way take turns. Torch has
all cores in the rows of ALL_CORES, as by default, and one thread in the others, whose tensors are too small for more;
the physics always has all cores. Run again, it adds to the results; the table then has medians, and the lowest and
highest ratio. Ratios of processor time are the ones to trust where other work loads the machine.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.scaling import keep  # noqa: E402
from envs.locomotion import available_cpus  # noqa: E402

ALL_CORES = "maml_trpo", "promp", "reptile_ppo", "multitask_ppo"
FAMILY = "--peer --peer-tasks 10 --peer-iterations 3 --iterations 3"
CHEETAH = "--env-id HalfCheetahVel-v0 --episodes-per-trial 2 --horizon 100 --meta-batch-size 40"
CHEETAH += " --peer --peer-iterations 3"
RUNS = (
    "maml --iterations 200",
    "fomaml --iterations 200",
    "reptile --iterations 200",
    "protonet",
    "in_context --iterations 200",
    "learned_optimizer --iterations 10",
    f"maml_trpo {FAMILY}",
    f"promp {FAMILY}",
    f"reptile_ppo {FAMILY}",
    f"multitask_ppo {FAMILY}",
    "rl2_ppo --peer --peer-iterations 10",
    f"rl2_ppo {CHEETAH} --iterations 5",
    "rl2_transformer_ppo --peer --peer-iterations 5 --iterations 10",
    f"rl2_transformer_ppo {CHEETAH} --iterations 4",
    "pearl_sac --peer --peer-tasks 5",
    "mbmpo --iterations 5",
    "meta_critic --peer --peer-iterations 10",
    "lirpg --peer --peer-iterations 3 --iterations 3",
    "lifetime_rewards --peer --peer-tasks 32 --peer-iterations 5",
)


class Rate(NamedTuple):
    """What of a record says how fast an algorithm is."""

    ours: str
    peer: str
    ratio: str
    cpu_ratio: str
    unit: str


RATES = (
    Rate("updates_per_s", "peer_updates_per_s", "speedup_update", "cpu_speedup_update", "updates"),
    Rate("tasks_per_s", "loop_tasks_per_s", "speedup_over_loop", "cpu_speedup_over_loop", "tasks"),
    Rate("imagined_steps_per_s", "peer_imagined_steps_per_s", "speedup_end_to_end", "cpu_speedup_end_to_end", "steps"),
    Rate(
        "end_to_end_steps_per_s", "peer_end_to_end_steps_per_s", "speedup_end_to_end", "cpu_speedup_end_to_end", "steps"
    ),
)


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["run", "table"]]
    """what to do"""
    only: str = ""
    """a part of the commands that are to run; none: all"""
    limit: int = 600
    """seconds that a command may take"""
    results: Path = ROOT / "benchmark/results/speed_all.jsonl"
    """where the measurements are kept"""


def threads(command: str) -> int:
    """Torch's threads for a row."""
    return available_cpus() if command.split()[0] in ALL_CORES else 1


def run(options: Options) -> None:
    failed = 0
    for command in RUNS:
        if options.only in command:
            record = keep(["benchmark/speed.py", *command.split()], threads(command), options.limit, options.results)
            failed += not record
            print(command, {name: value for name, value in record.items() if "speedup" in name}, flush=True)
    if failed:
        raise SystemExit(f"{failed} commands failed")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(options: Options) -> None:
    found = defaultdict(list)
    for line in options.results.read_text().splitlines():
        record = json.loads(line)
        setting, command = record["command"].split(" python benchmark/speed.py ")
        if command in RUNS:  # others were measured before RUNS changed
            found[command, setting.removeprefix("OMP_NUM_THREADS=")].append(record)
    print("| `python benchmark/speed.py ..` | threads | ours, per s | the usual way | ratio | of processor time |")
    print("|---|---|---|---|---|---|")
    for (command, setting), records in sorted(found.items(), key=lambda item: RUNS.index(item[0][0])):
        rate = next(rate for rate in RATES if rate.ours in records[0])
        cells = [f"`{command}`", setting, f"{number(median(x[rate.ours] for x in records))} {rate.unit}"]
        cells.append(number(median(x[rate.peer] for x in records)) if rate.peer in records[0] else "none")
        for name in (rate.ratio, rate.cpu_ratio):
            values = [record[name] for record in records if name in record]
            text = f"{median(values):.2f}" if values else ""
            cells.append(text + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""))
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    {"run": run, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
