"""A reward, with a memory, learned to raise newborn policies: by it they explore, then exploit.

Paper: Zheng et al. 2020, "What can learned intrinsic rewards capture?", arXiv:1912.05500, Algorithm 1.
Run: python algos/lifetime_rewards.py --env-id SymABC-v0      (--help explains every flag; --cuda: on the GPU)
Result: SymABC, mean of 50 episodes, each at its best alpha: 0.28, by r itself 0.21; last ten: 0.38, 0.36
Algorithm: a lifetime is many episodes of one task; its policy pi_theta is born random and learns from r_eta.
    [1] repeat, with N lifetimes of different ages that go on from iteration to iteration: U times,
    [2]     T steps with pi_theta, through the ends of episodes
    [3]     r_eta of each step: a function of the lifetime's history, that is of all (s, s', r, d) up to this
            step: the observations before and after it, the extrinsic reward, 1 if the episode ended, else 0
    [4]     theta <- theta + alpha grad mean[ log pi(a|s) (G - v) - (G - v)^2 / 2 + c_H entropy ], G = return
            of r_eta within the episode, bootstrapped by the policy's own value v after the T steps
    [5]     where a lifetime has ended: a new task, a newborn policy, an empty history
    [6]     A_life = GAE of r over V_phi(history), through the ends of episodes to the lifetime's;
            phi descends (A_life + V - V_phi)^2, where A_life + V is given
    [7]     eta ascends the gradient of mean log pi_theta(a|s) A_life, exact through the U updates [4]
    [8]     now and then: whole lifetimes of the test tasks, by r_eta and, to compare, by r in its place
Symbols: gamma (A_life) = gamma, gamma bar (G) = inner_gamma, U = unroll (the paper's N), T = steps;
    alpha = inner_lr, c_H = entropy_coef.
Shapes: a suffix names a tensor's axes (obs_NTO): N lifetimes, T steps, S = U T steps of a window, K = T + 1
    moments before and after T steps, O observation, A choices, C = A + 1 outputs of a policy, H units,
    I = 2 O + 2 inputs of a history, E episodes, P task vector.
In SymABC a policy may touch one of three objects in an episode, A, B or C, each worth -1 to 1 in this task:
    a lifetime pays if the first episodes try all. In the paper's RandomABC, C is always worth something.
Differs from the paper: r_eta = r + tanh(LSTM), near r at first (without "r +" it only learns to touch C
    in RandomABC); r_eta sees no actions, so that it suits other action sets; GAE, the paper's lambda is 1; no
    convolutions; one tanh layer, gradients of norm 1 at most; A_life is divided by its standard deviation.
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
from torch.func import grad

Params = dict[str, Tensor]  # of a network for all lifetimes; of N policies: w0 [N, O, H], b0 [N, H], ..
Memory = list[Tensor]  # an LSTM's two states, [1, N, H] each: torch's first axis is that of layers


@dataclass
class Args:
    env_id: str = "SymABC-v0"
    """a task environment of envs/ or your own (module:id, file.py:class) whose actions are choices"""
    seed: int = 1
    """seed of everything but the test set: networks, newborn policies, tasks, noise"""
    iterations: int = 1500
    """updates of the reward"""
    meta_batch_size: int = 128
    """lifetimes at once, of all ages, and those of an evaluation (N)"""
    episodes_per_lifetime: int = 50
    """in the paper 50 (ABC), 200 (Empty Rooms), 1,000 (non-stationary), 5,000 (Key-Box)"""
    horizon: int = 10
    """steps of an episode at most; in the paper 10 (ABC), 100 (others)"""
    steps: int = 4
    """steps of a trajectory, between two updates of a policy (T); in the paper 4 (ABC), 8, 16"""
    unroll: int = 10
    """updates of a policy that the meta-gradient goes through (U); 5 in the paper, N there"""
    policy_size: int = 32
    """units of a policy's tanh layer"""
    hidden_size: int = 64
    """units of the LSTM of the reward and of the lifetime value; 64 in the paper"""
    inner_lr: float = 1.0
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
    eval_every: int = 150
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """worlds and all else on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = dict.fromkeys(("gamma", "inner_gamma", "gae_lambda"), (0, 1)) | {"seed": (0, 2**31)}
        ranges |= {"entropy_coef": (0, 1e6), "unroll": (2, 1e6)}  # eta has no part in the first trajectory
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


class Trajectory(NamedTuple):
    """T steps of each of N lifetimes. After a lifetime's end its policy acts on, but the mask is 0."""

    obs: Tensor  # [N, T, O]
    action: Tensor  # [N, T] numbers of choices
    x: Tensor  # [N, T, I] obs, what the action led to (before any restart), reward, over: (s, s', r, d)
    reward: Tensor  # [N, T] extrinsic
    over: Tensor  # [N, T] 1 where the episode ended
    died: Tensor  # [N, T] 1 where the lifetime ended; at most once, an end of the next one is not marked
    mask: Tensor  # [N, T] 1 until then, that step included; 0 after it
    episode: Tensor  # [N, T] number of the episode in its lifetime
    obs_after: Tensor  # [N, O] after the T steps
    newborn: Params  # N policies to replace those whose lifetime ended; {} where none did


