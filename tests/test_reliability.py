"""Whatever happens to a run, nothing is lost: dead pipes, closed terminals, kill -9, two writers, torn files.

docs/reliability.md lists the faults. The oracle is an uninterrupted run.
"""

import importlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from algos import maml_trpo
from envs import fewshot, records, summarise
from tests.test_gpu_path import images
from tests.test_runs import FLAGS, ROOT, SCRIPT, TINY, each, rows, run, theta
from tests.test_runs import _in_a_folder_of_its_own as _in_a_folder_of_its_own  # a fixture

LONG = [*TINY, "--iterations", "100000", "--eval-every", "100000"]


BEGUN = []  # processes of the test that runs


def begin(*flags: str, script: Path = SCRIPT, **options) -> subprocess.Popen:
    """A run in a process of its own, in this folder; SIGHUP counts there, also where the tests run under nohup."""
    options = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)} | options
    BEGUN.append(subprocess.Popen([sys.executable, str(script), *flags], **options))
    return BEGUN[-1]


@pytest.fixture(autouse=True)
def _leave_no_process():
    yield
    while BEGUN:
        process = BEGUN.pop()
        process.kill()
        process.communicate()


def folder_with_metrics(process: subprocess.Popen | None = None) -> Path:
    """The folder of the run that has begun, once there is a line of metrics."""
    deadline = time.time() + 60
    while time.time() < deadline:
        found = [path for path in Path().glob("runs/*/metrics.jsonl") if path.stat().st_size]
        if found:
            return found[0].parent.resolve()
        assert process is None or process.poll() is None
        time.sleep(0.02)
    raise AssertionError("no metrics within a minute")


def check_whole(folder: Path) -> int:
    """The checkpoint is of the last line of metrics, and each iteration has a line; the number of iterations."""
    done = torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"]
    assert [row["iteration"] for row in rows(folder)] == list(range(1, done + 1))
    return done


# ---------------------------------------------------------------- the screen


@pytest.mark.parametrize("where", ["dead pipe", "full disk", "closed", "closed files"])
def test_a_run_without_a_screen_ends_as_any_other(where):
    expected = run("--iterations", "3")
    options = {}
    if where == "dead pipe":
        reader, writer = os.pipe()
        os.close(reader)
        options = {"stdout": writer, "stderr": writer}
    if where == "full disk":
        full = os.open("/dev/full", os.O_WRONLY)
        options = {"stdout": full, "stderr": full}
    if where == "closed files":
        options = {"preexec_fn": lambda: [os.close(number) for number in range(3)], "close_fds": True}
    if where == "closed":
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, str(SCRIPT), *TINY, "--iterations", "3"]
        process = subprocess.Popen(command)
    else:
        process = begin(*TINY, "--iterations", "3", **options)
    assert process.wait(60) == 0
    (folder,) = Path().glob("runs/*")
    assert rows(folder) == rows(expected)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_ctrl_c_with_a_dead_pipe_saves():
    """As of `python .. 2>&1 | tee log`: the terminal signals both, and tee is gone before the run writes again."""
    reader, writer = os.pipe()
    process = begin(*LONG, stdout=writer, stderr=writer)
    os.close(writer)
    folder = folder_with_metrics(process)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    done = check_whole(folder)
    run("--resume", str(folder), "--iterations", str(done + 2))
    assert check_whole(folder) == done + 2


def test_a_closed_terminal_saves():
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, str(SCRIPT), *LONG])
    folder = folder_with_metrics()
    os.read(terminal, 100)
    os.close(terminal)  # SIGHUP, and every write fails
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    check_whole(folder)


def test_with_nohup_a_closed_terminal_ends_nothing():
    options = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), "stderr": subprocess.DEVNULL}
    process = begin(*LONG, **options)
    folder = folder_with_metrics(process)
    process.send_signal(signal.SIGHUP)
    before = len(rows(folder))
    time.sleep(1)
    assert process.poll() is None
    assert len(rows(folder)) > before
    process.terminate()
    assert process.wait(30) == 0
    check_whole(folder)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_sent_twice_at_once_is_one(number):
    """A terminal and torchrun both tell a process; a shell and the kernel both send SIGHUP."""
    process = begin(*LONG, stderr=subprocess.PIPE, text=True)
    folder = folder_with_metrics(process)
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert f"{number.name}: saves and ends soon" in stderr
    assert f"--resume {folder.relative_to(Path.cwd().resolve())} goes on" in stderr
    check_whole(folder)


