"""benchmark/peer_rl2.py computes what algos/rl2_ppo.py computes; benchmark/speed.py runs."""

import json
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Generator

from algos import rl2_ppo as ours
from algos import rl2_transformer_ppo as attention
from benchmark import peer_rl2 as peer
from benchmark import speed
from envs import ScaleActions, Trials
from envs.locomotion import AntDir, HalfCheetahVel

# (family, whether its single worlds come from gym.make); AntDir and MouseCheese end some episodes early
CASES = [("Bandit5-v0", False), ("HalfCheetahVel-v0", False)]
CASES += [(name, True) for name in ("Bandit5-v0", "HalfCheetahVel-v0", "MouseCheese-v0", "AntDir-v0")]
each_case = pytest.mark.parametrize(("env_id", "from_gym"), CASES, ids=str)


@pytest.fixture(autouse=True)
def _no_chance_in_start_states(monkeypatch):
    for family in (HalfCheetahVel, AntDir):
        monkeypatch.setattr(family, "start_noise", 0.0)


def small(env_id: str, from_gym: bool, monkeypatch, **kwargs):
    """Sizes, trials in float64, tasks that leave nothing to chance, and a network that is not the start one."""
    if from_gym:
        monkeypatch.setattr(peer, "WORLDS", {})
    sizes = {
        "meta_batch_size": 6,
        "minibatches": 2,
        "episodes_per_trial": 3,
        "horizon": 30 if "Ant" in env_id else 9,
        "hidden_size": 5,
    }
    args = ours.Args(env_id=env_id, action_scale=1.5, **(sizes | kwargs))
    settings = {"max_episode_steps": args.horizon, "dtype": torch.float64}
    envs = gym.make_vec(env_id, args.meta_batch_size, "vector_entry_point", **settings)
    envs = Trials(envs if envs.is_discrete else ScaleActions(envs, args.action_scale), args.episodes_per_trial)
    generator = Generator().manual_seed(4)
    theta = ours.init_network(envs, args, generator)
    theta = {name: x.double() + 0.2 * torch.randn(x.shape, generator=generator) for name, x in theta.items()}
    if env_id == "AntDir-v0":
        theta["log_std"] += 3  # strong enough to fall
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator)
    if env_id.startswith("Bandit"):
        tasks_NP = tasks_NP.round()
    if env_id == "MouseCheese-v0":
        tasks_NP[::2, 4:] = tasks_NP.new_tensor([1.0, 2.0])  # beside the start
    return args, envs, theta, tasks_NP, generator


def single_worlds(env_id: str, from_gym: bool, args):
    worlds = peer.make(env_id, args.meta_batch_size, args, **({"dtype": torch.float64} if from_gym else {}))
    for env in worlds.envs if (env_id, from_gym) == ("HalfCheetahVel-v0", False) else ():
        env.unwrapped._reset_noise_scale = 0.0
    return worlds


def as_batch(steps: ours.Steps) -> peer.Batch:
    """Our trials [N, S, ..] in the peer's shape [S, N, ..]."""
    x, action, log_prob, mask, advantage, target = (value.transpose(0, 1) for value in steps)
    start = torch.zeros_like(mask)
    start[0] = 1
    return peer.Batch(x, action, log_prob, start, mask, advantage, target)


def other(theta: dict) -> dict:
    """Weights that differ from those that played, so that ratios do, and some are clipped."""
    generator = Generator().manual_seed(8)
    return {name: x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in theta.items()}


@each_case
def test_trials_log_probs_values_and_advantages_agree(env_id, from_gym, monkeypatch):
    args, envs, theta, tasks_NP, generator = small(env_id, from_gym, monkeypatch)
    steps, _ = ours.play_trials(envs, tasks_NP, theta, args, generator)
    own = as_batch(steps)
    actions = iter(own.action)
    monkeypatch.setattr(peer, "draw", lambda policy: next(actions))
    batch = peer.collect(single_worlds(env_id, from_gym, args), tasks_NP.numpy(), peer.agent_like(theta), args)
    assert not list(actions)
    ends = args.episodes_per_trial * args.horizon * args.meta_batch_size - int(batch.mask.sum())
    assert (ends > 0) == (env_id in ("MouseCheese-v0", "AntDir-v0"))
    assert torch.equal(batch.mask, own.mask)
    assert torch.equal(batch.start, own.start)
    is_step = own.mask > 0
    for name in ("x", "log_prob", "advantage", "target"):  # target - advantage before it is normalised: the value
        expected, found = getattr(own, name)[is_step], getattr(batch, name)[is_step]
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    states, _ = peer.agent_like(theta).states(own.x, own.start, torch.zeros(6, 5, dtype=torch.float64))
    value = ours.actor_critic(theta, ours.recurrent(theta, steps.x, {}, args)[0])[1]
    torch.testing.assert_close(peer.agent_like(theta).heads(states)[1].T, value, rtol=1e-9, atol=1e-11)


