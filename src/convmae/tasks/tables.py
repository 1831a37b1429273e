"""Tables of figures on the terminal: shares in per cent."""

import math
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def percent(share: float, sign: str = "") -> str:
    """A share in [0, 1] in per cent, with one decimal and perhaps a sign; "-" where it is not a number."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}{sign}"


def shares_table(
    title: str, names: Sequence[str], rows: Iterable[tuple[str, *tuple[float, ...]]], first: str = ""
) -> Table:
    """A table with a row for each (name, share, ...) of `rows`, the shares in per cent.

    names: headings of the columns of shares; first: that of the column of names. A share that is not a number, as
    there is nothing to count, is "-", which a line below the table explains.
    """
    rows = list(rows)
    missing = any(math.isnan(share) for _, *shares in rows for share in shares)
    caption = "-: the images have none" if missing else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for name, *shares in rows:
        table.add_row(Text(name), *map(percent, shares))  # a class may be called anything, rich's markup too
    return table
