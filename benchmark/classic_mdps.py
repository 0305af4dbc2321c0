"""Classic algorithms on the tabular MDPs of RL2 (Duan et al. 2016), beside the paper's numbers.

    python benchmark/classic_mdps.py --episodes 10 --problems 1000
    python benchmark/classic_mdps.py --all --problems 1000          10, 25, 50, 75 and 100 episodes, as in the paper

One JSON line per setting: mean total reward and half of its 95 % interval, {algorithm: [mean, half]}. 10 states, 5
actions, 10 steps an episode, from state 0; transitions Dirichlet(1, .., 1), rewards N(mean, 1) with mean N(1, 1).

An algorithm is a function(belief, generator, ..) -> (policy_HBS, epsilon), the policy for the H steps that are left of
the episode, from which random actions depart with probability epsilon. It plans once an episode, or, by its rule in
RULES, before every step. It knows the priors; those named tabula_ are the paper's: the library TabulaRL
(github.com/iosband/TabulaRL) with its own priors, as the paper's script calls it (rllab-curriculum, commit 2c6c7da3,
sandbox/rocky/neural_learner/scripts/pacmdp/evaluate_pacmdp.py). B MDPs are played at once; S, T states, A actions.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.classic import compare, print_settings, summary

STATES, ACTIONS, HORIZON = 10, 5, 10
COLUMNS = ("random", "tabula_psrl", "tabula_opsrl", "tabula_ucrl2", "tabula_beb")
COLUMNS += ("tabula_epsilon_greedy", "tabula_greedy", "rl2")  # of the paper's table
PAPER = {  # episodes: table 2 of the paper, 1,000 problems each
    10: (100.1, 138.1, 144.1, 146.6, 150.2, 132.8, 134.8, 156.2),
    25: (250.2, 408.8, 425.2, 424.1, 427.8, 377.3, 368.8, 445.7),
    50: (499.7, 904.4, 930.7, 918.9, 917.8, 823.3, 769.3, 936.1),
    75: (749.9, 1417.1, 1449.2, 1427.6, 1422.6, 1293.9, 1172.9, 1428.8),
    100: (999.4, 1939.5, 1973.9, 1942.1, 1935.1, 1778.2, 1578.5, 1913.7),
}
LOGARITHMIC = tuple(10 ** (-4 + k / 5) for k in range(21))  # 0.0001 to 1
GRIDS = {
    "ucrl2": (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
    "beb": (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "epsilon_greedy": (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
    "beb_every_step": (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "myopic_bonus": (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "tabula_opsrl": (1, 2, 3, 5, 7, 10, 15, 20),  # of the paper's 1 to 20
    "tabula_ucrl2": LOGARITHMIC,
    "tabula_beb": LOGARITHMIC,
    "tabula_epsilon_greedy": tuple(k / 10 for k in range(1, 11)),
}


class Prior(NamedTuple):
    """Mean rewards are N(mean, 1 / precision), and probabilities of the next states Dirichlet(weight, .., weight)."""

    mean: float = 1.0
    precision: float = 1.0
    weight: float = 1.0


TRUE = Prior()  # by which `sample_mdps` draws
TABULA = Prior(mean=0.0)  # TabulaRL's default


@dataclass
class Belief:
    """Everything seen so far. Posteriors: rewards N((mean precision + sum) / (precision + n), 1 / (precision + n)),
    n the visits, and next states Dirichlet(weight + counts)."""

    counts: Tensor  # [B, S, A, T], transitions seen
    sums: Tensor  # [B, S, A], of the rewards
    visits: Tensor  # [B, S, A], rewards seen
    prior: Prior = TRUE
    left: int = HORIZON  # steps of the episode that are left, the next one included

    def mean(self) -> tuple[Tensor, Tensor]:
        """Rewards [B, S, A] and transitions [B, S, A, T] of the posterior mean."""
        weight_BSAT = self.prior.weight + self.counts
        reward_BSA = (self.prior.mean * self.prior.precision + self.sums) / (self.prior.precision + self.visits)
        return reward_BSA, weight_BSAT / weight_BSAT.sum(-1, keepdim=True)

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rewards and transitions drawn from the posterior."""
        mean_BSA = self.mean()[0]
        noise_BSA = torch.randn(mean_BSA.shape, generator=generator, device=mean_BSA.device)
        transition_BSAT = torch._sample_dirichlet(self.prior.weight + self.counts, generator=generator)
        return mean_BSA + noise_BSA / (self.prior.precision + self.visits).sqrt(), transition_BSAT


