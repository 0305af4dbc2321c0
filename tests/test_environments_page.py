"""docs/environments.md is what tools/environments.py makes of the classes, and says all that they say."""

import inspect
import re

import numpy as np
import pytest
from PIL import Image

import envs
from tools import environments

PAGE = environments.PAGE.read_text()


def words(text: str) -> list[str]:
    return re.findall(r"[\w.]+", text.replace("\\", ""))


def sections() -> dict[str, str]:
    parts = re.split(r"^### `(\w+)-v0`\n", PAGE, flags=re.MULTILINE)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {name: re.split(r"^##", text, flags=re.MULTILINE)[0] for name, text in pairs}


def test_the_page_is_up_to_date():
    assert environments.page() == PAGE, "python tools/environments.py"


@pytest.mark.parametrize("family", environments.FAMILIES, ids=lambda x: x.__name__)
def test_a_section_has_all_words_of_the_docstring_in_their_order(family):
    section = re.sub(r"^!\[.*", "", sections()[family.__name__], flags=re.MULTILINE)
    assert words(section) == words(inspect.cleandoc(family.__doc__))


def test_every_id_is_in_a_table_with_what_its_worlds_have():
    rows = {
        cells[0]: cells[1:] for cells in (line[2:-2].split(" | ") for line in PAGE.splitlines() if "-v0` |" in line)
    }
    assert len(rows) == len(environments.FAMILIES) == len(sections())
    for name, horizon in (("Navigation2D", 100), ("TabularMDP", 10), ("HalfCheetahVel", 200)):
        worlds = envs.make(f"{name}-v0", 2, horizon, discrete=True)
        obs, _ = worlds.reset(seed=0)
        action = worlds.action_space.sample()
        task = worlds.unwrapped.tasks
        cells = rows[f"`{name}-v0`"]
        assert cells[0] == str(obs.shape[1])
        assert cells[1] == (str(action.shape[1]) if action.ndim == 2 else "one of 5")
        assert cells[2:] == [str(task.shape[1]), str(horizon)]
    assert rows["`Sinusoid-v0`"][:3] == ["1", "1", "2"]


def test_every_picture_is_there_is_shown_and_shows_something():
    shown = set(re.findall(r"\(images/environments/(\w+)\.png\)", PAGE))
    drawn = {name for family in environments.FAMILIES if (name := environments.picture_name(family))}
    files = {path.stem: path for path in environments.PICTURES.iterdir()}
    assert shown == drawn == set(files)
    assert sum(path.stat().st_size for path in files.values()) < 2e6
    for path in files.values():
        with Image.open(path) as picture:
            assert picture.width == environments.WIDTH
            assert len(np.unique(np.asarray(picture.convert("L")))) > 2, path


def test_a_picture_is_drawn_anew(tmp_path):
    environments.draw(envs.Navigation2D, tmp_path / "folder/x.png")
    with Image.open(tmp_path / "folder/x.png") as new, Image.open(environments.PICTURES / "Navigation2D.png") as kept:
        assert new.size == kept.size
        difference = np.abs(np.asarray(new.convert("L"), int) - np.asarray(kept.convert("L"), int))
    assert difference.mean() < 2


def test_parts_of_a_docstring():
    text = "First line.\n\nAnd more.\n\nSource: a\n    b: c.\nObservation, action: as `X`. Action: d.\nTasks: x | y_z"
    opening, parts = environments.entries(text)
    assert opening == "First line. And more."
    assert parts == [("Source", "a b: c."), ("Observation, action", "as `X`."), ("Action", "d."), ("Tasks", "x | y_z")]
    assert environments.for_markdown("a_b `a_b` *x*|") == r"a\_b `a_b` \*x\*\|"
    with pytest.raises(SystemExit, match="usage"):
        environments.main(["picture"])
