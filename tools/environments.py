"""Write docs/environments.md from the classes of envs/, and draw the pictures in docs/images/environments/.

    python tools/environments.py                the page (a test says that it is up to date)
    python tools/environments.py pictures       the pictures, too

What the page says of a family stands in its docstring; sizes are asked of its worlds, horizons are `envs.HORIZONS`.
"""

import inspect
import re
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs  # noqa: E402
from envs.core import SupervisedTasks, TaskVectorEnv  # noqa: E402
from envs.locomotion import MujocoTaskVectorEnv  # noqa: E402
from envs.optimisees import Optimisees  # noqa: E402

PAGE = ROOT / "docs/environments.md"
PICTURES = ROOT / "docs/images/environments"
WIDTH = 180  # pixels of a picture
STEPS = 6  # random ones before a picture
BODIES = ("HalfCheetah", "Ant", "Humanoid", "Hopper", "Walker", "Swimmer")  # a picture for each
COLUMNS = 118
GROUPS = {
    "A point in the plane": ("envs.navigation",),
    "Bodies that MuJoCo moves": ("envs.locomotion", "envs.random_params", "envs.forward"),
    "Bandits, experiments, small decision processes": ("envs.bandit", "envs.experiments", "envs.tabular_mdp"),
    "Grids": ("envs.mouse_cheese", "envs.hidden_goals", "envs.gridworlds"),
    "One task, where the right discount matters": ("envs.corridor",),
    "A pole": ("envs.cartpole",),
    "Supervised tasks": ("envs.regression", "envs.fewshot"),
    "Functions to minimise": ("envs.optimisees",),
}
FAMILIES = (*envs.HORIZONS, *envs.SUPERVISED, *envs.OPTIMISEES)
HEAD = """\
# Task environments

Every id, with what is hidden, its ranges, its source, and what differs from other variants. This page is made by
`python tools/environments.py` from the docstrings in [envs/](../envs), which are the place to change it.

Two rules hold everywhere. The task is never in the observation, unless a family says so. Test tasks are held out:
training never draws them, except where a family has one or two tasks in all. A horizon is the default; flags may
ask for another one. Of a task the table says how many numbers it has.
"""


def article(family: type) -> str:
    """The docstring of a class, without indents."""
    return inspect.cleandoc(family.__dict__["__doc__"])


def entries(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A docstring's opening and its parts "Source: ..", "Tasks: ..", in their order.

    A part goes on to the next line that begins with a capital letter's word and a colon.
    """
    opening, parts = [], []
    text = re.sub(r"(?<=\. )(Action|Target): ", r"\n\1: ", text)  # which stand behind another part
    for line in text.splitlines():
        match = re.match(r"([A-Z][a-z]+(?:, [a-z ]+)*(?: \[\w+\])?): (.*)", line)
        if match:
            parts.append(match.groups())
        elif parts:
            parts[-1] = parts[-1][0], f"{parts[-1][1]} {line}"
        else:
            opening.append(line)
    return " ".join(" ".join(opening).split()), [(name, " ".join(x.split())) for name, x in parts]


def for_markdown(text: str) -> str:
    """Text of a docstring, in which `*` and `|` mean themselves, outside of code."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*|_])", r"\\\1", piece) for piece in pieces)


def wrapped(text: str, indent: str = "") -> str:
    options = {"break_on_hyphens": False, "break_long_words": False, "subsequent_indent": indent}
    return textwrap.fill(text, COLUMNS, **options)


def described(family: type) -> list[str]:
    """A class's docstring as Markdown: its opening, then a list."""
    opening, parts = entries(article(family))
    lines = [wrapped(for_markdown(opening)), ""]
    lines += [wrapped(f"- **{name}**: {for_markdown(text)}", indent="  ") for name, text in parts]
    return [*lines, ""] if parts else lines


