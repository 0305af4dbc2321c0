"""Several processes, started by torchrun, that share the worlds of one run.

    torchrun --nproc-per-node=4 algos/maml_trpo.py

Every process holds an equal part of the tasks and of their worlds. All draw the same random numbers, for all worlds,
and take their own part (`TaskVectorEnv.share`), so that the result is that of one process, to rounding.
"""

import atexit
import os
import signal
import sys
import time
import traceback
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor


def join(cuda: bool = False, minibatches: int = 1, **sizes: int) -> bool:
    """Join torchrun's other processes, if there are any; whether this one leads, which prints, logs and saves.

    Args:
        cuda: each process computes on a CUDA device of its own.
        minibatches: into which the tasks are cut, and the processes share each.
        sizes: numbers of tasks, under their flags' names, that the processes share.
    SystemExit for a size that is no multiple of the processes' number, for minibatches too small to share, and for more
    processes than there are CUDA devices.
    """
    number, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return True
    for name, size in sizes.items():
        flag = f"--{name.replace('_', '-')} {size}"
        if size % count:
            raise SystemExit(number or f"{flag}: must be a multiple of {count}, the number of torchrun's processes")
        if size // minibatches < count:
            raise SystemExit(number or f"--minibatches {minibatches}: {flag} leaves less than one for each process")
    if cuda and torch.cuda.is_available():
        own, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= devices:
            raise SystemExit(f"--cuda: torchrun started more processes here than the {devices} CUDA devices")
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    atexit.register(_leave)
    sys.excepthook = _name_lost_process
    return number == 0


def _leave() -> None:
    """End the group, once its threads have let go of the last message: one that still does while Python ends aborts."""
    time.sleep(0.5)
    dist.destroy_process_group()


def _name_lost_process(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
    """One line for a process that can no longer talk to the others; every other error with its trace, as usual."""
    if "torch/distributed" not in traceback.extract_tb(trace)[-1].filename:
        return sys.__excepthook__(kind, error, trace)
    number, reason = dist.get_rank(), str(error).splitlines()[0]
    print(f"\nprocess {number}: another one has ended; the last whole checkpoint is kept ({reason})", file=sys.stderr)


def shard() -> tuple[int, int]:
    """This process's number, and how many share the worlds; SystemExit under torchrun for a file that never joined."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("torchrun: this algorithm runs in one process; maml_trpo, promp, rl2_ppo, .. run in several")
    return 0, 1


def gather(x: Tensor) -> Tensor:
    """All processes' parts [N / processes, ..], equal in size, as one [N, ..]; x itself in a single process."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class Follower:
    """Stands in for an algorithm's `Run` where another process leads: saves nothing, stops on the same signals."""

    def __init__(self):
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)

    def log(self, state: dict, stats: dict) -> None:
        """Nothing: the leader's log checks and writes the same numbers."""

    def save(self, state: dict) -> None:
        """Nothing: the leader's checkpoint holds the same."""
