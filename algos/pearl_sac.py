"""PEARL: soft actor-critic that is told the task by a latent vector z, inferred from what it has seen.

Paper: Rakelly et al. 2019, arXiv:1903.08254, Algorithms 1 and 2. SAC: 1801.01290, 1812.05905.
Run: python algos/pearl_sac.py --env-id HalfCheetahVel3-v0   (--help explains every flag; --cuda: on the GPU)
Result: HalfCheetahVel3, held-out targets, after 0, 1, 2 noisy episodes: -189, -95, -98 at 78 k steps; by an
    earlier test, all by the means: -193, -55, -63 at 294 k (paper's curve: about -50 at 1 M)
Algorithm:
    [1] draw M training tasks, with two buffers each, replay and context; play episodes into both, z ~ N(0, 1)
    [2] repeat: empty the contexts of N tasks; play episodes of each into its replay and its context,
    [3]         the first ones with z from the prior, the others with z ~ q(z|c), c drawn from the context
    [4]     many times: of N of the M tasks, draw a batch (s, a, r, s') from the replay, c from the context
    [5]         z ~ q(z|c), the product of a Gaussian for each transition of c
    [6]         L_Q = (Q(s, a, z) - r - gamma (1 - d) (min Q'(s', a', z) - alpha log pi(a'|s', z)))^2, a' ~ pi
    [7]         L_pi = alpha log pi(a|s, z) - min Q(s, a, z), a ~ pi
    [8]         one step of Adam on L_Q + L_pi + beta (sum over the N tasks of KL(q(z|c) || N(0, 1)))
    [9]         the target critics Q' follow the critics Q slowly
    [10]    now and then: returns of the means in test tasks, z ~ q(z|0, 1, .. episodes played with noise)
    L_Q moves Q and, through the z of Q(s, a, z), the encoder; L_pi only the policy; the KL the encoder.
Symbols: theta = encoder, policy, critics q1 and q2 (min: the smaller Q); Q' = target; the contexts = recent;
    alpha = entropy_coef, or learned; beta = kl_weight; d = ended; r = reward_scale * training_reward
Shapes: a suffix names a tensor's axes (obs_NBO): N tasks at once (those played, or those of an update), M
    training tasks, R transitions stored of each, B those of a batch, S of a context, T steps, O observation,
    A action, P task vector, Z latent, I what the encoder sees of a transition, C the two critics.
Differs from the paper: many tasks collect at once, an episode each. Differs from its code: SAC without a
    value network, one step on the sum of all losses, one size of layers, no penalty on the policy's outputs;
    tests with contexts made as in training, by noise (return_authors: as its code tests, by the means only).
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.nn import functional

Params = dict[str, Tensor]
Buffer = dict[str, Tensor]  # of M tasks: the fields of Transitions [M, R, ..], and count [M]


@dataclass
class Args:
    env_id: str = "HalfCheetahVel3-v0"
    """a task environment of envs/ or your own (module:id, file.py:class)"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, start states, noise"""
    iterations: int = 30
    """of collecting, then updates; up to 500 in the paper's code"""
    train_tasks: int = 100
    """training tasks (M), drawn once; 100 in the paper for HalfCheetahVel"""
    tasks_per_iteration: int = 30
    """tasks that collect in an iteration, a world for each, and test tasks; 5 and 30 in the paper"""
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
    context: Literal["posterior", "prior"] = "posterior"
    """prior: only episodes with z from the prior are context, as in the paper's code for HalfCheetahVel"""
    context_size: int = 64
    """transitions in a training context (S); the paper's code: 64 to 1024, 100 for HalfCheetahVel"""
    latent_size: int = 5
    """dimensions of z (Z); 5 in the paper"""
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
    """scored episodes of an evaluation, by the policy's means: after 0, 1, .. episodes of context"""
    eval_prior_episodes: int = 1
    """the first of them, with z from the prior; the paper's code: 2, 5 for SparseNavigation2D"""
    eval_every: int = 1
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """networks and buffers on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    low_precision: bool = False
    """updates multiply matrices in bfloat16: faster where they are large and the processor has it"""
    compile: bool = False
    """loss and gradient as one graph, by torch.compile (CUDA graphs on a GPU); takes a minute at first"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
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
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


