"""Insert content from the project's files into the site: diffs of the examples, measured numbers, and formulas.

mkdocs calls the functions named `on_...`. On a page, a comment on its own line stands for content from a file:

    <!-- changes: examples/accelerate_loop.py -->   the lines of a script that stable targets change, as a diff
    <!-- script: examples/accelerate_loop.py -->    the whole script
    <!-- source weight -->                          the table of benchmarks/results/own_weight.json
    <!-- band -->                                   results/band.json, what the tolerance of the noise band costs and keeps
    <!-- cost -->                                   results/target.json, the target's cost, as a table
    <!-- step -->                                   results/step_cpu.json, as two tables
    <!-- gpu throughput -->                         results/gpu.json, images per second by precision and target
    <!-- gpu cost -->                               the same file, the target beside two bare products
    <!-- gpu accuracy -->                           the same file, the error against float64
    <!-- gpu proof -->                              results/gpu_proof.json (VE), FID against training time
    <!-- gpu proof flow -->                         results/gpu_proof_flow.json (flow matching), the same
    <!-- samplers -->                               the table of results/samplers.json
    <!-- race digits -->                            results/race_digits.json, distances of all runners at each time
    <!-- race digits_long -->                       results/race_digits_long.json, the same
    <!-- race fashion_mnist -->                     results/race_fashion_mnist.json, the same
    <!-- race fashion_mnist_wide -->                results/race_fashion_mnist_wide.json, the same
    <!-- race fashion_mnist_long -->                results/race_fashion_mnist_long.json, the same
    <!-- race cifar10 -->                           results/race_cifar10.json, the same
    <!-- verbs -->                                  the verbs of the command and their flags, from its flags.json
"""

import difflib
import html
import itertools
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

__all__ = [
    "band",
    "changes",
    "cost",
    "formulas",
    "gpu_accuracy",
    "gpu_cost",
    "gpu_proof",
    "gpu_proof_flow",
    "gpu_throughput",
    "on_page_content",
    "on_page_markdown",
    "on_post_page",
    "on_post_template",
    "own_weight",
    "race",
    "samplers",
    "script",
    "step",
    "verbs",
]

ROOT = Path(__file__).resolve().parents[1]
# The form in which the theme's plugin `offline` writes it.
_WORKER = re.compile(r'https://[^"]*/iframe-worker/shim')


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the comments with the content of the project's files."""
    markdown = re.sub(r"^<!-- changes: (\S+) -->$", lambda m: changes(ROOT / m[1]), markdown, flags=re.M)
    markdown = re.sub(r"^<!-- script: (\S+) -->$", lambda m: script(ROOT / m[1]), markdown, flags=re.M)
    tables = {
        "source weight": own_weight,
        "band": band,
        "cost": cost,
        "step": step,
        "gpu throughput": gpu_throughput,
        "gpu cost": gpu_cost,
        "gpu accuracy": gpu_accuracy,
        "gpu proof": gpu_proof,
        "gpu proof flow": gpu_proof_flow,
        "samplers": samplers,
        "verbs": verbs,
        **{f"race {data}": partial(race, data) for data in RACES},
    }
    return re.sub(rf"^<!-- ({'|'.join(tables)}) -->$", lambda m: tables[m[1]](), markdown, flags=re.M)


def on_page_content(html: str, **_: Any) -> str:
    """Turn the formulas of a page into MathML, which browsers render natively."""
    return formulas(html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load the search worker from the site itself: the theme links to an external copy."""
    return _WORKER.sub("../" * page.url.count("/") + "assets/iframe-worker.js", output)


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for the 404 page, whose links start at the site's root."""
    return _WORKER.sub("/assets/iframe-worker.js", output_content)


def script(path: Path) -> str:
    """A script as a block of code."""
    return f"```python\n{path.read_text('utf-8')}```"


def changes(script: Path) -> str:
    """The changes that stable targets make to an example, as a diff: `# +` marks added lines, `# -` removed ones."""
    source = script.read_text("utf-8").splitlines()
    before = [re.sub(r"^(\s*)# - ", r"\1", line) for line in source if not line.endswith("# +")]
    after = [re.sub(r"\s*# \+$", "", line) for line in source if not re.match(r"\s*# - ", line)]
    # The first lines are the names of the two files.
    lines = list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]
    shown = ["..." if line.startswith("@@") else line for line in lines]
    return "\n".join(["```diff", *shown[shown[0] == "..." :], "```"])


