"""What --help prints: an algorithm's docstring as it is written, its flags in groups, and the ids that it accepts.

tyro, which reads the flags, would join the docstring's lines, and has no groups for the fields of one dataclass.
"""

import ast
import inspect
import os
import shutil
import sys
from dataclasses import fields
from itertools import pairwise
from textwrap import wrap
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

from . import HORIZONS, OPTIMISEES, SUPERVISED, own

TASK = {
    "env_id",
    "data",
    "ways",
    "shots",
    "queries",
    "horizon",
    "action_scale",
    "delay",
    "dense_training",
    "task_given",
}
TASK |= {"train_ways", "queries", "train_tasks", "episodes_per_trial", "episodes_per_lifetime", "lifetime"}
GROUPS = {  # "algorithm" has all that are not named here, "evaluation" those that begin with eval_
    "task": TASK,
    "algorithm": set(),
    "evaluation": set(),
    "device": {"cuda", "physics", "low_precision", "compile"},
    "records": {"seed", "iterations", "resume", "evaluate", "capture_video", "track", "wandb_mode"},
}

CONTINUOUS, CHOICES = "tasks with continuous actions", "tasks with choices as actions"
TABULAR = "tasks of few states, whose optimal actions are known"
CURVES, IMAGES = "curves, learned from some of their points", "images, told apart by some examples of each class"
FUNCTIONS = "functions to minimise"
METAWORLD = "Meta-World (reach-v3, or any other of ML1; see requirements-metaworld.txt)"
OWN = "  your own Gymnasium environment (see docs/your_environment.md):"
ACCEPTED = {  # for an algorithm that is not named here all kinds are listed, which contain the tabular tasks
    **dict.fromkeys(("maml", "fomaml", "reptile", "in_context"), (CURVES, IMAGES)),
    **dict.fromkeys(("maml_trpo", "promp", "reptile_ppo", "multitask_ppo", "pearl_sac"), (CONTINUOUS, METAWORLD)),
    **dict.fromkeys(("rl2_ppo", "rl2_transformer_ppo", "varibad_ppo"), (CONTINUOUS, CHOICES, METAWORLD)),
    **dict.fromkeys(("lifetime_rewards", "meta_critic"), (CHOICES,)),
    **dict.fromkeys(("dpt", "ad"), (TABULAR,)),
    "protonet": (IMAGES,),
    "learned_optimizer": (FUNCTIONS,),
    **dict.fromkeys(("lirpg", "meta_gradient_a2c"), (CONTINUOUS, CHOICES, METAWORLD)),
    "mbmpo": (CONTINUOUS,),  # Meta-World's rewards are no function of what is observed
}
SINGLE_STARTS = {
    "lifetime_rewards",
    "meta_critic",
    "lirpg",
    "meta_gradient_a2c",
}  # their worlds begin episodes one by one
COLUMN = 33  # where the text beside a flag begins
GLUE = "\N{NO-BREAK SPACE}"


def wants_help(argv: list[str] | None) -> bool:
    """Whether -h or --help is among the arguments (None: the command line's)."""
    return not {"-h", "--help"}.isdisjoint(sys.argv[1:] if argv is None else argv)


def show_help(Args: type, description: str, algorithm: str) -> None:
    """Print the help, flags wrapped to 80 to 120 columns as the terminal has; nothing where nobody can read it."""
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    rows, lines = flags(Args), [description.strip("\n")]
    for group, names in groups(Args).items():
        lines += ["", "Flags of the run and its records:" if group == "records" else f"Flags of the {group}:"]
        lines += [line for name in names for line in in_columns(*rows[name], width)]
    lines += ["", "What --env-id accepts:"]
    for kind, ids in accepted_ids(algorithm).items():
        lines += in_columns(f"  {kind}:", ", ".join(ids), width, column=4)
    if {CONTINUOUS, CHOICES} & set(ACCEPTED.get(algorithm, (CONTINUOUS,))):
        lines += in_columns(OWN, f"{own.FORMS}, with the methods sample_tasks and set_task", width, column=4)
    try:
        print("\n".join(lines), flush=True)
    except OSError:  # no reader; Python, which tries again at its end, shall not stumble over it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def default_horizon(env_id: str) -> int:
    """The steps of an episode that this id is registered with; Meta-World's 500; 100 where nothing is known."""
    if env_id.startswith("Meta-World/"):
        return 500
    return own.default_horizon(env_id) or 100


