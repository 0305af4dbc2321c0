"""The mathematics of algos/meta_gradient_a2c.py in float64 against loops written from the paper's equations, central
differences through the real update, and an actor-critic of torch's own optimiser."""

from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch.distributions import Categorical, Normal

from algos import meta_gradient_a2c as algorithm
from algos.meta_gradient_a2c import Args, Returns, Stream
from envs import Lifetimes
from envs.cartpole import CartPoleFixed
from envs.corridor import Corridor
from tests.double_precision import Recorder, flat, float64, seeded  # noqa: F401 (float64 is used by being here)

N, T = 3, 7
SPACES = {"choices": Discrete(3), "gaussian": Box(-1, 1, (2,))}
each_kind = pytest.mark.parametrize("kind", SPACES)
REFERENCE = 0.97, 1.0


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def steps_of(kind, generator):
    """T steps of N worlds, with falls and time limits among them; a step's next observation is the next step's."""
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    obs, final = draw(N, T + 1, 4), draw(N, T, 4)
    done = torch.rand(N, T, generator=generator) < 0.3
    fell = done & (torch.rand(N, T, generator=generator) < 0.5)
    action = draw(N, T, 2) if kind == "gaussian" else torch.randint(3, (N, T), generator=generator)
    next_obs = torch.where(done[..., None], final, obs[:, 1:])
    return Stream(
        raw_obs=obs[:, :-1], obs=obs[:, :-1], action=action, log_prob=draw(N, T), reward=draw(N, T),
        next_obs=next_obs, fell=fell, done=done,
    )  # fmt: skip


def example(kind, seed=0, **flags):
    """Flags, a state in the midst of learning, the steps of an update and those after it."""
    generator = seeded(seed)
    spaces = SimpleNamespace(single_observation_space=Box(-1, 1, (4,)), single_action_space=SPACES[kind])
    settings = {"gamma": 0.8, "gae_lambda": 0.6, "lr": 0.1, "entropy_coef": 0.1, "value_coef": 0.7}
    args = Args(num_worlds=N, rollout_steps=T, **settings | flags)
    state = algorithm.init_actor_critic(spaces, args, generator)
    state["theta"] = {name: x + 0.3 * torch.randn(x.shape, generator=generator) for name, x in state["theta"].items()}
    size = len(state["theta_adam"]["mean"])
    moments = 0.05 * torch.randn(size, generator=generator), 0.01 * torch.randn(size, generator=generator) ** 2
    state["theta_adam"] |= {"mean": moments[0], "square": moments[1], "steps": state["theta_adam"]["steps"] + 4}
    return args, state, steps_of(kind, generator), steps_of(kind, generator)


# ---------------------------------------------------------------- the same, written with loops


def slow_output(theta, name, x):
    for i in range(3):
        x = theta[f"{name}_w{i}"] @ x + theta[f"{name}_b{i}"]
        x = torch.tanh(x) if i < 2 else x
    return x


def slow_value(theta, obs, pair):
    """V of one observation, told log(p / (1 - p)) / 5 of gamma and lambda."""
    told = [min(max(float(p), 1e-4), 1 - 1e-4) for p in pair]
    told = torch.stack([torch.tensor(p / (1 - p)).log() / 5 for p in told])
    return slow_output(theta, "value", torch.cat([obs, told]))[0]


def slow_log_prob(theta, obs, action):
    scores = slow_output(theta, "policy", obs)
    policy = Normal(scores, theta["log_std"].exp()) if "log_std" in theta else Categorical(scores.softmax(0))
    return policy.log_prob(action).sum(), policy.entropy().sum()


def slow_returns(theta, stream, pair, told):
    """G, V [N, T]: the paper's recursion, from the last step on."""
    gamma, gae_lambda = pair
    G, V = torch.zeros(N, T), torch.zeros(N, T)
    for world in range(N):
        later = None
        for t in reversed(range(T)):
            after = 0.0 if stream.fell[world, t] else slow_value(theta, stream.next_obs[world, t], told)
            later = after if later is None or stream.done[world, t] else later
            later = stream.reward[world, t] + gamma * ((1 - gae_lambda) * after + gae_lambda * later)
            G[world, t], V[world, t] = later, slow_value(theta, stream.obs[world, t], told)
    return G.detach(), V.detach()


