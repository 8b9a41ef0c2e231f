"""The checks of `tests/fuzz_differential.py`, guided by coverage; needs atheris (Linux, `pip install atheris`).

    python -m tests.fuzz_atheris http corpus-folder -max_total_time=600

The first argument is the target, `http`, `handshake`, `chunked` or `frames`; the rest is libFuzzer's. A finding ends
the run, and libFuzzer leaves its bytes in a file. Byte 0 of an input chooses the cuts: a file makes its case again.
"""

from __future__ import annotations

import random
import signal
import sys

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["apphost.protocols"]):
    from tests import fuzz_differential as fuzz

from tests.corpus import cut


def main() -> None:
    target = next(kind for kind in fuzz.TARGETS if kind.name == sys.argv[1])(fuzz.Maker())
    signal.signal(signal.SIGVTALRM, fuzz.out_of_time)

    def check(given: bytes) -> None:
        data = given[1:]
        if not data:
            return
        seed = given[0]
        finding = fuzz.guarded(lambda: target.check(data, cut([data], seed)[0], random.Random(seed)), target.name)
        if finding is not None:
            finding.data, finding.where = data, f"cuts {seed}"
            fuzz.show(finding)
            raise SystemExit(1)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
