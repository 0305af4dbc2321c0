"""Grid worlds in which exploring once pays for a lifetime: hidden goals and objects of unknown worth. Plain torch."""

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.nn.functional import one_hot

from .core import TaskVectorEnv, alternating_signs, held_out_uniform

CROSS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right: rows, columns
REVERSED = ((1, 0), (-1, 0), (0, 1), (0, -1))
DIAGONAL = (*CROSS, (-1, -1), (-1, 1), (1, -1), (1, 1))
ABC = ("K...A", ".....", "..s..", ".....", "B...C")
ROOMS = (
    ".....#.....",
    ".....#.....",
    "..s........",
    ".....#.....",
    ".....#.....",
    "##.#####.##",
    ".....#.....",
    ".....#.....",
    "...........",
    ".....#.....",
    ".....#.....",
)
*OBJECTS, KEY = ("".join(ABC).index(letter) for letter in "ABCK")  # cells
SIDE = len(ROOMS)
GOALS = [i for i, letter in enumerate("".join(ROOMS)) if letter == "."]


def at_objects(obs: Tensor) -> Tensor:
    """Whether the agent is at A, B, C [.., 3], of observations [.., O]. (A list as an index is copied to a GPU.)"""
    return torch.stack([obs[..., cell] for cell in OBJECTS], dim=-1)


class GridWorld(TaskVectorEnv):
    """Base class: a map, from which cells [B] move by a table; its edge and walls (#) stop a move, s is the start.

    Observation: the cell, one-hot, row by row. Action: one of `moves`.
    """

    can_terminate = True
    world_state = ("_cell",)
    map: tuple[str, ...]
    moves = CROSS

    def __init__(self, num_envs, max_episode_steps=10, device="cpu", dtype=torch.float32, more_obs=0):
        rows, columns, letters = len(self.map), len(self.map[0]), "".join(self.map)
        self.num_cells, self.start = len(letters), letters.index("s")
        space = Box(0, 1, (self.num_cells + more_obs,), np.float32)
        super().__init__(num_envs, space, Discrete(len(self.moves)), max_episode_steps, device, dtype)

        def leads_to(cell, move):
            row, column = cell // columns + move[0], cell % columns + move[1]
            inside = 0 <= row < rows and 0 <= column < columns
            return row * columns + column if inside and self.map[row][column] != "#" else cell

        table = [[leads_to(cell, move) for move in self.moves] for cell in range(self.num_cells)]
        self._table = torch.tensor(table, device=self.device)  # [cells, actions]

    def _observe(self):
        return one_hot(self._cell, self.num_cells).to(self.dtype)

    def _start(self, task, generator):
        self._cell = torch.full((self.num_envs,), self.start, device=self.device)
        return self._observe()

    def _advance(self, action):
        self._cell = torch.where(self._over, self._cell, self._table[self._cell, action])
        obs = self._observe()
        return obs, self._ends(obs), {}

    def _ends(self, obs: Tensor) -> Tensor:
        """Which worlds [B] (bool) have reached what ends an episode."""
        return self.ended(obs)

    def colours(self, index: int) -> dict[int, tuple[int, int, int]]:
        """The colours of a world's cells that have one; for pictures."""
        raise NotImplementedError

    def render_frame(self, index=0):
        """The map from above: walls in grey, the agent in blue, goals and objects in the family's colours."""
        cells = np.full((self.num_cells, 3), 255, np.uint8)
        cells[[i for i, letter in enumerate("".join(self.map)) if letter == "#"]] = 90
        for cell, colour in self.colours(index).items():
            cells[cell] = colour
        size = 240 // len(self.map)
        frame = cells.reshape(len(self.map), -1, 3).repeat(size, axis=0).repeat(size, axis=1)
        rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]]
        row, column = divmod(int(self._cell[index]), len(self.map[0]))
        middle = (rows - (row + 0.5) * size) ** 2 + (columns - (column + 0.5) * size) ** 2
        frame[middle <= (0.3 * size) ** 2] = (40, 80, 200)
        return frame


