"""The mathematics of algos/reptile_ppo.py and algos/multitask_ppo.py against independent oracles, in float64: terms of
PPO one step at a time, central differences, loops over tasks and parts, Adam's formula, maml_trpo.py's inner step."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.func import grad

import envs as worlds
from algos import maml_trpo, multitask_ppo, promp, reptile_ppo
from envs import ScaleActions, TaskGiven, records, summarise
from tests.double_precision import ALONE, Recorder, flat, float64, interval, seeded  # noqa: F401 (float64 is used by being here)
from tests.test_maml_trpo_math import E, N, T, central_differences, close, ref_log_prob, ref_policy
from tests.test_promp_math import (
    SlowAdam,
    clone,
    make_envs,
    make_theta,
    nearby,
    part,
    slow_clipped,
    small_args,
    stack,
    unflatten,
)

both = pytest.mark.parametrize("ours", [reptile_ppo, multitask_ppo], ids=["reptile_ppo", "multitask_ppo"])


def make_batch(ours, args, theta, seed=0, given=False):
    envs = TaskGiven(make_envs(args)) if given else make_envs(args)
    tasks = envs.unwrapped.sample_tasks(args.meta_batch_size, seeded(seed))
    batch = ours.collect(envs, tasks, theta, args, seeded(seed))
    assert 0.5 < batch.mask.mean() < 0.97  # some episodes end early
    return batch


def begin(args, seed=3, theta=None):
    theta = make_theta(args) if theta is None else theta
    return {"iteration": 0, "env_steps": 0, "theta": theta, "generator": seeded(seed).get_state()}


# ---------------------------------------------------------------------------------------------------------------------
# Reference: one policy, one step of an episode at a time
# ---------------------------------------------------------------------------------------------------------------------


def slow_gain(params, batch, clip):
    """PPO's objective of episodes [E, T]."""
    terms, _ = slow_clipped(params, batch, clip)
    return sum(terms) / len(terms)


def slow_slope(params, batch, args, entropy_coef=0.0):
    """Gradient of PPO's objective with an entropy bonus."""
    params = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    entropy = (0.5 * math.log(2 * math.pi * math.e) + params["log_std"]).sum()
    J = slow_gain(params, batch, args.clip) + entropy_coef * entropy
    return dict(zip(params, torch.autograd.grad(J, list(params.values())), strict=True))


def slow_ppo(params, batch, args):
    """SGD on the batch of one task."""
    for _ in range(args.inner_epochs):
        slope = slow_slope(params, batch, args)
        params = {name: value + args.inner_lr * slope[name] for name, value in params.items()}
    return params


# ---------------------------------------------------------------------------------------------------------------------
# What both files share
# ---------------------------------------------------------------------------------------------------------------------


@both
def test_shared_parts_are_those_of_promp(ours):
    """Which tests/test_promp_math.py checks; in numbers, in case the text changes."""
    args = small_args(ours)
    theta, batch = nearby(make_theta(args)), make_batch(ours, args, make_theta(args))
    assert type(batch).__name__ == "Episodes"
    expected = make_batch(promp, args, make_theta(args))
    for x, y in zip(batch, expected, strict=True):
        close(x, y, 1e-12)
    close(ours.ratios(theta, batch), promp.ratios(theta, expected), 1e-12)
    theta, same = (x.init_policy(make_envs(args), 3, seeded(1)) for x in (ours, promp))
    assert torch.equal(flat(theta), flat(same))


@both
def test_gain_against_a_loop_over_steps(ours):
    args, seen = small_args(ours, clip=0.1), set()
    batch, theta = make_batch(ours, args, make_theta(args)), nearby(make_theta(args), 0.2)
    for i in range(N):
        close(ours.clipped_gain(theta, part(batch, i), args), slow_gain(theta, part(batch, i), 0.1), 1e-12)
        seen |= set(slow_clipped(theta, part(batch, i), 0.1)[1])
    assert seen == {(sign, beyond) for sign in (False, True) for beyond in (-1, 0, 1)}


@both
def test_gain_of_single_steps(ours):
    """As a function of the old density; all other steps are masked."""
    args = small_args(ours, clip=0.2)
    theta = make_theta(args)
    batch = part(make_batch(ours, args, theta), 0)
    batch = batch._replace(mask=torch.zeros_like(batch.mask).index_fill(1, torch.tensor([0]), 1.0))
    batch.mask[1:] = 0
    for advantage, ratio, expected in [
        (2, 1.1, 2.2), (2, 1.5, 2.4), (2, 0.5, 1.0), (-2, 1.1, -2.2), (-2, 1.5, -3.0), (-2, 0.5, -1.6),
    ]:  # fmt: skip
        one = batch._replace(advantage=advantage * batch.mask, log_prob=batch.log_prob - math.log(ratio))
        close(ours.clipped_gain(theta, one, args), torch.tensor(float(expected)), 1e-12)


