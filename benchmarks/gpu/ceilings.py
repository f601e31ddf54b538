"""What this GPU does at best: bytes copied, and products in bfloat16, as torch has them."""

from __future__ import annotations

import time

import torch

from .setting import Results, Setting

_COPIED_BYTES = 2 << 30
_SIDE = 8192
_ROUNDS = 5


def measure_ceilings(setting: Setting) -> Results:
    """Bytes a second of a copy (read and written), and operations a second in bfloat16."""
    device = setting.driver.device
    found: Results = {
        "device": device.name,
        "capability": list(device.capability),
        "driver": list(device.driver_version),
        "memory GB": round(device.memory_bytes / 1e9, 1),
        "torch": torch.__version__,
    }
    if setting.emulated is not None:
        return {**found, "read": 1e12, "bf16": 1e14}
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda").random_(256)
    target = torch.empty_like(source)
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied = _seconds(lambda: target.copy_(source))
    multiplied = _seconds(lambda: a @ b)
    return {**found, "read": 2 * _COPIED_BYTES / copied, "bf16": 2 * _SIDE**3 / multiplied}


def _seconds(work: object) -> float:
    """The least of some rounds, each of several calls in a row."""
    assert callable(work)
    best = float("inf")
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):
            work()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / 10)
    return best
