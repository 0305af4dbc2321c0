"""A user's own Gymnasium environments through envs/adapter.py."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from envs import Imagined, Lifetimes, ScaleActions
from envs.adapter import AdaptedVectorEnv


class Walk(gym.Env):
    """A number moves by the action; reward -|number - task|; ends when it leaves [-limit, limit]."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)
    limit = 3.0

    def sample_tasks(self, num_tasks, rng, split):
        low, high = {"train": (0, 1), "test": (2, 3)}[split]
        return rng.uniform(low, high, (num_tasks, 1))

    def set_task(self, task):
        self.task = float(task[0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = self.np_random.uniform(-0.1, 0.1)
        self.over, self.count = False, 0
        return np.array([self.number], np.float32), {"count": 0}

    def step(self, action):
        assert not self.over, "a finished environment was stepped"
        self.number += float(action[0])
        self.count += 1
        self.over = abs(self.number) > self.limit
        info = {"count": self.count, "name": "walk"}
        return np.array([self.number], np.float32), -abs(self.number - self.task), self.over, False, info


def adapted(num_envs=3, horizon=6, make_env=Walk, **kwargs):
    return AdaptedVectorEnv(make_env, num_envs, horizon, **kwargs)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_steps_rewards_and_latched_ends():
    venv = adapted(dtype=torch.float64)
    tasks = venv.sample_tasks(3, seeded(0))
    obs, _ = venv.reset(seed=0, options={"tasks": tasks})
    actions = np.array([[1.0], [-0.5], [5.0]])  # the third is clipped to 1, so worlds 0 and 2 leave [-3, 3]
    number, over, count = obs[:, 0].numpy().copy(), np.zeros(3, bool), np.zeros(3)
    for step in range(6):
        number = np.where(over, number, number + np.clip(actions[:, 0], -1, 1))
        count += ~over
        reward = np.where(over, 0, -np.abs(number - tasks[:, 0].numpy()))
        over = over | (np.abs(number) > 3)
        got = venv.step(actions)
        np.testing.assert_allclose(got[0][:, 0], number, atol=1e-6)  # the toy observes float32
        np.testing.assert_allclose(got[1], reward, atol=1e-6)
        assert got[2].tolist() == over.tolist()
        assert got[3].tolist() == [step == 5] * 3
        assert got[4]["count"].tolist() == count.tolist()
        assert "name" not in got[4]
    assert over.tolist() == [True, False, True]
    with pytest.raises(gym.error.ResetNeeded):
        venv.step(actions)
    assert not venv.reset(seed=1)[0].abs().gt(0.1).any()
    assert not venv.step(actions)[2].any()


def test_seeds_and_tasks():
    venv, other = adapted(), adapted()
    tasks = venv.sample_tasks(200, seeded(0))
    assert tasks.shape == (200, 1)
    assert tasks.max() < 1
    assert venv.sample_tasks(200, seeded(0), "test").min() >= 2
    assert torch.equal(tasks, other.sample_tasks(200, seeded(0)))
    first = venv.reset(seed=3, options={"tasks": tasks[:3]})[0]
    assert torch.equal(first, other.reset(seed=3, options={"tasks": tasks[3:6]})[0])
    assert len(set(first[:, 0].tolist())) == 3  # the worlds start apart
    assert not torch.equal(first, venv.reset(seed=4)[0])
    kept = venv.step(torch.ones(3, 1))[0]
    copy = kept.clone()
    venv.step(torch.ones(3, 1))
    assert torch.equal(kept, copy)


def test_missing_methods_and_wrong_spaces_are_named():
    class NoTasks(gym.Env):
        observation_space, action_space = Walk.observation_space, Walk.action_space

    class OnlySetTask(NoTasks):
        set_task = Walk.set_task

    class OnlySampleTasks(NoTasks):
        sample_tasks = Walk.sample_tasks

    class Switches(Walk):
        action_space = MultiDiscrete([2, 2])

    class Picture(Walk):
        observation_space = Box(0, 1, (2, 2))

    class NoSpaces(gym.Env):
        sample_tasks, set_task = Walk.sample_tasks, Walk.set_task

    class Flat(Walk):
        def sample_tasks(self, num_tasks, rng, split):
            return rng.uniform(size=num_tasks)

    for make_env, message in (
        (OnlySetTask, "needs a method sample_tasks"),
        (OnlySampleTasks, "needs a method set_task"),
        (NoTasks, "^NoTasks needs a method sample_tasks and a method set_task; see envs/adapter.py$"),
        (Switches, r"^Switches's action_space must be a one-dimensional Box or a Discrete space, got MultiDiscrete"),
        (Picture, r"^Picture's observation_space must be .* got Box.*FlattenObservation may help$"),
        (NoSpaces, "observation_space must be .* got None.*; NoSpaces's action_space must be .* got None$"),
        (lambda: Walk, "is no gymnasium.Env"),
    ):
        with pytest.raises(TypeError, match=message) as refused:
            adapted(make_env=make_env)
        assert bool(refused.value.example) == ("needs" in message)
    with pytest.raises(ValueError, match="task_dim"):
        adapted(make_env=Flat)
    one = Walk()
    with pytest.raises(TypeError, match="must make a new Walk in each call"):
        adapted(make_env=lambda: gym.wrappers.ClipAction(one))
    with pytest.raises(NotImplementedError, match="not known as a function"):
        AdaptedVectorEnv.reward(None, None, None, None)


def test_time_limits():
    wrapped = adapted(make_env=lambda: gym.wrappers.TimeLimit(Walk(), 6))
    wrapped.reset(seed=0)
    flags = [wrapped.step(torch.zeros(3, 1))[3].all().item() for _ in range(6)]
    assert flags == [False] * 5 + [True]
    with pytest.raises(TypeError, match="Walk's wrapper TimeLimit ends episodes after 2 steps, before"):
        adapted(make_env=lambda: Double(gym.wrappers.TimeLimit(Walk(), 2)))

    class Short(Walk):
        def step(self, action):
            *results, _, info = super().step(action)
            return *results, self.count == 2, info

    short = adapted(make_env=Short)
    short.reset(seed=0)
    short.step(torch.zeros(3, 1))
    with pytest.raises(RuntimeError, match="truncated its episode after 2 of 6 steps"):
        short.step(torch.zeros(3, 1))


# ---------------------------------------------------------------- wrappers


class Double(gym.ObservationWrapper):
    def observation(self, observation):
        return 2 * observation


class Tasks(gym.Wrapper):
    """The protocol around an environment without it; its own method `reward` is none of ours."""

    sample_tasks = Walk.sample_tasks

    def set_task(self, task):
        self.unwrapped.task = 10 + float(task[0])

    def reward(self, reward):
        return reward


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: gym.wrappers.ClipAction(Walk()),
        lambda: Double(gym.wrappers.ClipAction(Walk())),
        lambda: gym.wrappers.ClipAction(gym.wrappers.TransformReward(Walk(), lambda reward: 3 * reward)),
    ],
)
def test_of_clip_action_the_bounds_are_those_that_it_clips_to(make_env):
    venv, plain = adapted(make_env=make_env), adapted()
    assert venv.single_action_space == plain.single_action_space
    for worlds in (venv, plain):
        worlds.reset(seed=0, options={"tasks": torch.zeros(3, 1)})
    action = torch.tensor([[-5.0], [0.3], [5.0]])
    factor = 2 if "Double" in str(venv.envs[0]) else 1
    obs, reward, *_ = venv.step(action)
    plain_obs, plain_reward, *_ = plain.step(action)
    assert torch.equal(obs, factor * plain_obs)
    torch.testing.assert_close(reward, (3 if "TransformReward" in str(venv.envs[0]) else 1) * plain_reward)


