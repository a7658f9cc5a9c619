"""Chats: ids and labels written out by hand, and of several turns against ones marked by the turn of each character.

The reference of chats of several turns writes each template's text out turn by turn in Python, and takes a token's turn
from the offsets of its characters; the package renders beginnings with Jinja and compares ids.
"""

from __future__ import annotations

import random

import pytest

from lora_one_dist.data.batches import collate
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.samples import tokenize
from tests.data.helpers import build_tokenizer, config, dataset, read, read_all, turns

# ---------------------------------------------------------------- by hand


# Without special tokens at its borders, as in many plain templates; drops the thoughts of all turns but the last.
PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{% if m.thought and loop.last %}({{ m.thought }}){% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"


def test_chat_mask_token_by_token(tokenizer):
    data = tokenize(dataset({"messages": turns("hi", "x", "q", "yz")}), tokenizer, config(format="chat"))
    tokens, labels = (" ".join(row) for row in read(data.dataset[0], tokenizer))
    assert tokens == "<s> <|user|> h i <|end|> <|assistant|> x <|end|> <|user|> q <|end|> <|assistant|> y z <|end|>"
    assert labels == ". . . . . . x <|end|> . . . . y z <|end|>"
    assert (data.dataset[0]["prompt_length"], data.num_targets, data.num_tokens) == (6, 5, 15)


def test_chat_that_ends_with_a_question_or_has_no_answer(tokenizer):
    rows = dataset({"chat": turns("q", "x", "r")}, {"chat": turns("q")})
    data = tokenize(rows, tokenizer, config(format="chat", messages="chat"))
    tokens = ["<s>", "<|user|>", "q", "<|end|>", "<|assistant|>", "x", "<|end|>", "<|user|>", "r", "<|end|>"]
    assert read_all(data, tokenizer) == [(tokens, [".", ".", ".", ".", ".", "x", "<|end|>", ".", ".", "."])]
    assert data.num_without_targets == 1


def test_chat_truncated_within_the_second_answer(tokenizer):
    data = tokenize(dataset({"messages": turns("q", "x", "r", "yz")}), tokenizer, config(format="chat", max_length=12))
    _, labels = read(data.dataset[0], tokenizer)
    assert labels == [".", ".", ".", ".", ".", "x", "<|end|>", ".", ".", ".", ".", "y"]
    assert (data.num_truncated, data.num_targets) == (1, 3)


def test_chat_turns_that_merge_at_their_borders():
    r"""'assistant:\n' + '\nx' holds one token for both line ends: it is learnt; what follows an answer is not."""
    plain = build_tokenizer(PLAIN)
    data = tokenize(dataset({"messages": turns("q", "\nx", "r", "y")}), plain, config(format="chat"))
    tokens, labels = read(data.dataset[0], plain)
    head = [*"user:Ċq", "Ċ", *"assistant:"]
    middle = [*"user:Ċr", "Ċ", *"assistant:Ċ"]
    assert tokens == [*head, "ĊĊ", "x", "Ċ", *middle, "y", "Ċ"]
    assert labels == [*"." * len(head), "ĊĊ", "x", "Ċ", *"." * len(middle), "y", "Ċ"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    plain = build_tokenizer(PLAIN)
    messages = turns("q", "x", "r", "y")
    messages[1]["thought"] = messages[3]["thought"] = "hm"
    rows = dataset({"messages": turns("q", "x")}, {"messages": messages})
    message = r"row 1 \(the first is 0\): the chat template rewrites earlier turns.* Set data\.loss_on: last or all"
    with pytest.raises(DataError, match=message):
        tokenize(rows, plain, config(format="chat"))
    data = tokenize(rows, plain, config(format="chat", loss_on="all"))
    assert "".join(read(data.dataset[1], plain)[1]) == "user:ĊqĊassistant:ĊxĊuser:ĊrĊassistant:Ċ(hm)yĊ"
    first_only = tokenize(dataset({"messages": turns("q", "x")}), plain, config(format="chat"))
    assert first_only.num_targets == 2


def test_a_key_of_other_messages_is_not_printed():
    """Arrow gives the first message a `thought` of None."""
    printing = build_tokenizer("{% for m in messages %}{{ m.thought }}{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "thought": "hm"}]
    data = tokenize(dataset({"messages": messages}), printing, config(format="chat"))
    assert "".join(read(data.dataset[0], printing)[0]) == "qhmx"


def test_a_tokenizer_without_chat_template_is_refused_before_anything_else():
    with pytest.raises(DataError, match=r"data\.format = chat: the tokenizer .* has no chat template.* Take the"):
        tokenize(dataset({"no": "messages"}), build_tokenizer(chat_template=None), config(format="chat"))


def test_a_template_that_refuses_a_chat_names_the_row():
    with pytest.raises(DataError, match=r"row 0 .*: roles must alternate: the template cannot"):
        tokenize(dataset({"messages": turns("q", "x")}), build_tokenizer(REFUSING), config(format="chat"))


# ---------------------------------------------------------------- turn by turn


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
    chats = [chat(generator, tools=name == "chatml") for _ in range(80)]
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
