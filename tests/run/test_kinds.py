"""Every kind of adapter over whole runs: against a float64 loop on plain weights, through PEFT, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lora_one_dist.config.reading import parse_config
from lora_one_dist.data import batches
from tests import models, reference
from tests.ranks import run_ranks
from tests.run.test_resume import losses_of, train_until
from tests.run.test_tables import largest_gap, samples_of
from tests.runs import metrics, peft_eval_loss, settings, train

STEPS = 20
TOLERANCE = 1e-6  # of the loss: fp32 rounds each weight to 6e-8, and 20 steps carry it on; measured 2e-7 to 6e-7
SB = {"lora__kind": "lora_sb", "init__method": "lora_sb"}
KINDS = {
    # Where B starts at zero AdamW's second step divides rounding by itself; not so with a larger eps.
    "dora": {"lora__kind": "dora", "init__method": "lora", "optim__eps": 1e-4},
    "dora from lora_one": {"lora__kind": "dora"},
    "dora from pissa": {"lora__kind": "dora", "init__method": "pissa"},
    "lora_sb": {**SB, "lora__alpha": 4.0, "lora__use_rslora": False, "optim__lr": 2e-3},
}
PRO = {
    "lora_pro": {"init__method": "lora_one_v1", "optim__lr": 1e-3},
    "lora_pro sgd": {"init__method": "lora_one_v1", "optim__name": "sgd", "optim__lr": 0.03},
}
KINDS |= {kind: {**changes, "optim__preconditioner": "lora_pro"} for kind, changes in PRO.items()}
FIXED = {"train__max_steps": STEPS, "optim__weight_decay": 0.1, "optim__preconditioner": None}


def settings_of(kind: str, base: Path, out: Path) -> dict:
    changes = {**FIXED, **KINDS[kind]}
    if "dora" in kind:
        changes["optim__preconditioner"] = "none"
    return settings(base, out, **changes)


def start_of(kind: str, folder: Path, model, s: float) -> dict[str, dict[str, torch.Tensor]]:
    """By layer what is trained and what is held beside it, from the run's initial adapter."""
    name_of, found = "base_model.model.{}.{}".format, {}
    file = load_file(folder / "adapter_model.safetensors")
    for key in (key for key in file if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = (file[name_of(name, f"lora_{side}.weight")].double() for side in "AB")
        W = model.get_submodule(name).weight.detach().double()
        if KINDS[kind].get("init__method") in ("pissa", "lora_one_v1"):  # exported at rank 2r: [A; A0], [B | -B0]
            r = A.shape[0] // 2
            W, A, B = W + s * B[:, r:] @ A[r:], A[:r], B[:, :r]
        found[name] = {"W": W, "A": A, "B": B}
        if "dora" in kind:
            found[name]["m"] = file[name_of(name, "lora_magnitude_vector")].double()
    if kind == "lora_sb":
        frozen = load_file(folder / "lora_sb.safetensors")
        for name, held in found.items():
            exported, A, B = held["B"], frozen[f"{name}.lora_A"].double(), frozen[f"{name}.lora_B"].double()
            held |= {"A": A, "B": B, "R": B.T @ exported}
    return found


def weight_of(kind: str, held: dict[str, torch.Tensor], s: float) -> torch.Tensor:
    """A layer's weight with its adapter."""
    if kind == "lora_sb":
        return held["W"] + s * held["B"] @ held["R"] @ held["A"]
    whole = held["W"] + s * held["B"] @ held["A"]
    if "dora" in kind:
        return (held["m"] / whole.detach().norm(dim=1))[:, None] * whole
    return whole


def losses_in_one_process(kind: str, base: Path, folder: Path, raw: dict) -> list[float]:
    """Plain autograd on plain weights, torch's AdamW and clipping, all in float64."""
    config = parse_config(raw)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    s, losses = config.scaling, []
    layers = start_of(kind, folder, model, s)
    moments: dict[str, list] = {}
    trained = [t for held in layers.values() for key, t in held.items() if key in ("ABm" if kind != "lora_sb" else "R")]
    optimizer = torch.optim.AdamW(
        [t.requires_grad_() for t in trained], eps=config.optim.eps, weight_decay=config.optim.weight_decay
    )
    samples = samples_of(base, models.rows(100))
    for step in range(STEPS):
        weights = {f"{name}.weight": weight_of(kind, held, s) for name, held in layers.items()}

        def adapted(weights=weights, **inputs):
            return functional_call(model, weights, kwargs=inputs, tie_weights=False)

        chosen = batches.global_batch(len(samples), config.train.global_batch_size, step, config.train.seed)
        loss = reference.mean_loss(adapted, [samples[i] for i in chosen])
        losses.append(float(loss.detach()))
        rate = config.optim.lr * (1 - step / STEPS)
        if kind in PRO:
            grads = dict(zip(layers, torch.autograd.grad(loss, list(weights.values())), strict=True))
            step_of_lora_pro(layers, grads, moments, config, step + 1, rate)
            continue
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return losses


@torch.no_grad()
def step_of_lora_pro(layers, grads, moments, config, t, rate) -> None:
    """From the gradients of whole weights; X by Kronecker products, the best change of W by projections."""
    s, (first, second) = config.scaling, config.optim.betas
    of_pairs = [s * x for name, G in grads.items() for x in (layers[name]["B"].T @ G, G @ layers[name]["A"].T)]
    norm = torch.sqrt(sum(x.square().sum() for x in of_pairs))
    for name, G in grads.items():
        A, B = layers[name]["A"], layers[name]["B"]
        G = G * min(1.0, config.optim.max_grad_norm / (float(norm) + 1e-6))
        eye = torch.eye(A.shape[0], dtype=A.dtype)
        BB, AA = B.T @ B + 1e-8 * eye, A @ A.T + 1e-8 * eye  # the authors' damping
        if config.optim.name == "adamw":
            left, right = B @ torch.linalg.inv(BB) @ B.T, A.T @ torch.linalg.inv(AA) @ A
            best = left @ G + (G - left @ G) @ right
            m, v = moments.setdefault(name, [0.0, 0.0])
            m, v = first * m + (1 - first) * best, second * v + (1 - second) * best**2
            moments[name] = [m, v]
            G = (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + config.optim.eps)
        dA = torch.linalg.solve(BB, B.T @ G) / s
        dB = (G - B @ torch.linalg.solve(BB, B.T @ G)) @ A.T @ torch.linalg.inv(AA) / s
        known = -(dA @ A.T).flatten()
        X = torch.linalg.solve(torch.kron(BB, eye) + torch.kron(eye, AA.T.contiguous()), known).view_as(eye)
        A.mul_(1 - rate * config.optim.weight_decay).sub_(rate * (dA + X @ A))
        B.mul_(1 - rate * config.optim.weight_decay).sub_(rate * (dB - B @ X))


def train_each(raws: list[dict], stop: int = 0) -> list[str]:
    """Runs on a rank: one run after another, each stopped in step ``stop`` if one is given.  How each ended."""
    if not stop:
        return [str(train(raw)["steps"]) for raw in raws]
    return [train_until(raw, stop) for raw in raws]


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Folders of whole runs of every kind at a number of ranks, made once."""
    made: dict[int, Path] = {}

    def at(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("kinds") / "data-beside"
            raws = [settings_of(kind, model_folder("llama"), made[ranks] / kind) for kind in KINDS]
            run_ranks(ranks, train_each, raws)
        return made[ranks]

    return at


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 3, 4))])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_one_process_in_float64_and_the_export_gives_the_last(kind, ranks, runs, model_folder):
    out, base = runs(ranks) / kind, model_folder("llama")
    truth = losses_in_one_process(kind, base, out / "adapter_init", settings_of(kind, base, out))
    by_peft = peft_eval_loss(base, out / "adapter", models.rows(21, seed=1), torch.float32)
    gap, last = largest_gap(losses_of(out), truth), metrics(out)[-1]["eval_loss"]
    print(f"losses {truth[0]:.4f} to {truth[-1]:.4f}, gap {gap:.1e}; PEFT {by_peft - last:.1e}")
    assert last < metrics(out)[0]["eval_loss"] - 0.05
    assert gap <= TOLERANCE * truth[0]
    assert abs(by_peft - last) <= TOLERANCE * last


def test_goes_on_at_another_number_of_ranks(runs, model_folder, tmp_path):
    raws = [settings_of(kind, model_folder("llama"), tmp_path / "runs" / kind) for kind in KINDS]
    assert run_ranks(3, train_each, raws, 9) == [["stopped"] * len(KINDS)] * 3
    run_ranks(1, train_each, raws)
    for kind in KINDS:
        straight = losses_of(runs(2) / kind)
        assert largest_gap(losses_of(tmp_path / "runs" / kind), straight) <= TOLERANCE * straight[0], kind


def test_begins_from_an_adapter_of_its_kind(runs, model_folder, tmp_path):
    base, kinds = model_folder("llama"), ("dora", "lora_sb")
    raws = []
    for kind in kinds:
        raw = settings_of(kind, base, tmp_path / "runs" / kind)
        raw["init"], raw["train"]["max_steps"] = {"adapter": str(runs(2) / kind / "adapter")}, 0
        raws.append(raw)
    run_ranks(1, train_each, raws)
    for kind in kinds:
        started, last = tmp_path / "runs" / kind / "adapter_init", metrics(runs(2) / kind)[-1]["eval_loss"]
        # LoRA-SB's core comes from a QR of what was exported.
        assert peft_eval_loss(base, started, models.rows(21, seed=1), torch.float32) == pytest.approx(last, rel=1e-6)
