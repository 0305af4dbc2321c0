"""How fast an algorithm samples and updates, in one line of JSON.

    python benchmark/speed.py maml_trpo --peer
    python benchmark/speed.py maml_trpo --env-id Navigation2D-v0 --meta-batch-size 20 --hidden-size 64
    python benchmark/speed.py promp --peer                   (reptile_ppo, multitask_ppo: likewise)
    python benchmark/speed.py maml --env-id Glyphs-v0        (fomaml, reptile: see benchmark/speed_supervised.py)
    python benchmark/speed.py rl2_ppo --peer                 (rl2_transformer_ppo: see benchmark/speed_rl2.py)
    python benchmark/speed.py pearl_sac --peer               (see benchmark/speed_pearl.py)
    python benchmark/speed.py varibad_ppo                    (no peer is written for it)
    python benchmark/speed.py mbmpo                          (always with a peer; see benchmark/speed_mbmpo.py)
    python benchmark/speed.py dpt                            (ad: see benchmark/speed_in_context.py)
    python benchmark/speed.py meta_critic --peer             (lirpg, lifetime_rewards: see benchmark/speed_lives.py)

Runs the algorithm file's own `train()`; every flag of that file is accepted, too. Beside each measured iteration of
maml_trpo and its like, in the same process (machines are noisy), it times the physics alone (`mujoco.rollout` with the
same worlds, control steps and thread pool, actions like the untrained policy's; for analytic tasks the environment's
own `step`). `--peer` adds iterations of the same algorithm written the usual way (benchmark/peer_*.py). Figures are
medians.

To add an algorithm like maml_trpo: its sampling function's name in SAMPLING. One of another kind: a module with
`measure` and `report`, and a function like `run_rl2` in `runner`.
"""

import importlib.util
import json
import os
import platform
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the files of algos/ do

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs as task_envs  # noqa: E402
from benchmark import speed_in_context, speed_lives, speed_mbmpo, speed_pearl, speed_rl2, speed_supervised  # noqa: E402
from envs import locomotion, processor  # noqa: E402
from envs.records import Follower, fill_in, first_state  # noqa: E402


@dataclass
class Options:
    algorithm: tyro.conf.Positional[
        Literal[
            "maml_trpo", "promp", "reptile_ppo", "multitask_ppo", "maml", "fomaml", "reptile", "protonet", "in_context",
            "learned_optimizer", "rl2_ppo", "rl2_transformer_ppo", "pearl_sac", "varibad_ppo", "mbmpo", "meta_critic",
            "lirpg", "lifetime_rewards", "dpt", "ad",
        ]
    ]  # fmt: skip
    """file of algos/"""
    iterations: int | None = None
    """measured iterations (PEARL: blocks, MB-MPO: meta-updates), after one that warms up; default 5, MB-MPO 10, RL2,
    VariBAD and the last three 20, supervised algorithms 40"""
    torch_threads: int = 0
    """threads of torch's operators; 0 leaves torch's default"""
    mkl: bool = False
    """products of matrices by MKL also where the file asks oneDNN for them. (Any variable whose name begins with
    MALLOC_, such as MALLOC_PERTURB_=0, which does nothing, leaves the C library's handling of memory alone.)"""
    peer: bool = False
    """also measure the same algorithm written the usual way (always done for supervised ones and MB-MPO; of RL2 for its
    GRU)"""
    peer_iterations: int = 1
    """measured iterations of the peer, at most `iterations`, after one that warms up (maml_trpo: on a single task);
    PEARL's and MB-MPO's are always all"""
    peer_tasks: int = 0
    """tasks of the peer's iterations, fewer to save time: its rates stay comparable; 0 is all, as it always is for the
    models of MB-MPO and the worlds of LIRPG"""


