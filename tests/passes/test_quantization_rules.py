"""Which rule decides about a matrix, and the errors of those that decide about none."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import UsageError
from infc.ir.parser import parse_program
from infc.ir.program import Program, WeightRef
from infc.ir.schemes import AUTO, MAX_EXACT_DEPTH, NONE, SCHEMES
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify
from infc.passes.base import PassContext, PassResult
from infc.passes.methods.scale_channels import ScaleChannels
from infc.passes.pattern_uses import PatternUses
from infc.passes.quantize_weights import QuantizeWeights


def experts() -> Program:
    """A product, a mixture of experts with its router, and a head."""
    b = ProgramBuilder("model")
    b.symbol("T", 1, 64)
    x = b.input("x", TensorType(DType.F32, (Sym("T"), 8)))

    def weight(name: str, *shape: int) -> WeightRef:
        return b.weight(name, TensorType(DType.F32, shape))

    x = b.emit("linear", x, weight("o_proj.weight", 8, 8))
    scores = b.emit("linear", x, weight("gate.weight", 4, 8))
    best, index = b.add("topk", (scores,), {"k": 2}).outputs
    moe = b.emit(
        "moe",
        *(x, index, best, weight("experts.gate_up", 4, 12, 8), weight("experts.down", 4, 8, 6)),
        act="silu",
    )
    b.output(b.emit("linear", moe, weight("head.weight", 16, 8)))
    return b.build()


PROGRAM = experts()
NAMES = {"o_proj": 0, "experts.gate_up": 1, "experts.down": 1, "head": 2}


def quantize(program: Program, **options: str) -> PassResult:
    result = QuantizeWeights(**options).run(program, PassContext())
    verify(result.program)
    return result


def schemes(**options: str) -> list[str]:
    """Of the product, the experts and the head."""
    nodes = quantize(PROGRAM, **options).program.nodes
    ops = ("linear", "scaled_linear", "decoded_linear", "moe", "scaled_moe")
    found = [node for node in nodes if node.op in ops]
    return [str(node.attrs.get("scheme", NONE)) for node in found if "gate.weight" not in str(node)]


BOTH = r"@experts.gate_up is {} and @experts.down is {}, .* must have the same scheme"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": "*.gate_up=int4 *.down=int8"}, BOTH.format("int4", "int8")),
        ({"rules": "*.down=int8"}, BOTH.format("none", "int8")),
        ({"scheme": "int4", "rules": "*.down=int8"}, BOTH.format("int4", "int8")),
        ({"scheme": "int4", "skip": "*.down"}, BOTH.format("int4", "none")),
        ({"scheme": "int4", "skip": "*.gate_up"}, BOTH.format("none", "int4")),
    ],
)
def test_matrices_of_a_mixture_have_one_scheme(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(PROGRAM, **options)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"rules": "*.gate_up=int4 *.down=int4"}, [NONE, "int4", NONE]),
        ({"scheme": "int8", "rules": "*.down=int8"}, ["int8"] * 3),
        ({"scheme": "int8", "rules": "experts.*=int4"}, ["int8", "int4", "int8"]),
        ({"scheme": "int8", "skip": "experts.*"}, ["int8", NONE, "int8"]),
        ({"scheme": "int8", "skip": "gate"}, ["int8"] * 3),
        ({"scheme": "int4", "skip": "o_proj", "rules": "lm_head=int8"}, [NONE, "int4", "int8"]),
        ({"scheme": "int4", "rules": "lm_head.weight=int8"}, ["int4", "int4", "int8"]),
        # Beside 4 bits, an open head has 8, and rows are rounded as they are for the others.
        *(
            ({"scheme": four, "head": AUTO}, [four, four, eight])
            for four, eight in (
                ("int4", "int8"),
                ("int4-g128", "int8"),
                ("int4-token", "int8-token"),
                ("q4_1-weights", "int8-weights"),
            )
        ),
        ({"scheme": "int4", "head": AUTO, "auto_head": "int6"}, ["int4", "int4", "int6"]),
        ({"scheme": "int4", "head": "int8", "auto_head": "int6"}, ["int4", "int4", "int8"]),
        ({"scheme": "int4", "head": AUTO, "rules": "*=int4"}, ["int4"] * 3),  # nobody asked for it
        ({"scheme": "int4", "head": AUTO, "auto_head": "int6", "rules": "*=int4"}, ["int4"] * 3),
    ],
)
def test_rules_choose(options: dict[str, str], found: list[str]) -> None:
    assert schemes(**options) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rules": "*=int8 head=int4"},
            r"rules: head has no effect: head.weight matches \* before",
        ),
        ({"rules": "head=int8 head=int4"}, "rules: head has no effect: .* matches head before"),
        ({"skip": "head", "rules": "head=int8"}, "rules: head has no effect: .* matches head befo"),
        ({"skip": "h* head"}, r"skip: head has no effect: head.weight matches h\* before it"),
        ({"rules": "gate=int8"}, "rules: gate has no effect: @gate.weight routes tokens"),
        ({"rules": "lost=none"}, "rules: no matrix is named lost"),
        (
            {"head": "int8", "rules": "*=int4"},
            r"quantize-weights: head: int8 has no effect: head.weight matches \* .rules and skip",
        ),
        ({"head": "int8", "skip": "lm_*"}, r"head: int8 has no effect: head.weight matches lm_\*"),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(PROGRAM, scheme="q8_0", **options)


def test_only_names_that_a_rule_could_use_are_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        quantize(PROGRAM, scheme="q8_0", rules="lost=none")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("names look like ")
    assert "gate.weight" not in caught.value.hint


ATTENTION = """program "model" phase captured {
  symbol T: 1..64
  weight @table: f32[9, 8]
  weight @q: f32[8, 8]
  weight @k: f32[8, 8]
  weight @v: f32[8, 8]
  weight @o: f32[8, 8]
  input %input_ids: i64[T]
  %x = embedding(@table, %input_ids) : f32[T, 8]
  %q = linear(%x, @q) : f32[T, 8]  layer 0
  %k = linear(%x, @k) : f32[T, 8]  layer 0
  %v = linear(%x, @v) : f32[T, 8]  layer 0
  %q3 = reshape(%q) {shape = ("T", 2, 4)} : f32[T, 2, 4]
  %k3 = reshape(%k) {shape = ("T", 2, 4)} : f32[T, 2, 4]
  %v3 = reshape(%v) {shape = ("T", 2, 4)} : f32[T, 2, 4]
  %o3 = attention(%q3, %k3, %v3) {layer = 0, scale = 0.5} : f32[T, 2, 4]  layer 0
  %o = reshape(%o3) {shape = ("T", 8)} : f32[T, 8]
  %y = linear(%o, @o) : f32[T, 8]  layer 0
  output %y
}
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "int8", "rules": "*=int4"}, "attention: int8 has no effect: q matches"),
        ({"attention": "int8", "rules": "q=int4 k=int4"}, None),
        ({"attention": AUTO, "rules": "*=int4"}, None),
        ({"embedding": "int8", "rules": "t*=int4"}, "embedding: int8 has no effect: table matches"),
        ({"embedding": "none", "rules": "q=int8"}, None),
        ({"embedding": AUTO, "skip": "*"}, None),
    ],
)
def test_a_part_of_the_model_that_rules_take_all_of_is_refused(
    options: dict[str, str], message: str | None
) -> None:
    program = parse_program(ATTENTION)
    if message is None:
        quantize(program, scheme="int4", **options)
        return
    with pytest.raises(UsageError, match=message):
        quantize(program, scheme="int4", **options)


