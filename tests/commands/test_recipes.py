"""Every recipe of launch/configs: read, planned as its comment says, and run over rows with the real data's columns."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lora_one_dist.base.skeleton import build_skeleton
from lora_one_dist.commands import plan, prepare_data
from lora_one_dist.commands import sweep as sweep_command
from lora_one_dist.config.reading import load_config
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.samples import load_eval_prompts, tokenize
from lora_one_dist.data.tokenizer import load_tokenizer
from lora_one_dist.train import evaluate
from tests import tool
from tests.data.helpers import build_tokenizer

CONFIGS = sorted(Path("launch/configs").glob("*.yaml"))
FIXTURES = Path("tests/fixtures/recipes")
SOURCES = {  # rows with the columns of the data set of that name
    "meta-math/MetaMathQA": "metamath.jsonl",
    "openai/gsm8k": "gsm8k",
    "nyu-mll/glue": "glue",
    "m-a-p/CodeFeedback-Filtered-Instruction": "code_feedback.jsonl",
    "yahma/alpaca-cleaned": "alpaca.json",
    "HuggingFaceH4/ultrachat_200k": "ultrachat.jsonl",
}
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# As Qwen3's: an answer's empty thoughts are written only behind the last question.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '</s>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PARAMETERS = {  # of the models' safetensors, as their cards show them: 7.62 B, 14.8 B, 32.8 B, 8.19 B, 14.8 B, 32.8 B
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of `datasets` of this module's own, and no network."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """One token a character, nearly; saved as a model's folder has it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(chat_template=CHAT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def commonsense(tmp_path_factory):
    """As many rows as a split needs that holds out 120."""
    rows = json.loads((FIXTURES / "commonsense.json").read_text())
    path = tmp_path_factory.mktemp("commonsense") / "commonsense_170k.json"
    path.write_text(
        json.dumps([row | {"instruction": f"{i}. {row['instruction']}"} for i in range(43) for row in rows])
    )
    return path


@pytest.fixture(scope="module")
def prepare(tmp_path_factory, tokenizer_folder, commonsense):
    """Runs a command of a recipe's comment on the fixtures, once; returns the folder it made."""
    root, made = tmp_path_factory.mktemp("prepared"), {}

    def run(line: str) -> Path:
        words = shlex.split(line.removeprefix("python tools/prepare_data.py "))
        where = words[words.index("--tokenizer") + 1] if "--tokenizer" in words else ""
        out = root / where / words[words.index("--out") + 1]
        if line not in made:
            source = words[words.index("--source") + 1]
            words[words.index("--source") + 1] = str(FIXTURES / SOURCES[source] if source in SOURCES else commonsense)
            words[words.index("--out") + 1] = str(out)
            if "--tokenizer" in words:
                words[words.index("--tokenizer") + 1] = str(tokenizer_folder)
            elif words[0] in ("metamath", "metamath_full", "code_feedback"):
                words += ["--tokenizer", str(tokenizer_folder)]
            made[line] = tool.run("prepare_data", *words)
        return out

    return run


def comment(path: Path) -> dict[str, list[str]]:
    """The lines 'Key: text' of the YAML's comment, by key; a line that starts with more blanks continues the last."""
    found: dict[str, list[str]] = {}
    last = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = re.match(r"# (Data|Launch|Plan|Predicted|Sweep)[^:]*: (.*)", line)
        if match:
            last = found.setdefault(match[1], [])
            last.append(match[2])
        elif line.startswith("#   ") and last:
            last[-1] = last[-1].removesuffix("\\") + line[4:].strip()
        else:
            last = None
    return found


def rows_of(path: Path, prepare) -> tuple[list[str], dict[str, str]]:
    """Overrides that put the fixtures in the place of the recipe's data, and the files by key."""
    prepared = {}
    for line in comment(path).get("Data", []):
        if line.startswith("python"):
            folder = prepare(line)
            prepared[shlex.split(line)[shlex.split(line).index("--out") + 1]] = folder
    given = re.findall(r"^  (train|eval): (\S+)$", path.read_text(encoding="utf-8"), re.M)
    places = {}
    for key, place in given:
        if place.startswith("launch/"):
            places[key] = place
        elif place in SOURCES:
            places[key] = str(FIXTURES / SOURCES[place])
        else:  # the fixtures end before the rows that are held out
            folder, name = prepared[str(Path(place).parent)], Path(place).name
            places[key] = str(folder / (name if (folder / name).exists() else "train.jsonl"))
    overrides = [f"data.{key}={place}" for key, place in places.items()]
    if given and given[0][1] in SOURCES:
        overrides += ["data.train_split=train", "data.eval_split=test"]
    return overrides, places


# Plans ----------------------------------------------------------------------------------------------------------------


