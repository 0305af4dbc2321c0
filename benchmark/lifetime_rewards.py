"""The numbers and pictures of docs/lifetime_rewards.md, from finished runs of algos/lifetime_rewards.py.

    python benchmark/lifetime_rewards.py table runs/A runs/B ..     lifetimes by the learned reward and by the baselines
    python benchmark/lifetime_rewards.py transfer runs/A ..         the learned reward in bodies with other actions
    python benchmark/lifetime_rewards.py rl2 runs/R                 RL2's policy (a run of rl2_ppo.py) in those bodies
    python benchmark/lifetime_rewards.py keep runs/A runs/B ..      the runs' args and metrics, into results/
    python benchmark/lifetime_rewards.py curves runs/A runs/B ..    return over a lifetime, beside the baselines
    python benchmark/lifetime_rewards.py visits runs/A              where new policies go in their first 30 episodes
    python benchmark/lifetime_rewards.py rewards runs/A             the learned reward over the grid, as a life goes on
    python benchmark/lifetime_rewards.py signal                     the share of the meta-gradient that is not noise

All lifetimes are of held-out tasks. The baselines are policies of the same kind that learn from another reward:
extrinsic: r; count: r + c / sqrt(n), with n the times that the lifetime has seen the state. Two rewards are ceilings
for a learned one, which is within r +- 1, too, but knows neither objects nor tasks: "hand-made" leads a lifetime to
each object that is worth trying, once, then to the best; "told the best" leads it to the best from birth on ("told C":
to C). Step size alpha, c and pull, the part of these two for the steps between objects, are the best of a few, chosen
on training tasks. The near-optimal explorer is made by hand, knows map and rules, and need not learn.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Generator, Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import lifetime_rewards as algorithm  # noqa: E402
from benchmark.rl2 import load  # noqa: E402
from envs import Lifetimes, Trials, make  # noqa: E402
from envs.gridworlds import OBJECTS, EmptyRooms, GridWorld, RandomABC  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/lifetime_rewards"
STEP_SIZES, BONUSES, PULLS = (0.25, 0.5, 1.0, 2.0), (0.03, 0.1, 0.3, 1.0), (0.0, 0.25, 0.5, 1.0)
EPISODES = 0, 3, 10, 40  # of the picture of rewards
BLOCK = 10  # episodes at the beginning and at the end of a lifetime that the tables show


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["table", "transfer", "rl2", "keep", "curves", "visits", "rewards", "signal"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs"""
    tasks: int = 1000
    """held-out tasks, one lifetime each"""
    seed: int = 100
    """seed of the tasks and of the lifetimes"""
    task: int = 0
    """number of the held-out task in the pictures of visits and rewards; of visits, -1: the mean over many tasks"""


def drawn(env_id: str, tasks: int, seed: int, split: str = "test") -> Tensor:
    """Tasks [N, P]."""
    return make(env_id, 1, 1, discrete=True).sample_tasks(tasks, Generator().manual_seed(seed), split)


@torch.no_grad()
def lifetimes(env_id: str, args, reward: Callable, tasks_NP: Tensor, seed: int, watch: Callable | None = None):
    """Whole lifetimes by reward(data, memory) -> (reward [N, T], memory): returns [N, E], ends in A [N, E].

    `watch(data, lived [N, T], memory)` is called after every trajectory, with the memory before it.
    """
    generator, (N, _) = Generator().manual_seed(seed), tasks_NP.shape
    envs = Lifetimes(make(env_id, N, args.horizon, discrete=True), args.episodes_per_lifetime)
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": tasks_NP})
    theta, memory = algorithm.init_policies(envs, args, generator), None
    return_NE, alive_N1 = torch.zeros(N, args.episodes_per_lifetime), torch.ones(N, 1)
    in_a_NE = torch.zeros_like(return_NE)
    while alive_N1.any():
        data = algorithm.play(envs, obs_NO, theta, args, generator)
        lived_NT = data.mask * alive_N1
        return_NE.scatter_add_(1, data.episode, data.reward * lived_NT)
        if isinstance(envs.unwrapped, RandomABC):
            in_a_NE.scatter_add_(1, data.episode, led_to(data)[..., OBJECTS[0]] * data.over * lived_NT)
        if watch is not None:
            watch(data, lived_NT, memory)
        reward_NT, memory = reward(data, memory)
        theta, _ = algorithm.update_policies(theta, data, reward_NT, args)
        obs_NO = data.obs_after
        alive_N1 = alive_N1 * (1 - data.died.sum(1, keepdim=True))
    return return_NE, in_a_NE


