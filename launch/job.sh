# shellcheck shell=bash disable=SC2154
# What slurm.sbatch and srun.sbatch have in common. They source it; by itself it does nothing.
#
#   begin ARGUMENTS...    finds the run directory and the rendezvous, and sets the environment
#   step COMMAND...       has srun run it in all tasks, and hands SIGUSR1 on to them
#   conclude              ends, requeues or gives up, as `dtrain status RUN --verdict` says
#
# The script sets, before: checkout, container, processes.
# SHUTDOWN_TIMEOUT=300 gives a stopped run as many seconds to save before it is killed (120).

# SIGUSR1: the time limit is near. SIGTERM: SLURM is ending the job, and its tasks have one too;
# the shell only stays until they have saved. srun itself must get no SIGTERM, it would kill them.
srun=''
code=0
trap '[[ -z $srun ]] || kill -USR1 "$srun" 2>/dev/null' USR1
trap ':' TERM

say() {
    printf '%(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*" >&2
}

begin() {
    if [[ -d $checkout/.venv ]]; then
        PATH=$checkout/.venv/bin:$PATH
    fi
    # This reads all settings, so that a mistake in them is found here, once, and not by every rank.
    run=$("${container[@]}" python -c 'import sys
from dtrain.commands.train import parse
print(parse(sys.argv[1:]).run_dir.absolute())' "$@") || exit 2

    # The same for all tasks of this attempt, and for no other one.
    attempt=${SLURM_RESTART_COUNT:-0}
    rendezvous=$SLURM_JOB_ID.$attempt
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + attempt) % 20000))
    if [[ -z $MASTER_ADDR ]]; then
        say "scontrol names no host of $SLURM_JOB_NODELIST, so the nodes cannot find each other"
        exit 2
    fi
    export MASTER_ADDR MASTER_PORT

    # The variable rather than torchrun's option, which PyTorch 2.11 does not know.
    SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-120}
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN_TIMEOUT
    local cores=${SLURM_CPUS_ON_NODE:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    export PYTHONUNBUFFERED=1
    # A collective on GPUs that hangs leaves a record of what each rank was doing.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000
    export TORCH_FR_DUMP_TEMP_FILE=$run/nccl-$rendezvous-rank-
    before=$(cat "$run/status.json" 2>/dev/null)
    say "attempt $((attempt + 1)): $SLURM_JOB_NUM_NODES nodes x $processes processes," \
        "rendezvous at $MASTER_ADDR:$MASTER_PORT, run $run"
}

step() {
    # Since SLURM 22.05 srun does not take over sbatch's --cpus-per-task. A task that fails does not
    # end the others, who may be saving: they have as long as after a signal.
    srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --distribution=block \
        --kill-on-bad-exit=0 --wait="$SHUTDOWN_TIMEOUT" "${container[@]}" "$@" &
    srun=$!
    while :; do # a signal ends `wait`, and not srun
        wait "$srun"
        code=$?
        kill -0 "$srun" 2>/dev/null || break
    done
}

conclude() {
    local verdict
    # A task's exit code tells nothing: torchrun makes 1 of every stop.
    verdict=$("${container[@]}" python -m dtrain status "$run" --verdict) || verdict=stop
    if [[ $verdict == completed && $code != 0 ]] &&
        [[ $(cat "$run/status.json" 2>/dev/null) == "$before" ]]; then
        say "the run was completed before; this attempt did not get as far as to go on with it"
        verdict=stop
    fi
    say "the step ended with code $code; verdict: $verdict"
    if [[ $verdict == completed ]]; then
        exit 0
    fi
    # What SLURM preempts it would requeue in any case, but only if it has not ended by then.
    if [[ $verdict == requeue || $(job_field PreemptTime) == [0-9]* ]]; then
        requeue
    else
        "${container[@]}" python -m dtrain status "$run" >&2
    fi
    exit $((code == 0 ? 1 : code))
}

requeue() {
    local pause
    for pause in 0 5 15 60; do # SLURM's controller may be starting anew
        sleep "$pause"
        case $(job_field JobState) in
            RUNNING)
                trap - TERM # this is how SLURM ends the shell, and it should be quick
                scontrol requeue "$SLURM_JOB_ID" && sleep 600
                ;;
            ?*) # it was cancelled, or preempted and requeued, while the tasks saved
                say "SLURM is ending this job itself, so it is not requeued here"
                return
                ;;
        esac
    done
    say "could not be requeued; the same sbatch command goes on from the last checkpoint"
}

job_field() { # NAME: what SLURM says of this job
    scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o " $1=[^ ]*" | cut -d = -f 2
}