def init_policies(envs, args: Args, generator: Generator) -> Params:
    """theta: N newborn policies. Xavier-uniform first layer, near uniform choices, values near 0."""
    obs_size = envs.single_observation_space.shape[0]
    action_size = int(envs.single_action_space.n)
    N = envs.num_envs
    H = args.policy_size
    bound = math.sqrt(6 / (obs_size + H))
    theta = {
        "w0": bound * (2 * torch.rand(N, obs_size, H, generator=generator) - 1),
        "b0": torch.zeros(N, H),
        "w1": 0.01 * torch.randn(N, H, action_size + 1, generator=generator),
        "b1": torch.zeros(N, action_size + 1),
    }
    return {name: value.to(envs.unwrapped.device) for name, value in theta.items()}


def policies(theta: Params, obs_NTO: Tensor) -> tuple[Tensor, Tensor]:
    """Each lifetime's own policy: log-probabilities [N, T, A] of the choices, and values v [N, T]."""
    hidden_NTH = torch.tanh(torch.baddbmm(theta["b0"][:, None], obs_NTO, theta["w0"]))
    output_NTC = torch.baddbmm(theta["b1"][:, None], hidden_NTH, theta["w1"])
    logit_NTA = output_NTC[..., :-1]
    value_NT = output_NTC[..., -1]
    return torch.log_softmax(logit_NTA, -1), value_NT


def init_history(envs, args: Args, generator: Generator) -> Params:
    """Weights of an LSTM, each gate's orthogonal, and of a number read from it, which is near 0 at first."""
    H = args.hidden_size
    num_inputs = 2 * envs.single_observation_space.shape[0] + 2  # I
    weights = {}
    for name, columns in (("x", num_inputs), ("h", H)):
        gates = [torch.nn.init.orthogonal_(torch.empty(H, columns), generator=generator) for _ in range(4)]
        weights |= {f"w_{name}": torch.cat(gates), f"b_{name}": torch.zeros(4 * H)}
    return weights | {"w_out": 0.01 * torch.randn(H, generator=generator), "b_out": torch.zeros(1)}


def empty_memory(obs_NO: Tensor, args: Args) -> Memory:
    """At a lifetime's beginning."""
    zero_1NH = obs_NO.new_zeros(1, len(obs_NO), args.hidden_size)
    return [zero_1NH, zero_1NH]


def read_history(weights: Params, data: Trajectory, memory: Memory) -> tuple[Tensor, Memory]:
    """The network's number before the first and after each of T steps [N, K], and its memory after them."""
    lstm = [weights[name] for name in ("w_x", "w_h", "b_x", "b_h")]
    options = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "bidirectional": False}
    options |= {"batch_first": True, "train": True}  # train: without it, cuDNN has no gradient
    feature_NTH, h_1NH, c_1NH = torch.lstm(data.x, memory, lstm, **options)
    before_N1H = memory[0].transpose(0, 1)  # of an LSTM's two states, the first is its last feature
    feature_NKH = torch.cat([before_N1H, feature_NTH], 1)
    number_NK = feature_NKH @ weights["w_out"] + weights["b_out"]
    goes_on_N1 = 1 - data.died.sum(1, keepdim=True)
    return number_NK, [h_1NH * goes_on_N1, c_1NH * goes_on_N1]  # [5] an empty history


def gumbel_noise(*size: int, generator: Generator) -> Tensor:
    """Noise g = -log(x), x exponential: argmax(logits + g) is a draw from softmax(logits).

    For it is the argmin of x / exp(logit). These are exponential waiting times with rates exp(logit), each of
    which is the shortest with a probability in proportion to its rate.
    """
    return -(-torch.rand(*size, generator=generator).log()).log()


