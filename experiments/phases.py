"""The three phases: variance of the target, divergence and source weight against the noise level.

    python experiments/phases.py                 # two Gaussians in R^64
    python experiments/phases.py CIFAR_FOLDER    # 4,096 images of CIFAR-10

Also V_STF(n) against n, with the line 1 / n.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    section 3 and figure 2 (the phases), section 4 (V_STF against n).
"""

import sys

import torch
from common import two_gaussians, write

import stablefield as sf
from stablefield.data import open_images
from stablefield.probing._advice import Training, advise
from stablefield.probing._phases import find_phases
from stablefield.probing._population import Population, draw_population
from stablefield.probing._record import curve_record, phases_record
from stablefield.probing._variance import measure_variance
from stablefield.probing._variance_page import phases_chart, sizes_chart, variance_chart

SIZES = (4, 16, 64, 256, 1024)


def main(arguments: list[str]) -> None:
    if arguments:
        name, population = "cifar10", draw_population(open_images(arguments[0]), most=4096)
        levels = torch.logspace(-0.3, 2.3, 21).tolist()
        training = Training(process=sf.VE(), noise_levels=sf.LogUniform(), weighting=sf.SNRWeighting())
    else:
        name, population = "two_gaussians", Population(two_gaussians())
        levels = torch.logspace(-1.5, 1.7, 25).tolist()
        training = Training()
    curve = measure_variance(population, levels, sizes=SIZES, sources=1024, draws=1)
    phases = find_phases(curve)
    advice = advise(curve, training, band=sf.pick_noise_band(sf.Pool(population.data)).level)
    charts = {
        f"{name}_phases": phases_chart(curve, phases),
        f"{name}_variance": variance_chart(curve, phases, advice),
    }
    sizes = sizes_chart(curve)
    if sizes is not None:
        charts[f"{name}_sizes"] = sizes
    values = {"curve": curve_record(curve), "phases": phases_record(phases)}
    write(
        f"{name}_phases",
        " ".join(["python experiments/phases.py", *(["CIFAR_FOLDER"] if arguments else [])]),
        values,
        charts,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
