"""DPT: a causal transformer that is shown what happened in a task, and learns to name the optimal action.

Paper: Lee et al. 2023, arXiv:2306.14892: Supervised Pretraining Can Learn In-Context Reinforcement Learning
Run: python algos/dpt.py --env-id Bandit5-v0                     (--help explains every flag; --cuda: the GPU)
Result: bandits of 5 arms, 100 pulls: drawn 73.7 (Thompson sampling 74.7), greedy 77.2 (Gittins index 78.4)
Algorithm:
    [1] repeat: draw N tasks, and let a behaviour policy play C episodes of each: context D = (s, a, s', r)
    [2]     it mixes random actions and those that are optimal in another task (in a bandit, always one arm)
    [3]     draw a query state at each position j of D; its label is the optimal action a* of the task there
    [4]     L = -mean log M(a* | query, D_:j) over all tasks and all beginnings D_:j of D
    [5]     theta <- one step of Adam on L, the gradient's norm clipped
    [6]     now and then, test tasks: D is empty. In each episode the actions are drawn from M(. | state, D);
    [7]         at its end D grows by the episode; the latest C are kept. No weight changes.
Symbols: theta = the weights of M, D = context, D_:j = its first j transitions, C = --context,
    episodes in D at most.
Shapes: a suffix names a tensor's axes (x_NSI): N tasks, S positions of a context, O states (the
    places of the 1 in observations), I inputs of the network, F features of a state, Q of a query, J of a
    transition, H features in layers, A actions, E episodes, T steps, P task vector; C columns of a cache, U
    other features, G heads of width D; L some of the S positions, or of the episodes.
Differs from the authors' code (theirs in brackets): fresh tasks and contexts in each iteration (a fixed set,
    shuffled). M reads at each position a query beside the latest transition, so that a cache of D serves all
    queries (the query is the first token). It is told how much of the query's episode has passed. MDPs:
    contexts are episodes from the start, by policies as in [2] (single transitions from random states), and
    M attends to earlier queries, too, at random states here and at visited ones when it acts. In
    a grid a state is its column and row, both one-hot (two numbers).
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
    env_id: str = "Bandit5-v0"
    """a task environment registered by envs/__init__.py"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, contexts, noise"""
    iterations: int = 1500
    """updates"""
    meta_batch_size: int = 100
    """tasks per update and per evaluation, a context of each (N); authors: 64"""
    episodes_per_trial: int = 100
    """episodes of a trial with a test task (E), at least 2"""
    context: int = 100
    """episodes in a context at most, the latest (C); E - 1 where that is less; authors' DarkRoom: 1"""
    policies: int = 1
    """behaviour policies of a context, one after another; MDPs want as many as episodes"""
    horizon: int | None = None
    """steps of an episode (T); default: the family's own, of a bandit 1"""
    layers: int = 2
    """blocks of the transformer; authors: 4"""
    hidden_size: int = 32
    """width of the transformer, a multiple of 16; authors: 32"""
    lr: float = 2e-3
    """Adam's step size at the start; falls linearly to 0; authors: 1e-4 for bandits, 1e-3 for DarkRoom"""
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
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, 10**9) if isinstance(value, int) else (1e-12, 1e6))
            if not isinstance(value, bool | str | None) and not low <= value <= high:
                allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")
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
def play_contexts(envs, tasks_NP: Tensor, args: Args, generator: Generator) -> Experience:
    """C episodes of each task by a behaviour policy, or by several in turn; S = C T."""
    family = envs.unwrapped
    N, T = len(tasks_NP), args.horizon
    C = context_episodes(args)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    # All noise at once and from this generator, so that a seed means the same actions on every device.
    noise_SNA = gumbel_noise(C * T, N, int(envs.single_action_space.n), generator=generator).to(tasks_NP)
    uniform_SN = torch.rand(C * T, N, generator=generator).to(tasks_NP)
    worlds_N = torch.arange(N, device=tasks_NP.device)
    steps = []
    for episode in range(C):  # [1]
        obs_NO, _ = envs.reset(seed=None if steps else seed, options={"tasks": tasks_NP})
        if episode * args.policies % C < args.policies:  # true in `policies` of the C episodes, evenly spaced
            # With probability w what is optimal in another task, else a draw from probabilities that are
            # Dirichlet(1, .., 1), that is, exponential numbers, normalised; w is one of 0, 0.1, .. 1.
            others_NP = family.sample_tasks(N, generator, "train")
            optimal_NTO = family.optimal_actions(others_NP)
            w_N = torch.randint(11, (N,), generator=generator).to(tasks_NP) / 10
            weight_NA = torch.rand(noise_SNA.shape[1:], generator=generator).log().neg().to(tasks_NP)
        for step in range(T):
            state_N = obs_NO.argmax(1)
            drawn_N = (weight_NA.log() + noise_SNA[len(steps)]).argmax(1)
            other_N = optimal_NTO[worlds_N, step, state_N]
            action_N = torch.where(uniform_SN[len(steps)] < w_N, other_N, drawn_N)  # [2]
            obs_NO, reward_N, *_ = envs.step(action_N)  # unlike Trials, it does not begin an episode itself
            next_N = obs_NO.argmax(1)
            steps.append({"state": state_N, "action": action_N, "reward": reward_N, "next_state": next_N})
    return Experience(**{name: torch.stack([x[name] for x in steps], 1) for name in steps[0]})


