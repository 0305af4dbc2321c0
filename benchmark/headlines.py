"""Headlines, the rows of headlines.toml: run one again and compare, and make the tables in README.md and docs/.

    python benchmark/headlines.py reproduce maml_trpo      run its first row, say whether the figure is in its interval
    python benchmark/headlines.py reproduce maml_trpo --row "HalfCheetahDir first-order" --seed 2
    python benchmark/headlines.py keep maml_trpo --row NAME --runs runs/A runs/B ..     copy finished runs of a row
    python benchmark/headlines.py update      figure, interval, seeds and minutes of headlines.toml, from what is kept
    python benchmark/headlines.py tables      the tables between the marks in README.md and docs/, from headlines.toml

`reproduce` keeps its run in runs/reproduce/FILE/NAME/SEED. Ctrl-C lets it finish its iteration and save; the same
command goes on from there, and does not train again what is finished. It exits with 0 if all figures are inside, or
there is no interval, with 1 if one is outside, with 2 if it was asked for what it cannot do, and with 3 if the run did
not come to its end.

A row's interval is where a new seed is to be expected in 95 of 100 cases: the prediction interval of a normal
distribution, mean +- t s sqrt(1 + 1 / n), for n seeds with standard deviation s, and t of Student's distribution with
n - 1 degrees of freedom (Hahn and Meeker 1991, Statistical Intervals, chapter 4). Two seeds have none: it would be 19
standard deviations wide to either side.
"""

import fcntl
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.curves import origin  # noqa: E402
from benchmark.rl2 import tests_of  # noqa: E402
from envs import records  # noqa: E402
from envs.files import replace_file  # noqa: E402
from envs.processes import half_width  # noqa: E402

HEADLINES, RUNS, PAGES = ROOT / "benchmark/headlines.toml", ROOT / "runs/reproduce", ROOT
NEEDED = 3  # seeds, for an interval
ABOUT = [  # above a table
    "Means over seeds on the test tasks, after 0, 1, .. steps of adaptation; in brackets, from three seeds on, where",
    "a new seed is to be expected in 95 of 100 cases; minutes of one seed on one core; `make reproduce` runs it again.",
]
BESIDE = {"resume", "evaluate", "capture_video", "track", "wandb_mode"}  # flags that change no figure
INSIDE, OUTSIDE, WRONG, UNFINISHED = 0, 1, 2, 3  # exit codes


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["reproduce", "keep", "update", "tables"]]
    """what to do"""
    file: tyro.conf.Positional[str] = ""
    """of algos/, without .py; `update` and `tables` take all"""
    row: str = ""
    """name of a row; none: the file's first one"""
    seed: int = 1
    """of the run to make"""
    runs: tuple[Path, ...] = ()
    """folders of runs to keep; none: those of `reproduce`"""


class Row(NamedTuple):
    """A headline. The top of headlines.toml says what each field is."""

    file: str
    name: str
    commands: list[str]
    metrics: list[str]
    figure: list[float]
    interval: list[list[float]]
    seeds: list[int]
    minutes: float
    paper: str
    commit: str
    kept: str

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"


def refuse(message: str) -> NoReturn:
    """End with a line that says what cannot be done."""
    print(message, file=sys.stderr)
    raise SystemExit(WRONG)


def fail(message: str) -> NoReturn:
    """End with a line that says why a run did not come to its end."""
    print(message, file=sys.stderr)
    raise SystemExit(UNFINISHED)


def read_rows() -> list[Row]:
    """All of headlines.toml."""
    return [Row(**row) for row in tomllib.loads(HEADLINES.read_text())["row"]]


def chosen(options: Options) -> Row:
    """The row that is asked for."""
    rows = read_rows()
    files = dict.fromkeys(row.file for row in rows)
    if options.file not in files:
        refuse(f"no headline of {options.file or 'no file'}; there are some of {', '.join(files)}")
    own = [row for row in rows if row.file == options.file]
    name = options.row or own[0].name
    for row in own:
        if row.name == name:
            return row
    refuse(f"{options.file} has no headline {name}; it has {', '.join(row.name for row in own)}")


