"""Figures on the terminal: shares in per cent, and names as they are."""

import io
import math

import pytest
from rich.console import Console

from convmae.tasks.tables import percent, shares_table


@pytest.mark.parametrize(("share", "text"), [(0.0, "0.0"), (0.12345, "12.3"), (1.0, "100.0"), (math.nan, "-")])
def test_a_share_is_told_in_per_cent(share, text):
    assert percent(share) == text


def test_each_name_has_a_row_whatever_it_is():
    """Brackets are rich's markup elsewhere, where a closing one without its opening one raises."""
    console = Console(file=io.StringIO(), width=80)
    console.print(
        shares_table("by class, %", ("boxes", "masks"), [("[/cat]", 0.5, math.nan), ("dog", 1.0, 0.25)], "class")
    )
    rows = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        for line in console.file.getvalue().splitlines()
    ]
    assert ["class", "boxes", "masks"] in rows
    assert ["[/cat]", "50.0", "-"] in rows
    assert ["dog", "100.0", "25.0"] in rows
    assert "by class, %" in console.file.getvalue()
    assert "-: the images have none" in console.file.getvalue()


def test_a_table_without_gaps_explains_none():
    assert shares_table("by class, %", ("boxes",), [("cat", 0.5)]).caption is None
