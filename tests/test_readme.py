"""The README's example runs as printed, and its structure is what is on disk."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_every_step_respects_the_trust_region(tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    result = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    rows = [[float(x) for x in line.split()] for line in result.stdout.splitlines()]
    assert len(rows) == 3
    assert all(before < 0 and after < 0 and 0 <= kl <= 0.05 for before, after, kl in rows)


def test_the_structure_is_the_one_on_disk():
    listing = re.search(r"## Structure\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = {line.split()[0].rstrip("/") for line in listing.splitlines()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines()}
    ordinary = {"README.md", "LICENSE", "pyproject.toml", ".gitignore", "requirements-metaworld.txt"}
    ordinary |= {"requirements-benchmark.txt", "requirements-warp.txt", "requirements-docs.txt", "CONTRIBUTING.md"}
    assert named == top - ordinary


def test_every_algorithm_and_environment_is_in_a_table():
    import envs

    for path in (ROOT / "algos").glob("*.py"):
        assert f"algos/{path.name}" in README
        assert (ROOT / "docs" / f"{path.stem}.md").exists()
        (row,) = re.findall(rf"^\| \[`{path.name}`\].*", README, re.MULTILINE)
        assert f"| {len(path.read_text().splitlines())} |" in row, "the table's line count"
    for family in (*envs.HORIZONS, *envs.SUPERVISED, *envs.OPTIMISEES):
        assert f"`{family.__name__}-v0`" in README
