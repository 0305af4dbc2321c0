"""What a memory discovers: RL2 in two experiments of psychology, beside agents that are known. docs/emergence.md.

    python benchmark/emergence.py two_step runs/A [runs/B ..]      does a reward count for the way it came by?
    python benchmark/emergence.py harlow runs/A [runs/B ..]        right choices by trial, while the network trains

Both write what they found into results/emergence/ and a picture into docs/images/. Several runs are seeds of one
setting.

Two-step (Daw et al. 2011): a choice leads to one of two places, usually to its own, and one of them pays better. Who
repeats what was rewarded stays after every reward. Who knows the ways stays after a reward that came by the common way,
and leaves after one that came by a rare way: for him reward and way interact. A linear regression of the choice on the
last five trials says which of the two an agent is, by the weight of choice x reward x way. (With the last trial alone,
patience looks like knowledge: who chose well for long came by common ways and was rewarded, and goes on so.)
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.classic import summary  # noqa: E402
from benchmark.rl2 import IMAGES, load, require  # noqa: E402
from envs import Trials, make, records  # noqa: E402
from envs.experiments import HIGH, LOW, REVERSAL  # noqa: E402

RESULTS = ROOT / "benchmark/results/emergence"
TRIALS = 100
RATES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # alpha and beta of the model-free agent: a grid whose best is not at an edge
SLOPES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
LEVELS = (0.6, 0.7, 0.8, 0.9, 0.95)  # of right choices in Harlow's second trial, whose stages are drawn
LAGS = 5  # trials that the regression looks back


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["two_step", "harlow"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of rl2_ppo.py or rl2_transformer_ppo.py on this task"""
    worlds: int = 1000
    """worlds that are played, of 100 trials each"""
    seed: int = 100
    """seed of the worlds and of the agents' choices"""


class Choices(NamedTuple):
    """The trials of N worlds, one after the other."""

    choice: Tensor  # [N, T] 0 or 1
    place: Tensor  # [N, T] where it led
    reward: Tensor  # [N, T]


# ---------------------------------------------------------------- agents


def model_free(past: list[tuple[Tensor, Tensor, Tensor]], rate: float, slope: float) -> Tensor:
    """Q-learning, TD(1): the probability [N] of choice 1. A choice's value moves to its reward, by whatever way.

    `past` has choice, place and reward [N] of each earlier trial; alpha is `rate`, beta of the softmax `slope`.
    """
    q_N2 = torch.full((len(past[0][0]), 2), 0.5) if past else torch.full((1, 2), 0.5)
    for choice_N, _, reward_N in past:
        old_N1 = q_N2.gather(1, choice_N[:, None])
        q_N2 = q_N2.scatter(1, choice_N[:, None], old_N1 + rate * (reward_N[:, None] - old_N1))
    return torch.sigmoid(slope * (q_N2[:, 1] - q_N2[:, 0]))


