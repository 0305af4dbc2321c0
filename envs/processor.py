"""How torch uses this machine's processor: settings that change its speed, and no result beyond rounding."""

import ctypes
import os
import platform

import torch

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Let the C library keep memory that torch frees, for its next tensors; whether this could be asked for.

    Otherwise glibc gives every large tensor back to the system and gets the next one as new pages, each of which costs
    a fault. Without effect elsewhere than on glibc, and where variables named MALLOC_.. have settled it.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    never = -1
    grow = 2**28  # bytes asked of the system at once; they cost nothing until they are used
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, never) and mallopt(M_TOP_PAD, grow))


def multiply_by_onednn(tf32: bool = False) -> bool:
    """Let oneDNN multiply matrices in place of MKL, where that rounds no more; whether it does.

    Args:
        tf32: on NVIDIA's GPUs, from Ampere (2020) on, products may round their factors to TensorFloat-32: 10 bits of
            mantissa in place of 23. Their matrix units multiply no other single precision. Of no effect on a CPU. The
            variable NVIDIA_TF32_OVERRIDE=0 forbids it.

    On AMD's processors MKL takes a third of their speed (docs/speed.md); for matrices below some 10,000 numbers oneDNN
    takes longer to start than MKL to finish, so this is for algorithms with large ones. torch asks oneDNN only where
    products may round their factors to bfloat16. oneDNN does so on processors with matrix units for that type, and
    multiplies in single precision on others, which a product tells.
    """
    if tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if not torch.backends.mkldnn.is_available():
        return False
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    if ((x @ x - exact).norm() / exact.norm()).item() < 1e-6:
        return True
    settings.fp32_precision = before
    return False
