"""The mathematics of algos/mbmpo.py against independent oracles, in float64: torch.nn models fitted one by one, plain
loops over episodes, Gymnasium's own hopper, torch.distributions, central differences, iterations by hand."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch.distributions import Independent, Normal
from torch.func import grad

from algos import mbmpo as ours
from envs import Imagined, ScaleActions, summarise
from envs.forward import HopperForward
from envs.navigation import Navigation2DEndless
from tests.double_precision import ALONE, Recorder, flat, float64, interval, seeded  # noqa: F401 (float64 by being here)
from tests.test_maml_trpo_math import central_differences, close, relative_error

K, E, T = 3, 4, 6  # models, imagined episodes in each, steps
STEP = float(np.float32(0.1))  # the longest step of navigation along an axis


# ---------------------------------------------------------------------------------------------------------------------
# Toy environment, policies, models and data
# ---------------------------------------------------------------------------------------------------------------------


class Pit(Navigation2DEndless):
    """Navigation from random starts, over as soon as x > 0.3: some episodes end early, real and imagined ones."""

    can_terminate = True

    def _start(self, task, generator):
        return 0.2 * torch.randn(self.num_envs, 2, generator=generator, dtype=self.dtype)

    def _advance(self, action):
        next_obs = self._obs + action
        return next_obs, self.ended(next_obs), {}

    @staticmethod
    def ended(obs):
        return obs[..., 0] > 0.3


def make_args(**kwargs):
    models = {"num_models": K, "model_size": 5, "model_batch_size": 7, "model_epochs": 3, "model_lr": 0.01}
    episodes = {"episodes_per_task": E, "real_episodes": 2, "horizon": T, "meta_steps": 2, "action_scale": 1.3}
    learning = {"hidden_size": 2, "inner_lr": 1.0, "gamma": 0.9, "gae_lambda": 0.9, "fisher_fraction": 1.0}
    return ours.Args(**{**models, **episodes, **learning, **kwargs})


def real(args):
    """Arguments of real episodes, of which there is another number."""
    return replace(args, episodes_per_task=args.real_episodes)


def make_envs(args, family=Pit):
    """The real worlds and the imagined ones."""
    worlds = family(args.num_models * args.real_episodes, args.horizon, dtype=torch.float64)
    envs = ScaleActions(worlds, args.action_scale)
    return envs, Imagined(envs, args.num_models * args.episodes_per_task)


def make_tasks(envs, args):
    return envs.unwrapped.sample_tasks(1, seeded(0)).expand(args.num_models, -1)


def make_theta(args, seed=0, family=Pit):
    """All parameters are away from zero, so that none drops out of a comparison."""
    return nearby(ours.init_policy(make_envs(args, family)[0], args.hidden_size, seeded(seed)), 0.3, seed)


def nearby(params, distance=0.05, seed=2):
    generator = seeded(seed)
    return {name: x + distance * torch.randn(x.shape, generator=generator) for name, x in params.items()}


def stack(policies):
    return {name: torch.stack([params[name] for params in policies]) for name in policies[0]}


def only(params, k):
    return {name: value[k] for name, value in params.items()}


def follow(imagined, models, scales):
    """What follow_models does, with these scales instead of those of data."""
    imagined.follow(partial(ours.predict, models, scales), scales["low"], scales["high"])


def drifting_models(drift, reach=100.0):
    """Models of navigation by hand, in which next_obs = obs + action + a drift of each model's own; their scales."""
    one = torch.eye(2)
    layers = {"w0": torch.cat([0 * torch.eye(2, 4), torch.cat([one, -one], 1)]), "w1": torch.eye(4)}
    layers["w2"] = torch.cat([one, -one])  # relu(a) - relu(-a) = a
    weights = {name: x.expand(len(drift), *x.shape) for name, x in layers.items()}
    weights |= {"b0": torch.zeros(len(drift), 1, 4), "b1": torch.zeros(len(drift), 1, 4)}
    weights["b2"] = torch.tensor(drift)[:, None]
    scales = {"x_mean": torch.zeros(4), "x_std": torch.ones(4), "y_mean": torch.zeros(2), "y_std": torch.ones(2)}
    return weights, scales | {"low": torch.full((2,), -reach), "high": torch.full((2,), reach)}


DRIFTS = [[0.03, -0.02], [-0.05, 0.04], [0.01, 0.06]]


def spaces(obs_size, action_size):
    """What init_models reads of environments."""
    sizes = {"single_observation_space": obs_size, "single_action_space": action_size}
    return SimpleNamespace(**{name: Box(-1, 1, (size,)) for name, size in sizes.items()})


def noise_data(M, seed=0):
    """Transitions [M, 3] of random states with actions [M, 2] and changes of other sizes, in which there is little to
    learn: models overfit."""
    g = seeded(seed)
    obs, action = 2 * torch.randn(M, 3, generator=g) + 5, torch.rand(M, 2, generator=g)
    change = torch.randn(M, 3, generator=g) * torch.tensor([0.1, 1.0, 3.0]) + torch.tensor([0.5, 0.0, -4.0])
    data = {"obs": obs, "action": action, "next_obs": obs + change + 0.2 * obs.roll(1, 1)}
    return data | {"place": torch.rand(M, K, generator=g)}


def make_models(args, seed=0, obs_size=3, action_size=2):
    """Unfitted weights away from zero, biases too."""
    return nearby(ours.init_models(spaces(obs_size, action_size), args, seeded(seed)), 0.1, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------------


def slow_stats(data):
    x = np.concatenate([data["obs"].numpy(), data["action"].numpy()], 1)
    y = data["next_obs"].numpy() - data["obs"].numpy()
    return x, y, (x.mean(0), x.std(0, ddof=1) + 1e-6), (y.mean(0), y.std(0, ddof=1) + 1e-6)


def network(models, k):
    """Model k as torch.nn knows it."""
    layers = []
    for i in range(3):
        layers.append(torch.nn.Linear(*models[f"w{i}"].shape[1:]))
        layers[-1].weight.data = models[f"w{i}"][k].T.clone()
        layers[-1].bias.data = models[f"b{i}"][k, 0].clone()
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])


