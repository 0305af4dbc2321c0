"""MAML-TRPO as it is usually written: the reference that benchmark/speed.py compares algos/maml_trpo.py with.

The computation is the same (tests/test_peer.py compares samples, gradient, Fisher product and step), its organisation
is that of the well-known codes, pytorch-maml-rl above all:

* a Python loop over tasks wherever there are tasks: sampling, adaptation, losses;
* sampling with `gymnasium.vector.SyncVectorEnv` over E single Gymnasium environments, one policy call a step for them;
* the meta-gradient by `torch.autograd.grad` through inner steps made with `create_graph=True`;
* Fisher products by double backward: the gradient of the mean KL once with `create_graph=True`, then the gradient of
  its product with v for each conjugate-gradient iteration, on all episodes.

Nothing is made slow on purpose: no environment checker, no validation of distributions, all batched within a task.
Left out: early ends (none of these tasks has one), learned step sizes, the estimators `dice`, `loaded`, `e_maml`.
"""

import math
from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

Params = dict[str, Tensor]


class HalfCheetahDir(gym.Wrapper):
    """Gymnasium's HalfCheetah-v5 with the task, reward, observation and action scale of ours."""

    def __init__(self, action_scale: float):
        mujoco.set_mju_user_warning(lambda message: None)  # the model file's deprecated attribute, once for each world
        super().__init__(gym.make("HalfCheetah-v5", disable_env_checker=True).unwrapped)
        self.action_scale, self.direction = action_scale, 1.0
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (18,), np.float64)

    def set_task(self, task: np.ndarray) -> None:
        self.direction = float(task[0])

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return np.append(obs, 0.0), info

    def step(self, action):
        action = np.clip(action / self.action_scale, -1.0, 1.0)
        obs, _, terminated, truncated, info = self.env.step(action)
        velocity = info["x_velocity"]
        reward = self.direction * velocity - 0.05 * float(action @ action)
        return np.append(obs, velocity), reward, terminated, truncated, info


class Navigation2DEndless(gym.Env):
    """One point in the plane; the task is its goal."""

    def __init__(self, action_scale: float):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-0.1, 0.1, (2,), np.float32)
        self.bound = float(self.action_space.high[0])
        self.factor = self.bound / action_scale
        self.goal = self.position = np.zeros(2)

    def set_task(self, task: np.ndarray) -> None:
        self.goal = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2)
        return self.position, {}

    def step(self, action):
        self.position = self.position + np.clip(action * self.factor, -self.bound, self.bound)
        distance = self.position - self.goal
        return self.position, -float(np.sqrt(distance @ distance)), False, False, {}


ENVS = {"HalfCheetahDir-v0": HalfCheetahDir, "Navigation2DEndless-v0": Navigation2DEndless}


def make(env_id: str, episodes: int, action_scale: float) -> SyncVectorEnv:
    """E worlds of one task at a time."""
    if env_id not in ENVS:
        raise SystemExit(f"--peer: {env_id} has no single environment here; allowed is one of {', '.join(ENVS)}")
    return SyncVectorEnv([lambda: ENVS[env_id](action_scale)] * episodes, autoreset_mode=AutoresetMode.DISABLED)


class Episodes(NamedTuple):
    """E episodes of one task."""

    obs: Tensor  # [E, T, O]
    action: Tensor  # [E, T, A] unclipped
    log_prob: Tensor  # [E, T] under the policy that drew the action
    advantage: Tensor  # [E, T] normalised
    total: Tensor  # [E] undiscounted return


def policy(params: Params, obs: Tensor) -> Independent:
    hidden = torch.tanh(obs @ params["w0"] + params["b0"])
    hidden = torch.tanh(hidden @ params["w1"] + params["b1"])
    mean = hidden @ params["w2"] + params["b2"]
    return gaussian(mean, params["log_std"].clamp_min(math.log(1e-6)).exp())


def gaussian(mean: Tensor, std: Tensor) -> Independent:
    return Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)