def test_bounds_that_a_wrapper_takes_away_or_sets_count():
    unbounded = Box(-np.inf, np.inf, (1,))
    with pytest.raises(TypeError, match="number 0 of Walk's actions is from -inf to inf"):
        adapted(make_env=lambda: gym.wrappers.TransformAction(Walk(), lambda x: x, unbounded))
    rescaled = adapted(make_env=lambda: gym.wrappers.RescaleAction(Walk(), np.float32(0), np.float32(4)))
    assert (rescaled.single_action_space.low, rescaled.single_action_space.high) == (0, 4)
    start = rescaled.reset(seed=0)[0]
    torch.testing.assert_close(rescaled.step(torch.full((3, 1), 3.0))[0], start + 0.5)


@pytest.mark.parametrize("wrapper", [gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward])
def test_statistics_that_no_checkpoint_has_are_refused_and_fixed_ones_are_not(wrapper):
    with pytest.raises(TypeError, match=f"^Walk's wrapper {wrapper.__name__} keeps statistics .* update_running_mean"):
        adapted(make_env=lambda: Double(wrapper(Walk())))

    def fixed():
        env = wrapper(Walk())
        env.update_running_mean = False
        return Double(env)

    adapted(make_env=fixed).reset(seed=0)


def test_a_wrapper_may_bring_the_tasks():
    class Bare(Walk):
        sample_tasks = set_task = None

    venv = adapted(make_env=lambda: Double(Tasks(Bare())))
    assert not venv.knows_reward
    venv.reset(seed=0, options={"tasks": torch.tensor([[0.0], [0.5], [1.0]])})
    assert [env.unwrapped.task for env in venv.envs] == [10, 10.5, 11]


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("number", [2**24 + 1, 2**53, -(2**53), 2**53 - 1, 0.1, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_tasks_arrive_as_they_were_drawn(number, dtype):
    seen = []

    class Level(Walk):
        def sample_tasks(self, num_tasks, rng, split):
            return np.array([[number, split == "test"]] * num_tasks)

        def set_task(self, task):
            super().set_task([0.0])
            seen.append(task)

    venv = adapted(make_env=Level, dtype=dtype)
    tasks, _ = venv.test_set(3)
    assert tasks.dtype == torch.float64
    obs, _ = venv.reset(seed=0, options={"tasks": tasks})
    assert obs.dtype == dtype
    assert venv.step(torch.zeros(3, 1))[1].dtype == dtype
    assert [x[0] == number for x in seen] == [True] * 3
    assert {x.dtype for x in seen} == {np.dtype(np.float64)}


@pytest.mark.parametrize("number", [2**53 + 1, -(2**53) - 2, 2**63 - 1, 2**70])
def test_whole_numbers_that_float64_may_not_hold_are_refused(number):
    class Level(Walk):
        def sample_tasks(self, num_tasks, rng, split):
            return np.array([[0, number if split == "test" else 1]] * num_tasks)

    with pytest.raises(TypeError, match=rf"^Level.sample_tasks gives {number}, but .* up to {2**53} \(2\^53\): take"):
        adapted(make_env=Level)


@pytest.mark.parametrize("number", ["a", None, 1j, {}])
def test_tasks_that_are_no_numbers_are_refused(number):
    class Level(Walk):
        def sample_tasks(self, num_tasks, rng, split):
            return np.array([[number]] * num_tasks)

    with pytest.raises(TypeError, match=r"^Level.sample_tasks must return numbers, got "):
        adapted(make_env=Level)


def test_test_tasks_that_are_training_tasks_are_told_once():
    def kind(train, test):
        class Rooms(Walk):
            def sample_tasks(self, num_tasks, rng, split):
                return rng.choice(train if split == "train" else test, (num_tasks, 1))

        return Rooms

    same = kind(range(4), range(2, 8))
    with pytest.warns(UserWarning, match=r"^Rooms.sample_tasks: 2 of 6 different test tasks, .* are training tasks"):
        adapted(make_env=same)
    adapted(make_env=same)  # pytest makes errors of warnings
    adapted(make_env=same).single_world()
    adapted(make_env=kind(range(4), range(4, 8)))


# ---------------------------------------------------------------- actions and rewards


@pytest.mark.parametrize("start", [0, -3, 5])
def test_choices_are_the_numbers_of_the_users_space(start):
    seen = []

    class Buttons(Walk):
        action_space = Discrete(4, start=start)

        def step(self, action):
            assert self.action_space.contains(action)
            seen.append(int(action))
            return super().step([action - start])

    venv = adapted(make_env=Buttons)
    assert venv.is_discrete
    assert venv.single_action_space == Discrete(4)
    before, _ = venv.reset(seed=0)
    after, *_ = venv.step(torch.tensor([0, 1, 3]))
    assert seen == [start, start + 1, start + 3]
    torch.testing.assert_close(after - before, torch.tensor([[0.0], [1.0], [3.0]]))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_reward_may_be_an_array_of_one_number(shape):
    class Arrays(Walk):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, np.full(shape, reward), *rest

    plain, venv = adapted(), adapted(make_env=Arrays)
    plain.reset(seed=0)
    venv.reset(seed=0)
    assert torch.equal(plain.step(torch.ones(3, 1))[1], venv.step(torch.ones(3, 1))[1])


def test_rewards_and_observations_of_other_shapes_are_named():
    class TwoRewards(Walk):
        def step(self, action):
            return np.zeros(1), np.zeros(2), False, False, {}

    class Column(Walk):
        def reset(self, *, seed=None, options=None):
            return np.zeros((1, 1)), {}

    venv = adapted(make_env=TwoRewards)
    venv.reset(seed=0)
    with pytest.raises(TypeError, match=r"^TwoRewards.step must return one number as the reward, got \(2,\)$"):
        venv.step(torch.zeros(3, 1))
    with pytest.raises(TypeError, match=r"^Column returns observations \(1, 1\), its observation_space says \(1,\)$"):
        adapted(make_env=Column).reset(seed=0)


# ---------------------------------------------------------------- worlds that start one by one


class Noisy(Walk):
    """Chance in every step, too."""

    def step(self, action):
        self.number += self.np_random.normal() * 0.1
        return super().step(action)


def test_a_world_that_starts_alone_does_what_it_does_in_a_batch_of_its_own():
    venv = adapted(make_env=Noisy, horizon=9)
    tasks = venv.sample_tasks(3, seeded(0))
    venv.reset(seed=0, options={"tasks": tasks})
    numbers = [[] for _ in range(3)]
    for step in range(5):
        obs, *_ = venv.step(torch.full((3, 1), 0.2))
        if step == 2:
            restarted, _ = venv.reset(options={"tasks": 1 + tasks, "reset_mask": torch.tensor([False, True, False])})
            assert torch.equal(restarted[[0, 2]], obs[[0, 2]])
            assert restarted[1, 0].abs() < 0.1
            assert venv.tasks[:, 0].tolist() == (tasks[:, 0] + torch.tensor([0, 1, 0])).tolist()
            assert [env.task for env in venv.envs] == venv.tasks[:, 0].tolist()
        for world in range(3):
            numbers[world].append(float(obs[world, 0]))
    for world, began in ((0, 0), (1, 3), (2, 0)):
        env = Noisy()
        env.set_task(venv.tasks[world].numpy())
        env.reset(seed=int(venv._seeds[world]))
        for step in range(began, 5):
            found = env.step(np.full(1, 0.2, np.float32))[0]
            assert numbers[world][step] == found[0]


@pytest.mark.parametrize("make_env", [Noisy, lambda: gym.wrappers.ClipAction(Noisy())])
def test_saved_worlds_go_on_as_if_nothing_had_happened(make_env):
    """The oracle is the batch that is not disturbed; episodes end early, at the horizon, and in between."""
    venv, other = (Lifetimes(adapted(make_env=make_env, horizon=7), episodes=3) for _ in range(2))
    venv.reset(seed=0)
    action = torch.tensor([[0.9], [0.1], [-0.6]])
    for _ in range(11):
        venv.step(action)
    saved = {name: x.clone() for name, x in venv.save_worlds().items()}
    kept = venv.save_worlds()
    expected = [venv.step(action) for _ in range(15)]
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    other.load_worlds(saved)
    for step in expected:
        found = other.step(action)
        assert all(torch.equal(x, y) for x, y in zip(step[:4], found[:4], strict=True))
        assert all(torch.equal(x, found[4][name]) for name, x in step[4].items())


def test_environments_that_cannot_go_on_are_named():
    class Unseeded(Walk):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=None)

    venv = adapted(make_env=Unseeded)
    venv.reset(seed=0)
    venv.step(torch.zeros(3, 1))
    saved = venv.save_worlds()
    with pytest.raises(TypeError, match=r"^Unseeded does something else with the same task"):
        venv.load_worlds(saved)


# ---------------------------------------------------------------- rewards as a function, for models


class Known(Walk):
    @staticmethod
    def reward(obs, action, next_obs, task):
        return -(next_obs - task)[..., 0].abs()

    @staticmethod
    def ended(obs):
        return obs[..., 0].abs() > 3


def test_a_static_reward_lets_worlds_be_imagined():
    venv = ScaleActions(adapted(make_env=Known), 1.0)
    imagined, real = Imagined(venv, 3), adapted(make_env=Known)
    imagined.follow(lambda obs, action: obs + action, torch.tensor([-99.0]), torch.tensor([99.0]))
    tasks = real.sample_tasks(3, seeded(0))
    for worlds in (imagined, real):
        worlds.reset(seed=0, options={"tasks": tasks})
    for _ in range(6):
        action = torch.tensor([[1.0], [-0.2], [0.9]])
        for x, y in zip(imagined.step(action)[:4], real.step(action)[:4], strict=True):
            torch.testing.assert_close(x, y)
    assert real._over.tolist() == [True, False, True]


def test_a_static_reward_that_is_not_what_step_returns_is_refused():
    class Wrong(Known):
        @staticmethod
        def reward(obs, action, next_obs, task):
            return Known.reward(obs, action, next_obs, task) + 0.1

    class Flat(Known):
        @staticmethod
        def reward(obs, action, next_obs, task):
            return Known.reward(obs, action, next_obs, task)[..., None]

    class Hidden(Known):
        def reward(self, obs, action, next_obs, task):
            return Known.reward(obs, action, next_obs, task)

    for kind, message in (
        (Wrong, r"^Wrong's static reward says \S+ where step returned \S+$"),
        (Flat, r"^Flat.reward must return \[..\], here \[2\], got \[2, 1\]$"),
        (Hidden, "^its reward is not known as a function"),
    ):
        with pytest.raises(TypeError, match=message):
            Imagined(ScaleActions(adapted(make_env=kind), 1.0), 3)
