"""MAML for reinforcement learning, with TRPO as the meta-optimiser.

Paper: Finn, Abbeel, Levine 2017, arXiv:1703.03400, Algorithm 3. TRPO: 1502.05477. Inner estimators: LVC
    1810.06784, DiCE 1802.05098, Loaded DiCE 1909.10549, E-MAML 1803.01118. Learned step sizes: 1707.09835.
Run: python algos/maml_trpo.py --env-id HalfCheetahDir-v0     (--help explains every flag; --cuda: on the GPU)
Result: HalfCheetahDir, `--horizon 200 --iterations 100`, after 0, 1, 3 inner steps: -3, 669, 664 (paper: -51,
    293, 316 in episodes a fifth as long, 0.01 s a step, here 0.05 s); Navigation2D: docs/maml_trpo.md
Algorithm:
    [1] repeat: draw N tasks
    [2]     per task: sample E episodes with pi_theta, the support D_i
    [3]     per batch: advantages A by GAE over a linear baseline fitted to the task's own batch, normalised
    [4]     theta'_i = theta - alpha grad L(theta; D_i); [2] to [4] K times, each from the last theta'_i on.
            L = -mean(log pi(a|s) A), or what has the same gradient there (`inner_objective`)
    [5]     per task: sample E episodes with pi_theta'_i, the query D'_i
    [6]     J(theta) = mean_i mean_D'_i [ pi_theta'_i(a|s) / pi_old_i(a|s) A ], theta'_i a function of theta
    [7]     g = grad J(theta), through the inner steps
    [8]     d = (F + damping)^-1 g by conjugate gradient, F the Hessian of mean_i KL(pi_old_i || pi_theta'_i)
    [9]     theta <- theta + the longest step tried along d (`longest_allowed`) with KL <= delta, J better
    [10]    every eval_every iterations: return on test tasks after 0, 1, .. inner steps (2nd on: alpha / 2)
Symbols: theta'_i = params, alpha = inner_lr, K = inner_steps, delta = max_kl, lambda of [3] = gae_lambda;
    pi_old_i is the policy that sampled D'_i: pi_theta'_i at the theta before the update.
Shapes: a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, T steps, B = E * T samples,
    O observation, A action, P task vector, H hidden units, F features of the baseline, Y of time, W all of
    theta in one vector. Entries of parameter dicts (not alpha.*) gain N by adaptation. (Under torchrun each
    process has its part of the N tasks: `envs` draws and counts for all, gradients are averaged.)
Differs from the paper: the inner step climbs `lvc`, not the plain score function (`--estimator score`); two
    tanh layers of 64 (ReLU, 100); `--action-scale`; a larger `--max-kl`, for which the Fisher matrix is
    damped more; exact Fisher products (its code: finite differences) on a share of the query; the line search
    ends with a bisection. As there, the horizon is part of the task: the baseline sees t, and V is 0 at T.
"""

import math
import os
import sys
from dataclasses import dataclass
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

# One policy for all tasks: w0 [O, H], b0 [H], ..; one per task: w0 [N, O, H], ..; step sizes: alpha.w0, ..
Params = dict[str, Tensor]


@dataclass
class Args:
    env_id: str = "HalfCheetahDir-v0"
    """a task environment of envs/ or your own (module:id, file.py:class)"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, start states, noise"""
    iterations: int = 500
    """meta-updates; up to 500 in the paper (A.2)"""
    meta_batch_size: int = 40
    """tasks per meta-update and per evaluation (N); the paper: 20 for navigation, 40 for locomotion (A.2)"""
    episodes_per_task: int = 20
    """episodes per task before, and again after each inner step (E); 20 in the paper (A.2)"""
    horizon: int = 100
    """steps of an episode (T); the paper: 100 for navigation, 200 for locomotion (A.2)"""
    hidden_size: int = 64
    """units of each of the two tanh layers; 100 in the paper, 64 in ProMP and pytorch-maml-rl"""
    action_scale: float = 10.0
    """worlds divide actions by it, then clip; 1 in the paper (clips 32 % of first torques), 10 in ProMP"""
    inner_lr: float = 0.1
    """step size of adaptation (alpha); 0.1 in the paper (A.2)"""
    inner_steps: int = 1
    """inner steps in training (K), each on fresh episodes; 1 in the paper"""
    estimator: Literal["score", "lvc", "dice", "loaded", "e_maml"] = "lvc"
    """score: MAML's code; lvc: little bias; dice, loaded (lambda 1): unbiased; e_maml: for exploration"""
    credit_weight: float = 1.0
    """of e_maml's credit; 1 is unbiased, ProMP's authors have 1 / (E T), with which little of it is left"""
    first_order: bool = False
    """FOMAML: no derivative through the inner step"""
    learn_inner_lr: bool = False
    """learn one step size per parameter, from inner_lr on (Meta-SGD)"""
    gamma: float = 0.99
    """discount; 0.99 in all known codes"""
    gae_lambda: float = 0.95
    """lambda of GAE; 1, the return minus the baseline, in the papers, learns more slowly"""
    max_kl: float = 0.05
    """trust region (delta), mean KL of a meta-update; 0.01 in the paper: slower, but better in navigation"""
    cg_damping: float = 0.1
    """added to the Fisher matrix's diagonal; 1e-5 in the paper's code, where large steps follow the noise"""
    fisher_fraction: float = 0.1
    """share of the query's episodes in the Fisher products; smaller is faster, and noisier in direction"""
    eval_every: int = 10
    """iterations from one evaluation and checkpoint to the next"""
    eval_steps: int = 3
    """inner steps of an evaluation, usually more than inner_steps"""
    cuda: bool = False
    """policy, inner and outer loop on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    capture_video: bool = False
    """at the end, a gif of one test task before and after adaptation"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        if self.credit_weight != 1 and self.estimator != "e_maml":
            raise ValueError(f"--credit-weight {self.credit_weight:g}: only --estimator e_maml has a credit")
        ranges = dict.fromkeys(("gamma", "gae_lambda", "fisher_fraction", "cg_damping"), (0, 1))
        ranges["seed"] = (0, 2**31)
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