def test_a_second_signal_after_a_while_ends_a_run_at_once(monkeypatch):
    run_ = records.Follower(maml_trpo.Args())
    killed = []
    monkeypatch.setattr(records.os, "kill", lambda *given: killed.append(given))
    with run_.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert run_.should_stop()
        assert killed == []
        run_.stopping -= 2
        signal.raise_signal(signal.SIGHUP)
        assert killed == []
        signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)]


def test_an_evaluation_is_cut_short_and_made_up_for(monkeypatch):
    whole = run("--iterations", "5")
    evaluate, calls = maml_trpo.evaluate, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 2:  # the first evaluation is that of iteration 1
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the evaluation has gone on")
        return evaluate(*given)

    monkeypatch.setattr(maml_trpo, "evaluate", interrupted)
    part = run("--iterations", "5")
    assert check_whole(part) == 2
    assert rows(part)[-1].keys() == rows(whole)[2].keys()  # none of test/..: iteration 3 has no evaluation
    run("--resume", str(part))
    assert rows(part) == rows(whole)


def test_the_last_evaluation_is_made_up_for_too(monkeypatch):
    whole = run("--iterations", "4")
    part = run("--iterations", "4", stop_at=4)
    assert not any(key.startswith("test/") for key in rows(part)[-1])
    run("--resume", str(part))
    assert rows(part) == rows(whole)
    starts = json.loads((part / "args.json").read_text())
    assert [start["iteration"] for start in starts] == [0, 4]


def test_an_evaluation_that_is_cut_while_it_is_made_up_for_is_made_up_for_later(monkeypatch):
    whole = run("--iterations", "4")
    part = run("--iterations", "4", stop_at=2)
    with monkeypatch.context() as patch:
        patch.setattr(maml_trpo, "evaluate", lambda *given: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit) as end:
            run("--resume", str(part))
    assert end.value.code == 0
    assert check_whole(part) == 2  # it ended at once
    run("--resume", str(part))
    assert rows(part) == rows(whole)


def test_a_state_in_the_midst_of_an_iteration_makes_up_for_no_evaluation(monkeypatch):
    """Of PEARL: with --eval-every 1 that of iteration 3 would be due, but the networks are no longer iteration 3's."""
    done = []

    def interrupt(self, what, *numbers):
        done.append(what)
        if done.count("updating") == 8:  # of 2 an iteration
            signal.raise_signal(signal.SIGINT)

    whole = run("--iterations", "5", name="pearl_sac")
    with monkeypatch.context() as patch:
        patch.setattr(records.Run, "doing", interrupt)
        part = run("--iterations", "5", name="pearl_sac")
    assert [row["iteration"] for row in rows(part)] == [1, 2, 3]
    assert torch.load(part / "checkpoint.pt", weights_only=True)["updates"] == 1
    run("--resume", str(part), "--eval-every", "1", name="pearl_sac")
    assert rows(part) == rows(whole)


def test_runs_in_a_thread_need_no_signals():
    results = []
    thread = threading.Thread(target=lambda: results.append(run("--iterations", "2")))
    thread.start()
    thread.join(60)
    assert check_whole(results[0]) == 2


