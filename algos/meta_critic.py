"""Meta-critic networks: a critic that many actors share judges new actors on new tasks, and so teaches them.

Paper: Sung, Zhang, Xiang, Hospedales, Yang 2017, arXiv:1706.09529; https://github.com/floodsung/meta-critic-networks
Run: python algos/meta_critic.py     (--help explains every flag; --cuda uses the GPU)
Result: poles of unseen length: return 150 in 26 episodes, with an own critic in 195 or more; docs/meta_critic.md
Algorithm:
    [1] repeat: each of N worlds has a task and an actor theta_i of its own, which plays a window of T steps
    [2]     z_i = C_omega(trace_i), an LSTM; the trace: all (s, a, r) of the actor's window before, none at its birth
    [3]     V(s, z) = sum_a pi_theta_i(a|s) Q_phi(s, a, z); where actions are no choices, Q_phi(s, pi_theta_i(s), z)
    [4]     theta_i <- a step of Adam up mean_t V(s_t, z_i); phi and z_i are given
    [5]     y_t = r_t + gamma [(1 - lambda) V(s_t+1, z_i) + lambda y_t+1], but lambda 0 in the last step of a window or
            an episode, and gamma 0 where the episode ended early
    [6]     phi, omega <- a step of Adam down the mean of (Q_phi(s_t, a_t, z_i) - y_t)^2; theta_i and y_t are given
    [7]     where a lifetime of some episodes is over, the world has a fresh task, and gets a fresh actor
    [8] now and then, meta-testing: fresh actors on held-out tasks learn by [1] to [4], phi and omega as they are; and
            the same actors with a critic of their own each, without z, from scratch by [1] and [3] to [6]
Symbols: theta = the actors, phi and omega = phi, lambda = td_lambda.
Shapes: a suffix names a tensor's axes (obs_NTO): N worlds, B worlds of which several have the same actor, T steps,
    O observation, A action (choices are one-hot), P task vector, C actions weighed, I = O + A + 1 what the encoder
    sees of a step, H its features, Z dimensions of z. Parameters lead with N, a network for each world, or with 1.
Differs from the paper: one form for all experiments; for CartPole the authors' code has a V(s, z), and never trains the
    encoder. The trace is the whole window (authors: its last 9 steps), births are spread over time (authors: all at
    once), a fall costs nothing (authors: 10), test tasks are held out. benchmark/meta_critic.py has the regression.
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
from torch.func import grad, grad_and_value
from torch.nn import functional

Params = dict[str, Tensor]  # one network for each of N worlds: w0 [N, O, H], b0 [N, 1, H], ..; for all worlds N is 1
PARTS = "theta", "phi", "theta_moments", "phi_moments", "past"  # of the state, what lives on the device


@dataclass
class Args:
    env_id: str = "CartPoleLength-v0"
    """a task environment registered by envs/__init__.py whose actions are choices"""
    seed: int = 1
    """seed of everything: parameters, tasks, start states, noise"""
    iterations: int = 2000
    """windows, with an update of actors, critic and encoder behind each"""
    meta_batch_size: int = 50
    """worlds with a task and an actor each (N), and held-out tasks; the authors: 10, in regression 100"""
    window_size: int = 30
    """steps of a window (T); the authors: 30, for bandits and in regression 10"""
    horizon: int = 200
    """steps of an episode at most"""
    lifetime: int = 10
    """episodes of a task and its actor"""
    hidden_size: int = 40
    """units of each of an actor's two ReLU layers and of the encoder's LSTM; the authors: 40 and 30"""
    critic_size: int = 80
    """units of each of a critic's two ReLU layers; 80 in the authors' code"""
    latent_size: int = 3
    """dimensions of z; 3 in the authors' code"""
    actor_lr: float = 1e-2
    """Adam's step size for actors that the meta-critic teaches; 1e-2 in the authors' code, 1e-3 for bandits"""
    critic_lr: float = 1e-3
    """Adam's step size for phi and omega; 1e-3 in the authors' code"""
    gamma: float = 0.99
    """discount; 0.99 in the authors' code, 0 where no action matters later (bandits, regression)"""
    td_lambda: float = 0.9
    """how much later rewards count in a target, against the critic's opinion (lambda); 1 in the authors' code"""
    own_actor_lr: float = 5e-4
    """Adam's step size for actors with critics of their own"""
    own_critic_lr: float = 1e-2
    """Adam's step size for these critics"""
    eval_every: int = 500
    """iterations from one evaluation and checkpoint to the next"""
    eval_steps: int = 10
    """units of new actors' learning in an evaluation (K)"""
    eval_windows: int = 20
    """windows of such a unit"""
    eval_episodes: int = 10
    """episodes that measure an actor's return (E)"""
    cuda: bool = False
    """networks and worlds on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "td_lambda"), (0, 1)) | {"seed": (0, 2**31)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {low:g} to {high:g}")


class Window(NamedTuple):
    """T steps of N worlds, in each of which acts another actor."""

    obs: Tensor  # [N, T, O]
    action: Tensor  # [N, T, A] one-hot where it is a choice
    reward: Tensor  # [N, T]
    next_obs: Tensor  # [N, T, O] what the action led to, before any restart
    ended: Tensor  # [N, T] 1 where the episode ended early
    over: Tensor  # [N, T] 1 where it ended, early or at the horizon
    mask: Tensor  # [N, T] 1 until the actor's lifetime ended
    trace: Tensor  # [N, T, I] what the encoder sees


def init_layers(count: int, sizes: tuple[int, ...], generator: Generator) -> Params:
    """`count` networks with layers of these sizes, weights and biases uniform in +-1 / sqrt(inputs)."""
    params = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        for name, rows in ((f"w{i}", n), (f"b{i}", 1)):
            params[name] = (2 * torch.rand(count, rows, m, generator=generator) - 1) / math.sqrt(n)
    return params


def init_critics(envs, count: int, Z: int, args: Args, generator: Generator) -> Params:
    """phi of `count` critics, and omega unless z has no dimensions."""
    inputs, H = envs.single_observation_space.shape[0] + int(envs.single_action_space.n), args.hidden_size
    phi = init_layers(count, (inputs + Z, args.critic_size, args.critic_size, 1), generator)
    shapes = {"w_x": (4 * H, inputs + 1), "w_h": (4 * H, H), "b_x": [4 * H], "b_h": [4 * H], "w_z": (H, Z), "b_z": [Z]}
    omega = {name: (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(H) for name, shape in shapes.items()}
    return phi | (omega if Z else {})


def first_actors(envs, args: Args, generator: Generator, phi: Params) -> dict:
    """Fresh actors without a past, and these critics, on the worlds' device."""
    sizes = envs.single_observation_space.shape[0], args.hidden_size, args.hidden_size, int(envs.single_action_space.n)
    trace_NTI = torch.zeros(args.meta_batch_size, args.window_size, sizes[0] + sizes[-1] + 1)
    parts = init_layers(args.meta_batch_size, sizes, generator), phi, {}, {}, {"trace": trace_NTI}
    return on_device(dict(zip(PARTS, parts, strict=True)), envs)


