"""Autoencoders: images to the moments of their latents, and latents back to images.

The encoder of a variational autoencoder maps an image to a normal distribution of its latent, with a mean and a standard
deviation for each number; the decoder maps a latent to an image. An `Autoencoder` is diffusers' AutoencoderKL, read from
safetensors. Its sha256 covers the weights and the settings, whatever the folder, the name or the kind of file.

References:
    Kingma, Welling, "Auto-Encoding Variational Bayes", ICLR 2014; Rombach, Blattmann, Lorenz, Esser, Ommer,
    "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022.
"""

import hashlib
import inspect
import json
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._shapes import check_kind, found_device
from stablefield.data._scaling import Scaling
from stablefield.sampling._seeded_images import to_uint8

__all__ = ["Autoencoder", "AutoencoderRecord"]

_EXTRA = 'pip install "stablefield[diffusers]"'
_WANTED = "the folder to which diffusers' AutoencoderKL was saved (config.json and safetensors), or its name on a hub"
# Pixels that are decoded at a time: a decoder keeps some kilobytes for each.
_PIXELS = 2**20
_STATISTICS = ("latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecord:
    """The autoencoder of encoded images, in their manifest and in the configuration of a run on them.

    Raises:
        ValueError: if a value is invalid.
    """

    place: str
    """Its folder, or its name on a hub."""
    sha256: str
    """Checksum of its weights and settings."""
    scaling_factor: float
    """Its own scaling: networks that were trained with it see (latent - shift_factor) * scaling_factor, or, with statistics
    of each channel, (latent - latents_mean) * scaling_factor / latents_std, as in diffusers' pipelines."""
    shift_factor: float
    """See scaling_factor."""
    shape: tuple[int, ...]
    """Shape of an image, (C, H, W)."""
    latents_mean: tuple[float, ...] = ()
    """Mean of each channel of its latents, if it states them."""
    latents_std: tuple[float, ...] = ()
    """Standard deviation of each channel, likewise."""

    def __post_init__(self) -> None:
        texts = isinstance(self.place, str) and isinstance(self.sha256, str) and len(self.sha256) == 64
        numbers = all(
            isinstance(value, int | float) and math.isfinite(value)
            for value in (self.scaling_factor, self.shift_factor, *self.latents_mean, *self.latents_std)
        )
        numbers = numbers and len(self.latents_mean) == len(self.latents_std) and min(self.latents_std, default=1) > 0
        sides = len(self.shape) == 3 and all(type(side) is int and side > 0 for side in self.shape)
        if not texts or not numbers or not self.scaling_factor > 0 or not sides or self.shape[0] not in (1, 3):
            raise ValueError(f"an autoencoder is recorded as {str(self)[:200]}")

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Self | None:
        """The record in the manifest of a set; None if the set is not of latents of images.

        Raises:
            ValueError: if the manifest has one that is invalid.
        """
        entry = manifest.get("autoencoder")
        if entry is None:
            return None
        try:
            found = dict(cast("dict[str, Any]", entry))
            lists: dict[str, Any] = {name: tuple(found.get(name) or ()) for name in _STATISTICS}
            return cls(**found | lists | {"shape": tuple(found["shape"])})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"its autoencoder is damaged ({error})") from error

    def differs(self, other: "AutoencoderRecord | None") -> bool:
        """Whether latents of another record are of another autoencoder; not if there is no such record."""
        return other is not None and other.sha256 != self.sha256

    @property
    def record(self) -> dict[str, Any]:
        """The record as JSON values."""
        found = asdict(self) | {"shape": list(self.shape)}
        for name in _STATISTICS:
            values = found.pop(name)
            if values:  # earlier versions read the record of an autoencoder without them
                found[name] = list(values)
        return found

    def scaling(self, channels: int, dtype: str) -> Scaling:
        """The autoencoder's own scaling of latents of so many channels.

        Raises:
            ValueError: if it states statistics of another number of channels.
        """
        if not self.latents_std:
            return Scaling.of_factor(self.scaling_factor, self.shift_factor, channels, dtype)
        if len(self.latents_std) != channels:
            raise ValueError(
                f"the autoencoder has latents_mean and latents_std of {len(self.latents_std)} channels, and its latents "
                f"have {channels}: repair its config.json."
            )
        std = tuple(0.5 * value / self.scaling_factor for value in self.latents_std)
        return Scaling(mean=self.latents_mean, std=std, dtype=dtype)

    def open(self, vae: str | Path | None = None, device: torch.device | str | None = None) -> "Autoencoder":
        """Open this autoencoder.

        Args:
            vae: its new place, if it has moved.
            device: where to compute; a GPU if there is one.

        Raises:
            ValueError: if it is not there, or another one is.
            ImportError: if diffusers is not installed.
        """
        place = self.place if vae is None or vae == "" else str(vae)
        if not place:
            raise ValueError(
                f"vae is missing: these latents were imported without the place of their autoencoder (sha256 "
                f"{self.sha256:.12}): name it."
            )
        moved = Path(place).is_absolute() and not Path(place).exists()
        if moved and not vae:
            raise ValueError(
                f"vae is missing: the autoencoder of these latents was {place}, which is gone: name its new place."
            )
        found = Autoencoder.open(place, device)
        self.check(found, f"vae={place}")
        return found

    def check(self, found: "Autoencoder", name: str = "vae") -> None:
        """Check that an open autoencoder, called `name` in the error, is this one.

        Raises:
            ValueError: if it is another one.
        """
        if found.sha256 != self.sha256:
            raise ValueError(
                f"{name} has weights or settings of sha256 {found.sha256:.12}, and the latents were made by "
                f"{self.sha256:.12}: name the place of that autoencoder."
            )


