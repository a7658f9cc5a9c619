"""Rows of the battery that need no run: products, SVDs, loss, adapters, gradients, and the groups of a job."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tools.bench import harness
from tools.gpu.row import Figure, Skip

ON_GPU = torch.cuda.is_available()
DEVICE = harness.device()
SEED = 0


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """The least of some, the first one left out."""
    harness.timed(work)
    return min(harness.timed(work) for _ in range(repeats))


def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(SEED + sum(size))
    return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def environment() -> Figure:
    """The package imports, DeepSpeed has the right accelerator, and fp32 is fp32 whatever the environment says."""
    from lora_one_dist.cluster import comm

    start()
    from lora_one_dist.base import sharding

    accelerator = sharding.accelerator()
    precision = torch.get_float32_matmul_precision()
    ok = precision == "highest" and accelerator == DEVICE.type == comm.device().type
    return Figure(ok, f"{accelerator}, fp32 products {precision}", f"{DEVICE.type}, highest")


def start() -> None:
    """Join a job of this process alone, or the one that a launcher has started.  Once."""
    from lora_one_dist.cluster import comm

    if comm._state is None:
        torch.set_float32_matmul_precision("high")  # as some containers set it: the start must set it back
        comm.init()


def products() -> Figure:
    """dY' X of bf16 in fp32, as the gradient phase forms it."""
    from lora_one_dist.base.products import weight_gradient

    m, n = (28672, 8192) if ON_GPU else (704, 256)
    worst, speed = 0.0, 0.0
    for tokens in (2, 137, 4096 if ON_GPU else 512):
        dY, X = random(tokens, m, dtype=torch.bfloat16), random(tokens, n, dtype=torch.bfloat16)
        G = weight_gradient(dY, X)
        rows = slice(0, 512)
        worst = max(worst, relative(G[rows], dY[:, rows].double().T @ X.double()))
        took = seconds(partial(weight_gradient, dY, X, G))
        speed = 2.0 * tokens * m * n / took / 1e12
    ok = worst <= 2e-6 and (not ON_GPU or speed >= 350)
    text = f"error {worst:.1e} to fp64, {speed:.3g} TFLOP/s with the sum"
    return Figure(ok, text, "2e-6; on an H100 350 TFLOP/s", {"error": worst, "tflops": speed})


def svd() -> Figure:
    """Truncated SVDs of known spectra: certified, right, quick, and the same bits twice."""
    from lora_one_dist.initialise import spectral

    start()  # sets the precision
    shapes = [(4096, 4096), (14336, 4096), (1024, 4096), (28672, 8192)] if ON_GPU else [(512, 512), (704, 256)]
    slowest, worst, same = {8: 0.0, 64: 0.0}, 0.0, True  # worst: over what fp32 can show of such a spectrum, or 1e-3
    for m, n in shapes:
        k = min(m, n, 1024)
        U, V = (torch.linalg.qr(random(side, k)).Q for side in (m, n))
        G = (U * torch.arange(1, k + 1, device=DEVICE) ** -0.7) @ V.T
        for r in slowest:
            if spectral.krylov_width(r) * 2 > n:
                continue
            found = spectral.truncated_svd(G, r, SEED, 1e-3)
            again = spectral.truncated_svd(G, r, SEED, 1e-3)
            same = same and torch.equal(found.Vh, again.Vh)
            sine = float(torch.linalg.matrix_norm((found.Vh.T - V[:, :r] @ (V[:, :r].T @ found.Vh.T)).double(), 2))
            floor = spectral.RESIDUAL_FLOOR * float(found.S[0] / found.S[r - 1]) / max(found.gap, spectral.SMALL_GAP)
            worst = max(worst, found.error / max(1e-3, floor), sine / 1e-3)
            slowest[r] = max(slowest[r], seconds(partial(spectral.truncated_svd, G, r, SEED, 1e-3), 2))
    norm = seconds(lambda: spectral.frobenius_norm(G))
    limits = {8: 0.1, 64: 0.4}
    ok = worst <= 1 and same and (not ON_GPU or all(slowest[r] <= limits[r] for r in limits))
    text = f"error {worst:.2g} of its bound, {slowest[8]:.3f} s at r 8, {slowest[64]:.3f} s at r 64"
    text += f", norm {norm * 1e3:.1f} ms"
    numbers = {"error": worst, "seconds": slowest, "norm_seconds": norm, "same_bits": same}
    text += "" if same else ", other bits the second time"
    return Figure(ok, text, "1; on an H100 0.1 and 0.4 s", numbers)


