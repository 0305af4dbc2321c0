"""VariBAD: PPO that is told a belief about the hidden task, which a variational auto-encoder infers.

Paper: Zintgraf et al. 2020, arXiv:1910.08348. PPO: 1707.06347, GAE: 1506.02438.
Run: python algos/varibad_ppo.py                     (--help explains every flag; --cuda: on the GPU)
Result: GridNavi, episodes 1 to 4: 3.98, 9.94, 11.01, 10.77, three seeds; Bayes-optimal: 4.00, then 11.07 each
Algorithm:
    [1] repeat: draw N tasks, and play a trial of each: E episodes in a row, each of up to T steps
    [2]     the encoder, a GRU whose memory is empty at first, reads x_0 = (o_0; 0, 0), and after each step
            x_(t+1) = (o_(t+1); a_t, r_(t+1)), through the ends of episodes
    [3]     after x_0 .. x_t it gives the belief q(m|tau_:t) = N(mu_t, sigma_t^2) about the task's latent m
    [4]     the policy pi(a | o_t, mu_t, log sigma_t^2) acts; V: the value of what follows, A by GAE
    [5]     keep the trials in a buffer of past ones
    [6]     PPO, some epochs over minibatches of trials: L = mean[c_V (V - target)^2
            - min(rho A, clip(rho, 1 - c, 1 + c) A) - c_H entropy], rho = pi / pi_old; beliefs are mere
            numbers there, so that no gradient reaches the encoder
    [7]     some updates of encoder and decoder: draw trials from the buffer, for each t one m ~ q(m|tau_:t)
    [8]         ELBO_t = sum over all steps i of the trial, past and future, of log p(r_(i+1) | o_(i+1), m)
                - w KL(q(m|tau_:t) || q(m|tau_:t-1)), where q(m|tau_:-1) = N(0, 1)
    [9]         phi <- one step of Adam that raises the mean of ELBO_t
    [10]    now and then: returns of episodes 1, 2, .. E of trials with the test tasks; nothing is updated
Symbols: phi = encoder and decoder (the paper's phi and theta), theta = policy and V (the paper's psi), m =
    latent, w, c, c_V, c_H = kl_weight, clip, value_coef, entropy_coef; o_(t+1): before any restart.
Shapes: a suffix names a tensor's axes (x_NKI): N tasks, or trials from the buffer, S steps, K = S + 1
    beliefs, D of them decoded, O observation, A actions, I = O + A + 1 inputs of the encoder, H features, Z
    latent, F inputs of the policy or a decoder, E episodes, P task vector, U updates, B trials of an update.
Differs from the paper: policy and V share a layer; the encoder has no layers before the GRU; rewards scaled,
    advantages normalised; learning rates and the entropy bonus fall to 0. From its code: the first belief
    has read o_0; the policy's inputs are not normalised. All worlds begin an episode together (rl2_ppo.py).
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
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn import functional

Params = dict[str, Tensor]


@dataclass
class Args:
    env_id: str = "GridNavi-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, start states, noise"""
    iterations: int = 3000
    """of collecting, then updates of policy and belief"""
    meta_batch_size: int = 64
    """tasks per iteration and per evaluation, a trial of each (N); 16 in the authors' code"""
    episodes_per_trial: int = 4
    """episodes of a trial (E); 4 in the paper for GridNavi, 2 in the authors' code for cheetahs"""
    horizon: int | None = None
    """steps of an episode (T); default: the family's own, which `records.parse` fills in"""
    action_scale: float = 1.0
    """worlds divide continuous actions by it, then clip them to their bounds"""
    reward_decoder: Literal["cells", "gaussian"] | None = None
    """cells: does each cell pay (r > 0)? gaussian: r of o', a, m; default: cells for GridNavi and DarkRoom"""
    decode_obs: bool = False
    """the decoder also tells next observations, normal with variance 1; for tasks whose dynamics differ"""
    hidden_size: int = 64
    """units of the encoder's GRU; the authors' code: 64, for cheetahs 128"""
    latent_size: int = 5
    """dimensions of m (Z); 5 in the authors' code"""
    decoder_size: int = 32
    """units of each of the decoder's two ReLU layers; the authors' code: 32, for cheetahs 64 and 32"""
    policy_size: int = 64
    """units of the policy's tanh layer; the authors' code: 32, for cheetahs two of 128"""
    buffer_size: int = 4000
    """past trials that the belief learns from (R); the authors' code: 100,000, for cheetahs 10,000"""
    vae_updates: int = 10
    """updates of encoder and decoder in an iteration (U); the authors' code: 3, for cheetahs 1"""
    vae_batch_size: int = 25
    """trials of such an update; the authors' code: 25, for cheetahs 10"""
    decoded_beliefs: int | None = None
    """beliefs of a trial in such an update, drawn anew each time; default: all; the code: cheetahs 50"""
    kl_weight: float = 0.1
    """weight of the KL between successive beliefs (w); the authors' code: 1, for cheetahs 0.1"""
    vae_lr: float = 2e-3
    """Adam's step size for encoder and decoder at the start; falls linearly to 0; the authors' code: 1e-3"""
    lr: float = 2e-3
    """Adam's step size for the policy at the start; falls linearly to 0; 7e-4 in the authors' code"""
    epochs: int = 3
    """passes over the trials of an iteration; 2 in the authors' code"""
    minibatches: int = 8
    """parts, of whole trials, of a pass; one step of Adam on each; 4 in the authors' code"""
    clip: float = 0.2
    """how far a probability ratio may profit (c); the authors' code: 0.05, for cheetahs 0.1"""
    gamma: float = 0.95
    """discount, through the episodes' ends; the authors' code: 0.95, for cheetahs 0.97"""
    gae_lambda: float = 0.95
    """lambda of GAE; the authors' code: 0.95, for cheetahs 0.9"""
    value_coef: float = 0.5
    """weight of the value's squared error (c_V); 0.5 in the authors' code"""
    entropy_coef: float = 0.04
    """weight of the entropy at the start (c_H); falls linearly to 0; the authors' code: 0.1, cheetahs 0.01"""
    max_grad_norm: float = 0.5
    """the policy's gradient is shortened to this norm; 0.5 in the authors' code"""
    eval_every: int = 20
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """networks, buffer and trials on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        if self.reward_decoder is None:
            self.reward_decoder = "cells" if self.env_id.startswith(("Grid", "Dark")) else "gaussian"
        N = self.meta_batch_size
        ranges = {"seed": (0, 2**31), "minibatches": (1, N), "buffer_size": (N, 10**9)}
        ranges |= dict.fromkeys(("gamma", "gae_lambda", "clip"), (0, 1))
        ranges |= dict.fromkeys(("value_coef", "entropy_coef", "kl_weight"), (0, 1e6))
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str | None) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


class Seen(NamedTuple):
    """What N trials have shown, S steps each: all that beliefs are learned from."""

    obs: Tensor  # [N, S, O] before the step
    x: Tensor  # [N, S, I] after the step: the observation that it led to, its action, its reward
    mask: Tensor  # [N, S] 1 for the trial's steps; a shorter trial is filled up with steps of mask 0


class Choices(NamedTuple):
    """What the policy has done in N trials, S steps each: all that it learns from."""

    told: Tensor  # [N, S, F] obs and belief, mean and log variance: as they were when the policy acted
    action: Tensor  # [N, S] numbers of choices, or [N, S, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, S] log pi(a|told) when it was drawn
    mask: Tensor  # [N, S] 1 for the trial's steps
    advantage: Tensor  # [N, S] mean 0 and standard deviation 1 over the steps of all trials
    target: Tensor  # [N, S] what V should have been


def dense(rows: int, columns: int, generator: Generator, scale: float = 1.0) -> Tensor:
    """A weight [rows, columns] of normal numbers with standard deviation scale / sqrt(columns)."""
    return scale / math.sqrt(columns) * torch.randn(rows, columns, generator=generator)


def init_learner(envs, args: Args, generator: Generator) -> dict:
    """phi, whose first beliefs are near N(0, 1), theta, near uniform choices or means near 0, a buffer."""
    space, (obs_size,) = envs.single_action_space, envs.single_observation_space.shape
    A = space.shape[0] if space.shape else int(space.n)
    x_size = obs_size + A + 1
    Z, H, layers = args.latent_size, args.hidden_size, [args.decoder_size] * 2
    phi = {}
    for name, columns in (("x", x_size), ("h", H)):
        gates = [torch.nn.init.orthogonal_(torch.empty(H, columns), generator=generator) for _ in range(3)]
        phi |= {f"w_{name}": torch.cat(gates), f"b_{name}": torch.zeros(3 * H)}
    phi |= {"w_belief": dense(2 * Z, H, generator, scale=0.1), "b_belief": torch.zeros(2 * Z)}
    by_cell, by_step = [Z, *layers, obs_size], [Z + obs_size + A, *layers, 1]
    sizes = {"reward": by_cell if args.reward_decoder == "cells" else by_step}
    sizes |= {"obs": [*by_step[:-1], obs_size]} if args.decode_obs else {}
    for part, widths in sizes.items():
        for i, (n, m) in enumerate(pairwise(widths)):
            phi |= {f"{part}_w{i}": dense(m, n, generator), f"{part}_b{i}": torch.zeros(m)}
    F, H = obs_size + 2 * Z, args.policy_size
    theta = {}
    for name, rows, columns, scale in (("hidden", H, F, 1.0), ("policy", A, H, 0.01), ("value", 1, H, 1.0)):
        theta |= {f"w_{name}": dense(rows, columns, generator, scale), f"b_{name}": torch.zeros(rows)}
    theta |= {"log_std": torch.zeros(A)} if space.shape else {}
    size = args.buffer_size, args.episodes_per_trial * args.horizon
    buffer = {"obs": torch.zeros(*size, obs_size), "x": torch.zeros(*size, x_size), "mask": torch.zeros(size)}
    return {"phi": phi, "theta": theta, "buffer": buffer, "stored": 0}  # trials that were ever stored


def beliefs(phi: Params, x_NSI: Tensor, h_1NH: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q(m|tau_:t) as mu_t and log sigma_t^2 [N, S, Z] for S more inputs of each trial, and its memory then.

    Acting is S = 1, with the memory of the step before; a trial begins, and is replayed, with None.
    """
    if h_1NH is None:
        h_1NH = x_NSI.new_zeros(1, len(x_NSI), phi["w_h"].shape[1])  # torch's first axis is that of layers
    options = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "batch_first": True}
    options |= {"bidirectional": False, "train": True}  # train: without it, cuDNN has no gradient
    weights = [phi[name] for name in ("w_x", "w_h", "b_x", "b_h")]
    feature_NSH, h_1NH = torch.gru(x_NSI, h_1NH, weights, **options)
    output = functional.linear(feature_NSH, phi["w_belief"], phi["b_belief"])
    return *output.chunk(2, -1), h_1NH  # [3]


