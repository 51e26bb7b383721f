import gzip
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import dtrain.wandb_feed
from dtrain.metrics import Metrics, WandbSettings, read_metrics

pytestmark = pytest.mark.slow

CONFIG = {"run": {"name": "small"}, "model": {"hidden_dim": 32}}
KEY = "0123456789012345678901234567890123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Hide the person's own W&B settings, and work in an empty directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    return folder


def open_metrics(run, resume_step=0, **settings):
    return Metrics.open(run, WandbSettings(**settings), CONFIG, 100, resume_step)


def train(metrics, steps):
    """Log like a training: a line each ten steps, validation and translations at each twenty."""
    for step in steps:
        generator = random.Random(step)
        values = {"train/loss": generator.random(), "train/tokens_per_second": 1000 / 3}
        metrics.log(step, {"epoch": step // 50, "tokens": step * 10**10, **values})
        if step % 20 == 0:
            metrics.samples(step, [sample(step)])
            metrics.log(step, {"validation/bleu": 100 * generator.random()})


def sample(step):
    return {"source": "a", "reference": "ä", "translation": f"„{step}“"}


# ------------------------------------------------------------------ what the real package writes


def test_offline_the_real_package_writes_what_metrics_jsonl_holds(run, capsys):
    with open_metrics(run, mode="offline", project="translation", tags=("a", "b")) as metrics:
        train(metrics, range(10, 110, 10))
        metrics.log(110, {"train/loss": float("nan")})
    (folder,) = (run / "wandb").glob("offline-run-*")
    records = read_wandb(folder)
    logged = read_metrics(run / "metrics.jsonl")
    assert len(logged) == 11
    assert repr(history(records)) == repr(logged)
    assert tables(records, folder) == [
        {"columns": ["step", *sample(0)], "data": [[step, *sample(step).values()]]}
        for step in (20, 40, 60, 80, 100)
    ]
    (first, *_) = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert {name: config[name] for name in CONFIG} == CONFIG
    assert (first.project, first.display_name, [*first.tags]) == (
        "translation",
        "small",
        ["a", "b"],
    )
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes == {"*": "step", "train/*": "step", "validation/*": "step"}
    staged = [e.local_path for r in records for e in r.artifact.manifest.contents]
    assert len(staged) == 5
    assert all(Path(path).is_relative_to(run) for path in staged)
    (end,) = [record.exit for record in records if record.HasField("exit")]
    assert end.exit_code == 0
    out = capsys.readouterr().out
    assert f"wandb sync runs/small/wandb/{folder.name}\n" in out
    assert "wandb:" not in out


def test_offline_a_restart_records_the_whole_run_under_the_same_id(run):
    (run / "run.json").write_text('{"attempts": [1]}', encoding="utf-8")
    with open_metrics(run, mode="offline") as metrics:
        train(metrics, range(10, 60, 10))
    identity = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert identity["attempts"] == [1]

    metrics = open_metrics(run, resume_step=35, mode="offline")
    train(metrics, range(40, 90, 10))
    metrics.close("preempted")
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.endswith(f"-{identity['wandb_id']}")
    newest = read_wandb(max(folders, key=lambda folder: folder.stat().st_mtime_ns))
    assert history(newest) == read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in history(newest)] == [*range(10, 90, 10)]
    assert any(record.HasField("preempting") for record in newest)
    (end,) = [record.exit for record in newest if record.HasField("exit")]
    assert end.exit_code == 1


def test_a_killed_training_leaves_no_process_and_its_last_line_in_wandb(run):
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from dtrain.metrics import Metrics, WandbSettings\n"
        "m = Metrics.open(Path(sys.argv[1]), WandbSettings(mode='offline'), {}, 100, 0)\n"
        "m.log(1, {'train/loss': 1.5})\n"
        "while not list(Path(sys.argv[1]).glob('wandb/offline-*/*.wandb')): time.sleep(0.05)\n"
        "m.log(2, {'train/loss': 1.25})\n"
        "print(m._feed._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    feed = int(ended.stdout.splitlines()[-1])
    deadline = time.monotonic() + 30
    while Path(f"/proc/{feed}/cmdline").exists() and Path(f"/proc/{feed}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the feed outlives the training"
        time.sleep(0.1)
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert [line["train/loss"] for line in history(read_wandb(folder))] == [1.5, 1.25]


def test_online_a_restart_sends_only_what_the_server_lacks(run, monkeypatch, capsys):
    with FakeServer() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with open_metrics(run) as metrics:
            train_losses(metrics, range(10, 60, 10))
        with open_metrics(run, resume_step=35) as metrics:
            train_losses(metrics, range(40, 90, 10))
        assert server.sent == [[*range(10, 60, 10)], [60, 70, 80]]
        assert server.runs == {
            json.loads((run / "run.json").read_text(encoding="utf-8"))["wandb_id"]
        }
    assert f"W&B: {server.url}/me/dtrain/runs/" in capsys.readouterr().out


def test_a_server_that_refuses_means_offline(run, monkeypatch, capsys):
    with FakeServer() as server:
        address = server.url
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    with open_metrics(run) as metrics:
        train_losses(metrics, [10, 20])
    out = capsys.readouterr().out
    assert "W&B cannot be reached" in out
    assert "it records offline" in out
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert [line["step"] for line in history(read_wandb(folder))] == [10, 20]


def train_losses(metrics, steps):
    for step in steps:
        metrics.log(step, {"train/loss": 1 / step})


def read_wandb(folder):
    """Read a `.wandb` file: a header, then records in the format of LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, piece, position, block = [], b"", 7, 32768
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            records.append(record)
            piece = b""
    return records


def history(records):
    """Give the logged numbers, as `read_metrics` does."""
    lines = []
    for record in records:
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            assert items["_step"] == items["step"]
            own = {k: json.loads(v) for k, v in items.items() if k[0] != "_" and "samples" not in k}
            lines.append(own)
    order = ["step", "epoch", "tokens", "train/loss", "train/tokens_per_second", "validation/bleu"]
    return [{name: line[name] for name in order if name in line} for line in lines]


def tables(records, folder):
    paths = [
        json.loads(item.value_json)
        for record in records
        if record.HasField("history")
        for item in record.history.item
        if [*item.nested_key] == ["validation/samples", "path"]
    ]
    found = [json.loads((folder / "files" / path).read_text(encoding="utf-8")) for path in paths]
    return [{name: table[name] for name in ("columns", "data")} for table in found]


class FakeServer:
    """Answers what the W&B client asks for to create and resume a run, and notes its history."""

    def __enter__(self):
        self.lines = []
        self.sent = []
        self.runs = set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                answer = {}
                if self.path.endswith("/file_stream"):
                    fake.take(json.loads(body))
                elif self.path == "/graphql":
                    answer = fake.answer(json.loads(body))
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def take(self, stream):
        if part := stream.get("files", {}).get("wandb-history.jsonl"):
            assert part["offset"] == len(self.lines)
            self.lines += part["content"]
            self.sent[-1] += [json.loads(line)["step"] for line in part["content"]]

    def answer(self, request):
        variables = request.get("variables") or {}
        project = {"id": "p", "name": "dtrain", "entity": {"id": "e", "name": "me"}}
        if "query RunResumeStatus" in request["query"]:
            self.sent.append([])
            bucket = self.bucket(variables["name"]) if self.lines else None
            return {"data": {"model": {**project, "bucket": bucket}}}
        if "mutation UpsertBucket" in request["query"]:
            self.runs.add(variables["name"])
            bucket = {"id": "b", "name": variables["name"], "displayName": "d", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "Viewer" in request["query"]:
            return {"data": {"viewer": {"id": "u", "entity": "me", "flags": "{}"}}}
        return {"errors": [{"message": "this server cannot do that"}]}

    def bucket(self, name):
        begun = json.dumps({"t": {}})
        counts = {"historyLineCount": len(self.lines), "logLineCount": 0, "eventsLineCount": 0}
        tails = {"historyTail": json.dumps(self.lines[-1:]), "eventsTail": "[]"}
        texts = {"summaryMetrics": self.lines[-1], "config": "{}", "wandbConfig": begun}
        return {"id": "b", "name": name, "displayName": "d", **counts, **tails, **texts}


# ------------------------------------------------------- a W&B that hangs, raises or is not there

STUB = '''
"""Stands in for the wandb package; notes calls in $STUB_LOG and misbehaves as $STUB says."""
import json, os, time
from types import SimpleNamespace

def note(name, /, **values):
    with open(os.environ["STUB_LOG"], "a") as file:
        file.write(json.dumps([name, values]) + "\\n")

trouble = os.environ.get("STUB", "")
if trouble == "import raises":
    raise ImportError("no such library")
if trouble == "dies":
    os._exit(9)

class Settings:
    model_fields = {"silent": None, "stop_fn": None}
    def __init__(self, **given): self.given = given

def setup(settings=None):
    mode = os.environ.get("WANDB_MODE", "online")
    known = {"api_key": os.environ.get("WANDB_API_KEY"), "identity_token_file": None}
    return SimpleNamespace(
        settings=SimpleNamespace(mode=mode, base_url="https://api.wandb.ai", **known)
    )

def teardown(): note("teardown")
def Table(columns, data): return {"columns": columns, "data": data}

def init(**given):
    note("init", **{k: str(given[k]) for k in ("id", "mode", "resume", "project", "name")})
    if trouble == "stopped on the web page": given["settings"].given["stop_fn"]()
    if trouble == "init hangs": time.sleep(1000)
    if trouble == "online raises" and given["mode"] == "online": raise OSError("no route\\nto host")
    run = SimpleNamespace(starting_step=int(os.environ.get("STUB_STEP", 0)), url="URL")
    run.offline = given["mode"] == "offline"
    run.dir = f"{given['dir']}/wandb/offline-run-1/files"
    run.define_metric = lambda *_, **__: None
    run.mark_preempting = lambda: note("mark_preempting")
    def log(values, step):
        if trouble == "log raises": raise RuntimeError("broken pipe")
        if trouble == "log is slow": time.sleep(0.5)
        note("log", values=values, step=step)
    def finish(exit_code):
        note("finish", exit_code=exit_code)
        if trouble == "finish hangs": time.sleep(1000)
    run.log, run.finish = log, finish
    return run
'''


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Put a stub in the place of the wandb package; give the function that reads its calls."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "wandb.py").write_text(STUB, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "calls.jsonl"))
    monkeypatch.setattr(
        dtrain.wandb_feed,
        "_SECONDS_TO_FINISH",
        dict.fromkeys(("completed", "preempted", "failed"), 3.0),
    )

    def calls(name):
        path = tmp_path / "calls.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [values for called, values in map(json.loads, lines) if called == name]

    return calls


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("import raises", "W&B stopped (ImportError: no such library)"),
        ("dies", "W&B stopped, see"),
        ("init hangs", "W&B did not finish within 3 s"),
        ("log raises", "W&B stopped (RuntimeError: broken pipe)"),
        ("log is slow", "W&B did not finish within 3 s"),
        ("finish hangs", "W&B did not finish within 3 s"),
    ],
)
@pytest.mark.usefixtures("stub")
def test_a_troubled_wandb_costs_no_time_and_no_line(run, monkeypatch, capsys, trouble, said):
    monkeypatch.setenv("STUB", trouble)
    began = time.monotonic()
    metrics = open_metrics(run, mode="offline")
    longest = 0.0
    for step in range(1, 101):
        before = time.monotonic()
        metrics.log(step, {"train/loss": 1.0})
        longest = max(longest, time.monotonic() - before)
        time.sleep(0.02)
    assert longest < 0.5
    before = time.monotonic()
    metrics.close("completed")
    assert time.monotonic() - before < 6.0
    assert time.monotonic() - began < 15.0
    assert len(read_metrics(run / "metrics.jsonl")) == 100
    assert said in capsys.readouterr().out


def test_two_launches_are_one_wandb_run_and_no_step_is_sent_twice(run, stub, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with open_metrics(run) as metrics:
        train(metrics, range(10, 60, 10))
    monkeypatch.setenv("STUB_STEP", "51")  # what W&B says at the next start: it has step 50
    metrics = open_metrics(run, resume_step=35)
    train(metrics, range(40, 90, 10))
    metrics.close("preempted")
    first, second = stub("init")
    assert first == second
    identity = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert first == {
        "id": identity["wandb_id"],
        "mode": "online",
        "resume": "allow",
        "project": "dtrain",
        "name": "small",
    }
    assert [call["step"] for call in stub("log")] == [*range(10, 90, 10)]
    assert [call["exit_code"] for call in stub("finish")] == [0, 1]
    assert len(stub("mark_preempting")) == 1
    samples = [call["values"].get("validation/samples") for call in stub("log")]
    assert [table["data"][0][0] for table in samples if table] == [20, 40, 60, 80]


@pytest.mark.parametrize(
    ("setting", "environment", "modes", "said"),
    [
        ("auto", {}, ["offline"], "W&B was offline"),
        ("auto", {"WANDB_API_KEY": KEY}, ["online"], "W&B: URL"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, ["offline"], "W&B was offline"),
        ("auto", {"WANDB_MODE": "disabled"}, [], ""),
        ("online", {}, ["offline"], "W&B has no key for this machine"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, ["online"], "W&B: URL"),
        ("offline", {"WANDB_API_KEY": KEY}, ["offline"], "W&B was offline"),
        (
            "auto",
            {"WANDB_API_KEY": KEY, "STUB": "online raises"},
            ["online", "offline"],
            "W&B cannot be reached (OSError: no route); it records offline",
        ),
    ],
)
def test_the_mode(run, stub, monkeypatch, capsys, setting, environment, modes, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    open_metrics(run, mode=setting).close("completed")
    assert [call["mode"] for call in stub("init")] == modes
    assert said in capsys.readouterr().out


def test_a_key_in_netrc_counts(run, stub, tmp_path):
    netrc = "machine api.wandb.ai\n  login user\n  password secret\n"
    (tmp_path / "home" / ".netrc").write_text(netrc, encoding="utf-8")
    open_metrics(run).close("completed")
    assert [call["mode"] for call in stub("init")] == ["online"]


def test_the_environment_fills_what_is_unset(run, stub, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "given-id")
    monkeypatch.setenv("WANDB_PROJECT", "given-project")
    monkeypatch.setenv("WANDB_NAME", "given-name")
    open_metrics(run, mode="offline").close("completed")
    monkeypatch.setenv("WANDB_RUN_ID", "another-id")
    open_metrics(run, mode="offline", project="set", name="also-set").close("completed")
    first, second = stub("init")
    assert (first["id"], first["project"], first["name"]) == (
        "given-id",
        "given-project",
        "given-name",
    )
    assert (second["id"], second["project"], second["name"]) == ("given-id", "set", "also-set")


def test_disabled_starts_no_process_and_makes_no_id(run):
    metrics = open_metrics(run, mode="disabled")
    metrics.log(1, {"train/loss": 1.0})
    metrics.close("completed")
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_it_hears_no_signal_meant_for_the_training(run, stub):
    metrics = open_metrics(run, mode="offline")
    deadline = time.monotonic() + 20
    while not stub("init") and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        metrics._feed._process.send_signal(number)
    train_losses(metrics, [1, 2])
    metrics.close("completed")
    assert [call["step"] for call in stub("log")] == [1, 2]
    assert stub("finish") == [{"exit_code": 0}]


@pytest.mark.usefixtures("stub")
def test_the_stop_button_interrupts_the_training(run, monkeypatch):
    monkeypatch.setenv("STUB", "stopped on the web page")
    with pytest.raises(KeyboardInterrupt), open_metrics(run, mode="offline"):  # noqa: PT012
        time.sleep(20)
        pytest.fail("nothing happened")
