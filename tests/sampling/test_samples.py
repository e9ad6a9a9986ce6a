"""Claims on images of seeds: the same whatever the batch, the neighbours asked for and the share of a process."""

import pytest
import torch
from torch import Tensor

import stablefield.sampling as sampling
from stablefield.sampling._samples import BLOCK, Chunk, Drawing, chunks_of, to_uint8

SHAPE = (1, 2, 2)
SIGMAS = torch.tensor([20.0, 5.0, 1.0, 0.2, 0.0], dtype=torch.float64)
SOLVERS = {
    "heun with churn": lambda d, x, noise: sampling.heun(d, x, SIGMAS, s_churn=2.0, noise=noise),
    "ancestral": lambda d, x, noise: sampling.ancestral(d, x, SIGMAS, noise=noise),
    "dpmpp_2m_sde": lambda d, x, noise: sampling.dpmpp_2m_sde(d, x, SIGMAS, noise=noise),
    "predictor_corrector": lambda d, x, noise: sampling.predictor_corrector(
        d, x, SIGMAS, average_norms=False, noise=noise
    ),
    "rk45": lambda d, x, _: sampling.rk45(d, x, SIGMAS, rtol=1e-2, atol=1e-2),
}


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Two grey levels, whose posterior mean is a hyperbolic tangent: nonlinear, and each pixel on its own."""
    return 0.6 * torch.tanh(0.6 * x / sigma.reshape(-1, 1, 1, 1) ** 2)


def images(name: str, seeds: list[int], batch: int) -> dict[int, Tensor]:
    drawing = Drawing(lambda _: denoiser, SOLVERS[name], shape=SHAPE, sigma_max=20.0)
    chunks = chunks_of(seeds, batch, coupled=name == "rk45")
    return {seed: image for chunk in chunks for seed, image in zip(chunk.wanted, drawing(chunk), strict=True)}


@pytest.mark.parametrize("name", SOLVERS)
def test_image_k_is_the_same_whatever_the_batch_and_the_other_seeds(name):
    whole = images(name, list(range(40)), 16)
    assert list(whole) == list(range(40))
    assert len({tuple(image.flatten().tolist()) for image in whole.values()}) > 5
    for seeds, batch in ((list(range(40)), 7), ([33, 5, 38], 2), ([5], 1)):
        for seed, image in images(name, seeds, batch).items():
            assert torch.equal(image, whole[seed]), (seed, batch)


def test_one_step_size_for_a_batch_would_tie_rows_to_their_neighbours():
    """What the blocks are for: at this tolerance, rows solved alone are others, in the last digits at least."""
    noise = sampling.SampleNoise(range(8))
    x = 20 * noise.latents(SHAPE, dtype=torch.float64)
    together = SOLVERS["rk45"](denoiser, x, noise)
    source_only = torch.cat([SOLVERS["rk45"](denoiser, row[None], noise) for row in x])
    assert 1e-6 < (together - source_only).abs().max() < 0.1


def test_a_seed_of_a_coupled_solver_always_has_the_same_neighbours():
    chunks = chunks_of([70, 3, 65, 0], batch=1, coupled=True)
    assert chunks == [Chunk(tuple(range(64, 96)), (6, 1)), Chunk(tuple(range(32)), (3, 0))]
    assert [chunk.wanted for chunk in chunks] == [(70, 65), (3, 0)]
    assert 2**32 % BLOCK == 0  # the last block holds no seed that is none


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_chunks_hold_every_seed_once(batch):
    seeds = [9, 2, 7, 5, 11, 0, 3]
    chunks = chunks_of(seeds, batch)
    assert [seed for chunk in chunks for seed in chunk.wanted] == seeds
    assert max(len(chunk.seeds) for chunk in chunks) == min(batch, len(seeds))


@pytest.mark.parametrize("name", ["ancestral", "rk45"])
def test_images_come_in_the_order_of_their_seeds(name):
    seeds = [33, 2, 64, 0]
    drawing = Drawing(lambda _: denoiser, SOLVERS[name], shape=SHAPE, sigma_max=20.0)
    got = drawing.images(seeds, 3, coupled=name == "rk45")
    one_by_one = images(name, seeds, 1)
    assert torch.equal(got, torch.stack([one_by_one[seed] for seed in seeds]))


def test_evaluations_are_counted_per_image_and_the_progress_hears_of_each():
    levels: list[float] = []
    drawing = Drawing(lambda _: denoiser, SOLVERS["ancestral"], shape=SHAPE, sigma_max=20.0, progress=levels.append)
    assert drawing.nfe == 0
    for chunk in chunks_of(range(6), 4):
        drawing(chunk)
    assert (drawing.nfe, drawing.evaluations, drawing.chunks) == (4.0, 8, 2)
    assert levels == [20.0, 5.0, 1.0, 0.2] * 2


def test_heun_at_18_steps_evaluates_the_network_35_times():
    grid = sampling.edm_sigmas(18)
    drawing = Drawing(lambda _: denoiser, lambda d, x, _: sampling.heun(d, x, grid), shape=SHAPE, sigma_max=80.0)
    drawing(chunks_of([0], 1)[0])
    assert drawing.nfe == 35


def test_a_guided_image_counts_both_networks_and_has_the_class_of_its_seed():
    asked: list[list[int]] = []

    def conditional(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        asked.append(class_labels.tolist())
        return denoiser(x, sigma) * (class_labels.reshape(-1, 1, 1, 1) >= 0)

    drawing = Drawing(
        lambda seeds: sampling.classifier_free(conditional, seeds % 3, 2.0),
        lambda d, x, _: sampling.euler(d, x, SIGMAS),
        shape=SHAPE,
        sigma_max=20.0,
    )
    drawing(chunks_of([4, 9, 2], 3)[0])
    assert drawing.nfe == 8
    assert asked[:2] == [[1, 0, 2], [-1, -1, -1]]


def test_8_bit_values_are_clipped_and_rounded_to_the_nearest():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5 / 127.5 - 1 + 1e-6, 1.0, 2.0], dtype=torch.float64)
    assert to_uint8(x).tolist() == [0, 0, 128, 1, 255, 255]


@pytest.mark.parametrize(("seeds", "batch"), [([], 4), ([1, 1], 4), ([1], 0)])
def test_nonsense_is_refused(seeds, batch):
    with pytest.raises(ValueError, match=r"seeds holds|batch=0"):
        chunks_of(seeds, batch)
