"""How much of a batch can gain from references, label by label: the rows above the noise band of their label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablefield.diffusion._noise_levels import LogNormal, Uniform
from stablefield.diffusion._process import RectifiedFlow
from stablefield.diffusion._weighting import FlowWeighting
from stablefield.probing._phases import share_above
from stablefield.probing._training import Training
from stablefield.report._page import Table
from stablefield.targets._band import NoiseBand

__all__ = ["LabelShare", "label_findings", "label_record", "label_shares", "label_table"]

_FLOW = RectifiedFlow()
# Of flow matching, sigma / alpha is t / (1 - t), whose logarithm is normal where t is logit-normal.
TIMES = {
    "flow at uniform times": Training(process=_FLOW, noise_levels=Uniform(0.0, 1.0), weighting=FlowWeighting()),
    "flow at logit-normal times": Training(process=_FLOW, noise_levels=LogNormal(0.0, 1.0), weighting=FlowWeighting()),
}


@dataclass(frozen=True, kw_only=True)
class LabelShare:
    """What references can give the rows of a label.

    Attributes:
        label: None for rows without one.
        name: of the label.
        samples: that have it; all for rows without one.
        level: noise level from which its rows use references.
        shares: share of its rows that can gain, for the planned training and for flow matching with either kind of times.
    """

    label: int | None
    name: str
    samples: int
    level: float
    shares: Mapping[str, float]


def label_shares(
    band: NoiseBand, labels: Tensor, names: Sequence[str] | None, training: Training
) -> tuple[LabelShare, ...]:
    """The shares of each label that has samples, then those of rows without one, from the noise band of a labelled pool."""
    if band.by_label is None or band.unlabelled is None:
        return ()
    trainings = {training.name: training, **TIMES}
    counts = torch.bincount(labels.long(), minlength=len(band.by_label)).tolist()

    def share(label: int | None, name: str, samples: int, level: float) -> LabelShare:
        shares = {kind: share_above(level, one.noise_levels, one.process) for kind, one in trainings.items()}
        return LabelShare(label=label, name=name, samples=samples, level=level, shares=shares)

    found = [
        share(label, names[label] if names is not None and label < len(names) else str(label), counts[label], level)
        for label, level in enumerate(band.by_label)
        if counts[label]
    ]
    return (*found, share(None, "no label", len(labels), band.unlabelled))


def label_findings(shares: Sequence[LabelShare]) -> list[str]:
    """A sentence on the labels in flow matching; the report has all numbers, and those of rows without a label."""
    if not shares:
        return []
    labelled = shares[:-1]
    uniform, normal = (sorted((one.shares[kind], one.name) for one in labelled) for kind in TIMES)
    (low, least), (high, most) = uniform[0], uniform[-1]
    return [
        f"Rows that can gain, by label: flow {_percent(low)} ({least}) to {_percent(high)} ({most}); "
        f"logit-normal {_percent(normal[0][0])} to {_percent(normal[-1][0])}."
    ]


def label_record(shares: Sequence[LabelShare]) -> list[dict[str, Any]]:
    """All numbers, as JSON values."""
    return [
        {
            "label": one.label,
            "name": one.name,
            "samples": one.samples,
            "band_from": one.level if one.level < float("inf") else None,
            "shares": dict(one.shares),
        }
        for one in shares
    ]


def label_table(shares: Sequence[LabelShare]) -> Table:
    """The table of a report."""
    kinds = list(shares[0].shares)
    return Table(
        columns=("label", "samples", "noise band from", *kinds),
        rows=tuple((one.name, one.samples, one.level, *(one.shares[kind] for kind in kinds)) for one in shares),
        caption="Share of a label's rows that can gain, in the planned training and in flow matching. A label of one sample "
        "has no band.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
