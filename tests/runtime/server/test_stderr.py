"""What a server says on stderr: notes at its start, a line a request, and one at its end."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..small_artifact import write_small_artifact
from .test_disconnect import send_raw

BODY: dict[str, Any] = {"model": "small", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


@contextlib.contextmanager
def served(artifact: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A serving process and its address."""
    command = [sys.executable, "-m", "infc", "serve", str(artifact), "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as popen:
        try:
            assert popen.stdout is not None
            ready = popen.stdout.readline().split()
            assert ready[:3] == ["serving", "small", "at"]
            yield popen, ready[3].removesuffix("/v1")
        finally:
            popen.kill()


def stop(popen: subprocess.Popen[str]) -> list[str]:
    """The lines that a server has written when it was stopped."""
    popen.send_signal(signal.SIGTERM)
    _, errors = popen.communicate(timeout=20)
    assert popen.returncode == 0
    return errors.splitlines()


def test_recommendations_that_are_ignored(tmp_path: Path) -> None:
    generation = {"do_sample": True, "no_repeat_ngram_size": 3, "top_k": 20}
    with served(write_small_artifact(tmp_path / "small", generation=generation)) as (popen, _):
        assert stop(popen) == [
            "note: the checkpoint recommends no_repeat_ngram_size 3: not supported, ignored",
            "stopping",
        ]


def test_recommended_lists_are_what_a_request_leaves_out(tmp_path: Path) -> None:
    body = {**BODY, "return_token_ids": True}

    def answer(url: str, **more: Any) -> list[int]:
        answered = httpx.post(f"{url}/v1/completions", json={**body, **more}, timeout=30).json()
        ids: list[int] = answered["choices"][0]["token_ids"]
        return ids

    with served(write_small_artifact(tmp_path / "plain/small")) as (_, url):
        plain = answer(url, temperature=0)
    generation = {"suppress_tokens": plain[:1], "sequence_bias": [[plain[1:2], -100.0]]}
    with served(write_small_artifact(tmp_path / "small", generation=generation)) as (popen, url):
        assert plain[0] not in answer(url, temperature=0)
        assert answer(url, temperature=0, banned_token_ids=[], logit_bias={}) == plain
        assert stop(popen) == ["stopping"]


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    bare = write_small_artifact(tmp_path / "small", with_tokenizer=False)
    with served(bare) as (popen, url):
        answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=30).json()
        assert len(answer["choices"][0]["token_ids"]) == 4
        note, _ = stop(popen)
    assert note.startswith("note: no tokenizer:") and "`token_ids`" in note


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_a_request(tmp_path: Path, stream: bool) -> None:
    small = write_small_artifact(tmp_path / "small")
    with served(small, "--log-requests") as (popen, url):
        body = {**BODY, "stream": stream}
        answer = httpx.post(
            f"{url}/v1/completions", json=body, headers={"X-Request-Id": "mine-1"}, timeout=30
        )
        found = re.search(r'"id":"(cmpl-\w+)"', answer.text)
        assert found is not None
        assert httpx.post(f"{url}/v1/completions", json={**BODY, "n": 0}).status_code == 400
        assert httpx.get(f"{url}/a%0Ab").status_code == 404
        lines = stop(popen)
    done, refused, lost, _ = lines
    head, took = f"POST /v1/completions 200 mine-1 {found[1]} 3+4 tokens", r"\d+\.\d\d s"
    assert re.fullmatch(rf"{re.escape(head)} {took}, first after {took}, length", done)
    assert re.fullmatch(
        rf"POST /v1/completions 400 req-\w{{24}} - 0\+0 tokens {took}, n: input .*", refused
    )
    assert lost.startswith("GET /a%0Ab 404 req-")
    assert lost.endswith(", unknown_route: no route GET /ab")


def test_ctrl_c_is_no_error(tmp_path: Path) -> None:
    with served(write_small_artifact(tmp_path / "small")) as (popen, _):
        popen.send_signal(signal.SIGINT)
        _, errors = popen.communicate(timeout=20)
    assert (popen.returncode, errors) == (130, "stopping\n")


def test_stopping_says_what_it_waits_for(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small")
    with served(small, "--log-requests") as (popen, url):
        # Long enough (seconds) that it cannot end before the connection is seen to be closed.
        raw = send_raw(url, {**BODY, "n": 64, "max_tokens": 90, "stream": True})
        assert raw.recv(10)
        popen.send_signal(signal.SIGTERM)
        assert popen.stderr is not None
        assert popen.stderr.readline() == "stopping, 1 answer to finish within 30 s\n"
        raw.close()
        line = popen.stderr.readline()
        assert line.startswith("POST /v1/completions 200 req-")
        assert line.endswith(", cut off\n")
        popen.communicate(timeout=20)
