"""Rows to tokens to batches: every mask, count and order against one written out by hand."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_one_dist.config import DataConfig
from lora_one_dist.data import (
    DataError,
    collate,
    deal,
    epoch_order,
    global_batch,
    load_eval_prompts,
    load_rows,
    load_tokenizer,
    place_of,
    steps_per_epoch,
    tokenize,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Without special tokens at its borders, as in many plain templates; drops the thoughts of all turns but the last.
PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{% if m.thought and loop.last %}({{ m.thought }}){% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of `datasets` of this session's own, and no network."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield folder


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


def build_tokenizer(chat_template=CHAT, single="<s> $A", **tokens):
    """Byte-level BPE in which one token is one character, but for 'ab', ' b' and two line ends; `Ġ` is the space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "b"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *(x + y for x, y in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if single:
        names = [(name, vocab[name]) for name in ("<s>", "</s>") if name in single]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)
    backend.add_special_tokens(SPECIAL)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **tokens)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def dataset(*rows):
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def config(**settings):
    return DataConfig(train="unused.jsonl", **settings)


def read(sample, tokenizer):
    """(tokens, those with a label): '.' stands for a token without."""
    tokens = tokenizer.convert_ids_to_tokens(sample["input_ids"])
    for token_id, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (-100, token_id)
    return tokens, [t if label != -100 else "." for t, label in zip(tokens, sample["labels"], strict=True)]


def read_all(data, tokenizer):
    return [read(sample, tokenizer) for sample in data.dataset]


# ---------------------------------------------------------------- reading


