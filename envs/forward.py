"""Locomotion with one task, to run forward: what model-based and model-free algorithms are compared on.

The bodies are Gymnasium's (HalfCheetah-v5, ..), and so are their rewards, except for the ant's. The mean forward
velocity over the control step is appended to the observation, so that rewards are functions of what is observed.
"""

import math

import torch
from torch import Tensor

from .locomotion import MujocoTaskVectorEnv


class ForwardEnv(MujocoTaskVectorEnv):
    """Base class: the task vector [1] is always 1 and means nothing; a reward is velocity + bonus - cost |action|^2."""

    task_dim = 1
    first_position = 1  # positions before this one (x; of ant and swimmer y, too) are not observed
    clipped_velocity = math.inf

    def sample_tasks(self, num_tasks, generator, split="train"):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        return torch.ones(num_tasks, 1, dtype=self.dtype, device=self.device)

    def _observe(self, before, after):
        position = self.qpos(after)[:, self.first_position :]
        velocity = self.qvel(after).clamp(-self.clipped_velocity, self.clipped_velocity)
        return torch.cat([position, velocity, self._mean_velocity(before, after, 1)], dim=1)


class HalfCheetahForward(ForwardEnv):
    """A planar cheetah runs forward.

    Source: Clavera et al. 2018 (MB-MPO, arXiv:1809.05214); jonasrothfuss/model_ensemble_meta_learning
    `cheetah_env_rand_param.py`; body, observation and reward: Gymnasium's HalfCheetah-v5.
    Observation: [18] = positions without x (8), velocities (9), then the mean forward velocity over the last control
    step in m/s (0 at the start). Action: 6 torques in +-1.
    Reward: mean forward velocity - 0.1 |action|^2. No early end.
    Tasks: one; the task vector is [1].
    Horizon: 200 (the paper's; Gymnasium's is 1000).
    Differs: the authors' models predict rewards from the velocity at the end of a control step, not its mean.
    """

    model_file = "half_cheetah.xml"
    frame_skip = 5
    start_noise, start_velocity = 0.1, "normal"

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return next_obs[..., -1] - 0.1 * action.square().sum(-1)


class AntForward(ForwardEnv):
    """A four-legged ant walks forward.

    Source: as `HalfCheetahForward`, `ant_env_random_param.py`; body: Gymnasium's Ant-v5.
    Observation: [28] = positions without x and y (13), velocities (14), then the torso's mean forward velocity over the
    last control step in m/s (0 at the start). Action: 8 torques in +-1.
    Reward: mean forward velocity + 1 - 0.005 |action|^2. An episode ends when the torso's height leaves [0.2, 1].
    Tasks: one; the task vector is [1].
    Horizon: 200 (the paper's; Gymnasium's is 1000).
    Differs: the authors' control step is 2 physics steps, here Gymnasium's 5. Gymnasium's action cost is 0.5, and it
    has a cost of contact forces. Beware when reading returns: standing still earns +1 a step.
    """

    first_position = 2
    model_file = "ant.xml"
    frame_skip = 5
    start_noise, start_velocity = 0.1, "normal"
    camera = {"distance": 4.0, "elevation": -30.0, "azimuth": 90.0}

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return next_obs[..., -1] + 1 - 0.005 * action.square().sum(-1)

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return (obs[..., 0] < 0.2) | (obs[..., 0] > 1.0)


class SwimmerForward(ForwardEnv):
    """A chain of three links swims forward.

    Source: as `HalfCheetahForward`, `swimmer_env_random_param.py`; body, observation, reward: Gymnasium's Swimmer-v5.
    Observation: [9] = angles (3), velocities (5), then the first link's mean forward velocity over the last control
    step in m/s (0 at the start). Action: 2 torques in +-1.
    Reward: mean forward velocity - 0.0001 |action|^2. No early end.
    Tasks: one; the task vector is [1].
    Horizon: 200 (the paper's; Gymnasium's is 1000).
    Differs: as `HalfCheetahForward`.
    """

    first_position = 2
    model_file = "swimmer.xml"
    frame_skip = 4
    start_noise, start_velocity = 0.1, "uniform"
    camera = {"distance": 4.0, "elevation": -50.0, "azimuth": 90.0}

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return next_obs[..., -1] - 0.0001 * action.square().sum(-1)


class HopperForward(ForwardEnv):
    """A one-legged body hops forward.

    Source: as `HalfCheetahForward`, `hopper_env_random_param.py`; body, observation, reward: Gymnasium's Hopper-v5.
    Observation: [12] = positions without x (5), velocities clipped to +-10 (6), then the mean forward velocity over the
    last control step in m/s (0 at the start). Action: 3 torques in +-1.
    Reward: mean forward velocity + 1 - 0.001 |action|^2. An episode ends when the torso's height is not above 0.7, its
    angle not within +-0.2, or another observed coordinate not within +-100.
    Tasks: one; the task vector is [1].
    Horizon: 200 (the paper's; Gymnasium's is 1000).
    Differs: the authors' control step is 5 physics steps, here Gymnasium's 4. Gymnasium's last step of a fall earns no
    bonus, and its early end sees velocities unclipped.
    """

    clipped_velocity = 10.0
    model_file = "hopper.xml"
    frame_skip = 4
    start_noise, start_velocity = 0.005, "uniform"

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return next_obs[..., -1] + 1 - 0.001 * action.square().sum(-1)

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        fallen = (obs[..., 0] <= 0.7) | (obs[..., 1].abs() >= 0.2)
        return fallen | (obs[..., 1:-1].abs() >= 100).any(-1)


class Walker2dForward(ForwardEnv):
    """A two-legged planar body walks forward.

    Source: as `HalfCheetahForward`, `walker_env_random_param.py`; body, observation, reward: Gymnasium's Walker2d-v5.
    Observation: [18] = positions without x (8), velocities clipped to +-10 (9), then the mean forward velocity over the
    last control step in m/s (0 at the start). Action: 6 torques in +-1.
    Reward: mean forward velocity + 1 - 0.001 |action|^2. An episode ends when the torso's height is not within (0.8, 2)
    or its angle not within +-1.
    Tasks: one; the task vector is [1].
    Horizon: 200 (the paper's; Gymnasium's is 1000).
    Differs: the authors' control step is 5 physics steps, here Gymnasium's 4. Gymnasium's last step of a fall earns no
    bonus.
    """

    clipped_velocity = 10.0
    model_file = "walker2d_v5.xml"
    frame_skip = 4
    start_noise, start_velocity = 0.005, "uniform"

    @staticmethod
    def reward(obs: Tensor, action: Tensor, next_obs: Tensor, task: Tensor) -> Tensor:
        return next_obs[..., -1] + 1 - 0.001 * action.square().sum(-1)

    @staticmethod
    def ended(obs: Tensor) -> Tensor:
        return (obs[..., 0] <= 0.8) | (obs[..., 0] >= 2.0) | (obs[..., 1].abs() >= 1.0)
