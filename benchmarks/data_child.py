"""What `data_speed.py` measures in a process of its own, begun anew and holding nothing else.

    python benchmarks/data_child.py start DIRECTORY TOKENS_PER_MICRO_BATCH WINDOWS
    python benchmarks/data_child.py prepare SETTINGS_AS_JSON DIRECTORY_OF_VOCABULARY PROCESSES

Prints a line of JSON. Imports stand inside functions: they are measured, and the processes that
encode text, which import this file too, should not load torch.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough


def memory_mib(kind: str) -> float:
    """Give what this process holds, in MiB: `RssAnon` of its own, or `VmHWM`, the peak of all.

    The latter has the pages of mapped files, which all ranks share and which the system can take
    back at any time; how many it maps for each that is read differs. Not `ru_maxrss`: that is
    handed on from the process that began this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))
    return kib / 1024


def start(directory: Path, tokens: int, num_windows: int) -> dict[str, float]:
    """Open, wait for the first step, then plan and gather on through some windows."""
    begun = time.perf_counter()
    from dtrain.data.loader import Loader
    from dtrain.data.plan import BatchPlan, Cursor, DistributedTokenSampler, source_slots
    from dtrain.data.settings import BatchSettings
    from dtrain.data.store import PreparedData

    found = {"import s": time.perf_counter() - begun, "imported MiB": memory_mib("RssAnon")}
    begun = time.perf_counter()
    data = PreparedData.open(directory)
    found["open s"] = time.perf_counter() - begun
    manifest = data.manifest
    settings = BatchSettings(tokens_per_step=8 * tokens, tokens_per_micro_batch=tokens)
    slots = source_slots(settings, manifest.length_ratio, manifest.max_length)
    plan = BatchPlan(data.train, settings, slots, 1, [(n, 1) for n in manifest.corpus_sizes])
    with Loader(DistributedTokenSampler(plan, 8, 3), data.train, Cursor(), False) as loader:
        next(iter(loader))
        found["first batch s"] = time.perf_counter() - begun
    most, begun = 0.0, time.perf_counter()
    for index in range(1, 1 + num_windows):
        for ids in plan.window(0, index % plan.num_windows)[::8]:  # a rank's share
            data.train.gather(ids)
        most = max(most, memory_mib("RssAnon"))
    found["window ms"] = 1000 * (time.perf_counter() - begun) / num_windows
    found["windows"], found["of"] = num_windows, plan.num_windows
    found["most MiB of its own"], found["with file pages"] = most, memory_mib("VmHWM")
    return found


def prepare(settings: str, vocabulary_of: Path, num_processes: int) -> dict[str, float]:
    """Encode text with a vocabulary that is there."""
    from dtrain.data import preparation
    from dtrain.data.settings import DataSettings, VocabularySettings

    data, vocabulary = DataSettings.model_validate_json(settings), VocabularySettings()
    begun = time.perf_counter()
    directory = preparation.prepared_directory(data, vocabulary, vocabulary_of)
    preparation.prepare(
        *(data, vocabulary, directory, lambda _: None, vocabulary_of), num_processes=num_processes
    )
    return {"seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    WHAT, FIRST, SECOND, COUNT = sys.argv[1:]
    if WHAT == "start":
        print(json.dumps(start(Path(FIRST), int(SECOND), int(COUNT))))
    else:
        print(json.dumps(prepare(FIRST, Path(SECOND), int(COUNT))))
