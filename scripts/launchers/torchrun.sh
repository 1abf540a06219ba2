# shellcheck shell=bash
# Trials of torchrun. Sourced by scripts/launchers.sh, never run.

# In the order in which they run.
TORCHRUN="torchrun torchrun_nodes torchrun_id torchrun_none torchrun_restart torchrun_stop torchrun_grace"

python_with_torch=("$python")
# Where PYTHON has no torch, the one in .libtorch: without CUDA's libraries, for which an empty one stands in.
find_torchrun() {
    [ ${#python_with_torch[@]} = 1 ] || return 0
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

trial_torchrun_nodes() {
    begin torchrun-nodes 'two of them with one rank each, `--nnodes 2 --node-rank 0` and `1`' 'trains as one process'
    mapfile -t arguments < <(task $N_SHORT)
    local node other
    node=(env BELLORA_TOKEN=secret "${python_with_torch[@]}" -m torch.distributed.run --nnodes 2 --nproc-per-node 1
        --master-addr 127.0.0.1 --master-port "$(free_port)" --no-python)
    "${node[@]}" --node-rank 1 "$bellora" train "${arguments[@]}" </dev/null >>"$log" 2>&1 &
    other=$!
    launch "${node[@]}" --node-rank 0 "$bellora" train "${arguments[@]}"
    settle
    expect_status 0
    wait "$other" || wrong "node 1 failed"
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
    expect 'goes on from step' 1
    saw "$(grep -o 'goes on from step [0-9]*' "$log")"
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

trial_torchrun_grace() {
    begin torchrun-grace 'the same, with processes that ignore it' 'torchrun kills them after 30 s'
    torchrun "${stubborn[@]}" "$run"
    started
    kill -TERM "$job"
    settle
    between 28 40
    end
}
