"""The numbers and pictures of docs/lirpg.md: runs, what is kept of them, a table, curves, and a learned reward drawn.

python benchmark/lirpg.py cartpole --seeds 1 2 3 4 5         delayed CartPole, into runs/, and kept
python benchmark/lirpg.py mujoco --seeds 1 2 3               delayed HalfCheetah and Hopper: LIRPG and PPO, each also
                                                             with a live bonus; --minibatches 8, --minibatches 32 ..
python benchmark/lirpg.py grid --seeds 4                     four rooms with one goal; and its learned reward drawn
python benchmark/lirpg.py ablate --seeds 1 2 3               what each half of V_mix's mend does, on a point mass
python benchmark/lirpg.py ablate --env-id HopperForward-v0 --iterations 200 --variants both neither    ... on Hopper
python benchmark/lirpg.py keep runs/A runs/B ..              args and metrics of runs made by hand, into results/
python benchmark/lirpg.py table                              kept runs: mean returns at their ends
python benchmark/lirpg.py curves --env-id HopperForward-v0   kept runs: return over steps
python benchmark/lirpg.py reward runs/A                      the learned reward of a run in a grid world
"""

import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import lirpg  # noqa: E402
from benchmark.curves import common, interval  # noqa: E402
from benchmark.rl2 import load  # noqa: E402
from envs import make, records  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/lirpg"
PPO = ["--intrinsic-coef", "0", "--extrinsic-coef", "1"]
CHOICES = ["--entropy-coef", "0.01"]
POLE = ["--env-id", "CartPoleFixed-v0", "--horizon", "200", *CHOICES, "--iterations", "60", "--eval-every", "10"]
GRID = ["--env-id", "EmptyRooms-v0", "--horizon", "100", "--delay", "1", "--no-normalize", *CHOICES]
GRID += ["--iterations", "80", "--eval-every", "20"]
POINT = ["--env-id", "Navigation2D-v0", "--horizon", "20", "--delay", "10", "--rollout-steps", "40", "--lr", "1e-3"]
POINT += ["--iterations", "40", "--eval-every", "2"]
VARIANTS = ("both", "level", "ends", "neither")  # what V_mix has: a level; ends at time limits (V_ex, too)
BONUS = ["--live-bonus", "0.02"]
WAYS = {"lirpg": [], "lirpg_bonus": BONUS, "ppo": PPO, "bonus": [*PPO, *BONUS]}  # on MuJoCo
LABELS = {
    "lirpg": "LIRPG: the learned reward alone",
    "lirpg_bonus": "LIRPG: the learned reward and a live bonus",
    "both": "LIRPG: the learned and the delayed reward",
    "ppo": "PPO on the delayed reward",
    "bonus": "PPO on the delayed reward and a live bonus",
}


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["cartpole", "mujoco", "grid", "ablate", "keep", "table", "curves", "reward"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs"""
    seeds: tuple[int, ...] = (1,)
    """of the runs of `cartpole`, `mujoco`, `grid` and `ablate`"""
    env_id: str = ""
    """environment of `curves` (default HalfCheetahForward-v0) and `ablate` (default: a point mass)"""
    ways: tuple[Literal["lirpg", "lirpg_bonus", "ppo", "bonus"], ...] = ("lirpg", "lirpg_bonus", "ppo", "bonus")
    """of `mujoco`"""
    minibatches: int = 4
    """of the runs of `mujoco`; the paper's 32 are PPO's usual ones"""
    iterations: int = 150
    """of the runs of `mujoco`, and of `ablate` on MuJoCo, 2,048 steps each"""
    variants: tuple[Literal["both", "level", "ends", "neither"], ...] = VARIANTS
    """of `ablate`: which halves of the mend the value has"""
    reward_lr: float = 1e-3
    """of the runs of `ablate`"""


def make_run(flags: list[str]) -> Path:
    """A run by the script's own `main`, into runs/ of the working directory; its folder."""
    before = set(Path("runs").glob("*"))
    lirpg.main(flags)
    (folder,) = set(Path("runs").glob("*")) - before
    rows, _ = records.read_metrics(folder)
    if rows[-1]["iteration"] < records.last_flags(folder / "args.json")["iterations"]:
        raise SystemExit(f"{folder} was stopped, and is not kept")
    return folder


def cartpole(options: Options) -> None:
    keep(Options("keep", tuple(make_run([*POLE, "--seed", str(seed)]) for seed in options.seeds)))


def mujoco(options: Options) -> None:
    for seed in options.seeds:
        for env in ("HalfCheetah", "Hopper"):
            flags = ["--env-id", f"{env}Forward-v0", "--iterations", str(options.iterations), "--eval-every", "30"]
            flags += ["--minibatches", str(options.minibatches), "--seed", str(seed)]
            folders = [make_run([*flags, *WAYS[way]]) for way in options.ways]
            keep(Options("keep", tuple(folders)))


def grid(options: Options) -> None:
    folders = tuple(make_run([*GRID, "--seed", str(seed)]) for seed in options.seeds)
    keep(Options("keep", folders))
    reward(Options("reward", folders))


def prepare_as(variant: str):
    """lirpg's `prepare` without a level of V_mix, or with values that go on after a time limit, or both."""
    original = lirpg.prepare

    def prepare(stream, reward_NT, state, args):
        batch = original(stream, reward_NT, state, args)
        if variant in ("ends", "neither"):
            batch = batch._replace(level_weight=torch.zeros_like(batch.level_weight))
        if variant in ("level", "neither"):
            limit_NT = args.gamma * (stream.done & ~stream.fell)
            with torch.no_grad():
                mixed_NT = limit_NT * lirpg.value_of(state["theta"], stream.next_obs)
                extrinsic_NT = limit_NT * lirpg.value_of(state["eta"], stream.next_obs)
            more_NT = (batch.gae_weight @ extrinsic_NT[..., None]).squeeze(-1)
            batch = batch._replace(
                mixed_delta=batch.mixed_delta + mixed_NT,
                extrinsic_advantage=batch.extrinsic_advantage + more_NT,
                extrinsic_target=batch.extrinsic_target + more_NT,
            )
        return batch

    return prepare


def ablate(options: Options) -> None:
    """A line for each seed and variant into results/lirpg/ablation.jsonl: how a run ended, and its worst setback."""
    flags = ["--env-id", options.env_id, "--iterations", str(options.iterations)] if options.env_id else POINT
    for seed in options.seeds:
        for variant in options.variants:
            with mock.patch.object(lirpg, "prepare", prepare_as(variant)):
                folder = make_run([*flags, "--reward-lr", str(options.reward_lr), "--seed", str(seed)])
            rows, _ = records.read_metrics(folder)
            run = [(row["env_steps"], row["train/return_post"]) for row in rows if "train/return_post" in row]
            tests = [row["test/return_k1"] for row in rows if "test/return_k1" in row]
            line = {"env": options.env_id or "point mass", "variant": variant, "reward_lr": options.reward_lr}
            line |= {"tests": "fixed"}  # of older lines start states and noise were those of the seed
            line |= {"seed": seed, "last_fifth": last(run), "first": rows[0]["test/return_k0"], "end": tests[-1]}
            line["setback"] = max(max(tests[:i]) - x for i, x in enumerate(tests) if i)
            with open(RESULTS / "ablation.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def label(args: dict) -> str:
    """Which of LABELS a run is, and the settings that are not the usual ones."""
    name = "ppo" if args["intrinsic_coef"] == 0 else "both" if args["extrinsic_coef"] else "lirpg"
    if args["live_bonus"]:
        name = "bonus" if name == "ppo" else f"{name}_bonus"
    usual = lirpg.Args() if "Forward" in args["env_id"] else None
    settings = ("delay", "minibatches") if usual else ()
    return name + "".join(f"_{key}{args[key]}" for key in settings if args[key] != getattr(usual, key))


def keep(options: Options) -> None:
    """args and metrics into results/lirpg/, named by environment, label and seed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in options.runs:
        if not (folder / "metrics.jsonl").exists():
            raise SystemExit(f"{folder} is no folder of a run: it has no metrics.jsonl")
        args = records.last_flags(folder / "args.json")
        name = f"{args['env_id'].removesuffix('-v0')}_{label(args)}_seed{args['seed']}"
        (RESULTS / f"{name}.args.json").write_bytes((folder / "args.json").read_bytes())
        (RESULTS / f"{name}.metrics.jsonl.gz").write_bytes(
            gzip.compress((folder / "metrics.jsonl").read_bytes(), mtime=0)
        )
        print(name)


def kept() -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    """By environment and label, the kept seeds' (steps, undelayed return of the episodes that ended)."""
    found = {}
    for path in sorted(RESULTS.glob("*.metrics.jsonl.gz")):
        env, *names, _ = path.name.split(".")[0].split("_")
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        run = [(row["env_steps"], row["train/return_post"]) for row in rows if "train/return_post" in row]
        found.setdefault(env, {}).setdefault("_".join(names), []).append(run)
    return found


def last(run: list[tuple[float, float]]) -> float:
    """Mean return over the last fifth of a run's steps."""
    return float(np.mean([value for steps, value in run if steps > 0.8 * run[-1][0]]))


def table(options: Options) -> dict:
    """Each seed's mean return over the last fifth of its steps."""
    result = {env: {which: [round(last(run), 1) for run in runs] for which, runs in found.items()}
              for env, found in kept().items()}  # fmt: skip
    print(json.dumps(result, indent=1))
    return result


def curves(options: Options) -> None:
    """docs/images/lirpg_ENV.png: return over steps, each seed, and their mean and 95 % interval."""
    env = (options.env_id or "HalfCheetahForward-v0").removesuffix("-v0")
    found = {which: runs for which, runs in kept().get(env, {}).items() if which in LABELS}
    if not found:
        raise SystemExit(f"--env-id {env}-v0: nothing of that is kept in {RESULTS}; `keep` puts it there")
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for i, (which, runs) in enumerate(found.items()):
        smooth = [smoothed(run) for run in runs]
        for run in smooth:
            axes.plot(*run.T, f"C{i}", linewidth=0.7, alpha=0.5)
        steps, values = common(smooth)
        mean, half = interval(values)
        axes.plot(
            steps, mean, f"C{i}", linewidth=2.5, label=f"{LABELS[which]} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        )
        if len(runs) > 2:
            axes.fill_between(steps, mean - half, mean + half, color=f"C{i}", alpha=0.15, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="undelayed return of training episodes", title=env)
    axes.legend()
    write(figure, f"lirpg_{env}.png")


def smoothed(run: list[tuple[float, float]], width: int = 5) -> np.ndarray:
    """Points [G, 2] whose returns are means over `width` neighbours, fewer at the ends."""
    points = np.array(run, float)
    values = [points[max(0, i - width // 2) : i + width // 2 + 1, 1].mean() for i in range(len(points))]
    return np.column_stack([points[:, 0], values])


def reward(options: Options) -> None:
    """docs/images/lirpg_grid.png: r_in of the best action and that action in every cell, and how the policy walks."""
    _, args, state = load(options.runs[0])
    envs = make(args.env_id, args.num_worlds, args.horizon, False, 1.0, True).unwrapped
    rows, columns = len(envs.map), len(envs.map[0])
    task = envs.sample_tasks(1, torch.Generator().manual_seed(args.seed))
    walls = torch.tensor([letter == "#" for letter in "".join(envs.map)])
    seen = lirpg.normalized(torch.eye(envs.num_cells), state["obs_moments"])
    actions = torch.arange(len(envs.moves)).expand(envs.num_cells, -1)
    with torch.no_grad():
        r_in = lirpg.intrinsic_reward(state["eta"], seen[:, None].expand(-1, actions.shape[1], -1), actions)
        chances = lirpg.policy_of(state["theta"], seen).probs
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, values, what in zip(
        figure.subplots(1, 2),
        (r_in, chances),
        ("learned reward of the best action", "policy's likeliest action"),
        strict=True,
    ):
        best, move = values.max(1)
        image = axes.imshow(best.masked_fill(walls, torch.nan).view(rows, columns), cmap="viridis")
        figure.colorbar(image, ax=axes, shrink=0.8)
        for cell in range(envs.num_cells):
            if not walls[cell]:
                down, right = envs.moves[move[cell]]
                axes.arrow(cell % columns - 0.25 * right, cell // columns - 0.25 * down, 0.3 * right, 0.3 * down,
                           head_width=0.2, color="w")  # fmt: skip
        axes.plot(envs.start % columns, envs.start // columns, "wo", markersize=9, fillstyle="none")
        axes.plot(float(task[0, 1]), float(task[0, 0]), "r*", markersize=18)
        axes.set(title=what, xticks=[], yticks=[])
    write(figure, "lirpg_grid.png")


def write(figure: Figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, dpi=100)
    print(IMAGES / name)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.what in ("keep", "reward") and not options.runs:
        raise SystemExit(f"{options.what}: name folders of runs")
    globals()[options.what](options)


if __name__ == "__main__":
    main()
