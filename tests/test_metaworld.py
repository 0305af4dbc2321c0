"""Meta-World through the adapter; run it where requirements-metaworld.txt is installed."""

import pickle

import numpy as np
import pytest
import torch

metaworld = pytest.importorskip("metaworld", reason="needs its own environment: requirements-metaworld.txt")

from envs.metaworld import load_tasks, make_metaworld  # noqa: E402


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def goals(tasks):
    return {(task.env_name, *pickle.loads(task.data)["rand_vec"].tolist()) for task in tasks}


@pytest.mark.parametrize(("benchmark", "num_classes"), [("reach-v3", (1, 1)), ("ML10", (10, 5))])
def test_train_and_test_goals_are_disjoint(benchmark, num_classes):
    _, train, test = load_tasks(benchmark, 0)
    assert (len({task.env_name for task in train}), len({task.env_name for task in test})) == num_classes
    assert len(goals(train)) == 50 * num_classes[0]
    assert len(goals(test)) == 50 * num_classes[1]
    assert not goals(train) & goals(test)


def test_overlapping_goals_are_refused(monkeypatch):
    class Leaky(metaworld.ML1):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._test_tasks = [*self._test_tasks[:-1], self._train_tasks[7]]

    monkeypatch.setattr(metaworld, "ML1", Leaky)
    with pytest.raises(RuntimeError, match="overlap"):
        load_tasks("reach-v3", 12345)
    with pytest.raises(ValueError, match="benchmark must be"):
        load_tasks("reach-v99", 0)


def test_batch_equals_metaworlds_own_environment():
    venv = make_metaworld("reach-v3", num_envs=3, max_episode_steps=5, dtype=torch.float64)
    tasks = venv.sample_tasks(3, seeded(0), "test")
    obs, _ = venv.reset(seed=0, options={"tasks": tasks})
    assert obs.shape == (3, 39)
    assert (obs[:, 36:] == 0).all()  # the goal is hidden
    _, train, test = load_tasks("reach-v3", 0)
    own = metaworld.ML1("reach-v3", seed=0).train_classes["reach-v3"]()
    own.set_task([*train, *test][int(tasks[1, 0])])
    own_obs, _ = own.reset()
    np.testing.assert_allclose(obs[1], own_obs, atol=1e-12)
    rng = np.random.default_rng(0)
    for step in range(5):
        action = rng.uniform(-1, 1, (3, 4)).astype(np.float32)
        obs, reward, terminated, truncated, info = venv.step(torch.from_numpy(action))
        own_obs, own_reward, _, _, own_info = own.step(action[1])
        np.testing.assert_allclose(obs[1], own_obs, atol=1e-12)
        assert float(reward[1]) == pytest.approx(own_reward, abs=1e-12)
        assert float(info["success"][1]) == own_info["success"]
        assert not terminated.any()
        assert truncated.all() == (step == 4)


def test_worlds_change_class_between_episodes():
    venv = make_metaworld("ML10", num_envs=3, max_episode_steps=3)
    _, train, test = load_tasks("ML10", 0)
    for split, allowed in (("train", train), ("test", test), ("train", train)):
        tasks = venv.sample_tasks(3, seeded(1), split)
        venv.reset(seed=0, options={"tasks": tasks})
        names = [env.name for env in venv.envs]
        assert names == [[*train, *test][int(task)].env_name for task in tasks[:, 0]]
        assert set(names) <= {task.env_name for task in allowed}
        assert len({id(env.env) for env in venv.envs}) == 3  # never one arm in two worlds
        assert torch.isfinite(venv.step(torch.zeros(3, 4))[1]).all()
