"""Which tokens of a conversation are trained, on the templates of the field."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.models.tokenizer import CHATML, Tokenizer, byte_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.training.chat import messages_of_sharegpt, render, trained_spans

QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) "
    "or (message.role == 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Like Qwen3 and R1: thinking of earlier turns is left out.
SHORTENED = "(m.content if loop.last else m.content.split('</think>')[-1])"
DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ " + SHORTENED + " }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ " + SHORTENED + " }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"qwen2.5": QWEN25, "llama3": LLAMA3, "gemma": GEMMA, "chatml": CHATML}
END = {"qwen2.5": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "chatml": "<|im_end|>"}
TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3? "},
    {"role": "assistant", "content": "Six, é → 六."},
]


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(
        byte_tokenizer().pipeline, special_tokens={"bos_token": "<bos>"}, chat_templates={"default": template}
    )


def trained_texts(template: str, messages=TALK, **options) -> list[str]:
    text, spans = trained_spans(tokenizer(template), messages, **options)
    return [text[begin:end] for begin, end in spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_and_end_of_turn_are_trained_and_nothing_else(name):
    expected = [TALK[1]["content"] + END[name], TALK[3]["content"] + END[name]]
    assert trained_texts(TEMPLATES[name]) == expected
    assert trained_texts(TEMPLATES[name], mask="last_assistant") == expected[1:]
    untrained = [TALK[0], {**TALK[1], "train": False}, *TALK[2:]]
    assert trained_texts(TEMPLATES[name], untrained) == expected[1:]
    ids, mask = render(tokenizer(TEMPLATES[name]), TALK)
    assert tokenizer(TEMPLATES[name]).decode(ids[mask], skip_special_tokens=False) == "".join(expected)
    whole = tokenizer(TEMPLATES[name]).render_chat(TALK, add_generation_prompt=False)
    assert tokenizer(TEMPLATES[name]).decode(ids, skip_special_tokens=False) == whole
    _, everything = render(tokenizer(TEMPLATES[name]), TALK, mask="all")
    assert everything.all()


text = st.text(st.characters(codec="utf-8", exclude_characters="<{|}"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_no_user_token_is_ever_trained(name, turns):
    messages = [m for u, a in turns for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})]
    blank = [{**m, "content": "U"} if m["role"] == "user" else m for m in messages]
    assert trained_texts(TEMPLATES[name], messages) == trained_texts(TEMPLATES[name], blank)
    ids, mask = render(tokenizer(TEMPLATES[name]), messages)
    assert mask.dtype == bool and ids.dtype == np.int32 and mask.any() and not mask[0]


def test_templates_that_drop_earlier_thinking_need_blocks_or_the_last_turn():
    talk = [TALK[0], {"role": "assistant", "content": "<think>2+2</think>4"}, TALK[2], TALK[3]]
    with pytest.raises(UserError, match=r"turn by turn.*\{% generation %\}.*last_assistant"):
        trained_texts(DROPS_THINKING, talk)
    assert trained_texts(DROPS_THINKING, talk, mask="last_assistant") == [TALK[3]["content"] + "<|im_end|>"]
    assert trained_texts(MARKED, talk) == ["4<|im_end|>", TALK[3]["content"] + "<|im_end|>"]


def test_refusals_and_conversations_without_assistant():
    with pytest.raises(UserError, match="System role not supported"):
        render(tokenizer(GEMMA), [{"role": "system", "content": "x"}, *TALK])
    _, mask = render(tokenizer(CHATML), TALK[:1])
    assert not mask.any()
    with pytest.raises(UserError, match="no chat template"):
        render(Tokenizer(byte_tokenizer().pipeline), TALK)


def test_sharegpt():
    row = {
        "system": "S",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": False}],
    }
    assert messages_of_sharegpt(row) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "train": False},
    ]
    with pytest.raises(UserError, match=r"conversations\[0\]: from is 'bot', expected one of system, user"):
        messages_of_sharegpt({"conversations": [{"from": "bot", "value": "a"}]})
    with pytest.raises(UserError, match=r"conversations\[0\]: expected an object"):
        messages_of_sharegpt({"conversations": ["hello"]})
