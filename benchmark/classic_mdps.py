"""Classic algorithms on the tabular MDPs of RL2 (Duan et al. 2016), beside the paper's numbers.

    python benchmark/classic_mdps.py --episodes 10 --problems 1000
    python benchmark/classic_mdps.py --all --problems 1000          10, 25, 50, 75 and 100 episodes, as in the paper

One JSON line per setting: mean total reward and half of its 95 % interval, {algorithm: [mean, half]}. 10 states, 5
actions, 10 steps an episode, from state 0; transitions Dirichlet(1, .., 1), rewards N(mean, 1) with mean N(1, 1).

An algorithm is a function(belief, generator, ..) -> (policy_HBS, epsilon): it plans once an episode, knows the priors,
and takes random actions with probability epsilon. B MDPs are played at once; S, T states, A actions, H steps.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.classic import compare, print_settings, summary

STATES, ACTIONS, HORIZON = 10, 5, 10
COLUMNS = ("random", "psrl", "optimistic_psrl", "ucrl2", "beb", "epsilon_greedy", "greedy", "rl2")
PAPER = {  # episodes: table 2 of the paper, 1,000 problems each
    10: (100.1, 138.1, 144.1, 146.6, 150.2, 132.8, 134.8, 156.2),
    25: (250.2, 408.8, 425.2, 424.1, 427.8, 377.3, 368.8, 445.7),
    50: (499.7, 904.4, 930.7, 918.9, 917.8, 823.3, 769.3, 936.1),
    75: (749.9, 1417.1, 1449.2, 1427.6, 1422.6, 1293.9, 1172.9, 1428.8),
    100: (999.4, 1939.5, 1973.9, 1942.1, 1935.1, 1778.2, 1578.5, 1913.7),
}
GRIDS = {
    "ucrl2": (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
    "beb": (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "epsilon_greedy": (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
}


@dataclass
class Belief:
    """Everything seen so far; the posteriors are Dirichlet(1 + counts) and N((1 + sum) / (1 + n), 1 / (1 + n))."""

    counts: Tensor  # [B, S, A, T], transitions seen
    sums: Tensor  # [B, S, A], of the rewards

    @property
    def visits(self) -> Tensor:
        return self.counts.sum(-1)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Rewards [B, S, A] and transitions [B, S, A, T] of the posterior mean."""
        transition_BSAT = (1 + self.counts) / (self.counts.shape[-1] + self.visits)[..., None]
        return (1 + self.sums) / (1 + self.visits), transition_BSAT

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mean_BSA = self.mean()[0]
        noise_BSA = torch.randn(mean_BSA.shape, generator=generator, device=mean_BSA.device)
        transition_BSAT = torch._sample_dirichlet(1 + self.counts, generator=generator)
        return mean_BSA + noise_BSA / (1 + self.visits).sqrt(), transition_BSAT


def plan(reward_BSA: Tensor, transition_BSAT: Tensor, horizon: int = HORIZON, radius_BSA: Tensor | None = None):
    """Best actions [H, B, S] and their values [H, B, S] by value iteration; with a radius, the transitions may be any
    within that L1 distance, and are the best of them."""
    value_BS, policy, values = torch.zeros_like(reward_BSA[..., 0]), [], []
    for _ in range(horizon):
        if radius_BSA is None:
            next_BSA = torch.einsum("bsat,bt->bsa", transition_BSAT, value_BS)
        else:
            next_BSA = best_expectation(transition_BSAT, radius_BSA, value_BS)
        value_BS, action_BS = (reward_BSA + next_BSA).max(-1)
        policy.insert(0, action_BS)
        values.insert(0, value_BS)
    return torch.stack(policy), torch.stack(values)


def best_expectation(transition_BSAT: Tensor, radius_BSA: Tensor, value_BT: Tensor) -> Tensor:
    """Highest mean of the value over distributions within an L1 distance: half of it more on the best state, taken from
    the worst ones (Jaksch et al. 2010, figure 2)."""
    value_BT, order_BT = value_BT.sort(-1, descending=True)
    sorted_BSAT = transition_BSAT.gather(-1, order_BT[:, None, None].expand_as(transition_BSAT))
    sorted_BSAT[..., 0] += radius_BSA / 2
    total_BSAT = sorted_BSAT.cumsum(-1).clamp(max=1)
    return torch.einsum(
        "bsat,bt->bsa", total_BSAT.diff(dim=-1, prepend=torch.zeros_like(total_BSAT[..., :1])), value_BT
    )


def random(belief, generator):
    return greedy(belief, generator)[0], 1.0


def greedy(belief, generator):
    return plan(*belief.mean())[0], 0.0


