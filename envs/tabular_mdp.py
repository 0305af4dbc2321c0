"""Small random Markov decision processes, given as tables. Plain torch, on the run's device."""

from itertools import accumulate

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from .core import TaskVectorEnv, held_out_normal

STATES, ACTIONS = 10, 5


def tables(tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean rewards [.., S, A] and probabilities of the next state [.., S, A, S] of tasks [.., S * A + S * A * S]."""
    mean, transition = tasks.split([STATES * ACTIONS, STATES * ACTIONS * STATES], dim=-1)
    return mean.unflatten(-1, (STATES, ACTIONS)), transition.unflatten(-1, (STATES, ACTIONS, STATES))


def plan(tasks: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """The best policy by backward induction: its expected total reward in one episode from each state [N, S], and its
    action in each step and state [N, T, S]."""
    mean, transition = tables(tasks)
    value = torch.zeros_like(mean[..., 0])
    actions = []
    for _ in range(horizon):
        value, action = (mean + (transition @ value[:, None, :, None]).squeeze(-1)).max(dim=-1)
        actions.append(action)
    return value, torch.stack(actions[::-1], dim=1)


def optimal_value(tasks: Tensor, horizon: int) -> Tensor:
    """The expected total reward [N] of the best policy in one episode from state 0."""
    return plan(tasks, horizon)[0][:, 0]


class TabularMDP(TaskVectorEnv):
    """A decision process of 10 states and 5 actions with unknown rewards and unknown transitions.

    Source: Duan et al. 2016 (RL2, arXiv:1611.02779), section 3.2.
    Observation: the state, one-hot [10], starting in state 0. Action: one of 5.
    Reward: N(mean(state, action), 1), drawn from the environment's generator; the pure `reward` gives the mean.
    Tasks: the mean rewards [10 * 5], each N(1, 1), then the probabilities of the next state [10 * 5 * 10], each row
    Dirichlet(1, .., 1); see `tables`. Test tasks have mean(0, 0) in thin strips that training never sees: this only
    makes certain that no task is in both, for two draws of 550 numbers would hardly meet anyway.
    Horizon: 10. The paper's trials are n = 10, 25, 50, 75, 100 episodes of one task.
    Differs: nothing known.
    """

    task_dim = STATES * ACTIONS * (1 + STATES)
    is_tabular = True
    world_state = ("_transition",)

    def __init__(self, num_envs, max_episode_steps=10, device="cpu", dtype=torch.float32):
        space = Box(0, 1, (STATES,), np.float32)
        super().__init__(num_envs, space, Discrete(ACTIONS), max_episode_steps, device, dtype)

    def sample_tasks(self, num_tasks, generator, split="train"):
        mean = 1 + held_out_normal(num_tasks, STATES * ACTIONS, generator, split)
        weight = torch.empty(num_tasks, STATES * ACTIONS, STATES).exponential_(generator=generator)
        transition = weight / weight.sum(dim=-1, keepdim=True)  # normalised exponentials are Dirichlet(1, .., 1)
        return torch.cat([mean, transition.flatten(1)], dim=1).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return task.gather(-1, (obs.argmax(dim=-1) * ACTIONS + action)[..., None]).squeeze(-1)

    def state_features(self):
        return torch.eye(STATES, dtype=self.dtype, device=self.device)

    def optimal_actions(self, tasks):
        return plan(tasks, self.horizon)[1]

    def _one_hot(self, state):
        return torch.nn.functional.one_hot(state, STATES).to(self.dtype)

    def _start(self, task, generator):
        self._transition = tables(task)[1].flatten(1, 2)  # [B, S * A, S]
        return self._one_hot(torch.zeros(self.num_envs, dtype=torch.int64, device=self.device))

    def _advance(self, action):
        noise = self._draw(torch.randn, self._generator)
        point = self._draw(torch.rand, self._generator).to(self._obs)
        self._paid = self.reward(self._obs, action, None, self.tasks) + noise.to(self._obs)
        worlds = torch.arange(self.num_envs, device=self.device)
        row = self._transition[worlds, self._obs.argmax(dim=-1) * ACTIONS + action]
        # Added one after the other, not by `cumsum`, so that all devices round alike and draw the same states.
        edges = torch.stack(list(accumulate(row[:, :-1].unbind(dim=1))), dim=1)
        return self._one_hot((point[:, None] >= edges).sum(dim=1)), self._over, {}

    def _transition_reward(self, action, next_obs):
        return self._paid
