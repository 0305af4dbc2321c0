"""Several processes, started by torchrun, that share the worlds of one run.

    torchrun --nproc-per-node=4 algos/maml_trpo.py

Every process holds an equal part of the tasks and of their worlds. All draw the same random numbers, for all worlds,
and take their own part (`TaskVectorEnv.noise`), so that the result is that of one process, to rounding.

An algorithm whose processes need to see all worlds while they act, because what was played is mixed afterwards, joins
with `sees_all`: `envs.make` then shows every process all worlds (`AllWorlds`), of which it still moves its own part.
"""

import atexit
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from types import TracebackType

import gymnasium as gym
import torch
import torch.distributed as dist
from gymnasium.vector.utils import batch_space
from torch import Tensor

_sees_all = False  # whether processes have joined so that each sees the worlds of all


def join(cuda: bool = False, minibatches: int = 1, sees_all: bool = False, **sizes: int) -> bool:
    """Join torchrun's other processes, if there are any; whether this one leads, which prints, logs and saves.

    Args:
        cuda: each process computes on a CUDA device of its own.
        minibatches: into which the tasks are cut, and the processes share each.
        sees_all: every process sees the worlds of all; otherwise only its own.
        sizes: numbers of tasks, under their flags' names, that the processes share.
    SystemExit for a size that is no multiple of the processes' number, for minibatches too small to share, and for more
    processes than there are CUDA devices.
    """
    global _sees_all
    number = int(os.environ.get("RANK", 0))
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return True
    for name, size in sizes.items():
        flag = f"--{name.replace('_', '-')} {size}"
        if size % count:
            raise refusal(f"{flag}: must be a multiple of {count}, the number of torchrun's processes")
        if size // minibatches < count:
            raise refusal(f"--minibatches {minibatches}: {flag} leaves less than one for each process")
    if cuda and torch.cuda.is_available():
        own, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= devices:
            raise refusal(f"--cuda: torchrun started more processes here than the {devices} CUDA devices")
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    _sees_all = sees_all
    atexit.register(_leave)
    sys.excepthook = _name_lost_process
    return number == 0


def refusal(message: str) -> SystemExit:
    """The error to raise for what cannot be run, with one line that says why.

    Under torchrun that line is said once, and once more when torchrun has reported its processes' ends over 40 lines
    of its own, so that it is the last one on the screen.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return SystemExit(message)
    torchrun = os.getppid()
    said = f"{tempfile.gettempdir()}/cleanmeta-{torchrun}-{os.environ['MASTER_PORT']}"
    try:
        os.close(os.open(said, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return SystemExit(1)  # another process has said it
    except OSError:  # no room for temporary files
        return SystemExit(message)
    alive = 'kill -0 "$1" 2>/dev/null && ! grep -qs "^State:.Z" "/proc/$1/status"'  # Z: ended, and nobody has asked yet
    wait = f'while {alive}; do sleep 0.02; done; rm -f "$2"; printf "%s\\n" "$3" >&2'
    subprocess.Popen(["sh", "-c", wait, "sh", str(torchrun), said, message], start_new_session=True)
    return SystemExit(message)


def _leave() -> None:
    """End the group, once its threads have let go of the last message: one that still does while Python ends aborts."""
    time.sleep(0.5)
    dist.destroy_process_group()


def _name_lost_process(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
    """One line for a process that can no longer talk to the others; every other error with its trace, as usual."""
    if "torch/distributed" not in traceback.extract_tb(trace)[-1].filename:
        return sys.__excepthook__(kind, error, trace)
    number, reason = dist.get_rank(), str(error).splitlines()[0]
    told = f"process {number}: another one has ended ({reason}); --resume goes on from what was saved, if anything was"
    print(f"\n{told}", file=sys.stderr)


def shard() -> tuple[int, int]:
    """This process's number, and how many share the worlds; SystemExit under torchrun for a file that never joined."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise refusal("torchrun: this algorithm runs in one process; maml_trpo, promp, rl2_ppo, .. run in several")
    return 0, 1


