"""Do all hosts have the same base and data?  Who differs is named (tests/run/test_story.py: in a run)."""

from __future__ import annotations

import pytest

from lora_one_dist.run.identity import HostsError, differences, refuse_unlike_hosts

SAME = {"base": {"config": "c" * 64}, "train": {"samples": 9, "sha256": "a" * 64}, "evaluation": None}
OTHERS = "data.train: must be the same on every host, is node1, node2, node4 and 5 more: "


@pytest.mark.parametrize(
    ("init", "refused"),
    [
        ({"scheme": "arb2r", "stable_output": True}, []),
        ({"scheme": "arbr", "stable_output": True}, ["init.scheme is arbr, was arb2r"]),
        ({"scheme": "arb2r", "stable_output": False}, ["init.stable_output is False, was True"]),
    ],
)
def test_a_run_of_before_the_schemes_had_the_default(init, refused):
    run = {"targets": [], "base": {}, "train_data": {}, "eval_data": None}
    before, now = ({**run, "config": {"init": {"method": "lora_ga", **more}}} for more in ({}, init))
    assert differences(before, now) == (refused, [])


def test_hosts_with_the_same_pass():
    refuse_unlike_hosts({"a": SAME})
    refuse_unlike_hosts({f"node{i}": SAME for i in range(9)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"samples": 8, "sha256": "b" * 64}},
            OTHERS + "samples 9, sha256 aaaaaaaaaaaa; "
            "node3: samples 8, sha256 bbbbbbbbbbbb. Give each the same files and the same tokenizer, by copies or a "
            "file system that all share; tools/doctor.py compares packages and code.",
        ),
        (
            {"train": {"samples": 9, "sha256": "a" * 63 + "b"}},
            OTHERS + "samples 9, sha256 aaaaaaaaaaaa; node3: samples 9, sha256 aaaaaaaaaaaa. ",
        ),
        ({"evaluation": {"samples": 8, "sha256": "b" * 64}}, "data.eval: must be the same on every host, is node1, "),
        ({"base": {"config": "d" * 64}}, "model.path: must be the same on every host, is node1, "),
    ],
)
def test_the_host_that_differs_is_named_with_what_it_has(changes, message):
    with pytest.raises(HostsError) as caught:
        refuse_unlike_hosts({f"node{i}": SAME | (changes if i == 3 else {}) for i in range(1, 10)})
    assert str(caught.value).startswith(message)


def run_of(**lora: str) -> dict:
    return {"config": {"lora": lora}, "targets": [], "base": {}, "train_data": {}, "eval_data": None}


@pytest.mark.parametrize("before", [run_of(), run_of(kind="lora")], ids=["of old", "of now"])
def test_a_run_keeps_its_kind_of_adapter(before):
    assert differences(before, run_of(kind="lora")) == ([], [])
    assert differences(before, run_of(kind="adalora")) == (["lora.kind is adalora, was lora"], [])
