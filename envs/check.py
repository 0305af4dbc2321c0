"""Whether task environments keep to the contract of envs/core.py, line by line.

    python -m envs.check my_package.my_module:MyTask-v0 [--horizon 60]
    python -m envs.check path/to/file.py:MyTask

Anything that --env-id accepts can be checked; single environments are batched by envs/adapter.py first. A line says

    yes     it holds
    no      it does not, and what was found; the exit status is 1 then
    note    nothing is wrong, and something is not so or could not be seen: what it means

It plays short episodes with random actions: "yes" means that nothing wrong was seen.
"""

import argparse
import copy
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Generator, Tensor

from . import make
from .adapter import AdaptedVectorEnv, method
from .core import TaskVectorEnv
from .flags import default_horizon

WORLDS = 8
STEPS = 60  # of an episode at most, unless --horizon says more


class Wrong(Exception):  # noqa: N818
    """What does not hold; the message says what was found."""


class Found(NamedTuple):
    """One line of a report."""

    verdict: str  # "yes", "no" or "note"
    title: str
    text: str
    trace: str  # of an error in a user's own code


class Played(NamedTuple):
    """An episode of B worlds with T steps."""

    obs: Tensor  # [T + 1, B, O]
    action: Tensor  # [T, B, A] or [T, B]
    reward: Tensor  # [T, B]
    terminated: Tensor  # [T, B]
    truncated: Tensor  # [T, B]


class Subject:
    """Makes batches of what is checked: the same kind, with another number of worlds, horizon, device or dtype."""

    def __init__(self, family: TaskVectorEnv):
        self.family = family

    def make(self, num_envs: int = WORLDS, **changes) -> TaskVectorEnv:
        like = copy.copy(self.family)
        for name, value in changes.items():
            setattr(like, name, value)
        return like.another(num_envs)


def demand(condition, text: str) -> None:
    """Wrong with this text unless the condition holds."""
    if not condition:
        raise Wrong(text)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def actions(worlds: TaskVectorEnv, steps: int, seed: int = 0) -> Tensor:
    """Random actions within the bounds [T, B, A], or choices [T, B]."""
    if worlds.is_discrete:
        size = steps, worlds.num_envs
        return torch.randint(int(worlds.single_action_space.n), size, generator=seeded(seed)).to(worlds.device)
    unit = torch.rand(steps, *worlds.action_space.shape, generator=seeded(seed)).to(worlds._low)
    return worlds._low + unit * (worlds._high - worlds._low)


def start(worlds: TaskVectorEnv, seed: int = 0, tasks: Tensor | None = None) -> Tensor:
    return worlds.reset(seed=seed, options=None if tasks is None else {"tasks": tasks})[0]


def play(worlds: TaskVectorEnv, given: Tensor, seed: int = 0, tasks: Tensor | None = None) -> Played:
    """An episode, or as much of it as there are actions."""
    obs = start(worlds, seed, tasks)
    columns = zip(*(worlds.step(action)[:4] for action in given), strict=True)
    seen, *rest = (torch.stack(column) for column in columns)
    return Played(torch.cat([obs[None], seen]), given, *rest)


def is_chancy(worlds: TaskVectorEnv) -> bool:
    """Whether steps draw from the batch's own generator."""
    start(worlds)
    before = worlds._generator.get_state()
    worlds.step(actions(worlds, 1)[0])
    return not torch.equal(before, worlds._generator.get_state())


def first_difference(x: Tensor, y: Tensor) -> str:
    """Where two tensors, of which the second axis is worlds, first differ."""
    place = (x != y).nonzero()[0].tolist()
    return f"{x[tuple(place)]} and not {y[tuple(place)]} in step {place[0]}, world {place[1]}"


def demand_equal(x: Played, y: Played, what: str) -> None:
    for name in ("obs", "reward", "terminated"):
        one, other = getattr(x, name), getattr(y, name)
        if not torch.equal(one, other):
            raise Wrong(f"{what}: {name} is {first_difference(one, other)}")


# ---------------------------------------------------------------- what is checked


