"""The one-step gradient under ZeRO-3 against plain autograd in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, GitConfig
from transformers.pytorch_utils import Conv1D

from lora_one_dist.config.settings import LoraConfig
from lora_one_dist.initialise import gradient
from tests import models, reference
from tests.base.checkpoints import gpt2
from tests.ranks import run_ranks
from tests.runs import settings

# fp32 sums of at most 8 * 19 token terms in another order: 1e-7 * sqrt(152) is 1e-6. We ask ten times that.
TOLERANCE = 1e-5
SAMPLES = 8

# Each value of every option occurs, and 3 ranks do not divide 8 samples.
CASES = [
    # kind, world size, ZeRO JSON, checkpointing, buffer, layer groups, parts, micro-batch, average; in the place of the
    # world size a letter for each rank's host, and then the base is sharded inside each host. Released: ZeRO-3 keeps
    # no block for reuse, as it keeps none of most blocks of a large model. Singly: it gathers layers, not blocks. A
    # number behind the checkpointing: so many blocks are recomputed, else all.
    ("llama", 1, "zero3", "non_reentrant", "device", 1, 1, 1, "token"),
    pytest.param(("llama", 1, "stage0", "none", "host", 3, 2, 2, "micro_batch"), marks=pytest.mark.full),
    ("llama", 2, "zero3_offload", "none", "host", 1, 2, 2, "token"),
    ("llama", 2, "stage0", "reentrant", "device", 3, 1, 1, "token"),
    pytest.param(("llama", 2, "zero3 singly", "non_reentrant", "device", 1, 1, 1, "token"), marks=pytest.mark.full),
    ("llama", 3, "zero3 released", "reentrant", "device", 3, 2, 1, "micro_batch"),
    ("llama", 4, "zero3", "non_reentrant", "host", 3, 2, 3, "token"),
    pytest.param(("qwen2", 1, "zero3", "reentrant", "host", 3, 1, 2, "token"), marks=pytest.mark.full),
    ("qwen2", 2, "zero3 released", "non_reentrant", "device", 3, 1, 1, "micro_batch"),
    pytest.param(("llama", 2, "zero3 released", "none", "device", 1, 1, 1, "token"), marks=pytest.mark.full),
    pytest.param(("qwen2", 3, "stage0", "non_reentrant", "host", 1, 2, 1, "token"), marks=pytest.mark.full),
    ("llama", 2, "zero3 released", "non_reentrant 2", "device", 3, 1, 1, "token"),
    pytest.param(("qwen2", 3, "zero3", "reentrant 1", "device", 1, 1, 2, "token"), marks=pytest.mark.full),
    pytest.param(("qwen2", 3, "zero3", "none", "device", 1, 1, 3, "token"), marks=pytest.mark.full),
    ("qwen2", 4, "zero3", "reentrant", "device", 1, 2, 1, "token"),
    pytest.param(("qwen2", 4, "stage0", "none", "device", 3, 1, 1, "token"), marks=pytest.mark.full),
    ("llama", "aabb", "zero3", "non_reentrant", "host", 3, 2, 3, "token"),
    pytest.param(
        ("qwen2", "abab", "zero3_offload", "reentrant", "device", 1, 1, 2, "micro_batch"), marks=pytest.mark.full
    ),
    pytest.param(("qwen2", "aaab", "zero3", "none", "device", 1, 1, 1, "token"), marks=pytest.mark.full),
]


def checkpointed(how: str) -> dict[str, object]:
    """Settings of the model for none, or a kind of checkpointing of all blocks or, with a number behind it, of some."""
    kind, _, count = how.partition(" ")
    return {"recompute": "none"} if how == "none" else {"recompute": int(count or 0) or "all", "checkpointing": kind}


def load_base(
    folder: Path,
    zero_json: str,
    checkpointing: str = "non_reentrant",
    r: int = 4,
    shard_group: str = "world",
    lora: LoraConfig | None = None,
    rank_needed: int = 0,
    **zero: object,
):
    """Base and targets on this rank, with a persistence threshold that some weights lie below and some above."""
    from lora_one_dist.base import loading
    from lora_one_dist.config.settings import ModelConfig

    settings = ModelConfig(path=str(folder), dtype="fp32", **checkpointed(checkpointing))
    deepspeed = models.deepspeed_config(zero_json, shard_group, stage3_param_persistence_threshold=600, **zero)
    plan = loading.plan(folder, settings, lora or LoraConfig(r=r), rank_needed or r)
    assert plan.sources is not None, "the sliced road must be taken"
    return loading.load(settings, deepspeed, plan, 1), plan.targets


def owned_gradients(folder, shard_group, zero_json, checkpointing, buffer, groups, parts, micro_batch_size, average):
    """Runs on a rank: what it owns, and the loss."""
    from lora_one_dist.cluster import comm, ownership
    from lora_one_dist.initialise import gradient

    name, _, how = zero_json.partition(" ")
    more = {"": {}, "released": {"stage3_max_reuse_distance": 0}, "singly": {"stage3_max_live_parameters": 1}}[how]
    base, targets = load_base(folder, name, checkpointing, shard_group=shard_group, **more)
    batch = gradient.deal_micro_batches(models.samples(SAMPLES), micro_batch_size, average, parts, pad_token_id=0)
    costs = [float(t.m * t.n) for t in targets]
    owned, losses = {}, []
    for group in ownership.split(costs, groups):
        layers = [targets[i] for i in group]
        owners = ownership.assign([costs[i] for i in group], comm.world_size())
        loss = 0.0
        for part in batch:
            gradients, part_loss = gradient.full_gradient(base, layers, owners, part, buffer)
            loss += part_loss
            for name, G in gradients.items():
                owned[name] = owned[name] + G if name in owned else G
        losses.append(loss)
    return owned, losses


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradient_equals_single_process(case, model_folder):
    kind, ranks, *rest = case
    hosts = ranks if isinstance(ranks, str) else None
    micro_batch_size, average = rest[-2:]
    model = models.MODELS[kind]().double()
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    samples = models.samples(SAMPLES)
    groups = None
    if average == "micro_batch":
        starts = range(0, SAMPLES, micro_batch_size)
        groups = [list(range(start, min(start + micro_batch_size, SAMPLES))) for start in starts]
    truth = reference.full_gradient(model, samples, names, groups)
    true_loss = reference.mean_loss(model, samples, groups).item()

    world_size, shard_group = (len(hosts), "node") if hosts else (ranks, "world")
    results = run_ranks(world_size, owned_gradients, model_folder(kind), shard_group, *rest, hosts=hosts)

    owners = [name for owned, _ in results for name in owned]
    assert sorted(owners) == sorted(names), "every target has exactly one owner"
    worst = max((reference.relative(G, truth[name]), name) for owned, _ in results for name, G in owned.items())
    assert worst[0] <= TOLERANCE, worst
    assert all(abs(loss - true_loss) <= 1e-6 for _, losses in results for loss in losses)


def twice(model):
    """Let the second block's feed-forward network run twice in a row, and the third's last layer on two inputs."""
    network, last = model.model.layers[1].mlp, model.model.layers[2].mlp
    once = network.forward
    network.forward = lambda x: once(once(x))

    def two_inputs(x):
        inner = last.act_fn(last.gate_proj(x)) * last.up_proj(x)
        return last.down_proj(inner) + last.down_proj(inner.square())

    last.forward = two_inputs
    return model


def odd_layers(folders, raw):
    """Runs on a rank: gradients of layers called twice, and of transposed ones, which PiSSA then takes apart."""
    from lora_one_dist.adapters.lora import inject_adapters, peft_config, set_adapters
    from lora_one_dist.cluster import comm, ownership
    from lora_one_dist.config.reading import parse_config
    from lora_one_dist.initialise import gradient, pairs

    found, config = {}, parse_config(raw)
    for kind, checkpointing, buffer in (("llama", "non_reentrant", "device"), ("llama", "none", "host"),
                                        ("gpt2", "non_reentrant", "device")):  # fmt: skip
        base, targets = load_base(folders[kind], "zero3", checkpointing, lora=config.lora)
        if kind == "llama":
            twice(base.module)
        (batch,) = gradient.deal_micro_batches(models.samples(SAMPLES), 2, "token", 1, pad_token_id=0)
        owners = ownership.assign([float(t.m * t.n) for t in targets], comm.world_size())
        found[kind, buffer] = gradient.full_gradient(base, targets, owners, batch, buffer)
    result = pairs.initial_pairs(base, targets, config, [batch])
    before = pairs.batch_loss(base, batch)
    adapters = inject_adapters(base, peft_config(config.lora, targets, "x"), targets, "fp32")
    set_adapters(base, adapters, result.pairs, compensate=True)
    return found, result.pairs, (before, pairs.batch_loss(base, batch))


def test_layers_called_twice_and_transposed_ones_equal_single_process(model_folder, tmp_path):
    gpt2().save_pretrained(tmp_path / "gpt2")
    folders = {"llama": model_folder("llama"), "gpt2": tmp_path / "gpt2"}
    raw = settings(folders["gpt2"], tmp_path / "out", init__method="pissa")
    ranks = run_ranks(2, odd_layers, folders, raw)
    whole = {"llama": twice(models.llama().double()), "gpt2": gpt2().double().eval()}
    for (kind, buffer), (_, loss) in ranks[0][0].items():
        model = whole[kind]
        names = [n for n, x in model.named_modules() if isinstance(x, torch.nn.Linear | Conv1D) and n != "lm_head"]
        truth = reference.full_gradient(model, models.samples(SAMPLES), names)
        owned = [found[kind, buffer][0] for found, _, _ in ranks]
        assert sorted(name for of_rank in owned for name in of_rank) == sorted(names)
        for name, G in ((name, G) for of_rank in owned for name, G in of_rank.items()):
            assert reference.relative(G.T if kind == "gpt2" else G, truth[name]) <= TOLERANCE, (kind, buffer, name)
        assert abs(loss - reference.mean_loss(model, models.samples(SAMPLES)).item()) <= 1e-6
    _, pairs, (before, after) = ranks[1]
    assert after == pytest.approx(before, abs=2e-5)  # fp32 logits of a loss of 4.5
    for name, (A, B) in pairs.items():
        U, S, Vh = torch.linalg.svd(whole["gpt2"].get_submodule(name).weight.detach().T, full_matrices=False)
        best = float(S[4:].square().sum().sqrt())
        product = 8 / 4**0.5 * B.double() @ A.double()
        assert float((U @ torch.diag(S) @ Vh - product).norm()) <= best * (1 + 1e-4)


def gradients_with_the_head(folder, checkpointing):
    """Runs on a rank: the gradients of some blocks' layers and of the output head, where rank 0 owns all."""
    from lora_one_dist.base.targets import find_targets
    from lora_one_dist.initialise import gradient

    base, _ = load_base(folder, "zero3", checkpointing)
    targets = find_targets(base.module, LoraConfig(r=4, target_modules=["down_proj", "lm_head"]))
    (batch,) = gradient.deal_micro_batches(models.samples(SAMPLES), 2, "token", 1, pad_token_id=0)
    return gradient.full_gradient(base, targets, [0] * len(targets), batch, "device")


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "none"])
def test_gradient_of_the_head(checkpointing, model_folder):
    model = models.llama().double()
    names = [name for name, _ in model.named_modules() if name.endswith(("down_proj", "lm_head"))]
    truth = reference.full_gradient(model, models.samples(SAMPLES), names)
    found, _ = run_ranks(2, gradients_with_the_head, model_folder("llama"), checkpointing)[0]
    assert sorted(found) == sorted(names)
    for name, G in found.items():
        assert reference.relative(G, truth[name]) <= TOLERANCE, name


