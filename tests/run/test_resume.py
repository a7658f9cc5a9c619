"""Runs that stop and go on: at other numbers of ranks, from damaged checkpoints, as another run, or not at all."""

from __future__ import annotations

import copy
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.cluster.launchers import Launch
from lora_one_dist.config.reading import parse_config
from lora_one_dist.config.settings import CheckpointConfig
from lora_one_dist.disk import folders
from lora_one_dist.initialise import pairs
from lora_one_dist.run import checkpoint, identity
from tests import models
from tests.kill_harness import COMPARED
from tests.ranks import free_port, run_commands, run_ranks, write_json_lines
from tests.runs import PATTERNS, metrics, refused, settings, train

SECONDS = 120  # for a real process to come so far, on a busy machine
EXIT_STOPPED = 75


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a model of two blocks."""
    folder = tmp_path_factory.mktemp("base")
    models.llama(layers=2).save_pretrained(folder, max_shard_size="20KB")
    models.tokenizer("llama").save_pretrained(folder)
    return folder


def lines_of(out: Path) -> list[tuple[int, dict]]:
    """What metrics.jsonl holds, but for times and memory."""
    return [(line["step"], {key: line[key] for key in COMPARED if key in line}) for line in metrics(out)]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]


def steps_of(out: Path) -> list[int]:
    return [line["step"] for line in metrics(out) if "loss" in line]


def train_until(raw: dict, step: int, number: int = signal.SIGUSR1) -> str:
    """Runs on a rank: in this step the last rank sends itself a signal.  How the run ended."""
    from lora_one_dist.run.stopping import Stopped
    from lora_one_dist.run.story import run
    from lora_one_dist.train import loop

    original = loop._forward_backward

    def signalled(base, batches, index, *rest):
        if index + 1 == step and comm.rank() == comm.world_size() - 1:
            os.kill(os.getpid(), number)
            while not comm.stop_asked():  # the watch reads it in its own thread; a signal that ends the job never asks
                time.sleep(0.01)
        return original(base, batches, index, *rest)

    loop._forward_backward = signalled
    try:
        run(parse_config(raw))
    except Stopped:
        return "stopped"
    return "ended"


# Other ranks ----------------------------------------------------------------------------------------------------------

STAGES = [  # ranks, their hosts, shard group, micro-batch size, step at which the stage is stopped
    (1, "a", "world", 2, 3),
    (2, "ab", "node", 3, 6),
    (4, "aabb", "node", 2, 8),
    (3, "aaa", "world", 1, 11),
    (1, "a", "world", 4, None),
]


def test_run_goes_on_at_any_number_of_ranks(base, tmp_path):
    """1, 2, 4, 3 and 1 ranks, on one host and two, with copies of the base and without, in one run."""
    changes = {"train__max_steps": 14, "train__eval_steps": 3, "init__method": "lora_one_v1", **PATTERNS}
    straight, out = tmp_path / "straight", tmp_path / "run"
    run_ranks(1, train, settings(base, straight, **changes))
    for world_size, hosts, group, size, stop in STAGES:
        raw = settings(base, out, **changes, deepspeed__shard_group=group, train__micro_batch_size=size)
        ended = run_ranks(world_size, train_until, raw, stop or 0, hosts=hosts)
        assert ended == ["stopped" if stop else "ended"] * world_size
    assert steps_of(out) == list(range(1, 15))
    assert [line["step"] for line in metrics(out) if "eval_loss" in line] == [0, 3, 6, 9, 12, 14]
    differences = [abs(a - b) for a, b in zip(losses_of(out), losses_of(straight), strict=True)]
    ours, its = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, straight))
    gap = max(float((ours[name] - its[name]).abs().max() / its[name].abs().max()) for name in its)
    print(f"largest difference of a loss {max(differences):.1e}, of an adapter's element to its largest {gap:.1e}")
    # As between runs that stay at different numbers of ranks (test_train.py): fp32 sums in another order, carried
    # through 14 steps. Measured: 7e-7 and 2e-7.
    assert max(differences) <= 1e-5
    assert gap <= 1e-5
    assert json.loads((out / "run.json").read_text())["resumed_from"] == 11
    assert len(json.loads((out / "run.json").read_text())["earlier_starts"]) == 4


@pytest.mark.parametrize(
    ("method", "dtype", "name"),
    [
        ("lora_ga", "bf16", "adamw"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                ("pissa", "fp32", "sgd"),
                ("lora_one_v1", "fp32", "adamw"),
                ("lora", "fp32", "adamw"),
                ("lora_one", "bf16", "sgd"),
            ]
        ),
    ],
)
def test_same_ranks_give_the_same_bits(method, dtype, name, base, tmp_path):
    """The base that some methods change is changed again in the same bits; dropout goes on where it was."""
    changes = {"init__method": method, "model__dtype": dtype, "optim__name": name, "lora__dropout": 0.1}
    changes |= {"train__max_steps": 5, "train__eval_steps": 2}
    straight, out = tmp_path / "straight", tmp_path / "run"
    run_ranks(2, train, settings(base, straight, **changes))
    assert run_ranks(2, train_until, settings(base, out, **changes), 2) == ["stopped"] * 2
    assert steps_of(out) == [1, 2]
    run_ranks(2, train, settings(base, out, **changes))
    assert lines_of(out) == lines_of(straight)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / "adapter" / file).read_bytes() == (straight / "adapter" / file).read_bytes()


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run of four steps on two ranks, which keeps the checkpoints of 0, 2 and 4."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_ranks(2, train, four_steps(base, out))
    assert checkpoint.saved_steps(out / "checkpoints") == ["step-4", "step-2", "step-0"]
    return out


def four_steps(base: Path, out: Path, **changes) -> dict:
    raw = settings(base, out, **{"train__max_steps": 4, **changes})
    return {**raw, "checkpoint": {"steps": 2, "keep_last": 3}}


@pytest.fixture
def alone():
    """This process as the only rank."""
    comm.init(launch=Launch("test", 0, 1, 0, "127.0.0.1", free_port()))
    yield
    comm.shutdown()


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "data" / "run"))


def identity_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["identity"]


def truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def flip(place: float, path: Path, _: Path) -> None:
    """One bit, at this part of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def remove(path: Path, _: Path) -> None:
    path.unlink()


