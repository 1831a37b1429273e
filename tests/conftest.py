"""What several test files share: the golden values and tiny models."""

import os
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton, whose own functions take it from there

# Compiled code is kept by the forward alone: of another version of an operator's backward torch would find the old one.
_compiled = tempfile.TemporaryDirectory()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Read a golden file: golden("pretrain_tiny") -> dict of tensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small gain nothing from a second thread, and wait long for it on a busy machine."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def at_step(monkeypatch):
    """Inside at_step(n), something happens in the midst of a run's n-th step: SIGTERM, or what is given."""
    from convmae.training.logging import RunLog

    @contextmanager
    def happens(number, event=lambda: os.kill(os.getpid(), signal.SIGTERM)):
        original = RunLog.advance

        def advance(log, step, epoch):
            original(log, step, epoch)
            if step == number:
                event()

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "advance", advance)
            yield

    return happens
