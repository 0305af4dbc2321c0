"""The peers of meta_critic, lirpg and lifetime_rewards compute what algos/ computes; benchmark/speed.py runs.

Ours trains for some iterations by its own `train()`. What chance decided there (choices, noise, start states, tasks,
newborn networks, the order of minibatches) is written down and given to the peer, which trains from the same first
networks. Afterwards all networks are the same.
"""

import json
import sys
from itertools import chain

import gymnasium as gym
import numpy as np
import pytest
import torch
from double_precision import Recorder, float64, seeded  # noqa: F401 (float64 is used by being here)

from algos import lifetime_rewards, lirpg, meta_critic
from benchmark import peer_lifetime_rewards, peer_lirpg, peer_meta_critic, speed
from envs import Lifetimes, ScaleActions

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def close(found, expected):
    torch.testing.assert_close(found.detach(), expected.detach(), **CLOSE)


class Noted(gym.vector.VectorWrapper):
    """Worlds that write down the actions, the first observations of episodes, and the tasks of lifetimes."""

    def __init__(self, envs):
        super().__init__(envs)
        self.actions, self.born, self.fell, self.late = [], [], [], []
        self.starts, self.tasks = {}, {}

    def begin(self, obs):
        """Call when train() is about to begin."""
        for events in (self.actions, self.born, self.fell, self.late):
            events.clear()
        for i, (x, task) in enumerate(zip(obs, self.env._task, strict=True)):
            self.starts[i], self.tasks[i] = [x.numpy()], [task.numpy()]

    def step(self, action):
        obs, reward, ended, late, info = self.env.step(action)
        self.actions.append(action.clone())
        self.born.append(info["born"])
        self.fell.append(ended)
        self.late.append(late & ~ended)
        for i in range(self.num_envs):
            if ended[i] or late[i]:
                self.starts[i].append(obs[i].numpy())
            if info["born"][i]:
                self.tasks[i].append(self.env._task[i].numpy())
        return obs, reward, ended, late, info

    def save_worlds(self):
        return self.env.save_worlds()

    def load_worlds(self, saved):
        obs = self.env.load_worlds(saved)
        self.begin(obs)
        return obs


def worlds(env_id: str, number: int, horizon: int, episodes: int) -> Noted:
    settings = {"max_episode_steps": horizon, "dtype": torch.float64}
    envs = gym.make_vec(env_id, number, "vector_entry_point", **settings)
    return Noted(Lifetimes(envs if envs.is_discrete else ScaleActions(envs, 1.0), episodes))


def state_of(args, made: dict, generator) -> dict:
    state = {"iteration": 0, "env_steps": 0, "seconds": 0.0, "generator": generator.get_state()}
    return state | made


def in_order_of_worlds(envs: Noted, steps: int):
    """The actions, as a loop over worlds needs them that takes `steps` steps of one, then of the next one."""
    blocks = torch.stack(envs.actions).split(steps)
    return chain.from_iterable(block.T.flatten().tolist() for block in blocks)


def replay(envs: Noted, i: int, world, monkeypatch) -> None:
    """Let a single world have the tasks and start states of the i-th of ours."""
    tasks, starts = iter(envs.tasks[i]), iter(envs.starts[i])
    monkeypatch.setattr(world, "draw_task", lambda: next(tasks))
    if hasattr(world.unwrapped, "start"):
        monkeypatch.setattr(world.unwrapped, "start", lambda: next(starts))


def changed(new: dict, old: dict, least: float) -> None:
    """Each of the tensors has moved, so that agreement means something."""
    for name, x in new.items():
        assert (x - old[name]).abs().max() > least, name


# ---------------------------------------------------------------- single worlds


FAMILIES = {
    "CartPoleLength-v0": peer_meta_critic.WORLDS,
    "CartPoleFixed-v0": peer_lirpg.WORLDS,
    "SymABC-v0": peer_lifetime_rewards.WORLDS,
    "RandomABC-v0": peer_lifetime_rewards.WORLDS,
    "HalfCheetahForward-v0": peer_lirpg.WORLDS,
}


