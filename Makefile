# rekindle: build, test, try. `make` alone lists what there is.

CARGO ?= cargo
# An error is a sentence; where RUST_BACKTRACE is set, a backtrace of each would bury it.
export RUST_LIB_BACKTRACE ?= 0
BUILD_PACKAGES := gcc libc6-dev protobuf-compiler
NODE_PACKAGES := debootstrap debian-archive-keyring qemu-system-x86 cpio e2fsprogs busybox-static util-linux iproute2 \
                 mawk python3-pip docker-registry skopeo apache2-utils

# What docs/PARITY.md was taken from.
CONTAINERD := github.com/containerd/containerd/v2@v2.1.9

# Programs are run from here: cargo run --package would choose other features of the dependencies, and build them anew.
BUILT := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)

.DEFAULT_GOAL := help
.PHONY: help deps deps-build build node test test-unit test-suites test-machine test-dist test-kube fuzz soak parity lint demo bench dist dist-shim clean-cache

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  NODE_SUITE=trixie          a node with containerd 1.7 in place of 2.1"
	@echo "  REKINDLE_RUNTIMES=go       the lifecycle and CRI suites on containerd's own shim only (or: rekindle)"
	@echo "  FUZZ_SECONDS=60            how long make fuzz takes for each parser"
	@echo "  REKINDLE_CACHE=DIR         where Debian roots and images are kept (/var/cache/rekindle-test)"

# Installs those of the packages in $(1) that are missing.
define install
	@missing=; for p in $(1); do \
	  dpkg-query -W -f '$${db:Status-Status}' $$p 2>/dev/null | grep -qx installed || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then echo "missing packages:$$missing; run: sudo apt-get install$$missing" >&2; exit 1; fi; \
	echo "installing$$missing"; export DEBIAN_FRONTEND=noninteractive; \
	apt-get -qq update && apt-get -qq install --no-install-recommends -y $$missing >/dev/null
endef

deps: ## install the Debian packages that are missing (as root; names them otherwise)
	$(call install,$(BUILD_PACKAGES) $(NODE_PACKAGES))

# What a build needs and no more. Another distribution has its own names for it.
deps-build:
	$(if $(shell command -v dpkg-query),$(call install,$(BUILD_PACKAGES)))

# Everything that is tested is built with one selection of packages, so that no dependency is compiled twice.
build: ## build the shim, the CLI and what the tests need
	$(CARGO) build --workspace --bins

node: deps build ## an interactive shell in a throwaway node with our shim registered
	@"$(BUILT)/debug/rekindle-node"

test: deps build ## unit tests, and the suites on real nodes: containerd 2.1 and 1.7, cgroup v2 and systemd (as root)
	$(CARGO) test --workspace --no-fail-fast
	NODE_SUITE=trixie $(CARGO) test --workspace --no-fail-fast --test lifecycle --test cri
	NODE_SUITE=trixie $(CARGO) test --workspace --no-fail-fast --test images -- $(OF_VERSIONS)
	$(IN_MACHINE) -- $(OF_CGROUPS)

# What containerd, runc and CRIU may do otherwise in another version. Stores, disks and our own programs are the same on
# both; `NODE_SUITE=trixie make test-suites` has all of it.
OF_VERSIONS := tasks:: pods:: heap:: refused:: warming:: archives:: imaging::

# The emulated machine is slow: with both suites whole it takes half an hour.
IN_MACHINE := REKINDLE_NODE=machine REKINDLE_RUNTIMES=rekindle $(CARGO) test --workspace --no-fail-fast --test lifecycle --test cri
OF_CGROUPS := process:: metrics:: oom:: pause:: recovery:: checkpoint:: options::

test-machine: deps build ## the lifecycle and the CRI suite under systemd and cgroup v2, whole (as root; half an hour)
	$(IN_MACHINE)

test-unit: ## unit tests only: no root, no node
	$(CARGO) test --workspace --exclude rekindle-tests

test-suites: build ## the suites that need a real containerd (as root)
	$(CARGO) test --workspace --no-fail-fast --test lifecycle --test cri --test images --test data --test agent --test registry --test apiserver --test node --test torch --test vm

test-dist: deps build dist-shim ## the lifecycle suite on the shim that make dist makes (as root)
	REKINDLE_BIN_DIR="$(CURDIR)/dist" REKINDLE_RUNTIMES=rekindle $(CARGO) test --workspace --no-fail-fast --test lifecycle

