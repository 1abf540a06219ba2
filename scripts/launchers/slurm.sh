# shellcheck shell=bash
# Trials of SLURM and of scripts/slurm.sh: one slurmctld and two slurmd on this host. Sourced by scripts/launchers.sh, never run.

# In the order in which they run.
SLURM="srun srun_pmi2 srun_interrupt srun_abort srun_cancel srun_grace srun_limit salloc mpirun_in_slurm torchrun_in_slurm slurm slurm_warning slurm_short_limit slurm_kill slurm_no_progress slurm_node"

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

# until_over SECONDS [HURRY]: waits for the batch job's end. SLURM leaves a job that comes back two minutes in the queue, which HURRY
# (true unless it is given) cuts short. After the loss of a node SLURM needs them: started earlier, srun found the nodes busy for ever.
until_over() {
    local began=$SECONDS hurry=${2:-true}
    until case "$(state JobState)" in COMPLETED | FAILED | TIMEOUT | CANCELLED | NODE_FAIL) true ;; *) false ;; esac do
        if [ $((SECONDS - began)) -ge "$1" ]; then
            wrong "the job had not ended after $1 s ($(state Reason), nodes $(sinfo -h -N -o '%N %T' | sort -u | paste -sd,))"
            break
        fi
        [ "$(state JobState):$hurry" != PENDING:true ] || scontrol update JobId="$id" StartTime=now 2>/dev/null || true
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

trial_srun_pmi2() {
    begin srun-pmi2 '`srun --mpi=pmi2`, which sets `PMI_RANK` and `PMI_SIZE` too' 'trains as one process'
    mapfile -t arguments < <(task $N_SHORT)
    step --mpi=pmi2 sh -c 'echo "PMI_SIZE is $PMI_SIZE"; exec "$@"' sh "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
    expect "PMI_SIZE is 2" 2
    same_as short $MOST_SHORT
    end
}

trial_srun_interrupt() {
    begin srun-interrupt 'one Ctrl-C at `srun --disable-status`' 'srun hands it on; the ranks finish the update and save'
    mapfile -t arguments < <(task $N_ENDLESS)
    step --disable-status "$bellora" train "${arguments[@]}"
    until_step 30
    kill -INT -- "-$job"
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
    kill -INT -- "-$job"
    sleep 0.3
    kill -INT -- "-$job"
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

trial_srun_grace() {
    begin srun-grace '`scancel JOB`, with processes that ignore SIGTERM' 'SLURM kills them after `KillWait`, 30 s'
    step "${stubborn[@]}" "$run"
    started
    local began=$SECONDS
    scancel "$(squeue -h -o %A | head -n 1)"
    settle
    until [ -z "$(squeue -h)" ] && ! pgrep -f -- "stubborn $run" >/dev/null || [ $((SECONDS - began)) -ge 90 ]; do sleep 0.5; done
    took=$((SECONDS - began))
    between 28 50
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

trial_torchrun_in_slurm() {
    begin torchrun-in-slurm '`srun --ntasks=1 torchrun --nproc-per-node 2 ... bellora train CONFIG`' 'trains as one process'
    find_torchrun
    mapfile -t arguments < <(task $N_SHORT)
    BELLORA_TOKEN=secret launch srun --nodes=1 --ntasks=1 "${python_with_torch[@]}" -m torch.distributed.run --nproc-per-node 2 \
        --master-addr 127.0.0.1 --master-port "$(free_port)" --no-python "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
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
    begin slurm-node 'a slurmd killed with all it had started, and started again once SLURM calls its node down' 'comes back and ends as one process'
    mapfile -t arguments < <(task $N_LONG)
    batch -- "${arguments[@]}"
    until_step 30
    local pid
    pid=$(rank_pid 1)
    kill -KILL "$(cat "$work/slurm/n2.pid")" "$(ps -o ppid= -p "$pid" | tr -d ' ')" "$pid"
    # Not before SLURM has noticed. Where the slurmd is back sooner, srun waits for the lost task as long as --wait says (240 s), and
    # the job comes back after that and SLURM's own two minutes: beyond what this trial waits.
    local began=$SECONDS
    until sinfo -h -N -n n2 -o %T | grep -q down || [ $((SECONDS - began)) -ge 120 ]; do sleep 0.5; done
    sinfo -h -N -n n2 -o %T | grep -q down || wrong "SLURM did not call the node down within 120 s"
    slurmd -N n2 -f "$SLURM_CONF"
    until_over 300 false
    [ "$(state JobState):$(state Restarts)" = COMPLETED:1 ] || wrong "COMPLETED after one return was expected"
    same_as long $MOST_LONG
    end
}