def plan(
    reward_BSA: Tensor,
    transition_BSAT: Tensor,
    horizon: int = HORIZON,
    radius_BSA: Tensor | None = None,
    later_BSA: Tensor | float = 0.0,
):
    """Best actions [H, B, S], their values [H, B, S] and those of all actions [H, B, S, A], by value iteration.

    With a radius, the transitions may be any within that L1 distance, and are the best of them. `later` is a bonus that
    counts once for each step that follows the present one.
    """
    value_BS = torch.zeros_like(reward_BSA[..., 0])
    policy, values, q = [], [], []
    for following in range(horizon):
        if radius_BSA is None:
            next_BSA = torch.einsum("bsat,bt->bsa", transition_BSAT, value_BS)
        else:
            next_BSA = best_expectation(transition_BSAT, radius_BSA, value_BS)
        q_BSA = reward_BSA + next_BSA + following * later_BSA
        value_BS, action_BS = q_BSA.max(-1)
        policy.insert(0, action_BS)
        values.insert(0, value_BS)
        q.insert(0, q_BSA)
    return torch.stack(policy), torch.stack(values), torch.stack(q)


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
    """The best policy for the posterior mean."""
    return plan(*belief.mean(), belief.left)[0], 0.0


def epsilon_greedy(belief, generator, *, strength):
    return plan(*belief.mean(), belief.left)[0], strength


def myopic(belief, generator):
    """The action with the highest posterior mean reward in the present state: nothing is planned."""
    return belief.mean()[0].argmax(-1).expand(belief.left, -1, -1), 0.0


def myopic_bonus(belief, generator, *, strength):
    """`myopic` with rewards raised by beta / (1 + visits), as in `beb`."""
    raised_BSA = belief.mean()[0] + strength / (1 + belief.visits)
    return raised_BSA.argmax(-1).expand(belief.left, -1, -1), 0.0


def psrl(belief, generator):
    """The best policy for one MDP drawn from the posterior (Strens 2000; Osband et al. 2013)."""
    return plan(*belief.sample(generator), belief.left)[0], 0.0


def optimistic_psrl(belief, generator):
    """PSRL whose sampled mean rewards below the posterior mean are lifted to it, like optimistic Thompson sampling."""
    reward_BSA, transition_BSAT = belief.sample(generator)
    return plan(reward_BSA.maximum(belief.mean()[0]), transition_BSAT, belief.left)[0], 0.0


def opsrl(belief, generator, *, strength):
    """The highest of the values of each action in `strength` MDPs drawn from the posterior (TabulaRL)."""
    q_HBSA = torch.stack([plan(*belief.sample(generator), belief.left)[2] for _ in range(strength)]).amax(0)
    return q_HBSA.argmax(-1), 0.0


def ucrl2(belief, generator, *, strength):
    """Extended value iteration as in UCRL2 (Jaksch et al. 2010), with tuned radii around the posterior mean: rewards
    c sqrt(log t / (1 + visits)), transitions c sqrt(S log t / (1 + visits)) in L1, t = steps so far + 2."""
    steps_B11 = belief.visits.sum((1, 2), keepdim=True) + 2
    radius_BSA = strength * (steps_B11.log() / (1 + belief.visits)).sqrt()
    reward_BSA, transition_BSAT = belief.mean()
    states = transition_BSAT.shape[-1]
    return plan(reward_BSA + radius_BSA, transition_BSAT, belief.left, radius_BSA * states**0.5)[0], 0.0


def tabula_ucrl2(belief, generator, *, strength):
    """UCRL2 as in TabulaRL: the radii, with delta = 0.05, are the original's times `strength`; in the n-th episode
    sqrt(4 log(2 S A (n + 1) / delta) / visits) for rewards, sqrt(S) times that for transitions."""
    states, actions = belief.sums.shape[1:]
    episode_B11 = belief.visits.sum((1, 2), keepdim=True) // HORIZON + 1
    width_B11 = strength * (4 * (2 * states * actions * (episode_B11 + 1) / 0.05).log()).sqrt()
    reward_BSA, transition_BSAT = belief.mean()
    rewards_BSA = reward_BSA + width_B11 / belief.visits.clamp(min=1).sqrt()
    seen_BSA = (belief.counts.sum(-1) + (states - 1) * belief.prior.weight).clamp(min=1)
    return plan(rewards_BSA, transition_BSAT, belief.left, width_B11 * (states / seen_BSA).sqrt())[0], 0.0


def beb(belief, generator, *, strength):
    """The posterior mean with rewards raised by beta / (1 + visits) (Kolter & Ng 2009)."""
    reward_BSA, transition_BSAT = belief.mean()
    return plan(reward_BSA + strength / (1 + belief.visits), transition_BSAT, belief.left)[0], 0.0


