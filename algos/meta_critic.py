"""Meta-critic networks: a critic that many actors share judges new actors on new tasks, and so teaches them.

Paper: Sung, Zhang, Xiang, Hospedales, Yang 2017, arXiv:1706.09529; code: floodsung/meta-critic-networks
Run: python algos/meta_critic.py     (--help explains every flag; --cuda: on the GPU)
Result: poles of unseen length: return 150 takes 26 episodes, with a critic of its own 195 or more
Algorithm:
    [1] repeat: each of N worlds has a task and an actor theta_i of its own, which plays a window of T steps
    [2]     z_i = C_omega(trace_i), an LSTM; the trace: all (s, a, r) of the actor's window before, 0 at birth
    [3]     V(s, z) = sum_a pi_theta_i(a|s) Q_phi(s, a, z); where an action is an answer and no choice (only
            in benchmark/meta_critic.py, for regression): V(s, z) = Q_phi(s, pi_theta_i(s), z)
    [4]     theta_i <- a step of Adam up mean_t V(s_t, z_i), with phi and z_i held fixed
    [5]     y_t = r_t + gamma [(1 - lambda) V(s_t+1, z_i) + lambda y_t+1], V of the theta_i that played;
            lambda is 0 in the last step of a window or an episode, gamma is 0 where the episode ended early
    [6]     phi, omega <- a step of Adam down the mean of (Q_phi(s_t, a_t, z_i) - y_t)^2, with y_t held fixed
    [7]     where a lifetime of some episodes is over, the world has a new task, and gets a newborn actor
    [8]     now and then, meta-testing: newborn actors on the test tasks learn by [1] to [4], phi and omega
            stay as they are; beside them, the same actors by [1] and [3] to [6], each with a new critic, no z
Symbols: theta = theta, all actors; the dict phi holds phi and omega; lambda = td_lambda.
Shapes: a suffix names a tensor's axes (obs_NTO): N worlds with an actor each, B worlds of which several may
    have the same actor, T steps, O observation, A action (choices are one-hot), P task vector, C actions to
    judge, I = O + A + 1 what the encoder sees of a step (O + A in regression), H its features, Z dimensions
    of z. Parameters lead with N (a network for each world) or with 1 (one for all), the encoder's do not.
Differs from the paper: one form for all experiments; for CartPole the authors' code has a V(s, z), and never
    trains the encoder. The trace is the whole window (authors: its last 9 steps), births are spread over time
    (authors: all at once), a fall costs nothing (authors: 10), gradients are not shortened (authors: to 0.5),
    tests are not greedy (authors: they are), test tasks are held out where they can be.
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
from torch import Generator, Tensor
from torch.func import grad
from torch.nn import functional

Params = dict[str, Tensor]  # N networks at once: w0 [N, O, H], b0 [N, 1, H], ..; where one serves all, N is 1


@dataclass
class Args:
    env_id: str = "CartPoleLength-v0"
    """a task environment of envs/ or your own (module:id, file.py:class) whose actions are choices"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, start states, noise"""
    iterations: int = 2000
    """windows, with an update of actors, critic and encoder after each"""
    meta_batch_size: int = 50
    """worlds with a task and an actor each (N), and test tasks; the authors: 10, in regression 100"""
    window_size: int = 30
    """steps of a window (T); the authors: 30, for bandits and in regression 10"""
    horizon: int = 200
    """steps of an episode at most"""
    lifetime: int = 10
    """episodes of a task and its actor"""
    hidden_size: int = 40
    """units of each of an actor's two ReLU layers, and of the encoder's LSTM; the authors: 40, 30"""
    critic_size: int = 80
    """units of each of a critic's two ReLU layers; 80 in the authors' code"""
    latent_size: int = 3
    """dimensions of z; 3 in the authors' code; 0: a shared critic without encoder"""
    least_trace: int = 0
    """in training the encoder reads the last n steps of a trace, n drawn from this to T; 0: always all"""
    actor_lr: float = 1e-2
    """Adam's step size for actors taught by the meta-critic; 1e-2 in the authors' code, 1e-3 for bandits"""
    critic_lr: float = 1e-3
    """Adam's step size for phi and omega; 1e-3 in the authors' code"""
    gamma: float = 0.99
    """discount; 0.99 in the authors' code, 0 where no action matters later (bandits, regression)"""
    td_lambda: float = 0.9
    """weight of later rewards in a target, against the critic's own opinion (lambda); authors: 1"""
    max_norm: float = 0.0
    """gradients of an actor, or of a critic with its encoder, have this norm at most; 0: any; authors: 0.5"""
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
    eval_greedy: bool = False
    """in these episodes actors take the likeliest choice, as the authors' do, instead of drawing it"""
    cuda: bool = False
    """networks and worlds on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "td_lambda"), (0, 1)) | {"seed": (0, 2**31), "max_norm": (0, 1e6)}
        ranges |= {"latent_size": (0, 10**9), "least_trace": (0, self.window_size)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


class Window(NamedTuple):
    """T steps of N worlds, in each of which acts another actor."""

    obs: Tensor  # [N, T, O]
    action: Tensor  # [N, T, A] one-hot where it is a choice
    reward: Tensor  # [N, T]
    next_obs: Tensor  # [N, T, O] what the action led to, before any restart
    ended: Tensor  # [N, T] 1 where the episode ended early
    over: Tensor  # [N, T] 1 where it ended, early or at the horizon
    mask: Tensor  # [N, T] 1 until the actor's lifetime ended; after that the world's task is another one
    trace: Tensor  # [N, T, I] what the encoder will see


def sizes_of(envs) -> tuple[int, int]:
    """O and A."""
    return envs.single_observation_space.shape[0], int(envs.single_action_space.n)


def trace_size(envs) -> int:
    """I: of state, action and reward where actions are choices; in regression of x and the right answer y."""
    return sum(sizes_of(envs)) + envs.unwrapped.is_discrete


def on_device(params: Params, envs) -> Params:
    return {name: x.to(envs.unwrapped.device) for name, x in params.items()}


def init_layers(count: int, sizes: tuple[int, ...], generator: Generator) -> Params:
    """`count` networks with layers of these sizes, weights and biases uniform in +-1 / sqrt(inputs)."""
    params = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        for name, rows in ((f"w{i}", n), (f"b{i}", 1)):
            params[name] = (2 * torch.rand(count, rows, m, generator=generator) - 1) / math.sqrt(n)
    return params


def init_actors(envs, args: Args, generator: Generator) -> Params:
    """theta: N newborn actors."""
    obs_size, action_size = sizes_of(envs)
    sizes = obs_size, args.hidden_size, args.hidden_size, action_size
    return on_device(init_layers(args.meta_batch_size, sizes, generator), envs)


def init_critics(envs, count: int, latent_size: int, args: Args, generator: Generator) -> Params:
    """phi of `count` critics and, unless z has no dimensions, omega of an encoder."""
    obs_size, action_size = sizes_of(envs)
    H = args.hidden_size
    inputs = obs_size + action_size + latent_size
    phi = init_layers(count, (inputs, args.critic_size, args.critic_size, 1), generator)
    shapes = {"w_x": (4 * H, trace_size(envs)), "w_h": (4 * H, H), "b_x": (4 * H,), "b_h": (4 * H,)}
    shapes |= {"w_z": (H, latent_size), "b_z": (latent_size,)}
    uniform = {name: 2 * torch.rand(shape, generator=generator) - 1 for name, shape in shapes.items()}
    omega = {name: x / math.sqrt(H) for name, x in uniform.items()}
    return on_device(phi | omega if latent_size else phi, envs)


def init_learners(envs, phi: Params, args: Args, generator: Generator) -> dict:
    """What an update changes: newborn actors and their critics phi, before their first window."""
    theta = init_actors(envs, args, generator)
    trace_NTI = torch.zeros(args.meta_batch_size, args.window_size, trace_size(envs))
    return {
        "theta": theta,
        "phi": phi,  # one meta-critic with its encoder, or N critics of the actors' own
        "theta_adam": fresh_moments(theta),
        "phi_adam": fresh_moments(phi),
        "trace": trace_NTI.to(envs.unwrapped.device),  # of the window before
    }


def forward(params: Params, x: Tensor) -> Tensor:
    """Outputs [N, B, outputs] of N networks, or of one network, for inputs x [N, B, inputs]."""
    hidden = torch.relu(x @ params["w0"] + params["b0"])
    hidden = torch.relu(hidden @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def encode(phi: Params, trace_NTI: Tensor) -> Tensor:
    """z [N, Z], from the LSTM's last features of each trace."""
    if "w_x" not in phi:  # no encoder: Z is 0
        return trace_NTI.new_zeros(len(trace_NTI), 0)
    zero_1NH = trace_NTI.new_zeros(1, len(trace_NTI), len(phi["w_z"]))  # torch's first axis is that of layers
    weights = [phi[name] for name in ("w_x", "w_h", "b_x", "b_h")]
    options = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "bidirectional": False}
    options |= {"batch_first": True, "train": True}  # train: without it, cuDNN has no gradient
    feature_NTH, _, _ = torch.lstm(trace_NTI, [zero_1NH, zero_1NH], weights, **options)
    return feature_NTH[:, -1] @ phi["w_z"] + phi["b_z"]


