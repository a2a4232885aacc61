# Every target sets up what it needs by itself (tools/setup, once); nothing has to be installed by hand.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help bin serve demo test unit check format long mutants clean

BIN = $(shell tools/setup)
ARGS ?=

help:
	@echo "make serve [ARGS='--engines 2 …']  start a fleet of vLLM engines behind one OpenAI endpoint"
	@echo "make demo    show prefix reuse, pause, and an engine's death on a running fleet, and check the tokens"
	@echo "make test    all tests, with real vLLM engines"
	@echo "make unit    those that need no engine and no fleet"
	@echo "make check   format, lint, types, architecture rules, what the documentation names"
	@echo "make long    what takes too long for CI: every interleaving, thousands of simulated lives (hours)"
	@echo "make -s bin  print the folder with python, interlock, pytest of this checkout"

bin:
	@tools/setup

serve:
	@bin="$$(tools/setup)" && exec "$$bin/interlock" serve $(ARGS)

demo:
	@bin="$$(tools/setup)" && exec "$$bin/interlock" demo $(ARGS)

unit:
	@bin="$$(tools/setup)" && exec "$$bin/pytest" -m "not vllm and not fleet and not explorer and not simulator" $(ARGS)

test:
	@bin="$$(tools/setup)" && exec "$$bin/pytest" $(ARGS)

check:
	@bin="$$(tools/setup)" && "$$bin/ruff" format --check . && "$$bin/ruff" check . && "$$bin/mypy" && \
		"$$bin/pytest" tests/test_architecture.py tests/test_documents.py tests/test_public_names.py

format:
	@bin="$$(tools/setup)" && "$$bin/ruff" format . && "$$bin/ruff" check --fix .

long: # what takes too long for CI; results with revision and date belong into docs/verification.md
	@bin="$$(tools/setup)" && "$$bin/interlock" explore --budget full --seconds 3600 && "$$bin/interlock" explore --museum && \
		"$$bin/interlock" simulate --seeds 1000 && \
		"$$bin/python" -m interlock.testing.sim.disk_lives --crashes 100000 --processes 2 && \
		"$$bin/python" -m interlock.testing.transfer_storms && \
		"$$bin/python" -m interlock.testing.sim.snapshot_world 0 10000

mutants: # does anybody notice when a condition in core/ is changed?
	@tools/mutants $(ARGS)

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
