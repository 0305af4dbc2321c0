"""AD: a causal transformer that is shown learning histories, and learns to go on with them: to learn.

Paper: Laskin et al. 2022, arXiv:2210.14215: In-context Reinforcement Learning with Algorithm Distillation
Run: python algos/ad.py --env-id DarkRoomSmall-v0                (--help explains every flag; --cuda: the GPU)
Result: 9 x 9 room, held-out goals: return 0.4 in episode 1, 8.8 in episode 20 (Q-learning there: 0.3;
    goal known: 16.1)
Algorithm:
    [1] draw many training tasks; a source algorithm learns each from scratch, by tabular Q-learning
    [2]     of its history (s, a, r, s'), every k-th episode is kept, so that few episodes span real progress
    [3] repeat: draw N windows of C + 1 consecutive kept episodes from these histories
    [4]     L = -mean log M(a_t | s_t, h_t), h_t = what is in the window before step t
    [5]     theta <- one step of Adam on L, the gradient's norm clipped
    [6]     now and then, test tasks: h is empty. In each step the action is drawn from M(. | state, h),
    [7]         and h grows by the step; the latest C episodes are kept. No weight changes.
Symbols: theta = the weights of M, h = history or context, k = keep_every; of the source: alpha, gamma =
    source_lr, source_gamma, Q = its table, epsilon falls from 1 to 0 over a history.
Shapes: a suffix names a tensor's axes (x_NSI): N tasks, S positions of a context, O states (the
    places of the 1 in observations), I inputs of the network, F features of a state, Q of a query, J of a
    transition, H features in layers, A actions, E episodes, T steps, P task vector; C columns of a cache, U
    other features, G heads of width D; M source learners (M(..) is the network), L as many steps or
    episodes as the line says.
Differs from the paper (there in brackets): the source (A3C, DQN). One token for a step (three), which also
    tells how much of the episode has passed. In a grid a state is its column and row, both one-hot.
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
from torch.nn import functional

Params = dict[str, Tensor]
Memory = dict  # KV caches of a context, by their layers' names, and positions; {} for an empty one
HEAD_WIDTH = 16  # of the transformer's attention


@dataclass
class Args:
    env_id: str = "DarkRoomSmall-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, histories, noise"""
    iterations: int = 1500
    """updates"""
    meta_batch_size: int = 100
    """windows of histories per update, tasks per evaluation (N)"""
    episodes_per_trial: int = 20
    """episodes of a trial with a test task (E), at least 2"""
    context: int = 4
    """episodes before the running one that the network sees at most (C); E - 1 where that is less"""
    learners: int = 1000
    """source learners, all at once, each with a training task of its own (M)"""
    source_episodes: int = 300
    """episodes of a learning history"""
    keep_every: int = 30
    """of a history, the first of so many episodes in a row is kept (k)"""
    source_lr: float = 0.5
    """alpha of Q-learning"""
    source_gamma: float = 0.9
    """gamma of Q-learning; bandits want 0"""
    horizon: int | None = None
    """steps of an episode (T); default: the family's own, of a bandit 1"""
    layers: int = 2
    """blocks of the transformer"""
    hidden_size: int = 32
    """width of the transformer, a multiple of 16"""
    lr: float = 2e-3
    """Adam's step size at the start; falls linearly to 0"""
    max_grad_norm: float = 1.0
    """the gradient is shortened to this norm"""
    eval_every: int = 250
    """iterations from one evaluation and checkpoint to the next"""
    cuda: bool = False
    """network and worlds on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        ranges = {"seed": (0, 2**31), "episodes_per_trial": (2, 10**9)}
        ranges |= {"source_lr": (1e-12, 1), "source_gamma": (0, 1)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str | None) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")
        if math.ceil(self.source_episodes / self.keep_every) <= context_episodes(self):
            raise ValueError(f"--keep-every {self.keep_every}: allowed is what leaves C + 1 episodes")
        if self.hidden_size % HEAD_WIDTH:
            raise ValueError(f"--hidden-size {self.hidden_size}: allowed is a multiple of {HEAD_WIDTH}")


class Experience(NamedTuple):
    """S steps in a row of each of N tasks; states and actions are numbers."""

    state: Tensor  # [N, S]
    action: Tensor  # [N, S]
    reward: Tensor  # [N, S]
    next_state: Tensor  # [N, S]


class Examples(NamedTuple):
    """What M learns from: at each of S positions of N contexts."""

    x: Tensor  # [N, S, I] a query beside the latest transition of the context so far
    label: Tensor  # [N, S] the action to predict


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


def init_model(envs, args: Args, generator: Generator) -> Params:
    """theta: the transformer, and M's last layer: near uniform actions at first."""
    F = envs.unwrapped.state_features().shape[1]
    A = int(envs.single_action_space.n)
    num_inputs = (F + 1) + (2 * F + A + 1)  # a query's and a transition's
    theta = init_transformer(num_inputs, args, generator)
    num_positions = (context_episodes(args) + 1) * args.horizon
    theta["position"] = theta["position"][:num_positions].clone()
    return theta | {"w_policy": dense(A, args.hidden_size, generator, scale=0.01), "b_policy": torch.zeros(A)}


