r"""Pickles as data: an interpreter of the pickle language that cannot call anything from the file.

Python's `pickle` looks names up and calls what it finds. This interpreter reads the same opcodes and pushes and pops the
same values, but where the pickle names a class or function, it takes the meaning from `stablefield.interop._names`, or
refuses. It imports no module, looks up no attribute and compiles no code of the file.

The other risk is size. Each opcode makes at most one small value, and their number is limited. A value that contains itself
a thousand times stays small, because nothing here traverses values: dict keys are only numbers and texts (Python hashes a
nested tuple by traversing it), and messages show only short texts from the file.

References:
    The pickle language as documented in the standard library's `pickletools`.
"""

import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

from stablefield.interop._inert import Array, Name, Node, RefusedError, attributes_of, plain_text
from stablefield.interop._names import find_name

__all__ = ["MAX_OPCODES", "ByteStream", "interpret"]

MAX_OPCODES = 1_000_000
"""Opcodes per file; a published network has about a hundred thousand. An opcode makes 220 bytes at most (an empty set)."""

# More bits than any library writes: torch's own magic number has 77.
_MAX_BITS = 128
# Entries copied from one container to another.
_MAX_WORK = MAX_OPCODES
_MAX_NUMBER_KEYS = 10_000


class ByteStream(Protocol):
    """The source of a pickle: bytes in memory or a mapped file, so that a read returns at most the bytes that are left."""

    def read(self, n: int, /) -> bytes:
        """Up to `n` bytes."""
        ...

    def readline(self) -> bytes:
        """Up to a line's end."""
        ...

    def tell(self) -> int:
        """The position of the next byte."""
        ...


