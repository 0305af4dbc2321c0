"""The mathematics of algos/maml_trpo.py against independent oracles, in float64: exact enumeration of small MDPs with
golden values, quadrature, central differences, explicit Hessians, and plain loops over tasks with torch.autograd."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev

from algos import maml_trpo as ours
from envs import summarise
from envs.navigation import Navigation2D, SparseNavigation2D
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64 is used by being here)

ESTIMATORS = ("score", "lvc", "dice", "loaded", "e_maml")
N, E, T = 3, 4, 5
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def task(params_or_batch, i):
    """Task i of a batch of episodes, or the policy of task i."""
    if isinstance(params_or_batch, dict):
        return {name: value[i] for name, value in params_or_batch.items()}
    return ours.Episodes(*(x[i] for x in params_or_batch))


def hessian(function):
    return jacrev(jacrev(function))  # torch.func.hessian's forward mode warns about torch.jit


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Toy environment and batches
# ---------------------------------------------------------------------------------------------------------------------


class Cliff(Navigation2D):
    """Navigation from random starts, over as soon as x > 0.25: some episodes end early."""

    can_terminate = True

    def _start(self, tasks, generator):
        return 0.2 * torch.randn(self.num_envs, 2, generator=generator, dtype=self.dtype)

    def _advance(self, action):
        next_obs = self._obs + action
        return next_obs, next_obs[:, 0] > 0.25, {}


def make_args(**kwargs):
    small = {"meta_batch_size": N, "episodes_per_task": E, "horizon": T, "hidden_size": 2, "fisher_fraction": 1.0}
    return ours.Args(**{**small, "inner_lr": 1.0, "gamma": 0.9, "gae_lambda": 0.9, **kwargs})


def make_envs(args, family=Cliff):
    return family(args.meta_batch_size * args.episodes_per_task, args.horizon, dtype=torch.float64)


def make_theta(args, seed=0):
    """All parameters are away from zero, so that none drops out of a comparison."""
    theta = ours.init_policy(make_envs(args), args.hidden_size, seeded(seed))
    theta = {name: value + 0.3 * torch.randn(value.shape, generator=seeded(seed)) for name, value in theta.items()}
    if args.learn_inner_lr:
        alpha = {"alpha." + name: 0.5 + torch.rand(x.shape, generator=seeded(1)) for name, x in theta.items()}
        return theta | alpha
    return theta


def make_batches(args, theta, seed=0):
    """The supports of all inner steps, and the query, as in training."""
    envs, generator = make_envs(args), seeded(seed)
    tasks, params, batches = envs.sample_tasks(N, generator), theta, []
    for _ in range(args.inner_steps):
        batches.append(ours.collect(envs, tasks, params, args, generator))
        params = ours.adapt(params, batches[-1], args)
    batches.append(ours.collect(envs, tasks, params, args, generator))
    assert all(0.5 < batch.mask.mean() < 0.95 for batch in batches)  # some episodes end early, most steps count
    return batches[:-1], batches[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Reference: one task at a time, densities written out, torch.autograd, products of ratios instead of sums of logarithms
# ---------------------------------------------------------------------------------------------------------------------


def ref_policy(params, obs):
    for i in (0, 1):
        obs = torch.einsum("eti,ij->etj", obs, params[f"w{i}"]).add(params[f"b{i}"]).tanh()
    return torch.einsum("eti,ij->etj", obs, params["w2"]) + params["b2"], params["log_std"].exp()


def ref_log_prob(params, batch):
    mean, std = ref_policy(params, batch.obs)
    return (-((batch.action - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def ref_units(batch, args):
    """gamma^t over the standard deviation that normalised the task's advantages [E, T]."""
    return args.gamma ** torch.arange(batch.mask.shape[1]) / batch.std[:, None]


def ref_surrogate(params, batch, args):
    """The sum over the running steps of one task's episodes."""
    estimator, unit = args.estimator, ref_units(batch, args)
    log_prob, total, past = ref_log_prob(params, batch), 0.0, 1.0
    for t in range(batch.mask.shape[1]):
        runs = batch.mask[:, t] == 1
        ratio = torch.where(runs, (log_prob[:, t] - batch.log_prob[:, t]).exp(), 1.0)
        advantage = batch.advantage[:, t]
        if estimator in ("score", "e_maml"):
            terms = log_prob[:, t] * advantage
        elif estimator == "lvc":
            terms = ratio * advantage
        elif estimator == "dice":
            terms = unit[:, t] * (past * ratio * batch.reward[:, t] + (1 - ratio) * batch.value[:, t])
        else:
            terms = (past * ratio - past) * advantage
        past, total = past * ratio, total + terms[runs].sum()
    return total


def ref_adapt(theta, batch, args, scale=1.0, create_graph=False):
    """One inner step of one task."""
    weights = {name: value for name, value in theta.items() if not name.startswith("alpha.")}
    weights = {name: x if x.requires_grad else x.clone().requires_grad_() for name, x in weights.items()}
    gain = ref_surrogate(weights, batch, args) / batch.mask.sum()
    slopes = torch.autograd.grad(gain, list(weights.values()), create_graph=create_graph)
    rates = [theta.get("alpha." + name, torch.tensor(args.inner_lr)) for name in weights]
    moved = {
        name: x + scale * rate * slope for (name, x), rate, slope in zip(weights.items(), rates, slopes, strict=True)
    }
    return {**theta, **moved}


def ref_adapted(theta, supports, i, args, create_graph=False):
    for support in supports:
        theta = ref_adapt(theta, task(support, i), args, create_graph=create_graph)
    return theta


def ref_objective(theta, supports, query, args):
    """The outer objective, as a value: its gradient is for central differences to find."""
    surrogates, scores, returns = [], [], []
    for i in range(N):
        params, score, batch = theta, 0.0, task(query, i)
        for support in (task(support, i) for support in supports):
            score += (ref_log_prob(params, support) - support.log_prob)[support.mask == 1].sum()
            params = ref_adapt(params, support, args)
        ratio = (ref_log_prob(params, batch) - batch.log_prob).exp()
        surrogates.append((ratio * batch.advantage)[batch.mask == 1].mean())
        returns.append((ref_units(batch, args) * batch.reward)[batch.mask == 1].mean())
        scores.append(score)
    if args.estimator == "e_maml":
        for i in range(N):
            credit = returns[i] - sum(returns[j] for j in range(N) if j != i) / (N - 1)
            surrogates[i] += args.credit_weight * credit * scores[i]
    return sum(float(x.detach()) for x in surrogates) / N


def ref_kl(old, new, supports, query, args, create_graph=False):
    """Mean over tasks of the mean over their steps of KL(old adapted policy || new adapted policy)."""
    total = 0.0
    for i in range(N):
        batch = task(query, i)
        (m, s), (n, r) = (ref_policy(ref_adapted(x, supports, i, args, create_graph), batch.obs) for x in (old, new))
        m, s = m.detach(), s.detach()
        kl = ((r / s).log() + (s**2 + (m - n) ** 2) / (2 * r**2) - 0.5).sum(-1)
        total = total + kl[batch.mask == 1].mean() / N
    return total


