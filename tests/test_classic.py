"""The baselines of benchmark/classic_bandits.py and classic_mdps.py: Gittins indices against fractions derived by hand,
published tables and exhaustive dynamic programs; the algorithms against slow loops over one problem at a time with the
same random draws; posteriors against integration on a grid; planning against the enumeration of every policy."""

import functools
import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Beta

from benchmark import classic_bandits as bandits
from benchmark import classic_mdps as mdps

ROOT = Path(__file__).resolve().parent.parent
UCB = functools.partial(bandits.ucb1, strength=0.2)
EPSILON = functools.partial(bandits.epsilon_greedy, strength=0.1)
DENSEST = functools.partial(bandits.densest_thompson, strength=3)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def index(table, wins, losses, left):
    u, s = wins + losses - 2, wins - 1
    return table[left - 1][u * (u + 1) // 2 + s].item()


def posteriors(n):
    """(wins, losses, left) of everything that a table for n pulls holds."""
    return [(s + 1, u - s + 1, m) for m in range(1, n + 1) for u in range(n - m + 1) for s in range(u + 1)]


def above(differences, standard_errors=3.0):
    """Whether the mean of paired differences is above 0 by that many standard errors."""
    return differences.mean() > standard_errors * differences.std() / len(differences) ** 0.5


# ---- bandits: the Gittins index ----


def test_gittins_by_hand():
    """With lambda above 1/3 resp. 5/9, an arm that failed at once is left: 1/2 - l + (2/3 - l) / 2 = 0 for 2 pulls, and
    1/2 - l + (2/3 - l + 2/3 (3/4 - l)) / 2 = 0 for 3."""
    table = bandits.gittins_table(12)
    for wins, losses, left in posteriors(12):
        if left == 1:
            assert index(table, wins, losses, 1) == pytest.approx(wins / (wins + losses), abs=1e-6)
    assert index(table, 1, 1, 2) == pytest.approx(5 / 9, abs=1e-5)
    assert index(table, 1, 1, 3) == pytest.approx(13 / 22, abs=1e-5)


def test_gittins_published():
    """Gittins 1989, the table for Bernoulli arms and a discount of 0.9: rows are losses, columns wins, from 1."""
    table = bandits.gittins_table(90, discount=0.9)
    published = ((0.7029, 0.8001, 0.8452), (0.5001, 0.6346, 0.7072), (0.3796, 0.5163, 0.6010))
    for losses, row in enumerate(published, 1):
        for wins, value in enumerate(row, 1):
            assert index(table, wins, losses, 80) == pytest.approx(value, abs=1.5e-4)


def test_gittins_is_where_a_known_arm_is_as_good():
    """Exhaustive dynamic program over an unknown and a known arm, in which one may go back and forth."""
    n, table = 8, bandits.gittins_table(8)

    for known in np.random.default_rng(0).uniform(0.2, 0.95, 25):

        @functools.cache
        def first(wins, losses, left, known=known):
            if left == 0:
                return 0.0, 0.0
            p = wins / (wins + losses)
            won, lost = max(first(wins + 1, losses, left - 1)), max(first(wins, losses + 1, left - 1))
            return p * (1 + won) + (1 - p) * lost, known + max(first(wins, losses, left - 1))

        for wins, losses, left in posteriors(n):
            if abs(index(table, wins, losses, left) - known) > 1e-3:
                unknown_first, known_first = first(wins, losses, left)
                assert (unknown_first > known_first) == (index(table, wins, losses, left) > known)


def test_gittins_interpolation():
    """Bisection in float64, one posterior at a time."""
    n, table = 10, bandits.gittins_table(10)

    def advantage(wins, losses, left, reward):
        p = wins / (wins + losses)
        if left == 1:
            return p - reward
        won, lost = advantage(wins + 1, losses, left - 1, reward), advantage(wins, losses + 1, left - 1, reward)
        return p - reward + p * max(won, 0) + (1 - p) * max(lost, 0)

    errors = []
    for wins, losses, left in posteriors(n)[::7]:
        low, high = 0.0, 1.0
        for _ in range(18):
            middle = (low + high) / 2
            low, high = (middle, high) if advantage(wins, losses, left, middle) > 0 else (low, middle)
        errors.append(abs(index(table, wins, losses, left) - low))
    assert max(errors) < 5e-4
    assert np.median(errors) < 1e-5
    errors_T = (torch.cat(bandits.gittins_table(40)) - torch.cat(bandits.gittins_table(40, points=4097))).abs()
    assert errors_T.max() < 1e-3
    assert errors_T.mean() < 1e-5


def test_gittins_is_monotone():
    table = bandits.gittins_table(30)
    for wins, losses, left in posteriors(30):
        here = index(table, wins, losses, left)
        assert here >= wins / (wins + losses) - 1e-6
        if left > 1:
            assert here >= index(table, wins, losses, left - 1) - 1e-6
            assert index(table, wins + 1, losses, left - 1) > index(table, wins, losses + 1, left - 1)
    assert index(table, 1, 1, 30) > index(table, 1, 1, 10) + 0.05


def test_gittins_longer_table_serves_shorter_horizons():
    short, long = bandits.gittins_table(10), bandits.gittins_table(12)
    for few, many in zip(short, long, strict=False):
        torch.testing.assert_close(few, many[: len(few)], rtol=0, atol=0)


def test_gittins_disk_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bandits, "SLOW", 7)
    bandits.gittins_table.cache_clear()
    bandits.gittins_table(6)
    assert not list(tmp_path.iterdir())
    table = bandits.gittins_table(7)
    (file,) = (tmp_path / "cleanmeta").iterdir()
    torch.save([values + 1 for values in table], file)
    bandits.gittins_table.cache_clear()
    assert index(bandits.gittins_table(7), 1, 1, 2) == pytest.approx(1 + 5 / 9, abs=1e-5)
    bandits.gittins_table.cache_clear()


