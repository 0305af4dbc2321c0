"""benchmark/peer_maml_trpo.py computes what algos/maml_trpo.py computes; benchmark/speed.py runs."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import grad

import envs  # noqa: F401  registers the tasks
from envs.core import ScaleActions

ROOT = Path(__file__).resolve().parent.parent


def load(path: str):
    spec = importlib.util.spec_from_file_location("peer_test_" + Path(path).stem, ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ours, peer, speed = (load(path) for path in ("algos/maml_trpo.py", "benchmark/peer_maml_trpo.py", "benchmark/speed.py"))


def small(env_id: str, **kwargs):
    """Sizes, worlds in float64, and a policy that is not the start one."""
    sizes = {"meta_batch_size": 3, "episodes_per_task": 4, "horizon": 7, "hidden_size": 5, "fisher_fraction": 1.0}
    args = ours.Args(env_id=env_id, **(sizes | {"action_scale": 3.0, "seed": 3} | kwargs))
    mode, worlds = "vector_entry_point", args.meta_batch_size * args.episodes_per_task
    batch = gym.make_vec(env_id, worlds, mode, max_episode_steps=args.horizon, dtype=torch.float64)
    batch = ScaleActions(batch, args.action_scale)
    generator = torch.Generator().manual_seed(args.seed)
    theta = ours.init_policy(batch, args.hidden_size, generator)
    theta = {
        name: value.double() + 0.1 * torch.randn(value.shape, generator=generator) for name, value in theta.items()
    }
    return args, batch, theta, generator


def ours_and_peers_data(args, batch, theta, generator):
    """The same episodes in both shapes; what the peer computes from observations and rewards is the peer's own."""
    tasks, params, batches = batch.unwrapped.sample_tasks(args.meta_batch_size, generator), theta, []
    for k in range(args.inner_steps + 1):
        params = ours.adapt(params, batches[-1], args) if k else theta
        batches.append(ours.collect(batch, tasks, params, args, generator))
    lists = [
        [peer.Episodes(x.obs[i], x.action[i], x.log_prob[i], x.advantage[i], x.reward[i].sum(-1)) for x in batches]
        for i in range(args.meta_batch_size)
    ]
    return batches, lists


@pytest.mark.parametrize("env_id", peer.ENVS)
def test_single_worlds_move_as_the_batch_does(env_id):
    args, batch, _, generator = small(env_id)
    batch.unwrapped.horizon = 20
    task = batch.unwrapped.sample_tasks(1, generator)
    obs, _ = batch.reset(seed=0, options={"tasks": task.expand(batch.num_envs, -1)})
    single = peer.make(env_id, batch.num_envs, args.action_scale)
    single.call("set_task", task[0].numpy())
    single_obs, _ = single.reset(seed=0)
    if env_id.startswith("HalfCheetah"):
        for env, state in zip(single.envs, batch.unwrapped._state.numpy(), strict=True):
            env.unwrapped.set_state(state[1:10], state[10:])
        single_obs = obs.numpy()
    np.testing.assert_allclose(obs, single_obs)
    for _ in range(20):
        action = 3 * torch.randn(batch.action_space.shape, generator=generator, dtype=torch.float64)
        obs, reward, *_ = batch.step(action)
        single_obs, single_reward, *_ = single.step(action.numpy())
        np.testing.assert_allclose(obs, single_obs, rtol=0, atol=1e-8)
        np.testing.assert_allclose(reward, single_reward, rtol=0, atol=1e-8)


def test_advantages_agree():
    args, batch, theta, generator = small("HalfCheetahDir-v0", gae_lambda=0.9)
    tasks, rewards, step = batch.unwrapped.sample_tasks(3, generator), [], batch.step

    def recorded(action):
        result = step(action)
        rewards.append(result[1].view(3, -1))
        return result

    batch.step = recorded
    episodes, reward = ours.collect(batch, tasks, theta, args, generator), torch.stack(rewards, -1)
    for i in range(3):
        own = peer.advantages(episodes.obs[i].numpy(), reward[i].numpy(), args)
        np.testing.assert_allclose(episodes.advantage[i], own, rtol=0, atol=1e-6)


