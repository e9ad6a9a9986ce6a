import re
from collections.abc import Iterator
from typing import Any

import pytest
import song_reference
import torch
from torch import Tensor, nn

import stablefield as sf
from stablefield import networks
from stablefield.networks import SongUNet

MAKERS = {"ddpmpp": SongUNet.ddpmpp, "ncsnpp": SongUNet.ncsnpp}
BOTH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are so small that on a busy machine threads would only wait for each other."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Weights that let every path matter: nothing near zero, no bias zero."""
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=g)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=g)
            else:
                parameter.normal_(0, 0.3, generator=g)


def inputs(network: SongUNet, rows: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    g = generator(seed)
    x = torch.randn(rows, network.channels, *network.size, generator=g)
    noise = torch.randn(rows, generator=g)
    labels = torch.arange(rows) % network.classes - 1 if network.classes else None
    augment = torch.randn(rows, network.augment_dim, generator=g) if network.augment_dim else None
    return x, noise, labels, augment


# What the architecture is.


@pytest.mark.parametrize(("make", "count"), [(SongUNet.ddpmpp, 55_733_891), (SongUNet.ncsnpp, 56_397_827)])
def test_parameter_counts_are_those_published_for_cifar10(make, count):
    with torch.device("meta"):
        network = make(32, 3, augment_dim=9)
    assert sum(p.numel() for p in network.parameters()) == count


@BOTH
def test_attention_of_the_cifar10_network_is_where_it_was_published(make):
    with torch.device("meta"):
        network = make(32, 3)
    attending = {name.removesuffix(".qkv.weight") for name in network.state_dict() if name.endswith("qkv.weight")}
    encoder = {f"enc.16x16_block{i}" for i in range(4)}
    assert attending == encoder | {"dec.16x16_block4", "dec.8x8_in0"}


def block_shapes(
    name: str, c_in: int, c_out: int, *, skip: bool = False, attention: bool = False, taps: int = 0
) -> dict:
    shapes = {
        f"{name}.norm0.weight": (c_in,),
        f"{name}.norm0.bias": (c_in,),
        f"{name}.conv0.weight": (c_out, c_in, 3, 3),
        f"{name}.conv0.bias": (c_out,),
        f"{name}.affine.weight": (c_out, 32),
        f"{name}.affine.bias": (c_out,),
        f"{name}.norm1.weight": (c_out,),
        f"{name}.norm1.bias": (c_out,),
        f"{name}.conv1.weight": (c_out, c_out, 3, 3),
        f"{name}.conv1.bias": (c_out,),
    }
    if skip:
        shapes |= {f"{name}.skip.weight": (c_out, c_in, 1, 1), f"{name}.skip.bias": (c_out,)}
    if taps:
        shapes |= {
            f"{name}.conv0.resample_filter": (1, 1, taps, taps),
            f"{name}.skip.resample_filter": (1, 1, taps, taps),
        }
    if attention:
        shapes |= {
            f"{name}.norm2.weight": (c_out,),
            f"{name}.norm2.bias": (c_out,),
            f"{name}.qkv.weight": (3 * c_out, c_out, 1, 1),
            f"{name}.qkv.bias": (3 * c_out,),
            f"{name}.proj.weight": (c_out, c_out, 1, 1),
            f"{name}.proj.bias": (c_out,),
        }
    return shapes


def embedding_shapes(width: int) -> dict:
    return {
        "map_label.weight": (width, 5),
        "map_label.bias": (width,),
        "map_augment.weight": (width, 9),
        "map_layer0.weight": (32, width),
        "map_layer0.bias": (32,),
        "map_layer1.weight": (32, 32),
        "map_layer1.bias": (32,),
    }


# Base width 8, multipliers (1, 2, 3): 8, 16 and 24 channels at 32, 16 and 8 pixels, two blocks per level, attention at 16.
def level_shapes(taps: int) -> dict:
    return (
        {"enc.32x32_conv.weight": (8, 2, 3, 3), "enc.32x32_conv.bias": (8,)}
        | block_shapes("enc.32x32_block0", 8, 8)
        | block_shapes("enc.32x32_block1", 8, 8)
        | block_shapes("enc.16x16_down", 8, 8, skip=True, taps=taps)
        | block_shapes("enc.16x16_block0", 8, 16, skip=True, attention=True)
        | block_shapes("enc.16x16_block1", 16, 16, attention=True)
        | block_shapes("enc.8x8_down", 16, 16, skip=True, taps=taps)
        | block_shapes("enc.8x8_block0", 16, 24, skip=True)
        | block_shapes("enc.8x8_block1", 24, 24)
        | block_shapes("dec.8x8_in0", 24, 24, attention=True)
        | block_shapes("dec.8x8_in1", 24, 24)
        | block_shapes("dec.8x8_block0", 24 + 24, 24, skip=True)
        | block_shapes("dec.8x8_block1", 24 + 24, 24, skip=True)
        | block_shapes("dec.8x8_block2", 24 + 16, 24, skip=True)
        | block_shapes("dec.16x16_up", 24, 24, skip=True, taps=taps)
        | block_shapes("dec.16x16_block0", 24 + 16, 16, skip=True)
        | block_shapes("dec.16x16_block1", 16 + 16, 16, skip=True)
        | block_shapes("dec.16x16_block2", 16 + 8, 16, skip=True, attention=True)
        | block_shapes("dec.32x32_up", 16, 16, skip=True, taps=taps)
        | block_shapes("dec.32x32_block0", 16 + 8, 8, skip=True)
        | block_shapes("dec.32x32_block1", 8 + 8, 8, skip=True)
        | block_shapes("dec.32x32_block2", 8 + 8, 8, skip=True)
        | {"dec.32x32_aux_norm.weight": (8,), "dec.32x32_aux_norm.bias": (8,)}
        | {"dec.32x32_aux_conv.weight": (2, 8, 3, 3), "dec.32x32_aux_conv.bias": (2,)}
    )


AUXILIARY = {
    "enc.16x16_aux_residual.weight": (8, 2, 3, 3),
    "enc.16x16_aux_residual.bias": (8,),
    "enc.16x16_aux_residual.resample_filter": (1, 1, 4, 4),
    "enc.8x8_aux_residual.weight": (16, 8, 3, 3),
    "enc.8x8_aux_residual.bias": (16,),
    "enc.8x8_aux_residual.resample_filter": (1, 1, 4, 4),
}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (SongUNet.ddpmpp, embedding_shapes(8) | level_shapes(2)),
        (SongUNet.ncsnpp, {"map_noise.freqs": (8,)} | embedding_shapes(16) | level_shapes(4) | AUXILIARY),
    ],
    ids=MAKERS.keys(),
)
def test_state_names_and_shapes_are_those_of_published_checkpoints(make, expected):
    network = make(32, 2, 8, (1, 2, 3), 2, augment_dim=9, classes=5)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected


