"""Poles of unknown length, balanced on a cart: the classic control problem as a family of tasks. Plain torch."""

import math

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from .core import TaskVectorEnv, held_out_uniform

GRAVITY, CART_MASS, POLE_MASS, FORCE, TIME_STEP = 9.8, 1.0, 0.1, 10.0, 0.02
MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360


class CartPoleLength(TaskVectorEnv):
    """A cart is pushed left or right to balance a pole whose length it does not know.

    Source: Sung, Zhang, Xiang, Hospedales, Yang 2017 (Meta-Critic Networks, arXiv:1706.09529), section 4.3; dynamics:
    Gymnasium's CartPole-v1 (Barto, Sutton, Anderson 1983), Euler's method with 0.02 s.
    Observation: [4] = the cart's position in m and velocity, the pole's angle in rad and angular velocity; each starts
    uniform in +-0.05. Action: push to the left (0) or to the right (1), with 10 N.
    Reward: 1 for every step. An episode ends when the position leaves +-2.4 m or the angle +-12 degrees.
    Tasks: half the pole's length [1] in m, uniform in [0.5, 5]; test lengths lie in strips that training never sees.
    Horizon: 200.
    Differs: the authors test on lengths of the training range.
    """

    task_dim = 1
    can_terminate = True
    world_state = ()

    def __init__(self, num_envs, max_episode_steps=200, device="cpu", dtype=torch.float32):
        space = Box(-np.inf, np.inf, (4,), np.float32)
        super().__init__(num_envs, space, Discrete(2), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        return (0.5 + 4.5 * held_out_uniform(num_tasks, 1, generator, split)).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return torch.ones_like(next_obs[..., 0])

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return (obs[..., 0].abs() > MAX_POSITION) | (obs[..., 2].abs() > MAX_ANGLE)

    def _start(self, task, generator):
        return (0.1 * self._draw(torch.rand, generator, 4) - 0.05).to(self.device, self.dtype)

    def _advance(self, action):
        _, velocity, angle, turning = self._obs.unbind(1)
        length, mass = self.tasks[:, 0], CART_MASS + POLE_MASS
        sine, cosine = angle.sin(), angle.cos()
        push = (FORCE * (2 * action - 1) + POLE_MASS * length * turning.square() * sine) / mass
        spin = (GRAVITY * sine - cosine * push) / (length * (4 / 3 - POLE_MASS * cosine.square() / mass))
        speeding = push - POLE_MASS * length * spin * cosine / mass
        change = torch.stack([velocity, speeding, turning, spin], dim=1)
        next_obs = self._obs + TIME_STEP * change
        return next_obs, self.ended(next_obs), {}

    def render_frame(self, index=0):
        """The cart in black, the pole in brown, the track in grey; 4.8 m wide."""
        height, width, scale = 240, 480, 100
        frame = np.full((height, width, 3), 255, np.uint8)
        rows, columns = np.mgrid[:height, :width]
        x, y = (columns - width / 2) / scale, (200 - rows) / scale  # in metres, from the middle of the track
        position, _, angle, _ = self._obs[index].tolist()
        frame[np.abs(y) < 0.01] = (160, 160, 160)
        along = (x - position) * math.sin(angle) + y * math.cos(angle)
        across = (x - position) * math.cos(angle) - y * math.sin(angle)
        frame[(np.abs(across) < 0.04) & (along > 0) & (along < 2 * float(self.tasks[index, 0]))] = (200, 150, 100)
        frame[(np.abs(x - position) < 0.2) & (np.abs(y) < 0.1)] = (30, 30, 30)
        return frame


class CartPoleFixed(CartPoleLength):
    """Gymnasium's own pole, for algorithms that learn one task.

    Source: Gymnasium's CartPole-v1.
    Observation, action, reward, ends: as `CartPoleLength`.
    Tasks: one, half a pole's length of 0.5 m.
    Horizon: 200 (CartPole-v0's; CartPole-v1 has 500).
    Differs: nothing known.
    """

    def sample_tasks(self, num_tasks, generator, split="train"):
        return torch.full_like(super().sample_tasks(num_tasks, generator, split), 0.5)
