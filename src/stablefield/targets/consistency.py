r"""Consistency: whether x_t is what the process makes of x0, t and the noise.

A posterior is only as right as its model of the noise. A loop whose time runs the other way, which counts steps where the
process wants times in [0, 1], or which hands over the noise of another draw, gets a target that is off by more than its own
size, and no loss curve shows it. Three things can be known of a batch without knowing its data:

- With the noise at hand, $x_t - \alpha x_0 - \sigma \varepsilon$ is zero up to rounding, in every row.
- Without it, $|x_t - \alpha x_0|^2 / \sigma^2$ is chi-square with d degrees of freedom in every row (for Student's t with D
  degrees of freedom, d times an F variable), so its sum over the batch has a known spread.
- The direction of the noise is uniform and independent of the data, so $\sqrt{d}$ times the cosine between the noise and
  the row's own deviation from the batch's mean has mean 0 and variance 1. Noise that was assigned to the data, as by optimal
  transport, is closer to them.

The bounds are so wide that noise drawn as it should be does not meet them in any run: 12 standard deviations. (Batches with
antithetic noise, in which up to four rows share a norm, have up to twice the spread, which leaves 6.)
"""

import math

import torch
from torch import Tensor

from stablefield.diffusion.process import Process
from stablefield.targets.check import Check, finite_check, value_check
from stablefield.targets.kernel import GaussianKernel, Kernel, StudentTKernel

__all__ = ["consistency_checks"]

# Standard deviations beyond which the noise is not what the process makes.
_SPREADS = 12.0
# Departure of the mean square from 1 that is not complained of, however large the batch.
_SLACK = 0.01
# Relative residual of x_t that is rounding, in float32 and in ulps of shorter formats.
_RESIDUAL, _RESIDUAL_ULPS = 1e-3, 4
# Rows whose noise is below this many ulps of x_t are made of rounding in part.
_ULPS = 32


def consistency_checks(
    process: Process,
    kernel: Kernel,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    alone: Tensor | None = None,
) -> list[Check]:
    """What x_t, t and the noise must meet, to be looked at together.

    Args:
        process: what is said to have made x_t.
        kernel: the noise kernel; the law of kernels other than this library's is not checked.
        x0: clean samples, shape (B, ...).
        x_t: noisy samples, shape (B, ...).
        t: times, shape (B,).
        alpha: scale of the data at these times, shape (B,).
        sigma: scale of the noise at these times, shape (B,).
        noise: the noise in x_t, shape (B, ...), or None.
        alone: rows that use their source alone, bool (B,), or None: they need not be finite.
    """
    low, high = process.time_range
    rule = f"the times of {process} run from {low:g} to {high:g}; pass times of this process"
    checks = [value_check(process.has_time(t), "t", t, rule)]
    dtype = torch.promote_types(torch.promote_types(x0.dtype, x_t.dtype), torch.float32)
    clean, noisy = x0.flatten(1).to(dtype), x_t.flatten(1).to(dtype)
    alpha, sigma = alpha.to(dtype), sigma.to(dtype)
    residual = torch.addcmul(noisy, alpha[:, None], clean, value=-1)
    square = torch.linalg.vector_norm(residual, dim=1).square()
    clean_norm = torch.linalg.vector_norm(clean, dim=1)
    finite = clean_norm.isfinite()
    checks.append(finite_check(clean_norm if alone is None else clean_norm.masked_fill(alone, 0), "x0"))
    checks.append(finite_check(torch.where(finite if alone is None else finite & ~alone, square, 0), "x_t"))
    eps = max(torch.finfo(value.dtype).eps for value in (x0, x_t))
    d = clean.shape[1]
    if noise is None:
        # The noise of rows with hardly any is lost in the rounding of x_t.
        size = torch.linalg.vector_norm(noisy, dim=1)
        usable = sigma * math.sqrt(d) > _ULPS * eps * torch.maximum(size, alpha.abs() * clean_norm)
        drawn, drawn_square = residual, square / sigma.square()
    else:
        drawn = noise.flatten(1).to(dtype)
        drawn_norm = torch.linalg.vector_norm(drawn, dim=1)
        drawn_square = drawn_norm.square()
        usable = torch.ones_like(finite)
        checks.append(finite_check(drawn_square if alone is None else drawn_square.masked_fill(alone, 0), "noise"))
        eps = max(eps, torch.finfo(noise.dtype).eps) if noise.is_floating_point() else eps
        left = torch.linalg.vector_norm(torch.addcmul(residual, sigma[:, None], drawn, value=-1), dim=1)
        parts = torch.hypot(alpha * clean_norm, sigma * drawn_norm)
        # Written such that nan passes: what is not finite is told above.
        broken = left > max(_RESIDUAL, _RESIDUAL_ULPS * eps) * parts
        checks.append(Check(~broken, lambda row: _residual_message(process, x0, x_t, t, noise, row)))
    usable = usable & drawn_square.isfinite() & finite
    if alone is not None:
        clean = torch.where(finite[:, None], clean, 0)
    law = _law(kernel, torch.where(usable, drawn_square, 0), usable, d)
    if law is not None:
        excess, mean = law
        checks.append(Check(~(excess > 1).reshape(1), lambda _: _law_message(process, t, float(mean))))
    own = clean - clean.mean(0)
    norms = torch.linalg.vector_norm(own, dim=1) * torch.linalg.vector_norm(drawn, dim=1)
    told = usable & (norms > 0)
    cosine = torch.where(told, torch.linalg.vecdot(own, drawn) / norms.clamp(min=torch.finfo(dtype).tiny), 0)
    along = cosine.sum() * math.sqrt(d) / told.sum().clamp(min=1).sqrt()
    checks.append(Check(~(along.abs() > _SPREADS).reshape(1), lambda _: _pairing_message(float(along))))
    return checks