def own_weight() -> str:
    """The committed measurement of the source weight on CIFAR-10, as a table."""
    record = _record("own_weight")
    head = ("noise level", "n = 1,024", "n = 4,096", "n = 50,000", "variance removed, n = 50,000")
    rows = [
        (
            f"{level['noise_level']:g}",
            *(f"{level[f'own_weight_{n}']:.4f}" for n in (1024, 4096, 50000)),
            f"{level['variance_removed_50000']:.3g}",
        )
        for level in record["levels"]
    ]
    return _table(head, rows, record, f", {record['rows_per_level']} rows a level")


def band() -> str:
    """The committed measurement of the noise band's tolerance, its cost and what it keeps, as a table."""
    record = _record("band")
    head = ("data", "tolerance", "the band begins at", "weight lost there", "of a batch in the band", "kept")
    rows = [
        (
            data["data"],
            f"{row['tolerance']:g}",
            f"{row['level']:.3g}",
            f"{row['lost']:.1%}",
            f"{row['share_of_a_batch']:.1%}",
            f"{row['kept']:.1%}",
        )
        for data in record["found"]
        for row in data["tolerances"]
    ]
    return _table(head, rows, record)


def cost() -> str:
    """The committed measurement of the target's cost on a CPU, as a table."""
    record = _record("target")
    products, naive, band = record["beside_two_products"], record["beside_the_naive_form"], record["with_a_band"]
    training = record["training_step"]
    rows = [
        (
            f"two bare matrix products (B = {products['batch']}, n = {products['references']:,})",
            f"{products['ratio']:.2f} of their time",
        ),
        (
            f"the broadcast form (B = {naive['batch']}, n = {naive['references']:,})",
            f"1/{naive['naive'] / naive['seconds']:.0f} of its time, "
            f"1/{naive['naive_peak'] / naive['peak']:.0f} of its memory",
        ),
        (
            f"itself without a noise band (B = {band['batch']}, n = {band['references']:,} as uint8)",
            f"{band['ratio']:.2f} of the time; {band['peak_bytes_above_pool'] / 1e6:.0f} MB above the images",
        ),
        (
            f"a training step without it ({training['parameters'] / 1e6:.1f} M parameters, B = {training['batch']}, "
            f"n = {training['references']:,})",
            f"{training['ratio'] - 1:+.1%}",
        ),
    ]
    return _table(("the target beside", "costs"), rows, record)


def step() -> str:
    """The committed measurement of a training step on a CPU: images per second, and where the time goes."""
    record = _record("step_cpu")
    speed = [
        (row["setting"], f"{row['images_per_second']:.1f}", f"{row['target_share']:.1%}")
        for row in record["throughput"]
    ]
    shares = sorted(record["shares_of_a_float32_step"].items(), key=lambda item: -item[1])
    size = f", {record['parameters'] / 1e6:.1f} M parameters"
    return "\n\n".join(
        (
            _table(("setting", "images a second", "share of noise and target"), speed, None),
            _table(("a float32 step is", "share"), [(kind, f"{share:.1%}") for kind, share in shares], record, size),
        )
    )


def gpu_throughput() -> str:
    """The committed measurement of training on a GPU: images per second by precision and target, and the target's part."""
    record = _record("gpu")
    rates: dict[str, dict[str, float]] = {}
    for row in record["throughput"]:
        rates.setdefault(row["precision"], {})[row["target"]] = row["images_per_second"]
    names = list(next(iter(rates.values())))
    rows = [
        (precision, *(f"{found[name]:,.0f}" + _change(found[name] / found["DSM"]) for name in names))
        for precision, found in rates.items()
    ]
    return _table(("images a second", *names), rows, None)


def gpu_cost() -> str:
    """The committed measurement of one call of the target on a GPU beside two bare products, as a table."""
    record = _record("gpu")
    rows = [
        (
            str(row["batch"]),
            f"{row['references']:,}",
            f"{row['seconds'] * 1e3:.1f} ms",
            f"{row['products'] * 1e3:.2f} ms",
            f"{row['ratio']:.1f}",
            f"{row['peak'] / 1e6:.0f} MB",
            "too large" if row["naive"] is None else f"{row['naive'] * 1e3:.1f} ms",
            "" if row["naive"] is None else f"{row['naive_peak'] / 1e6:,.0f} MB",
        )
        for row in record["cost"]
    ]
    head = ("B", "n", "the target", "two products", "ratio", "memory", "the broadcast form", "its memory")
    return _table(head, rows, None)


