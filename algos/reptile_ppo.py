"""Reptile for reinforcement learning: PPO on each task, then a step of theta towards where it led.

Paper: Nichol, Achiam, Schulman 2018, arXiv:1803.02999, Algorithm 2; on RL it reports only negative
    results. PPO: 1707.06347.
Run: python algos/reptile_ppo.py --env-id Navigation2D-v0 --action-scale 1     (--help explains every flag)
Result: Navigation2DEndless after 0, 1, 3 inner steps: -40, -30, -15 (MAML: -40, -13, -13; paper: none)
Algorithm:
    [1] repeat: draw N tasks; phi_i = theta
    [2]     k times, per task: sample E episodes with pi_phi_i
    [3]         per batch: advantages A by GAE over a linear baseline fitted per task, normalised
    [4]         J_i = mean [ min(r A, clip(r, 1 - eps, 1 + eps) A) ], r = pi_phi_i(a|s) / pi_old_i(a|s),
                pi_old_i the policy that sampled the batch
    [5]         phi_i <- phi_i + alpha grad J_i, several times on the same batch
    [6]     theta <- theta + epsilon mean_i (phi_i - theta), epsilon falling linearly to 0
    [7]     every eval_every iterations: return on the test tasks after 0, 1, .. inner steps ([2] to [5])
With one step of [5] and k = 1 theta climbs the mean return of all tasks, which is joint training; whatever
    prepares theta for adaptation is of second order in alpha and grows with more steps (section 5).
Symbols: phi_i = params, k = inner_steps, alpha = inner_lr, eps = clip, epsilon = outer_lr at the start,
    lambda of [3] = gae_lambda.
Shapes: a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, T steps, B = E * T samples,
    O observation, A action, P task vector, F features of the baseline, Y of time. The entries of parameter
    dicts gain N by adaptation.
Differs from the paper: it does not say how RL was tried. The inner optimiser is plain SGD, so that with one
    epoch an inner step is MAML's policy gradient.
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
from torch.distributions import Normal
from torch.func import grad, vmap
from torch.nn import functional

Params = dict[str, Tensor]  # one policy for all tasks: w0 [O, H], b0 [H], ..; one per task: w0 [N, O, H], ..


@dataclass
class Args:
    env_id: str = "HalfCheetahDir-v0"
    """a task environment of envs/ or your own (module:id, file.py:class)"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, start states, noise"""
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
    """worlds divide actions by it, then clip: at first noise spans a tenth of the bounds; navigation: 1"""
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
    gae_lambda: float = 0.95
    """lambda of GAE; 1 is the return minus the baseline"""
    eval_every: int = 10
    """iterations from one evaluation and checkpoint to the next"""
    eval_steps: int = 3
    """inner steps of an evaluation"""
    cuda: bool = False
    """policy, inner and outer loop on the GPU; the physics of MuJoCo, too, where --physics says so"""
    physics: Literal["auto", "mujoco", "warp"] = "auto"
    """mujoco: on the CPU; warp: mujoco_warp, on the device; auto: warp with --cuda where it is installed"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    capture_video: bool = False
    """at the end, a gif of one test task before and after adaptation"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "gae_lambda", "clip", "outer_lr"), (0, 1)) | {"seed": (0, 2**31)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


class Episodes(NamedTuple):
    """E episodes of each of N tasks; inside vmap those of one task, without N."""

    obs: Tensor  # [N, E, T, O]
    action: Tensor  # [N, E, T, A] as the policy drew it, unclipped
    log_prob: Tensor  # [N, E, T] log pi(a|s) under the policy that drew it: data, not a function of theta
    mask: Tensor  # [N, E, T] 1 while the episode runs, 0 after an early end
    reward: Tensor  # [N, E, T]
    advantage: Tensor  # [N, E, T] less the task's mean, over the task's standard deviation (see `collect`)
    value: Tensor  # [N, E, T] the baseline plus that mean: with lambda 1, advantage = (return - value) / std
    std: Tensor  # [N, E] that standard deviation, for each episode; only maml_trpo.py needs value and std


def init_policy(envs, hidden_size: int, generator: Generator) -> Params:
    """Xavier-uniform weights, zero biases, standard deviation 1."""
    sizes = *envs.single_observation_space.shape, hidden_size, hidden_size, *envs.single_action_space.shape
    params = {"log_std": torch.zeros(sizes[-1])}
    for i, (n, m) in enumerate(pairwise(sizes)):
        params[f"w{i}"] = (2 * torch.rand(n, m, generator=generator) - 1) * math.sqrt(6 / (n + m))
        params[f"b{i}"] = torch.zeros(m)
    return params


