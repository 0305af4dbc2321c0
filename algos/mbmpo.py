"""MB-MPO: learn models of the dynamics and, in imagination, a policy that adapts to each of them.

Paper: Clavera, Rothfuss, Schulman, Fujita, Asfour, Abbeel 2018, arXiv:1809.05214, Algorithm 1.
    TRPO: 1502.05477. The inner step's gradient, LVC: 1810.06784.
Run: python algos/mbmpo.py --env-id HalfCheetahForward-v0     (--help explains every flag; --cuda: on the GPU)
Result: HalfCheetahForward, 100,000 real steps, two seeds: 608, 510 (authors: 550; TRPO: 13, at a million 483)
Algorithm:
    [1] repeat: play real episodes with the policy adapted to each model (at first with pi_theta), into D
    [2]     fit each model f_k(s, a) to its own random part of D, until its error on the rest stops falling
    [3]     `meta_steps` times: imagine E episodes per model k with pi_theta, the support; A by GAE
    [4]         theta'_k = theta + alpha grad mean_support [ pi_theta(a|s) / pi_old(a|s) A ]
    [5]         imagine E episodes per model k with pi_theta'_k, the query; advantages A likewise
    [6]         J(theta) = mean_k mean_query [ pi_theta'_k(a|s) / pi_old_k(a|s) A ], theta'_k depends on theta
    [7]         g = grad J(theta), through the inner step
    [8]         d = F^-1 g by conjugate gradient, F the Hessian of mean_k KL(pi_old_k || pi_theta'_k)
    [9]         theta <- theta + the longest step tried along d with mean KL <= delta and a better J
    [10]    real return of pi_theta, and of the policies adapted to the models
Symbols: theta'_k = params, alpha = inner_lr, f_k = predict, D = data, delta = max_kl, lambda = gae_lambda;
    pi_old, pi_old_k are the policies that played: pi_theta, pi_theta'_k at the theta before the update.
Shapes: a suffix names a tensor's axes (obs_NETO): N models (the meta-learner's tasks), E episodes of each,
    T steps, B = E * T samples, O observation, A action, P task vector, F features of the baseline, Y of time,
    W all of theta in one vector, I inputs of a model (O + A), M rows of D, R of them to fit, V to stop.
Differs from the paper: `--action-scale` 10 (1), the setting that matters most; ProMP's inner gradient (LVC);
    fresh moments of Adam in each fit; no weight normalisation; imagination ends far from what was seen.
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import grad, grad_and_value, vjp, vmap
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

Params = dict[str, Tensor]  # one policy for all models: w0 [O, H], b0 [H], ..; one for each: w0 [N, O, H], ..


@dataclass
class Args:
    env_id: str = "HalfCheetahForward-v0"
    """a task environment of envs/ or your own (module:id, file.py:class); of its tasks one is drawn"""
    seed: int = 1
    """seed of everything but the test set: parameters, task, start states, noise"""
    iterations: int = 25
    """rounds of real episodes, of models, and of a policy; 100 in the authors' code"""
    num_models: int = 5
    """models of the ensemble (N); 5 in the paper"""
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
    """real episodes of each adapted policy in an iteration; the authors' 20 policies play one each"""
    meta_steps: int = 30
    """meta-updates of an iteration; 30 in the authors' code"""
    episodes_per_task: int = 20
    """imagined episodes in each model before, and again after the inner step (E); 200 in the authors' code"""
    horizon: int = 200
    """steps of an episode, real or imagined (T); 200 in the paper, 1000 in its long runs"""
    hidden_size: int = 32
    """units of each of the policy's two tanh layers; 32 in the paper"""
    action_scale: float = 10.0
    """worlds divide actions by it, then clip: at first noise spans a tenth of the bounds; 1 in the paper"""
    inner_lr: float = 0.03
    """step size of adaptation (alpha); 0.001 in the paper; 0: no meta-learning, one policy for all models"""
    gamma: float = 0.99
    """discount; 0.99 in the paper"""
    gae_lambda: float = 1.0
    """lambda of GAE; 1, the return minus the baseline, in the paper"""
    max_kl: float = 0.01
    """trust region (delta), mean KL of a meta-update; 0.01 in the paper"""
    cg_damping: float = 1e-5
    """added to the Fisher matrix's diagonal; 1e-5 in the authors' code"""
    fisher_fraction: float = 0.1
    """share of the query's episodes in the Fisher products; smaller is faster, and noisier in direction"""
    cuda: bool = False
    """policy, models and imagination on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "gae_lambda", "fisher_fraction", "cg_damping"), (0, 1))
        ranges |= {"seed": (0, 2**31), "inner_lr": (0, 1e6), "horizon": (6, 10**9), "data_size": (10, 10**9)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


class Episodes(NamedTuple):
    """E episodes of each of N tasks; inside vmap those of one task, without N."""

    obs: Tensor  # [N, E, T, O]
    action: Tensor  # [N, E, T, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, E, T] log pi(a|s) under the policy that drew it: data, not a function of theta
    mask: Tensor  # [N, E, T] 1 while the episode runs, 0 after an early end
    reward: Tensor  # [N, E, T]
    advantage: Tensor  # [N, E, T] less the task's mean, over the task's standard deviation (see `collect`)
    value: Tensor  # [N, E, T] the baseline plus that mean: with lambda 1, advantage = (return - value) / std
    std: Tensor  # [N, E] that standard deviation, for each episode; only maml_trpo.py needs value and std


def init_policy(envs, hidden_size: int, generator: Generator) -> Params:
    """Xavier-uniform weights, zero biases, standard deviation 1."""
    sizes = *envs.single_observation_space.shape, hidden_size, hidden_size, *envs.single_action_space.shape
    params = {"log_std": torch.zeros(sizes[-1])}
    for i, (n, m) in enumerate(pairwise(sizes)):
        params[f"w{i}"] = (2 * torch.rand(n, m, generator=generator) - 1) * math.sqrt(6 / (n + m))
        params[f"b{i}"] = torch.zeros(m)
    return params


def policy(params: Params, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian policy: mean [.., B, A] and standard deviation [.., 1, A] for obs [.., B, O], any number B."""
    hidden = torch.tanh(obs @ params["w0"] + params["b0"].unsqueeze(-2))
    hidden = torch.tanh(hidden @ params["w1"] + params["b1"].unsqueeze(-2))
    mean = hidden @ params["w2"] + params["b2"].unsqueeze(-2)
    return mean, params["log_std"].clamp_min(math.log(1e-6)).exp().unsqueeze(-2)


