"""`physics="warp"` moves bodies as MuJoCo's own `mj_step` does, on the device, and nothing waits for it.

Warp's CPU device replays the same graph of the same kernels as a GPU would, so all of this runs without one.

Tolerances: numbers are float32, and a contact that begins a rounding error earlier pushes otherwise, so errors grow
tenfold every few steps, in single worlds far ahead of the others. From equal states one control step agrees within
`ONE_STEP`; MuJoCo itself moves as much where states are nudged by 2e-7. Over 20 control steps the median world agrees
within `MEDIAN`, which is ten times what 192 worlds of each family gave (HalfCheetah 8e-4, Ant 7e-5, Humanoid 2e-5,
Hopper 3e-6, Swimmer 1e-6); MuJoCo itself, its states rounded to float32 after every control step, is off by 3e-5, 2e-5,
4e-6, 1e-6 and 1e-7.
"""

import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import envs
from envs.forward import SwimmerForward
from envs.locomotion import AntDir, HalfCheetahDir, HumanoidDir
from envs.random_params import HopperRandParams

mujoco_warp = pytest.importorskip("mujoco_warp", reason="optional: requirements-warp.txt")
import warp as wp  # noqa: E402

from envs.warp_physics import OWN_BODY, WarpPhysics  # noqa: E402

pytestmark = pytest.mark.xdist_group("warp")  # batches are kept, and a first run compiles into ~/.cache/warp
ROOT = Path(__file__).resolve().parent.parent
ONE_STEP = (
    1e-3  # of 1 + |x|; the largest of 20 x 192 control steps: 6e-4 (HalfCheetah), without the turned friction 0.5
)
MEDIAN = {SwimmerForward: 1e-5, HopperRandParams: 3e-5, HumanoidDir: 2e-4, AntDir: 7e-4, HalfCheetahDir: 8e-3}
BODIES = list(MEDIAN)
every_body = pytest.mark.parametrize("family", BODIES, ids=lambda family: family.__name__)
B = 12


@cache
def batch(family, device="cpu"):
    """One batch of each family: what makes it takes seconds. Tests begin with a reset."""
    return family(B, max_episode_steps=20, physics="warp", device=device)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_actions(venv, steps, seed=0):
    low, high = torch.from_numpy(venv.single_action_space.low), torch.from_numpy(venv.single_action_space.high)
    return low + (high - low) * torch.rand(steps, venv.num_envs, len(low), generator=seeded(seed))


def mujoco_step(model, state, control, frame_skip):
    """(qpos, qvel) a control step later, by mj_step; a fresh MjData has no solution of the solver to begin with."""
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:], data.ctrl[:] = state[: model.nq], state[model.nq :], control
    for _ in range(frame_skip):
        mujoco.mj_step(model, data)
    assert not any(warning.number for warning in data.warning)
    return np.concatenate([data.qpos, data.qvel])


def median_errors(family, device):
    """Play 20 steps by "warp" and by "mujoco"; asserts equal ends, returns the median world's errors of obs, reward."""
    ours, theirs = batch(family, device), family(B, max_episode_steps=20, dtype=torch.float64)
    tasks = theirs.sample_tasks(B, seeded(1))
    first, _ = ours.reset(seed=1, options={"tasks": tasks})
    obs, _ = theirs.reset(seed=1, options={"tasks": tasks})
    torch.testing.assert_close(first.cpu().double(), obs, rtol=1e-6, atol=1e-6)
    for action in draw_actions(theirs, 20):
        obs, reward, terminated, _, _ = theirs.step(action)
        our_obs, our_reward, our_terminated, _, info = ours.step(action.to(device))
        assert our_obs.device.type == our_reward.device.type == ours._state.device.type == device
        assert torch.equal(our_terminated.cpu(), terminated)
        assert not info["diverged"].any()
    return (our_obs.cpu() - obs).abs().amax(1).median(), (our_reward.cpu() - reward).abs().median()


# ---------------------------------------------------------------- the same results


