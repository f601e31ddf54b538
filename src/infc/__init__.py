"""infc compiles a language model into an artifact and runs it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .driver.async_llm import AsyncLLM
    from .driver.compile import compile_model as compile
    from .driver.explain.collect import inspect_artifact as inspect
    from .driver.explain.compare import diff_paths as diff
    from .driver.llm import LLM
    from .ir.artifact import Artifact
    from .ir.errors import CapacityError, InfcError, RequestError
    from .passes.registry import register_pass
    from .passes.rewrite import ops, rewrite
    from .runtime.api.reading import Embedding, Score
    from .runtime.requests.outputs import CompletionOutput, RequestOutput
    from .runtime.sampling.sampling_params import SamplingParams
    from .runtime.sampling.token_logprobs import TokenLogprobs

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Artifact",
    "AsyncLLM",
    "CapacityError",
    "CompletionOutput",
    "Embedding",
    "InfcError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "TokenLogprobs",
    "__version__",
    "compile",
    "diff",
    "inspect",
    "ops",
    "register_pass",
    "rewrite",
]

# Each name is imported when first asked for: a serving process must never pay for the compiler.
_HOMES = {
    "LLM": ("driver.llm", "LLM"),
    "Artifact": ("ir.artifact", "Artifact"),
    "AsyncLLM": ("driver.async_llm", "AsyncLLM"),
    "CapacityError": ("ir.errors", "CapacityError"),
    "CompletionOutput": ("runtime.requests.outputs", "CompletionOutput"),
    "Embedding": ("runtime.api.reading", "Embedding"),
    "InfcError": ("ir.errors", "InfcError"),
    "RequestError": ("ir.errors", "RequestError"),
    "RequestOutput": ("runtime.requests.outputs", "RequestOutput"),
    "SamplingParams": ("runtime.sampling.sampling_params", "SamplingParams"),
    "Score": ("runtime.api.reading", "Score"),
    "TokenLogprobs": ("runtime.sampling.token_logprobs", "TokenLogprobs"),
    "compile": ("driver.compile", "compile_model"),
    "diff": ("driver.explain.compare", "diff_paths"),
    "inspect": ("driver.explain.collect", "inspect_artifact"),
    "ops": ("passes.rewrite", "ops"),
    "register_pass": ("passes.registry", "register_pass"),
    "rewrite": ("passes.rewrite", "rewrite"),
}


if not TYPE_CHECKING:  # hidden from type checkers, so that they still catch a misspelt name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _HOMES[name]
        value = getattr(import_module(f".{module}", __name__), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
