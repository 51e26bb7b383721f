#!/usr/bin/env bash
# What `make demo` runs: train a small Transformer, judge it, say what to try next.
# Ctrl-C stops it at a saved step; the same command goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/demo
corpus=data/demo

if [[ ! -d $corpus ]]; then
    echo "Making up English and German sentences in $corpus"
    rm -rf "$corpus.partial"
    .venv/bin/python demo/make_corpus.py --out "$corpus.partial"
    mv "$corpus.partial" "$corpus"
fi

# torchrun exits with 1 after Ctrl-C too: the run itself is asked how it stands.
interrupted=
trap 'interrupted=yes' INT
settings=(--config configs/demo.yaml)
if (($(nvidia-smi -L 2>/dev/null | wc -l) > 2)); then
    settings+=(--batch.tokens_per_micro_batch=256) # up to eight GPUs get a share of each step
fi
launch/local.sh "${settings[@]}" || true
if [[ -n $interrupted ]]; then
    printf '\nStopped: make demo goes on.\n'
    exit 130
fi
trap - INT
if [[ $(.venv/bin/dtrain status "$run" --verdict) != completed ]]; then
    printf '\nNot finished, for the reason above; make demo goes on from the last checkpoint.\n'
    exit 1
fi

echo
.venv/bin/python -m dtrain evaluate "$run"
cat <<END

Three commands to try next:
  echo "$(head -n 1 "$corpus/test.en")" | .venv/bin/dtrain translate $run
  .venv/bin/dtrain translate $run        # type sentences, one a line
  .venv/bin/dtrain status $run
END