@torch.no_grad()
def play(envs, obs_NO: Tensor, theta: Params, args: Args, generator: Generator) -> Trajectory:
    """The next T steps of every lifetime. Nothing is learned."""
    N = len(obs_NO)
    A = theta["b1"].shape[1] - 1
    noise_TNA = gumbel_noise(args.steps, N, A, generator=generator).to(obs_NO)
    mask_N = torch.ones_like(obs_NO[:, 0])
    steps = []
    for noise_NA in noise_TNA:
        log_prob_N1A, _ = policies(theta, obs_NO[:, None])
        action_N = (log_prob_N1A.squeeze(1) + noise_NA).argmax(1)
        next_NO, reward_N, terminated, truncated, info = envs.step(action_N)  # [2]
        over_N = (terminated | truncated).to(obs_NO)
        died_N = info["born"].to(obs_NO) * mask_N  # where a lifetime ended, the next one is born
        x_NI = torch.cat([obs_NO, info["final_obs"], reward_N[:, None], over_N[:, None]], 1)
        step = {"obs": obs_NO, "action": action_N, "x": x_NI, "reward": reward_N, "over": over_N}
        steps.append(step | {"died": died_N, "mask": mask_N, "episode": info["episode"]})
        obs_NO = next_NO
        mask_N = mask_N - died_N
    played = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    newborn = {} if mask_N.all() else init_policies(envs, args, generator)
    return Trajectory(**played, obs_after=obs_NO, newborn=newborn)


def learned_reward(eta: Params, data: Trajectory, memory: Memory) -> tuple[Tensor, Memory]:
    """r_eta [N, T] of a trajectory's steps, which sees what they led to; the network's memory after them."""
    number_NK, memory = read_history(eta, data, memory)
    return data.reward + torch.tanh(number_NK[:, 1:]), memory  # [3]


def bootstrapped_returns(reward_NT: Tensor, end_NT: Tensor, after_N: Tensor, gamma: float) -> Tensor:
    """Discounted returns [N, T]: cut where `end` is 1, elsewhere with `after` as what follows the T steps."""
    tail_N = after_N
    tails = []
    for reward_N, end_N in zip(reversed(reward_NT.unbind(1)), reversed(end_NT.unbind(1)), strict=True):
        tail_N = reward_N + gamma * (1 - end_N) * tail_N
        tails.append(tail_N)
    return torch.stack(list(reversed(tails)), 1)


def per_network(x: Tensor, weights: Tensor) -> Tensor:
    """x [N], a number of each network, in the shape [N, 1, ..] that meets these weights [N, ..]."""
    return x.view(-1, *[1] * (weights.ndim - 1))


def log_prob_of(log_prob_NTA: Tensor, action_NT: Tensor) -> Tensor:
    """Log-probabilities [N, T] of the actions, from those of all choices."""
    return log_prob_NTA.take_along_dim(action_NT[..., None], -1).squeeze(-1)


def update_policies(theta: Params, data: Trajectory, reward_NT: Tensor, args: Args) -> tuple[Params, Tensor]:
    """The policies after a step on their trajectories, and log pi(a|s) [N, T] of those before it.

    Both are functions of theta and the rewards. The policy's own gradient takes G and the baseline v for
    numbers. But they depend on eta, by the rewards and by theta, and the meta-gradient passes through them:
    nothing here is detached.
    """
    before_NKA, value_NK = policies(theta, torch.cat([data.obs, data.obs_after[:, None]], 1))
    baseline_NT = value_NK[:, :-1]
    return_NT = bootstrapped_returns(reward_NT, data.over, value_NK[:, -1], args.inner_gamma)
    gain_NT = return_NT - baseline_NT

    def objective(weights: Params) -> Tensor:
        log_prob_NTA, value_NT = policies(weights, data.obs)
        entropy_NT = -(log_prob_NTA.exp() * log_prob_NTA).sum(-1)
        error_NT = 0.5 * (return_NT - value_NT).square()
        sum_NT = log_prob_of(log_prob_NTA, data.action) * gain_NT - error_NT + args.entropy_coef * entropy_NT
        return (data.mask * sum_NT).mean(1).sum()  # summed over lifetimes: each keeps its own gradient

    gradient = grad(objective)(theta)
    norm_N = sum(x.square().flatten(1).sum(1) for x in gradient.values()).add(1e-12).sqrt()
    alpha_N = args.inner_lr / (norm_N / args.inner_max_norm).clamp_min(1)  # shortens longer gradients
    ended_N = data.died.sum(1) > 0
    updated = {name: x + per_network(alpha_N, x) * gradient[name] for name, x in theta.items()}  # [4]
    for name, x in data.newborn.items():
        updated[name] = torch.where(per_network(ended_N, x), x, updated[name])  # [5]
    return updated, log_prob_of(before_NKA[:, :-1], data.action)