def test_stored_filters_are_normalised_and_without_the_factor_of_upsampling():
    f = torch.tensor([1.0, 3, 3, 1])
    state = SongUNet.ncsnpp(8, 1, 8, (1, 1), 1).state_dict()
    stored = [value for name, value in state.items() if name.endswith("resample_filter")]
    assert len(stored) == 5
    for value in stored:
        torch.testing.assert_close(value[0, 0], f[:, None] * f / 64, rtol=0, atol=0)


@pytest.mark.parametrize(("resolution", "multipliers", "expected"), [
    (8, (1, 2), 8), (28, (1, 2, 2), 14), (64, (1, 2, 2, 2), 16), (40, (1, 1, 1), 10), (64, (1, 1), None),
    ((48, 64), (1, 2, 2, 2), 12), ((64, 16), (1, 1, 1), 32), ((8, 32), (1, 1), 8),
])  # fmt: skip
def test_attention_is_at_the_highest_resolution_not_above_16(resolution, multipliers, expected):
    with torch.device("meta"):
        network = SongUNet.ddpmpp(resolution, 1, 8, multipliers, 1)
    sides = {name.split("x")[0] for name in network.enc if f"enc.{name}.qkv.weight" in network.state_dict()}
    assert sides == (set() if expected is None else {str(expected)})


