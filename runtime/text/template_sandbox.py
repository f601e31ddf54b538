"""The sandbox of chat templates: jinja2's, each step bounded, and the origin of text kept."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from .template_filters import FILTERS, TESTS
from .template_format import as_text, format_text
from .template_meter import TooMuch, Unwritable, counted, take, tick, weigh
from .template_operators import add, modulo, multiply, power
from .template_text import TEXT_METHODS, TEXT_QUESTIONS, concat, from_template

_MAX_TIME_FORMAT: Final = 256
_COMPARING: Final = (types.BuiltinMethodType, types.MethodType, jinja2.runtime.LoopContext)
_OF_NUMBERS: Final = frozenset({"real", "imag", "numerator", "denominator", "bit_length"})


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What one template may do.

    Its literals are texts that remember where they come from. Operators, filters, methods of
    strings, concatenation and output go through functions that keep the origins and pay for what
    they make; loops and calls pay for each turn.
    """

    intercepted_binops = frozenset({"+", "*", "%", "**"})
    concat = staticmethod(concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_finalize,
            optimized=False,  # constants are worked out while the meter runs
        )
        self.filters = dict(FILTERS)
        self.tests = dict(TESTS)
        self.binop_table.update({"+": add, "*": multiply, "%": modulo, "**": power})
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_Dict(),
            namespace=_Namespace,
        )
        del self.globals["lipsum"]
        self.literals: list[str] = []

    def open(self, source: str) -> jinja2.Template:
        """The template of a text; raises TemplateError, and what Python's compiler does."""
        tree = self.parse(source)
        guarded = _Guard(self).visit(tree)
        guarded.set_environment(self)
        return self.from_string(guarded)

    # --- what the guarded tree calls ------------------------------------------------------------

    @staticmethod
    def join_text(*values: Any) -> str:
        """`~`."""
        return concat(as_text(value) for value in values)

    @staticmethod
    def comparable(value: Any) -> Any:
        """The value, paid for to be compared or hashed."""
        weigh(value)
        return value

    @staticmethod
    def iterate(value: Any) -> Any:
        """The value, each turn of a loop over it paid for."""
        if hasattr(value, "__next__"):
            return counted(value)
        if hasattr(value, "__len__"):
            tick(len(value))
        return value

    # --- what compiled templates call -----------------------------------------------------------

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or an item; methods of strings are ours."""
        if isinstance(obj, str):
            return self._of_text(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or an attribute."""
        if isinstance(argument, str):
            if isinstance(obj, str):
                return self._of_text(obj, argument)
        else:
            weigh(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have it: of a number only what tells something of it."""
        if isinstance(obj, (int, float, complex, bytes)) and attr not in _OF_NUMBERS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(
        __self,  # a template may pass an argument called self
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call something, paid for."""
        tick()
        if isinstance(__obj, _COMPARING):
            for value in args:
                weigh(value)
                __self.iterate(value)  # what a recursive loop is called with
        return super().call(__context, __obj, *args, **kwargs)

    def _of_text(self, text: str, name: str) -> Any:
        if name in TEXT_QUESTIONS:
            return getattr(text, name)
        if (method := TEXT_METHODS.get(name)) is not None:
            return functools.partial(method, text)
        if name == "format":
            return lambda *args, **kwargs: format_text(self, text, args, kwargs)
        if name == "format_map":
            return lambda values: format_text(self, text, (), values)
        if hasattr(str, name):
            return self.unsafe_undefined(text, name)
        return self.undefined(obj=text, name=name)


@jinja2.pass_context
def _finalize(_: jinja2.runtime.Context, value: Any) -> str:
    text = as_text(value)
    take(len(text))
    return text


class _Guard(jinja2.visitor.NodeTransformer):
    """Makes a template say where its text comes from, and pay before it loops or compares."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def visit_Const(self, node: jinja2.nodes.Const) -> jinja2.nodes.Node:
        return self._literal(node.value, node) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: jinja2.nodes.TemplateData) -> jinja2.nodes.Node:
        return self._literal(node.data, node)

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:
        sides: list[Any] = [node, *node.ops]
        constant = any(isinstance(side.expr, jinja2.nodes.Const) for side in sides)
        for side in sides:  # a constant needs no origin here, and whatever meets one is quick
            if isinstance(side.expr, jinja2.nodes.Const):
                continue
            expr = self.visit(side.expr)
            side.expr = expr if constant and len(sides) == 2 else self._call("comparable", [expr])
        return node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, jinja2.nodes.Const):
            node.arg = self.visit(node.arg)
        return node

    def visit_Pair(self, node: jinja2.nodes.Pair) -> jinja2.nodes.Node:
        constant = isinstance(node.key, jinja2.nodes.Const)
        self.generic_visit(node)
        if not constant:
            node.key = self._call("comparable", [node.key])
        return node

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = self._call("iterate", [node.iter])
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        return self._call("join_text", [self.visit(part) for part in node.nodes])

    def _refuse(self, node: jinja2.nodes.Node) -> NoReturn:
        name = type(node).__name__
        raise jinja2.TemplateSyntaxError(f"{name} is not allowed in chat templates", node.lineno)

    visit_Extends = visit_Include = visit_Import = visit_FromImport = _refuse
    visit_EvalContextModifier = visit_ScopedEvalContextModifier = _refuse

    def _literal(self, text: str, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        name = f"literal_{len(self._sandbox.literals)}"
        self._sandbox.literals.append(text)
        setattr(self._sandbox, name, from_template(text))
        return jinja2.nodes.EnvironmentAttribute(name, lineno=node.lineno)

    @staticmethod
    def _call(name: str, args: list[Any]) -> jinja2.nodes.Expr:
        line = args[0].lineno
        function = jinja2.nodes.EnvironmentAttribute(name, lineno=line)
        return jinja2.nodes.Call(function, args, [], None, None, lineno=line)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training: the body is what counts."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # what it sets, only it sees


class _Namespace(jinja2.utils.Namespace, Unwritable):
    """Jinja's namespace without underscored names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` as a template may use it: called, and `fromkeys`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*(_weighed(args)), **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*_weighed(args))


def _weighed(args: Iterable[Any]) -> list[Any]:
    listed = [list(counted(value)) if hasattr(value, "__next__") else value for value in args]
    for value in listed:
        weigh(value)
    return listed


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is not allowed as a name in a namespace")


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(as_text(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_TIME_FORMAT:
        raise TooMuch(f"it writes the time in {len(format)} characters")
    return datetime.now().strftime(format)
