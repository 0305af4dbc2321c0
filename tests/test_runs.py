"""The scripts as their user meets them: folders, determinism, resume, signals, damaged checkpoints, full disk, flags.

What every file has of its own runs for every file; what lies in the blocks that are the same text everywhere, for one.
"""

import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from algos import maml_trpo as algorithm
from envs import HORIZONS, fewshot, records
from tests.test_gpu_path import images

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "algos" / "maml_trpo.py"
TINY = ["--env-id", "Navigation2D-v0", "--action-scale", "1", "--meta-batch-size", "3", "--episodes-per-task", "2"]
TINY += ["--horizon", "5", "--hidden-size", "8", "--eval-every", "2", "--eval-steps", "2"]
CURVES = [
    "--meta-batch-size",
    "3",
    "--shots",
    "4",
    "--hidden-sizes",
    "8",
    "7",
    "--eval-every",
    "2",
    "--eval-tasks",
    "5",
]
CURVES += ["--eval-steps", "2"]
SETS = ["--meta-batch-size", "3", "--shots", "4", "--hidden-size", "16", "--layers", "1", "--eval-every", "2"]
SETS += ["--eval-tasks", "5"]
DESCENTS = ["--meta-batch-size", "3", "--steps", "6", "--unroll", "3", "--hidden-size", "5", "--eval-every", "2"]
DESCENTS += ["--eval-tasks", "5", "--eval-steps", "4"]
CLASSES = ["--meta-batch-size", "3", "--ways", "3", "--train-ways", "4", "--shots", "2", "--hidden-sizes", "4", "5"]
CLASSES += ["--queries", "3", "--eval-every", "2", "--eval-tasks", "5"]
TRIALS = ["--env-id", "Bandit5-v0", "--meta-batch-size", "3", "--episodes-per-trial", "3", "--horizon", "5"]
TRIALS += ["--hidden-size", "16", "--minibatches", "2", "--eval-every", "2"]
EPISODES = ["--env-id", "Navigation2D-v0", "--train-tasks", "5", "--tasks-per-iteration", "3", "--meta-batch-size", "3"]
EPISODES += ["--initial-episodes", "1", "--horizon", "5", "--updates", "2", "--batch-size", "4", "--context-size", "6"]
EPISODES += ["--hidden-size", "8", "--replay-size", "20", "--eval-every", "2"]
IMAGINED = ["--env-id", "Navigation2D-v0", "--action-scale", "1", "--num-models", "3", "--real-episodes", "2"]
IMAGINED += ["--episodes-per-task", "4", "--horizon", "6", "--hidden-size", "8", "--model-size", "8"]
IMAGINED += ["--model-epochs", "3", "--model-batch-size", "10", "--meta-steps", "2"]
STREAMS = ["--env-id", "Navigation2D-v0", "--num-worlds", "3", "--rollout-steps", "7", "--horizon", "5"]
STREAMS += ["--delay", "3", "--epochs", "2", "--minibatches", "2", "--eval-every", "2"]
META = ["--env-id", "Navigation2D-v0", "--num-worlds", "3", "--rollout-steps", "7", "--horizon", "5"]
META += ["--eval-every", "2"]
POLES = ["--meta-batch-size", "3", "--window-size", "7", "--horizon", "5", "--lifetime", "2", "--hidden-size", "8"]
POLES += ["--critic-size", "9", "--eval-every", "2", "--eval-steps", "2", "--eval-windows", "2", "--eval-episodes", "3"]
LIVES = ["--env-id", "SymABC-v0", "--meta-batch-size", "3", "--episodes-per-lifetime", "4", "--horizon", "5"]
LIVES += ["--steps", "3", "--unroll", "2", "--policy-size", "8", "--hidden-size", "8", "--eval-every", "2"]
BELIEFS = ["--meta-batch-size", "3", "--episodes-per-trial", "3", "--horizon", "5", "--hidden-size", "8"]
BELIEFS += ["--decoder-size", "7", "--policy-size", "9", "--buffer-size", "7", "--vae-updates", "2"]
BELIEFS += ["--vae-batch-size", "4", "--minibatches", "2", "--eval-every", "2"]
CONTEXTS = ["--env-id", "DarkRoomSmall-v0", "--meta-batch-size", "3", "--episodes-per-trial", "4", "--context", "2"]
CONTEXTS += ["--horizon", "5", "--hidden-size", "16", "--layers", "1", "--eval-every", "2"]
DRAW = fewshot.draw_glyphs  # which a test may have replaced
ENDLESS = ["--env-id", "Navigation2DEndless-v0"]
FLAGS = {  # of a run of a second; and what one iteration adds to env_steps where no episode ends early
    "maml_trpo": (TINY, 60),  # 3 tasks x 2 episodes x 5 steps x 2 batches
    "maml": (CURVES, 24),  # 3 tasks x (4 + 4) examples
    "fomaml": (CURVES, 24),
    "reptile": ([*CURVES, "--inner-steps", "2", "--inner-shots", "5"], 30),  # 3 tasks x 2 minibatches x 5 examples
    "in_context": (SETS, 24),
    "learned_optimizer": (DESCENTS, 18),  # 3 functions x 6 steps
    "protonet": (CLASSES, 60),  # 3 tasks x 4 classes x (2 + 3) examples
    "rl2_ppo": (TRIALS, 45),  # 3 tasks x 3 episodes x 5 steps
    "rl2_transformer_ppo": ([*TRIALS, "--layers", "1"], 45),
    "varibad_ppo": (BELIEFS, 45),
    "promp": ([*TINY, "--target-kl", "0.01"], 60),
    "reptile_ppo": ([*TINY, "--inner-steps", "2"], 60),
    "multitask_ppo": (TINY, 30),  # nobody adapts in training
    "pearl_sac": (EPISODES, 30),  # 3 tasks x 2 episodes x 5 steps
    "mbmpo": (IMAGINED, 36),  # 3 models x 2 real episodes x 6 steps
    "lirpg": (STREAMS, 21),  # 3 worlds x 7 steps
    "meta_gradient_a2c": (META, 21),
    "lifetime_rewards": (LIVES, 18),  # 3 lifetimes x 2 trajectories x 3 steps
    "meta_critic": (POLES, 21),  # likewise
    "dpt": (CONTEXTS, 30),  # 3 tasks x 2 episodes x 5 steps
    "ad": ([*CONTEXTS, "--learners", "4", "--source-episodes", "6", "--keep-every", "2"], 0),  # all before the first
}
ONE_TASK = ("lirpg", "meta_gradient_a2c")  # and one policy
BEFORE = {"ad": 120}  # env_steps before the first iteration: 4 learners x 6 episodes x 5 steps
BEFORE |= {"pearl_sac": 30}  # env_steps before the first iteration: 2 x 3 episodes, for each of 5 tasks at least one
each = pytest.mark.parametrize("name", FLAGS)


