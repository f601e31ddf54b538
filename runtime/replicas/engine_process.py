"""The process of one engine: commands of the front in, what steps gave out."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from ...ir.artifact import open_artifact
from ...ir.backends import DEFAULT, find_backend
from ...ir.errors import ArtifactError, CapacityError, DeviceError, InfcError
from ..engine import Engine
from ..faults import note_fault
from ..freed_memory import give_back_freed
from ..log import ServerLog
from ..log_writer import LOG_WRITER
from ..memory_reserve import RESERVE
from ..publisher import rest_of
from ..requests.outputs import RequestOutput
from ..requests.request_stream import PreparedRequest, RequestStream
from ..requests.resumption import Resumption
from ..scheduling.owners import StepTimes
from .block_news import BlockNews
from .child import ignore_signals
from .frames import MAX_FRAME_BYTES, FrameError, FrameReader
from .messages import (
    VERSION,
    Abort,
    Add,
    Added,
    Failed,
    Failure,
    FromEngine,
    Imported,
    Open,
    Opening,
    Ready,
    Report,
    Stats,
    Told,
    added_of,
    failure_of,
    frame_of,
    options_from_data,
    params_from_data,
    report_of,
    to_engine,
)

BEAT_SECONDS = 0.25
"""An engine that is alive, and not in a step, says something at least so often."""

_WHOLE_SECONDS = 0.25
"""So often something is told of a request whose tokens nobody reads one by one."""

_MANY_BYTES = MAX_FRAME_BYTES // 4
_IDLE_SECONDS = 0.005
_MAX_FAILED_STEPS = 3
_KEEP_STEPS = 256
_READ_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1
_LAST_LINES_SECONDS = 0.5
_SWITCH_SECONDS = 0.0005
_LATER = (find_backend(DEFAULT).executor.partition(":")[0], "tokenizers")
"""What opening an artifact imports, mostly."""

_Command = tuple[int, PreparedRequest | InfcError, bool] | int
"""A request to queue, or why it is refused, and whether it is a whole one; or one to end."""


class EngineProcess:
    """Runs an engine on the main thread; another one reads what the front says.

    Nothing is told by a thread of its own: silence is how the front learns of a step that hangs.
    """

    def __init__(
        self, connection: socket.socket, engine: Engine, *, tells_blocks: bool = False
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}
        self._whole: set[str] = set()
        self._begun: set[str] = set()  # of which something was told
        self._reports: list[Report] = []
        self._refusals: list[tuple[int, Failure]] = []
        self._num_failed_steps = 0
        self._works_ahead = True
        self._has_new = False  # a request, of which the front does not know yet whether it waits
        self._told_at = self._stats_at = self._whole_at = 0.0
        self._blocks = BlockNews(engine) if tells_blocks else None
        engine.on_step = self._on_step

    def run(self, reader: FrameReader) -> NoReturn:
        """Serve until the connection ends, which ends the process."""
        listener = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        listener.start()
        while True:
            self._obey()
            try:
                outputs = self._step()
            except Exception as error:
                self._survive(error)
            else:
                self._tell(outputs)

    # --- on the thread that listens -----------------------------------------------------------

    def _listen(self, reader: FrameReader) -> None:
        """Prepare what arrives. The end of the connection is the end of the process.

        So is an error: an engine that goes on, and hears nothing, would not be taken for dead.
        """
        status = 1
        try:
            while data := self._connection.recv(_READ_BYTES):
                for payload in reader.feed(data):
                    self._take(payload)
            status = 0
        except (OSError, FrameError) as error:
            logging.getLogger("infc.runtime").error("the connection to the front: %s", error)
            status = 0
        except BaseException as error:
            note_fault("reading what the front says", error)
        finally:
            LOG_WRITER.flush(_LAST_LINES_SECONDS)
            os._exit(status)

    def _take(self, payload: bytes) -> None:
        message = to_engine(payload)
        if isinstance(message, Add):
            try:
                self._commands.put((message.number, self._prepared(message), message.is_whole))
            except InfcError as error:
                self._commands.put((message.number, error, False))
            except Exception as error:
                reason = note_fault("preparing a request", error)
                self._commands.put((message.number, InfcError(reason), False))
        elif isinstance(message, Abort):
            self._commands.put(message.number)
        else:
            raise FrameError("it sent `open` twice")

    def _prepared(self, message: Add) -> PreparedRequest:
        resumed = message.resumed
        return self._engine.prepare(
            str(message.number),
            message.prompt,
            params_from_data(message.params),
            message.priority,
            cache_salt=message.cache_salt,
            resumed=None if resumed is None else Resumption.from_data(resumed),
        )

    # --- on the main thread -------------------------------------------------------------------

    def _obey(self) -> None:
        """Do what was asked for; with nothing else to do, wait for it."""
        engine = self._engine
        wait = not engine.has_unfinished
        if wait or engine.num_steps % _KEEP_STEPS == 0:
            RESERVE.keep()
        while wait and self._commands.empty() and self._work_ahead():
            pass
        while True:
            try:
                command = self._commands.get(block=wait, timeout=BEAT_SECONDS)
            except queue.Empty:
                return
            wait = False
            self._do(command)

    def _do(self, command: _Command) -> None:
        if isinstance(command, int):
            output = self._engine.abort(str(command))
            if output is not None:
                self._tell([output])
            return
        number, what, is_whole = command
        if isinstance(what, InfcError):
            self._refusals.append((number, failure_of(what)))
            return
        try:
            self._engine.submit(what)
        except InfcError as error:
            self._refusals.append((number, failure_of(error)))
            return
        self._streams[str(number)] = what.stream
        self._has_new = True
        if is_whole:
            self._whole.add(str(number))

    def _work_ahead(self) -> bool:
        try:
            return self._works_ahead and self._engine.work_ahead(_IDLE_SECONDS)
        except ArtifactError:
            raise
        except Exception as error:
            self._works_ahead = False
            note_fault("working ahead of steps", error)
            return False

    def _step(self) -> Sequence[RequestOutput]:
        if not self._engine.has_unfinished:
            return ()
        before = self._engine.num_steps
        RESERVE.ease()
        outputs = self._engine.step()
        if self._engine.num_steps > before:
            self._num_failed_steps = 0
        return outputs

    def _survive(self, error: Exception) -> None:
        """End the requests of a step that failed; raises the error where it is the end of all."""
        self._num_failed_steps += 1
        is_known = isinstance(error, (MemoryError, InfcError))
        is_final = isinstance(error, (ArtifactError, DeviceError))
        if is_final or not is_known or self._num_failed_steps >= _MAX_FAILED_STEPS:
            raise error
        note_fault("a step", error)
        reason = failure_of(InfcError(f"the step failed: {type(error).__name__}: {error}"))
        lost = [name for name in self._streams if not self._engine.knows(name)]
        self._tell([rest for name in lost if (rest := rest_of(self._streams[name])) is not None])
        for name in lost:
            self._refusals.append((int(name), reason))
            self._forget(name)

    def _on_step(self, times: StepTimes) -> None:
        self._reports.append(report_of(times))

    # --- what is told -------------------------------------------------------------------------

    def _tell(self, outputs: Sequence[RequestOutput]) -> None:
        """Say what has happened, or, after a while of silence, that nothing has."""
        now = time.monotonic()
        if now - self._whole_at > _WHOLE_SECONDS:
            self._whole_at = now
            for name in self._whole:
                self._streams[name].want()
        is_due = self._has_new and bool(self._reports)
        if not (outputs or self._refusals or is_due or now - self._told_at > BEAT_SECONDS):
            return
        stats = None
        if is_due or now - self._stats_at > BEAT_SECONDS or not self._engine.has_unfinished:
            self._stats_at, stats = now, self._stats()
            self._has_new = self._has_new and not is_due
        added, size, refusals = list[Added](), 0, tuple(self._refusals)
        for output in outputs:
            added.append(self._added(output))
            size += _estimated_bytes(output)
            if size > _MANY_BYTES:
                self._send(Told(tuple(added)))
                added, size = [], 0
        stored, removed = ((), ()) if self._blocks is None else self._blocks.take()
        self._send(Told(tuple(added), refusals, tuple(self._reports), stats, stored, removed))
        self._told_at, self._refusals, self._reports = now, [], []

    def _added(self, output: RequestOutput) -> Added:
        """The output as it is sent; lets the engine tell what comes next of it."""
        name = output.request_id
        is_first = name not in self._begun
        added = added_of(int(name), output, with_times=is_first or output.finished)
        if output.finished:
            self._forget(name)
        else:
            if is_first:
                self._begun.add(name)
            stream = self._streams[name]
            stream.is_wanted = False
            if name not in self._whole:
                stream.want()
        return added

    def _forget(self, name: str) -> None:
        self._streams.pop(name, None)
        self._whole.discard(name)
        self._begun.discard(name)

    def _stats(self) -> Stats:
        stats = self._engine.stats()
        return Stats(
            stats.num_waiting,
            stats.num_running,
            stats.num_free_blocks,
            stats.num_blocks,
            stats.num_preemptions,
            stats.num_steps,
            self._engine.scheduler.num_queued,
        )

    def _send(self, message: FromEngine) -> None:
        send(self._connection, message)


def _estimated_bytes(output: RequestOutput) -> int:
    """What an output may take of a frame, roughly; far more than a step gives mostly."""
    size = 1000 + (0 if output.prompt_logprobs is None else 300 * len(output.prompt_logprobs))
    for part in output.outputs:
        each = 10 if part.logprobs is None else 310
        size += 4 * len(part.text) + each * len(part.token_ids)
    return size


def send(connection: socket.socket, message: FromEngine) -> None:
    """Sends a message whole; the end of the process where nobody reads any more."""
    try:
        connection.sendall(frame_of(message))
    except OSError:
        os._exit(0)


def main(descriptor: int, parent: int) -> NoReturn:
    """Opens what the front asks for on an inherited socket, and serves until that is closed."""
    ignore_signals()
    _end_with(parent)
    for name in _LATER:  # the front may ask in an hour, and then cannot wait
        importlib.import_module(name)
    faulthandler.enable()
    # As in a server: whoever reads from the socket waits so long for the interpreter's lock.
    sys.setswitchinterval(_SWITCH_SECONDS)
    connection = socket.socket(fileno=descriptor)
    reader = FrameReader()
    send(connection, Imported())
    try:
        engine, tells_blocks = _open(connection, reader)
        gc.collect()
        gc.freeze()  # later collections look at what requests leave only
        give_back_freed()
        EngineProcess(connection, engine, tells_blocks=tells_blocks).run(reader)
    except InfcError as error:
        send(connection, Failed(failure_of(error), _is_temporary(error)))
    except BaseException as error:
        logging.getLogger("infc.runtime").error("an engine process failed", exc_info=error)
        text = f"the engine failed: {type(error).__name__}: {error}"
        send(connection, Failed(failure_of(InfcError(text)), _is_temporary(error)))
    LOG_WRITER.flush(_LAST_LINES_SECONDS)
    # At once: threads of the executor may wait for what will never come.
    os._exit(1)


def _is_temporary(error: BaseException) -> bool:
    """Whether it comes of what the system lacked, or of a file that was not there just then."""
    reasons = (error, error.__context__)  # `from None` leaves the context in place
    return any(isinstance(each, (OSError, MemoryError, CapacityError)) for each in reasons)


def _open(connection: socket.socket, reader: FrameReader) -> tuple[Engine, bool]:
    """The engine that the first message asks for, and whether it tells of blocks; it is ready."""
    payloads: list[bytes] = []
    while not payloads:
        try:
            data = connection.recv(_READ_BYTES)
        except ConnectionError:  # closed by a front that has not read what this process said
            data = b""
        if not data:
            os._exit(0)
        payloads = reader.feed(data)
    message = to_engine(payloads[0])
    if not isinstance(message, Open) or len(payloads) > 1:
        raise FrameError("the front began with something else than `open`")
    if message.version != VERSION:
        raise FrameError(
            f"the front speaks version {message.version}, and this engine version {VERSION}",
            hint="install one version of infc, and start the server again",
        )
    ServerLog(message.log_format, process=os.getpid()).take_over()
    send(connection, Opening())
    if message.cpus:
        os.sched_setaffinity(0, message.cpus)
    # Its files were verified by the front. What is there now must be the same.
    artifact = open_artifact(message.artifact, "none", weights="later")
    if artifact.identity != message.identity:
        raise ArtifactError(
            "the artifact was replaced by another one while it was being served",
            where=message.artifact,
            hint="start the server again",
        )
    options = options_from_data(message.options)
    engine = Engine.open(artifact, options, takes_text=False)
    send(connection, Ready(VERSION, artifact.identity))
    return engine, message.tells_blocks


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the one that started it ends, whatever that is doing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(0)
