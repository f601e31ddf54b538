"""Every architecture is compiled for a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from infc.ir.errors import InfcError
from infc.ir.launches import read_launches

from ..configs import CONFIGS
from ..e2e.builds import Build, Builds
from .architectures import EMULATED, NOT_COMPILED
from .engines import Case

pytestmark = [
    pytest.mark.breadth,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels"),
]


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_architecture_is_compiled(arch: str, builds: Builds) -> None:
    case = Case(Build(arch))
    if arch in NOT_COMPILED:
        with pytest.raises((InfcError, ValueError), match=NOT_COMPILED[arch]):
            case.artifact(builds)
        return
    artifact = case.artifact(builds)
    plan = read_launches(artifact.read_text(artifact.manifest.main.entry.file), where=arch)
    assert plan.target == "sm_90"
    assert plan.buckets


def test_what_is_told_of_is_there() -> None:
    kinds = {small.kind for small in CONFIGS.values()}
    assert set(EMULATED) <= kinds
    assert NOT_COMPILED.keys() <= CONFIGS.keys()
