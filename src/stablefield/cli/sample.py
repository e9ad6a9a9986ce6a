"""`stablefield sample RUN`: draw images from a trained run."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from stablefield._distributed import Ranks
from stablefield.cli.console import console, relative, shown_warnings
from stablefield.cli.drawing import DrawingFlags
from stablefield.cli.parser import parse_seeds
from stablefield.cli.places import check_file, check_folder, check_free, check_suffix, looks_like_file, unused
from stablefield.cli.progress import StageBar
from stablefield.data._png import PICTURES, is_picture
from stablefield.training._run import Run

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """Draw images from a run: a grid as one picture, a folder of PNG files, or an .npz file; or float data as .npz or .npy.

    Of a run on latents of images, the images are decoded; --no-decode writes the latents.

    Started by torchrun or `accelerate launch`, the processes share the seeds; the images are the same.
    """

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    seeds: str = "0-63"
    """Numbers and ranges, such as 0-63 or 1,5,8-12. A seed always gives the same image."""
    out: Path | None = None
    """FILE.png or FILE.jpg for a grid, FILE.npz (of float data also FILE.npy), or a folder for one file per image; by
    default RUN/samples/SAMPLER-STEPS.png, .npz of data that are no pictures, with a number if that exists."""
    overwrite: bool = False
    """Replace a file that exists; write among the files of a folder that is not empty."""
    device: str = ""
    """Where to compute; by default a GPU if there is one."""
    drawing: Annotated[DrawingFlags, tyro.conf.arg(name="")] = field(default_factory=DrawingFlags)
    """How to draw."""

    def run(self) -> int:
        """Draw and write the images, and print the number of network evaluations."""
        seeds = parse_seeds(self.seeds)
        self.drawing.check()
        with Ranks.launched() as ranks:
            self._draw(seeds, ranks)
        return 0

    def _draw(self, seeds: list[int], ranks: Ranks) -> None:
        options = self.drawing
        run = Run(self.run_folder)
        steps = "" if options.steps_taken is None else f"-{options.steps_taken}"
        config = run.config
        decoded = bool(options.vae) or (options.decode and config.autoencoder is not None)
        floating = config.dtype != "uint8" and not decoded
        what = "samples" if floating else "images"
        pictures = decoded or is_picture(config.shape)
        allowed = (*(PICTURES if pictures else ()), ".npz", *((".npy",) if floating else ()))
        out = self.out or unused(run.path / "samples" / f"{options.sampler}{steps}{allowed[0]}")
        single = out.suffix.lower() in allowed
        if looks_like_file(out):
            check_suffix("--out", out, allowed, f"one file of all {what}")
        if not single or not out.is_dir():
            self._check_free(out, ranks)
        (check_file if single else check_folder)("--out", out)
        began = time.perf_counter()
        with shown_warnings():
            sampler = run.sampler(options, device=self.device or None)
        with StageBar() as bar:
            if single:
                samples = run.sample(seeds, sampler=sampler, progress=bar.update)
                nfe = samples.nfe
                if ranks.first:
                    samples.save(out)
            else:
                # Write each batch before drawing the next.
                found: list[float] = []
                for batch in sampler.draw(seeds, ranks, bar.update):
                    batch.save(out)
                    found.append(batch.nfe * len(batch))
                nfe = ranks.total(sum(found), purpose="to draw their images")[0] / len(seeds)
        seconds = time.perf_counter() - began
        together = "" if ranks.world_size == 1 else f" in {ranks.world_size} processes"
        model = sampler.model
        console.print(
            f"{len(seeds):,} {what} of step {model.step:,} (EMA {model.average}), {options.sampler}{steps}: {nfe:,.4g} "
            f"network evaluations each (NFE), {seconds:.1f} s{together}"
        )
        classes = sampler.describe_classes()
        if classes is not None:
            console.print(escape(classes))
        console.print(f"written: {escape(relative(out))}")

    def _check_free(self, out: Path, ranks: Ranks) -> None:
        refusal: ValueError | None = None
        try:
            check_free("--out", out, overwrite=self.overwrite)
        except ValueError as error:
            refusal = error
        # All processes look before the first of them writes.
        if not ranks.all(refusal is None, "to look at --out"):
            raise refusal or ValueError(f"--out {out} exists for another process: name another place.")