def test_what_another_pass_has_put_in_codes_has_had_its_use() -> None:
    """As adopt-formats does, which is given the same options."""
    given = {"scheme": "int8", "attention": "q8_0", "embedding": "q4_0"}
    once = quantize(parse_program(ATTENTION), **given).program
    assert not quantize(once, **given).matches
    lost = {"scheme": "int8", "rules": "q=q8_0 k=q8_0 v=q8_0 o=q8_0"}
    once = quantize(parse_program(ATTENTION), **lost).program
    with pytest.raises(UsageError, match="attention: int8 has no effect: q matches q"):
        quantize(once, **lost, attention="int8")


def program_of(*names: str) -> Program:
    """A chain of products with matrices of these names."""
    b = ProgramBuilder("other")
    b.symbol("T", 1, 64)
    x = b.input("x", TensorType(DType.F32, (Sym("T"), 8)))
    for name in names:
        x = b.emit("linear", x, b.weight(name, TensorType(DType.F32, (8, 8))))
    b.output(x)
    return b.build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": "draft=int4 o_proj=int8"}, None),
        ({"rules": "o_proj=int8 draft=int4"}, None),
        ({"skip": "draft o_proj", "scheme": "int8"}, None),
        ({"rules": "gate=int8"}, None),  # what is a router of the one is a product of the other
        ({"rules": "draft=int8 lost=int8"}, "rules: no matrix is named lost"),
        ({"rules": "o_proj=int8 draft=int8 d*=int4"}, r"d\* has no effect: draft matches draft be"),
        ({"rules": "head=int4 he*=int8 draft=int8"}, r"he\* has no effect: head.weight matches h"),
        ({"rules": "h*=int8", "head": "int4"}, None),  # the head of the other
        ({"rules": "h*=int8 gate=int8", "head": "int4"}, r"head: int4 has no effect: "),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_pattern_that_matches_in_one_of_several_programs_is_used(
    options: dict[str, str], message: str | None, is_first: bool
) -> None:
    programs = [PROGRAM, program_of("draft", "gate")]
    one, uses = QuantizeWeights(**options), PatternUses()
    for program in programs if is_first else reversed(programs):
        one.run(program, PassContext(patterns=uses))
    if message is None:
        uses.require_all_used()
    else:
        with pytest.raises(UsageError, match=message):
            uses.require_all_used()


