"""A denoiser as a diffusers pipeline folder, which loads and samples without stablefield.

    model_index.json  pipeline.py
    unet/       config.json  diffusion_pytorch_model.safetensors  network.py
    scheduler/  scheduler_config.json
    vae/        config.json  diffusion_pytorch_model.safetensors     of a model of latents of images

`pipeline.py` and `network.py` are code, so diffusers loads the folder only with `trust_remote_code=True`. The scheduler is
diffusers' own `EDMEulerScheduler`; its other EDM schedulers work too.
"""

import contextlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from stablefield import _shapes as shapes
from stablefield._regular_file import read_limited, reason
from stablefield.data._autoencoder import Autoencoder
from stablefield.data._scaling import Scaling
from stablefield.diffusion import _preconditioning as preconditioning
from stablefield.diffusion._preconditioning import PRECONDITIONINGS, Denoiser, NamedPreconditioning
from stablefield.interop._architecture import infer_architecture
from stablefield.interop._inert import plain_text
from stablefield.interop._source_bundle import bundle
from stablefield.networks import _blocks as blocks
from stablefield.networks import _dropout as dropout
from stablefield.networks import _embedding as embedding
from stablefield.networks import _layers as layers
from stablefield.networks import _levels as levels
from stablefield.networks import _mlp as mlp
from stablefield.networks import _resample as resample
from stablefield.networks import _sit as sit
from stablefield.networks import _song_unet as song_unet
from stablefield.networks._diffusers_unet import DiffusersUNet
from stablefield.networks._mlp import MLP
from stablefield.networks._sit import SiT
from stablefield.networks._song_unet import SongUNet
from stablefield.training._records import parse

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

__all__ = [
    "ExportConfig",
    "named_preconditioning",
    "network_options",
    "new_folder",
    "preconditioning_options",
    "read_pipeline_config",
    "read_unet_config",
    "stated_heads",
    "stated_label_dropout",
    "write_pipeline",
]

_CLASS = ["pipeline", "StablefieldPipeline"]
_MODULES = (shapes, preconditioning, layers, resample, embedding, dropout, blocks, levels, song_unet, mlp, sit)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What an export states of its network.

    Attributes:
        kind: of the preconditioning, such as "edm".
        preconditioning: with its numbers.
        heads: of a transformer's attention; None for other networks.
        shape: of one sample.
        manifest: of the data: the names of the classes, the scaling of float data, and the autoencoder, if there are any;
            and the label dropout of the training, if it is stated.
        vae: the folder of the autoencoder that a pipeline includes, if it is one of latents.
    """

    kind: str
    preconditioning: NamedPreconditioning
    heads: int | None
    shape: tuple[int, ...]
    manifest: Mapping[str, Any]
    vae: Path | None = None


def write_pipeline(
    path: str | Path,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    class_names: Sequence[str] | None = None,
    scaling: Scaling | None = None,
    autoencoder: Autoencoder | None = None,
    label_dropout: float | None = None,
    learned_classes: Sequence[int] | None = None,
) -> None:
    """Write the folder.

    Args:
        path: a new or empty folder.
        denoiser: of a `SongUNet`, a `SiT`, an `MLP` or a `DiffusersUNet`; the last needs no `network.py`.
        shape: of one image, (C, H, W).
        sigma_min: last noise level of the scheduler's grid before 0.
        sigma_max: its first noise level.
        rho: of its grid, as in `edm_sigmas`.
        class_names: class names, for the pipeline's `id2label`; None if unknown.
        scaling: of data that are not images; the pipeline then returns data in their own units.
        autoencoder: decodes them to images, which the pipeline then returns.
        label_dropout: share of the training's rows whose class the network did not see. At 0 it never learned to draw
            without a class, and the pipeline refuses to. None if unknown.
        learned_classes: numbers of the classes that the training data had images of; None for all.

    Raises:
        ImportError: if diffusers is not installed.
        ValueError: if the folder is not empty or cannot be written, or the kind of network or preconditioning is not
            supported.
    """
    try:
        import diffusers
        from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

        from stablefield.interop import _exported_network as exported_network
        from stablefield.interop import _exported_pipeline as exported_pipeline
        from stablefield.interop._exported_network import StablefieldUNet
    except ImportError as error:
        raise ImportError('format=diffusers needs diffusers: pip install "stablefield[diffusers]".') from error

    path = Path(path)
    name, arguments = preconditioning_options(denoiser)
    sigma_data = arguments["sigma_data"] if name == "edm" else 0.5
    code = None
    if isinstance(denoiser.network, DiffusersUNet):
        unet, library = _plain_unet(denoiser.network, name), "diffusers"
    else:
        kind, options = network_options(denoiser.network)
        unet, library = (
            StablefieldUNet(
                kind=kind,
                options=options,
                in_channels=shape[0],
                sample_size=list(shape[1:]),
                num_classes=int(cast("int", getattr(denoiser.network, "classes", 0))),
                sigma_data=sigma_data,
                preconditioning=name,
                preconditioning_options={} if name == "edm" else arguments,
            ),
            "network",
        )
        unet.network.load_state_dict(denoiser.network.state_dict())
        code = bundle([*_MODULES, exported_network], "The network of this export.")
    scheduler = EDMEulerScheduler(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, rho=rho)
    index: dict[str, Any] = {
        "_class_name": _CLASS,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "EDMEulerScheduler"],
        "unet": [library, type(unet).__name__],
    }
    if class_names is not None:
        index["id2label"] = {str(number): name for number, name in enumerate(class_names)}
    if scaling is not None:
        index["scaling"] = scaling.record
    if label_dropout is not None:
        index["label_dropout"] = label_dropout
    if learned_classes is not None:
        index["learned_classes"] = list(learned_classes)
    if autoencoder is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
    assert exported_pipeline.__file__ is not None
    with new_folder(path):
        unet.save_pretrained(path / "unet", safe_serialization=True)
        _forget_origin(path / "unet" / "config.json")
        scheduler.save_pretrained(path / "scheduler")
        if autoencoder is not None:
            autoencoder.model.save_pretrained(path / "vae", safe_serialization=True)
            _forget_origin(path / "vae" / "config.json")
        if code is not None:
            (path / "unet" / "network.py").write_text(code, "utf-8")
        (path / "pipeline.py").write_text(Path(exported_pipeline.__file__).read_text("utf-8"), "utf-8")
        (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[None]:
    """Make the folder, or take an empty one, and write into it inside a with statement.

    Raises:
        ValueError: if the folder is not empty, or cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ValueError(f"out={path} is not empty: name a new folder.")
        yield
    except OSError as error:
        raise ValueError(f"out={path} cannot be written ({error.strerror}): name another place.") from error


