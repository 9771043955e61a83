# Names for commands that a person types. Each does its own set-up: e2e/setup.sh gets what the lab runs.
.PHONY: setup build test lint demo bench

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E env "PATH=$$PATH")

setup:
	e2e/setup.sh

build: setup
	cargo build --release --workspace --bins

# Two labs at a time: each is a whole mesh.
test: setup
	cargo test --workspace --lib --bins
	cargo build --workspace --bins
	cargo test -p fenceline-e2e --no-run
	$(SUDO) cargo test -p fenceline-e2e --tests -- --test-threads=2

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test -q -p fenceline-crds files_are_what_the_types_say

demo: build
	$(SUDO) target/release/demo $(DEMO_ARGS)

bench: build
	$(SUDO) target/release/bench $(BENCH_ARGS)
