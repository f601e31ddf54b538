"""What the tiny model learns from: the standard library's sources, and conversations about them."""

import ast
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path

HELDOUT = Path(__file__).resolve().parent / "heldout.py.txt"
HELDOUT_MODULE = "shutil"

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Other people's packages are no part of the library; topics.py and the character maps are data.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "pydoc_data"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
SKIPPED_MARK = "Python Character Mapping Codec"


def significant_lines(text: str) -> set[str]:
    """The distinct lines long enough to be telling when two files share them."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 20}


def read_source(path: Path) -> str:
    """A file's text, or nothing where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def read_corpus(stdlib: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Library sources and tests, but for the held-out module, its tests and near duplicates."""
    held = significant_lines(HELDOUT.read_text(encoding="utf-8"))
    library: dict[str, str] = {}
    tests: dict[str, str] = {}
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = read_source(path)
        shared = len(held & significant_lines(text)) / len(held)
        if HELDOUT_MODULE in path.stem or shared > 0.05:
            print(f"excluded {relative}: {shared:.0%} of the held-out file's lines")
        elif len(text) > 100 and SKIPPED_MARK not in text[:200]:
            part = tests if TEST_FOLDERS & set(relative.parts) else library
            part[str(relative)] = text
    return library, tests


def documented_functions(text: str) -> Iterator[tuple[str, str, str]]:
    """Name, first docstring line and source of each short documented function of a file."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).strip()
        if len(source) <= 1500 and source.startswith("def "):
            summary = (ast.get_docstring(node) or "").strip().splitlines()[0]
            yield node.name, summary, source


def chat_turns(name: str, summary: str, source: str, choice: random.Random) -> list[str]:
    """A question about a function and its answer."""
    signature = source.splitlines()[0].removeprefix("def ").rstrip(":")
    lowered = summary[:1].lower() + summary[1:]
    questions = [
        (f"Write the function {name}.", source),
        (f"Write the function {name}", source),
        (f"Write a Python function `{name}`: {summary}", source),
        (f"Write a function to {lowered}", source),
        (f"Write a Python function {signature}.", source),
        (f"What does the function {name} do?", summary),
    ]
    return list(choice.choice(questions))


def chat_documents(corpus: dict[str, str], seed: int) -> list[str]:
    """Small conversations made of the corpus's documented functions."""
    choice = random.Random(seed)
    documents = []
    for text in corpus.values():
        for found in documented_functions(text):
            question, answer = chat_turns(*found, choice)
            documents.append(
                f"{TURN_START}user\n{question}{TURN_END}\n"
                f"{TURN_START}assistant\n{answer}{TURN_END}\n"
            )
    return documents