def shapes_and_types(subject: Subject) -> str | None:
    for dtype in (torch.float32, torch.float64):
        worlds = subject.make(dtype=dtype)
        episode = play(worlds, actions(worlds, 1))
        size = worlds.num_envs
        for name, x, shape, expected in (
            ("obs", episode.obs[0], worlds.observation_space.shape, dtype),
            ("obs", episode.obs[1], worlds.observation_space.shape, dtype),
            ("reward", episode.reward[0], (size,), dtype),
            ("terminated", episode.terminated[0], (size,), torch.bool),
            ("truncated", episode.truncated[0], (size,), torch.bool),
            ("tasks", worlds.tasks, (size, worlds.task_dim), worlds.task_dtype),
        ):
            told = f"{name} is {x.dtype} {list(x.shape)} on {x.device}, and should be {expected} {list(shape)}"
            demand(x.shape == shape and x.dtype == expected and x.device.type == worlds.device.type, told)
        space = worlds.single_observation_space
        for obs in episode.obs.float().cpu().numpy().reshape(-1, *space.shape):
            inside = np.logical_and(obs >= space.low - 1e-4, obs <= space.high + 1e-4)
            demand(inside.all(), f"an observation is outside of its space: {obs} and {space}")
    return f"observations {list(space.shape)}, {worlds.single_action_space}, tasks [{worlds.task_dim}]"


def tasks_are_drawn(subject: Subject) -> str | None:
    worlds = subject.make()
    for split in ("train", "test"):
        before = torch.get_rng_state()
        tasks = worlds.sample_tasks(5, seeded(0), split)
        demand(tasks.shape == (5, worlds.task_dim), f"sample_tasks(5, ..) returns {list(tasks.shape)}")
        demand(torch.isfinite(tasks).all(), "tasks are not finite")
        np.random.seed(1)
        again = worlds.sample_tasks(5, seeded(0), split)
        demand(torch.equal(tasks, again), f"sample_tasks gives other {split} tasks for the same generator")
        demand(torch.equal(before, torch.get_rng_state()), "sample_tasks draws from torch's global generator")
    try:
        worlds.sample_tasks(5, seeded(0), "no such split")
    except ValueError:
        return None
    except KeyError:
        return 'for a split that is neither "train" nor "test" a KeyError; a ValueError would say what is allowed'
    raise Wrong('no ValueError for a split that is neither "train" nor "test"')


def splits_are_disjoint(subject: Subject) -> str | None:
    worlds = subject.make()
    train, test = (
        {tuple(task) for task in worlds.sample_tasks(1000, seeded(seed), split).tolist()}
        for seed, split in ((0, "train"), (1, "test"))
    )
    if test <= train and len(train) < 100:
        return f"all {len(test)} different test tasks are training tasks: nothing is held out"
    shared = len(train & test)
    demand(not shared, f"{shared} of {len(test)} different test tasks are training tasks, too")
    return None


def seeds_decide(subject: Subject) -> str | None:
    worlds, other = subject.make(), subject.make()
    given = actions(worlds, min(worlds.horizon, 20))
    torch.manual_seed(1)
    np.random.seed(1)
    first = play(worlds, given, seed=5)
    tasks = worlds.tasks
    torch.manual_seed(2)
    np.random.seed(2)
    demand_equal(first, play(other, given, seed=5), "the same seed and actions")
    demand(torch.equal(tasks, other.tasks), "the same seed draws other tasks")
    again = [x.reset()[0] for x in (worlds, other)]
    demand(torch.equal(*again), "a reset without a seed, the second after the same seed, starts elsewhere")
    obs = start(worlds, 6, tasks)
    return None if not torch.equal(obs, first.obs[0]) else "all seeds start from the same observations"


def tasks_are_hidden(subject: Subject) -> str | None:
    worlds = subject.make()
    tasks = worlds.sample_tasks(WORLDS, seeded(0))
    if len(tasks.unique(dim=0)) == 1:
        return "there is but one task"
    first = start(worlds, 3, tasks)
    second = start(worlds, 3, tasks.roll(1, 0))
    differ = (first != second).any(1)
    told = f"with the same seed and another task {int(differ.sum())} of {WORLDS} first observations are others"
    demand(not differ.any(), told)
    return None


def tasks_matter(subject: Subject) -> str | None:
    worlds = subject.make()
    tasks = worlds.sample_tasks(WORLDS, seeded(0))
    if len(tasks.unique(dim=0)) == 1:
        return "there is but one task"
    given = actions(worlds, worlds.horizon)
    one, other = (play(worlds, given, tasks=x) for x in (tasks, tasks.roll(1, 0)))
    if torch.equal(one.obs, other.obs) and torch.equal(one.reward, other.reward):
        return "with random actions nothing depends on the task: is it used?"
    return None


