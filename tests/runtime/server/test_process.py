"""The whole process over the bundled model: start, drain, stop, and what it never loads."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import infc

from .test_disconnect import send_raw

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny" / "model.yaml"
PROGRAM = """
import json, sys
from infc.runtime.server.run import serve
try:
    serve(sys.argv[1], port=0, **json.loads(sys.argv[2]))
finally:
    print("loaded", *sorted({"torch", "transformers"} & set(sys.modules)), flush=True)
"""
# Some seconds of work, even where nothing else runs.
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": [f"value_{i} =" for i in range(24)],
    "max_tokens": 1000,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, compiled for this machine."""
    output = tmp_path_factory.mktemp("served") / "tiny.infc"
    infc.compile(RECIPE, output=output, verify=False)
    return output


@dataclass(frozen=True)
class Process:
    """A serving process that has said that it is ready."""

    popen: subprocess.Popen[str]
    url: str

    def client(self) -> openai.OpenAI:
        """The unmodified client; it never tries twice."""
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def end(self, seconds: float = 10) -> tuple[int, str]:
        """Waits for the end; the exit status, and what was printed since it was ready."""
        out, _ = self.popen.communicate(timeout=seconds)
        return self.popen.returncode, out


@contextlib.contextmanager
def process(artifact: Path, settings: str = "{}") -> Iterator[Process]:
    """Serves from a process of its own until left."""
    popen = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(artifact), settings],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert popen.stdout is not None
        ready = popen.stdout.readline().split()
        assert ready[:3] == ["serving", "tiny", "at"]
        assert ready[3].startswith("http://127.0.0.1:")
        yield Process(popen, ready[3])
    finally:
        popen.kill()
        popen.communicate()


def infc_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A start that ends by itself."""
    command = [sys.executable, "-m", "infc", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_many_streams_of_the_bundled_model_and_no_torch(artifact: Path) -> None:
    def request(index: int) -> dict[str, Any]:
        sampled = {"temperature": 0.8, "seed": index} if index % 2 else {"temperature": 0}
        prompt = f"def function_{index}(" + "x, " * index
        return {"model": "tiny", "prompt": prompt, "max_tokens": 8 + index % 7, **sampled}

    async def stream(client: openai.AsyncOpenAI, index: int) -> str:
        chunks = await client.completions.create(stream=True, **request(index))
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def run(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, index) for index in range(64)))

    with process(artifact) as server:
        client = server.client()
        alone = [client.completions.create(**request(i)).choices[0].text for i in range(64)]
        assert asyncio.run(run(server.url)) == alone
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "def f"}], max_tokens=4
        )
        assert answer.usage is not None and answer.usage.completion_tokens <= 4
        server.popen.send_signal(signal.SIGTERM)
        assert server.end() == (0, "loaded\n")


def test_first_signal_lets_answers_end_and_takes_no_more(artifact: Path) -> None:
    with process(artifact) as server:
        chunks = server.client().completions.create(stream=True, **{**LONG, "max_tokens": 60})
        texts = dict.fromkeys(range(24), 0)
        ends = []
        for number, chunk in enumerate(chunks):
            if number == 0:
                server.popen.send_signal(signal.SIGTERM)
            texts[chunk.choices[0].index] += len(chunk.choices[0].text)
            ends += [c.finish_reason for c in chunk.choices if c.finish_reason]
        assert ends == ["length"] * 24
        assert all(texts.values())
        status, _ = server.end()
        assert status == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)


def test_no_new_connection_while_draining(artifact: Path) -> None:
    with process(artifact) as server:
        chunks = server.client().completions.create(stream=True, **LONG)
        next(iter(chunks))
        server.popen.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        with contextlib.suppress(httpx.TransportError):
            while time.monotonic() < deadline:
                httpx.get(f"{server.url}/models")
        assert time.monotonic() < deadline, "it went on taking connections"
        assert server.popen.poll() is None, "it did not wait for the stream"
        chunks.close()
        assert server.end()[0] == 0


def test_second_signal_ends_everything_at_once(artifact: Path) -> None:
    with process(artifact) as server:
        chunks = server.client().completions.create(stream=True, **LONG)
        next(iter(chunks))
        server.popen.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.popen.poll() is None, "it did not wait for the stream"
        begun = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
        assert time.monotonic() - begun < 3
        with pytest.raises((httpx.TransportError, openai.APIError)):
            list(chunks)


def test_a_drain_that_takes_too_long_says_so_in_the_stream(artifact: Path) -> None:
    with process(artifact, '{"drain_seconds": 0.2}') as server:
        chunks = server.client().completions.create(stream=True, **LONG)
        next(iter(chunks))
        server.popen.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shut down"):
            list(chunks)
        assert server.end()[0] == 0


def test_a_reader_that_never_reads_does_not_hold_up_the_end(artifact: Path) -> None:
    with process(artifact, '{"stall_seconds": 0.3}') as server:
        body = {**LONG, "stream": True, "logprobs": 20, "ignore_eos": True}
        del body["extra_body"]
        raw = send_raw(server.url.removesuffix("/v1"), body)
        assert raw.recv(10)
        time.sleep(0.5)
        server.popen.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert server.end(28)[0] == 0
        assert time.monotonic() - begun < 25, "it waited for a client that is not there"
        raw.close()


def test_ctrl_c_is_no_traceback(artifact: Path) -> None:
    command = [sys.executable, "-m", "infc", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline().startswith("serving tiny at")
        popen.send_signal(signal.SIGINT)
        _, errors = popen.communicate(timeout=10)
    assert popen.returncode == 130
    assert "Traceback" not in errors


def test_what_cannot_be_served_is_one_line(artifact: Path, tmp_path: Path) -> None:
    with process(artifact) as server:
        port = str(httpx.URL(server.url).port)
        taken = infc_serve(str(artifact), "--port", port)
    assert taken.returncode == 2
    assert f"127.0.0.1:{port}" in taken.stderr and taken.stderr.count("\n") == 1
    missing = infc_serve(str(tmp_path / "none.infc"), "--port", "0")
    assert missing.returncode == 7
    assert "does not exist" in missing.stderr and missing.stderr.count("\n") == 1
    damaged = tmp_path / "tiny.infc"
    shutil.copytree(artifact, damaged)
    with (damaged / "weights.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    broken = infc_serve(str(damaged), "--port", "0")
    assert broken.returncode == 7
    assert "digest" in broken.stderr and broken.stderr.count("\n") == 1
    assert broken.stdout == "", "it said that it was ready"


def test_an_open_door_is_warned_of(artifact: Path, tmp_path: Path) -> None:
    shutil.copy(artifact / "manifest.json", tmp_path)  # found, and then refused
    nobody = infc_serve(str(tmp_path), "--host", "0.0.0.0", "--port", "0")
    assert "warning: 0.0.0.0 can be reached from other machines" in nobody.stderr
    key = infc_serve(str(tmp_path), "--host", "0.0.0.0", "--port", "0", "--api-key", "sesame")
    assert "warning" not in key.stderr and "sesame" not in key.stderr


def address_space(pid: int | str) -> int:
    """Bytes that a process has mapped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmSize"))
    return int(line.split()[1]) << 10


