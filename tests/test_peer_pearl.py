"""benchmark/peer_pearl.py computes what algos/pearl_sac.py computes; benchmark/speed.py runs."""

import json
import math
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from double_precision import float64, seeded  # noqa: F401

from algos import pearl_sac as ours
from benchmark import peer_pearl as peer
from benchmark import speed
from benchmark.speed_pearl import peer_like, report
from envs import ScaleActions
from envs.locomotion import AntDir, HalfCheetahVel

KINDS = {"plain": {}, "temperature": {"auto_entropy": True, "entropy_coef": 0.3}, "next_obs": {"next_obs": True}}
SPARSE = {"dense_training": True, "horizon": 20}


@pytest.fixture(autouse=True)
def _no_chance_in_start_states(monkeypatch):
    for family in (HalfCheetahVel, AntDir):
        monkeypatch.setattr(family, "start_noise", 0.0)


def small(env_id: str, **kwargs):
    """Sizes that all differ, worlds and a state in float64, networks whose last layers are not near 0."""
    sizes = {"train_tasks": 7, "tasks_per_iteration": 3, "meta_batch_size": 4, "batch_size": 11, "context_size": 6}
    sizes |= {"latent_size": 2, "hidden_size": 5, "horizon": 9, "replay_size": 40, "initial_episodes": 2}
    args = ours.Args(env_id=env_id, **(sizes | kwargs))
    settings = {"max_episode_steps": args.horizon, "dtype": torch.float64}
    envs = ScaleActions(gym.make_vec(env_id, args.tasks_per_iteration, "vector_entry_point", **settings), 1.0)
    generator = seeded(3)
    state = ours.init_state(envs, args, generator) | {"env_steps": 0}
    for part in ("theta", "target"):  # the targets become other networks than the critics
        state[part] = {name: x + 0.2 * torch.randn(x.shape, generator=generator) for name, x in state[part].items()}
    return args, envs, state, generator


def agent_like(state: dict, args, envs) -> peer.Agent:
    return peer_like(state, args, *envs.single_observation_space.shape, *envs.single_action_space.shape)


def parameters(agent: peer.Agent) -> dict:
    """The peer's parameters, their gradients on them, under our names."""
    networks = {"encoder": agent.encoder, "policy": agent.policy, "q1": agent.critics[0], "q2": agent.critics[1]}
    networks |= {"target_q1": agent.targets[0], "target_q2": agent.targets[1]}
    found = {
        f"{part}_{kind}{i}": getattr(layer, {"w": "weight", "b": "bias"}[kind])
        for part, network in networks.items()
        for i, layer in enumerate(module for module in network if hasattr(module, "weight"))
        for kind in "wb"
    }
    return found | {"log_alpha": agent.log_alpha}


def all_of(state: dict) -> dict:
    return state["theta"] | {f"target_{name}": x for name, x in state["target"].items()}


def fill(state: dict, args, generator) -> None:
    """Random transitions in all buffers, some of which end an episode; rewards and rewards to train on differ."""
    for name in ("replay", "recent"):
        for field in COLUMNS[:-1]:
            state[name][field].normal_(generator=generator)
        state[name]["ended"][:] = torch.rand(state[name]["ended"].shape, generator=generator) < 0.3
        state[name]["mask"].fill_(1)
        state[name]["count"] += torch.arange(args.train_tasks) + 5


COLUMNS = "obs", "action", "reward", "next_obs", "training_reward", "ended"  # of the peer's buffers, in its order


def columns(of, *index) -> dict[str, np.ndarray]:
    """What the peer's buffers hold, of a buffer of ours or of Transitions: a column [B, ..] for each name."""
    fields = of if isinstance(of, dict) else of._asdict()
    rows = {name: fields[name][index].numpy() for name in COLUMNS}
    return {name: x.reshape(len(x), -1) for name, x in rows.items()}


