"""Chat templates: those of the families as they are written, and hostile ones, which end soon with one line."""

import datetime

import pytest

from jaxstack.models.chat_template import ChatTemplate, TemplateLimits, TemplateRefused
from jaxstack.runtime.errors import UserError

# Written in the manner of Qwen2.5: a default system prompt, tools, `loop.first`, string tests, tojson.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# In the manner of Llama 3.1: BOS from outside, trim, strftime_now, raise_exception, slices.
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{{- raise_exception("no role " + message.role) }}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
# In the manner of Mistral: a namespace, alternation checked, the last message known by loop.last.
MISTRAL = """\
{{ bos_token }}{% set ns = namespace(index=0) %}
{% for message in messages %}
{% if (message['role'] == 'user') != (ns.index % 2 == 0) %}
{{ raise_exception('roles must alternate') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' ~ message['content'] ~ ' [/INST]' }}
{%- else %}
{{ ' ' ~ message['content'] ~ eos_token }}
{%- endif %}
{% set ns.index = ns.index + 1 %}
{% endfor %}
"""
USER, ASSISTANT = {"role": "user", "content": "1 < 2 & é?"}, {"role": "assistant", "content": "yes"}


def test_qwen_like() -> None:
    template = ChatTemplate(QWEN)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn = "<|im_start|>user\n1 < 2 & é?<|im_end|>\n"
    assert template.render([USER], add_generation_prompt=True) == head + turn + "<|im_start|>assistant\n"
    quiet = template.render([USER], add_generation_prompt=True, enable_thinking=False)
    assert quiet == head + turn + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    system = {"role": "system", "content": "Be brief."}
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n" + turn + "<|im_start|>assistant\nyes<|im_end|>\n"
    assert template.render([system, USER, ASSISTANT]) == expected


def test_qwen_like_with_tools() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "<é>"}}}
    text = ChatTemplate(QWEN).render(
        [USER, {"role": "assistant", "tool_calls": [call]}], tools=[{"name": "f", "b": [1]}]
    )
    assert '<tools>\n{"name": "f", "b": [1]}\n</tools>' in text
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"x": "<é>"}}\n</tool_call><|im_end|>\n'
    )


def test_llama_like() -> None:
    template = ChatTemplate(LLAMA)
    system = {"role": "system", "content": "  Be brief. "}
    text = template.render([system, USER], bos_token="<s>", date_string="26 Jul 2024", add_generation_prompt=True)
    assert text == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1 < 2 & é?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert str(datetime.date.today().year) in template.render([USER], bos_token="")
    with pytest.raises(TemplateRefused, match="no role tool"):
        template.render([{"role": "tool", "content": "x"}], bos_token="")


def test_mistral_like() -> None:
    template = ChatTemplate(MISTRAL)
    text = template.render([USER, ASSISTANT, USER], bos_token="<s>", eos_token="</s>")
    assert text == "<s>[INST] 1 < 2 & é? [/INST] yes</s>[INST] 1 < 2 & é? [/INST]"
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        template.render([ASSISTANT], bos_token="<s>", eos_token="</s>")


def test_generation_blocks_are_invisible_and_their_places_are_known() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source)
    text, spans = template.render_with_spans([USER, ASSISTANT, USER, ASSISTANT])
    assert text == template.render([USER, ASSISTANT, USER, ASSISTANT])
    assert [text[start:end] for start, end in spans] == ["yes!", "yes!"]


def test_a_long_conversation_stays_within_the_limits() -> None:
    messages = [USER, {"role": "assistant", "content": "x" * 2000}] * 500
    for source in (QWEN, LLAMA, MISTRAL):
        assert len(ChatTemplate(source).render(messages, bos_token="<s>", eos_token="</s>")) > 1_000_000


DOUBLING = "{% set ns = namespace(s=SEED) %}{% for i in range(500) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
        "{% set t %}{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [1] * 10**9 }}",
        "{{ 2**(2**40) }}",
        DOUBLING.replace("SEED", "'aa'").replace("STEP", "ns.s ~ ns.s"),
        DOUBLING.replace("SEED", "'aa'").replace("STEP", "ns.s + ns.s"),
        DOUBLING.replace("SEED", "'aa'").replace("STEP", "ns.s.replace('a', 'aa')"),
        DOUBLING.replace("SEED", "'aa'").replace("STEP", "ns.s|replace('a', 'aa')"),
        DOUBLING.replace("SEED", "'aa'").replace("STEP", "ns.s.join(['', ns.s, ''])"),
        DOUBLING.replace("SEED", "[1]").replace("STEP", "[ns.s, ns.s]"),
        DOUBLING.replace("SEED", "3").replace("STEP", "ns.s * ns.s"),
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% for x in [[1]] recursive %}{{ loop([x]) }}{{ loop([x]) }}{% endfor %}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a\nb'|indent(10**9) }}",
        "{{ [[1]]|tojson(indent=10**9) }}",
        "{{ 5|round(-10**9) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include 'other' %}",
        "{{ missing.field.of.nothing }}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "{% if x %}",
        "{{ " + "x" * 2**20 + " }}",
    ],
)
def test_a_hostile_template_ends_with_one_line(source: str) -> None:
    with pytest.raises(UserError) as error:
        ChatTemplate(source).render([USER])
    assert "\n" not in str(error.value)


def test_limits_are_settings() -> None:
    limits = TemplateLimits(source_bytes=10)
    with pytest.raises(UserError, match="longer than the 10 bytes"):
        ChatTemplate("x" * 11, limits=limits)
    with pytest.raises(UserError, match="more than 5 characters"):
        ChatTemplate("{{ 'x' * 6 }}", limits=TemplateLimits(output_chars=5)).render([USER])
