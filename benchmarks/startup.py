"""Compile time and memory of the 0.5B shape, and seconds from process start to the first token.

    python benchmarks/startup.py WORKDIR [--rounds 5]

Compiles in bf16 with verification and without the cache, watching the memory of the whole process
tree. Then, with the page cache warm and every digest checked (`--verify full`), times
`infc generate` with a prompt of 32 tokens from its start to its first output, and `infc serve` to
the first token of a streamed completion.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from models import artifact_of, make_checkpoint

PROMPT = ",".join(str(300 + 7 * i) for i in range(32))


def infc(*words: str) -> list[str]:
    """The command line of infc."""
    return [sys.executable, "-m", "infc", *words]


def tree_rss_bytes(root: int) -> int:
    """Proportional memory (PSS) of a process and its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    total = 0
    for pid in family:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    return total * 1024


def measure_compile(checkpoint: Path) -> dict[str, float]:
    """Wall seconds and peak memory of one compilation."""
    recipe = checkpoint / "model.yaml"
    start = time.perf_counter()
    process = subprocess.Popen(
        infc("compile", str(recipe), "-o", str(artifact_of(checkpoint)), "--no-cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_rss_bytes(process.pid))
        time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(f"infc compile failed with status {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_gb": peak / 1e9}


def first_output_of_generate(artifact: Path) -> float:
    """Seconds from the start of `infc generate` to its first byte of output."""
    start = time.perf_counter()
    process = subprocess.Popen(
        infc("generate", str(artifact), "--token-ids", PROMPT, "--max-tokens=4", "--verify=full"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.communicate()
    return seconds


def first_token_of_serve(artifact: Path) -> float:
    """Seconds from the start of `infc serve` to the first streamed token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    body = {"model": "m", "prompt": [int(t) for t in PROMPT.split(",")], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    process = subprocess.Popen(
        infc("serve", str(artifact), f"--port={port}", "--verify=full", "--model-name=m"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    answer.readline()
                    return time.perf_counter() - start
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None or time.perf_counter() - start > 60:
                    raise
                time.sleep(0.005)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=["0.5b", "1b"], default="0.5b")
    parser.add_argument("--keep-artifact", action="store_true", help="do not compile again")
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.shape, options.workdir)
    artifact = artifact_of(checkpoint)
    result: dict[str, object] = {"shape": options.shape, "cpus": os.cpu_count()}
    if not options.keep_artifact:
        result["compile"] = {k: round(v, 2) for k, v in measure_compile(checkpoint).items()}
    first_output_of_generate(artifact)  # the page cache
    generate = [first_output_of_generate(artifact) for _ in range(options.rounds)]
    serve = [first_token_of_serve(artifact) for _ in range(options.rounds)]
    for name, values in (("generate_first_output_s", generate), ("serve_first_token_s", serve)):
        result[name] = {
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
        }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
