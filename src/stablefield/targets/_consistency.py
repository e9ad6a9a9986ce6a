r"""Consistency: whether x_t fits the process, x0, t and the noise.

A posterior is only as good as its model of the noise. A loop whose time runs the other way, which passes step numbers
instead of times in [0, 1], or which passes the noise of another draw, gets a target that is wrong by more than its own size,
and no loss curve shows it. Four properties of a batch hold whatever the data:

- If the noise is given, $x_t - \alpha x_0 - \sigma \varepsilon$ is zero up to rounding, in every row.
- $|x_t - \alpha x_0|^2 / \sigma^2$ is chi-square with d degrees of freedom in every row (for Student's t with D degrees of
  freedom, d times an F variable), so its sum over the batch has a known spread.
- For images, so is the square of the noise's mean over each channel, times the number of pixels. More detects offset noise.
  So is that of its mean over the first axis of a row with several. More detects noise that frames (T, C, H, W) or tokens
  (T, D) share. Less is no fault: the noise of molecules (atoms, 3) or (3, atoms) has a mean of 0 over the atoms if the data
  have.
- The direction of the noise is uniform and independent of the data, so $\sqrt{d}$ times the cosine between the noise and
  the row's own deviation from the batch's mean has mean 0 and variance 1. Noise that was assigned to the data, as by optimal
  transport, is closer to them. This is summed over calls, because one small batch may not show it.

The bounds are eight standard deviations, so correctly drawn noise never reaches them. Rows that share their noise, up to its
sign, count as one.

References:
    Wilson, Hilferty, "The Distribution of Chi-Square", PNAS 1931: the cube root of a chi-square variable is nearly normal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from stablefield.diffusion._process import Process
from stablefield.targets._checks import Check, finite_check, value_check
from stablefield.targets._engine.reference_matrix import row_blocks, wide_dtype
from stablefield.targets._perturbation_kernel import GaussianKernel, PerturbationKernel, StudentTKernel

__all__ = ["Correlation", "Measured", "consistency_checks"]

# Standard deviations beyond which the noise does not fit the process.
_SPREADS = 8.0
# Accepted deviation of a mean square from 1, however large the batch.
_SLACK = 0.01
# Accepted relative error of sigma noise and of alpha x0 in float32, for rounding and for other ways to compute a schedule;
# and in ulps of shorter formats.
_NOISE_ERROR, _DATA_ERROR, _ULPS = 1e-3, 1e-5, 4
# Rounding contributes to rows whose noise is below this many ulps of x_t.
_LOST = 32
# Relative difference of norms below which two rows of noise count as one.
_SAME = 1e-5
# Number of pixels from which the mean over a channel is informative.
_PIXELS = 16
# Batches are the same if their noise's mean norm differs by less than this, relatively, and their correlation in standard
# deviations.
_SAME_BATCH = 1e-4
# Rows over which the correlation of noise and data is summed. Correlation from rounding stays far below the bound.
_WINDOW = 1024


class Correlation:
    """The correlation of the noise with the data over calls."""

    def __init__(self) -> None:
        self._along = self._variance = 0.0
        self._rows = 0
        self._last = (0.0, 0.0, 0)

    def add(self, along: float, variance: float, rows: int, norm: float) -> float:
        """Add a batch, and return the sum so far in standard deviations; after enough rows a new sum begins.

        The same data with the same noise as in the call before, such as of a loop that overfits one batch, say nothing new
        and are not added.

        Args:
            along: sum of the rows' standardised cosines.
            variance: its expected variance.
            rows: of the batch.
            norm: sum of the norms of the rows' noise.
        """
        spread = math.sqrt(max(self._variance, 1.0))
        last, self._last = self._last, (along, norm, rows)
        near = abs(along - last[0]) <= _SAME_BATCH * math.sqrt(max(variance, 1.0))
        if near and abs(norm - last[1]) <= _SAME_BATCH * norm and rows == last[2]:
            return self._along / spread
        if self._rows >= _WINDOW:
            self._along, self._variance, self._rows = 0.0, 0.0, 0
        self._along, self._variance, self._rows = self._along + along, self._variance + variance, self._rows + rows
        return self._along / math.sqrt(max(self._variance, 1.0))


@dataclass(frozen=True)
class Measured:
    """Measurements of each row of a batch, on the batch's device; every attribute has shape (B,).

    Attributes:
        clean: norm of x0.
        noisy: norm of x_t.
        residual: norm of x_t - alpha x0.
        drawn: norm of the given noise, or of the residual.
        left: norm of x_t - alpha x0 - sigma noise; 0 without given noise.
        channels: sum of the squared means of the residual over each channel; 0 if not informative.
        shared: sum of the squared means of the residual over the first axis of a row; 0 if it has one axis.
        own: norm of the row's deviation from the batch's mean.
        along: inner product of this deviation with the noise.
    """

    clean: Tensor
    noisy: Tensor
    residual: Tensor
    drawn: Tensor
    left: Tensor
    channels: Tensor
    shared: Tensor
    own: Tensor
    along: Tensor

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def of(
        cls,
        x0: Tensor,
        x_t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        noise: Tensor | None,
        source_only: Tensor | None = None,
    ) -> "Measured":
        """Measure a batch; see `consistency_checks` for the arguments."""
        dtype = torch.promote_types(torch.promote_types(x0.dtype, x_t.dtype), torch.float32)
        clean, noisy = x0.flatten(1).to(dtype), x_t.flatten(1).to(dtype)
        alpha, sigma = alpha.to(dtype)[:, None], sigma.to(dtype)[:, None]
        drawn = None if noise is None else noise.flatten(1).to(dtype)
        whole = clean if source_only is None else torch.where(source_only[:, None], 0, clean)
        middle = whole.mean(0)
        pixels = x0[0, 0].numel() if x0.ndim > 2 else 0
        found = []
        # A few rows at a time, so that intermediate results stay in a CPU's cache.
        for some in row_blocks(clean):
            a, x = clean[some], noisy[some]
            residual = torch.addcmul(x, alpha[some], a, value=-1)
            own = whole[some] - middle
            part = residual if drawn is None else drawn[some]
            zero = torch.zeros_like(alpha[some, 0])
            means = shared = zero
            if pixels >= _PIXELS:
                means = residual.view(len(residual), -1, pixels).mean(2).square_().sum(1)
            if x0.ndim > 2:
                shared = residual.view(len(residual), x0.shape[1], -1).mean(1).square_().sum(1)
            norms = [torch.linalg.vector_norm(rows, dim=1) for rows in (a, x, residual, own)]
            size, left = norms[2], zero
            if drawn is not None:
                size = torch.linalg.vector_norm(part, dim=1)
                left = torch.addcmul(residual, sigma[some], part, value=-1).norm(dim=1)
            along = own.mul_(part).sum(1)  # torch's vecdot takes ten times as long
            found.append(torch.stack([*norms[:3], size, left, means, shared, norms[3], along]))
        return cls(*(found[0] if len(found) == 1 else torch.cat(found, 1)).unbind(0))


def consistency_checks(
    process: Process,
    kernel: PerturbationKernel,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    source_only: Tensor | None = None,
    correlation: Correlation | None = None,
    measured: Measured | None = None,
) -> list[Check]:
    """Conditions on x_t, t and the noise, to be read together.

    Args:
        process: the process that should have made x_t.
        kernel: the noise kernel; the distribution of kernels other than this library's is not checked.
        x0: clean samples, shape (B, ...).
        x_t: noisy samples, shape (B, ...).
        t: times, shape (B,), on the host, like all following arguments except the noise.
        alpha: scale of the data at these times, shape (B,).
        sigma: scale of the noise at these times, shape (B,).
        noise: the noise in x_t, shape (B, ...), or None.
        source_only: rows that use only their source, bool (B,), or None: they need not be finite.
        correlation: of earlier calls; None for only this one.
        measured: measurements of these rows; computed if None.
    """
    low, high = process.time_range
    rule = f"the times of {process} run from {low:g} to {high:g}; pass times of this process"
    checks = [value_check(process.has_time(t), "t", t, rule)]
    given = [value for value in (x0, x_t, noise) if value is not None]
    eps = max(torch.finfo(value.dtype).eps for value in given)
    d = x0[0].numel()
    found = Measured.of(x0, x_t, alpha, sigma, noise, source_only) if measured is None else measured
    dtype = found.clean.dtype
    alpha, sigma = alpha.to(dtype), sigma.to(dtype)
    finite = found.clean.isfinite()
    checks.append(finite_check(_but(found.clean, source_only), "x0"))
    checks.append(finite_check(_but(torch.where(finite, found.residual, 0), source_only), "x_t"))
    # A scheduler that rounds 1 - alpha^2 to a short format changes sigma; if alpha is 1, sigma is exact.
    rounding = torch.where(alpha < 1, eps * alpha.square() / sigma.square(), 0)
    if noise is not None:
        checks.append(finite_check(_but(found.drawn, source_only), "noise"))
        allowed = max(_NOISE_ERROR, _ULPS * eps) + _ULPS * rounding
        allowed = allowed * sigma * found.drawn + max(_DATA_ERROR, _ULPS * eps) * alpha.abs() * found.clean
        # NaN passes here; the checks above report it.
        checks.append(Check(~(found.left > allowed), lambda row: _residual_message(process, x0, x_t, t, noise, row)))
    # In rows with hardly any noise, part of it is rounding.
    size = torch.maximum(found.noisy, alpha.abs() * found.clean)
    usable = (sigma * math.sqrt(d) > _LOST * eps * size) & (rounding < _SLACK / 2) & finite & found.residual.isfinite()
    scale = torch.where(usable, 1 / sigma, 0)
    square = torch.where(usable, found.residual * scale, 0).square()
    drawn = torch.where(usable, found.drawn if noise is not None else found.residual * scale, 0)
    repeats = _repeats(drawn, usable)
    law = _law(kernel, square, usable, d, repeats)
    if law is not None:
        deviation, mean = law
        checks.append(Check(~(deviation > 1).reshape(1), lambda _: _law_message(process, t, float(mean))))
    if x0.ndim > 2 and isinstance(kernel, GaussianKernel):
        # The sum of the squared means, how many numbers each is over, and what a failure means.
        parts = [(found.channels, x0[0, 0].numel(), _offset_message)] if x0[0, 0].numel() >= _PIXELS else []
        parts += [(found.shared, x0.shape[1], _shared_message)] if x0.shape[1] > 1 else []
        for squares, count, message in parts:
            means = torch.where(usable, squares * scale.square(), 0) * count
            of_means = _law(kernel, means, usable, d // count, repeats)
            assert of_means is not None
            deviation, mean_square = of_means
            deviation = torch.where(mean_square < 1, 0, deviation)  # less is no fault, see above
            say = partial(_ratio_message, message, mean_square)
            checks.append(Check(~(deviation > 1).reshape(1), say))
    norms = found.own * found.drawn
    comparable = usable & (norms > 0) & norms.isfinite()
    comparable = comparable if source_only is None else comparable & ~source_only
    cosine = torch.where(comparable, found.along / norms, 0)
    correlation = Correlation() if correlation is None else correlation
    along, variance = float(cosine.sum()) * math.sqrt(d), float(comparable.sum() * repeats)
    spreads = correlation.add(along, variance, len(x0), float(drawn.sum()))
    checks.append(Check(torch.tensor([not abs(spreads) > _SPREADS], device="cpu"), lambda _: _pairing_message(spreads)))
    return checks


def _but(norms: Tensor, source_only: Tensor | None) -> Tensor:
    return norms if source_only is None else norms.masked_fill(source_only, 0)


def _repeats(norms: Tensor, rows: Tensor) -> Tensor:
    """The factor by which rows that share their noise, and so its norm (B,), raise the variance of a sum over `rows`."""
    values = norms.sort().values
    run = torch.cat([values.new_zeros(1, dtype=torch.long), (values.diff() > _SAME * values[1:]).cumsum(0)])
    # Rows that do not count have norm 0 and form the first run.
    members = (values > 0).to(norms.dtype)
    counts = torch.zeros_like(norms).index_add_(0, run, members)
    return counts.square().sum() / rows.sum().clamp(min=1)


def _law(
    kernel: PerturbationKernel, square: Tensor, rows: Tensor, d: int, repeats: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The deviation of a mean of squares from its expectation, in units of the bound, and the ratio of the two.

    Sums of chi-square variables use the cube root of Wilson and Hilferty, accurate far into both tails. For Student's t,
    q / (q + D) with q = |noise|^2 is a beta variable; its sum over the rows is matched to a chi-square in two moments.
    """
    wide = wide_dtype(square.device)
    count, repeats = rows.sum().clamp(min=1).to(wide), repeats.clamp(min=1).to(wide)
    if isinstance(kernel, StudentTKernel):
        a, b = d / 2, kernel.dof / 2
        share = square / (square + kernel.dof)
        # The part with the smaller mean resembles a chi-square variable.
        value, mean = (share, a / (a + b)) if a < b else (torch.where(rows, 1 - share, 0), b / (a + b))
        variance = a * b / ((a + b) ** 2 * (a + b + 1))
        freedom = count * (2 * mean**2 / variance)
        ratio = value.sum(dtype=wide) / (count * mean)
    elif isinstance(kernel, GaussianKernel):
        freedom = count * d
        ratio = square.sum(dtype=wide) / freedom
    else:
        return None
    width = 2 / (9 * freedom / repeats)
    spreads = (ratio.clamp(min=0) ** (1 / 3) - (1 - width)) / width.sqrt()
    deviation = torch.minimum(spreads.abs() / _SPREADS, (ratio - 1).abs() / _SLACK)
    return torch.where(rows.any(), deviation, 0), ratio


