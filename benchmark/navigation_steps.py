"""What later inner steps of MAML-TRPO bring on Navigation2D, by their step size and without exploration noise.

    python benchmark/navigation_steps.py runs/curves/Navigation2D/maml/*/runs/*       a line for each schedule of alpha

Adapts trained policies to the fixed test goals with other step sizes after the first inner step, and plays each adapted
policy twice: as it samples its actions, and by its means, which shows what the exploration noise costs. As in the
paper's tests, each goal is played 40 times in a step. Means over seeds, with 95 % intervals by Student's t.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import maml_trpo  # noqa: E402
from benchmark.curves import TEST_SIZES, origin  # noqa: E402
from benchmark.rl2 import load  # noqa: E402
from benchmark.seeds import interval  # noqa: E402
from envs import make  # noqa: E402

RESULT = ROOT / "benchmark/results/curves/navigation_steps.json"
SCHEDULES = {"as in training": (1, 1, 1), "halved (paper)": (1, 0.5, 0.5), "a quarter, a tenth": (1, 0.25, 0.1)}


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of maml_trpo.py, one for each seed"""


def returns(folder: Path, scales: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """Mean returns after 0, 1, .. inner steps of alpha times `scales`: of sampled actions, and of the means."""
    module, args, state = load(folder)
    if module is not maml_trpo:
        raise SystemExit(f"{folder}: a run of {module.__name__}, not of maml_trpo")
    args = replace(args, **TEST_SIZES["Navigation2D"])
    envs = make(args.env_id, args.meta_batch_size * args.episodes_per_task, args.horizon, False, args.action_scale)
    tasks, generator = envs.unwrapped.test_set(args.meta_batch_size)
    params = state["theta"]
    sampled = []
    means = []
    for k in range(len(scales) + 1):
        batch = maml_trpo.collect(envs, tasks, params, args, generator)
        still = maml_trpo.collect(envs, tasks, without_noise(params), args, generator)
        sampled.append(float(batch.reward.sum(-1).mean()))
        means.append(float(still.reward.sum(-1).mean()))
        params = maml_trpo.adapt(params, batch, args, scales[k]) if k < len(scales) else params
    return sampled, means


def without_noise(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same policies with a standard deviation of 1e-6, the least they can have."""
    return params | {"log_std": torch.full_like(params["log_std"], -20.0)}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    command = "python benchmark/navigation_steps.py runs/curves/Navigation2D/maml/*/runs/*"
    spreads = [float(load(folder)[2]["theta"]["log_std"].exp().mean()) for folder in options.runs]
    result = origin(command) | {"tests": "fixed", "standard_deviations": spreads, "schedules": {}}
    for name, scales in SCHEDULES.items():
        both = [returns(folder, scales) for folder in options.runs]
        shown = {}
        for what, rows in zip(("sampled", "means"), zip(*both, strict=True), strict=True):
            mean, half = interval(rows)
            shown[what] = {"mean": [round(float(x), 2) for x in mean]}
            shown[what] |= {} if half is None else {"half_of_95": [round(float(x), 2) for x in half]}
        result["schedules"][name] = shown
        print(json.dumps({name: shown}), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
