"""A denoiser as plain files: its network's state in safetensors and its options in JSON, no code.

model.safetensors  config.json

`read_plain_config` reads back what config.json states, which the weights do not: the preconditioning with its numbers, a
transformer's heads, the scaling of float data, the names of the classes, the label dropout.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from stablefield._regular_file import read_limited
from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._scaling import Scaling
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.interop._inert import plain_text
from stablefield.interop._pipeline_folder import (
    ExportConfig,
    named_preconditioning,
    network_options,
    new_folder,
    preconditioning_options,
    stated_heads,
    stated_label_dropout,
)
from stablefield.training._files import write_tensors
from stablefield.training._records import parse

__all__ = ["read_plain_config", "write_plain"]


def write_plain(
    path: str | Path,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    class_names: Sequence[str] | None = None,
    scaling: Scaling | None = None,
    autoencoder: AutoencoderRecord | None = None,
    label_dropout: float | None = None,
) -> None:
    """Write the files.

    Args:
        path: a new or empty folder.
        denoiser: of a `SongUNet`, a `SiT` or an `MLP`.
        shape: of one image, (C, H, W).
        class_names: class names; None if unknown.
        scaling: of data that are not images.
        autoencoder: that decodes latents of images; it is named, and not included.
        label_dropout: share of the training's rows whose class the network did not see; at 0 it never learned to draw
            without a class. None if unknown.

    Raises:
        ValueError: if the folder is not empty or cannot be written, or the kind of network or preconditioning is not
            supported.
    """
    path = Path(path)
    kind, options = network_options(denoiser.network)
    name, arguments = preconditioning_options(denoiser)
    record: dict[str, Any] = {
        "network": {"kind": kind, "options": options},
        "preconditioning": {"kind": name, "options": arguments},
        "shape": list(shape),
        "class_names": None if class_names is None else list(class_names),
        "denoiser": "c_skip x + c_out F(c_in x; c_noise), x = x_t / alpha, sigma = noise level sigma / alpha",
    }
    if label_dropout is not None:
        record["label_dropout"] = label_dropout
    if scaling is not None:
        record["scaling"] = scaling.record | {"data": "2 std x + mean, per channel"}
    if autoencoder is not None:
        # Its place may be a folder of this machine.
        record["autoencoder"] = {key: value for key, value in autoencoder.record.items() if key != "place"}
    with new_folder(path):
        state = denoiser.network.state_dict()
        write_tensors(path / "model.safetensors", {key: value.contiguous().cpu() for key, value in state.items()})
        (path / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def read_plain_config(weights: Path) -> ExportConfig | None:
    """Read the config.json beside a file of weights.

    Returns:
        Its content; None if there is none, or it is not one of `write_plain`.

    Raises:
        ValueError: if it is one of `write_plain`, and what it states cannot be used.
    """
    path = weights.with_name("config.json")
    try:
        record = parse(read_limited(path))
    except (OSError, ValueError):
        return None  # of another program, or none
    stated = record.get("preconditioning")
    if not isinstance(stated, dict) or not {"denoiser", "network"} <= set(record):
        return None
    try:
        return _plain_config(record, cast("dict[str, Any]", stated))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be used: {str(error).removesuffix('.')}. It states what the weights beside it do not: export "
            "them again, or move it away and name the preconditioning."
        ) from error


def _plain_config(record: Mapping[str, Any], stated: Mapping[str, Any]) -> ExportConfig:
    kind, network = stated.get("kind"), record["network"]
    preconditioning = named_preconditioning(kind, stated.get("options"))
    if not isinstance(network, dict) or not isinstance(network.get("options"), dict):
        raise ValueError(f"its network is {str(network)[:80]}")
    heads = stated_heads(cast("dict[str, Any]", network))
    shape: Any = record.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"its shape is {str(shape)[:40]}")
    manifest: dict[str, Any] = {}
    names: Any = record.get("class_names")
    if isinstance(names, list):
        manifest["class_names"] = [plain_text(str(name)) for name in names]
    if (share := stated_label_dropout(record)) is not None:
        manifest["label_dropout"] = share
    scaling, place = Scaling.of_manifest(record), record.get("autoencoder")
    if scaling is not None:
        if len(scaling.mean) != shape[0]:
            raise ValueError(f"its scaling has {len(scaling.mean)} channels, and its samples have {shape[0]}")
        manifest["scaling"] = scaling.record
    if place is not None and scaling is not None:
        # The export leaves out where it was.
        known = AutoencoderRecord.of_manifest(
            {"autoencoder": {"place": "", **place} if isinstance(place, dict) else place}
        )
        manifest["autoencoder"] = known.record if known is not None else None
    return ExportConfig(
        kind=str(kind),
        preconditioning=preconditioning,
        heads=heads,
        shape=tuple(cast("list[int]", shape)),
        manifest=manifest,
    )