def _law(kernel: Kernel, square: Tensor, rows: Tensor, d: int) -> tuple[Tensor, Tensor] | None:
    """How far the mean of |noise|^2 is from what it should be, in units of the bound, and that mean over the right one.

    Sums of chi-square variables by the cube root of Wilson and Hilferty (1931), good far out in both tails; for Student's t
    q / (q + D) with q = |noise|^2 is a beta variable, whose sum over the rows is matched to a chi-square in two moments.
    """
    count = rows.sum().double() if square.device.type != "mps" else rows.sum().float()
    count = count.clamp(min=1)
    if isinstance(kernel, StudentTKernel):
        a, b = d / 2, kernel.dof / 2
        share = square / (square + kernel.dof)
        # The part with the smaller mean is the one that resembles a chi-square variable.
        value, mean = (share, a / (a + b)) if a < b else (torch.where(rows, 1 - share, 0), b / (a + b))
        variance = a * b / ((a + b) ** 2 * (a + b + 1))
        freedom = count * (2 * mean**2 / variance)
        ratio = value.sum(dtype=count.dtype) / (count * mean)
    elif isinstance(kernel, GaussianKernel):
        freedom = count * d
        ratio = square.sum(dtype=count.dtype) / freedom
    else:
        return None
    width = 2 / (9 * freedom)
    spreads = (ratio.clamp(min=0) ** (1 / 3) - (1 - width)) / width.sqrt()
    excess = torch.minimum(spreads.abs() / _SPREADS, (ratio - 1).abs() / _SLACK)
    return torch.where(rows.any(), excess, 0), ratio


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
    return f"{message} Pass the noise that made x_t, the rows of x0 in the same order, and times of this process."


def _law_message(process: Process, t: Tensor, ratio: float) -> str:
    return (
        f"x_t is not what {process} makes of x0 at t from {t.min().item():g} to {t.max().item():g}: the noise in it has "
        f"{ratio:.3g} times the variance that it should have. Check that t grows with noise, has the units of this "
        "process, and that nothing else was added (offset noise, input perturbation). For x_t that you choose yourself "
        "pass StableTarget(..., validate_args=False)."
    )


def _pairing_message(along: float) -> str:
    return (
        f"the noise in x_t is not independent of x0 (correlation {along:.3g} standard errors from 0): it was assigned to "
        "the data, as by optimal transport or immiscible diffusion, and the posterior is another one. Draw independent "
        "noise, or keep your single-sample target."
    )
