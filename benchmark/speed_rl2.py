"""How fast RL2 learns; `python benchmark/speed.py rl2_ppo|rl2_transformer_ppo` comes here.

Runs the algorithm file's own `train()` on its own trials. `--peer` (not for the LSTM) adds iterations of the same
algorithm written the usual way, from the same weights and of the same sizes, each between two of ours in the same
process; attention has the same network there, without a cache. Figures are medians over iterations.

Steps are those of the trials, without the ones that a world waits for the others. sample_s: time in `play_trials`, the
advantages included; update_s: the rest of the iteration. peer_env_s: the part of peer_sample_s that its environments
take; the lower it could be made, the lower the speedup. Fewer `--peer-tasks` make the peer's network less efficient.
Names with `cpu`: processor time, of all threads together; on a busy machine that is the measure to trust.
"""

import time
from functools import partial
from statistics import median

from torch import Generator
from torch.optim import Adam

from benchmark import peer_rl2
from envs import Trials, make
from envs.records import first_state


def make_trials(options, args) -> Trials:
    """The trials that the algorithm's main() makes; SystemExit where a peer is asked for that does not exist."""
    if options.peer and args.encoder == "lstm":
        raise SystemExit("--peer: the usual way is written here for gru, transformer and snail, not for lstm")
    envs = make(args.env_id, args.meta_batch_size, args.horizon, args.cuda, args.action_scale, True, args.physics)
    return Trials(envs, args.episodes_per_trial)


def peer(options, args, envs: Trials, agent, watch):
    """A function that runs one iteration of benchmark/peer_rl2.py; `agent` has the same initial weights."""
    agent, generator = agent.to(envs.unwrapped.device), Generator().manual_seed(args.seed)
    optimizer = Adam(agent.parameters(), args.lr, eps=1e-5)
    worlds = peer_rl2.make(args.env_id, options.peer_tasks or args.meta_batch_size, args)
    worlds.reset(seed=args.seed)
    step, in_envs = worlds.step, 0.0

    def timed_step(action):
        nonlocal in_envs
        since = time.perf_counter()
        result = step(action)
        in_envs += time.perf_counter() - since
        return result

    worlds.step = timed_step

    def measure() -> None:
        nonlocal in_envs
        if len(watch.times["peer_sample"]) > options.peer_iterations:
            return
        tasks_NP = envs.unwrapped.sample_tasks(worlds.num_envs, generator).cpu().numpy()
        start, cpu, in_envs = watch.now(), time.process_time(), 0.0
        batch = peer_rl2.collect(worlds, tasks_NP, agent, args)
        sampled = watch.now()
        peer_rl2.update(agent, optimizer, batch, args, 1.0, generator)
        values = {"sample": sampled - start, "update": watch.now() - sampled, "cpu": time.process_time() - cpu}
        for name, value in (values | {"env": in_envs, "steps": int(batch.mask.sum())}).items():
            watch.times["peer_" + name].append(value)

    return measure


def measure(options, algorithm, args, envs: Trials, watch) -> None:
    """train() of the algorithm's file, from the state that its main() makes, until the stopwatch ends it."""
    generator = Generator().manual_seed(args.seed)
    theta = algorithm.init_network(envs, args, generator)
    algorithm.play_trials = watch.around(algorithm.play_trials)
    if options.peer:
        is_gru, copy = args.encoder == "gru", {name: value.clone() for name, value in theta.items()}
        encode = partial(algorithm.ENCODERS[args.encoder], args=args)
        agent = peer_rl2.agent_like(copy) if is_gru else peer_rl2.AttentionAgent(copy, encode)
        watch.extras.append(peer(options, args, envs, agent, watch))
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = first_state(args, options.algorithm, fresh, {}, envs.unwrapped.device)
    algorithm.train(envs, args, watch, state)


def report(options, watch) -> dict:
    """Rates and times; those of the peer beside them."""
    steps, total, cpu = (watch.median(name) for name in ("steps", "total", "cpu"))
    result = watch.figures()
    if options.peer:
        names = "steps", "sample", "update", "cpu", "env"
        peer_steps, sample, update, peer_cpu, env = (median(watch.times["peer_" + name][1:]) for name in names)
        result |= {
            "speedup_end_to_end": (steps / total) / (peer_steps / (sample + update)),
            "cpu_speedup_end_to_end": (steps / cpu) / (peer_steps / peer_cpu),
            "peer_end_to_end_steps_per_s": peer_steps / (sample + update),
            "peer_sampling_steps_per_s": peer_steps / sample,
            "peer_sample_s": sample,
            "peer_env_s": env,
            "peer_update_s": update,
            "peer_cpu_s_per_iteration": peer_cpu,
        }
    return {name: float(f"{value:.5g}") for name, value in result.items()}


def sizes(options, args, envs: Trials, watch) -> dict:
    """What was measured, of which worlds."""
    trials = options.peer_tasks or args.meta_batch_size
    worlds = "benchmark/peer_rl2.py" if args.env_id in peer_rl2.WORLDS else "gym.make"
    peer_sizes = {"peer_tasks": trials, "peer_iterations": len(watch.times["peer_sample"]) - 1, "peer_worlds": worlds}
    return (peer_sizes if options.peer else {}) | {
        "steps_per_batch": int(watch.median("steps")),
        "physics_threads": getattr(envs.unwrapped, "num_threads", None),
    }
