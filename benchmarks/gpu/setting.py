"""Where measurements run: the GPU or an emulation of it, a folder of results, and a clock."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from infc.ir.targets import Target
    from infc.runtime.executors.gpu.driver import Driver

Results = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
"""Where this package, and that of the tests, can be imported from."""


STEPS: Final = 48
"""Decode steps that are timed, one ahead of the other; a few before them only warm up."""


def without_installation(cache: Path) -> None:
    """Let infc be imported where only torch, triton and transformers are installed."""
    if importlib.util.find_spec("platformdirs") is None:
        module = ModuleType("platformdirs")
        module.__dict__["user_cache_dir"] = lambda *_, **__: str(cache)
        module.__dict__["user_cache_path"] = lambda *_, **__: cache
        sys.modules["platformdirs"] = module


def new_driver(emulated: str | None) -> Driver:
    """The GPU's driver, or an emulation of such a GPU."""
    if emulated is None:
        from infc.runtime.executors.gpu.cuda import CudaDriver

        return CudaDriver()
    from dataclasses import replace

    from tests.emulation.driver import DEVICE, EmulatedDriver

    number = int(emulated.removeprefix("sm_"))
    return EmulatedDriver(device=replace(DEVICE, capability=divmod(number, 10)))


@dataclass(slots=True)
class Setting:
    """One run. What a stage found is kept in `folder`, so a run that was cut off goes on."""

    folder: Path
    seconds: float
    emulated: str | None
    begun: float = field(default_factory=time.monotonic)
    lost: bool = False
    """Whether the GPU has failed, after which nothing works any more in this process."""

    _driver: Driver | None = None
    _stage_end: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds that are left: of the run, or of the stage that runs."""
        now = time.monotonic()
        return min(self.seconds - (now - self.begun), self._stage_end - now)

    @property
    def num_steps(self) -> int:
        """Decode steps to time: few where they are emulated."""
        return STEPS if self.emulated is None else 2

    def new_driver(self) -> Driver:
        """A driver of its own, for an executor that closes it."""
        return new_driver(self.emulated)

    @property
    def driver(self) -> Driver:
        """The driver of all that needs none of its own."""
        if self._driver is None:
            self._driver = self.new_driver()
        return self._driver

    @property
    def target(self) -> Target:
        """The target of the GPU."""
        from infc.ir.targets import resolve_target

        major, minor = self.driver.device.capability
        return resolve_target(f"sm_{major}{minor}")

    def stage(
        self,
        name: str,
        run: Callable[[Setting], Results],
        least: float = 10,
        most: float = float("inf"),
    ) -> Results:
        """What a stage finds: as it was kept, or now, if `least` seconds are left for it.

        It sees `most` seconds at most as left. What fails, or is skipped, is kept with its reason,
        and made again the next time.
        """
        place = self.folder / f"{name}.json"
        if (kept := self.kept(name)) is not None:
            return kept
        if self.left < least:
            return {"skipped": f"{self.left:.0f} s are left, and it takes up to {least:.0f} s"}
        begun = time.monotonic()
        self._stage_end = begun + most
        try:
            found = run(self)
        except Exception as error:
            import traceback

            (self.folder / f"{name}.log").write_text(traceback.format_exc(), encoding="utf-8")
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
            self.lost = type(error).__name__ == "DeviceError"
        finally:
            self._stage_end = float("inf")
        found["seconds"] = round(time.monotonic() - begun, 1)
        place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {found['seconds']} s{' FAILED' if 'error' in found else ''}", flush=True)
        return found

    def kept(self, name: str) -> Results | None:
        """What a stage has found in this folder before; None where it has not, or has failed."""
        kept = self._read(name)
        return None if kept is None or kept.keys() & {"error", "skipped"} else kept

    def failure(self, name: str) -> Results | None:
        """What a stage has found in this folder before, if it has failed."""
        kept = self._read(name)
        return kept if kept is not None and "error" in kept else None

    def _read(self, name: str) -> Results | None:
        place = self.folder / f"{name}.json"
        if not place.exists():
            return None
        kept: Results = json.loads(place.read_text(encoding="utf-8"))
        return kept

    def run_child(
        self,
        module: str,
        *arguments: str,
        before: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A module of this package in a process of its own, under a tool if there is one.

        TimeoutExpired where it takes more than what is left.
        """
        command = [*before, sys.executable, "-m", f"{__package__}.{module}", *arguments]
        if self.emulated is not None:
            command += ["--emulate", self.emulated]
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1, self.left),
        )

    def close(self) -> None:
        """Give the GPU back."""
        if self._driver is not None:
            self._driver.close()