def discounted_units(batch: Episodes, gamma: float) -> Tensor:
    """gamma^t / std [.., E, T]: what makes rewards r_t the terms of a discounted, normalised return."""
    t_T = torch.arange(batch.mask.shape[-1]).to(batch.mask)
    return gamma**t_T * batch.mask / batch.std[..., None]


def inner_objective(log_prob_ET: Tensor, batch: Episodes, args: Args) -> Tensor:
    """What an inner step climbs, [E].

    All have the policy gradient, sum_t grad l_t A_t (dice: terms times gamma^t, and lambda 1). They differ in
    the second derivative: in what the meta-gradient knows of theta's influence on what is sampled. Here
    l_t = log pi(a_t|s_t), c_t = l_0 + .. + l_t, box(x) = exp(x - x of the sampling policy), 1 there:
        estimator       objective                                 what it knows of that influence
        score, e_maml   sum_t l_t A_t                             nothing (e_maml: see `surrogate`)
        lvc             sum_t box(l_t) A_t                        each step's own part, which has low variance
        dice            sum_t box(c_t) gamma^t r_t + (1 - box(l_t)) gamma^t V_t           all of it
        loaded          sum_t (box(c_t) - box(c_t - l_t)) A_t     all of it, with less variance than dice
    """
    if args.estimator in ("score", "e_maml"):
        return (log_prob_ET * batch.advantage * batch.mask).sum(-1)
    log_ratio_ET = (log_prob_ET - batch.log_prob) * batch.mask  # exp of it is box(l_t)
    if args.estimator == "lvc":
        return (log_ratio_ET.exp() * batch.advantage).sum(-1)
    so_far_ET = log_ratio_ET.cumsum(-1)  # exp of it is box(c_t): r_t depends on all actions so far
    if args.estimator == "dice":
        unit_ET = discounted_units(batch, args.gamma)
        earned_ET = so_far_ET.exp() * (unit_ET * batch.reward)
        return (earned_ET + (1 - log_ratio_ET.exp()) * (unit_ET * batch.value)).sum(-1)
    return ((so_far_ET.exp() - (so_far_ET - log_ratio_ET).exp()) * batch.advantage).sum(-1)


def adapt(params: Params, support: Episodes, args: Args, scale: float = 1.0) -> Params:
    """One inner step of all tasks at once, from the same parameters for all or from one set per task."""
    weights = {name: value for name, value in params.items() if not name.startswith("alpha.")}
    alpha = {name: params.get(f"alpha.{name}", args.inner_lr) for name in weights}  # learned, or fixed

    def loss(weights: Params, batch: Episodes) -> Tensor:
        return -inner_objective(batch_log_prob(weights, batch), batch, args).sum() / batch.mask.sum()

    weights_axis = 0 if weights["b0"].ndim == 2 else None  # None: the same for all tasks
    gradient = vmap(grad(loss), in_dims=(weights_axis, 0))(weights, support)
    if args.first_order:
        gradient = {name: value.detach() for name, value in gradient.items()}
    return params | {name: x - scale * alpha[name] * gradient[name] for name, x in weights.items()}  # [4]


def exploration_credit(query: Episodes, args: Args) -> Tensor:
    """E-MAML's weight [N] of a task's supports: the reward that they led to, less the other tasks' mean.

    The reward is over the task's std and per step, as J_i is; unlike J_i's terms it is discounted.
    """
    reward_NET = discounted_units(query, args.gamma) * query.reward
    return_N = reward_NET.sum((1, 2)) / query.mask.sum((1, 2))
    N = args.meta_batch_size
    (mean,) = average(return_N.mean())  # over all N tasks, those of other processes included
    return return_N - (N * mean - return_N) / max(1, N - 1)