def test_threads_of_torch_are_given_back_after_an_error(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name, part in (("maml", "maml_gradient"), ("maml_trpo", "trpo_step")):
            module = importlib.import_module(f"algos.{name}")
            monkeypatch.setattr(module, part, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run("--iterations", "2", name=name)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- folders, locks, history


def test_four_runs_begun_at_once_are_four_runs():
    estimators = ("score", "lvc", "dice", "loaded")
    processes = [
        begin(*TINY, "--iterations", "2", "--estimator", name, stderr=subprocess.DEVNULL) for name in estimators
    ]
    assert [process.wait(120) for process in processes] == [0] * 4
    folders = sorted(Path().glob("runs/*"))
    assert len(folders) == 4
    assert {records.last_flags(folder / "args.json")["estimator"] for folder in folders} == set(estimators)
    assert [check_whole(folder) for folder in folders] == [2] * 4


def test_equal_runs_begun_at_once_are_as_many():
    processes = [begin(*TINY, "--iterations", "1", stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0] * 3
    assert len(list(Path().glob("runs/*/curve.png"))) == 3


def test_a_second_writer_is_refused_in_one_line():
    process = begin(*TINY, "--iterations", "100000", "--eval-every", "1", stderr=subprocess.DEVNULL)
    folder = folder_with_metrics(process)
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.02)
    second = subprocess.run(
        [sys.executable, str(SCRIPT), "--resume", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1] == f"{folder}: another process writes this run; only one can"
    process.terminate()
    assert process.wait(30) == 0
    check_whole(folder)


def test_a_checkpoint_that_changes_between_reading_and_claiming_is_refused(monkeypatch):
    folder = run("--iterations", "2")
    lock = records.lock

    def late(path):
        state = torch.load(path / "checkpoint.pt", weights_only=True)
        torch.save(state, path / "checkpoint.pt")  # another process has saved meanwhile
        return lock(path)

    monkeypatch.setattr(records, "lock", late)
    with pytest.raises(SystemExit, match="another process has just gone on"):
        maml_trpo.main(["--resume", str(folder), "--iterations", "3"])


def test_a_resume_that_has_nothing_to_do_says_so_and_changes_nothing(capsys):
    folder = run("--iterations", "2")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    maml_trpo.main(["--resume", str(folder), "--inner-lr", "0.7", "--capture-video"])
    assert "all of its 2 iterations are done" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_every_start_is_kept_with_what_changed():
    folder = run("--iterations", "2")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3}\n{"itera')
    maml_trpo.main(["--resume", str(folder), "--iterations", "4", "--inner-lr", "0.5", "--eval-steps", "4"])
    maml_trpo.main(["--resume", str(folder), "--iterations", "5"])
    starts = json.loads((folder / "args.json").read_text())
    assert [start["iteration"] for start in starts] == [0, 2, 4]
    assert [start["flags"]["inner_lr"] for start in starts] == [0.1, 0.5, 0.5]
    assert [start["flags"]["iterations"] for start in starts] == [2, 4, 5]
    dropped, *changed = starts[1]["notes"]
    assert dropped.startswith("metrics.jsonl: 2 lines torn")
    assert set(changed) == {
        "changed: --iterations 4 in place of 2",
        "changed: --inner-lr 0.5 in place of 0.1",
        "changed: --eval-steps 4 in place of 2",
    }
    assert starts[2]["notes"] == ["changed: --iterations 5 in place of 4"]
    assert all(time.strptime(start["time"], "%Y-%m-%dT%H:%M:%SZ") for start in starts)
    assert "test/return_k4" in rows(folder)[-1]  # more of them than at first, and curve.png could be drawn


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("maml_trpo", ["--episodes-per-task", "3"]),
        ("maml_trpo", ["--meta-batch-size", "4"]),
        ("maml_trpo", ["--env-id", "SparseNavigation2D-v0"]),
        ("maml_trpo", ["--action-scale", "2.0"]),
        ("maml", ["--eval-tasks", "6"]),
        ("pearl_sac", ["--tasks-per-iteration", "2"]),
    ],
)
def test_what_would_make_a_curve_of_two_things_is_refused(name, flags):
    folder = run("--iterations", "1", name=name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match=rf"^--resume .*: must be the run's: {flags[0]} \(.* and not {flags[1]}\)"):
        importlib.import_module(f"algos.{name}").main(["--resume", str(folder), "--iterations", "2", *flags])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["maml_trpo", "rl2_ppo", "pearl_sac", "lirpg"])
def test_every_key_that_a_checkpoint_lacks_is_named(name):
    folder = run("--iterations", "2", name=name)
    whole = torch.load(folder / "checkpoint.pt", weights_only=True)
    main = importlib.import_module(f"algos.{name}").main
    assert {"iteration", "theta", "generator", "seconds", "env_steps", "keys"} <= set(whole)
    for key in whole:
        torch.save({other: x for other, x in whole.items() if other != key}, folder / "checkpoint.pt")
        with pytest.raises(SystemExit, match=rf"--resume .*: no usable checkpoint.pt there: it lacks {key}\b"):
            main(["--resume", str(folder), "--iterations", "3"])


# ---------------------------------------------------------------- kill -9


