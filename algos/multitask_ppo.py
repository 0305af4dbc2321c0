"""The yardsticks of meta-learning: one policy for all tasks, by PPO, then fine-tuned on a new task.

Paper: Schulman et al. 2017, arXiv:1707.06347 (PPO). The yardsticks are those of MAML (1703.03400, section
    5.3): a pretrained and a random initialisation, fine-tuned, and an oracle that sees the task.
Run: python algos/multitask_ppo.py --env-id HalfCheetahDir-v0      (domain randomisation: the task is hidden)
    python algos/multitask_ppo.py --env-id HalfCheetahDir-v0 --task-given                         (the oracle)
Result: HalfCheetahVel after 0, 1, 3 steps of fine-tuning: -57, -43, -29 (maml_trpo.py: -58, -45, -39), oracle
    -16; HalfCheetahDir: 0, 0, 0, for it learns to stand still, the oracle 672 (MAML: -3, 669, 664) with
    `--horizon 200 --iterations 200 --lr 0.003`
Algorithm:
    [1] repeat: draw N tasks
    [2]     per task: sample E episodes with pi_theta, which sees the task if it is given
    [3]     per batch: advantages A by GAE over a linear baseline fitted to the task's own batch, normalised
    [4]     J = mean [ min(r A, clip(r, 1 - eps, 1 + eps) A) ], r = pi_theta(a|s) / pi_old(a|s),
            pi_old the policy that sampled the episodes
    [5]     several times over all of them, in random parts: theta <- one step of Adam on J + c H(pi_theta),
            the gradient's norm bounded, the step size falling to 0
    [6]     every eval_every iterations, per test task: the return after 0, 1, .. steps of fine-tuning, each
            of E episodes and SGD on J; in the first also from the random theta (`random/return_k0`, ..)
Symbols: eps = clip, c = entropy_coef, H = the entropy, lambda of [3] = gae_lambda.
Shapes: a suffix names a tensor's axes (obs_NETO): N tasks, E episodes per task, T steps, B = E * T samples,
    O observation, A action, P task vector, F features of the baseline, Y of time. The entries of parameter
    dicts gain N by fine-tuning.
Differs from usual PPO: the baseline is no network but that of maml_trpo.py, linear, refitted to each task's
    batch, so that the yardstick differs from the meta-learners in the objective. The horizon is part of
    the task, as there.
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
    """batches of all tasks"""
    meta_batch_size: int = 40
    """tasks per batch and per evaluation (N)"""
    episodes_per_task: int = 20
    """episodes per task, in training and in each step of fine-tuning (E); 20 in MAML's paper"""
    horizon: int = 100
    """steps of an episode (T); in MAML's paper 100 for navigation, 200 for locomotion"""
    hidden_size: int = 64
    """units of each of the two tanh layers"""
    action_scale: float = 10.0
    """worlds divide actions by it, then clip: at first noise spans a tenth of the bounds; navigation: 1"""
    task_given: bool = False
    """the oracle: the policy sees the task vector beside the observation"""
    lr: float = 1e-3
    """Adam's step size at the start; falls linearly to 0"""
    epochs: int = 10
    """passes over a batch; 10 in PPO's paper"""
    minibatches: int = 4
    """parts, of whole episodes, of a pass; one step of Adam on each"""
    clip: float = 0.2
    """ratios gain nothing beyond 1 +- clip (eps); 0.2 in PPO's paper"""
    entropy_coef: float = 0.0
    """weight of the policy's entropy (c); above 0 it keeps a policy that can still be fine-tuned"""
    max_grad_norm: float = 0.5
    """the gradient is shortened to this norm; 0.5 in OpenAI's baselines, and many other codes"""
    inner_lr: float = 0.1
    """step size of fine-tuning, of SGD; the meta-learners' alpha"""
    inner_epochs: int = 1
    """steps of SGD on each batch of fine-tuning; 1 is the policy gradient step that the meta-learners take"""
    gamma: float = 0.99
    """discount; 0.99 in all known codes"""
    gae_lambda: float = 0.95
    """lambda of GAE; 1, the return minus the baseline, in the papers, learns more slowly"""
    eval_every: int = 10
    """iterations from one evaluation and checkpoint to the next"""
    eval_steps: int = 3
    """steps of fine-tuning of an evaluation, each on fresh episodes"""
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
        ranges = dict.fromkeys(("gamma", "gae_lambda", "clip", "entropy_coef"), (0, 1)) | {"seed": (0, 2**31)}
        ranges["minibatches"] = (1, max(1, self.meta_batch_size * self.episodes_per_task))
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