def single_worlds(env_id: str, starts: torch.Tensor, horizon: int, monkeypatch) -> list[gym.Env]:
    """The peer's worlds, which begin as ours did."""
    made = [gym.wrappers.TimeLimit(FAMILIES[env_id][env_id](), horizon) for _ in starts]
    for world, start in zip(made, starts, strict=True):
        if hasattr(world.unwrapped, "start"):
            monkeypatch.setattr(world.unwrapped, "start", lambda start=start: start.numpy())
        world.unwrapped._reset_noise_scale = 0.0  # of cheetahs
    return made


@pytest.mark.parametrize("env_id", FAMILIES)
def test_single_worlds_are_ours(env_id, monkeypatch):
    is_cheetah, number, generator = env_id.startswith("HalfCheetah"), 40, seeded(2)
    horizon = 10 if is_cheetah else 60  # cheetahs are chaotic
    envs = gym.make_vec(env_id, number, "vector_entry_point", max_episode_steps=horizon, dtype=torch.float64)
    if is_cheetah:
        monkeypatch.setattr(type(envs), "start_noise", 0.0)
    tasks = envs.sample_tasks(number, generator)
    obs, _ = envs.reset(seed=1, options={"tasks": tasks})
    singles = single_worlds(env_id, obs, horizon, monkeypatch)
    for world, task, first in zip(singles, tasks, obs, strict=True):
        np.testing.assert_allclose(world.reset(options={"task": task.numpy()})[0], first, rtol=1e-12)
    running, checked, rewards = set(range(number)), 0, []
    for _ in range(horizon):
        if is_cheetah:
            action = 2 * torch.randn(number, 6, generator=generator)  # some beyond the bounds
        else:
            action = torch.randint(int(envs.single_action_space.n), (number,), generator=generator)
        obs, reward, ended, late, _ = envs.step(action)
        for i in sorted(running):
            own, paid, own_ended, own_late, _ = singles[i].step(action[i].numpy())
            np.testing.assert_allclose(own, obs[i], rtol=1e-7, atol=1e-8)
            assert paid == pytest.approx(float(reward[i]), rel=1e-7, abs=1e-8)
            assert (bool(own_ended), bool(own_late)) == (bool(ended[i]), bool(late[i]))
            rewards.append(paid)
            checked += 1
            if own_ended or own_late:
                running.remove(i)
    assert not running
    assert checked > 300
    assert is_cheetah == (checked == number * horizon), "episodes end early where they can"
    assert "CartPole" in env_id or np.std(rewards) > 0.01


def test_poles_start_as_ours():
    world = peer_meta_critic.CartPole()
    world.reset(seed=1)
    starts = np.stack([world.reset()[0] for _ in range(200)])
    assert (starts.max(0) > 0.045).all()
    assert (starts.min(0) < -0.045).all()
    assert abs(starts).max() <= 0.05


# ---------------------------------------------------------------- whole training runs


def meta_critic_run(monkeypatch, iterations=10):
    """Ours and the peer after some iterations in which episodes end early and late, and lifetimes end."""
    args = meta_critic.Args(
        meta_batch_size=4, window_size=9, horizon=25, lifetime=2, hidden_size=5, critic_size=7, iterations=iterations,
        gamma=0.9, td_lambda=0.7,
    )  # fmt: skip
    envs, generator, fresh = worlds(args.env_id, 4, args.horizon, args.lifetime), seeded(3), []
    phi = meta_critic.init_critics(envs, count=1, latent_size=args.latent_size, args=args, generator=generator)
    made = meta_critic.init_learners(envs, phi, args, generator)
    births = torch.tensor([0, 1, 0, 1])
    envs.reset(seed=1, options={"episode": births})
    first = state_of(args, made | {"worlds": envs.save_worlds()}, generator)
    init_actors = meta_critic.init_actors

    def noted_actors(*inputs, **named):
        fresh.append(init_actors(*inputs, **named))
        return fresh[-1]

    state = dict(first)
    monkeypatch.setattr(meta_critic, "init_actors", noted_actors)
    monkeypatch.setattr(meta_critic, "evaluate", lambda *_, **__: {})
    meta_critic.train(envs, None, None, args, Recorder(args), state)

    actions = in_order_of_worlds(envs, args.window_size)
    monkeypatch.setattr(peer_meta_critic, "draw", lambda logits: next(actions))
    create, number = peer_meta_critic.lifetimes, {}

    def replaying(*inputs):
        made = create(*inputs)
        for i, world in enumerate(made):
            replay(envs, i, world, monkeypatch)
        return made

    def newborn(pupil):
        actor = new_actor(pupil)
        peer_meta_critic.load_layers(actor, fresh[number["iteration"]], learner.pupils.index(pupil))
        return actor

    new_actor = peer_meta_critic.new_actor
    monkeypatch.setattr(peer_meta_critic, "lifetimes", replaying)
    monkeypatch.setattr(peer_meta_critic, "new_actor", newborn)
    learner = peer_meta_critic.make(first, envs, args, 4)
    for i, pupil in enumerate(learner.pupils):
        pupil.world.episode = int(births[i])
    for number["iteration"] in range(iterations):
        assert peer_meta_critic.iterate(learner) == 4 * 9
    assert not [*actions]
    return envs, first, state, learner