def normal(mean: Tensor, std: Tensor) -> Normal:
    """Gaussian actions; without torch's checks of its arguments, which would wait for the GPU each time."""
    return Normal(mean, std, validate_args=False)


def batch_log_prob(params: Params, batch: Episodes) -> Tensor:
    """log pi(a|s) [.., E, T] of a batch's actions, by one policy for all tasks or by one per task."""
    mean, std = policy(params, batch.obs.flatten(-3, -2))
    return normal(mean, std).log_prob(batch.action.flatten(-3, -2)).sum(-1).view(batch.mask.shape)


def init_models(envs, args: Args, generator: Generator) -> Params:
    """Weights of the N models: Xavier-uniform w0 [N, I, H], .. and zero biases b0 [N, 1, H], .."""
    obs_size = envs.single_observation_space.shape[0]
    inputs = obs_size + envs.single_action_space.shape[0]
    models = {}
    for i, (n, m) in enumerate(pairwise((inputs, args.model_size, args.model_size, obs_size))):
        uniform = torch.rand(args.num_models, n, m, generator=generator)
        models[f"w{i}"] = (2 * uniform - 1) * math.sqrt(6 / (n + m))
        models[f"b{i}"] = torch.zeros(args.num_models, 1, m)
    return models


def normalised_change(models: Params, x: Tensor) -> Tensor:
    """(s' - s) in its standard deviations, [N, B, O], for such (s, a) [N, B, I]; inside vmap without N."""
    hidden = torch.relu(x @ models["w0"] + models["b0"])
    hidden = torch.relu(hidden @ models["w1"] + models["b1"])
    return hidden @ models["w2"] + models["b2"]


