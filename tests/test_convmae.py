import subprocess
import sys

import pytest

import convmae
from convmae.commands import COMMANDS, command


def test_every_public_name_is_there():
    assert all(hasattr(convmae, name) for name in convmae.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = convmae.nonsense


def test_every_command_is_a_python_call():
    for name, entry in COMMANDS.items():
        if isinstance(entry, dict):
            functions = {getattr(getattr(convmae, name), function) for function in getattr(convmae, name).__all__}
            assert functions == {command(module) for part, module in entry.items() if part != "_help"}
        else:
            assert getattr(convmae, name) is command(entry)


def test_importing_loads_no_engine():
    code = "import sys, convmae; print(sorted({'lightning', 'matplotlib', 'tensorboard'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
