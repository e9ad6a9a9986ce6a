r"""The predictor-corrector sampler of Song et al. (2021), for VE and VP.

A predictor steps the reverse SDE from one noise level to the next; there a corrector, annealed Langevin dynamics, moves
the state towards the marginal of that level:

$$ y \leftarrow y + \epsilon\, s(y) + \sqrt{2 \epsilon}\, z, \qquad \epsilon = 2 a\, (r \|z\| / \|s\|)^2, $$

with the signal-to-noise ratio r, and a = 1 (VE) or 1 - beta (VP). Both norms are means over the batch, as in the paper. With
each row's own norm, the step would depend on the state at its start, and such Langevin dynamics has another stationary law:
for small steps, the second moment of a normal state in d dimensions is (d + 2) / d times too large.

Input and output are in noise-to-signal units, as everywhere. For VP the steps themselves act on the scaled state of the
paper, $y = \alpha x$ with $\alpha = 1 / \sqrt{1 + \sigma^2}$, whose score is $s = (\alpha D - y) / (\alpha \sigma)^2$.
With $\beta = 1 - \alpha^2 / \alpha'^2$ for a step from $\alpha$ to $\alpha'$, and v for sigma^2, the predictors are

    VE  reverse diffusion   y + (v - v') s + sqrt(v - v') z
    VE  ancestral           y + (v - v') s + sqrt(v' (v - v') / v) z
    VP  reverse diffusion   (2 - sqrt(1 - beta)) y + beta s + sqrt(beta) z
    VP  ancestral           (y + beta s) / sqrt(1 - beta) + sqrt(beta) z

A step to sigma 0 returns the denoiser's output, without noise and without a corrector.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stablefield._shapes import check_kind, flag, number, per_row, whole_number
from stablefield.sampling._noise import Noise, normal_source
from stablefield.sampling._solver_loop import Callback, Denoise, start

__all__ = ["predictor_corrector"]


@torch.no_grad()
def predictor_corrector(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    process: Literal["ve", "vp"] = "ve",
    predictor: Literal["reverse_diffusion", "ancestral"] = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    average_norms: bool = True,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Predictor-corrector sampling: 1 + `corrector_steps` evaluations a step, 1 for a step to 0.

    By default both norms' means over the batch set the Langevin step, as the authors do. That is right in any number of
    dimensions, for a batch of some hundred rows (fewer in many dimensions), but a sample depends on its batch. With
    `average_norms=False` the norm of each row's own score and sqrt(d) set the step, which the authors advise for small
    batches. A sample then does not depend on its batch, but the step varies with the state: the
    variance of normal data comes out (d + 2) / d times too large, or more (about 5 times in 2 dimensions, 1.08 in 32, 1.001
    in 3,072).

    Args:
        denoiser: D(x, sigma), in noise-to-signal units for both processes.
        x: state at `sigmas[0]`, shape (B, ...), float32 or float64; for VP as well x_t / alpha.
        sigmas: noise levels sigma / alpha, shape (N + 1,), strictly decreasing, a last 0 or not (`ve_sigmas`,
            `vp_sigmas`).
        process: the process whose state the steps act on.
        predictor: the rule from one noise level to the next.
        corrector_steps: Langevin steps at every new noise level; 0 is the predictor alone.
        snr: r, the signal-to-noise ratio of a Langevin step; 0.16 for 32x32 images.
        average_norms: take both norms' means over the batch; if False, each row's own score and sqrt(d).
        noise: source of the noise, such as `SampleNoise`.
        generator: a generator instead of `noise`.
        callback: called before every step with its number, the state and the denoiser's output.

    Returns:
        The state at `sigmas[-1]`, like `x`, in noise-to-signal units.

    Raises:
        ValueError: if an argument is unusable, or the denoiser's output has another shape than `x` or is not finite.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic
        Differential Equations", ICLR 2021, algorithms 2 to 5 and appendices E to G. 1 - beta is that of the step just made;
        the paper uses the next step's.
    """
    loop = start("predictor_corrector", denoiser, x, sigmas, callback)
    draw = normal_source(noise, generator)
    check_kind("predictor_corrector: process", process, str, "'ve' or 'vp'")
    check_kind("predictor_corrector: predictor", predictor, str, "'reverse_diffusion' or 'ancestral'")
    number("predictor_corrector: snr", snr)
    whole_number("predictor_corrector: corrector_steps", corrector_steps)
    flag("predictor_corrector: average_norms", average_norms)
    space = _space(process)
    predict = _predictor(space, predictor)
    if corrector_steps < 0 or not 0 < snr < math.inf:
        raise ValueError(
            f"predictor_corrector: corrector_steps={corrector_steps}, snr={snr}: pass steps of at least 0 "
            "and a positive ratio."
        )
    y = space.alpha(loop.levels[0]) * x
    for step, sigma, sigma_next in loop.steps():
        x = y / space.alpha(sigma)
        denoised = loop.denoise(x, sigma)
        loop.report(step, x, denoised)
        if sigma_next == 0:
            return denoised
        y = predict(_Step(y, space.score(y, denoised, sigma), draw(y), sigma, sigma_next))
        alpha = space.alpha(sigma_next)
        for _ in range(corrector_steps):
            score = space.score(y, loop.denoise(y / alpha, sigma_next), sigma_next)
            y = _langevin(y, score, draw(y), snr, space.damping(sigma, sigma_next), average_norms)
    return loop.arrive(y / space.alpha(loop.levels[-1]))


