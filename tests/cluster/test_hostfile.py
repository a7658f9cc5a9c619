"""A hostfile that is not there, or has a byte-order mark, on the command line of a launcher."""

from __future__ import annotations

import codecs
import subprocess
import sys
from pathlib import Path

import pytest

from lora_one_dist.cluster.hostfile import hostfile_of, refuse_bad, refuse_bad_above
from lora_one_dist.cluster.launchers import LaunchError

REPOSITORY = Path(__file__).resolve().parents[2]
GONE = r"--hostfile \S*{}: no such file; deepspeed would go on with this host alone\. Correct the path, or leave"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("deepspeed --hostfile hosts launch/train.py --config x", "hosts"),
        ("deepspeed --num_gpus 2 --hostfile=hosts launch/train.py", "hosts"),
        ("/venv/bin/python /venv/bin/deepspeed -H hosts --master_port 1 launch/train.py", "hosts"),
        ("python -m deepspeed.launcher.runner --hostfile hosts --module package", "hosts"),
        ("mpirun --hostfile hosts -n 2 python launch/train.py", "hosts"),
        ("mpirun -H node1,node2 python launch/train.py", None),
        ("deepspeed tools/doctor.py --hostfile hosts", None),
        ("deepspeed --num_gpus 2 launch/train.py --config x", None),
        ("deepspeed --hostfile", None),
        ("", None),
    ],
)
def test_the_launchers_own_hostfile_is_found(command, found):
    assert hostfile_of(command.split()) == found


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b""], ids=str)
def test_a_byte_order_mark_is_refused(mark, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_bytes(mark + b"node1 slots=2\n")
    if not mark:
        return refuse_bad(hostfile)
    rule = "begins with a byte-order mark, which launchers take for a part of the first host's name"
    with pytest.raises(LaunchError, match=rf"^--hostfile \S+/hosts: {rule}\. Save it as UTF-8 without one\.$"):
        refuse_bad(hostfile)
    return None


def test_a_hostfile_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(LaunchError, match=f"^{GONE.format(path.name)}"):
            refuse_bad(path)


def test_a_rank_looks_at_the_command_line_of_its_deepspeed(tmp_path):
    """As far as the rank can tell: its parent's parent is called deepspeed, and runs in another folder."""
    rank = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    rank += "from lora_one_dist.cluster import hostfile\ntry: hostfile.refuse_bad_above()\n"
    rank += "except ValueError: raise\nexcept RuntimeError as error: print(error)\nelse: print('goes on')"
    program = tmp_path / "deepspeed"
    launch = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], cwd='/')"
    program.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {launch!r}])\n")
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    for given, said in [
        (["--hostfile", "gone", "train.py"], "no such file; deepspeed would go on with this host alone"),
        (["--hostfile", "hosts", "train.py"], "goes on"),
        (["train.py", "--hostfile", "gone"], "goes on"),
    ]:
        run = subprocess.run(
            [sys.executable, program, *given], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert said in run.stdout, run
    refuse_bad_above()  # no deepspeed above
