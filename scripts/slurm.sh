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
# before the time is up (--signal) the ranks are asked to stop: they finish the update, save, and the job puts itself back
# into the queue. A node that fails requeues it too (--requeue). An error of the program does not: it would only come again.
#
# Written to SLURM's documentation; it has not been tried on a cluster.
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

# Where rank 0 listens: srun puts it on the first node. The port is the job's own, beneath those that systems give out themselves.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
# Drawn for this start, and handed on by the environment: command lines can be read by other users of a machine.
BELLORA_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MASTER_ADDR MASTER_PORT BELLORA_TOKEN
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

is_out_of_time=false
stop() {
    is_out_of_time=true
    say "the time is nearly up: the ranks are asked to stop"
    # srun hands the signal on to every task.
    kill -TERM "$srun" 2>/dev/null || true
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

if [ "$is_out_of_time" = true ] && [ "$status" != 0 ]; then
    say "the run goes on when the job comes back"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
