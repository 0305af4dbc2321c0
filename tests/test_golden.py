"""Golden files: the first iterations of every algorithm, as they were when tests/golden/ was last recorded.

They guard refactorings: a change that should not change results must leave them as they are. A change that should,
records them anew and says so in its commit:

    .venv/bin/python -m tests.test_golden                     all files of tests/golden/
    .venv/bin/python -m tests.test_golden maml_trpo promp     these only
    .venv/bin/python -m tests.test_golden --bits FILE         single precision, all digits, into one file: two versions
                                                              of the code on one machine can be compared bit by bit

The runs are in double precision, so that another processor's rounding stays far below the tolerance.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from unittest import mock

import gymnasium as gym
import pytest
import torch

import envs
from envs import SupervisedTasks, fewshot
from envs.optimisees import Optimisees

GOLDEN = Path(__file__).resolve().parent / "golden"
POINT = "--env-id Navigation2D-v0 --action-scale 1 --meta-batch-size 3 --horizon 5 --hidden-size 8 --eval-steps 2 "
# Ten conjugate gradients with few data and little damping would blow rounding up to the first digits.
TRPO = f"{POINT}--horizon 10 --cg-damping 1 "
HOPPER = "--env-id HopperRandParams-v0 --horizon 30 --meta-batch-size 2 --eval-steps 1 "  # episodes end early
CURVES = "--meta-batch-size 3 --shots 4 --hidden-sizes 8 7 --eval-tasks 5 --eval-steps 2 "
IMAGES = "--env-id Glyphs-v0 --meta-batch-size 2 --ways 3 --hidden-sizes 4 5 --eval-tasks 3 --eval-steps 2 "
CLASSES = "--meta-batch-size 2 --ways 3 --train-ways 4 --shots 2 --queries 2 --hidden-sizes 4 5 --eval-tasks 3 "
EXAMPLES = "--meta-batch-size 3 --hidden-size 16 --layers 2 --eval-tasks 5 "
DESCENTS = "--meta-batch-size 3 --steps 6 --unroll 3 --hidden-size 5 --eval-tasks 5 --eval-steps 4 "
TRIALS = "--env-id Bandit5-v0 --meta-batch-size 3 --episodes-per-trial 3 --horizon 5 --hidden-size 16 --minibatches 2 "
WALKS = "--env-id WalkerRandParams-v0 --horizon 40 --meta-batch-size 4 --episodes-per-trial 2 --hidden-size 16 "
WALKS += "--minibatches 2 "
CONTEXT = "--train-tasks 5 --tasks-per-iteration 3 --meta-batch-size 3 --initial-episodes 1 --updates 3 "
CONTEXT += "--batch-size 4 --context-size 6 --hidden-size 8 --replay-size 60 "
MODELS = "--num-models 3 --real-episodes 2 --episodes-per-task 4 --hidden-size 8 --model-size 8 --model-epochs 3 "
MODELS += "--model-batch-size 10 --meta-steps 2 "
META = "--num-worlds 3 --rollout-steps 7 --horizon 5 "
STREAMS = "--num-worlds 3 --rollout-steps 7 --horizon 5 --delay 3 --epochs 2 --minibatches 2 "
BELIEFS = "--meta-batch-size 3 --episodes-per-trial 3 --hidden-size 8 --decoder-size 7 --policy-size 9 --buffer-size 4 "
BELIEFS += "--vae-updates 2 --vae-batch-size 4 --minibatches 2 "
POLES = "--meta-batch-size 3 --window-size 7 --horizon 5 --lifetime 2 --hidden-size 8 --critic-size 9 "
POLES += "--eval-steps 2 --eval-windows 2 --eval-episodes 3 "
CONTEXTS = "--meta-batch-size 3 --episodes-per-trial 5 --context 3 --hidden-size 16 "
HISTORIES = f"{CONTEXTS}--learners 4 --source-episodes 9 --keep-every 2 "
LIVES = "--meta-batch-size 3 --episodes-per-lifetime 4 --horizon 5 --steps 3 --unroll 2 --policy-size 8 "
RUNS = {
    "maml_trpo": [
        *(f"{TRPO}--episodes-per-task 4 --estimator {name}" for name in ("score", "lvc", "dice", "loaded", "e_maml")),
        f"{TRPO}--episodes-per-task 4 --inner-steps 2 --estimator dice --learn-inner-lr "
        "--inner-lr 0.02 --gae-lambda 0.9",
        f"{TRPO}--episodes-per-task 2 --inner-steps 2 --first-order",
        f"{HOPPER}--episodes-per-task 5 --estimator dice --inner-lr 0.001 --cg-damping 1 --fisher-fraction 1",
        f"{HOPPER}--episodes-per-task 3 --inner-steps 2 --estimator e_maml --cg-damping 1",
        "--env-id HalfCheetahDir-v0 --meta-batch-size 4 --episodes-per-task 5 --horizon 20",
    ],
    "promp": [
        f"{POINT}--episodes-per-task 2 --target-kl 0.01",
        f"{HOPPER}--episodes-per-task 3 --inner-steps 2",
    ],
    "reptile_ppo": [f"{POINT}--episodes-per-task 2 --inner-steps 2", f"{HOPPER}--episodes-per-task 3"],
    "multitask_ppo": [
        f"{POINT}--episodes-per-task 2",
        f"{POINT}--episodes-per-task 2 --task-given",
        f"{HOPPER}--episodes-per-task 3 --entropy-coef 0.01",
    ],
    "maml": [
        f"{CURVES}--inner-steps 2",
        IMAGES,
        f"{IMAGES}--no-transductive",
        f"{IMAGES}--mlp",
        f"{CURVES}--env-id SinusoidOrLine-v0",
    ],
    "fomaml": [f"{CURVES}--inner-steps 2", IMAGES],
    "reptile": [
        f"{CURVES}--inner-steps 2 --inner-shots 5 --eval-queries 4",
        f"{CURVES}--inner-steps 2 --inner-shots 5 --eval-queries 4 --inner-optimizer adam",
        f"{IMAGES}--inner-steps 2",
        f"{IMAGES}--inner-steps 2 --eval-split valid",
    ],
    "protonet": [CLASSES, f"{CLASSES}--matching --no-transductive", f"{CLASSES}--mlp"],
    "in_context": [
        *(f"{EXAMPLES}--shots 4 --encoder {encoder}" for encoder in ("transformer", "gru", "snail")),
        *(f"{EXAMPLES}--shots 4 --sequential --encoder {encoder}" for encoder in ("transformer", "gru", "snail")),
        f"{EXAMPLES}--env-id Glyphs-v0 --ways 3 --hidden-sizes 4 5 --shots 2",
        f"{EXAMPLES}--env-id Glyphs-v0 --ways 3 --hidden-sizes 4 5 --shots 3 --sequential --mlp --encoder gru",
        f"{EXAMPLES}--env-id SinusoidOrLine-v0 --shots 3",
    ],
    "learned_optimizer": [DESCENTS, f"{DESCENTS}--env-id GlyphNets-v0 --meta-batch-size 1"],
    "rl2_ppo": [TRIALS, f"{TRIALS}--encoder lstm", WALKS, f"{WALKS}--encoder lstm"],
    "rl2_transformer_ppo": [f"{TRIALS}--encoder {e}" for e in ("transformer", "snail")]
    + [f"{WALKS}--encoder {e}" for e in ("transformer", "snail")],
    "varibad_ppo": [
        f"{BELIEFS}--horizon 5",
        f"--env-id WalkerRandParams-v0 --horizon 40 {BELIEFS}--decode-obs --decoded-beliefs 9",
    ],
    "pearl_sac": [
        f"--env-id Navigation2D-v0 --horizon 5 {CONTEXT}",
        f"--env-id Navigation2D-v0 --horizon 5 {CONTEXT}--context prior",
        f"--env-id AntDir-v0 --horizon 25 {CONTEXT}--auto-entropy --next-obs --posterior-episodes 2",
        f"--env-id SparseNavigation2D-v0 --horizon 6 {CONTEXT}--dense-training --prior-episodes 2 --eval-episodes 4 "
        "--eval-prior-episodes 2",
    ],
    "mbmpo": [
        f"--env-id Navigation2D-v0 --action-scale 1 --horizon 6 {MODELS}--cg-damping 1",
        # Of fewer episodes the baseline leaves nothing to learn from: it has as many features as they have steps.
        f"--env-id HopperForward-v0 --horizon 25 {MODELS}--episodes-per-task 16 --model-lr 0.1 --fisher-fraction 1 "
        "--cg-damping 1",
    ],
    "lirpg": [
        f"--env-id Navigation2D-v0 {STREAMS}",
        f"--env-id CartPoleFixed-v0 {STREAMS}--no-normalize --no-normalize-advantages --entropy-coef 0.01",
        f"--env-id CartPoleFixed-v0 {STREAMS}--intrinsic-coef 0 --extrinsic-coef 1 --live-bonus 0.1",
    ],
    "meta_critic": [
        POLES,
        f"{POLES}--td-lambda 1",
        f"{POLES}--least-trace 3 --max-norm 0.5 --eval-greedy",
        f"{POLES}--latent-size 0",
    ],
    "meta_gradient_a2c": [
        f"--env-id Navigation2D-v0 {META}--normalize --trace 0.5",
        f"--env-id CartPoleFixed-v0 {META}--learn gamma",
        f"--env-id NoisyLights-v0 {META}--meta-lr 0",
    ],
    "dpt": [
        f"--env-id Bandit5-v0 {CONTEXTS}",
        f"--env-id TabularMDP-v0 --horizon 4 --policies 3 {CONTEXTS}",
        f"--env-id DarkRoom-v0 --horizon 5 --policies 2 {CONTEXTS}",
    ],
    "ad": [
        f"--env-id DarkRoomSmall-v0 --horizon 5 {HISTORIES}",
        f"--env-id GaussianBandit5-v0 --source-gamma 0 {HISTORIES}",
    ],
    "lifetime_rewards": [f"--env-id SymABC-v0 {LIVES}--hidden-size 8", f"--env-id KeyBox-v0 {LIVES}--hidden-size 8"],
}


@cache
def glyphs(classes: int, instances: int, seed: int, dtype: torch.dtype, draw=fewshot.draw_glyphs) -> torch.Tensor:
    """The drawn characters. To draw them takes ten seconds in double precision."""
    return draw(classes, instances, torch.Generator().manual_seed(seed))


def play(name: str, flags: str, dtype: torch.dtype) -> list[dict]:
    """The lines of metrics.jsonl of two iterations, each with an evaluation; the clock's seconds left out."""
    home = Path.cwd()
    algorithm, make_vec = importlib.import_module(f"algos.{name}"), partial(gym.make_vec, dtype=dtype)
    init, init_optimisees = SupervisedTasks.__init__, Optimisees.__init__

    def supervised(self, device="cpu", _=None):
        init(self, device, dtype)

    def minimised(self, device="cpu", _=None):
        init_optimisees(self, device, dtype)

    def drawn(classes, instances, generator, device):
        return glyphs(classes, instances, generator.initial_seed(), dtype)

    every = [] if name == "mbmpo" else ["--eval-every", "1"]
    threads = torch.get_num_threads()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(envs.gym, "make_vec", make_vec),
        mock.patch.object(SupervisedTasks, "__init__", supervised),
        mock.patch.object(Optimisees, "__init__", minimised),
        mock.patch.object(fewshot, "draw_glyphs", drawn),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(1)
        try:
            algorithm.main([*flags.split(), "--iterations", "2", *every])
            (path,) = Path().glob("runs/*/metrics.jsonl")
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        finally:
            os.chdir(home)
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(threads)
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_every_file_is_guarded():
    names = {path.stem for path in (GOLDEN.parent.parent / "algos").glob("*.py")}
    assert names == set(RUNS) == {path.stem for path in GOLDEN.glob("*.json")} - {"gpu_budgets"}


