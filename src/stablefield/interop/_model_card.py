"""A model card: an exported model, its training, its measured results, and how to draw from it.

A card is meant to be published, and its names come from folders and files: so it escapes every text, whatever that would
mean in Markdown or HTML, and names data on this machine without their folders.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._scaling import Scaling
from stablefield.evaluation._protocol import Score
from stablefield.evaluation._result import Evaluation
from stablefield.interop._inert import plain_text
from stablefield.training._recipe import Recipe

__all__ = ["ModelCard", "class_argument", "literal", "public_name", "results_of_run"]

# Characters that begin or end markup: Markdown, its tables, HTML, formulas between dollars, mentions and bare links.
_MARKS = re.compile(r"[\\`*_{}\[\]<>#+!|~&@$^:]|(?<=www)\.", re.IGNORECASE)
_LONGEST = 300


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The content of a card.

    Attributes:
        name: of the model.
        data: the training data; for an imported model, its source.
        shape: of one image, (C, H, W).
        classes: the number of classes; 0 for none.
        class_names: their names, by number; None if unknown.
        parameters: the network's number of parameters.
        recipe: the training's recipe.
        step: steps done; 0 for an imported model, whose training is unknown.
        ema: which average of the weights this is.
        version: of the library.
        results: the measured results.
        grid: file of sample images beside the card, or none.
        pipeline: whether diffusers loads the folder; else it holds plain safetensors.
        floating: whether the data are floats rather than 8-bit images.
        autoencoder: of latents of images; None for other data.
        scaling: of float data.
        label_dropout: share of the training's rows whose class the network did not see; None if unknown.
        learned_classes: numbers of the classes that the training data had images of; None if unknown.
    """

    name: str
    data: str
    shape: tuple[int, ...]
    classes: int
    parameters: int
    recipe: Recipe
    step: int
    ema: str
    version: str
    results: Sequence[Score] = ()
    grid: str | None = None
    pipeline: bool = True
    class_names: Sequence[str] | None = None
    floating: bool = False
    autoencoder: AutoencoderRecord | None = None
    scaling: Scaling | None = None
    label_dropout: float | None = None
    learned_classes: Sequence[int] | None = None

    def text(self) -> str:
        """The card as Markdown with a YAML head."""
        return (
            "\n\n".join(
                filter(
                    None,
                    [self._head(), self._classes(), self._latents(), self._training(), self._metrics(), self._use()],
                )
            )
            + "\n"
        )

    def _head(self) -> str:
        library = "diffusers" if self.pipeline else "stablefield"
        kind = "class-conditional-image-generation" if self.classes else "unconditional-image-generation"
        images = not self.floating or self.autoencoder is not None
        tags = ["diffusion", *([kind] if images else []), "stable-target-field", "edm"]
        lines = [
            "---",
            f"library_name: {library}",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
            "",
            f"# {literal(self.name)}",
            "",
        ]
        size = " x ".join(map(str, self.shape))
        what = f"float data of {size} values" if self.floating else f"images of {size} (channels, height, width)"
        if self.autoencoder is not None:
            pixels = " x ".join(map(str, self.autoencoder.shape))
            what = f"latents of {size} values, decoded to images of {pixels} (channels, height, width)"
        conditions = f", conditioned on one of {self.classes} classes" if self.classes else ""
        data = literal(public_name(self.data) or "private data")
        origin = f"trained on {data}" if self.step else data
        lines.append(
            f"A diffusion model of {what}{conditions}; {self.parameters:,} parameters; {origin} with stablefield "
            f"{literal(self.version)}."
        )
        if self.grid:
            lines += ["", f"![Samples]({self.grid})"]
        return "\n".join(lines)

    def _classes(self) -> str:
        """The classes by number: what a user passes, and its meaning."""
        if not self.classes:
            return ""
        name = "its name or its number" if self.pipeline and self.class_names is not None else "its number"
        # A network that always saw the class has learned nothing without one.
        none = "" if self.label_dropout == 0 else ", or -1 for none"
        head = f"## Classes\n\nPass a class by {name}, 0 to {self.classes - 1}{none}."
        if self.class_names is None:
            return f"{head} The names of the classes are unknown."
        rows = [(str(number), name) for number, name in enumerate(self.class_names)]
        return f"{head}\n\n{_table(('number', 'name'), rows)}"

    def _latents(self) -> str:
        """The autoencoder, and how the network's values become latents."""
        found = self.autoencoder
        if found is None or self.scaling is None:
            return ""
        place = literal(public_name(found.place) or "a private folder")
        where = "`vae/` holds it" if self.pipeline else "This folder does not hold it"
        rows = [
            (str(channel), f"{mean:.6g}", f"{2 * std:.6g}")
            for channel, (mean, std) in enumerate(zip(self.scaling.mean, self.scaling.std, strict=True))
        ]
        return (
            f"## Autoencoder\n\nThe latents are those of {place}, an AutoencoderKL of sha256 (weights and settings) "
            f"{found.sha256}. {where}. A latent is shift + scale x, for the network's x:\n\n"
            f"{_table(('channel', 'shift', 'scale'), rows)}"
        )

    def _training(self) -> str:
        recipe = self.recipe
        target = "the single sample (denoising score matching)"
        if recipe.target == "stf":
            references = "all" if recipe.references == "sharded" else recipe.references
            target = f"the stable target, references: {references}, noise band: {recipe.noise_band}"
        rows = [
            ("regressed on", target),
            ("steps", f"{self.step:,} of {recipe.batch_in_words}"),
            ("weights", f"average: {self.ema}"),
            ("network", str(recipe.network)),
            ("process", str(recipe.process)),
            ("noise levels", str(recipe.noise_levels)),
            ("weighting", str(recipe.weighting)),
            ("preconditioning", str(recipe.preconditioning)),
            ("seed", str(recipe.seed)),
        ]
        if not self.step:
            rows = [row for row in rows if row[0] in ("network", "preconditioning")]
        return "## Training\n\n" + _table(("what", "how"), rows)

    def _metrics(self) -> str:
        if not self.results:
            return "## Metrics\n\nNone: `stablefield evaluate` was not run before the export."
        head = ("metric", "minimum", "mean", "spread", "repeats", "samples", "against", "extractor", "sampler", "NFE")
        rows: list[tuple[str, ...]] = []
        for result in self.results:
            p = result.protocol
            figures = tuple(f"{value:.4g}" for value in (result.minimum, result.mean, result.spread))
            against = f"{public_name(p.reference) or 'private data'} ({p.split}, {p.reference_count:,})"
            sampler = f"{p.sampler or '-'}, {p.steps or '-'} steps, {p.ema or '-'}"
            extractor = f"{public_name(p.extractor)}, {p.resize}"
            how = (str(len(result.values)), f"{p.sample_count:,}", against, extractor, sampler)
            rows.append((p.metric, *figures, *how, f"{p.nfe:g}" if p.nfe else "-"))
        return "## Metrics\n\n" + _table(head, rows)

    def _use(self) -> str:
        if not self.pipeline:
            return (
                "## Use\n\n`model.safetensors` holds the network's state, `config.json` its options and preconditioning. "
                "With both in one folder, `stablefield import model.safetensors` reads a U-Net or a SiT back."
            )
        call, guided = "batch_size=16, num_inference_steps=18", ""
        if self.classes:
            call += f", class_labels={class_argument(self.class_names, self.learned_classes)}"
            if self.label_dropout or (self.label_dropout is None and not self.step):
                call += ", guidance_scale=2.0"
                guided = (
                    "`class_labels` is one class for all images, or a list with one per image. `guidance_scale` above 1 "
                    "strengthens the class by classifier-free guidance, with one more evaluation each; "
                    "`guidance_interval=(0.19, 1.61)` guides at these noise levels only.\n\n"
                )
            else:
                guided = "`class_labels` is one class for all images, or a list with one per image."
                if self.label_dropout == 0:
                    guided += " Without it the images take the classes in turn."
                guided += "\n\n"
        floating = self.floating and self.autoencoder is None
        units = "in the units of the data" if self.scaling is not None else "as the network sees them"
        name, units = ("samples", f"  # a tensor, {units}") if floating else ("images", "")
        return (
            "## Use\n\nThe folder holds `pipeline.py` and `unet/network.py`, which diffusers runs: read them, then\n\n"
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("PATH OR NAME", trust_remote_code=True)\n'
            f"{name} = pipe({call}).images{units}\n```\n\n{guided}"
            '18 steps of Heun\'s method are 35 network evaluations. `solver="scheduler"` takes the steps of '
            "`pipe.scheduler` instead: diffusers' `EDMEulerScheduler`, or another EDM scheduler that you set.\n\n"
            "To keep or to publish the pipeline, copy this folder: `pipe.save_pretrained` writes neither `pipeline.py` nor "
            "`unet/network.py`."
        )


