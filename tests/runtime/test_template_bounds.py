"""Templates that would take for ever, or all memory there is, are given up in a moment."""
# ruff: noqa: E501 - one template a line

from __future__ import annotations

import resource
import time
from typing import Any

import pytest

from infc.ir.errors import ArtifactError, RequestError
from infc.runtime.text.chat_template import ChatTemplate
from infc.runtime.text.template_meter import RenderLimits

LIMITS = RenderLimits(seconds=0.2)
MESSAGES = [{"role": "user", "content": "abc " * 4}]
_DEEP = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = VALUE %}{% endfor %}"
_TWICE = _DEEP.replace("VALUE", "[ns.x, ns.x]")
_PAIRS = _DEEP.replace("VALUE", "(ns.x, ns.x)").replace("[1]", "1")

ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | map('string') | join }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}",
    "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(99) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [[[]]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "{{ 'a' * 2000000000 }}",
    "{{ 2000000000 * 'a' }}",
    "{{ [0] * 2000000000 }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 'a'.center(2000000000) }}",
    "{{ ('a' | attr('ljust'))(2000000000) }}",
    "{{ ('a'['rjust'])(2000000000) }}",
    "{{ (['a'] | map(attribute='zfill') | first)(2000000000) }}",
    "{{ 'a'.translate({97: 'b' * 99999}) }}",
    "{{ '\t'.expandtabs(2000000000) }}",
    "{{ (5).to_bytes(2000000000) }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '%*d' % (2000000000, 1) }}",
    "{{ '%.2000000000f' % 1 }}",
    "{{ '%2000000000d' | format(1) }}",
    "{{ '{:2000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 2000000000) }}",
    "{{ '{0[x]:>2000000000}'.format_map({'0': {'x': 1}}) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ messages | tojson(separators=('x' * 999999, 'y')) }}",
    "{{ 10 ** (10 ** 8) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1, 2]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    _TWICE + "{{ ns.x }}",
    _TWICE + "{{ ns.x | tojson }}",
    _TWICE + "{{ ns.x | string | length }}",
    _TWICE + "{{ ns.x ~ 'a' }}",
    _TWICE + "{{ '%s' % (ns.x,) }}",
    _TWICE + "{{ '%(a)s' % {'a': ns.x} }}",
    _TWICE + "{{ '{}'.format(ns.x) }}",
    _TWICE + "{{ '{!r}'.format(ns.x) }}",
    _TWICE + "{{ [ns.x] | join }}",
    _TWICE + "{{ ns.x | upper }}",
    _TWICE + "{{ ns.x | trim }}",
    _TWICE + "{{ ns.x | pprint }}",
    _TWICE + "{{ {'a': ns.x}.items() }}",
    _TWICE + "{{ {'a': ns.x}.values() | string }}",
    _TWICE + "{% set a = ns.x %}{% for i in range(2) %}{% if [a] == [ns.x + []] %}{% endif %}{% endfor %}",
    _TWICE + "{{ [ns.x].index(ns.x + []) }}",
    _TWICE + "{{ ns.x is eq(ns.x + []) }}",
    _TWICE + "{{ ns.x + [] in [ns.x] }}",
    _TWICE + "{{ [ns.x, ns.x] | sort }}",
    _TWICE + "{% for i in [1, 2] %}{{ loop.changed(ns.x + []) }}{% endfor %}",
    _PAIRS + "{{ {ns.x: 1} }}",
    _PAIRS + "{{ {}.get(ns.x) }}",
    _PAIRS + "{{ {'a': 1}[ns.x] }}",
    _PAIRS + "{{ [ns.x] | unique | list }}",
    _PAIRS + "{{ dict([(ns.x, 1)]) }}",
    _PAIRS + "{{ dict.fromkeys([ns.x]) }}",
    "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns] }}",
    "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "{{ range(9999) | slice(2000000000) | list }}",
    "{{ [1] | batch(2000000000, 0) | list }}",
    "{{ 'a' | indent(2000000000, true) }}",
    "{{ 5.5 | round(2000000000, 'ceil') }}",
    "{{ 5 | round(-2000000000) }}",
    "{{ lipsum(n=1000000000) }}",
    "{{ 'a' | urlize(trim_url_limit=2000000000) }}",
    "{{ strftime_now('%c' * 99999) }}",
    "{{ ('a' * 9999999).split('a') | length }}",
    "{{ raise_exception('a' * 9999999) }}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory() -> Any:
    """Half a gigabyte more than there is now: whoever takes all fails, and harms nobody."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("source", ENDLESS)
def test_is_given_up_in_time(source: str) -> None:
    begun = time.thread_time()
    with pytest.raises((RequestError, ArtifactError)) as caught:
        ChatTemplate(source, {}, LIMITS).render(MESSAGES)
    # Less than 1 s by itself; memory of a long process can take several times as long. Without an
    # end, it would be hours.
    assert time.thread_time() - begun < 12
    assert len(str(caught.value)) < 1000
    assert "MemoryError" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if true %}" * 500 + "{% endif %}" * 500,
        "{{ " + "-" * 20000 + "1 }}",
        "{{ 1 " + "+ 1" * 50000 + " }}",
        "x" * ((1 << 20) + 1),
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% autoescape true %}{% endautoescape %}",
        "{{ 1 | nothing }}",
    ],
    ids=range(9),
)
def test_what_cannot_be_compiled_is_the_artifacts_fault(source: str) -> None:
    with pytest.raises(ArtifactError, match="chat template cannot be read"):
        ChatTemplate(source, {}, LIMITS)


def test_long_messages_are_refused_before_anything_is_made_of_them() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    for chat, rest in (
        ([{"role": "user", "content": "x" * 101}], {}),
        ([{"role": "user", "content": ""}], {"tools": [{"x": "x" * 101}]}),
        ([{"role": "user", "content": ""}], {"variables": {"x": [{}] * 101}}),
        ([{"role": "user", "content": ""}] * 101, {}),
    ):
        options: dict[str, Any] = {"max_characters": 100, **rest}
        with pytest.raises(RequestError, match="more than 100 characters") as caught:
            template.render(chat, **options)
        assert caught.value.field == "messages"
    with pytest.raises(RequestError, match="more than 100 characters"):
        ChatTemplate("{{ 'ab' * 99 }}", {}).render(MESSAGES, max_characters=100)


def test_what_holds_itself_is_refused() -> None:
    message: dict[str, Any] = {"role": "user", "content": "x"}
    message["self"] = [message] * 100
    with pytest.raises(RequestError, match="nested too deeply"):
        ChatTemplate("{{ messages[0].content }}", {}).render([message])


def test_a_large_chat_is_no_bomb() -> None:
    """A few megabytes, cut, trimmed and put together again, as real templates do it."""
    source = (
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1].strip() %}"
        "{{ '<' + m.role + '>' + c | trim + '<end>' }}{% endfor %}{{ messages | tojson | length }}"
    )
    chat = [{"role": "user", "content": "some words " * 400}] * 1000
    assert len(ChatTemplate(source, {}, RenderLimits(seconds=30)).render(chat)) > 4_000_000
