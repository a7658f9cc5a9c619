"""Packed rows: who shares one, that nothing passes between those who do, and that no number changes."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_one_dist.config.settings import DataConfig, LoraConfig, ModelConfig
from lora_one_dist.data import packing
from lora_one_dist.data.batches import collate
from lora_one_dist.data.samples import TokenData
from lora_one_dist.data.split import held_out, training_data
from tests import models, reference
from tests.data.helpers import build_tokenizer, dataset, typed
from tests.initialise.test_gradient import TOLERANCE, checkpointed, load_base
from tests.ranks import run_ranks
from tests.run.test_resume import all_refused, rare_data, train_with_a_fault
from tests.runs import metrics, peft_eval_loss, refused, settings, train

ROOM = 34  # 5 rows, of which one holds one document
PAD = 0


def token_data(samples):
    """As `tokenize` would give it."""
    rows = [
        {**sample, "prompt_length": 0, "num_targets": sum(label != -100 for label in sample["labels"][1:])}
        for sample in samples
    ]
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    counts = (len(rows), 0, 0, int(lengths.sum()), sum(row["num_targets"] for row in rows))
    return TokenData(typed(*rows), *counts, np.arange(len(rows)), lengths, ())


def documents():
    """11 of uneven length; of every third also the first token has a label, which nothing predicts."""
    samples = models.samples(11, seed=3)
    for sample in samples[::3]:
        sample["labels"] = list(sample["input_ids"])
    return samples


# ---------------------------------------------------------------- who shares a row


def by_definition(lengths, room):
    """Best fit decreasing, written out: {frozenset of documents}."""
    rows = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row in rows if sum(lengths[i] for i in row) + lengths[document] <= room]
        if fits:
            min(fits, key=lambda row: room - sum(lengths[i] for i in row)).append(document)
        else:
            rows.append([document])
    return rows


def fewest(lengths, room):
    """The fewest rows that hold all, by trying every way."""
    best = len(lengths)

    def place(left, rows):
        nonlocal best
        if len(rows) >= best:
            return
        if not left:
            best = len(rows)
            return
        for i in range(len(rows)):
            if rows[i] + left[0] <= room:
                place(left[1:], [*rows[:i], rows[i] + left[0], *rows[i + 1 :]])
        place(left[1:], [*rows, left[0]])

    place(sorted(lengths, reverse=True), [])
    return best


def test_best_fit_by_hand():
    order, starts = packing.best_fit(np.array([3, 8, 2, 5, 7, 2, 10]), 10)
    rows = [order[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert rows == [[6], [1, 2], [0, 4], [3, 5]], "each in its best row, ascending; rows in the order they were opened"
    assert (order.dtype, starts.dtype) == (np.int64, np.int64)


def test_every_document_lies_whole_in_one_row_and_rows_are_few():
    generator = random.Random(0)
    for _ in range(150):
        room = generator.randint(2, 30)
        lengths = [generator.randint(1, room) for _ in range(generator.randint(1, 9))]
        order, starts = packing.best_fit(np.array(lengths), room)
        rows = [order[a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(row and sum(lengths[i] for i in row) <= room for row in rows)
        assert len(rows) == len(by_definition(lengths, room))
        assert len(rows) <= 11 / 9 * fewest(lengths, room) + 6 / 9, "the bound of best fit decreasing"


def test_a_packed_row_and_its_batch_by_hand():
    samples = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
        {"input_ids": [4, 3, 2, 1], "labels": [-100, -100, 2, 1]},
    ]
    data = packing.pack(token_data(samples), 6)
    assert (len(data), data.num_tokens, data.num_targets, data.num_rows) == (2, 9, 5, 3)
    assert data.lengths.tolist() == [6, 3]
    assert [data.rows_of(i) for i in range(2)] == [[1, 2], [0]]
    assert data.rows.tolist() == [1, 2, 0]
    assert {name: np.asarray(value).tolist() for name, value in data.dataset[0].items()} == {
        "input_ids": [8, 9, 4, 3, 2, 1],
        "labels": [-100, 9, -100, -100, 2, 1],
        "lengths": [2, 4],
        "num_targets": 3,
    }
    assert data.dataset[1]["labels"].tolist() == [-100, 6, 7], "a first token is no target"
    assert data.dataset["num_targets"].tolist() == [3, 2]
    assert data.squared_lengths().tolist() == [2 * 2 + 4 * 4, 3 * 3]
    batch = collate([data.dataset[0], data.dataset[1]], pad_token_id=0)
    expected = {
        "input_ids": [[8, 9, 4, 3, 2, 1], [5, 6, 7, 0, 0, 0]],
        "labels": [[-100, 9, -100, -100, 2, 1], [-100, 6, 7, -100, -100, -100]],
        "attention_mask": [[1] * 6, [1, 1, 1, 0, 0, 0]],
        "position_ids": [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    weightless = collate([data.dataset[0]], pad_token_id=0, weightless=True)
    assert {name: tensor.tolist() for name, tensor in weightless.items()} == {
        "input_ids": [[8, 9]],
        "labels": [[-100, -100]],
        "attention_mask": [[1, 1]],
        "position_ids": [[0, 1]],
    }


def test_rows_of_the_data_are_named_and_counted():
    """Of documents that share a row, some others of the data dropped."""
    tokenizer = build_tokenizer()
    rows = dataset(*({"prompt": "q" * n, "completion": "r"} for n in (2, 30, 3, 1, 4)))
    settings = DataConfig(train="unused.jsonl", max_length=10, packing=True)
    data = training_data(rows, tokenizer, settings)
    assert isinstance(data, packing.PackedData)
    assert sorted(itertools.chain(*(data.rows_of(i) for i in range(len(data))))) == [0, 2, 3, 4]
    for i in range(len(data)):
        lengths = [2 + len(rows[row]["prompt"]) + 1 for row in data.rows_of(i)]
        assert (data.dataset[i]["lengths"], int(data.lengths[i])) == (lengths, sum(lengths))
    assert (data.num_rows, data.num_without_targets, data.num_truncated, data.num_targets) == (5, 1, 1, 8)
    unpacked = training_data(rows, tokenizer, settings.model_copy(update={"packing": False}))
    assert [unpacked.rows_of(i) for i in range(len(unpacked))] == [[0], [2], [3], [4]]


def test_fingerprint_tells_packed_from_unpacked_and_rooms_apart():
    data = token_data(documents())
    prints = [data.fingerprint(), *(packing.pack(data, room).fingerprint() for room in (20, 30, 40))]
    assert len({found["sha256"] for found in prints}) == 4
    assert packing.pack(data, 30).fingerprint() == prints[2]
    assert [found["samples"] for found in prints] == [11, *(len(packing.pack(data, room)) for room in (20, 30, 40))]
    other = documents()
    other[0]["labels"][-1] = -100
    assert packing.pack(token_data(other), 30).fingerprint() != prints[2]


# ---------------------------------------------------------------- nothing passes between documents


def heads(base, batch):
    """The logits of all rows in `loss_sum`, which makes those of the targets alone."""
    from lora_one_dist.base.loss import loss_sum

    found = []
    hook = base.model.norm.register_forward_hook(lambda _, __, output: found.append(output.detach()))
    with torch.no_grad():
        loss_sum(base, batch)
        hook.remove()
        return base.lm_head(found[0])


def flash(module, query, key, value, attention_mask, scaling=None, position_ids=None, **_):
    """What a flash attention kernel does of packed rows: of one row, by positions, without a mask."""
    assert attention_mask is None
    assert query.shape[0] == 1, "transformers looks for packed rows in a batch of one only"
    starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), query.shape[2]]
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor[:, :, a:b] for tensor in (query, key, value)), is_causal=True, scale=scaling
        )
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def leaks(kinds, data):
    """Runs on a rank: (kind, attention, what), how much another document's logits change with a token of the first."""
    from transformers import AttentionInterface

    AttentionInterface.register("flash_by_hand", flash)
    changed = {}
    for kind in kinds:
        base = models.MODELS[kind]().eval()
        expected = None
        for attention in ("eager", "sdpa", "flash_by_hand"):
            base.config._attn_implementation = attention
            rows = [data.dataset[i] for i in range(2)]
            batch = collate(rows, PAD)
            before = heads(base, batch)
            first = rows[0]["lengths"][0]
            batch["input_ids"][0, 1] = 63 - batch["input_ids"][0, 1] % 60
            after = heads(base, batch)
            width = batch["input_ids"].shape[1]
            before, after = (logits.view(2, width, -1) for logits in (before, after))
            own = (before[0, 1:first] - after[0, 1:first]).abs().max().item()
            others = torch.cat([before[0, first:] - after[0, first:], before[1] - after[1]]).abs().max().item()
            changed[kind, attention, "own"], changed[kind, attention, "others"] = own, others
            expected = before if expected is None else expected
            changed[kind, attention, "to eager"] = (before - expected).abs().max().item()
            if attention != "flash_by_hand":  # planted: an ordinary batch, whose rows are one document each
                batch = {name: tensor for name, tensor in collate(rows, PAD).items() if name != "position_ids"}
                planted = heads(base, batch)
                batch["input_ids"][0, 1] = 63 - batch["input_ids"][0, 1] % 60
                difference = (planted - heads(base, batch))[0, first : sum(rows[0]["lengths"])]
                changed[kind, attention, "planted"] = difference.abs().max().item()
    return changed


