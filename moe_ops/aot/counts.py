"""Integers that depend on the number of tokens, written down as they are computed.

    >>> trace = Trace(64)
    >>> blocks = (trace.tokens * 8 + 127) // 128
    >>> blocks.text, blocks.at(100)
    ('M 8 * 127 + 128 /', 7)

A condition on such a number has to go one way. It goes the way of the trace's own number of tokens, and the trace notes
that what was computed is right only where it would have gone so:

    >>> min(blocks, 5).text, trace.holds(64), trace.holds(100)
    ('M 8 * 127 + 128 /', True, False)
"""

import operator
from collections.abc import Callable

import torch

Number = int | float


class Trace:
    """A computation at one number of tokens, that may hold for others.

    Args:
        num_tokens: M where conditions are decided.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._decided: list[Callable[[int], bool]] = []

    @property
    def tokens(self) -> "Count":
        """M."""
        return Count(self, lambda num_tokens: num_tokens, "M")

    def decide(self, at: Callable[[int], object]):
        """The value of `at` here; for another number of tokens the trace holds only where it is the same."""
        value = at(self.num_tokens)
        self._decided.append(lambda num_tokens: at(num_tokens) == value)
        return value

    def holds(self, num_tokens: int) -> bool:
        """Whether every condition would have gone the same way for another number of tokens."""
        return all(same(num_tokens) for same in self._decided)


class Count:
    """A number that depends on the number of tokens.

    Args:
        trace: what it is part of.
        at: number of tokens -> value.
        text: the same in reverse Polish notation of M, integers, + - * / (rounding down) % and min; None for what only
            conditions may use.
    """

    __slots__ = ("_text", "at", "trace")

    def __init__(self, trace: Trace, at: Callable[[int], Number], text: str | None) -> None:
        self.trace, self.at, self._text = trace, at, text

    @property
    def text(self) -> str:
        """The number in reverse Polish notation."""
        if self._text is None:
            raise ValueError("a launch depends on the number of tokens by more than + - * // % and min")
        return self._text

    def _compute(self, function: Callable, symbol: str | None, left, right) -> "Count":
        if not all(isinstance(operand, Count | int | float) for operand in (left, right)):
            return NotImplemented
        text = None
        if symbol is not None and all(isinstance(operand, int) or operand._text for operand in (left, right)):
            text = f"{as_text(left)} {as_text(right)} {symbol}"
        return Count(self.trace, lambda m: function(_at(left, m), _at(right, m)), text)

    def _compare(self, function: Callable, other) -> bool:
        if not isinstance(other, Count | int | float):
            return NotImplemented
        return self.trace.decide(lambda m: function(self.at(m), _at(other, m)))

    def __add__(self, other):
        return self._compute(operator.add, "+", self, other)

    def __radd__(self, other):
        return self._compute(operator.add, "+", other, self)

    def __sub__(self, other):
        return self._compute(operator.sub, "-", self, other)

    def __rsub__(self, other):
        return self._compute(operator.sub, "-", other, self)

    def __mul__(self, other):
        return self if isinstance(other, int) and other == 1 else self._compute(operator.mul, "*", self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other):
        return self._compute(operator.floordiv, "/", self, other)

    def __mod__(self, other):
        return self._compute(operator.mod, "%", self, other)

    def __neg__(self):
        return self._compute(operator.sub, "-", 0, self)

    def __truediv__(self, other):
        return self._compute(operator.truediv, None, self, other)

    def __rtruediv__(self, other):
        return self._compute(operator.truediv, None, other, self)

    def __rpow__(self, other):
        return self._compute(operator.pow, None, other, self)

    def __or__(self, other):
        return self._compute(operator.or_, None, self, other)

    def __rshift__(self, other):
        return self._compute(operator.rshift, None, self, other)

    def __lt__(self, other):
        return self._compare(operator.lt, other)

    def __le__(self, other):
        return self._compare(operator.le, other)

    def __gt__(self, other):
        return self._compare(operator.gt, other)

    def __ge__(self, other):
        return self._compare(operator.ge, other)

    def __eq__(self, other):
        return self._compare(operator.eq, other)

    def __ne__(self, other):
        return self._compare(operator.ne, other)

    def __hash__(self) -> int:
        return hash((id(self.trace), self._text))

    def __bool__(self) -> bool:
        return self.trace.decide(lambda m: bool(self.at(m)))

    def __index__(self) -> int:
        return self.trace.decide(self.at)

    __int__ = __index__

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """`torch.sym_min`, the one function of torch's that sizes are computed with: a number, and no condition."""
        if function is not torch.sym_min:
            return NotImplemented
        count = next(arg for arg in args if isinstance(arg, Count))
        return count._compute(min, "min", *args)


def _at(value: Count | Number, num_tokens: int) -> Number:
    return value.at(num_tokens) if isinstance(value, Count) else value


def as_text(value: Count | int) -> str:
    """A number as a table has it."""
    return value.text if isinstance(value, Count) else str(value)
