"""Seconds from the begin of a process until a model has computed its first steps."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from .setting import Results, Setting
from .steps import Workload

_READ_BYTES = 16 << 20


def measure_starting(setting: Setting, workloads: Sequence[Workload]) -> Results:
    """For each artifact, the second of two starts: files are in the page cache by then.

    Weights are zeros here, which takes as long as any others.
    """
    found: Results = {}
    for workload in workloads:
        artifact = workload.artifact(setting)
        weights = artifact.path / artifact.manifest.main.weights.file
        with open(weights, "rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass
        for _ in range(2):
            begun = time.perf_counter()
            child = setting.run_child("child", str(artifact.path), "--shape", "1x40")
            seconds = time.perf_counter() - begun
            if child.returncode:
                raise RuntimeError(child.stdout[-400:])
        line = child.stdout.rpartition("CHILD ")[2]
        found[f"{workload.shape}-{workload.scheme}"] = {
            "seconds": round(seconds, 2),
            "GB": round(weights.stat().st_size / 1e9, 2),
            **json.loads(line),
        }
    return {"ready": found}
