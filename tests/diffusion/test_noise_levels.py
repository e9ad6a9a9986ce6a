"""Claims on the distributions of noise levels, held against scipy's distributions and the statistics of many draws."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

import stablefield as sf

PROCESSES = [sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()]
BY_LEVEL = [
    (sf.LogNormal(), scipy.stats.lognorm(s=1.2, scale=math.exp(-1.2))),
    (sf.LogNormal(mean=0.4, std=0.7), scipy.stats.lognorm(s=0.7, scale=math.exp(0.4))),
    (sf.LogUniform(), scipy.stats.loguniform(0.02, 100.0)),
    (sf.LogUniform(minimum=0.1, maximum=3.0), scipy.stats.loguniform(0.1, 3.0)),
]
BY_TIME = [
    (sf.Uniform(), scipy.stats.uniform(1e-5, 1 - 1e-5)),
    (sf.Uniform(start=0.25, end=0.75), scipy.stats.uniform(0.25, 0.5)),
]
EVERY = [distribution for distribution, _ in BY_LEVEL + BY_TIME] + [sf.Uniform(start=0.0, end=1.0)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def levels_of(t, process):
    return process.noise_level(t.double())


def p_value(sample, law):
    return scipy.stats.kstest(sample.numpy(), law.cdf).pvalue


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(("distribution", "law"), BY_LEVEL, ids=lambda value: repr(value)[:50])
def test_the_noise_level_has_the_stated_law_on_every_process(distribution, law, process):
    t = distribution.sample(process, 20_000, generator(0))
    assert p_value(levels_of(t, process), law) > 1e-3


def test_a_law_that_is_off_by_a_twentieth_of_a_standard_deviation_would_be_noticed():
    process = sf.VP()
    t = sf.LogNormal().sample(process, 20_000, generator(0))
    assert p_value(levels_of(t, process), scipy.stats.lognorm(s=1.2, scale=math.exp(-1.2 + 0.06))) < 1e-3
    assert p_value(levels_of(t, process), scipy.stats.lognorm(s=1.26, scale=math.exp(-1.2))) < 1e-3


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(("distribution", "law"), BY_TIME, ids=lambda value: repr(value)[:50])
def test_uniform_is_uniform_in_the_time_of_every_process(distribution, law, process):
    assert p_value(distribution.sample(process, 20_000, generator(1)), law) > 1e-3


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(("distribution", "law"), BY_LEVEL, ids=lambda value: repr(value)[:50])
def test_quantiles_are_those_of_scipy(distribution, law, process):
    u = torch.tensor([1e-12, 1e-6, 0.01, 0.3, 0.5, 0.77, 0.999, 1 - 1e-9], dtype=torch.float64)
    level = levels_of(distribution.quantile(u, process), process)
    np.testing.assert_allclose(level, law.ppf(u.numpy()), rtol=1e-9)


def test_uniform_time_on_vp_is_the_published_distribution_of_sigma():
    u = torch.linspace(0.001, 0.999, 57, dtype=torch.float64)
    t = 1e-5 + (1 - 1e-5) * u.numpy()
    sigma = np.sqrt(np.expm1(19.9 * t**2 / 2 + 0.1 * t))
    np.testing.assert_allclose(levels_of(sf.Uniform().quantile(u, sf.VP()), sf.VP()), sigma, rtol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.02, 100.0), (0.5, 3.0)])
def test_uniform_time_on_ve_is_log_uniform_noise(low, high):
    process = sf.VE(sigma_min=low, sigma_max=high)
    by_time, by_level = sf.Uniform(start=0.0, end=1.0), sf.LogUniform(minimum=low, maximum=high)
    u = torch.linspace(0.001, 0.999, 57, dtype=torch.float64)
    torch.testing.assert_close(by_time.quantile(u, process), by_level.quantile(u, process), rtol=1e-12, atol=1e-15)
    drawn = by_time.sample(process, 512, generator(2)), by_level.sample(process, 512, generator(2))
    torch.testing.assert_close(*drawn, rtol=1e-6, atol=1e-7)
    # The same noise levels, too, up to float32's resolution of a time.
    levels = by_level.sample(sf.EDM(), 512, generator(2)).double()
    torch.testing.assert_close(levels_of(drawn[0], process), levels, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.2, 1.2), (0.8, 0.5)])
def test_log_normal_on_a_rectified_flow_is_the_logit_normal_time(mean, std):
    distribution, flow = sf.LogNormal(mean=mean, std=std), sf.RectifiedFlow()
    u = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    expected = scipy.special.expit(mean + std * scipy.special.ndtri(u.numpy()))
    np.testing.assert_allclose(distribution.quantile(u, flow), expected, rtol=1e-12)
    t = distribution.sample(flow, 20_000, generator(3)).double()
    assert scipy.stats.kstest(torch.logit(t).numpy(), scipy.stats.norm(mean, std).cdf).pvalue > 1e-3


@pytest.mark.parametrize("process", PROCESSES[1:], ids=repr)
@pytest.mark.parametrize("stratified", [False, True])
def test_one_seed_gives_every_process_the_same_noise_levels(process, stratified):
    for distribution in (sf.LogNormal(stratified=stratified), sf.LogUniform(stratified=stratified)):
        level = levels_of(distribution.sample(process, 300, generator(4)), process)
        torch.testing.assert_close(level, distribution.sample(sf.EDM(), 300, generator(4)).double(), rtol=1e-4, atol=0)


def test_log_normal_on_a_table_draws_its_steps_and_is_monotone():
    process = sf.Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
    t = sf.LogNormal(mean=0.0).sample(process, 2000, generator(5))
    wanted = sf.LogNormal(mean=0.0).sample(sf.EDM(), 2000, generator(5))
    assert torch.equal(t, t.round())
    assert t.min() >= 0
    assert t.max() <= 999
    assert (t[wanted.argsort()].diff() >= 0).all()
    # Neighbouring steps of this table are less than 10 % apart above a level of 0.1.
    inside = (wanted > 0.1) & (wanted < 100)
    assert inside.sum() > 1000
    torch.testing.assert_close(process.noise_level(t)[inside], wanted[inside], rtol=0.05, atol=0)


# --- stratification ---------------------------------------------------------------------------------------------------


def strata(distribution, law, process, batch, seed):
    level = levels_of(distribution.sample(process, batch, generator(seed)), process)
    return np.floor(law.cdf(level.numpy()) * batch).astype(int)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_a_stratified_batch_has_one_row_in_each_of_b_equally_probable_parts(process, batch):
    law = scipy.stats.lognorm(s=1.2, scale=math.exp(-1.2))
    for seed in range(5):
        assert sorted(strata(sf.LogNormal(stratified=True), law, process, batch, seed)) == list(range(batch))
    if batch == 64:
        assert sorted(strata(sf.LogNormal(), law, process, batch, 0)) != list(range(batch))


def test_stratified_uniform_and_log_uniform_cover_their_parts_too():
    t = sf.Uniform(start=0.0, end=1.0, stratified=True).sample(sf.VP(), 50, generator(0))
    assert sorted((t * 50).long().tolist()) == list(range(50))
    law = scipy.stats.loguniform(0.02, 100.0)
    assert sorted(strata(sf.LogUniform(stratified=True), law, sf.EDM(), 50, 0)) == list(range(50))


def test_each_row_of_a_stratified_batch_keeps_the_law_of_the_distribution():
    distribution, source = sf.LogNormal(stratified=True), generator(6)
    draws = torch.stack([distribution.sample(sf.EDM(), 4, source) for _ in range(4000)])
    for row in range(4):
        assert p_value(draws[:, row].double(), scipy.stats.lognorm(s=1.2, scale=math.exp(-1.2))) > 1e-3


def test_the_order_of_the_strata_is_random():
    distribution, source = sf.Uniform(start=0.0, end=1.0, stratified=True), generator(7)
    order = torch.stack([(distribution.sample(sf.EDM(), 4, source) * 4).long() for _ in range(4800)])
    code = (order * torch.tensor([64, 16, 4, 1])).sum(1)
    _, counts = torch.unique(code, return_counts=True)
    # All 24 orders, equally often.
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_the_place_within_a_stratum_is_uniform_and_independent_between_rows():
    distribution, source = sf.Uniform(start=0.0, end=1.0, stratified=True), generator(8)
    place = torch.stack([distribution.sample(sf.EDM(), 2, source) * 2 % 1 for _ in range(4000)]).double()
    assert scipy.stats.kstest(place[:, 0].numpy(), "uniform").pvalue > 1e-3
    assert abs(torch.corrcoef(place.T)[0, 1]) < 4 / math.sqrt(4000)


def test_stratification_lowers_the_variance_of_a_batch_mean_by_far_more_than_chance():
    def variance(stratified):
        distribution, source = sf.LogNormal(stratified=stratified), generator(9)
        return torch.stack([distribution.sample(sf.EDM(), 64, source).log().mean() for _ in range(300)]).var()

    # For a uniform variable it is 1/B^2 of the plain variance; the normal's tails keep some.
    assert variance(True) < 0.05 * variance(False)


# --- ends, dtypes, devices, seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("distribution", EVERY, ids=repr)
@pytest.mark.parametrize("u", [0.0, 2**-53, 1 - 2**-53])
def test_the_most_extreme_uniform_numbers_give_finite_positive_noise_levels(monkeypatch, distribution, process, u):
    monkeypatch.setattr(torch, "rand", lambda *size, dtype=None, **_: torch.full(size, u, dtype=dtype))
    for stratified in (False, True):
        chosen = type(distribution)(**{**vars(distribution), "stratified": stratified})
        t = chosen.sample(process, 3)
        # In the float32 in which a training step sees them.
        level, alpha = process.noise_level(t), process.alpha(t)
        assert t.dtype == torch.float32
        assert torch.isfinite(t).all()
        assert (torch.isfinite(level) & (level > 0)).all()
        assert (alpha > 0).all()


@pytest.mark.parametrize("distribution", EVERY, ids=repr)
def test_times_are_float32_of_the_batchs_shape_on_the_device_asked_for(distribution):
    t = distribution.sample(sf.VP(), 5, generator(0), device="cpu")
    assert t.shape == (5,)
    assert t.dtype == torch.float32
    assert t.device.type == "cpu"
    assert distribution.sample(sf.VP(), 5, device="meta").device.type == "meta"
    assert len(t.unique()) == 5


@pytest.mark.parametrize("stratified", [False, True])
def test_times_are_a_function_of_the_generator_alone(stratified):
    distribution = sf.LogNormal(stratified=stratified)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = distribution.sample(sf.EDM(), 40, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(distribution.sample(sf.EDM(), 40, generator(1)), one)
    assert not torch.equal(distribution.sample(sf.EDM(), 40, generator(2)), one)
    source = generator(1)
    assert torch.equal(distribution.sample(sf.EDM(), 40, source), one)
    assert not torch.equal(distribution.sample(sf.EDM(), 40, source), one)


def test_without_a_generator_torchs_global_one_is_used():
    torch.manual_seed(3)
    one = sf.LogNormal().sample(sf.EDM(), 8)
    torch.manual_seed(3)
    assert torch.equal(sf.LogNormal().sample(sf.EDM(), 8), one)
    assert not torch.equal(sf.LogNormal().sample(sf.EDM(), 8), one)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sf.LogNormal(std=0.0), "std=0.0"),
        (lambda: sf.LogNormal(std=-1.0), "std=-1.0"),
        (lambda: sf.LogNormal(std=math.inf), "std=inf"),
        (lambda: sf.LogNormal(std=math.nan), "std=nan"),
        (lambda: sf.LogNormal(mean=math.nan), "mean=nan"),
        (lambda: sf.LogNormal(mean=-math.inf), "mean=-inf"),
        (lambda: sf.LogUniform(minimum=0.0), "minimum=0.0"),
        (lambda: sf.LogUniform(minimum=-0.1), "minimum=-0.1"),
        (lambda: sf.LogUniform(minimum=2.0, maximum=2.0), "maximum=2.0"),
        (lambda: sf.LogUniform(maximum=math.inf), "maximum=inf"),
        (lambda: sf.LogUniform(minimum=math.nan), "minimum=nan"),
        (lambda: sf.Uniform(start=-0.1), "start=-0.1"),
        (lambda: sf.Uniform(start=1.0), "start=1.0"),
        (lambda: sf.Uniform(end=math.inf), "end=inf"),
        (lambda: sf.Uniform(end=math.nan), "end=nan"),
    ],
)
def test_parameters_without_a_distribution_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("distribution", EVERY, ids=repr)
def test_distributions_are_frozen_values(distribution):
    twin = type(distribution)(**vars(distribution))
    assert twin == distribution
    assert hash(twin) == hash(distribution)
    with pytest.raises(AttributeError):
        distribution.stratified = True
