"""Writes a run's report.html while it trains, and where it is trained to its environment.jsonl.

The training writes the page at its looks, so a browser that shows it follows the run. Drawing takes a second or two: the
reports on the way take at most a fiftieth of the time, and a run of a few seconds has none.
"""

import platform
import time
import warnings
from datetime import UTC, datetime
from importlib.util import find_spec

import torch

import stablefield
from stablefield.training._records import append_line
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder
from stablefield.training._run_report import read_report

__all__ = ["ReportWriter", "log_environment", "report_seconds"]

FIRST = 20.0
"""Seconds of training before the first report on the way; a run of less has none."""
SHARE = 0.02
"""Share of the time that reports on the way take."""
# Seconds for the last report and the animation.
_DRAWN = 3.0


def log_environment(folder: RunFolder, step: int, device: torch.device, processes: int) -> None:
    """Append where a run is trained from now on to its environment.jsonl."""
    threads = torch.get_num_threads()
    hardware = f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    entry = {
        "step": step,
        "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "device": f"{device} ({hardware})",
        "processes": processes,
        "stablefield": stablefield.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()}, {platform.system()}",
    }
    append_line(folder.environments, entry)


def report_seconds(seconds: float) -> float:
    """What the last report and the animation take, with the packages' import, of a training of so many seconds."""
    return _DRAWN if seconds > FIRST and _drawable() else 0.0


class ReportWriter:
    """Writes RUN/report.html during training, as often as its time allows; nothing without matplotlib and Jinja2."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._path = folder, folder.path / "report.html"
        self._began = time.monotonic()
        self._next = self._began + FIRST

    def write(self, config: RunConfig, *, training: bool) -> None:
        """Write the report, if it is time; at the end of a training, if it has taken as long as the first report waits for.

        Args:
            config: the run's configuration now.
            training: whether the training goes on.
        """
        began = time.monotonic()
        if not _drawable() or began < (self._next if training else self._began + FIRST):
            return
        try:
            read_report(self._folder, config, training=training).save(self._path)
        except (OSError, ValueError) as error:
            warnings.warn(f"{self._path} was not written: {error}", stacklevel=2)
        now = time.monotonic()
        self._next = now + (now - began) / SHARE


def _drawable() -> bool:
    return all(find_spec(name) is not None for name in ("matplotlib", "jinja2", "PIL"))
