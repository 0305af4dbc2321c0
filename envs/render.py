"""Pictures of adaptation. Without a display set MUJOCO_GL=egl before `envs` (which imports mujoco) is imported."""

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CAPTION_HEIGHT = 24  # pixels above each picture


def adaptation_gif(
    path: str | Path,
    env_id: str,
    task: Tensor,
    actors: dict[str, Callable[[Tensor], Tensor]],
    seed: int = 0,
    max_episode_steps: int | None = None,
    every: int = 2,
    **env_kwargs,
) -> None:
    """Write a gif with one episode of each actor, side by side: the same task [task_dim], the same start.

    Args:
        path: the file to write.
        actors: caption -> function from observations [1, O] to actions [1, A] in the environment's own units.
        max_episode_steps: length of the episode; None is the family's own horizon.
        every: control steps between two frames. The gif plays in real time at the family's `render_fps`.
        env_kwargs: passed to the family.
    Raises RuntimeError with a hint where MuJoCo cannot draw.
    """
    if max_episode_steps is not None:
        env_kwargs["max_episode_steps"] = max_episode_steps
    mode = "vector_entry_point"
    envs = gym.make_vec(env_id, num_envs=1, vectorization_mode=mode, **env_kwargs).unwrapped
    font = ImageFont.load_default(14)
    columns = []
    for caption, act in actors.items():
        obs, _ = envs.reset(seed=seed, options={"tasks": task.reshape(1, -1)})
        images, earned = [], 0.0
        for step in range(envs.horizon + 1):
            if step % every == 0:
                image = Image.fromarray(envs.render_frame(0))
                framed = Image.new("RGB", (image.width, image.height + CAPTION_HEIGHT), "white")
                framed.paste(image, (0, CAPTION_HEIGHT))
                ImageDraw.Draw(framed).text((6, 4), f"{caption}   return {earned:.1f}", fill="black", font=font)
                images.append(framed)
            if step < envs.horizon:
                obs, reward, *_ = envs.step(act(obs))
                earned += float(reward[0])
        columns.append(images)
    frames = [_beside(images) for images in zip(*columns, strict=True)]
    milliseconds = 1000 * every / envs.metadata["render_fps"]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    envs.close()


def _beside(images: tuple[Image.Image, ...]) -> Image.Image:
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row
