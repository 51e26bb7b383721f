import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dtrain.config import Config, changed_settings, describe_settings, load_config
from dtrain.errors import UserError

SMALL = """
data: {train: [{source: a.en, target: a.de}], max_length: 64}
validation: {every_steps: 0}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_defaults_are_the_papers_base_recipe(config_file):
    config = load_config(config_file)
    model, optimizer = config.model, config.optimizer
    assert (model.hidden_dim, model.num_heads, model.feed_forward_dim) == (512, 8, 2048)
    assert (model.num_encoder_layers, model.dropout, model.qkv_dim) == (6, 0.1, 64)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.98, 1e-9)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("noam", 4000)
    assert config.loss.label_smoothing == 0.1


def test_name_is_the_files_stem_and_fills_the_directory(config_file):
    assert load_config(config_file).run_dir == Path("runs/small")
    assert load_config(config_file, ["--run.name=other"]).run_dir == Path("runs/other")


def test_command_line_wins_and_reads_yaml_values(config_file):
    config = load_config(
        config_file,
        [
            "--optimizer.learning_rate=1e-3",
            "--model.norm=pre",
            "--precision=bf16",
            "--data.train=[{source: b.en, target: b.de, weight: 3}]",
        ],
    )
    assert config.optimizer.learning_rate == 1e-3
    assert (config.model.norm, config.precision) == ("pre", "bf16")
    assert config.data.train[0].weight == 3


def test_settings_to_yaml_and_back(config_file, tmp_path):
    config = load_config(config_file, ["--run.seed=7"])
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--model.hiden_dim=4",
            "unknown setting model.hiden_dim = 4 .*did you mean model.hidden_dim",
        ),
        ("--modle.hidden_dim=4", "unknown setting modle.*did you mean model"),
        ("--model.hidden_dim=wide", "model.hidden_dim = 'wide' .command line.*integer"),
        ("--model.dropout=1.5", "model.dropout = 1.5 .command line.*less than 1"),
        ("--model.num_heads=7", "hidden_dim 512 must be a multiple of num_heads 7"),
        ("--batch.tokens_per_step=5000", "tokens_per_step 5000 must be a multiple"),
        ("--data.max_length=5000", "tokens_per_micro_batch 3136 cannot hold .* 5000"),
        ("--batch.tokens_per_micro_batch=4", "tokens_per_micro_batch = 4 .*equal to 8"),
        ("--schedule.name=nome", "schedule.name = 'nome'.*'noam'"),
        ("--run.max_steps=0", "run.max_steps and run.max_epochs are both 0"),
        ("--validation.every_steps=5", "validation.every_steps is set but data.validation is not"),
        ("--data.train=[{source: a}]", "needs both `source` and `target`"),
        ("--run.threads=many", "run.threads = 'many'"),
        ("--seed", "settings are given as --section.key=value"),
        ("--run.name.first=x", "run.name"),
    ],
)
def test_mistakes_are_refused_with_their_name(config_file, override, message):
    with pytest.raises(UserError, match=message):
        load_config(config_file, [override])


def test_a_step_must_hold_a_sentence_while_the_size_of_a_part_is_open(config_file):
    sizes = ["--batch.tokens_per_micro_batch=auto", "--batch.tokens_per_step=60"]
    with pytest.raises(UserError, match=r"batch.tokens_per_step 60 cannot hold .* 64 tokens"):
        load_config(config_file, sizes)
    config = load_config(config_file, sizes[:1])
    assert "tokens_per_micro_batch: auto" in config.to_yaml()
    with pytest.raises(RuntimeError, match="is `auto` where a number is needed"):
        _ = config.batch.micro_batches_per_step


def test_a_tree_needs_a_power_of_two_of_micro_batches(config_file):
    sizes = ["--batch.tokens_per_step=1536", "--batch.tokens_per_micro_batch=256"]
    assert load_config(config_file, sizes).distributed.reduction == "ddp"
    with pytest.raises(UserError, match=r"not 6; set batch\.tokens_per_step to 1024 or 2048"):
        load_config(config_file, [*sizes, "--distributed.reduction=tree"])


@pytest.mark.parametrize("limit", ["90", "01:30:00", "1-00:00:00"])
def test_a_time_limit_is_seconds_or_a_clock(config_file, limit):
    load_config(config_file, [f"--run.time_limit={limit}"])
    with pytest.raises(UserError, match=r"run.time_limit: .* is no time limit"):
        load_config(config_file, [f"--run.time_limit={limit}x"])


def test_a_profile_is_set_whole_or_in_parts_and_is_free(config_file):
    old = load_config(config_file)
    assert old.run.profile is None
    new = load_config(config_file, ["--run.profile.start=7"])
    assert new.run.profile.model_dump() == {"start": 7, "steps": 5}
    assert load_config(config_file, ["--run.profile={start: 7}"]) == new
    assert changed_settings(old, new) == changed_settings(new, old) == []
    for mistake, message in (
        ("steps=0", r"run.profile.steps = 0 \(command line\): .*greater than or equal to 1"),
        ("strat=3", r"unknown setting run.profile.strat = 3 .*; did you mean run.profile.start"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(config_file, [f"--run.profile.{mistake}"])


def test_mistakes_in_the_file_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"there is no config file .*none.yaml"):
        load_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("run: {seed: -1}\nvalidation: {every_steps: 0}\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"run.seed = -1 \(.*bad.yaml\).*greater than or equal to 0"
    ):
        load_config(bad)
    bad.write_text("run: [", encoding="utf-8")
    with pytest.raises(UserError, match="cannot read the config file"):
        load_config(bad)
    bad.write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match="holds no settings"):
        load_config(bad)


def test_what_a_begun_run_may_change(config_file):
    old = load_config(config_file)
    free = ["--run.max_steps=7", "--metrics.every_steps=3", "--checkpoint.keep_last=2"]
    assert changed_settings(old, load_config(config_file, free)) == []
    changed = changed_settings(old, load_config(config_file, ["--run.seed=2", "--model.dropout=0"]))
    assert changed == ["run.seed: 1 -> 2", "model.dropout: 0.1 -> 0.0"]


def test_the_end_of_a_falling_schedule_is_not_free(config_file):
    old = load_config(config_file, ["--schedule.name=linear"])
    new = load_config(config_file, ["--schedule.name=linear", "--run.max_steps=7"])
    assert changed_settings(old, new) == ["run.max_steps: 100000 -> 7"]


def test_help_names_every_setting():
    text = describe_settings()
    for key, value in Config.model_construct().model_dump().items():
        names = [f"--{key}.{name}" for name in value] if isinstance(value, dict) else [f"--{key}"]
        assert all(name in text for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["dtrain", "dtrain.train"])
def test_print_config_shows_what_would_run(config_file, module):
    command = ["train"] if module == "dtrain" else []
    shown = subprocess.run(
        [sys.executable, "-m", module, *command, "--config", str(config_file), "--print-config"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(shown.stdout) == load_config(config_file).model_dump(mode="json")
