"""Pages agree with the code: generated parts, commands, options, architectures, names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import infc
from infc.driver.cli import run
from infc.ir.manifest import Manifest
from infc.ir.ops import all_ops
from infc.passes.catalogue import OUR_PASSES
from infc.runtime.options import RuntimeOptions
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.step import Step

from ..configs import CONFIGS
from ..e2e.parity_table import BACKENDS, load_table
from .generated import BLOCK, BLOCKS, PAGES, ROOT, commands, refreshed

DOCS = ROOT / "docs"
TEXTS = [*PAGES, ROOT / "README.md"]
CODE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_what_is_written_from_the_code_is_what_the_code_says(
    page: Path, update_golden: bool
) -> None:
    text = page.read_text()
    assert text.count("<!-- from the code:") == len(BLOCK.findall(text)), "a block has no end"
    fresh = refreshed(text)
    if update_golden:
        page.write_text(fresh)
        return
    assert text == fresh, "run `make test ARGS='tests/docs --update-golden'`"


def test_every_generated_part_is_on_a_page() -> None:
    used = {match["name"] for page in PAGES for match in BLOCK.finditer(page.read_text())}
    assert used == set(BLOCKS)


def calls(text: str) -> list[str]:
    """Every line of code that calls infc, and every call within prose."""
    lines = [line for block in CODE.findall(text) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", CODE.sub("", text))
    found = (re.search(r"(?:^|\| |\$ )(?:\.venv/bin/)?(infc( .*|$))", line) for line in lines)
    return [match[1] for match in found if match] + [s for s in spans if s.startswith("infc ")]


@pytest.mark.parametrize("page", TEXTS, ids=ids)
def test_every_command_and_option_on_a_page_exists(page: Path) -> None:
    known = {path[1:]: command for path, command in commands()}
    groups = {path[:1] for path in known}
    for call in calls(page.read_text()):
        words = call.split("#")[0].split()[1:]
        if not words or words[0] in ("OPTIONS", "[OPTIONS]", "COMMAND") or words[0][0] in "-…":
            continue
        path = tuple(words[:2]) if tuple(words[:2]) in known else tuple(words[:1])
        assert path in known or path in groups, f"no command for `{call}`"
        if path in known:
            options = {opt for p in known[path].params for opt in (*p.opts, *p.secondary_opts)}
            options |= {"-h", "--help"}
            used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= options, f"`{call}` uses {used - options}"


@pytest.mark.parametrize("words", [path for path, _ in commands()], ids=" ".join)
def test_help_of_every_command_works_and_stands_on_its_page(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run([*words[1:], "--help"]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    page = (DOCS / "command-line.md").read_text()
    assert f"## {' '.join(words)}\n\n```\n{printed}\n```\n" in page


def test_the_short_list_of_ops_names_each_op_and_no_other() -> None:
    text = (DOCS / "design/ops.md").read_text()
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ")][2:]
    spans = " ".join(span for row in rows for span in re.findall(r"`([^`]+)`", row))
    listed = set(re.findall(r"[a-z_]+", re.sub(r"\([^)]*\)|\{[^}]*\}|\[[^]]*\]", " ", spans)))
    assert listed == {op.name for op in all_ops()}


def test_every_architecture_was_measured() -> None:
    update = "run `make test ARGS='tests/e2e/test_parity.py --update-golden'`"
    assert {name: sorted(row) for name, row in load_table().items()} == {
        name: sorted(BACKENDS) for name in CONFIGS
    }, update


def test_public_names_limits_and_sampling_fields_are_documented() -> None:
    text = (DOCS / "python.md").read_text()
    for name in infc.__all__:
        assert f"infc.{name}" in text or f"`{name}`" in text, f"{name} is missing"
    for field in RuntimeOptions.__dataclass_fields__:
        assert f"`{field}`" in text.partition("`limits`: ")[2].partition("\n")[0], field
    for field in SamplingParams.__dataclass_fields__:
        assert f"`{field}`" in text, f"{field} is missing"


def test_passes_that_recipes_on_pages_name_exist() -> None:
    known = {kind.name for kind in OUR_PASSES}
    found = 0
    for page in TEXTS:
        for block in CODE.findall(page.read_text()):
            if not re.search(r"^passes:", block, re.MULTILINE):
                continue
            spec = yaml.safe_load(block)["passes"]
            for name, value in spec.items():
                place = value if isinstance(value, dict) else {}
                names = {name, place.get("after", name), place.get("before", name)}
                assert {one for one in names if ":" not in one} <= known
                found += 1
    assert found >= 2


def test_examples_in_help_use_real_options() -> None:
    for path, command in commands():
        help_text = command.help or ""
        own = [line for line in help_text.splitlines() if " ".join(path) in line]
        options = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
        for line in own:
            used = {w.split("=")[0] for w in line.split() if re.match(r"--[a-z]", w)}
            assert used <= options, line


def test_links_between_pages_lead_somewhere() -> None:
    for page in TEXTS:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{ids(page)}: {target}"


def test_steps_and_manifests_have_the_fields_that_their_pages_list() -> None:
    step = (DOCS / "design/step.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", step, re.MULTILINE)
    assert listed == [*Step.__dataclass_fields__]
    manifest = (DOCS / "design/manifest.md").read_text()
    for name in Manifest.__dataclass_fields__:
        assert re.search(rf"\b{name}\b", manifest), f"{name} is missing"


def test_files_that_pages_name_are_there() -> None:
    rooms = "benchmarks|codegen|driver|frontend|ir|passes|recipes|runtime|scripts|tests"
    named = 0
    for page in TEXTS:
        for path in re.findall(rf"`((?:{rooms})/[\w/.-]+)`?", page.read_text()):
            assert (ROOT / path).exists(), f"{ids(page)}: {path}"
            named += 1
    assert named > 30


def test_pages_are_listed_and_design_pages_are_short() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]
    for page in (DOCS / "design").glob("*.md"):
        assert len(page.read_text().split()) <= 600, f"{page.name} is more than a page"