@torch.no_grad()
def rollout(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> dict[str, Tensor]:
    """Play E episodes of each task, with one policy for all tasks or one per task: by name, [N, E, T, ..].

    `envs` has N * E worlds, a task's side by side, takes and gives tensors, and never restarts by itself.
    """
    E = args.episodes_per_task
    seed = int(torch.randint(2**31, (1,), generator=generator))
    size = args.horizon, len(tasks_NP), E, *envs.single_action_space.shape
    noise_TNEA = envs.unwrapped.noise(generator, *size, dim=1)  # normal; axis 1: tasks, of this process
    obs, _ = envs.reset(seed=seed, options={"tasks": tasks_NP.repeat_interleave(E, 0)})
    playing_NE = torch.ones_like(noise_TNEA[0, :, :, 0])
    steps = []
    with envs.unwrapped.one_thread():  # more threads would only take the cores from the physics
        for noise_NEA in noise_TNEA:
            obs_NEO = obs.unflatten(0, playing_NE.shape)
            mean_NEA, std = policy(params, obs_NEO)
            action_NEA = mean_NEA + std * noise_NEA
            obs, reward, terminated, _, _ = envs.step(action_NEA.flatten(0, 1))
            step = {"obs": obs_NEO, "action": action_NEA, "mean": mean_NEA, "mask": playing_NE}
            steps.append(step | {"reward": reward.view_as(playing_NE)})
            # After an early end `terminated` stays true, and rewards are 0.
            playing_NE = 1 - terminated.view_as(playing_NE).to(playing_NE)
    played = {name: torch.stack([step[name] for step in steps], 2) for name in steps[0]}
    policies = normal(played.pop("mean"), std.unsqueeze(-2))  # std is the same in all steps
    return played | {"log_prob": policies.log_prob(played["action"]).sum(-1)}


def discounted_returns(reward: Tensor, gamma: float) -> Tensor:
    """Discounted sums of the rewards from each step on; the last axis is that of steps."""
    tail = torch.zeros_like(reward[..., 0])
    tails = []
    for reward_now in reversed(reward.unbind(-1)):
        tail = reward_now + gamma * tail
        tails.append(tail)
    return torch.stack(list(reversed(tails)), -1)


def gae(reward: Tensor, value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (1506.02438) along the last axis; after its last step V is 0."""
    next_value = functional.pad(value[..., 1:], (0, 1))
    delta = reward + gamma * next_value - value
    return discounted_returns(delta, gamma * gae_lambda)


def linear_baseline(obs_NETO: Tensor, return_NET: Tensor, mask_NET: Tensor) -> Tensor:
    """Values [N, E, T]: each task's ridge regression of returns on o, o^2, t, t^2, t^3, 1 (1604.06778)."""
    t_T = torch.arange(obs_NETO.shape[2], device=obs_NETO.device).double() / 100
    time_NETY = torch.stack([t_T, t_T**2, t_T**3, t_T**0], -1).expand(*return_NET.shape, 4)
    obs_NETO = obs_NETO.double().clamp(-10, 10)
    # Masked features: what follows an early end is left out of the fit, and gets the value 0.
    x_NBF = (torch.cat([obs_NETO, obs_NETO**2, time_NETY], -1) * mask_NET[..., None]).flatten(1, 2)
    y_NB1 = return_NET.double().flatten(1)[..., None]
    gram_NFF = x_NBF.mT @ x_NBF + 1e-5 * torch.eye(x_NBF.shape[-1]).to(x_NBF)
    return (x_NBF @ torch.linalg.solve(gram_NFF, x_NBF.mT @ y_NB1)).view_as(return_NET).to(return_NET)


def collect(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> Episodes:
    """E episodes of each task, and their advantages."""
    played = rollout(envs, tasks_NP, params, args, generator)
    mask_NET = played["mask"]
    return_NET = discounted_returns(played["reward"], args.gamma)
    value_NET = linear_baseline(played["obs"], return_NET, mask_NET)  # [3]
    advantage_NET = gae(played["reward"], value_NET, args.gamma, args.gae_lambda)
    weight_NET = mask_NET / mask_NET.sum((1, 2), keepdim=True)
    mean_N11 = (weight_NET * advantage_NET).sum((1, 2), keepdim=True)
    centred_NET = advantage_NET - mean_N11
    subtracted_NET = value_NET + mean_N11
    std_N11 = (weight_NET * centred_NET.square()).sum((1, 2), keepdim=True).sqrt()
    level_N11 = (weight_NET * subtracted_NET.square()).sum((1, 2), keepdim=True).sqrt()
    # At least 0.3 % of the rms of what was subtracted: where actions change nothing, only what the baseline
    # cannot fit is left (less than that at T = 200), which must not be scaled up to noise of size 1.
    std_N11 = torch.maximum(std_N11, 0.003 * level_N11) + 1e-8
    return Episodes(
        **played,
        advantage=centred_NET * mask_NET / std_N11,
        value=subtracted_NET,
        std=std_N11.squeeze(-1).expand(mask_NET.shape[:2]),
    )


def transitions(envs, played: dict[str, Tensor], args: Args, generator: Generator) -> dict[str, Tensor]:
    """obs [M, O], action [M, A] as the environment executed it, and next_obs [M, O] of real episodes; and the
    place [M, N] of a row in each model's random order, from 0 to 1, for good: above 0.8 is for validation."""
    is_running = played["mask"][:, :, :-1] > 0  # not the last step: rollout ends before its next_obs
    obs = played["obs"][:, :, :-1][is_running]
    action = envs.executed(played["action"])[:, :, :-1][is_running]
    place_MN = torch.rand(len(obs), args.num_models, generator=generator).argsort(0).to(obs) / len(obs)
    return {"obs": obs, "action": action, "next_obs": played["obs"][:, :, 1:][is_running], "place": place_MN}


def measure(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean and deviation of a model's inputs (s, a) and outputs s' - s; the range in which it is trusted."""
    x_MI = torch.cat([data["obs"], data["action"]], -1)
    y_MO = data["next_obs"] - data["obs"]
    scales = {"x_mean": x_MI.mean(0), "x_std": x_MI.std(0) + 1e-6}
    scales |= {"y_mean": y_MO.mean(0), "y_std": y_MO.std(0) + 1e-6}
    low, high = torch.cat([data["obs"], data["next_obs"]]).aminmax(dim=0)
    # One width of the seen range beyond it, low - (high - low); 1e-3 for a coordinate that never changed.
    return scales | {"low": 2 * low - high - 1e-3, "high": 2 * high - low + 1e-3}


def fit_models(envs, models: Params, data: dict[str, Tensor], args: Args, generator: Generator) -> tuple:
    """Go on fitting all models at once, each to its own 80 % of the data: new models, and statistics.

    A model is done when its error on the other 20 % rises. That error is noisy, so what counts is its moving
    average. This begins at 1.5 times the first error: it falls at first even where the error does not.
    """
    scales = measure(data)
    x_MI = (torch.cat([data["obs"], data["action"]], -1) - scales["x_mean"]) / scales["x_std"]
    y_MO = (data["next_obs"] - data["obs"] - scales["y_mean"]) / scales["y_std"]
    order_NM = data["place"].argsort(dim=0, stable=True).T
    train_NR, valid_NV = order_NM.tensor_split([4 * len(x_MI) // 5], 1)
    weights = {name: x.clone().requires_grad_() for name, x in models.items()}
    optimizer = torch.optim.Adam(weights.values(), args.model_lr)

    def error(weights: Params, rows: Tensor) -> Tensor:
        return (normalised_change(weights, x_MI[rows]) - y_MO[rows]).square().mean()

    smoothed_N = 1.5 * vmap(error)(weights, valid_NV).detach()
    is_fitting_N = torch.ones_like(smoothed_N).bool()
    fitted = weights
    for epoch in range(1, args.model_epochs + 1):  # noqa: B007
        order = torch.randperm(train_NR.shape[1], generator=generator).to(x_MI.device)
        for columns in order.split(args.model_batch_size):  # of train_NR, where each model has other rows
            gradient = vmap(grad(error))(weights, train_NR[:, columns])
            for name, x in weights.items():
                x.grad = gradient[name]
            optimizer.step()  # moves also a model that is done, whose weights are safe in `fitted`
        fitted = {k: x.where(is_fitting_N[:, None, None], fitted[k]).detach() for k, x in weights.items()}
        before_N = smoothed_N
        smoothed_N = 0.9 * before_N + 0.1 * vmap(error)(weights, valid_NV).detach()
        is_fitting_N = is_fitting_N & (smoothed_N < before_N)
        if envs.unwrapped.total(is_fitting_N) == 0:
            break
    return fitted, {"train/model_error": vmap(error)(fitted, valid_NV), "train/model_epochs": epoch}


def predict(models: Params, scales: dict[str, Tensor], obs: Tensor, action: Tensor) -> Tensor:
    """f_k(s, a) [N * E, O] of obs [N * E, O] and actions as executed [N * E, A]; the first E: model 1."""
    x = (torch.cat([obs, action], -1) - scales["x_mean"]) / scales["x_std"]
    change = normalised_change(models, x.unflatten(0, (len(models["w0"]), -1))).flatten(0, 1)
    return obs + change * scales["y_std"] + scales["y_mean"]


def follow_models(imagined, models: Params, data: dict[str, Tensor]) -> None:
    """Let imagined worlds move as the models predict. Start states, rewards and early ends are not learned:
    they are the environment's, as functions of (s, a, s'). An episode that leaves the trusted range ends."""
    scales = measure(data)
    imagined.follow(partial(predict, models, scales), scales["low"], scales["high"])


def ratios(params: Params, batch: Episodes) -> Tensor:
    """pi(a|s) over that of the policy that drew a, [.., E, T]; 1 where the mask is 0."""
    log_ratio = (batch_log_prob(params, batch) - batch.log_prob) * batch.mask
    return log_ratio.exp()


def lvc_step(params: Params, support: Episodes, args: Args, scale: float = 1.0) -> Params:
    """One inner step of all tasks at once, from the same parameters for all or from one set per task.

    Where params drew the support, the ratio r is 1 and grad r = grad log pi: the policy gradient. The second
    derivative of r is that of log pi and grad log pi grad log pi^T: the influence of theta on what is
    sampled. LVC keeps it for each step alone, and drops the products of different steps, which vary most.
    """

    def objective(params: Params, batch: Episodes) -> Tensor:
        return (ratios(params, batch) * batch.advantage).sum() / batch.mask.sum()

    params_axis = 0 if params["b0"].ndim == 2 else None  # None: the same for all tasks
    gradient = vmap(grad(objective), in_dims=(params_axis, 0))(params, support)
    return {name: value + scale * args.inner_lr * gradient[name] for name, value in params.items()}  # [4]


def imagined_surrogate(theta: Params, supports: list[Episodes], query: Episodes, args: Args) -> tuple:
    """J_k [N] of each model, and the adapted policies on the query: means [N, B, A], deviations [N, 1, A]."""
    (support,) = supports  # one inner step
    params = lvc_step(theta, support, args)
    J_N = (ratios(params, query) * query.advantage).sum((1, 2)) / query.mask.sum((1, 2))  # [6]
    return J_N, policy(params, query.obs.flatten(1, 2))


def unflatten(vector_W: Tensor, like: Params) -> Params:
    """Cut one vector into parameters with the names and shapes of `like`."""
    parts = vector_W.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}


def conjugate_gradient(product, b_W: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """x, which about solves F x = b for a positive definite F, given as the function v -> F v; and F x."""
    x_W = torch.zeros_like(b_W)
    r_W = b_W  # b - F x
    p_W = b_W
    for _ in range(iterations):
        Fp_W = product(p_W)
        rr = r_W @ r_W
        step = rr / (p_W @ Fp_W).clamp_min(1e-30)
        x_W = x_W + step * p_W
        r_W = r_W - step * Fp_W
        p_W = r_W + (r_W @ r_W) / rr.clamp_min(1e-30) * p_W
    return x_W, b_W - r_W


def fisher_product(theta: Params, objectives, supports: list[Episodes], query: Episodes, args: Args):
    """v -> F v + damping v, F the Hessian at theta of the mean KL, on a share of the query's episodes.

    The KL is from the adapted policies at theta to those at theta + v, so that v = 0 is its minimum and
    F = Jac^T M Jac: Jac is the derivative by theta of the policies' outputs, M their Fisher matrix, for a
    Gaussian diagonal: 1 / std^2 for a mean, 2 / std^2 for a std. The inner steps take the whole support:
    on a share of it the policies would adapt elsewhere, and F would be that of another objective.
    """
    count = max(1, round(args.fisher_fraction * args.episodes_per_task))
    query = Episodes(*(x[:, :count] for x in query))  # the first episodes of each task
    weight_NET = query.mask / query.mask.sum((1, 2), keepdim=True) / len(query.mask)  # 1 / N for each task

    def outputs(w_W: Tensor) -> tuple[Tensor, Tensor]:
        return objectives(unflatten(w_W, theta), supports, query, args)[1]

    # vjp gives u -> Jac^T u without building Jac. That is linear in u: its own vjp is v -> (Jac^T)^T v.
    (mean_NBA, std_N1A), jac_transposed = vjp(outputs, parameters_to_vector(theta.values()))
    _, jac = vjp(lambda u: jac_transposed(u)[0], (mean_NBA, std_N1A))

    def product(v_W: Tensor) -> Tensor:
        (change,) = jac(v_W)
        d_mean_NBA, d_std_N1A = change
        M_mean_NBA = weight_NET.flatten(1)[..., None] * d_mean_NBA / std_N1A**2
        M_std_N1A = 2 / len(query.mask) * d_std_N1A / std_N1A**2  # one std for all samples of a task
        (F_v_W,) = average(*jac_transposed((M_mean_NBA, M_std_N1A)))
        return F_v_W + args.cg_damping * v_W

    return product


def longest_allowed(is_allowed) -> float:
    """0.92 of a step where that is allowed; else by backtracking, then by bisection; 0 after 15 tries."""
    fraction = 0.92  # of the step predicted: KL is not quadratic, and F is known by a share of the data
    if is_allowed(fraction):
        return fraction
    allowed = 0.0
    refused = fraction
    for _ in range(14):
        fraction = (allowed + refused) / 2 if allowed else 0.8 * refused
        if is_allowed(fraction):
            allowed = fraction
        else:
            refused = fraction
        if refused < 1.06 * allowed:  # the KL, about fraction^2, is then within 12 % of delta, if KL refused
            break
    return allowed


def trpo_step(theta: Params, objectives, supports: list[Episodes], query: Episodes, args: Args) -> tuple:
    """One step of theta within the trust region, or none, and its statistics.

    `objectives`, `surrogate` or `imagined_surrogate`, gives J_i [N] and adapted policies' outputs (step 6).
    """
    theta_W = parameters_to_vector(theta.values())

    def mean_objective(w_W: Tensor):
        J_N, policies = objectives(unflatten(w_W, theta), supports, query, args)
        return J_N.mean(), policies

    gradient_W, (J, old) = grad_and_value(mean_objective, has_aux=True)(theta_W)  # [7]
    gradient_W, J = average(gradient_W, J)
    fisher = fisher_product(theta, objectives, supports, query, args)
    direction_W, F_direction_W = conjugate_gradient(fisher, gradient_W)  # [8]
    # A small step d has a KL of about d^T F d / 2: of this one that is delta, or by the damping less.
    step_W = direction_W * (2 * args.max_kl / (direction_W @ F_direction_W).clamp_min(1e-30)).sqrt()
    tried = {0.0: (torch.zeros_like(J), J)}  # KL and J at a fraction of the step

    def is_allowed(fraction: float) -> bool:
        with torch.no_grad():  # by theta; torch.func takes the inner steps' gradients all the same
            J_new, new = mean_objective(theta_W + fraction * step_W)
        kl_NB = kl_divergence(normal(*old), normal(*new)).sum(-1) * query.mask.flatten(1)
        kl, J_new = average((kl_NB.sum(1) / query.mask.sum((1, 2))).mean(), J_new)
        tried[fraction] = kl, J_new
        return bool((kl <= args.max_kl) & (J_new > J))  # & and not `and`: one wait for the GPU

    fraction = longest_allowed(is_allowed)  # [9]
    if fraction:  # otherwise theta stays
        theta = unflatten(theta_W + fraction * step_W, theta)
    kl, J_new = tried[fraction]
    stats = {"kl": kl, "improvement": J_new - J, "step": fraction, "gradient_norm": gradient_W.norm()}
    return theta, {f"train/{name}": float(x) for name, x in stats.items()}


@torch.no_grad()
def tailoring(imagined, tasks_NP: Tensor, params: Params, others: Params, support: Episodes, args: Args):
    """KL(pi_theta || pi_theta'_k) [N], estimated on the support; and what pi_theta'_k earns in model k more
    than the next model's policy (`others`) does there [N, E], from equal starts and with equal noise."""
    change_NET = (support.log_prob - batch_log_prob(params, support)) * support.mask
    returns = []
    for used in (params, others):
        returns.append(rollout(imagined, tasks_NP, used, args, Generator().manual_seed(0))["reward"].sum(-1))
    kl_N = change_NET.sum((1, 2)) / support.mask.sum((1, 2))
    return {"train/inner_kl": kl_N, "train/own_minus_other": returns[0] - returns[1]}


def evaluate(envs, imagined, theta: Params, args: Args) -> dict:
    """Real returns of pi_theta and of the adapted policies, from equal start states and with equal noise.
    A run logs these tensors' means; of names that end in ci95, half the width of a 95 % interval."""
    real = replace(args, episodes_per_task=args.real_episodes)
    tasks_NP = real_task(envs, args)
    _, generator = envs.unwrapped.test_set(args.num_models)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    support = collect(imagined, tasks_NP, theta, args, generator)
    returns = []
    for params in (theta, lvc_step(theta, support, args)):
        played = rollout(envs, tasks_NP, params, real, Generator().manual_seed(seed))
        returns.append(played["reward"].sum(-1))  # [10]
    stats = {f"test/return_k{k}": return_NE for k, return_NE in enumerate(returns)}
    return stats | {"test/gain_ci95": returns[1] - returns[0]}


def real_task(envs, args: Args) -> Tensor:
    """The task [N, P] of all the run, the same for all models."""
    return envs.unwrapped.sample_tasks(1, Generator().manual_seed(args.seed)).expand(args.num_models, -1)


def train(envs, imagined, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 1, from `state` on."""
    theta = state["theta"]
    data = state["data"]
    # Processes of torchrun share the models, but each has all the data: `share` cuts, `gather` joins.
    models = {name: envs.unwrapped.share(x) for name, x in state["models"].items()}
    generator = Generator()
    generator.set_state(state["generator"])
    real = replace(args, episodes_per_task=args.real_episodes)
    tasks_NP = real_task(envs, args)
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        params = theta
        if data:  # before the first data there is no model to adapt to
            follow_models(imagined, models, data)
            params = lvc_step(theta, collect(imagined, tasks_NP, theta, args, generator), args)
        run.doing("collecting")
        played = rollout(envs, tasks_NP, params, real, generator)  # [1]
        new = transitions(envs, {key: envs.unwrapped.gather(x) for key, x in played.items()}, args, generator)
        joined = {name: torch.cat([data[name], x]) for name, x in new.items()} if data else new
        data = {name: x[-args.data_size :] for name, x in joined.items()}
        run.doing("fitting models")
        own = data | {"place": envs.unwrapped.share(data["place"], 1)}  # of this process's models
        models, stats = fit_models(envs, models, own, args, generator)  # [2]
        follow_models(imagined, models, data)
        for step in range(args.meta_steps):
            run.doing("updating in imagination", step, args.meta_steps)
            support = collect(imagined, tasks_NP, theta, args, generator)
            params = lvc_step(theta, support, args)
            query = collect(imagined, tasks_NP, params, args, generator)  # [5]
            theta, last_step = trpo_step(theta, imagined_surrogate, [support], query, args)
        stats |= last_step | {"train/diverged": imagined.diverged_share}  # share of the last query's episodes
        others = {k: envs.unwrapped.share(envs.unwrapped.gather(x).roll(-1, 0)) for k, x in params.items()}
        stats |= tailoring(imagined, tasks_NP, params, others, support, args)
        stats |= {"train/imagined_pre": support.reward.sum(-1), "train/imagined_post": query.reward.sum(-1)}
        stats["train/return_post"] = played["reward"].sum(-1)
        state["env_steps"] += envs.unwrapped.total(played["mask"])
        state.update(theta=theta, data=data, generator=generator.get_state())
        state["models"] = {name: envs.unwrapped.gather(x) for name, x in models.items()}
        run.end_iteration(state, stats, evaluate=lambda: evaluate(envs, imagined, state["theta"], args))


def average(*values: Tensor) -> list[Tensor]:
    """Means over torchrun's processes, each of which has computed a part; in a single one the values."""
    values = [x.detach() for x in values]
    if dist.is_initialized():
        vector = torch.cat([x.flatten() for x in values]) / dist.get_world_size()
        dist.all_reduce(vector)
        parts = vector.split([x.numel() for x in values])
        values = [part.view_as(x) for part, x in zip(parts, values, strict=True)]
    return values


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import imagine, join, make, multiply_by_onednn, records

    multiply_by_onednn()  # products of large matrices; on some processors twice as fast
    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    leads = join(args.cuda, num_models=args.num_models)  # torchrun's processes; one keeps records
    worlds = args.num_models * args.real_episodes
    envs = make(args.env_id, worlds, args.horizon, args.cuda, args.action_scale, physics=args.physics)
    imagined = imagine(envs, args.num_models * args.episodes_per_task)
    generator = Generator().manual_seed(args.seed)
    theta = init_policy(envs, args.hidden_size, generator)
    models = init_models(envs, args, generator)
    fresh = {"theta": theta, "models": models, "data": {}, "generator": generator.get_state()}
    parts = "theta", "models"
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device, evaluates=parts)

    def examine() -> dict:
        """For runs that do not train, or not yet."""
        models = {name: envs.unwrapped.share(x) for name, x in state["models"].items()}
        follow_models(imagined, models, state["data"])
        return evaluate(envs, imagined, state["theta"], args)

    with records.open_run(args, state, envs, unit="inner steps", evaluate=examine, leads=leads) as run:
        if not args.evaluate:
            train(envs, imagined, args, run, state)


if __name__ == "__main__":
    main()