def class_argument(class_names: Sequence[str] | None, learned: Sequence[int] | None = None) -> str:
    """A class in Python, for the example of a call: the first name that can stand in any code, else a number.

    Args:
        class_names: names of the classes, if known.
        learned: numbers of the classes that the network has learned; None for all.
    """
    names = class_names or ()
    named = names if learned is None else [names[number] for number in learned if number < len(names)]
    plain = (name for name in named if re.fullmatch(r"\w[\w .-]{0,40}", name, re.ASCII))
    return f'"{found}"' if (found := next(plain, None)) is not None else str(learned[0] if learned else 0)


def literal(text: str) -> str:
    """A text escaped for Markdown, on one line and without control characters."""
    return _MARKS.sub(r"\\\g<0>", plain_text(" ".join(text.split()), _LONGEST))


def public_name(name: str) -> str:
    """The name of data or a model without its location: the last part of a path; hf:OWNER/NAME unchanged.

    A user's folder names its owner, so its public name is "".
    """
    if name.startswith("hf:") or not re.search(r"[/\\]|^(~|\.{1,2}|[A-Za-z]:)$", name):
        return name
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    above = parts[-2].lower() if len(parts) > 1 else ""
    # Directly below the folder of all users, or a drive: the name is a user's, or there is none.
    if not parts or above in ("home", "users") or re.fullmatch("~.*|[A-Za-z]:", parts[-1]):
        return ""
    return parts[-1]


def results_of_run(path: Path) -> list[Score]:
    """The results that `stablefield evaluate` wrote to a run's folder, ordered by file name.

    Raises:
        ValueError: naming a file that holds no results.
    """
    return [result for file in sorted((path / "evaluations").glob("*.json")) for result in Evaluation.load(file).scores]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(literal, line)) + " |" for line in lines)