@both
@pytest.mark.parametrize("estimator", ["score", "lvc"])
def test_one_epoch_is_the_inner_step_of_maml_trpo(ours, estimator):
    args = small_args(ours, inner_epochs=1)
    reference = maml_trpo.Args(estimator=estimator, inner_lr=args.inner_lr)
    theta = make_theta(args)
    first = make_batch(ours, args, theta)
    once = ours.ppo_step(theta, first, args)
    close(flat(once), flat(maml_trpo.adapt(theta, first, reference)), 1e-12)
    assert not torch.allclose(once["w0"][0], once["w0"][1])
    second = make_batch(ours, args, once, 1)  # from one policy per task
    close(flat(ours.ppo_step(once, second, args)), flat(maml_trpo.adapt(once, second, reference)), 1e-12)


@both
def test_several_epochs_against_a_loop_over_tasks(ours):
    args = small_args(ours, inner_epochs=4, inner_lr=0.5)
    theta = make_theta(args)
    first = make_batch(ours, args, theta)
    once = ours.ppo_step(theta, first, args)
    second = make_batch(ours, args, once, 1)
    twice = ours.ppo_step(once, second, args)
    assert list(once) == list(twice) == list(theta)
    for i in range(N):
        expected = slow_ppo(theta, part(first, i), args)
        assert any(beyond for _, beyond in slow_clipped(expected, part(first, i), args.clip)[1])
        close(flat(part_of(once, i)), flat(expected))
        close(flat(part_of(twice, i)), flat(slow_ppo(expected, part(second, i), args)))


def part_of(params, i):
    return {name: value[i] for name, value in params.items()}


@both
def test_several_epochs_against_central_differences(ours):
    args = small_args(ours, inner_epochs=3, inner_lr=0.5)
    theta = make_theta(args)
    batch = make_batch(ours, args, theta)
    moved, i, vector = ours.ppo_step(theta, batch, args), 1, flat(theta)
    for _ in range(3):
        vector = vector + 0.5 * central_differences(
            lambda x: float(slow_gain(unflatten(x, theta), part(batch, i), args.clip)), vector
        )
    close(flat(part_of(moved, i)), vector, 1e-8)


@both
def test_evaluate_adapts_by_whole_steps_and_leaves_theta(ours, monkeypatch):
    args = small_args(ours, inner_epochs=2)
    theta, envs, batches = make_theta(args), make_envs(args), []
    before, collect = clone(theta), ours.collect
    with monkeypatch.context() as patch:
        patch.setattr(ours, "collect", lambda *x: batches.append(collect(*x)) or batches[-1])
        stats, params = ours.evaluate(envs, theta, args)
    assert len(batches) == args.eval_steps + 1 == 4
    tasks, generator = make_envs(args).test_set(N)
    assert torch.equal(envs.tasks.view(N, E, 2)[:, 0], tasks)
    first = collect(make_envs(args), tasks, theta, args, generator)
    assert all(torch.equal(x, y) for x, y in zip(batches[0], first, strict=True))  # start states and noise, too
    for i in range(N):
        expected = theta
        for k, batch in enumerate(batches):
            runs = batch.mask[i] == 1
            replayed = ref_log_prob(expected, part(batch, i)).detach()  # who sampled the batch
            close(replayed[runs], batch.log_prob[i][runs])
            expected = slow_ppo(expected, part(batch, i), args) if k < 3 else expected
        close(flat(part_of(params, i)), flat(expected))
    returns = np.array([batch.reward.sum(-1).mean(1).numpy() for batch in batches])  # [k, N]
    gains = returns[3] - returns[0]
    expected = {f"test/return_k{k}": float(x.mean()) for k, x in enumerate(returns)}
    close(stats["test/gain_ci95"][0], torch.from_numpy(gains))
    stats = summarise(stats)
    assert stats["test/gain_ci95"] == pytest.approx(interval(gains, tasks), rel=1e-4)
    assert stats == pytest.approx(expected | {"test/tasks": N, "test/gain_ci95": stats["test/gain_ci95"]})
    assert all(torch.equal(theta[name], before[name]) for name in theta)
    torch.rand(7)  # the global generator has no part in it
    assert summarise(ours.evaluate(envs, theta, args)[0]) == stats
    other = small_args(ours, inner_epochs=2, seed=9)  # the test set is that of every run
    assert summarise(ours.evaluate(envs, theta, other)[0]) == stats


