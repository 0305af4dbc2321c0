"""What runs need to keep records: flags, folders, checkpoints, the progress line and Weights & Biases."""

import io
import json
import math
import os
import signal
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from envs.processes import in_any_process, summarise
from envs.render import adaptation_gif, learning_curve


class Follower:
    """A run as those of torchrun's processes have it that do not lead: it stops on signals, and records nothing.

    SIGINT and SIGTERM ask it to stop; the second one aborts at once.
    """

    def __init__(self):
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame) -> None:
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)

    def should_stop(self) -> bool:
        """Whether a signal has asked for it; all processes of torchrun must ask, and get the same answer."""
        return in_any_process(self.stopping)

    def log(self, state: dict, stats: dict[str, float | Tensor]) -> None:
        """This process's part of the means."""
        summarise(stats)

    def save(self, state: dict) -> None:
        """Nothing: the leader's checkpoint holds the same."""

    def finish(self) -> None:
        """Nothing: the leader draws the curve."""


class Run(Follower):
    """What `train` of an algorithm writes to: a run's folder, its progress line, Weights & Biases with --track.

    The folder holds args.json, metrics.jsonl, checkpoint.pt and at the end curve.png.
    """

    def __init__(self, args, algorithm: str, iteration: int):
        self.folder, self.tracker = open_run(args, algorithm, iteration)
        self.bar = progress_line(args, algorithm, iteration)
        self.since = time.time()
        super().__init__()

    def stop(self, number, frame) -> None:
        super().stop(number, frame)
        self.bar.write("stopping after this iteration; the same signal again aborts at once")

    def log(self, state: dict, stats: dict[str, float | Tensor]) -> None:
        """Write a line of metrics; FloatingPointError if one of the numbers is not finite.

        A tensor stands for its mean over all tasks, under a name that ends in ci95 for half the width of that mean's
        95 % confidence interval.
        """
        state["seconds"] = round(state["seconds"] + time.time() - self.since, 3)
        self.since = time.time()
        line = write_metrics(self.folder, state, stats)
        self.bar.show(line)
        if self.tracker:
            self.tracker.log(line, step=line["iteration"])

    def save(self, state: dict) -> None:
        """Replace checkpoint.pt."""
        save_checkpoint(self.folder, state)

    def finish(self) -> None:
        """Draw curve.png, and say in a line what adaptation changed."""
        self.bar.write(learning_curve(self.folder))


def parse(Args: type, argv: list[str] | None, description: str, algorithm: str) -> tuple:
    """The flags `argv` (None: the command line's), and the saved state to go on with, {} without --resume.

    Flags that are not given are those of the resumed run. SystemExit for flags or a checkpoint that cannot be used.
    """
    import tyro

    args = tyro.cli(Args, args=argv, description=description)
    if not args.resume:
        return args, {}
    saved = load_checkpoint(args.resume, algorithm, Args)
    return tyro.cli(Args, args=argv, default=saved["args"]), saved


def load_checkpoint(folder: str, algorithm: str, Args: type) -> dict:
    """The state saved in a run's folder; SystemExit with one line that says what is wrong with it."""
    path = Path(folder) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load would not notice a flipped bit
        if damaged:
            raise ValueError(f"damaged in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["algorithm"] != algorithm:
            raise ValueError(f"written by {state['algorithm']}, not {algorithm}")
        return state | {"args": Args(**state["args"])}
    except Exception as error:
        raise SystemExit(f"--resume {folder}: no usable checkpoint.pt there: {error!r}") from None


def save_checkpoint(folder: Path, state: dict) -> None:
    """Replace the folder's checkpoint.pt by this state; at every moment there is a complete one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with open(folder / "checkpoint.tmp", "wb") as file:
        file.write(buffer.getbuffer())
        os.fsync(file.fileno())
    os.replace(file.name, folder / "checkpoint.pt")


def check_shapes(folder: str, saved: dict[str, Tensor], made: dict[str, Tensor], part: str = "") -> None:
    """SystemExit unless the saved tensors, of a part of the state, have the names and shapes that the flags ask for."""
    shapes, expected = ({part + name: tuple(x.shape) for name, x in tensors.items()} for tensors in (saved, made))
    wrong = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
    if wrong:
        found = ", ".join(f"{name} is {shapes.get(name)} and not {expected.get(name)}" for name in wrong)
        raise SystemExit(f"--resume {folder}: --env-id and the networks' flags must be the run's: {found}")


def open_run(args, algorithm: str, iteration: int) -> tuple:
    """The folder of a new or resumed run, and its run of Weights & Biases (None without --track).

    Lines of metrics.jsonl after the checkpoint's iteration are dropped: they will be written again.
    """
    name = f"{args.env_id.replace('/', '-')}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    tracker = start_tracking(args, name) if args.track else None
    folder = Path(args.resume or f"runs/{name}")
    folder.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    metrics = folder / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)[:iteration] if iteration else []
    metrics.write_text("".join(kept))
    return folder, tracker


def start_tracking(args, name: str):
    """A run of Weights & Biases; SystemExit where it would ask for a login or wait for a network."""
    import wandb

    if args.wandb_mode == "online" and not wandb.api.api_key:  # W&B itself would prompt for it
        raise SystemExit("--track: no W&B login; run `wandb login`, or pass --wandb-mode offline")
    settings = wandb.Settings(init_timeout=30, mode=args.wandb_mode)  # without a network: an error, not a hang
    return wandb.init(project="cleanmeta", name=name, config=vars(args), settings=settings)


def start(args, algorithm: str, iteration: int, leads: bool = True):
    """A `Run` in the process that leads, a `Follower` in torchrun's others."""
    return Run(args, algorithm, iteration) if leads else Follower()


@contextmanager
def errors_in_one_line(state: dict) -> Iterator[None]:
    """Numbers that are not finite, and what the system refuses, as one line on standard error, without a trace."""
    try:
        yield
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


def write_metrics(folder: Path, state: dict, stats: dict) -> dict[str, float]:
    """Append an iteration's line to metrics.jsonl and return it; `Run.log` says what is in it."""
    line = {name: state[name] for name in ("iteration", "env_steps", "seconds")} | summarise(stats)
    wrong = {name: value for name, value in line.items() if not math.isfinite(value)}
    if wrong:
        raise FloatingPointError(f"not finite: {wrong}")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def progress_line(args, algorithm: str, iteration: int):
    """A line in the terminal, by tqdm: `show(line)` shows metrics and moves it on."""
    from tqdm import tqdm

    class ProgressLine(tqdm):
        shown = {}

        def show(self, line: dict[str, float]) -> None:
            names = [name for name in line if name.endswith(("_pre", "_post", "_trial")) or "_k" in name]
            self.shown = self.shown | {name: f"{line[name]:.3g}" for name in names[:3] + names[-1:]}
            self.set_postfix(self.shown, refresh=False)
            self.update()

    return ProgressLine(total=args.iterations, initial=iteration, unit="it", dynamic_ncols=True, desc=algorithm)


def film(run, envs, policy, params: dict[str, dict[str, Tensor]], seed: int) -> None:
    """adaptation.gif: one held-out task, with a policy's means under several parameters, by their captions.

    Nothing in a process that does not lead.
    """

    def actor(weights: dict[str, Tensor]):
        return lambda obs: policy(weights, obs)[0]

    actors = {caption: actor(weights) for caption, weights in params.items()}
    if isinstance(run, Run):
        adaptation_gif(run.folder / "adaptation.gif", envs, actors, seed)