@pytest.mark.parametrize("resolution", [8, 28, 64, (8, 16), (20, 12)])
@BOTH
def test_output_has_the_shape_of_the_input_at_other_sizes(make, resolution):
    network = make(resolution, 1, 8, (1, 2, 2), 1)
    x, noise, _, _ = inputs(network, 2)
    assert network(x, noise).shape == x.shape


# What it computes.


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("augmented", [False, True])
@BOTH
def test_output_equals_a_second_implementation_from_the_published_description(make, augmented, classes):
    sizes = {"resolution": 16, "multipliers": (1, 2, 3), "blocks": 2}
    # 32 channels make 8 groups; 128 and more, where a skip is joined, the full 32.
    network = make(
        channels=3, base_channels=32, classes=classes, augment_dim=9 if augmented else 0, attention=(8, 16), **sizes
    ).eval()
    randomise(network)
    x, noise, labels, augment = inputs(network, 4)
    one_hot = None if labels is None else torch.eye(classes + 1)[labels + 1][:, 1:]
    # Positional embeddings are made for labels in the hundreds, Fourier features for labels of order one.
    noise = 300 * noise.abs() if make == SongUNet.ddpmpp else noise
    with torch.no_grad():
        ours = network(x, noise, labels, augment)
        theirs = song_reference.evaluate(network.state_dict(), x, noise, one_hot, augment, **sizes)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 16), (24, 16)])