def test_meta_critics_agree(monkeypatch):
    envs, first, state, learner = meta_critic_run(monkeypatch)
    fell, late, born = (torch.stack(events) for events in (envs.fell, envs.late, envs.born))
    assert fell.any()
    assert late.any()
    assert born.any(0).all(), "every actor has been replaced"
    assert not born.view(-1, 9, 4).any(1).all(0).any(), "but not in each window"
    critic, phi = learner.critic, state["phi"]
    changed(phi, first["phi"], 1e-4)
    expected = {"lstm.weight_ih_l0": "w_x", "lstm.weight_hh_l0": "w_h", "lstm.bias_ih_l0": "b_x"}
    expected |= {"lstm.bias_hh_l0": "b_h"}
    found = dict(critic.named_parameters())
    for own, name in expected.items():
        close(found.pop(own), phi[name])
    close(found.pop("latent.weight").T, phi["w_z"])
    close(found.pop("latent.bias"), phi["b_z"])
    for i in range(3):
        close(found.pop(f"network.{2 * i}.weight").T, phi[f"w{i}"][0])
        close(found.pop(f"network.{2 * i}.bias"), phi[f"b{i}"][0, 0])
    assert not found
    changed(state["theta"], first["theta"], 1e-3)
    for n, pupil in enumerate(learner.pupils):
        close(pupil.trace, state["trace"][n])
        for i, layer in enumerate(pupil.actor[::2]):
            close(layer.weight.T, state["theta"][f"w{i}"][n])
            close(layer.bias, state["theta"][f"b{i}"][n, 0])