def baseline(obs: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """The linear feature baseline [E, T] of Duan et al. 2016, fitted to the task's own returns."""
    time = np.broadcast_to(np.arange(obs.shape[1])[:, None] / 100, (*returns.shape, 1))
    obs = obs.clip(-10, 10)
    x = np.concatenate([obs, obs**2, time, time**2, time**3, np.ones_like(time)], -1).reshape(returns.size, -1)
    weights = np.linalg.solve(x.T @ x + 1e-5 * np.eye(x.shape[1]), x.T @ returns.ravel())
    return (x @ weights).reshape(returns.shape)


def discount(reward: np.ndarray, gamma: float) -> np.ndarray:
    """Sums [E, T] of the later rewards, each step's weight gamma times the one before."""
    sums, total = np.empty_like(reward), 0.0
    for t in reversed(range(reward.shape[1])):
        sums[:, t] = total = reward[:, t] + gamma * total
    return sums


def advantages(obs: np.ndarray, reward: np.ndarray, args) -> np.ndarray:
    """Generalised advantages [E, T], over the deviation in the task's batch, or over 0.003 of what was subtracted."""
    value = baseline(obs, discount(reward, args.gamma))
    next_value = np.concatenate([value[:, 1:], np.zeros_like(value[:, :1])], 1)
    advantage = discount(reward + args.gamma * next_value - value, args.gamma * args.gae_lambda)
    level = np.sqrt(((value + advantage.mean()) ** 2).mean())
    return (advantage - advantage.mean()) / (max(advantage.std(), 0.003 * level) + 1e-8)


@torch.no_grad()
def collect(envs: SyncVectorEnv, task: np.ndarray, params: Params, args) -> Episodes:
    """E episodes of one task with one policy."""
    envs.call("set_task", task)
    obs, _ = envs.reset()
    observations, actions, rewards = [], [], []
    for _ in range(args.horizon):
        observations.append(obs)
        actions.append(policy(params, torch.from_numpy(obs).float()).sample())
        obs, reward, *_ = envs.step(actions[-1].numpy())
        rewards.append(reward)
    obs, reward, action = np.stack(observations, 1), np.stack(rewards, 1), torch.stack(actions, 1)
    obs_tensor = torch.from_numpy(obs).float()
    advantage = torch.from_numpy(advantages(obs, reward, args)).float()
    log_prob = policy(params, obs_tensor).log_prob(action)
    return Episodes(obs_tensor, action, log_prob, advantage, torch.from_numpy(reward.sum(1)))


def adapt(params: Params, support: Episodes, args, create_graph: bool) -> Params:
    """One inner step on one task."""
    log_prob = policy(params, support.obs).log_prob(support.action)
    surrogate = (log_prob - support.log_prob).exp() if args.estimator == "lvc" else log_prob
    loss = -(surrogate * support.advantage).mean()
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
    return {name: value - args.inner_lr * g for (name, value), g in zip(params.items(), grads, strict=True)}


def losses(theta: Params, batches: list[list[Episodes]], args, old: list | None = None):
    """Mean surrogate and mean KL over tasks, and the adapted policies' distributions on the query episodes."""
    surrogates, kls, policies, with_graph = [], [], [], old is None
    for i, (*supports, query) in enumerate(batches):
        params = theta
        for support in supports:
            params = adapt(params, support, args, with_graph and not args.first_order)
        with torch.set_grad_enabled(with_graph):
            new = policy(params, query.obs)
            before = gaussian(new.mean.detach(), new.stddev.detach()) if old is None else old[i]
            surrogates.append(((new.log_prob(query.action) - query.log_prob).exp() * query.advantage).mean())
            kls.append(kl_divergence(before, new).mean())
            policies.append(before)
    return torch.stack(surrogates).mean(), torch.stack(kls).mean(), policies


def flatten(grads) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


def fisher_product(kl: Tensor, theta: Params, damping: float):
    """v -> F v + damping v by double backward through the mean KL."""
    leaves = list(theta.values())
    gradient = flatten(torch.autograd.grad(kl, leaves, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return flatten(torch.autograd.grad(gradient @ v, leaves, retain_graph=True)) + damping * v

    return product


def conjugate_gradient(product, b: Tensor, iterations: int = 10) -> Tensor:
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    for _ in range(iterations):
        z = product(p)
        step = rr / (p @ z)
        x += step * p
        r -= step * z
        rr, previous = r @ r, rr
        p = r + rr / previous * p
    return x


def set_vector(theta: Params, vector: Tensor) -> Params:
    """Leaves that require gradients, cut from one vector."""
    parts = vector.split([value.numel() for value in theta.values()])
    return {
        name: part.view_as(v).clone().requires_grad_() for (name, v), part in zip(theta.items(), parts, strict=True)
    }


def line_search(is_allowed) -> float:
    """A fraction of the step that is allowed, or 0: 0.92, and otherwise 0.8 of the last one until one is, then the
    middle between the longest allowed and the shortest refused one, until they differ by less than 6 %; 15 trials."""
    fraction, refused, trials = 0.92, None, 1
    while not is_allowed(fraction):
        if trials == 15:
            return 0.0
        fraction, refused, trials = 0.8 * fraction, fraction, trials + 1
    while refused and refused >= 1.06 * fraction and trials < 15:
        middle, trials = (fraction + refused) / 2, trials + 1
        if is_allowed(middle):
            fraction = middle
        else:
            refused = middle
    return fraction


def search(theta: Params, step: Tensor, max_kl: float, before: float, losses_at) -> tuple[Params, dict]:
    """The longest step found whose KL is at most max_kl and that improves the surrogate, or theta itself."""
    vector = flatten(theta.values()).detach()
    found = theta, {"kl": 0.0, "improvement": 0.0, "step": 0.0}

    def is_allowed(fraction: float) -> bool:
        nonlocal found
        tried = set_vector(theta, vector + fraction * step)
        after, kl, _ = losses_at(tried)
        allowed = bool(kl <= max_kl and after > before)
        if allowed:  # the search never returns to a shorter one
            found = tried, {"kl": float(kl), "improvement": float(after) - before, "step": fraction}
        return allowed

    line_search(is_allowed)
    return found


def trpo_step(theta: Params, batches: list[list[Episodes]], args) -> tuple[Params, dict]:
    """One constrained step on theta; theta stays where no tried step satisfies the constraint."""
    surrogate, kl, old = losses(theta, batches, args)
    gradient = flatten(torch.autograd.grad(surrogate, list(theta.values()), retain_graph=True))
    product = fisher_product(kl, theta, args.cg_damping)
    direction = conjugate_gradient(product, gradient)
    step = direction * (2 * args.max_kl / (direction @ product(direction))).sqrt()
    before = surrogate.item()
    del surrogate, kl, product
    return search(theta, step, args.max_kl, before, lambda tried: losses(tried, batches, args, old))


def sample(envs: SyncVectorEnv, tasks: np.ndarray, theta: Params, args) -> list[list[Episodes]]:
    """For each task: episodes before, and again after each inner step."""
    batches = []
    for task in tasks:
        params, own = theta, []
        for _ in range(args.inner_steps):
            own.append(collect(envs, task, params, args))
            params = {name: v.detach().requires_grad_() for name, v in adapt(params, own[-1], args, False).items()}
        batches.append([*own, collect(envs, task, params, args)])
    return batches


def maml_trpo(envs: SyncVectorEnv, theta: Params, args):
    """A function that does one iteration on some tasks."""

    def iterate(tasks: np.ndarray) -> None:
        nonlocal theta
        theta, _ = trpo_step(theta, sample(envs, tasks, theta, args), args)

    return iterate


ITERATIONS = {"maml_trpo": maml_trpo}
