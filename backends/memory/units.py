"""Human-readable amounts. Pure."""


def memory(count: int, digits: int = 1) -> str:
    """``count``: bytes."""
    return f"{count / 2**30:.{digits}f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
