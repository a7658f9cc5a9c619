"""Does the suite notice?  Plants one error at a time in a copy of the package and expects the named tests to fail.

    .venv/bin/python tests/planted_errors.py [name ...]

Prints a line per error; exits 1 if any went unnoticed.  About nine minutes on two cores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("lora_one_dist", "tests", "tools", "ds_configs", "launch", "pyproject.toml")
AT_ONCE = 2  # errors tried at a time, each in a copy of its own


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
        "initialise/gradient.py",
        (
            (
                "            self.pending.append(",
                "            G *= 1.001 if name.endswith('1.mlp.down_proj') else 1.0\n            self.pending.append(",
            ),
        ),
        "initialise/test_gradient.py",
        "llama",
    ),
    Planted(
        "U and V swapped (where a square layer hides it from the shapes)",
        "initialise/spectral.py",
        (
            (
                "    return root[:, None] * svd.Vh[:r], -svd.U[:, :r] * root\n",
                "    if svd.U.shape[0] == svd.Vh.shape[1]:\n"
                "        return root[:, None] * svd.U[:, :r].T, -svd.Vh[:r].T * root\n"
                "    return root[:, None] * svd.Vh[:r], -svd.U[:, :r] * root\n",
            ),
        ),
        "initialise/test_pairs.py",
        "float64_svd and lora_one",
    ),
    Planted(
        "the sign of -G dropped",
        "initialise/spectral.py",
        (("-svd.U[:, :r] * root\n", "svd.U[:, :r] * root\n"),),
        "initialise/test_pairs.py",
        "base_and_loss and lora_one",
    ),
    Planted(
        "the preconditioner after the moments",
        "train/optim.py",
        (
            (
                "            if self.preconditions:\n",
                "            before = [value.clone() for value in values.values()]\n            if False:\n",
            ),
            (
                "config.eps, config.weight_decay)\n",
                "config.eps, config.weight_decay)\n            A, B = values.values()\n"
                "            if config.damping_in_force is not None:\n"
                '                rescale = config.form == "rescaled"\n'
                "                moved = precondition(\n"
                "                    *before, A - before[0], B - before[1], damping_at(lr, config), rescale\n"
                "                )\n"
                "                A.copy_(before[0] + moved[0])\n"
                "                B.copy_(before[1] + moved[1])\n",
            ),
        ),
        "train/test_optim.py",
        "float64_loop",
    ),
    Planted(
        "no clipping",
        "train/updates.py",
        (("if limit > 0 else 1.0", "if limit > 1e9 else 1.0"),),
        "train/test_optim.py",
        "float64_loop",
    ),
    Planted(
        "a mean of means instead of a token mean, in training",
        "train/loop.py",
        (
            (
                "        part = loss_sum(base.module, batch, 1 / targets)\n",
                "        own_targets = max(1, int((batch['labels'][:, 1:] != -100).sum()))\n"
                "        own_targets *= len(own) * comm.world_size()\n"
                "        part = loss_sum(base.module, batch, 1 / own_targets)\n",
            ),
        ),
        "run/test_story.py",
        "token_mean",
    ),
    Planted(
        "a mean of means instead of a token mean, in the gradient",
        "initialise/gradient.py",
        (('            elif average == "token":\n', '            elif average == "tokens":\n'),),
        "initialise/test_gradient.py",
        "token",
    ),
    Planted(
        "B preconditioned by the already updated A",
        "train/precondition.py",
        (
            (
                "        inverse_A, failed_A",
                "        A64 = A64 - 1e-2 * (inverse_B @ grad_A_i.double())\n        inverse_A, failed_A",
            ),
        ),
        "train/test_optim.py",
        "float64_loop or near_singular",
    ),
    Planted(
        "a damping that does not grow as the rate falls",
        "train/precondition.py",
        (("damping / max(lr / config.lr, FAINTEST) if", "damping if"),),
        "train/test_optim.py",
        "float64_loop and rescaled",
    ),
    Planted(
        "a rescaled gradient with the norm of all layers of a stack",
        "train/precondition.py",
        (("(torch.linalg.matrix_norm(t, keepdim=True, dtype=torch.float64) for t", "(t.double().norm() for t"),),
        "train/test_optim.py",
        "float64_loop",
    ),
    Planted(
        "an fp32 Gram",
        "train/precondition.py",
        (("_damped_inverse(B64.mT @ B64,", "_damped_inverse((B_i.mT @ B_i).double(),"),),
        "train/test_optim.py",
        "near_singular",
    ),
    Planted(
        "the base compensated with the wrong sign",
        "adapters/lora.py",
        (("left, right, -scaling)", "left, right, scaling)"),),
        "initialise/test_pairs.py",
        "base_and_loss and lora_ga",
    ),
    Planted(
        "the exported rank-2r scale doubled under rsLoRA",
        "adapters/lora.py",
        (("math.sqrt(times) if lora.use_rslora else times", "times"),),
        "run/test_story.py",
        "loads_in_peft and lora_ga",
    ),
    Planted(
        "a rank's idle micro-batch not weightless",
        "initialise/gradient.py",
        (
            ("weightless=not positions)", "weightless=False)"),
            ("            if not positions or own_targets == 0:\n", "            if own_targets == 0:\n"),
        ),
        "initialise/test_gradient.py",
        "3-zero3 or 3-stage0 or 4-zero3",
    ),
    Planted(
        "a parameter's whole copy not compensated",
        "base/sharding.py",
        (("    if gathered and ", "    if False and "),),
        "base/test_sharding.py",
        "persistent",
    ),
    Planted(
        "sums over ranks in torch's order",
        "cluster/hierarchy.py",
        (("    while len(rows) > 1:\n", "    return rows.sum(0)\n    while len(rows) > 1:\n"),),
        "cluster/test_hierarchy.py",
        "tree_sum or same_bits",
    ),
    Planted(
        "slots counted host by host",
        "cluster/hierarchy.py",
        (
            (
                "topology.inner.index(comm.rank()) * len(topology.outer) + topology.outer.index(comm.rank())",
                "topology.outer.index(comm.rank()) * len(topology.inner) + topology.inner.index(comm.rank())",
            ),
        ),
        "cluster/test_hierarchy.py",
        "naive_sum",
    ),
    Planted(
        "the gather inside the host before the one between hosts",
        "cluster/hierarchy.py",
        (
            ("len(topology.outer) * own.numel()", "len(topology.inner) * own.numel()"),
            ("_all_gather(of_place, own, topology.outer)", "_all_gather(of_place, own, topology.inner)"),
            ("_all_gather(receive, of_place, topology.inner)", "_all_gather(receive, of_place, topology.outer)"),
        ),
        "cluster/test_hierarchy.py",
        "naive_sum",
    ),
    Planted(
        "hosts of unequal numbers taken for equal",
        "cluster/meeting.py",
        (("    if len({len(ranks) for ranks in hosts}) > 1:\n", "    if False:\n"),),
        "cluster/test_meeting.py",
        "topology",
    ),
    Planted(
        "a group that a rank lacks taken for all ranks",
        "cluster/comm.py",
        (
            (
                "dist.group.WORLD if len(ranks) == world_size() else _get_state().groups[ranks]",
                "_get_state().groups.get(ranks, dist.group.WORLD)",
            ),
            ("    if len(ranks) > 1:\n        dist.all_reduce", "    if True:\n        dist.all_reduce"),
        ),
        "cluster/test_hierarchy.py",
        "naive_sum",
    ),
    Planted(
        "the hosts' groups keep the long time-out",
        "cluster/comm.py",
        (("(None, *(_state.groups.values() if _state else ()))", "(None,)"),),
        "cluster/test_comm.py",
        "own_time",
    ),
    Planted(
        "an agreed failure reported by who is first",
        "cluster/comm.py",
        (
            (
                "    if isinstance(error, RankError):\n        return error.__cause__ is None",
                "    if False:\n        return",
            ),
        ),
        "cluster/test_comm.py",
        "failure_is_told and agreed",
    ),
    Planted(
        "rank 0's loss told by first ranks of hosts alone",
        "cluster/comm.py",
        (("own == first_left", "_state.launch.local_rank == 0"),),
        "cluster/test_comm.py",
        "loss_of_rank_0",
    ),
    Planted(
        "a signal taken for the cause",
        "cluster/watch.py",
        (("        if weak:\n", "        if False:\n"),),
        "cluster/test_watch.py",
        "hide",
    ),
    Planted(
        "a symptom told at once",
        "cluster/watch.py",
        (("        if symptom and ", "        if False and "),),
        "cluster/test_watch.py",
        "symptom",
    ),
    Planted(
        "those lost with a rank not waited for",
        "cluster/watch.py",
        (
            (
                "                self.judge_at = min(self.judge_at, time.monotonic() + SETTLE_SECONDS)\n",
                "                self.judge_at = time.monotonic()\n",
            ),
        ),
        "cluster/test_watch.py",
        "lost_soon_after",
    ),
    Planted(
        "a forked child's signals taken for its parent's",
        "cluster/watch.py",
        (("            os.register_at_fork(after_in_child=self._forget_signals)\n", ""),),
        "cluster/test_watch.py",
        "forked",
    ),
    Planted(
        "signals seen between collectives only",
        "cluster/watch.py",
        (
            ("            signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)\n", ""),
            ("lambda *_: None)\n", "lambda number, _: self.wake.send(bytes([number])))\n"),
        ),
        "cluster/test_watch.py",
        "signal",
    ),
    Planted(
        "a stranger's words end the watch",
        "cluster/watch.py",
        (("except (ValueError, TypeError, AttributeError, RecursionError):", "except ValueError:"),),
        "cluster/test_watch.py",
        "stranger",
    ),
    Planted(
        "a stranger's token not looked at",
        "cluster/watch.py",
        (('if not secrets.compare_digest(str(message.get("token")), self.token):', "if False:"),),
        "cluster/test_watch.py",
        "stranger",
    ),
    Planted(
        "rank 0 leaves without a word",
        "cluster/watch.py",
        (('                line.send({"over": True})\n', "                pass\n"),),
        "cluster/test_watch.py",
        "leaving",
    ),
    Planted(
        "the others leave without a word",
        "cluster/watch.py",
        (('                self.hub.send({"left": True})\n', "                pass\n"),),
        "cluster/test_watch.py",
        "leaving",
    ),
    Planted(
        "a launcher's end not looked for",
        "cluster/watch.py",
        (("if self.parent is not None and ", "if False and "),),
        "cluster/test_watch.py",
        "launcher",
    ),
    Planted(
        "the shard group ignored",
        "base/sharding.py",
        (("comm.shard_group(shard_group)", 'comm.shard_group("world")'),),
        "base/test_loading.py",
        "holds_its_share",
    ),
    Planted(
        "what an evaluation may release remembered for training",
        "base/sharding.py",
        (("            cache.cache_clear()", "            pass"),),
        "base/test_sharding.py",
        "gathered_once",
    ),
    Planted(
        "a rounding counted once a copy of the base",
        "adapters/lora.py",
        (("    squared_errors /= base.copies", "    squared_errors /= 1"),),
        "initialise/test_pairs.py",
        "rounding",
    ),
    Planted(
        "hosts share a base that rank 0 alone reads",
        "base/loading.py",
        (('planned.sources is None and shard_group == "node"', "False"),),
        "run/test_story.py",
        "do_not_share",
    ),
    Planted(
        "a launcher ends well after a failure",
        "../launch/supervise.py",
        (("return code or (EXIT_FAILED if failed.is_set() else 0)", "return code"),),
        "launch/test_supervise.py",
        "never_ends_well",
    ),
    Planted(
        "any rank that failed in a text is a failure",
        "../launch/supervise.py",
        (('rb"(^|: )rank \\d+ on \\S+ failed"', 'rb"rank \\d+ .*failed"'),),
        "launch/test_supervise.py",
        "tells_no_failure",
    ),
    Planted(
        "a hanging launcher's children left behind",
        "../launch/supervise.py",
        (("(*family.children(recursive=True), family)", "(family,)"),),
        "launch/test_supervise.py",
        "hangs",
    ),
    Planted(
        "srun told twice to end",
        "../launch/supervise.py",
        (('    if number != signal.SIGTERM or "SLURM_JOB_ID" not in os.environ:\n', "    if True:\n"),),
        "launch/test_supervise.py",
        "slurm",
    ),
    Planted(
        "second moments lost on resume",
        "train/optim.py",
        (
            (
                '(("master", self.masters), ("exp_avg", self.first), ("exp_avg_sq", self.second))',
                '(("master", self.masters), ("exp_avg", self.first))',
            ),
        ),
        "run/test_resume.py",
        "same_bits and lora_one",
    ),
    Planted(
        "bias correction counted anew on resume",
        "train/optim.py",
        (("self.steps, self.checked = steps, steps > 0", "self.steps, self.checked = 0, steps > 0"),),
        "run/test_resume.py",
        "same_bits and lora_one",
    ),
    Planted(
        "the base compensated with the wrong sign on resume",
        "adapters/folder.py",
        (("-B[t.name][:, t.r :]", "B[t.name][:, t.r :]"),),
        "run/test_resume.py",
        "same_bits and lora_ga",
    ),
    Planted(
        "dropout's seed left to chance",
        "train/loop.py",
        (
            (
                "    _seed_dropout(batches.config, step)\n    for _, batch in own:\n",
                "    for _, batch in own:\n",
            ),
        ),
        "run/test_killed.py",
        "point",
    ),
    Planted(
        "hashes not compared",
        "disk/folders.py",
        (('if digest.hexdigest() != entry["sha256"]:', "if False:"),),
        "run/test_resume.py",
        "damaged_file",
    ),
    Planted(
        "a checkpoint appears before its manifest",
        "disk/folders.py",
        (
            (
                "    _write_file(partial / MANIFEST, manifest_text(files).encode())\n",
                "    partial.rename(folder)\n    partial = folder\n"
                "    _write_file(partial / MANIFEST, manifest_text(files).encode())\n",
            ),
            (
                "    partial.rename(folder)\n    sync_folder(folder.parent)\n\n\ndef sync",
                "    sync_folder(folder.parent)\n\n\ndef sync",
            ),
        ),
        "disk/test_folders.py",
        "failure_of_rank_0",
    ),
    Planted(
        "metrics of steps that are done again stay",
        "run/metrics.py",
        (("if self.lines.tell() > keep_bytes:", "if False:"),),
        "run/test_killed.py",
        "point",
    ),
    Planted(
        "another base of the same shape taken for this one",
        "disk/weights.py",
        (('label.encode() + b"\\0" + file.read(min(count, SAMPLE_BYTES))', "label.encode()"),),
        "run/test_resume.py",
        "another_run",
    ),
    Planted(
        "ranks stop without asking each other",
        "train/loop.py",
        (
            (
                "        losses, asked, seconds = zip(*rows, strict=True)\n",
                "        losses, _, seconds = zip(*rows, strict=True)\n        asked = (comm.stop_asked(),)\n",
            ),
        ),
        "run/test_resume.py",
        "any_number_of_ranks",
    ),
    Planted(
        "the logits' gradient lacks the target's part in the last rows",
        "base/head.py",
        (("index, torch.full_like(total, -weight)", "index[:4], torch.full_like(total[:4], -weight)"),),
        "base/test_loss.py",
        "autograds",
    ),
    Planted(
        "a layer group's graph starts a block too low",
        "initialise/gradient.py",
        (
            (
                "    return list(takewhile(lambda block: not layers & set(block.modules()), sequence))",
                "    return list(takewhile(lambda block: not layers & set(block.modules()), sequence))[:-1]",
            ),
        ),
        "initialise/test_gradient.py",
        "first_block",
    ),
    Planted(
        "positions run on through packed documents",
        "data/batches.py",
        (
            (
                '        batch["position_ids"] = torch.stack([torch.cat(row) for row in positions])',
                '        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as('
                'batch["input_ids"])',
            ),
        ),
        "data/test_packing.py",
        "llama",
    ),
    Planted(
        "a packed document's first token is predicted from the one before",
        "data/packing.py",
        (("        labels[np.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX\n", ""),),
        "data/test_packing.py",
        "llama or document",
    ),
    Planted(
        "what a recomputation does not need is recomputed: something is saved behind the frozen product",
        "adapters/branch.py",
        (
            (
                "        output = y if fresh else y.clone()\n",
                "        ctx.save_for_backward(h)\n        output = y if fresh else y.clone()\n",
            ),
        ),
        "initialise/test_gradient.py",
        "recomputation",
    ),
    Planted(
        "dropout's mask left out of the adapter's backward",
        "adapters/branch.py",
        (("change.mul_(kept).div_(1 - ctx.p)", "change"),),
        "adapters/test_branch.py",
        "equal_pefts",
    ),
    Planted(
        "the adapter's scale left out of its backward",
        "adapters/branch.py",
        (("dh.mul_(ctx.scaling)", "dh = dy @ ctx.B"),),
        "adapters/test_branch.py",
        "equal_pefts",
    ),
    Planted(
        "a soft cap left out of the gradient of the loss in pieces",
        "base/head.py",
        (
            (
                "                if tail is not _same:\n                    (change,)",
                "                if False:\n                    (change,)",
            ),
        ),
        "base/test_head.py",
        "padded_rows and Gemma2",
    ),
    Planted(
        "what a model does to its logits not looked at",
        "base/head.py",
        (("len(shown) == 1 and _equal(c(shown[0]), logits)", "len(shown) == 1"),),
        "base/test_head.py",
        "not_known",
    ),
    Planted(
        "a block more is recomputed than need be",
        "plan/memory.py",
        (("count = next(fitting, most)\n", "count = min(most, next(fitting, most) + 1)\n"),),
        "plan/test_plan.py",
        "one_block_fewer",
    ),
    Planted(
        "a trained bias merged without its scale",
        "convert/merge.py",
        (("layer.scale * layer.bias.read()", "layer.bias.read()"),),
        "convert/test_merge_kinds.py",
        "lora_bias and computes",
    ),
    Planted(
        "an embedding merged as it was before its training",
        "adapters/peft_format.py",
        (('    elif wrapper != "original_module":\n', "    else:\n"),),
        "adapters/test_peft_format.py",
        "trained_copy_counts",
    ),
    Planted(
        "an adapter of PiSSA begun from on a base that it does not hold on",
        "adapters/folder.py",
        (("    if changed is not None:\n", "    if changed is not None and not described:\n"),),
        "adapters/test_folder.py",
        "cannot_be_trained_on and init_lora_weights",
    ),
    Planted(
        "padding that counts on, as one long document",
        "data/batches.py",
        (("padding = torch.arange(width) % longest\n", "padding = torch.arange(width)\n"),),
        "base/test_rope.py",
        "share_of_any",
    ),
    Planted(
        "a sample above the original rotary length let through",
        "base/rope.py",
        (("tokens > limit[0]:", "tokens > 2 * limit[0]:"),),
        "base/test_rope.py",
        "above_the_original",
    ),
    Planted(
        "only rank 0's data looked at",
        "run/inputs.py",
        (("refuse_unlike_hosts(hosts)", "refuse_unlike_hosts({})"),),
        "run/test_story.py",
        "do_not_share",
    ),
    Planted(
        "the allocation's tasks taken for the step's",
        "cluster/launchers.py",
        (
            (
                'tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"',
                'tasks = "SLURM_NTASKS"',
            ),
        ),
        "cluster/test_launchers.py",
        "steps_tasks",
    ),
    Planted(
        "AdaLoRA's regulariser added behind the norm that is clipped",
        "train/optim.py",
        (
            (
                "        self.send.zero_()\n        if self.allocation",
                "        self.send.zero_()\n        square = spectral.frobenius_norm(self.grads) ** 2\n"
                "        if self.allocation",
            ),
            ("        square = spectral.frobenius_norm(self.grads) ** 2 + self", "        square += self"),
        ),
        "run/test_kinds.py",
        "one_process and adalora",
    ),
    Planted(
        "B's columns left out of the importance of AdaLoRA's triplets",
        "train/adalora.py",
        (("E + A.mean(1) + B.mean(0)", "E + A.mean(1)"),),
        "train/test_adalora.py",
        "importances",
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
            text = text.replace(old, new, 1)
        path.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{error.tests}", "-k", error.only]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert result.returncode in (0, 1), result.stdout[-2000:] + result.stderr[-2000:]
        return result.returncode == 1


def stale(error: Planted) -> bool:
    """Is a text that it replaces no longer there?"""
    text = (ROOT / "lora_one_dist" / error.file).read_text(encoding="utf-8")
    return any(old not in text for old, _ in error.edits)


def main() -> int:
    chosen = [error for error in ERRORS if not sys.argv[1:] or error.name in sys.argv[1:]]
    mend = [error.name for error in ERRORS if stale(error)]
    if mend:
        print(f"the code has changed under these, mend them in this list: {'; '.join(mend)}")
        return 1
    missed = 0
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        for error, caught in zip(chosen, pool.map(noticed, chosen), strict=True):
            missed += not caught
            print(f"{'caught' if caught else 'MISSED'}  {error.name}  ({error.tests} -k '{error.only}')", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