@each_case
def test_loss_and_gradient_agree(env_id, from_gym, monkeypatch):
    args, envs, theta, tasks_NP, generator = small(env_id, from_gym, monkeypatch)
    steps, _ = ours.play_trials(envs, tasks_NP, theta, args, generator)
    weights = {name: value.requires_grad_() for name, value in other(theta).items()}
    loss, parts = ours.ppo_loss(weights, steps, args, args.entropy_coef)
    gradient = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    agent = peer.agent_like(weights)
    peer_loss = peer.ppo_loss(agent, as_batch(steps), args, args.entropy_coef)
    peer_loss.backward()
    assert parts["kl"] > 1e-4
    torch.testing.assert_close(peer_loss, loss, rtol=1e-9, atol=1e-11)
    assert {peer.NAMES[name] for name, _ in agent.named_parameters()} == set(theta)
    for name, parameter in agent.named_parameters():
        assert gradient[peer.NAMES[name]].abs().max() > 1e-7
        torch.testing.assert_close(parameter.grad, gradient[peer.NAMES[name]], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("env_id", ["Bandit5-v0", "MouseCheese-v0", "AntDir-v0"])
def test_updates_agree(env_id, monkeypatch):
    args, envs, theta, tasks_NP, generator = small(env_id, True, monkeypatch, minibatches=4)
    steps, _ = ours.play_trials(envs, tasks_NP, theta, args, generator)
    agent, before = peer.agent_like(theta), {name: value.clone() for name, value in theta.items()}
    optimizers = [torch.optim.Adam(x, args.lr, eps=1e-5) for x in (theta.values(), agent.parameters())]
    for remaining in (1.0, 0.6):
        ours.ppo(envs, theta, optimizers[0], steps, args, remaining, Generator().manual_seed(5))
        peer.update(agent, optimizers[1], as_batch(steps), args, remaining, Generator().manual_seed(5))
    for name, parameter in agent.named_parameters():
        own = theta[peer.NAMES[name]]
        assert (own - before[peer.NAMES[name]]).abs().max() > args.lr
        torch.testing.assert_close(parameter.detach(), own, rtol=1e-7, atol=1e-9)


@each_case
def test_collected_trials_are_consistent(env_id, from_gym, monkeypatch):
    args, envs, theta, tasks_NP, _ = small(env_id, from_gym, monkeypatch)
    discrete = envs.unwrapped.is_discrete
    agent = peer.agent_like({name: value.float() for name, value in theta.items()})
    worlds = peer.make(env_id, args.meta_batch_size, args)
    worlds.reset(seed=1)
    batch = peer.collect(worlds, tasks_NP.numpy(), agent, args)
    states, _ = agent.states(batch.x, batch.start, torch.zeros(6, 5))
    log_prob = agent.heads(states)[0].log_prob(batch.action).detach()
    torch.testing.assert_close(log_prob * batch.mask, batch.log_prob * batch.mask, rtol=1e-4, atol=1e-5)
    again = peer.collect(worlds, tasks_NP.numpy(), agent, args)
    rows = min(len(batch.action), len(again.action))
    assert not torch.equal(again.action[:rows], batch.action[:rows])  # other noise
    previous = torch.nn.functional.one_hot(batch.action, 5 if "Bandit" in env_id else 4) if discrete else batch.action
    A, later = previous.shape[2], batch.mask[1:] > 0
    assert torch.equal(batch.x[1:, :, -2 - A : -2][later], previous[:-1][later].float())
    assert not batch.x[0, :, -2 - A :].any()
    done = batch.x[..., -1] * batch.mask
    assert done.sum(0).tolist() == [args.episodes_per_trial - 1] * args.meta_batch_size


def test_worlds_written_for_numpy_pay_with_the_tasks_probabilities():
    args = ours.Args(meta_batch_size=400, episodes_per_trial=10, horizon=1)
    worlds = peer.make("Bandit5-v0", 400, args)
    worlds.set_attr("task", [np.array([0.1, 0.8, 0.5, 0.5, 0.5])] * 400)
    worlds.reset(seed=2)
    for arm, probability in ((0, 0.1), (1, 0.8)):
        worlds.reset()
        rewards = np.stack([worlds.step(np.full(400, arm))[1] for _ in range(10)])
        assert set(rewards.ravel()) == {0.0, 1.0}
        assert abs(rewards.mean() - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5
        assert rewards.std(axis=0).any()
        assert rewards.std(axis=1).any()


def speed_line(flags: str, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split()])
    speed.main()
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("env_id", ["Bandit5-v0", "HalfCheetahVel-v0", "MouseCheese-v0"])
def test_speed_prints_one_line_with_the_peer(env_id, monkeypatch, capsys):
    flags = f"rl2_ppo --peer --env-id {env_id} --meta-batch-size 5 --minibatches 2 --horizon 3 --episodes-per-trial 2"
    flags += " --iterations 2"
    result = speed_line(flags, monkeypatch, capsys)
    for name in ("sampling", "end_to_end", "peer_sampling", "peer_end_to_end"):
        assert result[f"{name}_steps_per_s"] > 0
    rate = result["steps_per_batch"] / (result["sample_s"] + result["update_s"])
    assert rate / 2 < result["end_to_end_steps_per_s"] < 2 * rate  # medians of two iterations
    rate = result["end_to_end_steps_per_s"] / result["peer_end_to_end_steps_per_s"]
    assert result["speedup_end_to_end"] == pytest.approx(rate, rel=1e-3)
    assert 0 < result["peer_env_s"] < result["peer_sample_s"]
    assert result["cpu_speedup_end_to_end"] > 0 < result["peer_update_s"]
    assert result["steps_per_batch"] <= 30
    assert (result["peer_tasks"], result["peer_iterations"]) == (5, 1)
    assert result["peer_worlds"] == ("gym.make" if env_id == "MouseCheese-v0" else "benchmark/peer_rl2.py")
    assert result["args"]["hidden_size"] == 64


@pytest.mark.parametrize("env_id", ["Bandit5-v0", "HalfCheetahVel-v0"])
@pytest.mark.parametrize("encoder", attention.ENCODERS)
def test_attention_without_a_cache_agrees(env_id, encoder, monkeypatch):
    args, envs, _, tasks_NP, generator = small(env_id, False, monkeypatch)
    known = {name: value for name, value in vars(args).items() if hasattr(attention.Args, name)}
    args = attention.Args(**known | {"encoder": encoder, "hidden_size": 16})
    theta = attention.init_network(envs, args, generator)
    theta = {name: x.double() + 0.2 * torch.randn(x.shape, generator=generator) for name, x in theta.items()}
    steps, _ = attention.play_trials(envs, tasks_NP, theta, args, generator)
    encode = partial(attention.ENCODERS[encoder], args=args)
    own, agent = as_batch(steps), peer.AttentionAgent(theta, encode)
    actions = iter(own.action)
    monkeypatch.setattr(peer, "draw", lambda policy: next(actions))
    batch = peer.collect(single_worlds(env_id, False, args), tasks_NP.numpy(), agent, args)
    for name in ("x", "log_prob", "advantage", "target"):
        assert getattr(own, name).std() > 0.01
        torch.testing.assert_close(getattr(batch, name), getattr(own, name), rtol=1e-8, atol=1e-9)
    weights = {name: value.requires_grad_() for name, value in other(theta).items()}
    loss, _ = attention.ppo_loss(weights, steps, args, args.entropy_coef)
    loss.backward()
    agent = peer.AttentionAgent(other(theta), encode)
    peer.ppo_loss(agent, own, args, args.entropy_coef).backward()
    for name, parameter in agent.theta.items():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("flags", ["rl2_ppo", "rl2_ppo --encoder lstm", "rl2_transformer_ppo --encoder snail"])
def test_speed_without_a_peer(flags, monkeypatch, capsys):
    flags += " --meta-batch-size 6 --minibatches 2 --episodes-per-trial 4 --horizon 2"
    result = speed_line(flags + " --iterations 2", monkeypatch, capsys)
    assert result["algorithm"] == flags.split()[0]
    assert result["steps_per_batch"] == 48
    assert result["sample_s"] > 0 < result["update_s"]
    assert result["cpu_s_per_iteration"] > 0
    assert not [name for name in result if "peer" in name]
    if "lstm" in flags:
        with pytest.raises(SystemExit, match="not for lstm"):
            speed_line(flags + " --peer", monkeypatch, capsys)
    if "snail" in flags:
        result = speed_line(flags + " --peer --iterations 2", monkeypatch, capsys)
        assert result["peer_sample_s"] > result["peer_env_s"] > 0 < result["peer_update_s"]
