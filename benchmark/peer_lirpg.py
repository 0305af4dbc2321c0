"""LIRPG as it is usually written: the reference that benchmark/speed.py compares algos/lirpg.py with.

The computation is the same (tests/test_peer_lives.py compares whole training runs), its organisation is that of the
authors' code, Hwhitetooth/lirpg, a PPO of OpenAI's baselines, in torch instead of TensorFlow:

* `gymnasium.vector.SyncVectorEnv` over single Gymnasium environments, NumPy to torch and back in every step;
* payments, running moments and GAE of the extrinsic reward in NumPy, steps flattened to [S] afterwards, S = N T;
* advantages of the mixed reward as a matrix of GAE's weights times TD errors;
* theta' by `torch.autograd.grad(.., create_graph=True)` and an Adam step written out, one tensor after the other, the
  policy at theta' by `torch.func.functional_call`; eta by `torch.optim.Adam`.

Nothing is made slow on purpose: no environment checker, no validation of distributions, no gradients while worlds play,
values of all steps in one batch, GAE's matrix once an update and world by world, where the authors make one of all S
steps anew in each minibatch.
"""

from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call
from torch.nn.functional import one_hot

from benchmark.peer_meta_critic import CartPole
from benchmark.peer_rl2 import policy_on


class HalfCheetahForward(gym.Wrapper):
    """Gymnasium's HalfCheetah-v5 with the observation and reward of ours."""

    def __init__(self):
        mujoco.set_mju_user_warning(lambda message: None)  # the model file's deprecated attribute, once for each world
        super().__init__(gym.make("HalfCheetah-v5", disable_env_checker=True).unwrapped)
        self.observation_space = Box(-np.inf, np.inf, (18,), np.float64)

    def reset(self, **kwargs):
        obs, _ = self.env.reset(**kwargs)
        return np.append(obs, 0.0), {}

    def step(self, action):
        action = np.clip(action, -1.0, 1.0)
        obs, _, terminated, truncated, info = self.env.step(action)
        velocity = info["x_velocity"]
        return np.append(obs, velocity), velocity - 0.1 * float(action @ action), terminated, truncated, {}


WORLDS = {"HalfCheetahForward-v0": HalfCheetahForward, "CartPoleFixed-v0": CartPole}  # a pole has 0.5 m unless told


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


class Policy(nn.Module):
    """pi, of choices or Gaussian."""

    def __init__(self, obs: int, actions: int, choices: bool):
        super().__init__()
        self.network, self.log_std = mlp(obs, actions), None if choices else nn.Parameter(torch.zeros(actions))

    def forward(self, obs: Tensor) -> Distribution:
        return policy_on(self.network(obs), self.log_std)


def draw(policy: Distribution) -> Tensor:
    return policy.sample()


class Moments:
    """Running mean and variance."""

    def __init__(self, size: int):
        self.mean, self.var, self.count = np.zeros(size), np.ones(size), 1e-4

    def update(self, x: np.ndarray) -> None:
        count = self.count + len(x)
        shift, part = x.mean(0) - self.mean, len(x) / count
        self.mean = self.mean + part * shift
        self.var = (1 - part) * self.var + part * x.var(0) + part * (1 - part) * shift**2
        self.count = count

    def normalized(self, x: np.ndarray) -> np.ndarray:
        return np.clip((x - self.mean) / np.sqrt(self.var + 1e-8), -10, 10)


class Learner:
    """Networks, what Adam remembers of them, worlds, running moments, and what the worlds have yet to pay."""

    def __init__(self, theta: dict[str, Tensor], eta: dict[str, Tensor], worlds: SyncVectorEnv, args):
        like, obs, actions = theta["policy_w0"], theta["policy_w0"].shape[1], len(theta["policy_b2"])
        self.worlds, self.args, self.like, self.actions = worlds, args, like, actions
        self.policy, self.mixed_value = Policy(obs, actions, "log_std" not in theta), mlp(obs, 1)
        self.reward, self.extrinsic_value = mlp(obs + actions, 1), mlp(obs, 1)
        sources = ((self.policy.network, theta, "policy"), (self.mixed_value, theta, "value"))
        for network, params, name in (*sources, (self.reward, eta, "reward"), (self.extrinsic_value, eta, "value")):
            network.to(like)
            names = {f"{2 * i}.{kind}": f"{name}_{kind[0]}{i}" for i in range(3) for kind in ("weight", "bias")}
            network.load_state_dict({own: params[theirs] for own, theirs in names.items()})
        if self.policy.log_std is not None:
            self.policy.log_std = nn.Parameter(theta["log_std"].clone())
        self.theta = [*self.policy.parameters(), *self.mixed_value.parameters()]
        self.eta = [*self.reward.parameters(), *self.extrinsic_value.parameters()]
        self.optimizer = torch.optim.Adam(self.eta, args.reward_lr, eps=1e-5)
        self.adam = [(torch.zeros_like(x), torch.zeros_like(x)) for x in self.theta]
        self.adam_steps = 0
        N = worlds.num_envs
        self.obs_moments, self.return_moments = Moments(obs), Moments(1)
        self.discounted, self.steps, self.due = np.zeros(N), np.zeros(N), np.zeros(N)
        self.obs, _ = worlds.reset(seed=args.seed)

    def intrinsic(self, obs: Tensor, action: Tensor) -> Tensor:
        """r_in [..]."""
        features = action if action.is_floating_point() else one_hot(action, self.actions)
        return self.reward(torch.cat([obs, features], -1)).squeeze(-1).tanh()


