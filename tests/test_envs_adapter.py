"""A user's own Gymnasium environments through envs/adapter.py."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

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

    class Buttons(Walk):
        action_space = Discrete(2)

    class Flat(Walk):
        def sample_tasks(self, num_tasks, rng, split):
            return rng.uniform(size=num_tasks)

    for make_env, message in (
        (OnlySetTask, "needs a method sample_tasks"),
        (OnlySampleTasks, "needs a method set_task"),
    ):
        with pytest.raises(TypeError, match=message):
            adapted(make_env=make_env)
    with pytest.raises(TypeError, match="action_space must be a one-dimensional Box"):
        adapted(make_env=Buttons)
    with pytest.raises(ValueError, match="task_dim"):
        adapted(make_env=Flat)
    with pytest.raises(NotImplementedError, match="not known as a function"):
        AdaptedVectorEnv.reward(None, None, None, None)


def test_wrappers_and_time_limits():
    wrapped = adapted(make_env=lambda: gym.wrappers.TimeLimit(Walk(), 6))
    wrapped.reset(seed=0)
    flags = [wrapped.step(torch.zeros(3, 1))[3].all().item() for _ in range(6)]
    assert flags == [False] * 5 + [True]
    short = adapted(make_env=lambda: gym.wrappers.TimeLimit(Walk(), 2))
    short.reset(seed=0)
    short.step(torch.zeros(3, 1))
    with pytest.raises(RuntimeError, match="truncated its episode after 2 of 6 steps"):
        short.step(torch.zeros(3, 1))
