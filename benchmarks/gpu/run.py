"""Builds, checks and times infc on the NVIDIA GPU of this machine, in one go.

    PYTHONPATH=src python -m benchmarks.gpu.run OUT [--minutes 8] [--only ops,8b-none]
    python -m benchmarks.gpu.run OUT --emulate sm_90       # the script itself, without a GPU

From the repository's root; torch, transformers and Triton are all that must be installed, and
cuda-bindings. Each stage writes a file to OUT, and a run that was cut off goes on where it stopped.
In this order: the ceilings of the GPU; each op against its meaning; steps of the bundled model,
eager and captured, against `reference`; then the times of known shapes. A short table is printed
last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .setting import Results, Setting, without_installation

Stage = Callable[[Setting], Results]
SHAPES = (("1b", "none"), ("8b", "none"), ("8b", "int4"), ("1b", "int4"), ("8b", "fp8"))


def main() -> None:
    """All stages, and the table."""
    options = parse()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    without_installation(folder / "cache")
    setting = Setting(folder, 60 * options.minutes, options.emulate)
    try:
        found = dict(stages(setting, options.only.split(",") if options.only else None))
    finally:
        setting.close()
    print("\n".join(table(found)))
    if any(is_wrong(one) for one in found.values()):
        sys.exit(1)


def stages(setting: Setting, only: list[str] | None) -> Iterator[tuple[str, Results]]:
    """What each stage found, by its name."""
    from infc.ir.roofline import Ceilings

    from .ceilings import measure_ceilings
    from .checks import check_ops
    from .models import check_model
    from .steps import measure

    small = setting.emulated is not None
    found = setting.stage("ceilings", measure_ceilings)
    yield "ceilings", found
    if "error" in found:
        return
    # The rates of other numbers follow from that of bfloat16, as data sheets have them.
    bf16 = found["bf16"]
    rates = Ceilings(threads=0, read=found["read"], fp32=bf16 / 12, bf16=bf16, int8=2 * bf16)
    few = frozenset({"pointwise", "row_norm", "linear_bias", "gates"})
    checks: dict[str, Stage] = {
        "ops": partial(check_ops, names=few if small else None),
        "model": check_model,
    }
    times: dict[str, Stage] = {
        f"{shape}-{scheme}": partial(
            measure, shape=shape, scheme=scheme, ceilings=rates, small=small
        )
        for shape, scheme in ((("tiny", "none"), ("tiny", "int4")) if small else SHAPES)
    }
    for name, run in {**checks, **times}.items():
        if only is None or name in only:
            yield name, setting.stage(name, run)


def is_wrong(found: Results) -> bool:
    """Whether a stage failed, or found something wrong."""
    return "error" in found or bool(found.get("wrong"))


def table(found: dict[str, Results]) -> Iterator[str]:
    """A line for each figure that matters."""
    yield ""
    for name, one in found.items():
        if "error" in one or "skipped" in one:
            yield f"{name}: {one.get('error') or one['skipped']}"
        elif name == "ceilings":
            rates = f"{one['read'] / 1e12:.2f} TB/s, {one['bf16'] / 1e12:.0f} Tflop/s"
            yield f"{one['device']}: {rates}"
        elif "cases" in one:
            wrong = ", ".join(one["wrong"]) or "none"
            yield f"{name}: {len(one['cases'])} cases, wrong: {wrong}"
        else:
            yield from _times(name, one)


def _times(name: str, one: Results) -> Iterator[str]:
    for kind in ("decode", "prefill"):
        for what, timed in one[kind].items():
            numbers: dict[str, Any] = dict(timed)
            share = f"{100 * numbers.pop('share'):.0f} % of {numbers.pop('roofline ms')} ms"
            rest = ", ".join(f"{value} {key}" for key, value in numbers.items())
            yield f"{name} {kind} {what}: {share}; {rest}"
    lines = one.get("launches of a decode step", {})
    for kernel, line in list(lines.items())[:6]:
        yield f"{name} {kernel}: {line['µs']} µs in {line['launches']} launches"


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", help="stages, such as ops,model,1b-none")
    parser.add_argument("--emulate", metavar="TARGET", help="such as sm_90: without a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
