"""DDPM++ and NCSN++ a second time, as plain functions of a state dict: no module, other formulas for each operation."""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def evaluate(
    state: State,
    x: Tensor,
    noise: Tensor,
    one_hot: Tensor | None,
    augment: Tensor | None,
    *,
    resolution: int,
    multipliers: tuple[int, ...],
    blocks: int,
) -> Tensor:
    ncsn = "map_noise.freqs" in state
    sides = [resolution // 2**i for i in range(len(multipliers))]

    # Embedding.
    if ncsn:
        angle = torch.einsum("n,k->nk", noise, 2 * math.pi * state["map_noise.freqs"])
    else:
        half = state["map_layer0.weight"].shape[1] // 2
        angle = torch.stack([noise * (1 / 10000) ** (k / (half - 1)) for k in range(half)], dim=1)
    e = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    if "map_label.weight" in state:
        weight = state["map_label.weight"]
        e = e + state["map_label.bias"]
        if one_hot is not None:
            e = e + one_hot @ weight.T * math.sqrt(weight.shape[1])
    if augment is not None:
        e = e + augment @ state["map_augment.weight"].T
    for layer in ("map_layer0", "map_layer1"):
        e = silu(e @ state[f"{layer}.weight"].T + state[f"{layer}.bias"])

    # Down.
    stack: list[Tensor] = []
    aux = x
    x = conv(state, f"enc.{resolution}x{resolution}_conv", x)
    stack.append(x)
    for level, r in enumerate(sides):
        if level:
            x = block(state, f"enc.{r}x{r}_down", x, e, "down")
            stack.append(x)
            if ncsn:
                name = f"enc.{r}x{r}_aux_residual"
                wide = conv(state, name, aux, padding=2)
                x = aux = stack[-1] = (x + halve(wide, state[f"{name}.resample_filter"], 0)) / math.sqrt(2)
        for i in range(blocks):
            x = block(state, f"enc.{r}x{r}_block{i}", x, e)
            stack.append(x)

    # Up.
    for r in sides[::-1]:
        if r == sides[-1]:
            x = block(state, f"dec.{r}x{r}_in0", x, e)
            x = block(state, f"dec.{r}x{r}_in1", x, e)
        else:
            x = block(state, f"dec.{r}x{r}_up", x, e, "up")
        for i in range(blocks + 1):
            x = block(state, f"dec.{r}x{r}_block{i}", torch.cat((x, stack.pop()), dim=1), e)
    assert not stack
    x = silu(norm(state, f"dec.{resolution}x{resolution}_aux_norm", x))
    return conv(state, f"dec.{resolution}x{resolution}_aux_conv", x)


def block(state: State, name: str, x: Tensor, e: Tensor, change: str = "") -> Tensor:
    def resized(t: Tensor, layer: str) -> Tensor:
        if not change:
            return t
        f = state[f"{name}.{layer}.resample_filter"]
        return halve(t, f, (f.shape[-1] - 1) // 2) if change == "down" else double(t, f)

    h = conv(state, f"{name}.conv0", resized(silu(norm(state, f"{name}.norm0", x)), "conv0"))
    shift = torch.einsum("ne,ce->nc", e, state[f"{name}.affine.weight"]) + state[f"{name}.affine.bias"]
    h = silu(norm(state, f"{name}.norm1", h + shift.reshape(*shift.shape, 1, 1)))
    h = conv(state, f"{name}.conv1", h)
    if f"{name}.skip.weight" in state:
        x = conv(state, f"{name}.skip", resized(x, "skip"))
    x = (h + x) / math.sqrt(2)
    if f"{name}.qkv.weight" in state:
        qkv = conv(state, f"{name}.qkv", norm(state, f"{name}.norm2", x)).flatten(2)
        q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
        weight = torch.exp(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(q.shape[1]))
        weight = weight / weight.sum(dim=2, keepdim=True)
        a = torch.einsum("nqk,nck->ncq", weight, v).reshape(x.shape)
        x = (conv(state, f"{name}.proj", a) + x) / math.sqrt(2)
    return x


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    channels = x.shape[1]
    parts = x.reshape(x.shape[0], min(32, channels // 4), -1)
    parts = parts - parts.mean(dim=2, keepdim=True)
    parts = parts / torch.sqrt((parts**2).mean(dim=2, keepdim=True) + 1e-6)
    return parts.reshape(x.shape) * state[f"{name}.weight"].reshape(-1, 1, 1) + state[f"{name}.bias"].reshape(-1, 1, 1)


def conv(state: State, name: str, x: Tensor, padding: int | None = None) -> Tensor:
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    return torch.nn.functional.conv2d(x, weight, state[f"{name}.bias"], padding=padding)


def halve(x: Tensor, f: Tensor, padding: int) -> Tensor:
    """Each window of the padded image times the filter, summed, at every second place."""
    windows = torch.nn.functional.pad(x, [padding] * 4).unfold(2, f.shape[-1], 2).unfold(3, f.shape[-1], 2)
    return (windows * f[0, 0]).sum(dim=(-1, -2))


def double(x: Tensor, f: Tensor) -> Tensor:
    """Each pixel paints four times the filter around its place in the larger image."""
    side, padding = f.shape[-1], (f.shape[-1] - 1) // 2
    n, c, height, width = x.shape
    canvas = x.new_zeros(n, c, 2 * height + side - 2, 2 * width + side - 2)
    for a in range(side):
        for b in range(side):
            canvas[:, :, a : a + 2 * height : 2, b : b + 2 * width : 2] += 4 * f[0, 0, a, b] * x
    return canvas[:, :, padding : padding + 2 * height, padding : padding + 2 * width]
