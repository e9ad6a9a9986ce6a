r"""SiT, the transformer on patches of DiT: published for velocities (SiT) and for noise (DiT), with one architecture.

An image becomes a sequence of patches, each a vector of the width $D$, plus a fixed embedding of its place. Noise label and
class make a vector $c$, from which each block takes shifts $\beta$, scales $\gamma$ and gates $\alpha$ (adaLN-Zero):

$$ h = x + \alpha_1\, \text{attention}((1 + \gamma_1)\, \text{norm}(x) + \beta_1), \qquad
   y = h + \alpha_2\, \text{mlp}((1 + \gamma_2)\, \text{norm}(h) + \beta_2). $$

All six, and the last layer, start at zero: at first every block is the identity and the output is 0.

Names and values of the state are those of the published weights, so that weights trained elsewhere load and give the same
outputs.

References:
    Peebles, Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, section 3 and table 1 (S, B, L and XL);
    Ma, Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, "SiT: Exploring Flow and Diffusion-based Generative Models with
    Scalable Interpolant Transformers", ECCV 2024; Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
    Recognition at Scale", ICLR 2021, section 3.1 (patches).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stablefield._shapes import check_generator, check_kind, check_tensor, flag, number, row_values, whole_number
from stablefield.networks._embedding import class_numbers
from stablefield.networks._layers import Linear

__all__ = ["SIT_SIZES", "SiT", "place_embedding"]

SIT_SIZES: Mapping[str, tuple[int, int, int]] = {
    "XXS": (64, 4, 4),
    "XS": (128, 6, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
"""Width, depth and heads by name: those of the papers, and two for images of 8 to 32 pixels on a CPU."""

# Sines and cosines of a noise label, half each, at frequencies from 1 down to nearly 1e-4.
_WAVES = 256
# Hidden width of a perceptron in units of the width; published networks have 4.
_MOST_HIDDEN = 1_000


class SiT(nn.Module):
    """SiT, or DiT: a transformer on patches, conditioned by adaptive layer norm.

    `SiT.sized("XL", 32, 2, 4, classes=1000, learn_sigma=True)` is the published SiT-XL/2 for ImageNet's latents. For grey
    images of 28 x 28 pixels on a CPU, as a flow, in a loop of your own:

        network = sf.networks.SiT.sized("XS", 28, 4, 1)
        denoiser = sf.Denoiser(network, preconditioning=sf.FlowPreconditioning())
        x0 = denoiser(x, sigma)  # x (B, 1, 28, 28), sigma (B,)

    Args:
        input_size: height and width of the images or latents, or the side of square ones; multiples of `patch_size`.
        patch_size: side of a patch.
        channels: of the images or latents.
        width: of the vectors; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: of the attention.
        classes: number of classes; 0 for none. The table of classes has one more row, for no class.
        learn_sigma: double the channels of the last layer, as the published weights do. Only the first half, the velocity or
            the noise, is returned; the second, a variance in DiT, has no use here and gets no gradient.
        mlp_ratio: hidden width of a block's perceptron, in units of `width`.
        checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again: less memory, a third
            more time.
        generator: draws the weights; torch's global generator if not given.

    Raises:
        ValueError: if a size is below 1, the images do not divide into patches, or the width not into heads.
    """

    float32_labels = True

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int | Sequence[int],
        patch_size: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        classes: int = 0,
        learn_sigma: bool = False,
        *,
        mlp_ratio: float = 4.0,
        checkpointing: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_generator("generator", generator)
        for name, value in (("patch_size", patch_size), ("channels", channels), ("width", width), ("depth", depth)):
            whole_number(name, value, 1)
        whole_number("heads", heads, 1)
        whole_number("classes", classes, 0)
        self.size = _sides(input_size, patch_size)
        self.learn_sigma, self.checkpointing = flag("learn_sigma", learn_sigma), flag("checkpointing", checkpointing)
        if width % 4 or width % heads:
            raise ValueError(f"width={width}: it must be a multiple of 4 and of heads={heads}.")
        ratio = number("mlp_ratio", mlp_ratio)
        hidden = int(width * ratio) if 0 < ratio <= _MOST_HIDDEN else 0
        if hidden < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio}: pass a number from 1 / width to {_MOST_HIDDEN:,}.")
        self.patch_size, self.channels, self.classes = patch_size, channels, classes
        self.width, self.heads, self.mlp_ratio = width, heads, mlp_ratio
        self.x_embedder = _Patches(channels, width, patch_size, generator)
        self.t_embedder = _NoiseEmbedder(width, generator)
        self.y_embedder = _ClassEmbedder(classes + 1, width, generator)
        # A buffer, not a parameter: no optimiser or average has anything to do with it.
        grid = self.size[0] // patch_size, self.size[1] // patch_size
        self.register_buffer("pos_embed", place_embedding(grid, width).float()[None])
        self.blocks = nn.ModuleList(_TransformerBlock(width, heads, hidden, generator) for _ in range(depth))
        outputs = patch_size**2 * channels * (2 if learn_sigma else 1)
        self.final_layer = _FinalLayer(width, outputs)

    @classmethod
    def sized(
        cls,
        size: str,
        input_size: int | Sequence[int],
        patch_size: int,
        channels: int,
        classes: int = 0,
        learn_sigma: bool = False,
        *,
        checkpointing: bool = False,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A network of a named size; the other arguments as in the class.

        Args:
            size: "S", "B", "L" or "XL" of the papers, or "XXS" or "XS", for images of 8 to 32 pixels on a CPU.
            input_size: as in the class.
            patch_size: as in the class.
            channels: as in the class.
            classes: as in the class.
            learn_sigma: as in the class.
            checkpointing: as in the class.
            generator: as in the class.

        Raises:
            ValueError: if there is no such size, or as in the class.
        """
        check_kind("size", size, str, f"one of {', '.join(SIT_SIZES)}")
        if size not in SIT_SIZES:
            raise ValueError(f"size={size!r:.40}: pass one of {', '.join(SIT_SIZES)}.")
        return cls(
            input_size,
            patch_size,
            channels,
            *SIT_SIZES[size],
            classes,
            learn_sigma,
            checkpointing=checkpointing,
            generator=generator,
        )

    def forward(self, x: Tensor, noise_label: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: images or latents, shape (N, channels, height, width), in the dtype of the weights.
            noise_label: shape (N,), or one number: SiT's time, from 0 (noise) to 1 (data), or DiT's step, from 0 to 999.
            class_labels: integers (N,), -1 for no class; None: no class for any row.

        Returns:
            Shape (N, channels, height, width).

        Raises:
            ValueError: if shapes, dtypes or devices do not agree, labels are out of range, or the network has no classes.
        """
        check_tensor("x", x, floating=True, batch=True)
        if x.shape[1:] != (self.channels, *self.size):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: this network takes images of shape "
                f"(N, {self.channels}, {self.size[0]}, {self.size[1]})."
            )
        if class_labels is not None:
            check_tensor("class_labels", class_labels)
            if not self.classes:
                raise ValueError("class_labels were given to a network without classes: build it with classes=L.")
        rows, valid = class_numbers(class_labels, self.classes, x)
        condition = self.y_embedder(rows)
        if valid is not None:
            condition = torch.where(valid[:, None], condition, math.nan)
        condition = condition + self.t_embedder(row_values("noise_label", noise_label, x), condition.dtype)
        h = self.x_embedder(x) + self.pos_embed
        again = self.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            # No block draws random numbers, so there is no state of a generator to keep.
            h = (
                checkpoint(block, h, condition, use_reentrant=False, preserve_rng_state=False)
                if again
                else block(h, condition)
            )
        return self._images(self.final_layer(h, condition))

    def _images(self, tokens: Tensor) -> Tensor:
        """The images of tokens (N, T, p p C): within a token, the channels of a pixel are neighbours."""
        side = self.patch_size
        height, width = self.size[0] // side, self.size[1] // side
        outputs = tokens.shape[-1] // side**2
        pixels = tokens.reshape(len(tokens), height, width, side, side, outputs)[..., : self.channels]
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), self.channels, *self.size)


class _Patches(nn.Module):
    def __init__(self, channels: int, width: int, side: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.proj = _PatchConv(channels, width, side, side)
        nn.init.xavier_uniform_(self.proj.weight.data.view(width, -1), generator=generator)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _PatchConv(nn.Conv2d):
    """A linear map of each patch, as a convolution whose stride is the side of its kernel."""

    def reset_parameters(self) -> None:
        """Do nothing: the owner draws the weights as those of a linear map."""


class _NoiseEmbedder(nn.Module):
    def __init__(self, width: int, generator: torch.Generator | None) -> None:
        super().__init__()
        first, second = Linear(_WAVES, width, gain=0), Linear(width, width, gain=0)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, label: Tensor, dtype: torch.dtype) -> Tensor:
        # In float32 even for weights of lower precision, which a buffer would be cast to.
        label = label.to(torch.promote_types(dtype, torch.float32))
        exponents = torch.arange(_WAVES // 2, device=label.device, dtype=label.dtype) / (_WAVES // 2)
        angles = label[:, None] * torch.exp(-math.log(10_000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))


class _ClassEmbedder(nn.Module):
    def __init__(self, rows: int, width: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
        nn.init.normal_(self.embedding_table.weight, std=0.02, generator=generator)

    def forward(self, rows: Tensor) -> Tensor:
        return self.embedding_table(rows)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, generator=generator)
        self.proj = Linear(width, width, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))


class _Perceptron(nn.Module):
    def __init__(self, width: int, hidden: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, generator=generator)
        self.fc2 = Linear(hidden, width, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.attn = _Attention(width, heads, generator)
        self.mlp = _Perceptron(width, hidden, generator)
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate * self.attn(_modulated(x, shift, scale))
        return x + gate_mlp * self.mlp(_modulated(x, shift_mlp, scale_mlp))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(width, outputs, gain=0)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(_modulated(x, shift, scale))


def place_embedding(grid: tuple[int, int], width: int) -> Tensor:
    """The fixed embedding of the patches' places, shape (rows * columns, width), float64.

    The first half of the width tells the column, the second the row, each as sines, then cosines, at frequencies from 1 down
    to nearly 1e-4. Places count from 0, row by row.

    Args:
        grid: rows and columns of patches.
        width: of the embedding, a multiple of 4.
    """
    rows, columns = grid
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(places: Tensor) -> Tensor:
        angles = places.double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    return torch.cat(
        [waves(torch.arange(columns)).repeat(rows, 1), waves(torch.arange(rows)).repeat_interleave(columns, 0)], 1
    )


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), Linear(width, parts * width, gain=0))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised vectors, without weights of their own, times 1 + scale plus shift."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _sides(input_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    check_kind("input_size", input_size, (int, tuple, list), "the side of square images, or their height and width")
    sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(sides) != 2:
        raise ValueError(f"input_size is {input_size}: pass the side of square images, or their height and width.")
    for side in sides:
        if whole_number("input_size", side, 1) % patch_size:
            raise ValueError(f"input_size is {input_size}: it must be a multiple of patch_size={patch_size}.")
    return sides[0], sides[1]
