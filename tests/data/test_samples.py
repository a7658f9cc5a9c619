"""Rows to tokens: every mask and count against one written out by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import load_rows, place_of
from lora_one_dist.data.samples import load_eval_prompts, tokenize
from lora_one_dist.data.tokenizer import load_tokenizer
from tests.data.helpers import build_tokenizer, config, dataset, read, read_all, turns, typed, write

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


# ---------------------------------------------------------------- rows that do not fit


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
        typed(good, good, bad).to_parquet(path)
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


def test_samples_know_their_rows(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q" * n, "completion": "r"} for n in (9, 1, 9, 2, 9)])
    data = tokenize(load_rows(path, "", None), tokenizer, config(max_length=5), path)
    assert data.rows.tolist() == [1, 3]
    assert data.rows.dtype == "int64"
    assert [place_of(path, row) for row in data.rows] == [f"{path}, line 2", f"{path}, line 4"]


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
from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.samples import tokenize
from lora_one_dist.data.tokenizer import load_tokenizer
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
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == [files[0][0], "6"], result.stderr
    assert cached_files(run()) == files, "the other process wrote the file anew"
    monkeypatch.setattr("lora_one_dist.data.store.CODE", tmp_path)  # other code makes other tokens
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