def decode(phi: Params, part: str, x: Tensor, step_NSF: Tensor | None = None) -> Tensor:
    """A decoder's outputs for latents x [.., Z], or [N, D, S, ..] for each of x [N, D, Z] with each step."""
    if step_NSF is not None:
        size = *x.shape[:2], step_NSF.shape[1], -1
        x = torch.cat([x[:, :, None].expand(size), step_NSF[:, None].expand(size)], -1)
    for i in range(3):
        x = functional.linear(x.relu() if i > 0 else x, phi[f"{part}_w{i}"], phi[f"{part}_b{i}"])
    return x


def log_prob_of_steps(phi: Params, m_NDZ: Tensor, seen: Seen, args: Args) -> Tensor:
    """log p(r | o', m) [N, D, S] of a trial's steps by each latent, plus a constant; --decode-obs: and o'."""
    O = seen.obs.shape[-1]  # noqa: E741
    reward_N1S = seen.x[:, None, :, -1]
    if args.reward_decoder == "cells":
        # An output for each cell; the product picks that of the cell that the step led to, which is one-hot.
        logit_NDS = decode(phi, "reward", m_NDZ) @ seen.x[..., :O].mT
        log_prob_NDS = (reward_N1S > 0) * logit_NDS - functional.softplus(logit_NDS)  # Bernoulli
    else:
        mean_NDS = decode(phi, "reward", m_NDZ, seen.x[..., :-1]).squeeze(-1)
        log_prob_NDS = -0.5 * (reward_N1S - mean_NDS).square()  # normal
    if args.decode_obs:
        change_NDSO = decode(phi, "obs", m_NDZ, torch.cat([seen.obs, seen.x[..., O:-1]], -1))
        error_NDSO = (seen.x[..., :O] - seen.obs)[:, None] - change_NDSO
        log_prob_NDS = log_prob_NDS - 0.5 * error_NDSO.square().sum(-1)
    return log_prob_NDS


