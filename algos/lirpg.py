"""LIRPG: learn an intrinsic reward by the gradient of the extrinsic return through the policy's own update.

Paper: Zheng, Oh, Singh 2018, arXiv:1804.06459, Algorithm 1, with PPO (1707.06347) as in its section on MuJoCo.
Run: python algos/lirpg.py --env-id HalfCheetahForward-v0     (--help explains every flag; --cuda uses the GPU)
Result: delay 20: a pole 200 (4 of 5 seeds), HalfCheetah 1020 (PPO: 618), Hopper 1271 (1308), 3 seeds; docs/lirpg.md
Algorithm:
    [1] repeat: T more steps of each of N worlds with pi_theta; their rewards r_ex are summed up and paid late
    [2]     advantages A_ex of r_ex by GAE over V_ex
    [3]     some epochs over minibatches: r_mix = c_ex r_ex + lambda r_in, r_in = tanh(net_eta(s, a)) at every step
    [4]         advantages A_mix of r_mix by GAE over V_mix, linear in r_in: functions of eta
    [5]         L_mix = -mean min(r A_mix, clip(r, 1 - c, 1 + c) A_mix) + (V_mix - target)^2 / 2 - c_H entropy
    [6]         theta' = theta + a step of Adam on L_mix, a function of eta through A_mix and target
    [7]         L_ex = the same loss of A_ex and V_ex at theta', on the same minibatch, without the entropy
    [8]         eta <- eta + a step of Adam on the exact grad_eta L_ex(theta'(eta)); then theta <- theta'
    [9]     now and then: undelayed returns of the first policy (k0), of the present one (k1), from new start states
One epoch of one minibatch makes r = 1 and [5] an actor-critic's loss (A2C); lambda = 0 and c_ex = 1 leave PPO.
Symbols: lambda = intrinsic_coef, c_ex = extrinsic_coef, c = clip, c_H = entropy_coef, r = pi_theta(a|s) / pi_old(a|s);
    steps of size alpha = lr in [6], beta = reward_lr in [8]; theta holds pi and V_mix, eta holds r_in and V_ex.
Shapes: a suffix names a tensor's axes (obs_NTO): N worlds, T steps, O observation, A action (choices, or dimensions),
    B samples of a minibatch, P task vector, F features, W all of theta or eta.
Differs from the paper: several worlds, fewer minibatches; behind a time limit V goes on; values are not clipped.
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
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.func import grad
from torch.nn.functional import linear, one_hot

Params = dict[str, Tensor]
CARRIED = "theta", "theta_adam", "eta", "eta_adam", "obs_moments", "return_moments", "sums"  # on the run's device


@dataclass
class Args:
    env_id: str = "HalfCheetahForward-v0"
    """a task environment registered by envs/__init__.py; of a family of many tasks, one is drawn"""
    seed: int = 1
    """seed of everything: parameters, task, start states, noise"""
    iterations: int = 488
    """updates, of num_worlds x rollout_steps steps each; a million steps in the paper"""
    num_worlds: int = 16
    """worlds that play side by side (N); 1 in the paper"""
    rollout_steps: int = 128
    """steps of each world between two updates (T); 2048 in the paper"""
    horizon: int = 1000
    """steps of an episode at most; 1000 in the paper"""
    delay: int = 20
    """rewards are summed over so many steps of an episode, or to its end, and paid at once; 10, 20, 40 in the paper"""
    intrinsic_coef: float = 1.0
    """weight of the learned reward (lambda); 1 for the paper's MuJoCo; 0 leaves PPO"""
    extrinsic_coef: float = 0.0
    """weight of the environment's reward in what the policy maximises (c_ex); 0 for the paper's MuJoCo"""
    live_bonus: float = 0.0
    """a constant reward for every step, a baseline of the paper"""
    lr: float = 3e-4
    """Adam's step size for the policy and V_mix (alpha); 3e-4 in the paper"""
    reward_lr: float = 1e-3
    """Adam's step size for the intrinsic reward and V_ex (beta); 1e-4 in the paper"""
    epochs: int = 10
    """passes over the steps of an update; 10 in the paper"""
    minibatches: int = 4
    """parts of a pass, a step of Adam on each; 32 in the paper"""
    clip: float = 0.2
    """how far a probability ratio may profit (c); 0.2 in the paper"""
    gamma: float = 0.99
    """discount; 0.99 in the paper"""
    gae_lambda: float = 0.95
    """lambda of GAE; 0.95 in the paper; 1 in its A2C"""
    entropy_coef: float = 0.0
    """weight of the entropy (c_H); 0 in the paper, 0.01 in its A2C; without it, choices may become certain too early"""
    normalize: bool = True
    """observations and rewards by their running moments; no good for one-hot observations"""
    normalize_advantages: bool = True
    """advantages of a minibatch to mean 0 and standard deviation 1; the paper's A2C does not"""
    eval_every: int = 20
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """networks and updates on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU's threads; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "gae_lambda"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= dict.fromkeys(("intrinsic_coef", "extrinsic_coef", "entropy_coef", "live_bonus"), (0, 1e6))
        ranges["minibatches"] = 1, self.num_worlds * self.rollout_steps
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {low:g} to {high:g}")


class Batch(NamedTuple):
    """T steps of each of N worlds, in whose course episodes end and begin."""

    obs: Tensor  # [N, T, O] normalised
    action: Tensor  # [N, T] numbers of choices, or [N, T, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, T] log pi_old(a|s)
    trace: Tensor  # [N, T, T] weight of the TD error of a step (last axis) in the advantage of another
    delta: Tensor  # [N, T] TD error of V_mix, but for the intrinsic reward
    value: Tensor  # [N, T] V_mix
    advantage: Tensor  # [N, T] A_ex
    target: Tensor  # [N, T] what V_ex should have been


def first_state(envs, args: Args, generator: Generator) -> dict:
    """What an iteration needs from the one before, but the worlds; outputs of the first networks are near 0."""
    (obs,), space, H = envs.single_observation_space.shape, envs.single_action_space, 64  # units, as in the paper
    A = space.shape[0] if space.shape else int(space.n)

    def network(name: str, inputs: int, outputs: int) -> Params:
        shapes = (H, inputs, math.sqrt(2)), (H, H, math.sqrt(2)), (outputs, H, 0.01)
        weights = {f"{name}_w{i}": x / math.sqrt(m) * torch.randn(n, m, generator=generator)
                   for i, (n, m, x) in enumerate(shapes)}  # fmt: skip
        return weights | {f"{name}_b{i}": torch.zeros(n) for i, (n, *_) in enumerate(shapes)}

    state = {"theta": network("policy", obs, A) | network("value", obs, 1)}
    state["theta"] |= {"log_std": torch.zeros(A)} if space.shape else {}
    state["eta"] = network("reward", obs + A, 1) | network("value", obs, 1)
    for name in ("theta", "eta"):
        zeros_W = torch.zeros(sum(x.numel() for x in state[name].values()))
        state[f"{name}_adam"] = {"mean": zeros_W, "square": zeros_W, "steps": torch.zeros((), dtype=torch.float64)}
    for name, size in (("obs_moments", obs), ("return_moments", 1)):
        state[name] = {"mean": torch.zeros(size), "var": torch.ones(size), "count": torch.tensor(1e-4)}
    return state | {"sums": {name: torch.zeros(args.num_worlds) for name in ("return", "discounted", "step", "due")}}


def output(params: Params, name: str, x: Tensor) -> Tensor:
    """Outputs [.., outputs] of a network for x [.., inputs]."""
    for i in range(3):
        x = linear(x if i == 0 else x.tanh(), params[f"{name}_w{i}"], params[f"{name}_b{i}"])
    return x


def actions_of(theta: Params, obs: Tensor) -> Distribution:
    """pi(.|s) for obs [.., O]: over choices, or Gaussian where theta has a standard deviation."""
    scores = output(theta, "policy", obs)
    if "log_std" not in theta:
        return Categorical(logits=scores, validate_args=False)
    return Independent(Normal(scores, theta["log_std"].exp(), validate_args=False), 1, validate_args=False)


def intrinsic(eta: Params, obs: Tensor, action: Tensor) -> Tensor:
    """r_in [..] within +-1 for obs [.., O] and actions [..] or [.., A]."""
    features = action if action.is_floating_point() else one_hot(action, eta["reward_w0"].shape[1] - obs.shape[-1])
    return output(eta, "reward", torch.cat([obs, features], -1)).squeeze(-1).tanh()


def clipped_loss(theta: Params, critic: Params, batch: Batch, rows_B: Tensor, advantage_NT: Tensor, target_NT: Tensor,
                 args: Args, entropy_coef: float) -> Tensor:  # fmt: skip
    """PPO's loss of pi_theta and a value on a minibatch; normalisation of advantages belongs to its graph."""
    parts = batch.obs, batch.action, batch.log_prob, advantage_NT, target_NT
    obs_BO, action, log_prob_B, advantage_B, target_B = (x.flatten(0, 1)[rows_B] for x in parts)
    if args.normalize_advantages:
        advantage_B = (advantage_B - advantage_B.mean()) / (advantage_B.var(correction=0) + 1e-8).sqrt()
    policy = actions_of(theta, obs_BO)
    ratio_B = (policy.log_prob(action) - log_prob_B).exp()
    gain_B = torch.minimum(ratio_B * advantage_B, ratio_B.clamp(1 - args.clip, 1 + args.clip) * advantage_B)
    error_B = (output(critic, "value", obs_BO).squeeze(-1) - target_B).square()
    return 0.5 * error_B.mean() - gain_B.mean() - entropy_coef * policy.entropy().mean()  # [5]


