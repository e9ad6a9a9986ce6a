"""SiT against an independent implementation in float64, the published names and sizes, and what its options promise."""

import copy
import re
from collections.abc import Iterator

import numpy as np
import pytest
import sit_reference
import torch
from torch import Tensor

import stablefield as sf
from stablefield.networks import SiT


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are so small that on a busy machine threads would only wait for each other."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(network: SiT, seed: int = 0) -> SiT:
    """Weights that let every path matter: nothing near zero, no bias zero."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0, scale, generator=g)
    return network.eval()


def inputs(network: SiT, rows: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(rows, network.channels, *network.size, generator=generator(1))
    labels = torch.arange(rows) % (network.classes + 1) - 1 if network.classes else None
    return x, torch.linspace(0.05, 0.95, rows), labels


def small(**options) -> SiT:
    return randomised(SiT((8, 12), 2, 3, 16, 2, 4, classes=5, generator=generator(), **options))


# What the architecture is.


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((8, 2, 3, 16, 2, 4), {"classes": 5}),
        ((8, 2, 3, 16, 2, 4), {"classes": 5, "learn_sigma": True}),
        (((4, 12), 4, 1, 8, 1, 1), {"classes": 2}),
        (((12, 6), 3, 4, 24, 3, 3), {"classes": 10, "learn_sigma": True, "mlp_ratio": 2.5}),
        (([5, 7], 1, 2, 12, 1, 2), {}),
    ],
)
@pytest.mark.parametrize("steps", [1, 1000])
def test_outputs_are_those_of_the_other_implementation(sizes, options, steps) -> None:
    network = randomised(SiT(*sizes, **options))
    x, noise, labels = inputs(network, rows=4)
    noise = noise if steps == 1 else torch.tensor([0.0, 7.0, 130.0, 999.0])
    expected = sit_reference.evaluate(
        network.state_dict(),
        x,
        noise,
        [-1] * 4 if labels is None else labels.tolist(),
        heads=network.heads,
        channels=network.channels * (1 + network.learn_sigma),
    )[:, : network.channels]
    assert expected.std() > 0.1
    # Sines of 999 in float32 are wrong by 6e-5, as in the published training.
    near = 1e-5 if steps == 1 else 1e-4
    with torch.no_grad():
        np.testing.assert_allclose(network(x, noise, labels).numpy(), expected, rtol=0, atol=near)
        wide = copy.deepcopy(network).double()
        np.testing.assert_allclose(wide(x.double(), noise.double(), labels).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "millions", "exact"),
    [("S", 33, None), ("B", 130, None), ("L", 458, None), ("XL", 675, 675_129_632)],
)
def test_published_networks_have_the_published_numbers_of_parameters(size, millions, exact) -> None:
    with torch.device("meta"):
        network = SiT.sized(size, 32, 2, 4, classes=1000, learn_sigma=True)
    count = sum(value.numel() for value in network.state_dict().values())
    assert count == pytest.approx(millions * 1e6, abs=0.6e6)
    assert exact in (None, count)


def test_names_and_shapes_are_those_of_the_published_weights() -> None:
    with torch.device("meta"):
        found = {name: tuple(v.shape) for name, v in SiT.sized("XL", 32, 2, 4, 1000, True).state_dict().items()}
    width = 1152
    expected = {
        "pos_embed": (1, 256, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (32, width),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    rows = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": 1, "adaLN_modulation.1": 6}
    for block in range(28):
        for layer, times in rows.items():
            expected[f"blocks.{block}.{layer}.weight"] = (times * width, 4 * width if layer == "mlp.fc2" else width)
            expected[f"blocks.{block}.{layer}.bias"] = (times * width,)
    assert found == expected


# How it starts.


def test_output_is_zero_and_every_block_the_identity_at_first() -> None:
    network = SiT((8, 12), 2, 3, 16, 2, 4, classes=5, generator=generator())
    x, noise, labels = inputs(network)
    assert network(x, noise, labels).abs().max() == 0
    h, condition = torch.randn(2, 24, 16), torch.randn(2, 16)
    assert torch.equal(network.blocks[0](h, condition), h)


def test_weights_are_those_of_the_generator_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (SiT(8, 2, 1, 16, 1, 2, 3, generator=generator(k)).state_dict() for k in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight"} < drawn


def test_first_weights_have_the_published_spread() -> None:
    state = SiT.sized("XS", 28, 4, 3, 10, generator=generator()).state_dict()
    for name, variance in {
        "t_embedder.mlp.2.weight": 0.02**2,
        "y_embedder.embedding_table.weight": 0.02**2,
        "x_embedder.proj.weight": 2 / (4 * 4 * 3 + 128),
        "blocks.3.attn.qkv.weight": 2 / (128 + 3 * 128),
        "blocks.3.mlp.fc1.weight": 2 / (128 + 4 * 128),
    }.items():
        assert state[name].var().item() == pytest.approx(variance, rel=0.1), name


def test_places_are_no_parameters() -> None:
    network = SiT(8, 2, 1, 16, 1, 2)
    assert "pos_embed" in network.state_dict()
    assert "pos_embed" not in dict(network.named_parameters())


# What it is told.


def test_no_class_is_minus_one_or_none() -> None:
    network = small()
    x, noise, _ = inputs(network)
    none = network(x, noise)
    assert torch.equal(network(x, noise, torch.full((3,), -1)), none)
    assert (network(x, noise, torch.tensor([0, 4, 2])) - none).abs().amin((1, 2, 3)).max() > 1e-4


def test_network_without_classes_has_the_row_for_no_class() -> None:
    network = randomised(SiT(8, 2, 1, 16, 1, 2))
    assert network.state_dict()["y_embedder.embedding_table.weight"].shape == (1, 16)
    assert network(torch.randn(2, 1, 8, 8), 0.5).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="without classes"):
        network(torch.randn(2, 1, 8, 8), 0.5, torch.tensor([0, 0]))


def test_learn_sigma_doubles_the_outputs_and_returns_the_first_half() -> None:
    plain, double = small(), small(learn_sigma=True)
    assert double.state_dict()["final_layer.linear.weight"].shape[0] == 2 * 2 * 2 * 3
    x, noise, labels = inputs(double)
    out = double(x, noise, labels)
    assert out.shape == x.shape == plain(x, noise, labels).shape
    out.square().mean().backward()
    rows = double.final_layer.linear.weight.grad.reshape(4, 6, 16)
    assert rows[:, :3].abs().amin() > 0
    assert rows[:, 3:].abs().max() == 0


def test_no_rows_give_no_rows() -> None:
    assert small()(torch.zeros(0, 3, 8, 12), 0.5).shape == (0, 3, 8, 12)


def test_one_number_is_the_label_of_every_row() -> None:
    network = small()
    x, _, labels = inputs(network)
    assert torch.equal(network(x, 0.5, labels), network(x, torch.full((3,), 0.5), labels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 8, 8), 0.5), r"x has shape \(2, 3, 8, 8\)"),
        ((torch.zeros(2, 3, 8, 12), torch.zeros(3)), "noise_label has shape"),
        ((torch.zeros(2, 3, 8, 12), 0.5, torch.tensor([0, 5])), "class_labels holds 5: classes are 0 to 4"),
        ((torch.zeros(2, 3, 8, 12), 0.5, torch.zeros(2)), "pass integers of shape"),
        ((torch.zeros(2, 3, 8, 12), 0.5, torch.tensor([1])), "pass integers of shape"),
    ],
)
def test_wrong_inputs_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        small()(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size is 9: it must be a multiple of patch_size=2"),
        ({"input_size": (8, 8, 8)}, "their height and width"),
        ({"width": 18}, "width=18: it must be a multiple of 4 and of heads=2"),
        ({"heads": 3}, "heads=3"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"depth": 0}, "depth=0"),
        ({"classes": -1}, "classes=-1"),
    ],
)
def test_wrong_sizes_are_named(change, message) -> None:
    sizes = {"input_size": 8, "patch_size": 2, "channels": 1, "width": 16, "depth": 1, "heads": 2}
    with pytest.raises(ValueError, match=message):
        SiT(**sizes | change)
    with pytest.raises(ValueError, match="size='M': pass one of XXS, XS, S, B, L, XL"):
        SiT.sized("M", 8, 2, 1)


# How it runs.


def test_checkpointing_gives_the_same_output_and_gradients_with_less_memory_kept() -> None:
    kept = []
    gradients = []
    for checkpointing in (False, True):
        network = small(checkpointing=checkpointing)
        x, noise, labels = inputs(network)
        sizes: list[int] = []

        def pack(value: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            out = network(x, noise, labels)
        out.square().mean().backward()
        kept.append(sum(sizes))
        gradients.append([out, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_bf16_autocast_is_close_to_float32() -> None:
    network = small()
    x, noise, labels = inputs(network)
    exact = network(x, noise, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, noise, labels)
    assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_weights_of_bf16_run_too() -> None:
    network = small()
    x, noise, labels = inputs(network)
    half = copy.deepcopy(network).bfloat16()
    out = half(x.bfloat16(), noise, labels)
    assert out.dtype == torch.bfloat16
    exact = network(x, noise, labels)
    assert (out.float() - exact).norm() / exact.norm() < 0.05


def test_compiled_network_has_one_graph_and_the_same_outputs() -> None:
    network = small()
    x, noise, labels = inputs(network)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, noise, labels), network(x, noise, labels))


def test_as_a_flow_it_is_a_denoiser_that_trains() -> None:
    network = SiT.sized("XXS", 8, 2, 1, 10, generator=generator())
    denoiser = sf.Denoiser(network, sf.FlowPreconditioning())
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    images = torch.from_numpy(sf.data.open_images("digits").images[:32]).float() / 127.5 - 1
    labels = torch.arange(32) % 10
    sigma = torch.exp(torch.randn(32, generator=generator(1)))
    x = images + sigma[:, None, None, None] * torch.randn(images.shape, generator=generator(2))
    losses = []
    for _ in range(40):
        error = (denoiser(x, sigma, labels) - images) * (1 + 1 / sigma)[:, None, None, None]
        losses.append(error.square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_docstring_puts_a_network_into_a_loop_of_ones_own() -> None:
    names: dict[str, object] = {"sf": sf, "x": torch.zeros(1, 1, 28, 28), "sigma": torch.ones(1)}
    exec("\n".join(re.findall(r"^ {8}((?:network|denoiser|x0) = .*)$", str(SiT.__doc__), re.M)), names)
    x0 = names["x0"]
    assert isinstance(x0, Tensor)
    assert x0.shape == (1, 1, 28, 28)
