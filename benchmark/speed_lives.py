"""How fast worlds with a clock each learn; `python benchmark/speed.py meta_critic|lirpg|lifetime_rewards` comes here.

Runs the algorithm file's own `main()`, with the stopwatch in place of `records.Run` and no evaluation. These three
have no peers. Figures are medians.

sampling_steps_per_s: steps of the worlds, over the time in the function that plays them; end_to_end_steps_per_s: over
the whole iteration. cpu_s_per_iteration: processor time, of all threads together; on a busy machine that is the measure
to trust.
"""

from contextlib import nullcontext
from unittest import mock

from envs import records

PLAYS = {"meta_critic": "play_window", "lirpg": "play_steps", "lifetime_rewards": "play"}


def flags_of(args) -> list[str]:
    """The command line that gives these Args."""
    words = []
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def measure(name: str, algorithm, args, watch) -> None:
    """main() of algos/<name>.py, until the stopwatch ends it."""
    setattr(algorithm, PLAYS[name], watch.around(getattr(algorithm, PLAYS[name])))
    with mock.patch.object(records, "open_run", return_value=nullcontext(watch)):
        algorithm.main(flags_of(args))


def report(watch) -> dict:
    rounded = {name: float(f"{value:.5g}") for name, value in watch.figures().items()}
    return rounded | {"steps_per_iteration": int(watch.median("steps"))}
