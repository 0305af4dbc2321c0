"""Classic algorithms on the Bernoulli bandits of RL2 (Duan et al. 2016), beside the paper's numbers.

    python benchmark/classic_bandits.py --arms 5 --pulls 10 --problems 1000
    python benchmark/classic_bandits.py --all --problems 10000      the nine settings of the paper

One JSON line per setting: mean total reward and half of its 95 % interval, {algorithm: [mean, half]}. The arms'
probabilities of success are uniform in [0, 1]. Every algorithm starts from one success and one failure of each arm, as
in the paper: `wins` and `losses` are the parameters of the posterior Beta(wins, losses), their prior Beta(1, 1).

A policy is a function(wins_BK, losses_BK, t, n, generator) -> scores_BK: of every one of the B problems it pulls the
arm with the highest score (the first of equals; arms are exchangeable), knowing that t of n pulls are spent.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.classic import compare, print_settings, summary

POLICIES = ("random", "gittins", "thompson", "optimistic_thompson", "densest_thompson")
POLICIES += ("ucb1", "epsilon_greedy", "greedy")
COLUMNS = ("random", "gittins", "thompson", "densest_thompson", "ucb1", "epsilon_greedy", "greedy", "rl2")
PAPER = {  # (pulls, arms): table 1 of the paper, 1,000 problems each
    (10, 5): (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6, 6.7),
    (10, 10): (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6, 6.7),
    (10, 50): (5.1, 6.5, 5.2, 5.5, 6.6, 6.5, 6.5, 6.8),
    (100, 5): (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8, 78.7),
    (100, 10): (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1, 83.5),
    (100, 50): (49.8, 85.2, 64.5, 67.7, 84.3, 78.3, 78.0, 84.9),
    (500, 5): (249.8, 405.8, 402.0, 406.7, 405.8, 388.2, 380.6, 401.6),
    (500, 10): (249.0, 437.8, 429.5, 438.9, 437.1, 408.0, 395.0, 432.5),
    (500, 50): (249.6, 463.7, 427.2, 437.6, 457.6, 413.6, 402.8, 438.9),
}
GRIDS = {
    "ucb1": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0),
    "epsilon_greedy": (0.0, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2),
    "densest_thompson": (1, 2, 3, 5, 7, 10, 15, 20),
}
SLOW = 200  # pulls from which a Gittins table is kept on disk


def random(wins_BK, losses_BK, t, n, generator):
    return torch.rand(wins_BK.shape, generator=generator, device=wins_BK.device)


def greedy(wins_BK, losses_BK, t, n, generator):
    return wins_BK / (wins_BK + losses_BK)


def epsilon_greedy(wins_BK, losses_BK, t, n, generator, *, strength):
    """A random arm with probability `strength`, else the best so far."""
    scores_BK, draw_BK = greedy(wins_BK, losses_BK, t, n, generator), random(wins_BK, losses_BK, t, n, generator)
    explores_B = torch.rand(len(wins_BK), generator=generator, device=wins_BK.device) < strength
    return torch.where(explores_B[:, None], draw_BK, scores_BK)


def ucb1(wins_BK, losses_BK, t, n, generator, *, strength):
    """Mean + c sqrt(2 log t / pulls), with the prior's two pulls of each arm counted (Audibert & Munos 2011)."""
    pulls_BK = wins_BK + losses_BK
    return wins_BK / pulls_BK + strength * (2 * pulls_BK.sum(1, keepdim=True).log() / pulls_BK).sqrt()


def thompson(wins_BK, losses_BK, t, n, generator):
    gamma_BK, other_BK = (torch._standard_gamma(counts_BK, generator=generator) for counts_BK in (wins_BK, losses_BK))
    return gamma_BK / (gamma_BK + other_BK)  # Beta(wins, losses); torch.distributions takes no generator


def optimistic_thompson(wins_BK, losses_BK, t, n, generator):
    """Samples below the posterior mean are lifted to it (Chapelle & Li 2011)."""
    return thompson(wins_BK, losses_BK, t, n, generator).maximum(greedy(wins_BK, losses_BK, t, n, generator))


def densest_thompson(wins_BK, losses_BK, t, n, generator, *, strength):
    """Of `strength` samples of all arms the one with the highest posterior density. The authors of RL2 call this
    optimistic Thompson sampling (rllab-curriculum, commit 2c6c7da3, sandbox/rocky/neural_learner/scripts/bandits)."""
    samples_MBK = torch.stack([thompson(wins_BK, losses_BK, t, n, generator) for _ in range(strength)])
    # Without the factor that the samples share; kept from 0 and 1, whose logarithms are infinite.
    p_MBK = samples_MBK.clamp(1e-12, 1 - 1e-7)
    density_MB = ((wins_BK - 1) * p_MBK.log() + (losses_BK - 1) * (1 - p_MBK).log()).sum(-1)
    densest_B = density_MB.argmax(0)
    return samples_MBK[densest_B, torch.arange(len(wins_BK), device=wins_BK.device)]


