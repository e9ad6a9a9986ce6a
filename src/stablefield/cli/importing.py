"""`stablefield import FILE --out DIR`: make a run from a published network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from stablefield.cli.console import console, print_rows, quoted, relative
from stablefield.cli.places import check_new_folder
from stablefield.interop._imported_run import write_imported_run
from stablefield.interop._published import PreconditioningName, read_published

__all__ = ["Import"]


@dataclass(frozen=True)
class Import:
    """Make a run from a published DDPM++, NCSN++, SiT or DiT network, without executing anything in the file."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A pickle of the EDM family (.pkl), a torch file (.pt, .pth) or safetensors."""
    out: Path
    """Folder of the run, new or empty."""
    preconditioning: PreconditioningName | None = None
    """Preconditioning of the network's training; needed if neither the file nor the config.json of an export beside it says
    so: flow for SiT's weights, ddpm for DiT's."""
    heads: int | None = None
    """Heads of a SiT's or DiT's attention; needed for other widths than those of the published networks, if no config.json
    of an export beside the file states them."""

    def run(self) -> int:
        """Read the file, describe the network, and write the run."""
        check_new_folder("--out", self.out)
        network = read_published(self.file, self.preconditioning, self.heads)
        count = sum(parameter.numel() for parameter in network.denoiser().parameters())
        print_rows(
            [
                *network.architecture.describe(),
                ("preconditioning", str(network.preconditioning)),
                ("parameters", f"{count:,}, {network.origin}"),
            ]
        )
        folder = write_imported_run(self.out, network, self.file)
        console.print(f"run folder: {escape(relative(folder.path))}")
        console.print(f"draw from it:  {quoted('stablefield', 'sample', folder.path, '--seeds', '0-63')}")
        return 0