@dataclass(frozen=True)
class _Step:
    """A predictor's step: the state, its score, noise, and the noise levels at its start and end."""

    y: Tensor
    score: Tensor
    z: Tensor
    sigma: float
    sigma_next: float

    @property
    def drop(self) -> float:
        """Decrease of sigma^2, as a product: it does not cancel on fine grids."""
        return (self.sigma - self.sigma_next) * (self.sigma + self.sigma_next)


class _Space(ABC):
    """The state that a process's steps act on, y = alpha x."""

    @abstractmethod
    def alpha(self, sigma: float) -> float:
        """Scale of the state at a noise level."""

    @abstractmethod
    def damping(self, sigma: float, sigma_next: float) -> float:
        """Factor on the Langevin step."""

    @abstractmethod
    def reverse_diffusion(self, step: _Step) -> Tensor:
        """Song et al. 2021, appendix E."""

    @abstractmethod
    def ancestral(self, step: _Step) -> Tensor:
        """Song et al. 2021, appendix F."""

    def score(self, y: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        """Gradient of the log density of y."""
        alpha = self.alpha(sigma)
        return (alpha * denoised - y) / (alpha * sigma) ** 2


class _VE(_Space):
    def alpha(self, sigma: float) -> float:  # noqa: ARG002
        return 1.0

    def damping(self, sigma: float, sigma_next: float) -> float:  # noqa: ARG002
        return 1.0

    def reverse_diffusion(self, step: _Step) -> Tensor:
        return step.y + step.drop * step.score + math.sqrt(step.drop) * step.z

    def ancestral(self, step: _Step) -> Tensor:
        return step.y + step.drop * step.score + math.sqrt(step.drop) * (step.sigma_next / step.sigma) * step.z


class _VP(_Space):
    def alpha(self, sigma: float) -> float:
        return 1 / math.hypot(1.0, sigma)

    def damping(self, sigma: float, sigma_next: float) -> float:
        return (self.alpha(sigma) / self.alpha(sigma_next)) ** 2

    def _beta(self, step: _Step) -> float:
        return step.drop * self.alpha(step.sigma) ** 2

    def reverse_diffusion(self, step: _Step) -> Tensor:
        beta = self._beta(step)
        return (2 - math.sqrt(1 - beta)) * step.y + beta * step.score + math.sqrt(beta) * step.z

    def ancestral(self, step: _Step) -> Tensor:
        beta = self._beta(step)
        return (step.y + beta * step.score) / math.sqrt(1 - beta) + math.sqrt(beta) * step.z


def _space(process: str) -> _Space:
    if process == "ve":
        return _VE()
    if process == "vp":
        return _VP()
    raise ValueError(f"predictor_corrector: process={process!r}: pass 've' or 'vp'.")


def _predictor(space: _Space, predictor: str) -> Callable[[_Step], Tensor]:
    if predictor == "reverse_diffusion":
        return space.reverse_diffusion
    if predictor == "ancestral":
        return space.ancestral
    raise ValueError(f"predictor_corrector: predictor={predictor!r}: pass 'reverse_diffusion' or 'ancestral'.")


def _langevin(y: Tensor, score: Tensor, z: Tensor, snr: float, damping: float, average_norms: bool) -> Tensor:
    score_norm = score.flatten(1).norm(dim=1)
    noise_norm = torch.full_like(score_norm, math.sqrt(z[0].numel()))
    if average_norms:
        score_norm = score_norm.mean().expand_as(score_norm)
        noise_norm = z.flatten(1).norm(dim=1).mean().expand_as(score_norm)
    size = 2 * damping * (snr * noise_norm / score_norm) ** 2
    # A score of exactly 0 sets no scale: such a row does not move.
    size = per_row(torch.where(score_norm > 0, size, torch.zeros_like(size)), y)
    return y + size * score + torch.sqrt(2 * size) * z
