"""A UNet2DModel as a network of ours."""

import pytest
import torch
from diffusers import UNet2DModel

import stablefield as sf
from stablefield.networks._diffusers_unet import DiffusersUNet


def unet(**options):
    torch.manual_seed(0)
    usual = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**(usual | options)).eval()


@pytest.fixture
def x(rng):
    return torch.randn(4, 1, 8, 8, generator=rng)


def test_denoiser_is_edms_formula_around_the_model(x):
    model = unet()
    s = torch.tensor([0.01, 0.5, 3.0, 80.0])
    c = s[:, None, None, None]
    with torch.no_grad():
        found = sf.Denoiser(DiffusersUNet(model))(x, s)
        inner = model(x / (c**2 + 0.25).sqrt(), s.log() / 4).sample
    torch.testing.assert_close(found, 0.25 / (c**2 + 0.25) * x + c * 0.5 / (c**2 + 0.25).sqrt() * inner)


def test_fourier_model_which_takes_logarithms_gets_the_label_back(x):
    model = unet(time_embedding_type="fourier")
    labels: list[torch.Tensor] = []
    model.time_proj.register_forward_pre_hook(lambda _, args: labels.append(args[0].log()))
    with torch.no_grad():
        assert DiffusersUNet(model)(x, torch.tensor([-1.5, -0.2, 0.0, 1.1])).isfinite().all()
    torch.testing.assert_close(labels[0], torch.tensor([-1.5, -0.2, 0.0, 1.1]))


def test_the_division_by_the_timestep_of_a_fourier_model_is_undone(x):
    model = unet(time_embedding_type="fourier")
    outputs: list[torch.Tensor] = []
    model.conv_out.register_forward_hook(lambda _, __, out: outputs.append(out))
    sigma = torch.tensor([0.02, 1.0, 10.0, 100.0])
    with torch.no_grad():
        found = sf.Denoiser(DiffusersUNet(model), sf.VEPreconditioning())(x, sigma)
    torch.testing.assert_close(found, x + sigma.reshape(-1, 1, 1, 1) * outputs[0], rtol=1e-4, atol=1e-5)


def test_no_class_is_the_last_entry_of_the_class_embedding(x):
    model = unet(num_class_embeds=4)
    network, label = DiffusersUNet(model), torch.zeros(4)
    assert network.classes == 3
    with torch.no_grad():
        found = network(x, label, torch.tensor([0, 2, -1, -1]))
        assert torch.equal(found, model(x, label, class_labels=torch.tensor([0, 2, 3, 3])).sample)
        assert torch.equal(network(x, label), network(x, label, torch.full((4,), -1)))


@pytest.mark.parametrize("classes", [0, 3])
def test_it_trains_under_the_objective_with_label_dropout(classes, x, rng):
    denoiser = sf.Denoiser(DiffusersUNet.sized(8, 1, (8, 8), 1, classes, groups=4))
    labels = torch.tensor([0, 1, 2, 0]) if classes else None
    objective = sf.Objective(
        sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()), label_dropout=0.5 if classes else 0.0
    )
    value = objective(denoiser, x, labels, generator=rng)
    value.loss.backward()
    grads = [p.grad for p in denoiser.parameters()]
    assert value.loss.isfinite()
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0


def test_it_is_sampled_from_like_any_denoiser(x):
    denoiser = sf.Denoiser(DiffusersUNet.sized(8, 1, (8, 8), 1, groups=4)).eval()
    assert sf.sampling.heun(denoiser, 80 * x, sf.sampling.edm_sigmas(4)).shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "time_embedding_type learned"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ({"out_channels": 2}, "1 channels to 2"),
    ],
)
def test_model_that_cannot_be_a_denoiser_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusersUNet(unet(**options))


def test_labels_for_a_model_without_classes_are_refused(x):
    with pytest.raises(ValueError, match="without classes"):
        DiffusersUNet(unet())(x, torch.zeros(4), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("kind", ["MLP", "SongUNet", "SiT", "DiffusersUNet"])
def test_labels_that_a_network_cannot_see_are_refused(kind: str) -> None:
    generator, shape = torch.Generator().manual_seed(0), (1, 8, 8)

    def make(classes: int) -> torch.nn.Module:
        match kind:
            case "MLP":
                return sf.networks.MLP(shape, width=8, depth=1, classes=classes, generator=generator)
            case "SongUNet":
                return sf.networks.SongUNet.ddpmpp((8, 8), 1, 8, (1,), blocks=1, classes=classes, generator=generator)
            case "SiT":
                return sf.networks.SiT((8, 8), 4, 1, 16, 1, 2, classes=classes, generator=generator)
            case _:
                return DiffusersUNet.sized(8, 1, (8, 8), 1, classes=classes, groups=4)

    x, label = torch.zeros(2, *shape), torch.zeros(2)
    make(3)(x, label, torch.tensor([2, -1]))
    for classes, labels in ((0, [0, 1]), (3, [3, 0]), (3, [0, -2])):
        with pytest.raises(ValueError, match=r"class|label"):
            make(classes)(x, label, torch.tensor(labels))
