"""Every file of algos/ with `--cuda`, on a pretended GPU (tests/pretended_gpu.py): it runs, its numbers are those of
the CPU, and it asks no more of the GPU than tests/golden/gpu_budgets.json says.

There, for each file and each of its flags in RUNS, is how often the second iteration launches an operation, waits for
the GPU and copies to it, and so the second evaluation; and what a step of the worlds, an epoch, an update or the like
adds, from the difference to a run with more of them. What costs more is a regression. What costs less, and a change
that must cost more, is recorded anew, so that the file stays true:

    .venv/bin/python -m tests.test_gpu_path                       all files of algos/
    .venv/bin/python -m tests.test_gpu_path maml_trpo promp       these only

A new file of algos/ needs an entry in RUNS, and a record. Launches have a tolerance, for versions of torch differ in
what an operation is made of; waits and uploads have none.
"""

import contextlib
import importlib
import io
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from envs import TaskVectorEnv, fewshot, records, render
from tests import test_golden
from tests.pretended_gpu import Counts, pretended_gpu
from tests.test_golden import (
    BELIEFS,
    CLASSES,
    CONTEXT,
    CONTEXTS,
    CURVES,
    DESCENTS,
    EXAMPLES,
    GOLDEN,
    HISTORIES,
    IMAGES,
    LIVES,
    META,
    MODELS,
    POINT,
    POLES,
    STREAMS,
    TRIALS,
    WALKS,
)

ALGORITHMS = sorted(path.stem for path in (GOLDEN.parent.parent / "algos").glob("*.py"))
BUDGETS = GOLDEN / "gpu_budgets.json"
TOLERANCE = 0.05  # of launches
TRPO = f"{POINT}--episodes-per-task 2 --cg-damping 1 "
CHEETAH = "--env-id HalfCheetahDir-v0 --meta-batch-size 2 --episodes-per-task 2 --horizon 5 --hidden-size 8 "
CHEETAH += "--eval-steps 1 --cg-damping 1 "
# For each file runs, and for each run what is counted per unit: a flag, and two of its values.
RUNS = {
    "ad": {f"--env-id DarkRoomSmall-v0 --horizon 5 {HISTORIES}": {}},
    "dpt": {
        f"--env-id Bandit5-v0 {CONTEXTS}": {"step": ("--context", 3, 4)},
        f"--env-id TabularMDP-v0 --horizon 4 {CONTEXTS}": {"step": ("--horizon", 4, 6)},
    },
    "fomaml": {CURVES: {"inner step": ("--inner-steps", 1, 2)}, IMAGES: {}},
    "in_context": {
        f"{EXAMPLES}--shots 4": {"layer": ("--layers", 2, 3)},
        f"{EXAMPLES}--shots 4 --sequential --encoder gru": {},
        f"{EXAMPLES}--env-id Glyphs-v0 --ways 3 --hidden-sizes 4 5 --shots 2 --encoder snail": {},
    },
    "learned_optimizer": {
        DESCENTS: {"step of the optimiser": ("--steps", 6, 9)},
        f"{DESCENTS}--env-id GlyphNets-v0 --meta-batch-size 1": {},
    },
    "lifetime_rewards": {
        f"--env-id SymABC-v0 --hidden-size 8 {LIVES}": {"step": ("--steps", 3, 5), "update": ("--unroll", 2, 3)}
    },
    "lirpg": {f"--env-id Navigation2D-v0 {STREAMS}": {"step": ("--rollout-steps", 7, 9), "epoch": ("--epochs", 2, 3)}},
    "maml": {CURVES: {"inner step": ("--inner-steps", 1, 2)}, IMAGES: {}},
    "maml_trpo": {
        TRPO: {"step": ("--horizon", 5, 8), "inner step": ("--inner-steps", 1, 2)},
        CHEETAH: {"step": ("--horizon", 5, 8)},
    },
    "mbmpo": {
        f"--env-id Navigation2D-v0 --action-scale 1 --horizon 6 {MODELS}--cg-damping 1": {
            "step": ("--horizon", 6, 8),
            "meta step": ("--meta-steps", 2, 3),
            "epoch of models": ("--model-epochs", 2, 3),
        }
    },
    "meta_gradient_a2c": {f"--env-id Navigation2D-v0 {META}": {"step": ("--rollout-steps", 7, 9)}},
    "meta_critic": {POLES: {"step": ("--window-size", 7, 9)}},
    "multitask_ppo": {
        f"{POINT}--episodes-per-task 2": {"step": ("--horizon", 5, 8), "epoch": ("--epochs", 2, 3)},
    },
    "pearl_sac": {
        f"--env-id Navigation2D-v0 --horizon 5 {CONTEXT}": {"step": ("--horizon", 5, 8), "update": ("--updates", 3, 5)},
        f"--env-id AntDir-v0 --horizon 5 {CONTEXT}": {"step": ("--horizon", 5, 8)},
    },
    "promp": {
        f"{POINT}--episodes-per-task 2": {
            "step": ("--horizon", 5, 8),
            "epoch": ("--epochs", 2, 3),
            "inner step": ("--inner-steps", 1, 2),
        }
    },
    "protonet": {CLASSES: {}, f"{CLASSES}--matching": {}},
    "reptile": {CURVES: {"inner step": ("--inner-steps", 1, 2)}, IMAGES: {}},
    "reptile_ppo": {
        f"{POINT}--episodes-per-task 2 --inner-steps 2": {
            "step": ("--horizon", 5, 8),
            "epoch": ("--inner-epochs", 2, 3),
        }
    },
    "varibad_ppo": {
        f"{BELIEFS}--horizon 5": {
            "step": ("--horizon", 5, 8),
            "epoch": ("--epochs", 3, 4),
            "update of beliefs": ("--vae-updates", 2, 3),
        }
    },
    "rl2_ppo": {TRIALS: {"step": ("--horizon", 5, 8), "epoch": ("--epochs", 2, 3)}},
    "rl2_transformer_ppo": {
        f"{TRIALS}--encoder transformer": {"step": ("--horizon", 5, 8), "epoch": ("--epochs", 2, 3)},
        f"{TRIALS}--encoder snail": {},
    },
}
SLOW = f"{WALKS}--encoder snail", f"{WALKS}--encoder lstm"  # of the golden files; what is left out is seen elsewhere


