r"""Published networks: read a file of the EDM family, or a plain state dict, into a `Denoiser`.

A file of the EDM family is a pickled dict whose `ema` is an object of a preconditioning class that is saved with its source
text: `EDMPrecond`, `VPPrecond` or `VEPrecond`, with the U-Net as its submodule `model`. This module uses only the class's
name, its plain attributes, the U-Net's label dropout and the tensors, never the source text. A file of SiT or DiT is a
state dict, or a dict with one as `ema`; SiT's checkpoints have the options of the training beside it, which name path and
prediction. The config.json of an export, and the model_index.json of a pipeline, state all that its weights do not.

References:
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    table 1: the three preconditionings; Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
    Interpolant Transformers", ECCV 2024; Peebles, Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from stablefield._shapes import check_choice
from stablefield.data._autoencoder import Autoencoder
from stablefield.diffusion._preconditioning import (
    PRECONDITIONINGS,
    Denoiser,
    EDMPreconditioning,
    NamedPreconditioning,
    VPPreconditioning,
)
from stablefield.interop._architecture import Architecture, infer_architecture
from stablefield.interop._inert import MAX_AXES, Array, Node, RefusedError, TensorView, plain_text
from stablefield.interop._pipeline_folder import (
    ExportConfig,
    read_pipeline_config,
    read_unet_config,
    stated_heads,
    stated_label_dropout,
)
from stablefield.interop._plain_export import read_plain_config
from stablefield.interop._sit_architecture import SiTArchitecture, infer_sit, is_sit
from stablefield.interop._weight_files import MAX_TENSORS, read_weight_file

__all__ = ["PreconditioningName", "PublishedNetwork", "read_export", "read_published", "read_state", "stated_heads"]

PreconditioningName = Literal["edm", "vp", "ve", "flow", "ddpm"]
"""The kind of preconditioning, for files that do not state it: flow for SiT's published weights, ddpm for DiT's."""

_CLASSES: Mapping[str, PreconditioningName] = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}
# Prefixes that a wrapper may have added to the names of the network's own state, outermost first.
_PREFIXES = ("module.", "denoiser.", "network.", "model.")
# Where a file's dict may have the network, the best first.
_PLACES = (
    ("ema", "averaged weights"),
    ("net", "raw weights"),
    ("model", "raw weights"),
    ("state_dict", "weights"),
)
_MAX_DEPTH = 16
# Modules, parameters and buffers of a network together, including those that are None.
_MAX_ENTRIES = 50_000
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class PublishedNetwork:
    """The network in a file.

    Attributes:
        architecture: of the network.
        preconditioning: the scalings around it.
        state: the network's tensors, float32, under the names of `SongUNet` or `SiT`.
        origin: their location in the file, and the source of the preconditioning.
        manifest: of the data, if config.json or model_index.json states it: the names of the classes, the scaling of float
            data, the autoencoder; and the label dropout of the training, if one of the two or the file states it.
    """

    architecture: Architecture | SiTArchitecture
    preconditioning: NamedPreconditioning
    state: Mapping[str, Tensor]
    origin: str
    manifest: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def denoiser(self) -> Denoiser:
        """The denoiser with these weights, in evaluation mode."""
        if isinstance(self.architecture, SiTArchitecture):
            # Its state is complete, so no weights need to be drawn first, which takes seconds for the largest.
            with torch.device("meta"):
                network = self.architecture.build()
            network.load_state_dict({name: value.clone() for name, value in self.state.items()}, assign=True)
        else:
            network = self.architecture.build()
            network.load_state_dict(dict(self.state))
        return Denoiser(network, self.preconditioning).eval().requires_grad_(False)


def read_published(
    path: str | Path, preconditioning: PreconditioningName | None = None, heads: int | None = None
) -> PublishedNetwork:
    """Read a DDPM++, NCSN++, SiT or DiT network from a file, without executing anything in it.

    Args:
        path: a pickle of the EDM family, a `torch.save` file with such an object or a state dict, or a safetensors file.
        preconditioning: the one that the network was trained with; by default that of the file, or of the config.json of an
            export beside it.
        heads: of the attention of a SiT or DiT; by default those that config.json states, or of the published network of its
            width.

    Returns:
        The network, with its averaged weights if the file has them.

    Raises:
        RefusedError: naming the content that is not supported or does not fit.
        ValueError: if there is no such file, the preconditioning or the heads are neither stated nor given, or what is given
            differs from what is stated; or if the config.json, the model_index.json or the autoencoder of an export cannot
            be used.
        ImportError: if a pipeline includes an autoencoder, and diffusers is not installed.
    """
    path = Path(path)
    if preconditioning is not None:
        check_choice("preconditioning", preconditioning, get_args(PreconditioningName))
    value, name = read_weight_file(path), plain_text(path.name)
    try:
        found, where = _network(value)
        _check_sizes(found.tensors, path.stat().st_size)
        state = _plain_names(found.tensors)
        transformer = is_sit(state)
        if heads is not None and not transformer:
            raise ValueError(f"heads={heads}: {name} holds a U-Net, which shows its own attention; leave heads out.")
        stated = None if found.class_name else read_plain_config(path) or read_unet_config(path)
        if stated is not None and transformer:
            if heads not in (None, stated.heads):
                raise ValueError(
                    f"heads={heads} contradicts the config.json beside {name}, which states {stated.heads}: leave it out."
                )
            heads = stated.heads
        architecture = infer_sit(state, heads) if transformer else infer_architecture(state)
        known = _CLASSES.get(found.class_name) or _of_options(found.options)
        if found.class_name and known is None:
            raise RefusedError(
                f"its network is in a {plain_text(found.class_name)}, but only {', '.join(_CLASSES)} are supported."
            )
        tensors = {key: _float32(key, tensor) for key, tensor in state.items()}
        found_preconditioning = _preconditioning(known or preconditioning or "edm", found.attributes)
    except RefusedError as error:
        raise RefusedError(f"{name} is refused: {error}") from error
    if stated is not None:
        if preconditioning not in (None, stated.kind):
            raise ValueError(
                f"preconditioning={preconditioning} contradicts the config.json beside {name}, which states {stated.kind}: "
                "leave it out."
            )
        own = (architecture.channels, *architecture.size)
        if stated.shape != own:
            raise ValueError(
                f"the config.json beside {name} states samples of {stated.shape}, and the network takes {own}: one of the "
                "two is of another export."
            )
        return PublishedNetwork(
            architecture=architecture,
            preconditioning=stated.preconditioning,
            state=tensors,
            origin=f"{where}; preconditioning of its config.json",
            manifest=_with_autoencoder(stated),
        )
    if known is None and preconditioning is None:
        choices = "flow for SiT's weights, or ddpm for DiT's" if transformer else "edm, vp or ve"
        raise ValueError(
            f"{name} holds only weights and does not state their preconditioning: pass preconditioning={choices}."
        )
    source = found.class_name or "training's options"
    if known is not None and preconditioning not in (None, known):
        raise ValueError(f"preconditioning={preconditioning} contradicts {name} and its {source}: leave it out.")
    how = f"preconditioning of its {source}" if known else "preconditioning as given"
    return PublishedNetwork(
        architecture=architecture,
        preconditioning=found_preconditioning,
        state=tensors,
        origin=f"{where}; {how}",
        manifest=found.manifest,
    )


def _with_autoencoder(stated: ExportConfig) -> Mapping[str, Any]:
    """The manifest, with the autoencoder that a pipeline of latents includes."""
    if stated.vae is None:
        return stated.manifest
    found = Autoencoder.open(stated.vae, "cpu")
    return {**stated.manifest, "autoencoder": found.record(found.image_shape(stated.shape)).record}


def read_export(folder: Path) -> ExportConfig | None:
    """What an export states of its network.

    Args:
        folder: of a pipeline, or of plain files.

    Returns:
        None if it is of another program.

    Raises:
        ValueError: if what it states cannot be used; names the file.
    """
    if (folder / "model_index.json").is_file():
        return read_pipeline_config(folder)
    return read_plain_config(folder / "model.safetensors")


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a file of any network, float32, under their names there. Executes nothing in it.

    Args:
        path: safetensors, or a `torch.save` file or a pickle of a state dict.

    Raises:
        RefusedError: naming the content that is not supported.
        ValueError: if there is no such file.
    """
    value, name = read_weight_file(path), plain_text(path.name)
    try:
        found, _ = _network(value)
        _check_sizes(found.tensors, path.stat().st_size)
        # A state dict may also count batches.
        return {key: _float32(key, tensor) for key, tensor in found.tensors.items() if tensor.dtype in _FLOATS}
    except RefusedError as error:
        raise RefusedError(f"{name} is refused: {error}") from error