def hide(context: dict[str, np.ndarray], args) -> dict[str, np.ndarray]:
    """What the encoder must not look at is not a number."""
    seen = ("obs", "action", "reward", "next_obs")[: 4 if args.next_obs else 3]
    return {name: x if name in seen else np.full_like(x, math.nan) for name, x in context.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_agree(kind, monkeypatch):
    updates = 3
    args, envs, state, generator = small("HalfCheetahVel-v0", updates=updates, lr=0.01, tau=0.1, **KINDS[kind])
    fill(state, args, generator)
    agent, before, drawn = agent_like(state, args, envs), {k: x.clone() for k, x in all_of(state).items()}, []
    assert tuple(agent.replay[0].columns) == COLUMNS

    loss = ours.pearl_loss
    monkeypatch.setattr(ours, "pearl_loss", lambda *x: drawn.append(x[2:5]) or loss(*x))
    optimizer = torch.optim.Adam(state["theta"].values(), args.lr, fused=True)
    ours.learn(envs, state, optimizer, args, seeded(5), pause=lambda done: None)
    assert len(drawn) == updates

    noises, samples = [], []
    for batch, context, noise_of in drawn:
        for i in range(args.meta_batch_size):
            noises += [noise_of[name][i] for name in ("z", "next_action", "action")]
            samples += [hide(columns(context, i), args), columns(batch, i)]
    noises, samples = iter(noises), iter(samples)

    def sample(buffer, size):
        values = next(samples)
        assert {len(x) for x in values.values()} == {size}
        return values

    def noise(shape, like):
        value = next(noises)
        assert value.shape == shape
        return value

    monkeypatch.setattr(peer.Buffer, "sample", sample)
    monkeypatch.setattr(peer, "noise", noise)
    peer.learn(agent, updates)
    assert not [*noises, *samples]
    found, expected = parameters(agent), all_of(state)
    assert set(expected) | {"log_alpha"} == set(found)
    for name, value in expected.items():
        assert (value - before[name]).abs().max() > 1e-4
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-8, atol=1e-10)
        if not name.startswith("target"):  # Adam's steps would hide a factor
            torch.testing.assert_close(found[name].grad, value.grad, rtol=1e-7, atol=1e-10)


def test_the_peers_buffers_hold_the_same_transitions():
    args, envs, state, generator = small("HalfCheetahVel-v0", context_size=2000)
    fill(state, args, generator)
    state["replay"]["count"][2] = 57  # around the end
    agent = agent_like(state, args, envs)
    for buffers, own in ((agent.replay, state["replay"]), (agent.recent, state["recent"])):
        R = own["mask"].shape[1]
        for task, (buffer, count) in enumerate(zip(buffers, own["count"].tolist(), strict=True)):
            assert (buffer.size, buffer.count, buffer.top) == (R, min(count, R), count % R)
            rows = np.concatenate(list(buffer.sample(2000).values()), 1)
            assert rows.dtype == np.float64
            expected = np.concatenate(list(columns(own, task, slice(count)).values()), 1)
            assert np.array_equal(np.unique(rows, axis=0), np.unique(expected, axis=0))
    parts = [np.full(column.shape[1], 7.0) for column in agent.replay[2].columns.values()]
    agent.replay[2].add(*parts)
    assert agent.replay[2].columns["obs"][57 % 40, 0] == 7
    assert agent.replay[2].top == 18
    agent.replay[2].clear()
    agent.replay[2].add(*parts)
    assert (agent.replay[2].sample(9)["action"] == 7).all()


