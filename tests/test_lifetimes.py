"""Worlds with clocks of their own: partial resets, checkpoints of worlds, and `Lifetimes` against single worlds."""

import io
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

import envs
from envs import Lifetimes, ScaleActions
from envs.cartpole import CartPoleFixed, CartPoleLength
from envs.forward import HopperForward
from envs.gridworlds import EmptyRooms, KeyBox, NonstationaryABC, RandomABC, SymABC
from envs.locomotion import HalfCheetahVel
from envs.navigation import Navigation2D, Navigation2DEndless
from envs.random_params import HopperRandParams
from envs.tabular_mdp import TabularMDP

FAMILIES = {family.__name__: family for family in envs.HORIZONS}
TOGETHER = ["HopperRandParams", "WalkerRandParams", "MouseCheese"]  # worlds can only start together
APART = [name for name in FAMILIES if name not in TOGETHER]
SOON_OVER = ["RandomABC", "RandomABCReversed", "RandomABCDiagonal", "SymABC", "SymABCReversed", "SymABCDiagonal"]
SOON_OVER += ["FixedABC", "NonstationaryABC", "CartPoleFixed", "CartPoleLength", "HopperForward", "Walker2dForward"]
each_apart = pytest.mark.parametrize("name", APART)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_actions(venv, steps, seed=0):
    """Uniform actions [S, B] or [S, B, A]."""
    space, generator = venv.single_action_space, seeded(seed)
    if not space.shape:
        return torch.randint(int(space.n), (steps, venv.num_envs), generator=generator)
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    return low + (high - low) * torch.rand(steps, venv.num_envs, *space.shape, generator=generator)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def flat(result):
    """What a step returns, tensors only."""
    *tensors, info = result
    return [*tensors, *info.values()]