PATTERNS = st.sampled_from(["*", "o_proj", "experts.*", "*.down", "*.gate_up", "head", "h*", "x"])
RULES = st.lists(st.tuples(PATTERNS, st.sampled_from([NONE, "int8", "int4"])), max_size=4)


@settings(max_examples=50)
@given(st.lists(PATTERNS, max_size=2), RULES, st.sampled_from([NONE, "q8_0"]))
def test_the_first_pattern_decides_or_there_is_an_error(
    skip: list[str], rules: list[tuple[str, str]], scheme: str
) -> None:
    every = [(pattern, NONE) for pattern in skip] + rules
    decided = {}
    for name in (*NAMES, "gate"):
        matching = [i for i, (one, _) in enumerate(every) if fnmatch.fnmatchcase(name, one)]
        decided[name] = matching[0] if matching else None
    wanted = [
        {scheme if at is None else every[at][1] for n, at in decided.items() if NAMES.get(n) == i}
        for i in range(3)
    ]
    # A router stays as it is, whatever decides about it.
    left = {i for i, (one, how) in enumerate(every) if one == "*" and how == NONE}
    is_refused = len(wanted[1]) > 1 or any(
        place not in {at for name, at in decided.items() if name != "gate"} | left
        for place in range(len(every))
    )
    options = {"skip": " ".join(skip), "rules": " ".join(map("=".join, rules)), "scheme": scheme}
    if is_refused:
        with pytest.raises(UsageError):
            quantize(PROGRAM, **options)
    else:
        assert schemes(**options) == [next(iter(one)) for one in wanted]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_only_sums_of_integers_limit_the_length_of_rows(scheme: str) -> None:
    b = ProgramBuilder("deep")
    b.symbol("T", 1, 64)
    depth = MAX_EXACT_DEPTH + 8
    x = b.input("x", TensorType(DType.F32, (Sym("T"), depth)))
    b.output(b.emit("linear", x, b.weight("w", TensorType(DType.F32, (4, depth)))))
    result = quantize(b.build(), scheme=scheme)
    if SCHEMES[scheme].is_exact:
        assert result.program.nodes[-1].op == "linear"
        assert "its rows of 65544 are longer than int32 sums hold" in str(result.near_misses[0])
    else:
        plain = SCHEMES[scheme].activations is None
        assert result.program.nodes[-1].op == ("decoded_linear" if plain else "scaled_linear")


def test_a_pattern_is_refused_before_channels_are_scaled() -> None:
    """That takes minutes; here, a calibration text is missing as well."""
    scale = ScaleChannels(method="awq", scheme="int8", rules="lost=int4")
    with pytest.raises(UsageError, match="rules: no matrix is named lost"):
        scale.run(PROGRAM, PassContext())