def test_meta_batches_are_of_different_tasks(monkeypatch):
    args, envs, state, _ = small("HalfCheetahVel-v0", meta_batch_size=7)
    seen = []
    monkeypatch.setattr(peer, "update", lambda agent, tasks: seen.append(tasks.tolist()))
    peer.learn(agent_like(state, args, envs), 4)
    assert [sorted(tasks) for tasks in seen] == [list(range(7))] * 4


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize(
    ("env_id", "own", "flags"),
    [
        ("HalfCheetahVel-v0", False, {}),
        ("HalfCheetahVel-v0", True, {}),
        ("HalfCheetahVel3-v0", True, {"next_obs": True}),
        ("SparseNavigation2D-v0", False, SPARSE),
        ("AntDir-v0", False, {"horizon": 60, "replay_size": 100}),
    ],
    ids=str,
)
def test_collected_transitions_agree(env_id, own, flags, context, monkeypatch):
    args, envs, state, generator = small(env_id, **flags)
    if "Ant" in env_id:
        state["theta"]["policy_b3"][8:] += 1.5  # strong enough to fall
    if "Sparse" in env_id:
        state["tasks"][:] = torch.tensor([0.1, 0.1])  # within reach
    fill(state, args, generator)
    index_N, size, contexts, z_noise, noise_TNA = torch.tensor([4, 0, 5]), 6 * context, [], [], []
    agent, start = agent_like(state, args, envs), {name: state[name]["count"].clone() for name in ("replay", "recent")}

    prior, posterior, act = ours.sample_prior, ours.sample_posterior, ours.act

    def record_noise(generator):
        again = torch.Generator()
        again.set_state(generator.get_state())
        z_noise.append(torch.randn(len(index_N), args.latent_size, generator=again))

    def recorded_prior(tasks_NP, args, generator):
        record_noise(generator)
        return prior(tasks_NP, args, generator)

    def recorded_posterior(theta, context, args, generator):
        contexts.append(context)
        record_noise(generator)
        return posterior(theta, context, args, generator)

    monkeypatch.setattr(ours, "sample_prior", recorded_prior)
    monkeypatch.setattr(ours, "sample_posterior", recorded_posterior)
    monkeypatch.setattr(ours, "act", lambda theta, obs, z, noise: noise_TNA.append(noise) or act(theta, obs, z, noise))
    ours.collect_episodes(envs, index_N, state, args, generator, from_prior=not context)
    assert len(contexts) == context

    env = peer.make(env_id, args, own, **({} if own else {"dtype": torch.float64}))
    if own:
        env.unwrapped._reset_noise_scale = 0.0
    env.reset(seed=0)
    steps = 0
    for i, index in enumerate(index_N.tolist()):
        noises = iter([z_noise[0][i], *(noise_NA[i][None] for noise_NA in noise_TNA)])

        def sample(buffer, asked, i=i, index=index):
            assert buffer is agent.recent[index]
            assert asked == size
            return hide(columns(contexts[0], i), args)

        monkeypatch.setattr(peer.Buffer, "sample", sample)
        monkeypatch.setattr(peer, "noise", lambda shape, like, noises=noises: next(noises).reshape(shape))
        steps += peer.collect(env, agent, index, state["tasks"][index].numpy(), size)
    assert steps == state["env_steps"]
    assert (steps < 3 * args.horizon) == ("Ant" in env_id)
    for buffers, name in ((agent.replay, "replay"), (agent.recent, "recent")):
        for index in range(args.train_tasks):
            buffer = buffers[index]
            assert (state[name]["count"][index] > start[name][index]) == (index in index_N)
            assert buffer.count == min(int(state[name]["count"][index]), buffer.size)
            expected = columns(state[name], index)
            assert tuple(buffer.columns) == tuple(expected) == COLUMNS
            for found, column in zip(buffer.columns.values(), expected.values(), strict=True):
                np.testing.assert_allclose(found, column, rtol=1e-7, atol=1e-8)


