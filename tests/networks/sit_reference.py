"""SiT a second time, as plain functions of a state dict in float64: no module, other formulas for each operation."""

import math

import numpy as np
from torch import Tensor

State = dict[str, np.ndarray]


def evaluate(
    weights: dict[str, Tensor], x: Tensor, labels: Tensor, classes: list[int], *, heads: int, channels: int
) -> np.ndarray:
    """The output (N, outputs, H, W) with all of its channels; class -1 is the table's last row."""
    state = {name: value.double().numpy() for name, value in weights.items()}
    return np.stack(
        [
            one(state, image, float(label), number, heads, channels)
            for image, label, number in zip(x.double().numpy(), labels, classes, strict=True)
        ]
    )


def one(state: State, image: np.ndarray, label: float, number: int, heads: int, channels: int) -> np.ndarray:
    kernel = state["x_embedder.proj.weight"]
    width, _, side, _ = kernel.shape
    rows, columns = image.shape[1] // side, image.shape[2] // side

    tokens = np.empty((rows * columns, width))
    for i in range(rows):
        for j in range(columns):
            patch = image[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            tokens[i * columns + j] = kernel.reshape(width, -1) @ patch.ravel() + state["x_embedder.proj.bias"]
            tokens[i * columns + j] += np.concatenate([place(j, width // 2), place(i, width // 2)])

    angles = [label * 10_000 ** (-k / 128) for k in range(128)]
    waves = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    hidden = silu(linear(state, "t_embedder.mlp.0", waves))
    condition = linear(state, "t_embedder.mlp.2", hidden) + state["y_embedder.embedding_table.weight"][number]

    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for k in range(depth):
        six = linear(state, f"blocks.{k}.adaLN_modulation.1", silu(condition)).reshape(6, width)
        inner = norm(tokens) * (1 + six[1]) + six[0]
        tokens = tokens + six[2] * attention(state, f"blocks.{k}.attn", inner, heads)
        inner = norm(tokens) * (1 + six[4]) + six[3]
        tokens = tokens + six[5] * linear(
            state, f"blocks.{k}.mlp.fc2", gelu(linear(state, f"blocks.{k}.mlp.fc1", inner))
        )

    two = linear(state, "final_layer.adaLN_modulation.1", silu(condition)).reshape(2, width)
    pixels = linear(state, "final_layer.linear", norm(tokens) * (1 + two[1]) + two[0])
    out = np.empty((channels, *image.shape[1:]))
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            token = pixels[i // side * columns + j // side]
            start = (i % side * side + j % side) * channels
            out[:, i, j] = token[start : start + channels]
    return out


def place(position: int, width: int) -> np.ndarray:
    angles = [position / 10_000 ** (k / (width // 2)) for k in range(width // 2)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def linear(state: State, name: str, x: np.ndarray) -> np.ndarray:
    return np.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def attention(state: State, name: str, x: np.ndarray, heads: int) -> np.ndarray:
    tokens, width = x.shape
    d = width // heads
    qkv = linear(state, f"{name}.qkv", x)
    out = np.empty((tokens, width))
    for h in range(heads):
        q, k, v = (qkv[:, part * width + h * d : part * width + (h + 1) * d] for part in range(3))
        scores = q @ k.T / math.sqrt(d)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h * d : (h + 1) * d] = scores / scores.sum(1, keepdims=True) @ v
    return linear(state, f"{name}.proj", out)
