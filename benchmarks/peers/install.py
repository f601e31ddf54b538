"""Makes the peers' environments: one a peer, from pinned requirements."""

from __future__ import annotations

import hashlib
import sys
import tarfile
from pathlib import Path

from infc.ir.targets import resolve_target

from .contestants import LLAMA_CPP, Peer, Workdir
from .steps import Runner, SetupError

REQUIREMENTS = Path(__file__).parent / "requirements"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LLAMA_CPP_BUILD = {
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
    # Ninja rebuilds its manifest for ever with this source tree.
    "CMAKE_GENERATOR": "Unix Makefiles",
    "CMAKE_BUILD_PARALLEL_LEVEL": "2",
}


def install(workdir: Workdir, peer: Peer, run: Runner) -> bool:
    """Install a peer; False where exactly this was installed before."""
    if peer.requirements is None:
        return False
    environment = workdir.environment(peer)
    requirements = REQUIREMENTS / peer.requirements
    # The target too: what is built for this machine's instructions is no good on another one.
    what = requirements.read_text(encoding="utf-8") + resolve_target("native").name
    stamp = environment / f"installed-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    if stamp.exists():
        return False
    if not workdir.python(peer).exists():
        run(sys.executable, "-m", "venv", environment)
    pip = (workdir.python(peer), "-m", "pip", "--disable-pip-version-check")
    _install_torch(requirements, pip, run)
    # The list is complete, and what it leaves out of what packages ask for is left out on purpose.
    run(*pip, "install", "--no-deps", "-r", requirements)
    if peer is LLAMA_CPP:
        # Forced, or pip takes what was built for another machine to be the same.
        options = ("--no-deps", "--force-reinstall", "--no-cache-dir")
        run(*pip, "install", *options, llama_cpp_source(workdir, run), **LLAMA_CPP_BUILD)
    stamp.touch()
    return True


def _install_torch(requirements: Path, pip: tuple[str | Path, ...], run: Runner) -> None:
    """The CPU wheel of torch, as in `scripts/setup.sh`: from pip's own settings, or its index."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    torch = next((line for line in lines if line.startswith("torch==")), None)
    if torch is None:
        return
    command = (*pip, "install", "--no-deps", "--only-binary", ":all:", torch)
    try:
        run(*command)
    except SetupError:
        run(*command, "--index-url", CPU_INDEX)


def llama_cpp_source(workdir: Workdir, run: Runner) -> Path:
    """llama-cpp-python's source package, unpacked: llama.cpp and its converter are inside."""
    lines = (REQUIREMENTS / "llama.cpp-source.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line for line in lines if line.startswith("llama-cpp-python=="))
    name = f"llama_cpp_python-{pinned.split('==')[1]}"
    folder = workdir.root / "llama.cpp"
    source = folder / name
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = (workdir.python(LLAMA_CPP), "-m", "pip", "--disable-pip-version-check")
        run(*pip, "download", "--no-deps", "--no-binary=:all:", pinned, "-d", folder)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return source