def context_episodes(args: Args) -> int:
    """Episodes before the running one that M sees at most; a trial has no more than E - 1."""
    return min(args.context, args.episodes_per_trial - 1)


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


def action_logits(theta: Params, x_NSI: Tensor, memory: Memory, args: Args) -> tuple[Tensor, Memory]:
    """M: logits of the actions [N, S, A] at S more positions of a context, and the memory with them."""
    feature_NSH, memory = transformer(theta, x_NSI, memory, args)
    return functional.linear(feature_NSH, theta["w_policy"], theta["b_policy"]), memory


def encode_queries(envs, state_NS: Tensor, step_NS: Tensor) -> Tensor:
    """What M is told of queries [N, S, Q]: their states, and how much of the episode has passed there."""
    feature_OF = envs.unwrapped.state_features()
    passed_NS = step_NS.to(feature_OF) / envs.unwrapped.horizon
    return torch.cat([feature_OF[state_NS], passed_NS[..., None]], 2)


def encode_transitions(envs, transitions: Experience) -> Tensor:
    """What M is told of transitions [N, S, J]."""
    feature_OF = envs.unwrapped.state_features()
    action_NSA = functional.one_hot(transitions.action, int(envs.single_action_space.n)).to(feature_OF)
    ends_NSU = torch.cat([feature_OF[transitions.state], feature_OF[transitions.next_state]], 2)
    return torch.cat([ends_NSU, action_NSA, transitions.reward[..., None]], 2)


def beside_the_last(query_NSQ: Tensor, transition_NLJ: Tensor) -> Tensor:
    """M's inputs [N, S, I]: each query, and the transition before it; beside the first, where none is, 0."""
    before_NSJ = functional.pad(transition_NLJ, (0, 0, 1, 0))[:, : query_NSQ.shape[1]]
    return torch.cat([query_NSQ, before_NSJ], 2)


def gumbel_noise(*size: int, generator: Generator) -> Tensor:
    """Noise g = -log(x), x exponential: argmax(logits + g) is a draw from softmax(logits).

    For it is the argmin of x / exp(logit). These are exponential waiting times with rates exp(logit), each of
    which is the shortest with a probability in proportion to its rate.
    """
    return -(-torch.rand(*size, generator=generator).log()).log()