def lifetimes_run(monkeypatch, env_id: str, iterations=6, **flags):
    sizes = {"meta_batch_size": 5, "episodes_per_lifetime": 3, "horizon": 8, "steps": 4, "unroll": 3}
    sizes |= {"policy_size": 6, "hidden_size": 7, "inner_lr": 2.0, "inner_max_norm": 0.2, "entropy_coef": 0.05}
    args = lifetime_rewards.Args(env_id=env_id, **sizes | {"iterations": 9} | flags)
    envs, generator, fresh = worlds(env_id, 5, args.horizon, 3), seeded(4), []
    made = lifetime_rewards.init_lifetimes(envs, args, generator)
    ages = envs.env._episode.clone()
    for name in ("eta", "phi", "theta"):  # away from the first values, which are near 0
        made[name] = {key: x + 0.3 * torch.randn(x.shape, generator=generator) for key, x in made[name].items()}
    first, init_policies = state_of(args, made, generator), lifetime_rewards.init_policies

    def noted_policies(*inputs, **named):
        made = init_policies(*inputs, **named)
        fresh.append({key: x + 0.3 * torch.randn(x.shape, generator=seeded(len(fresh))) for key, x in made.items()})
        return fresh[-1]

    state = dict(first)
    monkeypatch.setattr(lifetime_rewards, "init_policies", noted_policies)
    monkeypatch.setattr(lifetime_rewards, "evaluate", lambda *_, **__: {})
    recorder = Recorder(args)
    end = recorder.end_iteration

    def end_iteration(state, stats, evaluate):
        end(state, stats, evaluate)
        if state["iteration"] == iterations:
            raise StopIteration

    recorder.end_iteration = end_iteration
    with pytest.raises(StopIteration):
        lifetime_rewards.train(envs, None, args, recorder, state)

    # The peer plays all trajectories of a window in one life, then in the next one.
    actions = in_order_of_worlds(envs, args.steps * args.unroll)
    monkeypatch.setattr(peer_lifetime_rewards, "draw", lambda logits: next(actions))
    dies = torch.stack(envs.born).view(iterations, args.unroll, args.steps, 5).any(2)  # in which trajectories
    number_of = dies.any(2).flatten().cumsum(0).view(iterations, args.unroll) - 1  # which of the fresh ones
    order = [
        {name: x[i] for name, x in fresh[number_of[k, u]].items()}
        for k in range(iterations)
        for i in range(5)
        for u in range(args.unroll)
        if dies[k, u, i]
    ]
    newborn = iter(order)
    monkeypatch.setattr(peer_lifetime_rewards, "new_policy", lambda theta: next(newborn))
    create = peer_lifetime_rewards.lifetimes

    def replaying(*inputs):
        made = create(*inputs)
        for i, world in enumerate(made):
            replay(envs, i, world, monkeypatch)
        return made

    monkeypatch.setattr(peer_lifetime_rewards, "lifetimes", replaying)
    learner = peer_lifetime_rewards.make(first, envs, args, 5)
    for life, age in zip(learner.lives, ages.tolist(), strict=True):
        life.world.episode = age
    for _ in range(iterations):
        assert peer_lifetime_rewards.iterate(learner) == 5 * args.steps * args.unroll
    assert not [*newborn, *actions]
    return dies, first, state, learner


@pytest.mark.parametrize("env_id", ["SymABC-v0", "RandomABC-v0"])
def test_lifetime_rewards_agree(env_id, monkeypatch):
    dies, first, state, learner = lifetimes_run(monkeypatch, env_id)
    assert dies.any(0).any(0).all(), "every lifetime has ended once"
    assert dies[:, :-1].any(), "some within a window, so that the newborn learns in it"
    for name, network in (("eta", learner.reward), ("phi", learner.value)):
        weights = state[name]
        changed(weights, first[name], 2e-4)
        close(network.lstm.weight_ih_l0, weights["w_x"])
        close(network.lstm.weight_hh_l0, weights["w_h"])
        close(network.lstm.bias_ih_l0, weights["b_x"])
        close(network.lstm.bias_hh_l0, weights["b_h"])
        close(network.number.weight[0], weights["w_out"])
        close(network.number.bias, weights["b_out"])
    changed(state["theta"], first["theta"], 1e-2)
    for n, life in enumerate(learner.lives):
        for name, x in life.theta.items():
            close(x, state["theta"][name][n])
        for name, ours in (("reward", "eta"), ("value", "phi")):
            for found, expected in zip(life.memory[name], state["memory"][ours], strict=True):
                close(found[0], expected[0, n])


LIRPG = {
    "cheetahs": {"env_id": "HalfCheetahForward-v0", "horizon": 11, "extrinsic_coef": 0.3, "live_bonus": 0.1},
    "poles": {"env_id": "CartPoleFixed-v0", "horizon": 10, "entropy_coef": 0.1, "normalize": False, "delay": 4},
    "poles, advantages as they are": {
        "env_id": "CartPoleFixed-v0", "horizon": 25, "delay": 4, "normalize_advantages": False,
    },
    "PPO": {"env_id": "CartPoleFixed-v0", "horizon": 25, "delay": 4, "intrinsic_coef": 0.0, "extrinsic_coef": 1.0},
}  # fmt: skip


