"""A check-up of this machine: versions, devices, and whether the target is exact on each of them."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

import stablefield

__all__ = ["CheckUp", "DeviceCheck", "check_machine"]

# Largest relative error of the posterior mean against float64 that passes.
_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class DeviceCheck:
    """The target on a device.

    Attributes:
        device: such as cuda:0.
        name: of the hardware, where it is known.
        error: largest relative error of the posterior mean against float64.
    """

    device: str
    name: str
    error: float

    @property
    def exact(self) -> bool:
        """Whether the error is that of rounding."""
        return self.error < _TOLERANCE


@dataclass(frozen=True, kw_only=True)
class CheckUp:
    """What a machine offers; `print` shows it as a table.

    Attributes:
        versions: what is installed, as (name, version).
        devices: the target on each device.
    """

    versions: tuple[tuple[str, str], ...]
    devices: tuple[DeviceCheck, ...]

    @property
    def healthy(self) -> bool:
        """Whether the target is exact on every device."""
        return all(found.exact for found in self.devices)

    def rows(self) -> list[tuple[str, str]]:
        """The table."""
        checks = [
            (f"target on {found.device}", f"{verdict}: relative error {found.error:.1e} against float64 ({found.name})")
            for found in self.devices
            for verdict in ("exact" if found.exact else "NOT exact",)
        ]
        return [*self.versions, *checks]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def check_machine() -> CheckUp:
    """Look up the versions, and check the target against float64 on each device."""
    versions = [
        ("stablefield", stablefield.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("float32 products", f"{torch.get_float32_matmul_precision()} (the target always uses the highest)"),
        *((package, _version(package)) for package in ("numpy", "pillow", "rich", "safetensors", "tyro")),
    ]
    devices = [
        DeviceCheck(
            device=str(device),
            name=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            error=_error(device),
        )
        for device in _devices()
    ]
    return CheckUp(versions=tuple(versions), devices=tuple(devices))


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
