"""The mathematics of algos/pearl_sac.py against independent oracles, in float64: densities multiplied on a grid,
torch.distributions, losses by loops over tasks and transitions, central differences, lists in place of buffers, worlds
played by hand one at a time, and Adam's formula."""

import io
import math
from collections import Counter, deque
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Generator
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence

from algos import pearl_sac
from algos.pearl_sac import (
    Args,
    Transitions,
    act,
    collect_episodes,
    draw,
    evaluate,
    init_buffer,
    init_networks,
    init_state,
    learn,
    pearl_loss,
    play_episodes,
    posterior,
    sample_posterior,
    sample_prior,
    store,
    train,
)
from envs import ScaleActions, summarise
from envs.navigation import Navigation2D
from envs.records import Stopped
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64 by being here)

OBS, A, Z = 3, 2, 4  # where no world is played
STRIDE = float(np.float32(0.1))  # of a full action in the plane


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def noisy(params, seed):
    """Away from the small outputs of the beginning."""
    generator, theta = seeded(seed), {}
    for name, value in params.items():
        size = 1 / math.sqrt(value.shape[1]) if value.ndim == 2 else 0.3
        theta[name] = value + size * torch.randn(value.shape, generator=generator)
    return theta


def clone(params):
    return {name: value.clone() for name, value in params.items()}


def packed(x):
    """A row of numbers for each transition, as the oracles take them: obs, action, reward, next_obs, ..; no mask."""
    numbers = [x.reward[..., None], x.next_obs, x.training_reward[..., None], x.ended[..., None]]
    return torch.cat([x.obs, x.action, *numbers], -1)


def unpacked(rows, obs=OBS, actions=A):
    """The transitions of such rows, all of which mask marks."""
    names = "obs", "action", "reward", "next_obs", "training_reward", "ended"
    parts = dict(zip(names, rows.split([obs, actions, 1, obs, 1, 1], -1), strict=True))
    for name in ("reward", "training_reward", "ended"):
        parts[name] = parts[name].squeeze(-1)
    return Transitions(**parts, mask=torch.ones_like(rows[..., 0]))


def as_context(x, mask=None, obs=OBS, actions=A):
    """Transitions that show the encoder x [.., I]; what it must not look at is not a number."""
    rest = 2 * obs + actions + 3 - x.shape[-1]
    context = unpacked(torch.nn.functional.pad(x, (0, rest), value=math.nan), obs, actions)
    return context if mask is None else context._replace(mask=mask)


def visible(context, width):
    """What the encoder sees of each transition [.., width]."""
    return packed(context)[..., :width]


def infer(theta, x, mask):
    """q(z|c) of contexts of which the encoder sees x [N, S, I]."""
    return posterior(theta, as_context(x, mask), Args(next_obs=x.shape[-1] > OBS + A + 1))


def loss_of(theta, target, batch, context, noise, args, obs=OBS, actions=A):
    """`pearl_loss` of packed rows, of what the encoder sees, and of noise in order."""
    named = dict(zip(("z", "next_action", "action"), noise, strict=True))
    batch, context = unpacked(batch, obs, actions), as_context(context, None, obs, actions)
    return pearl_loss(theta, target, batch, context, named, args)


def play(lab, z, generator, noise_scale=1.0, tasks=None):
    """Rows, mask and returns of an episode of each of the lab's tasks."""
    tasks = lab.state["tasks"] if tasks is None else tasks
    episodes = play_episodes(lab.envs, tasks, lab.theta, z, lab.args, generator, noise_scale)
    return packed(episodes), episodes.mask, episodes.reward.sum(1)


def part_of(theta, part):
    return {name: value for name, value in theta.items() if name.startswith(part)}


def make_theta(seed=1, obs=OBS, actions=A, **kwargs):
    spaces = SimpleNamespace(
        single_observation_space=Box(-1, 1, (obs,)),
        single_action_space=Box(-1, 1, (actions,)),
    )
    args = Args(**{"hidden_size": 7, "latent_size": Z, **kwargs})
    return args, noisy(init_networks(spaces, args, seeded(seed)), seed + 1)


class Mortal(Navigation2D):
    """Worlds that end after as many steps as their task says, if the horizon is not before it; paid near the goal."""

    task_dim, can_terminate = 3, True

    def sample_tasks(self, num_tasks, generator, split="train"):
        goal = 0.3 * torch.rand(num_tasks, 2, generator=generator)
        goal[:, 0] *= {"train": 1, "test": -1}[split]
        life = torch.randint(1, self.horizon + 3, (num_tasks, 1), generator=generator)
        return torch.cat([goal, life], 1)

    @staticmethod
    def reward(obs, action, next_obs, task):
        distance = (next_obs - task[..., :2]).norm(dim=-1)
        return (1 - distance) * (distance <= 0.2)

    def _advance(self, action):
        next_obs = self._obs + action
        dense = -(next_obs - self.tasks[:, :2]).norm(dim=-1)
        return next_obs, self._steps + 1 >= self.tasks[:, 2], {"dense_reward": dense}


def make_lab(seed=1, **kwargs):
    """Worlds that end early, and a state with wide networks and empty buffers."""
    sizes = {"train_tasks": 5, "tasks_per_iteration": 3, "horizon": 4, "hidden_size": 6, "latent_size": Z}
    args = Args(**{**sizes, "meta_batch_size": 2, "batch_size": 5, "context_size": 3, "replay_size": 20, **kwargs})
    envs = ScaleActions(Mortal(args.tasks_per_iteration, args.horizon, dtype=torch.float64), 1.0)
    state = init_state(envs, args, seeded(seed)) | {"iteration": 0, "env_steps": 0}
    state["theta"] = noisy(state["theta"], seed + 1)
    state["target"] = noisy(state["target"], seed + 2)
    state["generator"] = seeded(seed + 3).get_state()
    return SimpleNamespace(args=args, envs=envs, state=state, theta=state["theta"])


# ---------------------------------------------------------------------------------------------------------------------
# Reference: one task and one transition at a time
# ---------------------------------------------------------------------------------------------------------------------


def slow_net(theta, part, x):
    for i in range(4):
        x = theta[f"{part}_w{i}"] @ x + theta[f"{part}_b{i}"]
        if i < 3:
            x = torch.where(x > 0, x, torch.zeros_like(x))
    return x


def gaussian(theta, x):
    """Mean and variance of the Gaussian of one transition."""
    output = slow_net(theta, "encoder", x)
    half = len(output) // 2
    return output[:half], (1 + output[half:].exp()).log()


def slow_posterior(theta, transitions):
    """The Gaussians multiplied one after the other."""
    latent = len(theta["encoder_b3"]) // 2
    mean, variance = torch.zeros(latent), torch.ones(latent)
    for i, x in enumerate(transitions):
        m, v = gaussian(theta, x)
        both = variance + v
        mean, variance = ((mean * v + m * variance) / both, variance * v / both) if i else (m, v)
    return mean, variance


def slow_act(theta, obs, z, noise):
    output = slow_net(theta, "policy", torch.cat([obs, z]))
    half = len(output) // 2
    mean, std = output[:half], output[half:].clamp(-20, 2).exp()
    raw = mean + std * noise
    return raw.tanh(), (Normal(mean, std).log_prob(raw) + 2 * raw.cosh().log()).sum()


def slow_q(theta, part, obs, action, z):
    return slow_net(theta, part, torch.cat([obs, action, z]))[0]


def parts_of(row, obs, actions):
    """What a row consists of."""
    places = np.cumsum([0, obs, actions, 1, obs, 1, 1])
    names = "obs", "action", "reward", "next_obs", "trained", "ended"
    return SimpleNamespace(**{n: row[i:j] for n, (i, j) in zip(names, pairwise(places), strict=True)})


