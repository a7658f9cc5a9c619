"""The base model and its adapters.

In: the ``model`` and ``lora`` groups of a config.  Out: a :class:`~lora_one_dist.sharding.Base` whose frozen weights
live where the ZeRO JSON says, the list of :class:`Target` layers, and, after :func:`inject_adapters`, PEFT's LoRA
modules as plain tensors outside ZeRO.  Everything that can be refused is refused on a model without values, before a
weight is read.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lora_one_dist import comm, sharding, weights
from lora_one_dist.config import DeepSpeedConfig, LoraConfig, ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOSS_BYTES = 64 * 2**20  # of logits in fp32 at one time
CAUSE_CHARACTERS = 300  # of others' errors that ours repeat
ADAPTER = "default"  # PEFT's name of the one adapter


class ModelError(ValueError):
    """A model or a target list that cannot be trained: value, rule, remedy."""


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter: dotted module name, out_features m, in_features n."""

    name: str
    m: int
    n: int


@dataclass(frozen=True)
class Plan:
    """What is known of a model before a weight is read."""

    folder: Path
    skeleton: Any
    """transformers model with parameters on the meta device."""
    targets: list[Target]
    sources: dict[str, weights.TensorSource] | None
    """Where each tensor's values lie, or None where names do not map one to one."""


def plan(folder: Path, config: ModelConfig, lora: LoraConfig, rank_needed: int) -> Plan:
    """Read config.json and the tensor names, and refuse what cannot work.  Reads no weights.  Not collective.

    Args:
        folder: from :func:`local_folder`.
        rank_needed: singular vectors that the initialisation takes from each target.

    Raises:
        ModelError: naming value, rule and remedy.
    """
    skeleton = build_skeleton(config, folder)
    targets = find_targets(skeleton, lora, rank_needed)
    files = weight_files(folder, config.allow_pickle)
    sources = None if files[0].suffix == ".bin" else tensor_sources(files, skeleton)
    if sources is None:
        _refuse_unfit(config, skeleton, files)
    return Plan(folder, skeleton, targets, sources)


def build_skeleton(config: ModelConfig, folder: Path) -> Any:
    """The model with parameters on the meta device.  Raises ModelError if config.json describes none to train."""
    _refuse_kind(config, folder)
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # each model checks its settings in its own way
        raise ModelError(
            f"model.path = {config.path}: its config.json is refused: {_cause(error)}. Fetch it again, or correct it."
        ) from error
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.path = {config.path}: is quantised; its weights have no exact gradient here and 8-bit ZeRO-3 is "
            "unproved. Give the unquantised model."
        )
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: initialising a tensor without elements
            skeleton = AutoModelForCausalLM.from_config(
                hf_config,
                dtype=DTYPES[config.dtype],
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    except Exception as error:
        raise ModelError(
            f"model.path = {config.path}: no model can be built from its config.json with attn_implementation "
            f"{config.attn_implementation}: {_cause(error)}. Correct the file, or take another attn_implementation."
        ) from error
    skeleton.tie_weights()  # init_empty_weights gives every registered name a tensor of its own
    return skeleton


def _refuse_kind(config: ModelConfig, folder: Path) -> None:
    """Raise ModelError if config.json is damaged, or names no causal language model that may be run here."""
    try:
        described = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(
            f"model.path = {config.path}: its config.json cannot be read: {error}. Fetch it again."
        ) from error
    kind, code = str(described.get("model_type")), described.get("auto_map")
    known = kind in CONFIG_MAPPING
    value = f"model.path = {config.path}: its model_type = {described.get('model_type')!r}"
    causal = known and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if isinstance(code, dict) and "AutoModelForCausalLM" in code and not causal:
        if not config.trust_remote_code:
            raise ModelError(
                f"{value} needs Python code that comes with it, which model.trust_remote_code = false does not run. "
                "Read the code, then set it to true; or take a model that transformers knows."
            )
        return
    if not known:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=1)
        hint = f"Did the file say {near[0]}? " if near else ""
        raise ModelError(f"{value} is none that transformers knows. {hint}Correct it, or update transformers.")
    rule = ""
    if not causal:
        rule = "has no causal language model in transformers"
    elif described.get("is_encoder_decoder", CONFIG_MAPPING[kind]().is_encoder_decoder):
        rule = "has an encoder and a decoder"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not described.get("is_decoder"):
        rule = "sees the tokens that it is to predict (its is_decoder is not set)"
    if rule:
        raise ModelError(f"{value} {rule}; what is trained here predicts the next token. Give a causal language model.")


