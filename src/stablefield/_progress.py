"""The progress of a long call, such as for a progress bar."""

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report of a long call to its `progress` callback.

    Attributes:
        stage: the current activity, such as "sampling".
        done: number of finished parts.
        total: number of parts.
    """

    stage: str
    done: int
    total: int
