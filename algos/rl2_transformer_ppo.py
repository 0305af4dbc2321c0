"""RL2 with attention: a causal transformer, or SNAIL, that adapts by looking up the trial so far; with PPO.

Paper: SNAIL: Mishra et al. 2018, arXiv:1707.03141; transformers: Melo 2022, arXiv:2206.06614; RL2: 1611.02779
Run: python algos/rl2_transformer_ppo.py --env-id Bandit5-v0     (--help explains every flag; --cuda: the GPU)
Result: bandits of 5 arms, 10 pulls: transformer 6.65, SNAIL 6.66, Gittins index 6.63 (SNAIL's paper: 6.6)
Algorithm:
    [1] repeat: draw N tasks, and play a trial of each: E episodes in a row, each of up to T steps
    [2]     a trial begins with an empty memory, and all that is told of the step before its first is 0
    [3]     at each step the network reads x = (obs; previous obs, action, reward, done) and its memory, KV
            caches of the trial's earlier steps, whatever their episode; it gives the policy and the value V
    [4]     advantages A by GAE over the whole trial, through the ends of episodes; V = 0 after its last step
    [5]     some epochs over minibatches of whole trials, all steps of each at once, with a causal mask
    [6]         L = mean[c_V (V - target)^2 - min(rA, clip(r, 1 - c, 1 + c) A) - c_H entropy], r = pi / pi_old
    [7]         theta <- one step of Adam on L, the gradient's norm clipped
    [8]     every eval_every iterations: returns of episodes 1, .. E of trials with the test tasks
Symbols: theta = the network's weights, c = clip, c_V = value_coef, c_H = entropy_coef, gamma, lambda of [4] =
    gamma, gae_lambda, target = A + V of [4]. Rewards, V and A are divided by the batch's std of returns.
Shapes: a suffix names a tensor's axes (x_NSI): N tasks with a trial each, S steps, I inputs of the network,
    H features, A actions (choices, or dimensions), J = O + A + 2 inputs about the previous step, O
    observation, E episodes, P task vector; C columns of a cache, F and U features in layers, G heads of
    width D.
Differs from the papers: the network sees the previous observation, too (--no-previous-obs: it does not); PPO
    for SNAIL's TRPO. Transformer: pre-norm, learned positions, over the whole trial (Melo: 5 steps, no
    normalisation, T-Fixup). SNAIL: dilations 1, 2, .. (2, 4, ..). Both, like rl2_ppo.py: far smaller batches,
    rewards scaled, A normalised, learning rate and entropy bonus fall to 0. All worlds (one for each task)
    begin an episode together; the network does not see a world's wait for the others.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn import functional

Params = dict[str, Tensor]
Memory = dict  # KV caches of a trial's past, by their layers' names, and positions; {} at its beginning
HEAD_WIDTH = 16  # of the transformer's attention


@dataclass
class Args:
    env_id: str = "Bandit5-v0"
    """a task environment of envs/ or your own (module:id, file.py:class)"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, start states, noise"""
    iterations: int = 400
    """meta-updates"""
    meta_batch_size: int = 500
    """tasks per meta-update and per evaluation, a trial of each (N); in RL2's paper N E T is 250,000"""
    episodes_per_trial: int = 10
    """episodes of a trial (E); RL2's paper: 10 to 500 for bandits, 10 to 100 for MDPs, 2 for navigation"""
    horizon: int | None = None
    """steps of an episode (T); default: the family's own, of a bandit 1"""
    previous_obs: bool = True
    """the network sees the previous observation, too (not an episode's last one); not so in the paper"""
    encoder: Literal["transformer", "snail"] = "transformer"
    """snail: temporal convolutions and attention in turn"""
    layers: int = 2
    """blocks of the encoder"""
    hidden_size: int = 64
    """width of the transformer, a multiple of 16; filters, keys and values of SNAIL (32 in its paper)"""
    action_scale: float = 1.0
    """worlds divide continuous actions by it, then clip them to their bounds"""
    lr: float = 1e-3
    """Adam's step size at the start; falls linearly to 0; smaller for larger networks"""
    epochs: int = 3
    """passes over the trials of a meta-update"""
    minibatches: int = 8
    """parts, of whole trials, of a pass; one step of Adam on each"""
    clip: float = 0.2
    """how far a probability ratio may profit (c)"""
    gamma: float = 0.99
    """discount, through the episodes' ends; 0.99 in RL2's paper"""
    gae_lambda: float = 0.9
    """lambda of GAE; 0.3 in RL2's paper; small values trust V's opinion of what exploring is worth"""
    value_coef: float = 0.5
    """weight of the value's squared error (c_V)"""
    entropy_coef: float = 0.02
    """weight of the entropy at the start (c_H); falls linearly to 0; if too small, exploration dies early"""
    max_grad_norm: float = 0.5
    """the gradient is shortened to this norm"""
    eval_every: int = 20
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """network and trials on the GPU; the physics of MuJoCo, too, where --physics says so"""
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
        ranges = dict.fromkeys(("gamma", "gae_lambda", "clip"), (0, 1))
        ranges |= dict.fromkeys(("value_coef", "entropy_coef"), (0, 1e6))
        ranges |= {"seed": (0, 2**31), "minibatches": (1, self.meta_batch_size)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str | None) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")
        if self.encoder == "transformer" and self.hidden_size % HEAD_WIDTH:
            raise ValueError(f"--hidden-size {self.hidden_size}: allowed is a multiple of {HEAD_WIDTH}")


