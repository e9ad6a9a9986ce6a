"""A denoiser as plain files: its network's state in safetensors and its options in JSON, no code.

model.safetensors  config.json
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._scaling import Scaling
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.interop._pipeline_folder import network_options, preconditioning_options

__all__ = ["write_plain"]


def write_plain(
    path: Path,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    class_names: Sequence[str] | None = None,
    scaling: Scaling | None = None,
    autoencoder: AutoencoderRecord | None = None,
) -> None:
    """Write the files.

    Args:
        path: a new or empty folder.
        denoiser: of a `SongUNet`, a `SiT` or an `MLP`.
        shape: of one image, (C, H, W).
        class_names: class names; None if unknown.
        scaling: of data that are not images.
        autoencoder: that decodes latents of images; it is named, and not included.

    Raises:
        ValueError: if the folder is not empty or cannot be written, or the kind of network or preconditioning is not
            supported.
    """
    from safetensors.torch import save_file

    kind, options = network_options(denoiser.network)
    name, arguments = preconditioning_options(denoiser)
    record: dict[str, Any] = {
        "network": {"kind": kind, "options": options},
        "preconditioning": {"kind": name, "options": arguments},
        "shape": list(shape),
        "class_names": None if class_names is None else list(class_names),
        "denoiser": "c_skip x + c_out F(c_in x; c_noise), x = x_t / alpha, sigma = noise level sigma / alpha",
    }
    if scaling is not None:
        record["scaling"] = scaling.record | {"data": "2 std x + mean, per channel"}
    if autoencoder is not None:
        # Its place may be a folder of this machine.
        record["autoencoder"] = {key: value for key, value in autoencoder.record.items() if key != "place"}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ValueError(f"out={path} is not empty: name a new folder.")
        state = denoiser.network.state_dict()
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"out={path} cannot be written ({error.strerror}): name another place.") from error
