"""The three phases: variance of the target, divergence and source weight against the noise level.

    python experiments/phases.py                 # two Gaussians in R^64
    python experiments/phases.py CIFAR_FOLDER    # 4,096 images of CIFAR-10
    python experiments/phases.py --draw          # only the figures of both, from results/

Also V_STF(n) against n, with the line 1 / n.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    section 3 and figure 2 (the phases), section 4 (V_STF against n).
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from common import draw, read, two_gaussians, write

import stablefield as sf
from stablefield.data import open_images
from stablefield.probing._advice import Training, advise
from stablefield.probing._phases import find_phases
from stablefield.probing._population import Population, draw_population
from stablefield.probing._record import curve_record, phases_record
from stablefield.probing._series import Series
from stablefield.probing._variance import VarianceCurve, measure_variance
from stablefield.probing._variance_page import phases_chart, sizes_chart, variance_chart
from stablefield.report import LineChart

SIZES = (4, 16, 64, 256, 1024)
SETS = {
    "two_gaussians": ("two Gaussians", Training()),
    "cifar10": (
        "CIFAR-10",
        Training(process=sf.VE(), noise_levels=sf.LogUniform(), weighting=sf.SNRWeighting()),
    ),
}


def measure(folder: str | None) -> str:
    """Measure, and write what was found; returns its name."""
    if folder is None:
        name, population = "two_gaussians", Population(two_gaussians())
        levels = torch.logspace(-1.5, 1.7, 25).tolist()
    else:
        name, population = "cifar10", draw_population(open_images(folder), max_images=4096)
        levels = torch.logspace(-0.3, 2.3, 21).tolist()
    curve = measure_variance(population, levels, sizes=SIZES, sources=1024, draws=1)
    values = {
        "curve": curve_record(curve),
        "phases": phases_record(find_phases(curve)),
        "noise_band": sf.pick_noise_band(sf.Pool(population.data)).level,
    }
    write(f"{name}_phases", f"python experiments/phases.py{'' if folder is None else ' CIFAR_FOLDER'}", values)
    return name


def curve_of(record: dict[str, Any]) -> VarianceCurve:
    """The measurement that `curve_record` made this of."""
    levels = record["levels"]

    def numbers(name: str) -> torch.Tensor:
        return torch.tensor([float("nan") if row[name] is None else row[name] for row in levels], dtype=torch.float64)

    def series(name: str) -> Series:
        return Series(numbers(name), numbers(f"{name}_se"))

    return VarianceCurve(
        noise_level=numbers("noise_level"),
        dsm=series("v_dsm"),
        stf={size: series(f"v_stf_{size}") for size in SIZES},
        divergence=series("divergence"),
        source_weight=series("source_weight"),
        ess=series("ess"),
        score_factor=numbers("score_factor"),
        total=record["variance_of_the_data"],
        samples=record["samples"],
        drawn_from=record["drawn_from"],
        dim=record["numbers_per_sample"],
        sources=record["sources"],
        draws=record["noise_draws"],
        seconds=record["seconds"],
    )


def charts(name: str) -> dict[str, LineChart]:
    """The charts of what was measured, by the names of their files."""
    title, training = SETS[name]
    record = read(f"{name}_phases")
    curve = curve_of(record["curve"])
    phases = find_phases(curve)
    advice = advise(curve, training, band=record["noise_band"])
    found = {
        "phases": ("The three phases", phases_chart(curve, phases)),
        "variance": ("Variance of the target", variance_chart(curve, phases, advice)),
        "sizes": ("More references", sizes_chart(curve)),
    }
    return {
        f"{name}_{kind}": replace(chart, title=f"{what}: {title}")
        for kind, (what, chart) in found.items()
        if chart is not None
    }


def main(arguments: list[str]) -> None:
    names = SETS if arguments == ["--draw"] else [measure(arguments[0] if arguments else None)]
    for name in names:
        draw(charts(name))


if __name__ == "__main__":
    main(sys.argv[1:])
