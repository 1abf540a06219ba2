#!/usr/bin/env bash
# Tries the program under real launchers on this machine: torchrun, mpirun, SLURM (two slurmd) and ssh. Each trial trains a tiny
# random model with two ranks, disturbs the job or not, and holds what came out against what should come out.
#
#   [PYTHON=python3] [BELLORA=PROGRAM] [LOGS=FOLDER] scripts/launchers.sh [TRIAL...]
#
# Without a TRIAL all of them are run (about fifteen minutes on two cores), and docs/measurements/launchers.md is written. With
# some, the rows come out on standard output alone. LOGS keeps what the launchers said. Exit code 1 if a trial went wrong.
#
# Needs, on Debian and Ubuntu: apt install openmpi-bin slurm-wlm munge openssh-server openssh-client procps; and root, since
# slurmd and sshd start processes for others. torchrun is PYTHON's if that has torch, else the one in .libtorch. All daemons
# listen on loopback with settings and keys of their own in a temporary folder; at the end, also after a failure or Ctrl-C, they
# are stopped and the folder is removed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/launchers.sh
    exit 0
    ;;
esac

python=${PYTHON:-python3}
bellora=${BELLORA:-$root/target/release/bellora}
report=docs/measurements/launchers.md
N_SHORT=12  # updates of a job that is left in peace
N_LONG=150  # updates of one that goes on after it was disturbed
N_ENDLESS=100000
# The losses of two ranks differ from those of one process by rounding alone: 2.2e-8 in docs/ranks.md for four updates. It grows with
# each update, because the next one begins with other parameters.
MOST_SHORT=1e-6 MOST_LONG=1e-4

missing=""
for tool in "$python" "$bellora" mpirun slurmctld slurmd munged sshd ssh ssh-keygen pgrep nm cc; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" >/dev/null || missing="$missing $tool"
done
[ -z "$missing" ] || die "not found:$missing" "cargo build --release; apt install openmpi-bin slurm-wlm munge openssh-server procps gcc"
PATH="$PATH:/usr/sbin:/sbin"
[ "$(id -u)" = 0 ] || die "slurmd and sshd want root" "run it in a container or a virtual machine where you are root"
only_one

work=$(mktemp -d) || die "there is no room for temporary files" "set TMPDIR"
chmod 755 "$work"
made_run_sshd=false
job=""

# shellcheck disable=SC2317 # a trap calls it
clean_up() {
    local status=$? pid
    trap - EXIT
    trap '' INT TERM HUP
    [ ! -e "$work/slurm.conf" ] || timeout 20 scancel --user=root --signal=KILL >/dev/null 2>&1 || true
    [ -z "$job" ] || kill -KILL -- "-$job" 2>/dev/null || true
    # Whatever was started names the folder: daemons and their children by their settings, ranks by their run.
    for _ in 1 2 3 4 5; do
        for pid in $(pgrep -f -- "$work" || true); do kill -KILL "$pid" 2>/dev/null || true; done
        sleep 0.2
    done
    [ -z "${LOGS:-}" ] || { mkdir -p "$LOGS" && cp -r "$work/log/." "$LOGS"; } || true
    rm -rf "$work"
    [ "$made_run_sshd" = false ] || rmdir /run/sshd 2>/dev/null || true
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# What is here of SLURM's, Open MPI's or torchrun's, if this runs in a job of theirs, is not to reach the trials.
for name in $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|OMPI|PMI|PMIX|BELLORA|TORCHELASTIC)_|^(RANK|WORLD_SIZE|LOCAL_RANK)$' || true); do
    unset "$name"
done
export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export TMPDIR="$work/tmp" BELLORA="$bellora"
mkdir -p "$work"/{log,run,tmp}
rows="$work/rows.md"
: >"$rows"

# --- What a trial is made of -----------------------------------------------------------------------------------------------

# begin NAME DONE EXPECTED: what was done and what should happen, for the table.
begin() {
    name=$1 done=$2 expected=$3 happened="" difference="" faults=""
    log="$work/log/$name.log"
    run="$work/run/$name"
    : >"$log"
    say "--- $name"
}

saw() { happened="${happened:+$happened; }$1"; }

wrong() {
    faults="${faults:+$faults; }$1"
    saw "**$1**"
}

