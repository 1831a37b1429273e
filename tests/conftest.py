"""What several test files share: the golden values and tiny models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Read a golden file: golden("pretrain_tiny") -> dict of tensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