def critic(phi: Params, obs_NTO: Tensor, action_NTCA: Tensor, z_NZ: Tensor) -> Tensor:
    """Q(s, a, z) [N, T, C] of C actions in each step."""
    N, T, C, _ = action_NTCA.shape
    obs_NTCO = obs_NTO[:, :, None].expand(-1, -1, C, -1)
    z_NTCZ = z_NZ[:, None, None].expand(-1, T, C, -1)
    inputs = torch.cat([obs_NTCO, action_NTCA, z_NTCZ], -1)
    return forward(phi, inputs.flatten(1, 2)).view(N, T, C)


def gumbel_noise(*size: int, generator: Generator) -> Tensor:
    """Noise g = -log(x), x exponential: argmax(logits + g) is a draw from softmax(logits).

    For it is the argmin of x / exp(logit). These are exponential waiting times with rates exp(logit), each of
    which is the shortest with a probability in proportion to its rate.
    """
    return -(-torch.rand(*size, generator=generator).log()).log()


@torch.no_grad()
def play_window(envs, obs_BO, theta: Params, steps: int, generator: Generator, *, greedy=False) -> tuple:
    """Play some steps of B worlds: the next observation, the Window, and where a new lifetime began [B].

    The actors have equally many worlds each: the first B / N are the first actor's, and so on. `greedy`: they
    take their likeliest choices.
    """
    is_choice = envs.unwrapped.is_discrete
    born_B = torch.zeros_like(obs_BO[:, 0], dtype=torch.bool)
    records = []
    for _ in range(steps):
        obs_of_actors = obs_BO.unflatten(0, (len(theta["w0"]), -1))
        output_BA = forward(theta, obs_of_actors).flatten(0, 1)
        if is_choice:
            noise_BA = gumbel_noise(*output_BA.shape, generator=generator).to(obs_BO)
            action = (output_BA if greedy else output_BA + noise_BA).argmax(1)
            shown_BA = functional.one_hot(action, output_BA.shape[1]).to(obs_BO)
        else:
            action = output_BA
            shown_BA = output_BA
        next_BO, reward_B, ended_B, late_B, info = envs.step(action)  # [1]
        # In regression no error of the actor: z would tell how bad it is, not which curve it should learn.
        seen = (shown_BA, reward_B[:, None]) if is_choice else (info["answer"],)
        step = {
            "obs": obs_BO,
            "action": shown_BA,
            "reward": reward_B,
            "next_obs": info["final_obs"],
            "ended": ended_B,
            "over": ended_B | late_B,
            "mask": ~born_B,
            "trace": torch.cat([obs_BO, *seen], 1),
        }
        records.append({name: x.to(obs_BO) for name, x in step.items()})
        obs_BO = next_BO
        born_B = born_B | info["born"]
    window = Window(**{name: torch.stack([step[name] for step in records], 1) for name in records[0]})
    return obs_BO, window, born_B


