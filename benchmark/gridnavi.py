"""What is the best possible on GridNavi, and what a run of algos/varibad_ppo.py believes there: docs/varibad_ppo.md.

    python benchmark/gridnavi.py optimal                 Bayes-optimal returns of trials of 1 to 4 episodes, exact
    python benchmark/gridnavi.py table runs/A runs/B ..  returns of each episode beside them; also runs of rl2_ppo; and
                                                         posterior sampling, which is what PEARL learns to do
    python benchmark/gridnavi.py belief runs/A           a picture: decoded beliefs and the walk along one trial

Until the goal is found, all that is learned is that the cells which were visited are no goal. So a Bayes-optimal policy
is one walk, the same for every goal, that is left when it meets the goal; from there on one stays on it, and in later
episodes goes there straight. The best walk is found by dynamic programming forward over steps: of all walks so far that
have ruled out the same goals and stand in the same cell, only the one that has gained most is kept. Walks whose gain,
and a bound on what they may still gain, do not reach the gain of a walk that is already known, are left out.

A gain is counted in steps on the goal; each is worth the difference of the two rewards.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from envs import Trials, make, records  # noqa: E402
from envs.hidden_goals import MOVES, GridNavi  # noqa: E402

IMAGES = ROOT / "docs/images"
BEAM = 3000  # walks that are kept after each step to find a first good one
EPISODES, HORIZON = 4, 15  # of a trial in the paper


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["optimal", "table", "belief"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs"""
    trials: int = 2100
    """trials of a run that are played, spread evenly over all goals"""
    seed: int = 100
    """seed of these trials"""
    goal: tuple[int, int] = (3, 1)
    """column and row of the goal in the picture"""


class Grid(NamedTuple):
    """Cells, numbered row by row from the lower left one, and what may be hidden in them."""

    columns: int
    rows: int
    start: int
    goals: tuple[int, ...]  # cells, all equally likely
    off: float  # reward of a step that does not end on the goal; one that does pays 1
    horizon: int
    episodes: int

    def after(self, cell: int, action: int) -> int:
        """The cell that an action leads to; the border stops."""
        row, column = divmod(cell, self.columns)
        column = min(max(column + MOVES[action][0], 0), self.columns - 1)
        return self.columns * min(max(row + MOVES[action][1], 0), self.rows - 1) + column

    def distance(self, cell: int, other: int) -> int:
        """Steps from a cell to the next one that ends on the other: 1, not 0, where they are the same."""
        (row, column), (other_row, other_column) = divmod(cell, self.columns), divmod(other, self.columns)
        return max(abs(row - other_row) + abs(column - other_column), 1)


def gridnavi(episodes: int = EPISODES) -> Grid:
    """The family's grid."""
    side, (column, row) = GridNavi.side, GridNavi.start
    goals = sorted(side * int(y) + int(x) for x, y in GridNavi.goals())
    return Grid(side, side, side * row + column, tuple(goals), GridNavi.off_goal, HORIZON, episodes)


