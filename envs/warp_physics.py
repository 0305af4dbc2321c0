"""What `physics="warp"` of the MuJoCo families is made of: all worlds on the run's device, by `mujoco_warp`.

An optional requirement (requirements-warp.txt), imported only where it is asked for.
"""

import copy

import mujoco
import mujoco_warp
import numpy as np
import torch
import warp as wp
from mujoco import mjtGeom, mjtSolver
from torch import Tensor

# What `RandomParamsEnv` changes in a model and what mj_setConst makes of it, where the motion depends on it.
OWN_BODY = (
    "body_mass",
    "body_subtreemass",
    "body_inertia",
    "body_invweight0",
    "dof_damping",
    "dof_invweight0",
    "geom_friction",
)
MAX_CONTACTS = 2  # of two geoms, where each is a plane, a sphere or a capsule
MAX_NUMBER = float(mujoco.mjMAXVAL)
PLANE, CAPSULE = int(mjtGeom.mjGEOM_PLANE), int(mjtGeom.mjGEOM_CAPSULE)


@wp.kernel(enable_backward=False)
def turn_friction(
    geom_type: wp.array(dtype=int),
    geom_xmat: wp.array2d(dtype=wp.mat33),
    pair: wp.array(dtype=wp.vec2i),
    worldid: wp.array(dtype=int),
    num_contacts: wp.array(dtype=int),
    frame: wp.array(dtype=wp.mat33),
):
    """Turn the frame of each contact of a plane and a capsule so that its second row points along the capsule."""
    contact = wp.tid()
    if contact >= num_contacts[0]:
        return
    plane, capsule = pair[contact][0], pair[contact][1]
    if geom_type[plane] != PLANE or geom_type[capsule] != CAPSULE:
        return
    rotation, normal = geom_xmat[worldid[contact], capsule], frame[contact][0]
    axis = wp.vec3(rotation[0, 2], rotation[1, 2], rotation[2, 2])
    along = axis - normal * wp.dot(normal, axis)
    if wp.length(along) > 1e-6:
        along = wp.normalize(along)
        frame[contact] = wp.matrix_from_rows(normal, along, wp.cross(normal, along))


@wp.kernel(enable_backward=False)
def watch(number: wp.array2d(dtype=float), good: wp.array(dtype=bool)):
    """Mark the worlds in which a number is not finite (so not below anything) or beyond what MuJoCo goes on with."""
    world, column = wp.tid()
    if not (wp.abs(number[world, column]) <= MAX_NUMBER):
        good[world] = False


