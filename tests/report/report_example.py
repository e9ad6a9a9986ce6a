"""A report with one of everything: curves as the probe draws them, in closed form, and invented scores."""

import numpy as np

from stablefield.data import open_images
from stablefield.report import (
    Bullets,
    Code,
    Details,
    Estimate,
    Figure,
    KeyFigure,
    KeyFigures,
    Line,
    LineChart,
    Page,
    Region,
    Section,
    SideBySide,
    Table,
    Text,
    image_figure,
    json_details,
)

LEVELS = np.geomspace(0.02, 80, 40)
SIZES = {1: "DSM", 16: "STF, n = 16", 256: "STF, n = 256", 1797: "STF, all 1,797"}


def variance(levels, n, scale=30.0):
    """A plausible curve: nothing below the band, a plateau above it, and a share 1/n of it left with n references."""
    removed = scale / (1 + (1.2 / levels) ** 6)
    kept = 1 / n + (1 - 1 / n) / (1 + (levels / 0.7) ** 5)
    return removed * kept


def variance_chart():
    rng = np.random.default_rng(0)
    lines = []
    for n, name in SIZES.items():
        y = variance(LEVELS, n) * np.exp(0.03 * rng.standard_normal(len(LEVELS)))
        lines.append(Line(label=name, x=LEVELS, y=y, low=y * 0.85, high=y * 1.15))
    return LineChart(
        lines=tuple(lines),
        x_label="noise level sigma / alpha",
        y_label="variance of the target, E Tr Cov",
        log_x=True,
        log_y=True,
        y_min=1e-3,
        regions=(
            Region(label="one sample", stop=0.4),
            Region(label="modes compete", start=0.4, stop=4.0),
            Region(label="posterior = prior", start=4.0),
            Region(label="noise band: STF pays", start=0.7),
        ),
    )


def loss_chart():
    steps = np.arange(0, 20001, 250)
    down = 0.3 + 0.9 * np.exp(-steps / 3000)
    return LineChart(
        lines=(
            Line(label="DSM", x=steps, y=down, low=down - 0.05, high=down + 0.05),
            Line(label="STF", x=steps, y=down - 0.06 * (1 - np.exp(-steps / 2000)), low=down - 0.1, high=down - 0.02),
            Line(label="floor", x=[0, 20000], y=[0.21, 0.21], reference=True),
        ),
        x_label="step",
        y_label="squared error to the exact posterior mean",
    )


def score_chart():
    steps = [5000, 10000, 15000, 20000]
    return LineChart(
        lines=(
            Line(label="DSM", x=steps, y=[0.2, 0.14, 0.11, 0.099], low=[0.19, 0.13, 0.1, 0.09], high=[0.21] * 4),
            Line(label="STF", x=steps, y=[0.18, 0.12, 0.09, 0.082], low=[0.17, 0.11, 0.08, 0.08], high=[0.19] * 4),
        ),
        x_label="step",
        y_label="Frechet distance of the samples; lower is better",
    )


def example_page():
    digits = open_images("digits").images
    return Page(
        title="Target variance of digits",
        summary="Stable targets remove 97 % of the target's variance above noise level 0.7. "
        "Take all 1,797 images as references: a step gets 4 % slower.",
        footer="`stablefield probe digits`",
        blocks=(
            KeyFigures(
                (
                    KeyFigure(value=0.7, label="noise band begins at", note="below it STF equals DSM to 1 %"),
                    KeyFigure(
                        value="38 %", label="of a batch falls in the band", note="under ln sigma ~ N(-1.2, 1.2²)"
                    ),
                    KeyFigure(
                        value=Estimate(0.0312, 0.0042), label="variance ratio STF / DSM", note="all 1,797 references"
                    ),
                    KeyFigure(value=1797, label="recommended references"),
                )
            ),
            Section(
                "Variance against noise level",
                (
                    Text(
                        "The target of denoising score matching is one sample of a posterior. Many data points could "
                        "have made the same noisy image, so the target is noisy itself.\n\n"
                        "`Var(DSM) = Var(STF) + E[V]`: what the references take away is known at every step."
                    ),
                    Figure(
                        variance_chart(),
                        alt="Variance against noise level, both logarithmic. DSM rises to 30 and stays; STF falls to 2, 0.1 "
                        "and 0.02 with 16, 256 and 1,797 references.",
                        title="Variance of the target.",
                        caption="Bands: two standard errors over 512 noisy images per level.",
                    ),
                    Table(
                        columns=("references", "V at 1", "V at 3", "V at 10", "milliseconds per step"),
                        rows=tuple(
                            (name, *(float(variance(np.array(s), n)) for s in (1, 3, 10)), Estimate(4 + n / 900, 0.12))
                            for n, name in SIZES.items()
                        ),
                        caption="Variance at three noise levels, and what it costs.",
                        marked=3,
                    ),
                ),
            ),
            Section(
                "Training",
                (
                    Figure(
                        loss_chart(),
                        alt="Error against steps: STF lies below DSM from 2,000 steps on.",
                        title="Error over training.",
                        caption="Five seeds; bands show the least and the greatest.",
                    ),
                    Section(
                        "Scores",
                        (
                            Figure(
                                score_chart(),
                                alt="Frechet distance against steps: STF lies below DSM.",
                                caption="Five seeds; bands show the least and the greatest.",
                            ),
                        ),
                    ),
                ),
            ),
            Section(
                "Samples",
                (
                    image_figure(
                        digits[:64],
                        alt="64 handwritten digits of 8 by 8 pixels in four rows.",
                        title="Data.",
                        caption="Rows 0 to 63.",
                        columns=16,
                    ),
                    SideBySide(
                        tuple(
                            image_figure(
                                digits[start : start + 64],
                                alt=f"64 digits by {name} in eight rows.",
                                title=f"{name}.",
                                caption="Seeds 0 to 63, the same latents.",
                            )
                            for name, start in (("DSM", 64), ("STF", 128))
                        )
                    ),
                ),
            ),
            Section(
                "What to do",
                (
                    Bullets(
                        ("Train with all references: `--references all`.", "Below 0.7 use DSM: it is exact and free.")
                    ),
                    Code(
                        "stablefield train digits --target stf --references all --steps 20000 --batch 512 "
                        "--seed 0 --out runs/digits-stf"
                    ),
                    json_details(
                        "Protocol", {"data": "digits", "sha256": "3f" * 32, "levels": 40, "rows": 512, "seed": 0}
                    ),
                    Details("Why the two agree", (Text("Rao-Blackwell."),)),
                ),
            ),
        ),
    )
