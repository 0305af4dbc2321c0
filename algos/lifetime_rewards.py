"""A reward, with a memory, learned to raise newborn policies: by it they explore their world, then exploit it.

Paper: Zheng et al. 2020, "What can learned intrinsic rewards capture?", arXiv:1912.05500, Algorithm 1.
Run: python algos/lifetime_rewards.py --env-id SymABC-v0      (--help explains every flag; --cuda: GPU)
Result: SymABC, episodes 41 to 50: 0.36, 0.35 (by r itself: 0.23; best possible 0.5); docs/lifetime_rewards.md
Algorithm: a lifetime is many episodes of one task; its policy pi_theta is born random and learns from r_eta alone.
    [1] repeat, in N lifetimes of different ages: U times, and without forgetting where the lifetimes are,
    [2]     T steps with pi_theta, through the ends of episodes
    [3]     r_eta, for each step, of the lifetime's history of observations, extrinsic rewards r and ends of episodes
    [4]     theta <- theta + alpha grad mean [ log pi(a|s) (G - v) - (G - v)^2 / 2 + c_H entropy ], G = return of r_eta
                within the episode, bootstrapped by the policy's own value v behind the T steps
    [5]     where a lifetime has ended: a new task, a newborn policy, an empty history
    [6]     A_life = GAE of r over V_phi(history), through the ends of episodes to the lifetime's; phi fits V to A + V
    [7]     eta ascends the gradient of mean log pi_theta(a|s) A_life, exact through the updates [4] of theta
    [8]     now and then: whole lifetimes of held-out tasks, by r_eta and, to compare, by r in its place
Symbols: gamma (A_life) = gamma, gamma bar (G) = inner_gamma, U = unroll (the paper's N), T = steps; alpha = inner_lr.
Shapes: a suffix names axes (obs_NTO): N lifetimes, T steps, S = U T or T + 1 steps, O observation, A choices, H units,
    I inputs of a history, E episodes, P task vector, C and K: A + 1 and T + 1.
Differs from the paper: r_eta = r + tanh(LSTM), near r at first (without "r +" it learns "always C": see the docs), and
    sees no actions, so that it suits every body; GAE, the paper's lambda is 1; policies have one tanh layer, gradients
    shortened to norm 1; no convolutions; A_life is divided by its standard deviation.
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
from torch.func import grad

Params = dict[str, Tensor]  # of a network that all lifetimes share; of N policies: w0 [N, O, H], b0 [N, H], ..
NETWORKS = "eta", "phi", "agents"


@dataclass
class Args:
    env_id: str = "SymABC-v0"
    """a task environment with choices as actions, registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything: networks, newborn policies, tasks, noise"""
    iterations: int = 2500
    """updates of the reward"""
    meta_batch_size: int = 128
    """lifetimes at once, of all ages, and those of an evaluation (N)"""
    episodes_per_lifetime: int = 50
    """in the paper 50 (ABC), 200 (Empty Rooms), 1,000 (non-stationary), 5,000 (Key-Box)"""
    horizon: int = 10
    """steps of an episode at most; in the paper 10 (ABC), 100 (others)"""
    steps: int = 4
    """steps of a trajectory, between two updates of a policy (T); in the paper 4 (ABC), 8, 16"""
    unroll: int = 5
    """updates of a policy that the meta-gradient goes through (U); 5 in the paper, N there"""
    policy_size: int = 32
    """units of a policy's tanh layer"""
    hidden_size: int = 64
    """units of the LSTM of the reward and of the lifetime value; 64 in the paper"""
    inner_lr: float = 0.5
    """step size of the policies' SGD (alpha); 0.1 in the paper"""
    inner_max_norm: float = 1.0
    """a policy's gradient is shortened to this norm, so that no step of SGD blows up"""
    inner_gamma: float = 0.9
    """discount of the learned reward within an episode (gamma bar)"""
    entropy_coef: float = 0.01
    """weight of the policies' entropy (c_H); in the paper 0.01, non-stationary 0.05"""
    gamma: float = 0.99
    """discount of the lifetime's extrinsic rewards; 0.99 in the paper"""
    gae_lambda: float = 0.9
    """lambda of GAE on them; 1, the paper's, needs far larger batches (docs)"""
    lr: float = 1e-3
    """Adam's step size for eta at the start; falls linearly to 0; 1e-3 in the paper"""
    value_lr: float = 3e-3
    """the same for phi; 1e-3 in the paper"""
    eval_every: int = 250
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """worlds and all else on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "inner_gamma", "gae_lambda"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= {"entropy_coef": (0, 1e6), "unroll": (2, 1e6)}  # the first trajectory owes the reward nothing
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {low:g} to {high:g}")


class Trajectory(NamedTuple):
    """T steps of each of N lifetimes; what follows a lifetime's end in them is still the dead one's, with mask 0."""

    obs: Tensor  # [N, T, O]
    action: Tensor  # [N, T] numbers of choices
    x: Tensor  # [N, T, I] what it led to: observation (before any restart), extrinsic reward, end of the episode
    reward: Tensor  # [N, T] extrinsic
    over: Tensor  # [N, T] 1 where the episode ended
    died: Tensor  # [N, T] 1 where the lifetime ended
    mask: Tensor  # [N, T]
    last: Tensor  # [N, O] the observation behind the T steps
    children: Params  # N newborn policies, to replace the dead; empty where nobody died


def init_agents(envs, args: Args, generator: Generator) -> Params:
    """N newborn policies: Xavier-uniform first layer, near uniform choices, values near 0."""
    (n,), m = envs.single_observation_space.shape, int(envs.single_action_space.n) + 1
    N, H = envs.num_envs, args.policy_size
    theta = {"w0": math.sqrt(6 / (n + H)) * (2 * torch.rand(N, n, H, generator=generator) - 1), "b0": torch.zeros(N, H)}
    theta |= {"w1": 0.01 * torch.randn(N, H, m, generator=generator), "b1": torch.zeros(N, m)}
    return {name: value.to(envs.unwrapped.device) for name, value in theta.items()}


def agent(theta: Params, obs_NTO: Tensor) -> tuple[Tensor, Tensor]:
    """Each lifetime's own policy: log-probabilities [N, T, A] of the choices, and values [N, T]."""
    hidden_NTH = torch.tanh(torch.baddbmm(theta["b0"][:, None], obs_NTO, theta["w0"]))
    output_NTC = torch.baddbmm(theta["b1"][:, None], hidden_NTH, theta["w1"])
    return torch.log_softmax(output_NTC[..., :-1], -1), output_NTC[..., -1]


