"""The mathematics of algos/promp.py against independent oracles, in float64: one task and one step at a time, densities
and divergences written out, central differences, Adam's formula, golden values, the meta-gradient of maml_trpo.py."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch.distributions import Normal, kl_divergence
from torch.func import grad

from algos import maml_trpo
from algos import promp as ours
from envs import summarise
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64 is used by being here)
from tests.test_maml_trpo_math import (
    BANDIT,
    BANDIT_THETA,
    TASK1,
    TASK2,
    WALK_THETA,
    Cliff,
    E,
    N,
    T,
    Tabular,
    central_differences,
    close,
    ref_adapt,
    ref_log_prob,
    ref_policy,
    relative_error,
    weighted,
)

steps_of_training = pytest.mark.parametrize("inner_steps", [1, 2])
ETAS = [2.0, 0.5]  # of the inner steps, in whose order they stand


# ---------------------------------------------------------------------------------------------------------------------
# Toy environment and batches; algos/reptile_ppo.py and algos/multitask_ppo.py are tested with the same
# ---------------------------------------------------------------------------------------------------------------------


def small_args(module, **kwargs):
    small = {"meta_batch_size": N, "episodes_per_task": E, "horizon": T, "hidden_size": 2, "inner_lr": 1.0}
    return module.Args(**{**small, "gamma": 0.9, "gae_lambda": 0.9, "clip": 0.05, **kwargs})


def make_args(**kwargs):
    return small_args(ours, **kwargs)


def make_envs(args):
    return Cliff(args.meta_batch_size * args.episodes_per_task, args.horizon, dtype=torch.float64)


def make_theta(args, seed=0):
    """All parameters are away from zero, so that none drops out of a comparison."""
    theta = ours.init_policy(make_envs(args), args.hidden_size, seeded(seed))
    return nearby(theta, 0.3, seed)


def nearby(theta, distance=0.05, seed=2):
    generator = seeded(seed)
    return {name: x + distance * torch.randn(x.shape, generator=generator) for name, x in theta.items()}


def unflatten(vector, like):
    return maml_trpo.unflatten(vector, like)


def stack(policies):
    return {name: torch.stack([params[name] for params in policies]) for name in policies[0]}


def part(batch, i):
    """Task i of a batch, or episode i of a task."""
    return type(batch)(*(x[i] for x in batch))


def clone(params):
    return {name: value.clone() for name, value in params.items()}


def make_batches(args, theta, seed=0):
    """The supports of all inner steps, and the query, as in training."""
    envs, generator = make_envs(args), seeded(seed)
    tasks, params, batches = envs.sample_tasks(N, generator), theta, []
    for _ in range(args.inner_steps):
        batches.append(ours.collect(envs, tasks, params, args, generator))
        params = ours.inner_step(params, batches[-1], args)[0]
    batches.append(ours.collect(envs, tasks, params, args, generator))
    for batch in batches:  # some episodes end early, most steps count, and tasks differ in how many do
        assert 0.5 < batch.mask.mean() < 0.97
        assert len(batch.mask.sum((1, 2)).unique()) > 1
    return batches[:-1], batches[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------------


def slow_step(theta, batch, args, scale=1.0, create_graph=False):
    """One inner step of one task."""
    lvc = SimpleNamespace(estimator="lvc", inner_lr=args.inner_lr, gamma=args.gamma)
    return ref_adapt(theta, batch, lvc, scale, create_graph)


def slow_clipped(params, batch, clip):
    """PPO's terms of one policy's steps, one after the other; which (advantage is positive, ratio is beyond) occur."""
    log_prob, terms, kinds = ref_log_prob(params, batch), [], []
    for e, t in batch.mask.nonzero().tolist():
        ratio, advantage = (log_prob[e, t] - batch.log_prob[e, t]).exp(), batch.advantage[e, t]
        if advantage > 0 and ratio > 1 + clip:
            ratio_used = 1 + clip
        elif advantage < 0 and ratio < 1 - clip:
            ratio_used = 1 - clip
        else:
            ratio_used = ratio
        terms.append(ratio_used * advantage)
        kinds.append((bool(advantage > 0), 1 if ratio > 1 + clip else -1 if ratio < 1 - clip else 0))
    return terms, kinds


def slow_kl(before, after, batch):
    """Mean over one task's steps of KL(before || after)."""
    (m, s), (n, r) = ref_policy(before, batch.obs), ref_policy(after, batch.obs)
    m, s = m.detach(), s.detach()
    return ((r / s).log() + (s**2 + (m - n) ** 2) / (2 * r**2) - 0.5).sum(-1)[batch.mask == 1].mean()


