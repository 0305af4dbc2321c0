"""What runs need to keep records: flags, folders, checkpoints, metrics, and orderly ends.

A run's folder, `runs/<env>__<algorithm>__<seed>__<flags that differ from the defaults>__<time>`:

    args.json           a list with an entry for every start: its time, its flags, and what had changed
    metrics.jsonl       a line for every iteration
    checkpoint.pt       the state to go on from; at every moment there is a whole one, once there is one
    curve.png           drawn at the end
    evaluation.json     and .png, of `--evaluate`; evaluation-2.json for the next one, and so on
"""

import io
import json
import os
import re
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import Tensor

from . import own, render
from .core import NotFinite, SupervisedTasks, Unsuitable, refuse_not_finite
from .evaluation import tell, unused
from .files import CannotWriteError, replace_file
from .flags import default_horizon, show_help, wants_help
from .processes import in_any_process, refusal, summarise
from .processor import keep_memory
from .screen import Lenient, Progress, fill_standard_streams, lenient_output, say
from .tracking import Tracker

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Flags that a resumed run must leave as they are: its curve would be of two environments, seeds or test sets.
ENVIRONMENT = ("env_id", "seed", "horizon", "action_scale", "task_given", "delay", "data", "ways", "shots")
SPLIT = ("eval_split", "eval_queries", "queries")  # what test tasks are of, and their queries
TESTS = (
    "eval_tasks",
    "tasks_per_iteration",
    "meta_batch_size",
    "num_models",
    "num_worlds",
)  # the first that a file has: its test set's size
EPISODES = ("episodes_per_task", "real_episodes")  # of each test task
NAMELESS = (
    "env_id",
    "seed",
    "iterations",
    "eval_every",
    "cuda",
    "physics",
    "compile",
)  # not among the flags in a folder's name
NAMELESS += ("resume", "evaluate", "capture_video", "track", "wandb_mode")
ON_CPU = (
    "generator",
    "updates_generator",
    "optimizer",
    "worlds",
    "args",
)  # stay on the CPU; `train` moves what it needs


class Stopped(BaseException):
    """A signal has asked the run to end, and it has saved what is needed to go on."""


class EvaluationCut(BaseException):
    """A signal has asked the run to end while it evaluated."""


# ---------------------------------------------------------------- flags


def option(argv: list[str], name: str) -> str:
    """The value of a flag among these words, the last one if there are several, empty if it is not there."""
    value = ""
    for word, following in pairwise([*argv, ""]):
        if word == name:
            value = following
        if word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value


def parse(Args: type, argv: list[str] | None, description: str, algorithm: str, fixed: tuple = ()) -> tuple:
    """The flags `argv` (None: the command line's), and the saved state to go on with or to evaluate, else {}.

    With --resume or --evaluate, flags that are not given are those of that run. `fixed` names flags that a resumed run
    cannot change, beside those that would make its curve incomparable. SystemExit for flags or a checkpoint that
    cannot be used.
    """
    fill_standard_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    if wants_help(argv):
        show_help(Args, description, algorithm)
        raise SystemExit(0)
    resume, evaluate = option(argv, "--resume"), option(argv, "--evaluate")
    if resume and evaluate:
        raise refusal("--resume goes on with a run, --evaluate only asks it: give one of them")
    saved = {}
    if resume or evaluate:
        saved = load_checkpoint(resume or evaluate, algorithm, Args, flag="--resume" if resume else "--evaluate")
    args = read_flags(Args, argv, saved.get("args"))
    fill_in(args)
    if saved:
        saved["changed"] = changes(args, saved["args"])
        if resume:
            refuse_incomparable(args, saved["changed"], fixed)
    if int(os.environ.get("RANK", 0)) == 0:
        doing = "evaluates" if evaluate else "goes on with" if resume else "starts"
        device = "cuda" if args.cuda else "cpu"
        run = f"{resume or evaluate}, " if saved else ""
        say(f"{algorithm} {doing} {run}{args.env_id}, seed {args.seed}, on {device}")
    return args, saved


def fill_in(args) -> None:
    """Give the flags that follow the environment, where they are not given, the values that it asks for."""
    if getattr(args, "horizon", 1) is None:
        args.horizon = default_horizon(args.env_id)


