"""What `/metrics` tells, read during load and after it, against what was sent and received."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from infc.runtime.server.metrics import Histogram

from .serving import Serving, serving

GENERATE: dict[str, Any] = {"model": "toy", "temperature": 0, "ignore_eos": True}


def scrape(server: Serving, **headers: str) -> dict[str, float]:
    """Every sample by name and labels."""
    response = httpx.get(f"{server.url}/metrics", headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f",{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_sums_are_what_was_sent() -> None:
    with serving(num_blocks=200) as server:
        server.model.delay_seconds = 0.002
        seen: list[dict[str, float]] = []
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                seen.append(scrape(server))
                time.sleep(0.01)

        def send(index: int) -> dict[str, int]:
            prompt = [7] * 32 + [index + 1] * (1 + index % 3)
            body = {**GENERATE, "prompt": [prompt, [5, index + 1]], "max_tokens": 3 + index % 4}
            usage: dict[str, int] = server.post("/v1/completions", body).json()["usage"]
            return usage

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(24) as pool:
            usages = list(pool.map(send, range(48)))
        assert server.post("/v1/completions", {**GENERATE, "prompt": ""}).status_code == 400
        assert httpx.get(f"{server.url}/nowhere/{'x' * 50}").status_code == 404
        assert httpx.get(f"{server.url}/v1/models/toy").status_code == 200
        done.set()
        watcher.join()
        end = scrape(server)
        steps = server.engine.stats().num_steps

    def total(field: str) -> int:
        return sum(usage[field] for usage in usages)

    tokens = total("completion_tokens")
    assert end["infc_prompt_tokens_total"] == total("prompt_tokens")
    assert end["infc_generation_tokens_total"] == tokens
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)  # type: ignore[index]
    assert end["infc_prefix_cache_hit_tokens_total"] == cached > 0
    assert end["infc_completions_total,finish_reason=length"] == 96
    posted = "infc_http_requests_total,endpoint=/v1/completions,status="
    assert (end[f"{posted}200"], end[f"{posted}400"]) == (48, 1)
    assert end["infc_http_requests_total,endpoint=other,status=404"] == 1
    assert end["infc_http_requests_total,endpoint=/v1/models/{name:path},status=200"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert end[f"infc_{name}_seconds_count"] == 96
    assert end["infc_inter_token_latency_seconds_count"] == tokens - 96
    for name in ("step_time_seconds", "step_host_time_seconds", "step_sequences", "step_tokens"):
        assert end[f"infc_{name}_count"] == steps
    # All that is computed: prompts without what was cached, and all tokens but the last ones.
    assert end["infc_step_tokens_sum"] == total("prompt_tokens") - cached + tokens - 96
    assert 0 < end["infc_step_host_time_seconds_sum"] < end["infc_step_time_seconds_sum"]
    assert end["infc_step_time_seconds_sum"] >= 0.002 * steps
    latency = end["infc_e2e_request_latency_seconds_sum"]
    tokens_took = (
        end["infc_time_to_first_token_seconds_sum"] + end["infc_inter_token_latency_seconds_sum"]
    )
    # The rest is from a request's last token to its end, which takes longer on a busy machine.
    assert tokens_took == pytest.approx(latency, rel=0.05)
    assert (end["infc_requests_running"], end["infc_requests_waiting"]) == (0, 0)
    assert end["infc_kv_blocks_used"] == 0
    assert end["infc_kv_blocks"] == 199
    # In between: under load, and never backwards.
    assert max(s["infc_requests_running"] for s in seen) > 1
    assert max(s["infc_kv_blocks_used"] for s in seen) > 1
    for s in seen:
        assert s["infc_kv_usage_ratio"] == s["infc_kv_blocks_used"] / s["infc_kv_blocks"]
    for before, after in zip(seen, [*seen[1:], end], strict=True):
        for name in (
            n for n in before if n.startswith("infc_") and n.endswith(("_total", "_count"))
        ):
            assert before[name] <= after[name], name


def test_preemptions_and_clients_that_leave_are_counted() -> None:
    with serving(num_blocks=26) as server:
        body = {**GENERATE, "prompt": [[i] * 60 for i in range(1, 9)], "max_tokens": 60}
        assert server.post("/v1/completions", body).status_code == 200
        server.model.delay_seconds = 0.01
        client = server.client()
        stream = client.completions.create(
            model="toy", prompt=[5, 6], max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        server.wait_until_empty()
        end = scrape(server)
        assert end["infc_preemptions_total"] == server.engine.stats().num_preemptions > 0
        server.wait_until(
            lambda: scrape(server).get("infc_completions_total,finish_reason=abort") == 1
        )


def test_choices_are_counted_one_by_one(server: Serving) -> None:
    before = scrape(server)
    body = {**GENERATE, "prompt": [5, 6], "max_tokens": 6, "n": 3, "stream": True}
    assert server.post("/v1/completions", body).status_code == 200
    best = {**GENERATE, "prompt": [7, 8, 9], "max_tokens": 6, "best_of": 2}
    assert server.post("/v1/completions", best).status_code == 200
    nothing = {**GENERATE, "prompt": [7, 8, 9], "max_tokens": 0, "echo": True}
    assert server.post("/v1/completions", nothing).status_code == 200
    after = scrape(server)

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert gained("infc_prompt_tokens_total") == 2 + 3 + 3
    assert gained("infc_generation_tokens_total") == 3 * 6 + 2 * 6
    assert gained("infc_completions_total,finish_reason=length") == 3 + 1 + 1
    assert gained("infc_inter_token_latency_seconds_count") == 3 * 5 + 2 * 5
    assert gained("infc_time_to_first_token_seconds_count") == 2
    # Time between tokens is that of a step, for each choice, told or not.
    spent = gained("infc_inter_token_latency_seconds_sum")
    assert 0 < spent <= 5 * gained("infc_step_time_seconds_sum") + 1


def test_histograms_are_cumulative_and_cheap() -> None:
    histogram = Histogram((1, 2, 4))
    for value, times in ((0.5, 1), (1, 1), (1.5, 2), (4, 1), (9, 3)):
        histogram.observe(value, times)
    samples = {
        s.labels.get("le", s.name): s.value for s in histogram.family("x", "about x").samples
    }
    assert samples == {
        "1.0": 2, "2.0": 4, "4.0": 5, "+Inf": 8, "x_count": 8, "x_sum": 0.5 + 1 + 3 + 4 + 27
    }  # fmt: skip
    begun = time.perf_counter()
    for _ in range(10_000):
        histogram.observe(3.0)
    # Four of them a step; a step of the smallest model takes 400 µs.
    assert (time.perf_counter() - begun) / 10_000 < 10e-6


def test_openmetrics_for_who_accepts_it(server: Serving) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    response = httpx.get(f"{server.url}/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    parse: Any = openmetrics.text_string_to_metric_families
    names = {family.name for family in parse(response.text)}
    assert {"infc_build", "infc_step_time_seconds", "infc_prompt_tokens"} <= names


def test_metrics_want_the_key_unless_they_are_open() -> None:
    for is_open in (False, True):
        with serving(api_key="sesame", open_metrics=is_open) as server:
            assert httpx.get(f"{server.url}/metrics").status_code == (200 if is_open else 401)
            assert httpx.get(f"{server.url}/health").status_code == 200
            with_key = {"Authorization": "Bearer sesame"}
            assert scrape(server, **with_key)["infc_requests_running"] == 0
            assert httpx.get(f"{server.url}/version").status_code == 401