def through_a_file(saved):
    """As a checkpoint keeps it."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------- partial resets


@each_apart
def test_each_world_is_as_in_a_batch_that_starts_as_a_whole(name):
    """Even worlds start again at steps 25, with tasks of their own, and 50, odd ones at 40, their horizon: two usual
    batches do so. Before each reset and each step all three get the same chances, since resets draw numbers."""
    worlds, horizon = 8 if hasattr(FAMILIES[name], "model_file") else 24, 40
    venv, *whole = (FAMILIES[name](worlds, horizon) for _ in range(3))
    is_odd = torch.arange(worlds) % 2 == 1
    begins = {0: (25, 50), 1: (40,)}
    tasks, actions = venv.sample_tasks(2 * worlds, seeded(1)).split(worlds), draw_actions(venv, 60)

    def the_same(call, *batches):
        state = batches[0]._generator.get_state()
        results = []
        for batch in batches:
            batch._generator.set_state(state)
            results.append(call(batch))
        return results

    the_same(lambda batch: batch.reset(options={"tasks": tasks[0]}), *whole, venv)
    for step, action in enumerate(actions):
        for group in begins:
            if step in begins[group]:
                if name in SOON_OVER and step == 25:
                    assert venv._over[is_odd].any()  # an end that goes on being one
                    assert venv._over[~is_odd].any()
                    assert not venv._over.all()
                mask = is_odd == bool(group)
                own = {"tasks": tasks[1]} if step == 25 else {}
                last = venv._obs.clone()
                (first, _), (obs, info) = the_same(
                    lambda batch, own=own, mask=mask: batch.reset(
                        options={**own, "reset_mask": mask} if batch is venv else dict(own)
                    ),
                    whole[group],
                    venv,
                )
                assert info == {}
                assert torch.equal(obs, torch.where(mask[:, None], first, last))
                assert torch.equal(venv.tasks, torch.where(is_odd[:, None], whole[1].tasks, whole[0].tasks))
        *expected, row = (flat(result) for result in the_same(lambda batch: batch.step(action), *whole, venv))  # noqa: B023
        for even, odd, ours in zip(*expected, row, strict=True):
            assert torch.equal(ours, torch.where(is_odd.reshape(-1, *[1] * (ours.ndim - 1)), odd, even))


@each_apart
def test_a_full_mask_is_a_full_reset_and_an_empty_one_is_none(name):
    venv, other, same = (FAMILIES[name](5, 7) for _ in range(3))
    actions = draw_actions(venv, 7)
    for batch in (venv, other, same):
        batch.reset(seed=1)
        for action in actions[:3]:
            batch.step(action)
    everyone = torch.ones(5, dtype=torch.bool)
    assert torch.equal(venv.reset(options={"reset_mask": everyone})[0], other.reset()[0])
    assert torch.equal(venv.tasks, other.tasks)
    for action in actions:
        assert equal(flat(venv.step(action)), flat(other.step(action)))
    assert torch.equal(venv.reset(seed=9, options={"reset_mask": everyone})[0], other.reset(seed=9)[0])
    assert torch.equal(venv.tasks, other.tasks)
    state = same._generator.get_state()
    kept = same.save_worlds()
    obs, _ = same.reset(options={"reset_mask": ~everyone})
    assert torch.equal(obs, kept["_obs"])
    assert all(torch.equal(value, kept[name]) for name, value in same.save_worlds().items() if name != "generator")
    assert not torch.equal(state, same._generator.get_state())


@each_apart
def test_other_masks_are_refused_and_change_nothing(name):
    venv, twin = FAMILIES[name](4, 9), FAMILIES[name](4, 9)
    actions = draw_actions(venv, 9)
    mask = torch.tensor([True, False, False, True])
    with pytest.raises(gym.error.ResetNeeded):
        venv.reset(options={"reset_mask": mask})
    with pytest.raises(gym.error.ResetNeeded):
        venv.save_worlds()
    venv.reset(seed=0), twin.reset(seed=0)
    equal(venv.step(actions[0])[:4], twin.step(actions[0])[:4])
    bad = [mask[:3], mask[:, None], torch.tensor(True), mask.long(), mask.float(), [1, 0, 0, 1], mask.numpy()[:3]]
    for wrong in bad:
        with pytest.raises(ValueError, match=r"reset_mask must be bool \[4\], got"):
            venv.reset(seed=3, options={"reset_mask": wrong})
        with pytest.raises(ValueError, match="reset_mask must be bool"):
            venv.reset(options={"reset_mask": wrong, "tasks": venv.tasks})
    assert equal(flat(venv.step(actions[1])), flat(twin.step(actions[1])))
    for right in (mask.numpy(), mask.tolist()):
        venv.reset(options={"reset_mask": right}), twin.reset(options={"reset_mask": mask})
        assert equal(flat(venv.step(actions[2])), flat(twin.step(actions[2])))


@pytest.mark.parametrize("name", TOGETHER)
def test_families_whose_worlds_start_together_say_so(name):
    venv, twin = FAMILIES[name](4, 9), FAMILIES[name](4, 9)
    actions = draw_actions(venv, 9)
    venv.reset(seed=0), twin.reset(seed=0)
    for action in actions[:3]:
        venv.step(action), twin.step(action)
    for call in (
        lambda: venv.reset(options={"reset_mask": torch.tensor([True, False, False, True])}),
        venv.save_worlds,
        lambda: venv.load_worlds({}),
    ):
        with pytest.raises(NotImplementedError, match=f"worlds of {name} can only start together"):
            call()
    for action in actions[3:]:
        assert equal(flat(venv.step(action)), flat(twin.step(action)))


@pytest.mark.parametrize("family", [Navigation2D, RandomABC, HopperForward])
def test_a_world_at_its_horizon_must_start_again(family):
    venv = family(3, 4)
    actions = draw_actions(venv, 20)
    tasks = venv.sample_tasks(3, seeded(0))
    venv.reset(seed=0, options={"tasks": tasks})
    for action in actions[:2]:
        venv.step(action)
    venv.reset(options={"tasks": tasks, "reset_mask": [False, True, False]})
    flags = [venv.step(action)[3].tolist() for action in actions[:2]]
    assert flags == [[False] * 3, [True, False, True]]
    for _ in range(2):
        assert venv.at_horizon
        with pytest.raises(gym.error.ResetNeeded, match="for worlds at the horizon"):
            venv.step(actions[0])
    venv.reset(options={"tasks": tasks, "reset_mask": [True, False, False]})
    with pytest.raises(gym.error.ResetNeeded):  # the third is still there
        venv.step(actions[0])
    venv.reset(options={"tasks": tasks, "reset_mask": [False, False, True]})
    flags = [venv.step(action)[3].tolist() for action in actions[:2]]
    assert flags == [[False] * 3, [False, True, False]]
    venv.reset(options={"tasks": tasks})  # and together again
    flags = [venv.step(action)[3].tolist() for action in actions[:4]]
    assert flags == [[False] * 3] * 3 + [[True] * 3]


def test_a_diverged_world_starts_again_healthy():
    venv = HopperForward(4, 9)
    actions = draw_actions(venv, 9)
    venv.reset(seed=0)
    venv._state[1:3, -venv.model.nv :] = 1e12
    *_, terminated, _, info = venv.step(actions[0])
    assert info["diverged"].tolist() == terminated.tolist() == [False, True, True, False]
    venv.reset(options={"reset_mask": [True, True, False, False]})
    obs, reward, terminated, _, info = venv.step(actions[1])
    assert info["diverged"].tolist() == terminated.tolist() == [False, False, True, False]
    assert reward[1] != 0 == reward[2]
    assert obs.abs().max() < 100


@each_apart
def test_saved_worlds_go_on_bit_identically(name):
    """In the middle of episodes, each at its own step, in a new batch, and in the same one again."""
    venv, other = FAMILIES[name](6, 30), FAMILIES[name](6, 30)
    actions = draw_actions(venv, 45)
    venv.reset(seed=3)
    for action in actions[:15]:
        venv.step(action)
    venv.reset(options={"reset_mask": torch.arange(6) < 3})
    for action in actions[15:20]:
        venv.step(action)
    saved = venv.save_worlds()
    copies = {key: value.clone() for key, value in saved.items()}

    def go_on(batch):
        rows = [flat(batch.step(action)) for action in actions[20:30]]
        assert batch.at_horizon
        rows.append([batch.reset(options={"reset_mask": torch.arange(6) >= 3})[0], batch.tasks])
        return rows + [flat(batch.step(action)) for action in actions[30:45]]

    rows = go_on(venv)
    assert saved.keys() == copies.keys()
    assert all(torch.equal(saved[key], copies[key]) for key in saved)  # later steps do not write into it
    with pytest.raises(gym.error.ResetNeeded):
        other.load_worlds(saved)
    other.reset(seed=8)
    other.step(actions[0])
    for batch in (other, venv):
        batch.load_worlds(through_a_file(saved))
        assert all(equal(a, b) for a, b in zip(go_on(batch), rows, strict=True))
        batch.reset(seed=4)


# ---------------------------------------------------------------- lifetimes against single worlds

PLAYED = [  # family, horizon, episodes of a lifetime, steps
    (RandomABC, 10, 3, 250),
    (EmptyRooms, 25, 2, 250),
    (KeyBox, 40, 2, 250),
    (NonstationaryABC, 6, 4, 250),
    (CartPoleLength, 25, 3, 250),
    (CartPoleFixed, 12, 1, 100),
    (HopperForward, 20, 2, 150),
    (HalfCheetahVel, 7, 3, 60),
    (Navigation2DEndless, 5, 2, 60),
]


@cache
def training_goals():
    return {tuple(goal) for goal in EmptyRooms(1).sample_tasks(5000, seeded(0)).tolist()}


def is_training_task(family, task):
    """By the docstrings: every fifth goal, and the middle fifth of each tenth of a range, are for tests."""
    if family is EmptyRooms:
        return tuple(task.tolist()) in training_goals()
    if family in (CartPoleFixed, HopperForward, NonstationaryABC):
        return True
    ranges = {CartPoleLength: (0.5, 5), HalfCheetahVel: (0, 2), Navigation2DEndless: (-0.5, 0.5)}
    low, high = ranges.get(family, (-1, 1))
    return int(50 * (float(task[0]) - low) / (high - low)) % 5 != 2


def put(single, obs, state):
    """Into a start state that was drawn; those of the grids are always the same and must be right by themselves."""
    if state is not None:
        single._state[0] = state
    elif not isinstance(single, CartPoleLength):
        assert torch.equal(single._obs, obs)
    single._obs = obs.clone()


def play_beside_single_worlds(lives, worlds, actions, begin):
    """Steps all worlds, and for each of those in `worlds` a batch of one, with Python's counters; births, ends."""
    venv = lives.unwrapped
    family, horizon, dtype = type(venv), venv.horizon, venv.dtype
    obs, task = lives._started, venv.tasks.clone()
    singles = {world: family(1, horizon, dtype=dtype) for world in worlds}
    steps, numbers = dict.fromkeys(worlds, 0), {world: int(begin[world]) for world in worlds}
    ends, births, starts = [], [], []
    states = venv._state.clone() if hasattr(venv, "_state") else [None] * venv.num_envs
    for world, single in singles.items():
        single.reset(options={"tasks": task[world, None]})
        put(single, obs[world, None], states[world])
    for step, action in enumerate(actions):
        before = venv.tasks.clone()
        obs, reward, terminated, truncated, info = lives.step(action)
        if hasattr(venv, "_state"):
            states = venv._state.clone()
        for world, single in singles.items():
            last, paid, fell, _, alone = single.step(action[world, None])
            steps[world] += 1
            is_late, is_last = steps[world] == horizon, numbers[world] == lives.episodes - 1
            over = bool(fell[0]) or is_late
            assert torch.equal(info["final_obs"][world], last[0])
            assert (reward[world], terminated[world], bool(truncated[world])) == (paid[0], fell[0], is_late)
            assert int(info["episode"][world]) == numbers[world]
            assert bool(info["born"][world]) == (over and is_last)
            assert all(value[world] == alone[key][0] for key, value in info.items() if key in alone)
            if not over:
                assert torch.equal(obs[world], last[0])
                assert torch.equal(venv.tasks[world], before[world])
                continue
            numbers[world], steps[world] = 0 if is_last else numbers[world] + 1, 0
            if is_last:
                assert is_training_task(family, venv.tasks[world])
                births.append(venv.tasks[world])
            else:
                assert torch.equal(venv.tasks[world], before[world])
            ends.append((step, world, "early" if fell[0] else "late"))
            starts.append(obs[world])
            single.reset(options={"tasks": venv.tasks[world, None]})
            put(single, obs[world, None], states[world])
    assert info.keys() >= {"final_obs", "episode", "born"}
    assert info["episode"].dtype == torch.int64
    assert info["born"].dtype == torch.bool
    return ends, births, starts


