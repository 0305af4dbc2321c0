"""LIRPG: learn an intrinsic reward by the gradient of the extrinsic return through the policy's own update.

Paper: Zheng, Oh, Singh 2018, arXiv:1804.06459, Algorithm 1, with PPO (1707.06347) as on MuJoCo.
Run: python algos/lirpg.py --env-id HalfCheetahForward-v0   (--help explains every flag; --cuda uses the GPU)
Result: delay 20, 3 seeds: HalfCheetah 1114 (PPO 764), Hopper 810 (PPO 1381: worse); docs/lirpg.md
Algorithm:
    [1] repeat: T more steps of each of N worlds with pi_theta; their rewards r_ex are summed up and paid late
    [2]     advantages A_ex of r_ex by GAE over V_ex
    [3]     some epochs over minibatches: r_mix = c_ex r_ex + lambda r_in + bonus, r_in = tanh(net_eta(s, a))
    [4]         advantages A_mix of r_mix by GAE over V_mix, linear in r_in: functions of eta
    [5]         L_mix = -mean min(r A_mix, clip(r, 1 - c, 1 + c) A_mix) + (V_mix - target)^2 / 2 - c_H entropy
    [6]         theta' = theta + a step of Adam down L_mix, a function of eta through A_mix and target
    [7]         L_ex = the same loss of A_ex and V_ex at theta', on the same minibatch, without the entropy
    [8]         eta <- eta + a step of Adam down L_ex(theta'(eta)) in eta, through all of [6] but Adam's
                second moment; then theta <- theta'
    [9]     now and then: undelayed returns of the first policy (k0) and of the present one (k1)
One epoch of one minibatch makes r = 1 and [5] an actor-critic's loss (A2C); lambda = 0, c_ex = 1 leave PPO.
Symbols: lambda = intrinsic_coef, c_ex = extrinsic_coef, c = clip, c_H = entropy_coef; Adam's step size is
    alpha = lr in [6], beta = reward_lr in [8]; r = pi_theta(a|s) / pi_old(a|s), pi_old the policy that acted.
    theta holds pi and V_mix, eta holds r_in and V_ex.
Shapes: a suffix names a tensor's axes (obs_NTO): N worlds, T steps, O observation, A action (choices, or
    dimensions), S = N T steps, B of them in a minibatch, P task vector, F features, W all of theta or eta.
Differs from the paper: several worlds, fewer minibatches; V_mix has a level that follows r_in at once; values
    are not clipped; last layers begin near 0. As in the authors' code, V ends at a time limit.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn.functional import linear, one_hot

Params = dict[str, Tensor]
CARRIED = "theta", "theta_adam", "eta", "eta_adam", "obs_moments", "return_moments", "sums"  # on the device


@dataclass
class Args:
    env_id: str = "HalfCheetahForward-v0"
    """a task environment of envs/ or your own (module:id, file.py:class); of its tasks one is drawn"""
    seed: int = 1
    """seed of everything but the test set: parameters, task, start states, noise"""
    iterations: int = 488
    """updates, of num_worlds x rollout_steps steps each; a million steps in the paper"""
    num_worlds: int = 16
    """worlds that play side by side (N); 1 in the paper"""
    rollout_steps: int = 128
    """steps of each world between two updates (T); 2048 in the paper"""
    horizon: int = 1000
    """steps of an episode at most; 1000 in the paper"""
    delay: int = 20
    """rewards of so many steps are paid in one sum, the rest at an episode's end; 10, 20, 40 in the paper"""
    intrinsic_coef: float = 1.0
    """weight of the learned reward (lambda); 1 for the paper's MuJoCo; 0, with --extrinsic-coef 1: PPO"""
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
    """weight of the entropy (c_H); 0 in the paper, 0.01 in its A2C; keeps choices from certainty"""
    normalize: bool = True
    """observations and rewards by their running moments; no good for one-hot observations"""
    normalize_advantages: bool = True
    """advantages of a minibatch to mean 0 and standard deviation 1; the paper's A2C does not"""
    eval_every: int = 20
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """networks and updates on the GPU; the physics of MuJoCo, too, where --physics says so"""
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
        ranges = dict.fromkeys(("gamma", "gae_lambda"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= dict.fromkeys(("intrinsic_coef", "extrinsic_coef", "entropy_coef", "live_bonus"), (0, 1e6))
        ranges["minibatches"] = 1, self.num_worlds * self.rollout_steps
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


class Stream(NamedTuple):
    """T steps of each of N worlds as they were played; episodes end and begin among them."""

    raw_obs: Tensor  # [N, T, O] as the environment gave it
    obs: Tensor  # [N, T, O] normalised: what the policy saw
    action: Tensor  # [N, T] numbers of choices, or [N, T, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, T] log pi_old(a|s)
    reward: Tensor  # [N, T] as the environment pays it, without a delay
    next_obs: Tensor  # [N, T, O] normalised, after the step; of the same episode even where that ended
    fell: Tensor  # [N, T] the episode ended, and not by its time limit
    done: Tensor  # [N, T] the episode ended


class Batch(NamedTuple):
    """What an update learns from: all that stays the same while theta and eta change, so all but r_in."""

    obs: Tensor  # [N, T, O] normalised
    action: Tensor  # [N, T] or [N, T, A]
    log_prob: Tensor  # [N, T] log pi_old(a|s)
    gae_weight: Tensor  # [N, T, T] of a step's TD error (last axis) in the advantage of another step
    mixed_delta: Tensor  # [N, T] TD error of V_mix's network without the learned reward
    mixed_value: Tensor  # [N, T] V_mix's network
    level_weight: Tensor  # [N, T] of the mean learned reward in a step's TD error; its mean is 1
    extrinsic_advantage: Tensor  # [N, T] A_ex
    extrinsic_target: Tensor  # [N, T] what V_ex should have been


def init_mlp(name: str, inputs: int, outputs: int, generator: Generator) -> Params:
    """Two layers of 64 tanh units, as in the paper, and a linear one. Its outputs begin near 0."""
    sizes = inputs, 64, 64, outputs
    scales = math.sqrt(2), math.sqrt(2), 0.01
    weights, biases = {}, {}
    for i, scale in enumerate(scales):
        fan_in, fan_out = sizes[i], sizes[i + 1]
        normal = torch.randn(fan_out, fan_in, generator=generator)
        weights[f"{name}_w{i}"] = scale / math.sqrt(fan_in) * normal
        biases[f"{name}_b{i}"] = torch.zeros(fan_out)
    return weights | biases


def init_adam(params: Params) -> Params:
    zeros_W = torch.zeros(sum(x.numel() for x in params.values()))
    return {"mean": zeros_W, "square": zeros_W, "steps": torch.zeros((), dtype=torch.float64)}


def init_moments(size: int) -> Params:
    return {"mean": torch.zeros(size), "var": torch.ones(size), "count": torch.tensor(1e-4)}


def first_state(envs, args: Args, generator: Generator) -> dict:
    """Everything that one iteration hands to the next, apart from the worlds themselves."""
    obs_size = envs.single_observation_space.shape[0]
    space = envs.single_action_space
    action_size = space.shape[0] if space.shape else int(space.n)
    theta = init_mlp("policy", obs_size, action_size, generator) | init_mlp("value", obs_size, 1, generator)
    if space.shape:
        theta["log_std"] = torch.zeros(action_size)
    eta = init_mlp("reward", obs_size + action_size, 1, generator) | init_mlp("value", obs_size, 1, generator)
    return {
        "theta": theta,  # pi and V_mix
        "eta": eta,  # r_in and V_ex
        "theta_adam": init_adam(theta),
        "eta_adam": init_adam(eta),
        "obs_moments": init_moments(obs_size),
        "return_moments": init_moments(1),
        "sums": {name: torch.zeros(args.num_worlds) for name in ("return", "discounted", "step", "due")},
    }


def mlp_output(params: Params, name: str, x: Tensor) -> Tensor:
    """Outputs [.., outputs] of one of the networks in `params` for x [.., inputs]."""
    for i in range(3):
        inputs = x if i == 0 else x.tanh()
        x = linear(inputs, params[f"{name}_w{i}"], params[f"{name}_b{i}"])
    return x


def policy_of(theta: Params, obs: Tensor) -> Distribution:
    """pi(.|s) for obs [.., O]: over choices, or Gaussian where theta has a standard deviation."""
    scores = mlp_output(theta, "policy", obs)
    if "log_std" not in theta:
        return Categorical(logits=scores, validate_args=False)
    return Independent(Normal(scores, theta["log_std"].exp(), validate_args=False), 1, validate_args=False)


def value_of(params: Params, obs: Tensor) -> Tensor:
    """V_mix [..] if `params` is theta, V_ex [..] if it is eta, for obs [.., O]."""
    return mlp_output(params, "value", obs).squeeze(-1)


def intrinsic_reward(eta: Params, obs: Tensor, action: Tensor) -> Tensor:
    """r_in [..] within +-1 for obs [.., O] and actions [..] or [.., A]."""
    num_actions = eta["reward_w0"].shape[1] - obs.shape[-1]
    features = action if action.is_floating_point() else one_hot(action, num_actions)
    return mlp_output(eta, "reward", torch.cat([obs, features], -1)).squeeze(-1).tanh()


def draw_action(policy: Distribution, noise_NA: Tensor) -> Tensor:
    """Actions [N, A], or choices [N], that normal noise turns into draws from the policy."""
    if isinstance(policy, Categorical):  # Gumbel's trick: the argmax of logits + Gumbel noise is a draw
        gumbel_NA = -(-torch.special.log_ndtr(noise_NA)).log()  # log_ndtr: the logarithm of uniform noise
        return (policy.logits + gumbel_NA).argmax(1)
    return policy.mean + policy.stddev * noise_NA


def normalized(obs: Tensor, moments: Params) -> Tensor:
    """Observations by their running moments, which stay 0 and 1 with --no-normalize."""
    std_O = (moments["var"] + 1e-8).sqrt()
    return ((obs - moments["mean"]) / std_O).clamp(-10, 10)


@torch.no_grad()
def play_steps(envs, obs_NO: Tensor, state: dict, steps: int, generator: Generator) -> tuple[Tensor, Stream]:
    """Play so many further steps of all worlds, without learning: the next observation, and the steps."""
    num_scores = len(state["theta"]["policy_b2"])
    noise_TNA = torch.randn(steps, len(obs_NO), num_scores, generator=generator).to(obs_NO)
    moments = state["obs_moments"]
    records = []
    for noise_NA in noise_TNA:
        seen_NO = normalized(obs_NO, moments)
        policy = policy_of(state["theta"], seen_NO)
        action = draw_action(policy, noise_NA)
        next_NO, reward_N, fell_N, timeout_N, info = envs.step(action)
        final_NO = info.get("final_obs", next_NO)  # where an episode ended, next_NO is already in another
        step = Stream(
            raw_obs=obs_NO, obs=seen_NO, action=action, log_prob=policy.log_prob(action), reward=reward_N,
            next_obs=normalized(final_NO, moments), fell=fell_N, done=fell_N | timeout_N,
        )  # fmt: skip
        records.append(step)
        obs_NO = next_NO
    return obs_NO, Stream._make(torch.stack(field, 1) for field in zip(*records, strict=True))


def pay_late(reward_NT: Tensor, done_NT: Tensor, sums: Params, args: Args) -> tuple:
    """Pay rewards every `delay` steps of an episode and at its end.

    Gives back the episodes' returns so far, discounted ones, and the payments, [N, T] each; and the sums with
    which the next steps go on.
    """
    returns, discounted, paid = [], [], []
    for reward_N, done_N in zip(reward_NT.unbind(1), done_NT.unbind(1), strict=True):
        sums = {
            "return": sums["return"] + reward_N,
            "discounted": args.gamma * sums["discounted"] + reward_N,
            "due": sums["due"] + reward_N,
            "step": sums["step"] + 1,
        }
        pays_N = done_N | (sums["step"] % args.delay == 0)
        returns.append(sums["return"])
        discounted.append(sums["discounted"])
        paid.append(sums["due"] * pays_N)
        sums = {name: x * ~(pays_N if name == "due" else done_N) for name, x in sums.items()}
    return torch.stack(returns, 1), torch.stack(discounted, 1), torch.stack(paid, 1), sums


def update_moments(moments: Params, x_SF: Tensor) -> Params:
    """Running mean and variance [F] of all rows so far, these included."""
    count = moments["count"] + len(x_SF)
    part = len(x_SF) / count
    shift_F = x_SF.mean(0) - moments["mean"]
    within_F = (1 - part) * moments["var"] + part * x_SF.var(0, correction=0)
    var_F = within_F + part * (1 - part) * shift_F**2
    return {"mean": moments["mean"] + part * shift_F, "var": var_F, "count": count}


@torch.no_grad()
def receive(stream: Stream, state: dict, args: Args) -> tuple[Tensor, dict]:
    """The delayed rewards r_ex [N, T], and statistics. Updates the sums and running moments in `state`."""
    return_NT, discounted_NT, paid_NT, sums = pay_late(stream.reward, stream.done, state["sums"], args)
    state["sums"] = sums
    stats = {}
    if stream.done.any():
        stats["train/return_post"] = return_NT[stream.done]
    if args.normalize:
        state["obs_moments"] = update_moments(state["obs_moments"], stream.raw_obs.flatten(0, 1))
        state["return_moments"] = update_moments(state["return_moments"], discounted_NT.reshape(-1, 1))
        paid_NT = (paid_NT / (state["return_moments"]["var"] + 1e-8).sqrt()).clamp(-10, 10)
    return paid_NT, stats


def gae_weights(done_NT: Tensor, decay: float | Tensor) -> Tensor:
    """[N, T, T], GAE as a matrix: decay^(j - i) for steps j from i to the end of its episode, else 0."""
    episode_NT = done_NT.cumsum(1) - done_NT.long()  # how many episodes of the world ended before the step
    t_T = torch.arange(done_NT.shape[1], device=done_NT.device)
    weight_TT = (decay ** (t_T - t_T[:, None]).clamp_min(0)).triu()
    same_NTT = episode_NT[:, :, None] == episode_NT[:, None, :]
    return weight_TT * same_NTT


@torch.no_grad()
def prepare(stream: Stream, reward_NT: Tensor, state: dict, args: Args) -> Batch:
    """The batch of a stream that was played and paid."""
    gae_weight_NTT = gae_weights(stream.done, args.gamma * args.gae_lambda)
    # A time limit is an end, too: no step begins in a state after it, so nothing would correct its value.
    discount_NT = args.gamma * ~stream.done
    # V_mix has a level, the same in all states (see mixed_loss), of which a step loses this share: all in a
    # fall. It needs no step to correct it, and so goes on after a time limit.
    drop_NT = 1 - args.gamma * ~stream.fell + 1e-8
    extrinsic_NT = value_of(state["eta"], stream.obs)
    next_extrinsic_NT = value_of(state["eta"], stream.next_obs)
    mixed_NT = value_of(state["theta"], stream.obs)
    next_mixed_NT = value_of(state["theta"], stream.next_obs)
    delta_NT = reward_NT + discount_NT * next_extrinsic_NT - extrinsic_NT
    advantage_NT = (gae_weight_NTT @ delta_NT[..., None]).squeeze(-1)  # [2]
    known_NT = args.extrinsic_coef * reward_NT + args.live_bonus  # r_mix without r_in
    return Batch(
        obs=stream.obs, action=stream.action, log_prob=stream.log_prob, gae_weight=gae_weight_NTT,
        mixed_delta=known_NT + discount_NT * next_mixed_NT - mixed_NT, mixed_value=mixed_NT,
        level_weight=drop_NT / drop_NT.mean(),
        extrinsic_advantage=advantage_NT, extrinsic_target=advantage_NT + extrinsic_NT,
    )  # fmt: skip


def clipped_loss(theta: Params, critic: Params, batch: Batch, rows_B: Tensor, advantage_NT: Tensor,
                 target_NT: Tensor, entropy_coef: float, args: Args) -> Tensor:  # fmt: skip
    """PPO's loss on a minibatch, of pi_theta and of the value in `critic` (theta: V_mix, eta: V_ex)."""
    obs_BO = batch.obs.flatten(0, 1)[rows_B]
    action = batch.action.flatten(0, 1)[rows_B]
    log_prob_B = batch.log_prob.flatten()[rows_B]
    advantage_B = advantage_NT.flatten()[rows_B]
    target_B = target_NT.flatten()[rows_B]
    if args.normalize_advantages:  # inside the loss, so that the meta-gradient passes through it
        advantage_B = (advantage_B - advantage_B.mean()) / (advantage_B.var(correction=0) + 1e-8).sqrt()
    policy = policy_of(theta, obs_BO)
    ratio_B = (policy.log_prob(action) - log_prob_B).exp()
    clipped_B = ratio_B.clamp(1 - args.clip, 1 + args.clip)
    gain_B = torch.minimum(ratio_B * advantage_B, clipped_B * advantage_B)
    error_B = (value_of(critic, obs_BO) - target_B).square()
    loss = 0.5 * error_B.mean() - gain_B.mean()
    return loss - entropy_coef * policy.entropy().mean() if entropy_coef else loss  # [5]


def mixed_loss(theta: Params, eta: Params, batch: Batch, rows_B: Tensor, args: Args) -> Tensor:
    """L_mix of a minibatch. A step's advantage depends on r_in of all later steps of its episode.

    V_mix is a network plus a level: what the mean r_in would be worth in any state, mean r_in / (1 - gamma p)
    with p the share of steps without a fall. Eta often moves r_in everywhere at once; the level follows, but
    a network, which has to learn it, would take many updates, and A_mix would be its error.
    """
    delta_NT = batch.mixed_delta
    if args.intrinsic_coef:  # else PPO: eta has no effect
        reward_NT = args.intrinsic_coef * intrinsic_reward(eta, batch.obs, batch.action)  # [3]
        delta_NT = delta_NT + reward_NT - batch.level_weight * reward_NT.mean()
    advantage_NT = (batch.gae_weight @ delta_NT[..., None]).squeeze(-1)  # [4]
    target_NT = advantage_NT + batch.mixed_value  # of the network
    return clipped_loss(theta, theta, batch, rows_B, advantage_NT, target_NT, args.entropy_coef, args)


def adam_step(params: Params, gradient: tuple, adam: Params, lr: float) -> tuple[Params, Params]:
    """Parameters and moments after a step of Adam on the gradient, which is shortened to a norm of 0.5.

    params - lr m / (sqrt(v) + 1e-5), the moments corrected. Differentiable in m; v counts as a constant.
    """
    gradient_W = torch.cat([x.flatten() for x in gradient])
    norm = (gradient_W.square().sum() + 1e-20).sqrt()
    gradient_W = gradient_W * (0.5 / norm).clamp(max=1)
    steps = adam["steps"] + 1
    mean_W = 0.9 * adam["mean"] + 0.1 * gradient_W
    square_W = 0.999 * adam["square"] + 0.001 * gradient_W.detach() ** 2
    root_W = (square_W / (1 - 0.999**steps)).sqrt()
    step_W = lr / (1 - 0.9**steps) * mean_W / (root_W + 1e-5)
    parts = step_W.split([x.numel() for x in params.values()])
    new_params = {name: x - part.view_as(x) for (name, x), part in zip(params.items(), parts, strict=True)}
    return new_params, {"mean": mean_W, "square": square_W, "steps": steps}


def policy_step(eta: Params, theta: Params, theta_adam: Params, batch: Batch, rows_B: Tensor, args: Args):
    """theta' and its Adam's moments: functions of eta, unless eta has no effect."""
    theta_leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}
    loss = mixed_loss(theta_leaves, eta, batch, rows_B, args)
    # create_graph: as a function of eta. Nested torch.func.grad would give the same numbers, but more slowly.
    create_graph = args.intrinsic_coef > 0
    gradient = torch.autograd.grad(loss, list(theta_leaves.values()), create_graph=create_graph)
    return adam_step(theta, gradient, theta_adam, args.lr)  # [6]


def extrinsic_loss(eta: Params, theta: Params, theta_adam: Params, batch: Batch, rows_B: Tensor, args: Args):
    """L_ex at theta'(eta), the policy after its own update: its gradient in eta is the meta-gradient.

    Also returns theta' and its Adam's moments.
    """
    new_theta, new_adam = policy_step(eta, theta, theta_adam, batch, rows_B, args)
    advantage_NT, target_NT = batch.extrinsic_advantage, batch.extrinsic_target
    loss = clipped_loss(new_theta, eta, batch, rows_B, advantage_NT, target_NT, 0.0, args)  # [7]: no entropy
    return loss, new_theta, new_adam


def learn_from(batch: Batch, state: dict, args: Args, generator: Generator) -> None:
    """All minibatches of an update, each of which changes theta and eta in `state`."""
    for _ in range(args.epochs):
        order = torch.randperm(batch.log_prob.numel(), generator=generator)
        for rows_B in order.tensor_split(args.minibatches):
            inputs = state["theta"], state["theta_adam"], batch, rows_B.to(batch.obs.device), args
            if args.intrinsic_coef:
                eta_leaves = {name: x.detach().requires_grad_() for name, x in state["eta"].items()}
                loss, theta, theta_adam = extrinsic_loss(eta_leaves, *inputs)
                gradient = torch.autograd.grad(loss, list(eta_leaves.values()))  # [8]
                eta_adam = state["eta_adam"]
                state["eta"], state["eta_adam"] = adam_step(state["eta"], gradient, eta_adam, args.reward_lr)
            else:  # PPO: neither r_in nor L_ex is needed
                theta, theta_adam = policy_step(state["eta"], *inputs)
            state["theta"] = {name: x.detach() for name, x in theta.items()}  # theta <- theta'
            state["theta_adam"] = {name: x.detach() for name, x in theta_adam.items()}


def task_of_run(envs, args: Args) -> Tensor:
    """The one task [N, P] of all the run, in every world."""
    return envs.unwrapped.sample_tasks(1, Generator().manual_seed(args.seed)).repeat(args.num_worlds, 1)


def test_returns(envs, state: dict, args: Args) -> Tensor:
    """Returns [N] of an episode in each world; start states and noise are the same in every run."""
    _, generator = envs.unwrapped.test_set(args.num_worlds)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": task_of_run(envs, args)})
    _, stream = play_steps(envs, obs_NO, state, args.horizon, generator)
    return stream.reward.sum(1)  # a world whose episode has ended pays 0


def evaluate(envs, state: dict, args: Args) -> dict[str, Tensor]:
    """Returns before and after learning, as metrics [N]; a run logs means, and for ..ci95 the interval."""
    returns = test_returns(envs, state, args)  # [9]
    stats = {"test/return_k0": state["first_returns"], "test/return_k1": returns}
    return stats | {"test/gain_ci95": returns - state["first_returns"]}


def train(envs, test_envs, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 1, from `state` on; `test_envs` are worlds of their own."""
    for part in CARRIED:
        state[part] = {name: x.to(envs.unwrapped.device) for name, x in state[part].items()}
    generator = Generator()
    generator.set_state(state["generator"])
    obs_NO, _ = envs.reset(seed=args.seed, options={"tasks": task_of_run(envs, args)})
    if "worlds" in state:  # a resumed run: in the midst of episodes
        obs_NO = envs.load_worlds(state["worlds"])
    if "first_returns" not in state:
        state["first_returns"] = test_returns(test_envs, state, args)
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        state["env_steps"] += args.num_worlds * args.rollout_steps
        obs_NO, stream = play_steps(envs, obs_NO, state, args.rollout_steps, generator)
        intrinsic_NT = intrinsic_reward(state["eta"], stream.obs, stream.action)
        reward_NT, stats = receive(stream, state, args)  # [1]
        stats["train/intrinsic_std"] = float(intrinsic_NT.std(correction=0))
        learn_from(prepare(stream, reward_NT, state, args), state, args, generator)
        state.update(generator=generator.get_state(), worlds=envs.save_worlds())
        run.end_iteration(state, stats, evaluate=lambda: evaluate(test_envs, state, args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import Lifetimes, make, records

    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    size = args.num_worlds, args.horizon, args.cuda
    # discrete: choices are accepted, too; continuous actions stay what they are
    envs = make(args.env_id, *size, discrete=True, physics=args.physics, singly=True)
    envs = Lifetimes(envs, episodes=10**9)  # one episode after the other
    test_envs = make(args.env_id, *size, discrete=True, physics=args.physics)
    generator = Generator().manual_seed(args.seed)
    fresh = records.to(first_state(envs, args, generator), envs.unwrapped.device)
    fresh |= {"first_returns": test_returns(test_envs, fresh, args), "generator": generator.get_state()}
    parts = "theta", "obs_moments"
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device, evaluates=parts)
    if args.evaluate:
        state["first_returns"] = fresh["first_returns"]  # flags beside --evaluate count for them, too

    def examine() -> dict:
        return evaluate(test_envs, state, args)

    with records.open_run(args, state, envs, unit="0: before, 1: after learning", evaluate=examine) as run:
        if not args.evaluate:
            train(envs, test_envs, args, run, state)


if __name__ == "__main__":
    main()
