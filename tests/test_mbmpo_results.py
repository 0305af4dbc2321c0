"""benchmark/mbmpo.py: the table and pictures of the docs come from what runs left and from the file's own functions."""

import gzip
import json
from math import inf

import numpy as np
import pytest
import torch

from algos import mbmpo, multitask_ppo
from benchmark import mbmpo as study
from envs import make

SMALL = ["--env-id", "Navigation2D-v0", "--num-models", "3", "--real-episodes", "2", "--episodes-per-task", "2"]
SMALL += ["--horizon", "8", "--hidden-size", "8", "--model-size", "16", "--meta-steps", "1", "--iterations", "3"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a tiny run of a file: its folder."""
    monkeypatch.setattr(study, "IMAGES", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)

    def run(module=mbmpo, flags=SMALL):
        module.main(list(flags))
        return max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    return run


def test_runs_are_kept_under_the_name_of_what_they_are(finished, capsys):
    folders = [finished(), finished(flags=[*SMALL, "--inner-lr", "0", "--seed", "4"])]
    yardstick = ["--env-id", "Navigation2D-v0", "--meta-batch-size", "1", "--iterations", "2", "--horizon", "8"]
    folders.append(finished(multitask_ppo, yardstick))
    study.main(["keep", *map(str, folders)])
    names = ["mbmpo_seed1", "ensemble_seed4", "multitask_ppo_seed1"]
    assert capsys.readouterr().out.split()[-3:] == [f"Navigation2D_{name}" for name in names]
    for folder, name in zip(folders, names, strict=True):
        kept = study.RESULTS / f"Navigation2D_{name}"
        assert gzip.decompress(kept.with_suffix(".metrics.jsonl.gz").read_bytes()) == (
            (folder / "metrics.jsonl").read_bytes()
        )
        assert kept.with_suffix(".args.json").read_bytes() == (folder / "args.json").read_bytes()
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    curves = study.kept("Navigation2D")
    assert curves["mbmpo"] == [[(row["env_steps"], row["test/return_k1"]) for row in rows]]
    assert set(curves) == {"mbmpo", "ensemble", "multitask_ppo"}
    study.main(["curves", "--env-id", "Navigation2D-v0"])
    assert (study.IMAGES / "mbmpo_Navigation2D.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match=r"--env-id AntForward-v0: nothing of that is kept"):
        study.main(["table", "--env-id", "AntForward-v0"])


def test_means_are_not_of_two_kinds_of_tests(finished):
    study.main(["keep", str(finished()), str(finished(flags=[*SMALL, "--seed", "4"]))])
    assert len(study.kept("Navigation2D")["mbmpo"]) == 2
    older = study.RESULTS / "Navigation2D_mbmpo_seed4.args.json"
    older.write_text(json.dumps(json.loads(older.read_text())[-1]["flags"]))
    with pytest.raises(SystemExit, match=r"^Navigation2D mbmpo: only the newer runs' tests"):
        study.main(["table", "--env-id", "Navigation2D-v0"])


def test_the_table_against_a_slow_version(finished, monkeypatch):
    runs = {"mbmpo": [[(1000 * i, 10.0 * i) for i in range(1, 101)]], "trpo": [[(4000 * i, i) for i in range(1, 401)]]}
    monkeypatch.setattr(study, "kept", lambda env: runs)
    result = study.table(study.Options("table"))
    assert result["mbmpo"][40_000] == [400]  # a straight line stays one when it is smoothed, but at its ends
    assert 400_000 not in result["mbmpo"]
    assert result["trpo"][400_000] == [100]
    assert result["mbmpo"]["last five"] == [(100_000, 980)]  # 960, 970, .. 1000
    assert result["mbmpo"]["steps to"][300] == [30_000]
    assert result["trpo"]["steps to"][300] == [1_200_000]
    assert result["trpo"]["steps to"][500] == [inf]


def test_smoothing_is_a_mean_of_neighbours():
    run = [(i, float(value)) for i, value in enumerate(np.random.default_rng(0).normal(size=9))]
    smoothed = study.smooth(run, 5)
    assert smoothed[4, 1] == pytest.approx(sum(value for _, value in run[2:7]) / 5)
    assert smoothed[0, 1] == pytest.approx((3 * run[0][1] + run[1][1] + run[2][1]) / 5)
    assert smoothed[:, 0].tolist() == list(range(9))


def test_models_replay_real_episodes(finished, capsys):
    """The open-loop replay equals predictions made one world at a time; a converged model's error is small."""
    folder = finished(flags=[*SMALL, "--model-epochs", "40", "--model-batch-size", "20"])
    learned = study.Learned(folder, study.Options("error", (folder,), episodes=4, seed=3))
    obs, actions, mask = learned.episodes(uniform=True)
    assert obs.shape == (4, 9, 2)
    assert mask.all()
    executed = actions.div(10).clamp(-1, 1) * 0.1  # --action-scale 10, bounds of +-0.1
    torch.testing.assert_close(obs[:, 1:], obs[:, :-1] + executed)
    with torch.no_grad():
        imagined = learned.replay(obs, actions)
    for model in range(3):
        alone = {name: x[model : model + 1] for name, x in learned.models.items()}
        for world in range(4):
            place = obs[world, :1]
            for t in range(8):
                place = mbmpo.predict(alone, learned.scales, place, executed[world, t][None])
                torch.testing.assert_close(imagined[model, world, t + 1], place[0], atol=1e-5, rtol=1e-4)
    study.main(["error", str(folder), "--episodes", "4"])
    study.main(["disagreement", str(folder)])
    shown = capsys.readouterr().out
    assert '"episodes": "uniform actions"' in shown
    assert "oldest first" in shown
    assert all((study.IMAGES / f"mbmpo_{name}.png").stat().st_size > 1000 for name in ("error", "disagreement"))


def test_the_policys_episodes_are_real(finished):
    folder = finished()
    learned = study.Learned(folder, study.Options("error", (folder,), episodes=5, seed=3))
    obs, actions, _ = learned.episodes(uniform=False)
    envs = make("Navigation2D-v0", 5, 8, False, 10.0)
    first, _ = envs.reset(seed=0, options={"tasks": learned.task_1P.expand(5, -1)})
    torch.testing.assert_close(first, obs[:, 0])
    for t in range(8):
        torch.testing.assert_close(envs.step(actions[:, t])[0], obs[:, t + 1])
    mean, std = mbmpo.policy(learned.theta, obs[:, :-1])
    assert ((actions - mean) / std).abs().max() < 5  # drawn from the policy
    assert ((actions - mean) / std).std() == pytest.approx(1, abs=0.4)


def test_trpo_is_a_run_that_learns(finished):
    study.main(["trpo", "--env-id", "Navigation2DEndless-v0", "--iterations", "8", "--seed", "3"])
    (folder,) = (study.Path("runs")).iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [4000 * k for k in range(1, 9)]
    assert rows[-1]["train/return_post"] > rows[0]["train/return_post"] + 3
    study.main(["keep", str(folder)])
    assert [path.name for path in study.RESULTS.glob("*.gz")] == ["Navigation2DEndless_trpo_seed3.metrics.jsonl.gz"]


def test_wrong_input_is_one_line(finished):
    other = finished(multitask_ppo, ["--env-id", "Navigation2D-v0", "--iterations", "1", "--horizon", "8"])
    with pytest.raises(SystemExit, match=r"a run of algos\.multitask_ppo, not of mbmpo"):
        study.main(["error", str(other)])
    with pytest.raises(SystemExit, match="no folder of a run"):
        study.main(["keep", "nowhere"])
    with pytest.raises(SystemExit, match="keep: name folders of runs"):
        study.main(["keep"])
