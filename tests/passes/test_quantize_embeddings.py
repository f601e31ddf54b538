"""Which tables are quantized, to what, and when a table and the head are the same codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import UsageError
from infc.ir.interpret import interpret
from infc.ir.program import ModelSpec, Node, Program, Value, WeightExpr
from infc.ir.schemes import AUTO, NONE, SCHEMES
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify
from infc.ir.weights import program_weights
from infc.passes.base import PassContext, PassResult
from infc.passes.quantize_weights import QuantizeWeights
from infc.passes.samples import with_random_weights
from infc.passes.verification import Verifier

VOCAB, WIDTH = 50, 40
IDS = torch.tensor([3, 49, 0, 3])


def model(*, tied: bool = True, narrow_head: bool = False) -> Program:
    """Tokens and positions looked up, and a head: of the table of tokens, or of its own."""
    b = ProgramBuilder("model", ModelSpec("model", 1, WIDTH, 1, 1, WIDTH, VOCAB, 64))
    b.symbol("T", 1, 64)
    ids, positions = (
        b.input(name, TensorType(DType.I64, (Sym("T"),))) for name in ("input_ids", "positions")
    )
    kind = TensorType(DType.F32, (VOCAB, WIDTH))
    table = b.weight("embed.weight", kind)
    places = b.weight("places", TensorType(DType.F32, (64, WIDTH)))
    viewed = b.emit("reshape", ids, shape=("T",))
    x = b.emit("add", b.emit("embedding", table, viewed), b.emit("embedding", places, positions))
    head = table if tied else b.weight("head.weight", kind)
    if narrow_head:
        source = b.weights["embed.weight"].expr
        expr = WeightExpr("cast", (source,), {"dtype": "bf16"})
        head = b.weight("embed.weight.bf16", TensorType(DType.BF16, kind.shape), expr)
    b.output(b.emit("linear", x, head))
    return with_random_weights(b.build())


def quantize(program: Program, **options: str) -> PassResult:
    result = QuantizeWeights(**{"scheme": "int8", **options}).run(program, PassContext())
    verify(result.program)
    return result


def table_of(program: Program) -> Node:
    """What looks up tokens."""
    found = [node for node in program.nodes if node.op in ("embedding", "scaled_embedding")]
    return found[0]


def scheme_of(node: Node) -> str:
    return str(node.attrs.get("scheme", NONE))


def head_of(program: Program) -> Node:
    return program.nodes[-1]


@pytest.mark.parametrize("narrow_head", [False, True])
@pytest.mark.parametrize(("scheme", "head"), [("int8", ""), ("int4", "int8"), ("q4_1", "")])
def test_a_tied_table_is_the_codes_of_the_head(scheme: str, head: str, narrow_head: bool) -> None:
    after = quantize(model(narrow_head=narrow_head), scheme=scheme, head=head).program
    table, product = table_of(after), head_of(after)
    assert scheme_of(table) == scheme_of(product) == (head or scheme)
    assert table.inputs[:2] == product.inputs[2:]
    assert {name.split(".")[0] for name in after.weights} == {"embed", "places"}
    assert len(after.weights) == 3


@pytest.mark.parametrize(
    ("scheme", "table"),
    [
        *[("int8", "int8"), ("int8-token", "int8"), ("int4", "int4"), ("q4_0", "q4_0")],
        *[("fp8", "fp8"), ("fp8-block-weights", "fp8-block-weights")],
    ],
)
def test_a_table_of_its_own_is_int8_or_has_4_bits_or_e4m3_too(scheme: str, table: str) -> None:
    after = quantize(model(tied=False), scheme=scheme).program
    assert (scheme_of(table_of(after)), scheme_of(head_of(after))) == (table, scheme)
    assert len(after.weights) == 5


@pytest.mark.parametrize(
    ("options", "table", "head"),
    [
        ({"embedding": "none"}, NONE, "int8"),
        ({"embedding": "int4"}, "int4", "int8"),
        ({"head": "none"}, NONE, NONE),
        ({"head": "none", "embedding": "q8_0"}, "q8_0", NONE),
        ({"rules": "lm_head=int4"}, "int4", "int4"),
        ({"rules": "embed=int4"}, "int4", "int4"),
        ({"rules": "lm_head=q8_0 embed=int4"}, "int4", "q8_0"),
        ({"skip": "embed"}, NONE, NONE),
        ({"skip": "lm_head", "embedding": "int4"}, "int4", NONE),
        ({"scheme": "none", "head": "int4"}, "int4", "int4"),
        ({"scheme": "none", "embedding": "int4"}, "int4", NONE),
        ({"scheme": "none", "rules": "places=int4"}, NONE, NONE),
    ],
)
def test_options_and_rules_choose(options: dict[str, str], table: str, head: str) -> None:
    after = quantize(model(), **options).program
    assert (scheme_of(table_of(after)), scheme_of(head_of(after))) == (table, head)
    names = {ref.name for node in (table_of(after), head_of(after)) for ref in node.weights()}
    is_shared = len(names) == (1 if head == NONE else 2)
    assert is_shared == (table == head)


def test_of_other_tables_only_those_that_a_rule_names() -> None:
    def places(program: Program) -> Node:
        return [node for node in program.nodes if "embedding" in node.op][1]

    plain = quantize(model())
    assert scheme_of(places(plain.program)) == NONE
    assert any("no tokens are looked up in it" in str(miss) for miss in plain.near_misses)
    after = quantize(model(), rules="place*=int4").program
    assert scheme_of(places(after)) == "int4"
    assert scheme_of(table_of(after)) == "int8"


def test_tables_that_were_computed_stay_whatever_the_rule() -> None:
    b = ProgramBuilder("rotary")
    b.symbol("T", 1, 64)
    positions = b.input("positions", TensorType(DType.I64, (Sym("T"),)))
    expr = WeightExpr("data", (), {"key": "cos"})
    b.output(b.emit("embedding", b.weight("cos", TensorType(DType.F32, (64, 8)), expr), positions))
    with pytest.raises(UsageError, match=r"no matrix is named \*"):
        quantize(b.build(), rules="*=int8")


def test_the_scheme_of_a_rule_follows_the_last_equals_sign() -> None:
    one = QuantizeWeights(scheme="int8", rules="a=b=int4")
    assert one.allowed_error == SCHEMES["int4"].tolerance
    with pytest.raises(UsageError, match="no matrix is named a=b"):
        one.run(model(), PassContext())


@pytest.mark.parametrize("options", [{"skip": "lost"}, {"rules": "lost=none"}])
def test_patterns_need_a_match_if_nothing_is_quantized_too(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="no matrix is named lost"):
        quantize(model(), scheme="none", **options)


def test_a_misspelt_scheme_of_the_embedding_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown scheme int3"):
        quantize(model(), embedding="int3")


@given(st.booleans(), st.sampled_from([AUTO, NONE, *SCHEMES]), st.sampled_from(list(SCHEMES)))
def test_rows_are_those_of_the_codes_and_within_the_contract(
    tied: bool, embedding: str, scheme: str
) -> None:
    program = model(tied=tied)
    one = QuantizeWeights(scheme=scheme, embedding=embedding)
    after = one.run(program, PassContext()).program
    Verifier().check_pass(one, program, after)
    table = table_of(after)
    value = table.output
    rows = _value(after, value)
    exact = program_weights(program)("embed.weight")
    chosen = scheme_of(table)
    if chosen == NONE:
        assert torch.equal(rows, exact[IDS])
    else:
        decoded = SCHEMES[chosen].weight.decode(*SCHEMES[chosen].quantize(exact), WIDTH)
        assert torch.equal(rows, decoded[IDS])


def _value(program: Program, value: Value) -> torch.Tensor:
    given = {"input_ids": IDS, "positions": torch.arange(len(IDS))}
    watched = replace(program, outputs=(value,))
    return interpret(watched, given, program_weights(program))[0]
