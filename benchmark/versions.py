"""MAML-TRPO's update as it is beside what it was at another commit, each in processes of its own, in turns.

    OMP_NUM_THREADS=1 python benchmark/versions.py 56f73df          one thread: processor time
    python benchmark/versions.py 56f73df                            all cores

The same batches for both (HalfCheetahDir, 40 tasks x 20 episodes x 100 steps, drawn from a seed and adapted to once by
either version), with the settings of memory and products that a run of that version makes. One line of JSON a process,
then one with the medians over the turns, and the lowest and highest ratio of a turn.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import json, os, sys, time
os.environ.setdefault("GOMP_SPINCOUNT", "1000") if os.path.exists("envs/processor.py") else None
sys.path.insert(0, os.getcwd())
import torch
import envs as task_envs
from algos import maml_trpo
if os.path.exists("envs/processor.py"):
    from envs import processor
    processor.keep_memory()
    processor.multiply_by_onednn()
args = maml_trpo.Args(hidden_size=int(sys.argv[1]))
worlds = args.meta_batch_size * args.episodes_per_task
envs = task_envs.make(args.env_id, worlds, args.horizon, False, args.action_scale)
generator = torch.Generator().manual_seed(0)
theta = maml_trpo.init_policy(envs, args.hidden_size, generator)
tasks = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")
support = maml_trpo.collect(envs, tasks, theta, args, generator)
query = maml_trpo.collect(envs, tasks, maml_trpo.adapt(theta, support, args), args, generator)
times = []
for _ in range(int(sys.argv[2]) + 1):
    wall, cpu = time.perf_counter(), time.process_time()
    _, stats = maml_trpo.trpo_step(theta, maml_trpo.surrogate, [support], query, args)
    times.append((time.perf_counter() - wall, time.process_time() - cpu))
wall, cpu = (sorted(x)[len(x) // 2] for x in zip(*times[1:]))
print(json.dumps({"update_s": wall, "update_cpu_s": cpu, "threads": torch.get_num_threads()} | stats))
"""


@dataclass
class Options:
    commit: tyro.conf.Positional[str]
    """the other version"""
    hidden_size: int = 64
    """units of each of the policy's two layers"""
    updates: int = 5
    """timed updates of a process, of which the median counts, after one that warms up"""
    turns: int = 3
    """processes of each version"""


def measure(folder: Path, options: Options) -> dict:
    """The update of the version in this folder."""
    command = [sys.executable, "-c", WORK, str(options.hidden_size), str(options.updates)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    records = {"then": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", options.commit, "algos", "envs"], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        for _ in range(options.turns):
            for version, place in (("then", Path(folder)), ("now", ROOT)):
                record = measure(place, options)
                records[version].append(record)
                print(json.dumps({"version": version} | record), flush=True)
    ratios = [now["update_cpu_s"] / then["update_cpu_s"] for then, now in zip(*records.values(), strict=True)]
    summary = {
        f"{version}_{name}": median(record[name] for record in records[version])
        for version in records
        for name in ("update_s", "update_cpu_s")
    }
    summary |= {"cpu_ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    summary |= {"commit": options.commit, "load_at_end": os.getloadavg()[0]}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
