"""PEARL's --compile: the results of the run without it, alone, under torchrun and resumed; compiled once.

What is traced runs as torch's own operators here. With the compiler itself, a minute or more on two cores:
INDUCTOR=1 python -m pytest tests/test_compile.py
"""

import os
import shutil
from functools import partial

import pytest
import torch

from algos import pearl_sac
from envs import summarise
from tests.double_precision import float64, seeded  # noqa: F401
from tests.test_processes import RUNS, checkpoint, leaves, rows, start
from tests.test_round_trips import Worlds

ARGS = partial(
    pearl_sac.Args, updates=4, train_tasks=6, tasks_per_iteration=6, meta_batch_size=4, batch_size=7, context_size=3,
    hidden_size=8, auto_entropy=True,
)  # fmt: skip


def learned(args: pearl_sac.Args) -> tuple[dict, dict]:
    """Weights behind two iterations' updates on the same random transitions, and the last statistics."""
    state = pearl_sac.init_state(Family(4), args, seeded(0))
    for name in ("replay", "recent"):
        for field in pearl_sac.Transitions._fields:
            state[name][field].normal_(generator=seeded(1))
        state[name]["mask"].fill_(1)
        state[name]["count"] += 5
    optimizer = torch.optim.Adam(state["theta"].values(), args.lr, fused=True)
    for generator in (seeded(3), seeded(4)):
        stats = pearl_sac.learn(Family(4), state, optimizer, args, generator, pause=lambda done: None)
    weights = {f"{part}.{name}": x for part in ("theta", "target") for name, x in state[part].items()}
    return weights, summarise(stats)


class Family(Worlds):
    def sample_tasks(self, n, generator, split):
        return torch.randn(n, 1, generator=generator)


by_hand = pytest.mark.skipif("INDUCTOR" not in os.environ or not shutil.which("g++"), reason="slow; needs g++")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of torch, in its compiler
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=by_hand)])
def test_compiled_updates_are_the_eager_ones_and_compiled_once(backend, monkeypatch):
    real, modes = torch.compile, []

    def compile_whole(function, mode):
        modes.append(mode)
        return real(function, backend=backend, fullgraph=True)  # one graph, or an error

    monkeypatch.setattr(torch, "compile", compile_whole)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, stats = learned(ARGS(compile=True))
    assert modes == ["reduce-overhead"] * 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    expected, eager_stats = learned(ARGS())
    assert len(modes) == 2
    assert stats == pytest.approx(eager_stats, rel=1e-10)
    start = pearl_sac.init_state(Family(4), ARGS(), seeded(0))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        part, key = name.split(".")
        assert not torch.equal(value, start[part][key]), name
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name


def test_two_processes_then_one_that_resumes(tmp_path):
    flags = ["tests/torchrun_double.py", "pearl_sac", *RUNS["pearl_sac"].split()]
    assert start(tmp_path / "eager", 1, *flags, "--iterations", "2").wait(300) == 0
    assert start(tmp_path / "compiled", 2, *flags, "--iterations", "1", "--compile").wait(500) == 0
    (folder,) = (tmp_path / "compiled").glob("runs/*")
    resume = [*flags[:2], "--resume", f"runs/{folder.name}", "--iterations", "2"]
    assert start(tmp_path / "compiled", 1, *resume).wait(500) == 0
    assert checkpoint(tmp_path / "compiled")["args"]["compile"]
    for one, other in zip(rows(tmp_path / "compiled"), rows(tmp_path / "eager"), strict=True):
        one["seconds"] = other["seconds"] = 0
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    found, expected = (leaves(checkpoint(tmp_path / name)) for name in ("compiled", "eager"))
    for path, value in expected.items():
        if path.startswith(("/theta", "/target", "/replay")):
            assert torch.allclose(found[path], value, rtol=1e-6, atol=1e-9), path
