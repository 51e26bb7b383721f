"""Config: gathers every part's settings, from YAML and --section.key=value, and checks them.

Settings of the folders and of the torch-free files live beside the code that they set; those of
files that import torch live here, so that `--help` and a mistyped key answer at once.
"""

import argparse
import difflib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from dtrain.data.settings import BatchSettings, CorpusSettings, DataSettings, VocabularySettings
from dtrain.errors import UserError
from dtrain.metrics import MetricsSettings, WandbSettings
from dtrain.model.settings import ModelSettings
from dtrain.preemption import seconds_of
from dtrain.schedule import ScheduleSettings


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProfileSettings(_Section):
    """Steps that a profiler looks into, counted from the start of the process."""

    start: int = Field(20, ge=2, description="the first of them; 1 is the first of this start")
    steps: int = Field(5, ge=1, description="how many")


class RunSettings(_Section):
    """What is run, where it is kept, and for how long."""

    name: str | None = Field(None, description="the config file's stem if null")
    dir: str = Field("runs/{name}", description="the run directory")
    seed: int = Field(1, ge=0, description="of the plan, the initial weights and all dropout")
    max_steps: int = Field(100_000, ge=0, description="total steps, restarts included; 0: no limit")
    max_epochs: int = Field(0, ge=0, description="total epochs; 0: no limit")
    init_from: str | None = Field(None, description="another run, whose weights to start from")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Literal["auto"] | PositiveInt = Field(
        "auto", description="CPU threads a rank; auto: cores / ranks, recorded at the first start"
    )
    deterministic: bool = Field(
        True, description="same bits from the same run, at some cost on GPU"
    )
    prepare: Literal["auto"] | bool = Field(
        "auto", description="make missing tokens and vocabulary; auto: on one node only"
    )
    time_limit: float | str | None = Field(
        None, description="save and leave before it: seconds or HH:MM:SS; null: the SLURM job's end"
    )
    profile: ProfileSettings | None = Field(
        None, description="{start: 20, steps: 5}: write a trace of these steps of this start"
    )

    @field_validator("time_limit")
    @classmethod
    def _time_limit_is_readable(cls, value: float | str | None) -> float | str | None:
        if value is not None:
            seconds_of(value)
        return value


class OptimizerSettings(_Section):
    """Adam; the defaults are the paper's (5.3)."""

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(1.0, gt=0, description="Noam's factor, the other schedules' peak")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    epsilon: float = Field(1.0e-9, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(0.0, ge=0, description="gradients are clipped to it; 0: never")


class LossSettings(_Section):
    """The training objective."""

    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share spread over the vocabulary")


class DistributedSettings(_Section):
    """How ranks work together."""

    reduction: Literal["ddp", "tree", "flat"] = Field(
        "ddp", description="tree: the same bits on 1, 2, 4, ... ranks, slower; flat: after backward"
    )
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="in which ddp and flat sum over the ranks; bf16 halves what is sent"
    )
    bucket_mb: Literal["auto"] | PositiveInt = Field(
        "auto", description="MiB that ddp reduces at once; auto: 25, on the CPU all of it"
    )
    shard_optimizer: bool = Field(
        False, description="split Adam's moments over the ranks (ZeRO-1); the same bits"
    )
    first_step_timeout: int = Field(
        600, ge=1, description="seconds without any progress that end a run, up to its first step"
    )
    timeout: int = Field(120, ge=1, description="likewise, after the first step of each start")

    def check_reduction(self) -> None:
        """Refuse what the way to reduce has no use for: the tree sums in fp32, and at once."""
        unused = {"ddp": [], "flat": ["bucket_mb"], "tree": ["gradient_dtype", "bucket_mb"]}
        for key in unused[self.reduction]:
            value = getattr(self, key)
            if value != DistributedSettings.model_fields[key].default:
                raise ValueError(
                    f"distributed.{key} {value} is not for distributed.reduction {self.reduction}; "
                    f"leave one of the two out"
                )


