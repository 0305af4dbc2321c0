"""Imagined worlds: given a model that is exact, they are the real ones; given one that goes wild, they end."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import envs
from envs import Imagined, ScaleActions
from envs.adapter import AdaptedVectorEnv
from envs.forward import HalfCheetahForward, HopperForward
from envs.locomotion import HumanoidDir
from envs.navigation import Navigation2D, Navigation2DEndless

FAMILIES = {family.__name__: family for family in envs.HORIZONS}
ANYWHERE = torch.full((2,), -torch.inf), torch.full((2,), torch.inf)


class Fence(Navigation2DEndless):
    """Navigation whose episodes end beyond x = 0.25."""

    can_terminate = True

    @staticmethod
    def ended(obs):
        return obs[..., 0] > 0.25

    def _advance(self, action):
        next_obs, _, info = super()._advance(action)
        return next_obs, self.ended(next_obs), info


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make(family, num_envs, horizon=6, scale=10.0, **kwargs):
    return ScaleActions(family(num_envs, horizon, **{"dtype": torch.float64} | kwargs), scale)


def draw_actions(venv, steps, seed=0):
    """Normal actions [T, B, A] of which a sixth lies beyond either bound."""
    return venv.scale * torch.randn(steps, *venv.action_space.shape, generator=seeded(seed), dtype=venv.unwrapped.dtype)


def play(venv, actions, tasks, seed=0):
    """Observations [T + 1, B, O], rewards, terminated, truncated [T, B]."""
    obs, _ = venv.reset(seed=seed, options={"tasks": tasks})
    columns = [torch.stack(column) for column in zip(*[venv.step(action)[:4] for action in actions], strict=True)]
    return torch.cat([obs[None], columns[0]]), *columns[1:]


def walk(obs, action):
    """The dynamics of navigation, exactly."""
    return obs + action


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- a model that is exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_with_the_true_dynamics_imagined_worlds_are_the_real_ones(dtype, scale):
    real = make(Navigation2DEndless, 5, scale=scale, dtype=dtype)
    imagined = Imagined(real, 5)
    imagined.follow(walk, *ANYWHERE)
    tasks, actions = real.unwrapped.sample_tasks(5, seeded(0)), draw_actions(real, 6)
    assert 0.2 < (actions.abs() > scale).double().mean() < 0.45  # of 60 numbers about a third is clipped
    for seed in (0, 1):
        ours, theirs = play(imagined, actions, tasks, seed), play(real, actions, tasks, seed)
        assert_equal(ours, theirs)
        assert ours[0].dtype == ours[1].dtype == dtype
        assert ours[2].dtype == ours[3].dtype == torch.bool
        assert not ours[2].any()
        assert ours[3].tolist() == [[False] * 5] * 5 + [[True] * 5]
        assert imagined.diverged_share == 0
    with pytest.raises(gym.error.ResetNeeded):
        imagined.step(actions[0])


def test_an_imagined_point_does_not_stop_at_its_goal():
    """Observations do not tell that a real one would: of the same steps it is paid for all."""
    real = make(Navigation2D, 3, scale=0.1)
    imagined = Imagined(real, 3)
    imagined.follow(walk, *ANYWHERE)
    tasks, actions = torch.tensor([[0.1, 0.0], [0.0, 0.2], [0.4, 0.4]]), torch.zeros(6, 3, 2, dtype=torch.float64)
    actions[:, 0, 0] = actions[:, 1, 1] = 0.1
    real_obs, real_reward, ended, _ = play(real, actions, tasks)
    obs, reward, terminated, _ = play(imagined, actions, tasks)
    assert ended.long().argmax(0).tolist() == [0, 1, 0]
    assert ended[-1].tolist() == [True, True, False]
    assert not terminated.any()
    runs = torch.cat([torch.ones(1, 3, dtype=torch.bool), ~ended[:-1]])
    assert torch.equal(obs[1:][runs], real_obs[1:][runs])
    assert torch.equal(reward * runs, real_reward)
    assert (reward[~runs] < -0.09).all()


REPLAYED = {"HopperForward": True, "Walker2dForward": True, "AntForward": True, "HumanoidDir": True}
REPLAYED |= dict.fromkeys(("HalfCheetahForward", "SwimmerForward", "HalfCheetahVel", "AntGoal"), False)
REPLAYED |= dict.fromkeys(("Navigation2DEndless", "SparseNavigation2D"), False)


@pytest.mark.parametrize(("name", "falls"), REPLAYED.items())
def test_recorded_episodes_are_imagined_again(name, falls):
    """The model predicts what has happened, and nonsense for worlds that are over: those stay as they are."""
    real = make(FAMILIES[name], 24, horizon=25)
    tasks, actions = real.unwrapped.sample_tasks(24, seeded(0)), draw_actions(real, 25)
    recorded = obs, _, terminated, _ = play(real, actions, tasks)
    assert terminated.any() == falls
    assert not terminated[-1].all()
    steps = iter(range(25))

    def replay(before, action):
        step = next(steps)
        assert torch.equal(before, obs[step])
        over = terminated[step - 1] & (step > 0)
        return obs[step + 1].masked_fill(over[:, None], torch.nan)

    imagined, infinite = Imagined(real, 24), torch.full(obs.shape[2:], torch.inf)
    imagined.follow(replay, -infinite, infinite)
    assert_equal(play(imagined, actions, tasks), recorded)
    assert imagined.diverged_share == 0


def test_all_is_carried_over_but_the_number_of_worlds():
    for family, dtype in ((Navigation2D, torch.float32), (HopperForward, torch.float64), (HumanoidDir, torch.float64)):
        real = make(family, 2, horizon=7, scale=3.0, dtype=dtype)
        imagined, same = Imagined(real, 5), make(family, 5, horizon=7, scale=3.0, dtype=dtype)
        assert (imagined.num_envs, imagined.scale, imagined.unwrapped.horizon) == (5, 3.0, 7)
        assert type(imagined.unwrapped) is family
        assert imagined.unwrapped.dtype == dtype
        for space in ("single_action_space", "action_space", "single_observation_space", "observation_space"):
            assert getattr(imagined, space) == getattr(same, space)
        # Start states and tasks are those of a real batch of this size, in the second episode, too.
        for seed in (3, None):
            assert torch.equal(imagined.reset(seed=seed)[0], same.reset(seed=seed)[0])
            assert torch.equal(imagined.unwrapped.tasks, same.unwrapped.tasks)
        tasks = real.unwrapped.sample_tasks(5, seeded(0), "test")
        assert torch.equal(tasks, imagined.unwrapped.sample_tasks(5, seeded(0), "test"))
        first = imagined.reset(seed=3, options={"tasks": tasks})
        assert torch.equal(first[0], same.reset(seed=3, options={"tasks": tasks})[0])
        assert first[1] == {}
        assert torch.equal(imagined.unwrapped.tasks, tasks)
        with pytest.raises(ValueError, match="tasks must have shape"):
            imagined.reset(options={"tasks": tasks[:2]})
    elsewhere = Imagined(make(Navigation2D, 2, device="meta"), 5)  # a device that every machine has, but without data
    assert elsewhere.unwrapped.device == torch.device("meta")


@pytest.mark.parametrize("family", [HumanoidDir, HalfCheetahForward])
def test_the_model_gets_the_familys_observations_and_actions(family):
    seen = []

    def drift(obs, action):
        seen.append((obs, action))
        return obs + 0.5

    real = make(family, 2)
    space, infinite = real.unwrapped.single_action_space, torch.full(real.single_observation_space.shape, torch.inf)
    imagined, actions = Imagined(real, 4), draw_actions(make(family, 4), 6)
    imagined.follow(drift, -infinite, infinite)
    obs = play(imagined, actions, imagined.unwrapped.sample_tasks(4, seeded(0)))[0]
    assert_equal([before for before, _ in seen], obs[:-1])
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    expected = np.clip(low + (actions.numpy() / 10 + 1) / 2 * (high - low), low, high)
    np.testing.assert_allclose(torch.stack([action for _, action in seen]), expected, rtol=0, atol=1e-12)
    assert all(((action.numpy() >= low) & (action.numpy() <= high)).all() for _, action in seen)


def test_bad_actions_are_refused():
    imagined = Imagined(make(Navigation2D, 2), 3)
    with pytest.raises(gym.error.ResetNeeded):
        imagined.step(torch.zeros(3, 2))
    calls = []
    imagined.follow(lambda obs, action: calls.append(1) or walk(obs, action), *ANYWHERE)
    imagined.reset(seed=0)
    with pytest.raises(ValueError, match="action must have shape"):
        imagined.step(torch.zeros(2, 2))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="non-finite action"):
            imagined.step(torch.full((3, 2), bad))
    assert calls == []  # a refused step is none
    for _ in range(6):
        truncated = imagined.step(torch.zeros(3, 2))[3]
    assert truncated.all()
    assert len(calls) == 6


def test_models_follow_one_another():
    """What MB-MPO does: new models for the same imagined worlds, with the same seeds."""
    imagined = Imagined(make(Navigation2D, 2), 3)
    actions, tasks = draw_actions(imagined, 6), imagined.unwrapped.sample_tasks(3, seeded(0))
    imagined.follow(walk, *ANYWHERE)
    there = play(imagined, actions, tasks)[0]
    imagined.follow(lambda obs, action: obs - action, *ANYWHERE)
    assert torch.equal(play(imagined, actions, tasks)[0], -there)
    assert imagined.diverged_share == 0
    imagined.follow(walk, torch.full((2,), 10.0), torch.full((2,), 11.0))
    obs, _, terminated, _ = play(imagined, actions, tasks)
    assert terminated.all()
    assert imagined.diverged_share == 1
    assert not obs.any()
    imagined.follow(walk, *ANYWHERE)
    assert torch.equal(play(imagined, actions, tasks)[0], there)
    assert imagined.diverged_share == 0


@pytest.mark.parametrize("family", [Navigation2DEndless, HopperForward])
def test_the_real_worlds_are_not_changed(family):
    """In the middle of a real episode others are imagined: it goes on as if nothing had happened."""
    real = make(family, 3)
    tasks, actions = real.unwrapped.sample_tasks(3, seeded(0)), draw_actions(real, 6)
    before = play(real, actions, tasks)
    again, kept = play(real, actions[:3], tasks), dict(vars(real.unwrapped))
    imagined = Imagined(real, 3)
    imagined.follow(lambda obs, action: torch.full_like(obs, torch.nan), *2 * [torch.zeros(again[0].shape[-1])])
    assert play(imagined, actions, tasks[[1, 2, 0]], seed=7)[2].all()
    assert imagined.diverged_share == 1
    assert imagined.unwrapped is not real.unwrapped
    assert vars(real.unwrapped).keys() == kept.keys()
    assert all(vars(real.unwrapped)[name] is value for name, value in kept.items())
    assert family.can_terminate == real.unwrapped.can_terminate == (family is HopperForward)
    rest = [torch.stack(column) for column in zip(*[real.step(action)[:4] for action in actions[3:]], strict=True)]
    assert_equal(rest, (before[0][4:], *(part[3:] for part in before[1:])))
    assert_equal(play(real, actions, tasks), before)
    assert_equal(play(make(family, 3), actions, tasks), before)


def test_pictures_are_of_the_real_family():
    imagined = Imagined(make(Navigation2D, 2, horizon=9, scale=3.0), 5)
    one = imagined.single_world()
    assert type(one) is ScaleActions
    assert type(one.unwrapped) is Navigation2D
    assert (one.num_envs, one.scale, one.unwrapped.horizon) == (1, 3.0, 9)
    one.reset(seed=0)
    assert float(one.step(torch.tensor([[3.0, 0.0]]))[0][0, 0]) == pytest.approx(0.1, abs=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_imagines_the_same_worlds():
    results = []
    for device in ("cpu", "cuda"):
        imagined = Imagined(make(Navigation2D, 2, device=device), 4)
        imagined.follow(walk, *(bound.to(device) for bound in (torch.full((2,), -0.2), torch.full((2,), 0.2))))
        tasks = imagined.unwrapped.sample_tasks(4, seeded(0))
        results.append(play(imagined, draw_actions(imagined, 6).to(device), tasks))
        assert imagined.diverged.device == results[-1][0].device == tasks.device
        assert tasks.device.type == device
        assert imagined.diverged_share > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- a model that goes wild


@pytest.mark.parametrize("bad", [1.01, -2.01, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("coordinate", [0, 1])
def test_a_world_that_diverges_ends_at_its_last_good_observation(bad, coordinate):
    imagined = Imagined(make(Navigation2D, 2), 4)
    tasks, actions = imagined.unwrapped.sample_tasks(4, seeded(0)), draw_actions(imagined, 6)
    # The other coordinate's bounds are so wide that 1.01 and -2.01 would be good there.
    low, high = torch.full((2,), -3.0), torch.full((2,), 3.0)
    low[coordinate], high[coordinate] = -2, 1
    imagined.follow(walk, low, high)
    healthy = play(imagined, actions, tasks)
    assert imagined.diverged_share == 0
    wild_at = {}  # world: step

    def wild(obs, action):
        next_obs = walk(obs, action)
        for world, step in wild_at.items():
            if imagined.unwrapped._steps == step:  # only once: what is predicted later is good again
                next_obs[world, coordinate] = bad
        return next_obs

    imagined.follow(wild, low, high)
    for wild_at in ({1: 2, 3: 4}, {0: 0}):
        obs, _ = imagined.reset(seed=0, options={"tasks": tasks})
        assert imagined.diverged_share == 0
        for step, action in enumerate(actions):
            before = obs
            obs, reward, terminated, truncated, info = imagined.step(action)
            gone = [step >= wild_at.get(world, 6) for world in range(4)]
            assert terminated.tolist() == info["diverged"].tolist() == gone
            assert info["diverged"].dtype == torch.bool
            assert imagined.diverged_share == sum(gone) / 4
            assert truncated.all() == (step == 5)
            for world in range(4):
                if not gone[world]:  # the neighbours do not notice
                    assert torch.equal(obs[world], healthy[0][step + 1, world])
                    assert reward[world] == healthy[1][step, world]
                    continue
                assert torch.equal(obs[world], before[world])
                # The step that ends an episode is paid for where the world has stayed, and for all steps that are left.
                paid = -np.linalg.norm(before[world] - tasks[world]) * (6 - step) if step == wild_at[world] else 0
                assert float(reward[world]) == pytest.approx(paid, abs=1e-12)


class Welcome(Navigation2DEndless):
    """The distance from the goal, as a reward."""

    @staticmethod
    def reward(obs, action, next_obs, task):
        return (next_obs - task).norm(dim=-1)


@pytest.mark.parametrize("family", [Navigation2DEndless, Welcome])
def test_fleeing_from_what_the_model_knows_does_not_pay(family):
    """By the true dynamics, in a range that is left in the third of 20 steps. Where each step costs, to have left costs
    more than to stay or to walk to the goal; where each step pays, to have left pays for no step after."""
    imagined = Imagined(make(family, 3, horizon=20, scale=0.1), 3)
    imagined.follow(walk, torch.full((2,), -0.25), torch.full((2,), 0.25))
    tasks = torch.tensor([[0.2, 0.0]] * 3)
    actions = torch.zeros(20, 3, 2, dtype=torch.float64)
    actions[:, 1, 0] = -0.1  # flees
    actions[:2, 2, 0] = 0.1  # walks to the goal
    _, reward, *_ = play(imagined, actions, tasks)
    assert imagined.diverged_share == pytest.approx(1 / 3)
    stays, flees, arrives = reward.sum(0).tolist()
    if family is Welcome:
        assert flees == pytest.approx(0.3 + 0.4 + 0.4)  # the third step is paid for where the world has stayed
        assert arrives == pytest.approx(0.1)
    else:
        assert stays == pytest.approx(-20 * 0.2)
        assert flees == pytest.approx(-0.3 - 19 * 0.4)
        assert flees < stays < arrives


def test_predictions_on_the_bounds_are_good():
    imagined = Imagined(make(Navigation2D, 2), 2)
    low, high = torch.tensor([-0.5, -0.25]), torch.tensor([0.25, 0.5])
    for bound in (low, high):
        imagined.follow(lambda obs, action, bound=bound: bound.double().expand(2, 2), low, high)
        imagined.reset(seed=0)
        obs, _, terminated, _, info = imagined.step(torch.zeros(2, 2))
        assert torch.equal(obs, bound.double().expand(2, 2))
        assert not terminated.any()
        assert not info["diverged"].any()


def test_an_end_is_no_divergence_and_stays_none():
    """Three worlds walk to the fence: one ends there, one goes wild before, one when it would have ended."""
    imagined = Imagined(make(Fence, 2, scale=1.0), 3)
    wild = {1: [1], 3: [0, 1, 2], 4: [0, 2], 5: [0, 1, 2]}  # step: worlds

    def steps(obs, action):
        next_obs = obs + torch.tensor([0.1, 0.0])
        next_obs[wild.get(step := imagined.unwrapped._steps, [])] = torch.nan
        if step == 2:
            next_obs[2, 1] = 7.0  # while x is beyond the fence
        return next_obs

    imagined.follow(steps, torch.full((2,), -5.0), torch.full((2,), 5.0))
    imagined.reset(seed=0)
    record = [imagined.step(torch.zeros(3, 2)) for _ in range(6)]
    x = torch.stack([obs[:, 0] for obs, *_ in record])
    expected = [[0.1, 0.1, 0.1], [0.2, 0.1, 0.2], *4 * [[0.3, 0.1, 0.2]]]
    torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    terminated = [terminated.tolist() for _, _, terminated, _, _ in record]
    assert terminated == [[False] * 3, [False, True, False], *4 * [[True] * 3]]
    diverged = [info["diverged"].tolist() for *_, info in record]
    assert diverged == [[False] * 3, [False, True, False], *4 * [[False, True, True]]]
    assert imagined.diverged_share == pytest.approx(2 / 3)


def played_with(disturb):
    """The rest of an episode, one of whose worlds diverges, after `disturb` had what the steps before returned."""
    imagined = Imagined(make(Navigation2D, 2), 3)
    actions, tasks = draw_actions(imagined, 6), imagined.unwrapped.sample_tasks(3, seeded(0))
    drift = torch.tensor([[0.0], [0.0], [0.6]])  # so that world 2 leaves the bounds in its second step
    imagined.follow(lambda obs, action: walk(obs, action) + drift, -torch.ones(2), torch.ones(2))
    disturb(imagined.reset(seed=0, options={"tasks": tasks.clone()}))
    for action in actions[:4]:
        disturb(imagined.step(action))
    *rest, info = imagined.step(actions[4])
    assert imagined.diverged_share == pytest.approx(1 / 3)
    return *rest, info["diverged"]


def test_what_a_caller_does_to_returned_tensors_changes_nothing():
    def fill(returned):
        for tensor in returned[:-1]:
            tensor.fill_(1)

    assert_equal(played_with(fill), played_with(lambda returned: None))


def test_what_a_caller_does_to_info_changes_nothing():
    def fill(returned):
        for tensor in returned[-1].values():
            tensor.fill_(True)

    assert_equal(played_with(fill), played_with(lambda returned: None))


# ---------------------------------------------------------------- what cannot be imagined


class Tiny(gym.Env):
    """A user's own environment: nobody but itself knows its reward."""

    observation_space = action_space = Box(-1, 1, (1,), np.float32)

    def sample_tasks(self, num_tasks, rng, split):
        return rng.uniform(0, 1, (num_tasks, 1))

    def set_task(self, task):
        self.task = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_rewards_that_only_the_environment_knows_are_refused():
    adapted = ScaleActions(AdaptedVectorEnv(Tiny, 2, 5), 1.0)
    with pytest.raises(TypeError, match="reward is not known as a function"):
        Imagined(adapted, 3)
    with pytest.raises(SystemExit, match=r"^--env-id.*reward") as error:
        envs.imagine(adapted, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["Bandit5", "GaussianBandit5", "DependentBandit", "TabularMDP"])
