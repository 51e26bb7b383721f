"""A real SLURM on this machine, for as long as a test lasts: two nodes, two partitions.

Each node is a set of namespaces of its own: host name, address, ports, /dev/shm and processes; the
disk is shared, as on a cluster. Partition `low` is preempted by `high`. There is no accounting.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "setpriv")
FREEZER = Path("/sys/fs/cgroup/freezer")
SIZE = "CPUs=16 RealMemory=64000"
"""What a node pretends to have."""
GRACE = 20
"""Seconds from a preemption's first signal to the end of the job."""

CONFIGURATION = """\
ClusterName=dtrain
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SlurmdTimeout=60
ReturnToService=2
PropagateResourceLimits=NONE
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

NODE = """\
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount -t tmpfs tmpfs /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add "$3/24" dev eth0 && ip link set eth0 up
slurmd -D -N "$1" -f "$2/slurm.conf" &
wait
"""
"""What the first process of a node does: NAME FOLDER ADDRESS. It reaps, and ends with slurmd."""

ENVIRONMENT = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def what_is_missing() -> str:
    """Say why there can be no SLURM here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can make the nodes' namespaces"

    def missing() -> list[str]:
        return [name for name in PROGRAMS if not shutil.which(name, path=ENVIRONMENT["PATH"])]

    if missing() and os.environ.get("DTRAIN_TEST_SLURM") == "install":
        subprocess.run([Path(__file__).with_name("install")], check=True, timeout=300)
    if missing():
        names = ", ".join(missing())
        return f"{names} not installed; tests/slurm/install does it, or DTRAIN_TEST_SLURM=install"
    network = "ip link add name n1 type bridge && ip link add name n2 type veth peer name n3"
    spaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork"]
    if not succeeds(*spaces, "sh", "-c", network):
        return "this machine does not let root make namespaces and bridges"
    return ""


class Cluster:
    """A running SLURM: what its users' commands say and do."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.nodes = nodes
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}

    def command(self, *words: object) -> str:
        """Run one of SLURM's commands in the checkout; gives what it printed."""
        result = subprocess.run(
            list(map(str, words)),
            cwd=CHECKOUT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert result.returncode == 0, f"{words}: {result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Give what SLURM knows of a job: JobState, Restarts and the like."""
        words = self.command("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a SLURM, and stop it with all of its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="dtrain-slurm-"))
    folder.chmod(0o755)  # munged refuses a folder that not everybody can enter
    # Names by process, so that tests can run at the same time; the network's needs a small number.
    name, number = f"dtrain{os.getpid()}", os.getpid() % 250 + 1
    network = f"10.254.{number}"
    nodes = {f"{name}n{i}": f"{network}.{10 + i}" for i in (1, 2)}
    configure(folder, nodes, f"{network}.1", port=21000 + number)
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: object) -> int:
        # Whatever becomes of the tests, nothing of it outlives them.
        with (folder / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *map(str, words)],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.append(process)
        return process.pid

    try:
        ip("link", "add", name, "type", "bridge")
        ip("addr", "add", f"{network}.1/24", "dev", name)
        ip("link", "set", name, "up")
        munge = {
            kind: f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")
        }
        socket_file = folder / "munge.socket"
        start("munged", "munged", "--foreground", f"--socket={socket_file}", *munge.values())
        wait_until(socket_file.exists, 10, "munged", folder)
        start("slurmctld", "slurmctld", "-D", "-c", "-f", folder / "slurm.conf")
        for node, address in nodes.items():
            spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc"]
            inside = ["bash", "-c", NODE, "node", node, folder, address]
            pid = start(node, "unshare", *spaces, "--fork", "--kill-child", *inside)
            wait_until(lambda pid=pid: has_own_network(pid), 10, node, folder)
            ip("link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", pid)
            ip("link", "set", node, "master", name, "up")
        slurm = Cluster(folder, list(nodes))
        wait_until(lambda: is_idle(slurm), 30, "the cluster", folder)
        yield slurm
    finally:
        for process in reversed(running):
            process.kill()  # of a node: its first process, which takes all others with it
            process.wait()
        for node in nodes:
            succeeds("ip", "link", "del", node)  # it may be gone with its node
            remove_group(FREEZER / f"slurm_{node}")
        succeeds("ip", "link", "del", name)
        shutil.rmtree(folder, ignore_errors=True)


def configure(folder: Path, nodes: dict[str, str], controller: str, port: int) -> None:
    """Write all that the daemons read, into their folder."""
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    for node in nodes:
        (folder / f"spool-{node}").mkdir()
    names = {"localhost": "127.0.0.1"} | nodes
    hosts = "".join(f"{address} {name}\n" for name, address in names.items())
    (folder / "hosts").write_text(hosts, encoding="utf-8")
    # With cgroups (of version 1) signals reach what they reach on a real cluster: a task's own
    # process alone. Otherwise SLURM follows the tree of processes, and signals reach all of it.
    tracking = "linuxproc"
    if os.access(FREEZER / "release_agent", os.W_OK):
        tracking = "cgroup"
        lines = ["CgroupPlugin=cgroup/v1", "CgroupMountpoint=/sys/fs/cgroup", "CgroupAutomount=no"]
        (folder / "cgroup.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    configuration = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        controller=controller,
        port=port,
        folder=folder,
        tracking=tracking,
        nodes="\n".join(f"NodeName={name} NodeAddr={nodes[name]} {SIZE}" for name in nodes),
        grace=GRACE,
    )
    (folder / "slurm.conf").write_text(configuration, encoding="utf-8")


def ip(*words: object) -> None:
    """Change the network."""
    assert succeeds("ip", *words), words


def succeeds(*words: object) -> bool:
    """Run a command; says whether it went well."""
    command = list(map(str, words))
    return not subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False).returncode


def has_own_network(pid: int) -> bool:
    """Whether a process is in a namespace of its own yet."""
    return Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def is_idle(slurm: Cluster) -> bool:
    """Whether all nodes have reported to the controller."""
    try:
        found = slurm.command("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D %T")
    except AssertionError:
        return False
    return found == f"{len(slurm.nodes)} idle"


def remove_group(group: Path) -> None:
    """Remove a node's control groups, which empty as its processes end."""
    deadline = time.monotonic() + 10
    while group.exists() and time.monotonic() < deadline:
        folders = [group, *(path for path in group.rglob("*") if path.is_dir())]
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):
                folder.rmdir()


def wait_until(done: Callable[[], bool], seconds: float, what: str, folder: Path) -> None:
    """Wait for a part of the cluster."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            logs = [path for path in folder.iterdir() if path.suffix in (".log", ".out")]
            tails = [f"{path.name}:\n{path.read_text(encoding='utf-8')[-1500:]}" for path in logs]
            raise TimeoutError("\n\n".join([f"{what} did not come up", *tails]))
        time.sleep(0.05)