def begun(family, worlds, horizon, episodes, begin=None, seed=0, **kwargs):
    lives = Lifetimes(family(worlds, horizon, **kwargs), episodes)
    tasks = lives.unwrapped.sample_tasks(worlds, seeded(7))
    begin = torch.zeros(worlds, dtype=torch.int64) if begin is None else begin
    lives._started, info = lives.reset(seed=seed, options={"tasks": tasks, "episode": begin})
    assert info == {}
    assert torch.equal(lives.unwrapped.tasks, tasks.to(lives.unwrapped.dtype))
    return lives


@pytest.mark.parametrize(("family", "horizon", "episodes", "steps"), PLAYED)
@pytest.mark.parametrize("late", [0, 1])
def test_each_world_lives_as_if_alone(family, horizon, episodes, steps, late):
    """From the first episode of all lifetimes, and from a later one in some."""
    worlds = 4
    begin = late * torch.arange(worlds) % episodes
    lives = begun(family, worlds, horizon, episodes, begin, dtype=torch.float64)
    actions = draw_actions(lives, steps if late == 0 else steps // 2)
    ends, births, starts = play_beside_single_worlds(lives, range(worlds), actions, begin)
    assert len(births) > 3
    kinds = {kind for _, _, kind in ends}
    assert kinds == ({"early", "late"} if family.can_terminate and family is not HalfCheetahVel else {"late"})
    if family not in (CartPoleFixed, HopperForward, NonstationaryABC):
        assert len(torch.stack(births).unique(dim=0)) > 0.7 * len(births)
    if family in (CartPoleLength, CartPoleFixed, HopperForward, HalfCheetahVel):  # fresh states, of the same kind
        assert len(torch.stack(starts).unique(dim=0)) == len(starts)
        assert (torch.stack(starts).mean(0) - lives._started.mean(0)).abs().max() < 0.5
    if "early" in kinds and not late:
        assert len({step for step, _, kind in ends if kind == "late"}) > 3  # clocks of their own


def test_the_clocks_of_physics_through_scaled_actions():
    """The same lifetimes, whatever the units of the actions."""
    plain = begun(HopperForward, 5, 15, 2)
    scaled = Lifetimes(ScaleActions(HopperForward(5, 15), 10.0), 2)
    tasks = plain.unwrapped.tasks
    assert torch.equal(scaled.reset(seed=0, options={"tasks": tasks})[0], plain._started)
    assert scaled.single_action_space.high.tolist() == [10.0] * 3
    actions = draw_actions(scaled, 60)
    ends = 0
    for action in actions:
        rows = flat(scaled.step(action)), flat(plain.step(scaled.env.mapped(action)))
        assert equal(*rows)
        ends += int((rows[0][2] | rows[0][3]).sum())
    assert ends > 15


@pytest.mark.parametrize(("family", "horizon"), [(EmptyRooms, 12), (KeyBox, 12), (CartPoleLength, 12)])
def test_thousands_of_worlds_live_as_if_alone(family, horizon):
    worlds = 4096
    lives = begun(family, worlds, horizon, 2, torch.arange(worlds) % 2, dtype=torch.float64)
    watched = [0, 1, 1000, 2047, 4095]
    ends, births, _ = play_beside_single_worlds(lives, watched, draw_actions(lives, 60), torch.arange(worlds) % 2)
    assert {world for _, world, _ in ends} == set(watched)
    assert len(births) > 10


def test_births_draw_from_all_training_tasks_evenly():
    lives = Lifetimes(EmptyRooms(500, 1), 1)
    lives.reset(seed=0)
    actions, drawn = draw_actions(lives, 30), []
    for action in actions:
        *_, info = lives.step(action)
        assert info["born"].all()
        drawn.append(lives.unwrapped.tasks)
    assert all(not torch.equal(a, b) for a, b in zip(drawn[1:], drawn[:-1], strict=True))
    goals, counts = torch.cat(drawn).unique(dim=0, return_counts=True)
    assert torch.equal(goals, EmptyRooms(1).sample_tasks(5000, seeded(0)).unique(dim=0))
    expected = 15000 / 82
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - 81) < 4 * (2 * 81) ** 0.5


