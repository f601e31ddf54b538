"""Programs as text: the printer; the parser (`ir/parser.py`) is exported beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from .ops import get_op
from .ops.base import REQUIRED
from .parser import parse_expr, parse_program
from .program import (
    EMPTY_SPEC,
    Attr,
    ModelSpec,
    Node,
    Operand,
    Program,
    Value,
    Weight,
    WeightExpr,
    WeightRef,
    exact_key,
)
from .resources import Resource

__all__ = ["parse_expr", "parse_program", "print_expr", "print_node", "print_program"]

_PLAIN = re.compile(r"[A-Za-z0-9_]+(?:[.\-][A-Za-z0-9_]+)*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def print_program(program: Program) -> str:
    """The program as text; `parse_program` gives back an equal one.

    What the parser fills in is left out: attributes at their defaults, and what a weight is made
    from where that is the tensor of its name. Weights stand in the order in which nodes read them,
    those that nothing reads behind.
    """
    lines = [f"program {_string(program.name)} phase {program.phase} {{"]
    for name, bounds in program.symbols.items():
        lines.append(f"  symbol {name}: {bounds.low}..{bounds.high}")
    if program.spec != EMPTY_SPEC:
        lines.append(f"  spec {_attrs(_spec_attrs(program.spec))}")
    if program.attrs:
        lines.append(f"  attr {_attrs(program.attrs)}")
    for resource in program.resources:
        lines.append(f"  resource {_key(resource.name)} {_attrs(_resource_attrs(resource))}")
    for weight in _by_use(program):
        text = f"  weight {_operand(WeightRef(weight.name))}: {weight.type}"
        its_own = weight.expr == WeightExpr("checkpoint", (), {"name": weight.name})
        lines.append(text if its_own else f"{text} = {print_expr(weight.expr)}")
    for value in program.inputs:
        lines.append(f"  input {_operand(value)}: {value.type}")
    lines.extend(f"  {print_node(node)}" for node in program.nodes)
    if program.outputs:
        named = [f"{_key(name)} = " for name in program.output_names] or [""] * len(program.outputs)
        pairs = zip(named, program.outputs, strict=True)
        lines.append(f"  output {', '.join(name + _operand(value) for name, value in pairs)}")
    return "\n".join([*lines, "}", ""])


def print_node(node: Node) -> str:
    """One node as a line of text."""
    results = ", ".join(_operand(value) for value in node.outputs)
    text = f"{results} = " if node.outputs else ""
    text += f"{node.op}({', '.join(_operand(operand) for operand in node.inputs)})"
    if attrs := spoken_attrs(node):
        text += f" {_attrs(attrs)}"
    if node.outputs:
        text += f" : {', '.join(str(value.type) for value in node.outputs)}"
    if node.layer is not None:
        text += f"  layer {node.layer}"
    if node.source is not None:
        text += f"  from {_string(node.source)}"
    return text


def spoken_attrs(node: Node) -> dict[str, Attr]:
    """The attributes of a node that are not at their op's defaults, which readers fill in."""
    defaults = {spec.name: spec.default for spec in get_op(node.op).attrs}
    return {
        name: value
        for name, value in node.attrs.items()
        if (default := defaults.get(name, REQUIRED)) is REQUIRED
        or exact_key(value) != exact_key(default)
    }


def _by_use(program: Program) -> list[Weight]:
    used = dict.fromkeys(ref.name for node in program.nodes for ref in node.weights())
    names = [name for name in used if name in program.weights]
    names += [name for name in program.weights if name not in used]
    return [program.weights[name] for name in names]


def print_expr(expr: WeightExpr) -> str:
    """A weight expression as text, e.g. `concat{dim = 0}(checkpoint{name = "a"}, ...)`."""
    text = expr.op + (_attrs(expr.attrs) if expr.attrs else "")
    if expr.inputs:
        text += f"({', '.join(print_expr(part) for part in expr.inputs)})"
    return text


def print_attr(value: Attr) -> str:
    """An attribute's value as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        inner = ", ".join(print_attr(part) for part in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(value)


def _spec_attrs(spec: ModelSpec) -> dict[str, Attr]:
    attrs = {name: getattr(spec, name) for name in ModelSpec.__dataclass_fields__}
    return {name: value for name, value in attrs.items() if value is not None}


def _resource_attrs(resource: Resource) -> dict[str, Attr]:
    return {name: value for name, value in resource.plain().items() if name != "name"}


def _attrs(attrs: Mapping[str, Attr]) -> str:
    inner = ", ".join(f"{_key(name)} = {print_attr(value)}" for name, value in attrs.items())
    return f"{{{inner}}}"


def _operand(operand: Operand) -> str:
    if isinstance(operand, Value):
        return f"%{_name(operand.name)}"
    if isinstance(operand, WeightRef):
        return f"@{_name(operand.name)}"
    return print_attr(operand)


def _key(name: str) -> str:
    plain = _IDENTIFIER.fullmatch(name) and name not in ("inf", "nan")  # those are numbers
    return name if plain else _string(name)


def _name(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else _string(name)


def _string(text: str) -> str:
    # JSON's escapes; a lone surrogate survives because everything outside ASCII is escaped.
    return json.dumps(text)
