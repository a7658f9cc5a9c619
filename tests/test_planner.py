"""What the planner says before a run: its sums, its advice, and the tool's command line.

tools/bench/phases.py and tests/test_memory.py hold the figures against measurements.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from lora_one_dist import planner
from tests import models, tool

PLAN = runpy.run_path("tools/plan.py")
PARAMETERS = {  # of the models' own cards
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "llama-3.3-70b": 70_553_706_496,
}


def settings(name: str, *overrides: str):
    return PLAN["settings_of"](None, f"tools/shapes/{name}", list(overrides))


def shape(name: str) -> planner.Shape:
    return PLAN["shape_of"](settings(name))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_models(name):
    found = shape(name)
    layers = 7 * found.layers
    assert found.parameters == PARAMETERS[name]
    assert len(found.targets) == layers
    inside = sum(target.m * target.n for target in found.targets)
    norms = (2 * found.layers + 1) * found.hidden
    assert found.parameters == inside + norms + 2 * found.lookup_only, "nothing is left out"


# Wire -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize(("hosts", "each"), [(1, 4), (4, 1), (2, 2), (3, 8)])
def test_bytes_stay_inside_one_host_and_cross_between_hosts_of_one_rank(hosts, each, backend):
    cluster = planner.Cluster(hosts, each, backend=backend)
    for owner in (0, cluster.ranks - 1):
        for way in (planner._to_owner, planner._from_owner):
            wire = way(1e9, owner, cluster)
            assert (wire.between == 0) == (hosts == 1)
            assert wire.inside == 0 or each > 1
        sent = planner._from_owner(1e9, owner, cluster)
        assert sent.inside + sent.between == (cluster.ranks - 1) * 1e9, "each rank but one receives it once"


def test_one_rank_sends_nothing():
    config = settings("llama-2-7b")
    found = planner.predict(shape("llama-2-7b"), config, planner.Cluster(1, 1, backend="gloo"))
    assert all(wire.inside == wire.between == 0 for wire in found.wire.values())


@pytest.mark.parametrize("size", [4 * 256 * 256, 4 * 1024 * 1024, 4 * 5504 * 2048])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_gloo_reduction_sends_what_its_loop_sends(ranks, size):
    # The loop of gloo's reduce.cc, segment by segment: the last two of them are received and not sent on.
    segment = min(-(-size // (2 * ranks)), planner.GLOO_SEGMENT_BYTES)
    segments = -(-max(-(-size // segment), 2 * ranks) // ranks) * ranks
    per_rank, sent = segments // ranks, 0
    for rank in range(ranks):
        for i in range(segments - 2):
            offset = ((rank + 1) * per_rank + i) * segment % (segments * segment)
            sent += max(0, min(segment, size - offset))
        if rank != 0:
            sent += max(0, min(per_rank * segment, size - rank * per_rank * segment))
    wire = planner._to_owner(size, 0, planner.Cluster(1, ranks, backend="gloo"))
    # The last segments are shorter than the others; the plan counts them as if they were not.
    assert wire.inside == pytest.approx(sent, rel=0.05)


def test_node_sharding_sends_only_adapters_between_hosts():
    found, cluster = shape("llama-3.3-70b"), planner.Cluster(4, 8)
    world = planner.predict(found, settings("llama-3.3-70b"), cluster).wire["step"]
    node = planner.predict(found, settings("llama-3.3-70b", "deepspeed.shard_group=node"), cluster).wire["step"]
    adapters = 8 * found.adapter
    # fp32 gradients and bf16 copies, each (H - 1) / H of them from each host.
    assert node.between == pytest.approx((4 + 2) * adapters * (4 - 1), rel=0.01)
    assert world.between > 50 * node.between


# Memory and work ------------------------------------------------------------------------------------------------------


def test_shares_shrink_with_ranks_and_groups():
    found = shape("llama-3.3-70b")

    def memory(ranks: int, *overrides: str):
        return planner.predict(found, settings("llama-3.3-70b", *overrides), planner.Cluster(1, ranks)).memory

    one, eight = memory(1), memory(8)
    assert one["step"]["base"] == 2 * found.parameters == pytest.approx(8 * eight["step"]["base"], rel=1e-6)
    assert one["step"]["gathered"] == 0, "one rank holds it whole"
    owned = 4 * sum(target.m * target.n for target in found.targets)
    assert one["gradient"]["owned"] == owned
    assert owned / 8 <= eight["gradient"]["owned"] <= 1.01 * owned / 8
    assert owned / 32 <= memory(8, "init.layer_groups=4")["gradient"]["owned"] <= 1.05 * owned / 32
    assert memory(8, "init.buffer=host")["gradient"]["owned"] == 0
    assert memory(8, "init.halves=true")["gradient"]["owned"] == 2 * eight["gradient"]["owned"]


def test_layer_groups_cost_half_a_pass_each():
    found, cluster = shape("llama-2-7b"), planner.Cluster(1, 8)

    def work(groups: int) -> float:
        plan = planner.predict(found, settings("llama-2-7b", f"init.layer_groups={groups}"), cluster)
        return plan.operations["gradient"]

    # Forward 1, recomputed 1, backward 1, gradients 0.95: 4 groups run 4 forward and (1 + 3/4 + 1/2 + 1/4) back.
    assert work(4) / work(1) == pytest.approx((4 + 2.5 * 2 + 0.95) / (1 + 2 + 0.95), rel=0.03)


@pytest.mark.parametrize("gpu", [24, 40, 80])
@pytest.mark.parametrize("cluster", [(1, 8), (4, 8), (1, 1)])
def test_advice_is_enough_and_not_too_much(cluster, gpu):
    found, config = shape("llama-3.3-70b"), settings("llama-3.3-70b", "train.micro_batch_size=2", "init.halves=true")
    place = planner.Cluster(*cluster, bytes_per_rank=(gpu - 4) * 1e9)
    advice = planner.advice(found, config, place)
    phases = planner.predict(found, config, place)
    assert len(advice) == sum(phases.peak(phase) > place.bytes_per_rank for phase in phases.memory)

    def peak(phase: str, text: str) -> int:
        text = re.sub(r"\(.*?\)", "", text)  # remarks
        changed = settings("llama-3.3-70b", "train.micro_batch_size=2", "init.halves=true", *text.split())
        return planner.predict(found, changed, place).peak(phase)

    for line in advice:
        phase = line.split()[0]
        _, _, remedies = line.rstrip(".").partition("enough: ")
        if "One of these" in line:
            assert all(peak(phase, text) <= place.bytes_per_rank for text in remedies.split("; "))
        elif "Together" in line:
            chosen = re.sub(r"\(.*?\)", "", remedies).split()
            assert peak(phase, remedies) <= place.bytes_per_rank
            for left_out in chosen:
                assert peak(phase, " ".join(c for c in chosen if c != left_out)) > place.bytes_per_rank
        else:
            assert "No setting is enough" in line
    if cluster == (4, 8) and gpu == 80:
        assert advice == []


def test_offload_still_gathers_on_the_device_and_takes_host_memory():
    found, offload = shape("llama-3.3-70b"), ("deepspeed.config=ds_configs/zero3_offload.json",)
    alone = planner.predict(found, settings("llama-3.3-70b", *offload), planner.Cluster(1, 1)).memory["step"]
    shared = planner.predict(found, settings("llama-3.3-70b", *offload), planner.Cluster(1, 8)).memory["step"]
    assert alone["base"] == shared["base"] == 0
    assert alone["gathered"] == shared["gathered"] > 0
    both = settings("llama-3.3-70b", *offload, "init.buffer=host")
    in_host = planner.host_bytes(found, both, planner.Cluster(1, 8))
    owned = 4 * sum(target.m * target.n for target in found.targets)
    assert in_host == pytest.approx(2 * found.parameters + owned, rel=0.01)


def test_an_uneven_batch_takes_one_micro_batch_more():
    found, config = shape("llama-2-7b"), settings("llama-2-7b")
    work = [planner.predict(found, config, planner.Cluster(1, ranks)).operations["step"] for ranks in (24, 16)]
    assert work[0] == work[1], "32 samples: 2 micro-batches on 24 ranks as on 16"


def test_a_tied_head_is_multiplied_by_and_gathered_again():
    model = models.qwen2()
    tied = planner.shape_of(model, [], 0)
    assert tied.lookup_only == 0
    assert planner.gathers_a_pass(tied, {"stage3_max_reuse_distance": 0}) == 2
    assert planner.shape_of(models.llama(), [], 0).lookup_only == 64 * 32


# The tool -------------------------------------------------------------------------------------------------------------


def test_a_plan_that_fits():
    done = tool.run("plan", "--model", "tools/shapes/llama-3.1-8b", "--hosts", 4, "lora.r=64")
    assert "8.03 B parameters, 224 target layers" in done.stdout
    assert "4 x 8 ranks" in done.stdout
    assert "lora_one, r 64: 167.8 M in the adapters" in done.stdout
    assert done.stdout.rstrip().endswith("every phase fits")


def test_seconds_of_cpu_ranks_are_not_guessed():
    asked = ("plan", "--model", "tools/shapes/llama-2-7b", "--backend", "gloo")
    assert "tokens a second" not in (guessed := tool.run(*asked).stdout)
    assert "no seconds: give what these machines reach" in guessed
    slow, fast = (tool.run(*asked, "--tflops", tflops).stdout for tflops in (1, 2))
    speeds = [float(re.search(r"(\d+) tokens a second", text)[1]) for text in (slow, fast)]
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.01), "where operations take nearly all of a step"


def test_a_plan_that_does_not_fit_says_what_to_change():
    done = tool.run("plan", "--model", "tools/shapes/llama-3.3-70b/config.json", "--gpu_gb", 40, check=False)
    assert done.returncode == 2
    assert done.stdout.count("DOES NOT FIT") == 2
    assert "svd needs 52.0 GB, 36 GB are there. One of these is enough: init.layer_groups=2;" in done.stdout


@pytest.mark.parametrize(
    ("name", "model", "hosts", "each"),
    [("demo", None, 1, 8), ("llama3_3_70b_chat", "tools/shapes/llama-3.3-70b", 4, 8)],
)
def test_a_run_is_planned_from_its_yaml_without_its_data(name, model, hosts, each):  # all of them: test_recipes.py
    own = ["--model", model] if model else []
    path = f"launch/configs/{name}.yaml"
    done = tool.run("plan", "--config", path, *own, "--hosts", hosts, "--ranks_per_host", each)
    assert f"{hosts} x {each} ranks, stage 3" in done.stdout
    assert "every phase fits" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model or --config must say which model"),
        (["--model", "nowhere"], "model.path = nowhere: is neither a folder nor a hub name"),
        (["--model", "tools/shapes/llama-2-7b", "lora.rank=8"], "lora.rank = 8: no such setting"),
        (["--model", "tools/shapes/llama-2-7b", "lora.r=5000"], "lora.r = 5000: must be at most min(m, n) = 4096"),
        (["--model", "tools/shapes/llama-2-7b", "lora.target_modules=[k_prj]"], "Did you mean k_proj"),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read"),
        (["--model", "tools/shapes/llama-2-7b", "--gpu_gb", "4"], "--gpu_gb 4"),
    ],
)
def test_questions_that_make_no_sense(arguments, said):
    done = tool.run("plan", *arguments, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stdout == ""


def test_the_readme_has_the_table_that_the_tool_prints():
    printed = tool.run("plan", "--table").stdout.strip().splitlines()
    assert len(printed) == 2 + 4 * 3
    readme = Path("README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in printed if line not in readme] == []


def test_phases_are_told_in_the_order_in_which_they_run():
    found = planner.predict(shape("llama-2-7b"), settings("llama-2-7b"), planner.Cluster(1, 8))
    assert list(found.seconds) == ["gradient", "svd", "broadcast", "step"]
    assert list(found.memory) == ["load", *found.seconds]
