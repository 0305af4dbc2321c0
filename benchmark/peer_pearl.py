"""PEARL as it is usually written: the reference that benchmark/speed.py compares algos/pearl_sac.py with.

The computation is the same (tests/test_peer_pearl.py compares updates and what is collected), its organisation is that
of the well-known codes, oyster above all:

* for each task a replay buffer and a buffer of recent context, NumPy arrays for obs, action, reward, ..;
* an update that loops over the tasks of its meta-batch: sample from the task's buffers, to torch and the device, encode
  the context, losses, backward; gradients add up over the tasks, then a step of each optimiser, one for each network;
* policy and value losses in eager mode, the critics frozen while the policy's loss is computed;
* a loop over parameters for the target critics;
* a single Gymnasium environment, one task after the other, the policy on a batch of one observation.

Nothing is made slow on purpose: no environment checker, no distribution objects, the backward passes skip what they
need not compute, environment and policy run without gradients. oyster takes its losses one after the other (value,
policy, ..) with a value network; here, as in algos/pearl_sac.py, all of them are of the parameters before the step.

`gym.make(id)` of this project is a batch of one world, which costs several times what a world of its own does: for
those in WORLDS the usual one, on Gymnasium's HalfCheetah-v5, exists beside it.
"""

import math
from copy import deepcopy
from itertools import chain, pairwise

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.peer_rl2 import HalfCheetahVel

WORLDS = dict.fromkeys(("HalfCheetahVel-v0", "HalfCheetahVel3-v0"), HalfCheetahVel)


def make(env_id: str, args, own: bool = False, **options) -> gym.Env:
    """One world in which actions of +-1 span the bounds, `own`: that of WORLDS; `options` go to `gym.make`."""
    if own:
        env = gym.wrappers.TimeLimit(WORLDS[env_id](), args.horizon)
    else:
        env = gym.make(env_id, max_episode_steps=args.horizon, disable_env_checker=True, **options)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


class Buffer:
    """The last `size` transitions of one task."""

    def __init__(self, size: int, obs: int, actions: int, rng: np.random.Generator, dtype=np.float32):
        widths = {"obs": obs, "action": actions, "reward": 1, "next_obs": obs, "training_reward": 1, "ended": 1}
        self.columns = {name: np.zeros((size, width), dtype) for name, width in widths.items()}
        self.size, self.top, self.count, self.rng = size, 0, 0, rng

    def add(self, *transition) -> None:
        for column, value in zip(self.columns.values(), transition, strict=True):
            column[self.top] = value
        self.top, self.count = (self.top + 1) % self.size, min(self.count + 1, self.size)

    def clear(self) -> None:
        self.top = self.count = 0

    def sample(self, size: int) -> dict[str, np.ndarray]:
        index = self.rng.integers(self.count, size=size)
        return {name: column[index] for name, column in self.columns.items()}


def mlp(*widths: int) -> nn.Sequential:
    layers = [(nn.Linear(n, m), nn.ReLU()) for n, m in pairwise(widths)]
    return nn.Sequential(*chain(*layers))[:-1]


