"""Every kind of adapter over whole runs: against a float64 loop on plain weights, through PEFT, stopped and resumed."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lora_one_dist.config.reading import parse_config
from lora_one_dist.convert import export
from lora_one_dist.data import batches
from lora_one_dist.disk.lazy import ConversionError
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
    "adalora": {
        **{"lora__kind": "adalora", "lora__use_rslora": False, "lora__alpha": 64.0, "init__method": "lora"},
        **{"lora__adalora_target_r": 2, "lora__adalora_warmup_steps": 4, "lora__adalora_final_steps": 5},
        **{"lora__adalora_interval": 3, "lora__adalora_orthogonal": 4.0, "optim__lr": 1e-2, "optim__eps": 1e-4},
        "optim__max_grad_norm": 0.1,  # below what the regulariser's gradient has to do with it
    },
}
PRO = {
    "lora_pro": {"init__method": "lora_one_v1", "optim__lr": 1e-3},
    "lora_pro sgd": {"init__method": "lora_one_v1", "optim__name": "sgd", "optim__lr": 0.03},
}
KINDS |= {kind: {**changes, "optim__preconditioner": "lora_pro"} for kind, changes in PRO.items()}
WITHOUT_PAIRS = ("lora_sb", "adalora")  # kinds that no preconditioner is for
SHORT = ("dora from pissa", "lora_sb", "adalora", "lora_pro")  # of make test
FIXED = {"train__max_steps": STEPS, "optim__weight_decay": 0.1, "optim__preconditioner": None}


def settings_of(kind: str, base: Path, out: Path) -> dict:
    changes = {**FIXED, **KINDS[kind]}
    if kind not in WITHOUT_PAIRS and kind not in PRO:
        changes["optim__preconditioner"] = "none"
    return settings(base, out, **changes)


def start_of(kind: str, folder: Path, model, s: float) -> dict[str, dict[str, torch.Tensor]]:
    """By layer what is trained and what is held beside it, from the run's initial adapter."""
    name_of, found = "base_model.model.{}.{}".format, {}
    if kind == "adalora":
        return start_of_adalora(folder.parent, model)
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


def start_of_adalora(run: Path, model) -> dict[str, dict[str, torch.Tensor]]:
    """From the files of the first checkpoint: the initial adapter has ``B diag(E)``, which is 0."""
    masters = {}
    for path in (run / "checkpoints" / "step-0").glob("optimizer-*.safetensors"):
        masters |= {key: value.double() for key, value in load_file(path).items() if key.endswith(".master")}
    found = {}
    for name in (key.removesuffix(".lora_E.master") for key in masters if "lora_E" in key):
        found[name] = {side: masters[f"{name}.lora_{side}.master"] for side in "ABE"}
        found[name]["W"] = model.get_submodule(name).weight.detach().double()
    return found


def weight_of(kind: str, held: dict[str, torch.Tensor], s: float) -> torch.Tensor:
    """A layer's weight with its adapter."""
    if kind == "lora_sb":
        return held["W"] + s * held["B"] @ held["R"] @ held["A"]
    if kind == "adalora":
        return held["W"] + s * held["B"] @ held["E"].diag() @ held["A"]
    whole = held["W"] + s * held["B"] @ held["A"]
    if "dora" in kind:
        return (held["m"] / whole.detach().norm(dim=1))[:, None] * whole
    return whole


class Triplets:
    """AdaLoRA's regulariser and pruning, as its paper and PEFT have them, one number after another."""

    def __init__(self, layers: dict[str, dict[str, torch.Tensor]], lora):
        self.layers, self.lora = layers, lora
        self.average = {(name, key): 0.0 for name in layers for key in "ABE"}
        self.spread = dict(self.average)
        self.gone: set[tuple[str, int]] = set()
        self.count = sum(len(held["E"]) for held in layers.values())

    def regulariser(self) -> torch.Tensor:
        grams = [held["A"] @ held["A"].T for held in self.layers.values()]
        grams += [held["B"].T @ held["B"] for held in self.layers.values()]
        off = [((gram - torch.eye(len(gram), dtype=torch.float64)) ** 2).sum().sqrt() for gram in grams]
        return self.lora.adalora_orthogonal * sum(off) / len(off)

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """After the optimizer's step ``step``, counted from 1."""
        last = STEPS - self.lora.adalora_final_steps
        if step < last:
            for name, key in self.average:
                value = self.layers[name][key]
                now = (value * value.grad).abs()
                self.average[name, key] = 0.85 * self.average[name, key] + 0.15 * now
                self.spread[name, key] = 0.85 * self.spread[name, key] + 0.15 * (now - self.average[name, key]).abs()
        first, kept = self.lora.adalora_warmup_steps, self.lora.adalora_target_r * len(self.layers)
        if step <= last and step > first and (step == last or step % self.lora.adalora_interval == 0):
            left = int(kept + (self.count - kept) * (1 - (step - first) / (last - first)) ** 3)
            self.gone = set(sorted(self.scores(), key=self.scores().get)[: self.count - left])
        elif step <= last:
            self.gone = set()
        for name, i in self.gone:
            self.layers[name]["E"][i] = 0.0

    def scores(self) -> dict[tuple[str, int], float]:
        found = {}
        for name, held in self.layers.items():
            A, B, E = (self.average[name, key] * self.spread[name, key] for key in "ABE")
            for i in range(len(held["E"])):
                found[name, i] = float(E[i] + A[i].mean() + B[:, i].mean())
        return found