ROWS = [{"q": "one", "a": "1"}, {"q": 'two, "quoted"\nand more', "a": "007"}, {"q": "drei \u00fc", "a": "NA"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write(path, ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        dataset(*ROWS).to_parquet(path)
    else:
        path.write_text('q,a\none,1\n"two, ""quoted""\nand more",007\n\ndrei \u00fc,NA\n', encoding="utf-8")
    assert load_rows(str(path), "ignored", None).to_list() == ROWS
    assert load_rows([str(path)], "ignored", 2).to_list() == ROWS[:2]
    assert load_rows(str(path), "ignored", 99).to_list() == ROWS


def test_several_files_are_concatenated_in_order_also_of_different_formats(tmp_path):
    paths = [write(tmp_path / "1.jsonl", ROWS[:1]), str(tmp_path / "2.csv"), write(tmp_path / "3.jsonl", ROWS[2:])]
    Path(paths[1]).write_text('a,q\n007,"two, ""quoted""\nand more"\n', encoding="utf-8")
    assert load_rows(paths, "ignored", None).to_list() == ROWS
    assert len(load_rows(paths, "ignored", 2)) == 2


def test_a_folder_is_read_by_split(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:1])
    assert load_rows(str(tmp_path), "train", None).to_list() == ROWS
    assert load_rows(str(tmp_path), "test", None).to_list() == ROWS[:1]
    assert load_rows(str(tmp_path), "train[1:]", None).to_list() == ROWS[1:]
    with pytest.raises(DataError, match=r"split validation: cannot be loaded: .*validation.* Check name, split"):
        load_rows(str(tmp_path), "validation", None)
    with pytest.raises(DataError, match=r"split train\[:0\]: cannot be loaded: .*no data"):
        load_rows(str(tmp_path), "train[:0]", None)


def test_an_unknown_data_set_is_named():
    with pytest.raises(DataError, match=r"^nobody/nothing, split train: cannot be loaded: .* give files ending in"):
        load_rows("nobody/nothing", "train", None)


def test_json_values_stay_as_written(tmp_path):
    """Dates are no timestamps, numbers of mixed types stay, and chats with an id are no traces of agents."""
    dates = [{"q": "when", "a": "2020-01-02"}, {"q": "then", "a": "2020-01-03"}]
    assert load_rows(write(tmp_path / "d.jsonl", dates), "", None).to_list() == dates
    mixed = [{"q": "x", "a": 5}, {"q": "y", "a": "five"}, {"q": "z", "a": 0.5}]
    assert load_rows(write(tmp_path / "m.jsonl", mixed), "", None).to_list() == mixed
    chat = {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": turns("c")}
    assert load_rows(write(tmp_path / "c.jsonl", [chat]), "", None)[0]["messages"] == chat["messages"]


GOOD = b'{"q": "x"}\n'
BAD_FILES = {
    "cut.jsonl": (GOOD + b'\n{"q": \n' + GOOD, r"cut\.jsonl, line 3: Expecting value: cannot be read as json .*Mend"),
    "word.jsonl": (GOOD * 2 + b"hello\n", r"word\.jsonl, line 3: Expecting value"),
    "open.jsonl": (GOOD + b'{"q": "x', r"open\.jsonl, line 2: Unterminated string"),
    "list.jsonl": (GOOD + b'["x"]\n', r"list\.jsonl, line 2: must be an object, is a list"),
    "latin.jsonl": (GOOD + b'{"q": "\xe9t\xe9"}\n', r"latin\.jsonl, line 2: byte 0xe9 is not UTF-8\. Save the file as"),
    "empty.jsonl": (b"", r"empty\.jsonl: holds no rows, must hold at least one"),
    "blank.jsonl": (b"\n \n", r"blank\.jsonl: holds no rows"),
    "array.json": (b'[{"q": "x"},\n {"q": "y"}\n {"q": "z"}]', r"array\.json, line 3: Expecting ',' delimiter"),
    "lines.json": (GOOD + b"{", r"lines\.json, line 2: Expecting property name"),
    "latin.csv": (b"q,a\nx,1\ny,\xe9\n", r"latin\.csv, line 3: byte 0xe9 is not UTF-8"),
    "long.csv": (b"q,a\nx,1\ny,z,2\n", r"long\.csv, line 3: \['y', 'z', '2'\] must have one field for each of \['q',"),
    "short.csv": (b"q,a\nx,1\nand more\n", r"short\.csv, line 3: \['and more'\] must have one field"),
    "twice.csv": (b"q,q\nx,1\n", r"twice\.csv, line 2: .* each of \['q', 'q'\], all distinct"),
    "header.csv": (b"q,a\n", r"header\.csv: holds no rows"),
    "wide.csv": (b"q,a\nx," + b"y" * 200_000 + b"\n", r"wide\.csv: cannot be read as csv \(field larger than"),
    "text.parquet": (b"q,a\nx,1\n", r"text\.parquet: cannot be read as parquet \(.*\)\. Mend or remove it"),
    "rows.txt": (b"x\n", r"rows\.txt: is not a file ending in \.jsonl, \.json, \.parquet, \.csv\. Check the path"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    good = write(tmp_path / "good.jsonl", [{"q": "x"}])
    with pytest.raises(DataError, match="^" + str(tmp_path) + "/" + message):
        load_rows([good, str(tmp_path / name)], "", None)


def test_a_column_that_comes_late_is_named_with_its_line(tmp_path):
    """`datasets` fixes the columns with its first block of 10 MB."""
    path = write(tmp_path / "late.jsonl", [{"q": "x" * 1_000_000}] * 12 + [{"q": "y", "b": 2}])
    with pytest.raises(DataError, match=r"late\.jsonl, line 13: has columns \['b', 'q'\], the first line has \['q'\]"):
        load_rows(path, "", None)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: is not a file"):
        load_rows(str(tmp_path / "none.jsonl"), "", None)


@pytest.mark.parametrize(
    "other", [{"q": "x"}, {"q": "x", "a": "1", "b": "2"}, {"q": "x", "b": "1"}, {**ROWS[0], "a": 1}]
)
def test_files_with_other_columns_or_types_are_named(tmp_path, other):
    paths = [write(tmp_path / "1.jsonl", ROWS), write(tmp_path / "2.jsonl", [other])]
    with pytest.raises(DataError, match=r"2\.jsonl: has columns .*1\.jsonl has .* Names and types must be the same"):
        load_rows(paths, "", None)


# ---------------------------------------------------------------- tokens and labels


def test_completion_mask_token_by_token(tokenizer):
    data = tokenize(dataset({"q": "hi", "a": "xy"}), tokenizer, config(prompt="Q:{q}\n", completion="{a}!"))
    assert read(data.dataset[0], tokenizer) == (
        ["<s>", "Q", ":", "h", "i", "Ċ", "x", "y", "!", "</s>"],
        [".", ".", ".", ".", ".", ".", "x", "y", "!", "</s>"],
    )
    assert (data.dataset[0]["prompt_length"], data.dataset[0]["num_targets"]) == (6, 4)
    assert (len(data), data.num_rows, data.num_truncated, data.num_without_targets) == (1, 1, 0, 0)
    assert (data.num_tokens, data.num_targets) == (10, 4)
    assert data.dataset.column_names == ["input_ids", "labels", "prompt_length", "num_targets"]


def test_a_token_merged_across_the_border_is_learnt(tokenizer):
    """Generation sees 'A:' and ' ' (or 'xa'); it must learn ' b' and 'ab' from what remains of the prompt."""
    rows = dataset({"prompt": "A: ", "completion": "bc"}, {"prompt": "xa", "completion": "b"})
    assert read_all(tokenize(rows, tokenizer, config()), tokenizer) == [
        (["<s>", "A", ":", "Ġb", "c", "</s>"], [".", ".", ".", "Ġb", "c", "</s>"]),
        (["<s>", "x", "ab", "</s>"], [".", ".", "ab", "</s>"]),
    ]


def test_special_tokens_are_the_tokenizers_own(tokenizer):
    row = dataset({"prompt": "q", "completion": "r"})
    closing = build_tokenizer(single="<s> $A </s>")  # also closes a prompt, which is not part of what follows it
    assert read_all(tokenize(row, closing, config()), closing) == [(["<s>", "q", "r", "</s>"], [".", ".", "r", "</s>"])]
    bare = build_tokenizer(single=None, eos_token=None)
    assert read_all(tokenize(row, bare, config()), bare) == [(["q", "r"], [".", "r"])]
    written = dataset({"prompt": "q", "completion": "r</s>"})
    assert read_all(tokenize(written, tokenizer, config()), tokenizer) == [
        (["<s>", "q", "r", "</s>"], [".", ".", "r", "</s>"])
    ]


def test_an_empty_completion_learns_to_stop(tokenizer):
    data = tokenize(dataset({"prompt": "q", "completion": ""}), tokenizer, config())
    assert read_all(data, tokenizer) == [(["<s>", "q", "</s>"], [".", ".", "</s>"])]


def test_loss_on_all(tokenizer):
    data = tokenize(dataset({"prompt": "q", "completion": "r"}), tokenizer, config(loss_on="all"))
    assert read_all(data, tokenizer) == [(["<s>", "q", "r", "</s>"], ["<s>", "q", "r", "</s>"])]
    assert data.num_targets == 3, "the first token is predicted from nothing"
    assert data.dataset["prompt_length"][:] == [0]


def test_text(tokenizer):
    data = tokenize(dataset({"body": "xy", "id": 3}), tokenizer, config(format="text", text="body"))
    assert read_all(data, tokenizer) == [(["<s>", "x", "y", "</s>"], ["<s>", "x", "y", "</s>"])]
    assert (data.num_tokens, data.num_targets) == (4, 3)


def test_truncation_and_rows_without_targets_are_counted(tokenizer):
    rows = dataset(
        {"prompt": "qq", "completion": "r"},  # <s> q q r </s>: 5, uncut
        {"prompt": "qq", "completion": "rr"},  # 6: cut, keeps both r
        {"prompt": "qqqq", "completion": "r"},  # 7: cut, nothing of its completion is left
        {"prompt": "qqq", "completion": "rr"},  # 7: cut, keeps one r
    )
    data = tokenize(rows, tokenizer, config(max_length=5))
    assert read_all(data, tokenizer) == [
        (["<s>", "q", "q", "r", "</s>"], [".", ".", ".", "r", "</s>"]),
        (["<s>", "q", "q", "r", "r"], [".", ".", ".", "r", "r"]),
        (["<s>", "q", "q", "q", "r"], [".", ".", ".", ".", "r"]),
    ]
    assert data.dataset["num_targets"][:] == [2, 2, 1]
    assert data.dataset["prompt_length"][:] == [3, 3, 4]
    assert (len(data), data.num_rows, data.num_truncated, data.num_without_targets) == (3, 4, 3, 1)
    assert (data.num_tokens, data.num_targets) == (15, 5)
    message = r"data\.max_length = 3: cuts 4 of 4 rows, none has a token to learn\. Raise it"
    with pytest.raises(DataError, match=message):
        tokenize(rows, tokenizer, config(max_length=3))


def test_the_first_token_is_no_target():
    """With no bos and no prompt, a row of one token has a label but nothing that is predicted."""
    bare = build_tokenizer(single=None, eos_token=None)
    data = tokenize(dataset({"t": "x"}, {"t": "xy"}), bare, config(format="text", text="t"))
    assert (len(data), data.num_without_targets, data.num_targets) == (1, 1, 1)


# ---------------------------------------------------------------- chats


def turns(*contents):
    """user, assistant, user, assistant, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


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
    message = r"row 1 \(the first is 0\): the chat template rewrites earlier turns.* Set data\.loss_on: all"
    with pytest.raises(DataError, match=message):
        tokenize(rows, plain, config(format="chat"))
    data = tokenize(rows, plain, config(format="chat", loss_on="all"))
    assert "".join(read(data.dataset[1], plain)[1]) == "user:ĊqĊassistant:ĊxĊuser:ĊrĊassistant:Ċ(hm)yĊ"
    last_only = tokenize(rows.select([0]), plain, config(format="chat"))
    assert last_only.num_targets == 2


def test_a_key_of_other_messages_is_not_printed():
    """Arrow gives the first message a `thought` of None."""
    printing = build_tokenizer("{% for m in messages %}{{ m.thought }}{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "thought": "hm"}]
    data = tokenize(dataset({"messages": messages}), printing, config(format="chat"))
    assert "".join(read(data.dataset[0], printing)[0]) == "qhmx"


def test_a_tokenizer_without_chat_template_is_refused_before_anything_else():
    with pytest.raises(DataError, match=r"data\.format = chat: the tokenizer .* has no chat template.* Take the"):
        tokenize(dataset({"no": "messages"}), build_tokenizer(chat_template=None), config(format="chat"))


REFUSING = "{{ raise_exception('roles must alternate') }}"
BAD_ROWS = {
    "null": ({}, {"prompt": "q", "completion": None}, r"row 1 .*: columns \['completion'\] are null or missing"),
    "template": ({"prompt": "{prompt:d}"}, {"prompt": "q"}, r"row 1 .*: Unknown format code 'd' .* Mend one"),
    "string": ({"format": "chat"}, {"messages": "hello"}, r"row 1 .*: messages = 'hello': must be a list of {role"),
    "no turns": ({"format": "chat"}, {"messages": []}, r"row 1 .*: messages = \[\]: must be a list"),
    "first": ({"format": "chat"}, {"messages": turns("q", "x")[1:]}, r"row 1 .*: starts with an assistant turn"),
    "number": ({"format": "text"}, {"text": 5}, r"row 1 .*: text = 5: must be a string"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, tokenizer, name):
    settings, row, message = BAD_ROWS[name]
    good = {"prompt": 1, "completion": "r", "messages": turns("q", "x"), "text": "x"}
    if settings == {}:
        good["prompt"] = "q"
    rows = load_rows(write(tmp_path / "rows.jsonl", [good, good | row]), "", None)
    with pytest.raises(DataError, match=message):
        tokenize(rows, tokenizer, config(**settings))


def placed(path, suffix):
    """Two good rows, blank lines where the format has them, then a row without a completion; and its place."""
    path = path / f"rows{suffix}"
    good, bad = {"prompt": "q", "completion": "r"}, {"prompt": "q", "completion": None}
    if suffix == ".parquet":
        dataset(good, good, bad).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps([good, good, bad], indent=1), encoding="utf-8")
    else:
        lines = [json.dumps(row) for row in (good, good, bad)]
        path.write_text("\n".join(["", lines[0], "", " ", *lines[1:]]), encoding="utf-8")
    return str(path), f"{path}, {'line 6' if suffix == '.jsonl' else 'record 3'}"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_bad_row_is_named_by_its_place_in_its_file(tmp_path, tokenizer, suffix, before):
    path, place = placed(tmp_path, suffix)
    source = [write(tmp_path / f"{i}.jsonl", [{"prompt": "q", "completion": "r"}] * 3) for i in range(before)] + [path]
    rows = load_rows(source, "", None)
    message = f"{place}: columns ['completion'] are null or missing. Fill them, or take the row out."
    for call in (
        lambda: tokenize(rows, tokenizer, config(), source),
        lambda: load_eval_prompts(rows, tokenizer, config(), range(len(rows)), source),
    ):
        with pytest.raises(DataError) as caught:
            call()
        assert str(caught.value) == message


def test_place_of_every_row_of_several_files(tmp_path):
    paths = [str(tmp_path / name) for name in ("1.csv", "2.jsonl", "3.json", "4.json")]
    Path(paths[0]).write_text('q,a\none,1\n\n"two\nlines",2\n', encoding="utf-8")
    Path(paths[1]).write_text('\n{"q": "x", "a": "1"}\r\n\n\n{"q": "x", "a": "1"}', encoding="utf-8")
    Path(paths[2]).write_text('{"q": "x", "a": "1"}\n\n{"q": "x", "a": "1"}\n', encoding="utf-8")
    Path(paths[3]).write_text('\n[{"q": "x", "a": "1"},\n{"q": "x", "a": "1"}]', encoding="utf-8")
    places = ["record 1", "record 2", "line 2", "line 5", "line 1", "line 3", "record 1", "record 2"]
    expected = [f"{paths[i // 2]}, {place}" for i, place in enumerate(places)]
    assert len(load_rows(paths, "", None)) == len(places)
    assert [place_of(paths, row) for row in range(len(places))] == expected
    assert place_of(paths, 8) == f"{', '.join(paths)}, row 8 (the first is 0)"


def test_place_of_a_row_that_is_in_no_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert place_of("org/name", 3) == "org/name, row 3 (the first is 0)"
    Path(path).unlink()
    assert place_of(path, 1) == f"{path}, row 1 (the first is 0)", "an error must not hide another"


def test_samples_know_their_rows(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q" * n, "completion": "r"} for n in (9, 1, 9, 2, 9)])
    data = tokenize(load_rows(path, "", None), tokenizer, config(max_length=5), path)
    assert data.rows.tolist() == [1, 3]
    assert data.rows.dtype == "int64"
    assert [place_of(path, row) for row in data.rows] == [f"{path}, line 2", f"{path}, line 4"]


def test_a_template_that_refuses_a_chat_names_the_row():
    with pytest.raises(DataError, match=r"row 0 .*: roles must alternate: the template cannot"):
        tokenize(dataset({"messages": turns("q", "x")}), build_tokenizer(REFUSING), config(format="chat"))


@pytest.mark.parametrize(
    ("settings", "missing"),
    [({"prompt": "{query}{prompt}"}, "query"), ({"format": "chat"}, "messages"), ({"format": "text"}, "text")],
)
def test_missing_columns_are_named_with_those_there_are(tokenizer, settings, missing):
    message = rf"reads columns \['{missing}'\], the data has \['prompt', 'completion'\]\. Name its columns"
    with pytest.raises(DataError, match=message):
        tokenize(dataset({"prompt": "q", "completion": "r"}), tokenizer, config(**settings))


# ---------------------------------------------------------------- the cache, and processes


def cached_files(data):
    return [(file["filename"], os.stat(file["filename"]).st_mtime_ns) for file in data.dataset.cache_files]


OTHER_PROCESS = """
import sys
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[3]
from lora_one_dist.config import DataConfig
from lora_one_dist.data import load_rows, load_tokenizer, tokenize
data = tokenize(load_rows(sys.argv[1], "", 3), load_tokenizer(sys.argv[2], False), DataConfig(train=sys.argv[1]))
print(data.dataset.cache_files[0]["filename"], data.num_targets)
"""


def test_a_second_call_and_a_second_process_are_served_from_the_cache(tmp_path, tokenizer, cache, monkeypatch):
    rows = [{"prompt": f"q{i}", "completion": "r" * i} for i in range(5)]
    path = write(tmp_path / "rows.jsonl", rows)
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run(**settings):
        fresh = load_tokenizer(str(tmp_path / "tokenizer"), False)
        return tokenize(load_rows(path, "", 3), fresh, config(**settings))

    first = run()
    files = cached_files(first)
    assert str(cache) in files[0][0]
    again = run(eval="eval.jsonl", max_train_samples=3, loss_on="completion")  # none of which changes a token
    assert cached_files(again) == files
    assert (again.num_tokens, again.num_targets) == (first.num_tokens, first.num_targets) == (15, 6)
    assert cached_files(run(loss_on="all")) != files
    assert cached_files(run(max_length=4)) != files

    command = [sys.executable, "-c", OTHER_PROCESS, path, str(tmp_path / "tokenizer"), str(cache)]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == [files[0][0], "6"], result.stderr
    assert cached_files(run()) == files, "the other process wrote the file anew"
    monkeypatch.setattr("lora_one_dist.data.__file__", __file__)  # other code makes other tokens
    assert cached_files(run())[0][0] != files[0][0]


# ---------------------------------------------------------------- evaluation prompts


def test_eval_prompts_are_tokenised_alone_and_cut_from_the_left(tokenizer):
    rows = dataset({"q": "A: ", "a": "bc"}, {"q": "xxxxyz", "a": "A: b"})
    settings = config(prompt="{q}", completion="{a}.", max_length=4)
    prompts = load_eval_prompts(rows, tokenizer, settings, [1, 0])
    tokens = [(tokenizer.convert_ids_to_tokens(ids), reference) for ids, reference in prompts]
    assert tokens == [(["x", "x", "y", "z"], "A: b."), (["<s>", "A", ":", "Ġ"], "bc.")]


def test_an_eval_prompt_is_not_closed():
    closing = build_tokenizer(single="<s> $A </s>")
    rows = dataset({"prompt": "q", "completion": "r"}, {"prompt": "q</s>", "completion": "r"})
    prompts = load_eval_prompts(rows, closing, config(), range(2))
    assert [closing.convert_ids_to_tokens(ids) for ids, _ in prompts] == [["<s>", "q"], ["<s>", "q", "</s>"]]


def test_bad_eval_rows_are_named(tokenizer):
    with pytest.raises(DataError, match=r"reads columns \['prompt', 'completion'\]"):
        load_eval_prompts(dataset({"q": "x"}), tokenizer, config(), [0])
    rows = dataset({"prompt": "q", "completion": "r"}, {"prompt": "q", "completion": None})
    with pytest.raises(DataError, match=r"row 1 .* columns \['completion'\] are null"):
        load_eval_prompts(rows, tokenizer, config(), [0, 1])


# ---------------------------------------------------------------- order


def test_epoch_order_is_a_permutation_of_its_arguments_alone():
    torch.manual_seed(1)
    order = epoch_order(1000, seed=3, epoch=0).clone()
    epoch_order.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(order, epoch_order(1000, seed=3, epoch=0))
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(1000))
    others = [epoch_order(1000, 3, 1), epoch_order(1000, 4, 0), torch.arange(1000)]
    assert all((order == other).sum() < 20 for other in others), "1000 random positions agree in about one"
    assert epoch_order(8, 0, 0).tolist() == [5, 4, 7, 2, 3, 0, 6, 1], "old runs can no longer be resumed or repeated"


def test_global_batches_cover_each_epoch_exactly():
    assert [steps_per_epoch(n, 4) for n in (1, 4, 5, 10)] == [1, 1, 2, 3]
    batches = [global_batch(10, 4, step, seed=5) for step in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert [*chain(*batches[:3])] == epoch_order(10, 5, 0).tolist()
    assert [*chain(*batches[3:])] == epoch_order(10, 5, 1).tolist()
    assert global_batch(10, 4, 4, seed=5) == batches[4], "a resumed run asks for a later step first"
    assert global_batch(3, 8, 1, seed=0) == epoch_order(3, 0, 1).tolist()


def test_deal_by_hand():
    assert [deal(7, 2, 3, rank) for rank in range(3)] == [[[0, 1], [6]], [[2, 3], []], [[4, 5], []]]
    assert [deal(1, 4, 2, rank) for rank in range(2)] == [[[0]], [[]]]
    assert deal(0, 4, 2, 0) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_deal_gives_every_sample_once_and_every_rank_as_many(world_size):
    for num_samples in range(1, 23):
        for size in (1, 2, 3, 8):
            hands = [deal(num_samples, size, world_size, rank) for rank in range(world_size)]
            assert len({len(hand) for hand in hands}) == 1
            rounds = [hand[k] for k in range(len(hands[0])) for hand in hands]
            assert [*chain(*rounds)] == list(range(num_samples)), "the order of samples does not depend on the world"
            assert all(len(micro) in (0, size) for micro in rounds if micro[-1:] != [num_samples - 1])
            assert any(hands[0][-1:]), "no round in which all are idle"


# ---------------------------------------------------------------- batches and tokenizers


def test_collate_pads_on_the_right():
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "num_targets": 2}, {"input_ids": [8], "labels": [8]}]
    batch = collate(samples, pad_token_id=9)
    expected = {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())
    weightless = collate(samples, pad_token_id=9, weightless=True)
    assert weightless["labels"].tolist() == [[-100, -100]]
    assert weightless["input_ids"].tolist() == [[5, 6]], "two tokens: enough to join the collectives"
    assert weightless["attention_mask"].tolist() == [[1, 1]]


def test_collate_takes_rows_of_the_data(tokenizer):
    data = tokenize(dataset({"prompt": "q", "completion": "r"}), tokenizer, config())
    batch = collate([data.dataset[0], data.dataset[0]], tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"][0, :2].tolist() == [-100, -100]


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({}, "<pad>"),
        ({"pad_token": None}, "</s>"),
        ({"pad_token": None, "eos_token": None, "unk_token": "<|end|>"}, "<|end|>"),
    ],
)
def test_pad_token_of_a_loaded_tokenizer(tmp_path, tokens, pad):
    build_tokenizer(**tokens).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), False)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, SPECIAL.index(pad))


def test_a_tokenizer_that_cannot_pad_or_be_loaded_is_refused(tmp_path):
    build_tokenizer(pad_token=None, eos_token=None).save_pretrained(tmp_path / "no_pad")
    with pytest.raises(DataError, match=r"no_pad: has no pad, eos or unk token to pad with\. model\.path needs"):
        load_tokenizer(str(tmp_path / "no_pad"), False)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"model\.path = .*none: no tokenizer can be loaded: .*model\.path needs what"):
        load_tokenizer(str(tmp_path / "none"), False)
    build_tokenizer().save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(DataError, match=r"damaged: no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path / "damaged"), False)
