"""What the tolerance of the noise band costs and keeps, under EDM's noise levels.

    python benchmarks/band.py DATA...     ->  benchmarks/results/band.json

DATA is what `stablefield train` takes, such as digits and CIFAR-10's binary folder. For each tolerance: the level that
`pick_noise_band` finds; the weight that the source really loses there; the share of a batch that uses references; and the
share that is kept of what references take from the loss above the lowest of the levels.
"""

import math
import sys

import torch
from record import write

import stablefield as sf
from stablefield.data._source import open_images

TOLERANCES = (0.05, 0.1, 0.2)
ROWS = 512
BATCHES = 16
# In standard deviations of ln(noise level): above, a batch of 512 has a row in one of 500.
HIGHEST = 4.5


def measure(name: str) -> dict[str, object]:
    noise = sf.LogNormal()
    images = torch.tensor(open_images(name).images)
    pool = sf.Pool(images)
    target = sf.StableTarget(sf.EDM(), references=pool)
    generator = torch.Generator().manual_seed(0)

    def rows(level: torch.Tensor) -> sf.Target:
        index = torch.randint(len(images), (ROWS,), generator=generator)
        x0 = images[index].float() / 127.5 - 1
        return target(x0, sf.EDM().perturb(x0, level, generator=generator), level, index=index)

    levels = [sf.pick_noise_band(pool, tolerance=tolerance).level for tolerance in TOLERANCES]
    scores = [(math.log(level) - noise.mean) / noise.std for level in levels]
    # Levels are drawn evenly in standard deviations, so that the rare high ones are seen, and weighed by their density.
    kept = torch.zeros(len(levels), dtype=torch.float64)
    for _ in range(BATCHES):
        z = scores[0] + (HIGHEST - scores[0]) * torch.rand(ROWS, generator=generator)
        level = torch.exp(noise.mean + noise.std * z)
        removed = sf.EDMWeighting(0.5)(level) * rows(level).variance * torch.exp(-z.square() / 2)
        kept += torch.stack([removed[z >= score].sum() for score in scores])
    return {
        "data": "digits" if name == "digits" else f"{len(images):,} images of {'x'.join(map(str, images.shape[1:]))}",
        "tolerances": [
            {
                "tolerance": tolerance,
                "level": level,
                "lost": 1 - float(rows(torch.full((ROWS,), level)).source_weight.mean()),
                "share_of_a_batch": math.erfc(score / 2**0.5) / 2,
                "kept": float(kept[k] / kept[0]),
            }
            for k, (tolerance, level, score) in enumerate(zip(TOLERANCES, levels, scores, strict=True))
        ],
    }


def main(names: list[str]) -> None:
    found = [measure(name) for name in names]
    for data in found:
        print(data["data"])
        for row in data["tolerances"]:
            print(
                f"  {row['tolerance']:.2f}: level {row['level']:.3f}, really lost {row['lost']:.1%}, "
                f"{row['share_of_a_batch']:.1%} of a batch, keeps {row['kept']:.1%}"
            )
    print(write("band", "python benchmarks/band.py DATA...", {"rows": ROWS, "batches": BATCHES, "found": found}))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
