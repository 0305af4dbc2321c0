"""ProMP: proximal meta-policy search, MAML for reinforcement learning with a clipped outer objective.

Paper: Rothfuss, Lee, Clavera, Asfour, Abbeel 2019, arXiv:1810.06784, Algorithm 1. PPO: 1707.06347.
Run: python algos/promp.py --env-id HalfCheetahDir-v0     (--help explains every flag; --cuda: on the GPU)
Result: HalfCheetahDir, `--horizon 200 --iterations 100`, after 0, 1, 3 inner steps: -9, 665, 673
    (MAML-TRPO in as many steps: -3, 669, 664; the paper has curves only)
Algorithm:
    [1] repeat: draw N tasks
    [2]     per task: sample E episodes with pi_theta_o, theta_o = theta, the support D_i
    [3]     per batch: advantages A by GAE over a linear baseline fitted to the task's own batch, normalised
    [4]     theta'_i = theta + alpha grad J_LR(theta; D_i), J_LR = mean_D_i [ r_o A ],
            r_o = pi_theta(a|s) / pi_theta_o(a|s): low-variance curvature (LVC). [2] to [4] K times, each from
            the last theta'_i on, which then stands for theta_o
    [5]     per task: sample E episodes with pi_theta'_i, the query D'_i
    [6]     J_clip = mean_i mean_D'_i [ min(r A, clip(r, 1 - eps, 1 + eps) A) ],
            r = pi_theta'_i(a|s) / pi_old_i(a|s), theta'_i a function of theta
    [7]     J = J_clip - eta mean_i KL(pi_theta_o || pi_theta) on D_i: theta must stay near the policy of [2].
            With K > 1 the mean over the inner steps, each with its eta and the policies before that step
    [8]     several times on the same data: theta <- one step of Adam on J, through the inner steps
    [9]     --target-kl: an eta doubles if its KL came out above 1.5 times the target, halves if below 1 / 1.5
    [10]    every eval_every iterations: return on test tasks after 0, 1, .. inner steps (2nd on: alpha / 2)
Symbols: theta'_i = params, alpha = inner_lr, K = inner_steps, eps = clip, eta = kl_coef, lambda of [3] =
    gae_lambda; pi_old_i is the policy that sampled D'_i: pi_theta'_i at the theta before the update.
Shapes: a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, T steps, B = E * T samples,
    O observation, A action, P task vector, H hidden units, F features of the baseline, Y of time. Entries of
    parameter dicts gain N by adaptation. (Under torchrun each process holds its part of the N tasks: `envs`
    draws tasks and noise and counts steps for all, gradients are averaged.)
Differs from the paper's code: lambda (there 1); a floor of the advantages' deviation; alpha / 2 in later
    test steps, as in MAML's paper. As there: `--action-scale`; one eta for each inner step; the horizon is
    part of the task, the baseline sees t, and V is 0 at T.
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
from torch.func import grad, vmap
from torch.nn import functional

Params = dict[str, Tensor]  # one policy for all tasks: w0 [O, H], b0 [H], ..; one per task: w0 [N, O, H], ..


@dataclass
class Args:
    env_id: str = "HalfCheetahDir-v0"
    """a task environment of envs/ or your own (module:id, file.py:class)"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, start states, noise"""
    iterations: int = 500
    """meta-updates; 1001 in the authors' code"""
    meta_batch_size: int = 40
    """tasks per meta-update and per evaluation (N); 40 in the authors' code"""
    episodes_per_task: int = 20
    """episodes per task before, and again after each inner step (E); 20 in the authors' code"""
    horizon: int = 100
    """steps of an episode (T); 100 or 200 in the authors' code, by environment"""
    hidden_size: int = 64
    """units of each of the two tanh layers; 64 in the authors' code, 128 for the humanoid"""
    action_scale: float = 10.0
    """worlds divide actions by it, then clip: first noise spans a tenth of the bounds; 10 in authors' code"""
    inner_lr: float = 0.1
    """step size of adaptation (alpha); 0.1 in the authors' code, 0.05 where bodies differ"""
    inner_steps: int = 1
    """inner steps in training (K), each on fresh episodes; 1 in the authors' code, up to 3 in its sweeps"""
    outer_lr: float = 1e-3
    """Adam's step size of the meta-update; 1e-3 in the authors' code"""
    epochs: int = 5
    """steps of the meta-update on the same data; 5 in the authors' code"""
    clip: float = 0.3
    """the query's ratios gain nothing beyond 1 +- clip (epsilon); 0.3 in the authors' code"""
    kl_coef: float = 5e-4
    """weight of the KL from the policies that sampled the supports (eta); 5e-4 in the authors' code"""
    target_kl: float = 0.0
    """KL to adapt the etas to, also in resumed runs; 0: they stay; 0.01 in the code where bodies differ"""
    gamma: float = 0.99
    """discount; 0.99 in all known codes"""
    gae_lambda: float = 0.95
    """lambda of GAE; 1, the return minus the baseline, in the papers, learns more slowly"""
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
        ranges = dict.fromkeys(("gamma", "gae_lambda", "clip"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= {"target_kl": (0, 1e6), "kl_coef": (1e-12 if self.target_kl else 0, 1e6)}  # 0 would stay 0
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


def ratios(params: Params, batch: Episodes) -> Tensor:
    """pi(a|s) over that of the policy that drew a, [.., E, T]; 1 where the mask is 0."""
    log_ratio = (batch_log_prob(params, batch) - batch.log_prob) * batch.mask
    return log_ratio.exp()


def inner_step(params: Params, support: Episodes, args: Args, scale: float = 1.0) -> tuple[Params, Normal]:
    """One inner step of all tasks at once, from the same parameters for all or from one set per task.

    Returns the adapted parameters, and the policy before the step at the support's observations [N, B, A].
    Where params drew the support, the ratio r is 1 and grad r = grad log pi: the policy gradient. The second
    derivative of r is that of log pi plus grad log pi grad log pi^T: the influence of theta on what is
    sampled. LVC keeps it for each step alone, and drops the products of different steps, which vary most.
    """

    def objective(params: Params, batch: Episodes) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mean_BA, std_1A = policy(params, batch.obs.flatten(0, 1))
        log_prob_B = normal(mean_BA, std_1A).log_prob(batch.action.flatten(0, 1)).sum(-1)
        ratio_ET = ((log_prob_B.view(batch.mask.shape) - batch.log_prob) * batch.mask).exp()
        return (ratio_ET * batch.advantage).sum() / batch.mask.sum(), (mean_BA, std_1A)

    params_axis = 0 if params["b0"].ndim == 2 else None  # None: the same for all tasks
    gradient_and_policy = vmap(grad(objective, has_aux=True), in_dims=(params_axis, 0))
    gradient, (mean_NBA, std_N1A) = gradient_and_policy(params, support)
    adapted = {name: value + scale * args.inner_lr * gradient[name] for name, value in params.items()}  # [4]
    return adapted, normal(mean_NBA, std_N1A)


def repeat_inner_steps(theta: Params, supports: list[Episodes], args: Args) -> tuple[list[Normal], Params]:
    """Take all inner steps, from this theta, on supports that were sampled before.

    Returns for each step the policy that it starts from, at its support's observations [N, B, A]; and the
    adapted parameters after the last step.
    """
    params = theta
    policies = []
    for support in supports:
        params, before = inner_step(params, support, args)
        policies.append(before)
    return policies, params


def step_mean(x_NET: Tensor, mask_NET: Tensor) -> Tensor:
    """Mean over each task's steps, then over tasks."""
    return ((x_NET * mask_NET).sum((1, 2)) / mask_NET.sum((1, 2))).mean()


def promp_objective(
    theta: Params,
    old: list[Normal],
    supports: list[Episodes],
    query: Episodes,
    args: Args,
    kl_coef: list[float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """J and its parts; for each inner step there is a policy that sampled its support, in `old`, and an eta.

    With several inner steps the penalty is the mean over them of eta KL, each on its own support.
    """
    new, params = repeat_inner_steps(theta, supports, args)
    ratio_NET = ratios(params, query)
    clipped_NET = ratio_NET.clamp(1 - args.clip, 1 + args.clip)
    gain_NET = torch.minimum(ratio_NET * query.advantage, clipped_NET * query.advantage)
    gain = step_mean(gain_NET, query.mask)  # [6]
    is_clipped_NET = (ratio_NET != clipped_NET).to(gain)  # whether or not the minimum takes that term
    # The mean of r - 1 - log r over what pi_old_i drew is KL(pi_old_i || pi_theta'_i); r may underflow to 0.
    outer_kl_NET = ratio_NET - 1 - ratio_NET.clamp_min(1e-30).log()
    parts = {"gain": gain, "clipped": step_mean(is_clipped_NET, query.mask)}
    parts["outer_kl"] = step_mean(outer_kl_NET, query.mask)
    J = gain
    for k, support in enumerate(supports):
        kl_NB = kl_divergence(old[k], new[k]).sum(-1)  # over the dimensions of the action
        kl = step_mean(kl_NB.view(support.mask.shape), support.mask)
        J = J - kl_coef[k] * kl / len(supports)  # [7]
        parts[f"kl_k{k}"] = kl
    return J, parts


def meta_update(
    theta: Params, optimizer, supports: list[Episodes], query: Episodes, args: Args, kl_coef: list[float]
) -> dict[str, float]:
    """Steps of Adam on J, which change theta in place; J's parts after them, and the last gradient's norm.

    There are none before them: the gain and all KL would be 0, for ratios are 1 and advantages have mean 0.
    """
    # theta has not changed yet: it is the one that sampled. torch.func takes inner gradients in no_grad, too.
    with torch.no_grad():
        old, _ = repeat_inner_steps(theta, supports, args)
    for _ in range(args.epochs):
        gradient, _ = grad(promp_objective, has_aux=True)(theta, old, supports, query, args, kl_coef)
        gradient = average(*gradient.values())
        for value, ascent in zip(theta.values(), gradient, strict=True):
            value.grad = -ascent  # Adam descends
        optimizer.step()  # [8]
    with torch.no_grad():
        _, parts = promp_objective(theta, old, supports, query, args, kl_coef)
    parts["gradient_norm"] = torch.cat([value.grad.flatten() for value in theta.values()]).norm()
    means = torch.stack(average(*parts.values())).tolist()  # one wait for the GPU
    return {f"train/{name}": mean for name, mean in zip(parts, means, strict=True)}


def next_kl_coef(kl_coef: float, kl: float, target_kl: float) -> float:
    """eta of the next iteration: more where the KL came out too large, less where it came out too small."""
    if not target_kl:
        return kl_coef
    if kl > 1.5 * target_kl:
        return 2 * kl_coef
    if kl < target_kl / 1.5:
        return kl_coef / 2
    return kl_coef


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
            params, _ = inner_step(params, batch, args, scale=1.0 if k == 0 else 0.5)
    stats = {f"test/return_k{k}": return_N for k, return_N in enumerate(returns)}
    return stats | {"test/gain_ci95": (returns[-1] - returns[0], tasks_NP)}, params


def train(envs, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 1, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.outer_lr, fused=True)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = args.outer_lr  # a resumed run may have another
    generator = Generator()
    generator.set_state(state["generator"])
    kl_coef = [args.kl_coef] * args.inner_steps
    if args.target_kl and len(state.get("kl_coef", [])) == args.inner_steps:
        kl_coef = state["kl_coef"]  # a resumed run goes on with what [9] has made of it
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        run.doing("collecting")
        params = theta
        supports = []
        for _ in range(args.inner_steps):
            supports.append(collect(envs, tasks_NP, params, args, generator))  # [2]
            params, _ = inner_step(params, supports[-1], args)
        query = collect(envs, tasks_NP, params, args, generator)  # [5]
        run.doing("updating")
        stats = meta_update(theta, optimizer, supports, query, args, kl_coef)
        stats |= {f"train/kl_coef_k{k}": coef for k, coef in enumerate(kl_coef)}
        kl = [stats[f"train/kl_k{k}"] for k in range(args.inner_steps)]
        kl_coef = [next_kl_coef(*pair, args.target_kl) for pair in zip(kl_coef, kl, strict=True)]  # [9]
        state["env_steps"] += sum(envs.unwrapped.total(batch.mask) for batch in (*supports, query))
        state.update(theta=theta, optimizer=optimizer.state_dict(), kl_coef=kl_coef)
        state.update(generator=generator.get_state())
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
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)

    def examine() -> dict:
        return evaluate(envs, state["theta"], args)[0]

    with records.open_run(args, state, envs, unit="inner steps", evaluate=examine, leads=leads) as run:
        if not args.evaluate:
            train(envs, args, run, state)
        if args.capture_video:
            params = {name: value[0] for name, value in evaluate(envs, state["theta"], args)[1].items()}
            run.film(envs, policy, {"before": state["theta"], "after": params})


if __name__ == "__main__":
    main()