def successive_kl(mean_NKZ: Tensor, log_variance_NKZ: Tensor) -> Tensor:
    """KL(q_t || q_(t-1)) [N, K] of a trial's beliefs; the one before the first is N(0, 1)."""
    shift_NKZ = mean_NKZ - functional.pad(mean_NKZ[:, :-1], (0, 0, 1, 0))
    before_NKZ = functional.pad(log_variance_NKZ[:, :-1], (0, 0, 1, 0))
    change_NKZ = log_variance_NKZ - before_NKZ
    return 0.5 * (change_NKZ.exp() + shift_NKZ.square() / before_NKZ.exp() - 1 - change_NKZ).sum(-1)


def elbo(phi: Params, seen: Seen, index_D: Tensor, noise_NDZ: Tensor, args: Args) -> tuple[Tensor, dict]:
    """The mean of ELBO_t over trials and those of their beliefs that index_D numbers, and its parts."""
    first_N1I = functional.pad(seen.obs[:, :1], (0, seen.x.shape[-1] - seen.obs.shape[-1]))
    x_NKI = torch.cat([first_N1I, seen.x], 1)
    mean_NKZ, log_variance_NKZ, _ = beliefs(phi, x_NKI)
    kl_ND = successive_kl(mean_NKZ, log_variance_NKZ)[:, index_D]
    std_NDZ = (0.5 * log_variance_NKZ[:, index_D]).exp()
    m_NDZ = mean_NKZ[:, index_D] + std_NDZ * noise_NDZ
    log_prob_NDS = log_prob_of_steps(phi, m_NDZ, seen, args)
    likelihood_ND = (log_prob_NDS * seen.mask[:, None]).sum(2)  # of the whole trial, past and future
    belongs_ND = functional.pad(seen.mask, (1, 0), value=1.0)[:, index_D]  # one belief more than steps
    terms = {"log_likelihood": likelihood_ND, "belief_kl": kl_ND}
    parts = {name: (x_ND * belongs_ND).sum() / belongs_ND.sum() for name, x_ND in terms.items()}
    return parts["log_likelihood"] - args.kl_weight * parts["belief_kl"], parts  # [8]