def horizon_is_the_end(subject: Subject) -> str | None:
    for horizon in (1, 3):
        worlds = subject.make(horizon=horizon)
        for attempt in ("before the first reset", "after the horizon"):
            given = actions(worlds, horizon)
            try:
                worlds.step(given[0])
            except gym.error.ResetNeeded:
                pass
            else:
                raise Wrong(f"step does not raise ResetNeeded {attempt}")
            truncated = play(worlds, given).truncated
            expected = torch.zeros_like(truncated)
            expected[-1] = True
            demand(
                torch.equal(truncated, expected),
                f"truncated is not true in step {horizon} of {horizon}, and only there",
            )
    return None


def ends_are_latched(subject: Subject) -> str | None:
    worlds = subject.make(4 * WORLDS)
    episode = play(worlds, actions(worlds, worlds.horizon))
    over = episode.terminated
    before = torch.cat([torch.zeros_like(over[:1]), over[:-1]])
    demand((over | ~before).all(), "terminated becomes false again after an early end")
    demand((episode.reward[before] == 0).all(), "there are rewards after an early end")
    changed = (episode.obs[1:] != episode.obs[:-1]).any(-1) & before
    demand(not changed.any(), "observations change after an early end")
    if not over.any():
        return f"no episode ended early in {worlds.horizon} steps of random actions"
    return None


def tensors_are_not_reused(subject: Subject) -> str | None:
    worlds = subject.make(horizon=6)
    given = actions(worlds, 6)
    kept = [start(worlds)]
    for action in given[:3]:
        *results, info = worlds.step(action)
        kept += [*results, *(x for x in info.values() if isinstance(x, Tensor))]
    copies = [x.clone() for x in kept]
    worlds.step(given[3])
    demand(all(map(torch.equal, kept, copies)), "a later step changes tensors that were returned before")
    expected = play(worlds, given)
    start(worlds).fill_(7)
    for action, obs in zip(given, expected.obs[1:], strict=True):
        results = worlds.step(action)
        demand(torch.equal(results[0], obs), "what a caller writes into a returned tensor changes what follows")
        results[0].fill_(7)
        results[1].fill_(7)
    return None


def neighbours_do_not_matter(subject: Subject) -> str | None:
    worlds = subject.make()
    given = actions(worlds, min(worlds.horizon, 20))
    tasks = worlds.sample_tasks(WORLDS, seeded(0))
    one = play(worlds, given, tasks=tasks)
    others = torch.arange(WORLDS, device=worlds.device) != 2
    tasks = torch.where(others[:, None], worlds.sample_tasks(WORLDS, seeded(1)), tasks)
    given = given.clone()
    given[:, others] = actions(worlds, len(given), seed=1)[:, others]
    two = play(worlds, given, tasks=tasks)
    one, two = (Played(*(x[:, 2:3] for x in episode)) for episode in (one, two))
    demand_equal(one, two, "a world whose neighbours have other tasks and actions")
    return None


def batch_is_single_worlds(subject: Subject) -> str | None:
    worlds = subject.make()
    tasks = worlds.sample_tasks(WORLDS, seeded(0))
    given = actions(worlds, min(worlds.horizon, 20))
    batch = play(worlds, given, tasks=tasks)
    number = WORLDS - 1
    expected = Played(*(x[:, number : number + 1] for x in batch))
    if isinstance(worlds, AdaptedVectorEnv):
        demand_equal(_single(worlds, number, given), expected, "the environment alone, without the adapter")
        return None
    alone = subject.make(1)
    if worlds.world_state is None or is_chancy(alone):
        return "not compared: chance decides, or a world's state cannot be copied"
    start(worlds, 0, tasks)
    start(alone, 0, tasks[number : number + 1])
    for name in ("_obs", *worlds.world_state):
        setattr(alone, name, getattr(worlds, name)[number : number + 1].clone())
    steps = [alone.step(action[number : number + 1])[:4] for action in given]
    obs, *rest = (torch.stack(x) for x in zip(*steps, strict=True))
    found = Played(torch.cat([expected.obs[:1], obs]), expected.action, *rest)
    demand_equal(found, expected, "a batch of one world from the same state")
    return None


