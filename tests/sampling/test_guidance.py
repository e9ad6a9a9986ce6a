"""Claims on guidance and on counting, held against the mixture's closed form."""

import math

import pytest
import torch
from torch import Tensor

import stablefield.sampling as sampling


class Classes:
    """The mixture's denoiser given the mode: label -1 is the whole mixture, label k its k-th normal."""

    def __init__(self, mixture) -> None:
        self.mixture = mixture
        self.rows = 0

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        self.rows += 1
        k = class_labels.clamp_min(0)
        scale, mean = self.mixture.scales[k][:, None], self.mixture.means[k]
        given = mean + scale**2 / (scale**2 + sigma[:, None] ** 2) * (x - mean)
        return torch.where(class_labels[:, None] < 0, self.mixture(x, sigma), given)


LABELS = torch.tensor([0, 2, 1, 0])


def points(generator: torch.Generator, level: float = 0.8) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 2, generator=generator, dtype=torch.float64), torch.full((4,), level, dtype=torch.float64)


def test_scale_1_is_the_plain_conditional_denoiser_bit_for_bit(mixture, generator):
    denoiser = Classes(mixture)
    x, sigma = points(generator)
    guided = sampling.classifier_free(denoiser, LABELS, 1.0)
    assert torch.equal(guided(x, sigma), denoiser(x, sigma, LABELS))
    assert guided.nfe == 1
    start, grid = 80 * x, sampling.edm_sigmas(6)
    plain = sampling.heun(lambda x, sigma: denoiser(x, sigma, LABELS), start, grid)
    assert torch.equal(sampling.heun(guided, start, grid), plain)


def test_classifier_free_guidance_is_the_score_of_the_sharpened_posterior(mixture, generator):
    """s = grad log p(x) + w grad log p(k | x), the second by finite differences of the mixture's own log densities."""
    x, sigma = points(generator)
    w, h = 2.5, 1e-5
    variance = mixture.scales**2 + sigma[0] ** 2

    def log_posterior(x: Tensor) -> Tensor:
        gap = (x[:, None] - mixture.means).square().sum(-1)
        log = mixture.weights.log() - gap / (2 * variance) - torch.log(variance)
        return log.log_softmax(1)[torch.arange(4), LABELS]

    offsets = h * torch.eye(2, dtype=torch.float64)
    classifier = torch.stack([(log_posterior(x + o) - log_posterior(x - o)) / (2 * h) for o in offsets], 1)
    marginal = torch.stack(
        [(mixture.log_prob(x + o, 0.8) - mixture.log_prob(x - o, 0.8)) / (2 * h) for o in offsets], 1
    )
    expected = x + sigma[:, None] ** 2 * (marginal + w * classifier)
    guided = sampling.classifier_free(Classes(mixture), LABELS, w)
    torch.testing.assert_close(guided(x, sigma), expected, rtol=0, atol=1e-8)
    assert guided.nfe == 2


def test_scale_0_is_the_unconditional_denoiser(mixture, generator):
    x, sigma = points(generator)
    torch.testing.assert_close(
        sampling.classifier_free(Classes(mixture), LABELS, 0.0)(x, sigma), mixture(x, sigma), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(("level", "inside"), [(0.3, False), (0.301, True), (0.8, True), (2.0, True), (2.001, False)])
def test_outside_the_interval_the_second_network_is_not_called(level, inside, mixture, generator):
    denoiser = Classes(mixture)
    x, sigma = points(generator, level)
    guided = sampling.classifier_free(denoiser, LABELS, 3.0, (0.3, 2.0))
    everywhere = sampling.classifier_free(denoiser, LABELS, 3.0)
    assert torch.equal(guided(x, sigma), everywhere(x, sigma) if inside else denoiser(x, sigma, LABELS))
    assert guided.nfe == (2 if inside else 1)


def test_rows_of_one_batch_may_lie_on_both_sides_of_the_interval(mixture, generator):
    denoiser = Classes(mixture)
    x, sigma = torch.randn(4, 2, generator=generator, dtype=torch.float64), torch.tensor([0.1, 0.8, 5.0, 1.0]).double()
    got = sampling.classifier_free(denoiser, LABELS, 3.0, (0.3, 2.0))(x, sigma)
    conditional, guided = denoiser(x, sigma, LABELS), sampling.classifier_free(denoiser, LABELS, 3.0)(x, sigma)
    assert torch.equal(got[[0, 2]], conditional[[0, 2]])
    assert torch.equal(got[[1, 3]], guided[[1, 3]])


def test_autoguidance_extrapolates_from_the_guide_through_the_denoiser(mixture, normal, generator):
    x, sigma = points(generator)
    guided = sampling.autoguidance(mixture, normal, 1.7)
    torch.testing.assert_close(guided(x, sigma), 1.7 * mixture(x, sigma) - 0.7 * normal(x, sigma))
    assert guided.nfe == 2
    assert torch.equal(sampling.autoguidance(mixture, normal, 1.0)(x, sigma), mixture(x, sigma))
    labelled = sampling.autoguidance(Classes(mixture), Classes(normal), 2.0, class_labels=torch.zeros_like(LABELS))
    expected = 2 * Classes(mixture)(x, sigma, torch.zeros_like(LABELS)) - normal(x, sigma)
    torch.testing.assert_close(labelled(x, sigma), expected)


@pytest.mark.parametrize("outside", [True, False])
def test_the_count_is_of_network_calls_wherever_the_counter_stands(outside, mixture, generator):
    denoiser = Classes(mixture)
    grid = torch.tensor([8.0, 2.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    x = 8 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    if outside:
        counter = sampling.counted(sampling.classifier_free(denoiser, LABELS, 2.0, (0.5, 2.0)))
        sampling.euler(counter, x, grid)
    else:
        counter = sampling.counted(denoiser)
        sampling.euler(sampling.classifier_free(counter, LABELS, 2.0, (0.5, 2.0)), x, grid)
    assert counter.nfe == denoiser.rows == 6


def test_counting_changes_nothing_and_can_start_again(mixture, generator):
    x, sigma = points(generator)
    counter = sampling.counted(sampling.counted(mixture))
    assert torch.equal(counter(x, sigma), mixture(x, sigma))
    assert counter.nfe == 1
    counter.nfe = 0
    counter(x, sigma)
    assert counter.nfe == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d: sampling.classifier_free(d, LABELS.double(), 2.0),
            "class_labels has shape .4,. and dtype torch.float64",
        ),
        (lambda d: sampling.classifier_free(d, LABELS[:, None], 2.0), "class_labels has shape"),
        (lambda d: sampling.classifier_free(d, LABELS, math.nan), "scale=nan"),
        (lambda d: sampling.classifier_free(d, LABELS, 2.0, (1.0, 1.0)), "interval="),
        (lambda d: sampling.classifier_free(d, LABELS[:3], 2.0)(torch.zeros(4, 2), torch.ones(4)), "3 rows, x has 4"),
        (
            lambda d: sampling.classifier_free(d, LABELS, 2.0)(torch.zeros(4, 2), torch.ones(4), LABELS),
            "labels already",
        ),
    ],
)
def test_nonsense_is_refused_by_name(call, message, mixture):
    with pytest.raises(ValueError, match=message):
        call(Classes(mixture))
