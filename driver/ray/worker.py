"""What an actor of Ray Data does: rows through one engine, with the code of `infc batch`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from ...ir.machine import available_cpus
from ...runtime.api.opening import as_options
from ...runtime.batch.bodies import BodyAnswer, BodyAnswers, batch_settings, row_seed, whole_context
from ...runtime.executors.base import HOST
from ...runtime.limits import memory_kind
from ...runtime.replicas.sizing import size_replicas
from ...runtime.server.event_loop import SturdyEventLoop
from ...runtime.server.opening import open_served
from .job import COLUMNS, ERROR, PROMPT_TOKENS, REASON, TEXT, TOKENS, RayJob, row_digest
from .same_artifact import open_same
from .store import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir.artifact import Artifact
    from ...runtime.options import RuntimeOptions

_TYPES = {
    TEXT: pa.string(),
    REASON: pa.string(),
    PROMPT_TOKENS: pa.int64(),
    TOKENS: pa.int64(),
    ERROR: pa.string(),
}
_WRITTEN = "num_written"


@dataclass(frozen=True, slots=True)
class Skipped:
    """Where answers are written, and the rows that are there: sorted digests, in Ray's store."""

    output: str
    done: Any


class Worker:
    """Answers batches of rows. Its engine is a process, so that a row that kills it fails alone."""

    def __init__(self, job: RayJob, skipped: Skipped | None = None) -> None:
        self._job = job
        self._store = None if skipped is None else Store(skipped.output)
        self._done: NDArray[np.uint64] | None = None if skipped is None else ray.get(skipped.done)
        artifact = open_same(job.artifact, job.identity)
        artifact.verify_weights().result()
        settings = batch_settings(artifact, (job.model_name,))
        self._ending = contextlib.ExitStack()  # the engine ends with this process in any case
        opened = open_served(
            artifact,
            replace(_options(artifact, job), max_waiting=settings.max_queue),
            1,
            self._ending,
        )
        opened.wait()
        self._answers = BodyAnswers(opened.engine, opened.tokenizer, settings)
        self._runner = asyncio.Runner(loop_factory=SturdyEventLoop)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with their answers; where they are written, the number of those."""
        self._job.check_columns(table.column_names)
        ids = table.column(self._job.id_column).to_pylist()
        if self._store is None or self._done is None:
            return self._answered(table, ids)
        digests = np.array([row_digest(str(each)) for each in ids], np.uint64)
        left = ~_contains(self._done, digests)
        num_left = int(left.sum())
        if num_left:
            table = table.filter(pa.array(left))
            self._store.write(
                self._answered(table, table.column(self._job.id_column).to_pylist()),
                "-".join(f"{digest:016x}" for digest in digests[left]),
            )
        return pa.table({_WRITTEN: pa.array([num_left], pa.int64())})

    def _answered(self, table: pa.Table, ids: Sequence[Any]) -> pa.Table:
        names = [self._job.id_column, *self._job.columns.values()]
        rows = table.select(list(dict.fromkeys(names))).to_pylist()
        answers = self._runner.run(self._answer_all(ids, rows))
        for name in COLUMNS:
            values = [answer[name] for answer in answers]
            table = table.append_column(name, pa.array(values, _TYPES[name]))
        return table

    async def _answer_all(
        self, ids: Sequence[Any], rows: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        pairs = zip(ids, rows, strict=True)
        return await asyncio.gather(*(self._answer(row_id, row) for row_id, row in pairs))

    async def _answer(self, row_id: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        if row_id is None:
            return {**dict.fromkeys(COLUMNS), ERROR: "the id is null"}
        job = self._job
        # A name that is not told: the columns have no id of the answer.
        answer = await self._answers.answer(
            job.url, job.body_of(row), name="ray", seed=row_seed(job.seed, str(row_id))
        )
        return _as_columns(answer)


def _as_columns(answer: BodyAnswer) -> dict[str, Any]:
    body = json.loads(answer.body)
    if answer.status != 200:
        return {**dict.fromkeys(COLUMNS), ERROR: body["error"]["message"]}
    (choice,) = body["choices"]
    return {
        TEXT: choice["message"]["content"] if "message" in choice else choice["text"],
        REASON: choice["finish_reason"],
        PROMPT_TOKENS: body["usage"]["prompt_tokens"],
        TOKENS: body["usage"]["completion_tokens"],
        ERROR: None,
    }


def _contains(ordered: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    places = np.searchsorted(ordered, values)
    places[places == len(ordered)] = 0
    return np.isin(values, ordered[:1]) if len(ordered) < 2 else ordered[places] == values


def _options(artifact: Artifact, job: RayJob) -> RuntimeOptions:
    """Threads and memory for one of the workers that may share a node."""
    given = as_options(job.options)
    options = replace(given, max_context=whole_context(artifact, given))
    if memory_kind(artifact.manifest) != HOST:
        return options
    # Pinned, all of them would choose the same processors.
    threads = options.threads or max(1, int(job.num_cpus))
    options = replace(options, pin=options.pin or False)
    count = max(1, min(job.most_workers, int(available_cpus() / max(job.num_cpus, 1))))
    sizes = size_replicas(artifact, replace(options, threads=threads * count), count)
    return sizes.options[0]