def init_history(envs, args: Args, generator: Generator) -> Params:
    """Weights of an LSTM, each gate's orthogonal, and of a number read from it, which is near 0 at first."""
    H, weights = args.hidden_size, {}
    for name, columns in (("x", envs.single_observation_space.shape[0] + 2), ("h", H)):
        gates = [torch.nn.init.orthogonal_(torch.empty(H, columns), generator=generator) for _ in range(4)]
        weights |= {f"w_{name}": torch.cat(gates), f"b_{name}": torch.zeros(4 * H)}
    return weights | {"w_out": 0.01 * torch.randn(H, generator=generator), "b_out": torch.zeros(1)}


def read_history(weights: Params, data: Trajectory, memory: list) -> tuple[Tensor, list]:
    """The network's number [N, T + 1] before and behind each of T steps; its memory then, empty where a life ended."""
    lstm = [weights[name] for name in ("w_x", "w_h", "b_x", "b_h")]
    feature_NTH, *after = torch.lstm(data.x, memory, lstm, True, 1, 0.0, True, False, True)
    feature_NSH = torch.cat([memory[0].transpose(0, 1), feature_NTH], 1)
    number_NS = feature_NSH @ weights["w_out"] + weights["b_out"]
    return number_NS, [value * (1 - data.died.sum(1, keepdim=True)) for value in after]