def state_values(theta: Params, phi: Params, obs_NTO: Tensor, z_NZ: Tensor, *, is_choice: bool) -> Tensor:
    """V(s, z) [N, T] of each world's actor."""
    output_NTA = forward(theta, obs_NTO)
    if not is_choice:
        return critic(phi, obs_NTO, output_NTA[:, :, None], z_NZ).squeeze(-1)
    action_NTCA = torch.eye(output_NTA.shape[-1]).to(obs_NTO).expand(*output_NTA.shape, -1)  # all choices
    return (output_NTA.softmax(-1) * critic(phi, obs_NTO, action_NTCA, z_NZ)).sum(-1)  # [3]


def actor_loss(theta: Params, phi: Params, window: Window, z_NZ: Tensor, *, is_choice: bool) -> Tensor:
    """-V, summed over a window's steps, by T. Summed over the actors: each gets the gradient of its own."""
    value_NT = state_values(theta, phi, window.obs, z_NZ, is_choice=is_choice)
    return -(value_NT * window.mask).mean(1).sum()


def critic_targets(next_value_NT: Tensor, window: Window, args: Args) -> Tensor:
    """y [N, T], from V of the observations that the steps led to."""
    target_N = next_value_NT[:, -1]  # so that lambda has no effect in the last step
    targets = []
    for t in reversed(range(next_value_NT.shape[1])):
        next_value_N = next_value_NT[:, t]
        lambda_N = args.td_lambda * (1 - window.over[:, t])
        further_N = next_value_N + lambda_N * (target_N - next_value_N)
        target_N = window.reward[:, t] + args.gamma * (1 - window.ended[:, t]) * further_N  # [5]
        targets.append(target_N)
    return torch.stack(list(reversed(targets)), 1)


