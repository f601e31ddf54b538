# Every target brings .venv up to date first; `make` alone lists them.
BIN := .venv/bin
STAMP := .venv/.setup-$(shell cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)
CHECKS := check-format check-style check-types check-imports check-spelling check-docs
# Not --quiet: that hides warnings, and --strict counts only those that are shown.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-arm places sanitize check lint format docs clean $(CHECKS)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /|/' | awk -F'|' '{ printf "make %-8s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv with everything for development

$(STAMP):
	@scripts/setup.sh
	@rm -f .venv/.setup-* && touch $@

places: ## set up a clone with a space in its path, and one behind a link, and run some tests there
	scripts/places.sh

sanitize: setup ## run the kernels under the sanitizers of addresses and undefined behaviour
	scripts/sanitize.sh $(ARGS)

test-gpu: setup ## run all tests of the backend for GPUs, on an emulated one
	INFC_TEST_GPU=all $(PYTEST) --all tests/codegen/triton tests/emulation tests/runtime/gpu tests/benchmarks/test_gpu.py $(ARGS)

test-arm: setup ## run the tests of the kernels for aarch64, under qemu
	INFC_TEST_ARM=1 $(PYTEST) tests/codegen/kernels $(ARGS)

demo: setup ## compile the bundled model and let it write
	$(BIN)/infc compile recipes/tiny/model.yaml -o build/tiny
	$(BIN)/infc generate build/tiny "def fibonacci(n):" --temperature 0.6 --seed 1 --max-tokens 120

test: setup ## run the tests; ARGS="-k name" narrows them
	$(PYTEST) $(ARGS)

check: lint test ## lint, then test

lint: $(CHECKS) ## all checks but the tests

format: setup ## rewrite the code the way `make lint` wants it
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: setup ## build the documentation into site/
	$(MKDOCS)

clean: ## remove what was built; .venv stays
	rm -rf build dist site src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

check-format: setup
	$(BIN)/ruff format --check

check-style: setup
	$(BIN)/ruff check

check-types: setup
	$(BIN)/mypy

check-imports: setup
	$(BIN)/lint-imports

check-spelling: setup
	$(BIN)/codespell

check-docs: setup # pages, links between them, and the places on a page that links name
	$(MKDOCS) --site-dir build/site
