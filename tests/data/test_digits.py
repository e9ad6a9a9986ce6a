"""The built-in digits are the ones of the literature."""

import hashlib
from importlib.resources import files

import numpy as np
import pytest

from stablefield.data import open_images


def test_the_shipped_bytes_are_pinned():
    digits = open_images("digits")
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.manifest["sha256"] == "b41ca9fd335466eee997366c2e6f6bbe0a1b4582afe091fc4eba35f4a254182f"
    assert digits.manifest["labels_sha256"] == "a3c91c262eddcf7ba8f0e37507c30284493c9b20412ffe4af30d536401f7ba21"
    assert hashlib.sha256(digits.images.tobytes()).hexdigest() == digits.manifest["sha256"]
    assert digits.class_names == tuple("0123456789")


def test_they_are_scikit_learns_with_sixteenths_mapped_to_the_nearest_byte():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    digits = open_images("digits")
    np.testing.assert_array_equal(digits.labels, source.target)
    # Half is rounded up, and occurs at 8 (127.5) alone.
    np.testing.assert_array_equal(digits.images[:, 0], np.floor(source.images * 255 / 16 + 0.5))
    np.testing.assert_array_equal(np.rint(digits.images[:, 0] * (16 / 255)), source.images)


def test_the_source_is_credited_beside_the_file():
    text = (files("stablefield.data") / "digits-LICENSE.txt").read_text()
    for words in ("Alpaydin", "Kaynak", "CC BY 4.0", "10.24432/C50P49", "Changes:"):
        assert words in text


def test_they_have_no_splits():
    with pytest.raises(ValueError, match="split='test'"):
        open_images("digits", split="test")