@BOTH
def test_images_that_are_not_square_are_computed_by_the_same_description(make, size):
    sizes = {"multipliers": (1, 2), "blocks": 1}
    network = make(size, 3, 32, attention=(size[0] // 2,), **sizes).eval()
    randomise(network)
    x, noise, _, _ = inputs(network, 2)
    # The description knows squares, and their side by name alone.
    state = {re.sub(r"(\d+)x\d+_", r"\1x\1_", name): value for name, value in network.state_dict().items()}
    with torch.no_grad():
        ours = network(x, noise)
        theirs = song_reference.evaluate(state, x, noise, None, None, resolution=size[0], **sizes)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@BOTH
def test_output_depends_on_every_argument(make):
    network = make(8, 1, 8, (1, 2), 1, augment_dim=9, classes=4).eval()
    randomise(network)
    x, noise, labels, augment = inputs(network)
    with torch.no_grad():
        base = network(x, noise, labels, augment)
        others = [
            network(x, noise + 1, labels, augment),
            network(x, noise, (labels + 2) % 4, augment),
            network(x, noise, labels, -augment),
            network(x.flip(-1), noise, labels, augment),
        ]
    assert all((other - base).abs().amax(dim=(1, 2, 3)).min() > 1e-2 for other in others)


@BOTH
def test_network_starts_near_zero_and_its_blocks_as_their_skip_paths(make):
    network = make(16, 3, 16, (1, 2), 2, generator=generator()).eval()
    x, noise, _, _ = inputs(network)
    with torch.no_grad():
        assert network(x, noise).abs().max() < 1e-3
        block, e = network.enc["16x16_block0"], torch.randn(3, 64, generator=generator(2))
        h = torch.randn(3, 16, 16, 16, generator=generator(3))
        # Without attention at the first block the output would be h / sqrt(2); with it, h / 2.
        torch.testing.assert_close(block(h, e), h / 2, rtol=0, atol=1e-3)


def test_initial_weights_are_xavier_uniform_with_the_published_gains():
    network = SongUNet.ddpmpp(32, 3, 64, (2, 2), 1, augment_dim=9, classes=10, generator=generator())
    gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": 0.2**0.5}
    for name, value in network.named_parameters():
        layer = name.split(".")[-2]
        if value.ndim == 1:
            assert torch.equal(value, torch.full_like(value, float("norm" in layer and name.endswith("weight")))), name
            continue
        area = value[0, 0].numel() if value.ndim == 4 else 1
        gain = next((gain for end, gain in gains.items() if layer.endswith(end)), 1.0)
        bound = gain * (6 / (area * (value.shape[0] + value.shape[1]))) ** 0.5
        ratio = value.abs() / bound
        assert ratio.max() <= 1 + 1e-6, name
        # |U(-1, 1)| has mean 1/2 and standard deviation 1 / sqrt(12).
        assert abs(ratio.mean() - 0.5) < 5 * (12 * value.numel()) ** -0.5, name


def test_weights_are_a_function_of_the_generator_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    first, again, other = (SongUNet.ncsnpp(8, 1, 8, (1, 1), 1, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.map_noise.freqs, other.map_noise.freqs)
    assert not torch.equal(first.map_layer0.weight, other.map_layer0.weight)


@BOTH
def test_gradient_reaches_every_parameter_and_the_input(make):
    network = make(8, 2, 8, (1, 2), 1, augment_dim=9, classes=4)
    randomise(network)
    x, noise, labels, augment = inputs(network)
    x.requires_grad_()
    network(x, noise, labels, augment).square().mean().backward()
    for name, value in [*network.named_parameters(), ("x", x)]:
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 1e-8, name


def test_gradient_equals_finite_differences():
    network = SongUNet.ncsnpp(4, 1, 8, (1, 1), 1).double().eval()
    randomise(network)
    x = torch.randn(1, 1, 4, 4, generator=generator(), dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, (x, noise), eps=1e-6, atol=1e-6)


# Labels.


@BOTH
def test_no_class_is_minus_one_none_and_the_zero_vector_alike(make):
    network = make(8, 1, 8, (1, 2), 1, classes=4).eval()
    randomise(network)
    x, noise, _, _ = inputs(network)
    with torch.no_grad():
        plain = network(x, noise)
        for labels in (torch.full((3,), -1), torch.zeros(3, 4)):
            assert torch.equal(network(x, noise, labels), plain)
        mixed = network(x, noise, torch.tensor([2, -1, 0]))
        one_hot = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
        assert torch.equal(mixed, network(x, noise, one_hot))
        torch.testing.assert_close(mixed[1], plain[1])


def test_no_augmentation_labels_stand_for_zeros():
    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1, augment_dim=9).eval()
    randomise(network)
    x, noise, _, _ = inputs(network)
    with torch.no_grad():
        torch.testing.assert_close(network(x, noise), network(x, noise, None, torch.zeros(3, 9)))


def test_one_noise_label_serves_all_rows():
    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1).eval()
    randomise(network)
    x, _, _, _ = inputs(network)
    with torch.no_grad():
        assert torch.equal(network(x, 0.25), network(x, torch.full((3,), 0.25)))


# How it runs.


@BOTH
def test_channels_last_gives_the_same_output(make):
    network = make(16, 3, 16, (1, 2), 1).eval()
    randomise(network)
    x, noise, _, _ = inputs(network)
    with torch.no_grad():
        expected = network(x, noise)
        network = network.to(memory_format=torch.channels_last)
        actual = network(x.contiguous(memory_format=torch.channels_last), noise)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_autocast_to_bfloat16_stays_close_to_float32(make):
    network = make(16, 3, 16, (1, 2), 1).eval()
    randomise(network)
    x, noise, _, _ = inputs(network)
    with torch.no_grad():
        expected = network(x, noise)
        with torch.autocast("cpu", torch.bfloat16):
            actual = network(x, noise)
    assert actual.dtype == torch.bfloat16
    # 8 bits of mantissa through some 20 layers.
    assert (actual - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_dropout_acts_in_training_mode_only_and_with_its_probability():
    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1, dropout=0.13)
    randomise(network)
    x, noise, _, _ = inputs(network)
    shares: list[float] = []
    hook = network.dec["8x8_block1"].conv1.register_forward_pre_hook(
        lambda _, args: shares.append((args[0] == 0).float().mean().item())
    )
    with torch.no_grad():
        assert not torch.equal(network(x, noise), network(x, noise))
        network.eval()
        assert torch.equal(network(x, noise), network(x, noise))
    hook.remove()
    assert shares[0] == pytest.approx(0.13, abs=5 * (0.13 * 0.87 / (3 * 8 * 64)) ** 0.5)
    assert shares[-1] == 0


def test_whole_network_is_one_graph_for_the_compiler():
    network = SongUNet.ncsnpp(8, 1, 8, (1, 2), 1, classes=3, augment_dim=9).eval()
    randomise(network)
    arguments = inputs(network)
    with torch.no_grad():
        compiled = torch.compile(network, backend="eager", fullgraph=True)(*arguments)
        torch.testing.assert_close(compiled, network(*arguments))


# Wrong use.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 30}, r"resolution is 30: .* a multiple of 4"),
        ({"resolution": (8, 30)}, r"resolution is \(8, 30\): .* a multiple of 4"),
        ({"resolution": (8, 8, 8)}, "side of square images, or their height and width"),
        ({"resolution": 0}, "resolution is 0"),
        ({"multipliers": ()}, r"multipliers is \(\)"),
        ({"multipliers": (1, 0)}, r"multipliers is \(1, 0\)"),
        ({"blocks": 0}, "blocks is 0"),
        ({"classes": -1}, "classes is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"base_channels": 2}, "2 channels|noise embedding is 2 wide"),
        ({"base_channels": 36, "multipliers": (1, 4)}, "base_channels a multiple of 32"),
        ({"attention": (16,)}, r"attention is \(16,\): .*\[8, 4, 2\]"),
    ],
)
def test_sizes_that_cannot_be_built_are_named(arguments, message):
    sizes = {"resolution": 8, "channels": 1, "base_channels": 8, "blocks": 1, "classes": 0, "multipliers": (1, 1, 1)}
    with pytest.raises(ValueError, match=message):
        SongUNet.ddpmpp(**(sizes | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2, 8, 8)}, r"x has shape \(3, 2, 8, 8\).*\(N, 1, 8, 8\)"),
        ({"x": torch.zeros(3, 1, 16, 16)}, r"x has shape"),
        ({"noise_label": torch.zeros(2)}, r"noise_label has shape \(2,\)"),
        ({"class_labels": torch.tensor([0, 1, 4])}, "class_labels holds 4: classes are 0 to 3"),
        ({"class_labels": torch.tensor([0, -2, 1])}, "class_labels holds -2"),
        ({"class_labels": torch.zeros(3, 4, dtype=torch.long)}, "or one-hot vectors"),
        ({"class_labels": torch.zeros(3)}, r"floating point labels are one-hot vectors, here of shape \(3, 4\)"),
        ({"augment_labels": torch.zeros(3, 8)}, r"augment_labels has shape \(3, 8\).*\(3, 9\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1, classes=4, augment_dim=9)
    arguments = {"x": torch.zeros(3, 1, 8, 8), "noise_label": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        network(**(arguments | change))


def test_labels_given_to_a_network_without_them_are_refused():
    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1)
    x, noise, _, _ = inputs(network)
    with pytest.raises(ValueError, match="without classes"):
        network(x, noise, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="augment_labels were given"):
        network(x, noise, None, torch.zeros(3, 9))


@pytest.mark.parametrize("text", [networks.__doc__, SongUNet.__doc__], ids=["package", "class"])
def test_the_docstring_puts_a_network_into_a_loop_of_ones_own(text: str) -> None:
    names: dict[str, Any] = {"sf": sf, "x": torch.zeros(1, 3, 32, 32), "sigma": torch.ones(1)}
    exec("\n".join(re.findall(r"^ {4,8}((?:network|denoiser|x0) = .*)$", text, re.M)), names)
    assert names["x0"].shape == (1, 3, 32, 32)