FALCON = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
GIT = ["self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense"]
VISION = {"num_hidden_layers": 1, "hidden_size": 12}
WRITERS: dict[str, tuple] = {  # models whose own code writes to what a target or the embedding gave back
    "falcon": (FalconConfig, {"hidden_dropout": 0.0}, FALCON, "reentrant"),
    "falcon biased": (FalconConfig, {"bias": True}, FALCON, "non_reentrant"),
    "git": (GitConfig, {"intermediate_size": 48, "vision_config": VISION}, GIT, "non_reentrant"),
}


def writer(kind: str, folder: Path) -> Path:
    described, more, *_ = WRITERS[kind]
    torch.manual_seed(5)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    net = AutoModelForCausalLM.from_config(described(**sizes, initializer_range=0.2, **more))
    net.save_pretrained(folder / kind)
    return folder / kind


def gradients_of_writers(folder):
    """Runs on a rank: of each model the gradients, where rank 0 owns all; then a step's."""
    from lora_one_dist.adapters.lora import inject_adapters, peft_config
    from lora_one_dist.base import loading
    from lora_one_dist.base.loss import loss_sum
    from lora_one_dist.config.settings import LoraConfig, ModelConfig
    from lora_one_dist.initialise import gradient

    (batch,) = gradient.deal_micro_batches(models.samples(SAMPLES), 2, "token", 1, pad_token_id=0)
    found = {}
    for kind, (*_, endings, how) in WRITERS.items():
        settings = ModelConfig(path=str(folder / kind), dtype="fp32", recompute="all", checkpointing=how)
        lora = LoraConfig(r=4, target_modules=endings)
        plan = loading.plan(folder / kind, settings, lora, 4)
        base = loading.load(settings, models.deepspeed_config("zero3"), plan, 2)
        owned, _ = gradient.full_gradient(base, plan.targets, [0] * len(plan.targets), batch, "device")
        inject_adapters(base, peft_config(lora, plan.targets, "base"), plan.targets, "fp32")
        base.module.train()
        loss_sum(base.module, batch[0].tensors).backward()
        trained = [p.grad for n, p in base.module.named_parameters() if n.endswith("lora_B.default.weight")]
        found[kind] = owned, len(trained), all(bool(grad.any()) for grad in trained)
    return found


