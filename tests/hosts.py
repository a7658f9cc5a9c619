"""Four hosts on one machine: namespaces with an own address, host name, processes, /dev/shm and sshd.  Linux, root.

``Hosts`` brings them up for the length of a block; ``start_slurm`` adds a SLURM controller and a daemon on each.  The
hosts share this machine's files.  Nothing listens outside the private bridge, and all of it goes with the process that
made it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOOLS = ("ip", "nsenter", "unshare", "/usr/sbin/sshd", "ssh", "pdsh", "mpirun", "sbatch", "slurmctld", "munged")
READY_SECONDS = 30
PR_SET_PDEATHSIG = 1
_made = itertools.count()


def unavailable() -> str | None:
    """Why hosts cannot be made here, or None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux to make network namespaces"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: .ci/packages lists the packages)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "true"], check=False)
    return None if probe.returncode == 0 else "may not make namespaces (needs CAP_SYS_ADMIN and CAP_NET_ADMIN)"


def _with_parent() -> None:
    """Runs in a child before exec: end with the process that started it, and take no terminal signals."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for(what: str, ready: Any) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not ready in {READY_SECONDS} s"
        time.sleep(0.05)


class Hosts:
    """``with Hosts(folder) as hosts``: node1 ... nodeN, at ``hosts.address[i]`` for i from 1."""

    def __init__(self, folder: Path, count: int = 4):
        self.folder = folder
        self.count = count
        unique = f"{os.getpid() % 10**5}{'abcdefghijklmnopqrstuvwxyz'[next(_made) % 26]}"
        self.prefix = f"h{unique}n"
        self.bridge = f"h{unique}br"
        used = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
        self.network = next(net for net in (f"10.77.{i}" for i in range(256)) if f"{net}." not in used)
        self.numbers = range(1, count + 1)
        self.address = {i: f"{self.network}.{i}" for i in self.numbers}
        self.first: dict[int, subprocess.Popen[bytes]] = {}
        self.env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "huggingface"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            # Without it ssh, and so pdsh and deepspeed, wait for hours for a host that was cut off.
            "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=3",
        }

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        try:
            self._write_ssh()
            forwarded = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME")
            (self.folder / ".deepspeed_env").write_text("".join(f"{name}={self.env[name]}\n" for name in forwarded))
            self._ip("link", "add", self.bridge, "type", "bridge")
            self._ip("address", "add", f"{self.network}.254/24", "dev", self.bridge)
            self._ip("link", "set", self.bridge, "up")
            for i in self.numbers:
                self.start(i)
            for i in self.numbers:
                self.wait_for_ssh(i)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for i in self.numbers:
            self.kill(i)
            subprocess.run(["ip", "netns", "delete", self._name(i)], check=False, capture_output=True)
            shutil.rmtree(f"/etc/netns/{self._name(i)}", ignore_errors=True)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)

    def _name(self, i: int) -> str:
        return f"{self.prefix}{i}"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def _write_ssh(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("client_key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)], check=True)
        names = "".join(f"{self.address[i]} node{i}\n" for i in self.numbers)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.folder}/client_key\n IdentitiesOnly yes\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n BatchMode yes\n ConnectTimeout 5\n"
        )
        (self.folder / "sshd_config").write_text(
            f"Port 22\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/client_key.pub\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "UsePAM no\nStrictModes no\nPidFile none\nPrintMotd no\nMaxStartups 100\n"
        )

    def start(self, i: int) -> None:
        """Make host i: namespaces, a link to the bridge, and sshd as what keeps it alive."""
        name, link, netns = self._name(i), f"{self.prefix}v{i}", Path(f"/etc/netns/{self._name(i)}")
        (netns / "ssh").mkdir(parents=True, exist_ok=True)
        (netns / "hosts").write_text((self.folder / "hosts").read_text())
        (netns / "hostname").write_text(f"node{i}\n")
        for file in ("ssh_config", "sshd_config"):
            shutil.copy(self.folder / file, netns / "ssh" / file)
        self._ip("netns", "add", name)
        self._ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("link", "set", link, "master", self.bridge, "up")
        self._ip("-n", name, "address", "add", f"{self.address[i]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._ip("-n", name, "link", "set", device, "up")
        inside = (
            f"hostname node{i}; mount -t tmpfs -o size=2g tmpfs /dev/shm; mkdir -p /mnt/local; "
            "mount -t tmpfs tmpfs /mnt/local; mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/sshd; "
            f"exec env -i PATH={self.env['PATH']} /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config"
        )
        namespaces = ("--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        with (self.folder / f"node{i}.log").open("w") as log:
            self.first[i] = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", *namespaces, "sh", "-c", inside],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_with_parent,
            )

    def wait_for_ssh(self, i: int) -> None:
        """Return when host i takes connections."""
        _wait_for(f"sshd of node{i}", lambda: b"SSH" in self._greeting(i))

    def _greeting(self, i: int) -> bytes:
        import socket

        try:
            with socket.create_connection((self.address[i], 22), timeout=1) as connection:
                return connection.recv(3)
        except OSError:
            return b""

    def hostfile(self, count: int, slots: int) -> Path:
        """A hostfile of the first ``count`` hosts, for deepspeed and mpirun."""
        path = self.folder / f"hostfile_{count}x{slots}"
        path.write_text("".join(f"node{i} slots={slots}\n" for i in range(1, count + 1)))
        return path

    def pids(self, i: int) -> list[int]:
        """Processes of host i, as this machine numbers them."""
        listed = subprocess.run(["ip", "netns", "pids", self._name(i)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self, i: int) -> None:
        """Power off: every process of host i ends without a word."""
        for pid in self.pids(i):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if i in self.first:
            self.first.pop(i).wait()

    def link(self, i: int, state: str) -> None:
        """Cut (``down``) or mend (``up``) the cable between host i and the bridge."""
        self._ip("link", "set", f"{self.prefix}v{i}", state)

    def bytes(self, i: int) -> int:
        """Bytes that have crossed host i's interface, both ways, by the kernel's count."""
        root = Path(f"/sys/class/net/{self.prefix}v{i}/statistics")
        return sum(int((root / f"{way}_bytes").read_text()) for way in ("rx", "tx"))

    def edit(self, i: int, file: str, text: str) -> None:
        """Replace a file under host i's own /etc, such as ``hosts``, in place (it is mounted there)."""
        Path(f"/etc/netns/{self._name(i)}/{file}").write_text(text)

    def command(self, i: int, *command: Any) -> list[str]:
        """The command line that runs a command on host i."""
        children = subprocess.run(
            ["pgrep", "-P", str(self.first[i].pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        return ["nsenter", "-t", children[0], "-a", f"--wd={os.getcwd()}", "--", *map(str, command)]

    def popen(self, i: int, *command: Any, env: dict[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
        """Start a command on host i; it ends with this process."""
        return subprocess.Popen(
            self.command(i, *command), env={**self.env, **(env or {})}, text=True, preexec_fn=_with_parent, **more
        )

    def run(
        self, i: int, *command: Any, env: dict[str, str] | None = None, timeout: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on host i to its end; standard error is part of standard output, in order."""
        process = self.popen(i, *command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{command}: not done in {timeout} s:\n{output}") from None
        return subprocess.CompletedProcess(list(map(str, command)), process.returncode, output, "")

    def start_slurm(self) -> None:
        """munged and slurmd on every host, slurmctld on node1; returns when all are idle."""
        root = self.folder / "slurm"
        for name in ("state", "log"):
            (root / name).mkdir(parents=True)
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (root / "slurm.conf").write_text(_slurm_conf(root, self.address[1], self.count))
        self.env["SLURM_CONF"] = str(root / "slurm.conf")
        munged = (
            "mkdir -p /run/munge && chown munge:munge /run/munge && setpriv --reuid=munge --regid=munge --clear-groups "
            "munged --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/m.pid --log-file=/run/munge/m.log "
            "--seed-file=/run/munge/seed --key-file=/etc/munge/munge.key -f"
        )
        for i in self.numbers:
            started = self.run(i, "sh", "-c", munged)
            assert started.returncode == 0, started.stdout
        for i, command in [(1, ["slurmctld", "-c"])] + [(i, ["slurmd", "-N", f"node{i}"]) for i in self.numbers]:
            (root / "spool" / f"node{i}").mkdir(parents=True, exist_ok=True)
            started = self.run(i, *command)
            assert started.returncode == 0, started.stdout
        idle = ("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D")
        _wait_for("SLURM", lambda: self.run(1, *idle).stdout.strip() == str(self.count))


def _slurm_conf(root: Path, controller: str, count: int) -> str:
    return f"""\
ClusterName=test
SlurmctldHost=node1({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
TmpFS=/mnt/local
SlurmctldPort=6817
SlurmdPort=6818
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/state/slurmctld.pid
SlurmdPidFile={root}/spool/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmdParameters=config_overrides
KillWait=15
MinJobAge=300
InactiveLimit=0
UnkillableStepTimeout=60
NodeName=node[1-{count}] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=node[1-{count}] Default=YES PriorityTier=1 GraceTime=30 MaxTime=60 State=UP OverSubscribe=NO
PartitionName=high Nodes=node[1-{count}] PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP OverSubscribe=NO
"""