def slow_update(pair, state, stream, args, denominator=None):
    """theta'(gamma, lambda), Adam's denominator (which may be given), and the gradient's length. V is told what it was
    told at first: the state's."""
    theta = {name: x.clone().requires_grad_() for name, x in state["theta"].items()}
    told = state["eta"]["logits"].sigmoid().tolist()
    by = [
        (told, *slow_returns(theta, stream, pair, told)),
        (REFERENCE, *slow_returns(theta, stream, REFERENCE, REFERENCE)),
    ]
    loss = 0
    for world in range(N):
        for t in range(T):
            obs = stream.obs[world, t]
            log_prob, entropy = slow_log_prob(theta, obs, stream.action[world, t])
            loss = loss - (by[0][1] - by[0][2])[world, t] * log_prob - args.entropy_coef * entropy
            for told_pair, G, _ in by:
                loss = loss + args.value_coef / 2 * (slow_value(theta, obs, told_pair) - G[world, t]) ** 2
    gradient = torch.cat([x.flatten() for x in torch.autograd.grad(loss / (N * T), list(theta.values()))])
    length = float(gradient.norm())
    gradient = gradient / max(1.0, length / 0.5) if denominator is None else gradient * denominator[1]
    adam, steps = state["theta_adam"], int(state["theta_adam"]["steps"]) + 1
    mean = (0.9 * adam["mean"] + 0.1 * gradient) / (1 - 0.9**steps)
    square = (0.999 * adam["square"] + 0.001 * gradient**2) / (1 - 0.999**steps)
    root = square.sqrt() + 1e-5 if denominator is None else denominator[0]
    return flat(state["theta"]) - args.lr * mean / root, root, length


def named(theta_W, like):
    parts = theta_W.split([x.numel() for x in like.values()])
    return {name: part.view_as(x) for (name, x), part in zip(like.items(), parts, strict=True)}


def reference_returns(state, stream):
    return algorithm.lambda_returns(state["theta"], stream, torch.tensor(REFERENCE))


# ---------------------------------------------------------------- returns


def test_returns_and_their_derivatives_of_four_steps(monkeypatch):
    """Worked out by hand, by the paper's recursion of the derivatives."""
    values = torch.tensor([9, 0.5, 0.2, -0.3, 0.7])  # of the first state any: it is no part of G
    monkeypatch.setattr(algorithm, "value_told", lambda theta, obs, pair: obs[..., 0])
    none = torch.zeros(1, 4, dtype=torch.bool)
    stream = Stream(
        raw_obs=None, obs=values[None, :-1, None], action=None, log_prob=None, next_obs=values[None, 1:, None],
        reward=torch.tensor([[1.0, 0, -1, 2]]), fell=none, done=none,
    )  # fmt: skip
    pair = torch.tensor([0.9, 0.8], requires_grad=True)
    first = algorithm.lambda_returns({}, stream, pair).returns[0, 0]
    slope = torch.autograd.grad(first, pair)[0]
    G, by_gamma, by_lambda = 0.7, 0.0, 0.0
    for reward, after in zip((2, -1, 0, 1), (0.7, -0.3, 0.2, 0.5), strict=True):
        by_gamma = 0.2 * after + 0.8 * G + 0.9 * 0.8 * by_gamma
        by_lambda = 0.9 * (G - after) + 0.9 * 0.8 * by_lambda
        G = reward + 0.9 * (0.2 * after + 0.8 * G)
    close(first.detach(), torch.tensor(G))
    close(slope, torch.tensor([by_gamma, by_lambda]))
    assert (G, by_gamma, by_lambda) == pytest.approx((1.55116864, 2.4457024, 1.9079424))


@each_kind
def test_returns_end_with_episodes_and_falls_are_worth_nothing(kind):
    _, state, stream, _ = example(kind)
    assert stream.fell.any()
    assert (stream.done & ~stream.fell).any()
    for pair in ((0.8, 0.6), (0.99, 0.0), REFERENCE):
        found = algorithm.lambda_returns(state["theta"], stream, torch.tensor(pair))
        G, V = slow_returns(state["theta"], stream, pair, pair)
        close(found.returns, G)
        close(found.value, V)


def test_returns_of_whole_episodes():
    """Rewards 1 to 35 in three worlds: each episode's sum stands where it ends, over two updates."""
    done = torch.rand(N, 2 * T, generator=seeded(0)) < 0.3
    reward = torch.arange(1.0, 2 * N * T + 1).view(N, -1)
    sums, found = {"return": torch.zeros(N)}, []
    for part in (slice(0, T), slice(T, None)):
        stream = steps_of("choices", seeded(1))._replace(reward=reward[:, part], done=done[:, part])
        returns, sums = algorithm.ended_returns(stream, sums)
        found += returns.tolist()
    expected = []
    for world in range(N):
        total = 0.0
        for t in range(2 * T):
            total += float(reward[world, t])
            if done[world, t]:
                expected.append(total)
                total = 0.0
        assert float(sums["return"][world]) == total
    assert sorted(found) == sorted(expected)
    assert len(expected) > 5


