r"""The log likelihood of a row's condition under a reference, as a user's function gives it.

For conditions that no two samples share, such as captions, the posterior of the source given $x_t$ and the condition $c$ is

$$ w_k \propto \pi_k \, p(c \mid y_k) \, p_{t|0}(x_t \mid y_k) , $$

so a likelihood is a prior weight of its own for every row. Labels are the exact special case: 1 for equal labels, else 0.
Any other likelihood, such as a similarity of embeddings, is a model, and the target is as good as it.

References:
    Posterior-augmented flow matching, arXiv 2605.00825.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stablefield.targets._checks import require, value_check
from stablefield.targets._engine.query import Host

__all__ = ["LogLikelihood"]


@dataclass(frozen=True)
class LogLikelihood:
    """A user's log p(condition of the row | reference), for the rows of a query and the columns of its matrix.

    Attributes:
        of: the function of row and reference numbers.
        rows: numbers of the rows, shape (B,).
        chosen: numbers of the matrix's references, shape (n,); None if the same.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    chosen: Tensor | None

    def __call__(self, columns: Tensor) -> Tensor:
        return self._checked(columns if self.chosen is None else self.chosen[columns])

    def of_sources(self, index: Tensor | None, host: Host) -> Tensor:
        """That of the rows' own sources, the samples at `index`, shape (B,)."""
        assert index is not None
        own = self._checked(index).diagonal()
        if host is not Host.NEVER:
            rule = "of the row's own sample: it has that condition, so its likelihood is not 0"
            require(value_check(own.isfinite(), "approximate_log_likelihood", own, rule))
        return own

    def _checked(self, numbers: Tensor) -> Tensor:
        found = self.of(self.rows, numbers)
        shape = (len(self.rows), len(numbers))
        if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
            kind = f"{tuple(found.shape)} and {found.dtype}" if isinstance(found, Tensor) else f"{type(found).__name__}"
            raise ValueError(
                f"approximate_log_likelihood returned {kind} for {shape[0]} rows and {shape[1]} references: return a "
                f"floating point tensor of shape {shape}."
            )
        return found
