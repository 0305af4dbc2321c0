"""Locomotion with random bodies: tasks differ in masses, inertias, damping and friction, never in the reward."""

import copy

import mujoco
import numpy as np
import torch
from torch import Tensor

from .core import held_out_uniform
from .forward import HopperForward, Walker2dForward
from .locomotion import MujocoTaskVectorEnv, load_model


class RandomParamsEnv(MujocoTaskVectorEnv):
    """Base class: every task has an MjModel of its own, compiled once and shared by all worlds with that task.

    The task is the vector of exponents, each uniform in [-3, 3] (0 is Gymnasium's own body), in this order:

        body_mass       [nbody - 1]     times 1.5 ** exponent   (the world body has no mass)
        body_inertia    [nbody - 1, 3]  times 1.5 ** exponent
        dof_damping     [nv]            times 1.3 ** exponent   (the three of the root are 0 anyway)
        geom_friction   [ngeom, 3]      times 1.5 ** exponent   (the floor's too; MuJoCo takes the larger of a pair)
    """

    world_state = None  # the models, compiled for all worlds together, are not among it
    own_bodies = True
    frame_skip = 4
    start_noise, start_velocity = 0.005, "uniform"

    def __init__(self, num_envs, *args, **kwargs):
        self._plain_model = load_model(self.model_file, textures=False)
        self._scratch = mujoco.MjData(self._plain_model)
        self._model_of_task: dict[bytes, mujoco.MjModel] = {}
        super().__init__(num_envs, *args, **kwargs)

    def sample_tasks(self, num_tasks, generator, split="train"):
        exponents = 6 * held_out_uniform(num_tasks, self.task_dim, generator, split) - 3
        return exponents.to(self.device, self.dtype)

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return next_obs[..., -1] + 1 - 0.001 * action.square().sum(-1)

    def _start(self, task, generator):
        keys = [exponents.tobytes() for exponents in task.double().cpu().numpy()]
        known, self._model_of_task = self._model_of_task, {}
        for key in keys:
            if key not in self._model_of_task:
                self._model_of_task[key] = known.get(key) or self._compile(np.frombuffer(key))
        self._world_models = [self._model_of_task[key] for key in keys]
        if self.physics == "warp":
            self._warp.set_bodies(self._world_models)
        return super()._start(task, generator)

    def _compile(self, exponents: np.ndarray) -> mujoco.MjModel:
        model = copy.copy(self._plain_model)
        sizes = model.nbody - 1, 3 * (model.nbody - 1), model.nv, 3 * model.ngeom
        mass, inertia, damping, friction = np.split(exponents, np.cumsum(sizes)[:-1])
        model.body_mass[1:] *= 1.5**mass
        model.body_inertia[1:] *= 1.5 ** inertia.reshape(-1, 3)
        model.dof_damping *= 1.3**damping
        model.geom_friction *= 1.5 ** friction.reshape(-1, 3)
        mujoco.mj_setConst(model, self._scratch)  # total masses, inverse weights: what the compiler derives from these
        return model

    def _models(self, worlds):
        return [self._world_models[world] for world in worlds]

    def _observe(self, before, after):
        velocity = self.qvel(after).clamp(-10, 10)
        return torch.cat([self.qpos(after)[:, 1:], velocity, self._mean_velocity(before, after, 1)], dim=1)


class HopperRandParams(RandomParamsEnv):
    """A one-legged body of unknown masses, damping and friction hops forward.

    Source: Rothfuss et al. 2019 (ProMP, arXiv:1810.06784) and Rakelly et al. 2019 (PEARL, arXiv:1903.08254);
    dennisl88/rand_param_envs `hopper_rand_params.py`; body: Gymnasium's Hopper-v5.
    Observation: [12] = positions without x (5), velocities clipped to +-10 (6), then the mean forward velocity over the
    last control step in m/s (0 at the start). Action: 3 torques in +-1.
    Reward: mean forward velocity + 1 - 0.001 |action|^2. An episode ends when the torso's height is not above 0.7, its
    angle not within +-0.2, or any other coordinate not within +-100.
    Tasks: 37 exponents, see `RandomParamsEnv`; test tasks have masses of the torso that training never sees.
    Horizon: 200.
    Differs: MuJoCo 1.31's model there, Gymnasium's current one here; PEARL trains on 40 fixed bodies, here each draw is
    new.
    """

    task_dim = 37
    model_file = "hopper.xml"

    ended = staticmethod(HopperForward.ended)

    def _fallen(self, state, obs):
        return super()._fallen(state, obs) | (self.qvel(state).abs() >= 100).any(dim=1)  # unclipped


class WalkerRandParams(RandomParamsEnv):
    """A two-legged planar body of unknown masses, damping and friction walks forward.

    Source: Rothfuss et al. 2019 (ProMP, arXiv:1810.06784) and Rakelly et al. 2019 (PEARL, arXiv:1903.08254);
    dennisl88/rand_param_envs `walker2d_rand_params.py`; body: Gymnasium's Walker2d-v5.
    Observation: [18] = positions without x (8), velocities clipped to +-10 (9), then the mean forward velocity over the
    last control step in m/s (0 at the start). Action: 6 torques in +-1.
    Reward: mean forward velocity + 1 - 0.001 |action|^2. An episode ends when the torso's height is not within (0.8, 2)
    or its angle not within +-1.
    Tasks: 61 exponents, see `RandomParamsEnv`; test tasks have masses of the torso that training never sees.
    Horizon: 200.
    Differs: as `HopperRandParams`.
    """

    task_dim = 61
    model_file = "walker2d_v5.xml"

    ended = staticmethod(Walker2dForward.ended)
