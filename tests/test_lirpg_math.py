"""The mathematics of algos/lirpg.py against independent oracles, in float64: a bandit whose meta-gradient has a closed
form, central differences through the real update, a plain PPO with torch's Adam, and loops over worlds and steps."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch.distributions import Categorical, Normal
from torch.func import grad

from algos import lirpg
from algos.lirpg import Args, Batch
from envs import Lifetimes, ScaleActions
from envs.cartpole import CartPoleFixed
from envs.navigation import Navigation2D
from tests.double_precision import Recorder, flat, float64, seeded  # noqa: F401 (float64 is used by being here)

N, T, ROWS = 3, 7, torch.tensor([19, 0, 3, 6, 7, 8, 13, 16, 2, 11])
SPACES = {"choices": Discrete(3), "gaussian": Box(-1, 1, (2,))}
each_kind = pytest.mark.parametrize("kind", SPACES)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def noisy(params, generator, size=0.3):
    """Away from zero biases and from a policy that does not look."""
    return {name: x + size * torch.randn(x.shape, generator=generator) for name, x in params.items()}


def example(kind, seed=0, long=True, **flags):
    """Flags, a state in the midst of learning, a batch with ends of episodes, and where they are; `long`: the policy's
    gradient is longer than 0.5, otherwise features, rewards and errors are small, so that it is not."""
    generator = seeded(seed)
    spaces = SimpleNamespace(single_observation_space=Box(-1, 1, (4,)), single_action_space=SPACES[kind])
    args = Args(
        num_worlds=N, rollout_steps=T, **{"minibatches": 2, "epochs": 2, "clip": 0.05, "entropy_coef": 0.1} | flags
    )
    state = lirpg.first_state(spaces, args, generator)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    for name in ("theta", "eta"):
        state[name] = noisy(state[name], generator)
        adam, size = state[f"{name}_adam"], len(state[f"{name}_adam"]["mean"])
        adam |= {"mean": 0.05 * draw(size), "square": 0.01 * draw(size) ** 2, "steps": adam["steps"] + 4}
    obs = draw(N, T, 4) * (1 if long else 0.1)
    for params in () if long else (state["theta"], state["eta"]):
        params |= {name: 0.02 * x for name, x in params.items() if name[-2:] in ("w0", "w2", "b0", "b1", "b2")}
        params |= {name: x + 1.5 for name, x in params.items() if name == "log_std"}
    action = draw(N, T, 2) if kind == "gaussian" else torch.randint(3, (N, T), generator=generator)
    old = noisy(state["theta"], generator, 0.02)
    done = torch.rand(N, T, generator=generator) < 0.25
    weight = lirpg.gae_weights(done, args.gamma * args.gae_lambda)
    delta, value, advantage, target = (draw(N, T) for _ in range(4))
    level_weight = torch.rand(N, T, generator=generator)
    if not long:
        delta, value = 0.01 * delta, slow_output(state["theta"], "value", obs)[..., 0]
    log_prob = slow_log_prob(old, obs, action)[0]
    batch = Batch(
        obs=obs, action=action, log_prob=log_prob, gae_weight=weight, mixed_delta=delta, mixed_value=value,
        level_weight=level_weight / level_weight.mean(), extrinsic_advantage=advantage, extrinsic_target=target,
    )  # fmt: skip
    return args, state, batch, done


def slope_of(eta, *inputs):
    """The gradient of `extrinsic_loss` in eta, by eta's names; theta' and its Adam's moments, detached."""
    leaves = {name: x.clone().requires_grad_() for name, x in eta.items()}
    loss, *stepped = lirpg.extrinsic_loss(leaves, *inputs)
    gradient = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return gradient, *({name: x.detach() for name, x in part.items()} for part in stepped)


def slow_output(params, name, x):
    for i in range(3):
        x = torch.einsum("...m,nm->...n", x, params[f"{name}_w{i}"]) + params[f"{name}_b{i}"]
        x = torch.tanh(x) if i < 2 else x
    return x


