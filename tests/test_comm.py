"""Who am I (every launcher's environment), what the collectives do, and that no rank fails or waits alone."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lora_one_dist import comm
from lora_one_dist.comm import Launch, LaunchError, RankError, resolve_launch
from tests.ranks import free_port, run_ranks

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
    ("more", "source"), [({}, "deepspeed launcher or environment"), ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun")]
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
    with pytest.raises(LaunchError, match=r"rank -?\d, local rank -?\d, world size \d .deepspeed.*: a rank must be in"):
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
    monkeypatch.setattr(comm.subprocess, "run", None)
    launch = resolve_launch(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (launch.master_addr, launch.master_port) == ("head", 1234)


def test_node_list_that_scontrol_refuses_is_named(scontrol):
    with pytest.raises(LaunchError, match=r"node list 'gpu\[1' cannot be expanded by scontrol. Set MASTER_ADDR"):
        resolve_launch(SRUN | {"SLURM_STEP_NODELIST": "gpu[1"})


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
    fake.MPI = SimpleNamespace(COMM_WORLD=world, Get_processor_name=lambda: "ab"[rank % 2])
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    launch = resolve_launch({variable: "5", "MASTER_PORT": "4321"})
    assert launch == Launch("mpirun (mpi4py)", rank, 5, {0: 0, 3: 1}[rank], "a", 4321)


# Collectives ----------------------------------------------------------------------------------------------------------


def collectives():
    """Runs on a rank: what each collective leaves here."""
    rank, found = comm.rank(), {}
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    found["same tensor"] = comm.all_sum(mine) is mine
    found["all_sum"] = mine.tolist()
    found["objects"] = comm.all_gather_object({"rank": rank})
    found["floats"] = comm.all_gather_floats(0.1 + rank)
    copied = torch.full((2,), float(rank))
    comm.broadcast(copied, 2)
    found["broadcast"] = copied.tolist()
    reduced = [torch.full((2, 2), float(rank + 1 + 10 * owner)) for owner in range(3)]
    works = [comm.reduce_to(tensor, owner) for owner, tensor in enumerate(reduced)]
    for work in works:
        work.wait()
    found["reduce_to"] = reduced[rank].tolist()
    found["reduce_scatter"] = comm.reduce_scatter(torch.arange(6.0) * (rank + 1)).tolist()
    whole = torch.empty(6)
    comm.all_gather(whole, torch.tensor([rank, rank + 0.5]))
    found["all_gather"] = whole.tolist()
    found["world"] = (rank, comm.world_size())
    return found


def test_collectives_at_three_ranks():
    results = run_ranks(3, collectives)
    for rank, found in enumerate(results):
        assert found["world"] == (rank, 3)
        assert found["same tensor"], "in place"
        assert found["all_sum"] == [6.0, 60.0]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["floats"] == [0.1, 1.1, 2.1], "not rounded to fp32"
        assert found["broadcast"] == [2.0, 2.0]
        assert found["reduce_to"] == [[6.0 + 30 * rank] * 2] * 2, "three under way at once, each summed on its owner"
        assert found["reduce_scatter"] == [6.0 * 2 * rank, 6.0 * (2 * rank + 1)]
        assert found["all_gather"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def alone(port):
    """Runs in a process that no launcher started."""
    for name in comm.LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    launch = comm.init()
    own = torch.tensor([3.0, 4.0])
    comm.reduce_to(own, 0).wait()
    comm.broadcast(own, 0)
    whole = torch.empty(2)
    comm.all_gather(whole, comm.reduce_scatter(comm.all_sum(own)))
    with comm.local_first(), comm.all_or_none("nothing"):
        comm.barrier()
    variables = {name: os.environ[name] for name in comm.LAUNCH_VARIABLES}
    comm.shutdown()
    comm.shutdown()
    again = comm.init(Launch("test", 0, 1, 0, "127.0.0.1", port))
    return launch, variables, whole.tolist(), os.environ["MASTER_PORT"], again.source, comm.world_size()


def test_one_process_without_a_launcher_is_a_world_of_one():
    port = free_port()
    ((launch, variables, whole, new_port, source, size),) = run_ranks(1, alone, port, init=False)
    assert whole == [3.0, 4.0], "every collective is the identity"
    expected = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert variables == expected | {"MASTER_PORT": str(launch.master_port)}
    assert (new_port, source, size) == (str(port), "test", 1), "a given launch is taken, after a shutdown"


# Agreement ------------------------------------------------------------------------------------------------------------


def failing(failures):
    """Runs on a rank: messages and causes of blocks in which the ranks named by ``failures`` raise."""
    heard = []
    for errors in failures:
        ran_on = False
        try:
            with comm.all_or_none("reading x"):
                if comm.rank() in errors:
                    raise errors[comm.rank()]
            ran_on = True
        except RankError as error:
            heard.append((str(error), repr(error.__cause__)))
        else:
            heard.append(("ran on" if ran_on else "block ended", "None"))
    # Nobody is left behind in a collective.
    return heard, comm.all_sum(torch.ones(1)).item()


def test_failure_of_one_rank_is_raised_on_all_with_rank_host_and_cause():
    failures = [
        {1: ValueError("data.train: no rows")},
        {0: KeyError("column")},
        {},
        {0: RuntimeError("first"), 1: RuntimeError("second")},
        {1: ValueError()},
    ]
    (first, after_first), (second, after_second) = run_ranks(2, failing, failures)
    assert [message for message, _ in first] == [message for message, _ in second]
    host = socket.gethostname()
    assert [message for message, _ in first] == [
        f"rank 1 on {host} failed while reading x: data.train: no rows",
        f"rank 0 on {host} failed while reading x: KeyError: 'column'",
        "ran on",
        f"rank 0 on {host} failed while reading x: RuntimeError: first",
        f"rank 1 on {host} failed while reading x: ValueError: ",
    ]
    assert first[0][1] == "None"
    assert second[0][1] == "ValueError('data.train: no rows')", "the traceback stays where it happened"
    assert (first[3][1], second[3][1]) == ("RuntimeError('first')", "RuntimeError('second')")
    assert after_first == after_second == 2.0


def taking_turns(folder, local_ranks):
    """Runs on a rank: whether the first rank of its host had finished when this one entered the block."""
    local_rank = local_ranks[comm.rank()]
    os.environ["LOCAL_RANK"] = str(local_rank)
    host = sum(local == 0 for local in local_ranks[: comm.rank() + 1])
    marker = Path(folder) / f"host{host}"
    with comm.local_first():
        found = marker.exists()
        if local_rank == 0:
            time.sleep(0.3)  # what a rank that did not wait would overtake
            marker.touch()
    message = "no error"
    try:
        with comm.all_or_none("filling the cache"), comm.local_first():
            if local_rank == 0 and comm.rank() > 0:
                raise ValueError("disk full")
    except RankError as error:
        message = str(error)
    return found, message, comm.is_local_first()


def test_first_rank_of_each_host_goes_before_its_others(tmp_path):
    # Hosts of two ranks and of one: the third rank is first on its own host.
    results = run_ranks(3, taking_turns, str(tmp_path), [0, 1, 0])
    assert [found for found, _, _ in results] == [False, True, False]
    assert [first for _, _, first in results] == [True, False, True]
    assert all("rank 2 on" in message and message.endswith("disk full") for _, message, _ in results), "and none waits"


def test_srun_without_scontrol_or_with_a_bad_port(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LaunchError, match=r"cannot be expanded by scontrol\. Set MASTER_ADDR"):
        resolve_launch(SRUN)
    with pytest.raises(LaunchError, match="MASTER_PORT = 'x': must be a whole number"):
        resolve_launch(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "x"})