@both
def test_evaluation_leaves_training_alone(ours):
    def train(eval_every):
        args = small_args(ours, iterations=4, eval_every=eval_every)
        run = Recorder(args)
        envs, state = make_envs(args), begin(args)
        ours.train(envs, args, run, state)
        assert run.saved == [k for k in range(1, 5) if k % eval_every == 0]
        return state, [stats for _, _, stats in run.logged], summarise(ours.evaluate(envs, state["theta"], args)[0])

    often, log, last = train(1)
    rarely, short_log, again = train(4)
    assert ["test/return_k0" in stats for stats in short_log] == [True, False, False, True]
    assert all("test/return_k0" in stats for stats in log)
    assert torch.equal(flat(often["theta"]), flat(rarely["theta"]))
    assert torch.equal(often["generator"], rarely["generator"])
    assert last == again == {name: x for name, x in log[-1].items() if name in last}


@both
def test_a_resumed_run_equals_an_uninterrupted_one(ours):
    args, saved = small_args(ours, iterations=4, eval_every=2), []
    run, log = Recorder(args), Recorder(args)
    run.save = lambda state: saved.append(copy.deepcopy(state))
    whole = begin(args)
    given = whole["theta"]
    ours.train(make_envs(args), args, run, whole)
    assert torch.equal(flat(given), flat(make_theta(args)))  # the state that a run is given is not what it learns in
    resumed = copy.deepcopy(saved[0])
    ours.train(make_envs(args), args, log, resumed)
    assert torch.equal(flat(resumed["theta"]), flat(whole["theta"]))
    assert log.logged == run.logged[2:]


# ---------------------------------------------------------------------------------------------------------------------
# Reptile
# ---------------------------------------------------------------------------------------------------------------------


def test_reptile_against_iterations_by_hand():
    """theta + epsilon mean_i (phi_i - theta), one task after the other; epsilon falls, to 0 behind the last."""
    options = {"inner_steps": 3, "inner_epochs": 2, "inner_lr": 0.5, "outer_lr": 0.8, "iterations": 4}
    args = small_args(reptile_ppo, **options, eval_every=100)
    run, state = Recorder(args), begin(args)
    reptile_ppo.train(make_envs(args), args, run, state)
    envs, generator, theta, steps = make_envs(args), seeded(3), make_theta(args), 0
    for (iteration, env_steps, stats), epsilon in zip(run.logged, (0.8, 0.6, 0.4, 0.2), strict=True):
        tasks, policies, batches = envs.sample_tasks(N, generator, "train"), [theta] * N, []
        for _ in range(3):
            batches.append(maml_trpo.collect(envs, tasks, stack(policies), args, generator))
            policies = [slow_ppo(phi, part(batches[-1], i), args) for i, phi in enumerate(policies)]
        change = {name: sum(phi[name] - theta[name] for phi in policies) / N for name in theta}
        theta = {name: theta[name] + epsilon * change[name] for name in theta}
        steps += int(sum(batch.mask.sum() for batch in batches))
        assert env_steps == steps < iteration * 3 * N * E * T
        assert stats["train/change"] == pytest.approx(float(flat(change).norm()), rel=1e-6)
        assert stats["train/return_pre"] == pytest.approx(float(batches[0].reward.sum(-1).mean()), rel=1e-6)
        assert stats["train/return_post"] == pytest.approx(float(batches[2].reward.sum(-1).mean()), rel=1e-6)
    close(flat(state["theta"]), flat(theta), 1e-7)


def test_reptile_with_one_step_is_joint_training():
    """k = 1, one epoch, epsilon = 1: a policy gradient step on the mean over tasks of their objectives."""
    args = small_args(reptile_ppo, inner_steps=1, inner_epochs=1, outer_lr=1.0, iterations=1, inner_lr=0.3)
    run, state = Recorder(args), begin(args)
    reptile_ppo.train(make_envs(args), args, run, state)
    envs, generator, theta = make_envs(args), seeded(3), make_theta(args)
    batch = maml_trpo.collect(envs, envs.sample_tasks(N, generator, "train"), theta, args, generator)

    def joint(vector):
        log_prob = maml_trpo.batch_log_prob(unflatten(vector, theta), batch)
        return sum((log_prob[i] * batch.advantage[i]).sum() / batch.mask[i].sum() for i in range(N)) / N

    close(flat(state["theta"]), flat(theta) + 0.3 * grad(joint)(flat(theta)))
    assert run.logged[0][2]["train/return_pre"] == run.logged[0][2]["train/return_post"]


