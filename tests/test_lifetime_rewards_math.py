"""The mathematics of algos/lifetime_rewards.py against independent oracles, in float64: one lifetime after the other in
plain loops, with torch.autograd, an LSTM cell and sums written out, and ABC worlds of a few lines of Python."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box, Discrete

from algos import lifetime_rewards as lives
from algos.lifetime_rewards import Args, Trajectory
from envs import Lifetimes, summarise
from envs.gridworlds import EmptyRooms, SymABC
from tests.double_precision import Recorder, flat, float64, interval, seeded  # noqa: F401 (float64 is used by being here)

N, T, U, A = 6, 4, 4, 3
O = 3  # noqa: E741
ARGS = Args(
    meta_batch_size=N, steps=T, unroll=U, policy_size=4, hidden_size=5, inner_lr=0.2, inner_gamma=0.8, gamma=0.95,
    entropy_coef=0.3, inner_max_norm=3.0, episodes_per_lifetime=3, horizon=6,
)  # fmt: skip
SPACES = SimpleNamespace(
    num_envs=N, single_observation_space=Box(-1, 1, (O,)), single_action_space=Discrete(A),
    unwrapped=SimpleNamespace(device="cpu"),
)  # fmt: skip
OVER = [(1, 0, 1), (2, 1, 3), (3, 0, 0), (5, 3, 1)]  # lifetime, trajectory, step: an episode ends, the lifetime goes on
DIED = [(2, 1, 1), (3, 2, T - 1), (4, 0, 0), (4, 2, 1), (5, 3, 3)]  # both end


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def noisy(params, generator, size=0.5):
    """Away from zero biases and from networks whose outputs are all near 0."""
    return {name: x + size * torch.randn(x.shape, generator=generator) for name, x in params.items()}


def init_weights(envs, args, generator, number):
    """eta, phi, policies, and the memories of an LSTM in the midst of lifetimes."""
    eta, phi = (noisy(lives.init_history(envs, args, generator), generator) for _ in range(2))
    theta = noisy(lives.init_policies(envs, args, generator), generator)
    memory = {
        key: [0.5 * torch.randn(1, number, args.hidden_size, generator=generator) for _ in range(2)]
        for key in ("eta", "phi")
    }
    return eta, phi, theta, memory


def example(seed=0, args=ARGS):
    """Networks, policies and a window of U trajectories with ends of episodes and of lifetimes in many places."""
    generator = seeded(seed)
    eta, phi, theta, memory = init_weights(SPACES, args, generator, N)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scale = torch.tensor([4.0, 3.0, 2.0, 0.3, 0.2, 0.1])[:, None]  # long gradients, and short ones
    window, start = [], draw(N, O)
    for k in range(U):
        obs, end = torch.cat([start[:, None], draw(N, T - 1, O)], 1), draw(N, O)
        over, died, mask = torch.zeros(N, T), torch.zeros(N, T), torch.ones(N, T)
        for n, where, t in OVER + DIED:
            over[n, t] = max(over[n, t], where == k)
        for n, where, t in DIED:
            died[n, t] = max(died[n, t], where == k)
        mask[:, 1:] = 1 - died.cumsum(1)[:, :-1]
        reward, final = scale * draw(N, T), torch.cat([obs[:, 1:], end[:, None]], 1) + over[..., None] * draw(N, T, O)
        x = torch.cat([obs, final, reward[..., None], over[..., None]], -1)
        newborn = noisy(lives.init_policies(SPACES, args, generator), generator) if died.any() else {}
        action = torch.randint(A, (N, T), generator=generator)
        data = Trajectory(
            obs=obs, action=action, x=x, reward=reward, over=over, died=died, mask=mask, episode=None, obs_after=end,
            newborn=newborn,
        )  # fmt: skip
        window.append(data)
        start = end
    return eta, phi, theta, memory, window


# ---------------------------------------------------------------- the oracle: one lifetime, one step after the other


def slow_policy(theta, obs):
    """log pi(.|s) and v(s) of one policy in one state."""
    output = torch.tanh(obs @ theta["w0"] + theta["b0"]) @ theta["w1"] + theta["b1"]
    return output[:-1] - output[:-1].exp().sum().log(), output[-1]


def slow_cell(weights, x, h, c):
    gates = weights["w_x"] @ x + weights["b_x"] + weights["w_h"] @ h + weights["b_h"]
    write, keep, new, read = gates.chunk(4)
    c = c / (1 + torch.exp(-keep)) + torch.tanh(new) / (1 + torch.exp(-write))
    return torch.tanh(c) / (1 + torch.exp(-read)), c


def slow_number(weights, h):
    return (weights["w_out"] * h).sum() + weights["b_out"][0]


def slow_return(reward, end, last, gamma, t):
    """The sum from step t to the first end, or to the last step and the bootstrap behind it."""
    total = 0
    for j in range(t, len(reward)):
        total = total + gamma ** (j - t) * reward[j]
        if end[j]:
            return total
    return total + gamma ** (len(reward) - t) * last


def slow_advantage(reward, value, died, bootstrap, args, i):
    """GAE of step i: all n-step returns to the lifetime's or the window's end, weighted by lambda^n, less V."""
    values, returns = [*value, bootstrap], []
    for j in range(i, len(reward)):
        paid = sum(args.gamma ** (k - i) * reward[k] for k in range(i, j + 1))
        returns.append(paid + (0 if died[j] else args.gamma ** (j + 1 - i) * values[j + 1]))
        if died[j]:
            break
    weights = [(1 - args.gae_lambda) * args.gae_lambda**n for n in range(len(returns) - 1)]
    weights.append(args.gae_lambda ** (len(returns) - 1))
    return sum(weight * x for weight, x in zip(weights, returns, strict=True)) - value[i]


def slow_objective(theta, base, obs, action, reward, over, last, args, steps):
    """What a policy ascends; `base`: the policy of the baseline and the bootstrap, which it does not move."""
    bootstrap, total = slow_policy(base, last)[1], 0
    for t in range(len(reward)):
        log_prob, value = slow_policy(theta, obs[t])
        back = slow_return(reward, over, bootstrap, args.inner_gamma, t)
        entropy = -sum(p.exp() * p for p in log_prob)
        total = total + log_prob[action[t]] * (back - slow_policy(base, obs[t])[1])
        total = total - (back - value) ** 2 / 2 + args.entropy_coef * entropy
    return total / steps


def slow_improve(theta, *rest):
    """theta' of one policy, as a function of theta and the rewards, and the gradient's norm."""
    moved = {name: torch.zeros_like(x).requires_grad_() for name, x in theta.items()}
    now = {name: x + moved[name] for name, x in theta.items()}
    objective, args = slow_objective(now, theta, *rest), rest[-2]
    gradient = torch.autograd.grad(objective, list(moved.values()), create_graph=True)
    norm = sum((x**2).sum() for x in gradient).sqrt()
    step = args.inner_lr * (args.inner_max_norm / norm if norm > args.inner_max_norm else 1)
    return {name: theta[name] + step * x for name, x in zip(theta, gradient, strict=True)}, norm


def slow_life(n, eta, phi, theta, memory, window, args):
    """What lifetime n and those that follow it in its place add: one record per step; norms; where everything ends."""
    theta = {name: x[n] for name, x in theta.items()}
    (h, c), (hv, cv) = ([x[0, n] for x in memory[key]] for key in ("eta", "phi"))
    record, norms = [], []
    for k, data in enumerate(window):
        rewards, dead = [], False
        for t in range(args.steps):
            log_prob = slow_policy(theta, data.obs[n, t])[0][data.action[n, t]]
            value = slow_number(phi, hv)
            (h, c), (hv, cv) = slow_cell(eta, data.x[n, t], h, c), slow_cell(phi, data.x[n, t], hv, cv)
            rewards.append(data.reward[n, t] + torch.tanh(slow_number(eta, h)))
            dead = bool(data.died[n, t])
            record.append((k * args.steps + t, log_prob, value, data.reward[n, t], dead))
            if dead:
                break
        if dead:
            theta = {name: x[n] for name, x in data.newborn.items()}
            h, c, hv, cv = (torch.zeros(args.hidden_size) for _ in range(4))
        else:
            rows = (x[n] for x in (data.obs, data.action))
            theta, norm = slow_improve(theta, *rows, rewards, data.over[n], data.obs_after[n], args, args.steps)
            norms.append(float(norm.detach()))
    return record, norms, theta, (h, c), (hv, cv), slow_number(phi, hv)


def slow_window(eta, phi, theta, memory, window, args, unit=None):
    """Both losses, advantages [N, S] (0 behind a lifetime's end), norms, policies and memories behind the window.

    unit: what the advantages of the meta-loss are divided by."""
    number, size = len(window[0].obs), args.steps * len(window)
    advantages, meta_loss, value_loss, norms, ends = torch.zeros(number, size), 0, 0, [], []
    for n in range(number):
        record, norm, *end = slow_life(n, eta, phi, theta, memory, window, args)
        places, log_probs, values, rewards, died = zip(*record, strict=True)
        known, bootstrap = [value.detach() for value in values], end.pop().detach()
        for i, place in enumerate(places):
            advantage = slow_advantage(rewards, known, died, bootstrap, args, i)
            value_loss = value_loss + (advantage + known[i] - values[i]) ** 2 / (number * size)
            meta_loss = meta_loss - advantage * log_probs[i] / (number * size) / (unit or 1)
            advantages[n, place] = advantage
        norms.append(norm)
        ends.append(end)
    return meta_loss, value_loss, advantages, norms, ends


def unit_of(advantage, raw):
    """What advantages in units of their standard deviation were divided by, from those that are not."""
    place = raw.abs().argmax()
    unit = raw.flatten()[place] / advantage.flatten()[place]
    close(torch.where(raw != 0, advantage * unit, 0.0), raw)
    assert float(advantage.std()) == pytest.approx(1, abs=1e-3)
    return float(unit)


# ---------------------------------------------------------------- the meta-gradient


def gradient(weights, loss):
    leaves = {name: x.clone().requires_grad_() for name, x in weights.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return dict(zip(weights, grads, strict=True))


def log_probs(eta, theta, window, memory, args):
    """[N, S]: the window's updates made once more, as functions of eta."""
    parts = []
    for data in window:
        log_prob, theta, memory = lives.learn_by_reward(eta, theta, memory, data, args)
        parts.append(log_prob)
    return torch.cat(parts, 1)


def meta_loss(eta, theta, window, memory, advantage, args):
    """What eta descends; advantages count until their lifetime's end."""
    mask = torch.cat([data.mask for data in window], 1)
    return -(mask * advantage * log_probs(eta, theta, window, memory, args)).mean()


@pytest.mark.parametrize("max_norm", [3.0, 3.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_meta_gradient_against_one_lifetime_after_the_other(seed, max_norm):
    """Loss and gradient through three updates, some shortened and some not, past ends of episodes and lifetimes."""
    args = replace(ARGS, inner_max_norm=max_norm)
    eta, phi, theta, memory, window = example(seed)
    advantage = torch.randn(N, T * U, generator=seeded(9))
    loss = lambda eta: meta_loss(eta, theta, window, memory["eta"], advantage, args)  # noqa: E731

    def slow_loss(eta):
        total = 0
        for n in range(N):
            for place, log_prob, *_ in slow_life(n, eta, phi, theta, memory, window, args)[0]:
                total = total - advantage[n, place] * log_prob / (N * T * U)
        return total

    close(loss(eta), slow_loss(eta))
    expected, norms = gradient(eta, slow_loss), slow_window(eta, phi, theta, memory, window, args)[3]
    norms = [norm for life in norms for norm in life]
    assert sum(norm > args.inner_max_norm for norm in norms) >= 4, norms
    assert sum(norm < args.inner_max_norm for norm in norms) >= 4, norms
    assert all(x.abs().max() > 1e-4 for x in expected.values())
    for name, x in gradient(eta, loss).items():
        close(x, expected[name])


def test_the_meta_gradient_against_central_differences():
    """In 40 directions, in each of eta's tensors; data, births and advantages are fixed."""
    eta, phi, theta, memory, window = example(2)
    _, advantage, _ = lives.value_loss(phi, window, memory["phi"], ARGS)
    loss = lambda eta: meta_loss(eta, theta, window, memory["eta"], advantage, ARGS)  # noqa: E731
    slope, generator, step = gradient(eta, loss), seeded(3), 1e-5
    for i in range(40):
        name = list(eta)[i % len(eta)]
        towards = torch.randn(eta[name].shape, generator=generator)
        ends = [float(loss(eta | {name: eta[name] + sign * step * towards})) for sign in (1, -1)]
        found = float((slope[name] * towards).sum())
        assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-9)
        assert abs(found) > 1e-6


def test_the_first_trajectory_of_a_policy_owes_the_reward_nothing():
    """Nor does what a newborn does first: only the log-probabilities of later trajectories depend on eta."""
    eta, _, theta, memory, window = example()
    places = (slice(None), slice(T)), (4, slice(T, 2 * T)), (4, slice(2 * T, 9))
    for place, depends in zip(places, (False, False, True), strict=True):
        advantage = torch.zeros(N, T * U)
        advantage[place] = 1
        slope = flat(gradient(eta, lambda eta: meta_loss(eta, theta, window, memory["eta"], advantage, ARGS)))  # noqa: B023
        assert bool(slope.abs().max() > 1e-6) == depends


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_of_adam_on_both_networks(seed):
    """`meta_step` against Adam's first step on the slow gradients: eta ascends the gain, phi descends the error."""
    eta, phi, theta, memory, window = example(seed)
    before = copy.deepcopy((eta, phi, theta, memory))
    _, advantage, _ = lives.value_loss(phi, window, memory["phi"], ARGS)
    unit = unit_of(advantage, slow_window(eta, phi, theta, memory, window, ARGS)[2])
    slow = lambda eta, phi: slow_window(eta, phi, theta, before[3], window, ARGS, unit)  # noqa: E731
    gradients = [*gradient(eta, lambda eta: slow(eta, phi)[0]).values()]
    gradients += gradient(phi, lambda phi: slow(eta, phi)[1]).values()
    _, expected_loss, _, _, ends = slow(eta, phi)
    leaves = [x.requires_grad_() for x in (*eta.values(), *phi.values())]
    made = log_probs(eta, theta, window, memory["eta"], ARGS)
    stats, after = lives.meta_step(torch.optim.Adam(leaves, 0.01), phi, memory["phi"], window, made, ARGS)
    old = [*before[0].values(), *before[1].values()]
    for now, x, slope in zip(leaves, old, gradients, strict=True):
        close(now.detach(), x - 0.01 * slope / (slope.abs() + 1e-8), 1e-7)
    assert all(torch.equal(x, y) for x, y in zip(theta.values(), before[2].values(), strict=True))
    assert all(torch.equal(memory[key][i], before[3][key][i]) for key in memory for i in (0, 1))
    for i in (0, 1):
        close(after[i][0], torch.stack([end[2][i] for end in ends]))
        assert not after[i].requires_grad
    stats = summarise(stats)
    assert stats["train/value_loss"] == pytest.approx(float(expected_loss.detach()))
    lived = [(n, data, t) for n in range(N) for data in window for t in range(T) if not data.died[n, :t].any()]
    earned, episodes = (sum(float(data[i][n, t]) for n, data, t in lived) for i in (3, 4))
    assert stats["train/return_post"] == pytest.approx(earned / episodes)


# ---------------------------------------------------------------- returns, values


def test_returns_against_their_definition():
    generator = seeded(0)
    reward, end = torch.randn(5, 7, generator=generator), (torch.rand(5, 7, generator=generator) < 0.15).double()
    last = torch.randn(5, generator=generator)
    assert end[:, :-1].any()
    assert not end.any(1).all()
    expected = [[slow_return(reward[n], end[n], last[n], 0.7, t) for t in range(7)] for n in range(5)]
    close(lives.bootstrapped_returns(reward, end, last, 0.7), torch.tensor(expected))


@pytest.mark.parametrize("flags", [{}, {"gae_lambda": 1.0}, {"gae_lambda": 0.0}, {"gamma": 1.0}])
def test_advantages_and_the_loss_of_values_against_their_definitions(flags):
    """Through the ends of episodes, not through those of lifetimes; bootstrapped behind the window."""
    args = replace(ARGS, **flags)
    eta, phi, theta, memory, window = example()
    _, expected_loss, expected, _, ends = slow_window(eta, phi, theta, memory, window, args)
    loss, advantage, after = lives.value_loss(phi, window, memory["phi"], args)
    close(loss, expected_loss)
    unit_of(advantage, expected)
    for i in (0, 1):
        close(after[i][0], torch.stack([end[2][i] for end in ends]))


@pytest.mark.parametrize(("n", "reaches_back"), [(0, True), (1, True), (2, False)])
def test_the_lifetime_return_goes_on_where_an_episode_ends_and_stops_with_the_lifetime(n, reaches_back):
    """Lifetime 1's episode and lifetime 2 end before the third trajectory: do its rewards reach the first step? In
    units of lifetime 4's advantage, which they do not concern."""
    _, phi, _, memory, window = example()
    assert window[0].over[1].any()
    assert window[1].died[2].any()
    richer = list(window)
    richer[2] = window[2]._replace(reward=window[2].reward + 10.0 * (torch.arange(N) == n)[:, None])
    advantages = [lives.value_loss(phi, each, memory["phi"], ARGS)[1][:, 0] for each in (window, richer)]
    before, after = (x[n] / x[4] for x in advantages)
    assert (float(after) != pytest.approx(float(before), rel=1e-9)) == reaches_back


def test_advantages_are_in_units_of_their_standard_deviation():
    _, phi, _, memory, window = example()
    _, advantage, _ = lives.value_loss(phi, window, memory["phi"], ARGS)
    assert float(advantage.std()) == pytest.approx(1, abs=1e-5)
    assert not advantage.requires_grad
    still = {name: 0 * x for name, x in phi.items()}
    calm = [data._replace(reward=0 * data.reward) for data in window]
    assert not lives.value_loss(still, calm, memory["phi"], ARGS)[1].any()  # and no division by zero


def test_what_lies_behind_an_end_of_a_lifetime_has_no_influence():
    eta, phi, theta, memory, window = example()
    other = []
    for data in window:
        new = {}
        for name in ("obs", "x", "reward", "over"):
            x = getattr(data, name)
            behind = (1 - data.mask).view(N, T, *[1] * (x.ndim - 2))
            new[name] = torch.where(behind > 0, 1 - x if name == "over" else x + 7, x)
        new["action"] = torch.where(data.mask > 0, data.action, (data.action + 1) % A)
        other.append(data._replace(**new))
    assert any((data.mask == 0).any() for data in window)

    def everything(window):
        loss, advantage, after = lives.value_loss(phi, window, memory["phi"], ARGS)
        slope = gradient(eta, lambda eta: meta_loss(eta, theta, window, memory["eta"], advantage, ARGS))
        return torch.cat([loss[None], advantage.flatten(), *[x.flatten() for x in after], flat(slope)])

    assert torch.equal(everything(window), everything(other))


@pytest.mark.parametrize("t", range(T))
def test_rewards_and_values_know_the_past_only(t):
    """r_eta of a step sees the step's own outcome; V, which judges the step, does not: numbers [N, T + 1] around it."""
    eta, phi, _, memory, window = example()
    data = window[0]
    later = (torch.arange(T) >= t).double()
    other = data._replace(x=data.x + later[:, None])
    for weights, key in ((eta, "eta"), (phi, "phi")):
        before, after = (lives.read_history(weights, each, memory[key])[0] for each in (data, other))
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert ((before - after)[:, t + 1 :].abs() > 1e-9).all()
    rewards = [lives.learned_reward(eta, each, memory["eta"])[0] for each in (data, other)]
    assert torch.equal(rewards[0][:, :t], rewards[1][:, :t])
    assert (rewards[0] != rewards[1])[:, t:].all()


def test_the_bootstrap_is_no_target_to_move():
    """V behind the window has no gradient: with all other steps masked, only V before the last step moves phi."""
    _, phi, _, memory, window = example()
    window = [data._replace(mask=torch.zeros(N, T), died=torch.zeros(N, T)) for data in window]
    window[-1].mask[:, -1] = 1
    last = (
        window[-1].reward[:, -1]
        + ARGS.gamma
        * lives.read_history(
            phi,
            Trajectory(*(torch.cat([data[i] for data in window], 1) for i in range(7)), None, None, {}),
            memory["phi"],
        )[0][:, -1]
    )

    def slow_loss(phi):
        number, memory_now = None, memory["phi"]
        for data in window:
            number, memory_now = lives.read_history(phi, data, memory_now)
        return (last - number[:, -2]).square().sum() / (N * T * U)

    expected = gradient(phi, slow_loss)
    for name, x in gradient(phi, lambda phi: lives.value_loss(phi, window, memory["phi"], ARGS)[0]).items():
        close(x, expected[name])


# ---------------------------------------------------------------- the networks


def test_the_memory_is_torchs_lstm():
    eta, _, _, memory, window = example()
    module = torch.nn.LSTM(2 * O + 2, ARGS.hidden_size, batch_first=True)
    names = {"weight_ih_l0": "w_x", "weight_hh_l0": "w_h", "bias_ih_l0": "b_x", "bias_hh_l0": "b_h"}
    module.load_state_dict({theirs: eta[ours] for theirs, ours in names.items()})
    for data in window:
        feature, after = module(data.x, tuple(memory["eta"]))
        number, kept = lives.read_history(eta, data, memory["eta"])
        close(number[:, 0], memory["eta"][0][0] @ eta["w_out"] + eta["b_out"])
        close(number[:, 1:], feature @ eta["w_out"] + eta["b_out"])
        dead = data.died.any(1)
        for x, expected in zip(kept, after, strict=True):
            close(x[:, ~dead], expected[:, ~dead])
            assert not x[:, dead].any()
        reward, _ = lives.learned_reward(eta, data, memory["eta"])
        close(reward - data.reward, torch.tanh(feature @ eta["w_out"] + eta["b_out"]))


def test_networks_at_birth():
    args = replace(ARGS, policy_size=300, hidden_size=40)
    theta, weights = lives.init_policies(SPACES, args, seeded(0)), lives.init_history(SPACES, args, seeded(0))
    assert {name: tuple(x.shape) for name, x in theta.items()} == {
        "w0": (N, O, 300), "b0": (N, 300), "w1": (N, 300, A + 1), "b1": (N, A + 1)
    }  # fmt: skip
    bound = math.sqrt(6 / (O + 300))
    assert 0.99 * bound < theta["w0"].max() <= bound
    assert -bound <= theta["w0"].min() < -0.99 * bound
    assert float(theta["w0"].mean()) == pytest.approx(0, abs=0.05 * bound)
    assert float(theta["w1"].std()) == pytest.approx(0.01, rel=0.05)
    assert len({float(x) for x in theta["w1"][:, 0, 0]}) == N  # no twins
    assert not any(x.any() for x in (theta["b0"], theta["b1"], weights["b_x"], weights["b_h"], weights["b_out"]))
    for gate in (*weights["w_x"].chunk(4), *weights["w_h"].chunk(4)):
        close(gate.T @ gate, torch.eye(gate.shape[1]), 1e-9)
    assert len({float(gate[0, 0]) for gate in weights["w_h"].chunk(4)}) == 4
    assert float(weights["w_out"].std()) == pytest.approx(0.01, rel=0.3)


def test_policies_against_one_after_the_other():
    _, _, theta, _, window = example()
    log_prob, value = lives.policies(theta, window[0].obs)
    for n in range(N):
        for t in range(T):
            expected = slow_policy({name: x[n] for name, x in theta.items()}, window[0].obs[n, t])
            close(log_prob[n, t], expected[0])
            close(value[n, t], expected[1])


# ---------------------------------------------------------------- a step of the policies


def rows_of(data, n, reward):
    return data.obs[n], data.action[n], reward[n], data.over[n], data.obs_after[n]


def test_the_update_against_one_optimizer_per_policy():
    """torch.optim.SGD with clip_grad_norm_ on the written-out loss; newborn policies in place of the dead."""
    _, _, theta, _, window = example()
    lengths = []
    for data in window:
        reward = data.reward + 0.1
        stepped, _ = lives.update_policies(theta, data, reward, ARGS)
        for n in range(N):
            own, base = ({name: x[n].clone() for name, x in theta.items()} for _ in range(2))
            if data.died[n].any():
                assert all(torch.equal(stepped[name][n], data.newborn[name][n]) for name in own)
                continue
            parameters = [x.requires_grad_() for x in own.values()]
            optimizer = torch.optim.SGD(parameters, ARGS.inner_lr)
            (-slow_objective(own, base, *rows_of(data, n, reward), ARGS, T)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, ARGS.inner_max_norm)
            optimizer.step()
            for name, x in own.items():
                close(stepped[name][n], x.detach(), 1e-5)  # clip_grad_norm_ adds 1e-6 to the norm
            lengths.append(float(flat({name: stepped[name][n] - theta[name][n] for name in own}).norm()))
    limit = ARGS.inner_lr * ARGS.inner_max_norm
    assert max(lengths) <= limit * (1 + 1e-9)
    assert sum(length > limit * (1 - 1e-6) for length in lengths) >= 3
    assert sum(length < 0.9 * limit for length in lengths) >= 3


def test_policies_learn_from_their_own_lifetimes_only():
    _, _, theta, _, window = example()
    data, n = window[1], 1
    one = (torch.arange(N) == n).double()
    other = data._replace(obs=data.obs + one[:, None, None], obs_after=data.obs_after + one[:, None])
    before, after = (lives.update_policies(theta, each, each.reward, ARGS)[0] for each in (data, other))
    for name, x in before.items():
        assert torch.equal(x[one == 0], after[name][one == 0])
        assert not torch.equal(x[n], after[name][n])


def test_the_return_of_the_learned_reward_stops_with_the_episode():
    """Lifetime 1's episode ends in step 1 of the first trajectory: later rewards do not reach back, in 0 they do."""
    _, _, theta, _, window = example()
    data = window[0]
    early = data._replace(mask=(torch.arange(T) < 2).double().expand(N, T))  # judge the first two steps alone
    late = 5.0 * (torch.arange(T) >= 2)
    before, after = (lives.update_policies(theta, early, data.reward + more, ARGS)[0] for more in (0, late))
    assert all(torch.equal(x[1], after[name][1]) for name, x in before.items())
    assert not torch.equal(before["w1"][0], after["w1"][0])


def test_entropy_is_sought_and_good_actions_become_likelier():
    args = replace(ARGS, entropy_coef=0.0, inner_lr=0.05)
    _, _, theta, _, window = example()
    data = window[0]._replace(reward=torch.zeros(N, T), died=torch.zeros(N, T), newborn={})

    def entropy(theta):
        log_prob = lives.policies(theta, data.obs)[0]
        return -(log_prob.exp() * log_prob).sum(-1).mean(1)

    less, more = (
        lives.update_policies(theta, data, data.reward, replace(args, entropy_coef=c))[0] for c in (0.0, 10.0)
    )
    assert (entropy(more) > entropy(less)).all()
    assert (entropy(more) > entropy(theta)).all()
    paid = (data.action == 1).double()
    data = data._replace(over=torch.ones(N, T))  # each step its own episode: no noise from returns
    indifferent = {name: x.clone() for name, x in theta.items()}
    indifferent["w1"][..., -1] = 0
    indifferent["b1"][..., -1] = 0.5  # half of them are paid
    stepped, _ = lives.update_policies(indifferent, data, paid, args)
    likelier = lives.policies(stepped, data.obs)[0][..., 1].mean(1) > lives.policies(indifferent, data.obs)[0][
        ..., 1
    ].mean(1)
    assert likelier[(paid.sum(1) > 0) & (paid.sum(1) < T)].all()


# ---------------------------------------------------------------- worlds


class SlowABC:
    """One ABC world in plain Python: 5 x 5 cells, objects in three corners."""

    def __init__(self, worths, horizon, episodes, episode=0):
        self.worths, self.horizon, self.episodes, self.episode = worths, horizon, episodes, episode
        self.restart()

    def restart(self):
        self.row, self.column, self.step_number = 2, 2, 0

    def obs(self):
        return torch.tensor(
            [float((row, column) == (self.row, self.column)) for row in range(5) for column in range(5)]
        )

    def step(self, action):
        """What the step led to: observation, reward, episode's end; its episode; whether the lifetime ended."""
        self.row = min(max(self.row + (-1, 1, 0, 0)[action], 0), 4)
        self.column = min(max(self.column + (0, 0, -1, 1)[action], 0), 4)
        self.step_number += 1
        worth = dict(zip([(0, 4), (4, 0), (4, 4)], self.worths, strict=True)).get((self.row, self.column))
        over = worth is not None or self.step_number == self.horizon
        obs, episode = self.obs(), self.episode
        died = over and episode == self.episodes - 1
        if over:
            self.restart()
            self.episode = 0 if died else episode + 1
        return obs, float(worth or 0), over, episode, died


def worlds(number, args, tasks, **options):
    """Lifetimes in SymABC, and in a list the tasks that it gives to the newborn."""
    family = SymABC(number, args.horizon, dtype=torch.float64)
    envs, drawn, draw = Lifetimes(family, args.episodes_per_lifetime), [], family.sample_tasks
    obs, _ = envs.reset(seed=0, options={"tasks": tasks} | options)

    def recorded(number, generator, split="train"):
        drawn.append(draw(number, generator, split))
        return drawn[-1]

    family.sample_tasks = recorded
    return envs, obs, drawn


def lively(envs, args, generator):
    """Policies that walk to the corners, each in its own way."""
    theta = lives.init_policies(envs, args, generator)
    theta["b1"] = theta["b1"] + 1.5 * torch.randn(theta["b1"].shape, generator=generator)
    return theta


def test_play_against_single_worlds():
    """Actions, outcomes, ends, masks and births of 12 lifetimes of all ages, through several ends of each."""
    number, args = 12, replace(ARGS, meta_batch_size=12, steps=7, episodes_per_lifetime=2)
    age = torch.arange(number) % 2
    tasks = 2 * torch.rand(number, 3, generator=seeded(1)) - 1
    envs, obs, drawn = worlds(number, args, tasks, episode=age)
    theta, mine, theirs = lively(envs, args, seeded(2)), seeded(3), seeded(3)
    single = [SlowABC(task.tolist(), 6, 2, int(k)) for task, k in zip(tasks, age, strict=True)]
    deaths = ends = unmasked = twice = 0
    for _ in range(8):
        data = lives.play(envs, obs, theta, args, theirs)
        births = iter(drawn)
        uniform, alive = torch.rand(7, number, 4, generator=mine), [True] * number
        for t in range(7):
            born = []
            for n, world in enumerate(single):
                own = {name: x[n] for name, x in theta.items()}
                close(data.obs[n, t], world.obs())
                scores = slow_policy(own, world.obs())[0] - torch.log(-torch.log(uniform[t, n]))
                assert data.action[n, t] == scores.argmax()
                next_obs, reward, over, number_now, died = world.step(int(data.action[n, t]))
                outcome = torch.tensor([reward, float(over)])
                close(data.x[n, t], torch.cat([data.obs[n, t], next_obs, outcome]), 1e-6)
                close(float(data.reward[n, t]), reward, 1e-6)
                assert (data.over[n, t], data.mask[n, t]) == (over, alive[n])
                assert data.died[n, t] == (died and alive[n])
                assert data.episode[n, t] == number_now
                twice += died and not alive[n]
                alive[n] = alive[n] and not died
                born += [n] if died else []
                ends += over
                unmasked += alive[n]
            if born:
                fresh = next(births)
                for n in born:
                    single[n].worths = fresh[n].tolist()
        close(data.obs_after, torch.stack([world.obs() for world in single]))
        assert next(births, None) is None
        assert bool(data.newborn) == (not all(alive))
        if data.newborn:
            expected = lives.init_policies(envs, args, mine)
            assert all(torch.equal(x, data.newborn[name]) for name, x in expected.items())
        deaths += alive.count(False)
        drawn.clear()
        obs = data.obs_after
    assert torch.equal(mine.get_state(), theirs.get_state())
    assert deaths > 20
    assert ends > deaths
    assert unmasked < 8 * 7 * number


def test_a_second_death_within_a_trajectory_does_not_count():
    """Lifetimes of one step: whoever is born in a trajectory waits for the next one."""
    args = replace(ARGS, steps=5, episodes_per_lifetime=1, horizon=1)
    envs, obs, _ = worlds(N, args, torch.zeros(N, 3))
    data = lives.play(envs, obs, lively(envs, args, seeded(0)), args, seeded(1))
    first = torch.tensor([1.0, 0, 0, 0, 0]).expand(N, 5)
    assert torch.equal(data.mask, first)
    assert torch.equal(data.died, first)
    assert data.over.all()


def test_actions_are_drawn_from_the_policies():
    number, args = 6000, replace(ARGS, steps=2)
    envs, obs, _ = worlds(number, args, torch.zeros(number, 3))
    theta = {name: x[:1].expand(number, *x.shape[1:]) for name, x in lively(envs, args, seeded(3)).items()}
    data = lives.play(envs, obs, theta, args, seeded(4))
    share = slow_policy({name: x[0] for name, x in theta.items()}, obs[0])[0].exp()
    assert 0.02 < share.min() < share.max() < 0.8
    count = torch.bincount(data.action[:, 0], minlength=4)
    assert ((count - number * share) ** 2 / (number * share)).sum() < 16.3  # 0.1 % of chi-square, 3 degrees of freedom
    again = data.action[data.action[:, 0] == 0]  # who bumped into nothing stands one cell higher
    share = slow_policy({name: x[0] for name, x in theta.items()}, data.obs[data.action[:, 0] == 0][0, 1])[0].exp()
    expected = len(again) * share
    assert ((torch.bincount(again[:, 1], minlength=4) - expected) ** 2 / expected).sum() < 16.3


def test_nobody_sees_the_hidden_task():
    """Two goals, the same actions: policies and networks see the same until a reward or an end differs."""
    number, args = 40, replace(ARGS, meta_batch_size=40, steps=60, episodes_per_lifetime=5, horizon=30)
    eta, phi, theta, memory = None, None, None, None
    runs = []
    for goal in ((2.0, 3.0), (8.0, 8.0)):
        envs = Lifetimes(EmptyRooms(number, 30, dtype=torch.float64), 5)
        obs, _ = envs.reset(seed=0, options={"tasks": torch.tensor([goal]).expand(number, 2)})
        if eta is None:
            eta, phi, theta, memory = init_weights(envs, args, seeded(0), number)
        data = lives.play(envs, obs, theta, args, seeded(1))
        reward, value = (
            lives.learned_reward(eta, data, memory["eta"])[0],
            lives.read_history(phi, data, memory["phi"])[0],
        )
        runs.append((data, reward, value))
    (near, *_), (far, *_) = runs
    differs = (near.reward != far.reward) | (near.over != far.over)
    first = [int(row.nonzero()[0]) if row.any() else args.steps for row in differs]
    assert sum(0 < t < args.steps for t in first) > 10
    assert near.obs.shape[-1] == 121
    assert near.x.shape[-1] == 244
    for n, t in enumerate(first):
        for before in ("obs", "action"):  # of the step itself, too: it is the outcome that differs
            assert torch.equal(getattr(near, before)[n, : t + 1], getattr(far, before)[n, : t + 1])
        assert torch.equal(near.x[n, :t], far.x[n, :t])
        assert torch.equal(runs[0][1][n, :t], runs[1][1][n, :t])
        assert torch.equal(runs[0][2][n, : t + 1], runs[1][2][n, : t + 1])
        if t < args.steps:
            assert runs[0][1][n, t] != runs[1][1][n, t]


def test_rewards_and_values_read_nothing_else():
    eta, phi, _, memory, window = example()
    bare = [
        data._replace(obs=None, action=None, episode=None, obs_after=None, newborn=None, over=None, mask=None)
        for data in window
    ]
    for data, other in zip(window, bare, strict=True):
        assert torch.equal(*(lives.learned_reward(eta, each, memory["eta"])[0] for each in (data, other)))
        assert torch.equal(*(lives.read_history(phi, each, memory["phi"])[0] for each in (data, other)))


# ---------------------------------------------------------------- whole lifetimes


def slow_whole_lifetimes(tasks, eta, args, generator):
    """Returns [N, E], one world after the other; the noise is drawn as `play` draws it."""
    number, returns = len(tasks), torch.zeros(len(tasks), args.episodes_per_lifetime)
    torch.randint(2**31, (1,), generator=generator)
    envs = SimpleNamespace(**vars(SPACES) | {"num_envs": number, "single_observation_space": Box(0, 1, (25,))})
    envs.single_action_space = Discrete(4)
    born = lives.init_policies(envs, args, generator)
    thetas = [{name: x[n] for name, x in born.items()} for n in range(number)]
    single = [SlowABC(task.tolist(), args.horizon, args.episodes_per_lifetime) for task in tasks]
    memory, alive = [[torch.zeros(args.hidden_size)] * 2 for _ in range(number)], [True] * number
    while any(alive):
        gumbel = -torch.log(-torch.log(torch.rand(args.steps, number, 4, generator=generator)))
        anybody = False
        for n in [n for n in range(number) if alive[n]]:
            obs, action, rewards, ends = [], [], [], []
            for t in range(args.steps):
                obs.append(single[n].obs())
                action.append(int((slow_policy(thetas[n], obs[-1])[0] + gumbel[t, n]).argmax()))
                next_obs, reward, over, episode, died = single[n].step(action[-1])
                returns[n, episode] += reward
                x = torch.cat([obs[-1], next_obs, torch.tensor([reward, float(over)])])
                memory[n] = slow_cell(eta, x, *memory[n]) if eta else memory[n]
                rewards.append(reward + (torch.tanh(slow_number(eta, memory[n][0])) if eta else torch.tensor(0.0)))
                ends.append(over)
                if died:
                    alive[n], anybody = False, True
                    break
            if alive[n]:
                rest = obs, action, rewards, ends, single[n].obs(), args, args.steps
                thetas[n] = {name: x.detach() for name, x in slow_improve(thetas[n], *rest)[0].items()}
        if anybody:
            lives.init_policies(envs, args, generator)
    return returns


@pytest.mark.parametrize("by", ["the learned reward", "the extrinsic reward"])
def test_whole_lifetimes_against_single_worlds(by, monkeypatch):
    """Half of the newborn walk to C, so that they die early: what is earned after that is not theirs."""
    born = lives.init_policies

    def hasty(*rest):
        theta = born(*rest)
        theta["b1"][::2, 1:4:2] += 3.0  # down and right
        return theta

    monkeypatch.setattr(lives, "init_policies", hasty)
    args = replace(ARGS, meta_batch_size=8, steps=5, inner_lr=2.0, horizon=8)
    tasks = 2 * torch.rand(8, 3, generator=seeded(1)) - 1
    envs, _, _ = worlds(8, args, tasks)
    eta = noisy(lives.init_history(envs, args, seeded(4)), seeded(5)) if by == "the learned reward" else None
    expected = slow_whole_lifetimes(tasks, eta, args, seeded(6))
    assert (expected != 0).sum() > 10
    assert not expected[1::2, :2].all()
    close(lives.whole_lifetimes(envs, tasks, eta, args, seeded(6)), expected, 1e-6)


def test_the_arms_of_an_evaluation_start_equal_and_tasks_are_held_out(monkeypatch):
    args = replace(ARGS, meta_batch_size=20, episodes_per_lifetime=13)
    envs, _, _ = worlds(20, args, torch.zeros(20, 3))
    eta = noisy(lives.init_history(envs, args, seeded(0)), seeded(1))
    starts, play, splits, draw = [], lives.whole_lifetimes, [], envs.unwrapped.sample_tasks

    def recorded(envs, tasks, eta, args, generator):
        starts.append((tasks, generator.get_state(), eta))
        return play(envs, tasks, eta, args, generator)

    def drawn(number, generator, split="train"):
        splits.append(split)
        return draw(number, generator, split)

    monkeypatch.setattr(lives, "whole_lifetimes", recorded)
    envs.unwrapped.sample_tasks = drawn
    stats = summarise(lives.evaluate(envs, eta, args))
    (extrinsic, learned) = starts
    assert torch.equal(extrinsic[0], learned[0])
    assert torch.equal(extrinsic[1], learned[1])
    assert extrinsic[2] is None
    assert learned[2] is eta
    assert splits.count("test") == 1  # the test set is drawn once, and births draw training tasks
    assert torch.equal(learned[0], SymABC(20, args.horizon, dtype=torch.float64).test_set(20)[0])
    cells = ((learned[0][:, 0] + 1) / 2 * 50).floor().long() % 5
    assert (cells == 2).all()
    assert {name for name in stats if name.startswith("test/")} == {
        *(f"test/return_k{k}" for k in range(10)), "test/return_lifetime", "test/gain_ci95", "test/tasks"
    }  # fmt: skip
    assert summarise(lives.evaluate(envs, eta, args)) == stats
    assert summarise(lives.evaluate(envs, eta, replace(args, seed=2))) == stats  # tasks, births and noise of every run
    assert [stats[f"test/return_k{k}"] for k in range(10)] != [stats[f"extrinsic/return_k{k}"] for k in range(10)]
    monkeypatch.undo()
    envs.unwrapped.sample_tasks = draw
    silent = eta | {name: 0 * eta[name] for name in ("w_out", "b_out")}  # r_eta = r, so that nothing differs
    stats = summarise(lives.evaluate(envs, silent, args))
    for k in (*range(10), "lifetime"):
        name = f"return_{'k' * (k != 'lifetime')}{k}"
        assert stats[f"test/{name}"] == stats[f"extrinsic/{name}"]


@pytest.mark.parametrize("episodes", [4, 23])
def test_what_an_evaluation_reports(monkeypatch, episodes):
    args = replace(ARGS, episodes_per_lifetime=episodes)
    envs, _, _ = worlds(N, args, torch.zeros(N, 3))
    returns = {name: torch.randn(N, episodes, generator=seeded(i)) for i, name in enumerate(("extrinsic", "test"))}
    tasks = torch.tensor([0.0, 1, 0, 2, 1, 0])[:, None].expand(N, 3)  # some are played again
    envs.unwrapped.test_set = lambda number: (tasks[:number], seeded(0))
    monkeypatch.setattr(lives, "whole_lifetimes", lambda envs, tasks, eta, *_: returns["test" if eta else "extrinsic"])
    stats = summarise(lives.evaluate(envs, {"eta": 1}, args))
    sizes = [1] * 4 if episodes == 4 else [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    for arm, table in returns.items():
        start = 0
        for k, size in enumerate(sizes):
            assert stats[f"{arm}/return_k{k}"] == pytest.approx(float(table[:, start : start + size].mean()))
            start += size
        assert stats[f"{arm}/return_lifetime"] == pytest.approx(float(table.mean()))
    gain = returns["test"][:, -sizes[-1] :].mean(1) - returns["test"][:, : sizes[0]].mean(1)
    assert stats["test/gain_ci95"] == pytest.approx(interval(gain, tasks), rel=1e-4)
    assert stats["test/tasks"] == 3
    assert len(stats) == 2 * len(sizes) + 4


# ---------------------------------------------------------------- windows


def test_the_gradient_over_a_whole_lifetime_is_not_truncated():
    """A window as long as whole lifetimes from birth on: the meta-gradient is that of the full-lifetime objective, in
    which policies follow from birth by all their updates and returns are sums of all rewards to the lifetime's end."""
    args = replace(ARGS, steps=3, unroll=5, episodes_per_lifetime=2, inner_lr=1.5, gae_lambda=1.0)
    envs, obs, _ = worlds(N, args, 2 * torch.rand(N, 3, generator=seeded(1)) - 1)
    eta, phi, _, _ = init_weights(envs, args, seeded(2), N)
    start = theta = lively(envs, args, seeded(3))
    nothing = 2 * [torch.zeros(1, N, args.hidden_size)]
    window, memory, generator = [], nothing, seeded(4)
    with torch.no_grad():
        for _ in range(args.unroll):
            data = lives.play(envs, obs, theta, args, generator)
            reward, memory = lives.learned_reward(eta, data, memory)
            theta, obs = lives.update_policies(theta, data, reward, args)[0], data.obs_after
            window.append(data)
    _, advantage, _ = lives.value_loss(phi, window, nothing, args)
    deaths = torch.cat([data.died for data in window], 1)
    assert deaths.any(1).all()
    expected = torch.zeros(N, 15)

    def full(eta):
        """Each lifetime from birth to its end, which is 8 to 12 steps later, and not a step further."""
        total = 0
        for n in range(N):
            record = slow_life(n, eta, phi, start, {"eta": nothing, "phi": nothing}, window, args)[0]
            length = 1 + next(i for i, step in enumerate(record) if step[4])
            for i, (place, log_prob, value, *_) in enumerate(record[:length]):
                value = value.detach()
                earned = sum(args.gamma ** (j - i) * record[j][3] for j in range(i, length))
                expected[n, place] = earned - value
                total = total + (earned - value) * log_prob
        return total / (N * 15)

    slope = gradient(eta, full)
    own = expected != 0
    unit = unit_of(advantage, expected)
    only = torch.where(own, advantage, 0.0)  # the lifetimes that began in the window's midst belong to others
    found = gradient(eta, lambda eta: meta_loss(eta, start, window, nothing, only, args))
    assert flat(slope).abs().max() > 1e-4
    close(-unit * flat(found), flat(slope))


def copied(params):
    return {name: x.detach().clone() for name, x in params.items()}


class Spy:
    """Keeps what every window starts from and leads to: what `learn_by_reward` and `meta_step` are given."""

    def __init__(self, monkeypatch):
        self.calls, self.start = [], None
        self.learn_by_reward, self.meta_step = lives.learn_by_reward, lives.meta_step
        monkeypatch.setattr(lives, "learn_by_reward", self.learned)
        monkeypatch.setattr(lives, "meta_step", self.stepped)

    def learned(self, eta, theta, memory, *rest):
        if self.start is None:  # a window's first trajectory
            assert not any(x.requires_grad for x in (*theta.values(), *memory))  # the window before is given
            self.start = eta, copied(eta), copied(theta), [x.clone() for x in memory]
        return self.learn_by_reward(eta, theta, memory, *rest)

    def stepped(self, optimizer, phi, memory, window, *rest):
        eta, old_eta, theta, eta_memory = self.start
        given = old_eta, copied(phi), theta, {"eta": eta_memory, "phi": [x.clone() for x in memory]}
        rates = [group["lr"] for group in optimizer.param_groups]
        result = self.meta_step(optimizer, phi, memory, window, *rest)
        self.calls.append((*given, list(window), rates, (copied(eta), copied(phi))))
        self.start = None
        return result


def test_windows_are_connected_and_adam_follows_the_gradients(monkeypatch):
    """Policies, memories and observations at a window's start are those at the end of the one before; nothing is lost
    or forgotten between them; eta and phi are those of torch's Adam with a step size that falls linearly to 0."""
    number = 5
    args = replace(
        ARGS, meta_batch_size=number, episodes_per_lifetime=2, horizon=6, steps=3, unroll=2, iterations=9, eval_every=4,
        lr=0.05, value_lr=0.02,
    )  # fmt: skip
    envs, test_envs = (
        Lifetimes(SymABC(number, args.horizon, dtype=torch.float64), args.episodes_per_lifetime) for _ in "ab"
    )
    state = lives.init_lifetimes(envs, args, generator := seeded(0))
    start = copy.deepcopy(state)
    state |= {"iteration": 0, "env_steps": 0, "generator": generator.get_state()}
    spy, recorder = Spy(monkeypatch), Recorder(args)
    lives.train(envs, test_envs, args, recorder, state)
    assert len(spy.calls) == 9
    assert [(row[0], row[1]) for row in recorder.logged] == [(k, k * 2 * 3 * number) for k in range(1, 10)]
    assert [row[0] for row in recorder.logged if "test/return_k0" in row[2]] == [1, 4, 8, 9]
    assert recorder.saved == [4, 8, 9]
    policies, memory, weights = start["theta"], start["memory"], (start["eta"], start["phi"])
    theirs = [[x.clone() for x in part.values()] for part in weights]
    adam = [torch.optim.Adam(part) for part in theirs]
    born, last = 0, envs.load_worlds(start["worlds"])
    for k, (eta, phi, given_theta, given_memory, window, lr, after) in enumerate(spy.calls):
        for name, x in policies.items():
            close(given_theta[name], x, 1e-12)
        for key, old in memory.items():
            close(torch.stack(given_memory[key]), torch.stack(old), 1e-12)
        assert lr == pytest.approx([args.lr * (9 - k) / 9, args.value_lr * (9 - k) / 9])
        advantage = lives.value_loss(phi, window, given_memory["phi"], args)[1]
        _, _, raw, _, ends = slow_window(eta, phi, policies, given_memory, window, args)
        rest = policies, given_memory, window, args, unit_of(advantage, raw)
        slopes = (
            gradient(eta, lambda eta: slow_window(eta, phi, *rest)[0]),  # noqa: B023
            gradient(phi, lambda phi: slow_window(eta, phi, *rest)[1]),  # noqa: B023
        )
        for part, optimizer, slope, new, now in zip(theirs, adam, slopes, after, lr, strict=True):
            for x, y in zip(part, slope.values(), strict=True):
                x.grad = y
            optimizer.param_groups[0]["lr"] = now
            optimizer.step()
            for x, y in zip(part, new.values(), strict=True):
                close(y, x, 1e-6)
                x.copy_(y)  # so that differences of rounding do not grow
        for data in window:
            assert torch.equal(data.obs[:, 0], last)
            last = data.obs_after
        policies = {name: torch.stack([end[0][name] for end in ends]).detach() for name in policies}
        memory = {
            key: [torch.stack([end[i][j] for end in ends]).detach()[None] for j in (0, 1)]
            for i, key in ((1, "eta"), (2, "phi"))
        }
        born += sum(int(data.died.sum()) for data in window)
    assert born > 8
    for name, x in state["theta"].items():
        close(x, policies[name], 1e-12)
    for key in ("eta", "phi"):
        close(torch.stack(state["memory"][key]), torch.stack(memory[key]), 1e-12)
        assert all(torch.equal(x, y) for x, y in zip(state[key].values(), after[key == "phi"].values(), strict=True))


def test_lifetimes_begin_at_all_ages():
    number, args = 600, replace(ARGS, meta_batch_size=600, episodes_per_lifetime=3)
    envs = Lifetimes(SymABC(number, 6, dtype=torch.float64), 3)
    state = lives.init_lifetimes(envs, args, seeded(0))
    count = torch.bincount(state["worlds"]["episode"], minlength=3)
    assert ((count - 200) ** 2 / 200.0).sum() < 13.8  # 0.1 % of chi-square, 2 degrees of freedom
    assert set(state) == {"eta", "phi", "theta", "memory", "worlds"}
    assert not any(x.any() for key in ("eta", "phi") for x in state["memory"][key])
    assert [tuple(x.shape) for x in state["memory"]["eta"]] == [(1, number, args.hidden_size)] * 2
    assert not torch.equal(state["eta"]["w_h"], state["phi"]["w_h"])
    assert state["theta"]["w1"].shape == (number, args.policy_size, 5)
