"""The cluster doctor: each planted fault is found, names its host, and nothing else is called a fault."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_one_dist.cluster import comm
from lora_one_dist.commands.doctor import command, findings, ranks
from lora_one_dist.commands.doctor import facts as of_host
from lora_one_dist.commands.doctor import ssh as over_ssh_to
from tests.ranks import free_port, run_ranks

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = ROOT / "tools" / "doctor.py"
MODEL = ROOT / "launch" / "demo" / "model"
ALIKE = dict.fromkeys(findings.AGREE, "same")
ENOUGH = {"disk GiB": 9.0, "shm GiB": 1.0, "open files": 4096, "memory GiB": 100, "clock s": 0.0}
UNREADABLE = "unreadable: [Errno 2] No such file or directory: '/m/config.json'"


def healthy(hosts=4, ranks=2):
    """Rows of ``ranks`` ranks on each of node1, node2, ..."""
    names = {f"node{i + 1}": f"10.0.0.{i + 1}" for i in range(hosts)}
    return [
        {
            "host": host,
            "rank": i * ranks + j,
            **ALIKE,
            **ENOUGH,
            "variables": {"NCCL_DEBUG": "WARN"},
            "names": {**names},
        }
        for i, host in enumerate(names)
        for j in range(ranks)
    ]


def planted(rows, host, **facts):
    """The rows, with facts replaced on one host."""
    return [row | facts if row["host"] == host else row for row in rows]


def resolved(rows, host, **names):
    """The rows, with what names mean on one host replaced."""
    return [row | {"names": row["names"] | names} if row["host"] == host else row for row in rows]


def over_ssh(rows):
    return [{fact: value for fact, value in row.items() if fact != "rank"} for row in rows]


# Judging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hosts", "ranks"), [(1, 1), (1, 8), (2, 1), (3, 2), (4, 8)])
def test_alike_hosts_have_no_fault(hosts, ranks):
    assert findings.odd_ones_out(healthy(hosts, ranks)) == []
    assert findings.odd_ones_out(over_ssh(healthy(hosts, 1))) == []
    assert findings.odd_ones_out([]) == []


@pytest.mark.parametrize(("fact", "remedy"), findings.AGREE.items())
def test_the_odd_one_of_four_is_named_with_both_values_and_a_remedy(fact, remedy):
    rows = planted(healthy(), "node3", **{fact: "odd"})
    assert findings.odd_ones_out(rows) == [f"{fact} odd on node3 (ranks 4-5), same on the others. {remedy}"]
    assert findings.odd_ones_out(over_ssh(rows))[0].startswith(f"{fact} odd on node3, same on the others. ")


def test_one_rank_that_differs_from_its_own_host_is_named():
    rows = healthy(1, 4)
    rows[2]["CUDA"] = "odd"
    assert [fault.split(". ")[0] for fault in findings.odd_ones_out(rows)] == [
        "CUDA odd on node1 (rank 2), same on the others"
    ]


def test_two_odd_hosts_with_different_values_are_two_faults():
    rows = planted(planted(healthy(5, 1), "node2", torch="1"), "node4", torch="2")
    found = [fault.split(". ")[0] for fault in findings.odd_ones_out(rows)]
    assert found == ["torch 1 on node2 (rank 1), same on most", "torch 2 on node4 (rank 3), same on most"]


def test_two_hosts_that_differ_are_both_named_and_neither_is_right():
    for rows in (healthy(2, 2), healthy(2, 2)[:3]):  # also where one has more ranks: each host has one vote
        (fault,) = findings.odd_ones_out(planted(rows, "node2", peft="0.1.0"))
        last = "ranks 2-3" if len(rows) == 4 else "rank 2"
        assert fault.startswith(f"peft same on node1 (ranks 0-1), 0.1.0 on node2 ({last}): no majority. Install")


@pytest.mark.parametrize("value", ["missing", UNREADABLE, "unwritable: /out"])
def test_what_is_broken_is_a_fault_even_if_it_is_so_everywhere(value):
    everywhere = [row | {"model": value} for row in healthy()]
    assert findings.odd_ones_out(everywhere)[0].startswith(f"model {value} on node1, node2, node3, node4 (ranks 0-7). ")
    two = planted(healthy(2, 1), "node2", model=value)
    (fault,) = findings.odd_ones_out(two)
    assert fault.startswith(f"model {value} on node2 (rank 1). "), "it has no vote on what the others should have"


def test_variable_that_one_host_lacks_is_named():
    rows = planted(healthy(), "node4", variables={})
    assert findings.odd_ones_out(rows)[0].startswith(
        "NCCL_DEBUG unset on node4 (ranks 6-7), WARN on the others. Set it ali"
    )


def test_only_variables_that_change_a_run_are_looked_at_and_tokens_stay_secret():
    env = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_secret", "TORCHELASTIC_RUN_ID": "1", "CUDA_VISIBLE_DEVICES": "0"}
    found = of_host.variables(env | {"DS_ACCELERATOR": "cpu", "PATH": "/bin", "MY_NCCL_DEBUG": "1"})
    assert sorted(found) == ["DS_ACCELERATOR", "HF_TOKEN", "NCCL_DEBUG"]
    assert "secret" not in found["HF_TOKEN"]
    assert found["HF_TOKEN"] != of_host.variables({"HF_TOKEN": "other"})["HF_TOKEN"]


def test_host_that_takes_a_name_for_another_address_is_named():
    rows = resolved(healthy(), "node3", node1="10.0.0.99")
    (fault,) = findings.odd_ones_out(rows)
    assert fault.startswith(
        "node1 resolves to 10.0.0.99 on node3 (ranks 4-5), 10.0.0.1 on the others. Correct /etc/hosts"
    )
    (fault,) = findings.odd_ones_out(resolved(healthy(), "node3", node1=of_host.UNKNOWN))
    assert fault.startswith("node1 resolves to nothing on node3 (ranks 4-5), 10.0.0.1 on the others")
    (fault,) = findings.odd_ones_out(resolved(healthy(2, 1), "node2", node1="10.0.0.99"))
    assert fault.startswith("node1 resolves to 10.0.0.1 on node1 (rank 0), 10.0.0.99 on node2 (rank 1): no majority")


@pytest.mark.parametrize("own", ["127.0.1.1", of_host.UNKNOWN])
def test_own_name_that_says_nothing_to_others_is_a_note(own):
    rows = resolved(healthy(), "node2", node2=own)
    assert findings.odd_ones_out(rows) == []
    assert findings.notes(rows) == [
        f"node2 resolves its own name to {own}. Training does not mind: it sets the interface itself."
    ]


def test_containers_that_know_only_their_own_names_have_no_fault():
    rows = healthy()
    for row in rows:
        row["names"] = {name: row["names"][name] if name == row["host"] else of_host.UNKNOWN for name in row["names"]}
    assert findings.odd_ones_out(rows) == []


@pytest.mark.parametrize(("fact", "value"), [("disk GiB", 0.5), ("shm GiB", 0.0625), ("open files", 256)])
def test_what_is_short_is_named(fact, value):
    (fault,) = findings.odd_ones_out(planted(healthy(), "node2", **{fact: value}))
    assert fault.startswith(f"{fact} {value:.3g} on node2: must be at least {findings.LEAST[fact][0]:g}. ")


@pytest.mark.parametrize("fact", findings.HALF)
def test_host_below_half_of_the_others_is_named(fact):
    rates = {"node1": 20.0, "node2": 9.0, "node3": 24.0, "node4": 18.5}
    rows = [{"host": host, fact: rate} for host, rate in rates.items()]
    (fault,) = findings.odd_ones_out(rows)
    assert fault == f"{fact} 9 on node2: below half of 20, the others' median. {findings.HALF[fact]}"
    rows[1][fact] = 10.0
    assert findings.odd_ones_out(rows) == []


def test_of_two_hosts_neither_is_slow():
    rows = [{"host": "node1", "link GB/s": 1.0}, {"host": "node2", "link GB/s": 9.0}]
    assert findings.odd_ones_out(rows) == []
    assert findings.notes(rows) == ["of two hosts neither can be called slow: compare the figures yourself."]


@pytest.mark.parametrize(
    ("offsets", "named"),
    [
        ((0, 0, -3.5, 0.1), {"node3": "-3.5"}),
        ((0, 5, 5, 5), {"node1": "-5.0"}),  # offsets are to rank 0, which may be the wrong one
        ((0, 1.5), {"node1": "-0.8", "node2": "+0.8"}),
        ((0, 0.5, -0.4, 0), {}),
    ],
)
def test_wrong_clock_is_named(offsets, named):
    rows = [row | {"clock s": float(offset)} for row, offset in zip(healthy(len(offsets), 1), offsets, strict=True)]
    faults = findings.odd_ones_out(rows)
    assert len(faults) == len(named)
    for fault, (host, offset) in zip(faults, named.items(), strict=True):
        assert fault == f"clock of {host} {offset} s from the middle one. Start chrony or ntpd there."


def test_host_that_could_not_be_asked_is_a_fault_and_the_others_are_judged():
    rows = [*over_ssh(planted(healthy(3, 1), "node2", numpy="1")), {"host": "node9", "error": "node9: no sshd"}]
    first, second = findings.odd_ones_out(rows)
    assert first == "node9: no sshd"
    assert second.startswith("numpy 1 on node2, same on the others")


@pytest.mark.parametrize("hosts", range(1, 10))
def test_rounds_meet_every_pair_of_neighbours_once(hosts):
    rounds = ranks.rounds(range(0, 8 * hosts, 8))
    for pairs in rounds:
        members = [host for pair in pairs for host in pair]
        assert len(members) == len(set(members)), "one partner at a time"
    met = sorted(sorted(pair) for pairs in rounds for pair in pairs)
    ring = [[8 * i, 8 * i + 8] for i in range(hosts - 1)] + ([[0, 8 * hosts - 8]] if hosts > 2 else [])
    assert met == sorted(ring)
    assert len(rounds) <= 3


# Showing --------------------------------------------------------------------------------------------------------------


def test_table_of_32_ranks_has_one_line_a_host_and_what_is_alike_once():
    rows = planted(healthy(4, 8), "node3", peft="0.1.0")
    rows[9]["clock s"] = 0.01
    lines = findings.table(rows)
    assert lines[:6] == [
        "rank     host   peft   clock s",
        "0-7      node1  same   0",
        "8,10-15  node2  same   0",
        "9        node2  same   0.01",
        "16-23    node3  0.1.0  0",
        "24-31    node4  same   0",
    ]
    everywhere = " ".join(lines[6:])
    assert everywhere.startswith("everywhere: python same, torch same")
    assert "disk GiB 9" in everywhere
    assert "peft" not in everywhere
    assert max(map(len, lines)) <= 120


def test_table_over_ssh_has_no_ranks_and_cuts_long_cells():
    lines = findings.table(over_ssh(planted(healthy(2, 1), "node2", model=UNREADABLE)))
    assert lines[:3] == ["host   model", "node1  same", "node2  unreadable: [Errno 2] No"]


# Facts ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(tmp_path):
    """Two copies of a model in two shards."""
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"hidden_size": 8}')
        for shard in ("a.safetensors", "b.safetensors"):
            (folder / shard).write_bytes((2).to_bytes(8, "little") + b"{}" + shard.encode())
        index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "one", tmp_path / "two"


def test_fingerprint_tells_copies_apart(copies):
    one, two = copies
    seen = {of_host.fingerprint(str(one))}
    assert of_host.fingerprint(str(two)) in seen
    for file, content in (
        ("config.json", b'{"hidden_size": 9}'),
        ("b.safetensors", b"longer than it was"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "a.safetensors"}}'),
    ):
        (two / file).write_bytes(content)
        found = of_host.fingerprint(str(two))
        assert not found.startswith("unreadable")
        assert found not in seen
        seen.add(found)


def test_fingerprint_without_an_index_reads_the_header(copies):
    one, two = copies
    for folder, name in ((one, "first"), (two, "other")):
        (folder / "model.safetensors.index.json").unlink()
        header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert of_host.fingerprint(str(one)) != of_host.fingerprint(str(two))
    shutil.copy(one / "model.safetensors", two)
    assert of_host.fingerprint(str(one)) == of_host.fingerprint(str(two))


def test_unreadable_file_of_a_model_is_named(copies):
    one, _ = copies
    (one / "b.safetensors").unlink()
    missing = f"unreadable: [Errno 2] No such file or directory: '{one}/b.safetensors'"
    assert of_host.fingerprint(str(one)) == missing
    (one / "b.safetensors").write_bytes(b"")
    assert of_host.fingerprint(str(one)) == f"unreadable: {one}/b.safetensors is cut short"
    (one / "model.safetensors.index.json").write_text("{")
    assert of_host.fingerprint(str(one)).startswith("unreadable: ")
    (one / "config.json").unlink()
    assert f"'{one}/config.json'" in of_host.fingerprint(str(one))
    assert of_host.fingerprint("/nowhere/model").startswith("unreadable: ")


def test_name_on_the_hub_is_no_fault_but_said():
    assert of_host.fingerprint("org/model") == "no folder"
    assert "taken for a name on the hub" in findings.notes([row | {"model": "no folder"} for row in healthy()])[0]
    one = planted(healthy(), "node2", model="no folder")
    assert findings.notes(one) == []
    assert findings.odd_ones_out(one)[0].startswith("model no folder on node2 (ranks 2-3), same on the others. ")


def facts(**more):
    return of_host.facts(**{"root": str(ROOT), "folder": str(ROOT), "model": None, "output": str(ROOT)} | more)


def test_facts_are_json_and_say_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(of_host, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setenv("PATH", "/nonexistent")
    found = facts(names=["localhost", "no such name"], output=str(tmp_path / "not" / "there" / "yet"))
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["no-such-package"] == "missing"
    assert found["names"] == {"localhost": "127.0.0.1", "no such name": of_host.UNKNOWN}
    assert (found["GPUs"], found["model"], found["output"]) == ("-", "-", "writable")
    assert not (tmp_path / "not").exists()


def test_facts_of_a_host_without_the_checkout_or_a_writable_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(of_host.os, "access", lambda path, mode: False)
    found = facts(root=str(tmp_path), folder=str(tmp_path / "x"), output=str(tmp_path))
    assert found["code"].startswith("missing: [Errno 2]")
    assert found["folder"] == f"missing: {tmp_path}/x"
    assert found["output"] == f"unwritable: {tmp_path}"


def test_code_that_differs_in_one_file_has_another_hash(tmp_path):
    for folder in ("lora_one_dist", "launch", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert of_host.code(tmp_path) == of_host.code(ROOT)
    with (tmp_path / "lora_one_dist" / "cluster" / "comm.py").open("a") as file:
        file.write("\n")
    assert of_host.code(tmp_path) != of_host.code(ROOT)


def program(folder, name, text):
    """Put a program at the head of PATH's folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_gpus_are_counted(tmp_path, monkeypatch):
    program(
        tmp_path / "bin", "nvidia-smi", 'printf "NVIDIA H200, 143771 MiB, 570.1\\nNVIDIA H200, 143771 MiB, 570.1\\n"'
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    assert of_host.gpus() == "2 x NVIDIA H200, 143771 MiB, 570.1"
    program(tmp_path / "bin", "nvidia-smi", "echo no driver; exit 9")
    assert of_host.gpus() == "-"


def test_what_torch_sees_is_counted(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    assert ranks.seen_by_torch() == "-"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert ranks.seen_by_torch() == "12.8, NCCL 2.27.3, 8 x NVIDIA H200 140 GiB"


# The command line -----------------------------------------------------------------------------------------------------


def test_model_and_output_come_from_the_config_unless_given(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: /models/x, nonsense: 1}\noutput_dir: runs/x\n")
    request = command.request_of(command.parse(["--config", str(config), "--local_rank=3"]), ROOT)
    assert (request["model"], request["output"], request["root"]) == ("/models/x", "runs/x", str(ROOT))
    given = command.parse(["--config", str(config), "--model", "m", "--output", "o"])
    assert command.request_of(given, ROOT) | {"model": "m", "output": "o"} == command.request_of(given, ROOT)
    assert command.request_of(command.parse([]), ROOT)["model"] is None
    config.write_text("- a list\n")
    with pytest.raises(ValueError, match="must be the YAML of a run"):
        command.request_of(command.parse(["--config", str(config)]), ROOT)
    with pytest.raises(SystemExit):
        command.parse(["--timeout", "1"])


def test_hostfile_is_read_as_deepspeed_reads_it():
    text = "# the cluster\nnode1 slots=8\n\n  node2   slots=8 # new\n#node3 slots=8\n10.0.0.4 slots=4\n"
    assert over_ssh_to.hosts_in(text) == ["node1", "node2", "10.0.0.4"]


BAD_HOSTFILES = {
    "": "nothing",
    "# node1 slots=1\n": "nothing",
    "node1 slots=1\nnode2\n": "'node2'",
    "node1 slots=1\nnode1 slots=2\n": "'node1 slots=1'",
    "node1 slots=many": "'node1 slots=many'",
}


@pytest.mark.parametrize(("text", "named"), BAD_HOSTFILES.items())
def test_bad_hostfile_is_refused_with_the_line(text, named):
    with pytest.raises(ValueError, match=f"^hostfile holds {named}: must be one line 'name slots=N' for each host"):
        over_ssh_to.hosts_in(text)


def alone(*arguments, **env):
    """The doctor as one process without a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in command.RANK_VARIABLES}
    line = [sys.executable, str(DOCTOR), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=kept | env, timeout=120)


def test_one_process():
    run = alone("--model", MODEL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"model {of_host.fingerprint(str(MODEL))}" in run.stdout
    assert run.stdout.endswith("\nall 1 rank on 1 host agree\n")
    run = alone("--model", "/nowhere/model")
    assert run.returncode == 1
    assert "fault: model unreadable: [Errno 2] No such file or directory: '/nowhere/model/config.json' on" in run.stdout
    assert run.stdout.endswith("\n1 fault\n")


@pytest.mark.full
def test_rank_that_cannot_join_says_who_and_why(tmp_path):
    run = alone(RANK="3")
    assert run.returncode == 1
    assert run.stderr.startswith(f"rank 3 on {socket.gethostname()} failed: RANK set but WORLD_SIZE, LOCAL_RANK, ")
    run = alone("--config", tmp_path / "none.yaml")
    assert run.returncode == 1
    assert run.stderr.startswith(f"rank 0 on {socket.gethostname()} failed: [Errno 2] No such file")
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = alone("--timeout", 5, RANK="0", **meeting)
    assert run.returncode == 1
    assert run.stderr.startswith(f"rank 0 on {socket.gethostname()} failed: 1 of 2 ranks have not come to 127.0.0.1:")


# Ranks ----------------------------------------------------------------------------------------------------------------


def examined(changes):
    """Runs on a rank: exit code and output of the doctor, with facts replaced by rank."""
    measured = of_host.facts
    ranks.facts = lambda **request: measured(**request) | changes.get(int(os.environ["RANK"]), {})
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = command.main(["--local_rank=0", "--timeout", "60", "--megabytes", "1", "--model", str(MODEL)])
    return code, output.getvalue()


def test_two_ranks_that_agree():
    (code, said), (other_code, silence) = run_ranks(2, examined, {}, init=False)
    assert (code, other_code) == (0, 0)
    assert said.startswith("2 ranks on 1 host, cpu, launched by environment\n")
    assert said.endswith("\nall 2 ranks on 1 host agree\n")
    assert "inside GB/s" in said
    assert "fault" not in said
    assert silence == ""


def test_rank_with_another_package_is_named_and_every_rank_fails():
    usual = importlib.metadata.version("peft")
    (code, said), (other_code, _) = run_ranks(2, examined, {1: {"peft": "0.1.0"}}, init=False)
    assert (code, other_code) == (1, 1)
    here = socket.gethostname()
    assert f"fault: peft {usual} on {here} (rank 0), 0.1.0 on {here} (rank 1): no majority. Install" in said
    assert said.endswith("\n1 fault\n")


def measured(hosts):
    """Runs on a rank: its bandwidths, with one letter a rank for its host."""
    socket.gethostname = lambda: hosts[int(os.environ["RANK"])]
    comm.init()
    return ranks.own_bandwidth([[r for r, of in enumerate(hosts) if of == host] for host in sorted(set(hosts))], 0.25)


ALL = ["inside GB/s", "between GB/s", "link GB/s"]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("aaa", [ALL[:1]] * 3),
        ("aabb", [ALL, ALL[:1], ALL, ALL[:1]]),
        ("abab", [ALL, ALL, ALL[:1], ALL[:1]]),
        ("abcab", [[ALL[0], ALL[2]], [ALL[0], ALL[2]], ALL[2:], ALL[:1], ALL[:1]]),  # "between" needs equal hosts
        ("abc", [ALL[1:]] * 3),
    ],
)
def test_first_rank_of_each_host_measures_inside_and_against_its_neighbours(hosts, expected):
    for found, host, rates in zip(run_ranks(len(hosts), measured, hosts, init=False), hosts, expected, strict=True):
        assert found.pop("host") == host
        assert list(found) == rates
        assert all(rate > 0 for rate in found.values())


def swaps():
    """Runs on a rank: neighbours swap, then sums inside the host and between hosts."""
    own = torch.full((3,), float(comm.rank()))
    received = comm.send_receive(own, comm.rank() ^ 1)
    return own.tolist(), received.tolist(), comm.sum_among(own.clone(), "host").tolist()


def test_swap_gives_each_the_others_and_keeps_its_own():
    for rank, (own, received, inside) in enumerate(run_ranks(2, swaps)):
        assert own == [float(rank)] * 3
        assert received == [float(1 - rank)] * 3
        assert inside == [1.0] * 3


# Over ssh -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An ssh that runs the command here; hosts named after what goes wrong."""
    text = """\
while [ "$1" = -o ] || [ "$1" = -p ]; do shift 2; done
case $1 in
    deaf) exec sleep 9 ;;
    refused) echo "root@refused: Permission denied (publickey)." >&2; exit 255 ;;
    localhost | 127.0.0.1 | nowhere) echo "ssh: connect to host" >&2; exit 255 ;;
    bare) echo "env: 'python': No such file or directory" >&2; exit 127 ;;
    *) echo "welcome to $1"; eval "$2" ;;
esac"""
    program(tmp_path / "bin", "ssh", text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")  # which the doctor sets
    for name in command.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*hosts, arguments=("--model", str(MODEL))):
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{host} slots=2\n" for host in hosts))
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = command.main(["--hostfile", str(hostfile), *arguments])
        faults = [line.removeprefix("fault: ") for line in output.getvalue().splitlines() if line.startswith("fault: ")]
        return code, output.getvalue(), faults

    return run


def test_hosts_that_agree_over_ssh(ssh):
    code, said, _ = ssh("one", "two", "three")
    assert code == 0, said
    assert said.startswith("3 hosts, asked over ssh from ")
    assert f"model {of_host.fingerprint(str(MODEL))}" in said
    assert said.endswith("\nall 3 hosts agree\n")


def test_each_host_that_cannot_be_asked_is_named_with_what_is_in_the_way(ssh, monkeypatch):
    monkeypatch.setattr(over_ssh_to, "SSH_SECONDS", 2)
    addresses = {"refused": "127.0.0.1", "localhost": "127.0.0.1"}

    def address(name):
        if name == "nowhere":
            raise socket.gaierror(-2, "Name or service not known")
        return addresses.get(name, "10.0.0.1")

    monkeypatch.setattr(over_ssh_to.socket, "gethostbyname", address)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        open_port = str(listening.getsockname()[1])
        code, said, faults = ssh("one", "refused", "deaf", "bare", "nowhere", arguments=("--ssh_port", open_port))
    assert code == 1
    refused, deaf, bare, nowhere = faults[:4]
    assert refused.startswith("refused: ssh fails (root@refused: Permission denied (publickey)). Try: ssh -o BatchMode")
    assert deaf.startswith("deaf has not answered in 2 s.")
    assert bare.startswith(f"bare cannot run {sys.executable}: env: 'python': No such file or directory. Make the same")
    assert nowhere.startswith("nowhere cannot be resolved here ([Errno -2] Name or service not known). Add it to")
    assert "\none\n" in said, "the other host was asked all the same"
    closed_port = str(free_port())
    code, said, (closed,) = ssh("localhost", arguments=("--ssh_port", closed_port))
    assert code == 1
    assert "note: " not in said
    assert closed.startswith(
        f"localhost: no sshd at 127.0.0.1 port {closed_port} ([Errno 111] Connection refused). Start"
    )


def test_bad_hostfile_and_missing_ssh_end_with_what_to_do(ssh, monkeypatch, capsys):
    assert ssh()[0] == 1
    assert "failed: hostfile holds nothing: must be one line" in capsys.readouterr().err
    assert command.main(["--hostfile", "gone"]) == 1
    assert "failed: --hostfile gone: no such file" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, (fault,) = ssh("one")
    assert code == 1
    assert fault.startswith("one was not asked: [Errno 2] No such file or directory: 'ssh'. Install an ssh client here")


@pytest.mark.parametrize(("ahead", "expected"), [(0.0, 0.0), (7.0, 7.0), (-7.0, -7.0)])
def test_clock_over_ssh_is_off_only_outside_of_question_and_answer(ahead, expected, monkeypatch):
    def answer(*_, **__):
        row = {"host": "one", "time": over_ssh_to.time.time() + ahead}
        return subprocess.CompletedProcess([], 0, json.dumps(row), "")

    monkeypatch.setattr(over_ssh_to.subprocess, "run", answer)
    assert over_ssh_to.ask("one", {}, None)["clock s"] == pytest.approx(expected, abs=0.5)


# Four hosts -----------------------------------------------------------------------------------------------------------


def under_deepspeed(hosts, *arguments):
    """The doctor on one rank of each of the four hosts, over pdsh."""
    launcher = ["deepspeed", "--hostfile", hosts.hostfile(4, 1), "--master_addr", "node1"]
    return hosts.run(1, *launcher, DOCTOR, "--model", MODEL, *arguments)


def from_node1(hosts, *more):
    """The doctor without a launcher, over ssh from node1 to all four and to names in ``more``."""
    hostfile = hosts.folder / "asked"
    hostfile.write_text(hosts.hostfile(4, 1).read_text() + "".join(f"{name} slots=1\n" for name in more))
    return hosts.run(1, sys.executable, DOCTOR, "--hostfile", hostfile, "--model", MODEL)


def faults_of(run):
    assert run.returncode == 1, run.stdout
    return [line.split("fault: ", 1)[1] for line in run.stdout.splitlines() if "fault: " in line]


def etc_hosts(hosts, **addresses):
    """/etc/hosts as all have it, with some addresses replaced."""
    right = {f"node{i}": address for i, address in hosts.address.items()}
    return "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in (right | addresses).items())


@pytest.mark.full
def test_four_hosts_agree(fresh_hosts):
    run = under_deepspeed(fresh_hosts)
    # The hosts share this machine's cores: a speed may look odd on a busy machine, and nothing else may.
    faults = [line for line in run.stdout.splitlines() if "fault: " in line]
    assert all("GB/s" in fault for fault in faults), run.stdout
    assert ("all 4 ranks on 4 hosts agree" in run.stdout) == (run.returncode == 0) == (not faults), run.stdout
    assert "link GB/s" in run.stdout
    run = from_node1(fresh_hosts)
    assert run.returncode == 0, run.stdout
    assert "all 4 hosts agree" in run.stdout


@pytest.mark.full
def test_host_with_another_peft_is_named(fresh_hosts, tmp_path):
    usual = importlib.metadata.version("peft")
    installed = next(Path(importlib.metadata.distribution("peft").locate_file("")).glob("peft-*.dist-info"))
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    assert fresh_hosts.run(3, "mount", "--bind", tmp_path, installed).returncode == 0
    (fault,) = faults_of(from_node1(fresh_hosts))
    assert fault == f"peft 0.1.0 on node3, {usual} on the others. {findings.SAME_PACKAGES}"


@pytest.mark.full
def test_host_without_the_model_is_named(fresh_hosts):
    assert fresh_hosts.run(2, "mount", "-t", "tmpfs", "tmpfs", MODEL).returncode == 0
    (fault,) = faults_of(from_node1(fresh_hosts))
    assert fault.startswith(f"model unreadable: [Errno 2] No such file or directory: '{MODEL}/config.json' on node2. ")


@pytest.mark.full
def test_host_that_takes_the_master_for_another_address_is_named(fresh_hosts):
    wrong = f"{fresh_hosts.network}.99"
    fresh_hosts.edit(3, "hosts", etc_hosts(fresh_hosts, node1=wrong))
    run = under_deepspeed(fresh_hosts, "--timeout", 15)
    assert run.returncode == 1, run.stdout
    assert "rank 0 on node1 failed: 1 of 4 ranks have not come to node1:29500 in 15 s: 2. " in run.stdout
    assert f"rank 2 on node3 failed: node3 cannot reach node1:29500 (here {wrong}) in 15 s" in run.stdout
    (fault,) = faults_of(from_node1(fresh_hosts))
    assert fault.startswith(f"node1 resolves to {wrong} on node3, {fresh_hosts.address[1]} on the others. ")


@pytest.mark.full
def test_host_that_takes_another_host_for_a_wrong_address_is_named(fresh_hosts):
    wrong = f"{fresh_hosts.network}.99"
    fresh_hosts.edit(4, "hosts", etc_hosts(fresh_hosts, node2=wrong))
    (fault,) = faults_of(under_deepspeed(fresh_hosts, "--megabytes", 0))
    assert fault.startswith(f"node2 resolves to {wrong} on node4 (rank 3), {fresh_hosts.address[2]} on the others. ")


@pytest.mark.full
def test_hosts_without_ssh_are_named_with_the_reason(fresh_hosts, tmp_path):
    (tmp_path / "no_keys").touch()
    key = fresh_hosts.folder / "client_key.pub"
    assert fresh_hosts.run(4, "mount", "--bind", tmp_path / "no_keys", key).returncode == 0
    bridge = f"{fresh_hosts.network}.254"  # an address that is up, and nothing listens there
    for i in fresh_hosts.numbers:
        fresh_hosts.edit(i, "hosts", etc_hosts(fresh_hosts, idle=bridge))
    refused, closed, unknown = faults_of(from_node1(fresh_hosts, "idle", "nowhere"))
    assert refused.startswith(
        "node4: ssh fails (root@node4: Permission denied (publickey)). Try: ssh -o BatchMode=yes "
    )
    assert closed.startswith(f"idle: no sshd at {bridge} port 22 ([Errno 111] Connection refused). Start it, ")
    assert unknown.startswith("nowhere cannot be resolved here (")


@pytest.mark.full
def test_host_behind_a_slow_link_is_named(fresh_hosts):
    slow = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "400mbit", "burst", "64k", "latency", "50ms")
    if fresh_hosts.run(2, *slow).returncode != 0:
        pytest.skip("this kernel cannot slow a link down (sch_tbf)")
    # The hosts share this machine's cores: a busy neighbour may look slow beside it, but not by a factor of ten.
    named = [fault for fault in faults_of(under_deepspeed(fresh_hosts)) if fault.startswith("link GB/s 0.0")]
    assert len(named) == 1
    assert " on node2: below half of " in named[0]