def test_every_file_has_its_flags_here():
    assert set(FLAGS) == {path.stem for path in (ROOT / "algos").glob("*.py")}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    threads = torch.get_num_threads()
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert torch.get_num_threads() == threads


def run(*flags: str, name: str = "maml_trpo", stop_at: int = 0) -> Path:
    """A run in this process, in a working directory of its own; its folder. `stop_at`: an iteration interrupted."""
    module, home = importlib.import_module(f"algos.{name}"), Path.cwd()

    class Interrupted(records.Run):
        def end_iteration(self, state, stats, evaluate):
            if state["iteration"] == stop_at:
                signal.raise_signal(signal.SIGINT)
            super().end_iteration(state, stats, evaluate)

    os.chdir(tempfile.mkdtemp(dir=home))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "Run", Interrupted)
        if fewshot.draw_glyphs is DRAW:
            patch.setattr(fewshot, "draw_glyphs", images)  # drawing takes seconds
        try:
            module.main([*FLAGS[name][0], *flags])
            return next((path.resolve() for path in Path().glob("runs/*")), None)
        finally:
            os.chdir(home)


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in lines]


def theta(folder: Path) -> dict:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state.get("theta") or state["eta"]


def script(*flags: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *TINY, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


@each
def test_folder_and_metrics(name):
    folder = run("--iterations", "3", *(ENDLESS if "Navigation2D-v0" in FLAGS[name][0] else []), name=name)
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "checkpoint.pt", "curve.png"}
    width = {"mbmpo": "num_models", **dict.fromkeys(ONE_TASK, "num_worlds")}.get(name, "meta_batch_size")
    (start,) = json.loads((folder / "args.json").read_text())
    assert start["flags"][width] == 3
    assert start["iteration"] == 0
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3]
    assert [row["env_steps"] for row in rows(folder)] == [BEFORE.get(name, 0) + FLAGS[name][1] * k for k in (1, 2, 3)]
    (what,) = {key[5:-3] for key in rows(folder)[-1] if re.fullmatch(r"test/\w+_k\d", key)}
    assert {f"test/{what}_k{k}" for k in range(2 if name in ("mbmpo", *ONE_TASK) else 3)} | {
        f"train/{what}_post",
        "test/gain_ci95",
    } <= set(rows(folder)[-1])


SCRIPTS = """
import json, os, runpy, sys
import gymnasium, matplotlib.figure, mujoco, torch, torch._dynamo, tqdm, tyro  # once, for all

failed = []
for script, *flags in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv, sys.path[0] = [script, *flags], os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        assert "wandb" not in sys.modules
        sys.exit()
    if os.wait()[1]:
        failed.append(script)
sys.exit(", ".join(failed) or None)
"""


def test_copies_beside_envs_run_from_anywhere(tmp_path):
    """As scripts, each in a process of its own, which is forked from one that has imported their libraries."""
    scripts = []
    for name, (flags, _) in FLAGS.items():
        scripts.append([str(tmp_path / f"my_{name}.py"), *flags, "--iterations", "1"])
        shutil.copy(ROOT / f"algos/{name}.py", scripts[-1][0])
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", SCRIPTS, json.dumps(scripts)]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert all(list(elsewhere.glob(f"runs/*__my_{name}__*/curve.png")) for name in FLAGS)


@each
def test_equal_seeds_give_equal_runs_whatever_the_global_generators_do(name):
    torch.manual_seed(1)
    first = run("--iterations", "3", name=name)
    torch.manual_seed(2), np.random.seed(3), random.seed(4)
    torch.rand(7)
    second = run("--iterations", "3", name=name)
    assert rows(first) == rows(second)
    assert rows(run("--iterations", "3", "--seed", "2", name=name)) != rows(first)


@each
def test_resume_equals_an_uninterrupted_run(name):
    flags = ["--iterations", "6", *(["--learn-inner-lr"] if name == "maml_trpo" else [])]
    whole = run(*flags, name=name)
    part = run(*flags, name=name, stop_at=4)
    assert [row["iteration"] for row in rows(part)] == [1, 2, 3, 4]
    assert not any(key.startswith("test/") for key in rows(part)[-1])  # its evaluation was left out, for the time being
    with open(part / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 5, "behind": "the checkpoint"}\n{"itera')  # what a killed run may leave
    run("--resume", str(part), name=name)
    assert rows(part) == rows(whole)
    assert [row["iteration"] for row in rows(part)] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(value, theta(whole)[key]) for key, value in theta(part).items())


@each
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_the_gpu_starts_from_the_same_tasks_and_ends(name):
    on_gpu, on_cpu = rows(run("--cuda", "--iterations", "2", name=name)), rows(run("--iterations", "2", name=name))
    assert [row["env_steps"] for row in on_gpu] == [row["env_steps"] for row in on_cpu]
    first = next(key for key in on_cpu[0] if key.startswith("train/") and "_p" in key)
    assert on_gpu[0][first] == pytest.approx(on_cpu[0][first], rel=0.05)


@pytest.mark.parametrize(("name", "encoder"), [("rl2_ppo", "lstm"), ("rl2_transformer_ppo", "snail")])
@pytest.mark.parametrize(("env_id", "horizon"), [("MouseCheese-v0", 30), ("SparseNavigation2D-v0", 5)])
def test_other_encoders_early_ends_and_continuous_actions(name, encoder, env_id, horizon):
    flags = ["--env-id", env_id, "--horizon", str(horizon), "--encoder", encoder, "--iterations", "4"]
    whole, part = run(*flags, name=name), run(*flags, name=name, stop_at=2)
    run(*flags, "--resume", str(part), name=name)
    assert rows(part) == rows(whole)
    last, full = rows(whole)[-1], 4 * 3 * 3 * horizon
    assert last["env_steps"] < full if env_id == "MouseCheese-v0" else last["env_steps"] == full
    assert last["test/return_trial"] == pytest.approx(sum(last[f"test/return_k{k}"] for k in range(3)), abs=1e-5)