# ---------------------------------------------------------------- the update, and its gradient in gamma and lambda


@each_kind
def test_the_update_is_that_of_an_actor_critic_with_torchs_adam(kind):
    args, state, *streams = example(kind, meta_lr=0.0)
    state["theta_adam"] = {name: torch.zeros_like(x) for name, x in state["theta_adam"].items()}
    theta = {name: x.clone().requires_grad_() for name, x in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, eps=1e-5)
    pair = 0.8, 0.6
    for stream in streams:
        algorithm.learn_theta(stream, reference_returns(state, stream), state, args)
        loss, by = 0, [slow_returns(theta, stream, x, x) for x in (pair, REFERENCE)]
        for world in range(N):
            for t in range(T):
                log_prob, entropy = slow_log_prob(theta, stream.obs[world, t], stream.action[world, t])
                loss = loss - (by[0][0] - by[0][1])[world, t] * log_prob - args.entropy_coef * entropy
                for x, (G, _) in zip((pair, REFERENCE), by, strict=True):
                    error = slow_value(theta, stream.obs[world, t], x) - G[world, t]
                    loss = loss + args.value_coef * error**2 / 2
        optimizer.zero_grad()
        (loss / (N * T)).backward()
        torch.nn.utils.clip_grad_norm_(theta.values(), 0.5)
        optimizer.step()
        close(flat(state["theta"]), flat(theta).detach(), 1e-6)
    close(state["eta"]["logits"].sigmoid(), torch.tensor(pair))
    assert not state["trace"]["z"].any()


@each_kind
def test_the_meta_gradient_against_central_differences(kind):
    """dJ'(theta'(eta)) / d eta of the real functions, against a second implementation written with loops: returns,
    losses and Adam, whose denominator is held fixed. J' is of the steps that theta' played, and its returns are
    constants."""
    args, state, stream, later = example(kind)
    before = dict(state)
    logits = state["eta"]["logits"]
    at = slow_update(logits.sigmoid().tolist(), state, stream, args)
    scale = 1 / max(1.0, at[2] / 0.5)
    algorithm.learn_theta(stream, reference_returns(state, stream), state, args)
    close(flat(state["theta"]), at[0])
    G, V = slow_returns(state["theta"], later, REFERENCE, REFERENCE)

    def judged(eta):
        """J', by the loops, of what the update would have led to."""
        norm = slow_update(eta.sigmoid().tolist(), before, stream, args)[2]
        fixed = at[1], 1 / max(1.0, norm / 0.5)
        theta = named(slow_update(eta.sigmoid().tolist(), before, stream, args, fixed)[0], before["theta"])
        total = sum(
            (G - V)[world, t] * slow_log_prob(theta, later.obs[world, t], later.action[world, t])[0]
            for world in range(N)
            for t in range(T)
        )
        return -float(total) / (N * T)

    assert scale < 1  # so that the shortening of the gradient is a part of what is checked
    step, expected = 1e-5, []
    for i in range(2):
        change = step * torch.eye(2)[i]
        expected.append((judged(logits + change) - judged(logits - change)) / (2 * step))
    algorithm.learn_eta(later, reference_returns(state, later), state, args)
    gradient = state["eta_adam"]["mean"] / 0.1  # of the first step of Adam
    assert gradient.norm() < 0.5
    assert min(abs(x) for x in expected) > 1e-6
    close(gradient, torch.tensor(expected), 1e-4)


@each_kind
def test_a_trace_keeps_a_part_of_earlier_updates(kind):
    args, state, *streams = example(kind, trace=0.5)
    other = dict(state)
    derivatives = []
    for stream in streams:
        inputs = other["eta"]["logits"], stream, reference_returns(other, stream), other, args
        derivatives.append(
            torch.func.jacrev(lambda eta, *rest: algorithm.updated(eta, *rest)[0])(*inputs)
        )  # reverse mode
        algorithm.learn_theta(stream, inputs[2], other, args)
    close(other["trace"]["z"], 0.5 * derivatives[0] + derivatives[1])
    assert derivatives[1].norm() > 0


@pytest.mark.parametrize(("learn", "stays"), [("gamma", 1), ("gae_lambda", 0)])
def test_one_of_them_may_stay(learn, stays):
    args, state, stream, later = example("choices", learn=learn)
    first = state["eta"]["logits"].clone()
    algorithm.learn_theta(stream, reference_returns(state, stream), state, args)
    algorithm.learn_eta(later, reference_returns(state, later), state, args)
    changed = state["eta"]["logits"] != first
    assert changed.tolist() == [i != stays for i in range(2)]


