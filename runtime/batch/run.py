"""`run_batch`: from an input file to an output file, and on from wherever that was cut off."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from ...ir.artifact import Artifact, Verification
from ...ir.errors import UsageError
from ..api.progress_bar import ProgressBar
from ..options import RuntimeOptions
from ..server.event_loop import SturdyEventLoop
from ..server.interpreter import short_waits
from ..server.opening import open_served
from ..server.settings import ServerSettings
from .bodies import BodyAnswers, batch_settings, row_seed, whole_context
from .output import OutputFile, answer_line, error_line
from .rows import Row, RowError, RowReader, RowRequest, read_rows

_FORMAT = 1  # of what is written: another one changes bytes
_ROWS_A_SEQUENCE = 4  # that are begun for each one that a step may have
_MOST_ROWS = 1024
_MOST_BYTES = 64 << 20  # of rows that are begun, and of answers that wait for earlier ones
_ENVELOPE_BYTES = 1 << 16  # of a row, around its body
_COUNTED_BYTES = 1 << 20

_Line = tuple[bytes, bool]
"""What is written for a row, and whether that is an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What is to be done; `processes` 0 is an engine in this process."""

    source: Path
    output: Path
    model_names: tuple[str, ...]
    seed: int = 0
    processes: int = 0
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    verify: Verification = "stamp"
    hung_seconds: float = 60.0


@dataclass(slots=True)
class BatchResult:
    """How far a batch is: rows in the output, those of them that were there before, and those
    without an answer; and the signal that ended it, if one did."""

    num_rows: int = 0
    num_before: int = 0
    num_failed: int = 0
    stopped_by: int | None = None


def run_batch(
    artifact: Artifact,
    options: BatchOptions,
    *,
    progress: bool = True,
    note: Callable[[str], None] = lambda note: None,
) -> BatchResult:
    """Answers every row of a file that has no answer yet.

    `artifact` may have been opened with `weights="later"`. Raises UsageError for a file that
    cannot be read or written, or an output that is of something else, and what opening an engine
    raises. SIGINT and SIGTERM end it early, and it can be continued.
    """
    settings = batch_settings(artifact, options.model_names)
    runtime = replace(
        options.runtime,
        max_context=whole_context(artifact, options.runtime),
        max_waiting=settings.max_queue,
    )
    options = replace(options, runtime=runtime)
    weights = artifact.verify_weights()
    with contextlib.ExitStack() as ending:
        source = ending.enter_context(_open_source(options))
        output = ending.enter_context(OutputFile(options.output))
        batch = _Batch(artifact, options, settings, source, output)
        batch.skip_written()
        if batch.is_done():
            return batch.result
        bar = ProgressBar("rows", _num_lines(options.source) if progress else 0, on=progress)
        opened = open_served(
            artifact,
            runtime,
            options.processes,
            ending,
            verify=options.verify,
            hung_seconds=options.hung_seconds,
            note=note,
        )
        weights.result()
        opened.wait()
        answers = BodyAnswers(opened.engine, opened.tokenizer, settings)
        with (
            short_waits(),
            _own_signals(),
            asyncio.Runner(loop_factory=SturdyEventLoop) as runner,
            bar,
        ):
            runner.run(batch.run(answers, bar))
        return batch.result


class _Batch:
    """Rows between the two files: begun in their order, as many as help, and written in it."""

    def __init__(
        self,
        artifact: Artifact,
        options: BatchOptions,
        settings: ServerSettings,
        source: BinaryIO,
        output: OutputFile,
    ) -> None:
        self.result = BatchResult()
        self._options = options
        self._output = output
        max_bytes = settings.max_body_bytes + _ENVELOPE_BYTES
        limits = artifact.manifest.main.limits
        self._rows = read_rows(source, _job_key(artifact, options), max_bytes)
        self._reader = RowReader(max_bytes, settings.max_prompts * limits.max_context)
        sequences = options.runtime.max_sequences or limits.max_sequences
        wanted = _ROWS_A_SEQUENCE * sequences * max(1, options.processes)
        self._most_rows = min(wanted, _MOST_ROWS)
        self._begun: deque[asyncio.Task[_Line]] = deque()
        self._num_bytes = 0

    def skip_written(self) -> None:
        """Goes behind the rows whose lines are there. Raises UsageError for lines of others."""
        end = 0
        for line in self._output.written():
            row = next(self._rows, None)
            if row is None or not line.is_of(row.name):
                raise UsageError(
                    f"line {self.result.num_rows + 1} is not of this job, but of another input,"
                    " artifact or option",
                    where=str(self._output.path),
                    hint="choose another output file",
                )
            if not line.whole:
                self._rows = chain([row], self._rows)
                break
            with contextlib.suppress(RowError):
                self._reader.read(row)
            self._count(line.has_answer)
            end = line.end
        self.result.num_before = self.result.num_rows
        self._output.cut(end)

    def is_done(self) -> bool:
        """Whether no row is left."""
        row = next(self._rows, None)
        if row is not None:
            self._rows = chain([row], self._rows)
        return row is None

    async def run(self, answers: BodyAnswers, bar: ProgressBar) -> None:
        """Answers what is left, until a signal."""
        stopped = asyncio.Event()
        self._listen(stopped)
        bar.advance(self.result.num_before)
        stop = asyncio.ensure_future(stopped.wait())
        try:
            self._begin(answers)
            while self._begun and not stopped.is_set():
                first = self._begun[0]
                await asyncio.wait({first, stop}, return_when=asyncio.FIRST_COMPLETED)
                bar.advance(self._write())
                self._begin(answers)
        finally:
            stop.cancel()
            for task in self._begun:
                task.cancel()
            await asyncio.gather(*self._begun, stop, return_exceptions=True)
            self._output.sync()

    def _listen(self, stopped: asyncio.Event) -> None:
        def stop(number: int) -> None:
            self.result.stopped_by = self.result.stopped_by or number
            stopped.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not in the main thread
                    asyncio.get_running_loop().add_signal_handler(number, stop, number)

    def _begin(self, answers: BodyAnswers) -> None:
        """Begins rows while there is room, and one in any case."""
        while not self._begun or (
            len(self._begun) < self._most_rows and self._num_bytes < _MOST_BYTES
        ):
            if (row := next(self._rows, None)) is None:
                return
            self._num_bytes += len(row.line or b"")
            self._begun.append(self._line(answers, row))

    def _write(self) -> int:
        """Writes the lines that are there up to the first that is not; how many."""
        count = 0
        while self._begun and self._begun[0].done():
            line, has_answer = self._begun.popleft().result()
            self._output.append(line)
            self._num_bytes -= len(line)
            self._count(has_answer)
            count += 1
        return count

    def _count(self, has_answer: bool) -> None:
        self.result.num_rows += 1
        self.result.num_failed += not has_answer

    def _line(self, answers: BodyAnswers, row: Row) -> asyncio.Task[_Line]:
        """Begins a row. It is checked now, as its `custom_id` counts for those behind it."""
        read: RowRequest | RowError
        try:
            read = self._reader.read(row)
        except RowError as error:
            read = error
        return asyncio.ensure_future(self._answered(answers, read, row.name, len(row.line or b"")))

    async def _answered(
        self, answers: BodyAnswers, read: RowRequest | RowError, name: str, num_bytes: int
    ) -> _Line:
        if isinstance(read, RowError):
            line, has_answer = error_line(name, read), False
        else:
            seed = row_seed(self._options.seed, read.custom_id)
            answer = await answers.answer(read.url, read.body, name=name, seed=seed)
            line, has_answer = answer_line(name, read.custom_id, answer), answer.status == 200
        self._num_bytes += len(line) - num_bytes
        return line, has_answer


def _job_key(artifact: Artifact, options: BatchOptions) -> bytes:
    """A digest of all that answers depend on besides their rows."""
    parts = [
        _FORMAT,
        metadata.version("infc"),
        artifact.identity,
        options.model_names,
        options.seed,
        options.runtime.max_context,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()


def _open_source(options: BatchOptions) -> BinaryIO:
    """The input, which has at least one row. Raises UsageError."""
    path = options.source
    if path.exists() and not path.is_file():  # opening a pipe would wait for who writes to it
        raise UsageError("is not a regular file", where=str(path), hint="write the rows to one")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by who asked for it
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot be read: {reason}", where=str(path)) from None
    try:
        if options.output.exists() and options.output.samefile(path):
            raise UsageError("is both input and output", where=str(path))
        if not any(line.strip() for line in iter(lambda: file.readline(_COUNTED_BYTES), b"")):
            raise UsageError("has no rows", where=str(path))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _num_lines(path: Path) -> int:
    """For the progress bar."""
    with path.open("rb") as file:
        pieces = iter(lambda: file.read(_COUNTED_BYTES), b"")
        return sum(piece.count(b"\n") for piece in pieces)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Puts handlers of signals back, which an event loop forgets."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