class KernelsSettings(_Section):
    """Fast paths."""

    attention: Literal["auto", "padded", "varlen", "packed"] = Field(
        "auto", description="packed, varlen: on GPUs; auto: what works there, then recorded"
    )
    compile: Literal["auto"] | bool = Field(
        "auto", description="torch.compile; auto: off, until its dropout is checked on a GPU"
    )
    cuda_graph: Literal["auto"] | bool = Field(
        "auto", description="a step as two CUDA graphs; auto: off, until it is proven on a GPU"
    )
    loss: Literal["auto", "plain", "fused"] = Field(
        "auto", description="fused: cross-entropy by Triton; auto: if it is right on the GPU"
    )
    memory_projection: Literal["separate", "joined"] = Field(
        "separate", description="joined: all layers' keys and values of the source in one product"
    )
    residual: Literal["auto", "plain", "fused"] = Field(
        "auto", description="fused: dropout, sum and norm by Triton; auto: if right on the GPU"
    )


class CheckpointSettings(_Section):
    """When checkpoints are written and which are kept; 0 turns a period off."""

    every_steps: int = Field(1000, ge=0)
    every_minutes: float = Field(0, ge=0)
    keep_last: int = Field(5, ge=1)
    keep_best: int = Field(1, ge=0, description="best by validation.metric, kept besides")
    asynchronous: bool = Field(True, description="write while training goes on")


class ValidationSettings(_Section):
    """When and how the validation set is translated and judged."""

    every_steps: int = Field(1000, ge=0, description="0: never")
    beam_size: int = Field(4, ge=1, description="1: greedy")
    length_penalty: float = Field(0.6, ge=0, description="alpha of Wu et al. 2016, equation 14")
    metric: Literal["bleu", "chrf", "nll"] = Field("bleu", description="what `best` means")
    patience: int = Field(0, ge=0, description="stop after so many validations without a best")


class Config(_Section):
    """All settings of a run."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    vocabulary: VocabularySettings = VocabularySettings()
    model: ModelSettings = ModelSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    loss: LossSettings = LossSettings()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where native, else fp16 on CUDA, fp32 on CPU"
    )
    distributed: DistributedSettings = DistributedSettings()
    kernels: KernelsSettings = KernelsSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    metrics: MetricsSettings = MetricsSettings()
    wandb: WandbSettings = WandbSettings()

    @model_validator(mode="after")
    def _parts_agree(self) -> "Config":
        batch = self.batch
        key = "tokens_per_micro_batch"
        if batch.tokens_per_micro_batch == "auto":  # at most the whole step, and then there is one
            key = "tokens_per_step"
        slots = getattr(batch, key)
        if slots < self.data.max_length:
            raise ValueError(
                f"batch.{key} {slots} cannot hold a sentence of data.max_length "
                f"{self.data.max_length} tokens"
            )
        count = batch.tokens_per_step // slots
        if self.distributed.reduction == "tree" and count & (count - 1):
            raise ValueError(
                f"distributed.reduction tree needs a power of two of micro-batches a step, not "
                f"{count}; set batch.tokens_per_step to {slots << (count.bit_length() - 1)} or "
                f"{slots << count.bit_length()}"
            )
        self.distributed.check_reduction()
        if not self.run.max_steps and not self.run.max_epochs:
            raise ValueError("run.max_steps and run.max_epochs are both 0: the run would never end")
        if self.schedule.name in ("linear", "cosine") and not self.run.max_steps:
            raise ValueError(f"schedule.name {self.schedule.name} needs run.max_steps")
        if self.validation.every_steps and self.data.validation is None:
            raise ValueError(
                "validation.every_steps is set but data.validation is not; set it to 0"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The run directory, its {name} filled in."""
        return Path(self.run.dir.replace("{name}", self.run.name or "run"))

    @property
    def vocabulary_of(self) -> Path | None:
        """The run whose vocabulary is used: the one whose weights this run starts from."""
        return None if self.run.init_from is None else Path(self.run.init_from)

    def to_yaml(self) -> str:
        """Give the settings in the form that `load_config` reads."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


FREE_TO_CHANGE = [
    "run.name",
    "run.dir",
    "run.max_steps",
    "run.max_epochs",
    "run.init_from",
    "run.device",
    "run.threads",
    "run.prepare",
    "run.time_limit",
    "run.profile",
    "data.train",
    "data.validation",
    "data.test",
    "data.dir",
    "distributed.bucket_mb",
    "distributed.shard_optimizer",
    "distributed.first_step_timeout",
    "distributed.timeout",
    "kernels",
    "checkpoint",
    "validation.every_steps",
    "validation.beam_size",
    "validation.length_penalty",
    "validation.patience",
    "metrics",
    "wandb",
]
"""What an existing run may change when it goes on. Training data is compared by its content."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read settings from a YAML file, then from `--section.key=value` arguments.

    Raises:
        UserError: naming file, key, value and the nearest known key.
    """
    values = _read_yaml(path) if path else {}
    origin = str(path) if path else "no --config"
    given = dict(_parse_override(text) for text in overrides)
    for key, value in given.items():
        _put(values, key, value)
    run = values.setdefault("run", {})
    if path and isinstance(run, dict) and run.get("name") is None:
        run["name"] = path.stem
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(dict(item), given, origin) for item in error.errors()]
        raise UserError("\n        ".join(lines)) from None


def changed_settings(old: Config, new: Config, allowed: Collection[str] = ()) -> list[str]:
    """Say which settings differ that a run may not change on its way: `key: old -> new`.

    Args:
        old: as the run was begun.
        new: as it is to go on.
        allowed: settings, or sections of them, that may differ besides.
    """
    schedule_ends = old.schedule.name in ("linear", "cosine")
    free = [key for key in FREE_TO_CHANGE if not (schedule_ends and key == "run.max_steps")]
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in before | after
        if before.get(key) != after.get(key)
        and not any(key == prefix or key.startswith(prefix + ".") for prefix in (*free, *allowed))
    ]


def check_allowed(fields: Collection[str]) -> None:
    """Make sure that what `--allow-changed` names exists: a setting, a section, or `plan`.

    Raises:
        UserError: naming the one that does not, and the nearest that does.
    """
    known = [*_known_keys(), "plan"]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"--allow-changed {field}: it takes a setting's key, or data, vocabulary or plan, "
                f"and {field} is none of these{hint}"
            )


def explain_settings(parser: argparse.ArgumentParser) -> None:
    """Let a command's `--help` list every setting with its default and meaning."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = describe_settings()


