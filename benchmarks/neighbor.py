"""How long a stream and `/health` wait while a server is sent its most expensive requests.

    python -m benchmarks.neighbor [--copies 1,20] [--rounds 1]

The requests are those of `tests/runtime/server/test_event_loop.py`, the model one whose steps take
20 ms. Each is sent by a process of its own, alone and several at once. Printed for each: the most
CPU time that the event loop spent at a stretch, the longest gap between two tokens of the stream,
the longest time that `/health` took, and resident memory compared with the start.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.runtime.server.test_event_loop import ENOUGH, ROOT, TOO_MUCH, Watched, watching

SENDER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.runtime.server.test_event_loop import send

url, path, copies = sys.argv[1:]
requests = [Path(path).read_bytes()] * int(copies)
with ThreadPoolExecutor(len(requests)) as pool:
    print(*{status.decode() for status in pool.map(send, [url] * len(requests), requests)})
"""


def main() -> None:
    """Send every request so often at once, and print what the others noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", default="1,20", help="comma separated")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    print(
        "| request | at once | status | stretch, ms | gap (median), ms | /health, ms | memory, MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with watching() as server:
        # A full collection of what is imported here takes 100 ms, in which nothing is read.
        gc.collect()
        gc.freeze()
        for _ in range(options.rounds):
            for copies in map(int, options.copies.split(",")):
                for name, make in {**TOO_MUCH, **ENOUGH}.items():
                    print(measure(server, name, make(), copies), flush=True)


def measure(server: Watched, name: str, request: bytes, copies: int) -> str:
    """One line of the table."""
    server.report()
    server.gaps.clear()
    server.health.clear()
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(request)
        command = [sys.executable, "-c", SENDER, server.url, file.name, str(copies)]
        sent = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    server.wait_for_tokens()
    gaps = f"{1e3 * max(server.gaps):.0f} ({1e3 * statistics.median(server.gaps):.0f})"
    health = max(server.health, default=0.0)
    said = server.report()
    memory = (said["resident_bytes"] - server.resident_bytes) / 1e6
    status = sent.stdout.strip().removeprefix("HTTP/1.1 ")
    cells = [name, str(copies), status, f"{1e3 * said['stretch_seconds']:.1f}"]
    return f"| {' | '.join([*cells, gaps, f'{1e3 * health:.0f}', f'{memory:+.0f}'])} |"


if __name__ == "__main__":
    main()
