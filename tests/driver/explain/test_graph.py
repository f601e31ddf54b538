"""The page and the drawing: well-formed, whole, self-contained, and deaf to what names say."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from infc.driver.cli import run
from infc.driver.explain.collect import inspect_artifact
from infc.driver.explain.facts import ArtifactFacts, ProgramFacts
from infc.driver.explain.graph_layout import Box, Drawing, lay_out
from infc.driver.explain.graph_model import build_blocks
from infc.driver.explain.graph_page import html_page
from infc.driver.explain.graph_svg import svg_page
from infc.driver.explain.measure import choose_workload, measure_program
from infc.ir.manifest import Limits
from infc.ir.ops import get_op
from infc.ir.program import Program
from infc.ir.text import parse_program

from .support import stack, write_explained

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&]]>"
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Counts elements, keeps text by the element it stands in, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        place = self.open[-1] if self.open else ""
        self.text[place] = self.text.get(place, "") + data


def cards_of(page: str) -> dict[str, list[dict[str, object]]]:
    """What a click shows, by card."""
    match = re.search(r'<script type="application/json" id="cards">(.*?)</script>', page, re.S)
    assert match is not None
    cards: dict[str, list[dict[str, object]]] = json.loads(match[1])
    return cards


def program_of(facts: ArtifactFacts) -> ProgramFacts:
    assert facts.program is not None
    return facts.program


def test_the_page_holds_every_op_and_shown_node(facts: ArtifactFacts) -> None:
    text = html_page(facts)
    page, cards = Page(text), cards_of(text)
    assert page.tags[0][0] == "html"
    program = program_of(facts)
    shown = {None, *(layer.layers[0] for layer in program.layers)}
    wanted = {name for n in program.nodes if n.layer in shown for name, _ in n.results}
    told = json.dumps(cards)
    assert all(f"%{name}: " in told for name in wanted)
    titles = {node["title"] for card in cards.values() for node in card}
    assert titles == {node.op for node in program.nodes}
    drawn = {attrs["data-card"] for _, attrs in page.tags if "data-card" in attrs}
    assert drawn == set(cards)
    assert "×4" in text
    assert get_op("paged_attention").doc in {n["doc"] for card in cards.values() for n in card}


def test_nothing_is_loaded_from_anywhere(facts: ArtifactFacts) -> None:
    text = html_page(facts)
    assert "://" not in text
    policy = next(attrs["content"] for tag, attrs in Page(text).tags if tag == "meta" and
                  attrs.get("http-equiv") == "Content-Security-Policy")  # fmt: skip
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for _, attrs in Page(text).tags:
        assert not {"src", "href", "onclick"} & attrs.keys()
    svg = svg_page(facts)
    assert svg.count("://") == svg.count("http://www.w3.org/2000/svg") == 1


def test_the_drawing_is_xml(facts: ArtifactFacts) -> None:
    root = ElementTree.fromstring(svg_page(facts))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join("".join(element.itertext()) for element in root.iter())
    assert all(op.op in words for op in program_of(facts).ops)


def test_names_are_text_whatever_they_say(captured: Program, tmp_path: Path) -> None:
    path = write_explained(tmp_path / "evil", captured, name=EVIL)
    facts = inspect_artifact(path, memory=1 << 30)
    page = Page(html_page(facts))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert EVIL in page.text["h1"]
    evil = program_of(facts).nodes[3]
    object.__setattr__(evil, "source", EVIL)
    page = Page(html_page(facts))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert EVIL in json.dumps(cards_of(html_page(facts))).encode().decode("unicode_escape") or (
        EVIL in str(cards_of(html_page(facts)))
    )
    ElementTree.fromstring(svg_page(facts))


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return a.x < b.right and b.x < a.right and a.y < b.bottom and b.y < a.bottom


def check_layout(layout: Drawing) -> None:
    """Cards and blocks apart, cards within their block, edges from card to card."""
    for a, b in itertools.combinations(layout.blocks, 2):
        assert not overlap(a.frame, b.frame)
    for block in layout.blocks:
        frame = block.frame
        assert frame.right <= layout.width
        assert frame.bottom <= layout.height
        boxes = [box for _, box in block.cards]
        for a_box, b_box in itertools.combinations(boxes, 2):
            assert not overlap(a_box, b_box)
        for box in boxes:
            assert frame.x <= box.x
            assert box.right <= frame.right
            assert frame.y <= box.y
            assert box.bottom <= frame.bottom
        bottoms = {(box.middle, box.bottom) for box in boxes}
        tops = {(box.middle, box.y) for box in boxes}
        sides = {(box.right, box.y + box.height / 2) for box in boxes}
        for edge in block.edges:
            assert edge.points[0] in bottoms
            assert edge.points[-1] in tops | sides
            assert all(frame.x <= x <= frame.right for x, _ in edge.points)


def test_nothing_overlaps(facts: ArtifactFacts, captured: Program) -> None:
    check_layout(lay_out(build_blocks(program_of(facts))))
    whole = measure_program(captured, facts.workload)
    check_layout(lay_out(build_blocks(whole)))


@pytest.mark.parametrize("layers", [1, 2, 33])
def test_a_drawing_does_not_grow_with_equal_layers(layers: int) -> None:
    load = choose_workload(Limits(256, 64, 8, 8), None, None, None)
    blocks = build_blocks(measure_program(stack(layers), load))
    check_layout(lay_out(blocks))
    nodes = [node for b in blocks for part in b.parts for c in part.cards for node in c.nodes]
    assert len(nodes) <= 30
    assert sum(block.copies for block in blocks if block.title.startswith("layer")) == layers


def test_the_command_writes_both(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, start in (("a.html", "<!doctype html>"), ("a.svg", "<svg ")):
        assert run(["inspect", str(tiny), "--graph", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
        assert (tmp_path / name).read_text().startswith(start)


def test_equal_artifacts_give_equal_pages(tiny: Path) -> None:
    pages = [html_page(inspect_artifact(tiny, memory=1 << 30)) for _ in range(2)]
    assert pages[0] == pages[1]


def test_what_touches_state_stands_below_what_touched_it_before() -> None:
    program = parse_program(WRITE_THEN_ATTEND)
    load = choose_workload(Limits(64, 64, 8, 8), None, None, None)
    (block,) = lay_out(build_blocks(measure_program(program, load))).blocks
    heights = {card.title: box.y for card, box in block.cards}
    assert heights["kv_write"] < heights["paged_attention"]


WRITE_THEN_ATTEND = """
program "pages" phase lowered {
  symbol T: 1..64
  resource full {layers = (0,), num_kv_heads = 2, key_head_dim = 4, value_head_dim = 4, dtype = "f32", block_size = 16, window = none}
  input %x: f32[T, 2, 4]
  kv_write(%x, %x) {layer = 0, group = "full"}  layer 0  from "m.0.attn"
  %y = paged_attention(%x) {layer = 0, group = "full", scale = 1.0}  : f32[T, 2, 4]  layer 0  from "m.0.attn"
  output %y
}
"""  # noqa: E501
