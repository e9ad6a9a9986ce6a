"""Latents of images: encode a set of images once, train on the latents, and decode them.

`encode` writes a folder (see `_latent_folder`), `decode` makes an image set of it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from stablefield._progress import Progress
from stablefield._shapes import check_callable, check_kind, flag, whole_number
from stablefield.data._autoencoder import Autoencoder, AutoencoderRecord
from stablefield.data._collector import MEMORY_BUDGET, cache_folder
from stablefield.data._image_set import ImageSet, Origin
from stablefield.data._latent_folder import KINDS, LatentFolder, open_latents
from stablefield.data._resizing import gathered_set

__all__ = ["decode", "encode"]


def encode(
    images: ImageSet,
    out: str | Path,
    *,
    vae: str | Path | Autoencoder,
    batch: int = 16,
    mirror: bool = False,
    dtype: Literal["float16", "float32"] = "float16",
    device: torch.device | str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> ImageSet:
    """Write the latents of images to a folder, or go on with a folder where an earlier call was stopped.

        photos = sf.data.open_images("photos", resolution=256)
        latents = sf.data.encode(photos, "latents", vae="stabilityai/sd-vae-ft-ema", mirror=True)
        run = sf.train(latents)

    Args:
        images: the images, as `open_images` returns.
        out: the folder, new or of an earlier call with the same images and settings.
        vae: the folder of a diffusers AutoencoderKL, its name on a hub (OWNER/NAME or OWNER/NAME/SUBFOLDER), or an open one.
        batch: images at a time; changes the latents only by the encoder's rounding.
        mirror: also encode the mirrored images, for training with `mirror=True`.
        dtype: of what is written. float16 rounds a mean by at most its 2048th part.
        device: where to compute; a GPU if there is one.
        progress: called after each batch with the number of images that are encoded.

    Returns:
        The latents, as `open_images(out)` opens them. If all were encoded before, the call only notes the place of the
        autoencoder, which may have moved.

    Raises:
        ValueError: if the autoencoder cannot be used or does not take images of this shape, or the folder holds other data,
            or latents of other images or settings, or cannot be written.
        ImportError: if diffusers is not installed.
    """
    check_kind("images", images, ImageSet, "an ImageSet, as open_images returns")
    check_kind("out", out, (str, Path), "the folder to write")
    whole_number("batch", batch, 1)
    flag("mirror", mirror)
    if progress is not None:
        check_callable("progress", progress, "progress(report), with a Progress")
    if dtype not in KINDS:
        raise ValueError(f"dtype={dtype!r:.40}: pass float16 or float32.")
    if images.scaling is not None:
        raise ValueError(
            f"images holds {images.images.dtype} data: an autoencoder takes 8-bit images; such data are trained on as they "
            "are."
        )
    encoder = vae if isinstance(vae, Autoencoder) else Autoencoder.open(vae, device)
    shape = encoder.latent_shape(images.shape)
    path = Path(out)
    settings = {
        "images": str(images.manifest["sha256"]),
        "labels": images.manifest["labels_sha256"],
        "class_names": None if images.class_names is None else list(images.class_names),
        "shape": list(images.shape),
        "count": len(images),
        "autoencoder": encoder.sha256,
        "dtype": dtype,
        "mirror": mirror,
    }
    try:
        written = LatentFolder.begin(path, settings, shape, images.labels)
        if written.manifest is None:
            for end in written.encode(images, encoder, batch, mirror=mirror):
                if progress is not None:
                    progress(Progress(stage="encoding", done=end, total=len(images)))
            written.finish(images, encoder.record(images.shape))
        elif AutoencoderRecord.of_manifest(written.manifest) != encoder.record(images.shape):
            # It has moved.
            written.manifest["autoencoder"] = encoder.record(images.shape).record
            written.write()
    except OSError as error:
        raise ValueError(
            f"out={path} cannot be written ({error.strerror or error}): free some space and call again to go on, or name "
            "another place."
        ) from error
    return open_latents(path)


def decode(
    latents: ImageSet,
    *,
    vae: str | Path | Autoencoder | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[Progress], object] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | Path | None = None,
) -> ImageSet:
    """The images that an autoencoder makes of encoded images: of the stored draw of each latent.

    Args:
        latents: encoded images, as `encode` or `open_images` returns.
        vae: the autoencoder's new place, if it has moved, or that autoencoder, open.
        device: where to compute; a GPU if there is one.
        progress: called with the number of images that are decoded.
        memory_budget: images of more bytes than this go into a packed file that is mapped into memory.
        cache: the folder for that file; by default `stablefield` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: if the set is not of encoded images, or the autoencoder is not there, or another one.
        ImportError: if diffusers is not installed.
    """
    check_kind("latents", latents, ImageSet, "encoded images, as encode returns")
    whole_number("memory_budget", memory_budget, 0)
    if progress is not None:
        check_callable("progress", progress, "progress(report), with a Progress")
    record = AutoencoderRecord.of_manifest(latents.manifest)
    if record is None:
        raise ValueError(f"latents={latents.name} are no encoded images: make some by encode(images, out, vae=...).")
    decoder = vae if isinstance(vae, Autoencoder) else record.open(vae, device)
    record.check(decoder, f"vae={decoder.place}" if decoder.place else "vae")

    def pieces() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(latents), 16):
            yield decoder.decode(latents.images[start : start + 16]).numpy()
            if progress is not None:
                progress(Progress(stage="decoding", done=min(start + 16, len(latents)), total=len(latents)))

    return gathered_set(
        pieces(),
        len(latents),
        record.shape,
        lambda: latents.labels,
        Origin(
            name=f"{latents.name}, decoded",
            source=f"{latents.manifest['source']}, decoded",
            class_names=latents.class_names,
        ),
        key=[
            "decoded",
            latents.manifest["sha256"],
            latents.manifest["labels_sha256"],
            latents.class_names,
            record.sha256,
        ],
        resolution=None,
        limit=None,
        resize="crop",
        memory_budget=memory_budget,
        cache=cache_folder() if cache is None else Path(cache),
    )
