r"""The stepper: one optimiser step, on one process or many, as a function of (seed, step).

Every process draws everything random in a step for the whole batch; each then works on its own rows, in as many parts as the
recipe accumulates. Losses are sums over rows divided by the size of the whole batch, so sums over parts and processes give
the mean over the batch, whatever the number of either. Only dropout masks are drawn separately for each part: with dropout,
runs on different numbers of processes or parts have different, equally good, losses.

Several processes sum their gradients by DistributedDataParallel, which overlaps with the backward pass (`_data_parallel`).
With `exact`, one all-reduce after the pass sums all gradients in the order of the parameters, whatever the network and the
version of torch. With `fsdp`, each process holds a part of all that training changes (`_fully_sharded`). A resumed run
repeats each of the three bit for bit.

On a CPU the targets of several steps are computed together (`_target_blocks`).

On a GPU a compiled step is replayed as two CUDA graphs: one prepares the example with its target, one computes the loss and
its gradient. Python then no longer limits the speed of a small network, and a target takes only the time of its arithmetic.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stablefield._distributed import Ranks
from stablefield.data._augmentation import Augmentation, AugmentationParameters, flip
from stablefield.diffusion._importance_sampling import ImportanceSampling
from stablefield.diffusion._objective import Draws, Example, Objective, ObjectiveValue
from stablefield.targets._references import References
from stablefield.targets._stable_target import DenoisingTarget, StableTarget
from stablefield.training._cuda_graph import CudaGraph, mapped
from stablefield.training._data_parallel import DataParallel, overlaps
from stablefield.training._ema import ema_decay, power_decay, power_exponent, update_ema
from stablefield.training._feed import Feed
from stablefield.training._fully_sharded import own_part, shards
from stablefield.training._meter import Stopwatch
from stablefield.training._model import untrained
from stablefield.training._run_config import RunConfig
from stablefield.training._seeding import Purpose, generator_for, seed_for
from stablefield.training._target_blocks import Inputs, band_capacity, joined, steps_together

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
        steps_together: number of steps whose targets are computed in one call.
    """

    def __init__(self, config: RunConfig, feed: Feed, accelerator: Accelerator) -> None:
        recipe = config.recipe
        self._recipe, self._feed, self._accelerator = recipe, feed, accelerator
        self._device = accelerator.device
        self._ranks = Ranks.launched(self._device)
        self._sharded = shards(recipe, self._ranks.world_size)
        self.trained = untrained(config, self._device, sharded=self._sharded)
        model, self._importance = self.trained.model, self.trained.importance
        self._parameters = list(model.parameters())
        self._network = cast("nn.Module", torch.compile(model)) if recipe.compile else model
        self._overlaps = overlaps(recipe, self._ranks.world_size, self._device)
        self._parallel: DataParallel | None = None
        self._augmentation = Augmentation(probability=recipe.augmentation) if recipe.augmentation else None
        self._shape = config.shape
        self._capacity: int | None = None
        self._graphs: tuple[CudaGraph[Example], CudaGraph[tuple[ObjectiveValue, tuple[Tensor | None, ...]]]] | None = (
            None
        )
        if recipe.compile and self._device.type == "cuda":
            self._capacity = band_capacity(recipe)
            if feed.whole is not None and recipe.target == "stf":
                # Without them, a recorded target would compute its logits in float64.
                pixels = feed.whole.data
                assert isinstance(pixels, Tensor)
                feed.whole.matrix(pixels.device).norms(torch.float32)
            self._graphs = CudaGraph(self._example, self._device), CudaGraph(self._loss_and_gradient, self._device)
        self.steps_together = steps_together(recipe, config.shape, self._device, feed)
        self._prepared: dict[int, list[tuple[Example, Tensor | None]]] = {}
        # Seconds of a block of targets for each of the steps that are left of it.
        self._share = 0.0
        self.target_watch = Stopwatch(self._device)

    def take(self, step: int) -> list[ObjectiveValue]:
        """Take step `step`, counted from 0, and return the values of this process's parts of it."""
        recipe, optimizer = self._recipe, self.trained.optimizer
        assert optimizer is not None
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(step)
        self._zero_gradients()
        self.trained.model.train()
        parts = self._backward(step)
        observed = None if self._importance is None else self._observed(self._importance, parts)
        self._sum_gradients(observed)
        if self._importance is not None and observed is not None:
            self._importance.observe(observed)
        if recipe.nan_to_num:
            for gradient in self._gradients():
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        if recipe.max_grad_norm < float("inf"):
            with self._exchange("to add up the norm of their gradients"):
                torch.nn.utils.clip_grad_norm_(self._parameters, recipe.max_grad_norm)
        optimizer.step()
        self._average(step)
        return parts

    def change_steps(self, steps: int) -> None:
        """Follow the schedule of a run of another number of steps from the next step on."""
        self._recipe = replace(self._recipe, steps=steps)

    def odd_weight(self) -> str | None:
        """The name of a weight that is not finite, the same on all processes; None if all are."""
        named = list(self.trained.model.named_parameters())
        odd = torch.stack([~own_part(value.detach()).isfinite().all() for _, value in named]).float()
        if self._sharded:
            self._ranks.all_reduce(odd, "to look for weights that are not finite")
        return next((name for (name, _), found in zip(named, odd.tolist(), strict=True) if found), None)

    def examples(self, step: int) -> Iterator[tuple[Example, Tensor | None]]:
        """This process's prepared parts of the batch of `step`, each with its augmentation labels."""
        if self.steps_together > 1:
            place = step % self.steps_together
            if step not in self._prepared:
                first, before = step - place, self.target_watch.seconds()
                self._prepared = self._prepare(range(first, first + self.steps_together))
                self._share = (self.target_watch.seconds() - before) / (self.steps_together - place)
            self.target_watch.ahead = self._share * (self.steps_together - 1 - place)
            yield from self._prepared[step]
            return
        for pool, inputs, augment_labels in self._inputs(step):
            self.target_watch.start()
            example = self._example
            if self._graphs is not None and pool is self._feed.whole:
                example = self._graphs[0]
            prepared = example(pool, *inputs)
            self.target_watch.stop()
            yield prepared, augment_labels

    def _prepare(self, steps: range) -> dict[int, list[tuple[Example, Tensor | None]]]:
        """The examples of several steps, by one call of the target."""
        found = [(step, *part) for step in steps for part in self._inputs(step)]
        if not found:  # a process without rows
            return {step: [] for step in steps}
        self.target_watch.start()
        whole = self._example(found[0][1], *joined([inputs for _, _, inputs, _ in found]))
        prepared: dict[int, list[tuple[Example, Tensor | None]]] = {step: [] for step in steps}
        first = 0
        for step, _, inputs, augment_labels in found:
            rows = slice(first, first + len(inputs.x0))
            prepared[step].append((whole[rows], augment_labels))
            first = rows.stop
        self.target_watch.stop()
        return prepared

    def _inputs(self, step: int) -> Iterator[tuple[References, Inputs, Tensor | None]]:
        """The references, the inputs of `_example` and the augmentation labels of this process's parts of a batch."""
        recipe, device = self._recipe, self._device
        generator = generator_for(recipe.seed, Purpose.OBJECTIVE, step, device)
        self.target_watch.start()
        draws = self._objective(None).draw(
            (recipe.batch, *self._shape), generator, device=device, labelled=self._feed.labelled
        )
        augmentation = self._drawn_augmentation(step)
        self.target_watch.stop()
        for part in self._parts():
            parameters = None if augmentation is None else augmentation[part]
            flips = None if parameters is None else parameters.flips.to(device, non_blocking=True)
            if flips is not None and self._feed.drawn:
                flips = flips[:, 0]  # which rows are latents of mirrored images
            rows = self._feed.rows(step, part, flips)
            self.target_watch.start()
            x0 = rows.pixels.float()
            if rows.pixels.dtype == torch.uint8:
                x0 = x0.div_(127.5).sub_(1)
            source_only, augment_labels = None, None
            if parameters is not None and flips is not None:
                if self._augmentation is not None:
                    x0 = self._augmentation.apply(x0, parameters)
                    source_only = parameters.own.to(device, non_blocking=True)
                    augment_labels = parameters.labels.to(device, non_blocking=True)
                elif not self._feed.drawn:
                    x0 = flip(x0, flips)
            self.target_watch.stop()
            yield rows.pool, Inputs(x0, draws[part], rows.labels, rows.index, flips, source_only), augment_labels

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

    def _observed(self, importance: ImportanceSampling, parts: list[ObjectiveValue]) -> Tensor:
        """Sums, by noise level, of the squares of the rows' gradients in the output of the raw network."""
        sums = torch.zeros(2, importance.bins, device=self._device)
        for value in parts:
            level = value.noise_level
            scale = self._recipe.weighting(level) * self._recipe.preconditioning(level).c_out ** 2
            assert value.weight is not None
            sums += importance.sums(level, scale * value.row_loss.detach() / value.weight)
        return sums

    def _zero_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _example(
        self,
        pool: References,
        x0: Tensor,
        draws: Draws,
        labels: Tensor | None,
        index: Tensor,
        flips: Tensor | None,
        source_only: Tensor | None,
    ) -> Example:
        return self._objective(pool).example(x0, draws, labels, index, flip=flips, source_only=source_only)

    def _backward(self, step: int) -> list[ObjectiveValue]:
        values: list[ObjectiveValue] = []
        last = len(self._parts()) - 1
        for number, (example, augment_labels) in enumerate(self.examples(step)):
            if self._overlaps and self._parallel is None:
                self._parallel = DataParallel(self._network, self._trial(example, augment_labels), self._ranks)
            # For other devices, which a run on a CPU does not use, torch would format the whole stack of calls each time.
            seed = torch.default_generator.manual_seed if self._device.type == "cpu" else torch.manual_seed
            seed(self._dropout_seed(step, number))
            if self._parallel is not None and number == last:
                value = self._evaluate(self._parallel.network, example, augment_labels)
                self._parallel.backward(value.row_loss.sum() / self._recipe.batch)
            elif self._graphs is None:
                with self._exchange("to gather weights and sum gradients"):
                    value = self._evaluate(self._network, example, augment_labels)
                    self._accelerator.backward(value.row_loss.sum() / self._recipe.batch)
            else:
                found, gradient = self._graphs[1](example, augment_labels)
                # The next call overwrites the results.
                value = mapped(lambda tensor: tensor.detach().clone(), found)
                self._add(gradient)
            values.append(value)
        return values

    def _add(self, gradient: tuple[Tensor | None, ...]) -> None:
        several = self._recipe.gradient_accumulation_steps > 1
        for parameter, part in zip(self._parameters, gradient, strict=True):
            if part is None:
                continue
            if parameter.grad is None:
                parameter.grad = part.clone() if several else part
            else:
                parameter.grad += part

    def _trial(self, example: Example, augment_labels: Tensor | None) -> Callable[[nn.Module], Tensor]:
        return lambda network: self._evaluate(network, example, augment_labels).row_loss.sum()

    def _evaluate(self, network: nn.Module, example: Example, augment_labels: Tensor | None) -> ObjectiveValue:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            return self._objective(None).evaluate(network, example, augment_labels)

    def _loss_and_gradient(
        self, example: Example, augment_labels: Tensor | None
    ) -> tuple[ObjectiveValue, tuple[Tensor | None, ...]]:
        value = self._evaluate(self._network, example, augment_labels)
        loss = value.row_loss.sum() / self._recipe.batch
        gradient = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return value, gradient

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
            target = StableTarget(
                recipe.process, references=references, noise_band=recipe.noise_band, capacity=self._capacity
            )
        return Objective(
            recipe.process,
            noise_levels=recipe.noise_levels,
            weighting=recipe.weighting,
            target=target,
            label_dropout=recipe.label_dropout if self._feed.labelled else 0.0,
            draws_per_image=recipe.draws_per_image,
            antithetic=recipe.antithetic,
            importance=self._importance,
        )

    def _gradients(self) -> list[Tensor]:
        return [own_part(parameter.grad) for parameter in self._parameters if parameter.grad is not None]

    def _exchange(self, purpose: str) -> AbstractContextManager[None]:
        """For computations in which the processes of a sharded run exchange what they hold."""
        return self._ranks.waiting(purpose) if self._sharded else nullcontext()

    def _sum_gradients(self, observed: Tensor | None) -> None:
        """Sum the gradients, and what importance sampling observed, over the processes."""
        if self._ranks.world_size == 1:
            return
        if self._parallel is not None or self._sharded:
            if observed is not None:
                self._ranks.all_reduce(observed, "to sum what they observed")
            return
        for parameter in self._parameters:  # a process without rows must take part, too
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = self._gradients()
        summed = gradients if observed is None else [*gradients, observed]
        flat = torch.cat([tensor.reshape(-1) for tensor in summed])
        self._ranks.all_reduce(flat, "to sum their gradients")
        for tensor, part in zip(summed, flat.split([tensor.numel() for tensor in summed]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def _average(self, step: int) -> None:
        recipe, model = self._recipe, self.trained.model
        decay = ema_decay(recipe.batch, step * recipe.batch, recipe.ema_half_life, recipe.ema_ramp)
        for name, average in self.trained.averages.items():
            if name.startswith("power-"):
                decay_now = power_decay(step + 1, power_exponent(float(name.removeprefix("power-"))))
            else:
                decay_now = decay
            update_ema(average, model, decay_now)
