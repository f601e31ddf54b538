"""Makes what the comparison needs: checkpoints, the peers' environments and their models.

    python -m benchmarks.peers.setup WORKDIR [--only llama.cpp,openvino] [--shapes 0.5b,1b]

From the repository's root, in infc's own environment. Safe to run again: what is there is kept.
Without `--only`, vLLM is left out: it is the largest of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..models import make_checkpoint
from .contestants import CONTESTANTS, DEFAULT_SHAPES, PEERS, SHAPES, VLLM, Peer, Workdir
from .convert import convert
from .install import install
from .steps import Runner, SetupError


def main() -> None:
    """Set up what was asked for; a peer that fails does not keep the others from being tried."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--only", default=",".join(p.name for p in PEERS if p is not VLLM))
    parser.add_argument("--shapes", default=",".join(DEFAULT_SHAPES))
    options = parser.parse_args()
    workdir = Workdir(options.workdir.resolve())
    # Without a shape, as benchmarks/quality asks: it has models of its own.
    shapes, names = (list(filter(None, one.split(","))) for one in (options.shapes, options.only))
    if unknown := sorted(set(names) - {p.name for p in PEERS} | set(shapes) - set(SHAPES)):
        parser.error(f"no peer or shape {unknown[0]!r}")
    workdir.logs().mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        print(make_checkpoint(shape, workdir.checkpoints), flush=True)
    failed = [p.name for p in PEERS if p.name in names and not set_up(workdir, p, shapes)]
    if failed:
        raise SystemExit(f"not set up: {', '.join(failed)}")


def set_up(workdir: Workdir, peer: Peer, shapes: list[str]) -> bool:
    """Install one peer and convert its models; whether all of it worked."""
    run = Runner(workdir.logs() / f"setup-{peer.name}.log", {"HF_HUB_OFFLINE": "1"})
    try:
        print(f"{peer.name}: {_done(install(workdir, peer, run), 'installed')}", flush=True)
        for contestant in CONTESTANTS:
            for shape in shapes if contestant.peer is peer else []:
                made = convert(workdir, contestant, shape, run)
                print(f"{contestant.name} {shape}: {_done(made, 'converted')}", flush=True)
    except SetupError as error:
        print(f"{peer.name}: {error}", flush=True)
        return False
    return True


def _done(now: bool, what: str) -> str:
    return what if now else "there"


if __name__ == "__main__":
    main()