def gain_and_entropy(theta: Params, minibatch: Episodes, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """J + c H, and both of them for the log."""
    gain = clipped_gain(theta, minibatch, args)
    mean_1A, std_1A = policy(theta, minibatch.obs[0, :1])  # one state: the entropy is the same in all
    entropy = normal(mean_1A, std_1A).entropy().sum()
    return gain + args.entropy_coef * entropy, {"train/gain": gain, "train/entropy": entropy}


def learn_all(
    envs, theta: Params, optimizer, batch: Episodes, args: Args, remaining: float, generator: Generator
) -> dict[str, Tensor]:
    """Epochs of PPO on all tasks together, which change theta in place; statistics of the last minibatch.

    The step size is lr times `remaining`, the share of the run that is still to come.
    """
    optimizer.param_groups[0]["lr"] = remaining * args.lr
    episodes = Episodes(*(x.flatten(0, 1) for x in batch))  # [N * E, ..]: their task no longer matters
    for _ in range(args.epochs):
        # Numbers of episodes: a new random order, cut into parts.
        for rows in envs.unwrapped.minibatches(len(episodes.mask), args.minibatches, generator):
            minibatch = Episodes(*(x[rows] for x in episodes))
            gradient, stats = grad(gain_and_entropy, has_aux=True)(theta, minibatch, args)
            for name, value in theta.items():
                value.grad = -gradient[name]  # Adam descends
            # Where A < 0 nothing bounds the ratio: one such gradient, in Adam's mean for ten steps, can
            # throw theta far off, most of all when the policy's standard deviation is small.
            torch.nn.utils.clip_grad_norm_(theta.values(), args.max_grad_norm)
            optimizer.step()  # [5]
    return stats


def evaluate(envs, theta: Params, args: Args) -> tuple[dict, Params]:
    """Fine-tune to the test tasks, the same tasks and noise in every run: metrics, parameters.

    A run logs the means of metrics over tasks; of a pair (x, tasks), here x is the gain of fine-tuning, half
    the 95 % interval of x's mean, for which equal tasks count as one.
    """
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    params = theta
    returns = []
    for k in range(args.eval_steps + 1):
        batch = collect(envs, tasks_NP, params, args, generator)
        returns.append(batch.reward.sum(-1).mean(1))  # [6]
        if k < args.eval_steps:
            params = ppo_step(params, batch, args)
    stats = {f"test/return_k{k}": return_N for k, return_N in enumerate(returns)}
    return stats | {"test/gain_ci95": (returns[-1] - returns[0], tasks_NP)}, params


def train(envs, args: Args, run, state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, fused=True)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        random = evaluate(envs, theta, args)[0] if iteration == 1 else {}  # theta is still random
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        run.doing("collecting")
        batch = collect(envs, tasks_NP, theta, args, generator)  # [2]
        run.doing("updating")
        remaining = 1 - (iteration - 1) / args.iterations
        stats = learn_all(envs, theta, optimizer, batch, args, remaining, generator)
        state["env_steps"] += envs.unwrapped.total(batch.mask)
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        stats["train/return_pre"] = batch.reward.sum(-1)
        stats["train/return_post"] = stats["train/return_pre"]  # there is no inner step in training
        stats |= {name.replace("test", "random"): x for name, x in random.items()}
        run.end_iteration(state, stats, evaluate=lambda: evaluate(envs, state["theta"], args)[0])


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import TaskGiven, make, multiply_by_onednn, records

    multiply_by_onednn()  # products of large matrices; on some processors twice as fast
    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    worlds = args.meta_batch_size * args.episodes_per_task
    envs = make(args.env_id, worlds, args.horizon, args.cuda, args.action_scale, physics=args.physics)
    if args.task_given:
        envs = TaskGiven(envs)
    generator = Generator().manual_seed(args.seed)
    theta = init_policy(envs, args.hidden_size, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)

    def examine() -> dict:
        return evaluate(envs, state["theta"], args)[0]

    with records.open_run(args, state, envs, unit="fine-tuning steps", evaluate=examine) as run:
        if not args.evaluate:
            train(envs, args, run, state)
        if args.capture_video:
            params = {name: value[0] for name, value in evaluate(envs, state["theta"], args)[1].items()}
            run.film(envs, policy, {"before": state["theta"], "after": params})


if __name__ == "__main__":
    main()