def test_no_document_sees_another():
    data = packing.pack(token_data(documents()), ROOM)
    assert len(data.dataset[0]["lengths"]) > 1
    assert data.lengths[0] != data.lengths[1], "there is padding"
    changed = run_ranks(1, leaks, ["llama", "qwen2"], data)[0]
    for (kind, attention, what), value in changed.items():
        if what == "others":
            assert value == 0, (kind, attention)
        elif what == "to eager":
            assert value < 1e-4, (kind, attention)  # fp32, logits of order 1 to 10
        else:
            assert value > 1e-2, (kind, attention, what)


# ---------------------------------------------------------------- the same numbers


def one_step(folder, data, zero_json, checkpointings, sizes):
    """Runs on a rank: by (checkpointing, attention, size) gradient and loss, and with adapters theirs and the loss.

    The owner of a layer has its gradient; the adapters' are summed over the ranks.
    """
    from lora_one_dist.adapters.lora import inject_adapters, peft_config
    from lora_one_dist.base.loss import loss_sum
    from lora_one_dist.cluster import comm, ownership
    from lora_one_dist.initialise import gradient

    found = {}
    rows = [data.dataset[i] for i in range(len(data))]
    for checkpointing in checkpointings:
        base, targets = load_base(folder, zero_json, checkpointing)
        owners = ownership.assign([float(t.m * t.n) for t in targets], comm.world_size())
        cases = list(itertools.product(("eager", "sdpa"), sizes))
        for attention, size in cases:
            base.module.config._attn_implementation = attention
            (batch,) = gradient.deal_micro_batches(rows, size, "token", 1, PAD)
            found[checkpointing, attention, size] = gradient.full_gradient(base, targets, owners, batch, "device")
        description = peft_config(LoraConfig(r=4), targets, str(folder))
        adapters = inject_adapters(base, description, targets, "fp32")
        for adapter in adapters:
            A, B = pair(adapter.target.name, adapter.target.m, adapter.target.n)
            adapter.A.data.copy_(A)
            adapter.B.data.copy_(B)
        base.module.train()
        for attention, size in cases:
            base.module.config._attn_implementation = attention
            (batch,) = gradient.deal_micro_batches(rows, size, "token", 1, PAD)
            loss = torch.zeros((), dtype=torch.float64)
            for adapter in adapters:
                adapter.A.grad = adapter.B.grad = None
            for part in batch:
                weighted = loss_sum(base.module, part.tensors, part.weight)
                weighted.backward()
                base.release()
                loss += weighted.detach().double()
            sums = {a.target.name: (comm.all_sum(a.A.grad), comm.all_sum(a.B.grad)) for a in adapters}
            found[checkpointing, attention, size] += (sums, float(comm.all_sum(loss)))
    return found