def slow_log_prob(theta, obs, action):
    """log pi(a|s) and the entropy, one distribution each."""
    scores = slow_output(theta, "policy", obs)
    if action.is_floating_point():
        policy = Normal(scores, theta["log_std"].exp().expand_as(scores))
        return policy.log_prob(action).sum(-1), policy.entropy().sum(-1)
    policy = Categorical(probs=torch.softmax(scores, -1))
    return policy.log_prob(action), policy.entropy()


def slow_reward(eta, obs, action):
    features = action if action.is_floating_point() else torch.eye(3)[action]
    return torch.tanh(slow_output(eta, "reward", torch.cat([obs, features], -1))[..., 0])


def slow_advantages(delta, done, decay):
    """A_i = sum of decay^(j - i) delta_j over the steps j from i on to the end of its episode."""
    rows = []
    for world in range(len(delta)):
        row = []
        for i in range(delta.shape[1]):
            total = 0
            for j in range(i, delta.shape[1]):
                total = total + decay ** (j - i) * delta[world, j]
                if done[world, j]:
                    break
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def slow_delta(eta, batch, args):
    """TD errors of the mixed reward; the mean learned reward is V_mix's level, which is lost bit by bit."""
    reward = args.intrinsic_coef * slow_reward(eta, batch.obs, batch.action)
    return batch.mixed_delta + reward - batch.level_weight * (reward.sum() / reward.numel())


def slow_loss(theta, value, batch, rows, advantage, target, args, entropy_coef):
    total, normal = 0, [advantage.flatten()[row] for row in rows]
    if args.normalize_advantages:
        mean = sum(normal) / len(normal)
        spread = (sum((x - mean) ** 2 for x in normal) / len(normal) + 1e-8) ** 0.5
        normal = [(x - mean) / spread for x in normal]
    for row, gain in zip(rows, normal, strict=True):
        world, t = int(row) // T, int(row) % T
        log_prob, entropy = slow_log_prob(theta, batch.obs[world, t], batch.action[world, t])
        ratio = torch.exp(log_prob - batch.log_prob[world, t])
        clipped = torch.clamp(ratio, 1 - args.clip, 1 + args.clip)
        error = slow_output(value, "value", batch.obs[world, t])[0] - target[world, t]
        total = total - min(ratio * gain, clipped * gain) + error**2 / 2 - entropy_coef * entropy
    return total / len(rows)


def slow_step(eta, state, batch, done, rows, args, denominator=None):
    """theta'(eta) as one vector, by torch.autograd and Adam's formulas; and Adam's denominator, which may be given."""
    theta = {name: x.clone().requires_grad_() for name, x in state["theta"].items()}
    delta = slow_delta(eta, batch, args)
    advantage = slow_advantages(delta, done, args.gamma * args.gae_lambda)
    loss = slow_loss(theta, theta, batch, rows, advantage, advantage + batch.mixed_value, args, args.entropy_coef)
    gradient = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(theta.values()))])
    norm = gradient.norm()
    gradient = gradient / max(1.0, float(norm) / 0.5)
    adam, steps = state["theta_adam"], int(state["theta_adam"]["steps"]) + 1
    mean = (0.9 * adam["mean"] + 0.1 * gradient) / (1 - 0.9**steps)
    square = (0.999 * adam["square"] + 0.001 * gradient**2) / (1 - 0.999**steps)
    denominator = square.sqrt() + 1e-5 if denominator is None else denominator
    return flat(state["theta"]) - args.lr * mean / denominator, denominator, norm


def slow_extrinsic_loss(eta, state, batch, done, rows, args, denominator):
    stepped = slow_step(eta, state, batch, done, rows, args, denominator)[0]
    parts = stepped.split([x.numel() for x in state["theta"].values()])
    theta = {name: part.view_as(x) for (name, x), part in zip(state["theta"].items(), parts, strict=True)}
    return float(slow_loss(theta, eta, batch, rows, batch.extrinsic_advantage, batch.extrinsic_target, args, 0.0))


