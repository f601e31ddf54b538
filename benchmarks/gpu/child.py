"""A few steps of an artifact in a process of its own: for tools, and for the time to begin.

python -m benchmarks.gpu.child ARTIFACT [--eager] [--shape 1x512] [--prompt 40] [--steps 4]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from .setting import new_driver, without_installation


def main() -> None:
    """Open it, compute a prompt and decode; one line of JSON says how long each took."""
    begun = time.perf_counter()
    options = parse()
    without_installation(options.artifact.parent / "cache")
    from infc.ir.artifact import open_artifact
    from infc.runtime.executors.base import ExecutorConfig
    from infc.runtime.executors.gpu.executor import GpuExecutor

    from .stepping import decode, most_blocks, prompt

    imported = time.perf_counter()
    artifact = open_artifact(options.artifact)
    groups = artifact.manifest.main.resources
    batch, context = map(int, options.shape.split("x"))
    prompts = [options.prompt] if options.prompt else []
    most = [most_blocks(group.block_size, [(batch, context)], prompts) for group in groups]
    config = ExecutorConfig(num_blocks=tuple(most))
    driver = new_driver(options.emulate)
    executor = GpuExecutor.open_with(artifact, config, driver, capture=not options.eager)
    opened = time.perf_counter()
    for tokens in prompts:
        prompt(executor, groups, tokens, repeats=1)
    decode(executor, groups, batch, context, options.steps)
    ended = time.perf_counter()
    executor.close()
    spans = {"import": imported - begun, "open": opened - imported, "steps": ended - opened}
    print("CHILD " + json.dumps({name: round(span, 3) for name, span in spans.items()}))


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--eager", action="store_true", help="without graphs")
    parser.add_argument("--shape", default="2x40", help="sequences and their context")
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--emulate", metavar="TARGET")
    return parser.parse_args()


if __name__ == "__main__":
    main()
