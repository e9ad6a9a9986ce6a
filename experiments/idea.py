"""The idea in one picture: a noisy image, what the single-sample target asks a network for, and what the stable target asks.

    python experiments/idea.py CIFAR_FOLDER    # CIFAR-10's binary folder: all 50,000 training images are references

Writes docs/assets/idea.png and idea-dark.png, for light and dark backgrounds, and results/idea.json.
"""

import sys

import numpy as np
import torch
from common import ASSETS, write
from numpy.typing import NDArray
from torch import Tensor

import stablefield as sf
from stablefield.data import open_images
from stablefield.data._png import write_png
from stablefield.report._colours import DARK, LIGHT, Palette

SHOWN = (102, 92, 43)
"""A lorry, a boat and a horse, by their indices in the training set."""
LEVELS = (1.0, 5.0, 20.0)
SEED = 2
"""Seed of the noise, which is the same at every level. Another seed gives other mixtures at the middle level."""
LABELS = (
    "noisy input",
    "single-sample target: the image behind the noise",
    "stable target: the mean of all images that fit",
    "images that fit",
)
SCALE, GAP, GROUP_GAP, MARGIN = 5, 7, 32, 4
FONT, LINE = 40, 60
"""In a picture 1,554 pixels wide: legible on a phone, at 360 pixels."""


def main(arguments: list[str]) -> None:
    (folder,) = arguments
    data = open_images(folder)
    images = torch.tensor(data.images)
    index = torch.tensor(SHOWN)
    x0 = images[index].float() / 127.5 - 1
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images))
    single = sf.DenoisingTarget(sf.EDM())
    groups, fitting = [], []
    for level in LEVELS:
        t = torch.full((len(index),), level)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED))
        x_t = sf.EDM().perturb(x0, t, noise)
        target = stable(x0, x_t, t, index=index, noise=noise)
        # The noise is far outside [-1, 1]: scale it to the data's spread, as for a network's input.
        scaled = x_t * 0.5 / (0.5**2 + level**2) ** 0.5
        groups.append([pixels(rows) for rows in (scaled, single(x0, x_t, t, noise=noise).x0, target.x0)])
        fitting.append(target.ess.tolist())
    for name, palette in (("idea", LIGHT), ("idea-dark", DARK)):
        print(write_png(ASSETS / f"{name}.png", picture(groups, fitting, palette)))
    values = {
        "images": list(SHOWN),
        "seed": SEED,
        "references": len(images),
        "noise_levels": list(LEVELS),
        "ess": fitting,
    }
    write("idea", "python experiments/idea.py CIFAR_FOLDER", values)


def pixels(x: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1] as uint8, (n, H, W, C); values outside are clipped."""
    return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def rounded(count: float) -> str:
    """A count with two digits: 1.5, 41, 12,000."""
    return f"{count:.2g}" if count < 10 else f"{float(f'{count:.2g}'):,.0f}"


def picture(groups: list[list[NDArray[np.uint8]]], fitting: list[list[float]], palette: Palette) -> NDArray[np.uint8]:
    """Groups of columns, one for each noise level; a row for the input and for each target; numbers below."""
    from matplotlib.font_manager import FontProperties, findfont
    from PIL import Image, ImageDraw, ImageFont

    cell = groups[0][0].shape[1] * SCALE
    columns, rows = len(groups[0][0]), len(groups[0])
    wide = columns * cell + (columns - 1) * GAP
    size = (2 * MARGIN + len(groups) * (wide + GROUP_GAP) - GROUP_GAP, rows * (LINE + cell + GAP) + 3 * LINE)
    sheet = Image.new("RGB", size, palette.ground)
    drawing = ImageDraw.Draw(sheet)
    plain, bold = (
        ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight=weight)), FONT)
        for weight in ("normal", "bold")
    )
    tops = [LINE + row * (LINE + cell + GAP) for row in range(rows + 1)]
    for label, top in zip(LABELS, tops, strict=True):
        name, colon, rest = label.partition(":")
        drawing.text((MARGIN, top + LINE // 2), name + colon, palette.ink, bold, anchor="lm")
        after = MARGIN + drawing.textlength(name + colon, bold)
        drawing.text((after, top + LINE // 2), rest, palette.ink, plain, anchor="lm")
    for place, (level, shown, counts) in enumerate(zip(LEVELS, groups, fitting, strict=True)):
        left = MARGIN + place * (wide + GROUP_GAP)
        drawing.text((left + wide // 2, LINE // 2), f"noise level {level:g}", palette.ink, plain, anchor="mm")
        for column, count in enumerate(counts):
            x = left + column * (cell + GAP)
            for top, kind in zip(tops, shown, strict=False):
                large = kind[column].repeat(SCALE, axis=0).repeat(SCALE, axis=1)
                sheet.paste(Image.fromarray(large), (x, top + LINE))
            drawing.text((x + cell // 2, tops[-1] + LINE * 3 // 2), rounded(count), palette.ink, plain, anchor="mm")
    return np.asarray(sheet)


if __name__ == "__main__":
    main(sys.argv[1:])
