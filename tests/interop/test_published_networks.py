"""Networks of the EDM family, read from files as such programs write them, and what is said of them."""

from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import stablefield as sf
from stablefield.interop._architecture import infer_architecture
from stablefield.interop._inert import RefusedError
from stablefield.interop._published import read_published
from stablefield.interop._weight_files import read_weight_file
from stablefield.networks import SongUNet

MAKERS = {"DDPM++": SongUNet.ddpmpp, "NCSN++": SongUNet.ncsnpp}
BOTH = pytest.mark.parametrize("name", MAKERS)


def network(name: str, *sizes, seed: int = 0, **options) -> SongUNet:
    made = MAKERS[name](*sizes, generator=torch.Generator().manual_seed(seed), **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1)))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "network-snapshot-200000.pkl"


@BOTH
@pytest.mark.parametrize(("kind", "protocol"), [("pickle", 3), ("pickle", 4), ("pickle", 5), ("zip", 2), ("legacy", 2)])
def test_network_in_a_pickle_gives_the_outputs_that_it_gave_before(
    name: str, kind: str, protocol: int, path: Path
) -> None:
    made = network(name, 16, 3, 16, (1, 2), 2, augment_dim=9, classes=4)
    path.write_bytes(foreign.edm_file(made, sigma_data=0.7, kind=kind, protocol=protocol))
    found = read_published(path)
    g = torch.Generator().manual_seed(2)
    x, sigma, labels = torch.randn(3, 3, 16, 16, generator=g), torch.tensor([0.1, 1.0, 20.0]), torch.tensor([0, -1, 3])
    with torch.no_grad():
        expected = sf.Denoiser(made, sf.EDMPreconditioning(0.7))(x, sigma, labels)
        assert torch.equal(found.denoiser()(x, sigma, labels), expected)
    assert expected.std() > 0.1
    assert found.origin == "averaged weights, from ema; preconditioning of its EDMPrecond"


@BOTH
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((32, 3, 16, (2, 2, 2), 4), {"augment_dim": 9}),
        ((64, 3, 8, (1, 2, 2, 2), 1), {"augment_dim": 9}),
        ((32, 3, 16, (2, 2, 2), 1), {"classes": 10}),
        ((8, 1, 8, (3,), 1), {}),
        ((28, 1, 8, (1, 3), 3), {"classes": 2, "augment_dim": 5}),
        ((16, 4, 8, (1, 1, 2), 1), {"attention": (16, 4)}),
        ((16, 4, 8, (1, 2), 1), {"attention": ()}),
    ],
)
def test_every_option_of_the_architecture_is_found_in_names_and_shapes(name: str, sizes, options) -> None:
    with torch.device("meta"):
        made = MAKERS[name](*sizes, **options)
    state = {key: torch.zeros(value.shape) for key, value in made.state_dict().items()}
    filters = {key: value for key, value in MAKERS[name](*sizes, **options).state_dict().items() if "filter" in key}
    found = infer_architecture(state | filters)
    assert found.name == name
    assert (found.resolution, found.channels, found.base_channels, found.multipliers, found.blocks) == sizes
    assert (found.classes, found.augment_dim) == (options.get("classes", 0), options.get("augment_dim", 0))
    if "attention" in options:
        assert found.attention == options["attention"]


def test_description_says_what_was_found() -> None:
    with torch.device("meta"):
        state = SongUNet.ncsnpp(32, 3, augment_dim=9, classes=10).state_dict()
    filters = SongUNet.ncsnpp(32, 3, 8, (1, 1, 1), 1).state_dict()
    state = {key: filters[key] if "filter" in key and key in filters else value for key, value in state.items()}
    assert infer_architecture(state).describe() == [
        ("architecture", "NCSN++"),
        ("images", "3 x 32 x 32"),
        ("base width", "128, times 2 at 32x32, 2 at 16x16, 2 at 8x8"),
        ("blocks", "4 per level, attention at 16"),
        ("augmentation labels", "9 wide"),
        ("classes", "10"),
    ]


@pytest.mark.parametrize(
    ("class_name", "attributes", "expected"),
    [
        ("EDMPrecond", {}, sf.EDMPreconditioning(0.5)),
        ("EDMPrecond", {"sigma_data": 0.25}, sf.EDMPreconditioning(0.25)),
        ("EDMPrecond", {"sigma_data": np.float64(0.25)}, sf.EDMPreconditioning(0.25)),
        ("VPPrecond", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}, sf.VPPreconditioning()),
        ("VPPrecond", {"beta_d": 10, "beta_min": 0.2, "M": 500}, sf.VPPreconditioning(0.2, 10, 500)),
        ("VEPrecond", {"sigma_min": 0.02, "sigma_max": 100}, sf.VEPreconditioning()),
    ],
)
def test_preconditioning_is_that_of_the_class_and_its_numbers(class_name, attributes, expected, path: Path) -> None:
    path.write_bytes(foreign.edm_file(network("DDPM++", 8, 1, 8, (1, 2), 1), class_name, **attributes))
    assert read_published(path).preconditioning == expected
    with pytest.raises(ValueError, match="contradicts"):
        read_published(path, "ve" if class_name != "VEPrecond" else "vp")


