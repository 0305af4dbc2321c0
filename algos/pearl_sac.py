"""PEARL: soft actor-critic that knows the task by a guess, inferred from the transitions seen so far.

Paper: Rakelly et al. 2019, arXiv:1903.08254, Algorithms 1 and 2. SAC: 1801.01290, 1812.05905.
Run: python algos/pearl_sac.py --env-id HalfCheetahVel3-v0     (--help explains every flag; --cuda uses the GPU)
Result: HalfCheetahVel3, unseen targets, episodes 1, 2, 3: -193, -55, -63 after 294 k steps (paper's curve: about -50 at
    1 M); SparseNavigation2D, episodes 1 and 20: 1.8 and 8.6; docs/pearl_sac.md
Algorithm:
    [1] draw M training tasks; some episodes of each, with z from the prior N(0, 1), fill its replay and its context
    [2] repeat: empty the contexts of N tasks and play episodes of them, which go into replay and context,
    [3]         at first with z from the prior, then with z ~ q(z|c), c a sample of the task's context
    [4]     many times: of N tasks, B transitions (s, a, r, s') of the replay and a sample c of the context
    [5]         z ~ q(z|c), the product of a Gaussian for each transition of c
    [6]         L_Q = (Q(s, a, z) - r - gamma (min Q'(s', a', z) - alpha log pi(a'|s', z)))^2 for both critics, a' ~ pi
    [7]         L_pi = alpha log pi(a|s, z) - min Q(s, a, z), a ~ pi; z is data, the critics' weights too
    [8]         one step of Adam on L_Q + L_pi + beta KL(q(z|c) || N(0, 1)); only L_Q and KL move the encoder
    [9]         the targets Q' follow Q slowly
    [10]    now and then: returns of episodes 1, 2, .. with held-out tasks, each z ~ q(z|all transitions before it)
Symbols: theta = encoder, policy, critics q1 and q2; Q' = target; alpha = entropy_coef, or learned; beta = kl_weight;
    r in [6] = reward_scale times the reward, or the dense one; recent = the tasks' contexts.
Shapes: a suffix names a tensor's axes (rows_NTV): N tasks of a batch, M training tasks, R stored transitions, V numbers
    of one, S transitions of a context, I what the encoder sees of one, B transitions of a batch, T steps, Z latent, O
    observation, A action, P task vector.
Differs from the paper: many tasks collect at once, an episode each; all recent episodes are context (its code leaves
    those of the posterior out for some environments). From its code: next actions and target critics for a value
    network, one step on all losses for one after the other, one size of layers, no penalty on the policy's outputs.
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
from typing import Literal

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.func import grad
from torch.nn import functional

Params = dict[str, Tensor]
Buffer = dict[str, Tensor]  # rows [M, R, V]: obs, action, reward, next obs, reward to train on, ended early; count [M]
MOVED = "theta", "target", "replay", "recent"  # what train() keeps on the device


@dataclass
class Args:
    env_id: str = "HalfCheetahVel3-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything: parameters, tasks, start states, noise"""
    iterations: int = 30
    """of collecting, then updates; up to 500 in the paper's code"""
    train_tasks: int = 100
    """training tasks (M), drawn once; 100 in the paper for HalfCheetahVel"""
    tasks_per_iteration: int = 30
    """tasks that collect in an iteration, a world for each, and held-out tasks; 5 and 30 in the paper"""
    initial_episodes: int = 2
    """episodes of each training task before the first update; 10 in the paper"""
    prior_episodes: int = 1
    """episodes that a task collects with z from the prior in an iteration; 2 in the paper"""
    posterior_episodes: int = 1
    """and then with z from the posterior; 3 in the paper"""
    horizon: int = 200
    """steps of an episode (T); 200 in the paper, 20 for SparseNavigation2D"""
    updates: int = 4000
    """updates in an iteration; 2000 in the paper"""
    meta_batch_size: int = 16
    """tasks of an update (N); 16 in the paper"""
    batch_size: int = 64
    """transitions of each task in an update (B); 256 in the paper"""
    context_size: int = 64
    """transitions in a training context (S); the paper's code: 64 to 1024, 100 for HalfCheetahVel"""
    latent_size: int = 5
    """dimensions of z; 5 in the paper"""
    hidden_size: int = 128
    """units of each of three ReLU layers of all networks; in the paper 300, of the encoder 200"""
    replay_size: int = 10_000
    """transitions kept of each training task (R)"""
    lr: float = 1e-3
    """Adam's step size; 3e-4 in the paper"""
    gamma: float = 0.99
    """discount; 0.99 in the paper, 0.9 for SparseNavigation2D"""
    tau: float = 0.005
    """how fast the target critics follow; 0.005 in the paper"""
    reward_scale: float = 5.0
    """factor on rewards; 5 in the paper, 100 for SparseNavigation2D"""
    entropy_coef: float = 1.0
    """temperature (alpha); 1 in the paper; where it is learned, its start"""
    auto_entropy: bool = False
    """learn the temperature, so that the policy's entropy becomes -A"""
    kl_weight: float = 0.1
    """weight of the encoder's KL to the prior (beta); 0.1 in the paper, 1 for SparseNavigation2D"""
    next_obs: bool = False
    """the encoder also sees next observations; True in the paper where the dynamics differ"""
    dense_training: bool = False
    """the critic learns info["dense_reward"]; encoder and returns see the sparse reward"""
    eval_episodes: int = 3
    """episodes of an evaluation"""
    eval_prior_episodes: int = 1
    """the first of them, with z from the prior; the paper's code: 2, 5 for SparseNavigation2D"""
    eval_every: int = 1
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """networks and buffers on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU's threads; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    compile: bool = False
    """loss and gradient as one graph, by torch.compile (CUDA graphs on a GPU); the first update takes up to a minute"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "tau"), (0, 1)) | {"seed": (0, 2**31), "kl_weight": (0, 1e6)}
        ranges |= dict.fromkeys(("tasks_per_iteration", "meta_batch_size"), (1, self.train_tasks))
        ranges |= {"eval_prior_episodes": (1, self.eval_episodes), "replay_size": (self.horizon, 10**9)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {low:g} to {high:g}")


def init_buffer(tasks: int, size: int, width: int) -> Buffer:
    """Room for the last R = size transitions of each of M tasks; count: all that were ever stored."""
    return {"rows": torch.zeros(tasks, size, width), "count": torch.zeros(tasks, dtype=torch.int64)}


def store(buffer: Buffer, index_N: Tensor, rows_NTV: Tensor, mask_NT: Tensor) -> None:
    """Those transitions of N different tasks that mask marks, in place of the oldest."""
    place_NT = (buffer["count"][index_N, None] + mask_NT.cumsum(1).long() - 1) % buffer["rows"].shape[1]
    kept_NT = mask_NT > 0
    buffer["rows"][index_N[:, None].expand_as(kept_NT)[kept_NT], place_NT[kept_NT]] = rows_NTV[kept_NT]
    buffer["count"][index_N] += kept_NT.sum(1)


def draw(buffer: Buffer, index_N: Tensor, size: int, generator: Generator) -> Tensor:
    """Transitions [N, size, V] of these tasks, with replacement."""
    stored_N1 = buffer["count"][index_N, None].clamp_max(buffer["rows"].shape[1])
    uniform_NB = torch.rand(len(index_N), size, generator=generator, device=generator.device).to(index_N.device)
    return buffer["rows"][index_N[:, None], (uniform_NB * stored_N1).long()]


def init_networks(envs, args: Args, generator: Generator) -> Params:
    """theta: encoder, policy and critics, each of three layers of ReLUs and a last one whose outputs are near 0."""
    (obs,), (A,) = envs.single_observation_space.shape, envs.single_action_space.shape
    H, Z, theta = args.hidden_size, args.latent_size, {}
    critic = (obs + A + Z, H, H, H, 1)
    sizes = {"encoder": (obs + A + 1 + obs * args.next_obs, H, H, H, 2 * Z), "policy": (obs + Z, H, H, H, 2 * A)}
    for part, widths in (sizes | {"q1": critic, "q2": critic}).items():
        for i, (n, m) in enumerate(pairwise(widths)):
            bound = 1 / math.sqrt(n) if i < 3 else 3e-3
            theta[f"{part}_w{i}"] = bound * (2 * torch.rand(m, n, generator=generator) - 1)
            theta[f"{part}_b{i}"] = torch.zeros(m)
    return theta | ({"log_alpha": torch.tensor(args.entropy_coef).log()} if args.auto_entropy else {})


def mlp(theta: Params, part: str, x: Tensor) -> Tensor:
    """Outputs [.., outputs] of one of the networks for x [.., inputs]."""
    shape, x = x.shape[:-1], x.flatten(0, -2)  # rows: a matrix is faster, and can be changed in place
    for i in range(4):
        x = functional.linear(x if i == 0 else x.relu_(), theta[f"{part}_w{i}"], theta[f"{part}_b{i}"])
    return x.view(*shape, x.shape[-1])


def average(*values: Tensor) -> list[Tensor]:
    """Means over torchrun's processes, each with its part of the tasks; the values themselves if there is only one."""
    if dist.is_initialized():
        dist.all_reduce(vector := torch.cat([x.detach().flatten() for x in values]).div_(dist.get_world_size()))
        values = [part.view_as(x) for part, x in zip(vector.split([x.numel() for x in values]), values, strict=True)]
    return [x.detach() for x in values]


def posterior(theta: Params, context_NSI: Tensor, mask_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, Z] of q(z|c): the product of a Gaussian for each transition that mask marks, or N(0, 1)."""
    mean_NSZ, raw_NSZ = mlp(theta, "encoder", context_NSI).chunk(2, -1)
    precision_NSZ = mask_NS[..., None] / functional.softplus(raw_NSZ).clamp_min(1e-7)
    variance_NZ = 1 / torch.where(mask_NS.sum(1, keepdim=True) > 0, precision_NSZ.sum(1), 1.0)
    return variance_NZ * (precision_NSZ * mean_NSZ).sum(1), variance_NZ


def act(theta: Params, obs: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions [.., A] in [-1, 1], the tanh of a Gaussian, and log pi(a|s, z) [..], for obs [.., O], z [.., Z]."""
    mean, log_std = mlp(theta, "policy", torch.cat([obs, z], -1)).chunk(2, -1)
    raw = mean + (log_std := log_std.clamp(-20, 2)).exp() * noise
    squash = 2 * (math.log(2) - raw - functional.softplus(-2 * raw))  # log of tanh's derivative
    return raw.tanh(), (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - squash).sum(-1)


def critics(theta: Params, obs: Tensor, action: Tensor, z: Tensor) -> Tensor:
    """Both critics' Q(s, a, z) [2, ..]."""
    x = torch.cat([obs, action, z], -1)
    return torch.stack([mlp(theta, part, x).squeeze(-1) for part in ("q1", "q2")])


@torch.no_grad()
def guess(theta: Params, context_NSI: Tensor, mask_NS: Tensor, generator: Generator) -> Tensor:
    """z [N, Z] ~ q(z|c)."""
    mean_NZ, variance_NZ = posterior(theta, context_NSI, mask_NS)
    return mean_NZ + variance_NZ.sqrt() * torch.randn(mean_NZ.shape, generator=generator).to(mean_NZ)


@torch.no_grad()
def play_episode(envs, tasks_NP: Tensor, theta: Params, z_NZ: Tensor, args: Args, generator: Generator, spread: float):
    """An episode of each task, all worlds in step: transitions [N, T, V], mask [N, T], returns [N]; spread 0: means."""
    family, seed = envs.unwrapped, int(torch.randint(2**31, (1,), generator=generator))
    noise_TNA = spread * torch.randn(args.horizon, len(z_NZ), len(theta["policy_b3"]) // 2, generator=generator)
    noise_TNA, z_NZ = family.share(noise_TNA, 1).to(z_NZ), family.share(z_NZ)
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": family.share(tasks_NP)})
    mask_N, return_N, steps, threads = torch.ones_like(z_NZ[:, 0]), 0, [], torch.get_num_threads()
    torch.set_num_threads(1)  # on one step's small matrices more gain little, and they spin on the physics' cores
    for noise_NA in noise_TNA:
        action_NA, _ = act(theta, obs_NO, z_NZ, noise_NA)
        next_obs_NO, reward_N, ended_N, _, info = envs.step(action_NA)
        dense_N = info["dense_reward"] if args.dense_training else reward_N
        columns = reward_N[:, None], next_obs_NO, dense_N[:, None], ended_N[:, None], mask_N[:, None]
        steps.append(torch.cat([obs_NO, action_NA, *columns], 1))
        obs_NO, mask_N, return_N = next_obs_NO, 1 - ended_N.to(mask_N), return_N + reward_N
    torch.set_num_threads(threads)
    rows_NTV, mask_NT1 = family.gather(torch.stack(steps, 1)).tensor_split([-1], -1)
    return rows_NTV, mask_NT1.squeeze(-1), family.gather(return_N)


def collect_episodes(envs, index_N: Tensor, state: dict, args: Args, generator: Generator, size: int) -> float:
    """An episode of these training tasks into replay and context, c of `size` transitions (0: prior); mean return."""
    theta = state["theta"]
    context_NSI = draw(state["recent"], index_N, size, generator)[..., : theta["encoder_w0"].shape[1]]
    z_NZ = guess(theta, context_NSI, torch.ones_like(context_NSI[..., 0]), generator)  # [3]
    rows_NTV, mask_NT, return_N = play_episode(envs, state["tasks"][index_N], theta, z_NZ, args, generator, 1.0)
    store(state["replay"], index_N, rows_NTV, mask_NT)
    store(state["recent"], index_N, rows_NTV, mask_NT)
    state["env_steps"] += int(mask_NT.sum())
    return float(return_N.mean())


def pearl_loss(theta: Params, target: Params, batch_NBV: Tensor, context_NSI: Tensor, noise: tuple, args: Args):
    """L_Q + L_pi + beta KL, and parts of it. Whatever a term must not move is detached in it."""
    z_noise_NZ, next_noise_NBA, noise_NBA = noise
    obs, A = theta["policy_w0"].shape[1] - args.latent_size, noise_NBA.shape[-1]
    obs_NBO, action_NBA, _, next_obs_NBO, reward_NB1, ended_NB1 = batch_NBV.split([obs, A, 1, obs, 1, 1], -1)
    alpha = theta["log_alpha"].detach().exp() if args.auto_entropy else args.entropy_coef
    mean_NZ, variance_NZ = posterior(theta, context_NSI, torch.ones_like(context_NSI[..., 0]))  # [5]
    kl = 0.5 * (mean_NZ.square() + variance_NZ - 1 - variance_NZ.log()).sum(1).mean()  # L has its sum over all tasks
    z_NBZ = (mean_NZ + variance_NZ.sqrt() * z_noise_NZ)[:, None].expand(-1, batch_NBV.shape[1], -1)
    with torch.no_grad():
        next_action_NBA, log_prob_NB = act(theta, next_obs_NBO, z_NBZ, next_noise_NBA)
        next_value_NB = critics(target, next_obs_NBO, next_action_NBA, z_NBZ).amin(0) - alpha * log_prob_NB
        after_NB1 = args.gamma * (1 - ended_NB1) * next_value_NB[..., None]  # the horizon is no end
        goal_NB = (args.reward_scale * reward_NB1 + after_NB1).squeeze(-1)
    q_loss = (critics(theta, obs_NBO, action_NBA, z_NBZ) - goal_NB).square().mean((1, 2)).sum()  # [6]
    data = {name: value.detach() for name, value in theta.items()}
    new_action_NBA, log_prob_NB = act(theta, obs_NBO, z_NBZ.detach(), noise_NBA)
    value_NB = critics(data, obs_NBO, new_action_NBA, z_NBZ.detach()).amin(0)
    loss = q_loss + (alpha * log_prob_NB - value_NB).mean() + args.kl_weight * args.meta_batch_size * kl  # [7]
    entropy = -log_prob_NB.detach().mean()
    if args.auto_entropy:
        loss = loss + theta["log_alpha"] * (entropy + A)
    parts = {"q_loss": q_loss, "value": value_NB.mean(), "kl": kl, "entropy": entropy}
    return loss, {f"train/{name}": value.detach() for name, value in parts.items()}


def learn(envs, state: dict, optimizer, args: Args, seed: int) -> dict:
    """An iteration's updates, which change theta and target in place; statistics of the last one."""
    theta, target, generator = state["theta"], state["target"], Generator(state["tasks"].device).manual_seed(seed)
    N, B = args.meta_batch_size, args.batch_size
    sizes = (N, args.latent_size), *[(N, B, len(theta["policy_b3"]) // 2)] * 2
    compiled = torch.compile(grad(pearl_loss, has_aux=True), mode="reduce-overhead") if args.compile else None
    for _ in range(args.updates):
        index_N = torch.rand(args.train_tasks, generator=generator, device=generator.device).argsort()[:N]  # [4]
        batch_NBV = draw(state["replay"], index_N, B, generator)
        context_NSI = draw(state["recent"], index_N, args.context_size, generator)[..., : theta["encoder_w0"].shape[1]]
        noise = [torch.randn(size, generator=generator, device=generator.device) for size in sizes]
        batch_NBV, context_NSI, *noise = (envs.unwrapped.share(x) for x in (batch_NBV, context_NSI, *noise))
        if compiled:
            gradients, stats = compiled(theta, target, batch_NBV, context_NSI, noise, args)
        else:  # the same, but torch.func's is slower where nothing is compiled
            weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
            loss, stats = pearl_loss(weights, target, batch_NBV, context_NSI, noise, args)
            gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        for value, gradient in zip(theta.values(), average(*gradients.values()), strict=True):
            value.grad = gradient
        optimizer.step()  # [8]
        torch._foreach_lerp_(list(target.values()), [theta[name] for name in target], args.tau)  # [9]
    return {name: float(x) for name, x in zip(stats, average(*stats.values()), strict=True)}


def evaluate(envs, theta: Params, args: Args) -> dict:
    """Returns of successive episodes of held-out tasks by the policy's means, always the same tasks and noise."""
    generator, width = Generator().manual_seed(args.seed + 1), theta["encoder_w0"].shape[1]
    tasks_NP = envs.unwrapped.sample_tasks(args.tasks_per_iteration, generator, "test")
    context_NSI, mask_NS, returns = tasks_NP.new_zeros(len(tasks_NP), 0, width), tasks_NP[:, :0], []
    for k in range(args.eval_episodes):
        z_NZ = guess(theta, context_NSI, mask_NS * (k >= args.eval_prior_episodes), generator)
        rows_NTV, mask_NT, return_N = play_episode(envs, tasks_NP, theta, z_NZ, args, generator, 0.0)
        context_NSI, mask_NS = torch.cat([context_NSI, rows_NTV[..., :width]], 1), torch.cat([mask_NS, mask_NT], 1)
        returns.append(return_N)
    ci95 = 1.96 * float((returns[-1] - returns[0]).std(correction=0)) / math.sqrt(len(tasks_NP))
    return {f"test/return_k{k}": float(x_N.mean()) for k, x_N in enumerate(returns)} | {"test/gain_ci95": ci95}  # [10]


def init_state(envs, args: Args, generator: Generator) -> dict:
    """Networks, training tasks and empty buffers."""
    (obs,), (A,), M = envs.single_observation_space.shape, envs.single_action_space.shape, args.train_tasks
    theta, width = init_networks(envs, args, generator), 2 * obs + A + 3
    episodes = max(args.initial_episodes, args.prior_episodes + args.posterior_episodes)
    return {
        "theta": theta,
        "target": {name: value.clone() for name, value in theta.items() if name.startswith("q")},
        "tasks": envs.unwrapped.sample_tasks(M, generator, "train"),  # [1]
        "replay": init_buffer(M, args.replay_size, width),
        "recent": init_buffer(M, episodes * args.horizon, width),
    }


def train(envs, args: Args, run: "Run", state: dict) -> None:
    """The algorithm's loop, from `state` on, whose tensors it moves to the device and changes."""
    M, N, device = args.train_tasks, args.tasks_per_iteration, envs.unwrapped.device
    state |= {part: {name: x.to(device, copy=True) for name, x in state[part].items()} for part in MOVED}
    state["tasks"], theta = state["tasks"].to(device), state["theta"]
    optimizer = torch.optim.Adam(theta.values(), args.lr, fused=True)
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = args.lr  # a flag beside --resume
    (generator := Generator()).set_state(state["generator"])
    sizes = [0] * args.prior_episodes + [args.context_size] * args.posterior_episodes
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        for k in range(math.ceil(args.initial_episodes * M / N) if iteration == 1 else 0):
            collect_episodes(envs, (torch.arange(N, device=device) + k * N) % M, state, args, generator, 0)  # [1]
        index_N = torch.randperm(M, generator=generator)[:N].to(device)
        state["recent"]["count"][index_N] = 0  # [2]
        returns = [collect_episodes(envs, index_N, state, args, generator, size) for size in sizes]
        stats = learn(envs, state, optimizer, args, int(torch.randint(2**31, (1,), generator=generator)))
        state |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        stats |= {"train/return_pre": returns[0], "train/return_post": returns[-1]}
        stopping = envs.unwrapped.in_any_process(run.stopping)
        save = iteration % args.eval_every == 0 or iteration == args.iterations or stopping
        stats |= evaluate(envs, theta, args) if save or iteration == 1 else {}
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
    from envs import Follower, join, learning_curve, make

    leads = join(args.cuda, tasks_per_iteration=args.tasks_per_iteration, meta_batch_size=args.meta_batch_size)
    envs = make(args.env_id, args.tasks_per_iteration, args.horizon, args.cuda, physics=args.physics)
    if args.dense_training and not hasattr(envs.unwrapped, "dense_reward"):
        raise SystemExit(f"--dense-training: {args.env_id} has no dense reward, SparseNavigation2D-v0 has")
    generator = Generator().manual_seed(args.seed)
    fresh = init_state(envs, args, generator)
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0} | fresh
    state |= {"generator": generator.get_state()} | saved | {"args": vars(args)}
    shapes = [{f"{p}.{name}": x.shape for p in MOVED for name, x in content[p].items()} for content in (state, fresh)]
    if wrong := sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)):
        raise SystemExit(f"--resume {args.resume}: other networks or buffers than the run's, see {wrong}")
    try:
        run = Run(args, algorithm, state["iteration"]) if leads else Follower()
        train(envs, args, run, state)
        if leads:
            run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


if __name__ == "__main__":
    main()