def read_pipeline_config(folder: Path) -> ExportConfig | None:
    """What a pipeline states of its network: in what it was trained, not in what diffusers calls it.

    Returns:
        None if the folder holds no pipeline of `write_pipeline`.

    Raises:
        ValueError: if a file is damaged, or what it states cannot be used; names the file.
    """
    index = parse(read_limited(folder / "model_index.json"))
    return _pipeline_config(folder / "unet", index) if index.get("_class_name") in (_CLASS, _CLASS[1]) else None


def read_unet_config(weights: Path) -> ExportConfig | None:
    """What is stated of the network whose weights are in the folder `unet` of a pipeline, or alone in a copy of that.

    Returns:
        None if the files around the weights are not of `write_pipeline`.

    Raises:
        ValueError: if what they state cannot be used; names the file.
    """
    folder = weights.absolute().parent
    try:
        index = parse(read_limited(folder.with_name("model_index.json")))
    except (OSError, ValueError):
        index = {}  # of another program, or none
    if folder.name == "unet" and index.get("_class_name") in (_CLASS, _CLASS[1]):
        return _pipeline_config(folder, index)
    try:
        own = parse(read_limited(folder / "config.json"))
    except (OSError, ValueError):
        return None
    return _pipeline_config(folder, {}) if own.get("_class_name") == "StablefieldUNet" else None


def _pipeline_config(folder: Path, index: Mapping[str, Any]) -> ExportConfig:
    """What the files in the folder `unet` state, and the content of the model_index.json."""
    path = folder.with_name("model_index.json")
    try:
        scaling, share, names = Scaling.of_manifest(index), stated_label_dropout(index), _class_names(index)
        path = folder / "config.json"
        unet = parse(read_limited(path))
        if "preconditioning" in unet:
            kind, options = unet["preconditioning"], unet.get("preconditioning_options")
            options = {"sigma_data": unet.get("sigma_data", 0.5)} if kind == "edm" else options
        else:  # diffusers' own model, always in EDM's
            path = folder.with_name("scheduler") / "scheduler_config.json"
            kind, options = "edm", {"sigma_data": parse(read_limited(path)).get("sigma_data", 0.5)}
        channels, sides = unet.get("in_channels"), unet.get("sample_size")
        shape = (channels, *(sides if isinstance(sides, list) else (sides, sides)))
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"its in_channels and sample_size are {str(shape)[:40]}")
        if scaling is not None and len(scaling.mean) != channels:
            raise ValueError(f"its in_channels are {channels}, and the pipeline's scaling has {len(scaling.mean)}")
        preconditioning = named_preconditioning(kind, options)
        heads = stated_heads(unet)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else reason(cast("Exception", error))
        raise ValueError(f"{path} cannot be used: {text}: export the pipeline again") from error
    manifest: dict[str, Any] = {}
    if names is not None:
        manifest["class_names"] = names
    if share is not None:
        manifest["label_dropout"] = share
    if scaling is not None:
        manifest["scaling"] = scaling.record
    return ExportConfig(
        kind=str(kind),
        preconditioning=preconditioning,
        heads=heads,
        shape=cast("tuple[int, ...]", shape),
        manifest=manifest,
        # diffusers writes a pair of nulls for a part that is not there.
        vae=folder.with_name("vae") if index.get("vae") not in (None, [None, None]) and scaling is not None else None,
    )


