"""docs/use.md as it is written: every block; where the page says how to make a run, on a small one."""

import importlib
import json
import re
from pathlib import Path

import pytest

from tools import compare

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/use.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TINY = {
    "pearl_sac": "--iterations 1 --horizon 6 --train-tasks 2 --tasks-per-iteration 2 --meta-batch-size 2 --updates 1 "
    "--batch-size 4 --context-size 4 --hidden-size 8 --replay-size 64",
    "varibad_ppo": "--iterations 1 --meta-batch-size 8 --episodes-per-trial 2 --vae-updates 1 --buffer-size 8",
    "dpt": "--iterations 1 --meta-batch-size 4 --episodes-per-trial 6 --hidden-size 32 --layers 1",
    "mbmpo": "--iterations 1 --horizon 8 --num-models 2 --real-episodes 2 --episodes-per-task 2 --model-epochs 1 "
    "--meta-steps 1 --model-size 8 --hidden-size 8",
    "lifetime_rewards": "--iterations 1 --meta-batch-size 4 --episodes-per-lifetime 3 --unroll 2",
    "lirpg": "--iterations 1 --num-worlds 1 --rollout-steps 32 --horizon 16 --epochs 1 --minibatches 2",
    "meta_critic": "--iterations 1 --meta-batch-size 4 --eval-steps 1 --eval-windows 1 --eval-episodes 2",
}
# What a block must print, by the algorithm that it takes: numbers in its text, or nothing but that it ends.
GAINS = {"maml_trpo": r"before (-?\d+), after (-?\d+)"}
GAINS |= {"rl2_ppo": r"last pull: tensor\(([\d.]+)\) tensor\(([\d.]+)\)"}


def algorithm_of(block: str) -> str:
    return re.search(r"algos[./](\w+)", block).group(1)


def test_every_family_is_there_and_every_block_is_python_or_a_command():
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}
    assert PAGE.count("```") == 2 * len(BLOCKS)
    named = [algorithm_of(text) for kind, text in BLOCKS if kind == "python"]
    assert named == [
        *("maml_trpo", "rl2_ppo", "pearl_sac", "varibad_ppo", "maml", "dpt", "mbmpo"),
        *("lifetime_rewards", "lirpg", "meta_critic"),
    ]
    assert {algorithm_of(text) for kind, text in BLOCKS if kind == "bash" and "algos" in text} == set(TINY)
    for kind, text in BLOCKS:
        statements = [line for line in text.splitlines() if line and not line.startswith((" ", "import", "from"))]
        assert kind == "bash" or len(statements) <= 12, "ten lines or little more, beside imports"


def run_command(command: str) -> None:
    name = algorithm_of(command)
    assert command == f"python algos/{name}.py\n"
    importlib.import_module(f"algos.{name}").main(TINY[name].split())


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"], ids=algorithm_of)
def test_the_block_loads_adapts_and_plays(block, tmp_path, monkeypatch, capsys):
    name = algorithm_of(block)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind == "bash" and f"algos/{name}.py" in text:
            run_command(text)
    capsys.readouterr()
    exec(compile(block, f"docs/use.md, {name}", "exec"), {"__name__": "use"})
    told = capsys.readouterr().out
    assert told
    assert "nan" not in told
    if name in GAINS:
        before, after = map(float, re.search(GAINS[name], told).groups())
        assert after > before + {"maml_trpo": 300, "rl2_ppo": 0.2}[name]
    if name == "maml":
        before, after = map(float, re.search(r"before ([\d.]+), after ([\d.]+)", told).groups())
        assert after < 0.2 * before


def test_the_command_for_several_runs_is_one_that_the_tool_takes(tmp_path, monkeypatch, capsys):
    (command,) = (text for kind, text in BLOCKS if kind == "bash" and "tools/" in text)
    assert command == "python tools/compare.py runs/Sinusoid-v0__*\n"
    run = tmp_path / "runs/Bandit5-v0__rl2_ppo__1"
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps([{"flags": {"env_id": "Bandit5-v0", "seed": 1}}]))
    row = {"iteration": 1, "env_steps": 1, "seconds": 1, "test/return_k0": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    compare.main(["runs/Bandit5-v0__rl2_ppo__1", "--after", "0", "--out", "x.png"])
    assert "| rl2_ppo | 1 | 1 | 1 | 1 | 1 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "x.png").is_file()
