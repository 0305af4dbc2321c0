"""Task environments, registered with Gymnasium: `gym.make_vec(id, ...)` for batches, `gym.make(id)` for one world."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec

from . import installed  # noqa: F401, first: it says in one line which package is missing

# isort: split
import gymnasium as gym
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import VectorEnv, VectorWrapper

from . import own
from .adapter import AdaptedVectorEnv
from .bandit import Bandit5, Bandit10, Bandit50, DependentBandit, GaussianBandit5, UniformGaussianBandit5
from .cartpole import CartPoleFixed, CartPoleLength
from .core import (
    NotFinite,
    ScaleActions,
    SingleTaskEnv,
    SupervisedTasks,
    TaskVectorEnv,
    Unsuitable,
    held_out_uniform,
    one_thread,
)
from .corridor import Corridor, NoisyLights
from .experiments import Harlow, TwoStep
from .fewshot import Glyphs, Omniglot
from .forward import AntForward, HalfCheetahForward, HopperForward, SwimmerForward, Walker2dForward
from .gridworlds import (
    EmptyRooms,
    FixedABC,
    KeyBox,
    NonstationaryABC,
    RandomABC,
    RandomABCDiagonal,
    RandomABCReversed,
    SymABC,
    SymABCDiagonal,
    SymABCReversed,
)
from .hidden_goals import DarkRoom, DarkRoomSmall, GridNavi, GridNaviUnseen
from .imagined import Imagined
from .lifetimes import Lifetimes
from .locomotion import (
    AntDir,
    AntDir2D,
    AntGoal,
    AntVel,
    HalfCheetahDir,
    HalfCheetahVel,
    HalfCheetahVel3,
    HumanoidDir,
    MujocoTaskVectorEnv,
)
from .metaworld import make_metaworld
from .mouse_cheese import MouseCheese
from .navigation import Navigation2D, Navigation2DEndless, SparseNavigation2D
from .optimisees import GlyphNets, Optimisees, Quadratics
from .processes import all_worlds, join, refusal, shard, summarise
from .processor import multiply_by_onednn
from .random_params import HopperRandParams, WalkerRandParams
from .regression import Sinusoid, SinusoidAllPhases, SinusoidOrLine
from .render import adaptation_gif, learning_curve
from .tabular_mdp import TabularMDP
from .task_given import TaskGiven
from .trials import Trials

HORIZONS = {
    Navigation2D: 100,
    Navigation2DEndless: 100,
    SparseNavigation2D: 20,
    HalfCheetahDir: 200,
    HalfCheetahVel: 200,
    HalfCheetahVel3: 200,
    AntDir: 200,
    AntDir2D: 200,
    AntVel: 200,
    AntGoal: 200,
    HumanoidDir: 200,
    HopperRandParams: 200,
    WalkerRandParams: 200,
    HalfCheetahForward: 200,
    AntForward: 200,
    SwimmerForward: 200,
    HopperForward: 200,
    Walker2dForward: 200,
    Bandit5: 1,
    Bandit10: 1,
    Bandit50: 1,
    GaussianBandit5: 1,
    UniformGaussianBandit5: 1,
    DependentBandit: 1,
    TabularMDP: 10,
    MouseCheese: 30,
    TwoStep: 200,
    Harlow: 1,
    GridNavi: 15,
    GridNaviUnseen: 15,
    DarkRoom: 100,
    DarkRoomSmall: 20,
    CartPoleLength: 200,
    CartPoleFixed: 200,
    Corridor: 40,
    NoisyLights: 40,
    EmptyRooms: 100,
    RandomABC: 10,
    RandomABCReversed: 10,
    RandomABCDiagonal: 10,
    SymABC: 10,
    SymABCReversed: 10,
    SymABCDiagonal: 10,
    FixedABC: 10,
    NonstationaryABC: 10,
    KeyBox: 100,
}

SUPERVISED = (Sinusoid, SinusoidAllPhases, SinusoidOrLine, Glyphs, Omniglot)
OPTIMISEES = (Quadratics, GlyphNets)

__all__ = [
    "HORIZONS",
    "OPTIMISEES",
    "SUPERVISED",
    "Imagined",
    "Lifetimes",
    "NotFinite",
    "ScaleActions",
    "SingleTaskEnv",
    "SupervisedTasks",
    "TaskGiven",
]
__all__ += ["TaskVectorEnv", "Trials", "Unsuitable", "adaptation_gif", "held_out_uniform", "imagine", "join"]
__all__ += [
    "learning_curve",
    "make",
    "make_optimisees",
    "make_supervised",
    "multiply_by_onednn",
    "one_thread",
    "summarise",
]


def _register(family: type[TaskVectorEnv], horizon: int) -> None:
    gym.register(
        id=f"{family.__name__}-v0",
        entry_point=f"{__name__}.single:{family.__name__}",
        vector_entry_point=f"{family.__module__}:{family.__name__}",
        max_episode_steps=horizon,
    )


for _family, _horizon in HORIZONS.items():
    _register(_family, _horizon)


def _device(cuda: bool) -> str:
    if cuda and not torch.cuda.is_available():
        raise refusal("--cuda: torch sees no CUDA device on this machine; leave the flag out to run on the CPU")
    return "cuda" if cuda else "cpu"


def _physics(env_id: str, family: str | Callable, physics: str, cuda: bool) -> dict[str, str]:
    """What of `make`'s `physics` to tell the family: nothing, unless it is to move by warp."""
    if physics not in ("auto", "mujoco", "warp"):
        raise refusal(f"--physics {physics}: allowed is auto, mujoco, warp")
    family = _vector_maker(family) if isinstance(family, str) else family
    is_mujoco = isinstance(family, type) and issubclass(family, MujocoTaskVectorEnv)
    is_installed = find_spec("mujoco_warp") is not None
    if physics == "warp" and not is_mujoco:
        raise refusal(f"--physics warp: not for --env-id {env_id}, only for bodies of envs/ that MuJoCo moves")
    if physics == "warp" and not is_installed:
        raise refusal("--physics warp needs mujoco_warp: .venv/bin/pip install -r requirements-warp.txt")
    chosen = physics == "warp" or (physics == "auto" and cuda and is_mujoco and is_installed)
    return {"physics": "warp"} if chosen else {}