# ---------------------------------------------------------------- the meta-gradient


def test_the_bandit_of_the_closed_form():
    """Three arms with exact expectations: a uniform behaviour policy that pulls each arm once makes the mean of
    ratio x reward the expectation under pi. Adam with an overwhelming second moment is a plain step of size 0.5."""
    theta, learned = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.3, -0.1, 0.2])
    paid, big, depth = torch.tensor([1, 0.2, -0.5]), 1e8, math.tanh(math.tanh(1))
    args = Args(num_worlds=3, rollout_steps=1, minibatches=1, clip=1e6, normalize_advantages=False)
    args.lr = 0.5 * big
    spaces = SimpleNamespace(single_observation_space=Box(-1, 1, (1,)), single_action_space=Discrete(3))
    state = lirpg.first_state(spaces, args, seeded(0))
    for name in ("theta", "eta"):
        state[name] = {key: torch.zeros_like(x) for key, x in state[name].items()}
    state["theta"]["policy_b2"] = theta
    for arm in range(3):  # one unit a layer for each arm
        state["eta"]["reward_w0"][arm, 1 + arm] = state["eta"]["reward_w1"][arm, arm] = 1
    state["eta"]["reward_w2"][0, :3] = learned.atanh() / depth
    adam = state["theta_adam"] | {"square": torch.full_like(state["theta_adam"]["square"], big**2 / 999)}
    zeros, arms = torch.zeros(3, 1), torch.arange(3)[:, None]
    batch = Batch(
        obs=torch.zeros(3, 1, 1), action=arms, log_prob=zeros - math.log(3), gae_weight=torch.ones(3, 1, 1),
        mixed_delta=zeros, mixed_value=zeros, level_weight=torch.ones(3, 1),  # a baseline: it changes no expectation
        extrinsic_advantage=paid[:, None], extrinsic_target=zeros,
    )  # fmt: skip
    close(intrinsic_of_arms := lirpg.intrinsic_reward(state["eta"], batch.obs, arms)[:, 0], learned, 1e-12)
    inputs = state["eta"], state["theta"], adam, batch, torch.arange(3), args
    gradient, stepped, _ = slope_of(*inputs)
    close(stepped["policy_b2"], torch.tensor([0.1238449765, -0.2323529623, 0.3085079858]), 1e-8)
    close(-lirpg.extrinsic_loss(*inputs)[0].detach(), torch.tensor(0.1855435759), 1e-8)
    slope = -gradient["reward_w2"][0, :3] / depth / (1 - intrinsic_of_arms**2)
    close(slope, torch.tensor([0.0509882188, 0.0031287983, -0.0541170172]), 1e-8)


CASES = [
    ("choices", {}), ("gaussian", {}), ("gaussian", {"entropy_coef": 0.0, "extrinsic_coef": 1.0}),
    ("choices", {"normalize_advantages": False}), ("gaussian", {"intrinsic_coef": 0.3, "clip": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "flags"), CASES)
@pytest.mark.parametrize("long", [False, True], ids=["short gradient", "gradient that is shortened"])
def test_the_meta_gradient_against_central_differences(kind, flags, long):
    """Through advantages, their normalisation, the shortened gradient and Adam, whose denominator is held fixed."""
    args, state, batch, done = example(kind, long=long, **flags, lr=0.1)
    rest = state, batch, done, ROWS, args
    inputs = state["theta"], state["theta_adam"], batch, ROWS, args
    gradient, stepped, _ = slope_of(state["eta"], *inputs)
    expected, denominator, norm = slow_step(state["eta"], *rest)
    close(flat(stepped), expected)
    assert (norm > 0.5) == long, norm
    loss = lirpg.extrinsic_loss(state["eta"], *inputs)[0]
    close(float(loss.detach()), slow_extrinsic_loss(state["eta"], *rest, denominator))
    generator, step = seeded(5), 1e-5
    for part in ("reward", "value"):
        for _ in range(2):
            towards = {
                name: torch.randn(x.shape, generator=generator) * (part in name) for name, x in state["eta"].items()
            }
            ends = [
                slow_extrinsic_loss(
                    {k: x + sign * step * towards[k] for k, x in state["eta"].items()}, *rest, denominator
                )
                for sign in (1, -1)
            ]
            slope = float(sum((gradient[name] * towards[name]).sum() for name in gradient))
            assert abs(slope) > 1e-6, part
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-9)