# ---------------------------------------------------------------- commands and runs


def flags_of(command: str, seed: int, run: str = "RUN") -> list[str]:
    """The flags of a row's command, with this seed and this run."""
    given = {"SEED": str(seed), "RUN": run}
    words = shlex.split(command)[2:]  # after python and the script
    return [given.get(word, word) for word in words]


def args_of(row: Row, seed: int) -> list[dict]:
    """What all flags are by a row's commands, for each command; the second one begins with the first one's."""
    args = None
    found = []
    for command in row.commands:
        args = tyro.cli(import_module(f"algos.{row.file}").Args, args=flags_of(command, seed), default=args)
        records.fill_in(args)
        found.append(json.loads(json.dumps(vars(args))))
    return found


def differences(found: dict, wanted: dict) -> str:
    """How flags differ from those that are wanted; those that an older version did not know do not."""
    names = sorted(found.keys() & wanted.keys() - BESIDE)
    return ", ".join(f"{name} {found[name]} and not {wanted[name]}" for name in names if found[name] != wanted[name])


def is_finished(folder: Path, iterations: int) -> bool:
    """Whether a run has come to its last iteration, and has been tested there."""
    rows, _ = records.read_metrics(folder)
    return bool(rows) and rows[-1]["iteration"] == iterations and any(name.startswith("test/") for name in rows[-1])


def evaluation(folder: Path, wanted: dict) -> Path | None:
    """The evaluation.json that a run's last iteration has by these flags, or evaluation-2.json, ..; None without one.

    Evaluations are of fixed tasks and noise: all of the same flags are equal.
    """
    for path in sorted(folder.glob("evaluation*.json")):
        text = path.read_text()
        record = json.loads(text) if text else {}  # a killed process leaves an empty one
        if record and record["iteration"] == wanted["iterations"] and not differences(record["flags"], wanted):
            return path
    return None


def metrics_of(row: Row, metrics: Path, evaluated: Path | None) -> list[float]:
    """The row's metrics, of a run's metrics.jsonl and evaluation.json, or of kept copies of them."""
    last = json.loads(evaluated.read_text())["metrics"] if evaluated else json.loads(lines_of(metrics)[-1])
    return [last[name] for name in row.metrics]


