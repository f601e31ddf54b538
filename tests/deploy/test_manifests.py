"""Manifests: valid by Kubernetes's own schemas, and in accordance with the server and the image."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from infc.driver.commands.serve import command as serve_command
from infc.driver.explain.container import size_container
from infc.ir.artifact import open_artifact

from ..docs.generated import server_metrics
from .manifests import (
    DEPLOY,
    LATEST_VERSION,
    LEAST_VERSION,
    PLAIN,
    container,
    load,
    plain,
    pod,
)

KUBERNETES = [path for path in PLAIN if path.stem != "servicemonitor"]
RUNTIME = load(DEPLOY / "kserve/serving-runtime.yaml")
SERVICE = load(DEPLOY / "kserve/inference-service.yaml")
(RUNTIME_CONTAINER,) = RUNTIME["spec"]["containers"]


def parsed(args: list[str]) -> dict[str, Any]:
    """The options of `infc serve`, read as the command reads them."""
    assert args[0] == "serve"
    return serve_command.make_context("serve", args[1:], help_option_names=["-h", "--help"]).params


@pytest.mark.parametrize("version", [LEAST_VERSION, LATEST_VERSION])
@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_plain_manifests_are_valid(path: Path, version: str) -> None:
    assert kubernetes_validate.validate(load(path), version, strict=True) == version


@pytest.mark.parametrize("version", [LEAST_VERSION, LATEST_VERSION])
def test_pods_of_kserve_are_valid(version: str) -> None:
    """No small package has the schemas of its own resources, whose containers are the bulk."""
    model = SERVICE["spec"]["predictor"]["model"]
    spec = {"containers": RUNTIME["spec"]["containers"], "volumes": RUNTIME["spec"]["volumes"]}
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
    assert kubernetes_validate.validate(made, version, strict=True) == version
    named = {"name": "a", "args": model["args"], "resources": model["resources"]}
    spec["containers"] = [named]
    assert kubernetes_validate.validate(made, version, strict=True) == version


def test_validation_sees_a_misspelt_field() -> None:
    broken = copy.deepcopy(plain("Deployment"))
    broken["spec"]["template"]["spec"]["terminationGraceSeconds"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(broken, LATEST_VERSION, strict=True)


def test_resources_of_kserve_have_the_fields_that_belong_there() -> None:
    assert (RUNTIME["apiVersion"], RUNTIME["kind"]) == (
        "serving.kserve.io/v1alpha1",
        "ServingRuntime",
    )
    assert set(RUNTIME["spec"]) == {"supportedModelFormats", "containers", "volumes"}
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    (served,) = RUNTIME["spec"]["supportedModelFormats"]
    model = SERVICE["spec"]["predictor"]["model"]
    wanted = model["modelFormat"]
    assert wanted == {"name": served["name"], "version": served["version"]}
    assert set(model) == {"modelFormat", "storageUri", "args", "resources"}
    # KServe knows the container that serves by this name, and puts the model there.
    assert RUNTIME_CONTAINER["name"] == "kserve-container"
    assert parsed(RUNTIME_CONTAINER["args"])["model"] == "/mnt/models"


@pytest.mark.parametrize(
    ("served", "grace_seconds"),
    [
        (container(), pod()["terminationGracePeriodSeconds"]),
        (RUNTIME_CONTAINER, SERVICE["spec"]["predictor"]["terminationGracePeriodSeconds"]),
    ],
    ids=["plain", "kserve"],
)
class TestContainer:
    """What both containers have in common."""

    def test_it_listens_where_it_is_asked(self, served: dict[str, Any], grace_seconds: int) -> None:
        options = parsed(served["args"])
        (port,) = served["ports"]
        assert (options["host"], options["port"]) == ("0.0.0.0", port["containerPort"])
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = served[name]["httpGet"]
            assert asked["path"] == "/health"
            assert asked["port"] in (port["name"], port["containerPort"])

    def test_it_is_not_killed_while_it_drains(
        self, served: dict[str, Any], grace_seconds: int
    ) -> None:
        waits = served["lifecycle"]["preStop"]["sleep"]["seconds"]
        # A second for last words, and some for what is left of the process.
        assert waits + parsed(served["args"])["drain_seconds"] + 5 <= grace_seconds

    def test_it_may_do_little(self, served: dict[str, Any], grace_seconds: int) -> None:
        allowed = served["securityContext"]
        assert allowed["readOnlyRootFilesystem"] is True
        assert allowed["allowPrivilegeEscalation"] is False
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        both = {**pod()["securityContext"], **allowed}
        assert both["runAsNonRoot"] is True
        assert both["seccompProfile"] == {"type": "RuntimeDefault"}
        image = (DEPLOY.parent / "Dockerfile").read_text()
        assert f"useradd --uid {both['runAsUser']} " in image

    def test_it_writes_where_it_may(self, served: dict[str, Any], grace_seconds: int) -> None:
        writable = {
            mount["mountPath"]
            for mount in served["volumeMounts"]
            if not mount.get("readOnly", False)
        }
        image = (DEPLOY.parent / "Dockerfile").read_text()
        (cache,) = re.findall(r"XDG_CACHE_HOME=(\S+)", image)
        for one in served.get("env", ()):
            cache = one["value"] if one["name"] == "XDG_CACHE_HOME" else cache
        assert "/tmp" in writable
        assert any(cache == place or cache.startswith(f"{place}/") for place in writable)

    def test_memory_is_what_is_guaranteed(self, served: dict[str, Any], grace_seconds: int) -> None:
        resources = served["resources"]
        assert resources["requests"] == resources["limits"]


def test_objects_name_each_other() -> None:
    deployment, service = plain("Deployment"), plain("Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        plain("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    monitor = plain("ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,), (port,) = monitor["endpoints"], service["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    assert port["targetPort"] == container()["ports"][0]["name"]
    target = plain("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    # A number of replicas would undo what the autoscaler does at each `kubectl apply`.
    assert "replicas" not in deployment["spec"]
    (key,) = (one["valueFrom"]["secretKeyRef"] for one in container()["env"])
    assert endpoint["authorization"]["credentials"] == key


def test_autoscaler_asks_for_metrics_of_the_server() -> None:
    known = set(re.findall(r"`(infc_\w+)`", server_metrics()))
    metrics = plain("HorizontalPodAutoscaler")["spec"]["metrics"]
    asked = {one["pods"]["metric"]["name"] for one in metrics}
    assert asked == {"infc_requests_waiting", "infc_requests_running"}
    assert asked <= known
    page = (DEPLOY.parent / "docs/kubernetes.md").read_text()
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        assert yaml.safe_load(block)
    # All that the page says of metrics exists.
    assert set(re.findall(r"infc_(?:requests|kv|cache)\w*[a-z]\b", page)) <= known


def test_values_are_what_inspecting_prints() -> None:
    """So the output can be given to Helm as a file of values."""
    values = yaml.safe_load((DEPLOY / "chart/values.yaml").read_text())
    assert {"args", "resources"} <= set(values)
    assert values["resources"] == container()["resources"]


def test_every_option_is_one_of_the_command() -> None:
    with pytest.raises(click.NoSuchOption):
        parsed(["serve", "a", "--drain-time", "3"])
    for args in (container()["args"], RUNTIME_CONTAINER["args"]):
        assert parsed([*args, *SERVICE["spec"]["predictor"]["model"]["args"]])["threads"] == 1


def test_resources_are_those_of_the_bundled_model(bundled: Path) -> None:
    sizes = size_container(open_artifact(bundled, "none").manifest)
    assert sizes.as_data()["resources"] == container()["resources"]
    model = SERVICE["spec"]["predictor"]["model"]
    assert sizes.as_data() == {"args": model["args"], "resources": model["resources"]}