def preconditioner() -> Figure:
    """(B'B + d I)^-1 gA in fp64, of 80 layers at once; the time with the norm given back, as AdamW has it."""
    from lora_one_dist.train.precondition import precondition

    k, r, m, n = (80, 64, 8192, 8192) if ON_GPU else (4, 8, 96, 64)
    A, B, gA, gB = random(k, r, n), random(k, m, r), random(k, r, n) + 1, random(k, m, r) + 1
    new_A, _ = precondition(A, B, gA, gB, 1e-6)
    gram = B.double().mT @ B.double() + 1e-6 * torch.eye(r, device=DEVICE, dtype=torch.float64)
    error = relative(new_A, torch.linalg.solve(gram, gA.double()))
    took = seconds(lambda: precondition(A, B, gA, gB, 1.0, rescale=True))
    ok = error <= 1e-6
    return Figure(ok, f"error {error:.1e}, {took * 1e3:.1f} ms", "1e-6 (rounded once to fp32)", {"seconds": took})


def loss() -> Figure:
    """Head and cross-entropy in pieces, against whole logits in fp32: loss, gradient, memory."""
    from lora_one_dist.base import head

    tokens, hidden, words = (4096, 4096, 128256) if ON_GPU else (300, 64, 1000)
    H, W = random(tokens, hidden, dtype=torch.bfloat16), random(words, hidden, dtype=torch.bfloat16) / hidden**0.5
    labels = torch.randint(0, words, (tokens,), device=DEVICE)
    leaf: Any = H.clone().requires_grad_()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    found = head._HeadLoss.apply(leaf, labels, 1.0, W, None, head._same)
    found.backward()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30 if ON_GPU else 0.0
    part = slice(0, 256)
    exact: Any = H[part].float().requires_grad_()
    truth = nn.functional.cross_entropy(exact @ W.float().T, labels[part], reduction="sum")
    truth.backward()
    alone = head._HeadLoss.apply(H[part], labels[part], 1.0, W, None, head._same)
    loss_error = abs(float(alone) / float(truth.detach()) - 1)
    error = relative(leaf.grad[part], exact.grad)
    took = seconds(lambda: head._HeadLoss.apply(leaf, labels, 1.0, W, None, head._same))
    ok = loss_error <= 1e-4 and error <= 1e-2 and extra <= 3.0
    text = f"loss {loss_error:.1e}, gradient {error:.1e}, {took * 1e3:.1f} ms forward and back, {extra:.2f} GiB"
    return Figure(ok, text, "1e-4, 1e-2 (bf16), below 3 GiB (whole logits: 5)", {"seconds": took, "gib": extra})


def branch() -> Figure:
    """The adapted layer against PEFT's own, forward and backward in bf16."""
    from peft import LoraConfig, inject_adapter_in_model

    from lora_one_dist.adapters.branch import ADAPTER, AdaptedLinear
    from lora_one_dist.base.products import FrozenLinear

    tokens, m, n, r = (4096, 14336, 4096, 16) if ON_GPU else (64, 96, 64, 4)

    def layer(ours: bool) -> Any:
        net: Any = nn.Sequential(nn.Linear(n, m, bias=False, device=DEVICE, dtype=torch.bfloat16)).requires_grad_(False)
        torch.manual_seed(SEED)
        net[0].weight.data.copy_(random(m, n) / n**0.5)
        inject_adapter_in_model(LoraConfig(r=r, target_modules=["0"]), net)
        adapted: Any = net[0]
        adapted.to(DEVICE, torch.bfloat16)
        adapted.lora_A[ADAPTER].weight.data.copy_(random(r, n) / n**0.5)
        adapted.lora_B[ADAPTER].weight.data.copy_(random(m, r) / 10)
        if ours:
            adapted.__class__, adapted.base_layer.__class__ = AdaptedLinear, FrozenLinear
        return net

    x, dy = random(tokens, n, dtype=torch.bfloat16), random(tokens, m, dtype=torch.bfloat16)
    found, took = {}, {}
    nets: dict[str, Any] = {"ours": layer(True), "PEFT": layer(False)}
    for name, net in nets.items():
        leaf: Any = x.clone().requires_grad_()

        work = partial(_forward_backward, net, leaf, dy)
        y = work()
        adapted = net[0]
        grads = (adapted.lora_A[ADAPTER].weight.grad, adapted.lora_B[ADAPTER].weight.grad)
        found[name] = [y.detach().clone(), leaf.grad.clone(), *(g.clone() for g in grads)]
        took[name] = seconds(work)
    error = max(relative(a, b) for a, b in zip(found["ours"], found["PEFT"], strict=True))
    ratio = took["PEFT"] / took["ours"]
    ok = error <= 1e-2 and (not ON_GPU or ratio >= 1.05)
    return Figure(
        ok, f"error {error:.1e}, {ratio:.2f} times as fast as PEFT's", "1e-2; on a GPU 1.05", {"ratio": ratio}
    )


