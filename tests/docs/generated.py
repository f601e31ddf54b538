"""What pages of the documentation say of the code, written from the code itself."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from infc.driver.cli import infc as command_line
from infc.driver.recipe import recipe_schema
from infc.frontend.sources.gguf.architectures import ARCHITECTURES
from infc.frontend.sources.gguf.pretokenizers import PRE_TOKENIZERS
from infc.ir import errors
from infc.ir.backends import find_backend
from infc.ir.ops import Op, all_ops
from infc.ir.ops.base import REQUIRED, AttrSpec
from infc.runtime.engine import EngineStats
from infc.runtime.replicas.replica import ReplicaStats
from infc.runtime.server.metrics import ServerMetrics
from infc.runtime.server.protocol import IGNORED, ChatRequest, CompletionRequest
from infc.runtime.server.settings import limits

from ..configs import CONFIGS
from ..configs.refused import REFUSED
from ..e2e.parity_table import BACKENDS, GREEDY_TOKENS, load_table
from ..emulation.architectures import EMULATED, NOT_COMPILED

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"<!-- from the code: (?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- end -->\n", re.DOTALL
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; `|` within a cell is escaped."""
    lines = [head, ["---" for _ in head], *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def recipe_table() -> str:
    """Every key of a recipe with default, unit and meaning."""
    rows = [
        (f"`{name}`", _default(key), _values(key), key.get("unit", ""), key["description"])
        for name, key in _recipe_keys(recipe_schema())
    ]
    return table(("key", "default", "values", "unit", "what it is for"), rows)


def _recipe_keys(
    schema: Mapping[str, Any], section: Mapping[str, Any] | None = None, prefix: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, key in (section or schema)["properties"].items():
        if "$ref" in key:
            inner = schema["$defs"][key["$ref"].rpartition("/")[2]]
            yield from _recipe_keys(schema, inner, f"{prefix}{name}.")
        else:
            yield prefix + name, key


def _default(key: Mapping[str, Any]) -> str:
    if "default" not in key:
        return "required"
    value = key["default"]
    if value is None:
        return "auto" if "auto" in key["description"] else "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(key: Mapping[str, Any]) -> str:
    if "const" in key:
        return f"`{key['const']}`"
    if "enum" in key or "examples" in key:
        return " ".join(f"`{value}`" for value in key.get("enum") or key["examples"])
    kinds = [one for one in key.get("anyOf", [key]) if one.get("type") != "null"]
    kind = kinds[0].get("type", "mapping, list or text")
    if key.get("unit") == "bytes":
        return "size such as `1GiB`"
    if "multipleOf" in kinds[0]:
        low, high = kinds[0]["minimum"], kinds[0]["maximum"]
        return f"a multiple of {kinds[0]['multipleOf']}, {low} to {high}"
    if "minimum" in kinds[0] and kinds[0].get("maximum", 2**31 - 1) < 2**31 - 1:
        return f"{kinds[0]['minimum']} to {kinds[0]['maximum']}"
    least = kinds[0].get("minimum")
    words = {"integer": f"{least} or more", "boolean": "`true` `false`", "string": "text"}
    return words.get(kind, str(kind))


def op_table() -> str:
    """Every op of the dialect with operands, attributes, and meaning."""
    text = ""
    ops = all_ops()
    for kind in dict.fromkeys(op.kind for op in ops):
        rows = [(_signature(op), _one_line(op.doc)) for op in ops if op.kind is kind]
        text += f"## {kind.value}\n\n{table(('op', 'meaning'), rows)}\n"
    return text.rstrip("\n") + "\n"


def _signature(op: Op) -> str:
    attrs = ", ".join(_attr(spec) for spec in op.attrs)
    return f"`{op.name}({', '.join(op.operands)})`" + (f" `{{{attrs}}}`" if attrs else "")


def _attr(spec: AttrSpec) -> str:
    if spec.default is REQUIRED:
        return spec.name
    shown = str(spec.default)
    return f"{spec.name} = {shown.lower() if shown in ('None', 'True', 'False') else shown}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def command_help() -> str:
    """The help of every command, as the command itself prints it."""
    return "".join(
        f"## {' '.join(path)}\n\n```\n{help_text(path, command)}\n```\n\n"
        for path, command in commands()
    )


def help_text(path: tuple[str, ...], command: click.Command) -> str:
    """What `infc COMMAND --help` prints in a wide terminal."""
    context = click.Context(command_line, info_name=path[0], **command_line.context_settings)
    for name in path[1:-1]:
        context = click.Context(click.Group(name), parent=context, info_name=name)
    context = click.Context(command, parent=context, info_name=path[-1], terminal_width=98)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, as the words that call it."""
    yield from _below(("infc",), command_line)


def _below(
    path: tuple[str, ...], group: click.Group
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _below((*path, name), command)
        else:
            yield (*path, name), command


def error_table() -> str:
    """Every kind of error with its exit status."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.InfcError)
    ]
    rows = [
        (str(kind.exit_code), f"`{kind.__name__}`", _one_line(inspect.getdoc(kind) or ""))
        for kind in sorted(kinds[1:], key=lambda kind: kind.exit_code)
    ]
    return table(("status", "error", "what it means"), rows)


def refused_fields() -> str:
    """Fields of a request that are refused unless they ask for what happens anyway."""
    both = {**CompletionRequest.NOT_BUILT, **ChatRequest.NOT_BUILT}
    rows = []
    for name in sorted(both):
        homes = [
            route
            for route, kind in (("completions", CompletionRequest), ("chat", ChatRequest))
            if name in kind.NOT_BUILT
        ]
        allowed = " ".join(f"`{_json(value)}`" for value in both[name]) or "-"
        rows.append((f"`{name}`", ", ".join(homes), allowed))
    rest = " ".join(f"`{name}`" for name in sorted(IGNORED))
    return table(("field", "of", "accepted as"), rows) + f"\nAccepted and ignored: {rest}.\n"


def server_limits() -> str:
    """Every limit of a server with its default and meaning."""
    rows = [
        (
            f"`{limit.flag}`",
            "-" if limit.default is None else f"{limit.default:.12g}",
            limit.unit,
            limit.doc,
        )
        for limit in limits()
    ]
    return table(("option", "default", "unit", "what for"), rows)


def server_metrics() -> str:
    """Every metric of ours."""
    stats = EngineStats(0, 0, 0, 0, 0, 0)
    replica = ReplicaStats(0, "ready", None, 0, 0, stats)
    served: Any = types.SimpleNamespace(
        watch_steps=lambda on_step: None, stats=lambda: stats, replicas=lambda: [replica]
    )
    rows = []
    for family in ServerMetrics(served, {"version": "", "backend": "", "model_name": ""}).collect():
        ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = sorted(family.samples[0].labels) if family.type == "info" else []
        labels = labels or list(getattr(family, "_labelnames", ()))
        shown = f"{{{', '.join(labels)}}}" if labels else ""
        rows.append((f"`{family.name}{ending}{shown}`", family.type, family.documentation))
    return table(("metric", "type", "what it says"), rows)


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


def architecture_table() -> str:
    """Every architecture that is compiled in tests: what is special, and what parity measured."""
    measured = load_table()
    rows = []
    for kind in dict.fromkeys(small.kind for small in CONFIGS.values()):
        names = [name for name, small in CONFIGS.items() if small.kind == kind]
        shows = "; ".join(CONFIGS[name].shows for name in names if CONFIGS[name].shows)
        errors = [max((measured[name][each] for name in names), key=float) for each in BACKENDS]
        tokens = f"{GREEDY_TOKENS} of {GREEDY_TOKENS}"
        compiled = "no" if set(names) & NOT_COMPILED.keys() else "yes"
        emulated = "yes" if kind in EMULATED else ""
        rows.append((f"`{kind}`", shows, *errors, tokens, compiled, emulated))
    errors_of = (f"error, `{each}`" for each in BACKENDS)
    head = ("architecture", "tested with", *errors_of, "tokens", "for `sm_90`", "emulated")
    return table(head, rows)


def refused_models() -> str:
    """Every model that tests see refused, and the words."""
    return table(
        ("model", "why"), [(f"`{name}`", f"`{one.reason}`") for name, one in REFUSED.items()]
    )


def gguf_table() -> str:
    """What is read from GGUF files."""
    spelled = {
        "architectures": sorted(ARCHITECTURES),
        "pre-tokenizers of `gpt2` tokenizers": sorted(PRE_TOKENIZERS),
    }
    rows = [(what, " ".join(f"`{name}`" for name in names)) for what, names in spelled.items()]
    return table(("in the file", "supported"), rows)


def backend_options(name: str) -> Callable[[], str]:
    """Every key of a backend's section in a recipe."""

    def options() -> str:
        section: Any = find_backend(name).load_section()
        hints = get_type_hints(section)
        rows = []
        for one in fields(section):
            factory = one.default_factory
            shown = one.default if factory is MISSING else factory()
            values = _option_values(hints[one.name])
            rows.append(
                (
                    f"`{name}.{one.name}`",
                    f"`{str(shown).lower() if isinstance(shown, bool) else shown}`",
                    values,
                    one.metadata["doc"],
                )
            )
        return table(("key", "default", "values", "what it is for"), rows)

    return options


def _option_values(kind: Any) -> str:
    """What an option may be: one of some words, a list of a kind, or a truth value."""
    if get_origin(kind) is list:
        (element,) = get_args(kind)
        return f"list of {'integers' if element is int else 'text'}"
    return " ".join(f"`{value}`" for value in get_args(kind) or ("true", "false"))


BLOCKS: dict[str, Callable[[], str]] = {
    "recipe-keys": recipe_table,
    "ops": op_table,
    "command-help": command_help,
    "errors": error_table,
    "refused-fields": refused_fields,
    "architectures": architecture_table,
    "refused-models": refused_models,
    "gguf-architectures": gguf_table,
    "server-limits": server_limits,
    "server-metrics": server_metrics,
    "onnx-options": backend_options("onnx"),
    "tensorrt-options": backend_options("tensorrt"),
}


def refreshed(text: str) -> str:
    """A page with every block between its marks written anew."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- from the code: {name} -->\n\n{BLOCKS[name]().strip()}\n\n<!-- end -->\n"

    return BLOCK.sub(block, text)
