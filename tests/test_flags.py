"""envs/flags.py: what --help prints; the oracles: the files' text, tyro, and what the algorithms' own main accepts."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import torch
import tyro

import envs
from envs import fewshot, records
from envs.adapter import AdaptedVectorEnv
from envs.flags import GROUPS, OWN, accepted_ids, groups, show_help, wants_help
from tests.test_processes import Single

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
HEADINGS = {
    "Flags of the task:": "task",
    "Flags of the algorithm:": "algorithm",
    "Flags of the evaluation:": "evaluation",
    "Flags of the device:": "device",
    "Flags of the run and its records:": "records",
}
LAST = "What --env-id accepts:"
each_algorithm = pytest.mark.parametrize("name", NAMES)


def module(name: str) -> ModuleType:
    return import_module(f"algos.{name}")


def shown(name: str, capsys, monkeypatch, columns: int = 120) -> list[str]:
    """Lines of an algorithm's help."""
    monkeypatch.setenv("COLUMNS", str(columns))
    capsys.readouterr()
    show_help(module(name).Args, module(name).__doc__, name)
    out, err = capsys.readouterr()
    assert not err
    return out.splitlines()


def below_docstring(lines: list[str]) -> list[str]:
    return lines[lines.index(next(iter(HEADINGS))) :]


def entries(lines: list[str]) -> list[tuple[str, str, str]]:
    """All flags of a help's lines: heading, flag with what follows it, and the text, unwrapped."""
    found, heading = [], None
    for line in below_docstring(lines):
        if line == LAST:
            break
        if line and line[0] != " ":
            heading = line
        elif line.startswith("  --"):
            flag, _, text = line[2:].partition("  ")
            found.append([heading, flag, text.strip()])
        elif line:
            found[-1][2] = f"{found[-1][2]} {line.strip()}".strip()
    return [tuple(entry) for entry in found]


def listed(lines: list[str]) -> list[str]:
    """The ids that a help's lines list."""
    text = " ".join(lines[lines.index(LAST) :]).partition(OWN)[0]
    return re.findall(r"[\w-]+-v0|Meta-World/[\w-]+", text)


@cache
def written(name: str) -> dict[str, tuple[str, str]]:
    """Type and docstring of each field in the text of a file."""
    text = (ROOT / f"algos/{name}.py").read_text()
    text = text[text.index("\nclass Args:") : text.index("def __post_init__")]
    return {x[0]: (x[1], x[2]) for x in re.findall(r'^    (\w+): (.+?) = .+\n    """(.+)"""$', text, re.MULTILINE)}


def field_name(flag: str) -> str:
    return re.match(r"--([a-z-]+)", flag)[1].replace("-", "_")


# ---------------------------------------------------------------- the text


@each_algorithm
@pytest.mark.parametrize("columns", [30, 200])
def test_the_docstring_stands_first_line_for_line(name, columns, capsys, monkeypatch):
    text = (ROOT / f"algos/{name}.py").read_text()
    docstring = text.split('"""')[1].rstrip("\n").split("\n")
    lines = shown(name, capsys, monkeypatch, columns)
    assert len(docstring) > 15
    assert lines[: len(docstring) + 2] == [*docstring, "", "Flags of the task:"]


@each_algorithm
def test_every_field_is_a_flag_under_one_heading_with_its_docstring(name, capsys, monkeypatch):
    lines = shown(name, capsys, monkeypatch)
    headings = [line for line in below_docstring(lines) if line and line[0] != " "]
    assert headings == [x for x in HEADINGS if name != "mbmpo" or HEADINGS[x] != "evaluation"] + [LAST]  # no eval_*
    found = entries(lines)
    assert sorted(field_name(flag) for _, flag, _ in found) == sorted(written(name))
    assert len(written(name)) == len(fields(module(name).Args)) > 15
    for _, flag, text in found:
        kind, docstring = written(name)[field_name(flag)]
        assert re.fullmatch(re.escape(docstring) + r"( \(default: \S+\))?", text)
        assert re.fullmatch(r"--no-[a-z-]+", flag.split(", ")[-1]) if kind == "bool" else flag.startswith("--")


