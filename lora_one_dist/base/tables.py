"""Which rows of the embedding and of the output head are trained: those of new tokens, or all.

In: a skeleton, the ``lora`` group of a config, new token ids.  Out: a :class:`Table` for each tensor that has such
rows; tied ones are one tensor.  Pure; reads no weight; the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.targets import Target
from lora_one_dist.config.lora import LoraConfig, ends

OTHER_TOKENIZER = 2  # a tokenizer with as many times the model's rows is another model's


@dataclass(frozen=True)
class Table:
    """The embedding, the output head, or both where they share a tensor, with rows that are trained."""

    modules: tuple[str, ...]
    """Dotted names, the embedding's first."""
    old: int
    """Rows that the base has."""
    width: int
    new: tuple[int, ...]
    """Ids, ascending, whose rows start at the mean of the rows before the first of them."""
    whole: bool
    """Are all rows trained, or the new ones alone?"""
    has_head: bool
    """Is one of the modules the output head?"""

    @property
    def rows(self) -> int:
        """Of the table once it has the new ones: all that the base lacks are new."""
        return max(self.old, self.new[-1] + 1 if self.new else 0)

    @property
    def trained(self) -> int:
        """Rows that are trained."""
        return self.rows if self.whole else len(self.new)

    @property
    def size(self) -> int:
        """Elements that are trained."""
        return self.trained * self.width

    @property
    def names(self) -> int:
        """Under how many PEFT saves it: a whole one under each module's."""
        return len(self.modules) if self.whole else 1

    @property
    def name(self) -> str:
        """Of the tensor in checkpoints."""
        return f"{self.modules[0]}.weight"


def new_ids(model: Any, tokenizer: Any, added: Sequence[int]) -> list[int]:
    """Ids ``added`` to a tokenizer, and all from the first that the model has no embedding for.  Pure.

    Raises:
        ModelError: for a tokenizer that cannot be the model's.
    """
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= OTHER_TOKENIZER * rows:
        raise ModelError(
            f"model.path: the tokenizer's largest id is {largest}, the model has {rows} embeddings. Use the tokenizer "
            "that the model was trained with."
        )
    return sorted({*added, *range(rows, largest + 1)})


def plan_tables(model: Any, lora: LoraConfig, targets: Sequence[Target], new: Sequence[int]) -> list[Table]:
    """The tables with trained rows, the embedding's first; none where nothing is asked for.

    Raises:
        ModelError: for a name that is no table's, and for models whose tables cannot be trained here.
    """
    if not new and not lora.modules_to_save:
        return []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    _refuse_kinds(lora, model, embedding, head)
    names = {id(module): name for name, module in model.named_modules()}
    tables = {names[id(embedding)]: embedding, names[id(head)]: head}
    _refuse_names(lora, tables)
    old, width = embedding.weight.shape
    if new and new[-1] >= old:
        _refuse_others(model, tables.values(), old)
    is_whole = {name: any(ends(ending, name) for ending in lora.modules_to_save or ()) for name in tables}
    if head.weight is embedding.weight:
        found = [Table(tuple(tables), old, width, tuple(new), any(is_whole.values()), True)]
    elif new and len(set(is_whole.values())) > 1:
        raise ModelError(
            f"lora.modules_to_save = {lora.modules_to_save}: with new tokens it must name both {' and '.join(tables)}, "
            "or none, which trains the new tokens' rows of both."
        )
    else:
        found = [
            Table((name,), old, width, tuple(new), whole, tables[name] is head)
            for name, whole in is_whole.items()
            if new or whole
        ]
    _refuse_adapted(lora, found, targets)
    return found


def _refuse_kinds(lora: LoraConfig, model: Any, embedding: Any, head: Any) -> None:
    """Raise ModelError for tables that do more, or other things, than a lookup and a product."""
    fault = None
    others = [name for name, module in model.named_modules() if module is not embedding and module is not head]
    shared = [name for name in others if getattr(model.get_submodule(name), "weight", None) is embedding.weight]
    if shared:  # T5's two stacks
        fault = f"{shared[0]} shares its embedding's weight"
    elif not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        fault = f"its embedding is a {type(embedding).__name__}, not a plain one"
    elif type(embedding) is not nn.Embedding and not hasattr(embedding, "embed_scale"):
        fault = f"its embedding is a {type(embedding).__name__}, which does more than look up"
    elif type(head) is not nn.Linear or head.bias is not None:
        fault = "its output head is no linear layer of its own, or one with a bias"
    elif head.weight.shape != embedding.weight.shape:
        fault = f"its output head is {tuple(head.weight.shape)}, its embedding {tuple(embedding.weight.shape)}"
    if fault is not None:
        remedy = "Leave it out" if lora.new_tokens or lora.modules_to_save else "Take the model's own tokenizer"
        raise ModelError(f"{_asked(lora)}: rows of this model cannot be trained: {fault}. {remedy}.")


def _refuse_names(lora: LoraConfig, tables: dict[str, Any]) -> None:
    """Raise ModelError where ``modules_to_save`` names another module."""
    shown = " nor ".join(tables)
    for ending in lora.modules_to_save or ():
        if not any(ends(ending, name) for name in tables):
            raise ModelError(f"lora.modules_to_save: {ending} is neither {shown}, which alone can be. Correct it.")


def _refuse_adapted(lora: LoraConfig, tables: Sequence[Table], targets: Sequence[Target]) -> None:
    """Raise ModelError where a table has an adapter."""
    trained = {name for table in tables for name in table.modules}
    adapted = [target.name for target in targets if target.name in trained]
    if adapted:
        raise ModelError(
            f"lora.target_modules: {adapted[0]} has rows that are trained ({_asked(lora)}), and would have an adapter "
            "too. Leave one of them out."
        )


def _refuse_others(model: Any, tables: Iterable[Any], old: int) -> None:
    """Raise ModelError where another embedding looks up tokens, and lacks the new ones (Gemma 3n's by layers)."""
    known = {id(module) for module in tables}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module) not in known and module.num_embeddings == old:
            raise ModelError(
                f"lora.new_tokens: {name} has a row for each of the {old} tokens too, and none for new ones. Take "
                "tokens that the model has."
            )


def _asked(lora: LoraConfig) -> str:
    if lora.modules_to_save:
        return f"lora.modules_to_save = {lora.modules_to_save}"
    return f"lora.new_tokens = {lora.new_tokens}" if lora.new_tokens else "a tokenizer with more tokens than the model"
