"""Throughput of `infc serve` beside the same work offline, and what a token costs the server.

    python benchmarks/serving.py ARTIFACT [--streams 16,64] [--rounds 7] [--tokens 128]
        [--answers 4] [--replicas 1]

Each round asks for as many answers in turns: in one call of `LLM.generate` in this process, and of
a server in another, for whole answers and for streamed ones. So many sequences or streams run at
once; each stream asks again when it has its answer. The client is a loop over raw sockets in this
process: it reads bytes and counts events. On a machine with few processors it takes time from the
server, so its share is printed as well.

Printed for each: tokens/s, its ratio to offline, round by round, and CPU time a token: of the whole
process, executor included; of the server without what the same tokens cost offline; of the event
loop's thread alone; and of the client. The host part of a step is its time without the executor, as
the engine measures it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import infc
from infc.ir.machine import available_cpus, cpu_model
from infc.runtime.scheduling.owners import StepTimes

WAYS = ("offline", "whole", "streamed")
_PROMPT_TOKENS = 32
_READ_BYTES = 1 << 16


@dataclass(slots=True)
class Run:
    """What some streams took together: seconds, and CPU seconds of who took part."""

    tokens: int = 0
    seconds: float = 0.0
    process: float = 0.0
    loop: float = 0.0
    client: float = 0.0
    host: float = 0.0
    steps: int = 0
    events: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass(slots=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        place = urlsplit(self.url)
        return place.hostname or "", place.port or 0

    def cpu(self) -> tuple[float, float]:
        """CPU seconds of all threads, and of the one that runs the event loop."""
        each = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            each[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        return sum(each.values()), each[self.process.pid]

    def steps(self) -> tuple[float, int]:
        """Seconds of all steps without the executor, and their number."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            page = answer.read().decode()
        name = "infc_step_host_time_seconds"
        total, count = (
            re.search(rf"^{name}_{what} (\S+)$", page, re.MULTILINE) for what in ("sum", "count")
        )
        assert total is not None and count is not None
        return float(total[1]), int(float(count[1]))