class Autoencoder:
    """A variational autoencoder of images.

    Args:
        model: diffusers' AutoencoderKL.
        place: its folder, or its name on a hub.
        device: where to compute; a GPU if there is one.

    Attributes:
        model: diffusers' model, in evaluation mode.
        place: its folder, or its name on a hub.
        sha256: checksum of its weights and settings.
    """

    def __init__(self, model: Any, place: str = "", device: torch.device | str | None = None) -> None:
        self.sha256 = _checksum(model)
        self.device = found_device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.place = place

    @classmethod
    def open(cls, vae: str | Path, device: torch.device | str | None = None) -> Self:
        """Open an AutoencoderKL from its folder, from that of a pipeline, or from a hub.

        Args:
            vae: the folder; or OWNER/NAME, or OWNER/NAME/SUBFOLDER.
            device: where to compute; a GPU if there is one.

        Raises:
            ValueError: if there is none, its weights are no safetensors, or do not fit its config.json.
            ImportError: if diffusers is not installed.
        """
        check_kind("vae", vae, (str, Path), _WANTED)
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(f"an autoencoder needs diffusers: {_EXTRA}.") from error
        kind: Any = diffusers.AutoencoderKL
        path, options = Path(vae).expanduser(), dict[str, Any]()
        place = str(path.resolve()) if path.is_dir() else str(vae)
        name = place
        if path.is_dir():
            if not (path / "config.json").is_file() and (path / "vae" / "config.json").is_file():
                place = name = str(path.resolve() / "vae")
        elif path.is_absolute() or path.exists() or not 1 <= place.count("/") <= 2 or place.startswith("."):
            raise ValueError(f"vae={vae} is not there: name {_WANTED}.")
        elif place.count("/") == 2:
            name, _, options["subfolder"] = place.rpartition("/")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config: Any = kind.load_config(name, **options)
                if config.get("_class_name") != "AutoencoderKL":
                    raise ValueError(
                        f"its config.json is of {str(config.get('_class_name'))[:80]}, not of an AutoencoderKL"
                    )
                model, report = kind.from_pretrained(
                    name, use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32, **options
                )
            wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
            if wrong:
                raise ValueError(f"its weights do not fit its config.json, such as {str(wrong[0])[:80]}")
        except Exception as error:
            # diffusers, the hub's client and safetensors raise errors of many kinds.
            text = " ".join(str(error).split()).removesuffix(".")[:300]
            raise ValueError(f"vae={vae} cannot be used ({text}): name {_WANTED}.") from error
        return cls(model, place, device)

    @property
    def factor(self) -> int:
        """By how much the sides of an image are larger than those of its latent."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.model.config.latent_channels)

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the image of a latent of `shape` (C, h, w)."""
        return int(self.model.config.out_channels), *(side * self.factor for side in shape[1:])

    def unscaled(self, x: Tensor) -> Tensor:
        """Latents of the values of a network that was trained with the autoencoder's own scaling."""
        return self.record(self.image_shape((self.channels, 1, 1))).scaling(self.channels, "float32").undo(x)

    def record(self, shape: tuple[int, ...]) -> AutoencoderRecord:
        """The record for images of `shape` (C, H, W)."""
        config = self.model.config
        mean, std = self._statistics()
        return AutoencoderRecord(
            place=self.place,
            sha256=self.sha256,
            scaling_factor=float(config.scaling_factor),
            shift_factor=float(getattr(config, "shift_factor", None) or 0.0),
            shape=(int(config.out_channels), *shape[1:]),
            latents_mean=mean,
            latents_std=std,
        )

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and the standard deviation of each channel, empty if its config.json does not state both."""
        mean, std = (getattr(self.model.config, name, None) or () for name in _STATISTICS)
        if not mean or not std:  # as diffusers has it, one without the other does nothing
            return (), ()
        try:
            found = tuple(map(float, mean)), tuple(map(float, std))
        except (TypeError, ValueError):
            found = (), ()
        finite = all(map(math.isfinite, (*found[0], *found[1])))
        if not finite or {len(part) for part in found} != {self.channels} or min(found[1]) <= 0:
            raise ValueError(
                f"vae={self.place}: its config.json has latents_mean {str(mean)[:80]} and latents_std {str(std)[:80]}: "
                f"repair it, with a number for each of the {self.channels} channels, and those of latents_std above 0."
            )
        return found

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latent of an image of `shape` (C, H, W).

        Raises:
            ValueError: if the autoencoder does not take such images.
        """
        config, factor = self.model.config, self.factor
        _, height, width = shape
        if height % factor or width % factor:
            near = max(factor, min(height, width) // factor * factor)
            raise ValueError(
                f"images of {width} x {height} pixels do not fit the autoencoder, whose latents are {factor} times smaller: "
                f"pass resolution={near}, or another multiple of {factor}."
            )
        if int(config.in_channels) not in (shape[0], 3) or int(config.out_channels) not in (1, 3):
            raise ValueError(
                f"the autoencoder takes {config.in_channels} channels and returns {config.out_channels}, and the images "
                f"have {shape[0]}: take one for such images."
            )
        return self.channels, height // factor, width // factor

    @torch.no_grad()
    def moments(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of the latents of images.

        Args:
            images: uint8, shape (B, C, H, W); grey ones are repeated for an autoencoder of colours.

        Returns:
            Two arrays (B, latent channels, h, w), not scaled.
        """
        pixels = torch.from_numpy(np.array(images)).to(self.device).float() / 127.5 - 1
        if pixels.shape[1] == 1 and self.model.config.in_channels == 3:
            pixels = pixels.expand(-1, 3, -1, -1)
        found = self.model.encode(pixels).latent_dist
        mean, std = found.mean.float().cpu().numpy(), found.std.float().cpu().numpy()
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor | NDArray[Any]) -> Tensor:
        """Images, uint8 (B, C, H, W) on the CPU, of latents (B, channels, h, w), not scaled."""
        given = latents if isinstance(latents, Tensor) else torch.from_numpy(np.array(latents))
        size = max(1, _PIXELS // (self.factor**2 * math.prod(given.shape[2:])))
        parts = [torch.empty((0, *self.image_shape(tuple(given.shape[1:]))))]
        parts += [self.model.decode(part.to(self.device).float()).sample.float().cpu() for part in given.split(size)]
        return to_uint8(torch.cat(parts))

    def decoding_seconds(self, shape: tuple[int, ...], count: int) -> float:
        """Estimate how long decoding takes for `count` latents of `shape`, from a trial."""
        few = min(4, count)
        latents = torch.zeros(few, *shape)
        self.decode(latents)  # the first call is slower
        began = time.perf_counter()
        self.decode(latents)
        return (time.perf_counter() - began) * count / few


def _checksum(model: Any) -> str:
    """The sha256 of a model's weights and of the settings that are not the defaults.

    A newer diffusers may have more settings, and writes their defaults into a saved config.json.
    """
    defaults = {name: one.default for name, one in inspect.signature(type(model).__init__).parameters.items()}
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dict(model.config).items()
        if not name.startswith("_") and name not in ("sample_size", "force_upcast")
    }
    changed = {
        name: value
        for name, value in settings.items()
        if name in defaults and value != (list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name])
    }
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
