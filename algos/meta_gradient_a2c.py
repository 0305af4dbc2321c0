"""Meta-gradient reinforcement learning: an actor-critic learns its own discount and lambda while it learns.

Paper: Xu, van Hasselt, Silver 2018, arXiv:1805.09801, Algorithm 1, with an advantage actor-critic (A2C).
Run: python algos/meta_gradient_a2c.py --env-id Corridor-v0   (--help explains every flag; --cuda: on the GPU)
Result: a corridor, gamma, learned from 0.8, ends at 0.98 and 0.99, return 1.00 and 0.91 (seeds 1,
    2; A2C with 0.8: 0.25, 0.25)
Algorithm:
    [1] repeat: T more steps of each of N worlds with pi_theta: tau
    [2]     tau is also what came of the last update: J' = mean (G_eta' - V(s; eta')) log pi_theta(a|s) on it,
            with returns of the fixed eta' = (gamma', lambda')
    [3]     eta <- eta + a step of Adam on (dJ'/dtheta) z
    [4]     lambda-returns of tau, G_eta and G_eta': G = r + gamma ((1 - lambda) V(s'; eta) + lambda G')
    [5]     L = -mean (G_eta - V(s; eta)) log pi_theta(a|s) - c_H entropy
                + c ((V_theta(s; eta) - G_eta)^2 + (V_theta(s; eta') - G_eta')^2) / 2
    [6]     theta' = theta + f(tau, theta, eta), f a step of Adam on L, its gradient clipped to a norm of 0.5
    [7]     z <- mu z + df/deta, through G_eta and all of f but Adam's second moment; then theta <- theta'
    [8]     now and then: returns of the first policy (k0) and of the present one (k1)
Symbols: eta = (gamma, lambda), as logits; alpha = lr of f, beta = meta_lr of eta; mu = trace; c = value_coef,
    c_H = entropy_coef; eta' = (reference_gamma, reference_lambda). theta holds pi and V, which is told eta.
Shapes: a suffix names a tensor's axes (obs_NTO): N worlds, T steps, O observation, A action (choices, or
    dimensions), P task vector, F features, W all of theta, K the meta-parameters, gamma and lambda; B returns
    of episodes that ended, S rows of all worlds and steps.
Differs from the paper: small networks, N worlds in step and Adam in place of IMPALA; the policy is not told
    eta; V also learns the returns of eta', so that J' has a baseline of its own.
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.func import grad, vjp
from torch.nn.functional import linear

Params = dict[str, Tensor]
CARRIED = "theta", "theta_adam", "eta", "eta_adam", "trace", "obs_moments", "sums"  # on the device


@dataclass
class Args:
    env_id: str = "Corridor-v0"
    """a task environment of envs/ or your own (module:id, file.py:class); of its tasks one is drawn"""
    seed: int = 1
    """seed of everything but the test set: parameters, task, start states, noise"""
    iterations: int = 250
    """updates, of num_worlds x rollout_steps steps each"""
    num_worlds: int = 16
    """worlds that play side by side (N)"""
    rollout_steps: int = 20
    """steps of each world between two updates (T)"""
    horizon: int = 40
    """steps of an episode at most"""
    gamma: float = 0.8
    """the first discount"""
    gae_lambda: float = 0.95
    """the first lambda of the returns"""
    learn: Literal["both", "gamma", "gae_lambda"] = "both"
    """which of them is learned; the other one stays"""
    meta_lr: float = 0.03
    """Adam's step size for gamma's and lambda's logits (beta); 0: A2C, whose V also learns G_eta'"""
    trace: float = 0.0
    """how much of the earlier updates' dependence on eta is kept (mu); 0: the last one's alone"""
    reference_gamma: float = 0.995
    """the discount by which eta is judged (gamma')"""
    reference_lambda: float = 1.0
    """the lambda by which eta is judged (lambda'); 1: by sums of rewards"""
    lr: float = 1e-3
    """Adam's step size for the policy and V (alpha)"""
    value_coef: float = 0.5
    """weight of V's squared errors (c)"""
    entropy_coef: float = 0.03
    """weight of the entropy (c_H); keeps choices from certainty"""
    normalize: bool = False
    """observations by their running moments; no good for one-hot observations"""
    eval_every: int = 50
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
        ranges = dict.fromkeys(("trace", "reference_gamma", "reference_lambda"), (0, 1))
        ranges |= dict.fromkeys(("gamma", "gae_lambda"), (0.0001, 0.9999))  # their logits stay small
        ranges |= dict.fromkeys(("meta_lr", "entropy_coef", "value_coef"), (0, 1e6)) | {"seed": (0, 2**31)}
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


class Returns(NamedTuple):
    """What an update by the returns of one pair (gamma, lambda) learns from."""

    pair: Tensor  # [K] gamma and lambda, as V is told them
    value: Tensor  # [N, T] V(s; pair)
    returns: Tensor  # [N, T] G


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


def init_actor_critic(envs, args: Args, generator: Generator) -> dict:
    """Everything that one iteration hands to the next, apart from the worlds themselves."""
    obs_size = envs.single_observation_space.shape[0]
    space = envs.single_action_space
    action_size = space.shape[0] if space.shape else int(space.n)
    theta = init_mlp("policy", obs_size, action_size, generator)
    theta |= init_mlp("value", obs_size + 2, 1, generator)  # V is told gamma and lambda, too
    if space.shape:
        theta["log_std"] = torch.zeros(action_size)
    theta_adam = init_adam(theta)
    eta = {"logits": torch.tensor([args.gamma, args.gae_lambda]).logit()}
    return {
        "theta": theta,  # pi and V
        "theta_adam": theta_adam,
        "eta": eta,
        "eta_adam": init_adam(eta),
        "trace": {"z": torch.zeros(len(theta_adam["mean"]), 2)},
        "obs_moments": init_moments(obs_size),
        "sums": {"return": torch.zeros(args.num_worlds)},  # of the episodes that run
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


def value_told(theta: Params, obs: Tensor, pair_K: Tensor) -> Tensor:
    """V(s; eta) [..] for obs [.., O]; the pair (gamma, lambda) is two more inputs: its logits, made small."""
    told_K = pair_K.logit(1e-4) / 5
    return mlp_output(theta, "value", torch.cat([obs, told_K.expand(*obs.shape[:-1], 2)], -1)).squeeze(-1)


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


def update_moments(moments: Params, x_SF: Tensor) -> Params:
    """Running mean and variance [F] of all rows so far, these included."""
    count = moments["count"] + len(x_SF)
    part = len(x_SF) / count
    shift_F = x_SF.mean(0) - moments["mean"]
    within_F = (1 - part) * moments["var"] + part * x_SF.var(0, correction=0)
    var_F = within_F + part * (1 - part) * shift_F**2
    return {"mean": moments["mean"] + part * shift_F, "var": var_F, "count": count}


def ended_returns(stream: Stream, sums: Params) -> tuple[Tensor, Params]:
    """Returns of the episodes that ended among these steps, and the sums with which the next steps go on."""
    returns = []
    for reward_N, done_N in zip(stream.reward.unbind(1), stream.done.unbind(1), strict=True):
        return_N = sums["return"] + reward_N
        returns.append(return_N)
        sums = {"return": return_N * ~done_N}
    return torch.stack(returns, 1)[stream.done], sums


def gae_weights(done_NT: Tensor, decay: float | Tensor) -> Tensor:
    """[N, T, T], GAE as a matrix: decay^(j - i) for steps j from i to the end of its episode, else 0."""
    episode_NT = done_NT.cumsum(1) - done_NT.long()  # how many episodes of the world ended before the step
    t_T = torch.arange(done_NT.shape[1], device=done_NT.device)
    weight_TT = (decay ** (t_T - t_T[:, None]).clamp_min(0)).triu()
    same_NTT = episode_NT[:, :, None] == episode_NT[:, None, :]
    return weight_TT * same_NTT


def lambda_returns(theta: Params, stream: Stream, pair_K: Tensor) -> Returns:
    """G = r + gamma ((1 - lambda) V(s') + lambda G'), as a function of the pair (gamma, lambda).

    G' is the next step's; V(s') takes its place where an episode or the steps end, and is 0 after a fall.
    G - V is the sum of the TD errors from the step on, weighted by powers of gamma lambda.
    """
    gamma, gae_lambda = pair_K
    told_K = pair_K.detach()  # so that eta acts through the returns alone, as in the paper
    value_NT = value_told(theta, stream.obs, told_K)
    next_value_NT = value_told(theta, stream.next_obs, told_K) * ~stream.fell
    delta_NT = stream.reward + gamma * next_value_NT - value_NT
    weight_NTT = gae_weights(stream.done, gamma * gae_lambda)
    return_NT = value_NT + (weight_NTT @ delta_NT[..., None]).squeeze(-1)  # [4]
    return Returns(pair=told_K, value=value_NT, returns=return_NT)


def policy_gradient_loss(theta: Params, stream: Stream, by: Returns) -> Tensor:
    """-J: what the steps say about the policy that played them, by some pair's returns."""
    return -((by.returns - by.value) * policy_of(theta, stream.obs).log_prob(stream.action)).mean()


def actor_critic_loss(theta: Params, stream: Stream, by: tuple[Returns, Returns], args: Args) -> Tensor:
    """L, by the returns of eta and of eta', which are constants in theta; only V learns from the latter."""
    entropy = policy_of(theta, stream.obs).entropy().mean()
    loss = policy_gradient_loss(theta, stream, by[0]) - args.entropy_coef * entropy
    for pair, _, return_NT in by:
        error_NT = value_told(theta, stream.obs, pair) - return_NT
        loss = loss + 0.5 * args.value_coef * error_NT.square().mean()
    return loss  # [5]


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


def updated(logits_K: Tensor, stream: Stream, by_reference: Returns, state: dict, args: Args) -> tuple:
    """theta' [W] as a function of eta; and beside it theta' by names, and its Adam's moments."""
    theta = state["theta"]
    by_eta = lambda_returns(theta, stream, logits_K.sigmoid())
    gradient = grad(actor_critic_loss)(theta, stream, (by_eta, by_reference), args)
    new_theta, new_adam = adam_step(theta, tuple(gradient.values()), state["theta_adam"], args.lr)  # [6]
    return torch.cat([x.flatten() for x in new_theta.values()]), (new_theta, new_adam)


def learn_eta(stream: Stream, by_reference: Returns, state: dict, args: Args) -> None:
    """A step of gamma and lambda, or of one of them, by what the last update has led to."""
    gradient = grad(policy_gradient_loss)(state["theta"], stream, by_reference)  # [2]
    gradient_W = torch.cat([x.flatten() for x in gradient.values()])
    learned = args.learn != "gae_lambda", args.learn != "gamma"
    slopes = zip(gradient_W @ state["trace"]["z"], learned, strict=True)
    gradient_K = torch.stack([slope * is_learned for slope, is_learned in slopes])
    eta, eta_adam = state["eta"], state["eta_adam"]
    state["eta"], state["eta_adam"] = adam_step(eta, (gradient_K,), eta_adam, args.meta_lr)  # [3]


def learn_theta(stream: Stream, by_reference: Returns, state: dict, args: Args) -> None:
    """An update of pi and V; and how it depends on gamma and lambda."""
    logits_K = state["eta"]["logits"]
    update = partial(updated, stream=stream, by_reference=by_reference, state=state, args=args)
    if args.meta_lr:
        # vjp gives u -> Jac^T u, which is linear in u: its own vjp is v -> Jac v, here of v = (1, 0), (0, 1).
        theta_W, jac_transposed, (theta, theta_adam) = vjp(update, logits_K, has_aux=True)
        _, jac = vjp(lambda u: jac_transposed(u)[0], theta_W)
        df_WK = torch.stack([jac(v_K)[0] for v_K in torch.ones_like(logits_K).diag()], 1)
        state["trace"] = {"z": args.trace * state["trace"]["z"] + df_WK}  # [7]
    else:
        _, (theta, theta_adam) = update(logits_K)
    state["theta"], state["theta_adam"] = theta, theta_adam


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
    returns = test_returns(envs, state, args)  # [8]
    stats = {"test/return_k0": state["first_returns"], "test/return_k1": returns}
    return stats | {"test/gain_ci95": returns - state["first_returns"]}


def train(envs, test_envs, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 1, from `state` on; `test_envs` are worlds of their own."""
    for part in CARRIED:
        state[part] = {name: x.to(envs.unwrapped.device) for name, x in state[part].items()}
    generator = Generator()
    generator.set_state(state["generator"])
    reference_K = torch.tensor([args.reference_gamma, args.reference_lambda]).to(state["eta"]["logits"])
    obs_NO, _ = envs.reset(seed=args.seed, options={"tasks": task_of_run(envs, args)})
    if "worlds" in state:  # a resumed run: in the midst of episodes
        obs_NO = envs.load_worlds(state["worlds"])
    if "first_returns" not in state:
        state["first_returns"] = test_returns(test_envs, state, args)
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        state["env_steps"] += args.num_worlds * args.rollout_steps
        obs_NO, stream = play_steps(envs, obs_NO, state, args.rollout_steps, generator)  # [1]
        by_reference = lambda_returns(state["theta"], stream, reference_K)
        if args.meta_lr and iteration > 1:
            learn_eta(stream, by_reference, state, args)
        learn_theta(stream, by_reference, state, args)
        gamma, gae_lambda = state["eta"]["logits"].sigmoid()
        stats = {"train/gamma": gamma, "train/lambda": gae_lambda}
        return_B, state["sums"] = ended_returns(stream, state["sums"])
        if len(return_B):
            stats["train/return_post"] = return_B
        if args.normalize:
            state["obs_moments"] = update_moments(state["obs_moments"], stream.raw_obs.flatten(0, 1))
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
    fresh = records.to(init_actor_critic(envs, args, generator), envs.unwrapped.device)
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
