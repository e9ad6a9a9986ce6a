"""SiT and DiT from files: what names and shapes show, what they do not, and that sampling follows their conventions."""

import argparse
import math
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

import stablefield as sf
from commands import status
from stablefield.interop._inert import RefusedError
from stablefield.interop._plain_export import write_plain
from stablefield.interop._published import read_published
from stablefield.interop._sit_architecture import infer_sit
from stablefield.networks import SiT
from stablefield.training._model import open_model


def network(*sizes, seed: int = 0, **options) -> SiT:
    made = SiT(*sizes, generator=torch.Generator().manual_seed(seed), **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1)))
    return made.requires_grad_(False)


def tiny(**options) -> SiT:
    return network(8, 2, 1, 64, 1, 4, **{"classes": 3, "learn_sigma": True} | options)


# What a file shows.


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((32, 2, 4, 384, 2, 6), {"classes": 1000, "learn_sigma": True}),
        ((8, 1, 3, 64, 1, 4), {}),
        (((4, 12), 2, 4, 128, 2, 4), {"classes": 7}),
        (((12, 4), 2, 1, 128, 1, 4), {"learn_sigma": True, "mlp_ratio": 2.625}),
        (((2, 12), 2, 1, 64, 1, 4), {}),
        (((12, 2), 2, 1, 64, 1, 4), {"mlp_ratio": 1.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_but_the_heads_is_found_in_names_shapes_and_places(sizes, options, dtype) -> None:
    made = SiT(*sizes, **options)
    state = {name: value.to(dtype) for name, value in made.state_dict().items()}
    found = infer_sit(state)
    assert (found.size, found.patch_size, found.channels) == (made.size, *sizes[1:3])
    assert (found.width, found.depth, found.heads) == sizes[3:]
    assert (found.classes, found.learn_sigma) == (made.classes, made.learn_sigma)
    assert {name: value.shape for name, value in found.build().state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }


def test_hidden_width_is_found_whatever_its_ratio() -> None:
    odd = [hidden for hidden in range(1, 200) if int(76 * (hidden / 76)) != hidden]
    assert odd
    for hidden in (*odd[:2], 1, 304):
        state = SiT(4, 2, 1, 76, 1, 4, mlp_ratio=math.nextafter(hidden / 76, math.inf)).state_dict()
        assert state["blocks.0.mlp.fc1.bias"].shape == (hidden,)
        assert infer_sit(state, 4).build().state_dict()["blocks.0.mlp.fc1.bias"].shape == (hidden,)


def test_published_network_is_described() -> None:
    with torch.device("meta"):
        state = SiT.sized("XL", 32, 2, 4, 1000, True).state_dict()
    state["pos_embed"] = SiT(32, 2, 4, 1152, 1, 16).pos_embed
    assert infer_sit(state).describe() == [
        ("architecture", "SiT or DiT-XL/2"),
        ("images", "4 x 32 x 32"),
        ("blocks", "28 of width 1,152, 16 heads"),
        ("outputs", "twice the channels"),
        ("classes", "1000"),
    ]


def test_heads_of_another_width_have_to_be_given(tmp_path: Path) -> None:
    made = network(8, 2, 1, 24, 1, 3)
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"24 has; pass heads=N\."):
        read_published(tmp_path / "w.safetensors", "flow")
    with pytest.raises(ValueError, match="heads=5: the network is 24 wide"):
        read_published(tmp_path / "w.safetensors", "flow", heads=5)
    found = read_published(tmp_path / "w.safetensors", "flow", heads=3)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(found.denoiser().network(x, 0.3), made(x, 0.3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize(("kind", "expected"), [("flow", sf.FlowPreconditioning()), ("ddpm", sf.DDPMPreconditioning())])
def test_plain_state_dict_is_read_and_says_no_preconditioning(suffix, kind, expected, tmp_path: Path) -> None:
    made, path = tiny(), tmp_path / f"weights{suffix}"
    state = {("module." if suffix == ".pt" else "") + name: value for name, value in made.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        path.write_bytes(foreign.saved(state, legacy=suffix == ".pth"))
    with pytest.raises(ValueError, match="pass preconditioning=flow for SiT's weights, or ddpm for DiT's"):
        read_published(path)
    found = read_published(path, kind)
    assert found.preconditioning == expected
    x, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, -1, 2])
    assert torch.equal(found.denoiser()(x, 2.0, labels), sf.Denoiser(made, expected)(x, 2.0, labels))


def checkpoint(made: SiT, **options: object) -> bytes:
    """What SiT's training writes: weights, their average, the optimiser's state and its options."""
    raw = tiny(seed=5)
    optimizer = torch.optim.AdamW(raw.requires_grad_(True).parameters())
    raw(torch.zeros(1, 1, 8, 8), 0.5).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="SiT-XL/2", ckpt=None, cfg_scale=4.0, **options)
    content = {"model": raw.state_dict(), "ema": made.state_dict(), "opt": optimizer.state_dict(), "args": args}
    return foreign.saved(content)


def test_checkpoint_of_the_training_has_the_average_and_says_its_preconditioning(tmp_path: Path) -> None:
    made, path = tiny(), tmp_path / "0400000.pt"
    path.write_bytes(checkpoint(made, path_type="Linear", prediction="velocity"))
    found = read_published(path)
    assert found.preconditioning == sf.FlowPreconditioning()
    assert found.origin == "averaged weights, from ema; preconditioning of its training's options"
    assert all(torch.equal(found.state[name], value) for name, value in made.state_dict().items())
    with pytest.raises(ValueError, match=r"preconditioning=ddpm contradicts 0400000\.pt and its training's options"):
        read_published(path, "ddpm")
    path.write_bytes(checkpoint(made, path_type="GVP", prediction="velocity"))
    with pytest.raises(RefusedError, match="path GVP and prediction velocity"):
        read_published(path)
    path.write_bytes(checkpoint(made))
    assert read_published(path, "ddpm").preconditioning == sf.DDPMPreconditioning()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.0.attn.q_norm.weight": torch.ones(16)},
            r"blocks\.0\.attn\.q_norm\.weight has shape \(16,\) instead of",
        ),
        ({"final_layer.linear.bias": None}, r"final_layer\.linear\.bias has shape none"),
        ({"pos_embed": None}, "no pos_embed"),
        ({"pos_embed": torch.randn(1, 15, 64)}, "15 patches is not the fixed one"),
        ({"x_embedder.proj.weight": torch.ones(64, 1, 2, 3)}, "patches are square"),
        ({"y_embedder.embedding_table.weight": None}, "no y_embedder"),
        ({"blocks.0.mlp.fc1.weight": None}, r"no blocks\.0\.mlp\.fc1\.weight"),
        ({"blocks.0.mlp.fc1.weight": torch.ones(64_001, 1)}, "fit neither SiT nor DiT: mlp_ratio=1000"),
        ({f"blocks.{k}.attn.qkv.weight": torch.ones(1) for k in range(500)}, "500 blocks, but 521 tensors are too few"),
        ({"pos_embed": torch.zeros(1, 2**20, 64)}, r"67,108,864 numbers; the limit is 33,554,432"),
    ],
)
def test_other_networks_are_refused_with_the_first_difference(change, message, tmp_path: Path) -> None:
    state = {name: value for name, value in (tiny().state_dict() | change).items() if value is not None}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RefusedError, match=message):
        read_published(tmp_path / "w.safetensors", "flow")