@pytest.mark.parametrize("name", ["maml_trpo", "rl2_ppo", "pearl_sac"])
def test_kill_9_loses_nothing_but_the_iterations_since_the_last_checkpoint(name):
    """Killed again and again and resumed, a run is in the end the run that nobody killed."""
    flags = ["--iterations", "150", "--eval-every", "1"]
    script = ROOT / f"algos/{name}.py"  # in processes of their own: earlier tests must not tell in the last digit
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    Path("whole").mkdir()
    assert begin(*FLAGS[name][0], *flags, script=script, cwd="whole", **quiet).wait() == 0
    (expected,) = Path("whole/runs").iterdir()
    chance = random.Random(name)
    checkpoint = None
    for _ in range(3):
        words = [*FLAGS[name][0], *flags] if checkpoint is None else ["--resume", str(checkpoint.parent)]
        before = None if checkpoint is None else checkpoint.stat().st_mtime_ns
        process = begin(*words, script=script, **quiet)
        while process.poll() is None and (checkpoint is None or checkpoint.stat().st_mtime_ns == before):
            checkpoint = next(Path().glob("runs/*/checkpoint.pt"), None)
        time.sleep(0.2 * chance.random())
        process.kill()
        process.wait()
    folder = checkpoint.parent
    assert begin("--resume", str(folder), script=script, **quiet).wait() == 0
    assert rows(folder) == rows(expected)
    assert all(torch.equal(x, theta(expected)[key]) for key, x in theta(folder).items())


# ---------------------------------------------------------------- asking again


@each
def test_a_run_can_be_evaluated_again(name, monkeypatch, capsys):
    monkeypatch.setattr(fewshot, "draw_glyphs", images)  # drawing takes seconds
    folder = run("--iterations", "3", name=name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    module = importlib.import_module(f"algos.{name}")
    capsys.readouterr()
    for k, file in enumerate(("evaluation", "evaluation-2")):
        more = ["--eval-steps", "3"] if k and hasattr(module.Args(), "eval_steps") else []
        module.main(["--evaluate", str(folder), *more])
        found = json.loads((folder / f"{file}.json").read_text())
        last = {key: x for key, x in rows(folder)[-1].items() if key.startswith(("test/", "extrinsic/"))}
        assert found["iteration"] == 3
        if not more:  # the same tasks, start states and noise as in the run itself
            assert {key: x for key, x in found["metrics"].items() if key in last} == last
            assert found["changed"] == {}
        else:
            assert found["changed"]["eval_steps"][1] == 3
            assert any(key.endswith("_k3") for key in found["metrics"])
        assert (folder / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
    assert {path: path.read_bytes() for path in folder.iterdir() if path in before} == before
    told = capsys.readouterr().out
    assert "95 % interval" in told
    assert f"written: {folder / 'evaluation.json'}" in told


def test_an_evaluation_may_have_more_tasks():
    folder = run("--iterations", "2")
    maml_trpo.main(["--evaluate", str(folder), "--meta-batch-size", "30", "--eval-steps", "4"])
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["metrics"]["test/tasks"] == 30
    assert {f"test/return_k{k}_ci95" for k in range(5)} <= set(found["metrics"])
    with pytest.raises(SystemExit, match=r"--evaluate nowhere: no usable checkpoint"):
        maml_trpo.main(["--evaluate", "nowhere"])
    with pytest.raises(SystemExit, match=r"--evaluate .* must be the run's: --hidden-size \(8 and not 9\)"):
        maml_trpo.main(["--evaluate", str(folder), "--hidden-size", "9"])


def test_the_evaluation_does_not_depend_on_the_seed_or_on_who_asks():
    tiny = maml_trpo.Args(meta_batch_size=3, episodes_per_task=2, horizon=5, action_scale=1.0, seed=1)
    envs = __import__("envs").make("Navigation2D-v0", 6, 5)
    weights = maml_trpo.init_policy(envs, 8, torch.Generator().manual_seed(0))
    first = summarise(maml_trpo.evaluate(envs, weights, tiny)[0])
    other = maml_trpo.Args(meta_batch_size=3, episodes_per_task=2, horizon=5, action_scale=1.0, seed=9)
    assert summarise(maml_trpo.evaluate(envs, weights, other)[0]) == first


def test_pictures_are_tried_before_anything_starts(monkeypatch):
    from envs.navigation import Navigation2D

    def broken(*_):
        raise RuntimeError("MuJoCo found no way to draw")

    monkeypatch.setattr(Navigation2D, "render_frame", broken)
    with pytest.raises(SystemExit, match=r"^--capture-video: MuJoCo found no way to draw$"):
        maml_trpo.main([*TINY, "--iterations", "2", "--capture-video"])
    assert not Path("runs").exists()


def test_weights_and_biases_goes_on_with_the_same_run(monkeypatch, tmp_path):
    """Offline: a resumed run has the number of the first, another run in the same process another number."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--track", "--wandb-mode", "offline", "--iterations"]
    first = run(*flags, "1")
    run("--resume", str(first), "--iterations", "2")
    second = run(*flags, "1")
    numbers = [start["wandb"] for folder in (first, second) for start in json.loads((folder / "args.json").read_text())]
    assert numbers[0] == numbers[1] != numbers[2]