class Steps(NamedTuple):
    """A trial of each of N tasks, S steps long; a shorter one is filled up with steps of mask 0."""

    x: Tensor  # [N, S, I] obs, then what is known of the previous step (J, see `play_trials`)
    action: Tensor  # [N, S] numbers of choices, or [N, S, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, S] log pi(a|x, memory) when it was drawn
    mask: Tensor  # [N, S] 1 for the trial's steps
    advantage: Tensor  # [N, S] mean 0 and standard deviation 1 over the steps of all trials
    target: Tensor  # [N, S] what V should have been


def dense(rows: int, columns: int, generator: Generator, scale: float = 1.0) -> Tensor:
    """A weight [rows, columns] of normal numbers with standard deviation scale / sqrt(columns)."""
    return scale / math.sqrt(columns) * torch.randn(rows, columns, generator=generator)


def init_transformer(num_inputs: int, args: Args, generator: Generator) -> Params:
    """Weights of a pre-norm transformer; each block adds nothing at first, for its last layers are 0."""
    H = args.hidden_size
    theta = {"w_in": dense(H, num_inputs, generator)}
    theta["position"] = 0.02 * torch.randn(args.episodes_per_trial * args.horizon, H, generator=generator)
    for i in range(args.layers):
        theta |= {f"w_qkv{i}": dense(3 * H, H, generator), f"w_read{i}": torch.zeros(H, H)}
        theta |= {f"w_wide{i}": dense(4 * H, H, generator), f"w_narrow{i}": torch.zeros(H, 4 * H)}
        theta |= {f"scale_attention{i}": torch.ones(H), f"scale_mlp{i}": torch.ones(H)}
        theta |= {f"shift_attention{i}": torch.zeros(H), f"shift_mlp{i}": torch.zeros(H)}
    return theta | {"scale_out": torch.ones(H), "shift_out": torch.zeros(H)}


def init_snail(num_inputs: int, args: Args, generator: Generator) -> Params:
    """Weights of SNAIL: in each block convolutions (dilations 1, 2, 4, .. span a trial), then attention."""
    H = args.hidden_size
    convolutions = max(1, math.ceil(math.log2(args.episodes_per_trial * args.horizon)))
    theta = {"w_in": dense(H, num_inputs, generator)}
    width = H
    for i in range(args.layers):
        for j in range(convolutions):
            theta |= {f"w_conv{i}_{j}": dense(4 * H, width, generator), f"b_conv{i}_{j}": torch.zeros(2 * H)}
            width += H  # each layer reads all that came before, and appends H features
        theta[f"w_qkv{i}"] = dense(3 * H, width, generator)
        width += H
    return theta | {"w_out": dense(H, width, generator), "b_out": torch.zeros(H)}


