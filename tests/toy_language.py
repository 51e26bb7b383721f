"""A toy language and the settings of a tiny run on it."""

import random
from pathlib import Path

from dtrain.config import load_config
from dtrain.data.preparation import prepare, prepared_directory

WORDS = [
    *("red", "blue", "small", "big", "old", "new"),
    *("cat", "dog", "bird", "house", "sees", "likes"),
]


def write_text(folder: Path) -> Path:
    """Write its splits: a translation says the words backwards, with a capital X in front."""
    generator = random.Random(5)
    for split, size in (("train", 600), ("validation", 12), ("test", 12)):
        lines = [generator.choices(WORDS, k=generator.randint(2, 9)) for _ in range(size)]
        source = "".join(" ".join(words) + "\n" for words in lines)
        target = "".join(" ".join(f"X{word}" for word in words[::-1]) + "\n" for words in lines)
        (folder / f"{split}.en").write_text(source, encoding="utf-8")
        (folder / f"{split}.de").write_text(target, encoding="utf-8")
    return folder


def write_settings(text: Path) -> Path:
    """Write a config file of a tiny run beside the text, and prepare its tokens."""
    settings = text / "toy.yaml"
    splits = "\n".join(
        f"  {split}: {dash}{{source: {text}/{split}.en, target: {text}/{split}.de}}"
        for split, dash in (("train", "\n  - "), ("validation", ""), ("test", ""))
    )
    settings.write_text(
        f"""
data:
  dir: {text}/prepared
  max_length: 40
{splits}
vocabulary: {{size: 48}}
model: {{hidden_dim: 32, num_heads: 2, feed_forward_dim: 64, num_encoder_layers: 1,
        num_decoder_layers: 1, max_decode_length: 40}}
batch: {{tokens_per_step: 512, tokens_per_micro_batch: 128}}
schedule: {{warmup_steps: 20}}
run: {{max_steps: 12, threads: 1, dir: "{text}/runs/{{name}}"}}
distributed: {{timeout: 60}}
validation: {{every_steps: 0}}
checkpoint: {{every_steps: 0}}
metrics: {{every_steps: 1}}
wandb: {{mode: disabled}}
""",
        encoding="utf-8",
    )
    config = load_config(settings)
    directory = prepared_directory(config.data, config.vocabulary)
    prepare(config.data, config.vocabulary, directory, lambda _: None)
    return settings