def epsilon_greedy(belief, generator, *, strength):
    return plan(*belief.mean())[0], strength


def psrl(belief, generator):
    """The best policy for one MDP drawn from the posterior (Strens 2000; Osband et al. 2013)."""
    return plan(*belief.sample(generator))[0], 0.0


def optimistic_psrl(belief, generator):
    """PSRL whose sampled mean rewards below the posterior mean are lifted to it, like optimistic Thompson sampling."""
    reward_BSA, transition_BSAT = belief.sample(generator)
    return plan(reward_BSA.maximum(belief.mean()[0]), transition_BSAT)[0], 0.0


def ucrl2(belief, generator, *, strength):
    """Extended value iteration as in UCRL2 (Jaksch et al. 2010), with tuned radii around the posterior mean: rewards
    c sqrt(log t / (1 + visits)), transitions c sqrt(S log t / (1 + visits)) in L1, t = steps so far + 2."""
    steps_B11 = belief.visits.sum((1, 2), keepdim=True) + 2
    radius_BSA = strength * (steps_B11.log() / (1 + belief.visits)).sqrt()
    reward_BSA, transition_BSAT = belief.mean()
    states = transition_BSAT.shape[-1]
    return plan(reward_BSA + radius_BSA, transition_BSAT, radius_BSA=radius_BSA * states**0.5)[0], 0.0


def beb(belief, generator, *, strength):
    """The posterior mean with rewards raised by beta / (1 + visits) (Kolter & Ng 2009)."""
    reward_BSA, transition_BSAT = belief.mean()
    return plan(reward_BSA + strength / (1 + belief.visits), transition_BSAT)[0], 0.0


def sample_mdps(problems: int, generator: torch.Generator, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean rewards [B, S, A] and transitions [B, S, A, T]."""
    ones_BSAT = torch.ones(problems, STATES, ACTIONS, STATES, device=device)
    mean_BSA = 1 + torch.randn(ones_BSAT.shape[:-1], generator=generator, device=device)
    return mean_BSA, torch._sample_dirichlet(ones_BSAT, generator=generator)


def run(algorithm: Callable, mdps: tuple[Tensor, Tensor], episodes: int, generator: torch.Generator) -> Tensor:
    """Total reward [B] of `episodes` episodes."""
    reward_BSA, transition_BSAT = mdps
    belief = Belief(torch.zeros_like(transition_BSAT), torch.zeros_like(reward_BSA))
    every_B = torch.arange(len(reward_BSA), device=reward_BSA.device)
    draws = {"generator": generator, "device": reward_BSA.device}
    total_B = torch.zeros_like(reward_BSA[:, 0, 0])
    for _ in range(episodes):
        policy_HBS, epsilon = algorithm(belief, generator)
        state_B = torch.zeros_like(every_B)
        for policy_BS in policy_HBS:
            random_B = torch.randint(reward_BSA.shape[2], state_B.shape, **draws)
            explores_B = torch.rand(state_B.shape, **draws) < epsilon
            where = every_B, state_B, torch.where(explores_B, random_B, policy_BS[every_B, state_B])
            got_B = reward_BSA[where] + torch.randn(state_B.shape, **draws)
            state_B = torch.multinomial(transition_BSAT[where], 1, generator=generator)[:, 0]
            belief.counts[*where, state_B] += 1
            belief.sums[where] += got_B
            total_B += got_B
    return total_B


def evaluate(episodes: int, problems: int, seed: int = 1, device: str = "cpu") -> dict[str, dict]:
    """Every algorithm on the same MDPs; what has a parameter is tuned first, on 500 other MDPs."""
    generator = torch.Generator(device).manual_seed(seed)
    tuning, mdps = (sample_mdps(count, generator, device) for count in (500, problems))
    algorithms = {name: globals()[name] for name in COLUMNS[:-1]}
    result = compare(
        algorithms,
        GRIDS,
        lambda algorithm: run(algorithm, tuning, episodes, generator),
        lambda algorithm: run(algorithm, mdps, episodes, generator),
    )
    result["reward"]["optimal"] = summary(episodes * plan(*mdps)[1][0, :, 0])  # knows the MDP
    return result


@dataclass
class Options:
    episodes: int = 10
    """episodes of a trial"""
    problems: int = 1000
    """MDPs to play"""
    seed: int = 1
    """seed of everything"""
    device: str = "cpu"
    """device to play on"""
    all: bool = False
    """the five settings of the paper instead of --episodes"""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    settings = [{"episodes": episodes} for episodes in (PAPER if options.all else [options.episodes])]
    common = {"problems": options.problems, "seed": options.seed, "device": options.device}
    print_settings(settings, evaluate, COLUMNS, lambda s: PAPER.get(s["episodes"]), **common)