class Slow:
    """The terms of the loss for a batch; what a term must not move is an argument of its own."""

    def __init__(self, args, batch, context, noise, obs=OBS, actions=A):
        self.args, self.context, self.noise, self.actions = args, context, noise, actions
        self.rows = [[parts_of(row, obs, actions) for row in rows] for rows in batch]
        self.count = sum(len(rows) for rows in self.rows)

    def alpha(self, theta):
        return float(theta["log_alpha"].exp()) if self.args.auto_entropy else self.args.entropy_coef

    def z(self, theta):
        posteriors = [slow_posterior(theta, context) for context in self.context]
        return [mean + variance.sqrt() * x for (mean, variance), x in zip(posteriors, self.noise[0], strict=True)]

    def kl(self, theta):
        total = 0
        for context in self.context:
            mean, variance = slow_posterior(theta, context)
            total = total + kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum()
        return total

    def goals(self, theta, target):
        goals, alpha = [], self.alpha(theta)
        for i, z in enumerate(self.z(theta)):
            goals.append([])
            for j, row in enumerate(self.rows[i]):
                goal = self.args.reward_scale * float(row.trained)
                if not row.ended:
                    action, log_prob = slow_act(theta, row.next_obs, z, self.noise[1][i, j])
                    q1, q2 = (float(slow_q(target, part, row.next_obs, action, z)) for part in ("q1", "q2"))
                    goal += self.args.gamma * (min(q1, q2) - alpha * float(log_prob))
                goals[-1].append(goal)
        return goals

    def q_loss(self, theta, all_z, goals):
        total = 0
        for i, z in enumerate(all_z):
            for j, row in enumerate(self.rows[i]):
                for part in ("q1", "q2"):
                    total = total + (slow_q(theta, part, row.obs, row.action, z) - goals[i][j]) ** 2
        return total / self.count

    def actor(self, theta, critics, all_z):
        """Mean values and mean log-probabilities of new actions."""
        value, log_probs = 0, 0
        for i, z in enumerate(all_z):
            for j, row in enumerate(self.rows[i]):
                action, log_prob = slow_act(theta, row.obs, z, self.noise[2][i, j])
                q1, q2 = (slow_q(critics, part, row.obs, action, z) for part in ("q1", "q2"))
                value, log_probs = value + (q1 if q1 < q2 else q2), log_probs + log_prob
        return value / self.count, log_probs / self.count

    def statistics(self, theta, target):
        all_z = self.z(theta)
        value, log_prob = self.actor(theta, theta, all_z)
        kl, q_loss = self.kl(theta), self.q_loss(theta, all_z, self.goals(theta, target))
        parts = {"q_loss": q_loss, "value": value, "kl": kl / len(all_z), "entropy": -log_prob}
        return {f"train/{name}": float(x) for name, x in parts.items()}

    def loss(self, theta, target):
        q_loss, value, kl, entropy = self.statistics(theta, target).values()
        total = q_loss - self.alpha(theta) * entropy - value + self.args.kl_weight * kl * len(self.context)
        return total + (float(theta["log_alpha"]) * (entropy + self.actions) if self.args.auto_entropy else 0)

    def terms(self, theta, target):
        """For each part of theta the function of it that Adam shall follow."""
        goals, all_z = self.goals(theta, target), self.z(theta)
        entropy = -self.actor(theta, theta, all_z)[1]

        def encoder(new):
            return self.q_loss(theta | new, self.z(new), goals) + self.args.kl_weight * self.kl(new)

        def policy(new):
            value, log_prob = self.actor(new, theta, all_z)
            return self.alpha(theta) * log_prob - value

        def critics(new):
            return self.q_loss(theta | new, all_z, goals)

        def log_alpha(new):
            return new["log_alpha"] * (entropy + self.actions)

        terms = {"encoder": encoder, "policy": policy, "q1": critics, "q2": critics}
        return terms | ({"log_alpha": log_alpha} if self.args.auto_entropy else {})

    def gradient(self, theta, target):
        result = {}
        for part, term in self.terms(theta, target).items():
            own = {name: value.detach().clone().requires_grad_() for name, value in part_of(theta, part).items()}
            result |= dict(zip(own, torch.autograd.grad(term(own), list(own.values())), strict=True))
        return {name: result[name].detach() for name in theta}


def make_batch(seed=3, next_obs=False, tasks=3, size=5, context_size=4):
    """Transitions of which some ended, and whose two rewards differ; contexts; noise."""
    generator = seeded(seed)
    batch = torch.randn(tasks, size, 2 * OBS + A + 3, generator=generator)
    batch[..., OBS : OBS + A] = batch[..., OBS : OBS + A].tanh()
    batch[..., -1] = (torch.arange(tasks * size) % 3 == 1).double().view(tasks, size)
    context = torch.randn(tasks, context_size, OBS + A + 1 + OBS * next_obs, generator=generator)
    shapes = (tasks, Z), (tasks, size, A), (tasks, size, A)
    return batch, context, tuple(torch.randn(shape, generator=generator) for shape in shapes)


VARIANTS = {
    "fixed": {"entropy_coef": 0.7},
    "learned": {"auto_entropy": True, "entropy_coef": 0.7},
    "next_obs": {"next_obs": True, "entropy_coef": 0.2, "gamma": 1.0},
}
each = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def case(variant):
    usual = {"reward_scale": 3.0, "gamma": 0.9, "kl_weight": 0.3, "meta_batch_size": 3}
    args, theta = make_theta(**{**usual, **VARIANTS[variant]})
    if args.auto_entropy:
        theta["log_alpha"] = torch.tensor(-1.1)  # the flag is only its start
    target = noisy(part_of(theta, "q"), 8)
    data = make_batch(next_obs=args.next_obs)
    return SimpleNamespace(args=args, theta=theta, target=target, data=data, slow=Slow(args, *data))


def loss_gradient(case, theta=None, data=None, args=None):
    theta = {name: value.detach().clone().requires_grad_() for name, value in (theta or case.theta).items()}
    loss, _ = loss_of(theta, case.target, *(data or case.data), args or case.args)
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Posterior
# ---------------------------------------------------------------------------------------------------------------------


def test_posterior_is_the_product_of_densities_on_a_grid():
    _, theta = make_theta(latent_size=1)
    theta["encoder_b3"] = torch.tensor([0.4, 0.9])
    context = 2 * torch.randn(6, 5, OBS + A + 1, generator=seeded(0))
    mean, variance = infer(theta, context, torch.ones(6, 5))
    grid = torch.linspace(-30, 30, 200_001)
    for i in range(6):
        log_density = 0
        for x in context[i]:
            m, v = gaussian(theta, x)
            log_density = log_density + Normal(m, v.sqrt()).log_prob(grid)
        weight = (log_density - log_density.max()).exp()
        weight /= weight.sum()
        expected = (weight * grid).sum()
        close(mean[i, 0], expected)
        close(variance[i, 0], (weight * (grid - expected) ** 2).sum())
    assert mean.std() > 0.05
    assert variance.std() > 0.01
    assert (variance < 0.9).all()


def test_posterior_of_each_task_is_that_of_its_transitions_one_by_one():
    _, theta = make_theta(next_obs=True)
    context = torch.randn(4, 6, 2 * OBS + A + 1, generator=seeded(0))
    mean, variance = infer(theta, context, torch.ones(4, 6))
    for i in range(4):
        close((mean[i], variance[i]), slow_posterior(theta, context[i]))


def test_posterior_does_not_depend_on_the_order():
    _, theta = make_theta()
    context, mask = torch.randn(3, 7, OBS + A + 1, generator=seeded(0)), torch.tensor([[1.0, 0, 1, 1, 0, 1, 1]] * 3)
    expected = infer(theta, context, mask)
    for seed in range(5):
        order = torch.randperm(7, generator=seeded(seed))
        close(infer(theta, context[:, order], mask[:, order]), expected, 1e-13)
    assert not torch.equal(infer(theta, context[:, order], mask)[0], expected[0])


def test_posterior_of_masked_transitions_is_that_without_them():
    _, theta = make_theta()
    context, mask = torch.randn(9, 6, OBS + A + 1, generator=seeded(0)), torch.zeros(9, 6)
    for i in range(9):
        mask[i, torch.randperm(6, generator=seeded(i))[: 1 + i % 6]] = 1
    context += 100 * (1 - mask)[..., None]
    mean, variance = infer(theta, context, mask)
    for i in range(9):
        kept = context[i, mask[i] > 0]
        close((mean[i], variance[i]), slow_posterior(theta, kept), 1e-13)
        alone = infer(theta, kept[None], torch.ones(1, len(kept)))
        close((mean[i], variance[i]), (alone[0][0], alone[1][0]), 1e-13)
    assert {*mask.sum(1).tolist()} == {*range(1, 7)}


def test_posterior_of_no_transition_is_the_prior():
    """Of a task of which nothing is left, beside others; its gradient is no NaN."""
    _, theta = make_theta()
    theta = {name: value.requires_grad_() for name, value in theta.items()}
    context, mask = torch.randn(3, 5, OBS + A + 1, generator=seeded(0)), torch.ones(3, 5)
    mask[1] = 0
    mean, variance = infer(theta, context, mask)
    close((mean[1], variance[1]), (torch.zeros(Z), torch.ones(Z)))
    for i in (0, 2):
        close((mean[i], variance[i]), slow_posterior(theta, context[i]))
    weights = list(part_of(theta, "encoder").values())
    slopes = torch.autograd.grad(mean.sum() + variance.sum(), weights, retain_graph=True)
    others = torch.autograd.grad(mean[[0, 2]].sum() + variance[[0, 2]].sum(), weights)
    close(slopes, others)


def test_the_prior_is_a_standard_normal_whatever_the_tasks():
    """With the numbers that a posterior of mean 0 and variance 1 would be drawn with."""
    args, generator, same = Args(latent_size=Z), seeded(4), seeded(4)
    for tasks in (torch.zeros(3, 1), torch.full((5, 2), math.nan), torch.ones(2, 7, dtype=torch.float32)):
        z = sample_prior(tasks, args, generator)
        assert z.dtype == torch.get_default_dtype()  # that of the observations; tasks may be exact
        assert torch.equal(z, torch.randn(len(tasks), Z, generator=same))