def are_drawn(flags: str) -> bool:
    """Whether a run is on drawn characters."""
    return "Glyph" in flags or "--train-ways" in flags


DRAWN = [name for name, runs in RUNS.items() if any(are_drawn(flags) for flags in runs)]


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.xdist_group("glyphs")) if x in DRAWN else x for x in RUNS]
)
def test_the_first_iterations_are_as_recorded(name):
    recorded = json.loads((GOLDEN / f"{name}.json").read_text())
    assert [run["flags"] for run in recorded] == [flags.strip() for flags in RUNS[name]]
    for run in recorded:
        rows = play(name, run["flags"], torch.float64)
        assert len(rows) == len(run["rows"]) == 2
        for row, expected in zip(rows, run["rows"], strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                assert row[key] == pytest.approx(value, rel=1e-6, abs=1e-9), (run["flags"], key)


def test_a_changed_step_is_noticed(monkeypatch):
    """The control: an inner step that is a thousandth longer is not the recorded one."""
    from algos import maml_trpo

    adapt = maml_trpo.adapt
    monkeypatch.setattr(maml_trpo, "adapt", lambda params, batch, args, scale=1.0: adapt(params, batch, args, 1.001))
    with pytest.raises(AssertionError):
        test_the_first_iterations_are_as_recorded("maml_trpo")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--bits"]:
        result = {name: [play(name, flags, torch.float32) for flags in runs] for name, runs in RUNS.items()}
        Path(words[1]).write_text(json.dumps(result, indent=1))
    for name in [] if words[:1] == ["--bits"] else words or RUNS:
        runs = [{"flags": flags.strip(), "rows": play(name, flags, torch.float64)} for flags in RUNS[name]]
        (GOLDEN / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")