def critic_loss(phi: Params, window: Window, trace_NTI: Tensor, target_NT: Tensor) -> Tensor:
    """Mean squared error; of N critics N times the mean, so that each gets the gradient of its own mean."""
    z_NZ = encode(phi, trace_NTI)  # here with a gradient: the encoder learns from this loss alone
    Q_NT1 = critic(phi, window.obs, window.action[:, :, None], z_NZ)
    error_NT = (Q_NT1.squeeze(-1) - target_NT).square() * window.mask
    return error_NT.mean() * len(phi["w0"])


def per_network(x: Tensor, weights: Tensor) -> Tensor:
    """x [N], a number of each network, in the shape [N, 1, ..] that meets these weights [N, ..]."""
    return x.view(-1, *[1] * (weights.ndim - 1))


def fresh_moments(params: Params) -> Params:
    """What Adam remembers of networks before their first step: zeros."""
    moments = {"steps": params["w0"].new_zeros(len(params["w0"]))}
    for name, x in params.items():
        moments |= {f"mean {name}": torch.zeros_like(x), f"square {name}": torch.zeros_like(x)}
    return moments


def adam(params: Params, gradient: Params, moments: Params, lr: float) -> tuple[Params, Params]:
    """A step of Adam (1412.6980, Algorithm 1) down the gradient g: parameters and moments after it.

    torch's own counts the steps of a whole tensor. Here a tensor holds N networks, born at different times,
    and each has its own count k. With running means m of g and v of g^2, corrected for starting at 0:
        params <- params - lr m / (1 - 0.9^k) / (sqrt(v / (1 - 0.999^k)) + 1e-8)
    """
    steps = moments["steps"] + 1
    new_params = {}
    new_moments = {"steps": steps}
    for name, g in gradient.items():
        k = per_network(steps, g)
        mean = moments[f"mean {name}"].lerp(g, 0.1)  # 0.9 mean + 0.1 g
        square = moments[f"square {name}"].lerp(g.square(), 0.001)
        root = (square / (1 - 0.999**k)).sqrt() + 1e-8
        new_params[name] = params[name] - lr * mean / (1 - 0.9**k) / root
        new_moments |= {f"mean {name}": mean, f"square {name}": square}
    return new_params, new_moments


def shortened(gradient: Params, max_norm: float) -> Params:
    """Gradients of networks, each shortened to this norm, an encoder's with its critic's; 0: as it is."""
    if not max_norm:
        return gradient
    square_N = sum(g.square().reshape(len(gradient["w0"]), -1).sum(1) for g in gradient.values())
    scale_N = (max_norm / (square_N.sqrt() + 1e-6)).clamp_max(1)
    return {name: g * per_network(scale_N, g) for name, g in gradient.items()}