def _vector_maker(env_id: str) -> Callable | None:
    """What makes a batch of these, if Gymnasium knows the id and it may be a `TaskVectorEnv`.

    A function shows it only when called."""
    maker = gym.spec(env_id).vector_entry_point if env_id in gym.registry else None
    if isinstance(maker, str):
        maker = None if maker.startswith("gymnasium.") else load_env_creator(maker)
    return maker if not isinstance(maker, type) or _is_batched(maker) else None


def _is_batched(maker: Callable) -> bool:
    return isinstance(maker, type) and issubclass(maker, TaskVectorEnv | VectorWrapper)


def _make_metaworld(env_id: str, num_envs: int, options: dict) -> TaskVectorEnv:
    try:
        return make_metaworld(env_id.removeprefix("Meta-World/"), num_envs, **options)
    except (ImportError, ValueError) as error:
        raise refusal(f"--env-id {env_id}: {error}") from None


def _make_batch(env_id: str, found: str | Callable, num_envs: int, options: dict) -> VectorEnv:
    """A batch of what an id names; single environments by the adapter. Errors of a user's own keep their trace."""
    known = [f"{family.__name__}-v0" for family in HORIZONS]
    near = get_close_matches(env_id, known, n=1)
    hint = f"; perhaps you meant {near[0]}" if near else ""
    reason = f"--env-id {env_id} is no batched task environment; allowed: {', '.join(known)}, "
    reason += f"Meta-World/NAME, {own.FORMS}{hint}"
    if isinstance(found, str):
        worlds = _make_registered(env_id, found, num_envs, options, reason)
    elif _is_batched(found):
        worlds = found(num_envs=num_envs, **options)
    elif isinstance(found, type) and issubclass(found, VectorEnv):
        raise refusal(reason)
    else:
        worlds = AdaptedVectorEnv(own.OneWorld(found), num_envs, **options)
    if not isinstance(worlds.unwrapped, TaskVectorEnv):
        raise refusal(reason)
    return worlds


def _make_registered(env_id: str, name: str, num_envs: int, options: dict, reason: str) -> VectorEnv:
    if _vector_maker(name) is None:
        maker = gym.spec(name).entry_point if name in gym.registry else None
        origin = maker if isinstance(maker, str) else getattr(maker, "__module__", "")
        is_gymnasiums = origin.startswith("gymnasium.")
        if maker is None or (is_gymnasiums and env_id == name):
            raise refusal(reason)
        return AdaptedVectorEnv(own.OneWorld(name), num_envs, **options)
    try:
        return gym.make_vec(name, num_envs, vectorization_mode="vector_entry_point", **options)
    except RuntimeError as error:
        if options.get("physics") != "warp":
            raise
        raise refusal(f"--physics warp: {error}") from None  # warp-lang, of this machine's driver


