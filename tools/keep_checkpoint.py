"""Put what `--evaluate` needs of a run into checkpoints/NAME, and nothing else.

    python tools/keep_checkpoint.py RUN NAME                        into checkpoints/NAME
    python tools/keep_checkpoint.py RUN NAME --meta-batch-size 4    with other flags, to be quick

The folder then has `checkpoint.pt` (networks and flags, no optimiser, no data), `args.json` (the run's, and an entry
for the flags that were changed), `metrics.jsonl` (the run's last line) and `expected.json`: what `--evaluate` says of
it here, which tests/test_checkpoints.py compares.
"""

import importlib
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from envs import records  # noqa: E402
from envs.files import replace_file  # noqa: E402
from envs.render import steps_of  # noqa: E402

CHECKPOINTS = ROOT / "checkpoints"
# What an evaluation needs, beside counts and flags: what each file names to `records.first_state`.
PARTS = {"lifetime_rewards": ("eta",), "meta_critic": ("phi",), "varibad_ppo": ("phi", "theta")}
PARTS |= {"reptile": ("theta", "moments"), "meta_gradient_a2c": ("theta", "obs_moments")}
PARTS |= {"lirpg": ("theta", "obs_moments"), "mbmpo": ("theta", "models", "data")}
COUNTS = ("algorithm", "iteration", "env_steps", "seconds")


def stripped(state: dict, args) -> dict:
    """The parts of a state that an evaluation needs, with these flags; it says of itself that it is no more."""
    parts = PARTS.get(state["algorithm"], ("theta",))
    kept = {name: records.to(state[name], torch.device("cpu")) for name in (*COUNTS, *parts)}
    return kept | {"args": vars(args), "only_to_evaluate": True}


def keep(run: Path, folder: Path, flags: list[str]) -> dict:
    """Make the folder, replacing an older one; the metrics of its evaluation."""
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise SystemExit(f"{run}: no run, it has no checkpoint.pt")
    algorithm = torch.load(path, map_location="cpu", weights_only=True)["algorithm"]
    module = importlib.import_module(f"algos.{algorithm}")
    state = records.load_checkpoint(str(run), algorithm, module.Args, flag="run")
    args = records.read_flags(module.Args, flags, state["args"])
    rows, _ = records.read_metrics(run, state["iteration"])
    starts = records.read_starts(run / "args.json")
    if not rows or not starts:
        raise SystemExit(f"{run}: no run, it lacks a readable args.json or metrics.jsonl")
    changed = records.changes(args, state["args"])
    told = (f"{records.flag(name)} {new} in place of {old}" for name, (old, new) in changed.items())
    notes = [f"changed, to be evaluated quickly: {text}" for text in told]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records.save_checkpoint(folder, stripped(state, args))
    if changed:
        kept = {name: value for name, value in vars(args).items() if name != "evaluate"}
        starts.append({"time": records.now(), "iteration": state["iteration"], "flags": kept, "notes": notes})
    replace_file(folder / "args.json", f"{json.dumps(starts, indent=2)}\n".encode())
    replace_file(folder / "metrics.jsonl", f"{json.dumps(rows[-1])}\n".encode())
    with redirect_stdout(sys.stderr):
        module.main(["--evaluate", str(folder)])
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    for path in folder.glob("evaluation*"):
        path.unlink()
    expected = {"torch": str(torch.__version__), "metrics": metrics}
    replace_file(folder / "expected.json", f"{json.dumps(expected, indent=2)}\n".encode())
    return metrics


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if len(words) < 2 or words[0].startswith("-"):
        raise SystemExit("usage: python tools/keep_checkpoint.py RUN NAME [flags of the run]")
    run, name, *flags = words
    folder = CHECKPOINTS / name
    metrics = keep(Path(run), folder, flags)
    names = steps_of(metrics)
    told = [f"{key} {metrics[key]:.4g}" for key in (names[0], names[-1])]
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1000:.0f} kB; {', '.join(told)}")


if __name__ == "__main__":
    main()