def test_the_prior_is_no_factor_of_a_posterior():
    """Of one transition it is the encoder's Gaussian, whose variance may be large or small, though never 0."""
    _, theta = make_theta()
    theta["encoder_b3"] = torch.tensor([1.0, -2, 3, 0.5, 50, -3, 0, -1000])
    context = torch.randn(2, 1, OBS + A + 1, generator=seeded(0))
    mean, variance = infer(theta, context, torch.ones(2, 1))
    for i in range(2):
        m, v = gaussian(theta, context[i, 0])
        close(mean[i], m)
        close(variance[i, :3], v[:3])
    close(variance[:, 3], torch.full((2,), 1e-7))
    assert (variance[:, 0] > 40).all()


# ---------------------------------------------------------------------------------------------------------------------
# Policy and critics
# ---------------------------------------------------------------------------------------------------------------------


def policy_case(bias, size=1.0):
    _, theta = make_theta()
    theta["policy_b3"] = torch.tensor(bias)
    generator = seeded(5)
    obs, z, noise = (torch.randn(4, 6, n, generator=generator) for n in (OBS, Z, A))
    return theta, obs, z, size * noise


@pytest.mark.parametrize("bias", [[0.3, -0.6, -1.0, 0.4], [2.0, -4.0, 1.5, 9.0], [0.1, 0.2, -30.0, -2.0]], ids=str)
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_log_probability_is_that_of_torch_distributions(bias, size):
    theta, obs, z, noise = policy_case(bias, size)
    action, log_prob = act(theta, obs, z, noise)
    for i in range(4):
        for j in range(6):
            output = slow_net(theta, "policy", torch.cat([obs[i, j], z[i, j]]))
            mean, std = output[:A], output[A:].clamp(-20, 2).exp()
            tanh = TanhTransform(cache_size=1)  # it remembers what it has squashed
            expected = tanh(raw := mean + std * noise[i, j])
            close(action[i, j], expected)
            tolerance = 1e-6 if bias[2] == -30 else 1e-8  # of std 2e-9 hardly a digit is left in raw - mean
            theirs = TransformedDistribution(Normal(mean, std), [tanh]).log_prob(expected).sum()
            close(log_prob[i, j], theirs, tolerance)
            other = Normal(mean, std).log_prob(raw) + 2 * (raw.abs() + (-2 * raw.abs()).exp().log1p() - math.log(2))
            close(log_prob[i, j], other.sum(), tolerance)
    assert log_prob.isfinite().all()
    assert (action.abs() <= 1).all()
    if size == 1 and bias[0] == 0.3:
        assert (action.abs() < 1).all()
        assert action.abs().max() > 0.5
        assert log_prob.std() > 0.1


@pytest.mark.parametrize("mean", [-1000.0, -30.0, 30.0, 1000.0])
def test_log_probability_far_in_the_tails(mean):
    """There tanh is 1 in floating point; its derivative 4 exp(-2 |x|) is not 0 all the same, nor is the gradient
    wrong: of the log-probability by the mean it is 2 sign(x)."""
    for dtype in (torch.float32, torch.float64):
        theta, obs, z, noise = policy_case([mean, 0.0, 0.0, 0.0])
        theta = {name: value.to(dtype) for name, value in theta.items()}
        theta["policy_w3"] = torch.zeros(2 * A, 7, dtype=dtype)
        theta["policy_b3"].requires_grad_()
        action, log_prob = act(theta, obs.to(dtype), z.to(dtype), 0 * noise.to(dtype))
        expected = 2 * abs(mean) - 2 * math.log(2) - math.log(2 * math.pi)
        close(log_prob, torch.full((4, 6), expected, dtype=dtype), 1e-6)
        (slope,) = torch.autograd.grad(log_prob.sum(), theta["policy_b3"])
        close(slope[:2], torch.tensor([48 * math.copysign(1, mean), 0.0], dtype=dtype), 1e-6)
        assert (action.abs() <= 1).all()
        assert (action[..., 0] == math.copysign(1, mean)).all()


def test_density_of_actions_integrates_to_one():
    _, theta = make_theta(actions=1)
    theta["policy_b3"] = torch.tensor([0.4, -0.7])
    noise = torch.linspace(-9, 9, 100_001)[:, None]
    obs, z = torch.randn(OBS, generator=seeded(0)), torch.randn(Z, generator=seeded(1))
    action, log_prob = act(theta, obs.expand(len(noise), OBS), z.expand(len(noise), Z), noise)
    assert (action.diff(dim=0) >= 0).all()
    close(torch.trapezoid(log_prob.exp(), action[:, 0]), torch.tensor(1.0), 1e-6)


def test_critics_are_two_networks():
    _, theta = make_theta()
    obs, action, z = (torch.randn(3, 2, n, generator=seeded(n)) for n in (OBS, A, Z))
    actual = pearl_sac.critics(theta, obs, action, z)
    for k, part in enumerate(("q1", "q2")):
        for i in range(3):
            for j in range(2):
                close(actual[k, i, j], slow_q(theta, part, obs[i, j], action[i, j], z[i, j]))


def test_first_networks_and_targets():
    """The critics differ, the targets are copies of them, and no output is far from 0."""
    lab = make_lab()
    fresh = init_state(lab.envs, lab.args, seeded(1))
    theta, target = fresh["theta"], fresh["target"]
    assert target.keys() == (part_of(theta, "q1") | part_of(theta, "q2")).keys()
    for name, value in target.items():
        assert torch.equal(value, theta[name])
        assert value.data_ptr() != theta[name].data_ptr()
    assert not torch.equal(theta["q1_w0"], theta["q2_w0"])
    assert theta["encoder_w0"].shape[1] == 5
    assert init_networks(lab.envs, Args(next_obs=True), seeded(1))["encoder_w0"].shape[1] == 7
    for part, n in (("encoder", 5), ("policy", 2 + Z), ("q1", 4 + Z)):
        output = pearl_sac.mlp(theta, part, torch.randn(50, n, generator=seeded(2)))
        assert 0 < output.abs().max() < 0.05
    args = Args(auto_entropy=True, entropy_coef=0.3)
    close(init_networks(lab.envs, args, seeded(1))["log_alpha"].exp(), torch.tensor(0.3))
    assert "log_alpha" not in theta


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


@each
def test_loss_against_loops(case):
    loss, parts = loss_of(case.theta, case.target, *case.data, case.args)
    close(float(loss), case.slow.loss(case.theta, case.target))
    expected = case.slow.statistics(case.theta, case.target)
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected, rel=1e-10)
    assert not any(value.requires_grad for value in parts.values())
    assert all(abs(value) > 0.05 for value in expected.values())
    changed = noisy(case.target, 9)
    close(float(loss_of(case.theta, changed, *case.data, case.args)[0]), case.slow.loss(case.theta, changed))


@each
def test_only_the_reward_to_train_on_is_trained_on(case):
    batch, context, noise = case.data
    loss, _ = loss_of(case.theta, case.target, *case.data, case.args)
    other = batch.clone()
    other[..., OBS + A] = 7.0
    assert torch.equal(loss_of(case.theta, case.target, other, context, noise, case.args)[0], loss)
    other[..., 2 * OBS + A + 1] += 1
    expected = Slow(case.args, other, context, noise).loss(case.theta, case.target)
    close(float(loss_of(case.theta, case.target, other, context, noise, case.args)[0]), expected)
    assert abs(expected - float(loss)) > 0.1


@each
def test_gradients_against_central_differences(case):
    """Of each part's own terms: the encoder's L_Q + beta KL, the policy's L_pi, the critics' L_Q."""
    gradient, generator, terms = loss_gradient(case), seeded(4), case.slow.terms(case.theta, case.target)
    assert {name.split("_")[0] for name in case.theta} == {part.split("_")[0] for part in terms}
    for part, term in terms.items():
        own = part_of(case.theta, part)
        for name, value in own.items():
            way = torch.randn(value.shape, generator=generator)
            up, down = (float(term({**own, name: value + step * way})) for step in (1e-6, -1e-6))
            slope = float((gradient[name] * way).sum())
            assert slope == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-7), name
        assert flat(part_of(gradient, part)).norm() > 0.01


@each
def test_gradients_against_autograd_of_loops(case):
    close(loss_gradient(case), case.slow.gradient(case.theta, case.target))


