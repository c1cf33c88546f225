"""One long prompt beside people who ask short things, on two replicas: ``uv run python -m benchmarks.apart``.

The control is the same load straight to two raw servers, the long prompt to one and the people to the other: so nobody
shares a batch, and both share the two processors as they do behind the gateway. Prints seconds to the first token, and
whether the gateway keeps within 1.15 times the control: the long prompt, the short requests' median and their worst.
"""

import asyncio

from benchmarks import real
from benchmarks.long_prompt import CROWDS, Figures, Load

EVERY = 0.5  # seconds from one question of a person to the next
BOUND = 1.15  # times the control


async def measured(control: tuple[str, str], gateway: str, rounds: int) -> dict[str, Figures]:
    """``control``: URLs of two raw servers."""
    async with real.client() as http:
        loads = {
            "control": Load(http, control[0], "default_model", "c", short_url=control[1], every=EVERY),
            "gateway": Load(http, gateway, "tiny", "g", every=EVERY),
        }
        warm_up = [Load(http, url, name, "w") for url, name in ((control[1], "default_model"), (gateway, "tiny"))]
        for load in (*loads.values(), *warm_up):
            await load.long()  # what the first prompt of a process pays, and the rate that the gateway learns
        for turn in range(rounds):
            for people in CROWDS:
                for load in list(loads.values())[:: 1 if turn % 2 else -1]:
                    await load.beside(people)
    return {name: load.figures for name, load in loads.items()}


def report(figures: dict[str, Figures]) -> list[str]:
    control, ours = figures["control"], figures["gateway"]
    lines = []
    for people in CROWDS:
        pairs = {
            "long": (control.long[people], ours.long[people]),
            "short": (control.short[people], ours.short[people]),
        }
        ratios = {name: real.median(mine) / real.median(theirs) for name, (theirs, mine) in pairs.items()}
        ratios["worst short"] = max(ours.short[people]) / max(control.short[people])
        for name, each in pairs.items():
            told = [f"{real.median(one):.3f} s (worst {max(one):.3f}, {len(one)} requests)" for one in each]
            lines.append(f"{people:2d} people, {name}: control {told[0]}, gateway {told[1]}")
        shown = ", ".join(f"{name} {ratio:.2f} x" for name, ratio in ratios.items())
        lines.append(f"   {shown}: {'within bounds' if max(ratios.values()) <= BOUND else 'OUT OF BOUNDS'}")
    return lines + [f"{name} lost: {why}" for name, one in figures.items() for why in one.lost]


def main() -> None:
    args = real.arguments(__doc__)
    with real.scratch() as folder:
        path = args.model or real.model(folder)
        config = f"models: {{tiny: {{model: {path}, resume: 'off', max_inflight: 16, replicas: 2}}}}"
        with real.raw(path, folder) as a, real.raw(path, folder) as b, real.gateway(config, folder) as gateway:
            print("\n".join(report(asyncio.run(measured((a.url, b.url), gateway.url, args.rounds)))))


if __name__ == "__main__":
    main()
