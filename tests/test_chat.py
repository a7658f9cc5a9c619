"""Chats of several turns: every id and label against one marked by the turn that its characters lie in.

The reference writes each template's text out turn by turn in Python, and takes a token's turn from the offsets of its
characters; the package renders beginnings with Jinja and compares ids.
"""

from __future__ import annotations

import random

import pytest

from lora_one_dist.data import collate, tokenize
from tests.test_data import build_tokenizer, cache, config, dataset  # noqa: F401 (cache: for the session)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.name }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# A system prompt of its own where the chat has none.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>\nbe brief</s>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The system prompt inside the first question; questions and answers are no turns of one form.
INSTRUCT = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}<s>[INST] {{ system if loop.first else '' }}{{ m.content }} [/INST]{% endif %}{% endfor %}"
)
ADDED = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|system|>"]


def chatml(messages):
    for m in messages:
        calls = "".join(f"<tool_call>{call['name']}</tool_call>" for call in m.get("tool_calls", []))
        yield f"<|im_start|>{m['role']}\n", False
        yield f"{m['content']}{calls}<|im_end|>\n", m["role"] == "assistant"


def llama3(messages):
    yield "<s>", False
    for m in messages:
        yield f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False
        yield f"{m['content'].strip()}<|eot_id|>", m["role"] == "assistant"


def default_system(messages):
    if messages[0]["role"] != "system":
        yield "<|system|>\nbe brief</s>\n", False
    for m in messages:
        yield f"<|{m['role']}|>\n", False
        yield f"{m['content']}</s>\n", m["role"] == "assistant"


def instruct(messages):
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m["role"] == "assistant":
            yield f" {m['content']} </s>", True
        else:
            yield f"<s>[INST] {system}{m['content']} [/INST]", False
            system = ""


TEMPLATES = {
    "chatml": (CHATML, chatml),
    "llama3": (LLAMA3, llama3),
    "default system": (DEFAULT_SYSTEM, default_system),
    "instruct": (INSTRUCT, instruct),
}
# 'ab', ' b' and two line ends are one token: they merge across the borders of turns.
SYLLABLES = ["a", "b", " b", "ab", "\n", "x", "é", "<s", "assistant", " "]


def chat(generator: random.Random, tools: bool):
    """A chat of 1 to 5 questions, the last of which may have no answer; or answers that call tools."""

    def said(least: int = 0) -> str:
        return "".join(generator.choices(SYLLABLES, k=generator.randint(least, 6)))

    messages = [{"role": "system", "content": said()}] if generator.random() < 0.5 else []
    asked = generator.randint(1, 5)
    for turn in range(asked):
        messages.append({"role": "user", "content": said()})
        if tools and generator.random() < 0.4:
            messages.append({"role": "assistant", "content": said(), "tool_calls": [{"name": said(1)}]})
            messages.append({"role": "tool", "content": said()})
        if turn + 1 < asked or generator.random() < 0.8:
            messages.append({"role": "assistant", "content": said()})
    return messages


def marked(pieces, tokenizer):
    """ids, and labels: a token is learnt if it ends inside a learnt piece (it may begin before: it merged)."""
    pieces = list(pieces)
    text = "".join(piece for piece, _ in pieces)
    learnt, at = [], 0
    for piece, is_learnt in pieces:
        learnt += [(at, at + len(piece))] if is_learnt else []
        at += len(piece)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return ids, [
        token if any(low < end <= high for low, high in learnt) else -100 for token, end in zip(ids, ends, strict=True)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_labels_and_mask_of_chats_turn_by_turn(name):
    template, pieces_of = TEMPLATES[name]
    tokenizer = build_tokenizer(template)
    tokenizer.add_tokens(ADDED, special_tokens=True)
    generator = random.Random(name)
    chats = [chat(generator, tools=name != "instruct") for _ in range(80)]
    whole = [marked(pieces_of(messages), tokenizer) for messages in chats]
    longest = max(len(ids) for ids, _ in whole)
    cut_within_answer = 0
    for max_length in (longest, longest // 2, longest // 5):
        expected = [(ids[:max_length], labels[:max_length]) for ids, labels in whole]
        kept = [i for i, (_, labels) in enumerate(expected) if any(label != -100 for label in labels[1:])]
        rows = dataset(*({"messages": messages} for messages in chats))
        data = tokenize(rows, tokenizer, config(format="chat", max_length=max_length))
        assert data.rows.tolist() == kept
        assert data.num_truncated == sum(len(ids) > max_length for ids, _ in whole)
        for sample, row in zip(data.dataset, kept, strict=True):
            assert (sample["input_ids"], sample["labels"]) == expected[row], chats[row]
            assert sample["num_targets"] == sum(label != -100 for label in expected[row][1][1:])
            labels = whole[row][1]
            cut_within_answer += len(labels) > max_length and -100 not in labels[max_length - 1 : max_length + 1]
        batch = collate(list(data.dataset), tokenizer.pad_token_id)
        lengths = [len(expected[row][0]) for row in kept]
        assert batch["attention_mask"].tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]
        assert all((labels[n:] == -100).all() for labels, n in zip(batch["labels"], lengths, strict=True))
    assert cut_within_answer > 0, "no chat was cut in the middle of an answer"
    turns = [sum(message["role"] == "assistant" for message in messages) for messages in chats]
    assert {1, 2, 3, 4, 5} <= set(turns)
