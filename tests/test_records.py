"""envs/records.py and what worlds and processes offer to every algorithm; the oracles: NumPy, a single process."""

import copy
import json
import os
import socket
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Generator

from envs import NotFinite, make, make_supervised, records, screen, summarise, tracking
from envs.core import stratified
from envs.processes import half_width


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def parts():
    """The same worlds in one process, and in each of three."""
    whole, *thirds = (make("Navigation2D-v0", number, 5).unwrapped for number in (6, 2, 2, 2))
    for number, third in enumerate(thirds):
        third.shard = number, 3
    return whole, thirds


# ---------------------------------------------------------------- what worlds draw


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_noise_of_all_parts_is_that_of_one_process(parts, dim, uniform):
    whole, thirds = parts
    numbers = whole.noise(seeded(1), 6, 12, 2, dim=dim, uniform=uniform)
    assert torch.equal(numbers, (torch.rand if uniform else torch.randn)(6, 12, 2, generator=seeded(1)))
    own = [third.noise(seeded(1), 6, 12, 2, dim=dim, uniform=uniform) for third in thirds]
    assert own[0].shape == ((2, 12, 2) if dim == 0 else (6, 4, 2))
    assert torch.equal(torch.cat(own, dim), numbers)


def test_minibatches_share_each_of_the_whole_ones(parts):
    whole, thirds = parts
    batches = list(whole.minibatches(11, 3, seeded(2)))
    assert sorted(torch.cat(batches).tolist()) == list(range(11))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    own = [list(third.minibatches(11, 3, seeded(2))) for third in thirds]
    for k, batch in enumerate(batches):
        assert torch.equal(torch.cat([x[k] for x in own]), batch)


def test_chosen_numbers_are_different_and_shared(parts):
    whole, thirds = parts
    chosen = whole.choose(9, 6, seeded(3))
    assert len(set(chosen.tolist())) == 6
    assert set(chosen.tolist()) < set(range(9))
    assert torch.equal(torch.cat([third.choose(9, 6, seeded(3)) for third in thirds]), chosen)


def test_worlds_take_their_part_of_all_tasks(parts):
    whole, thirds = parts
    tasks = whole.sample_tasks(6, seeded(4))
    obs, _ = whole.reset(seed=5, options={"tasks": tasks})
    starts = [third.reset(seed=5, options={"tasks": tasks})[0] for third in thirds]
    assert torch.equal(torch.cat(starts), obs)
    assert torch.equal(torch.cat([third.tasks for third in thirds]), tasks)


def test_total_counts_and_one_thread_is_taken_back(parts):
    whole, _ = parts
    assert whole.total(torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == 3
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with whole.one_thread():
            assert torch.get_num_threads() == 1
        with pytest.raises(KeyError), whole.one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- the test set


@pytest.mark.parametrize("env_id", ["HalfCheetahVel-v0", "Navigation2D-v0", "Bandit5-v0", "HalfCheetahDir-v0"])
def test_the_test_set_is_fixed_and_its_tasks_are_test_tasks(env_id):
    envs = make(env_id, 1, 5, discrete=True).unwrapped
    torch.manual_seed(1)
    tasks, generator = envs.test_set(40)
    torch.manual_seed(2)
    again, other = make(env_id, 7, 9, discrete=True).unwrapped.test_set(40)
    assert torch.equal(tasks, again)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=other))
    assert tasks.shape == (40, envs.task_dim)
    drawn = {tuple(task) for task in envs.sample_tasks(4096, seeded(20_170_309), "test").tolist()}
    assert {tuple(task) for task in tasks.tolist()} <= drawn


