"""Sources of initial weights: a run, an export or a file, and how its tensors get into another network.

Tensors are matched by name. Three differences between the two networks are bridged:

- wrappers, which put a prefix before all names;
- the resolution, which is part of a U-Net's names: levels are matched from the full resolution down;
- the classes: the parts of a class embedding are copied class by class.

Buffers of another shape, constants of the size of the images, stay those of the network.

Weights also depend on what they were trained in: the preconditioning, and the scaling of float data. Runs and exports state
both. A run on float data takes the source's scaling if that fits its data; any other difference is a note.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from stablefield._regular_file import read_limited, reason, sha256
from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._image_set import ImageSet, distinct_names
from stablefield.data._scaling import Scaling
from stablefield.diffusion._preconditioning import Denoiser, Preconditioning
from stablefield.networks._diffusers_unet import DiffusersUNet
from stablefield.networks._sit import SiT
from stablefield.networks._song_unet import SongUNet
from stablefield.training._files import read_tensors
from stablefield.training._initial_weights import InitialWeights
from stablefield.training._model import build_denoiser
from stablefield.training._recipe import Recipe
from stablefield.training._records import parse
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import HasFolder, RunFolder

__all__ = ["WeightSource", "copied_weights", "open_weights", "side_of"]

_BYTES = "images, whose bytes v mean v / 127.5 - 1"
_WANTED = "name the folder of a run or an export, or a file with a state dict (.safetensors, .pt, .pth)"
_DIFFUSERS = "diffusion_pytorch_model.safetensors"
_NEAR, _NARROW = 4.0, 1 / 20
"""Float data seem to be in the source's units, and take its scaling, if in each channel the deviation is not above `_NEAR`
times the source's, nor below `_NARROW` times, and the mean not farther off than `_NEAR` times."""
_LISTED = 3
"""Channels of a scaling that a note names."""
_UNET2D = (
    *("act_fn", "attention_head_dim", "attn_norm_num_groups", "center_input_sample", "downsample_padding"),
    *("flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "norm_eps", "norm_num_groups"),
)
"""Settings of diffusers' UNet2DModel that change what it computes, and no shape of its weights."""
_LEVEL = re.compile(r"(?<![\w])(enc|dec)\.(\d+)x(\d+)_")


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where initial weights are from; the weights are read later.

    Attributes:
        path: the folder or the file, as the caller gave it.
        file: the file with the weights; None for a run, which has those of its newest checkpoint.
        recipe: the recipe of a run.
        shape: shape of one image, (C, H, W), if known.
        class_names: names of the classes, if known.
        preconditioning: in which the weights were trained, if known.
        scaling: of the data that they were trained on; None for images, and if unknown.
        autoencoder: of the latents that they were trained on, if known.
        settings: of the network that no shape of its weights shows, by name, as far as they are known.
        published: whether it is an imported network that sees latents in the scaling of their autoencoder, as far as its
            file states one; or an export of one.
    """

    path: Path
    file: Path | None = None
    recipe: Recipe | None = None
    shape: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    preconditioning: Preconditioning | None = None
    scaling: Scaling | None = None
    autoencoder: AutoencoderRecord | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    published: bool = False

    def recipe_for(self, data: ImageSet) -> Recipe | None:
        """The run's recipe for other data: references and noise band anew, classes only if the data have labels.

        A published network expects latents of images in the scaling of their autoencoder.
        """
        recipe = self.recipe
        if recipe is None:
            return None
        return replace(
            recipe,
            references="auto",
            noise_band="auto",
            batch=min(recipe.batch, len(data) * recipe.draws_per_image),
            conditional=recipe.conditional and data.labels is not None,
            latent_scaling=(
                "measured" if data.autoencoder is None else "autoencoder" if self.published else recipe.latent_scaling
            ),
        )

    def scaling_for(self, data: ImageSet) -> Scaling | None:
        """The source's scaling for other data, if they have its channels and seem to be in its units; else None.

        What the weights expect is a value by the source's scaling. In other units, such as another factor, that would be far
        from all that they have seen.
        """
        theirs, own = self.scaling, data.scaling
        if theirs is None or own is None or len(theirs.mean) != len(own.mean):
            return None
        mean, std, own_mean, own_std = (np.array(part) for part in (theirs.mean, theirs.std, own.mean, own.std))
        if np.any((std == 0) & (own_std > 0)):
            return None  # it would take away all that the channel holds
        varying = (std > 0) & (own_std > 0)
        # One channel in other units is not to hide among the rest. A part of the source's data may vary little.
        spread, moved = own_std[varying] / std[varying], np.abs(own_mean - mean)[varying] / std[varying]
        near = (spread >= _NARROW) & (spread <= _NEAR) & (moved <= _NEAR)
        return replace(theirs, dtype=own.dtype) if near.all() else None

    def read(self) -> tuple[dict[str, Tensor], str, str]:
        """The tensors by name, the checksum of their file, and which weights these are, in words.

        Raises:
            ValueError: if the file holds no weights, or a run has no checkpoint.
        """
        try:
            if self.file is None:
                found = RunFolder(self.path).read_newest(_averages)
                if found is None:
                    raise ValueError("the run has no checkpoint yet: let it train for longer")
                (tensors, checksum), state, _ = found
                return tensors, checksum, f"step {state.step:,}, average half-life"
            # A run may begin with weights of other programs, whose files `interop` reads without executing anything.
            from stablefield.interop._published import read_state

            return read_state(self.file), sha256(self.file), self.file.name
        except (OSError, ValueError) as error:
            raise ValueError(
                f"init={self.path} has no weights to begin with: {reason(error)}. Else {_WANTED}."
            ) from error


def open_weights(init: str | Path | HasFolder) -> WeightSource:
    """Open a source of initial weights, without reading the weights.

    Args:
        init: a run or its folder; a folder that `Run.export` wrote; a file of safetensors or of `torch.save` with a state
            dict, such as the model.safetensors in a run's checkpoint.

    Raises:
        ValueError: if there is none.
        TypeError: if `init` is none of these.
    """
    path = Path(init) if isinstance(init, str | Path) else getattr(init, "path", None)
    if not isinstance(path, Path):
        raise TypeError(f"init is {type(init).__name__}: pass a run, or {_WANTED}.")
    if path.is_file():
        return WeightSource(
            path=path, file=path, settings=_stated_settings(path.parent) if path.name == _DIFFUSERS else {}
        )
    if not path.is_dir():
        raise ValueError(f"init={path} does not exist: {_WANTED}.")
    try:
        if (path / "model_index.json").is_file():
            names: Any = parse(read_limited(path / "model_index.json")).get("id2label")
            ordered = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else None
            return _exported(path, path / "unet" / _DIFFUSERS, _names(ordered))
        if (path / _DIFFUSERS).is_file():
            return WeightSource(path=path, file=path / _DIFFUSERS, settings=_stated_settings(path))
        if (path / "model.safetensors").is_file():
            config = parse(read_limited(path / "config.json")) if (path / "config.json").is_file() else {}
            return _exported(path, path / "model.safetensors", _names(config.get("class_names")))
        run = RunFolder.open(path).config()
    except (OSError, ValueError) as error:
        why = str(error).removesuffix(".")  # names the file in the folder
        raise ValueError(f"init={path} cannot be used: {why}. Else {_WANTED}.") from error
    scaling, record = run.scaling, run.autoencoder
    published = "imported" in run.manifest
    if published and scaling is not None:
        published = record is not None and scaling == record.scaling(run.shape[0], scaling.dtype)
    return WeightSource(
        path=path,
        recipe=run.recipe,
        shape=run.shape,
        class_names=run.class_names,
        preconditioning=run.recipe.preconditioning,
        scaling=scaling,
        autoencoder=record,
        settings=_settings(_empty_network(run)),
        published=published,
    )


def side_of(source: WeightSource | None) -> int | None:
    """The side of a source's images, the longer one, if known."""
    return None if source is None or source.shape is None else max(source.shape[1:], default=None)


def copied_weights(
    source: WeightSource, config: RunConfig, measured: Scaling | None
) -> tuple[Denoiser, InitialWeights]:
    """The denoiser of a run with the weights of a source, and what was copied.

    Args:
        source: the source.
        config: of the run, with the scaling that it has.
        measured: the scaling that its data alone would have; None for images.

    Raises:
        ValueError: if the source has no weights, none of the network's tensors, or one of another shape.
    """
    tensors, checksum, weights = source.read()
    denoiser = build_denoiser(config)
    state: dict[str, Tensor] = denoiser.network.state_dict()
    matched = _matched(state, tensors)
    if not matched:
        raise ValueError(
            f"init={source.path} has no tensor of this network: it has {_some(tensors)}, and the network {_some(state)}. "
            f"To continue, {_remedy(source, config)}."
        )
    axes, constants = _class_axes(config), {name for name, _ in denoiser.network.named_buffers()}
    for name, found in list(matched.items()):
        shapes = [list(value.shape) for value in (tensors[found], state[name])]
        if name in axes and len(shapes[0]) == len(shapes[1]):
            shapes[0][axes[name]] = shapes[1][axes[name]]
        if shapes[0] != shapes[1] and name in constants:
            del matched[name]  # a constant of the size of the images, such as an embedding of places
        elif shapes[0] != shapes[1]:
            raise ValueError(
                f"init={source.path} has {found} of shape {tuple(tensors[found].shape)}, and this network {name} of shape "
                f"{tuple(state[name].shape)}: {_remedy(source, config)}."
            )
    if random := sorted(_random_constants(config, constants & set(state) - set(matched))):
        raise ValueError(
            f"init={source.path} lacks {random[0]}, which is drawn at random and never trained: other weights are of no use "
            "without it. Name a run, or the model.safetensors of a checkpoint; or make the average again."
        )
    parts = {name: axis for name, axis in axes.items() if name in matched}
    sizes = [tensors[matched[name]].shape[axis] - _extra(state[name], axis, config) for name, axis in parts.items()]
    if len(set(sizes)) > 1:
        counts = " and ".join(map(str, sorted(set(sizes))))
        raise ValueError(f"init={source.path} has tensors for {counts} classes: {_remedy(source, config)}.")
    own, theirs, named = _labels(source, config, max(sizes, default=0))
    notes = _notes(source, config, measured, by_number=bool(parts) and not named)
    for name, value in _settings(denoiser.network).items():
        if name in source.settings and source.settings[name] != value:
            notes.append(
                f"the source's network has {name} {source.settings[name]}, this run's {value}, which no weight shows: with "
                "the copied weights it computes something else than the source."
            )
    for name, found in list(matched.items()):
        if name not in parts:
            state[name] = tensors[found]
            continue
        axis, value = parts[name], tensors[found].to(state[name].dtype)
        rows = {number: theirs.index(label) for number, label in enumerate(own) if label in theirs}
        for k in range(1, _extra(state[name], axis, config) + 1):  # what stands for no class comes last
            rows[state[name].shape[axis] - k] = value.shape[axis] - k
        if not rows:
            del matched[name]
            continue
        factor = 1.0
        if isinstance(denoiser.network, SongUNet) and len(theirs) != len(own):
            # It multiplies this weight by the root of the number of classes.
            factor = math.sqrt(len(theirs) / len(own))
            notes.append(f"{name} is copied times {factor:.3g}, as {len(theirs)} classes became {len(own)}.")
        kept = value.index_select(axis, torch.tensor(list(rows.values())))
        state[name].index_copy_(axis, torch.tensor(list(rows)), factor * kept)
    denoiser.network.load_state_dict(state)
    return denoiser, InitialWeights(
        source=str(source.path),
        weights=weights,
        sha256=checksum,
        copied=len(matched),
        tensors=len(state),
        classes=tuple(label for label in own if label in theirs),
        new_classes=tuple(label for label in own if label not in theirs),
        dropped_classes=tuple(label for label in theirs if label not in own),
        fresh=tuple(name for name in state if name not in matched),
        unused=tuple(sorted(set(tensors) - set(matched.values()))),
        notes=tuple(notes),
    )


def _exported(path: Path, file: Path, class_names: tuple[str, ...] | None) -> WeightSource:
    """An export, with what it states if it is one of ours."""
    from stablefield.interop._published import read_export

    stated = read_export(path)
    return WeightSource(
        path=path,
        file=file,
        class_names=class_names,
        preconditioning=None if stated is None else stated.preconditioning,
        scaling=None if stated is None else Scaling.of_manifest(stated.manifest),
        autoencoder=None if stated is None else AutoencoderRecord.of_manifest(stated.manifest),
        settings=_stated_settings(file.parent) if stated is None or stated.heads is None else {"heads": stated.heads},
        published=stated is not None and "scaling" not in stated.manifest and stated.shape[0] not in (1, 3),
    )


def _empty_network(config: RunConfig) -> nn.Module:
    """The network of a run without its weights."""
    recipe = config.recipe
    with torch.device("meta"):
        return recipe.network.build(config.shape, config.classes, recipe.augment_dim, torch.Generator())


def _settings(network: nn.Module) -> dict[str, Any]:
    """The settings of a network that no shape of its weights shows, by name."""
    if isinstance(network, SiT):
        return {"heads": network.heads}
    if isinstance(network, DiffusersUNet):
        found: Any = network.unet.config
        return {name: found[name] for name in _UNET2D if name in found}
    return {}


def _stated_settings(folder: Path) -> dict[str, Any]:
    """Those that the config.json beside the network of a pipeline states."""
    from stablefield.interop._published import stated_heads

    try:
        found = parse(read_limited(folder / "config.json"))
        heads = stated_heads(found)
    except (OSError, ValueError):
        return {}  # of another program, or none
    if found.get("_class_name") == "UNet2DModel":
        return {name: found[name] for name in _UNET2D if name in found}
    return {} if heads is None else {"heads": heads}


def _averages(checkpoint: Path) -> tuple[dict[str, Tensor], str]:
    file = checkpoint / "ema.safetensors"
    return read_tensors(file), sha256(file)


def _names(entry: object) -> tuple[str, ...] | None:
    return (
        distinct_names([str(one) for one in cast("list[object]", entry)]) if isinstance(entry, list) and entry else None
    )


def _matched(wanted: Collection[str], found: Collection[str]) -> dict[str, str]:
    """The names in `found` for those in `wanted`, below the prefix that fits most of them."""
    # A wrapper's prefix may be on either side.
    own = _common_prefix(wanted)
    short = {levelled.removeprefix(own): name for levelled, name in _levelled(wanted).items()}
    theirs = _levelled(found)
    counts = Counter(prefix for name in theirs for prefix, rest in _splits(name) if rest in short)
    if not counts:
        return {}
    # Of equally many, the averages of a file that has both.
    best = max(counts, key=lambda prefix: (counts[prefix], "ema" in prefix, -len(prefix)))
    return {name: theirs[best + rest] for rest, name in short.items() if best + rest in theirs}


def _common_prefix(names: Collection[str]) -> str:
    first, *others = {name.partition(".")[0] for name in names}
    return f"{first}." if not others and all("." in name for name in names) else ""


def _splits(name: str) -> Iterator[tuple[str, str]]:
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _levelled(names: Collection[str]) -> dict[str, str]:
    """The names by themselves with the level of a U-Net, counted from the full resolution, instead of the resolution."""
    places = {name: _LEVEL.search(name) for name in names}
    sides = sorted({(int(place[2]), int(place[3])) for place in places.values() if place}, reverse=True)
    level = {side: number for number, side in enumerate(sides)}
    return {
        name
        if place is None
        else f"{name[: place.start()]}{place[1]}.level{level[int(place[2]), int(place[3])]}_{name[place.end() :]}": name
        for name, place in places.items()
    }


def _random_constants(config: RunConfig, names: Collection[str]) -> set[str]:
    """Those of the network's buffers `names` that another seed changes, such as random Fourier frequencies."""
    if not names:
        return set()
    one, other = (
        build_denoiser(replace(config, recipe=replace(config.recipe, seed=seed))).network.state_dict()
        for seed in (0, 1)
    )
    return {name for name in names if not torch.equal(one[name], other[name])}


def _class_axes(config: RunConfig) -> dict[str, int]:
    """The tensors of the network that have a part for each class, and along which axis: one more class changes them."""
    recipe = config.recipe
    with torch.device("meta"):
        few, more = (
            recipe.network.build(config.shape, classes, recipe.augment_dim, torch.Generator()).state_dict()
            for classes in (config.classes, config.classes + 1)
        )
    return {
        name: axis
        for name, value in few.items()
        for axis, size in enumerate(value.shape)
        if more[name].shape[axis] == size + 1
    }


def _extra(value: Tensor, axis: int, config: RunConfig) -> int:
    """How many parts of a class embedding stand for no class."""
    return value.shape[axis] - config.classes


def _labels(source: WeightSource, config: RunConfig, count: int) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Labels of the classes of the network and of the `count` classes of the source, and whether they are names."""
    own, theirs = config.class_names, source.class_names
    numbers, their_numbers = (tuple(map(str, range(classes))) for classes in (config.classes, count))
    if not config.classes:
        return (), theirs or their_numbers, True
    if count == 0:
        return own or numbers, (), True
    if own is not None and theirs is not None and len(theirs) == count:
        return own, theirs, True
    return numbers, their_numbers, False


def _notes(source: WeightSource, config: RunConfig, measured: Scaling | None, *, by_number: bool) -> list[str]:
    notes: list[str] = []
    if by_number:
        notes.append("the classes are matched by number, because the source or the data have no names for them.")
    theirs, own = source.preconditioning, config.recipe.preconditioning
    if theirs is not None and theirs != own:
        notes.append(f"the source was trained in {theirs}, this run trains in {own}.")
    encoder, other = config.autoencoder, source.autoencoder
    if encoder is not None and other is not None and encoder.differs(other):
        notes.append(
            f"the source was trained on latents of the autoencoder {other.sha256:.12}, this run trains on those of "
            f"{encoder.sha256:.12}: the copied weights see other values than they were trained on."
        )
    return [*notes, *_scaling_notes(source, config, measured)]


def _scaling_notes(source: WeightSource, config: RunConfig, measured: Scaling | None) -> list[str]:
    """What the copied weights saw of their data, if this run's differ, or would have."""
    theirs, own = source.scaling, config.scaling
    if source.preconditioning is None or (theirs is None and own is None):
        return []  # a file of weights alone states nothing
    if theirs is None and source.published:
        if config.autoencoder is not None and config.recipe.latent_scaling == "autoencoder":
            return []
        return [f"the source does not state its scaling, and this run has its own: {_text(own)}."]
    if own is None:
        return [f"the source was trained on float data, scaled from {_text(theirs)}, and this run trains on {_BYTES}."]
    if theirs is None:
        return [f"the source was trained on {_BYTES}, and this run trains on float data, scaled from {_text(own)}."]
    if _alike(theirs, own):
        if measured is None or _alike(theirs, measured):
            return []
        return [f"scaling: that of the source, {_text(theirs)}; that of the data alone would be {_text(measured)}."]
    return [
        f"the source was trained with another scaling, {_text(theirs)}, than this run, {_text(own)}: if the two are other "
        "units of the same, that is right; else the copied weights see other values than they were trained on."
    ]


def _alike(one: Scaling, other: Scaling) -> bool:
    """Whether two scalings give the same values, whatever the dtype of the data."""
    return (one.mean, one.std) == (other.mean, other.std)


def _text(scaling: Scaling | None) -> str:
    """The mean and the standard deviation of the first channels."""
    assert scaling is not None
    parts: list[str] = []
    for name, values in (("mean", scaling.mean), ("std", scaling.std)):
        shown = values[:1] if len(set(values)) == 1 else values[:_LISTED]
        more = "" if len(shown) in (1, len(values)) else f" and {len(values) - len(shown):,} more"
        parts.append(f"{name} {', '.join(f'{value:.4g}' for value in shown)}{more}")
    return ", ".join(parts)


def _remedy(source: WeightSource, config: RunConfig) -> str:
    """How to get a network that the source fits."""
    if source.recipe is None or source.shape is None:
        return "give the network the settings that the source had"
    theirs, own = source.recipe, config.recipe
    if theirs.network != own.network:
        return f"leave the settings of the network out, for those of the source, {theirs.network}"
    if len(source.shape) != 3 or len(config.shape) != 3:
        return f"train on samples of {' x '.join(map(str, source.shape))}, as the source"
    if source.shape[0] != config.shape[0]:
        return f"train on images of {source.shape[0]} channels, as the source"
    height, width = source.shape[1:]
    return f"train on images of its size, resolution={height if height == width else (height, width)}"


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3])