def test_heads_mean_nothing_to_a_unet(tmp_path: Path) -> None:
    save_file(sf.networks.SongUNet.ddpmpp(8, 1, 8, (1, 2), 1).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"heads=4: w\.safetensors holds a U-Net"):
        read_published(tmp_path / "w.safetensors", "edm", heads=4)


# That it is used as it was trained.


def test_samples_are_those_of_the_ode_that_sit_integrates_from_noise_to_data() -> None:
    """dx/du = F(x, u, class) for u from 0, noise, to 1, data, by Runge-Kutta's method, with the network alone."""
    made = tiny().double()
    labels = torch.tensor([0, 2, -1])
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def velocity(x: Tensor, u: float) -> Tensor:
        return made(x, torch.full((3,), u, dtype=torch.float64), labels)

    sigmas = sf.sampling.edm_sigmas(60)
    first, last = 1 / (1 + 80.0), 1 / (1 + float(sigmas[-2]))
    x, steps = first * 80 * noise, 60
    for k in range(steps):
        u, h = first + k * (last - first) / steps, (last - first) / steps
        a = velocity(x, u)
        b = velocity(x + h / 2 * a, u + h / 2)
        c = velocity(x + h / 2 * b, u + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + velocity(x + h * c, u + h))
    x = x + (1 - last) * velocity(x, last)

    denoiser = sf.Denoiser(made, sf.FlowPreconditioning())
    ours = sf.sampling.heun(lambda x, s: denoiser(x, s, labels), 80 * noise, sigmas)
    # Heun's error at this number of steps.
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-3)
    other = sf.sampling.heun(lambda x, s: denoiser(x, s), 80 * noise, sigmas)
    assert (other[:2] - x[:2]).abs().amax((1, 2, 3)).min() > 0.02
    torch.testing.assert_close(other[2], x[2], rtol=0, atol=1e-3)


