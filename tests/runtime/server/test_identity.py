"""Who serves, who asks, and what is written down: names, key, request ids, logs, version."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner

import infc
from infc.driver.commands.serve import command
from infc.runtime.log import ServerLog
from infc.runtime.server.listener import open_listener

from ..small_artifact import write_small_artifact
from .serving import Serving, serving
from .test_errors import COMPLETION, RAW, refusal
from .test_stderr import BODY, served, stop


def test_a_model_of_several_names() -> None:
    with serving(model_names=("toy", "gpt-4o", "a/b")) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["toy", "gpt-4o", "a/b"]
        for name in ("toy", "gpt-4o", "a/b"):
            assert client.models.retrieve(name).id == name
            answer = client.completions.create(model=name, prompt="a", max_tokens=1)
            assert answer.model == name
        with pytest.raises(openai.NotFoundError, match="'toy', 'gpt-4o', 'a/b'"):
            client.completions.create(model="gpt-4", prompt="a")


def test_ids_of_requests_are_kept_or_made(server: Serving) -> None:
    def ask(given: str | None, path: str = "/v1/models") -> str:
        headers = {} if given is None else {"X-Request-Id": given}
        answer: str = httpx.get(f"{server.url}{path}", headers=headers).headers["x-request-id"]
        return answer

    for kept in ("a", "6f0c-11", "trace:1/2.3@x=y+z", "x" * 128):
        assert ask(kept) == kept
        assert ask(kept, "/nowhere") == kept, "errors have it too"
    for given in (None, "", "x" * 129, "a b", "a\tb", '"', "{}", "a,b"):
        assert re.fullmatch(r"req-[0-9a-f]{24}", ask(given))
    assert ask(None) != ask(None)
    answer = server.client().completions.create(model="toy", prompt="a", max_tokens=1)
    assert answer._request_id is not None and answer._request_id.startswith("req-")


def test_a_mistake_of_ours_has_an_id_and_no_details(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("secret internals")

    monkeypatch.setattr(server.engine, "stats", fail)
    response = httpx.get(f"{server.url}/metrics", headers={"X-Request-Id": "mine"})
    assert "secret" not in refusal(response, 500)["message"]
    assert response.headers["x-request-id"] == "mine"


def test_version_says_what_serves(server: Serving) -> None:
    assert httpx.get(f"{server.url}/version").json() == {
        "version": infc.__version__,
        "backend": "unknown",
    }


def test_logs_in_json(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small", generation={"no_repeat_ngram_size": 3})
    with served(small, "--log-requests", "--log-format", "json") as (popen, url):
        headers = {"X-Request-Id": "mine-1"}
        secret = {**BODY, "prompt": [11, 12, 13], "user": "somebody"}
        for stream in (False, True):
            answer = httpx.post(
                f"{url}/v1/completions", json={**secret, "stream": stream}, headers=headers
            )
            assert answer.status_code == 200
        httpx.post(f"{url}/v1/completions", content=RAW["NaN"], headers=headers)
        lines = [json.loads(line) for line in stop(popen)]
    assert [line["event"] for line in lines] == ["note", *["request"] * 3, "stopping"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", line["time"]) for line in lines)
    for line in lines[1:3]:
        assert line["request_id"] == "mine-1"
        assert line["answer_id"].startswith("cmpl-")
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 4)
        assert line["finish_reasons"] == ["length"]
        assert 0 < line["time_to_first_token_seconds"] <= line["seconds"] < 30
        assert line["cut_off"] is False
        assert "prompt" not in line and "user" not in line
    assert lines[3]["status"] == 415
    assert lines[3]["answer_id"] is None


def test_warnings_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    open_listener("0.0.0.0", 0, has_key=False, log=ServerLog("json")).close()
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["event"]) == ("warning", "warning")
    assert "no API key" in line["message"]
    handler = ServerLog("json").take_over()
    try:
        try:
            raise ValueError("seen\nin the log")
        except ValueError:
            logging.getLogger("infc.server").exception("a request failed")
    finally:
        for name in ("infc.server", "uvicorn.error", "asyncio"):
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).propagate = True
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("error", "a request failed")
    assert "ValueError: seen\nin the log" in line["exception"]


def test_prompts_are_logged_where_that_is_asked_for(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small")
    with served(small, "--log-prompts") as (popen, url):
        httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": "some\nsecret"}, timeout=30)
        line, _ = stop(popen)
    assert line.endswith(r'prompt "some\nsecret"')


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"sesame\nnot this\n", None), (b"\n", "empty"), (b"\xff\n", "UTF-8"), (None, "No such file")],
)
def test_the_key_may_lie_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, expected: str | None
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    given: dict[str, Any] = {}
    monkeypatch.setattr("infc.runtime.server.run.serve", lambda *_, **kwargs: given.update(kwargs))
    result = CliRunner().invoke(
        command, ["tiny.infc", "--api-key-file", str(path)], help_option_names=["-h", "--help"]
    )
    if expected is None:
        assert result.exit_code == 0
        assert given["api_key"] == "sesame"
        words = ["tiny.infc", "--api-key-file", str(path), "--api-key", "other"]
        two = CliRunner().invoke(command, words, help_option_names=["-h", "--help"])
        assert two.exit_code == 2 and "cannot be combined" in two.output
    else:
        assert result.exit_code == 2
        assert expected in result.output


def test_options_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("infc.runtime.server.run.serve", lambda *_, **kwargs: given.update(kwargs))
    words = ["a.infc", "--model-name", "x", "--served-model-name", "y", "--max-queue", "5"]
    words += ["--header-seconds", "0.5", "--log-prompts", "--open-metrics"]
    assert CliRunner().invoke(command, words, help_option_names=["-h", "--help"]).exit_code == 0
    assert given["model_name"] == ("x", "y")
    assert (given["max_queue"], given["header_seconds"]) == (5, 0.5)
    assert given["log_requests"] and given["log_prompts"] and given["open_metrics"]
    assert "max_connections" not in given, "what is not given has its default in one place"
    empty = CliRunner().invoke(
        command, ["a.infc", "--api-key", ""], help_option_names=["-h", "--help"]
    )
    assert empty.exit_code == 2


def test_wrong_keys_are_told_how_to_ask() -> None:
    with serving(api_key="sesame") as server:
        response = server.post("/v1/completions", COMPLETION)
        refusal(response, 401)
        assert response.headers["WWW-Authenticate"] == "Bearer"
