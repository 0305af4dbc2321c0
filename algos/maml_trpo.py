"""MAML for reinforcement learning, with TRPO as the meta-optimiser.

Paper: Finn, Abbeel, Levine 2017, arXiv:1703.03400, Algorithm 3. TRPO: 1502.05477. Inner estimators: LVC 1810.06784,
    DiCE 1802.05098, Loaded DiCE 1909.10549, E-MAML 1803.01118. Learned step sizes (Meta-SGD): 1707.09835.
Run: python algos/maml_trpo.py --env-id HalfCheetahDir-v0     (--help explains every flag; --cuda uses the GPU)
Result: HalfCheetahDir after 0, 1, 3 inner steps: -2.5, 122, 142 (paper, T 200: -51, 293, 316); docs/maml_trpo.md
Algorithm:
    [1] repeat: draw N tasks
    [2]     per task: sample E episodes with pi_theta, the support D_i
    [3]     per batch: advantages A by GAE over a linear baseline fitted to the task's own batch, normalised
    [4]     theta'_i = theta - alpha grad L(theta; D_i), L = -mean(log pi(a|s) A); [2] to [4] K times
    [5]     per task: sample E episodes with pi_theta'_i, the query D'_i
    [6]     J(theta) = mean_i mean_D'_i [ pi_theta'_i(theta)(a|s) / pi_old_i(a|s) A ], theta'_i a function of theta
    [7]     g = grad J(theta), through the inner steps
    [8]     d = F^-1 g by conjugate gradient, F the Hessian of mean_i KL(pi_old_i || pi_theta'_i(theta))
    [9]     theta <- theta + the longest backtracked step along d with mean KL <= delta and a better J
    [10]    now and then: return on held-out tasks after 0, 1, .. inner steps (alpha halves after the first)
Symbols: theta'_i = params, alpha = inner_lr, K = inner_steps, delta = max_kl, gamma and lambda of [3] = gae_lambda.
Shapes: a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, T steps, B = E * T samples, O
    observation, A action, P task vector, F features, W all of theta. Entries of parameter dicts gain N by adaptation.
Differs from the paper: `lvc` for the plain score-function surrogate in the inner step (`--estimator score`), two tanh
    layers of 64 (ReLU, 100), `--action-scale`, exact Fisher products (its code: finite differences) on a share of the
    episodes. As there, the horizon is part of the task: the baseline sees t, nothing is bootstrapped behind T.
"""

import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import grad, grad_and_value, vjp, vmap

Params = dict[str, Tensor]  # one policy for all tasks: w0 [O, H], b0 [H], ..; one policy per task: w0 [N, O, H], ..


@dataclass
class Args:
    env_id: str = "HalfCheetahDir-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything: parameters, tasks, start states, noise"""
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
    """a policy output of +-s spans the action bounds; 1 in the paper (std 1 saturates 32 % of torques), 10 in ProMP"""
    inner_lr: float = 0.1
    """step size of adaptation (alpha); 0.1 in the paper (A.2)"""
    inner_steps: int = 1
    """inner steps in training (K), each on fresh episodes; 1 in the paper"""
    estimator: Literal["score", "lvc", "dice", "loaded", "e_maml"] = "lvc"
    """score: published MAML; lvc: low variance, small bias; dice, loaded: unbiased; e_maml: credits exploration"""
    first_order: bool = False
    """FOMAML: no derivative through the inner step"""
    learn_inner_lr: bool = False
    """learn one step size per parameter, from inner_lr on (Meta-SGD)"""
    gamma: float = 0.99
    """discount; 0.99 in all known codes"""
    gae_lambda: float = 1.0
    """lambda of GAE; 1, the return minus the baseline, in the paper"""
    max_kl: float = 0.01
    """trust region (delta), mean KL of a meta-update; 0.01 in the paper"""
    cg_damping: float = 1e-5
    """added to the Fisher matrix's diagonal; 1e-5 in the paper's code, up to 1e-2 where steps are rejected"""
    fisher_fraction: float = 0.25
    """share of the episodes in the Fisher products; smaller is faster, and noisier in the step's direction"""
    eval_every: int = 10
    """iterations from one evaluation and checkpoint to the next"""
    eval_steps: int = 3
    """inner steps of an evaluation, usually more than inner_steps"""
    cuda: bool = False
    """policy, inner and outer loop on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU's threads; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    capture_video: bool = False
    """at the end, a gif of one held-out task before and after adaptation"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "gae_lambda", "fisher_fraction", "cg_damping"), (0, 1)) | {"seed": (0, 2**31)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {low:g} to {high:g}")