def lines_of(path: Path) -> list[str]:
    """The lines of a file, which may be packed."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return text.decode().splitlines()


# ---------------------------------------------------------------- reproduce


def home(row: Row, seed: int) -> Path:
    """Where `reproduce` has the run of a row."""
    return RUNS / row.file / row.name.replace(" ", "-") / str(seed)


def run_in(place: Path) -> Path | None:
    """The folder of the run in this place, if there is one."""
    found = place.glob("runs/*")
    return max(found, key=lambda path: ((path / "checkpoint.pt").exists(), path.name), default=None)


def reproduce(options: Options) -> int:
    """Run a row, or what is unfinished of it, and compare its figures with the published ones; the exit code."""
    row = chosen(options)
    if not row.seeds:
        refuse(f"{row}: not measured yet, so there is no figure to compare with")
    if not 0 <= options.seed <= 2**31:
        refuse(f"--seed {options.seed}: allowed is 0 to {2**31}")
    place = home(row, options.seed)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"{place}: another process works there")
        print(f"{row}, seed {options.seed}: about {row.minutes:g} minutes on one core of our machine")
        for command in row.commands:
            print(f"    {command.replace('SEED', str(options.seed))}")
        print(f"    in {place}; Ctrl-C saves and ends, the same command goes on", flush=True)
        folder, evaluated = run(row, options.seed, place, lock)
    return compare(row, options.seed, metrics_of(row, folder / "metrics.jsonl", evaluated))


def run(row: Row, seed: int, place: Path, lock) -> tuple[Path, Path | None]:
    """A row's finished run, and its evaluation if there is a second command; what there is of them is not made again.

    SystemExit if a run cannot be brought to its end.
    """
    trained, *again = args_of(row, seed)
    folder = run_in(place)
    if folder and (folder / "args.json").exists():
        other = differences(records.last_flags(folder / "args.json"), trained)
        if other:
            refuse(f"{folder}: not a run of this row, it has {other}; remove it")
    if folder and is_finished(folder, trained["iterations"]):
        print(f"    trained already: {folder}", flush=True)
    else:
        flags = flags_of(row.commands[0], seed)
        if folder and (folder / "checkpoint.pt").exists():
            flags = ["--resume", f"runs/{folder.name}"]
        else:
            shutil.rmtree(place / "runs", ignore_errors=True)  # nothing to go on from
        call(row.file, flags, place, lock)
        folder = run_in(place)
        if folder is None or not is_finished(folder, trained["iterations"]):
            fail("stopped; the same command goes on")
    if not again:
        return folder, None
    if not evaluation(folder, *again):
        call(row.file, flags_of(row.commands[1], seed, run=f"runs/{folder.name}"), place, lock)
    return folder, evaluation(folder, *again) or fail(f"{folder}: no evaluation by the second command")


def call(file: str, flags: list[str], place: Path, lock) -> None:
    """Run a file of algos/ in this place, and pass signals on to it; SystemExit if it fails.

    It holds the lock, too, so that nothing else works there even when this process is killed.
    """
    command = [sys.executable, str(ROOT / f"algos/{file}.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=place, env=environment, pass_fds=[lock.fileno()]) as process:
        # A terminal sends Ctrl-C to the process, too; it takes two within a second for one.
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
        status = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        fail(f"exit status {status}: {shlex.join(command)}")


def compare(row: Row, seed: int, now: list[float]) -> int:
    """Print a line for each metric, and return the exit code."""
    lines = [["", "now", "published", "interval", ""]]
    verdicts = []
    for i, name in enumerate(row.metrics):
        interval, verdict = "", ""
        if row.interval:
            low, high = row.interval[i]
            interval = f"{low:g} to {high:g}"
            verdict = "inside" if low <= now[i] <= high else "OUTSIDE"
        verdicts.append(verdict)
        lines.append([name, f"{now[i]:.4g}", f"{row.figure[i]:g}", interval, verdict])
    widths = [max(len(line[k]) for line in lines) for k in range(5)]
    print()
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("   ".join([first.ljust(widths[0]), *cells]).rstrip())
    numbers = ", ".join(map(str, row.seeds))
    print(f"published: the mean of seeds {numbers}, at commit {row.commit}")
    if seed in row.seeds:
        print(f"seed {seed} had {' / '.join(f'{x:.4g}' for x in kept_figures(row, seed))}")
    if row.paper:
        print(f"the paper: {row.paper}")
    if not row.interval:
        print(f"No interval: with fewer than {NEEDED} seeds nothing is known of where another one lies.")
    return OUTSIDE if "OUTSIDE" in verdicts else INSIDE


# ---------------------------------------------------------------- what is kept


def kept(row: Row, seed: int, what: str) -> Path:
    """A kept file of a row."""
    return ROOT / f"{row.kept}_seed{seed}.{what}"


def kept_figures(row: Row, seed: int) -> list[float]:
    """A seed's metrics, from its kept files."""
    evaluated = kept(row, seed, "evaluation.json") if len(row.commands) > 1 else None
    return metrics_of(row, kept(row, seed, "metrics.jsonl.gz"), evaluated)


