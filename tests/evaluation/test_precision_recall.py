import numpy as np
import pytest
import torch

from stablefield.evaluation import _neighbours as neighbours
from stablefield.evaluation._precision_recall import coverage, density, precision, recall


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    def distance(u: np.ndarray, v: np.ndarray) -> float:
        return float(((u - v) ** 2).sum())

    def radii(points: np.ndarray) -> list[float]:
        return [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    real_radii, generated_radii = radii(real), radii(generated)
    inside_real = [[distance(x, y) < r for x, r in zip(real, real_radii, strict=True)] for y in generated]
    inside_generated = [[distance(y, x) < r for y, r in zip(generated, generated_radii, strict=True)] for x in real]
    return {
        "precision": np.mean([any(row) for row in inside_real]),
        "recall": np.mean([any(row) for row in inside_generated]),
        "density": np.mean([sum(row) / k for row in inside_real]),
        "coverage": np.mean([any(row[i] for row in inside_real) for i in range(len(real))]),
    }


def as_published(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """Naeem et al. 2020 as their package `prdc` computes it: radii to the k-th other row, and strictly less."""
    across = np.sqrt(((real[:, None] - generated) ** 2).sum(2))
    radius = [np.sort(np.sqrt(((x[:, None] - x) ** 2).sum(2)), axis=1)[:, k] for x in (real, generated)]
    return {
        "precision": (across < radius[0][:, None]).any(axis=0).mean(),
        "recall": (across < radius[1][None]).any(axis=1).mean(),
        "density": (across < radius[0][:, None]).sum(axis=0).mean() / k,
        "coverage": (across.min(axis=1) < radius[0]).mean(),
    }


SCORES = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("lattice", [False, True], ids=["generic", "ties and duplicates"])
def test_all_four_agree_with_double_loops(k: int, lattice: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(41, 3, dtype=torch.float64, generator=generator)
    generated = 1.3 * torch.randn(37, 3, dtype=torch.float64, generator=generator) + 0.4
    if lattice:
        real, generated = (2 * real).round(), (2 * generated).round()
    expected = brute_force(real.numpy(), generated.numpy(), k)
    assert 0 < expected["precision"] < 1
    for name, score in SCORES.items():
        assert score(real, generated, k) == pytest.approx(expected[name], abs=1e-12), name


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_a_set_beside_itself_has_density_1_and_all_four_are_those_of_prdc(k: int, scale: float) -> None:
    real = scale * torch.randn(200, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    found = {name: score(real, real.clone(), k) for name, score in SCORES.items()}
    assert found == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}
    assert found == pytest.approx(as_published(real.numpy(), real.numpy(), k), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_all_four_are_those_of_prdc_also_where_samples_are_copies_or_on_the_sphere(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    real = torch.randint(0, 6, (150, 3), generator=generator).double()
    copies = real[torch.randint(0, 150, (70,), generator=generator)]
    generated = torch.cat([copies, torch.randint(0, 7, (60, 3), generator=generator).double()])
    expected = as_published(real.numpy(), generated.numpy(), k)
    assert {name: score(real, generated, k) for name, score in SCORES.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_blocks_of_any_size_give_one_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, 60, 2, generator=generator)
    whole = SCORES[name](real, 0.7 * generated)
    for block in (neighbours.blocks, neighbours.others):
        monkeypatch.setattr(block, "__kwdefaults__", {"rows": 7, "columns": 11})
    assert SCORES[name](real, 0.7 * generated) == whole


def test_blocks_never_hold_more_than_they_may() -> None:
    a, b = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    sizes = [
        (squared.shape, rows, columns) for rows, columns, squared, _ in neighbours.blocks(a, b, rows=8, columns=16)
    ]
    assert len(sizes) == 7 * 4
    assert all(shape[0] <= 8 and shape[1] <= 16 for shape, _, _ in sizes)


def test_neighbours_of_any_block_size_are_those_of_all_distances() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (
        torch.randn(23, 4, dtype=torch.float64, generator=generator),
        torch.randn(31, 4, dtype=torch.float64, generator=generator),
    )
    every = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1)
    for rows, columns in ((5, 3), (100, 100), (7, 1)):
        distances, index = neighbours.nearest(a, b, 3, rows=rows, columns=columns)
        torch.testing.assert_close(distances, every.values[:, :3], rtol=0, atol=1e-12)
        assert torch.equal(index, every.indices[:, :3])
        own = torch.cdist(a, a, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values
        torch.testing.assert_close(neighbours.others(a, 4, rows=rows, columns=columns)[:, 3], own[:, 4] ** 2)


def test_far_from_the_origin_nothing_is_lost() -> None:
    generator = torch.Generator().manual_seed(3)
    real, generated = torch.randn(2, 50, 2, dtype=torch.float64, generator=generator)
    generated = 0.6 * generated + 0.5
    for score in SCORES.values():
        assert score(real + 2.0**20, generated + 2.0**20) == score(real, generated)


def test_coverage_of_a_perfect_model_is_one_less_half_to_the_k() -> None:
    generator = torch.Generator().manual_seed(4)
    values = [coverage(*torch.randn(2, 300, 2, generator=generator), k=3) for _ in range(30)]
    assert np.mean(values) == pytest.approx(1 - 2**-3, abs=0.01)


def test_dropped_modes_cost_recall_and_invented_ones_precision() -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(200, 2, generator=generator) - 20, torch.randn(200, 2, generator=generator) + 20
    half = torch.randn(200, 2, generator=generator) - 20
    both = torch.cat([left, right])
    assert recall(both, half) <= 0.5 < 0.9 < precision(both, half)
    assert precision(half, both) <= 0.5 < 0.9 < recall(half, both)
    assert coverage(both, half) <= 0.5


def test_as_many_rows_as_neighbours_are_too_few() -> None:
    with pytest.raises(
        ValueError, match="real has 3 rows, but at least 4 are needed, because every row must have 3 neigh"
    ):
        precision(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="k is 0"):
        density(torch.zeros(9, 2), torch.zeros(9, 2), k=0)