def test_equal_seeds_give_equal_lifetimes():
    rows = []
    for seed in (0, 0, 1, None):
        lives = Lifetimes(EmptyRooms(4, 5), 2)
        if seed is None:
            lives.reset(seed=0)
            lives.step(torch.zeros(4, dtype=torch.int64))
        lives.reset(seed=seed)
        torch.manual_seed(len(rows))
        rows.append([lives.unwrapped.tasks])
        for action in draw_actions(lives, 40):
            rows[-1] += flat(lives.step(action))
            rows[-1].append(lives.unwrapped.tasks)
    assert equal(rows[0], rows[1])
    for other in rows[2:]:
        assert not torch.equal(rows[0][0], other[0])
        assert not torch.equal(rows[0][-1], other[-1])
    given = []  # the births follow the seed even where the first tasks are given
    for seed in (0, 1):
        lives = Lifetimes(EmptyRooms(50, 1), 1)
        lives.reset(seed=seed, options={"tasks": lives.unwrapped.sample_tasks(50, seeded(0))})
        lives.step(torch.zeros(50, dtype=torch.int64))
        given.append(lives.unwrapped.tasks)
    assert not torch.equal(*given)


# ---------------------------------------------------------------- lifetimes that change


def test_worths_swap_four_times_in_a_thousand_episodes():
    """All worlds walk to C again and again: what it pays is known for every episode of the paper's lifetime."""
    begin = torch.tensor([0, 0, 249, 250, 251, 600, 999])
    lives = Lifetimes(NonstationaryABC(7, 4), 1000)
    sign = torch.tensor([1.0, -1, 1, -1, 1, 1, -1])
    tasks = torch.stack([sign, torch.full((7,), -0.5), -sign], 1)
    lives.reset(seed=0, options={"tasks": tasks, "episode": begin})
    base, births = sign.tolist(), [0] * 7
    way = torch.tensor([1, 1, 3, 3])[:, None].expand(4, 7)
    for episode in range(1100):
        numbers = (begin + episode) % 1000
        assert torch.equal(lives.unwrapped.tasks[:, 1], torch.full((7,), -0.5))
        assert torch.equal(lives.unwrapped.tasks[:, 0], -lives.unwrapped.tasks[:, 2])
        for step, action in enumerate(way):
            _, reward, terminated, truncated, info = lives.step(action)
            assert torch.equal(info["episode"], numbers)
            if step < 3:
                assert not reward.any()
                assert not (terminated | truncated).any()
        swaps = [sum(number >= border for border in (250, 500, 750)) for number in numbers.tolist()]
        assert reward.tolist() == [-a * (-1) ** count for a, count in zip(base, swaps, strict=True)]
        assert terminated.all()
        assert truncated.all()  # the horizon was 4
        assert torch.equal(info["born"], numbers == 999)
        for world in info["born"].nonzero().flatten().tolist():
            births[world] += 1
            base[world] = float(lives.unwrapped.tasks[world, 0])
            assert base[world] in (1.0, -1.0)
    assert births == [1, 1, 1, 1, 1, 1, 2]


