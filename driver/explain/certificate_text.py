"""An artifact's certificate in words: its formats, and what they cost on a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...ir.sizes import format_count, format_size

_DIGEST = 12


def certificate_pairs(certificate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values for a page, from the data of a report."""
    for one in certificate["formats"]:
        tensors = format_count(one["tensors"], "tensor")
        size = format_size(one["bytes"])
        bits = f"{one['bits_per_weight']:.2f}".rstrip("0").rstrip(".")
        yield one["class"], f"{tensors} in {one['format']}, {bits} bits a weight, {size}"
    yield "in all", f"{certificate['bits_per_weight']:.2f} bits a weight, without what is other"
    if calibration := certificate.get("calibration"):
        yield "calibrated on", _text(calibration)
    for name, bound in certificate["bounds"].items():
        yield name, f"{bound:g}, kept by {certificate['measured']} ({certificate['what']})"
    if unchecked := certificate.get("unchecked"):
        yield "max_kl", f"{unchecked['max_kl']:g} by default, not checked: {unchecked['reason']}"
    if certificate["figures"] is None:
        yield "accuracy", f"not measured: {certificate['reason']}"
        return
    yield "accuracy", figures_text(certificate["figures"])
    yield "measured", f"{certificate['measured']} ({certificate['what']})"
    if "reason" in certificate:
        yield "", certificate["reason"]
    yield "against", certificate["against"]
    yield "text", _text(certificate["evaluation"])
    for stage in certificate["passes"]:
        yield stage["pass"], figures_text(stage)
        yield "error by layer", ", ".join(_errors(stage["errors"]))


def _text(text: Mapping[str, Any]) -> str:
    return f"{text['name']}, {text['tokens']} tokens, SHA-256 {text['sha256'][:_DIGEST]}…"


def _errors(errors: list[Mapping[str, Any]]) -> Iterator[str]:
    return (f"{one['place'].removeprefix('layer ')}: {one['error']}" for one in errors)


def figures_text(figures: Mapping[str, Any]) -> str:
    """Figures of a certificate in one line."""
    increase = 100 * float(figures["perplexity_increase"])
    return (
        f"KL {figures['kl_mean']} (99 %: {figures['kl_p99']}), top-1"
        f" {100 * float(figures['top1']):.1f} %, perplexity {figures['perplexity']}"
        f" ({increase:+.3g} %), {figures['tokens']} tokens"
    )