class Episodes(NamedTuple):
    """E episodes of each of N tasks (inside vmap: of one task, without N); steps behind an early end have mask 0."""

    obs: Tensor  # [N, E, T, O]
    action: Tensor  # [N, E, T, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, E, T] log pi(a|s) under the policy that drew it: data, not a function of theta
    mask: Tensor  # [N, E, T] 1 while the episode runs
    advantage: Tensor  # [N, E, T] mean 0 and standard deviation 1 over each task's steps
    reward: Tensor  # [N, E, T] gamma^t r_t in units of the advantages' standard deviation
    value: Tensor  # [N, E, T] gamma^t (baseline + mean advantage), likewise: what makes dice agree with the others
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


def collect(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> Episodes:
    """E episodes of each task, and their advantages."""
    *data, mask_NET, reward_NET = rollout(envs, tasks_NP, params, args, generator)
    value_NET = linear_baseline(data[0], gae(reward_NET, 0 * reward_NET, args.gamma, 1.0), mask_NET)  # [3]
    advantage_NET = gae(reward_NET, value_NET, args.gamma, args.gae_lambda)
    weight_NET = mask_NET / mask_NET.sum((1, 2), keepdim=True)
    mean_N11 = (weight_NET * advantage_NET).sum((1, 2), keepdim=True)
    std_N11 = (weight_NET * (advantage_NET - mean_N11).square()).sum((1, 2), keepdim=True).sqrt() + 1e-8
    scale_NET = args.gamma ** torch.arange(args.horizon).to(mask_NET) * mask_NET / std_N11
    scaled = (advantage_NET - mean_N11) * mask_NET / std_N11, scale_NET * reward_NET, scale_NET * (value_NET + mean_N11)
    return Episodes(*data, mask_NET, *scaled, reward_NET.sum(-1))


def batch_log_prob(params: Params, batch: Episodes) -> Tensor:
    """log pi(a|s) [.., E, T] of a batch's actions; a leading axis N of the batch may be one of the parameters, too."""
    policies = Normal(*policy(params, batch.obs.flatten(-3, -2)), validate_args=False)
    return policies.log_prob(batch.action.flatten(-3, -2)).sum(-1).view(batch.mask.shape)


def inner_objective(log_prob_ET: Tensor, batch: Episodes, estimator: str) -> Tensor:
    """Surrogate [E] per episode; its gradient is the policy gradient, its second derivative differs by estimator."""
    if estimator in ("score", "e_maml"):  # misses all curvature that stems from the sampling distribution
        return (log_prob_ET * batch.advantage * batch.mask).sum(-1)
    log_ratio_ET = (log_prob_ET - batch.log_prob) * batch.mask
    if estimator == "lvc":  # keeps the low-variance part of it
        return (log_ratio_ET.exp() * batch.advantage).sum(-1)
    past_ET = log_ratio_ET.cumsum(-1)  # keeps all of it: a reward depends on every action before it
    if estimator == "dice":
        return (past_ET.exp() * batch.reward + (1 - log_ratio_ET.exp()) * batch.value).sum(-1)
    return ((past_ET.exp() - (past_ET - log_ratio_ET).exp()) * batch.advantage).sum(-1)


def adapt(params: Params, support: Episodes, args: Args, scale: float = 1.0) -> Params:
    """One inner step of all tasks at once: from shared parameters, or one set per task, to one set per task."""
    alpha = {name: value for name, value in params.items() if name.startswith("alpha.")}  # learned step sizes, if any
    weights = {name: value for name, value in params.items() if name not in alpha}

    def loss(weights: Params, batch: Episodes) -> Tensor:
        return -inner_objective(batch_log_prob(weights, batch), batch, args.estimator).sum() / batch.mask.sum()

    gradient = vmap(grad(loss), (0 if weights["b0"].ndim == 2 else None, 0))(weights, support)
    if args.first_order:
        gradient = {name: value.detach() for name, value in gradient.items()}
    lr = {name: scale * alpha.get("alpha." + name, args.inner_lr) for name in weights}
    return {name: value - lr[name] * gradient[name] for name, value in weights.items()} | alpha  # [4]


def adapted_policies(theta: Params, supports: list[Episodes], query: Episodes, args: Args):
    """Surrogates J_i [N]; means [N, B, A] and standard deviations [N, 1, A] of the adapted policies on the query."""
    params, score_N = theta, torch.zeros_like(query.total[:, 0])
    for support in supports:
        if args.estimator == "e_maml":  # summed over steps and episodes, not averaged; 0 at the theta that sampled
            score_N = score_N + ((batch_log_prob(params, support) - support.log_prob) * support.mask).sum((1, 2))
        params = adapt(params, support, args)
    mean_NBA, std_N1A = policy(params, query.obs.flatten(1, 2))
    log_prob_NB = Normal(mean_NBA, std_N1A, False).log_prob(query.action.flatten(1, 2)).sum(-1)
    ratio_NET = ((log_prob_NB.view(query.mask.shape) - query.log_prob) * query.mask).exp()
    J_N, return_N = (x.sum((1, 2)) / query.mask.sum((1, 2)) for x in (ratio_NET * query.advantage, query.reward))
    (mean,), N = average(return_N.mean()), len(return_N) * (dist.get_world_size() if dist.is_initialized() else 1)
    credit_N = return_N - (N * mean - return_N) / max(1, N - 1)  # baseline: the other tasks' mean
    return J_N + credit_N * score_N, mean_NBA, std_N1A


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


def evaluate(envs, theta: Params, args: Args) -> tuple[dict, Params]:
    """Adapt to held-out tasks, with the same tasks and noise in every evaluation: metrics and the adapted policies."""
    generator, params, returns = Generator().manual_seed(args.seed + 1), theta, []
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "test")
    for k in range(args.eval_steps + 1):
        batch = collect(envs, tasks_NP, params, args, generator)
        returns.append(envs.unwrapped.gather(batch.total.mean(1)))  # [10]
        params = adapt(params, batch, args, 0.5 if k else 1.0) if k < args.eval_steps else params
    ci95 = 1.96 * float((returns[-1] - returns[0]).std(correction=0)) / math.sqrt(len(tasks_NP))
    return {f"test/return_k{k}": float(x_N.mean()) for k, x_N in enumerate(returns)} | {"test/gain_ci95": ci95}, params