def images(classes, instances, *_, **__):
    """In place of drawn characters, which would take ten seconds."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (classes, instances, fewshot.SIDE, fewshot.SIDE), generator=generator).to(torch.uint8)


@contextlib.contextmanager
def silent():
    """Nothing on the terminal but what comes before an error; one thread, and images instead of drawings."""
    threads, told = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.object(fewshot, "draw_glyphs", images),
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(told),
        ):
            yield
    except BaseException:
        print(told.getvalue())
        raise
    finally:
        torch.set_num_threads(threads)


def start(name: str, flags: str) -> None:
    """Run a file in the current folder, with an evaluation in each iteration and with MuJoCo on the CPU."""
    algorithm = importlib.import_module(f"algos.{name}")
    more = {"eval_every": "--eval-every 1", "physics": "--physics mujoco"}
    told = [words for field, words in more.items() if field in algorithm.Args.__annotations__]
    with silent():
        algorithm.main(f"{flags} {' '.join(told)}".split())


def measure(name: str, flags: str, evaluates: bool = True) -> tuple[dict[str, Counts], int]:
    """What the second iteration of a run (without its evaluation) and its evaluation ask; the steps of that iteration.

    The first one is another thing: optimizers make their state, and what is kept for later is made. Without `evaluates`
    there are no evaluations, to save time.
    """
    marks = defaultdict(list)
    steps = 0
    step, end_iteration = TaskVectorEnv.step, records.Run.end_iteration
    evaluated = records.Run.evaluated if evaluates else lambda run, evaluate: {}

    def counted_step(envs, action):
        nonlocal steps
        steps += 1
        return step(envs, action)

    def marked(method, label):
        def call(*args, **kwargs):
            marks[f"{label} begins"].append((counts.copy(), steps))
            result = method(*args, **kwargs)
            marks[f"{label} has ended"].append((counts.copy(), steps))
            return result

        return call

    importlib.import_module(f"algos.{name}")
    with (
        mock.patch.object(TaskVectorEnv, "step", counted_step),
        mock.patch.object(records.Run, "evaluated", marked(evaluated, "evaluation")),
        mock.patch.object(records.Run, "end_iteration", marked(end_iteration, "end")),
        mock.patch.object(render, "learning_curve", return_value=""),
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        pretended_gpu() as counts,
    ):
        start(name, f"{flags} --cuda --iterations 2")
    (_, (evaluation_begins, _)), (_, (evaluation_ends, _)) = marks["evaluation begins"], marks["evaluation has ended"]
    (begins, first_step), (ends, last_step) = marks["end has ended"][0], marks["end begins"][1]
    found = {"iteration": ends.since(begins), "evaluation": evaluation_ends.since(evaluation_begins)}
    return found, last_step - first_step


def per_unit(name: str, flags: str, unit: str, flag: str, few: int, many: int) -> dict[str, float]:
    """What one more of something costs in an iteration: a step of the worlds, or what `flag` counts."""
    (less, few_steps), (more, many_steps) = (
        measure(name, f"{flags} {flag} {value}", evaluates=False) for value in (few, many)
    )
    units = many_steps - few_steps if unit == "step" else many - few
    less, more = less["iteration"].totals(), more["iteration"].totals()
    return {kind: round((more[kind] - less[kind]) / units, 2) for kind in less}


def budget(name: str, flags: str) -> tuple[dict[str, dict], dict[str, Counts]]:
    """What a run costs: all of an iteration and an evaluation, and what one more of each unit adds; and its counts."""
    found, _ = measure(name, flags)
    result = {part: counts.totals() for part, counts in found.items()}
    return result | {unit: per_unit(name, flags, unit, *values) for unit, values in RUNS[name][flags].items()}, found


def differences(now: dict, recorded: dict) -> list[str]:
    """What costs more or less than recorded, in words."""
    told = [f"{part}: not recorded" for part in now.keys() - recorded] + [f"{x}: gone" for x in recorded.keys() - now]
    for part in now.keys() & recorded:
        for kind, number in now[part].items():
            least = most = recorded[part][kind]
            if kind == "launches":
                least, most = least * (1 - TOLERANCE), most * (1 + TOLERANCE)
            if not least <= number <= most:
                which = "MORE" if number > most else "fewer"
                told.append(f"{part}: {which} {kind} than recorded, {number} and not {recorded[part][kind]}")
    return told


def places(found: dict[str, Counts]) -> list[str]:
    """Where an iteration and an evaluation wait and copy."""
    return [
        f"{part}, {kind}: {number} x {place}"
        for part, counts in found.items()
        for kind in ("waits", "uploads")
        for place, number in getattr(counts, kind).most_common()
    ]


def recorded_budgets() -> dict:
    """The golden file: by file of algos/ and flags."""
    return json.loads(BUDGETS.read_text())


X = torch.arange(-2.0, 3.0)


def asked(function) -> Counts:
    """What a function of X on the pretended device asks of it."""
    with pretended_gpu() as counts:
        x = X.to("cuda")
        before = counts.copy()
        function(x)
    return counts.since(before)


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x[0].item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: f"{x[0]:.1f}",
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64).numpy(),
        lambda x: torch.zeros(5).copy_(x),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.clone().__setitem__(x > 0, x[:2]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.linalg.solve(torch.eye(5, device=x.device), x),
        lambda x: torch.vmap(lambda y: y * 2)(x)[0].item(),
        lambda x: torch.func.grad(lambda y: y.square().sum())(x)[0].item(),
        lambda x: torch.save(x, io.BytesIO()),
    ],
)
def test_what_waits_is_counted(reading):
    counts = asked(reading)
    assert (counts.waits.total(), counts.uploads.total()) == (1, 0)


@pytest.mark.parametrize(
    "copying",
    [
        lambda x: X.to(x),
        lambda x: X.to("cuda"),
        lambda x: X.cuda(),
        lambda x: torch.empty_like(x).copy_(X),
        lambda x: torch.tensor([1, 2], device="cuda"),
        lambda x: torch.as_tensor(3.0, device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: x[[0, 2]],
        lambda x: x[..., [0, 2]],
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.clone().__setitem__([0, 2], x[:2]),
        lambda x: torch.vmap(lambda y: y[[0, 2]])(x.expand(3, 5)),
        lambda x: torch.func.grad(lambda y: y[[0, 2]].sum())(x),
    ],
)
def test_what_is_copied_to_the_device_is_counted(copying):
    counts = asked(copying)
    assert (counts.waits.total(), counts.uploads.total()) == (0, 1)


def test_what_does_not_wait_is_not_counted():
    def compute(x):
        index = torch.arange(2, device=x.device)
        y = torch.where(x > 0, x, 0.0)[index].square().sum().sqrt() + torch.tensor(
            2.0
        )  # a number may come from the CPU
        x.clone()[x > 0] = 0.0  # by masked_fill
        return torch.zeros(3, device="cuda") + y

    assert asked(compute).totals() | {"launches": 0} == {"launches": 0, "waits": 0, "uploads": 0}


def test_launches_are_those_of_what_computes():
    assert asked(lambda x: x[1:].view(2, 2).T[None].expand(3, 2, 2).detach()).launches.total() == 0
    assert asked(lambda x: (x + 1).exp_().sum()).launches == {"add": 1, "exp_": 1, "sum": 1}
    assert asked(lambda x: torch.empty(3, device="cuda")).launches.total() == 0
    assert asked(lambda x: torch.zeros(3, device="cuda")).launches.total() == 1


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x + X,
        lambda x: X * x,
        lambda x: torch.cat([x, X]),
        lambda x: torch.stack([x[0], X[0]]),
        lambda x: torch.where(X > 0, x, 0.0),
        lambda x: X.clone().add_(x[0]),
        lambda x: x.clone().__setitem__(torch.arange(5, device="cuda"), X),
        lambda x: X[torch.arange(2, device="cuda")],
        lambda x: x.gather(0, torch.arange(2)),
        lambda x: torch.vmap(lambda y: y + X)(x.expand(3, 5)),
        lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda x: x.clone().normal_(generator=torch.Generator()),
        lambda x: torch.rand_like(x, generator=torch.Generator()),
        lambda x: torch.randn(3, generator=torch.Generator("cuda")),
    ],
)
def test_a_mix_of_devices_is_refused(mixing):
    with pytest.raises(RuntimeError, match=r"same device|type for generator"):
        asked(mixing)


@pytest.mark.parametrize("reading", [lambda x: x.numpy(), lambda x: np.asarray(x), lambda x: np.add(x, 1)])
def test_numpy_is_refused(reading):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        asked(reading)


def test_it_says_that_it_is_on_the_device_and_gives_true_gradients():
    said = []

    def objective(x):
        said.append((x.device.type, x.is_cuda, torch.zeros(2, device=x.device).device == x.device))
        return x.pow(3).sum()

    with pretended_gpu():
        x = X.to("cuda").requires_grad_()
        objective(x).backward()
        gradient = torch.vmap(torch.func.grad(objective))(x.detach().expand(2, 5))
        optimizer = torch.optim.Adam([x], 0.1)
        optimizer.step()
        assert (X.device.type, X.is_cuda, x.grad.device) == ("cpu", False, x.device)
        assert torch.device("cuda").type == "cuda"
        y = X.to("cuda")
        assert y.add_(1) is y
        found = x.grad.cpu(), gradient[1].cpu(), x.detach().cpu()
    assert said == [("cuda", True, True)] * 2
    expected = X.clone().requires_grad_()
    expected.pow(3).sum().backward()
    torch.optim.Adam([expected], 0.1).step()
    torch.testing.assert_close(found, (expected.grad, expected.grad, expected.detach()))


def test_all_is_as_before_afterwards():
    before = torch.cuda.is_available(), torch.cuda.device_count(), torch.Generator, records.Tensor
    with pretended_gpu():
        x = X.to("cuda")
    assert (torch.cuda.is_available(), torch.cuda.device_count(), torch.Generator, records.Tensor) == before
    with pytest.raises(RuntimeError, match="after the end"):
        x + 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_file_asks_no_more_of_a_gpu_than_recorded(name):
    again = f"`python -m tests.test_gpu_path {name}`"
    assert name in RUNS, f"algos/{name}.py has no budget: give it flags in RUNS of tests/test_gpu_path.py, then {again}"
    recorded = recorded_budgets().get(name, {})
    assert list(recorded) == [flags.strip() for flags in RUNS[name]], f"not recorded with these flags: {again}"
    for flags in RUNS[name]:
        now, found = budget(name, flags)
        told = differences(now, recorded[flags.strip()])
        assert not told, "\n".join(
            [f"{name} {flags}", *told, f"If it must cost more, or costs less, record it: {again}", *places(found)]
        )


def test_budgets_are_of_files_that_are_there():
    assert set(RUNS) <= set(ALGORITHMS)
    assert set(recorded_budgets()) <= set(ALGORITHMS)


def test_differences_are_told():
    recorded = {"step": {"launches": 100, "waits": 2, "uploads": 0}}
    assert differences(recorded, recorded) == []
    assert differences({"step": {"launches": 104.5, "waits": 2, "uploads": 0}}, recorded) == []
    for change, word in (
        ({"launches": 106}, "MORE launches"),
        ({"launches": 94}, "fewer launches"),
        ({"waits": 2.33}, "MORE waits"),
        ({"waits": 1}, "fewer waits"),
        ({"uploads": 1}, "MORE uploads"),
    ):
        (told,) = differences({"step": recorded["step"] | change}, recorded)
        assert word in told
    assert differences({}, recorded) == ["step: gone"]
    assert differences(recorded, {}) == ["step: not recorded"]


@pytest.mark.parametrize(
    ("mistake", "kind"),
    [
        (lambda envs, reward: reward + 0 * reward.sum().item(), "waits"),
        (lambda envs, reward: reward + 0 * envs._obs[:, [0, 1]].sum(), "uploads"),
        (lambda envs, reward: reward.double().exp().log().exp().log().to(reward), "launches"),
    ],
)
def test_a_costly_step_is_found(mistake, kind, monkeypatch):
    """The control: a step that waits, one that indexes by a list, and one that computes more."""
    (flags, *_), reward = RUNS["multitask_ppo"], TaskVectorEnv._transition_reward
    monkeypatch.setattr(TaskVectorEnv, "_transition_reward", lambda envs, *args: mistake(envs, reward(envs, *args)))
    now, found = budget("multitask_ppo", flags)
    told = differences(now, recorded_budgets()["multitask_ppo"][flags.strip()])
    for part in ("step", "evaluation"):
        assert any(line.startswith(f"{part}: MORE {kind}") for line in told), told
    if kind != "launches":
        assert any(f"iteration, {kind}: 5 x " in line and "envs/core.py" in line for line in places(found)), places(
            found
        )


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name in test_golden.RUNS])
def test_results_are_those_of_the_cpu(name, monkeypatch):
    """In double precision, with the flags of the golden files: in all variants of a file, and with MuJoCo's physics."""
    physics = "--physics mujoco" if "physics" in importlib.import_module(f"algos.{name}").Args.__annotations__ else ""
    monkeypatch.setattr(render, "learning_curve", lambda *_: "")
    for run in json.loads((GOLDEN / f"{name}.json").read_text()):
        if run["flags"] in SLOW:
            continue
        with mock.patch.object(test_golden, "glyphs", images):
            expected = run["rows"]
            if test_golden.are_drawn(run["flags"]):
                expected = test_golden.play(name, run["flags"], torch.float64)
            with pretended_gpu() as counts:
                rows = test_golden.play(name, f"{run['flags']} --cuda {physics}", torch.float64)
        assert counts.launches.total() > 100
        for row, row_expected in zip(rows, expected, strict=True):
            assert row == pytest.approx(row_expected, rel=1e-6, abs=1e-9), run["flags"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_saved_runs_go_on_and_are_evaluated(name, tmp_path, monkeypatch):
    """A run that stops after two of three iterations and is resumed is one that did not stop, evaluations included."""
    flags = next(iter(RUNS[name]))
    importlib.import_module(f"algos.{name}")
    monkeypatch.chdir(tmp_path)

    def last_row(folder):
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        return {key: value for key, value in row.items() if key != "seconds"}

    with pretended_gpu() as counts:
        start(name, f"{flags} --cuda --iterations 3")
        whole = Path("runs").rename("whole")
        with mock.patch.object(records.Run, "should_stop", lambda run: len(run.rows) == 2):
            start(name, f"{flags} --cuda --iterations 3")
        (folder,) = Path("runs").glob("*")
        assert last_row(folder)["iteration"] == 2
        start(name, f"--resume {folder}")
        before = counts.launches.total()
        start(name, f"--evaluate {folder}")
    assert counts.launches.total() > before
    row = last_row(folder)
    assert row["iteration"] == 3
    assert row == pytest.approx(last_row(next(whole.glob("*"))), rel=1e-6)
    evaluated = json.loads((folder / "evaluation.json").read_text())["metrics"]
    shared = row.keys() & evaluated.keys()
    assert shared
    assert {x: evaluated[x] for x in shared} == pytest.approx({x: row[x] for x in shared}, rel=1e-6)


if __name__ == "__main__":
    names = sys.argv[1:] or ALGORITHMS
    budgets = recorded_budgets() if BUDGETS.exists() else {}
    for name in names:
        budgets[name] = {flags.strip(): budget(name, flags)[0] for flags in RUNS[name]}
    BUDGETS.write_text(json.dumps({name: budgets[name] for name in sorted(budgets)}, indent=1) + "\n")
