"""Programs from text: a recursive-descent parser whose errors say line and column."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from .errors import ParseError, ProgramError
from .lexer import Lexer, Token, TokenReader
from .ops import PHASES, get_op
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
)
from .resources import KINDS, STORED_TYPES, KvGroup, Resource
from .types import ELEMENT_TYPES, Dim, DType, Sym, SymbolRange, TensorType

_T = TypeVar("_T")
_DEFAULT_RANGE = SymbolRange(1, 1 << 20)


def parse_program(text: str, *, source: str = "<text>") -> Program:
    """The program that a text spells; ParseError with line and column where it spells none.

    Attributes an op declares with a default may be left out and are filled in. What a weight is
    made from may be left out: it is then the checkpoint tensor of its own name. So may the spec
    and the bounds of symbols.
    """
    return _Parser(text, source).program()


def parse_expr(text: str, *, source: str = "<text>") -> WeightExpr:
    """The weight expression that a text spells; ParseError where it spells none."""
    parser = _Parser(text, source)
    expr = parser.expr()
    parser.expect("end")
    return expr


class _Parser(TokenReader):
    def __init__(self, text: str, source: str) -> None:
        super().__init__(Lexer(text, source))
        self.values: dict[str, Value] = {}
        self.symbols: dict[str, SymbolRange] = {}
        self.weights: dict[str, Weight] = {}
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.outputs: list[Value] = []
        self.output_names: list[str] = []
        self.resources: list[Resource] = []
        self.attrs: dict[str, Attr] = {}
        self.spec: ModelSpec | None = None

    def attr(self) -> Attr:
        token = self.take()
        if token.kind == "string":
            return self.string(token)
        if token.kind == "number":
            return float(token.text)
        if token.kind == "integer":
            self.at -= 1
            return self.integer()
        if token.kind == "word" and token.text in ("none", "true", "false"):
            return {"none": None, "true": True, "false": False}[token.text]
        if token.text == "(" and token.kind == "mark":
            return tuple(self.nested(lambda: self.listing(")", self.attr)))
        found = repr(token.text) if token.text else "the end of the text"
        raise self.lexer.error(f"expected an attribute's value, found {found}", token.offset)

    def attr_map(self) -> dict[str, Attr]:
        self.mark("{")
        result: dict[str, Attr] = {}

        def entry() -> None:
            token = self.take()
            if token.kind not in ("word", "string"):
                self.fail("expected an attribute's name", token)
            name = self.string(token) if token.kind == "string" else token.text
            if name in result:
                self.fail(f"attribute {name} is given twice", token)
            self.mark("=")
            result[name] = self.attr()

        self.listing("}", entry)
        return result

    def dim(self) -> Dim:
        token = self.token
        scale = 1
        if token.kind == "integer":
            scale = self.integer()
            if not self.accept("*"):
                if scale < 0:
                    self.fail(f"a dimension cannot be {scale}", token)
                return scale
        if scale < 1:
            self.fail(f"a symbol's scale is at least 1, not {scale}", token)
        name = self.expect("word").text
        offset = 0
        if self.accept("+") or (self.token.kind == "integer" and self.token.text.startswith("-")):
            offset = self.integer()
        return Sym(name, scale, offset)

    def tensor_type(self) -> TensorType:
        token = self.expect("word")
        try:
            dtype = DType(token.text)
        except ValueError:
            known = ", ".join(kind.value for kind in DType)
            self.fail(f"unknown element type {token.text!r}; known: {known}", token)
        self.mark("[")
        return TensorType(dtype, tuple(self.listing("]", self.dim)))

    def name(self) -> str:
        """A value's or weight's name, behind its mark."""
        token = self.expect("name")
        return self.string(token) if token.text.startswith('"') else token.text

    def define(self, token: Token, name: str, kind: TensorType) -> Value:
        if name in self.values:
            self.fail(f"%{name} is defined twice", token)
        value = self.values[name] = Value(name, kind)
        return value

    def use(self) -> Value:
        token = self.mark("%")
        name = self.name()
        if name not in self.values:
            self.fail(f"%{name} is not defined above", token)
        return self.values[name]

    def program(self) -> Program:
        self.expect("word", "program")
        name = self.string(self.expect("string"))
        phase = "captured"
        if self.accept("phase"):
            token = self.expect("word")
            phase = token.text
            if phase not in PHASES:
                self.fail(f"unknown phase {phase!r}; known: {', '.join(PHASES)}", token)
        self.mark("{")
        while not self.accept("}"):
            self.statement()
        self.expect("end")
        return Program(
            name,
            self.symbols,
            tuple(self.inputs),
            tuple(self.nodes),
            tuple(self.outputs),
            self.weights,
            self.spec or EMPTY_SPEC,
            phase,
            tuple(self.resources),
            self.attrs,
            output_names=tuple(self.output_names),
        )

    def statement(self) -> None:
        token = self.token
        if token.text == "%":
            return self.node()
        if token.kind != "word":
            found = repr(token.text) if token.text else "the end of the text"
            self.fail(f"expected a statement, found {found}")
        following = self.lexer.tokens[self.at + 1]
        if following.text == "(":
            return self.node()
        parse = {
            "symbol": self.symbol,
            "spec": self.spec_statement,
            "attr": self.attr_statement,
            "resource": self.resource,
            "weight": self.weight,
            "input": self.input,
            "output": self.output,
        }.get(token.text)
        if parse is None:
            self.fail(f"unknown statement {token.text!r}")
        self.take()
        return parse()

    def symbol(self) -> None:
        token = self.expect("word")
        if token.text in self.symbols:
            self.fail(f"symbol {token.text} is declared twice", token)
        bounds = _DEFAULT_RANGE
        if self.accept(":"):
            low = self.integer()
            self.mark("..")
            bounds = SymbolRange(low, self.integer())
            if bounds.low > bounds.high:
                self.fail(f"the bounds of {token.text} are empty", token)
        self.symbols[token.text] = bounds

    def record(self, kind: type[_T], given: dict[str, Attr], what: str, token: Token) -> _T:
        """A dataclass from its fields as attributes; each is checked by name and type."""
        known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
        for name, value in given.items():
            if name not in known:
                self.fail(f"{what} has no field {name}", token)
            if not _fits(value, str(known[name].type)):
                self.fail(f"field {name} of {what} cannot be {value!r}", token)
        missing = [n for n, f in known.items() if n not in given and f.default is MISSING]
        if missing:
            self.fail(f"{what} lacks {', '.join(missing)}", token)
        make: Callable[..., _T] = kind
        return make(**given)

    def spec_statement(self) -> None:
        token = self.token
        if self.spec is not None:
            self.fail("the spec is given twice")
        given = self.attr_map()
        for item in fields(ModelSpec):
            if item.default is MISSING:
                given.setdefault(item.name, "none" if item.name == "architecture" else 0)
        self.spec = self.record(ModelSpec, given, "the spec", token)
        if self.spec.dtype is not None:
            self.check_dtype(self.spec.dtype, "the spec", token)

    def attr_statement(self) -> None:
        token = self.token
        for name, value in self.attr_map().items():
            if name in self.attrs:
                self.fail(f"attribute {name} is given twice", token)
            self.attrs[name] = value

    def resource(self) -> None:
        token = self.take()
        if token.kind not in ("word", "string"):
            self.fail("expected a resource's name", token)
        name = self.string(token) if token.kind == "string" else token.text
        given: dict[str, Attr] = {"name": name, **self.attr_map()}
        named = given.pop("kind", KvGroup.kind)
        kind = KINDS.get(named) if isinstance(named, str) else None
        if kind is None:
            self.fail(
                f"unknown kind {named!r} of resource {name}; known: {', '.join(KINDS)}", token
            )
        resource = self.record(kind, given, f"resource {name}", token)
        self.check_dtype(resource.dtype, f"resource {name}", token, STORED_TYPES)
        self.resources.append(resource)

    def check_dtype(
        self, name: str, what: str, token: Token, known: Collection[str] = ELEMENT_TYPES
    ) -> None:
        if name not in known:
            self.fail(f"unknown element type {name!r} of {what}", token)

    def weight(self) -> None:
        token = self.mark("@")
        name = self.name()
        if name in self.weights:
            self.fail(f"@{name} is defined twice", token)
        self.mark(":")
        kind = self.tensor_type()
        expr = self.expr() if self.accept("=") else WeightExpr("checkpoint", (), {"name": name})
        self.weights[name] = Weight(name, kind, expr)

    def expr(self) -> WeightExpr:
        op = self.expect("word").text
        attrs = self.attr_map() if self.token.text == "{" else {}
        inputs: list[WeightExpr] = []
        if self.accept("("):
            inputs = self.nested(lambda: self.listing(")", self.expr))
        return WeightExpr(op, tuple(inputs), attrs)

    def input(self) -> None:
        token = self.mark("%")
        name = self.name()
        self.mark(":")
        self.inputs.append(self.define(token, name, self.tensor_type()))

    def output(self) -> None:
        self.one_output()
        while self.accept(","):
            self.one_output()

    def one_output(self) -> None:
        token = self.token
        if token.kind in ("word", "string"):
            name = self.string(self.take()) if token.kind == "string" else self.take().text
            if name in self.output_names:
                self.fail(f"two outputs have the name {name}", token)
            self.mark("=")
            self.output_names.append(name)
        self.outputs.append(self.use())
        if len(self.output_names) not in (0, len(self.outputs)):
            self.fail("either all outputs have names, or none", token)

    def operand(self) -> Operand:
        token = self.token
        if token.text == "%" and token.kind == "mark":
            return self.use()
        if self.accept("@"):
            name = self.name()
            if name not in self.weights:
                self.fail(f"@{name} is not declared above", token)
            return WeightRef(name)
        value = self.attr()
        if not isinstance(value, (bool, int, float)):
            self.fail("expected a value, a weight or a literal", token)
        return value

    def node(self) -> None:
        results: list[tuple[Token, str]] = []
        while self.token.text == "%":
            results.append((self.mark("%"), self.name()))
            if not self.accept(","):
                self.mark("=")
                break
        token = self.expect("word")
        self.mark("(")
        inputs = tuple(self.listing(")", self.operand))
        attrs = self.attr_map() if self.token.text == "{" else {}
        kinds: list[TensorType] = []
        if results:
            self.mark(":")
            kinds.append(self.tensor_type())
            while self.accept(","):
                kinds.append(self.tensor_type())
        if len(kinds) != len(results):
            self.fail(f"{len(results)} results, but {len(kinds)} types", token)
        attrs = self.complete(token, inputs, attrs)
        layer = self.integer() if self.accept("layer") else None
        source = self.string(self.expect("string")) if self.accept("from") else None
        pairs = zip(results, kinds, strict=True)
        outputs = tuple(self.define(at, name, kind) for (at, name), kind in pairs)
        self.nodes.append(Node(token.text, inputs, outputs, attrs, layer, source))

    def complete(
        self, token: Token, inputs: tuple[Operand, ...], attrs: dict[str, Attr]
    ) -> dict[str, Attr]:
        types = [
            operand.type
            if isinstance(operand, Value)
            else self.weights[operand.name].type
            if isinstance(operand, WeightRef)
            else operand
            for operand in inputs
        ]
        try:
            op = get_op(token.text)
            if not op.accepts_count(len(types)):
                raise ProgramError(f"{op.name} cannot take {len(types)} operands")
            return op.complete(attrs, types)
        except ParseError:
            raise
        except ProgramError as error:
            self.fail(str(error), token)


def _fits(value: Any, annotation: str) -> bool:
    """Whether an attribute's value can be a field of a dataclass with that annotation."""
    if annotation == "str":
        return isinstance(value, str)
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in ("int | None", "str | None"):
        return value is None or _fits(value, annotation.removesuffix(" | None"))
    inner = "int | None" if "None" in annotation else "int"
    return isinstance(value, tuple) and all(_fits(part, inner) for part in value)
