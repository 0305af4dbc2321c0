"""The numbers and pictures of docs/mbmpo.md, from finished runs; and the model-free TRPO that they are compared with.

    python benchmark/mbmpo.py trpo --seed 1 --iterations 500     a run of TRPO on the real environment, into runs/
    python benchmark/mbmpo.py keep runs/A runs/B ..              args and metrics of any file's runs, into results/
    python benchmark/mbmpo.py table                              kept runs: returns, and steps that TRPO takes for them
    python benchmark/mbmpo.py curves                             kept runs: return over real steps
    python benchmark/mbmpo.py error runs/A                       the models' error over the steps of imagined episodes
    python benchmark/mbmpo.py disagreement runs/A                where in the visited states the models disagree

TRPO's blocks are those of algos/maml_trpo.py, without an inner step; policy, horizon and action scale are MB-MPO's.
"""

import gzip
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import maml_trpo, mbmpo  # noqa: E402
from benchmark.curves import common, interval  # noqa: E402
from benchmark.rl2 import load  # noqa: E402
from envs import make, records  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/mbmpo"
PAPER = {"HalfCheetahForward": (100_000, 550)}  # the authors' real steps and return, as RLlib's README quotes them
STEPS = 20_000, 40_000, 60_000, 80_000, 100_000, 400_000, 1_000_000  # of the table
LEVELS = 200, 300, 400, 500, 600, 700, 800  # returns, likewise
LABELS = {  # of kept runs, and the metric that is drawn
    "mbmpo": ("MB-MPO, adapted policies", "test/return_k1"),
    "ensemble": ("the same loop without meta-learning", "test/return_k1"),
    "trpo": ("TRPO, model-free", "train/return_post"),
    "multitask_ppo": ("PPO, model-free", "train/return_post"),
}


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["trpo", "keep", "table", "curves", "error", "disagreement"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs"""
    env_id: str = "HalfCheetahForward-v0"
    """environment of `trpo`, `table` and `curves`"""
    seed: int = 1
    """seed of TRPO's run, or of the episodes of `error` and `disagreement`"""
    iterations: int = 500
    """of TRPO's run, 4,000 steps each"""
    episodes: int = 20
    """of `error` and `disagreement`"""


def trpo(options: Options) -> None:
    """TRPO on the real environment: 20 episodes an iteration, one policy, a linear baseline; into runs/."""
    args = maml_trpo.Args(
        env_id=options.env_id, seed=options.seed, iterations=options.iterations, meta_batch_size=1,
        episodes_per_task=20, horizon=200, hidden_size=32, fisher_fraction=1.0,
    )  # fmt: skip
    envs, generator = make(args.env_id, 20, 200, False, args.action_scale), Generator().manual_seed(args.seed)
    fresh = {"theta": maml_trpo.init_policy(envs, args.hidden_size, generator)}
    state = records.first_state(args, "trpo", fresh, saved={}, device=envs.unwrapped.device)
    task_1P = envs.unwrapped.sample_tasks(1, Generator().manual_seed(args.seed))
    # Evaluations are empty, and there is no picture: nobody adapts.
    with records.open_run(args, state, envs, evaluate=dict, unit="inner steps") as run:
        for iteration in range(1, args.iterations + 1):
            batch = maml_trpo.collect(envs, task_1P, state["theta"], args, generator)
            theta, stats = maml_trpo.trpo_step(state["theta"], maml_trpo.surrogate, [], batch, args)
            env_steps = state["env_steps"] + int(batch.mask.sum())
            state.update(iteration=iteration, env_steps=env_steps, theta=theta)
            run.end_iteration(state, stats | {"train/return_post": batch.reward.sum(-1)}, evaluate=dict)


def label(args: dict, folder: Path) -> str:
    """Which of LABELS a run is."""
    name = folder.name.split("__")[1]
    return "ensemble" if name == "mbmpo" and args["inner_lr"] == 0 else name


def keep(options: Options) -> None:
    """args and metrics into results/mbmpo/, named by environment, label and seed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in options.runs:
        if not (folder / "metrics.jsonl").exists():
            raise SystemExit(f"{folder} is no folder of a run: it has no metrics.jsonl")
        args = records.last_flags(folder / "args.json")
        name = f"{args['env_id'].removesuffix('-v0')}_{label(args, folder)}_seed{args['seed']}"
        (RESULTS / f"{name}.args.json").write_bytes((folder / "args.json").read_bytes())
        with (
            open(RESULTS / f"{name}.metrics.jsonl.gz", "wb") as file,
            gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped,
        ):
            zipped.write((folder / "metrics.jsonl").read_bytes())
        print(name)


def kept(env: str) -> dict[str, list[list[tuple[float, float]]]]:
    """By label, the kept seeds' (real steps, return)."""
    found = {}
    for which, (_, metric) in LABELS.items():
        paths = sorted(RESULTS.glob(f"{env}_{which}_seed*.metrics.jsonl.gz"))
        if metric.startswith("test/") and len({has_fixed_tests(path) for path in paths}) > 1:
            raise SystemExit(f"{env} {which}: only the newer runs' tests have equal start states; keep all anew")
        for path in paths:
            rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
            found.setdefault(which, []).append([(row["env_steps"], row[metric]) for row in rows if metric in row])
    if not found:
        raise SystemExit(f"--env-id {env}-v0: nothing of that is kept in {RESULTS}; `keep` puts it there")
    return found


def has_fixed_tests(path: Path) -> bool:
    """Whether kept metrics are of a run whose tests have the start states and the noise of all runs."""
    starts = records.read_starts(path.with_name(path.name.replace(".metrics.jsonl.gz", ".args.json")))
    return "time" in starts[-1]  # older versions wrote only flags


def smooth(run: list[tuple[float, float]], width: int = 5) -> np.ndarray:
    """Points [G, 2] whose returns are means over `width` neighbours: one iteration's return is noisy. At the ends the
    outermost one counts several times, so that `table` gives the last returns as a plain mean, too."""
    points = np.array(run, float)
    ends = np.clip(np.arange(len(points))[:, None] + np.arange(width) - width // 2, 0, len(points) - 1)
    points[:, 1] = points[ends, 1].mean(1)
    return points


def first_reach(run: np.ndarray, level: float) -> float:
    """Real steps at which a curve first has a return, infinite where it never has."""
    reached = np.flatnonzero(run[:, 1] >= level)
    return float(run[reached[0], 0]) if len(reached) else float("inf")


def table(options: Options) -> dict:
    """Returns of each seed at some numbers of real steps, and in its last five rows; and its steps to some returns."""
    found = kept(options.env_id.removesuffix("-v0"))
    curves = {which: [smooth(run) for run in runs] for which, runs in found.items()}
    result = {}
    for which, runs in curves.items():
        at = {steps: [float(np.interp(steps, *run.T)) for run in runs if run[-1, 0] >= steps] for steps in STEPS}
        result[which] = {steps: [round(value) for value in values] for steps, values in at.items() if values}
        result[which]["last five"] = [(int(run[-1][0]), round(np.mean(run[-5:], 0)[1])) for run in found[which]]
        result[which]["steps to"] = {level: [first_reach(run, level) for run in runs] for level in LEVELS}
    print(json.dumps(result, indent=1))
    return result


def curves(options: Options) -> None:
    """docs/images/mbmpo_ENV.png: return over real steps, each seed, and their mean and 95 % interval."""
    env = options.env_id.removesuffix("-v0")
    axes = (figure := Figure(figsize=(9, 5), layout="constrained")).subplots()
    for i, (which, runs) in enumerate(kept(env).items()):
        for run in runs:
            axes.plot(*smooth(run).T, f"C{i}", linewidth=0.8, alpha=0.6)  # seeds may end at different steps
        grid, values = common([smooth(run) for run in runs])
        mean, half = interval(values)
        axes.plot(
            grid, mean, f"C{i}", linewidth=2.5, label=f"{LABELS[which][0]} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        )
        if len(runs) > 2:
            axes.fill_between(grid, mean - half, mean + half, color=f"C{i}", alpha=0.15, linewidth=0)
    if env in PAPER:
        axes.plot(*PAPER[env], "k*", markersize=12, label="the paper's MB-MPO, as RLlib quotes it")
    axes.set(xscale="log", xlabel="real environment steps", ylabel="return of a real episode", title=f"{env}, T = 200")
    figure.legend(loc="outside lower center", ncols=2)
    write(figure, f"mbmpo_{env}.png")


def write(figure: Figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, dpi=100)
    print(IMAGES / name)


class Learned:
    """A finished run of MB-MPO: its models, its policy, and real worlds to compare them with."""

    def __init__(self, folder: Path, options: Options):
        module, self.args, self.state = load(folder)
        if module is not mbmpo:
            raise SystemExit(f"{folder}: a run of {module.__name__}, not of mbmpo")
        self.models, self.theta, self.data = (self.state[key] for key in ("models", "theta", "data"))
        self.scales = mbmpo.measure(self.data)
        self.envs = make(self.args.env_id, options.episodes, self.args.horizon, False, self.args.action_scale)
        self.generator = Generator().manual_seed(options.seed)
        self.task_1P = self.envs.unwrapped.sample_tasks(1, Generator().manual_seed(self.args.seed))

    def episodes(self, uniform: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Real episodes of the policy, or of uniform actions: observations [B, T + 1, O], actions [B, T, A], mask."""
        worlds, args = self.envs.num_envs, self.args
        obs, _ = self.envs.reset(seed=int(torch.randint(2**31, (1,), generator=self.generator)),
                                 options={"tasks": self.task_1P.expand(worlds, -1)})  # fmt: skip
        seen, actions, masks, mask = [obs], [], [], torch.ones(worlds)
        for _ in range(args.horizon):
            shape = worlds, self.envs.single_action_space.shape[0]
            mean, std = mbmpo.policy(self.theta, obs)
            noise = torch.rand(shape, generator=self.generator) * 2 - 1 if uniform else None
            action = args.action_scale * noise if uniform else mean + std * torch.randn(shape, generator=self.generator)
            masks.append(mask)
            obs, _, terminated, _, _ = self.envs.step(action)
            seen.append(obs), actions.append(action)
            mask = 1 - terminated.float()
        return torch.stack(seen, 1), torch.stack(actions, 1), torch.stack(masks, 1)

    def replay(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Observations [N, B, T + 1, O] that each model imagines for the same start and the same actions."""
        steps = [obs[:, 0].expand(self.args.num_models, *obs[:, 0].shape)]
        for action in self.envs.executed(actions).unbind(1):
            flat = action.expand(self.args.num_models, *action.shape).flatten(0, 1)
            steps.append(mbmpo.predict(self.models, self.scales, steps[-1].flatten(0, 1), flat).view_as(steps[0]))
        return torch.stack(steps, 2)


def error(options: Options) -> None:
    """docs/images/mbmpo_error.png: error of open-loop predictions in standard deviations of the data (root mean square
    over coordinates, then the median over episodes: some predictions run away)."""
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    learned = Learned(options.runs[0], options)
    scale = learned.data["obs"].std(0) + 1e-6
    for i, (what, uniform) in enumerate((("the policy's episodes", False), ("uniform actions", True))):
        obs, actions, mask = learned.episodes(uniform)
        over = torch.cat([torch.zeros(len(mask), 1), 1 - mask], 1).bool()
        with torch.no_grad():
            imagined = learned.replay(obs, actions)
        wrong = ((imagined - obs) / scale).square().mean(-1).sqrt().nan_to_num(torch.inf)
        each = wrong.masked_fill(over, torch.nan).nanmedian(1).values
        for k, line in enumerate(each):
            axes.plot(line, f"C{i}", alpha=0.8, label=f"{what}, each model" if k == 0 else None)
        steps = [t for t in (1, 10, 50, 200) if t <= learned.args.horizon]
        print(json.dumps({"episodes": what} | {f"step {t}": float(f"{each[:, t].mean():.3g}") for t in steps}))
    axes.set(xlabel="steps imagined from the same start with the same actions", yscale="log", ylim=(0.01, 20))
    axes.set(ylabel="error, standard deviations of the data", title=options.runs[0].name)
    axes.legend()
    write(figure, "mbmpo_error.png")


def disagreement(options: Options) -> None:
    """docs/images/mbmpo_disagreement.png: standard deviation over the models of one step's prediction, by state."""
    learned = Learned(options.runs[0], options)
    data = learned.data
    rows = torch.randperm(len(data["obs"]), generator=learned.generator)[:6000].sort()[0]
    obs, action = data["obs"][rows], data["action"][rows]
    predicted = partial(mbmpo.predict, learned.models, learned.scales)
    many = (x.repeat(learned.args.num_models, 1) for x in (obs, action))
    with torch.no_grad():
        next_obs = predicted(*many).unflatten(0, (learned.args.num_models, -1))
    spread = (next_obs.std(0) / learned.scales["y_std"]).mean(-1)
    left, right = (figure := Figure(figsize=(11, 4.5), layout="constrained")).subplots(1, 2)
    when = 100 * rows / len(data["obs"])
    for axes, colour, title in ((left, when, "when it was visited, % of the data"),
                                (right, spread.log10(), "disagreement, log10 of standard deviations")):  # fmt: skip
        dots = axes.scatter(data["next_obs"][rows, -1], obs[:, 1], c=colour, s=4, cmap="viridis")
        figure.colorbar(dots, ax=axes, label=title)
        axes.set(xlabel="forward velocity, m/s", ylabel="angle of the torso, rad")
    quarters = [round(float(part.mean()), 4) for part in spread.tensor_split(4)]
    print(json.dumps({"mean disagreement by quarter of the data, oldest first": quarters}))
    write(figure, "mbmpo_disagreement.png")


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.what in ("keep", "error", "disagreement") and not options.runs:
        raise SystemExit(f"{options.what}: name folders of runs")
    globals()[options.what](options)


if __name__ == "__main__":
    main()