def on_device(state: dict, envs) -> dict:
    return state | {part: {name: x.to(envs.unwrapped.device) for name, x in state[part].items()} for part in PARTS}


def layers(params: Params, x: Tensor) -> Tensor:
    """Outputs [N, B, outputs] of N networks, each for inputs [N, B, inputs] of its own, or of one for all."""
    hidden = torch.relu(x @ params["w0"] + params["b0"])
    return torch.relu(hidden @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def encode(phi: Params, trace_NTI: Tensor) -> Tensor:
    """z [N, Z], from the LSTM's last features of each trace."""
    if "w_x" not in phi:
        return trace_NTI[:, 0, :0]
    start_1NH = trace_NTI.new_zeros(1, len(trace_NTI), len(phi["w_z"]))
    weights = [phi[name] for name in ("w_x", "w_h", "b_x", "b_h")]
    settings = True, 1, 0.0, True, False, True  # biases, layers, dropout, train (for cuDNN), one direction, batch first
    feature_NTH, _, _ = torch.lstm(trace_NTI, [start_1NH, start_1NH], weights, *settings)
    return feature_NTH[:, -1] @ phi["w_z"] + phi["b_z"]


def critic(phi: Params, obs_NTO: Tensor, action_NTCA: Tensor, z_NZ: Tensor) -> Tensor:
    """Q(s, a, z) [N, T, C] of C actions in each step."""
    N, T, C, _ = action_NTCA.shape
    parts = obs_NTO[:, :, None].expand(-1, -1, C, -1), action_NTCA, z_NZ[:, None, None].expand(-1, T, C, -1)
    return layers(phi, torch.cat(parts, -1).flatten(1, 2)).view(N, T, C)


def state_values(theta: Params, phi: Params, obs_NTO: Tensor, z_NZ: Tensor, choose: bool) -> Tensor:
    """V(s, z) [N, T] of each world's actor."""
    output_NTA = layers(theta, obs_NTO)
    if not choose:
        return critic(phi, obs_NTO, output_NTA[:, :, None], z_NZ).squeeze(-1)
    action_NTCA = torch.eye(output_NTA.shape[-1]).to(obs_NTO).expand(*output_NTA.shape, -1)
    return (output_NTA.softmax(-1) * critic(phi, obs_NTO, action_NTCA, z_NZ)).sum(-1)  # [3]


def actor_loss(theta: Params, phi: Params, window: Window, z_NZ: Tensor, choose: bool) -> Tensor:
    """-V over each window; the sum over actors, so that each has its own gradient."""
    return -(state_values(theta, phi, window.obs, z_NZ, choose) * window.mask).mean(1).sum()


def critic_targets(value_NT: Tensor, window: Window, args: Args) -> Tensor:
    """y [N, T] from the values of the next observations."""
    target_N, targets = value_NT[:, -1], []
    steps = [x.unbind(1) for x in (value_NT, window.reward, window.ended, window.over)]
    for value_N, reward_N, ended_N, over_N in reversed(list(zip(*steps, strict=True))):
        after_N = value_N + args.td_lambda * (1 - over_N) * (target_N - value_N)
        target_N = reward_N + args.gamma * (1 - ended_N) * after_N  # [5]
        targets.append(target_N)
    return torch.stack(targets[::-1], 1)


def critic_loss(phi: Params, window: Window, trace_NTI: Tensor, target_NT: Tensor) -> Tensor:
    """The mean squared error; of critics of their own the sum over critics, so that each has its own gradient."""
    Q_NT1 = critic(phi, window.obs, window.action[:, :, None], encode(phi, trace_NTI))
    return ((Q_NT1.squeeze(-1) - target_NT).square() * window.mask).mean() * len(phi["w0"])


def adam(params: Params, gradient: Params, moments: Params, lr: float) -> tuple[Params, Params]:
    """A step of Adam down the gradient; of N networks each may be at another step; moments {} at the first."""
    new, changed = {"steps": moments.get("steps", torch.zeros_like(params["w0"][:, 0, 0])) + 1}, {}
    for name, g in gradient.items():
        steps = new["steps"].view(-1, *[1] * (g.ndim - 1))
        mean = new[f"mean {name}"] = moments.get(f"mean {name}", torch.zeros_like(g)).lerp(g, 0.1)
        square = new[f"square {name}"] = moments.get(f"square {name}", torch.zeros_like(g)).lerp(g.square(), 0.001)
        changed[name] = params[name] - lr * mean / (1 - 0.9**steps) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
    return changed, new


def teach(state: dict, window: Window, args: Args, choose: bool, actor_lr: float, critic_lr: float) -> float:
    """An update of the actors and, unless critic_lr is 0, of the critics in `state`; the critics' loss."""
    theta, phi, trace_NTI, loss = state["theta"], state["phi"], state["past"]["trace"], 0.0
    z_NZ = encode(phi, trace_NTI)  # [2]
    gradient = grad(actor_loss)(theta, phi, window, z_NZ, choose)
    state["theta"], state["theta_moments"] = adam(theta, gradient, state["theta_moments"], actor_lr)  # [4]
    if critic_lr:
        target_NT = critic_targets(state_values(theta, phi, window.next_obs, z_NZ, choose), window, args)
        gradient, loss = grad_and_value(critic_loss)(phi, window, trace_NTI, target_NT)
        state["phi"], state["phi_moments"] = adam(phi, gradient, state["phi_moments"], critic_lr)  # [6]
    state["past"] = {"trace": window.trace}
    return float(loss)


@torch.no_grad()
def play_window(envs, obs_BO: Tensor, theta: Params, steps: int, generator: Generator) -> tuple[Tensor, Window, Tensor]:
    """Steps of B worlds, equally many for each actor: the next observation, the window, where lifetimes ended [B]."""
    choose, records, born_B = envs.unwrapped.is_discrete, [], torch.zeros_like(obs_BO[:, 0], dtype=torch.bool)
    for _ in range(steps):
        action_BA = layers(theta, obs_BO.unflatten(0, (len(theta["w0"]), -1))).flatten(0, 1)
        if choose:
            noise_BA = torch.rand(action_BA.shape, generator=generator).to(obs_BO)
            choice_B = (action_BA - (-noise_BA.log()).log()).argmax(1)  # with Gumbel's noise a draw from the softmax
            action_BA = functional.one_hot(choice_B, action_BA.shape[1]).to(obs_BO)
        new_obs_BO, reward_B, ended_B, late_B, info = envs.step(choice_B if choose else action_BA)  # [1]
        seen_BI = torch.cat([obs_BO, info.get("answer", action_BA), reward_B[:, None]], 1)
        numbers = [x.to(obs_BO) for x in (reward_B, info["final_obs"], ended_B, ended_B | late_B, ~born_B)]
        records.append((obs_BO, action_BA, *numbers, seen_BI))
        obs_BO, born_B = new_obs_BO, born_B | info["born"]
    return obs_BO, Window(*(torch.stack(x, 1) for x in zip(*records, strict=True))), born_B


def examine(exams, tasks_NP: Tensor, theta: Params, args: Args, generator: Generator) -> Tensor:
    """Mean return [N] of E fresh episodes of each actor, in worlds whose lifetimes are one episode."""
    options = {"tasks": tasks_NP.repeat_interleave(args.eval_episodes, 0)}
    obs_BO, _ = exams.reset(seed=int(torch.randint(2**31, (1,), generator=generator)), options=options)
    _, window, _ = play_window(exams, obs_BO, theta, args.horizon, generator)
    return (window.reward * window.mask).sum(1).view(len(tasks_NP), -1).mean(1)


def new_actors(envs, exams, args: Args, phi: Params | None = None):
    """Fresh actors on held-out tasks, taught by the meta-critic phi, or without it each by a critic of its own: before
    and after each of K units of learning their returns, and the episodes that they have played until then, [N] each."""
    generator, choose = Generator().manual_seed(args.seed + 1), envs.unwrapped.is_discrete
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "test")
    obs_NO, _ = envs.reset(seed=args.seed, options={"tasks": tasks_NP})
    own = init_critics(envs, len(tasks_NP), 0, args, generator)
    state, episodes_N = first_actors(envs, args, generator, own if phi is None else phi), 0 * obs_NO[:, 0]
    lrs = (args.own_actor_lr, args.own_critic_lr) if phi is None else (args.actor_lr, 0.0)
    for k in range(args.eval_steps + 1):
        yield examine(exams, tasks_NP, state["theta"], args, generator), episodes_N
        for _ in range(args.eval_windows if k < args.eval_steps else 0):
            obs_NO, window, _ = play_window(envs, obs_NO, state["theta"], args.window_size, generator)
            teach(state, window, args, choose, *lrs)  # [8]
            episodes_N = episodes_N + window.over.sum(1)


