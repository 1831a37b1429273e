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
    for name, command in cli.COMMANDS.items():
        if isinstance(command, dict):
            functions = {getattr(getattr(convmae, name), function) for function in getattr(convmae, name).__all__}
            assert functions == {function for part, function in command.items() if part != "_help"}
        else:
            assert getattr(convmae, name) is command


def test_importing_loads_no_engine():
    code = "import sys, convmae; print(sorted({'lightning', 'matplotlib', 'tensorboard'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