def _forward_backward(net: Any, leaf: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    y = net(leaf)
    y.backward(dy)
    return y


def gradient() -> Figure:
    """The one-step gradient of a small Llama on this device against plain autograd in fp64."""
    import transformers

    from lora_one_dist.base import products, recompute
    from lora_one_dist.base.sharding import Base
    from lora_one_dist.base.targets import find_targets
    from lora_one_dist.config.settings import LoraConfig
    from lora_one_dist.initialise import gradient as phase

    start()
    config = harness.model_config((64, 96, 3, 4, 2, 64))
    generator = torch.Generator().manual_seed(SEED)
    samples: list[dict[str, Any]] = []
    for length in (9, 17, 5, 12):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        samples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "num_targets": length - 2})
    torch.manual_seed(SEED)
    exact: Any = transformers.LlamaForCausalLM(config).double()
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        logits = exact(input_ids=torch.tensor([sample["input_ids"]])).logits[0, 1:-1]
        loss = loss + nn.functional.cross_entropy(logits, torch.tensor(sample["labels"][2:]), reduction="sum")
    (loss / sum(sample["num_targets"] for sample in samples)).backward()
    worst = {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for reentrant in (None, True, False):
            model: Any = transformers.LlamaForCausalLM(config)
            model.load_state_dict(exact.state_dict())
            model = model.to(DEVICE, dtype).requires_grad_(False)
            model.config.use_cache = False
            products.freeze_products(model)
            count = 0 if reentrant is None else recompute.most_blocks(model)
            recompute.recompute_blocks(model, count, reentrant is True)
            model.enable_input_require_grads()
            targets = find_targets(model, LoraConfig(r=4))
            (batch,) = phase.deal_micro_batches(samples, 2, "token", 1, 0)
            found, _ = phase.full_gradient(Base(model, 1), targets, [0] * len(targets), batch, "device")
            errors = [relative(G.cpu(), exact.get_submodule(name).weight.grad) for name, G in found.items()]
            worst[f"{dtype}, {reentrant}"] = (max(errors), limit)
    ok = all(error <= limit for error, limit in worst.values())
    most = {kind: max(e for name, (e, _) in worst.items() if kind in name) for kind in ("float32", "bfloat16")}
    return Figure(ok, f"fp32 {most['float32']:.1e}, bf16 {most['bfloat16']:.1e}", "1e-5, 3e-2", most)


def groups() -> Figure:
    """Of a job of several ranks: right sums and the bandwidth of NCCL (or gloo) in each group.  Never tried on GPUs."""
    from lora_one_dist.cluster import comm, hierarchy

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise Skip("one rank: start it with a launcher, deepspeed tools/gpu/battery.py --rows groups")
    start()
    ranks, elements = comm.world_size(), (2**26 if ON_GPU else 2**18)
    share = elements // ranks
    flat = torch.arange(share * ranks, device=DEVICE, dtype=torch.float32) % 7 + comm.rank()
    expected = (torch.arange(share * ranks, device=DEVICE) % 7) * ranks + ranks * (ranks - 1) / 2
    slot = hierarchy.slot()
    own = hierarchy.reduce_scatter(flat)
    right = torch.equal(own, expected[slot * share : (slot + 1) * share])
    whole = torch.empty_like(flat)
    hierarchy.all_gather(whole, own)
    right = right and torch.equal(whole, expected)
    timings = {
        "all-reduce": seconds(lambda: comm.all_sum(flat.clone()), 3),
        "reduce-scatter": seconds(lambda: hierarchy.reduce_scatter(flat), 3),
        "all-gather": seconds(lambda: hierarchy.all_gather(whole, own), 3),
    }
    rates = {name: 4 * share * (ranks - 1) / took / 1e9 for name, took in timings.items()}
    rates["all-reduce"] *= 2
    answers = comm.all_gather_object(right)
    text = ", ".join(f"{name} {rate:.3g} GB/s a rank" for name, rate in rates.items())
    return Figure(all(answers), f"{ranks} ranks on {comm.num_hosts()} hosts: {text}", "right sums on every rank", rates)