def evaluate(name: str, *given) -> dict:
    """What new actors achieve, and in how many episodes, as metrics."""
    returns, episodes = zip(*new_actors(*given), strict=True)
    ci95 = 1.96 * float((returns[-1] - returns[0]).std(correction=0)) / math.sqrt(len(returns[0]))
    stats = {f"{name}/return_k{k}": float(return_N.mean()) for k, return_N in enumerate(returns)}
    return stats | {f"{name}/gain_ci95": ci95, f"{name}/episodes": float(episodes[-1].mean())}


def train(envs, fresh_envs, exams, args: Args, run: "Run", state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    state |= on_device(state, envs)
    (generator := Generator()).set_state(state["generator"])
    obs_NO, choose = envs.load_worlds(state["worlds"]), envs.unwrapped.is_discrete
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        obs_NO, window, born_N = play_window(envs, obs_NO, state["theta"], args.window_size, generator)
        loss = teach(state, window, args, choose, args.actor_lr, args.critic_lr)
        fresh = first_actors(envs, args, generator, {})["theta"]
        state["theta"] = {k: torch.where(born_N[:, None, None], fresh[k], x) for k, x in state["theta"].items()}  # [7]
        for part in ("theta_moments", "past"):
            state[part] = {k: x * ~born_N.view(-1, *[1] * (x.ndim - 1)) for k, x in state[part].items()}
        state |= {"iteration": iteration, "env_steps": state["env_steps"] + window.mask.numel()}
        state |= {"generator": generator.get_state(), "worlds": envs.save_worlds()}
        stats = {"train/loss": loss, "train/return_post": float(window.reward.sum() / window.over.sum().clamp_min(1))}
        save = iteration % args.eval_every == 0 or iteration == args.iterations or run.stopping
        stats |= evaluate("test", fresh_envs, exams, args, state["phi"]) if save or iteration == 1 else {}
        stats |= evaluate("own", fresh_envs, exams, args) if iteration == 1 else {}  # training does not change them
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

    N, E, generator = args.meta_batch_size, args.eval_episodes, Generator().manual_seed(args.seed)
    worlds = [make(args.env_id, n, args.horizon, args.cuda, discrete=True) for n in (N, N, N * E)]
    if not worlds[0].unwrapped.is_discrete:
        raise SystemExit(f"--env-id {args.env_id}: its actions are continuous; this algorithm's are choices")
    envs, *others = (Lifetimes(x, n) for x, n in zip(worlds, (args.lifetime, 10**9, 1), strict=True))
    made = first_actors(envs, args, generator, init_critics(envs, 1, args.latent_size, args, generator))
    tasks_NP, births_N = envs.unwrapped.sample_tasks(N, generator, "train"), torch.arange(N) * args.lifetime // N
    envs.reset(seed=args.seed, options={"tasks": tasks_NP, "episode": births_N})
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0, "worlds": envs.save_worlds()}
    state |= made | {"generator": generator.get_state()} | saved | {"args": vars(args)}
    fixed = "env_id", "horizon", "meta_batch_size", "lifetime", "hidden_size", "critic_size", "latent_size"
    if saved and (wrong := [name for name in fixed if getattr(args, name) != getattr(saved["args"], name)]):
        raise SystemExit(f"--resume {args.resume}: worlds go on in it, so these must be the run's: {wrong}")
    try:
        run = Run(args, algorithm, state["iteration"])
        train(envs, *others, args, run, state)
        run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


if __name__ == "__main__":
    main()
