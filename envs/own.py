"""Task environments of your own, as --env-id names them.

    my_package.my_module:MyTask-v0   the module is imported, as by `gym.make`, and the id that it registers is looked up
    path/to/file.py:MyTask           a class in a file, or a function that makes an environment

A module is looked for where Python looks, then in the working directory. In both forms the name may be an id that was
registered, or a class or a function there.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from .core import Unsuitable
from .processes import refusal

FORMS = "my_package.my_module:MyTask-v0 (an id that the module registers) or path/to/file.py:MyTask (a class in a file)"


def short_name(env_id: str) -> str:
    """An id without the module or the file that it comes from, for names of folders."""
    return env_id.rpartition(":")[2]


def is_same(env_id: str, other: str) -> bool:
    """Whether two ids name the same environment: a file may have moved to another folder."""
    parts = (
        (Path(where).name if where.endswith(".py") else where, name) for where, name in map(_parts, (env_id, other))
    )
    return len(set(parts)) == 1


def find(env_id: str) -> str | Callable:
    """What an id names: an id of Gymnasium's registry, which may be unknown to it, or a class or a function.

    Imports the module or runs the file before the colon, if there is one; errors in it keep their trace. SystemExit
    with one line if there is no such module, file or name.
    """
    where, name = _parts(env_id)
    if ":" not in env_id and not env_id.endswith(".py"):
        return env_id
    if not where or not name:
        raise refusal(f"--env-id {env_id}: write it as {FORMS}")
    module = _load_file(env_id, Path(where)) if where.endswith(".py") else _load_module(env_id, where)
    found = getattr(module, name, None)
    if callable(found):
        return found
    if name in gym.registry:
        return name
    classes = [x.__name__ for x in vars(module).values() if _is_environment(x) and x.__module__ == module.__name__]
    has = f"its environments: {', '.join(classes)}" if classes else "there is no environment in it"
    raise refusal(f"--env-id {env_id}: {where} neither registers nor defines {name}; {has}")


def default_horizon(env_id: str) -> int | None:
    """The steps of an episode that an environment is registered with, or its class's own; None if neither says it."""
    found = find(env_id)
    if isinstance(found, str):
        spec = gym.registry.get(found)
        return spec and spec.max_episode_steps
    parameter = _parameters(found).get("max_episode_steps")
    return parameter.default if parameter and isinstance(parameter.default, int) else None


class OneWorld:
    """Makes single environments, each call a new one, which can draw pictures where they say so.

    Args:
        found: an id of Gymnasium's registry, which is made without its time limit; a class; or a function.
    Raises Unsuitable, when called, for a class or a function that cannot do without arguments.
    """

    def __init__(self, found: str | Callable):
        self.found = found

    def __call__(self) -> gym.Env:
        if isinstance(self.found, str):
            maker = gym.spec(self.found).entry_point
            maker = load_env_creator(maker) if isinstance(maker, str) else maker
            options = {"max_episode_steps": -1, "disable_env_checker": True} | _pictures(maker)
            return gym.make(self.found, **options)
        needed = [
            name
            for name, x in _parameters(self.found).items()
            if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        ]
        if needed:
            raise Unsuitable(
                f"{self.found.__name__} needs {', '.join(needed)}: give its arguments defaults, or name a function "
                "that makes it without any"
            )
        return self.found(**_pictures(self.found))


def _pictures(maker: Callable) -> dict[str, str]:
    modes = getattr(maker, "metadata", {"render_modes": ["rgb_array"]}).get("render_modes", [])
    draws = "rgb_array" in modes and "render_mode" in _parameters(maker)
    return {"render_mode": "rgb_array"} if draws else {}


def _parameters(maker: Callable) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(maker).parameters)


def _parts(env_id: str) -> tuple[str, str]:
    where, _, name = env_id.rpartition(":")
    return where, name


def _is_environment(x) -> bool:
    return isinstance(x, type) and issubclass(x, gym.Env | gym.vector.VectorEnv)


def _load_module(env_id: str, name: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and what it imports is not
        raise refusal(
            f"--env-id {env_id}: no module {name}, neither where Python looks nor in {Path.cwd()}; "
            "for a file write path/to/file.py:MyTask"
        ) from None


def _load_file(env_id: str, path: Path) -> ModuleType:
    """The module of a file, which runs once; under the file's name, unless another module has it."""
    if not path.is_file():
        raise refusal(f"--env-id {env_id}: no file {path.absolute()}")
    path = path.resolve()
    name = path.stem
    while name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name += "_"
    if name in sys.modules:
        return sys.modules[name]
    _look_in(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    """Let imports find the modules of a folder, behind all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
