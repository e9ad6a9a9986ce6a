"""The pages of the probe hold for every measurement: many sizes and few, edges found and not, levels without variance."""

import math

import pytest
import torch

import stablefield as sf
from stablefield.probing._advice import Training, advise
from stablefield.probing._batch import BatchVariance
from stablefield.probing._fit import Fit
from stablefield.probing._fit_page import fit_page
from stablefield.probing._phases import find_phases
from stablefield.probing._series import Series
from stablefield.probing._variance import VarianceCurve
from stablefield.probing._variance_page import phases_chart, sizes_chart, variance_chart, variance_page
from stablefield.report import render_page, write_chart


def series(values):
    return Series(values, 0.1 * values)


def curve(levels, sizes, dsm):
    level = torch.tensor(levels, dtype=torch.float64)
    value = dsm(level)
    return VarianceCurve(
        noise_level=level,
        dsm=series(value),
        stf={n: series(value / n) for n in sizes},
        divergence=series(math.log(500) / (1 + level**2)),
        source_weight=series(1 / (1 + level**2)),
        ess=series(1 + level),
        score_factor=level**-4,
        total=1.0,
        samples=500,
        drawn_from=9000,
        dim=12,
        sources=100,
        draws=1,
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("sizes", "levels", "dsm"),
    [
        ((2, 4, 8, 16, 32, 64, 128), (0.01, 0.1, 1.0, 10.0, 100.0), lambda s: s**8 / (1 + s**8)),
        ((), (1.0,), lambda s: s / 2),
        ((8,), (5.0, 6.0), lambda s: 0 * s + 0.99),
        ((4, 8), (0.1, 0.2), lambda s: 0 * s),
    ],
)
def test_a_measurement_of_any_kind_makes_a_page_and_pictures(tmp_path, sizes, levels, dsm):
    measured = curve(levels, sizes, dsm)
    phases = find_phases(measured)
    shares = Series(torch.tensor([0.9]), torch.tensor([0.01]))
    together = BatchVariance(
        batch=10, in_batch=shares, pools=dict.fromkeys((n for n in sizes if n > 10), shares), whole=shares
    )
    # As in the probe: the advice rests on levels of its own.
    advice = advise(
        curve(torch.logspace(-3, 2, 40).tolist(), sizes, dsm), Training(), band=levels[0] * 2, batch=together
    )
    said = ["Take them.", "All."]
    page = variance_page("x", "an example", measured, phases, advice, together, said, "stablefield probe x")
    text = render_page(page)
    assert text.count("<svg") >= 2
    assert "500 samples drawn from 9,000" in text
    for name, chart in (("a", variance_chart(measured, phases, advice)), ("b", phases_chart(measured, phases))):
        assert write_chart(chart, tmp_path / f"{name}.png").stat().st_size > 1000
    assert (sizes_chart(measured) is None) == (len(sizes) < 2 or float(measured.dsm.mean.max()) == 0)


@pytest.mark.parametrize("distance", [0.0, 0.3])
def test_a_fit_of_any_kind_makes_a_page(distance):
    level = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    floor = level**2 / (1 + level**2)
    fit = Fit(
        noise_level=level,
        distance=series(0 * level + distance),
        loss=series(floor + distance),
        floor=series(floor),
        dim=12,
        samples=500,
        rows=64,
    )
    page = fit_page("run", "an example", fit, sf.EDMWeighting(), "It fits.", "stablefield probe run")
    assert render_page(page).count("<svg") >= 2


def test_the_share_of_the_floor_has_no_noise_of_the_samples():
    """The loss, measured at few samples, may lie below the floor; the floor is no more than all of what is expected."""
    level = torch.tensor([1.0, 10.0], dtype=torch.float64)
    parts = {"distance": series(0 * level + 0.25), "floor": series(0 * level + 4.75), "loss": series(0 * level + 4.6)}
    fit = Fit(noise_level=level, dim=12, samples=500, rows=64, **parts)
    page = render_page(fit_page("run", "an example", fit, sf.EDMWeighting(), "It fits.", ""))
    assert "95.0%" in page
    assert "103.3%" not in page
