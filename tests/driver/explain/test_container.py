"""What `infc inspect --resources` says that a container needs, and that it is enough."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from infc.driver.cli import run
from infc.driver.commands.serve import command as serve_command
from infc.driver.explain.container import ContainerSizes, container_text, size_container
from infc.ir.artifact import open_artifact
from infc.ir.errors import CapacityError, UsageError
from infc.ir.manifest import Manifest
from infc.ir.targets import resolve_target
from infc.runtime import limits as limits_module
from infc.runtime.limits import parse_bytes, plan_blocks
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.sizing import size_replicas
from infc.runtime.scheduling.kv_groups import planned_bytes

from .support import SEQUENCES, write_explained

MIB = 1 << 20
FIELDS = ("threads", "kv_memory", "max_sequences", "max_context")


def options_of(sizes: ContainerSizes) -> tuple[int, RuntimeOptions]:
    """What the options mean to `infc serve` itself."""
    given = serve_command.make_context(
        "serve", ["a", *sizes.args], help_option_names=["-h", "--help"]
    ).params
    return given["replicas"], RuntimeOptions(**{name: given[name] for name in FIELDS})


def of_processes(sizes: ContainerSizes) -> int:
    """Bytes that are taken when engines are planned: by the server, and by files it has read."""
    names = ("the server", "the tokenizer, in each process")
    return sum(size for name, size in sizes.parts if name in names)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_engines_fit_into_it(tiny: Path, monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    artifact = open_artifact(tiny, "none")
    sizes = size_container(artifact.manifest, replicas=replicas)
    free = sizes.memory - of_processes(sizes)
    monkeypatch.setattr(limits_module, "available_memory", lambda: free)
    count, options = options_of(sizes)
    plan = size_replicas(artifact, options, count).plan
    assert plan.limits.max_context == artifact.manifest.main.limits.max_context
    kv = plan.memory["host"].kv
    assert kv <= parse_bytes(options.kv_memory or 0)
    # All that run at once have room for a whole context.
    assert kv == planned_bytes(plan.groups, plan_blocks(plan.groups, plan.limits, 1 << 50))


def test_large_weights_have_room_for_a_copy(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_artifact(tiny, "none").manifest
    name = manifest.main.weights.file
    stored = replace(manifest.files[name], bytes=1 << 30)
    manifest = replace(manifest, files={**manifest.files, name: stored})
    sizes = size_container(manifest)
    monkeypatch.setattr(limits_module, "huge_page_setting", lambda: "madvise")
    for missing, placed in ((0, "copied"), (400 * MIB, "mapped")):
        free = sizes.memory - of_processes(sizes) - missing
        monkeypatch.setattr(limits_module, "available_memory", lambda free=free: free)
        _, options = options_of(sizes)
        assert limits_module.plan_runtime(manifest, options).weights == placed
    # Mapped, they are there once, however many engines there are.
    parts = dict(size_container(manifest, replicas=4).parts)
    assert parts["weights"] == stored.bytes


def test_more_replicas_take_more_and_share_the_weights(tiny: Path) -> None:
    manifest = open_artifact(tiny, "none").manifest
    one, two, three = (size_container(manifest, replicas=n) for n in (1, 2, 3))
    assert [each.cpus for each in (one, two, three)] == [1, 2, 3]
    assert one.memory < two.memory < three.memory
    assert dict(two.parts)["weights"] == dict(three.parts)["weights"]


def test_batch_and_context_are_what_is_served(tiny: Path) -> None:
    manifest = open_artifact(tiny, "none").manifest
    sizes = size_container(manifest, batch=4, context=256, threads=3)
    _, options = options_of(sizes)
    assert (options.max_sequences, options.max_context, options.threads) == (4, 256, 3)
    assert sizes.memory < size_container(manifest).memory
    with pytest.raises(UsageError, match=rf"--batch: 99 is outside 1..{SEQUENCES}"):
        size_container(manifest, batch=99)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kv_memory": 1 << 20}, CapacityError, "hold .* tokens, and the context has 1024"),
        ({"replicas": 65}, UsageError, r"outside 0\.\.64"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny: Path, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        size_container(open_artifact(tiny, "none").manifest, **arguments)


def test_a_gpu_is_asked_for_where_the_target_is_one(captured: Any, tmp_path: Path) -> None:
    path = write_explained(tmp_path / "gpu", captured, target=resolve_target("sm_90"))
    manifest: Manifest = open_artifact(path, "none").manifest
    resources = size_container(manifest, replicas=1).as_data()["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in resources["requests"]  # it follows from the limit
    assert "--kv-memory" not in size_container(manifest).args  # the GPU's own, as it is free
    with pytest.raises(UsageError, match="a GPU"):
        size_container(manifest, replicas=2)


def test_command_prints_yaml_and_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = size_container(open_artifact(tiny, "none").manifest, replicas=2)
    asked = ["inspect", str(tiny), "--verify", "none", "--resources", "--replicas", "2"]
    assert run(asked) == 0
    text = capsys.readouterr().out
    assert text == container_text(sizes, as_json=False)
    assert yaml.safe_load(text) == sizes.as_data()
    assert run([*asked, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {name: data[name] for name in ("args", "resources")} == sizes.as_data()
    assert sum(data["memory"].values()) <= sizes.memory
    assert run(["inspect", str(tiny), "--replicas", "2"]) == click.UsageError.exit_code
    assert "--replicas needs --resources" in capsys.readouterr().err
