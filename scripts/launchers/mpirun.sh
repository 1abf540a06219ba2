# shellcheck shell=bash
# Trials of Open MPI's mpirun. Sourced by scripts/launchers.sh, never run.

# In the order in which they run.
MPIRUN="mpirun mpirun_config mpirun_disagree mpirun_stop mpirun_grace mpirun_kill"

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

trial_mpirun_grace() {
    begin mpirun-grace 'SIGTERM to mpirun, with processes that ignore it' 'mpirun kills them within a few seconds'
    mpi "${stubborn[@]}" "$run"
    started
    kill -TERM "$job"
    settle
    between 0 5
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
