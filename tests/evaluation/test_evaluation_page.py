"""The page of an evaluation: every number with its protocol, and a word where two must not be compared."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stablefield.evaluation._protocol import Protocol, Score
from stablefield.evaluation._result import Evaluation, Pictures
from stablefield.report._page import Bullets, Details, Figure, KeyFigures, Section, SideBySide, Table
from stablefield.report._render import render_page

PROTOCOL = Protocol(
    metric="FID",
    extractor="net",
    extractor_sha256="0a" * 32,
    resize="none",
    sample_count=500,
    reference="digits",
    reference_sha256="0b" * 32,
    reference_count=1797,
    split="train",
    seeds=("0-499", "500-999"),
    sampler="heun (edm)",
    steps=18,
    nfe=35.0,
    ema="half-life",
    commit="abc",
)
FID = Score(values=(3.5, 3.25), protocol=PROTOCOL, better="lower is better")
KID = Score(values=(0.5, 0.25), protocol=replace(PROTOCOL, metric="KID"), standard_error=0.125)


def section(page, title):
    return next(block for block in page.blocks if isinstance(block, Section) and block.title == title)


def evaluation(*scores, **more):
    return Evaluation(name="runs/a", scores=scores, **more)


def test_numbers_samples_beside_real_images_and_protocols_are_on_the_page():
    samples, real = (Pictures(images=np.full((9, 1, 8, 8), grey, np.uint8)) for grey in (0, 200))
    page = evaluation(FID, KID, samples=samples, references=real).page()
    key, table = page.blocks[:2]
    assert isinstance(key, KeyFigures)
    assert isinstance(table, Table)
    assert [figure.label for figure in key.figures] == ["FID", "KID"]
    assert table.rows[0] == ("FID ↓", 3.25, 3.375, 0.25, "", 500, 1797)
    (beside,) = section(page, "Samples beside real images").blocks
    assert isinstance(beside, SideBySide)
    assert [figure.caption for figure in beside.figures] == ["9 samples.", "9 real images."]
    assert beside.figures[0].picture != beside.figures[1].picture
    protocols = [block for block in section(page, "How it was measured").blocks if isinstance(block, Details)]
    assert len(protocols) == 2
    text = render_page(page)
    for words in ("35 network evaluations", "0a" * 32, "0b" * 32, "seeds 0-499, 500-999", "commit abc", "minimum 3.25"):
        assert words in text
    assert "FID (lower is better) is 3.375 on 500 samples, the mean of 2 repeats" in text


def test_the_cautions_of_the_terminal_are_on_the_page_too():
    few = evaluation(FID, KID)
    (caution,) = few.notes()
    assert "on few samples is biased upwards" in caution
    assert few.page().blocks[2] == Bullets((caution,))
    many = Score(
        values=(3.5,), protocol=replace(PROTOCOL, sample_count=10_000, reference_count=50_000, seeds=("0-9999",))
    )
    assert "biased" not in render_page(evaluation(many).page())


def test_samples_without_real_images_are_shown_alone():
    page = evaluation(FID, samples=Pictures(images=np.zeros((9, 1, 8, 8), np.uint8))).page()
    assert isinstance(section(page, "Samples").blocks[0], Figure)


def test_results_measured_otherwise_are_marked_and_warned_of():
    other = Score(values=(9.0,), protocol=replace(PROTOCOL, sample_count=5000, seeds=("0-4999",)))
    both = evaluation(FID, KID).compare(Evaluation(name="b.json", scores=(other,)))
    table, warning = section(both.page(), "Against an earlier result").blocks
    assert isinstance(table, Table)
    assert table.rows == (("FID ↓", 3.375, 9.0, -5.625, "no"),)
    assert isinstance(warning, Bullets)
    assert "their difference means nothing: sample_count: 500 against 5000" in warning.items[0]
    assert "their difference means nothing" in str(both)


def test_equal_protocols_are_compared_without_a_word_of_warning():
    page = evaluation(FID).compare(Evaluation(name="b.json", scores=(FID,))).page()
    assert len(section(page, "Against an earlier result").blocks) == 1


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="scores is empty"):
        evaluation()


def test_the_table_is_plain_text_of_80_columns_with_the_protocol_beneath():
    long = replace(PROTOCOL, metric=f"Frechet distance ({'a network with a very long name ' * 3})", extractor="x" * 60)
    text = str(evaluation(FID, KID, Score(values=(1e6, 2e6), protocol=long)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["FID", "↓", "3.2500", "3.3750", "0.2500"]
    assert lines[2].split() == ["KID", "0.2500", "0.3750", "0.2500", "±", "0.12"]
    assert "net (sha256 0a0a0a0a0a0a), resize none: 2 x 500 samples against 1,797 of" in text


def test_a_notebook_shows_the_page_and_a_file_of_each_kind_is_written(tmp_path):
    it = evaluation(FID)
    assert "<iframe" in it._repr_html_()
    it.save(tmp_path / "r.html")
    assert Evaluation.load(it.save(tmp_path / "r.json")).scores == it.scores
    for kind, missing in ((".csv", "table"), (".png", "chart")):
        with pytest.raises(ValueError, match=f"this result has no {missing}; save it as .json or .html"):
            it.save(tmp_path / f"r{kind}")
    assert it["FID"] is FID
    with pytest.raises(KeyError, match="the evaluation has no score 'KID'; it has FID"):
        it["KID"]


def test_no_flipped_bit_of_results_makes_other_results(tmp_path):
    it = evaluation(FID, KID)
    path = it.save(tmp_path / "r.json")
    content = path.read_bytes()
    told = []
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert Evaluation.load(path).scores == it.scores  # white space became other white space
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 2 * len(content)
    assert all(text.startswith(f"{path} holds no results") for text in told)


def test_files_of_earlier_versions_still_open(tmp_path):
    record = evaluation(FID, KID).to_dict()
    del record["checksum"]  # as before results carried one
    for result in record["results"]:
        del result["better"]
    (tmp_path / "r.json").write_text(json.dumps(record))
    found = Evaluation.load(tmp_path / "r.json")
    assert (found.name, found.scores) == ("runs/a", (replace(FID, better=""), KID))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "subject": "x", "results": [{}]}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json holds no results .*name a file that `stablefield evaluate` or"):
        Evaluation.load(path)
    with pytest.raises(ValueError, match=r"none\.json holds no results"):
        Evaluation.load(tmp_path / "none.json")