@each
def test_encoder_learns_from_critics_and_prior_and_not_from_the_actor(case):
    gradient, (batch, context, (z_noise, next_noise, noise)) = loss_gradient(case), case.data
    other = loss_gradient(case, data=(batch, context, (z_noise, next_noise, -noise)))  # moves L_pi alone
    for part in ("encoder", "q1", "q2"):
        assert torch.equal(flat(part_of(other, part)), flat(part_of(gradient, part))), part
    assert (flat(part_of(other, "policy")) - flat(part_of(gradient, "policy"))).norm() > 0.01
    alone = loss_gradient(case, args=Args(**{**vars(case.args), "kl_weight": 0.0}))
    own = {name: value.clone().requires_grad_() for name, value in part_of(case.theta, "encoder").items()}
    prior = torch.autograd.grad(case.args.kl_weight * case.slow.kl(own), list(own.values()))
    expected = flat(part_of(gradient, "encoder")) - torch.cat([x.flatten() for x in prior])
    close(flat(part_of(alone, "encoder")), expected)
    assert expected.norm() > 0.01
    assert flat(dict(enumerate(prior))).norm() > 0.01


@pytest.mark.parametrize("variant", ["learned"])
def test_the_temperature_moves_by_the_entropys_distance_from_its_goal_and_moves_nothing(case):
    gradient = loss_gradient(case)
    entropy = case.slow.statistics(case.theta, case.target)["train/entropy"]
    close(float(gradient.pop("log_alpha")), entropy + A)
    alpha = float(case.theta["log_alpha"].exp())
    args = Args(**{**vars(case.args), "auto_entropy": False, "entropy_coef": alpha})
    close(gradient, loss_gradient(case, {n: x for n, x in case.theta.items() if n != "log_alpha"}, args=args))


@each
def test_products_in_bfloat16_are_those_of_rounded_factors(case):
    """All but the last layers': networks by hand whose factors are rounded; the gradient is nearly the usual one."""
    args = Args(**{**vars(case.args), "low_precision": True})
    single = {name: value.float() for name, value in case.theta.items()}
    low = {name: x.bfloat16() if name[-1] in "012" else x for name, x in single.items()}
    x = torch.randn(9, OBS + A + Z, generator=seeded(2)).float()
    expected = x
    for i in range(3):  # sums in double precision, then rounded as a layer's outputs are
        product = expected.bfloat16().double() @ low[f"q1_w{i}"].double().T + low[f"q1_b{i}"].double()
        expected = product.relu().bfloat16()
    expected = expected.double() @ single["q1_w3"].double().T + single["q1_b3"].double()
    torch.testing.assert_close(pearl_sac.mlp(low, "q1", x).double(), expected, rtol=1e-2, atol=1e-2)
    exact, rounded = loss_gradient(case), loss_gradient(case, args=args)
    assert {x.dtype for x in rounded.values()} == {torch.float64}
    for part in ("encoder", "policy", "q1", "q2"):
        a, b = flat(part_of(rounded, part)), flat(part_of(exact, part))
        assert 1e-4 < (a - b).norm() / b.norm() < 0.1, part


@each
def test_targets_get_no_gradient(case):
    theta, target = ({n: x.clone().requires_grad_() for n, x in p.items()} for p in (case.theta, case.target))
    loss, _ = loss_of(theta, target, *case.data, case.args)
    assert set(torch.autograd.grad(loss, list(target.values()), allow_unused=True)) == {None}


def constant_critics(params, first, second):
    result = {name: torch.zeros_like(value) for name, value in params.items()}
    return result | {"q1_b3": torch.tensor([first]), "q2_b3": torch.tensor([second])}


def test_an_end_has_no_value_behind_it_and_the_horizon_has():
    """Worlds of one step, of two, of exactly the horizon's four, and of more, from playing to the critics' goals."""
    lab = make_lab(tasks_per_iteration=5, entropy_coef=1e-12, reward_scale=2.0, gamma=0.5, dense_training=True)
    tasks, z, index = lab.state["tasks"], torch.randn(5, Z, generator=seeded(4)), torch.arange(5)
    tasks[:, 2] = torch.tensor([1.0, 2, 4, 5, 99])
    episodes = play_episodes(lab.envs, tasks, lab.theta, z, lab.args, seeded(5), noise_scale=1.0)
    rows = packed(episodes)
    assert episodes.mask.sum(1).tolist() == [1, 2, 4, 4, 4]
    store(lab.state["replay"], index, episodes)
    theta = lab.theta | constant_critics(lab.state["target"], 3.0, 4.0)
    target, seen = constant_critics(lab.state["target"], 10.0, -20.0), set()
    places = {tuple(rows[i, t].tolist()): (i, t) for i in range(5) for t in range(4)}
    noise = torch.zeros(1, Z), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)
    for task, drawn in enumerate(packed(draw(lab.state["replay"], index, torch.rand(5, 60, generator=seeded(6))))):
        for row in drawn.unique(dim=0):
            i, t = places[tuple(row.tolist())]
            seen.add((i, t))
            bias = theta["q1_b3"].clone().requires_grad_()
            weights = {**theta, "q1_b3": bias}
            loss, _ = loss_of(weights, target, row[None, None], drawn[None, :3, :5], noise, lab.args, 2, 2)
            goal = 3.0 - float(torch.autograd.grad(loss, bias)[0]) / 2  # (3 - goal)^2 has slope 2 (3 - goal)
            reward = -float((rows[i, t, 5:7] - tasks[i, :2]).norm())
            ends = t + 1 == tasks[i, 2]
            assert i == task
            assert goal == pytest.approx(2 * reward + (0 if ends else 0.5 * -20), abs=1e-9)
    assert seen == {(i, t) for i, n in enumerate([1, 2, 4, 4, 4]) for t in range(n)}


# ---------------------------------------------------------------------------------------------------------------------
# Buffers
# ---------------------------------------------------------------------------------------------------------------------


SMALL = SimpleNamespace(single_observation_space=Box(-1, 1, (2,)), single_action_space=Box(-1, 1, (1,)))


def numbered(rows, mask):
    """Transitions whose fields can all be told from their observation, a row of two numbers."""
    number = rows[..., 1]
    fields = {"obs": rows, "action": number[..., None] + 0.5, "reward": 2 * number, "next_obs": rows + 1000}
    return Transitions(**fields, training_reward=3 * number, ended=number % 2, mask=mask)


def drawn_numbers(buffer, index, size, generator):
    """Of each drawn transition its task and its number, which are its observation; all else is that one's own."""
    drawn = draw(buffer, torch.tensor(index), torch.rand(len(index), size, generator=generator))
    rows = drawn.obs
    assert rows.shape == (len(index), size, 2)
    for found, expected in zip(drawn, numbered(rows, torch.ones(len(index), size)), strict=True):
        assert torch.equal(found, expected)
    return rows


@pytest.mark.parametrize(("tasks", "size", "steps", "seed"), [(4, 7, 7, 0), (6, 5, 2, 1), (3, 11, 4, 2), (2, 1, 1, 3)])
def test_buffers_against_lists(tasks, size, steps, seed):
    """Ragged episodes, stored by some tasks at a time, round the ring and cleared in between."""
    buffer, lists, generator = init_buffer(SMALL, tasks, size), [deque(maxlen=size) for _ in range(tasks)], seeded(seed)
    counts, number, wraps, clearings = [0] * tasks, 1, 0, 0
    for name in Transitions._fields:
        buffer[name].fill_(-1)  # what no one has stored
    for turn in range(80):
        index = torch.randperm(tasks, generator=generator)[: 1 + turn % tasks].tolist()
        length = 1 + turn % steps
        if turn % 7 == 3:
            buffer["count"][torch.tensor(index)] = 0
            for i in index:
                lists[i].clear()
                counts[i] = 0
                clearings += 1
        rows, mask = torch.zeros(len(index), length, 2), torch.rand(len(index), length, generator=generator).round()
        mask[:, 0] = 1
        for k, i in enumerate(index):
            for t in range(length):
                rows[k, t] = torch.tensor([i, number])
                if mask[k, t]:
                    lists[i].append(number)
                    counts[i] += 1
                    wraps += counts[i] > size
                number += 1
        store(buffer, torch.tensor(index), numbered(rows, mask))
        assert buffer["count"].tolist() == counts
        full = [i for i in torch.randperm(tasks, generator=generator).tolist() if lists[i]]
        for i, drawn in zip(full, drawn_numbers(buffer, full, 40 * size, generator), strict=True):
            assert (drawn[:, 0] == i).all()
            assert {*drawn[:, 1].tolist()} == {*lists[i]}
    assert wraps > 50
    assert clearings > 10


def test_the_oldest_transitions_go_first():
    buffer, kept = init_buffer(SMALL, 1, 5), deque(maxlen=5)
    for number in range(0, 60, 3):
        rows = torch.tensor([[[0.0, number + t] for t in range(3)]])
        store(buffer, torch.tensor([0]), numbered(rows, torch.tensor([[1.0, 0, 1]])))
        kept += [number, number + 2]
        assert sorted(drawn_numbers(buffer, [0], 200, seeded(number))[0, :, 1].unique().tolist()) == sorted(kept)


