"""CUDA graphs: a function's kernels, recorded once and then repeated without Python.

Python takes a few microseconds to launch each kernel. A GPU finishes the hundreds of small kernels of a target, or of a
small network, sooner than Python can launch them. A graph launches them together.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["CudaGraph", "mapped"]

Result = TypeVar("Result")


class CudaGraph(Generic[Result]):
    """A function whose calls are replayed as one CUDA graph for each combination of its arguments' shapes.

    The first call with new shapes runs the function twice as usual, so that it checks its arguments and makes what it makes
    once, and then records it. Later calls copy their arguments to the tensors that the recorded kernels read, and replay
    them: nothing is checked, and the host waits for nothing. Random numbers come from torch's global generator of the
    device, as seeded before the call.

    The result lies in memory that the next call overwrites.

    Args:
        function: of tensors, and of tuples and dataclasses of them; anything else among its arguments must be the same in
            every call. It may read no value while it is recorded.
        device: a CUDA device.
    """

    def __init__(self, function: Callable[..., Result], device: torch.device) -> None:
        self._function, self._device = function, device
        self._recorded: dict[object, tuple[torch.cuda.CUDAGraph, list[Tensor], Result]] = {}

    def __call__(self, *arguments: object) -> Result:
        given = list(_tensors(arguments))
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in given), _layout(arguments)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(arguments)
        graph, inputs, result = self._recorded[shapes]
        for tensor, value in zip(inputs, given, strict=True):
            tensor.copy_(value)
        graph.replay()
        return result

    def _record(self, arguments: tuple[object, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Result]:
        state = torch.cuda.get_rng_state(self._device)
        copies = mapped(torch.clone, arguments)
        # Recording needs a stream of its own, and so does what the function makes only once.
        stream, now = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._function(*copies)
        now.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = self._function(*copies)
        torch.cuda.set_rng_state(state, self._device)
        return graph, list(_tensors(copies)), result


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a nest of tuples and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in cast("tuple[object, ...]", value):
            yield from _tensors(one)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _layout(value: object) -> object:
    """Where in the nest its tensors are."""
    if isinstance(value, tuple):
        return tuple(_layout(one) for one in cast("tuple[object, ...]", value))
    if is_dataclass(value):
        return tuple(_layout(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, Tensor)


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A nest of tuples and dataclasses with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(mapped(change, one) for one in cast("tuple[object, ...]", value))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: mapped(change, getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **changed)
    return value