# Which is not among what CI runs: to build an apiserver takes longer than all of its tests.
KUBE := $${REKINDLE_CACHE:-/var/cache/rekindle-test}/kube
KUBE_VERSION := $(shell sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\)$$/\1/p' tests/kube/go.mod)

test-kube: build ## the apiserver suite on a real kube-apiserver and etcd, built from their Go modules (minutes; no root)
	tests/kube/build.sh "$(KUBE)"
	REKINDLE_KUBE="$(KUBE)/$(KUBE_VERSION)" $(CARGO) test --workspace --test apiserver

# What it finds on its way stays below the fuzzer's own target/: the corpus is what make test-unit tries, and small.
FUZZ_SECONDS ?= 60
FUZZ := $(CARGO) +nightly fuzz

fuzz: ## hostile bytes for each parser of checkpoint images (a nightly toolchain and cargo-fuzz; no root)
	@if ! $(CARGO) +nightly --version >/dev/null 2>&1; then \
	  echo "there is no nightly toolchain, which fuzzing needs; get it: rustup toolchain install nightly" >&2; exit 1; fi
	@if ! $(FUZZ) --version >/dev/null 2>&1; then \
	  echo "cargo fuzz is not installed; get it: cargo install --locked cargo-fuzz" >&2; exit 1; fi
	@cd hooks/checkpoint && targets=$$($(FUZZ) list) && for target in $$targets; do \
	  mkdir -p fuzz/target/found/$$target && $(FUZZ) run $$target fuzz/target/found/$$target fuzz/corpus/$$target -- \
	    -max_len=$$(test $$target = foreign && echo 98304 || echo 4096) -timeout=20 -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; done

soak: deps build ## 500 containers and 1,000 execs, beside which shims and containerd are killed (as root)
	REKINDLE_SOAK=1 $(CARGO) test --workspace --test soak -- --nocapture

parity: ## docs/PARITY.md has a test or a reason in each row, and a row for each return of containerd's own shim
	@source="$${CONTAINERD_SOURCE:-$$(go mod download -json $(CONTAINERD) 2>/dev/null | sed -n 's/^\t"Dir": "\(.*\)",*$$/\1/p')}"; \
	if [ -z "$$source" ]; then skip="--skip every_return"; \
	  echo "that no row is missing was not checked: there is no Go to fetch $(CONTAINERD), and CONTAINERD_SOURCE names no folder with it"; fi; \
	CONTAINERD_SOURCE="$$source" $(CARGO) test --workspace --test docs -- --include-ignored $$skip parity

lint: ## format, clippy without a warning, licences and sources
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@if $(CARGO) tree --package rekindle-shim --edges normal --prefix none | grep -E '^(aws-|hyper|reqwest|rustls|tonic)'; then \
	  echo "the shim links a network client (above); what needs a network belongs into the CLI" >&2; exit 1; fi
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --workspace check; \
	else echo "cargo deny is not installed, licences and sources were not checked; get it: cargo install --locked cargo-deny"; fi

demo: deps build ## a PyTorch server, cold and warm, end to end (as root)
	@"$(BUILT)/debug/demo"

bench: deps build dist ## the figures of docs/BENCHMARKS.md (as root); ARGS="shim --pairs 20 --json"
	@REKINDLE_BIN_DIR="$(CURDIR)/dist" "$(BUILT)/debug/bench" $(ARGS)

dist: deps-build dist-shim ## what a node gets: optimised programs in dist/
	$(CARGO) build --profile dist --package rekindle
	install -D -t dist "$(BUILT)/dist/rekindle"
	install -m 0644 -t dist runtimeclass/systemd/rekindle-agent.service
	cd dist && sha256sum containerd-shim-rekindle-v1 rekindle > SHA256SUMS

# The shim is built by itself: together with the CLI it would get the CLI's features, and with them a network client.
# Linked statically, it is started in half the time and takes a third less memory: there is one for each pod.
dist-shim: deps-build
	$(CARGO) rustc --profile shim --package rekindle-shim --bin containerd-shim-rekindle-v1 -- -C target-feature=+crt-static
	install -D -t dist "$(BUILT)/shim/containerd-shim-rekindle-v1"

clean-cache: ## forget the cached Debian roots and images
	rm -rf "$${REKINDLE_CACHE:-/var/cache/rekindle-test}"
