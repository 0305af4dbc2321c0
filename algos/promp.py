"""ProMP: proximal meta-policy search, MAML for reinforcement learning with a clipped outer objective.

Paper: Rothfuss, Lee, Clavera, Asfour, Abbeel 2019, arXiv:1810.06784, Algorithm 1. PPO: 1707.06347.
Run: python algos/promp.py --env-id HalfCheetahDir-v0          (--help explains every flag; --cuda uses the GPU)
Result: HalfCheetahDir after 0, 1, 3 inner steps: -5, 170, 187 (MAML-TRPO in as many steps: -1, 102, 109); docs/promp.md
Algorithm:
    [1] repeat: draw N tasks
    [2]     per task: sample E episodes with pi_theta_o, theta_o = theta, the support D_i
    [3]     per batch: advantages A by GAE over a linear baseline fitted to the task's own batch, normalised
    [4]     theta'_i = theta + alpha grad J_LR(theta; D_i), J_LR = mean_D_i [ pi_theta(a|s) / pi_theta_o(a|s) A ];
            its second derivative is that of low-variance curvature (LVC); [2] to [4] K times
    [5]     per task: sample E episodes with pi_theta'_i, the query D'_i
    [6]     J_clip = mean_i mean_D'_i [ min(r A, clip(r, 1 - eps, 1 + eps) A) ], r = pi_theta'_i(theta) / pi_old_i (a|s)
    [7]     J = J_clip - eta mean_i KL(pi_theta_o || pi_theta) on D_i: theta must stay near the policy that sampled D_i
    [8]     several times on the same data: theta <- one step of Adam on J, through the inner steps
    [9]     --target-kl: eta doubles where the KL came out above 1.5 times the target, halves below 1 / 1.5 of it
    [10]    now and then: return on held-out tasks after 0, 1, .. inner steps (alpha halves after the first)
Symbols: theta'_i = params, alpha = inner_lr, K = inner_steps, eps = clip, eta = kl_coef, lambda of [3] = gae_lambda.
Shapes: a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, T steps, B = E * T samples, O
    observation, A action, P task vector, F features. Entries of parameter dicts gain N by adaptation.
Differs from the paper: nothing known; `--action-scale` is as in the authors' code. As there, the horizon is part of the
    task: the baseline sees t, nothing is bootstrapped behind T.
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
from torch.func import grad, vmap

Params = dict[str, Tensor]  # one policy for all tasks: w0 [O, H], b0 [H], ..; one policy per task: w0 [N, O, H], ..


@dataclass
class Args:
    env_id: str = "HalfCheetahDir-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything: parameters, tasks, start states, noise"""
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
    """a policy output of +-s spans the action bounds; 10 in the authors' code"""
    inner_lr: float = 0.1
    """step size of adaptation (alpha); 0.1 in the authors' code, 0.05 for random parameters"""
    inner_steps: int = 1
    """inner steps in training (K), each on fresh episodes; 1 in the authors' code, up to 3 in its sweeps"""
    outer_lr: float = 1e-3
    """Adam's step size of the meta-update; 1e-3 in the authors' code"""
    epochs: int = 5
    """steps of the meta-update on the same data; 5 in the authors' code"""
    clip: float = 0.3
    """the query's ratios gain nothing beyond 1 +- clip (epsilon); 0.3 in the authors' code"""
    kl_coef: float = 5e-4
    """weight of the KL of the policies that sampled the supports (eta); 5e-4 in the authors' code"""
    target_kl: float = 0.0
    """eta follows the KL to this target; 0 leaves it fixed; 0.01 in the authors' code for random parameters"""
    gamma: float = 0.99
    """discount; 0.99 in all known codes"""
    gae_lambda: float = 1.0
    """lambda of GAE; 1, the return minus the baseline, in the authors' code"""
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
        ranges = dict.fromkeys(("gamma", "gae_lambda", "clip"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= {"target_kl": (0, 1e6), "kl_coef": (1e-12 if self.target_kl else 0, 1e6)}  # 0 would stay 0
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


def adaptation(theta: Params, supports: list[Rollouts], args: Args) -> tuple[list[tuple], Params]:
    """Of each inner step the policy on its support, means [N, B, A] and standard deviations; the adapted parameters."""
    params, policies = theta, []
    for support in supports:
        policies.append(policy(params, support.obs.flatten(1, 2)))
        params = lvc_step(params, support, args)
    return policies, params


def step_mean(x_NET: Tensor, mask_NET: Tensor) -> Tensor:
    """Mean over each task's steps, then over tasks."""
    return ((x_NET * mask_NET).sum((1, 2)) / mask_NET.sum((1, 2))).mean()


def promp_objective(theta: Params, old: list, supports: list[Rollouts], query: Rollouts, args: Args, kl_coef: float):
    """J and its parts; `old` are the policies that sampled the supports."""
    new, params = adaptation(theta, supports, args)
    ratio_NET, kl = ratios(params, query), 0.0
    clipped_NET = ratio_NET.clamp(1 - args.clip, 1 + args.clip)
    gain = step_mean(torch.minimum(ratio_NET * query.advantage, clipped_NET * query.advantage), query.mask)  # [6]
    for before, after, support in zip(old, new, supports, strict=True):
        kl_NB = kl_divergence(Normal(*before, False), Normal(*after, False)).sum(-1)
        kl = kl + step_mean(kl_NB.view(support.mask.shape), support.mask) / len(supports)
    clipped = step_mean((ratio_NET != clipped_NET).to(gain), query.mask)
    return gain - kl_coef * kl, {"gain": gain, "kl": kl, "clipped": clipped}  # [7]


def meta_update(
    theta: Params, optimizer, supports: list[Rollouts], query: Rollouts, args: Args, kl_coef: float
) -> dict:
    """Epochs of Adam on J, which change theta in place; J's parts behind them, where gain and kl were 0 before."""
    with torch.no_grad():
        old, _ = adaptation(theta, supports, args)
    for _ in range(args.epochs):
        weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
        J, _ = promp_objective(weights, old, supports, query, args, kl_coef)
        gradients = average(*torch.autograd.grad(-J, list(weights.values())))
        for value, gradient in zip(theta.values(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()  # [8]
    with torch.no_grad():
        _, parts = promp_objective(theta, old, supports, query, args, kl_coef)
    parts["gradient_norm"] = torch.cat([value.grad.flatten() for value in theta.values()]).norm()
    return {f"train/{name}": float(value) for name, value in zip(parts, average(*parts.values()), strict=True)}


def next_kl_coef(kl_coef: float, kl: float, target_kl: float) -> float:
    """eta of the next iteration, from the KL that the present one led to; a target of 0 leaves it."""
    if target_kl and kl > 1.5 * target_kl:
        return 2 * kl_coef
    return kl_coef / 2 if target_kl and kl < target_kl / 1.5 else kl_coef  # [9]


def evaluate(envs, theta: Params, args: Args) -> tuple[dict, Params]:
    """Adapt to held-out tasks, with the same tasks and noise in every evaluation: metrics and the adapted policies."""
    generator, params, returns = Generator().manual_seed(args.seed + 1), theta, []
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "test")
    for k in range(args.eval_steps + 1):
        batch = sample(envs, tasks_NP, params, args, generator)
        returns.append(envs.unwrapped.gather(batch.total.mean(1)))  # [10]
        params = lvc_step(params, batch, args, 0.5 if k else 1.0) if k < args.eval_steps else params
    ci95 = 1.96 * float((returns[-1] - returns[0]).std(correction=0)) / math.sqrt(len(tasks_NP))
    return {f"test/return_k{k}": float(x_N.mean()) for k, x_N in enumerate(returns)} | {"test/gain_ci95": ci95}, params


def train(envs, args: Args, run: "Run", state: dict) -> None:
    """The paper's Algorithm 1, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.outer_lr)
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = args.outer_lr  # a resumed run may have another
    (generator := Generator()).set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        params, batches = theta, []
        for _ in range(args.inner_steps):
            batches.append(sample(envs, tasks_NP, params, args, generator))  # [2]
            params = lvc_step(params, batches[-1], args)
        batches.append(sample(envs, tasks_NP, params, args, generator))  # [5]
        kl_coef = state.get("kl_coef", args.kl_coef) if args.target_kl else args.kl_coef
        stats = meta_update(theta, optimizer, batches[:-1], batches[-1], args, kl_coef) | {"train/kl_coef": kl_coef}
        state["kl_coef"] = next_kl_coef(kl_coef, stats["train/kl"], args.target_kl)
        state["env_steps"] += int(envs.unwrapped.gather(sum(batch.mask.sum((1, 2)) for batch in batches)).sum())
        state |= {"theta": theta, "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
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
    generator = Generator().manual_seed(args.seed)
    theta = init_policy(envs, args.hidden_size, generator)
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
