"""Standard streams that are closed, full, or of few characters: no fault of ours."""

import os
import subprocess
import sys

import pytest

INFC = f"exec {sys.executable} -m infc"


def run_shell(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command of a shell, which can close streams."""
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        ("passes >&-", 0, ""),
        ("passes <&-", 0, ""),
        ("passes 2>&-", 0, ""),
        ("passes <&- >&- 2>&-", 0, ""),
        ("generate nothing.infc <&-", 7, "error: nothing.infc: the artifact does not exist"),
        ("generate nothing.infc 2>&-", 7, ""),
        ("passes >/dev/full", 1, "error: No space left on device\n"),
        ("generate nothing.infc 2>/dev/full", 7, ""),
    ],
)
def test_closed_and_full_streams(arguments: str, status: int, error: str) -> None:
    result = run_shell(f"{INFC} {arguments}")
    assert (result.returncode, result.stderr[: len(error)]) == (status, error)
    assert "a fault in infc" not in result.stderr and "Traceback" not in result.stderr


def test_what_an_encoding_has_not_is_written_as_escapes() -> None:
    program = (
        "from infc.driver.streams import settle_streams; settle_streams(); print('a\U0001f336é')"
    )
    command = f'exec {sys.executable} -X utf8=0 -c "{program}"'
    for encoding, expected in (("ascii", r"a\U0001f336\xe9"), ("latin-1", r"a\U0001f336é")):
        result = run_shell(f"{command} | iconv -f latin1 -t utf8", PYTHONIOENCODING=encoding)
        assert result.stdout == f"{expected}\n", result.stderr


def test_no_file_takes_the_place_of_a_stream() -> None:
    program = (
        "from infc.driver.streams import settle_streams; settle_streams(); import os, sys;"
        " sys.exit(os.open('/dev/zero', os.O_RDONLY))"
    )
    assert run_shell(f'exec {sys.executable} -c "{program}" <&- >&- 2>&-').returncode > 2