def next_positions(memory: Memory, x_NSI: Tensor, playing_N: Tensor | None) -> Memory:
    """The memory with positions of S more steps, which are their columns in KV caches, and a causal mask."""
    N, S, _ = x_NSI.shape
    start_N = memory.get("next", torch.zeros(N, dtype=torch.int64, device=x_NSI.device))
    position_NS = start_N[:, None] + torch.arange(S, device=x_NSI.device)
    # A world that waits (playing_N is 0) stays at its position: what it writes there now will be overwritten.
    next_N = start_N + (S if playing_N is None else S * (playing_N > 0))
    columns = memory.get("columns", 0) + S  # of the caches in use: no position lies beyond
    mask = {"is_causal": True}  # at a trial's beginning, where step s is in column s: the fastest mask
    if memory:
        mask = {"attn_mask": torch.arange(columns, device=x_NSI.device) <= position_NS[:, None, :, None]}
    return memory | {"position": position_NS, "next": next_N, "columns": columns, "mask": mask}


def write_cache(memory: Memory, name: str, new_NSF: Tensor) -> Tensor:
    """Write S steps into a layer's KV cache, in place; all its columns up to now [N, C, F]."""
    if name not in memory:
        return memory.setdefault(name, new_NSF)
    if memory[name].shape[1] < memory["columns"]:  # full: at least double it, so that copies are rare
        memory[name] = functional.pad(memory[name], (0, 0, 0, memory["columns"]))
    memory[name].scatter_(1, memory["position"][..., None].expand_as(new_NSF), new_NSF)
    return memory[name][:, : memory["columns"]]


def attention(memory: Memory, name: str, qkv_NSF: Tensor, heads: int) -> Tensor:
    """What each step reads [N, S, H] of its trial up to itself: softmax(q k / sqrt(D)) v in each head."""
    H = qkv_NSF.shape[2] // 3
    q_NSH, kv_NSU = qkv_NSF.split([H, 2 * H], 2)
    k_NCH, v_NCH = write_cache(memory, name, kv_NSU).chunk(2, 2)
    q_NGSD, k_NGCD, v_NGCD = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q_NSH, k_NCH, v_NCH))
    read_NGSD = functional.scaled_dot_product_attention(q_NGSD, k_NGCD, v_NGCD, **memory["mask"])
    return read_NGSD.transpose(1, 2).flatten(2)


def shift(memory: Memory, name: str, new_NSF: Tensor, delay: int) -> Tensor:
    """A layer's output [N, S, F] `delay` steps earlier; 0 before the trial's beginning."""
    past_NCF = write_cache(memory, name, new_NSF)
    if past_NCF is new_NSF:  # the trial's beginning, as in a replay
        return functional.pad(new_NSF, (0, 0, delay, 0))[:, : new_NSF.shape[1]]
    earlier_NS1 = memory["position"].unsqueeze(2) - delay
    return past_NCF.take_along_dim(earlier_NS1.clamp_min(0), 1) * (earlier_NS1 >= 0)


def layer_norm(theta: Params, name: str, x_NSH: Tensor) -> Tensor:
    """Layer normalisation with learned scale and shift."""
    return functional.layer_norm(x_NSH, x_NSH.shape[2:], theta[f"scale_{name}"], theta[f"shift_{name}"])


