"""The contract between an algorithm and its environments: a batch of worlds, each with a task, as tensors.

`TaskVectorEnv` is Gymnasium's own `gymnasium.vector.VectorEnv` with three additions: observations, actions and
rewards are torch tensors on one device; every world carries a task, a plain vector that is never observed; and all
episodes of a batch start together and end together at the horizon.

    envs = gym.make_vec("HalfCheetahDir-v0", num_envs=N * E, vectorization_mode="vector_entry_point", device="cuda")
    tasks = envs.unwrapped.sample_tasks(N, generator, split="train")                    # [N, task_dim]
    obs, info = envs.reset(seed=0, options={"tasks": tasks.repeat_interleave(E, 0)})    # [N * E, obs_dim]
    obs, reward, terminated, truncated, info = envs.step(action)

* Autoreset is disabled: after `max_episode_steps` steps `truncated` is true for every world, and the next call must
  be `reset`. The horizon is the only truncation, so `terminated` never means a time-out.
* `reset(options={"reset_mask": [B]})` restarts only some worlds, as in Gymnasium; from then on every world has its own
  clock (`envs/lifetimes.py` does this, for algorithms that need endless streams of episodes).
* An early end is latched: from the step that ends an episode on, `terminated` stays true, and in the later steps the
  reward is 0 and the observation repeats the last one.
* Actions are [B, A] within a Box, or the numbers [B] (int64) of a Discrete space.
* An action that is not finite, or no number of the space, is an error at once, and so is an observation or a reward
  that is not finite: the message says whose it is. On a GPU the host would have to wait in every step to see it; there
  it is the same error at the horizon, or at the next reset (`checks_late`).
* Equal seeds give equal first observations whatever the tasks, the device and the number of threads; chance during an
  episode comes from the same generator on the CPU. (`MouseCheese` and `Harlow` show a part of their tasks.)
* Under torchrun the worlds of a batch are shared by several processes (envs/processes.py). An algorithm need not know:
  `reset` takes the tasks of all worlds; `noise`, `minibatches` and `choose` draw for all; each process takes its own
  part; `total` adds all parts up.
* `reward(obs, action, next_obs, task)` and `ended(obs)` are pure and static, so that model-based algorithms can call
  them too (`envs/imagined.py`). Where rewards are random (bandits, TabularMDP) it is their mean.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Generator, Tensor

from . import processes

HELD_OUT_CELLS = 50  # the range of a task's first coordinate is cut into this many cells ...
HELD_OUT_EVERY = 5  # ... and every fifth one belongs to the test tasks
TEST_SEED = 20_170_309  # draws the fixed test sets


class NotFinite(FloatingPointError):  # noqa: N818
    """A number that is not finite, of an action, an observation or a reward; the message says whose it is."""


class Unsuitable(TypeError, ValueError):  # noqa: N818
    """An environment that does not keep to this contract; the message says what to change, `example` shows it."""

    example = ""


def refuse_not_finite(line: dict[str, float]) -> None:
    """NotFinite that names those of a line's numbers which are not."""
    wrong = {name: value for name, value in line.items() if not math.isfinite(value)}
    if wrong:
        raise NotFinite(f"not finite: {wrong}")


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside; afterwards, also after an error, as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def have_finite_sum(*tensors: Tensor) -> bool:
    """Whether the sum of all numbers is finite: then each of them is, while a sum can be too large for its type."""
    return math.isfinite(sum(x.sum().item() for x in tensors))


def refuse_unbounded(space: Box, source: str) -> None:
    """Unsuitable, unless actions of this space have finite bounds: a policy's actions are mapped onto them."""
    with np.errstate(over="ignore", invalid="ignore"):
        width = space.high.astype(np.float32) - space.low.astype(np.float32)
    if not np.isfinite(width).all():
        number = int(np.flatnonzero(~np.isfinite(width))[0])
        raise Unsuitable(
            f"number {number} of {source}'s actions is from {space.low.flat[number]} to {space.high.flat[number]}, but "
            "bounds must be finite numbers: give action_space those that a policy should use, and leave wrappers out "
            "that take them away, as ClipAction does; actions are clipped to the bounds in any case"
        )


