"""Reads PTX: the entry of a module, its parameters, registers, labels, and lines of the source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from .errors import EmulationError


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a kernel, `offset` bytes into the packed buffer."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. `line` is where its source says it comes from."""

    opcode: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    line: str
    text: str


@dataclass(frozen=True, slots=True)
class Module:
    """A module's only kernel.

    `widths` are the bits of each register or family of registers, 1 for predicates; families that
    are local to inline assembly end with `#`. `shared` are the offsets of names of shared memory.
    """

    entry: str
    parameters: tuple[Parameter, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    widths: dict[str, int]
    shared: dict[str, int]
    static_bytes: int
    threads: int
    target: str

    @property
    def parameter_bytes(self) -> int:
        """Of the packed buffer, without padding at its end."""
        last = self.parameters[-1] if self.parameters else Parameter("", 0, 0)
        return last.offset + last.num_bytes


_ENTRY: Final = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{", flags=re.S)
_PARAMETER: Final = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)(.*)", flags=re.S)
_SHARED: Final = re.compile(
    r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)\s+([\w$]+)(?:\[(\d*)\])?"
)
_STATEMENT: Final = re.compile(r"^(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", flags=re.S)


def read_module(text: str) -> Module:
    """The kernel of a module; EmulationError where it has none or more than one."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise EmulationError(f"the PTX has {len(entries)} kernels, and one is expected")
    entry, parameters, directives = entries[0].groups()
    body = _within_braces(text[entries[0].end() :])
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?", directives)
    if threads is None:
        raise EmulationError(f"the PTX of {entry} does not say how many threads a block has")
    target = re.search(r"\.target\s+(\w+)", text)
    shared, static_bytes = _shared_names(text)
    reader = _Body()
    reader.read(body)
    return Module(
        entry=entry,
        parameters=tuple(_parameters(parameters)),
        instructions=tuple(reader.instructions),
        labels=reader.labels,
        widths=reader.widths,
        shared=shared,
        static_bytes=static_bytes,
        threads=int(threads[1]) * int(threads[2] or 1),
        target=target[1] if target else "",
    )


def split_operands(text: str) -> tuple[str, ...]:
    """At the commas outside of braces and brackets."""
    found, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            found.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        found.append(current.strip())
    return tuple(found)


def members(text: str) -> tuple[str, ...]:
    """The registers of `{%r1, %r2}`, or the only one."""
    return tuple(part.strip() for part in text.strip("{} ").split(",") if part.strip())


def _within_braces(text: str) -> str:
    """Up to the brace that closes what was opened before the text; comments have braces as well."""
    depth = 1
    plain = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)
    for brace in re.finditer(r"[{}]", plain):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[: brace.start()]
    raise EmulationError("the PTX of the kernel does not end")


def _parameters(text: str) -> Iterator[Parameter]:
    offset = 0
    for declared in text.split(","):
        found = _PARAMETER.search(declared)
        if found is None:
            continue
        size = int(found[2]) // 8
        array = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", found[3])
        assert array is not None
        alignment = max(int(found[1] or 1), size)
        size *= int(array[2] or 1)
        offset = -(-offset // alignment) * alignment
        yield Parameter(array[1], offset, size)
        offset += size


def _shared_names(text: str) -> tuple[dict[str, int], int]:
    """Static arrays first; arrays without a size share what is left, the dynamic memory."""
    static, dynamic, offset, dynamic_alignment = {}, [], 0, 16
    for alignment, bits, name, count in _SHARED.findall(text):
        width = int(bits) // 8
        align = int(alignment or width)
        if count == "" and f"{name}[]" in text:
            dynamic.append(name)
            dynamic_alignment = max(dynamic_alignment, align)
            continue
        offset = -(-offset // align) * align
        static[name] = offset
        offset += width * int(count or 1)
    offset = -(-offset // dynamic_alignment) * dynamic_alignment
    return {**static, **dict.fromkeys(dynamic, offset)}, offset


@dataclass(slots=True)
class _Body:
    """Reads the statements between the braces of a kernel."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    line: str = ""
    inline: int = 0
    """How many pieces of inline assembly have begun: their names are local to them."""

    local: set[str] = field(default_factory=set)
    """Registers that the present piece declares; families of numbered ones end with `#`."""

    def read(self, body: str) -> None:
        pending = ""
        for raw in body.split("\n"):
            if "begin inline asm" in raw:
                self.inline += 1
                self.local.clear()
            code, _, comment = raw.partition("//")
            code = code.strip()
            if code.startswith(".loc"):
                self.line = comment.strip() or code
            elif re.match(r"^[$\w]+:$", code):
                self.labels[self._label(code[:-1])] = len(self.instructions)
            elif code:
                pending = self._statements(f"{pending} {code}".strip())
        if pending.strip("{} "):
            raise EmulationError(f"a statement does not end: {pending!r}")

    def _label(self, name: str) -> str:
        return name if name.startswith("$") else f"{name}@{self.inline}"

    def _resolved(self, text: str) -> str:
        """Local names with the number of their piece, before the number of the register."""

        def rename(name: re.Match[str]) -> str:
            if name[0] in self.local:
                return f"{name[0]}@{self.inline}"
            family = name[0].rstrip("0123456789")
            if f"{family}#" in self.local:
                return f"{family}@{self.inline}#{name[0].removeprefix(family)}"
            return name[0]

        if not self.local:
            return text
        return re.sub(r"(?<![%$.\w])[A-Za-z_]\w*", rename, text)

    def _statements(self, code: str) -> str:
        """Read what ends with a semicolon; give back the rest, which the next line goes on with."""
        *whole, rest = code.split(";")
        for text in whole:
            text = text.strip()
            # Braces of scopes stand before a statement or alone; those of operands never begin one.
            while text[:1] in ("{", "}"):
                text = text[1:].strip()
            if text.startswith(".reg"):
                self._registers(text)
            elif text and not text.startswith("."):
                self._instruction(text)
        return "" if rest.strip() in ("{", "}", "") else rest

    def _registers(self, text: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, flags=re.S)
        assert found is not None
        width = 1 if found[1] == "pred" else int(re.sub(r"\D", "", found[1]))
        for name in found[2].split(","):
            one, numbered, _ = name.strip().partition("<")
            if not one.startswith("%"):
                self.local.add(one + ("#" if numbered else ""))
                one = f"{one}@{self.inline}" + ("#" if numbered else "")
            self.widths[one] = width

    def _instruction(self, text: str) -> None:
        found = _STATEMENT.match(text)
        if found is None:
            raise EmulationError(f"{self.line}: cannot read {text!r}")
        operands = tuple(map(self._resolved, split_operands(found[4])))
        if found[3].partition(".")[0] == "bra":
            operands = (*operands[:-1], self._label(operands[-1]))
        self.instructions.append(
            Instruction(
                opcode=found[3],
                parts=tuple(found[3].split(".")),
                operands=operands,
                predicate=found[2] and self._resolved(found[2]),
                negated=found[1] == "!",
                line=self.line,
                text=" ".join(text.split()),
            )
        )