def test_models_that_write_in_place(tmp_path):
    for kind in WRITERS:
        writer(kind, tmp_path)
    found, _ = run_ranks(2, gradients_of_writers, tmp_path)
    for kind, (owned, trained, moves) in found.items():
        net = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float64).eval()
        truth = reference.full_gradient(net, models.samples(SAMPLES), list(owned))
        worst = max((reference.relative(G, truth[name]), name) for name, G in owned.items())
        assert worst[0] <= TOLERANCE, (kind, worst)
        assert trained == len(owned)
        assert moves


def blocks_with_a_graph(folder, checkpointing: str, first: int):
    """Runs on a rank: which blocks' outputs need a gradient while targets from block ``first`` on are captured."""
    from lora_one_dist.base import blocks as blocks_module
    from lora_one_dist.initialise import gradient

    base, targets = load_base(folder, "zero3", checkpointing)
    layers = [target for target in targets if int(target.name.split(".")[2]) >= first]
    (batch,) = gradient.deal_micro_batches(models.samples(1), 1, "token", 1, pad_token_id=0)
    found = []
    handles = [
        block.register_forward_hook(lambda _, __, output: found.append(output.requires_grad))
        for block in blocks_module.blocks(base.module)
    ]
    gradient.full_gradient(base, layers, [0] * len(layers), batch, "device")
    held = [p.ds_status.name for p in base.module.parameters()]
    assert set(held) == {"NOT_AVAILABLE"}, "nothing stays gathered"
    for handle in handles:
        handle.remove()
    with base.gathered(base.module.parameters()):
        embedded = base.module.get_input_embeddings()(torch.tensor([[3]]))
    return found[: len(handles)], embedded.requires_grad