def mixed_loss(theta: Params, eta: Params, batch: Batch, rows_B: Tensor, args: Args) -> Tensor:
    """L_mix of a minibatch, whose advantages depend on r_in at all later steps of their episodes."""
    reward_NT = args.intrinsic_coef * intrinsic(eta, batch.obs, batch.action)  # [3]
    advantage_NT = (batch.trace @ (batch.delta + reward_NT)[..., None]).squeeze(-1)  # [4]
    return clipped_loss(theta, theta, batch, rows_B, advantage_NT, advantage_NT + batch.value, args, args.entropy_coef)


def adam_step(params: Params, gradient: Params, adam: Params, lr: float) -> tuple[Params, Params]:
    """Adam on the gradient, shortened to a norm of 0.5; differentiable but for the second moment. Also its moments."""
    steps, gradient_W = adam["steps"] + 1, torch.cat([gradient[name].flatten() for name in params])
    gradient_W = gradient_W * (0.5 / (gradient_W.square().sum() + 1e-20).sqrt()).clamp(max=1)
    mean_W, square_W = 0.9 * adam["mean"] + 0.1 * gradient_W, 0.999 * adam["square"] + 0.001 * gradient_W.detach() ** 2
    step_W = lr / (1 - 0.9**steps) * mean_W / ((square_W / (1 - 0.999**steps)).sqrt() + 1e-5)
    parts = zip(params.items(), step_W.split([x.numel() for x in params.values()]), strict=True)
    params = {name: x - part.view_as(x) for (name, x), part in parts}
    return params, {"mean": mean_W, "square": square_W, "steps": steps}