def test_collected_episodes_are_consistent():
    args, _, theta, _ = small("HalfCheetahDir-v0")
    single = peer.make(args.env_id, args.episodes_per_task, args.action_scale)
    params = {name: value.float().requires_grad_() for name, value in theta.items()}
    (support, query), _ = peer.sample(single, np.array([[1.0], [-1.0]]), params, args)
    for episodes, own in ((support, params), (query, peer.adapt(params, support, args, False))):
        assert episodes.obs.shape == (4, 7, 18)
        assert episodes.action.shape == (4, 7, 6)
        torch.testing.assert_close(peer.policy(own, episodes.obs).log_prob(episodes.action), episodes.log_prob)
    velocity, cost = support.obs[:, 1:, -1], 0.05 * (support.action / 3).clamp(-1, 1).square().sum(-1)
    assert torch.allclose(support.total, (velocity.sum(1) - cost.sum(1)).double(), atol=2)  # but for the last velocity
    assert not torch.equal(support.obs[:, 0], query.obs[:, 0])


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("variant", [{}, {"estimator": "score"}, {"first_order": True}])
def test_gradient_fisher_product_and_step_agree(inner_steps, variant):
    args, batch, theta, generator = small("HalfCheetahDir-v0", inner_steps=inner_steps, **variant)
    batches, lists = ours_and_peers_data(args, batch, theta, generator)
    vector = torch.cat([value.flatten() for value in theta.values()])

    def objective(vector):
        return ours.surrogate(ours.unflatten(vector, theta), batches[:-1], batches[-1], args)[0].mean()

    leaves = peer.set_vector(theta, vector)
    surrogate, kl, _ = peer.losses(leaves, lists, args)
    gradient = peer.flatten(torch.autograd.grad(surrogate, list(leaves.values()), retain_graph=True))
    torch.testing.assert_close(grad(objective)(vector), gradient, rtol=1e-9, atol=1e-11)

    v = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    own = ours.fisher_product(theta, ours.surrogate, batches[:-1], batches[-1], args)(v)
    torch.testing.assert_close(own, peer.fisher_product(kl, leaves, args.cg_damping)(v), rtol=1e-9, atol=1e-11)

    new, stats = ours.trpo_step(theta, ours.surrogate, batches[:-1], batches[-1], args)
    peer_new, peer_stats = peer.trpo_step(leaves, lists, args)
    assert peer_stats["step"] == stats["train/step"] > 0
    assert peer_stats["improvement"] == pytest.approx(stats["train/improvement"], rel=1e-5)
    assert peer_stats["kl"] == pytest.approx(stats["train/kl"], rel=1e-5)
    for name, value in new.items():
        torch.testing.assert_close(value, peer_new[name].detach(), rtol=1e-5, atol=1e-7)


def asked(search, answers: torch.Tensor) -> tuple[float, list[tuple[float, bool]]]:
    """What a line search finds where its k-th question is answered by answers[k], and what it asked."""
    questions, found = [], iter(answers.tolist())

    def is_allowed(fraction):
        questions.append((fraction, next(found)))
        return questions[-1][1]

    return search(is_allowed), questions


def test_line_searches_agree():
    generator = torch.Generator().manual_seed(0)
    fractions = set()
    for chance in torch.linspace(0, 1, 200).tolist():
        answers = torch.rand(15, generator=generator) < chance
        assert asked(peer.line_search, answers) == asked(ours.longest_allowed, answers)
        fractions.add(asked(peer.line_search, answers)[0])
    assert len(fractions) > 20
    assert 0 in fractions


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


