"""How fast DPT and AD learn; `python benchmark/speed.py dpt|ad` comes here.

Runs the algorithm file's own `train()`. Rates are positions of contexts, each with a label, per second. sample_s: the
time in DPT's `play_contexts` (AD makes its histories before the first iteration, in histories_s); update_s: the rest of
the iteration. Figures are medians over iterations. Names with `cpu`: processor time; on a busy machine that is the
measure to trust. There is no peer: the usual way, with worlds of Python objects, has not been written here.
"""

from torch import Generator

from envs import make
from envs.flags import default_horizon
from envs.records import first_state

SAMPLING = {"dpt": "play_contexts", "ad": "learning_histories"}


def measure(options, algorithm, args, watch) -> None:
    """train() of the algorithm's file, from the state that its main() makes, until the stopwatch ends it."""
    if options.peer:
        raise SystemExit("--peer: there is none for dpt and ad")
    args.horizon = args.horizon or default_horizon(args.env_id)
    sizes = [args.meta_batch_size, *([args.learners] if options.algorithm == "ad" else [])]
    worlds = [make(args.env_id, size, args.horizon, args.cuda, discrete=True, tabular=True) for size in sizes]
    generator = Generator().manual_seed(args.seed)
    theta = algorithm.init_model(worlds[0], args, generator)
    sampling = SAMPLING[options.algorithm]
    setattr(algorithm, sampling, watch.around(getattr(algorithm, sampling)))
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = first_state(args, options.algorithm, fresh, {}, worlds[0].unwrapped.device)
    algorithm.train(*worlds, args, watch, state)


def report(options, args, watch, num_positions: int) -> dict:
    """Rates and times of an iteration."""
    result = {
        "positions_per_iteration": args.meta_batch_size * num_positions,
        "positions_per_s": args.meta_batch_size * num_positions / watch.median("total"),
        "positions_per_cpu_s": args.meta_batch_size * num_positions / watch.median("cpu"),
        "sample_s": watch.median("sample"),
        "update_s": watch.median("update"),
        "cpu_s_per_iteration": watch.median("cpu"),
    }
    if options.algorithm == "ad":
        result |= {"histories_s": watch.times["sample"][0], "histories_steps": watch.times["steps"][0]}
    return {name: float(f"{value:.5g}") for name, value in result.items()}