@pytest.mark.parametrize("env_id", ["SparseNavigation2D-v0", "HopperRandParams-v0"])
def test_pearl_with_dense_rewards_with_early_ends_and_with_other_contexts(env_id):
    flags = ["--env-id", env_id, "--auto-entropy", "--next-obs", "--iterations", "4", "--horizon", "60"]
    flags += ["--replay-size", "90", *(["--dense-training"] if env_id == "SparseNavigation2D-v0" else [])]
    whole, part = run(*flags, name="pearl_sac"), run(*flags, name="pearl_sac", stop_at=2)
    run(*flags, "--resume", str(part), name="pearl_sac")
    assert rows(part) == rows(whole)
    steps, full = rows(whole)[-1]["env_steps"], (6 + 4 * 6) * 60
    assert steps < full if env_id == "HopperRandParams-v0" else steps == full
    assert theta(whole)["log_alpha"] != 0
    with pytest.raises(SystemExit, match=r"--resume .* must be the run's: --next-obs .*theta.encoder_w0"):
        importlib.import_module("algos.pearl_sac").main(["--resume", str(part), "--no-next-obs"])
    with pytest.raises(SystemExit, match=r"--resume .* must be the run's: --train-tasks \(5 and not 40\), recent"):
        importlib.import_module("algos.pearl_sac").main(["--resume", str(part), "--train-tasks", "40"])


@pytest.mark.parametrize("env_id", ["MouseCheese-v0", "SparseNavigation2D-v0", "HopperRandParams-v0", "DarkRoom-v0"])
def test_beliefs_with_early_ends_with_continuous_actions_and_with_other_decoders(env_id):
    flags = ["--env-id", env_id, "--iterations", "4", "--horizon", "30", "--decoded-beliefs", "9"]
    flags += [] if env_id == "MouseCheese-v0" else ["--decode-obs"]
    whole, part = run(*flags, name="varibad_ppo"), run(*flags, name="varibad_ppo", stop_at=2)
    run(*flags, "--resume", str(part), name="varibad_ppo")
    assert rows(part) == rows(whole)
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, part)]
    assert saved[0]["stored"] == saved[1]["stored"] == 12
    for key in ("phi", "theta", "buffer"):
        assert all(torch.equal(value, saved[1][key][name]) for name, value in saved[0][key].items())
    assert saved[0]["args"]["reward_decoder"] == ("cells" if env_id == "DarkRoom-v0" else "gaussian")
    last, full = rows(whole)[-1], 4 * 3 * 3 * 30
    assert last["env_steps"] < full if env_id[:2] in ("Mo", "Ho") else last["env_steps"] == full
    main = importlib.import_module("algos.varibad_ppo").main
    with pytest.raises(SystemExit, match=r"--resume .* must be the run's: --episodes-per-trial \(3 and not 2\)"):
        main(["--resume", str(part), "--episodes-per-trial", "2"])
    with pytest.raises(SystemExit, match=r"--resume .* must be the run's: --buffer-size \(7 and not 8\), buffer"):
        main(["--resume", str(part), "--buffer-size", "8"])


def test_the_step_size_falls_and_equal_rewards_do_no_harm():
    folder = run("--env-id", "MouseCheese-v0", "--horizon", "1", "--gamma", "0", "--iterations", "3", name="rl2_ppo")
    assert all(row["train/value_loss"] < 10 for row in rows(folder))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(3e-3 / 3)


