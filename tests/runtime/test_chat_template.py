"""Chat templates: the same text as transformers gives, and nothing leaves the sandbox."""

from __future__ import annotations

import copy
import json
from typing import Any

import jinja2
import pytest

from infc.ir.errors import ArtifactError, RequestError
from infc.runtime.text.chat_template import ChatTemplate

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' }}\n"
    "    {%- if not loop.last %}{{ '\\n' }}{% endif %}\n"
    "{%- endfor %}\n"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{- bos_token }}{% set loop_messages = messages %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[INST] {% if loop.first and system is defined %}<<{{ system }}>>{% endif %}{{ m['content'] }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% set ns = namespace(count=0) %}{% if tools %}{% for t in tools %}"
    "{% set ns.count = ns.count + 1 %}{{ t | tojson(indent=2) }}\n{% endfor %}{% endif %}"
    "{{ ns.count }} tools, {{ documents is none }}"
    "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ m.reasoning_content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    "{{ dict(a=1) | tojson }}{{ strftime_now('%Y')[:2] }}{{ flag }}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Grüße <b> & 'quotes' "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "thinking": "a greeting"},
        {"role": "user", "content": "{{ bos_token }}"},
    ],
]
CONSTANTS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {"type": "function", "function": {"name": "é", "parameters": {"a": [1, None, True]}}}


def theirs(source: str, chat: list[dict[str, Any]], **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered = render_jinja_template(
        conversations=[chat], chat_template=source, **CONSTANTS, **variables
    )
    text: str = rendered[0][0]
    return text


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", [CHATML, LLAMA, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_what_transformers_renders(
    source: str, chat: list[dict[str, Any]], prompt: bool
) -> None:
    ours = ChatTemplate(source, CONSTANTS).render(
        chat, add_generation_prompt=prompt, tools=[TOOL], variables={"flag": True}
    )
    assert ours == theirs(source, chat, add_generation_prompt=prompt, tools=[TOOL], flag=True)


@pytest.mark.parametrize("source", [CHATML, LLAMA, TOOLS])
@pytest.mark.parametrize(
    "content",
    [
        "The answer",
        " spaced ",
        "ends in a line\n",
        [{"type": "text", "text": "first"}, {"type": "text", "text": "last"}],
    ],
)
def test_goes_on_where_transformers_does(source: str, content: Any) -> None:
    if isinstance(content, list):  # as a template for parts reads them
        source = source.replace("message.content", "message.content[1].text")
        source = source.replace("m['content']", "m['content'][1]['text']")
        source = source.replace("m.content", "m.content[1].text")
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    ours = ChatTemplate(source, CONSTANTS).render(
        chat, add_generation_prompt=False, continue_final_message=True, tools=[TOOL]
    )
    expected = theirs(source, copy.deepcopy(chat), continue_final_message=True, tools=[TOOL])
    assert ours == expected
    assert "goes-on" not in ours


def test_a_template_that_drops_what_should_go_on() -> None:
    chat = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match="leaves out the end of the last message"):
        ChatTemplate("{{ messages[0].role }}", {}).render(
            chat, add_generation_prompt=False, continue_final_message=True
        )