def policy(params: Params, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian policy: mean [.., B, A] and standard deviation [.., 1, A] for obs [.., B, O], any number B."""
    hidden = torch.tanh(obs @ params["w0"] + params["b0"].unsqueeze(-2))
    hidden = torch.tanh(hidden @ params["w1"] + params["b1"].unsqueeze(-2))
    mean = hidden @ params["w2"] + params["b2"].unsqueeze(-2)
    return mean, params["log_std"].clamp_min(math.log(1e-6)).exp().unsqueeze(-2)


def normal(mean: Tensor, std: Tensor) -> Normal:
    """Gaussian actions; without torch's checks of its arguments, which would wait for the GPU each time."""
    return Normal(mean, std, validate_args=False)


def batch_log_prob(params: Params, batch: Episodes) -> Tensor:
    """log pi(a|s) [.., E, T] of a batch's actions, by one policy for all tasks or by one per task."""
    mean, std = policy(params, batch.obs.flatten(-3, -2))
    return normal(mean, std).log_prob(batch.action.flatten(-3, -2)).sum(-1).view(batch.mask.shape)


@torch.no_grad()
def rollout(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> dict[str, Tensor]:
    """Play E episodes of each task, with one policy for all tasks or one per task: by name, [N, E, T, ..].

    `envs` has N * E worlds, a task's side by side, takes and gives tensors, and never restarts by itself.
    """
    E = args.episodes_per_task
    seed = int(torch.randint(2**31, (1,), generator=generator))
    size = args.horizon, len(tasks_NP), E, *envs.single_action_space.shape
    noise_TNEA = envs.unwrapped.noise(generator, *size, dim=1)  # normal; axis 1: tasks, of this process
    obs, _ = envs.reset(seed=seed, options={"tasks": tasks_NP.repeat_interleave(E, 0)})
    playing_NE = torch.ones_like(noise_TNEA[0, :, :, 0])
    steps = []
    with envs.unwrapped.one_thread():  # more threads would only take the cores from the physics
        for noise_NEA in noise_TNEA:
            obs_NEO = obs.unflatten(0, playing_NE.shape)
            mean_NEA, std = policy(params, obs_NEO)
            action_NEA = mean_NEA + std * noise_NEA
            obs, reward, terminated, _, _ = envs.step(action_NEA.flatten(0, 1))
            step = {"obs": obs_NEO, "action": action_NEA, "mean": mean_NEA, "mask": playing_NE}
            steps.append(step | {"reward": reward.view_as(playing_NE)})
            # After an early end `terminated` stays true, and rewards are 0.
            playing_NE = 1 - terminated.view_as(playing_NE).to(playing_NE)
    played = {name: torch.stack([step[name] for step in steps], 2) for name in steps[0]}
    policies = normal(played.pop("mean"), std.unsqueeze(-2))  # std is the same in all steps
    return played | {"log_prob": policies.log_prob(played["action"]).sum(-1)}


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


def linear_baseline(obs_NETO: Tensor, return_NET: Tensor, mask_NET: Tensor) -> Tensor:
    """Values [N, E, T]: each task's ridge regression of returns on o, o^2, t, t^2, t^3, 1 (1604.06778)."""
    t_T = torch.arange(obs_NETO.shape[2], device=obs_NETO.device).double() / 100
    time_NETY = torch.stack([t_T, t_T**2, t_T**3, t_T**0], -1).expand(*return_NET.shape, 4)
    obs_NETO = obs_NETO.double().clamp(-10, 10)
    # Masked features: what follows an early end is left out of the fit, and gets the value 0.
    x_NBF = (torch.cat([obs_NETO, obs_NETO**2, time_NETY], -1) * mask_NET[..., None]).flatten(1, 2)
    y_NB1 = return_NET.double().flatten(1)[..., None]
    gram_NFF = x_NBF.mT @ x_NBF + 1e-5 * torch.eye(x_NBF.shape[-1]).to(x_NBF)
    return (x_NBF @ torch.linalg.solve(gram_NFF, x_NBF.mT @ y_NB1)).view_as(return_NET).to(return_NET)


def collect(envs, tasks_NP: Tensor, params: Params, args: Args, generator: Generator) -> Episodes:
    """E episodes of each task, and their advantages."""
    played = rollout(envs, tasks_NP, params, args, generator)
    mask_NET = played["mask"]
    return_NET = discounted_returns(played["reward"], args.gamma)
    value_NET = linear_baseline(played["obs"], return_NET, mask_NET)  # [3]
    advantage_NET = gae(played["reward"], value_NET, args.gamma, args.gae_lambda)
    weight_NET = mask_NET / mask_NET.sum((1, 2), keepdim=True)
    mean_N11 = (weight_NET * advantage_NET).sum((1, 2), keepdim=True)
    centred_NET = advantage_NET - mean_N11
    subtracted_NET = value_NET + mean_N11
    std_N11 = (weight_NET * centred_NET.square()).sum((1, 2), keepdim=True).sqrt()
    level_N11 = (weight_NET * subtracted_NET.square()).sum((1, 2), keepdim=True).sqrt()
    # At least 0.3 % of the rms of what was subtracted: where actions change nothing, only what the baseline
    # cannot fit is left (less than that at T = 200), which must not be scaled up to noise of size 1.
    std_N11 = torch.maximum(std_N11, 0.003 * level_N11) + 1e-8
    return Episodes(
        **played,
        advantage=centred_NET * mask_NET / std_N11,
        value=subtracted_NET,
        std=std_N11.squeeze(-1).expand(mask_NET.shape[:2]),
    )


def ratios(params: Params, batch: Episodes) -> Tensor:
    """pi(a|s) over that of the policy that drew a, [.., E, T]; 1 where the mask is 0."""
    log_ratio = (batch_log_prob(params, batch) - batch.log_prob) * batch.mask
    return log_ratio.exp()


def clipped_gain(params: Params, batch: Episodes, args: Args) -> Tensor:
    """PPO's objective J of one policy: the mean over all steps of a batch, from whatever episodes."""
    ratio = ratios(params, batch)
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    return torch.minimum(ratio * batch.advantage, clipped * batch.advantage).sum() / batch.mask.sum()  # [4]


def ppo_step(params: Params, batch: Episodes, args: Args) -> Params:
    """SGD on a batch, all tasks at once, from the same parameters for all or from one set per task."""
    for _ in range(args.inner_epochs):
        params_axis = 0 if params["b0"].ndim == 2 else None  # None: the same for all tasks
        gradient = vmap(grad(clipped_gain), in_dims=(params_axis, 0, None))(params, batch, args)
        params = {name: value + args.inner_lr * gradient[name] for name, value in params.items()}
    return params


def evaluate(envs, theta: Params, args: Args) -> tuple[dict, Params]:
    """Adapt to the test tasks, the same tasks and noise in every run: metrics, adapted parameters.

    A run logs the means of metrics over tasks; of a pair (x, tasks), here x is the gain of adaptation, half
    the 95 % interval of x's mean, for which equal tasks count as one.
    """
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    params = theta
    returns = []
    for k in range(args.eval_steps + 1):
        batch = collect(envs, tasks_NP, params, args, generator)
        returns.append(batch.reward.sum(-1).mean(1))  # [7]
        if k < args.eval_steps:
            params = ppo_step(params, batch, args)
    stats = {f"test/return_k{k}": return_N for k, return_N in enumerate(returns)}
    return stats | {"test/gain_ci95": (returns[-1] - returns[0], tasks_NP)}, params


def train(envs, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 2, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device) for name, value in state["theta"].items()}
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        params = theta
        returns = []
        for step in range(args.inner_steps):
            run.doing("adapting", step, args.inner_steps)
            batch = collect(envs, tasks_NP, params, args, generator)  # [2]
            returns.append(batch.reward.sum(-1))  # before this step: none is played after the last one
            params = ppo_step(params, batch, args)  # [5]
            state["env_steps"] += envs.unwrapped.total(batch.mask)
        epsilon = args.outer_lr * (1 - (iteration - 1) / args.iterations)
        change = {name: value.mean(0) - theta[name] for name, value in params.items()}  # mean over the tasks
        theta = {name: value + epsilon * change[name] for name, value in theta.items()}  # [6]
        state.update(theta=theta, generator=generator.get_state())
        length = torch.cat([value.flatten() for value in change.values()]).norm()
        stats = {"train/change": length, "train/return_pre": returns[0], "train/return_post": returns[-1]}
        run.end_iteration(state, stats, evaluate=lambda: evaluate(envs, state["theta"], args)[0])


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import make, multiply_by_onednn, records

    multiply_by_onednn()  # products of large matrices; on some processors twice as fast
    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    worlds = args.meta_batch_size * args.episodes_per_task
    envs = make(args.env_id, worlds, args.horizon, args.cuda, args.action_scale, physics=args.physics)
    generator = Generator().manual_seed(args.seed)
    theta = init_policy(envs, args.hidden_size, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)

    def examine() -> dict:
        return evaluate(envs, state["theta"], args)[0]

    with records.open_run(args, state, envs, unit="inner steps", evaluate=examine) as run:
        if not args.evaluate:
            train(envs, args, run, state)
        if args.capture_video:
            params = {name: value[0] for name, value in evaluate(envs, state["theta"], args)[1].items()}
            run.film(envs, policy, {"before": state["theta"], "after": params})


if __name__ == "__main__":
    main()