def learn_by_reward(eta: Params, theta: Params, memory: Memory, data: Trajectory, args: Args) -> tuple:
    """log pi_theta(a|s) [N, T] of a trajectory, and the policies and the reward's memory after it.

    These are functions of eta: theta_k played trajectory k, theta_k+1 = theta_k + alpha grad(theta_k, r_eta).
    So log pi_theta_k(a|s) depends on eta through k updates, and the gradient of its product with A_life is
    the paper's (3): A_life grad log pi_theta_k(a|s) dtheta_k / deta.
    """
    reward_NT, memory = learned_reward(eta, data, memory)
    theta, log_prob_NT = update_policies(theta, data, reward_NT, args)
    return log_prob_NT, theta, memory


def value_loss(phi: Params, window: list[Trajectory], memory: Memory, args: Args) -> tuple:
    """The loss of V, A_life [N, S] in units of its standard deviation, and V's memory after the window."""
    reward_NS = torch.cat([data.reward for data in window], 1)
    died_NS = torch.cat([data.died for data in window], 1)
    mask_NS = torch.cat([data.mask for data in window], 1)
    values = []
    for data in window:
        value_NK, memory = read_history(phi, data, memory)
        values.append(value_NK[:, :-1])  # V before each step
    value_NS = torch.cat(values, 1)
    known_NS = value_NS.detach()  # V as a number, not as a function of phi
    last_N1 = value_NK[:, -1:].detach()
    next_NS = torch.cat([known_NS[:, 1:], last_N1], 1)
    delta_NS = reward_NS + args.gamma * (1 - died_NS) * next_NS - known_NS
    zero_N = torch.zeros_like(delta_NS[:, 0])  # GAE's sum ends with the window; V after it is in delta
    gae_NS = bootstrapped_returns(delta_NS, died_NS, zero_N, args.gamma * args.gae_lambda)  # [6]
    advantage_NS = mask_NS * gae_NS
    loss = (mask_NS * (advantage_NS + known_NS - value_NS)).square().mean()
    return loss, advantage_NS / (advantage_NS.std() + 1e-6), memory


def meta_step(optimizer, phi: Params, memory: Memory, window: list, log_prob_NS: Tensor, args) -> tuple:
    """A step of Adam on phi, and on eta, which has made log_prob_NS; `memory` is V's before the window.

    Returns statistics, and V's memory after the window.
    """
    loss, advantage_NS, memory = value_loss(phi, window, memory, args)
    gain = (log_prob_NS * advantage_NS).mean()
    optimizer.zero_grad()
    (loss - gain).backward()  # only the loss depends on phi, and only the gain on eta
    optimizer.step()  # [7]
    earned = sum((data.mask * data.reward).sum() for data in window)
    episodes = sum((data.mask * data.over).sum() for data in window)
    stats = {"train/return_post": earned / episodes.clamp_min(1), "train/value_loss": loss}
    return stats, [x.detach() for x in memory]