def train(envs, args: Args, run: "Run", state: dict) -> None:
    """The paper's Algorithm 3, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device) for name, value in state["theta"].items()}
    (generator := Generator()).set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        params, batches = theta, []
        for _ in range(args.inner_steps):
            batches.append(collect(envs, tasks_NP, params, args, generator))  # [2]
            params = adapt(params, batches[-1], args)
        batches.append(collect(envs, tasks_NP, params, args, generator))  # [5]
        theta, stats = trpo_step(theta, adapted_policies, batches[:-1], batches[-1], args)
        state["env_steps"] += int(envs.unwrapped.gather(sum(batch.mask.sum((1, 2)) for batch in batches)).sum())
        state |= {"theta": theta, "generator": generator.get_state()}
        stats |= {f"train/return_{k}": float(*average(batches[i].total.mean())) for k, i in (("pre", 0), ("post", -1))}
        stopping = envs.unwrapped.in_any_process(run.stopping)
        save = iteration % args.eval_every == 0 or iteration == args.iterations or stopping
        stats |= evaluate(envs, theta, args)[0] if save or iteration == 1 else {}
        run.log(state, stats)
        if save:
            run.save(state)
            if stopping:
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
    if args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "egl")  # no display needed; read when mujoco is first imported
    from envs import Follower, adaptation_gif, join, learning_curve, make

    leads = join(args.cuda, meta_batch_size=args.meta_batch_size)
    options = {"cuda": args.cuda, "action_scale": args.action_scale, "physics": args.physics}
    envs = make(args.env_id, args.meta_batch_size * args.episodes_per_task, args.horizon, **options)
    theta = init_policy(envs, args.hidden_size, generator := Generator().manual_seed(args.seed))
    theta |= {"alpha." + k: torch.full_like(x, args.inner_lr) for k, x in theta.items() if args.learn_inner_lr}
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0, "theta": theta}
    state |= {"generator": generator.get_state()} | saved | {"args": vars(args)}
    shapes, expected = ({name: tuple(x.shape) for name, x in params.items()} for params in (state["theta"], theta))
    if shapes != expected:
        raise SystemExit(f"--resume {args.resume}: it holds {shapes}, the flags ask for {expected}")
    try:
        run = Run(args, algorithm, state["iteration"]) if leads else Follower()
        train(envs, args, run, state)
        if leads:
            run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None
    if args.capture_video:
        params = {name: value[0] for name, value in evaluate(envs, state["theta"], args)[1].items()}
        actors = {"before": lambda obs: policy(state["theta"], obs)[0], "after": lambda obs: policy(params, obs)[0]}
        if leads:
            adaptation_gif(run.folder / "adaptation.gif", envs, actors, args.seed)


if __name__ == "__main__":
    main()
