"""RL2: a recurrent network that is itself the learner: its memory adapts, its weights are meta-learned with PPO.

Paper: Duan et al. 2016, arXiv:1611.02779, and Wang et al. 2016, arXiv:1611.05763. PPO: 1707.06347, GAE: 1506.02438.
Run: python algos/rl2_ppo.py --env-id Bandit5-v0     (--help explains every flag; --cuda uses the GPU)
Result: bandits of 10 arms, 100 pulls: 82.2, the Gittins index 83.6 (paper: 83.5, 82.8); a mouse in unseen mazes takes
    19.6 steps in episode 1, 8.3 in episode 4 (30 where it misses the cheese; shortest path 6.7); docs/rl2_ppo.md
Algorithm:
    [1] repeat: draw N tasks, and with each play a trial: E episodes of T steps, S = E T steps in a row
    [2]     a trial begins with an empty memory; before its first step the action, the reward and done are 0
    [3]     at each step the network sees x = (obs, previous action, previous reward, previous done) and its memory;
            out come the policy, the value V of the trial's rest, and the next memory. No episode's end resets it
    [4]     advantages A by GAE over the whole trial, on through the episodes' ends; nothing comes behind the trial
    [5]     some epochs over minibatches of whole trials, each replayed from its first step with gradients throughout:
    [6]         L = -mean min(r A, clip(r, 1 - c, 1 + c) A) + c_V (V - target)^2 - c_H entropy, r = pi / pi_old
    [7]         theta <- one step of Adam on L, the gradient's norm clipped
    [8]     now and then: returns of episodes 1, 2, .. E of a trial with held-out tasks; theta stays as it is
Symbols: theta = the network's weights, c = clip, c_V = value_coef, c_H = entropy_coef, gamma and lambda of [4] =
    gamma, gae_lambda; V is in units of the batch's standard deviation of returns.
Shapes: a suffix names a tensor's axes (x_NSI): N tasks with a trial each, S steps of a trial, I what the network sees,
    H its features, A actions (choices, or dimensions), J = A + 2, O observation, E episodes of a trial, P task vector.
Differs from the paper: PPO for TRPO, two heads on one network for a policy and a separate baseline, no weight
    normalisation, 64 units (256), lambda 0.9 (0.3), far smaller batches; rewards in units of the batch's returns,
    advantages normalised; learning rate and entropy bonus fall to 0. Where an episode ends early, the next one begins
    when it has ended in all worlds; the network does not see the wait. Authors' code: none is public.
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
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn import functional

Params = dict[str, Tensor]
Memory = dict[str, Tensor]  # what an encoder keeps of a trial's past; {} at its beginning
HORIZONS = {"TabularMDP-v0": 10, "SparseNavigation2D-v0": 20, "MouseCheese-v0": 30}


@dataclass
class Args:
    env_id: str = "Bandit5-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything: parameters, tasks, start states, noise"""
    iterations: int = 1000
    """meta-updates"""
    meta_batch_size: int = 500
    """tasks per meta-update and per evaluation, a trial of each (N); in the paper N E T is 250,000"""
    episodes_per_trial: int = 10
    """episodes of a trial (E); the paper: 10 to 500 for bandits, 10 to 100 for MDPs, 2 for navigation"""
    horizon: int | None = None
    """steps of an episode (T); default: bandits 1, TabularMDP 10, SparseNavigation2D 20, MouseCheese 30, others 100"""
    encoder: Literal["gru", "lstm"] = "gru"
    """the recurrent cell; the paper: GRU, Wang et al.: LSTM"""
    hidden_size: int = 64
    """units of the cell; the paper: 256"""
    action_scale: float = 1.0
    """a policy output of +-s spans the bounds of continuous actions"""
    lr: float = 3e-3
    """Adam's step size at the start; falls linearly to 0; smaller for larger networks"""
    epochs: int = 3
    """passes over the trials of a meta-update"""
    minibatches: int = 8
    """parts, of whole trials, of a pass; one step of Adam on each"""
    clip: float = 0.2
    """how far a probability ratio may profit (c)"""
    gamma: float = 0.99
    """discount, through the episodes' ends; 0.99 in the paper"""
    gae_lambda: float = 0.9
    """lambda of GAE; 0.3 in the paper; small values trust the value's opinion of what exploring is worth"""
    value_coef: float = 0.5
    """weight of the value's squared error (c_V)"""
    entropy_coef: float = 0.02
    """weight of the entropy at the start (c_H); falls linearly to 0; too little, and exploration dies early"""
    max_grad_norm: float = 0.5
    """the gradient is shortened to this norm"""
    eval_every: int = 20
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """network and trials on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU's threads; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        usual = 1 if "Bandit" in self.env_id else HORIZONS.get(self.env_id, 100)
        self.horizon = usual if self.horizon is None else self.horizon
        ranges = dict.fromkeys(("gamma", "gae_lambda", "clip"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= dict.fromkeys(("value_coef", "entropy_coef"), (0, 1e6)) | {"minibatches": (1, self.meta_batch_size)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {low:g} to {high:g}")


class Steps(NamedTuple):
    """A trial of each of N tasks, S steps long; a shorter one is filled up with steps of mask 0."""

    x: Tensor  # [N, S, I] obs, previous action, previous reward, previous done
    action: Tensor  # [N, S] numbers of choices, or [N, S, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, S] log pi(a|x, memory) when it was drawn
    mask: Tensor  # [N, S] 1 for the trial's steps
    advantage: Tensor  # [N, S] mean 0 and standard deviation 1 over the steps of all trials
    target: Tensor  # [N, S] what V should have been, in the units of V


def dense(rows: int, columns: int, generator: Generator, scale: float = 1.0) -> Tensor:
    """A weight [rows, columns] of normal numbers with standard deviation scale / sqrt(columns)."""
    return scale / math.sqrt(columns) * torch.randn(rows, columns, generator=generator)


def init_network(envs, args: Args, generator: Generator) -> Params:
    """theta: the encoder, and on its features policy and value; at first near uniform choices, standard deviation 1."""
    space, H = envs.single_action_space, args.hidden_size
    A = space.shape[0] if space.shape else int(space.n)
    theta = ENCODERS[args.encoder][0](envs.single_observation_space.shape[0] + A + 2, args, generator)
    theta |= {"w_policy": dense(A, H, generator, 0.01), "b_policy": torch.zeros(A)}
    theta |= {"w_value": dense(1, H, generator), "b_value": torch.zeros(1)}
    return theta | ({"log_std": torch.zeros(A)} if space.shape else {})


def init_recurrent(num_inputs: int, args: Args, generator: Generator) -> Params:
    """Weights of a GRU (3 gates) or an LSTM (4), each gate's orthogonal; zero biases."""
    gates, H, theta = {"gru": 3, "lstm": 4}[args.encoder], args.hidden_size, {}
    for name, columns in (("x", num_inputs), ("h", H)):
        parts = [torch.nn.init.orthogonal_(torch.empty(H, columns), generator=generator) for _ in range(gates)]
        theta |= {f"w_{name}": torch.cat(parts), f"b_{name}": torch.zeros(gates * H)}
    return theta