class Transitions(NamedTuple):
    """Steps of N tasks: the T of an episode each, or B of a batch, or S of a context."""

    obs: Tensor  # [N, T, O]
    action: Tensor  # [N, T, A]
    reward: Tensor  # [N, T] that the encoder sees, and that returns are made of
    next_obs: Tensor  # [N, T, O]
    training_reward: Tensor  # [N, T] that the critics learn: the reward, or the dense one (--dense-training)
    ended: Tensor  # [N, T] 1 from the step on with which the episode ended early; the horizon is no end
    mask: Tensor  # [N, T] 1 while the episode runs, 0 after an early end and where the physics diverged


def init_networks(envs, args: Args, generator: Generator) -> Params:
    """theta: encoder, policy and critics, each of three ReLU layers and a last one with outputs near 0."""
    (obs_size,) = envs.single_observation_space.shape
    (action_size,) = envs.single_action_space.shape
    hidden = [args.hidden_size] * 3
    encoder = [obs_size + action_size + 1 + obs_size * args.next_obs, *hidden, 2 * args.latent_size]
    policy = [obs_size + args.latent_size, *hidden, 2 * action_size]
    critic = [obs_size + action_size + args.latent_size, *hidden, 1]
    sizes = {"encoder": encoder, "policy": policy, "q1": critic, "q2": critic}
    theta = {}
    for part, widths in sizes.items():
        for i, (n, m) in enumerate(pairwise(widths)):
            bound = 1 / math.sqrt(n) if i < 3 else 3e-3
            theta[f"{part}_w{i}"] = bound * (2 * torch.rand(m, n, generator=generator) - 1)
            theta[f"{part}_b{i}"] = torch.zeros(m)
    if args.auto_entropy:
        theta["log_alpha"] = torch.tensor(args.entropy_coef).log()
    return theta


def mlp(theta: Params, part: str, x: Tensor) -> Tensor:
    """Outputs [.., outputs] of one of the networks for x [.., inputs]."""
    shape = x.shape[:-1]
    x = x.flatten(0, -2)  # a matrix is faster
    for i in range(4):
        x = x.relu_() if i > 0 else x  # in place, which spares a copy
        x = functional.linear(x.to(theta[f"{part}_w{i}"].dtype), theta[f"{part}_w{i}"], theta[f"{part}_b{i}"])
    return x.view(*shape, x.shape[-1])


