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

# shellcheck disable=SC2329 # a trap calls it
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

# --- What a trial is made of -------------------------------------------------------------------------------------------------

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

# --- One process -------------------------------------------------------------------------------------------------------------

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

# --- torchrun ----------------------------------------------------------------------------------------------------------------

python_with_torch=("$python")
# Where PYTHON has no torch, the one in .libtorch: without CUDA's libraries, for which an empty one stands in.
find_torchrun() {
    ! "$python" -c 'import torch.distributed.run' 2>/dev/null || return 0
    local lib=.libtorch/torch/lib stubs="$work/stubs" wanted
    mkdir -p "$stubs"
    nm -Du "$lib"/*.so | sed -n 's/^ *[Uw] \(\(cu\|nvsh\|nccl\)[A-Za-z0-9_@.]*\)$/\1/p' | grep -v '^cud[ai]\|^cupti' |
        sed 's/@@*/ /' | sort -u >"$work/wanted"
    awk '{ print "void " $1 "(void) {}" }' "$work/wanted" | sort -u >"$work/stubs.c"
    awk 'NF > 1 { of[$2] = of[$2] " " $1 ";" } END { for (v in of) print v " { global:" of[v] " };" }' "$work/wanted" >"$work/stubs.map"
    cc -shared -fPIC -Wl,--version-script="$work/stubs.map" -o "$stubs/all.so" "$work/stubs.c"
    for wanted in $(readelf -d "$lib"/*.so | sed -n 's/.*NEEDED.*\[\(libcublas.*\|libcu[fs].*\|libcurand.*\|libcudnn.*\|libn[cv][^r].*\)\]/\1/p' | sort -u); do
        ln -sf all.so "$stubs/$wanted"
    done
    python_with_torch=(env PYTHONPATH="$root/.libtorch" PYTHONWARNINGS=ignore LD_LIBRARY_PATH="$stubs" "$python")
    "${python_with_torch[@]}" -c 'import torch.distributed.run' 2>"$work/log/torch.log" ||
        die "neither $python nor .libtorch has a torchrun: $(tail -n 1 "$work/log/torch.log")" "PYTHON=a Python with torch"
}

# torchrun OPTION...: starts it.
torchrun() {
    launch "${python_with_torch[@]}" -m torch.distributed.run --nproc-per-node 2 --master-addr 127.0.0.1 --master-port "$(free_port)" \
        --no-python "$@"
}

trial_torchrun() {
    begin torchrun '`torchrun --nproc-per-node 2 --no-python bellora train CONFIG`, `BELLORA_TOKEN` set' 'trains as one process'
    mapfile -t arguments < <(task $N_SHORT)
    BELLORA_TOKEN=secret torchrun "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
    same_as short $MOST_SHORT
    end
}

trial_torchrun_id() {
    begin torchrun-id 'the same without a token, `--rdzv-id trial`' 'trains as one process'
    mapfile -t arguments < <(task $N_SHORT)
    torchrun --rdzv-id trial "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
    same_as short $MOST_SHORT
    end
}

trial_torchrun_none() {
    begin torchrun-none 'the same without a token and without an id: torchrun calls the job `none`' 'refused, `BELLORA_TOKEN` is named'
    mapfile -t arguments < <(task $N_SHORT)
    torchrun "$bellora" train "${arguments[@]}"
    settle
    expect_status 1
    expect "error: BELLORA_TOKEN: ranks know each other by a secret, and there is none" 1
    end
}

trial_torchrun_restart() {
    begin torchrun-restart '`torchrun --max-restarts 1 ... bellora train CONFIG --resume`, rank 1 killed (SIGKILL)' \
        'torchrun starts both again, they go on from the newest checkpoint and end as one process'
    mapfile -t arguments < <(task $N_LONG)
    BELLORA_TOKEN=secret torchrun --max-restarts 1 "$bellora" train "${arguments[@]}" --resume
    until_step 30
    kill_rank 1
    settle
    expect_status 0
    saw "$(grep -o 'going on.*\|resum[a-z]* .*step [0-9]*.*' "$log" | head -n 1)"
    same_as long $MOST_LONG
    end
}

trial_torchrun_stop() {
    begin torchrun-stop 'SIGTERM to torchrun' 'the ranks finish the update and save within its 30 s'
    mapfile -t arguments < <(task $N_ENDLESS)
    BELLORA_TOKEN=secret torchrun "$bellora" train "${arguments[@]}"
    until_step 30
    kill -TERM "$job"
    settle
    saw "exit code $status after $took s"
    saved_where_it_stopped
    nobody_left
    end
}

# --- mpirun ------------------------------------------------------------------------------------------------------------------

mpi() {
    MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) BELLORA_TOKEN=secret \
        launch mpirun -n 2 --host localhost:2 --bind-to none -x MASTER_ADDR -x MASTER_PORT -x BELLORA_TOKEN "$@"
}

trial_mpirun() {
    begin mpirun '`mpirun -n 2 --bind-to none -x MASTER_ADDR -x MASTER_PORT -x BELLORA_TOKEN bellora train CONFIG`' 'trains as one process; rank 0 alone speaks of the adapter'
    mapfile -t arguments < <(task $N_SHORT)
    mpi "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
    expect "adapter written to" 1
    same_as short $MOST_SHORT
    end
}

trial_mpirun_config() {
    begin mpirun-config 'the same with `lora.r = 0`' 'rank 0 alone speaks, with `[rank 0]` in front'
    mapfile -t arguments < <(task $N_SHORT)
    mpi "$bellora" train "${arguments[@]}" --set lora.r=0
    settle
    expect_status 2
    expect "lora.r" 1
    expect "[rank 0] error:" 1
    end
}

trial_mpirun_disagree() {
    begin mpirun-disagree 'the same with `RANK=0 WORLD_SIZE=3` left in the environment' 'refused, both are named'
    mapfile -t arguments < <(task $N_SHORT)
    RANK=0 WORLD_SIZE=3 mpi -x RANK -x WORLD_SIZE "$bellora" train "${arguments[@]}"
    settle
    expect_status 2
    expect "WORLD_SIZE: says that the job has 3 ranks, and OMPI_COMM_WORLD_SIZE says 2"
    end
}

trial_mpirun_stop() {
    begin mpirun-stop 'SIGUSR1 to mpirun, then SIGTERM once the checkpoint is there' 'nothing before the checkpoint is lost, whatever mpirun leaves the ranks of time'
    mapfile -t arguments < <(task $N_ENDLESS)
    mpi "$bellora" train "${arguments[@]}" --set train.checkpoint_every=1000000
    local asked began=$SECONDS
    until [ "$(n_steps)" -ge 10 ] || [ $((SECONDS - began)) -ge 60 ]; do sleep 0.1; done
    asked=$(n_steps)
    kill -USR1 "$job"
    until [ -n "$(newest)" ] || [ $((SECONDS - began)) -ge 90 ]; do sleep 0.1; done
    [ "$(newest)" -ge "$asked" ] || wrong "there is no checkpoint"
    saw "checkpoint at update $(newest), asked for at $asked"
    kill -TERM "$job"
    settle
    saw "exit code $status"
    nobody_left
    end
}

trial_mpirun_kill() {
    begin mpirun-kill 'rank 1 killed (SIGKILL), then the same command with `--resume`' 'mpirun ends all; the second call goes on and ends as one process'
    mapfile -t arguments < <(task $N_LONG)
    mpi "$bellora" train "${arguments[@]}"
    until_step 30
    kill_rank 1
    settle
    saw "exit code $status"
    [ "$status" != 0 ] || wrong "it must not be 0"
    nobody_left
    mpi "$bellora" train "${arguments[@]}" --resume
    settle
    expect_status 0
    same_as long $MOST_LONG
    end
}

# --- SLURM -------------------------------------------------------------------------------------------------------------------

start_slurm() {
    local host user
    host=$(hostname) user=$(id -un)
    say "SLURM: one slurmctld, two slurmd"
    mkdir -p "$work/slurm/state" "$work/slurm/n1" "$work/slurm/n2"
    (umask 077 && head -c 128 /dev/urandom >"$work/slurm/munge.key")
    munged --key-file="$work/slurm/munge.key" --socket="$work/slurm/munge.sock" --pid-file="$work/slurm/munged.pid" \
        --log-file="$work/slurm/munged.log" --seed-file="$work/slurm/munge.seed" --force 2>/dev/null
    cat >"$work/slurm.conf" <<END
ClusterName=trials
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$work/slurm/munge.sock
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation=$work/slurm/state
SlurmdSpoolDir=$work/slurm/%n
SlurmctldPidFile=$work/slurm/slurmctld.pid
SlurmdPidFile=$work/slurm/%n.pid
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdTimeout=20
ReturnToService=2
MailProg=/bin/true
LaunchParameters=use_interactive_step
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname=$host Port=$(free_port) CPUs=2
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname=$host Port=$(free_port) CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF="$work/slurm.conf"
    slurmctld -c -f "$SLURM_CONF"
    slurmd -N n1 -f "$SLURM_CONF"
    slurmd -N n2 -f "$SLURM_CONF"
    until [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c idle)" = 2 ]; do
        [ "$SECONDS" -lt $((${slurm_began:=$SECONDS} + 60)) ] || die "SLURM does not get ready" "LOGS=FOLDER keeps what it says"
        sleep 0.5
    done
}

# step COMMAND...: under srun, one task a node.
step() {
    MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) BELLORA_TOKEN=secret launch srun --nodes=2 --ntasks=2 "$@"
}

# batch [OPTION OF SBATCH...] -- ARGUMENT...: submits scripts/slurm.sh; sets `id`.
batch() {
    local options=()
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    id=$(sbatch --parsable --nodes=2 --ntasks-per-node=1 --gpus-per-task=0 --cpus-per-task=1 --output="$log" "${options[@]}" \
        scripts/slurm.sh "$@")
}

state() { scontrol show job "$id" -o 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# until_over SECONDS: waits for the batch job's end; one that waits in the queue to come back need not wait two minutes.
until_over() {
    local began=$SECONDS
    until case "$(state JobState)" in COMPLETED | FAILED | TIMEOUT | CANCELLED | NODE_FAIL) true ;; *) false ;; esac do
        if [ $((SECONDS - began)) -ge "$1" ]; then
            wrong "the job had not ended after $1 s"
            break
        fi
        [ "$(state JobState)" != PENDING ] || scontrol update JobId="$id" StartTime=now 2>/dev/null || true
        sleep 0.5
    done
    saw "$(state JobState), came back $(state Restarts) times"
    scancel "$id" 2>/dev/null || true
    until [ -z "$(squeue -h 2>/dev/null)" ] || [ $((SECONDS - began)) -ge $(($1 + 60)) ]; do sleep 0.5; done
}

trial_srun() {
    begin srun '`srun --nodes=2 --ntasks=2 bellora train CONFIG`, `MASTER_ADDR`, `MASTER_PORT`, `BELLORA_TOKEN` set' 'trains as one process'
    mapfile -t arguments < <(task $N_SHORT)
    step "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
    expect "adapter written to" 1
    same_as short $MOST_SHORT
    end
}

trial_srun_interrupt() {
    begin srun-interrupt 'one Ctrl-C at `srun --disable-status`' 'srun hands it on; the ranks finish the update and save'
    mapfile -t arguments < <(task $N_ENDLESS)
    step --disable-status "$bellora" train "${arguments[@]}"
    until_step 30
    kill -INT "$job"
    settle
    expect_status 130
    saved_where_it_stopped
    nobody_left
    end
}

trial_srun_abort() {
    begin srun-abort 'two Ctrl-C within a second at plain srun, then the same with `--resume`' \
        'srun hands SIGINT on and kills the ranks (SIGKILL) at once; the second call goes on from the newest checkpoint and ends as one process'
    mapfile -t arguments < <(task $N_LONG)
    step "$bellora" train "${arguments[@]}"
    until_step 30
    kill -INT "$job"
    sleep 0.3
    kill -INT "$job"
    settle
    saw "exit code $status"
    expect "forcing job termination"
    nobody_left
    step "$bellora" train "${arguments[@]}" --resume
    settle
    expect_status 0
    same_as long $MOST_LONG
    end
}

trial_srun_cancel() {
    begin srun-cancel '`scancel --signal=TERM JOB.0`' 'the ranks finish the update and save'
    mapfile -t arguments < <(task $N_ENDLESS)
    step "$bellora" train "${arguments[@]}"
    until_step 30
    scancel --signal=TERM "$(squeue -h -o %A | head -n 1).0"
    settle
    expect_status 143
    saved_where_it_stopped
    nobody_left
    end
}

trial_srun_limit() {
    begin srun-limit '`srun --time=1`: at the limit SLURM sends TERM, CONT and TERM' 'the ranks finish the update and save'
    mapfile -t arguments < <(task $N_ENDLESS)
    MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) BELLORA_TOKEN=secret \
        launch srun --time=1 --nodes=2 --ntasks=2 "$bellora" train "${arguments[@]}" --set train.checkpoint_every=1000000
    settle 200
    saw "exit code $status after $took s"
    saved_where_it_stopped
    nobody_left 40
    end
}

trial_salloc() {
    begin salloc 'in the shell of `salloc --ntasks=2`, a step of the number 4294967290, without srun' 'refused, srun is named'
    mapfile -t arguments < <(task $N_SHORT)
    launch salloc --nodes=2 --ntasks=2 srun --interactive --preserve-env --nodes=1 --ntasks=1 \
        sh -c 'echo "the step is $SLURM_STEP_ID"; exec "$@"' sh "$bellora" train "${arguments[@]}"
    settle
    saw "$(grep -o 'the step is.*' "$log")"
    expect_status 2
    expect 'srun bellora train'
    end
}

trial_mpirun_in_slurm() {
    begin mpirun-in-slurm '`salloc --ntasks=2 mpirun -n 2 ... bellora train CONFIG`' 'trains as one process'
    mapfile -t arguments < <(task $N_SHORT)
    MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) BELLORA_TOKEN=secret \
        launch salloc --nodes=1 --ntasks=2 mpirun -n 2 --bind-to none -x MASTER_ADDR -x MASTER_PORT -x BELLORA_TOKEN \
        "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
    expect "adapter written to" 1
    same_as short $MOST_SHORT
    end
}

trial_slurm() {
    begin slurm '`sbatch --nodes=2 scripts/slurm.sh CONFIG`' 'trains as one process'
    mapfile -t arguments < <(task $N_SHORT)
    batch -- "${arguments[@]}"
    until_over 90
    [ "$(state JobState)" = COMPLETED ] || wrong "COMPLETED was expected"
    same_as short $MOST_SHORT
    end
}

trial_slurm_warning() {
    begin slurm-warning 'the same; USR1 to the batch script, as `--signal` sends it before the time is up' 'saves, comes back and ends as one process'
    mapfile -t arguments < <(task $N_LONG)
    batch -- "${arguments[@]}"
    until_step 30
    scancel --batch --signal=USR1 "$id"
    until_over 120
    [ "$(state JobState):$(state Restarts)" = COMPLETED:1 ] || wrong "COMPLETED after one return was expected"
    expect "the time is nearly up" 1
    same_as long $MOST_LONG
    end
}

trial_slurm_short_limit() {
    begin slurm-short-limit 'the same with a limit of one minute, of which SLURM warns at the start, and `BELLORA_REQUEUES=1`' \
        'it comes back once, and only with a newer checkpoint'
    mapfile -t arguments < <(task $N_ENDLESS)
    BELLORA_REQUEUES=1 batch --time=1 -- "${arguments[@]}"
    until_over 250
    [ "$(state JobState):$(state Restarts)" = FAILED:1 ] || wrong "FAILED after one return was expected"
    expect "the run goes on when the job comes back" 1
    expect "the job has come back 1 times and is not requeued again" 1
    saved_where_it_stopped
    end
}

trial_slurm_no_progress() {
    begin slurm-no-progress 'rank 1 killed (SIGKILL) before there is a checkpoint' 'it does not come back, and says why'
    mapfile -t arguments < <(task $N_ENDLESS)
    batch -- "${arguments[@]}" --set train.checkpoint_every=1000000
    local began=$SECONDS
    until [ "$(n_steps)" -ge 5 ] || [ $((SECONDS - began)) -ge 60 ]; do sleep 0.1; done
    kill_rank 1
    until_over 120
    [ "$(state JobState):$(state Restarts)" = FAILED:0 ] || wrong "FAILED at once was expected"
    expect "no checkpoint was written, so the job is not requeued" 1
    end
}

trial_slurm_kill() {
    begin slurm-kill 'rank 1 killed (SIGKILL) under `scripts/slurm.sh`' 'comes back and ends as one process'
    mapfile -t arguments < <(task $N_LONG)
    batch -- "${arguments[@]}"
    until_step 30
    kill_rank 1
    until_over 120
    [ "$(state JobState):$(state Restarts)" = COMPLETED:1 ] || wrong "COMPLETED after one return was expected"
    same_as long $MOST_LONG
    end
}

trial_slurm_node() {
    begin slurm-node 'a slurmd killed with all it had started, and started again half a minute later' 'comes back and ends as one process'
    mapfile -t arguments < <(task $N_LONG)
    batch -- "${arguments[@]}"
    until_step 30
    local pid
    pid=$(rank_pid 1)
    kill -KILL "$(cat "$work/slurm/n2.pid")" "$(ps -o ppid= -p "$pid" | tr -d ' ')" "$pid"
    sleep 30
    slurmd -N n2 -f "$SLURM_CONF"
    until_over 200
    [ "$(state JobState):$(state Restarts)" = COMPLETED:1 ] || wrong "COMPLETED after one return was expected"
    same_as long $MOST_LONG
    end
}

# --- ssh ---------------------------------------------------------------------------------------------------------------------

start_sshd() {
    local port ssh
    port=$(free_port) ssh=$(command -v ssh)
    say "sshd"
    [ -d /run/sshd ] || { mkdir /run/sshd && made_run_sshd=true; }
    mkdir -p "$work/ssh" "$work/bin"
    ssh-keygen -q -t ed25519 -N '' -f "$work/ssh/host"
    ssh-keygen -q -t ed25519 -N '' -f "$work/ssh/key"
    cat >"$work/ssh/sshd_config" <<END
Port $port
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey $work/ssh/host
PidFile $work/ssh/sshd.pid
AuthorizedKeysFile $work/ssh/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
END
    cat >"$work/ssh/config" <<END
Host *
Port $port
IdentityFile $work/ssh/key
IdentitiesOnly yes
UserKnownHostsFile $work/ssh/known
StrictHostKeyChecking no
LogLevel ERROR
END
    printf '#!/bin/sh\nexec %s -F %s "$@"\n' "$ssh" "$work/ssh/config" >"$work/bin/ssh"
    chmod 755 "$work/bin/ssh"
    "$(command -v sshd)" -f "$work/ssh/sshd_config"
}

# hosts ARGUMENT...: scripts/hosts.sh on two addresses of this machine.
hosts() {
    PATH="$work/bin:$PATH" NPROC=1 PORT="$port" launch scripts/hosts.sh "$1" 127.0.0.1 127.0.0.2 -- "${@:2}"
}

nothing_stray() {
    ! grep -nE '(^|: )(Killed|Terminated)( |$)|signal 15' "$log" >/dev/null || wrong "stray words: $(grep -oE 'Killed|Terminated|signal 15' "$log" | head -n 1)"
    [ -z "$(ls -A "$TMPDIR")" ] || wrong "a folder was left in TMPDIR"
}

trial_hosts() {
    begin hosts '`NPROC=1 scripts/hosts.sh CONFIG 127.0.0.1 127.0.0.2` by a real sshd' 'trains as one process, nothing is left'
    port=$(free_port)
    mapfile -t arguments < <(task $N_SHORT)
    hosts "${arguments[@]}"
    settle
    expect_status 0
    same_as short $MOST_SHORT
    nothing_stray
    end
}

trial_hosts_interrupt() {
    begin hosts-interrupt 'Ctrl-C at it' 'both finish the update, rank 0 saves, nothing is left'
    port=$(free_port)
    mapfile -t arguments < <(task $N_ENDLESS)
    hosts "${arguments[@]}"
    until_step 30
    kill -INT -- "-$job"
    settle
    expect_status 130
    saved_where_it_stopped
    nobody_left
    nothing_stray
    end
}

trial_hosts_port() {
    begin hosts-port 'another program listens at the port' 'the port is named as the cause, with the host in front'
    port=$(free_port)
    "$python" -c 'import socket, sys, time; s = socket.socket(); s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen(); time.sleep(300)' "$port" "$work" &
    local listener=$!
    sleep 1
    mapfile -t arguments < <(task $N_SHORT)
    hosts "${arguments[@]}"
    settle
    kill "$listener"
    { wait "$listener" || true; } 2>/dev/null
    [ "$status" != 0 ] || wrong "it must not be 0"
    saw "exit code $status"
    expect "127.0.0.1: error:"
    expect "127.0.0.2: error: stopped by SIGTERM: "
    expect "Address already in use"
    nothing_stray
    end
}

trial_hosts_kill() {
    begin hosts-kill 'rank 1 killed (SIGKILL), then the same with `--resume`' 'all end, the cause is named with its host; the second call ends as one process'
    port=$(free_port)
    mapfile -t arguments < <(task $N_LONG)
    hosts "${arguments[@]}"
    until_step 30
    kill_rank 1
    settle
    saw "exit code $status"
    [ "$status" != 0 ] || wrong "it must not be 0"
    expect "127.0.0.2: error: rank 1: was killed (SIGKILL)"
    nobody_left
    nothing_stray
    port=$(free_port)
    hosts "${arguments[@]}" --resume
    settle
    expect_status 0
    same_as long $MOST_LONG
    end
}

trial_hosts_stuck() {
    begin hosts-stuck 'the supervisor of rank 1 stopped (SIGSTOP), and rank 0 killed' 'it is ended after 30 s, the cause is named'
    port=$(free_port)
    mapfile -t arguments < <(task $N_ENDLESS)
    hosts "${arguments[@]}"
    until_step 30
    local rank
    rank=$(rank_pid 1)
    kill -STOP "$(ps -o ppid= -p "$rank" | tr -d ' ')"
    kill_rank 0
    settle
    saw "exit code $status after $took s"
    [ "$status" != 0 ] || wrong "it must not be 0"
    expect "127.0.0.1: error: rank 0: was killed (SIGKILL)"
    nobody_left
    nothing_stray
    end
}

trial_hosts_gone() {
    begin hosts-gone '`scripts/hosts.sh` itself killed (SIGKILL)' 'both hosts stop by themselves, rank 0 saves'
    port=$(free_port)
    mapfile -t arguments < <(task $N_ENDLESS)
    hosts "${arguments[@]}"
    until_step 30
    kill -KILL "$job"
    settle
    nobody_left 30
    sleep 1
    saved_where_it_stopped
    nothing_stray
    end
}

# --- All of it ---------------------------------------------------------------------------------------------------------------

TORCHRUN="torchrun torchrun_id torchrun_none torchrun_restart torchrun_stop"
MPIRUN="mpirun mpirun_config mpirun_disagree mpirun_stop mpirun_kill"
SLURM="srun srun_interrupt srun_abort srun_cancel srun_limit salloc mpirun_in_slurm slurm slurm_warning slurm_short_limit slurm_kill slurm_no_progress slurm_node"
HOSTS="hosts hosts_interrupt hosts_port hosts_kill hosts_stuck hosts_gone"
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
| system | $(. /etc/os-release && echo "$PRETTY_NAME"), Linux $(uname -r), $(nproc) cores |
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
