#!/usr/bin/env bash
#SBATCH --job-name=bellora
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# A training job under SLURM: one task a GPU, started by srun; each finds its rank in SLURM's environment.
#
#   sbatch --nodes=8 --time=12:00:00 scripts/slurm.sh CONFIG [ARGUMENT OF BELLORA TRAIN ...]
#
# Options of sbatch on the command line overrule the #SBATCH lines above: other machines want another --ntasks-per-node, and a
# job on CPUs wants --gpus-per-task=0. To be called in the checkout, at a place that all nodes see. The program is BELLORA, or
# the one in target/release. The base and the samples must lie under the same names on every node; the run folder is
# read and written on the first one alone, but a job that comes back may get another first node: keep it where all see it.
#
# The job may be requeued at any time: `train --resume` starts the run or goes on from its newest whole checkpoint. Five minutes
# before the time is up (--signal) the ranks are asked to stop: they finish the update and save. The job puts itself back into
# the queue then, and also when a rank was lost: one that was killed (SIGKILL: a node that failed, memory that ran out), or to which
# the link was cut (exit code 75). It does so only if there is a newer checkpoint than when it began, and BELLORA_REQUEUES times at most
# (100). An error of the program does not requeue it: it would only come again. srun tells the highest exit code alone, so an
# error with a lower one than 75 passes for a lost rank where the other ranks lost the one that failed.
# Of a limit of five minutes or less SLURM warns at the job's start: such a job comes back after its first updates, again and again.
#
# Tried with SLURM 22.05, two nodes on one host (docs/measurements/launchers.md).
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }

# SLURM runs a copy of this script from a folder of its own, so that lib.sh is not beside it.
cd "${SLURM_SUBMIT_DIR:?to be started by sbatch}"
if [ $# = 0 ] || [ ! -f "$1" ]; then
    say "error: ${1:-no config} is not a config in $PWD"
    say "hint: sbatch --nodes=N scripts/slurm.sh CONFIG [ARGUMENT OF BELLORA TRAIN ...]"
    exit 2
fi
bellora=${BELLORA:-$PWD/target/release/bellora}
command -v "$bellora" >/dev/null || {
    say "error: $bellora is no program on $(hostname)"
    say "hint: build it (cargo build --release), or name one: BELLORA=PROGRAM"
    exit 2
}

# Where rank 0 listens: srun puts it on the first node. Its address, for a name may lead to a loopback address on the node itself.
# The port is the job's own, beneath those that systems give out themselves.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | sed -n 1p)
MASTER_ADDR=${MASTER_ADDR:-$node}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
# Drawn for this start, and handed on by the environment: command lines can be read by other users of a machine.
BELLORA_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MASTER_ADDR MASTER_PORT BELLORA_TOKEN
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

run=$("$bellora" check "$@" --print-config | sed -n 's/^output = "\(.*\)"\( *#.*\)\{0,1\}$/\1/p')
newest_checkpoint() {
    { find "$run/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null || true; } | sort | tail -n 1
}
before=$(newest_checkpoint)

is_out_of_time=false
stop() {
    is_out_of_time=true
    say "the time is nearly up: the ranks are asked to stop"
    # Not by a signal to srun, which does not hand SIGTERM on but kills the step. The ranks are the job's first step.
    scancel --signal=TERM "$SLURM_JOB_ID.0" || true
}

# A rank that loses another one ends by itself, and rank 0 may be the last to end because it saves: hence no --kill-on-bad-exit,
# but a limit to how long ranks may outlive the first.
srun --export=ALL --kill-on-bad-exit=0 --wait=240 "$bellora" train "$@" --resume &
srun=$!
trap stop USR1
status=0
# A wait that the trap interrupts is no end of the ranks.
while
    status=0
    wait "$srun" || status=$?
    kill -0 "$srun" 2>/dev/null
do :; done

# 75: a rank lost another one. 137: a rank was killed by SIGKILL.
was_a_rank_lost() { [ "$status" = 75 ] || [ "$status" = 137 ]; }
if [ "$status" != 0 ] && { [ "$is_out_of_time" = true ] || was_a_rank_lost; }; then
    if [ "$(newest_checkpoint)" = "$before" ]; then
        say "error: no checkpoint was written, so the job is not requeued: it would never get on"
        say "hint: give it more time, or lower train.checkpoint_every"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${BELLORA_REQUEUES:-100}" ]; then
        say "error: the job has come back ${SLURM_RESTART_COUNT} times and is not requeued again"
        say "hint: BELLORA_REQUEUES says how often it may"
    else
        say "the run goes on when the job comes back"
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
