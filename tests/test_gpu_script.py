"""gpu.sh runs its steps whatever becomes of the others, gpu_check.py finds what differs, gpu_worlds.py compares.

Steps are run by a stand-in for Python. The rehearsal with the real one is `benchmark/gpu.sh --cpu`, three minutes.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

from algos import maml_trpo, promp
from benchmark import gpu_check, gpu_worlds, speed

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["correctness", "worlds", "rl2", "pearl", "maml", "tests", "learn"]
# Prints a line or fails; tests never end where there is warp, and the learning run is the real one.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
"- "*) exec {python} "$@" ;;
"-c import mujoco_warp") exit {warp} ;;
"-c "*) ;;
"benchmark/gpu_check.py "*) echo 'FAIL promp, 3 s: no memory' && exit 1 ;;
"benchmark/speed.py pearl_sac") [[ "$*" != *--compile* ]] || {{ echo 'no compiler' && exit 3; }}
    echo '{{"iteration_s": 2.0, "updates_per_s": 55.5}}' ;;
"benchmark/speed.py "*) echo '{{"sample_s": 0.5, "update_s": 0.1, "end_to_end_steps_per_s": 4000.0'$(
    [[ $2 = rl2_ppo ]] || echo ', "physics_steps_per_s": 10000.0')}} ;;
"-m pytest") [[ {warp} = 1 ]] || exec sleep 60 ;;
*/maml_trpo.py\\ *) exec {python} "$@" ;;
esac
"""


def gpu(where: Path, warp: bool, *words: str, **places: str) -> tuple[str, int]:
    """What gpu.sh prints when the stand-in runs its commands, and its exit status."""
    python = where / "python"
    python.write_text(PYTHON.format(python=sys.executable, warp=int(not warp)))
    python.chmod(0o755)
    places = {"PYTHON": str(python), "OUT": str(where / "out"), "SITE": str(where / "site"), "LIMIT": "8"} | places
    command = ["bash", str(ROOT / "benchmark/gpu.sh"), *words]
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=90)
    return done.stdout + done.stderr, done.returncode


def commands(log: str) -> list[list[str]]:
    """Words of the started commands, behind `python`."""
    return [line.split()[1:] for line in re.findall(r"^== [^:]*: (?:env -C \S+ )?(\S*/python .*)$", log, re.MULTILINE)]


