"""Claims on images of seeds: the same whatever the batch, the neighbours asked for and the share of a process."""

import pytest
import torch
from torch import Tensor

import stablefield.sampling as sampling
from stablefield.sampling._seeded_images import BLOCK, Chunk, chunks_of, draw, to_uint8
from stablefield.sampling._solvers import SOLVERS, SolverOptions

SHAPE = (1, 2, 2)
SIGMAS = torch.tensor([20.0, 5.0, 1.0, 0.2, 0.0], dtype=torch.float64)
OPTIONS = {name: SolverOptions(sampler=name) for name in SOLVERS} | {
    "heun with churn": SolverOptions(churn=2.0),
    "rk45": SolverOptions(sampler="rk45", rtol=1e-2, atol=1e-2),
}


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Two grey levels, whose posterior mean is a hyperbolic tangent: nonlinear, and each pixel on its own."""
    return 0.6 * torch.tanh(0.6 * x / sigma.reshape(-1, 1, 1, 1) ** 2)


def images(name: str, seeds: list[int], batch: int) -> dict[int, Tensor]:
    chunks = chunks_of(seeds, batch, coupled=name == "rk45")
    parts = draw(lambda _: denoiser, OPTIONS[name], SIGMAS, chunks, shape=SHAPE)
    return {seed: image for seeds, images, _ in parts for seed, image in zip(seeds, images, strict=True)}


@pytest.mark.parametrize("name", OPTIONS)
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
    options = OPTIONS["rk45"]
    together, *source_only = (options.solve(noise)(denoiser, rows, SIGMAS) for rows in (x, *x.split(1)))
    source_only = torch.cat(source_only)
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


def test_evaluations_are_counted_for_each_chunk_and_the_progress_hears_of_each():
    heard: list[tuple[float, int]] = []
    parts = draw(
        lambda _: denoiser,
        OPTIONS["ancestral"],
        SIGMAS,
        chunks_of(range(6), 4),
        shape=SHAPE,
        progress=lambda *it: heard.append(it),
    )
    assert [(seeds, len(images), evaluations) for seeds, images, evaluations in parts] == [
        ((0, 1, 2, 3), 4, 4),
        ((4, 5), 2, 4),
    ]
    assert heard == [(done, 6) for done in (0, 1, 2, 3, 4, 4.5, 5, 5.5)]


@pytest.mark.parametrize("name", SOLVERS)
def test_the_table_says_how_often_a_solver_calls_the_denoiser(name):
    options = SolverOptions(sampler=name, steps=None if name == "rk45" else 5)
    ((_, _, evaluations),) = draw(lambda _: denoiser, options, options.sigmas(), chunks_of([0], 1), shape=SHAPE)
    if name == "rk45":
        assert options.calls / 3 < evaluations < 3 * options.calls
    else:
        # The corrector leaves out the step to 0.
        assert options.calls - options.corrector_steps <= evaluations <= options.calls


def test_heun_at_18_steps_evaluates_the_network_35_times():
    options = SolverOptions()
    ((_, _, evaluations),) = draw(lambda _: denoiser, options, options.sigmas(), chunks_of([0], 1), shape=SHAPE)
    assert evaluations == options.calls == 35


def test_a_guided_image_counts_both_networks_and_has_the_class_of_its_seed():
    asked: list[list[int]] = []

    def conditional(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        asked.append(class_labels.tolist())
        return denoiser(x, sigma) * (class_labels.reshape(-1, 1, 1, 1) >= 0)

    ((_, _, evaluations),) = draw(
        lambda seeds: sampling.classifier_free(conditional, seeds % 3, 2.0),
        OPTIONS["euler"],
        SIGMAS,
        chunks_of([4, 9, 2], 3),
        shape=SHAPE,
    )
    assert evaluations == 8
    assert asked[:2] == [[1, 0, 2], [-1, -1, -1]]


def test_8_bit_values_are_clipped_and_rounded_to_the_nearest():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5 / 127.5 - 1 + 1e-6, 1.0, 2.0], dtype=torch.float64)
    assert to_uint8(x).tolist() == [0, 0, 128, 1, 255, 255]


@pytest.mark.parametrize(("seeds", "batch"), [([], 4), ([1, 1], 4), ([1], 0)])
def test_nonsense_is_refused(seeds, batch):
    with pytest.raises(ValueError, match=r"seeds holds|batch=0"):
        chunks_of(seeds, batch)