def held_out_uniform(num_tasks: int, dim: int, generator: Generator, split: str) -> Tensor:
    """Uniform points of the unit cube [num_tasks, dim] in which "train" and "test" never meet.

    The first coordinate is cut into 50 cells; every fifth cell holds the test tasks, the others the training tasks,
    so both splits cover the whole range evenly and no test task is ever trained on. ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    cells = torch.arange(HELD_OUT_CELLS)
    is_test = cells % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    allowed = cells[is_test if split == "test" else ~is_test]
    point = torch.rand(num_tasks, dim, generator=generator)
    cell = allowed[torch.randint(len(allowed), (num_tasks,), generator=generator)]
    point[:, 0] = (cell + point[:, 0].clamp(1e-4, 1 - 1e-4)) / HELD_OUT_CELLS
    return point


def held_out_normal(num_tasks: int, dim: int, generator: Generator, split: str) -> Tensor:
    """Standard normal points [num_tasks, dim] in which "train" and "test" never meet.

    Of each tenth of the first coordinate the middle fifth holds the test tasks, the rest the training tasks; strips
    this thin leave the distribution normal, tails included, in both. ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    point = torch.randn(num_tasks, dim, generator=generator)
    inside = torch.rand(num_tasks, generator=generator).clamp(1e-3, 1 - 1e-3)
    inside = 0.4 + 0.2 * inside if split == "test" else (0.6 + 0.8 * inside) % 1
    point[:, 0] = ((10 * point[:, 0]).floor() + inside) / 10
    return point