@each_kind
def test_work_for_a_coefficient_of_0_is_not_done(kind, monkeypatch):
    """Without the learned reward, neither it nor L_ex nor a second derivative is computed; without an entropy bonus, no
    entropy. What remains is the step of the formulas with these terms times 0."""
    args, state, batch, done = example(kind, intrinsic_coef=0.0, entropy_coef=0.0)
    expected = slow_step(state["eta"], state, batch, done, ROWS, args)[0].detach()

    def unwanted(*_, **__):
        raise AssertionError("this is not needed")

    for name in ("intrinsic_reward", "extrinsic_loss"):
        monkeypatch.setattr(lirpg, name, unwanted)
    for family in (lirpg.Categorical, lirpg.Independent):
        monkeypatch.setattr(family, "entropy", unwanted)
    theta, _ = lirpg.policy_step(state["eta"], state["theta"], state["theta_adam"], batch, ROWS, args)
    close(flat(theta), expected)
    assert not flat(theta).requires_grad
    lirpg.learn_from(batch, state, args, seeded(3))
    with pytest.raises(AssertionError, match="not needed"):  # the spies are where they should be
        lirpg.learn_from(batch, state, replace(args, entropy_coef=0.1), seeded(3))
    with pytest.raises(AssertionError, match="not needed"):
        lirpg.learn_from(batch, state, replace(args, intrinsic_coef=0.1), seeded(3))


@each_kind
def test_one_minibatch_at_the_old_policy_is_the_actor_critic_gradient(kind):
    """The gradient of PPO's loss is then that of -mean(A log pi) + (V - target)^2 / 2 - entropy, whatever the clip."""
    args, state, batch, done = example(kind, normalize_advantages=False)
    theta = {name: x.clone().requires_grad_() for name, x in state["theta"].items()}
    log_prob, entropy = slow_log_prob(theta, batch.obs, batch.action)
    batch = batch._replace(log_prob=log_prob.detach())
    advantage = slow_advantages(slow_delta(state["eta"], batch, args), done, args.gamma * args.gae_lambda)
    error = slow_output(theta, "value", batch.obs)[..., 0] - advantage - batch.mixed_value
    loss = (error**2 / 2 - advantage * log_prob - args.entropy_coef * entropy).mean()
    expected = torch.autograd.grad(loss, list(theta.values()))
    gradient = grad(lirpg.mixed_loss)(state["theta"], state["eta"], batch, torch.arange(N * T), args)
    for name, x in zip(theta, expected, strict=True):
        close(gradient[name], x)


@each_kind
def test_an_update_takes_both_steps_from_the_old_slots(kind):
    """eta's gradient is that of the old eta, theta and moments; then both change."""
    args, state, batch, _ = example(kind)
    now, generator = dict(state), seeded(3)
    for _ in range(args.epochs):
        rows = torch.randperm(N * T, generator=generator)
        for part in (rows[:11], rows[11:]):
            inputs = now["theta"], now["theta_adam"], batch, part, args
            gradient = tuple(slope_of(now["eta"], *inputs)[0].values())
            slope = tuple(grad(lirpg.mixed_loss)(now["theta"], now["eta"], batch, part, args).values())
            now["theta"], now["theta_adam"] = lirpg.adam_step(now["theta"], slope, now["theta_adam"], args.lr)
            now["eta"], now["eta_adam"] = lirpg.adam_step(now["eta"], gradient, now["eta_adam"], args.reward_lr)
    lirpg.learn_from(batch, state, args, seeded(3))
    for name in ("theta", "eta"):
        close(flat(state[name]), flat(now[name]))
        close(flat(state[f"{name}_adam"]), flat(now[f"{name}_adam"]))