def learned_reward(eta: Params, data: Trajectory, memory: list) -> tuple[Tensor, list]:
    """r_eta [N, T] of a trajectory, and the memory behind it."""
    number_NS, memory = read_history(eta, data, memory)
    return data.reward + torch.tanh(number_NS[:, 1:]), memory  # [3]


def discounted(reward_NT: Tensor, end_NT: Tensor, last_N: Tensor, gamma: float) -> Tensor:
    """Returns [N, T], bootstrapped by `last` behind the T steps, cut where `end` is 1."""
    tails = [last_N]
    for reward_N, end_N in zip(reversed(reward_NT.unbind(1)), reversed(end_NT.unbind(1)), strict=True):
        tails.append(reward_N + gamma * (1 - end_N) * tails[-1])
    return torch.stack(tails[:0:-1], 1)


def improve(theta: Params, data: Trajectory, reward_NT: Tensor, args: Args) -> Params:
    """A step of each policy on its trajectory, differentiable in theta and rewards; newborn ones for the dead."""
    value_NT, last_N = agent(theta, data.obs)[1], agent(theta, data.last[:, None])[1].squeeze(1)
    return_NT = discounted(reward_NT, data.over, last_N, args.inner_gamma)

    def objective(weights: Params) -> Tensor:
        log_prob_NTA, now_NT = agent(weights, data.obs)
        gain_NT = log_prob_NTA.gather(-1, data.action[..., None]).squeeze(-1) * (return_NT - value_NT)
        entropy_NT = -(log_prob_NTA.exp() * log_prob_NTA).sum(-1)
        gain_NT = gain_NT - 0.5 * (return_NT - now_NT).square() + args.entropy_coef * entropy_NT
        return (data.mask * gain_NT).mean(1).sum()  # summed over lifetimes, each keeps its own gradient

    gradient, improved = grad(objective)(theta), {}
    norm_N = sum(x.square().flatten(1).sum(1) for x in gradient.values()).add(1e-12).sqrt()
    step_N, dead_N = args.inner_lr / (norm_N / args.inner_max_norm).clamp_min(1), data.died.sum(1) > 0
    for name, x in gradient.items():
        row = -1, *[1] * (x.ndim - 1)
        x = theta[name] + step_N.view(row) * x  # [4]
        improved[name] = torch.where(dead_N.view(row), data.children[name], x) if data.children else x  # [5]
    return improved


def live(envs, obs_NO: Tensor, theta: Params, args: Args, generator: Generator) -> tuple[Trajectory, Tensor]:
    """The next T steps of every lifetime, and in which of its episodes [N, T] they were."""
    N, A, steps, mask_N = len(obs_NO), theta["b1"].shape[1] - 1, [], torch.ones_like(obs_NO[:, 0])
    noise_TNA = -(-torch.rand(args.steps, N, A, generator=generator).log()).log()  # Gumbel's: argmax draws from softmax
    for noise_NA in noise_TNA.to(obs_NO):
        action_N = (agent(theta, obs_NO[:, None])[0].squeeze(1) + noise_NA).argmax(1)
        next_NO, reward_N, terminated, truncated, info = envs.step(action_N)  # [2]
        over_N, died_N = (terminated | truncated).to(obs_NO), info["born"].to(obs_NO) * mask_N
        x_NI = torch.cat([info["final_obs"], reward_N[:, None], over_N[:, None]], 1)
        steps.append((obs_NO, action_N, x_NI, reward_N, over_N, died_N, mask_N, info["episode"]))
        obs_NO, mask_N = next_NO, mask_N - died_N
    *data, episode_NT = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return Trajectory(*data, obs_NO, init_agents(envs, args, generator) if not mask_N.all() else {}), episode_NT