def slow_parts(theta, old_theta, supports, query, args, create_graph=False):
    """What J is made of, and the share of clipped steps: "gain", "kl_k0", .. of each inner step, "clipped"."""
    parts = dict.fromkeys(["gain", "clipped", *(f"kl_k{k}" for k in range(len(supports)))], 0.0)
    for i in range(N):
        new, old = theta, old_theta
        for k, support in enumerate(part(support, i) for support in supports):
            parts[f"kl_k{k}"] = parts[f"kl_k{k}"] + slow_kl(old, new, support) / N
            new, old = (slow_step(x, support, args, create_graph=create_graph) for x in (new, old))
        terms, kinds = slow_clipped(new, part(query, i), args.clip)
        parts["gain"] = parts["gain"] + sum(terms) / len(terms) / N
        parts["clipped"] += sum(beyond != 0 for _, beyond in kinds) / len(kinds) / N
    return parts


def slow_objective(parts, kl_coef):
    """J: of the gain the mean over the inner steps of eta KL is taken away."""
    penalties = [eta * parts[f"kl_k{k}"] for k, eta in enumerate(kl_coef)]
    assert f"kl_k{len(kl_coef)}" not in parts
    return parts["gain"] - sum(penalties) / len(penalties)


def slow_gradient(theta, old_theta, supports, query, args, kl_coef):
    """Of J, one entry per parameter, through the inner steps."""
    theta = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    J = slow_objective(slow_parts(theta, old_theta, supports, query, args, create_graph=True), kl_coef)
    return dict(zip(theta, torch.autograd.grad(J, list(theta.values())), strict=True))


def slow_outer_kl(theta, supports, query, args):
    """Mean over tasks of the mean over their steps of r - 1 - log r."""
    means = []
    for i in range(N):
        params, batch = theta, part(query, i)
        for support in supports:
            params = slow_step(params, part(support, i), args)
        log_prob, terms = ref_log_prob(params, batch), []
        for e, t in batch.mask.nonzero().tolist():
            log_ratio = float((log_prob[e, t] - batch.log_prob[e, t]).detach())
            terms.append(math.exp(log_ratio) - 1 - log_ratio)
        means.append(sum(terms) / len(terms))
    return sum(means) / N


class SlowAdam:
    """Ascent on one number after the other, by the formula of arXiv:1412.6980, Algorithm 1."""

    def __init__(self):
        self.t, self.m, self.v = 0, {}, {}

    def step(self, theta, gradient, lr):
        self.t, moved = self.t + 1, {}
        for name, value in theta.items():
            moved[name] = value.clone()
            for place in np.ndindex(*value.shape):
                key, g = (name, place), float(gradient[name][place])
                self.m[key] = 0.9 * self.m.get(key, 0.0) + 0.1 * g
                self.v[key] = 0.999 * self.v.get(key, 0.0) + 0.001 * g**2
                m, v = self.m[key] / (1 - 0.9**self.t), self.v[key] / (1 - 0.999**self.t)
                moved[name][place] += lr * m / (math.sqrt(v) + 1e-8)
        return moved


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the algorithm
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_task", [False, True])
def test_ratios_against_torch_distributions(per_task):
    args = make_args()
    policies = [make_theta(args, seed=i) for i in range(N)] if per_task else [make_theta(args, seed=5)] * N
    batch = make_batches(args, make_theta(args))[1]
    actual, expected = ours.ratios(stack(policies) if per_task else policies[0], batch), torch.ones(N, E, T)
    for i, e, t in batch.mask.nonzero().tolist():
        mean, std = ref_policy(policies[i], batch.obs[i, e, t].view(1, 1, -1))
        density = Normal(mean[0, 0], std).log_prob(batch.action[i, e, t]).exp().prod()
        expected[i, e, t] = density / batch.log_prob[i, e, t].exp()
    close(actual, expected)
    assert (actual[batch.mask == 1] - 1).abs().min() > 1e-6
    alone = torch.stack([ours.ratios(policies[i], part(batch, i)) for i in range(N)])  # as inside vmap
    close(alone, expected)


def test_ratios_of_the_policy_that_sampled_are_one():
    args = make_args()
    theta = make_theta(args)
    (support,), query = make_batches(args, theta)
    close(ours.ratios(theta, support), torch.ones(N, E, T), 1e-12)
    close(ours.ratios(ours.inner_step(theta, support, args)[0], query), torch.ones(N, E, T), 1e-12)
    assert not torch.allclose(ours.ratios(theta, query), torch.ones(N, E, T), atol=1e-3)


def test_a_sample_is_that_of_maml_trpo():
    args = make_args()
    theta, envs = make_theta(args), make_envs(args)
    tasks = envs.sample_tasks(N, seeded(0))
    batch = ours.collect(envs, tasks, theta, args, seeded(1))
    expected = maml_trpo.collect(envs, tasks, theta, args, seeded(1))
    assert 0 < batch.mask.mean() < 1
    for name, value in batch._asdict().items():
        close(value, getattr(expected, name), 1e-12)


def test_inner_step_against_a_loop_over_tasks():
    args = make_args(inner_lr=0.7)
    theta = make_theta(args)
    (support,), query = make_batches(args, theta)
    once = ours.inner_step(theta, support, args)[0]
    twice = ours.inner_step(once, query, args, 0.5)[0]  # from one policy per task, with half the step
    assert list(once) == list(twice) == list(theta)
    for i in range(N):
        first = slow_step(theta, part(support, i), args)
        second = slow_step(first, part(query, i), args, 0.5)
        for name in theta:
            close(once[name][i], first[name].detach(), 1e-10)
            close(twice[name][i], second[name].detach(), 1e-10)