@dataclass
class _Machine:
    """The stack machine.

    Attributes:
        reopen: turns bytes that hold a saved storage into that storage.
        persistent: turns a persistent id into a storage.
        work: entries copied so far.
        number_keys: keys and members of sets so far that are numbers.
    """

    reopen: Callable[[bytes], object] | None
    persistent: Callable[[object], object] | None
    stack: list[object] = field(default_factory=list[object])
    marked: list[list[object]] = field(default_factory=list[list[object]])
    memo: dict[int, object] = field(default_factory=dict[int, object])
    work: int = 0
    number_keys: int = 0

    def step(self, opcode: str, argument: object) -> None:
        """Carry out one opcode."""
        if opcode in _VALUES:
            self._push_value(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop_last(_TUPLES[opcode])))
        elif opcode in _STORE:
            place = len(self.memo) if opcode == "MEMOIZE" else _index(argument)
            self.memo[place] = self._top()
        elif opcode in _FETCH:
            if _index(argument) not in self.memo:
                raise RefusedError("the pickle fetches a value that it never stored: it is damaged.")
            self.stack.append(self.memo[_index(argument)])
        elif opcode in _METHODS:
            _METHODS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise RefusedError(f"the pickle uses the opcode {opcode}, which no file of weights needs.")

    def result(self) -> object:
        """The value left at the end."""
        if len(self.stack) != 1 or self.marked:
            raise RefusedError("the pickle does not end with one value: it is damaged.")
        return self.stack[0]

    def _push_value(self, argument: object) -> None:
        if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
            raise RefusedError(f"the pickle holds a number of {argument.bit_length():,} bits.")
        self.stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)

    def _top(self) -> object:
        if not self.stack:
            raise RefusedError("the pickle takes a value from an empty stack: it is damaged.")
        return self.stack[-1]

    def _pop(self) -> object:
        value = self._top()
        self.stack.pop()
        return value

    def _pop_last(self, count: int) -> list[object]:
        return [self._pop() for _ in range(count)][::-1]

    def mark(self, _: object) -> None:
        """Begin a sequence of values."""
        self.marked.append(self.stack)
        self.stack = []

    def _pop_marked(self) -> list[object]:
        if not self.marked:
            raise RefusedError("the pickle ends a sequence that it never began: it is damaged.")
        values, self.stack = self.stack, self.marked.pop()
        return values

    def pop(self, _: object) -> None:
        """Drop a value, or a mark."""
        if self.stack:
            self.stack.pop()
        else:
            self._pop_marked()

    def pop_mark(self, _: object) -> None:
        """Drop a sequence."""
        self._pop_marked()

    def tuple_of_marked(self, _: object) -> None:
        """Make a tuple of a sequence."""
        values = self._pop_marked()
        self.stack.append(tuple(values))

    def list_of_marked(self, _: object) -> None:
        """Make a list of a sequence."""
        values = self._pop_marked()
        self.stack.append(values)

    def dict_of_marked(self, _: object) -> None:
        """Make a dict of a sequence of keys and values."""
        values = self._pop_marked()
        target: dict[object, object] = {}
        self._set_items(target, values)
        self.stack.append(target)

    def frozenset_of_marked(self, _: object) -> None:
        """Make a set of a sequence."""
        values = self._pop_marked()
        target: set[object] = set()
        self._add_items(target, values)
        self.stack.append(target)

    def append(self, _: object) -> None:
        """Append one value to a list."""
        (value,) = self._pop_last(1)
        _extend(self._top(), [value])

    def appends(self, _: object) -> None:
        """Append a sequence to a list."""
        values = self._pop_marked()
        _extend(self._top(), values)

    def set_item(self, _: object) -> None:
        """Put one key and value into a dict."""
        pair = self._pop_last(2)
        self._set_items(self._top(), pair)

    def set_items(self, _: object) -> None:
        """Put a sequence of keys and values into a dict."""
        values = self._pop_marked()
        self._set_items(self._top(), values)

    def add_items(self, _: object) -> None:
        """Put a sequence into a set."""
        values = self._pop_marked()
        self._add_items(self._top(), values)

    def _set_items(self, target: object, values: list[object]) -> None:
        if not isinstance(target, dict) or len(values) % 2:
            raise RefusedError(f"the pickle puts keys and values into {_called(target)}.")
        items = cast("dict[object, object]", target)
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._check_key(key)
            items[key] = value

    def _add_items(self, target: object, values: list[object]) -> None:
        if not isinstance(target, set):
            raise RefusedError(f"the pickle adds to {_called(target)}.")
        for value in values:
            self._check_key(value)
            cast("set[object]", target).add(value)

    def _check_key(self, key: object) -> None:
        if key is not None and not isinstance(key, str | int | float | bytes):
            raise RefusedError(
                f"the pickle has {_called(key)} for a key or in a set; only numbers and texts are supported."
            )
        # Numbers with equal hashes are easy to find, and a dict of them takes quadratic time.
        if isinstance(key, int | float):
            self.number_keys += 1
            if self.number_keys > _MAX_NUMBER_KEYS:
                raise RefusedError(f"the pickle has more than {_MAX_NUMBER_KEYS:,} numbers for keys.")

    def name(self, argument: object) -> None:
        """A name: module and attribute, separated by a blank."""
        module, _, attribute = str(argument).partition(" ")
        self.stack.append(self._found(module, attribute))

    def name_on_stack(self, _: object) -> None:
        """A name: module and attribute from the stack."""
        module, attribute = self._pop_last(2)
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise RefusedError("the pickle names a class by something other than text.")
        self.stack.append(self._found(module, attribute))

    def _found(self, module: str, attribute: str) -> Name:
        if (module, attribute) == ("torch.storage", "_load_from_bytes") and self.reopen is not None:
            return Name("torch.storage._load_from_bytes", call=self._reopened)
        return find_name(module, attribute)

    def _reopened(self, args: tuple[object, ...]) -> object:
        match args:
            case (bytes(data),) if self.reopen is not None:
                return self.reopen(data)
            case _:
                raise RefusedError("a storage is made of something other than bytes.")

    def reduce(self, _: object) -> None:
        """Call a name from the table."""
        callee, args = self._pop_last(2)
        if not isinstance(callee, Name) or callee.call is None:
            raise RefusedError(f"the pickle calls {_called(callee)}, which cannot be called here.")
        if not isinstance(args, tuple):
            raise RefusedError(f"the pickle calls {_called(callee)} with something other than a tuple of arguments.")
        arguments = cast("tuple[object, ...]", args)
        self._charge(*arguments)
        self.stack.append(callee.call(arguments))

    def _charge(self, *values: object) -> None:
        # An opcode may copy more than its own length: it can pass the same stored list again and again.
        for value in values:
            match value:
                case {"state": dict() as state}:  # pyrefly: ignore[not-callable]
                    self.work += len(cast("dict[object, object]", state))
                case list() | dict() | set():
                    self.work += len(cast("list[object]", value))
                case _:
                    pass
        if self.work > _MAX_WORK:
            raise RefusedError("the pickle copies the same values over and over: it is malicious.")

    def new_object(self, _: object) -> None:
        """Make an instance of a class from the table."""
        kind, args = self._pop_last(2)
        if not isinstance(kind, Name) or kind.make is None or args != ():
            raise RefusedError(f"the pickle makes an object of {_called(kind)}, which is not supported.")
        self.stack.append(kind.make())

    def build(self, _: object) -> None:
        """Give an object its state."""
        (state,) = self._pop_last(1)
        target = self._top()
        self._charge(state)
        match target, state:
            case Node(), dict():
                target.attributes.update(attributes_of(cast("dict[object, object]", state)))
            case Array(), _:
                target.build(state)
            case dict(), dict():
                pass  # attributes beside the items, such as the version notes of a state dict
            case _:
                raise RefusedError(
                    f"the pickle sets the state of {_called(target)}, which takes none: it is malicious."
                )

    def persistent_id(self, _: object) -> None:
        """A storage outside the pickle."""
        (reference,) = self._pop_last(1)
        if self.persistent is None:
            raise RefusedError("the pickle refers to data outside itself, but there are none.")
        self.stack.append(self.persistent(reference))