@dataclass(frozen=True)
class _Found:
    class_name: str
    attributes: Mapping[str, object]
    tensors: Mapping[str, Tensor | TensorView]
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    """Of the training, if the file has them."""
    manifest: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of the data, as far as the file states one."""


def _network(value: object) -> tuple[_Found, str]:
    """The network in a file's content, and its location there."""
    if isinstance(value, Node):
        return _of_node(value), "the pickled network"
    if isinstance(value, dict):
        entries = cast("dict[object, object]", value)
        args = entries.get("args")
        options = args.attributes if isinstance(args, Node) else {}
        for key, what in _PLACES:
            inner = entries.get(key)
            if isinstance(inner, Node):
                return _of_node(inner), f"{what}, from {key}"
            if isinstance(inner, dict) and inner:
                found = _of_dict(cast("dict[object, object]", inner))
                return replace(found, options=options), f"{what}, from {key}"
        return _of_dict(entries), "a plain state dict"
    raise RefusedError("it holds neither a network nor a dict of tensors.")


def _of_options(options: Mapping[str, object]) -> PreconditioningName | None:
    """The preconditioning that the options of SiT's training name; None if they name none."""
    path, prediction = options.get("path_type"), options.get("prediction")
    if not isinstance(path, str) or not isinstance(prediction, str):
        return None
    if (path, prediction) != ("Linear", "velocity"):
        raise RefusedError(
            f"its training's options are path {plain_text(path)} and prediction {plain_text(prediction)}, but only the "
            "path Linear and the prediction velocity are supported."
        )
    return "flow"