def blocks_with_a_graph_each(folder, checkpointing: str, firsts):
    return [blocks_with_a_graph(folder, checkpointing, first) for first in firsts]


def products(folder, checkpointing: str, endings: str | list[str]):
    """Runs on a rank: how often the linear layers run in the gradient phase, and in a step of the adapters on them."""
    from lora_one_dist.adapters.lora import inject_adapters, peft_config
    from lora_one_dist.base.loss import loss_sum
    from lora_one_dist.base.targets import find_targets
    from lora_one_dist.initialise import gradient

    base, _ = load_base(folder, "zero3", checkpointing)
    targets = find_targets(base.module, LoraConfig(r=4, target_modules=endings))
    (batch,) = gradient.deal_micro_batches(models.samples(1), 1, "token", 1, pad_token_id=0)
    linear = {name: m for name, m in base.module.named_modules() if isinstance(m, torch.nn.Linear)}
    counts: dict[str, int] = {}

    def count(name: str):
        counts[name] = 0
        return lambda *_: counts.update({name: counts[name] + 1})

    for name, layer in linear.items():
        layer.register_forward_hook(count(name))
    gradient.full_gradient(base, targets, [0] * len(targets), batch, "device")
    in_gradient_phase, counts = dict(counts), dict.fromkeys(counts, 0)
    description = peft_config(LoraConfig(r=4, target_modules=endings), targets, str(folder))
    inject_adapters(base, description, targets, "fp32")
    base.module.train()
    loss_sum(base.module, batch[0].tensors).backward()
    return in_gradient_phase, counts


