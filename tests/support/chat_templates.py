"""Chat templates in the styles that models are published with, and what each makes of a turn.

`END`: what ends an assistant turn. `SYSTEM`: whether the template takes a system message.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    template: str
    end: str
    marks: tuple[str, ...]  # special tokens that a tokenizer needs for it
    bos: bool = False
    system: bool = True


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = """
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA_3 = """
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- m.content + eos_token }}
    {%- else %}
        {{- raise_exception('only user and assistant') }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = """
{%- for m in messages %}
    {{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}"""
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('no system role') }}{%- endif %}
{%- for m in messages %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
    {{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}"""
PHI = """
{%- for m in messages %}
    {{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}"""
MARKED = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {{- m.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

STYLES = {
    "chatml": Style(CHATML, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "marked chatml": Style(MARKED, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama-2": Style(LLAMA_2, " </s>", ("<s>", "</s>"), bos=True),
    "llama-3": Style(LLAMA_3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), bos=True),
    "mistral": Style(MISTRAL, "</s>", ("[INST]", "[/INST]", "<s>", "</s>"), bos=True, system=False),
    "zephyr": Style(ZEPHYR, "</s>", ("</s>",)),
    "gemma": Style(GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), bos=True, system=False),
    "phi": Style(PHI, "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
}

# What follows rewrites what it wrote before, or opens a turn otherwise than it writes it.

# Reasoning stands in the last turn alone, as in Qwen3.
FORGETTING = """
{%- for m in messages %}
    {%- set said = m.content %}
    {%- if m.role == 'assistant' and not loop.last %}
        {%- set said = said.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
# The prompt begins the reasoning, and a finished turn has none, as in DeepSeek-R1.
THINKING_PROMPT = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# Another mark ends the last turn, as in gpt-oss.
LAST_MARK = CHATML.replace(
    "'<|im_end|>\n'", "('<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n')"
)
# The system message stands in the last user turn, as in later Mistral templates.
MOVING_SYSTEM = """
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set last = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}
        {{- '[INST]' + (messages[0].content + '\n' if last and messages[0].role == 'system' else '') }}
        {{- m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