def test_births_of_changing_lifetimes_have_both_signs():
    lives = Lifetimes(NonstationaryABC(40, 1), 1)
    lives.reset(seed=0)
    drawn = []
    for action in draw_actions(lives, 50):
        lives.step(action)
        drawn.append(lives.unwrapped.tasks[:, 0])
    assert torch.stack(drawn).mean(0).abs().max() < 0.6  # each world: 50 births of mean 0


@pytest.mark.parametrize("family", [RandomABC, HopperForward, CartPoleLength])
def test_a_lifetime_can_begin_late(family):
    lives = Lifetimes(family(3, 4), 5)
    tasks = lives.unwrapped.sample_tasks(3, seeded(0))
    obs, _ = lives.reset(seed=0, options={"tasks": tasks, "episode": torch.tensor([0, 3, 4])})
    assert torch.equal(obs, lives.unwrapped._obs)
    seen, born = [], []
    for action in draw_actions(lives, 16)[:, :1].expand(-1, 3, *draw_actions(lives, 1).shape[2:]):
        *_, terminated, truncated, info = lives.step(action)
        for world in (terminated | truncated).nonzero().flatten().tolist():
            seen.append((world, int(info["episode"][world])))
            if info["born"][world]:
                born.append(seen[-1])
    for world, first in ((0, 0), (1, 3), (2, 4)):
        numbers = [number for which, number in seen if which == world]
        assert numbers == [(first + k) % 5 for k in range(len(numbers))]
        assert len(numbers) >= 4
    assert all(number == 4 for _, number in born)
    assert {world for world, _ in born} >= {1, 2}