def gather(x: Tensor) -> Tensor:
    """All processes' parts [N / processes, ..], equal in size, as one [N, ..]; x itself in a single process."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def in_any_process(condition: bool, device: torch.device | str = "cpu") -> bool:
    """Whether it is true in one of the processes, all of which must ask."""
    return bool(gather(torch.tensor([bool(condition)], device=device)).any())


def summarise(stats: dict[str, float | Tensor | tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What a run logs: of a tensor the mean over all tasks, those of other processes included.

    Under a name that ends in ci95 it is half the width of that mean's 95 % confidence interval (`half_width`). Then a
    pair (x [N, ..], tasks [N, ..]) takes equal tasks together, since playing a task twice says nothing about another
    one; their number is logged beside it, as "../tasks". `tasks` are those of all processes.
    """
    summary = {}
    for name, x in stats.items():
        x, tasks = x if isinstance(x, tuple) else (x, None)
        if isinstance(x, Tensor):
            x = x.detach()
            x = x if _sees_all or not x.ndim else gather(x)
            if tasks is not None:
                x, number = by_task(x, tasks)
                summary[f"{name.rpartition('/')[0]}/tasks"] = number
            x = half_width(x) if name.endswith("ci95") else float(x.mean())
        summary[name] = x
    return summary


def by_task(x: Tensor, tasks: Tensor) -> tuple[Tensor, int]:
    """The means [D] of x [N, ..] over each of the D different tasks among [N, ..], and D.

    Of a single task x itself comes back, flat: then its episodes are what an interval is about.
    """
    different, place_N = tasks.reshape(len(tasks), -1).unique(dim=0, return_inverse=True)
    if len(different) == 1:
        return x.flatten(), 1
    mean_N = x.flatten(1).mean(1) if x.ndim > 1 else x
    sums = torch.zeros(len(different)).to(mean_N).index_add_(0, place_N.to(x.device), mean_N)
    return sums / place_N.bincount().to(sums), len(different)


def half_width(x: Tensor) -> float:
    """Half the width of the 95 % confidence interval of a mean, by Student's distribution: t s / sqrt(n).

    s is the standard deviation of the n numbers in x, with n - 1 below. 0 for a single number: nothing is known then.
    """
    n = x.numel()
    if n < 2:
        return 0.0
    few = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228  # for n - 1 = 1 to 10
    t = few[n - 2] if n < 12 else 1.96 + 2.37 / (n - 1) + 2.8 / (n - 1) ** 2
    return t * float(x.double().std()) / math.sqrt(n)


class AllWorlds(gym.vector.VectorWrapper):
    """The worlds of all processes, as each of them sees them; it moves its own and is told about the others.

    Tasks, actions and observations are those of all worlds: what one process would see and do. Tensors in `info` are
    the same for all worlds, too.
    """

    @property
    def num_envs(self) -> int:
        return self.env.num_envs * self.unwrapped.shard[1]

    @property
    def observation_space(self) -> gym.Space:
        return batch_space(self.single_observation_space, self.num_envs)

    @property
    def action_space(self) -> gym.Space:
        return batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """As the family's own `reset`, with the tasks of all worlds."""
        obs, info = self.env.reset(seed=seed, options=options)
        return gather(obs), info

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """As the family's own `step`, with the actions of all worlds."""
        *results, info = self.env.step(self.unwrapped.share(action))
        told = {name: x for name, x in info.items() if isinstance(x, Tensor) and x.ndim}
        parts = [*results, *told.values()]
        columns = [x.reshape(len(x), -1).to(results[0].dtype) for x in parts]
        whole = gather(torch.cat(columns, 1)).split([x.shape[1] for x in columns], 1)  # one message a step
        parts = [y.reshape(-1, *x.shape[1:]).to(x.dtype) for x, y in zip(parts, whole, strict=True)]
        return *parts[:4], info | dict(zip(told, parts[4:], strict=True))


def all_worlds(envs: gym.vector.VectorEnv) -> gym.vector.VectorEnv:
    """The worlds of all processes, where these have joined so; the same worlds in a single process."""
    return AllWorlds(envs) if _sees_all else envs
