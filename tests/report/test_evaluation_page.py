"""The page of an evaluation: every number with its protocol, and a word where two must not be compared."""

from dataclasses import replace

import numpy as np
import pytest

from stablefield.evaluation.page import Earlier, evaluation_page
from stablefield.evaluation.protocol import Protocol
from stablefield.evaluation.result import Result
from stablefield.report.page import Bullets, Details, Figure, KeyFigures, Section, Table
from stablefield.report.render import render_page

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
FID = Result(values=(3.5, 3.25), protocol=PROTOCOL)
KID = Result(values=(0.5, 0.25), protocol=replace(PROTOCOL, metric="KID"), standard_error=0.125)


def section(page, title):
    return next(block for block in page.blocks if isinstance(block, Section) and block.title == title)


def test_numbers_samples_and_protocols_are_on_the_page():
    images = np.zeros((9, 1, 8, 8), np.uint8)
    page = evaluation_page("runs/a", [FID, KID], images=images)
    key, table = page.blocks[:2]
    assert isinstance(key, KeyFigures)
    assert isinstance(table, Table)
    assert [figure.label for figure in key.figures] == ["FID", "KID"]
    assert table.rows[0] == ("FID", 3.25, 3.375, 0.25, 500, 1797)
    assert isinstance(section(page, "Samples").blocks[0], Figure)
    protocols = [block for block in section(page, "How it was measured").blocks if isinstance(block, Details)]
    assert len(protocols) == 2
    text = render_page(page)
    for words in ("35 network evaluations", "0a" * 32, "0b" * 32, "seeds 0-499, 500-999", "commit abc", "minimum 3.25"):
        assert words in text


def test_results_measured_otherwise_are_marked_and_warned_of():
    other = Result(values=(9.0,), protocol=replace(PROTOCOL, sample_count=5000, seeds=("0-4999",)))
    page = evaluation_page("runs/a", [FID, KID], earlier=Earlier(name="b.json", results=(other,)))
    table, warning = section(page, "Against an earlier result").blocks
    assert isinstance(table, Table)
    assert table.rows == (("FID", 3.375, 9.0, -5.625, "no"),)
    assert isinstance(warning, Bullets)
    assert "their difference means nothing: sample_count: 500 against 5000" in warning.items[0]


def test_equal_protocols_are_compared_without_a_word_of_warning():
    page = evaluation_page("runs/a", [FID], earlier=Earlier(name="b.json", results=(FID,)))
    assert len(section(page, "Against an earlier result").blocks) == 1


def test_a_page_about_nothing_is_refused():
    with pytest.raises(ValueError, match="results is empty"):
        evaluation_page("runs/a", [])
