"""The figures as tables in Markdown, and as a picture: quality against size, and against speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from ..chart import Panel, Point, Series, draw

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]

_UNDRAWN = (", nearest", ", not scaled", ", int8 cache")
"""Ends of names that the picture leaves out: variants of an entry that is in it."""
_HEAD = (
    "| | bits in layers | MB | KL, mean | KL, 99 % | same top | perplexity | decode | prefill "
    "| RSS, MB | seconds, CPU seconds and GB to make |"
)


def tables(found: Found) -> str:
    """A table for each model."""
    return "\n\n".join(_table(model, entries) for model, entries in found.items())


def _table(model: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"**{model}**", "", _HEAD, "| --- |" + " --- |" * 10]
    for name, data in entries.items():
        cells = [
            _number(data.get("bits"), ".2f"),
            _number(data.get("megabytes"), ".1f"),
            _number(data.get("kl_mean"), ".3g"),
            _number(data.get("kl_p99"), ".3g"),
            _number(data.get("top1"), ".1%"),
            _number(data.get("perplexity_increase"), "+.2%"),
            *(_spread(data.get(key)) for key in ("decode", "prefill")),
            _number(data.get("rss_megabytes"), ".0f"),
            ", ".join(
                _number(data[key], how)
                for key, how in (
                    ("seconds", ".0f"),
                    ("cpu_seconds", ".0f"),
                    ("compile_gigabytes", ".1f"),
                )
                if key in data
            ),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how).replace("%", " %")


def _spread(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def picture(found: Found) -> str:
    """For each model two panels of KL: against megabytes, and against tokens per second."""
    panels = [panel for model, entries in found.items() for panel in _panels(model, entries)]
    return draw(panels, columns=2, note="KL divergence from the 16-bit model in float32, in nats")


def _panels(model: str, entries: Mapping[str, Mapping[str, Any]]) -> Iterator[Panel]:
    for key, label in (("megabytes", "MB on disk"), ("decode", "tokens/s, decode")):
        series = []
        for engine in ("infc", "llama.cpp"):
            points = sorted(
                (_value(data[key]), data["kl_mean"])
                for name, data in entries.items()
                if name.startswith(f"{engine} ") and not name.endswith(_UNDRAWN)
                if data.get(key) and data.get("kl_mean")
            )
            if points:
                series.append(Series(engine, [Point(x, y, y, y) for x, y in points]))
        if series:
            yield Panel(model, label, "KL", series)


def _value(value: float | list[float]) -> float:
    return round(median(value)) if isinstance(value, list) else round(value)
