"""Recipes: strict, with file and line in every error, and each key documented once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from infc.driver.recipe import Recipe, RuntimeSection, load_recipe, recipe_schema, size_or_auto
from infc.driver.texts import EVALUATION
from infc.ir.errors import RecipeError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    return path


def all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += all_keys(info.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def test_everything_but_the_model_has_a_default(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, "model: here\n"))
    assert loaded.recipe == Recipe(model="here")
    assert loaded.directory == tmp_path
    assert loaded.recipe.logit_rows == loaded.recipe.runtime.max_sequences


def test_rows_of_logits_are_no_more_than_tokens_of_a_step() -> None:
    for rows, tokens, expected in ((None, 16, 16), (10**9, 512, 512), (7, 512, 7), (None, 512, 64)):
        runtime = RuntimeSection(logit_rows=rows, step_tokens=tokens)
        assert Recipe(model="here", runtime=runtime).logit_rows == expected


def test_values_arrive(tmp_path: Path) -> None:
    text = """
        model: org/name
        dtype: bfloat16
        kv_cache: {memory: 1.5GiB, block_size: 64}
        passes: {fuse-rope: false}
        runtime:
          max_context: auto
          threads: 3
    """
    recipe = load_recipe(write(tmp_path, text)).recipe
    assert recipe.kv_cache.memory == 3 << 29
    assert recipe.kv_cache.block_size == 64
    assert recipe.passes == {"fuse-rope": False}
    assert recipe.runtime.max_context is None
    assert recipe.runtime.threads == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"yaml: the key 'model' is missing"),
        ("dtype: float32", r"the key 'model' is missing"),
        ("mode: a", r"yaml:1: unknown key .mode. .did you mean .model."),
        ("model: a\nbakend: cpp", r"yaml:2: unknown key 'bakend' .did you mean 'backend'"),
        (
            "model: a\nkv_cache:\n  blocksize: 3",
            r"yaml:3: unknown key 'kv_cache.blocksize' .*block_",
        ),
        ("model: a\nmax_context: 3", r"yaml:2: .* mean 'runtime.max_context'"),
        ("model: a\nzzzzzz: 3", r"yaml:2: unknown key 'zzzzzz' .known: model, "),
        (
            "model: a\n\ndtype: float64",
            r"yaml:3: dtype: float64 is not supported .supported: 'auto'",
        ),
        (
            "model: a\nquantization:\n  skip: ['*']",
            r"yaml:3: quantization.skip has no effect, because nothing is quantized",
        ),
        (
            "model: a\nquantization:\n  scheme: none\n  head: false",
            r"yaml:4: quantization.head has no effect, because nothing is quantized",
        ),
        (
            "model: a\nquantization:\n  embedding: false",
            r"yaml:3: quantization.embedding has no effect, because nothing is quantized",
        ),
        (
            "model: a\nquantization:\n  rules: [{match: '*', scheme: none}]",
            r"yaml:3: quantization.rules has no effect, because nothing is quantized",
        ),
        (
            "model: a\nquantization:\n  calibration: {tokens: 64}",
            r"yaml:3: quantization.calibration has no effect, because nothing is quantized",
        ),
        (
            "model: a\nquantization:\n  method: gptq",
            r"yaml:3: quantization.method has no effect, because nothing is quantized",
        ),
        (
            "model: a\nquantization: {scheme: int4, method: awq}",
            r"yaml:2: quantization.method: awq is not supported .supported: 'auto', 'nearest' or",
        ),
        (
            "model: a\nquantization: {scheme: int4, method: gtpq}",
            r"yaml:2: quantization.method cannot be 'gtpq' .choose 'auto', 'nearest' or 'gptq'",
        ),
        (
            "model: a\nquantization: {scheme: int4, calibration: {tokens: 3}}",
            r"yaml:2: quantization.calibration.tokens cannot be 3",
        ),
        ("model: a\nquantization: gptq", r"yaml:2: quantization.scheme: gptq is not supported"),
        ("model: a\ndtype: float64", r"yaml:2: dtype: float64 is not supported"),
        ("model: a\nkv_cache: {dtype: int4}", r"yaml:2: kv_cache.dtype: int4 is not supported"),
        ("model: a\nbackend: cop", r"yaml:2: backend cannot be 'cop' .choose 'cpp'"),
        ("model: 3", r"yaml:1: model cannot be 3: input should be a valid string"),
        ("model: ''", r"yaml:1: model cannot be ''"),
        ("model: a\nkv_cache: 3", r"yaml:2: kv_cache cannot be 3: expected a mapping"),
        ("model: a\nkv_cache: {block_size: 40}", r"cannot be 40: .*multiple of 16"),
        ("model: a\nkv_cache: {memory: lots}", r"cannot be 'lots': not a size such as 1GiB"),
        ("model: a\nkv_cache: {memory: -3}", r"kv_cache.memory cannot be -3"),
        ("model: a\nruntime:\n  threads: yes", r"yaml:3: runtime.threads cannot be True"),
        ("model: a\nruntime: {step_tokens: 0}", r"step_tokens cannot be 0"),
        ("model: a\nruntime: {max_context: 1}", r"max_context cannot be 1: .*to 2"),
        ("model: a\nruntime: {step_tokens: 1.5}", r"step_tokens cannot be 1.5"),
        ("model: a\ntrust_remote_code: 1", r"trust_remote_code cannot be 1"),
        ("model: a\nmodel: b", r"yaml:2: duplicate key 'model'"),
        ("model: a\n3: b", r"yaml:2: the key 3 is not text"),
        ("- a", r"yaml:1: a recipe is a mapping"),
        ("model: [a", r"yaml:\d: not valid YAML"),
        ("model: a\n---\nmodel: b", r"yaml:2: not valid YAML: but found another document"),
        ("model: !!python/object:os.system {}", r"yaml:1: "),
        ("model: 2020-01-01", r"yaml:1: values of type 'timestamp' are not supported"),
        ("model: \x07", r"not valid YAML"),
        ("model: *nothing", r"yaml:1: not valid YAML: found undefined alias"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_anchors_stop_at_a_limit(tmp_path: Path) -> None:
    levels = [f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    bomb = "\n".join(["model: a", "passes:", *(f"  {x}" for x in ["k0: &a0 [lol]", *levels])])
    with pytest.raises(RecipeError, match="too large or too deep"):
        load_recipe(write(tmp_path, bomb))


def test_depth_stops_at_a_limit(tmp_path: Path) -> None:
    for depth in (40, 5000):
        with pytest.raises(RecipeError):
            load_recipe(write(tmp_path, f"model: a\npasses: {'[' * depth}{']' * depth}"))


def test_a_recursive_alias_stops(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, "model: a\npasses: &p {x: *p}"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone.yaml: no such file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match=r"neither a model\.yaml nor the config"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(byte 7\)"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "big.yaml").write_text("#" * (2 << 20))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        load_recipe(tmp_path / "big.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        load_recipe(tmp_path / "endless.yaml")


@pytest.mark.parametrize(
    "wrong", ["runtime: {itl_target_ms: 99999999999999}", "kv_cache: {memory: 99999999TB}"]
)
def test_numbers_that_no_manifest_holds(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(f"model: a/b\n{wrong}\n")
    with pytest.raises(RecipeError, match=r"model.yaml:2"):
        load_recipe(tmp_path / "model.yaml")


def test_directories(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_recipe(tmp_path).recipe == Recipe(model=".")
    write(tmp_path, "model: there")
    assert load_recipe(tmp_path).recipe.model == "there"


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\nruntime:\n  threads: 1\n")
    overrides = ["runtime.threads=2", "kv_cache.memory=1GB", "dtype=float32", "passes={a: false}"]
    recipe = load_recipe(path, overrides).recipe
    assert (recipe.runtime.threads, recipe.kv_cache.memory, recipe.dtype) == (2, 10**9, "float32")
    assert recipe.passes == {"a": False}
    assert load_recipe(Recipe(model="x"), overrides).recipe.model == "x"
    mapping = {"runtime.threads": 2, "kv_cache.memory": "1GB", "dtype": "float32"}
    assert load_recipe(path, {**mapping, "passes": {"a": False}}).recipe == recipe
    assert load_recipe(path, "runtime.threads=2").recipe.runtime.threads == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("runtime.treads=2", r"--set runtime.treads=2: unknown key .* mean 'runtime.threads'"),
        ("runtime.threads", r"--set runtime.threads: expected KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("runtime..threads=3", "KEY=VALUE"),
        ("dtype=[", r"--set dtype=\[: not valid YAML"),
        ("dtype=float31", r"--set dtype=float31: dtype cannot be 'float31'"),
        ("model.name=x", r"model is 'a', which has no keys"),
        ("runtime=", r"--set runtime=: runtime cannot be None"),
    ],
)
def test_refused_overrides(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, "model: a"), [assignment])


yaml_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(all_keys()), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text() | st.sampled_from(sorted(Recipe.model_fields)), yaml_like))
def test_any_data_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]
) -> None:
    import yaml

    path = tmp_path_factory.mktemp("recipe") / "model.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    try:
        load_recipe(path)
    except RecipeError as error:
        assert str(path) in str(error)  # noqa: PT017 - to be taken is right as well


@given(st.text())
def test_any_text_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("recipe") / "model.yaml"
    path.write_bytes(text.encode("utf-8", errors="replace"))
    with pytest.raises(RecipeError, match=r"model\.yaml"):
        load_recipe(path)


@given(st.sampled_from(all_keys()), st.data())
def test_a_misspelt_key_is_found(key: str, data: st.DataObject) -> None:
    section, _, name = key.rpartition(".")
    at = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:at] + name[at + 1 :]
    if len(name) < 5 or f"{section}.{wrong}".strip(".") in all_keys():
        return
    assignment = f"{section}.{wrong}=1".strip(".")
    with pytest.raises(RecipeError, match="unknown key") as caught:
        load_recipe(Recipe(model="x"), [assignment])
    assert f"did you mean {key!r}" in str(caught.value)


def test_the_schema_documents_every_key() -> None:
    def check(schema: dict[str, Any]) -> None:
        properties = schema["properties"]
        assert isinstance(properties, dict)
        for name, info in properties.items():
            assert info.get("description"), name
            assert "default" in info or name in schema.get("required", ()), name

    schema = recipe_schema()
    check(schema)
    for section in schema["$defs"].values():
        check(section)
    assert schema["properties"]["runtime"]["default"]["step_tokens"] == 512


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("2 MB", 2 * 10**6), ("7", 7), ("0.5kib", 512)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_or_auto(text) == size


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("quantization.calibration.text=texts/mine.txt", "text"),
        ("quantization={scheme: int8, calibration: {text: texts/mine.txt}}", "text"),
        ("accuracy.evaluation=texts/mine.txt", "evaluation"),
        ("model=texts/mine.txt", "model"),
    ],
)
def test_paths_of_options_begin_in_the_working_directory(
    option: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in the recipe's own text begin beside it."""
    here = tmp_path / "here"
    (here / "texts").mkdir(parents=True)
    (here / "texts/mine.txt").write_text("a text")
    path = tmp_path / "recipes" / "model.yaml"
    path.parent.mkdir()
    lines = "accuracy: {evaluation: texts/eval.txt}\nquantization: {scheme: int8}\n"
    path.write_text(f"model: own/model\n{lines}")
    monkeypatch.chdir(here)

    def found(*overrides: str) -> dict[str, str]:
        recipe = load_recipe(path, overrides).recipe
        text = recipe.quantization.calibration.text
        return {"model": recipe.model, "text": text, "evaluation": recipe.accuracy.evaluation}

    before = found()
    assert before["evaluation"] == "texts/eval.txt"
    expected = before | {key: str(here / "texts/mine.txt")}
    assert found(option) == found(option, "dtype=float32") == expected


def test_names_in_options_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.yaml"
    path.write_text("model: a")
    options = ["model=org/name", f"accuracy.evaluation={EVALUATION}"]
    recipe = load_recipe(path, options).recipe
    assert (recipe.model, recipe.accuracy.evaluation) == ("org/name", EVALUATION)
    (tmp_path / "org/name").mkdir(parents=True)
    assert load_recipe(path, options).recipe.model == str(tmp_path / "org/name")
