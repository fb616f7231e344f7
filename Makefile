# One line a target; `make help` prints them.
.PHONY: help run test lint build bench wheels docs clean
PYTHON ?= .venv/bin/python

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

run: ## set up, fetch the default model, answer a prompt: make run PROMPT="..."
	@sh scripts/run "$(PROMPT)"

test: ## set up and pass all tests
	@sh scripts/test

lint: ## ruff, mypy, clang-format
	@sh scripts/lint

build: ## the native library, into the source tree
	@sh scripts/build

bench: ## prompt and decode speed of the default model
	.venv/bin/edge-run bench

wheels: ## wheels for every platform, in dist/
	@sh scripts/wheels

docs: ## the options in docs/cli.md, from the program
	PYTHONPATH=. $(PYTHON) tests/test_docs.py

clean: ## remove what was built, keep .venv
	rm -rf build dist edge/_cffi.py edge/_declarations.py edge/libedge.*
