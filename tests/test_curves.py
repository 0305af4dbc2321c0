"""benchmark/curves.py: runs start, stop and go on as it says; pictures and tables are of what they wrote."""

import fcntl
import gzip
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import threading
import time
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import tyro

from algos import maml_trpo
from benchmark import curves
from envs import records

pytestmark = pytest.mark.xdist_group("curves")
POINT = "--action-scale 1 --meta-batch-size 3 --episodes-per-task 2 --horizon 5 --hidden-size 8 --eval-every 2"
POINT += " --eval-steps 2 --iterations 30"
MEMORY = "--meta-batch-size 3 --episodes-per-trial 3 --horizon 5 --hidden-size 16 --minibatches 2 --eval-every 2"
MEMORY += " --iterations 30"
TABLE = {
    "point": curves.Row("maml_trpo", {"Navigation2D": POINT}, "--first-order"),
    "memory": curves.Row("rl2_ppo", {"Navigation2D": MEMORY, "SparseNavigation2D": MEMORY}),
}
CURVES = {
    "before": curves.Curve("point", "test/return_k0"),  # two curves of one run
    "after": curves.Curve("point", "test/return_k1"),
    "third": curves.Curve("memory", "test/return_k2"),
}
POINT_JOB = curves.Job("Navigation2D", "point", 1)


def settle(patch, home):
    """A small table, and all folders below `home`."""
    for name in ("RUNS", "RESULTS", "IMAGES"):
        patch.setattr(curves, name, home / name.lower())
    for name, value in (("TABLE", TABLE), ("CURVES", CURVES), ("ENVS", ("Navigation2D", "SparseNavigation2D"))):
        patch.setattr(curves, name, value)