def led_to(data) -> Tensor:
    """The observations [N, T, O] that a trajectory's steps led to, before any restart."""
    return data.x[..., :-2].chunk(2, -1)[1]


def extrinsic(data, memory):
    return data.reward, memory


def learned(eta: dict, data, memory):
    """The reward that a run has learned."""
    empty = 2 * [data.reward.new_zeros(1, len(data.reward), eta["w_h"].shape[1])]
    return algorithm.learned_reward(eta, data, memory or empty)


def counting(bonus: float, data, seen: Tensor | None):
    """r + bonus / sqrt(n): n counts the visits [N, O] of the state in the lifetime, this one included."""
    obs_NTO, bonuses = led_to(data), []
    seen = torch.zeros_like(obs_NTO[:, 0]) if seen is None else seen
    for obs_NO in obs_NTO.unbind(1):
        seen = seen + obs_NO
        bonuses.append(bonus / (seen * obs_NO).sum(1).clamp_min(1).sqrt())
    return data.reward + torch.stack(bonuses, 1), seen * (1 - data.died.sum(1, keepdim=True))


def tries(env_id: str) -> list[int]:
    """The objects worth trying, in this order: nothing is safe in SymABC, C is in the others."""
    return [0, 2, 1] if env_id.startswith("Sym") else [0, 2]


def best_object(tasks_NP: Tensor) -> Tensor:
    """The number [N] of each task's best object."""
    return tasks_NP.argmax(1)


def guided(order: list[int], told_N: Tensor | None, steps: Tensor, pull: float, data, known_N3: Tensor | None):
    """r and a bonus within +-1: 1 for the object that is wanted, -1 for another, `pull` for a step nearer, -pull for
    one away. Wanted is the one told, or the first in `order` that the lifetime has not tried, or the best that it has.

    steps [cells, cells]: between cells. The memory is what each object has paid, NaN before that.
    """
    before_NT, after_NT = (x.argmax(-1) for x in data.x[..., :-2].chunk(2, -1))
    objects, order = torch.tensor(OBJECTS), torch.tensor(order)
    known_N3 = torch.full((len(before_NT), 3), torch.nan) if known_N3 is None else known_N3
    bonuses = []
    for t in range(before_NT.shape[1]):
        untried = known_N3[:, order].isnan()
        best_N = known_N3.nan_to_num(-torch.inf).argmax(1)
        wanted_N = torch.where(untried.any(1), order[untried.int().argmax(1)], best_N) if told_N is None else told_N
        there_N3 = after_NT[:, t, None] == objects
        goal_N = objects[wanted_N]
        nearer_N = steps[before_NT[:, t], goal_N] - steps[after_NT[:, t], goal_N]
        right_N = torch.where(after_NT[:, t] == goal_N, 1.0, -1.0)
        bonuses.append(torch.where(there_N3.any(1), right_N, pull * nearer_N))
        known_N3 = torch.where(there_N3, data.reward[:, t, None], known_N3)
    ended_N1 = data.died.any(1, keepdim=True)
    return data.reward + torch.stack(bonuses, 1), known_N3.masked_fill(ended_N1, torch.nan)


def tuned(env_id: str, args, rewards: dict[float, Callable]) -> tuple:
    """The best step size and the best of the rewards on training tasks, by the mean return of a lifetime.

    rewards: functions that make a reward for given tasks.
    """
    tasks_NP = drawn(env_id, 200, 1, "train")

    def value(pair):
        return lifetimes(env_id, replace(args, inner_lr=pair[0]), rewards[pair[1]](tasks_NP), tasks_NP, 1)[0].mean()

    step, best = max(product(STEP_SIZES, rewards), key=value)
    return replace(args, inner_lr=step), best