def test_inner_step_against_central_differences():
    """Away from the policy that sampled, where the ratio's gradient is not that of the logarithm."""
    args = make_args(inner_lr=0.7)
    (support,), _ = make_batches(args, make_theta(args))
    theta = nearby(make_theta(args), 0.2)
    moved = ours.inner_step(theta, support, args)[0]
    for i in range(N):
        batch = part(support, i)

        def mean_gain(vector, batch=batch):
            ratio = (ref_log_prob(unflatten(vector, theta), batch) - batch.log_prob).exp()
            return float((ratio * batch.advantage)[batch.mask == 1].mean())

        expected = flat(theta) + 0.7 * central_differences(mean_gain, flat(theta))
        close(flat({name: value[i] for name, value in moved.items()}), expected, 1e-8)


def test_inner_step_equals_that_of_maml_trpo():
    args = make_args()
    theta = make_theta(args)
    (support,), query = make_batches(args, theta)
    reference = maml_trpo.Args(estimator="lvc", inner_lr=args.inner_lr)
    once, twice = ours.inner_step(theta, support, args)[0], theta
    once = ours.inner_step(once, query, args, 0.5)[0]
    for batch, scale in ((support, 1.0), (query, 0.5)):
        twice = maml_trpo.adapt(twice, batch, reference, scale)
    close(flat(once), flat(twice), 1e-12)


def test_an_inner_step_raises_the_gain():
    args = make_args(inner_lr=0.01)
    theta = make_theta(args)
    (support,), _ = make_batches(args, theta)
    adapted = ours.inner_step(theta, support, args)[0]
    for i in range(N):
        log_prob = ref_log_prob({name: value[i] for name, value in adapted.items()}, part(support, i))
        gain = (log_prob - support.log_prob[i]).exp() * support.advantage[i]
        assert gain[support.mask[i] == 1].mean() > 1e-6


def test_step_mean():
    """Tasks of 1 and 3 steps weigh the same; what is masked counts nowhere."""
    mask = torch.tensor([[[1.0, 0], [0, 0]], [[1, 1], [1, 0]]])
    x = torch.tensor([[[10.0, 99], [99, 99]], [[1, 2], [6, 99]]])
    close(ours.step_mean(x, mask), torch.tensor(6.5))


@steps_of_training
def test_repeated_inner_steps_list_the_policies_on_the_supports(inner_steps):
    args = make_args(inner_steps=inner_steps)
    theta = make_theta(args)
    supports, _ = make_batches(args, theta)
    policies, params = ours.repeat_inner_steps(theta, supports, args)
    assert len(policies) == inner_steps
    for i in range(N):
        expected = theta
        for policy, support in zip(policies, supports, strict=True):
            close(policy.mean[i].view(E, T, -1), ref_policy(expected, support.obs[i])[0].detach())
            spread = expected["log_std"].exp().detach()
            close(policy.stddev[i], spread.expand_as(policy.stddev[i]))
            expected = slow_step(expected, part(support, i), args)
        for name, value in expected.items():
            close(params[name][i], value.detach())


# ---------------------------------------------------------------------------------------------------------------------
# The objective: its value one step at a time, its gradient by central differences through the inner steps
# ---------------------------------------------------------------------------------------------------------------------


def objective_gradient(theta, old, supports, query, args, kl_coef):
    def objective(vector):
        return ours.promp_objective(unflatten(vector, theta), old, supports, query, args, kl_coef)[0]

    return grad(objective)(flat(theta))


@pytest.fixture
def detached_inner_step(monkeypatch):
    """The defect that the tests of gradients must see: no derivative through an inner step's gradient."""
    inner_step = ours.inner_step

    def detached(params, support, args, scale=1.0):
        moved, policies = inner_step(params, support, args, scale)
        return {name: value + (moved[name] - value).detach() for name, value in params.items()}, policies

    def switch():
        monkeypatch.setattr(ours, "inner_step", detached)

    return switch


@pytest.mark.parametrize("epoch", ["first", "later"])
@steps_of_training
def test_gradient_against_central_differences(inner_steps, epoch, detached_inner_step):
    """In the first epoch without the penalty, where all ratios are 1; in a later one with clipping and the penalty."""
    args = make_args(inner_steps=inner_steps)
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    old, _ = ours.repeat_inner_steps(sampled_from, supports, args)
    theta, kl_coef = (sampled_from, [0.0, 0.0]) if epoch == "first" else (nearby(sampled_from), ETAS)
    kl_coef = kl_coef[:inner_steps]

    def objective(vector):
        parts = slow_parts(unflatten(vector, theta), sampled_from, supports, query, args)
        return float(slow_objective(parts, kl_coef).detach())

    J, parts = ours.promp_objective(theta, old, supports, query, args, kl_coef)
    close(J, torch.tensor(objective(flat(theta))))
    assert (parts["clipped"] > 0.1) == (epoch == "later")
    expected = central_differences(objective, flat(theta))
    assert relative_error(objective_gradient(theta, old, supports, query, args, kl_coef), expected) < 1e-6
    if (inner_steps, epoch) == (2, "later"):  # each KL has its own eta
        assert relative_error(objective_gradient(theta, old, supports, query, args, kl_coef[::-1]), expected) > 1e-2
    detached_inner_step()
    assert relative_error(objective_gradient(theta, old, supports, query, args, kl_coef), expected) > 1e-2