# ---------------------------------------------------------------- the wrapper


@pytest.mark.parametrize("episodes", [0, -1])
def test_a_lifetime_without_episodes_is_refused(episodes):
    with pytest.raises(ValueError, match=f"at least 1 episode, got {episodes}"):
        Lifetimes(RandomABC(2, 3), episodes)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([0, 1]),
        torch.tensor([[0], [1], [2]]),
        torch.tensor(1),
        torch.tensor([0, -1, 0]),
        torch.tensor([0, 5, 0]),
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([False, True, True]),
    ],
)
def test_other_episodes_are_refused_and_change_nothing(wrong):
    lives, twin = begun(RandomABC, 3, 4, 5), begun(RandomABC, 3, 4, 5)
    action = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"episode must be \[3\] numbers \(int64\) from 0 to 4, got"):
        lives.reset(seed=1, options={"episode": wrong})
    for _ in range(30):
        assert equal(flat(lives.step(action)), flat(twin.step(action)))


def test_lists_of_episodes_and_the_last_episode_are_fine():
    lives = Lifetimes(RandomABC(3, 4), 5)
    lives.reset(options={"episode": [0, 4, 1]})
    assert lives.step(torch.zeros(3, dtype=torch.int64))[4]["episode"].tolist() == [0, 4, 1]


def test_lifetimes_begin_together():
    lives = begun(RandomABC, 3, 4, 5)
    with pytest.raises(ValueError, match="lifetimes begin together"):
        lives.reset(options={"reset_mask": torch.ones(3, dtype=torch.bool)})


def test_reset_is_needed_once():
    lives = Lifetimes(RandomABC(2, 3), 2)
    action = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(gym.error.ResetNeeded):
        lives.step(action)
    lives.reset()
    for _ in range(20):
        lives.step(action)
    with pytest.raises(ValueError, match="tasks must have shape"):
        lives.reset(options={"tasks": torch.zeros(2, 2)})


@pytest.mark.parametrize("name", TOGETHER)
def test_families_whose_worlds_start_together_are_refused(name):
    with pytest.raises(TypeError, match=f"^worlds of {name} can only start together, and in lifetimes they must"):
        Lifetimes(FAMILIES[name](2, 3), 2)


