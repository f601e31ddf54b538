"""Decode and prefill of the 0.5B shape beside eager transformers, interleaved, with the ceiling.

    python benchmarks/decode_vs_transformers.py WORKDIR [--rounds 5] [--schemes none,int8]

Each round measures, in turn: read bandwidth, infc under each scheme, transformers in bfloat16.
Ratios to transformers are taken pair by pair.
Weights are random (speed does not depend on them); both sides get token ids and ignore EOS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from models import artifact_of, make_checkpoint
from transformers import AutoModelForCausalLM

import infc
from infc.codegen.cpp.ceilings import build_probe
from infc.ir.targets import resolve_target

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 32, 64, 512


def tokens(count: int, seed: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, 30_000, (count,), generator=generator).tolist()


class Infc:
    """The artifact of the checkpoint, through the public face."""

    def __init__(self, checkpoint: Path, threads: int, scheme: str) -> None:
        artifact = infc.compile(
            checkpoint / "model.yaml",
            output=artifact_of(checkpoint, scheme),
            overrides={"quantization": scheme},
        )
        self.weight_bytes = artifact.weights_path.stat().st_size
        self.llm = infc.LLM(artifact, threads=threads, prefix_reuse=False)
        self.llm.engine.work_ahead()

    def run(self, ids: list[int], new: int) -> tuple[float, float]:
        """Seconds to the first token, and to the last."""
        params = infc.SamplingParams(max_tokens=new, ignore_eos=True)
        start, first = time.perf_counter(), 0.0
        for part in self.llm.stream(ids, params):
            if not first and part.outputs[0].token_ids:
                first = time.perf_counter() - start
        return first, time.perf_counter() - start


class Eager:
    """transformers with its defaults: bfloat16, sdpa attention, a dynamic cache."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(self, ids: list[int], new: int) -> tuple[float, float]:
        """Seconds to the first token, and to the last."""
        start = time.perf_counter()
        out = self.model(torch.tensor([ids]), use_cache=True)
        first = time.perf_counter() - start
        for _ in range(new - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        out.logits[:, -1].argmax(-1)
        return first, time.perf_counter() - start


def measure(side: Infc | Eager, round_: int) -> dict[str, float]:
    """Decode tokens/s (batch 1) and prefill tokens/s of one round."""
    first, total = side.run(tokens(PROMPT_TOKENS, round_), NEW_TOKENS)
    prefill, _ = side.run(tokens(PREFILL_TOKENS, 100 + round_), 1)
    return {
        "decode_tps": (NEW_TOKENS - 1) / (total - first),
        "prefill_tps": PREFILL_TOKENS / prefill,
        "ttft_ms": first * 1e3,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
    }


def main() -> None:
    """Run the rounds; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", default="none,int8", help="of `quantization`, by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shape", choices=["0.5b", "1b"], default="0.5b")
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.shape, options.workdir)
    schemes = options.schemes.split(",")
    ours = {f"infc {one}": Infc(checkpoint, options.threads, one) for one in schemes}
    sides: dict[str, Infc | Eager] = {**ours, "transformers": Eager(checkpoint, options.threads)}
    probe = build_probe(resolve_target("native"))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    bandwidth = []
    for side in sides.values():
        measure(side, 999)  # warm-up
    for round_ in range(options.rounds):
        bandwidth.append(probe.read_rate(options.threads, 1 << 29) / 1e9)
        for name, side in sides.items():
            rows[name].append(measure(side, round_))
    result: dict[str, Any] = {
        "shape": options.shape,
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "read_gb_per_s": spread(bandwidth),
    }
    for key in ("decode_tps", "prefill_tps", "ttft_ms"):
        for name, measured in rows.items():
            result[f"{name}.{key}"] = spread([m[key] for m in measured])
        for name in ours:
            pairs = zip(rows[name], rows["transformers"], strict=True)
            result[f"{name}.{key}.ratio"] = spread([a[key] / b[key] for a, b in pairs])
    for name, side in ours.items():
        share = [
            m["decode_tps"] * side.weight_bytes / 1e9 / b
            for m, b in zip(rows[name], bandwidth, strict=True)
        ]
        result[f"{name}.decode_share_of_bandwidth"] = spread(share)
    for key, value in result.items():
        print(f"{key:42} {value}")
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