def slow_fit(models, data, args, generator):
    """One model after the other, through all epochs; what each kept and when it stopped, and its error all along."""
    x, y, (x_mean, x_std), (y_mean, y_std) = slow_stats(data)
    x, y = torch.tensor((x - x_mean) / x_std), torch.tensor((y - y_mean) / y_std)
    cut, mse = 4 * len(x) // 5, torch.nn.functional.mse_loss
    orders = [torch.tensor(sorted(range(len(x)), key=data["place"][:, k].tolist().__getitem__)) for k in range(K)]
    minibatches = [torch.randperm(cut, generator=generator) for _ in range(args.model_epochs)]
    fitted, stops, curves = [], [], []
    for k, order in enumerate(orders):
        net, train, valid = network(models, k), order[:cut], order[cut:]
        optimizer = torch.optim.Adam(net.parameters(), lr=args.model_lr)
        average, stop, curve = 1.5 * mse(net(x[valid]), y[valid]).item(), None, []
        for epoch, minibatch in enumerate(minibatches, 1):
            for i in range(0, cut, args.model_batch_size):
                rows = train[minibatch[i : i + args.model_batch_size]]
                optimizer.zero_grad()
                mse(net(x[rows]), y[rows]).backward()
                optimizer.step()
            curve.append(mse(net(x[valid]), y[valid]).item())
            if stop is None:
                kept, before, average = copy.deepcopy(net), average, 0.9 * average + 0.1 * curve[-1]
                stop = epoch if average >= before else None
        fitted.append(kept)
        stops.append(stop)
        curves.append(curve)
    return fitted, stops, curves


def same_weights(models, networks):
    for k, net in enumerate(networks):
        for actual, expected in zip(network(models, k).parameters(), net.parameters(), strict=True):
            close(actual.detach(), expected.detach(), 1e-8)


def slow_policy(params, obs):
    for i in (0, 1):
        obs = torch.tanh(obs @ params[f"w{i}"] + params[f"b{i}"])
    return Normal(obs @ params["w2"] + params["b2"], params["log_std"].exp())


def log_prob(params, obs, action):
    return Independent(slow_policy(params, obs), 1).log_prob(action)


def running(batch, k):
    """Observations, actions, logarithms of probability and advantages of the steps of model k's episodes."""
    runs = batch.mask[k] == 1
    return batch.obs[k][runs], batch.action[k][runs], batch.log_prob[k][runs], batch.advantage[k][runs]


def mean_ratio(params, batch, k):
    obs, action, old, advantage = running(batch, k)
    return ((log_prob(params, obs, action) - old).exp() * advantage).mean()


def mean_score(params, batch, k):
    obs, action, _, advantage = running(batch, k)
    return (log_prob(params, obs, action) * advantage).mean()


def slow_step(theta, batch, k, args, objective=mean_ratio, create_graph=False):
    """The policy adapted to model k."""
    weights = {name: x if x.requires_grad else x.clone().requires_grad_() for name, x in theta.items()}
    slopes = torch.autograd.grad(objective(weights, batch, k), list(weights.values()), create_graph=create_graph)
    return {name: x + args.inner_lr * slope for (name, x), slope in zip(weights.items(), slopes, strict=True)}


def slow_adapted(theta, batch, args, objective=mean_ratio):
    params = stack([slow_step(theta, batch, k, args, objective) for k in range(K)])
    return {name: value.detach() for name, value in params.items()}


def meta_gradient(theta, supports, query, args, monkeypatch):
    """What trpo_step itself passes to conjugate_gradient."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(ours, "conjugate_gradient", lambda product, b, *rest: seen.append(b) or (b, b))
        ours.trpo_step(theta, ours.imagined_surrogate, supports, query, args)
    return seen[0]


def make_batches(args, theta):
    """A support, and a query of the policies adapted to it, as in training."""
    envs, imagined = make_envs(args)
    tasks, generator = make_tasks(envs, args), seeded(1)
    follow(imagined, *drifting_models(DRIFTS))
    support = ours.collect(imagined, tasks, theta, args, generator)
    query = ours.collect(imagined, tasks, ours.lvc_step(theta, support, args), args, generator)
    for batch in (support, query):  # some episodes end early, most steps count, and models differ in how many do
        assert 0.5 < batch.mask.mean() < 0.97
        assert len(batch.mask.sum((1, 2)).unique()) > 1
    return support, query


# ---------------------------------------------------------------------------------------------------------------------
# The ensemble
# ---------------------------------------------------------------------------------------------------------------------


def test_initial_models():
    """Xavier: uniform with variance 2 / (in + out), no bias; every model has weights of its own."""
    args = make_args(model_size=50)
    models, again = (ours.init_models(spaces(7, 3), args, seeded(5)) for _ in range(2))
    assert torch.equal(flat(models), flat(again))
    assert [tuple(models[f"w{i}"].shape) for i in range(3)] == [(K, 10, 50), (K, 50, 50), (K, 50, 7)]
    assert [tuple(models[f"b{i}"].shape) for i in range(3)] == [(K, 1, 50), (K, 1, 50), (K, 1, 7)]
    assert all(models[f"b{i}"].eq(0).all() for i in range(3))
    for x in models["w1"]:
        assert float(x.var()) == pytest.approx(2 / 100, rel=0.1)  # the standard error of 2500 draws is 2 %
        assert float(x.abs().max()) <= math.sqrt(6 / 100)
    assert not any(torch.equal(models["w1"][i], models["w1"][j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_predictions_are_those_of_one_model_after_the_other():
    """Rows k B to (k + 1) B are model k's; normalised before, de-normalised after."""
    args, B = make_args(), 6
    models = make_models(args)
    x_mean, x_std, y_mean, y_std = (1 + torch.rand(n, generator=seeded(i)) for i, n in enumerate((5, 5, 3, 3)))
    scales = {"x_mean": x_mean, "x_std": x_std, "y_mean": y_mean, "y_std": y_std}
    obs, action = torch.randn(K * B, 3, generator=seeded(1)), torch.randn(K * B, 2, generator=seeded(2))
    x = (torch.cat([obs, action], 1) - x_mean) / x_std
    changes, expected = torch.zeros(K, B, 3), torch.zeros(K * B, 3)
    for k in range(K):
        net = network(models, k)
        for i in range(B):
            row = k * B + i
            changes[k, i] = net(x[row]).detach()
            expected[row] = obs[row] + changes[k, i] * y_std + y_mean
    close(ours.normalised_change(models, x.view(K, B, 5)), changes, 1e-10)
    close(ours.predict(models, scales, obs, action), expected, 1e-10)
    close(ours.normalised_change(only(models, 1), x.view(K, B, 5)[1]), changes[1], 1e-10)  # as inside vmap