@every_body
def test_a_control_step_is_mujocos_own(family):
    venv, worst = batch(family), 0.0
    venv.reset(seed=0, options={"tasks": venv.sample_tasks(B, seeded(0))})
    models = venv._world_models if venv.own_bodies else [venv.model] * B
    actions = draw_actions(venv, 20)
    states = venv._state[:, 1:].double().numpy()
    touched = 0
    for action in actions:
        venv._state[:, 1:] = torch.from_numpy(states)
        after, good = venv._warp.step(venv._state, action)
        states = [mujoco_step(*each, venv.frame_skip) for each in zip(models, states, action.numpy(), strict=True)]
        states = np.stack(states)
        assert good.all()
        worst = max(worst, float((np.abs(after[:, 1:].numpy() - states) / (1 + np.abs(states))).max()))
        touched += int(venv._warp.data.nacon.numpy()[0])
    assert worst < ONE_STEP
    assert (touched > 0) == (family is not SwimmerForward)


@every_body
def test_an_episode_is_that_of_mujoco_rollout(family):
    obs_error, reward_error = median_errors(family, "cpu")
    assert obs_error < MEDIAN[family]
    assert reward_error < MEDIAN[family]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_body
def test_the_gpu_plays_the_same_episode(family):
    obs_error, reward_error = median_errors(family, "cuda")
    assert obs_error < MEDIAN[family]
    assert reward_error < MEDIAN[family]


def test_every_world_has_its_own_body():
    """All that mujoco_warp takes from each world's model is in its row, but for what cameras and lights look at."""
    venv = batch(HopperRandParams)
    venv.reset(seed=0, options={"tasks": venv.sample_tasks(4, seeded(0)).repeat(3, 1)})
    wp.init()
    for world, model in enumerate(venv._world_models):
        own = mujoco_warp.put_model(model)
        for field in fields(own):
            theirs, ours = getattr(own, field.name), getattr(venv._warp.model, field.name)
            if isinstance(theirs, wp.array) and not field.name.endswith("_poscom0"):
                theirs, ours = theirs.numpy(), ours.numpy()
                if field.name == "actuator_acc0":  # for muscles, of which there are none
                    continue
                row = ours[world : world + 1] if field.name in OWN_BODY else ours
                np.testing.assert_array_equal(row, theirs, err_msg=field.name)
    masses = venv._warp.model.body_mass.numpy()
    assert (masses[0] == masses[4]).all()
    assert (masses[0] != masses[1])[1:].all()