def describe_settings() -> str:
    """List every setting with its default and meaning."""
    lines = ["settings, in the config file or as --section.key=value (defaults in brackets):"]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += ["", f"  {name}: {(section.__doc__ or '').splitlines()[0]}"]
            for key, item in section.model_fields.items():
                default = item.get_default(call_default_factory=True)
                lines.append(f"    --{name}.{key}  [{default}]  {item.description or ''}".rstrip())
        else:
            lines += ["", f"    --{name}  [{field.default}]  {field.description}"]
    lines += ["", "  an entry of data.train; data.validation and data.test are one each:"]
    for key, item in CorpusSettings.model_fields.items():
        lines.append(f"    {key}  [{item.default}]  {item.description}")
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds no settings: it must be a mapping such as `run: {{seed: 1}}`"
        )
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not equals:
        raise UserError(f"cannot understand {text!r}; settings are given as --section.key=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--{key}: cannot read the value {value!r}: {error}") from None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        inner = values[section]
        if not isinstance(inner, dict):
            raise UserError(f"--{key}: {section} has no keys of its own")
        values = inner
    values[last] = value


def _explain(item: dict[str, Any], given: dict[str, Any], origin: str) -> str:
    """Say in one line which key is wrong, where it stands, and what would be right."""
    parts, known = [str(part) for part in item["loc"]], set(_known_keys())
    is_known = item["type"] == "extra_forbidden" or ".".join(parts) in known
    if not is_known and ".".join(parts[:-1]) in known - set(Config.model_fields):
        parts.pop()  # which of a setting's several types was tried
    key = ".".join(parts)
    where = "command line" if any(key.startswith(name) for name in given) else origin
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown setting {key} = {item['input']!r} ({where}){hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{f'{key}: ' if key else ''}{message} ({where})"
    return f"{key} = {item['input']!r} ({where}): {message}"


def _known_keys() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        yield name
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from (f"{name}.{key}" for key in section.model_fields)
    yield from (f"run.profile.{key}" for key in ProfileSettings.model_fields)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
