"""Does the suite notice?  Plants one error at a time in a copy of the package and expects the named tests to fail.

    .venv/bin/python tests/planted_errors.py [name ...]

Prints a line per error; exits 1 if any went unnoticed.  About three minutes on two cores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("lora_one_dist", "tests", "ds_configs", "launch", "pyproject.toml")


@dataclass(frozen=True)
class Planted:
    """Replace each old text (it must occur) by the new one in a file of the package; the named tests must fail."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: str
    only: str


ERRORS = [
    Planted(
        "one layer's gradient off by 1e-3",
        "gradient.py",
        (
            (
                "            G = weight_gradient(grad_output, layer_input)\n",
                "            G = weight_gradient(grad_output, layer_input)\n"
                "            G *= 1.001 if name.endswith('1.mlp.down_proj') else 1.0\n",
            ),
        ),
        "test_gradient.py",
        "llama",
    ),
    Planted(
        "U and V swapped (where a square layer hides it from the shapes)",
        "spectral.py",
        (
            (
                "    return root[:, None] * svd.Vh[:r], -svd.U[:, :r] * root\n",
                "    if svd.U.shape[0] == svd.Vh.shape[1]:\n"
                "        return root[:, None] * svd.U[:, :r].T, -svd.Vh[:r].T * root\n"
                "    return root[:, None] * svd.Vh[:r], -svd.U[:, :r] * root\n",
            ),
        ),
        "test_initialize.py",
        "float64_svd and lora_one",
    ),
    Planted(
        "the sign of -G dropped",
        "spectral.py",
        (("-svd.U[:, :r] * root\n", "svd.U[:, :r] * root\n"),),
        "test_initialize.py",
        "base_and_loss and lora_one",
    ),
    Planted(
        "the preconditioner after the moments",
        "optim.py",
        (
            (
                '            if config.preconditioner == "riemannian":\n'
                "                pair = precondition(A, B, *pair, config.damping)\n",
                "            before = (A.clone(), B.clone())\n",
            ),
            (
                "                    config.weight_decay,\n                )\n",
                "                    config.weight_decay,\n                )\n"
                '            if config.preconditioner == "riemannian":\n'
                "                moved = precondition(*before, A - before[0], B - before[1], config.damping)\n"
                "                A.copy_(before[0] + moved[0])\n"
                "                B.copy_(before[1] + moved[1])\n",
            ),
        ),
        "test_optim.py",
        "float64_loop",
    ),
    Planted(
        "no clipping",
        "optim.py",
        (("if self.config.max_grad_norm > 0:", "if self.config.max_grad_norm > 1e9:"),),
        "test_optim.py",
        "float64_loop",
    ),
    Planted(
        "a mean of means instead of a token mean, in training",
        "train.py",
        (
            (
                "        part = model.loss_sum(base.module, batch) / targets\n",
                "        own = max(1, int((batch['labels'][:, 1:] != -100).sum()))\n"
                "        part = model.loss_sum(base.module, batch) / own / (len(indices) / len(samples))\n",
            ),
        ),
        "test_train.py",
        "token_mean",
    ),
    Planted(
        "a mean of means instead of a token mean, in the gradient",
        "gradient.py",
        (('            elif average == "token":\n', '            elif average == "tokens":\n'),),
        "test_gradient.py",
        "token",
    ),
    Planted(
        "B preconditioned by the already updated A",
        "optim.py",
        (
            (
                "    new_B = _solve_damped(A64 @ A64.mT,",
                "    A64 = A64 - 1e-2 * new_A\n    new_B = _solve_damped(A64 @ A64.mT,",
            ),
        ),
        "test_optim.py",
        "float64_loop or near_singular",
    ),
    Planted(
        "an fp32 Gram",
        "optim.py",
        (("_solve_damped(B64.mT @ B64,", "_solve_damped((B.mT @ B).double(),"),),
        "test_optim.py",
        "near_singular",
    ),
    Planted(
        "the base compensated with the wrong sign",
        "initialize.py",
        (("adapter.A.detach(), -scaling)", "adapter.A.detach(), scaling)"),),
        "test_initialize.py",
        "base_and_loss and lora_ga",
    ),
    Planted(
        "the exported rank-2r scale doubled under rsLoRA",
        "checkpoint.py",
        (("(math.sqrt(2) if lora.use_rslora else 2)", "2"),),
        "test_train.py",
        "loads_in_peft and lora_ga",
    ),
    Planted(
        "a rank's idle micro-batch not weightless",
        "gradient.py",
        (
            ("weightless=not positions)", "weightless=False)"),
            ("            if not positions or own_targets == 0:\n", "            if own_targets == 0:\n"),
        ),
        "test_gradient.py",
        "3-zero3 or 3-stage0 or 4-zero3",
    ),
    Planted(
        "a parameter's whole copy not compensated",
        "sharding.py",
        (("    if gathered and ", "    if False and "),),
        "test_initialize.py",
        "base_and_loss and lora_ga",
    ),
]


def noticed(error: Planted) -> bool:
    """Run the named tests on a copy that holds the error; True if they fail, with failures rather than no tests."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        path = copy / "lora_one_dist" / error.file
        text = path.read_text(encoding="utf-8")
        for old, new in error.edits:
            assert old in text, f"{error.name}: {error.file} changed, mend this list"
            text = text.replace(old, new, 1)
        path.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{error.tests}", "-k", error.only]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert result.returncode in (0, 1), result.stdout[-2000:] + result.stderr[-2000:]
        return result.returncode == 1


def main() -> int:
    chosen = [error for error in ERRORS if not sys.argv[1:] or error.name in sys.argv[1:]]
    missed = 0
    for error in chosen:
        caught = noticed(error)
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}  {error.name}  ({error.tests} -k '{error.only}')", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