def _single(worlds: AdaptedVectorEnv, number: int, given: Tensor) -> Played:
    """What a user's environment does by itself."""
    env = worlds._make_env()
    method(env, "set_task")(worlds.tasks[number].cpu().numpy())
    obs, _ = env.reset(seed=int(worlds._seeds[number]))
    rows, over = [], False
    for action in given[:, number].cpu().numpy():
        reward = 0.0
        if not over:
            action = worlds._least + action if worlds.is_discrete else action.astype(env.action_space.dtype)
            following, reward, over, *_ = env.step(action)
        rows.append((obs, float(np.asarray(reward).reshape(())), bool(over)))
        obs = following
    env.close()
    seen = torch.tensor(np.array([row[0] for row in rows] + [obs])[:, None], dtype=worlds.dtype, device=worlds.device)
    reward = torch.tensor([[row[1]] for row in rows], dtype=worlds.dtype, device=worlds.device)
    over = torch.tensor([[row[2]] for row in rows], device=worlds.device)
    return Played(seen, given[:, number : number + 1], reward, over, over)


def masks_restart_some(subject: Subject) -> str | None:
    worlds, other = subject.make(), subject.make()
    if worlds.world_state is None:
        return "worlds can only start together: not for lirpg, lifetime_rewards and meta_critic"
    if worlds.horizon < 3:
        worlds, other = (subject.make(horizon=6) for _ in range(2))
    given = actions(worlds, min(worlds.horizon, 10))
    tasks = worlds.sample_tasks(WORLDS, seeded(0))
    expected = play(other, given, tasks=tasks)
    half = len(given) // 2
    play(worlds, given[:half], tasks=tasks)
    mask = torch.arange(WORLDS, device=worlds.device) % 2 == 0
    obs, _ = worlds.reset(options={"tasks": tasks, "reset_mask": mask})
    demand(torch.equal(obs[~mask], expected.obs[half, ~mask]), "a reset_mask moves worlds that it leaves out")
    clocks = torch.where(mask, 0, half)
    demand(torch.equal(worlds._steps, clocks), "after a reset_mask the clocks are wrong")
    if is_chancy(other):
        return None
    for step in range(half, len(given)):
        results = worlds.step(given[step])
        wanted = expected.obs[step + 1], expected.reward[step], expected.terminated[step]
        same = all(torch.equal(x[~mask], y[~mask]) for x, y in zip(results, wanted, strict=False))
        demand(same, "after a reset_mask the worlds that it left out go on differently")
    return None


def saved_worlds_go_on(subject: Subject) -> str | None:
    worlds, other = subject.make(horizon=6), subject.make(horizon=6)
    if worlds.world_state is None:
        return "worlds cannot be saved; only lirpg, lifetime_rewards and meta_critic would"
    given = actions(worlds, 6)
    play(worlds, given[:3])
    saved = {name: x.clone() for name, x in worlds.save_worlds().items()}
    start(other, 9)
    other.load_worlds(saved)
    for action in given[3:]:
        same = all(torch.equal(x, y) for x, y in zip(worlds.step(action)[:4], other.step(action)[:4], strict=True))
        demand(same, "worlds that were saved and loaded go on differently")
    return None


def bad_actions_are_refused(subject: Subject) -> str | None:
    worlds = subject.make(horizon=6)
    good = actions(worlds, 1)[0]
    cases = [(good[1:], ValueError, "for fewer worlds")]
    if worlds.is_discrete:
        cases += [(torch.full_like(good, int(worlds.single_action_space.n)), ValueError, "that is no choice")]
    else:
        cases += [(good * torch.nan, FloatingPointError, "that is not finite")]
    for action, kind, what in cases:
        start(worlds)
        try:
            worlds.step(action)
        except kind:
            continue
        demand(worlds.checks_late, f"an action {what} is no {kind.__name__}")
    if not worlds.is_discrete:
        start(worlds)
        beyond = worlds.step(torch.full_like(good, 1e6))[0]
        start(worlds)
        demand(
            torch.equal(beyond, worlds.step(worlds._high.expand_as(good))[0]), "actions are not clipped to the bounds"
        )
    return None


