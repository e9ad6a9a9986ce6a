"""A diffusers pipeline for denoisers in EDM's preconditioning, sampled by Heun's method.

This file is exported with the weights as `pipeline.py`; it needs only torch and diffusers.

References:
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    algorithm 1 (the solver) and equation 7 (the preconditioning, which the scheduler applies).
    Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6 (with w there = guidance_scale - 1).
"""

from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature
from operator import index
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

__all__ = ["StablefieldPipeline"]

_NEVER = "the model was trained without dropping labels, so its network never learned to draw without a class"


class StablefieldPipeline(DiffusionPipeline):
    """Draw images from a network in EDM's preconditioning.

    Args:
        unet: the raw network, called as unet(sample, timestep, class_labels=...).
        scheduler: an EDM scheduler: the grid of noise levels, and the preconditioning around the network.
        id2label: class names by number; None if unknown.
        scaling: of data that are not images, the `mean` and `std` of each channel, and their `dtype`; None for images.
        vae: an AutoencoderKL that decodes latents to images; None if the network draws no latents of images.
        label_dropout: share of the training's rows whose class the network did not see. At 0 it never learned to draw
            without a class: such calls and guidance are refused, and images without `class_labels` take the classes in
            turn. None if unknown.
        learned_classes: numbers of the classes that the training data had images of, which are those taken in turn; None
            for all.
    """

    unet: Any
    scheduler: Any
    vae: Any
    _optional_components = ["vae"]  # noqa: RUF012
    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        id2label: dict[str, str] | None = None,
        scaling: dict[str, Any] | None = None,
        vae: Any = None,
        label_dropout: float | None = None,
        learned_classes: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label, scaling=scaling, label_dropout=label_dropout, learned_classes=learned_classes
        )
        self.scaling, self.label_dropout, self.learned_classes = scaling, label_dropout, learned_classes
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int = 18,
        class_labels: Tensor | list[int] | list[str] | int | str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        solver: str = "heun",
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw `batch_size` images.

        Args:
            batch_size: how many, unless `latents` is given; by default one per class, or per generator, in a list.
            num_inference_steps: steps N of the solver; Heun evaluates the network 2 N - 1 times.
            class_labels: the class of all images, or one per image: its number, its name in `labels`, or -1 for none, the
                default. If the network never learned to draw without a class, the default is class k modulo their number for
                the image of a generator with seed k in a list, or else for image k, of the classes in `learned_classes`.
            guidance_scale: w of classifier-free guidance, which takes classes; 1 for none. It doubles the evaluations.
            guidance_interval: noise levels (lo, hi] to guide in by `guidance_scale`, such as (0.19, 1.61); all by default.
            generator: draws the latents, and the noise of a scheduler that adds some; a list has one per image.
            latents: standard normal noise, shape (B, C, H, W), instead of drawing it.
            solver: "heun", in float64 if the device has it, or "scheduler" for the scheduler's own steps.
            output_type: "pil", the default, "np" (B, H, W, C) in [0, 1], or "pt", (B, C, H, W) in [-1, 1] as in training. Of
                data that are not images: "pt", the default, or "np", both (B, ...) in the units and dtype of the training
                data, or as the network sees them if those are unknown. With an autoencoder also "latent", float32 of shape
                (B, C, h, w) in its units, not decoded.
            return_dict: return an object with `images`, or a tuple.

        Raises:
            ValueError: for an unknown solver, output or class, classes or guidance of a model without classes, guidance or
                class -1 of a model that never learned to draw without one, guidance or a generator that does nothing, or
                another number of classes or generators than of images.
        """
        config, device = self.unet.config, self._execution_device
        floating = (self.scaling is not None or config.in_channels not in (1, 3)) and self.vae is None
        if output_type is None:
            output_type = "pt" if floating else "pil"
        if floating and output_type == "pil":
            raise ValueError("output_type is pil, and this model draws no images: pass pt or np.")
        outputs = ("pil", "np", "pt", *(() if self.vae is None else ("latent",)))
        if solver not in ("heun", "scheduler") or output_type not in outputs:
            raise ValueError(
                f"solver is {solver} and output_type {output_type}: pass heun or scheduler, and pil, np or pt."
            )
        if class_labels is not None and not self._classes:
            raise ValueError(f"class_labels is {class_labels}, and this model has no classes: leave it out.")
        classes = None if class_labels is None else self._numbers(class_labels)
        if batch_size is None:
            lists = (classes, generator if isinstance(generator, list) else None)
            batch_size = next((len(one) for one in lists if one is not None and not isinstance(one, int)), 1)
        draws = solver == "scheduler" and self._adds_noise
        if latents is not None and generator is not None and not draws:
            raise ValueError(
                f"generator draws nothing beside latents with solver {solver}, whose steps add no noise: leave one of them "
                "out."
            )
        count = batch_size if latents is None else len(latents)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator holds {len(generator)} generators for {count} images: pass one per image.")
        if latents is None:
            size = config.sample_size
            shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
            if isinstance(generator, list):
                rows = [torch.randn(shape, generator=one, device=one.device).to(device) for one in generator]
                latents = torch.stack(rows)
            else:
                place = device if generator is None else generator.device
                latents = torch.randn((batch_size, *shape), generator=generator, device=place).to(device)
        if classes is None and self._classes and self.label_dropout == 0:
            seeds = [one.initial_seed() for one in generator] if isinstance(generator, list) else range(count)
            learned = self.learned_classes or range(self._classes)
            classes = [learned[seed % len(learned)] for seed in seeds]
        if isinstance(classes, int):
            classes = [classes] * len(latents)
        if classes is not None and len(classes) != len(latents):
            raise ValueError(
                f"class_labels holds {len(classes)} classes for {len(latents)} images: pass one per image."
            )
        labels = None if classes is None else torch.as_tensor(classes, device=device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        guidance = self._guidance(classes, guidance_scale, guidance_interval)
        wide = torch.float32 if device.type == "mps" else torch.float64
        x = latents.to(device, wide) * self.scheduler.sigmas[0].to(wide)
        if solver == "heun":
            x = self._heun(x, labels, guidance)
        else:
            x = self._own_steps(x, labels, guidance, {"generator": generator} if draws else {})
        if self.scaling is not None:
            per_channel = (-1, *(1,) * (x.ndim - 2))
            # Data far from zero, such as times, keep their digits in float64 only, which not every device has.
            x = x.cpu().double() if device.type == "mps" else x.double()
            mean, std = (
                torch.tensor(self.scaling[name], dtype=x.dtype, device=x.device).reshape(per_channel)
                for name in ("mean", "std")
            )
            kind: torch.dtype = getattr(torch, self.scaling.get("dtype", "float32"))
            most = torch.finfo(kind).max
            x = (x * (2 * std) + mean).clamp(-most, most).to(kind)
            # Latents go to an autoencoder, which may have no 16-bit weights.
            x = x if self.vae is None else x.float()
        if self.vae is not None and output_type != "latent":
            # One at a time: a decoder takes far more memory than the network.
            x = torch.cat([self.vae.decode(one[None].to(device, self.vae.dtype)).sample for one in x])
        images: Any
        if floating or output_type == "latent":
            x = x.float() if self.scaling is None else x
            images = x.cpu().numpy() if output_type == "np" else x
        elif output_type == "pt":
            images = x.to(self.unet.dtype)
        else:
            images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=cast("Any", images)) if return_dict else (images,)

    def _numbers(self, classes: Any) -> list[int] | int:
        """The number of the class of all images, or one per image."""
        given = classes.tolist() if hasattr(classes, "tolist") else classes
        if isinstance(given, Iterable) and not isinstance(given, str):
            return [self._number(one) for one in given]
        return self._number(given)

    def _number(self, given: Any) -> int:
        """The number of a class that is given by its number or name, -1 for none."""
        if isinstance(given, str) and given not in self.labels:
            listed = [*self.labels][:20] + ["..."] * (len(self.labels) > 20)
            near = get_close_matches(given, self.labels, 3)
            raise ValueError(
                f"class_labels holds {given!r}: pass classes among {', '.join(listed) or 'numbers'}."
                + (f" Did you mean {' or '.join(near)}?" if near else "")
            )
        try:
            number = self.labels[given] if isinstance(given, str) else index(given)
        except TypeError:
            number = None
        if number == -1 and self.label_dropout == 0:
            raise ValueError(f"class_labels holds -1: {_NEVER}: pass whole numbers from 0 to {self._classes - 1}.")
        if number is None or not -1 <= number < self._classes:
            none = "" if self.label_dropout == 0 else ", or -1 for none"
            raise ValueError(
                f"class_labels holds {given!r:.80}: pass whole numbers from 0 to {self._classes - 1}{none}."
            )
        return number

    def _guidance(
        self, classes: list[int] | None, scale: float, interval: tuple[float, float] | None
    ) -> tuple[float, float, float]:
        """The scale of guidance, and the ends of its interval."""
        low, high = (0.0, float("inf")) if interval is None else interval
        if not 0 <= low < high:
            raise ValueError(f"guidance_interval is {interval}: pass noise levels (lo, hi) with 0 <= lo < hi.")
        if scale == 1 and interval is not None:
            raise ValueError(
                f"guidance_interval is {interval} and does nothing at guidance_scale 1: pass a scale, such as "
                "guidance_scale=2.0, or leave the interval out."
            )
        levels = self.scheduler.sigmas
        if not bool(((levels > low) & (levels <= high)).any()):
            raise ValueError(
                f"guidance_interval is {interval} and holds none of the grid's noise levels, {float(levels[-2]):.3g} to "
                f"{float(levels[0]):.3g}, so nothing is guided: pass noise levels among them."
            )
        if scale != 1 and set(classes or ()) <= {-1}:
            raise ValueError(
                f"guidance_scale is {scale}: guidance takes a network with classes, and class_labels other than -1."
            )
        if scale != 1 and self.label_dropout == 0:
            raise ValueError(f"guidance_scale is {scale}: {_NEVER}, which guidance needs: leave it out.")
        return scale, low, high

    @property
    def _classes(self) -> int:
        """The number of classes; 0 for none."""
        return self._embeddings - 1 if self._embeddings else getattr(self.unet.config, "num_classes", None) or 0

    @property
    def _embeddings(self) -> int:
        """The embeddings of diffusers' own model, of which the last means no class; 0 for ours."""
        return getattr(self.unet.config, "num_class_embeds", None) or 0

    def _raw(self, x: Tensor, label: Tensor, labels: Tensor | None, sigma: Tensor, guidance: Any) -> Tensor:
        """The network's output for one noise level, guided: the preconditioning is linear in it."""
        scale, low, high = guidance
        good = self._network(x, label, labels)
        if scale == 1 or labels is None or not low < float(sigma) <= high:
            return good
        bad = self._network(x, label, torch.full_like(labels, -1))
        return bad + scale * (good - bad)

    def _network(self, x: Tensor, label: Tensor, labels: Tensor | None) -> Tensor:
        if self._embeddings:
            labels = torch.full((len(x),), -1, device=x.device) if labels is None else labels
            labels = torch.where(labels < 0, self._embeddings - 1, labels)
        return self.unet(x, label, class_labels=labels).sample

    def _label(self, noise_label: Tensor) -> Tensor:
        """A noise label as all networks of exports take it: 16 bits cannot tell neighbouring noise levels apart."""
        return noise_label.to(torch.promote_types(self.unet.dtype, torch.float32))

    def _denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None, guidance: Any) -> Tensor:
        """D(x; sigma) for one noise level, in the dtype of `x`."""
        inner = self.unet.dtype
        label = self._label(self.scheduler.precondition_noise(sigma)).expand(len(x))
        scaled = self.scheduler.precondition_inputs(x, sigma).to(inner)
        raw = self._raw(scaled, label, labels, sigma, guidance)
        return self.scheduler.precondition_outputs(x, raw.to(x.dtype), sigma)

    def _shown(self, steps: Iterable[Any]) -> Iterable[Any]:
        # The base class annotates this method as a property.
        bar: Any = self.progress_bar
        return bar(steps)

    def _heun(self, x: Tensor, labels: Tensor | None, guidance: Any) -> Tensor:
        sigmas = self.scheduler.sigmas.to(x.device, x.dtype)
        for step in self._shown(range(len(sigmas) - 1)):
            sigma, following = sigmas[step], sigmas[step + 1]
            slope = (x - self._denoise(x, sigma, labels, guidance)) / sigma
            end = x + (following - sigma) * slope
            if following > 0:
                slope_end = (end - self._denoise(end, following, labels, guidance)) / following
                end = x + (following - sigma) * (slope + slope_end) / 2
            x = end
        return x

    @property
    def _adds_noise(self) -> bool:
        """Whether steps of the scheduler add noise of the generator, as those of SDE solvers do."""
        taken = signature(self.scheduler.step).parameters
        kind = self.scheduler.config.get("algorithm_type")
        # Euler's steps take a generator for churn, of which there is none; DPM-Solver's for its SDE form only.
        return "generator" in taken and "s_churn" not in taken and (kind is None or kind.startswith("sde"))

    def _own_steps(self, x: Tensor, labels: Tensor | None, guidance: Any, noise: dict[str, Any]) -> Tensor:
        inner = self.unet.dtype
        x = x.to(inner)
        for t, sigma in self._shown([*zip(self.scheduler.timesteps, self.scheduler.sigmas, strict=False)]):
            raw = self._raw(self.scheduler.scale_model_input(x, t), self._label(t), labels, sigma, guidance)
            x = self.scheduler.step(raw, t, x, **noise).prev_sample
        return x