def test_the_test_set_covers_the_range_evenly():
    """Of HalfCheetahVel's speeds, uniform from 0 to 2: about one in each of 40 equal parts of those that are drawn."""
    envs = make("HalfCheetahVel-v0", 1, 5).unwrapped
    tasks = np.sort(envs.test_set(40)[0].numpy().ravel())
    drawn = np.sort(envs.sample_tasks(100_000, seeded(1), "test").numpy().ravel())
    place = np.searchsorted(drawn, tasks) / len(drawn)  # the share of speeds below each task's
    assert np.abs(place - (np.arange(40) + 0.5) / 40).max() < 2.5 / 40
    assert torch.equal(envs.test_set(20)[0], envs.test_set(40)[0][:20])  # a smaller set is the beginning
    random = np.sort(envs.sample_tasks(40, seeded(3), "test").numpy().ravel())  # the control
    assert np.abs(np.searchsorted(drawn, random) / len(drawn) - (np.arange(40) + 0.5) / 40).max() > 2.5 / 40


def test_one_point_is_taken_from_each_part_of_the_plane():
    points = torch.rand(4096, 2, generator=seeded(1), dtype=torch.float64)
    chosen = stratified(points, 64, seeded(2))
    assert len(set(chosen.tolist())) == 64
    cells = np.histogram2d(*points[chosen].numpy().T, bins=4, range=[[0, 1], [0, 1]])[0]
    assert (np.abs(cells - 4) <= 2).all()  # 4 in each; of 64 random points one cell in ten would be further away


@pytest.mark.parametrize("number", [20, 40, 64, 100, 500])
@pytest.mark.parametrize("name", ["HalfCheetahVel", "Navigation2D", "RandomABC", "Bandit5", "Bandit10"])
def test_small_test_sets_lean_to_no_side(name, number):
    """Means of each coordinate and of all, in units of the spread, are no larger than those of random tasks."""
    envs = make(f"{name}-v0", 1, 5, discrete=True).unwrapped
    drawn = envs.sample_tasks(50_000, seeded(1), "test").double()
    tasks = envs.test_set(number)[0].double()
    shift = (tasks.mean(0) - drawn.mean(0)) / drawn.std(0)
    assert shift.abs().max() < 3 / number**0.5
    assert shift.mean().abs() < 2 / (number * len(shift)) ** 0.5


def test_the_test_set_has_the_mean_and_the_spread_of_the_family():
    envs = make("GaussianBandit5-v0", 1, 5, discrete=True).unwrapped
    tasks = envs.test_set(400)[0]
    assert tasks.mean(0).abs().max() < 4 / np.sqrt(400)
    assert (tasks.std(0) - 1).abs().max() < 4 / np.sqrt(2 * 400)


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("HalfCheetahVel-v0", "held-out tasks"),
        ("HalfCheetahDir-v0", "test tasks (the training tasks: this family has two)"),
        ("HalfCheetahForward-v0", "test tasks (the training tasks: this family has one)"),
        ("FixedABC-v0", "test tasks (the training tasks: this family has one)"),
        ("EmptyRooms-v0", "held-out tasks"),
    ],
)
def test_only_what_is_held_out_is_called_so(env_id, name):
    assert make(env_id, 1, 5, discrete=True).unwrapped.test_set_name() == name


def test_supervised_families_have_a_fixed_test_set_too():
    tasks = make_supervised("Sinusoid-v0", 5, 2)
    first, second = tasks.test_set(50), make_supervised("Sinusoid-v0", 5, 2).test_set(50)
    assert torch.equal(first[0], second[0])
    assert len(set(first[0][:, 0].tolist())) == 50


# ---------------------------------------------------------------- what is logged


def test_tensors_are_logged_as_means_and_intervals():
    x = torch.randn(7, 3, generator=seeded(6))
    line = summarise({"a": 2.5, "b": x, "gain_ci95": x, "c": x[0, 0], "d": 3})
    assert line["a"] == 2.5
    assert line["d"] == 3
    assert line["b"] == pytest.approx(float(np.mean(x.numpy())))
    assert line["c"] == float(x[0, 0])
    t = 2.086  # of Student's distribution with 20 degrees of freedom, from a table
    assert line["gain_ci95"] == pytest.approx(t * float(np.std(x.numpy(), ddof=1)) / np.sqrt(21), rel=1e-3)