# ---- bandits: Bayes-optimal play ----


def expected(policy, arms, n):
    """Mean total reward of a deterministic policy under the prior, over every course of events."""

    def value(wins, losses, left):
        if left == 0:
            return Fraction(0)
        counts = (torch.tensor([c], dtype=torch.float64) for c in (wins, losses))
        arm = policy(*counts, n - left, n, None).argmax().item()
        p, one = Fraction(wins[arm], wins[arm] + losses[arm]), np.eye(arms, dtype=int)[arm]
        won = value(tuple(map(int, wins + one)), losses, left - 1)
        return p * (1 + won) + (1 - p) * value(wins, tuple(map(int, losses + one)), left - 1)

    return value((1,) * arms, (1,) * arms, n)


def test_bayes_optimal_against_every_policy():
    """3 pulls of 2 arms: a policy is an arm for each of the 7 sequences of earlier rewards."""
    sequences = [rewards for t in range(3) for rewards in itertools.product((0, 1), repeat=t)]
    best = Fraction(0)
    for arms in itertools.product((0, 1), repeat=len(sequences)):
        policy, total = dict(zip(sequences, arms, strict=True)), Fraction(0)
        for rewards in itertools.product((0, 1), repeat=3):
            probability, counts = Fraction(1), [[1, 1], [1, 1]]
            for t, reward in enumerate(rewards):
                wins_losses = counts[policy[rewards[:t]]]
                probability *= Fraction(wins_losses[1 - reward], sum(wins_losses))
                wins_losses[1 - reward] += 1
            total += probability * sum(rewards)
        best = max(best, total)
    assert bandits.bayes_optimal(2, 3) == best
    assert bandits.bayes_optimal(2, 2) == Fraction(13, 12)  # 1/2 + (1/2 2/3 + 1/2 1/2)
    assert bandits.bayes_optimal(1, 4) == 2


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_gittins_policy_is_nearly_bayes_optimal(n):
    best, value = bandits.bayes_optimal(2, n), expected(bandits.gittins, 2, n)
    assert 0.998 * best <= value <= best
    assert expected(bandits.greedy, 2, n) <= best
    if n == 5:
        assert expected(bandits.greedy, 2, n) < 0.998 * best


# ---- bandits: the policies and their play ----


