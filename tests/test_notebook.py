"""docs/maml_in_three_minutes.ipynb: its cells run one after the other, from docs/, and show what the text says."""

import ast
import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "docs/maml_in_three_minutes.ipynb").read_text())
CELLS = NOTEBOOK["cells"]


def run_cell(source: str, names: dict):
    """Run a cell as Jupyter does: what its last line is, if that is an expression, is its result."""
    *statements, last = ast.parse(source).body
    exec(compile(ast.Module(statements, []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return exec(compile(ast.Module([last], []), "cell", "exec"), names)


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    for path in re.findall(r"\]\((\.\./[\w/.]+)\)", json.dumps(NOTEBOOK)):
        assert (ROOT / "docs" / path).is_file(), path


@pytest.fixture(scope="module")
def results():
    """Names after all cells, the pictures, and all that was printed."""
    import contextlib
    import io
    import os

    before, told, names, pictures = os.getcwd(), io.StringIO(), {"__name__": "notebook"}, []
    os.chdir(ROOT / "docs")
    try:
        with contextlib.redirect_stdout(told):
            for cell in CELLS:
                if cell["cell_type"] == "code":
                    result = run_cell("".join(cell["source"]), names)
                    pictures += [result] if isinstance(result, Figure) else []
    finally:
        os.chdir(before)
    return names, pictures, told.getvalue()


def test_adaptation_goes_further_from_what_was_learned(results):
    names, _, told = results
    loss, inner_loop, args = names["loss"], names["inner_loop"], names["args"]
    support, query = names["support"], names["query"]
    after = {
        start: float(loss(inner_loop(names[start], support, 10, args), *query)) for start in ("random_theta", "theta")
    }
    assert after["theta"] < 0.5 * after["random_theta"]
    errors = names["errors"]
    assert errors[10] < errors[1] < 0.5 * errors[0]
    assert f"before: {errors[0]:.2f}".rstrip("0") in told


def test_the_pictures_show_the_curves_before_and_after(results, tmp_path):
    names, pictures, _ = results
    assert len(pictures) == 2
    by_random, by_maml = pictures[0].axes
    assert [len(axes.lines) for axes in (by_random, by_maml)] == [5, 5]
    wave, _, zero, one, ten = (line.get_ydata().flatten() for line in by_maml.lines)
    misses = [float(((curve - wave) ** 2).mean()) for curve in (zero, one, ten)]
    assert misses[2] < misses[0]
    assert misses[1] < misses[0]
    assert list(pictures[1].axes[0].lines[0].get_ydata()) == names["errors"]
    for number, picture in enumerate(pictures):
        picture.savefig(tmp_path / f"{number}.png")