def extrinsic_loss(eta: Params, theta: Params, adam: Params, batch: Batch, rows_B: Tensor, args: Args):
    """L_ex at theta'(eta); and theta', with Adam's moments."""
    theta, adam = adam_step(theta, grad(mixed_loss)(theta, eta, batch, rows_B, args), adam, args.lr)  # [6]
    return clipped_loss(theta, eta, batch, rows_B, batch.advantage, batch.target, args, 0.0), (theta, adam)  # [7]


def learn_from(batch: Batch, state: dict, args: Args, generator: Generator) -> None:
    """All minibatches of an update, which change the networks in `state`."""
    for _ in range(args.epochs):
        for rows_B in torch.randperm(batch.value.numel(), generator=generator).tensor_split(args.minibatches):
            inputs = state["theta"], state["theta_adam"], batch, rows_B.to(batch.obs.device), args
            if args.intrinsic_coef:
                g_eta, stepped = grad(extrinsic_loss, has_aux=True)(state["eta"], *inputs)  # [8]
                state["eta"], state["eta_adam"] = adam_step(state["eta"], g_eta, state["eta_adam"], args.reward_lr)
            else:  # PPO: eta is without effect
                _, stepped = extrinsic_loss(state["eta"], *inputs)
            state["theta"], state["theta_adam"] = stepped


