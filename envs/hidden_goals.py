"""Open grids with a goal that is not seen: GridNavi of VariBAD, the dark rooms of DPT and AD. Plain torch."""

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from .core import TaskVectorEnv

MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))  # of columns and rows: stay, up, right, down, left


class GridNavi(TaskVectorEnv):
    """Find a goal that is not seen, and come back to it: the best search enters no cell twice.

    Source: Zintgraf et al. 2020 (VariBAD, arXiv:1910.08348), section 5.1, and the authors' code.
    Observation: the cell, one-hot [25]; cell 5 row + column, from the lower left corner, where every episode starts.
    Action: stay, up, right, down, left; the border stops.
    Reward: 1 for each step that ends on the goal, -0.1 for every other. Only the horizon ends an episode.
    Tasks: [2] = column and row of the goal, one of the 21 cells that are more than one step, diagonal ones included,
    from the start. Every goal is for training and for tests, as in the paper; `GridNaviUnseen` holds goals out.
    Horizon: 15. The paper's trials are 4 episodes of one task.
    Differs: the authors' observation is column and row as two numbers.
    """

    side = 5
    start = (0, 0)  # column and row
    off_goal = -0.1  # reward of a step that ends elsewhere
    clear = 1  # no goal is within so many steps of the start, diagonal ones included
    task_dim = 2
    is_tabular = True
    world_state = ()

    def __init__(self, num_envs, max_episode_steps=15, device="cpu", dtype=torch.float32):
        space = Box(0, 1, (self.side**2,), np.float32)
        super().__init__(num_envs, space, Discrete(len(MOVES)), max_episode_steps, device, dtype)
        self._moves = torch.tensor(MOVES, device=self.device)

    @classmethod
    def goals(cls, split: str = "train") -> Tensor:
        """All goals [G, 2], column and row, of training tasks or of those for tests; ValueError for another split."""
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        cells = torch.cartesian_prod(torch.arange(cls.side), torch.arange(cls.side))
        far = (cells - torch.tensor(cls.start)).abs().amax(dim=1) > cls.clear
        return cells[far]

    def sample_tasks(self, num_tasks, generator, split="train"):
        goals = self.goals(split)
        return goals[torch.randint(len(goals), (num_tasks,), generator=generator)].to(self.device, self.dtype)

    @classmethod
    def reward(cls, obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        goal = (cls.side * task[..., 1] + task[..., 0]).long()
        found = next_obs.gather(-1, goal[..., None]).squeeze(-1)
        return cls.off_goal + (1 - cls.off_goal) * found

    def state_features(self):
        """The column and the row, both one-hot: what holds in a cell can be told from others of its column and row."""
        one = torch.eye(self.side, dtype=self.dtype, device=self.device)
        return torch.cat([one.repeat(self.side, 1), one.repeat_interleave(self.side, dim=0)], dim=1)

    def optimal_actions(self, tasks):
        """A shortest way, first to the goal's column, as the authors of DPT take it; then stay."""
        cell = torch.arange(self.side**2, device=self.device)
        place = torch.stack([cell % self.side, cell // self.side], dim=1)
        right, up = (tasks[:, None] - place).sign().unbind(dim=2)  # [N, O], 1, 0 or -1 each
        stay = torch.zeros_like(right, dtype=torch.int64)
        sideways = torch.where(right > 0, MOVES.index((1, 0)), MOVES.index((-1, 0)))
        along = torch.where(up > 0, MOVES.index((0, 1)), MOVES.index((0, -1)))
        action = torch.where(right != 0, sideways, torch.where(up != 0, along, stay))
        return action[:, None].expand(-1, self.horizon, -1)

    def _one_hot(self, cell):
        return torch.nn.functional.one_hot(cell, self.side**2).to(self.dtype)

    def _start(self, task, generator):
        column, row = self.start
        return self._one_hot(torch.full((self.num_envs,), self.side * row + column, device=self.device))

    def _advance(self, action):
        cell = self._obs.argmax(dim=1)
        place = torch.stack([cell % self.side, cell // self.side], dim=1) + self._moves[action]
        column, row = place.clamp(0, self.side - 1).unbind(1)
        return self._one_hot(self.side * row + column), self._over, {}

    def render_frame(self, index=0):
        """The grid from above: the walker in blue, the goal in yellow."""
        frame = np.full((40 * self.side, 40 * self.side, 3), 255, np.uint8)
        frame[::40] = frame[:, ::40] = (200, 200, 200)
        rows, columns = np.mgrid[: len(frame), : len(frame)]
        walker = divmod(int(self._obs[index].argmax()), self.side)
        goal = int(self.tasks[index, 1]), int(self.tasks[index, 0])
        for (row, column), radius, colour in ((goal, 15, (240, 190, 40)), (walker, 9, (40, 80, 200))):
            middle = 40 * (self.side - 1 - row) + 20, 40 * column + 20
            frame[(rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 <= radius**2] = colour
        return frame


class GridNaviUnseen(GridNavi):
    """`GridNavi` whose tests have goals that training never sees: each fifth of the 21, four in all."""

    @classmethod
    def goals(cls, split="train"):
        every = super().goals(split)
        is_test = torch.arange(len(every)) % 5 == 2
        return every[is_test if split == "test" else ~is_test]


class DarkRoom(GridNavi):
    """A larger grid, in which a search costs nothing but time.

    Source: Lee et al. 2023 (DPT, arXiv:2306.14892), section 5.2, and the authors' code.
    Observation: the cell, one-hot [100]; cell 10 row + column, from the corner where every episode starts.
    Action: stay, up, right, down, left; the border stops.
    Reward: 1 for each step that ends on the goal, else 0.
    Tasks: [2] = column and row of the goal, any of the 100 cells: 80 for training, 20 for tests.
    Horizon: 100.
    Differs: the authors' observation is the place as two numbers, and their actions have another order.
    """

    side = 10
    off_goal = 0.0
    clear = -1  # the start may be the goal, too

    def __init__(self, num_envs, max_episode_steps=100, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, max_episode_steps, device, dtype)

    @classmethod
    def goals(cls, split="train"):
        every = super().goals(split)
        # By a shift in each column, so that those for tests are spread over the whole room.
        is_test = (every[:, 1] + 2 * every[:, 0]) % 5 == 2
        return every[is_test if split == "test" else ~is_test]


class DarkRoomSmall(DarkRoom):
    """The dark room of Laskin et al. 2022 (AD, arXiv:2210.14215): 9 x 9 cells, from the middle, 20 steps.

    Observation [81]. All else is as in `DarkRoom`; 64 goals are for training, 17 for tests.
    """

    side = 9
    start = (4, 4)

    def __init__(self, num_envs, max_episode_steps=20, device="cpu", dtype=torch.float32):
        super().__init__(num_envs, max_episode_steps, device, dtype)
