# shellcheck shell=bash
# Shared by the scripts of this folder; sourced, never run.
# Sets `root` (the checkout) and moves there, so that every script works from any folder.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
# rustup puts cargo here; a shell that no login started may not have it on PATH.
command -v cargo >/dev/null || [ ! -x "${HOME:-}/.cargo/bin/cargo" ] || PATH="$HOME/.cargo/bin:$PATH"

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $1"
    [ $# -lt 2 ] || say "hint: $2"
    exit 1
}

# One at a time: waits until no other call of the running script holds the lock (on the script's own file).
only_one() {
    command -v flock >/dev/null || return 0
    local script
    script=$(basename "$0")
    exec 9<"$root/scripts/$script"
    flock -n 9 || { say "waiting for another run of $script ..."; flock 9; }
}

# pip_target FOLDER PIP-ARGUMENT...: installs into a folder of the project and nowhere else. Settings of the user's that
# would send the packages elsewhere are overruled; mirrors and proxies that pip is configured for are kept.
pip_target() {
    local folder=$1
    shift
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
        python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$folder" "$@"
}

require_python_with_pip() {
    command -v python3 >/dev/null || die "python3 was not found" "install Python 3 (Debian, Ubuntu: apt install python3 python3-pip)"
    python3 -m pip --version >/dev/null 2>&1 ||
        die "python3 has no pip" "install it (Debian, Ubuntu: apt install python3-pip), or run: python3 -m ensurepip --user"
}

# private_packages NAME REQUIREMENT...: makes .venv/NAME hold just these packages, whole or absent, and prints the
# folder, which serves as PYTHONPATH. Nothing outside the checkout changes.
private_packages() {
    local folder="$root/.venv/$1"
    shift
    require_python_with_pip
    # Compiled packages fit one Python version only, so the version is part of what was asked for.
    local wanted
    wanted="$(python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])') $*"
    if [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$wanted" ]; then
        say "fetching Python packages into ${folder#"$root"/}: $*"
        rm -rf "$folder" "$folder.partial"
        mkdir -p "$folder.partial"
        pip_target "$folder.partial" "$@" ||
            die "pip could not install: $*" "see pip's message above; once the package index can be reached, run the same command again"
        printf '%s\n' "$wanted" >"$folder.partial/.stamp"
        mv "$folder.partial" "$folder"
    fi
    printf '%s\n' "$folder"
}
