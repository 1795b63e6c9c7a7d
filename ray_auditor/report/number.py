"""Numbers as text, in one form on the page and on the terminal; what is undetermined is said, never zero."""

UNDETERMINED = "n.d."
MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"  # not undetermined: there is nothing to determine


def signed(value: float | None, digits: int = 1) -> str:
    """`+9.2`, `−0.4`, `0.0`; thousands without decimals; `n.d.` for None."""
    if value is None:
        return UNDETERMINED
    if abs(value) >= 1e6:
        text = f"{value:+.1e}"
    else:
        text = f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.{digits}f}"
    if not text.strip("+-0.,"):
        text = text[1:]
    return text.replace("-", MINUS)


def percent(rate: float | None) -> str:
    """A rate of 0.413 as `+41.3%`; `n.d.` for None."""
    return UNDETERMINED if rate is None else f"{signed(100 * rate)}%"


def percent_interval(low: float | None, high: float | None) -> str:
    """An interval of rates as `[+33.1%, +49.9%]`; `n.d.` when either end is None."""
    return UNDETERMINED if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def decimal(value: float | None, digits: int = 2) -> str:
    """A non-negative quantity such as a shift per token; `n.d.` for None."""
    return UNDETERMINED if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def probability(value: float | None) -> str:
    """A p- or q-value with two significant digits, `0.028`; `n.d.` for None."""
    return UNDETERMINED if value is None else f"{value:#.2g}"


def significant(value: float | None) -> str:
    """A non-negative quantity of any size with three significant digits; `n.d.` for None."""
    return UNDETERMINED if value is None else f"{value:#.3g}".rstrip(".")