def _of_node(node: Node) -> _Found:
    tensors: dict[str, Tensor | TensorView] = {}
    left = [_MAX_ENTRIES]
    _collect(node, "", tensors, left, 0)
    inner = _entries(node, "_modules").get("model")
    try:
        share = stated_label_dropout(inner.attributes) if isinstance(inner, Node) else None
    except ValueError as error:
        raise RefusedError(f"{error}, which is no share of the training's rows.") from error
    manifest = {} if share is None else {"label_dropout": share}
    return _Found(node.class_name, node.attributes, tensors, manifest=manifest)


def _collect(node: Node, prefix: str, into: dict[str, Tensor | TensorView], left: list[int], depth: int) -> None:
    # A submodule may occur many times, even within itself, so count and depth are bounded.
    left[0] -= 1 + sum(len(_entries(node, kind)) for kind in ("_parameters", "_buffers", "_modules"))
    if left[0] < 0 or depth > _MAX_DEPTH:
        raise RefusedError("its modules are nested without end: it is malicious.")
    transient = node.attributes.get("_non_persistent_buffers_set")
    for kind in ("_parameters", "_buffers"):
        for name, value in _named(node, kind):
            if kind == "_buffers" and isinstance(transient, set) and name in cast("set[object]", transient):
                continue
            if isinstance(value, Array) and value.view is not None:
                value = value.view
            if isinstance(value, TensorView):
                into[prefix + name] = value
            elif value is not None:
                raise RefusedError(f"{plain_text(prefix + name)} is not a tensor.")
    for name, value in _named(node, "_modules"):
        if isinstance(value, Node):
            _collect(value, f"{prefix}{name}.", into, left, depth + 1)
        elif value is not None:
            raise RefusedError(f"{plain_text(prefix + name)} is not a module.")


