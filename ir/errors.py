"""The exceptions of infc. Each says what is wrong, where, and what to do.

InfcError
├── UsageError            a bad argument, recipe, option or pipeline                    exit 2
│   └── RecipeError       `model.yaml` itself: carries the file and line
├── CheckpointError       the model directory is missing, damaged or inconsistent       exit 3
│   └── UnsupportedModelError   understood, and refused with the layer and the reason
├── ProgramError          an IR program that is malformed or illegal in its phase       exit 4
│   ├── ParseError        IR text: carries line and column
│   └── PassError         a pass failed, or broke its numeric contract
├── ToolchainError        no compiler, or the compiler failed                           exit 5
├── TargetError           this machine lacks what the artifact was built for            exit 6
├── ArtifactError         missing, damaged, locked, or made by a newer infc             exit 7
├── CapacityError         does not fit in the memory, context or pool it was given      exit 8
│   ├── ContextError      more tokens than the model has positions
│   └── DrainingError     no room ever again: the engine takes no more requests
└── RequestError          one request is refused; its neighbours never notice     exit 2, HTTP 400
"""

from __future__ import annotations


class InfcError(Exception):
    """An error with a message, a place and a hint; the command line prints it as one line."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(InfcError):
    """An invalid argument, option or pipeline."""

    exit_code = 2


class RecipeError(UsageError):
    """An invalid recipe; `where` is `FILE:LINE`."""


class CheckpointError(InfcError):
    """A checkpoint that is missing, damaged or inconsistent."""

    exit_code = 3


class UnsupportedModelError(CheckpointError):
    """A model that is not supported, with the layer and the reason."""


class ProgramError(InfcError):
    """A program that is malformed, or contains an op that is not allowed in its phase."""

    exit_code = 4


class ParseError(ProgramError):
    """IR text that cannot be parsed; `line` and `column` count from 1."""

    def __init__(self, message: str, *, line: int, column: int, source: str = "<text>") -> None:
        self.line = line
        self.column = column
        super().__init__(message, where=f"{source}:{line}:{column}")


class PassError(ProgramError):
    """A pass that failed or broke its numeric contract."""


class ToolchainError(InfcError):
    """The C++ compiler or a library is missing, or the compiler failed."""

    exit_code = 5


class TargetError(InfcError):
    """An instruction set or platform that is unknown, or not available on this machine."""

    exit_code = 6


class ArtifactError(InfcError):
    """An artifact that is missing, damaged, locked, made by a newer infc, or cannot be written."""

    exit_code = 7


class DeviceError(InfcError):
    """A device that is missing, does not fit, or reported an error."""

    exit_code = 9


class CapacityError(InfcError):
    """The memory, context or block pool is too small."""

    exit_code = 8


class ContextError(CapacityError):
    """A context that the model itself does not have, however much memory there is."""


class DrainingError(CapacityError):
    """A request that arrived during shutdown; it is not worth retrying."""


class RequestError(InfcError):
    """A request that is rejected; `field` names the field that is wrong."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.field = field
        super().__init__(message, where=where, hint=hint)


class Terminated(SystemExit):
    """The process was told to end (SIGTERM): what is half written is removed on the way out."""