def transformer(theta: Params, x_NSI: Tensor, memory: Memory, args: Args, playing_N=None) -> tuple:
    """Features [N, S, H] of S more steps (acting: one; replaying: all, from memory {}) and the memory."""
    memory = next_positions(memory, x_NSI, playing_N)
    hidden_NSH = x_NSI @ theta["w_in"].mT + theta["position"][memory["position"]]
    for i in range(args.layers):
        qkv_NSF = layer_norm(theta, f"attention{i}", hidden_NSH) @ theta[f"w_qkv{i}"].mT
        read_NSH = attention(memory, f"attention{i}", qkv_NSF, heads=args.hidden_size // HEAD_WIDTH)
        hidden_NSH = hidden_NSH + read_NSH @ theta[f"w_read{i}"].mT
        wide_NSU = functional.gelu(layer_norm(theta, f"mlp{i}", hidden_NSH) @ theta[f"w_wide{i}"].mT)
        hidden_NSH = hidden_NSH + wide_NSU @ theta[f"w_narrow{i}"].mT
    return layer_norm(theta, "out", hidden_NSH), memory


def snail(theta: Params, x_NSI: Tensor, memory: Memory, args: Args, playing_N=None) -> tuple:
    """As `transformer`, with the paper's blocks: each layer appends its output to all that came before it."""
    memory = next_positions(memory, x_NSI, playing_N)
    hidden_NSF = x_NSI @ theta["w_in"].mT
    for i in range(args.layers):
        for j in range(sum(name.startswith("w_conv0_") for name in theta)):
            # (f_t, g_t) = W h_t + U h_(t-d) + b, with d = 2^j; tanh(f_t) sigmoid(g_t) is appended.
            Wh_NSU, Uh_NSU = (hidden_NSF @ theta[f"w_conv{i}_{j}"].mT).chunk(2, 2)
            earlier_NSU = shift(memory, f"conv{i}_{j}", Uh_NSU, delay=2**j)
            f_NSH, g_NSH = (Wh_NSU + earlier_NSU + theta[f"b_conv{i}_{j}"]).chunk(2, 2)
            hidden_NSF = torch.cat([hidden_NSF, torch.tanh(f_NSH) * torch.sigmoid(g_NSH)], 2)
        read_NSH = attention(memory, f"attention{i}", hidden_NSF @ theta[f"w_qkv{i}"].mT, heads=1)
        hidden_NSF = torch.cat([hidden_NSF, read_NSH], 2)
    return hidden_NSF @ theta["w_out"].mT + theta["b_out"], memory


INITS = {"transformer": init_transformer, "snail": init_snail}
ENCODERS = {"transformer": transformer, "snail": snail}


def init_network(envs, args: Args, generator: Generator) -> Params:
    """theta: encoder, policy (near uniform choices, or means near 0 and standard deviation 1) and V."""
    space = envs.single_action_space
    A = space.shape[0] if space.shape else int(space.n)
    num_obs = envs.single_observation_space.shape[0]
    num_previous = A + 2 + (num_obs if args.previous_obs else 0)
    theta = INITS[args.encoder](num_obs + num_previous, args, generator)
    theta |= {"w_policy": dense(A, args.hidden_size, generator, scale=0.01), "b_policy": torch.zeros(A)}
    theta |= {"w_value": dense(1, args.hidden_size, generator), "b_value": torch.zeros(1)}
    return theta | ({"log_std": torch.zeros(A)} if space.shape else {})


def actor_critic(theta: Params, feature_NSH: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's outputs [N, S, A], logits of choices or means, and values [N, S]."""
    output_NSA = functional.linear(feature_NSH, theta["w_policy"], theta["b_policy"])
    return output_NSA, functional.linear(feature_NSH, theta["w_value"], theta["b_value"]).squeeze(-1)


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
def play_trials(envs, tasks_NP: Tensor, theta: Params, args: Args, generator: Generator) -> tuple:
    """A trial of each task, all at once: its Steps, advantages included, and each episode's return [N, E].

    The network's input x_t is obs_t and, of the step before, obs_(t-1) (where --previous-obs), action_(t-1)
    (one-hot where it is a choice), reward_(t-1), and done_(t-1), 1 where that step ended its episode.
    """
    is_choice = "log_std" not in theta
    std_A = None if is_choice else theta["log_std"].exp()
    seed = int(torch.randint(2**31, (1,), generator=generator))
    N = len(tasks_NP)
    A = len(theta["b_policy"])
    draw = gumbel_noise if is_choice else torch.randn
    # All noise at once and from this generator, so that a seed means the same actions on every device.
    noise_SNA = draw(envs.episodes * args.horizon, N, A, generator=generator).to(tasks_NP.device)
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": tasks_NP})
    memory = {}  # [2]
    num_previous = A + 2 + (obs_NO.shape[1] if args.previous_obs else 0)
    previous_NJ = obs_NO.new_zeros(N, num_previous)
    playing_N = obs_NO.new_ones(N)  # 0: its episode has ended; it waits for the others, without any effect
    return_NE = obs_NO.new_zeros(N, envs.episodes)
    steps = []
    with envs.unwrapped.one_thread():  # more threads would only take the cores from the physics
        for noise_NA in noise_SNA:
            x_NI = torch.cat([obs_NO, previous_NJ], 1)
            feature_N1H, memory = ENCODERS[args.encoder](theta, x_NI[:, None], memory, args, playing_N)
            output_NA, value_N = (x.squeeze(1) for x in actor_critic(theta, feature_N1H))  # [3]
            action = (output_NA + noise_NA).argmax(1) if is_choice else output_NA + std_A * noise_NA
            # Trials (envs/trials.py) begins the next episode by itself, in all worlds at once. So next_NO is
            # its first observation then; info: `done`, the world's episode ended in this step, early or at
            # the horizon; `waits`, until the next one begins; `episode`, the number of this step's episode.
            next_NO, reward_N, _, _, info = envs.step(action)
            return_NE[:, info["episode"]] += reward_N  # 0 from worlds that wait
            step = {"x": x_NI, "action": action, "output": output_NA, "value": value_N}
            steps.append(step | {"reward": reward_N, "mask": playing_N})
            action_NA = functional.one_hot(action, A).to(obs_NO) if is_choice else action
            latest = [action_NA, reward_N[:, None], info["done"][:, None].to(obs_NO)]
            latest_NJ = torch.cat([obs_NO, *latest] if args.previous_obs else latest, 1)
            # Of a world that waits, the step with done = 1 stays the previous one until the next episode.
            previous_NJ = torch.where(playing_N[:, None] > 0, latest_NJ, previous_NJ)
            playing_N = 1 - info["waits"].to(obs_NO)
            obs_NO = next_NO
            if envs.is_over:
                break
    played = without_waiting({name: torch.stack([step[name] for step in steps], 1) for name in steps[0]})
    played["log_prob"] = distribution(theta, played["output"]).log_prob(played["action"])
    played["advantage"], played["target"] = advantages(played, args)
    return Steps(**{name: played[name] for name in Steps._fields}), return_NE


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


def ppo_loss(theta: Params, steps: Steps, args: Args, entropy_coef: float) -> tuple[Tensor, dict]:
    """L of a minibatch of trials, and its parts: means over steps."""
    feature_NSH, _ = ENCODERS[args.encoder](theta, steps.x, {}, args)  # from an empty memory
    output_NSA, value_NS = actor_critic(theta, feature_NSH)
    policy = distribution(theta, output_NSA)
    log_ratio_NS = (policy.log_prob(steps.action) - steps.log_prob) * steps.mask
    ratio_NS = log_ratio_NS.exp()
    clipped_NS = ratio_NS.clamp(1 - args.clip, 1 + args.clip)
    terms = {
        "gain": torch.minimum(ratio_NS * steps.advantage, clipped_NS * steps.advantage),
        "value_loss": (value_NS - steps.target).square(),
        "entropy": policy.entropy(),
        "kl": (ratio_NS - 1 - log_ratio_NS).detach(),  # its mean estimates KL(pi_old || pi)
    }
    parts = {name: (x_NS * steps.mask).sum() / steps.mask.sum() for name, x_NS in terms.items()}
    loss = args.value_coef * parts["value_loss"] - parts["gain"] - entropy_coef * parts["entropy"]  # [6]
    return loss, parts


def ppo(envs, theta: Params, optimizer, steps: Steps, args: Args, remaining: float, generator) -> dict:
    """Epochs of PPO on theta, in place; `remaining` falls from 1 to 0. Statistics of the last minibatch."""
    optimizer.param_groups[0]["lr"] = remaining * args.lr
    for _ in range(args.epochs):
        # The trials in random order, cut into minibatches; under torchrun this process's part of each.
        for rows in envs.unwrapped.minibatches(len(steps.x), args.minibatches, generator):  # [5]
            minibatch = Steps(*(x[rows] for x in steps))
            # Leaves of their own: gradients are averaged before theta and its optimizer see them.
            weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
            loss, parts = ppo_loss(weights, minibatch, args, remaining * args.entropy_coef)
            # Processes have different numbers of steps: weighted so, their mean is the mean over all steps.
            portion = minibatch.mask.sum() / average(minibatch.mask.sum())[0]  # 1 in a single process
            gradients = average(*torch.autograd.grad(portion * loss, list(weights.values())))
            for value, gradient in zip(theta.values(), gradients, strict=True):
                value.grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(theta.values(), args.max_grad_norm)
            optimizer.step()  # [7]
    means = dict(zip(parts, average(*(portion * x for x in parts.values())), strict=True))
    return {f"train/{name}": float(x) for name, x in (means | {"gradient_norm": norm}).items()}


def evaluate(envs, theta: Params, args: Args) -> dict[str, Tensor]:
    """Returns [N] of trials with the test tasks, the same tasks and noise in every run.

    A run logs the means of these tensors; of pairs (x, tasks) half the 95 % interval of x's mean, for which
    equal tasks count as one.
    """
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    _, return_NE = play_trials(envs, tasks_NP, theta, args, generator)
    stats = {"test/return_trial": return_NE.sum(1), "test/trial_ci95": (return_NE.sum(1), tasks_NP)}
    stats |= {f"test/return_k{k}": return_N for k, return_N in enumerate(return_NE.unbind(1))}  # [8]
    return stats | {"test/gain_ci95": (return_NE[:, -1] - return_NE[:, 0], tasks_NP)}


def train(envs, args: Args, run, state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, eps=1e-5, fused=True)
    optimizer.load_state_dict(state.get("optimizer", optimizer.state_dict()))
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        run.doing("collecting")
        steps, return_NE = play_trials(envs, tasks_NP, theta, args, generator)
        run.doing("updating")
        stats = ppo(envs, theta, optimizer, steps, args, 1 - (iteration - 1) / args.iterations, generator)
        state["env_steps"] += int(steps.mask.sum())
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        stats["train/return_pre"] = return_NE[:, 0]
        stats["train/return_post"] = return_NE[:, -1]
        run.end_iteration(state, stats, evaluate=lambda: evaluate(envs, state["theta"], args))


def average(*values: Tensor) -> list[Tensor]:
    """Means over torchrun's processes, each of which has computed a part; in a single one the values."""
    values = [x.detach() for x in values]
    if dist.is_initialized():
        vector = torch.cat([x.flatten() for x in values]) / dist.get_world_size()
        dist.all_reduce(vector)
        parts = vector.split([x.numel() for x in values])
        values = [part.view_as(x) for part, x in zip(parts, values, strict=True)]
    return values


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import Trials, join, make, multiply_by_onednn, records

    multiply_by_onednn()  # products of large matrices; on some processors twice as fast
    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)  # fills in --horizon where it is not given
    # torchrun's processes, if any: each moves a part of the worlds and, by sees_all, has the steps of all.
    leads = join(args.cuda, args.minibatches, sees_all=True, meta_batch_size=args.meta_batch_size)
    options = {"discrete": True, "physics": args.physics}  # choices are welcome, as are continuous actions
    envs = make(args.env_id, args.meta_batch_size, args.horizon, args.cuda, args.action_scale, **options)
    envs = Trials(envs, args.episodes_per_trial)
    generator = Generator().manual_seed(args.seed)
    theta = init_network(envs, args, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)

    def examine() -> dict:
        return evaluate(envs, state["theta"], args)

    unit = "episodes of a trial"
    with records.open_run(args, state, envs, unit=unit, evaluate=examine, leads=leads) as run:
        if not args.evaluate:
            train(envs, args, run, state)


if __name__ == "__main__":
    main()
