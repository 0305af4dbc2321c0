"""Pictures of learning and of adaptation.

Without a display MuJoCo draws by EGL (`make_renderer` in envs/locomotion.py).
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import replace_file
from .processes import refusal

OWN_TASK = "the run's own task"  # what is tested where an evaluation has no test tasks
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


def learning_curve(folder: Path, rows: list[dict], unit: str, tests: str) -> str:
    """Draw a run's curve.png, and say in a line what adaptation changed on test tasks; "" before an evaluation.

    Return, loss or accuracy on test tasks: to the left while learning, to the right at the end over adaptation.

    Args:
        folder: where curve.png goes.
        rows: a run's metrics, an iteration each.
        unit: what adaptation is counted in, such as "inner steps".
        tests: what the test tasks are called.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if any(steps_of(row))]
    if not rows:
        return ""
    names, final = steps_of(rows[-1]), [rows[-1][name] for name in steps_of(rows[-1])]
    what = names[0][5:-3]
    tests = tests if "test/tasks" in rows[-1] else OWN_TASK
    left, right = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
    for name, label in ((names[0], "unadapted"), (names[-1], f"adapted (on the right: {len(names) - 1})")):
        seen = [row for row in rows if name in row]  # a resumed run may have had fewer
        left.plot([row["env_steps"] for row in seen], [row[name] for row in seen], "o-", ms=3, label=label)
    left.legend()
    left.set(xlabel="env_steps", ylabel=fill(f"{what} on {tests}", 36))
    figure.suptitle(fill(folder.name, 130), size=9)
    right.plot([final[0]] * len(final), "C0-", final, "C1o-")
    right.set(xlabel=unit, title=f"iteration {rows[-1]['iteration']}")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, folder / "curve.png")
    return f"{tests}: {what} {change(rows[-1])}: {folder}"


def steps_of(row: dict) -> list[str]:
    """The names of a row's metrics on test tasks after 0, 1, .. units of adaptation."""
    return [name for name in row if name.startswith("test/") and re.search(r"_k\d+$", name)]


def change(row: dict) -> str:
    """What adaptation changed, in words."""
    names = steps_of(row)
    first, last = row[names[0]], row[names[-1]]
    number = int(row.get("test/tasks", 0))
    over = f"{number} tasks" if number > 1 else "episodes"
    width = f"{row['test/gain_ci95']:.2g} (95 % interval over {over})"
    return f"unadapted {first:.4g}, adapted {last:.4g}, change {last - first:.4g} +- {width}"


def evaluation_picture(path: Path, means: list[float], widths: list[float], title: str, unit: str, what: str) -> None:
    """Draw what an evaluation found after 0, 1, .. units of adaptation: means with 95 % intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    axes = (figure := Figure(figsize=(5, 4), layout="constrained")).subplots()
    axes.errorbar(range(len(means)), means, widths, fmt="C1o-", capsize=3)
    axes.set(xlabel=unit, ylabel=what)
    axes.set_title("\n".join(fill(line, 75) for line in title.splitlines()), size=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)


def save(figure, path: Path) -> None:
    """Write a picture that is whole at every moment; CannotWriteError if that fails."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace_file(path, picture.getbuffer())


def try_pictures(envs=None) -> None:
    """Draw what a run will draw at its end, and a world if some are given; SystemExit with what fails in a line."""
    from matplotlib.figure import Figure

    (figure := Figure()).subplots()
    figure.savefig(io.BytesIO())
    if envs is None:
        return
    try:
        single = envs.single_world()
        single.reset(seed=0)
        single.unwrapped.render_frame(0)
        single.close()
    except (RuntimeError, NotImplementedError) as error:
        raise refusal(f"--capture-video: {error}") from None


def _beside(images: tuple[Image.Image, ...]) -> Image.Image:
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row