def merged(moments: Params, x_BF: Tensor) -> Params:
    """Running mean and variance [F] of all rows so far, these included."""
    count = moments["count"] + len(x_BF)
    share, shift_F = len(x_BF) / count, x_BF.mean(0) - moments["mean"]
    var_F = (1 - share) * moments["var"] + share * x_BF.var(0, correction=0) + share * (1 - share) * shift_F**2
    return {"mean": moments["mean"] + share * shift_F, "var": var_F, "count": count}


def late(reward_NT: Tensor, done_NT: Tensor, sums: Params, args: Args) -> tuple[list[Tensor], Params]:
    """Returns so far, discounted ones, payments (every `delay` steps and at an end) [N, T]; sums to go on with."""
    columns = []
    for reward_N, done_N in zip(reward_NT.unbind(1), done_NT.unbind(1), strict=True):
        sums = {"return": sums["return"] + reward_N, "discounted": args.gamma * sums["discounted"] + reward_N,
                "due": sums["due"] + reward_N, "step": sums["step"] + 1}  # fmt: skip
        pays_N = done_N | (sums["step"] % args.delay == 0)
        columns.append((sums["return"], sums["discounted"], sums["due"] * pays_N))
        sums = {name: x * ~(pays_N if name == "due" else done_N) for name, x in sums.items()}
    return [torch.stack(x, 1) for x in zip(*columns, strict=True)], sums


def gae_trace(done_NT: Tensor, decay: float) -> Tensor:
    """[N, T, T]: decay^(j - i), step j's weight in the advantage of step i; 0 in the past and behind an end."""
    part_NT, t_T = done_NT.cumsum(1) - done_NT.long(), torch.arange(done_NT.shape[1], device=done_NT.device)
    weight_TT = (decay ** (t_T - t_T[:, None]).clamp_min(0)).triu()
    return weight_TT * (part_NT[:, :, None] == part_NT[:, None, :])


@torch.no_grad()
def play_steps(envs, obs_NO: Tensor, state: dict, steps: int, generator: Generator) -> tuple[Tensor, list[Tensor]]:
    """Further steps of all worlds: the observation behind them, and [N, T, ..] of each part of a transition."""
    records, theta, mean = [], state["theta"], state["obs_moments"]["mean"]
    std = (state["obs_moments"]["var"] + 1e-8).sqrt()
    for noise_NA in torch.randn(steps, len(obs_NO), len(theta["policy_b2"]), generator=generator).to(obs_NO):
        policy = actions_of(theta, seen_NO := ((obs_NO - mean) / std).clamp(-10, 10))
        if "log_std" in theta:
            action = policy.mean + policy.stddev * noise_NA
        else:  # with Gumbel's noise the argmax is a draw
            action = (policy.logits - (-torch.special.log_ndtr(noise_NA)).log()).argmax(1)
        raw_NO, (obs_NO, reward_N, fell_N, over_N, info) = obs_NO, envs.step(action)
        next_NO = ((info.get("final_obs", obs_NO) - mean) / std).clamp(-10, 10)
        records.append((raw_NO, seen_NO, action, policy.log_prob(action), reward_N, next_NO, fell_N, fell_N | over_N))
    return obs_NO, [torch.stack(x, 1) for x in zip(*records, strict=True)]