def pair(name, m, n):
    """Adapters that change a weight by 7 %: those that double it saturate attention, and fp32 loses its gradient."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return 0.03 * torch.randn(4, n, generator=generator), 0.03 * torch.randn(m, 4, generator=generator)


# The tolerance is test_gradient's. Measured, the worst layer: 1.8e-6 for the gradient and 2.3e-6 for the adapters' with
# packed rows, 1.9e-6 and 2.1e-6 when the same code is given the documents unpacked.
ALL_CHECKPOINTING = ("none", "reentrant", "non_reentrant")
CASES = [
    ("llama", 2, "zero3", ("none", "non_reentrant"), (2,)),
    ("qwen2", 1, "zero3_offload", ("reentrant",), (1, 2)),
    *[
        pytest.param(kind, ranks, "zero3", ALL_CHECKPOINTING, (1, 2), marks=pytest.mark.full)
        for kind in ("llama", "qwen2")
        for ranks in (1, 2)
    ],
]


@pytest.mark.parametrize(("kind", "ranks", "zero_json", "checkpointings", "sizes"), CASES)
def test_loss_and_gradients_are_those_of_the_documents_by_themselves(
    kind, ranks, zero_json, checkpointings, sizes, model_folder
):
    samples = documents()
    truth = models.MODELS[kind]().double()
    names = [n for n, module in truth.named_modules() if isinstance(module, torch.nn.Linear) and n != "lm_head"]
    loss, gradients = reference.mean_loss(truth, samples).item(), reference.full_gradient(truth, samples, names)
    scale = 16 / 4**0.5
    pairs = {}
    with torch.no_grad():
        for name in names:
            weight = truth.get_submodule(name).weight
            A, B = (x.double() for x in pair(name, *weight.shape))
            weight += scale * B @ A
            pairs[name] = (A, B)
    adapted = reference.mean_loss(truth, samples).item()
    merged = reference.full_gradient(truth, samples, names)
    wanted = {n: (scale * pairs[n][1].T @ merged[n], scale * merged[n] @ pairs[n][0].T) for n in names}

    data = packing.pack(token_data(samples), ROOM)
    assert len(data) == 5, "two ranks or two rows at a time leave one place empty"
    results = run_ranks(ranks, one_step, model_folder(kind), data, zero_json, checkpointings, sizes)
    assert len(results[0]) == len(checkpointings) * 2 * len(sizes)
    for case in results[0]:
        owned = {name: G for result in results for name, G in result[case][0].items()}
        assert set(owned) == set(names)
        assert max(reference.relative(owned[n], gradients[n]) for n in names) <= TOLERANCE, case
        for _, own_loss, of_adapters, own_adapted in (result[case] for result in results):
            assert abs(own_loss - loss) <= 1e-6, case
            assert abs(own_adapted - adapted) <= 1e-6, case
            for name in names:
                for side in (0, 1):
                    assert reference.relative(of_adapters[name][side], wanted[name][side]) <= TOLERANCE, (case, name)


# ---------------------------------------------------------------- models that cannot

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# What config.json says besides.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "bos_token_id": 0},
    "granite": {},
    "starcoder2": {},
    "smollm3": {"pad_token_id": 0},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
NO_SDPA = ("gemma2", "bloom", "mpt", "mamba")  # in transformers 5.23
REFUSED = {
    "opt": "lets packed documents see each other: its mask ignores positions",
    "bloom": "takes no position_ids",
    "mpt": "takes no position_ids",
    "mamba": "takes no position_ids",
    "recurrent_gemma": "mixes the tokens of a row also by ",
    "lfm2": "mixes the tokens of a row also by conv",
}


def family(kind, folder, attention):
    """The model of a family without values, and its config."""
    from lora_one_dist.base.skeleton import build_skeleton

    (folder / "config.json").write_text(json.dumps({"model_type": kind, **TINY, **FAMILIES[kind]}))
    return build_skeleton(ModelConfig(path=str(folder), dtype="fp32", attn_implementation=attention), folder)


def seen_by_others(hf_config):
    """How much the second document's logits change with a token of the first, in a model with values."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(hf_config).eval()
    ids, positions = torch.randint(3, 60, (1, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    other = ids.clone()
    other[0, 1] = 63 - ids[0, 1]
    with torch.no_grad():
        outputs = [made(input_ids=x, position_ids=positions, use_cache=False).logits for x in (ids, other)]
        alone = made(input_ids=ids[:, 4:], use_cache=False).logits
    change = (outputs[0] - outputs[1])[0]
    assert change[1:4].abs().max() > 1e-3, "the first document's own logits change"
    return change[4:].abs().max().item(), (outputs[0][:, 4:] - alone).abs().max().item()


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, "eager") for kind in FAMILIES] + [(kind, "sdpa") for kind in FAMILIES if kind not in NO_SDPA],
)
def test_models_that_cannot_keep_documents_apart_are_refused_without_values(kind, attention, tmp_path):
    from lora_one_dist.base.packable import refuse_unpackable
    from lora_one_dist.base.skeleton import ModelError

    skeleton = family(kind, tmp_path, attention)
    before = {name: (p.device.type, p.shape) for name, p in skeleton.named_parameters()}
    if kind in REFUSED:
        with pytest.raises(ModelError) as caught:
            refuse_unpackable(skeleton)
        message = str(caught.value)
        assert message.startswith("data.packing = true: ")
        assert REFUSED[kind] in message
        assert message.endswith("Set data.packing: false, or take another model.")
    else:
        refuse_unpackable(skeleton)
        change, apart = seen_by_others(skeleton.config)
        assert change == 0
        assert apart < 1e-5, "the second document by itself has the same logits"
    assert {name: (p.device.type, p.shape) for name, p in skeleton.named_parameters()} == before
    assert all(device == "meta" for device, _ in before.values())
    assert not any(module._forward_pre_hooks for module in skeleton.modules())