def test_draws_are_uniform_and_independent():
    """Pearson's statistics of each task's transitions, and of the pairs of neighbours and of two tasks."""
    buffer, sizes = init_buffer(SMALL, 4, 9), [3, 9, 1, 9]
    for i, stored in enumerate([3, 9, 1, 23]):
        for number in range(stored):
            row = torch.tensor([[[float(i), number % 9]]])
            store(buffer, torch.tensor([i]), numbered(row, torch.ones(1, 1)))
    drawn = drawn_numbers(buffer, [0, 1, 2, 3], 20_000, seeded(1))[..., 1].long()
    checked = 0
    for values, cells in [
        *[(drawn[i], sizes[i]) for i in range(4)],
        (9 * drawn[1, 1:] + drawn[1, :-1], 81),
        (9 * drawn[1] + drawn[3], 81),
        (9 * drawn[0] + drawn[1], 27),
    ]:
        observed = values.bincount(minlength=cells).double()
        expected = len(values) / cells
        statistic = float(((observed - expected) ** 2 / expected).sum())
        assert len(observed) == cells
        assert abs(statistic - (cells - 1)) <= 4 * math.sqrt(2 * (cells - 1))
        checked += 1
    assert checked == 7
    assert torch.equal(
        drawn_numbers(buffer, [0, 1, 2, 3], 50, seeded(1)), drawn_numbers(buffer, [0, 1, 2, 3], 50, seeded(1))
    )
    assert not torch.equal(drawn_numbers(buffer, [1], 50, seeded(1)), drawn_numbers(buffer, [1], 50, seeded(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_random_number_draws_the_newest(dtype):
    largest = torch.nextafter(torch.tensor(1, dtype=dtype), torch.tensor(0, dtype=dtype))
    buffer = init_buffer(SMALL, 50, 60)
    for i in range(50):
        rows = torch.tensor([[[i, number] for number in range(60)]], dtype=torch.float64)
        store(buffer, torch.tensor([i]), numbered(rows, (torch.arange(60) <= i).double()[None]))
    drawn = draw(buffer, torch.arange(50), largest.expand(50, 2))
    assert drawn.obs[:, :, 1].tolist() == [[i, i] for i in range(50)]


# ---------------------------------------------------------------------------------------------------------------------
# Playing and collecting
# ---------------------------------------------------------------------------------------------------------------------


def play_by_hand(task, actions):
    """Rows of the actions until the world ends: with the sparse reward, and the dense one behind."""
    position, rows = torch.zeros(2), []
    for action in actions:
        new = position + STRIDE * action
        distance = float((new - task[:2]).norm())
        reward, ended = (1 - distance if distance <= 0.2 else 0.0), len(rows) + 1 >= task[2]
        rows.append(torch.cat([position, action, torch.tensor([reward]), new, torch.tensor([-distance, float(ended)])]))
        if ended:
            break
        position = new
    return rows


class Breaking(Mortal):
    """Its physics fail in the step of a world's end, where a task's first number is negative."""

    def _advance(self, action):
        next_obs, ended, info = super()._advance(action)
        broke = ended & (self.tasks[:, 0] < 0)
        return torch.where(broke[:, None], self._obs, next_obs), ended, info | {"diverged": broke}


def test_the_step_in_which_a_world_diverges_is_no_transition():
    """Nor are those after it; a usual end is one. Neither buffer holds it, and it is no step of the count."""
    lab = make_lab(tasks_per_iteration=5)
    lab.envs = ScaleActions(Breaking(5, 4, dtype=torch.float64), 1.0)
    lab.state["tasks"] = torch.tensor([[-0.1, 0.1, n] for n in (1.0, 2, 4)] + [[0.1, 0.1, 2.0], [-0.1, 0.1, 9]])
    episodes = play_episodes(lab.envs, lab.state["tasks"], lab.theta, torch.zeros(5, Z), lab.args, seeded(2), 1.0)
    assert episodes.mask.sum(1).tolist() == [0, 1, 3, 2, 4]
    assert (episodes.mask.diff(dim=1) <= 0).all()
    collect_episodes(lab.envs, torch.arange(5), lab.state, lab.args, seeded(1), from_prior=True)
    for name in ("replay", "recent"):
        held = [stored(lab.state[name], i) for i in range(5)]
        assert [len(rows) for rows in held] == [0, 1, 3, 2, 4]
        assert [rows[-1][-1] for rows in held[1:]] == [0, 0, 1, 0]  # only a usual end cuts off what comes after
        assert all(row[:2] != row[5:7] for rows in held for row in rows)
    assert lab.state["env_steps"] == 10


def test_an_emptied_context_shows_nothing_of_before(monkeypatch):
    """Where a task's first episode has no transition to keep, its context is empty: the posterior is the prior."""
    lab = make_lab()
    lab.state |= {"iteration": 2, "returns": []}
    for x in lab.state["recent"].values():
        x.fill_(1)
    drawn = []

    def first_episode(envs, index_N, state, *_):
        drawn.append(pearl_sac.draw(state["recent"], index_N, torch.rand(len(index_N), 4, dtype=torch.float64)))
        return torch.zeros(len(index_N))

    monkeypatch.setattr(pearl_sac, "collect_episodes", first_episode)
    pearl_sac.collect_iteration(lab.envs, lab.state, lab.args, seeded(1), lambda *_: None)
    assert not drawn[0].mask.any()
    mean, variance = pearl_sac.posterior(lab.theta, drawn[0], lab.args)
    assert torch.equal(mean, torch.zeros_like(mean))
    assert torch.equal(variance, torch.ones_like(variance))


def test_mujoco_tells_which_worlds_diverged():
    """A state that no physics can follow, beside a usual one."""
    from envs import make

    args = Args(env_id="HalfCheetahVel3-v0", horizon=3, hidden_size=6)
    envs = make(args.env_id, 2, args.horizon, False)
    start = envs.unwrapped._start

    def broken(task, generator):
        obs = start(task, generator)
        envs.unwrapped._state[1, -3:] = 1e9  # m/s and radians/s
        return obs

    envs.unwrapped._start = broken
    theta = {name: x.float() for name, x in init_networks(envs, args, seeded(1)).items()}
    tasks = envs.unwrapped.sample_tasks(2, seeded(0), "train")
    z = torch.zeros(2, args.latent_size, dtype=torch.float32)
    try:
        torch.set_default_dtype(torch.float32)
        episodes = play_episodes(envs, tasks, theta, z, args, seeded(2), 1.0)
    finally:
        torch.set_default_dtype(torch.float64)
    assert episodes.ended.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert episodes.mask.tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("dense", [False, True])
def test_rows_are_what_a_world_alone_shows(dense):
    """Observations, actions, both rewards and ends, for 200 tasks."""
    lab = make_lab(tasks_per_iteration=200, train_tasks=200, dense_training=dense)
    z = torch.randn(200, Z, generator=seeded(1))
    rows, mask, returns = play(lab, z, seeded(2))
    assert rows.shape == (200, 4, 9)
    paid = 0
    for i, task in enumerate(lab.state["tasks"]):
        expected = torch.stack(play_by_hand(task, rows[i, :, 2:4]))
        if not dense:
            expected[:, 7] = expected[:, 4]
        close(rows[i, : len(expected)], expected)
        assert mask[i].tolist() == [1.0] * len(expected) + [0.0] * (4 - len(expected))
        assert float(returns[i]) == pytest.approx(float(expected[:, 4].sum()), abs=1e-12)
        paid += int((expected[:, 4] > 0).sum())
    assert 50 < paid < mask.sum() - 50
    assert {*mask.sum(1).tolist()} == {1, 2, 3, 4}


def test_actions_are_the_policys():
    """With noise of deviation 1, independent between tasks, steps and numbers of an action; or its means."""
    lab = make_lab(tasks_per_iteration=200, train_tasks=200)
    lab.state["tasks"][:, 2] = 99
    lab.theta["policy_b3"] = torch.tensor([0.2, -0.1, -1.0, 0.1])
    z = torch.randn(200, Z, generator=seeded(1))
    rows, _, _ = play(lab, z, seeded(2))
    noise = torch.zeros(200, 4, 2)
    for i in range(200):
        for t in range(4):
            output = slow_net(lab.theta, "policy", torch.cat([rows[i, t, :2], z[i]]))
            noise[i, t] = (rows[i, t, 2:4].atanh() - output[:2]) / output[2:].exp()
    x = noise.view(-1)
    assert abs(float(x.mean())) < 4 / 1600**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / 1600) ** 0.5
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 0], noise[..., 1])):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5
    other, _, _ = play(lab, z, seeded(3))
    assert not torch.equal(other[:, 0, 2:4], rows[:, 0, 2:4])
    rows, _, _ = play(lab, z, seeded(2), noise_scale=0.0)
    for i in range(0, 200, 10):
        for t in range(4):
            close(rows[i, t, 2:4], slow_act(lab.theta, rows[i, t, :2], z[i], torch.zeros(2))[0])