def keep(options: Options) -> None:
    """Copy metrics, flags and evaluation of finished runs to where the row's `kept` says."""
    row = chosen(options)
    folders = options.runs or sorted((RUNS / row.file / row.name.replace(" ", "-")).glob("*/runs/*"))
    if not folders:
        refuse(f"{row}: `reproduce` has no run of it; --runs names others")
    for folder in folders:
        if not (folder / "args.json").exists():
            refuse(f"{folder} is no folder of a run: it has no args.json")
        flags = records.last_flags(folder / "args.json")
        seed = flags["seed"]
        trained, *again = args_of(row, seed)
        other = differences(flags, trained)
        if other:
            refuse(f"{folder}: not a run of {row}, it has {other}")
        if not is_finished(folder, trained["iterations"]):
            refuse(f"{folder}: not finished")
        evaluated = evaluation(folder, *again) if again else None
        if again and not evaluated:
            refuse(f"{folder}: not evaluated; {row.commands[1].replace('RUN', str(folder))}")
        about = kept(row, seed, "args.json")
        if about.exists():
            other = differences(json.loads(about.read_text())["args"], trained)
            if other:
                refuse(f"{about}: another result, it has {other}; move it away, or give the row another `kept`")
        about.parent.mkdir(parents=True, exist_ok=True)
        command = f"OMP_NUM_THREADS=1 python algos/{row.file}.py {shlex.join(flags_of(row.commands[0], seed))}"
        record = origin(command) | {"tests": tests_of(records.read_metrics(folder)[0]), "args": flags | {"resume": ""}}
        about.write_text(json.dumps(record, indent=2) + "\n")
        packed = gzip.compress((folder / "metrics.jsonl").read_bytes(), 9, mtime=0)
        kept(row, seed, "metrics.jsonl.gz").write_bytes(packed)
        if evaluated:
            shutil.copy(evaluated, kept(row, seed, "evaluation.json"))
        print(f"{row.kept}_seed{seed}")


def prediction_interval(values: list[float]) -> list[float]:
    """Where another value is to be expected in 95 of 100 cases: [low, high]."""
    x = torch.tensor(values, dtype=torch.double)
    mean = float(x.mean())
    half = half_width(x) * (len(x) + 1) ** 0.5  # the mean's is t s sqrt(1 / n)
    return [mean - half, mean + half]


def kept_seeds(row: Row) -> list[int]:
    """Seeds of which there are kept files by the row's commands; of others, it is said why they are left out."""
    found = []
    start = ROOT / f"{row.kept}_seed"
    for path in sorted(start.parent.glob(f"{start.name}*.args.json")):
        seed = int(path.name.removeprefix(start.name).removesuffix(".args.json"))
        trained, *again = args_of(row, seed)
        other = differences(json.loads(path.read_text())["args"], trained)
        if again:
            flags = json.loads(kept(row, seed, "evaluation.json").read_text())["flags"]
            other = other or differences(flags, *again)
        if other:
            print(f"{row}: {path.name} is left out, it has {other}")
        else:
            found.append(seed)
    return sorted(found)


def measured(row: Row) -> dict:
    """Figure, interval, seeds and minutes, as they follow from the kept files."""

    def short(x: float) -> float:
        return float(f"{x:.4g}")

    seeds = kept_seeds(row)
    if not seeds:
        return {"figure": [], "interval": [], "seeds": [], "minutes": 0}
    by_metric = list(zip(*[kept_figures(row, seed) for seed in seeds], strict=True))
    figure = [short(sum(values) / len(values)) for values in by_metric]
    interval = []
    if len(seeds) >= NEEDED:
        interval = [[short(end) for end in prediction_interval(values)] for values in by_metric]
    seconds = [json.loads(lines_of(kept(row, seed, "metrics.jsonl.gz"))[-1])["seconds"] for seed in seeds]
    minutes = sum(seconds) / len(seconds) / 60
    minutes = round(minutes) if minutes > 9 else round(minutes, 1)
    return {"figure": figure, "interval": interval, "seeds": seeds, "minutes": minutes}