def loop_scores(name, wins, losses, t, n, draws):
    """Scores of one problem's arms, one arm at a time."""
    if name == "densest_thompson":
        samples = [np.array(a) / (np.array(a) + np.array(b)) for a, b in zip(draws[::2], draws[1::2], strict=True)]
        posterior = Beta(torch.tensor(wins), torch.tensor(losses))
        return max(samples, key=lambda p: float(posterior.log_prob(torch.tensor(p)).sum())).tolist()
    scores = []
    for arm, (won, lost) in enumerate(zip(wins, losses, strict=True)):
        mean = won / (won + lost)
        if name == "thompson" or name == "optimistic_thompson":
            sample = draws[0][arm] / (draws[0][arm] + draws[1][arm])
            scores.append(max(sample, mean) if name == "optimistic_thompson" else sample)
        elif name == "ucb1":
            scores.append(mean + 0.2 * math.sqrt(2 * math.log(2 * len(wins) + t) / (won + lost)))
        elif name == "gittins":
            scores.append(index(bandits.gittins_table(n), int(won), int(lost), n - t))
        elif name == "random" or (name == "epsilon_greedy" and draws[1] < 0.1):
            scores.append(draws[0][arm])
        else:
            scores.append(mean)
    return scores


@pytest.mark.parametrize("name", bandits.POLICIES)
def test_bandit_run_against_loop(name):
    b, k, n = 30, 4, 25
    p_BK = torch.rand(b, k, generator=seeded(1), dtype=torch.float64)
    policies = {"ucb1": UCB, "epsilon_greedy": EPSILON, "densest_thompson": DENSEST}
    policy = policies.get(name, getattr(bandits, name))
    total_B = bandits.run(policy, p_BK, n, seeded(2))
    generator, wins, losses = seeded(2), np.ones((b, k)), np.ones((b, k))
    for t in range(n):
        draws = [()] * b
        if "thompson" in name:
            gammas = []
            for _ in range(3 if name == "densest_thompson" else 1):
                gammas += [torch._standard_gamma(torch.tensor(x), generator=generator) for x in (wins, losses)]
            draws = list(zip(*(gamma.tolist() for gamma in gammas), strict=True))
        elif name in ("random", "epsilon_greedy"):
            rows = torch.rand(b, k, generator=generator).tolist()
            explores = torch.rand(b, generator=generator).tolist() if name == "epsilon_greedy" else rows
            draws = list(zip(rows, explores, strict=True))
        scores = [loop_scores(name, wins[i], losses[i], t, n, draws[i]) for i in range(b)]
        chance = torch.rand(b, 1, generator=generator).tolist()
        for i in range(b):
            arm = scores[i].index(max(scores[i]))
            won = chance[i][0] < p_BK[i, arm]
            (wins if won else losses)[i, arm] += 1
    assert total_B.tolist() == (wins - 1).sum(1).tolist()
    assert len(set(total_B.tolist())) > 3


def test_thompson_samples_the_posterior():
    wins_BK, losses_BK = torch.tensor([[1.0, 3.0, 20.0]]), torch.tensor([[1.0, 2.0, 5.0]])
    counts = wins_BK.repeat(40000, 1), losses_BK.repeat(40000, 1)
    sample_BK = bandits.thompson(*counts, 0, 100, seeded(1)).double()
    mean_K, total_K = (wins_BK / (wins_BK + losses_BK))[0].double(), (wins_BK + losses_BK)[0].double()
    variance_K = mean_K * (1 - mean_K) / (total_K + 1)
    assert ((sample_BK.mean(0) - mean_K).abs() < 4 * (variance_K / 40000).sqrt()).all()
    torch.testing.assert_close(sample_BK.var(0), variance_K, rtol=0.03, atol=0)
    lifted_BK = bandits.optimistic_thompson(*counts, 0, 100, seeded(1)).double()
    assert (lifted_BK >= mean_K - 1e-6).all()
    torch.testing.assert_close(lifted_BK.maximum(sample_BK), lifted_BK)


