"""Targets: named sets of features, what this machine has, and what is said where it lacks some."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.codegen.cpp.flags import compiler_flags
from infc.ir.errors import TargetError
from infc.ir.targets import CUDA, FAMILIES, X86, Target, check_target, host_features, resolve_target
from infc.ir.targets import x86 as module

TARGETS = [name for family in FAMILIES for name in family.targets]
V2_FLAGS = "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2"
V3_FLAGS = f"{V2_FLAGS} avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4_FLAGS = f"{V3_FLAGS} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Makes this machine look like one whose processors have the given flags."""

    def become(*processors: str) -> None:
        path = tmp_path / f"cpuinfo{len(list(tmp_path.iterdir()))}"
        path.write_text("".join(f"vendor_id\t: x\nflags\t\t: fpu {f}\n\n" for f in processors))
        monkeypatch.setattr(module, "_CPUINFO", path)

    return become


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (V2_FLAGS, "x86-64-v2"),
        (V3_FLAGS, "x86-64-v3"),
        (f"{V3_FLAGS} avx_vnni", "x86-64-v3"),
        (V4_FLAGS, "x86-64-v4"),
        (f"{V4_FLAGS} avx512_vnni", "x86-64-v4+vnni"),
        (f"{V4_FLAGS} avx512_bf16 avx512_vnni gfni", "x86-64-v4+vnni+bf16"),
    ],
)
def test_native_is_resolved_to_names(machine, flags: str, name: str) -> None:  # type: ignore[no-untyped-def]
    machine(flags)
    native = resolve_target("native")
    assert native == resolve_target(name)
    assert native.name == name
    check_target(native.features)


def test_only_what_every_processor_has_counts(machine) -> None:  # type: ignore[no-untyped-def]
    machine(V4_FLAGS, V3_FLAGS)
    assert resolve_target("native").name == "x86-64-v3"


def test_a_missing_feature_is_named(machine) -> None:  # type: ignore[no-untyped-def]
    machine(f"{V4_FLAGS} avx512_vnni")
    with pytest.raises(
        TargetError,
        match=r"art: this machine lacks bf16, .*rebuild art` builds it for x86-64-v4\+vnni",
    ):
        check_target(resolve_target("x86-64-v4+vnni+bf16").features, where="art")
    check_target(resolve_target("x86-64-v4+vnni").features)


def test_another_kind_of_processor_is_named(machine) -> None:  # type: ignore[no-untyped-def]
    machine(V4_FLAGS)
    with pytest.raises(TargetError, match=r"art: .* built for aarch64, but this is x86-64"):
        check_target(resolve_target("aarch64").features, where="art")


def test_a_machine_without_any_level(machine) -> None:  # type: ignore[no-untyped-def]
    machine("sse2")
    with pytest.raises(TargetError, match="does not support x86-64-v2"):
        resolve_target("native")


@pytest.mark.parametrize(("system", "cpu"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_other_platforms_are_refused(
    monkeypatch: pytest.MonkeyPatch, system: str, cpu: str
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(platform, "machine", lambda: cpu)
    with pytest.raises(TargetError, match=f"infc runs on Linux on x86-64, .* on {cpu}"):
        host_features()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x86-64-v5", "unknown target 'x86-64-v5' .did you mean 'x86-64-v"),
        ("zen44", "did you mean 'zen4'"),
        ("toaster", "known: x86-64-v2"),
        ("x86-64-v4+vnn", "unknown target feature 'vnn' .did you mean 'vnni'"),
        ("x86-64-v4+", "unknown target feature ''"),
        ("x86-64-v3+bf16", "need AVX-512"),
        ("aarch64+avx2", "features that no machine has"),
        ("sm_90+avx2", "features that no machine has"),
        ("sm_80+sm_90", "several GPUs, .*use sm_80 alone"),
        ("sm_91", "did you mean 'sm_90'"),
        ("", "unknown target ''"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve_target(text)


@given(
    st.sampled_from(["x86-64-v4", "zen4"]),
    st.lists(st.sampled_from(sorted(X86.features))),
)
def test_a_name_says_all_and_its_order_nothing(base: str, extras: list[str]) -> None:
    target = resolve_target("+".join([base, *extras]))
    assert target == resolve_target("+".join([base, *reversed(extras)]))
    assert target == resolve_target(target.name)
    assert set(target.features) == {*X86.targets[base], *extras}


@pytest.mark.parametrize("name", sorted(set(TARGETS) - set(CUDA.targets)))
def test_the_compiler_knows_every_flag(name: str, tmp_path: Path) -> None:
    target = resolve_target(name)
    names = ("g++", "c++") if target.family is X86 else ("aarch64-linux-gnu-g++",)
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        pytest.skip(f"no C++ compiler for {target.family.name} here")
    flags = compiler_flags(target)
    source = tmp_path / "a.cpp"
    source.write_text("int f() { return 1; }\n")
    command = [compiler, *flags, "-c", str(source), "-o", str(tmp_path / "a.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_families_share_nothing_and_name_what_they_have() -> None:
    features = [name for family in FAMILIES for name in family.features]
    assert len(set(features)) == len(features)
    assert len(set(TARGETS)) == len(TARGETS)
    for family in FAMILIES:
        for name, named in family.targets.items():
            ordered = tuple(one for one in family.features if one in named)
            assert resolve_target(name) == Target(name, ordered)
            assert resolve_target(name).family is family


def test_a_name_of_a_feature_is_the_compilers_where_it_has_another() -> None:
    flags = compiler_flags(resolve_target("x86-64-v4+vnni+fp16"))
    assert flags[0] == "-march=x86-64"
    assert {"-mavx512vnni", "-mavx512fp16", "-mavx512f", "-msse4.1"} < set(flags)
    assert compiler_flags(resolve_target("aarch64")) == ("-march=armv8-a+simd",)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_told_by_its_name(name: str) -> None:
    assert f"{resolve_target(name)}" == name


def test_a_gpu_is_no_matter_of_the_processor(machine) -> None:  # type: ignore[no-untyped-def]
    machine("sse2")
    target = resolve_target("sm_90")
    assert (target.features, target.family, target.family.device) == (("sm_90",), CUDA, "gpu")
    check_target(target.features)
    assert CUDA.capability("sm_103") == 103


def test_native_of_a_gpu_is_what_its_driver_says() -> None:
    assert CUDA.native({"sm_89"}) == ["sm_89"]
    with pytest.raises(TargetError, match=r"no target for a GPU of sm_75 .it has sm_80, "):
        CUDA.native({"sm_75"})
    with pytest.raises(TargetError, match="found by its driver"):
        CUDA.detect()