def value_loss(phi: Params, window: list[Trajectory], memory: list, args: Args) -> tuple[Tensor, Tensor, list]:
    """The loss of V, the advantages [N, U T] in units of their standard deviation, and V's memory."""
    parts = zip(*[(data.reward, data.died, data.mask) for data in window], strict=True)
    (reward_NS, died_NS, mask_NS), values = (torch.cat(x, 1) for x in parts), []
    for data in window:
        number_NK, memory = read_history(phi, data, memory)
        values.append(number_NK[:, :-1])
    value_NS = torch.cat(values, 1)
    next_NS = torch.cat([value_NS[:, 1:], number_NK[:, -1:]], 1).detach()
    delta_NS = reward_NS + args.gamma * (1 - died_NS) * next_NS - value_NS.detach()
    advantage_NS = mask_NS * discounted(delta_NS, died_NS, 0 * next_NS[:, -1], args.gamma * args.gae_lambda)  # [6]
    loss = (mask_NS * (advantage_NS + value_NS.detach() - value_NS)).square().mean()
    return loss, advantage_NS / (advantage_NS.std() + 1e-6), memory


def meta_loss(eta: Params, theta: Params, window: list[Trajectory], memory: list, advantage_NS, args: Args) -> Tensor:
    """The loss of r_eta, by the policies that it makes of theta."""
    gain = 0.0
    for data, advantage_NT in zip(window, advantage_NS.split(args.steps, 1), strict=True):
        log_prob_NT = agent(theta, data.obs)[0].gather(-1, data.action[..., None]).squeeze(-1)
        gain = gain + (data.mask * log_prob_NT * advantage_NT).mean()
        reward_NT, memory = learned_reward(eta, data, memory)
        theta = improve(theta, data, reward_NT, args)
    return -gain / len(window)


def meta_step(eta: Params, phi: Params, optimizer, agents: Params, memory, value_memory, window: list, args) -> tuple:
    """A step of Adam on eta and phi, in place, by a window of trajectories; statistics, V's memory behind it."""
    etas, phis = ({name: x.detach().requires_grad_() for name, x in weights.items()} for weights in (eta, phi))
    loss, advantage_NS, value_memory = value_loss(phis, window, value_memory, args)
    total = loss + meta_loss(etas, agents, window, memory, advantage_NS, args)
    gradients = torch.autograd.grad(total, [*etas.values(), *phis.values()])
    for x, gradient in zip([*eta.values(), *phi.values()], gradients, strict=True):
        x.grad = gradient
    optimizer.step()  # [7]
    earned, episodes = (sum((data.mask * getattr(data, name)).sum() for data in window) for name in ("reward", "over"))
    stats = {"train/return_post": float(earned / episodes.clamp_min(1)), "train/value_loss": float(loss.detach())}
    return stats, [x.detach() for x in value_memory]


def whole_lifetimes(envs, tasks_NP: Tensor, eta: Params, args: Args, generator: Generator) -> Tensor:
    """Returns [N, E] of all episodes from birth; without eta, {}, policies learn from their extrinsic rewards."""
    obs_NO, _ = envs.reset(seed=int(torch.randint(2**31, (1,), generator=generator)), options={"tasks": tasks_NP})
    theta, memory = init_agents(envs, args, generator), 2 * [obs_NO.new_zeros(1, len(obs_NO), args.hidden_size)]
    return_NE, alive_N1 = obs_NO.new_zeros(len(obs_NO), args.episodes_per_lifetime), torch.ones_like(obs_NO[:, :1])
    while alive_N1.any():
        data, episode_NT = live(envs, obs_NO, theta, args, generator)
        return_NE.scatter_add_(1, episode_NT, data.reward * data.mask * alive_N1)
        reward_NT, memory = learned_reward(eta, data, memory) if eta else (data.reward, memory)
        theta, obs_NO = improve(theta, data, reward_NT, args), data.last
        alive_N1 = alive_N1 * (1 - data.died.sum(1, keepdim=True))
    return return_NE


