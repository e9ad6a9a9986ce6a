"""Results on a terminal: a table, and beneath it what was measured how."""

import hashlib
import re
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from stablefield.cli.console import console
from stablefield.evaluation.protocol import Protocol
from stablefield.evaluation.result import Result, compare_all

__all__ = ["print_against", "print_results"]

_HASH_SHOWN = 12


def print_results(results: Sequence[Result]) -> None:
    """A line per number; beneath the table what they share, once per extractor and reference set."""
    repeated = len(results[0].values) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("minimum", "mean", "spread") if repeated else ("value",):
        table.add_column(heading, justify="right")
    table.add_column("std. error", justify="right")
    for result in results:
        numbers = (result.minimum, result.mean, result.spread) if repeated else (result.mean,)
        error = "" if result.standard_error is None else f"± {result.standard_error:.2g}"
        table.add_row(escape(_short(result.protocol.metric)), *(_number(number) for number in numbers), error)
    console.print(table)
    seen: list[str] = []
    for result in results:
        for line in _protocol_lines(result.protocol, len(result.values)):
            if line not in seen:
                seen.append(line)
    for line in seen:
        console.print(line, style="dim", markup=False)
    for note in _notes(results):
        console.print(f"[yellow]note:[/] {escape(note)}")


def print_against(results: Sequence[Result], earlier: Sequence[Result], name: str) -> None:
    """The same numbers of an earlier file beside these, with a warning where protocols differ."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=escape(f"against {name}"), title_justify="left")
    for heading in ("", "here", "there", "difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    found, messages = compare_all(results, earlier)
    for result, other, comparison in found:
        mark = "" if comparison.comparable else " (!)"
        table.add_row(
            escape(_short(result.protocol.metric)),
            _number(result.mean),
            _number(other.mean),
            f"{comparison.difference:+.4g}{mark}",
        )
    if not found:
        console.print(f"[yellow]warning:[/] {escape(name)} has none of these numbers: nothing to compare with.")
        return
    console.print(table)
    for message in messages:
        console.print(f"[yellow]warning:[/] {escape(message)}")


def _weights(protocol: Protocol) -> str:
    """The checksum of the extractor's weights; nothing for one without."""
    without = protocol.extractor_sha256 == hashlib.sha256(b"").hexdigest()
    return "" if without else f" (sha256 {protocol.extractor_sha256[:_HASH_SHOWN]})"


def _protocol_lines(protocol: Protocol, repeats: int) -> list[str]:
    samples = f"{protocol.sample_count:,} samples"
    if repeats > 1:
        samples = f"{repeats} x {samples}"
    lines = [
        f"{protocol.extractor}{_weights(protocol)}, resize {protocol.resize}: {samples} "
        f"against {protocol.reference_count:,} of {protocol.reference} ({protocol.split}; sha256 "
        f"{protocol.reference_sha256[:_HASH_SHOWN]})"
    ]
    if protocol.sampler is not None:
        nfe = "" if protocol.nfe is None else f"{protocol.nfe:,.4g} network evaluations a sample (NFE)"
        steps = "" if protocol.steps is None else f"{protocol.steps:,} steps, "
        lines.append(f"{protocol.sampler}: {steps}{nfe}; seeds {', '.join(protocol.seeds)}; EMA {protocol.ema}")
    if protocol.commit is not None:
        lines.append(f"commit {protocol.commit}")
    return lines


def _notes(results: Sequence[Result]) -> list[str]:
    frechet = [r for r in results if r.protocol.metric.startswith(("FID", "Frechet"))]
    few = [r.protocol for r in frechet if min(r.protocol.sample_count, r.protocol.reference_count) < 10_000]
    return [
        f"{protocol.metric} on few samples is biased upwards, by about one over their number: compare this one with others "
        f"on {protocol.sample_count:,} samples only."
        for protocol in few
    ]


def _short(name: str) -> str:
    """A metric's name for a column: "kernel distance (random convolutions (seed 0))" without the inner parentheses."""
    return re.sub(r" \([^()]*\)\)$", ")", name)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"
