"""How fast a supervised algorithm learns; `python benchmark/speed.py maml` (and its like) comes here.

Runs the algorithm file's own `train()` on its own tasks. In some of the iterations, from the same theta and on the same
examples, the meta-gradient is also computed the usual ways (benchmark/peer_supervised.py: a Python loop over tasks,
torchopt), with the iteration's clock stopped: all in turn, in one process. Figures are medians.

tasks_per_s counts whole iterations: drawing tasks and examples, the meta-gradient, the meta-update. The others' rates
are for iterations that differ in the meta-gradient alone, so the speedups are end to end. gradient_s, loop_gradient_s,
torchopt_gradient_s are the meta-gradients' own times. Names with `cpu`: processor time, of all threads together; with
OMP_NUM_THREADS=1 on a busy machine that is the measure to trust, there the wall clock also counts the wait for a core.
"""

import math
import time

from benchmark import peer_supervised
from envs import make_optimisees, make_supervised
from envs.records import first_state

GRADIENTS = {"maml": "maml_gradient", "fomaml": "fomaml_gradient", "reptile": "reptile_gradient"}
GRADIENTS |= {"protonet": "protonet_gradient", "in_context": "in_context_gradient"}
GRADIENTS |= {"learned_optimizer": "meta_gradient"}
INITS = {
    "protonet": "init_embedding",
    "in_context": "init_reader",
    "learned_optimizer": "init_optimizer",
}  # others: init_params
EVERY = 4  # iterations from one turn of the others to the next


def measure(name: str, algorithm, args, watch) -> None:
    """train() of algos/<name>.py, from the state that its main() makes, until the stopwatch ends it."""
    if name == "learned_optimizer":
        tasks = make_optimisees(args.env_id, args.cuda)
    else:
        tasks = make_supervised(args.env_id, args.ways, 2 * args.shots, args.data, args.cuda)
    generator = algorithm.Generator().manual_seed(args.seed)
    theta = getattr(algorithm, INITS.get(name, "init_params"))(tasks, args, generator)
    others = {"loop": peer_supervised.LOOP[name]}
    if name in peer_supervised.TORCHOPT:
        others["torchopt"] = peer_supervised.TORCHOPT[name]
    gradient = getattr(algorithm, GRADIENTS[name])

    def timed(who: str, function, inputs):
        since, cpu = watch.now(), time.process_time()
        result = function(*inputs)
        watch.times[who].append(watch.now() - since)
        watch.times[who + "_cpu"].append(time.process_time() - cpu)
        return result

    def in_turn(*inputs):
        result = timed("own", gradient, inputs)
        if (done := len(watch.times["total"])) == 0 or done % EVERY == 1:  # 0: the iteration that warms up
            since, cpu = watch.now(), time.process_time()
            for other, function in others.items():
                timed(other, function, inputs)
            watch.since += watch.now() - since
            watch.cpu += time.process_time() - cpu
        return result

    setattr(algorithm, GRADIENTS[name], in_turn)
    fresh = {"theta": theta, "generator": generator.get_state()}
    if name == "reptile":
        fresh["moments"] = algorithm.no_moments(theta)._asdict()
    state = first_state(args, name, fresh, {}, tasks.device)
    algorithm.train(tasks, args, watch, state)


def report(args, watch) -> dict:
    names = "total", "cpu", "own", "own_cpu"
    total, total_cpu, own, own_cpu = (watch.median(name) for name in names)
    calls = math.ceil(args.steps / args.unroll) if hasattr(args, "unroll") else 1  # of an iteration
    own, own_cpu = calls * own, calls * own_cpu
    result = {"tasks_per_s": args.meta_batch_size / total, "iteration_s": total, "gradient_s": own}
    result |= {"cpu_s_per_iteration": total_cpu, "gradient_cpu_s": own_cpu}
    for other in ("loop", "torchopt"):
        if other not in watch.times:
            continue
        gradient, cpu = calls * watch.median(other), calls * watch.median(other + "_cpu")
        result |= {
            f"{other}_tasks_per_s": args.meta_batch_size / (total - own + gradient),
            f"speedup_over_{other}": (total - own + gradient) / total,
            f"cpu_speedup_over_{other}": (total_cpu - own_cpu + cpu) / total_cpu,
            f"{other}_gradient_s": gradient,
            f"{other}_gradient_cpu_s": cpu,
        }
    result = {name: float(f"{value:.5g}") for name, value in result.items()}
    return result | {"torchopt": getattr(peer_supervised.torchopt, "__version__", "not installed")}
