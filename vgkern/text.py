"""How numbers are written in tables, figures, sentences and JSON."""

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["figures", "first_epochs", "jsonable", "percent", "some"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figures(value: float) -> str:
    """Two significant digits: 0, 0.022, 4.3, 140, and with a power of ten 1.2·10⁻³⁵; a dash for NaN.

    Example:
        >>> [figures(value) for value in (0.0, 0.0216, 4.0, 137.0, 5.21e34)]
        ['0', '0.022', '4', '140', '5.2·10³⁴']
    """
    if math.isnan(value):
        return "–"
    if value == 0 or 1e-3 <= value < 9950 or math.isinf(value):
        return f"{float(f'{value:.2g}'):g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def some(names: Sequence[str], shown: int = 4) -> str:
    """a, b, c, d and 3 more."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def first_epochs(count: int) -> str:
    """the first epoch, the first 5 epochs."""
    return "the first epoch" if count == 1 else f"the first {count} epochs"


def percent(share: float) -> str:
    """97.6 %, unbreakable."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def jsonable(value: Any) -> Any:
    """``value`` as JSON knows it: infinity and NaN become None, tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
