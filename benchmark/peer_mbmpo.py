"""MB-MPO as it is usually written: the reference that benchmark/speed.py compares algos/mbmpo.py with.

The computation is the same (tests/test_peer_mbmpo.py compares imagined episodes, inner step, surrogate, gradient,
Fisher product, step and fit), its organisation is the usual one, a Python loop over models wherever there are models:

* a module for each member of the ensemble; each is fitted by itself, with an Adam of its own;
* imagination in one model after the other, E worlds at a time: policy, model, reward, early ends;
* an inner step for each model by `torch.autograd.grad`, made with `create_graph=True` for the meta-gradient;
* TRPO on the mean over models, Fisher products by double backward through the mean KL on all episodes; this and more
  is taken from benchmark/peer_maml_trpo.py.

Nothing is made slow on purpose: all is batched within a model, distributions are not validated, no gradient is tracked
that is not needed, the policy's standard deviation is computed once an episode and its log-probabilities at the end,
and the baseline is torch's: NumPy's linear algebra has threads of its own, which on a busy machine take many times as
long.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Independent, kl_divergence
from torch.nn import functional

from benchmark.peer_maml_trpo import Params, conjugate_gradient, fisher_product, flatten, gaussian, search


class Model(nn.Module):
    """A member of the ensemble: the next observation for an observation and an action within its bounds."""

    def __init__(self, obs: int, actions: int, size: int):
        super().__init__()
        layers = nn.Linear(obs + actions, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, obs)
        self.network = nn.Sequential(*layers)
        self.x_mean, self.x_std = torch.zeros(obs + actions), torch.ones(obs + actions)
        self.y_mean, self.y_std = torch.zeros(obs), torch.ones(obs)
        self.low, self.high = torch.full((obs,), -torch.inf), torch.full((obs,), torch.inf)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = (torch.cat([obs, action], -1) - self.x_mean) / self.x_std
        return obs + self.network(x) * self.y_std + self.y_mean


def models_like(models: Params, scales: Params) -> list[Model]:
    """A module for each of the models of algos/mbmpo.py, with its weights and these scales."""
    (number, inputs, size), obs, members = models["w0"].shape, models["w2"].shape[2], []
    for k in range(number):
        member = Model(obs, inputs - obs, size).to(models["w0"])
        for i, layer in enumerate(member.network[::2]):
            layer.weight.data.copy_(models[f"w{i}"][k].T)
            layer.bias.data.copy_(models[f"b{i}"][k, 0])
        for name, value in scales.items():
            setattr(member, name, value)
        members.append(member)
    return members


def permutation(size: int, like: Tensor) -> Tensor:
    return torch.randperm(size, device=like.device)


def fit(models: list[Model], data: Params, args) -> list[int]:
    """Each model on its own random 80 % of the data, until its smoothed error on the rest rises; its epochs."""
    x, y = torch.cat([data["obs"], data["action"]], -1), data["next_obs"] - data["obs"]
    low, high = torch.cat([data["obs"], data["next_obs"]]).aminmax(dim=0)
    scales = {"x_mean": x.mean(0), "x_std": x.std(0) + 1e-6, "y_mean": y.mean(0), "y_std": y.std(0) + 1e-6}
    x, y = (x - scales["x_mean"]) / scales["x_std"], (y - scales["y_mean"]) / scales["y_std"]
    epochs = []
    for model in models:
        for name, value in (scales | {"low": 2 * low - high - 1e-3, "high": 2 * high - low + 1e-3}).items():
            setattr(model, name, value)
        network, optimizer = model.network, torch.optim.Adam(model.parameters(), args.model_lr)
        train, valid = permutation(len(x), x).tensor_split([4 * len(x) // 5])
        x_valid, y_valid = x[valid], y[valid]
        with torch.no_grad():
            average = 1.5 * float(functional.mse_loss(network(x_valid), y_valid))
        for epoch in range(1, args.model_epochs + 1):  # noqa: B007
            for rows in train[permutation(len(train), x)].split(args.model_batch_size):
                optimizer.zero_grad()
                functional.mse_loss(network(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                error = float(functional.mse_loss(network(x_valid), y_valid))
            before, average = average, 0.9 * average + 0.1 * error
            if average >= before:
                break
        epochs.append(epoch)
    return epochs


class Episodes(NamedTuple):
    """E episodes in one model; steps after an early end have mask 0."""

    obs: Tensor  # [E, T, O]
    action: Tensor  # [E, T, A] unclipped
    log_prob: Tensor  # [E, T] under the policy that drew the action
    mask: Tensor  # [E, T] 1 while the episode runs
    reward: Tensor  # [E, T]
    advantage: Tensor  # [E, T] normalised


def baseline(obs: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """The linear feature baseline [E, T] of Duan et al. 2016, fitted to the steps of running episodes, 0 elsewhere."""
    time = (torch.arange(obs.shape[1]).to(obs) / 100)[:, None].expand(*returns.shape, 1)
    obs = obs.clamp(-10, 10)
    x = torch.cat([obs, obs**2, time, time**2, time**3, torch.ones_like(time)], -1) * mask[..., None]
    x = x.flatten(0, 1)
    gram = x.T @ x + 1e-5 * torch.eye(x.shape[1]).to(x)
    return (x @ torch.linalg.solve(gram, x.T @ returns.flatten())).view_as(returns)


def discount(reward: Tensor, gamma: float) -> Tensor:
    """Sums [E, T] of the later rewards, each step's weight gamma times the one before."""
    sums, total = torch.empty_like(reward), 0.0
    for t in reversed(range(reward.shape[1])):
        sums[:, t] = total = reward[:, t] + gamma * total
    return sums