PLANNED = ("demo", "llama2_7b_metamath", "llama3_3_70b_chat", "t5_base_mnli_lora_ga")  # in make test
SOME = [pytest.param(path, marks=[] if path.stem in PLANNED else pytest.mark.full) for path in CONFIGS]


@pytest.mark.parametrize("path", SOME, ids=lambda path: path.stem)
def test_the_comment_says_how_to_launch_and_what_the_plan_predicts(path):
    said = comment(path)
    assert f"launch/train.py --config {path}" in said["Launch"][0]
    words = shlex.split(said["Plan"][0].removeprefix("python tools/plan.py "))
    assert words[:2] == ["--config", str(path)]
    done = tool.run("plan", *words)
    assert done.stdout.rstrip().endswith("every phase fits")
    if "qwen" in path.stem:
        targets, layers = re.search(r", (\d+) target layers$.*^of (\d+) blocks ", done.stdout, re.M | re.S).groups()
        assert int(targets) == 7 * int(layers)
    memory = re.findall(r"^  (\w+)\s+([\d.]+)  ", done.stdout.split("\n\n")[1], re.M)
    predicted = ", ".join(f"{phase} {peak}" for phase, peak in memory)
    assert said["Predicted"] == [f"{predicted}."]
    if path.stem not in ("demo", "llama3_3_70b_chat"):  # one host cannot sweep the 70B
        sweep = shlex.split(said["Sweep"][0].removeprefix("python tools/sweep.py "))
        assert sweep_command.parse(sweep).config == path
        assert sweep_command.expand(sweep_command.parse(sweep).settings, [{}]), "a grid"
    row = next(line for line in Path("launch/configs/README.md").read_text().splitlines() if f"[{path.stem}]" in line)
    given = re.findall(r"^  (train|eval): ", path.read_text(encoding="utf-8"), re.M)
    settings = load_config(path, [f"data.{key}=planned/elsewhere" for key in given])
    peaks = " / ".join(f"{float(peak):.1f}" for _, peak in memory)
    assert row.endswith(f"| {peaks} |") or f"| {peaks} |" in row
    assert f"| {settings.lora.r} | {settings.optim.lr:g} |" in row


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_of_the_qwens(name):
    model = plan.settings_of(None, f"tools/shapes/{name}", []).model
    skeleton = build_skeleton(model, Path(model.path))
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == PARAMETERS[name]


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_learns_the_answers_alone(path, prepare):
    overrides, places = rows_of(path, prepare)
    limits = ["data.max_length=4096", "data.max_train_samples=40"]  # the fixtures' tokens are characters
    limits += ["data.max_eval_samples=40"] if "eval" in places else []
    config = load_config(path, overrides + limits)
    tokenizer = build_tokenizer(chat_template=QWEN3 if "qwen3" in path.stem else CHAT)
    for key in places:
        source = getattr(config.data, key)
        rows = load_rows(source, "train", 40)
        tokens = tokenize(rows, tokenizer, config.data, source)
        assert len(tokens) == len(rows)
        assert tokens.num_truncated == 0
        for row, sample in zip(rows, tokens.dataset, strict=True):
            learnt = tokenizer.decode([label for label in sample["labels"] if label != -100])
            assert learnt == expected(row, config.data, path.stem)
            assert set(sample["labels"][: sample["prompt_length"]]) == {-100}
            assert sample["prompt_length"] > 1


def expected(row: dict, config, name: str) -> str:
    """The text of the targets."""
    if config.format == "chat":
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        thoughts = "<think>\n\n</think>\n\n" if "qwen3" in name else ""
        return "".join(f"{thoughts}{answer}</s>\n" for answer in answers)
    return config.completion.format(**row) + "</s>"


def test_longer_chats_are_refused_by_a_template_like_qwen3s():
    config = load_config(
        "launch/configs/qwen3_8b_chat.yaml",
        [f"data.{key}={FIXTURES / 'ultrachat.jsonl'}" for key in ("train", "eval")],
    )
    rows = load_rows(config.data.train, "train", None)
    with pytest.raises(DataError, match=r"ultrachat.jsonl, line 1: the chat template rewrites earlier turns"):
        tokenize(rows, build_tokenizer(chat_template=QWEN3), config.data, config.data.train)


# Exact match ----------------------------------------------------------------------------------------------------------