def act(theta: Params, obs: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions a [.., A] from -1 to 1 and log pi(a|s, z) [..], for obs [.., O], z [.., Z], noise [.., A].

    a = tanh(u), u = mean + std noise: gradients flow through both. The density of a is that of u divided by
    the slope of tanh: log pi(a|s, z) is the sum over A of log N(u; mean, std) - log(1 - tanh(u)^2).
    """
    mean, log_std = mlp(theta, "policy", torch.cat([obs, z], -1)).chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - functional.softplus(-2 * u))  # finite even where tanh(u) rounds to 1
    return u.tanh(), (log_normal - log_slope).sum(-1)


def critics(theta: Params, obs: Tensor, action: Tensor, z: Tensor) -> Tensor:
    """Both critics' Q(s, a, z) [2, ..]."""
    x = torch.cat([obs, action, z], -1)
    return torch.stack([mlp(theta, part, x).squeeze(-1) for part in ("q1", "q2")])


@torch.no_grad()
def play_episodes(envs, tasks_NP, theta, z_NZ, args: Args, generator, noise_scale: float) -> Transitions:
    """An episode of each task, all at once, with one z from its first step to its last.

    The policy's noise is multiplied by noise_scale: 1 explores, 0 plays the policy's means.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator))
    size = args.horizon, len(tasks_NP), *envs.single_action_space.shape
    noise_TNA = noise_scale * torch.randn(size, generator=generator).to(z_NZ)
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": tasks_NP})
    playing_N = torch.ones_like(z_NZ[:, 0])
    steps = []
    with envs.unwrapped.one_thread():
        for noise_NA in noise_TNA:
            action_NA, _ = act(theta, obs_NO, z_NZ, noise_NA)
            step = {"obs": obs_NO, "action": action_NA}
            obs_NO, reward_N, terminated_N, _, info = envs.step(action_NA)
            ended_N = terminated_N.to(reward_N)
            step |= {"reward": reward_N, "next_obs": obs_NO, "ended": ended_N}
            step["mask"] = playing_N * ~info.get("diverged", torch.zeros_like(terminated_N))  # it led nowhere
            step["training_reward"] = info["dense_reward"] if args.dense_training else reward_N
            steps.append(step)
            playing_N = 1 - ended_N  # once a world has ended, it says so in every step, and pays 0
    return Transitions(**{name: torch.stack([step[name] for step in steps], 1) for name in steps[0]})


def init_buffer(envs, tasks: int, size: int) -> Buffer:
    """Room for the last `size` transitions (R) of each of M tasks; count [M]: all that were ever stored."""
    obs = envs.single_observation_space.shape
    shapes = {"obs": obs, "action": envs.single_action_space.shape, "next_obs": obs}
    buffer = {name: torch.zeros(tasks, size, *shapes.get(name, ())) for name in Transitions._fields}
    return buffer | {"count": torch.zeros(tasks, dtype=torch.int64)}


def store(buffer: Buffer, index_N: Tensor, episodes: Transitions) -> None:
    """Add an episode of each of N different tasks, without the steps where mask is 0."""
    k_NT = buffer["count"][index_N, None] + episodes.mask.cumsum(1).long() - 1  # steps numbered from 0
    place_NT = k_NT % buffer["mask"].shape[1]  # a ring: step k replaces the oldest one, step k - R
    n, t = episodes.mask.nonzero(as_tuple=True)
    for name, x in episodes._asdict().items():
        buffer[name][index_N[n], place_NT[n, t]] = x[n, t]
    buffer["count"][index_N] += episodes.mask.sum(1).long()


def draw(buffer: Buffer, index_N: Tensor, uniform: Tensor) -> Transitions:
    """Of each task a transition for each of its random numbers [N, ..] from 0 to 1, with replacement."""
    R = buffer["mask"].shape[1]
    stored_N1 = buffer["count"][index_N, None].clamp_max(R)
    place = R * index_N[:, None] + (uniform * stored_N1).long()  # in [M * R], all tasks' one after the other
    return Transitions(**{name: buffer[name].flatten(0, 1)[place] for name in Transitions._fields})


def posterior(theta: Params, context: Transitions, args: Args) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, Z] of q(z|c), a product of one Gaussian per transition; of none, the prior."""
    seen = [context.obs, context.action, context.reward[..., None], context.next_obs]
    x_NSI = torch.cat(seen if args.next_obs else seen[:3], -1)
    mean_NSZ, raw_NSZ = mlp(theta, "encoder", x_NSI).chunk(2, -1)
    precision_NSZ = context.mask[..., None] / functional.softplus(raw_NSZ).clamp_min(1e-7)  # 1 / variance
    variance_NZ = 1 / (precision_NSZ.sum(1) + ~context.mask.any(1, keepdim=True))  # add up; 1 of none
    mean_NZ = variance_NZ * (precision_NSZ * mean_NSZ).sum(1)  # .. and weigh the means
    return mean_NZ, variance_NZ


def sample_prior(tasks_NP: Tensor, args: Args, generator: Generator) -> Tensor:
    """z [N, Z] ~ N(0, 1), for tasks of which nothing is known yet."""
    return torch.randn(len(tasks_NP), args.latent_size, generator=generator).to(tasks_NP.device)


@torch.no_grad()
def sample_posterior(theta: Params, context: Transitions, args: Args, generator: Generator) -> Tensor:
    """z [N, Z] ~ q(z|c)."""
    mean_NZ, variance_NZ = posterior(theta, context, args)
    return mean_NZ + variance_NZ.sqrt() * torch.randn(mean_NZ.shape, generator=generator).to(mean_NZ)


def collect_episodes(envs, index_N, state: dict, args: Args, generator, from_prior: bool) -> Tensor:
    """Play an episode of each of these training tasks into its replay and context; gives its return [N]."""
    tasks_NP = state["tasks"][index_N]
    if from_prior:
        z_NZ = sample_prior(tasks_NP, args, generator)
    else:
        uniform_NS = torch.rand(len(index_N), args.context_size, generator=generator).to(tasks_NP.device)
        context = draw(state["recent"], index_N, uniform_NS)
        z_NZ = sample_posterior(state["theta"], context, args, generator)  # [3]
    episodes = play_episodes(envs, tasks_NP, state["theta"], z_NZ, args, generator, noise_scale=1.0)
    store(state["replay"], index_N, episodes)
    if from_prior or args.context == "posterior":
        store(state["recent"], index_N, episodes)
    state["env_steps"] += int(episodes.mask.sum())
    return sum(episodes.reward.unbind(1))  # over the steps


def critics_loss(theta, target, batch: Transitions, z_NBZ, noise: dict, alpha, args: Args) -> Tensor:
    """L_Q, summed over both critics. z is no constant in Q(s, a, z): so the encoder learns from it."""
    with torch.no_grad():
        next_action_NBA, log_prob_NB = act(theta, batch.next_obs, z_NBZ, noise["next_action"])
        next_value_NB = critics(target, batch.next_obs, next_action_NBA, z_NBZ).amin(0) - alpha * log_prob_NB
        aim_NB = args.reward_scale * batch.training_reward + args.gamma * (1 - batch.ended) * next_value_NB
    q_CNB = critics(theta, batch.obs, batch.action, z_NBZ)
    return (q_CNB - aim_NB).square().mean((1, 2)).sum()  # [6]


def policy_loss(theta, batch: Transitions, z_NBZ, noise: dict, alpha) -> tuple[Tensor, Tensor, Tensor]:
    """L_pi, mean min Q and entropy. z and the critics' weights are constants: only the action can move Q."""
    constants = {name: value.detach() for name, value in theta.items()}
    action_NBA, log_prob_NB = act(theta, batch.obs, z_NBZ.detach(), noise["action"])
    value_NB = critics(constants, batch.obs, action_NBA, z_NBZ.detach()).amin(0)
    return (alpha * log_prob_NB - value_NB).mean(), value_NB.mean(), -log_prob_NB.detach().mean()  # [7]


def pearl_loss(theta, target, batch: Transitions, context: Transitions, noise: dict, args: Args) -> tuple:
    """L_Q + L_pi + beta KL, and statistics.

    `noise` holds standard normal numbers: z [N, Z], next_action for a' and action for a [N, B, A].
    """
    if args.low_precision:  # all layers but the last ones, so that outputs have all digits
        theta = {name: x.bfloat16() if name[-1] in "012" else x for name, x in theta.items()}
        target = {name: x.bfloat16() if name[-1] in "012" else x for name, x in target.items()}
    alpha = theta["log_alpha"].detach().exp() if args.auto_entropy else args.entropy_coef
    mean_NZ, variance_NZ = posterior(theta, context, args)  # [5]
    kl = 0.5 * (mean_NZ.square() + variance_NZ - 1 - variance_NZ.log()).sum(1).mean()
    z_NZ = mean_NZ + variance_NZ.sqrt() * noise["z"]
    z_NBZ = z_NZ[:, None].expand(*batch.mask.shape, -1)  # all transitions of a task with the same z
    q_loss = critics_loss(theta, target, batch, z_NBZ, noise, alpha, args)
    pi_loss, value, entropy = policy_loss(theta, batch, z_NBZ, noise, alpha)
    # As in the paper's code the loss has the sum of the tasks' KL, of which kl is the mean, beside means.
    loss = q_loss + pi_loss + args.kl_weight * args.meta_batch_size * kl
    if args.auto_entropy:  # alpha rises while the entropy is below -A
        loss = loss + theta["log_alpha"] * (entropy + batch.action.shape[-1])
    stats = {"q_loss": q_loss, "value": value, "kl": kl, "entropy": entropy}
    return loss, {f"train/{name}": x.detach() for name, x in stats.items()}


def loss_gradient(theta: Params, *data) -> tuple[Params, dict]:
    """Gradient by theta, and statistics: as torch.func.grad, which is slower where nothing is compiled."""
    weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
    loss, stats = pearl_loss(weights, *data)
    gradient = torch.autograd.grad(loss, list(weights.values()))
    return dict(zip(weights, gradient, strict=True)), stats


def learn(envs, state: dict, optimizer, args: Args, generator: Generator, pause) -> dict[str, Tensor]:
    """An iteration's updates, which change theta and target in place; returns the last one's statistics.

    `generator` is on the device of the worlds. `pause(k)` is called before each update, with k of them done.
    Where a run was stopped among them, it goes on after state["updates"] of them.
    """
    theta = state["theta"]
    target = state["target"]
    numbers = envs.unwrapped.noise  # random ones: standard normal, or uniform from 0 to 1
    N = args.meta_batch_size
    action_shape = N, args.batch_size, *envs.single_action_space.shape
    take_gradient = loss_gradient
    if args.compile:
        take_gradient = torch.compile(torch.func.grad(pearl_loss, has_aux=True), mode="reduce-overhead")
    for k in range(min(state["updates"], args.updates - 1), args.updates):  # at least one
        pause(k)
        # `choose` and `numbers` give this process's share of N tasks, and of random numbers for them.
        index_N = envs.unwrapped.choose(args.train_tasks, N, generator)  # [4]
        batch = draw(state["replay"], index_N, numbers(generator, N, args.batch_size, uniform=True))
        context = draw(state["recent"], index_N, numbers(generator, N, args.context_size, uniform=True))
        noise = {"z": numbers(generator, N, args.latent_size)}
        noise |= {name: numbers(generator, *action_shape) for name in ("next_action", "action")}
        gradient, stats = take_gradient(theta, target, batch, context, noise, args)
        for weight, slope in zip(theta.values(), average(*gradient.values()), strict=True):
            weight.grad = slope
        optimizer.step()  # [8]
        torch._foreach_lerp_([*target.values()], [theta[name] for name in target], args.tau)  # [9] at once
    return dict(zip(stats, average(*stats.values()), strict=True))


def evaluate(envs, theta: Params, args: Args) -> dict:
    """Returns of the policy's means in the test tasks, the same in all runs, after 0, 1, .. noisy episodes.

    return_authors is how the paper's code tests: after two episodes with z from the prior, all by the means.
    """
    tasks_NP, generator = envs.unwrapped.test_set(args.tasks_per_iteration)

    def successive(episodes: int, prior_episodes: int, noise_scale: float) -> list[Tensor]:
        returns = []
        seen = []
        for k in range(episodes):
            if k < prior_episodes:
                z_NZ = sample_prior(tasks_NP, args, generator)
            else:
                context = Transitions(*(torch.cat(x, 1) for x in zip(*seen, strict=True)))  # all so far
                z_NZ = sample_posterior(theta, context, args, generator)
            scored = play_episodes(envs, tasks_NP, theta, z_NZ, args, generator, noise_scale=0.0)
            returns.append(sum(scored.reward.unbind(1)))
            if k + 1 < episodes and (k < prior_episodes or args.context == "posterior"):
                seen.append(play_episodes(envs, tasks_NP, theta, z_NZ, args, generator, noise_scale))
        return returns

    returns = successive(args.eval_episodes, args.eval_prior_episodes, noise_scale=1.0)
    stats = {f"test/return_k{k}": return_N for k, return_N in enumerate(returns)}  # [10]
    stats["test/return_authors"] = successive(episodes=3, prior_episodes=2, noise_scale=0.0)[-1]
    return stats | {"test/gain_ci95": (returns[-1] - returns[0], tasks_NP)}  # logged: an interval over tasks


def init_state(envs, args: Args, generator: Generator) -> dict:
    """Networks, tasks and empty buffers; a context has room for an iteration's or the initial episodes."""
    theta = init_networks(envs, args, generator)
    episodes = max(args.initial_episodes, args.prior_episodes + args.posterior_episodes)
    return {
        "theta": theta,
        "target": {name: value.clone() for name, value in theta.items() if name.startswith("q")},
        "tasks": envs.unwrapped.sample_tasks(args.train_tasks, generator, "train"),
        "replay": init_buffer(envs, args.train_tasks, args.replay_size),
        "recent": init_buffer(envs, args.train_tasks, episodes * args.horizon),
        "initial": 0,  # rounds of initial episodes that are played
        # Of the iteration that is under way: whether there is one, returns [N] of its episodes, updates made.
        "unfinished": 0,
        "returns": [],
        "updates": 0,
        "updates_generator": None,
    }


def collect_iteration(envs, state: dict, args: Args, generator: Generator, pause) -> None:
    """An iteration's episodes, and before the first iteration's the initial ones.

    What is collected already stands in `state` ("initial" and "returns"). `pause` is called before a round,
    with the numbers of those done and of all, but not before the first of an iteration.
    """
    worlds_N = torch.arange(args.tasks_per_iteration, device=state["tasks"].device)
    initial_rounds = math.ceil(args.initial_episodes * args.train_tasks / len(worlds_N))
    while state["iteration"] == 1 and state["initial"] < initial_rounds:  # [1]
        pause(state["initial"], initial_rounds)
        index_N = (state["initial"] * len(worlds_N) + worlds_N) % args.train_tasks  # all tasks in turn
        collect_episodes(envs, index_N, state, args, generator, from_prior=True)
        state["initial"] += 1
    if not state["returns"]:
        index_N = torch.randperm(args.train_tasks, generator=generator)[: len(worlds_N)].to(worlds_N.device)
        state["index"] = index_N
        state["recent"]["count"][index_N] = state["recent"]["mask"][index_N] = 0  # [2]
    while len(state["returns"]) < args.prior_episodes + args.posterior_episodes:
        if state["returns"]:  # not before: a run that goes on from there would draw other tasks
            pause(len(state["returns"]), args.prior_episodes + args.posterior_episodes)
        from_prior = len(state["returns"]) < args.prior_episodes
        state["returns"].append(collect_episodes(envs, state["index"], state, args, generator, from_prior))


def train(envs, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 1, going on from `state`, which it changes in place.

    An iteration takes minutes, so a run may stop in its midst, in `pause`. "unfinished" in `state` is 1 while
    an iteration is under way, whose number "iteration" is.
    """
    optimizer = torch.optim.Adam(state["theta"].values(), args.lr, fused=True)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = args.lr  # --lr beside --resume
    generator = Generator()
    generator.set_state(state["generator"])
    updates_generator = Generator(envs.unwrapped.device)

    def pause_collecting(done: int, of: int) -> None:
        run.doing("collecting", done, of)
        if run.should_stop():
            run.stop(state | {"generator": generator.get_state()})

    def pause_learning(done: int) -> None:
        run.doing("updating", done, args.updates)
        if run.should_stop():
            now = {"optimizer": optimizer.state_dict(), "updates_generator": updates_generator.get_state()}
            run.stop(state | now | {"updates": done})

    # An unfinished iteration goes on; else the next one begins.
    for iteration in range(state["iteration"] + 1 - state["unfinished"], args.iterations + 1):
        state.update(iteration=iteration, unfinished=1)
        collect_iteration(envs, state, args, generator, pause_collecting)
        if state["updates_generator"] is None:
            updates_generator.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            state.update(generator=generator.get_state(), updates_generator=updates_generator.get_state())
        updates_generator.set_state(state["updates_generator"])
        stats = learn(envs, state, optimizer, args, updates_generator, pause_learning)
        stats |= {"train/return_pre": state["returns"][0], "train/return_post": state["returns"][-1]}
        state.update(optimizer=optimizer.state_dict(), unfinished=0)
        state.update(returns=[], updates=0, updates_generator=None)
        run.end_iteration(state, stats, evaluate=partial(evaluate, envs, state["theta"], args))


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
    from envs import join, make, multiply_by_onednn, records

    multiply_by_onednn(tf32=True)  # products of large matrices; on some processors twice as fast
    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    sizes = {"tasks_per_iteration": args.tasks_per_iteration, "meta_batch_size": args.meta_batch_size}
    leads = join(args.cuda, sees_all=True, **sizes)  # all processes' buffers hold what all worlds have shown
    envs = make(args.env_id, args.tasks_per_iteration, args.horizon, args.cuda, physics=args.physics)
    if args.dense_training and not hasattr(envs.unwrapped, "dense_reward"):
        raise records.refusal(f"--dense-training: {args.env_id} has no dense reward")
    generator = Generator().manual_seed(args.seed)
    fresh = init_state(envs, args, generator) | {"generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)
    examine = partial(evaluate, envs, state["theta"], args)
    with records.open_run(args, state, envs, unit="episodes", evaluate=examine, leads=leads) as run:
        if not args.evaluate:
            train(envs, args, run, state)


if __name__ == "__main__":
    main()