def test_intervals_are_over_different_tasks():
    """Twenty copies of two tasks are two tasks; the order and the tasks' form do not matter."""
    gain = torch.randn(40, 3, generator=seeded(7))
    tasks = torch.tensor([[1.0], [-1.0]]).repeat(20, 1)
    line = summarise({"test/gain_ci95": (gain, tasks)})
    forward, backward = gain[::2].mean().item(), gain[1::2].mean().item()
    assert line["test/tasks"] == 2
    assert line["test/gain_ci95"] == pytest.approx(12.706 * np.std([forward, backward], ddof=1) / np.sqrt(2), rel=1e-4)
    wide = summarise({"a/x_ci95": (gain, torch.arange(40)), "a/y_ci95": (gain.mean(1), torch.arange(40)[:, None])})
    assert wide["a/tasks"] == 40
    assert wide["a/x_ci95"] == wide["a/y_ci95"]
    t = 2.0227  # with 39 degrees of freedom
    assert wide["a/x_ci95"] == pytest.approx(t * np.std(gain.mean(1).numpy(), ddof=1) / np.sqrt(40), rel=1e-3)


def test_the_interval_of_a_single_task_is_over_its_episodes():
    gain = torch.randn(5, 6, generator=seeded(8))
    line = summarise({"test/gain_ci95": (gain, torch.ones(5, 1))})
    assert line["test/tasks"] == 1
    t = 2.0452  # with 29 degrees of freedom
    assert line["test/gain_ci95"] == pytest.approx(t * np.std(gain.numpy(), ddof=1) / np.sqrt(30), rel=1e-3)


def test_intervals_hold_the_mean_in_95_of_100_cases():
    """4,000 samples of 2 to 30 normal numbers; the share of misses is 5 %, give or take four standard deviations."""
    for n in (2, 5, 12, 30):
        x = torch.randn(4000, n, generator=seeded(n), dtype=torch.float64)
        misses = sum(abs(float(row.mean())) > half_width(row) for row in x) / len(x)
        assert abs(misses - 0.05) < 4 * np.sqrt(0.05 * 0.95 / len(x))


def test_a_number_that_is_not_finite_is_named():
    records.refuse_not_finite({"x": 1.0, "y": 3})
    with pytest.raises(NotFinite, match=r"not finite: \{'y': nan, 'z': -inf\}"):
        records.refuse_not_finite({"x": 1.0, "y": float("nan"), "z": -float("inf")})


def test_errors_in_one_line(tmp_path):
    one_line = pytest.raises(SystemExit, match=r"^iteration 3: no space; nothing was saved yet$")
    with one_line, records.errors_in_one_line({"iteration": 3}, tmp_path):
        raise records.CannotWriteError("no space")
    (tmp_path / "checkpoint.pt").touch()
    one_line = pytest.raises(SystemExit, match=f"^iteration 3: a is nan; .* checkpoint is kept: --resume {tmp_path}$")
    with one_line, records.errors_in_one_line({"iteration": 3}, tmp_path):
        raise NotFinite("a is nan")
    for error in (KeyError, OSError, FloatingPointError):
        with pytest.raises(error), records.errors_in_one_line({"iteration": 3}, tmp_path):
            raise error("a fault of a program keeps its trace")


# ---------------------------------------------------------------- folders


@dataclass
class Args:
    env_id: str = "Toy/World-v0"
    seed: int = 1
    iterations: int = 9
    inner_lr: float = 0.1
    eval_every: int = 3
    evaluate: str = ""
    resume: str = ""
    cuda: bool = False
    track: bool = False


def test_folders_are_never_shared_and_tell_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records.time, "strftime", lambda _: "20260101-000000")
    names = [records.new_folder(Args(), "toy").name for _ in range(3)]
    assert names == ["Toy-World-v0__toy__1__20260101-000000" + end for end in ("", "-2", "-3")]
    named = records.new_folder(Args(inner_lr=0.5, iterations=2), "toy").name
    assert named == "Toy-World-v0__toy__1__inner-lr-0.5__20260101-000000"


def test_only_one_process_has_a_folder(tmp_path):
    first = records.lock(tmp_path)
    with pytest.raises(SystemExit, match="another process writes this run"):
        records.lock(tmp_path)
    os.close(first)
    os.close(records.lock(tmp_path))