@pytest.fixture
def home(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two runs that nothing interrupted."""
    home = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, home)
        curves.main(["run", "--env", "Navigation2D", "--seeds", "1", "--jobs", "2"])
    return home


@pytest.fixture
def done(whole, monkeypatch):
    settle(monkeypatch, whole)
    return whole


def rows(job) -> list[dict]:
    lines = [json.loads(line) for line in (job.folder() / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in lines]


def snapshot(folder) -> dict:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def fake(job, evaluations: list[dict], **other) -> None:
    """A finished run's folder, with these numbers."""
    folder = job.home / "runs/made_up"
    folder.mkdir(parents=True)
    args = vars(tyro.cli(import_module(f"algos.{TABLE[job.label].script}").Args, args=job.flags)) | other
    (folder / "args.json").write_text(json.dumps([{"flags": args}]))
    lines = [{"iteration": i, "train/kl": 0.1} | row for i, row in enumerate(evaluations)]
    lines += [{"iteration": args["iterations"] - 1, "train/kl": 0.2}, lines.pop() | {"iteration": args["iterations"]}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluation(steps, seconds, *returns) -> dict:
    returns = {f"test/return_k{k}": value for k, value in enumerate(returns)}
    return {"env_steps": steps, "seconds": seconds} | returns | {"test/tasks": 3}


# ---------------------------------------------------------------- the table


def test_the_published_table_is_sound():
    for job in curves.jobs(curves.Options("run")):  # every flag is one of the script's, every column one it writes
        args = tyro.cli(import_module(f"algos.{curves.TABLE[job.label].script}").Args, args=job.flags)
        assert (args.env_id, args.seed) == (f"{job.env}-v0", job.seed)
        last = getattr(args, "eval_steps", None) or (getattr(args, "episodes_per_trial", 0) or args.eval_episodes) - 1
        for curve in (curve for curve in curves.CURVES.values() if curve.label == job.label):
            assert curve.after in {f"test/return_k{k}" for k in range(last + 1)}
    assert {curve.label for curve in curves.CURVES.values()} == set(curves.TABLE)
    assert {env for row in curves.TABLE.values() for env in row.flags} <= set(curves.ENVS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env", "Navigation3D"], "--env Navigation3D: allowed is Navigation2D, SparseNavigation2D"),
        (["--label", "point", "mmaml"], "--label mmaml: allowed is point, memory"),
        (["--seeds", *map(str, range(11))], "--seeds .*: allowed is 1 to 10 seeds"),
        (["--seeds", "-1"], "--seeds -1: .* none below 0"),
        (["--jobs", "0"], "--jobs 0: allowed is 1 or more"),
        (["--env", "SparseNavigation2D", "--label", "point"], "the table has no point in SparseNavigation2D"),
    ],
)
@pytest.mark.parametrize("what", ["run", "draw"])
def test_what_is_not_in_the_table_is_refused(home, what, flags, message):
    with pytest.raises(SystemExit, match=message):
        curves.main([what, *flags])
    assert not list(home.iterdir())


# ---------------------------------------------------------------- running


def test_finished_runs_are_left_alone(done, capfd):
    assert [row["iteration"] for row in rows(POINT_JOB)] == list(range(1, 31))
    assert records.last_flags(POINT_JOB.folder() / "args.json")["first_order"] is True
    before = snapshot(done / "runs")
    curves.main(["run", "--env", "Navigation2D", "--seeds", "1"])
    assert capfd.readouterr().out == "finished: 2; resume: 0; start: 0; busy: 0\n"
    assert snapshot(done / "runs") == before


def signal_when(ready, number, seen: list, lock=None) -> threading.Thread:
    """Signal this process as soon as it is ready; note whether the lock was held."""

    def wait():
        deadline = time.time() + 300
        while not ready() and time.time() < deadline:
            time.sleep(0.02)
        if lock:
            with open(lock) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    seen.append("free")
                except BlockingIOError:
                    seen.append("locked")
        os.kill(os.getpid(), number)

    (thread := threading.Thread(target=wait)).start()
    return thread


def test_an_interrupted_run_goes_on_and_ends_like_a_whole_one(whole, home, capfd, monkeypatch):
    def has_begun():
        return any(path.read_bytes().count(b"\n") >= 3 for path in POINT_JOB.home.glob("runs/*/metrics.jsonl"))

    memory, flags = POINT_JOB._replace(label="memory"), ["run", "--env", "Navigation2D", "--seeds", "1", "--jobs"]
    handlers = [signal.getsignal(2), signal.getsignal(15)]
    thread = signal_when(has_begun, signal.SIGINT, seen := [], POINT_JOB.home / "lock")
    with pytest.raises(SystemExit, match=r"^interrupted; the same command goes on$"):
        curves.main([*flags, "1"])
    thread.join()
    assert seen == ["locked"]  # by the child: the parent has closed its file
    assert not POINT_JOB.is_busy()
    assert not memory.home.exists()
    assert [signal.getsignal(2), signal.getsignal(15)] == handlers
    state, stop = torch.load(POINT_JOB.folder() / "checkpoint.pt", weights_only=True), rows(POINT_JOB)[-1]["iteration"]
    assert 3 <= state["iteration"] == stop < 30
    assert capfd.readouterr().out.startswith("finished: 0; resume: 0; start: 2; busy: 0\nstart ")
    name = POINT_JOB.folder()
    curves.main([*flags, "2"])
    out = capfd.readouterr().out.splitlines()
    assert out[:3] == ["finished: 0; resume: 1; start: 1; busy: 0", f"resume {POINT_JOB}", f"start {memory}"]
    assert sorted(line.split(",")[0] for line in out[3:]) == [
        f"end {job}: exit status 0" for job in (memory, POINT_JOB)
    ]
    assert POINT_JOB.folder() == name
    log = (POINT_JOB.home / "log").read_text()  # it goes on, too
    assert "SIGTERM: saves and ends soon" in log
    assert "maml_trpo goes on with runs/" in log
    found = [rows(job) for job in (POINT_JOB, memory)]
    monkeypatch.setattr(curves, "RUNS", whole / "runs")
    expected = [rows(job) for job in (POINT_JOB, memory)]
    assert found == expected


SLOW = """
import os, signal, sys, time

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(1, b"saving")  # print would raise where the signal interrupts the other one
    if sys.argv[sys.argv.index("--seed") + 1] == "1":  # quicker than the others
        sys.exit()

signal.signal(signal.SIGTERM, stop)
os.write(1, b"ready")
time.sleep(600)
"""


def test_signals_reach_all_runs_and_a_second_one_aborts(home, monkeypatch):
    (home / "algos").mkdir()
    (home / "algos/maml_trpo.py").write_text(SLOW)
    monkeypatch.setattr(curves, "ROOT", home)
    printed, (one, two) = [], (POINT_JOB._replace(seed=seed) for seed in (1, 2))
    # capfd.readouterr in the other thread could lose what is printed between its read and its truncation.
    monkeypatch.setattr(curves, "print", lambda line, flush: printed.append(line), raising=False)

    def all_say(word):
        return [path.read_text().count(word) for path in home.glob("runs/*/*/*/log")] == [1, 1]

    def one_has_ended():
        return all_say("saving") and any(line.startswith("end ") for line in printed)

    threads = [signal_when(lambda: all_say("ready"), signal.SIGINT, [])]
    threads += [signal_when(one_has_ended, signal.SIGTERM, [])]
    with pytest.raises(SystemExit, match=r"^interrupted; the same command goes on$"):
        curves.main(["run", "--label", "point", "--seeds", "1", "2", "3", "--jobs", "2"])
    for thread in threads:
        thread.join()
    expected = [f"start {one}", f"start {two}", f"end {one}: exit status 0", f"end {two}: exit status -15"]
    assert [line.split(",")[0] for line in printed[1:]] == expected  # and nothing of the third


def test_what_fails_is_named_with_its_log(home, monkeypatch, capfd):
    rows = {"absent": curves.Row("no_such_file", {"Navigation2D": ""})}
    rows |= {"wrong": curves.Row("maml_trpo", {"Navigation2D": POINT}, "--no-such-flag")}
    monkeypatch.setattr(curves, "TABLE", rows)
    leftover = curves.Job("Navigation2D", "absent", 4).home / "runs/old/metrics.jsonl"
    leftover.parent.mkdir(parents=True)
    leftover.write_text('{"iteration": 1}\n')
    with pytest.raises(SystemExit) as error:
        curves.main(["run", "--seeds", "4", "--jobs", "1"])
    logs = [home / "runs/Navigation2D" / label / "4/log" for label in rows]
    assert error.value.code == "\n".join(
        f"failed: Navigation2D {label} seed 4, see {log}" for label, log in zip(rows, logs, strict=True)
    )
    assert "no_such_file.py" in logs[0].read_text()
    assert "--no-such-flag" in logs[1].read_text()
    out = capfd.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["finished:", "start", "end", "start", "end"]
    assert out.count("exit status 2,") == 2
    assert not leftover.exists()  # it had no checkpoint to go on from


def test_an_early_end_without_an_error_counts_as_failure(home, monkeypatch):
    (home / "algos").mkdir()
    (home / "algos/maml_trpo.py").write_text("import os; print(os.getcwd(), os.environ['OMP_NUM_THREADS'])\n")
    monkeypatch.setattr(curves, "ROOT", home)
    with pytest.raises(SystemExit, match=f"^failed: {POINT_JOB}, see "):
        curves.main(["run", "--label", "point", "--seeds", "1"])
    assert (POINT_JOB.home / "log").read_text() == f"{POINT_JOB.home.resolve()} 1\n"


@pytest.mark.parametrize("how", ["lock", "cwd"])
def test_a_folder_in_which_a_process_works_is_left_alone(home, capfd, how):
    metrics = POINT_JOB.home / "runs/begun/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"iteration": 1}\n')
    (POINT_JOB.home / "lock").touch()
    before = snapshot(home)
    command = "import fcntl, sys, time; sys.argv[1:] and fcntl.flock(file := open(sys.argv[1]), fcntl.LOCK_EX); "
    command += "print('ready', flush=True); time.sleep(600)"
    argument, cwd = ([], POINT_JOB.home) if how == "cwd" else ([str(POINT_JOB.home / "lock")], home)
    other = subprocess.Popen(["python3", "-c", command, *argument], cwd=cwd, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        curves.main(["run", "--label", "point", "--seeds", "1"])
        assert capfd.readouterr().out == "finished: 0; resume: 0; start: 0; busy: 1\n"
        assert how == "cwd" or curves.start(POINT_JOB) is None
        assert snapshot(home) == before
    finally:
        other.kill(), other.wait(), other.stdout.close()
    assert not POINT_JOB.is_busy()


def test_states(home):
    assert POINT_JOB.state() == "start"
    fake(POINT_JOB, [evaluation(1, 1, 2, 3)])
    assert POINT_JOB.state() == "finished"
    metrics = POINT_JOB.folder() / "metrics.jsonl"
    text = metrics.read_text()
    for cut in ("", text[:-5], text[: text.rindex("\n", 0, -1) + 1]):  # empty, half a line, one line less
        metrics.write_text(cut)
        assert POINT_JOB.state() == "start"
    (POINT_JOB.folder() / "checkpoint.pt").touch()
    assert POINT_JOB.state() == "resume"
    *whole, last = text.splitlines(True)
    untested = {name: value for name, value in json.loads(last).items() if not name.startswith("test/")}
    metrics.write_text("".join(whole) + json.dumps(untested) + "\n")  # stopped in the last evaluation
    assert POINT_JOB.state() == "resume"
    metrics.write_text(text)
    assert POINT_JOB.state() == "finished"
    (POINT_JOB.home / "runs/newer").mkdir()  # without a checkpoint
    assert POINT_JOB.folder().name == "made_up"


@pytest.mark.parametrize("what", ["run", "keep", "adapt"])
def test_a_run_with_other_flags_than_the_tables_is_refused(home, what):
    fake(POINT_JOB, [evaluation(1, 1, 2, 3)], first_order=False, iterations=7)
    with pytest.raises(SystemExit, match="it has first_order False, not True, iterations 7, not 30; move"):
        curves.main([what, "--label", "point", "--seeds", "1"])
    assert [path.name for path in home.iterdir()] in (["runs"], ["runs", "results"], ["results", "runs"])
    assert not list(home.glob("results/*"))


# ---------------------------------------------------------------- numbers


def test_quantiles_bound_95_percent_of_students_t():
    assert set(curves.T975) == set(range(2, 11))
    for n, quantile in curves.T975.items():
        nu = n - 1
        factor = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
        x = torch.linspace(-quantile, quantile, 20001, dtype=torch.double)
        assert torch.trapezoid(factor * (1 + x**2 / nu) ** (-(nu + 1) / 2), x) == pytest.approx(
            0.95, abs=4e-5
        )  # 0.001 more is 6e-5


def test_interval():
    mean, half = curves.interval([[1, 0], [2, 0], [6, 3]])
    assert mean == pytest.approx([3, 1])
    # sums of squares 4 + 1 + 9 and 1 + 1 + 4, over n - 1 = 2; t = 4.303
    assert half == pytest.approx([4.303 * math.sqrt(7 / 3), 4.303 * math.sqrt(3 / 3)])
    mean, half = curves.interval([[4, 5]])
    assert list(mean) == [4, 5]
    assert half is None


def at(points, x) -> float:
    """A curve's value at x, by the obvious way."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise AssertionError(f"{x} is outside")


def test_common_grid():
    draw = random.Random(1)
    for _ in range(20):
        runs = []
        for _ in range(draw.randint(1, 4)):
            x = sorted(draw.sample(range(100), draw.randint(8, 12)))
            runs.append([(v, draw.random()) for v in [*(v + 100 for v in x), 250 + draw.randint(0, 9)]])
        grid, values = curves.common(runs)
        low, high = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
        assert list(grid) == sorted({v for run in runs for v, _ in run if low <= v <= high})
        assert values.shape == (len(runs), len(grid))
        for run, line in zip(runs, values, strict=True):
            assert line == pytest.approx([at(run, v) for v in grid])


# ---------------------------------------------------------------- results


def test_kept_results_are_what_the_run_wrote(done, capsys):
    curves.main(["keep", "--seeds", "1", "2"])
    captured = capsys.readouterr()
    assert captured.out.split() == ["Navigation2D_point_seed1", "Navigation2D_memory_seed1"]
    assert "not finished: Navigation2D point seed 2\n" in captured.err
    kept = {path.name: path.read_bytes() for path in (done / "results").glob("Nav*")}
    names = [f"Navigation2D_{label}_seed1.{end}" for label in TABLE for end in ("args.json", "metrics.jsonl.gz")]
    assert set(kept) == set(names)
    assert kept[names[1]][4:8] == bytes(4)  # no time stamp: equal runs give equal files
    assert gzip.decompress(kept[names[1]]) == (POINT_JOB.folder() / "metrics.jsonl").read_bytes()
    record = json.loads(kept[names[0]])
    assert record["args"] == records.last_flags(POINT_JOB.folder() / "args.json")
    assert record["tests"] == "fixed"
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) == {"python", "torch", "mujoco", "gymnasium", "numpy"}
    assert record["machine"]["cores"] == os.cpu_count()
    variable, python, script, *flags = shlex.split(record["command"])
    assert (variable, python, script) == ("OMP_NUM_THREADS=1", "python", "algos/maml_trpo.py")
    assert vars(tyro.cli(maml_trpo.Args, args=flags)) == record["args"] | {"evaluate": ""}


@pytest.fixture
def made_up(home, monkeypatch):
    """Kept results of `point` with three seeds and of `memory` with one; the runs themselves are gone."""
    steps = [100, 200, 300, 400]
    for seed, (pace, values) in enumerate([(1, (0, 1, 5, 9)), (2, (2, 2, 2, 3)), (4, (1, 6, 8, 15))], 1):
        job = curves.Job("Navigation2D", "point", seed)
        fake(job, [evaluation(n, n * pace, -y, y, 2 * y) for n, y in zip(steps, values, strict=True)])
    slow = [evaluation(n, n, 1, 2, y) for n, y in ((1000, 7), (8001, 8))]
    fake(curves.Job("Navigation2D", "memory", 1), slow)
    curves.main(["keep"])
    (home / "runs").rename(home / "gone")
    figures = {}
    save = curves.save
    monkeypatch.setattr(
        curves, "save", lambda figure, axes, path: (figures.update({path.name: figure}), save(figure, axes, path))
    )
    return figures


def test_pictures_show_means_and_intervals_of_what_is_kept(home, made_up):
    curves.main(["draw"])
    assert list(made_up) == ["curves_Navigation2D.png"]
    assert (home / "images/curves_Navigation2D.png").read_bytes()[:4] == b"\x89PNG"
    left, right = made_up["curves_Navigation2D.png"].axes
    assert (left.get_xlabel(), right.get_xlabel(), left.get_xscale()) == ("env_steps", "seconds", "log")  # 8001 to 400
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == ["before (3 seeds)", "after (3 seeds)", "third (1 seed)"]
    assert lines["after (3 seeds)"].get_xydata().tolist() == [[100, 1], [200, 3], [300, 5], [400, 9]]
    assert lines["before (3 seeds)"].get_xydata()[:, 1].tolist() == [-1, -3, -5, -9]
    assert lines["third (1 seed)"].get_xydata().tolist() == [[1000, 7], [8001, 8]]
    band = [part.get_paths()[0].vertices for part in left.collections]
    assert len(band) == 2  # none for a single seed
    at_300 = [y for x, y in band[1].tolist() if x == 300]  # 5, 2, 8: standard deviation 3
    assert (min(at_300), max(at_300)) == pytest.approx((5 - 4.303 * math.sqrt(3), 5 + 4.303 * math.sqrt(3)))
    # Over seconds the seeds share only 400, the third's start, to 400, the first's end: 9, 2, 1.
    assert right.lines[1].get_xydata().tolist() == [[400, 4]]
    colors = [line.get_color() for line in left.lines]
    assert len(set(colors)) == 3
    curves.main(["draw", "--label", "memory"])
    assert [line.get_color() for line in made_up["curves_Navigation2D.png"].axes[0].lines] == colors[2:]
    assert made_up["curves_Navigation2D.png"].axes[0].get_xscale() == "linear"


def test_the_table_is_of_the_ends(made_up, capsys):
    curves.main(["table"])
    lines = [re.split(r" *\| *", line)[1:-1] for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[0] == ["Navigation2D", "seeds", "env steps", "seconds", "0", "1", "last"]
    half = 4.303 * 6 / math.sqrt(3)  # 9, 3, 15: standard deviation 6
    assert lines[2] == ["before", "3", "400", "933", f"-9 +- {half:.2g}", "", f"-9 +- {half:.2g}"]
    assert lines[3] == ["after", "3", "400", "933", f"-9 +- {half:.2g}", *[f"9 +- {half:.2g}"] * 2]
    assert lines[4] == ["third", "1", "8,001", "8,001", "1", "2", "8"]


def test_a_missing_column_and_missing_results_are_one_line(made_up, monkeypatch):
    monkeypatch.setattr(curves, "CURVES", {"sixth": curves.Curve("point", "test/return_k5")})
    with pytest.raises(SystemExit, match=r"Navigation2D_point_seed1.metrics.jsonl.gz: no test/return_k5 in it"):
        curves.main(["draw"])
    with pytest.raises(SystemExit, match=r"nothing of that is kept in .*results"):
        curves.main(["table", "--seeds", "9"])


def test_means_are_not_of_two_kinds_of_test_tasks(home, made_up, capsys):
    path = home / "results/Navigation2D_point_seed2.metrics.jsonl.gz"
    old = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    old = [{name: value for name, value in row.items() if name != "test/tasks"} for row in old]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in old).encode()))
    for what in ("draw", "table"):
        with pytest.raises(SystemExit, match=r"^Navigation2D \(--label, --seeds choose\): some runs were tested on"):
            curves.main([what])
    curves.main(["table", "--seeds", "1", "3"])
    curves.main(["table", "--seeds", "2"])
    assert capsys.readouterr().out.count("| after | 2 |") == 1


def test_the_adaptation_curve_is_the_files_own_evaluation(done, monkeypatch, capsys):
    curves.main(["adapt", "--env", "Navigation2D", "--seeds", "1"])
    record = json.loads((done / "results/adapt_Navigation2D.json").read_text())
    assert record["command"] == "python benchmark/curves.py adapt --env Navigation2D --seeds 1"
    assert record["seeds"] == {"point": [1]}  # a memory has no inner steps
    (row,) = record["returns"]["point"]
    assert row[:3] == pytest.approx([rows(POINT_JOB)[-1][f"test/return_k{k}"] for k in range(3)], rel=1e-5)
    assert len(row) == 11
    assert len(set(row)) == 11
    record["returns"]["point"].append([value + 2 for value in row])
    (done / "results/adapt_Navigation2D.json").write_text(json.dumps(record))
    figures = []
    monkeypatch.setattr(curves, "save", lambda figure, *_: figures.append(figure))
    curves.main(["keep", "--seeds", "1"])
    curves.main(["draw"])
    (line,) = figures[1].axes[0].lines
    assert line.get_label() == "after (2 seeds)"
    assert line.get_xydata().tolist() == [[k, pytest.approx(value + 1)] for k, value in enumerate(row)]
    capsys.readouterr()


def test_the_adaptation_curve_of_a_random_policy_is_that_of_the_runs_first_line(home, monkeypatch):
    row = curves.Row("multitask_ppo", {"Navigation2D": POINT.replace("--iterations 30", "--iterations 2")})
    monkeypatch.setattr(curves, "TABLE", {"multitask": row, "oracle": row._replace(more="--task-given")})
    monkeypatch.setattr(curves, "CURVES", {"tuned": curves.Curve("multitask"), "given": curves.Curve("oracle")})
    curves.main(["run", "--env", "Navigation2D", "--seeds", "1", "--jobs", "2"])
    curves.main(["adapt"])
    returns = json.loads((home / "results/adapt_Navigation2D.json").read_text())["returns"]
    assert set(returns) == {"multitask", "random", "oracle"}
    for label, theirs, what, line in (("multitask", "multitask", "test", -1), ("random", "multitask", "random", 0)):
        expected = [rows(curves.Job("Navigation2D", theirs, 1))[line][f"{what}/return_k{k}"] for k in range(3)]
        assert returns[label][0][:3] == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- what is published


def published() -> dict:
    """Environment and name in the legend -> the kept runs' evaluations."""
    return curves.kept_curves(curves.Options("table"))


def test_the_tables_of_the_page_are_those_of_the_kept_results(capsys):
    curves.main(["table"])
    page = (curves.ROOT / "docs/curves.md").read_text()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 30
    assert [line for line in lines if line not in page] == []
    rows = re.findall(r"^\| (?:.*?) \| \d \| [\d,]+ \| .*\|$", page, re.MULTILINE)
    assert set(rows) <= set(lines)  # and nothing that is not kept


def test_kept_runs_have_the_flags_of_the_table_and_the_gradient_family_has_three_seeds():
    kept = {path.name.removesuffix(".args.json"): path for path in curves.RESULTS.glob("*.args.json")}
    table = {job.kept: job for job in curves.jobs(curves.Options("table"))}
    assert set(kept) <= set(table)
    for name, path in kept.items():
        record, job = json.loads(path.read_text()), table[name]
        args = tyro.cli(import_module(f"algos.{curves.TABLE[job.label].script}").Args, args=job.flags)
        flags = json.loads(json.dumps(vars(args)))
        newer = {name: flags[name] for name in ("physics", "compile", "evaluate") if name in flags}  # than the runs
        # Its default was 0.25 when these were made, and it cut the support, too (docs/maml_trpo.md).
        changed = {name: flags[name] for name in ("fisher_fraction",) if name in flags}
        assert newer | record["args"] | changed == flags, name
        lines = gzip.decompress((curves.RESULTS / f"{name}.metrics.jsonl.gz").read_bytes()).splitlines()
        assert json.loads(lines[-1])["iteration"] == args.iterations == len(lines)
    for env, found in published().items():
        for name in ("MAML", "first-order MAML", "ProMP", "Reptile (k = 4)"):
            assert len(found[name]) >= 3, (env, name)


@pytest.mark.parametrize("env", curves.ENVS)
def test_adaptation_curves_begin_with_the_last_evaluation_of_their_runs(env):
    """Up to the rounding of another build of torch, which chaos makes larger on MuJoCo."""
    record = json.loads((curves.RESULTS / f"adapt_{env}.json").read_text())
    assert set(record["versions"]) == {"python", "torch", "mujoco", "gymnasium", "numpy"}
    for label, returns in record["returns"].items():
        if label != "random":
            ends = []
            for seed in record["seeds"][label]:
                (run,) = curves.kept_rows(env, curves.Curve(label), [seed])
                ends.append([run[-1][f"test/return_k{k}"] for k in range(4)])
            spread = 6 if env.startswith("Half") else 1
            assert torch.tensor(returns)[:, :4].sub(torch.tensor(ends)).abs().mean() < spread, label
