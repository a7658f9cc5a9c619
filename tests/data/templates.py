"""Chat templates like those of five families, written for these tests: what they do, not their words.

Each has a feature that goes wrong elsewhere: Llama 3 trims, prints a date and calls tools; Qwen 2.5 joins the answers
of tools into one user turn; Qwen 3 leaves out earlier thoughts and gives the last turn empty ones; Mistral puts the
system prompt into the last question; Gemma has other names for roles and refuses a system prompt.
"""

from __future__ import annotations

LLAMA3 = (
    "{{ bos_token }}<|head|>system<|/head|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "{% if tools %}\nFunctions:{% for t in tools %}\n{{ t | tojson(indent=1) }}{% endfor %}{% endif %}<|eot|>"
    "{% for m in messages %}{% if m.tool_calls %}<|head|>assistant<|/head|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot|>'
    "{% else %}<|head|>{{ 'ipython' if m.role == 'tool' else m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
_CALLS = (
    '{% for c in m.tool_calls or [] %}{{ "\\n" if m.content or not loop.first }}<tool_call>\n'
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
)
_TOOL_ANSWERS = (
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user"
    "{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_SYSTEM = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}be kind{% endif %}"
    "{% if tools %}\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}<|im_end|>\n"
)
QWEN25 = (
    f"{_SYSTEM}{{% for m in messages %}}{{% if m.role == 'assistant' %}}<|im_start|>assistant\n"
    f"{{{{ m.content or '' }}}}{_CALLS}<|im_end|>\n{_TOOL_ANSWERS}{{% elif m.role == 'user' or not loop.first %}}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    f"{{% endif %}}{{% endfor %}}{_SYSTEM}{{% for m in messages %}}{{% if m.role == 'assistant' %}}"
    "{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n"
    "{{ said.lstrip('\\n') }}{% else %}{{ said }}{% endif %}"
    f"{_CALLS}<|im_end|>\n{_TOOL_ANSWERS}{{% elif m.role == 'user' or not loop.first %}}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% set system = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {{ system if loop.index0 == ns.last }}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content | trim }}{{ eos_token }}{% else %}{{ raise_exception('only user and assistant') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "qwen2.5": QWEN25, "qwen3": QWEN3, "mistral": MISTRAL, "gemma": GEMMA}
QWQ = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>"
    "{{ m.reasoning_content if loop.index0 > ns.last }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HEADLESS = "{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
REMINDING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'remember\\n' if loop.index0 % 4 == 0 }}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt }}"
)
NO_THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\\n\\n</think>\\n\\n' if '/no_think' in messages[-1].content }}{% endif %}"
)
# Thoughts left out of all turns but the last; empty thoughts in earlier turns; no heads; a line before some questions;
# a generation prompt that looks at the question.
ODD = {"qwq": QWQ, "glm": GLM, "headless": HEADLESS, "reminding": REMINDING, "no_think": NO_THINK}
SPECIAL = ["<|head|>", "<|/head|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
