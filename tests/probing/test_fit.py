import pytest
import torch

import stablefield as sf
from stablefield.probing._fit import measure_fit
from stablefield.probing._population import Population, draw_population


def test_the_exact_posterior_mean_has_distance_0_and_the_floor_as_its_loss(two_gaussians):
    def optimum(x, s):
        return sf.posterior(x, 1.0, s, two_gaussians).mean

    fit = measure_fit(optimum, Population(two_gaussians), [0.3, 1.0, 5.0], rows=800, batch=300)
    assert (fit.distance.mean < 1e-8).all()
    assert ((fit.loss.mean - fit.floor.mean).abs() < 4 * fit.loss.error).all()
    assert fit.rows == 800


def test_the_distance_of_a_shifted_optimum_is_the_shift_and_adds_to_the_loss(two_gaussians):
    def shifted(x, s):
        return sf.posterior(x, 1.0, s, two_gaussians).mean + 0.1 * s[:, None]

    fit = measure_fit(shifted, Population(two_gaussians), [0.5, 2.0], rows=1000)
    expected = 64 * (0.1 * fit.noise_level) ** 2
    assert torch.allclose(fit.distance.mean, expected, rtol=1e-4)
    gap = fit.loss.mean - fit.floor.mean - expected
    assert (gap.abs() < 4 * fit.loss.error).all()


def test_within_classes_a_labelled_network_is_told_the_class(digits):
    population = draw_population(digits, by_class=True)

    def optimum(x, s, labels):
        return sf.posterior(x, 1.0, s, population.data, labels=labels, reference_labels=population.labels).mean

    fit = measure_fit(optimum, population, [1.0], labelled=True, rows=64)
    assert float(fit.distance.mean[0]) < 1e-6
    blind = measure_fit(lambda x, s: sf.posterior(x, 1.0, s, population.data).mean, population, [1.0], rows=64)
    assert float(blind.distance.mean[0]) > 0.1


def test_wrong_arguments_are_named(two_gaussians):
    population = Population(two_gaussians)
    for arguments, words in (
        ({"noise_levels": [0.0]}, "noise_levels=\\["),
        ({"noise_levels": [1.0], "rows": 1}, "rows is 1"),
        ({"noise_levels": [1.0], "labelled": True}, "no labels"),
    ):
        with pytest.raises(ValueError, match=words):
            measure_fit(lambda x, s: x, population, **arguments)
    with pytest.raises(ValueError, match=r"returned shape \(1, 63\)"):
        measure_fit(lambda x, s: x[:, 1:], population, [1.0])


def test_a_network_that_does_not_fit_is_refused_before_the_posteriors_are_computed(two_gaussians):
    seen = []
    with pytest.raises(ValueError, match="return the shape of the rows"):
        measure_fit(lambda x, s: x[:, 1:], Population(two_gaussians), [0.5, 1.0], progress=seen.append)
    assert seen == []


def test_a_network_in_training_is_measured_in_evaluation_mode_and_left_as_it_was(two_gaussians):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 64))

    class Denoised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, sigma):  # noqa: ARG002
            return self.inner(x)

    model, state = Denoised().train(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_fit(model, Population(two_gaussians), [0.5, 1.0], rows=32)
    assert model.training
    assert network[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = measure_fit(model.eval(), Population(two_gaussians), [0.5, 1.0], rows=32)
    assert torch.equal(found.distance.mean, expected.distance.mean)


def test_labels_of_another_length_are_refused_also_where_samples_are_drawn(digits):
    data, labels = torch.from_numpy(digits.images)[:100], torch.zeros(200, dtype=torch.int64)
    for most in (50, 1000):
        with pytest.raises(
            ValueError, match=r"^labels has shape \(200,\): pass one integer per sample, shape \(100,\)"
        ):
            draw_population(data, labels, by_class=True, max_images=most)
