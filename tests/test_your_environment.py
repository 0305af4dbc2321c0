"""docs/your_environment.md as it is written: every file and every command, with fewer and shorter episodes."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/your_environment.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?([\w.]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
OTHERS = {"maml", "fomaml", "reptile", "protonet", "in_context", "learned_optimizer"}  # supervised
OTHERS |= {"dpt", "ad"}  # tabular
TINY = {
    "pearl_sac": "--iterations 1 --horizon 6 --train-tasks 2 --tasks-per-iteration 2 --meta-batch-size 2 --updates 1 "
    "--batch-size 4 --context-size 4 --hidden-size 8 --replay-size 64",
    "pearl_sac --resume": "--iterations 2",
    "pearl_sac --evaluate": "--eval-episodes 3",
    "mbmpo": "--iterations 1 --horizon 8 --num-models 2 --real-episodes 2 --episodes-per-task 2 --model-epochs 1 "
    "--meta-steps 1 --model-size 8 --hidden-size 8",
}


def tiny(command: str) -> str:
    """The command with smaller sizes, of which the last ones count."""
    kinds = [kind for kind in TINY if all(word in command for word in kind.split())]
    return f"{command} {TINY[kinds[-1]] if 'mbmpo' not in command else TINY['mbmpo']}" if kinds else command


def commands(block: str) -> list[str]:
    return block.replace("\\\n", " ").strip().splitlines()


def test_all_on_the_page_is_run():
    assert [name for kind, name, _ in BLOCKS if kind == "python"] == [
        "pendulum.py",
        "figure.py",
        "known.py",
        "by_hand.py",
        "slow.py",
        "workers.py",
    ]
    assert {kind for kind, _, _ in BLOCKS} == {"python", "bash"}
    assert PAGE.count("```") == 2 * len(BLOCKS)


@pytest.mark.skipif(os.name == "nt", reason="commands of a Unix shell")
def test_the_page_from_nothing_to_the_figure(tmp_path):
    (tmp_path / "cleanmeta").symlink_to(ROOT)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    told = {}
    for kind, name, text in BLOCKS:
        if kind == "python":
            (tmp_path / name).write_text(text)
            continue
        for command in commands(text):
            done = subprocess.run(
                ["bash", "-c", tiny(command)],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            told[command] = done.stdout
    assert next(text for command, text in told.items() if "envs.check" in command).endswith("all hold\n")
    assert told["python by_hand.py"] == "torch.Size([6, 3]) torch.Size([6]) True\n"
    one, four = map(int, re.findall(r"(\d+) steps a second", told["python workers.py"]))
    assert four > 1.5 * one
    names = sorted(path.name.rpartition("__")[0] for path in (tmp_path / "runs").iterdir())
    assert [name.split("__")[:3] for name in names] == [
        ["KnownPendulum", "mbmpo", "1"],
        ["RandomMassPendulum-v0", "pearl_sac", "1"],
    ]
    (run,) = (tmp_path / "runs").glob("Random*")
    assert {"curve.png", "evaluation.png", "checkpoint.pt"} <= {path.name for path in run.iterdir()}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    with Image.open(tmp_path / "pendulum.png") as picture:
        assert picture.size == (600, 350)


def test_the_numbers_on_the_page_are_those_of_the_kept_run():
    kept = ROOT / "benchmark/results/your_environment/pendulum_seed1.metrics.jsonl.gz"
    last = json.loads(gzip.decompress(kept.read_bytes()).splitlines()[-1])
    numbers = [round(last[f"test/return_k{k}"]) for k in range(3)]
    assert f"{numbers[0]}, {numbers[1]} and {numbers[2]}" in " ".join(PAGE.split())
    assert f"{last['env_steps']:,} steps" in PAGE


def test_the_table_of_algorithms_is_complete():
    table = PAGE[PAGE.index("| needs |") :].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", table.replace("`Box`", "").replace("`Discrete`", ""))
    assert sorted(named) == sorted({x.stem for x in (ROOT / "algos").glob("*.py")} - OTHERS)
