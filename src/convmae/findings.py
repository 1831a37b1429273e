"""What is found in a data set before anything is learned from it or judged by it: counted, said, and listed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

REPORT_FILE = "data-report.txt"
"""In a run's folder: all that was found in its data."""


class Finding(NamedTuple):
    """What the owner of a data set should know of it: something that is left out, changed, or looks wrong."""

    summary: str
    """One line: how many of what, and what becomes of them."""
    items: Sequence[str] = ()
    """A line for each of them, which names it."""


Findings = Mapping[str, Sequence[Finding]]
"""The findings of each data set, by its name."""


def told(findings: Findings) -> Iterator[str]:
    """Yields a line for each finding, without its items."""
    for name, found in findings.items():
        for finding in found:
            yield f"{name}: {finding.summary}"


def report(findings: Findings) -> str:
    """All findings and all their items, as text for REPORT_FILE."""
    lines = []
    for name, found in findings.items():
        for finding in found:
            lines += [f"{name}: {finding.summary}", *(f"    {item}" for item in finding.items)]
    return "".join(f"{line}\n" for line in lines)
