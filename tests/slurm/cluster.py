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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent
NODES = ("dtrain1", "dtrain2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "setpriv")
FREEZER = Path("/sys/fs/cgroup/freezer")
GRACE = 20
"""Seconds from a preemption's first signal to the end of the job."""

CONFIGURATION = """\
ClusterName=dtrain
SlurmctldHost={host}({network}.1)
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

os.environ["PATH"] += ":/usr/sbin:/sbin"


def what_is_missing() -> str:
    """Say why there can be no SLURM here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can make the nodes' namespaces"
    if os.environ.get("DTRAIN_TEST_SLURM") == "install" and not shutil.which("slurmctld"):
        subprocess.run([Path(__file__).with_name("install")], check=True, timeout=300)
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return (
            f"{', '.join(missing)} not installed: tests/slurm/install, or DTRAIN_TEST_SLURM=install"
        )
    spaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(spaces, capture_output=True, check=False).returncode:
        return "this machine does not let root make namespaces"
    return ""


class Cluster:
    """A running SLURM: what its users' commands say and do."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

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
    tag = os.getpid() % 250 + 1
    bridge, network = f"dtrain{tag}", f"10.254.{tag}"
    configure(folder, network, port=21000 + tag)
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: object) -> int:
        # Whatever becomes of the tests, nothing of it outlives them.
        with (folder / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.append(process)
        return process.pid

    try:
        ip("link", "del", bridge, check=False)  # of tests that were killed
        end_stragglers()
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{network}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        munge = {
            name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")
        }
        socket_file = folder / "munge.socket"
        start("munged", "munged", "--foreground", f"--socket={socket_file}", *munge.values())
        wait_until(socket_file.exists, 10, "munged", folder)
        start("slurmctld", "slurmctld", "-D", "-c", "-f", folder / "slurm.conf")
        for number, node in enumerate(NODES, 1):
            spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc"]
            inside = ["bash", "-c", NODE, "node", node, folder, f"{network}.{10 + number}"]
            pid = start(node, "unshare", *spaces, "--fork", "--kill-child", *inside)
            wait_until(lambda pid=pid: has_own_network(pid), 10, node, folder)
            wire = f"{bridge}n{number}"
            ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", pid)
            ip("link", "set", wire, "master", bridge, "up")
        slurm = Cluster(folder)
        wait_until(lambda: is_idle(slurm), 30, "the cluster", folder)
        yield slurm
    finally:
        for process in reversed(running):
            process.kill()  # of a node: its first process, which takes all others with it
            process.wait()
        end_stragglers()
        for number in range(1, len(NODES) + 1):
            ip("link", "del", f"{bridge}n{number}", check=False)
        ip("link", "del", bridge, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def configure(folder: Path, network: str, port: int) -> None:
    """Write all that the daemons read, into their folder."""
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    hosts = {"localhost": "127.0.0.1"}
    nodes = []
    for number, node in enumerate(NODES, 1):
        (folder / f"spool-{node}").mkdir()
        hosts[node] = f"{network}.{10 + number}"
        nodes.append(f"NodeName={node} NodeAddr={hosts[node]} CPUs=16 RealMemory=64000")
    lines = [f"{address} {name}\n" for name, address in hosts.items()]
    (folder / "hosts").write_text("".join(lines), encoding="utf-8")
    # With cgroups (of version 1) signals reach what they reach on a real cluster: a task's own
    # process alone. Otherwise SLURM follows the tree of processes, and signals reach all of it.
    tracking = "linuxproc"
    if os.access(FREEZER / "release_agent", os.W_OK):
        tracking = "cgroup"
        lines = ["CgroupPlugin=cgroup/v1", "CgroupMountpoint=/sys/fs/cgroup", "CgroupAutomount=no"]
        (folder / "cgroup.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    configuration = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        network=network,
        port=port,
        folder=folder,
        tracking=tracking,
        nodes="\n".join(nodes),
        grace=GRACE,
    )
    (folder / "slurm.conf").write_text(configuration, encoding="utf-8")


def ip(*words: object, check: bool = True) -> None:
    """Change the network."""
    subprocess.run(["ip", *map(str, words)], capture_output=True, check=check)


def has_own_network(pid: int) -> bool:
    """Whether a process is in a namespace of its own yet."""
    return Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def is_idle(slurm: Cluster) -> bool:
    """Whether all nodes have reported to the controller."""
    words = ["sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D %T"]
    answer = subprocess.run(
        words, env=slurm.environment, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() == f"{len(NODES)} idle"


def end_stragglers() -> None:
    """Kill what is left in the jobs' control groups, which is the jobs', and remove the groups."""
    for node in NODES:
        for _ in range(50):
            group = FREEZER / f"slurm_{node}"
            if not group.exists():
                break
            for file in group.rglob("cgroup.procs"):
                for pid in file.read_text(encoding="utf-8").split():
                    subprocess.run(["kill", "-KILL", pid], capture_output=True, check=False)
            folders = sorted([group, *(p for p in group.rglob("*") if p.is_dir())], reverse=True)
            for folder in folders:
                subprocess.run(["rmdir", folder], capture_output=True, check=False)
            time.sleep(0.05)


def wait_until(done: Callable[[], bool], seconds: float, what: str, folder: Path) -> None:
    """Wait for a part of the cluster."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            logs = [path for path in folder.iterdir() if path.suffix in (".log", ".out")]
            tails = [f"{path.name}:\n{path.read_text(encoding='utf-8')[-1500:]}" for path in logs]
            raise TimeoutError("\n\n".join([f"{what} did not come up", *tails]))
        time.sleep(0.05)