def gittins(wins_BK, losses_BK, t, n, generator):
    u_BK, s_BK = (wins_BK + losses_BK - 2).long(), (wins_BK - 1).long()
    return gittins_table(n)[n - t - 1].to(wins_BK.device)[u_BK * (u_BK + 1) // 2 + s_BK]


@functools.lru_cache(4)
def gittins_table(n: int, discount: float = 1.0, points: int = 513) -> list[torch.Tensor]:
    """Finite-horizon Gittins indices: entry m - 1, for m pulls left, holds index [u (u + 1) / 2 + s] of an arm pulled
    u = 0 .. n - m times with s successes.

    The index is the known reward lambda a pull at which pulling the arm (and retiring later, at will) is worth as much
    as retiring to lambda for all m pulls that are left. W, what the arm is worth above retiring, obeys

        W_m(s, u) = max(0, A),  A = p - lambda + discount (p W_{m-1}(s + 1, u + 1) + (1 - p) W_{m-1}(s, u + 1)),

    p = (s + 1) / (u + 2), W_0 = 0; A is convex and falls in lambda, the index is its zero. The dynamic program runs for
    `points` values of lambda at once, and the zero is interpolated: nothing else is approximate, and the error is about
    1e-5 (at most 1e-3, for arms that have nearly always won). 500 pulls: 21 million indices.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanmeta"
    file = folder / f"gittins_{n}_{discount}_{points}.pt"
    if n >= SLOW and file.exists():
        return torch.load(file, weights_only=True)
    u_T, s_T = torch.tril_indices(n + 1, n + 1)  # row by row: state (u, s) is at u (u + 1) / 2 + s
    mean_T1 = ((s_T + 1) / (u_T + 2))[:, None]
    failed_T = torch.arange(len(u_T)) + u_T + 1  # where (u + 1, s) is; (u + 1, s + 1) comes next
    table = [torch.empty((n - m + 1) * (n - m + 2) // 2) for m in range(1, n + 1)]
    grid_G = torch.linspace(0, 1, points)
    for lambda_G in (
        grid_G[i : i + 65] for i in range(0, points - 1, 64)
    ):  # a block at a time: 500 pulls fit in 200 MB
        worth_TG = torch.zeros(len(u_T), len(lambda_G))
        for index_T in table:
            states = len(index_T)
            p_T1, next_T = mean_T1[:states], failed_T[:states]
            worth_TG = torch.lerp(worth_TG[next_T], worth_TG[next_T + 1], p_T1).mul_(discount).add_(p_T1 - lambda_G)
            count_T = (worth_TG > 0).sum(1)  # the zero lies between lambda[count - 1] and lambda[count]
            (inside_T,) = ((count_T > 0) & (count_T < len(lambda_G))).nonzero(as_tuple=True)
            count_T = count_T[inside_T]
            above_T, below_T = worth_TG[inside_T, count_T - 1], worth_TG[inside_T, count_T]
            index_T[inside_T] = torch.lerp(lambda_G[count_T - 1], lambda_G[count_T], above_T / (above_T - below_T))
            worth_TG.clamp_(min=0)
    if n >= SLOW:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(table, part := file.with_suffix(f".{os.getpid()}"))
        os.replace(part, file)
    return table


def bayes_optimal(arms: int, n: int) -> Fraction:
    """The most that any policy can expect in n pulls: every posterior is visited, so only for tiny problems."""

    @functools.cache
    def value(counts: tuple[tuple[int, int], ...], left: int) -> Fraction:
        if left == 0:
            return Fraction(0)
        best = Fraction(0)
        for i, (wins, losses) in enumerate(counts):
            p, rest = Fraction(wins, wins + losses), counts[:i] + counts[i + 1 :]
            won, lost = (tuple(sorted((*rest, arm))) for arm in ((wins + 1, losses), (wins, losses + 1)))
            best = max(best, p * (1 + value(won, left - 1)) + (1 - p) * value(lost, left - 1))
        return best

    return value(((1, 1),) * arms, n)


def play(policy: Callable, p_BK: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The arms [B, n] that n pulls of bandits with success probabilities p [B, k] choose, and total rewards [B]."""
    wins_BK, losses_BK, arms = torch.ones_like(p_BK), torch.ones_like(p_BK), []
    for t in range(n):
        arm_B1 = policy(wins_BK, losses_BK, t, n, generator).argmax(1, keepdim=True)
        p_B1 = p_BK.gather(1, arm_B1)
        reward_B1 = (torch.rand(p_B1.shape, generator=generator, device=p_BK.device) < p_B1).to(p_BK.dtype)
        wins_BK.scatter_add_(1, arm_B1, reward_B1)
        losses_BK.scatter_add_(1, arm_B1, 1 - reward_B1)
        arms.append(arm_B1)
    return torch.cat(arms, 1), (wins_BK - 1).sum(1)


def run(policy: Callable, p_BK: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Total rewards [B] of `play`."""
    return play(policy, p_BK, n, generator)[1]


def evaluate(arms: int, pulls: int, problems: int, seed: int = 1, device: str = "cpu") -> dict[str, dict]:
    """Every algorithm on the same problems; what has a parameter is tuned first, on 1,000 other problems."""
    generator = torch.Generator(device).manual_seed(seed)
    tuning_BK, p_BK = (torch.rand(b, arms, generator=generator, device=device) for b in (1000, problems))
    algorithms = {name: globals()[name] for name in POLICIES}
    result = compare(
        algorithms,
        GRIDS,
        lambda policy: run(policy, tuning_BK, pulls, generator),
        lambda policy: run(policy, p_BK, pulls, generator),
    )
    result["reward"]["best arm"] = summary(p_BK.amax(1) * pulls)
    return result


@dataclass
class Options:
    arms: int = 5
    """arms of a bandit"""
    pulls: int = 10
    """pulls of a trial"""
    problems: int = 1000
    """bandits to play"""
    seed: int = 1
    """seed of everything"""
    device: str = "cpu"
    """device to play on"""
    all: bool = False
    """the nine settings of the paper instead of --arms and --pulls"""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    settings = [{"arms": k, "pulls": n} for n, k in (PAPER if options.all else [(options.pulls, options.arms)])]
    common = {"problems": options.problems, "seed": options.seed, "device": options.device}
    print_settings(settings, evaluate, COLUMNS, lambda s: PAPER.get((s["pulls"], s["arms"])), **common)
