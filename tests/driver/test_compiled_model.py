"""A model compiled by the cpp backend in use: it generates, converses and is evaluated."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infc
from infc.driver.cli import run
from infc.ir.artifact import Artifact, open_artifact
from infc.runtime.executors.base import HOST, ReportsMemory
from infc.runtime.memory_plan import BROKER

from .compiling import contents


def test_the_cpp_backend(fast: Artifact) -> None:
    assert fast.manifest.main.entry.kind == "cpp-shared-library"
    assert open_artifact(fast.path, "full").identity == fast.identity
    for name, data in contents(fast.path).items():
        assert os.fsencode(fast.path.parent) not in data, name


def test_it_tells_how_much_of_its_memory_it_has_touched(fast: Artifact) -> None:
    with infc.LLM(fast, threads=1) as llm:
        use = llm.engine.plan.memory[HOST]
        executor = llm.engine.executor
        assert isinstance(executor, ReportsMemory)
        before = executor.touched_bytes()[HOST]
        assert use.weights <= before < use.taken
        llm.generate("def", infc.SamplingParams(max_tokens=4, ignore_eos=True))
        assert before < executor.touched_bytes()[HOST] < use.taken
        assert BROKER.untouched() >= use.taken - executor.touched_bytes()[HOST] > 0
    assert executor.touched_bytes() == {HOST: 0}


def test_generating_loads_no_torch(fast: Artifact) -> None:
    script = (
        "import sys; from infc.driver.cli import run\n"
        "assert run(['generate', sys.argv[1], 'def', '--max-tokens', '8', '--ignore-eos']) == 0\n"
        "print(*{'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, str(fast.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stats, heavy = done.stderr.splitlines()
    assert stats.startswith("4 prompt tokens, 8 tokens, ")
    assert heavy == ""


def test_a_prompt_of_token_ids_is_the_text(
    fast: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ["--max-tokens", "8", "--ignore-eos", "--no-stats"]
    assert run(["generate", str(fast.path), "def", *common]) == 0
    text = capfd.readouterr().out
    tokens = infc.LLM(fast).engine.encode("def")
    given = ",".join(map(str, tokens))
    assert run(["generate", str(fast.path), "--token-ids", given, *common]) == 0
    assert capfd.readouterr().out == text


def test_a_conversation_through_a_pipe(fast: Artifact) -> None:
    command = [sys.executable, "-m", "infc", "chat", str(fast.path), "--max-tokens", "4"]
    said = "one\n/reset\n\none\n/exit\nnever read\n"
    done = subprocess.run(
        [*command, "--ignore-eos"], input=said.encode(), capture_output=True, check=True
    )
    first, second = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert first == second != b""  # /reset forgot the first, so the second is answered alike
    assert done.stderr == b"[new chat]\n"
    block = fast.manifest.main.resources[0].bytes_per_block()
    tight = subprocess.run(
        [*command, "--kv-memory", str(4 * block)], input=b"/exit\n", capture_output=True, check=True
    )
    assert tight.stderr.startswith(b"note: max_context is "), "less than was compiled is said"


def test_a_conversation_that_fills_the_context_goes_on(fast: Artifact) -> None:
    command = [sys.executable, "-m", "infc", "chat", str(fast.path), "--max-tokens", "4"]
    said = "/help\n" + "one two\n" * 9
    done = subprocess.run(
        [*command, "--ignore-eos", "--max-context", "96"], input=said.encode(), capture_output=True
    )
    assert done.returncode == 0
    help_line, note = done.stderr.decode().splitlines()
    assert help_line == "/reset starts a new chat, /exit or Ctrl-D ends it"
    assert note == "note: the context is full, so the oldest turns are dropped"
    assert done.stdout.count(b"\n") >= 9


def test_a_prompt_that_leaves_less_than_the_default_length_is_answered(
    fast: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    few = [str(fast.path), "--token-ids", "5,6,7", "--max-context", "8", "--ignore-eos"]
    assert run(["generate", *few]) == 0
    assert "3 prompt tokens, 5 tokens, " in capfd.readouterr().err
    assert run(["generate", *few, "-n", "2"]) == 0
    assert "note: with temperature 0 all answers are the same" in capfd.readouterr().err
    assert run(["generate", *few, "--max-tokens", "6"]) == 2
    assert "use at most 5" in capfd.readouterr().err


def test_evaluating(fast: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("the quick brown fox " * 20)
    options = ["--context", "64", "--stride", "32", "--json"]
    assert run(["eval", str(fast.path), str(tmp_path / "text"), *options]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["num_bytes"] == 400
    assert result["num_predicted"] == result["num_tokens"] - 1 == 400
    assert result["perplexity"] > 1
    for bad in ("--context", "--stride"):
        assert run(["eval", str(fast.path), str(tmp_path / "text"), bad, "0"]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: a context of ")
        assert "tokens do not fit (context is 2.." in error


def test_evaluation_is_that_of_transformers(source: Path, fast: Artifact) -> None:
    from transformers import AutoModelForCausalLM

    from infc.driver.evaluate import evaluate_text

    text = "Whoever reads this, reads it in chunks of a few rows of logits."
    result = evaluate_text(fast, text)
    tokens = infc.LLM(fast).engine.encode(text)
    model = AutoModelForCausalLM.from_pretrained(source / "checkpoint", dtype=torch.float32)
    with torch.inference_mode():
        log_p = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
    nats = -sum(float(log_p[at - 1, tokens[at]]) for at in range(1, len(tokens)))
    assert result.nats == pytest.approx(nats, rel=1e-5)


def test_an_interrupt_while_generating(artifact: Artifact) -> None:
    """With the slow backend, so that the interrupt comes long before the end."""
    command = [sys.executable, "-m", "infc", "generate", str(artifact.path), "x", "--ignore-eos"]
    with subprocess.Popen(
        [*command, "--max-tokens", "120"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"error: interrupted\n"
        assert process.wait(timeout=60) == 130