def losses_in_one_process(kind: str, base: Path, folder: Path, raw: dict) -> list[float]:
    """Plain autograd on plain weights, torch's AdamW and clipping, all in float64."""
    config = parse_config(raw)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    s, losses = config.scaling, []
    layers = start_of(kind, folder, model, s)
    moments: dict[str, list] = {}
    which = {"lora_sb": "R", "adalora": "ABE"}.get(kind, "ABm")
    trained = [t for held in layers.values() for key, t in held.items() if key in which]
    triplets = Triplets(layers, config.lora) if kind == "adalora" else None
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
        (loss + triplets.regulariser() if triplets else loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if triplets:
            triplets.prune(step + 1)
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
    """The folder of a whole run of a kind at a number of ranks; made once, those of :data:`SHORT` in one launch."""
    made: dict[tuple[int, bool], Path] = {}

    def at(ranks: int, kind: str) -> Path:
        key = ranks, kind in SHORT
        if key not in made:
            made[key] = tmp_path_factory.mktemp("kinds") / "data-beside"
            kinds = [one for one in KINDS if (one in SHORT) == (kind in SHORT)]
            run_ranks(ranks, train_each, [settings_of(one, model_folder("llama"), made[key] / one) for one in kinds])
        return made[key] / kind

    return at


@pytest.fixture(scope="module")
def truths(runs, model_folder):
    """By kind the losses of one process, from the initial adapter of 2 ranks: that of others differs by rounding."""

    @functools.cache
    def of(kind: str) -> list[float]:
        base, out = model_folder("llama"), runs(2, kind)
        return losses_in_one_process(kind, base, out / "adapter_init", settings_of(kind, base, out))

    return of


CASES = [
    pytest.param(kind, ranks, marks=[] if (kind, ranks) in ((one, 2) for one in SHORT) else pytest.mark.full)
    for kind in KINDS
    for ranks in (1, 2, 3, 4)
]


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_losses_are_those_of_one_process_in_float64_and_the_export_gives_the_last(
    kind, ranks, runs, truths, model_folder
):
    out, base, truth = runs(ranks, kind), model_folder("llama"), truths(kind)
    by_peft = peft_eval_loss(base, out / "adapter", models.rows(21, seed=1), torch.float32)
    gap, last = largest_gap(losses_of(out), truth), metrics(out)[-1]["eval_loss"]
    print(f"losses {truth[0]:.4f} to {truth[-1]:.4f}, gap {gap:.1e}; PEFT {by_peft - last:.1e}")
    assert last < metrics(out)[0]["eval_loss"] - 0.05
    assert gap <= TOLERANCE * truth[0]
    assert abs(by_peft - last) <= TOLERANCE * last


@pytest.mark.full
def test_goes_on_at_another_number_of_ranks(runs, model_folder, tmp_path):
    raws = [settings_of(kind, model_folder("llama"), tmp_path / "runs" / kind) for kind in KINDS]
    assert run_ranks(3, train_each, raws, 9) == [["stopped"] * len(KINDS)] * 3
    run_ranks(1, train_each, raws)
    for kind in KINDS:
        straight = losses_of(runs(2, kind))
        assert largest_gap(losses_of(tmp_path / "runs" / kind), straight) <= TOLERANCE * straight[0], kind


@pytest.mark.full
def test_begins_from_an_adapter_of_its_kind(runs, model_folder, tmp_path):
    base, kinds = model_folder("llama"), ("dora", "lora_sb")
    raws = []
    for kind in kinds:
        raw = settings_of(kind, base, tmp_path / "runs" / kind)
        raw["init"], raw["train"]["max_steps"] = {"adapter": str(runs(2, kind) / "adapter")}, 0
        raws.append(raw)
    run_ranks(1, train_each, raws)
    for kind in kinds:
        started, last = tmp_path / "runs" / kind / "adapter_init", metrics(runs(2, kind))[-1]["eval_loss"]
        # LoRA-SB's core comes from a QR of what was exported.
        assert peft_eval_loss(base, started, models.rows(21, seed=1), torch.float32) == pytest.approx(last, rel=1e-6)


def test_goes_on_with_a_frozen_pair_and_with_the_triplets_that_were_left(runs, model_folder, tmp_path):
    """Among AdaLoRA's last steps."""
    kinds = ("lora_sb", "adalora")
    raws = [settings_of(kind, model_folder("llama"), tmp_path / "run" / kind) for kind in kinds]
    assert run_ranks(2, train_each, raws, 17) == [["stopped"] * 2] * 2
    run_ranks(1, train_each, raws)
    for kind in kinds:
        straight, went_on = runs(2, kind), tmp_path / "run" / kind
        assert largest_gap(losses_of(went_on), losses_of(straight)) <= TOLERANCE * losses_of(straight)[0]
    ranks = [json.loads((out / "adapter" / "adapter_config.json").read_text()) for out in (straight, went_on)]
    assert ranks[0]["rank_pattern"] == ranks[1]["rank_pattern"]
    with pytest.raises(ConversionError, match="B is exported with E in it, its master is not"):
        export.plan(went_on, masters=True)


@pytest.mark.full
def test_adalora_is_that_of_peft(runs, model_folder):
    """And not that of this file's reference alone: PEFT's layers, regulariser and RankAllocator, in float64."""
    base, out = model_folder("llama"), runs(2, "adalora")
    config = parse_config(settings_of("adalora", base, out))
    lora = config.lora
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    start = start_of_adalora(out, model)
    schedule = {"tinit": lora.adalora_warmup_steps, "tfinal": lora.adalora_final_steps, "total_step": STEPS}
    described = AdaLoraConfig(
        init_r=lora.r,
        target_r=lora.adalora_target_r,
        lora_alpha=lora.alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in start}),
        deltaT=lora.adalora_interval,
        orth_reg_weight=lora.adalora_orthogonal,
        task_type="CAUSAL_LM",
        **schedule,
    )
    peft = get_peft_model(model, described, autocast_adapter_dtype=False)
    for name, held in start.items():
        layer = peft.base_model.model.get_submodule(name)
        for side in "ABE":
            parameter = getattr(layer, f"lora_{side}")["default"]
            parameter.data = held[side].reshape(parameter.shape).clone()
    # PEFT 0.21 would train its divisor of alpha too where it moves an adapter to another type, here fp64.
    trained = [p for name, p in peft.named_parameters() if p.requires_grad and "ranknum" not in name]
    assert len(trained) == 3 * len(start)
    optimizer = torch.optim.AdamW(trained, eps=config.optim.eps, weight_decay=config.optim.weight_decay)
    samples, losses = samples_of(base, models.rows(100)), []
    ids = torch.tensor([samples[0]["input_ids"]])
    for step in range(STEPS):
        chosen = batches.global_batch(len(samples), config.train.global_batch_size, step, config.train.seed)
        loss = reference.mean_loss(peft, [samples[i] for i in chosen])
        # PEFT adds its regulariser to the loss that a model gives: of some ids, without that loss.
        added = peft(input_ids=ids, labels=ids).loss - peft.base_model.model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        (loss + added).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.optim.lr * (1 - step / STEPS)
        optimizer.step()
        peft.base_model.update_and_allocate(step + 1)
        losses.append(float(loss.detach()))
    gap = largest_gap(losses_of(out), losses)
    print(f"losses {losses[0]:.4f} to {losses[-1]:.4f}, gap {gap:.1e}")
    assert gap <= TOLERANCE * losses[0]
    left = {name: int((peft.base_model.model.get_submodule(name).lora_E["default"] != 0).sum()) for name in start}
    exported = load_file(out / "adapter" / "adapter_model.safetensors")
    kept = {name: len(exported[f"base_model.model.{name}.lora_A.weight"]) for name in start}
    assert kept == {name: max(1, count) for name, count in left.items()}
    assert sum(left.values()) == lora.adalora_target_r * len(start)
