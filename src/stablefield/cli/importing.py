"""`stablefield import FILE --out DIR`: make a run of a published network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.markup import escape

from stablefield.cli.console import console, print_rows, quoted, relative
from stablefield.cli.places import check_new_folder
from stablefield.interop._imported_run import write_imported_run
from stablefield.interop._published import read_published

__all__ = ["Import"]


@dataclass(frozen=True)
class Import:
    """Make a run of a published DDPM++ or NCSN++ network. Nothing in the file is executed, whatever it holds."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A pickle of the EDM family (.pkl), a torch file (.pt, .pth) or safetensors."""
    out: Path
    """Folder of the run, new or empty."""
    preconditioning: Literal["edm", "vp", "ve"] | None = None
    """Scalings that the network was trained in; needed where the file does not say, as with a plain state dict."""

    def run(self) -> int:
        """Read, say what was found, and write the run."""
        check_new_folder("--out", self.out)
        network = read_published(self.file, self.preconditioning)
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
