"""Pictures of learning and of adaptation.

Without a display MuJoCo draws by EGL (`make_renderer` in envs/locomotion.py).
"""

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CAPTION_HEIGHT = 24  # pixels above each picture


def adaptation_gif(path: str | Path, envs, actors: dict[str, Callable[[Tensor], Tensor]], seed=0, every=2) -> None:
    """Write a gif with one episode of each actor, side by side, on the task of the batch's first world.

    Args:
        path: the file to write.
        envs: a batch made by `envs.make` that has been reset; a single world is made like it.
        actors: caption -> function from observations [1, O] to actions [1, A] in the batch's units.
        seed: of the start state, the same for all actors.
        every: control steps between two frames. The gif plays in real time at the family's `render_fps`.
    Raises RuntimeError with a hint where MuJoCo cannot draw.
    """
    batch, task = envs, envs.unwrapped.tasks[:1]
    envs = batch.single_world()
    font = ImageFont.load_default(14)
    columns = []
    for caption, act in actors.items():
        obs, _ = envs.reset(seed=seed, options={"tasks": task})
        images, earned = [], 0.0
        for step in range(envs.unwrapped.horizon + 1):
            if step % every == 0:
                image = Image.fromarray(envs.unwrapped.render_frame(0))
                framed = Image.new("RGB", (image.width, image.height + CAPTION_HEIGHT), "white")
                framed.paste(image, (0, CAPTION_HEIGHT))
                ImageDraw.Draw(framed).text((6, 4), f"{caption}   return {earned:.1f}", fill="black", font=font)
                images.append(framed)
            if step < envs.unwrapped.horizon:
                obs, reward, *_ = envs.step(act(obs))
                earned += float(reward[0])
        columns.append(images)
    frames = [_beside(images) for images in zip(*columns, strict=True)]
    milliseconds = 1000 * every / envs.unwrapped.metadata["render_fps"]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    envs.close()


def learning_curve(folder: Path) -> str:
    """Draw a run's curve.png from its metrics.jsonl, and say in a line what adaptation changed on held-out tasks.

    Return, loss or accuracy on held-out tasks: to the left while learning, to the right at the end over adaptation.
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "_k0" in line]
    names = [name for name in rows[-1] if name.startswith("test/") and "_k" in name]
    what, final = names[0][5:-3], [rows[-1][name] for name in names]
    left, right = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
    left.plot([row["env_steps"] for row in rows], [(row[names[0]], row[names[-1]]) for row in rows])
    left.legend(("unadapted", f"after adaptation ({len(final) - 1})"))
    left.set(xlabel="env_steps", ylabel=f"{what} on held-out tasks", title=folder.name)
    right.plot([final[0]] * len(final), "C0-", final, "C1o-")
    right.set(xlabel="units of adaptation", title=f"iteration {rows[-1]['iteration']}")
    figure.savefig(folder / "curve.png", dpi=120)
    change = f"change {final[-1] - final[0]:.4g} +- {rows[-1]['test/gain_ci95']:.2g} (95 % interval over tasks)"
    return f"held-out {what} unadapted {final[0]:.4g}, adapted {final[-1]:.4g}, {change}: {folder}"


def _beside(images: tuple[Image.Image, ...]) -> Image.Image:
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row