def explicit_fisher(theta, supports, query, args):
    def kl(vector):
        return ref_kl(theta, ours.unflatten(vector, theta), supports, query, args, create_graph=True)

    return torch.autograd.functional.hessian(kl, flat(theta))


def central_differences(function, vector, h=1e-5):
    steps = h * torch.eye(len(vector))
    return torch.tensor([(function(vector + step) - function(vector - step)) / (2 * h) for step in steps])


def meta_gradient(theta, supports, query, args, monkeypatch):
    """What trpo_step itself passes to conjugate_gradient."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(ours, "conjugate_gradient", lambda product, b, *rest: seen.append(b) or (b, b))
        ours.trpo_step(theta, ours.surrogate, supports, query, args)
    return seen[0]


# ---------------------------------------------------------------------------------------------------------------------
# Meta-gradient: central differences of the reference objective
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner_steps", "learn_inner_lr"), [(1, False), (1, True), (2, True)])
@every_estimator
def test_meta_gradient_against_central_differences(estimator, inner_steps, learn_inner_lr, monkeypatch):
    args = make_args(estimator=estimator, inner_steps=inner_steps, learn_inner_lr=learn_inner_lr)
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    if estimator == "e_maml":  # less credit for the support, or it hides the derivative through the inner step
        query = query._replace(reward=0.1 * query.reward)
    away = {name: x + 0.05 * torch.randn(x.shape, generator=seeded(2)) for name, x in sampled_from.items()}

    def objective(vector):
        return ref_objective(ours.unflatten(vector, away), supports, query, args)

    close(ours.surrogate(away, supports, query, args)[0].mean(), torch.tensor(objective(flat(away))))
    expected = central_differences(objective, flat(away))
    assert relative_error(meta_gradient(away, supports, query, args, monkeypatch), expected) < 1e-6
    # Negative control: without the derivative through the inner step the same comparison fails.
    args.first_order = True
    assert relative_error(meta_gradient(away, supports, query, args, monkeypatch), expected) > 1e-2


@every_estimator
def test_meta_gradient_at_the_theta_that_sampled(estimator, monkeypatch):
    args = make_args(estimator=estimator)
    theta = make_theta(args)
    supports, query = make_batches(args, theta)

    def objective(vector):
        return ref_objective(ours.unflatten(vector, theta), supports, query, args)

    expected = central_differences(objective, flat(theta))
    assert relative_error(meta_gradient(theta, supports, query, args, monkeypatch), expected) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Estimators: all trajectories of small MDPs enumerated; golden values of SPECS.md G.2
# ---------------------------------------------------------------------------------------------------------------------


class Tabular:
    """An MDP whose M trajectories of H steps are all listed; rewards carry gamma^t; logits theta [S, A]."""

    def __init__(self, start, transition, reward, horizon, gamma=1.0):
        self.transition, self.payoff, self.gamma = torch.tensor(transition), torch.tensor(reward), gamma
        S, A = self.payoff.shape
        rows = []
        for first, acts in itertools.product(range(S), itertools.product(range(A), repeat=horizon)):
            for rest in itertools.product(range(S), repeat=horizon - 1):
                moves = zip((first, *rest), acts, rest, strict=False)
                chance = start[first] * math.prod(transition[s][a][z] for s, a, z in moves)
                rows.append(((first, *rest), acts, chance))
        self.state, self.action = (torch.tensor([row[k] for row in rows]) for k in (0, 1))
        self.chance = torch.tensor([row[2] for row in rows])
        self.reward = self.payoff[self.state, self.action] * gamma ** torch.arange(horizon)
        self.to_go = torch.stack([self.reward[:, t:].sum(1) for t in range(horizon)], 1)

    def log_prob(self, theta):
        return torch.log_softmax(theta, -1)[..., self.state, self.action]  # [.., M, H]

    def prob(self, theta):
        return self.chance * self.log_prob(theta).sum(-1).exp()  # [.., M]

    def expected_return(self, theta):
        return (self.prob(theta) * self.reward.sum(1)).sum(-1)

    def score_step(self, theta, alpha):
        """theta [.., S, A] after one `score` step on each trajectory alone [.., M, S, A]: d log pi = onehot - pi."""
        S, A = self.payoff.shape
        state, action = torch.eye(S)[self.state], torch.eye(A)[self.action]  # [M, H, S], [M, H, A]
        error = action - torch.softmax(theta, -1)[..., self.state, :]
        return theta.unsqueeze(-3) + alpha * torch.einsum("mh,mhs,...mha->...msa", self.to_go, state, error)

    def values(self, theta):
        """gamma^t V(s_t) and gamma^t+1 V(s_t+1) [M, H] under theta, by backward recursion."""
        pi, V, table = torch.softmax(theta, -1), torch.zeros(len(self.payoff)), []
        for t in reversed(range(self.reward.shape[1])):
            V = (pi * (self.payoff * self.gamma**t + torch.einsum("saz,z->sa", self.transition, V))).sum(1)
            table.insert(0, V[self.state[:, t]])
        table = torch.stack(table, 1)
        return table, torch.nn.functional.pad(table[:, 1:], (0, 1))

    def episodes(self, theta, baseline=0.0, weight=1.0, advantage=None):
        """All trajectories as the E episodes of one task; with `weight` [E], their probabilities, a sum is a mean."""
        S, A = self.payoff.shape
        weight = torch.as_tensor(weight).expand(len(self.chance))[:, None]
        advantage = self.to_go - baseline if advantage is None else advantage
        value = torch.as_tensor(baseline).expand_as(self.reward)
        obs = torch.nn.functional.one_hot(self.state * A + self.action, S * A).double()
        one = torch.ones_like(self.reward)
        return ours.Episodes(
            obs=obs,
            action=torch.zeros(*one.shape, 1),
            log_prob=self.log_prob(theta).detach(),
            mask=one,
            reward=weight * self.reward,
            value=weight * value,
            std=torch.ones(len(one)),
            advantage=weight * advantage,
        )


@pytest.fixture
def tabular_policy(monkeypatch):
    """The file's functions run on logits b0 [S * A]: a Gaussian whose density at 0 is the softmax probability of a in
    s; an observation is the one-hot pair (s, a), an action is 0."""

    def policy(params, obs):
        log_pi = torch.log_softmax(params["b0"].unflatten(-1, policy.shape), -1).flatten(-2)
        log_prob = obs @ log_pi.unsqueeze(-1)
        return torch.zeros_like(log_prob), (-log_prob).exp() / math.sqrt(2 * math.pi)

    monkeypatch.setattr(ours, "policy", policy)
    return policy


BANDIT = ([1.0], [[[1.0]] * 3], [[1, 0.2, -0.5]], 1)
WALK = ([0.6, 0.4], [[[0.8, 0.2], [0.3, 0.7]], [[0.5, 0.5], [0.1, 0.9]]])
TASK1 = (*WALK, [[1.0, 0.0], [-0.5, 2.0]], 3, 0.9)
TASK2 = (*WALK, [[0.0, 1.5], [1.0, -1.0]], 3, 0.9)
BANDIT_THETA = [[0.1, -0.2, 0.3]]
WALK_THETA = [[0.2, -0.1], [-0.3, 0.4]]


def test_the_oracle_itself():
    bandit, one, two = Tabular(*BANDIT), Tabular(*TASK1), Tabular(*TASK2)
    theta = torch.tensor(BANDIT_THETA)
    close(bandit.expected_return(theta), torch.tensor(0.1814389503))
    close(grad(bandit.expected_return)(theta)[0], torch.tensor([0.2763335536, 0.0046419102, -0.2809754638]))
    theta = torch.tensor(WALK_THETA)
    close(
        torch.stack([one.expected_return(theta), two.expected_return(theta)]),
        torch.tensor([2.3868335347, 0.3723976081]),
    )
    close(
        grad(one.expected_return)(theta).flatten(),
        torch.tensor([0.2438460956, -0.2438460956, -0.8208007710, 0.8208007710]),
    )
    close(one.values(theta)[0][:, 0] @ one.prob(theta), one.expected_return(theta))
    adapted = [task.expected_return(theta + 0.3 * grad(task.expected_return)(theta)) for task in (one, two)]
    close(sum(adapted) / 2, torch.tensor(1.7748460489))


def weighted(mdp, theta, baseline):
    """All trajectories weighted by their probability under theta: a sum over episodes is an expectation."""
    values, next_values = mdp.values(theta)
    if baseline == "td":  # GAE with lambda 0 and the exact value
        advantage, baseline = mdp.reward + next_values - values, values
        return mdp.episodes(theta, baseline, mdp.prob(theta), advantage)
    return mdp.episodes(theta, {"0": 0.0, "5": 5.0, "V": values}[baseline], mdp.prob(theta))


# estimator, baseline, largest error of the Hessian for both tasks, and two components of the meta-gradient (their mean)
EXACT = (0.0, 0.0), (-0.1255623541, 0.1241352703)
GOLDEN = {
    ("score", "0"): ((0.4927, 0.2395), (-0.0884202730, 0.1902416723)),
    ("score", "V"): ((0.1822, 0.1570), (-0.0904803523, 0.0350689990)),
    ("e_maml", "V"): ((0.1822, 0.1570), None),
    ("lvc", "0"): ((0.0939, 0.0899), (-0.0988026720, 0.1448852566)),
    ("lvc", "5"): ((0.0939, 0.0899), (-0.0988026720, 0.1448852566)),
    ("lvc", "V"): ((0.0939, 0.0899), (-0.0988026720, 0.1448852566)),
    ("dice", "0"): EXACT,
    ("dice", "V"): EXACT,
    ("dice", "5"): EXACT,
    ("loaded", "0"): EXACT,
    ("loaded", "V"): EXACT,
    ("loaded", "td"): EXACT,
}


@pytest.mark.parametrize(("estimator", "baseline"), GOLDEN)
def test_first_and_second_derivatives_of_the_surrogates(estimator, baseline):
    theta = torch.tensor(WALK_THETA)
    for mdp, golden in zip((Tabular(*TASK1), Tabular(*TASK2)), GOLDEN[estimator, baseline][0], strict=True):
        batch = weighted(mdp, theta, baseline)

        def surrogate(theta, mdp=mdp, batch=batch):
            return ours.inner_objective(mdp.log_prob(theta), batch, ours.Args(estimator=estimator, gamma=1.0)).sum()

        close(grad(surrogate)(theta), grad(mdp.expected_return)(theta))
        error = (hessian(surrogate)(theta) - hessian(mdp.expected_return)(theta)).abs().max()
        assert float(error) == pytest.approx(golden, abs=5e-5 if golden else 1e-12)


def formulation_one(tasks, theta, estimator, baseline, alpha, first_order=False):
    """Gradient of the mean over tasks of J(theta + alpha grad J(theta)), by the file's adapt and outer objective."""
    shape, M_H = theta.shape, tasks[0].reward.numel()
    supports = [weighted(mdp, theta, baseline) for mdp in tasks]
    adapted = [theta + alpha * grad(mdp.expected_return)(theta) for mdp in tasks]
    queries = [mdp.episodes(x, 0.0, mdp.prob(x) * M_H) for mdp, x in zip(tasks, adapted, strict=True)]
    support, query = (ours.Episodes(*map(torch.stack, zip(*x, strict=True))) for x in (supports, queries))
    # The file averages over steps: alpha * M H undoes it in the inner step, weights * M H in the outer objective.
    args = ours.Args(estimator=estimator, inner_lr=alpha * M_H, first_order=first_order, gamma=1.0)
    close(ours.adapt({"b0": theta.flatten()}, support, args)["b0"], torch.stack(adapted).flatten(1))

    def objective(vector):
        return ours.surrogate({"b0": vector}, [support], query, args)[0].mean()

    return grad(objective)(theta.flatten()).view(shape)


