"""Tables of text for the terminal."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], n_left: int = 1) -> list[str]:
    """Lines with the cells below each other, the first `n_left` columns to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
