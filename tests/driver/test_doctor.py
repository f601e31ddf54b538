"""The doctor: each finding says what it saw, and the status whether an artifact could run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from infc.codegen.base import Need
from infc.driver import doctor, huge_pages
from infc.driver.cli import run
from infc.driver.doctor import Finding, examine
from infc.driver.recipe import load_recipe
from infc.ir import backends
from infc.ir.backends import BackendInfo, register_backend
from infc.ir.errors import DeviceError, UsageError
from infc.ir.extras import Extra
from infc.ir.machine import huge_page_setting


def found(subject: str) -> Finding:
    return {finding.subject: finding for finding in examine()}[subject]


def test_it_looks_at_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    subjects = ("infc", "instruction set", "threads", "memory", "huge pages", "C++ compiler")
    for subject in (*subjects, "torch", "numpy", "cache", "backend cpp", "backend tensorrt"):
        assert f"  {subject} " in text
    assert "no OpenMP)" in text


def test_a_gpu_is_described_or_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise DeviceError("cuda-bindings is not installed", hint="pip install 'infc[cuda]'")

    monkeypatch.setattr(doctor, "describe_gpu", none)
    finding = found("NVIDIA GPU")
    assert not finding.fine and not finding.needed
    assert finding.detail == "cuda-bindings is not installed (pip install 'infc[cuda]')"
    monkeypatch.setattr(doctor, "describe_gpu", lambda: "H200 (sm_90, ...)")
    assert found("NVIDIA GPU") == Finding(
        "NVIDIA GPU", True, "H200 (sm_90, ...)", lacking="missing"
    )


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["usable"] is True
    assert len(data["findings"]) == len(examine())
    assert set(data["findings"][0]) == {"subject", "fine", "detail", "needed", "lacking"}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_elsewhere(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert run(["doctor", *options]) == 1
    text = capsys.readouterr().out
    assert json.loads(text)["usable"] is False if options else "missing    platform" in text


def test_a_control_group_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(doctor, "memory_limit", lambda: 3 << 30)
    assert "a quota of 1.5 from the control group" in found("processors").detail
    assert "at most 3.0 GiB by the control group" in found("memory").detail


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in modules else find(name)
    )


def test_without_torch_the_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch", "transformers")
    assert "pip install 'infc[compile]'" in found("torch").detail
    assert found("backend cpp").detail == ("runs artifacts; compiling needs torch, transformers")
    assert found("backend reference").detail == "needs torch, transformers"


def test_a_library_may_come_with_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    here = importlib.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return here(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert (found("torch").fine, found("torch").detail) == (True, "installed")
    for name in ("cpp", "reference"):
        assert "needs" not in found(f"backend {name}").detail


def test_a_compiler_that_fails_is_not_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infc.codegen.cpp import toolchain

    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    toolchain.find_toolchain.cache_clear()
    try:
        assert not found("C++ compiler").fine
        assert "compiling needs C++ compiler" in found("backend cpp").detail
    finally:
        toolchain.find_toolchain.cache_clear()


def test_huge_pages_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if huge_page_setting() in (None, "never"):
        pytest.skip("this kernel gives no huge pages to anyone")
    assert huge_pages.anonymous_in_huge_pages()
    assert isinstance(huge_pages.file_in_huge_pages(tmp_path), bool)
    assert list(tmp_path.iterdir()) == []
    # The measurement decides, not the setting.
    (tmp_path / "smaps").write_text("")
    monkeypatch.setattr(huge_pages, "_SMAPS", tmp_path / "smaps")
    assert not huge_pages.anonymous_in_huge_pages()
    assert not huge_pages.file_in_huge_pages(tmp_path)
    assert not found("huge pages").fine


@dataclass(frozen=True)
class Names:
    """A section with a default that is made."""

    names: list[str] = field(default_factory=lambda: ["a"])


class Faulty:
    """A backend of a plug-in that fails where `fault` says."""

    interprets = False
    fault = ""

    def __init__(self, names: Names) -> None:
        assert names == Names()
        self._fail("init")

    def _fail(self, place: str) -> None:
        if self.fault == place:
            raise KeyError(place)

    def needs(self) -> list[Need]:
        self._fail("needs")
        return []

    def unable_here(self) -> str | None:
        self._fail("unable_here")
        return None


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> BackendInfo:
    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))
    kind, section = f"{__name__}:Faulty", f"{__name__}:Names"
    info = BackendInfo(name="faulty", compiler=kind, executor=kind, entry="none", section=section)
    return register_backend(info)


@pytest.mark.parametrize("fault", ["", "init", "needs", "unable_here"])
def test_a_plugin_that_fails_hides_nothing(
    fault: str, faulty: BackendInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faulty, "fault", fault)
    one = found(f"backend {faulty.name}")
    detail = f"KeyError: {fault!r}" if fault else "compiles and runs artifacts"
    assert (one.fine, one.detail) == (not fault, detail)
    assert found("backend cpp").fine


@pytest.mark.parametrize(
    ("module", "detail"),
    [
        ("json.decoder", "compiles and runs artifacts"),
        ("no_such.part", "needs no_such.part"),
    ],
)
def test_what_a_backend_runs_on_are_modules(module: str, detail: str, faulty: BackendInfo) -> None:
    register_backend(replace(faulty, extra=Extra((module,), "pip install it")))
    assert found("backend faulty").detail == detail


def test_a_section_takes_defaults_that_are_made(faulty: BackendInfo) -> None:
    loaded = load_recipe("org/name", {"backend": faulty.name})
    assert loaded.recipe.model_dump()[faulty.name] == {"names": ["a"]}
    loaded = load_recipe("org/name", {"backend": faulty.name, "faulty": {"names": ["b"]}})
    assert loaded.recipe.model_dump()[faulty.name] == {"names": ["b"]}


@pytest.mark.parametrize("annotations", [{"names": "NoSuchType"}, {"names": 3}])
def test_a_section_that_cannot_be_read_is_named(
    annotations: dict[str, object], faulty: BackendInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Names, "__annotations__", annotations)
    with pytest.raises(UsageError, match=r"the section of the backend faulty cannot be read: "):
        load_recipe("org/name", {"backend": faulty.name})
