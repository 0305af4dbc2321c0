"""Locomotion task families on MuJoCo: all worlds of a batch move in one call per control step.

That is `mujoco.rollout` on the CPU's threads, or `mujoco_warp` on the run's device (envs/warp_physics.py).

The bodies are Gymnasium's own (HalfCheetah-v5, Ant-v5, ..): same model files, start states, control steps and limits
of health. Rewards are the meta-RL papers', each a pure function of observation, action and task; what a reward needs
beyond Gymnasium's observation (the mean velocity over the control step) is appended to the observation.
"""

import importlib
import math
import os
import sys
import threading
from functools import cache
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.spaces import Box
from mujoco.rollout import Rollout
from torch import Tensor

from .core import TaskVectorEnv, alternating_signs, held_out_uniform

RENDER_HINT = (
    "MuJoCo found no way to draw. Without a display set MUJOCO_GL=egl before Python starts (or before mujoco is "
    "imported); on Debian and Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"
)
_rollout_lock = threading.Lock()  # the pool's MjData serve one call at a time


def choose_opengl() -> None:
    """Let MuJoCo draw by EGL on Linux without a display, unless MUJOCO_GL already says how."""
    windows = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if sys.platform == "linux" and not windows and "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl"  # MuJoCo has read it when it was imported, and must read it again
        names = ("mujoco.rendering.classic.gl_context", "mujoco.gl_context")
        importlib.reload(next(sys.modules[name] for name in names if name in sys.modules))


def make_renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    """What draws a model; on Linux without a display by EGL. RuntimeError with a hint where nothing can draw."""
    try:
        choose_opengl()
        return mujoco.Renderer(model, height, width)
    except Exception as error:  # the type depends on which OpenGL library is missing
        raise RuntimeError(RENDER_HINT) from error


@cache
def load_model(file: str, textures: bool = True) -> mujoco.MjModel:
    """Compile one of Gymnasium's model files, silently; shared, so copy it before changing it.

    `textures=False` shrinks the pictures on the bodies to nothing (20 of 520 KB remain): physics do not need them.
    half_cheetah.xml asks for `settotalmass`, which current MuJoCo reports as deprecated on the terminal and in a file
    MUJOCO_LOG.TXT at every load; setting the mass after compilation gives the same numbers without the message.
    """
    spec = mujoco.MjSpec.from_file(str(Path(gym.__file__).parent / "envs/mujoco/assets" / file))
    total_mass, spec.compiler.settotalmass = spec.compiler.settotalmass, -1
    for texture in spec.textures:
        if not textures:
            texture.width = texture.height = 1
        elif texture.name == "texplane":  # a quieter floor than Gymnasium's black and white
            texture.rgb1, texture.rgb2 = (0.45, 0.5, 0.55), (0.6, 0.65, 0.7)
    for material in spec.materials:
        material.reflectance = 0.0
    model = spec.compile()
    if total_mass > 0:
        mujoco.mj_setTotalmass(model, total_mass)
        mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


@cache
def _thread_pool(num_threads: int, process: int) -> Rollout:
    """The process's one pool of this many threads; 0 is the calling thread. A fork loses threads, hence the key."""
    if mujoco.get_mju_user_warning() is None:
        # MuJoCo would print a line and write MUJOCO_LOG.TXT whenever a world diverges; `info["diverged"]` tells it.
        mujoco.set_mju_user_warning(lambda message: None)
    return Rollout(nthread=num_threads)


@cache
def _pool_data(file: str, num_threads: int, process: int) -> list[mujoco.MjData]:
    """One scratch MjData for each thread."""
    return [mujoco.MjData(load_model(file)) for _ in range(max(1, num_threads))]


