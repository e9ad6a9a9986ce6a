import pytest
import torch

from stablefield.evaluation._features import checked, checked_pair
from stablefield.evaluation._fid import frechet_distance_from_features


def test_the_first_row_with_nan_is_named() -> None:
    x = torch.zeros(6, 3)
    x[4, 1], x[5, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="b holds NaN or infinite numbers in 2 of 6 rows, the first is row 4"):
        frechet_distance_from_features(torch.zeros(6, 3), x)


def test_too_few_rows_say_how_many_are_needed_and_why() -> None:
    with pytest.raises(ValueError, match="a has 1 rows, but at least 2 are needed, because one row has no covariance"):
        frechet_distance_from_features(torch.zeros(1, 3), torch.zeros(6, 3))


def test_feature_dimensions_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 3 features per row, b has 4: take both from the same extractor"):
        checked_pair(("a", "b"), torch.zeros(5, 3), torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (torch.zeros(5), r"x has shape \(5,\)"),
        (torch.zeros(5, 0), r"x has shape \(5, 0\)"),
        (torch.zeros(5, 3, dtype=torch.uint8), "x has dtype torch.uint8"),
    ],
)
def test_other_arrays_than_rows_of_floats_are_refused(features: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        checked("x", features)