def moments(z, mean, variance):
    """That z [N, Z] looks like N independent draws from this Gaussian."""
    x = (z - mean) / variance.sqrt()
    count = len(x)
    assert (x.mean(0).abs() < 4 / count**0.5).all()
    assert ((x.var(0) - 1).abs() < 4 * (2 / count) ** 0.5).all()
    assert abs(float((x**4).mean()) - 3) < 4 * (96 / x.numel()) ** 0.5
    off = x.T @ x / count - torch.eye(x.shape[1])
    off.fill_diagonal_(0)
    assert off.abs().max() < 4 / count**0.5
    assert (x[1:] * x[:-1]).mean(0).abs().max() < 4 / count**0.5


def test_z_is_drawn_from_prior_and_posterior():
    args, theta = make_theta()
    nothing = sample_prior(torch.zeros(20_000, 1), args, seeded(1))
    moments(nothing, torch.zeros(Z), torch.ones(Z))
    context = torch.randn(4, OBS + A + 1, generator=seeded(2))
    mean, variance = slow_posterior(theta, context)
    z = sample_posterior(theta, as_context(context.expand(20_000, 4, -1)), args, seeded(3))
    moments(z, mean, variance)
    assert (variance - 1).abs().min() > 0.1
    same = sample_posterior(theta, as_context(context.expand(20_000, 4, -1)), args, seeded(1))
    close(same, mean + variance.sqrt() * nothing)


@pytest.fixture
def seen(monkeypatch):
    """Of each episode what its z was drawn from (nothing: the prior) and with which noise, what `play_episodes` was
    given and what came of it."""
    calls = []
    prior, posterior, play = pearl_sac.sample_prior, pearl_sac.sample_posterior, pearl_sac.play_episodes

    def noise_of(shape, generator):
        same = Generator()
        same.set_state(generator.get_state())
        return torch.randn(shape, generator=same)

    def spy_prior(tasks, args, generator):
        noise = noise_of((len(tasks), args.latent_size), generator)
        z = prior(tasks, args, generator)
        calls.append(SimpleNamespace(context=torch.zeros(len(tasks), 0, 1), noise=noise, drawn=z))
        return z

    def spy_posterior(theta, context, args, generator):
        noise = noise_of((len(context.obs), args.latent_size), generator)
        z = posterior(theta, context, args, generator)
        context = visible(context, theta["encoder_w0"].shape[1])
        calls.append(SimpleNamespace(context=context, noise=noise, drawn=z))
        return z

    def spy_play(envs, tasks, theta, z, args, generator, noise_scale):
        episodes = play(envs, tasks, theta, z, args, generator, noise_scale)
        if hasattr(calls[-1], "z"):  # played with the z of the episode before
            calls.append(SimpleNamespace(**{name: getattr(calls[-1], name) for name in ("context", "noise", "drawn")}))
        vars(calls[-1]).update(tasks=tasks, z=z, noise_scale=noise_scale, rows=packed(episodes), mask=episodes.mask)
        calls[-1].returns = episodes.reward.sum(1)
        calls[-1].theta = clone(theta)
        return episodes

    monkeypatch.setattr(pearl_sac, "sample_prior", spy_prior)
    monkeypatch.setattr(pearl_sac, "sample_posterior", spy_posterior)
    monkeypatch.setattr(pearl_sac, "play_episodes", spy_play)
    return calls


def rows_in(buffer):
    """The rows [M, R, ..] of a buffer."""
    return packed(Transitions(**{name: buffer[name] for name in Transitions._fields}))


def stored(buffer, i):
    """The rows of a task, oldest first, as a list of tuples."""
    rows, count = rows_in(buffer)[i], int(buffer["count"][i])
    assert (buffer["mask"][i, :count] == 1).all()
    return [tuple(rows[k % len(rows)].tolist()) for k in range(max(0, count - len(rows)), count)]


def kept(call, i):
    """The transitions of an episode of the call's i-th task."""
    return [tuple(row.tolist()) for row, mark in zip(call.rows[i], call.mask[i], strict=True) if mark]


@pytest.mark.parametrize(("next_obs", "context"), [(False, "posterior"), (True, "posterior"), (False, "prior")])
def test_collecting_fills_both_buffers_and_asks_the_posterior_of_its_own_context(seen, next_obs, context):
    """With --context prior episodes with z from the posterior are only replayed."""
    lab = make_lab(next_obs=next_obs, dense_training=True, context=context)
    state, width = lab.state, 7 if next_obs else 5
    state["tasks"][:, 2] = torch.tensor([2.0, 3, 1, 9, 2])
    recent, replay, steps = ([[] for _ in range(5)] for _ in range(2)), None, 0
    recent, replay = recent
    plan = [([4, 0, 3], 0, False), ([1, 2, 0], 0, False), ([0, 4, 3], 6, False), ([3, 1, 0], 0, True)]
    plan += [([3, 0, 1], 5, False), ([2, 4, 0], 3, False)]
    for turn, (index, size, clear) in enumerate(plan):
        if clear:
            state["recent"]["count"][torch.tensor(index)] = 0
            for i in index:
                recent[i].clear()
        lab.args.context_size = size
        returns = collect_episodes(lab.envs, torch.tensor(index), state, lab.args, seeded(turn), from_prior=not size)
        call = seen[-1]
        assert len(seen) == turn + 1
        assert call.noise_scale == 1
        assert torch.equal(call.z, call.drawn)
        assert torch.equal(call.tasks, state["tasks"][torch.tensor(index)])
        close(returns, call.returns)
        for k, i in enumerate(index):
            drawn = [tuple(x.tolist()) for x in call.context[k]]
            assert len(drawn) == size
            assert {*drawn} <= {row[:width] for row in recent[i]}
            m, v = slow_posterior(state["theta"], call.context[k])
            close(call.z[k], m + v.sqrt() * call.noise[k])
            steps += len(kept(call, k))
            recent[i] += kept(call, k) if not size or context == "posterior" else []
            replay[i] += kept(call, k)
        assert state["env_steps"] == steps
        for i in range(5):
            assert stored(state["recent"], i) == recent[i]
            assert stored(state["replay"], i) == replay[i]
    assert steps < 4 * 3 * len(plan) - 10
    assert len(recent[3]) < len(replay[3]) == 4 * 4


def test_first_episodes_are_with_z_from_the_prior(seen):
    lab = make_lab(train_tasks=900, tasks_per_iteration=900, horizon=2, latent_size=2)
    state, everyone = lab.state, torch.arange(900)
    for turn in range(2):  # even where there is a context
        collect_episodes(lab.envs, everyone, state, lab.args, seeded(turn), from_prior=True)
        moments(seen[-1].z, torch.zeros(2), torch.ones(2))
    assert not torch.equal(seen[0].z, seen[1].z)


# ---------------------------------------------------------------------------------------------------------------------
# learn
# ---------------------------------------------------------------------------------------------------------------------


def fill(lab, seed=7):
    """Random transitions in both buffers, of each task another number; the others are not numbers."""
    generator, ids = seeded(seed), {}
    for name, counts in (("replay", [3, 20, 55, 9, 1]), ("recent", [1, 8, 100, 5, 2])):
        buffer = lab.state[name]
        rows = torch.randn(rows_in(buffer).shape, generator=generator)
        rows[..., -1] = (rows[..., -1] > 0.5).double()
        buffer["count"][:] = torch.tensor(counts)
        for i, count in enumerate(counts):
            rows[i, count:] = math.nan
            for row in rows[i, :count]:
                ids[(name, *row.tolist())] = i
                ids[("seen", *row[: lab.theta["encoder_w0"].shape[1]].tolist())] = (name, i)
        for field, values in unpacked(rows, 2, 2)._asdict().items():
            buffer[field][:] = values
    return ids


def no_pause(done):
    """Nobody asks the run to end."""


@pytest.fixture
def losses(monkeypatch):
    """What every `pearl_loss` was given, as rows."""
    calls, original = [], pearl_sac.pearl_loss

    def spy(theta, target, batch, context, noise, args):
        call = SimpleNamespace(theta=clone(theta), target=clone(target), batch=packed(batch))
        call.context = visible(context, theta["encoder_w0"].shape[1])
        call.noise = noise["z"], noise["next_action"], noise["action"]
        calls.append(call)
        return original(theta, target, batch, context, noise, args)

    monkeypatch.setattr(pearl_sac, "pearl_loss", spy)
    return calls


LEARNING = {
    "fixed": {"reward_scale": 2.0},
    "learned": {"auto_entropy": True, "entropy_coef": 0.4},
    "next_obs": {"next_obs": True},
}