def learn_beliefs(phi: Params, optimizer, state: dict, args: Args, remaining: float, generator) -> dict:
    """Updates of encoder and decoder on trials from the buffer, phi in place; the last one's statistics."""
    # Falls as the policy's does, which could not follow beliefs that go on to change what they mean.
    optimizer.param_groups[0]["lr"] = remaining * args.vae_lr
    buffer = state["buffer"]
    R, S = buffer["mask"].shape
    U, B, Z = args.vae_updates, args.vae_batch_size, args.latent_size
    D = min(args.decoded_beliefs or S + 1, S + 1)
    rows_UB = torch.randint(min(state["stored"], R), (U, B), generator=generator)
    index_UD = torch.stack([torch.randperm(S + 1, generator=generator)[:D] for _ in range(U)])
    noise_UBDZ = torch.randn(U, B, D, Z, generator=generator)
    numbers = (x.to(buffer["mask"].device) for x in (rows_UB, index_UD, noise_UBDZ))
    for rows_B, index_D, noise_BDZ in zip(*numbers, strict=True):
        seen = Seen(**{name: x[rows_B] for name, x in buffer.items()})  # [7]
        weights = {name: value.detach().requires_grad_() for name, value in phi.items()}
        bound, parts = elbo(weights, seen, index_D, noise_BDZ, args)
        gradients = torch.autograd.grad(-bound, list(weights.values()))
        for value, gradient in zip(phi.values(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()  # [9]
    return {f"train/{name}": x.detach() for name, x in (parts | {"elbo": bound}).items()}


def policy_and_value(theta: Params, told: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's outputs [.., A], logits of choices or means, and V [..], told obs and belief [.., F]."""
    hidden = functional.linear(told, theta["w_hidden"], theta["b_hidden"]).tanh()
    value = functional.linear(hidden, theta["w_value"], theta["b_value"]).squeeze(-1)
    return functional.linear(hidden, theta["w_policy"], theta["b_policy"]), value


def normal(mean: Tensor, std: Tensor) -> Normal:
    """Gaussian actions; without torch's checks of its arguments, which would wait for the GPU each time."""
    return Normal(mean, std, validate_args=False)


def distribution(theta: Params, output_NSA: Tensor) -> Distribution:
    """Of one of A choices, or Gaussian in A dimensions where theta has a standard deviation."""
    if "log_std" not in theta:
        return Categorical(logits=output_NSA, validate_args=False)
    return Independent(normal(output_NSA, theta["log_std"].exp()), 1, validate_args=False)  # sums over A


def gumbel_noise(*size: int, generator: Generator) -> Tensor:
    """Noise g = -log(x), x exponential: argmax(logits + g) is a draw from softmax(logits).

    For it is the argmin of x / exp(logit). These are exponential waiting times with rates exp(logit), each of
    which is the shortest with a probability in proportion to its rate.
    """
    return -(-torch.rand(*size, generator=generator).log()).log()


@torch.no_grad()
def play_with_beliefs(envs, tasks_NP: Tensor, phi, theta, args: Args, generator: Generator) -> tuple:
    """A trial of each task, all at once: what it shows, what the policy chooses, episodes' returns [N, E].

    A world whose episode ends early waits (info["waits"], reward 0); `envs` (Trials) restarts all at once."""
    is_choice = "log_std" not in theta
    std_A = None if is_choice else theta["log_std"].exp()
    seed = int(torch.randint(2**31, (1,), generator=generator))
    N, A = len(tasks_NP), len(theta["b_policy"])
    draw = gumbel_noise if is_choice else torch.randn
    # All noise at once and from this generator, so that a seed means the same actions on every device.
    noise_SNA = draw(envs.episodes * args.horizon, N, A, generator=generator).to(tasks_NP)
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": tasks_NP})
    x_NI = functional.pad(obs_NO, (0, A + 1))  # [2]
    h_1NH = None
    playing_N = obs_NO.new_ones(N)  # 0: its episode has ended; it waits for the others, without any effect
    return_NE = obs_NO.new_zeros(N, envs.episodes)
    steps = []
    with envs.unwrapped.one_thread():  # more threads would only take the cores from the physics
        for noise_NA in noise_SNA:
            mean_N1Z, log_variance_N1Z, new_1NH = beliefs(phi, x_NI[:, None], h_1NH)
            # A world that waits keeps its memory: its last x is read once, when it plays again.
            h_1NH = new_1NH if h_1NH is None else torch.where(playing_N[:, None] > 0, new_1NH, h_1NH)
            told_NF = torch.cat([obs_NO, mean_N1Z.squeeze(1), log_variance_N1Z.squeeze(1)], 1)
            output_NA, value_N = policy_and_value(theta, told_NF)
            action = (output_NA + noise_NA).argmax(1) if is_choice else output_NA + std_A * noise_NA  # [4]
            # Where an episode ends, next_NO is the next one's first observation, final_obs its own last one.
            next_NO, reward_N, _, _, info = envs.step(action)
            return_NE[:, info["episode"]] += reward_N  # 0 from worlds that wait
            action_NA = functional.one_hot(action, A).to(obs_NO) if is_choice else action
            latest_NI = torch.cat([info["final_obs"], action_NA, reward_N[:, None]], 1)
            step = {"obs": obs_NO, "x": latest_NI, "reward": reward_N, "mask": playing_N}
            steps.append(step | {"told": told_NF, "action": action, "output": output_NA, "value": value_N})
            x_NI = torch.where(playing_N[:, None] > 0, latest_NI, x_NI)
            playing_N = 1 - info["waits"].to(obs_NO)
            obs_NO = next_NO
            if envs.is_over:
                break
    played = without_waiting({name: torch.stack([step[name] for step in steps], 1) for name in steps[0]})
    played["log_prob"] = distribution(theta, played["output"]).log_prob(played["action"])
    played["advantage"], played["target"] = advantages(played, args)
    seen, choices = (kind(**{name: played[name] for name in kind._fields}) for kind in (Seen, Choices))
    return seen, choices, return_NE


def without_waiting(played: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move each trial's own steps (mask 1) to its front, in their order; cut to the longest trial."""
    mask_NS = played["mask"]
    order_NS = mask_NS.argsort(dim=1, descending=True, stable=True)[:, : int(mask_NS.sum(1).max())]
    worlds_N1 = torch.arange(len(mask_NS), device=mask_NS.device)[:, None]
    return {name: x[worlds_N1, order_NS] for name, x in played.items()}


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


def advantages(played: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor]:
    """Advantages [N, S], normalised over the steps of all trials, and what V should have been [N, S]."""
    mask_NS = played["mask"]
    reward_NS = played["reward"] * mask_NS
    value_NS = played["value"] * mask_NS  # so V is 0 after a trial's last step
    unit = discounted_returns(reward_NS, args.gamma)[mask_NS > 0].std(correction=0)
    # V learns to predict scaled rewards, so that its size is about 1 in every family of tasks.
    reward_NS = reward_NS / torch.where(unit > 1e-6, unit, 1.0)
    advantage_NS = gae(reward_NS, value_NS, args.gamma, args.gae_lambda)  # [4]
    advantage = advantage_NS[mask_NS > 0]
    normalised_NS = (advantage_NS - advantage.mean()) / (advantage.std(correction=0) + 1e-8) * mask_NS
    return normalised_NS, advantage_NS + value_NS


def keep_trials(state: dict, seen: Seen) -> None:
    """Put trials into the buffer, in place of the oldest where it is full."""
    buffer = state["buffer"]
    N, S = seen.mask.shape
    place_N = (state["stored"] + torch.arange(N, device=seen.mask.device)) % len(buffer["mask"])
    for name, x in seen._asdict().items():
        buffer[name][place_N] = 0.0  # trials may have ended before the buffer's last step
        buffer[name][place_N, :S] = x
    state["stored"] += N


def choices_loss(theta: Params, choices: Choices, args: Args, entropy_coef: float) -> tuple[Tensor, dict]:
    """L of a minibatch of trials, and its parts: means over steps."""
    output_NSA, value_NS = policy_and_value(theta, choices.told)
    policy = distribution(theta, output_NSA)
    log_ratio_NS = (policy.log_prob(choices.action) - choices.log_prob) * choices.mask
    ratio_NS = log_ratio_NS.exp()
    clipped_NS = ratio_NS.clamp(1 - args.clip, 1 + args.clip)
    terms = {
        "gain": torch.minimum(ratio_NS * choices.advantage, clipped_NS * choices.advantage),
        "value_loss": (value_NS - choices.target).square(),
        "entropy": policy.entropy(),
        "kl": (ratio_NS - 1 - log_ratio_NS).detach(),  # its mean estimates KL(pi_old || pi)
    }
    parts = {name: (x_NS * choices.mask).sum() / choices.mask.sum() for name, x_NS in terms.items()}
    loss = args.value_coef * parts["value_loss"] - parts["gain"] - entropy_coef * parts["entropy"]  # [6]
    return loss, parts


def learn_choices(envs, theta, optimizer, choices: Choices, args: Args, remaining: float, generator) -> dict:
    """Epochs of PPO on theta, in place; `remaining` falls from 1 to 0. Statistics of the last minibatch."""
    optimizer.param_groups[0]["lr"] = remaining * args.lr
    for _ in range(args.epochs):
        for rows in envs.unwrapped.minibatches(len(choices.told), args.minibatches, generator):
            minibatch = Choices(*(x[rows] for x in choices))
            weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
            loss, parts = choices_loss(weights, minibatch, args, remaining * args.entropy_coef)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for value, gradient in zip(theta.values(), gradients, strict=True):
                value.grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(theta.values(), args.max_grad_norm)
            optimizer.step()
    return {f"train/{name}": x.detach() for name, x in (parts | {"gradient_norm": norm}).items()}


def evaluate(envs, phi: Params, theta: Params, args: Args) -> dict[str, Tensor]:
    """Returns [N] of trials with the test tasks, the same in every run; for a ci95 half an interval."""
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    *_, return_NE = play_with_beliefs(envs, tasks_NP, phi, theta, args, generator)
    stats = {"test/return_trial": return_NE.sum(1), "test/trial_ci95": (return_NE.sum(1), tasks_NP)}
    stats |= {f"test/return_k{k}": return_N for k, return_N in enumerate(return_NE.unbind(1))}  # [10]
    return stats | {"test/gain_ci95": (return_NE[:, -1] - return_NE[:, 0], tasks_NP)}


def train(envs, args: Args, run, state: dict) -> None:
    """The algorithm's loop, from `state` on, whose buffer, phi and theta it changes in place."""
    phi, theta = state["phi"], state["theta"]
    vae_optimizer = torch.optim.Adam(phi.values(), args.vae_lr, fused=True)
    optimizer = torch.optim.Adam(theta.values(), args.lr, eps=1e-5, fused=True)
    if "optimizer" in state:
        vae_optimizer.load_state_dict(state["optimizer"]["phi"])
        optimizer.load_state_dict(state["optimizer"]["theta"])
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        run.doing("collecting")
        seen, choices, return_NE = play_with_beliefs(envs, tasks_NP, phi, theta, args, generator)
        keep_trials(state, seen)  # [5]
        run.doing("updating")
        remaining = 1 - (iteration - 1) / args.iterations
        stats = learn_choices(envs, theta, optimizer, choices, args, remaining, generator)
        stats |= learn_beliefs(phi, vae_optimizer, state, args, remaining, generator)
        state["env_steps"] += int(seen.mask.sum())
        optimizers = {"phi": vae_optimizer.state_dict(), "theta": optimizer.state_dict()}
        state.update(optimizer=optimizers, generator=generator.get_state())
        stats |= {"train/return_pre": return_NE[:, 0], "train/return_post": return_NE[:, -1]}
        run.end_iteration(state, stats, evaluate=lambda: evaluate(envs, phi, theta, args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import Trials, make, records

    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm, fixed=("episodes_per_trial",))
    options = {"discrete": True, "physics": args.physics}  # choices are welcome, as are continuous actions
    envs = make(args.env_id, args.meta_batch_size, args.horizon, args.cuda, args.action_scale, **options)
    envs = Trials(envs, args.episodes_per_trial)
    generator = Generator().manual_seed(args.seed)
    fresh = init_learner(envs, args, generator) | {"generator": generator.get_state()}
    device = envs.unwrapped.device
    state = records.first_state(args, algorithm, fresh, saved, device, evaluates=("phi", "theta"))

    def examine() -> dict:
        return evaluate(envs, state["phi"], state["theta"], args)

    with records.open_run(args, state, envs, unit="episodes of a trial", evaluate=examine) as run:
        if not args.evaluate:
            train(envs, args, run, state)


if __name__ == "__main__":
    main()
