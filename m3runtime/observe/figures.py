"""Numbers as people read them."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def show_size(size: float) -> str:
    """A size in bytes with three significant digits. Units are powers of 1024, which the paper calls PB and TB."""
    power = 0
    while float(f"{size:.3g}") >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{short(size)} {_UNITS[power]}"


def short(number: float) -> str:
    """A number with three significant digits."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"