def test_everybody_is_answered_where_memory_gets_tight(artifact: Path) -> None:
    """No more may be mapped than there is. The process lives, and serves as before afterwards."""
    body = {**LONG, **LONG["extra_body"], "prompt": "x =", "max_tokens": 200, "n": 2}
    del body["extra_body"]

    def ask(url: str) -> int:
        return httpx.post(
            f"{url}/completions", json={**body, "logprobs": 5}, timeout=60
        ).status_code

    with process(artifact) as server, ThreadPoolExecutor(29) as pool:
        assert ask(server.url) == 200
        answers = [pool.submit(ask, server.url) for _ in range(29)]
        time.sleep(0.3)
        pid = server.popen.pid
        before = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (address_space(pid) + (1 << 20), before[1]))
        statuses = [answer.result() for answer in answers]
        resource.prlimit(pid, resource.RLIMIT_AS, before)
        assert set(statuses) <= {200, 500, 503}
        assert statuses.count(200) > 20
        assert ask(server.url) == 200
        assert httpx.get(server.url.removesuffix("v1") + "health").status_code == 200
        server.popen.terminate()
        assert server.end()[0] == 0


TIGHT = """
import asyncio, resource, sys
import infc

def address_space():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmSize")).split()[1]) << 10

async def ask(llm):
    params = infc.SamplingParams(max_tokens=200, ignore_eos=True, logprobs=5, n=2)
    return [output async for output in llm.generate("x =", params)][-1].finished

async def main():
    async with infc.AsyncLLM(sys.argv[1], threads=1) as llm:
        assert await ask(llm)
        tasks = [asyncio.ensure_future(ask(llm)) for _ in range(29)]
        await asyncio.sleep(0.3)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (address_space(), hard))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert all(a is True or isinstance(a, infc.InfcError) for a in answers), answers
        assert sum(a is True for a in answers) > 20, answers
        assert await ask(llm)

asyncio.run(main())
"""


def test_an_async_llm_returns_where_memory_gets_tight(artifact: Path) -> None:
    command = [sys.executable, "-c", TIGHT, str(artifact)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
