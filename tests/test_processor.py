"""Settings of the processor: what they are for happens, and nothing else does."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from envs import processor

ROOT = Path(__file__).resolve().parent.parent
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's malloc")

FAULTS = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from envs import processor
kept = processor.keep_memory() if sys.argv[2] == "keep" else None
def work():
    large = [torch.ones(10_000_000) for _ in range(3)]  # 120 MB, 30,000 pages of 4 KB
for _ in range(6):  # until the kept memory has places for all of them
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **env: str) -> tuple[str, int]:
    """What `keep_memory` said, and the faults of five times 120 MB that are freed again, in a process of its own."""
    command = [sys.executable, "-c", FAULTS, str(ROOT), how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=os.environ | env)
    kept, count = result.stdout.split()
    return kept, int(count)


@on_glibc
def test_kept_memory_costs_no_new_pages():
    assert faults("leave")[1] > 5 * 120e6 / resource.getpagesize() / 2  # large pages, where there are any, cost fewer
    # Where the kernel takes back idle memory, as this machine's does under load, one of several tries is left alone.
    tries = [faults("keep") for _ in range(3)]
    assert {kept for kept, _ in tries} == {"True"}
    assert min(count for _, count in tries) < 500


@on_glibc
def test_what_the_user_said_about_memory_holds():
    kept, count = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
    assert count > 10_000


def test_elsewhere_than_on_glibc_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(processor.ctypes, "CDLL", lambda _: pytest.fail("asked"))
    assert processor.keep_memory() is False


@pytest.fixture
def setting():
    """torch's setting for products in single precision, as it was afterwards."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_products_stay_in_single_precision(setting):
    """Of many shapes and layouts, beside double precision; bfloat16 would be wrong by 3e-3."""
    processor.multiply_by_onednn()
    generator = torch.Generator().manual_seed(0)
    for n, k, m, batch in (
        (800, 17, 64, ()),
        (2000, 64, 64, (4,)),
        (256, 128, 128, ()),
        (1000, 300, 300, ()),
        (1, 512, 7, (3,)),
    ):
        for turn in (False, True):
            x = torch.rand(*batch, n, k, generator=generator)
            y = (
                torch.rand(*batch, m, k, generator=generator).mT
                if turn
                else torch.rand(*batch, k, m, generator=generator)
            )
            exact = x.double() @ y.double()
            assert ((x @ y - exact).norm() / exact.norm()).item() < 1e-6


def test_where_onednn_would_round_mkl_goes_on(setting, monkeypatch):
    setting.fp32_precision = "ieee"
    exactly = torch.Tensor.__matmul__

    def rounding(x, y):
        rounds = x.dtype == torch.float32 and setting.fp32_precision == "bf16"
        return exactly(x.bfloat16().float(), y.bfloat16().float()) if rounds else exactly(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert processor.multiply_by_onednn() is False
    assert setting.fp32_precision == "ieee"


def test_where_it_rounds_no_more_onednn_is_asked(setting, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: torch.mm(x.double(), y.double()).to(x))
    assert processor.multiply_by_onednn() is True
    assert setting.fp32_precision == "bf16"


def test_gpus_round_to_tf32_only_where_a_file_asks():
    gpu = torch.backends.cuda.matmul
    before = gpu.fp32_precision
    try:
        gpu.fp32_precision = "ieee"
        processor.multiply_by_onednn()
        assert gpu.fp32_precision == "ieee"
        processor.multiply_by_onednn(tf32=True)
        assert gpu.fp32_precision == "tf32"
    finally:
        gpu.fp32_precision = before


def test_without_onednn_nothing_is_set(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert processor.multiply_by_onednn() is False


@pytest.mark.parametrize("path", sorted((ROOT / "algos").glob("*.py")), ids=lambda path: path.stem)
def test_threads_that_wait_soon_sleep_but_where_the_user_says_otherwise(path):
    """What a file sets before it imports torch, from where OpenMP reads it."""
    stop = "import sys, os; sys.path.insert(0, sys.argv[1])\nclass Stop:\n    def find_spec(self, name, *_):\n"
    stop += (
        "        if name == 'torch':\n            print(os.environ['GOMP_SPINCOUNT'])\n            raise SystemExit\n"
    )
    stop += f"sys.meta_path.insert(0, Stop())\nimport {path.stem}"
    for env, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        outside = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        command = [sys.executable, "-c", stop, str(path.parent)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=outside | env)
        assert result.stdout.strip() == expected, result.stderr


def test_the_benchmark_of_products(monkeypatch, capsys):
    from benchmark import processor as benchmark

    monkeypatch.setattr(benchmark, "SHAPES", (((30, 20), (20, 10)), ((2, 30, 20), (2, 20, 10))))
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        benchmark.products(benchmark.Options("products", repeats=1))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["left"] for record in records] == [[30, 20], [2, 30, 20]]
    for record in records:
        assert record["mkl_ms"] > 0
        assert record["mkl_error"] < 1e-6
        assert record.get("onednn_error", 0) < 1e-6  # absent where it would round