def advantages(obs: Tensor, reward: Tensor, mask: Tensor, args) -> Tensor:
    """Generalised advantages [E, T], over the deviation of running steps, or over 0.003 of what was subtracted."""
    value = baseline(obs, discount(reward, args.gamma), mask)
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    advantage = discount(reward + args.gamma * next_value - value, args.gamma * args.gae_lambda)
    running = advantage[mask]
    level = (value[mask] + running.mean()).square().mean().sqrt()
    std = torch.maximum(running.std(correction=0), 0.003 * level) + 1e-8
    return (advantage - running.mean()) / std * mask


def mean_action(params: Params, obs: Tensor) -> Tensor:
    hidden = torch.tanh(obs @ params["w0"] + params["b0"])
    hidden = torch.tanh(hidden @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def deviation(params: Params) -> Tensor:
    return params["log_std"].clamp_min(math.log(1e-6)).exp()


def policy(params: Params, obs: Tensor) -> Independent:
    return gaussian(mean_action(params, obs), deviation(params))


def start(envs, task: Tensor) -> Tensor:
    """Start states [E, O]."""
    return envs.reset(options={"tasks": task})[0]


def noise(like: Tensor) -> Tensor:
    return torch.randn_like(like)


@torch.no_grad()
def imagine(envs, task: Tensor, model: Model, params: Params, args) -> Episodes:
    """E episodes in one model with one policy; `envs` are E worlds, of which start states and reward are used."""
    env, task = envs.unwrapped, task.expand(envs.num_envs, -1)
    obs, std, steps = start(envs, task), deviation(params), []
    over = torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
    for left in reversed(range(args.horizon)):
        mean = mean_action(params, obs)
        action = mean + std * noise(mean)
        executed = envs.executed(action)
        next_obs = model(obs, executed)
        diverged = ~((next_obs >= model.low) & (next_obs <= model.high)).all(-1)
        next_obs = torch.where((diverged | over)[:, None], obs, next_obs)
        reward = env.reward(obs, executed, next_obs, task)
        reward = reward + diverged * left * reward.clamp(max=0)  # where rewards are negative, fleeing does not pay
        reward = torch.where(over, 0.0, reward)
        steps.append((obs, action, ~over, reward))
        over, obs = over | diverged | env.ended(next_obs), next_obs
    obs, action, mask, reward = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    advantage = advantages(obs.double(), reward.double(), mask, args).to(obs)
    log_prob = policy(params, obs).log_prob(action)
    return Episodes(obs, action, log_prob, mask.to(obs), reward, advantage)


def surrogate(params: Params, episodes: Episodes) -> tuple[Tensor, Independent]:
    """Importance-weighted mean advantage of a policy on another's episodes, and its distributions there."""
    new = policy(params, episodes.obs)
    ratio = (new.log_prob(episodes.action) - episodes.log_prob).exp()
    return (ratio * episodes.advantage).sum() / episodes.mask.sum(), new


def adapt(params: Params, support: Episodes, args, create_graph: bool) -> Params:
    """One inner step in one model."""
    grads = torch.autograd.grad(surrogate(params, support)[0], list(params.values()), create_graph=create_graph)
    return {name: value + args.inner_lr * g for (name, value), g in zip(params.items(), grads, strict=True)}


def sample(envs, task: Tensor, models: list[Model], theta: Params, args) -> list[tuple[Episodes, Episodes]]:
    """For each model: episodes before, and after an inner step."""
    batches = []
    for model in models:
        support = imagine(envs, task, model, theta, args)
        params = {name: value.detach() for name, value in adapt(theta, support, args, False).items()}
        batches.append((support, imagine(envs, task, model, params, args)))
    return batches


def losses(theta: Params, batches: list[tuple[Episodes, Episodes]], args, old: list | None = None):
    """Mean surrogate and mean KL over models, and the adapted policies' distributions on the query episodes."""
    surrogates, kls, policies, with_graph = [], [], [], old is None
    for k, (support, query) in enumerate(batches):
        params = adapt(theta, support, args, with_graph)
        with torch.set_grad_enabled(with_graph):
            gain, new = surrogate(params, query)
            before = gaussian(new.mean.detach(), new.stddev.detach()) if old is None else old[k]
            surrogates.append(gain)
            kls.append((kl_divergence(before, new) * query.mask).sum() / query.mask.sum())
            policies.append(before)
    return torch.stack(surrogates).mean(), torch.stack(kls).mean(), policies


def trpo_step(theta: Params, batches: list[tuple[Episodes, Episodes]], args) -> tuple[Params, dict]:
    """One constrained step on theta; theta stays where no tried step satisfies the constraint."""
    gain, kl, old = losses(theta, batches, args)
    gradient = flatten(torch.autograd.grad(gain, list(theta.values()), retain_graph=True))
    product = fisher_product(kl, theta, args.cg_damping)
    direction = conjugate_gradient(product, gradient)
    step = direction * (2 * args.max_kl / (direction @ product(direction))).sqrt()
    before = gain.item()
    del gain, kl, product
    return search(theta, step, args.max_kl, before, lambda tried: losses(tried, batches, args, old))