def make(
    env_id: str,
    num_envs: int,
    horizon: int,
    cuda: bool = False,
    action_scale: float = 1.0,
    discrete: bool = False,
    physics: str = "auto",
    singly: bool = False,
    tabular: bool = False,
) -> VectorEnv:
    """A batch of worlds in which actions of +-action_scale span the bounds; what cannot be made is one clear line.

    Where actions are choices, only an algorithm that can choose (`discrete`) gets worlds, and they are not scaled.
    An algorithm whose worlds start one by one (`singly`), as `Lifetimes` lets them, gets only those that can; one that
    looks states up in tables (`tabular`) gets only tabular families.
    `env_id` is one registered above, or "Meta-World/ML10", "Meta-World/ML45", "Meta-World/reach-v3", .. (ML1), or your
    own as envs/own.py has it; single environments become a batch by envs/adapter.py.
    `physics` moves MuJoCo's bodies: "mujoco" on the CPU's threads, "warp" on the run's device, "auto" by warp with
    `cuda` where mujoco_warp is installed. Families of other kinds take no notice of "auto" and "mujoco".
    Processes that have joined (`join`) move an equal part of the worlds each, and see it or all of them.
    """
    part = shard()
    number = num_envs // part[1]
    found = own.find(env_id)
    options = {"max_episode_steps": horizon, "device": _device(cuda)} | _physics(env_id, found, physics, cuda)
    try:
        if env_id.startswith("Meta-World/"):
            envs = _make_metaworld(env_id, number, options)
        else:
            envs = _make_batch(env_id, found, number, options)
        family = envs.unwrapped
        if family.is_discrete and not discrete:
            raise Unsuitable("its actions are choices; this algorithm's are continuous")
        if singly and family.world_state is None:
            raise Unsuitable("its worlds can only start together; this algorithm needs worlds that start singly")
        if tabular and not family.is_tabular:
            raise Unsuitable("it is not tabular; this algorithm needs few states, and their optimal actions")
        family.shard = part
        return all_worlds(envs if family.is_discrete else ScaleActions(envs, action_scale))
    except Unsuitable as error:
        raise refusal(f"--env-id {env_id}: {' '.join(str(error).split())}{error.example}") from None


def imagine(envs: ScaleActions, num_envs: int) -> Imagined:
    """Worlds of the same family that move as a model says, or this process's part of them; what cannot be imagined is
    one clear line."""
    try:
        return Imagined(envs, num_envs // envs.unwrapped.shard[1])
    except TypeError as error:
        raise refusal(f"--env-id: {error}") from None


def make_supervised(
    env_id: str, ways: int, drawings: int, data: str = "", cuda: bool = False, split: str = "test"
) -> SupervisedTasks:
    """A family of supervised tasks; what cannot be made is one clear line.

    Args:
        env_id: "Sinusoid-v0", .. (the classes in SUPERVISED).
        ways: classes per task; without effect on regression, like the next two.
        drawings: pictures of each class that one task takes, support and queries together.
        data: Omniglot's folder.
        cuda: whether tasks and examples live on the GPU.
        split: what evaluations draw from, "test" or, of images, "valid".
    """
    families = {f"{family.__name__}-v0": family for family in SUPERVISED}
    if env_id not in families:
        raise refusal(f"--env-id {env_id} is no supervised task family; allowed: {', '.join(families)}")
    if (env_id == "Omniglot-v0") != bool(data):
        hint = "reads its pictures from --data DIR" if not data else "reads no --data; Omniglot-v0 does"
        raise refusal(f"--env-id {env_id} --data {data!r}: {env_id} {hint}")
    shard()  # refuses torchrun's processes, which no supervised algorithm joins
    family, device = families[env_id], _device(cuda)
    if not family.is_classification:
        if split != "test":
            raise refusal(f"--eval-split {split}: allowed is test; only images have classes for validation")
        return family(device)
    try:
        tasks = family(data, ways, device) if data else family(ways, device)
    except ValueError as error:
        raise refusal(str(error) if str(error).startswith("--ways") else f"--data {error}") from None
    if drawings > (instances := tasks.images.shape[1]):
        raise refusal(f"--shots {drawings // 2}: allowed is 1 to {instances // 2}; a class has {instances} drawings")
    first, last = tasks.classes[split]
    if ways > last - first:
        raise refusal(f"--ways {ways}: allowed is 2 to {last - first}, the {split} classes")
    tasks.held_out = split
    return tasks


def make_optimisees(env_id: str, cuda: bool = False) -> Optimisees:
    """A family of functions to minimise ("Quadratics-v0", ..: the classes in OPTIMISEES), or one clear line."""
    families = {f"{family.__name__}-v0": family for family in OPTIMISEES}
    if env_id not in families:
        raise refusal(f"--env-id {env_id} is no family of functions to minimise; allowed: {', '.join(families)}")
    shard()  # refuses torchrun's processes, as in make_supervised
    return families[env_id](_device(cuda))