@each_algorithm
def test_the_groups_are_those_of_the_headings(name, capsys, monkeypatch):
    found = entries(shown(name, capsys, monkeypatch))
    members = {HEADINGS[heading]: [] for heading, *_ in found}
    for heading, flag, _ in found:
        members[HEADINGS[heading]].append(field_name(flag))
    assert groups(module(name).Args) == members
    assert list(GROUPS) == list(HEADINGS.values())
    assert members["task"][0] == "env_id"
    order = list(written(name))
    assert all(names == sorted(names, key=order.index) for names in members.values())


@pytest.mark.parametrize(
    ("name", "group", "members"),
    [
        ("maml_trpo", "task", "env_id horizon action_scale"),
        ("maml_trpo", "evaluation", "eval_every eval_steps"),
        ("maml_trpo", "device", "cuda physics"),
        ("maml_trpo", "records", "seed iterations resume capture_video track wandb_mode"),
        ("maml", "task", "env_id data ways shots"),
        ("maml", "evaluation", "eval_every eval_tasks eval_split eval_steps"),
        ("protonet", "task", "env_id data ways train_ways shots queries"),
        ("lirpg", "task", "env_id horizon delay"),
        ("meta_gradient_a2c", "task", "env_id horizon"),
        ("multitask_ppo", "task", "env_id task_given horizon action_scale"),
        ("pearl_sac", "task", "env_id train_tasks horizon dense_training"),
        ("pearl_sac", "device", "cuda physics low_precision compile"),
        ("rl2_ppo", "task", "env_id episodes_per_trial horizon action_scale"),
        ("varibad_ppo", "task", "env_id episodes_per_trial horizon action_scale"),
        ("lifetime_rewards", "task", "env_id episodes_per_lifetime horizon"),
        ("meta_critic", "evaluation", "eval_steps eval_windows eval_episodes eval_greedy eval_every"),
        ("reptile_ppo", "algorithm", "meta_batch_size episodes_per_task hidden_size inner_lr inner_steps inner_epochs")
    ],
)  # fmt: skip
def test_fields_are_where_a_reader_looks_for_them(name, group, members):
    found = set(groups(module(name).Args)[group]) - {"evaluate"}
    assert found >= set(members.split()) if group == "algorithm" else sorted(found) == sorted(members.split())


def test_the_groups_name_no_field_that_has_gone():
    known = {field for name in NAMES for field in written(name)} | {"evaluate"}
    assert set().union(*GROUPS.values()) <= known


@each_algorithm
def test_tyro_reads_the_printed_defaults_as_the_defaults(name, capsys, monkeypatch):
    """All of them on one command line; those that the docstring tells are left out."""
    Args, argv = module(name).Args, []
    for _, flag, text in entries(shown(name, capsys, monkeypatch)):
        yes, _, no = flag.partition(", ")
        default = re.search(r" \(default: (\S+)\)$", text)
        if no:
            argv.append({"on": yes, "off": no}[default[1]])
        elif default:
            argv += [yes.split()[0], "" if default[1] == "none" else default[1]]
        else:
            assert getattr(Args, field_name(flag)) in (None, ())
            assert "default" in text
    assert len(argv) > 20
    assert tyro.cli(Args, args=argv) == Args()


@each_algorithm
def test_flags_are_spelt_as_by_tyro(name, capsys, monkeypatch):
    found = [flag for _, flag, _ in entries(shown(name, capsys, monkeypatch))]
    with pytest.raises(SystemExit):
        tyro.cli(module(name).Args, args=["--help"])
    rows = {re.split(r"  +", line.strip("│ "))[0] for line in capsys.readouterr().out.splitlines()}
    rows = {re.sub(r"\{None\}\||None,", "", row) for row in rows}  # None: leave the flag out
    assert {re.sub(r"(\w+) \.\.$", r"[\1 [\1 ...]]", flag) for flag in found} <= rows


