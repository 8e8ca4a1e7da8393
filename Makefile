# Casemate. `make` alone prints what there is to do.
#
# Everything is local to this folder and to the private state folder of `casemate dev`: no service of the machine is used,
# none is left running after `make stop`.

SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: venv ## a manager, an agent, a private libvirtd and a pod in a VM; installs what is missing
	@.ci/apt-install run guest
	@$(BIN)/casemate dev up $(ARGS)

.PHONY: stop
stop: ## end what `make run` started, and leave nothing behind
	@if [ -x $(BIN)/casemate ]; then $(BIN)/casemate dev down; else echo "nothing runs: there is no .venv" >&2; fi

.PHONY: venv
venv: ## the locked Python environment in .venv
	@.ci/apt-install build
	@.ci/venv

.PHONY: test
test: venv ## every test, with the time of each group
	@.ci/apt-install run guest test
	@.ci/test $(ARGS)

.PHONY: test-fast
test-fast: venv ## pure and simulated tests only
	@$(BIN)/pytest -q -m "not libvirt and not lab and not browser and not etcd"

.PHONY: test-gpu
test-gpu: venv ## the suite of NVML on this machine's own GPU and driver
	@$(BIN)/pytest -q --real-gpu tests/contract/test_nvml.py $(ARGS)

.PHONY: lab
lab: venv ## tests on an emulated server with SR-IOV, an IOMMU and two NUMA nodes; builds it first
	@.ci/lab $(ARGS)

.PHONY: lab-shell
lab-shell: venv ## a shell in such a server, its agent joined to a manager, `casemate` at hand
	@.ci/apt-install lab
	@PYTHONPATH=tests $(BIN)/python -m support.hostlab shell

.PHONY: fuzz
fuzz: venv ## a coverage-guided fuzzer on every parser of foreign bytes, a minute each; ARGS="--seconds 600 --target qcow2"
	@.ci/fuzz $(ARGS)

.PHONY: lint
lint: venv ## ruff, mypy, import contracts, freshness of generated code
	@.ci/lint

.PHONY: format
format: venv ## write the files as ruff wants them
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

.PHONY: proto
proto: venv ## regenerate the modules made from the schema
	@$(BIN)/python proto/generate.py

.PHONY: lock
lock: venv ## resolve pyproject.toml into the lock files again
	@.ci/lock
	@.ci/venv

.PHONY: bench
bench: venv ## list the measurements; bench-NAME runs one
	@for f in tests/bench/*.py; do n=$$(basename "$$f" .py); case $$n in _*|conftest|test_*) ;; *) echo "  make bench-$$n" ;; esac; done

bench-%: venv
	@test -f tests/bench/$*.py || { echo "there is no tests/bench/$*.py; see 'make bench'" >&2; exit 2; }
	@$(BIN)/python tests/bench/$*.py $(ARGS)

.PHONY: clean
clean: stop ## end everything; remove built files and caches, the environment included
	@rm -rf .venv .coverage htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
