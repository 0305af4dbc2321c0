"""A learned lifetime reward as it is usually written: what benchmark/speed.py compares algos/lifetime_rewards.py with.

The computation is the same (tests/test_peer_lives.py compares whole training runs), its organisation is the usual one,
a loop over lifetimes, as in the paper's Algorithm 1:

* each lifetime has a policy and a single Gymnasium environment of its own, in which it acts one step at a time, NumPy
  to torch and back;
* the updates of its policy are made by `torch.autograd.grad(.., create_graph=True)` while it lives, so that the graph
  from the reward to the last policy is already there when the meta-gradient is taken, and no update is made twice;
* reward and lifetime value are `nn.LSTM`s that read a lifetime's steps; their memory is cut between windows;
* one backward pass through all lifetimes, and one Adam with a learning rate for each network.

Nothing is made slow on purpose: no gradients while a policy acts, no distribution objects, one forward pass of a policy
for its log-probabilities, its values and the value behind the last step, and gradients of nothing but the two networks.
"""

import math
from itertools import chain
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from benchmark.peer_meta_critic import Lifetime, draw, lifetimes

Params = dict[str, Tensor]
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # rows, columns
OBJECTS = {(0, 4): 0, (4, 0): 1, (4, 4): 2}


class ABC(gym.Env):
    """A room of 5 x 5 cells with three objects, each of which ends the episode; the task is what they are worth."""

    def __init__(self):
        self.observation_space, self.action_space = Box(0, 1, (25,), np.float64), Discrete(4)
        self.cells, self.worth, self.cell = np.eye(25), np.zeros(3), (2, 2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options and options.get("task") is not None:
            self.worth = options["task"]
        self.cell = 2, 2
        return self.cells[12], {}

    def step(self, action):
        (row, column), (down, right) = self.cell, MOVES[action]
        self.cell = row, column = min(max(row + down, 0), 4), min(max(column + right, 0), 4)
        reached = OBJECTS.get(self.cell)
        reward = 0.0 if reached is None else float(self.worth[reached])
        return self.cells[5 * row + column], reward, reached is not None, False, {}


WORLDS = dict.fromkeys(("SymABC-v0", "RandomABC-v0"), ABC)


class History(nn.Module):
    """A number for every moment of a lifetime."""

    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.lstm, self.number = nn.LSTM(inputs, size), nn.Linear(size, 1)

    def empty(self) -> tuple[Tensor, Tensor]:
        zero = self.number.weight.new_zeros(1, self.lstm.hidden_size)
        return zero, zero

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Numbers [T + 1] before the first and after each of T steps x [T, I], and the memory after them."""
        features, after = self.lstm(x, memory)
        return self.number(torch.cat([memory[0], features])).squeeze(-1), after


def act(theta: Params, obs: Tensor) -> Tensor:
    """Logits of the choices and a value [.., A + 1] for obs [.., O]."""
    return (obs @ theta["w0"] + theta["b0"]).tanh() @ theta["w1"] + theta["b1"]


class Life:
    """A policy, its world, where it is in it, and what the two networks remember of it."""

    def __init__(self, theta: Params, world: Lifetime, obs: np.ndarray, memory: dict[str, tuple[Tensor, Tensor]]):
        self.theta, self.world, self.obs, self.memory = theta, world, obs, memory


class Learner:
    """Reward, lifetime value, their Adam, and all lifetimes."""

    def __init__(self, reward: History, value: History, lives: list[Life], args):
        self.reward, self.value, self.lives, self.args, self.iterations = reward, value, lives, args, 0
        groups = [{"params": reward.parameters()}, {"params": value.parameters()}]
        self.optimizer = torch.optim.Adam(groups)


def new_policy(theta: Params) -> Params:
    """A newborn one, of the same sizes and type."""
    bound = math.sqrt(6 / sum(theta["w0"].shape))
    fresh = {name: torch.zeros_like(x) for name, x in theta.items()}
    fresh["w0"].uniform_(-bound, bound)
    fresh["w1"].normal_(0, 0.01)
    return fresh


def history_like(weights: Params) -> History:
    """With the weights of algos/lifetime_rewards.py."""
    network = History(weights["w_x"].shape[1], weights["w_h"].shape[1]).to(weights["w_x"])
    names = {"weight_ih_l0": "w_x", "weight_hh_l0": "w_h", "bias_ih_l0": "b_x", "bias_hh_l0": "b_h"}
    network.lstm.load_state_dict({own: weights[name] for own, name in names.items()})
    network.number.load_state_dict({"weight": weights["w_out"][None], "bias": weights["b_out"]})
    return network


def make(state: dict, envs, args, number: int) -> Learner:
    """The networks and the first policies of a state that train() begins with, in worlds of their own."""
    reward, value = (history_like(state[name]) for name in ("eta", "phi"))
    lives = []
    for i, world in enumerate(lifetimes(WORLDS, args, args.episodes_per_lifetime, number, envs)):
        obs, _ = world.reset(seed=args.seed + i, options={"episode": i * args.episodes_per_lifetime // number})
        theta = {name: x[i].clone() for name, x in state["theta"].items()}
        lives.append(Life(theta, world, obs, {"reward": reward.empty(), "value": value.empty()}))
    return Learner(reward, value, lives, args)


class Trajectory(NamedTuple):
    """T steps of a lifetime."""

    obs: Tensor  # [T + 1, O] the last one after the steps
    action: Tensor  # [T, 1]
    x: Tensor  # [T, I] observation, what the step led to (before any restart), extrinsic reward, episode's end
    reward: Tensor  # [T]
    over: list[bool]  # the episode ended
    died: list[bool]  # the lifetime ended
    mask: Tensor  # [T] 0 once it was over


@torch.no_grad()
def collect(life: Life, args) -> Trajectory:
    """The next T steps of a lifetime."""
    like, alive, all_obs, rows = life.theta["w0"], True, [life.obs], []
    for _ in range(args.steps):
        action = draw(act(life.theta, torch.from_numpy(life.obs).to(like))[:-1])
        before = life.obs
        life.obs, reward, ended, late, info = life.world.step(action)
        over, died = ended or late, alive and info["born"]
        all_obs.append(life.obs)
        x = np.concatenate([before, info["final_obs"], (reward, over)])
        rows.append((action, x, reward, over, died, alive))
        alive = alive and not died
    action, x, reward, over, died, mask = zip(*rows, strict=True)
    obs, x = (torch.from_numpy(np.stack(values)).to(like) for values in (all_obs, x))
    action = torch.tensor(action, device=like.device)[:, None]
    return Trajectory(obs, action, x, like.new_tensor(reward), over, died, like.new_tensor(mask))


def discounted(rewards: list, ends: list[bool], after, gamma: float) -> list:
    """Sums of the later rewards up to an end, each step's weight gamma times the one before; tensors or numbers."""
    sums = []
    for reward, end in zip(reversed(rewards), reversed(ends), strict=True):
        after = reward if end else reward + gamma * after
        sums.append(after)
    return sums[::-1]


def chosen(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions [T], and of all choices."""
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(-1, action).squeeze(-1), log_probs


def learn_from(theta: Params, data: Trajectory, reward: Tensor, args, create_graph: bool) -> tuple[Params, Tensor]:
    """The policy after a step on its trajectory, and log-probabilities [T] of the one before."""
    output = act(theta, data.obs)
    value, (log_prob, _) = output[:, -1], chosen(output[:-1, :-1], data.action)
    returns = torch.stack(discounted(list(reward), data.over, value[-1], args.inner_gamma))
    # Other names for the same weights: returns and baseline are no functions of these, but remain functions of theta.
    weights = {name: x.view_as(x) for name, x in theta.items()}
    new = act(weights, data.obs[:-1])
    own, log_probs = chosen(new[:, :-1], data.action)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    gain = own * (returns - value[:-1]) - 0.5 * (returns - new[:, -1]).square() + args.entropy_coef * entropy
    objective = (data.mask * gain).mean()
    gradient = torch.autograd.grad(objective, list(weights.values()), create_graph=create_graph)
    norm = (sum(g.square().sum() for g in gradient) + 1e-12).sqrt()
    alpha = args.inner_lr / (norm / args.inner_max_norm).clamp_min(1)
    return {name: x + alpha * g for (name, x), g in zip(theta.items(), gradient, strict=True)}, log_prob


class Window(NamedTuple):
    """S steps of a lifetime."""

    log_prob: Tensor  # [S] a function of eta, by the policies' updates
    value: Tensor  # [S + 1] the last one after the steps; a function of phi
    reward: list[float]
    died: list[bool]
    mask: Tensor  # [S]


def live(learner: Learner, life: Life) -> Window:
    """A window of a lifetime: U trajectories, a step of its policy after each."""
    args, log_probs, values, trajectories = learner.args, [], [], []
    theta = {name: x.requires_grad_() for name, x in life.theta.items()}
    memory = {name: tuple(x.detach() for x in both) for name, both in life.memory.items()}
    for k in range(args.unroll):
        data = collect(life, args)
        number, memory["reward"] = learner.reward(data.x, memory["reward"])
        value, memory["value"] = learner.value(data.x, memory["value"])
        # No log-probability depends on the last update, so none of the loss does.
        theta, log_prob = learn_from(theta, data, data.reward + number[1:].tanh(), args, k + 1 < args.unroll)
        log_probs.append(log_prob)
        values.append(value[:-1])
        trajectories.append(data)
        if any(data.died):
            theta = {name: x.requires_grad_() for name, x in new_policy(theta).items()}
            memory = {"reward": learner.reward.empty(), "value": learner.value.empty()}
        life.theta = theta
    life.theta, life.memory = {name: x.detach() for name, x in theta.items()}, memory
    reward, died, mask = zip(*[(data.reward, data.died, data.mask) for data in trajectories], strict=True)
    log_prob, value = torch.cat(log_probs), torch.cat([*values, value[-1:]])
    return Window(log_prob, value, torch.cat(reward).tolist(), list(chain.from_iterable(died)), torch.cat(mask))


def meta_step(learner: Learner, windows: list[Window]) -> None:
    """A step of Adam on reward and lifetime value."""
    args, advantages = learner.args, []
    for window in windows:
        value = window.value.tolist()
        delta = [
            reward + (0.0 if died else args.gamma * after) - before
            for reward, died, before, after in zip(window.reward, window.died, value[:-1], value[1:], strict=True)
        ]
        advantages.append(discounted(delta, window.died, 0.0, args.gamma * args.gae_lambda))
    columns = zip(*[(window.log_prob, window.value[:-1], window.mask) for window in windows], strict=True)
    log_prob, value, mask = (torch.stack(column) for column in columns)
    advantage = mask * mask.new_tensor(advantages)
    value_loss = (mask * (advantage + value.detach() - value)).square().mean()
    advantage = advantage / (advantage.std() + 1e-6)
    meta_loss = -(mask * log_prob * advantage).mean()

    learner.iterations += 1
    remaining = 1 - (learner.iterations - 1) / args.iterations
    parts = (meta_loss, learner.reward, args.lr), (value_loss, learner.value, args.value_lr)
    for (loss, network, lr), group in zip(parts, learner.optimizer.param_groups, strict=True):
        group["lr"] = remaining * lr
        for x, gradient in zip(network.parameters(), torch.autograd.grad(loss, network.parameters()), strict=True):
            x.grad = gradient
    learner.optimizer.step()


def iterate(learner: Learner) -> int:
    """A window of every lifetime and a step of the two networks; the windows' steps."""
    meta_step(learner, [live(learner, life) for life in learner.lives])
    return len(learner.lives) * learner.args.unroll * learner.args.steps