@pytest.mark.parametrize("family", [AntDir, HumanoidDir], ids=lambda family: family.__name__)
def test_no_contact_is_ever_dropped(family):
    """Bodies half in the floor, limbs anywhere: all of MuJoCo's contacts and rows of constraints are there."""
    venv = batch(family)
    model, most = venv.model, 0
    generator = np.random.default_rng(0)
    state = np.tile(venv._start_state[None], (B, 1))
    state[:, 3] = np.linspace(-0.3, 0.3, B)  # the torso's height
    state[:, 8 : 1 + model.nq] += generator.uniform(-1.5, 1.5, (B, model.nq - 7))
    venv._warp.step(torch.from_numpy(state).float(), torch.zeros(B, model.nu))
    data = mujoco_warp.make_data(model, B, nconmax=venv._warp.data.naconmax // B, njmax=venv._warp.data.njmax)
    wp.to_torch(data.qpos).copy_(venv.qpos(torch.from_numpy(state)))
    mujoco_warp.forward(venv._warp.model, data)
    single, contacts = mujoco.MjData(model), 0
    for world in range(B):
        single.qpos[:] = state[world, 1 : 1 + model.nq]
        mujoco.mj_forward(model, single)
        contacts, most = contacts + single.ncon, max(most, single.nefc)
        assert data.nefc.numpy()[world] == single.nefc
    assert data.nacon.numpy()[0] == contacts > 10 * B
    dropped = mujoco_warp.OverflowType.NEFC | mujoco_warp.OverflowType.BROADPHASE | mujoco_warp.OverflowType.NARROWPHASE
    assert not (venv._warp.data.overflow.numpy() & dropped).any()
    assert 64 < most <= data.njmax  # 64: what mujoco_warp would have taken for enough


# ---------------------------------------------------------------- states


def test_torch_and_warp_share_memory():
    venv = batch(AntDir)
    physics, data = venv._warp, venv._warp.data
    shared = {"qpos": data.qpos, "qvel": data.qvel, "control": data.ctrl}
    for _ in range(2):
        venv.reset(seed=0)
        for action in draw_actions(venv, 3):
            venv.step(action)
        for name, array in shared.items():
            assert getattr(physics, name).data_ptr() == array.ptr
        assert torch.equal(physics.control, action)
        np.testing.assert_array_equal(data.qpos.numpy(), venv.qpos(venv._state).numpy())
        physics.qpos[3, 2] = 7.0
        assert data.qpos.numpy()[3, 2] == 7.0


@pytest.mark.parametrize("family", [AntDir, HalfCheetahDir], ids=lambda family: family.__name__)
def test_what_mujoco_calls_diverged_has(family):
    """Speeds of the last joint (at 1e7 rad/s the ant's is slow again after a control step), along x, places on x."""
    venv = batch(family)
    model, state = venv.model, np.tile(venv._start_state, (B, 1))
    state[:, 3 if family is AntDir else 2] += 20  # far above the floor
    speeds = {-1: (1.0, 100.0, 1e7, 1e9, 1e11), 1 + model.nq: (1e7, 1.1e10), 1: (1e7, 1.1e10)}
    world = 0
    for place, values in speeds.items():
        for value in values:
            state[world, place], world = value, world + 1
    _, good = venv._warp.step(torch.from_numpy(state).float(), torch.zeros(B, model.nu))
    venv._warp.step(torch.from_numpy(state).float().flip(0), torch.zeros(B, model.nu))  # does not write into the answer
    expected = []
    for start in state:
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = start[1 : 1 + model.nq], start[1 + model.nq :]
        for _ in range(venv.frame_skip):
            mujoco.mj_step(model, data)
        expected.append(not any(warning.number for warning in data.warning))
    assert good.tolist() == expected
    assert expected == [True, True, False, False, False, True, False, True, False, *[True] * (B - 9)]


@pytest.mark.parametrize("value", [1e12, torch.nan, torch.inf])
def test_divergence_ends_a_world_and_is_told(value, monkeypatch):
    """One number of world 1's state goes wild inside the physics, in the third step."""
    venv = batch(AntDir)
    actions, tasks = draw_actions(venv, 8), venv.sample_tasks(B, seeded(0))
    healthy = []
    venv.reset(seed=0, options={"tasks": tasks})
    for action in actions:
        healthy.append(venv.step(action)[:3])
    venv.reset(seed=0, options={"tasks": tasks})
    for step, action in enumerate(actions):
        with monkeypatch.context() as here:
            if step == 2:
                last, move, wild = venv._state[1].clone(), venv._warp.step, venv._state.clone()
                wild[1, -3] = value
                here.setattr(venv._warp, "step", lambda _, control, move=move, wild=wild: move(wild, control))
            obs, reward, terminated, _, info = venv.step(action)
        assert info["diverged"].tolist() == [step >= 2 and world == 1 for world in range(B)]
        assert terminated[1] == (step >= 2)
        neighbours = torch.arange(B) != 1
        for now, then in zip((obs, reward, terminated), healthy[step], strict=True):
            assert torch.equal(now[neighbours], then[neighbours])
    assert torch.equal(venv._state[1], last)
    assert reward[1] == 0
    venv.reset(options={"tasks": tasks, "reset_mask": torch.arange(B) == 1})  # no trace of it stays anywhere
    assert not venv._diverged.any()
    start = venv._state[1, 1:].double().numpy()
    venv.step(actions[0])
    expected = mujoco_step(venv.model, start, actions[0, 1].numpy(), venv.frame_skip)
    np.testing.assert_allclose(venv._state[1, 1:].numpy(), expected, atol=1e-4)


def test_a_wild_action_is_told_at_the_horizon():
    """As on a GPU, where nothing asks before; until then the other worlds do not notice."""
    venv = HalfCheetahDir(3, max_episode_steps=4, physics="warp")
    venv.checks_late = True
    actions = draw_actions(venv, 4)
    venv.reset(seed=0)
    healthy = [venv.step(action)[0] for action in actions]
    venv.reset(seed=0)
    actions[1, 2, 3] = torch.nan
    for step in range(3):
        obs, *_ = venv.step(actions[step])
        assert torch.equal(obs[:2], healthy[step][:2])
        assert torch.isfinite(obs).all()
    with pytest.raises(FloatingPointError, match=r"^non-finite action in world 2, step 2, from the policy$"):
        venv.step(actions[3])
    venv.reset(seed=0)
    assert torch.equal(venv.step(actions[0])[0], healthy[0])


def test_worlds_that_are_over_stay_where_they_are():
    venv = batch(HopperRandParams)
    venv.reset(seed=0, options={"tasks": venv.sample_tasks(B, seeded(0))})
    for step, action in enumerate(draw_actions(venv, 20)):
        over = venv.step(action)[2]
        if step == 14:
            before, then = venv._state.clone(), over
    assert 0 < then.sum() < B
    assert torch.equal(venv._state[then], before[then])
    assert (venv._state[~then] != before[~then]).any(1).all()


def test_masked_resets_are_those_of_mujoco():
    ours, theirs = batch(HalfCheetahDir), HalfCheetahDir(B, 20, dtype=torch.float64)
    tasks, mask = theirs.sample_tasks(B, seeded(0)), torch.arange(B) % 3 == 0
    actions = draw_actions(theirs, 4)
    for venv in (ours, theirs):
        venv.reset(seed=0, options={"tasks": tasks})
        venv.step(actions[0])
    kept = ours._state.clone()
    for venv in (ours, theirs):
        venv.reset(options={"tasks": tasks, "reset_mask": mask})
    assert torch.equal(ours._state[~mask], kept[~mask])
    torch.testing.assert_close(ours._state[mask].double(), theirs._state[mask], rtol=1e-6, atol=1e-6)
    for action in actions[1:]:
        ours_now, theirs_now = ours.step(action), theirs.step(action)
    torch.testing.assert_close(ours_now[0].double(), theirs_now[0], rtol=0, atol=1e-2)
    assert torch.equal(ours_now[3], theirs_now[3])


def test_saved_worlds_go_on_bit_identically():
    venv, other = batch(AntDir), AntDir(B, max_episode_steps=20, physics="warp")
    actions = draw_actions(venv, 12)
    venv.reset(seed=0)
    for action in actions[:5]:
        venv.step(action)
    saved = venv.save_worlds()
    copies = {name: value.clone() for name, value in saved.items()}
    rows = [venv.step(action)[0] for action in actions[5:]]
    assert all(torch.equal(saved[name], copies[name]) for name in saved)  # steps do not write into it
    other.reset(seed=8)
    for again in (other, venv):
        again.load_worlds(saved)
        assert all(torch.equal(again.step(action)[0], row) for action, row in zip(actions[5:], rows, strict=True))
    by_mujoco = AntDir(B, max_episode_steps=20)  # a checkpoint is not bound to its physics
    by_mujoco.reset(seed=8)
    by_mujoco.load_worlds(saved)
    torch.testing.assert_close(by_mujoco.step(actions[5])[0], rows[0], rtol=0, atol=1e-3)


# ---------------------------------------------------------------- nothing waits


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers taken out of tensors, and sizes that depend on numbers."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name.startswith(waiting) for waiting in self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits_of_an_episode(venv, steps, late=True):
    venv.checks_late = late
    actions = draw_actions(venv, steps)
    venv.reset(seed=0)
    with Waits() as waits:
        for action in actions:
            venv.step(action)
    venv.checks_late = False
    return waits.seen


@every_body
def test_no_step_waits_for_the_device(family, monkeypatch):
    venv = batch(family)
    assert waits_of_an_episode(venv, 5, late=False) == ["_local_scalar_dense"] * 15  # the count sees those there are
    assert waits_of_an_episode(venv, 5) == []
    venv.checks_late, actions = True, draw_actions(venv, 2)
    venv.reset(seed=0)
    for name in ("numpy", "tolist", "__array__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("a tensor was sent to the host"))
    for action in actions:
        venv.step(action)
    venv.checks_late = False


def test_a_whole_rollout_waits_no_longer_for_more_steps():
    """maml_trpo's, policy and scaled actions included: what waits does so once an episode."""
    from algos.maml_trpo import Args, init_policy, rollout

    seen = []
    for horizon in (3, 9):
        args = Args(meta_batch_size=2, episodes_per_task=3, horizon=horizon, hidden_size=5)
        worlds = envs.make("HalfCheetahDir-v0", 6, horizon, action_scale=10.0, physics="warp")
        worlds.unwrapped.checks_late = True
        theta = init_policy(worlds, 5, seeded(0))
        tasks = worlds.unwrapped.sample_tasks(2, seeded(0))
        with Waits() as waits:
            obs = rollout(worlds, tasks, theta, args, seeded(0))["obs"]
        assert obs.shape[:3] == (2, 3, horizon)
        seen.append(waits.seen)
    assert seen[0] == seen[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_body
def test_no_step_waits_for_the_gpu(family):
    venv = batch(family, "cuda")
    venv.reset(seed=0)
    actions = draw_actions(venv, 10).cuda()
    venv.step(actions[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):  # what waits is an error here
            actions.sum().item()
        for action in actions[1:]:
            venv.step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- the choice


def test_make_chooses(monkeypatch):
    assert envs.make("HalfCheetahDir-v0", 2, 5).unwrapped.physics == "mujoco"
    assert envs.make("HalfCheetahDir-v0", 2, 5, physics="warp").unwrapped.physics == "warp"
    assert envs.make("HalfCheetahDir-v0", 2, 5, physics="mujoco").unwrapped.physics == "mujoco"
    for physics in ("auto", "mujoco"):  # of no concern to a point in a plane
        assert not hasattr(envs.make("Navigation2D-v0", 2, 5, physics=physics).unwrapped, "physics")
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gym, "make_vec", lambda *_, **options: made.append(options) or envs.Bandit5(2))
    for env_id, physics in (("AntDir-v0", "auto"), ("AntDir-v0", "mujoco"), ("Bandit5-v0", "auto")):
        envs.make(env_id, 2, 5, cuda=True, discrete=True, physics=physics)
    monkeypatch.setattr(envs, "find_spec", lambda name: None)
    envs.make("AntDir-v0", 2, 5, cuda=True, discrete=True)
    assert [options.get("physics") for options in made] == ["warp", None, None, None]
    assert all(options["device"] == "cuda" for options in made)


def test_what_cannot_be_made_is_one_clear_line(monkeypatch):
    for env_id in ("Navigation2D-v0", "Bandit5-v0", "Meta-World/reach-v3"):
        with pytest.raises(SystemExit, match=f"^--physics warp: not for --env-id {env_id}, only .*$"):
            envs.make(env_id, 2, 5, discrete=True, physics="warp")
    with pytest.raises(SystemExit, match=r"^--physics brax: allowed is auto, mujoco, warp$"):
        envs.make("AntDir-v0", 2, 5, physics="brax")
    with pytest.raises(ValueError, match='physics must be "mujoco" or "warp", got \'brax\''):
        AntDir(2, physics="brax")
    with monkeypatch.context() as here:
        here.setattr(envs.warp_physics.wp, "is_cuda_available", lambda: False)
        here.setattr(AntDir, "__init__", lambda *_, **__: WarpPhysics(None, 2, 5, torch.device("cuda")))
        with pytest.raises(SystemExit, match=r"^--physics warp: warp-lang can use no CUDA device: .* --physics mujoco"):
            envs.make("AntDir-v0", 2, 5, physics="warp")
    monkeypatch.setattr(envs, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^--physics warp needs mujoco_warp: .*pip install -r requirements-warp.txt$"):
        envs.make("AntDir-v0", 2, 5, physics="warp")


def test_models_with_unknown_numbers_of_contacts_are_refused():
    spec = mujoco.MjSpec.from_string(
        "<mujoco><worldbody><body><freejoint/><geom size='.1 .1 .1' type='box'/></body></worldbody></mujoco>"
    )
    with pytest.raises(NotImplementedError, match="how many contacts"):
        WarpPhysics(spec.compile(), 2, 1, torch.device("cpu"))


def test_pictures_show_the_state_and_need_no_warp():
    venv = batch(HalfCheetahDir)
    assert venv.single_world().physics == "mujoco"
    venv.reset(seed=0)
    seen = []

    class Renderer:
        def __init__(self, *_):
            pass

        def update_scene(self, data, camera):
            seen.append(data.qpos.copy())

        def render(self):
            return "picture"

    venv._renderer = Renderer()
    assert venv.render_frame(5) == "picture"
    venv._renderer = None
    np.testing.assert_array_equal(seen[0], venv._state[5, 1:10].numpy())


def test_nothing_is_printed(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import envs, torch
assert not any(name.startswith(("warp", "mujoco_warp")) for name in sys.modules), "imported without need"
worlds = envs.make("HopperForward-v0", 2, 3, physics="warp")
worlds.reset(seed=0)
worlds.step(torch.ones(2, 3))
"""
    # what warp compiles for the first time, it leaves to the garbage collector: no fault of ours
    command = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert all("CUDA" in line for line in result.stderr.splitlines())  # where there is no driver, warp says so
    assert list(tmp_path.iterdir()) == []