def alternating_signs(num_tasks: int, generator: Generator, split: str) -> Tensor:
    """Directions +1, -1, +1, .. [num_tasks, 1] from a random first sign: both equally often in every batch."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    first = torch.randint(2, (1,), generator=generator)
    return (1.0 - 2.0 * ((torch.arange(num_tasks) + first) % 2))[:, None]


def stratified(points: Tensor, count: int, generator: Generator, order: Tensor | None = None) -> Tensor:
    """The numbers [count] of points [M, P] that cover their space evenly, as do the first n of them for every n.

    The points are halved again and again, each time at the middle of the coordinate in which they differ most, until
    there are `count` parts, a power of two up to M; of each part the first point is taken. The two halves take turns;
    which of them begins is drawn, as in Owen's scrambled sequences. Were it always the lower one, the first n points
    would lie in the lower corners of n parts.
    """
    order = torch.arange(len(points)) if order is None else order
    if count == 1:
        return order.min()[None]
    widest = points[order].std(0, correction=0).argmax()
    order = order.sort().values
    order = order[points[order, widest].argsort(stable=True)]
    halves = order.tensor_split(2)
    if torch.rand(1, generator=generator) < 0.5:
        halves = halves[::-1]
    return torch.stack([stratified(points, count // 2, generator, half) for half in halves], 1).flatten()


class TestSet:
    """The fixed test set that task families share, on top of their `sample_tasks`."""

    held_out = "test"  # the split that an evaluation's tasks are of; "valid" where a family has it
    _test_tasks = None

    def test_set(self, num_tasks: int) -> tuple[Tensor, Generator]:
        """Tasks [num_tasks, ..] of the split `held_out`, and a generator of start states and noise: always the same.

        Neither a run's seed nor its algorithm changes them, and smaller sets are the beginning of larger ones (up to
        1,024). They are spread evenly over what "test" tasks are drawn from (`stratified`), each coordinate in units of
        its standard deviation.
        """
        if self._test_tasks is None or len(self._test_tasks) < num_tasks:
            size = max(1024, 2 ** math.ceil(math.log2(num_tasks)))
            drawn = self.sample_tasks(4 * size, Generator().manual_seed(TEST_SEED), self.held_out)
            points = drawn.cpu().double()
            points = points / points.std(0, correction=0).clamp_min(1e-12)
            chosen = stratified(points, size, Generator().manual_seed(TEST_SEED + 2))
            self._test_tasks = drawn[chosen.to(drawn.device)]
        return self._test_tasks[:num_tasks].clone(), Generator().manual_seed(TEST_SEED + 1)

    def test_set_name(self) -> str:
        """What test tasks are called: "held-out tasks" only where none of them is a training task."""
        train, test = (
            {tuple(task) for task in self.sample_tasks(1000, Generator().manual_seed(TEST_SEED), split).tolist()}
            for split in ("train", self.held_out)
        )
        if not train & test:
            return {"test": "held-out tasks", "valid": "validation tasks"}[self.held_out]
        if test <= train and len(train) < 100:
            number = {1: "one", 2: "two", 3: "three"}.get(len(train), str(len(train)))
            return f"test tasks (the training tasks: this family has {number})"
        return "test tasks (some are training tasks)"


class TaskVectorEnv(TestSet, gym.vector.VectorEnv):
    """Base class of the batched task environments; a family implements the five methods marked abstract.

    Args:
        num_envs: number of worlds B.
        max_episode_steps: the horizon T.
        device: where observations, rewards and tasks live.
        dtype: their floating-point type (float64 in the equivalence tests).
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": ["rgb_array"], "render_fps": 20}
    task_dim: int
    can_terminate = False  # whether an episode of this family can end before the horizon
    is_tabular = False  # whether it has `state_features` and `optimal_actions`
    world_state: tuple[str, ...] | None = None  # attributes [B, ..] that the next step depends on, beside tasks and obs
    shard = 0, 1  # the part of all worlds that these are, and the number of parts
    starting: Tensor | None = None  # while `reset` runs: the worlds [B] (bool) that start; None: all

    def __init__(self, num_envs, obs_space, action_space, max_episode_steps=200, device="cpu", dtype=torch.float32):
        if num_envs < 1 or max_episode_steps < 1:
            raise ValueError(f"num_envs and max_episode_steps must be at least 1, got {num_envs}, {max_episode_steps}")
        self.num_envs, self.horizon = num_envs, max_episode_steps
        self.device, self.dtype = torch.device(device), dtype
        self.task_dtype = dtype
        self.single_observation_space, self.single_action_space = obs_space, action_space
        self.observation_space = batch_space(obs_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.is_discrete = isinstance(action_space, Discrete)
        if self.is_discrete:
            self._low, self._high = 0, int(action_space.n) - 1
        else:
            self._low = torch.as_tensor(action_space.low, dtype=dtype, device=self.device)
            self._high = torch.as_tensor(action_space.high, dtype=dtype, device=self.device)
        self._generator = Generator().manual_seed(0)  # on the CPU, so that all devices start from the same states
        self._obs = None
        self.source = type(self).__name__  # where observations and rewards come from, for messages
        self.checks_late = self.device.type == "cuda"  # wrong numbers are told at the horizon, not in their step
        self._wrong_step = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # a world's first; 0: none
        self._wrong_numbers = torch.zeros(num_envs, 1, dtype=dtype, device=self.device)  # all numbers of that step

    @abstractmethod
    def sample_tasks(self, num_tasks: int, generator: Generator, split: str = "train") -> Tensor:
        """Draw tasks [num_tasks, task_dim] on the run's device; "test" tasks are held out where the family allows."""

    @staticmethod
    @abstractmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        """Rewards [..]; obs [.., O], action [.., A] within its bounds (Discrete: [..]), next_obs [.., O], task [.., P].

        The mean, where rewards are random."""

    def state_features(self) -> Tensor:
        """Numbers that describe each state [O, F], of a tabular family: one of few states, in which an episode of any
        length never ends early. The state's number is where the observation is largest."""
        raise NotImplementedError(f"{type(self).__name__} is not tabular")

    def optimal_actions(self, tasks: Tensor) -> Tensor:
        """An action that is optimal, for whoever knows the task, in each step of an episode and each state [N, T, O]
        (int64), of a tabular family."""
        raise NotImplementedError(f"{type(self).__name__} is not tabular")

    @staticmethod
    def task_in_episode(task: Tensor, episode: Tensor) -> Tensor:
        """The tasks [B, P] in episodes of these numbers [B] of a lifetime; in non-stationary families they change."""
        return task

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        """Which observations [.., O] are of states that end an episode [..] (bool), where the observation tells."""
        return torch.zeros_like(obs[..., 0], dtype=torch.bool)

    @abstractmethod
    def _start(self, task: Tensor, generator: Generator) -> Tensor:
        """Put all worlds into start states drawn from `generator` and return the observation [B, O].

        Of the worlds that are not `starting` the `world_state` is put back afterwards."""

    @abstractmethod
    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor, dict]:
        """Move all worlds by one step: next observation [B, O], ended early [B] (bool), info; `step` latches ends."""

    def _transition_reward(self, action: Tensor, next_obs: Tensor) -> Tensor:
        """Reward [B] of the current step; random rewards and those of envs/adapter.py are what `_advance` kept."""
        return self.reward(self._obs, action, next_obs, self.tasks)

    def render_frame(self, index: int = 0) -> np.ndarray:
        """An RGB picture [height, width, 3] (uint8) of one world."""
        raise NotImplementedError(f"{type(self).__name__} cannot be rendered")

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Start all episodes, or those of `options={"reset_mask": [B]}` (bool): obs [B, O], info.

        `options={"tasks": [B, task_dim]}` sets the tasks of the worlds that start, otherwise they draw fresh training
        tasks; under torchrun these may be the tasks of all processes' worlds. Raises ValueError for tasks of another
        shape or with numbers that are not finite and for another mask, NotImplementedError where a family's worlds
        can only start together, NotFinite for an observation that is not finite."""
        self._refuse_late()
        mask, before = (options or {}).get("reset_mask"), {}
        if mask is not None:
            before, mask = self._per_world(), torch.as_tensor(mask, device=self.device)
            if mask.shape != (self.num_envs,) or mask.dtype != torch.bool:
                raise ValueError(f"reset_mask must be bool [{self.num_envs}], got {mask.dtype} {list(mask.shape)}")
        if seed is not None:
            self._generator.manual_seed(seed)
        tasks = (options or {}).get("tasks")
        if tasks is None:
            # A generator of their own: drawing tasks must not change the start states.
            own = Generator().manual_seed(int(torch.randint(2**62, (1,), generator=self._generator)))
            tasks = self.share(self.sample_tasks(self.num_envs * self.shard[1], own))
        else:
            torch.randint(2**62, (1,), generator=self._generator)
        tasks = torch.as_tensor(tasks, dtype=self.task_dtype, device=self.device)
        if len(tasks) == self.num_envs * self.shard[1]:
            tasks = self.share(tasks)
        if tasks.shape != (self.num_envs, self.task_dim):
            raise ValueError(f"tasks must have shape {(self.num_envs, self.task_dim)}, got {tuple(tasks.shape)}")
        if not torch.isfinite(tasks).all():
            raise ValueError("non-finite task")
        self.tasks = tasks
        self._steps = 0
        self._over = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.starting = mask
        self._obs = self._start(tasks, self._generator)
        if mask is not None:
            self._keep(before, ~mask)
        if not have_finite_sum(self._obs):
            self._look_closely(self._steps, observation=self._obs)
        return self._obs.clone(), {}

    def _per_world(self) -> dict:
        """All that the next step depends on, by name: [B, ..] each."""
        if self.world_state is None:
            raise NotImplementedError(f"worlds of {type(self).__name__} can only start together")
        if self._obs is None:
            raise gym.error.ResetNeeded("call reset() before anything else")
        if not isinstance(self._steps, Tensor):
            self._steps = torch.full((self.num_envs,), self._steps, device=self.device)
        return {name: getattr(self, name) for name in ("tasks", "_steps", "_over", "_obs", *self.world_state)}

    def _keep(self, before: dict, kept: Tensor) -> None:
        """Of the worlds where `kept` [B] is true, take back what they were."""
        for name, now in self._per_world().items():
            rows = kept.reshape(-1, *[1] * (now.ndim - 1)).to(now.device)
            setattr(self, name, torch.where(rows, before[name], now))

    def share(self, x: Tensor, dim: int = 0) -> Tensor:
        """This process's part of what was made for all processes' tasks or worlds, which lie along `dim`."""
        return x.tensor_split(self.shard[1], dim)[self.shard[0]]

    def gather(self, x: Tensor) -> Tensor:
        """The parts [N, ..] of all processes, equal in size, as one [processes * N, ..]."""
        return processes.gather(x) if self.shard[1] > 1 else x

    def noise(self, generator: Generator, *shape: int, dim: int = 0, uniform: bool = False) -> Tensor:
        """Standard normal numbers of this shape, or uniform ones from 0 to 1, on the worlds' device.

        Tasks lie along `dim`. Under torchrun `shape` has room for the tasks of all processes; each draws the same
        numbers and takes the part that belongs to its own worlds.
        """
        draw = torch.rand if uniform else torch.randn
        return self.share(draw(shape, generator=generator, device=generator.device), dim).to(self.device, self.dtype)

    def minibatches(self, number: int, parts: int, generator: Generator) -> Iterator[Tensor]:
        """A random order of the numbers below `number`, cut into `parts`, on the worlds' device.

        Under torchrun each process gets its own share of every part.
        """
        for rows in torch.randperm(number, generator=generator).tensor_split(parts):
            yield self.share(rows).to(self.device)

    def choose(self, number: int, count: int, generator: Generator) -> Tensor:
        """`count` different numbers below `number`, in random order, on the generator's device.

        Under torchrun each process gets its own share of them.
        """
        keys = torch.rand(number, generator=generator, device=generator.device)
        return self.share(keys.argsort()[:count])

    def total(self, x: Tensor) -> int:
        """The sum of x, such as of steps played, over all worlds, those of other processes included."""
        return int(self.gather(x.sum().reshape(1)).sum())

    def one_thread(self) -> AbstractContextManager[None]:
        """One thread of torch while worlds play: a single step's small matrices gain nothing from more, and waiting
        threads that spin would take the cores from the physics. Afterwards, also after an error, as many as before."""
        return one_thread()

    def _draw(self, function, generator: Generator, *shape: int, **kwargs) -> Tensor:
        """Random numbers [B, *shape] for these worlds, of those that one process would draw for all worlds."""
        return self.share(function(self.num_envs * self.shard[1], *shape, generator=generator, **kwargs))

    def save_worlds(self) -> dict[str, Tensor]:
        """Everything that coming steps and resets depend on, for checkpoints."""
        return self._per_world() | {"generator": self._generator.get_state()}

    def load_worlds(self, saved: dict[str, Tensor]) -> None:
        """Continue where `save_worlds` was called, bit-identically on the CPU, in worlds that have been reset once."""
        for name, now in self._per_world().items():
            setattr(self, name, saved[name].clone().to(now))
        self._generator.set_state(saved["generator"])

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """Advance all worlds by `action` [B, A], clipped to its bounds, or int64 [B] (Discrete): obs [B, O], reward,
        terminated, truncated [B], info. Raises ResetNeeded after the horizon, ValueError for an action of another
        shape; NotFinite for an action, observation or reward that is not finite and ValueError for an action that is no
        number of a Discrete space, with `checks_late` not before the horizon, where all worlds reach it together."""
        if self._obs is None or self.at_horizon:
            raise gym.error.ResetNeeded("call reset() before the first step and for worlds at the horizon")
        tells_late = self.checks_late and not isinstance(self._steps, Tensor)
        given = self._checked(action)
        if not tells_late and not self._are_allowed(given):
            self._look_closely(self._steps + 1, action=self._marked(given))
        action = given if self.is_discrete and not tells_late else given.clamp(self._low, self._high)
        next_obs, ended, info = self._advance(action)
        if self.can_terminate:
            next_obs = torch.where(self._over[:, None], self._obs, next_obs)
        reward = self._transition_reward(action, next_obs)
        if self.can_terminate:
            reward = torch.where(self._over, 0.0, reward)
            self._over = self._over | ended
        if tells_late:
            self._remember(self._marked(given), next_obs, reward)
        elif not have_finite_sum(next_obs, reward):
            self._look_closely(self._steps + 1, observation=next_obs, reward=reward)
        self._obs = next_obs
        self._steps = self._steps + 1
        if not isinstance(self._steps, Tensor) and self._steps == self.horizon:
            self._refuse_late()
        truncated = torch.zeros_like(self._over) | (self._steps >= self.horizon)
        return next_obs.clone(), reward, self._over.clone(), truncated, info

    @property
    def at_horizon(self) -> bool:
        """Whether a world has reached the horizon, so that its `reset` must come next."""
        reached = self._steps >= self.horizon
        return reached if isinstance(reached, bool) else bool(reached.any())

    def _checked(self, action: Tensor) -> Tensor:
        action = torch.as_tensor(action, dtype=None if self.is_discrete else self.dtype, device=self.device)
        if action.shape != self.action_space.shape:
            raise ValueError(f"action must have shape {self.action_space.shape}, got {tuple(action.shape)}")
        if self.is_discrete and action.dtype != torch.int64:
            raise ValueError(f"action must be int64, the number of a choice, got {action.dtype}")
        return action

    def _are_allowed(self, action: Tensor) -> bool:
        if not self.is_discrete:
            return have_finite_sum(action)
        least, most = action.aminmax()
        return self._low <= least.item() and most.item() <= self._high

    def _marked(self, action: Tensor) -> Tensor:
        """Of a Box the action itself; of a Discrete space NaN where it is no number of the space, elsewhere 0."""
        if not self.is_discrete:
            return action
        return torch.where((action >= self._low) & (action <= self._high), 0.0, torch.nan)

    def _look_closely(self, steps: int | Tensor, **numbers: Tensor) -> None:
        """The error for the first world in which one of the numbers [B, ..] is not finite, if there is one."""
        are_wrong = [~torch.isfinite(x).reshape(self.num_envs, -1).all(1) for x in numbers.values()]
        for world in torch.stack(are_wrong).any(0).nonzero().flatten().tolist():
            step = int(steps[world]) if isinstance(steps, Tensor) else steps
            self._refuse(world, step, **{name: x[world] for name, x in numbers.items()})

    def _remember(self, *numbers: Tensor) -> None:
        """Keep, on the device, the numbers of each world's first step that has one which is not finite."""
        numbers = torch.cat([x.reshape(self.num_envs, -1).to(self.dtype) for x in numbers], 1)
        first = (self._wrong_step == 0) & ~torch.isfinite(numbers).all(1)
        self._wrong_step = torch.where(first, self._steps + 1, self._wrong_step)
        self._wrong_numbers = torch.where(first[:, None], numbers, self._wrong_numbers)

    def _refuse_late(self) -> None:
        """The error for the first wrong number of the episode, if there was one: a GPU is asked once an episode."""
        if self.checks_late and (wrong := self._wrong_step > 0).any():
            step = int(self._wrong_step[wrong].min())
            world = int((self._wrong_step == step).nonzero()[0])
            self._wrong_step = torch.zeros_like(self._wrong_step)
            numbers = self._wrong_numbers[world]
            size = math.prod(self.action_space.shape[1:])  # of an action; its numbers come first, the reward last
            self._refuse(world, step, action=numbers[:size], observation=numbers[size:-1], reward=numbers[-1])

    def _refuse(self, world: int, step: int, **numbers: Tensor) -> None:
        """The error for the first of a world's numbers in this step that is not finite."""
        name, wrong = next((name, x[~torch.isfinite(x)]) for name, x in numbers.items() if not torch.isfinite(x).all())
        if name != "action":
            raise NotFinite(f"{name} {wrong[0]} in world {world}, step {step}, from {self.source}")
        if self.is_discrete:
            raise ValueError(f"action must be 0 to {self._high}, which it is not in world {world}, step {step}")
        raise NotFinite(f"non-finite action in world {world}, step {step}, from the policy")

    @property
    def knows_reward(self) -> bool:
        """Whether the rewards of steps are those of `reward`, and not random or only known to an environment."""
        return type(self)._transition_reward is TaskVectorEnv._transition_reward

    def check_reward(self) -> None:
        """Unsuitable if `reward` is not what steps return: of an environment that only its author knows."""

    def another(self, num_envs: int) -> "TaskVectorEnv":
        """Another batch of the same family, horizon and device."""
        return type(self)(num_envs, max_episode_steps=self.horizon, device=self.device, dtype=self.dtype)

    def single_world(self) -> "TaskVectorEnv":
        """One world of the same family, horizon and device, for pictures."""
        return self.another(1)


