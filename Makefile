# One command is the truth, for people, pre-commit and CI alike. `make help` lists them.
#
# Everything is installed into .venv; nothing else on the machine is touched, and no environment needs to be
# active. PYTHON chooses another interpreter (3.11 or later): make setup PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
# Touched when the environment matches the two files it was made from: a second `make setup` costs nothing.
READY := .venv/.ready
# What `make storm` runs, as pytest's -k has it, and how long `make soak` goes on.
ONLY ?= test
MINUTES ?= 60

.DEFAULT_GOAL := help
.PHONY: help setup demo local test storm soak lint format clean

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with everything that the other commands need

# The constraints pin every version. Without them pip would take the newest torch with all of CUDA.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "smallcat needs Python 3.11 or later, and '$(PYTHON)' is not: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		--editable ".[worker,local,dev]"
	@touch $@

demo: setup  ## Render "a small cat" on a stack of its own and show it
	@$(BIN)/python -m deploy.local --hold -- \
		$(BIN)/python -m producer submit "a small cat" --show --output outputs/

local: setup  ## Run queue, bucket and one worker until Ctrl-C, for playing with
	@$(BIN)/python -m deploy.local --data .smallcat

test: lint  ## Run every check: lint, types, tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

storm: setup  ## Kill, freeze and fill everything under load, some 25 minutes; ONLY=sigkill for some of it
	$(BIN)/python -m pytest tests/faults -m slow -k "not soak and ($(ONLY))" -rP

soak: setup  ## Work for an hour and see that nothing grows; MINUTES=10 for less
	SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/faults -m slow -k soak -rP

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## Put the code into its one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove what the commands made, except pictures in outputs/
	rm -rf .venv .smallcat build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