def lirpg_run(monkeypatch, iterations=2, **flags):
    sizes = {"num_worlds": 3, "rollout_steps": 16, "epochs": 2, "minibatches": 3, "delay": 3, "clip": 0.02}
    args = lirpg.Args(**sizes | {"iterations": iterations, "lr": 1e-2, "reward_lr": 1e-2} | flags)
    envs, generator, orders = worlds(args.env_id, 3, args.horizon, 10**9), seeded(5), []
    if args.env_id.startswith("HalfCheetah"):
        monkeypatch.setattr(type(envs.unwrapped), "start_noise", 0.0)
    first = state_of(args, lirpg.first_state(envs, args, generator), generator)
    first["first_returns"] = torch.zeros(3)
    for name in ("theta", "eta"):
        first[name] = {key: x + 0.3 * torch.randn(x.shape, generator=generator) for key, x in first[name].items()}
    reset, randperm = envs.env.reset, torch.randperm

    def noted_reset(**named):
        obs, info = reset(**named)
        envs.begin(obs)
        return obs, info

    def noted_order(*inputs, **named):
        orders.append(randperm(*inputs, **named))
        return orders[-1]

    monkeypatch.setattr(envs, "reset", noted_reset)
    monkeypatch.setattr(lirpg, "evaluate", lambda *_, **__: {})
    state = dict(first)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", noted_order)
        lirpg.train(envs, None, args, Recorder(args), state)
    assert len(orders) == iterations * args.epochs

    queue, actions = iter(orders), iter(envs.actions)
    monkeypatch.setattr(peer_lirpg, "permutation", lambda size: next(queue))
    monkeypatch.setattr(peer_lirpg, "draw", lambda policy: next(actions))
    create = peer_lirpg.SyncVectorEnv

    def replaying(*inputs, **named):
        made = create(*inputs, **named)
        for i, world in enumerate(made.envs):
            if hasattr(world.unwrapped, "start"):
                starts = iter(envs.starts[i])
                monkeypatch.setattr(world.unwrapped, "start", lambda starts=starts: next(starts))
            world.unwrapped._reset_noise_scale = 0.0
        return made

    monkeypatch.setattr(peer_lirpg, "SyncVectorEnv", replaying)
    learner = peer_lirpg.make(first, envs, args, 3)
    streams, collect = [], peer_lirpg.collect

    def kept(*inputs):
        streams.append(collect(*inputs))
        return streams[-1]

    monkeypatch.setattr(peer_lirpg, "collect", kept)
    for _ in range(iterations):
        assert peer_lirpg.iterate(learner) == 3 * 16
    assert not [*queue, *actions]
    return args, first, state, learner, streams


@pytest.mark.parametrize("kind", LIRPG)
def test_lirpg_agrees(kind, monkeypatch):
    args, first, state, learner, streams = lirpg_run(monkeypatch, **LIRPG[kind])
    done, fell = (np.stack([getattr(stream, name) for stream in streams]) for name in ("done", "fell"))
    assert done.any()
    assert fell.any() == ("Pole" in args.env_id)
    assert kind != "poles" or (done & ~fell).any(), "time limits"
    theta, eta = state["theta"], state["eta"]
    changed(theta, first["theta"], 1e-3)
    sources = [(learner.policy.network, theta, "policy"), (learner.mixed_value, theta, "value")]
    sources += [(learner.reward, eta, "reward"), (learner.extrinsic_value, eta, "value")]
    for network, params, name in sources:
        for i, layer in enumerate(network[::2]):
            close(layer.weight, params[f"{name}_w{i}"])
            close(layer.bias, params[f"{name}_b{i}"])
    if "log_std" in theta:
        close(learner.policy.log_std, theta["log_std"])
    if args.intrinsic_coef:
        changed(eta, first["eta"], 1e-3)
    for name, moments in (("obs_moments", learner.obs_moments), ("return_moments", learner.return_moments)):
        close(torch.from_numpy(moments.mean), state[name]["mean"])
        close(torch.from_numpy(moments.var), state[name]["var"])
        assert (moments.count > 1) == args.normalize
    for name, sums in (("discounted", learner.discounted), ("step", learner.steps), ("due", learner.due)):
        close(torch.from_numpy(sums), state["sums"][name].double())


# ---------------------------------------------------------------- chance, left to itself


