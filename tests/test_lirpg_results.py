"""benchmark/lirpg.py: the table and pictures of the docs come from what runs left and from the file's own functions."""

import gzip
import json

import pytest
import torch

from algos import lirpg
from benchmark import lirpg as study

SMALL = ["--env-id", "EmptyRooms-v0", "--num-worlds", "2", "--rollout-steps", "9", "--horizon", "6", "--no-normalize"]
SMALL += ["--epochs", "1", "--minibatches", "1", "--iterations", "3", "--eval-every", "1"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a tiny run: its folder."""
    monkeypatch.setattr(study, "IMAGES", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return lambda *flags: study.make_run([*SMALL, *flags])


def test_runs_are_kept_under_the_name_of_what_they_are(finished, capsys):
    # Other seeds, since folders are named by seed and second.
    folders = [finished(), finished("--seed", "4", *study.PPO), finished("--seed", "5", "--extrinsic-coef", "1")]
    study.main(["keep", *map(str, folders)])
    names = ["lirpg_seed1", "ppo_seed4", "both_seed5"]
    assert capsys.readouterr().out.split()[-3:] == [f"EmptyRooms_{name}" for name in names]
    for folder, name in zip(folders, names, strict=True):
        kept = study.RESULTS / f"EmptyRooms_{name}"
        metrics = gzip.decompress(kept.with_suffix(".metrics.jsonl.gz").read_bytes())
        assert metrics == (folder / "metrics.jsonl").read_bytes()
        assert kept.with_suffix(".args.json").read_bytes() == (folder / "args.json").read_bytes()
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["env_steps"], row["train/return_post"]) for row in rows if "train/return_post" in row]
    assert study.kept()["EmptyRooms"]["lirpg"] == [curve]
    assert set(study.kept()["EmptyRooms"]) == {"lirpg", "ppo", "both"}
    study.main(["curves", "--env-id", "EmptyRooms-v0"])
    assert (study.IMAGES / "lirpg_EmptyRooms.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match=r"--env-id AntForward-v0: nothing of that is kept"):
        study.main(["curves", "--env-id", "AntForward-v0"])
    with pytest.raises(SystemExit, match="keep: name folders of runs"):
        study.main(["keep"])


def test_settings_that_are_not_the_usual_ones_are_in_the_name():
    args = vars(lirpg.Args(env_id="HopperForward-v0"))
    assert study.label(args) == "lirpg"
    assert study.label(args | {"delay": 40, "minibatches": 32, "intrinsic_coef": 0.0}) == "ppo_delay40_minibatches32"
    assert study.label(args | {"intrinsic_coef": 0.0, "extrinsic_coef": 1.0, "live_bonus": 0.02}) == "bonus"
    assert study.label(args | {"live_bonus": 0.02}) == "lirpg_bonus"
    assert study.label(args | {"live_bonus": 0.02, "minibatches": 8}) == "lirpg_bonus_minibatches8"
    for name, flags in study.WAYS.items():  # what `mujoco` makes is kept under its own name, and has one in the legend
        given = study.tyro.cli(lirpg.Args, args=["--env-id", "HopperForward-v0", *flags])
        assert study.label(vars(given)) == name
        assert name in study.LABELS


def test_the_table_is_the_mean_of_the_last_fifth(monkeypatch, capsys):
    runs = [[(100 * i, float(i)) for i in range(1, 11)], [(100 * i, 1.0) for i in range(1, 11)]]
    monkeypatch.setattr(study, "kept", lambda: {"Hopper": {"lirpg": runs}})
    assert study.table(study.Options("table")) == {"Hopper": {"lirpg": [9.5, 1.0]}}  # of 9 and 10
    smooth = study.smoothed(runs[0], 3)
    assert smooth[0].tolist() == [100, 1.5]
    assert smooth[4].tolist() == [500, 5]


def test_the_learned_reward_is_drawn_where_it_is(finished, monkeypatch):
    """The picture's numbers are r_in of each cell's best action, seen as the policy saw the cell."""
    folder, drawn = finished(), []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, x, **_: drawn.append(x) or self.scatter(0, 0, c=0))
    study.main(["reward", str(folder)])
    assert (study.IMAGES / "lirpg_grid.png").stat().st_size > 1000
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    cell = torch.zeros(121)
    cell[2 * 11 + 3] = 1
    best = max(float(lirpg.intrinsic_reward(state["eta"], cell, torch.tensor(action))) for action in range(4))
    assert float(drawn[0][2, 3]) == pytest.approx(best, abs=1e-6)
    assert drawn[0][0, 5].isnan()  # a wall