@pytest.mark.parametrize("family", HORIZONS)
def test_the_horizon_follows_the_family(family):
    for name in ("rl2_ppo", "rl2_transformer_ppo", "varibad_ppo"):
        Args = importlib.import_module(f"algos.{name}").Args
        flags = ["--env-id", f"{family.__name__}-v0"]
        assert records.parse(Args, flags, "", name)[0].horizon == HORIZONS[family]
        assert records.parse(Args, [*flags, "--horizon", "7"], "", name)[0].horizon == 7


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile"])
@pytest.mark.parametrize("flags", [["--ways", "3"], ["--mlp", "--no-transductive"]])
def test_images(name, flags, monkeypatch):
    draw = fewshot.draw_glyphs
    monkeypatch.setattr(fewshot, "draw_glyphs", lambda classes, *rest: draw(40, *rest))
    flags = ["--env-id", "Glyphs-v0", "--hidden-sizes", "4", "4", "--shots", "1", "--iterations", "2", *flags]
    folder = run(*flags, name=name)
    assert 0 <= rows(folder)[-1]["test/accuracy_k2"] <= 1
    saved = records.last_flags(folder / "args.json")
    assert (saved["inner_lr"], saved["mlp"]) == ({"maml": 0.4, "fomaml": 0.1, "reptile": 0.003}[name], "--mlp" in flags)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_complete_checkpoint(number):
    command = [sys.executable, str(SCRIPT), *TINY, "--iterations", "100000", "--eval-every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not any(path.stat().st_size for path in Path().glob("runs/*/metrics.jsonl")):
        assert time.time() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    (folder,) = Path().glob("runs/*")
    done = rows(folder)[-1]["iteration"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == done
    run("--iterations", str(done + 2), "--resume", str(folder.resolve()))
    assert rows(folder)[-1]["iteration"] == done + 2


def test_kill_while_saving_never_leaves_a_broken_checkpoint(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from envs.records import save_checkpoint
for i in range(10**9):
    state = {{"algorithm": "maml_trpo", "args": {{}}, "i": i, "x": torch.full((500_000,), float(i))}}
    save_checkpoint(Path({str(tmp_path)!r}), state)
    print(i, flush=True)
"""
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(0.013 * attempt)
        process.kill()
        process.communicate()
        state = records.load_checkpoint(str(tmp_path), "maml_trpo", dict)
        assert torch.all(state["x"] == state["i"])


def flip(data: bytes) -> bytes:
    """One bit inside a tensor's bytes: the file still loads with torch.load."""
    place = data.index(b"FB", data.index(b"data/0")) + 2  # the padding before the record's content
    place += 80
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"not a checkpoint",
    "flipped bit": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_one_clear_line(damage):
    folder = run("--iterations", "1")
    path = folder / "checkpoint.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if damage == "flipped bit":
        torch.load(path, weights_only=True)  # does not notice
    with pytest.raises(SystemExit) as error:
        algorithm.main([*TINY, "--resume", str(folder)])
    assert str(folder) in error.value.code
    assert "\n" not in error.value.code


def test_a_checkpoint_of_something_else_is_one_clear_line():
    folder = run("--iterations", "1")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"algorithm": "reptile"}, folder / "checkpoint.pt")
    with pytest.raises(SystemExit, match="written by reptile"):
        algorithm.main(["--resume", str(folder)])
    torch.save(state | {"args": state["args"] | {"of_another_version": 1}}, folder / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"no usable checkpoint.*of_another_version"):
        algorithm.main(["--resume", str(folder)])
    torch.save({name: x for name, x in state.items() if name != "keys"}, folder / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"no usable checkpoint.*lacks keys.*older versions"):
        algorithm.main(["--resume", str(folder)])
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(
        SystemExit, match=r"--resume .*: --hidden-size \(8 and not 9\), theta.b0 is \(8,\) and not \(9,\), theta.b1"
    ):
        algorithm.main(["--resume", str(folder), "--hidden-size", "9"])
    with pytest.raises(SystemExit, match=r"--resume nowhere: no usable checkpoint"):
        algorithm.main(["--resume", "nowhere"])


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays():
    folder = run("--iterations", "2")
    before = (folder / "checkpoint.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write behind the limit fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    result = script("--iterations", "4", "--resume", str(folder), preexec_fn=limit)
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.replace("\r", "\n").splitlines() if "File too large" in line)
    assert re.match("iteration [34]: .*; the last whole checkpoint is kept: --resume", line)
    assert "Traceback" not in result.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_what_is_not_finite_ends_the_run_and_is_named(monkeypatch, what):
    """In the second iteration's query: each of 3 batches in the first (2 to train, 3 to evaluate) takes 5 steps."""
    from envs.navigation import Navigation2D

    calls, honest = [], Navigation2D._advance

    def spoilt_later(self, action):
        calls.append(1)
        obs, *others = honest(self, action)
        spoilt = torch.where(torch.arange(6)[:, None] == 4, torch.nan, obs)
        return spoilt if len(calls) == 33 else obs, *others

    monkeypatch.setattr(Navigation2D, "_advance", spoilt_later)
    if what == "reward":
        monkeypatch.setattr(Navigation2D, "_advance", honest)
        monkeypatch.setattr(
            Navigation2D,
            "_transition_reward",
            lambda self, *_: torch.where(torch.arange(6) == 4, *spoilt_rewards(self, calls)),
        )
    named = (
        rf"iteration 2: {what} nan in world 4, step 3, from Navigation2D; the last whole checkpoint is kept: --resume"
    )
    with pytest.raises(SystemExit, match=named):
        run("--iterations", "3", "--eval-every", "1")
    (folder,) = Path().glob("*/runs/*")
    assert [row["iteration"] for row in rows(folder)] == [1]


def spoilt_rewards(envs, calls: list) -> tuple:
    """(of world 4, of the others): honest ones, but for the 33rd step's."""
    calls.append(1)
    honest = -envs._obs.norm(dim=1)
    return (torch.full_like(honest, torch.nan) if len(calls) == 33 else honest), honest


def test_what_is_not_finite_before_a_checkpoint_does_not_promise_one(monkeypatch):
    from envs.navigation import Navigation2D

    monkeypatch.setattr(Navigation2D, "reward", staticmethod(lambda obs, action, next_obs, task: obs.sum(-1) / 0 * 0))
    with pytest.raises(SystemExit, match=r"iteration 1: reward nan in world 0, step 1, .*; nothing was saved yet$"):
        run("--iterations", "2")


def test_an_error_of_a_users_world_keeps_its_trace(monkeypatch):
    from envs.navigation import Navigation2D

    def broken(*_):
        raise OSError("the user's simulator is gone")

    monkeypatch.setattr(Navigation2D, "reward", staticmethod(broken))
    with pytest.raises(OSError, match="simulator"):
        run("--iterations", "2")


def test_a_missing_metrics_file_is_noted_and_begun_anew(capsys):
    folder = run("--iterations", "2")
    (folder / "metrics.jsonl").unlink()
    algorithm.main(["--resume", str(folder), "--iterations", "3"])
    assert "metrics.jsonl: lines of 2 iterations are missing" in capsys.readouterr().err
    assert [row["iteration"] for row in rows(folder)] == [3]


def test_what_cannot_be_written_is_one_line():
    Path("runs").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match=r"iteration 0: .*runs.*; nothing was saved yet"):
        algorithm.main([*TINY, "--iterations", "1"])


WRONG = {
    "maml_trpo": [
        ("--inner-lr", "nan"), ("--inner-lr", "-1"), ("--meta-batch-size", "0"), ("--gamma", "1.5"),
        ("--horizon", "-3"), ("--fisher-fraction", "2"), ("--max-kl", "0"), ("--seed", "-1"), ("--eval-steps", "0"),
        ("--cg-damping", "-1"), ("--max-kl", "inf"),
    ],
    "maml": [
        ("--inner-lr", "nan"), ("--outer-lr", "0"), ("--ways", "0"), ("--shots", "-1"), ("--hidden-sizes", "0"),
        ("--iterations", "0"), ("--eval-tasks", "0"), ("--seed", "2147483649"),
    ],
    "fomaml": [("--inner-lr", "inf"), ("--inner-steps", "0"), ("--hidden-sizes", "-4")],
    "reptile": [("--outer-lr", "-1"), ("--inner-shots", "0"), ("--inner-steps", "0"), ("--inner-lr", "nan")],
    "in_context": [
        ("--lr", "0"), ("--hidden-size", "24"), ("--layers", "0"), ("--shots", "0"), ("--hidden-sizes", "0"),
        ("--meta-batch-size", "-1"),
    ],
    "learned_optimizer": [
        ("--lr", "nan"), ("--unroll", "7"), ("--steps", "0"), ("--output-scale", "0"), ("--hidden-size", "0"),
        ("--layers", "0"), ("--eval-steps", "0"),
    ],
    "protonet": [
        ("--lr", "nan"), ("--train-ways", "0"), ("--ways", "0"), ("--shots", "0"), ("--halve-every", "0"),
        ("--hidden-sizes", "-4"), ("--eval-tasks", "0"),
    ],
    "rl2_ppo": [
        ("--lr", "nan"), ("--gamma", "1.01"), ("--gae-lambda", "-0.1"), ("--minibatches", "4"), ("--horizon", "0"),
        ("--episodes-per-trial", "0"), ("--entropy-coef", "-1"), ("--clip", "inf"), ("--epochs", "0"),
    ],
    "varibad_ppo": [
        ("--buffer-size", "2"), ("--vae-updates", "0"), ("--kl-weight", "-1"), ("--vae-lr", "nan"),
        ("--latent-size", "0"), ("--decoded-beliefs", "0"), ("--minibatches", "4"), ("--clip", "1.1"),
        ("--horizon", "0"), ("--vae-batch-size", "-3"), ("--seed", "-1"), ("--policy-size", "0"),
    ],
    "rl2_transformer_ppo": [("--layers", "0"), ("--hidden-size", "24"), ("--max-grad-norm", "0")],
    "dpt": [
        ("--episodes-per-trial", "1"), ("--context", "0"), ("--policies", "0"), ("--hidden-size", "24"),
    ],
    "ad": [
        ("--keep-every", "0"), ("--keep-every", "3"), ("--source-lr", "1.1"), ("--source-gamma", "-1"),
        ("--learners", "0"), ("--context", "-1"), ("--source-episodes", "0"),
    ],
    "promp": [
        ("--outer-lr", "nan"), ("--clip", "1.5"), ("--kl-coef", "-1"), ("--target-kl", "inf"), ("--epochs", "0"),
        ("--inner-lr", "0"), ("--inner-steps", "0"), ("--kl-coef", "0"),
    ],
    "reptile_ppo": [
        ("--outer-lr", "1.1"), ("--inner-epochs", "0"), ("--inner-steps", "0"), ("--clip", "-1"), ("--inner-lr", "nan"),
    ],
    "multitask_ppo": [
        ("--lr", "0"), ("--minibatches", "7"), ("--epochs", "0"), ("--entropy-coef", "-1"), ("--inner-lr", "inf"),
        ("--inner-epochs", "0"), ("--eval-steps", "0"),
    ],
    "pearl_sac": [
        ("--lr", "nan"), ("--gamma", "1.5"), ("--tau", "-1"), ("--meta-batch-size", "6"), ("--kl-weight", "-1"),
        ("--tasks-per-iteration", "6"), ("--replay-size", "4"), ("--eval-prior-episodes", "4"), ("--latent-size", "0"),
        ("--posterior-episodes", "0"), ("--prior-episodes", "0"), ("--entropy-coef", "0"), ("--reward-scale", "inf"),
    ],
    "mbmpo": [
        ("--inner-lr", "-1"), ("--num-models", "0"), ("--horizon", "5"), ("--model-lr", "nan"), ("--meta-steps", "0"),
        ("--max-kl", "0"), ("--data-size", "9"), ("--real-episodes", "0"), ("--model-epochs", "0"), ("--gamma", "2"),
    ],
    "lifetime_rewards": [
        ("--unroll", "1"), ("--steps", "0"), ("--inner-lr", "nan"), ("--inner-gamma", "1.1"), ("--gamma", "-0.1"),
        ("--episodes-per-lifetime", "0"), ("--entropy-coef", "-1"), ("--inner-max-norm", "0"), ("--lr", "inf"),
        ("--policy-size", "0"), ("--hidden-size", "-8"), ("--horizon", "0"), ("--meta-batch-size", "0"),
        ("--seed", "-1"), ("--gae-lambda", "1.1"), ("--value-lr", "0"),
    ],
    "lirpg": [
        ("--delay", "0"), ("--reward-lr", "nan"), ("--intrinsic-coef", "-1"), ("--extrinsic-coef", "inf"),
        ("--minibatches", "22"), ("--gae-lambda", "1.1"), ("--num-worlds", "0"), ("--live-bonus", "-1"),
        ("--clip", "0"),
    ],
    "meta_gradient_a2c": [
        ("--gamma", "1"), ("--gamma", "0"), ("--gae-lambda", "1"), ("--reference-gamma", "1.1"), ("--trace", "-0.1"),
        ("--meta-lr", "-1"), ("--meta-lr", "nan"), ("--lr", "0"), ("--value-coef", "-1"), ("--entropy-coef", "inf"),
        ("--num-worlds", "0"), ("--rollout-steps", "0"), ("--reference-lambda", "2"), ("--seed", "-1"),
    ],
    "meta_critic": [
        ("--td-lambda", "1.1"), ("--gamma", "-1"), ("--critic-lr", "0"), ("--own-critic-lr", "nan"),
        ("--lifetime", "0"), ("--window-size", "0"), ("--latent-size", "-1"), ("--eval-windows", "0"),
        ("--eval-episodes", "-1"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "flag", "value"), [(name, *pair) for name, pairs in WRONG.items() for pair in pairs])
def test_a_bad_value_is_refused_before_anything_starts(name, flag, value, capsys):
    with pytest.raises(SystemExit) as error:
        importlib.import_module(f"algos.{name}").main([*FLAGS[name][0], flag, value])
    shown = capsys.readouterr()
    message = " ".join((shown.out + shown.err).replace("│", " ").split())
    assert error.value.code != 0
    assert flag in message
    assert "allowed is" in message
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "protonet", "in_context"])
def test_wrong_flags_of_supervised_files_are_refused_before_anything_starts(name, monkeypatch):
    blank = torch.zeros(fewshot.CLASSES, fewshot.INSTANCES, 28, 28, dtype=torch.uint8)  # drawing takes seconds
    monkeypatch.setattr(fewshot, "draw_glyphs", lambda classes, instances, *_: blank[:classes, :instances])
    main = importlib.import_module(f"algos.{name}").main
    ways = r"--train-ways {}: allowed is 2 to 4400, the training classes"
    sets = {"protonet": "--shots 16 --queries 5", "reptile": "--shots 16 --eval-queries 5"}
    too_many = f"{sets.get(name)}: allowed are 20 in all" if name in sets else "--shots 11: allowed is 1 to 10"
    extra = {
        "reptile": [
            (["--env-id", "Glyphs-v0", "--inner-steps", "11"], "--inner-steps 11: allowed is 1 to 10 disjoint minib"),
        ],
        "protonet": [
            (["--env-id", "Sinusoid-v0"], "--env-id Sinusoid-v0: it has no classes; allowed is Glyphs-v0, Omniglot-v0"),
            *((["--train-ways", number], ways.format(number)) for number in ("1", "4401")),
        ],
    }
    for flags, message in (
        *(extra.get(name, [])),
        (["--env-id", "HalfCheetahDir-v0"], r"--env-id HalfCheetahDir-v0 .*allowed.*Glyphs-v0"),
        (["--env-id", "Omniglot-v0", "--data", "nowhere"], r"--data nowhere: .*Omniglot"),
        (["--env-id", "Omniglot-v0"], r"--data"),
        (["--env-id", "Glyphs-v0", "--data", "nowhere"], r"--data"),
        (["--env-id", "Glyphs-v0", "--ways", "424"], r"--ways 424: allowed is 2 to 423"),
        (["--env-id", "Glyphs-v0", "--ways", "101", "--eval-split", "valid"], r"--ways 101: allowed is 2 to 100"),
        (["--env-id", "Glyphs-v0", *sets.get(name, "--shots 11").split()], too_many),
        *([] if name == "protonet" else [(["--eval-split", "valid"], "--eval-split valid: allowed is test; only")]),
        *([] if torch.cuda.is_available() else [(["--cuda"], "--cuda: torch sees no CUDA device")]),
    ):
        with pytest.raises(SystemExit, match=message):
            main(flags)
    assert not Path("runs").exists()


def test_other_wrong_flags_are_refused_before_anything_starts(capsys):
    with pytest.raises(SystemExit, match=r"--env-id Nowhere-v0 .*allowed.*HalfCheetahDir-v0"):
        algorithm.main(["--env-id", "Nowhere-v0"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--cuda: torch sees no CUDA device"):
            algorithm.main([*TINY, "--cuda"])
    for name in ("maml_trpo", "pearl_sac", "mbmpo"):
        with pytest.raises(SystemExit, match=r"--env-id Bandit5-v0: its actions are choices"):
            importlib.import_module(f"algos.{name}").main(["--env-id", "Bandit5-v0"])
    for name, env_id in (("dpt", "MouseCheese-v0"), ("ad", "TwoStep-v0")):
        with pytest.raises(SystemExit, match=rf"--env-id {env_id}: it is not tabular"):
            importlib.import_module(f"algos.{name}").main(["--env-id", env_id])
    with pytest.raises(SystemExit, match=r"--dense-training: .*Navigation2D-v0 .*no dense reward"):
        importlib.import_module("algos.pearl_sac").main([*EPISODES, "--dense-training"])
    for name in ("rl2_ppo", "rl2_transformer_ppo"):
        with pytest.raises(SystemExit, match=r"--env-id Sinusoid-v0 .*allowed.*Bandit5-v0"):
            importlib.import_module(f"algos.{name}").main(["--env-id", "Sinusoid-v0"])
    with pytest.raises(SystemExit):
        algorithm.main([*TINY, "--estimator", "magic"])
    assert "loaded" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_wandb_works_offline_and_is_refused_without_login(tmp_path):
    quiet = {**os.environ, "HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    refused = script("--track", "--iterations", "1", env=quiet, stdin=subprocess.DEVNULL)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("--track: no W&B login")
    offline = script("--track", "--wandb-mode", "offline", "--iterations", "1", env=quiet)
    assert offline.returncode == 0, offline.stderr
    assert list(tmp_path.glob("wandb/offline-run-*"))


# Learning tests. Their bounds come from what seeds gave, as each docstring says: a sound algorithm fails for one seed
# in thousands (a bound is four standard deviations from the mean; of logarithms, where values are skewed), one that
# learns nothing always.


def test_maml_trpo_learns():
    """Navigation2D: after one inner step held-out returns of 12 seeds were -14 to -18 (untrained: -39 and less), 22 to
    60 more than at first and 23 to 28 more than without the step. Some episodes end at the goal."""
    preset = ["--env-id", "Navigation2D-v0", "--action-scale", "1", "--meta-batch-size", "10", "--iterations", "12"]
    algorithm.main([*preset, "--eval-steps", "1"])
    (folder,) = Path().glob("runs/*")
    first, last = rows(folder)[0], rows(folder)[-1]
    assert last["test/return_k1"] > max(first["test/return_k1"] + 8, -24)
    assert last["test/return_k1"] > last["test/return_k0"] + 15
    assert last["env_steps"] < 12 * 2 * 10 * 20 * 100


NAVIGATION = ["--env-id", "Navigation2DEndless-v0", "--action-scale", "1", "--meta-batch-size", "10"]
NAVIGATION += ["--eval-every", "100", "--episodes-per-task", "10"]


@pytest.mark.parametrize(
    ("name", "flags", "least", "rise", "gain"),
    [
        ("promp", ["--iterations", "12", "--outer-lr", "0.003"], -25, 5, 5),
        ("reptile_ppo", ["--iterations", "12"], -30, 1.5, 10),
        ("multitask_ppo", ["--iterations", "15"], -42, 3, 5),
    ],
)
def test_the_gradient_family_learns(name, flags, least, rise, gain):
    """Navigation, held-out goals: returns after adaptation, how much more than at first (0 where nothing is learned:
    all evaluations play the same tasks with the same noise), how much more than without. Ten seeds of promp gave -14 to
    -18, 22 to 84, 16 to 32, reptile_ppo -19 to -25, 6.6 to 32, 18 to 25, multitask_ppo -24 to -34, 9.5 to 46, 12 to 18.
    """
    importlib.import_module(f"algos.{name}").main([*NAVIGATION, *flags])
    (folder,) = Path().glob("runs/*")
    first, last = rows(folder)[0], rows(folder)[-1]
    assert last["test/return_k3"] > max(first["test/return_k3"] + rise, least)
    assert last["test/return_k3"] > last["test/return_k0"] + gain


def test_the_oracle_is_above_whoever_does_not_see_the_task():
    """Navigation, where nothing but the goal matters: with it ten seeds gave -8 to -13; without it, after as many
    iterations, -36 to -49, which is what standing still in the middle earns."""
    importlib.import_module("algos.multitask_ppo").main([*NAVIGATION, "--iterations", "15", "--task-given"])
    (folder,) = Path().glob("runs/*")
    assert rows(folder)[-1]["test/return_k0"] > -25


@pytest.mark.parametrize("name", ["promp", "reptile_ppo", "multitask_ppo"])
def test_videos_of_the_gradient_family(name):
    folder = run("--iterations", "1", "--capture-video", *(["--task-given"] * (name == "multitask_ppo")), name=name)
    assert (folder / "adaptation.gif").stat().st_size > 1000


def test_prototypes_learn(monkeypatch):
    """Characters never trained on, 5-way 1-shot: 0.69 in two seeds; after one iteration 0.39, by chance 0.2."""
    draw = fewshot.draw_glyphs
    monkeypatch.setattr(fewshot, "draw_glyphs", lambda classes, *rest: draw(150, *rest))
    flags = ["--hidden-sizes", "16", "16", "16", "--iterations", "400", "--eval-every", "400", "--eval-tasks", "200"]
    importlib.import_module("algos.protonet").main(flags)
    (folder,) = Path().glob("runs/*")
    assert rows(folder)[-1]["test/accuracy_k1"] > 0.55


@pytest.mark.parametrize(("flags", "key"), [([], "test/loss_k10"), (["--sequential"], "test/loss_k9")])
def test_readers_of_examples_learn(flags, key):
    """Sinusoids, the held-out loss with ten points (--sequential: nine): two seeds gave 0.42 and 0.51 (0.64 and
    0.82); after one iteration 4.4 to 5.1."""
    preset = ["--hidden-size", "32", "--layers", "2", "--meta-batch-size", "32", "--lr", "0.003", "--iterations", "400"]
    importlib.import_module("algos.in_context").main([*preset, "--eval-every", "400", "--eval-tasks", "200", *flags])
    (folder,) = Path().glob("runs/*")
    assert rows(folder)[-1][key] < 1.5


def test_a_learned_optimizer_learns():
    """Quadratics, the held-out loss after 100 steps: 2.7 and 3.8 in two seeds; after one iteration 34 and 39."""
    flags = ["--iterations", "15", "--meta-batch-size", "32", "--lr", "0.01", "--eval-every", "15"]
    importlib.import_module("algos.learned_optimizer").main(flags)
    (folder,) = Path().glob("runs/*")
    assert rows(folder)[-1]["test/loss_k100"] < 10


@pytest.mark.parametrize(("name", "steps"), [("maml", 10), ("fomaml", 10), ("reptile", 32)])
def test_supervised_files_learn(name, steps):
    """Sinusoids: the held-out loss after adaptation, of 12 seeds and three files 0.31 to 1.33, is 0.10 to 0.48 of the
    one before; without training it is 3.7 to 4.9, and 0.85 to 1.16 of the one before."""
    flags = ["--iterations", "1200", "--eval-every", "1200", "--eval-tasks", "200"]
    importlib.import_module(f"algos.{name}").main(flags)
    (folder,) = Path().glob("runs/*")
    last = rows(folder)[-1]
    assert last[f"test/loss_k{steps}"] < min(2.5, 0.75 * last["test/loss_k0"])


def test_pearl_learns():
    """Navigation, unseen goals: two episodes are worth something (5.2 and 5.4 in two seeds; 3.0 to 4.5 in ten, when
    contexts were by the means), and the next one beats standing still, which earns -7.65 on average (-4.3)."""
    flags = ["--env-id", "Navigation2DEndless-v0", "--horizon", "20", "--train-tasks", "200"]
    flags += ["--tasks-per-iteration", "100"]
    flags += ["--initial-episodes", "5", "--hidden-size", "64", "--batch-size", "32", "--context-size", "40"]
    flags += ["--gamma", "0.9", "--kl-weight", "0.01", "--tau", "0.02", "--lr", "0.003", "--reward-scale", "20"]
    importlib.import_module("algos.pearl_sac").main([*flags, "--updates", "700", "--iterations", "5"])
    (folder,) = Path().glob("runs/*")
    last = rows(folder)[-1]
    assert last["test/return_k2"] > max(last["test/return_k0"] + 1.5, -7.3)


def test_mbmpo_learns():
    """A point mass: what 2,250 real steps are worth (9 to 23 in twelve seeds; returns then are -0.7 to -1.9), and what
    was imagined is what comes true (within 0.13)."""
    flags = ["--env-id", "Navigation2DEndless-v0", "--action-scale", "1", "--horizon", "30"]
    flags += ["--episodes-per-task", "10"]
    flags += ["--model-size", "32", "--meta-steps", "10", "--real-episodes", "3", "--iterations", "5"]
    importlib.import_module("algos.mbmpo").main(flags)
    (folder,) = Path().glob("runs/*")
    first, last = rows(folder)[0], rows(folder)[-1]
    assert last["env_steps"] == 5 * 5 * 3 * 30
    assert last["test/return_k1"] > max(first["train/return_post"] + 3, -4)  # of the untrained policy
    assert last["test/return_k1"] == pytest.approx(last["train/imagined_post"], abs=0.5)


def test_lirpg_learns_from_the_learned_reward_alone():
    """Navigation, rewards paid every 10 steps, never shown to the policy; standing still is worth -8.9 here.

    Seeds 1 to 60 ended at -1.8 on average, with a standard deviation of 0.4, the worst at -2.8: -4 is 5 of them away.
    """
    flags = ["--env-id", "Navigation2DEndless-v0", "--horizon", "20", "--delay", "10", "--rollout-steps", "40"]
    importlib.import_module("algos.lirpg").main([*flags, "--iterations", "40", "--lr", "0.001"])
    (folder,) = Path().glob("runs/*")
    last = rows(folder)[-1]
    assert records.last_flags(folder / "args.json")["extrinsic_coef"] == 0
    assert last["test/return_k1"] > max(last["test/return_k0"] + 3, -4)


def test_meta_gradients_raise_gamma_until_the_far_end_is_worth_the_way():
    """The corridor, gamma from 0.8, where the near end is worth more: two seeds of 250 iterations ended at gamma 0.979
    and 0.987 and at a return of 1, the far end's; the near one's is 0.25."""
    importlib.import_module("algos.meta_gradient_a2c").main(["--iterations", "300", "--eval-every", "300"])
    (folder,) = Path().glob("runs/*")
    first, last = rows(folder)[0], rows(folder)[-1]
    assert first["train/gamma"] == pytest.approx(0.8)
    assert last["train/gamma"] > 0.9
    assert last["test/return_k0"] < 0.4
    assert last["test/return_k1"] > 0.6


def test_lirpg_resumes_only_what_fits_and_goes_on_in_the_midst_of_episodes():
    flags = ["--env-id", "HopperForward-v0", "--horizon", "30", "--delay", "7", "--iterations", "4"]
    whole, part = run(*flags, name="lirpg"), run(*flags, name="lirpg", stop_at=2)
    run(*flags, "--resume", str(part), name="lirpg")
    assert rows(part) == rows(whole)
    saved = torch.load(part / "checkpoint.pt", weights_only=True)
    assert (saved["sums"]["step"] > 0).any()
    assert any("train/return_post" in row for row in rows(whole))
    for flag, value in (("--num-worlds", "4"), ("--horizon", "29"), ("--env-id", "AntForward-v0"), ("--seed", "2")):
        with pytest.raises(SystemExit, match=rf"--resume .* must be the run's: {flag} \(.* and not {value}\)"):
            importlib.import_module("algos.lirpg").main(["--resume", str(part), flag, value])


def test_mbmpo_resumes_only_what_fits():
    folder = run("--iterations", "1", name="mbmpo")
    main = importlib.import_module("algos.mbmpo").main
    for flag, value in (("--model-size", "9"), ("--hidden-size", "9"), ("--num-models", "4")):
        with pytest.raises(SystemExit, match=rf"--resume .* must be the run's: {flag} \(.* and not {value}\)"):
            main(["--resume", str(folder), flag, value])


def test_lifetimes_resume_in_their_midst():
    """Worlds, policies and memories go on where they were, past several ends of lifetimes; other sizes are refused."""
    flags = ["--episodes-per-lifetime", "2", "--iterations", "16"]
    whole, part = run(*flags, name="lifetime_rewards"), run(*flags, name="lifetime_rewards", stop_at=4)
    middle = torch.load(part / "checkpoint.pt", weights_only=True)
    assert middle["worlds"]["_steps"].any()  # in the midst of episodes
    assert middle["worlds"]["episode"].any()
    assert all(memory[0].any() for memory in middle["memory"].values())
    main = importlib.import_module("algos.lifetime_rewards").main
    for flag, value in (
        ("--policy-size", "9"), ("--hidden-size", "9"), ("--meta-batch-size", "4"), ("--env-id", "RandomABC-v0"),
        ("--horizon", "4"), ("--episodes-per-lifetime", "5"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=rf"--resume .*: .*must be the run's: {flag} \(.* and not {value}\)"):
            main(["--resume", str(part), flag, value])
    run(*flags, "--resume", str(part), name="lifetime_rewards")
    assert rows(part) == rows(whole)
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, part)]
    for key in ("eta", "phi", "theta", "worlds"):
        assert all(torch.equal(value, saved[1][key][name]) for name, value in saved[0][key].items())
    for one, other in zip(*(state["memory"].values() for state in saved), strict=True):
        assert torch.equal(torch.stack(one), torch.stack(other))
    assert torch.equal(saved[0]["generator"], saved[1]["generator"])
    assert not torch.equal(middle["worlds"]["births"], saved[0]["worlds"]["births"])  # some ended on the way


@pytest.mark.parametrize("name", ["lifetime_rewards", "meta_critic", *ONE_TASK])
def test_lifetimes_need_worlds_that_start_one_by_one_and_some_of_them_choices(name):
    main = importlib.import_module(f"algos.{name}").main
    with pytest.raises(SystemExit, match="--env-id MouseCheese-v0: its worlds can only start together"):
        main([*FLAGS[name][0], "--env-id", "MouseCheese-v0"])
    if name not in ONE_TASK:
        with pytest.raises(SystemExit, match=r"--env-id HalfCheetahDir-v0: its actions are continuous.* choices"):
            main([*FLAGS[name][0], "--env-id", "HalfCheetahDir-v0"])
    assert not Path("runs").exists()


def test_lifetime_rewards_learn():
    """FixedABC: newborn policies earn more in ten episodes than by the first reward (0.21 to 0.42 in 12 seeds), than by
    the extrinsic one (0.20 to 0.41), and more in the tenth than in the first (0.47 to 0.86)."""
    flags = ["--env-id", "FixedABC-v0", "--meta-batch-size", "32", "--episodes-per-lifetime", "10"]
    flags += ["--iterations", "120", "--policy-size", "16", "--hidden-size", "32", "--lr", "0.01", "--value-lr", "0.01"]
    flags += ["--inner-lr", "1", "--gamma", "0.97"]
    importlib.import_module("algos.lifetime_rewards").main(flags)
    (folder,) = Path().glob("runs/*")
    first, last = rows(folder)[0], rows(folder)[-1]
    assert last["test/return_lifetime"] > first["test/return_lifetime"] + 0.05
    assert last["test/return_lifetime"] > last["extrinsic/return_lifetime"] + 0.05
    assert last["test/return_k9"] > last["test/return_k0"] + 0.15


def test_the_meta_critic_teaches():
    """CartPole, unseen lengths: 20 windows with the frozen critic are worth 34 to 46 to new actors (ten seeds)."""
    flags = ["--iterations", "500", "--eval-every", "500", "--eval-steps", "1", "--eval-episodes", "5"]
    importlib.import_module("algos.meta_critic").main(flags)
    (folder,) = Path().glob("runs/*")
    last = rows(folder)[-1]
    assert last["test/return_k1"] > last["test/return_k0"] + 20


def test_the_meta_critic_is_for_choices_and_resumes_only_what_fits():
    main = importlib.import_module("algos.meta_critic").main
    with pytest.raises(SystemExit, match=r"--env-id Navigation2D-v0: its actions are continuous.* choices"):
        main(["--env-id", "Navigation2D-v0"])
    assert not Path("runs").exists()
    folder = run("--iterations", "1", name="meta_critic")
    for flag in ("--hidden-size", "--critic-size", "--latent-size", "--meta-batch-size", "--lifetime", "--horizon"):
        with pytest.raises(SystemExit, match=rf"--resume .* must be the run's: {flag} \(.* and not 4\)"):
            main(["--resume", str(folder), flag, "4"])
