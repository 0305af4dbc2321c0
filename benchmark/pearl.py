"""The table and the pictures of docs/pearl_sac.md, from finished runs.

    python benchmark/pearl.py table runs/A ..          returns of successive episodes with held-out tasks, a line a run
    python benchmark/pearl.py keep runs/A runs/B ..    the same, with args and metrics (of any file's) into results/
    python benchmark/pearl.py paths runs/A             SparseNavigation2D: paths with z from the prior and the posterior
    python benchmark/pearl.py latent runs/A            what the encoder makes of held-out tasks, one colour for each
    python benchmark/pearl.py curves runs/A runs/B ..  held-out return after adaptation over environment steps
    python benchmark/pearl.py crossings runs/A ..      from how many steps on PEARL stays at what the others end with

`table` and `keep` play as `evaluate()` does, with more tasks and episodes. `curves` and `crossings` take runs of other
files, too, and what `keep` wrote: benchmark/results/pearl/by_means/HalfCheetahVel3_*.metrics.jsonl.gz.
"""

import gzip
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import pearl_sac  # noqa: E402
from algos.pearl_sac import Transitions  # noqa: E402
from benchmark.classic import summary  # noqa: E402
from benchmark.rl2 import load, refuse_mixed  # noqa: E402
from benchmark.seeds import sustained  # noqa: E402
from envs import make, records  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/pearl"
AFTER = {"pearl_sac": 2, "rl2_ppo": 1, "maml_trpo": 1}  # episodes, or inner steps, behind which `curves` looks


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["table", "keep", "paths", "latent", "curves", "crossings"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs; of `curves` and `crossings` kept metrics, too"""
    tasks: int = 300
    """held-out tasks, a world for each"""
    episodes: int = 3
    """episodes of a task (of the latent picture: after how many)"""
    seed: int = 100
    """seed of tasks and noise"""
    spread: float = 1.0
    """of the policy's noise in episodes for the context: 1 as in training and in `evaluate()`, 0 plays its means"""
    context: int = 0
    """sample this many transitions of those seen, as in training, for the encoder; 0 takes all, as `evaluate()` does"""


class Explorer:
    """Held-out tasks and the transitions seen of them so far; z always from the posterior, in the first
    `eval_prior_episodes` episodes from the prior."""

    def __init__(self, folder: Path, num_tasks: int, seed: int, spread: float = 1.0, size: int = 0):
        module, self.args, state = load(folder)
        if module is not pearl_sac:
            raise SystemExit(f"{folder}: a run of {module.__name__}, not of pearl_sac")
        self.theta, self.generator = state["theta"], Generator().manual_seed(seed)
        if not 0 <= size <= self.args.horizon:
            raise SystemExit(f"--context {size}: allowed is 0 to {self.args.horizon}, the steps of an episode")
        self.envs = make(self.args.env_id, num_tasks, self.args.horizon)
        self.tasks = self.envs.unwrapped.sample_tasks(num_tasks, self.generator, "test")
        self.episodes, self.spread, self.size = [], spread, size
        self.scored, self.z = 0, None

    @property
    def context(self) -> Transitions:
        """All transitions of the episodes so far, of which there must be one."""
        return Transitions(*(torch.cat(field, 1) for field in zip(*self.episodes, strict=True)))

    def infer(self) -> Tensor:
        """z [N, Z] for the next episode."""
        if self.scored < self.args.eval_prior_episodes:
            return pearl_sac.sample_prior(self.tasks, self.args, self.generator)
        context = self.context
        if self.size:
            chance = torch.rand(context.mask.shape, generator=self.generator).mul(context.mask)
            index = torch.arange(len(chance))[:, None], chance.topk(self.size)[1]
            context = Transitions(*(field[index] for field in context))
        return pearl_sac.sample_posterior(self.theta, context, self.args, self.generator)

    def rehearse(self, z: Tensor, spread: float = 0.0) -> Transitions:
        """An episode that leaves no trace, by the policy's means or with noise."""
        return pearl_sac.play_episodes(self.envs, self.tasks, self.theta, z, self.args, self.generator, spread)

    def score(self) -> Tensor:
        """Returns [N] of an episode by the policy's means, with a new z."""
        self.z = self.infer()
        self.scored += 1
        return self.rehearse(self.z).reward.sum(1)

    def explore(self) -> None:
        """An episode with the z that was scored last, for the context."""
        if self.scored <= self.args.eval_prior_episodes or self.args.context == "posterior":
            self.episodes.append(self.rehearse(self.z, self.spread))

    def play(self) -> None:
        """Both of them."""
        self.score()
        self.explore()

    def authors(self) -> Tensor:
        """Returns [N] as the authors' code tests: two episodes from the prior, then the one that counts; means only."""
        seen = []
        for _ in range(2):
            z = pearl_sac.sample_prior(self.tasks, self.args, self.generator)
            self.rehearse(z)  # which `evaluate()` scores
            seen.append(self.rehearse(z))
        both = Transitions(*(torch.cat(field, 1) for field in zip(*seen, strict=True)))
        return self.rehearse(pearl_sac.sample_posterior(self.theta, both, self.args, self.generator)).reward.sum(1)


def table(folder: Path, options: Options) -> dict:
    explorer = Explorer(folder, options.tasks, options.seed, options.spread, options.context)
    columns = [explorer.score()]
    for _ in range(options.episodes - 1):
        explorer.explore()
        columns.append(explorer.score())
    returns = torch.stack(columns, 1)
    rows, _ = records.read_metrics(folder)
    if not rows:
        raise SystemExit(f"{folder}: a run that was stopped in its first iteration")
    names = "env_id", "seed", "hidden_size", "batch_size", "meta_batch_size", "updates"
    return {
        "run": folder.name,
        **{name: getattr(explorer.args, name) for name in names},
        **{name: rows[-1][name] for name in ("iteration", "env_steps", "seconds")},
        "episodes": [summary(returns[:, k]) for k in range(options.episodes)],
        "gain": summary(returns[:, -1] - returns[:, 0]),
        "last_minus_one_before": summary(returns[:, -1] - returns[:, max(0, options.episodes - 2)]),
        "authors": summary(explorer.authors()),
    }


def keep(folder: Path, options: Options) -> dict:
    """Into benchmark/results/pearl/: the run's arguments and metrics; of a run of PEARL its table."""
    module, args, _ = load(folder)
    name = f"{args.env_id.removesuffix('-v0')}_{module.__name__.removeprefix('algos.')}_seed{args.seed}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.args.json").write_bytes((folder / "args.json").read_bytes())
    with open(RESULTS / f"{name}.metrics.jsonl.gz", "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write((folder / "metrics.jsonl").read_bytes())
    if module is not pearl_sac:
        return {"kept": name}
    result = table(folder, options)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def draw_paths(axes, episodes: Transitions, goal: Tensor | None, title: str) -> None:
    """Paths from the origin, the half circle of goals, and the goal with its radius of reward."""
    angle = torch.linspace(0, torch.pi, 100)
    axes.plot(angle.cos(), angle.sin(), ":", color="0.6")
    for path in torch.cat([episodes.obs[:, :1], episodes.next_obs], 1):
        axes.plot(path[:, 0], path[:, 1], "C0", alpha=0.6, linewidth=1)
    if goal is not None:
        turn = torch.linspace(0, 2 * torch.pi, 50)
        axes.fill(goal[0] + 0.2 * turn.cos(), goal[1] + 0.2 * turn.sin(), "C2", alpha=0.4)
    axes.set(title=title, xlim=(-1.5, 1.5), ylim=(-0.6, 1.5), aspect="equal", xticks=(), yticks=())


def paths(folder: Path, options: Options) -> dict:
    """A row for each of three held-out goals: 20 paths with z from the prior, then 20 from the posterior after 1, 2, ..
    episodes of that task."""
    worlds, moments = 20, (0, 1, 2, 5, 10, 20)
    figure = Figure(figsize=(15, 6), layout="constrained")
    for i, row in enumerate(figure.subplots(3, len(moments))):
        explorer = Explorer(folder, worlds, options.seed + i)
        goal = explorer.tasks[0]
        explorer.tasks = goal.expand(worlds, -1)  # from the first world's history all z are inferred
        for axes, seen in zip(row, moments, strict=True):
            while explorer.scored < seen:
                explorer.play()
            if seen:
                own = Transitions(*(field[:1].expand(worlds, *field.shape[1:]) for field in explorer.context))
                z = pearl_sac.sample_posterior(explorer.theta, own, explorer.args, explorer.generator)
            else:
                z = pearl_sac.sample_prior(explorer.tasks, explorer.args, explorer.generator)
            episodes = explorer.rehearse(z)
            when = f"after {seen} episodes" if seen > 1 else ("after 1 episode" if seen else "z from the prior")
            draw_paths(axes, episodes, goal, f"{when}: {float(episodes.reward.sum(1).mean()):.1f}")
    figure.savefig(IMAGES / "pearl_paths.png", dpi=100)
    return {"picture": str(IMAGES / "pearl_paths.png")}


def latent(folder: Path, options: Options) -> dict:
    """Means of q(z|c) after some episodes, in the two directions in which they differ most."""
    explorer = Explorer(folder, options.tasks, options.seed)
    for _ in range(options.episodes):
        explorer.play()
    with torch.no_grad():
        mean, variance = pearl_sac.posterior(explorer.theta, explorer.context, explorer.args)
    _, _, directions = torch.linalg.svd(mean - mean.mean(0), full_matrices=False)
    x, y = ((mean - mean.mean(0)) @ directions[:2].T).T
    tasks = explorer.tasks
    value = torch.atan2(tasks[:, 1], tasks[:, 0]).rad2deg() if tasks.shape[1] == 2 else tasks[:, 0]
    axes = (figure := Figure(figsize=(6, 4.5), layout="constrained")).subplots()
    points = axes.scatter(x, y, c=value, cmap="viridis", s=14)
    figure.colorbar(points, label="angle of the goal (degrees)" if tasks.shape[1] == 2 else "target speed (m/s)")
    name = explorer.args.env_id.removesuffix("-v0")
    axes.set(title=f"{name}: mean of q(z|c) after {options.episodes} episodes", xlabel="z, first principal direction")
    axes.set(ylabel="second")
    figure.savefig(IMAGES / f"pearl_latent_{name}.png", dpi=100)
    return {"posterior_std": float(variance.sqrt().mean()), "spread_of_means": float(mean.std(0).mean())}


def of_run(path: Path) -> tuple[str, str, list[dict]]:
    """Of a run's folder, or of a kept ENV_ALGORITHM_seedN.metrics.jsonl.gz: environment, algorithm, and metrics."""
    if path.suffix == ".gz":
        env, name = path.name.split(".")[0].rpartition("_seed")[0].split("_", 1)
        return env, name, [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    module, args, _ = load(path)
    name = module.__name__.removeprefix("algos.")
    return args.env_id.removesuffix("-v0"), name, records.read_metrics(path)[0]


def curves(runs: tuple[Path, ...]) -> dict:
    """Held-out return over environment steps (log scale) of runs of pearl_sac, rl2_ppo and maml_trpo side by side."""
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    found = [of_run(path) for path in runs]
    refuse_mixed((rows for *_, rows in found), "curves")
    for _, name, rows in found:
        rows = [row for row in rows if "test/return_k0" in row]
        unit = "inner step of 20 episodes" if name == "maml_trpo" else "episode"
        label = f"{name}, after {AFTER[name]} {unit}{'s' * (AFTER[name] > 1)}"
        known = label in axes.get_legend_handles_labels()[1]  # another seed of an algorithm has its colour
        x, y = zip(*((row["env_steps"], row[f"test/return_k{AFTER[name]}"]) for row in rows), strict=True)
        axes.plot(x, y, f"C{list(AFTER).index(name)}", label=None if known else label)
    env = found[-1][0]
    axes.set(xscale="log", xlabel="env_steps (training)", ylabel="return of held-out tasks", title=env)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    picture = IMAGES / f"pearl_curves_{env}.png"
    figure.savefig(picture, dpi=100)
    return {"picture": str(picture)}


def crossings(runs: tuple[Path, ...]) -> list[str]:
    """A Markdown table: what each run of another file ends with, and from where on a run of PEARL stays there.

    The first evaluation that has that return would come earlier, by luck: a curve that falls below it again has not
    crossed it for good.
    """
    found = [(path, *of_run(path)) for path in runs]
    refuse_mixed((rows for *_, rows in found), "crossings")
    lines = ["| | steps | seconds | return | PEARL | stays there from | fewer steps | its seconds |", "|---" * 8 + "|"]
    others = [(name, rows) for _, _, name, rows in found if name != "pearl_sac"]
    ours = [(path, rows) for path, _, name, rows in found if name == "pearl_sac"]
    if not others or not ours:
        raise SystemExit("crossings: give runs of pearl_sac, and others beside them")
    ours_after = f"test/return_k{AFTER['pearl_sac']}"
    for name, rows in others:
        after = f"test/return_k{AFTER[name]}"
        end = [row for row in rows if after in row][-1]
        for path, own in ours:
            points = [row for row in own if ours_after in row]
            steps = sustained([(row["env_steps"], row[ours_after]) for row in points], end[after])
            seconds = sustained([(row["seconds"], row[ours_after]) for row in points], end[after])
            cells = [name, f"{end['env_steps']:,}", f"{end['seconds']:,.0f}", f"{end[after]:.1f}"]
            cells.append(path.name.split(".")[0])
            if math.isinf(steps):
                cells += ["never", "", ""]
            else:
                cells += [f"{steps:,}", f"{end['env_steps'] / steps:.0f}", f"{seconds:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.what == "curves":
        print(json.dumps(curves(options.runs)))
        return
    if options.what == "crossings":
        print("\n".join(crossings(options.runs)))
        return
    for folder in options.runs:
        made = {"table": table, "keep": keep, "paths": paths, "latent": latent}[options.what](folder, options)
        print(json.dumps(made))


if __name__ == "__main__":
    main()