def swap(path: Path, older: Path) -> None:
    shutil.copy(older, path)


DAMAGES = [truncate, empty, remove, swap, *(functools.partial(flip, place) for place in (0, 0.1, 0.5, 0.9, 1))]


def test_damaged_file_is_named_and_the_checkpoint_before_is_taken(alone, copied, tmp_path):
    """Every file of a checkpoint, in every way, both by itself (auto) and by name (its path as resume)."""
    newest, older, fresh = copied / "checkpoints" / "step-4", copied / "checkpoints" / "step-2", tmp_path / "fresh"
    own, names = identity_of(copied), [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(names) == 6, "adapter (2), optimizer (2), state and manifest"
    tried = 0
    for name in names:
        content = (newest / name).read_bytes()
        for damage in DAMAGES:
            if damage is swap and (older / name).read_bytes() == content:
                continue  # adapter_config.json is the same at every step
            damage(newest / name, older / name)
            found, notes = checkpoint.find(copied, "auto", own)
            assert found.step == 2, f"{name}, {damage}"
            # A manifest of another step is whole in itself: the first file that it does not fit is named.
            named = newest if damage is swap and name.name == "manifest.json" else newest / name
            assert notes[0].startswith(f"step-4 is skipped: {named}")
            with pytest.raises(checkpoint.CheckpointError) as caught:
                checkpoint.find(fresh, str(newest), own)
            assert str(caught.value).startswith(f"resume = {newest}: {named}")
            (newest / name).write_bytes(content)
            tried += 1
    assert tried == 6 * len(DAMAGES) - 1
    assert checkpoint.find(copied, "auto", own)[0].step == 4, "it was whole before and is again"


def test_checkpoint_under_another_steps_name_is_not_taken(alone, copied):
    """Whole in itself, so that only what it says of itself tells: swapped folders and a renamed one."""
    where, own = copied / "checkpoints", identity_of(copied)
    shutil.rmtree(where / "step-4")
    shutil.copytree(where / "step-2", where / "step-4")
    found, notes = checkpoint.find(copied, "auto", own)
    assert found.step == 2
    assert "step-4/state.json holds step 2: the folder was renamed, or is another one's" in notes[0]
    (where / "step-4").rename(where / "step-9")
    assert checkpoint.find(copied, "auto", own)[0].step == 2


def test_no_whole_checkpoint_is_refused_with_each_reason(alone, copied):
    for step, name in ((0, "state.json"), (2, "optimizer-00001-of-00002.safetensors"), (4, "manifest.json")):
        (copied / "checkpoints" / f"step-{step}" / name).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint is whole") as caught:
        checkpoint.find(copied, "auto", identity_of(copied))
    for name in ("step-0/state.json", "step-2/optimizer-00001-of-00002.safetensors", "step-4/manifest.json"):
        assert f"{name} cannot be read: No such file" in str(caught.value)


def test_layer_group_is_no_checkpoint(alone, copied, tmp_path):
    own = identity_of(copied)
    store = checkpoint.Store(copied, CheckpointConfig(), own)
    part = pairs.Initialisation({"layer": (torch.ones(1, 2), torch.ones(2, 1))}, [], 1.0)
    store.save_group("init-1-of-2", part, [Target("layer", 2, 2, 1, 1.0)])
    with pytest.raises(checkpoint.CheckpointError, match="is no checkpoint but a part of an initialisation"):
        checkpoint.find(tmp_path / "fresh", str(copied / "checkpoints" / "init-1-of-2"), own)
    kept, _ = store.load_group("init-1-of-2")
    assert torch.equal(kept.pairs["layer"][0], torch.ones(1, 2))
    other = copy.deepcopy(own)
    other["config"]["init"]["micro_batch_size"] = 3  # of no matter for a mean over tokens
    assert checkpoint.Store(copied, CheckpointConfig(), other).load_group("init-1-of-2")[0] is not None
    path = copied / "checkpoints" / "init-1-of-2" / "pairs-00000-of-00001.safetensors"
    flip(1, path, path)
    kept, why = store.load_group("init-1-of-2")
    assert kept is None
    assert why == f"init-1-of-2 is computed again: {path} has other content than was written"
    assert not path.parent.exists()
    for config in (own["config"], other["config"]):
        config["init"]["average"] = "micro_batch"
    store.save_group("init-1-of-2", part, [Target("layer", 2, 2, 1, 1.0)])
    kept, why = checkpoint.Store(copied, CheckpointConfig(), other).load_group("init-1-of-2")
    assert kept is None
    assert why == "init-1-of-2 is computed again: a mean is of micro-batches of 3 samples, was of 2"


def test_run_goes_on_past_a_damaged_checkpoint_to_the_same_end(base, finished, copied, tmp_path):
    """The adapter in it is damaged by a bit: two steps are repeated, with the same bits."""
    path = copied / "checkpoints" / "step-4" / "adapter" / "adapter_model.safetensors"
    flip(0.5, path, path)
    said = start(tmp_path, 2, four_steps(base, copied))
    assert f"step-4 is skipped: {path} has other content than was written" in said
    assert f"going on from {copied / 'checkpoints' / 'step-2'}" in said
    assert lines_of(copied) == lines_of(finished)
    names = {path.name for path in (copied / "checkpoints").iterdir()}
    assert names == {"latest", "step-0", "step-2", "step-4", "step-4.damaged"}


def start(folder: Path, world_size: int, raw: dict, expected: int = 0) -> str:
    """Start a run as the launch script does.  What rank 0 said, or all errors."""
    ends = run_commands(folder, world_size, train_quietly, raw)
    assert [code for code, _ in ends] == [expected] * world_size, ends
    return (folder / "0.stdout").read_text() if expected == 0 else "".join(text for _, text in ends)


def train_quietly(raw: dict) -> None:
    """Runs on a rank."""
    train(raw)


# Another run ----------------------------------------------------------------------------------------------------------


def test_what_makes_it_another_run_is_refused_and_named(base, copied, tmp_path):
    """Before a weight is read, whatever the checkpoint."""
    cases = {
        "lora.r is 2, was 4": {"lora__r": 2},
        "lora.target_modules names 4 layers, were 14": {"lora__target_modules": ["q_proj", "v_proj"]},
        "lora.target_modules names 13 layers, were 14": {"lora__exclude_modules": ["1.mlp.up_proj"]},
        "lora.rank_pattern: r of model.layers.0.self_attn.k_proj is 2, was 4": {"lora__rank_pattern": {"k_proj": 2}},
        "lora.alpha_pattern: s of model.layers.1.mlp.up_proj is 1, was 4": {
            "lora__alpha_pattern": {"1.mlp.up_proj": 2}
        },
        "model.dtype is bf16, was fp32": {"model__dtype": "bf16"},
        "train.seed is 1, was 0": {"train__seed": 1},
        "train.global_batch_size is 12, was 11": {"train__global_batch_size": 12},
        "init.method is lora, was lora_one": {"init__method": "lora"},
        "optim.name is sgd, was adamw": {"optim__name": "sgd"},
        "the base is another one": {"model__path": str(other_base(base, tmp_path))},
        "the training data is another one": {"data__train": str(other_data(tmp_path))},
    }
    changed = [four_steps(base, copied, **changes) for changes in cases.values()]
    for message, expected in zip(run_ranks(1, all_refused, changed)[0], cases, strict=True):
        assert f"{copied / 'checkpoints' / 'step-4'} is of another run: {expected}" in message
        assert message.endswith("Set them back, or give another output_dir.")


def all_refused(many: list[dict]) -> list[str]:
    """Runs on a rank."""
    return [refused(raw) for raw in many]


def other_base(base: Path, folder: Path) -> Path:
    """Other weights under the same config.json and the same names and shapes."""
    model = models.llama(layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(folder / "other", max_shard_size="20KB")
    models.tokenizer("llama").save_pretrained(folder / "other")
    assert (folder / "other" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    return folder / "other"


def other_data(folder: Path) -> Path:
    """One token of the last sample differs."""
    rows = models.rows(100)
    words = rows[-1]["completion"].split()
    words[-1] = "w3" if words[-1] != "w3" else "w4"
    rows[-1]["completion"] = " " + " ".join(words)
    return write_json_lines(folder / "other.jsonl", rows)


def test_what_may_change_is_logged(base, copied, tmp_path):
    changes = {"optim__lr": 1e-2, "optim__warmup_steps": 1, "train__max_steps": 5, "train__micro_batch_size": 3}
    raw = four_steps(base, copied, **changes, deepspeed__shard_group="node")
    said = start(tmp_path, 1, raw)
    for line in (
        "optim.lr is now 0.01, was 0.005",
        "optim.warmup_steps is now 1, was 0",
        "train.max_steps is now 5, was 4",
        "train.micro_batch_size is now 3, was 2",
        "deepspeed.shard_group is now node, was world",
    ):
        assert line in said.splitlines()
    assert steps_of(copied) == [1, 2, 3, 4, 5]
    assert "output_dir is now" not in said


def test_a_default_and_the_same_by_name_are_one_run(base, tmp_path):
    """A preconditioner is stored as what was in force: defaults are the optimizer's, and of a version."""
    own, targets = {}, [Target("layer", 8, 4, 4, 4.0)]
    for name, optim in {
        "default": {},
        "named": {"preconditioner": "rescaled"},
        "sgd": {"name": "sgd"},
        "sgd named": {"name": "sgd", "preconditioner": "riemannian"},
        "before": {"preconditioner": "riemannian", "damping": 1e-6},
        "none": {"preconditioner": "none"},
    }.items():
        chosen = {f"optim__{key}": value for key, value in {"preconditioner": None, **optim}.items()}
        config = parse_config(settings(base, tmp_path / "out", **chosen))
        own[name] = identity.identity(config, targets, {}, {}, {})
    assert identity.differences(own["default"], own["named"]) == ([], [])
    assert identity.differences(own["sgd"], own["sgd named"]) == ([], [])
    refused, changed = identity.differences(own["before"], own["default"])
    assert refused == ["optim.preconditioner is rescaled, was riemannian"]
    assert changed == ["optim.damping is now 1.0, was 1e-06"]
    assert own["none"]["config"]["optim"]["damping"] is None


def test_shorter_run_than_its_checkpoint_is_refused(base, copied):
    for message in run_ranks(2, refused, four_steps(base, copied, train__max_steps=3)):
        assert "the run has 3 steps, its checkpoint is at step 4. Raise it, or give another output_dir." in message


def test_finished_run_says_so_and_reads_no_weight(base, copied, tmp_path):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    said = start_without_weights(tmp_path, four_steps(base, copied))
    assert f"{copied} has its 4 steps done: nothing to do." in said
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def start_without_weights(folder: Path, raw: dict) -> str:
    ends = run_commands(folder, 2, never_loading, raw)
    assert [code for code, _ in ends] == [0, 0], ends
    return (folder / "0.stdout").read_text()


def never_loading(raw: dict) -> None:
    """Runs on a rank."""
    assert refused(raw) == "not refused"


def test_folder_that_cannot_be_used_is_refused(base, copied, tmp_path):
    """`never` on a run; an older checkpoint of the run's own; the folder of another run that has no checkpoint yet."""
    older = str(copied / "checkpoints" / "step-2")
    bare = copied.parent / "bare"
    bare.mkdir()
    shutil.copy(copied / "run.json", bare)
    cases = [
        ({**four_steps(base, copied), "resume": "never"}, "holds a run, and resume is never"),
        ({**four_steps(base, copied), "resume": older}, f"resume = {older}: the run has gone on to step-4 since"),
        (four_steps(base, bare, lora__r=2), f"output_dir = {bare}: holds another run: lora.r is 2, was 4"),
    ]
    for message, (_, expected) in zip(run_ranks(1, all_refused, [raw for raw, _ in cases])[0], cases, strict=True):
        assert expected in message


def test_branch_from_a_checkpoint_of_another_folder(base, copied, finished, tmp_path):
    """The new folder goes on from step 2 and then from its own; the old one stays as it was."""
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    out = tmp_path / "data" / "branch"
    raw = {**four_steps(base, out), "resume": str(copied / "checkpoints" / "step-2")}
    assert run_ranks(2, train_until, raw, 3) == ["stopped"] * 2
    run_ranks(2, train, raw)
    assert json.loads((out / "run.json").read_text())["resumed_from"] == 3
    assert lines_of(out)[:-1] == [line for line in lines_of(finished)[:-1] if line[0] > 2]
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_two_jobs_on_one_folder_are_one_too_many(base, copied):
    with (copied / ".lock").open("a") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        for message in run_ranks(2, refused_at_once, four_steps(base, copied, train__max_steps=5)):
            assert f"output_dir = {copied}: another job writes there" in message
    run_ranks(2, train, four_steps(base, copied, train__max_steps=5))
    assert steps_of(copied) == [1, 2, 3, 4, 5]


def refused_at_once(raw: dict) -> str:
    """Runs on a rank: with less patience for the lock."""
    folders.lock = functools.partial(folders.lock, seconds=0.2)
    return refused(raw)


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_sigterm_stops_the_launched_job_with_everything_saved(tmp_path):
    """The real command and the demo's model: exit code 75, a checkpoint of the last step, and it goes on from there."""
    out, script = tmp_path / "run", [sys.executable, "launch/train.py", "--config", "launch/configs/demo.yaml"]
    command = [*script, f"output_dir={out}", "train.max_steps=2000", "train.micro_batch_size=4"]
    command += ["train.global_batch_size=4", "train.exact_match_samples=1", "data.max_eval_samples=4"]
    command += ["train.log_steps=1"]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=inherited)
    deadline = time.monotonic() + SECONDS
    while not (out / "metrics.jsonl").is_file() or len(steps_of_growing(out)) < 2:
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == EXIT_STOPPED, (tmp_path / "said").read_text()
    text = (tmp_path / "said").read_text()
    last = steps_of(out)[-1]
    assert "SIGTERM, stops when it next can" in text
    assert f"stopped as asked, step {last} saved; the same command goes on from there" in text
    assert (out / "checkpoints" / "latest").read_text() == f"step-{last}\n"


def steps_of_growing(out: Path) -> list[str]:
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_sigint_ends_the_job_at_once(base, tmp_path):
    ends = run_commands(tmp_path, 2, train_until, settings(base, tmp_path / "data" / "run"), 3, signal.SIGINT)
    assert [code for code, _ in ends] == [1, 128 + signal.SIGINT]
    assert "failed: received SIGINT" in ends[0][1]


# Not finite -----------------------------------------------------------------------------------------------------------

RARE = 63  # a token that one sample alone has


def rare_data(folder: Path, line: int) -> Path:
    rows = [row for row in models.rows(60) if f"w{RARE}" not in (row["prompt"] + row["completion"]).split()][:11]
    rows.insert(line - 1, {"prompt": f"w5 w{RARE}", "completion": " w6 w7"})
    return write_json_lines(folder / "rare.jsonl", rows)


def train_with_a_fault(raw: dict, kind: str) -> str:
    """Runs on a rank: from step 4 on a row of the embedding, or a sum of gradients, is not finite.  The error."""
    from lora_one_dist.run.story import run
    from lora_one_dist.train import loop, optim

    forward, update = loop._forward_backward, optim.LayerShardedOptimizer.reduce

    def spoiled(base, batches, step, *rest):
        if step == 3 and kind == "embedding":
            base.module.get_input_embeddings().register_forward_hook(
                lambda layer, args, output: output.masked_fill((args[0] == RARE)[..., None], torch.inf)
            )
        return forward(base, batches, step, *rest)

    def overflowing(self, *carried):
        if self.steps == 3 and kind == "gradient" and comm.rank() == 1:
            self.layout.views(self.send)[0]["lora_B"][0, 0] = torch.inf  # of the first layer
        return update(self, *carried)

    loop._forward_backward, optim.LayerShardedOptimizer.reduce = spoiled, overflowing
    try:
        run(parse_config(raw))
    except loop.TrainError as error:
        return str(error)
    return "ended"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("embedding", ["the loss of step 4 is nan", "embed_tokens for the samples at ", "rare.jsonl, line 8"]),
        ("gradient", ["step 4", "lora_B of model.layers.0.", "Each micro-batch by itself is finite"]),
    ],
)
def test_step_that_is_not_finite_is_explained_on_all_ranks(kind, expected, base, tmp_path):
    out = tmp_path / "data" / "run"
    raw = settings(base, out, data__eval=None, train__max_steps=5, train__global_batch_size=12)
    raw = {**raw, "data": {**raw["data"], "train": str(rare_data(tmp_path, 8))}, "checkpoint": {"steps": 2}}
    raw["train"]["micro_batch_size"] = 1
    messages = run_ranks(2, train_with_a_fault, raw, kind)
    assert messages[0] == messages[1]
    for text in (*expected, "The newest checkpoint is step-2."):
        assert text in messages[0]
    assert steps_of(out) == [1, 2, 3]
    run_ranks(2, train, raw)
    assert steps_of(out) == [1, 2, 3, 4, 5], "the checkpoint before is whole, and the fault was not in it"
