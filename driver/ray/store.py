"""Where a batch on Ray keeps its answers: a directory of Parquet files, each whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from ...ir.errors import UsageError
from ...ir.files import sync
from .job import RayJob, row_digest

_JOB_FILE = "infc-job.json"
_SUFFIX = ".parquet"
_PARTIAL = ".partial"


class Store:
    """A local directory, or one of a URI that pyarrow knows."""

    def __init__(self, output: str) -> None:
        self.output = output
        place = output if "://" in output else os.path.abspath(output)
        try:
            self._files, self._root = fs.FileSystem.from_uri(place)
        except (pa.ArrowInvalid, OSError) as error:
            raise UsageError(f"cannot be used: {error}", where=output) from None

    def begin(self, job: RayJob) -> None:
        """Takes the directory for a job, or finds that it is of this job. Raises UsageError."""
        path = f"{self._root}/{_JOB_FILE}"
        try:
            self._files.create_dir(self._root, recursive=True)
            for left in self._paths(_PARTIAL):  # of workers that were killed
                self._files.delete_file(left)
            if self._files.get_file_info(path).type == fs.FileType.NotFound:
                if self.parts():
                    raise UsageError(
                        "holds Parquet files of something else",
                        where=self.output,
                        hint="choose another directory",
                    )
                self._write(json.dumps({"digest": job.digest}).encode(), path)
                return
            with self._files.open_input_stream(path) as file:
                found = json.loads(file.read())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot be used: {error}", where=self.output) from None
        if found != {"digest": job.digest}:
            raise UsageError(
                "is of another job: another artifact, seed, option, or other fields",
                where=self.output,
                hint="choose another directory",
            )

    def parts(self) -> list[str]:
        """The files with answers."""
        return self._paths(_SUFFIX)

    def _paths(self, suffix: str) -> list[str]:
        found = self._files.get_file_info(fs.FileSelector(self._root))
        return sorted(each.path for each in found if each.path.endswith(suffix))

    def done(self, id_column: str) -> NDArray[np.uint64]:
        """The digests of rows that have an answer, sorted. Raises UsageError for other files."""
        digests: list[int] = []
        for path in self.parts():
            try:
                column = pq.read_table(path, columns=[id_column], filesystem=self._files).column(0)
            except (pa.ArrowException, OSError) as error:
                raise UsageError(
                    f"cannot be read: {str(error).partition(chr(10))[0]}",
                    where=path,
                    hint="remove it, and its rows are computed again",
                ) from None
            digests += [row_digest(str(each)) for each in column.to_pylist()]
        return np.unique(np.array(digests, np.uint64))

    def write(self, table: pa.Table, rows: str) -> None:
        """Keeps a table. The same `rows` have the same file, however often they are written."""
        name = hashlib.blake2b(rows.encode(), digest_size=16).hexdigest()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self._write(sink.getvalue(), f"{self._root}/part-{name}{_SUFFIX}")

    def _write(self, data: bytes, path: str) -> None:
        partial = f"{path}.{uuid.uuid4().hex}{_PARTIAL}"
        with self._files.open_output_stream(partial) as file:
            file.write(data)
        if isinstance(self._files, fs.LocalFileSystem):
            sync(Path(partial))
        self._files.move(partial, path)