def _entries(node: Node, kind: str) -> dict[object, object]:
    entries = node.attributes.get(kind, {})
    if not isinstance(entries, dict):
        raise RefusedError(f"the {kind} of its {plain_text(node.class_name)} are not a dict.")
    return cast("dict[object, object]", entries)


def _named(node: Node, kind: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in _entries(node, kind).items():
        if not isinstance(name, str) or len(name) > 100:
            raise RefusedError(f"the {kind} of its {plain_text(node.class_name)} have a key that is not a name.")
        found.append((name, value))
    return found


def _of_dict(entries: dict[object, object]) -> _Found:
    tensors: dict[str, Tensor | TensorView] = {}
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, Tensor | TensorView):
            raise RefusedError(
                f"it is a dict whose entry {plain_text(name)} is not a tensor: neither a network nor a state dict."
            )
        tensors[name] = value
    return _Found("", {}, tensors)


def _check_sizes(tensors: Mapping[str, Tensor | TensorView], size: int) -> None:
    """Check that the tensors together are no larger than the file.

    All of them may be views of one storage, and a tensor without elements may have other axes of any length.
    """
    if len(tensors) > MAX_TENSORS:
        raise RefusedError(f"it has {len(tensors):,} tensors; a network has no more than {MAX_TENSORS:,}.")
    total = 0
    for name, value in tensors.items():
        if isinstance(value, TensorView):
            value.check()
        if 0 in value.shape or len(value.shape) > MAX_AXES:
            raise RefusedError(
                f"{plain_text(name)} has no elements, or more than {MAX_AXES} axes: weights have neither."
            )
        total += math.prod(value.shape) * value.dtype.itemsize
    if total > size:
        raise RefusedError(
            f"its tensors take {total:,} bytes, but the file has {size:,}: they are views of the same memory. "
            "Save the state dict with a copy of each tensor."
        )


def _plain_names(tensors: Mapping[str, Tensor | TensorView]) -> Mapping[str, Tensor | TensorView]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _float32(name: str, value: Tensor | TensorView) -> Tensor:
    tensor = value.tensor() if isinstance(value, TensorView) else value
    if tensor.dtype not in _FLOATS:
        raise RefusedError(
            f"{plain_text(name)} has dtype {tensor.dtype}, but weights are floating point of 16 to 64 bits."
        )
    # Check in float32, where large numbers of float64 are infinite.
    tensor = tensor.float().contiguous()
    if not bool(tensor.isfinite().all()):
        raise RefusedError(f"{plain_text(name)} holds NaN, infinite values, or values too large for float32.")
    return tensor


def _preconditioning(kind: PreconditioningName, attributes: Mapping[str, object]) -> NamedPreconditioning:
    def number(name: str, default: float) -> float:
        value = attributes.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise RefusedError(f"its {name} is not a number of a plausible size.")
        return float(value)

    try:
        match kind:
            case "edm":
                return EDMPreconditioning(number("sigma_data", 0.5))
            case "vp":
                return VPPreconditioning(number("beta_min", 0.1), number("beta_d", 19.9), int(number("M", 1000)))
            case _:  # without numbers in a file
                return PRECONDITIONINGS[kind]()
    except RefusedError:
        raise
    except ValueError as error:
        raise RefusedError(f"the numbers of its preconditioning cannot be used: {error}") from error