# ---------------------------------------------------------------- PPO and its parts


@each_kind
def test_without_the_learned_reward_it_is_ppo(kind):
    """lambda = 0, c_ex = 1: a plain PPO with torch.optim.Adam and clip_grad_norm_ makes the same steps."""
    args, state, batch, done = example(kind, intrinsic_coef=0.0, extrinsic_coef=1.0, epochs=3)
    for name in ("theta", "eta"):  # as at the beginning
        state[f"{name}_adam"] = {key: torch.zeros_like(x) for key, x in state[f"{name}_adam"].items()}
    theta = {name: x.clone().requires_grad_() for name, x in state["theta"].items()}
    optimizer, generator = torch.optim.Adam(theta.values(), args.lr, eps=1e-5), seeded(3)
    advantage = slow_advantages(batch.mixed_delta, done, args.gamma * args.gae_lambda)
    for _ in range(args.epochs):
        for rows in torch.randperm(N * T, generator=generator).chunk(2):
            optimizer.zero_grad()
            goal = advantage + batch.mixed_value
            slow_loss(theta, theta, batch, rows, advantage, goal, args, args.entropy_coef).backward()
            torch.nn.utils.clip_grad_norm_(theta.values(), 0.5)
            optimizer.step()
    before = dict(state["eta"])
    lirpg.learn_from(batch, state, args, seeded(3))
    close(flat(state["theta"]), flat(theta).detach(), 1e-8)  # clip_grad_norm_ adds 1e-6 to the norm
    assert all(torch.equal(x, before[name]) for name, x in state["eta"].items())


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_a_step_of_adam(size):
    params, generator = (
        {"a": torch.randn(3, 2, generator=seeded(1)), "b": torch.randn(4, generator=seeded(2))},
        seeded(3),
    )
    theirs = {name: x.clone().requires_grad_() for name, x in params.items()}
    optimizer = torch.optim.Adam(theirs.values(), 0.01, eps=1e-5)
    adam = {"mean": torch.zeros(10), "square": torch.zeros(10), "steps": torch.zeros(())}
    for _ in range(5):
        gradient = {name: size * torch.randn(x.shape, generator=generator) for name, x in params.items()}
        params, adam = lirpg.adam_step(params, tuple(gradient.values()), adam, 0.01)
        for name, x in theirs.items():
            x.grad = gradient[name].clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        optimizer.step()
    for name, x in theirs.items():
        close(params[name], x.detach(), 1e-7)


def test_no_gradient_at_all_is_no_step():
    params = {"a": torch.ones(3)}
    adam = {"mean": torch.zeros(3), "square": torch.zeros(3), "steps": torch.zeros(())}
    stepped = lambda x: lirpg.adam_step(params, (x * params["a"],), adam, 0.1)[0]["a"].sum()  # noqa: E731
    assert stepped(torch.tensor(0.0)) == 3
    assert torch.isfinite(grad(stepped)(torch.tensor(0.0)))


def test_advantages_are_cut_where_episodes_end():
    generator = seeded(4)
    delta, done = torch.randn(5, 11, generator=generator), torch.rand(5, 11, generator=generator) < 0.3
    assert 5 < done.sum() < 30
    for decay in (0.9, 1.0, 0.0):
        close((lirpg.gae_weights(done, decay) @ delta[..., None])[..., 0], slow_advantages(delta, done, decay))