@pytest.fixture(scope="module", params=[True, False], ids=["with warp", "without"])
def steps(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("gpu")
    return request.param, where, gpu(where, request.param, *STEPS[:-1])[0]


def test_every_step_runs_whatever_became_of_the_others(steps):
    warp, where, log = steps
    assert ("== warp: left out" in log) != warp
    assert len(re.findall(r"^== (.*): exit status", log, re.MULTILINE)) == (16 if warp else 13)
    assert re.search(r"== correctness: exit status 1 after \d+ s\nFAIL promp, 3 s: no memory", log)
    assert re.search(r"== pearl_sac, compiled: exit status 3 after \d+ s\nno compiler", log)
    assert re.search(rf"== tests: exit status {124 if warp else 0} after \d+ s", log)
    for name in ("warp", "mujoco", "CPU") if warp else ("mujoco", "CPU"):
        assert f"| maml_trpo, {name} | 4,000 | 0.600 | 5.0 | 0.40 | |" in log  # 500 iterations of 0.6 s
    assert "| rl2_ppo, TabularMDP-v0, 32000 trials | 4,000 | 0.600 | 5.0 |  | |" in log
    assert "| pearl_sac | | 2.000 | | | 55.5 |" in log
    assert (where / "out/log.txt").read_text() in log
    assert {path.name for path in (where / "out").iterdir()} == {"log.txt", "speed.jsonl"}


def test_all_flags_of_the_steps_exist(steps, tmp_path):
    warp, _, log = steps
    log += gpu(tmp_path, warp, "learn", LIMIT="21")[0]
    log += gpu(tmp_path, False, "--cpu", *STEPS[:-1])[0]
    started = commands(log)
    assert len(started) == (17 if warp else 14) + 11
    for script, *words in started:
        if script == "benchmark/speed.py":
            options, _, args, _ = speed.parse(words)
            assert (options.algorithm, args.cuda) == (words[0], "--cuda" in words)
        elif script == "benchmark/gpu_check.py":
            assert set(tyro.cli(gpu_check.Options, args=words).only) <= set(gpu_check.names())
        elif script == "benchmark/gpu_worlds.py":
            tyro.cli(gpu_worlds.Options, args=words)
        elif script.endswith("maml_trpo.py"):
            assert tyro.cli(maml_trpo.Args, args=words).cuda
        else:
            assert script == "-m"
            assert words[0] == "pytest"


def test_the_tests_that_need_a_gpu_are_all_named(steps):
    (words,) = (words for words in commands(steps[2]) if words[0] == "-m")
    mark = re.compile(r"^@pytest.mark.skipif\(not torch.cuda", re.MULTILINE)
    named = {path.name for path in (ROOT / "tests").glob("*.py") if mark.search(path.read_text())}
    assert named
    assert named <= {Path(word).name for word in words}


def test_the_learning_run_goes_on_with_an_earlier_one_and_saves_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--env-id Navigation2D-v0 --meta-batch-size 4 --episodes-per-task 2 --horizon 5 --hidden-size 8"
    maml_trpo.main([*flags.split(), "--iterations", "1"])
    (earlier,) = (tmp_path / "runs").iterdir()
    log, status = gpu(tmp_path, False, "--cpu", "learn", LIMIT="60", RESUME=str(earlier))
    assert status == 0
    assert "SIGTERM: saves and ends soon" in log
    kept = tmp_path / "out/runs" / earlier.name
    assert {path.name for path in kept.iterdir()} >= {"args.json", "metrics.jsonl", "checkpoint.pt"}
    iterations = [json.loads(line)["iteration"] for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert iterations == list(range(1, len(iterations) + 1))
    assert len(iterations) > 1
    assert len((earlier / "metrics.jsonl").read_text().splitlines()) == 1
    assert "left out, no time is left" in gpu(tmp_path, False, "--cpu", "learn", LIMIT="18")[0]


def test_an_unknown_word_is_refused(tmp_path):
    log, status = gpu(tmp_path, False, "rl2", "--gpu")
    known = f"{' '.join(STEPS)}, before them --cpu; wheels; install"
    assert (log, status) == (f"benchmark/gpu.sh --gpu: allowed are {known}\n", 2)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- gpu_check.py


def test_every_file_is_checked():
    assert set(gpu_check.names()) - {gpu_check.WARP} == {path.stem for path in (ROOT / "algos").glob("*.py")}


def check(tmp_path: Path, *flags: str) -> tuple[list[str], list[dict]]:
    """What gpu_check.py prints and keeps."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(ROOT / "benchmark/gpu_check.py"), *flags, "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    return done.stdout.splitlines(), [json.loads(line) for line in results.read_text().splitlines()]


def test_equal_runs_pass_and_what_fails_is_told(tmp_path):
    printed, kept = check(tmp_path, "--only", "promp", "nothing")
    assert {record["file"]: record["passed"] for record in kept} == {"promp": True, "nothing": False}
    (promp_line,) = (line for line in printed if line.startswith("PASS promp, "))
    assert " numbers of 2 runs, the largest difference 0 of what is allowed" in promp_line
    (nothing_line,) = (line for line in printed if line.startswith("FAIL nothing, "))
    assert "ModuleNotFoundError: No module named 'algos.nothing'" in nothing_line


def test_a_file_that_takes_too_long_is_ended(tmp_path):
    since = time.monotonic()
    printed, ((record),) = check(tmp_path, "--only", "promp", "--limit", "1")
    assert printed == [f"FAIL promp, {record['seconds']} s: ran into the limit of 1 s;  in its process"]
    assert time.monotonic() - since < 60


def test_a_difference_is_found_and_the_rest_is_still_tried(monkeypatch, capsys):
    """The control: steps a thousandth longer where the run is "on the GPU", that is, has a flag more."""
    step, main, longer = promp.inner_step, promp.main, [1.0]

    def noting_the_device(argv):
        longer[0] = 1.001 if "--wandb-mode" in argv else 1.0
        main(argv)

    monkeypatch.setattr(promp, "inner_step", lambda *given, scale=1.0: step(*given, scale * longer[0]))
    monkeypatch.setattr(promp, "main", noting_the_device)
    threads = torch.get_num_threads()
    gpu_check.one("promp", ["--wandb-mode", "offline"])
    torch.set_num_threads(threads)
    record = json.loads(capsys.readouterr().out)
    assert not record["passed"]
    assert [failure["in"].split(",")[0] for failure in record["failures"]] == ["the comparison"] * 2
    error = record["failures"][0]["error"]
    assert re.match(r"AssertionError: train/gain is \S+ and not \S+ as on the CPU, in iteration 1 of", error)
    assert "(and 1 more); File " in gpu_check.told(record)


# ---------------------------------------------------------------- gpu_worlds.py


def test_numbers_of_worlds_are_measured_and_what_fails_is_a_line(tmp_path, monkeypatch, capsys):
    make, results = gpu_worlds.make, tmp_path / "worlds.jsonl"

    def small(env_id, worlds, *rest, **more):
        if worlds == 3:
            raise RuntimeError("no memory\nfor so many worlds")
        return make(env_id, worlds, *rest, **more)

    monkeypatch.setattr(gpu_worlds, "make", small)
    options = gpu_worlds.Options("run", worlds=(2, 3, 4), horizon=3, seconds=0, results=results)
    assert gpu_worlds.run(options) == 1
    two, three, four = (json.loads(line) for line in results.read_text().splitlines())
    assert three["error"] == "RuntimeError: no memory"
    assert [record["worlds"] for record in (two, three, four)] == [2, 3, 4]
    assert all(0 < record["lowest"] <= record["steps_per_s"] <= record["highest"] for record in (two, four))
    with open(results, "a") as file:
        for worlds, rate in ((2, 0.5), (4, 1e9)):
            record = two | {"physics": "warp", "worlds": worlds, "steps_per_s": rate * two["steps_per_s"]}
            file.write(json.dumps(record) + "\n")
    capsys.readouterr()
    gpu_worlds.table(gpu_worlds.Options("table", results=results))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| HalfCheetahDir-v0 \| 2 \| [\d,]+ \| [\d,]+ \| 0.50 \|", lines[2])
    assert lines[3] == "| HalfCheetahDir-v0 | 3 | failed or left out | failed or left out |  |"
    assert lines[-1] == (
        "HalfCheetahDir-v0: warp is faster from 4 worlds on, mujoco at 2: `auto` should switch between the two."
    )


@pytest.mark.parametrize(
    ("warp", "says"),
    [
        ({1: 2, 4: 2, 16: 9}, "warp is faster from 1 worlds on: `auto` should take warp with --cuda, as it does"),
        ({1: 2, 4: 0, 16: 9}, "warp is faster from 16 worlds on, mujoco at 4: `auto` should switch between the two"),
        ({1: 0, 4: 9, 16: 0}, "mujoco is faster at 16 worlds: `auto` should take mujoco up to there"),
        ({1: 0, 4: 9}, "warp is faster from 4 worlds on, mujoco at 1: `auto` should switch between the two"),
        ({}, "no number of worlds was measured with both"),
    ],
)
def test_the_verdict(warp, says):
    assert gpu_worlds.verdict(warp, {1: 1, 4: 1, 16: 1}) == says
