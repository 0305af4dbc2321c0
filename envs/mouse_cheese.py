"""A mouse in a small maze looks for a cheese it cannot see. Plain torch, on the run's device."""

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from .core import TaskVectorEnv

SIDE = 9  # a frame of walls around four rooms of 3 x 3 cells, with a cross of walls between them
START = SIDE + 1  # cells are numbered row by row; this is the upper left corner of the upper left room
MOVES = (-SIDE, SIDE, -1, 1)  # up, down, left, right
FIRST_DOOR = ((1, 4), (5, 4), (4, 1), (4, 5))  # of each arm of the cross, the cell that door position 0 opens
ALONG = (SIDE, SIDE, 1, 1)  # from a door position to the next
ROOM_CELLS = [SIDE * row + column for row in (1, 2, 3, 5, 6, 7) for column in (1, 2, 3, 5, 6, 7)]


def walls(tasks: Tensor) -> Tensor:
    """Which cells [N, 81] are walls in the mazes of tasks [N, 6]."""
    line = torch.arange(SIDE, device=tasks.device) % (SIDE // 2) == 0  # the first, the middle and the last
    blocked = (line[:, None] | line).flatten().repeat(len(tasks), 1)
    first = torch.tensor([SIDE * row + column for row, column in FIRST_DOOR], device=tasks.device)
    doors = first + tasks[:, :4].long() * torch.tensor(ALONG, device=tasks.device)
    return blocked.scatter(1, doors, False)


def cheese(tasks: Tensor) -> Tensor:
    """The cell [..] of the cheese of tasks [.., 6]."""
    return (SIDE * tasks[..., 4] + tasks[..., 5]).long()


def shortest_path(tasks: Tensor) -> Tensor:
    """Steps [N] of the shortest path from the start to the cheese, by breadth-first search in all mazes at once."""
    free = ~walls(tasks)
    reached = torch.zeros_like(free)
    reached[:, START] = True
    steps = torch.zeros(len(tasks), dtype=torch.int64, device=tasks.device)
    for _ in range(SIDE**2):
        steps += ~reached.gather(1, cheese(tasks)[:, None]).squeeze(1)
        spread = reached | sum(reached.roll(move, dims=1) for move in MOVES).bool()  # the frame stops what wraps around
        reached = spread & free
    return steps


class MouseCheese(TaskVectorEnv):
    """A mouse walks through four rooms to a hidden cheese: it must search in the first episode, and then remember.

    Source: the navigation of Duan et al. 2016 (RL2, arXiv:1611.02779), section 3.3, made small: a grid from above.
    Observation: [2 * 81] = planes of the walls and of the mouse, row by row; never the cheese. The mouse starts in the
    upper left corner. Action: up, down, left, right; a wall stops the mouse.
    Reward: 1 for the step that reaches the cheese, which ends the episode, -0.01 for every other step.
    Tasks: [6] = the positions (0, 1, 2) of the upper, lower, left and right door, then row and column of the cheese, in
    any cell of a room but the start. 54 mazes are for training and 27 for tests: those whose positions sum to a
    multiple of 3. The maze shows in the observation, so first observations differ between tasks.
    Horizon: 30. Trials are several episodes of one task.
    Differs: the paper's mazes are seen through the mouse's eyes, in continuous steps, and have other sizes.
    """

    task_dim = 6
    can_terminate = True

    def __init__(self, num_envs, max_episode_steps=30, device="cpu", dtype=torch.float32):
        space = Box(0, 1, (2 * SIDE**2,), np.float32)
        super().__init__(num_envs, space, Discrete(len(MOVES)), max_episode_steps, device, dtype)
        self._moves = torch.tensor(MOVES, device=self.device)

    def sample_tasks(self, num_tasks, generator, split="train"):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        mazes = torch.cartesian_prod(*4 * [torch.arange(3)])
        mazes = mazes[(mazes.sum(dim=1) % 3 == 0) == (split == "test")]
        maze = mazes[torch.randint(len(mazes), (num_tasks,), generator=generator)]
        places = torch.tensor([cell for cell in ROOM_CELLS if cell != START])
        place = places[torch.randint(len(places), (num_tasks,), generator=generator)]
        return torch.column_stack([maze, place // SIDE, place % SIDE]).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        found = next_obs.gather(-1, SIDE**2 + cheese(task)[..., None]).squeeze(-1) > 0
        return torch.where(found, 1.0, -0.01).to(next_obs.dtype)

    def _planes(self):
        mouse = torch.nn.functional.one_hot(self.path[-1], SIDE**2)
        return torch.cat([self._walls, mouse], dim=1).to(self.dtype)

    def _start(self, task, generator):
        self._walls = walls(task)
        self.path = [torch.full((self.num_envs,), START, device=self.device)]  # the cells [B] of each time
        return self._planes()

    def _advance(self, action):
        there = self.path[-1] + self._moves[action]
        stays = self._over | self._walls.gather(1, there[:, None]).squeeze(1)
        self.path.append(torch.where(stays, self.path[-1], there))
        return self._planes(), self.path[-1] == cheese(self.tasks), {}

    def render_frame(self, index=0):
        """The maze from above: walls in black, the mouse in blue, its path in grey, the cheese in yellow."""
        cells = np.full((SIDE**2, 3), 255, np.uint8)
        cells[self._walls[index].cpu().numpy()] = (60, 60, 60)
        cells[[int(place[index]) for place in self.path]] = (200, 200, 200)
        frame = cells.reshape(SIDE, SIDE, 3).repeat(26, axis=0).repeat(26, axis=1)
        rows, columns = np.mgrid[: len(frame), : len(frame)]
        for place, radius, colour in ((cheese(self.tasks), 10, (240, 190, 40)), (self.path[-1], 7, (40, 80, 200))):
            row, column = divmod(int(place[index]), SIDE)
            frame[(rows - 26 * row - 12.5) ** 2 + (columns - 26 * column - 12.5) ** 2 <= radius**2] = colour
        return frame