def groups(Args: type) -> dict[str, list[str]]:
    """The names of all fields by group, in the order of GROUPS and then of the fields; no group is empty."""
    members: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in (field.name for field in fields(Args)):
        rest = "evaluation" if name.startswith("eval_") else "algorithm"
        members[next((group for group, names in GROUPS.items() if name in names), rest)].append(name)
    return {group: names for group, names in members.items() if names}


def flags(Args: type) -> dict[str, tuple[str, str]]:
    """By a field's name: its flag, as "  --seed INT", and its docstring with the default."""
    body, kinds = ast.parse(inspect.getsource(Args)).body[0].body, get_type_hints(Args)
    docs = dict.fromkeys(kinds, "")
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return {x.name: (as_flag(x.name, kinds[x.name]), with_default(docs[x.name], x.default)) for x in fields(Args)}


def as_flag(name: str, kind: type) -> str:
    """A flag, with tyro's names of types: "  --seed INT", "  --cuda, --no-cuda", "  --encoder {gru,lstm}"."""
    name = name.replace("_", "-")
    kind = get_args(kind)[0] if NoneType in get_args(kind) else kind
    if kind is bool:
        return f"  --{name}, --no-{name}"
    if get_origin(kind) is Literal:
        return f"  --{name} {{{','.join(get_args(kind))}}}"
    if get_origin(kind) is tuple:
        return f"  --{name} {get_args(kind)[0].__name__.upper()} .."
    return f"  --{name} {kind.__name__.upper()}"


def with_default(doc: str, default) -> str:
    """A docstring and behind it the default, except where it tells itself what None or () stands for."""
    if isinstance(default, bool):
        default = "on" if default else "off"
    if default in (None, ()) and "default" in doc:
        return doc
    return f"{doc} (default:{GLUE}{'none' if default in (None, (), '') else default})"


def in_columns(left: str, text: str, width: int, column: int = COLUMN) -> list[str]:
    """Lines with a text from a column on, beside what stands on the left, or below it where that is long."""
    alone = len(left) > column - 2
    indents = {"initial_indent": ("" if alone else left).ljust(column), "subsequent_indent": " " * column}
    return [left] * alone + [x.replace(GLUE, " ") for x in wrap(text, width, **indents, break_on_hyphens=False)]


def accepted_ids(algorithm: str) -> dict[str, list[str]]:
    """What --env-id may be, by kind of task. A world of each family is made to see its actions: 30 ms for all."""
    families = [x for x in HORIZONS if x.world_state is not None or algorithm not in SINGLE_STARTS]
    chosen = [family for family in families if family(1).is_discrete]
    ids = {
        CONTINUOUS: [f"{family.__name__}-v0" for family in families if family not in chosen],
        CHOICES: [f"{family.__name__}-v0" for family in chosen],
        TABULAR: [f"{family.__name__}-v0" for family in families if family.is_tabular],
        METAWORLD: ["Meta-World/ML10", "Meta-World/ML45", "Meta-World/reach-v3"],
        CURVES: [f"{family.__name__}-v0" for family in SUPERVISED if not family.is_classification],
        IMAGES: [f"{family.__name__}-v0" for family in SUPERVISED if family.is_classification],
        FUNCTIONS: [f"{family.__name__}-v0" for family in OPTIMISEES],
    }
    return {kind: names for kind, names in ids.items() if kind in ACCEPTED.get(algorithm, ids.keys() - {TABULAR})}