def test_metrics_are_cut_by_iteration_and_torn_lines_dropped(tmp_path):
    lines = [
        json.dumps({"iteration": k, "try": t}) for k, t in ((1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (5, 1), (4, 2))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "[1, 2]", "null", '{"iter']))
    rows, dropped = records.read_metrics(tmp_path, 4)
    assert [(row["iteration"], row["try"]) for row in rows] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert dropped == len(lines) + 3 - 4
    assert len(records.read_metrics(tmp_path)[0]) == 5
    assert records.read_metrics(tmp_path / "nowhere") == ([], 0)


def test_flags_of_all_starts_are_kept_and_old_files_understood(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"seed": 7}))
    assert records.last_flags(tmp_path / "args.json") == {"seed": 7}
    (tmp_path / "args.json").write_text(json.dumps([{"flags": {"seed": 7}}, {"flags": {"seed": 8}}]))
    assert records.last_flags(tmp_path / "args.json") == {"seed": 8}
    assert records.read_starts(tmp_path / "nothing.json") == []


# ---------------------------------------------------------------- checkpoints


def state_of(args: Args) -> dict:
    theta = {"w": torch.arange(3.0), "deep": {"list": [torch.zeros(2), 5]}}
    return {"algorithm": "toy", "iteration": 4, "theta": theta, "args": vars(args)}


def test_a_checkpoint_comes_back_and_flags_beside_it_count(tmp_path):
    records.save_checkpoint(tmp_path, state_of(Args(iterations=7, inner_lr=0.3)))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    for words in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        args, saved = records.parse(Args, [*words, "--iterations", "8"], "", "toy")
        assert (args.seed, args.iterations, args.inner_lr, args.resume) == (1, 8, 0.3, str(tmp_path))
        assert torch.equal(saved["theta"]["w"], torch.arange(3.0))
        assert saved["changed"] == {"iterations": [7, 8]}
    args, saved = records.parse(Args, ["--evaluate", str(tmp_path), "--seed", "4"], "", "toy")
    assert (args.seed, args.iterations, args.evaluate, args.resume) == (4, 7, str(tmp_path), "")
    assert records.parse(Args, ["--seed", "5"], "", "toy") == (Args(seed=5), {})
    with pytest.raises(SystemExit, match="give one of them"):
        records.parse(Args, ["--evaluate", "a", "--resume", "b"], "", "toy")


def test_every_key_of_a_checkpoint_is_missed_by_name(tmp_path):
    records.save_checkpoint(tmp_path, state_of(Args()))
    whole = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    paths = list(records.keys(whole))
    assert {"keys", "algorithm", "theta.w", "theta.deep.list.1", "args.seed"} <= set(paths)
    for path in [path for path in paths if not path.startswith("keys.") and "list." not in path]:
        state = copy.deepcopy(whole)
        *folders, last = path.split(".")
        place = state
        for name in folders:
            place = place[name]
        del place[last]
        torch.save(state, tmp_path / "checkpoint.pt")
        with pytest.raises(SystemExit, match=rf"run .*: no usable checkpoint.pt there: it lacks {path}\b"):
            records.load_checkpoint(str(tmp_path), "toy", Args)


def test_incomparable_changes_are_refused_and_others_told(tmp_path):
    records.save_checkpoint(tmp_path, state_of(Args()))
    for words in (["--seed", "2"], ["--env-id", "Other-v0"]):
        with pytest.raises(SystemExit, match=rf"--resume .*: must be the run's: {words[0]} \(.* and not {words[1]}\)"):
            records.parse(Args, ["--resume", str(tmp_path), *words], "", "toy")
    _, saved = records.parse(Args, ["--resume", str(tmp_path), "--inner-lr", "1"], "", "toy")
    assert saved["changed"] == {"inner_lr": [0.1, 1.0]}


