"""Builds, checks and times infc on the NVIDIA GPU of this machine, in one go.

    PYTHONPATH=src python -m benchmarks.gpu.run OUT [--minutes 8] [--only ops,8b-none]
    python -m benchmarks.gpu.run OUT --emulate sm_90       # the script itself, without a GPU

From the repository's root; torch, transformers and Triton are all that must be installed, and
cuda-bindings. Each stage writes a file to OUT, and a run that was cut off goes on where it stopped.
In the order of `plan.py`: the ceilings of the GPU; each op against its meaning; steps of the
bundled model, eager and captured, against `reference`; the times of known shapes; NVIDIA's tools,
where they are installed; tiles for this GPU. A stage has a number of seconds, and is left out where
fewer are left. A short table is printed last.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .setting import ROOT, Results, Setting, without_installation
from .table import is_wrong, table


def main() -> None:
    """All stages, and the table."""
    options = parse()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    without_installation(folder / "cache")
    setting = Setting(folder, 60 * options.minutes, options.emulate)
    failed = options.failed.split(",") if options.failed else []
    only = options.only.split(",") if options.only else None
    found: dict[str, Results] = {}
    try:
        for name, one in stages(setting, only, failed):
            found[name] = one
            if setting.lost and options.emulate is None:
                begin_again(options, setting, [*failed, name])
    finally:
        setting.close()
    print("\n".join(table(found)))
    if any(is_wrong(one) for one in found.values()):
        sys.exit(1)


def begin_again(options: argparse.Namespace, setting: Setting, failed: list[str]) -> None:
    """Go on in a new process: after an error of a kernel, nothing works any more in this one."""
    minutes = max(0.0, setting.left / 60)
    command = [sys.executable, "-m", f"{__package__}.run", str(setting.folder)]
    command += ["--minutes", f"{minutes:.2f}", "--failed", ",".join(failed)]
    if options.only:
        command += ["--only", options.only]
    print(f"the GPU failed in {failed[-1]}: the others follow in a new process", flush=True)
    os.chdir(ROOT)
    os.execv(sys.executable, command)


def stages(
    setting: Setting, only: list[str] | None = None, failed: list[str] | None = None
) -> Iterator[tuple[str, Results]]:
    """What each stage found, by its name; those that have failed are not made again."""
    from .ceilings import measure_ceilings
    from .plan import plan, rates

    def made(name: str) -> Results | None:
        return setting.failure(name) if name in (failed or []) else None

    found = made("ceilings") or setting.stage("ceilings", measure_ceilings)
    yield "ceilings", found
    if "error" in found:
        return
    planned = [one for one in plan(setting, rates(found)) if only is None or one.name in only]
    for place, one in enumerate(planned):
        spare = setting.left - sum(later.seconds for later in planned[place + 1 :])
        most = max(one.seconds, spare)
        yield one.name, made(one.name) or setting.stage(one.name, one.run, one.seconds, most)


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", help="stages, such as ops,model,1b-none")
    parser.add_argument("--emulate", metavar="TARGET", help="such as sm_90: without a GPU")
    parser.add_argument("--failed", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