# end: writes the trial's row.
end() {
    local verdict=yes
    if [ -n "$faults" ]; then
        verdict="**no**"
        any_wrong=1
        say "error: $name: $faults"
        tail -n 25 "$log" | sed 's/^/    /' >&2
    fi
    printf '| %s | %s | %s | %s | %s | %s |\n' "$name" "$done" "$expected" "$happened" "${difference:--}" "$verdict" >>"$rows"
    say "$happened${difference:+; loss differs by $difference}"
}

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# task STEPS: the arguments of `bellora train` for the trial's run.
task() { printf '%s\n' "$work/base/job.toml" --set "train.output=$run" --set "train.max_steps=$1"; }

# launch COMMAND...: starts the trial's launcher in a process group of its own, as a shell at a terminal does.
launch() {
    set -m
    # Where this script was started in the background, Ctrl-C is ignored, also by what it starts.
    env --default-signal=INT "$@" </dev/null >>"$log" 2>&1 &
    job=$!
    set +m
}

# settle [SECONDS]: waits for the launcher; sets `status` and `took`.
settle() {
    local most=${1:-120} began=$SECONDS
    status=0
    { # the shell tells of jobs that were killed
        while kill -0 "$job"; do
            if [ $((SECONDS - began)) -ge "$most" ]; then
                wrong "it had not ended after $most s"
                kill -KILL -- "-$job" || true
                break
            fi
            sleep 0.1
        done
        wait "$job" || status=$?
    } 2>/dev/null
    took=$((SECONDS - began)) job=""
}

expect_status() {
    saw "exit code $status"
    [ "$status" = "$1" ] || wrong "exit code $1 was expected"
}

# expect TEXT [HOW OFTEN]: what the log must say, as a fixed string.
expect() {
    local n
    n=$(grep -cF -- "$1" "$log" || true)
    [ "$n" = "${2:-$n}" ] && { [ "$n" != 0 ] || [ "${2:-1}" = 0 ]; } || wrong "\`$1\` stands in the log $n times"
}

n_steps() { if [ -e "$run/metrics.jsonl" ]; then wc -l <"$run/metrics.jsonl"; else echo 0; fi; }

