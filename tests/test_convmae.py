import subprocess
import sys

import pytest

import convmae
from convmae import cli


def test_every_public_name_is_there():
    assert all(hasattr(convmae, name) for name in convmae.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = convmae.nonsense


def test_every_command_is_a_python_call():
    assert {name: getattr(convmae, name) for name in cli.COMMANDS} == cli.COMMANDS


def test_importing_loads_no_engine():
    code = "import sys, convmae; print(sorted({'lightning', 'matplotlib', 'tensorboard'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
