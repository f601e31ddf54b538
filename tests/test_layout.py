"""The shape of the project: rooms and links, public names, module captions, lazy imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import infc

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"codegen", "driver", "frontend", "ir", "passes", "recipes", "runtime"}
PUBLIC_NAMES = {
    "LLM",
    "Artifact",
    "AsyncLLM",
    "CapacityError",
    "CompletionOutput",
    "Embedding",
    "InfcError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "TokenLogprobs",
    "__version__",
    "compile",
    "diff",
    "inspect",
    "ops",
    "register_pass",
    "rewrite",
}


def files_in(*folders: str, suffix: str) -> list[Path]:
    found = (p for folder in folders for p in (ROOT / folder).rglob(f"*{suffix}"))
    return sorted(p.relative_to(ROOT) for p in found if not p.is_symlink())


def test_every_room_has_its_link() -> None:
    links = {p.name: p.resolve() for p in (ROOT / "src/infc").iterdir() if p.is_symlink()}
    assert links == {room: ROOT / room for room in ROOMS}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
@pytest.mark.parametrize("left", ["tiny.infc/manifest.json", "tiny.infc.timings.json"])
def test_what_compiling_leaves_by_default_is_not_of_the_repository(left: str) -> None:
    asked = subprocess.run(["git", "check-ignore", "-q", "--no-index", left], cwd=ROOT)
    assert asked.returncode == 0


def test_the_root_is_no_package() -> None:
    # In a checkout named `infc`, as a clone is, pytest would take the root for the package.
    assert not (ROOT / "__init__.py").exists()


def test_public_names() -> None:
    assert set(infc.__all__) == PUBLIC_NAMES
    assert set(dir(infc)) >= PUBLIC_NAMES
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        infc.nothing  # type: ignore[attr-defined]  # noqa: B018 - the look-up itself is tested


def test_type_checkers_see_the_public_names_at_home() -> None:
    face = ast.parse((ROOT / "src/infc/__init__.py").read_text())
    guarded = next(node for node in face.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (statement.module, alias.name)
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == infc._HOMES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_public_name_resolves(name: str) -> None:
    assert getattr(infc, name) is not None


def test_every_module_opens_with_a_caption() -> None:
    without = []
    for path in files_in(*ROOMS, "src", "tests", "scripts", "benchmarks", suffix=".py"):
        docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
        caption, _, rest = docstring.partition("\n")
        if not caption.endswith((".", "?", "!")) or (rest and not rest.startswith("\n")):
            without.append(str(path))
    assert without == []


@pytest.mark.parametrize("module", ["infc", "infc.driver.cli"])
def test_import_is_light(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