@torch.no_grad()
def prepare(records: list[Tensor], state: dict, args: Args) -> tuple[Batch, dict]:
    """A batch to learn from, and statistics; changes the normalisers and running sums in `state`."""
    raw_NTO, obs_NTO, action, log_prob_NT, reward_NT, next_NTO, fell_NT, done_NT = records
    (return_NT, discounted_NT, reward_NT), state["sums"] = late(reward_NT, done_NT, state["sums"], args)  # [1]
    stats = {"train/intrinsic_std": float(intrinsic(state["eta"], obs_NTO, action).std(correction=0))}
    stats |= {"train/return_post": float(return_NT[done_NT].mean())} if done_NT.any() else {}
    if args.normalize:
        state["obs_moments"] = merged(state["obs_moments"], raw_NTO.flatten(0, 1))
        state["return_moments"] = merged(state["return_moments"], discounted_NT.reshape(-1, 1))
        reward_NT = (reward_NT / (state["return_moments"]["var"] + 1e-8).sqrt()).clamp(-10, 10)
    trace_NTT, weight_NT = gae_trace(done_NT, args.gamma * args.gae_lambda), args.gamma * ~fell_NT
    pairs = [(state[name], x) for name in ("eta", "theta") for x in (obs_NTO, next_NTO)]
    value_NT, next_NT, mixed_NT, next_mixed_NT = (output(params, "value", x).squeeze(-1) for params, x in pairs)
    advantage_NT = (trace_NTT @ (reward_NT + weight_NT * next_NT - value_NT)[..., None]).squeeze(-1)  # [2]
    delta_NT = args.extrinsic_coef * reward_NT + args.live_bonus + weight_NT * next_mixed_NT - mixed_NT
    target_NT = advantage_NT + value_NT
    return Batch(obs_NTO, action, log_prob_NT, trace_NTT, delta_NT, mixed_NT, advantage_NT, target_NT), stats


def evaluate(envs, tasks_NP: Tensor, state: dict, args: Args) -> Tensor:
    """Returns [N] of an episode in each world, from the same start states with the same noise in every evaluation."""
    obs_NO, _ = envs.reset(seed=args.seed + 1, options={"tasks": tasks_NP})
    return play_steps(envs, obs_NO, state, args.horizon, Generator().manual_seed(args.seed + 1))[1][4].sum(1).cpu()


def train(envs, test_envs, args: Args, run: "Run", state: dict) -> None:
    """The paper's Algorithm 1, from `state` on; `test_envs` are worlds of their own."""
    state |= {part: {name: x.to(envs.unwrapped.device) for name, x in state[part].items()} for part in CARRIED}
    (generator := Generator()).set_state(state["generator"])
    tasks_NP = envs.unwrapped.sample_tasks(1, Generator().manual_seed(args.seed)).repeat(args.num_worlds, 1)
    obs_NO, _ = envs.reset(seed=args.seed, options={"tasks": tasks_NP})
    obs_NO = envs.load_worlds(state["worlds"]) if "worlds" in state else obs_NO
    state.setdefault("first_returns", evaluate(test_envs, tasks_NP, state, args))
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state |= {"iteration": iteration, "env_steps": state["env_steps"] + args.num_worlds * args.rollout_steps}
        obs_NO, records = play_steps(envs, obs_NO, state, args.rollout_steps, generator)
        batch, stats = prepare(records, state, args)
        learn_from(batch, state, args, generator)
        save = iteration % args.eval_every == 0 or iteration == args.iterations or run.stopping
        if save or iteration == 1:
            before_N, now_N = state["first_returns"], evaluate(test_envs, tasks_NP, state, args)  # [9]
            stats |= {"test/return_k0": float(before_N.mean()), "test/return_k1": float(now_N.mean())}
            stats["test/gain_ci95"] = 1.96 * float((now_N - before_N).std(correction=0)) / math.sqrt(args.num_worlds)
        run.log(state, stats)
        if save:
            run.save(state | {"generator": generator.get_state(), "worlds": envs.save_worlds()})
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
    from envs import Lifetimes, learning_curve, make

    options = args.env_id, args.num_worlds, args.horizon, args.cuda, 1.0, True, args.physics  # actions +-1, or choices
    envs, test_envs, generator = Lifetimes(make(*options), 10**9), make(*options), Generator().manual_seed(args.seed)
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0}
    state |= first_state(envs, args, generator)
    state |= {"generator": generator.get_state()} | saved | {"args": vars(args)}
    fixed = "env_id", "seed", "horizon", "num_worlds"
    if saved and (wrong := [name for name in fixed if getattr(args, name) != getattr(saved["args"], name)]):
        raise SystemExit(f"--resume {args.resume}: worlds go on in it, so these must be the run's: {wrong}")
    try:
        run = Run(args, algorithm, state["iteration"])
        train(envs, test_envs, args, run, state)
        run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


if __name__ == "__main__":
    main()