def test_flash_attention_needs_the_positions_in_its_blocks(tmp_path):
    from lora_one_dist.base.packable import refuse_unpackable
    from lora_one_dist.base.skeleton import ModelError

    skeleton = family("llama", tmp_path, "eager")
    skeleton.config._attn_implementation = "flash_by_hand"
    refuse_unpackable(skeleton)
    forward = skeleton.model.forward
    skeleton.model.forward = lambda **given: forward(**{**given, "position_ids": None})
    with pytest.raises(ModelError, match="LlamaForCausalLM lets packed documents see each other"):
        refuse_unpackable(skeleton)


def test_a_refused_model_does_leak(tmp_path):
    """The refusal is no mere caution: a mask without positions, a state, ALiBi without either."""
    for kind in ("opt", "recurrent_gemma", "mamba", "mpt"):
        change, _ = seen_by_others(family(kind, tmp_path, "eager").config)
        assert change > 1e-4, kind


# ---------------------------------------------------------------- whole runs


def packed_settings(folder, out, **changes):
    """Rows of 24 tokens, with 2 or more documents; every fifth row of the data is held out."""
    packed = {"packing": True, "max_length": 24, "eval": None, "eval_fraction": 0.21}
    raw = settings(folder, out, train__max_steps=4, train__global_batch_size=7)
    for key, value in {**{f"data__{name}": value for name, value in packed.items()}, **changes}.items():
        group, _, name = key.partition("__")
        raw[group][name] = value
    return raw


