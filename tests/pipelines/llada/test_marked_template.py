"""A marked template renders as the source's, and marks what the assistant says, its end-of-turn included."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from reference import autoregressive

from dllm.data.maps import check_chat_template
from dllm.pipelines.llada.marked_template import mark_template

LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2 = (
    "{%- if tools %}{{- 'tools' }}{%- endif %}{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>system\\nYou are helpful ✓.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not '
    "message.tool_calls) %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
SYSTEM_IN_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set head = '<<' + messages[0]['content'] + '>>' %}"
    "{% else %}{% set rest = messages %}{% set head = '' %}{% endif %}{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (head if loop.first else '') + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
WORKING = {
    "chatml": (autoregressive.CHATML, "<|im_end|>"),
    "llama 3": (LLAMA_3, "<|eot_id|>"),
    "qwen 2": (QWEN_2, "<|im_end|>"),
    "mistral": (MISTRAL, "</s>"),
    "zephyr": (ZEPHYR, "</s>"),
    "system in user": (SYSTEM_IN_USER, "</s>"),
}
TALK = [
    {"role": "system", "content": " Rhyme.\n"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "\tthe hat "},
    {"role": "user", "content": "{{ the dog }} 'ä'"},
    {"role": "assistant", "content": "12\n\nmats"},
]


def tokenizer(template: str | None) -> Any:
    special = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    return autoregressive.tokenizer("<s>", "</s>", *special, template=template, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", WORKING)
def test_text_is_equal_and_answers_are_marked(name: str) -> None:
    words = tokenizer(WORKING[name][0])
    marked = mark_template(words)
    assert marked is not None
    assert marked.turn_end == WORKING[name][1]
    talk = TALK[1:] if name == "mistral" else TALK
    for conversation, asked in (
        (talk[:-1], True),
        (talk[:-1], False),
        (TALK[1:], False),
        (TALK[1:3], False),
        (talk, False),
    ):
        both = [
            words.apply_chat_template(conversation, chat_template=text, tokenize=False, add_generation_prompt=asked)
            for text in (words.chat_template, marked.text)
        ]
        assert both[0] == both[1]
    words.chat_template = marked.text
    check_chat_template(words)
    encoded = words.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [id_ for id_, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    if name == "llama 3":
        answers = [answer.strip() for answer in answers]
    blank = " " if name == "mistral" else ""  # its prompt ends before the blank: the model writes it
    assert words.decode(said) == "".join(blank + answer + marked.turn_end for answer in answers)


def test_a_role_that_the_source_refuses_is_refused() -> None:
    words = tokenizer(MISTRAL)
    marked = mark_template(words)
    assert marked is not None
    with pytest.raises(jinja2.TemplateError, match="has no place for system after start"):
        words.apply_chat_template(TALK, chat_template=marked.text, tokenize=False)


NOT_MARKED = {
    "none": None,
    "the day": "{{ strftime_now('%d') }}" + autoregressive.CHATML,
    "thoughts are dropped": autoregressive.CHATML.replace(
        "message['content']", "(message['content'] if loop.last or message['role'] != 'assistant' else 'x')"
    ),
    "no end of turn": "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}",
    "one side is stripped": autoregressive.CHATML.replace("message['content']", "message['content'].rstrip()"),
    "turns are counted": autoregressive.CHATML.replace("<|im_start|>' +", "<|im_start|>' ~ loop.index ~"),
    "it fails": "{{ messages[0].content.nothing.at.all }}",
}


@pytest.mark.parametrize("name", NOT_MARKED)
def test_what_cannot_be_equal_is_not_made(name: str) -> None:
    assert mark_template(tokenizer(NOT_MARKED[name])) is None
