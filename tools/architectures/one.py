"""A step of the matrix for one model type, in a process of its own, or on a rank: see :mod:`matrix`.

Writes FOLDER/STEP.json: figures, or the reason why there are none.
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.towers import auto_class
from tools.architectures import tiny
from tools.bench import harness

LARGEST = 30_000_000  # parameters
WITHIN = 1e-5  # of the gradient's norm, and of losses: fp32 in another order of summation
ROWS, STEPS, SAMPLES, LENGTH = 24, 2, 6, tiny.WORDS
SPELLING = ["<|endoftext|>", "\u0120", "w", *"0123456789"]  # of the words, for types whose tokenizer splits into bytes


def build(folder: Path) -> dict[str, Any]:
    """A base and its data."""
    kind = folder.name
    torch.manual_seed(0)
    try:
        config = tiny.tiny_config(kind)
        built = auto_class(kind, None)
        if built is None:
            return {"reason": "has no language model"}
        model = built.from_config(config, dtype=torch.float32)
        _fill_zeros(model)
    except Exception as error:
        return {
            "reason": _line(error)
            if _default_builds(kind)
            else f"nor does transformers build its default: {_line(error)}"
        }
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        return {"reason": f"{size} parameters after shrinking"}
    try:
        model.save_pretrained(folder / "base")
        missing = type(model).from_pretrained(folder / "base", output_loading_info=True)[1]["missing_keys"]
    except Exception as error:
        return {"reason": f"cannot be saved and read again: {_line(error)}"}
    if missing:
        return {"reason": f"transformers' loader misses {len(missing)} tensors of what it saved, e.g. {min(missing)}"}
    harness.save_tokenizer(folder / "base", tiny.WORDS, SPELLING)
    draw = random.Random(0)
    for name in ("train", "eval"):
        rows = []
        for _ in range(ROWS):
            said = [f"w{draw.randrange(20, tiny.WORDS)}" for _ in range(draw.randint(4, 12))]
            rows.append(json.dumps({"prompt": " ".join(said), "completion": " " + " ".join(reversed(said))}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return {"parameters": size}


def _default_builds(kind: str) -> bool:
    """Whether transformers makes a model, without values, of the type's own default config."""
    try:
        with torch.device("meta"):
            auto_class(kind, None).from_config(CONFIG_MAPPING[kind]())
    except Exception:
        return False
    return True


def _fill_zeros(model: torch.nn.Module) -> None:
    """Draw the parameters that begin as zeros, as training would: some keep others' gradients at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def train(folder: Path, ranks: int) -> dict[str, Any]:
    """A run of two steps, with the gradients that its initialisation took beside it.  On each rank."""
    from lora_one_dist.cluster import comm
    from lora_one_dist.config.reading import parse_config
    from lora_one_dist.initialise import pairs
    from lora_one_dist.run import story

    out = folder / f"run{ranks}"
    raw = {
        "model": {"path": str(folder / "base"), "dtype": "fp32"},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": LENGTH},
        "lora": {"r": 4, "alpha": 8},
        "init": {"num_samples": SAMPLES, "halves": False},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": STEPS, "micro_batch_size": 1, "global_batch_size": SAMPLES},
        "deepspeed": {"config": "ds_configs/zero3.json"},
        "output_dir": str(out),
    }
    (folder / f"run{ranks}.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    tapped: dict[str, torch.Tensor] = {}
    full_gradient = pairs.full_gradient

    def tap(*args: Any, **kwargs: Any) -> Any:
        owned, loss = full_gradient(*args, **kwargs)
        tapped.update({name: G.detach().cpu().clone() for name, G in owned.items()})
        return owned, loss

    pairs.full_gradient = tap
    comm.init()
    try:
        story.run(parse_config(raw))
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        late = not isinstance(cause, ModelError) and "ModelError" not in str(error) and "model.path" not in str(error)
        return {"step": f"train{ranks}", "reason": _line(error), "late": late}
    torch.save(tapped, folder / f"gradients{ranks}.{comm.rank()}.pt")
    log = (out / "log.txt").read_text(encoding="utf-8") if (out / "log.txt").is_file() else ""
    return {"road": "from_pretrained" if "from_pretrained" in log else "slices"}


def compare(folder: Path) -> dict[str, Any]:
    """Gradients and losses of the runs against one process of transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    described = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    built = auto_class(folder.name, described.get("architectures"))
    model = built.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "eval")}
    found: dict[str, Any] = {}
    for ranks in (1, 2):
        lines = [json.loads(line) for line in (folder / f"run{ranks}" / "metrics.jsonl").open()]
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        found[f"before{ranks}"] = abs(_loss(model, tokenizer, rows["eval"]) / losses[0] - 1)
        parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"gradients{ranks}.*.pt"))]
        taken = {name: G for part in parts for name, G in part.items()}
        truth = _gradients(model, tokenizer, _init_rows(rows["train"]), taken)
        errors = {name: _error(G, truth[name]) for name, G in taken.items()}
        found[f"gradient{ranks}"] = max(errors.values())
        if rough := [name for name, error in errors.items() if error > WITHIN]:
            exact = _gradients(copy.deepcopy(model).double(), tokenizer, _init_rows(rows["train"]), rough)
            found["rounding"] = min(_error(truth[name], exact[name]) for name in rough)
        adapted = PeftModel.from_pretrained(model, folder / f"run{ranks}" / "adapter").eval()
        found[f"peft{ranks}"] = abs(_loss(adapted, tokenizer, rows["eval"]) / losses[-1] - 1)
        model = adapted.unload()
    return found


def _error(G: torch.Tensor, R: torch.Tensor) -> float:
    return float((G.double() - R.double()).norm() / R.double().norm())


def _init_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    from lora_one_dist.config.settings import TrainConfig
    from lora_one_dist.data import batches

    return [rows[i] for i in batches.global_batch(len(rows), SAMPLES, 0, TrainConfig().seed)]


def _sample(tokenizer: Any, row: dict[str, str]) -> tuple[torch.Tensor, int]:
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
    return torch.tensor([ids]), len(prompt)


def _sums(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[Any, int]:
    """The summed loss and the number of targets."""
    total: Any = 0.0
    count = 0
    for row in rows:
        ids, start = _sample(tokenizer, row)
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum")
        count += ids.shape[1] - start
    return total, count


def _loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    with torch.no_grad():
        total, count = _sums(model, tokenizer, rows)
    return float(total) / count


def _gradients(model: Any, tokenizer: Any, rows: list[dict[str, str]], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Of the mean loss, (m, n), by the names of layers."""
    from transformers.pytorch_utils import Conv1D

    model.requires_grad_(True)
    total, count = _sums(model, tokenizer, rows)
    (total / count).backward()
    layers = {name: model.get_submodule(name) for name in names}
    found = {name: layer.weight.grad.clone() for name, layer in layers.items()}
    model.zero_grad()
    return {name: G.T if isinstance(layers[name], Conv1D) else G for name, G in found.items()}  # Conv1D holds (n, m)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main(folder: Path, step: str, launch: dict[str, str]) -> None:
    """In a new process: what it prints goes to FOLDER/STEP.RANK.log."""
    os.environ |= launch
    log = os.open(folder / f"{step}.{launch['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if step.startswith("train"):
        told = train(folder, int(launch["WORLD_SIZE"]))
    else:
        told = build(folder) if step == "build" else compare(folder)
    if told.get("reason") or launch["RANK"] == "0":
        (folder / f"{step}.json").write_text(json.dumps({"step": step, **told}), encoding="utf-8")
