"""A target under atheris, guided by coverage, from real streams and bodies on.

    uv run python tests/fuzz/run_atheris.py stream|intake FOLDER [-max_total_time=300] [any option of libFuzzer]

FOLDER keeps the corpus. Exits with 0 when nothing was found; else the input that was is in the current folder.
"""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere
with atheris.instrument_imports(include=["gateway"]):
    from tests.fuzz import targets


def main(target: str, folder: str, *options: str) -> None:
    corpus = Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = targets.STREAMS if target == "stream" else targets.BODIES
    head = b"\0\x40\x80\xc0" if target == "stream" else b"\0"
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(head + seed)
    check = targets.stream if target == "stream" else targets.parsed
    atheris.Setup([sys.argv[0], *options, "-timeout=10", "-max_len=4096", str(corpus)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