def search(grid: Grid, floor: int, beam: int | None = None) -> tuple[int, list[int]]:
    """The largest gain of a walk, summed over goals, and its cells [episodes * horizon].

    Exact if some walk gains at least `floor` and `beam` is None; with a beam only so many walks are kept each time.
    """
    T, E, G = grid.horizon, grid.episodes, len(grid.goals)
    cells = range(grid.columns * grid.rows)
    after = np.array([[grid.after(cell, action) for action in range(len(MOVES))] for cell in cells])
    distance = np.array([[grid.distance(cell, goal) for goal in grid.goals] for cell in cells])
    later = T + 1 - distance[grid.start]  # steps on each goal in an episode that goes there straight
    place = np.array([grid.goals.index(cell) if cell in grid.goals else -1 for cell in cells])
    bits = 1 << np.arange(G)
    bit_of = np.where(place >= 0, bits[place], 0)
    ruled_out, cell, gain = np.zeros(1, int), np.full(1, grid.start), np.zeros(1, int)
    history = []
    for step in range(E * T):
        episode, t = divmod(step, T)
        parent = np.arange(len(cell)).repeat(len(MOVES))
        cell = after[cell].ravel()
        is_new = (bit_of[cell] & ~ruled_out[parent]) > 0
        gain = gain[parent] + is_new * (T - t + (E - 1 - episode) * later[place[cell]])
        ruled_out = ruled_out[parent] | bit_of[cell]
        visited = cell
        if t == T - 1:  # the next episode begins
            episode, t, cell = episode + 1, -1, np.full_like(cell, grid.start)
        # Of equal states the one that has gained most.
        order = np.lexsort((-gain, cell, ruled_out))
        is_first = np.ones(len(order), bool)
        is_first[1:] = (np.diff(ruled_out[order]) != 0) | (np.diff(cell[order]) != 0)
        kept = order[is_first]
        # A bound: every goal that is left is found as soon as its distance allows, one a step.
        is_left = (ruled_out[kept, None] & bits) == 0
        number = np.arange(G)
        soonest = np.sort(np.where(is_left, distance[cell[kept]], 10**6), axis=1)
        soonest = np.maximum.accumulate(soonest - number, axis=1) + number
        bound = gain[kept] + (T - t - soonest).clip(0).sum(1) * (episode < E)
        bound += (is_left * later).sum(1) * max(E - 1 - episode, 0)
        kept = kept[bound >= floor] if beam is None else kept[np.argsort(-bound, kind="stable")[:beam]]
        history.append((parent[kept], visited[kept]))
        ruled_out, cell, gain = ruled_out[kept], cell[kept], gain[kept]
    best = int(gain.argmax())
    walk, index = [], best
    for parent, visited in reversed(history):
        walk.append(int(visited[index]))
        index = parent[index]
    return int(gain[best]), walk[::-1]


def best_walk(grid: Grid) -> list[int]:
    """The cells [episodes * horizon] that a Bayes-optimal policy visits as long as it has not found the goal."""
    floor, _ = search(grid, floor=0, beam=BEAM)
    return search(grid, floor)[1]


def returns(grid: Grid, walk: list[int]) -> np.ndarray:
    """The mean return of each episode [episodes] where this walk is left on the goal, in the best way."""
    T = grid.horizon
    paid = np.zeros((len(grid.goals), grid.episodes))  # steps on the goal
    for k, goal in enumerate(grid.goals):
        if goal in walk:
            episode, t = divmod(walk.index(goal), T)
            paid[k, episode] = T - t
            paid[k, episode + 1 :] = T + 1 - grid.distance(grid.start, goal)
    return grid.off * T + (1 - grid.off) * paid.mean(0)


def posterior_sampling(grid: Grid, goal: int, generator: np.random.Generator) -> list[float]:
    """Returns of the episodes of one trial by a policy that is optimal for a goal drawn anew before each episode.

    The draw is from the exact posterior: all goals that no visit has ruled out, or the one that has paid. Within an
    episode it goes to the drawn goal, by a random one of the shortest ways, and stays there, whatever happens.
    """
    possible, totals = set(grid.goals), []
    for _ in range(grid.episodes):
        target, cell, total = int(generator.choice(sorted(possible))), grid.start, 0.0
        visited = set()
        for _ in range(grid.horizon):
            ways = [grid.after(cell, action) for action in range(1, len(MOVES))]
            nearer = [way for way in ways if way != cell and grid.distance(way, target) < grid.distance(cell, target)]
            # Distances count at least 1, so that the last step is told apart by where it ends.
            options = [target] if target in (*ways, cell) else nearer
            cell = int(generator.choice(options))
            visited.add(cell)
            total += 1.0 if cell == goal else grid.off
        possible = {goal} if goal in visited else possible - visited
        totals.append(total)
    return totals


def optimal(options: Options) -> None:
    """For trials of 1 to 4 episodes a JSON line: mean returns of each episode and of the trial, and the walk."""
    for episodes in range(1, EPISODES + 1):
        grid = gridnavi(episodes)
        walk = best_walk(grid)
        result = returns(grid, walk)
        line = {"episodes": episodes, "returns": result.round(3).tolist(), "trial": round(float(result.sum()), 3)}
        print(json.dumps(line | {"walk": walk}), flush=True)


def load(folder: Path):
    """The module that made a run, the run's Args and its state."""
    name = torch.load(folder / "checkpoint.pt", weights_only=True)["algorithm"]
    module = importlib.import_module(f"algos.{name}")
    state = records.load_checkpoint(str(folder), name, module.Args, flag="run")
    return module, state["args"], state


