r"""The stepper: one optimiser step, on one process or many, as a function of (seed, step).

Every process draws everything random in a step for the whole batch; each then works on its own rows, in as many parts as the
recipe accumulates. Losses are sums over rows divided by the size of the whole batch, so sums over parts and processes give
the mean over the batch, whatever the number of either. Only dropout masks are drawn separately for each part: with dropout,
runs on different numbers of processes or parts have different, equally good, losses.

One all-reduce sums all gradients over the processes, in the order of the parameters. It does not overlap with the backward
pass, as DistributedDataParallel does, but its order does not depend on how long the run has been going. Otherwise a resumed
run could not repeat it bit for bit.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stablefield._distributed import Ranks
from stablefield.data._augmentation import Augmentation, AugmentationParameters, flip
from stablefield.diffusion._objective import Example, Objective, ObjectiveValue
from stablefield.targets._references import References
from stablefield.targets._stable_target import DenoisingTarget, StableTarget
from stablefield.training._checkpoint import Trained
from stablefield.training._ema import LENGTHS, ema_decay, follower, power_decay, power_exponent, update_ema
from stablefield.training._feed import Feed
from stablefield.training._meter import Stopwatch
from stablefield.training._model import build_denoiser
from stablefield.training._run_folder import RunConfig
from stablefield.training._seeding import Purpose, generator_for, seed_for

__all__ = ["Stepper"]


class Stepper:
    """A model in training.

    Args:
        config: of the run, with its references resolved.
        feed: of its data.
        accelerator: the processes and their device.

    Attributes:
        trained: the state that every step changes.
        target_watch: the stopwatch for noise and targets.
    """

    def __init__(self, config: RunConfig, feed: Feed, accelerator: Accelerator) -> None:
        recipe = config.recipe
        self._recipe, self._feed, self._accelerator = recipe, feed, accelerator
        self._device = accelerator.device
        self._ranks = Ranks.launched(self._device)
        model = build_denoiser(config).to(self._device)
        averages: dict[str, nn.Module] = {"ema": follower(model)}
        if recipe.ema_snapshot_every:
            averages |= {f"power-{length}": follower(model) for length in LENGTHS}
        fused = self._device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, fused=fused)
        self.trained = Trained(model, averages, optimizer)
        self._parameters = list(model.parameters())
        self._network: nn.Module = torch.compile(model) if recipe.compile else model  # pyright: ignore[reportAttributeAccessIssue]
        self._augmentation = Augmentation(probability=recipe.augmentation) if recipe.augmentation else None
        self._shape = config.shape
        self.target_watch = Stopwatch(self._device)

    def take(self, step: int) -> list[ObjectiveValue]:
        """Take step `step`, counted from 0, and return the values of this process's parts of it."""
        recipe, optimizer = self._recipe, self.trained.optimizer
        assert optimizer is not None
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(step)
        self._zero_gradients()
        self.trained.model.train()
        parts = self._backward(step)
        self._sum_gradients()
        if recipe.nan_to_num:
            for gradient in self._gradients():
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        if recipe.max_grad_norm < float("inf"):
            torch.nn.utils.clip_grad_norm_(self._parameters, recipe.max_grad_norm)
        optimizer.step()
        self._average(step)
        return parts

    def require_finite(self, step: int) -> None:
        """Raise ArithmeticError if a weight is not finite, before it could be saved."""
        for name, value in self.trained.model.named_parameters():
            if not bool(value.isfinite().all()):
                raise ArithmeticError(f"the weight {name} is not finite at step {step}")

    def examples(self, step: int) -> Iterator[tuple[Example, Tensor | None]]:
        """This process's prepared parts of the batch of `step`, each with its augmentation labels."""
        recipe, device = self._recipe, self._device
        generator = generator_for(recipe.seed, Purpose.OBJECTIVE, step, device)
        self.target_watch.start()
        draws = self._objective(None).draw(
            (recipe.batch, *self._shape), generator, device=device, labelled=self._feed.labelled
        )
        augmentation = self._drawn_augmentation(step)
        self.target_watch.stop()
        for part in self._parts():
            rows = self._feed.rows(step, part)
            self.target_watch.start()
            x0 = rows.pixels.float().div_(127.5).sub_(1)
            flips, source_only, augment_labels = None, None, None
            if augmentation is not None:
                parameters = augmentation[part]
                flips = parameters.flips.to(device)
                if self._augmentation is not None:
                    x0 = self._augmentation.apply(x0, parameters)
                    source_only, augment_labels = parameters.own.to(device), parameters.labels.to(device)
                else:
                    x0 = flip(x0, flips)
            objective = self._objective(rows.pool)
            example = objective.example(x0, draws[part], rows.labels, rows.index, flip=flips, source_only=source_only)
            self.target_watch.stop()
            yield example, augment_labels

    def gradient(self, step: int) -> Tensor:
        """The gradient of the batch of `step` at the current weights, in evaluation mode, as one vector."""
        self.trained.model.eval()
        self._zero_gradients()
        for example, augment_labels in self.examples(step):
            value = self._objective(None).evaluate(self.trained.model, example, augment_labels)
            (value.row_loss.sum() / self._recipe.batch).backward()
        vector = torch.cat([gradient.reshape(-1) for gradient in self._gradients()])
        self._zero_gradients()
        return vector

    def _zero_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _backward(self, step: int) -> list[ObjectiveValue]:
        values: list[ObjectiveValue] = []
        objective = self._objective(None)
        for number, (example, augment_labels) in enumerate(self.examples(step)):
            torch.manual_seed(self._dropout_seed(step, number))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
                value = objective.evaluate(self._network, example, augment_labels)
            self._accelerator.backward(value.row_loss.sum() / self._recipe.batch)
            values.append(value)
        return values

    def _dropout_seed(self, step: int, number: int) -> int:
        part = self._ranks.rank * self._recipe.gradient_accumulation_steps + number
        return seed_for(self._recipe.seed, Purpose.DROPOUT, step, part)

    def _drawn_augmentation(self, step: int) -> AugmentationParameters | None:
        """The parameters drawn for the whole batch; for mirrored data only flips, which the network does not see."""
        if self._augmentation is None and not self._recipe.mirror:
            return None
        drawing = self._augmentation or Augmentation(probability=0.0, flip_y=False)
        generator = generator_for(self._recipe.seed, Purpose.AUGMENTATION, step)
        images = drawing.draw(self._recipe.images_per_step, generator)
        return images[torch.arange(len(images)).repeat_interleave(self._recipe.draws_per_image)]

    def _parts(self) -> list[slice]:
        """The rows of this process, in consecutive parts of nearly equal size."""
        parts, batch = self._recipe.gradient_accumulation_steps, self._recipe.batch
        first, count = self._ranks.rank * parts, self._ranks.world_size * parts
        edges = [batch * k // count for k in range(first, first + parts + 1)]
        return [slice(a, b) for a, b in pairwise(edges) if a < b]

    def _objective(self, references: References | None) -> Objective:
        recipe = self._recipe
        target: StableTarget
        if references is None or recipe.target == "dsm":
            target = DenoisingTarget(recipe.process)
        else:
            assert recipe.noise_band != "auto"
            target = StableTarget(recipe.process, references=references, noise_band=recipe.noise_band)
        return Objective(
            recipe.process,
            noise_levels=recipe.noise_levels,
            weighting=recipe.weighting,
            target=target,
            label_dropout=recipe.label_dropout if self._feed.labelled else 0.0,
            draws_per_image=recipe.draws_per_image,
            antithetic=recipe.antithetic,
        )

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _sum_gradients(self) -> None:
        if self._ranks.world_size == 1:
            return
        for parameter in self._parameters:  # a process without rows must take part, too
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = self._gradients()
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._ranks.all_reduce(flat, "to sum their gradients")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.reshape(gradient.shape))

    def _average(self, step: int) -> None:
        recipe, model = self._recipe, self.trained.model
        decay = ema_decay(recipe.batch, step * recipe.batch, recipe.ema_half_life, recipe.ema_ramp)
        for name, average in self.trained.averages.items():
            if name.startswith("power-"):
                decay_now = power_decay(step + 1, power_exponent(float(name.removeprefix("power-"))))
            else:
                decay_now = decay
            update_ema(average, model, decay_now)
