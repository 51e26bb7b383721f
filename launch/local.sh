#!/usr/bin/env bash
# Train on all GPUs of this machine, or on two CPU processes where there is none.
#
#   launch/local.sh --config configs/multi30k-en-de.yaml --run.name=first --run.seed=7
#
# All arguments go to dtrain.train. Two variables change the launch itself:
#   PROCESSES=4            how many processes to start
#   SHUTDOWN_TIMEOUT=300   seconds that a stopped run has to save before it is killed (120)
#
# Ctrl-C, SIGTERM and SIGUSR1 stop the run at a saved step; the same command goes on from there.
# torchrun makes exit code 1 of such a stop: `dtrain status RUN --verdict` says how the run stands.
set -euo pipefail

environment=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
if [[ -d $environment ]]; then
    PATH=$environment/bin:$PATH
fi

# Asking torch takes two seconds, so only a machine with a driver is asked.
gpus=0
if nvidia-smi -L >/dev/null 2>&1; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
# nproc knows what this process may use, but would answer with OMP_NUM_THREADS where that is set.
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

if [[ -n ${PROCESSES:-} ]]; then
    processes=$PROCESSES
elif ((gpus > 0)); then
    processes=$gpus
else
    processes=$((cores < 2 ? cores : 2))
fi

# Unset, torchrun would warn and set it to 1. The run's own threads follow from `run.threads`.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# The variable rather than torchrun's option, which PyTorch 2.11 does not know.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-120}

# --standalone takes a free port, so that several runs fit on one machine. torchrun hands the signals
# that it handles on to all processes; SIGUSR1 is not among them by itself.
exec torchrun --standalone --nproc_per_node="$processes" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m dtrain.train "$@"
