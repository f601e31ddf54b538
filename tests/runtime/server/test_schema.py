"""The description of the API holds: schemathesis sends what it allows and what it does not.

`INFC_SCHEMA_EXAMPLES=300` makes a long run of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from .serving import Serving, serving

EXAMPLES = int(os.environ.get("INFC_SCHEMA_EXAMPLES", "20"))
KEY = {"Authorization": "Bearer sesame"}


@pytest.mark.slow
@pytest.mark.parametrize("api_key", [None, "sesame"], ids=["open", "with a key"])
def test_no_request_finds_a_mistake(tmp_path: Path, api_key: str | None) -> None:
    # A context that is short is filled soon, by whoever asks for all that there is.
    with serving(max_context=48, api_key=api_key, max_logprobs=3) as server:
        run(server, tmp_path, api_key)
        server.wait_until_empty()
        assert server.engine.healthy
        assert server.model.num_tokens > 100, "some of it was answered"


def run(server: Serving, directory: Path, api_key: str | None) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--no-color", "--continue-on-failure"]
    command += ["--generation-database", "none", "--request-timeout", "60"]
    if EXAMPLES <= 20:
        command += ["--seed", "1"]
    # What fields mean together is not in a schema: a prompt and an answer that are too long.
    command += ["--exclude-checks", "positive_data_acceptance"]
    if api_key is None:
        command += ["--max-examples", str(EXAMPLES)]
    else:  # of no other interest than that it is asked for
        command += ["--header", f"Authorization: Bearer {api_key}"]
        command += ["--max-examples", "2", "--phases", "examples,fuzzing"]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "7 selected / 7 total" in done.stdout, done.stdout


def schema_of(server: Serving) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return found


def test_the_description_has_the_limits_of_this_server() -> None:
    with serving(model_names=("toy", "b"), max_choices=7, max_logprobs=3, max_prompts=5) as server:
        document = schema_of(server)
        post = document["paths"]["/v1/completions"]["post"]
        fields = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert fields["model"]["enum"] == ["toy", "b"]
        assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 7}
        assert fields["logprobs"]["anyOf"][0]["maximum"] == 3
        assert [kind.get("maxItems") for kind in fields["prompt"]["anyOf"]] == [None, None, 5, 5]
        assert set(post["responses"]) == {
            "200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"
        }  # fmt: skip
        assert "Retry-After" in post["responses"]["429"]["headers"]
        assert "securitySchemes" not in document["components"]


def test_the_description_asks_for_the_key_where_there_is_one() -> None:
    with serving(api_key="sesame") as server:
        document = schema_of(server)
        assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        for path, kinds in document["paths"].items():
            for operation in kinds.values():
                assert ("security" in operation) == (path != "/health"), path
        for path in ("/docs", "/openapi.json", "/health"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        for path in ("/v1/models", "/metrics", "/version"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
            assert httpx.get(f"{server.url}{path}", headers=KEY).status_code == 200


def test_examples_of_the_description_are_answered(server: Serving) -> None:
    document = schema_of(server)
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in body["examples"].values():
            assert server.post(path, example["value"]).status_code == 200