def test_bandit_order_and_totals():
    p_BK = torch.rand(2000, 10, generator=seeded(1))
    policies = {name: getattr(bandits, name) for name in ("random", "greedy", "thompson", "gittins")}
    policies |= {"optimistic_thompson": bandits.optimistic_thompson, "ucb1": UCB}
    total = {name: bandits.run(policy, p_BK, 100, seeded(2)) for name, policy in policies.items()}
    assert above(total["thompson"] - total["random"])
    assert above(total["optimistic_thompson"] - total["thompson"])
    assert above(total["ucb1"] - total["optimistic_thompson"])
    assert above(total["gittins"] - total["optimistic_thompson"])
    assert above(total["gittins"] - total["greedy"])
    assert above(total["gittins"] - total["ucb1"], -1)  # closer than this test can tell
    assert total["random"].mean() == pytest.approx(50, abs=0.8)
    assert total["gittins"].mean() == pytest.approx(84.2, abs=1)
    assert total["thompson"].mean() == pytest.approx(77.5, abs=1)
    totals_B = bandits.run(bandits.random, torch.rand(4000, 5, generator=seeded(3)), 10, seeded(4))
    assert totals_B.mean() == pytest.approx(5.0, abs=0.13)


# ---- tabular MDPs ----


def small_mdps(b, s, a, seed=1):
    rng = np.random.default_rng(seed)
    reward_BSA, transition_BSAT = rng.normal(1, 1, (b, s, a)), rng.dirichlet(np.ones(s), (b, s, a))
    return torch.tensor(reward_BSA), torch.tensor(transition_BSAT)


def some_belief(seed=3, b=4, s=mdps.STATES, a=mdps.ACTIONS, prior=mdps.TRUE, left=mdps.HORIZON):
    rng = np.random.default_rng(seed)
    counts_BSAT = rng.poisson(0.3, (b, s, a, s)).astype(float)
    sums_BSA = counts_BSAT.sum(-1) * rng.normal(1, 1, (b, s, a))
    missed_BSA = rng.poisson(0.2, (b, s, a))  # rewards of last steps, whose transitions do not count
    rewards_BSA = torch.tensor(counts_BSAT.sum(-1) + missed_BSA)
    return mdps.Belief(torch.tensor(counts_BSAT), torch.tensor(sums_BSA), rewards_BSA, prior, left)


def loop_q(reward, transition, horizon, later=None):
    """Value iteration of one MDP in plain loops: the values of all actions [H, S, A]."""
    states, actions = reward.shape
    value, values = [0.0] * states, []
    later = np.zeros(reward.shape) if later is None else later
    for i in range(horizon):
        q = np.empty((states, actions))
        for s, a in np.ndindex(states, actions):
            q[s, a] = reward[s, a] + sum(transition[s, a, j] * value[j] for j in range(states)) + i * later[s, a]
        value = [max(row) for row in q]
        values.insert(0, q)
    return np.array(values)


def loop_plan(reward, transition, horizon):
    """Actions and values [H, S] of `loop_q`."""
    q = loop_q(reward, transition, horizon)
    return q.argmax(-1).tolist(), q.max(-1)


def test_plan_against_every_policy():
    """3 steps, 3 states, 2 actions: all 512 policies, each evaluated by products of matrices."""
    reward_BSA, transition_BSAT = small_mdps(3, 3, 2)
    policy_HBS, value_HBS, _ = mdps.plan(reward_BSA, transition_BSAT, 3)
    for b in range(3):
        values = {}
        for actions in itertools.product((0, 1), repeat=9):
            occupancy, total = np.eye(3), np.zeros(3)
            for step in range(3):
                chosen = actions[3 * step : 3 * step + 3]
                total += occupancy @ reward_BSA[b].numpy()[range(3), chosen]
                occupancy = occupancy @ transition_BSAT[b].numpy()[range(3), chosen]
            values[actions] = total
        best = max(values, key=lambda actions: values[actions].sum())
        np.testing.assert_allclose(value_HBS[0, b], np.max(list(values.values()), axis=0), atol=1e-12)
        assert tuple(policy_HBS[:, b].flatten().tolist()) == best


def test_plan_against_loop():
    reward_BSA, transition_BSAT = small_mdps(4, mdps.STATES, mdps.ACTIONS)
    policy_HBS, value_HBS, _ = mdps.plan(reward_BSA, transition_BSAT)
    assert len(policy_HBS) == 10
    for b in range(4):
        policy, values = loop_plan(reward_BSA[b].numpy(), transition_BSAT[b].numpy(), 10)
        assert policy_HBS[:, b].tolist() == policy
        np.testing.assert_allclose(value_HBS[:, b], values, atol=1e-10)


