"""Where measurements run: the GPU or an emulation of it, a folder of results, and a clock."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infc.ir.targets import Target
    from infc.runtime.executors.gpu.driver import Driver

Results = dict[str, Any]


def without_installation(cache: Path) -> None:
    """Let infc be imported where only torch, triton and transformers are installed."""
    if importlib.util.find_spec("platformdirs") is None:
        module = ModuleType("platformdirs")
        module.__dict__["user_cache_dir"] = lambda *_, **__: str(cache)
        module.__dict__["user_cache_path"] = lambda *_, **__: cache
        sys.modules["platformdirs"] = module


@dataclass(slots=True)
class Setting:
    """One run. What a stage found is kept in `folder`, so a run that was cut off goes on."""

    folder: Path
    seconds: float
    emulated: str | None
    begun: float = field(default_factory=time.monotonic)
    _driver: Driver | None = None

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.begun)

    def new_driver(self) -> Driver:
        """A driver of its own, for an executor that closes it."""
        if self.emulated is None:
            from infc.runtime.executors.gpu.cuda import CudaDriver

            return CudaDriver()
        from dataclasses import replace

        from tests.emulation.driver import DEVICE, EmulatedDriver

        number = int(self.emulated.removeprefix("sm_"))
        return EmulatedDriver(device=replace(DEVICE, capability=divmod(number, 10)))

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

    def stage(self, name: str, run: Callable[[Setting], Results], least: float = 10) -> Results:
        """What a stage finds: as it was kept, or now, if so many seconds are left for it.

        What fails is kept with its reason, and made again the next time.
        """
        place = self.folder / f"{name}.json"
        if place.exists():
            kept: Results = json.loads(place.read_text(encoding="utf-8"))
            if "error" not in kept:
                return kept
        if self.left < least:
            return {"skipped": f"{self.left:.0f} s are left"}
        begun = time.monotonic()
        try:
            found = run(self)
        except Exception as error:
            import traceback

            (self.folder / f"{name}.log").write_text(traceback.format_exc(), encoding="utf-8")
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        found["seconds"] = round(time.monotonic() - begun, 1)
        place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {found['seconds']} s{' FAILED' if 'error' in found else ''}", flush=True)
        return found

    def close(self) -> None:
        """Give the GPU back."""
        if self._driver is not None:
            self._driver.close()
