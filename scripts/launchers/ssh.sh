# shellcheck shell=bash
# Trials of scripts/hosts.sh by an sshd of their own. Sourced by scripts/launchers.sh, never run.

# In the order in which they run.
HOSTS="hosts hosts_interrupt hosts_port hosts_kill hosts_stuck hosts_gone"

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
    # torchrun leaves folders of its own in the other one.
    mkdir -p "$work/tmp/hosts"
    TMPDIR="$work/tmp/hosts" PATH="$work/bin:$PATH" NPROC=1 PORT="$port" launch scripts/hosts.sh "$1" 127.0.0.1 127.0.0.2 -- "${@:2}"
}

nothing_stray() {
    ! grep -nE '(^|: )(Killed|Terminated)( |$)|signal 15' "$log" >/dev/null || wrong "stray words: $(grep -oE 'Killed|Terminated|signal 15' "$log" | head -n 1)"
    [ -z "$(ls -A "$work/tmp/hosts")" ] || wrong "a folder was left in TMPDIR"
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
