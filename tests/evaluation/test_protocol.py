import dataclasses
import json

import pytest

from stablefield.evaluation._protocol import Protocol, Score, ScoreComparison, differences

PROTOCOL = Protocol(
    metric="KID",
    settings={"subsets": 100, "subset_size": 1000},
    extractor="Inception-v3 (2015-12-05)",
    extractor_sha256="7f" * 32,
    resize="tensorflow1-bilinear-299x299",
    sample_count=50_000,
    reference="CIFAR-10",
    reference_sha256="ab" * 32,
    reference_count=50_000,
    split="train",
    seeds=("0-49999", "50000-99999", "100000-149999"),
    sampler="heun",
    steps=18,
    nfe=35,
    ema="0.9999",
    commit="0123abc",
)
CHANGES = {
    "metric": "FID",
    "settings": {"subsets": 10, "subset_size": 1000},
    "extractor": "DINOv2",
    "extractor_sha256": "00" * 32,
    "resize": "none",
    "sample_count": 5_000,
    "reference": "ImageNet",
    "reference_sha256": "cd" * 32,
    "reference_count": 10_000,
    "split": "test",
    "seeds": ("7-8", "9-10", "11-12"),
    "sampler": None,
    "steps": 20,
    "nfe": 39.5,
    "ema": "0.999",
    "commit": None,
}
MADE = {"seeds", "sampler", "steps", "nfe", "ema", "commit"}


def result(*values: float, **changes: object) -> Score:
    protocol = dataclasses.replace(PROTOCOL, **changes)
    return Score(values=values, protocol=dataclasses.replace(protocol, seeds=protocol.seeds[: len(values)]))


def test_the_record_survives_json() -> None:
    assert Protocol.from_dict(json.loads(json.dumps(PROTOCOL.to_dict()))) == PROTOCOL
    bare = dataclasses.replace(PROTOCOL, **dict.fromkeys(("sampler", "steps", "nfe", "ema", "commit")), seeds=())
    assert Protocol.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare
    assert set(PROTOCOL.to_dict()) == set(CHANGES)


def test_equal_records_give_equal_json_and_cannot_be_changed_from_outside() -> None:
    given = {"subset_size": 1000, "subsets": 100}
    other = dataclasses.replace(PROTOCOL, settings=given)
    given["subsets"] = 1
    assert json.dumps(other.to_dict()) == json.dumps(PROTOCOL.to_dict())


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_in_any_field_is_a_difference_and_a_warning(field: str) -> None:
    other = dataclasses.replace(PROTOCOL, **{field: CHANGES[field]})
    (found,) = differences(PROTOCOL, other)
    assert found == ("settings.subsets" if field == "settings" else field)
    comparison = ScoreComparison(
        first=Score(values=(1.0,) * 3, protocol=PROTOCOL), second=Score(values=(2.0,) * 3, protocol=other)
    )
    assert found in comparison.warning
    assert comparison.comparable == (field in MADE)
    assert ("means nothing" in comparison.warning) == (field not in MADE)
    assert comparison.difference == -1


def test_every_field_is_under_test() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Protocol)}


def test_what_forbids_a_comparison_is_listed_first() -> None:
    other = dataclasses.replace(PROTOCOL, steps=9, nfe=17, split="test", sample_count=10)
    assert list(differences(PROTOCOL, other)) == ["sample_count", "split", "steps", "nfe"]
    comparison = ScoreComparison(
        first=Score(values=(3.0,) * 3, protocol=PROTOCOL), second=Score(values=(1.0,) * 3, protocol=other)
    )
    assert "nothing: sample_count: 50000 against 10; split: 'train' against 'test'." in comparison.warning
    assert comparison.warning.endswith("Their samples were made differently: steps: 18 against 9; nfe: 35 against 17.")


def test_a_setting_that_one_side_lacks_is_a_difference() -> None:
    found = differences(PROTOCOL, dataclasses.replace(PROTOCOL, settings={"subsets": 100}))
    assert found == {"settings.subset_size": (1000, None)}


def test_equal_protocols_are_compared_in_silence() -> None:
    comparison = ScoreComparison(first=result(3.0), second=result(1.0))
    assert comparison.warning == ""
    assert comparison.difference == 2.0
    assert comparison.comparable
    assert comparison.differences == {}


def test_repeats_give_minimum_mean_and_spread() -> None:
    three = result(2.5, 2.0, 2.4)
    assert (three.minimum, three.mean, three.spread) == (2.0, pytest.approx(2.3), 0.5)
    assert result(2.5).spread == 0


def test_a_result_survives_json_with_its_summary() -> None:
    three = dataclasses.replace(result(2.5, 2.0, 2.4), standard_error=0.1)
    assert Score.from_dict(json.loads(json.dumps(three.to_dict()))) == three
    record = three.to_dict()
    assert (record["minimum"], record["spread"]) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sample_count": 0}, "sample_count is 0"),
        ({"sample_count": 5e4}, "sample_count is 50000.0"),
        ({"extractor_sha256": "7f"}, "extractor_sha256 is '7f': pass 64 hexadecimal"),
        ({"seeds": "0-63"}, "seeds is '0-63'.*tuple of strings"),
        ({"settings": {"k": [3]}}, "settings is"),
        ({"split": None}, "split is None"),
        ({"nfe": True}, "nfe is True"),
    ],
)
def test_bad_records_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(PROTOCOL, **change)


def test_records_of_other_versions_are_refused() -> None:
    record = PROTOCOL.to_dict()
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        Protocol.from_dict(record | {"colour": "red"})
    del record["resize"]
    with pytest.raises(ValueError, match=r"incomplete: .*resize"):
        Protocol.from_dict(record)
    with pytest.raises(ValueError, match="must hold values and a protocol"):
        Score.from_dict({})


def test_results_without_a_number_or_with_stray_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="values holds nan"):
        result(float("nan"))
    with pytest.raises(ValueError, match="values is empty"):
        Score(values=(), protocol=PROTOCOL)
    with pytest.raises(ValueError, match="2 values, but 3 ranges of seeds"):
        Score(values=(1.0, 2.0), protocol=PROTOCOL)