@steps_of_training
def test_gradient_equals_the_meta_gradient_of_maml_trpo(inner_steps, detached_inner_step):
    """In the first epoch, and in later ones with so wide a clip that it takes nothing away."""
    args = make_args(inner_steps=inner_steps)
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    old, _ = ours.repeat_inner_steps(sampled_from, supports, args)
    reference = maml_trpo.Args(estimator="lvc", inner_lr=args.inner_lr)
    for theta, args.clip in ((sampled_from, 0.05), (nearby(sampled_from), 1.0)):

        def objective(vector, theta=theta):
            J_N, _ = maml_trpo.surrogate(unflatten(vector, theta), supports, query, reference)
            return J_N.mean()

        expected = grad(objective)(flat(theta))
        actual = objective_gradient(theta, old, supports, query, args, [0.0] * inner_steps)
        _, parts = ours.promp_objective(theta, old, supports, query, args, [0.0] * inner_steps)
        assert parts["clipped"] == 0
        close(actual, expected, 1e-10)
    detached_inner_step()
    assert relative_error(objective_gradient(theta, old, supports, query, args, [0.0] * inner_steps), expected) > 1e-2


@pytest.mark.parametrize(
    ("tasks", "theta", "alpha", "expected"),
    [
        ((BANDIT,), BANDIT_THETA, 0.5, [[0.3040772784, -0.0344907527, -0.2695865257]]),
        ((TASK1, TASK2), WALK_THETA, 0.3, [[-0.0988026720, 0.0988026720], [0.1448852566, -0.1448852566]]),
    ],
    ids=["bandit", "two states"],
)
@pytest.mark.parametrize("baseline", ["0", "V", "5"])
def test_golden_meta_gradient(tasks, theta, alpha, expected, baseline, monkeypatch):
    """That of low-variance curvature, SPECS.md G.2, over an enumeration of all trajectories; the first epoch's."""
    theta = torch.tensor(theta)
    shape, tasks = theta.shape, [Tabular(*mdp) for mdp in tasks]

    def policy(params, obs):  # the density of action 0 is the probability of the pair (s, a) that obs is
        log_pi = torch.log_softmax(params["b0"].unflatten(-1, shape), -1).flatten(-2)
        log_prob = obs @ log_pi.unsqueeze(-1)
        return torch.zeros_like(log_prob), (-log_prob).exp() / math.sqrt(2 * math.pi)

    monkeypatch.setattr(ours, "policy", policy)
    scale = tasks[0].reward.numel()  # undoes the means over steps

    def batch(episodes):
        fields = [{name: getattr(x, name) for name in ours.Episodes._fields} for x in episodes]
        return ours.Episodes(**{name: torch.stack([x[name] for x in fields]) for name in ours.Episodes._fields})

    adapted = [theta + alpha * grad(mdp.expected_return)(theta) for mdp in tasks]
    support = batch([weighted(mdp, theta, baseline) for mdp in tasks])
    query = batch([mdp.episodes(x, 0.0, mdp.prob(x) * scale) for mdp, x in zip(tasks, adapted, strict=True)])
    args = ours.Args(inner_lr=alpha * scale)
    old, params = ours.repeat_inner_steps({"b0": theta.flatten()}, [support], args)
    close(params["b0"], torch.stack(adapted).flatten(1))
    actual = objective_gradient({"b0": theta.flatten()}, old, [support], query, args, [0.0])
    close(actual.view(shape), torch.tensor(expected))


def test_clipping_against_a_loop_over_steps():
    args = make_args()
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    old, _ = ours.repeat_inner_steps(sampled_from, supports, args)
    theta, means, shares, seen = nearby(sampled_from), [], [], set()
    for i in range(N):
        params = slow_step(theta, part(supports[0], i), args)
        terms, kinds = slow_clipped(params, part(query, i), args.clip)
        means.append(float(sum(terms).detach()) / len(terms))
        shares.append(sum(beyond != 0 for _, beyond in kinds) / len(kinds))
        seen |= set(kinds)
    assert seen == {(sign, beyond) for sign in (False, True) for beyond in (-1, 0, 1)}
    _, parts = ours.promp_objective(theta, old, supports, query, args, [0.0])
    close(parts["gain"], torch.tensor(sum(means) / N))
    close(parts["clipped"], torch.tensor(sum(shares) / N))