@pytest.mark.parametrize("variant", LEARNING)
def test_updates_are_adams_by_hand_and_targets_follow(losses, variant):
    """Three of them, each part with the gradient of its own terms by loops."""
    lab = make_lab(updates=3, lr=0.01, tau=0.3, gamma=0.8, kl_weight=0.2, **LEARNING[variant])
    fill(lab)
    weights, target, args = clone(lab.theta), clone(lab.state["target"]), lab.args
    first, done = clone(weights), []
    optimizer = torch.optim.Adam(lab.theta.values(), args.lr)
    stats = summarise(learn(lab.envs, lab.state, optimizer, args, seeded(5), pause=done.append))
    assert done == [0, 1, 2]
    m, v = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    assert len(losses) == 3
    for k, call in enumerate(losses, 1):
        close(call.theta, weights)
        close(call.target, target)
        slow = Slow(args, call.batch, call.context, call.noise, 2, 2)
        expected = slow.statistics(weights, target)
        gradient = slow.gradient(weights, target)
        for name, slope in gradient.items():
            m[name] = 0.9 * m[name] + 0.1 * slope
            v[name] = 0.999 * v[name] + 0.001 * slope**2
            size = (v[name] / (1 - 0.999**k)).sqrt() + 1e-8
            weights[name] = weights[name] - 0.01 * m[name] / (1 - 0.9**k) / size
        target = {name: 0.7 * value + 0.3 * weights[name] for name, value in target.items()}
    close(lab.theta, weights, 1e-7)
    close(lab.state["target"], target, 1e-7)
    assert stats == pytest.approx(expected, rel=1e-6)
    for part in ("encoder", "policy", "q1", "q2"):
        assert (flat(part_of(weights, part)) - flat(part_of(first, part))).abs().max() > 0.02
    for value in (*lab.theta.values(), *lab.state["target"].values()):
        assert not value.requires_grad
    assert all(value.grad is None for value in lab.state["target"].values())


@pytest.mark.parametrize("next_obs", [False, True])
def test_updates_are_of_different_tasks_with_their_own_data(monkeypatch, next_obs):
    """A batch of the replay and a context of the recent transitions of the same task; all tasks equally often."""
    lab = make_lab(updates=500, meta_batch_size=3, next_obs=next_obs)
    ids, calls = fill(lab), []

    def cheap(theta, target, batch, context, noise, args):
        seen = visible(context, theta["encoder_w0"].shape[1])
        calls.append((packed(batch), seen, (noise["z"], noise["next_action"], noise["action"])))
        return sum(value.sum() for value in theta.values()), {}

    monkeypatch.setattr(pearl_sac, "pearl_loss", cheap)
    learn(lab.envs, lab.state, torch.optim.Adam(lab.theta.values()), lab.args, seeded(3), pause=no_pause)
    frequency, together = Counter(), Counter()
    for batch, context, _ in calls:
        assert batch.shape == (3, 5, 9)
        assert context.shape == (3, 3, 7 if next_obs else 5)
        tasks = []
        for rows, parts in zip(batch, context, strict=True):
            owners = {ids[("replay", *row.tolist())] for row in rows}
            owners |= {i for name, i in (ids[("seen", *row.tolist())] for row in parts) if name == "recent"}
            assert {ids[("seen", *row.tolist())][0] for row in parts} == {"recent"}
            assert len(owners) == 1
            tasks += owners
        assert len({*tasks}) == 3
        frequency.update(tasks)
        together.update([tuple(sorted(tasks))])
    assert len(calls) == 500
    assert len(together) == 10
    for counts, mean, deviation in (
        (frequency, 300, math.sqrt(500 * 0.6 * 0.4)),
        (together, 50, math.sqrt(500 * 0.1 * 0.9)),
    ):
        assert all(abs(count - mean) < 4 * deviation for count in counts.values())
    for i, shape in enumerate([(3, Z), (3, 5, 2), (3, 5, 2)]):
        noise = torch.stack([noise[i] for *_, noise in calls])
        assert noise.shape[1:] == shape
        moments(noise.flatten(1), torch.tensor(0.0), torch.tensor(1.0))
    next_noise, noise = (torch.stack([noise[i] for *_, noise in calls]) for i in (1, 2))
    assert abs(float((next_noise * noise).mean())) < 4 / noise.numel() ** 0.5


def test_updates_follow_their_generator(losses):
    results = []
    for seed in (1, 1, 2):
        lab = make_lab(updates=2)
        fill(lab)
        learn(lab.envs, lab.state, torch.optim.Adam(lab.theta.values()), lab.args, seeded(seed), pause=no_pause)
        results.append(flat(lab.theta))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# ---------------------------------------------------------------------------------------------------------------------