def test_random_rewards_are_refused(name):
    """They are also of families whose actions are choices, which cannot be scaled in the first place."""
    choices = envs.make(f"{name}-v0", 2, horizon=5, discrete=True)
    with pytest.raises(TypeError, match="Box"):
        ScaleActions(choices, 1.0)
    with pytest.raises(TypeError, match="reward is not known as a function"):
        Imagined(choices, 3)
    with pytest.raises(SystemExit, match=r"^--env-id.*reward") as error:
        envs.imagine(choices, 3)
    assert "\n" not in str(error.value)


def test_choices_are_refused_although_their_reward_is_known():
    with pytest.raises(SystemExit, match=r"^--env-id.*actions are choices"):
        envs.imagine(envs.make("MouseCheese-v0", 2, horizon=5, discrete=True), 3)


def test_imagine_makes_what_can_be_imagined():
    imagined = envs.imagine(envs.make("HalfCheetahForward-v0", 2, horizon=7, action_scale=3.0), 5)
    assert type(imagined) is Imagined
    assert (imagined.num_envs, imagined.unwrapped.horizon, imagined.scale) == (5, 7, 3.0)
    assert imagined.unwrapped.dtype == torch.float32
    obs, _ = imagined.reset(seed=0)
    imagined.follow(lambda obs, action: obs, *(sign * torch.full((18,), 100.0) for sign in (-1, 1)))
    torch.testing.assert_close(imagined.step(torch.zeros(5, 6))[1], obs[:, -1])
