"""Output safe for a terminal: text without control characters, on streams that may be closed."""

import contextlib
import os
import re
import sys

__all__ = ["clean", "open_closed_streams", "silence", "take_every_character"]

# All of C0 but tab and newline, DEL, C1, the marks that change the direction of text, and halves of surrogate pairs,
# which represent the bytes of file names that are not UTF-8.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """Replace control characters, which a hostile file name may contain, by a mark."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def open_closed_streams() -> None:
    """Open the null device in place of standard streams that are closed, as `>&-` leaves them.

    Otherwise the next open file gets the stream's number, and receives the printed text.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # This is the lowest free number.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def take_every_character() -> None:
    """Escape characters that a stream's encoding lacks, such as a table's lines in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by something else
            stream.reconfigure(errors="backslashreplace")  # pyrefly: ignore[missing-attribute]


def silence(number: int) -> None:
    """Send a stream's buffered text to the null device, so that the process does not fail on it at its end."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