@pytest.mark.parametrize("delay", [1, 3, 40])
def test_rewards_are_paid_late_across_batches(delay):
    """Against a loop over worlds and steps that knows nothing of batches."""
    generator, args = seeded(5), Args(delay=delay, gamma=0.9)
    reward, done = torch.randn(4, 30, generator=generator), torch.rand(4, 30, generator=generator) < 0.15
    sums, columns = {name: torch.zeros(4) for name in ("return", "discounted", "step", "due")}, []
    for part in (slice(0, 8), slice(8, 9), slice(9, 30)):
        *parts, sums = lirpg.pay_late(reward[:, part], done[:, part], sums, args)
        columns.append(torch.stack(parts))
    for world in range(4):
        total = discounted = due = step = 0
        for t in range(30):
            total, discounted, due, step = (
                total + reward[world, t],
                0.9 * discounted + reward[world, t],
                due + reward[world, t],
                step + 1,
            )
            paid = due if done[world, t] or step % delay == 0 else 0.0 * due
            close(torch.cat(columns, 2)[:, world, t], torch.stack([total, discounted, paid]))
            due = 0 if done[world, t] or step % delay == 0 else due
            total, discounted, step = (0, 0, 0) if done[world, t] else (total, discounted, step)
    paid, total = torch.cat(columns, 2)[2], torch.cat(columns, 2)[0]
    for world in range(4):  # nothing is lost: up to the last end, all that was earned is paid
        last = int(done[world].nonzero()[-1]) + 1
        close(paid[world, :last].sum(), reward[world, :last].sum())
        close(paid[world, :last].sum(), total[world, :last][done[world, :last]].sum())


def test_running_moments_against_numpy():
    x = 3 + 2 * torch.randn(50, 4, generator=seeded(6))
    moments = {"mean": torch.zeros(4), "var": torch.ones(4), "count": torch.tensor(0.0)}
    for part in x.split((1, 20, 29)):
        moments = lirpg.update_moments(moments, part)
    close(moments["mean"], torch.tensor(np.mean(x.numpy(), 0)))
    close(moments["var"], torch.tensor(np.var(x.numpy(), 0)))
    assert moments["count"] == 50


# ---------------------------------------------------------------- worlds


FAMILIES = {"choices": (CartPoleFixed, 9, 100), "gaussian": (Navigation2D, 5, 6)}  # the horizon, steps that are played


def worlds(kind, **flags):
    family, horizon, steps = FAMILIES[kind]
    envs = family(N, horizon, dtype=torch.float64)
    envs = Lifetimes(envs if kind == "choices" else ScaleActions(envs, 1.0), 10**9)
    args = Args(num_worlds=N, rollout_steps=steps, horizon=horizon, delay=4, minibatches=1, **flags)
    state = lirpg.first_state(envs, args, seeded(0))
    generator = seeded(1)
    for name in ("theta", "eta"):
        state[name] = noisy(state[name], generator)
    moments = state["obs_moments"]
    moments |= {"mean": 0.1 * torch.randn(moments["mean"].shape, generator=generator), "var": 2 * moments["var"]}
    tasks = envs.unwrapped.sample_tasks(1, seeded(2)).repeat(N, 1)
    obs, _ = envs.reset(seed=3, options={"tasks": tasks})
    return envs, args, state, obs, tasks