# ---------------------------------------------------------------------------------------------------------------------
# Multi-task PPO
# ---------------------------------------------------------------------------------------------------------------------


def multitask_args(**kwargs):
    return small_args(multitask_ppo, **{"epochs": 1, "minibatches": 1, "lr": 0.02, **kwargs})


def together(batch):
    """The episodes of all tasks in a row."""
    return type(batch)(*(torch.cat(list(x)) for x in batch))


def shortened(slope, bound):
    """The gradient, multiplied so that its norm over all parameters is at most `bound`."""
    norm = math.sqrt(sum(float(x.square().sum()) for x in slope.values()))
    return {name: x * min(1, bound / norm) for name, x in slope.items()}


@pytest.mark.parametrize("bound", [0.05, 100.0])
def test_one_step_of_adam_on_gain_and_entropy(bound):
    args = multitask_args(entropy_coef=0.3, max_grad_norm=bound)
    batch, theta = make_batch(multitask_ppo, args, make_theta(args)), nearby(make_theta(args))
    before, objects = clone(theta), dict(theta)
    slope = slow_slope(before, together(batch), args, 0.3)

    def objective(vector):
        params = unflatten(vector, before)
        entropy = Normal(0.0, params["log_std"].exp()).entropy().sum()
        return float(slow_gain(params, together(batch), args.clip) + 0.3 * entropy)

    close(flat(slope), central_differences(objective, flat(before)), 1e-8)
    optimizer = torch.optim.Adam(theta.values(), 123.0)
    stats = multitask_ppo.learn_all(ALONE, theta, optimizer, batch, args, 0.5, seeded(0))
    assert 0.05 < float(flat(slope).norm()) < 100
    used = shortened(slope, bound)
    close(flat(theta), flat(SlowAdam().step(before, used, 0.5 * 0.02)), 1e-5)
    close(-flat({name: x.grad for name, x in theta.items()}), flat(used), 1e-5)  # Adam alone hides the length
    assert all(theta[name] is objects[name] and not theta[name].requires_grad for name in theta)
    gain = float(slow_gain(before, together(batch), args.clip))
    assert abs(gain) > 1e-4
    policies = Normal(*ref_policy(before, batch.obs[0]))
    entropy = float(policies.entropy().sum(-1)[0, 0])
    assert summarise(stats) == pytest.approx({"train/gain": gain, "train/entropy": entropy})


def test_more_entropy_is_a_larger_deviation():
    args = multitask_args(entropy_coef=1.0)
    theta = make_theta(args)
    batch, before = make_batch(multitask_ppo, args, theta), clone(theta)
    batch = batch._replace(advantage=0 * batch.advantage)
    multitask_ppo.learn_all(ALONE, theta, torch.optim.Adam(theta.values(), 1.0), batch, args, 1.0, seeded(0))
    close(theta["log_std"], before["log_std"] + 0.02, 1e-6)
    assert all(torch.equal(theta[name], before[name]) for name in theta if name != "log_std")