def load(path: Path) -> ModuleType:
    """Import one file by its path."""
    spec = importlib.util.spec_from_file_location(f"speed_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FinishedError(Exception):
    """Raised to leave train()."""


class Stopwatch(Follower):
    """Stands in for the algorithm's `Run`: train() comes to `log` after each iteration, where the clocks stop."""

    def __init__(self, options: Options, args):
        super().__init__(args)
        self.iterations, self.cuda = options.iterations, args.cuda
        self.extras = []  # functions that measure something else, called between two iterations
        self.times = defaultdict(list)  # quantity: one value for each iteration, the warm-up included
        self.sampled, self.steps = 0.0, 0
        self.restart()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def restart(self) -> None:
        self.sampled, self.cpu, self.since = 0.0, time.process_time(), self.now()

    def around(self, function):
        """`function`, its time added to the iteration's sampling."""

        def timed(*args, **kwargs):
            since = self.now()
            result = function(*args, **kwargs)
            self.sampled += self.now() - since
            return result

        return timed

    def log(self, state: dict, stats: dict) -> None:
        total, cpu = self.now() - self.since, time.process_time() - self.cpu
        steps, self.steps = state["env_steps"] - self.steps, state["env_steps"]
        values = {"total": total, "sample": self.sampled, "update": total - self.sampled, "cpu": cpu, "steps": steps}
        for name, value in values.items():
            self.times[name].append(value)
        for extra in self.extras:
            extra()
        if len(self.times["total"]) > self.iterations:
            raise FinishedError
        self.restart()

    def median(self, name: str) -> float:
        return median(self.times[name][1:])

    def figures(self) -> dict[str, float]:
        """Rates and times of an iteration, the warm-up left out."""
        steps = self.median("steps")
        return {
            "end_to_end_steps_per_s": steps / self.median("total"),
            "sampling_steps_per_s": steps / self.median("sample"),
            "sample_s": self.median("sample"),
            "update_s": self.median("update"),
            "cpu_s_per_iteration": self.median("cpu"),
        }


def physics(envs, horizon: int, watch: Stopwatch):
    """A function that moves all worlds for one horizon, without policy, reward or observation; and appends its time."""
    env, generator = envs.unwrapped, torch.Generator().manual_seed(0)
    low, high = env._low, env._high
    shape = horizon, env.num_envs, len(low)

    def measure() -> None:
        noise = torch.randn(shape, generator=generator).to(low) / getattr(envs, "scale", 1.0)
        action = torch.clamp(low + (noise + 1) / 2 * (high - low), low, high)
        env.reset(seed=0)
        if not isinstance(env, locomotion.MujocoTaskVectorEnv):
            since = watch.now()
            for action_BA in action:
                env.step(action_BA)
            watch.times["physics"].append(watch.now() - since)
            return
        if env.physics == "warp":
            state, since = env._state, watch.now()
            for action_BA in action:
                state, _ = env._warp.step(state, action_BA)
            watch.times["physics"].append(watch.now() - since)
            return
        control = np.repeat(action.double().cpu().numpy()[:, :, None], env.frame_skip, axis=2)  # [T, B, frame_skip, A]
        states = np.zeros((env.num_envs, env.frame_skip, env._state.shape[1]))
        pool = locomotion._thread_pool(env.num_threads, os.getpid())
        data = locomotion._pool_data(env.model_file, env.num_threads, os.getpid())
        models, state = env._models(np.arange(env.num_envs)), env._state.numpy().copy()
        since = watch.now()
        for t in range(horizon):
            pool.rollout(models, data, state, control[t], skip_checks=True, nstep=env.frame_skip, state=states)
            state[:] = states[:, -1]
        watch.times["physics"].append(watch.now() - since)

    return measure


def peer(options: Options, args, envs, theta: dict, watch: Stopwatch):
    """A function that runs one iteration written the usual way, the first measured one from the same policy."""
    module, generator = (
        load(ROOT / f"benchmark/{PEERS[options.algorithm]}.py"),
        torch.Generator().manual_seed(args.seed),
    )
    single = module.make(args.env_id, args.episodes_per_task, args.action_scale)
    single.reset(seed=args.seed)
    copies = ({name: x.detach().cpu().clone().requires_grad_() for name, x in theta.items()} for _ in "ab")
    warm_up, iterate = (module.ITERATIONS[options.algorithm](single, copy, args) for copy in copies)
    clock, collect = [0.0], module.collect

    def timed(*inputs):
        since = watch.now()
        result = collect(*inputs)
        clock[0] += watch.now() - since
        return result

    module.collect = timed

    def measure() -> None:
        if len(watch.times["peer_sample"]) == options.peer_iterations:
            return
        if len(watch.times["total"]) == 1:
            warm_up(envs.unwrapped.sample_tasks(1, generator).cpu().numpy())
            return
        tasks = options.peer_tasks or args.meta_batch_size
        tasks_NP = envs.unwrapped.sample_tasks(tasks, generator).cpu().numpy()
        since, cpu, clock[0] = watch.now(), time.process_time(), 0.0
        iterate(tasks_NP)
        total = watch.now() - since
        values = {"sample": clock[0], "update": total - clock[0], "cpu": time.process_time() - cpu}
        for name, value in values.items():
            watch.times["peer_" + name].append(value)

    return measure


def from_policy(algorithm: ModuleType, envs, args, watch: Stopwatch, prepare) -> None:
    """train() of a file that begins with a policy, from the state that its main() makes."""
    generator = torch.Generator().manual_seed(args.seed)
    fresh = {"theta": algorithm.init_policy(envs, args.hidden_size, generator), "generator": generator.get_state()}
    state = first_state(args, algorithm.__name__, fresh, {}, envs.unwrapped.device)
    prepare(state["theta"])
    algorithm.train(envs, args, watch, state)


PEERS = {"maml_trpo": "peer_maml_trpo"}
PEERS |= dict.fromkeys(("promp", "reptile_ppo", "multitask_ppo"), "peer_ppo_family")
SAMPLING = {"maml_trpo": "collect", "promp": "collect", "reptile_ppo": "collect", "multitask_ppo": "collect"}
RL2 = ("rl2_ppo", "rl2_transformer_ppo")


def report(options: Options, args, envs, watch: Stopwatch) -> dict:
    steps, total = watch.median("steps"), watch.median("total")
    physics_rate, result = envs.num_envs * args.horizon / median(watch.times["physics"]), watch.figures()
    result |= {
        "physics_steps_per_s": physics_rate,
        "sampling_over_physics": result["sampling_steps_per_s"] / physics_rate,
    }
    if options.peer:
        tasks = options.peer_tasks or args.meta_batch_size
        peer_steps = steps * tasks / args.meta_batch_size
        sample, update, cpu = (median(watch.times["peer_" + name]) for name in ("sample", "update", "cpu"))
        result |= {
            "speedup_end_to_end": (steps / total) / (peer_steps / (sample + update)),
            "cpu_speedup_end_to_end": (steps / watch.median("cpu")) / (peer_steps / cpu),
            "peer_sampling_steps_per_s": peer_steps / sample,
            "peer_end_to_end_steps_per_s": peer_steps / (sample + update),
            "peer_sample_s": sample,
            "peer_update_s": update,
            "peer_cpu_s_per_iteration": cpu,
        }
    return {name: float(f"{value:.5g}") for name, value in result.items()}


def sizes(options: Options, args, envs) -> dict:
    """What of describe() is about worlds."""
    peer_sizes = {"peer_tasks": options.peer_tasks or args.meta_batch_size, "peer_iterations": options.peer_iterations}
    return (peer_sizes if options.peer else {}) | {
        "steps_per_batch": envs.num_envs * args.horizon,
        "physics": getattr(envs.unwrapped, "physics", None),
        "physics_threads": getattr(envs.unwrapped, "num_threads", None),
    }


def describe(options: Options, args) -> dict:
    """What was measured, and on what; `harness` is not what is measured."""
    settings = "OMP_", "GOMP_", "MKL_", "MALLOC_"
    harness = ("iterations", "eval_every", "resume", "evaluate", "capture_video", "track", "wandb_mode")
    return {
        "args": {name: value for name, value in vars(args).items() if name not in harness},
        "iterations": options.iterations,
        "torch_threads": torch.get_num_threads(),
        "products": torch.backends.mkldnn.matmul.fp32_precision,  # "bf16": by oneDNN
        "cpus": locomotion.available_cpus(),
        "omp": {name: value for name, value in os.environ.items() if name.startswith(settings)},
        "load_at_start": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if args.cuda else platform.machine(),
        "versions": {module.__name__: module.__version__ for module in (torch, mujoco, gym, np)}
        | {"python": platform.python_version()},
    }


def runner(name: str):
    """The function that measures this algorithm, and how many iterations unless told."""
    if name in SAMPLING:
        return run_reinforcement, 5
    if name == "pearl_sac":
        return run_pearl, 5
    if name == "mbmpo":
        return run_mbmpo, 10
    if name in speed_in_context.SAMPLING:
        return run_in_context, 20
    if name in speed_lives.PLAYS:
        return run_lives, 20
    if name == "varibad_ppo":
        return run_varibad, 20
    return (run_rl2, 20) if name in RL2 else (run_supervised, 40)


def parse(flags: list[str] | None = None) -> tuple:
    """The options, the algorithm's module and Args, and the function that measures it, from the command line."""
    options, rest = tyro.cli(Options, args=flags, description=__doc__, return_unknown_args=True)
    algorithm, (run, iterations) = load(ROOT / f"algos/{options.algorithm}.py"), runner(options.algorithm)
    default = {"default": algorithm.Args(hidden_size=100)} if options.algorithm in SAMPLING else {}
    args = tyro.cli(algorithm.Args, args=rest, **default)
    fill_in(args)
    args.iterations, args.eval_every = 10**9, 10**9  # the stopwatch ends train(), and nothing is evaluated
    options.iterations = options.iterations or iterations
    algorithm.evaluate = lambda *_, **__: ({}, {}) if options.algorithm in SAMPLING else {}
    processor.keep_memory()  # these two as a run of the file does
    source = Path(algorithm.__file__).read_text()
    if "multiply_by_onednn(" in source and not options.mkl:
        processor.multiply_by_onednn(tf32="tf32=True" in source)
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    return options, algorithm, args, run


def main() -> None:
    options, algorithm, args, run = parse()
    print(json.dumps({"algorithm": options.algorithm} | run(options, algorithm, args, Stopwatch(options, args))))


def run_supervised(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    about = describe(options, args)
    with suppress(FinishedError):
        speed_supervised.measure(options.algorithm, algorithm, args, watch)
    return speed_supervised.report(args, watch) | about


def run_rl2(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    about, envs = describe(options, args), speed_rl2.make_trials(options, args)
    with suppress(FinishedError):
        speed_rl2.measure(options, algorithm, args, envs, watch)
    return speed_rl2.report(options, watch) | speed_rl2.sizes(options, args, envs, watch) | about


def run_varibad(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    if options.peer:
        raise SystemExit("--peer: none is written for varibad_ppo")
    envs = task_envs.make(
        args.env_id, args.meta_batch_size, args.horizon, args.cuda, args.action_scale, True, args.physics
    )
    about, envs = describe(options, args), task_envs.Trials(envs, args.episodes_per_trial)
    generator = torch.Generator().manual_seed(args.seed)
    fresh = algorithm.init_learner(envs, args, generator) | {"generator": generator.get_state()}
    state = first_state(args, options.algorithm, fresh, {}, envs.unwrapped.device)
    algorithm.play_with_beliefs = watch.around(algorithm.play_with_beliefs)
    with suppress(FinishedError):
        algorithm.train(envs, args, watch, state)
    rates = {name: float(f"{value:.5g}") for name, value in watch.figures().items()}
    return rates | {"steps_per_batch": int(watch.median("steps"))} | about


def run_pearl(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    about, envs = describe(options, args), speed_pearl.make_worlds(options, args)
    with suppress(FinishedError):
        speed_pearl.measure(options, algorithm, args, envs, watch)
    return speed_pearl.report(args, watch) | speed_pearl.sizes(options, args, envs, watch) | about


def run_mbmpo(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    about, worlds = describe(options, args), speed_mbmpo.make_worlds(args)
    with suppress(FinishedError):
        speed_mbmpo.measure(algorithm, args, *worlds, watch)
    return speed_mbmpo.report(watch) | speed_mbmpo.sizes(args, watch) | about


def run_lives(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    about = describe(options, args)
    with suppress(FinishedError):
        speed_lives.measure(options, algorithm, args, watch)
    return speed_lives.report(options, watch) | speed_lives.sizes(options, args, watch) | about


def run_in_context(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    about = describe(options, args)
    with suppress(FinishedError):
        speed_in_context.measure(options, algorithm, args, watch)
    num_positions = (algorithm.context_episodes(args) + (options.algorithm == "ad")) * args.horizon
    return speed_in_context.report(options, args, watch, num_positions + (options.algorithm == "dpt")) | about


def run_reinforcement(options: Options, algorithm: ModuleType, args, watch: Stopwatch) -> dict:
    if options.peer and getattr(args, "task_given", False):
        raise SystemExit("--peer: none is written for --task-given")
    worlds = args.meta_batch_size * args.episodes_per_task
    envs = task_envs.make(args.env_id, worlds, args.horizon, args.cuda, args.action_scale, physics=args.physics)
    envs = task_envs.TaskGiven(envs) if getattr(args, "task_given", False) else envs
    about = sizes(options, args, envs) | describe(options, args)
    setattr(algorithm, SAMPLING[options.algorithm], watch.around(getattr(algorithm, SAMPLING[options.algorithm])))

    def prepare(theta: dict) -> None:
        watch.extras.append(physics(envs, args.horizon, watch))
        if options.peer:
            watch.extras.append(peer(options, args, envs, theta, watch))

    with suppress(FinishedError):
        from_policy(algorithm, envs, args, watch, prepare)
    return report(options, args, envs, watch) | about


if __name__ == "__main__":
    main()
