"""MB-MPO: learn models of the dynamics, and meta-learn, in imagination, a policy that adapts to each of them.

Paper: Clavera, Rothfuss, Schulman, Fujita, Asfour, Abbeel 2018, arXiv:1809.05214, Algorithm 1. TRPO: 1502.05477.
Run: python algos/mbmpo.py --env-id HalfCheetahForward-v0     (--help explains every flag; --cuda uses the GPU)
Result: HalfCheetahForward, 100,000 real steps: 608, 510 (the authors: 550; TRPO: 13, at a million 483); docs/mbmpo.md
Algorithm:
    [1] repeat: sample real episodes with the policy tailored to each model (at first: pi_theta), into the data D
    [2]     fit each model f_k(s, a) to its own random part of D, until its error on the rest stops falling
    [3]     several times, per model k: imagine E episodes with pi_theta; advantages A by GAE over a linear baseline
    [4]         theta'_k = theta + alpha grad mean[ pi_theta(a|s) / pi_old(a|s) A ]
    [5]         imagine E episodes in model k with pi_theta'_k, their advantages likewise
    [6]         J(theta) = mean_k mean[ pi_theta'_k(theta)(a|s) / pi_old_k(a|s) A ], theta'_k a function of theta
    [7]         g = grad J(theta), through the inner step
    [8]         d = F^-1 g by conjugate gradient, F the Hessian of mean_k KL(pi_old_k || pi_theta'_k(theta))
    [9]         theta <- theta + the longest backtracked step along d with mean KL <= delta and a better J
    [10]    real return of pi_theta, and of the policies tailored to the models
Symbols: theta'_k = params, alpha = inner_lr, f_k = predict, D = data, delta = max_kl, lambda of [3] = gae_lambda.
Shapes: a suffix names a tensor's axes (obs_NETO): N models, E episodes per model, T steps, B samples, O observation,
    A action, P task vector, F features, W all of theta, M rows of D, R of them to fit, V to stop, I inputs (O + A).
Differs from the paper: `--action-scale` 10 (1), the setting that matters most; the inner gradient is ProMP's (LVC);
    Adam's moments are fresh in each fit; no weight normalisation; imagination ends far outside what was seen.
"""

import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import grad, grad_and_value, vjp, vmap

Params = dict[str, Tensor]  # a policy: w0 [O, H], b0 [H], ..; one per model: w0 [N, O, H], ..; also models and data