def test_a_step_beyond_the_clip_gains_nothing_more():
    """Objective of one query step, as a function of its old density; the other steps are masked."""
    args = make_args(clip=0.2)
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    old, _ = ours.repeat_inner_steps(theta, supports, args)
    mask = torch.zeros_like(query.mask)
    mask[:, 0, 0] = 1
    for advantage, ratio, expected in [
        (2, 1.1, 2.2), (2, 1.5, 2.4), (2, 0.5, 1.0), (-2, 1.1, -2.2), (-2, 1.5, -3.0), (-2, 0.5, -1.6),
    ]:  # fmt: skip
        one = query._replace(mask=mask, advantage=advantage * mask, log_prob=query.log_prob - math.log(ratio))
        J, parts = ours.promp_objective(theta, old, supports, one, args, [0.0])
        close(J, torch.tensor(float(expected)))
        assert parts["clipped"] == (ratio != 1.1)


@steps_of_training
def test_penalty_against_torch_distributions(inner_steps):
    """KL(old || new) of the policies before each inner step, on the support that they sampled, times its eta; of these
    the mean over steps."""
    args, etas = make_args(inner_steps=inner_steps), [3.0, 0.4][:inner_steps]
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    old, _ = ours.repeat_inner_steps(sampled_from, supports, args)
    theta, expected, swapped = nearby(sampled_from), [0.0] * inner_steps, [0.0] * inner_steps
    for i in range(N):
        before, after = sampled_from, theta
        for k, support in enumerate(part(support, i) for support in supports):
            p, q = (Normal(*ref_policy(params, support.obs)) for params in (before, after))
            inside = support.mask == 1
            expected[k] += float(kl_divergence(p, q).sum(-1)[inside].mean().detach()) / N
            swapped[k] += float(kl_divergence(q, p).sum(-1)[inside].mean().detach()) / N
            before, after = (slow_step(params, support, args) for params in (before, after))
    gain = ours.promp_objective(theta, old, supports, query, args, [0.0] * inner_steps)[0]
    J, parts = ours.promp_objective(theta, old, supports, query, args, etas)
    assert sorted(parts) == ["clipped", "gain", *(f"kl_k{k}" for k in range(inner_steps)), "outer_kl"]
    for k in range(inner_steps):
        assert float(parts[f"kl_k{k}"]) == pytest.approx(expected[k], rel=1e-9)
        assert abs(swapped[k] - expected[k]) > 1e-3 * expected[k]
    close(parts["gain"], gain)
    close(J, gain - sum(eta * kl for eta, kl in zip(etas, expected, strict=True)) / inner_steps)


@steps_of_training
def test_no_penalty_and_no_pull_at_the_old_parameters(inner_steps):
    args = make_args(inner_steps=inner_steps)
    theta, none, (small, large) = make_theta(args), [0.0] * inner_steps, ([x] * inner_steps for x in (1.0, 100.0))
    supports, query = make_batches(args, theta)
    old, _ = ours.repeat_inner_steps(theta, supports, args)
    _, parts = ours.promp_objective(theta, old, supports, query, args, small)
    assert all(abs(float(parts[f"kl_k{k}"])) < 1e-14 for k in range(inner_steps))
    assert abs(float(parts["outer_kl"])) < 1e-14
    without, with_it = (objective_gradient(theta, old, supports, query, args, etas) for etas in (none, large))
    close(with_it, without, 1e-11)
    away = nearby(theta)  # elsewhere it pulls back
    without, with_it = (objective_gradient(away, old, supports, query, args, etas) for etas in (none, small))
    assert (with_it - without) @ (flat(away) - flat(theta)) < 0


@steps_of_training
def test_outer_kl_against_a_loop_over_steps(inner_steps):
    args = make_args(inner_steps=inner_steps)
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    old, _ = ours.repeat_inner_steps(sampled_from, supports, args)
    theta = nearby(sampled_from)
    _, parts = ours.promp_objective(theta, old, supports, query, args, [0.0] * inner_steps)
    expected = slow_outer_kl(theta, supports, query, args)
    assert float(parts["outer_kl"]) == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-3


@steps_of_training
def test_outer_kl_is_that_of_gaussians(inner_steps):
    """Many episodes: the mean of r - 1 - log r is KL(pi_old || pi_new) but for sampling error, of adapted policies."""
    args = make_args(inner_steps=inner_steps, episodes_per_task=2000, inner_lr=0.3)
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    theta = nearby(sampled_from, 0.2)
    old, before = ours.repeat_inner_steps(sampled_from, supports, args)
    _, after = ours.repeat_inner_steps(theta, supports, args)
    p, q = (Normal(*maml_trpo.policy(params, query.obs.flatten(1, 2))) for params in (before, after))
    exact, swapped = (
        ours.step_mean(kl_divergence(*pair).sum(-1).view_as(query.mask), query.mask) for pair in ((p, q), (q, p))
    )
    ratio = ours.ratios(after, query)
    terms = ((ratio - 1 - ratio.log()) * query.mask).sum(-1) / query.mask.mean((1, 2))[:, None] / T  # of episodes
    error = float(terms.std(1).square().sum().sqrt()) / N / math.sqrt(args.episodes_per_task)
    _, parts = ours.promp_objective(theta, old, supports, query, args, [0.0] * inner_steps)
    assert abs(float(parts["outer_kl"] - exact)) < 3 * error
    assert abs(float(swapped - exact)) > 6 * error
    assert error < 0.03 * float(exact)