def test_best_expectation():
    """Against every order in which mass can be taken from the other states, and random distributions in the ball."""
    rng = np.random.default_rng(0)
    for radius in (0.0, 0.1, 0.5, 1.0, 1.7, 2.0, 5.0):
        p, value = rng.dirichlet(np.ones(4)), rng.normal(size=4)
        best = int(value.argmax())
        highest = -np.inf
        for order in itertools.permutations(set(range(4)) - {best}):
            q, left = p.copy(), min(radius / 2, 1 - p[best])
            q[best] += left
            for state in order:
                taken = min(left, q[state])
                q[state], left = q[state] - taken, left - taken
            highest = max(highest, q @ value)
        tensors = (torch.from_numpy(np.array(x)) for x in ([[[p]]], [[[radius]]], [value]))
        ours = mdps.best_expectation(*tensors).item()
        assert ours == pytest.approx(highest, abs=1e-12)
        others = rng.dirichlet(np.ones(4), 2000)
        inside = p + np.clip(radius / np.abs(others - p).sum(1, keepdims=True), 0, 1) * (others - p)
        assert (inside @ value <= ours + 1e-12).all()


def test_posterior_of_rewards_on_a_grid():
    """Prior N(1, 1) times the likelihood of every reward, integrated numerically."""
    grid, rewards = np.linspace(-10, 12, 20001), [2.5, -0.3, 1.9]
    density = np.exp(-((grid - 1) ** 2) / 2) * np.prod([np.exp(-((grid - r) ** 2) / 2) for r in rewards], axis=0)
    density /= density.sum()
    mean = (grid * density).sum()
    deviation = math.sqrt((density * (grid - mean) ** 2).sum())
    three_BSA = torch.full((20000, 1, 1), 3.0)
    belief = mdps.Belief(torch.zeros(20000, 1, 1, 4), three_BSA / 3 * sum(rewards), three_BSA)
    assert belief.mean()[0][0].item() == pytest.approx(mean, abs=1e-6)
    sample_B = belief.sample(seeded(1))[0].flatten()
    assert sample_B.mean().item() == pytest.approx(mean, abs=4 * deviation / 20000**0.5)
    assert sample_B.std().item() == pytest.approx(deviation, rel=0.03)
    zeros = torch.zeros(20000, 1, 1, 4), torch.zeros(20000, 1, 1), torch.zeros(20000, 1, 1)
    for prior, moments in ((mdps.TRUE, (1, 1)), (mdps.Prior(-2.0, 4.0), (-2, 0.5))):
        sample_B = mdps.Belief(*zeros, prior).sample(seeded(1))[0]
        assert (sample_B.mean().item(), sample_B.std().item()) == pytest.approx(moments, abs=0.03)