@pytest.mark.parametrize(
    ("ranks", "checkpointing", "endings"),
    [
        (2, "non_reentrant", "all-linear"),
        (1, "non_reentrant", ["q_proj", "down_proj"]),
        pytest.param(1, "non_reentrant", ["q_proj", "v_proj"], marks=pytest.mark.full),
        pytest.param(1, "reentrant", "all-linear", marks=pytest.mark.full),
        (1, "none", "all-linear"),
    ],
)
def test_a_recomputation_ends_at_the_input_of_the_last_linear_layer(ranks, checkpointing, endings, model_folder):
    for found in run_ranks(ranks, products, model_folder("llama"), checkpointing, endings)[0]:
        blocks = 1 + max(int(name.split(".")[2]) for name in found if name != "lm_head")
        for name, times in found.items():
            once = checkpointing == "none" or name == "lm_head" or f"layers.{blocks - 1}." in name
            ends = checkpointing == "non_reentrant" and name.endswith("down_proj")
            assert times == (1 if once or ends else 2), name


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
def test_backward_ends_at_the_first_block_of_the_group(checkpointing, model_folder):
    firsts = (0, 2, 3)
    each = run_ranks(2, blocks_with_a_graph_each, model_folder("llama"), checkpointing, firsts)[0]
    for first, (with_graph, embedded) in zip(firsts, each, strict=True):
        assert with_graph == [block >= first for block in range(4)]
        assert embedded, "training starts at the embedding again"


class BehindAnotherStack(torch.nn.Module):
    """A model whose first module list, say of a vision tower, never runs on text."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.tower = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
        self.model = model

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()


def test_a_stack_in_front_that_does_not_run_is_left_alone():
    model = models.llama().requires_grad_(False)
    model.enable_input_require_grads()
    whole = BehindAnotherStack(model)
    ids = torch.arange(3, 9)[None]
    for layers in (["model.model.layers.2.mlp.up_proj"], ["model.model.layers.0.mlp.up_proj"], ["model.lm_head"]):
        with gradient._backward_down_to(whole, {whole.get_submodule(name) for name in layers}):
            output = model(input_ids=ids, output_hidden_states=True)
        assert output.logits.requires_grad
        assert output.hidden_states[1].requires_grad == (layers[0] != "model.model.layers.2.mlp.up_proj")