newest() { find "$run/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sed 's/.*step-0*//' | sort -n | tail -n 1; }

# until_step N: waits until the run has made so many updates and a checkpoint.
until_step() {
    local began=$SECONDS
    until [ "$(n_steps)" -ge "$1" ] && [ -n "$(newest)" ]; do
        if [ $((SECONDS - began)) -ge 90 ]; then
            wrong "update $1 was not reached"
            return
        fi
        sleep 0.05
    done
}

# rank_pid RANK: the process of a rank of the trial's run.
rank_pid() {
    local pid
    for pid in $(pgrep -f -- "train.output=$run" || true); do
        [ "$(readlink "/proc/$pid/exe" 2>/dev/null)" = "$(readlink -f "$bellora")" ] || continue
        if tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" |
            grep -qxE "(RANK|OMPI_COMM_WORLD_RANK|SLURM_PROCID|BELLORA_RANK)=$1"; then
            echo "$pid"
            return
        fi
    done
}

kill_rank() {
    local pid
    pid=$(rank_pid "$1")
    if [ -n "$pid" ]; then kill -KILL "$pid"; else wrong "rank $1 was not found"; fi
}

# started: waits until the processes are there that `stubborn` starts, which no SIGTERM ends.
stubborn=(bash -c 'trap "" TERM; touch "$1"; exec -a "stubborn $1" sleep 300' bash)
started() {
    local began=$SECONDS
    until [ -e "$run" ] || [ $((SECONDS - began)) -ge 60 ]; do sleep 0.1; done
    sleep 1
}

# between LEAST MOST: how many seconds the launcher left them.
between() {
    saw "killed after $took s"
    { [ "$took" -ge "$1" ] && [ "$took" -le "$2" ]; } || wrong "$1 to $2 s were expected"
}

# nobody_left [SECONDS]: no rank of the run lives on.
nobody_left() {
    local began=$SECONDS
    while pgrep -f -- "train.output=$run" >/dev/null; do
        if [ $((SECONDS - began)) -ge "${1:-15}" ]; then
            wrong "processes were left"
            return
        fi
        sleep 0.2
    done
}

# same_as REFERENCE MOST: the largest relative difference of a loss to the one process's.
same_as() {
    difference=$("$python" - "$work/run/$1/metrics.jsonl" "$run/metrics.jsonl" <<'END'
import json, sys
one, many = ({row["step"]: row["loss"] for row in map(json.loads, open(name)) if "loss" in row} for name in sys.argv[1:])
print("%.1e" % max(abs(many[s] - one[s]) / one[s] for s in one) if one.keys() == many.keys() else "other updates")
END
    ) || difference="no losses"
    "$python" -c 'import sys; sys.exit(not float(sys.argv[1]) < float(sys.argv[2]))' "$difference" "$2" 2>/dev/null ||
        wrong "losses are not those of one process"
}

# saved_where_it_stopped: the newest checkpoint is that of the last update.
saved_where_it_stopped() {
    local last
    last=$(n_steps)
    saw "saved at update $(newest) of $last"
    [ "$last" != 0 ] && [ "$(newest)" = "$last" ] || wrong "updates were lost"
}

# --- One process -----------------------------------------------------------------------------------------------------------

prepare() {
    say "a tiny base, and what one process makes of it"
    "$python" scripts/make_random_base.py "$work/base" --hidden 64 --layers 2 >/dev/null
    # The file's last section is that of training.
    { sed 's/^\[model\]/&\ndtype = "fp32"\ndevice = "cpu"/' "$work/base/random.toml" && echo 'checkpoint_every = 20'; } \
        >"$work/base/job.toml"
    local n
    for n in short:$N_SHORT long:$N_LONG; do
        run="$work/run/${n%:*}"
        mapfile -t arguments < <(task "${n#*:}")
        "$bellora" train "${arguments[@]}" >"$work/log/one-process.log" 2>&1 ||
            die "one process does not train: $(tail -n 3 "$work/log/one-process.log")"
    done
}

for launcher in torchrun mpirun slurm ssh; do . "scripts/launchers/$launcher.sh"; done

# --- All of it -------------------------------------------------------------------------------------------------------------

trials=("$@")
# shellcheck disable=SC2206 # names, one word each
[ $# -gt 0 ] || trials=($TORCHRUN $MPIRUN $SLURM $HOSTS)
for trial in "${trials[@]}"; do
    declare -F "trial_${trial//-/_}" >/dev/null || die "$trial is no trial" "there are: $TORCHRUN $MPIRUN $SLURM $HOSTS"
done
any_wrong=0
prepare
is_in() { [[ " $2 " == *" ${1//-/_} "* ]]; }
has_torchrun=false has_slurm=false has_sshd=false
for trial in "${trials[@]}"; do
    if is_in "$trial" "$TORCHRUN" && [ $has_torchrun = false ]; then find_torchrun && has_torchrun=true; fi
    if is_in "$trial" "$SLURM" && [ $has_slurm = false ]; then start_slurm && has_slurm=true; fi
    if is_in "$trial" "$HOSTS" && [ $has_sshd = false ]; then start_sshd && has_sshd=true; fi
    "trial_${trial//-/_}"
done

table() {
    echo '| trial | what was done | what should happen | what happened | loss difference | as it should |'
    echo '|---|---|---|---|---:|---|'
    cat "$rows"
}
if [ $# -gt 0 ]; then
    table
    exit "$any_wrong"
fi
{
    cat <<END
# Real launchers

What \`scripts/launchers.sh\` did and saw: two ranks on the CPU of one machine, all on loopback, a tiny random model. \`CONFIG\` stands for
the config and for what gives each trial its run folder and its length. The loss difference is the largest, over all updates, to
one process, relative to its loss: over $N_SHORT updates, or over $N_LONG where the job was disturbed and went on.

| | |
|---|---|
| date | $(date -u +%F) |
| commit | $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$([ -z "$(git status --porcelain -- src scripts 2>/dev/null)" ] || echo ', with changes') |
| system | $(. /etc/os-release && echo "$PRETTY_NAME"), Linux $(uname -r), $(nproc --all) cores |
| torchrun | of torch $("${python_with_torch[@]}" -c 'import torch; print(torch.__version__)') |
| mpirun | $(mpirun --version | sed -n '1s/mpirun (\(.*\)) /\1 /p') |
| SLURM | $(slurmctld -V | sed 's/slurm-wlm //'), two slurmd on one host |
| sshd | $(ssh -V 2>&1 | cut -d, -f1) |

END
    table
} >"$work/report.md"
cp "$work/report.md" "$report"
say "written to $report"
exit "$any_wrong"