_VALUES = frozenset((
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
))  # fmt: skip
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], object]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORE = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
_FETCH = ("GET", "BINGET", "LONG_BINGET")
_METHODS: dict[str, Callable[[_Machine, object], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "TUPLE": _Machine.tuple_of_marked,
    "LIST": _Machine.list_of_marked,
    "DICT": _Machine.dict_of_marked,
    "FROZENSET": _Machine.frozenset_of_marked,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}


def interpret(
    stream: ByteStream,
    *,
    reopen: Callable[[bytes], object] | None = None,
    persistent: Callable[[object], object] | None = None,
    max_opcodes: int = MAX_OPCODES,
) -> object:
    """Read one pickle from `stream`, and leave the stream after its end.

    Args:
        stream: the pickle's bytes.
        reopen: makes a storage of the bytes that `torch.storage._load_from_bytes` gets; without it, the name is refused.
        persistent: makes a storage of a persistent id; without it, such ids are refused.
        max_opcodes: how many opcodes it may have.

    Returns:
        Plain values, `Node`, `TensorView` and `Storage` objects.

    Raises:
        RefusedError: if the pickle needs anything else, is damaged or too large.
    """
    machine = _Machine(reopen, persistent)
    for count, (opcode, argument) in enumerate(_opcodes(stream)):
        if count >= max_opcodes:
            raise RefusedError(f"the pickle has more than {max_opcodes:,} opcodes, far above what a network needs.")
        machine.step(opcode, argument)
    return machine.result()


def _opcodes(stream: ByteStream) -> Iterator[tuple[str, object]]:
    # genops decodes opcodes and their arguments, and executes nothing.
    try:
        for opcode, argument, _ in pickletools.genops(cast("bytes", stream)):
            yield opcode.name, argument
    except RefusedError:
        raise
    except (ValueError, OverflowError, struct.error, IndexError) as error:
        raise RefusedError(f"it is not a complete pickle ({plain_text(str(error))}).") from error


def _called(value: object) -> str:
    match value:
        case Name():
            return plain_text(value.text)
        case Node():
            return f"an object of {plain_text(value.class_name)}"
        case _:
            return f"a {type(value).__name__}"


def _index(argument: object) -> int:
    if not isinstance(argument, int) or not 0 <= argument <= MAX_OPCODES:
        raise RefusedError("the pickle's memo has an index that no writer uses.")
    return argument


def _extend(target: object, values: list[object]) -> None:
    if not isinstance(target, list):
        raise RefusedError(f"the pickle appends to {_called(target)}.")
    cast("list[object]", target).extend(values)