def bases_named(family: type) -> list[type]:
    """Classes that are no family themselves and that the docstring refers to."""
    named = re.findall(r"`(\w+)`", article(family))
    return [x for x in family.__mro__ if x.__name__ in named and x not in FAMILIES and x.__module__ != "envs.core"]


def sizes(family: type) -> list[str]:
    """Cells of the table: numbers of an observation (input), an action (output) and a task; horizon."""
    if issubclass(family, Optimisees):
        tasks = family("cpu")
        row = tasks.sample_tasks(1, torch.Generator(), "train")
        return ["", "", str(row.shape[1]), ""]
    if issubclass(family, SupervisedTasks):
        if family.is_classification:
            return ["28 x 28 pixels", "ways", "ways", ""]
        tasks = family("cpu")
        row = tasks.sample_tasks(1, torch.Generator(), "train")
        return [str(tasks.num_inputs), str(tasks.num_outputs), str(row.shape[1]), ""]
    worlds = family(num_envs=1)
    space = worlds.single_action_space
    action = str(space.shape[0]) if space.shape else f"one of {space.n}"
    row = worlds.sample_tasks(1, torch.Generator(), "train")
    cells = [str(worlds.single_observation_space.shape[0]), action, str(row.shape[1]), str(envs.HORIZONS[family])]
    worlds.close()
    return cells


def picture_name(family: type) -> str | None:
    """Of the picture that shows this family: its own, or its body's; None where nothing draws it."""
    if not issubclass(family, TaskVectorEnv) or family.render_frame is TaskVectorEnv.render_frame:
        return None
    if issubclass(family, MujocoTaskVectorEnv):
        return next(body for body in BODIES if family.__name__.startswith(body))
    return family.__name__


def group_of(family: type) -> str:
    return next(title for title, modules in GROUPS.items() if family.__module__ in modules)


def page() -> str:
    """The whole text of docs/environments.md."""
    lines = [HEAD]
    for title in GROUPS:
        families = [family for family in FAMILIES if group_of(family) == title]
        lines += [f"## {title}", ""]
        lines += ["| id | observation | action | task | horizon |", "|---|---|---|---|---|"]
        lines += [f"| `{family.__name__}-v0` | {' | '.join(sizes(family))} |" for family in families]
        lines.append("")
        shown = set()  # pictures and bases
        for family in families:
            for base in bases_named(family):
                if base not in shown:
                    shown.add(base)
                    lines += [f"### What `{base.__name__}` means below", "", *described(base)]
            lines += [f"### `{family.__name__}-v0`", ""]
            name = picture_name(family)
            if name is not None and name not in shown:
                shown.add(name)
                lines += [f"![A picture of {name}](images/environments/{name}.png)", ""]
            lines += described(family)
    return "\n".join(lines).rstrip() + "\n"


def draw(family: type, path: Path) -> None:
    """A world with a test task, a few random steps after its start."""
    worlds = family(num_envs=1)
    tasks, generator = worlds.test_set(1)
    worlds.reset(seed=0, options={"tasks": tasks})
    size = worlds.single_action_space.shape
    for _ in range(STEPS):
        choice = torch.randint(worlds.single_action_space.n, (1,), generator=generator) if not size else None
        action = 2 * torch.rand(1, *size, generator=generator) - 1 if size else choice
        _, _, terminated, _, _ = worlds.step(action)
        if terminated.any():
            break
    frame = Image.fromarray(worlds.render_frame(0))
    height = round(frame.height * WIDTH / frame.width)
    small = ImageOps.expand(frame.resize((WIDTH - 2, height - 2), Image.Resampling.LANCZOS), 1, "lightgrey").quantize(
        64
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path, optimize=True)
    worlds.close()


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if words not in ([], ["pictures"]):
        raise SystemExit("usage: python tools/environments.py [pictures]")
    PAGE.write_text(page())
    print(PAGE)
    drawn = set()
    for family in FAMILIES if words else ():
        name = picture_name(family)
        if name is not None and name not in drawn:
            drawn.add(name)
            draw(family, PICTURES / f"{name}.png")
            print(PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
