"""JSON numbers within bounds, as grammars.

Numbers are written without an exponent and with so few digits that each is another floating-point number: a reader
that rounds cannot make one that is within the bounds one that is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from ..errors import ConfigError
from .ebnf import NOTHING, Alt, Node, Raw, Seq, literal

__all__ = ["integer", "number"]

# Decimal digits that any double keeps apart.
DIGITS = 15
# Of a number without bounds.
INTEGER = Raw('"-"? ("0" | [1-9] [0-9]{0,15})')
NUMBER = Raw('"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [+-]? [0-9]{1,2})?')
# Where only one side is bounded.
FAR = 10**15 - 1
MAX_LISTED = 512


def integer(low: Decimal | None, high: Decimal | None, *, step: int = 1) -> Node:
    """Integers from `low` to `high`, both included, and multiples of `step`.

    Raises:
        ConfigError: There are too many multiples to list.
    """
    if low is None and high is None and step == 1:
        return INTEGER
    first = -FAR if low is None else int(low.to_integral_value(rounding="ROUND_CEILING"))
    last = FAR if high is None else int(high.to_integral_value(rounding="ROUND_FLOOR"))
    if low is not None and high is None:
        last = max(last, abs(first) * 10)
    if high is not None and low is None:
        first = min(first, -abs(last) * 10)
    if step != 1:
        values = range(-(-first // step) * step, last + 1, step)
        if low is None or high is None or len(values) > MAX_LISTED:
            raise ConfigError(f"multipleOf is enforced between bounds with at most {MAX_LISTED} multiples")
        return Alt([literal(str(value)) for value in values])
    return Alt([*_negative(first, last), *(Raw(each) for _, each in _naturals(max(first, 0), last))])


def _negative(first: int, last: int) -> Iterator[Node]:
    for _, each in _naturals(max(1, -last), -first):
        yield Raw(f'"-" {each}')


def _naturals(first: int, last: int) -> Iterator[tuple[int, str]]:
    """Natural numbers of a range: for each count of digits, the count and the numbers."""
    while first <= last:
        digits = len(str(first))
        end = min(last, 10**digits - 1)
        yield digits, _between(str(first), str(end))
        first = end + 1


def _between(low: str, high: str) -> str:
    """Strings of digits of one length from `low` to `high`."""
    if not low:
        return '""'
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    first, last = low[0], high[0]
    if first == last:
        return f'"{first}" {_between(low[1:], high[1:])}'
    rest = len(low) - 1
    parts = [f'"{first}" {_between(low[1:], "9" * rest)}'] if rest else []
    parts += [f'"{last}" {_between("0" * rest, high[1:])}'] if rest else []
    begin, end = (int(first) + 1, int(last) - 1) if rest else (int(first), int(last))
    if begin <= end:
        parts.append(f"[{begin}-{end}] " + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"({' | '.join(parts)})"


def number(low: Decimal | None, high: Decimal | None, *, low_out: bool = False, high_out: bool = False) -> Node:
    """Numbers from `low` to `high`; `low_out` and `high_out` leave the bound itself out.

    Raises:
        ConfigError: A bound has too many digits.
    """
    if low is None and high is None:
        return NUMBER
    for bound in (low, high):
        if bound is not None and (len(_fixed(bound).replace(".", "").lstrip("-0")) > DIGITS or abs(bound) > FAR):
            raise ConfigError(f"the bound {bound} has more than {DIGITS} digits")
    if low is None:
        low, low_out = Decimal(-FAR), False
    if high is None:
        high, high_out = Decimal(FAR), False
    parts: list[Node] = []
    zero = Decimal(0)
    if low < zero:
        # Zero is written without a sign, so it belongs to the other half.
        near, near_out = (-high, high_out) if high < zero else (zero, True)
        parts += [Seq((Raw('"-"'), each)) for each in _positive(near, -low, near_out, low_out)]
    if high >= zero:
        near, near_out = (low, low_out) if low >= zero else (zero, False)
        parts += _positive(near, high, near_out, high_out)
    return Alt(parts) if parts else NOTHING


def _fixed(value: Decimal) -> str:
    return f"{value:f}"


def _positive(low: Decimal, high: Decimal, low_out: bool, high_out: bool) -> Iterator[Node]:
    """Decimals between two that are not negative."""
    if low > high or (low == high and (low_out or high_out)):
        return
    begin, low_rest = _split(low)
    end, high_rest = _split(high)
    if begin == end:
        yield from _with_fraction(str(begin), low_rest, high_rest, low_out, high_out)
        return
    yield from _with_fraction(str(begin), low_rest, None, low_out, False)
    yield from _with_fraction(str(end), "", high_rest, False, high_out)
    for digits, each in _naturals(begin + 1, end - 1):
        yield Raw(f'{each} ("." [0-9]{{1,{DIGITS - digits}}})?' if digits < DIGITS else each)


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, rest = _fixed(value).partition(".")
    return int(whole), rest.rstrip("0")


def _with_fraction(whole: str, low: str, high: str | None, low_out: bool, high_out: bool) -> Iterator[Node]:
    """A whole part with the fractions from `low` to `high`; None is no upper bound below the next whole number."""
    room = max(DIGITS - len(whole), len(low) + 1, len(high or "") + 1, 1)
    # Without a fraction it is the fraction 0.
    if not low and not low_out and (high != "" or not high_out):
        yield literal(whole)
    fractions = list(_fractions(low, high, low_out, high_out, room))
    if fractions:
        yield Seq((literal(whole + "."), Alt([Raw(each) for each in fractions])))


def _fractions(low: str, high: str | None, low_out: bool, high_out: bool, room: int) -> Iterator[str]:
    """Digits after the point, at least one and at most `room`, between two fractions."""
    if high is not None and not high and not low:
        # Only zeros are 0.
        if not low_out and not high_out:
            yield '"0"'
        return
    if room <= 0:
        return
    a = int(low[0]) if low else 0
    b = 9 if high is None else int(high[0]) if high else -1
    tail = f"[0-9]{{0,{room - 1}}}" if room > 1 else '""'
    for digit in range(a, b + 1):
        at_low, at_high = digit == a and (bool(low) or low_out), high is not None and digit == b
        if not at_low and not at_high:
            yield f'"{digit}" {tail}'
            continue
        rest_low, rest_high = (low[1:] if at_low else ""), ((high or "")[1:] if at_high else None)
        out_low, out_high = low_out and at_low, high_out and at_high
        # The digit alone has the fraction 0 after it.
        if not rest_low and not out_low and (rest_high != "" or not out_high):
            yield f'"{digit}"'
        for rest in _fractions(rest_low, rest_high, out_low, out_high, room - 1):
            yield f'"{digit}" {"(" + rest + ")"}'