def ceilings(env_id: str, tasks_NP: Tensor, args, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, what `lifetimes` returns for rewards made by hand, at their best step size and pull; {} in the rooms."""
    family = make(env_id, 1, 1, discrete=True).unwrapped
    if not isinstance(family, RandomABC) or family.num_cells < family.single_observation_space.shape[0]:
        return {}  # rooms, or a key
    steps, told = shortest(type(family)), {"hand-made": lambda _: None, "told the best": best_object}
    if not env_id.startswith("Sym"):
        told["told C"] = lambda tasks_NP: torch.full((len(tasks_NP),), 2)
    found = {}
    for name, which in told.items():
        ways = {
            pull: lambda tasks_NP, pull=pull, which=which: partial(guided, tries(env_id), which(tasks_NP), steps, pull)
            for pull in PULLS
        }
        best, pull = tuned(env_id, args, ways)
        label = f"{name}, pull = {pull:g}, alpha = {best.inner_lr:g}"
        found[label] = lifetimes(env_id, best, ways[pull](tasks_NP), tasks_NP, seed)
    return found


def shortest(family: type[GridWorld]) -> Tensor:
    """Steps [cells, cells] from each cell to each, infinite where there is no way."""
    table = family(1)._table
    steps = torch.full((len(table), len(table)), torch.inf).fill_diagonal_(0)
    for _ in range(len(table)):
        steps = torch.minimum(steps, 1 + steps[table].amin(1))
    return steps


def explorer(env_id: str, tasks_NP: Tensor, episodes: int, horizon: int) -> Tensor:
    """Returns [N, E] of one who tries A, C and, where nothing is safe, B, then takes the best; in the rooms walks to
    the nearest cell not yet seen until it finds the goal, then straight to it."""
    if env_id == "EmptyRooms-v0":
        steps, envs = shortest(EmptyRooms), EmptyRooms(1)
        free = {cell for cell, letter in enumerate("".join(envs.map)) if letter != "#"}
        found_at, cell, walked = {}, envs.start, 0
        while free - {envs.start} - set(found_at):
            left = sorted(free - {envs.start} - set(found_at))
            ahead = steps[cell, left]
            if walked + ahead.min() > horizon * (walked // horizon + 1):  # the episode ends on the way
                walked = horizon * (walked // horizon + 1)
                cell = envs.start
                continue
            walked += int(ahead.min())
            cell = left[int(ahead.argmin())]
            found_at[cell] = walked
        goals = (tasks_NP[:, 0] * 11 + tasks_NP[:, 1]).long().tolist()
        first = torch.tensor([-(-found_at[goal] // horizon) - 1 for goal in goals])
        return (torch.arange(episodes) >= first[:, None]).float()
    returns = tasks_NP.max(1, keepdim=True).values.repeat(1, episodes)
    order = tries(env_id)
    returns[:, : len(order)] = tasks_NP[:, order]
    return returns


def arms(folder: Path, tasks_NP: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, what `lifetimes` returns for a run's reward and for the baselines."""
    _, args, state = load(folder)
    size, bonuses = (tasks_NP, seed), {c: partial(counting, c) for c in BONUSES}
    best, _ = tuned(args.env_id, args, {0.0: lambda _: extrinsic})
    counted, c = tuned(args.env_id, args, {c: lambda _, reward=reward: reward for c, reward in bonuses.items()})
    near = explorer(args.env_id, tasks_NP, args.episodes_per_lifetime, args.horizon)
    return {
        "learned reward": lifetimes(args.env_id, args, partial(learned, state["eta"]), *size),
        "extrinsic": lifetimes(args.env_id, args, extrinsic, *size),
        f"extrinsic, best alpha = {best.inner_lr:g}": lifetimes(args.env_id, best, extrinsic, *size),
        f"count, c = {c:g}, alpha = {counted.inner_lr:g}": lifetimes(args.env_id, counted, bonuses[c], *size),
        **ceilings(args.env_id, tasks_NP, args, seed),
        "near-optimal explorer": (near, torch.zeros_like(near)),
    }


def summary(tasks_NP: Tensor, return_NE: Tensor, in_a_NE: Tensor) -> dict:
    """Mean returns of a lifetime's first and last episodes and of all; where A is worth something, who ends in it."""
    mean, half = return_NE.mean(1), 1.96 / len(return_NE) ** 0.5
    numbers = {"first": return_NE[:, :BLOCK].mean(), "last": return_NE[:, -BLOCK:].mean(), "all": mean.mean()}
    numbers |= {"ci95": half * mean.std()}
    if in_a_NE.any():
        late_N = in_a_NE[:, -BLOCK:].mean(1)
        numbers |= {
            "A if worth > 0.5": late_N[tasks_NP[:, 0] > 0.5].mean(),
            "A if < 0": late_N[tasks_NP[:, 0] < 0].mean(),
        }
    return {name: round(float(value), 3) for name, value in numbers.items()}


def table(options: Options) -> None:
    for folder in options.runs:
        tasks_NP = drawn(load(folder)[1].env_id, options.tasks, options.seed)
        for name, result in arms(folder, tasks_NP, options.seed).items():
            print(json.dumps({"run": folder.name, "arm": name} | summary(tasks_NP, *result)), flush=True)


def bodies(env_id: str) -> list[str]:
    if (name := env_id.removesuffix("-v0")) not in ("RandomABC", "SymABC"):
        raise SystemExit(f"other bodies are there for RandomABC-v0 and SymABC-v0, not for {env_id}")
    return [f"{name}{body}-v0" for body in ("", "Reversed", "Diagonal")]


def transfer(options: Options) -> None:
    for folder in options.runs:
        _, args, state = load(folder)
        for env_id in bodies(args.env_id):
            tasks_NP = drawn(env_id, options.tasks, options.seed)
            for name, reward in (("learned reward", partial(learned, state["eta"])), ("extrinsic", extrinsic)):
                result = lifetimes(env_id, args, reward, tasks_NP, options.seed)
                print(json.dumps({"body": env_id, "arm": name} | summary(tasks_NP, *result)), flush=True)


def rl2(options: Options) -> None:
    """RL2's network chooses among the actions it knows; a body with more of them has these first."""
    for folder in options.runs:
        module, args, state = load(folder)
        for env_id in bodies(args.env_id):
            envs = Trials(make(env_id, options.tasks, args.horizon, discrete=True), args.episodes_per_trial)
            tasks_NP, generator = drawn(env_id, options.tasks, options.seed), Generator().manual_seed(options.seed)
            _, return_NE = module.play_trials(envs, tasks_NP, state["theta"], args, generator)
            numbers = summary(tasks_NP, return_NE, torch.zeros_like(return_NE))
            print(json.dumps({"body": env_id, "arm": "RL2"} | numbers), flush=True)


def keep(options: Options) -> None:
    """args and the evaluations into results/lifetime_rewards/, named by environment, alpha, U and seed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in options.runs:
        _, args, _ = load(folder)
        name = f"{args.env_id.removesuffix('-v0')}_alpha{args.inner_lr:g}_U{args.unroll}_seed{args.seed}"
        lines = (folder / "metrics.jsonl").read_text().splitlines(True)
        (RESULTS / f"{name}.metrics.jsonl").write_text("".join(line for line in lines if "test/" in line))
        (RESULTS / f"{name}.args.json").write_text((folder / "args.json").read_text())
        print(name)


def curves(options: Options) -> None:
    """Mean return of each episode of a lifetime, smoothed over three."""
    figure = Figure(figsize=(5 * len(options.runs), 3.8), layout="constrained")
    for axes, folder in zip(figure.subplots(1, len(options.runs), squeeze=False)[0], options.runs, strict=True):
        env_id = load(folder)[1].env_id
        for name, (return_NE, _) in arms(folder, drawn(env_id, options.tasks, options.seed), options.seed).items():
            mean_E = functional.avg_pool1d(return_NE.mean(0)[None], 3, 1, 1, count_include_pad=False)[0]
            axes.plot(range(1, len(mean_E) + 1), mean_E, label=name, color="grey" if name.startswith("near") else None)
        axes.set(xlabel="episode of the lifetime", ylabel="return", title=env_id)
        axes.legend(fontsize=7)
    figure.savefig(IMAGES / "lifetime_curves.png", dpi=120)


def one_task(options: Options):
    """A run's Args and reward, its family, and 256 lifetimes of one held-out task, or of a task each."""
    _, args, state = load(options.runs[0])
    task_NP = drawn(args.env_id, max(options.task + 1, 256), options.seed)
    if options.task >= 0:
        task_NP = task_NP[options.task : options.task + 1].repeat(256, 1)
    return args, partial(learned, state["eta"]), make(args.env_id, 1, args.horizon, discrete=True), task_NP


def visits(options: Options) -> None:
    """Where policies go in episodes 1 to 10, 11 to 20, 21 to 30 of lifetimes of one task, or of one each; one scale."""
    args, reward, family, task_NP = one_task(options)
    family.reset(options={"tasks": task_NP[:1]})
    marked = family.colours(0) if options.task >= 0 else {}
    ways, shares = (("learned", reward), ("extrinsic", extrinsic)), {}
    for name, way in ways:
        counts = torch.zeros(3, family.num_cells)

        def watch(data, lived_NT, _, counts=counts):
            seen = (lived_NT > 0) & (data.episode < 3 * BLOCK)
            cell = led_to(data)[..., : family.num_cells].argmax(-1)[seen]
            counts.index_put_((data.episode[seen] // BLOCK, cell), torch.ones(len(cell)), accumulate=True)

        lifetimes(args.env_id, args, way, task_NP, options.seed, watch)
        shares[name] = (counts / counts.sum(1, keepdim=True)).sqrt().view(3, len(family.map), -1)
    figure, most = Figure(figsize=(8, 5.5), layout="constrained"), float(max(x.max() for x in shares.values()))
    for line, (name, share) in zip(figure.subplots(2, 3), shares.items(), strict=True):
        for k, axes in enumerate(line):
            image = paint(axes, share[k], marked, family, "viridis", 0, most)
            axes.set_title(f"{name}, episodes {BLOCK * k + 1} to {BLOCK * (k + 1)}", fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="square root of the share of visits")
    which = "mean" if options.task < 0 else options.task
    figure.savefig(IMAGES / f"lifetime_visits_{args.env_id.removesuffix('-v0')}_{which}.png", dpi=120)


def paint(axes, values, marked: dict, family, colours: str, least: float, most: float):
    """A number for each cell on a scale from least to most, walls in white, goals or objects framed; the image."""
    walls = torch.tensor([letter == "#" for letter in "".join(family.map)]).view(values.shape)
    image = axes.imshow(values.masked_fill(walls, torch.nan).numpy(), cmap=colours, vmin=least, vmax=most)
    for cell, colour in marked.items():
        row, column = divmod(cell, values.shape[1])
        edge = [part / 255 for part in colour]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=edge, linewidth=3))
    axes.set(xticks=[], yticks=[])
    return image


def ways_in(table: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a cell and another to which a move leads from it; `ends` [cells]: no move is made from there."""
    starts = (~ends).nonzero()[:, 0]
    pairs = {(start, to) for start in starts.tolist() for to in table[start].tolist() if to != start}
    start, to = torch.tensor(sorted(pairs)).T
    return start, to


def rewards(options: Options) -> None:
    """r_eta for a step into each cell, after the first trajectories and in later episodes: the mean over the cells
    that the step may come from, and over lifetimes."""
    if options.task < 0:
        raise SystemExit(f"--task {options.task}: rewards are drawn for one task, 0 or more")
    args, reward, family, task_NP = one_task(options)
    family.reset(options={"tasks": task_NP[:1]})
    cells, told = torch.eye(family.num_cells, family.single_observation_space.shape[0]), {}
    worth = family.reward(cells, None, cells, task_NP[:1].repeat(len(cells), 1))
    start, to = ways_in(family._table, worth != 0)
    ways = torch.bincount(to, minlength=len(cells)).clamp_min(1)
    x = torch.cat([cells[start], cells[to], worth[to, None], (worth != 0)[to, None]], 1)

    def watch(data, _, memory):
        for episode in EPISODES if memory is not None else ():
            for lifetime in ((data.episode[:, 0] >= episode) & (data.mask[:, 0] > 0)).nonzero()[:, 0].tolist():
                if (episode, lifetime) not in told:  # the first trajectory that begins there
                    alone = [part[:, [lifetime]].expand(-1, len(x), -1).contiguous() for part in memory]
                    next_step = SimpleNamespace(x=x[:, None], reward=worth[to, None], died=torch.zeros(len(x), 1))
                    paid = reward(next_step, alone)[0][:, 0]
                    told[episode, lifetime] = torch.zeros(len(cells)).index_add(0, to, paid) / ways

    lifetimes(args.env_id, args, reward, task_NP, options.seed, watch)
    figure = Figure(figsize=(3 * len(EPISODES), 3.2), layout="constrained")
    for axes, episode in zip(figure.subplots(1, len(EPISODES)), EPISODES, strict=True):
        mean = torch.stack([value for (which, _), value in told.items() if which == episode]).mean(0)
        image = paint(axes, mean.view(len(family.map), -1), family.colours(0), family, "RdBu", -1.5, 1.5)
        axes.set_title(f"episode {episode + 1}", fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    figure.suptitle("worth " + ", ".join(f"{value:.2f}" for value in task_NP[0].tolist()), fontsize=9)
    figure.savefig(IMAGES / f"lifetime_rewards_{args.env_id.removesuffix('-v0')}_{options.task}.png", dpi=120)


def signal(options: Options) -> None:
    """|mean gradient|^2 over mean |gradient|^2, without bias, for the first eta; V has been fitted for 150 windows."""
    windows, fitting = 60, 150
    for env_id, gamma in product(("SymABC-v0", "RandomABC-v0"), (0.9, 0.97, 0.99)):
        args = algorithm.Args(env_id=env_id, gamma=gamma, inner_lr=1.0)
        envs = Lifetimes(make(env_id, args.meta_batch_size, args.horizon, discrete=True), args.episodes_per_lifetime)
        generator = Generator().manual_seed(options.seed)
        state = algorithm.init_lifetimes(envs, args, generator)
        eta, phi, theta, memory = (state[name] for name in ("eta", "phi", "theta", "memory"))
        obs_NO, optimizer = envs.load_worlds(state["worlds"]), torch.optim.Adam(phi.values(), args.value_lr)
        gradients = {gae_lambda: [] for gae_lambda in (1.0, 0.9, 0.7)}
        for number in range(fitting + windows):
            window, log_probs = [], []
            etas = {name: x.detach().requires_grad_() for name, x in eta.items()}
            for _ in range(args.unroll):
                data = algorithm.play(envs, obs_NO, theta, args, generator)
                log_prob_NT, theta, memory["eta"] = algorithm.learn_by_reward(etas, theta, memory["eta"], data, args)
                obs_NO = data.obs_after
                window.append(data)
                log_probs.append(log_prob_NT)
            theta, memory["eta"] = algorithm.detached(theta), [x.detach() for x in memory["eta"]]
            weights = {name: x.detach().requires_grad_() for name, x in phi.items()}
            fitted = replace(args, gae_lambda=1.0)
            loss, _, after = algorithm.value_loss(weights, window, memory["phi"], fitted)
            for gae_lambda, found in gradients.items() if number >= fitting else ():
                now = replace(args, gae_lambda=gae_lambda)
                _, advantage_NS, _ = algorithm.value_loss(phi, window, memory["phi"], now)
                outer = -(torch.cat(log_probs, 1) * advantage_NS).mean()
                slope = torch.autograd.grad(outer, list(etas.values()), retain_graph=True)
                found.append(torch.cat([x.flatten() for x in slope]))
            memory["phi"] = [x.detach() for x in after]
            for x, gradient in zip(phi.values(), torch.autograd.grad(loss, list(weights.values())), strict=True):
                x.grad = gradient
            optimizer.step()
        for gae_lambda, found in gradients.items():
            total, mean = torch.stack(found).square().sum(1).mean(), torch.stack(found).mean(0).square().sum()
            share = float((mean - total / windows) / (1 - 1 / windows) / total)
            line = {"env": env_id, "gamma": gamma, "lambda": gae_lambda, "signal": round(share, 4)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    if not options.runs and options.what != "signal":
        raise SystemExit(f"{options.what} needs folders of runs")
    globals()[options.what](options)
