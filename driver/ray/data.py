"""`generate`: answers the rows of a dataset of Ray Data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...ir.artifact import Artifact, open_artifact
from ...ir.errors import UsageError
from ...ir.extras import RAY
from ...runtime.api.opening import as_options
from ...runtime.server.opening import model_name_of
from ..open_model import artifact_path
from .job import RayJob

if TYPE_CHECKING:
    from ray.data import Dataset


def generate(
    ds: Dataset,
    artifact: Artifact | str | os.PathLike[str],
    *,
    id: str = "id",
    prompt: str | None = None,
    messages: str | None = None,
    columns: Mapping[str, str] | None = None,
    body: Mapping[str, Any] | None = None,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 64,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    **options: Any,
) -> Dataset:
    """Adds answers to the rows of a dataset, as the columns COLUMNS of `infc.driver.ray.job`.

    Each row is a request. `prompt` or `messages` is the column with what is asked ("prompt", if
    neither is given); `columns` has columns by further fields of the request that they hold, such
    as `{"seed": "number"}`, and `body` has fields that are the same for all rows. The seed of
    a row follows from its `id` and `seed`. An answer therefore depends on nothing but its row: not
    on partitions, workers, batches and retries. A row that is refused has an `error`.

    There are `concurrency` workers, or between two numbers of them, with one engine each, which
    take `num_cpus` processors, threads included, and `num_gpus`. Each answers `batch_size` rows at
    a time. `options` are those of `infc.LLM`, such as `kv_memory`.

    Without `output`, nothing is computed before the dataset that is returned is read. With it, the
    rows are answered now, and written into that directory; rows whose `id` is there are skipped.
    The dataset that is returned reads the directory.

    Raises UsageError, and what opening the artifact raises.
    """
    RAY.require("infc.ray")
    from ray.data import ActorPoolStrategy

    from .worker import Worker

    least, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    if not 1 <= least <= most or batch_size < 1:
        raise UsageError(f"concurrency {concurrency!r} or batch_size {batch_size} is out of range")
    if prompt is not None and messages is not None:
        raise UsageError("prompt and messages cannot be combined: each row is one request")
    as_options(options)  # refuses what is none
    asked = {"prompt": prompt or "prompt"} if messages is None else {"messages": messages}
    opened = artifact if isinstance(artifact, Artifact) else open_artifact(artifact_path(artifact))
    job = RayJob(
        artifact=str(opened.path.resolve()),
        identity=opened.identity,
        model_name=model_name_of(opened.path),
        id_column=id,
        columns={**(columns or {}), **asked},
        body=body or {},
        seed=seed,
        most_workers=most,
        num_cpus=num_cpus,
        options=options,
    )
    # Where they are known: finding out may take computing the dataset, and workers check again.
    if (known := ds.columns(fetch_if_missing=False)) is not None:
        job.check_columns(known)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(min_size=least, max_size=most),
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
    }
    if output is None:
        return ds.map_batches(Worker, fn_constructor_args=(job,), **how)
    return _stored(ds, job, os.fspath(output), how)


def _stored(ds: Dataset, job: RayJob, output: str, how: Mapping[str, Any]) -> Dataset:
    """Answer the rows that are not in the directory yet; the dataset that reads it."""
    import ray

    from .store import Store
    from .worker import Skipped, Worker

    store = Store(output)
    store.begin(job)
    skipped = Skipped(store.output, ray.put(store.done(job.id_column)))
    for _ in ds.map_batches(Worker, fn_constructor_args=(job, skipped), **how).iter_batches():
        pass
    if not store.parts():
        raise UsageError("the dataset has no rows")
    return ray.data.read_parquet(store.output, file_extensions=["parquet"])
