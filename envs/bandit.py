"""Bandits: k arms of unknown pay, the smallest problems in which exploring must be learned. Plain torch."""

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from .core import TaskVectorEnv, held_out_normal, held_out_uniform


class Bandit(TaskVectorEnv):
    """Each pull of an arm pays 1 with the arm's probability, else 0 (Bernoulli); another number of arms is a subclass.

    Source: Duan et al. 2016 (RL2, arXiv:1611.02779), section 3.1.
    Observation: [1], always 0: all there is to know are the own past pulls and rewards. Action: one of k arms.
    Reward: 1 or 0, drawn from the environment's generator; the pure function `reward` gives the probability.
    Tasks: the arms' probabilities [k], uniform in [0, 1]^k; test tasks have probabilities of the first arm that
    training never sees, in strips that cover [0, 1] evenly.
    Horizon: 1, a pull; a trial is n episodes of one task (`Trials`); the paper has n = 10, 100, 500 and k = 5, 10, 50.
    Differs: nothing known. A longer horizon is as many pulls in one episode, the same problem.
    """

    arms = 5
    is_tabular = True  # of a single state
    world_state = ()

    def __init__(self, num_envs, max_episode_steps=1, device="cpu", dtype=torch.float32):
        self.task_dim = self.arms
        space = Box(0, 1, (1,), np.float32)
        super().__init__(num_envs, space, Discrete(self.arms), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        return held_out_uniform(num_tasks, self.arms, generator, split).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return task.gather(-1, action[..., None]).squeeze(-1)

    def state_features(self):
        return torch.ones(1, 1, dtype=self.dtype, device=self.device)

    def optimal_actions(self, tasks):
        return tasks.argmax(dim=1)[:, None, None].expand(-1, self.horizon, 1)

    def _start(self, task, generator):
        return torch.zeros(self.num_envs, 1, dtype=self.dtype, device=self.device)

    def _advance(self, action):
        self._paid = self._pay(self.reward(self._obs, action, self._obs, self.tasks))
        return self._obs, self._over, {}

    def _pay(self, mean: Tensor) -> Tensor:
        """The rewards [B] of arms with these means [B]."""
        return (self._draw(torch.rand, self._generator).to(mean) < mean).to(mean)

    def _transition_reward(self, action, next_obs):
        return self._paid


class Bandit5(Bandit):
    """`Bandit` with 5 arms."""


class Bandit10(Bandit):
    """`Bandit` with 10 arms."""

    arms = 10


class Bandit50(Bandit):
    """`Bandit` with 50 arms."""

    arms = 50


class GaussianBandit5(Bandit):
    """Each pull of one of 5 arms pays the arm's mean and normal noise.

    Source: the standard stochastic bandit, as in Sutton and Barto, "Reinforcement Learning" (2018), section 2.3.
    Observation, action: as `Bandit`.
    Reward: N(mean, 1), drawn from the environment's generator; the pure function `reward` gives the mean.
    Tasks: the arms' means [k], each N(0, 1); test tasks have means of the first arm that training never sees.
    Horizon: 1, a pull.
    Differs: 5 arms; the book has 10.
    """

    noise = 1.0  # standard deviation of what a pull pays

    def sample_tasks(self, num_tasks, generator, split="train"):
        return held_out_normal(num_tasks, self.arms, generator, split).to(self.device, self.dtype)

    def _pay(self, mean):
        return mean + self.noise * self._draw(torch.randn, self._generator).to(mean)


class UniformGaussianBandit5(GaussianBandit5):
    """`GaussianBandit5` with means as those of `Bandit5` and less noise: the bandits of DPT.

    Source: Lee et al. 2023 (DPT, arXiv:2306.14892), section 5.1, and the authors' code.
    Observation, action: as `Bandit`.
    Reward: N(mean, 0.3^2), drawn from the environment's generator; the pure function `reward` gives the mean.
    Tasks: the arms' means [k], uniform in [0, 1]^k; test tasks have means of the first arm that training never sees.
    Horizon: 1, a pull; the paper's trials have 500.
    Differs: nothing known. (0.3 is a variance in the paper and a standard deviation in its code, which is followed.)
    """

    noise = 0.3

    def sample_tasks(self, num_tasks, generator, split="train"):
        return held_out_uniform(num_tasks, self.arms, generator, split).to(self.device, self.dtype)


class DependentBandit(Bandit):
    """Two arms whose probabilities sum to 1, so that a pull of one tells as much about the other.

    Source: Wang et al. 2016 (arXiv:1611.05763), section 3.1, "dependent uniform".
    Observation, action, reward: as `Bandit`.
    Tasks: the arms' probabilities [2] = (p, 1 - p), p uniform in [0, 1]; test tasks have p that training never sees.
    Horizon: 1, a pull; the paper's trials have 100.
    Differs: nothing known.
    """

    arms = 2

    def sample_tasks(self, num_tasks, generator, split="train"):
        first = held_out_uniform(num_tasks, 1, generator, split)
        return torch.cat([first, 1 - first], dim=1).to(self.device, self.dtype)
