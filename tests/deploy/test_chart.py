"""The Helm chart: rendered by Helm itself where it is installed, else known to be unchanged."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from .manifests import LEAST_VERSION, PLAIN, chart_script

SCRIPT = chart_script()
AGAIN = "run scripts/render_chart.py (pip install helm-python-sdk)"


def test_plain_manifests_are_rendered_from_this_chart() -> None:
    assert len(PLAIN) == 5
    for path in PLAIN:
        (digest,) = re.findall(r"^# .* Chart: ([0-9a-f]{64})$", path.read_text(), re.MULTILINE)
        assert digest == SCRIPT.digest(), AGAIN


@pytest.fixture
def helm() -> Any:
    """Helm as a library: 75 MB, so that it is not installed for development."""
    return pytest.importorskip("helm_python", reason="needs helm-python-sdk, which is Helm itself")


def test_rendering_again_gives_the_plain_manifests(helm: Any) -> None:
    assert {path.name: path.read_text() for path in PLAIN} == SCRIPT.plain(), AGAIN
    assert SCRIPT.lint() == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"podDisruptionBudget": {"enabled": False}, "replicaCount": 1},
        {
            "args": ["--replicas", "2", "--model-name", 'a"b: c'],
            "artifact": {"volume": {"hostPath": {"path": "/models"}}, "subPath": "a/b.infc"},
            "imagePullSecrets": [{"name": "pull"}],
            "nodeSelector": {"gpu": "yes"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "podAnnotations": {"a": "b"},
            "podLabels": {"c": "d"},
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "image": {"tag": "1"},
            "service": {"type": "LoadBalancer", "port": 80},
            "resources": {"limits": {"nvidia.com/gpu": "1"}},
        },
    ],
    ids=["default", "least", "most"],
)
def test_what_it_renders_is_valid(helm: Any, values: dict[str, Any]) -> None:
    for text in SCRIPT.render(values).values():
        kubernetes_validate.validate(yaml.safe_load(text), LEAST_VERSION, strict=True)
    deployment = yaml.safe_load(SCRIPT.render(values)["deployment.yaml"])
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    args = values.get("args", [])
    assert container["args"][len(container["args"]) - len(args) :] == args


@pytest.mark.parametrize(
    "values", [{"replicas": 2}, {"args": "--replicas 2"}, {"service": {"port": "http"}}]
)
def test_values_that_mean_nothing_are_refused(helm: Any, values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmValuesError):
        SCRIPT.render(values)
