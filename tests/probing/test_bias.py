import pytest
import torch

import stablefield as sf
from stablefield.probing._bias import check_bias, largest_t
from stablefield.probing._bias_probe import BiasProbe, ClassesMixed, SourceLeftOut, SourceTwice
from stablefield.probing._population import Population, draw_population
from stablefield.report import render_page

SETTINGS = {"batch": 64, "batches": 120, "noise_levels": [0.6, 0.9, 1.4]}


@pytest.fixture(scope="module")
def by_class(digits):
    return draw_population(digits, max_images=500, by_class=True)


@pytest.fixture(scope="module")
def plain(by_class):
    return Population(by_class.data)


def sound(population):
    data, labels = population.data, population.labels
    return {
        "batch": sf.StableTarget(sf.EDM(), references=sf.InBatch()),
        "pool": sf.StableTarget(sf.EDM(), references=sf.Pool(data, 128, labels)),
        "whole": sf.StableTarget(sf.EDM(), references=sf.Pool(data, None, labels)),
    }


@pytest.mark.parametrize("name", ["batch", "pool", "whole"])
def test_the_three_correct_sources_pass(plain, by_class, name):
    for population in (plain, by_class):
        result = check_bias(sound(population)[name], population, false_alarm=0.01, **SETTINGS)
        assert result.passed, (result.direction, result.noise_level, result.statistic)


def test_a_class_conditional_source_with_dropped_labels_passes(by_class):
    assert check_bias(sound(by_class)["pool"], by_class, label_dropout=0.3, **SETTINGS).passed


@pytest.mark.parametrize("size", [128, None])
def test_each_planted_fault_is_flagged(plain, by_class, size):
    faults = [
        (SourceLeftOut(plain, size), plain, 60),
        (ClassesMixed(by_class, size), by_class, 60),
        (SourceTwice(plain, size), plain, 120),  # the smallest of the faults
    ]
    if size is None:
        faults.append((SourceLeftOut(by_class, None), by_class, 60))
    for target, population, batches in faults:
        result = check_bias(target, population, false_alarm=0.01, **{**SETTINGS, "batches": batches})
        assert not result.passed, type(target).__name__
        assert result.p_value <= 0.01


def test_a_fault_is_flagged_for_another_process(plain):
    process = sf.VP()
    good = check_bias(sf.StableTarget(process, references=sf.InBatch()), plain, process=process, **SETTINGS)
    bad = check_bias(SourceLeftOut(plain, 128, process=process), plain, process=process, **SETTINGS)
    assert good.passed
    assert not bad.passed


def test_mixed_classes_show_along_the_mean_of_the_class(by_class):
    result = check_bias(ClassesMixed(by_class, 128), by_class, batches=60, batch=64, noise_levels=[3.0])
    assert result.direction == "class mean"
    assert result.t[result.directions.index("class mean"), 0] < -10


def test_single_samples_have_no_residual_and_pass(plain):
    result = check_bias(sf.DenoisingTarget(sf.EDM()), plain, batches=20, noise_levels=[1.0])
    assert result.passed
    assert result.p_value == 1
    assert result.statistic == 0


def test_a_plain_function_can_be_checked(plain):
    def shrunk(x0, x_t, t, labels=None, index=None, *, reference_labels=None, generator=None):
        return 0.9 * sf.posterior(x_t, 1.0, t, plain.data).mean

    assert not check_bias(shrunk, plain, batches=40, noise_levels=[1.0]).passed


def test_unbiased_targets_fail_at_the_stated_rate():
    # Few skewed samples in three dimensions, where batches are far from normal; 25 seeds at a rate of 1 in 10.
    generator = torch.Generator().manual_seed(1)
    population = Population(torch.randn(24, 3, generator=generator).exp())
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch())
    failed = sum(
        not check_bias(
            target, population, batch=8, batches=20, noise_levels=[0.3, 1.0], false_alarm=0.1, seed=seed
        ).passed
        for seed in range(25)
    )
    # Binomial(25, 0.1): 9 or more has probability 0.0005.
    assert failed <= 8


@pytest.mark.parametrize("kind", ["normal", "dependent", "rare"])
def test_the_largest_t_exceeds_its_level_at_that_level(kind):
    generator = torch.Generator().manual_seed(2)
    p_values = []
    for _ in range(500):
        values = torch.randn(60, 12, generator=generator, dtype=torch.float64)
        if kind == "dependent":
            values = values + 3 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
        if kind == "rare":
            values = values * (torch.rand(60, 12, generator=generator) < 0.1)
        p_values.append(largest_t(values, 0.1, generator)[1])
    rate = float((torch.tensor(p_values) <= 0.1).double().mean())
    # Five standard errors of a rate of 0.1 in 500.
    assert abs(rate - 0.1) < 0.067


def test_t_statistics_are_students():
    values = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    t, _ = largest_t(values, 0.1)
    expected = values.mean(0) / values.std(0) * 30**0.5
    assert torch.allclose(t, expected)
    from scipy import stats

    assert torch.allclose(t, torch.from_numpy(stats.ttest_1samp(values.numpy(), 0).statistic))


def test_wrong_arguments_are_named(plain):
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch())
    for arguments, words in (
        ({"false_alarm": 0.0}, "false_alarm is 0"),
        ({"label_dropout": 2.0}, "label_dropout is 2"),
        ({"batches": 3}, "batches is 3"),
        ({"noise_levels": [-1.0]}, "noise_levels=\\["),
    ):
        with pytest.raises(ValueError, match=words):
            check_bias(target, plain, **arguments)
    with pytest.raises(ValueError, match="the target has shape"):
        check_bias(lambda x0, *a, **k: x0[:, :, 1:], plain, noise_levels=[1.0])


def test_more_noise_levels_than_rows_are_refused(plain):
    with pytest.raises(ValueError, match="noise_levels has 3 levels for a batch of 2 rows"):
        check_bias(sf.DenoisingTarget(sf.EDM()), plain, batch=2, batches=20, noise_levels=[0.5, 1.0, 2.0])


def test_a_planted_fault_that_is_not_detected_is_named():
    one = check_bias(sf.DenoisingTarget(sf.EDM()), Population(torch.randn(40, 3)), batches=20, noise_levels=[1.0])
    found = BiasProbe(
        name="x",
        manifest={},
        checks={"the batch": one, "source left out": one},
        planted=("source left out",),
        false_alarm=0.001,
        seed=0,
    )
    assert str(found).endswith("It did not detect: source left out. A policy with this fault would pass, too.")
    assert "It did not detect: source left out" in render_page(found.page())