def recent(trace_NTI: Tensor, args: Args, generator: Generator) -> Tensor:
    """The last steps of a trace, a number drawn, so that the encoder learns to read short ones, too."""
    if not args.least_trace:
        return trace_NTI
    steps = int(torch.randint(args.least_trace, args.window_size + 1, (1,), generator=generator))
    return trace_NTI[:, -steps:]


def teach(state, window: Window, args: Args, *, actor_lr: float, critic_lr: float, is_choice: bool) -> float:
    """Update the actors in `state` and, unless critic_lr is 0, the critics; returns the critics' loss."""
    theta = state["theta"]
    phi = state["phi"]
    z_NZ = encode(phi, state["trace"])  # [2]
    gradient = shortened(grad(actor_loss)(theta, phi, window, z_NZ, is_choice=is_choice), args.max_norm)
    state["theta"], state["theta_adam"] = adam(theta, gradient, state["theta_adam"], actor_lr)  # [4]
    loss = torch.zeros(())
    if critic_lr:  # V is that of the actors that played: of theta, not of the new state["theta"]
        next_value_NT = state_values(theta, phi, window.next_obs, z_NZ, is_choice=is_choice)
        target_NT = critic_targets(next_value_NT, window, args)
        # Not by torch.func.grad, under which torch.lstm has no fast kernel: 4 times the time.
        leaves = {name: x.detach().requires_grad_() for name, x in phi.items()}
        loss = critic_loss(leaves, window, state["trace"], target_NT)
        gradient = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        gradient = shortened(gradient, args.max_norm)
        state["phi"], state["phi_adam"] = adam(phi, gradient, state["phi_adam"], critic_lr)  # [6]
    state["trace"] = window.trace
    return float(loss.detach())


def replace_actors(state: dict, born_N: Tensor, fresh: Params) -> None:
    """Where a lifetime has begun, with a new task from envs.Lifetimes: an actor without a past in `state`."""
    theta = state["theta"]
    state["theta"] = {name: torch.where(per_network(born_N, x), fresh[name], x) for name, x in theta.items()}
    moments = state["theta_adam"]
    state["theta_adam"] = {name: x.masked_fill(per_network(born_N, x), 0) for name, x in moments.items()}
    state["trace"] = state["trace"].masked_fill(per_network(born_N, state["trace"]), 0)


