"""`stablefield doctor`: what this machine offers, and whether the target is exact on it."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch
from rich.table import Table

import stablefield
from stablefield.cli.console import console

__all__ = ["Doctor"]

# Largest relative error of the posterior mean against float64 that passes.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Doctor:
    """Show versions and devices, and check the target against float64 on each device."""

    def run(self) -> int:
        """Print a table; status 1 if the target is not exact on a device."""
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row("stablefield", stablefield.__version__)
        table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
        table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
        table.add_row(
            "float32 products", f"{torch.get_float32_matmul_precision()} (the target always uses the highest)"
        )
        for package in ("numpy", "pillow", "rich", "safetensors", "tyro"):
            table.add_row(package, _version(package))
        healthy = True
        for device in _devices():
            error = _error(device)
            good = error < _TOLERANCE
            healthy &= good
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            verdict = "[green]exact[/]" if good else "[red]NOT exact[/]"
            table.add_row(f"target on {device}", f"{verdict}: relative error {error:.1e} against float64 ({name})")
        console.print(table)
        if not healthy:
            console.print(
                "[red]The target is not exact on every device:[/] train on another one, and report this table."
            )
        return 0 if healthy else 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'missing: pip install "stablefield[train]"'


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return devices


def _error(device: torch.device) -> float:
    """Largest relative error of the posterior mean over noise levels, against a plain computation in float64."""
    generator = torch.Generator().manual_seed(0)
    references = torch.rand(512, 768, generator=generator) * 2 - 1
    rows = references[:64]
    worst = 0.0
    for sigma in (0.3, 1.0, 3.0, 10.0, 50.0):
        x_t = rows + sigma * torch.randn(rows.shape, generator=generator)
        found = stablefield.posterior(x_t.to(device), 1.0, sigma, references.to(device)).mean.cpu().double()
        wide = references.double()
        weights = torch.softmax(-torch.cdist(x_t.double(), wide).square() / (2 * sigma**2), dim=1)
        mean = weights @ wide
        worst = max(worst, float(((found - mean).norm(dim=1) / mean.norm(dim=1)).max()))
    return worst
