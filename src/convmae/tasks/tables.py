"""Tables of figures on the terminal: shares in per cent."""

import math
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def percent(share: float) -> str:
    """A share in [0, 1] in per cent, with one decimal; "-" where it is not a number."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def shares_table(
    title: str, names: Sequence[str], rows: Iterable[tuple[str, *tuple[float, ...]]], first: str = ""
) -> Table:
    """A table with a row for each (name, share, ...) of `rows`, the shares in per cent.

    names: headings of the columns of shares; first: that of the column of names.
    """
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for name, *shares in rows:
        table.add_row(Text(name), *map(percent, shares))  # a class may be called anything, rich's markup too
    return table