def _cause(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:CAUSE_CHARACTERS].rstrip(".: ") or type(error).__name__


def local_folder(path: str, trust_remote_code: bool, allow_pickle: bool = False) -> Path:
    """The folder itself, or a hub name's snapshot, downloaded by the first rank of each host.  Collective."""
    if Path(path).is_dir():
        return Path(path)
    with comm.all_or_none("fetching the model"), comm.local_first():
        return _snapshot(path, trust_remote_code, allow_pickle)


def _snapshot(name: str, trust_remote_code: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if allow_pickle and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:  # all of the hub's are one or the other
        raise ModelError(
            f"model.path = {name}: is no folder here, and cannot be fetched from the hub: {_cause(error)}. Check the "
            "name, the network and your login, or give a folder."
        ) from error
    return folder


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one base from another: config.json, and names, shapes and a sample of its weights.  Not collective.

    The name of the transformers version that wrote the config is no part of it.
    """
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return {"config": digest, **weights.fingerprint(weight_files(folder, allow_pickle=True))}


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raise ModelError if the tokenizer can produce an id that the model has no embedding for.  Pure."""
    largest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ModelError(
            f"model.path: the tokenizer's largest id is {largest}, the model has {rows} embeddings. Use the tokenizer "
            "that the model was trained with."
        )


def find_targets(model: Any, lora: LoraConfig, rank_needed: int = 0) -> list[Target]:
    """The linear layers that ``target_modules`` names, in forward order of definition.  Pure.

    Raises:
        ModelError: for an ending that matches nothing (with the nearest), a layer that is no plain linear, a layer that
            shares its weight, or r above min(m, n).
    """
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    _refuse_experts(model)
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
    if lora.target_modules == "all-linear":
        if any(isinstance(module, Conv1D) for module in modules.values()):
            raise ModelError(
                "lora.target_modules = all-linear: the model has Conv1D layers (transposed weights), which are not "
                "supported. Use a model with plain linear layers."
            )
        names = [name for name in modules if name in linear and name != head]
    else:
        names = _match_endings(modules, lora.target_modules)
    targets = []
    owners: dict[int, str] = {}
    for name, module in modules.items():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            shared = owners.setdefault(id(module.weight), name)
            if shared != name and (name in names or shared in names):
                raise ModelError(
                    f"lora.target_modules: {name} shares its weight with {shared}; its gradient would be the sum of "
                    "both. Leave it out of target_modules."
                )
    for name in names:
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"lora.target_modules: {name} is a {type(layer).__name__}; only nn.Linear is supported. Leave it out."
            )
        targets.append(Target(name, layer.out_features, layer.in_features))
    if not targets:
        raise ModelError(f"lora.target_modules = {lora.target_modules}: no layer left to adapt. Name at least one.")
    narrowest = min(targets, key=lambda target: min(target.m, target.n))
    most = min(narrowest.m, narrowest.n)
    if lora.r > most:
        raise ModelError(f"lora.r = {lora.r}: must be at most min(m, n) = {most} of {narrowest.name}. Lower it.")
    if rank_needed > most:
        raise ModelError(
            f"lora.r = {lora.r}: this init.method takes {rank_needed} singular vectors, {narrowest.name} has {most}. "
            "Lower lora.r."
        )
    return targets


