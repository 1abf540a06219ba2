#!/usr/bin/env bash
# A training job on several hosts without a scheduler: starts bellora on each by ssh and sees to it that they end together.
#
#   [NPROC=auto] [PORT=29400] [BELLORA=PROGRAM] scripts/hosts.sh CONFIG HOST... [-- ARGUMENT OF BELLORA TRAIN ...]
#
# HOST is what ssh takes, logged in to by key. The first is machine 0, where the ranks meet and rank 0 writes the run; its name
# (or address) must lead to it from all the others, and on itself not to a loopback address. NPROC is the number of
# processes on each host (auto: one a GPU; CPUs want a number). The checkout, the base and the samples lie under the same names
# everywhere; the program is BELLORA, or the one in target/release.
#
# What a host says stands behind its name, but for the lines of its ranks, which have numbers of their own.
#
# Ctrl-C and SIGTERM are handed on: the ranks finish the update, rank 0 saves, all end. When one host fails, the others are
# stopped: SIGTERM, and SIGKILL to their supervisors after 30 s, with which their ranks end. A host that loses this
# script (a cut link, a kill -9) stops by itself. Exit code: 0, that of the host that failed first, 130 or 143.
#
# The ranks' own connections are neither encrypted nor authenticated: trusted networks only (docs/ranks.md).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

USAGE="scripts/hosts.sh CONFIG HOST... [-- ARGUMENT OF BELLORA TRAIN ...]"
GRACE=30 # seconds

case "${1:-}" in
"" | -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/hosts.sh
    exit 0
    ;;
esac
config=$1
shift
hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in -*) die "$1 is no host" "$USAGE" ;; esac
    hosts+=("$1")
    shift
done
[ "${1:-}" != -- ] || shift
[ ${#hosts[@]} -gt 0 ] || die "no host is named" "$USAGE"
bellora=${BELLORA:-$root/target/release/bellora}
rendezvous=${hosts[0]#*@}:${PORT:-29400}

# What a host is to do. Its standard input is how this script speaks to it: the job's token, which no command line must show, and
# then the names of signals. The end of it means that this script is gone.
REMOTE='
cd "$1" && IFS= read -r BELLORA_TOKEN && export BELLORA_TOKEN || exit 1
shift
exec 3<&0
"$@" </dev/null 3<&- &
job=$!
{ while read -r name; do kill -s "$name" "$job"; done; kill -s TERM "$job"; } <&3 >/dev/null 2>&1 &
listener=$!
exec 3<&-
# A shell says of a job that was killed that it was; the supervisor or this script has said so, and why.
{ wait "$job"; status=$?; kill "$listener"; wait "$listener"; } 2>/dev/null
exit "$status"'

# quoted WORD...: the words as one that any shell takes apart again.
quoted() {
    local word
    for word in "$@"; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}

work=$(mktemp -d) || die "there is no room for temporary files" "set TMPDIR"
ends=() # what is written here reaches a host
finish() {
    local nth
    trap - EXIT
    # Closed, they stop whatever still runs.
    for nth in "${!ends[@]}"; do exec {ends[nth]}>&-; done
    rm -rf "$work"
}
trap finish EXIT

token=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

start() {
    local nth=$1 end other out names status
    local command=("$bellora" train "$config" --nproc "${NPROC:-auto}" --nnodes ${#hosts[@]} --node-rank "$nth")
    command+=(--rendezvous "$rendezvous" "${@:2}")
    mkfifo "$work/$nth"
    # For reading too, so that opening it does not wait.
    exec {end}<>"$work/$nth"
    ends[nth]=$end
    (
        exec <"$work/$nth"
        # Held by another host's ssh, these would not end with this script.
        for other in "${ends[@]}"; do exec {other}>&-; done
        # In sessions of their own: a Ctrl-C at the terminal is this script's, which hands it on once.
        exec {out}> >(exec setsid sed -u "/^\[rank /!s|^|${hosts[nth]}: |" >&2)
        names=$!
        setsid ssh -T -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "${hosts[nth]}" \
            "sh -c $(quoted "$REMOTE" sh "$root" "${command[@]}")" <&0 >&"$out" 2>&1 {out}>&- &
        echo $! >"$work/$nth.pid"
        status=0
        { wait $! || status=$?; } 2>/dev/null
        # The last words come before the verdict on them.
        exec {out}>&-
        wait "$names" || true
        if kill -0 $$ 2>/dev/null; then
            echo "$status" >"$work/$nth.part" && mv "$work/$nth.part" "$work/$nth.status"
        else
            rm -rf "$work" # this script was killed
        fi
    ) &
    printf '%s\n' "$token" >&"$end"
}

# tell NAME: sends a signal to every host that has not ended.
tell() {
    local nth
    for nth in "${!hosts[@]}"; do
        [ -e "$work/$nth.status" ] || printf '%s\n' "$1" >&"${ends[nth]}"
    done
}

asked=""
hand_on() {
    say "handing $1 on to ${#hosts[@]} hosts"
    asked=$1
    tell "$1"
}
trap 'hand_on INT' INT
trap 'hand_on TERM' TERM

for nth in "${!hosts[@]}"; do start "$nth" "$@"; done

verdict=0 stopping="" n_left=${#hosts[@]}
while [ "$n_left" -gt 0 ]; do
    n_left=0
    for nth in "${!hosts[@]}"; do
        [ -e "$work/$nth.status" ] || { n_left=$((n_left + 1)) && continue; }
        status=$(cat "$work/$nth.status")
        [ "$status" != 0 ] && [ -z "$stopping" ] || continue
        # Asked to stop, hosts end one after another, machine 0 last: it saves.
        case "$asked:$status" in INT:130 | TERM:143) verdict=$status && continue ;; esac
        verdict=$status stopping=$SECONDS
        say "error: ${hosts[nth]} ended with exit code $status; the others are stopped"
        tell TERM
    done
    if [ -n "$stopping" ] && [ $((SECONDS - stopping)) -ge $GRACE ]; then
        tell KILL
        # Where not even that is answered, the link is gone.
        if [ $((SECONDS - stopping)) -ge $((GRACE + 5)) ]; then
            for nth in "${!hosts[@]}"; do
                [ -e "$work/$nth.status" ] || kill "$(cat "$work/$nth.pid")" 2>/dev/null || true
            done
        fi
    fi
    sleep 0.2 || true # a Ctrl-C ends it early
done
exit "$verdict"
