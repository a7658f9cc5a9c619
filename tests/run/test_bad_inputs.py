"""A table of bad inputs, end to end: one message each with the value, the rule and the remedy, and no weight read.

Every row goes the way of a user's command: ``main()`` of launch/train.py, in this process, with its one rank.  What
reads a weight raises :class:`WeightWasRead`, and a test shows that a good input ends there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import BertConfig, DistilBertConfig, MixtralConfig, WhisperConfig

from lora_one_dist.base import loading
from lora_one_dist.cluster import comm
from tests import models
from tests.base.checkpoints import Malicious, changed, pickled

REPOSITORY = Path(__file__).resolve().parents[2]
READERS = [  # everything that reads values of the base
    "lora_one_dist.base.loading.load",
    "lora_one_dist.base.sharding.load_slices",
    "lora_one_dist.base.sharding._read_own",
    "lora_one_dist.base.sharding.load_pretrained",
    "lora_one_dist.disk.weights.fingerprint",
    "transformers.modeling_utils.safe_open",
]


class WeightWasRead(AssertionError):  # noqa: N818 (no error: what a good input comes to)
    """The run came as far as the weights."""


class Refused(Exception):  # noqa: N818 (as it should be)
    """In place of the end of the process: what ``comm.fail`` would print."""


def _command() -> Any:
    spec = importlib.util.spec_from_file_location("command", REPOSITORY / "launch" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    """This process as the one rank of a job, with a cache of `datasets` of its own."""
    import datasets

    before = dict(os.environ)
    comm.init()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    comm.shutdown()
    os.environ.clear()
    os.environ.update(before)


def guard(patch: pytest.MonkeyPatch, readers: list[str]) -> None:
    for name in readers:

        def raises(*_args: Any, _name: str = name, **_settings: Any) -> NoReturn:
            raise WeightWasRead(_name)

        patch.setattr(name, raises)


class Place:
    """A user's folder: a config that runs, next to the files that it names, all to be spoiled."""

    def __init__(self, root: Path, base: Path, patch: pytest.MonkeyPatch):
        self.root, self.base, self.patch = root, base, patch
        self.config: dict[str, Any] = {
            "model": {"path": "base", "dtype": "fp32"},
            "data": {"train": "train.jsonl", "max_length": 32},
            "lora": {"r": 4},
            "train": {"max_steps": 2, "global_batch_size": 4},
            "deepspeed": {"config": "stage0.json"},
            "output_dir": "run",
        }
        (root / "base").symlink_to(base)
        self.rows("train.jsonl", models.rows(20))
        self.json("stage0.json", {"zero_optimization": {"stage": 0}})
        (root / "run.yaml").write_text(yaml.safe_dump(self.config))

    def write(self, name: str, content: str | bytes) -> None:
        (self.root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def json(self, name: str, content: Any) -> None:
        self.write(name, json.dumps(content))

    def rows(self, name: str, rows: list[Any]) -> None:
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def copy(self, tensors: Callable | None = None, **config: Any) -> Path:
        """The model as one file, its tensors and its config.json changed; the run uses it from now on."""
        return self.use(changed(self.base, self.root, tensors, **config))

    def use(self, folder: Path) -> Path:
        (self.root / "base").unlink()
        shutil.move(folder, self.root / "base")
        return self.root / "base"

    def adapter(self, spoil: Callable[[dict, dict], Any] = lambda config, tensors: None) -> list[str]:
        """A PEFT folder for this run, spoiled; the override that names it."""
        planned = loading.plan(self.base, *_groups(), 0)
        described = {"peft_type": "LORA", "r": 4, "lora_alpha": 16.0, "use_rslora": True}
        tensors = {}
        for target in planned.targets:
            tensors[f"base_model.model.{target.name}.lora_A.weight"] = torch.zeros(4, target.n)
            tensors[f"base_model.model.{target.name}.lora_B.weight"] = torch.zeros(target.m, 4)
        spoil(described, tensors)
        (self.root / "adapter").mkdir()
        self.json("adapter/adapter_config.json", described)
        save_file(tensors, self.root / "adapter/adapter_model.safetensors")
        return ["init.adapter=adapter"]


def _groups() -> tuple[Any, Any]:
    from lora_one_dist.config.settings import LoraConfig, ModelConfig

    return ModelConfig(path="base", dtype="fp32"), LoraConfig(r=4)


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):
    folder = model_folder("llama").resolve()
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, folder, monkeypatch)


def attempt(patch: pytest.MonkeyPatch, overrides: list[str], launch: dict[str, str] | None, capture: Any) -> str:
    """What the command says, which must be a refusal in our own words."""

    def fail(error: BaseException) -> NoReturn:
        raise Refused(comm._headline(error)) from error

    command = _command()
    patch.setattr(sys, "argv", ["train.py", "--config", "run.yaml", *overrides])
    patch.setattr(comm, "fail", fail)
    patch.setattr(os, "_exit", lambda code: pytest.fail(f"the run ended with exit code {code}"))
    if launch is None:
        patch.setattr(comm, "init", lambda settings: None)  # this process is a rank already
    else:
        patch.setattr(comm, "_state", None)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        for name, value in launch.items():
            patch.setenv(name, value)
    try:
        code = command.main()
    except Refused as refused:
        raised = [refused.__cause__, refused.__cause__.__cause__]
        if isinstance(raised[1] or raised[0], WeightWasRead):
            raise (raised[1] or raised[0]) from None
        strangers = [e for e in raised if e is not None and not type(e).__module__.startswith("lora_one_dist")]
        assert strangers == [], "comm.fail would print a traceback"
        return str(refused)
    finally:
        if launch is not None and comm._state is not None:
            comm._state.watch.leave()
    assert code == command.EXIT_BAD_CONFIG
    return capture.readouterr().err


