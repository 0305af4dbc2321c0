"""envs/records.py and what worlds and processes offer to every algorithm; the oracles: NumPy, a single process."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Generator

from envs import make, records, summarise


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


# ---------------------------------------------------------------- what is logged


def test_tensors_are_logged_as_means_and_intervals():
    x = torch.randn(7, 3, generator=seeded(6))
    line = summarise({"a": 2.5, "b": x, "gain_ci95": x, "c": x[0, 0], "d": 3})
    assert line["a"] == 2.5
    assert line["d"] == 3
    assert line["b"] == pytest.approx(float(np.mean(x.numpy())))
    assert line["c"] == float(x[0, 0])
    assert line["gain_ci95"] == pytest.approx(1.96 * float(np.std(x.numpy())) / np.sqrt(21))


def test_a_number_that_is_not_finite_is_named_and_not_written(tmp_path):
    state = {"iteration": 4, "env_steps": 20, "seconds": 1.5}
    assert records.write_metrics(tmp_path, state, {"x": torch.ones(3)}) == state | {"x": 1.0}
    with pytest.raises(FloatingPointError, match=r"not finite: \{'y': nan\}"):
        records.write_metrics(tmp_path, state, {"x": 1.0, "y": torch.tensor([1.0, float("nan")])})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == state | {"x": 1.0}


def test_errors_in_one_line():
    one_line = pytest.raises(SystemExit, match="iteration 3: no space; the last whole checkpoint is kept")
    with one_line, records.errors_in_one_line({"iteration": 3}):
        raise OSError("no space")
    with pytest.raises(KeyError), records.errors_in_one_line({"iteration": 3}):
        raise KeyError("a fault of the program keeps its trace")


# ---------------------------------------------------------------- checkpoints


@dataclass
class Args:
    env_id: str = "Toy/World-v0"
    seed: int = 1
    iterations: int = 9
    resume: str = ""
    track: bool = False


def test_a_checkpoint_comes_back_and_flags_beside_it_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, tracker = records.open_run(Args(), "toy", 0)
    assert tracker is None
    assert folder.name.startswith("Toy-World-v0__toy__1__")
    assert json.loads((folder / "args.json").read_text()) == vars(Args())
    state = {"algorithm": "toy", "theta": {"w": torch.arange(3.0)}, "args": vars(Args(iterations=7))}
    records.save_checkpoint(folder, state)
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "checkpoint.pt"}
    args, saved = records.parse(Args, ["--resume", str(folder), "--seed", "5"], "", "toy")
    assert (args.seed, args.iterations, args.resume) == (5, 7, str(folder))
    assert torch.equal(saved["theta"]["w"], torch.arange(3.0))
    assert records.parse(Args, ["--seed", "5"], "", "toy") == (Args(seed=5), {})


def test_resuming_drops_lines_after_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"iter')
    records.open_run(Args(resume=str(tmp_path)), "toy", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_other_shapes_are_named():
    saved, made = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}, {"w": torch.zeros(2, 4), "c": torch.zeros(3)}
    records.check_shapes("run", saved=saved, made=saved)
    with pytest.raises(SystemExit) as error:
        records.check_shapes("run", saved=saved, made=made)
    for part in ("--resume run", "w is (2, 3) and not (2, 4)", "b is (3,) and not None", "c is None and not (3,)"):
        assert part in str(error.value)


def test_the_progress_line_keeps_what_was_last_evaluated(capsys):
    bar = records.progress_line(SimpleNamespace(iterations=3), "toy", 1)
    bar.show({"iteration": 2, "test/return_k0": 1.25, "test/return_k1": 2.5})
    bar.show({"iteration": 3, "train/return_pre": 7.0})
    bar.close()
    assert bar.n == 3
    assert bar.shown == {"test/return_k0": "1.25", "test/return_k1": "2.5", "train/return_pre": "7"}
    assert "3/3" in capsys.readouterr().err
