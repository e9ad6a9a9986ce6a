"""The palettes hold what they promise, by the definitions of contrast and of colour blindness."""

import itertools

import numpy as np
import pytest

from stablefield.report._colours import DARK, LIGHT

# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision Deficiency, 2009:
# severity 1, on linear RGB.
VISIONS = {
    "full": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """Web Content Accessibility Guidelines 2.2, contrast ratio."""
    bright = [linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05 for colour in (a, b)]
    return max(bright) / min(bright)


def lab(rgb):
    """CIE 1976 L*a*b*, white D65."""
    xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    ratio = xyz @ rgb / (xyz @ np.ones(3))
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("palette", [pytest.param(LIGHT, id="light"), pytest.param(DARK, id="dark")])
def test_text_and_lines_stand_out_from_their_ground(palette):
    for ground in (palette.ground, palette.shade):
        assert contrast(palette.ink, ground) >= 7
        assert contrast(palette.muted, ground) >= 4.5
        # Graphical objects: success criterion 1.4.11. Regions are tinted, so a little less is left on them.
        assert min(contrast(colour, ground) for colour in palette.series) >= (3 if ground == palette.ground else 2.7)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("palette", [pytest.param(LIGHT, id="light"), pytest.param(DARK, id="dark")])
def test_series_differ_for_every_kind_of_colour_vision(palette, vision):
    seen = [lab(np.clip(VISIONS[vision] @ linear(colour), 0, 1)) for colour in palette.series]
    # A difference of 2.3 is just noticeable side by side; lines are thin and apart, and need more.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12


def test_every_name_has_its_own_colour_so_that_a_picture_can_be_recoloured():
    for palette in (LIGHT, DARK):
        assert len(set(palette.variables().values())) == len(palette.variables())