@dataclass
class Args:
    env_id: str = "HalfCheetahForward-v0"
    """a task environment registered by envs/__init__.py; of a family of many tasks, one is drawn"""
    seed: int = 1
    """seed of everything: parameters, task, start states, noise"""
    iterations: int = 25
    """rounds of real episodes, of models, and of a policy; 100 in the authors' code"""
    num_models: int = 5
    """models of the ensemble (K); 5 in the paper"""
    model_size: int = 256
    """units of each of a model's two relu layers; 512 in the paper"""
    model_lr: float = 1e-3
    """Adam's step size for the models; 1e-3 in the paper"""
    model_batch_size: int = 128
    """transitions of a model's minibatch; 500 in the authors' code, 128 in their later one"""
    model_epochs: int = 20
    """passes over the data of one fit, at most; 500 in the authors' code"""
    data_size: int = 100_000
    """latest real transitions that are kept (D); 100,000 in the authors' code"""
    real_episodes: int = 4
    """real episodes of each tailored policy in an iteration; the authors' 20 policies play one each"""
    meta_steps: int = 30
    """meta-updates of an iteration; 30 in the authors' code"""
    episodes_per_task: int = 20
    """imagined episodes in each model before, and again after the inner step (E); 200 in the authors' code"""
    horizon: int = 200
    """steps of an episode, real or imagined (T); 200 in the paper, 1000 in its long runs"""
    hidden_size: int = 32
    """units of each of the policy's two tanh layers; 32 in the paper"""
    action_scale: float = 10.0
    """a policy output of +-s spans the action bounds; 1 in the paper"""
    inner_lr: float = 0.03
    """step size of adaptation (alpha); 0.001 in the paper; 0 is the loop without meta-learning, one policy for all"""
    gamma: float = 0.99
    """discount; 0.99 in the paper"""
    gae_lambda: float = 1.0
    """lambda of GAE; 1, the return minus the baseline, in the paper"""
    max_kl: float = 0.01
    """trust region (delta), mean KL of a meta-update; 0.01 in the paper"""
    cg_damping: float = 1e-5
    """added to the Fisher matrix's diagonal; 1e-5 in the authors' code"""
    fisher_fraction: float = 0.25
    """share of the episodes in the Fisher products; smaller is faster, and noisier in the step's direction"""
    cuda: bool = False
    """policy, models and imagination on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU's threads; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "gae_lambda", "fisher_fraction", "cg_damping"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= {"inner_lr": (0, 1e6), "horizon": (6, 10**9), "data_size": (10, 10**9)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {low:g} to {high:g}")


class Rollouts(NamedTuple):
    """E episodes of each of N tasks (inside vmap: of one task, without N); steps behind an early end have mask 0."""

    obs: Tensor  # [N, E, T, O]
    action: Tensor  # [N, E, T, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, E, T] log pi(a|s) under the policy that drew it: data, not a function of theta
    mask: Tensor  # [N, E, T] 1 while the episode runs
    advantage: Tensor  # [N, E, T] mean 0 and standard deviation 1 over each task's steps
    total: Tensor  # [N, E] undiscounted return


def init_policy(envs, hidden_size: int, generator: Generator) -> Params:
    """Xavier-uniform weights, zero biases, standard deviation 1."""
    sizes = *envs.single_observation_space.shape, hidden_size, hidden_size, *envs.single_action_space.shape
    params = {"log_std": torch.zeros(sizes[-1])}
    for i, (n, m) in enumerate(pairwise(sizes)):
        params[f"w{i}"] = (2 * torch.rand(n, m, generator=generator) - 1) * math.sqrt(6 / (n + m))
        params[f"b{i}"] = torch.zeros(m)
    return params


def policy(params: Params, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian policy: mean [.., B, A] and standard deviation [.., 1, A] for obs [.., B, O]."""
    hidden = torch.tanh(obs @ params["w0"] + params["b0"].unsqueeze(-2))
    hidden = torch.tanh(hidden @ params["w1"] + params["b1"].unsqueeze(-2))
    mean = hidden @ params["w2"] + params["b2"].unsqueeze(-2)
    return mean, params["log_std"].clamp_min(math.log(1e-6)).exp().unsqueeze(-2)


def unflatten(vector_W: Tensor, like: Params) -> Params:
    """Cut one vector into parameters with the names and shapes of `like`."""
    parts = vector_W.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}


def average(*values: Tensor) -> list[Tensor]:
    """Means over torchrun's processes, each with its part of the tasks; the values themselves if there is only one."""
    if dist.is_initialized():
        dist.all_reduce(vector := torch.cat([x.detach().flatten() for x in values]).div_(dist.get_world_size()))
        values = [part.view_as(x) for part, x in zip(vector.split([x.numel() for x in values]), values, strict=True)]
    return [x.detach() for x in values]