class WarpPhysics:
    """Physics of B worlds, in float32, whose states never leave the device.

    `qpos` [B, nq], `qvel` [B, nv] and `control` [B, nu] are torch's views of warp's own arrays: what is written into
    them is what a control step begins with. A control step is one graph, captured once, when this is made: a CUDA
    graph, or on the CPU warp's list of what to call. Nothing waits for the device.

    Two corrections make the results MuJoCo's. Friction is a pyramid, and how it is turned matters: MuJoCo turns it
    along a capsule that stands on a plane, mujoco_warp 4.0 does not where the capsule is steep, as an ant's feet are
    (github.com/google-deepmind/mujoco/issues/2774). And a model that asks for projected Gauss-Seidel, which
    mujoco_warp lacks, is solved by Newton's method: the same problem, and the same solution where both converge.

    A control step begins without knowledge of the solver's last solution, as in `mujoco.rollout`. Buffers hold all
    contacts and limits that there can be at the same time, so none is ever dropped. What a machine does for the first
    time waits for warp's compiler, half a minute for the first body (kept in ~/.cache/warp). On a GPU contacts come in
    any order, and sums with them: runs do not repeat to the last bit.

    Args:
        model: the bodies.
        num_worlds: B.
        frame_skip: physics steps of one control step.
        device: torch's. RuntimeError for a CUDA device that warp cannot use.
        own_bodies: whether worlds differ in the fields of `OWN_BODY`; then `set_bodies` gives them theirs.
    """

    def __init__(self, model: mujoco.MjModel, num_worlds: int, frame_skip: int, device: torch.device, own_bodies=False):
        wp.config.log_level = wp.LOG_WARNING  # no line for each of the 40 modules that are loaded
        wp.init()
        if device.type == "cuda" and not wp.is_cuda_available():
            raise RuntimeError("warp-lang can use no CUDA device: is the driver too old? --physics mujoco does without")
        self.step_time = frame_skip * model.opt.timestep
        model = copy.copy(model)
        if model.opt.solver == mjtSolver.mjSOL_PGS:
            model.opt.solver = mjtSolver.mjSOL_NEWTON
        self._device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        with wp.ScopedDevice(wp.device_from_torch(self._device)):
            own = dict.fromkeys(OWN_BODY, num_worlds) if own_bodies else None
            self.model = mujoco_warp.put_model(model, batch_sizes=own)
            self.model.callback.contactfilter = self._turn_friction
            self.model.opt.warn_overflow = 0  # a solver that stops at its limit is no news, and the buffers suffice
            contacts, rows = buffer_sizes(model, self.model.nxn_geom_pair_filtered.numpy())
            self.data = mujoco_warp.make_data(model, num_worlds, nconmax=contacts, njmax=rows)
            data = self.data
            self._is_good = wp.empty(num_worlds, dtype=bool)
            views = (wp.to_torch(array) for array in (data.qpos, data.qvel, data.ctrl, self._is_good))
            self.qpos, self.qvel, self.control, self._good = views
            self._control_step(1)  # compiles, which a capture should not have to
            with wp.ScopedCapture() as capture:
                self._control_step(frame_skip)
            self._graph = capture.graph
            wp.synchronize_device()  # torch's streams may begin

    def _control_step(self, frame_skip: int) -> None:
        self.data.qacc_warmstart.zero_()
        self._is_good.fill_(True)
        for _ in range(frame_skip):
            mujoco_warp.step(self.model, self.data)
            for number in (self.data.qpos, self.data.qvel, self.data.qacc):
                wp.launch(watch, dim=number.shape, inputs=[number], outputs=[self._is_good])

    @staticmethod
    def _turn_friction(model: mujoco_warp.Model, data: mujoco_warp.Data) -> None:
        contact = data.contact
        known = [model.geom_type, data.geom_xmat, contact.geom, contact.worldid, data.nacon]
        wp.launch(turn_friction, dim=data.naconmax, inputs=known, outputs=[contact.frame])

    def set_bodies(self, models: list[mujoco.MjModel]) -> None:
        """Give each world the body of its model: all fields of `OWN_BODY`."""
        for name in OWN_BODY:
            own = wp.to_torch(getattr(self.model, name))
            own.copy_(torch.from_numpy(np.stack([getattr(model, name) for model in models])).view_as(own))

    def step(self, state: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        """States (time, qpos, qvel) [B, 1 + nq + nv] a control step later, and which worlds [B] did not diverge.

        mujoco_warp goes on with whatever numbers there are. As in MuJoCo, a world has diverged where after a physics
        step a position, velocity or acceleration is not finite or beyond mjMAXVAL."""
        nq = self.qpos.shape[1]
        self.qpos.copy_(state[:, 1 : 1 + nq])
        self.qvel.copy_(state[:, 1 + nq :])
        self.control.copy_(control)
        on_gpu = self._device.type == "cuda"
        wp.capture_launch(self._graph, stream=wp.stream_from_torch(self._device) if on_gpu else None)
        after = torch.cat([state[:, :1] + self.step_time, self.qpos, self.qvel], dim=1)
        return after, self._good.clone()


def buffer_sizes(model: mujoco.MjModel, pairs: np.ndarray) -> tuple[int, int]:
    """The most contacts and rows of constraints that a world can have, given the pairs [.., 2] of geoms that can meet.

    NotImplementedError for bodies of other shapes and for constraints of other kinds."""
    known = np.isin(model.geom_type, (mjtGeom.mjGEOM_PLANE, mjtGeom.mjGEOM_SPHERE, mjtGeom.mjGEOM_CAPSULE))
    if not known.all() or model.npair or model.neq or model.dof_frictionloss.any() or model.tendon_frictionloss.any():
        raise NotImplementedError("how many contacts and constraints this model can have is not known")
    condim = model.geom_condim[pairs].max(axis=1)  # 1: no friction; else a pyramid of 2 (condim - 1) sides
    contacts = MAX_CONTACTS * len(pairs)
    sides = np.where(condim == 1, 1, 2 * (condim - 1)).sum()
    return contacts, int(MAX_CONTACTS * sides + 2 * model.jnt_limited.sum() + 2 * model.tendon_limited.sum())