def make(state: dict, envs, args, number: int) -> Learner:
    """From a state that train() begins with, in worlds of its own."""
    if args.env_id not in WORLDS:
        raise SystemExit(f"--peer: {args.env_id} has no single environment here; allowed is {', '.join(WORLDS)}")

    def world() -> gym.Env:
        return gym.wrappers.TimeLimit(WORLDS[args.env_id](), args.horizon)

    worlds = SyncVectorEnv([world] * number, autoreset_mode=AutoresetMode.SAME_STEP)
    return Learner(state["theta"], state["eta"], worlds, args)


class Stream(NamedTuple):
    """T steps of N worlds."""

    raw_obs: np.ndarray  # [T, N, O]
    obs: Tensor  # [T + 1, N, O] normalised; the last one after the steps
    action: Tensor  # [T, N] or [T, N, A]
    log_prob: Tensor  # [T, N]
    paid: np.ndarray  # [T, N] delayed rewards
    discounted: np.ndarray  # [T, N] discounted sums of rewards since an episode began
    fell: np.ndarray  # [T, N]
    done: np.ndarray  # [T, N]


@torch.no_grad()
def collect(learner: Learner) -> Stream:
    """Further steps of all worlds."""
    args, rows = learner.args, []
    for _ in range(args.rollout_steps):
        obs = torch.from_numpy(learner.obs_moments.normalized(learner.obs)).to(learner.like)
        policy = learner.policy(obs)
        action = draw(policy)
        next_obs, reward, fell, late, _ = learner.worlds.step(action.cpu().numpy())
        done = fell | late
        learner.discounted = args.gamma * learner.discounted + reward
        learner.due = learner.due + reward
        learner.steps = learner.steps + 1
        pays = done | (learner.steps % args.delay == 0)
        row = learner.obs, obs, action, policy.log_prob(action), learner.due * pays, learner.discounted, fell, done
        rows.append(row)
        learner.due = learner.due * ~pays
        learner.discounted, learner.steps = learner.discounted * ~done, learner.steps * ~done
        learner.obs = next_obs
    raw_obs, obs, action, log_prob, paid, discounted, fell, done = zip(*rows, strict=True)
    last = torch.from_numpy(learner.obs_moments.normalized(learner.obs)).to(learner.like)
    obs, action, log_prob = torch.stack([*obs, last]), torch.stack(action), torch.stack(log_prob)
    return Stream(np.stack(raw_obs), obs, action, log_prob, *(np.stack(x) for x in (paid, discounted, fell, done)))


class Batch(NamedTuple):
    """What the minibatches of an update have in common: S = N T steps, world after world."""

    obs: Tensor  # [S, O]
    action: Tensor  # [S] or [S, A]
    log_prob: Tensor  # [S]
    weight: Tensor  # [N, T, T] of a step's TD error (last axis) in the advantage of another one
    mixed_delta: Tensor  # [S] TD error without the learned reward
    mixed_value: Tensor  # [S]
    level_weight: Tensor  # [S] of the mean learned reward in a step's TD error
    advantage: Tensor  # [S] of the extrinsic reward
    target: Tensor  # [S] of its value


def gae(delta: np.ndarray, done: np.ndarray, decay: float) -> np.ndarray:
    """Advantages [T, ..] of TD errors."""
    advantage, total = np.empty_like(delta), np.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        advantage[t] = total = delta[t] + decay * ~done[t] * total
    return advantage


def gae_weights(done: np.ndarray, decay: float) -> np.ndarray:
    """[N, T, T]: row i of a world is decay^(j - i) for the steps j from i to its episode's end."""
    steps, worlds = done.shape
    matrix = np.zeros((worlds, steps, steps))
    powers = decay ** np.arange(steps)
    for world in range(worlds):
        ends = np.flatnonzero(done[:, world]) + 1
        for first, last in zip([0, *ends], [*ends, steps], strict=True):
            for i in range(first, last):
                matrix[world, i, i:last] = powers[: last - i]
    return matrix


