"""The tables and pictures of docs/dpt.md and docs/ad.md, from finished runs.

    python benchmark/in_context.py bandits runs/A ..            runs of dpt.py or ad.py on bandits of one kind: reward
                                                                and regret, drawn and greedy, seeds together, beside
                                                                classic algorithms
    python benchmark/in_context.py rooms runs/A runs/B ..       runs of both files, of rl2_ppo, rl2_transformer_ppo and
                                                                varibad_ppo on one dark room: return over the episodes,
                                                                seeds together, beside AD's source and the optimum
    python benchmark/in_context.py posterior --updates 2000     DPT on six bandits, where the best arm's posterior is
                                                                known: how far M is from it, and both as policies

A JSON line each; pictures go to docs/images. Trials are with test tasks, which no run was trained on, in `posterior`
with the six tasks themselves. Thompson sampling knows the prior and the noise, and draws from the exact posterior.
"""

import importlib
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import ad, dpt, rl2_ppo, rl2_transformer_ppo, varibad_ppo  # noqa: E402
from benchmark import classic_bandits  # noqa: E402
from benchmark.classic import summary  # noqa: E402
from benchmark.seeds import T975  # noqa: E402
from envs import Trials, make, records  # noqa: E402
from envs.bandit import Bandit, UniformGaussianBandit5  # noqa: E402

