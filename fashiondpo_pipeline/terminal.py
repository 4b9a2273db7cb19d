"""What the person at the terminal sees: lines on stderr, a bar while something runs, tables on stdout."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")
EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on

stdout = Console(soft_wrap=True, highlight=False, markup=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def say(text: str) -> None:
    stderr.print(text)


def _one(item: Any) -> int:
    return 1


def track(items: Iterable[Item], text: str, total: int, done: int = 0, unit: str = "", size: Callable[[Item], int] = _one,
          now: Callable[[], str] = str) -> Iterator[Item]:
    """The items, under a bar (a line each half minute where stderr is not a terminal); `done` of `total` came before.

    What is counted are `unit`s, of which an item has `size(item)`; `now()` is what else is to be told at the moment, such as a loss.
    """
    if not stderr.is_terminal:
        yield from _track_by_lines(items, text, total, done, unit, size, now)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
               TextColumn("{task.fields[now]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(text, total=total, completed=done, unit=unit, now="")
        for item in items:
            yield item
            progress.update(task, advance=size(item), now=now())


def _track_by_lines(items: Iterable[Item], text: str, total: int, done: int, unit: str, size: Callable[[Item], int],
                    now: Callable[[], str]) -> Iterator[Item]:
    last = time.monotonic()
    for item in items:
        if time.monotonic() - last > EVERY:
            say(" ".join(filter(None, [f"{text}: {done:,} of {total:,}", unit, now()])))
            last = time.monotonic()
        yield item
        done += size(item)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: bool = True) -> None:
    """A table on stdout; every column but the first right-aligned."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or not right else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    whole = Measurement.get(stdout, stdout.options.update_width(10_000), table).maximum
    # wider than the terminal where the table is: lines break there, while rich would cut figures
    Console(width=max(width(), whole), soft_wrap=True, highlight=False, markup=False).print(table)


def width() -> int:
    """Letters in a line of stdout; plenty where it is no terminal."""
    return stdout.width if sys.stdout.isatty() else 200


def size(count: float) -> str:
    """Bytes for people.

    >>> size(1536), size(0), size(41_000_000)
    ('1.54 kB', '0 B', '41 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
