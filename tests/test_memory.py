"""What a process may still take, by made-up files of the kernel; what work takes, by hand."""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import run_world

from dtrain.batch import Batch
from dtrain.loss import Objective
from dtrain.memory import free_memory, keep_freed_memory, peak_bytes
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """Makes the files of a machine with 8 GiB available, and what else is given."""

    def make(groups: str = "0::/", **files: str) -> Path:
        given = {
            "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {8 * 2**20} kB\nSwapFree: 9 kB\n",
            "proc/self/cgroup": f"{groups}\n",
            "proc/self/statm": "1000 500 100 1 0 400 0\n",
        }
        for name, text in (given | files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="ascii")
        return tmp_path

    return make


def second_version(folder: str, limit: str, used: int, droppable: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup/{folder}"
    return {
        f"{place}/memory.max": f"{limit}\n",
        f"{place}/memory.current": f"{used}\n",
        f"{place}/memory.stat": f"anon 5\ninactive_file {droppable}\nactive_file 7\n",
    }


def first_version(folder: str, limit: int, used: int) -> dict[str, str]:
    place = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{place}/memory.limit_in_bytes": f"{limit}\n",
        f"{place}/memory.usage_in_bytes": f"{used}\n",
        f"{place}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    }


def test_ranks_share_what_the_machine_has(machine):
    root = machine()
    assert free_memory(1, root) == 8 * GIB
    assert free_memory(3, root) == 8 * GIB // 3


def test_the_tightest_group_around_the_process_decides(machine):
    job = second_version("slurm/job", str(4 * GIB), 2 * GIB, GIB)
    root = machine("0::/slurm/job/step", **job, **second_version("slurm/job/step", "max", 5))
    assert free_memory(1, root) == 3 * GIB
    assert free_memory(2, root) == 3 * GIB // 2


def test_a_container_of_the_first_version_sees_its_limit_at_the_top(machine):
    groups = "9:cpu,cpuacct:/docker/a\n4:memory:/docker/a"
    assert free_memory(1, machine(groups, **first_version("", 5 * GIB, 3 * GIB))) == 3 * GIB
    full = first_version("docker/a", GIB, 3 * GIB)
    assert free_memory(1, machine(groups, **full)) == 0


def free_within(root: Path, limit: int) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return free_memory(2, root)


def test_the_shells_limit_is_each_processs_own(machine):
    """Of the pages that `statm` counts first 1000 are taken, of all that may ever be."""
    used = 1000 * resource.getpagesize()
    assert run_world(1, free_within, machine(), 2**37) == [4 * GIB]
    assert run_world(1, free_within, machine(), used + 3 * GIB) == [3 * GIB]


def test_this_machine_can_be_asked():
    assert 0 < free_memory(1) < 2**50


def test_the_peak_is_that_of_new_tensors_at_once():
    old = torch.zeros(1000)

    def work() -> None:
        first = old + 1  # 4000 bytes
        first.mul_(2).view(10, 100)  # no more
        second = torch.cat([first, old])  # 12,000
        del first  # 8000
        third = second.double()  # 24,000: the peak
        del second, third
        torch.empty(5000, dtype=torch.uint8)

    assert peak_bytes(work) == 24_000


def test_what_backward_keeps_and_makes_is_counted():
    weight = torch.nn.Parameter(torch.zeros(1000))

    def work() -> None:
        # exp keeps its result; then come the sum, its gradient, and the gradients of exp.
        weight.exp().sum().backward()

    assert 4000 + 4000 < peak_bytes(work) <= 4000 + 4 + 4 + 4000 + 4000
    assert weight.grad is not None


def faults_of_steps() -> int:
    """Count the pages that the kernel hands out while 16 MiB are taken and freed ten times."""
    usage = [resource.getrusage(resource.RUSAGE_SELF)]
    for _ in range(20):
        torch.zeros(2**22)
        usage.append(resource.getrusage(resource.RUSAGE_SELF))
    return usage[-1].ru_minflt - usage[10].ru_minflt


def faults_without_and_with() -> tuple[int, int]:
    ctypes.CDLL(None).mallopt(-1, 2**17)  # M_TRIM_THRESHOLD as it is when a process begins
    without = faults_of_steps()
    keep_freed_memory()
    return without, faults_of_steps()


@pytest.mark.slow
def test_freed_memory_serves_the_next_step():
    without, with_it = in_new_process("faults_without_and_with()")
    assert without >= 10 * 8  # huge pages, which are all that some kernels hand out: 2 MiB each
    assert with_it < without / 10


def test_an_allocator_without_such_switches_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    keep_freed_memory()


def in_new_process(call: str) -> list[int]:
    """Call something of this file where nothing was freed before, which might be used unseen."""
    command = f"import test_memory; print(*test_memory.{call})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.check_output([sys.executable, "-c", command], env=environment, text=True)
    return [int(word) for word in done.split()]


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def counted_and_measured(slots: int) -> tuple[int, int]:
    """Count a micro-batch's memory, and measure it with an allocator that keeps nothing back."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 0)  # M_TRIM_THRESHOLD
    settings = ModelSettings(hidden_dim=64, feed_forward_dim=256, num_encoder_layers=2)
    objective = Objective(Transformer(settings, 1000, None), 0.1)
    lengths = np.full(slots // 16, 16)
    side = np.arange(slots) % 900 + 5, lengths
    batch = Batch.packed(side, side, slots, slots)

    def work() -> None:
        objective(batch)[0].backward()
        objective.zero_grad(set_to_none=True)

    work()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    work()
    measured = resident("VmHWM") - before
    return peak_bytes(work), measured


@pytest.mark.slow
def test_what_is_counted_is_what_the_kernel_sees():
    counted, measured = in_new_process("counted_and_measured(1024)")
    assert counted > 20 * 2**20
    assert measured == pytest.approx(counted, rel=0.1)