def recurrent(theta: Params, x_NSI: Tensor, memory: Memory, mask_N: Tensor | None = None) -> tuple[Tensor, Memory]:
    """Features [N, S, H] of S further steps and the memory behind them, which stays as it is where mask is 0.

    The cell is a GRU or an LSTM, by the number of its gates. Acting is S = 1, replaying the whole trial with memory {}.
    """
    weights = [theta[name] for name in ("w_x", "w_h", "b_x", "b_h")]
    H = theta["w_h"].shape[1]
    settings = True, 1, 0.0, True, False, True  # biases, layers, dropout, train (for cuDNN), one direction, batch first
    cell, names = (torch.gru, ("h",)) if len(theta["w_h"]) == 3 * H else (torch.lstm, ("h", "c"))
    old = [memory.get(name, x_NSI.new_zeros(1, len(x_NSI), H)) for name in names]
    feature_NSH, *new = cell(x_NSI, old if len(old) > 1 else old[0], weights, *settings)
    if mask_N is not None:
        new = [torch.where(mask_N[:, None] > 0, *pair) for pair in zip(new, old, strict=True)]
    return feature_NSH, dict(zip(names, new, strict=True))


ENCODERS = {"gru": (init_recurrent, recurrent), "lstm": (init_recurrent, recurrent)}


