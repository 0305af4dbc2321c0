"""What the tests of the mathematics share."""

import pytest
import torch
from torch import Generator


@pytest.fixture(autouse=True)
def float64():
    """Every test of a module that imports this runs in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seeded(seed):
    return Generator().manual_seed(seed)


def flat(params):
    return torch.cat([value.flatten() for value in params.values()])
