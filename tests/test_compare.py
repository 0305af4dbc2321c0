"""tools/compare.py: groups, numbers and refusals, against runs made by hand."""

import json
import re
from statistics import mean

import numpy as np
import pytest
from PIL import Image

from algos import rl2_ppo
from tools import compare


def make_run(folder, seed=1, algorithm="rl2_ppo", ends=(1.0, 2.0), iterations=(10, 20), tasks=20, **flags):
    """A run whose test returns grow in proportion to the iteration, to `ends` at iteration 20."""
    told = "_".join(f"{name}-{x}" for name, x in flags.items())
    folder = folder / f"Bandit5-v0__{algorithm}__{seed}__{told}"
    folder.mkdir(parents=True)
    flags = {"env_id": "Bandit5-v0", "seed": seed, "resume": "", "cuda": seed > 1} | flags
    (folder / "args.json").write_text(json.dumps([{"flags": flags}]))
    rows = [{"iteration": 1, "env_steps": 5, "seconds": 0.5, "train/return_pre": 0.0}]
    for i in iterations:
        row = {"iteration": i, "env_steps": 1000 * i, "seconds": i / 2, "test/tasks": tasks}
        rows.append(row | {f"test/return_k{k}": i * x / 20 for k, x in enumerate(ends)})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def cells(text: str) -> list[list[str]]:
    return [re.split(r" \| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]


def compared(capsys, *words) -> list[list[str]]:
    compare.main([str(word) for word in words])
    return cells(capsys.readouterr().out)


def test_seeds_with_equal_flags_are_a_row_and_what_differs_names_it(tmp_path, capsys):
    runs = [make_run(tmp_path, seed, lr=lr, ends=(0, seed + lr)) for seed in (1, 2, 3) for lr in (0.5, 0.25)]
    runs.append(make_run(tmp_path, 1, "rl2_transformer_ppo", ends=(0, 9, 8)))
    head, *rows = compared(capsys, *runs, "--out", tmp_path / "x.png")
    assert head == [
        *("return on test tasks", "seeds", "iteration", "env steps", "seconds", "tasks"),
        *("after 0", "after 1", "after 2"),
    ]
    assert [row[:6] for row in rows] == [
        ["rl2_ppo --lr 0.5", "3", "20", "20,000", "10", "20"],
        ["rl2_ppo --lr 0.25", "3", "20", "20,000", "10", "20"],
        ["rl2_transformer_ppo", "1", "20", "20,000", "10", "20"],
    ]
    assert rows[2][6:] == ["0", "9", "8"]
    assert [compare.written("first_order", x) for x in (True, False)] == ["--first-order", "--no-first-order"]
    value, low, high = map(float, re.findall(r"[\d.]+", rows[0][7]))
    assert value == pytest.approx(mean(seed + 0.5 for seed in (1, 2, 3)))
    assert (low, high) == (1.5, 3.5)  # of three seeds: 1 of 27 resamples is three times the smallest one
    assert rows[0][8] == ""
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1100, 600)


def test_the_number_is_the_mean_of_the_middle_half(tmp_path, capsys):
    values = [1, 2, 30, 4, 5, 6, -70, 8]
    runs = [make_run(tmp_path, seed, ends=(0, x)) for seed, x in enumerate(values)]
    (row,) = compared(capsys, *runs, "--out", tmp_path / "x.png")[1:]
    assert float(row[7].split(" [")[0]) == pytest.approx(mean(sorted(values)[2:6]), rel=1e-3)
    generator = np.random.default_rng(0)
    drawn = np.sort(generator.choice(values, (20_000, 8)), 1)[:, 2:6].mean(1)
    low, high = map(float, re.findall(r"-?[\d.]+", row[7])[1:])
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1.5)


