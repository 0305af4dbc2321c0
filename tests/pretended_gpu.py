"""A pretended GPU: the whole `--cuda` path of a file, run and counted on a machine that has none.

    with pretended_gpu() as counts:
        maml_trpo.main("--cuda --physics mujoco --iterations 2".split())
    counts.launches, counts.waits, counts.uploads                   # collections.Counter each, of names and places

Tensors that were asked for on "cuda" say that they are there and behave so: to mix them with tensors on the CPU is an
error, NumPy cannot have them, and no generator of the CPU can fill them. Their numbers lie on the CPU, where every
operation is truly computed, so that results are those of a run without `--cuda`.

What is counted:

* launches: operations that compute something on the device, one or more kernels each, by the operation's name. Views
  and `torch.empty` compute nothing.
* waits: where Python needs a number or a shape that the device has not computed yet (`x.item()`, `if x:`, boolean masks
  as indices, `nonzero`, copies to the CPU), by the operation's name and the place in algos/ or envs/.
* uploads: copies from the CPU to the device, likewise. A list or a tensor on the CPU as an index is one, too. From
  memory that is not pinned each of them is also a wait.

How it is done. Two parts of torch can be told what to do from Python, and both are needed:

* A dispatch mode (`_Device`) sees every operation below autograd and `torch.func`. It takes the CPU tensor out of each
  `Pretended` one, computes, and wraps what comes out. Here devices are compared and operations counted.
* A function mode (`_Translator`) sees every call from Python before. To C++ a pretended tensor lies on the device
  "meta": the only one that needs no driver and no memory, and for which autograd runs in the calling thread. This mode
  translates: of "cuda" in arguments it makes "meta", and of "meta" in `x.device` it makes "cuda:0". Tensors inside
  `torch.func.vmap` and `grad`, which are of no Python class of ours, are told apart by that device, too. And it does
  what C++ would do without a dispatched operation: to make tensors of Python's data, and of lists as indices.

Beside them torch.cuda must say that there is a device, and torch.optim that `Pretended` tensors may be updated all at
once, as those on a GPU are (it looks at their Python class).

What it cannot show: warp's physics (`--physics warp`), CUDA graphs and `torch.compile`, several processes and NCCL,
pinned memory and copies that run beside computations, cuDNN and all else that takes other kernels on a GPU (attention
is counted as its plain formula, `one_hot` as a comparison, a solver as one operation), rounding and the order of sums
(atomics), memory, and time. benchmark/gpu.sh measures these where there is a GPU.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = torch.Generator
CUDA = torch.device("cuda", 0)  # what Python sees
META = torch.device("meta")  # what C++ sees
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
COPYING = ("_to_copy", "copy_")  # the only operations that cross between the devices
LISTS = ("cat", "stack")  # operations that accept no number (a tensor without axes) from the CPU beside their others
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size")
READING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
HIDDEN = ("_linalg_check_errors", "multinomial")  # read a number within their kernels, without those tags
FROM_DATA = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
SUBSCRIPTS = (Tensor.__getitem__, Tensor.__setitem__)


@dataclass
class Counts:
    """What happened on the pretended device, by name; waits and uploads also by place."""

    launches: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    uploads: Counter = field(default_factory=Counter)

    def totals(self) -> dict[str, int]:
        """How many there were of each kind."""
        return {kind: counter.total() for kind, counter in vars(self).items()}

    def copy(self) -> "Counts":
        """The counts up to now."""
        return Counts(**{kind: counter.copy() for kind, counter in vars(self).items()})

    def since(self, before: "Counts") -> "Counts":
        """What came after an earlier copy of these counts."""
        return Counts(**{kind: counter - getattr(before, kind) for kind, counter in vars(self).items()})


class Pretended(Tensor):
    """A tensor that C++ sees on "meta", with shape, strides and gradient of its own, and its numbers in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor):
        self = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=META,
        )
        self.host = host
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # functions of it give plain classes, as usual

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Reached only without the mode."""
        raise RuntimeError(f"{function} of a pretended tensor after the end of pretended_gpu()")

    def __repr__(self, **kwargs):
        return f"Pretended({self.host!r})"

    def __reduce_ex__(self, protocol):
        """Saved as the numbers on the CPU: a checkpoint of a GPU's run, loaded with map_location="cpu"."""
        _current().wait("save")
        return self.host.__reduce_ex__(protocol)


