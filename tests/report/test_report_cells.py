"""Numbers on pages: the digits that are meant, and nothing that reads as another number."""

import numpy as np
import pytest

from stablefield.report import Estimate
from stablefield.report._cells import show


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        ("0.310 %", "0.310 %"),
        (7, "7"),
        (-3, "−3"),
        (1797, "1797"),
        (50000, "50\u202f000"),
        (-1234567, "−1\u202f234\u202f567"),
        (True, "yes"),
        (np.int64(12), "12"),
        (np.float32(0.5), "0.500"),
        (0.0, "0"),
        (0.012345, "0.0123"),
        (9.999, "10.0"),
        (123.4, "123"),
        (12345.6, "12\u202f346"),
        (-0.25, "−0.250"),
        (2e-9, "2.00·10⁻⁹"),
        (-3.456e12, "−3.46·10¹²"),
        (float("inf"), "∞"),
        (float("-inf"), "−∞"),
        (float("nan"), "not a number"),
        (Estimate(0.31246, 0.0151), "0.312 ± 0.015"),
        (Estimate(0.31246, 0.0996), "0.31 ± 0.10"),
        (Estimate(-1234.5, 21.0), "−1234 ± 21"),
        (Estimate(0.5, 0.0), "0.500 ± 0"),
        (Estimate(1.5e-8, 2e-9), "1.50·10⁻⁸ ± 2.0·10⁻⁹"),
        (Estimate(float("nan"), 0.1), "not a number ± 0.10"),
    ],
)
def test_a_number_is_written_as_people_read_it(cell, text):
    assert show(cell) == text


@pytest.mark.parametrize("digits", [1, 2, 4, 6])
def test_a_float_reads_back_to_its_significant_digits(digits):
    values = np.random.default_rng(0).standard_normal(300) * 10.0 ** np.random.default_rng(1).integers(-12, 12, 300)
    for value in values:
        text = show(float(value), digits).replace("−", "-").replace("\u202f", "")
        mantissa, _, power = text.partition("·10")
        exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
        # Integers are written in full, so they may be better than asked for.
        assert float(mantissa) * 10.0**exponent == pytest.approx(value, rel=0.5001 * 10.0 ** (1 - digits))


def test_an_error_is_not_negative():
    with pytest.raises(ValueError, match=r"error=-0\.1 of an Estimate is negative"):
        Estimate(1.0, -0.1)