def gpu_accuracy() -> str:
    """The committed measurement of the posterior mean's error on a GPU, as a table; the last table from gpu.json."""
    record = _record("gpu")
    rows = [(f"{row['level']:g}", f"{row['relative_error']:.1e}") for row in record["accuracy"]]
    return _table(("noise level", "largest relative error"), rows, record, f", commit {record['commit']}")


def gpu_proof() -> str:
    """The committed measurement of FID against training time for both targets with VE noise, as a table."""
    return _proof(_record("gpu_proof"))


def gpu_proof_flow() -> str:
    """The same for flow matching."""
    return _proof(_record("gpu_proof_flow"))


def _proof(record: dict[str, Any]) -> str:
    names = {"dsm": "single sample", "stf": "stable"}
    rows = [
        (
            names[row["target"]],
            f"{row['seconds']:.0f} s",
            f"{row['steps']:,}",
            f"{row['images']:,}",
            f"{row['heun']:.1f}",
        )
        for row in record["proof"]
    ]
    head = ("target", "training time", "steps", "images seen", "FID")
    return _table(head, rows, record, f", commit {record['commit']}")


def _change(ratio: float) -> str:
    return "" if ratio == 1 else f" ({ratio - 1:+.1%})"


def samplers() -> str:
    """The committed measurement of samplers here and in other libraries, as a table."""
    record = _record("samplers")
    head = ("method", "sampler", "NFE, 18 steps", "error, 9 steps", "18", "36", "microseconds a step")
    rows = [
        (
            row["method"],
            row["sampler"],
            str(row["nfe_18"]),
            *(f"{row[f'error_{steps}']:.3f}" for steps in (9, 18, 36)),
            f"{row['microseconds_per_step']:.0f}",
        )
        for row in record["samplers"]
    ]
    return _table(head, rows, record, "".join(f", {name} {version}" for name, version in record["libraries"].items()))


RACES = ("digits", "digits_long", "fashion_mnist", "fashion_mnist_wide", "fashion_mnist_long", "cifar10")
RUNNERS = {
    "ours": "stable target and all levers",
    "ours-wide": "stable target and all levers, ln sigma ~ N(0, 1.4²)",
    "ours-wide-4096": "stable target of 4,096 references and all levers, ln sigma ~ N(0, 1.4²)",
    "ours-unpaired": "stable target of 4,096 references, stratified ln sigma ~ N(0, 1.4²)",
    "ours-steps": "stable target, all levers, noise labels from 0 to 999",
    "stf": "stable target alone",
    "stf-stratified": "stable target, stratified noise levels",
    "stf-antithetic": "stable target, antithetic pairs",
    "stf-levels": "stable target, ln sigma ~ N(-0.4, 1)",
    "edm": "EDM's single sample",
    "edm-stratified": "EDM's single sample, stratified noise levels",
    "edm-antithetic": "EDM's single sample, antithetic pairs",
    "edm-levels": "EDM's single sample, ln sigma ~ N(-0.4, 1)",
    "immiscible": "EDM's single sample, immiscible noise",
    "diffusers-eps": "diffusers, epsilon",
    "diffusers-v": "diffusers, v",
    "min-snr": "diffusers, epsilon, min-SNR weights",
    "min-snr-v": "diffusers, v, min-SNR weights",
    "torchcfm": "torchcfm, independent pairs",
    "torchcfm-stf": "stable target in the loop of torchcfm",
    "torchcfm-ot": "torchcfm, optimal transport",
    "ours-flow": "stable target, flow matching, all levers",
    "ours-flow-lognormal": "stable target, flow matching, all levers, logit-normal times",
}


def race(data: str) -> str:
    """The committed race on some data, as a table for each number of evaluations, the best first."""
    record = _record(f"race_{data}")
    rows = [row for row in record["rows"] if "error" not in row]
    times = sorted({row["seconds"] for row in rows})
    seeds = {
        runner: len({row["seed"] for row in rows if row["runner"] == runner}) for runner in {r["runner"] for r in rows}
    }
    many = " or ".join(map(str, sorted(set(seeds.values()))))
    parts: list[str] = []
    for evaluations in sorted({row["evaluations"] for row in rows}, reverse=True):
        found: dict[str, dict[float, list[float]]] = {}
        for row in rows:
            if row["evaluations"] == evaluations:
                found.setdefault(row["runner"], {}).setdefault(row["seconds"], []).append(row["distance"])
        last = {runner: sum(of[times[-1]]) / len(of[times[-1]]) for runner, of in found.items() if times[-1] in of}
        lines = [
            (
                RUNNERS[runner],
                *(
                    f"{sum(of) / len(of):.3f} ({min(of):.3f} to {max(of):.3f})" if (of := found[runner].get(t)) else ""
                    for t in times
                ),
            )
            for runner in sorted(last, key=last.__getitem__)
        ]
        parts += [
            f"Distances at {evaluations} evaluations of the network, means over {many} seeds (least to most):",
            _table(("loss", *(f"{t:g} s" for t in times)), lines, record if evaluations == 10 else None),
        ]
        if len(times) > 1:
            means = {r: {t: sum(v) / len(v) for t, v in of.items()} for r, of in found.items()}
            parts += [_sooner(means, times[-1])]
    return "\n\n".join(parts)


