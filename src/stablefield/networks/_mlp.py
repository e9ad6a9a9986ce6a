"""A residual multilayer perceptron: the network for points in the plane and for images of 8 x 8 pixels.

The sample is one vector. Each block adds W2 silu(W1 silu(norm(h)) + U e) to the hidden vector h, where e embeds noise level
and class. The last layers of each block and of the network start at zero, so that training starts at the skip path.
"""

import math

import torch
from torch import Tensor, nn

from stablefield._shapes import check_generator, check_tensor, number, shape_of, whole_number
from stablefield.networks._dropout import dropout
from stablefield.networks._embedding import FourierEmbedding, class_vectors

__all__ = ["MLP"]


class MLP(nn.Module):
    """Residual perceptron on flattened samples.

    Args:
        shape: shape of one sample, (C, H, W) or (d,).
        width: of the hidden vectors.
        depth: number of residual blocks.
        dropout: probability of dropping a hidden value in training.
        classes: number of classes, 0 for none.
        generator: draws the initial weights; torch's global one if None.

    Raises:
        ValueError: if a number is out of range.
    """

    float32_labels = True

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 512,
        depth: int = 4,
        dropout: float = 0.0,
        classes: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = shape_of("shape", shape)
        for name, value in (("width", width), ("depth", depth), ("classes", classes)):
            whole_number(name, value)
        number("dropout", dropout)
        check_generator("generator", generator)
        if min(shape, default=0) < 1 or width < 8 or width % 4 or depth < 1 or classes < 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"MLP(shape={shape}, width={width}, depth={depth}, dropout={dropout}, classes={classes}): the width must "
                "be a multiple of 4 and at least 8, the depth at least 1, the dropout in [0, 1)."
            )
        self.classes = classes
        dim = math.prod(shape)
        # Noise labels are of order one (ln(sigma) / 4), which frequencies of order one resolve without ringing.
        self.embed = FourierEmbedding(width // 2, scale=1.0, generator=generator)
        self.embed_noise = nn.Linear(width // 2, width)
        self.embed_class = nn.Linear(classes, width, bias=False) if classes else None
        self.embed_hidden = nn.Linear(width, width)
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear", generator=generator)
                if layer is not self.embed_class:
                    nn.init.zeros_(layer.bias)
        for layer in [self.leave, *(block.second for block in self.blocks if isinstance(block, _Block))]:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, noise_label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map (B, ...) to the same shape.

        Args:
            x: scaled noisy samples, shape (B, ...).
            noise_label: shape (B,).
            class_labels: integers (B,), -1 for no class; or one-hot (B, classes).

        Raises:
            ValueError: if shapes do not fit, a label is out of range, or labels are given to a network without classes.
        """
        check_tensor("x", x, floating=True, batch=True)
        check_tensor("noise_label", noise_label)
        if x[0].numel() != self.enter.in_features or noise_label.shape != x.shape[:1]:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and noise_label {tuple(noise_label.shape)}: this network takes rows of "
                f"{self.enter.in_features} numbers, shape (B, ...), and one label per row, shape (B,)."
            )
        if class_labels is not None:
            check_tensor("class_labels", class_labels)
            if self.embed_class is None:
                raise ValueError("class_labels were given to an MLP without classes: build it with them.")
        silu = nn.functional.silu
        e = self.embed_noise(self.embed(noise_label).to(x.dtype))
        if self.embed_class is not None:
            e = e + self.embed_class(class_vectors(class_labels, self.classes, x))
        e = silu(self.embed_hidden(silu(e)))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, e)
        return self.leave(silu(self.norm(h))).reshape(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.embed = nn.Linear(width, width)
        self.dropout = dropout
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        inner = self.first(nn.functional.silu(self.norm(h))) + self.embed(e)
        return h + self.second(dropout(nn.functional.silu(inner), self.dropout, self.training))