@contextlib.contextmanager
def serve(
    artifact: Path, command: str, replicas: int, further: Sequence[str] = ()
) -> Iterator[Server]:
    """`infc serve` on a free port, until left."""
    words = [*command.split(), "serve", str(artifact), "--port", "0", "--model-name", "m", *further]
    if replicas:  # another commit's infc may not know it
        words += ["--replicas", str(replicas)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as it:
        assert it.stdout is not None
        try:
            for line in it.stdout:
                if found := re.search(r"(http://\S+)/v1", line):
                    yield Server(it, found[1])
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            it.terminate()
            it.wait()


def prompts_of(name: str, count: int) -> list[list[int]]:
    """Prompts that share no prefix, neither with each other nor with those of another name."""
    draw = random.Random(name)
    return [[draw.randrange(3, 4096) for _ in range(_PROMPT_TOKENS)] for _ in range(count)]


def offline(llm: infc.LLM, prompts: list[list[int]], num_tokens: int) -> Run:
    """All in one call."""
    params = infc.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    host, steps = 0.0, 0

    def note(times: StepTimes) -> None:
        nonlocal host, steps
        host += times.seconds - times.executor_seconds
        steps += 1

    llm.engine.on_step = note
    begun, cpu = time.perf_counter(), time.process_time()
    answers = llm.generate(prompts, params)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return Run(tokens, seconds, process=cpu, host=host, steps=steps)


class Client:
    """So many connections, one a stream."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self.sockets = [socket.create_connection(address) for _ in range(count)]
        for each in self.sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Close all of them."""
        for each in self.sockets:
            each.close()

    def ask(self, prompts: list[list[int]], num_tokens: int, *, stream: bool) -> list[bytes]:
        """The answers to all prompts: head and body as they came."""
        end = b"\r\n0\r\n\r\n"
        left = [request_of(prompt, num_tokens, stream=stream) for prompt in prompts]
        answers: list[bytes] = []
        received: dict[socket.socket, list[bytes]] = {}
        with selectors.DefaultSelector() as selector:
            for each in self.sockets:
                each.sendall(left.pop())
                received[each] = []
                selector.register(each, selectors.EVENT_READ)
            while received:
                for key, _ in selector.select():
                    each = key.fileobj
                    assert isinstance(each, socket.socket)
                    data = each.recv(_READ_BYTES)
                    if not data:
                        raise SystemExit("the server closed a connection")
                    parts = received[each]
                    parts.append(data)
                    end_of_it = b"".join(parts[-2:] if stream else parts)
                    if end_of_it.endswith(end) if stream else whole_is_there(end_of_it):
                        answers.append(b"".join(parts))
                        parts.clear()
                        if left:
                            each.sendall(left.pop())
                        else:
                            selector.unregister(each)
                            del received[each]
        return answers


def request_of(prompt: list[int], num_tokens: int, *, stream: bool) -> bytes:
    """One request on the wire."""
    body = {"model": "m", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + data


def whole_is_there(answer: bytes) -> bool:
    """Whether an answer with a length has all of its body."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert length is not None, head
    return len(body) >= int(length[1])


def served(
    server: Server, count: int, prompts: list[list[int]], num_tokens: int, *, stream: bool
) -> Run:
    """All prompts in `count` streams."""
    client = Client(server.address, count)
    host, steps = server.steps()
    process, loop = server.cpu()
    begun, own = time.perf_counter(), time.process_time()
    answers = client.ask(prompts, num_tokens, stream=stream)
    seconds, own = time.perf_counter() - begun, time.process_time() - own
    process_after, loop_after = server.cpu()
    client.close()
    host_after, steps_after = server.steps()
    tokens = sum(
        int(found[1])
        for answer in answers
        for found in re.finditer(rb'"completion_tokens":(\d+)', answer)
    )
    return Run(
        tokens,
        seconds,
        process=process_after - process,
        loop=loop_after - loop,
        client=own,
        host=host_after - host,
        steps=steps_after - steps,
        events=sum(answer.count(b"data: {") for answer in answers) - stream * len(prompts),
    )


def main() -> None:
    """Measure in turns, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", default="16,64", help="numbers of streams, by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--answers", type=int, default=4, help="that each stream asks for")
    parser.add_argument(
        "--replicas", type=int, default=0, help="engine processes: CPU times are the front's then"
    )
    parser.add_argument(
        "--command", default=f"{sys.executable} -m infc", help="what serves; another commit's infc"
    )
    options = parser.parse_args()
    results: dict[str, list[Run]] = {}
    counts = [int(word) for word in options.streams.split(",")]
    with (
        serve(options.artifact, options.command, options.replicas) as server,
        contextlib.ExitStack() as opened,
    ):
        engines = {
            count: opened.enter_context(infc.LLM(options.artifact, max_sequences=count))
            for count in counts
        }
        for round_ in range(-1, options.rounds):  # one that does not count
            for count in counts:
                total, tokens, runs = count * options.answers, options.tokens, {}
                for name in WAYS:
                    prompts = prompts_of(f"{round_} {name}", total)
                    if name == "offline":
                        runs[name] = offline(engines[count], prompts, tokens)
                    else:
                        stream = name == "streamed"
                        runs[name] = served(server, count, prompts, tokens, stream=stream)
                for name, run in runs.items():
                    assert run.tokens == total * tokens, (name, run)
                    if round_ >= 0:
                        results.setdefault(f"{count} {name}", []).append(run)
    report(results, counts)


def report(results: dict[str, list[Run]], counts: list[int]) -> None:
    """Print a line for each way to ask, and everything as JSON."""
    print(f"{cpu_model()}, {available_cpus()} processors")
    facts: dict[str, object] = {"cpu": cpu_model(), "cpus": available_cpus()}
    print(
        "| streams | tokens/s | of offline | CPU a token, µs: process | above offline | event loop"
        " | client | host part of a step, µs | tokens an event |\n" + "| --- " * 9 + "|"
    )
    for count in counts:
        base = results[f"{count} offline"]
        for name in WAYS:
            runs = results[f"{count} {name}"]
            pairs = list(zip(runs, base, strict=True))
            row = {
                "rate": [run.rate for run in runs],
                "ratio": [run.rate / other.rate for run, other in pairs],
                "process": [1e6 * run.process / run.tokens for run in runs],
                "above": [
                    1e6 * (run.process / run.tokens - other.process / other.tokens)
                    for run, other in pairs
                ],
                "loop": [1e6 * run.loop / run.tokens for run in runs],
                "client": [1e6 * run.client / run.tokens for run in runs],
                "host": [1e6 * run.host / run.steps for run in runs],
                "per_event": [run.tokens / max(run.events, 1) for run in runs],
            }
            facts[f"{count} {name}"] = {key: spread(values) for key, values in row.items()}
            digits = {"rate": 0, "ratio": 3, "host": 0, "per_event": 2}
            cells = [write(values, digits.get(key, 1)) for key, values in row.items()]
            if name == "offline":
                cells[1] = cells[3] = cells[4] = cells[5] = cells[7] = ""
            if name == "whole":
                cells[7] = ""
            print(f"| {count} {name} | {' | '.join(cells)} |")
    print("RESULT " + json.dumps(facts))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    each = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in each.items()}


def write(values: list[float], digits: int) -> str:
    """The median, and the least and the greatest in brackets."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    main()
