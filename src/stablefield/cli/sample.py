"""`stablefield sample RUN`: draw images from a trained run."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.markup import escape
from torch import Tensor

from stablefield.cli.console import console, relative
from stablefield.cli.drawing import DrawingFlags, Model
from stablefield.cli.places import PICTURES, check_free, check_place, check_suffix, looks_like_file, unused
from stablefield.cli.settling import pick_device
from stablefield.cli.work import Work
from stablefield.data.png import class_grid, write_picture, write_png
from stablefield.evaluation.processes import Processes
from stablefield.sampling.samples import Drawing, chunks_of
from stablefield.training.run_folder import RunFolder

__all__ = ["Sample", "own_device", "parse_seeds"]

# Names of files that hold all images; of any other name is a folder of one file per image.
_SINGLE = (*PICTURES, ".npz")


@dataclass(frozen=True)
class Sample:
    """Draw images from a run: a grid as one picture, a folder of PNG files, or an .npz file.

    Started by torchrun or `accelerate launch`, the processes share the seeds; the images are the same.
    """

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    seeds: str = "0-63"
    """Which images: numbers and ranges, such as 0-63 or 1,5,8-12. Image k is the same in every call."""
    out: Path | None = None
    """FILE.png or FILE.jpg for a grid, FILE.npz, or a folder for one file per image; RUN/samples/SAMPLER-STEPS.png with a
    number, if that is taken, if not given."""
    overwrite: bool = False
    """Replace a file that exists; write among the files of a folder that is not empty."""
    device: str = ""
    """Where to compute; a GPU if there is one."""
    drawing: Annotated[DrawingFlags, tyro.conf.arg(name="")] = field(default_factory=DrawingFlags)
    """How to draw."""

    def run(self) -> int:
        """Draw, write, and say how many network evaluations it took."""
        seeds = parse_seeds(self.seeds)
        self.drawing.check()
        with Processes() as processes:
            console.quiet = not processes.first
            try:
                self._draw(seeds, processes)
            finally:
                console.quiet = False
        return 0

    def _draw(self, seeds: list[int], processes: Processes) -> None:
        flags = self.drawing
        device = pick_device(own_device(self.device))
        folder = RunFolder.open(self.run_folder)
        steps = "" if flags.steps_taken is None else f"-{flags.steps_taken}"
        out = self.out or unused(folder.path / "samples" / f"{flags.sampler}{steps}.png")
        kind = out.suffix.lower()
        single = kind in _SINGLE
        if looks_like_file(out):
            check_suffix("--out", out, _SINGLE, "one file of all images")
        if not single or not out.is_dir():
            self._check_free(out, processes)
        check_place("--out", out, folder=not single)
        model = flags.open(folder.path, device)
        chunks = processes.share(chunks_of(seeds, flags.batch, coupled=flags.coupled))
        began = time.perf_counter()
        kept: list[Tensor] = []
        drawn: list[int] = []
        with Work() as work:
            total = sum(len(chunk.places) for chunk in chunks)
            stage = "drawing" if processes.count == 1 else f"drawing (process 1 of {processes.count})"
            size = 0

            def progress(share: float) -> None:
                work(stage, len(drawn) + share * size, total)

            drawing = flags.drawing(model, device, progress)
            for chunk in chunks:
                size = len(chunk.places)
                images = drawing(chunk)
                drawn.extend(chunk.wanted)
                if single:
                    kept.append(images)
                    continue
                for seed, image in zip(chunk.wanted, images.numpy(), strict=True):
                    write_png(out / f"{seed:06d}.png", image.transpose(1, 2, 0))
        nfe = _mean_nfe(drawing, processes)
        if single:
            shape = tuple(model.own.config.shape)
            own = torch.cat(kept) if kept else torch.zeros(0, *shape, dtype=torch.uint8)
            images = _in_order(
                processes.gathered(own), processes.gathered(torch.tensor(drawn, dtype=torch.int64)), seeds
            )
            if processes.first:
                if kind in PICTURES:
                    labels = flags.labels(torch.tensor(seeds), model.own.config)
                    names = model.own.config.class_names
                    write_picture(out, class_grid(images, None if labels is None else labels.numpy(), names))
                else:
                    self._write_arrays(out, images, seeds, model)
        seconds = time.perf_counter() - began
        together = "" if processes.count == 1 else f" in {processes.count} processes"
        console.print(
            f"{len(seeds):,} images of step {model.own.step:,} (EMA {model.own.ema}), {flags.sampler}{steps}: {nfe:,.4g} "
            f"network evaluations each (NFE), {seconds:.1f} s{together}"
        )
        told = flags.classes_told(model.own.config)
        if told is not None:
            console.print(escape(told))
        console.print(f"written: {escape(relative(out))}")

    def _check_free(self, out: Path, processes: Processes) -> None:
        refusal: ValueError | None = None
        try:
            check_free("--out", out, overwrite=self.overwrite)
        except ValueError as error:
            refusal = error
        # All have looked before the first of them writes.
        if not processes.all(refusal is None):
            raise refusal or ValueError(f"--out {out} is taken, as another process sees it: name another place.")

    def _write_arrays(self, out: Path, images: NDArray[np.uint8], seeds: list[int], model: Model) -> None:
        # arr_0 and the channels last: what the usual evaluators of .npz files read.
        arrays = {"arr_0": images.transpose(0, 2, 3, 1), "seeds": np.array(seeds, np.int64)}
        labels, names = self.drawing.labels(torch.tensor(seeds), model.own.config), model.own.config.class_names
        if labels is not None:
            arrays["labels"] = labels.numpy()
        if names is not None:
            arrays["class_names"] = np.array(names)
        unfinished = out.with_name(f".{out.stem}.{os.getpid()}.part.npz")
        try:
            np.savez_compressed(unfinished, allow_pickle=False, **arrays)
            unfinished.replace(out)
        finally:
            unfinished.unlink(missing_ok=True)


def own_device(name: str) -> str:
    """The device called `name`; without a name, this process's own GPU where there are several of both."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return name
    return f"cuda:{local % torch.cuda.device_count()}"


def parse_seeds(text: str) -> list[int]:
    """Seeds of a text such as 0-63 or 1,5,8-12.

    Raises:
        ValueError: if it is none, or names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start, stop = int(first), int(last if dash else first)
        except ValueError:
            raise ValueError(f"--seeds {text}: write numbers and ranges, such as 0-63 or 1,5,8-12.") from None
        if stop < start:
            raise ValueError(f"--seeds {text}: the range {part.strip()} ends before it begins.")
        if stop >= 2**32:
            raise ValueError(f"--seeds {text}: a seed is a whole number from 0 to 2^32 - 1.")
        if stop - start + len(seeds) >= 1_000_000:
            raise ValueError(f"--seeds {text}: that is over a million images; draw them in several calls.")
        seeds.extend(range(start, stop + 1))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: a seed is named twice.")
    return seeds


def _mean_nfe(drawing: Drawing, processes: Processes) -> float:
    evaluations, chunks = processes.total(drawing.evaluations, drawing.chunks)
    return evaluations / chunks


def _in_order(images: Tensor, drawn: Tensor, seeds: list[int]) -> NDArray[np.uint8]:
    """Images in the order in which their seeds were asked for."""
    place = {seed: row for row, seed in enumerate(drawn.tolist())}
    return images[[place[seed] for seed in seeds]].numpy()
