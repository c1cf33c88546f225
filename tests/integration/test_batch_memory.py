"""The predicted peak of a batch against mlx's own figure. Fifty mixes: ``benchmarks/batch_memory.py``."""

import pytest

from backends.memory.estimate import Flags, kv_cost

pytestmark = pytest.mark.slow  # loads mlx


def test_the_peak_of_a_mix_is_predicted() -> None:
    """A long prompt, short ones that come with it and while it is read or decoded, and answers of all lengths."""
    from benchmarks.batch_memory import Arrival, model, peaks  # noqa: PLC0415 - imports mlx

    made, config = model("full")
    cost = kv_cost(config, Flags(prefill_step=256, fused=False))
    assert cost is not None
    sizes = ((0, 900, 12), (0, 60, 40), (2, 80, 4), (8, 300, 30), (20, 500, 8))
    predicted, real = peaks(made, cost, [Arrival(*each) for each in sizes])
    assert predicted == pytest.approx(real, rel=0.1)
