"""The tables and pictures of docs/rl2_ppo.md and docs/rl2_transformer_ppo.md, from finished runs of the two files.

    python benchmark/rl2.py table runs/A runs/B ..     total reward of trials with held-out tasks, a JSON line a run
    python benchmark/rl2.py keep runs/A runs/B ..      the same lines, and the runs' args and metrics, into results/
    python benchmark/rl2.py regret runs/A ..           bandits of one kind: regret after each pull beside classic ones
    python benchmark/rl2.py mouse runs/A               paths of the mouse in each episode of trials in unseen mazes
    python benchmark/rl2.py curves runs/A runs/B ..    learning curves of runs side by side, over time and over steps

Trials are played with the checkpoint's network as it was trained, its choices drawn and not the most likely ones.
"""

import gzip
import importlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import classic_bandits, classic_mdps  # noqa: E402
from benchmark.classic import summary  # noqa: E402
from envs import Trials, make, records  # noqa: E402
from envs.mouse_cheese import MOVES, SIDE, cheese, shortest_path, walls  # noqa: E402
from envs.tabular_mdp import tables  # noqa: E402

BERNOULLI = ("Bandit5-v0", "Bandit10-v0", "Bandit50-v0")
IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/rl2"


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["table", "keep", "regret", "mouse", "curves"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    tasks: int = 10000
    """held-out tasks, one trial each"""
    seed: int = 100
    """seed of the tasks and of the trials"""


def load(folder: Path):
    """The module that made a run, the run's Args and its state."""
    if not (folder / "checkpoint.pt").exists():
        raise SystemExit(f"{folder} is no folder of a run: it has no checkpoint.pt")
    name = torch.load(folder / "checkpoint.pt", weights_only=True)["algorithm"]
    module = importlib.import_module(f"algos.{name}")
    state = records.load_checkpoint(str(folder), name, module.Args, flag="run")
    return module, state["args"], state


def tests_of(rows: list[dict]) -> str:
    """Which test tasks a run's metrics are of: "fixed", the same in every run, or "by seed", in older versions."""
    return "fixed" if any("test/tasks" in row for row in rows) else "by seed"


def refuse_mixed(runs: Iterable[list[dict]], where: str) -> None:
    """SystemExit if some runs' metrics are of the fixed test tasks, and those of others of tasks drawn by the seed."""
    if len({tests_of(rows) for rows in runs}) > 1:
        raise SystemExit(f"{where}: some runs were tested on the fixed test tasks, older ones on tasks that seeds drew")


def played(folder: Path, tasks: int, seed: int):
    """Up to 1,000 trials at a time with held-out tasks: tasks [N, P], their `Steps`, and the returns [N, E]."""
    module, args, state = load(folder)
    batch = min(tasks, 1000)
    if batch < 1 or tasks % batch:
        raise SystemExit(f"--tasks {tasks}: allowed is 1 to 1000, or a multiple of 1000")
    envs = make(args.env_id, batch, args.horizon, False, args.action_scale, discrete=True)
    envs, generator = Trials(envs, args.episodes_per_trial), Generator().manual_seed(seed)
    for _ in range(tasks // batch):
        tasks_NP = envs.unwrapped.sample_tasks(batch, generator, "test")
        yield tasks_NP, *module.play_trials(envs, tasks_NP, state["theta"], args, generator)


def require(folder: Path, env_ids: tuple[str, ...]) -> None:
    if (env_id := load(folder)[1].env_id) not in env_ids:
        raise SystemExit(f"{folder} is a run on {env_id}; this picture is of {', '.join(env_ids)}")


def paper(args) -> dict:
    """The paper's numbers for this setting, RL2 and the best known of the others."""
    n = args.episodes_per_trial * args.horizon
    if args.env_id.startswith("Bandit"):
        return dict(
            zip(classic_bandits.COLUMNS, classic_bandits.PAPER.get((n, int(args.env_id[6:-3])), ()), strict=False)
        )
    if args.env_id == "TabularMDP-v0" and args.horizon == classic_mdps.HORIZON:
        return dict(zip(classic_mdps.COLUMNS, classic_mdps.PAPER.get(args.episodes_per_trial, ()), strict=False))
    return {}


def searched(steps, return_NE: Tensor) -> Tensor:
    """Steps [E] that the mouse took in each episode, on average over the trials."""
    episode_NS = (steps.x[..., -1] * steps.mask).cumsum(1).long()  # the previous step's done
    count_NE = torch.zeros_like(return_NE).scatter_add_(1, episode_NS, steps.mask)
    return count_NE.mean(0)


def line(folder: Path, options: Options) -> dict:
    """What is known of a run, and how it does on held-out tasks."""
    (_, args, state), parts, steps_of_mouse = load(folder), [], []
    for tasks_NP, steps, return_NE in played(folder, options.tasks, options.seed):
        parts.append((tasks_NP, return_NE))
        steps_of_mouse += [searched(steps, return_NE)] if args.env_id == "MouseCheese-v0" else []
    tasks_NP, return_NE = (torch.cat(x) for x in zip(*parts, strict=True))
    names = "encoder", "hidden_size", "episodes_per_trial", "horizon", "meta_batch_size", "iterations"
    result = {"env_id": args.env_id} | {name: getattr(args, name) for name in names}
    result |= {"env_steps": state["env_steps"], "minutes": round(state["seconds"] / 60, 1), "tasks": len(return_NE)}
    result |= {"reward": summary(return_NE.sum(1))}
    result |= {"episodes": [round(float(x), 3) for x in return_NE.mean(0)]} if args.episodes_per_trial <= 10 else {}
    result |= {"gain": summary(return_NE[:, -1] - return_NE[:, 0])}
    # Another seed: the tasks' own would repeat, in rewards and posterior samples, the very numbers that made the tasks.
    if args.env_id in BERNOULLI:  # Gittins on the very same problems
        n, generator = args.episodes_per_trial * args.horizon, Generator().manual_seed(options.seed + 1)
        gittins_B = classic_bandits.run(classic_bandits.gittins, tasks_NP, n, generator)
        result |= {"gittins": summary(gittins_B), "difference": summary(return_NE.sum(1) - gittins_B)}
    if args.env_id == "TabularMDP-v0" and args.horizon == classic_mdps.HORIZON:  # likewise PSRL
        generator = Generator().manual_seed(options.seed + 1)
        psrl_B = classic_mdps.run(classic_mdps.RULES["psrl"], tables(tasks_NP), args.episodes_per_trial, generator)
        result |= {"psrl": summary(psrl_B), "difference": summary(return_NE.sum(1) - psrl_B)}
    if args.env_id == "MouseCheese-v0":
        steps, found = torch.stack(steps_of_mouse).mean(0), (return_NE > 0).float().mean(0)
        result |= {"steps": [round(float(x), 2) for x in steps], "found": [round(float(x), 3) for x in found]}
        result |= {"shortest": float(shortest_path(tasks_NP).float().mean())}
    return result | ({"paper": numbers} if (numbers := paper(args)) else {})


def table(options: Options) -> None:
    """A JSON line of each run."""
    for folder in options.runs:
        print(json.dumps(line(folder, options)), flush=True)


def keep(options: Options) -> None:
    """`table`, into results/rl2/NAME.json with the runs' args and metrics beside it, NAME after the setting."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in options.runs:
        result = line(folder, options)
        numbers = f"{result['episodes_per_trial']}x{result['horizon']}"
        seed = records.last_flags(folder / "args.json")["seed"]
        name = f"{result['env_id'].removesuffix('-v0')}_{numbers}_{result['encoder']}_seed{seed}"
        (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")
        shutil.copy(folder / "args.json", RESULTS / f"{name}.args.json")
        with gzip.GzipFile(RESULTS / f"{name}.metrics.jsonl.gz", "wb", mtime=0) as file:
            file.write((folder / "metrics.jsonl").read_bytes())
        print(name, json.dumps(result), flush=True)


def regret(options: Options) -> None:
    """What always pulling the best arm would have paid more, expected of the arms pulled, after each pull."""
    axis, arms = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots(), {}
    for folder in options.runs:  # the same problems for all
        require(folder, BERNOULLI)
        parts = [(tasks_NP, steps.action) for tasks_NP, steps, _ in played(folder, options.tasks, options.seed)]
        p_BK, arm_BS = (torch.cat(x) for x in zip(*parts, strict=True))
        arms[f"RL2, {load(folder)[1].encoder}"] = arm_BS
    n, generator = arm_BS.shape[1], Generator().manual_seed(options.seed + 1)
    for label, name in (("Gittins", "gittins"), ("UCB1", "ucb1"), ("Thompson", "thompson"), ("greedy", "greedy")):
        policy = getattr(classic_bandits, name)
        if name in classic_bandits.GRIDS:  # tuned on other problems, as in the tables
            other_BK = torch.rand(1000, p_BK.shape[1], generator=generator)
            choices = [partial(policy, strength=strength) for strength in classic_bandits.GRIDS[name]]
            policy = max(choices, key=lambda choice: classic_bandits.run(choice, other_BK, n, generator).mean())
        arms[label] = classic_bandits.play(policy, p_BK, n, generator)[0]
    for label, arm_BS in arms.items():
        lost_BS = p_BK.amax(1, keepdim=True) - p_BK.gather(1, arm_BS)
        axis.plot(range(1, n + 1), lost_BS.cumsum(1).mean(0), label=label)
    axis.set(xlabel="pulls", ylabel="regret", title=f"{p_BK.shape[1]} arms, {len(p_BK)} held-out problems")
    axis.legend()
    figure.savefig(IMAGES / f"rl2_regret_{p_BK.shape[1]}_{n}.png", dpi=110)


def mouse(options: Options) -> None:
    """Three unseen mazes, a row each: the mouse's path in every episode of one trial.

    Of the first 1,000 trials: the longest shortest path to the cheese, the one at a sixth, the one at a third.
    """
    require(options.runs[0], ("MouseCheese-v0",))
    args = load(options.runs[0])[1]
    tasks_NP, steps, return_NE = next(played(options.runs[0], options.tasks, options.seed))
    episode_NS = (steps.x[..., -1] * steps.mask).cumsum(1)
    place_NS = steps.x[..., SIDE**2 : 2 * SIDE**2].argmax(2)
    far = shortest_path(tasks_NP).argsort(descending=True)[: len(tasks_NP) // 2]  # where there is something to search
    figure = Figure(figsize=(2.4 * args.episodes_per_trial, 7.6), layout="constrained")
    grid = figure.subplots(3, args.episodes_per_trial, squeeze=False)
    for row, (axes, i) in enumerate(zip(grid, far[:: max(1, len(far) // 3)], strict=False)):
        for k, axis in enumerate(axes):
            here = (episode_NS[i] == k) & (steps.mask[i] > 0)
            path = place_NS[i][here].tolist()
            path += [path[-1] + MOVES[steps.action[i][here][-1]]] if return_NE[i, k] > 0 else []
            axis.imshow(walls(tasks_NP)[i].view(SIDE, SIDE).numpy(), cmap="Greys", vmax=1.6)
            spread = torch.linspace(-0.25, 0.25, len(path)) if len(path) > 1 else torch.zeros(1)
            rows, columns = torch.tensor(path) // SIDE + spread, torch.tensor(path) % SIDE + spread
            axis.plot(columns, rows, "C0.-", linewidth=1.5)
            axis.plot(int(cheese(tasks_NP)[i]) % SIDE, int(cheese(tasks_NP)[i]) // SIDE, "C1D", markersize=9)
            axis.set(xticks=[], yticks=[], xlabel=f"{int(here.sum())} steps")
            axis.set_title(f"episode {k + 1}") if row == 0 else None
    figure.savefig(IMAGES / "rl2_mouse.png", dpi=90)


def curves(options: Options) -> None:
    """Held-out return of the runs' trials, over minutes and over environment steps."""
    left, right = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
    rows_of = {folder: records.read_metrics(folder)[0] for folder in options.runs}
    refuse_mixed(rows_of.values(), "curves")
    for folder, rows in rows_of.items():
        args = records.last_flags(folder / "args.json")
        rows = [row for row in rows if "test/return_trial" in row]
        score = [row["test/return_trial"] for row in rows]
        left.plot([row["seconds"] / 60 for row in rows], score, label=args["encoder"])
        right.plot([row["env_steps"] for row in rows], score, label=args["encoder"])
    left.set(xlabel="minutes", ylabel="return of a trial, held-out tasks", title=args["env_id"])
    right.set(xlabel="env_steps")
    left.legend()
    figure.savefig(IMAGES / f"rl2_curves_{args['env_id'].removesuffix('-v0')}.png", dpi=110)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    globals()[options.what](options)