def actor_critic(theta: Params, feature_NSH: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's outputs [N, S, A], logits of choices or means, and values [N, S]."""
    output_NSA = functional.linear(feature_NSH, theta["w_policy"], theta["b_policy"])
    return output_NSA, functional.linear(feature_NSH, theta["w_value"], theta["b_value"]).squeeze(-1)


def distribution(theta: Params, output_NSA: Tensor) -> Distribution:
    """Of one of A choices, or Gaussian in A dimensions where theta has a standard deviation."""
    if "log_std" not in theta:
        return Categorical(logits=output_NSA, validate_args=False)
    return Independent(Normal(output_NSA, theta["log_std"].exp(), validate_args=False), 1, validate_args=False)


def average(*values: Tensor) -> list[Tensor]:
    """Means over torchrun's processes, each with its part of the tasks; the values themselves if there is only one."""
    if dist.is_initialized():
        dist.all_reduce(vector := torch.cat([x.detach().flatten() for x in values]).div_(dist.get_world_size()))
        values = [part.view_as(x) for part, x in zip(vector.split([x.numel() for x in values]), values, strict=True)]
    return [x.detach() for x in values]


def trial_gae(reward_NS: Tensor, value_NS: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation over trials, 0 behind the last step; discounted returns with values 0."""
    delta_NS = reward_NS + gamma * functional.pad(value_NS[:, 1:], (0, 1)) - value_NS
    tails = [torch.zeros_like(delta_NS[:, 0])]
    for delta_N in reversed(delta_NS.unbind(1)):
        tails.append(delta_N + gamma * gae_lambda * tails[-1])
    return torch.stack(tails[:0:-1], 1)


def advantages(reward_NS: Tensor, value_NS: Tensor, mask_NS: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Normalised advantages and V's targets [N, S], from rewards and values that are 0 where mask is."""
    unit = trial_gae(reward_NS, 0 * reward_NS, args.gamma, 1.0)[mask_NS > 0].std(correction=0)
    reward_NS = reward_NS / torch.where(unit > 1e-6, unit, 1.0)  # 0 where all rewards are equal
    advantage_NS = trial_gae(reward_NS, value_NS, args.gamma, args.gae_lambda)  # [4]
    own = advantage_NS[mask_NS > 0]
    return (advantage_NS - own.mean()) / (own.std(correction=0) + 1e-8) * mask_NS, advantage_NS + value_NS


@torch.no_grad()
def play_trials(envs, tasks_NP: Tensor, theta: Params, args: Args, generator: Generator) -> tuple[Steps, Tensor]:
    """A trial of each task, all worlds in step, and its advantages; the return [N, E] of each episode."""
    encode, choices = ENCODERS[args.encoder][1], "log_std" not in theta
    seed = int(torch.randint(2**31, (1,), generator=generator))
    S, N, A = envs.episodes * args.horizon, len(tasks_NP), len(theta["b_policy"])
    share, gather = envs.unwrapped.share, envs.unwrapped.gather
    noise_SNA = (torch.rand if choices else torch.randn)(S, N, A, generator=generator)
    # With Gumbel's noise the argmax of logits is a draw from their softmax.
    noise_SNA = (-(-noise_SNA.log()).log() if choices else noise_SNA).to(tasks_NP)
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": share(tasks_NP)})
    past_NJ, return_NE = obs_NO.new_zeros(len(obs_NO), A + 2), obs_NO.new_zeros(len(obs_NO), envs.episodes)
    memory, mask_N, records, threads = {}, torch.ones_like(obs_NO[:, 0]), [], torch.get_num_threads()  # [2]
    torch.set_num_threads(1)  # on one step's small matrices more gain little, and they spin on the physics' cores
    for noise_NA in share(noise_SNA, 1):
        x_NI = torch.cat([obs_NO, past_NJ], 1)
        feature_N1H, memory = encode(theta, x_NI[:, None], memory, mask_N)
        output_NA, value_N = (x.squeeze(1) for x in actor_critic(theta, feature_N1H))  # [3]
        action = (output_NA + noise_NA).argmax(1) if choices else output_NA + theta["log_std"].exp() * noise_NA
        obs_NO, reward_N, _, _, info = envs.step(action)
        records.append((x_NI, action, output_NA, value_N, reward_N, mask_N))
        return_NE[:, info["episode"]] += reward_N
        action_NA = functional.one_hot(action, A).to(obs_NO) if choices else action
        now_NJ = torch.cat([action_NA, reward_N[:, None], info["done"].to(obs_NO)[:, None]], 1)
        past_NJ = torch.where(mask_N[:, None] > 0, now_NJ, past_NJ)
        mask_N = 1 - info["waits"].to(obs_NO)
        if envs.is_over:
            break
    torch.set_num_threads(threads)
    records = [gather(torch.stack(x, 1)) for x in zip(*records, strict=True)]
    records = records if records[-1].all() else without_waiting(records)
    x_NSI, action, output_NSA, value_NS, reward_NS, mask_NS = records
    log_prob_NS = distribution(theta, output_NSA).log_prob(action)
    advantage_NS, target_NS = advantages(reward_NS * mask_NS, value_NS * mask_NS, mask_NS, args)
    return Steps(x_NSI, action, log_prob_NS, mask_NS, advantage_NS, target_NS), gather(return_NE)


def without_waiting(records: list[Tensor]) -> list[Tensor]:
    """Each trial's own steps in their order, then those of mask 0 (its last tensor), to the longest trial's length."""
    mask_NS = records[-1]
    order_NS = mask_NS.argsort(dim=1, descending=True, stable=True)[:, : int(mask_NS.sum(1).max())]
    worlds_N1 = torch.arange(len(mask_NS), device=mask_NS.device)[:, None]
    return [x[worlds_N1, order_NS] for x in records]


def ppo_loss(theta: Params, steps: Steps, args: Args, entropy_coef: float) -> tuple[Tensor, dict]:
    """L of a minibatch of trials, and its parts."""
    feature_NSH, _ = ENCODERS[args.encoder][1](theta, steps.x, {})
    output_NSA, value_NS = actor_critic(theta, feature_NSH)
    policy = distribution(theta, output_NSA)
    log_ratio_NS = (policy.log_prob(steps.action) - steps.log_prob) * steps.mask
    ratio_NS = log_ratio_NS.exp()
    clipped_NS = ratio_NS.clamp(1 - args.clip, 1 + args.clip)
    gain_NS = torch.minimum(ratio_NS * steps.advantage, clipped_NS * steps.advantage)
    parts = {"gain": gain_NS, "value_loss": (value_NS - steps.target).square(), "entropy": policy.entropy()}
    parts |= {"kl": (ratio_NS - 1 - log_ratio_NS).detach()}
    parts = {name: (x_NS * steps.mask).sum() / steps.mask.sum() for name, x_NS in parts.items()}
    return args.value_coef * parts["value_loss"] - parts["gain"] - entropy_coef * parts["entropy"], parts  # [6]


def ppo(envs, theta: Params, optimizer, steps: Steps, args: Args, remaining: float, generator: Generator) -> dict:
    """Epochs of PPO on a batch of trials, which change theta in place; statistics of the last minibatch."""
    optimizer.param_groups[0]["lr"] = remaining * args.lr
    for _ in range(args.epochs):
        for rows in torch.randperm(len(steps.x), generator=generator).tensor_split(args.minibatches):  # [5]
            weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
            minibatch = Steps(*(x[envs.unwrapped.share(rows).to(x.device)] for x in steps))
            loss, parts = ppo_loss(weights, minibatch, args, remaining * args.entropy_coef)
            portion = minibatch.mask.sum() / average(minibatch.mask.sum())[0]  # of the steps, over the processes' mean
            gradients = average(*(portion * x for x in torch.autograd.grad(loss, list(weights.values()))))
            for value, gradient in zip(theta.values(), gradients, strict=True):
                value.grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(theta.values(), args.max_grad_norm)
            optimizer.step()  # [7]
    means = average(*(portion * x for x in parts.values()), norm)
    return {f"train/{name}": float(x) for name, x in zip((*parts, "gradient_norm"), means, strict=True)}


def evaluate(envs, theta: Params, args: Args) -> dict:
    """Returns of the episodes of trials with held-out tasks, the same tasks and noise in every evaluation."""
    generator = Generator().manual_seed(args.seed + 1)
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "test")
    _, return_NE = play_trials(envs, tasks_NP, theta, args, generator)
    stats = {f"test/return_k{k}": float(x) for k, x in enumerate(return_NE.mean(0))}  # [8]
    for name, x_N in (("gain", return_NE[:, -1] - return_NE[:, 0]), ("trial", return_NE.sum(1))):
        stats[f"test/{name}_ci95"] = 1.96 * float(x_N.std(correction=0)) / math.sqrt(len(x_N))
    return {"test/return_trial": float(return_NE.sum(1).mean())} | stats


def train(envs, args: Args, run: "Run", state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, eps=1e-5)
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    (generator := Generator()).set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        steps, return_NE = play_trials(envs, tasks_NP, theta, args, generator)
        stats = ppo(envs, theta, optimizer, steps, args, 1 - (iteration - 1) / args.iterations, generator)
        state["env_steps"] += int(steps.mask.sum())
        state |= {"theta": theta, "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        stats |= {f"train/return_{name}": float(return_NE[:, k].mean()) for name, k in (("pre", 0), ("post", -1))}
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
    from envs import Follower, Trials, join, learning_curve, make

    leads = join(args.cuda, args.minibatches, meta_batch_size=args.meta_batch_size)
    envs = make(args.env_id, args.meta_batch_size, args.horizon, args.cuda, args.action_scale, True, args.physics)
    envs = Trials(envs, args.episodes_per_trial)
    generator = Generator().manual_seed(args.seed)
    theta = init_network(envs, args, generator)
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0, "theta": theta}
    state |= {"generator": generator.get_state()} | saved | {"args": vars(args)}
    shapes, expected = ({name: tuple(x.shape) for name, x in params.items()} for params in (state["theta"], theta))
    if wrong := sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name)):
        raise SystemExit(f"--resume {args.resume}: --env-id and the network's flags must be the run's, see {wrong}")
    try:
        run = Run(args, algorithm, state["iteration"]) if leads else Follower()
        train(envs, args, run, state)
        if leads:
            run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


if __name__ == "__main__":
    main()
