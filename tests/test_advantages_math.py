"""What `collect` of five files divides advantages by: their standard deviation, or where actions change nothing a share
of what was subtracted from the returns. Against loops over tasks and steps, in float64."""

import math

import numpy as np
import pytest
import torch

from algos import maml_trpo, mbmpo, multitask_ppo, promp, reptile_ppo
from envs.core import ScaleActions
from envs.navigation import Navigation2DEndless
from tests.double_precision import float64, seeded  # noqa: F401 (float64 is used by being here)
from tests.test_maml_trpo_math import close, ref_baseline

N, T, GAMMA = 3, 100, 0.99
INNER_STEPS = {
    maml_trpo: maml_trpo.adapt,
    promp: lambda *x: promp.inner_step(*x)[0],
    reptile_ppo: reptile_ppo.ppo_step,
    multitask_ppo: multitask_ppo.ppo_step,
    mbmpo: mbmpo.lvc_step,
}
each_file = pytest.mark.parametrize("ours", INNER_STEPS, ids=lambda module: module.__name__.split(".")[1])
each_size = pytest.mark.parametrize("episodes", [10, 20])


class Vain(Navigation2DEndless):
    """Each step's reward is -1, whatever one does."""

    @staticmethod
    def reward(obs, action, next_obs, task):
        return -torch.ones_like(obs[..., 0])


class Doomed(Vain):
    """And every episode ends with its 60th step."""

    can_terminate = True

    def _advance(self, action):
        return self._obs + action, torch.full_like(self._over, self._steps + 1 >= 60), {}


class Lucky(Vain):
    """And a little more or less for x: what actions change is little, but more than nothing."""

    @staticmethod
    def reward(obs, action, next_obs, task):
        return 0.02 * next_obs[..., 0] - 1


def sampled(ours, family, episodes, seed=0):
    """A policy and its episodes, with the file's default sizes and steps."""
    args = ours.Args(episodes_per_task=episodes, horizon=T, gamma=GAMMA, gae_lambda=1.0)
    envs = ScaleActions(family(N * episodes, T, dtype=torch.float64), 1.0)
    theta, generator = ours.init_policy(envs, args.hidden_size, seeded(seed)), seeded(seed)
    tasks = envs.unwrapped.sample_tasks(N, generator)
    return args, theta, ours.collect(envs, tasks, theta, args, generator)


def rms(x):
    return math.sqrt(np.mean(np.square(x)))


def slow_parts(batch):
    """For each task, of its running steps: returns, what is subtracted from them, both parts' sizes."""
    parts = []
    for obs, reward, mask in zip(*(x.numpy() for x in (batch.obs, batch.reward, batch.mask)), strict=True):
        returns, tail = np.zeros_like(reward), np.zeros(len(reward))
        for t in reversed(range(T)):
            returns[:, t] = tail = reward[:, t] + GAMMA * tail
        value = ref_baseline(obs, returns, mask)
        runs = mask == 1
        subtracted = value[runs] + (returns[runs] - value[runs]).mean()
        parts.append((returns[runs], subtracted, rms(returns[runs] - subtracted), rms(subtracted)))
    return parts


@pytest.mark.parametrize(
    ("family", "is_floored"), [(Navigation2DEndless, False), (Lucky, False), (Vain, True), (Doomed, True)]
)
@each_file
def test_advantages_against_a_loop(ours, family, is_floored):
    """With a signal the plain formula, (return - value - mean) / std; without one its divisor is larger."""
    _, _, batch = sampled(ours, family, 10)
    assert batch.mask.mean() == (0.6 if family is Doomed else 1)
    for i, (returns, subtracted, std, level) in enumerate(slow_parts(batch)):
        runs = batch.mask[i] == 1
        assert (std < 0.003 * level) == is_floored
        divisor = 0.003 * level if is_floored else std
        close(batch.advantage[i][runs], torch.tensor((returns - subtracted) / divisor), 1e-5)
        close(batch.std[i], torch.full((10,), divisor), 1e-5)
        close(batch.value[i][runs], torch.tensor(subtracted), 1e-5)
        assert batch.advantage[i][~runs].eq(0).all()
        divided = batch.std[i][:, None] * batch.advantage[i]
        close((divided + batch.value[i])[runs], torch.tensor(returns), 1e-9)


@each_size
@each_file
def test_where_nothing_can_be_learned_the_inner_step_is_short(ours, episodes):
    """Root mean squares of advantages, and lengths of inner steps as shares of those with a reward at a goal.

    Of six seeds, the files and both sizes: 0.10, and 0.04 to 0.12 (several epochs, reptile_ppo: 0.08 to 0.16). Without
    the floor advantages are 1, and shares 0.4 to 1.2.
    """
    lengths = {}
    for family in (Vain, Navigation2DEndless):
        args, theta, batch = sampled(ours, family, episodes)

        def length(advantage, args=args, theta=theta, batch=batch):
            """Of the inner step, the mean over tasks."""
            moved = INNER_STEPS[ours](theta, batch._replace(advantage=advantage), args)
            change = torch.cat([(moved[name] - theta[name]).flatten(1) for name in theta], 1)
            return float(change.norm(dim=1).mean())

        size = batch.advantage.square().mean((1, 2), keepdim=True).sqrt()
        lengths[family] = length(batch.advantage), length(batch.advantage / size)
        if family is Vain:
            assert size.max() < 0.2
        else:
            close(size, torch.ones(N, 1, 1), 1e-6)
    with_signal = lengths[Navigation2DEndless][0]
    assert lengths[Vain][0] < 0.15 * with_signal
    assert lengths[Vain][1] > 0.3 * with_signal  # the control: of advantages with a deviation of 1