def test_other_shapes_are_named():
    saved, made = (
        {"x": {"w": torch.zeros(2, 3), "b": torch.zeros(3)}},
        {"x": {"w": torch.zeros(2, 4), "c": torch.zeros(3)}},
    )
    args = Args(resume="run")
    records.check_shapes(args, saved=saved, made=saved)
    records.check_shapes(args, saved=saved, made={"data": {}} | saved)
    with pytest.raises(SystemExit) as error:
        records.check_shapes(args, saved=saved, made=made)
    for part in (
        "--resume run",
        "x.w is (2, 3) and not (2, 4)",
        "x.b is (3,) and not None",
        "x.c is None and not (3,)",
    ):
        assert part in str(error.value)


def test_evaluations_and_checkpoints_are_due():
    def due(first: bool) -> list[int]:
        return [k for k in range(1, 11) if records.is_due(Args(iterations=10, eval_every=4), k, first)]

    assert due(first=True) == [1, 4, 8, 10]
    assert due(first=False) == [4, 8, 10]


# ---------------------------------------------------------------- what is shown


def test_the_progress_line_keeps_what_was_last_evaluated(capsys):
    bar = screen.Progress("toy", total=3, done=1)
    bar.end_iteration({"iteration": 2, "test/return_k0": 1.25, "test/return_k1": 2.5})
    bar.doing("updating", 1200, 4000)
    bar.end_iteration({"iteration": 3, "train/return_pre": 7.0})
    bar.close()
    first, last = capsys.readouterr().err.splitlines()  # in a file a line now and then, and the last one
    assert first.startswith("toy: 2 / 3 iterations, 0 s: test/return_k0=1.25, test/return_k1=2.5")
    assert last.startswith("toy: 3 / 3 iterations, 0 s: test/return_k0=1.25, test/return_k1=2.5, train/return_pre=7")


def test_a_file_of_progress_stays_small(capsys, monkeypatch):
    """A week of a thousand iterations a second is some hundreds of lines."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock.now)
    bar = screen.Progress("toy", total=10**9, done=0)
    for _ in range(60_480):
        clock.now += 10
        bar.doing("updating", 1, 2)
    assert 50 < len(capsys.readouterr().err.splitlines()) < 300


def test_what_cannot_be_written_is_dropped():
    """A pipe that nobody reads, a full disk, a closed file, and none at all."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(os.devnull) as closed:
        pass
    full = os.open("/dev/full", os.O_WRONLY)
    streams = [os.fdopen(writer, "w"), os.fdopen(full, "w"), closed, None]
    for stream in streams:
        lenient = screen.Lenient(stream)
        for _ in range(3):
            assert lenient.write("x" * 9000) == 9000
            lenient.flush()
        lenient.close()
        assert not lenient.isatty()
    for stream in streams[:2]:
        stream.close()  # nothing is left in it that could fail now


@pytest.mark.parametrize(("env", "words"), [({}, "W&B did not start"), ({"https_proxy": ""}, "cannot be reached")])
def test_weights_and_biases_without_a_network_is_one_line(env, words, monkeypatch):
    """The doubles: a wandb whose init fails; an address where nobody listens."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    if words == "W&B did not start":
        server.listen()

    def init(**_):
        raise RuntimeError("timed out\nafter long")

    settings = lambda **_: SimpleNamespace(base_url=f"http://127.0.0.1:{server.getsockname()[1]}")  # noqa: E731
    double = SimpleNamespace(Settings=settings, init=init, api=SimpleNamespace(api_key="key"))
    monkeypatch.setitem(sys.modules, "wandb", double)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=rf"--track: .*{words}.*--wandb-mode offline"):
        tracking.Tracker(SimpleNamespace(wandb_mode="online"), "name")
    server.close()


def test_without_weights_and_biases_installed_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--track: wandb is not installed: pip install wandb"):
        tracking.Tracker(SimpleNamespace(wandb_mode="offline"), "name")


def test_a_failing_tracker_is_told_once_and_ends_nothing(capsys, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("gone")

    run = SimpleNamespace(id="abc", log=fail, finish=fail)
    double = SimpleNamespace(Settings=lambda **_: None, init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", double)
    tracker = tracking.Tracker(SimpleNamespace(wandb_mode="offline"), "name")
    tracker.log({"iteration": 1})
    tracker.finish()
    assert capsys.readouterr().err.count("the run goes on") == 1
