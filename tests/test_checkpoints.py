"""checkpoints/: each one is asked again as the README says, and says what it said when it was kept."""

import importlib
import json
import re
import shutil
import subprocess
from statistics import fmean

import pytest
import torch

from tools import keep_checkpoint
from tools.keep_checkpoint import CHECKPOINTS, ROOT

FOLDERS = sorted(path.name for path in CHECKPOINTS.iterdir() if (path / "checkpoint.pt").is_file())
README = (ROOT / "README.md").read_text()


def evaluated(name: str, folder, capsys) -> tuple[dict, str]:
    """Metrics of a copy of the checkpoint, and the table on the screen."""
    shutil.copytree(CHECKPOINTS / name, folder, ignore=shutil.ignore_patterns("evaluation*"))
    algorithm = torch.load(folder / "checkpoint.pt", weights_only=True)["algorithm"]
    importlib.import_module(f"algos.{algorithm}").main(["--evaluate", str(folder)])
    return json.loads((folder / "evaluation.json").read_text())["metrics"], capsys.readouterr().out


def steps(metrics: dict) -> list[float]:
    return [x for name, x in metrics.items() if re.fullmatch(r"test/\w+_k\d+", name)]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_says_what_it_said(name, tmp_path, capsys):
    metrics, told = evaluated(name, tmp_path / name, capsys)
    expected = json.loads((CHECKPOINTS / name / "expected.json").read_text())["metrics"]
    assert metrics.keys() == expected.keys()
    now, then = steps(metrics), steps(expected)
    assert len(now) > 1
    gain = max(then) - min(then)
    # Kernels of another build or machine round differently, which chaos in physics makes larger.
    assert now == pytest.approx(then, abs=0.2 * gain)
    if name != "multitask_ppo":  # the oracle, which is told the task
        better = -1 if any(key.startswith("test/loss") for key in metrics) else 1
        part = max(1, len(now) // 4)  # single pulls of bandits are noisy
        assert better * (fmean(now[-part:]) - now[0]) > 0.3 * gain
    assert f"iteration {json.loads((CHECKPOINTS / name / 'metrics.jsonl').read_text())['iteration']:}" in told


def test_they_are_small_and_hold_no_more_than_is_needed():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and "evaluation" not in path.name]
    assert sum(path.stat().st_size for path in files) < 10e6
    for name in FOLDERS:
        kept = {path.name for path in (CHECKPOINTS / name).iterdir() if not path.name.startswith("evaluation")}
        assert kept == {"args.json", "checkpoint.pt", "expected.json", "metrics.jsonl"}
        state = torch.load(CHECKPOINTS / name / "checkpoint.pt", weights_only=True)
        assert not {"optimizer", "generator", "worlds", "replay", "recent", "target"} & state.keys()
        entries = json.loads((CHECKPOINTS / name / "args.json").read_text())
        flags = json.loads(json.dumps(state["args"]))
        assert entries[-1]["flags"] == {flag: x for flag, x in flags.items() if flag in entries[-1]["flags"]}


def test_evaluations_there_are_not_committed():
    for name in ("evaluation.json", "evaluation-2.png", "adaptation.gif"):
        path = CHECKPOINTS / "maml_trpo" / name
        assert subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=ROOT).returncode == 0
    path = CHECKPOINTS / "maml_trpo/checkpoint.pt"
    assert subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=ROOT).returncode == 1


def test_the_readme_names_each_and_prints_what_they_say():
    section = README[README.index("## See adaptation in ten seconds") :].partition("\n## ")[0]
    for name in FOLDERS:
        algorithm = torch.load(CHECKPOINTS / name / "checkpoint.pt", weights_only=True)["algorithm"]
        assert f"python algos/{algorithm}.py --evaluate checkpoints/{name} " in f"{section.replace(chr(10), ' ')} ", (
            name
        )
    then = json.loads((CHECKPOINTS / "maml_trpo/expected.json").read_text())["metrics"]
    for k in range(4):
        assert re.search(rf"^{k} +{then[f'test/return_k{k}']:.4g} ", section, re.MULTILINE)


def test_a_kept_checkpoint_cannot_be_trained_further(tmp_path):
    from algos import maml

    shutil.copytree(CHECKPOINTS / "maml", tmp_path / "maml")
    with pytest.raises(SystemExit, match="it is one to evaluate, without what training goes on with"):
        maml.main(["--resume", str(tmp_path / "maml")])


def test_keeping_a_run(tmp_path, monkeypatch, capsys):
    """Of a run with an optimiser what is needed is kept, with the flags that it is to be asked with."""
    from algos import maml

    monkeypatch.chdir(tmp_path)
    maml.main(["--iterations", "2", "--eval-tasks", "20", "--eval-steps", "2", "--meta-batch-size", "4"])
    (run,) = (tmp_path / "runs").iterdir()
    monkeypatch.setattr(keep_checkpoint, "CHECKPOINTS", tmp_path / "kept")
    keep_checkpoint.main([str(run), "mine", "--eval-tasks", "10"])
    kept = tmp_path / "kept/mine"
    whole, part = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (run, kept))
    assert all(torch.equal(whole["theta"][name], x) for name, x in part["theta"].items())
    assert (whole["args"]["eval_tasks"], part["args"]["eval_tasks"]) == (20, 10)
    first, last = json.loads((kept / "args.json").read_text())
    assert first["flags"]["eval_tasks"] == 20
    assert last["notes"] == ["changed, to be evaluated quickly: --eval-tasks 10 in place of 20"]
    maml.main(["--evaluate", str(run), "--eval-tasks", "10"])
    by_run = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert json.loads((kept / "expected.json").read_text())["metrics"] == by_run
    assert (kept / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text().splitlines(keepends=True)[-1]
    for wrong, told in ((tmp_path / "kept", "no run"), (tmp_path / "nowhere", "no run")):
        with pytest.raises(SystemExit, match=told):
            keep_checkpoint.main([str(wrong), "other"])
    assert not (tmp_path / "kept/other").exists()