def _class_names(index: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes by number, if a model_index.json states them."""
    names: Any = index.get("id2label")
    if names is None:
        return None
    if not isinstance(names, dict) or set(cast("dict[str, Any]", names)) != set(map(str, range(len(names)))):
        raise ValueError(f"its id2label is {str(names)[:40]}")
    return [plain_text(str(names[str(number)])) for number in range(len(names))]


def stated_heads(network: Mapping[str, Any]) -> int | None:
    """The heads of a SiT whose kind and options the JSON of an export states; None for other networks.

    Raises:
        ValueError: if they are no number.
    """
    options: Any = network.get("options")
    heads: Any = options.get("heads") if isinstance(options, dict) and network.get("kind") == "sit" else None
    if heads is not None and (not isinstance(heads, int) or isinstance(heads, bool) or heads < 1):
        raise ValueError(f"its network has heads {str(heads)[:40]}")
    return heads


def named_preconditioning(kind: object, options: object) -> NamedPreconditioning:
    """The preconditioning that the JSON of an export states by its kind and its arguments.

    Raises:
        ValueError: if there is no such kind, or a number does not fit.
        TypeError: if it has other arguments.
    """
    if not isinstance(kind, str) or kind not in PRECONDITIONINGS or not isinstance(options, dict):
        raise ValueError(f"its preconditioning is {str(kind)[:40]} with {str(options)[:40]}")
    return PRECONDITIONINGS[kind](**cast("dict[str, Any]", options))


def stated_label_dropout(record: Mapping[str, Any]) -> float | None:
    """The label dropout that the JSON of an export, or the attributes of a network, state; None if they state none.

    Raises:
        ValueError: if it is no share.
    """
    share: Any = record.get("label_dropout")
    if share is not None and (type(share) not in (int, float) or not 0 <= share <= 1):
        raise ValueError(f"its label_dropout is {str(share)[:40]}")
    return None if share is None else float(share)


def _forget_origin(path: Path) -> None:
    """Remove the path from which a model was loaded from its configuration: it may be a folder on this machine."""
    record = json.loads(path.read_text("utf-8"))
    record.pop("_name_or_path", None)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", "utf-8")


def _plain_unet(network: DiffusersUNet, preconditioning: str) -> "UNet2DModel":
    """The model itself, if our pipeline calls it in the same way as training did."""
    unet: Any = network.unet
    if preconditioning != "edm" or unet.config.time_embedding_type != "positional":
        raise ValueError(
            f"a UNet2DModel with a {unet.config.time_embedding_type} time embedding in the preconditioning "
            f"{preconditioning} cannot be exported: EDM's scheduler needs preconditioning edm and a positional embedding."
        )
    return unet


def network_options(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """The kind of a network, "unet", "sit" or "perceptron", and the arguments that rebuild it, as JSON values.

    Raises:
        ValueError: if it is of another kind.
    """
    match network:
        case SongUNet():
            state: Mapping[str, Tensor] = network.state_dict()
            found = asdict(infer_architecture({name: value.cpu() for name, value in state.items()}))
            return "unet", {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
        case SiT():
            return "sit", {
                "input_size": list(network.size),
                "patch_size": network.patch_size,
                "channels": network.channels,
                "width": network.width,
                "depth": len(network.blocks),
                "heads": network.heads,
                "classes": network.classes,
                "learn_sigma": network.learn_sigma,
                "mlp_ratio": network.mlp_ratio,
            }
        case MLP():
            return "perceptron", {
                "width": network.enter.out_features,
                "depth": len(network.blocks),
                "classes": network.classes,
            }
        case _:
            raise ValueError(
                f"the network is a {type(network).__name__}: an export supports a SongUNet, a SiT or an MLP."
            )


def preconditioning_options(denoiser: Denoiser) -> tuple[str, dict[str, float]]:
    """The kind of a denoiser's preconditioning, "edm", "vp", "ve", "flow" or "ddpm", and its arguments.

    Raises:
        ValueError: if it is of another kind.
    """
    given = denoiser.preconditioning
    for name, kind in PRECONDITIONINGS.items():
        if isinstance(given, kind):
            return name, asdict(given)
    raise ValueError(f"the preconditioning is {given}: an export supports EDM's, VP's, VE's, DDPM's and a flow's.")