def read_flags(Args: type, argv: list[str], default) -> object:
    """The flags of these words, by tyro; others are those of `default`, if it is given.

    The first one of torchrun's processes tells what is wrong, and once more at the very end (`refusal`).
    """
    import tyro

    if default is not None:
        fresh = {"resume": "", "evaluate": ""}
        if option(argv, "--evaluate") and hasattr(default, "capture_video"):
            fresh["capture_video"] = False
        default = replace(default, **fresh)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return tyro.cli(Args, args=argv, default=default)
    told = io.StringIO()
    before, sys.stderr = sys.stderr, told
    try:
        return tyro.cli(Args, args=argv, default=default)
    except SystemExit:
        sys.stderr = before
        raise refusal(told.getvalue().strip()) from None
    finally:
        sys.stderr = before


def changes(args, before) -> dict[str, list]:
    """Flags whose values differ, by name: [before, now]."""
    known = {name: value for name, value in vars(before).items() if name not in ("resume", "evaluate")}
    changed = {name: [value, getattr(args, name)] for name, value in known.items() if value != getattr(args, name)}
    if "env_id" in changed and own.is_same(*changed["env_id"]):
        del changed["env_id"]
    return changed


def refuse_incomparable(args, changed: dict[str, list], fixed: tuple) -> None:
    """SystemExit if a resumed run's curve would be of two environments, seeds or test sets."""
    number_of_tests = next((name for name in TESTS if hasattr(args, name)), "")
    wrong = [name for name in (*ENVIRONMENT, number_of_tests, *EPISODES, *SPLIT, *fixed) if name in changed]
    if wrong:
        told = ", ".join(
            f"{flag(name)} ({changed[name][0]} and not {changed[name][1]})" for name in dict.fromkeys(wrong)
        )
        raise refusal(f"--resume {args.resume}: must be the run's: {told}")


def flag(name: str) -> str:
    """A field of Args as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------- checkpoints


def load_checkpoint(folder: str, algorithm: str, Args: type, flag: str = "run") -> dict:
    """The state saved in a run's folder; SystemExit with one line that says what is wrong with it."""
    path = Path(folder) / "checkpoint.pt"
    try:
        written = path.stat().st_mtime_ns
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load would not notice a flipped bit
        if damaged:
            raise ValueError(f"damaged in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "keys" not in state:
            raise ValueError("it lacks keys, the list of what belongs into it; older versions wrote none")
        lacking = sorted(set(state["keys"]) - set(keys(state)))
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking[:5])}{' ..' if len(lacking) > 5 else ''}")
        if state["algorithm"] != algorithm:
            raise ValueError(f"written by {state['algorithm']}, not {algorithm}")
        if state.get("only_to_evaluate") and flag == "--resume":
            raise ValueError("it is one to evaluate, without what training goes on with")
        return state | {"args": Args(**state["args"]), "saved": written}
    except Exception as error:
        told = error if isinstance(error, ValueError) else repr(error)
        raise refusal(f"{flag} {folder}: no usable checkpoint.pt there: {told}") from None


def save_checkpoint(folder: Path, state: dict) -> None:
    """Replace the folder's checkpoint.pt by this state; at every moment there is a whole one."""
    state = {name: x for name, x in state.items() if name not in ("keys", "saved", "changed")}
    buffer = io.BytesIO()
    torch.save(state | {"keys": list(keys(state))}, buffer)
    replace_file(folder / "checkpoint.pt", buffer.getbuffer())


def keys(state: dict | list, prefix: str = "") -> Iterator[str]:
    """The names of all that is in nested dicts and lists, as "optimizer.state.0.exp_avg"."""
    for name, x in state.items() if isinstance(state, dict) else enumerate(state):
        yield f"{prefix}{name}"
        if isinstance(x, dict | list):
            yield from keys(x, f"{prefix}{name}.")


def first_state(
    args, algorithm: str, fresh: dict, saved: dict, device: torch.device, evaluates: tuple = ("theta",)
) -> dict:
    """The state to begin from, its tensors on the device: the fresh one of a new run, or what was saved.

    SystemExit if something in it has not the shape that the flags ask for; with --evaluate only what an evaluation
    needs is looked at, the parts `evaluates`.
    """
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0} | fresh
    needed = {name: x for name, x in fresh.items() if name in evaluates or not args.evaluate}
    if saved:
        check_shapes(args, saved, needed)
    return {name: x if name in ON_CPU else to(x, device) for name, x in (state | saved | {"args": vars(args)}).items()}


def to(x, device: torch.device):
    """Tensors, also those in dicts and lists, on the device; all else as it is."""
    if isinstance(x, dict):
        return {name: to(y, device) for name, y in x.items()}
    if isinstance(x, list):
        return [to(y, device) for y in x]
    return x.to(device) if isinstance(x, Tensor) else x