def optimal_examples(envs, tasks_NP: Tensor, contexts: Experience, generator: Generator) -> Examples:
    """At each position of the contexts, also after the last transition, a query and its optimal action."""
    N, S = len(tasks_NP), contexts.state.shape[1] + 1
    optimal_NTO = envs.unwrapped.optimal_actions(tasks_NP)
    _, num_steps, num_states = optimal_NTO.shape
    query_NS = torch.randint(num_states, (N, S), generator=generator).to(tasks_NP.device)
    step_NS = torch.randint(num_steps, (N, S), generator=generator).to(tasks_NP.device)
    worlds_N1 = torch.arange(N, device=tasks_NP.device)[:, None]
    label_NS = optimal_NTO[worlds_N1, step_NS, query_NS]  # [3]
    x_NSI = beside_the_last(encode_queries(envs, query_NS, step_NS), encode_transitions(envs, contexts))
    return Examples(x=x_NSI, label=label_NS)


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
def play_by_episodes(envs, tasks_NP: Tensor, theta: Params, args: Args, generator, greedy=False) -> Tensor:
    """Returns [N, E] of trials. `greedy`: M's most probable actions in place of drawn ones."""
    N, T = len(tasks_NP), args.horizon
    C = context_episodes(args)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    size = args.episodes_per_trial * T, N, len(theta["b_policy"])
    noise_SNA = (torch.zeros(size) if greedy else gumbel_noise(*size, generator=generator)).to(tasks_NP)
    memory = {}  # [6]
    J = theta["w_in"].shape[1] - envs.unwrapped.state_features().shape[1] - 1
    latest_N1J = tasks_NP.new_zeros(N, 1, J)  # the latest transition of D; there is none yet
    queries, transitions, rewards = [], [], []  # of all steps so far
    with envs.unwrapped.one_thread():
        for episode in range(args.episodes_per_trial):
            obs_NO, _ = envs.reset(seed=None if rewards else seed, options={"tasks": tasks_NP})
            for step in range(T):
                state_N1 = obs_NO.argmax(1, keepdim=True)
                queries.append(encode_queries(envs, state_N1, torch.full_like(state_N1, step)))
                x_N1I = torch.cat([queries[-1], latest_N1J], 2)
                # D is that of the episode's beginning: what this step adds to the memory is forgotten.
                logits_N1A, _ = action_logits(theta, x_N1I, memory, args)
                action_N1 = (logits_N1A + noise_SNA[len(rewards), :, None]).argmax(2)
                obs_NO, reward_N, *_ = envs.step(action_N1.squeeze(1))
                rewards.append(reward_N)
                next_N1 = obs_NO.argmax(1, keepdim=True)
                lived = {"state": state_N1, "action": action_N1, "reward": reward_N[:, None]}
                transitions.append(encode_transitions(envs, Experience(**lived, next_state=next_N1)))
            if episode + 1 < args.episodes_per_trial:  # [7]
                first = max(0, episode + 1 - C) * T  # step of D
                x_NLI = beside_the_last(torch.cat(queries[first:], 1), torch.cat(transitions[first:], 1))
                if first == 0:
                    x_NLI = x_NLI[:, -T:]  # the rest is in the memory
                _, memory = action_logits(theta, x_NLI, {} if first else memory, args)
                latest_N1J = transitions[-1]
    return torch.stack(rewards, 1).unflatten(1, (-1, T)).sum(2)


def evaluate(envs, theta: Params, args: Args) -> dict[str, Tensor]:
    """Returns [N] of trials with the test tasks; pairs under ci95: for 95 % intervals over distinct tasks."""
    tasks_NP, generator = envs.unwrapped.test_set(args.meta_batch_size)
    return_NE = play_by_episodes(envs, tasks_NP, theta, args, generator)
    greedy_N = play_by_episodes(envs, tasks_NP, theta, args, generator, greedy=True).sum(1)
    stats = {"test/return_trial": return_NE.sum(1), "test/trial_ci95": (return_NE.sum(1), tasks_NP)}
    stats |= {"test/greedy_trial": greedy_N, "test/greedy_ci95": (greedy_N, tasks_NP)}
    stats |= {f"test/return_k{k}": return_N for k, return_N in enumerate(return_NE.unbind(1))}
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
        tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")
        run.doing("collecting")
        contexts = play_contexts(envs, tasks_NP, args, generator)
        examples = optimal_examples(envs, tasks_NP, contexts, generator)
        run.doing("updating")
        stats = pretrain_step(theta, optimizer, examples, args, 1 - (iteration - 1) / args.iterations)
        state["env_steps"] += contexts.reward.numel()
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        reward_NLT = contexts.reward.unflatten(1, (-1, args.horizon))  # of the behaviour policies
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
    generator = Generator().manual_seed(args.seed)
    theta = init_model(envs, args, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, envs.unwrapped.device)

    with records.open_run(
        args, state, envs, unit="episodes of a trial", evaluate=lambda: evaluate(envs, state["theta"], args)
    ) as run:
        if not args.evaluate:
            train(envs, args, run, state)


if __name__ == "__main__":
    main()