def gae(reward_NET: Tensor, value_NET: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (1506.02438), 0 behind the last step; discounted returns with values 0."""
    delta_NET = reward_NET + gamma * torch.nn.functional.pad(value_NET[..., 1:], (0, 1)) - value_NET
    tails = [torch.zeros_like(delta_NET[..., 0])]
    for delta_NE in reversed(delta_NET.unbind(-1)):
        tails.append(delta_NE + gamma * gae_lambda * tails[-1])
    return torch.stack(tails[:0:-1], -1)


def linear_baseline(obs_NETO: Tensor, return_NET: Tensor, mask_NET: Tensor) -> Tensor:
    """Values [N, E, T]: each task's ridge regression of returns on o, o^2, t, t^2, t^3, 1 (arXiv:1604.06778)."""
    t_T = torch.arange(obs_NETO.shape[2], device=obs_NETO.device).double() / 100
    time_NETK = torch.stack([t_T, t_T**2, t_T**3, t_T**0], -1).expand(*return_NET.shape, 4)
    obs_NETO = obs_NETO.double().clamp(-10, 10)
    x_NBF = (torch.cat([obs_NETO, obs_NETO**2, time_NETK], -1) * mask_NET[..., None]).flatten(1, 2)
    y_NB1 = return_NET.double().flatten(1)[..., None]
    gram_NFF = x_NBF.mT @ x_NBF + 1e-5 * torch.eye(x_NBF.shape[-1]).to(x_NBF)
    return (x_NBF @ torch.linalg.solve(gram_NFF, x_NBF.mT @ y_NB1)).view_as(return_NET).to(return_NET)


@torch.no_grad()
def rollout(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> tuple[Tensor, ...]:
    """E episodes of each task, in step, with one policy for all or one per task: a batch's obs to mask, and rewards."""
    N, E, seed = len(tasks_NP), args.episodes_per_task, int(torch.randint(2**31, (1,), generator=generator))
    noise_TNEA = torch.randn(args.horizon, N, E, envs.single_action_space.shape[0], generator=generator)
    tasks_NP, noise_TNEA = envs.unwrapped.share(tasks_NP), envs.unwrapped.share(noise_TNEA, 1).to(tasks_NP)
    obs, _ = envs.reset(seed=seed, options={"tasks": tasks_NP.repeat_interleave(E, 0)})
    mask_NE, steps, threads = torch.ones(len(tasks_NP), E).to(tasks_NP), [], torch.get_num_threads()
    torch.set_num_threads(1)  # one step's small matrices gain nothing from threads that spin on the physics' cores
    for noise_NEA in noise_TNEA:
        mean_NEA, std = policy(params, obs_NEO := obs.view(*mask_NE.shape, -1))
        action_NEA = mean_NEA + std * noise_NEA
        obs, reward, terminated, _, _ = envs.step(action_NEA.flatten(0, 1))
        steps.append((obs_NEO, action_NEA, mean_NEA, mask_NE, reward.view_as(mask_NE)))
        mask_NE = 1 - terminated.view_as(mask_NE).to(tasks_NP)
    torch.set_num_threads(threads)
    obs_NETO, action_NETA, mean_NETA, *rest = (torch.stack(x, 2) for x in zip(*steps, strict=True))
    return obs_NETO, action_NETA, Normal(mean_NETA, std.unsqueeze(-2), False).log_prob(action_NETA).sum(-1), *rest


def sample(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> Rollouts:
    """E episodes of each task, and their advantages."""
    *data, mask_NET, reward_NET = rollout(envs, tasks_NP, params, args, generator)
    value_NET = linear_baseline(data[0], gae(reward_NET, 0 * reward_NET, args.gamma, 1.0), mask_NET)  # [3]
    advantage_NET = gae(reward_NET, value_NET, args.gamma, args.gae_lambda)
    weight_NET = mask_NET / mask_NET.sum((1, 2), keepdim=True)
    mean_N11 = (weight_NET * advantage_NET).sum((1, 2), keepdim=True)
    std_N11 = (weight_NET * (advantage_NET - mean_N11).square()).sum((1, 2), keepdim=True).sqrt() + 1e-8
    return Rollouts(*data, mask_NET, (advantage_NET - mean_N11) * mask_NET / std_N11, reward_NET.sum(-1))


def ratios(params: Params, batch: Rollouts) -> Tensor:
    """pi(a|s) over that of the policy that drew a [.., E, T], 1 where mask is 0; N may lead the batch and params."""
    policies = Normal(*policy(params, batch.obs.flatten(-3, -2)), validate_args=False)
    log_prob = policies.log_prob(batch.action.flatten(-3, -2)).sum(-1).view(batch.mask.shape)
    return ((log_prob - batch.log_prob) * batch.mask).exp()


def lvc_step(params: Params, support: Rollouts, args: Args, scale: float = 1.0) -> Params:
    """One inner step of all tasks at once: from shared parameters, or one set per task, to one set per task."""

    def objective(params: Params, batch: Rollouts) -> Tensor:
        return (ratios(params, batch) * batch.advantage).sum() / batch.mask.sum()

    gradient = vmap(grad(objective), (0 if params["b0"].ndim == 2 else None, 0))(params, support)
    return {name: value + scale * args.inner_lr * gradient[name] for name, value in params.items()}  # [4]


def init_models(envs, args: Args, generator: Generator) -> Params:
    """Weights of the ensemble, Xavier-uniform w [N, inputs, units], and biases b [N, 1, units], zero."""
    obs_size, action_size = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    models = {}
    for i, (n, m) in enumerate(pairwise((obs_size + action_size, args.model_size, args.model_size, obs_size))):
        models[f"w{i}"] = (2 * torch.rand(args.num_models, n, m, generator=generator) - 1) * math.sqrt(6 / (n + m))
        models[f"b{i}"] = torch.zeros(args.num_models, 1, m)
    return models


def change(models: Params, x: Tensor) -> Tensor:
    """Normalised change of the observation [.., B, O] for normalised inputs x [.., B, I]; of all models, N leads."""
    hidden = torch.relu(x @ models["w0"] + models["b0"])
    return torch.relu(hidden @ models["w1"] + models["b1"]) @ models["w2"] + models["b2"]


def predict(models: Params, obs: Tensor, action: Tensor) -> Tensor:
    """f_k(s, a) for obs [N * B, O] and actions within the bounds [N * B, A], B for each model."""
    x = ((torch.cat([obs, action], -1) - models["x_mean"]) / models["x_std"]).unflatten(0, (len(models["w0"]), -1))
    return obs + change(models, x).flatten(0, 1) * models["y_std"] + models["y_mean"]


def fit_models(envs, models: Params, data: Params, args: Args, generator: Generator) -> tuple[Params, dict]:
    """Each model on its own random 80 % of the data, all at once, until its smoothed error on the rest rises."""
    x_MI, y_MO = torch.cat([data["obs"], data["action"]], -1), data["next_obs"] - data["obs"]
    low, high = torch.cat([data["obs"], data["next_obs"]]).aminmax(dim=0)
    stats = {"x_mean": x_MI.mean(0), "x_std": x_MI.std(0) + 1e-6, "y_mean": y_MO.mean(0), "y_std": y_MO.std(0) + 1e-6}
    x_MI, y_MO = (x_MI - stats["x_mean"]) / stats["x_std"], (y_MO - stats["y_mean"]) / stats["y_std"]
    order_NM = torch.rand(args.num_models, len(x_MI), generator=generator).argsort(1)
    train_NR, valid_NV = envs.unwrapped.share(order_NM).to(x_MI.device).tensor_split([4 * len(x_MI) // 5], 1)
    weights = {name: x.clone().requires_grad_() for name, x in models.items() if name[0] in "wb"}
    optimizer, kept = torch.optim.Adam(weights.values(), args.model_lr), weights

    def error(weights: Params, rows: Tensor) -> Tensor:
        return (change(weights, x_MI[rows]) - y_MO[rows]).square().mean()

    average_N = 1.5 * vmap(error)(weights, valid_NV).detach()  # so high that no fit ends before its error has settled
    running_N11 = torch.ones_like(average_N).bool()[:, None, None]
    for epoch in range(1, args.model_epochs + 1):  # noqa: B007
        for rows in torch.randperm(train_NR.shape[1], generator=generator).to(x_MI.device).split(args.model_batch_size):
            for x, dx in zip(weights.values(), vmap(grad(error))(weights, train_NR[:, rows]).values(), strict=True):
                x.grad = dx
            optimizer.step()
        error_N = vmap(error)(weights, valid_NV).detach()
        kept = {name: torch.where(running_N11, x, kept[name]).detach() for name, x in weights.items()}
        before_N, average_N = average_N, 0.9 * average_N + 0.1 * error_N
        running_N11 = running_N11 & (average_N < before_N)[:, None, None]
        if not envs.unwrapped.in_any_process(running_N11.any()):
            break
    stats |= {"low": 2 * low - high - 1e-3, "high": 2 * high - low + 1e-3}  # a range beyond what was seen
    final = float(*average(vmap(error)(kept, valid_NV).mean()))
    return kept | stats, {"train/model_error": final, "train/model_epochs": epoch}


def tailor(imagined, models: Params, tasks_NP: Tensor, theta: Params, args: Args, generator: Generator):
    """One inner step on episodes imagined in the models: these, and a policy for each model."""
    imagined.follow(lambda obs, action: predict(models, obs, action), models["low"], models["high"])
    support = sample(imagined, tasks_NP, theta, args, generator)
    return support, lvc_step(theta, support, args)


def tailored_policies(theta: Params, supports: list[Rollouts], query: Rollouts, args: Args):
    """Surrogates J_k [N]; means [N, B, A] and standard deviations [N, 1, A] of the tailored policies on the query."""
    params = lvc_step(theta, supports[0], args)
    J_N = (ratios(params, query) * query.advantage).sum((1, 2)) / query.mask.sum((1, 2))
    return J_N, *policy(params, query.obs.flatten(1, 2))


def conjugate_gradient(product, b_W: Tensor, iterations: int = 10) -> Tensor:
    """Solve F x = b for a positive definite F, given as the function v -> F v."""
    x_W, r_W, p_W = torch.zeros_like(b_W), b_W, b_W
    for _ in range(iterations):
        Fp_W, rr = product(p_W), r_W @ r_W
        step = rr / (p_W @ Fp_W).clamp_min(1e-30)
        x_W, r_W = x_W + step * p_W, r_W - step * Fp_W
        p_W = r_W + (r_W @ r_W) / rr.clamp_min(1e-30) * p_W
    return x_W


def fisher_product(vector_W: Tensor, like: Params, adapted, supports: list, query: NamedTuple, args: Args):
    """v -> F v + damping v on a share of the episodes: F, the KL's Hessian at theta, as J^T M J, linearised once."""
    keep = max(1, round(args.fisher_fraction * args.episodes_per_task))
    *supports, query = (type(batch)(*(x[:, :keep] for x in batch)) for batch in (*supports, query))
    weight_NB1 = (query.mask / query.mask.sum((1, 2), keepdim=True)).flatten(1)[..., None] / len(query.mask)
    outputs, transposed = vjp(lambda w_W: adapted(unflatten(w_W, like), supports, query, args)[1:], vector_W)
    _, jacobian = vjp(lambda cotangents: transposed(cotangents)[0], outputs)  # J^T c is linear in c: its vjp is J v

    def product(v_W: Tensor) -> Tensor:
        mean_NBA, std_N1A = jacobian(v_W)[0]
        # M, the Fisher matrix of a Gaussian, has 1 / std^2 for the mean and 2 / std^2 for the standard deviation.
        metric = weight_NB1 * mean_NBA / outputs[1] ** 2, 2 / len(query.mask) * std_N1A / outputs[1] ** 2
        return average(transposed(metric)[0])[0] + args.cg_damping * v_W

    return product


def trpo_step(theta: Params, adapted, supports: list, query: NamedTuple, args: Args) -> tuple[Params, dict]:
    """One constrained step on theta, or none, and its statistics; `adapted` gives J_i [N] and the policies' outputs."""
    vector_W = torch.cat([value.flatten() for value in theta.values()])

    def objective(w_W: Tensor):
        J_N, *outputs = adapted(unflatten(w_W, theta), supports, query, args)
        return J_N.mean(), outputs  # [6]

    gradient_W, (before, old) = grad_and_value(objective, has_aux=True)(vector_W)
    gradient_W, before = average(gradient_W, before)  # [7]
    product = fisher_product(vector_W, theta, adapted, supports, query, args)
    direction_W = conjugate_gradient(product, gradient_W)  # [8]
    step_W = direction_W * (2 * args.max_kl / (direction_W @ product(direction_W)).clamp_min(1e-30)).sqrt()
    for fraction in (*(0.8**k for k in range(15)), 0.0):
        after, new = torch.no_grad()(objective)(vector_W + fraction * step_W)
        kl_NB = kl_divergence(Normal(*old, False), Normal(*new, False)).sum(-1) * query.mask.flatten(1)
        kl, after = average((kl_NB.sum(1) / query.mask.sum((1, 2))).mean(), after)
        if (kl <= args.max_kl) & (after > before):  # [9]; one wait for the device
            break
    stats = {"kl": kl, "improvement": after - before, "step": fraction, "gradient_norm": gradient_W.norm()}
    return unflatten(vector_W + fraction * step_W, theta), {f"train/{name}": float(x) for name, x in stats.items()}


def play(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> tuple[Params, Tensor, int]:
    """Real episodes of every policy: transitions, but those behind the horizon's last action; returns [N, E]; steps."""
    real = replace(args, episodes_per_task=args.real_episodes)
    obs, action, _, mask_NET, reward_NET = map(envs.unwrapped.gather, rollout(envs, tasks_NP, params, real, generator))
    data = {"obs": obs[:, :, :-1], "action": envs.executed(action)[:, :, :-1], "next_obs": obs[:, :, 1:]}
    return {k: x[mask_NET[:, :, :-1] > 0] for k, x in data.items()}, reward_NET.sum(-1), int(mask_NET.sum())


def evaluate(envs, imagined, models: Params, theta: Params, args: Args) -> dict:
    """Real returns of pi_theta and of the tailored policies, with equal start states and noise in every evaluation."""
    seeded, tasks_NP = Generator().manual_seed, envs.unwrapped.tasks[:1].expand(args.num_models, -1)
    adapted = tailor(imagined, models, tasks_NP, theta, args, seeded(args.seed + 1))[1]
    returns = [play(envs, tasks_NP, params, args, seeded(args.seed + 2))[1] for params in (theta, adapted)]  # [10]
    ci95 = 1.96 * float((returns[1] - returns[0]).std(correction=0)) / math.sqrt(returns[0].numel())
    return {f"test/return_k{k}": float(x.mean()) for k, x in enumerate(returns)} | {"test/gain_ci95": ci95}


def train(envs, imagined, args: Args, run: "Run", state: dict) -> None:
    """The paper's Algorithm 1, from `state` on."""
    device, share, gather = envs.unwrapped.device, envs.unwrapped.share, envs.unwrapped.gather
    theta, models, data = ({name: x.to(device) for name, x in state[k].items()} for k in ("theta", "models", "data"))
    models = {name: share(x) if name[0] in "wb" else x for name, x in models.items()}  # w0, b0, ..: one per model
    (generator := Generator()).set_state(state["generator"])
    tasks_NP = envs.unwrapped.sample_tasks(1, Generator().manual_seed(args.seed)).expand(args.num_models, -1)
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        params = tailor(imagined, models, tasks_NP, theta, args, generator)[1] if data else theta
        new, return_NE, steps = play(envs, tasks_NP, params, args, generator)  # [1]
        data = {name: torch.cat([data.get(name, x[:0]), x])[-args.data_size :] for name, x in new.items()}
        models, stats = fit_models(envs, models, data, args, generator)  # [2]
        for _ in range(args.meta_steps):
            support, params = tailor(imagined, models, tasks_NP, theta, args, generator)
            query, diverged = sample(imagined, tasks_NP, params, args, generator), imagined.diverged_share  # [5]
            theta, step = trpo_step(theta, tailored_policies, [support], query, args)
        state |= {"iteration": iteration, "generator": generator.get_state(), "theta": theta, "data": data}
        state["env_steps"] += steps
        state["models"] = {name: gather(x) if name[0] in "wb" else x for name, x in models.items()}
        totals = {"imagined_pre": support.total, "imagined_post": query.total, "return_post": return_NE}
        means = {f"train/{k}": float(*average(x.mean())) for k, x in totals.items()} | {"train/diverged": diverged}
        run.log(state, stats | step | means | evaluate(envs, imagined, models, theta, args))
        run.save(state)
        if envs.unwrapped.in_any_process(run.stopping):
            break


class Run:
    """A run's folder (args.json, metrics.jsonl, checkpoint.pt), progress line, W&B, and an orderly end on signals."""

    def __init__(self, args, algorithm: str, iteration: int):
        from tqdm import tqdm

        name = f"{args.env_id.replace('/', '-')}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder, self.args, self.since = Path(args.resume or f"runs/{name}"), args, time.time()
        self.stopping, self.shown = False, {}
        if args.track:
            import wandb

            if args.wandb_mode == "online" and not wandb.api.api_key:  # W&B itself would prompt for it
                raise SystemExit("--track: no W&B login; run `wandb login`, or pass --wandb-mode offline")
            settings = wandb.Settings(init_timeout=30, mode=args.wandb_mode)  # an error, not a hang, without a network
            self.wandb = wandb.init(project="cleanmeta", name=name, config=vars(args), settings=settings)
        self.folder.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
        (self.folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        self.metrics = self.folder / "metrics.jsonl"  # one line an iteration; those behind the checkpoint are redone
        self.metrics.write_text("".join(self.metrics.read_text().splitlines(True)[:iteration]) if iteration else "")
        self.bar = tqdm(total=args.iterations, initial=iteration, unit="it", dynamic_ncols=True, desc=algorithm)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)
        self.bar.write("stopping after this iteration; the same signal again aborts at once")

    def log(self, state: dict, stats: dict) -> None:
        state["seconds"], self.since = round(state["seconds"] + time.time() - self.since, 3), time.time()
        record = {name: state[name] for name in ("iteration", "env_steps", "seconds")} | stats
        if bad := {name: value for name, value in record.items() if not math.isfinite(value)}:
            raise FloatingPointError(f"not finite: {bad}")
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.args.track:
            self.wandb.log(record, step=record["iteration"])
        names = [name for name in stats if name.endswith(("_pre", "_post", "_trial")) or "_k" in name]
        self.shown |= {name: f"{stats[name]:.3g}" for name in names[:3] + names[-1:]}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def save(self, state: dict) -> None:
        with open(self.folder / "checkpoint.tmp", "wb") as file:
            torch.save(state, buffer := io.BytesIO())
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")  # at every moment there is a complete one


def load_checkpoint(folder: str, algorithm: str) -> dict:
    """The state saved in a run's folder, or one line that says what is wrong. Only testzip notices a flipped bit."""
    try:
        if damaged := zipfile.ZipFile(path := Path(folder) / "checkpoint.pt").testzip():
            raise ValueError(f"damaged in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["algorithm"] != algorithm:
            raise ValueError(f"written by {state['algorithm']}, not {algorithm}")
        return state | {"args": Args(**state["args"])}
    except Exception as error:
        raise SystemExit(f"--resume {folder}: no usable checkpoint.pt there: {error!r}") from None


def main(argv: list[str] | None = None) -> None:
    here, algorithm = Path(__file__).resolve().parent, Path(__file__).stem
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # envs/ lies beside this file or algos/
    import tyro

    args = tyro.cli(Args, args=argv, description=__doc__)
    saved = load_checkpoint(args.resume, algorithm) if args.resume else {}
    args = tyro.cli(Args, args=argv, default=saved["args"]) if saved else args
    from envs import Follower, imagine, join, learning_curve, make

    leads = join(args.cuda, num_models=args.num_models)
    options = {"cuda": args.cuda, "action_scale": args.action_scale, "physics": args.physics}
    envs = make(args.env_id, args.num_models * args.real_episodes, args.horizon, **options)
    imagined = imagine(envs, args.num_models * args.episodes_per_task)
    generator = Generator().manual_seed(args.seed)
    made = {"theta": init_policy(envs, args.hidden_size, generator), "models": init_models(envs, args, generator)}
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0, "data": {}} | made
    state |= {"generator": generator.get_state()} | saved | {"args": vars(args)}
    shapes, expected = ({(k, name): tuple(s[k][name].shape) for k in made for name in made[k]} for s in (state, made))
    if shapes != expected:
        raise SystemExit(f"--resume {args.resume}: it holds {shapes}, the flags ask for {expected}")
    try:
        run = Run(args, algorithm, state["iteration"]) if leads else Follower()
        train(envs, imagined, args, run, state)
        if leads:
            run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


if __name__ == "__main__":
    main()
