"""Ray Data: the same bytes for any workers and batches, killed or not, and what is done stays."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import DataContext, Dataset

import infc
import infc.ray
from infc.driver.ray.job import COLUMNS
from infc.ir.errors import UsageError
from infc.runtime.batch.bodies import row_seed

from ...ray_cluster import cluster_alone

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = Path(__file__).resolve().parents[3] / "recipes" / "tiny"
NUM_ROWS = 2000
HOW: dict[str, Any] = {
    "prompt": "question",
    "body": {"max_tokens": 6, "temperature": 1.0},
    "seed": 5,
    "kv_memory": "64MiB",
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> infc.Artifact:
    """The bundled model."""
    output = tmp_path_factory.mktemp("ray") / "tiny.infc"
    return infc.compile(TINY / "model.yaml", output=output, verify=False)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray on this machine: two workers, and room for what reads and writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with cluster_alone(
            object_store_memory=80 << 20, logging_level="error", _node_ip_address="127.0.0.1"
        ):
            DataContext.get_current().enable_progress_bars = False
            yield


def rows() -> Dataset:
    """Some that are refused are among them."""
    items = [
        {"id": number, "question": f"def f{number}(" if number % 500 else "", "kept": number / 2}
        for number in range(NUM_ROWS)
    ]
    return ray.data.from_items(items, override_num_blocks=7)


def bytes_of(dataset: Dataset) -> bytes:
    """All rows, in the order of their ids."""
    found = sorted(dataset.take_all(), key=lambda row: int(row["id"]))
    return json.dumps(found).encode()


@pytest.fixture(scope="module")
def undisturbed(artifact: infc.Artifact) -> bytes:
    """What one worker gives."""
    return bytes_of(infc.ray.generate(rows(), artifact.path, **HOW))


def test_a_row_has_the_answer_of_the_model(artifact: infc.Artifact, undisturbed: bytes) -> None:
    found = json.loads(undisturbed)
    assert [row["id"] for row in found] == list(range(NUM_ROWS))
    assert all(list(row) == ["id", "question", "kept", *COLUMNS] for row in found)
    with infc.LLM(artifact.path, threads=1, kv_memory="64MiB") as llm:
        for row in found[1:6]:
            params = llm.recommended_params(
                temperature=1.0, max_tokens=6, seed=row_seed(5, str(row["id"]))
            )
            (alone,) = llm.generate(row["question"], params)
            assert row["generated_text"] == alone.outputs[0].text
            assert row["finish_reason"] == alone.outputs[0].finish_reason
            assert row["num_generated_tokens"] == len(alone.outputs[0].token_ids)
    refused = [row for row in found if row["error"] is not None]
    assert [row["id"] for row in refused] == [0, 500, 1000, 1500]
    assert refused[0]["error"].startswith("prompt is empty")
    assert refused[0]["generated_text"] is None


def test_two_workers_and_single_rows_change_nothing(
    artifact: infc.Artifact, undisturbed: bytes
) -> None:
    given = infc.ray.generate(rows(), artifact, concurrency=2, batch_size=1, num_cpus=0.5, **HOW)
    assert bytes_of(given) == undisturbed


def test_a_killed_worker_changes_nothing_and_what_is_done_stays(
    artifact: infc.Artifact, undisturbed: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "answers"
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(kill_a_worker(output)))
    killer.start()
    given = infc.ray.generate(rows(), artifact, output=output, concurrency=2, **HOW)
    killer.join()
    assert killed[0] > 0
    assert not Path(f"/proc/{killed[0]}").exists()
    assert bytes_of(given) == undisturbed
    assert not list(output.glob("*.partial"))

    parts = sorted(output.glob("*.parquet"))
    for part in parts[::4]:
        part.unlink()
    (output / "part-0.parquet.1.partial").write_bytes(b"half")
    kept = {part: part.stat().st_mtime_ns for part in parts if part.exists()}
    again = infc.ray.generate(rows(), artifact, output=output, batch_size=7, **HOW)
    assert bytes_of(again) == undisturbed
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert not list(output.glob("*.partial"))

    for other in ({"seed": 6}, {"body": {"max_tokens": 7}}, {"max_context": 100}):
        with pytest.raises(UsageError, match="is of another job"):
            infc.ray.generate(rows(), artifact, output=output, **{**HOW, **other})


def kill_a_worker(output: Path) -> int:
    """Kills one as soon as something is written; its process."""
    deadline = time.monotonic() + 120
    while not list(output.glob("*.parquet")):
        if time.monotonic() > deadline:
            return 0
        time.sleep(0.01)
    pid = workers()[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def workers() -> list[int]:
    """Processes that answer rows, of the Ray that this process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"MapBatches(Worker)" in (entry / "cmdline").read_bytes().split(b"\0")[0]:
                raylet = parent(int(entry.name))
                found += [int(entry.name)] if parent(raylet) == os.getpid() else []
        except OSError:
            continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_messages_and_columns(artifact: infc.Artifact) -> None:
    talk = [{"role": "user", "content": "Write a class."}]
    items = [
        {"name": "a", "talk": talk, "limit": 3},
        {"name": "b", "talk": talk, "limit": None},
        {"name": None, "talk": talk, "limit": 3},
    ]
    given = infc.ray.generate(
        ray.data.from_items(items),
        artifact,
        id="name",
        messages="talk",
        columns={"max_tokens": "limit"},
        body={"ignore_eos": True, "max_completion_tokens": None},
        max_context=40,
        kv_memory="64MiB",
    )
    a, b, none = sorted(given.take_all(), key=lambda row: row["name"] or "z")
    assert a["num_generated_tokens"] == 3
    assert b["num_generated_tokens"] == 40 - b["num_prompt_tokens"]
    assert none["error"] == "the id is null"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt": "a", "messages": "b"}, "cannot be combined"),
        ({"body": {"n": 2}}, "the field 'n' cannot be used"),
        ({"columns": {"logprobs": "a"}}, "the field 'logprobs' cannot be used"),
        ({"columns": {"seed": "a"}, "body": {"seed": 1}}, "by a column"),
        ({"body": {"stop": object()}}, "body is not JSON"),
        ({"concurrency": 0}, "out of range"),
        ({"concurrency": (3, 2)}, "out of range"),
        ({"batch_size": 0}, "out of range"),
        ({"prompt": "nope"}, "the dataset has no column 'nope', but id, "),
        ({"id": "nope"}, "the dataset has no column 'nope', but id, "),
        ({"kv_size": 7}, "no option 'kv_size'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    artifact: infc.Artifact, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        infc.ray.generate(rows(), artifact, **options)


def test_a_directory_of_something_else_is_kept(artifact: infc.Artifact, tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(UsageError, match="holds Parquet files of something else"):
        infc.ray.generate(rows(), artifact, output=tmp_path, **HOW)
    assert (tmp_path / "mine.parquet").read_bytes() == b"mine"