@torch.no_grad()
def prepare(learner: Learner, stream: Stream) -> Batch:
    """Running moments are brought up to date, too."""
    args, reward = learner.args, stream.paid
    if args.normalize:
        learner.obs_moments.update(stream.raw_obs.reshape(-1, stream.raw_obs.shape[-1]))
        learner.return_moments.update(stream.discounted.reshape(-1, 1))
        reward = np.clip(reward / np.sqrt(learner.return_moments.var + 1e-8), -10, 10)
    discount = args.gamma * ~stream.done
    networks = learner.extrinsic_value, learner.mixed_value
    extrinsic, mixed = (network(stream.obs).squeeze(-1).cpu().numpy() for network in networks)
    decay = args.gamma * args.gae_lambda
    advantage = gae(reward + discount * extrinsic[1:] - extrinsic[:-1], stream.done, decay)
    known = args.extrinsic_coef * reward + args.live_bonus
    drop = 1 - args.gamma * ~stream.fell + 1e-8
    steps = known + discount * mixed[1:] - mixed[:-1], mixed[:-1], drop / drop.mean()
    steps = [torch.from_numpy(x).to(learner.like) for x in (*steps, advantage, advantage + extrinsic[:-1])]
    obs, action, log_prob, *steps = (
        x.transpose(0, 1).flatten(0, 1) for x in (stream.obs[:-1], stream.action, stream.log_prob, *steps)
    )
    return Batch(obs, action, log_prob, torch.from_numpy(gae_weights(stream.done, decay)).to(learner.like), *steps)


def clip_norm(gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Shortened together to a norm of 0.5, differentiably."""
    norm = (sum(g.square().sum() for g in gradients) + 1e-20).sqrt()
    return [g * (0.5 / norm).clamp(max=1) for g in gradients]


def ppo_loss(policy: Distribution, batch: Batch, rows: Tensor, advantage: Tensor, args) -> Tensor:
    """The clipped loss of a policy, its advantages normalised."""
    if args.normalize_advantages:
        advantage = (advantage - advantage.mean()) / (advantage.var(correction=0) + 1e-8).sqrt()
    ratio = (policy.log_prob(batch.action[rows]) - batch.log_prob[rows]).exp()
    return torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - args.clip, 1 + args.clip)).mean()


def mixed_loss(learner: Learner, batch: Batch, rows: Tensor) -> Tensor:
    """Of theta, with r_in as a function of eta."""
    args, obs = learner.args, batch.obs[rows]
    reward = args.intrinsic_coef * learner.intrinsic(batch.obs, batch.action)
    delta = batch.mixed_delta + reward - batch.level_weight * reward.mean()
    advantage = (batch.weight @ delta.view(len(batch.weight), -1, 1)).flatten()[rows]
    target = advantage + batch.mixed_value[rows]
    policy, value = learner.policy(obs), learner.mixed_value(obs).squeeze(-1)
    loss = ppo_loss(policy, batch, rows, advantage, args) + 0.5 * (value - target).square().mean()
    return loss - args.entropy_coef * policy.entropy().mean()


def adam_step(learner: Learner, gradients: list[Tensor]) -> list[Tensor]:
    """theta', differentiable in the gradients but for Adam's second moment."""
    learner.adam_steps += 1
    k, adam, new = learner.adam_steps, [], []
    for x, g, (mean, square) in zip(learner.theta, gradients, learner.adam, strict=True):
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g.detach().square()
        root = (square / (1 - 0.999**k)).sqrt() + 1e-5
        new.append(x - learner.args.lr / (1 - 0.9**k) * mean / root)
        adam.append((mean.detach(), square))
    learner.adam = adam
    return new


def learn(learner: Learner, batch: Batch, rows: Tensor) -> None:
    """A step of theta on a minibatch, and one of eta through it."""
    args, learns_reward = learner.args, learner.args.intrinsic_coef > 0
    loss = mixed_loss(learner, batch, rows)
    gradients = torch.autograd.grad(loss, learner.theta, create_graph=learns_reward)
    new = adam_step(learner, clip_norm(gradients))
    if learns_reward:
        names = [name for name, _ in learner.policy.named_parameters()]
        obs, params = batch.obs[rows], dict(zip(names, new, strict=False))  # V_mix's parameters come after these
        loss = ppo_loss(functional_call(learner.policy, params, (obs,)), batch, rows, batch.advantage[rows], args)
        error = (learner.extrinsic_value(obs).squeeze(-1) - batch.target[rows]).square()
        gradients = torch.autograd.grad(loss + 0.5 * error.mean(), learner.eta)
        for x, gradient in zip(learner.eta, clip_norm(gradients), strict=True):
            x.grad = gradient
        learner.optimizer.step()
    with torch.no_grad():
        for x, value in zip(learner.theta, new, strict=True):
            x.copy_(value)


def permutation(size: int) -> Tensor:
    return torch.randperm(size)


def iterate(learner: Learner) -> int:
    """Further steps and the update on them; the steps."""
    args = learner.args
    batch = prepare(learner, collect(learner))
    for _ in range(args.epochs):
        for rows in permutation(len(batch.log_prob)).tensor_split(args.minibatches):
            learn(learner, batch, rows.to(batch.obs.device))
    return len(batch.log_prob)