def check_shapes(args, saved: dict, made: dict) -> None:
    """SystemExit unless what was saved has the tensors that the flags ask for, those in `made`, and their shapes."""
    made = {name: x for name, x in made.items() if isinstance(x, Tensor) or x}  # a fresh run has no data yet
    found, expected = dict(shapes({name: saved.get(name) for name in made})), dict(shapes(made))
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
        told = [f"{flag(name)} ({old} and not {new})" for name, (old, new) in saved.get("changed", {}).items()]
        told += [f"{name} is {found.get(name)} and not {expected.get(name)}" for name in wrong[:3]]
        more = f", .. ({len(wrong)} in all)" if len(wrong) > 3 else ""
        asked = f"--resume {args.resume}" if args.resume else f"--evaluate {args.evaluate}"
        raise refusal(f"{asked}: --env-id and the networks' flags must be the run's: {', '.join(told)}{more}")


def shapes(state, prefix: str = "") -> Iterator[tuple[str, tuple]]:
    """Names and shapes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        yield prefix, tuple(state.shape)
    elif isinstance(state, dict | list):
        for name, x in state.items() if isinstance(state, dict) else enumerate(state):
            yield from shapes(x, f"{prefix}.{name}" if prefix else str(name))


# ---------------------------------------------------------------- a run's folder


def new_folder(args, algorithm: str) -> Path:
    """A folder that no other run has, under runs/."""
    defaults = {field.name: field.default for field in fields(args)}
    with suppress(TypeError, ValueError):
        usual = type(args)(env_id=args.env_id)  # some defaults follow the environment
        fill_in(usual)
        defaults |= vars(usual)
    told = ""
    for name, value in vars(args).items():
        if name not in NAMELESS and value != defaults[name] and len(told) < 40:
            told += f"_{name.replace('_', '-')}-{value}"
    parts = [own.short_name(args.env_id), algorithm, str(args.seed), told[1:60], time.strftime("%Y%m%d-%H%M%S")]
    name = "__".join(filter(None, parts))
    name = re.sub(r"[^\w.-]+", "-", name)
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if not folder.is_dir():
                raise CannotWriteError(str(error)) from error
        except OSError as error:
            raise CannotWriteError(str(error)) from error


def lock(folder: Path) -> int | None:
    """Claim a run's folder for this process, until `os.close` of the result or the process's end, however it comes.

    SystemExit if another process has it. None where the system has no locks.
    """
    if fcntl is None:
        return None
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CannotWriteError(str(error)) from error
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise refusal(f"{folder}: another process writes this run; only one can") from None
    except OSError:  # a file system without locks
        os.close(number)
        return None
    return number


def read_metrics(folder: Path, last: int | None = None) -> tuple[list[dict], int]:
    """The lines of metrics.jsonl, one for each iteration up to the `last`, and how many others there were.

    Others: what a killed process left of a line, later iterations, and earlier versions of an iteration's line.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    rows = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if last is None or row["iteration"] <= last:
                rows[int(row["iteration"])] = row
    return [rows[k] for k in sorted(rows)], len(lines) - len(rows)


def read_starts(path: Path) -> list[dict]:
    """The entries of args.json, or of a copy of it; an older version wrote only one start's flags."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else [{"flags": found}]


def last_flags(path: Path) -> dict:
    """The flags of a run's last start, from args.json or a copy of it."""
    return read_starts(path)[-1]["flags"]