def test_the_mode_is_gymnasiums_same_step():
    venv = RandomABC(2, 3)
    lives = Lifetimes(venv, 2)
    assert lives.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert venv.metadata["autoreset_mode"] == RandomABC.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    assert lives.metadata["render_fps"] == venv.metadata["render_fps"]
    assert lives.num_envs == 2
    assert lives.single_action_space == venv.single_action_space


def test_the_single_world_is_of_the_same_kind():
    lives = begun(CartPoleLength, 3, 6, 4)
    single = lives.single_world()
    assert (type(single), single.num_envs, single.episodes, single.unwrapped.horizon) == (Lifetimes, 1, 4, 6)
    single.reset(options={"tasks": torch.tensor([[2.0]])})
    numbers = [int(single.step(torch.ones(1, dtype=torch.int64))[4]["episode"]) for _ in range(13)]
    assert numbers == [0] * 6 + [1] * 6 + [2]
    scaled = Lifetimes(ScaleActions(HopperForward(3, 5), 10.0), 2).single_world()
    assert scaled.single_action_space.high.tolist() == [10.0] * 3


@pytest.mark.parametrize("family", [RandomABC, CartPoleLength, HopperForward])
def test_what_a_caller_does_to_returned_tensors_changes_nothing(family):
    """Nor do later steps write into them."""
    lives, twin = begun(family, 4, 5, 2), begun(family, 4, 5, 2)
    kept = []
    for action in draw_actions(lives, 25):
        row = flat(twin.step(action))
        kept.append((row, [tensor.clone() for tensor in row]))
        for tensor in flat(lives.step(action)):
            tensor.zero_()
    assert all(equal(row, copy) for row, copy in kept)
    action = draw_actions(lives, 1)[0]
    assert equal(flat(lives.step(action)), flat(twin.step(action)))
    assert torch.equal(lives.unwrapped.tasks, twin.unwrapped.tasks)


class FedPole(CartPoleEnv):
    """Gymnasium's pole, whose next start is given."""

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.state = np.array(self.start, dtype=np.float64)
        return self.state.astype(np.float32), info


@pytest.mark.parametrize("length", [0.5, 1.3])
def test_lifetimes_are_gymnasiums_autoreset_in_the_same_step(length):
    worlds, horizon = 6, 22
    lives = Lifetimes(CartPoleLength(worlds, horizon, dtype=torch.float64), 3)
    poles = [FedPole() for _ in range(worlds)]
    for pole in poles:
        pole.length, pole.polemass_length = length, pole.masspole * length
    theirs = SyncVectorEnv(
        [lambda pole=pole: TimeLimit(pole, horizon) for pole in poles], autoreset_mode=AutoresetMode.SAME_STEP
    )
    lives.unwrapped.sample_tasks = lambda num_tasks, generator: torch.full((num_tasks, 1), length, dtype=torch.float64)
    obs, _ = lives.reset(seed=0)
    for pole, start in zip(poles, obs.tolist(), strict=True):
        pole.start = start
    np.testing.assert_allclose(theirs.reset()[0], obs.numpy(), atol=1e-7)
    counts = {"early": 0, "late": 0, "both": 0}
    for action in draw_actions(lives, 400):
        obs, reward, terminated, truncated, info = lives.step(action)
        for pole, start in zip(poles, obs.tolist(), strict=True):
            pole.start = start
        their_obs, their_reward, their_terminated, their_truncated, their_info = theirs.step(action.numpy())
        np.testing.assert_allclose(their_obs, obs.numpy(), atol=1e-6)
        np.testing.assert_array_equal(their_reward, reward.numpy())
        np.testing.assert_array_equal(their_terminated, terminated.numpy())
        np.testing.assert_array_equal(their_truncated, truncated.numpy())
        over = terminated | truncated
        assert over.tolist() == their_info.get("_final_obs", np.zeros(worlds, bool)).tolist()
        for world in over.nonzero().flatten().tolist():
            np.testing.assert_allclose(their_info["final_obs"][world], info["final_obs"][world].numpy(), atol=1e-6)
        assert torch.equal(info["final_obs"][~over], obs[~over])
        counts["early"] += int((terminated & ~truncated).sum())
        counts["late"] += int((truncated & ~terminated).sum())
        counts["both"] += int((truncated & terminated).sum())
    assert min(counts.values()) > 0


