"""benchmark/headlines.toml is what its kept files say, and benchmark/headlines.py runs a row again and compares it."""

import gzip
import json
import math
import os
import re
import shlex
import signal
import subprocess
import threading
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tyro

from benchmark import headlines
from envs import records

pytestmark = pytest.mark.xdist_group("headlines")
ROOT = Path(__file__).resolve().parent.parent
ROWS = tomllib.loads((ROOT / "benchmark/headlines.toml").read_text())["row"]
KINDS = {"file": str, "name": str, "commands": list, "metrics": list, "figure": list, "interval": list, "seeds": list}
KINDS |= {"minutes": int | float, "paper": str, "commit": str, "kept": str}
TINY = "--env-id Navigation2D-v0 --action-scale 1 --meta-batch-size 3 --episodes-per-task 2 --horizon 5"
TINY += " --hidden-size 8 --eval-steps 1 --eval-every 1 --iterations 20"
TRAIN = f"python algos/maml_trpo.py {TINY} --seed SEED"
EVALUATE = "python algos/maml_trpo.py --evaluate RUN --episodes-per-task 4"


def each_row(function):
    return pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['file']} {row['name']}")(function)


def quantile(degrees: int) -> float:
    """Student's t, 0.975: where the density's integral from 0 on, by Simpson's rule, is 0.475."""
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)

    def integral(end: float, parts: int = 2000) -> float:
        weights = [1, *[4, 2] * (parts // 2 - 1), 4, 1]
        points = (end * k / parts for k in range(parts + 1))
        values = ((1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in points)
        return scale * end / parts / 3 * sum(w * y for w, y in zip(weights, values, strict=True))

    low, high = 0.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < 0.475 else (low, middle)
    return low


def last_line(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()).splitlines()[-1])


def kept_metrics(row: dict, seed: int) -> dict:
    if len(row["commands"]) > 1:
        return json.loads((ROOT / f"{row['kept']}_seed{seed}.evaluation.json").read_text())["metrics"]
    return last_line(ROOT / f"{row['kept']}_seed{seed}.metrics.jsonl.gz")


def recomputed(values: list[float]) -> tuple[float, float]:
    """The mean, and half of the prediction interval."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    return mean, quantile(n - 1) * math.sqrt(variance * (1 + 1 / n))


def parsed(row: dict) -> list:
    """What all flags are by a row's commands."""
    args = None
    found = []
    for command in row["commands"]:
        python, script, *words = shlex.split(command.replace("SEED", "7"))
        assert [python, script] == ["python", f"algos/{row['file']}.py"]
        args = tyro.cli(import_module(f"algos.{row['file']}").Args, args=words, default=args)
        records.fill_in(args)
        found.append(args)
    return found


# ---------------------------------------------------------------- the published rows


def test_rows_have_names_of_their_own_and_stand_beside_their_files():
    names = [(row["file"], row["name"]) for row in ROWS]
    assert len(set(names)) == len(names)
    assert len({row["kept"] for row in ROWS}) == len(ROWS)
    places = {headlines.home(row, 1) for row in headlines.read_rows()}
    assert len(places) == len(ROWS)
    files = [row["file"] for row in ROWS]
    assert files == sorted(files, key=files.index)
    assert {"maml_trpo", "promp", "reptile_ppo", "multitask_ppo"} <= set(files)


@each_row
def test_fields(row):
    assert set(row) == set(KINDS)
    assert all(isinstance(row[name], kind) for name, kind in KINDS.items())
    assert all(isinstance(x, str) for name in ("commands", "metrics") for x in row[name])
    assert len(row["commands"]) in (1, 2)
    assert (ROOT / f"algos/{row['file']}.py").exists()
    assert re.fullmatch(r"benchmark/results/\w+/\w+", row["kept"])
    assert row["seeds"] == sorted(set(row["seeds"]))
    assert all(isinstance(seed, int) for seed in row["seeds"])


@each_row
def test_every_command_is_one_of_the_file_and_its_last_line_has_the_metrics(row):
    first, *again = parsed(row)
    assert "--seed SEED" in row["commands"][0]
    assert first.seed == 7
    assert not first.resume
    assert not first.evaluate
    assert [args.evaluate for args in again] == ["RUN"] * len(again)
    steps = [int(re.fullmatch(r"test/return_k(\d+)", name)[1]) for name in row["metrics"]]
    assert steps == sorted(set(steps))
    last = (again or [first])[-1]
    assert max(steps) <= (last.eval_steps if hasattr(last, "eval_steps") else last.episodes_per_trial - 1)


@each_row
def test_figures_are_those_of_the_kept_files(row):
    if not row["seeds"]:
        assert (row["figure"], row["interval"], row["minutes"], row["commit"]) == ([], [], 0, "")
        return
    assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"])
    metrics = [kept_metrics(row, seed) for seed in row["seeds"]]
    assert len(row["figure"]) == len(row["metrics"])
    assert len(row["interval"]) == (len(row["metrics"]) if len(row["seeds"]) > 2 else 0)
    for i, name in enumerate(row["metrics"]):
        values = [seed[name] for seed in metrics]
        assert row["figure"][i] == pytest.approx(sum(values) / len(values), rel=6e-4)
        if row["interval"]:
            mean, half = recomputed(values)
            slack = 1e-3 * (abs(mean) + half)  # four digits are written, and t has five
            assert row["interval"][i] == pytest.approx([mean - half, mean + half], abs=slack)
    seconds = [last_line(ROOT / f"{row['kept']}_seed{seed}.metrics.jsonl.gz")["seconds"] for seed in row["seeds"]]
    assert row["minutes"] == pytest.approx(sum(seconds) / len(seconds) / 60, abs=0.51 if row["minutes"] > 9 else 0.051)


@each_row
def test_kept_files_are_of_the_rows_commands_and_none_is_left_out(row):
    first, *again = (vars(args) for args in parsed(row))
    free = {"seed", "resume", "evaluate", "capture_video", "track", "wandb_mode"}
    found = [re.search(r"_seed(\d+)\.", path.name) for path in ROOT.glob(f"{row['kept']}_seed*.metrics.jsonl.gz")]
    assert sorted(int(seed[1]) for seed in found) == row["seeds"]
    for seed in row["seeds"]:
        flags = json.loads((ROOT / f"{row['kept']}_seed{seed}.args.json").read_text())["args"]
        assert flags["seed"] == seed
        assert {name: flags[name] for name in flags.keys() - free} == {
            name: json.loads(json.dumps(first[name])) for name in flags.keys() - free
        }
        assert last_line(ROOT / f"{row['kept']}_seed{seed}.metrics.jsonl.gz")["iteration"] == first["iterations"]
        for wanted in again:
            record = json.loads((ROOT / f"{row['kept']}_seed{seed}.evaluation.json").read_text())
            flags = record["flags"]
            assert (record["iteration"], flags["seed"]) == (first["iterations"], seed)
            assert {name: flags[name] for name in flags.keys() - free} == {
                name: json.loads(json.dumps(wanted[name])) for name in flags.keys() - free
            }


def test_the_tables_in_the_readme_and_the_docs_are_up_to_date():
    for path, text in headlines.pages().items():
        assert path.read_text() == text, f"{path.name}: python benchmark/headlines.py tables"


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("n", [3, 5, 9])
def test_a_new_seed_is_inside_in_95_of_100_cases(n):
    trials = torch.randn(4000, n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.double) * 7 - 30
    inside = 0
    for *values, new in trials.tolist():
        low, high = headlines.prediction_interval(values)
        inside += low <= new <= high
    assert inside / 4000 == pytest.approx(0.95, abs=0.011)  # three standard errors


@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_the_interval_is_the_textbooks(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.double).tolist()
    mean, half = recomputed(values)
    assert headlines.prediction_interval(values) == pytest.approx([mean - half, mean + half], rel=1e-3)


def test_the_quantile_here_is_that_of_the_tables():
    assert [round(quantile(degrees), 3) for degrees in (2, 4, 9, 30)] == [4.303, 2.776, 2.262, 2.042]


# ---------------------------------------------------------------- a row, run again


def write(home: Path, **changed) -> None:
    """A headlines.toml with a measured row, and one that is not."""
    row = {"file": "maml_trpo", "name": "the point", "commands": [TRAIN, EVALUATE]}
    row |= {"metrics": ["test/return_k0", "test/return_k1"], "figure": [-3, -2.5], "interval": [[-1e6, 1e6]] * 2}
    row |= {
        "seeds": [8, 9, 10],
        "minutes": 0.1,
        "paper": "-40 / -11",
        "commit": "abcdef1",
        "kept": f"{home}/kept/point",
    }
    row |= changed
    other = row | {"name": "the point, in vain", "seeds": [], "figure": [], "interval": [], "kept": f"{home}/kept/none"}
    lines = ["# rows"]
    for fields in (row, other):
        lines += ["", "[[row]]", "# measured on a rainy day"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    (home / "headlines.toml").write_text("\n".join(lines) + "\n")


def settle(patch, home: Path) -> None:
    patch.setattr(headlines, "HEADLINES", home / "headlines.toml")
    patch.setattr(headlines, "RUNS", home / "runs")
    patch.setattr(headlines, "PAGES", home)


def main(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        headlines.main(list(words))
    return end.value.code


def rows_of(place: Path) -> list[dict]:
    (path,) = place.glob("runs/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def evaluated(place: Path) -> list[float]:
    (path,) = place.glob("runs/*/evaluation.json")
    metrics = json.loads(path.read_text())["metrics"]
    return [metrics["test/return_k0"], metrics["test/return_k1"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a row's run that nothing interrupted."""
    home = tmp_path_factory.mktemp("whole")
    write(home)
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, home)
        assert main("reproduce", "maml_trpo") == 0
    return home


@pytest.fixture
def done(whole, monkeypatch):
    """The same folder, in which nothing is trained or evaluated any more."""
    settle(monkeypatch, whole)
    write(whole)
    monkeypatch.setattr(headlines, "call", None)
    return whole


def test_a_row_is_trained_and_evaluated_by_its_commands(whole):
    place = whole / "runs/maml_trpo/the-point/1"
    assert len(rows_of(place)) == 20
    (path,) = place.glob("runs/*/args.json")
    (start,) = json.loads(path.read_text())
    assert (start["flags"]["seed"], start["flags"]["horizon"], start["flags"]["episodes_per_task"]) == (1, 5, 2)
    record = json.loads(path.with_name("evaluation.json").read_text())
    assert record["iteration"] == 20
    assert record["changed"] == {"episodes_per_task": [2, 4]}


def test_what_it_says(done, capsys):
    place = done / "runs/maml_trpo/the-point/1"
    assert main("reproduce", "maml_trpo") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "maml_trpo, the point, seed 1: about 0.1 minutes on one core of our machine"
    assert lines[1:3] == [f"    {TRAIN.replace('SEED', '1')}", f"    {EVALUATE}"]
    assert str(place) in lines[3]
    assert "trained already" in lines[4]
    table = [re.split(r"  +", line) for line in lines if line.startswith("test/return_k")]
    now = [f"{x:.4g}" for x in evaluated(place)]
    assert table[0] == ["test/return_k0", now[0], "-3", "-1e+06 to 1e+06", "inside"]
    assert table[1] == ["test/return_k1", now[1], "-2.5", "-1e+06 to 1e+06", "inside"]
    assert lines[-2:] == ["published: the mean of seeds 8, 9, 10, at commit abcdef1", "the paper: -40 / -11"]


@pytest.mark.parametrize("metric", [0, 1])
@pytest.mark.parametrize("side", [-1, 1])
def test_one_metric_outside_is_enough(done, metric, side, capsys):
    now = evaluated(done / "runs/maml_trpo/the-point/1")
    interval = [[x - 1, x + 1] for x in now]
    write(done, interval=interval)
    assert main("reproduce", "maml_trpo", "--row", "the point") == 0
    interval[metric] = [now[metric] + side * 0.01, now[metric] + side * 2]
    write(done, interval=[sorted(ends) for ends in interval])
    assert main("reproduce", "maml_trpo", "--row", "the point") == 1
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("test/")]
    assert verdicts == ["inside", "inside", *(["OUTSIDE", "inside"] if metric == 0 else ["inside", "OUTSIDE"])]


def test_without_an_interval_both_numbers_are_printed_and_nothing_is_judged(done, capsys):
    write(done, seeds=[8, 9], interval=[])
    assert main("reproduce", "maml_trpo") == 0
    text = capsys.readouterr().out
    assert re.search(r"^test/return_k0 +-\S+ +-3$", text, re.MULTILINE)
    assert "No interval: with fewer than 3 seeds" in text
    assert "inside" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reproduce"], "no headline of no file; there are some of maml_trpo"),
        (["reproduce", "mmaml"], "no headline of mmaml; there are some of maml_trpo"),
        (["reproduce", "maml_trpo", "--row", "x"], "maml_trpo has no headline x; it has the point, the point, in vain"),
        (["reproduce", "maml_trpo", "--row", "the point, in vain"], "the point, in vain: not measured yet"),
        (["reproduce", "maml_trpo", "--seed", "-1"], "--seed -1: allowed is 0 to"),
        (["keep", "maml_trpo", "--row", "the point, in vain"], "`reproduce` has no run of it; --runs names others"),
        (["keep", "maml_trpo", "--runs", "nowhere"], "nowhere is no folder of a run"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(done, words, message, capsys):
    assert main(*words) == 2
    assert message in capsys.readouterr().err


def test_a_run_by_other_flags_is_refused(done, capsys):
    other = [TRAIN.replace("--horizon 5", "--horizon 6"), EVALUATE]
    write(done, commands=other)
    assert main("reproduce", "maml_trpo") == 2
    assert "not a run of this row, it has horizon 5 and not 6; remove it" in capsys.readouterr().err
    assert main("keep", "maml_trpo") == 2
    assert "it has horizon 5 and not 6" in capsys.readouterr().err
    write(done, commands=[TRAIN, EVALUATE.replace("4", "3")])  # the evaluation that is there has four episodes
    assert main("keep", "maml_trpo") == 2
    assert "not evaluated; python algos/maml_trpo.py --evaluate" in capsys.readouterr().err


def test_a_second_process_is_refused(done, capsys):
    place = done / "runs/maml_trpo/the-point/1"
    with open(place / "lock", "a") as lock:
        headlines.fcntl.flock(lock, headlines.fcntl.LOCK_EX)
        assert main("reproduce", "maml_trpo") == 2
    assert "another process works there" in capsys.readouterr().err


def when_played(place: Path, iterations: int, act) -> None:
    """Act when a run has played more iterations than that; also after a minute, so that nothing waits forever."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        paths = list(place.glob("runs/*/metrics.jsonl"))
        if paths and len(paths[0].read_text().splitlines()) > iterations:
            break
        time.sleep(0.005)
    act()


def test_a_run_goes_on_after_ctrl_c_and_after_a_kill_to_the_same_end(whole, tmp_path, monkeypatch, capfd):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def reproduce_and(act, after: int) -> int:
        thread = threading.Thread(target=when_played, args=(place, after, act))
        thread.start()
        code = main("reproduce", "maml_trpo")
        thread.join()
        return code

    monkeypatch.setattr(subprocess, "Popen", Popen)
    settle(monkeypatch, tmp_path)
    write(tmp_path, commands=[TRAIN])
    place = tmp_path / "runs/maml_trpo/the-point/1"
    assert reproduce_and(lambda: os.kill(os.getpid(), signal.SIGINT), after=2) == 3
    assert "stopped; the same command goes on" in capfd.readouterr().err
    stopped = len(rows_of(place))
    assert 2 < stopped < 20

    assert reproduce_and(lambda: started[-1].kill(), after=stopped + 2) == 3
    said = capfd.readouterr().err
    assert f"goes on after iteration {stopped}" in said  # the run's own output
    assert "exit status -9: " in said
    assert stopped + 2 < len(rows_of(place)) < 20

    assert main("reproduce", "maml_trpo") == 0
    assert len(started) == 3
    assert rows_of(place) == rows_of(whole / "runs/maml_trpo/the-point/1")
    shown = [line.split()[1] for line in capfd.readouterr().out.splitlines() if line.startswith("test/return_k")]
    last = rows_of(place)[-1]
    assert shown == [f"{last[name]:.4g}" for name in ("test/return_k0", "test/return_k1")]


def test_a_failing_run_is_no_figure(tmp_path, monkeypatch, capfd):
    write(tmp_path, commands=[TRAIN.replace("Navigation2D-v0", "Navigation3D-v0"), EVALUATE])
    settle(monkeypatch, tmp_path)
    assert main("reproduce", "maml_trpo") == 3
    assert "exit status 1: " in capfd.readouterr().err


# ---------------------------------------------------------------- what is kept, and the tables of it


def fake(home: Path, seed: int, returns: list[float], seconds: float) -> None:
    """Kept files of a seed of the point: training's last line, and an evaluation with other numbers."""
    (home / "kept").mkdir(exist_ok=True)
    fields = vars(tyro.cli(import_module("algos.maml_trpo").Args, args=[*shlex.split(TINY), "--seed", str(seed)]))
    name = f"{home}/kept/point_seed{seed}"
    Path(f"{name}.args.json").write_text(json.dumps({"args": fields}))
    lines = [{"iteration": k, "seconds": seconds * k / 20, "test/return_k0": -99} for k in (1, 20)]
    packed = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    Path(f"{name}.metrics.jsonl.gz").write_bytes(packed)
    metrics = {f"test/return_k{k}": value for k, value in enumerate(returns)}
    record = {"iteration": 20, "flags": fields | {"episodes_per_task": 4}, "metrics": metrics}
    Path(f"{name}.evaluation.json").write_text(json.dumps(record))


def test_update_writes_what_follows_from_the_kept_files_and_nothing_else(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path)
    write(tmp_path)
    before = (tmp_path / "headlines.toml").read_text()
    for seed, returns, seconds in ((1, [-40, -11], 60), (2, [-42, -12], 120), (10, [-44, -16], 120)):
        fake(tmp_path, seed, returns, seconds)
    assert main("update") == 0
    text = (tmp_path / "headlines.toml").read_text()
    row, other = tomllib.loads(text)["row"]
    assert row["seeds"] == [1, 2, 10]
    assert row["figure"] == [-42, -13]
    low, high = row["interval"][0]  # s = 2, t = 4.303, sqrt(4 / 3)
    assert (low, high) == pytest.approx((-42 - 9.937, -42 + 9.937), abs=0.006)
    assert row["minutes"] == 1.7
    assert (other["seeds"], other["figure"], other["interval"], other["minutes"]) == ([], [], [], 0)
    names = "figure", "interval", "seeds", "minutes"

    def rest(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(names)]

    assert rest(text) == rest(before)
    assert text.count("# measured on a rainy day") == 2
    assert main("update") == 0
    assert (tmp_path / "headlines.toml").read_text() == text


def test_two_seeds_have_no_interval_and_seeds_of_other_flags_do_not_count(tmp_path, monkeypatch, capsys):
    settle(monkeypatch, tmp_path)
    for seed in (1, 2, 3):
        fake(tmp_path, seed, [-40.0 - seed, -11.0], 900)
    path = tmp_path / "kept/point_seed2.args.json"
    path.write_text(path.read_text().replace('"horizon": 5', '"horizon": 6'))
    write(tmp_path)
    assert main("update") == 0
    row = tomllib.loads((tmp_path / "headlines.toml").read_text())["row"][0]
    assert (row["seeds"], row["figure"], row["interval"], row["minutes"]) == ([1, 3], [-42, -11], [], 15)
    assert "point_seed2.args.json is left out, it has horizon 6 and not 5" in capsys.readouterr().out


def test_what_is_kept_of_a_run_is_what_it_wrote(done, capsys):
    assert main("keep", "maml_trpo") == 0
    assert main("update") == 0
    place = done / "runs/maml_trpo/the-point/1"
    (folder,) = place.glob("runs/*")
    name = f"{done}/kept/point_seed1"
    assert gzip.decompress(Path(f"{name}.metrics.jsonl.gz").read_bytes()) == (folder / "metrics.jsonl").read_bytes()
    assert Path(f"{name}.evaluation.json").read_bytes() == (folder / "evaluation.json").read_bytes()
    record = json.loads(Path(f"{name}.args.json").read_text())
    assert record["command"] == f"OMP_NUM_THREADS=1 python algos/maml_trpo.py {TINY} --seed 1"
    assert (record["tests"], record["args"]["horizon"]) == ("fixed", 5)
    row = tomllib.loads((done / "headlines.toml").read_text())["row"][0]
    assert row["figure"] == [float(f"{x:.4g}") for x in evaluated(place)]
    assert (row["seeds"], row["interval"]) == ([1], [])
    assert main("reproduce", "maml_trpo") == 0
    then = " / ".join(f"{x:.4g}" for x in evaluated(place))
    assert f"seed 1 had {then}" in capsys.readouterr().out
    about = Path(f"{name}.args.json")
    about.write_text(about.read_text().replace('"horizon": 5', '"horizon": 6'))
    assert main("keep", "maml_trpo") == 2
    assert "another result, it has horizon 6 and not 5" in capsys.readouterr().err


PAGE = "# Title\n\n<!-- {} -->\nold\n<!-- /headlines -->\n\nText.\n"


def test_tables_have_the_measured_rows_the_readmes_the_first_of_each_file(tmp_path, monkeypatch, capsys):
    settle(monkeypatch, tmp_path)
    rows = [
        headlines.Row(
            "maml_trpo",
            "point",
            [TRAIN, EVALUATE],
            ["test/return_k0", "test/return_k3"],
            [-42, -13.5],
            [[-44, -40], [-15.25, -11]],
            [1, 2, 3],
            1.7,
            "-40 / -3",
            "abcdef1",
            "",
        ),
        headlines.Row("maml_trpo", "unmeasured", [TRAIN], ["test/return_k0"], [], [], [], 0, "", "", ""),
        headlines.Row("maml_trpo", "short", [TRAIN], ["test/return_k1"], [7], [], [1], 12, "", "abcdef2", ""),
        headlines.Row("promp", "unmeasured", [TRAIN], ["test/return_k0"], [], [], [], 0, "", "", ""),
    ]
    monkeypatch.setattr(headlines, "read_rows", lambda: rows)
    (tmp_path / "docs").mkdir()
    paths = {"headlines": tmp_path / "README.md"}
    paths |= {f"headlines: {name}": tmp_path / f"docs/{name}.md" for name in ("maml_trpo", "promp")}
    for mark, path in paths.items():
        path.write_text(PAGE.format(mark))
    assert main("tables") == 0
    readme, maml, promp = (path.read_text() for path in paths.values())
    assert [line for line in readme.splitlines() if line.startswith("|")] == [
        "| file | run | after 0 | after 3 | seeds | minutes | the paper |",
        "|---|---|---|---|---|---|---|",
        "| [`maml_trpo`](docs/maml_trpo.md) | point | -42 (-44 to -40) | -13.5 (-15.25 to -11) | 3 | 1.7 | -40 / -3 |",
    ]
    assert [line for line in maml.splitlines() if line.startswith("|")][2:] == [
        "| point | -42 (-44 to -40) |  | -13.5 (-15.25 to -11) | 3 | 1.7 | -40 / -3 |",
        "| short |  | 7 |  | 1 | 12 |  |",
    ]
    block = re.search(r"```\n(.*?)```", maml, re.DOTALL)[1]
    assert block.startswith("# point: SEED 1, 2, 3, at commit abcdef1\npython algos/maml_trpo.py ")
    joined = block.replace(" \\\n    ", " ").splitlines()
    assert joined == [
        "# point: SEED 1, 2, 3, at commit abcdef1",
        TRAIN,
        EVALUATE,
        "# short: SEED 1, at commit abcdef2",
        TRAIN,
    ]
    assert all(len(line) <= 120 for line in block.splitlines())
    assert promp == PAGE.format("headlines: promp").replace("old\n", "")
    for text in (readme, maml):
        assert text.startswith("# Title\n\n<!-- headlines")
        assert text.endswith("\n<!-- /headlines -->\n\nText.\n")
        assert "old" not in text
    capsys.readouterr()
    assert main("tables") == 0
    assert capsys.readouterr().out == ""  # nothing to write any more
    (tmp_path / "README.md").write_text("no marks\n")
    assert main("tables") == 2