def evaluate(envs, eta: Params, args: Args) -> dict:
    """Mean returns in tenths of held-out lifetimes, by the learned reward and by none, with equal births and noise."""
    stats, tenths = {}, min(10, args.episodes_per_lifetime)
    for name, reward in (("extrinsic", {}), ("test", eta)):
        generator = Generator().manual_seed(args.seed + 1)
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "test")
        return_NE = whole_lifetimes(envs, tasks_NP, reward, args, generator)
        parts = [x.mean(1) for x in return_NE.tensor_split(tenths, 1)]
        stats |= {f"{name}/return_k{k}": float(x_N.mean()) for k, x_N in enumerate(parts)}  # [8]
        stats[f"{name}/return_lifetime"] = float(return_NE.mean())
    return stats | {"test/gain_ci95": 1.96 * float((parts[-1] - parts[0]).std(correction=0)) / math.sqrt(len(tasks_NP))}


def init_lifetimes(envs, args: Args, generator: Generator) -> dict:
    """The two networks, and N lifetimes of all ages: worlds, newborn policies, empty memories."""
    age_N = torch.randint(args.episodes_per_lifetime, (envs.num_envs,), generator=generator)
    obs_NO, _ = envs.reset(seed=int(torch.randint(2**31, (1,), generator=generator)), options={"episode": age_N})
    state = {name: init_history(envs, args, generator) for name in ("eta", "phi")}
    memory = dict.fromkeys(state, 2 * [obs_NO.new_zeros(1, len(obs_NO), args.hidden_size)])
    return state | {"agents": init_agents(envs, args, generator), "memory": memory, "worlds": envs.save_worlds()}


def train(envs, test_envs, args: Args, run: "Run", state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    device, generator = envs.unwrapped.device, Generator()
    eta, phi, agents = ({k: x.to(device, copy=True) for k, x in state[name].items()} for name in NETWORKS)
    memory = {name: [x.to(device) for x in value] for name, value in state["memory"].items()}
    optimizer = torch.optim.Adam([{"params": [*eta.values()]}, {"params": [*phi.values()]}])
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    obs_NO = envs.load_worlds(state["worlds"])
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"], window, before = iteration, [], (agents, memory["eta"])
        for group, lr in zip(optimizer.param_groups, (args.lr, args.value_lr), strict=True):
            group["lr"] = lr * (1 - (iteration - 1) / args.iterations)
        for _ in range(args.unroll):  # [1]
            data, _ = live(envs, obs_NO, agents, args, generator)
            reward_NT, memory["eta"] = learned_reward(eta, data, memory["eta"])
            agents, obs_NO = improve(agents, data, reward_NT, args), data.last
            window.append(data)
        stats, memory["phi"] = meta_step(eta, phi, optimizer, *before, memory["phi"], window, args)
        state["env_steps"] += args.unroll * args.steps * len(obs_NO)
        state |= {"eta": eta, "phi": phi, "agents": agents, "memory": memory, "optimizer": optimizer.state_dict()}
        state |= {"worlds": envs.save_worlds(), "generator": generator.get_state()}
        save = iteration % args.eval_every == 0 or iteration == args.iterations or run.stopping
        stats |= evaluate(test_envs, eta, args) if save or iteration == 1 else {}
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
    from envs import Lifetimes, learning_curve, make

    size = args.meta_batch_size, args.horizon, args.cuda
    envs, test_envs = (Lifetimes(make(args.env_id, *size, discrete=True), args.episodes_per_lifetime) for _ in "ab")
    if not envs.unwrapped.is_discrete or envs.unwrapped.world_state is None:
        raise SystemExit(f"--env-id {args.env_id}: actions must be choices, and worlds able to start one by one")
    generator = Generator().manual_seed(args.seed)
    fresh = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0}
    fresh |= init_lifetimes(envs, args, generator) | {"generator": generator.get_state()}
    state = fresh | saved | {"args": vars(args)}
    fixed = "env_id", "horizon", "meta_batch_size", "episodes_per_lifetime", "policy_size", "hidden_size"
    if saved and (wrong := [name for name in fixed if getattr(args, name) != getattr(saved["args"], name)]):
        raise SystemExit(f"--resume {args.resume}: lifetimes go on in it, so these must be the run's: {wrong}")
    try:
        run = Run(args, algorithm, state["iteration"])
        train(envs, test_envs, args, run, state)
        run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


if __name__ == "__main__":
    main()