@torch.no_grad()
def learning_histories(envs, tasks_NP: Tensor, args: Args, generator: Generator) -> Experience:
    """The source: tabular Q-learning from scratch in each task; every k-th episode of its history."""
    N, T = len(tasks_NP), args.horizon
    A = int(envs.single_action_space.n)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    worlds_N = torch.arange(N, device=tasks_NP.device)
    Q_NOA = torch.zeros(N, len(envs.unwrapped.state_features()), A).to(tasks_NP)
    steps = []
    for episode in range(args.source_episodes):
        explores_TN = torch.rand(T, N, generator=generator).to(tasks_NP) < 1 - episode / args.source_episodes
        noise_TNA = torch.rand(T, N, A, generator=generator).to(tasks_NP)
        obs_NO, _ = envs.reset(seed=None if episode else seed, options={"tasks": tasks_NP})
        for explores_N, noise_NA in zip(explores_TN, noise_TNA, strict=True):
            state_N = obs_NO.argmax(1)
            # At random with probability epsilon, else the best action; of equals one at random.
            value_NA = torch.where(explores_N[:, None], 0.0, Q_NOA[worlds_N, state_N])
            action_N = (value_NA + 1e-5 * noise_NA).argmax(1)
            obs_NO, reward_N, *_ = envs.step(action_N)
            next_N = obs_NO.argmax(1)
            # Q(s, a) <- Q(s, a) + alpha (r + gamma max_b Q(s', b) - Q(s, a)), for no state ends an episode
            target_N = reward_N + args.source_gamma * Q_NOA[worlds_N, next_N].amax(1)
            error_N = target_N - Q_NOA[worlds_N, state_N, action_N]
            Q_NOA[worlds_N, state_N, action_N] += args.source_lr * error_N
            if episode % args.keep_every == 0:  # [2]
                steps.append({"state": state_N, "action": action_N, "reward": reward_N, "next_state": next_N})
    return Experience(**{name: torch.stack([x[name] for x in steps], 1) for name in steps[0]})


