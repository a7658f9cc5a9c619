"""What a row says is what is learned: rows that go wrong elsewhere, and the exact text of their targets.

Each row of the table goes through JSONL, Parquet and a folder of `datasets`; chats of every template are held against
beginnings that transformers renders, one for each turn.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import random
import time

import pytest
from tokenizers import AddedToken

from lora_one_dist.data.chat import FEW
from lora_one_dist.data.encode import Encoder
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.messages import read_chat
from lora_one_dist.data.rows import Chunk, load_rows
from lora_one_dist.data.samples import tokenize
from lora_one_dist.data.template import Template
from tests.data.helpers import build_tokenizer, config, turns, typed, write
from tests.data.templates import ODD, QWEN3, SPECIAL, TEMPLATES

DAY = datetime.date(2026, 1, 2)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}


def of_family(name):
    tokenizer = build_tokenizer(TEMPLATES.get(name, name))
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def targets(rows, tokenizer, **settings):
    """Of each sample the decoded stretches of targets, and what was noted."""
    data = tokenize(rows, tokenizer, config(**settings), date=DAY)
    found = []
    for sample in data.dataset:
        pairs = zip(sample["input_ids"], sample["labels"], strict=True)
        stretches = [
            (learned, list(group)) for learned, group in itertools.groupby(pairs, lambda pair: pair[1] != -100)
        ]
        found.append([tokenizer.decode([i for i, _ in group]) for learned, group in stretches if learned])
    return found, data.notes


def sources(tmp_path, rows, formats):
    """The rows as files of each format, read back."""
    found = {}
    if "jsonl" in formats:
        found["jsonl"] = load_rows(write(tmp_path / "rows.jsonl", rows), "train", None)
    if "parquet" in formats:
        typed(*rows).to_parquet(tmp_path / "rows.parquet")
        found["parquet"] = load_rows(str(tmp_path / "rows.parquet"), "train", None)
    if "folder" in formats:
        (tmp_path / "folder").mkdir()
        typed(*rows).to_parquet(tmp_path / "folder" / "train.parquet")
        found["folder"] = load_rows(str(tmp_path / "folder"), "train", None)
    return found


def call(arguments, name="weather", **more):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    } | more


def asked(*messages, **columns):
    return {"messages": [{"role": "user", "content": "q"}, *messages], **columns}


QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Pau"}}\n</tool_call><|im_end|>\n'
OTHER_CALL = '<tool_call>\n{"name": "stock", "arguments": {"count": 3}}\n</tool_call><|im_end|>\n'
LEARNED = {
    "tools offered, as a list": (
        "qwen2.5",
        [asked(call({"town": "Pau"}), tools=[TOOL])],
        {},
        [[QWEN_CALL]],
    ),
    "tools offered, as text": ("qwen2.5", [asked(call({"town": "Pau"}), tools=json.dumps([TOOL]))], {}, [[QWEN_CALL]]),
    "tools of another column": ("qwen2.5", [asked(call({"town": "Pau"}), fns=[TOOL])], {"tools": "fns"}, [[QWEN_CALL]]),
    "nulls of other rows' arguments": (
        "qwen2.5",
        [asked(call({"town": "Pau"})), asked(call({"count": 3}, "stock"))],
        {},
        [[QWEN_CALL], [OTHER_CALL]],
    ),
    "arguments as text": ("qwen2.5", [asked(call('{"town": "Pau"}'))], {}, [[QWEN_CALL]]),
    "llama's call": (
        "llama3",
        [asked(call('{"town": "Pau"}'), {"role": "tool", "content": "12 C"}, {"role": "assistant", "content": "12"})],
        {},
        [['{"name": "weather", "parameters": {"town": "Pau"}}<|eot|>', "12<|eot|>"]],
    ),
    "two answers of tools in one turn": (
        "qwen2.5",
        [
            asked(
                call({"town": "Pau"}),
                *[{"role": "tool", "content": c} for c in "ab"],
                {"role": "assistant", "content": "x"},
            )
        ],
        {},
        [[QWEN_CALL, "x<|im_end|>\n"]],
    ),
    "parts": (
        "gemma",
        [
            {
                "messages": [
                    message | {"content": [{"type": "text", "text": message["content"]}]} for message in turns("q", "x")
                ]
            }
        ],
        {},
        [["x<end_of_turn>\n"]],
    ),
    "several parts": (
        "gemma",
        [
            {
                "messages": [
                    {"role": r, "content": [{"type": "text", "text": c} for c in t]}
                    for r, t in (("user", "qr"), ("assistant", "xy"))
                ]
            }
        ],
        {},
        [["xy<end_of_turn>\n"]],
    ),
    "weight 0": (
        "gemma",
        [
            {
                "messages": [
                    t | ({"weight": int(i == 3)} if i % 2 else {}) for i, t in enumerate(turns("q", "bad", "r", "x"))
                ]
            }
        ],
        {},
        [["x<end_of_turn>\n"]],
    ),
    "train: false": (
        "gemma",
        [{"messages": [t | ({"train": i == 3} if i % 2 else {}) for i, t in enumerate(turns("q", "bad", "r", "x"))]}],
        {},
        [["x<end_of_turn>\n"]],
    ),
    "weight 0 among all tokens": (
        "gemma",
        [
            {
                "messages": [
                    t | ({"weight": int(i == 3)} if i % 2 else {}) for i, t in enumerate(turns("q", "bad", "r", "x"))
                ]
            }
        ],
        {"loss_on": "all"},
        [
            [
                "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n",
                "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\nx<end_of_turn>\n",
            ]
        ],
    ),
    "ShareGPT": (
        "gemma",
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}],
        {},
        [["x<end_of_turn>\n"]],
    ),
    "ShareGPT's roles": (
        "gemma",
        [{"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "x"}]}],
        {},
        [["x<end_of_turn>\n"]],
    ),
    "thoughts of the last turn": (
        "qwen3",
        [{"messages": turns("q", "<think>\nhm\n</think>\n\nx", "r", "<think>\nso\n</think>\n\ny")}],
        {"loss_on": "last"},
        [["<think>\nso\n</think>\n\ny<|im_end|>\n"]],
    ),
    "thoughts by their key": (
        "qwen3",
        [asked({"role": "assistant", "content": "x", "reasoning_content": "hm"})],
        {},
        [["<think>\nhm\n</think>\n\nx<|im_end|>\n"]],
    ),
    "thoughts by another key": (
        "qwen3",
        [asked({"role": "assistant", "content": "x", "reasoning": "hm"})],
        {},
        [["<think>\nhm\n</think>\n\nx<|im_end|>\n"]],
    ),
    "a call after thoughts": (
        "qwen3",
        [
            asked(
                call({"town": "Pau"}, content="<think>\nhm\n</think>\n\n"),
                {"role": "tool", "content": "c"},
                {"role": "assistant", "content": "x"},
            )
        ],
        {},
        [
            [
                f"<think>\nhm\n</think>\n\n{QWEN_CALL}".replace("</think>\n\n<tool", "</think>\n\n\n<tool"),
                "<think>\n\n</think>\n\nx<|im_end|>\n",
            ]
        ],
    ),
    "a call that is quoted later": (
        "qwen2.5",
        [
            asked(
                call({"code": "a\nb"}),
                {"role": "tool", "content": "did"},
                {"role": "assistant", "content": "I ran a\nb"},
            )
        ],
        {},
        [[QWEN_CALL.replace('"town": "Pau"', '"code": "a\\nb"'), "I ran a\nb<|im_end|>\n"]],
    ),
    "a text that looks like a number": (
        "qwen2.5",
        [asked(call({"code": "\0x\0"}))],
        {},
        [[QWEN_CALL.replace('"town": "Pau"', r'"code": "\u0000x\u0000"')]],
    ),
    "no tools, as text": ("qwen2.5", [asked(turns("", "x")[1], tools="[]")], {}, [["x<|im_end|>\n"]]),
    "functions": ("qwen2.5", [asked(call({"town": "Pau"}), functions=[TOOL["function"]])], {}, [[QWEN_CALL]]),
    "fields that hold nothing": (
        "gemma",
        [{"messages": [t | {"tool_calls": [], "reasoning_content": "", "annotations": []} for t in turns("q", "x")]}],
        {},
        [["x<end_of_turn>\n"]],
    ),
    "ShareGPT's system": (
        "qwen2.5",
        [{"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "model", "value": "x"}]}],
        {"loss_on": "all"},
        [["<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"]],
    ),
    "a system prompt that moves": (
        "mistral",
        [{"messages": [{"role": "system", "content": "s"}, *turns("q", "x", "r", "y")]}],
        {"loss_on": "last"},
        [[" y</s>"]],
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_the_text_that_is_learned(name, tmp_path):
    family, rows, settings, expected = LEARNED[name]
    for read in sources(tmp_path, rows, ("jsonl", "parquet", "folder")).values():
        assert targets(read, of_family(family), format="chat", **settings)[0] == expected


NUMBERS = ["14", "14.0", "0.50", "1e3", "-0", "12345678901234567890123", "0.30000000000000000001", "1E-7"]


def test_numbers_keep_their_text(tmp_path):
    """In completions, in arguments of calls and beside other types in their column."""
    lines = [f'{{"prompt": "q", "completion": {number}}}\n' for number in NUMBERS]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    (tmp_path / "rows.json").write_text(f"[{','.join(lines)}]")
    for suffix in ("jsonl", "json"):
        read = load_rows(str(tmp_path / f"rows.{suffix}"), "train", None)
        assert targets(read, build_tokenizer())[0] == [[f"{number}</s>"] for number in NUMBERS]
    chats = [json.dumps(asked(call({"n": "@"}))).replace('"@"', number) + "\n" for number in NUMBERS]
    (tmp_path / "calls.jsonl").write_text("".join(chats))
    found, _ = targets(load_rows(str(tmp_path / "calls.jsonl"), "train", None), of_family("qwen2.5"), format="chat")
    assert [text.partition('"n": ')[2].partition("}")[0] for (text,) in found] == NUMBERS
    typed({"prompt": "q", "completion": 14.0}).to_parquet(tmp_path / "stored.parquet")
    read = load_rows(str(tmp_path / "stored.parquet"), "train", None)
    assert targets(read, build_tokenizer())[0] == [["14.0</s>"]], "a typed file holds no text"


def test_nulls_that_a_user_wrote_stay_and_those_of_arrow_do_not(tmp_path):
    rows = [asked(call({"town": None}), tools=[TOOL]), asked(call({"count": 3}, "stock"), tools=[TOOL])]
    read = sources(tmp_path, rows, ("jsonl", "parquet"))
    found, notes = targets(read["jsonl"], of_family("qwen2.5"), format="chat")
    assert ('"arguments": {"town": null}' in found[0][0], notes) == (True, ())
    found, notes = targets(read["parquet"], of_family("qwen2.5"), format="chat")
    assert found == [[QWEN_CALL.replace('"town": "Pau"', "")], [OTHER_CALL]]
    assert len(notes) == 1
    assert "nulls that the files' types had added" in notes[0]


REFUSED = {
    "role": ([{"role": "developer", "content": "s"}, *turns("q", "x")], "mistral", "only user and assistant"),
    "role in silence": (
        [*turns("q", "x"), {"role": "critic", "content": "bad"}],
        "{% for m in messages if m.role != 'critic' %}{{ m.role }}{{ m.content }}{% endfor %}",
        "message 3 has the role 'critic', whose text 'bad'",
    ),
    "key": (
        [turns("q")[0], {"role": "assistant", "content": "x", "mood": "bad"}],
        "gemma",
        r"message 2 \(assistant\) has 'mood', which the chat template never reads",
    ),
    "calls": (
        [turns("q")[0], call({"a": 1}, content="x")],
        "gemma",
        "has 'tool_calls', which the chat template never reads",
    ),
    "thoughts": (
        [turns("q")[0], {"role": "assistant", "content": "x", "thinking": "hm"}],
        "gemma",
        "has 'thinking', which",
    ),
    "image": (
        [{"role": "user", "content": [{"type": "image", "url": "u"}]}, turns("", "x")[1]],
        "gemma",
        r"message 1 \(user\) has a content of 'image'",
    ),
    "weight": (
        [turns("q")[0], {"role": "assistant", "content": "x", "weight": 0.5}],
        "gemma",
        "weight = 0.5: must be 0 or 1",
    ),
    "weight of a question": (
        [{"role": "user", "content": "q", "weight": 1}, turns("", "x")[1]],
        "gemma",
        "has a weight of 1, but only",
    ),
    "unclear weight": (
        [turns("q")[0], {"role": "assistant", "content": "x", "mask": True}],
        "gemma",
        "has 'mask', which may mean a weight",
    ),
    "arguments": ([turns("q")[0], call("Pau")], "qwen2.5", "arguments of weather = 'Pau': must be an object, or JSON"),
    "earlier thoughts": (
        turns("q", "<think>a</think>x", "r", "y"),
        "qwen3",
        "rewrites earlier turns.*data.loss_on: last",
    ),
    "the second of two calls": (
        [turns("q")[0], {**call(None), "tool_calls": [call({"town": "Pau", "n": n})["tool_calls"][0] for n in (1, 2)]}],
        "llama3",
        "message 2 has the role 'assistant', whose text 'weather'",
    ),
    "role of a letter": (
        [{"role": "developer", "content": "s"}, *turns("q", "x")],
        "qwen2.5",
        "message 1 has the role 'developer', whose text 's'",
    ),
    "a call as a role": (
        [turns("q")[0], {"role": "function_call", "content": "x"}],
        "gemma",
        "Give it the role assist",
    ),
    "a key of the template's comments": (
        [turns("q")[0], {"role": "assistant", "content": "x", "mood": "bad"}],
        "{# mood #}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
        "has 'mood', which the chat template never reads",
    ),
    "two thoughts": (
        [turns("q")[0], {"role": "assistant", "content": "x", "thinking": "a", "reasoning_content": "b"}],
        "qwen3",
        "different thoughts in",
    ),
    "thoughts of the answer itself": (
        turns("q", "<think>hm</think>x"),
        "{% for m in messages %}{{ m.role }}{{ m.content.split('</think>')[-1] }}{% endfor %}",
        "message 2 has thoughts that the chat template drops",
    ),
    "a prompt of thoughts": (
        turns("q", "x"),
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
        "{{ 'assistant<think>' if add_generation_prompt }}",
        "message 2: the chat template's generation prompt is not how the turn begins .* or set data.loss_on: all",
    ),
    "too deep": (
        [turns("q")[0], call(json.loads('{"a":' * 900 + "1" + "}" * 900))],
        "qwen2.5",
        "row 0",
    ),
    "nobody answers": (turns("q"), "gemma", r"none of 1 rows has a token to learn: the first has the roles \['user'\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_as_written_is_refused(name, tmp_path):
    messages, family, message = REFUSED[name]
    rows = load_rows(write(tmp_path / "rows.jsonl", [{"messages": messages}]), "train", None)
    with pytest.raises(DataError, match=message):
        targets(rows, of_family(family), format="chat")


def test_tools_that_the_template_never_reads_are_refused(tmp_path):
    rows = load_rows(write(tmp_path / "rows.jsonl", [asked(turns("", "x")[1], tools=[TOOL])]), "train", None)
    with pytest.raises(DataError, match=r"the row has tools, which .* Set data\.tools: none"):
        targets(rows, of_family("gemma"), format="chat")
    assert targets(rows, of_family("gemma"), format="chat", tools="none")[0] == [["x<end_of_turn>\n"]]


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


def test_tools_that_are_none(tmp_path):
    rows = load_rows(write(tmp_path / "rows.jsonl", [asked(call({}), tools=[{"function": "f"}])]), "train", None)
    with pytest.raises(DataError, match="must be a list of tools, or JSON text of one"):
        targets(rows, of_family("qwen2.5"), format="chat")


def test_a_template_that_cannot_do_without_tools_gets_objects(tmp_path):
    source = f"{{% for t in tools %}}{{{{ t | tojson }}}}{{% endfor %}}{TEMPLATES['qwen2.5']}"
    rows = load_rows(write(tmp_path / "rows.jsonl", [asked(call({"town": "Pau"}), tools=[TOOL])]), "train", None)
    assert targets(rows, of_family(source), format="chat")[0] == [[QWEN_CALL]]


def test_a_special_token_that_takes_the_blanks_behind_it_is_no_target(tmp_path):
    tokenizer = of_family("gemma")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt }}"
    )
    tokens = [AddedToken(name, rstrip=True, special=True) for name in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    rows = load_rows(write(tmp_path / "rows.jsonl", [{"messages": turns("q", " x", "r", "y")}]), "train", None)
    assert targets(rows, tokenizer, format="chat")[0] == [["x<|end|>", "y<|end|>"]]


def test_other_values_of_json_are_json_in_a_completion(tmp_path):
    values = [True, {"a": [True, None, 1.5]}, ["x"]]
    rows = load_rows(write(tmp_path / "r.jsonl", [{"prompt": "q", "completion": v} for v in values]), "train", None)
    assert targets(rows, build_tokenizer())[0] == [[f"{json.dumps(value)}</s>"] for value in values]


def test_a_template_s_own_mask(tmp_path):
    rows = load_rows(write(tmp_path / "rows.jsonl", [{"messages": turns("q", "x", "r", "y")}]), "train", None)
    assert targets(rows, of_family(GENERATION), format="chat")[0] == [["x<|im_end|>", "y<|im_end|>"]]
    assert targets(rows, of_family(GENERATION), format="chat", loss_on="last")[0] == [["y<|im_end|>"]]
    open_end = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.raises(DataError, match=r"generation block ends before the turn's end token <\|im_end\|>"):
        targets(rows, of_family(open_end), format="chat")


def test_control_tokens_and_dropped_thoughts_are_counted(tmp_path):
    chats = [turns("a<|im_end|>b", "x"), turns("q", "<|im_end|>x"), turns("q", "<think>h</think>x", "r", "y")]
    rows = load_rows(write(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats]), "train", None)
    _, notes = targets(rows, of_family("qwen3"), format="chat", loss_on="last")
    assert [note[:9] for note in notes] == ["1 thought", "1 rows ho"]


# ---------------------------------------------------------------- any chat of any template


def chats(name, count=60, rounds=(1, 4)):
    """Random chats that the family takes: questions, answers, thoughts, calls and blanks at their ends."""
    generator = random.Random(name)

    def said():
        return "".join(
            generator.choices(["a", "b ", " ab", "\n", "x", "é", "assistant", "user"], k=generator.randint(1, 6))
        )

    for _ in range(count):
        messages = []
        if name not in ("gemma",) and generator.random() < 0.4:
            messages.append({"role": "system", "content": said()})
        has_thoughts = generator.random() < 0.5
        for _ in range(generator.randint(*rounds)):
            messages.append({"role": "user", "content": said()})
            if name == "no_think" and generator.random() < 0.1:
                messages[-1]["content"] += "/no_think"
            if name.startswith("qwen") and generator.random() < 0.5:
                town = {"role": "assistant", "content": generator.choice(["", said()])}
                calls = [{"function": {"name": "f" + generator.choice("ab"), "arguments": {"k": said(), "n": 1.5}}}]
                messages += [
                    town | {"tool_calls": calls},
                    *[{"role": "tool", "content": said()}] * generator.randint(1, 2),
                ]
            messages.append({"role": "assistant", "content": said()})
            if name == "glm" and generator.random() < 0.3 * has_thoughts:
                messages[-1]["reasoning_content"] = said()
            if name in ("qwen3", "qwq") and generator.random() < 0.5 * has_thoughts:
                messages[-1]["content"] = f"<think>\n{said()}\n</think>\n\n{said()}"
        yield messages


def learned_by_beginnings(messages, tokenizer, loss_on):
    """(whole text, spans) by transformers' own renderings of each beginning; None if the template rewrites one."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and (loss_on == "completion" or i > last):
            head = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            turn = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (whole.startswith(head) and whole.startswith(turn)):
                return whole, None
            spans.append((len(head), len(turn)))
    return whole, spans


