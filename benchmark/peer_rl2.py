"""RL2 with PPO as it is usually written: what benchmark/speed.py compares algos/rl2_ppo.py (GRU) with, and attention.

The computation is the same (tests/test_peer_rl2.py compares trials, advantages, loss, gradient and update), its
organisation is that of the well-known codes:

* a single Gymnasium environment for each trial in a `gymnasium.vector.SyncVectorEnv`; a wrapper plays the episodes of
  one task, each world by itself, and puts the previous step, its reward and end of episode, into the observation;
* NumPy to torch and back in every step, action, log-probability and value on the way;
* an update that replays the recurrent cell one step at a time, its state multiplied by a mask where a trial begins;
* attention (algos/rl2_transformer_ppo.py, whose network it borrows) that keeps no keys and values: each step of a trial
  encodes all of the trial so far. Its update, of whole trials, is ours.

Nothing is made slow on purpose: no environment checker, no validation of distributions, no `info`, a cell that is
quicker than a network of one step. `gym.make(id)` of this project is a batch of one world, which costs several times
what a world of its own does; so those in WORLDS are written for NumPy here, and only the others come from `gym.make`.
Left out: the LSTM.
"""

from functools import partial
from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

NAMES = {
    "cell.weight_ih": "w_x", "cell.weight_hh": "w_h", "cell.bias_ih": "b_x", "cell.bias_hh": "b_h",
    "policy.weight": "w_policy", "policy.bias": "b_policy", "value.weight": "w_value", "value.bias": "b_value",
    "log_std": "log_std",
}  # fmt: skip


class Bandit(gym.Env):
    """Arms that pay 1 or 0; the task is their probabilities."""

    def __init__(self, arms: int):
        self.observation_space, self.action_space = Box(0, 1, (1,), np.float64), Discrete(arms)
        self.task, self.obs = np.full(arms, 0.5), np.zeros(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options and options.get("task") is not None:
            self.task = options["task"]
        return self.obs, {}

    def step(self, action):
        return self.obs, float(self.np_random.random() < self.task[action]), False, False, {}


class HalfCheetahVel(gym.Wrapper):
    """Gymnasium's HalfCheetah-v5 with the task, reward and observation of ours; the task is the target speed."""

    def __init__(self):
        mujoco.set_mju_user_warning(lambda message: None)  # the model file's deprecated attribute, once for each world
        super().__init__(gym.make("HalfCheetah-v5", disable_env_checker=True).unwrapped)
        self.target, self.observation_space = 0.0, Box(-np.inf, np.inf, (18,), np.float64)

    def reset(self, *, seed=None, options=None):
        if options and options.get("task") is not None:
            self.target = float(options["task"][0])
        obs, info = self.env.reset(seed=seed)
        return np.append(obs, 0.0), info

    def step(self, action):
        action = np.clip(action, -1.0, 1.0)
        obs, _, terminated, truncated, info = self.env.step(action)
        velocity = info["x_velocity"]
        reward = -abs(velocity - self.target) - 0.05 * float(action @ action)
        return np.append(obs, velocity), reward, terminated, truncated, info


WORLDS = {f"Bandit{arms}-v0": partial(Bandit, arms) for arms in (5, 10, 50)} | {"HalfCheetahVel-v0": HalfCheetahVel}


class Trial(gym.Wrapper):
    """Several episodes of one task, `self.task`, one after the other; behind the last one nothing changes any more.

    Observation [I] = obs, previous obs (if asked for), action, reward, whether the previous step ended an episode.
    """

    def __init__(self, env: gym.Env, episodes: int, previous_obs: bool):
        super().__init__(env)
        self.num_seen = env.observation_space.shape[0] if previous_obs else 0
        space, self.episodes, self.task = env.action_space, episodes, None
        self.one_hot = np.eye(space.n) if isinstance(space, Discrete) else None
        self.num_actions = int(space.n) if isinstance(space, Discrete) else space.shape[0]
        self.num_previous = self.num_seen + self.num_actions + 2
        size = env.observation_space.shape[0] + self.num_previous
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float64)

    def reset(self, *, seed=None, options=None):
        obs, _ = self.env.reset(seed=seed, options={"task": self.task})
        self.left, self.obs = self.episodes, obs
        self.x = np.concatenate([obs, np.zeros(self.num_previous)])
        return self.x, {}

    def step(self, action):
        if self.left == 0:
            return self.x, 0.0, False, False, {}
        obs, reward, terminated, truncated, _ = self.env.step(action)
        done = terminated or truncated
        if done:
            self.left -= 1
            if self.left:
                obs, _ = self.env.reset(options={"task": self.task})
        shown = action if self.one_hot is None else self.one_hot[action]
        self.x = np.concatenate([obs, self.obs[: self.num_seen], shown, (reward, done)])
        self.obs = obs
        return self.x, reward, False, False, {}