def tabula_beb(belief, generator, *, strength):
    """BEB as in TabulaRL, which raises rewards by 1 / (2 + visits), and by another bonus for each step that follows:
    beta H / (1 + weight S + transitions seen), beta = 2 H^2 `strength`."""
    reward_BSA, transition_BSAT = belief.mean()
    seen_BSA = belief.counts.sum(-1) + transition_BSAT.shape[-1] * belief.prior.weight
    later_BSA = 2 * HORIZON**3 * strength / (1 + seen_BSA)
    raised_BSA = reward_BSA + 1 / (1 + belief.prior.precision + belief.visits)
    return plan(raised_BSA, transition_BSAT, belief.left, later_BSA=later_BSA)[0], 0.0


class Rule(NamedTuple):
    """How an algorithm is used."""

    algorithm: Callable
    prior: Prior = TRUE
    every_step: bool = False  # plan before every step, in place of every episode
    counts_last: bool = True  # whether the transition of an episode's last step is learned from


RULES = {
    "random": Rule(random),
    "psrl": Rule(psrl),
    "optimistic_psrl": Rule(optimistic_psrl),
    "ucrl2": Rule(ucrl2),
    "beb": Rule(beb),
    "epsilon_greedy": Rule(epsilon_greedy),
    "greedy": Rule(greedy),
    "greedy_every_step": Rule(greedy, every_step=True),
    "psrl_every_step": Rule(psrl, every_step=True),
    "beb_every_step": Rule(beb, every_step=True),
    "myopic": Rule(myopic, every_step=True),
    "myopic_bonus": Rule(myopic_bonus, every_step=True),
    "tabula_psrl": Rule(psrl, prior=TABULA, counts_last=False),
    "tabula_opsrl": Rule(opsrl, prior=TABULA, counts_last=False),
    "tabula_ucrl2": Rule(tabula_ucrl2, prior=Prior(0.0, 1e-4, 1e-5), counts_last=False),
    "tabula_beb": Rule(tabula_beb, prior=TABULA, counts_last=False),
    "tabula_epsilon_greedy": Rule(epsilon_greedy, prior=Prior(0.0, 1e-4, 1e-4), counts_last=False),
    "tabula_greedy": Rule(greedy, prior=Prior(0.0, 1e-4, 1e-4), counts_last=False),
}


def sample_mdps(problems: int, generator: torch.Generator, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean rewards [B, S, A] and transitions [B, S, A, T]."""
    ones_BSAT = torch.ones(problems, STATES, ACTIONS, STATES, device=device)
    mean_BSA = 1 + torch.randn(ones_BSAT.shape[:-1], generator=generator, device=device)
    return mean_BSA, torch._sample_dirichlet(ones_BSAT, generator=generator)


def run(rule: Rule, mdps: tuple[Tensor, Tensor], episodes: int, generator: torch.Generator, **tuned) -> Tensor:
    """Total reward [B] of `episodes` episodes."""
    reward_BSA, transition_BSAT = mdps
    zeros_BSA = torch.zeros_like(reward_BSA)
    belief = Belief(torch.zeros_like(transition_BSAT), zeros_BSA, zeros_BSA.clone(), rule.prior)
    every_B = torch.arange(len(reward_BSA), device=reward_BSA.device)
    draws = {"generator": generator, "device": reward_BSA.device}
    total_B = torch.zeros_like(reward_BSA[:, 0, 0])
    for _ in range(episodes):
        state_B = torch.zeros_like(every_B)
        for step in range(HORIZON):
            belief.left = HORIZON - step
            if step == 0 or rule.every_step:
                policy_HBS, epsilon = rule.algorithm(belief, generator, **tuned)
                planned = step
            random_B = torch.randint(reward_BSA.shape[2], state_B.shape, **draws)
            explores_B = torch.rand(state_B.shape, **draws) < epsilon
            chosen_B = policy_HBS[step - planned, every_B, state_B]
            where = every_B, state_B, torch.where(explores_B, random_B, chosen_B)
            got_B = reward_BSA[where] + torch.randn(state_B.shape, **draws)
            state_B = torch.multinomial(transition_BSAT[where], 1, generator=generator)[:, 0]
            belief.counts[*where, state_B] += rule.counts_last or step < HORIZON - 1
            belief.visits[where] += 1
            belief.sums[where] += got_B
            total_B += got_B
    return total_B


def evaluate(episodes: int, problems: int, seed: int = 1, device: str = "cpu") -> dict[str, dict]:
    """Every algorithm on the same MDPs; what has a parameter is tuned first, on 500 other MDPs."""
    generator = torch.Generator(device).manual_seed(seed)
    tuning, mdps = (sample_mdps(count, generator, device) for count in (500, problems))
    result = compare(
        {name: partial(run, rule) for name, rule in RULES.items()},
        GRIDS,
        lambda play: play(tuning, episodes, generator),
        lambda play: play(mdps, episodes, generator),
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