# ---------------------------------------------------------------- checkpoints of lifetimes

SAVED = {
    "KeyBox": lambda: Lifetimes(KeyBox(5, 12), 2),
    "SymABC": lambda: Lifetimes(SymABC(5, 6), 3),
    "EmptyRooms": lambda: Lifetimes(EmptyRooms(5, 6), 1),
    "NonstationaryABC": lambda: Lifetimes(NonstationaryABC(5, 2), 260),
    "CartPoleLength": lambda: Lifetimes(CartPoleLength(5, 12), 2),
    "HopperForward": lambda: Lifetimes(ScaleActions(HopperForward(5, 15), 10.0), 2),
    "TabularMDP": lambda: Lifetimes(TabularMDP(5, 4), 2),
    "DependentBandit": lambda: Lifetimes(FAMILIES["DependentBandit"](5, 4), 2),
}


@pytest.mark.parametrize("name", SAVED)
def test_lifetimes_go_on_from_any_moment(name):
    """From a file, in new lifetimes and in old ones, with their episodes, births and chances."""
    lives, rows, saved, steps, later = SAVED[name](), [], {}, 40, 14
    actions = draw_actions(lives, steps + later)
    begin = torch.tensor([0, 245, 104, 236, 255] if name == "NonstationaryABC" else [0] * 5)
    lives.reset(seed=5, options={"episode": begin})
    for step, action in enumerate(actions):
        if step < steps and step % 4 == 0:
            saved[step] = lives.save_worlds(), lives.unwrapped._obs.clone()
        rows.append([*flat(lives.step(action)), lives.unwrapped.tasks])
    assert any(row[-2].any() for row in rows)  # births
    used = SAVED[name]()
    for step, (worlds, obs) in saved.items():
        fresh = SAVED[name]()
        for other in (fresh, used):
            assert torch.equal(other.load_worlds(through_a_file(worlds)), obs)
            for action, row in zip(actions[step : step + later], rows[step:], strict=False):
                assert equal([*flat(other.step(action)), other.unwrapped.tasks], row)


def test_saved_lifetimes_need_no_more_than_tensors():
    lives = begun(KeyBox, 3, 9, 2)
    saved = lives.save_worlds()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    assert {"_cell", "_key", "_obs", "_over", "_steps", "tasks", "generator", "episode", "task", "births"} == {*saved}
    obs = lives.load_worlds(saved)
    obs.zero_()
    assert lives.unwrapped._obs.any()  # a copy was returned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", [KeyBox, CartPoleLength, HopperForward])
def test_the_gpu_lives_the_same_lifetimes(family):
    on_cpu, on_gpu = (Lifetimes(family(6, 12, device=device), 2) for device in ("cpu", "cuda"))
    on_cpu.reset(seed=0), on_gpu.reset(seed=0)
    for step, action in enumerate(draw_actions(on_cpu, 40)):
        if step == 20:
            on_gpu.load_worlds(through_a_file(on_gpu.save_worlds()))
        for ours, theirs in zip(flat(on_cpu.step(action)), flat(on_gpu.step(action.cuda())), strict=True):
            assert theirs.is_cuda
            torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-5)


def test_random_bodies_are_refused_before_anything_is_lost():
    venv = HopperRandParams(2, 5)
    venv.reset(seed=0)
    state = venv._generator.get_state()
    with pytest.raises(NotImplementedError):
        venv.reset(seed=3, options={"reset_mask": torch.ones(2, dtype=torch.bool)})
    assert torch.equal(state, venv._generator.get_state())


@pytest.mark.parametrize("kind", ["Trials", "Imagined"])
def test_what_starts_together_refuses_a_mask(kind):
    worlds = envs.make("Navigation2D-v0", 3, horizon=5)
    worlds = envs.Trials(worlds, 2) if kind == "Trials" else envs.Imagined(worlds, 3)
    worlds.reset(seed=0)
    with pytest.raises(ValueError, match="no reset_mask"):
        worlds.reset(options={"reset_mask": torch.tensor([True, False, False])})


def test_a_non_finite_action_names_its_world():
    worlds = envs.make("Navigation2D-v0", 3, horizon=5)
    worlds.reset(seed=0)
    action = torch.zeros(3, 2)
    action[1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="non-finite action in world 1"):
        worlds.step(action)