def test_outer_kl_is_a_number_where_a_ratio_is_zero():
    """A step that the new policies would never take makes the KL large; were it infinite, it would end the run."""
    args = make_args()
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    old, _ = ours.repeat_inner_steps(theta, supports, args)
    _, parts = ours.promp_objective(theta, old, supports, query._replace(log_prob=query.log_prob + 1000), args, [0.0])
    assert 60 < float(parts["outer_kl"]) < 100


def test_nothing_behind_an_early_end_matters():
    """Other observations and actions there, so improbable when drawn that a ratio would overflow, change no result."""
    args = make_args(epochs=2, outer_lr=0.01)
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    results = []
    for size in (0.0, 1.0):
        *s, q = (
            batch._replace(
                obs=batch.obs + x[..., None], action=batch.action + x[..., None], log_prob=batch.log_prob - 1000 * x
            )
            for batch, x in ((batch, size * (1 - batch.mask)) for batch in (*supports, query))
        )
        moved = clone(theta)
        stats = ours.meta_update(moved, torch.optim.Adam(moved.values(), args.outer_lr), s, q, args, [1.0])
        results.append((flat(moved), torch.tensor(list(stats.values()))))
    for plain, disturbed in zip(*results, strict=True):
        close(disturbed, plain, 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The meta-update
# ---------------------------------------------------------------------------------------------------------------------


@steps_of_training
def test_meta_update_is_epochs_of_adam_on_the_same_data(inner_steps):
    """Two updates in a row: within one the data and the old policies stay, and Adam remembers the first."""
    args = make_args(inner_steps=inner_steps, epochs=3, outer_lr=0.02)
    theta = make_theta(args)
    optimizer, adam, expected = torch.optim.Adam(theta.values(), args.outer_lr), SlowAdam(), clone(theta)
    for seed, kl_coef in ((0, ETAS[:inner_steps]), (1, ETAS[::-1][:inner_steps])):
        supports, query = make_batches(args, clone(theta), seed)
        untouched = copy.deepcopy((supports, query))
        stats = ours.meta_update(theta, optimizer, supports, query, args, kl_coef)
        for batch, same in zip((*supports, query), (*untouched[0], untouched[1]), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(batch, same, strict=True))
        old = expected
        for _ in range(3):
            gradient = slow_gradient(expected, old, supports, query, args, kl_coef)
            expected = adam.step(expected, gradient, args.outer_lr)
        close(flat(theta), flat(expected), 1e-8)
        parts = slow_parts(expected, old, supports, query, args)
        parts["outer_kl"] = slow_outer_kl(expected, supports, query, args)
        parts["gradient_norm"] = flat(gradient).norm()
        parts = {f"train/{name}": float(torch.as_tensor(value).detach()) for name, value in parts.items()}
        assert stats == pytest.approx(parts, rel=1e-6)
        assert abs(stats["train/gain"]) > 1e-3
        assert stats["train/clipped"] > 0
        assert min(stats[f"train/kl_k{k}"] for k in range(inner_steps)) > 1e-4


def test_theta_stays_a_leaf_in_place():
    args = make_args()
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    before, objects = clone(theta), dict(theta)
    ours.meta_update(theta, torch.optim.Adam(theta.values(), 0.01), supports, query, args, [0.1])
    for name, value in theta.items():
        assert value is objects[name]
        assert not value.requires_grad
        assert not torch.equal(value, before[name])


def test_next_kl_coef():
    for kl, factor in ((0.0, 0.5), (0.33, 0.5), (0.34, 1), (0.5, 1), (0.75, 1), (0.7501, 2), (9.0, 2)):
        assert ours.next_kl_coef(0.8, kl, 0.5) == 0.8 * factor
        assert ours.next_kl_coef(0.8, kl, 0.0) == 0.8
    assert ours.next_kl_coef(0.8, 0.5, 0.75) == 0.8  # the border itself, 0.75 / 1.5


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def begin(args, seed=3):
    return {"iteration": 0, "env_steps": 0, "theta": make_theta(args), "generator": seeded(seed).get_state()}


def test_training_against_iterations_by_hand():
    """Two of them, with two inner steps, Adam's formula, and etas from the KLs of the first."""
    options = {"inner_steps": 2, "iterations": 2, "epochs": 2, "outer_lr": 0.02, "kl_coef": 0.5, "target_kl": 4e-3}
    args = make_args(**options, inner_lr=0.3, eval_every=100)
    run, state = Recorder(args), begin(args)
    initial = clone(state["theta"])
    ours.train(make_envs(args), args, run, state)
    envs, generator, theta, adam, kl_coef, steps = make_envs(args), seeded(3), initial, SlowAdam(), [0.5, 0.5], 0
    for iteration, env_steps, stats in run.logged:
        tasks, policies, batches = envs.sample_tasks(N, generator, "train"), [theta] * N, []
        for _ in range(3):
            batches.append(maml_trpo.collect(envs, tasks, stack(policies), args, generator))
            if len(batches) < 3:
                policies = [slow_step(x, part(batches[-1], i), args) for i, x in enumerate(policies)]
                policies = [{name: value.detach() for name, value in x.items()} for x in policies]
        old = theta
        for _ in range(2):
            gradient = slow_gradient(theta, old, batches[:-1], batches[-1], args, kl_coef)
            theta = adam.step(theta, gradient, args.outer_lr)
        steps += int(sum(batch.mask.sum() for batch in batches))
        parts = slow_parts(theta, old, batches[:-1], batches[-1], args)
        assert env_steps == steps < iteration * 3 * N * E * T
        assert stats["train/return_pre"] == pytest.approx(float(batches[0].reward.sum(-1).mean()), rel=1e-6)
        assert stats["train/return_post"] == pytest.approx(float(batches[2].reward.sum(-1).mean()), rel=1e-6)
        assert stats["train/outer_kl"] == pytest.approx(slow_outer_kl(theta, batches[:-1], batches[-1], args), rel=1e-5)
        for k in range(2):
            kl = float(parts[f"kl_k{k}"].detach())
            assert stats[f"train/kl_k{k}"] == pytest.approx(kl, rel=1e-5)
            assert stats[f"train/kl_coef_k{k}"] == kl_coef[k]
            kl_coef[k] *= 2 if kl > 6e-3 else 1 if kl > 4e-3 / 1.5 else 0.5
    close(flat(state["theta"]), flat(theta), 1e-6)
    assert state["kl_coef"] == kl_coef == [0.25, 0.5]  # after the first iteration 0.5 and 1
    assert len(run.logged) == 2
    assert run.saved == [2]


def logged_etas(state=None, **kwargs):
    """The etas of every iteration [iterations, inner steps], the KLs that came out, and the state at the end."""
    args = make_args(eval_every=100, kl_coef=0.5, **kwargs)
    run, state = Recorder(args), state or begin(args)
    ours.train(make_envs(args), args, run, state)
    rows = [stats for _, _, stats in run.logged]
    etas, kls = (
        [[row[f"train/{name}_k{k}"] for k in range(args.inner_steps)] for row in rows] for name in ("kl_coef", "kl")
    )
    return etas, kls, state


@steps_of_training
def test_etas_fall_rise_or_stay_in_training(inner_steps):
    options = {"inner_steps": inner_steps, "iterations": 3}
    for target_kl, expected in ((0.0, [0.5, 0.5, 0.5]), (1e-9, [0.5, 1.0, 2.0]), (1e6, [0.5, 0.25, 0.125])):
        etas, _, _ = logged_etas(**options, target_kl=target_kl)
        assert etas == [[eta] * inner_steps for eta in expected]


def test_an_eta_follows_its_own_kl():
    """A long inner step tells the second policies far more apart than the first."""
    options = {"inner_steps": 2, "iterations": 1}
    _, ((first, second),), _ = logged_etas(**options)
    assert second > 10 * first
    for target_kl, expected in (
        (math.sqrt(first * second), [0.25, 1.0]),
        (first, [0.5, 1.0]),
        (second, [0.25, 0.5]),
    ):
        etas, _, state = logged_etas(**options, target_kl=target_kl)
        assert etas == [[0.5, 0.5]]
        assert state["kl_coef"] == expected


def test_a_resumed_run_keeps_eta_and_adam():
    options = {"iterations": 4, "eval_every": 2, "inner_steps": 2, "target_kl": 1e-9, "outer_lr": 0.02}
    args, saved = make_args(**options), []
    whole, run = begin(args), Recorder(args)
    initial = clone(whole["theta"])
    run.save = lambda state: saved.append(copy.deepcopy(state))
    ours.train(make_envs(args), args, run, whole)
    assert [state["iteration"] for state in saved] == [2, 4]
    assert saved[0]["kl_coef"] == [4 * args.kl_coef] * 2
    assert {float(x["step"]) for x in saved[0]["optimizer"]["state"].values()} == {2 * args.epochs}
    resumed = copy.deepcopy(saved[0])
    ours.train(make_envs(args), args, Recorder(args), resumed)
    assert torch.equal(flat(resumed["theta"]), flat(whole["theta"]))
    assert resumed["kl_coef"] == whole["kl_coef"] == [16 * args.kl_coef] * 2
    assert torch.equal(flat(whole["theta"]), flat(saved[1]["theta"]))
    forgetful = {name: value for name, value in saved[0].items() if name != "optimizer"}
    ours.train(make_envs(args), args, Recorder(args), forgetful)
    assert not torch.allclose(flat(forgetful["theta"]), flat(whole["theta"]), atol=1e-6)
    # A resumed run may have another step size; the state that a run is given is not what it learns in.
    args.outer_lr, other = 1e-9, copy.deepcopy(saved[0])
    given = other["theta"]
    ours.train(make_envs(args), args, Recorder(args), other)
    close(flat(other["theta"]), flat(saved[0]["theta"]), 1e-6)
    assert torch.equal(flat(given), flat(saved[0]["theta"]))
    assert not torch.equal(flat(initial), flat(given))


def test_the_learning_rate_is_that_of_the_flags():
    """Adam's first step is as long as its step size, in every parameter."""
    args = make_args(iterations=1, epochs=1, outer_lr=0.004)
    state = begin(args)
    initial = flat(state["theta"])
    ours.train(make_envs(args), args, Recorder(args), state)
    close((flat(state["theta"]) - initial).abs(), torch.full_like(initial, 0.004), 1e-5)


def test_a_resumed_run_goes_on_with_its_etas():
    options = {"inner_steps": 2, "iterations": 2, "target_kl": 0.01}
    state = begin(make_args()) | {"iteration": 1}
    assert logged_etas(state | {"kl_coef": [7.0, 3.0]}, **options)[0] == [[7.0, 3.0]]
    for others in ([7.0], [7.0, 3.0, 1.0]):  # of another number of inner steps
        assert logged_etas(state | {"kl_coef": others}, **options)[0] == [[0.5, 0.5]]
    assert logged_etas(dict(state), **options)[0] == [[0.5, 0.5]]
    options["target_kl"] = 0.0
    assert logged_etas(state | {"kl_coef": [7.0, 3.0]}, **options)[0] == [[0.5, 0.5]]


def test_evaluate_adapts_by_full_then_half_steps(monkeypatch):
    args = make_args()
    theta, envs, batches = make_theta(args), make_envs(args), []
    collect = ours.collect
    monkeypatch.setattr(ours, "collect", lambda *x: batches.append(collect(*x)) or batches[-1])
    stats, params = ours.evaluate(envs, theta, args)
    assert len(batches) == 4
    tasks, generator = make_envs(args).test_set(N)
    assert torch.equal(envs.tasks.view(N, E, 2)[:, 0], tasks)
    first = collect(make_envs(args), tasks, theta, args, generator)
    assert all(torch.equal(x, y) for x, y in zip(batches[0], first, strict=True))  # start states and noise, too
    for i in range(N):
        expected = theta
        for k, scale in enumerate((1.0, 0.5, 0.5)):
            runs = batches[k].mask[i] == 1
            replayed = ref_log_prob(expected, part(batches[k], i)).detach()  # who sampled the batch
            close(replayed[runs], batches[k].log_prob[i][runs])
            expected = slow_step(expected, part(batches[k], i), args, scale)
        for name, value in expected.items():
            close(params[name][i], value.detach())
    returns = np.array([batch.reward.sum(-1).mean(1).numpy() for batch in batches])  # [k, N]
    gains = returns[3] - returns[0]
    expected = {f"test/return_k{k}": float(x.mean()) for k, x in enumerate(returns)}
    close(stats["test/gain_ci95"][0], torch.from_numpy(gains))
    summary = summarise(stats)
    assert summary.pop("test/gain_ci95") == pytest.approx(interval(gains, tasks), rel=1e-4)
    assert summary == pytest.approx(expected | {"test/tasks": N})


def test_evaluation_is_repeatable_and_leaves_training_alone():
    def train(eval_every):
        args = make_args(iterations=4, eval_every=eval_every)
        run = Recorder(args)
        envs, state = make_envs(args), begin(args)
        ours.train(envs, args, run, state)
        assert run.saved == [k for k in range(1, 5) if k % eval_every == 0]
        return state, [stats for _, _, stats in run.logged], summarise(ours.evaluate(envs, state["theta"], args)[0])

    often, log, last = train(1)
    torch.rand(7)  # the global generator has no part in it
    rarely, short_log, again = train(4)
    assert ["test/return_k0" in stats for stats in short_log] == [True, False, False, True]
    assert all("test/return_k0" in stats for stats in log)
    assert torch.equal(flat(often["theta"]), flat(rarely["theta"]))
    assert torch.equal(often["generator"], rarely["generator"])
    assert last == again
    assert last == {name: x for name, x in log[-1].items() if name in last}
    args = make_args(seed=9)  # the test set is that of every run
    assert summarise(ours.evaluate(make_envs(args), often["theta"], args)[0]) == last


def test_initial_policy():
    space = SimpleNamespace(single_observation_space=Box(-1, 1, (7,)), single_action_space=Box(-1, 1, (3,)))
    theta, again = (ours.init_policy(space, 100, seeded(5)) for _ in range(2))
    assert torch.equal(flat(theta), flat(again))
    assert [tuple(theta[f"w{i}"].shape) for i in range(3)] == [(7, 100), (100, 100), (100, 3)]
    assert all(theta[name].eq(0).all() for name in ("b0", "b1", "b2", "log_std"))
    assert theta["log_std"].shape == (3,)
    assert float(theta["w1"].var()) == pytest.approx(2 / 200, rel=0.05)