def _hosts(x):
    return x.host if isinstance(x, Pretended) else torch.device("cpu") if isinstance(x, torch.device) else x


def _place() -> str:
    """The innermost line of the project, tests excepted, that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("algos", "envs"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


_devices: list["_Device"] = []


def _current() -> "_Device":
    return _devices[-1]


class _Generator(torch.Generator):
    """One that can be asked for on "cuda". It draws on the CPU, so that numbers are those of a run without `--cuda`."""

    def __new__(cls, device="cpu"):
        self = GENERATOR.__new__(cls)
        self.is_cuda = torch.device(device).type == "cuda"
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self) -> torch.device:
        """Where it says that it is."""
        return CUDA if self.is_cuda else torch.device("cpu")


class _Device(TorchDispatchMode):
    """Computes what is asked of the pretended device, on the CPU; refuses what a GPU would; counts."""

    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def wait(self, name: str) -> None:
        """Count one."""
        self.counts.waits[f"{name} ({_place()})"] += 1

    def upload(self, name: str) -> None:
        """Count one."""
        self.counts.uploads[f"{name} ({_place()})"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        leaves, structure = tree_flatten((args, kwargs))
        ours = [x for x in leaves if isinstance(x, Pretended)]
        asked = kwargs.get("device")
        is_asked = asked is not None and asked.type == "meta"
        if not ours and not is_asked:
            return function(*args, **kwargs)
        theirs = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretended)]
        target = args[0] if name == "copy_" else ours[0] if ours else None
        comes = isinstance(target, Pretended) if asked is None else is_asked  # to the device, or stays there
        if name not in COPYING:
            _refuse_mixed(function, name, args, ours, theirs)
        self.count(function, name, args, ours, theirs, comes)
        args_host, kwargs_host = tree_unflatten([_hosts(x) for x in leaves], structure)
        result = function(*args_host, **kwargs_host)
        return self.wrapped(function, args, kwargs, result) if comes else result

    def wrapped(self, function, args: tuple, kwargs: dict, result):
        """The result on the device. (Where it is an argument, changed in place, C++ gives back the argument.)"""
        if torch.Tag.inplace_view in function.tags:  # the wrapper's own shape changes, too
            with torch._C._DisableTorchDispatch():
                function(*args, **kwargs)
        return tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, result)

    def count(self, function, name: str, args: tuple, ours: list, theirs: list, comes: bool) -> None:
        """Note what this operation would cost on a GPU."""
        if name in COPYING and theirs + ours and (not ours or theirs or not comes):  # between the devices
            if comes:
                self.upload(name)
            else:
                self.wait(name)
            return
        if name in INDEXING:
            indices = [x for x in args[1] if x is not None]
            is_fill = name != "index" and name != "_unsafe_index" and args[2].numel() == 1  # is done by masked_fill
            for x in indices:
                if x.dtype in (torch.bool, torch.uint8) and not is_fill:
                    self.wait(f"{name} by a mask")
                if not isinstance(x, Pretended):
                    self.upload(f"{name} by numbers on the CPU")
        elif any(tag in function.tags for tag in READING) or name in HIDDEN:
            self.wait(name)
            if name == "_local_scalar_dense":  # a copy, no kernel
                return
        if not function.is_view and name not in FREE:
            self.counts.launches[name] += 1


def _refuse_mixed(function, name: str, args: tuple, ours: list, theirs: list) -> None:
    """RuntimeError for tensors of two devices; a number from the CPU, a tensor without axes, may be read by most."""
    wrong = [x for x in theirs if x.ndim or name in LISTS]
    if name in INDEXING and isinstance(args[0], Pretended):
        wrong = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, Pretended) and x.ndim]
    changes = function._schema.is_mutable and args and isinstance(args[0], Tensor)
    if changes and not isinstance(args[0], Pretended):
        wrong = [args[0]]
    if ours and wrong:
        shapes = [tuple(x.shape) for x in wrong]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({function}, on the CPU: shapes {shapes})"
        )


def _refuse_generator(generator, filled) -> None:
    """RuntimeError for a generator on another device than what it has filled."""
    if isinstance(generator, GENERATOR) and isinstance(filled, Tensor):
        device = "cuda" if _is_ours(filled) else "cpu"
        if generator.device.type != device:
            raise RuntimeError(f"Expected a '{device}' device type for generator but found '{generator.device.type}'")


def _is_cuda(x) -> bool:
    if isinstance(x, torch.device):
        return x.type == "cuda"
    return isinstance(x, str) and x.startswith("cuda")


def _is_ours(x) -> bool:
    """Whether a tensor lies on the pretended device, also one inside torch.func; only within the translator."""
    return isinstance(x, Tensor) and x.device.type == "meta"


def _uploaded(index):
    """An index in which lists and arrays are tensors on the device, as indexing a GPU's tensor makes them."""
    if isinstance(index, tuple):
        return tuple(_uploaded(x) for x in index)
    if isinstance(index, list | range | np.ndarray):
        return torch.as_tensor(np.asarray(index)).to(META)
    return index


