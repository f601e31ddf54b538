"""The passes that the default backend wants at the end of a pipeline."""

from __future__ import annotations

from infc.codegen.registry import get_backend
from infc.ir.backends import DEFAULT
from infc.ir.targets import resolve_target
from infc.passes.pipeline import parse_pipeline

PLAN = parse_pipeline(get_backend(DEFAULT).plan_passes(resolve_target("x86-64-v3"))).passes
