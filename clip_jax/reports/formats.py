"""Numbers as people read them, the same on the page, in the figures and on the terminal."""

import math


def number(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits: ``2.31``, ``0.02``, ``5e-4``, ``12,345``."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1000:  # Never fewer digits before the point than there are.
        return f"{value:,.0f}"
    if 0 < abs(value) <= 1e-3:  # As learning rates are written.
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def fixed(value: float, digits: int = 3) -> str:
    """As ``number``, with trailing zeros kept, so that a column of losses does not dance: ``2.30``, ``10.0``."""
    if not math.isfinite(value) or abs(value) >= 1000 or abs(value) <= 1e-3:
        return number(value, digits)
    return f"{value:#.{digits}g}".removesuffix(".")


def count(value: float) -> str:
    """A count at a glance: ``840``, ``1.5k``, ``151M``, ``12.8B``; from a thousand billion on, ``3.2e12``."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,600 is 1M rather than 1,000k: the unit is chosen after rounding to three digits.
        if 0.9995 * unit <= abs(value) < 0.9995e12:
            return f"{value / unit:.3g}{suffix}"
    return number(value)


def percent(share: float) -> str:
    """A share of one: ``63.2%``."""
    return f"{100 * share:.1f}%" if math.isfinite(share) else str(float(share))


def flops(value: float) -> str:
    """``3.2 EFLOP``."""
    for unit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= unit:
            return f"{number(value / unit)} {prefix}FLOP"
    return f"{number(value)} FLOP"


def duration(seconds: float) -> str:
    """``0:02:41``, and from a day on ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour} h" if days else f"{hour}:{minute:02}:{second:02}"
