"""What schemes of fewer bits cost on the bundled model: bits a weight, perplexity, divergence.

    python benchmarks/quantization.py [--max-bytes 60000]

Weights are trained, so that the figures mean something; each build is compared with bfloat16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import infc
from infc.driver.evaluate import compare_on_text, evaluate_text
from infc.ir.analyses import num_weights
from infc.ir.program import WeightRef

RECIPES = Path(__file__).parent.parent / "recipes/tiny"
BUILDS: dict[str, dict[str, object]] = {
    "bfloat16": {},
    "bfloat16, int8 cache": {"kv_cache.dtype": "int8"},
    "int8": {"quantization": "int8"},
    "int8, head left": {"quantization": {"scheme": "int8", "head": False}},
    "int4": {"quantization": "int4"},
    "int4, int8 cache": {"quantization": "int4", "kv_cache.dtype": "int8"},
    "int8, int8 cache": {"quantization": "int8", "kv_cache.dtype": "int8"},
}


def bits_per_weight(artifact: infc.Artifact) -> float:
    """Of what the matrix products read: stored bits over the elements of the matrices."""
    from infc.ir.text import parse_program

    program = parse_program((artifact.path / "program.ir").read_text())
    bits = elements = 0
    for node in program.nodes:
        if node.op not in ("linear", "scaled_linear", "decoded_linear"):
            continue
        for place, ref in enumerate(node.inputs):
            if isinstance(ref, WeightRef):
                kind = program.weights[ref.name].type
                bits += 8 * kind.num_bytes()
                elements += num_weights(program, node, place) if kind.rank == 2 else 0
    return bits / elements


def main() -> None:
    """Build each, evaluate each on the held-out file, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-bytes", type=int, default=60_000)
    options = parser.parse_args()
    data = (RECIPES / "heldout.py.txt").read_bytes()[: options.max_bytes]
    text = data.decode(errors="ignore")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        built = {
            name: infc.compile(
                RECIPES / "model.yaml", Path(directory) / str(place), overrides=overrides
            )
            for place, (name, overrides) in enumerate(BUILDS.items())
        }
        for name, artifact in built.items():
            result = evaluate_text(artifact, text)
            distance = compare_on_text(artifact, built["bfloat16"], text).divergence
            row = {
                "build": name,
                "bits_per_weight": round(bits_per_weight(artifact), 2),
                "kv_bytes_per_token": sum(
                    group.bytes_per_block() // group.block_size
                    for group in artifact.manifest.main.resources
                ),
                "perplexity": round(result.perplexity, 4),
                "kl_mean": round(distance.kl_mean, 6),
                "kl_p99": round(distance.kl_p99, 6),
                "same_top": round(distance.same_top, 4),
            }
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    print("RESULT " + json.dumps({"tokens": result.num_predicted, "builds": rows}))


if __name__ == "__main__":
    main()
