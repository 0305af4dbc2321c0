"""benchmark/peer_ppo_family.py computes what algos/promp.py, reptile_ppo.py and multitask_ppo.py compute."""

import gymnasium as gym
import pytest
import torch
from torch import Generator
from torch.optim import Adam

from algos import multitask_ppo, promp, reptile_ppo
from benchmark import peer_ppo_family as peer
from envs import ScaleActions


def small(ours, **kwargs):
    """Sizes, worlds in float64, a policy that is not the start one, and tasks."""
    sizes = {"meta_batch_size": 3, "episodes_per_task": 4, "horizon": 7, "hidden_size": 5, "action_scale": 3.0}
    args = ours.Args(**sizes, **kwargs)
    settings = {"max_episode_steps": args.horizon, "dtype": torch.float64}
    worlds = ScaleActions(gym.make_vec(args.env_id, 12, "vector_entry_point", **settings), args.action_scale)
    generator = Generator().manual_seed(3)
    theta = ours.init_policy(worlds, args.hidden_size, generator)
    theta = {name: x.double() + 0.1 * torch.randn(x.shape, generator=generator) for name, x in theta.items()}
    return args, worlds, theta, worlds.unwrapped.sample_tasks(3, generator), generator


def episodes(batch, i: int) -> peer.Episodes:
    """A task's part of our batch."""
    total = batch.reward[i].sum(-1)
    return peer.Episodes(batch.obs[i], batch.action[i], batch.log_prob[i], batch.advantage[i], total)


def copy(theta: dict) -> dict:
    return {name: value.clone().requires_grad_() for name, value in theta.items()}


def assert_same_change(new: dict, other: dict, theta: dict):
    for name, value in theta.items():
        assert (new[name] - value).abs().max() > 1e-6
        torch.testing.assert_close(other[name].detach(), new[name].detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_promp_updates_agree(inner_steps):
    args, worlds, theta, tasks, generator = small(promp, inner_steps=inner_steps, kl_coef=0.1, outer_lr=0.01, clip=0.05)
    params, batches = theta, []
    for _ in range(inner_steps):
        batches.append(promp.collect(worlds, tasks, params, args, generator))
        params = promp.inner_step(params, batches[-1], args)[0]
    batches.append(promp.collect(worlds, tasks, params, args, generator))
    new, own = {name: value.clone() for name, value in theta.items()}, copy(theta)
    etas = [args.kl_coef] * inner_steps
    stats = promp.meta_update(new, Adam(new.values(), 0.01), batches[:-1], batches[-1], args, etas)
    assert stats["train/kl_k0"] > 1e-6 < stats["train/clipped"]
    lists = [[episodes(batch, i) for batch in batches] for i in range(3)]
    old, _ = promp.repeat_inner_steps(theta, batches[:-1], args)
    shape = args.episodes_per_task, args.horizon, 6
    policies = [[peer.gaussian(x.mean[i].reshape(*shape), x.stddev[i].reshape(*shape)) for x in old] for i in range(3)]
    peer.promp_update(own, Adam(own.values(), 0.01), lists, policies, args)
    assert_same_change(new, own, theta)


def test_reptile_steps_agree(monkeypatch):
    args, worlds, theta, tasks, generator = small(reptile_ppo, inner_steps=2, outer_lr=0.5, clip=0.05)
    params, batches = theta, []
    for _ in range(2):
        batches.append(reptile_ppo.collect(worlds, tasks, params, args, generator))
        params = reptile_ppo.ppo_step(params, batches[-1], args)
    new = {name: value + 0.5 * (params[name].mean(0) - value) for name, value in theta.items()}
    given = iter([episodes(batch, i) for i in range(3) for batch in batches])
    monkeypatch.setattr(peer, "collect", lambda *_: next(given))
    own = copy(theta)
    peer.reptile_ppo(None, own, args)(tasks)
    assert_same_change(new, own, theta)


def test_multitask_updates_agree(monkeypatch):
    args, worlds, theta, tasks, generator = small(multitask_ppo, entropy_coef=0.1, clip=0.05, seed=5)
    batch = multitask_ppo.collect(worlds, tasks, theta, args, generator)
    new, own = {name: value.clone() for name, value in theta.items()}, copy(theta)
    multitask_ppo.learn_all(worlds, new, Adam(new.values(), args.lr), batch, args, 1.0, Generator().manual_seed(5))
    given = iter([episodes(batch, i) for i in range(3)])
    monkeypatch.setattr(peer, "collect", lambda *_: next(given))
    peer.multitask_ppo(None, own, args)(tasks)
    assert_same_change(new, own, theta)


@pytest.mark.parametrize("name", peer.ITERATIONS)
def test_an_iteration_samples_each_task_with_its_own_policy(name, monkeypatch):
    ours = {"promp": promp, "reptile_ppo": reptile_ppo, "multitask_ppo": multitask_ppo}[name]
    args, _, theta, tasks, _ = small(ours)
    theta = {key: value.float().requires_grad_() for key, value in theta.items()}
    seen, collect = [], peer.collect

    def noted(worlds, task, params, args):
        seen.append((float(task[0]), {key: value.detach().clone() for key, value in params.items()}))
        return collect(worlds, task, params, args)

    monkeypatch.setattr(peer, "collect", noted)
    before = {key: value.detach().clone() for key, value in theta.items()}
    peer.ITERATIONS[name](peer.make(args.env_id, 4, 3.0), theta, args)(tasks.numpy())
    batches = {"promp": 2, "reptile_ppo": 4, "multitask_ppo": 1}[name]
    assert [task for task, _ in seen] == [float(task[0]) for task in tasks for _ in range(batches)]
    for k, (_, params) in enumerate(seen):
        assert torch.equal(params["w0"], before["w0"]) == (k % batches == 0)
    assert not torch.equal(theta["w0"], before["w0"])