def test_seeds_that_went_on_longer_are_cut_to_what_all_have(tmp_path, capsys):
    runs = [make_run(tmp_path, 1, iterations=(10, 20, 40)), make_run(tmp_path, 2)]
    compare.main([*map(str, runs), "--out", str(tmp_path / "x.png")])
    told = capsys.readouterr()
    (row,) = cells(told.out)[1:]
    assert row[2:5] == ["20", "20,000", "10"]
    assert row[7] == "2 [2, 2]"
    assert told.err == f"{runs[0]}: only up to iteration 20, as far as its seeds go\n"


def test_what_is_drawn(tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(compare, "save", lambda figure, path: drawn.update(figure=figure, path=path))
    oracle = make_run(tmp_path, 1, "multitask_ppo", ends=(7, 0), task_given=True)
    runs = [make_run(tmp_path, 1, ends=(0, 2)), make_run(tmp_path, 2, ends=(1, 4)), oracle]
    for words, expected in (
        ([], {"rl2_ppo, after 1 (2 seeds)": [1.5, 3], "multitask_ppo, after 0 (1 seed)": [3.5, 7]}),
        (["--after", "0"], {"rl2_ppo, after 0 (2 seeds)": [0.25, 0.5], "multitask_ppo, after 0 (1 seed)": [3.5, 7]}),
    ):
        compare.main([*map(str, runs), *words])
        left, right = drawn["figure"].axes
        assert {line.get_label(): list(line.get_ydata()) for line in left.lines} == expected
        assert [list(line.get_xdata()) for line in left.lines] == [[10_000, 20_000]] * 2
        assert [list(line.get_xdata()) for line in right.lines] == [[5, 10]] * 2
    assert drawn["path"].name == "compare.png"


def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    untested = make_run(tmp_path, 2, iterations=())
    renamed = make_run(tmp_path, 3).rename(tmp_path / "renamed")
    no_flags = make_run(tmp_path, 4)
    (no_flags / "args.json").write_text('[{"flags": {}}]')
    other = make_run(tmp_path, 5, env_id="Bandit10-v0")
    again = make_run(tmp_path / "again", 1)
    apart = make_run(tmp_path, 6, iterations=(15,))
    older = make_run(tmp_path, 7)
    (older / "metrics.jsonl").write_text((older / "metrics.jsonl").read_text().replace('"test/tasks": 20, ', ""))
    for words, told in (
        ([], "usage: "),
        (["missing"], "missing: no such folder"),
        (["empty"], "empty: no run, it lacks a readable args.json or metrics.jsonl"),
        ([untested], "no evaluation in its metrics.jsonl yet"),
        ([renamed], "renamed: neither its name nor a checkpoint.pt says of which algorithm"),
        ([no_flags], "names no environment and seed"),
        ([run, other], "runs of two environments: Bandit5-v0 and Bandit10-v0"),
        ([run, again], "the same flags and seed; give one of them"),
        ([run, apart], "rl2_ppo: no iteration in which all its seeds were evaluated"),
        ([run, older], "these runs: some runs were tested on the fixed test tasks"),
        ([run, "--after", "3"], "--after 3: allowed is 0, 1"),
        ([run, "--out", "x"], "--out x: allowed is a name that ends in .png"),
    ):
        with pytest.raises(SystemExit) as stopped:
            compare.main([str(word) for word in words])
        assert told in str(stopped.value)
        assert "\n" not in str(stopped.value)
    assert not list(tmp_path.glob("*.png"))


def test_a_real_run_under_another_name_is_known_by_its_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rl2_ppo.main(["--iterations", "1", "--meta-batch-size", "8", "--episodes-per-trial", "3", "--hidden-size", "4"])
    (run,) = (tmp_path / "runs").iterdir()
    run.rename(tmp_path / "mine")
    capsys.readouterr()
    (row,) = compared(capsys, "mine")[1:]
    assert row[:3] == ["rl2_ppo", "1", "1"]
    last = json.loads((tmp_path / "mine/metrics.jsonl").read_text().splitlines()[-1])
    assert row[6:] == [f"{last[f'test/return_k{k}']:.4g}" for k in range(3)]
    assert (tmp_path / "compare.png").is_file()