@each_algorithm
@pytest.mark.parametrize(("columns", "width"), [(30, 80), (80, 80), (97, 97), (300, 120)])
def test_lines_fit_and_are_aligned(name, columns, width, capsys, monkeypatch):
    lines = below_docstring(shown(name, capsys, monkeypatch, columns))
    assert width - 12 < max(len(line) for line in lines) <= width
    flags = [line for line in lines[: lines.index(LAST)] if line.startswith(" ")]
    begins = {len(re.match(r"(  --.*?  +|  --.+$| +)", line)[0]) for line in flags if len(line.split("  ")) > 2}
    assert len(begins) == 1
    assert [line for line in flags if re.search(r"\(default:$|\w-$", line)] == []


@dataclass
class Odd:
    """What a user's own file may hold."""

    env_id: str = "Mine-v0"
    evaluate: str = ""
    """a run"""
    bare: int = 3
    empty: float | None = None
    """told by
    two lines"""
    mode: Literal["a", "b"] | None = "b"
    sizes: tuple[int, ...] = (4, 5)
    """sizes"""


def test_fields_of_a_users_own_file(capsys):
    show_help(Odd, "\nFirst.\n\n\n    50 % of it %s {x}\n", "mine")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == ["First.", "", "", "    50 % of it %s {x}", "", "Flags of the task:"]
    assert entries(["Flags of the task:", *lines[6:]]) == [
        ("Flags of the task:", "--env-id STR", "(default: Mine-v0)"),
        ("Flags of the algorithm:", "--bare INT", "(default: 3)"),
        ("Flags of the algorithm:", "--empty FLOAT", "told by two lines (default: none)"),
        ("Flags of the algorithm:", "--mode {a,b}", "(default: b)"),
        ("Flags of the algorithm:", "--sizes INT ..", "sizes (default: (4, 5))"),
        ("Flags of the run and its records:", "--evaluate STR", "a run (default: none)"),
    ]
    rest = ["bare", "empty", "mode", "sizes"]
    assert groups(Odd) == {"task": ["env_id"], "algorithm": rest, "records": ["evaluate"]}


# ---------------------------------------------------------------- the ids

SMALL = {"meta_batch_size": 2, "episodes_per_task": 1, "episodes_per_trial": 2, "num_worlds": 2, "num_models": 2}
SMALL |= {"tasks_per_iteration": 2, "train_tasks": 2, "minibatches": 1, "epochs": 1, "hidden_size": 16, "horizon": 6}
SMALL |= {"eval_episodes": 1, "model_size": 8, "rollout_steps": 12, "replay_size": 64}


class AcceptedError(Exception):
    """An algorithm has made its worlds and begins; it is no error of it."""


def begun(*args, **kwargs):
    raise AcceptedError


@pytest.fixture
def without_runs(monkeypatch):
    """Algorithms end where they would begin to write; pictures and Meta-World's arms are replaced by simple ones."""

    def draw(classes, instances, generator, device):
        return torch.zeros(classes, instances, 28, 28, dtype=torch.uint8)

    def make_metaworld(benchmark, num_envs, **options):
        return AdaptedVectorEnv(Single, num_envs, **options)

    monkeypatch.setattr(records, "open_run", begun)
    monkeypatch.setattr(fewshot, "draw_glyphs", draw)
    monkeypatch.setattr(envs, "make_metaworld", make_metaworld)


