"""A server on a free port of this machine, over an engine whose model checks its own cache."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import tokenizers
import uvicorn

from infc.runtime.async_engine import AsyncEngine
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Finished
from infc.runtime.limits import RuntimePlan
from infc.runtime.scheduling.admission import SchedulerLimits
from infc.runtime.scheduling.step import Step
from infc.runtime.server.app import create_app
from infc.runtime.server.listener import open_listener
from infc.runtime.server.process import server_config
from infc.runtime.server.settings import ServerSettings
from infc.runtime.text.tokenizer import Tokenizer

from ..paged_model import PagedModel, make_group

TINY = Path(__file__).parents[3] / "recipes" / "tiny" / "checkpoint"
VOCAB_SIZE = 4096
MAX_CONTEXT = 512


class PacedModel(PagedModel):
    """A paged model whose steps can be slowed down, stopped, or made to fail."""

    delay_seconds = 0.0
    failure: Exception | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()

    def launch(self, step: Step) -> Finished:
        assert self.gate.wait(30)
        time.sleep(self.delay_seconds)
        if self.failure is not None:
            raise self.failure
        return super().launch(step)


def tiny_tokenizer() -> Tokenizer:
    """The bundled model's tokenizer and chat template."""
    return Tokenizer(
        tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")),
        bos_token_id=0,
        eos_token_ids=(0, 2),
        chat_template=(TINY / "chat_template.jinja").read_text(),
    )


@dataclass(frozen=True)
class Serving:
    """A running server, and what a test may look at behind it."""

    url: str
    engine: AsyncEngine
    model: PacedModel

    def client(self, **options: Any) -> openai.OpenAI:
        """The unmodified client; it never tries twice."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options}
        )

    def post(self, path: str, body: object) -> httpx.Response:
        """Sends JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{self.url}{path}", content=data, headers=headers, timeout=30)

    def wait_until_empty(self) -> None:
        """Until no request is left and every block has come back."""
        self.wait_until(lambda: self.engine.num_pending == 0)
        stats = self.engine.stats()
        assert (stats.num_waiting, stats.num_running) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks
        self.engine.engine.scheduler.check()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something is so; an error after ten seconds."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, self.engine.stats()
            time.sleep(0.005)


@contextlib.contextmanager
def serving(
    *,
    with_tokenizer: bool = True,
    tokenizer: Tokenizer | None = None,
    num_blocks: int = 400,
    max_waiting: int = 256,
    max_context: int = MAX_CONTEXT,
    certificate: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Serving]:
    """Serves on 127.0.0.1 until left."""
    groups = (make_group("full", 16, None),)
    limits = SchedulerLimits(
        max_context=max_context,
        step_tokens=256,
        max_sequences=32,
        logit_rows=32,
        max_waiting=max_waiting,
    )
    plan = RuntimePlan(
        limits=limits,
        groups=groups,
        num_blocks=(num_blocks,),
        num_threads=1,
        pin=False,
        weights="loaded",
        prefix_reuse=True,
    )
    vocab_size = VOCAB_SIZE if tokenizer is None else tokenizer.backend.get_vocab_size()
    if tokenizer is None and with_tokenizer:
        tokenizer = tiny_tokenizer()
    model = PacedModel(groups, (num_blocks,), vocab_size)
    engine = AsyncEngine(Engine(model, plan, vocab_size=vocab_size, tokenizer=tokenizer))
    chosen = ServerSettings(**{"model_names": ("toy",), **settings})
    app = create_app(engine, tokenizer, chosen, certificate=certificate)
    config = server_config(app, chosen)
    server = uvicorn.Server(config)
    with open_listener("127.0.0.1", 0, has_key=False) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.001)
        # As `run_server` does: where the queue is full, the kernel resets connections at random.
        listener.listen(min(chosen.max_connections, 4096))
        try:
            yield Serving(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, model)
        finally:
            model.gate.set()
            engine.shutdown(10)
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive()