def _residual_message(process: Process, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, row: int) -> str:
    clean, noisy, drawn = (value[row].double() for value in (x0, x_t, noise))

    def left(time: Tensor) -> float:
        alpha, sigma = process.alpha(time).double(), process.sigma(time).double()
        size = torch.hypot((alpha * clean).norm(), (sigma * drawn).norm())
        return float((noisy - alpha * clean - sigma * drawn).norm() / size)

    time = t[row : row + 1]
    message = (
        f"x_t[{row}] is not alpha x0 + sigma noise of {process} at t[{row}] = {time.item():g}: they differ by "
        f"{left(time):.2g} of its size."
    )
    ends = {1.0, sum(process.time_range)}
    for end in sorted(end for end in ends if bool(process.has_time(end - time).all())):
        if left(end - time) < 0.01:
            return f"{message} They agree at {end:g} - t: pass that, since time grows with noise here."
    return (
        f"{message} Pass the noise that made x_t, the rows of x0 in the same order, and times of this process; compute the "
        "schedule in float32."
    )


_CHOSEN = "For x_t that you choose yourself pass StableTarget(..., validate_args=False)."


def _law_message(process: Process, t: Tensor, ratio: float) -> str:
    return (
        f"x_t is not what {process} makes of x0 at t from {t.min().item():g} to {t.max().item():g}: the noise in it has "
        f"{ratio:.3g} times the expected variance. Check that t grows with noise and has the units of this process, and "
        f"that nothing else was added, such as offset noise or input perturbation. {_CHOSEN}"
    )


def _offset_message(ratio: float) -> str:
    return (
        f"the noise in x_t is not white: its means over the channels have {ratio:.3g} times the expected variance, as with "
        "offset noise. Call the target with the x_t before the offset, and compute the regression target from its x0. "
        f"{_CHOSEN}"
    )


def _shared_message(ratio: float) -> str:
    return (
        f"the noise in x_t is not white: its means over the first axis of the rows have {ratio:.3g} times the expected "
        "variance, as with noise that video frames, tokens or channels share. Draw independent noise for each, or keep your "
        f"single-sample target. {_CHOSEN}"
    )


def _ratio_message(message: Callable[[float], str], ratio: Tensor, _: int) -> str:
    return message(float(ratio))


def _pairing_message(spreads: float) -> str:
    return (
        f"the noise in x_t is not independent of x0: their correlation is {spreads:.3g} standard errors from 0. It was "
        "assigned to the data, as by optimal transport or immiscible diffusion, which changes the posterior. Draw "
        f"independent noise, or keep your single-sample target. {_CHOSEN}"
    )
