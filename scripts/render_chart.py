"""Writes deploy/kubernetes/ from deploy/chart with Helm itself: `pip install helm-python-sdk`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
CHART, PLAIN = DEPLOY / "chart", DEPLOY / "kubernetes"
VALUES: dict[str, Any] = {
    "apiKeySecret": {"name": "infc-api-key"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True},
}
"""What plain manifests are rendered with, beside the chart's own values: they have everything."""


def digest() -> str:
    """Of the chart's files, with which a test finds out whether they were changed since."""
    whole = hashlib.sha256()
    for path in sorted(each for each in CHART.rglob("*") if each.is_file()):
        whole.update(f"{path.relative_to(CHART)}\n".encode() + path.read_bytes())
    return whole.hexdigest()


def render(values: dict[str, Any]) -> dict[str, str]:
    """Manifests of a release `infc`, by the name of their file. Empty ones are left out."""
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name="infc", namespace="default")
    texts = {Path(name).name: text.strip() for name, text in rendered.items()}
    return {name: text for name, text in texts.items() if text and name.endswith(".yaml")}


def plain() -> dict[str, str]:
    """The text of each file in deploy/kubernetes/."""
    import helm_python

    head = (
        f"# Rendered from deploy/chart by Helm {helm_python.helm_sdk_version()}: do not edit, but\n"
    )
    head += f"# run scripts/render_chart.py. Chart: {digest()}\n"
    # There is no release that Helm would manage.
    managed = "app.kubernetes.io/managed-by: Helm"
    return {
        name: head + "\n".join(line for line in text.splitlines() if line.strip() != managed) + "\n"
        for name, text in render(VALUES).items()
    }


def lint() -> list[str]:
    """What `helm lint --strict` finds."""
    import helm_python

    report = helm_python.lint(CHART, VALUES, strict=True)
    found = [f"{one['path']}: {one['error']}" for one in report["messages"] if one["severity"] > 1]
    return [*found, *report["errors"]]


if __name__ == "__main__":
    if problems := lint():
        sys.exit("\n".join(problems))
    for name, text in plain().items():
        (PLAIN / name).write_text(text)
        print(PLAIN / name)
