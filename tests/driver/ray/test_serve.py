"""Applications that cannot be made: one line says what is wrong. Nothing of Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import infc.ray
from infc.ir.errors import ArtifactError, InfcError, ToolchainError, UsageError
from infc.ir.extras import Extra

from ...runtime.small_artifact import write_small_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without kernels."""
    return write_small_artifact(tmp_path_factory.mktemp("ray") / "small.infc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_replicas": 0}, "num_replicas is 0 (use an integer of at least 1)"),
        ({"num_replicas": True}, "num_replicas is True (use an integer of at least 1)"),
        ({"num_replicas": "many"}, "num_replicas is 'many' (use an integer of at least 1)"),
        ({"num_fronts": 1.5}, "num_fronts is 1.5 (use an integer of at least 1)"),
        ({"num_cpus": -1}, "num_cpus is -1 (use a number of at least 0)"),
        ({"num_gpus": "one"}, "num_gpus is 'one' (use a number of at least 0)"),
        ({"front_cpus": float("nan")}, "front_cpus is nan (use a number of at least 0)"),
        ({"num_replica": 2}, "infc.ray.app has no option 'num_replica'"),
        ({"kv_memroy": "1GiB"}, "no option 'kv_memroy' (did you mean 'kv_memory'?)"),
        ({"routing": "nearest"}, "there is no routing policy 'nearest'"),
        ({"max_queue": 0}, "--max-queue: max_queue is 0, outside 1.."),
        ({"prefix_reuse": "no"}, "prefix_reuse is 'no' (use True or False)"),
        (
            {"num_replicas": 2, "autoscaling": {"max_replicas": 3}},
            "num_replicas and autoscaling cannot be combined",
        ),
        ({"autoscaling": {"max_replica": 3}}, "autoscaling has no key 'max_replica' (did you"),
        ({"autoscaling": {"max_replicas": 0}}, "autoscaling.max_replicas: Input should be greater"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "autoscaling: "),
    ],
)
def test_refused(artifact: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        infc.ray.app(artifact, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        infc.ray.app(tmp_path / "none.infc")
    assert "none.infc" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_ray(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Extra(("no_such_ray",), "pip install 'infc[ray]'")
    monkeypatch.setattr("infc.driver.ray.serve.RAY", missing)
    with pytest.raises(ToolchainError) as caught:
        infc.ray.app(artifact)
    assert str(caught.value) == (
        "serving on Ray needs no_such_ray, which is not installed (pip install 'infc[ray]')"
    )


def test_without_a_part_of_ray_serve(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, package: str | None = None) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="aiohttp")

    monkeypatch.setattr("infc.driver.ray.serve.importlib.import_module", fail)
    with pytest.raises(ToolchainError, match=r"needs aiohttp, .* 'infc\[ray\]'"):
        infc.ray.app(artifact)


def test_arguments_of_a_configuration_file(artifact: Path) -> None:
    with pytest.raises(UsageError, match="the application has no artifact"):
        infc.ray.build({"num_replicas": 2})
    with pytest.raises(UsageError, match="num_replicas is 0"):
        infc.ray.build({"artifact": str(artifact), "num_replicas": "0"})
    with pytest.raises(UsageError, match=r"num_cpus is -0\.5"):
        infc.ray.build({"artifact": str(artifact), "num_cpus": "-0.5"})
    with pytest.raises(InfcError, match="prefix_reuse is 'maybe'"):
        infc.ray.build({"artifact": str(artifact), "prefix_reuse": "maybe", "api_key": "12"})