def accepts(name: str, env_id: str) -> bool:
    """Whether an algorithm's main gets along with these worlds; false where it refuses them in one line."""
    flags = [f"--{field}={value}" for field, value in SMALL.items() if field in written(name)]
    flags += ["--data", "nowhere"] if env_id == "Omniglot-v0" and "data" in written(name) else []
    with pytest.raises((AcceptedError, SystemExit)) as end:
        module(name).main(["--env-id", env_id, *flags])
    only_pictures_are_missing = str(end.value).startswith("--data nowhere")  # Omniglot's
    assert end.type is AcceptedError or only_pictures_are_missing or str(end.value).startswith("--env-id")
    return end.type is AcceptedError or only_pictures_are_missing


@each_algorithm
def test_listed_ids_are_those_that_the_algorithm_accepts(name, without_runs, capsys, monkeypatch):
    found = listed(shown(name, capsys, monkeypatch))
    every = [f"{family.__name__}-v0" for family in (*envs.HORIZONS, *envs.SUPERVISED, *envs.OPTIMISEES)]
    every += ["Meta-World/ML10", "Meta-World/ML45", "Meta-World/reach-v3"]
    assert len(every) > 40
    assert sorted(found) == sorted(x for x in every if accepts(name, x))
    assert module(name).Args().env_id in found


@each_algorithm
def test_the_help_says_how_to_name_an_environment_of_ones_own(name, capsys, monkeypatch):
    last = " ".join(line.strip() for line in shown(name, capsys, monkeypatch)[-4:])
    told = "my_package.my_module:MyTask-v0 .* or path/to/file.py:MyTask .* sample_tasks and set_task$"
    supervised = ("maml", "fomaml", "reptile", "protonet", "in_context", "learned_optimizer")  # which know no Gymnasium
    assert bool(re.search(told, last)) == (name not in (*supervised, "dpt", "ad"))  # and these look tables up


def test_ids_stand_under_the_kind_of_their_actions():
    for kind, ids in accepted_ids("rl2_ppo").items():
        for name in ids:
            if "Meta-World" not in name:
                is_choice = envs.make(name, 1, 5, discrete=True).unwrapped.is_discrete
                assert {True: "choices", False: "continuous"}[is_choice] in kind
        assert ("Meta-World" in kind) == ("Meta-World/ML10" in ids)


def test_a_users_own_file_is_told_all_ids():
    every = {f"{family.__name__}-v0" for family in (*envs.HORIZONS, *envs.SUPERVISED, *envs.OPTIMISEES)}
    assert {x for ids in accepted_ids("mine").values() for x in ids if "Meta-World" not in x} == every


# ---------------------------------------------------------------- the way out


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--seed", "3", "--help"], ["--wrong", "-h", "--cuda"]])
def test_help_is_asked_for(argv, monkeypatch):
    assert wants_help(argv)
    monkeypatch.setattr(sys, "argv", ["maml.py", *argv])
    assert wants_help(None)
    assert not wants_help([])


@pytest.mark.parametrize("argv", [[], ["--seed", "3"], ["--helpful"], ["-hx"], ["h", "help"], ["--env-id=--help"]])
def test_help_is_not_asked_for(argv, monkeypatch):
    assert not wants_help(argv)
    monkeypatch.setattr(sys, "argv", ["--help", *argv])
    assert not wants_help(None)


SCRIPT = """
from algos import maml
from envs.flags import show_help, wants_help
if wants_help(None):
    show_help(maml.Args, "Short.", "maml")  # all of it stays in Python's buffer where it cannot be written
    raise SystemExit(0)
raise SystemExit("no help")
"""


def ended(stdout: int, shell: str = "") -> tuple[int, str]:
    """Exit code and standard error of a process that shows the help, with Python's usual buffer of its output."""
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", SCRIPT, "--help"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100)
    return process.returncode, process.stderr


def test_a_dead_or_closed_standard_output_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    assert ended(writer) == (0, "")
    os.close(writer)
    assert ended(subprocess.DEVNULL, ">&-") == (0, "")
    with open(tmp_path / "help", "w+") as file:
        assert ended(file.fileno()) == (0, "")
        file.seek(0)
        assert file.read().startswith("Short.\n\nFlags of the task:\n  --env-id STR")
