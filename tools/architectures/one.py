"""A step of the matrix for one model type, in a process of its own, or on a rank: see :mod:`matrix`.

Writes FOLDER/STEP.json: figures, or the reason why there are none.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.towers import auto_class
from tools.architectures import tiny
from tools.bench import harness

LARGEST = 30_000_000  # parameters
ROWS, STEPS, SAMPLES, LENGTH = 24, 2, 6, tiny.WORDS
SPELLING = ["<|endoftext|>", "\u0120", "w", *"0123456789"]  # of the words, for types whose tokenizer splits into bytes


def build(folder: Path) -> dict[str, Any]:
    """A base and its data."""
    kind = folder.name
    torch.manual_seed(0)
    try:
        config = tiny.tiny_config(kind)
        built = _class_of(kind)
        if built is None:
            return {"reason": "has no language model"}
        model = built.from_config(config, dtype=torch.float32)
        _fill_zeros(model)
    except Exception as error:
        whose = "" if _default_builds(kind) else "nor does transformers build its default: "
        return {"reason": f"{whose}{_line(error)}"}
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


def _class_of(kind: str) -> Any:
    """Of checkpoints of the type: the whole model, where it has parts beside its language model."""
    return auto_class(kind, [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)])


def _default_builds(kind: str) -> bool:
    """Whether transformers makes a model, without values, of the type's own default config."""
    try:
        with torch.device("meta"):
            _class_of(kind).from_config(CONFIG_MAPPING[kind]())
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
        refused = isinstance(error.__cause__, ModelError) and not out.exists()
        reason = _line(error.__cause__ or error).replace(f"{folder}/", "")
        return {"step": f"train{ranks}", "reason": reason, "late": not refused}
    torch.save(tapped, folder / f"gradients{ranks}.{comm.rank()}.pt")
    log = (out / "log.txt").read_text(encoding="utf-8") if (out / "log.txt").is_file() else ""
    return {"road": "from_pretrained" if "from_pretrained" in log else "slices"}


def compare(folder: Path) -> dict[str, Any]:
    """Gradients and losses of the runs against one process of transformers and PEFT.

    gradientN is the largest error at N ranks of a target's gradient against float64, relative; autogradN that of plain
    autograd in fp32, of the same target.  Of types whose code does not run in float64, plain autograd is the truth.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    described = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    built = auto_class(folder.name, described.get("architectures"))
    model, exact = (built.from_pretrained(folder / "base", dtype=d).eval() for d in (torch.float32, torch.float64))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "eval")}
    plain = _gradients(model, tokenizer, _init_rows(rows["train"]))
    try:
        truth = _gradients(exact, tokenizer, _init_rows(rows["train"]))
    except RuntimeError:
        truth = plain
    found: dict[str, Any] = {}
    for ranks in (1, 2):
        lines = [json.loads(line) for line in (folder / f"run{ranks}" / "metrics.jsonl").open()]
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        found[f"before{ranks}"] = abs(_loss(model, tokenizer, rows["eval"]) / losses[0] - 1)
        parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"gradients{ranks}.*.pt"))]
        taken = {name: G for part in parts for name, G in part.items()}
        errors = [(_error(G, truth[name]), _error(plain[name], truth[name])) for name, G in taken.items()]
        found[f"gradient{ranks}"], found[f"autograd{ranks}"] = max(errors)
        adapted = PeftModel.from_pretrained(model, folder / f"run{ranks}" / "adapter").eval()
        found[f"peft{ranks}"] = abs(_loss(adapted, tokenizer, rows["eval"]) / losses[-1] - 1)
        model = adapted.unload()
    return found


def _init_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    from lora_one_dist.config.settings import TrainConfig
    from lora_one_dist.data import batches

    return [rows[i] for i in batches.global_batch(len(rows), SAMPLES, 0, TrainConfig().seed)]


def _targets(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (t, V) of a row's targets (t,), and these."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    if model.config.is_encoder_decoder:
        answer = torch.tensor(tokenizer(text_target=row["completion"] + tokenizer.eos_token)["input_ids"])
        return model(input_ids=torch.tensor([prompt]), labels=answer[None], use_cache=False).logits[0], answer
    ids = torch.tensor([*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id])
    return model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1], ids[len(prompt) :]


def _sums(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[Any, int]:
    """The summed loss and the number of targets."""
    total: Any = 0.0
    count = 0
    for row in rows:
        logits, answer = _targets(model, tokenizer, row)
        total = total + torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
        count += len(answer)
    return total, count


def _loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    with torch.no_grad():
        total, count = _sums(model, tokenizer, rows)
    return float(total) / count


def _error(G: torch.Tensor, R: torch.Tensor) -> float:
    return float((G - R).norm() / R.norm())


def _gradients(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Of the mean loss, (m, n) in float64 by layer, of weights that layers share for each by itself."""
    from transformers.pytorch_utils import Conv1D

    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear | Conv1D)}
    for layer in layers.values():
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    model.requires_grad_(True)
    total, count = _sums(model, tokenizer, rows)
    (total / count).backward()
    found = {}
    for name, layer in layers.items():
        if layer.weight.grad is not None:
            G = layer.weight.grad.double()
            found[name] = G.T if isinstance(layer, Conv1D) else G  # which holds (n, m)
    model.zero_grad()
    return found


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