def belief(past: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The probability [N] that place 1 pays better now, by Bayes' rule: what can be known."""
    one_N = torch.full((len(past[0][0]),), 0.5) if past else torch.full((1,), 0.5)
    for _, place_N, reward_N in past:
        if_one_N = torch.where(place_N == 1, HIGH, LOW)  # the probability of a reward there, if place 1 is better
        if_zero_N = torch.where(place_N == 0, HIGH, LOW)
        like_one_N = torch.where(reward_N > 0, if_one_N, 1 - if_one_N)
        like_zero_N = torch.where(reward_N > 0, if_zero_N, 1 - if_zero_N)
        now_N = one_N * like_one_N / (one_N * like_one_N + (1 - one_N) * like_zero_N)
        one_N = now_N * (1 - REVERSAL) + (1 - now_N) * REVERSAL
    return one_N


def planner(past: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Knows the ways: the probability [N] of choice 1, which is 1 where place 1 is believed to be better."""
    one_N = belief(past)
    return torch.where(one_N == 0.5, 0.5, (one_N > 0.5).to(one_N))


def play(agent: Callable, options: Options, seed: int) -> Choices:
    """An agent's choices in new worlds."""
    generator = Generator().manual_seed(seed)
    envs = make("TwoStep-v0", options.worlds, 2 * TRIALS, discrete=True)
    envs.reset(seed=seed, options={"tasks": envs.unwrapped.sample_tasks(options.worlds, generator, "test")})
    past = []
    for _ in range(TRIALS):
        choice_N = (torch.rand(options.worlds, generator=generator) < agent(past)).long()
        obs, *_ = envs.step(choice_N)
        _, reward_N, *_ = envs.step(choice_N)
        past.append((choice_N, obs[:, 2].long(), reward_N))
    return Choices(*(torch.stack(column, 1) for column in zip(*past, strict=True)))


def play_run(folder: Path, options: Options) -> Choices:
    """A trained network's choices in new worlds, drawn as in its training."""
    module, args, state = load(folder)
    envs = make("TwoStep-v0", options.worlds, 2 * TRIALS, discrete=True)
    generator = Generator().manual_seed(options.seed)
    tasks_NP = envs.unwrapped.sample_tasks(options.worlds, generator, "test")
    steps, return_NE = module.play_trials(Trials(envs, 1), tasks_NP, state["theta"], args, generator)
    before_NT = steps.x[:, 2::2, -2]  # the previous reward, as the network sees it at the start of the next trial
    reward_NT = torch.cat([before_NT, return_NE - before_NT.sum(1, keepdim=True)], 1)
    place_NT = steps.x[:, 1::2, 2].long()
    return Choices(steps.action[:, ::2], place_NT, reward_NT.round())


# ---------------------------------------------------------------- statistics


def regression(x_NTF: Tensor, y_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [F] of a linear regression, and half of their 95 % intervals, worlds N being independent.

    The intervals are those of White and Liang and Zeger: G^-1 (sum over worlds of s s') G^-1, s = X' residuals.
    """
    x_NTF, y_NT = x_NTF.double(), y_NT.double()
    inverse_FF = torch.linalg.inv(torch.einsum("ntf,ntg->fg", x_NTF, x_NTF))
    weight_F = inverse_FF @ torch.einsum("ntf,nt->f", x_NTF, y_NT)
    score_NF = torch.einsum("ntf,nt->nf", x_NTF, y_NT - x_NTF @ weight_F)
    covariance_FF = inverse_FF @ (score_NF.T @ score_NF) @ inverse_FF
    return weight_F, 1.96 * covariance_FF.diagonal().sqrt()


def findings(played: Choices) -> dict:
    """Rewards per trial, how often choices are repeated after each kind of trial, and what predicts a choice."""
    choice_NT, reward_NT, way_NT = (
        2.0 * x_NT.double() - 1 for x_NT in (played.choice, played.reward, played.place == played.choice)
    )
    predictors = {"constant": torch.ones_like(choice_NT[:, LAGS:])}
    for lag in range(1, LAGS + 1):
        then = slice(LAGS - lag, -lag)
        predictors |= {
            f"choice {lag}": choice_NT[:, then],
            f"choice x reward {lag}": (choice_NT * reward_NT)[:, then],
            f"choice x way {lag}": (choice_NT * way_NT)[:, then],
            f"choice x reward x way {lag}": (choice_NT * reward_NT * way_NT)[:, then],
        }
    weight_F, half_F = regression(torch.stack(list(predictors.values()), -1), choice_NT[:, LAGS:])
    weights = {
        name: [round(float(weight), 4), round(float(half), 4)]
        for name, weight, half in zip(predictors, weight_F, half_F, strict=True)
    }
    stays_NT = (played.choice[:, 1:] == played.choice[:, :-1]).double()
    stay = {}
    for way, sign in (("common", 1), ("rare", -1)):
        for paid, value in (("rewarded", 1), ("unrewarded", -1)):
            of_kind_NT = (way_NT[:, :-1] == sign) & (reward_NT[:, :-1] == value)
            stay[f"{way}, {paid}"] = round(float(stays_NT[of_kind_NT].mean()), 4)
    return {"reward": summary(played.reward.mean(1)), "stay": stay, "weights": weights}


def two_step(options: Options) -> dict:
    """Three agents in the same experiment."""
    for folder in options.runs:
        require(folder, ("TwoStep-v0",))
    grid = [(rate, slope) for rate in RATES for slope in SLOPES]
    tuning = options.seed + 1  # other worlds
    rewards = {x: float(play(lambda past, x=x: model_free(past, *x), options, tuning).reward.mean()) for x in grid}
    rate, slope = max(rewards, key=rewards.get)
    agents = {
        "model-free": play(lambda past: model_free(past, rate, slope), options, options.seed),
        "planner": play(planner, options, options.seed),
    }
    agents |= {f"RL2, {folder.name}": play_run(folder, options) for folder in options.runs}
    found = {"worlds": options.worlds, "trials": TRIALS, "alpha": rate, "beta": slope}
    found |= {"agents": {name: findings(played) for name, played in agents.items()}}
    draw_two_step(found["agents"])
    return found


def draw_two_step(agents: dict[str, dict]) -> None:
    """How often each agent stays; of several runs the first."""
    runs = [name for name in agents if name.startswith("RL2")]
    shown = {"model-free Q-learning": agents["model-free"], "planner": agents["planner"], "RL2": agents[runs[0]]}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, (name, found) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
        for k, way in enumerate(("common", "rare")):
            heights = [found["stay"][f"{way}, {paid}"] for paid in ("rewarded", "unrewarded")]
            axis.bar([0.4 * k, 1 + 0.4 * k], heights, 0.36, label=f"{way} way", color=f"C{k}")
        weight, half = found["weights"]["choice x reward x way 1"]
        axis.set(title=f"{name}\ninteraction {weight:.3f} +- {half:.3f}", xticks=[0.2, 1.2], ylim=(0, 1))
        axis.set_xticklabels(["rewarded", "not rewarded"])
    figure.axes[0].set_ylabel("repeats its choice")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.savefig(IMAGES / "emergence_two_step.png", dpi=110)


def harlow(options: Options) -> dict:
    """Right choices in each trial with new objects, at every evaluation of the training."""
    found = {"runs": {}}
    for folder in options.runs:
        require(folder, ("Harlow-v0",))
        rows = [row for row in records.read_metrics(folder)[0] if "test/return_k0" in row]
        number = sum(name.startswith("test/return_k") for name in rows[0])
        found["runs"][folder.name] = [
            {"iteration": row["iteration"], "tasks": row["env_steps"] // number, "seconds": round(row["seconds"], 1)}
            | {"right": [round(row[f"test/return_k{k}"], 4) for k in range(number)]}
            for row in rows
        ]
    draw_harlow(next(iter(found["runs"].values())))
    return found


def draw_harlow(rows: list[dict]) -> None:
    """As Harlow drew it: right choices by trial, a line for each stage of the training."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    # The first evaluation, the last, and each in which the second trial first reaches a level.
    reached = [next((k for k, row in enumerate(rows) if row["right"][1] >= level), 0) for level in LEVELS]
    stages = sorted({0, *reached, len(rows) - 1})
    for k, stage in enumerate(stages):
        row = rows[stage]
        shade = str(0.8 - 0.79 * k / max(1, len(stages) - 1))
        left.plot(range(1, len(row["right"]) + 1), row["right"], "o-", color=shade, label=f"{row['tasks']:,}")
    left.set(xlabel="trial with two new objects", ylabel="right choices", ylim=(0.4, 1.02))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, title="left: pairs\ntrained on", loc="outside right center")
    for k in (0, 1, 5):
        right.plot([row["tasks"] for row in rows], [row["right"][k] for row in rows], label=f"trial {k + 1}")
    right.set(xlabel="pairs of objects trained on")
    right.legend()
    figure.savefig(IMAGES / "emergence_harlow.png", dpi=110)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    result = globals()[options.what](options)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
