"""What the person at the terminal sees: lines on stderr, a bar while something runs, tables on stdout."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")
MINIMUM, LONGEST = 12, 34  # letters that a column of texts has at least: so many, or its longest word up to so many
NEXT = "next: fdpo "
_QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")
_WORD = {False: re.compile(r"(?:`[^`]*`|\S)+"), True: re.compile(r"""(?:'[^']*'|"[^"]*"|\S)+""")}  # of a sentence, of a command
EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on

stdout = Console(soft_wrap=True, highlight=False, markup=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def say(text: str) -> None:
    """A line on stderr, or several where it is wider than the terminal."""
    there = stderr.is_terminal or "COLUMNS" in os.environ
    stderr.print(fitted(text, stderr.width if there else None))


def tell(text: str) -> None:
    """The same on stdout."""
    print(fitted(text, room()))


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
    """A table on stdout; every column but the first right-aligned. Where it is wider than the terminal, texts wrap in their
    columns, and columns that still find no place stand below the others, each block with the first column.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    most = room()
    for number, block in enumerate(_blocks(columns, cells, most)):
        table = Table(title=title if title and not number else None, title_justify="left", box=None, pad_edge=False, header_style="bold",
                      title_style="bold")
        for at in block:
            least, whole = _widths(columns, cells, at)
            table.add_column(columns[at], justify="left" if at == 0 or not right else "right", overflow="fold",
                             no_wrap=most is None or least == whole, min_width=None if most is None else min(least, most))
        for row in cells:
            table.add_row(*(row[at] for at in block))
        whole = Measurement.get(stdout, stdout.options.update_width(10_000), table).maximum
        Console(width=most or max(width(), whole), soft_wrap=most is None, highlight=False, markup=False).print(table)


def _blocks(columns: Sequence[str], cells: Sequence[Sequence[str]], most: int | None) -> list[list[int]]:
    """Which columns stand beside each other."""
    if most is None:
        return [list(range(len(columns)))]
    first, blocks = _widths(columns, cells, 0)[0], [[0]]
    taken = first
    for at in range(1, len(columns)):
        least = 2 + _widths(columns, cells, at)[0]
        if taken + least > most and len(blocks[-1]) > 1:
            blocks, taken = [*blocks, [0]], first
        blocks[-1].append(at)
        taken += least
    return blocks


def _widths(columns: Sequence[str], cells: Sequence[Sequence[str]], at: int) -> tuple[int, int]:
    """(least, whole) width of a column: text may wrap, a figure and a word of up to LONGEST letters may not."""
    there = [columns[at], *(row[at] for row in cells)]
    whole, word = max(map(cell_len, there)), max((cell_len(word) for cell in there for word in cell.split()), default=0)
    return min(whole, max(min(word, LONGEST), MINIMUM)), whole


def room() -> int | None:
    """Letters in a line of stdout where it is a terminal, or where $COLUMNS says so; None: lines are as long as they are."""
    return stdout.width if stdout.is_terminal or "COLUMNS" in os.environ else None


def width() -> int:
    """The same; plenty where it is no terminal."""
    return room() or 200


def fitted(text: str, most: int | None) -> str:
    """Text in lines of at most `most` letters, broken at blanks; longer words, such as paths, and what stands in backticks stay whole.

    A command to be copied (after `next: `) is broken as a shell understands it.

    >>> print(fitted("round 1: run `fdpo round` first", 16))
    round 1: run
      `fdpo round`
      first
    >>> print(fitted("stale: `fdpo round --set a=b` makes it", 20))
    stale: `fdpo round \\
      --set a=b` makes
      it
    >>> print(fitted("next: fdpo generate 'a red dress' --round 3", 30))
    next: fdpo generate \\
        'a red dress' --round 3
    """
    lines = [text] if text.startswith(NEXT) else text.split("\n")  # a prompt in a command may have several
    return text if most is None else "\n".join(_fitted(line, most) for line in lines)


def _fitted(line: str, most: int) -> str:
    if cell_len(line) <= most:
        return line
    indent, quoting = re.match(r" *", line)[0], line.startswith(NEXT)  # type: ignore[index]
    command = quoting and ", " not in _QUOTED.sub("", line)  # and not one, or another
    more = indent + " " * (4 if command else 2)
    lines, now, tail = [], indent, ""
    for word, goes_on in _words(line, quoting, command, most - len(more)):
        if now.strip() and cell_len(now) + 1 + cell_len(word) + len(goes_on) > most:
            lines.append(now + tail)
            now = more
        now, tail = now + (" " if now.strip() else "") + word, goes_on
    return "\n".join([*lines, now])


def _words(line: str, quoting: bool, command: bool, most: int) -> Iterator[tuple[str, str]]:
    """(word, what a line that ends with it ends in) of a line; the words of a command in backticks too, where it is too long for a line."""
    for word in _WORD[quoting].findall(line):
        if not quoting and " " in word and cell_len(word) > most:
            *others, last = _WORD[True].findall(word)
            yield from [*((other, " \\") for other in others), (last, "")]
        else:
            yield word, " \\" if command else ""


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