def test_flow_of_normal_data_has_their_mean_and_spread() -> None:
    """For data N(m, c^2) the velocity is known: from its formula in SiT's times come samples of that distribution."""
    m, c = 0.3, 0.25

    class Exact(torch.nn.Module):
        def forward(self, x: Tensor, u: Tensor) -> Tensor:
            u = u[:, None]
            spread = (u * c) ** 2 + (1 - u) ** 2
            data = m + u * c**2 / spread * (x - u * m)
            noise = (1 - u) / spread * (x - u * m)
            return data - noise

    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    drawn = sf.sampling.heun(sf.Denoiser(Exact(), sf.FlowPreconditioning()), 80 * noise, sf.sampling.edm_sigmas(40))
    torch.testing.assert_close(drawn, m + c * noise, rtol=0, atol=0.02)


def test_samples_are_those_of_ddim_on_dits_table() -> None:
    """DDIM without noise over some of the 1,000 steps, with the network alone: Euler's method on their noise levels."""
    made = tiny().double()
    labels = torch.tensor([1, -1])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    steps = [*range(999, 0, -37), 0]
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = noise
    for k, following in zip(steps, [*steps[1:], None], strict=True):
        predicted = made(x, torch.full((2,), float(k), dtype=torch.float64), labels)
        data = (x - (1 - kept[k]).sqrt() * predicted) / kept[k].sqrt()
        after = torch.ones((), dtype=torch.float64) if following is None else kept[following]
        x = after.sqrt() * data + (1 - after).sqrt() * predicted

    levels = torch.cat([((1 - kept) / kept).sqrt()[steps], torch.zeros(1, dtype=torch.float64)])
    denoiser = sf.Denoiser(made, sf.DDPMPreconditioning())
    start = noise / kept[999].sqrt()
    ours = sf.sampling.euler(lambda x, s: denoiser(x, s, labels), start, levels)
    torch.testing.assert_close(ours, x, rtol=1e-7, atol=1e-7 * x.abs().max().item())


def test_guidance_is_that_of_the_velocities() -> None:
    made, labels = tiny(), torch.tensor([0, 2])
    denoiser = sf.Denoiser(made, sf.FlowPreconditioning())
    x, s = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([0.5, 3.0])
    u = 1 / (1 + s)
    x_u = u[:, None, None, None] * x
    with_class, without = made(x_u, u, labels), made(x_u, u)
    velocity = without + 4 * (with_class - without)
    guided = sf.sampling.classifier_free(denoiser, labels, 4.0)(x, s)
    torch.testing.assert_close(guided, x_u + (1 - u)[:, None, None, None] * velocity)