BERNOULLI, NORMAL = ("Bandit5-v0", "Bandit10-v0", "Bandit50-v0"), ("UniformGaussianBandit5-v0",)
ROOMS = ("DarkRoom-v0", "DarkRoomSmall-v0", "GridNavi-v0", "GridNaviUnseen-v0")
PLAY = {"dpt": dpt.play_by_episodes, "ad": ad.play_by_steps}
MEMORIES = {"rl2_ppo": rl2_ppo, "rl2_transformer_ppo": rl2_transformer_ppo, "varibad_ppo": varibad_ppo}  # in `rooms`
NAMES = {
    "dpt": "DPT",
    "ad": "AD",
    "rl2_ppo": "RL2",
    "rl2_transformer_ppo": "RL2, transformer",
    "varibad_ppo": "VariBAD",
}
IMAGES = ROOT / "docs/images"


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["bandits", "rooms", "posterior"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs"""
    tasks: int = 1000
    """trials, each with a test task"""
    updates: int = 2000
    """of DPT in `posterior`"""
    seed: int = 100
    """seed of the trials"""


def load(folder: Path, allowed: tuple[str, ...], others: tuple[str, ...] = ()):
    """The name of the file that made a run, the run's Args and its state; SystemExit for other runs."""
    if not (folder / "checkpoint.pt").exists():
        raise SystemExit(f"{folder} is no folder of a run: it has no checkpoint.pt")
    name = torch.load(folder / "checkpoint.pt", weights_only=True)["algorithm"]
    if name not in (*PLAY, *others):
        raise SystemExit(f"{folder} is a run of {name}; allowed are {', '.join((*PLAY, *others))}")
    state = records.load_checkpoint(str(folder), name, importlib.import_module(f"algos.{name}").Args, flag="run")
    if state["args"].env_id not in allowed:
        raise SystemExit(f"{folder} is a run on {state['args'].env_id}; allowed are {', '.join(allowed)}")
    return name, state["args"], state


def test_tasks(envs, options: Options) -> Tensor:
    """Drawn as test tasks are drawn, the same for all; not the fixed test set, whose first ones are extreme."""
    return envs.unwrapped.sample_tasks(options.tasks, Generator().manual_seed(options.seed), "test")


def played(name: str, args, theta: dict, options: Options, greedy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Test tasks [N, P], the returns of their trials [N, E] and the actions [N, S]."""
    envs = make(args.env_id, options.tasks, args.horizon, discrete=True, tabular=True)
    tasks_NP = test_tasks(envs, options)
    actions, step = [], envs.step

    def recorded(action):
        actions.append(action)
        return step(action)

    envs.step = recorded
    # Another seed: the tasks' own would repeat the numbers that made them.
    return_NE = PLAY[name](envs, tasks_NP, theta, args, Generator().manual_seed(options.seed + 1), greedy)
    return tasks_NP, return_NE, torch.stack(actions, 1)


def classic_arms(p_BK: Tensor, n: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Arms [B, n] and total rewards [B] of the yardsticks on these bandits; UCB1 is tuned on others."""
    generator, chosen = Generator().manual_seed(seed), {}
    for label, name in (("Thompson", "thompson"), ("Gittins", "gittins"), ("UCB1", "ucb1")):
        policy = getattr(classic_bandits, name)
        if name in classic_bandits.GRIDS:
            other_BK = torch.rand(1000, p_BK.shape[1], generator=generator)
            choices = [partial(policy, strength=strength) for strength in classic_bandits.GRIDS[name]]
            policy = max(choices, key=lambda choice: classic_bandits.run(choice, other_BK, n, generator).mean())
        chosen[label] = classic_bandits.play(policy, p_BK, n, generator)
    return chosen


def truncated_normal(mean: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """Draws from N(mean, std^2) given that it lies in [0, 1], by the inverse of its distribution function; float64."""
    low, high = ((edge - mean) / std for edge in (0.0, 1.0))
    below, above = torch.special.ndtr(low), torch.special.ndtr(high)
    uniform = torch.rand(mean.shape, generator=generator, dtype=mean.dtype)
    return (mean + std * torch.special.ndtri(below + uniform * (above - below))).clamp(0, 1)


def play_normal(scores, mean_BK: Tensor, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Arms [B, n] and total rewards [B] where each pull goes to the highest score of sums, pulls and time."""
    sum_BK, pulls_BK, arms = torch.zeros_like(mean_BK), torch.zeros_like(mean_BK), []
    for t in range(n):
        arm_B1 = scores(sum_BK, pulls_BK, t, generator).argmax(1, keepdim=True)
        noise_B1 = torch.randn(arm_B1.shape, generator=generator, dtype=mean_BK.dtype)
        sum_BK.scatter_add_(1, arm_B1, mean_BK.gather(1, arm_B1) + UniformGaussianBandit5.noise * noise_B1)
        pulls_BK.scatter_add_(1, arm_B1, torch.ones_like(noise_B1))
        arms.append(arm_B1)
    return torch.cat(arms, 1), sum_BK.sum(1)


def normal_thompson(sum_BK, pulls_BK, t, generator):
    """A draw from the posterior of each arm's mean: uniform before, then the likelihood's normal within [0, 1]."""
    mean_BK, std_BK = sum_BK / pulls_BK.clamp(min=1), UniformGaussianBandit5.noise / pulls_BK.clamp(min=1).sqrt()
    uniform_BK = torch.rand(sum_BK.shape, generator=generator, dtype=sum_BK.dtype)
    return torch.where(pulls_BK > 0, truncated_normal(mean_BK, std_BK, generator), uniform_BK)


def normal_ucb(sum_BK, pulls_BK, t, generator, *, strength):
    """Mean + c sqrt(2 log t / pulls), after one pull of each arm (Auer et al. 2002, with c in place of 1)."""
    bound_BK = strength * (2 * math.log(t + 1) / pulls_BK.clamp(min=1)).sqrt()
    return torch.where(pulls_BK > 0, sum_BK / pulls_BK.clamp(min=1) + bound_BK, torch.inf)


def normal_arms(mean_BK: Tensor, n: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """As `classic_arms`, for rewards with normal noise; no index of Gittins."""
    generator, mean_BK = Generator().manual_seed(seed), mean_BK.double()
    other_BK = torch.rand(1000, mean_BK.shape[1], generator=generator, dtype=mean_BK.dtype)
    choices = [partial(normal_ucb, strength=strength) for strength in classic_bandits.GRIDS["ucb1"]]
    ucb = max(choices, key=lambda choice: play_normal(choice, other_BK, n, generator)[1].mean())
    return {
        "Thompson": play_normal(normal_thompson, mean_BK, n, generator),
        "UCB1": play_normal(ucb, mean_BK, n, generator),
    }


def regret(p_BK: Tensor, arm_BS: Tensor) -> Tensor:
    """What always pulling the best arm would have paid more, expected of the arms pulled, after each pull [B, S]."""
    return (p_BK.amax(1, keepdim=True) - p_BK.gather(1, arm_BS)).cumsum(1)


def bandits(options: Options) -> None:
    """A line for each run and one of the yardsticks; a picture of the regrets, runs of one file together."""
    loaded = [(folder, *load(folder, BERNOULLI + NORMAL)) for folder in options.runs]
    kinds = {(args.env_id, args.episodes_per_trial * args.horizon) for _, _, args, _ in loaded}
    if len(kinds) != 1:
        raise SystemExit(f"runs on one kind of bandits and as many pulls are needed; these have {sorted(kinds)}")
    (env_id, n), regrets = kinds.pop(), {}
    for folder, name, args, state in loaded:
        result = {"run": folder.name, "env_id": env_id, "pulls": n, "tasks": options.tasks}
        for label, greedy in ((f"{name.upper()}, drawn", False), (f"{name.upper()}, greedy", True)):
            p_BK, return_NE, arm_BS = played(name, args, state["theta"], options, greedy)
            regret_BS = regret(p_BK, arm_BS)
            result[label] = {"reward": summary(return_NE.sum(1)), "regret": summary(regret_BS[:, -1])}
            regrets.setdefault(label, []).append(regret_BS.mean(0))
        print(json.dumps(result), flush=True)
    result = {"env_id": env_id, "pulls": n, "tasks": options.tasks}
    yardsticks = normal_arms if env_id in NORMAL else classic_arms
    for label, (arm_BS, total_B) in yardsticks(p_BK, n, options.seed + 2).items():
        regret_BS = regret(p_BK, arm_BS)
        result[label] = {"reward": summary(total_B), "regret": summary(regret_BS[:, -1])}
        regrets[label] = [regret_BS.mean(0)]
    print(json.dumps(result), flush=True)
    axis = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for label, means in regrets.items():
        style = "-" if len(means) > 1 or label.split(",")[0].lower() in PLAY else "--"
        axis.plot(range(1, n + 1), torch.stack(means).mean(0), label=label, ls=style)
    axis.set(xlabel="pulls", ylabel="regret", title=f"{env_id}, {options.tasks} test tasks")
    axis.legend()
    figure.savefig(IMAGES / f"in_context_regret_{env_id.removesuffix('-v0')}_{n}.png", dpi=110)


def optimum(envs, tasks_NP: Tensor) -> Tensor:
    """The return [N] of whoever knows the goal."""
    obs, _ = envs.reset(seed=0, options={"tasks": tasks_NP})
    action_NTO, rewards = envs.unwrapped.optimal_actions(tasks_NP), []
    for step in range(envs.unwrapped.horizon):
        action = action_NTO[:, step].gather(1, obs.argmax(1, keepdim=True)).squeeze(1)
        obs, reward, *_ = envs.step(action)
        rewards.append(reward)
    return torch.stack(rewards).sum(0)


def source_returns(args, options: Options) -> Tensor:
    """The return of every episode [N, E] of AD's source learners, on the same test tasks."""
    envs = make(args.env_id, options.tasks, args.horizon, discrete=True, tabular=True)
    every = ad.Args(**vars(args) | {"keep_every": 1})
    lived = ad.learning_histories(envs, test_tasks(envs, options), every, Generator().manual_seed(options.seed + 2))
    return lived.reward.unflatten(1, (-1, args.horizon)).sum(2)


def remembered(name: str, args, state: dict, options: Options) -> Tensor:
    """The returns [N, E] of the same trials by a network with a memory, which draws its actions."""
    envs = Trials(make(args.env_id, options.tasks, args.horizon, discrete=True), args.episodes_per_trial)
    weights = [state["phi"], state["theta"]] if name == "varibad_ppo" else [state["theta"]]
    module, generator = MEMORIES[name], Generator().manual_seed(options.seed + 1)
    play = module.play_with_beliefs if name == "varibad_ppo" else module.play_trials
    return play(envs, test_tasks(envs, options), *weights, args, generator)[-1]


def over_seeds(means_RE: Tensor) -> dict:
    """The mean over runs of their episodes' mean returns [R, E], and half its 95 % interval: Student's t."""
    R = len(means_RE)
    half_E = T975[R] * means_RE.std(0) / R**0.5 if R > 1 else torch.full_like(means_RE[0], torch.nan)
    rounded = [[round(float(x), 2) for x in numbers] for numbers in (means_RE.mean(0), half_E)]
    return {"runs": R, "episodes": rounded[0]} | ({"half_widths": rounded[1]} if R > 1 else {})


def rooms(options: Options) -> None:
    """A line for each run and manner to act, the mean over seeds of each, AD's source, the optimum; a picture."""
    loaded = [(folder, *load(folder, ROOMS, tuple(MEMORIES))) for folder in options.runs]
    kinds = {(args.env_id, args.horizon) for _, _, args, _ in loaded}
    if len(kinds) != 1:
        raise SystemExit(f"runs in one room and of one horizon are needed; these have {sorted(kinds)}")
    (env_id, horizon), every, source = kinds.pop(), {}, None
    envs = make(env_id, options.tasks, horizon, discrete=True, tabular=True)
    tasks_NP = test_tasks(envs, options)
    for folder, name, args, state in loaded:
        for label in ("drawn", "greedy") if name in PLAY else ("drawn",):
            if name in PLAY:
                _, return_NE, _ = played(name, args, state["theta"], options, greedy=label == "greedy")
            else:
                return_NE = remembered(name, args, state, options)
            ends = {"first": summary(return_NE[:, 0]), "last": summary(return_NE[:, -1])}
            line = {"run": folder.name, "actions": label, "goals": len(tasks_NP.unique(dim=0)), **ends}
            print(json.dumps(line | {"episodes": [round(float(x), 2) for x in return_NE.mean(0)]}), flush=True)
            every.setdefault((name, label, return_NE.shape[1]), []).append(return_NE.mean(0))
        if name == "ad" and source is None:
            source = source_returns(args, options).mean(0)
            means = [round(float(x), 2) for x in source]
            print(json.dumps({"run": folder.name, "source": True, "episodes": means}), flush=True)
    best = optimum(envs, tasks_NP)
    axis = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    colors = {name: f"C{number}" for number, name in enumerate(NAMES)}
    for (name, label, count), means in every.items():
        means_RE = torch.stack(means)
        print(json.dumps({"algorithm": name, "actions": label} | over_seeds(means_RE)), flush=True)
        episodes, style = range(1, count + 1), {"color": colors[name], "ls": "--" if label == "greedy" else "-"}
        axis.plot(episodes, means_RE.mean(0), label=f"{NAMES[name]}{', greedy' if label == 'greedy' else ''}", **style)
        axis.fill_between(episodes, means_RE.amin(0), means_RE.amax(0), color=colors[name], alpha=0.15, lw=0)
    if source is not None:
        shown = source[: max(count for _, _, count in every)]
        axis.plot(range(1, len(shown) + 1), shown, label="source of AD, from its start", color="grey")
    print(json.dumps({"optimum": summary(best)}), flush=True)
    axis.axhline(float(best.mean()), color="black", lw=0.8, label="goal known")
    axis.set(xlabel="episode of a trial", ylabel="return", title=f"{env_id}, held-out goals")
    axis.legend()
    figure.savefig(IMAGES / f"in_context_{env_id.removesuffix('-v0')}.png", dpi=110)


class SixBandits(Bandit):
    """Six tasks of three arms each; the best arm is not known from one pull."""

    arms = 3
    chances = torch.tensor(
        [[0.9, 0.2, 0.4], [0.7, 0.6, 0.1], [0.1, 0.8, 0.5], [0.4, 0.6, 0.3], [0.3, 0.3, 0.7], [0.6, 0.1, 0.9]],
        dtype=torch.float32,
    )

    def sample_tasks(self, num_tasks, generator, split="train"):
        return self.chances[torch.randint(6, (num_tasks,), generator=generator)].to(self.dtype)


def posterior(action_NS: Tensor, reward_NS: Tensor) -> Tensor:
    """The probability of each arm to be the best of its task [N, S + 1, A], before each pull and at the end: Bayes."""
    chance_NSM = SixBandits.chances.T[action_NS]  # of a 1, in each of the six tasks
    log_NSM = torch.where(reward_NS[..., None] > 0, chance_NSM, 1 - chance_NSM).log().cumsum(1)
    belief = torch.nn.functional.pad(log_NSM, (0, 0, 1, 0)).softmax(2)
    return belief @ torch.nn.functional.one_hot(SixBandits.chances.argmax(1), SixBandits.arms).to(belief)


def learn_posterior(updates: int, pulls: int = 10, seed: int = 1, num: int = 200):
    """DPT on the six bandits; its Args, worlds and weights."""
    sizes = {"horizon": 1, "episodes_per_trial": pulls + 1, "hidden_size": 32, "meta_batch_size": num}
    args = dpt.Args(**sizes, iterations=updates, lr=4e-3)
    envs, generator = SixBandits(num, 1), Generator().manual_seed(seed)
    theta = dpt.init_model(envs, args, generator)
    optimizer = torch.optim.Adam(theta.values(), args.lr, eps=1e-5)
    for update in range(updates):
        tasks_NP = envs.sample_tasks(num, generator)
        lived = dpt.play_contexts(envs, tasks_NP, args, generator)
        examples = dpt.optimal_examples(envs, tasks_NP, lived, generator)
        dpt.pretrain_step(theta, optimizer, examples, args, 1 - update / updates)
    return args, envs, theta


@torch.no_grad()
def divergence(args, theta: dict, num: int, seed: int) -> Tensor:
    """KL(exact posterior || M) in nats [S + 1], for each number of transitions in contexts by the behaviour policy."""
    envs, generator = SixBandits(num, 1), Generator().manual_seed(seed)
    tasks_NP = envs.sample_tasks(num, generator)
    lived = dpt.play_contexts(envs, tasks_NP, args, generator)
    examples = dpt.optimal_examples(envs, tasks_NP, lived, generator)
    log_NSA = dpt.action_logits(theta, examples.x, {}, args)[0].log_softmax(2)
    exact_NSA = posterior(lived.action, lived.reward)
    return (exact_NSA * (exact_NSA.log() - log_NSA)).sum(2).mean(0)


def thompson_rewards(tasks_NP: Tensor, pulls: int, generator: Generator) -> Tensor:
    """Total rewards [N] of exact Thompson sampling on the six bandits: arms drawn from the exact posterior."""
    arms, rewards = tasks_NP.new_zeros(len(tasks_NP), 0, dtype=torch.int64), tasks_NP.new_zeros(len(tasks_NP), 0)
    for _ in range(pulls):
        arm = torch.multinomial(posterior(arms, rewards)[:, -1], 1, generator=generator)
        paid = (torch.rand(arm.shape, generator=generator) < tasks_NP.gather(1, arm)).to(tasks_NP)
        arms, rewards = torch.cat([arms, arm], 1), torch.cat([rewards, paid], 1)
    return rewards.sum(1)


def compare_with_posterior(options: Options) -> None:
    args, _, theta = learn_posterior(options.updates)
    apart = divergence(args, theta, 5000, options.seed)
    envs, generator = SixBandits(options.tasks, 1), Generator().manual_seed(options.seed + 1)
    tasks_NP = envs.sample_tasks(options.tasks, generator)
    rewards = dpt.play_by_episodes(envs, tasks_NP, theta, args, generator).sum(1)
    thompson = thompson_rewards(tasks_NP, args.episodes_per_trial, generator)
    result = {"updates": options.updates, "kl_mean": round(float(apart.mean()), 4)}
    result |= {"kl_by_pulls": [round(float(x), 4) for x in apart], "pulls": args.episodes_per_trial}
    result |= {"dpt_reward": summary(rewards), "thompson_reward": summary(thompson)}
    print(json.dumps(result | {"difference": summary(rewards - thompson)}), flush=True)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    {"bandits": bandits, "rooms": rooms, "posterior": compare_with_posterior}[options.what](options)