# ---------------------------------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------------------------------

FITS = {
    "some stop early": {"model_epochs": 60, "model_lr": 0.03},
    "nobody stops": {"model_epochs": 4, "model_lr": 0.003},
}


@pytest.mark.parametrize("case", FITS)
def test_fit_is_that_of_models_trained_one_by_one(case):
    """The same splits, minibatches (the last is smaller) and early ends; each with its own Adam, from its weights."""
    args, data = make_args(**FITS[case]), noise_data(43)
    models = make_models(args)
    untouched = copy.deepcopy((models, data))
    fitted, stats = ours.fit_models(ALONE, models, data, args, seeded(7))
    expected, stops, curves = slow_fit(models, data, args, seeded(7))
    if case == "nobody stops":
        assert stops == [None] * K
    else:
        assert None not in stops
        assert len(set(stops)) == K
        assert max(stops) < args.model_epochs
    epochs = max(stop or args.model_epochs for stop in stops)
    assert stats["train/model_epochs"] == epochs
    last = [curve[(stop or epochs) - 1] for curve, stop in zip(curves, stops, strict=True)]
    assert stats["train/model_error"].tolist() == pytest.approx(last, rel=1e-9)
    same_weights(fitted, expected)
    assert not any(x.requires_grad for x in fitted.values())
    for before, after in zip(untouched, (models, data), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_stay_on_their_side_while_data_grow():
    """Of each batch of new rows every model takes 80 % to learn from, and the same ones in all later fits."""
    args, taken, held = make_args(), [set() for _ in range(K)], [set() for _ in range(K)]
    envs, _ = make_envs(args, Navigation2DEndless)
    theta, generator = make_theta(args), seeded(0)
    data = None
    for batch in range(4):
        new, _, _ = play(envs, make_tasks(envs, args), theta, args, generator)
        M = len(new["obs"])
        for k in range(K):
            ranks = (new["place"][:, k] * M).round().long()
            assert sorted(ranks.tolist()) == list(range(M))
        data = {name: torch.cat([data[name], x]) for name, x in new.items()} if data else new
        for k in range(K):
            order = data["place"][:, k].argsort(stable=True)
            cut = 4 * len(order) // 5
            assert len(taken[k] & set(order[cut:].tolist())) <= batch  # those that rounding moves
            assert len(held[k] & set(order[:cut].tolist())) <= batch
            taken[k], held[k] = set(order[:cut].tolist()), set(order[cut:].tolist())
    assert len({frozenset(rows) for rows in held}) == K


def test_a_second_fit_goes_on_from_the_first():
    """From its weights, whatever the statistics then were; with fresh moments."""
    args = make_args(model_epochs=2)
    first, _ = ours.fit_models(ALONE, make_models(args), noise_data(30), args, seeded(0))
    more = {name: torch.cat([x, 1.5 * x]) for name, x in noise_data(30, seed=1).items()}
    second, _ = ours.fit_models(ALONE, first, more, args, seeded(1))
    expected, _, _ = slow_fit(first, more, args, seeded(1))
    same_weights(second, expected)
    assert list(second) == list(first)
    assert not torch.allclose(ours.measure(more)["y_mean"], ours.measure(noise_data(30))["y_mean"])


def test_scales_are_those_of_the_data():
    data = noise_data(40)
    scales = ours.measure(data)
    _, _, x_stats, y_stats = slow_stats(data)
    for name, expected in zip(("x_mean", "x_std", "y_mean", "y_std"), (*x_stats, *y_stats), strict=True):
        close(scales[name], torch.tensor(expected), 1e-12)
    seen = np.concatenate([data["obs"].numpy(), data["next_obs"].numpy()])
    reach = seen.max(0) - seen.min(0)
    close(scales["low"], torch.tensor(seen.min(0) - reach - 1e-3), 1e-12)
    close(scales["high"], torch.tensor(seen.max(0) + reach + 1e-3), 1e-12)
    for name in ("obs", "next_obs"):  # either alone would give other bounds
        alone = data[name].aminmax(dim=0)
        assert not torch.allclose(2 * alone.min - alone.max, scales["low"])


def test_what_is_normalised_comes_back(monkeypatch):
    """A model that predicts the normalised change exactly predicts next_obs exactly, from inputs of mean 0, std 1."""
    args, data = make_args(), noise_data(40)
    fitted, _ = ours.fit_models(ALONE, make_models(args), data, args, seeded(0))
    _, y, _, (y_mean, y_std) = slow_stats(data)
    inputs = []

    def exact(models, x):
        inputs.append(x)
        return torch.tensor((y - y_mean) / y_std).expand(K, -1, -1)

    monkeypatch.setattr(ours, "normalised_change", exact)
    predicted = ours.predict(fitted, ours.measure(data), data["obs"].repeat(K, 1), data["action"].repeat(K, 1))
    close(predicted, data["next_obs"].repeat(K, 1), 1e-10)
    for x in inputs[0]:
        close(x.mean(0), torch.zeros(5), 1e-10)
        close(x.std(0), torch.ones(5), 1e-5)  # but for the 1e-6 that is added


def test_constant_features_stay_finite_and_constant():
    args, data = make_args(), noise_data(40)
    for name, value in (("obs", 3.0), ("next_obs", 3.0), ("action", 0.5)):
        data[name][:, 1] = value
    fitted, stats = ours.fit_models(ALONE, make_models(args), data, args, seeded(0))
    assert all(x.isfinite().all() for x in (*fitted.values(), *ours.measure(data).values()))
    assert all(math.isfinite(x) for x in summarise(stats).values())
    predicted = ours.predict(fitted, ours.measure(data), data["obs"].repeat(K, 1), data["action"].repeat(K, 1))
    assert predicted.isfinite().all()
    assert float((predicted[:, 1] - 3).abs().max()) < 1e-4


def test_validation_rows_are_never_trained_on():
    """Two rows that exchange their changes leave the statistics as they are; a model notices unless both are its own
    for validation. Of 15 rows these are 3, other ones for each model."""
    args, data = make_args(model_epochs=1, model_batch_size=4, model_size=20), noise_data(15)
    models = make_models(args)

    def fit(changes):
        exchanged = data | {"next_obs": data["obs"] + changes}
        return ours.fit_models(ALONE, models, exchanged, args, seeded(3))[0]

    changes = data["next_obs"] - data["obs"]
    plain, unnoticed = fit(changes), [set() for _ in range(K)]
    for pair in itertools.combinations(range(15), 2):
        order = torch.arange(15)
        order[list(pair)] = order[list(pair[::-1])]
        fitted = fit(changes[order])
        for k in range(K):
            distance = float((flat(only(fitted, k)) - flat(only(plain, k))).norm())
            assert distance < 1e-9 or distance > 1e-6
            if distance < 1e-9:
                unnoticed[k].add(pair)
    held_out = [set().union(*pairs) for pairs in unnoticed]
    assert [len(rows) for rows in held_out] == [3] * K
    assert [len(pairs) for pairs in unnoticed] == [3] * K
    assert len({frozenset(rows) for rows in held_out}) == K


def linear_data(M, seed):
    """s' = s + A s + B a of 3 states and 2 actions."""
    g = seeded(seed)
    obs, action = torch.randn(M, 3, generator=g), 2 * torch.rand(M, 2, generator=g) - 1
    A = torch.tensor([[-0.1, 0.05, 0.0], [0.2, -0.05, 0.1], [0.0, -0.3, 0.0]])
    B = torch.tensor([[0.2, 0.0], [0.0, -0.4], [1.0, 0.3]])
    data = {"obs": obs, "action": action, "next_obs": obs + obs @ A.T + action @ B.T}
    return data | {"place": torch.rand(M, K, generator=g)}


def test_models_recover_a_linear_system():
    """On fresh points each model errs by less than a tenth of the change (measured: 0.03); one that knows only its mean
    or has mixed up inputs would err by about all of it, as do the unfitted ones."""
    args = make_args(model_size=32, model_epochs=60, model_batch_size=50, model_lr=0.005)
    unfitted, data = make_models(args), linear_data(1000, 0)
    fitted, stats = ours.fit_models(ALONE, unfitted, data, args, seeded(0))
    fresh, scales = linear_data(200, 1), ours.measure(data)

    def errors(models):
        many = (fresh[name].repeat(K, 1) for name in ("obs", "action"))
        predicted = ours.predict(models, scales, *many).view(K, 200, 3)
        size = (fresh["next_obs"] - fresh["obs"]).square().mean().sqrt()
        return ((predicted - fresh["next_obs"]).square().mean((1, 2)).sqrt() / size).tolist()

    assert max(errors(fitted)) < 0.1
    assert min(errors(unfitted)) > 0.5
    assert float(stats["train/model_error"].mean()) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Real episodes
# ---------------------------------------------------------------------------------------------------------------------


class Recording(ScaleActions):
    """Keeps what a batch saw, did and was paid in every step."""

    def reset(self, **kwargs):
        self.last, info = super().reset(**kwargs)
        self.steps = []
        return self.last, info

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps.append((self.last, action, obs, reward, terminated))
        self.last = obs
        return obs, reward, terminated, truncated, info


def play(envs, tasks, params, args, generator):
    """Real episodes as in training: their transitions, returns [N, E], number of steps."""
    played = ours.rollout(envs, tasks, params, real(args), generator)
    return ours.transitions(envs, played, args, generator), played["reward"].sum(-1), int(played["mask"].sum())


def hopper():
    """Episodes of which some fall before the horizon and some do not; actions beyond the bounds are frequent."""
    args = make_args(real_episodes=3, horizon=15)
    worlds = HopperForward(K * 3, 15, dtype=torch.float64, num_threads=1)
    envs = Recording(worlds, args.action_scale)
    policies = stack([make_theta(args, seed, HopperForward) for seed in range(K)])
    return envs, play(envs, worlds.sample_tasks(K, seeded(0)), policies, args, seeded(1))


def test_real_transitions_are_those_of_running_episodes():
    """In the order of policies, episodes and steps: none after an early end, none from one episode into the next,
    the fall itself, but nothing of the horizon's last step; all steps are counted and paid."""
    envs, (data, return_NE, steps) = hopper()
    family, counted, rows, rewards, falls = envs.unwrapped, 0, [], [], 0
    for world in range(K * 3):
        total = 0.0
        for t, (obs, action, next_obs, reward, terminated) in enumerate(envs.steps):
            counted, total = counted + 1, total + float(reward[world])
            executed = np.clip(action[world].numpy() / envs.scale, -1, 1)  # the hopper's torques are in +-1
            if t < 14:
                rows.append((obs[world], torch.tensor(executed), next_obs[world]))
                rewards.append(reward[world])
                falls += int(terminated[world])
            if terminated[world]:
                break
        assert float(return_NE[world // 3, world % 3]) == pytest.approx(total, abs=1e-12)
    assert steps == counted < K * 3 * 15
    assert 0 < falls < K * 3
    assert len(rows) == steps - (K * 3 - falls)  # each episode that was not over before it loses its last step
    for name, column in zip(("obs", "action", "next_obs"), zip(*rows, strict=True), strict=True):
        close(data[name], torch.stack(column), 1e-14)
    assert not family.ended(data["obs"]).any()
    assert int(family.ended(data["next_obs"]).sum()) == falls
    assert 0.1 < (data["action"].abs() == 1).double().mean() < 0.9  # clipped
    paid = family.reward(data["obs"], data["action"], data["next_obs"], torch.ones(len(rows), 1))
    close(paid, torch.stack(rewards), 1e-12)


def test_real_transitions_against_gymnasium():
    """Its hopper, put into each observed state with the recorded torques, arrives where the data say."""
    _, (data, _, _) = hopper()
    single = gym.make("Hopper-v5").unwrapped
    single.reset(seed=0)
    for obs, action, next_obs in zip(*(data[name].numpy() for name in ("obs", "action", "next_obs")), strict=True):
        assert np.abs(obs[5:11]).max() < 10  # else the true velocity would not be observed
        single.set_state(np.concatenate([[0.0], obs[:5]]), obs[5:11])
        arrived, _, fell, _, info = single.step(action)
        np.testing.assert_allclose(next_obs, np.append(arrived, info["x_velocity"]), rtol=0, atol=1e-8)
        assert fell == bool(HopperForward.ended(torch.tensor(next_obs)))


def test_every_policy_plays_its_own_real_episodes():
    """As many as the flag says; policies that always do the same are recognised by it, in the family's units."""
    args = make_args()
    envs, _ = make_envs(args, Navigation2DEndless)
    theta = make_theta(args)
    policies = stack([theta] * K)
    policies |= {"w2": 0 * policies["w2"], "log_std": torch.full((K, 2), -20.0)}
    policies["b2"] = torch.tensor([[0.65, -0.26], [-1.0, 9.0], [0.0, -0.13]])
    data, return_NE, steps = play(envs, make_tasks(envs, args), policies, args, seeded(0))
    expected = torch.tensor([[0.05, -0.02], [-0.1 / 1.3, 0.1], [0.0, -0.01]]).repeat_interleave(2 * (T - 1), 0)
    close(data["action"], expected, 1e-5)  # the standard deviation is at least 1e-6
    close(data["next_obs"] - data["obs"], data["action"], 1e-12)
    assert return_NE.shape == (K, 2)
    assert steps == K * 2 * T


# ---------------------------------------------------------------------------------------------------------------------
# Imagination
# ---------------------------------------------------------------------------------------------------------------------


def fitted_navigation():
    """Models of real transitions, first fitted with long, then with short steps."""
    args = make_args(model_size=32, model_epochs=60, model_batch_size=50, model_lr=0.005, real_episodes=10, horizon=20)
    envs, imagined = make_envs(args, Navigation2DEndless)
    policies = stack([make_theta(args, seed) for seed in range(K)])
    data, _, _ = play(envs, make_tasks(envs, args), policies, args, seeded(0))
    unfitted = make_models(args, obs_size=2)
    models, _ = ours.fit_models(ALONE, unfitted, data, args, seeded(1))
    args.model_lr = 0.0005
    models, _ = ours.fit_models(ALONE, models, data, args, seeded(2))
    return imagined, models, unfitted, ours.measure(data)


def play_actions(envs, actions, tasks):
    obs, _ = envs.reset(seed=4, options={"tasks": tasks})
    positions, rewards = [obs], []
    for action in actions:
        obs, reward, terminated, _, _ = envs.step(action)
        assert not terminated.any()
        positions.append(obs)
        rewards.append(reward)
    return torch.stack(positions), torch.stack(rewards)


def test_imagination_in_fitted_models_is_like_the_real_world():
    """Five steps of the same actions, many of them clipped, from the same start: 0.4 away on average, and nowhere more
    than 0.05 apart (measured: 0.02); in unfitted models more than 0.2 (0.5)."""
    imagined, models, unfitted, scales = fitted_navigation()
    B = imagined.num_envs
    real = ScaleActions(Navigation2DEndless(B, 20, dtype=torch.float64), imagined.scale)
    tasks = real.unwrapped.sample_tasks(B, seeded(5))
    actions = torch.randn(5, B, 2, generator=seeded(6)) + torch.randn(B, 2, generator=seeded(7))
    expected = play_actions(real, actions, tasks)
    assert float((expected[0][-1] - expected[0][0]).norm(dim=-1).mean()) > 0.25
    for dynamics, near in ((models, True), (unfitted, False)):
        imagined.follow(partial(ours.predict, dynamics, scales), scales["low"] - 100, scales["high"] + 100)
        positions, rewards = play_actions(imagined, actions, tasks)
        assert torch.equal(positions[0], expected[0][0])
        apart = [float((x - y).abs().max()) for x, y in zip((positions, rewards), expected, strict=True)]
        assert max(apart) < 0.05 if near else min(apart) > 0.2


def test_each_model_imagines_its_own_episodes():
    """Those of policy k drift as model k does, are paid the family's rewards and end where its episodes do."""
    args = make_args()
    envs, imagined = make_envs(args)
    theta, tasks = make_theta(args), make_tasks(envs, args)
    follow(imagined, *drifting_models(DRIFTS))
    support = ours.collect(imagined, tasks, theta, args, seeded(1))
    move = (support.action * STEP / args.action_scale).clamp(-STEP, STEP)
    for k, e in itertools.product(range(K), range(E)):
        total, runs = 0.0, True
        for t in range(T):
            assert bool(support.mask[k, e, t]) == runs
            position = support.obs[k, e, t] + move[k, e, t] + torch.tensor(DRIFTS[k])
            if runs:
                total -= float((position - tasks[k]).norm())
                if t + 1 < T:
                    close(support.obs[k, e, t + 1], position, 1e-12)
                runs = bool(position[0] <= 0.3)
        assert float(support.reward[k, e].sum()) == pytest.approx(total, abs=1e-12)
    assert 0.5 < support.mask.mean() < 0.97


def test_imagination_ends_a_range_beyond_what_was_seen():
    """Only in the model that drifts out of the bounds, which were given with the models."""
    args = make_args(horizon=8)
    envs, imagined = make_envs(args, Navigation2DEndless)
    drift = [[0.0, 0.0], [0.0, 0.4], [0.0, -0.05]]
    follow(imagined, *drifting_models(drift, reach=1.5))
    support = ours.collect(imagined, make_tasks(envs, args), make_theta(args), args, seeded(1))
    assert support.mask[[0, 2]].eq(1).all()
    assert imagined.diverged_share == pytest.approx(1 / 3)
    for e in range(E):
        steps = int(support.mask[1, e].sum())
        assert steps in (3, 4, 5)  # of 0.3 to 0.5 each
        last = support.obs[1, e, steps - 1]
        move = (support.action[1, e, steps - 1] * STEP / args.action_scale).clamp(-STEP, STEP)
        assert float(last[1]) <= 1.5 < float((last + move)[1] + 0.4)
        assert support.obs[1, e, steps:].eq(last).all()


# ---------------------------------------------------------------------------------------------------------------------
# Adapted policies and the meta-gradient
# ---------------------------------------------------------------------------------------------------------------------


def test_adapted_policies_are_one_step_of_the_score_function():
    """theta + alpha grad mean(log pi A) in each model alone: at theta this is the ratio's gradient, too."""
    args = make_args(inner_lr=0.7)
    theta = make_theta(args)
    envs, imagined = make_envs(args)
    tasks = make_tasks(envs, args)
    follow(imagined, *drifting_models(DRIFTS))
    support = ours.collect(imagined, tasks, theta, args, seeded(1))
    params = ours.lvc_step(theta, support, args)
    expected = slow_adapted(theta, support, args, mean_score)
    assert list(params) == list(theta)
    for name in theta:
        close(params[name], expected[name], 1e-10)
        assert not torch.allclose(params[name][0], params[name][1], atol=1e-3)
    for k in range(K):
        obs, action, old, _ = running(support, k)
        close(log_prob(theta, obs, action), old, 1e-10)  # theta played, not what it became


@pytest.mark.parametrize("where", ["at theta", "away"])
def test_surrogates_and_policies_against_torch_distributions(where):
    args = make_args(inner_lr=0.7)
    sampled_from = make_theta(args)
    support, query = make_batches(args, sampled_from)
    theta = sampled_from if where == "at theta" else nearby(sampled_from, 0.2)
    J_N, (mean_NBA, std_N1A) = ours.imagined_surrogate(theta, [support], query, args)
    assert mean_NBA.shape == (K, E * T, 2)
    assert std_N1A.shape == (K, 1, 2)
    for k in range(K):
        params = slow_step(theta, support, k, args)
        close(J_N[k], mean_ratio(params, query, k).detach(), 1e-10)
        for e, t in itertools.product(range(E), range(T)):
            policy = slow_policy(params, query.obs[k, e, t])
            close(mean_NBA[k, e * T + t], policy.mean.detach(), 1e-10)
            close(std_N1A[k, 0], policy.stddev.detach(), 1e-10)
    # The query's probabilities are those of the adapted policies: at theta all ratios are 1, advantages have mean 0.
    assert (float(J_N.abs().max()) < 1e-10) == (where == "at theta")


@pytest.fixture
def detached_inner_step(monkeypatch):
    """The defect that the tests of gradients must see: no derivative through the inner step's gradient."""
    lvc_step = ours.lvc_step

    def detached(params, support, args, scale=1.0):
        moved = lvc_step(params, support, args, scale)
        return {name: value + (moved[name] - value).detach() for name, value in params.items()}

    return lambda: monkeypatch.setattr(ours, "lvc_step", detached)


@pytest.mark.parametrize("where", ["at theta", "away"])
def test_meta_gradient_against_central_differences(where, detached_inner_step, monkeypatch):
    args = make_args()
    sampled_from = make_theta(args)
    support, query = make_batches(args, sampled_from)
    theta = sampled_from if where == "at theta" else nearby(sampled_from)

    def objective(vector):
        params = ours.unflatten(vector, theta)
        terms = [mean_ratio(slow_step(params, support, k, args), query, k) for k in range(K)]
        return float(sum(terms).detach()) / K

    def mean_surrogate(vector):
        return ours.imagined_surrogate(ours.unflatten(vector, theta), [support], query, args)[0].mean()

    expected = central_differences(objective, flat(theta))
    assert relative_error(grad(mean_surrogate)(flat(theta)), expected) < 1e-6
    assert relative_error(meta_gradient(theta, [support], query, args, monkeypatch), expected) < 1e-6
    detached_inner_step()
    assert relative_error(grad(mean_surrogate)(flat(theta)), expected) > 1e-2


def test_without_an_inner_step_it_is_the_plain_policy_gradient(monkeypatch):
    """One policy for all models, and the mean over models of each one's policy gradient."""
    args = make_args(inner_lr=0.0)
    theta = make_theta(args)
    envs, imagined = make_envs(args)
    tasks, generator = make_tasks(envs, args), seeded(1)
    follow(imagined, *drifting_models(DRIFTS))
    support = ours.collect(imagined, tasks, theta, args, generator)
    params = ours.lvc_step(theta, support, args)
    for k in range(K):
        assert all(torch.equal(params[name][k], theta[name]) for name in theta)
    query = ours.collect(imagined, tasks, params, args, generator)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    score = sum(mean_score(leaves, query, k) for k in range(K)) / K
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(score, list(leaves.values()))])
    close(meta_gradient(theta, [support], query, args, monkeypatch), expected, 1e-10)


def test_a_meta_step_raises_the_surrogate_of_the_adapted_policies():
    """Evaluated on both sides by the reference, it is what the step reports."""
    args = make_args()
    theta = make_theta(args)
    support, query = make_batches(args, theta)
    moved, stats = ours.trpo_step(theta, ours.imagined_surrogate, [support], query, args)
    before, after = (
        sum(float(mean_ratio(slow_step(x, support, k, args), query, k).detach()) for k in range(K)) / K
        for x in (theta, moved)
    )
    assert stats["train/improvement"] == pytest.approx(after - before, rel=1e-6)
    assert after - before > 1e-3
    assert 0 < stats["train/kl"] <= args.max_kl


def test_nothing_after_an_early_end_matters():
    """Other observations and actions there, so improbable when drawn that a ratio would overflow, change no result."""
    args = make_args()
    sampled_from = make_theta(args)
    support, query = make_batches(args, sampled_from)
    theta, results = nearby(sampled_from), []
    for size in (0.0, 1.0):
        (s, q) = (
            batch._replace(
                obs=batch.obs + x[..., None], action=batch.action + x[..., None], log_prob=batch.log_prob - 1000 * x
            )
            for batch, x in ((batch, size * (1 - batch.mask)) for batch in (support, query))
        )
        moved, _ = ours.trpo_step(theta, ours.imagined_surrogate, [s], q, args)
        results.append((ours.imagined_surrogate(theta, [s], q, args)[0], flat(moved)))
    for plain, disturbed in zip(*results, strict=True):
        close(disturbed, plain, 1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def begin(args, seed=3):
    theta, models = make_theta(args), make_models(args, obs_size=2)
    start = {"iteration": 0, "env_steps": 0, "theta": theta, "models": models, "data": {}}
    return start | {"generator": seeded(seed).get_state()}


def begin_with_models(args):
    """Real worlds, imagined ones that follow models, and a policy, as train leaves them to evaluate."""
    envs, imagined = make_envs(args)
    follow(imagined, *drifting_models(DRIFTS))
    return envs, imagined, make_theta(args)


def tailored(imagined, tasks, adapted, support, args):
    """Model by model: the mean of log pi_theta - log pi_theta'_k on the support, and the returns in model k of its own
    policy and of the next model's, with the start states and noise that the first seed gives."""
    kl, returns = [], []
    for own in range(K):
        params = {name: x[own] for name, x in adapted.items()}
        mean, std = ours.policy(params, support.obs[own].flatten(0, 1))
        new = torch.distributions.Normal(mean, std).log_prob(support.action[own].flatten(0, 1)).sum(-1)
        runs = support.mask[own].flatten() > 0
        kl.append((support.log_prob[own].flatten() - new)[runs].mean())
    for shift in (0, 1):
        others = {name: torch.stack([x[(k + shift) % K] for k in range(K)]) for name, x in adapted.items()}
        returns.append(ours.rollout(imagined, tasks, others, args, seeded(0))["reward"].sum(-1))
    return {"train/inner_kl": torch.stack(kl), "train/own_minus_other": returns[0] - returns[1]}


def test_training_against_iterations_by_hand():
    """Two of them: theta plays first, then what it becomes in each model; the latest transitions are kept, all models
    are fitted to them, and each meta-step imagines anew, first with theta, then with the policies adapted to it."""
    args = make_args(iterations=2, data_size=40, cg_damping=1.0)  # conjugate gradients multiply rounding errors
    run, state = Recorder(args), begin(args)
    theta, models, data, steps = state["theta"], state["models"], {}, 0
    ours.train(*make_envs(args), args, run, state)
    envs, imagined = make_envs(args)
    tasks = envs.unwrapped.sample_tasks(1, seeded(args.seed)).repeat(K, 1)
    assert torch.equal(ours.real_task(envs, args), tasks)
    generator = seeded(3)

    def imagine(params):
        follow(imagined, models, ours.measure(data))
        return ours.collect(imagined, tasks, params, args, generator)

    for iteration, env_steps, stats in run.logged:
        params = slow_adapted(theta, imagine(theta), args) if iteration == 2 else theta
        new, returns, played = play(envs, tasks, params, args, generator)
        assert len(new["obs"]) < args.data_size
        data = {name: torch.cat([data[name], x])[-40:] if data else x for name, x in new.items()}
        models, expected = ours.fit_models(ALONE, models, data, args, generator)
        for _ in range(args.meta_steps):
            support = imagine(theta)
            adapted = slow_adapted(theta, support, args)
            query = imagine(adapted)
            diverged = imagined.diverged_share
            theta, step = ours.trpo_step(theta, ours.imagined_surrogate, [support], query, args)
            assert step["train/step"] > 0
        steps += played
        assert env_steps == steps
        totals = {"imagined_pre": support.reward.sum(-1), "imagined_post": query.reward.sum(-1), "return_post": returns}
        expected |= step | {f"train/{name}": float(x.mean()) for name, x in totals.items()}
        expected |= tailored(imagined, tasks, adapted, support, args)
        expected |= {"train/diverged": diverged} | ours.evaluate(envs, imagined, theta, args)
        assert stats == pytest.approx(summarise(expected), rel=1e-9)
    assert len(run.logged) == 2
    assert run.saved == [1, 2]
    assert 40 < steps < 2 * K * args.real_episodes * T  # some episodes ended early
    close(flat(state["theta"]), flat(theta), 1e-7)
    assert len(data["obs"]) == 40  # of more
    for name, value in data.items():
        close(state["data"][name], value, 1e-7)
    for name, value in models.items():
        close(state["models"][name], value, 1e-7)


@pytest.mark.parametrize("family", [Pit, Navigation2DEndless])
def test_the_first_iteration_plays_theta_and_the_next_adapted_policies(family, monkeypatch):
    args = make_args(iterations=2, data_size=1000)
    state, played, rollout = begin(args), [], ours.rollout
    theta = state["theta"]
    envs, imagined = make_envs(args, family)

    def spy(worlds, tasks, params, args, generator):
        result = rollout(worlds, tasks, params, args, generator)
        if worlds is envs:
            played.append((params, tasks, result))
        return result

    monkeypatch.setattr(ours, "rollout", spy)
    run = Recorder(args)
    ours.train(envs, imagined, args, run, state)
    # After each iteration's own episodes, two evaluations: of theta and of the policies adapted to the models.
    (first, tasks, _), unadapted, adapted, (second, same_tasks, _), *_ = played
    assert len(played) == 6
    assert all(torch.equal(first[name], theta[name]) for name in theta)
    assert [second["w0"].ndim, unadapted[0]["w0"].ndim, adapted[0]["w0"].ndim] == [3, 2, 3]
    assert not torch.allclose(second["w0"][0], second["w0"][1])
    assert torch.equal(tasks, same_tasks)
    assert tasks.shape == (K, 2)
    assert torch.equal(tasks[0], tasks[-1])
    steps = [int(played[i][2]["mask"].sum()) for i in (0, 3)]
    assert [env_steps for _, env_steps, _ in run.logged] == [steps[0], sum(steps)]  # none of the evaluations'
    if family is Navigation2DEndless:
        assert steps == [K * args.real_episodes * T] * 2
    assert len(state["data"]["obs"]) == sum(int(played[i][2]["mask"][:, :, :-1].sum()) for i in (0, 3))


def test_the_share_of_diverged_worlds_is_that_of_the_last_query(monkeypatch):
    """Models of such narrow bounds that some of the imagined worlds leave them."""
    args, shares, collect = make_args(iterations=1), [], ours.collect
    models, scales = drifting_models(DRIFTS, reach=0.35)
    monkeypatch.setattr(ours, "fit_models", lambda *_: (models, {}))
    monkeypatch.setattr(ours, "measure", lambda _: scales)

    def spy(imagined, *rest):
        batch = collect(imagined, *rest)
        ended = batch.mask[..., -1] == 0  # or in the very last step
        shares.append(imagined.diverged_share)
        assert float(ended.float().mean()) <= shares[-1] <= 1
        return batch

    monkeypatch.setattr(ours, "collect", spy)
    run = Recorder(args)
    ours.train(*make_envs(args, Navigation2DEndless), args, run, begin(args))
    *_, support, query, evaluation = shares
    assert run.logged[0][2]["train/diverged"] == query
    assert len({support, query, evaluation, 0.0, 1.0}) == 5


def test_the_kept_data_are_the_latest():
    args = make_args(iterations=3, data_size=35)
    run, state, kept = Recorder(args), begin(args), []
    run.save = lambda state: kept.append(state["data"])
    ours.train(*make_envs(args, Navigation2DEndless), args, run, state)
    new = K * args.real_episodes * (T - 1)  # 30 an iteration
    assert [len(data["obs"]) for data in kept] == [30, 35, 35]
    for earlier, later in itertools.pairwise(kept):
        for name in later:
            assert torch.equal(later[name][: 35 - new], earlier[name][-5:])
    close(kept[-1]["next_obs"], kept[-1]["obs"] + kept[-1]["action"], 1e-12)


def test_evaluation_by_hand():
    """Real episodes of theta and of the adapted policies, from equal start states and with equal noise: the task is
    that of the run's seed, starts and noise are those of the test set."""
    args = make_args(seed=5)
    envs, imagined, theta = begin_with_models(args)
    tasks = envs.unwrapped.sample_tasks(1, seeded(5)).repeat(K, 1)
    stats = summarise(ours.evaluate(envs, imagined, theta, args))
    generator = envs.unwrapped.test_set(K)[1]
    seed = int(torch.randint(2**31, (1,), generator=generator))
    support = ours.collect(imagined, tasks, theta, args, generator)
    policies, returns = (theta, slow_adapted(theta, support, args)), []
    for params in policies:
        returns.append(play(envs, tasks, params, args, seeded(seed))[1].numpy().flatten())
    gains = returns[1] - returns[0]
    assert stats.pop("test/gain_ci95") == pytest.approx(interval(gains, torch.arange(K * 2)[:, None]), rel=5e-4)
    assert stats == pytest.approx({f"test/return_k{k}": x.mean() for k, x in enumerate(returns)})
    assert abs(gains).max() > 1e-3


def test_evaluation_is_repeatable_and_paired():
    args = make_args()
    envs, imagined, theta = begin_with_models(args)
    models, _ = imagined.dynamics.args
    before = copy.deepcopy((models, theta))

    def evaluated(args):
        return summarise(ours.evaluate(envs, imagined, theta, args))

    first = evaluated(args)
    torch.rand(7)  # the global generator has no part in it
    assert evaluated(args) == first
    for old, new in zip(before, (models, theta), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    other = evaluated(make_args(seed=9))
    assert other != first
    still = evaluated(make_args(inner_lr=0.0))
    assert still["test/return_k0"] == first["test/return_k0"]
    assert still["test/return_k1"] == pytest.approx(still["test/return_k0"], abs=1e-12)
    assert still["test/gain_ci95"] == pytest.approx(0, abs=1e-12)


def test_a_resumed_run_is_the_same_run():
    args, saved = make_args(iterations=3), []
    whole, run = begin(args), Recorder(args)
    run.save = lambda state: saved.append(copy.deepcopy(state))
    ours.train(*make_envs(args), args, run, whole)
    resumed, again = copy.deepcopy(saved[0]), Recorder(args)
    ours.train(*make_envs(args), args, again, resumed)
    assert [logged[:2] for logged in again.logged] == [logged[:2] for logged in run.logged[1:]]
    assert again.logged[-1] == run.logged[-1]
    for part in ("theta", "models", "data"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])