@pytest.mark.parametrize("seed", range(4))
def test_a_share_of_the_query_keeps_the_direction_and_a_share_of_the_support_does_not(seed):
    """The directions of a step by the default fraction and by all episodes, by double backward.

    The inner step is so long that the derivative through it decides: on other supports the policies would adapt
    elsewhere, and their KL is another function of theta. Which part of the support is taken shows in it far more than
    which part of the query.
    """
    long_steps = {"inner_lr": 5.0, "action_scale": 10.0}
    sizes = {"meta_batch_size": 20, "episodes_per_task": 20, "horizon": 20, "hidden_size": 8}
    args, batch, theta, generator = small("Navigation2DEndless-v0", seed=seed, **sizes, **long_steps)
    args.fisher_fraction = ours.Args().fisher_fraction
    batches, lists = ours_and_peers_data(args, batch, theta, generator)
    leaves = peer.set_vector(theta, peer.flatten(theta.values()))
    surrogate, _, _ = peer.losses(leaves, lists, args)
    gradient = peer.flatten(torch.autograd.grad(surrogate, list(leaves.values())))

    def direction(lists):
        _, kl, _ = peer.losses(leaves, lists, args)
        return peer.conjugate_gradient(peer.fisher_product(kl, leaves, args.cg_damping), gradient)

    def first(episodes, count):
        return peer.Episodes(*(x[:count] for x in episodes))

    exact = direction(lists)
    fisher = ours.fisher_product(theta, ours.surrogate, batches[:-1], batches[-1], args)
    own, _ = ours.conjugate_gradient(fisher, gradient)
    assert cosine(own, exact) > 0.99
    for fraction in (0.1, 0.25):  # of both, as it was before
        count = round(fraction * args.episodes_per_task)
        both = direction([[first(episodes, count) for episodes in task] for task in lists])
        assert cosine(both, exact) < 0.8
    all_queries, _ = ours.conjugate_gradient(
        ours.fisher_product(theta, ours.surrogate, batches[:-1], batches[-1], replace(args, fisher_fraction=1.0)),
        gradient,
    )
    assert cosine(all_queries, exact) > 1 - 1e-6


@pytest.mark.parametrize("env_id", peer.ENVS)
def test_speed_prints_one_line(env_id, monkeypatch, capsys):
    flags = f"maml_trpo --peer --env-id {env_id} --meta-batch-size 2 --episodes-per-task 3 --horizon 5 --iterations 1"
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split()])
    speed.main()
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    for name in ("physics", "sampling", "end_to_end", "peer_sampling", "peer_end_to_end"):
        assert result[f"{name}_steps_per_s"] > 0
    assert result["sample_s"] > 0 < result["update_s"]
    assert result["steps_per_batch"] == 30
    assert result["args"]["hidden_size"] == 100


@pytest.mark.parametrize(
    ("name", "steps"),
    [("promp", 60), ("reptile_ppo", 120), ("multitask_ppo", 30), ("multitask_ppo --task-given", 30)],
)
def test_speed_of_the_ppo_family(name, steps, monkeypatch, capsys):
    flags = (
        f"{name} --env-id Navigation2DEndless-v0 --meta-batch-size 2 --episodes-per-task 3 --iterations 1 --horizon 5"
    )
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split()])
    speed.main()
    result = json.loads(capsys.readouterr().out)
    iteration_s = result["sample_s"] + result["update_s"]
    assert result["end_to_end_steps_per_s"] == pytest.approx(steps / iteration_s, rel=1e-3)
    assert not any("peer" in key for key in result)
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split(), "--peer"])
    if "--task-given" in flags:
        with pytest.raises(SystemExit, match="--peer: none is written for --task-given"):
            speed.main()
        return
    speed.main()
    result = json.loads(capsys.readouterr().out)
    for name in ("", "peer_"):
        seconds = steps / result[f"{name}end_to_end_steps_per_s"]
        assert seconds == pytest.approx(result[f"{name}sample_s"] + result[f"{name}update_s"], rel=1e-3)
        assert result[f"{name}sample_s"] > 0 < result[f"{name}update_s"]
