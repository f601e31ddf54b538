"""Workers that are scripts: real processes that speak the protocol without a model."""

import sys
from pathlib import Path

from benchmarks.peers.client import Worker

# Spins in a second thread whatever happens, as idle teams of some libraries do.
SPINNING = """
import itertools, json, sys, threading
def spin():
    while True: pass
threading.Thread(target=spin, daemon=True).start()
print(json.dumps({"version": "1"}), flush=True)
for line in itertools.islice(sys.stdin, LIMIT):
    reply = {"first": 0.5, "seconds": 1.0, "tokens": 4, "peak_rss_bytes": 7}
    print(json.dumps(reply), flush=True)
"""


def spinning(log: Path, answers: int | None = None) -> Worker:
    """A worker that spins, and ends after so many answers."""
    return script(SPINNING.replace("LIMIT", str(answers)), log)


def script(text: str, log: Path, timeout_seconds: float = 30.0) -> Worker:
    """A worker that runs the text."""
    return Worker([sys.executable, "-c", text], {}, log, timeout_seconds=timeout_seconds)