def _refuse_experts(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2 and "expert" in name:
            raise ModelError(
                f"model.path: {name} holds mixture-of-experts weights {tuple(parameter.shape)}; tokens reach experts "
                "unevenly, which the gradient phase does not support. Use a dense model."
            )
    for name, _ in model.named_modules():
        if name.endswith(".experts"):
            raise ModelError(
                f"model.path: {name} is a mixture of experts; tokens reach experts unevenly, which the gradient phase "
                "does not support. Use a dense model."
            )


def _match_endings(modules: dict[str, Any], endings: Sequence[str]) -> list[str]:
    """Names that equal an ending or end in '.ending': PEFT's rule.  Every ending must match."""
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
    problems = []
    for ending in endings:
        if not any(name == ending or name.endswith(f".{ending}") for name in modules if name):
            near = difflib.get_close_matches(ending, leaves, n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else f"Linear layers here: {', '.join(leaves)}."
            problems.append(f"{ending!r} matches no layer. {hint}")
    if problems:
        raise ModelError("lora.target_modules: " + " ".join(problems))
    return [name for name in modules if any(name == end or name.endswith(f".{end}") for end in endings)]


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files with the base's values: safetensors, or pytorch_model*.bin if there are none and they are allowed.

    Raises:
        ModelError: if there are none, only pickles that are not allowed, or an index names a missing file.
    """
    names = ["model.safetensors", "pytorch_model.bin"]
    there = [name for name in names if (folder / name).is_file() or (folder / f"{name}.index.json").is_file()]
    if there == names[1:] and not allow_pickle:
        raise ModelError(
            f"model.path = {folder}: its weights are in {there[0]} only, a pickle, which may run code when it is read. "
            "Convert it (save_pretrained writes safetensors), or set model.allow_pickle: true to read its tensors."
        )
    name = there[0] if there else names[0]
    index = folder / f"{name}.index.json"
    paths = _indexed(folder, index) if index.is_file() else [folder / name]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(
            f"model.path = {folder}: {', '.join(missing)} missing. Give a folder with all of its *.safetensors "
            "(save_pretrained writes them; other formats are not read, pytorch_model.bin with model.allow_pickle)."
        )
    return paths


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
        paths = sorted({folder / name for name in described["weight_map"].values()})
        described["metadata"]  # from_pretrained asks for it
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"model.path = {folder}: its {index.name} has no weight_map and metadata that can be read: "
            f"{_cause(error)}. Fetch it again."
        ) from error
    if not paths:
        raise ModelError(f"model.path = {folder}: the weight_map of its {index.name} is empty. Fetch it again.")
    return paths


def _refuse_unfit(config: ModelConfig, skeleton: Any, files: Sequence[Path]) -> None:
    """Raise ModelError if ``from_pretrained`` would find no values, or others than fit, for some tensor.

    It is asked itself, with tensors that have shapes and no values: it alone knows what it renames and fuses.
    """
    state: dict[str, torch.Tensor] = {}
    for path in files:
        state |= _shapes(path)
    shown, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _, report = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            device_map={"": "meta"},
            dtype=DTYPES[config.dtype],
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(shown)
        if bars:
            transformers_logging.enable_progress_bar()
    _refuse_missing(config, report)
    misfits = sorted(report["mismatched_keys"])
    if misfits:
        name, stored, wanted = misfits[0]
        raise ModelError(
            f"model.path = {config.path}: its files hold {len(misfits)} tensors of another shape, e.g. {name} "
            f"{tuple(stored)}, which config.json makes {tuple(wanted)}. Give weights and config.json of one model."
        )


def _refuse_missing(config: ModelConfig, report: Mapping[str, Any]) -> None:
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers fills them with random values and a warning
        raise ModelError(
            f"model.path = {config.path}: its files hold no values for {len(lacking)} tensors, e.g. {lacking[0]}. "
            "Give a complete checkpoint of the causal language model."
        )


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device.  Reads no values, and runs nothing that a pickle holds."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as reader:
            shapes = {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refers to {code[1]}, must hold nothing but tensors" if code else f"cannot be read ({_cause(error)})"
        raise ModelError(f"{path}: {what}. Fetch it again from whom you trust, better as safetensors.") from error
    if not (isinstance(held, dict) and all(isinstance(tensor, torch.Tensor) for tensor in held.values())):
        raise ModelError(f"{path}: holds no mapping of names to tensors. Convert it with save_pretrained.")
    return {name: tensor.to("meta") for name, tensor in held.items()}


def tensor_sources(files: Sequence[Path], model: Any) -> dict[str, weights.TensorSource] | None:
    """Find every parameter and persistent buffer in safetensors files, by headers alone; None if not one to one."""
    found: dict[str, weights.TensorSource] = {}
    for path in files:
        found |= weights.read_header(path)
    state = model.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    wanted = {}
    for names in names_of.values():
        present = next((name for name in names if name in found), "")
        source = found.get(present)
        if source is None or source.kind not in weights.BASE_DTYPES or source.shape != tuple(state[present].shape):
            return None
        wanted[present] = source
    known = set(state) | {name for name, _ in model.named_buffers()}
    extra = {name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")}
    return None if extra else wanted


def check_loadable(planned: Plan, shard_group: str) -> None:
    """Raise ModelError if the base cannot be sharded inside each host, as the config asks.  Pure."""
    if planned.sources is None and shard_group == "node":
        raise ModelError(
            "deepspeed.shard_group = node: needs tensors that can be read one by one, but the names or shapes in "
            f"{planned.folder} do not match the model's one to one (fused or renamed weights), and from_pretrained "
            "reads on global rank 0 only. Use shard_group: world, or save the model under its own names."
        )


def load(
    config: ModelConfig,
    deepspeed: DeepSpeedConfig,
    planned: Plan,
    micro_batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> sharding.Base:
    """Load the frozen base: by slices where names map one to one, else by ``from_pretrained``.  Collective.

    Args:
        progress: told how many tensors of how many are done.
    """
    ds_config = None
    if is_partitioned(deepspeed):
        sharding.start_deepspeed()
        ds_config = sharding.deepspeed_config(deepspeed.policy(), config.dtype, micro_batch_size)
    if planned.sources is not None:
        group = deepspeed.shard_group
        base = sharding.load_slices(planned.skeleton, planned.sources, comm.device(), ds_config, group, progress)
    else:
        base = sharding.load_pretrained(lambda: _from_pretrained(config, planned.folder, ds_config is None), ds_config)
    base.module.config.use_cache = False
    if config.gradient_checkpointing != "none":
        reentrant = config.gradient_checkpointing == "reentrant"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name does not exist in transformers 5.17
            base.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        last: Any
        for last in sharding.blocks(base.module)[-1:]:
            last.gradient_checkpointing = False  # backward begins with it: it would be computed again at once
        if not reentrant:
            _save_nothing_behind_the_last_input(base.module)
    base.module.enable_input_require_grads()  # every weight is frozen: the graph must start somewhere
    return base


class _FrozenProduct(torch.autograd.Function):
    """A frozen layer's ``X W^T + bias`` that saves no tensor: backward takes W (m, n) from the layer."""

    @staticmethod
    def forward(ctx: Any, layer_input: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(layer_input, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output[0] @ ctx.layer.weight, None


class _FrozenLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(input, self)


class _AdapterFirst(lora.Linear):
    """PEFT's LoRA layer with one plain adapter, whose branch comes before the frozen layer's product."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        A: Any
        A, B = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        change = B(A(self.lora_dropout[ADAPTER](x.to(A.weight.dtype)))) * self.scaling[ADAPTER]
        output = self.base_layer(x)
        return (output + change).to(output.dtype)


def _save_nothing_behind_the_last_input(model: nn.Module) -> None:
    """Let a recomputation end at the input of a block's last linear layer, whose own product nothing needs.

    Non-reentrant checkpointing ends it with the last tensor that the forward pass saved; autograd's own product would
    save the weight behind it.  In a Llama that is a quarter of the block's work.
    """
    for block in sharding.blocks(model):
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = _FrozenLinear


def is_partitioned(deepspeed: DeepSpeedConfig) -> bool:
    """Does ZeRO-3 partition or offload the base?  Not collective.

    Where no rank shares it with another, each holds it whole, without hooks around its layers: these and what they copy
    took a sixth of an initialisation.
    """
    if deepspeed.stage != 3:
        return False
    return comm.num_sharers(deepspeed.shard_group) > 1 or deepspeed.offloads


def loss_sum(model: Any, batch: Mapping[str, torch.Tensor], weight: float = 1.0) -> torch.Tensor:
    """``weight`` times the summed cross-entropy of a batch's target tokens, fp32 scalar (0 if it has none).

    Collective under stage 3.

    A sum, not transformers' mean: the caller divides by the targets of the whole global batch, so that the loss is
    the same however the batch is split into micro-batches and ranks.

    A batch with position_ids holds packed rows.  transformers keeps their documents apart if it is given no mask of
    the padding (which is a document of its own), and its flash attention only within a batch of one row.
    """
    device = comm.device()
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    if "position_ids" in batch:
        del inputs["attention_mask"]
        if str(model.config._attn_implementation).startswith("flash"):
            inputs = {name: values.view(1, -1) for name, values in inputs.items()}
    logits = model(**inputs, use_cache=False).logits
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten().to(device)
    return _CrossEntropySum.apply(logits.flatten(0, 1), labels, weight)


class _CrossEntropySum(torch.autograd.Function):
    """Cross-entropy of logits (T, V) at labels (T,), -100 for none, summed in fp32 and times a weight.

    The logits become their gradient, rounded once to their type.

    At a vocabulary of 128k the logits of 4096 tokens are 1 GB in bf16, and softmax with its gradient by autograd five
    times that.  Here a few rows at a time are in fp32, and each row gives way to its gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows_at_once = max(1, LOSS_BYTES // (4 * logits.shape[1]))
        for rows, wanted in zip(logits.split(rows_at_once), labels.split(rows_at_once), strict=True):
            is_target = wanted != -100
            index = wanted.clamp_min(0)[:, None]
            scores = rows.float()
            normalizer = scores.logsumexp(1, keepdim=True)
            losses = (normalizer - scores.gather(1, index)).squeeze(1)
            total += losses.masked_fill(~is_target, 0.0).sum()
            if ctx.needs_input_grad[0]:
                gradient = scores.sub_(normalizer).exp_()
                gradient.scatter_add_(1, index, torch.full_like(normalizer, -1.0))
                rows.copy_(gradient.mul_(weight).masked_fill_(~is_target[:, None], 0.0))
        ctx.save_for_backward(logits)
        return total * weight

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output[0]), None, None  # by 1, where the loss itself is differentiated


def _from_pretrained(config: ModelConfig, folder: Path, whole: bool) -> nn.Module:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[config.dtype],
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=weight_files(folder, config.allow_pickle)[0].suffix == ".safetensors",
        weights_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    _refuse_missing(config, report)
    return model.to(comm.device()) if whole else model


@contextlib.contextmanager
def first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects, while the block runs, the name of the first layer whose output is not finite: none or one."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    leaves = [(name, layer) for name, layer in model.named_modules() if not any(True for _ in layer.children())]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Train mode (gradient checkpointing needs it) with every dropout probability of the base at 0."""
    saved: list[tuple[Any, str, float]] = []
    for holder in (*model.modules(), getattr(model, "config", None)):  # some forwards read it from the config
        for key, value in vars(holder).items() if holder is not None else ():
            is_probability = "dropout" in key or (key == "p" and isinstance(holder, nn.Dropout))
            if is_probability and isinstance(value, float) and value > 0:
                saved.append((holder, key, value))
    was_training = model.training
    model.train()
    for holder, key, _ in saved:
        setattr(holder, key, 0.0)
    try:
        yield
    finally:
        model.train(was_training)
        for holder, key, value in saved:
            setattr(holder, key, value)


def peft_config(lora: LoraConfig, targets: Sequence[Target], base_path: str, **changes: Any) -> PeftLoraConfig:
    """PEFT's description of the adapters; all-linear becomes the list of module endings, as PEFT itself writes it."""
    endings = lora.target_modules
    if endings == "all-linear":
        endings = sorted({target.name.rpartition(".")[2] for target in targets})
    fields: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": endings,
        "bias": "none",
    }
    return PeftLoraConfig(**{**fields, **changes})


@dataclass(frozen=True)
class Adapter:
    """One target's pair, as PEFT's module holds it: ``A`` (r, n), ``B`` (m, r), and the frozen ``weight`` (m, n)."""

    target: Target
    A: nn.Parameter
    B: nn.Parameter
    weight: nn.Parameter


def inject_adapters(
    base: sharding.Base, config: PeftLoraConfig, targets: Sequence[Target], dtype: str
) -> list[Adapter]:
    """Put PEFT LoRA layers around the targets, outside ZeRO.  Not collective.  Returns them in target order."""
    inject_adapter_in_model(config, base.module)
    layers: dict[str, Any] = {n: module for n, module in base.module.named_modules() if isinstance(module, LoraLayer)}
    expected = {target.name for target in targets}
    if set(layers) != expected:
        raise ModelError(
            f"lora.target_modules: PEFT and the plan differ in {sorted(set(layers) ^ expected)[:3]}. Name the layers "
            "by longer endings."
        )
    adapters = []
    for target in targets:
        layer = layers[target.name]
        if isinstance(layer.base_layer, _FrozenLinear):
            layer.__class__ = _AdapterFirst
        A: Any = layer.lora_A[ADAPTER]
        B: Any = layer.lora_B[ADAPTER]
        for module in (A, B):
            module.to(device=comm.device(), dtype=DTYPES[dtype])
        adapters.append(Adapter(target, A.weight, B.weight, layer.base_layer.weight))
    return adapters