class _Translator(TorchFunctionMode):
    """Between Python, which speaks of "cuda", and C++, for which that is "meta"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        if function in GETTERS:
            return GETTERS[function](args[0])
        if function == Tensor.cuda:
            return args[0].to(META)
        if function in SUBSCRIPTS and _is_ours(args[0]):
            return function(args[0], _uploaded(args[1]), *args[2:])
        if function in REFUSED and _is_ours(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function == Tensor.tolist and _is_ours(args[0]):  # C++ refuses every tensor that has no memory
            return args[0].cpu().tolist()
        if function == Tensor.__format__ and _is_ours(args[0]) and not args[0].ndim:
            return args[0].item().__format__(*args[1:])
        if function in FROM_DATA:
            return _from_data(function, args, kwargs)
        if any(_is_cuda(x) for x in args):
            args = [META if _is_cuda(x) else x for x in args]
        if _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": META}
        result = function(*args, **kwargs)
        _refuse_generator(kwargs.get("generator"), result)  # here and not below, where it has become another object
        return result


def _from_data(function, args: tuple, kwargs: dict) -> Tensor:
    """torch.tensor and its like, which build a tensor on the CPU and then copy it."""
    device = kwargs.pop("device", None)
    if function == Tensor.new_tensor:
        like, *args = args
        kwargs = {"dtype": like.dtype} | kwargs
        device = like.device if device is None else device
        function = torch.tensor
    made = function(*args, **kwargs)
    if device is None:
        return made
    return made.to(META if _is_cuda(device) else device)


GETTERS = {
    Tensor.device.__get__: lambda x: CUDA if _is_ours(x) else x.device,
    Tensor.is_cuda.__get__: lambda x: _is_ours(x) or x.is_cuda,
    Tensor.is_meta.__get__: lambda x: False,
    Tensor.get_device: lambda x: 0 if _is_ours(x) else x.get_device(),
}
REFUSED = (Tensor.numpy, Tensor.__array__)


@contextmanager
def _generators() -> Iterator[None]:
    """`_Generator` in place of torch.Generator, also where a module of the project has imported that by its name."""
    modules = [torch, *(x for name, x in sys.modules.items() if name.partition(".")[0] in ("algos", "envs"))]
    with ExitStack() as stack:
        for module in modules:
            if vars(module).get("Generator") is GENERATOR:
                stack.enter_context(mock.patch.object(module, "Generator", _Generator))
        yield


@contextmanager
def pretended_gpu() -> Iterator[Counts]:
    """Within it this process has one CUDA device; the counts grow as it is used."""
    from torch.optim import optimizer

    device = _Device()
    _devices.append(device)
    try:
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "device_count", return_value=1),
            mock.patch.object(torch.cuda, "synchronize", return_value=None),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
            mock.patch.object(optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, Pretended]),
            _generators(),
            device,
            _Translator(),
        ):
            yield device.counts
    finally:
        _devices.pop()