def test_packed_run_with_rows_held_out(model_folder, tmp_path):
    folder, out = model_folder("llama"), tmp_path / "data" / "run"
    run_ranks(2, train, packed_settings(folder, out, train__eval_steps=3, train__exact_match_samples=5))
    lines = metrics(out)
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert "exact_match" in lines[0].keys() & lines[-1].keys()
    held = [models.rows(100)[i] for i in held_out(100, 0.21)[1]]
    assert losses[-1] == pytest.approx(peft_eval_loss(folder, out / "adapter", held, torch.float32), abs=1e-4)
    others = ({"data__packing": False}, {"data__max_length": 23}, {"data__eval_fraction": 0.3})
    for message in run_ranks(1, all_refused, [packed_settings(folder, out, **changes) for changes in others])[0]:
        assert "the training data is another one (" in message


@pytest.mark.full
def test_packed_losses_do_not_depend_on_ranks_micro_batch_attention_and_checkpointing(model_folder, tmp_path):
    found = []
    for ranks, size, attention, checkpointing in (
        (1, 2, "sdpa", "none"),
        (2, 1, "eager", "reentrant"),
        (3, 3, "sdpa", "non_reentrant"),
    ):
        out = tmp_path / f"{ranks}" / "run"
        changes = {"train__micro_batch_size": size, "train__eval_steps": 2, "train__max_steps": 8}
        changes |= {f"model__{key}": value for key, value in checkpointed(checkpointing).items()}
        changes["model__attn_implementation"] = attention
        run_ranks(ranks, train, packed_settings(model_folder("qwen2"), out, data__max_length=60, **changes))
        lines = metrics(out)
        found.append([line.get("loss", line.get("eval_loss")) for line in lines])
    assert len(found[0]) == 8 + 5
    assert found[1] == pytest.approx(found[0], abs=1e-5, rel=0)
    assert found[2] == pytest.approx(found[0], abs=1e-5, rel=0)


def test_samples_of_a_packed_row_are_named_when_a_loss_is_not_finite(model_folder, tmp_path):
    out = tmp_path / "data" / "run"
    changes = {"data__train": str(rare_data(tmp_path, 8)), "data__eval_fraction": None, "train__micro_batch_size": 1}
    changes["init__num_samples"] = 4
    raw = packed_settings(model_folder("llama"), out, **changes, train__global_batch_size=5, train__max_steps=5)
    messages = run_ranks(2, train_with_a_fault, raw, "embedding")
    assert messages[0] == messages[1]
    (named,) = re.findall(r"embed_tokens for the samples at (.*?)\. The newest", messages[0])
    lines = [int(line) for line in re.findall(r"rare\.jsonl, line (\d+)", named)]
    assert 8 in lines
    assert len(lines) > 1, "and those that share its row"


def test_too_few_packed_rows_are_refused(model_folder, tmp_path):
    changes = {"train__global_batch_size": 70, "data__eval_fraction": None}
    message = run_ranks(1, refused, packed_settings(model_folder("llama"), tmp_path / "data/run", **changes))[0]
    assert re.search(r"train\.global_batch_size = 70: the training data has \d\d packed rows\. Lower it", message)
