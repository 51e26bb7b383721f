"""`dtrain evaluate`: translate a held-out set and judge it with sacreBLEU."""

import argparse
import json
import time

from dtrain.commands.translate import add_search_arguments, load_translator
from dtrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_search_arguments(parser)
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="which held-out set (default: test)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Print BLEU and chrF with their signatures, the number of sentences and the seconds."""
    translate, used = load_translator(arguments)

    from dtrain.data.corpus import corpora
    from dtrain.evaluation import judge

    groups = corpora(used.config.data)
    if arguments.split not in groups:
        raise UserError(
            f"the run has no {arguments.split} text: its data.{arguments.split} is null"
        )
    pairs = [pair for corpus in groups[arguments.split] for pair in corpus.read()]
    begun = time.perf_counter()
    translations = translate([pair.source for pair in pairs])
    seconds = time.perf_counter() - begun
    judgement = judge(translations, [pair.target for pair in pairs])
    values = {
        "run": str(arguments.run),
        "checkpoint": used.checkpoint.name,
        "split": arguments.split,
        "beam_size": used.beam_size,
        "length_penalty": used.length_penalty,
        "bleu": round(judgement.bleu, 2),
        "bleu_signature": judgement.bleu_signature,
        "chrf": round(judgement.chrf, 2),
        "chrf_signature": judgement.chrf_signature,
        "sentences": len(pairs),
        "seconds": round(seconds, 2),
    }
    if arguments.json:
        print(json.dumps(values))
        return 0
    print(f"{arguments.run}, {used.checkpoint.name}, {arguments.split} set, beam {used.beam_size}")
    print(f"BLEU {judgement.bleu:6.2f}   {judgement.bleu_signature}")
    print(f"chrF {judgement.chrf:6.2f}   {judgement.chrf_signature}")
    rate = len(pairs) / max(seconds, 1e-9)
    print(f"{len(pairs):,} sentences in {seconds:.1f} s, {rate:,.0f} a second")
    return 0
