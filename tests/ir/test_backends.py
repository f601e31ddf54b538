"""The table of backends: what reads it, what may be added, and that nothing else lists them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from infc.codegen.registry import get_backend
from infc.ir import backends
from infc.ir.backends import (
    DEFAULT,
    BackendInfo,
    backend_of_artifact,
    find_backend,
    known_backends,
    register_backend,
)
from infc.ir.errors import ArtifactError, ToolchainError, UsageError
from infc.ir.extras import Extra

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("codegen", "driver", "frontend", "ir", "passes", "runtime", "src")
TOY = BackendInfo(
    name="toy", compiler="no_toy_module:Toy", executor="infc.ir.backends:Nothing", entry="toy"
)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))


def test_every_part_of_ours_is_where_the_table_says() -> None:
    for info in known_backends():
        assert info.load_compiler().name == info.name
        assert callable(info.load_executor())
        section = info.load_section()
        assert section is None or section()
    assert known_backends()[0].name == DEFAULT


def test_a_backend_can_be_added_and_replaced() -> None:
    assert register_backend(TOY) is find_backend("toy") is TOY
    other = replace(TOY, entry="other")
    assert register_backend(other) is find_backend("toy")
    assert backend_of_artifact("toy", where="a") is other
    assert known_backends()[-1] is other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reference", "reference is a built-in backend"),
        ("my-toy", "cannot be the name of a backend"),
        ("Toy", "cannot be the name of a backend"),
        ("", "cannot be the name of a backend"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        register_backend(replace(TOY, name=name))


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'refrence' .did you mean 'reference'"):
        find_backend("refrence")
    with pytest.raises(ArtifactError, match=r"art: .* no executor for backend 'x' .it runs cpp"):
        backend_of_artifact("x", where="art")
    info = replace(TOY, extra=Extra(("toy_library",), "pip install toy"))
    with pytest.raises(UsageError, match=r"toy cannot be loaded: .*no_toy_module.*pip install toy"):
        info.load_compiler()
    with pytest.raises(UsageError, match=r"toy cannot be loaded: .*Nothing"):
        info.load_executor()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Toy = nothing", "NameError: name 'nothing' is not defined"),
        ("Toy = 1 / 0", "ZeroDivisionError: "),
        ("def f(:", "SyntaxError: "),
    ],
)
def test_a_module_that_does_not_run_is_named(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_toy.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_toy", raising=False)
    extra = Extra(("toy_library",), "pip install toy")
    info = replace(TOY, compiler="broken_toy:Toy", section="broken_toy:Toy", extra=extra)
    register_backend(info)
    for load in (info.load_section, lambda: get_backend("toy")):
        with pytest.raises(UsageError, match=f"broken_toy:Toy: .* toy cannot be .*{message}") as e:
            load()
        assert "pip install" not in str(e.value), "that would not help"


def test_an_error_of_ours_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ToolchainError("no compiler")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ToolchainError, match="no compiler"):
        TOY.load_compiler()


@dataclass(frozen=True)
class Section:
    """Options that a recipe may give."""

    shift: int = 0
    names: list[str] = field(default_factory=lambda: ["a"])


@dataclass(frozen=True)
class Demanding(Section):
    """Options, one of which a recipe would have to give."""

    width: int = field(kw_only=True)


def test_each_option_has_a_default() -> None:
    info = replace(TOY, section=f"{__name__}:Section")
    assert info.load_section() is Section
    info = replace(TOY, section=f"{__name__}:Demanding")
    with pytest.raises(UsageError, match=r"Demanding: the option toy.width has no default"):
        info.load_section()
    for other in ("ROOT", "test_each_option_has_a_default", "Extra.missing"):
        with pytest.raises(UsageError, match="the section of the backend toy is not a dataclass"):
            replace(TOY, section=f"{__name__}:{other}").load_section()


def test_the_backend_of_generated_code_is_named_in_the_table_alone() -> None:
    """Outside of its own folder and its executor, whose files bear its name.

    What else is called so is something else: llama.cpp is another program.
    """
    at_home = re.compile(r"codegen/cpp/|runtime/(\w+/)*executors/cpp\w*\.py")
    named = re.compile(r"(?<!llama\.)(?<!llama-)(?<!_)\b[Cc]pp(?![a-z])")
    found = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if not path.is_symlink() and named.search(path.read_text(encoding="utf-8"))
    }
    assert {name for name in found if not at_home.match(name)} == {"ir/backends.py"}
