"""How fast worlds with a clock each learn; `python benchmark/speed.py meta_critic|lirpg|lifetime_rewards` comes here.

Runs the algorithm file's own `main()`, with the stopwatch in place of `records.Run` and no evaluation. `--peer` adds
iterations of the same algorithm written the usual way (benchmark/peer_meta_critic.py and its like), from the same
networks, each between two of ours in the same process. Figures are medians; the first iterations, which warm up, are
not counted.

sampling_steps_per_s: steps of the worlds, over the time in the function that plays them; end_to_end_steps_per_s: over
the whole iteration. cpu_s_per_iteration: processor time, of all threads together; on a busy machine that is the measure
to trust. Fewer `--peer-tasks` are fewer actors, or lifetimes, of the peer, which takes one after the other; of LIRPG's
worlds, which have one policy, it always has all.
"""

import time
from contextlib import ExitStack, nullcontext
from types import ModuleType
from unittest import mock

from benchmark import peer_lifetime_rewards, peer_lirpg, peer_meta_critic
from envs import records

PLAYS = {"meta_critic": "play_window", "lirpg": "play_steps", "lifetime_rewards": "play"}
PEERS = {"meta_critic": peer_meta_critic, "lirpg": peer_lirpg, "lifetime_rewards": peer_lifetime_rewards}


def flags_of(args) -> list[str]:
    """The command line that gives these Args."""
    words = []
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def peer_tasks(options, args) -> int:
    """How many actors, lifetimes or worlds the peer has; SystemExit for a number that it cannot have."""
    is_lirpg = options.algorithm == "lirpg"
    ours = args.num_worlds if is_lirpg else args.meta_batch_size
    number = options.peer_tasks or ours
    if not (ours if is_lirpg else 1) <= number <= ours:
        reason = "its worlds have one policy" if is_lirpg else "it begins with networks of ours"
        raise SystemExit(f"--peer-tasks {number}: the peer can have {'' if is_lirpg else 'at most '}{ours}; {reason}")
    return number


def peer(module: ModuleType, learner, options, watch):
    """A function that runs one iteration of the usual way, and the module's `collect`, timed."""
    collect, sampled = module.collect, 0.0

    def timed(*args):
        nonlocal sampled
        since = watch.now()
        result = collect(*args)
        sampled += watch.now() - since
        return result

    def measure() -> None:
        nonlocal sampled
        if len(watch.times["peer_total"]) > options.peer_iterations:
            return
        since, cpu, sampled = watch.now(), time.process_time(), 0.0
        steps = module.iterate(learner)
        total, cpu = watch.now() - since, time.process_time() - cpu
        values = {"total": total, "sample": sampled, "update": total - sampled, "cpu": cpu, "steps": steps}
        for name, value in values.items():
            watch.times["peer_" + name].append(value)

    return measure, timed


def measure(options, algorithm: ModuleType, args, watch) -> None:
    """main() of the algorithm's file, until the stopwatch ends it."""
    name = options.algorithm
    setattr(algorithm, PLAYS[name], watch.around(getattr(algorithm, PLAYS[name])))
    with ExitStack() as stack:

        def open_run(args, state, envs, **_):
            if options.peer:
                module = PEERS[name]
                learner = module.make(state, envs, args, peer_tasks(options, args))
                measure_peer, collect = peer(module, learner, options, watch)
                stack.enter_context(mock.patch.object(module, "collect", collect))
                watch.extras.append(measure_peer)
            watch.restart()
            return nullcontext(watch)

        stack.enter_context(mock.patch.object(records, "open_run", open_run))
        algorithm.main(flags_of(args))


def report(options, watch) -> dict:
    """Rates and times; those of the peer beside them."""
    result, steps = watch.figures(), watch.median("steps")
    if options.peer:
        names = "steps", "total", "sample", "update", "cpu"
        peer_steps, total, sample, update, cpu = (watch.median("peer_" + name) for name in names)
        result |= {
            "speedup_end_to_end": (steps / watch.median("total")) / (peer_steps / total),
            "cpu_speedup_end_to_end": (steps / watch.median("cpu")) / (peer_steps / cpu),
            "peer_end_to_end_steps_per_s": peer_steps / total,
            "peer_sampling_steps_per_s": peer_steps / sample,
            "peer_sample_s": sample,
            "peer_update_s": update,
            "peer_cpu_s_per_iteration": cpu,
        }
    return {name: float(f"{value:.5g}") for name, value in result.items()}


def sizes(options, args, watch) -> dict:
    """What was measured."""
    iterations = len(watch.times["peer_total"]) - 1
    peer_sizes = {"peer_tasks": peer_tasks(options, args), "peer_iterations": iterations} if options.peer else {}
    return peer_sizes | {"steps_per_iteration": int(watch.median("steps"))}
