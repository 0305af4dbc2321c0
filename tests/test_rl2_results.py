"""benchmark/rl2.py: the tables and pictures of the docs come from what runs left and from the files' own functions."""

import json

import pytest
import torch

from algos import rl2_ppo, rl2_transformer_ppo
from benchmark import classic_bandits, rl2
from envs import Trials, make, records
from envs.mouse_cheese import MouseCheese, shortest_path

SMALL = ["--meta-batch-size", "20", "--iterations", "2", "--hidden-size", "16", "--epochs", "1"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a tiny run of a file: its folder."""
    monkeypatch.setattr(rl2, "IMAGES", tmp_path)
    monkeypatch.setattr(rl2, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)

    def run(module, *flags):
        module.main([*SMALL, *flags])
        return max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    return run


def test_a_line_gives_the_reward_on_new_problems_beside_gittins_and_the_paper(finished):
    folder = finished(rl2_ppo, "--env-id", "Bandit5-v0")
    line = rl2.line(folder, rl2.Options("table", (folder,), tasks=40, seed=3))
    args = rl2_ppo.Args(meta_batch_size=40, hidden_size=16, horizon=1)
    state = records.load_checkpoint(str(folder), "rl2_ppo", rl2_ppo.Args)
    envs, generator = Trials(make("Bandit5-v0", 40, 1, discrete=True), 10), torch.Generator().manual_seed(3)
    tasks_NP = envs.unwrapped.sample_tasks(40, generator, "test")
    _, return_NE = rl2_ppo.play_trials(envs, tasks_NP, state["theta"], args, generator)
    assert line["reward"][0] == pytest.approx(float(return_NE.sum(1).mean()), abs=1e-3)
    assert line["episodes"] == pytest.approx(return_NE.mean(0).tolist(), abs=1e-3)
    assert line["gittins"][0] > line["reward"][0]
    assert line["difference"][0] == pytest.approx(line["reward"][0] - line["gittins"][0], abs=2e-3)
    assert (line["paper"]["rl2"], line["paper"]["gittins"]) == (6.7, 6.6)
    assert (line["tasks"], line["env_steps"], line["iterations"]) == (40, 400, 2)


def test_kept_results_are_the_line_and_what_the_run_wrote(finished, capsys):
    folder = finished(rl2_ppo, "--env-id", "TabularMDP-v0", "--episodes-per-trial", "25", "--horizon", "10")
    rl2.keep(options := rl2.Options("keep", (folder,), tasks=20))
    results = folder.parent.parent / "results"
    assert json.loads((results / "TabularMDP_25x10_gru_seed1.json").read_text()) == rl2.line(folder, options)
    assert (results / "TabularMDP_25x10_gru_seed1.args.json").read_bytes() == (folder / "args.json").read_bytes()
    with rl2.gzip.open(results / "TabularMDP_25x10_gru_seed1.metrics.jsonl.gz") as file:
        assert file.read() == (folder / "metrics.jsonl").read_bytes()
    assert json.loads(capsys.readouterr().out.splitlines()[-1].split(" ", 1)[1])["paper"]["tabula_psrl"] == 408.8


def test_steps_of_the_mouse_are_those_of_the_environment(finished):
    folder = finished(rl2_transformer_ppo, "--env-id", "MouseCheese-v0", "--episodes-per-trial", "3", "--horizon", "9")
    ((tasks_NP, steps, return_NE),) = rl2.played(folder, 30, 1)
    line = rl2.line(folder, rl2.Options("table", (folder,), tasks=30, seed=1))
    counts = torch.zeros(30, 3)
    for i in range(30):  # every trial again, alone
        envs = Trials(MouseCheese(1, max_episode_steps=9), 3)
        envs.reset(options={"tasks": tasks_NP[i : i + 1]})
        for action in steps.action[i][steps.mask[i] > 0]:
            *_, info = envs.step(action[None])
            counts[i, info["episode"]] += 1
        assert envs.is_over
    assert line["steps"] == pytest.approx(counts.mean(0).tolist(), abs=0.01)
    assert line["found"] == pytest.approx((return_NE > 0).float().mean(0).tolist(), abs=1e-3)
    assert line["shortest"] == pytest.approx(shortest_path(tasks_NP).float().mean().item())


def test_what_cannot_be_shown_is_one_line(finished, tmp_path):
    folder = finished(rl2_ppo, "--env-id", "TabularMDP-v0")
    for what, message in (("regret", "is a run on TabularMDP-v0"), ("mouse", "is of MouseCheese-v0")):
        with pytest.raises(SystemExit, match=message):
            getattr(rl2, what)(rl2.Options(what, (folder,)))
    with pytest.raises(SystemExit, match="--tasks 1500: allowed is"):
        rl2.table(rl2.Options("table", (folder,), tasks=1500))
    with pytest.raises(SystemExit, match="is no folder of a run"):
        rl2.table(rl2.Options("table", (tmp_path,)))


def test_the_pictures_are_drawn(finished, tmp_path):
    bandits = finished(rl2_ppo, "--env-id", "Bandit5-v0")
    maze = finished(rl2_ppo, "--env-id", "MouseCheese-v0", "--episodes-per-trial", "2", "--horizon", "30")
    for what, runs in (("regret", (bandits,)), ("curves", (bandits,)), ("mouse", (maze,))):
        getattr(rl2, what)(rl2.Options(what, runs, tasks=40))
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"rl2_regret_5_10.png", "rl2_curves_Bandit5.png", "rl2_mouse.png"}


def test_play_and_run_of_a_classic_policy_are_the_same_trial():
    p_BK = torch.rand(500, 4, generator=torch.Generator().manual_seed(1))
    arm_BS, total_B = classic_bandits.play(classic_bandits.greedy, p_BK, 30, torch.Generator().manual_seed(2))
    again_B = classic_bandits.run(classic_bandits.greedy, p_BK, 30, torch.Generator().manual_seed(2))
    assert torch.equal(total_B, again_B)
    expected = p_BK.gather(1, arm_BS).sum(1).mean()
    assert total_B.mean() == pytest.approx(expected, abs=0.5)  # the arms are those that paid