# evaluate and train
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["posterior", "prior"])
@pytest.mark.parametrize(("next_obs", "priors"), [(False, 1), (True, 2), (False, 4)])
def test_evaluation_scores_the_means_after_episodes_with_noise(seen, next_obs, priors, context):
    """By hand, one task at a time: z of each episode from the list of what those of the context have shown."""
    lab = make_lab(
        tasks_per_iteration=12, train_tasks=12, next_obs=next_obs, eval_episodes=4, eval_prior_episodes=priors,
        dense_training=True, context=context,
    )  # fmt: skip
    before, width = clone(lab.theta), 7 if next_obs else 5
    actual = summarise(evaluate(lab.envs, lab.theta, lab.args))
    calls = seen[:]
    explores = [k < priors or context == "posterior" for k in range(3)] + [False]
    plan = [(k, scale, "own") for k in range(4) for scale in ([0, 1] if explores[k] else [0])]
    plan += [(k, 0, "authors") for k in range(3) for _ in range(2 if k < 2 else 1)]
    assert [call.noise_scale for call in calls] == [scale for _, scale, _ in plan]
    tasks, returns = calls[0].tasks, {"own": np.zeros((12, 4)), "authors": np.zeros((12, 3))}
    assert (tasks[:, 0] < 0).all()  # held out
    spread = 0.0
    for i, task in enumerate(tasks):
        shown, last = {"own": [], "authors": []}, None
        for call, (k, scale, whose) in zip(calls, plan, strict=True):
            assert torch.equal(call.tasks[i], task)
            is_second = last == (k, whose)  # the episode for the context, with the z of the scored one
            if not is_second:
                from_prior = k < (priors if whose == "own" else 2)
                mean, variance = slow_posterior(lab.theta, [] if from_prior else shown[whose])
                z = mean + variance.sqrt() * call.noise[i]
            close(call.z[i], z)
            rows = [row for row, mark in zip(call.rows[i], call.mask[i], strict=True) if mark]
            for row in rows:
                change = (row[2:4] - slow_act(lab.theta, row[:2], z, torch.zeros(2))[0]).abs().max()
                assert scale == 1 or change < 1e-10
                spread = max(spread, float(change))
            close(torch.stack(rows), torch.stack(play_by_hand(task, [row[2:4] for row in rows])))
            if is_second:
                shown[whose] += [row[:width] for row in rows]
            else:
                returns[whose][i, k] = sum(float(row[4]) for row in rows)
            last = k, whose
    assert spread > 0.1
    authors, returns = returns["authors"], returns["own"]
    gain = returns[:, -1] - returns[:, 0]
    expected = {f"test/return_k{k}": returns[:, k].mean() for k in range(4)}
    expected |= {"test/tasks": 12, "test/return_authors": authors[:, 2].mean()}
    assert {name: actual[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert actual.keys() - expected.keys() == {"test/gain_ci95"}
    assert gain.std() > 0
    assert actual["test/gain_ci95"] == pytest.approx(interval(gain, tasks), rel=2e-3)
    noise = torch.stack([*{id(call.noise): call.noise for call in calls}.values()])  # two calls may share theirs
    assert len(noise.flatten().unique()) == noise.numel()
    assert torch.equal(flat(lab.theta), flat(before))
    assert summarise(evaluate(lab.envs, lab.theta, lab.args)) == actual
    lab.args.seed += 1
    assert summarise(evaluate(lab.envs, lab.theta, lab.args)) == actual  # the test set is that of every run
    assert torch.equal(seen[-1].tasks, lab.envs.unwrapped.test_set(12)[0])


@pytest.fixture
def learned(monkeypatch, seen):
    """Of every `learn`: how often had been played, and what the buffers held, before; the largest change by it."""
    calls, original = [], pearl_sac.learn

    def spy(envs, state, optimizer, args, generator, pause):
        buffers = {name: [stored(state[name], i) for i in range(args.train_tasks)] for name in ("recent", "replay")}
        before, chance = flat(state["theta"]).clone(), tuple(generator.get_state().tolist())
        stats = original(envs, state, optimizer, args, generator, pause)
        change = float((flat(state["theta"]) - before).abs().max())
        lr = optimizer.param_groups[0]["lr"]
        calls.append(SimpleNamespace(played=len(seen), chance=chance, change=change, buffers=buffers, lr=lr))
        return stats

    monkeypatch.setattr(pearl_sac, "learn", spy)
    return calls


@pytest.mark.parametrize("initial", [2, 5])
def test_training_against_lists(seen, learned, initial):
    """Who plays when and with how much context, what the buffers hold before every update, and what is logged."""
    lab = make_lab(
        iterations=5, initial_episodes=initial, prior_episodes=2, posterior_episodes=1, eval_every=2, updates=1,
        lr=0.0137, eval_episodes=2, replay_size=9,
    )  # fmt: skip
    lab.state["tasks"][:2, 2] = 99  # of 5 initial episodes they have 6, one too many for their contexts
    names = {tuple(task.tolist()): i for i, task in enumerate(lab.state["tasks"])}
    train(lab.envs, lab.args, run := Recorder(lab.args), lab.state)
    capacity, calls = max(initial, 3) * 4, iter(seen)
    recent, replay = ([deque(maxlen=size) for _ in range(5)] for size in (capacity, 9))
    steps, played, episodes, choices = 0, 0, Counter(), []

    def follow(size):
        """The next episode, into the lists."""
        nonlocal steps, played
        call = next(calls)
        assert call.noise_scale == 1
        assert call.context.shape[:2] == (3, size)
        index = [names[tuple(task.tolist())] for task in call.tasks]
        assert len({*index}) == 3
        for k, i in enumerate(index):
            assert {tuple(x.tolist()) for x in call.context[k]} <= {row[:5] for row in recent[i]}
            recent[i] += kept(call, k)
            replay[i] += kept(call, k)
            steps += len(kept(call, k))
        played += 1
        return index, float(call.returns.mean())

    for _ in range(math.ceil(initial * 5 / 3)):
        episodes.update(follow(0)[0])
        assert max(episodes.values()) - min(episodes[i] for i in range(5)) <= 1  # all in turn
    assert {*episodes.values()} == {initial, initial + 1}
    for iteration, update, (number, env_steps, stats) in zip(range(1, 6), learned, run.logged, strict=True):
        fresh = [names[tuple(task.tolist())] for task in seen[played].tasks]
        for i in fresh:
            recent[i].clear()
        results = [follow(size) for size in (0, 0, 3)]
        assert all(index == fresh for index, _ in results)
        choices.append(tuple(fresh))
        assert update.played == played
        assert update.buffers == {"recent": [[*x] for x in recent], "replay": [[*x] for x in replay]}
        assert (number, env_steps) == (iteration, steps)
        assert stats["train/return_pre"] == pytest.approx(results[0][1])
        assert stats["train/return_post"] == pytest.approx(results[-1][1])
        assert any(name.startswith("test/") for name in stats) == (iteration in (1, 2, 4, 5))
        if iteration in (1, 2, 4, 5):
            scales = [0, 1, 0, 0, 0, 0, 0, 0]  # two scored episodes, one for the context between them; the authors'
            assert [next(calls).noise_scale for _ in scales] == scales
            played += len(scales)
    assert not [*calls]
    assert initial == 2 or not {0, 1} <= {*choices[0]}  # the context of such a task has lost an episode
    assert run.saved == [2, 4, 5]
    assert len({*choices}) > 1
    assert len({update.chance for update in learned}) == 5
    assert learned[0].change == pytest.approx(0.0137, rel=1e-3)  # Adam's first step
    again = make_lab(**vars(lab.args))
    again.state["tasks"][:2, 2] = 99
    train(again.envs, again.args, other := Recorder(again.args), again.state)
    assert other.logged == run.logged


def test_training_goes_on_where_it_was_left(learned):
    """As if it had not been left, and with a step size given anew."""
    whole, left = make_lab(iterations=4, eval_every=1, updates=2), make_lab(iterations=2, eval_every=1, updates=2)
    train(whole.envs, whole.args, expected := Recorder(whole.args), whole.state)
    train(left.envs, left.args, run := Recorder(left.args), left.state)
    left.args.iterations = 4
    train(left.envs, left.args, run, left.state)
    assert run.logged == expected.logged
    assert torch.equal(flat(left.state["theta"]), flat(whole.state["theta"]))
    left.args.iterations, left.args.lr = 5, 0.02
    train(left.envs, left.args, run, left.state)
    assert learned[-1].lr == 0.02


class Interrupted(Recorder):
    """Is asked to end at its k-th chance (never at the 0th), and keeps what was saved last, as a file does."""

    def __init__(self, args, k=0):
        super().__init__(args)
        self.k, self.chances, self.told = k, 0, []

    def should_stop(self):
        self.chances += 1
        return self.chances == self.k

    def doing(self, what, done=0, of=0):
        self.told.append((what, done, of))

    def save(self, state):
        super().save(state)
        torch.save(state, file := io.BytesIO())
        self.kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)


SHORT = {"iterations": 2, "initial_episodes": 2, "prior_episodes": 1, "posterior_episodes": 2, "updates": 4}
SHORT |= {"eval_every": 1, "eval_episodes": 2, "auto_entropy": True}
CHANCES = 4 + 2 + 4 + 1, 2 + 4 + 1  # of an iteration: initial rounds, rounds but the first, updates, and its end


def numbers(state):
    """All that a run goes on from, by name."""
    rest = {name: x for name, x in state.items() if name not in ("seconds", "args")}

    def walk(x, name):
        if isinstance(x, dict | list | tuple):
            for key, y in x.items() if isinstance(x, dict) else enumerate(x):
                yield from walk(y, f"{name}.{key}")
        else:
            yield name, x

    return dict(walk(rest, "state"))


def assert_same(found, expected):
    """To the last bit."""
    found, expected = numbers(found), numbers(expected)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x) if isinstance(x, torch.Tensor) else found[name] == x, name


@pytest.fixture(scope="module")
def whole():
    """The run that nobody has stopped: what it logged, and its state after each chance to stop and at its end."""
    torch.set_default_dtype(torch.float64)  # the fixture of each test comes later
    lab = make_lab(**SHORT)
    train(lab.envs, lab.args, run := Interrupted(lab.args), lab.state)
    assert run.chances == sum(CHANCES)
    return SimpleNamespace(logged=run.logged, told=run.told, state=run.kept)


def test_what_a_run_says_that_it_does(whole):
    """Before each round and each update but the first round of an iteration, how many are done, and of how many."""
    collecting = [("collecting", k, 3) for k in (1, 2)]
    iteration = [*collecting, *(("updating", k, 4) for k in range(4)), ("evaluating", 0, 0)]
    assert whole.told == [*(("collecting", k, 4) for k in range(4)), *iteration, *iteration]


@pytest.mark.parametrize("k", range(1, sum(CHANCES) + 1))
def test_a_run_that_is_stopped_anywhere_goes_on_as_if_it_had_not_been(whole, k):
    """In new worlds, with what a file holds: what it logs, networks, buffers and random numbers are the same bits."""
    lab, other = make_lab(**SHORT), make_lab(seed=50, **SHORT)
    is_last = k == sum(CHANCES)  # then all is done, and the run ends as any other
    with nullcontext() if is_last else pytest.raises(Stopped):
        train(lab.envs, lab.args, run := Interrupted(lab.args, k), lab.state)
    is_between = k in (CHANCES[0], sum(CHANCES))
    assert run.kept["iteration"] == (1 if k <= CHANCES[0] else 2)
    assert run.kept["unfinished"] == (not is_between)
    assert [number for number, *_ in run.logged] == list(range(1, run.kept["iteration"] + is_between))
    train(other.envs, other.args, rest := Interrupted(other.args), run.kept)
    assert [*run.logged, *rest.logged] == whole.logged
    assert_same(run.kept if k == sum(CHANCES) else rest.kept, whole.state)
    for part in ("theta", "target", "optimizer", "replay", "recent", "generator"):
        assert any(name.startswith(f"state.{part}") for name in numbers(whole.state))


def is_last_chance(state, k):
    """Whether the k-th chance from here is that after the last update of all; 4 updates an iteration."""
    return state["iteration"] == 2 and state["unfinished"] == 1 and state["updates"] + k == 3 + 2


def test_a_run_that_is_stopped_after_every_round_and_update_is_the_same_run(whole):
    """Each time by a new process; one that is stopped before it has done anything changes nothing."""
    lab, logged, starts = make_lab(**SHORT), [], 0
    state = lab.state
    while state["iteration"] < 2 or state["unfinished"]:
        for k in (1, 2):
            other = make_lab(seed=60 + starts, **SHORT)
            run = Interrupted(other.args, k)
            given = state
            with nullcontext() if is_last_chance(given, k) else pytest.raises(Stopped):
                train(other.envs, other.args, run, dict(given))
            logged += run.logged
            state, starts = run.kept, starts + 1
            if k == 1 and given["unfinished"]:
                assert_same(state, given)
    assert logged == whole.logged
    assert_same(state, whole.state)
    assert starts > 20