def test_the_report_is_of_medians_for_whole_iterations():
    args = ours.Args(updates=4000)
    watch = speed.Stopwatch(speed.Options("pearl_sac"), args)
    times = {"steps": 1200, "collect": 2, "collect_cpu": 3, "update": 5, "update_cpu": 6}  # of blocks of 50
    times |= {"peer_steps": 400, "peer_collect": 4, "peer_collect_cpu": 5, "peer_env": 3}
    times |= {"peer_update": 20, "peer_update_cpu": 21}
    for name, value in times.items():
        watch.times[name] = [1e9, value, value / 3, 7 * value]  # one that warms up, and outliers
    result = report(args, watch)
    expected = {"env_steps_per_s": 600, "collect_s": 2, "collect_cpu_s": 3, "updates_per_s": 10, "update_ms": 100}
    expected |= {"update_cpu_ms": 120, "iteration_s": 402, "iteration_cpu_s": 483}
    expected |= {"peer_env_steps_per_s": 100, "peer_collect_s": 12, "peer_collect_cpu_s": 15, "peer_env_s": 9}
    expected |= {"peer_updates_per_s": 2.5, "peer_update_ms": 400, "peer_update_cpu_ms": 420}
    expected |= {"peer_iteration_s": 1612, "peer_iteration_cpu_s": 1695}
    expected |= {"speedup_update": 4, "speedup_collecting": 6, "speedup_end_to_end": 1612 / 402}
    expected |= {"cpu_speedup_update": 3.5, "cpu_speedup_collecting": 5, "cpu_speedup_end_to_end": 1695 / 483}
    assert result == pytest.approx(expected, rel=1e-4)


def speed_line(flags: str, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split()])
    torch.set_default_dtype(torch.float32)
    speed.main()
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


TINY = " --train-tasks 4 --tasks-per-iteration 3 --meta-batch-size 2 --batch-size 8 --context-size 5 --hidden-size 8"
TINY += " --initial-episodes 1 --horizon 5 --replay-size 50 --updates 3 --iterations 2"


@pytest.mark.parametrize("env_id", ["HalfCheetahVel3-v0", "SparseNavigation2D-v0"])
def test_speed_prints_one_line_with_the_peer(env_id, monkeypatch, capsys):
    result = speed_line(f"pearl_sac --peer --env-id {env_id}{TINY} --peer-tasks 2", monkeypatch, capsys)
    assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))
    kinds = [f"{cpu}speedup_{what}" for cpu in ("", "cpu_") for what in ("update", "collecting", "end_to_end")]
    times = [
        f"{who}{name}"
        for who in ("", "peer_")
        for name in ("env_steps_per_s", "collect_s", "collect_cpu_s", "updates_per_s", "update_ms", "update_cpu_ms")
    ]
    assert all(result[name] > 0 for name in kinds + times)
    assert (result["updates_per_block"], result["steps_per_iteration"], result["peer_tasks"]) == (3, 30, 2)
    for who in ("", "peer_"):
        assert result[f"{who}updates_per_s"] == pytest.approx(1e3 / result[f"{who}update_ms"], rel=1e-3)
        assert result[f"{who}env_steps_per_s"] == pytest.approx(30 / result[f"{who}collect_s"], rel=1e-3)
        whole = result[f"{who}collect_s"] + 3e-3 * result[f"{who}update_ms"]
        assert result[f"{who}iteration_s"] == pytest.approx(whole, rel=1e-3)
    names = {"update": "update_ms", "collecting": "collect_s", "end_to_end": "iteration_s"}
    for what, name in names.items():
        assert result[f"speedup_{what}"] == pytest.approx(result[f"peer_{name}"] / result[name], rel=1e-3)
    assert 0 < result["peer_env_s"] < result["peer_collect_s"]
    assert ("speedup_collecting_own" in result) == env_id.startswith("HalfCheetah")


def test_speed_measures_a_block_of_updates_and_all_flags_reach_the_file(monkeypatch, capsys):
    result = speed_line(f"pearl_sac{TINY} --env-id Navigation2D-v0 --updates 1000 --auto-entropy", monkeypatch, capsys)
    assert result["updates_per_block"] == 50
    whole = result["collect_s"] + result["update_ms"]  # 1000 updates
    assert result["iteration_s"] == pytest.approx(whole, rel=1e-3)
    assert result["args"]["auto_entropy"] is True
    assert result["args"]["updates"] == 1000
    assert not [name for name in result if "peer" in name or "speedup" in name]


def test_no_peer_for_worlds_that_gym_make_does_not_know(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="Meta-World"):
        speed_line("pearl_sac --peer --env-id Meta-World/reach-v3", monkeypatch, capsys)