def now() -> str:
    """Date and time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ---------------------------------------------------------------- a run


class Follower:
    """A run as those of torchrun's processes have it that do not lead: it stops on signals, and records nothing.

    `train` of an algorithm calls `doing` to show what it does, and `end_iteration` once an iteration.
    """

    def __init__(self, args):
        self.args = args
        self.stopping = 0.0  # when a signal asked for it
        self.cuts_evaluation = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP ask the run to end; afterwards all is as before.

        Another SIGINT or SIGTERM, a second later or more, ends it at once. (Terminals and torchrun send one twice.)
        Nothing in a thread, where no handler can be set, nor for a SIGHUP that `nohup` has switched off.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    before[number] = signal.signal(number, self.on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_signal(self, number, frame) -> None:
        if not self.stopping:
            self.stopping = time.monotonic()
            self.tell(f"{signal.Signals(number).name}: saves and ends soon; another one ends it at once")
        elif time.monotonic() - self.stopping > 1 and number != getattr(signal, "SIGHUP", None):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.cuts_evaluation:
            self.cuts_evaluation = False
            raise EvaluationCut

    def should_stop(self) -> bool:
        """Whether a signal has asked for it; all processes of torchrun must ask, and get the same answer."""
        return in_any_process(bool(self.stopping))

    def tell(self, text: str) -> None:
        """Show a line that stays."""

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """Show what is going on, and how much of it is done."""

    def end_iteration(self, state: dict, stats: dict, evaluate: Callable[[], dict]) -> None:
        """Evaluate and save if it is time to, log, and end the run if a signal has asked for it.

        Evaluations are due in the first iteration, in every `--eval-every`th and in the last, and are left out when
        the run is to end: a resumed run makes up for it. Checkpoints are due likewise, but for the first iteration, and
        when the run is to end.
        """
        if is_due(self.args, state["iteration"]):
            stats = stats | self.evaluated(evaluate)
        self.log(state, stats)
        stop = self.should_stop()
        if stop or is_due(self.args, state["iteration"], first=False):
            self.save(state)
        whole = state["iteration"] == self.args.iterations and any(name.startswith("test/") for name in stats)
        if stop and not whole:
            raise Stopped

    def make_up_for_evaluation(self, state: dict, evaluate: Callable[[], dict]) -> None:
        """The evaluation of the last iteration, if the run was stopped before or in it."""
        summarise(self.evaluated(evaluate))

    def stop(self, state: dict) -> None:
        """End the run in the midst of an iteration; `state` holds all that is needed to go on from here."""
        self.save(state)
        raise Stopped

    def evaluated(self, evaluate: Callable[[], dict]) -> dict:
        """What it returns; nothing if a signal comes first. Several processes evaluate together, to the end."""
        self.doing("evaluating")
        alone = not torch.distributed.is_initialized()
        if alone and self.stopping:
            return {}
        try:
            self.cuts_evaluation = alone
            return evaluate()
        except EvaluationCut:
            return {}
        finally:
            self.cuts_evaluation = False

    def log(self, state: dict, stats: dict[str, float | Tensor]) -> None:
        """This process's part of the means."""
        summarise(stats)

    def save(self, state: dict) -> None:
        """Nothing: the leader's checkpoint holds the same."""

    def film(self, envs, policy, params: dict[str, dict[str, Tensor]]) -> None:
        """Nothing: the leader does it."""

    def end(self, stopped: bool) -> None:
        """Nothing: the leader draws the curve."""

    def close(self, failed: bool) -> None:
        """Nothing: there is nothing to let go of."""