def draw_windows(histories: Experience, args: Args, generator: Generator) -> Experience:
    """C + 1 episodes in a row from each of N histories."""
    M, L = histories.state.shape
    S = (context_episodes(args) + 1) * args.horizon
    size = (args.meta_batch_size, 1)
    learner_N1 = torch.randint(M, size, generator=generator).to(histories.state.device)
    first_N1 = args.horizon * torch.randint((L - S) // args.horizon + 1, size, generator=generator)
    step_NS = (first_N1 + torch.arange(S)).to(histories.state.device)
    return Experience(*(x[learner_N1, step_NS] for x in histories))  # [3]


def source_examples(envs, windows: Experience) -> Examples:
    """At each position of the windows the state there, and the action that the source took."""
    step_NS = torch.ones_like(windows.state).cumsum(1).sub(1) % envs.unwrapped.horizon
    x_NSI = beside_the_last(encode_queries(envs, windows.state, step_NS), encode_transitions(envs, windows))
    return Examples(x=x_NSI, label=windows.action)


def pretrain_step(theta: Params, optimizer, examples: Examples, args: Args, remaining: float) -> dict:
    """A step on theta, in place, towards the labels; `remaining` falls from 1 to 0. Statistics before it."""
    optimizer.param_groups[0]["lr"] = remaining * args.lr
    # Leaves of their own, so that theta itself asks for no gradients when M acts.
    weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
    logits_NSA, _ = action_logits(weights, examples.x, {}, args)
    loss_NS = functional.cross_entropy(logits_NSA.mT, examples.label, reduction="none")
    loss = loss_NS.mean()  # [4]
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for value, gradient in zip(theta.values(), gradients, strict=True):
        value.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(theta.values(), args.max_grad_norm)
    optimizer.step()  # [5]
    is_right_NS = logits_NSA.detach().argmax(2) == examples.label
    parts = {"loss": loss, "loss_at_end": loss_NS[:, -1].mean(), "accuracy": is_right_NS.float().mean()}
    return {f"train/{name}": float(x.detach()) for name, x in (parts | {"gradient_norm": norm}).items()}


@torch.no_grad()
def play_by_steps(envs, tasks_NP: Tensor, theta: Params, args: Args, generator, greedy=False) -> Tensor:
    """Returns [N, E] of trials. `greedy`: M's most probable actions in place of drawn ones."""
    N, T = len(tasks_NP), args.horizon
    C = context_episodes(args)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    size = args.episodes_per_trial * T, N, len(theta["b_policy"])
    noise_SNA = (torch.zeros(size) if greedy else gumbel_noise(*size, generator=generator)).to(tasks_NP)
    memory = {}  # [6]
    J = theta["w_in"].shape[1] - envs.unwrapped.state_features().shape[1] - 1
    latest_N1J = tasks_NP.new_zeros(N, 1, J)  # the latest transition of h; there is none yet
    queries, transitions, rewards = [], [], []  # of all steps so far
    with envs.unwrapped.one_thread():
        for episode in range(args.episodes_per_trial):
            if episode > C:  # the cache is full: begin another one, with the latest C episodes
                first = (episode - C) * T
                x_NLI = beside_the_last(torch.cat(queries[first:], 1), torch.cat(transitions[first:], 1))
                _, memory = action_logits(theta, x_NLI, {}, args)
            obs_NO, _ = envs.reset(seed=None if rewards else seed, options={"tasks": tasks_NP})
            for step in range(T):
                state_N1 = obs_NO.argmax(1, keepdim=True)
                queries.append(encode_queries(envs, state_N1, torch.full_like(state_N1, step)))
                x_N1I = torch.cat([queries[-1], latest_N1J], 2)
                logits_N1A, memory = action_logits(theta, x_N1I, memory, args)
                action_N1 = (logits_N1A + noise_SNA[len(rewards), :, None]).argmax(2)
                obs_NO, reward_N, *_ = envs.step(action_N1.squeeze(1))
                rewards.append(reward_N)
                next_N1 = obs_NO.argmax(1, keepdim=True)
                lived = {"state": state_N1, "action": action_N1, "reward": reward_N[:, None]}
                transitions.append(encode_transitions(envs, Experience(**lived, next_state=next_N1)))
                latest_N1J = transitions[-1]  # [7]
    return torch.stack(rewards, 1).unflatten(1, (-1, T)).sum(2)


def evaluate(envs, theta: Params, args: Args) -> dict[str, Tensor]:
    """Returns [N] of trials with the test tasks; pairs under ci95: for 95 % intervals over distinct tasks."""
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    return_NE = play_by_steps(envs, tasks_NP, theta, args, generator)
    greedy_N = play_by_steps(envs, tasks_NP, theta, args, generator, greedy=True).sum(1)
    stats = {"test/return_trial": return_NE.sum(1), "test/trial_ci95": (return_NE.sum(1), tasks_NP)}
    stats |= {"test/greedy_trial": greedy_N, "test/greedy_ci95": (greedy_N, tasks_NP)}
    stats |= {f"test/return_k{k}": return_N for k, return_N in enumerate(return_NE.unbind(1))}
    return stats | {"test/gain_ci95": (return_NE[:, -1] - return_NE[:, 0], tasks_NP)}


def train(envs, source_envs, args: Args, run, state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    theta = {name: value.to(envs.unwrapped.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, eps=1e-5, fused=True)
    optimizer.load_state_dict(state.get("optimizer", optimizer.state_dict()))
    generator = Generator()
    generator.set_state(state["generator"])
    run.doing("learning")
    # With the same flags of the source a resumed run has the same histories.
    own = Generator().manual_seed(args.seed)
    tasks_MP = source_envs.unwrapped.sample_tasks(args.learners, own, "train")  # [1]
    histories = learning_histories(source_envs, tasks_MP, args, own)
    state["env_steps"] = args.learners * args.source_episodes * args.horizon
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        windows = draw_windows(histories, args, generator)
        examples = source_examples(envs, windows)
        run.doing("updating")
        stats = pretrain_step(theta, optimizer, examples, args, 1 - (iteration - 1) / args.iterations)
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        reward_NLT = windows.reward.unflatten(1, (-1, args.horizon))  # of the source
        stats |= {"train/return_pre": reward_NLT[:, 0].sum(1), "train/return_post": reward_NLT[:, -1].sum(1)}
        run.end_iteration(state, stats, evaluate=lambda: evaluate(envs, state["theta"], args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import make, multiply_by_onednn, records

    multiply_by_onednn()  # products of large matrices; on some processors twice as fast
    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm)
    envs = make(args.env_id, args.meta_batch_size, args.horizon, args.cuda, discrete=True, tabular=True)
    source_envs = make(args.env_id, args.learners, args.horizon, args.cuda, discrete=True, tabular=True)
    generator = Generator().manual_seed(args.seed)
    theta = init_model(envs, args, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)

    with records.open_run(
        args, state, envs, unit="episodes of a trial", evaluate=lambda: evaluate(envs, state["theta"], args)
    ) as run:
        if not args.evaluate:
            train(envs, source_envs, args, run, state)


if __name__ == "__main__":
    main()