def _sooner(means: dict[str, dict[float, float]], last: float) -> str:
    """When our curve of means reaches the last value of the best peer, interpolated in log distance."""
    with_ours = {name for name in means if name.startswith(("ours", "stf")) or name.endswith("-stf")}
    best = min((name for name in means.keys() - with_ours if last in means[name]), key=lambda name: means[name][last])
    # All levers, or the best that was measured at several times.
    several = {name: means[name][last] for name in with_ours if len(means[name]) > 1}
    own = "ours" if "ours" in several else min(several, key=several.__getitem__)
    goal, curve = means[best][last], sorted(means[own].items())
    whose, one = RUNNERS[own], not own.startswith("ours")
    end = f"The best of the others, {RUNNERS[best]}, ends at {goal:.3f} after {last:g} s. The {whose}"
    if min(value for _, value in curve) > goal:
        return f"{end} {'does' if one else 'do'} not reach this value in that time."
    reached = f"in less than {curve[0][0]:g} s"  # unless it is above at first
    for (t, before), (later, after) in itertools.pairwise(curve):
        if after <= goal < before:
            found = t + (later - t) * math.log(before / goal) / math.log(before / after)
            reached = f"after {found:.0f} s, {found / last:.0%} of the time"
    return f"{end} {'reaches' if one else 'reach'} this value {reached}.".replace("%", " %")


def verbs() -> str:
    """All verbs of the command with their flags, as tables."""
    lines: list[str] = []
    for verb in json.loads((ROOT / "src/stablefield/cli/flags.json").read_text("utf-8")):
        lines += [f"## stablefield {verb['name']}", "", verb["summary"], ""]
        for paragraph in verb["more"]:
            lines += [paragraph, ""]
        if verb["arguments"]:
            lines += _flags("argument", verb["arguments"])
        for group in verb["groups"]:
            few = len(verb["groups"]) == 1
            lines += ["" if few else f"### {group['title'] or 'The flags most used'}", ""]
            lines += _flags("flag", group["flags"])
    return "\n".join(lines)


def _flags(head: str, flags: list[dict[str, Any]]) -> list[str]:
    shown = {"int": "INT", "float": "FLOAT", "text": "TEXT", "path": "PATH"}
    lines = [f"| {head} | takes | is for | default |", "| --- | --- | --- | --- |"]
    for flag in flags:
        one = " or ".join(f"`{shown.get(word, word)}`" for word in flag["takes"])
        several = {-1: f"any number of {one}", 0: "", 1: one}.get(flag["count"], f"{flag['count']} times {one}")
        takes = several if flag["name"].startswith("--") else ""
        text = html.escape(flag["help"], quote=False).replace("|", "&#124;")
        default = flag["default"] if flag["default"] in ("", "by the recipe") else f"`{flag['default']}`"
        lines.append(f"| `{flag['name']}` | {takes} | {text} | {'needed' if flag['required'] else default} |")
    return [*lines, ""]


def _record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], record: dict[str, Any] | None, more: str = "") -> str:
    """A Markdown table, and below it the command that produced its numbers, the machine and the date."""
    lines = [head, tuple("---" if k == 0 else "--:" for k in range(len(head))), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if record is None:
        return text
    caption = f"`{record['command']}`{more}, {record['machine']}, torch {record['torch']}, {record['date']}."
    return f"{text}\n\n{caption}"


def formulas(page: str) -> str:
    """Replace the formulas marked by the Markdown extension with MathML."""

    def mathml(found: re.Match[str]) -> str:
        text = html.unescape(found[2]).strip()
        return convert(text[2:-2], display="block" if text.startswith(r"\[") else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', mathml, page, flags=re.S)