def play(folder: Path, tasks_NP, seed: int):
    """A trial of each task by a run's networks: what the file's own function returns; the returns [N, E] are last."""
    module, args, state = load(folder)
    envs = Trials(make(args.env_id, len(tasks_NP), args.horizon, False, discrete=True), args.episodes_per_trial)
    generator = torch.Generator().manual_seed(seed)
    if hasattr(module, "play_with_beliefs"):
        return module.play_with_beliefs(envs, tasks_NP, state["phi"], state["theta"], args, generator)
    return module.play_trials(envs, tasks_NP, state["theta"], args, generator)


def table(options: Options) -> None:
    """A JSON line of each run: mean returns of each episode, and half the width of their 95 % intervals over trials."""
    grid = gridnavi()
    best = returns(grid, best_walk(grid))
    print(json.dumps({"run": "Bayes-optimal", "returns": best.round(3).tolist()}))
    generator = np.random.default_rng(options.seed)
    sampled = np.array([posterior_sampling(grid, g, generator) for g in grid.goals * -(-options.trials // 21)])
    width = 1.96 * sampled.std(0, ddof=1) / len(sampled) ** 0.5
    line = {"returns": sampled.mean(0).round(3).tolist(), "half_widths": width.round(3).tolist()}
    print(json.dumps({"run": "posterior sampling"} | line | {"trials": len(sampled)}))
    goals = GridNavi.goals().float()
    for folder in options.runs:
        tasks_NP = goals.repeat(-(-options.trials // len(goals)), 1)
        *_, return_NE = play(folder, tasks_NP, options.seed)
        width = 1.96 * return_NE.std(0) / len(return_NE) ** 0.5
        rounded = [[round(float(x), 3) for x in numbers] for numbers in (return_NE.mean(0), width)]
        _, args, state = load(folder)
        line = {"run": folder.name, "returns": rounded[0], "half_widths": rounded[1], "trials": len(return_NE)}
        line |= {"env_steps": state["env_steps"], "minutes": round(state["seconds"] / 60, 1), "seed": args.seed}
        print(json.dumps(line), flush=True)


def belief(options: Options) -> None:
    """One trial: in each episode the walk, and the decoded probability that a cell is the goal at some steps of it."""
    module, args, state = load(options.runs[0])
    tasks_NP = torch.tensor([options.goal], dtype=torch.float32)
    seen, choices, return_NE = play(options.runs[0], tasks_NP, options.seed)
    mean_SZ = choices.told[0, :, -2 * args.latent_size : -args.latent_size]
    std_SZ = (0.5 * choices.told[0, :, -args.latent_size :]).exp()
    generator = torch.Generator().manual_seed(options.seed)
    noise_MSZ = torch.randn(200, *mean_SZ.shape, generator=generator)
    # The mean over samples of m: the probability that a cell pays, as the belief has it.
    probability_SO = module.decode(state["phi"], "reward", mean_SZ + std_SZ * noise_MSZ).sigmoid().mean(0)
    side, T = GridNavi.side, args.horizon
    times = [0, 3, 6, 9, 12, T - 1]
    figure = Figure(figsize=(1.9 * len(times), 2.05 * args.episodes_per_trial), layout="constrained")
    grid = figure.subplots(args.episodes_per_trial, len(times), squeeze=False)
    cell_S = seen.obs[0].argmax(1)
    for (episode, column), axis in np.ndenumerate(grid):
        now = T * episode + times[column]
        picture = axis.imshow(
            probability_SO[now].view(side, side).numpy(), origin="lower", cmap="Blues", vmin=0, vmax=1
        )
        path = cell_S[T * episode : now + 1]
        spread = torch.linspace(-0.2, 0.2, len(path)) if len(path) > 1 else torch.zeros(1)
        axis.plot(path % side + spread, path // side + spread, "C1-", linewidth=1.5)
        axis.plot(path[-1] % side + spread[-1], path[-1] // side + spread[-1], "C1o", markersize=7)
        axis.plot(*options.goal, "k*", markersize=9, fillstyle="none")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"after {times[column]} steps", fontsize=9) if episode == 0 else None
        if column == 0:
            axis.set_ylabel(f"episode {episode + 1}: {float(return_NE[0, episode]):.1f}", fontsize=9)
    figure.colorbar(picture, ax=grid, shrink=0.6, label="probability that a cell pays")
    figure.savefig(IMAGES / "varibad_belief.png", dpi=90)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    globals()[options.what](options)