class SingleTaskEnv(gym.Env):
    """One world of a batched family as a usual Gymnasium environment: NumPy arrays, rendering, a `TimeLimit`.

    `reset(options={"task": [task_dim]})` sets the task, otherwise a training task is drawn; `info["task"]` names it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, family: type[TaskVectorEnv], render_mode: str | None = None, **kwargs):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be None or "rgb_array", got {render_mode!r}')
        self.render_mode = render_mode
        self.batch = family(num_envs=1, max_episode_steps=2**31, **kwargs)
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        task = (options or {}).get("task")
        tasks = None if task is None else {"tasks": torch.as_tensor(np.array(task)).reshape(1, -1)}
        obs, info = self.batch.reset(seed=seed, options=tasks)
        return obs[0].cpu().numpy(), {**info, "task": self.batch.tasks[0].cpu().numpy()}

    def step(self, action):
        obs, reward, terminated, _, info = self.batch.step(torch.as_tensor(np.array(action))[None])
        info = {name: value[0].cpu().numpy() if isinstance(value, Tensor) else value for name, value in info.items()}
        return obs[0].cpu().numpy(), float(reward[0]), bool(terminated[0]), False, info

    def render(self):
        return None if self.render_mode is None else self.batch.render_frame(0)


class ScaleActions(gym.vector.VectorWrapper):
    """Maps actions in [-scale, scale] linearly onto the family's bounds; beyond them the family clips, as always.

    A policy of standard deviation 1 then explores with 1 / scale of the range. Unsuitable (a TypeError) unless actions
    are a Box with finite bounds.
    """

    def __init__(self, envs: TaskVectorEnv, scale: float):
        super().__init__(envs)
        space = envs.single_action_space
        if not isinstance(space, Box):
            raise Unsuitable(f"only actions in a Box can be scaled, got {space}")
        refuse_unbounded(space, envs.unwrapped.source)
        self.scale, self.low, self.range = scale, envs.unwrapped._low, envs.unwrapped._high - envs.unwrapped._low
        self.single_action_space = Box(-scale, scale, space.shape, space.dtype)
        self.action_space = batch_space(self.single_action_space, envs.num_envs)

    def mapped(self, action: Tensor) -> Tensor:
        """Actions [.., A] in the family's units, not yet clipped to its bounds."""
        return self.low + (action / self.scale + 1) / 2 * self.range

    def executed(self, action: Tensor) -> Tensor:
        """Actions [.., A] as the family executes them, in its units and clipped to its bounds."""
        return self.mapped(action).clamp(self.unwrapped._low, self.unwrapped._high)

    def step(self, action: Tensor):
        return self.env.step(self.mapped(action))

    def single_world(self) -> "ScaleActions":
        """One world of the same family, horizon, device and action scale, for pictures."""
        return ScaleActions(self.unwrapped.single_world(), self.scale)


