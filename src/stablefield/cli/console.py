"""The console that the command prints its results to; plain text unless it is a terminal."""

import os
import shlex
import sys
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from stablefield.cli.terminal import clean, silence
from stablefield.cli.usage import as_flags

__all__ = ["console", "print_rows", "print_table", "quoted", "relative", "shown_warnings"]


class _Output:
    """A stream that falls silent on a failure: a closed pipe (`| head`) or a full disk must not end a run."""

    failure: OSError | None = None

    def __init__(self, stream: IO[str], owner: "_CleanConsole") -> None:
        self._stream, self._owner = stream, owner

    def write(self, text: str) -> int:
        if self._owner.failure is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self._owner.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._owner.failure = error
        if self._stream is sys.__stdout__:
            silence(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _CleanConsole(Console):
    """A console that prints no control characters but its own.

    Attributes:
        failure: the error of a failed write; from then on the console prints nothing.
    """

    failure: OSError | None = None

    @property
    def file(self) -> IO[str]:
        """The stream, guarded."""
        return cast("IO[str]", _Output(super().file, self))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments to print, with clean text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)


# Of several processes, the first one prints.
console = _CleanConsole(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


def print_rows(rows: Iterable[tuple[str, str]]) -> int:
    """Print names beside their texts, and return the exit status of success."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # only a whole checksum is useful
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    console.print(table)
    return 0


def print_table(head: Iterable[str], rows: Iterable[Iterable[str]], title: str | None = None) -> None:
    """Print columns of numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in head:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def relative(path: Path) -> str:
    """The path relative to the working directory, if it is below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def quoted(*words: str | Path) -> str:
    """Words of a command, quoted for a shell and escaped for the console's markup."""
    return escape(shlex.join(relative(word) if isinstance(word, Path) else word for word in words))


@contextmanager
def shown_warnings(remedies: Mapping[type[Warning], str] | None = None) -> Generator[None]:
    """Print the warnings of this block as lines of the command, with flags for arguments, each with its remedy.

    Args:
        remedies: text to append to warnings of a category.
    """

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        added = next((text for kind, text in (remedies or {}).items() if issubclass(category, kind)), "")
        console.print(f"[yellow]warning:[/] {escape(as_flags(str(message)))}{added}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # pyrefly: ignore[bad-assignment]
        yield
