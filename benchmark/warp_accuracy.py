"""How far mujoco_warp's physics (float32) are from mujoco.rollout's (float64), and how fast, family by family.

    python benchmark/warp_accuracy.py                      a JSON line for each body, added to results/warp.jsonl
    python benchmark/warp_accuracy.py --cuda --worlds 800  on a GPU

Random actions, 20 control steps. `one_step`: error of a single step from MuJoCo's own states, relative to 1 + |x|, the
worst coordinate of each world. `episode`: absolute error of the observation when both go their own way. `rounded`:
likewise for MuJoCo itself with its states rounded to float32 after every step, which is what chaos alone makes of
rounding. Rates are control steps per second of physics, observation and reward, warp beside MuJoCo.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mujoco_warp
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from envs import HORIZONS  # noqa: E402
from envs.locomotion import MujocoTaskVectorEnv  # noqa: E402

STEPS = 20


@dataclass
class Options:
    worlds: int = 64
    """of each seed"""
    seeds: int = 3
    """batches of worlds"""
    cuda: bool = False
    """warp on the GPU"""
    out: str = str(ROOT / "benchmark/results/warp.jsonl")
    """file that a line is added to for each body"""


def bodies() -> list[type]:
    """One family for each body and observation."""
    found = {}
    for family in HORIZONS:
        if issubclass(family, MujocoTaskVectorEnv):
            found.setdefault((family.model_file, family._observe, family.own_bodies), family)
    return list(found.values())


def quantiles(x: torch.Tensor) -> dict[str, float]:
    return {name: float(f"{x.quantile(q):.2g}") for name, q in {"median": 0.5, "p90": 0.9, "max": 1.0}.items()}


def play(family: type, options: Options) -> dict:
    """The figures of one family."""
    device = "cuda" if options.cuda else "cpu"
    double, warp = {"dtype": torch.float64}, {"physics": "warp", "device": device}
    exact, step_by_step, free, rounded = (family(options.worlds, **kind) for kind in (double, warp, warp, double))
    errors, seconds = {"one_step": [], "episode": [], "rounded": []}, {"mujoco": [], "warp": []}
    ended = mismatched = 0
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        tasks = exact.sample_tasks(options.worlds, generator)
        for worlds in (exact, step_by_step, free, rounded):
            worlds.reset(seed=seed, options={"tasks": tasks.to(worlds.device, worlds.dtype)})
        low, high = (torch.as_tensor(x) for x in (exact.single_action_space.low, exact.single_action_space.high))
        for _ in range(STEPS):
            action = low + (high - low) * torch.rand(options.worlds, len(low), generator=generator)
            alive = exact._alive.clone()
            step_by_step._state = exact._state.to(device, torch.float32)
            step_by_step._alive, step_by_step._over = exact._alive.to(device), exact._over.to(device)
            rounded._state = rounded._state.float().double()
            terminated = {}
            for name, worlds in {"mujoco": exact, "warp": free}.items():
                since = time.perf_counter()
                terminated[name] = worlds.step(action)[2].cpu()  # which waits for the device
                seconds[name].append(time.perf_counter() - since)
            mismatched += int((terminated["mujoco"] != terminated["warp"]).sum())
            step_by_step.step(action)
            rounded.step(action)
            error = (step_by_step._state.cpu() - exact._state).abs() / (1 + exact._state.abs())
            errors["one_step"].append(error.amax(1)[alive])
        both = exact._alive & free._alive.cpu() & rounded._alive
        for name, worlds in {"episode": free, "rounded": rounded}.items():
            errors[name].append((worlds._obs.cpu() - exact._obs).abs().amax(1)[both])
        ended += int((~exact._alive).sum())
    rates = {
        f"{name}_steps_per_s": round(options.worlds / torch.tensor(x).median().item()) for name, x in seconds.items()
    }
    ends = {"worlds_that_ended": ended, "steps_where_ends_differ": mismatched}
    return {name: quantiles(torch.cat(x)) for name, x in errors.items()} | rates | ends


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    for family in bodies():
        about = {"family": family.__name__, "worlds": options.worlds, "seeds": options.seeds, "cuda": options.cuda}
        versions = {"torch": torch.__version__, "mujoco_warp": mujoco_warp.__version__}
        line = json.dumps(about | play(family, options) | versions)
        print(line, flush=True)
        with open(options.out, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
