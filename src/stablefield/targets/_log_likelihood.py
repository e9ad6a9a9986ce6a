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

import torch
from torch import Tensor

from stablefield.targets._checks import Check, require
from stablefield.targets._engine.query import Host
from stablefield.targets._engine.reference_matrix import wide_dtype

__all__ = ["LogLikelihood"]


@dataclass(frozen=True)
class LogLikelihood:
    """A user's log p(condition of the row | reference), relative to that of the row's own source, for a matrix's references.

    Attributes:
        of: the function of row and reference numbers.
        rows: numbers of the rows, shape (B,).
        chosen: numbers of the matrix's references, shape (n,); None if the same.
        own: that of the sources, shape (B,), float64.
        host: whether the host may read values.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    chosen: Tensor | None
    own: Tensor
    host: Host

    @classmethod
    def made(
        cls,
        of: Callable[[Tensor, Tensor], Tensor],
        rows: Tensor,
        chosen: Tensor | None,
        index: Tensor,
        host: Host,
    ) -> "LogLikelihood":
        """For rows whose sources are the samples at `index` (B,).

        Raises:
            ValueError: if the function returns something else, or says that a source cannot have its row's condition.
        """
        own = _values(of, rows, index.long()).diagonal().to(wide_dtype(rows.device))
        if host is not Host.NEVER:
            require(
                Check(
                    own.isfinite(),
                    lambda row: (
                        f"approximate_log_likelihood of row {int(rows[row])} and of its own sample is {float(own[row])}"
                        ": return a finite number, because the sample has that condition."
                    ),
                )
            )
        return cls(of, rows, chosen, own, host)

    def __call__(self, columns: Tensor) -> Tensor:
        """The values (B, c), float64, for columns (c,) of the matrix.

        Raises:
            ValueError: if a value is NaN or +inf.
        """
        numbers = columns if self.chosen is None else self.chosen[columns]
        found = _values(self.of, self.rows, numbers)
        # On a GPU, where the host would have to wait, such values make the target NaN.
        if self.host is Host.READS:
            require(
                Check(
                    (found < torch.inf).all(1),
                    lambda row: (
                        f"approximate_log_likelihood of row {int(self.rows[row])} holds NaN or +inf: return logarithms "
                        "of probabilities, -inf for 0."
                    ),
                )
            )
        # In float64, in which a constant of the row takes no digits from the differences.
        return found.to(self.own.dtype) - self.own[:, None]


def _values(of: Callable[[Tensor, Tensor], Tensor], rows: Tensor, numbers: Tensor) -> Tensor:
    found = of(rows, numbers)
    shape = (len(rows), len(numbers))
    if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
        kind = type(found).__name__
        if isinstance(found, Tensor):
            kind = f"a tensor of shape {tuple(found.shape)} and dtype {found.dtype}"
        raise ValueError(
            f"approximate_log_likelihood returned {kind} for {shape[0]} rows and {shape[1]} references: return a floating "
            f"point tensor of shape {shape}."
        )
    return found