def whole_lifetimes(envs, tasks_NP: Tensor, eta: Params | None, args: Args, generator: Generator) -> Tensor:
    """Returns [N, E] of all episodes from birth on; eta None: policies learn from their extrinsic rewards."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": tasks_NP})
    theta = init_policies(envs, args, generator)
    memory = empty_memory(obs_NO, args)
    return_NE = obs_NO.new_zeros(len(obs_NO), args.episodes_per_lifetime)
    alive_N1 = torch.ones_like(obs_NO[:, :1])  # 0: its lifetime is over, what follows does not count
    while alive_N1.any():
        data = play(envs, obs_NO, theta, args, generator)
        return_NE.scatter_add_(1, data.episode, data.reward * data.mask * alive_N1)
        reward_NT = data.reward
        if eta is not None:
            reward_NT, memory = learned_reward(eta, data, memory)
        theta, _ = update_policies(theta, data, reward_NT, args)
        obs_NO = data.obs_after
        alive_N1 = alive_N1 * (1 - data.died.sum(1, keepdim=True))
    return return_NE


def evaluate(envs, eta: Params, args: Args) -> dict[str, Tensor]:
    """Returns in tenths of test lifetimes, by the learned reward and by r; births and noise are equal."""
    stats = {}
    for name, weights in (("extrinsic", None), ("test", eta)):
        tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
        return_NE = whole_lifetimes(envs, tasks_NP, weights, args, generator)
        parts = return_NE.tensor_split(min(10, args.episodes_per_lifetime), 1)
        returns = [part.mean(1) for part in parts]
        stats |= {f"{name}/return_k{k}": return_N for k, return_N in enumerate(returns)}  # [8]
        stats[f"{name}/return_lifetime"] = return_NE
    stats["test/gain_ci95"] = returns[-1] - returns[0], tasks_NP  # logged: a 95 % interval over tasks
    return stats


def init_lifetimes(envs, args: Args, generator: Generator) -> dict:
    """The two networks, and N lifetimes of all ages: worlds, newborn policies, empty memories."""
    age_N = torch.randint(args.episodes_per_lifetime, (envs.num_envs,), generator=generator)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    obs_NO, _ = envs.reset(seed=seed, options={"episode": age_N})  # with training tasks, as at every birth
    return {
        "eta": init_history(envs, args, generator),
        "phi": init_history(envs, args, generator),
        "theta": init_policies(envs, args, generator),
        "memory": {"eta": empty_memory(obs_NO, args), "phi": empty_memory(obs_NO, args)},
        "worlds": envs.save_worlds(),
    }


def detached(params: Params) -> Params:
    return {name: x.detach() for name, x in params.items()}


def train(envs, test_envs, args: Args, run, state: dict) -> None:
    """The paper's Algorithm 1, from `state` on."""
    device = envs.unwrapped.device
    eta = {name: x.to(device, copy=True).requires_grad_() for name, x in state["eta"].items()}
    phi = {name: x.to(device, copy=True).requires_grad_() for name, x in state["phi"].items()}
    theta = {name: x.to(device) for name, x in state["theta"].items()}
    memory = {name: [x.to(device) for x in value] for name, value in state["memory"].items()}
    optimizer = torch.optim.Adam([{"params": list(eta.values())}, {"params": list(phi.values())}], fused=True)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    obs_NO = envs.load_worlds(state["worlds"])
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        remaining = 1 - (iteration - 1) / args.iterations
        optimizer.param_groups[0]["lr"] = remaining * args.lr
        optimizer.param_groups[1]["lr"] = remaining * args.value_lr
        window = []
        log_probs = []
        run.doing("collecting")
        for _ in range(args.unroll):  # [1]
            data = play(envs, obs_NO, theta, args, generator)
            log_prob_NT, theta, memory["eta"] = learn_by_reward(eta, theta, memory["eta"], data, args)
            obs_NO = data.obs_after
            window.append(data)
            log_probs.append(log_prob_NT)
        run.doing("updating")
        log_prob_NS = torch.cat(log_probs, 1)
        stats, memory["phi"] = meta_step(optimizer, phi, memory["phi"], window, log_prob_NS, args)
        theta = detached(theta)  # the next window's gradient ends here
        memory["eta"] = [x.detach() for x in memory["eta"]]
        state["env_steps"] += args.unroll * args.steps * len(obs_NO)
        state.update(eta=detached(eta), phi=detached(phi), optimizer=optimizer.state_dict(), theta=theta)
        state.update(memory=memory, worlds=envs.save_worlds(), generator=generator.get_state())
        run.end_iteration(state, stats, evaluate=lambda: evaluate(test_envs, state["eta"], args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import Lifetimes, make, records

    algorithm = Path(__file__).stem
    fixed = "meta_batch_size", "episodes_per_lifetime"  # worlds of a resumed run go on in their midst
    args, saved = records.parse(Args, argv, __doc__, algorithm, fixed)
    size = args.meta_batch_size, args.horizon, args.cuda
    envs = Lifetimes(make(args.env_id, *size, discrete=True, singly=True), args.episodes_per_lifetime)
    test_envs = Lifetimes(make(args.env_id, *size, discrete=True, singly=True), args.episodes_per_lifetime)
    if not envs.unwrapped.is_discrete:
        raise records.refusal(f"--env-id {args.env_id}: its actions are continuous, not choices")
    generator = Generator().manual_seed(args.seed)
    fresh = init_lifetimes(envs, args, generator) | {"generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device, evaluates=("eta",))

    def examine() -> dict:
        return evaluate(test_envs, state["eta"], args)

    with records.open_run(args, state, envs, unit="tenths of a lifetime", evaluate=examine) as run:
        if not args.evaluate:
            train(envs, test_envs, args, run, state)


if __name__ == "__main__":
    main()
