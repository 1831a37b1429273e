"""Every command line that the documentation shows is one that the commands take."""

import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import auto_parser, set_parsing_settings

from convmae import cli

ROOT = Path(__file__).parents[1]


def command_lines(path):
    """What follows `convmae` or `-m convmae` in the fenced bash blocks of a file, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    found = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["convmae"]:
            found.append(words[1:])
        elif "convmae" in words and words[words.index("convmae") - 1] == "-m":
            found.append(words[words.index("convmae") + 1 :])
    return found


LINES = [
    (path, line) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] for line in command_lines(path)
]


@pytest.mark.parametrize(("path", "line"), LINES, ids=[f"{path.stem}: {' '.join(line)[:60]}" for path, line in LINES])
def test_a_command_line_is_taken(path, line):
    """By the parser itself; nothing is run. Names of files stand for the reader's own."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = auto_parser(cli._wanted(line), as_positional=False, parser_class=cli._Parser, prog="convmae")
    settings = parser.instantiate(parser.parse_args(cli._friendly(line)))
    assert settings.subcommand == line[0]


def test_the_readme_shows_all_commands():
    shown = {line[0] for path, line in LINES if path.name == "README.md"}
    assert {"pretrain", "reconstruct", "probe", "finetune", "predict", "detect", "segment"} <= shown
    assert sum(path.name == "README.md" for path, _ in LINES) >= 18
