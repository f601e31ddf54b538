"""A server in a process of its own that says how long its event loop works at a stretch.

It is measured in processor time of the loop's thread, so that other work on the machine is not
in it. `python -m tests.runtime.server.watched` prints the address; each line that it then reads
is answered by a line of JSON: the longest stretch since the last one, and the memory in use.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from infc.runtime.log import ServerLog
from infc.runtime.server.interpreter import short_waits

from .serving import serving

MAX_CONTEXT = 4096

_longest: dict[str, Any] = {"stretch_seconds": 0.0, "what": ""}
_run = asyncio.Handle._run


def _watched_run(handle: asyncio.Handle) -> None:
    begun = time.thread_time()
    what = repr(getattr(handle, "_callback", handle))[:300]
    _run(handle)
    spent = time.thread_time() - begun
    if spent > _longest["stretch_seconds"]:
        _longest.update(stretch_seconds=spent, what=what)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    """Serves until its input ends."""
    asyncio.Handle._run = _watched_run  # type: ignore[method-assign,assignment]
    ServerLog().take_over()
    with serving(max_context=MAX_CONTEXT, num_blocks=1200) as server, short_waits():
        server.model.delay_seconds = 0.02
        print(server.url, flush=True)
        for _ in sys.stdin:
            gc.collect()
            print(json.dumps({**_longest, "resident_bytes": _resident_bytes()}), flush=True)
            _longest.update(stretch_seconds=0.0, what="")


if __name__ == "__main__":
    main()
