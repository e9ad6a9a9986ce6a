"""What every result says of its making: command, machine, date and commit."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stablefield._commit import running_commit

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The model of the processor, or the machine's kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def machine() -> str:
    """The processor and its threads, and the GPU if there is one."""
    found = f"{processor()}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {found}" if torch.cuda.is_available() else found


def write(name: str, command: str, values: dict[str, Any]) -> Path:
    """Write results/NAME.json."""
    record = {
        "command": command,
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": running_commit(),
        **values,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return path
