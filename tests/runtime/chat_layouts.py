"""Tokenizers and templates in the manner of those that models are published with."""
# ruff: noqa: E501 - templates as they are published

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = (
    "the quick brown fox jumps over the lazy dog and says hello to a small cat near the river\n"
    'what is the weather in Paris today? I can look it up. {"name": "look", "a": [1, 2]}\n'
    "def add(a, b):\n    return a + b\n\nuser assistant system tool think answer\n"
)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Layout:
    """One kind of tokenizer with its template, or with several by name."""

    name: str
    byte_level: bool
    special: tuple[str, ...]
    other: tuple[str, ...]
    names: dict[str, str]
    template: str | dict[str, str] = field(repr=False)
    roles: tuple[str, ...] = ("user", "assistant")
    parts: bool = False
    variables: tuple[str, ...] = ()
    in_vocabulary: bool = False
    prefix: str = ""

    @property
    def control(self) -> tuple[str, ...]:
        """Whatever the template speaks to the model with."""
        written = json.dumps(self.template, ensure_ascii=False)
        return self.special + tuple(token for token in self.other if token in written)

    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer, trained on a few lines."""
        special = list(self.special)
        if self.byte_level:
            made = tokenizers.Tokenizer(models.BPE())
            split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            vocabulary = special if self.in_vocabulary else []
            trainer = trainers.BpeTrainer(
                vocab_size=420, special_tokens=vocabulary, initial_alphabet=alphabet,
                show_progress=False,
            )  # fmt: skip
            made.train_from_iterator([WORDS], trainer)
        else:
            made = self._sentencepiece()
        made.add_special_tokens([AddedToken(word, normalized=False) for word in special])
        made.add_tokens([AddedToken(word, normalized=False) for word in self.other])
        bos = self.names.get("bos_token")
        if bos is not None:  # put before plain text, not before chats
            made.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
            )
        return made

    def _sentencepiece(self) -> tokenizers.Tokenizer:
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = ["<unk>", *fallback, "\u2581", *sorted(set(WORDS.replace(" ", "")))]
        vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        merges = []
        for pair in (("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "n"), ("i", "n")):
            merges.append(pair)
            vocabulary.setdefault("".join(pair), len(vocabulary))
        made = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        if self.prefix:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=self.prefix, split=False)
        else:
            made.normalizer = normalizers.Replace(" ", "\u2581")
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return made

    def write(self, directory: Path) -> Any:
        """Writes it as a checkpoint has it; returns the library's own."""
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=self.backend(), **self.names)
        fast.chat_template = self.template
        fast.save_pretrained(directory)
        return transformers.AutoTokenizer.from_pretrained(directory)


_SMOLLM = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_LLAMA = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call one or more functions.\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n<tool_call>\\n{\\"name\\": <function-name>}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

_GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""

_MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call.function|tojson }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {%- set content = message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

_COMMAND = {
    "default": (
        "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
        "{% if message['role'] == 'user' %}{{ '<|USER_TOKEN|>' }}"
        "{% elif message['role'] == 'system' %}{{ '<|SYSTEM_TOKEN|>' }}"
        "{% else %}{{ '<|CHATBOT_TOKEN|>' }}{% endif %}"
        "{{ message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
    "tool_use": (
        "{{ bos_token }}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' }}"
        "{%- macro document(d) %}\n{%- for key, value in d|dictsort %}\n{{ key }}: {{ value|string|indent(2) }}"
        "{%- endfor %}{%- endmacro %}"
        "{% for tool in tools %}{{ '- ' ~ tool['function']['name'] | upper ~ ': ' }}"
        "{{ document(tool['function']) }}{% endfor %}{{ '%s<|END_OF_TURN_TOKEN|>' % pad_token }}"
        "{% for message in messages %}{{ '{}{}'.format('<|START_OF_TURN_TOKEN|>', '<|USER_TOKEN|>' "
        "if message.role == 'user' else '<|CHATBOT_TOKEN|>') }}"
        "{% if message.tool_calls %}Action: ```json\n{{ message.tool_calls | map(attribute='function')"
        " | map(attribute='name') | join(', ') }}```{% endif %}"
        "{{ message.content | default('', true) | replace('\n\n', '\n') }}<|END_OF_TURN_TOKEN|>"
        "{% endfor %}{% if add_generation_prompt %}"
        "{% set opening %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endset %}{{ opening }}{% endif %}"
    ),
}

LAYOUTS = [
    Layout(
        "smollm2", True, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), (),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
         "unk_token": "<|endoftext|>"},
        _SMOLLM, ("system", "user", "assistant"), in_vocabulary=True,
    ),
    Layout(
        "llama3", True,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"), (),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        _LLAMA, ("system", "user", "assistant", "tool"), variables=("date_string",),
    ),
    Layout(
        "qwen3", True, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
         "</tool_response>", "<|fim_prefix|>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        _QWEN, ("system", "user", "assistant", "tool"), variables=("enable_thinking",),
    ),
    Layout(
        "gemma", False, ("<pad>", "<eos>", "<bos>", "<unk>"),
        ("<start_of_turn>", "<end_of_turn>", "<unused0>", "\n\n", "\n\n\n", "\u2581\u2581"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        _GEMMA, ("system", "user", "assistant"), parts=True,
    ),
    Layout(
        "mistral", False,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), (),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        _MISTRAL, ("system", "user", "assistant", "tool"), prefix="first",
    ),
    Layout(
        "command", True,
        ("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"},
        _COMMAND, ("system", "user", "assistant", "tool"),
    ),
]  # fmt: skip