@each_kind
@pytest.mark.parametrize("normalize", [False, True])
def test_a_batch_is_what_was_played(kind, normalize):
    """Played again by hand: observations, log-probabilities, TD errors of both values, to the end of each episode."""
    envs, args, state, first, tasks = worlds(kind, normalize=normalize, live_bonus=0.3, extrinsic_coef=0.7)
    before = {name: dict(x) for name, x in state.items()}
    after, stream = lirpg.play_steps(envs, first, state, args.rollout_steps, seeded(4))
    paid, stats = lirpg.receive(stream, state, args)
    batch = lirpg.prepare(stream, paid, state, args)
    envs.reset(seed=3, options={"tasks": tasks})
    scale = lambda obs: ((obs - before["obs_moments"]["mean"]) / math.sqrt(2 + 1e-8)).clamp(-10, 10)  # noqa: E731
    raw, seen, reward, nexts, fell, done, obs = [], [], [], [], [], [], first
    for t in range(args.rollout_steps):
        raw.append(obs)
        seen.append(scale(obs))
        close(batch.obs[:, t], seen[t])
        close(batch.log_prob[:, t], slow_log_prob(state["theta"], seen[t], batch.action[:, t])[0])
        obs, paid, terminated, truncated, info = envs.step(batch.action[:, t])
        for column, x in (
            (reward, paid),
            (nexts, scale(info["final_obs"])),
            (fell, terminated),
            (done, terminated | truncated),
        ):
            column.append(x)
    close(after, obs)
    reward, fell, done, raw = (torch.stack(x, 1) for x in (reward, fell, done, raw))
    assert fell.any() == (kind == "choices")
    assert (done & ~fell).any()
    returns, discounted, late, _ = lirpg.pay_late(reward, done, before["sums"], args)
    assert float(stats["train/return_post"].mean()) == pytest.approx(float(returns[done].mean()))
    if normalize:
        moments = lirpg.update_moments(before["return_moments"], discounted.reshape(-1, 1))
        late = (late / (moments["var"] + 1e-8).sqrt()).clamp(-10, 10)
        close(state["obs_moments"]["mean"], lirpg.update_moments(before["obs_moments"], raw.flatten(0, 1))["mean"])
    else:
        assert state["obs_moments"] == before["obs_moments"]
    for name, earned in (("theta", 0.7 * late + 0.3), ("eta", late)):
        value, following = (slow_output(state[name], "value", torch.stack(x, 1))[..., 0] for x in (seen, nexts))
        delta = earned + args.gamma * following * torch.where(done, 0.0, 1.0) - value
        if name == "theta":
            close(batch.mixed_delta, delta)
            close(batch.mixed_value, value)
        else:
            close(batch.extrinsic_advantage, slow_advantages(delta, done, args.gamma * args.gae_lambda))
            close(batch.extrinsic_target, batch.extrinsic_advantage + value)
    close(batch.gae_weight, lirpg.gae_weights(done, args.gamma * args.gae_lambda))
    # A level b of V that the batch's mean reward 1 keeps up: 0 = mean(1 + gamma (b or, after a fall, 0) - b).
    going = float((~fell).double().mean())
    level = 1 / (1 - args.gamma * going)
    error = 1 + args.gamma * level * torch.where(fell, 0.0, 1.0) - level
    close(1 - batch.level_weight, error, 1e-5)  # 1e-8 is added, for a discount of 1


@each_kind
def test_a_constant_in_the_learned_reward_says_nothing_where_nobody_falls(kind):
    """And where somebody does, a higher one makes falls worse than before."""
    args, state, batch, done = example(kind)
    fell = torch.zeros(N, T, dtype=torch.bool)
    for _ in range(2):
        drop = 1 - args.gamma * ~fell
        batch = batch._replace(level_weight=drop / drop.mean())
        deltas = []
        for constant in (0.0, 0.5):
            eta = {name: 0 * x for name, x in state["eta"].items()}
            eta["reward_b2"] = torch.tensor([math.atanh(constant)])
            deltas.append(slow_delta(eta, batch, args))
            inputs = state["theta"], eta, batch, ROWS, args
            advantage = slow_advantages(deltas[-1], done, args.gamma * args.gae_lambda)
            target = advantage + batch.mixed_value
            expected = slow_loss(
                state["theta"], state["theta"], batch, ROWS, advantage, target, args, args.entropy_coef
            )
            close(lirpg.mixed_loss(*inputs), expected)
        gain = deltas[1] - deltas[0]
        assert ((gain < -0.1) == fell).all()
        assert gain.mean().abs() < 1e-9
        fell[0, 2] = fell[1, 5] = True


