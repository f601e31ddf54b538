"""The manifests in deploy/, and the script that renders the chart."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PLAIN = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KSERVE = sorted((DEPLOY / "kserve").glob("*.yaml"))
LEAST_VERSION, LATEST_VERSION = "1.30", "1.37"


def load(path: Path) -> dict[str, Any]:
    """The one object of a manifest."""
    (manifest,) = yaml.safe_load_all(path.read_text())
    assert isinstance(manifest, dict)
    return manifest


def plain(kind: str) -> dict[str, Any]:
    """The plain manifest of that kind."""
    (found,) = (each for each in map(load, PLAIN) if each["kind"] == kind)
    return found


def pod() -> dict[str, Any]:
    """Of the Deployment."""
    spec = plain("Deployment")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def container() -> dict[str, Any]:
    """The only one of the Deployment."""
    (only,) = pod()["containers"]
    assert isinstance(only, dict)
    return only


def chart_script() -> types.ModuleType:
    """scripts/render_chart.py."""
    path = DEPLOY.parent / "scripts/render_chart.py"
    spec = importlib.util.spec_from_file_location("render_chart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
