"""Reptile for reinforcement learning: PPO on one task, then a step of the initialisation towards where it led.

Paper: Nichol, Achiam, Schulman 2018, arXiv:1803.02999, Algorithm 2, which reports only negative results on RL.
    PPO: 1707.06347.
Run: python algos/reptile_ppo.py --env-id Navigation2D-v0 --action-scale 1     (--help explains every flag; --cuda: GPU)
Result: Navigation2D after 0, 1, 3 inner steps: -40, -30, -15 (MAML: -40, -13, -13; paper: none); docs/reptile_ppo.md
Algorithm:
    [1] repeat: draw N tasks; phi_i = theta
    [2]     k times, per task: sample E episodes with pi_phi_i
    [3]         per batch: advantages A by GAE over a linear baseline fitted to the task's own batch, normalised
    [4]         phi_i <- phi_i + alpha grad J_i, several times on the same batch, where
                J_i = mean [ min(r A, clip(r, 1 - eps, 1 + eps) A) ], r = pi_phi_i(a|s) / pi_old_i(a|s)
    [5]     theta <- theta + epsilon mean_i (phi_i - theta), epsilon falling linearly to 0
    [6]     now and then: return on held-out tasks after 0, 1, .. inner steps ([2] to [4])
With k = 1 theta climbs the mean return of all tasks, which is joint training; whatever prepares theta for adaptation is
    of second order in alpha and grows with k (1803.02999, section 5).
Symbols: phi_i = params, k = inner_steps, alpha = inner_lr, eps = clip, epsilon = outer_lr, lambda of [3] = gae_lambda.
Shapes: a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, T steps, B = E * T samples, O
    observation, A action, P task vector, F features. Entries of parameter dicts gain N by adaptation.
Differs from the paper: it does not say how RL was tried. The inner optimiser is plain SGD, so that with one epoch an
    inner step is maml_trpo.py's, and k = 1 is joint training by the policy gradient.
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
from torch import Generator, Tensor
from torch.distributions import Normal
from torch.func import grad, vmap

Params = dict[str, Tensor]  # one policy for all tasks: w0 [O, H], b0 [H], ..; one policy per task: w0 [N, O, H], ..


@dataclass
class Args:
    env_id: str = "HalfCheetahDir-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything: parameters, tasks, start states, noise"""
    iterations: int = 500
    """meta-updates"""
    meta_batch_size: int = 40
    """tasks per meta-update and per evaluation (N)"""
    episodes_per_task: int = 20
    """episodes per task of each inner step (E); 20 in MAML's paper"""
    horizon: int = 100
    """steps of an episode (T); in MAML's paper 100 for navigation, 200 for locomotion"""
    hidden_size: int = 64
    """units of each of the two tanh layers"""
    action_scale: float = 10.0
    """a policy output of +-s spans the action bounds; as in maml_trpo.py, 1 for navigation"""
    inner_lr: float = 0.1
    """step size of SGD on a task (alpha)"""
    inner_steps: int = 4
    """batches of fresh episodes of a task, one after the other, in training (k)"""
    inner_epochs: int = 5
    """steps of SGD on each batch; 1 makes an inner step MAML's"""
    clip: float = 0.2
    """ratios gain nothing beyond 1 +- clip (eps); 0.2 in PPO's paper"""
    outer_lr: float = 1.0
    """step size of the interpolation at the start (epsilon); falls linearly to 0, as in the paper"""
    gamma: float = 0.99
    """discount; 0.99 in all known codes"""
    gae_lambda: float = 1.0
    """lambda of GAE; 1 is the return minus the baseline"""
    eval_every: int = 10
    """iterations from one evaluation and checkpoint to the next"""
    eval_steps: int = 3
    """inner steps of an evaluation"""
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
        ranges = dict.fromkeys(("gamma", "gae_lambda", "clip", "outer_lr"), (0, 1)) | {"seed": (0, 2**31)}
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


def clipped_gain(params: Params, batch: Rollouts, args: Args) -> Tensor:
    """PPO's objective: one policy's, the mean over all steps of some episodes."""
    ratio = ratios(params, batch)
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    return torch.minimum(ratio * batch.advantage, clipped * batch.advantage).sum() / batch.mask.sum()


def ppo_step(params: Params, batch: Rollouts, args: Args) -> Params:
    """SGD on a batch, all tasks at once: from shared parameters, or one set per task, to one set per task."""
    for _ in range(args.inner_epochs):
        gradient = vmap(grad(clipped_gain), (0 if params["b0"].ndim == 2 else None, 0, None))(params, batch, args)
        params = {name: value + args.inner_lr * gradient[name] for name, value in params.items()}
    return params


def evaluate(envs, theta: Params, args: Args) -> tuple[dict, Params]:
    """Adapt to held-out tasks, with the same tasks and noise in every evaluation: metrics and the adapted policies."""
    generator, params, returns = Generator().manual_seed(args.seed + 1), theta, []
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "test")
    for k in range(args.eval_steps + 1):
        batch = sample(envs, tasks_NP, params, args, generator)
        returns.append(batch.total.mean(1))  # [6]
        params = ppo_step(params, batch, args) if k < args.eval_steps else params
    ci95 = 1.96 * float((returns[-1] - returns[0]).std(correction=0)) / math.sqrt(len(tasks_NP))
    return {f"test/return_k{k}": float(x_N.mean()) for k, x_N in enumerate(returns)} | {"test/gain_ci95": ci95}, params


def train(envs, args: Args, run: "Run", state: dict) -> None:
    """The paper's Algorithm 2, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device) for name, value in state["theta"].items()}
    (generator := Generator()).set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        params, returns = theta, []
        for _ in range(args.inner_steps):
            batch = sample(envs, tasks_NP, params, args, generator)  # [2]
            params = ppo_step(params, batch, args)  # [4]
            returns.append(float(batch.total.mean()))
            state["env_steps"] += int(batch.mask.sum())
        epsilon = args.outer_lr * (1 - (iteration - 1) / args.iterations)
        change = {name: value.mean(0) - theta[name] for name, value in params.items()}
        theta = {name: value + epsilon * change[name] for name, value in theta.items()}  # [5]
        state |= {"theta": theta, "generator": generator.get_state()}
        length = torch.cat([value.flatten() for value in change.values()]).norm()
        stats = {"train/change": float(length), "train/return_pre": returns[0], "train/return_post": returns[-1]}
        save = iteration % args.eval_every == 0 or iteration == args.iterations or run.stopping
        stats |= evaluate(envs, theta, args)[0] if save or iteration == 1 else {}
        run.log(state, stats)
        if save:
            run.save(state)
            if run.stopping:
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
    from envs import adaptation_gif, learning_curve, make

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
        run = Run(args, algorithm, state["iteration"])
        train(envs, args, run, state)
        run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None
    if args.capture_video:
        params = {name: value[0] for name, value in evaluate(envs, state["theta"], args)[1].items()}
        actors = {"before": lambda obs: policy(state["theta"], obs)[0], "after": lambda obs: policy(params, obs)[0]}
        adaptation_gif(run.folder / "adaptation.gif", envs, actors, args.seed)


if __name__ == "__main__":
    main()
