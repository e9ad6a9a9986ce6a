"""How far a long call has come, for whoever draws a bar."""

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report of a long call to its `progress` callback.

    Attributes:
        stage: what is being done, such as "sampling".
        done: parts of it that are done.
        total: parts that there are.
    """

    stage: str
    done: int
    total: int