# The command.


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_import_makes_a_run_that_samples_and_exports(kind: str, tmp_path: Path, capsys) -> None:
    made = tiny()
    (tmp_path / "net.pt").write_bytes(foreign.saved(made.state_dict()))
    assert status("import", tmp_path / "net.pt", "--out", tmp_path / "run") == 2
    assert "--preconditioning" in capsys.readouterr().err
    assert status("import", tmp_path / "net.pt", "--out", tmp_path / "run", "--preconditioning", kind) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "architecture SiT or DiT/2" in told
    model = open_model(tmp_path / "run")
    assert (model.step, model.config.classes, model.config.shape) == (0, 3, (1, 8, 8))
    preconditioning = sf.FlowPreconditioning() if kind == "flow" else sf.DDPMPreconditioning()
    x, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1, -1])
    expected = sf.Denoiser(made, preconditioning)(x, 3.0, labels)
    assert torch.equal(model.denoiser(x, 3.0, labels), expected)
    words = ("--seeds", "0-3", "--steps", 3, "--class", 1, "--guidance-scale", 2)
    assert status("sample", tmp_path / "run", *words, "--out", tmp_path / "images") == 0
    assert len(list((tmp_path / "images").glob("*.png"))) >= 4
    write_plain(tmp_path / "plain", model.denoiser, (1, 8, 8))
    again = read_published(tmp_path / "plain" / "model.safetensors", kind).denoiser()
    assert torch.equal(again(x, 3.0, labels), expected)


def test_latents_of_a_network_that_states_no_scaling_are_floats_as_it_sees_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=4, scaling_factor=0.3, shift_factor=0.2, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    made = network(8, 2, 4, 64, 1, 4, classes=3, learn_sigma=True)
    torch.save(made.state_dict(), tmp_path / "net.pt")
    run = sf.interop.import_run(tmp_path / "net.pt", tmp_path / "run", preconditioning="flow")
    drawn = run.sample(8, steps=4, device="cpu")
    assert (drawn.images.dtype, drawn.images.shape) == (np.float32, (8, 4, *made.size))
    np.testing.assert_array_equal(run.sample(8, steps=4, device="cpu", decode=False).images, drawn.images)
    assert np.abs(drawn.images).max() > 1
    # diffusers' own rule of the autoencoder's scaling.
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(drawn.images) / 0.3 + 0.2).sample.clamp(-1, 1)
    decoded = run.sample(8, steps=4, device="cpu", vae=tmp_path / "vae").images
    np.testing.assert_allclose(decoded / 127.5 - 1, expected.numpy(), rtol=0, atol=0.51 / 127.5)
    with np.load(drawn.save(tmp_path / "latents.npz")) as saved:
        np.testing.assert_array_equal(saved["data"], drawn.images)
    assert status("sample", run.path, "--seeds", "0-7", "--steps", 4, "--out", tmp_path / "latents.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), drawn.images)

    run.export(tmp_path / "pipe")
    assert not (tmp_path / "pipe" / "samples.png").exists()
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert ".images  # a tensor, as the network sees them" in card
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    z = torch.randn(3, 4, *made.size, dtype=torch.float64)
    options = {"latents": z, "class_labels": 1, "num_inference_steps": 4}
    found = pipe(**options).images
    denoiser, labels = run.model().denoiser, torch.full((3,), 1)
    with torch.no_grad():
        expected = sf.sampling.heun(lambda x, s: denoiser(x, s, labels), 80 * z, sf.sampling.edm_sigmas(4))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(pipe(**options, output_type="np").images, found.numpy())
    with pytest.raises(ValueError, match="output_type is pil, and this model draws no images: pass pt or np"):
        pipe(**options, output_type="pil")
