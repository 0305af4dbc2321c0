"""The mathematics of algos/meta_critic.py against independent oracles, in float64: torch.nn networks one by one,
torch.optim.Adam, central differences, targets by their definition, Gymnasium-like loops over single worlds."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.func import grad

from algos import meta_critic as ours
from benchmark import meta_critic as study
from envs import Lifetimes, make_supervised, summarise
from envs.bandit import Bandit5
from envs.cartpole import CartPoleLength
from tests.double_precision import Recorder, float64, interval, seeded  # noqa: F401 (float64 is used by being here)
from tests.test_maml_trpo_math import close

N, T, O, A, Z, H = 4, 6, 4, 2, 3, 5  # noqa: E741


# ---------------------------------------------------------------------------------------------------------------------
# Worlds, networks and windows
# ---------------------------------------------------------------------------------------------------------------------


def make_args(**kwargs):
    sizes = {"meta_batch_size": N, "window_size": T, "hidden_size": H, "critic_size": 7, "latent_size": Z}
    study = {"eval_steps": 2, "eval_windows": 3, "eval_episodes": 3, "iterations": 4, "horizon": 8, "lifetime": 2}
    return ours.Args(**{**sizes, **study, "td_lambda": 0.7, "gamma": 0.9, **kwargs})


def make_worlds(args, family=CartPoleLength):
    counts = args.meta_batch_size, args.meta_batch_size, args.meta_batch_size * args.eval_episodes
    made = [family(n, args.horizon, dtype=torch.float64) for n in counts]
    return [Lifetimes(x, n) for x, n in zip(made, (args.lifetime, 10**9, 1), strict=True)]


def make_critics(args, count=1, latent=Z, seed=3):
    return ours.init_critics(make_worlds(args)[0], count, latent, args, seeded(seed))


def make_actors(args, outputs=A, seed=4, inputs=O):
    return ours.init_layers(args.meta_batch_size, (inputs, H, H, outputs), seeded(seed))


def make_window(seed=0, choices=True, inputs=O, outputs=A):
    """Of random numbers, with episodes that end early (some in the window's last step) and at the horizon, and with
    actors whose lifetime ends."""
    g = seeded(seed)
    obs, next_obs = torch.randn(2, N, T, inputs, generator=g)
    action = torch.randn(N, T, outputs, generator=g)
    action = torch.nn.functional.one_hot(action.argmax(-1), outputs).double() if choices else action
    ended = torch.tensor([[0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).double()
    late = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]]).double()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]).double()
    reward, trace = torch.randn(N, T, generator=g), torch.randn(N, T, inputs + outputs + 1, generator=g)
    return ours.Window(
        obs=obs, action=action, reward=reward, next_obs=next_obs, ended=ended, over=ended + late, mask=mask, trace=trace
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------------


def network(params, i):
    """Network i as torch.nn knows it."""
    linear = []
    for k in range(3):
        linear.append(torch.nn.Linear(*params[f"w{k}"].shape[1:]))
        linear[-1].weight.data, linear[-1].bias.data = params[f"w{k}"][i].T.clone(), params[f"b{k}"][i, 0].clone()
    return torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])


def opinion(phi, trace):
    """z of one trace [T, I], by torch.nn.LSTM."""
    lstm = torch.nn.LSTM(phi["w_x"].shape[1], phi["w_h"].shape[1], batch_first=True)
    for mine, theirs in (("w_x", "weight_ih"), ("w_h", "weight_hh"), ("b_x", "bias_ih"), ("b_h", "bias_hh")):
        getattr(lstm, f"{theirs}_l0").data = phi[mine].clone()
    with torch.no_grad():
        return lstm(trace[None])[1][0][0, 0] @ phi["w_z"] + phi["b_z"]


def networks(params):
    """One for each world."""
    made = [network(params, i) for i in range(len(params["w0"]))]
    return made * (N // len(made))


def slow_value(actor, critic, obs, z):
    """V of one state, of an actor whose actions are choices."""
    policy = torch.distributions.Categorical(logits=actor(obs))
    actions = torch.eye(policy.probs.numel())
    return sum(policy.probs[a] * critic(torch.cat([obs, actions[a], z])) for a in range(len(actions)))


@torch.no_grad()
def slow_values(theta, phi, obs, z):
    worlds = zip(networks(theta), networks(phi), obs, z, strict=True)
    return torch.tensor([[slow_value(actor, critic, s, z) for s in states] for actor, critic, states, z in worlds])


def slow_targets(value, window, gamma, lam):
    """The lambda-return by its definition, a mean of n-step returns, each of which looks ahead as far as it can."""
    targets = torch.zeros(N, T)
    for i, t in itertools.product(range(N), range(T)):
        ends = [k for k in range(t, T) if window.over[i, k]]
        length = (ends[0] if ends else T - 1) - t + 1
        returns = []
        for n in range(1, length + 1):
            paid = sum(gamma**k * window.reward[i, t + k] for k in range(n))
            rest = 0 if window.ended[i, t + n - 1] else value[i, t + n - 1]
            returns.append(paid + gamma**n * rest)
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, length)] + [lam ** (length - 1)]
        assert sum(weights) == pytest.approx(1)
        targets[i, t] = sum(w * r for w, r in zip(weights, returns, strict=True))
    return targets


@torch.no_grad()
def slow_actor_loss(theta, phi, window, z, choose=True):
    total, actors, critics = 0.0, networks(theta), networks(phi)
    for i, t in itertools.product(range(N), range(T)):
        obs = window.obs[i, t]
        answer = critics[i](torch.cat([obs, actors[i](obs), z[i]]))
        value = slow_value(actors[i], critics[i], obs, z[i]) if choose else answer
        total = total - float(value) * float(window.mask[i, t]) / T
    return total


@torch.no_grad()
def slow_critic_loss(phi, window, trace, target):
    """Errors of one critic for all worlds are averaged; those of many, over each world's own steps."""
    total, count, critics = 0.0, len(phi["w0"]), networks(phi)
    for i in range(N):
        z = opinion(phi, trace[i]) if "w_x" in phi else torch.zeros(0)
        for t in range(T):
            error = critics[i](torch.cat([window.obs[i, t], window.action[i, t], z])) - target[i, t]
            total = total + float(error) ** 2 * float(window.mask[i, t]) / (T if count > 1 else N * T)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def test_forward_against_networks_one_by_one():
    args, x = make_args(), torch.randn(N, 9, O, generator=seeded(1))
    theta = make_actors(args)
    close(ours.forward(theta, x), torch.stack([network(theta, i)(x[i]) for i in range(N)]).detach())
    one = {name: value[:1] for name, value in theta.items()}
    close(ours.forward(one, x), network(theta, 0)(x).detach())


def test_initial_weights_are_uniform_in_torchs_usual_range():
    params = ours.init_layers(50, (16, 40, 40, 3), seeded(0))
    for i, inputs in enumerate((16, 40, 40)):
        for name in (f"w{i}", f"b{i}"):
            bound = 1 / math.sqrt(inputs)
            assert params[name].abs().max() <= bound
            assert params[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert len(params[name].unique()) == params[name].numel()  # no two networks are the same


def test_the_encoder_against_torchs_lstm():
    args, window = make_args(), make_window()
    phi = make_critics(args)
    z = ours.encode(phi, window.trace)
    close(z, torch.stack([opinion(phi, trace) for trace in window.trace]))
    assert z.shape == (N, Z)
    assert ours.encode(make_critics(args, N, 0), window.trace).shape == (N, 0)


def test_the_encoder_sees_the_whole_trace_and_nothing_of_other_worlds():
    args, window = make_args(), make_window()
    phi, trace = make_critics(args), window.trace.clone()
    before = ours.encode(phi, trace)
    trace[1, 0, 0] += 1
    after = ours.encode(phi, trace)
    assert (after[1] - before[1]).abs().min() > 1e-9
    close(after[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("count", [1, N])
def test_the_critic_and_values_against_loops(count):
    args, window = make_args(), make_window()
    theta, phi = make_actors(args), make_critics(args, count)
    z = torch.randn(N, Z, generator=seeded(2))
    action = torch.randn(N, T, 3, A, generator=seeded(5))  # three actions of any kind
    Q = ours.critic(phi, window.obs, action, z)
    for i, t, c in itertools.product(range(N), range(T), range(3)):
        close(Q[i, t, c], networks(phi)[i](torch.cat([window.obs[i, t], action[i, t, c], z[i]]))[0].detach())
    close(ours.state_values(theta, phi, window.obs, z, is_choice=True), slow_values(theta, phi, window.obs, z))
    answers = ours.forward(theta, window.obs)
    close(
        ours.state_values(theta, phi, window.obs, z, is_choice=False),
        ours.critic(phi, window.obs, answers[:, :, None], z).squeeze(-1),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


def check_gradient(gradient, function, params, h=1e-6):
    """Central differences along one random direction in each entry, and, where networks lead, in each network of it."""
    generator, checked = seeded(3), 0
    for name, value in params.items():
        for i in range(len(value)) if value.ndim == 3 else [slice(None)]:
            direction = torch.zeros_like(value)
            direction[i] = torch.randn(value[i].shape, generator=generator)
            up, down = (function(params | {name: value + s * direction}) for s in (h, -h))
            assert float((gradient[name] * direction).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=3e-9)
            checked += abs(up - down) / (2 * h) > 1e-4
    assert checked > len(params) / 2


@pytest.mark.parametrize(("count", "choose"), [(1, True), (N, True), (1, False)])
def test_the_actors_gradient_against_central_differences(count, choose):
    args, window = make_args(), make_window(choices=choose)
    theta, phi, z = make_actors(args), make_critics(args, count), torch.randn(N, Z, generator=seeded(2))
    gradient = grad(ours.actor_loss)(theta, phi, window, z, is_choice=choose)
    check_gradient(gradient, lambda theta: slow_actor_loss(theta, phi, window, z, choose), theta)


@pytest.mark.parametrize(("count", "latent"), [(1, Z), (1, 0), (N, 0)])
def test_the_critics_gradient_against_central_differences(count, latent):
    """Of phi and omega through z; the targets are given."""
    args, window, trace = make_args(), make_window(), make_window(1).trace
    phi, target = make_critics(args, count, latent), torch.randn(N, T, generator=seeded(8))
    gradient = grad(ours.critic_loss)(phi, window, trace, target)
    check_gradient(gradient, lambda phi: slow_critic_loss(phi, window, trace, target), phi)


@pytest.mark.parametrize(("lam", "gamma"), [(0.0, 0.9), (0.7, 0.9), (1.0, 0.9), (0.7, 0.0), (0.7, 1.0)])
def test_targets_against_their_definition(lam, gamma):
    window, value = make_window(), torch.randn(N, T, generator=seeded(6))
    args = make_args(td_lambda=lam, gamma=gamma)
    close(ours.critic_targets(value, window, args), slow_targets(value, window, gamma, lam))


def test_one_step_games_have_their_rewards_as_targets():
    window, value = make_window(), torch.randn(N, T, generator=seeded(6))
    close(ours.critic_targets(value, window, make_args(gamma=0.0)), window.reward)


# ---------------------------------------------------------------------------------------------------------------------
# Adam
# ---------------------------------------------------------------------------------------------------------------------


def test_adam_against_torch_for_networks_of_different_ages():
    """Network 1 is born again after three steps, by zeros in everything that Adam remembers of it."""
    args, lr = make_args(), 0.03
    params = make_actors(args)
    moments = ours.fresh_moments(params)
    theirs = [{name: value[i].clone() for name, value in params.items()} for i in range(N)]
    optimizers = [torch.optim.Adam(x.values(), lr) for x in theirs]
    for step in range(7):
        gradient = {name: torch.randn(x.shape, generator=seeded(10 * step + 1)) for name, x in params.items()}
        params, moments = ours.adam(params, gradient, moments, lr)
        for i in range(N):
            for name, x in theirs[i].items():
                x.grad = gradient[name][i]
            optimizers[i].step()
            close({name: x[i] for name, x in params.items()}, theirs[i], 1e-7)
        if step == 2:
            keep = torch.tensor([1.0, 0.0, 1.0, 1.0])
            moments = {name: x * keep.view(-1, *[1] * (x.ndim - 1)) for name, x in moments.items()}
            optimizers[1] = torch.optim.Adam(theirs[1].values(), lr)
    assert moments["steps"].tolist() == [7, 4, 7, 7]


def test_adam_of_the_meta_critic_against_torch():
    phi = make_critics(make_args())
    moments = ours.fresh_moments(phi)
    theirs = {name: value.clone() for name, value in phi.items()}
    optimizer = torch.optim.Adam(theirs.values(), 0.01)
    for step in range(4):
        gradient = {name: torch.randn(x.shape, generator=seeded(step)) for name, x in phi.items()}
        phi, moments = ours.adam(phi, gradient, moments, 0.01)
        for name, x in theirs.items():
            x.grad = gradient[name]
        optimizer.step()
    close(phi, theirs, 1e-7)


@pytest.mark.parametrize(("count", "latent"), [(1, Z), (1, 0), (N, 0)])
def test_gradients_are_shortened_as_torch_would_each_networks(count, latent):
    """A critic's with its encoder's, as one; N critics' one by one, some long and some short."""
    phi = make_critics(make_args(), count, latent)
    size = torch.tensor([1.0, 0.01, 2.0, 0.02])[:count]
    gradient = {
        name: torch.randn(x.shape, generator=seeded(i)) * (size.view(-1, *[1] * (x.ndim - 1)) if count > 1 else 1)
        for i, (name, x) in enumerate(phi.items())
    }
    found = ours.shortened(gradient, 0.5)
    clipped = []
    for i in range(count):
        leaves = [torch.nn.Parameter(x[i] if count > 1 else x) for x in phi.values()]
        for leaf, g in zip(leaves, gradient.values(), strict=True):
            leaf.grad = (g[i] if count > 1 else g).clone()
        clipped.append(float(torch.nn.utils.clip_grad_norm_(leaves, 0.5)) > 0.5)
        for leaf, g in zip(leaves, found.values(), strict=True):
            close(g[i] if count > 1 else g, leaf.grad, 1e-12)
    assert clipped == ([True, False, True, False] if count > 1 else [True])
    assert ours.shortened(gradient, 0.0) is gradient


def test_an_update_shortens_both_gradients(monkeypatch):
    args, window = make_args(), make_window()
    plain, _ = gradients_of(monkeypatch, make_state(args), window, args, **rates(0.5, 0.25))
    args = make_args(max_norm=0.01)
    short, _ = gradients_of(monkeypatch, make_state(args), window, args, **rates(0.5, 0.25))
    for (long, _), (found, _), networks in zip(plain, short, (N, 1), strict=True):
        close(found, ours.shortened(long, 0.01), 1e-12)
        norms = sum(x.square().reshape(networks, -1).sum(1) for x in found.values()).sqrt()
        assert norms.max() == pytest.approx(0.01, rel=1e-3)


def test_traces_are_read_from_a_step_drawn():
    trace = make_window().trace
    assert ours.recent(trace, make_args(), None) is trace
    generator, lengths = seeded(0), []
    for _ in range(600):
        part = ours.recent(trace, make_args(least_trace=3), generator)
        lengths.append(part.shape[1])
        close(part, trace[:, T - lengths[-1] :], 0)
    count = torch.bincount(torch.tensor(lengths), minlength=T + 1)
    assert count[:3].sum() == 0
    assert ((count[3:] - 150) ** 2 / 150.0).sum() < 16.3  # 0.1 % of chi-square, 3 degrees of freedom


# ---------------------------------------------------------------------------------------------------------------------
# An update
# ---------------------------------------------------------------------------------------------------------------------


def make_state(args, count=1, latent=Z):
    phi = make_critics(args, count, latent)
    return ours.init_learners(make_worlds(args)[0], phi, args, seeded(4)) | {"trace": make_window(1).trace}


def rates(actor_lr, critic_lr):
    return {"actor_lr": actor_lr, "critic_lr": critic_lr, "is_choice": True}


def gradients_of(monkeypatch, *given, **rates):
    """What `teach` passes to adam: gradients and step sizes, in the order of the calls."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(ours, "adam", lambda params, g, moments, lr: seen.append((g, lr)) or (params, moments))
        loss = ours.teach(*given, **rates)
    return seen, loss


@pytest.mark.parametrize(("count", "latent"), [(1, Z), (1, 0), (N, 0)])
def test_an_update_takes_the_gradients_that_it_should(monkeypatch, count, latent):
    """z is of the window before; the actors do not move z or phi, targets do not move anything."""
    args, window = make_args(), make_window()
    state = make_state(args, count, latent)
    theta, phi, trace = state["theta"], state["phi"], state["trace"]
    seen, loss = gradients_of(monkeypatch, state, window, args, **rates(0.5, 0.25))
    (actors, actor_lr), (critics, critic_lr) = seen
    assert (actor_lr, critic_lr) == (0.5, 0.25)
    z = torch.stack([opinion(phi, x) for x in trace]) if latent else torch.zeros(N, 0)
    check_gradient(actors, lambda theta: slow_actor_loss(theta, phi, window, z), theta)
    target = slow_targets(slow_values(theta, phi, window.next_obs, z), window, args.gamma, args.td_lambda)
    assert loss == pytest.approx(slow_critic_loss(phi, window, trace, target))
    check_gradient(critics, lambda phi: slow_critic_loss(phi, window, trace, target), phi)


def test_an_update_moves_actors_up_their_values_and_critics_towards_the_targets():
    args, window = make_args(), make_window()
    state = make_state(args)
    old = dict(state)
    z = ours.encode(old["phi"], old["trace"])
    ours.teach(state, window, args, **rates(1e-4, 1e-4))
    values = [
        (ours.state_values(x["theta"], old["phi"], window.obs, z, is_choice=True) * window.mask).sum(1)
        for x in (old, state)
    ]
    assert (values[1] > values[0]).all()
    value = ours.state_values(old["theta"], old["phi"], window.next_obs, z, is_choice=True)
    target = ours.critic_targets(value, window, args)
    losses = [ours.critic_loss(x["phi"], window, old["trace"], target) for x in (old, state)]
    assert losses[1] < losses[0]
    assert state["trace"] is window.trace
    assert state["theta_adam"]["steps"].tolist() == [1] * N


def test_a_frozen_meta_critic_stays_as_it_is():
    args, window = make_args(), make_window()
    state = make_state(args)
    phi, before = state["phi"], copy.deepcopy(state["phi"])
    theta, moments = state["theta"], state["phi_adam"]
    assert ours.teach(state, window, args, **rates(0.01, 0.0)) == 0
    assert state["phi"] is phi
    close(phi, before, 0)
    assert state["phi_adam"] is moments
    assert not any(x.any() for x in moments.values())
    assert all((state["theta"][name] != theta[name]).any() for name in theta)


@pytest.mark.parametrize(("count", "latent"), [(1, Z), (1, 0), (N, 0)])
def test_actors_and_own_critics_of_different_worlds_are_independent(count, latent):
    args, window = make_args(), make_window()
    states = [make_state(args, count, latent) for _ in range(2)]
    other = ours.Window(*(torch.cat([x[:1], make_window(9)[k][1:]]) for k, x in enumerate(window)))
    for state, data in zip(states, (window, other), strict=True):
        ours.teach(state, data, args, **rates(0.01, 0.01))
    for part in ("theta", "phi") if count > 1 else ("theta",):
        for name, x in states[0][part].items():
            close(x[0], states[1][part][name][0])
            assert (x[1:] != states[1][part][name][1:]).any()


def test_a_new_world_gives_the_critic_no_hint_of_its_task():
    """Before an actor's first window the trace is empty: z is the same in all worlds, whatever their tasks."""
    args = make_args()
    state = ours.init_learners(make_worlds(args)[0], make_critics(args), args, seeded(4))
    z = ours.encode(state["phi"], state["trace"])
    close(z, z[:1].expand(N, Z))


# ---------------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------------


def pushing(args, count=N):
    """Actors that push only to the left, or only to the right, in turn."""
    theta = {name: torch.zeros_like(x[:1]).repeat(count, 1, 1) for name, x in make_actors(args).items()}
    for i in range(count):
        theta["b2"][i, 0, i % 2] = 1000.0
    return theta


def test_a_window_against_single_worlds():
    """One actor pushes to the left, the next to the right: what each world does, at falls and time-outs too."""
    args = make_args(window_size=30, horizon=12, lifetime=10**6)
    envs = make_worlds(args)[0]
    tasks = torch.tensor([[0.5], [0.6], [4.0], [5.0]])  # the short ones fall within 12 steps, the long ones do not
    obs, _ = envs.reset(seed=3, options={"tasks": tasks})
    behind, window, born = ours.play_window(envs, obs, pushing(args), 30, seeded(0))
    assert not born.any()
    for i in range(N):
        age = 0
        for t in range(30):
            age += 1
            step = CartPoleLength(1, 12, dtype=torch.float64)
            step.reset(seed=0, options={"tasks": tasks[i : i + 1]})
            step._obs = window.obs[i, t][None]
            expected, reward, fell, *_ = step.step(torch.tensor([i % 2]))
            close(window.next_obs[i, t], expected[0])
            assert window.action[i, t].tolist() == [1 - i % 2, i % 2]
            assert window.reward[i, t] == reward[0]
            assert bool(window.ended[i, t]) == bool(fell)
            assert bool(window.over[i, t]) == (bool(fell) or age == 12)
            following = window.obs[i, t + 1] if t < 29 else behind[i]
            if window.over[i, t]:
                age = 0
                assert following.abs().max() <= 0.05
            else:
                close(following, window.next_obs[i, t])
            close(window.trace[i, t], torch.cat([window.obs[i, t], window.action[i, t], reward]))
    assert window.ended.sum() > 2
    assert (window.over - window.ended).sum() > 2
    assert window.mask.all()


def test_choices_are_drawn_from_the_softmax():
    """Of five arms: with two, noise of the wrong sign would do as well."""
    theta = ours.init_layers(2, (1, H, H, 5), seeded(4))
    theta["w2"] *= 0
    theta["b2"][:, 0] = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5], [2.0, 0.0, 0.0, 1.0, -2.0]])
    envs = Lifetimes(Bandit5(2 * 500, 200, dtype=torch.float64), 10**9)
    obs, _ = envs.reset(seed=0)
    _, window, _ = ours.play_window(envs, obs, theta, 20, seeded(1))
    share = window.action.unflatten(0, (2, 500)).mean((1, 2))
    assert (share - theta["b2"][:, 0].softmax(-1)).abs().max() < 0.02  # 10,000 draws each
    assert len(window.action.argmax(-1)[:500].unique(dim=0)) > 400  # each world draws for itself


def test_greedy_actors_take_their_likeliest_choice():
    args = make_args(horizon=30)
    envs, _, exams = make_worlds(args)
    theta = make_actors(args)
    obs, _ = envs.reset(seed=3, options={"tasks": torch.ones(N, 1)})
    _, window, _ = ours.play_window(envs, obs, theta, 20, seeded(1), greedy=True)
    likeliest = ours.forward(theta, window.obs).argmax(-1)
    assert torch.equal(window.action.argmax(-1), likeliest)
    _, window, _ = ours.play_window(envs, obs, theta, 20, seeded(1))
    assert not torch.equal(window.action.argmax(-1), ours.forward(theta, window.obs).argmax(-1))
    tasks, indifferent = torch.ones(N, 1), pushing(args)
    indifferent["b2"][:] = torch.tensor([0.0, 0.1])  # nearly even: drawn, it pushes to both sides; greedily, to one
    certain = pushing(args)
    certain["b2"][:] = torch.tensor([0.0, 1000.0])
    drawn, greedy, right = (
        ours.examine(exams, tasks, x, make_args(horizon=30, eval_greedy=how), seeded(5))
        for x, how in ((indifferent, False), (indifferent, True), (certain, False))
    )
    close(greedy, right, 0)
    assert (drawn > greedy).all()


def test_the_mask_ends_with_a_lifetime():
    args = make_args(window_size=20, horizon=6, lifetime=2)
    envs = make_worlds(args)[0]
    obs, _ = envs.reset(seed=3, options={"tasks": torch.full((N, 1), 5.0), "episode": torch.tensor([0, 1, 0, 1])})
    _, window, born = ours.play_window(envs, obs, pushing(args), 20, seeded(0))
    assert born.all()
    assert window.mask.sum(1).tolist() == [12, 6, 12, 6]
    assert not ours.play_window(envs, envs.unwrapped._obs, pushing(args), 3, seeded(0))[2].all()


def test_an_examination_against_single_episodes():
    args = make_args(horizon=30, eval_episodes=5)
    exams, theta = make_worlds(args)[2], pushing(args)
    tasks = torch.tensor([[0.5], [0.6], [1.0], [5.0]])
    generator = seeded(5)
    seed = int(torch.randint(2**31, (1,), generator=seeded(5)))
    returns = ours.examine(exams, tasks, theta, args, generator)
    single = CartPoleLength(N * 5, 30, dtype=torch.float64)
    single.reset(seed=seed, options={"tasks": tasks.repeat_interleave(5, 0)})
    total, push = torch.zeros(N * 5), torch.tensor([0, 1] * 2).repeat_interleave(5)
    while not single.at_horizon:
        total += single.step(push)[1]
    close(returns, total.view(N, 5).mean(1))
    assert (returns[:2] < 15).all()


# ---------------------------------------------------------------------------------------------------------------------
# Meta-training and meta-testing
# ---------------------------------------------------------------------------------------------------------------------


def start(args, family=CartPoleLength):
    envs, *others = make_worlds(args, family)
    generator = seeded(args.seed)
    phi = ours.init_critics(envs, 1, args.latent_size, args, generator)
    state = ours.init_learners(envs, phi, args, generator)
    envs.reset(seed=1, options={"tasks": envs.unwrapped.sample_tasks(N, generator, "train")})
    state |= {"iteration": 0, "env_steps": 0, "worlds": envs.save_worlds(), "generator": generator.get_state()}
    return [envs, *others], state


def test_births_and_nothing_else_renew_actors(monkeypatch):
    args = make_args(iterations=12, eval_every=100, horizon=7, lifetime=2)
    worlds, state = start(args)
    births, play = [], ours.play_window

    def watched(envs, *rest, **named):
        result = play(envs, *rest, **named)
        if envs is worlds[0]:
            births.append(result[2])
        return result

    class Steps(Recorder):
        def __init__(self, args):
            super().__init__(args)
            self.states = []

        def log(self, state, stats):
            super().log(state, stats)
            self.states.append(dict(state))

    monkeypatch.setattr(ours, "play_window", watched)
    ours.train(*worlds, args, recorder := Steps(args), state)
    born, seen = torch.stack(births), recorder.states
    assert 0 < born.sum() < born.numel() / 2
    age = torch.zeros(N)
    for k in range(12):
        age = torch.where(born[k], 0, age + 1)
        close(seen[k]["theta_adam"]["steps"], age)
        fresh = seen[k]["trace"].abs().sum((1, 2)) == 0
        assert torch.equal(fresh, born[k])
        for name, x in seen[k]["theta_adam"].items():
            assert (x[born[k]] == 0).all(), name
        if k:
            moved = (seen[k]["theta"]["w1"] - seen[k - 1]["theta"]["w1"]).abs().amax((1, 2))
            assert (moved[~born[k]] <= args.actor_lr * 4).all()  # a step of Adam, no new actor
            assert (moved[born[k]] > args.actor_lr * 4).all()
    assert [env_steps for _, env_steps, _ in recorder.logged] == [N * T * (k + 1) for k in range(12)]


def test_training_never_changes_what_it_was_given():
    args = make_args()
    worlds, state = start(args)
    given = {part: dict(state[part]) for part in ("theta", "phi", "theta_adam", "phi_adam")}
    given["trace"] = {"trace": state["trace"]}
    copies = copy.deepcopy(given)
    ours.train(*worlds, args, Recorder(args), state)
    close(given, copies, 0)
    assert all((state["phi"][name] != x).any() for name, x in given["phi"].items())


def test_new_actors_are_the_same_with_and_without_the_meta_critic():
    args = make_args(eval_episodes=4, horizon=60)
    _, envs, exams = make_worlds(args)
    phi = make_critics(args)
    before = copy.deepcopy(phi)
    taught, alone = (ours.meta_test(envs, exams, args, given) for given in (phi, None))
    close(taught[0][0], alone[0][0])
    close(phi, before, 0)
    close(ours.meta_test(envs, exams, replace(args, seed=args.seed + 1), phi), taught, 0)  # in every run the same
    for _, episodes in (taught, alone):
        played = torch.stack(episodes)
        assert (played[0] == 0).all()
        assert (played[1:] >= played[:-1]).all()
        assert 0 < played[-1].mean() < 2 * args.eval_windows * T / 5


def test_all_episodes_of_new_actors_count():
    """Nothing falls within three steps: two episodes a window, all of which end at the horizon."""
    args = make_args(horizon=3)
    _, envs, exams = make_worlds(args)
    played = torch.stack(ours.meta_test(envs, exams, args, None)[1])
    close(played, 2.0 * args.eval_windows * torch.arange(3.0)[:, None].expand(3, N))


@pytest.mark.parametrize("own", [False, True])
def test_new_actors_learn_by_the_rates_and_with_the_critics_they_should(own, monkeypatch):
    args = make_args(own_actor_lr=0.2, own_critic_lr=0.3, actor_lr=0.4, critic_lr=0.5)
    _, envs, exams = make_worlds(args)
    seen, tasks, teach = [], [], ours.teach

    def watched(state, window, args, *, actor_lr, critic_lr, is_choice):
        seen.append((dict(state), actor_lr, critic_lr))
        assert is_choice
        return teach(state, window, args, actor_lr=actor_lr, critic_lr=critic_lr, is_choice=is_choice)

    monkeypatch.setattr(ours, "teach", watched)
    monkeypatch.setattr(ours, "examine", lambda exams, t, *rest: tasks.append(t) or torch.zeros(N))
    ours.meta_test(envs, exams, args, None if own else make_critics(args))
    assert len(seen) == args.eval_steps * args.eval_windows
    assert all(rates == ((0.2, 0.3) if own else (0.4, 0.0)) for _, *rates in seen for rates in [tuple(rates)])
    assert len(seen[0][0]["phi"]["w0"]) == (N if own else 1)
    assert ("w_x" in seen[0][0]["phi"]) != own
    cells = ((tasks[0] - 0.5) / 4.5 * 50).floor() % 5
    assert (cells == 2).all()  # the strips of held-out lengths
    assert all(t is tasks[0] for t in tasks)
    assert torch.equal(envs._task, tasks[0])  # they practise and are examined on the same


def test_an_evaluation_against_its_parts(monkeypatch):
    """One task is played twice."""
    returns = [torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.tensor([5.0, 9.0, 4.0, 10.0])]
    tasks = torch.tensor([[0.5], [0.7], [0.5], [2.0]])
    envs = SimpleNamespace(unwrapped=SimpleNamespace(test_set=lambda number: (tasks[:number], seeded(0))))
    monkeypatch.setattr(ours, "meta_test", lambda *given: (returns, [torch.zeros(4), returns[0]]))
    stats = summarise(ours.evaluate(envs, None, make_args(), None, name="test"))
    expected = {"test/return_k0": 3, "test/return_k1": 7, "test/episodes": 3, "test/tasks": 3}
    expected["test/gain_ci95"] = interval([4, 6, 2, 4], tasks)  # 3, 6 and 4 of the different tasks
    assert stats == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What the study adds
# ---------------------------------------------------------------------------------------------------------------------


def test_curves_as_worlds():
    data = make_supervised("SinusoidOrLine-v0", 1, 1)
    data.dtype = torch.float64
    envs = study.Curves(data, N, 3)
    tasks = data.sample_tasks(N, seeded(0))
    x, _ = envs.reset(seed=1, options={"tasks": tasks, "episode": torch.tensor([0, 1, 2, 0])})
    for k in range(5):
        answer, task, saved = torch.randn(N, 1, generator=seeded(k)), envs.state["tasks"], envs.save_worlds()
        new_x, reward, ended, late, info = envs.step(answer)
        close(reward, -((answer - data.target(x, task))[:, 0] ** 2))
        close(info["answer"], data.target(x, task))
        assert ended.all()
        assert not late.any()
        assert info["born"].tolist() == [(k + b) % 3 == 2 for b in (0, 1, 2, 0)]
        assert ((envs.state["tasks"] != task).any(1) == info["born"]).all()
        close(envs.load_worlds(saved), x)
        again = envs.step(answer)
        close(again[:2], (new_x, reward), 0)
        x = new_x
    _, window, _ = ours.play_window(envs, x, make_actors(make_args(), 1, inputs=1), 4, seeded(0))
    question, answer = window.trace.split(1, -1)  # (x, y) and nothing of the actor, neither answer nor error
    close(question, window.obs)
    close(-((window.action - answer)[..., 0] ** 2), window.reward)
    assert (window.action != answer).all()
    other = ours.play_window(envs, envs.load_worlds(saved), make_actors(make_args(), 1, seed=9, inputs=1), 4, seeded(0))
    same = ours.play_window(envs, envs.load_worlds(saved), make_actors(make_args(), 1, inputs=1), 4, seeded(0))
    close(other[1].trace, same[1].trace, 0)
    assert (other[1].reward != same[1].reward).all()
    encoder = ours.init_critics(envs, 1, Z, make_args(), seeded(0))
    assert ours.encode(encoder, window.trace).shape == (N, Z)


def test_first_reach():
    returns = [torch.tensor([10.0, 160.0, 20.0]), torch.tensor([150.0, 20.0, 30.0]), torch.tensor([180.0, 1.0, 149.0])]
    episodes = [torch.zeros(3), torch.tensor([4.0, 5.0, 6.0]), torch.tensor([7.0, 8.0, 9.0])]
    count, ok = study.reached(returns, episodes)
    assert count.tolist() == [4, 0, 9]
    assert ok.tolist() == [True, True, False]


def test_the_usual_actor_critics_gradients(monkeypatch):
    """Of the study's baseline: advantages by their definition, the policy gradient by torch.distributions."""
    args, window = make_args(), make_window()
    state = study.value_actors(make_worlds(args)[0], N, args, seeded(2))
    seen = []
    monkeypatch.setattr(ours, "adam", lambda params, g, moments, lr: seen.append(g) or (params, moments))
    values, after = (ours.forward(state["value"], x)[..., 0] for x in (window.obs, window.next_obs))
    goal = slow_targets(after, window, 0.9, 0.95)  # lambda-returns; advantages are what they add to the values

    def loss(theta):
        logits = ours.forward(theta, window.obs)
        policy = torch.distributions.Categorical(logits=logits)
        gain = policy.log_prob(window.action.argmax(-1)) * (goal - values) + 0.01 * policy.entropy()
        return -gain.mean(1).sum()

    # GAE takes the value of a next state from the step behind it, so let these agree where an episode goes on.
    obs = window.obs.clone()
    obs[:, 1:] = torch.where(window.over[:, :-1, None] > 0, obs[:, 1:], window.next_obs[:, :-1])
    window = window._replace(obs=obs)
    study.improve(state, window, 0.9, (0.1, 0.1))
    values = ours.forward(state["value"], window.obs)[..., 0]
    close(seen[0], grad(loss)(state["theta"]), 1e-9)

    def error(value):
        return (ours.forward(value, window.obs)[..., 0] - goal).square().mean(1).sum()

    close(seen[1], grad(error)(state["value"]), 1e-9)


def test_flags_of_new_actors_do_not_reach_the_training():
    args = make_args()
    for flags in ({"own_actor_lr": 0.7, "own_critic_lr": 0.7}, {"eval_windows": 1, "eval_episodes": 1}):
        states = []
        for each in (args, replace(args, **flags)):
            worlds, state = start(each)
            ours.train(*worlds, each, Recorder(each), state)
            states.append(state)
        close(states[0]["phi"], states[1]["phi"], 0)