class EmptyRooms(GridWorld):
    """Four empty rooms, and somewhere a goal that cannot be seen, in the same place for a lifetime.

    Source: Zheng et al. 2020 (arXiv:1912.05500), section 4.1.
    Observation: the cell [121] of 11 x 11, one-hot, starting in the middle of the upper left room; never the goal.
    Action: up, down, left, right; the walls between the rooms have four doors.
    Reward: 1 for the step that reaches the goal, which ends the episode; else 0.
    Tasks: row and column [2] of the goal, any free cell but the start; every fifth of the 103 is for tests.
    Horizon: 100. The paper's lifetimes are 200 episodes.
    Differs: the paper's picture is not to scale; the size, the doors and the start are this project's.
    """

    task_dim = 2
    map = ROOMS

    def __init__(self, num_envs, max_episode_steps=100, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        goals = torch.tensor([goal for i, goal in enumerate(GOALS) if (i % 5 == 2) == (split == "test")])
        goal = goals[torch.randint(len(goals), (num_tasks,), generator=generator)]
        return torch.stack([goal // SIDE, goal % SIDE], dim=1).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        goal = (SIDE * task[..., 0] + task[..., 1]).long()
        return next_obs.gather(-1, goal[..., None]).squeeze(-1)

    def _ends(self, obs):
        return self.reward(None, None, obs, self.tasks) > 0

    def colours(self, index):
        row, column = self.tasks[index].long().tolist()
        return {SIDE * row + column: (240, 190, 40)}


class RandomABC(GridWorld):
    """A room with three objects whose worth differs from lifetime to lifetime; each ends the episode.

    Source: Zheng et al. 2020 (arXiv:1912.05500), section 4.2.
    Observation: the cell [25] of 5 x 5, one-hot, starting in the middle; A lies in the upper right corner, B in the
    lower left, C in the lower right. Action: up, down, left, right.
    Reward: the worth of the object that the step reaches, which ends the episode; else 0.
    Tasks: the worth [3] of A, uniform in [-1, 1], of B, in [-0.5, 0], and of C, in [0, 0.5]; test tasks have worths of
    A in strips that training never sees.
    Horizon: 10. The paper's lifetimes are 50 episodes.
    Differs: the places of the objects and of the start are this project's.
    """

    task_dim = 3
    map = ABC
    low, high = (-1.0, -0.5, 0.0), (1.0, 0.0, 0.5)

    def sample_tasks(self, num_tasks, generator, split="train"):
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return (low + (high - low) * held_out_uniform(num_tasks, 3, generator, split)).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return (at_objects(next_obs) * task).sum(-1)

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return at_objects(obs).sum(-1) > 0

    def colours(self, index):
        return dict(zip(OBJECTS, ((210, 60, 60), (120, 120, 120), (60, 160, 80)), strict=True))


class RandomABCReversed(RandomABC):
    """`RandomABC` for a body whose actions do the opposite: down, up, right, left.

    Source: Zheng et al. 2020 (arXiv:1912.05500), section 4.5, "permuted actions".
    Observation, reward, tasks, horizon: as `RandomABC`.
    Differs: as `RandomABC`.
    """

    moves = REVERSED


class RandomABCDiagonal(RandomABC):
    """`RandomABC` for a body that can also move diagonally: also up-left, up-right, down-left, down-right.

    Source: Zheng et al. 2020 (arXiv:1912.05500), section 4.5, "extended actions".
    Observation, reward, tasks, horizon: as `RandomABC`.
    Differs: as `RandomABC`.
    """

    moves = DIAGONAL


class SymABC(RandomABC):
    """`RandomABC` in which no object is known to be safe.

    Source: none; a variant of `RandomABC` without its local optimum "always C".
    Observation, action, reward: as `RandomABC`.
    Tasks: the worth [3] of A, B and C, each uniform in [-1, 1]; test tasks as `RandomABC`.
    Horizon: 10.
    Differs: the bounds of the worths of B and C.
    """

    low, high = (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)


class SymABCReversed(SymABC):
    """`SymABC` for a body whose actions do the opposite; see `RandomABCReversed`."""

    moves = REVERSED


class SymABCDiagonal(SymABC):
    """`SymABC` for a body that can also move diagonally; see `RandomABCDiagonal`."""

    moves = DIAGONAL


class FixedABC(RandomABC):
    """`RandomABC` in which the worths are always the same: there is nothing to find out in a lifetime.

    Source: Zheng et al. 2020 (arXiv:1912.05500), section 4.1.
    Observation, action, reward, horizon: as `RandomABC`.
    Tasks: one, the worths (1, -0.5, 0.5).
    Differs: as `RandomABC`; the three numbers are this project's.
    """

    low = high = (1.0, -0.5, 0.5)


class NonstationaryABC(RandomABC):
    """`RandomABC` in which A and C change places in what they are worth, several times in a lifetime.

    Source: Zheng et al. 2020 (arXiv:1912.05500), section 4.3.
    Observation, action, reward, horizon: as `RandomABC`.
    Tasks: the worths (1, -0.5, -1) or (-1, -0.5, 1), alternating; there are no others for tests. In a lifetime
    (`Lifetimes`) the worths of A and C change their signs every 250 episodes.
    Differs: as `RandomABC`. The paper's lifetimes are 1,000 episodes.
    """

    swap_every = 250

    def sample_tasks(self, num_tasks, generator, split="train"):
        sign = alternating_signs(num_tasks, generator, split)
        return torch.cat([sign, torch.full_like(sign, -0.5), -sign], dim=1).to(self.device, self.dtype)

    @staticmethod
    def task_in_episode(task, episode):
        sign = 1 - 2 * (episode // NonstationaryABC.swap_every % 2)
        return torch.stack([task[:, 0] * sign, task[:, 1], task[:, 2] * sign], dim=1)


class KeyBox(RandomABC):
    """`RandomABC` in which the objects are boxes, and a key must be fetched first.

    Source: Zheng et al. 2020 (arXiv:1912.05500), section 4.1.
    Observation: [26] = the cell, one-hot, starting in the middle, and whether the agent has the key, which lies in the
    upper left corner. Action, tasks: as `RandomABC`.
    Reward: -0.1 for the step that takes the key; with the key, the worth of the box that the step reaches, which ends
    the episode. Without it nothing happens at a box.
    Horizon: 100. The paper's lifetimes are 5,000 episodes.
    Differs: as `RandomABC`; a later version of the paper may have no cost of the key.
    """

    world_state = ("_cell", "_key")

    def __init__(self, num_envs, max_episode_steps=100, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, max_episode_steps, device, dtype, more_obs=1)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        has_key = next_obs[..., -1]
        return has_key * (at_objects(next_obs) * task).sum(-1) - 0.1 * (has_key - obs[..., -1])

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return obs[..., -1] * at_objects(obs).sum(-1) > 0

    def _start(self, task, generator):
        self._key = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return super()._start(task, generator)

    def _observe(self):
        self._key = self._key | (self._cell == KEY)
        return torch.cat([super()._observe(), self._key[:, None].to(self.dtype)], dim=1)

    def colours(self, index):
        return super().colours(index) | ({} if self._key[index] else {KEY: (240, 190, 40)})
