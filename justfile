# Short names for the scripts; each also runs by itself.

default:
    @just --list

# Fetches libtorch into .libtorch/, once
setup:
    scripts/setup.sh

# From a fresh checkout to a trained, tried adapter
quickstart *arguments:
    scripts/quickstart.sh {{arguments}}

build: setup
    cargo build --release

# All tests, or those whose name is given
test *arguments:
    scripts/test.sh {{arguments}}

# What a change must pass
check:
    .ci/run

format:
    cargo fmt