def test_a_template_that_refuses_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        ChatTemplate(LLAMA, CONSTANTS).render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% unknown %}"])
def test_a_broken_template_is_the_artifacts_fault(source: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7]['x'] }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_what_leads_out_of_the_sandbox_is_refused(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(RequestError):
        template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "messages",
    [[], "hello", None, [1], [{"content": "x"}], [{"role": 1}], [{"role": "u", "content": b"x"}]],
)
def test_messages_of_another_shape_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(CHATML, {}).render(messages)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "usr", "content": "x"}, "messages[1].role is 'usr' (did you mean 'user'?)"),
        ({"role": "zzz", "content": "x"}, "messages[1].role is 'zzz' (one of system, developer, "),
        ({"role": 1, "content": "x"}, "messages[1] has the role 1, which is not a string"),
        ({"content": "x"}, "messages[1] has no role"),
        ({"role": "user"}, "messages[1] has no content"),
        ({"role": "user", "content": None}, "messages[1] has no content"),
        ("x", "messages[1] is not a mapping of role and content: 'x'"),
    ],
)
def test_a_refusal_names_the_message(message: Any, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(CHATML, CONSTANTS).render([{"role": "user", "content": "Hi"}, message])
    assert problem in str(caught.value)
    assert caught.value.field == "messages"


def test_parts_as_the_template_reads_them() -> None:
    """Joined for those that add strings, kept for those that go through them."""
    two = [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]
    one = two[:1]
    through = "{% for p in m.content %}[{{ p.text | trim }}]{% endfor %}"
    forms = {
        "{{ m.content }}": ("a  b", "a ", "x"),
        "{{ m.content + '' }}": ("a  b", "a ", "x"),
        "{{ m.content | tojson }}": ('"a  b"', '"a "', '"x"'),
        through: ("[a][b]", "[a]", "[x]"),
        "{% if m.content is string %}{{ m.content }}{% else %}THROUGH{% endif %}".replace(
            "THROUGH", through
        ): ("[a][b]", "a ", "x"),
    }
    for source, expected in forms.items():
        template = ChatTemplate("{% set m = messages[0] %}" + source, {})
        contents: tuple[Any, ...] = (two, one, "x")
        for content, text in zip(contents, expected, strict=True):
            assert template.render([{"role": "user", "content": content}]) == text, source


def test_what_a_tool_gave_may_be_any_data() -> None:
    template = ChatTemplate("{{ messages[0].content | tojson }}", {})
    for content in ({"a": [1]}, [1, {"type": "text"}], 5, "x"):
        chat: list[Any] = [{"role": "tool", "content": content}]
        assert json.loads(template.render(chat)) == content
        with pytest.raises(RequestError):
            template.render(
                [{**chat[0], "content": [content]}],
                add_generation_prompt=False,
                continue_final_message=True,
            )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "tool", "content": parts}]) == '"ab"'


def test_what_is_null_is_left_out() -> None:
    source = (
        "{% for m in messages %}{{ m.content is defined }}{{ m.tool_calls | length }}{% endfor %}"
    )
    message = {"role": "assistant", "content": None, "tool_calls": [{"a": None}], "name": None}
    assert ChatTemplate(source, {}).render([message]) == "False1"


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("{{ m.content }}|{{ m.content }}!", "Well", "Well|Well"),
        ("{{ m.content }}|{{ m.content }}!", "", "|"),
        ("{{ m.content }}|{{ m.content }}!", "  ", "  |  "),
        ("<a>\n{{ m.content | trim }}</a>", "", "<a>"),
        ("{{ m.content | replace('\n\n', '\n') }}!", "a\n\nb\n\n", "a\nb\n"),
        ("{{ m.content[:2] }}|{{ m.content }}!", "Well", "We|Well"),
        ("{{ m.content.split('</think>')[-1] }}!", "a</think>b", "b"),
        ("{{ m.content.endswith('b') }}{{ m.content | upper }}!", "ab", "TrueAB"),
        ("{{ m.content ~ '.' }}{{ messages | length }}", "CONTINUE_FINAL_MESSAGE_TAG ", None),
    ],
)
def test_where_the_last_message_ends(source: str, content: str, expected: str | None) -> None:
    """No marker stands in what the template decides by, or in what it writes."""
    template = ChatTemplate("{% set m = messages[-1] %}" + source, {})
    text = template.render(
        [{"role": "assistant", "content": content}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert text == (content if expected is None else expected)


def test_roles_and_messages_that_are_not_the_usual_ones() -> None:
    template = ChatTemplate(TOOLS, CONSTANTS)
    assert template.render([{"role": "skip", "content": "x"}]).startswith("0 tools")
    assert template.render([{"role": "assistant", "tool_calls": [{"name": "f"}]}])


def test_a_moment_without_memory_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(CHATML, {})
    render = jinja2.Template.render

    def fail(*_: Any, **__: Any) -> str:
        raise MemoryError

    monkeypatch.setattr(jinja2.Template, "render", fail)
    with pytest.raises(MemoryError):
        _ = template.written
    monkeypatch.setattr(jinja2.Template, "render", render)
    assert "<|im_start|>" in template.written
    assert template.written == ChatTemplate(CHATML, {}).written