def test_posterior_of_transitions():
    """Dirichlet(weight + counts): means a / A, variances a (A - a) / (A^2 (A + 1))."""
    counts_T = torch.tensor([4.0, 0, 1, 0])
    prior = mdps.Prior(weight=0.5)
    belief = mdps.Belief(counts_T.expand(20000, 1, 1, 4), torch.zeros(20000, 1, 1), torch.zeros(20000, 1, 1), prior)
    alpha_T = counts_T + 0.5
    total = alpha_T.sum()
    torch.testing.assert_close(belief.mean()[1][0, 0, 0], alpha_T / total)
    sample_BT = belief.sample(seeded(1))[1][:, 0, 0]
    torch.testing.assert_close(sample_BT.sum(-1), torch.ones(20000))
    torch.testing.assert_close(sample_BT.mean(0), alpha_T / total, rtol=0, atol=0.006)
    torch.testing.assert_close(
        sample_BT.var(0), alpha_T * (total - alpha_T) / total**2 / (total + 1), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("left", [10, 4, 1])
@pytest.mark.parametrize("name", mdps.RULES)
def test_mdp_algorithms_against_loop(name, left):
    """The model that each plans with, built entry by entry for one MDP after the other."""
    rule, strength = mdps.RULES[name], 3 if name == "tabula_opsrl" else 0.3
    mu, tau, weight = rule.prior
    belief = some_belief(prior=rule.prior, left=left)
    policy_HBS, epsilon = rule.algorithm(belief, seeded(5), **({"strength": strength} if name in mdps.GRIDS else {}))
    assert epsilon == {"random": 1.0}.get(name, strength if "epsilon" in name else 0.0)
    generator, shape = seeded(5), belief.sums.shape
    draws = []
    for _ in range(strength if name == "tabula_opsrl" else 1):
        noise_BSA = torch.randn(shape, generator=generator)
        draws.append((noise_BSA, torch._sample_dirichlet(weight + belief.counts, generator=generator).numpy()))
    bonus = {"beb": 0.3, "beb_every_step": 0.3, "myopic_bonus": 0.3}.get(name, 0.0)
    for b, counts_SAT in enumerate(belief.counts.numpy()):
        q = []
        for noise_BSA, drawn_BSAT in draws:
            reward, radius, later = (np.zeros(shape[1:]) for _ in range(3))
            transition = np.zeros(counts_SAT.shape)
            for s, a in np.ndindex(*shape[1:]):
                visits, seen = belief.visits[b, s, a].item(), counts_SAT[s, a].sum()
                mean = (tau * mu + belief.sums[b, s, a].item()) / (tau + visits)
                reward[s, a] = mean + bonus / (1 + visits)
                transition[s, a] = (counts_SAT[s, a] + weight) / (seen + 10 * weight)
                if "psrl" in name or "opsrl" in name:
                    reward[s, a] += noise_BSA[b, s, a].item() / math.sqrt(tau + visits)
                    transition[s, a] = drawn_BSAT[b, s, a]
                if name == "optimistic_psrl":
                    reward[s, a] = max(reward[s, a], mean)
                if name == "ucrl2":
                    radius[s, a] = strength * math.sqrt(math.log(belief.visits[b].sum().item() + 2) / (1 + visits))
                    reward[s, a] += radius[s, a]
                    radius[s, a] *= 10**0.5
                if name == "tabula_ucrl2":
                    time = belief.visits[b].sum().item() // 10 + 1
                    width = 4 * math.log(2 * 10 * 5 * (time + 1) / 0.05)
                    reward[s, a] += strength * math.sqrt(width / max(visits, 1))
                    radius[s, a] = strength * math.sqrt(10 * width / max(seen + 10 * 1e-5 - 1e-5, 1))
                if name == "tabula_beb":
                    reward[s, a] += 1 / (1 + visits + 1)
                    later[s, a] = 2 * 10 * 10 * strength * 10 / (1 + seen + 10)
            if "ucrl2" in name:
                model = (torch.tensor(x)[None] for x in (reward, transition, radius))
                reward_1SA, transition_1SAT, radius_1SA = model
                q.append(mdps.plan(reward_1SA, transition_1SAT, left, radius_1SA)[2][:, 0].numpy())
            elif "myopic" in name:
                q.append(np.array([reward] * left))
            else:
                q.append(loop_q(reward, transition, left, later))
        assert policy_HBS[:, b].tolist() == np.max(q, axis=0).argmax(-1).tolist()


def test_ucrl2_radii_widen_the_plan():
    reward_BSA, transition_BSAT = small_mdps(2, 5, 3)
    values = [mdps.plan(reward_BSA, transition_BSAT, 10, torch.full((2, 5, 3), r).double())[1][0] for r in (0, 0.2, 9)]
    torch.testing.assert_close(values[0], mdps.plan(reward_BSA, transition_BSAT, 10)[1][0])
    assert (values[1] > values[0]).all()
    best_B = reward_BSA.flatten(1).amax(1)  # with every transition allowed, 9 of 10 steps earn the highest reward
    torch.testing.assert_close(values[2], reward_BSA.amax(-1) + 9 * best_B[:, None])


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("counts_last", [True, False])
def test_mdp_run_accounts_for_every_step(every_step, counts_last):
    """A walk without chance from 0 to 9, where it stays: every state is left once an episode."""
    b, beliefs = 500, []
    transition_BSAT = torch.zeros(b, 10, 5, 10)
    for s in range(10):
        transition_BSAT[:, s, :, min(s + 1, 9)] = 1
    reward_BSA = torch.randn(10, 5, generator=seeded(1)).expand(b, 10, 5)

    def around(belief, generator):
        beliefs.append((belief.counts.clone(), belief.sums.clone(), belief.visits.clone(), belief.left))
        wrong = torch.full((belief.left - 1 if every_step else 0, b, 10), 1)  # only the first step of a plan is taken
        return torch.cat([torch.full((belief.left - len(wrong), b, 10), 3), wrong]), 0.0

    rule = mdps.Rule(around, every_step=every_step, counts_last=counts_last)
    total_B = mdps.run(rule, (reward_BSA, transition_BSAT), 3, seeded(2))
    assert len(beliefs) == (30 if every_step else 3)
    for number, (counts_BSAT, sums_BSA, visits_BSA, left) in enumerate(beliefs):
        episode, step = divmod(number, 10) if every_step else (number, 0)
        assert left == 10 - step
        times_S = torch.tensor([episode + (s < step) for s in range(10)]).float()
        expected_SAT = torch.zeros(10, 5, 10)
        expected_SAT[:, 3] = times_S[:, None] * transition_BSAT[0, :, 3]
        if not counts_last:
            expected_SAT[9] = 0  # state 9 is left in the last step
        assert (counts_BSAT == expected_SAT).all()
        assert (visits_BSA[:, :, 3] == times_S).all()
        assert (sums_BSA[:, :, [0, 1, 2, 4]] == 0).all()
        error_S = sums_BSA[:, :, 3].mean(0) - times_S * reward_BSA[0, :, 3]
        assert (error_S.abs() <= 4.5 * (times_S / b) ** 0.5).all()
    assert total_B.mean().item() == pytest.approx(3 * reward_BSA[0, :, 3].sum().item(), abs=4 * (30 / b) ** 0.5)
    assert total_B.std().item() == pytest.approx(30**0.5, rel=0.15)


def test_mdp_run_draws_the_transitions():
    model, seen = tuple(x[:1].expand(3000, *x.shape[1:]) for x in mdps.sample_mdps(1, seeded(1))), []

    def third(belief, generator):
        seen.append(belief)
        return torch.full((10, 3000, 10), 3), 0.0

    mdps.run(mdps.Rule(third), model, 1, seeded(2))
    counts_ST = seen[0].counts[:, :, 3].sum(0)  # the belief as the run left it
    visits_S1, p_ST = counts_ST.sum(-1, keepdim=True), model[1][0, :, 3]
    assert counts_ST.sum() == 30000
    assert ((counts_ST / visits_S1 - p_ST).abs() <= 4.5 * (p_ST * (1 - p_ST) / visits_S1).sqrt() + 1e-4).all()


def test_mdp_optimal_value_is_earned():
    """Copies of one MDP, played by its own best policy: the mean total is the planned value; half random is worse."""
    model = tuple(x[:1].expand(4000, *x.shape[1:]) for x in mdps.sample_mdps(1, seeded(1)))
    policy_HBS, value_HBS, _ = mdps.plan(*model)
    total_B = mdps.run(mdps.Rule(lambda belief, generator: (policy_HBS, 0.0)), model, 2, seeded(2))
    assert total_B.mean().item() == pytest.approx(
        2 * value_HBS[0, 0, 0].item(), abs=4 * total_B.std().item() / 4000**0.5
    )
    explored_B = mdps.run(mdps.Rule(lambda belief, generator: (policy_HBS, 0.5)), model, 2, seeded(2))
    random_B = mdps.run(mdps.RULES["random"], model, 2, seeded(2))
    assert above(total_B - explored_B)
    assert above(explored_B - random_B)


def test_mdp_order_and_totals():
    model = mdps.sample_mdps(1000, seeded(1))
    assert model[0].mean().item() == pytest.approx(1, abs=0.02)
    assert model[0].std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(model[1].sum(-1), torch.ones(1000, 10, 5))
    assert model[1].var().item() == pytest.approx(0.1 * 0.9 / 11, rel=0.02)
    tuned = {"beb": 0.5, "beb_every_step": 0.75, "epsilon_greedy": 0.5, "ucrl2": 0.2, "myopic_bonus": 0.75}
    tuned |= {"tabula_opsrl": 5, "tabula_ucrl2": 0.4, "tabula_beb": 0.0016, "tabula_epsilon_greedy": 0.1}
    options = {name: {"strength": tuned[name]} if name in tuned else {} for name in mdps.RULES}
    total = {name: mdps.run(rule, model, 10, seeded(2), **options[name]) for name, rule in mdps.RULES.items()}
    best_B = 10 * mdps.plan(*model)[1][0, :, 0]
    assert total["random"].mean().item() == pytest.approx(100, abs=2.5)
    assert total["psrl"].mean().item() == pytest.approx(134, abs=3)
    assert above(total["psrl"] - total["random"])
    assert above(total["optimistic_psrl"] - total["psrl"])
    assert above(total["greedy"] - total["epsilon_greedy"])
    for name in ("beb", "ucrl2"):
        assert above(total[name] - total["optimistic_psrl"])
        assert above(best_B - total[name])
    for name in ("psrl", "beb", "greedy"):  # new knowledge is used at once
        assert above(total[f"{name}_every_step"] - total[name])
    assert above(total["myopic"] - total["beb"])
    assert above(total["myopic_bonus"] - total["myopic"])
    assert above(total["tabula_opsrl"] - total["tabula_psrl"])
    for name in (
        "psrl",
        "opsrl",
    ):  # the paper's figures, of 1,000 other MDPs
        paper = dict(zip(mdps.COLUMNS, mdps.PAPER[10], strict=True))[f"tabula_{name}"]
        assert total[f"tabula_{name}"].mean().item() == pytest.approx(paper, abs=4)


# ---- tuning and the command lines ----


@pytest.mark.parametrize("module", [bandits, mdps])
def test_the_best_parameter_is_taken(module, monkeypatch):
    grids = {"epsilon_greedy": (1.0, 0.0, 0.8), "ucb1": (0.2, 50.0), "ucrl2": (0.1, 50.0), "beb": (50.0, 0.5)}
    grids |= {"beb_every_step": (50.0, 0.5), "myopic_bonus": (50.0, 0.5), "tabula_opsrl": (20, 1)}
    grids |= {"tabula_ucrl2": (0.4, 0.0001), "tabula_beb": (1.0, 0.0016), "tabula_epsilon_greedy": (1.0, 0.1)}
    best = {"epsilon_greedy": 0.0, "ucb1": 0.2, "ucrl2": 0.1, "beb": 0.5, "beb_every_step": 0.5, "myopic_bonus": 0.5}
    best |= {"tabula_opsrl": 20, "tabula_ucrl2": 0.4, "tabula_beb": 0.0016, "tabula_epsilon_greedy": 0.1}
    grids["densest_thompson"], best["densest_thompson"] = (1, 10), 10
    monkeypatch.setattr(module, "GRIDS", {name: grids[name] for name in module.GRIDS})
    setting = {"arms": 5, "pulls": 50} if module is bandits else {"episodes": 8}
    result = module.evaluate(**setting, problems=200)
    assert result["tuned"] == {name: best[name] for name in module.GRIDS}
    for name in module.GRIDS:  # and the figure is that parameter's
        assert result["reward"][name][0] > result["reward"]["random"][0] * 1.2


@pytest.mark.parametrize("file", ["classic_bandits", "classic_mdps"])
def test_command_line(file):
    command = [sys.executable, f"benchmark/{file}.py", "--problems", "30"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = map(json.loads, out.splitlines())
    module = {"classic_bandits": bandits, "classic_mdps": mdps}[file]
    names = {"classic_bandits": bandits.POLICIES, "classic_mdps": mdps.RULES}[file]
    best = {"classic_bandits": "best arm", "classic_mdps": "optimal"}[file]
    assert set(line["reward"]) == {*names, best}
    assert line["reward"][best][0] > line["reward"]["random"][0] + line["reward"]["random"][1]
    assert set(line["paper"]) == set(module.COLUMNS)
    assert {name: value in module.GRIDS[name] for name, value in line["tuned"].items()} == dict.fromkeys(
        module.GRIDS, True
    )
    half = line["reward"]["random"][1]
    deviation = half * 30**0.5 / 1.96
    assert 1 < deviation < (4 if file == "classic_bandits" else 45)
