"""Task environments, registered with Gymnasium: `gym.make_vec(id, ...)` for batches, `gym.make(id)` for one world."""

import gymnasium as gym

from envs.core import ScaleActions, SingleTaskEnv, TaskVectorEnv, held_out_uniform
from envs.locomotion import AntDir, AntDir2D, AntGoal, AntVel, HalfCheetahDir, HalfCheetahVel, HumanoidDir
from envs.navigation import Navigation2D, SparseNavigation2D
from envs.random_params import HopperRandParams, WalkerRandParams

HORIZONS = {
    Navigation2D: 100,
    SparseNavigation2D: 20,
    HalfCheetahDir: 200,
    HalfCheetahVel: 200,
    AntDir: 200,
    AntDir2D: 200,
    AntVel: 200,
    AntGoal: 200,
    HumanoidDir: 200,
    HopperRandParams: 200,
    WalkerRandParams: 200,
}

__all__ = ["HORIZONS", "SingleTaskEnv", "TaskVectorEnv", "held_out_uniform"]


def _register(family: type[TaskVectorEnv], horizon: int) -> None:
    gym.register(
        id=f"{family.__name__}-v0",
        entry_point=lambda **kwargs: SingleTaskEnv(family, **kwargs),
        vector_entry_point=family,
        max_episode_steps=horizon,
    )


for _family, _horizon in HORIZONS.items():
    _register(_family, _horizon)


def make(env_id: str, num_envs: int, horizon: int, device: str = "cpu", action_scale: float = 1.0) -> ScaleActions:
    """A batch of worlds in which an action of +-action_scale spans the bounds; an unknown id is one clear line."""
    known = [f"{family.__name__}-v0" for family in HORIZONS]
    if env_id not in gym.registry:
        raise SystemExit(f"--env-id {env_id} is not registered; allowed is one of {', '.join(known)}")
    mode = "vector_entry_point"
    envs = gym.make_vec(env_id, num_envs, vectorization_mode=mode, max_episode_steps=horizon, device=device)
    return ScaleActions(envs, action_scale)