class Run(Follower):
    """A run that keeps records, in a folder of its own.

    Args:
        args: the flags.
        state: what it begins from.
        unit: what adaptation is counted in, such as "inner steps".
        tests: what the test tasks are called.
    """

    def __init__(self, args, state: dict, unit: str, tests: str):
        super().__init__(args)
        self.unit, self.tests = unit, tests
        self.since = time.monotonic()
        self.rows = []
        self.bar = None
        self.tracker = None
        self.locked = None
        self.folder = Path(args.resume) if args.resume else new_folder(args, state["algorithm"])
        try:
            self.open(state, changed=state.pop("changed", {}))
        except BaseException:
            self.close(failed=True)
            with suppress(OSError):
                self.folder.rmdir()  # a new one, in which nothing is
            raise

    def open(self, state: dict, changed: dict[str, list]) -> None:
        """Claim the folder, drop the metrics of iterations that will be played again, and note this start."""
        self.locked = lock(self.folder)
        saved = state.pop("saved", 0)
        if saved and saved != (self.folder / "checkpoint.pt").stat().st_mtime_ns:
            raise refusal(f"--resume {self.folder}: another process has just gone on with this run; start again")
        done = state["iteration"] - state.get("unfinished", 0)  # whole iterations
        notes = []
        if self.args.resume:
            self.rows, dropped = read_metrics(self.folder, done)
            if dropped:
                notes.append(f"metrics.jsonl: {dropped} lines torn, repeated or after iteration {done} are dropped")
            if len(self.rows) < done:
                notes.append(f"metrics.jsonl: lines of {done - len(self.rows)} iterations are missing")
            told = (f"{flag(name)} {new} in place of {old}" for name, (old, new) in changed.items())
            notes += [f"changed: {text}" for text in told]
        starts = read_starts(self.folder / "args.json")
        number = next((start["wandb"] for start in reversed(starts) if start.get("wandb")), "")
        if self.args.track:
            self.tracker = Tracker(self.args, self.folder.resolve().name, number)
        flags = {name: value for name, value in vars(self.args).items() if name != "evaluate"}
        start = {"time": now(), "iteration": done, "flags": flags, "notes": notes, "torch": str(torch.__version__)}
        start |= {"wandb": self.tracker.number} if self.tracker else {}
        replace_file(self.folder / "args.json", f"{json.dumps([*starts, start], indent=2)}\n".encode())
        self.write_rows()
        self.bar = Progress(state["algorithm"], self.args.iterations, done)
        self.bar.write(f"    {self.folder}{f', goes on after iteration {done}' if done else ''}; Ctrl-C saves and ends")
        for note in notes:
            self.tell(note)

    def write_rows(self) -> None:
        """Replace metrics.jsonl."""
        lines = "".join(f"{json.dumps(row)}\n" for row in self.rows)
        replace_file(self.folder / "metrics.jsonl", lines.encode())

    def close(self, failed: bool) -> None:
        """Let go of the terminal, of Weights & Biases and of the folder."""
        try:
            if self.bar is not None:
                self.bar.close()
            if self.tracker is not None:
                self.tracker.finish(failed)
        finally:
            if self.locked is not None:
                os.close(self.locked)

    def make_up_for_evaluation(self, state: dict, evaluate: Callable[[], dict]) -> None:
        stats = summarise(self.evaluated(evaluate))
        if stats:
            refuse_not_finite(stats)
            self.rows[-1] |= stats
            self.write_rows()

    def tell(self, text: str) -> None:
        self.bar.write(f"    {text}")

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        self.bar.doing(what, done, of)

    def log(self, state: dict, stats: dict[str, float | Tensor]) -> None:
        """Write a line of metrics; NotFinite if one of the numbers is not.

        A tensor stands for its mean over all tasks, under a name that ends in ci95 for half the width of that mean's
        95 % confidence interval (`summarise`).
        """
        self.count_time(state)
        line = {name: state[name] for name in ("iteration", "env_steps", "seconds")} | summarise(stats)
        refuse_not_finite(line)
        try:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CannotWriteError(f"{error}: {self.folder / 'metrics.jsonl'}") from error
        self.rows.append(line)
        self.bar.end_iteration(line)
        if self.tracker is not None:
            self.tracker.log(line)

    def count_time(self, state: dict) -> None:
        state["seconds"] = round(state["seconds"] + time.monotonic() - self.since, 3)
        self.since = time.monotonic()

    def save(self, state: dict) -> None:
        """Replace checkpoint.pt."""
        self.count_time(state)
        save_checkpoint(self.folder, state)

    def film(self, envs, policy, params: dict[str, dict[str, Tensor]]) -> None:
        """adaptation.gif: one test task, with a policy's means under several parameters, by their captions."""
        try:
            film(self.folder / "adaptation.gif", envs, policy, params)
        except (OSError, RuntimeError) as error:
            self.tell(f"adaptation.gif could not be drawn: {error}")

    def end(self, stopped: bool) -> None:
        """Draw curve.png, and say in a line what adaptation changed, or how to go on."""
        done = self.rows[-1]["iteration"] if self.rows else 0
        if stopped:
            self.tell(f"stopped and saved after iteration {done}; --resume {self.folder} goes on")
        try:
            told = render.learning_curve(self.folder, self.rows, self.unit, self.tests)
        except OSError as error:
            self.tell(f"curve.png could not be drawn: {error}")
            return
        if told:
            self.bar.close()
            Lenient(sys.stdout).write(f"{told}\n")


class Asked(Follower):
    """A finished run that was evaluated again: nothing but a film is added to its folder."""

    def film(self, envs, policy, params: dict[str, dict[str, Tensor]]) -> None:
        film(unused(Path(self.args.evaluate), "adaptation.gif"), envs, policy, params)


class Done(Follower):
    """A resumed run that has nothing to do."""


def is_due(args, iteration: int, first: bool = True) -> bool:
    """Whether this iteration ends with an evaluation, as every `--eval-every`th does, the last, and the first.

    Without `first`, whether it ends with a checkpoint: the first does not. (`--eval-every` is 1 where there is none.)
    """
    if iteration == args.iterations or iteration % getattr(args, "eval_every", 1) == 0:
        return True
    return first and iteration == 1


