"""Which program serves a model at a replica's address. Pure: no I/O, no clock."""

from enum import StrEnum


class Engine(StrEnum):
    """Public: ``/api/status`` shows the values."""

    MLX_LM = "mlx_lm.server"  # its quirks apply: error texts, names of models, bounds of fields
    OTHER = "other"  # also: not recognised yet