@pytest.mark.parametrize("loss_on", ["completion", "last"])
@pytest.mark.parametrize("name", TEMPLATES | ODD)
def test_turns_are_those_of_the_beginnings(name, loss_on):
    """Also of long chats, of which not every beginning is rendered."""
    tokenizer = of_family((TEMPLATES | ODD)[name].replace("strftime_now('%d %b %Y')", "'a day'"))
    encoder = Encoder(tokenizer, config(format="chat", loss_on=loss_on), DAY)
    rewritten, taken = 0, 0
    for messages in itertools.chain(chats(name), chats(name, 40, (FEW + 1, 20))):
        given = copy.deepcopy(messages)
        whole, spans = learned_by_beginnings(messages, tokenizer, loss_on)
        if spans is None:
            rewritten += 1
            with pytest.raises(DataError, match=r"rewrites earlier turns|generation prompt is not how the turn begins"):
                encoder.read({"messages": messages}, 0)
            continue
        for _ in range(3):
            read = encoder.read({"messages": messages}, 0)
            assert (read.text, read.learned) == (whole, spans), messages
        taken += 1
        assert messages == given, "the row itself is left alone"
    # Qwen 3 gives empty thoughts to a call that ends a beginning, also after the last question.
    rewriting = {"completion": {"qwen3", "mistral", "qwq", "glm", "no_think"}, "last": {"qwen3", "no_think"}}
    assert (rewritten > 0) == (name in rewriting[loss_on])
    assert taken > 5


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_language_is_transformers_own(name):
    tokenizer = of_family(TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'a day'"))
    template = Template(tokenizer.chat_template, tokenizer.special_tokens_map, DAY)
    for messages in chats(name, 20):
        for prompt in (False, True):
            theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert template.render(messages, add_generation_prompt=prompt)[0] == theirs


def test_a_chat_takes_time_in_proportion_to_its_length():
    """8 times the messages: about 8 times the seconds, where beginnings would take 64."""
    encoder = Encoder(of_family("qwen2.5"), config(format="chat", max_length=100_000), DAY)

    def seconds(exchanges):
        row = {"messages": turns(*["hello"] * 2 * exchanges)}
        encoder.read(row, 0)
        started = time.process_time()
        for _ in range(5):
            encoder.read(row, 0)
        return time.process_time() - started

    assert seconds(800) < 24 * seconds(100)


def test_dates_are_the_run_s(tmp_path):
    rows = load_rows(write(tmp_path / "rows.jsonl", [{"messages": turns("q", "x")}]), "train", None)
    for day, printed in ((DAY, "02 Jan 2026"), (datetime.date(2025, 12, 31), "31 Dec 2025")):
        data = tokenize(rows, of_family("llama3"), config(format="chat"), date=day)
        assert f"Today: {printed}" in of_family("llama3").decode(data.dataset[0]["input_ids"])


def test_a_long_chat_is_tokenised_as_far_as_it_is_needed():
    tokenizer, chat = of_family(QWEN3), turns(*["word and word"] * 800)
    whole = targets_of(tokenizer, chat, 100_000)
    for limit in (30, 200):
        cut = targets_of(tokenizer, chat, limit)
        assert (cut["input_ids"], cut["labels"]) == (whole["input_ids"][:limit], whole["labels"][:limit])
        assert cut["is_cut"]


def targets_of(tokenizer, messages, max_length):
    encoder = Encoder(tokenizer, config(format="chat", loss_on="all", max_length=max_length), DAY)
    return encoder.encode(Chunk(0, [json.dumps({"messages": messages}).encode()])).to_pylist()[0]


def test_a_template_that_wants_text_gets_it():
    called = "{% for c in m.tool_calls or [] %}{{ 'a' + c.function.arguments }}{% endfor %}"
    source = f"{{% for m in messages %}}{{{{ m.content }}}}{called}{{% endfor %}}"
    template = Template(source, {}, DAY)
    chat = read_chat([turns("q")[0], call({"k": 1}, content="x")], None, "messages", template)
    assert template.render(chat.messages)[0] == 'qxa{"k": 1}'