# The table: name, what is spoiled (overrides, or a function of the place), what the message must say, in order --------


def yaml_is(content: str | bytes) -> Callable[[Place], None]:
    return lambda place: place.write("run.yaml", content)


def zero_is(content: Any) -> Callable[[Place], None]:
    """The ZeRO JSON, as text or as what it holds."""
    return lambda p: p.write("stage0.json", content) if isinstance(content, str) else p.json("stage0.json", content)


def train_is(content: str | bytes, name: str = "train.jsonl", *overrides: str) -> Callable[[Place], list[str]]:
    return lambda place: [place.write(name, content), f"data.train={name}", *overrides][1:]


def rows_are(rows: list[Any], *overrides: str) -> Callable[[Place], list[str]]:
    return lambda place: [place.rows("train.jsonl", rows), *overrides][1:]


GOOD = {"prompt": "w3 w4", "completion": " w5 w6"}
ROW = json.dumps(GOOD) + "\n"
ASKED, ANSWERED = {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}
CHATS = ["data.format=chat"]
USES_CHATS = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


CONFIG = {
    "no such file": (lambda p: (p.root / "run.yaml").unlink(), ["run.yaml", "cannot be read", "Give a YAML file"]),
    "not YAML": (yaml_is("model: [1"), ["--config run.yaml", "cannot be read as YAML", "line 1", "Give a YAML file"]),
    "not UTF-8": (yaml_is(b"model: \xff"), ["--config run.yaml", "cannot be read as YAML", "Give a YAML file"]),
    "a tab": (yaml_is("model:\n\tpath: base"), ["--config run.yaml", "cannot be read as YAML", "line 2"]),
    "python object": (yaml_is("a: !!python/object:os.system {}"), ["cannot be read as YAML", "python/object"]),
    "empty": (yaml_is(""), ["--config run.yaml: holds NoneType", "must hold groups such as 'model:'", "Give"]),
    "nested too deep": (yaml_is("[" * 10_000), ["--config run.yaml", "cannot be read as YAML", "Give a YAML file"]),
    "override nested too deep": ([f"lora.r={'[' * 10_000}"], ["override 'lora.r=[", "is no YAML", "Quote it"]),
    "a list": (yaml_is("- model"), ["--config run.yaml: holds list", "must hold groups"]),
    "key twice": (yaml_is("model:\n  path: a\n  path: b"), ["'path' is given twice", "line 2", "Give a YAML file"]),
    "unhashable key": (yaml_is("{[1]: 2}"), ["--config run.yaml", "cannot be read as YAML"]),
    "number as key": (["lora.3=1"], ["lora.3 = 1: no such setting", "Known here: r, alpha"]),
    "unknown group": (["optm.lr=1"], ["optm = {'lr': 1}: no such setting", "Did you mean optim?"]),
    "unknown key": (["lora.alhpa=4"], ["lora.alhpa = 4: no such setting", "Did you mean alpha?"]),
    "no near key": (["train.zz=2"], ["train.zz = 2: no such setting", "Known here: epochs, max_steps"]),
    "group is a value": (["lora=8"], ["lora = 8", "Give a group of settings: r, alpha"]),
    "group is a list": (["optim=[1, 2]"], ["optim = [1, 2]", "Give a group of settings: name, lr"]),
    "required key": (yaml_is("train: {max_steps: 1}"), ["model: is required", "data: is required", "output_dir"]),
    "text for a number": (["lora.r=eight"], ["lora.r = 'eight'", "valid integer", "at least 1 and at most min"]),
    "fraction for a count": (["train.max_steps=1.5"], ["train.max_steps = 1.5", "valid integer", "Optimizer steps"]),
    "text for a switch": (
        ["lora.use_rslora=perhaps"],
        ["lora.use_rslora = 'perhaps'", "valid boolean", "alpha / sqrt"],
    ),
    "list for a path": (["model.path=[a]"], ["model.path = ['a']", "valid string", "Folder of an"]),
    "too small": (["lora.r=0"], ["lora.r = 0", "greater than or equal to 1", "at least 1"]),
    "open bound": (["lora.dropout=1"], ["lora.dropout = 1", "less than 1", "[0, 1)"]),
    "not finite": (["optim.lr=.nan"], ["optim.lr = nan", "finite number", "above 0"]),
    "infinite": (["lora.alpha=.inf"], ["lora.alpha = inf", "finite number", "Above 0"]),
    "one beta": (["optim.betas=[0.9]"], ["optim.betas = [0.9]: Field required", "each in [0, 1)"]),
    "beta of 1": (["optim.betas=[0.9, 1]"], ["optim.betas = 1", "should be less than 1", "each in [0, 1)"]),
    "not in the list": (["model.dtype=fp16"], ["model.dtype = 'fp16'", "'bf16' or 'fp32'", "Type of the base"]),
    "epochs and max_steps": (
        ["train.epochs=1", "train.max_steps=2"],
        ["train.epochs = 1.0", "exactly one must be given", "leave the other"],
    ),
    "neither": (["train.max_steps=null"], ["train.epochs = None", "exactly one must be given", "Give one"]),
    "batch below micro-batch": (
        ["train.micro_batch_size=8"],
        ["train.global_batch_size = 4", "at least train.micro_batch_size = 8", "Raise it"],
    ),
    "warm-up too long": (["optim.warmup_steps=2"], ["optim.warmup_steps = 2", "below train.max_steps = 2", "Lower it"]),
    "no effect": (["init.method=lora", "init.gamma=2"], ["init.gamma = 2.0", "has no effect with init.method lora"]),
    "adapter and method": (
        lambda p: [*p.adapter(), "init.method=pissa"],
        ["init.method = pissa", "has no effect with init.adapter", "Leave one of them out"],
    ),
    "answers without data": (
        ["train.exact_match_samples=4"],
        ["exact_match_samples = 4", "needs data.eval", "set it to 0"],
    ),
    "regular expression": (
        ["data.eval=train.jsonl", "train.exact_match_samples=4", "train.exact_match_pattern=(x"],
        ["train.exact_match_pattern = '(x'", "is no regular expression", "Correct it"],
    ),
    "template": (
        ["data.prompt='Q: {query'"],
        ["data.prompt = 'Q: {query'", "is not a template", "Write columns as {name}"],
    ),
    "template without columns": (["data.prompt=Q"], ["data.prompt = 'Q'", "must name columns as {name}"]),
    "flash attention in fp32": (
        ["model.attn_implementation=flash_attention_2"],
        ["attn_implementation = flash_attention_2", "needs dtype bf16", "Use sdpa"],
    ),
    "override without value": (["lora.r"], ["override 'lora.r'", "must be key=value", "e.g. lora.r=16"]),
    "override without key": (["=1"], ["override '=1'", "must be key=value", "e.g. lora.r=16"]),
    "override below a value": (["model.path.x=1"], ["override 'model.path.x=1'", "path holds 'base', not a group"]),
    "override not YAML": (["lora.r=[1"], ["override 'lora.r=[1'", "is no YAML", "Quote it"]),
    "no model folder": (["model.path=gone"], ["model.path = gone", "neither a folder nor a hub name", "Give a folder"]),
    "no data file": (["data.train=gone.jsonl"], ["data.train = gone.jsonl", "no such file", "Check the path"]),
    "data of another kind": (train_is("x", "rows.txt"), ["data.train = rows.txt: must end in .jsonl", "Convert it"]),
    "no data": (["data.train=[]"], ["data.train = []", "must name at least one file", "Add a path"]),
    "no adapter folder": (
        ["init.adapter=gone"],
        ["init.adapter = gone", "no adapter_config.json", "Give a PEFT folder"],
    ),
    "NUL in a path": (['model.path="a\\0b"'], ["model.path = a", "neither a folder nor a hub name"]),
    "a shell's variable in a path": (
        ["output_dir=$SCRATCH/run"],
        ["output_dir = '$SCRATCH/run': holds $SCRATCH, and only a shell knows such variables", "Write its value out"],
    ),
    "a home that is taken for one": (["data.train=~/gone.jsonl"], [f"data.train = {Path.home()}/gone.jsonl: no such"]),
    "path too long": ([f"model.path={'x' * 5000}"], ["model.path = xxx", "neither a folder nor a hub name"]),
}