def noise(shape: tuple, like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


class Agent:
    """Networks, optimisers, and the buffers of all tasks."""

    def __init__(self, obs: int, actions: int, args, device="cpu", dtype=torch.float32):
        H, Z, self.args, self.widths = args.hidden_size, args.latent_size, args, (obs, actions)
        critic = (obs + actions + Z, H, H, H, 1)
        self.encoder = mlp(obs + actions + 1 + obs * args.next_obs, H, H, H, 2 * Z).to(device, dtype)
        self.policy = mlp(obs + Z, H, H, H, 2 * actions).to(device, dtype)
        self.critics = nn.ModuleList([mlp(*critic), mlp(*critic)]).to(device, dtype)
        self.targets = deepcopy(self.critics)
        self.log_alpha = torch.tensor(math.log(args.entropy_coef), device=device, dtype=dtype, requires_grad=True)
        trained = [self.encoder.parameters(), self.critics.parameters(), self.policy.parameters()]
        self.optimizers = [torch.optim.Adam(x, args.lr) for x in trained + [[self.log_alpha]] * args.auto_entropy]
        self.rng, recent = np.random.default_rng(args.seed), max(args.initial_episodes, 1) * args.horizon
        recent = max(recent, (args.prior_episodes + args.posterior_episodes) * args.horizon)
        numpy_type = torch.empty(0, dtype=dtype).numpy().dtype
        sizes = {"replay": args.replay_size, "recent": recent}
        for name, size in sizes.items():
            setattr(self, name, [Buffer(size, obs, actions, self.rng, numpy_type) for _ in range(args.train_tasks)])

    def load(self, theta: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        """The weights of algos/pearl_sac.py."""
        parts = {"encoder": self.encoder, "policy": self.policy, "q1": self.critics[0], "q2": self.critics[1]}
        for part, network, source in [(part, network, theta) for part, network in parts.items()] + [
            ("q1", self.targets[0], target), ("q2", self.targets[1], target)
        ]:  # fmt: skip
            names = {f"{2 * i}.{kind}": f"{part}_{kind[0]}{i}" for i in range(4) for kind in ("weight", "bias")}
            network.load_state_dict({own: source[name] for own, name in names.items()})
        self.log_alpha.data.fill_(theta.get("log_alpha", self.log_alpha.detach()))

    def tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(x).to(self.log_alpha) for name, x in arrays.items()}

    def posterior(self, context: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance [Z] of q(z|c)."""
        seen = ["obs", "action", "reward"] + ["next_obs"] * self.args.next_obs
        mean, raw = self.encoder(torch.cat([context[name] for name in seen], 1)).chunk(2, 1)
        precision = 1 / functional.softplus(raw).clamp_min(1e-7)
        variance = 1 / precision.sum(0)
        return variance * (precision * mean).sum(0), variance

    def act(self, obs: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, A] and their log-probabilities [B]."""
        mean, log_std = self.policy(torch.cat([obs, z], 1)).chunk(2, 1)
        log_std = log_std.clamp(-20, 2)
        epsilon = noise(mean.shape, mean)
        raw = mean + log_std.exp() * epsilon
        log_prob = -0.5 * epsilon.square() - log_std - 0.5 * math.log(2 * math.pi)
        return raw.tanh(), (log_prob - 2 * (math.log(2) - raw - functional.softplus(-2 * raw))).sum(1)


def values(critics, obs: Tensor, action: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.cat([obs, action, z], 1)
    return critics[0](x).squeeze(1), critics[1](x).squeeze(1)


def task_backward(agent: Agent, task: int) -> None:
    """Adds one task's part of the gradient."""
    args, N = agent.args, agent.args.meta_batch_size
    context = agent.tensors(agent.recent[task].sample(args.context_size))
    batch = agent.tensors(agent.replay[task].sample(args.batch_size))
    obs, action, _, next_obs, reward, ended = batch.values()
    mean, variance = agent.posterior(context)
    kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum()
    z = (mean + variance.sqrt() * noise(mean.shape, mean)).expand(len(obs), -1)
    alpha = agent.log_alpha.detach().exp() if args.auto_entropy else args.entropy_coef
    with torch.no_grad():
        next_action, log_prob = agent.act(next_obs, z)
        next_value = torch.min(*values(agent.targets, next_obs, next_action, z)) - alpha * log_prob
        goal = args.reward_scale * reward.squeeze(1) + args.gamma * (1 - ended.squeeze(1)) * next_value
    q1, q2 = values(agent.critics, obs, action, z)
    loss = (functional.mse_loss(q1, goal) + functional.mse_loss(q2, goal)) / N + args.kl_weight * kl
    loss.backward()

    z = z.detach()
    agent.critics.requires_grad_(False)
    new_action, log_prob = agent.act(obs, z)
    loss = (alpha * log_prob - torch.min(*values(agent.critics, obs, new_action, z))).mean() / N
    if args.auto_entropy:
        loss = loss - agent.log_alpha * (log_prob.detach().mean() - action.shape[1]) / N
    loss.backward()
    agent.critics.requires_grad_(True)


def update(agent: Agent, tasks: np.ndarray) -> None:
    for optimizer in agent.optimizers:
        optimizer.zero_grad()
    for task in tasks:
        task_backward(agent, task)
    for optimizer in agent.optimizers:
        optimizer.step()
    with torch.no_grad():
        for target, parameter in zip(agent.targets.parameters(), agent.critics.parameters(), strict=True):
            target.copy_((1 - agent.args.tau) * target + agent.args.tau * parameter)


def learn(agent: Agent, updates: int) -> None:
    for _ in range(updates):
        update(agent, agent.rng.choice(agent.args.train_tasks, agent.args.meta_batch_size, replace=False))


@torch.no_grad()
def collect(env: gym.Env, agent: Agent, index: int, task: np.ndarray, context_size: int) -> int:
    """An episode of training task number `index` into its buffers, z from the prior for no context; its steps."""
    z = noise((agent.args.latent_size,), agent.log_alpha)
    if context_size:
        mean, variance = agent.posterior(agent.tensors(agent.recent[index].sample(context_size)))
        z = mean + variance.sqrt() * z
    obs, _ = env.reset(options={"task": task})
    ended = truncated = False
    steps = 0
    while not (ended or truncated):
        action = agent.act(torch.from_numpy(obs).to(z)[None], z[None])[0][0].cpu().numpy()
        next_obs, reward, ended, truncated, info = env.step(action)
        training_reward = info["dense_reward"] if agent.args.dense_training else reward
        for buffer in (agent.replay[index], agent.recent[index]):
            buffer.add(obs, action, reward, next_obs, training_reward, ended)
        obs, steps = next_obs, steps + 1
    return steps
