"""Numbers formatted for reading, the same on the page, in the figures and on the terminal."""

import math


def number(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits: ``2.31``, ``0.02``, ``5e-4``, ``12,345``."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1000:  # All digits before the decimal point, however few ``digits`` asks for.
        return f"{value:,.0f}"
    if 0 < abs(value) <= 1e-3:  # The usual notation of learning rates.
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def fixed(value: float, digits: int = 3) -> str:
    """Like ``number``, but with trailing zeros, so that numbers in a column have equal width: ``2.30``, ``10.0``."""
    if not math.isfinite(value) or abs(value) >= 1000 or abs(value) <= 1e-3:
        return number(value, digits)
    return f"{value:#.{digits}g}".removesuffix(".")


def count(value: float) -> str:
    """An abbreviated count: ``840``, ``1.5k``, ``151M``, ``12.8B``."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,600 is 1M rather than 1,000k: the unit is chosen after rounding to three digits.
        if 0.9995 * unit <= abs(value) < 0.9995e12:
            return f"{value / unit:.3g}{suffix}"
    return number(value)


def percent(fraction: float) -> str:
    """A fraction as a percentage: ``63.2%``."""
    return f"{100 * fraction:.1f}%" if math.isfinite(fraction) else str(float(fraction))


def flops(value: float) -> str:
    """A number of floating-point operations: ``3.2 EFLOP``."""
    for unit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{number(value / unit)} {prefix}FLOP"
    return f"{number(value)} FLOP"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, ``0:02:41``; for a day or more, ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour} h" if days else f"{hour}:{minute:02}:{second:02}"