ZERO = {
    "no such file": (["deepspeed.config=gone.json"], ["deepspeed.config = gone.json", "cannot be read", "ds_configs/"]),
    "a folder": (["deepspeed.config=base"], ["deepspeed.config = base", "cannot be read as JSON", "ds_configs/"]),
    "not JSON": (zero_is("{"), ["deepspeed.config = stage0.json", "cannot be read as JSON", "ds_configs/"]),
    "a list": (zero_is([]), ["deepspeed.config = stage0.json", "must be objects", "ds_configs/"]),
    "nested too deep": (zero_is("[" * 100_000), ["deepspeed.config = stage0.json", "cannot be read as JSON"]),
    "stage 2": (zero_is({"zero_optimization": {"stage": 2}}), ["stage = 2, must be 0 or 3", "0 takes the same memory"]),
    "stage is text": (zero_is({"zero_optimization": {"stage": "3"}}), ["stage = '3', must be 0 or 3"]),
    "stage is a list": (zero_is({"zero_optimization": {"stage": []}}), ["stage = [], must be 0 or 3"]),
    "precision": (zero_is({"bf16": {"enabled": True}}), ["sets 'bf16', which the run's YAML sets", "Take it out"]),
    "unknown key": (zero_is({"zero_optimisation": {}}), ["'zero_optimisation' has no effect here", "Take it out"]),
    "NVMe": (
        zero_is({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}),
        ["offload_param.device = nvme, must be none or cpu", "NVMe is not supported"],
    ),
    "optimizer offload": (
        zero_is({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
        ["zero_optimization.offload_optimizer has no effect on a frozen base", "Take it out"],
    ),
    "bucket is text": (
        zero_is({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "many"}}),
        ["zero_optimization.stage3_prefetch_bucket_size = 'many'", "must be"],
    ),
    "shard group": (["deepspeed.shard_group=node"], ["shard_group = node", "no effect at stage 0", "Leave it out"]),
}

OUTPUT = {
    "a file": (["output_dir=run.yaml"], ["output_dir = run.yaml", "is not a folder", "Give another"]),
    "below a file": (
        ["output_dir=run.yaml/run"],
        ["output_dir = run.yaml/run", "run.yaml is no folder to write to", "Give another"],
    ),
    "not writable": (["output_dir=/proc/none/run"], ["output_dir = /proc/none/run", "ive another"]),
    "holds something": (["output_dir=base"], ["output_dir = base", "is not empty", "Give another folder"]),
    # Checkpoints and resume: rows to come.
}

DATA = {
    "empty": (train_is(""), ["train.jsonl: holds no rows", "at least one", "Check how the file was written"]),
    "blank lines": (train_is("\n \n"), ["train.jsonl: holds no rows", "at least one"]),
    "not JSON": (
        train_is(ROW * 2 + "{bad\n" + ROW),
        ["train.jsonl, line 3", "cannot be read as json", "Mend or remove"],
    ),
    "cut off": (train_is(ROW * 3 + ROW[:20]), ["train.jsonl, line 4", "cannot be read as json", "Mend or remove"]),
    "not an object": (train_is(ROW + "[1]\n"), ["train.jsonl, line 2", "must be an object, is a list", "Mend"]),
    "null first": (train_is("null\n" + ROW * 9), ["train.jsonl, line 1: must be an object, is null", "Mend or remove"]),
    "null later": (train_is(ROW + "\n null\n"), ["train.jsonl, line 3: must be an object, is null", "Mend or remove"]),
    "a number alone": (train_is("5\n"), ["train.jsonl, line 1", "must be an object, is a int", "Mend"]),
    "not UTF-8": (train_is(ROW.encode() + b'{"prompt": "\xe9"}\n'), ["train.jsonl, line 2: byte 0xe9 is not UTF-8"]),
    "UTF-16": (
        train_is(ROW.encode("utf-16")),
        ["train.jsonl, line 1: byte 0xff is not UTF-8", "Save the file as UTF-8"],
    ),
    "nested too deep": (train_is(ROW + '{"prompt": ' + "[" * 100_000), ["train.jsonl, line 2", "Mend or remove"]),
    "key twice": (train_is('{"prompt": "a", "prompt": "b", "completion": "c"}\n' * 9), ["train.jsonl", "prompt"]),
    "missing column": (
        rows_are([{"question": "w3", "completion": "w4"}] * 9),
        ["reads columns ['prompt']", "train.jsonl has ['question', 'completion']", "Name its columns in data.prompt"],
    ),
    "missing in one row": (
        train_is(ROW * 3 + '\n{"prompt": "w3"}\n' + ROW * 9),
        ["train.jsonl, line 5: columns ['completion'] are null or missing", "Fill them, or take the row out"],
    ),
    "null": (rows_are([GOOD] * 4 + [GOOD | {"prompt": None}]), ["train.jsonl, line 5: columns ['prompt'] are null"]),
    "wrong type": (
        rows_are([{"text": "w3 w4"}, {"text": 5}], "data.format=text"),
        ["train.jsonl, line 2: text = 5: must be a string", "Mend the row"],
    ),
    "template cannot take it": (
        rows_are([GOOD, GOOD | {"prompt": "w3"}], "data.prompt='{prompt:d}'"),
        ["train.jsonl, line 1", "Unknown format code 'd'", "Mend one of them"],
    ),
    "rows without targets": (
        rows_are([GOOD | {"prompt": "w3 " * 40}] * 9),
        ["data.max_length = 32: cuts 9 of 9 rows, none has a token to learn", "Raise it"],
    ),
    "fewer than a batch": (
        rows_are([GOOD] * 9, "train.global_batch_size=10"),
        ["train.global_batch_size = 10: the training data has 9 samples", "Lower it or add data"],
    ),
    "fewer than init samples": (
        rows_are([GOOD] * 7),
        ["init.num_samples = 8: the training data has 7 samples", "Lower it or add data"],
    ),
    "warm-up longer than the epochs": (
        ["train.max_steps=null", "train.epochs=1", "optim.warmup_steps=5"],
        ["optim.warmup_steps = 5: the run has 5 steps", "Lower it"],
    ),
    "no step to prune in": (
        [
            *("train.max_steps=null", "train.epochs=1", "lora.kind=adalora", "lora.use_rslora=false"),
            *("init.method=lora", "lora.adalora_warmup_steps=2", "lora.adalora_final_steps=3"),
        ],
        ["lora.adalora_final_steps = 3: must leave steps between them, the run has 5 steps", "Lower them"],
    ),
    "chat without template": (
        rows_are([{"messages": [ASKED, ANSWERED]}] * 9, *CHATS),
        ["data.format = chat: the tokenizer", "has no chat template", "Take the instruction-tuned"],
    ),
    "chat that starts with an answer": (
        lambda p: with_chats(p, [[ASKED, ANSWERED], [ANSWERED, ASKED, ANSWERED]]),
        ["train.jsonl, line 2: starts with an assistant turn", "Drop it or set data.loss_on: all"],
    ),
    "chat without turns": (
        lambda p: with_chats(p, [[ASKED, ANSWERED], []]),
        ["train.jsonl, line 2: messages = []: must be a list of {role, content}", "Mend the row"],
    ),
    "chat is text": (lambda p: with_chats(p, ["hello"]), ["train.jsonl, line 1: messages = 'hello': must be a list"]),
    "chat without content": (
        lambda p: with_chats(p, [[{"role": "user"}, ANSWERED]]),
        ["train.jsonl, line 1", "must be a list of {role, content}", "Mend the row"],
    ),
    "CSV with a field too many": (
        train_is("prompt,completion\nw3,w4\nw3,w4,w5\n", "t.csv"),
        ["t.csv, line 3: ['w3', 'w4', 'w5'] must have one field for each of ['prompt', 'completion']", "Quote fields"],
    ),
    "CSV with an open quote": (
        train_is('prompt,completion\nw3,"w4\nw3,w4\n', "t.csv"),
        ["t.csv", "EOF inside string", "Mend"],
    ),
    "CSV with a column twice": (train_is("prompt,prompt\nw3,w4\n", "t.csv"), ["t.csv", "all distinct"]),
    "CSV without rows": (train_is("prompt,completion\n", "t.csv"), ["t.csv: holds no rows", "at least one"]),
    "CSV with an empty file": (train_is("", "t.csv"), ["t.csv: holds no rows", "at least one"]),
    "Parquet that is none": (train_is("PAR1", "t.parquet"), ["t.parquet: cannot be read as parquet", "Mend or remove"]),
    "JSON array cut off": (train_is(f"[{ROW},\n", "t.json"), ["t.json, line 3", "cannot be read as json", "Mend"]),
    "JSON array, bad record": (
        train_is(json.dumps([GOOD, GOOD | {"completion": None}], indent=1), "t.json"),
        ["t.json, record 2: columns ['completion'] are null", "Fill them"],
    ),
    "second file": (
        lambda p: [p.rows("b.jsonl", [GOOD, GOOD | {"prompt": None}]), "data.train=[train.jsonl, b.jsonl]"][1:],
        ["b.jsonl, line 2: columns ['prompt'] are null", "Fill them"],
    ),
    "files that differ": (
        lambda p: [p.rows("b.jsonl", [{"q": "x"}]), "data.train=[train.jsonl, b.jsonl]"][1:],
        ["b.jsonl, line 1", "columns ['prompt', 'completion'] are null or missing", "Fill them"],
    ),
    "evaluation row": (
        lambda p: [p.rows("eval.jsonl", [GOOD, GOOD | {"prompt": None}]), "data.eval=eval.jsonl"][1:],
        ["eval.jsonl, line 2: columns ['prompt'] are null", "Fill them"],
    ),
    "answer without the pattern": (
        ["data.eval=train.jsonl", "train.exact_match_samples=2", "train.exact_match_pattern=is (.*)"],
        ["train.exact_match_pattern = 'is (.*)'", "train.jsonl, line 1", "Correct the pattern"],
    ),
    "a cache that cannot be written to": (
        lambda p: p.patch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nope"),
        ["HF_DATASETS_CACHE = /proc/nope: cannot be written to on", "No such file", "Make room or set its permissions"],
    ),
    "unknown data set": (
        ["data.train=nobody/nothing"],
        ["nobody/nothing, split train: cannot be loaded", "Check name"],
    ),
}


def with_chats(place: Place, chats: list[Any]) -> list[str]:
    folder = place.use(shutil.copytree(place.base, place.root / "chatty"))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": USES_CHATS}))
    place.rows("train.jsonl", [{"messages": chat} for chat in chats])
    return CHATS


def without(pattern: str) -> Callable[[Place], None]:
    """A copy of the model that lacks some of its files."""

    def spoil(place: Place) -> None:
        for path in place.copy().glob(pattern):
            path.unlink()

    return spoil


def file_is(name: str, content: str | bytes) -> Callable[[Place], Any]:
    """A copy of the model with a file of this content."""
    return lambda place: (place.copy() / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def described(**config: Any) -> Callable[[Place], None]:
    """A copy of the model with other values in its config.json."""
    return lambda place: [place.copy(**config)][1:]


def replaced(**config: Any) -> Callable[[Place], Any]:
    """A copy of the model whose config.json holds nothing but this."""
    return file_is("config.json", json.dumps(config))


def tensors(change: Callable[[dict], Any]) -> Callable[[Place], None]:
    """A copy of the model with its tensors changed."""
    return lambda place: [place.copy(change)][1:]


def cut(bytes_left: int) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.copy() / "model.safetensors"
        path.write_bytes(path.read_bytes()[:bytes_left])

    return spoil


def header_is(header: Any, values: bytes = b"") -> Callable[[Place], Any]:
    text = json.dumps(header).encode()
    return file_is("model.safetensors", len(text).to_bytes(8, "little") + text + values)


def bin_only(place: Place) -> None:
    place.use(pickled(place.base, place.root))


def malicious(place: Place) -> list[str]:
    place.use(pickled(place.base, place.root, more=Malicious()))
    return ["model.allow_pickle=true"]


def with_bytes(held):
    """Tensors that cannot be read by slices."""
    return held | {"model.norm.weight": held["model.norm.weight"].to(torch.int8)}


def whole_in_hosts(place: Place) -> list[str]:
    place.copy(with_bytes)
    place.json("stage3.json", {"zero_optimization": {"stage": 3}})
    return ["deepspeed.config=stage3.json", "deepspeed.shard_group=node"]


def more_tokens(place: Place) -> None:
    tokenizer = models.tokenizer("llama")
    tokenizer.add_tokens([f"<{i}>" for i in range(models.VOCABULARY + 1)])  # fewer would be new ones, to be trained
    tokenizer.save_pretrained(place.copy())


def remote_tokenizer(place: Place) -> None:
    path = place.copy() / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    path.write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": auto_map}))


NORM = "model.norm.weight"
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
MODEL = {
    "no config.json": (without("config.json"), ["model.path = base: holds no config.json", "Give the folder that"]),
    "config.json cut off": (
        file_is("config.json", '{"model_'),
        ["base", "config.json cannot be read", "Fetch it again"],
    ),
    "config.json not UTF-8": (file_is("config.json", b"{\xff}"), ["base", "config.json cannot be read", "Fetch it"]),
    "config.json is a list": (file_is("config.json", "[1]"), ["base", "config.json cannot be read", "Fetch it again"]),
    "no model_type": (replaced(hidden_size=3), ["model.path = base: its model_type = None", "none that transformers"]),
    "unknown model_type": (
        described(model_type="lama"),
        ["model.path = base: its model_type = 'lama' is none that transformers knows", "Did the file say llama"],
    ),
    "setting of another type": (
        described(hidden_size="wide"),
        ["model.path = base", "config.json", "hidden_size", "wide", "correct"],
    ),
    "sizes that do not fit": (described(num_attention_heads=5), ["base: its config.json", "multiple", "correct it"]),
    "code of its own": (
        replaced(model_type="own", auto_map=AUTO_MAP),
        [
            "model_type = 'own' needs Python code",
            "model.trust_remote_code = false",
            "Read the code, then set it to true",
        ],
    ),
    "tokenizer with code of its own": (
        remote_tokenizer,
        ["model.path = base: its tokenizer is Python code", "model.trust_remote_code = false", "Read the code"],
    ),
    "encoder of sound": (
        replaced(**WhisperConfig().to_dict()),
        ["model_type = 'whisper' has an encoder that does not read text alone", "Give a causal language model"],
    ),
    "encoder alone": (
        replaced(**DistilBertConfig().to_dict()),
        ["model_type = 'distilbert' has no causal language model", "Give a causal"],
    ),
    "sees what it predicts": (
        replaced(**BertConfig(**TINY).to_dict()),
        ["model_type = 'bert' sees the tokens that it is to predict", "Give a model that predicts the next token"],
    ),
    "quantised": (
        described(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["model.path = base: is quantised", "no exact gradient", "Give the unquantised model"],
    ),
    "mixture of experts": (
        replaced(**MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4).to_dict()),
        ["holds mixture-of-experts weights", "does not support", "Use a dense model"],
    ),
    "no weights": (without("*.safetensors"), ["model.safetensors missing", "Give a folder with all of its"]),
    "pickle only": (bin_only, ["pytorch_model.bin only, a pickle", "Convert it", "or set model.allow_pickle: true"]),
    "malicious pickle": (
        malicious,
        ["pytorch_model.bin: refers to", "must hold nothing but tensors", "Fetch it again"],
    ),
    "cut in its length": (cut(4), ["model.safetensors", "etch it again"]),
    "cut in its header": (cut(100), ["model.safetensors: is no safetensors file", "Fetch it again"]),
    "cut in its values": (cut(-1), ["model.safetensors: has", "bytes, its header says", "Copy or fetch it again"]),
    "empty weights file": (cut(0), ["model.safetensors: is no safetensors file", "Fetch it again"]),
    "header without offsets": (header_is({NORM: {"dtype": "F32", "shape": [1]}}), ["is no safetensors file", "Fetch"]),
    "header without type": (header_is({NORM: {"shape": [1], "data_offsets": [0, 0]}}), ["is no safetensors file"]),
    "header with bad offsets": (header_is({NORM: {"dtype": "F32", "data_offsets": []}}), ["is no safetensors file"]),
    "shape of other size": (
        header_is({NORM: {"dtype": "F32", "shape": [32], "data_offsets": [0, 4]}}, bytes(4)),
        ["model.safetensors", NORM, "Fetch it again"],
    ),
    "header nested too deep": (
        file_is("model.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
        ["is no safetensors file", "Fetch it again"],
    ),
    "index names a missing file": (
        file_is("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}'),
        ["gone.safetensors missing", "Give a folder with all of its"],
    ),
    "index damaged": (file_is("model.safetensors.index.json", "{"), ["index.json has no weight_map", "Fetch it again"]),
    "index empty": (
        file_is("model.safetensors.index.json", '{"metadata": {}, "weight_map": {}}'),
        ["index.json is empty", "Fetch it again"],
    ),
    "tensor missing": (
        tensors(lambda held: {name: tensor for name, tensor in held.items() if name != NORM}),
        ["model.path = base", f"hold no values for 1 tensors, e.g. {NORM}", "Give a complete checkpoint"],
    ),
    "tensor of another shape": (
        tensors(lambda held: held | {NORM: torch.zeros(31)}),
        [f"1 tensors of another shape, e.g. {NORM} (31,)", "Give weights and config.json of one model"],
    ),
    "tensors under other names": (
        tensors(lambda held: {f"other.{i}": tensor for i, tensor in enumerate(held.values())}),
        ["hold no values for 39 tensors", "Give a complete checkpoint"],
    ),
    "tensors that cannot be sliced, sharded in hosts": (
        whole_in_hosts,
        ["deepspeed.shard_group = node: needs tensors that can be read by slices", "Use shard_group: world"],
    ),
    "tokenizer too large": (
        more_tokens,
        ["tokenizer's largest id is 128, the model has 64 embeddings", "Use the tokenizer that the model was trained"],
    ),
    "a token that is not new": (
        ['lora.new_tokens=["<x>", "w9"]'],
        ["lora.new_tokens = ['<x>', 'w9']: 'w9' is not new: the tokenizer has it already. Leave it out."],
    ),
    "a token named twice": (['lora.new_tokens=["<x>", "<x>"]'], ["'<x>' is not new: it is named twice. Leave it out."]),
    "a module that is no table": (
        ["lora.modules_to_save=[q_proj]"],
        ["lora.modules_to_save: q_proj is neither model.embed_tokens nor lm_head", "Correct it"],
    ),
    "a table with an adapter": (
        ["lora.modules_to_save=[lm_head]", "lora.target_modules=[lm_head, q_proj]"],
        ["lora.target_modules: lm_head has rows that are trained", "Leave one of them out"],
    ),
    "no tokenizer": (
        without("tokenizer*"),
        ["model.path = base: no tokenizer can be loaded", "save_pretrained writes"],
    ),
    "tokenizer damaged": (file_is("tokenizer.json", "{"), ["model.path = base: no tokenizer can be loaded"]),
    "r too large": (["lora.r=33"], ["lora.r = 33: must be at most min(m, n) = 32 of model.layers.0", "Lower it"]),
    "pattern of no layer": (
        ["lora.rank_pattern.q_porj=2"],
        ["lora.rank_pattern: 'q_porj' matches no layer", "Did you mean q_proj"],
    ),
    "exclusion of no layer": (
        ["lora.exclude_modules=[q_porj]"],
        ["lora.exclude_modules: 'q_porj' matches no layer", "Did you mean q_proj"],
    ),
    "r too large for the method": (
        ["lora.r=17", "init.method=lora_ga"],
        ["lora.r = 17: this init.method takes 34 singular vectors", "Lower lora.r"],
    ),
    "target nearly right": (["lora.target_modules=[q_porj]"], ["'q_porj' matches no layer", "Did you mean q_proj"]),
    "target that is no linear": (["lora.target_modules=[mlp]"], ["mlp is a LlamaMLP; only nn.Linear", "Leave it out"]),
    "no target": (
        ["lora.target_modules=[]"],
        ["lora.target_modules = []: no layer left to adapt", "Name at least one"],
    ),
    "tied target": (
        lambda p: [p.copy(tie_word_embeddings=True), "lora.target_modules=[lm_head]", "init.method=lora_ga"][1:],
        ["lm_head shares its weight with model.embed_tokens", "Leave it out"],
    ),
    "not on the hub": (["model.path=nobody/nothing"], ["model.path = nobody/nothing", "hub", "or give a folder"]),
}

ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
ABOVE = "above its original length of 6 LlamaForCausalLM turns the positions of a whole micro-batch by its longest"


def short_rope(*overrides: str) -> Callable[[Place], list[str]]:
    """A model whose positions turn above 6 tokens, and rows of 5 to 13 of them."""
    return lambda p: [p.copy(rope_parameters=ROPE, max_position_embeddings=6), *overrides][1:]


MODEL |= {
    "a sample above the rotary length": (
        short_rope(),
        ["data.max_length = 32: the longest training sample has 14 tokens", ABOVE, "Set data.max_length to 6 or less"],
    ),
    "a packed one": (
        short_rope("data.packing=true", "init.num_samples=2"),
        ["the longest training sample has 14", ABOVE],
    ),
    "an evaluation sample above the rotary length": (
        lambda p: [
            p.rows("train.jsonl", [{"prompt": "w3", "completion": " w4"}] * 9),
            p.rows("eval.jsonl", models.rows(9)),
            *short_rope("data.eval=eval.jsonl")(p),
        ][2:],
        ["the longest evaluation sample has", ABOVE, "Set data.max_length to 6 or less"],
    ),
    "answers above the rotary length": (
        lambda p: [
            p.rows("train.jsonl", [{"prompt": "w3", "completion": " w4"}] * 9),
            *short_rope("data.eval=train.jsonl", "train.exact_match_samples=2", "train.exact_match_max_new_tokens=5")(
                p
            ),
        ][1:],
        ["train.exact_match_max_new_tokens = 5: with its answer the longest prompt has 7", ABOVE, "Lower it"],
    ),
}

ADAPTER = {
    "another r": (lambda p: p.adapter(lambda c, t: c.update(r=8)), ["r is 8, the run's is 4", "Set lora.* to what"]),
    "another scale": (
        lambda p: p.adapter(lambda c, t: c.update(lora_alpha=1)),
        ["lora_alpha is 1, the run's is 16.0", "Set lora.* to what the adapter was made with"],
    ),
    "DoRA": (lambda p: p.adapter(lambda c, t: c.update(use_dora=True)), ["use_dora is True, which is not supported"]),
    "tensor missing": (
        lambda p: p.adapter(lambda c, t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")),
        ["init.adapter = adapter", "model.layers.0.mlp.up_proj.lora_B.weight is missing", "Set lora.*"],
    ),
    "tensor of another shape": (
        lambda p: p.adapter(lambda c, t: t.update({next(iter(t)): torch.zeros(3, 5)})),
        ["is (3, 5), must be (4, 32)", "Set lora.* to what"],
    ),
    "tensor of no target": (
        lambda p: p.adapter(lambda c, t: t.update(x=torch.zeros(1))),
        ["1 of its tensors belong to no target, e.g. x", "Set lora.* to what"],
    ),
    "start that changed the base": (
        lambda p: p.adapter(lambda c, t: c.update(init_lora_weights="pissa")),
        ["init.adapter = adapter: init_lora_weights is pissa", "Save it with path_initial_model_for_weight_conversion"],
    ),
    "config damaged": (
        lambda p: [p.adapter(), p.write("adapter/adapter_config.json", "{")][0],
        ["init.adapter = adapter: its adapter_config.json cannot be read", "Copy it again"],
    ),
    "no weights": (
        lambda p: [p.adapter(), (p.root / "adapter/adapter_model.safetensors").unlink()][0],
        ["init.adapter = adapter: holds no adapter_model.safetensors", "Save it as such"],
    ),
    "weights damaged": (
        lambda p: [p.adapter(), p.write("adapter/adapter_model.safetensors", b"x" * 99)][0],
        ["init.adapter = adapter: adapter_model.safetensors is damaged", "Copy it again"],
    ),
}

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
LAUNCH = {
    "half set": ({"RANK": "0", "WORLD_SIZE": "2"}, ["LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing", "Set all of"]),
    "rank outside": (
        ALONE | {"RANK": "1"},
        ["rank 1", "world size 1", "must be in [0, world size)", "Check the launch"],
    ),
    "negative rank": (ALONE | {"RANK": "-1"}, ["rank -1", "must be in [0, world size)", "Check the launch command"]),
    "not a number": (ALONE | {"WORLD_SIZE": "two"}, ["WORLD_SIZE = 'two': must be a whole number", "Unset it"]),
    "port out of range": (
        ALONE | {"MASTER_PORT": "99999"},
        ["MASTER_PORT = 99999", "from 1 to 65535", "Set both, or neither"],
    ),
    "no such host": (
        ALONE | {"MASTER_ADDR": "no.such.host.invalid"},
        ["MASTER_ADDR = no.such.host.invalid", "cannot resolve", "Add it to"],
    ),
    "empty host": (ALONE | {"MASTER_ADDR": ""}, ["MASTER_ADDR = ''", "must be a host", "Set both, or neither"]),
    "half set by SLURM": (
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
        ["SLURM_NTASKS, SLURM_LOCALID, SLURM_JOB_ID missing", "Start with srun"],
    ),
    "a shell of SLURM": (
        {
            **{"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
            **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"},
        },
        ["SLURM_STEP_NUM_TASKS = 1, SLURM_NTASKS = 4", "an interactive shell", "Start all of them by srun --ntasks 4"],
    ),
    "unknown accelerator": ({"DS_ACCELERATOR": "gpu"}, ["DS_ACCELERATOR = 'gpu': must be cuda or cpu", "Unset it"]),
    "accelerator that is not there": (
        {"DS_ACCELERATOR": "cuda"},
        ["DS_ACCELERATOR = cuda: torch sees no GPU here", "Unset it"],
    ),
}

TABLE = [
    pytest.param(spoil, None, parts, id=f"{kind}: {name}")
    for kind, table in (
        ("config", CONFIG),
        ("zero", ZERO),
        ("output", OUTPUT),
        ("data", DATA),
        ("model", MODEL),
        ("adapter", ADAPTER),
    )
    for name, (spoil, parts) in table.items()
] + [pytest.param([], launch, parts, id=f"launch: {name}") for name, (launch, parts) in LAUNCH.items()]


@pytest.mark.parametrize(("spoil", "launch", "parts"), TABLE)
def test_bad_input_is_refused_before_a_weight_is_read(spoil, launch, parts, place, rank, monkeypatch, capsys):
    guard(monkeypatch, READERS)
    overrides = spoil if isinstance(spoil, list) else spoil(place)
    message = attempt(monkeypatch, overrides if isinstance(overrides, list) else [], launch, capsys)
    assert re.search(".*".join(map(re.escape, parts)), message, re.DOTALL), message
    assert message.rstrip().endswith((".", "?")), "ends with the remedy"
    assert not (place.root / "run").exists(), "nothing of a run is left"


@pytest.mark.parametrize("reader", READERS)
def test_a_good_input_comes_to_the_weights(reader, place, rank, monkeypatch, capsys):
    """So that the guard of the table is one."""
    if reader in ("lora_one_dist.base.sharding.load_pretrained", "transformers.modeling_utils.safe_open"):
        place.copy(with_bytes)
    guard(monkeypatch, [reader])
    with pytest.raises(WeightWasRead, match=reader):
        attempt(monkeypatch, [], None, capsys)
