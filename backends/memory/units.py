"""Human-readable amounts. Pure."""


def memory(count: int, digits: int = 1) -> str:
    """``count``: bytes."""
    return f"{count / 2**30:.{digits}f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def is_size(value: object, most: int | None) -> bool:
    """Whether what was read from a file is a number of bytes. ``most``: None = no limit."""
    return type(value) is int and 0 < value <= (most or value)
