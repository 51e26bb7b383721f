"""`dtrain submit`: hand a training to SLURM, which starts, preempts, requeues and ends it."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import dtrain
from dtrain.commands.train import add_allow_changed
from dtrain.config import Config, check_allowed, explain_settings, load_config
from dtrain.errors import UserError

CHECKOUT = Path(dtrain.__file__).parent.parent
SCRIPTS = {"torchrun": "launch/slurm.sbatch", "srun": "launch/srun.sbatch"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes; settings are read from what argparse does not know."""
    explain_settings(parser)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML settings")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="none: train on CPUs")
    parser.add_argument("--time", metavar="LIMIT", help="of each start, e.g. 24:00:00")
    parser.add_argument("--partition", metavar="NAME", help="SLURM's queue")
    parser.add_argument("--account", metavar="NAME", help="who pays")
    parser.add_argument(
        "--launcher", choices=SCRIPTS, default="torchrun", help="what starts a node's processes"
    )
    parser.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="more options of sbatch, in quotes"
    )
    add_allow_changed(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print script and command, and submit nothing"
    )


def main(arguments: argparse.Namespace) -> int:
    """Check what can be checked here, submit, and say how to go on.

    Raises:
        UserError: if something is missing, or sbatch refuses.
    """
    config = load_config(arguments.config, arguments.overrides)
    check_allowed(arguments.allow_changed)
    script = CHECKOUT / SCRIPTS[arguments.launcher]
    if not script.exists():
        raise UserError(
            f"there is no {script}: dtrain was installed without its launch scripts. Take them "
            f"from its repository, or install that with pip install --editable"
        )
    command = sbatch_command(arguments, config, script)
    warning = preparation_warning(arguments, config)
    if warning:
        sys.stderr.write(f"dtrain: {warning}\n")
    if arguments.dry_run:
        print(script.read_text(encoding="utf-8"))
        print(shlex.join(command))
        return 0
    job = submit(command, config)
    print(summary(job, config.run_dir))
    return 0


def sbatch_command(arguments: argparse.Namespace, config: Config, script: Path) -> list[str]:
    """Give the command that submits; what it does not say stands at the script's top."""
    gpus = arguments.gpus_per_node
    options = {
        "job-name": config.run.name,
        "nodes": arguments.nodes,
        "gpus-per-node": gpus,
        "ntasks-per-node": gpus if arguments.launcher == "srun" else None,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "output": config.run_dir / "slurm-%j.log",
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    allowed = [f"--allow-changed={field}" for field in arguments.allow_changed]
    settings = ["--config", str(arguments.config), *arguments.overrides, *allowed]
    extra = shlex.split(arguments.sbatch)
    return ["sbatch", "--parsable", *given, *extra, str(script), *settings]


def preparation_warning(arguments: argparse.Namespace, config: Config) -> str:
    """Say what to do if the job would find no tokens and may not make them; usually nothing."""
    from dtrain.data.preparation import is_prepared, prepared_directory

    directory = prepared_directory(config.data, config.vocabulary, config.vocabulary_of)
    if is_prepared(config.data, config.vocabulary, directory, config.vocabulary_of):
        return ""
    if config.run.prepare is True or (config.run.prepare == "auto" and arguments.nodes == 1):
        return ""
    settings = shlex.join(["--config", str(arguments.config), *arguments.overrides])
    return (
        f"nothing is prepared in {directory}. Run this before the job starts:\n"
        f"        dtrain prepare {settings}\n"
        "        or let rank 0 do it while the others wait: --run.prepare=true"
    )


def submit(command: list[str], config: Config) -> str:
    """Run sbatch; gives the job's number.

    Raises:
        UserError: if there is no sbatch, or with what it complains of.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; log in to the cluster, or look with --dry-run")
    config.run_dir.mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for its log
    environment = os.environ | {
        "DTRAIN_CHECKOUT": str(CHECKOUT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{shlex.join(command)}\n        {result.stderr.strip()}")
    return result.stdout.strip().partition(";")[0]


def summary(job: str, run: Path) -> str:
    """Say what was submitted, and how to watch and end it."""
    log = run / f"slurm-{job}.log"
    return f"""submitted job {job}
run       {run}
log       {log}
watch     squeue --job {job}; tail -F {log}; dtrain status {run}
cancel    scancel {job}"""