@pytest.mark.parametrize(("estimator", "baseline"), [key for key in GOLDEN if GOLDEN[key][1]])
def test_meta_gradient_of_the_two_state_mdp(estimator, baseline, tabular_policy):
    tabular_policy.shape, tasks = (2, 2), (Tabular(*TASK1), Tabular(*TASK2))
    a, b = GOLDEN[estimator, baseline][1]
    expected = torch.tensor([[a, -a], [b, -b]])
    close(formulation_one(tasks, torch.tensor(WALK_THETA), estimator, baseline, 0.3), expected)


def test_first_order_meta_gradient_of_the_two_state_mdp(tabular_policy):
    tabular_policy.shape, tasks = (2, 2), (Tabular(*TASK1), Tabular(*TASK2))
    a, b = GOLDEN["score", "V"][1]  # a perfect baseline: the published surrogate is first-order MAML
    actual = formulation_one(tasks, torch.tensor(WALK_THETA), "dice", "0", 0.3, first_order=True)
    close(actual, torch.tensor([[a, -a], [b, -b]]))


@pytest.mark.parametrize(
    ("estimator", "baseline", "first_order", "expected"),
    [
        *(
            (e, b, False, (0.3040772784, -0.0344907527, -0.2695865257))
            for e in ("lvc", "dice", "loaded")
            for b in "0V5"
        ),
        ("score", "V", False, (0.2880162554, -0.0149633851, -0.2730528703)),
        ("score", "0", False, (0.2786106896, -0.0150572210, -0.2635534686)),
        *((e, "0", True, (0.2880162554, -0.0149633851, -0.2730528703)) for e in ("score", "lvc", "dice", "loaded")),
    ],
)
def test_meta_gradient_of_the_bandit(estimator, baseline, first_order, expected, tabular_policy):
    tabular_policy.shape = 1, 3
    actual = formulation_one((Tabular(*BANDIT),), torch.tensor(BANDIT_THETA), estimator, baseline, 0.5, first_order)
    close(actual, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("inner_steps", "episodes", "golden_value", "golden_gradient"),
    [(1, 1, 2.7357587595, (0.1575404866, -0.6166623313)), (1, 2, 2.7639684516, None), (2, 1, None, None)],
)
def test_e_maml_credits_the_support(inner_steps, episodes, golden_value, golden_gradient, tabular_policy):
    """J(theta) = sum_D P_theta(D) V(theta'(D)) with all supports D enumerated: every D is one "task" of the file."""
    tabular_policy.shape, mdp, alpha, theta = (2, 2), Tabular(*TASK1), 0.3, torch.tensor(WALK_THETA)
    M, H = mdp.reward.shape
    draws = torch.tensor(list(itertools.product(range(M), repeat=episodes)))  # one inner step's trajectories

    def enumerate_supports(theta):
        """P_theta(D) [D], parameters before every step, and after the last, [.., 2, 2]."""
        prob, params, path = torch.ones(1), theta[None], []
        for _ in range(inner_steps):
            path.append(params)
            prob = (prob[:, None] * mdp.prob(params)[:, draws].prod(-1)).flatten()
            params = mdp.score_step(params, alpha)[:, draws].mean(2).flatten(0, 1)
        return prob, path, params

    def exact(theta):
        prob, _, adapted = enumerate_supports(theta)
        return (prob * mdp.expected_return(adapted)).sum()

    if golden_value:
        close(exact(theta), torch.tensor(golden_value))
    expected = grad(exact)(theta)
    if golden_gradient:
        close(expected[:, 0], torch.tensor(golden_gradient))

    prob, path, adapted = enumerate_supports(theta)
    D, supports = len(prob), []
    for k, params in enumerate(path):  # step k of support D drew digit k of D in base len(draws)
        drawn = draws[torch.arange(D) // len(draws) ** (inner_steps - 1 - k) % len(draws)]  # [D, E]
        log_prob = mdp.log_prob(params.repeat_interleave(D // len(params), 0))[torch.arange(D)[:, None], drawn]
        supports.append(ours.Episodes(*(x[drawn] for x in mdp.episodes(theta)))._replace(log_prob=log_prob))
    # Query: all trajectories, their weights in advantage and reward. Over an enumeration "the other tasks' mean" holds
    # each task's own return as well: credit = R - (S - R) / (D - 1) = D / (D - 1) R - constant.
    weight = mdp.prob(adapted)[..., None] * M * H
    query = ours.Episodes(*(x.expand(D, *x.shape) for x in mdp.episodes(theta)))
    query = query._replace(advantage=weight * mdp.to_go, reward=weight * mdp.reward * (D - 1) / D)
    query = query._replace(log_prob=mdp.log_prob(adapted))
    args = ours.Args(estimator="e_maml", inner_lr=alpha * H, gamma=1.0, meta_batch_size=D)

    def objective(vector):
        return (prob * ours.surrogate({"b0": vector}, supports, query, args)[0]).sum()

    close(grad(objective)(theta.flatten()).view(2, 2), expected)
    if golden_gradient:  # without the score term
        args.estimator = "score"
        close(grad(objective)(theta.flatten())[::2], torch.tensor([0.1398693609, -0.4810943057]))


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_credit_has_a_weight(inner_steps, monkeypatch):
    """J_i and the meta-gradient are those of `score` and the weight times the rest: of no weight nothing is left."""
    args = make_args(estimator="e_maml", inner_steps=inner_steps)
    sampled_from = make_theta(args)
    supports, query = make_batches(args, sampled_from)
    theta = {name: x + 0.05 * torch.randn(x.shape, generator=seeded(2)) for name, x in sampled_from.items()}
    found = {}
    for weight in (1e-12, 1 / (E * T), 0.3, 1.0, 40.0):
        args.credit_weight = weight
        J_N = ours.surrogate(theta, supports, query, args)[0]
        close(J_N.mean(), torch.tensor(ref_objective(theta, supports, query, args)))
        found[weight] = torch.cat([J_N, meta_gradient(theta, supports, query, args, monkeypatch)])
    args.estimator, args.credit_weight = "score", 1.0
    J_N = ours.surrogate(theta, supports, query, args)[0]
    plain = torch.cat([J_N, meta_gradient(theta, supports, query, args, monkeypatch)])
    credit = found[1.0] - plain
    assert credit[:N].abs().min() > 1e-3
    assert credit[N:].norm() > plain[N:].norm()
    for weight, both in found.items():
        close(both, plain + weight * credit)


def test_only_e_maml_has_a_credit_to_weigh():
    assert make_args(estimator="e_maml").credit_weight == 1
    for estimator in ESTIMATORS[:-1]:
        with pytest.raises(ValueError, match=r"^--credit-weight 0.5: only --estimator e_maml has a credit$"):
            make_args(estimator=estimator, credit_weight=0.5)
    with pytest.raises(ValueError, match=r"^--credit-weight 0.0: allowed is above 0, up to 1,000,000$"):
        make_args(estimator="e_maml", credit_weight=0.0)


@pytest.mark.parametrize("baseline", ["0", "V", "5"])
def test_the_credit_without_ones_own_episode_is_what_loaded_adds(baseline):
    """E-MAML's credit, with a baseline that leaves an episode out, is to first order in alpha Loaded DiCE's own term.

    Let theta' = theta + alpha / E sum_e g_e, g_e = sum_t grad l_t A_t, and theta'_-e the same without g_e. That knows
    nothing of episode e: R(theta'_-e) may be subtracted from the credit of e, sum_s grad l_s R(theta'). To first order

        sum_e sum_s grad l_s (R(theta') - R(theta'_-e)) = alpha / E sum_e G_e v
        v = grad R(theta'), G_e = sum_s,t grad l_s grad l_t^T A_t.

    The meta-gradient through an inner step on `loaded` is that of `score` and alpha / E sum_e H_e v, where H_e is what
    box(c_t) - box(c_t - l_t) has beside grad grad l_t:

        H_e = sum_t A_t (grad l_t grad l_t^T + sum_s<t (grad l_s grad l_t^T + grad l_t grad l_s^T))
        G_e - H_e = sum_t<s grad l_s grad l_t^T (A_t - A_s).

    A_t - A_s, a difference of returns less baselines, is known before a_s is drawn, and grad l_s has then the mean 0:
    G_e and H_e have the same mean. (Of returns discounted to step 0, and lambda 1.)
    """
    mdp, theta = Tabular(*WALK, TASK1[2], 2, 0.9), torch.tensor(WALK_THETA)
    prob, support = mdp.prob(theta), weighted(mdp, theta, baseline)
    advantage = support.advantage / prob[:, None]  # [M, H] of all trajectories
    slope = jacrev(mdp.log_prob)(theta).flatten(2)  # grad l_t [M, H, W]
    score, g = slope.sum(1), (slope * advantage[..., None]).sum(1)  # [M, W]

    def objective(theta, estimator):
        return ours.inner_objective(mdp.log_prob(theta), support, ours.Args(estimator=estimator, gamma=1.0)).sum()

    mean_H = hessian(lambda x: objective(x, "loaded") - objective(x, "score"))(theta).view(4, 4)
    mean_G = torch.einsum("m,mw,mv->wv", prob, score, g)
    close(mean_G, mean_H)
    own = torch.einsum("m,mh,mhw,mhv->wv", prob, advantage, slope, slope)  # what `lvc` has: each step's own part
    assert relative_error(own, mean_H) > 0.05

    def returns(change):
        return mdp.expected_return(theta + change.unflatten(-1, theta.shape))

    errors = []
    for alpha in (0.02, 0.01, 0.005, 0.0025):  # E = 2: all pairs of trajectories, [M, M]
        both, other = returns(alpha / 2 * (g[:, None] + g)), returns(alpha / 2 * g)
        credit = 2 * torch.einsum("m,n,mw,mn->w", prob, prob, score, both - other)  # of either episode
        close(credit, 2 * torch.einsum("m,n,mw,mn->w", prob, prob, score, both))  # no bias
        v = grad(mdp.expected_return)(theta + alpha * grad(mdp.expected_return)(theta)).flatten()
        errors.append(relative_error(credit, alpha * mean_H @ v))
    assert [x / y for x, y in itertools.pairwise(errors)] == pytest.approx([2, 2, 2], rel=0.1)
    assert errors[-1] < 0.05


def test_only_dice_has_more_variance_when_all_rewards_shift():
    """Relative standard deviation of one trajectory's Hessian, exact over the enumeration."""

    def spread(shift, estimator, baseline):
        mdp, theta = Tabular(*WALK, (torch.tensor(TASK1[2]) + shift).tolist(), 3, 0.9), torch.tensor(WALK_THETA)
        batch = mdp.episodes(theta, mdp.values(theta)[0] if baseline else 0.0)
        args = ours.Args(estimator=estimator, gamma=1.0)
        terms = hessian(lambda x: ours.inner_objective(mdp.log_prob(x), batch, args))(theta).flatten(1)
        mean = mdp.prob(theta) @ terms
        return float((mdp.prob(theta) @ (terms - mean).square().sum(1)).sqrt() / mean.norm())

    for estimator in ("lvc", "loaded"):
        assert spread(5.0, estimator, True) == pytest.approx(spread(0.0, estimator, True), rel=1e-9)
    for baseline in (False, True):
        assert spread(5.0, "dice", baseline) > 1.5 * spread(0.0, "dice", baseline)
    ordered = [spread(5.0, *x) for x in (("lvc", True), ("loaded", True), ("dice", True), ("dice", False))]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(e, ((-2, 0), (0, -4 / math.e))) for e in ("lvc", "dice", "loaded")]
    + [("score", ((0, -3.2), (-3.2, 4 / math.e)))],  # wrong sign on log_std
)
def test_hessian_of_the_gaussian_bandit(estimator, expected):
    """Reward -(a - 1)^2, mu 0.2, log sigma -0.5: Gauss-Hermite nodes as the episodes, through the file's policy."""
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(20))
    mu, log_std = 0.2, -0.5
    shapes = {"log_std": (1,), "w0": (1, 1), "b0": (1,), "w1": (1, 1), "b1": (1,), "w2": (1, 1), "b2": (1,)}
    weights = (weights / weights.sum())[:, None]
    action = (mu + math.exp(log_std) * nodes)[:, None]
    reward = -((action - 1) ** 2)
    baseline = (weights * reward).sum()
    assert float(baseline) == pytest.approx(-(0.8**2) - math.exp(-1))
    one = torch.ones_like(action)
    batch = ours.Episodes(
        obs=torch.zeros(20, 1, 1),
        action=action[..., None],
        log_prob=None,
        mask=one,
        reward=weights * reward,
        value=weights * baseline,
        std=one[:, 0],
        advantage=weights * (reward - baseline),
    )

    def log_prob(x):
        params = {name: torch.zeros(shape) for name, shape in shapes.items()} | {"b2": x[:1], "log_std": x[1:]}
        return ours.batch_log_prob(params, batch)

    x = torch.tensor([mu, log_std])
    batch = batch._replace(log_prob=log_prob(x))

    def surrogate(x):
        return ours.inner_objective(log_prob(x), batch, ours.Args(estimator=estimator)).sum()

    close(grad(surrogate)(x), torch.tensor([1.6, -2 / math.e]))
    close(hessian(surrogate)(x), torch.tensor(expected, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the algorithm
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    ("estimator", "inner_steps", "learn_inner_lr"),
    [("lvc", 1, False), ("dice", 2, False), ("score", 1, True), ("loaded", 1, False)],
)
def test_fisher_product_against_the_hessian_of_the_kl(estimator, inner_steps, learn_inner_lr, fraction):
    args = make_args(estimator=estimator, inner_steps=inner_steps, learn_inner_lr=learn_inner_lr)
    args.fisher_fraction, args.cg_damping = fraction, 0.01
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    product = ours.fisher_product(theta, ours.surrogate, supports, query, args)
    query = ours.Episodes(*(x[:, : round(fraction * E)] for x in query))  # the supports stay whole
    assert 0 < query.mask.mean() < 1
    expected = explicit_fisher(theta, supports, query, args) + 0.01 * torch.eye(len(flat(theta)))
    vectors = torch.randn(4, len(expected), generator=seeded(3))
    close(torch.stack([product(v) for v in vectors]), vectors @ expected, 1e-8)


@pytest.mark.parametrize("gae_lambda", [1.0, 0.7, 0.0])
def test_gae_against_its_definition(gae_lambda):
    generator, gamma = seeded(0), 0.8
    lengths = torch.tensor([[6, 1, 3], [2, 6, 5]])
    mask = (torch.arange(6) < lengths[..., None]).double()
    reward, value = (torch.randn(2, 3, 6, generator=generator) * mask for _ in range(2))
    expected = torch.zeros(2, 3, 6)
    for i, e in itertools.product(range(2), range(3)):
        r, v = reward[i, e].tolist(), [*value[i, e].tolist(), 0.0]
        for t in range(lengths[i, e]):
            deltas = {k: r[k] + gamma * v[k + 1] - v[k] for k in range(t, lengths[i, e])}  # V = 0 behind the end
            expected[i, e, t] = sum((gamma * gae_lambda) ** (k - t) * delta for k, delta in deltas.items())
    close(ours.gae(reward, value, gamma, gae_lambda), expected, 1e-12)
    discounted = [[[sum(gamma ** (k - t) * y[k] for k in range(t, 6)) for t in range(6)] for y in x] for x in reward]
    close(ours.discounted_returns(reward, gamma), torch.tensor(discounted), 1e-12)


def ref_baseline(obs, returns, mask):
    """Ridge regression of one task's running steps, feature by feature, as least squares with rows sqrt(1e-5) I."""
    rows, targets = [], []
    for e, t in zip(*np.nonzero(mask), strict=True):
        o = [min(max(x, -10.0), 10.0) for x in obs[e, t]]
        rows.append([*o, *(x * x for x in o), t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])
        targets.append(returns[e, t])
    rows, F = np.array(rows), len(rows[0])
    augmented = np.concatenate([rows, math.sqrt(1e-5) * np.eye(F)]), np.concatenate([targets, np.zeros(F)])
    fitted = np.zeros_like(mask)
    fitted[np.nonzero(mask)] = rows @ np.linalg.lstsq(*augmented, rcond=None)[0]
    return fitted


def test_linear_baseline_against_ridge_regression():
    generator = seeded(0)
    obs = torch.randn(2, 4, 8, 2, generator=generator) * torch.tensor([2.0, 12.0])  # some beyond the clip at 10
    mask = (torch.arange(8) < torch.tensor([[8, 3, 5, 8], [1, 8, 8, 6]])[..., None]).double()
    returns = torch.randn(2, 4, 8, generator=generator) * mask
    expected = np.stack([ref_baseline(*(x[i].numpy() for x in (obs, returns, mask))) for i in range(2)])
    close(ours.linear_baseline(obs, returns, mask), torch.tensor(expected), 1e-7)
    low = ours.linear_baseline(obs.float(), returns.float(), mask.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_conjugate_gradient_against_solve():
    root = torch.randn(8, 8, generator=seeded(0))
    F, b = root @ root.T + torch.eye(8), torch.randn(8, generator=seeded(1))
    x, F_x = ours.conjugate_gradient(lambda v: F @ v, b)
    close(x, torch.linalg.solve(F, b), 1e-8)
    close(F_x, b, 1e-8)
    early, F_early = ours.conjugate_gradient(lambda v: F @ v, b, iterations=2)
    basis = torch.stack([b, F @ b], 1)
    close(early, basis @ torch.linalg.solve(basis.T @ F @ basis, basis.T @ b), 1e-8)  # the minimiser on span(b, F b)
    close(F_early, F @ early, 1e-12)
    assert relative_error(F_early, b) > 0.1  # not yet the solution
    assert all(result.eq(0).all() for result in ours.conjugate_gradient(lambda v: F @ v, torch.zeros(8)))


def searched(is_allowed) -> tuple[float, list[float]]:
    """What longest_allowed finds, and the fractions that it asked for."""
    asked = []
    found = ours.longest_allowed(lambda fraction: asked.append(fraction) or is_allowed(fraction))
    return found, asked


def test_the_line_search_comes_near_the_border():
    """A fraction is allowed up to a border: the KL, quadratic in the fraction, is 1 there."""
    borders = 0.04 + (1.25 - 0.04) * torch.rand(2000, generator=seeded(0))
    for border in borders.tolist():
        found, asked = searched(lambda fraction, border=border: (fraction / border) ** 2 <= 1)
        if border < 0.92 * 0.8**14:  # the shortest of 15 fractions
            assert found == 0
            continue
        assert found in asked
        if border >= 0.92:
            assert asked == [0.92]
        elif border >= 0.92 * 0.8**11:  # below it no trial is left for bisection, or too few
            assert border / 1.06 < found <= border
        else:
            assert 0.8 * border < found <= border
        backtracked = max(0, math.ceil(math.log(border / 0.92) / math.log(0.8)))  # refused before the first allowed
        assert len(asked) <= min(15, backtracked + 1 + 3)  # 1.25 / 2^3 is less than 6 %
        assert asked[: backtracked + 1] == pytest.approx([0.92 * 0.8**k for k in range(backtracked + 1)])


def test_the_line_search_gives_up_after_15_trials():
    found, asked = searched(lambda fraction: False)
    assert found == 0
    assert asked == pytest.approx([0.92 * 0.8**k for k in range(15)])


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_the_line_search_never_takes_a_refused_fraction(chance):
    """Also where what is allowed is not an interval: the one taken was asked for and allowed, a near one refused."""
    generator = seeded(int(10 * chance))
    for _ in range(300):
        answers = {}

        def is_allowed(fraction, answers=answers):
            assert fraction not in answers
            answers[fraction] = bool(torch.rand((), generator=generator) < chance)
            return answers[fraction]

        found, asked = searched(is_allowed)
        allowed = [fraction for fraction in asked if answers[fraction]]
        assert found == max(allowed, default=0)
        assert 1 <= len(asked) <= 15
        if allowed and len(asked) < 15:
            near = any(found < fraction < 1.06 * found for fraction in asked if not answers[fraction])
            assert near or asked == [0.92]


@pytest.mark.parametrize("per_task", [False, True])
def test_log_prob_against_the_density(per_task):
    args = make_args()
    policies = [make_theta(args, seed=i) for i in range(N)] if per_task else [make_theta(args)] * N
    params = {name: torch.stack([x[name] for x in policies]) for name in policies[0]} if per_task else policies[0]
    batch = make_batches(args, make_theta(args))[1]
    expected = torch.stack([ref_log_prob(policies[i], task(batch, i)) for i in range(N)])
    close(ours.batch_log_prob(params, batch), expected, 1e-12)


def test_standard_deviation_has_a_floor():
    params = make_theta(make_args())
    params["log_std"] = torch.tensor([-100.0, 0.5])
    close(ours.policy(params, torch.zeros(1, 2))[1], torch.tensor([[1e-6, math.exp(0.5)]]), 1e-12)


def test_initial_policy():
    """Xavier: uniform with variance 2 / (in + out); no bias; standard deviation 1; the generator alone decides."""
    args = make_args(hidden_size=200)
    theta, again = (ours.init_policy(make_envs(args), 200, seeded(5)) for _ in range(2))
    assert all(torch.equal(theta[name], again[name]) for name in theta)
    assert {name: tuple(x.shape) for name, x in theta.items() if name[0] == "w"} == {
        "w0": (2, 200),
        "w1": (200, 200),
        "w2": (200, 2),
    }
    assert all(theta[name].eq(0).all() for name in ("b0", "b1", "b2", "log_std"))
    assert float(theta["w1"].var()) == pytest.approx(2 / 400, rel=0.05)
    assert float(theta["w1"].abs().max()) <= math.sqrt(6 / 400)


def test_unflatten_inverts_the_concatenation():
    theta = make_theta(make_args(learn_inner_lr=True))
    again = ours.unflatten(flat(theta), theta)
    assert list(again) == list(theta)
    assert all(torch.equal(again[name], theta[name]) for name in theta)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_collect(gae_lambda):
    args = make_args(gae_lambda=gae_lambda, horizon=8)
    theta, envs = make_theta(args), make_envs(args)
    tasks = envs.sample_tasks(N, seeded(0))
    batch = ours.collect(envs, tasks, theta, args, seeded(1))
    close(ours.batch_log_prob(theta, batch)[batch.mask == 1], batch.log_prob[batch.mask == 1], 1e-12)
    assert batch.action.abs().max() > 0.1  # unclipped
    assert 0 < batch.mask.mean() < 1

    # Recompute rewards and ends from observations and actions by the toy's own rule, and everything else from those.
    position = batch.obs + batch.action.clamp(envs._low, envs._high)
    mask = torch.ones(N, E, 8)
    for t in range(1, 8):
        mask[..., t] = mask[..., t - 1] * (position[..., t - 1, 0] <= 0.25)
        runs = mask[..., t] == 1
        close(batch.obs[..., t, :][runs], position[..., t - 1, :][runs], 1e-12)
    close(batch.mask, mask)
    reward = -(position - tasks[:, None, None]).norm(dim=-1) * mask
    close(batch.reward, reward)
    for name in ("advantage", "reward"):
        assert getattr(batch, name)[mask == 0].eq(0).all()
    discount = args.gamma ** torch.arange(8.0)
    for i in range(N):
        returns = torch.stack([(reward[i, :, t:] * discount[: 8 - t]).sum(-1) for t in range(8)], -1)
        value = torch.tensor(ref_baseline(*(x.numpy() for x in (batch.obs[i], returns, mask[i]))))
        delta = reward[i] + args.gamma * torch.nn.functional.pad(value[:, 1:], (0, 1)) - value
        weight = discount * gae_lambda ** torch.arange(8.0)
        advantage = torch.stack([(delta[:, t:] * weight[: 8 - t]).sum(-1) for t in range(8)], -1)
        runs = mask[i] == 1
        mean, std = advantage[runs].mean(), advantage[runs].std(correction=0)
        close(batch.advantage[i][runs], (advantage[runs] - mean) / std, 1e-6)
        close(batch.std[i], std.expand(E), 1e-6)
        close(batch.value[i][runs], (value + mean)[runs], 1e-6)
        close(ours.discounted_units(task(batch, i), args.gamma), discount * mask[i] / std, 1e-6)
        assert float(batch.advantage[i][runs].mean()) == pytest.approx(0, abs=1e-9)
        assert float(batch.advantage[i][runs].std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_collect_with_one_policy_per_task():
    """Task i under per-task policies = task i when all tasks use policy i: start states and noise are the same."""
    args = make_args()
    policies, envs = [make_theta(args, seed=i) for i in range(N)], make_envs(args)
    tasks = envs.sample_tasks(N, seeded(0))
    stacked = {name: torch.stack([params[name] for params in policies]) for name in policies[0]}
    together = ours.collect(envs, tasks, stacked, args, seeded(1))
    for i in range(N):
        alone = ours.collect(envs, tasks, policies[i], args, seeded(1))
        for x, y in zip(task(together, i), task(alone, i), strict=True):
            close(x, y, 1e-7)
        assert not torch.allclose(together.action[i - 1], alone.action[i - 1])


# ---------------------------------------------------------------------------------------------------------------------
# Inner and outer step
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_inner_lr", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("first_order", [False, True], ids=["full", "first-order"])
@every_estimator
def test_adapt_against_a_loop_over_tasks(estimator, first_order, learn_inner_lr):
    args = make_args(estimator=estimator, learn_inner_lr=learn_inner_lr, first_order=first_order)
    theta = make_theta(args)
    (support,), query = make_batches(args, theta)
    once = ours.adapt(theta, support, args)
    twice = ours.adapt(once, query, args, 0.5)  # from one policy per task, with half the step
    weights = [name for name in theta if not name.startswith("alpha.")]
    assert all(once[name] is theta[name] for name in theta if name not in weights)
    for i in range(N):
        first = ref_adapt(theta, task(support, i), args)
        second = ref_adapt(first, task(query, i), args, 0.5)
        for name in weights:
            close(once[name][i], first[name].detach(), 1e-10)
            close(twice[name][i], second[name].detach(), 1e-10)


@every_estimator
def test_an_inner_step_lowers_the_inner_loss(estimator):
    args = make_args(estimator=estimator, inner_lr=0.01)
    theta = make_theta(args)
    (support,), _ = make_batches(args, theta)
    adapted = ours.adapt(theta, support, args)
    for i in range(N):
        after = ref_surrogate(task(adapted, i), task(support, i), args)
        assert after > ref_surrogate(theta, task(support, i), args)


@pytest.mark.parametrize("inner_steps", [1, 2])
@every_estimator
def test_at_the_old_theta_all_ratios_are_one(estimator, inner_steps):
    """The adapted policies are recomputed exactly as they were when they sampled the query."""
    args = make_args(estimator=estimator, inner_steps=inner_steps)
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    J, (mean, std) = ours.surrogate(theta, supports, query, args)
    close(J, torch.zeros(N), 1e-12)  # the mean of normalised advantages, and no score
    log_prob = torch.distributions.Normal(mean, std).log_prob(query.action.flatten(1, 2)).sum(-1)
    close((log_prob.view_as(query.mask) - query.log_prob) * query.mask, torch.zeros_like(query.mask), 1e-12)


@every_estimator
def test_nothing_after_an_early_end_matters(estimator):
    """Other observations and actions there, so improbable when drawn that a ratio would overflow, change no result."""
    args = make_args(estimator=estimator, fisher_fraction=0.5)
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    away = flat(theta) + 0.05 * torch.randn(len(flat(theta)), generator=seeded(2))
    results = []
    for size in (0.0, 1.0):
        *s, q = (
            batch._replace(
                obs=batch.obs + x[..., None], action=batch.action + x[..., None], log_prob=batch.log_prob - 1000 * x
            )
            for batch, x in ((batch, size * (1 - batch.mask)) for batch in (*supports, query))
        )
        J = ours.surrogate(ours.unflatten(away, theta), s, q, args)[0]
        fisher = ours.fisher_product(theta, ours.surrogate, s, q, args)(away)
        moved, stats = ours.trpo_step(theta, ours.surrogate, s, q, args)
        results.append((J, fisher, flat(moved), torch.tensor(list(stats.values()))))
    for plain, disturbed in zip(*results, strict=True):
        close(disturbed, plain, 1e-8)


@pytest.mark.parametrize("max_kl", [0.01, 1.0])
@pytest.mark.parametrize(("estimator", "inner_steps"), [("lvc", 1), ("dice", 2), ("e_maml", 1)])
def test_trpo_step(estimator, inner_steps, max_kl, monkeypatch):
    """A step along s d, d = F^-1 g and s^2 d'Fd / 2 = max_kl, that keeps the KL and improves J, where no step that is
    6 % longer does: with the explicit Hessian, and KL and J of the reference."""
    args = make_args(estimator=estimator, inner_steps=inner_steps, max_kl=max_kl, cg_damping=0.5, inner_lr=0.2)
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    moved, stats = ours.trpo_step(theta, ours.surrogate, supports, query, args)
    g = meta_gradient(theta, supports, query, args, monkeypatch)
    F = explicit_fisher(theta, supports, query, args) + 0.5 * torch.eye(len(g))
    direction = torch.linalg.solve(F, g)
    step = direction * (2 * max_kl / (direction @ F @ direction)).sqrt()
    close(flat(moved) - flat(theta), stats["train/step"] * step, 1e-4)

    def tried(vector):
        new = ours.unflatten(vector, theta)
        J = [ref_objective(x, supports, query, args) for x in (theta, new)]
        return float(ref_kl(theta, new, supports, query, args).detach()), J[1] - J[0]

    kl, improvement = tried(flat(moved))
    assert stats["train/kl"] == pytest.approx(kl, rel=1e-6)
    swapped = float(ref_kl(moved, theta, supports, query, args).detach())
    assert abs(swapped - kl) > 1e-4 * kl  # the order of KL's arguments shows
    assert stats["train/improvement"] == pytest.approx(improvement, rel=1e-6)
    assert stats["train/gradient_norm"] == pytest.approx(float(g.norm()))
    assert 0 < kl <= max_kl
    assert improvement > 0
    taken = stats["train/step"]
    longer = [0.92 * 0.8**k for k in range(15) if 0.92 * 0.8**k > 1.001 * taken]  # tried, and refused
    if taken < 0.92:
        longer.append(1.06 * taken)
    for fraction in longer:
        kl, improvement = tried(flat(theta) + fraction * step)
        assert kl > max_kl or improvement <= 0
    if longer and improvement > 0:  # the KL is what limits the step: it is used
        assert stats["train/kl"] > 0.88 * max_kl


@pytest.mark.parametrize("curvature", [0.2, 1.0, 1.3, 5.0, 30.0])
def test_a_step_uses_the_trust_region(curvature, monkeypatch):
    """Whatever the error of the step's length: the Fisher products here are not those of the KL, but `curvature`
    times too small, so that the first step is too long by its root, or too short."""
    args = make_args(inner_lr=0.2, cg_damping=0.0, max_kl=0.01)
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    product = ours.fisher_product(theta, ours.surrogate, supports, query, args)
    monkeypatch.setattr(ours, "fisher_product", lambda *_: lambda v: product(v) / curvature)
    moved, stats = ours.trpo_step(theta, ours.surrogate, supports, query, args)
    assert stats["train/improvement"] > 0
    kl = float(ref_kl(theta, moved, supports, query, args).detach())
    assert stats["train/kl"] == pytest.approx(kl, rel=1e-6)
    if curvature < 1:  # the step is short of the border, and none is longer
        assert stats["train/step"] == 0.92
        assert kl < 0.88 * args.max_kl
    else:
        assert 0.8 * args.max_kl < kl <= args.max_kl


OBSTACLES = ["downhill", "too far", "no direction", "no gradient"]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_theta_stays_when_no_step_is_acceptable(obstacle, monkeypatch):
    """It is the same object, so that nothing has touched it; what is not a number is so for one statistic at most."""
    args = make_args()
    theta = make_theta(args)
    supports, query = make_batches(args, theta)
    objectives = ours.surrogate
    assert ours.trpo_step(theta, objectives, supports, query, args)[1]["train/step"] > 0
    if obstacle == "downhill":  # a direction that lowers J, with a small enough step
        monkeypatch.setattr(ours, "conjugate_gradient", lambda product, b: (-b, -product(b)))
    elif obstacle == "too far":  # a curvature that is underestimated, hence steps that are 1000 times too long
        product = ours.fisher_product(theta, objectives, supports, query, args)
        monkeypatch.setattr(ours, "fisher_product", lambda *_: lambda v: 1e-6 * product(v))
    elif obstacle == "no direction":
        monkeypatch.setattr(ours, "fisher_product", lambda *_: lambda v: torch.nan * v)
    else:  # the derivative of the root of 0 is infinite, times 0

        def objectives(params, *data):
            J_N, policies = ours.surrogate(params, *data)
            return J_N + (0 * params["b0"]).abs().sum().sqrt(), policies

    kept = {name: value.clone() for name, value in theta.items()}
    moved, stats = ours.trpo_step(theta, objectives, supports, query, args)
    assert moved is theta
    assert all(torch.equal(moved[name], kept[name]) for name in kept)
    assert stats["train/step"] == 0
    assert abs(stats["train/kl"]) < 1e-12
    assert stats["train/improvement"] == 0
    assert math.isfinite(stats["train/gradient_norm"]) == (obstacle != "no gradient")


@every_estimator
def test_no_reward_no_step_no_nan(estimator):
    """Sparse rewards out of reach: every advantage and the gradient are exactly zero."""
    args = make_args(estimator=estimator, learn_inner_lr=True, inner_steps=2)
    envs, theta = make_envs(args, SparseNavigation2D), make_theta(args)
    tasks = envs.sample_tasks(N, seeded(0))
    *supports, query = (ours.collect(envs, tasks, theta, args, seeded(i)) for i in range(3))
    assert query.reward.eq(0).all()
    assert query.advantage.eq(0).all()
    moved, stats = ours.trpo_step(theta, ours.surrogate, supports, query, args)
    assert moved is theta
    assert all(math.isfinite(x) for x in stats.values())
    assert stats["train/gradient_norm"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


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
            expected = ref_adapt(expected, task(batches[k], i), args, scale)
            replayed = ref_log_prob(expected, task(batches[k + 1], i))  # who sampled the next batch
            runs = batches[k + 1].mask[i] == 1
            close(replayed[runs].detach(), batches[k + 1].log_prob[i][runs], 1e-9)
        for name, value in expected.items():
            close(params[name][i], value.detach(), 1e-9)
    returns = np.array([batch.reward.sum(-1).mean(1).numpy() for batch in batches])  # [k, N]
    gains = returns[3] - returns[0]
    expected = {f"test/return_k{k}": float(x.mean()) for k, x in enumerate(returns)}
    close(stats["test/gain_ci95"][0], torch.from_numpy(gains))
    summary = summarise(stats)
    assert summary.pop("test/gain_ci95") == pytest.approx(interval(gains, tasks), rel=1e-4)
    assert summary == pytest.approx(expected | {"test/tasks": N})


def test_evaluation_is_repeatable_and_leaves_training_alone():
    args = make_args(iterations=4)

    def train(eval_every):
        args.eval_every = eval_every
        theta, generator, envs = make_theta(args), seeded(3), make_envs(args)
        state = {"iteration": 0, "env_steps": 0, "theta": theta, "generator": generator.get_state()}
        run = Recorder(args)
        ours.train(envs, args, run, state)
        return state, [stats for _, _, stats in run.logged], summarise(ours.evaluate(envs, state["theta"], args)[0])

    often, log, last = train(1)
    torch.rand(7)  # the global generator has no part in it
    rarely, short_log, again = train(4)
    assert ["test/return_k0" in stats for stats in short_log] == [True, False, False, True]
    assert all("test/return_k0" in stats for stats in log)
    assert torch.equal(flat(often["theta"]), flat(rarely["theta"]))
    assert not torch.equal(flat(often["theta"]), flat(make_theta(args)))
    assert torch.equal(often["generator"], rarely["generator"])
    assert last == again
    assert last == {name: x for name, x in log[-1].items() if name in last}
    args.seed += 1  # the test set is that of every run
    assert summarise(ours.evaluate(make_envs(args), often["theta"], args)[0]) == last
