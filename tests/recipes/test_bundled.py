"""The bundled recipes: each is read, names a model that infc compiles, and has sensible bounds."""

import re

import pytest

from infc.driver.bundled import bundled_recipes, nearest_name
from infc.driver.recipe import HUB_ID, load_recipe

from ..configs import CONFIGS

# What the hub says of each: the architecture, and the most tokens of a sequence.
PUBLISHED = {
    "deepseek-r1-distill-qwen-1.5b": ("qwen2", 131072),
    "gemma-3-1b-it": ("gemma3_text", 32768),
    "gemma-3-270m-it": ("gemma3_text", 32768),
    "llama-3.1-8b-instruct": ("llama", 131072),
    "llama-3.2-1b-instruct": ("llama", 131072),
    "llama-3.2-3b-instruct": ("llama", 131072),
    "mistral-7b-instruct-v0.3": ("mistral", 32768),
    "olmo-2-1b-instruct": ("olmo2", 4096),
    "phi-3.5-mini-instruct": ("phi3", 131072),
    "qwen2.5-0.5b-instruct": ("qwen2", 32768),
    "qwen2.5-7b-instruct": ("qwen2", 32768),
    "qwen2.5-coder-1.5b-instruct": ("qwen2", 32768),
    "qwen3-0.6b": ("qwen3", 40960),
    "qwen3-4b": ("qwen3", 40960),
    "smollm2-1.7b-instruct": ("llama", 8192),
    "smollm2-135m-instruct": ("llama", 8192),
    "tiny": ("llama", 1024),
    "tinyllama-1.1b-chat": ("llama", 2048),
}


def test_every_recipe_is_described_here() -> None:
    assert list(bundled_recipes()) == sorted(PUBLISHED)


def test_every_architecture_is_one_that_tests_compile() -> None:
    compiled = {small.kind for small in CONFIGS.values()}
    assert {kind for kind, _ in PUBLISHED.values()} <= compiled


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"tiny"}))
def test_a_recipe_of_the_hub(name: str) -> None:
    found = bundled_recipes()[name]
    recipe = load_recipe(name).recipe
    assert HUB_ID.fullmatch(recipe.model)
    hub_name = recipe.model.partition("/")[2].lower()
    assert hub_name.startswith(name) or hub_name.startswith(name.split("-")[0]), "named after it"
    most = PUBLISHED[name][1]
    assert 2048 <= (recipe.runtime.max_context or most) <= most
    size = re.search(r"-([\d.]+)b(-|$)", name)
    billions = float(size[1]) if size else 3.8 if name.startswith("phi-3.5-mini") else 0.3
    # A large model in bfloat16 does not fit into the memory of most machines, or is slow there.
    assert recipe.quantization.scheme == ("int8" if billions >= 3 else "none")
    assert (recipe.backend, recipe.target, recipe.trust_remote_code) == ("cpp", "native", False)
    assert 20 < len(found.summary()) <= 90
    assert not found.summary().endswith(".")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("tinny", "tiny"),
        ("Qwen3-4B", "qwen3-4b"),
        ("llama-3.1-8b", "llama-3.1-8b-instruct"),
        ("Mistral-7B-Instruct", "mistral-7b-instruct-v0.3"),
        ("xyzzy", None),
    ],
)
def test_a_misspelt_name_is_found(word: str, name: str | None) -> None:
    assert nearest_name(word) == name
