"""The constraints of `make test-lowest` are the lower bounds of pyproject.toml."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NO_SUCH_RELEASE = {"webdataset": "1.0.2", "array_record": "0.8.1"}
"""The first releases at or above a bound that is none itself."""


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return [Requirement(line) for line in project["dependencies"] + extras]


def test_each_lower_bound_is_pinned():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pinned}
    bounds = {
        requirement.name: Version(NO_SUCH_RELEASE.get(requirement.name, str(requirement.specifier).removeprefix(">=")))
        for requirement in requirements()
        if requirement.specifier
    }
    assert versions == bounds
