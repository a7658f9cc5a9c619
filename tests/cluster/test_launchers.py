"""Who am I: every launcher's environment."""

from __future__ import annotations

import os
import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lora_one_dist.cluster import launchers
from lora_one_dist.cluster.launchers import Launch, LaunchError, resolve_launch

DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1239876",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def without(env, *names):
    return {name: value for name, value in env.items() if name not in names}


# The launch environment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "source"),
    [({}, "environment"), ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun"), ({"CROSS_SIZE": "2"}, "deepspeed")],
)
def test_torchrun_and_deepspeed_variables_are_taken_as_they_are(more, source):
    assert resolve_launch(DEEPSPEED | more) == Launch(source, 5, 8, 1, "node0", 29500)
    assert resolve_launch(DEEPSPEED | SRUN | more).source == source, "torchrun inside srun"


@pytest.mark.parametrize("missing", DEEPSPEED)
def test_half_set_environment_names_what_is_missing(missing):
    with pytest.raises(LaunchError, match=f" set but {missing} missing: the launch environment is half set. Set all"):
        resolve_launch(without(DEEPSPEED, missing))


def test_every_missing_variable_is_named_at_once():
    with pytest.raises(LaunchError, match=r"^RANK set but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        resolve_launch({"RANK": "0"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["one", "", "1.5"])
def test_variable_that_is_no_number_is_named_with_its_value(name, value):
    with pytest.raises(LaunchError, match=f"^{name} = '{value}': must be a whole number"):
        resolve_launch(DEEPSPEED | {name: value})


@pytest.mark.parametrize(
    "values",
    [{"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "-1"}, {"WORLD_SIZE": "0", "RANK": "0"}, {"WORLD_SIZE": "5"}],
)
def test_rank_outside_the_world_is_refused(values):
    with pytest.raises(LaunchError, match=r"rank -?\d, local rank -?\d, world size \d .env.*: a rank must be in"):
        resolve_launch(DEEPSPEED | values)


def test_no_variables_is_one_process_on_a_free_port():
    launch, other = resolve_launch({}), resolve_launch({"MASTER_ADDR": "left over", "SLURM_JOB_ID": "1"})
    for found in (launch, other):
        assert (found.source, found.rank, found.world_size, found.local_rank) == ("single process", 0, 1, 0)
        assert found.master_addr == "127.0.0.1"
    assert launch.master_port > 0


def test_sbatch_without_srun_is_one_process():
    # sbatch sets SLURM_PROCID and SLURM_NTASKS in the batch script too: only a step has tasks.
    assert resolve_launch(without(SRUN, "SLURM_STEP_ID")).source == "single process"


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A fake that expands the one node list."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] || exit 1\nprintf "gpu07\\ngpu08\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_srun_meets_on_the_steps_first_node_at_the_jobs_port(scontrol):
    assert resolve_launch(SRUN) == Launch("srun", 3, 4, 1, "gpu07", 29876)
    assert resolve_launch(SRUN | {"SLURM_JOB_ID": "1239877"}).master_port == 29877, "two jobs may share a node"
    of_job = without(SRUN, "SLURM_STEP_NODELIST") | {"SLURM_JOB_NODELIST": "gpu[07-08]"}
    assert resolve_launch(of_job).master_addr == "gpu07"


def test_srun_takes_a_given_rendezvous_without_asking_scontrol(monkeypatch):
    monkeypatch.setattr(launchers.subprocess, "run", None)
    launch = resolve_launch(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (launch.master_addr, launch.master_port) == ("head", 1234)


def test_node_list_that_scontrol_refuses_is_named(scontrol):
    with pytest.raises(LaunchError, match=r"node list 'gpu\[1' cannot be expanded by scontrol. Set MASTER_ADDR"):
        resolve_launch(SRUN | {"SLURM_STEP_NODELIST": "gpu[1"})


def test_the_steps_tasks_are_the_world(scontrol):
    # As with srun --preserve-env, which keeps the allocation's SLURM_NTASKS.
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}
    assert resolve_launch(step) == Launch("srun", 3, 4, 1, "gpu07", 29876)
    assert resolve_launch(without(step, "SLURM_NTASKS")).world_size == 4
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert resolve_launch(SRUN | one) == Launch("srun", 0, 1, 0, "gpu07", 29876), (
        "srun --ntasks 1 in an allocation of 4"
    )


# What SLURM 22.05 sets in the shell of salloc (LaunchParameters=use_interactive_step, --ntasks 4).
SALLOC_SHELL = SRUN | {
    **{"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "33097"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
}
SHELL_REFUSED = (
    r"^SLURM_STEP_NUM_TASKS = {}, SLURM_NTASKS = 4: this is an interactive shell of SLURM, in which nobody has started "
    r"the other ranks\. Start all of them by srun --ntasks 4 {}--kill-on-bad-exit=1 \S+; or .* with --ntasks 1\.$"
)


def test_the_shell_of_salloc_is_refused_with_the_command_to_use(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "launch/train.py", "--config", "a b.yaml"])
    with pytest.raises(LaunchError) as caught:
        resolve_launch(SALLOC_SHELL)
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    assert " --kill-on-bad-exit=1 python launch/train.py --config 'a b.yaml'; or this process" in str(caught.value)
    with pytest.raises(LaunchError, match=SHELL_REFUSED.format(1, "")):
        resolve_launch(SALLOC_SHELL)


@pytest.mark.parametrize("typed", [True, False])
def test_the_first_shell_of_several_is_refused(typed, scontrol, monkeypatch):
    """``srun --ntasks 4 --pty bash``: the same variables as ``srun`` from there, which no prompt has started."""
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    monkeypatch.setattr(launchers, "_typed_into_a_shell", lambda: typed)
    shell = SALLOC_SHELL | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    if typed:
        with pytest.raises(LaunchError, match=SHELL_REFUSED.format(4, "--overlap ")):
            resolve_launch(shell)
    assert resolve_launch(shell if not typed else without(shell, "SLURM_PTY_PORT")).world_size == 4


def test_other_launchers_work_in_a_shell_of_slurm(monkeypatch):
    for more, source in [
        ({}, "environment"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"CROSS_SIZE": "2"}, "deepspeed"),
    ]:
        assert resolve_launch(SALLOC_SHELL | DEEPSPEED | more).source == source
    monkeypatch.setattr(launchers, "_launch_from_mpi", lambda env: Launch("mpirun (mpi4py)", 1, 2, 1, "gpu07", 1234))
    assert resolve_launch(SALLOC_SHELL | {"OMPI_COMM_WORLD_SIZE": "2"}).source == "mpirun (mpi4py)"
    assert resolve_launch(SRUN | {"PMI_SIZE": "4", "MASTER_ADDR": "head"}).source == "srun", "srun --mpi=pmi2"


@pytest.mark.parametrize("missing", ["SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_half_set_srun_environment_names_what_is_missing(missing):
    with pytest.raises(LaunchError, match=f"SLURM_PROCID set but {missing} missing. Start with srun"):
        resolve_launch(without(SRUN, missing))


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_srun_variable_that_is_no_number_is_named(name):
    with pytest.raises(LaunchError, match=f"^{name} = 'x': must be a whole number"):
        resolve_launch(SRUN | {name: "x", "MASTER_ADDR": "head"})


def test_srun_rank_outside_the_world_is_refused():
    with pytest.raises(LaunchError, match=r"rank 3, local rank 1, world size 3 \(srun\)"):
        resolve_launch(SRUN | {"SLURM_NTASKS": "3", "MASTER_ADDR": "head"})


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("rank", [0, 3])
def test_mpirun_counts_ranks_of_a_host_and_meets_on_rank_0s(rank, variable, monkeypatch):
    world = SimpleNamespace(rank=rank, size=5, allgather=lambda own: ["a", "b", "a", "b", "b"])
    world.bcast = lambda value: value if rank == 0 else ("a", 4321)
    fake = ModuleType("mpi4py")
    finalized = []
    fake.MPI = SimpleNamespace(
        COMM_WORLD=world, Get_processor_name=lambda: "ab"[rank % 2], Finalize=lambda: finalized.append(1)
    )
    monkeypatch.setattr(launchers, "reachable_name", lambda host: host)
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    launch = resolve_launch({variable: "5", "MASTER_PORT": "4321"})
    assert launch == Launch("mpirun (mpi4py)", rank, 5, {0: 0, 3: 1}[rank], "a", 4321)
    assert finalized, "mpirun takes a process that never finalized for crashed"


@pytest.mark.parametrize(("resolves_to", "expected"), [("10.1.2.3", "gpu01"), ("127.0.1.1", "own"), (None, "own")])
def test_own_name_is_given_to_others_only_if_it_means_an_outside_address(resolves_to, expected, monkeypatch):
    def resolve(host):
        if resolves_to is None:
            raise OSError("unknown")
        return resolves_to

    monkeypatch.setattr(launchers.socket, "gethostbyname", resolve)
    monkeypatch.setattr(launchers, "first_address", lambda: "own")
    assert launchers.reachable_name("gpu01") == expected


def test_first_address_is_of_an_interface_that_is_up_and_outside(monkeypatch):
    inet, other = socket.AF_INET, socket.AF_INET6

    def addresses():
        found = {"lo": (inet, "127.0.0.1"), "docker0": (inet, "172.17.0.1"), "eth9": (inet, "10.9.9.9")}
        return {name: [SimpleNamespace(family=f, address=a)] for name, (f, a) in found.items()} | {
            "ib0": [SimpleNamespace(family=other, address="fe80::1"), SimpleNamespace(family=inet, address="10.0.0.7")]
        }

    states = {"lo": True, "docker0": True, "eth9": False, "ib0": True}
    monkeypatch.setattr(launchers.psutil, "net_if_addrs", addresses)
    monkeypatch.setattr(
        launchers.psutil, "net_if_stats", lambda: {n: SimpleNamespace(isup=up) for n, up in states.items()}
    )
    assert launchers.first_address() == "10.0.0.7"
    assert launchers.interface_of("10.0.0.7") == "ib0"
    assert launchers.interface_of("10.0.0.8") is None


def test_srun_without_scontrol_or_with_a_bad_port(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LaunchError, match=r"cannot be expanded by scontrol\. Set MASTER_ADDR"):
        resolve_launch(SRUN)
    with pytest.raises(LaunchError, match="MASTER_PORT = 'x': must be a whole number"):
        resolve_launch(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "x"})


@pytest.mark.parametrize("host", ["127.0.0.1", "no such host"])
def test_address_towards_a_host_is_one_that_others_can_reach(host, monkeypatch):
    monkeypatch.setattr(launchers, "first_address", lambda: "10.0.0.7")
    assert launchers.address_towards(host) == "10.0.0.7"