def film(path: Path, envs, policy, params: dict[str, dict[str, Tensor]]) -> None:
    """A gif of one test task, with a policy's means under several parameters, by their captions."""

    def actor(weights: dict[str, Tensor]):
        return lambda obs: policy(weights, obs)[0]

    actors = {caption: actor(weights) for caption, weights in params.items()}
    render.adaptation_gif(path, envs, actors)


@contextmanager
def errors_in_one_line(state: dict, folder: Path | None, leads: bool = True) -> Iterator[None]:
    """Numbers that are not finite, files that cannot be written and worlds that cannot be used, as one line, no trace.

    All other errors keep theirs: they are faults of a program, this one's or a user's.
    """
    try:
        yield
    except (NotFinite, CannotWriteError, Unsuitable) as error:
        kept = "; nothing was saved yet" if leads else ""
        if folder is not None and (folder / "checkpoint.pt").exists():
            kept = f"; the last whole checkpoint is kept: --resume {folder}"
        raise refusal(f"iteration {state['iteration']}: {error}{kept}") from None


@contextmanager
def open_run(
    args, state: dict, envs, unit: str, evaluate: Callable[[], dict], leads: bool = True
) -> Iterator[Follower]:
    """A run to train in, which ends in order whatever happens; with --evaluate, one that has been evaluated.

    Args:
        args: the flags.
        state: what it begins from, and what is saved of it.
        envs: the worlds or the tasks.
        unit: what adaptation is counted in, such as "inner steps".
        evaluate: returns the metrics of an evaluation of what `state` holds.
        leads: whether this process keeps the records.
    """
    keep_memory()
    threads = torch.get_num_threads()
    folder = args.resume or args.evaluate
    with lenient_output(), errors_in_one_line(state, Path(folder) if folder else None, leads):
        try:
            if isinstance(envs, SupervisedTasks) and not envs.is_classification:
                torch.set_num_threads(1)  # more threads only cost where networks are that small
            video = getattr(args, "capture_video", False)
            if args.evaluate:
                if leads and video:
                    render.try_pictures(envs)
                tell(args, state, envs.unwrapped.test_set_name(), evaluate(), unit, leads)
                yield Asked(args) if leads else Follower(args)
            elif nothing_to_do(args, state, leads):
                yield Done(args)
            else:
                if leads:
                    render.try_pictures(envs if video else None)
                yield from running(args, state, envs, evaluate, unit, leads)
        finally:
            torch.set_num_threads(threads)


def running(args, state: dict, envs, evaluate: Callable[[], dict], unit: str, leads: bool) -> Iterator[Follower]:
    """Open a run, yield it once, and bring it to its end; SystemExit if a signal ends it before it is yielded."""
    tests = envs.unwrapped.test_set_name()
    run = Run(args, state, unit, tests) if leads else Follower(args)
    state.pop("changed", None)
    folder = run.folder if leads else None
    try:
        with errors_in_one_line(state, folder, leads), run.listening():
            try:
                if in_any_process(leads and lacks_evaluation(args, state, run.rows)):
                    run.make_up_for_evaluation(state, evaluate)
                    if run.should_stop():
                        run.end(stopped=True)
                        raise SystemExit(0)  # a context manager cannot leave the body out otherwise
                yield run
                run.end(stopped=False)
            except Stopped:
                run.end(stopped=True)
    except BaseException:
        run.close(failed=True)
        raise
    run.close(failed=False)


def nothing_to_do(args, state: dict, leads: bool) -> bool:
    """Whether a resumed run has played all its iterations; says so."""
    folder = Path(args.resume)
    done = bool(args.resume) and state["iteration"] >= args.iterations and not state.get("unfinished", 0)
    if done and leads:
        rows, _ = read_metrics(folder, state["iteration"])
        done = not lacks_evaluation(args, state, rows) and (folder / "curve.png").exists()
    if in_any_process(not done):
        return False
    if leads:
        say(f"{folder}: all of its {state['iteration']} iterations are done; --iterations asks for more,")
        say(f"    --evaluate {folder} evaluates it again. Nothing was changed.")
    return True


def lacks_evaluation(args, state: dict, rows: list[dict]) -> bool:
    """Whether the evaluation of the last iteration is due and was not made, and `state` is still that iteration's."""
    if not rows or rows[-1]["iteration"] != state["iteration"] or state.get("unfinished", 0):
        return False
    return is_due(args, rows[-1]["iteration"]) and not any(name.startswith("test/") for name in rows[-1])