@BOTH
@pytest.mark.parametrize("prefix", ["", "model.", "module.network."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_plain_state_dict_is_read_from_safetensors_and_torch_files(name, prefix, suffix, tmp_path: Path) -> None:
    made = network(name, 8, 1, 8, (1, 2), 1)
    state = {prefix + key: value for key, value in made.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        path.write_bytes(foreign.saved(state if suffix == ".pt" else {"state_dict": state}, legacy=suffix == ".pth"))
    found = read_published(path, "vp")
    assert found.preconditioning == sf.VPPreconditioning()
    assert found.state.keys() == made.state_dict().keys()
    assert all(torch.equal(found.state[key], value) for key, value in made.state_dict().items())


def test_plain_state_dict_needs_to_be_told_its_preconditioning(tmp_path: Path) -> None:
    save_file(network("DDPM++", 8, 1, 8, (1, 2), 1).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="pass preconditioning=edm, vp or ve"):
        read_published(tmp_path / "w.safetensors")


def test_unknown_preconditioning_is_refused_by_name(tmp_path: Path) -> None:
    save_file(network("DDPM++", 8, 1, 8, (1, 2), 1).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(
        ValueError, match=r"^preconditioning is 'EDM': pass edm, vp, ve, flow or ddpm. Did you mean edm"
    ):
        read_published(tmp_path / "net.safetensors", preconditioning="EDM")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype, path: Path) -> None:
    made = network("NCSN++", 8, 1, 8, (1, 2), 1).to(dtype)
    path.write_bytes(foreign.edm_file(made))
    found = read_published(path).state
    assert all(torch.equal(found[key], value.float()) for key, value in made.state_dict().items())


def test_tensors_of_any_stride_and_offset_come_out_as_torch_loads_them(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "part": base[1:, ::2, 1],
        "scalar": base[2, 3, 4],
        "empty": base[:0],
        "half": base.half(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "long": torch.tensor([-(2**40)]),
        "parameter": torch.nn.Parameter(base[0]),
    }
    for legacy in (False, True):
        path = tmp_path / "state.pt"
        path.write_bytes(foreign.saved(state, legacy=legacy))
        expected = torch.load(path, weights_only=True)
        found = read_weight_file(path)
        assert found.keys() == expected.keys()
        for key, view in found.items():
            tensor = view.tensor()
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("array", [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)), np.array(2.5, np.float32),
])  # fmt: skip
def test_numpy_arrays_beside_the_network_do_no_harm_and_are_read(array, path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps({"array": array, "number": np.float32(2.5), "flag": np.True_}, protocol=4))
    found = read_weight_file(path)
    np.testing.assert_array_equal(found["array"].view.tensor().numpy(), array)
    assert found["number"] == 2.5
    assert found["flag"] is True


def change(state: dict, **entries) -> dict:
    return {key: value for key, value in (state | entries).items() if value is not None}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"enc.8x8_conv.weight": None}, r"not those of a DDPM\+\+ or NCSN\+\+ network .* it has \d+ tensors"),
        ({"map_layer1.bias": None}, r"looks like DDPM\+\+, but map_layer1.bias has shape none instead of \(32,\)"),
        ({"surplus": torch.zeros(3)}, r"surplus has shape \(3,\) instead of none"),
        ({"map_layer1.bias": torch.zeros(33)}, r"map_layer1.bias has shape \(33,\) instead of \(32,\)"),
        ({"map_layer1.bias": torch.full((32,), torch.nan)}, "map_layer1.bias holds NaN"),
        ({"map_layer1.bias": torch.zeros(32, dtype=torch.int32)}, "map_layer1.bias has dtype torch.int32"),
        ({"enc.8x8_block0.conv1.weight": torch.zeros(9, 9, 3, 3)}, "not multiples of the first width"),
        ({"enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 2, 2)}, "resampling filters are neither"),
        ({"enc.16x16_conv.weight": torch.zeros(8, 1, 3, 3)}, "names are not those of"),
    ],
)
def test_state_that_fits_no_network_is_refused_with_the_first_difference(edit, message, tmp_path: Path) -> None:
    state = network("DDPM++", 8, 1, 8, (1, 2), 1).state_dict()
    save_file(change(state, **edit), tmp_path / "w.safetensors")
    with pytest.raises(RefusedError, match=message) as refusal:
        read_published(tmp_path / "w.safetensors", "edm")
    assert str(refusal.value).startswith("w.safetensors is refused: ")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "too short"),
        (
            lambda p: p.write_bytes(b"hello, I am a text file\n"),
            "neither safetensors, nor a file of torch.save, nor a pickle",
        ),
        (lambda p: p.write_bytes(foreign.saved({"step": 3})), "entry step is not a tensor"),
        (lambda p: p.write_bytes(foreign.saved([1, 2])), "neither a network nor a dict"),
        (
            lambda p: p.write_bytes(foreign.edm_file(network("DDPM++", 8, 1, 8, (1,), 1), "iDDPMPrecond")),
            "iDDPMPrecond",
        ),
    ],
)
def test_other_files_are_refused_with_the_reason(write, message, path: Path) -> None:
    write(path)
    with pytest.raises(RefusedError, match=message):
        read_published(path, "edm")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.pkl does not exist: name a"):
        read_published(tmp_path / "nothing.pkl")