def test_choices_come_from_the_policy():
    logits = torch.tensor([0.0, 1.0, -1.0])
    torch.manual_seed(0)
    counts = np.bincount([peer_meta_critic.draw(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, logits.softmax(0), atol=0.03)


def test_newborn_networks_are_drawn_as_ours():
    """Same sizes, same spread."""
    args = lifetime_rewards.Args(meta_batch_size=50)
    ours = lifetime_rewards.init_policies(worlds("SymABC-v0", 50, 10, 50), args, seeded(1))
    fresh = peer_lifetime_rewards.new_policy({name: x[0] for name, x in ours.items()})
    for name, x in fresh.items():
        assert x.shape == ours[name][0].shape
        assert float(x.std()) == pytest.approx(float(ours[name].std()), rel=0.3)
    assert fresh["w0"].abs().max() == pytest.approx(float(ours["w0"].abs().max()), rel=0.05)

    args = meta_critic.Args(meta_batch_size=50)
    envs = worlds(args.env_id, 50, 200, 10)
    theta = meta_critic.init_actors(envs, args, seeded(1))
    phi = meta_critic.init_critics(envs, count=1, latent_size=3, args=args, generator=seeded(2))
    learner = peer_meta_critic.make({"theta": theta, "phi": phi}, envs, args, 2)
    actor = peer_meta_critic.new_actor(learner.pupils[0])
    for i, layer in enumerate(actor[::2]):
        assert layer.weight.dtype == torch.float64
        assert layer.weight.T.shape == theta[f"w{i}"][0].shape
        assert float(layer.weight.detach().std()) == pytest.approx(float(theta[f"w{i}"].std()), rel=0.2)
        assert float(layer.bias.detach().abs().max()) <= float(theta[f"b{i}"].abs().max()) * 1.1


# ---------------------------------------------------------------- benchmark/speed.py


def speed_line(flags: str, monkeypatch, capsys) -> dict:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split()])
    speed.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


TINY = {
    "meta_critic": ("--meta-batch-size 4 --window-size 6 --hidden-size 5 --critic-size 6 --peer-tasks 3", 3, 24),
    "lirpg": ("--num-worlds 2 --rollout-steps 8 --epochs 1 --minibatches 2", 2, 16),
    "lifetime_rewards": ("--meta-batch-size 4 --hidden-size 5 --unroll 2 --peer-tasks 3", 3, 32),
}


@pytest.mark.parametrize("name", TINY)
def test_speed_prints_one_line_with_the_peer(name, monkeypatch, capsys):
    flags, tasks, steps = TINY[name]
    result = speed_line(f"{name} {flags} --iterations 3 --peer --peer-iterations 2", monkeypatch, capsys)
    assert (result["algorithm"], result["steps_per_iteration"]) == (name, steps)
    assert (result["peer_tasks"], result["peer_iterations"]) == (tasks, 2)
    for who in ("", "peer_"):
        assert result[f"{who}sampling_steps_per_s"] > result[f"{who}end_to_end_steps_per_s"] > 0
        assert result[f"{who}sample_s"] > 0 < result[f"{who}update_s"]
    rate = result["end_to_end_steps_per_s"] / result["peer_end_to_end_steps_per_s"]
    assert result["speedup_end_to_end"] == pytest.approx(rate, rel=1e-3)
    peer_steps = steps if name == "lirpg" else steps / 4 * tasks
    rate = steps / result["cpu_s_per_iteration"] / (peer_steps / result["peer_cpu_s_per_iteration"])
    assert result["cpu_speedup_end_to_end"] == pytest.approx(rate, rel=1e-3)
    result = speed_line(f"{name} {flags} --iterations 1", monkeypatch, capsys)
    assert not [key for key in result if "peer" in key or "speedup" in key]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("meta_critic --env-id Bandit5-v0", "Bandit5-v0 has no single environment here; allowed is CartPoleLength-v0"),
        ("lifetime_rewards --env-id KeyBox-v0", "KeyBox-v0 has no single environment"),
        ("lirpg --env-id HopperForward-v0", "HopperForward-v0 has no single environment"),
        ("lirpg --peer-tasks 3", "--peer-tasks 3: the peer can have 16; its worlds have one policy"),
        ("meta_critic --peer-tasks 51", "--peer-tasks 51: the peer can have at most 50"),
    ],
)
def test_what_has_no_peer_is_one_clear_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=message):
        speed_line(f"{flags} --peer", monkeypatch, capsys)