def update(options: Options) -> None:
    """Replace the lines of headlines.toml that follow from the kept files; all others stay."""
    news = iter([measured(row) for row in read_rows()])
    lines = []
    for line in HEADLINES.read_text().splitlines():
        if line == "[[row]]":
            new = next(news)
        name = line.partition(" = ")[0]
        if name in ("figure", "interval", "seeds", "minutes"):
            line = f"{name} = {json.dumps(new[name])}"
        lines.append(line)
    replace_file(HEADLINES, "".join(f"{line}\n" for line in lines).encode())


# ---------------------------------------------------------------- tables


def column(metric: str) -> str:
    """A metric's name at the head of a table: test/return_k3 is "after 3"."""
    after = re.fullmatch(r"test/\w+_k(\d+)", metric)
    return f"after {after[1]}" if after else metric.removeprefix("test/")


def table(rows: list[Row], with_file: bool = False) -> list[str]:
    """The measured ones of the rows, in the lines of a table with what it is about; none without any."""
    rows = [row for row in rows if row.seeds]
    if not rows:
        return []
    columns = {column(metric) for row in rows for metric in row.metrics}
    columns = sorted(columns, key=lambda name: (len(name), name))  # after 9 comes before after 10
    heads = ["run", *columns, "seeds", "minutes", "the paper"]
    if with_file:
        heads.insert(0, "file")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = dict.fromkeys(columns, "")
        for i, metric in enumerate(row.metrics):
            cells[column(metric)] = f"{row.figure[i]:g}"
            if row.interval:
                low, high = row.interval[i]
                cells[column(metric)] += f" ({low:g} to {high:g})"
        file = [f"[`{row.file}`](docs/{row.file}.md)"] if with_file else []
        line = [*file, row.name, *cells.values(), str(len(row.seeds)), f"{row.minutes:g}", row.paper]
        lines.append(f"| {' | '.join(line)} |")
    return ["", *ABOUT, "", *lines, ""]


def wrapped(command: str) -> list[str]:
    """A command in lines of at most 120 columns, broken before flags."""
    lines = [""]
    for part in re.split(r" (?=--)", " ".join(command.split())):
        if len(lines[-1]) + len(part) > 115:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return lines


def commands(rows: list[Row]) -> list[str]:
    """The commands of the measured rows, in the lines of a block of code."""
    lines = []
    for row in rows:
        if row.seeds:
            seeds = ", ".join(map(str, row.seeds))
            lines.append(f"# {row.name}: SEED {seeds}, at commit {row.commit}")
            lines += [line for command in row.commands for line in wrapped(command)]
    return ["```", *lines, "```", ""] if lines else []


def page(text: str, mark: str, lines: list[str]) -> str:
    """A page's text with these lines between its marks; SystemExit unless they are there once."""
    parts = re.split(rf"(<!-- {mark} -->\n|<!-- /headlines -->\n)", text)
    if parts[1::2] != [f"<!-- {mark} -->\n", "<!-- /headlines -->\n"]:
        refuse(f"a page must have <!-- {mark} --> and <!-- /headlines --> once, on lines of their own")
    parts[2] = "".join(f"{line}\n" for line in lines)
    return "".join(parts)


def pages() -> dict[Path, str]:
    """The texts of README.md and of the pages in docs/ with the tables of today's headlines.toml."""
    rows = read_rows()
    by_file: dict[str, list[Row]] = {}
    for row in rows:
        by_file.setdefault(row.file, []).append(row)
    path = PAGES / "README.md"
    firsts = [own[0] for own in by_file.values()]
    texts = {path: page(path.read_text(), "headlines", table(firsts, with_file=True))}
    for file, own in by_file.items():
        path = PAGES / f"docs/{file}.md"
        texts[path] = page(path.read_text(), f"headlines: {file}", [*table(own), *commands(own)])
    return texts


def tables(options: Options) -> None:
    """Write the tables where they are not up to date."""
    for path, text in pages().items():
        if path.read_text() != text:
            replace_file(path, text.encode())
            print(path)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    does = {"reproduce": reproduce, "keep": keep, "update": update, "tables": tables}
    raise SystemExit(does[options.what](options) or 0)


if __name__ == "__main__":
    main()