def make(env_id: str, num_envs: int, args, **options) -> SyncVectorEnv:
    """One world for each trial; `options` go to `gym.make`."""

    def trial() -> gym.Env:
        if env_id in WORLDS:
            env = gym.wrappers.TimeLimit(WORLDS[env_id](), args.horizon)
        else:
            env = gym.make(env_id, max_episode_steps=args.horizon, disable_env_checker=True, **options)
        if isinstance(env.action_space, Box):
            scale = np.float32(args.action_scale)
            env = gym.wrappers.RescaleAction(env, -scale, scale)
        return Trial(env, args.episodes_per_trial, args.previous_obs)

    return SyncVectorEnv([trial] * num_envs, autoreset_mode=AutoresetMode.DISABLED)


class Agent(nn.Module):
    """A GRU cell with a policy and a value on its state."""

    def __init__(self, num_inputs: int, num_actions: int, hidden_size: int, choices: bool):
        super().__init__()
        self.cell = nn.GRUCell(num_inputs, hidden_size)
        self.policy, self.value = nn.Linear(hidden_size, num_actions), nn.Linear(hidden_size, 1)
        self.log_std = None if choices else nn.Parameter(torch.zeros(num_actions))

    def fresh(self, num_trials: int) -> Tensor:
        """The cell's state before a trial."""
        return self.cell.weight_hh.new_zeros(num_trials, self.cell.hidden_size)

    def states(self, x: Tensor, starts: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The cell's states [S, N, H] behind each of S steps, and behind the last; x [S, N, I], hidden [N, H].

        `starts` [S, N] is 1 where a trial's first step is: the state before it is forgotten.
        """
        states = []
        for x_now, start in zip(x, starts, strict=True):
            hidden = self.cell(x_now, (1 - start)[:, None] * hidden)
            states.append(hidden)
        return torch.stack(states), hidden

    def heads(self, hidden: Tensor) -> tuple[Distribution, Tensor]:
        """Policy and value [..] on states [.., H]."""
        return policy_on(self.policy(hidden), self.log_std), self.value(hidden).squeeze(-1)


def agent_like(theta: dict[str, Tensor]) -> Agent:
    """The agent with the weights of algos/rl2_ppo.py."""
    (gates, num_inputs), num_actions = theta["w_x"].shape, len(theta["b_policy"])
    agent = Agent(num_inputs, num_actions, gates // 3, "log_std" not in theta).to(theta["w_x"])
    agent.load_state_dict({name: theta[NAMES[name]] for name, _ in agent.named_parameters()})
    return agent


class AttentionAgent(nn.Module):
    """The network of algos/rl2_transformer_ppo.py, which remembers a trial as what it has seen of it."""

    def __init__(self, theta: dict[str, Tensor], encode):
        super().__init__()
        self.theta, self.encode = nn.ParameterDict(theta), encode

    def fresh(self, num_trials: int) -> Tensor:
        """Nothing seen so far [0, N, I]."""
        return self.theta["w_in"].new_zeros(0, num_trials, self.theta["w_in"].shape[1])

    def states(self, x: Tensor, starts: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Features [S, N, H] of each of S steps, and all that has been seen; all trials start together."""
        seen = torch.cat([seen, x])
        features, _ = self.encode(dict(self.theta), seen.transpose(0, 1), {})
        return features.transpose(0, 1)[-len(x) :], seen

    def heads(self, feature: Tensor) -> tuple[Distribution, Tensor]:
        """Policy and value [..] on features [.., H]."""
        theta = self.theta
        output = nn.functional.linear(feature, theta["w_policy"], theta["b_policy"])
        value = nn.functional.linear(feature, theta["w_value"], theta["b_value"]).squeeze(-1)
        return policy_on(output, theta.get("log_std")), value


def policy_on(output: Tensor, log_std: Tensor | None) -> Distribution:
    """Of choices, or Gaussian where there is a standard deviation."""
    if log_std is None:
        return Categorical(logits=output, validate_args=False)
    return Independent(Normal(output, log_std.exp(), validate_args=False), 1, validate_args=False)


class Batch(NamedTuple):
    """N trials of S steps."""

    x: Tensor  # [S, N, I]
    action: Tensor  # [S, N] numbers of choices, or [S, N, A] unclipped
    log_prob: Tensor  # [S, N] when the action was drawn
    start: Tensor  # [S, N] 1 for a trial's first step
    mask: Tensor  # [S, N] 0 behind a trial's end
    advantage: Tensor  # [S, N] normalised
    target: Tensor  # [S, N]


def draw(policy: Distribution) -> Tensor:
    return policy.sample()


@torch.no_grad()
def collect(envs: SyncVectorEnv, tasks: np.ndarray, agent: Agent | AttentionAgent, args) -> Batch:
    """A trial of each of the tasks [N, P]."""
    envs.set_attr("task", list(tasks))
    x, _ = envs.reset()
    hidden = agent.fresh(len(x))
    start, mask, ended, rows = hidden.new_ones(len(x)), hidden.new_ones(len(x)), np.zeros(len(x)), []
    for _ in range(args.episodes_per_trial * args.horizon):
        x_now = torch.from_numpy(x).to(hidden)
        states, hidden = agent.states(x_now[None], start[None], hidden)
        policy, value = agent.heads(states[-1])
        action = draw(policy)
        x, reward, *_ = envs.step(action.cpu().numpy())
        reward = torch.from_numpy(reward).to(hidden)
        rows.append((x_now, action, policy.log_prob(action), start, mask, value, reward))
        start = torch.zeros_like(start)
        ended += x[:, -1]
        if (ended >= args.episodes_per_trial).all():
            break
        mask = torch.from_numpy(ended < args.episodes_per_trial).to(hidden)
    *columns, mask, value, reward = (torch.stack(column) for column in zip(*rows, strict=True))
    return Batch(*columns, mask, *advantages(reward, value * mask, mask, args))


def discount(reward: Tensor, gamma: float) -> Tensor:
    """Sums [S, N] of the later rewards, each step's weight gamma times the one before."""
    sums, total = torch.empty_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        sums[t] = total = reward[t] + gamma * total
    return sums


def advantages(reward: Tensor, value: Tensor, mask: Tensor, args) -> tuple[Tensor, Tensor]:
    """Normalised advantages and the value's targets [S, N]; reward and value are 0 where mask is."""
    is_step = mask.bool()
    unit = discount(reward, args.gamma)[is_step].std(correction=0)
    reward = reward / torch.where(unit > 1e-6, unit, 1.0)
    next_value = torch.cat([value[1:], torch.zeros_like(value[:1])])
    advantage = discount(reward + args.gamma * next_value - value, args.gamma * args.gae_lambda)
    own = advantage[is_step]
    return (advantage - own.mean()) / (own.std(correction=0) + 1e-8) * mask, (advantage + value) * mask


def ppo_loss(agent: Agent | AttentionAgent, batch: Batch, args, entropy_coef: float) -> Tensor:
    """The clipped loss of some trials, replayed step by step from their beginning."""
    states, _ = agent.states(batch.x, batch.start, agent.fresh(batch.x.shape[1]))
    policy, value = agent.heads(states)
    ratio = ((policy.log_prob(batch.action) - batch.log_prob) * batch.mask).exp()
    loss = torch.max(-batch.advantage * ratio, -batch.advantage * ratio.clamp(1 - args.clip, 1 + args.clip))
    loss = loss + args.value_coef * (value - batch.target).square() - entropy_coef * policy.entropy()
    return (loss * batch.mask).sum() / batch.mask.sum()


def update(
    agent: Agent | AttentionAgent, optimizer, batch: Batch, args, remaining: float, generator: torch.Generator
) -> None:
    """Epochs of PPO over minibatches of whole trials; `remaining` is the part of training that lies ahead."""
    optimizer.param_groups[0]["lr"] = remaining * args.lr
    for _ in range(args.epochs):
        for rows in torch.randperm(batch.x.shape[1], generator=generator).tensor_split(args.minibatches):
            rows = rows.to(batch.x.device)
            loss = ppo_loss(agent, Batch(*(value[:, rows] for value in batch)), args, remaining * args.entropy_coef)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