def examine(exam_envs, tasks_NP: Tensor, theta: Params, args: Args, generator: Generator) -> Tensor:
    """Mean return [N] of E new episodes of each actor, in worlds whose lifetimes are one episode."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    options = {"tasks": tasks_NP.repeat_interleave(args.eval_episodes, 0)}
    obs_BO, _ = exam_envs.reset(seed=seed, options=options)
    _, window, _ = play_window(exam_envs, obs_BO, theta, args.horizon, generator, greedy=args.eval_greedy)
    return (window.reward * window.mask).sum(1).view(len(tasks_NP), -1).mean(1)


def meta_test(envs, exam_envs, args: Args, phi: Params | None) -> tuple[list[Tensor], list[Tensor]]:
    """Newborn actors learn the test tasks: by the meta-critic phi, or (None) each by a critic of its own.

    Before and after each of K units of learning: the actors' returns, and the episodes that they have played
    to learn, K + 1 times [N] each. Tasks, actors and noise are the same in every call.
    """
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": tasks_NP})
    # Own critics are drawn in either case: so the actors, which are drawn after them, are the same.
    own_phi = init_critics(envs, count=len(tasks_NP), latent_size=0, args=args, generator=generator)
    if phi is None:
        phi = own_phi
        rates = {"actor_lr": args.own_actor_lr, "critic_lr": args.own_critic_lr}
    else:
        rates = {"actor_lr": args.actor_lr, "critic_lr": 0.0}
    state = init_learners(envs, phi, args, generator)
    episodes_N = torch.zeros_like(obs_NO[:, 0])
    returns = []
    episodes = []
    for k in range(args.eval_steps + 1):
        for _ in range(args.eval_windows if k else 0):  # before the first return, nothing is learned
            obs_NO, window, _ = play_window(envs, obs_NO, state["theta"], args.window_size, generator)
            teach(state, window, args, is_choice=envs.unwrapped.is_discrete, **rates)  # [8]
            episodes_N = episodes_N + window.over.sum(1)
        returns.append(examine(exam_envs, tasks_NP, state["theta"], args, generator))
        episodes.append(episodes_N)
    return returns, episodes


def evaluate(envs, exam_envs, args: Args, phi: Params | None, name: str) -> dict:
    """What newborn actors achieve on the test tasks, and in how many episodes, as metrics [N]."""
    tasks_NP, _ = envs.unwrapped.test_set(args.meta_batch_size)
    returns, episodes = meta_test(envs, exam_envs, args, phi)
    stats = {f"{name}/return_k{k}": return_N for k, return_N in enumerate(returns)}
    stats[f"{name}/gain_ci95"] = returns[-1] - returns[0], tasks_NP  # logged: a 95 % interval over tasks
    stats[f"{name}/episodes"] = episodes[-1]
    return stats


def train(envs, test_envs, exam_envs, args: Args, run, state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    for name in ("theta", "phi", "theta_adam", "phi_adam"):
        state[name] = on_device(state[name], envs)
    state["trace"] = state["trace"].to(envs.unwrapped.device)
    generator = Generator()
    generator.set_state(state["generator"])
    rates = {"actor_lr": args.actor_lr, "critic_lr": args.critic_lr}
    obs_NO = envs.load_worlds(state["worlds"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        obs_NO, window, born_N = play_window(envs, obs_NO, state["theta"], args.window_size, generator)
        state["trace"] = recent(state["trace"], args, generator)
        loss = teach(state, window, args, is_choice=envs.unwrapped.is_discrete, **rates)
        replace_actors(state, born_N, fresh=init_actors(envs, args, generator))  # [7]
        state["env_steps"] += window.mask.numel()
        state.update(generator=generator.get_state(), worlds=envs.save_worlds())
        episodes = window.over.sum().clamp_min(1)
        stats = {"train/loss": loss, "train/return_post": window.reward.sum() / episodes}
        if iteration == 1:  # training does not change them
            run.doing("evaluating actors with critics of their own")
            stats |= evaluate(test_envs, exam_envs, args, phi=None, name="own")
        run.end_iteration(
            state, stats, evaluate=lambda: evaluate(test_envs, exam_envs, args, state["phi"], name="test")
        )


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import Lifetimes, make, records

    algorithm = Path(__file__).stem
    fixed = "meta_batch_size", "lifetime"  # worlds of a resumed run go on in their midst
    args, saved = records.parse(Args, argv, __doc__, algorithm, fixed)
    N = args.meta_batch_size
    options = {"horizon": args.horizon, "cuda": args.cuda, "discrete": True, "singly": True}
    envs = Lifetimes(make(args.env_id, N, **options), args.lifetime)
    # Newborn actors of an evaluation learn in test_envs, without end, and are examined in exam_envs.
    test_envs = Lifetimes(make(args.env_id, N, **options), episodes=10**9)
    exam_envs = Lifetimes(make(args.env_id, N * args.eval_episodes, **options), episodes=1)
    if not envs.unwrapped.is_discrete:
        raise records.refusal(f"--env-id {args.env_id}: its actions are continuous, not choices")
    generator = Generator().manual_seed(args.seed)
    phi = init_critics(envs, count=1, latent_size=args.latent_size, args=args, generator=generator)
    made = init_learners(envs, phi, args, generator)
    tasks_NP = envs.unwrapped.sample_tasks(N, generator, "train")
    births_N = torch.arange(N) * args.lifetime // N  # the first lifetimes begin in different episodes
    envs.reset(seed=args.seed, options={"tasks": tasks_NP, "episode": births_N})
    fresh = made | {"worlds": envs.save_worlds(), "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device, evaluates=("phi",))
    unit = f"times {args.eval_windows} windows"

    def examine() -> dict:
        return evaluate(test_envs, exam_envs, args, state["phi"], name="test")

    with records.open_run(args, state, envs, unit=unit, evaluate=examine) as run:
        if not args.evaluate:
            train(envs, test_envs, exam_envs, args, run, state)


if __name__ == "__main__":
    main()