def test_what_is_learned_is_what_the_reference_pays_for():
    """Two states in a row; only the second one's reward depends on what was done in the first. With gamma 0 the update
    cannot see it, and gamma must rise; where the dependence is the other way round for the reference, it must fall."""
    gradients = {}
    for sign in (1, -1):
        args, state, *_ = example("choices", gamma=0.3, gae_lambda=0.9)
        state["theta"] = {name: torch.zeros_like(x) for name, x in state["theta"].items()}
        state["theta_adam"] = {name: torch.zeros_like(x) for name, x in state["theta_adam"].items()}
        last = torch.tensor([[False, True]] * 3)

        def played(pay, last=last):
            return Stream(
                raw_obs=None, obs=torch.zeros(3, 2, 4), action=torch.tensor([[0, 0], [1, 0], [2, 0]]),
                log_prob=torch.zeros(3, 2), reward=torch.tensor([[0.0, pay], [0, 0], [0, 0]]),
                next_obs=torch.zeros(3, 2, 4), fell=last, done=last,
            )  # fmt: skip

        algorithm.learn_theta(played(1.0), reference_returns(state, played(1.0)), state, args)
        judged = played(float(sign))
        algorithm.learn_eta(judged, reference_returns(state, judged), state, args)
        gradients[sign] = -state["eta_adam"]["mean"]
    assert (gradients[1] > 0).all()
    assert (gradients[-1] < 0).all()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("family", [Corridor, CartPoleFixed])
def test_training_learns_eta_from_the_next_steps_and_then_theta(family, monkeypatch):
    """Before the second update eta takes a step by the second window, with the trace of the first update."""
    args = Args(num_worlds=3, rollout_steps=5, horizon=8, iterations=3, eval_every=100)
    envs = Lifetimes(family(3, 8, dtype=torch.float64), 10**9)
    calls = []
    for name in ("play_steps", "learn_eta", "learn_theta"):
        original = getattr(algorithm, name)
        monkeypatch.setattr(algorithm, name, lambda *x, f=original, name=name: calls.append((name, x)) or f(*x))
    generator = seeded(0)
    state = algorithm.init_actor_critic(envs, args, generator)
    state |= {"generator": generator.get_state(), "iteration": 0, "env_steps": 0, "first_returns": torch.zeros(3)}
    monkeypatch.setattr(algorithm, "evaluate", lambda *_: {})
    algorithm.train(envs, None, args, Recorder(args), state)
    assert [name for name, _ in calls] == [
        "play_steps", "learn_theta", *2 * ["play_steps", "learn_eta", "learn_theta"],
    ]  # fmt: skip
    streams = [x[0] for name, x in calls if name != "play_steps"]
    assert streams[1] is streams[2]
    assert streams[3] is streams[4]
    assert isinstance(calls[-1][1][1], Returns)


# ---------------------------------------------------------------- the corridor


def test_the_corridor_pays_at_its_ends():
    """Against a loop of cell numbers; always left is 2 steps, always right 9."""
    venv = Corridor(4)
    tasks = venv.sample_tasks(4, seeded(0), "test")
    assert tasks.tolist() == [[0.25, 1.0]] * 4
    actions = torch.randint(2, (40, 4), generator=seeded(1))
    actions[:, 0], actions[:, 1] = 0, 1
    obs, _ = venv.reset(seed=0, options={"tasks": tasks})
    cells, over, lengths = [2] * 4, [False] * 4, [0] * 4
    for action in actions:
        obs, reward, terminated, truncated, _ = venv.step(action)
        for world in range(4):
            paid = 0.0
            if not over[world]:
                cells[world] += 1 if action[world] == 1 else -1
                lengths[world] += 1
                over[world] = cells[world] in (0, 11)
                paid = {0: 0.25, 11: 1.0}.get(cells[world], 0.0)
            assert float(reward[world]) == paid
            assert obs[world].tolist() == [float(i == cells[world]) for i in range(12)]
            assert bool(terminated[world]) == over[world]
    assert truncated.all()
    assert lengths[:2] == [2, 9]
    with pytest.raises(ValueError, match="split"):
        venv.sample_tasks(1, seeded(0), "wrong")


def test_which_end_is_worth_more_depends_on_the_discount():
    """By value iteration: at the start left is better below gamma = 0.82 = 0.25^(1/7), right above it."""
    for gamma in (0.1, 0.5, 0.8, 0.84, 0.95, 0.995):
        values = [0.0] * 12
        for _ in range(200):
            ahead = [0.25 if i == 0 else 1.0 if i == 11 else gamma * values[i] for i in range(12)]
            values = [0.0, *(max(ahead[i - 1], ahead[i + 1]) for i in range(1, 11)), 0.0]
        assert (ahead[3] > ahead[1]) == (gamma > 0.25 ** (1 / 7)), gamma