def _cores(folder: Path, *files: str) -> float:
    """A control group's quota divided by its period; infinite where its files are not there or set no limit."""
    try:
        quota, period = " ".join((folder / file).read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        return math.inf


def cpu_quota(root: str | Path = "/") -> float:
    """The cores' worth of time that Linux's control groups leave this process, as in containers; infinite if all.

    A group's limit holds for the groups inside it too, so the smallest one counts, of the process's own group and of
    all around it. Version 2 keeps quota and period in one file, version 1 in two.

    Args:
        root: where /proc and /sys are.
    """
    mounts, cores = Path(root) / "sys/fs/cgroup", [math.inf]
    try:
        lines = (Path(root) / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        number, controllers, group = (line.split(":", 2) + 3 * [""])[:3]
        if number == "0" and not controllers:
            places, files = (mounts, mounts / "unified"), ("cpu.max",)
        elif "cpu" in controllers.split(","):
            places, files = (mounts / controllers, mounts / "cpu"), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        # In a container the group may have the host's name; its limit lies where groups are mounted, so we begin there.
        names = [name for name in group.split("/") if name not in ("", "..")]
        cores += [_cores(place.joinpath(*names[:k]), *files) for place in places for k in range(len(names) + 1)]
    return min(cores)


def available_cpus() -> int:
    """The cores this process may use (a container's or taskset's limit counts); torchrun's processes share them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = math.ceil(min(cpus, cpu_quota()))
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def heading(turn: Tensor) -> Tensor:
    """Unit vectors [N, 2] for angles given as fractions [N, 1] of a full turn."""
    angle = 2 * math.pi * turn
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class MujocoTaskVectorEnv(TaskVectorEnv):
    """Base class of the MuJoCo families.

    A family names its model and start states (class attributes), builds the observation in `_observe` and, if bodies
    can fall, tells in `ended` which have. Results are bit-identical for any number of threads.

    `physics="mujoco"`: float64 on the CPU's threads, whatever the device. `physics="warp"`: float32 on `device`, where
    the states stay, so that no step waits for the host; results are those of "mujoco" up to rounding, for as long as
    chaos takes to magnify it (tests/test_warp.py: 20 control steps). It needs requirements-warp.txt.

    A world whose physics diverge ends early: `terminated` is latched, its state stays at the last good one, and
    `info["diverged"]` [B] (bool) stays true for it until the reset. Worlds that are over do not move any more.

    Args:
        num_threads: threads of the shared pool; None is one for each available core. Without effect on "warp".
        physics: "mujoco" or "warp".
        num_envs, max_episode_steps, device, dtype: see `TaskVectorEnv`.
    """

    can_terminate = True  # a world can diverge, even where nothing can fall
    world_state = ("_state", "_alive", "_diverged")
    own_bodies = False  # whether worlds have models of their own
    model_file: str
    frame_skip: int  # physics steps of one control step
    start_noise: float  # start positions: the model's own + U(-noise, noise); velocities: see `start_velocity`
    start_velocity: str  # "normal": noise * N(0, 1), "uniform": U(-noise, noise)
    camera = {"distance": 4.0, "elevation": -15.0, "azimuth": 90.0}

    def __init__(
        self,
        num_envs,
        max_episode_steps=200,
        device="cpu",
        dtype=torch.float32,
        num_threads: int | None = None,
        physics: str = "mujoco",
    ):
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        if physics not in ("mujoco", "warp"):
            raise ValueError(f'physics must be "mujoco" or "warp", got {physics!r}')
        num_threads = num_threads or available_cpus()
        self.num_threads = 0 if num_envs == 1 or num_threads == 1 else num_threads
        self.physics, self.model = physics, load_model(self.model_file)
        self.step_time = self.frame_skip * self.model.opt.timestep  # seconds of one control step
        self._start_state = np.concatenate([[0.0], self.model.qpos0, np.zeros(self.model.nv)])  # time, qpos, qvel
        if mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_FULLPHYSICS) != len(self._start_state):
            raise NotImplementedError(f"{self.model_file} has states beyond time, qpos and qvel")
        self._renderer = None
        if physics == "warp":
            from .warp_physics import WarpPhysics

            self._warp = WarpPhysics(self.model, num_envs, self.frame_skip, torch.device(device), self.own_bodies)
        else:
            # `skip_checks` writes nothing, silently, into arrays that are not contiguous float64.
            self._trajectory = np.zeros((num_envs, self.frame_skip, len(self._start_state)))
            self._control = np.zeros((num_envs, self.frame_skip, self.model.nu))

        state = torch.from_numpy(self._start_state)[None]
        obs_dim = self._observe(state, state).shape[1]
        low, high = self.model.actuator_ctrlrange.T.astype(np.float32)
        obs_space = Box(-np.inf, np.inf, (obs_dim,), np.float32)
        super().__init__(num_envs, obs_space, Box(low, high, dtype=np.float32), max_episode_steps, device, dtype)

    def _observe(self, before: Tensor, after: Tensor) -> Tensor:
        """Observation [B, O] from the states [B, 1 + nq + nv] around a control step (at a reset: equal)."""
        raise NotImplementedError

    def _fallen(self, state: Tensor, obs: Tensor) -> Tensor:
        """Which worlds [B] (bool) have left the healthy states: what `ended` says in the physics' own precision."""
        return self.ended(obs)

    def _models(self, worlds: np.ndarray) -> list[mujoco.MjModel]:
        """The model of each of these worlds."""
        return [self.model] * len(worlds)

    def qpos(self, state: Tensor) -> Tensor:
        return state[:, 1 : 1 + self.model.nq]

    def qvel(self, state: Tensor) -> Tensor:
        return state[:, 1 + self.model.nq :]

    def _mean_velocity(self, before: Tensor, after: Tensor, axes: int) -> Tensor:
        """Displacement [B, axes] of the first position coordinates over the control step, divided by its duration."""
        return (after[:, 1 : 1 + axes] - before[:, 1 : 1 + axes]) / self.step_time

    def _start(self, task, generator):
        model, noise = self.model, self.start_noise
        uniform = self._draw(torch.rand, generator, model.nq, dtype=torch.float64)
        draw = torch.randn if self.start_velocity == "normal" else torch.rand
        velocity = self._draw(draw, generator, model.nv, dtype=torch.float64)
        if self.start_velocity == "uniform":
            velocity = 2 * velocity - 1
        state = torch.from_numpy(self._start_state).repeat(self.num_envs, 1)  # [B, 1 + nq + nv]
        state[:, 1:] += noise * torch.cat([2 * uniform - 1, velocity], dim=1)
        self._state = state.to(self.device, torch.float32) if self.physics == "warp" else state
        self._diverged = torch.zeros(self.num_envs, dtype=torch.bool, device=self._state.device)
        self._alive = ~self._diverged
        return self._observe(self._state, self._state).to(self.dtype).to(self.device)

    def _advance(self, action):
        before = self._state
        move = self._warp.step if self.physics == "warp" else self._rollout
        after, good = move(before, action)
        after = torch.where((self._alive & good)[:, None], after, before)
        obs = self._observe(before, after)
        over = (self._fallen(after, obs) | ~good) & self._alive
        self._diverged = self._diverged | (self._alive & ~good)
        self._alive = self._alive & ~over
        self._state = after
        info = {"diverged": self._diverged.clone().to(self.device)}
        return obs.to(self.dtype).to(self.device), over.to(self.device), info

    def _rollout(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, ..] after a control step, and which worlds [B] did not diverge; those that are over stay."""
        worlds = np.flatnonzero(self._alive.numpy())
        after, good = state.clone(), torch.ones_like(self._alive)
        if len(worlds) == 0:
            return after, good
        rows = worlds if len(worlds) < len(state) else slice(None)  # without copies where all of them move
        initial = state.numpy()[rows]
        control, trajectory = self._control[: len(worlds)], self._trajectory[: len(worlds)]
        control[:] = action.cpu().numpy()[rows, None]
        process = os.getpid()
        with _rollout_lock:
            _thread_pool(self.num_threads, process).rollout(
                self._models(worlds),
                _pool_data(self.model_file, self.num_threads, process),
                initial,
                control,
                skip_checks=True,
                nstep=self.frame_skip,
                state=trajectory,
            )
        final = trajectory[:, -1]
        # MuJoCo resets a diverging world and goes on with finite numbers: only its clock tells.
        clock_error = np.abs(final[:, 0] - initial[:, 0] - self.step_time)
        after.numpy()[rows] = final
        good.numpy()[rows] = (clock_error < 0.5 * self.model.opt.timestep) & np.isfinite(final).all(axis=1)
        return after, good

    def render_frame(self, index=0, height=240, width=320):
        """An RGB picture [height, width, 3] (uint8) of one world; the camera follows the torso."""
        if self._renderer is None:
            self._renderer = make_renderer(self.model, height, width)
        data = mujoco.MjData(self.model)
        data.qpos[:] = self.qpos(self._state)[index].cpu()
        mujoco.mj_forward(self.model, data)
        camera = mujoco.MjvCamera()
        camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
        camera.lookat[:] = data.subtree_com[1]
        for name, value in self.camera.items():
            setattr(camera, name, value)
        self._renderer.update_scene(data, camera)
        return self._renderer.render()

    def close_extras(self, **kwargs):
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class HalfCheetahDir(MujocoTaskVectorEnv):
    """A planar cheetah runs forward or backward, whichever is asked (and not told).

    Source: Finn, Abbeel, Levine 2017 (arXiv:1703.03400), section 5.3.2; cbfinn/maml_rl
    `half_cheetah_env_rand_direc.py`; body: Gymnasium's HalfCheetah-v5.
    Observation: [18] = Gymnasium's 17 (positions without x, velocities), then the mean forward velocity over the last
    control step in m/s (0 at the start). Action: 6 torques in +-1.
    Reward: direction * mean forward velocity - 0.05 |action|^2.
    Tasks: the direction [1], +1 or -1, each in half of a batch; train and test are the same two tasks, as in the paper.
    Horizon: 200 (MAML paper, PEARL; pytorch-maml-rl, ProMP and garage use 100).
    Differs: rllab's model stepped 0.01 s, and measured the torso's instantaneous velocity; Gymnasium's control step
    is 0.05 s. Old codes observe the torso's position too (20 numbers).
    """

    task_dim = 1
    model_file = "half_cheetah.xml"
    frame_skip = 5
    start_noise, start_velocity = 0.1, "normal"

    def sample_tasks(self, num_tasks, generator, split="train"):
        return alternating_signs(num_tasks, generator, split).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return task[..., 0] * next_obs[..., 17] - 0.05 * action.square().sum(-1)

    def _observe(self, before, after):
        return torch.cat([after[:, 2:], self._mean_velocity(before, after, 1)], dim=1)


class HalfCheetahVel(HalfCheetahDir):
    """A planar cheetah runs at a hidden speed.

    Source: Finn, Abbeel, Levine 2017 (arXiv:1703.03400), section 5.3.2; cbfinn/maml_rl `half_cheetah_env_rand.py`;
    PEARL's katerakelly/oyster `half_cheetah_vel.py`; body: Gymnasium's HalfCheetah-v5.
    Observation, action, horizon: as `HalfCheetahDir`.
    Reward: -|mean forward velocity - target| - 0.05 |action|^2.
    Tasks: the target speed [1] in m/s, uniform in [0, max_velocity]: 2 in MAML (default), 3 in PEARL, ProMP and
    VariBAD. Test targets lie in intervals that training never sees.
    Differs: as `HalfCheetahDir`; PEARL trains on 100 fixed targets, here each draw is new.
    """

    def __init__(self, num_envs, *args, max_velocity: float = 2.0, **kwargs):
        super().__init__(num_envs, *args, **kwargs)
        self.max_velocity = max_velocity

    def sample_tasks(self, num_tasks, generator, split="train"):
        return (self.max_velocity * held_out_uniform(num_tasks, 1, generator, split)).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return -(next_obs[..., 17] - task[..., 0]).abs() - 0.05 * action.square().sum(-1)


class HalfCheetahVel3(HalfCheetahVel):
    """`HalfCheetahVel` with targets up to 3 m/s, as in PEARL, ProMP and VariBAD; all else is the same."""

    def __init__(self, num_envs, *args, **kwargs):
        super().__init__(num_envs, *args, max_velocity=3.0, **kwargs)


class AntDir(MujocoTaskVectorEnv):
    """A four-legged ant walks forward or backward.

    Source: Finn, Abbeel, Levine 2017 (arXiv:1703.03400), section 5.3.2; cbfinn/maml_rl `ant_env_rand_direc.py`, ProMP
    `ant_rand_direc.py`; body: Gymnasium's Ant-v5.
    Observation: [29] = positions without x and y (13), velocities (14), then the torso's mean x and y velocity over
    the last control step in m/s (0 at the start). Action: 8 torques in +-1.
    Reward: direction * mean x velocity - 0.5 |action|^2 + 1 (the bonus for surviving). An episode ends when the torso's
    height leaves [0.2, 1].
    Tasks: the direction [1], +1 or -1, each in half of a batch; train and test are the same two tasks, as in papers.
    Horizon: 200.
    Differs: contact forces are neither observed nor a cost. Weights as ProMP and Gymnasium; MAML's code has 0.005
    |action|^2 and a bonus of 0.05. Beware when reading returns: standing still earns +1 a step.
    """

    task_dim = 1
    model_file = "ant.xml"
    frame_skip = 5
    start_noise, start_velocity = 0.1, "normal"
    camera = {"distance": 4.0, "elevation": -30.0, "azimuth": 90.0}

    def sample_tasks(self, num_tasks, generator, split="train"):
        return alternating_signs(num_tasks, generator, split).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return task[..., 0] * next_obs[..., 27] - 0.5 * action.square().sum(-1) + 1

    def _observe(self, before, after):
        return torch.cat([after[:, 3:], self._mean_velocity(before, after, 2)], dim=1)

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return (obs[..., 0] < 0.2) | (obs[..., 0] > 1.0)


class AntDir2D(AntDir):
    """A four-legged ant walks in a hidden direction of the plane.

    Source: Rothfuss et al. 2019 (ProMP, arXiv:1810.06784), `ant_rand_direc_2d.py`; Rakelly et al. 2019 (PEARL,
    arXiv:1903.08254), katerakelly/oyster `ant_dir.py`; body: Gymnasium's Ant-v5.
    Observation, action, early end, horizon: as `AntDir`.
    Reward: direction . mean velocity - 0.5 |action|^2 + 1.
    Tasks: the direction [2] = (cos a, sin a), a uniform in [0, 2 pi]; test angles lie in arcs that training never sees.
    Differs: as `AntDir`; PEARL's published setting draws two headings only.
    """

    task_dim = 2

    def sample_tasks(self, num_tasks, generator, split="train"):
        return heading(held_out_uniform(num_tasks, 1, generator, split)).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return (task * next_obs[..., 27:]).sum(-1) - 0.5 * action.square().sum(-1) + 1


class AntVel(AntDir):
    """A four-legged ant walks at a hidden speed.

    Source: Finn, Abbeel, Levine 2017 (arXiv:1703.03400), section 5.3.2; cbfinn/maml_rl `ant_env_rand.py`; body:
    Gymnasium's Ant-v5.
    Observation, action, early end, horizon: as `AntDir`.
    Reward: -|mean x velocity - target| + 1 - 0.005 |action|^2 + 0.05, as MAML's code.
    Tasks: the target speed [1] in m/s, uniform in [0, 3]; test targets lie in intervals that training never sees.
    Differs: contact forces are neither observed nor a cost; Gymnasium's body and control step (0.05 s).
    """

    def sample_tasks(self, num_tasks, generator, split="train"):
        return (3 * held_out_uniform(num_tasks, 1, generator, split)).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return 1.05 - (next_obs[..., 27] - task[..., 0]).abs() - 0.005 * action.square().sum(-1)


class AntGoal(AntDir):
    """A four-legged ant walks to a hidden place.

    Source: Rothfuss et al. 2019 (ProMP, arXiv:1810.06784), `ant_rand_goal.py`; Rakelly et al. 2019 (PEARL,
    arXiv:1903.08254), katerakelly/oyster `ant_goal.py`; body: Gymnasium's Ant-v5.
    Observation: [29] = all positions (15, x and y first), velocities (14). Action: 8 torques in +-1.
    Reward: -|x - goal x| - |y - goal y| - 0.1 |action|^2, at the position after the step. No early end.
    Tasks: the goal [2] in m, uniform in a disc of radius 3: 3 sqrt(u) (cos a, sin a); test goals lie in sectors that
    training never sees.
    Horizon: 200.
    Differs: contact forces are neither observed nor a cost. MAML's variant draws from a square of +-3, adds 4 and ends
    when the ant falls.
    """

    task_dim = 2

    def sample_tasks(self, num_tasks, generator, split="train"):
        point = held_out_uniform(num_tasks, 2, generator, split)
        return (3 * point[:, 1:].sqrt() * heading(point[:, :1])).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return -(next_obs[..., :2] - task).abs().sum(-1) - 0.1 * action.square().sum(-1)

    def _observe(self, before, after):
        return after[:, 1:].clone()

    ended = staticmethod(TaskVectorEnv.ended)


class HumanoidDir(MujocoTaskVectorEnv):
    """A humanoid walks in a hidden direction of the plane.

    Source: Rakelly et al. 2019 (PEARL, arXiv:1903.08254), katerakelly/oyster `humanoid_dir.py`; body: Gymnasium's
    Humanoid-v5.
    Observation: [47] = positions without x and y (22), velocities (23), then the torso's mean x and y velocity over the
    last control step in m/s (0 at the start). Action: 17 torques in +-0.4.
    Reward: 1.25 direction . mean velocity - 0.1 |action|^2 + 5. An episode ends when the torso's height leaves [1, 2].
    Tasks: the direction [2] = (cos a, sin a), a uniform in [0, 2 pi]; test angles lie in arcs that training never sees.
    Horizon: 200.
    Differs: the velocity is the torso's, the original's the centre of mass's; 1.25 is the original's 0.25 over its
    physics step (0.003 s) per control step (0.015 s). Inertias, actuator and contact forces are not observed, contact
    is no cost. PEARL trains on 100 fixed directions, here each draw is new.
    """

    task_dim = 2
    model_file = "humanoid.xml"
    frame_skip = 5
    start_noise, start_velocity = 0.01, "uniform"

    def sample_tasks(self, num_tasks, generator, split="train"):
        return heading(held_out_uniform(num_tasks, 1, generator, split)).to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return 1.25 * (task * next_obs[..., 45:]).sum(-1) - 0.1 * action.square().sum(-1) + 5

    def _observe(self, before, after):
        return torch.cat([after[:, 3:], self._mean_velocity(before, after, 2)], dim=1)

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return (obs[..., 0] < 1.0) | (obs[..., 0] > 2.0)
