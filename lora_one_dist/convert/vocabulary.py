"""Input and output embeddings in a merge: whether they stay one tensor, and how many rows they have.

In: the tensors of a base, its config.json, an adapter.  Out: tensors and config.json in which each embedding that the
adapter tells apart has a tensor of its own, and ``vocab_size`` is what the adapter's embeddings have.  Reads no values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_one_dist.adapters import peft_settings
from lora_one_dist.adapters.peft_format import Adapter
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, read_json

Shards = dict[str, dict[str, LazyTensor]]


def untie(shards: Shards, config: dict[str, Any], adapter: Adapter, notes: list[str]) -> tuple[Shards, dict[str, Any]]:
    """Give input and output embeddings a tensor each, if they share one and the adapter tells them apart.

    Where the adapter changes both alike, it then holds the change under every name that the base has for the tensor.
    """
    held = {name: file for file, tensors in shards.items() for name in tensors}
    touched = adapter.weights.keys() | adapter.replaced.keys() | adapter.rows.keys()
    found = [name for name in (*held, *sorted(touched - held.keys())) if _is_embedding(name)]
    head = next((name for name in found if _is_head(name)), "lm_head.weight")
    embedding = next((name for name in found if name in held and not _is_head(name)), None)
    tied = embedding is not None and (head not in held or config.get("tie_word_embeddings") is True)
    if not tied or embedding is None or not {embedding, head} & touched:
        return shards, config
    if _stay_one(embedding, head, adapter):
        for changes in (adapter.replaced, adapter.rows):
            _change_alike(changes, embedding, head, head in held)
        notes.append(f"{embedding} and {head} stay one tensor")
        return shards, config
    notes.append(f"{embedding} and {head} shared a tensor; as the adapter tells them apart, each has its own now")
    file = held[embedding]
    shards = {name: dict(tensors) for name, tensors in shards.items()}
    shards[held.get(head, file)].pop(head, None)
    shards[file][head] = shards[file][embedding]
    return shards, {**config, "tie_word_embeddings": False}


def _is_embedding(name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and peft_settings.is_embedding(module)


def _is_head(name: str) -> bool:
    return peft_settings.is_head(name.removesuffix(".weight"))


def _stay_one(embedding: str, head: str, adapter: Adapter) -> bool:
    """Did PEFT train the two as one, or not at all?"""
    pair, config = {embedding, head}, adapter.config
    if config.get("ensure_weight_tying"):
        if pair & adapter.weights.keys():
            raise ConversionError(
                f"{adapter.where}: ensure_weight_tying with LoRA on a tied embedding is not supported. "
                f"{peft_settings.pefts_way(config)}"
            )
        return True
    trained_whole = any(peft_settings.saved_whole(config, name.removesuffix(".weight")) for name in pair)
    if trained_whole or pair & adapter.weights.keys():
        return False
    rows = [adapter.rows[name].tokens for name in (embedding, head) if name in adapter.rows]
    return not rows or (embedding in adapter.rows and all(tokens == rows[0] for tokens in rows))


def _change_alike(changes: dict[str, Any], embedding: str, head: str, stored_twice: bool) -> None:
    """One change for both names of a shared tensor, or for the only one that the base has."""
    change = changes.get(embedding, changes.pop(head, None))
    changes.pop(head, None)
    if change is not None:
        changes |= {embedding: change, **({head: change} if stored_twice else {})}


def resize(base: str, shards: Shards, config: dict[str, Any], adapter: Adapter, notes: list[str]) -> dict[str, Any]:
    """config.json with the number of rows that the adapter's embeddings have.

    Raises:
        ConversionError: if the adapter resized one embedding and leaves another as it was.
    """
    held = {name: tensor.shape for tensors in shards.values() for name, tensor in tensors.items()}
    resized = {
        name: tensor.shape[0]
        for name, tensor in adapter.replaced.items()
        if name in held and is_resized(name, held[name], tensor.shape)
    }
    resized |= {name: more for name, more in _grown(adapter, held).items() if more > held[name][0]}
    if not resized:
        return config
    first = next(iter(resized))
    before, after = held[first][0], resized[first]
    alike = [name for name, shape in held.items() if _is_embedding(name) and shape[:1] == (before,)]
    left = [name for name in alike if resized.get(name) != after]
    if left:
        raise ConversionError(
            f"{base}: has {before} rows in {left[0]}, and {adapter.where} makes {first} {after} and leaves that one. "
            f"Name both in modules_to_save; or resize the base as in the training (resize_token_embeddings), save it, "
            "and merge into that."
        )
    notes.append(f"the vocabulary goes from {before} to {after} rows, in config.json too")
    return _with_vocab_size(config, before, after)


def _grown(adapter: Adapter, held: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Rows of the embeddings of which the adapter has trained tokens."""
    return {name: rows.grown(held[name][0]) for name, rows in adapter.rows.items() if name in held}


def is_resized(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Are these the shapes of one embedding with another number of tokens?  Pure."""
    return _is_embedding(name) and before != after and before[1:] == after[1:]


def refuse_longer_tokenizer(folder: Path, shards: Shards, adapter: Adapter) -> None:
    """Raise ConversionError if a folder's tokenizer.json has tokens that no row of the merged embeddings is for."""
    path = folder / "tokenizer.json"
    held = {name: tensor.shape for tensors in shards.values() for name, tensor in tensors.items()}
    embedding = next((name for name in held if _is_embedding(name)), None)
    if embedding is None or not path.is_file():
        return
    rows = adapter.vocabulary or _grown(adapter, held).get(embedding) or held[embedding][0]
    content = read_json(path)
    known = (content.get("model") or {}).get("vocab") or {}
    numbers = [*(known.values() if isinstance(known, dict) else range(len(known)))]  # Unigram has a list
    last = max([*numbers, *(token["id"] for token in content.get("added_tokens", []))], default=0)
    if last >= rows:
        raise ConversionError(
            f"{path}: has tokens up to number {last}, the merged {embedding} {rows} rows: embeddings that the training "
            "resized were not saved with the adapter. Save it with save_embedding_layers=True, or take the tokenizer "
            "out of its folder."
        )


def _with_vocab_size(config: dict[str, Any], before: int, after: int) -> dict[str, Any]:
    """config.json with another ``vocab_size``, where it was: at its top, or with the text model's settings."""
    text = config.get("text_config")
    nested = isinstance(text, dict) and (text.get("vocab_size") == before or "vocab_size" not in config)
    changed = dict(config)
    if isinstance(text, dict) and nested:
        changed["text_config"] = {**text, "vocab_size": after}
    if not nested or config.get("vocab_size") == before:
        changed["vocab_size"] = after
    return changed
