"""A pickle read as plain data: nothing that it names is imported, called or given a state."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any

# What Python writes for data, in protocol 2 and later. Every other operation (persistent identifiers, the
# extension registry, text integers that take quadratic time, out-of-band buffers) is refused.
_KNOWN = frozenset(
    """PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET""".split()  # noqa: SIM905
)
_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes if opcode.name in _KNOWN}
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": lambda: Pairs(),
    "EMPTY_SET": lambda: Items(),
}
_MARK = object()


class Pairs(list[tuple[Any, Any]]):
    """A mapping as its pairs of key and value: nothing is hashed, so that any key will do."""


class Items(list[Any]):
    """A set as its items."""


class Named:
    """The name of a class or function, ``module.name``, that Python would have imported."""

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What Python would have made: by calling ``kind`` with ``arguments``, and by setting ``state``."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None


def read_pickle(content: bytes, check_name: Callable[[str, str], None]) -> Any:
    """Return what a pickle holds, as numbers, strings, lists, tuples and this module's own classes.

    Args:
        content: the pickle.
        check_name: raises a ValueError for a module and a name in it that the pickle may not name.

    Raises:
        ValueError: it is malformed, names what it may not, or holds what data has no need of.

    >>> import pickle
    >>> read_pickle(pickle.dumps([1, ("a", None)]), lambda module, name: None)
    [1, ('a', None)]
    >>> read_pickle(pickle.dumps(print), lambda module, name: None).name
    'builtins.print'
    """
    try:
        return _Reader(content, check_name).read()
    except (IndexError, KeyError, OverflowError, AssertionError, MemoryError) as error:
        raise ValueError(f"it is malformed ({type(error).__name__})") from error


class _Reader:
    """The stack machine for which a pickle is a program; its stack holds data alone."""

    def __init__(self, content: bytes, check_name: Callable[[str, str], None]) -> None:
        self._stream, self._check_name = io.BytesIO(content), check_name
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        while True:
            code = self._stream.read(1)
            opcode = _OPCODES.get(code)
            if opcode is None:
                what = f"has the operation {code!r}, which data has no need of" if code else "is cut off"
                raise ValueError(f"it {what}")
            argument = None
            if opcode.name == "GLOBAL":
                argument = [self._line(), self._line()]
            elif opcode.arg:
                argument = opcode.arg.reader(self._stream)
            if opcode.name == "STOP":
                if len(self._stack) != 1:
                    raise ValueError(f"it ends with {len(self._stack)} objects instead of one")
                return self._stack[0]
            self._do(opcode.name, argument)

    def _line(self) -> str:
        return self._stream.readline().decode().removesuffix("\n")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name.startswith(("BININT", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BIN", "BINBYTES")):
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("POP", "POP_MARK"):
            stack.pop() if name == "POP" else self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name.startswith("TUPLE") or name == "FROZENSET":
            items = self._last(int(name[-1])) if name[-1].isdigit() else self._marked()
            stack.append(Items(items) if name == "FROZENSET" else tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._last(1) if name == "APPEND" else self._marked()
            self._top(list).extend(items)
        elif name == "ADDITEMS":
            items = self._marked()
            self._top(Items).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._last(2) if name == "SETITEM" else self._marked()
            if len(items) % 2:
                raise ValueError("it has a key without a value")
            self._top(Pairs).extend(zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(*(argument or self._last(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            named, arguments = self._last(2)
            if type(named) is not Named or type(arguments) is not tuple:
                raise ValueError("it calls what is no name, or with what are no arguments")
            ordered = named.name == "collections.OrderedDict" and not arguments
            stack.append(Pairs() if ordered else Made(named.name, arguments))
        elif name == "BUILD":
            (state,) = self._last(1)
            made = self._top(Made)
            if made.state is not None:
                raise ValueError(f"it gives {made.kind} a state twice")
            made.state = state

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("it names something that is no name")
        self._check_name(module, name)
        self._stack.append(Named(f"{module}.{name}"))

    def _top(self, kind: type) -> Any:
        """Return the object on top of the stack, which has to be exactly of this kind."""
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"it changes {type(self._stack[-1]).__name__} as if it were {kind.__name__}")
        return self._stack[-1]

    def _last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("it takes more than it has put down")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _marked(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("it takes more than it has put down")
        taken = self._stack[at + 1 :]
        del self._stack[at:]
        return taken
