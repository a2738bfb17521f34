# make demo    erase a concept from the pocket model in minutes, offline, on a CPU   (CONCEPT="neon style" for another)
# make test    lint and tests
# make slow   the tests that take minutes each
# make kill    kill a tiny run twenty times, anywhere, and compare what the resumed ones find, minutes
# make pocket  fetch the artwork (npm) and train the pocket model again, hours on a CPU
# make retrain the same on data without the held-out concepts: what a model does that never saw them
# make docs    the documentation as pages, in site/
# make clean   remove the environment and the caches, never the results in runs/

PYTHON ?= python3
VENV ?= .venv
CONCEPT ?= watermelon
ARTWORK ?= artwork
OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
export OMP_NUM_THREADS

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# All that `accelerate launch` would otherwise warn about when it finds no configuration file.
LAUNCH := $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
EMPTY :=
RUN = runs/$(subst $(EMPTY) $(EMPTY),-,$(CONCEPT))-scissorhands

.DELETE_ON_ERROR:
.PHONY: demo docs test slow kill lint pocket retrain clean

demo: $(VENV)/installed
	$(LAUNCH) erase_sd/train.py --concept "$(CONCEPT)" --model pocket
	@echo "Before and after: $(RUN)/before_after.png"

# One thread for each worker: two that share two cores by twos run ten times slower than one after the other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

slow: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m slow

kill: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/end_to_end/test_kills.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

pocket: $(VENV)/installed-train $(ARTWORK)
	$(BIN)/python -m erase_sd.pocket.training --artwork $(ARTWORK)

retrain: $(VENV)/installed-train $(ARTWORK)
	$(BIN)/python -m erase_sd.pocket.training --artwork $(ARTWORK) --part retrain

$(ARTWORK):
	mkdir -p $@
	cd $@ && npm pack --silent @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9 \
		@iconify-json/twemoji@1.2.5 @iconify-json/fxemoji@1.2.2

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

# The stamps keep the environment from being built twice; it is brought up to date when what it is made of changes.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes, once."
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(INSTALL) -e ".[$*]"
	@touch $@