def surrogate(theta: Params, supports: list[Episodes], query: Episodes, args: Args) -> tuple:
    """J_i [N] of each task, and the adapted policies on the query: means [N, B, A], deviations [N, 1, A].

    The inner steps are those of sampling, done again, as functions of theta.
    """
    params = theta
    log_likelihood_N = torch.zeros_like(query.std[:, 0])  # of all supports; 0 at the theta that sampled them
    for support in supports:
        if args.estimator == "e_maml":  # over all samples; its gradient at the old theta is the credit's
            log_ratio_NET = (batch_log_prob(params, support) - support.log_prob) * support.mask
            log_likelihood_N = log_likelihood_N + log_ratio_NET.sum((1, 2))
        params = adapt(params, support, args)
    mean_NBA, std_N1A = policy(params, query.obs.flatten(1, 2))
    log_prob_NB = normal(mean_NBA, std_N1A).log_prob(query.action.flatten(1, 2)).sum(-1)
    ratio_NET = ((log_prob_NB.view(query.mask.shape) - query.log_prob) * query.mask).exp()
    J_N = (ratio_NET * query.advantage).sum((1, 2)) / query.mask.sum((1, 2))  # [6]
    if args.estimator == "e_maml":
        J_N = J_N + args.credit_weight * exploration_credit(query, args) * log_likelihood_N
    return J_N, (mean_NBA, std_N1A)


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


def evaluate(envs, theta: Params, args: Args) -> tuple[dict, Params]:
    """Adapt to the test tasks, the same tasks and noise in every run: metrics, adapted parameters.

    A run logs the means of metrics over tasks; of a pair (x, tasks), here x is the gain of adaptation, half
    the 95 % interval of x's mean, for which equal tasks count as one.
    """
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    params = theta
    returns = []
    for k in range(args.eval_steps + 1):
        batch = collect(envs, tasks_NP, params, args, generator)
        returns.append(batch.reward.sum(-1).mean(1))  # [10]
        if k < args.eval_steps:
            params = adapt(params, batch, args, scale=1.0 if k == 0 else 0.5)
    stats = {f"test/return_k{k}": return_N for k, return_N in enumerate(returns)}
    return stats | {"test/gain_ci95": (returns[-1] - returns[0], tasks_NP)}, params


def train(envs, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 3, from `state` on: theta, generator's state, counts of iterations and steps."""
    theta = {name: value.to(envs.unwrapped.device) for name, value in state["theta"].items()}
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        run.doing("collecting")
        params = theta
        supports = []
        for _ in range(args.inner_steps):
            supports.append(collect(envs, tasks_NP, params, args, generator))  # [2]
            params = adapt(params, supports[-1], args)
        query = collect(envs, tasks_NP, params, args, generator)  # [5]
        run.doing("updating")
        theta, stats = trpo_step(theta, surrogate, supports, query, args)
        state["env_steps"] += sum(envs.unwrapped.total(batch.mask) for batch in (*supports, query))
        state.update(theta=theta, generator=generator.get_state())
        stats["train/return_pre"] = supports[0].reward.sum(-1)
        stats["train/return_post"] = query.reward.sum(-1)
        run.end_iteration(state, stats, evaluate=lambda: evaluate(envs, state["theta"], args)[0])


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
    from envs import join, make, multiply_by_onednn, records

    multiply_by_onednn()  # products of large matrices; on some processors twice as fast
    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    leads = join(args.cuda, meta_batch_size=args.meta_batch_size)  # torchrun's processes; one keeps records
    worlds = args.meta_batch_size * args.episodes_per_task
    envs = make(args.env_id, worlds, args.horizon, args.cuda, args.action_scale, physics=args.physics)
    generator = Generator().manual_seed(args.seed)
    theta = init_policy(envs, args.hidden_size, generator)
    if args.learn_inner_lr:
        theta |= {f"alpha.{name}": torch.full_like(value, args.inner_lr) for name, value in theta.items()}
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)

    def examine() -> dict:
        return evaluate(envs, state["theta"], args)[0]

    with records.open_run(args, state, envs, unit="inner steps", evaluate=examine, leads=leads) as run:
        if not args.evaluate:
            train(envs, args, run, state)
        if args.capture_video:
            # Of the first test task; alpha.*, which has no axis N, is cut, too, but not needed.
            params = {name: value[0] for name, value in evaluate(envs, state["theta"], args)[1].items()}
            run.film(envs, policy, {"before": state["theta"], "after": params})


if __name__ == "__main__":
    main()
