"""Rows of every format, and the place of one that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import load_rows, place_of, placing
from tests.data.helpers import turns, typed, write

ROWS = [{"q": "one", "a": "1"}, {"q": 'two, "quoted"\nand more', "a": "007"}, {"q": "drei \u00fc", "a": "NA"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write(path, ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        typed(*ROWS).to_parquet(path)
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


def test_csv_fields_may_be_long(tmp_path):
    (tmp_path / "wide.csv").write_bytes(b"q,a\nx," + b"y" * 200_000 + b"\n")
    assert load_rows(str(tmp_path / "wide.csv"), "", None).to_list() == [{"q": "x", "a": "y" * 200_000}]


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
    "cut.jsonl": (GOOD + b'\n{"q": \n' + GOOD, r"cut\.jsonl, line 3: Expecting value: cannot be read as json.*Mend"),
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
    "text.parquet": (b"q,a\nx,1\n", r"text\.parquet: cannot be read as parquet \(.*\)\. Mend or remove it"),
    "rows.txt": (b"x\n", r"rows\.txt: is not a file ending in \.jsonl, \.json, \.parquet, \.csv\. Check the path"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    good = write(tmp_path / "good.jsonl", [{"q": "x"}])
    paths = [good, str(tmp_path / name)]
    with pytest.raises(DataError, match="^" + str(tmp_path) + "/" + message), placing(paths):
        load_rows(paths, "", None).to_list()


def test_rows_of_json_may_have_other_columns_than_the_first(tmp_path):
    late = [{"q": "x" * 1_000_000}] * 12 + [{"q": "y", "b": 2}]  # beyond the first block of any reader
    assert load_rows(write(tmp_path / "late.jsonl", late), "", None).to_list() == late


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: is not a file"):
        load_rows(str(tmp_path / "none.jsonl"), "", None)


def test_files_may_have_other_columns_and_types(tmp_path):
    others = [{"q": "x"}, {"q": "x", "a": "1", "b": "2"}, {**ROWS[0], "a": 1}]
    paths = [write(tmp_path / "1.jsonl", ROWS), write(tmp_path / "2.jsonl", others), str(tmp_path / "3.parquet")]
    typed({"a": 0.5}).to_parquet(paths[2])
    assert load_rows(paths, "", None).to_list() == [*ROWS, *others, {"a": 0.5}]


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