def test_choices_are_draws_from_the_policy():
    envs, _, state, obs, _ = worlds("choices")
    state["theta"] |= {"policy_w2": 0 * state["theta"]["policy_w2"], "policy_b2": torch.tensor([0.5, -0.5])}
    _, stream = lirpg.play_steps(envs, obs, state, 4000, seeded(5))
    assert float((stream.action == 0).double().mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.015)
    uniform = 0.5 * (1 + torch.erf(torch.randn(4000, N, 2, generator=seeded(5)) / math.sqrt(2)))
    expected = (torch.tensor([0.5, -0.5]) - torch.log(-torch.log(uniform))).argmax(-1).T
    assert torch.equal(stream.action, expected)  # Gumbel's maximum, whose sign matters among three choices and more


def test_gaussian_actions_have_the_policys_moments():
    envs, _, state, obs, _ = worlds("gaussian")
    state["theta"] |= {"policy_w2": 0 * state["theta"]["policy_w2"], "policy_b2": torch.tensor([0.5, -0.5])}
    _, stream = lirpg.play_steps(envs, obs, state, 4000, seeded(5))
    close(stream.action.mean((0, 1)), torch.tensor([0.5, -0.5]), 0.04)
    close(stream.action.std((0, 1)), state["theta"]["log_std"].exp(), 0.03)


@each_kind
def test_an_evaluation_is_one_undelayed_episode_of_each_world(kind):
    envs, args, state, _, _ = worlds(kind, seed=7)
    state["first_returns"] = torch.tensor([1.0, 2.0, 4.0])
    actual = lirpg.evaluate(envs.env, state, args)
    tasks = envs.unwrapped.sample_tasks(1, seeded(7)).repeat(N, 1)  # that of the run's seed
    generator = envs.unwrapped.test_set(N)[1]  # the test set's starts and noise, whatever the seed
    seed = int(torch.randint(2**31, (1,), generator=generator))
    obs, _ = envs.env.reset(seed=seed, options={"tasks": tasks})
    noise, total = torch.randn(args.horizon, N, 2, generator=generator), torch.zeros(N)
    for t in range(args.horizon):
        scores = slow_output(state["theta"], "policy", (obs - state["obs_moments"]["mean"]) / math.sqrt(2 + 1e-8))
        uniform = 0.5 * (1 + torch.erf(noise[t] / math.sqrt(2)))
        choice = (torch.log_softmax(scores, -1) - torch.log(-torch.log(uniform))).argmax(1)
        action = choice if kind == "choices" else scores + state["theta"]["log_std"].exp() * noise[t]
        obs, reward, *_ = envs.env.step(action)
        total += reward
    before = state["first_returns"]
    close(actual, {"test/return_k0": before, "test/return_k1": total, "test/gain_ci95": total - before})
    close(lirpg.test_returns(envs.env, state, args), total)


def test_the_loop_counts_saves_and_evaluates():
    envs, args, state, _, _ = worlds("choices", iterations=5, eval_every=2, epochs=1)
    args.rollout_steps = 4
    run = Recorder(args)
    state |= {"iteration": 0, "env_steps": 0, "generator": seeded(7).get_state()}
    test_envs = CartPoleFixed(N, args.horizon, dtype=torch.float64)
    untrained = float(lirpg.test_returns(test_envs, state, args).mean())
    lirpg.train(envs, test_envs, args, run, state)
    assert [(iteration, steps) for iteration, steps, _ in run.logged] == [(k, 12 * k) for k in range(1, 6)]
    assert run.saved == [2, 4, 5]
    evaluated = [k for k, _, stats in run.logged if "test/return_k1" in stats]
    assert evaluated == [1, 2, 4, 5]
    assert {stats["test/return_k0"] for _, _, stats in run.logged if "test/return_k0" in stats} == {untrained}