@pytest.mark.parametrize("minibatches", [1, 3, 4, 5, 12])
def test_every_episode_is_in_one_part_of_every_epoch(minibatches, monkeypatch):
    args, parts = multitask_args(epochs=3, minibatches=minibatches), []
    theta, gain = make_theta(args), multitask_ppo.clipped_gain
    batch = make_batch(multitask_ppo, args, theta)
    batch = batch._replace(std=torch.arange(12.0).view(N, E))  # names the episodes
    monkeypatch.setattr(multitask_ppo, "clipped_gain", lambda *x: parts.append(x[1]) or gain(*x))
    multitask_ppo.learn_all(ALONE, theta, torch.optim.Adam(theta.values(), 1.0), batch, args, 1.0, seeded(0))
    assert len(parts) == 3 * minibatches
    epochs = []
    for epoch in range(3):
        names = [x.std.long().tolist() for x in parts[epoch * minibatches : (epoch + 1) * minibatches]]
        assert {len(x) for x in names} <= {12 // minibatches, -(-12 // minibatches)}
        epochs.append([name for minibatch in names for name in minibatch])
        assert sorted(epochs[-1]) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(12))
    for minibatch in parts:  # each with its own data
        for row, name in enumerate(minibatch.std.long().tolist()):
            episode = part(part(batch, name // E), name % E)
            assert all(torch.equal(x, y) for x, y in zip(part(minibatch, row), episode, strict=True))


def test_training_against_iterations_by_hand():
    """Adam's formula in every part of every epoch, a falling step size, and old densities throughout an iteration."""
    args = multitask_args(epochs=2, minibatches=3, iterations=4, entropy_coef=0.01, lr=0.04, eval_every=100)
    run, state = Recorder(args), begin(args)
    multitask_ppo.train(make_envs(args), args, run, state)
    envs, generator, theta, adam, steps = make_envs(args), seeded(3), make_theta(args), SlowAdam(), 0
    for (iteration, env_steps, stats), lr in zip(run.logged, (0.04, 0.03, 0.02, 0.01), strict=True):
        batch = maml_trpo.collect(envs, envs.sample_tasks(N, generator, "train"), theta, args, generator)
        for _ in range(2):
            order = torch.randperm(N * E, generator=generator)
            for rows in (order[:4], order[4:8], order[8:]):
                minibatch = type(batch)(*(torch.stack([x[k // E, k % E] for k in rows]) for x in batch))
                gain = slow_gain(theta, minibatch, args.clip)
                slope = slow_slope(theta, minibatch, args, 0.01)
                theta = adam.step(theta, shortened(slope, args.max_grad_norm), lr)
        steps += int(batch.mask.sum())
        assert env_steps == steps < iteration * N * E * T
        assert stats["train/gain"] == pytest.approx(float(gain), rel=1e-5)
        assert stats["train/return_pre"] == stats["train/return_post"]
        assert stats["train/return_pre"] == pytest.approx(float(batch.reward.sum(-1).mean()), rel=1e-6)
        assert any(beyond for _, beyond in slow_clipped(theta, minibatch, args.clip)[1])
    close(flat(state["theta"]), flat(theta), 1e-6)


def test_random_is_the_evaluation_of_the_initial_parameters():
    args = multitask_args(iterations=3, eval_every=100, inner_epochs=2)
    run, envs = Recorder(args), make_envs(args)
    multitask_ppo.train(envs, args, run, begin(args))
    expected, _ = multitask_ppo.evaluate(envs, make_theta(args), args)
    first, *others = (stats for _, _, stats in run.logged)
    expected = summarise(expected)
    random = {name: value for name, value in first.items() if name.startswith("random/")}
    assert random == {name.replace("test/", "random/"): value for name, value in expected.items()}
    assert {f"random/return_k{k}" for k in range(4)} < set(random)
    assert first["test/return_k0"] != random["random/return_k0"]  # that is behind the first iteration
    assert not any(name.startswith("random/") for stats in others for name in stats)
    resumed = Recorder(args)
    multitask_ppo.train(envs, args, resumed, begin(args) | {"iteration": 1})
    assert not any(name.startswith("random/") for _, _, stats in resumed.logged for name in stats)


def test_a_policy_that_is_given_the_task_sees_it():
    args = multitask_args(iterations=2, minibatches=2)
    envs = TaskGiven(ScaleActions(make_envs(args), 1.0))
    theta = multitask_ppo.init_policy(envs, 3, seeded(0))
    assert theta["w0"].shape == (2 + 2, 3)
    tasks = envs.unwrapped.sample_tasks(N, seeded(0))
    batch = multitask_ppo.collect(envs, tasks, theta, args, seeded(0))
    assert torch.equal(batch.obs[..., 2:], tasks[:, None, None].expand(N, E, T, 2))
    state = begin(args, theta=clone(theta))
    multitask_ppo.train(envs, args, Recorder(args), state)
    assert state["theta"]["w0"].sub(theta["w0"]).abs().min() > 1e-6  # of the task's columns, too
    other = multitask_ppo.collect(envs, tasks.flip(0), theta, args, seeded(0))
    assert not torch.allclose(other.action[:, :, 0], batch.action[:, :, 0])


@pytest.mark.parametrize("given", [False, True])
def test_main_gives_the_task_if_asked(given, monkeypatch):
    seen = []
    monkeypatch.setattr(records, "open_run", lambda *_, **__: nullcontext())
    monkeypatch.setattr(multitask_ppo, "train", lambda envs, args, run, state: seen.append((envs, state)))
    flags = ["--env-id", "Navigation2D-v0", "--meta-batch-size", "2", "--episodes-per-task", "2", "--action-scale", "3"]
    multitask_ppo.main([*flags, *(["--task-given"] if given else [])])
    ((envs, state),) = seen
    assert isinstance(envs, TaskGiven) == given
    assert state["theta"]["w0"].shape == (4 if given else 2, 64)
    assert envs.reset()[0].shape == (4, 4 if given else 2)
    assert float(envs.single_action_space.high[0]) == 3  # and scales actions
    assert isinstance(envs.unwrapped, worlds.navigation.Navigation2D)
