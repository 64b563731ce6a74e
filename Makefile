# One command is the truth, for people, pre-commit and CI alike. `make help` lists them.
#
# Everything is installed into .venv; nothing else on the machine is touched, and no environment needs to be
# active. PYTHON chooses another interpreter (3.11 or later): make setup PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
# Touched when the environment matches the two files it is made from: a second `make setup` does nothing.
READY := .venv/.ready
# Likewise, for what `make test-services` adds.
SERVICES := .venv/.services
# What `make storm` runs, an expression for pytest's -k, and how many minutes `make soak` takes.
ONLY ?= test
MINUTES ?= 60

# Two processes, each of which takes the next file in the order of the folders: the slow ones come first, and
# the many small ones at the end keep both busy.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo local test test-services storm soak secrets images-lock images sbom lint format clean

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with all that the other commands need

# The constraints pin every version. Without them pip would take the newest torch with all of CUDA.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "smallcat needs Python 3.11 or later, and '$(PYTHON)' is not: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		--editable ".[worker,local,dev]"
	@touch $@

demo: setup  ## Render "a small cat" on a stack of its own, and show it
	@$(BIN)/python -m deploy.local --hold -- \
		$(BIN)/python -m producer submit "a small cat" --show --output outputs/

local: setup  ## Run a queue, a bucket and one worker until Ctrl-C, to try things out
	@$(BIN)/python -m deploy.local --data .smallcat

test: lint  ## Run all checks: style, types, tests
	$(BIN)/python -m pytest $(PARALLEL)

test-services: $(SERVICES)  ## Run tests on more S3 and Redis servers, and with Sentinel
	$(BIN)/python -m pytest -m services $(PARALLEL)

# s3rver is a program for node, and is left out where there is no npm.
$(SERVICES): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		--editable ".[worker,local,dev,services]"
	@if command -v npm >/dev/null; then npm install --no-audit --no-fund --prefix .venv/node s3rver@3.7.1; \
		else echo "There is no npm: s3rver is left out." >&2; fi
	@touch $@

storm: setup  ## Kill, freeze, upgrade and fill up all parts under load, 30 minutes; ONLY=sigkill for some of it
	$(BIN)/python -m pytest tests/faults -m slow -k "not soak and ($(ONLY))" -rP

soak: setup  ## Work for an hour and check that nothing grows; MINUTES=10 for less
	SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/faults -m slow -k soak -rP

# Without `setup`: Docker needs no environment here.
secrets:  ## Make the passwords of deploy/compose.yaml, in deploy/.env
	@$(PYTHON) -m deploy.new_secrets

# Where registries can be reached: no digest is made up.
images-lock:  ## Write the digests of the images that containers are made from, into deploy/images.lock
	@$(PYTHON) -m deploy.images lock

images: setup  ## Build the images of a release, by digest alone
	@$(BIN)/python -m deploy.images build

sbom: $(SERVICES)  ## Write what is installed in .venv as CycloneDX, into dist/smallcat.cdx.json
	@mkdir -p dist
	$(BIN)/cyclonedx-py environment --output-format JSON --output-file dist/smallcat.cdx.json $(BIN)/python

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove what these commands made, except the pictures in outputs/
	rm -rf .venv .smallcat build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