def reward_is_a_function(subject: Subject) -> str | None:
    worlds = subject.make()
    if not worlds.knows_reward:
        return "it is not known as a function of what is observed: not for mbmpo"
    worlds.check_reward()
    if isinstance(worlds, AdaptedVectorEnv):
        return None
    episode = play(worlds, actions(worlds, min(worlds.horizon, 20)))
    tasks = worlds.tasks.expand(len(episode.action), *worlds.tasks.shape)
    told = worlds.reward(episode.obs[:-1], episode.action, episode.obs[1:], tasks)
    before = torch.cat([torch.zeros_like(episode.terminated[:1]), episode.terminated[:-1]])
    told = torch.where(before, 0.0, told)
    demand(told.shape == episode.reward.shape, f"reward returns {list(told.shape)} for {list(episode.reward.shape)}")
    if not torch.equal(told, episode.reward):
        raise Wrong(f"reward returns {first_difference(told, episode.reward)}, as step did")
    return None


def devices_agree(subject: Subject) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device here"
    worlds, other = subject.make(device=torch.device("cpu")), subject.make(device=torch.device("cuda"))
    tasks = worlds.sample_tasks(WORLDS, seeded(0))
    given = actions(worlds, min(worlds.horizon, 5))
    one, two = (play(x, given.to(x.device), tasks=tasks.to(x.device)) for x in (worlds, other))
    demand(two.obs.is_cuda and two.reward.is_cuda and two.terminated.is_cuda, "with device cuda results are elsewhere")
    demand(torch.equal(one.obs[0], two.obs[0].cpu()), "the first observations are others than on the CPU")
    demand(torch.allclose(one.obs[1], two.obs[1].cpu(), 1e-3, 1e-3), "a step leads elsewhere than on the CPU")
    return None


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "shapes, types and spaces are as promised": shapes_and_types,
    "tasks are drawn from the generator, for two splits": tasks_are_drawn,
    "test tasks are no training tasks": splits_are_disjoint,
    "seeds decide everything": seeds_decide,
    "the first observation does not show the task": tasks_are_hidden,
    "the task makes a difference": tasks_matter,
    "the horizon is the only truncation": horizon_is_the_end,
    "early ends are latched and pay nothing": ends_are_latched,
    "returned tensors are not used again": tensors_are_not_reused,
    "a world does not depend on its neighbours": neighbours_do_not_matter,
    "a batch does what single worlds do": batch_is_single_worlds,
    "some worlds can start again": masks_restart_some,
    "saved worlds go on": saved_worlds_go_on,
    "wrong actions are refused, large ones clipped": bad_actions_are_refused,
    "the reward is a function": reward_is_a_function,
    "the CPU and the GPU agree": devices_agree,
}


def check(family: TaskVectorEnv) -> list[Found]:
    """What holds of a batch's kind and what does not, a line each; the batch itself is not played."""
    lines = []
    for title, function in CHECKS.items():
        verdict, trace = "yes", ""
        try:
            text = function(Subject(family)) or ""
            verdict = "note" if text and function is not shapes_and_types else "yes"
        except Wrong as error:
            verdict, text = "no", str(error)
        except Exception as error:  # a user's own, or one of ours that tells what is wrong
            verdict, text, trace = "no", f"{type(error).__name__}: {error}", traceback.format_exc()
        lines.append(Found(verdict, title, " ".join(text.split()), trace))
    return lines


def main(argv: list[str] | None = None) -> int:
    """Check what the command line names; 1 if something does not hold, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id", help="as --env-id of every algorithm")
    parser.add_argument("--horizon", type=int, help=f"steps of an episode (default: its own, at most {STEPS})")
    args = parser.parse_args(argv)
    if args.horizon is not None and args.horizon < 1:
        parser.error("--horizon: at least 1")
    horizon = args.horizon or min(default_horizon(args.env_id), STEPS)
    family = make(args.env_id, 1, horizon, discrete=True).unwrapped
    way = " through envs/adapter.py" if isinstance(family, AdaptedVectorEnv) else ""
    print(f"{family.source}{way}, {WORLDS} worlds, {horizon} steps")
    lines = check(family)
    for line in lines:
        print(f"{line.verdict:<5} {line.title}{f': {line.text}' if line.text else ''}", flush=True)
    for line in lines:
        if line.trace:
            print(f"\n{line.title}:\n{line.trace}", file=sys.stderr)
    wrong = sum(line.verdict == "no" for line in lines)
    print(f"{wrong} of {len(lines)} do not hold" if wrong else "all hold")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