GSM_ANSWERS = {
    "5 + 7 = 12 pens.\n#### 12": "12",
    "#### 1,234": "1234",
    "#### 1,234,567": "1234567",
    "#### -2": "-2",
    "####15": "15",
    "2 of 3 are left.\nThe answer is: 42": "42",
    "So the answer is 42.": "42",
    "#### 8\nThe answer is: 7": "7",
    "The answer is: $5.50 a day": "5.50",
    "no number of note: 3": "",
}
CHOICES = {
    "the correct answer is true": "true",
    "the correct answer is solution2": "solution2",
    "the correct answer is ending4": "ending4",
    "I do not know": "",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_exact_match_finds_the_answers_of_the_evaluation_data(path, prepare):
    overrides, _ = rows_of(path, prepare)
    config = load_config(path, overrides)
    pattern = config.train.exact_match_pattern
    if not config.train.exact_match_samples:
        assert pattern is None
        return
    rows = load_rows(config.data.eval, "test", None)
    tokenizer = build_tokenizer()
    prompts = load_eval_prompts(rows, tokenizer, config.data, range(len(rows)), config.data.eval)
    evaluate.refuse_unmatched(pattern, prompts, range(len(rows)), config.data.eval)
    if pattern is not None and path.stem != "demo":
        known = CHOICES if "commonsense" in path.stem else GSM_ANSWERS
        assert {text: evaluate._answer(text, pattern) for text in known} == known
    if "gsm8k" in config.data.eval:
        assert [evaluate._answer(text, pattern) for _, text in prompts] == ["1234", "-2"]


# tools/prepare_data.py ------------------------------------------------------------------------------------------------

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def run(name: str, source: object, out: Path, *arguments: object, check: bool = True) -> tool.Done:
    return tool.run("prepare_data", name, "--source", source, "--out", out, *arguments, check=check)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metamath_keeps_short_gsm_rows_in_order(tmp_path, tokenizer_folder):
    done = run("metamath", FIXTURES / "metamath.jsonl", tmp_path / "m", "--tokenizer", tokenizer_folder)
    rows = read(tmp_path / "m/train.jsonl")
    assert rows[0] == {
        "prompt": "Q: Ana has 5 pens and buys 7. How many has she?\nA: ",
        "completion": " She has 5 + 7 = 12 pens.\n#### 12",
    }
    assert [row["completion"][-5:] for row in rows] == ["## 12", "### 7", "1,234"]
    assert "dropped 1: type without GSM" in done.stdout
    assert "dropped 1: 512 tokens or more" in done.stdout
    assert "5 rows read" in done.stdout
    assert not (tmp_path / "m/eval.jsonl").exists(), "as the papers: evaluation rows come after the first 100,000"
    run("metamath_full", FIXTURES / "metamath.jsonl", tmp_path / "full", "--tokenizer", tokenizer_folder)
    assert [row["completion"] for row in read(tmp_path / "full/train.jsonl")][1] == " $2^3 = \\boxed{8}$."
    assert len(read(tmp_path / "full/train.jsonl")) == 4


def test_rows_after_the_training_rows_are_held_out(tmp_path, tokenizer_folder, monkeypatch):
    recipe = prepare_data.RECIPES["metamath"]
    small = type(recipe)(**{**vars(recipe), "train": 2, "held_out": 1})
    monkeypatch.setitem(prepare_data.RECIPES, "metamath", small)
    lines = (FIXTURES / "metamath.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, *lines]) + "\n")
    tokenizer = load_tokenizer(str(tokenizer_folder), False)
    found = prepare_data.prepare("metamath", str(tmp_path / "rows.jsonl"), "completion", 0, tokenizer)
    ends = {part: [row["completion"][-5:] for row in rows] for part, rows in found.parts.items()}
    assert ends == {"train": ["## 12", "### 7"], "eval": ["1,234"]}
    assert found.read == 10 == 3 + sum(found.dropped.values()), "every row is kept or counted"


def test_code_feedback_keeps_the_answer_up_to_its_first_code_block(tmp_path, tokenizer_folder):
    arguments = ("code_feedback", FIXTURES / "code_feedback.jsonl")
    done = run(*arguments, tmp_path / "c", "--tokenizer", tokenizer_folder)
    rows = read(tmp_path / "c/train.jsonl")
    assert rows[0] == {
        "prompt": INTRODUCTION + "### Instruction:\nWrite a function that doubles a number.\n\n### Response:\n",
        "completion": " Here it is:\n\n```python\ndef double(x):\n    return 2 * x\n```",
    }
    assert [row["completion"] for row in rows][1:] == [" ```sh\ndate\n```"]
    assert "dropped 1: no code block" in done.stdout
    assert "dropped 1: 1024 tokens or more" in done.stdout
    run(*arguments, tmp_path / "chat", "--tokenizer", tokenizer_folder, "--format", "chat")
    assert read(tmp_path / "chat/train.jsonl")[1]["messages"] == [
        {"role": "user", "content": "Show the date in a shell."},
        {"role": "assistant", "content": "```sh\ndate\n```"},
    ]


def test_commonsense_is_split_by_its_seed(tmp_path, commonsense):
    import datasets

    run("commonsense", commonsense, tmp_path / "a")
    run("commonsense", commonsense, tmp_path / "b", "--seed", 42)
    run("commonsense", commonsense, tmp_path / "c", "--seed", 1)
    sums = [(tmp_path / name / "SHA256SUMS").read_text() for name in "abc"]
    assert sums[0] == sums[1] != sums[2]
    train, held = (read(tmp_path / f"a/{part}.jsonl") for part in ("train", "eval"))
    rows = datasets.Dataset.from_list(json.loads(commonsense.read_text()))
    theirs = rows.train_test_split(test_size=120, shuffle=True, seed=42)["test"]
    assert [row["prompt"] for row in held] == [
        f"{INTRODUCTION}### Instruction:\n{text}\n\n### Response:\n" for text in theirs["instruction"]
    ]
    assert len(train) + len(held) == len(rows)
    assert held[0]["completion"].startswith(" the correct answer is ")


def test_alpaca_has_a_template_for_rows_with_an_input(tmp_path):
    run("alpaca", FIXTURES / "alpaca.json", tmp_path / "a", "--limit", 2)
    assert read(tmp_path / "a/train.jsonl") == [
        {"prompt": INTRODUCTION + "### Instruction:\nName a colour.\n\n### Response:\n", "completion": " Red."},
        {
            "prompt": "### Instruction:\nTranslate to French.\n\n### Input:\nthe cat\n\n### Response:\n",
            "completion": " le chat",
        },
    ]


def test_gsm8k_answers_lose_notes_and_commas(tmp_path):
    done = run("gsm8k", FIXTURES / "gsm8k", tmp_path / "g")
    assert read(tmp_path / "g/train.jsonl")[1]["completion"] == " There are 10 * 120 = 1,200 eggs.\n#### 1200"
    assert read(tmp_path / "g/eval.jsonl")[0] == {
        "prompt": "Q: Sam saves 617 dollars twice. How much is that?\nA: ",
        "completion": " He saves 2 * 617 = $1234.\n#### 1234",
    }
    assert done.stdout.count("  eval.jsonl\n") + done.stdout.count("  train.jsonl\n") == 2, "the hashes are printed"


def test_the_same_command_writes_the_same_bytes_once(tmp_path):
    first, second = (run("gsm8k", FIXTURES / "gsm8k", tmp_path / name) for name in "ab")
    assert first.stdout.splitlines()[-2:] == second.stdout.splitlines()[-2:]
    done = run("gsm8k", FIXTURES / "gsm8k", tmp_path / "a", check=False)
    assert done.returncode == 1
    assert "is there already, and is not overwritten" in done.stderr


@pytest.mark.parametrize(
    ("name", "source", "arguments", "said"),
    [
        (
            "metamath",
            "alpaca.json",
            [],
            "metamath needs ['query', 'response', 'type']; missing: ['query', 'response', ",
        ),
        ("alpaca", "gsm8k/train.jsonl", [], "alpaca needs ['instruction', 'input', 'output']; missing: ['instruction'"),
        ("alpaca", "nowhere.json", [], "is not a file ending in"),
        (
            "gsm8k",
            "gsm8k/train.jsonl",
            [],
            "is one file, gsm8k has a split to train on and one to test. Give the folder",
        ),
        ("commonsense", "commonsense.json", [], "3 rows, must be more than the 120 that are held out"),
        ("alpaca", "alpaca.json", ["--seed", 7], "--seed 7: has no effect on alpaca. Leave it out."),
        ("alpaca", "alpaca.json", ["--tokenizer", "t"], "--tokenizer t: has no effect on alpaca. Leave it out."),
        ("metamath", "metamath.jsonl", ["--tokenizer", "no/where"], "no tokenizer can be loaded"),
    ],
)
def test_what_is_refused(name, source, arguments, said, tmp_path, tokenizer_folder):
    if name == "metamath" and not arguments:
        arguments = ["--tokenizer", tokenizer_folder]
    done = run(name, FIXTURES / source, tmp_path / "out", *arguments, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_value_that_is_no_text_is_refused_with_its_line(tmp_path):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("alpaca", tmp_path / "rows.jsonl", tmp_path / "out", check=False)
    assert done.returncode == 1
    assert f"{tmp_path}/rows.jsonl, line 2: input = None, must be text. Mend the row" in done.stderr


def test_a_source_with_nothing_left_is_refused(tmp_path, tokenizer_folder):
    row = {"query": "q", "response": "r", "type": "MATH_FOBAR"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = run("metamath", tmp_path / "rows.jsonl", tmp_path / "out", "--tokenizer", tokenizer_folder, check=False)
    assert done.returncode == 1
    assert "1 rows, none of which is left for train.jsonl: dropped {'type without GSM': 1}" in done.stderr
    assert not (tmp_path / "out").exists()