class SupervisedTasks(TestSet):
    """The contract of supervised task families: examples (x, y) of a hidden function or of hidden classes.

        tasks = data.sample_tasks(N, generator, split="train")                # [N, P], "test" is held out
        support, query = data.sample(tasks, (K, Q), generator)                # (x [N, B, X], y [N, B, Y]) each

    Args:
        device: where tasks and examples live; random numbers are drawn on the CPU, the same for all devices.
        dtype: the examples' floating-point type.
    """

    num_inputs: int  # X
    num_outputs: int  # Y
    is_classification = False  # then y is one-hot, of booleans

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype

    @property
    def unwrapped(self) -> "SupervisedTasks":
        """Itself, as a batch of worlds without a wrapper."""
        return self

    @abstractmethod
    def sample_tasks(self, num_tasks: int, generator: Generator, split: str = "train") -> Tensor:
        """Draw tasks [num_tasks, P]; "test" tasks are disjoint from training tasks. ValueError for another split."""

    @abstractmethod
    def sample(self, tasks: Tensor, sizes: tuple[int, ...], generator: Generator) -> list[tuple[Tensor, Tensor]]:
        """For each size a set of examples (x [N, B, X], y [N, B, Y]) of every task; no example is in two sets.

        B is the size, or for classification ways * size: that many of each class.
        """
