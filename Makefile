# Targets take overrides: make distill ARGS="loss.alpha=0.9 seed=1"
ARGS ?=
# Where make ui and make server listen. Not ?=, because conda and some shells export HOST.
HOST := 127.0.0.1
PORT ?= 5000
# Comma-separated names under which MLflow answers, in addition to this machine's own.
ALLOWED_HOSTS :=
# The PostgreSQL of make server; if unset, it starts one under outputs/.
DATABASE ?=
POSTGRES := $(or $(patsubst %/,%,$(dir $(shell command -v initdb))),$(lastword $(sort $(wildcard /usr/lib/postgresql/*/bin))))
# Creates .venv: Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m kdpipe
COMPARE := $(BIN)/python -m kdpipe.compare
# As in the runs: ARGS wins over MLFLOW_TRACKING_URI, which wins over the local file.
given = $(patsubst $(1)=%,%,$(filter $(1)=%,$(ARGS)))
OUTPUTS = $(or $(call given,output_dir),outputs)
store_uri = import sys; from pathlib import Path; from kdpipe.runs.store_address import store_uri; \
	print(store_uri(sys.argv[1], Path(sys.argv[2])))
STORE = $(shell $(BIN)/python -c '$(store_uri)' "$(call given,tracking.uri)" "$(OUTPUTS)")
# MLflow's default list lacks this machine's names, and its patterns such as 10.* also match 10.evil.example.
own_names = $(shell $(BIN)/python -c 'import socket; print(socket.gethostname().lower(), socket.getfqdn().lower())')
comma := ,
names = localhost 127.0.0.1 $(HOST) $(own_names) $(subst $(comma), ,$(ALLOWED_HOSTS))
LISTEN = --host "$(or $(HOST),127.0.0.1)" --port "$(PORT)" \
	--allowed-hosts "[::1],[[]::1]:*$(foreach name,$(names),$(comma)$(name)$(comma)$(name):*)"
# MLflow's job queue is for language models, and takes six processes.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION ?= false
# It would turn off the host check, whatever the command line says.
unexport MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE
# make prints its commands, but not with an address that may have a password.
ifneq (,$(findstring ://,$(ARGS)$(MLFLOW_TRACKING_URI)))
.SILENT:
endif
DEMO := dataset=digits tracking.experiment=demo train.epochs=15

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults teacher student distill sweep compare cost views export predict reproduce sync ui server dashboard \
	bench bench-methods bench-photos results docs docs-serve cache-info cache-clean lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  overrides go in ARGS: make distill ARGS="loss.alpha=0.9 seed=1"'

setup: $(VENV)/ready  ## create .venv with all dependencies (with uv if installed, else with pip)

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old, kdpipe needs 3.11 or newer: make setup PYTHON=python3.12"; exit 1; }
	@# An existing environment keeps what its owner has added; make clean removes it, for another PYTHON.
	@if command -v uv >/dev/null; then \
		{ $(BIN)/python -c '' 2>/dev/null || uv venv --quiet --allow-existing --python $(PYTHON) $(VENV); } && \
			uv pip install --compile-bytecode --python $(BIN)/python -e '.[dev]'; \
	else \
		{ $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV); } && \
			$(BIN)/python -m pip install -e '.[dev]'; \
	fi
	@touch $@

demo: setup  ## teacher, student alone, distilled student and their comparison, on built-in images (minutes)
	$(RUN) experiment=teacher model=resnet20 $(DEMO) $(ARGS)
	$(RUN) experiment=student $(DEMO) $(ARGS)
	$(RUN) experiment=distill model@teacher=resnet20 $(DEMO) $(ARGS)
	$(COMPARE) --experiment $(or $(call given,tracking.experiment),demo) --uri "$(STORE)"

test: setup  ## run the tests, one process per core (ARGS=--cov reports coverage)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

test-faults: setup  ## run the long tests, of faults and of several processes
	$(BIN)/python -m pytest -m faults -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

teacher: setup  ## train a teacher: DenseNet-121 on CIFAR-10
	$(RUN) experiment=teacher $(ARGS)

student: setup  ## train the student alone
	$(RUN) experiment=student $(ARGS)

distill: setup  ## train the student with the newest teacher
	$(RUN) experiment=distill $(ARGS)

sweep: setup  ## alpha × temperature × seed, the best cell, and whether it helped
	$(RUN) -m experiment=sweep $(ARGS)

compare: setup  ## compare finished runs (ARGS="--experiment demo")
	$(COMPARE) $(ARGS)

cost: setup  ## measure the cost of a finished run's network and its teacher (ARGS="RUN --seconds 30")
	$(BIN)/python -m kdpipe.cost $(ARGS)

export: setup  ## export a finished run to ONNX and int8, checked (ARGS="RUN --out student")
	$(BIN)/python -m kdpipe.export $(ARGS)

views: setup  ## a picture of what training sees of its first images (ARGS="dataset=cifar10 augmentation=trivial_augment")
	$(BIN)/python -m kdpipe.views $(ARGS)

predict: setup  ## classify photos (ARGS="student photo.jpg other.png")
	$(BIN)/python -m kdpipe.predict $(ARGS)

reproduce: setup  ## the tutorial's three experiments: CIFAR-10, DenseNet-121 (hours without a GPU)
	$(RUN) experiment=tutorial_teacher tracking.experiment=tutorial $(ARGS)
	$(RUN) experiment=tutorial_student tracking.experiment=tutorial $(ARGS)
	$(RUN) experiment=tutorial_distill tracking.experiment=tutorial $(ARGS)
	$(COMPARE) --experiment $(or $(call given,tracking.experiment),tutorial) --uri "$(STORE)"

sync: setup  ## deliver to MLflow what it missed while it was unreachable
	$(BIN)/python -m kdpipe.sync --output-dir "$(OUTPUTS)"

ui: setup  ## show the runs in MLflow: http://127.0.0.1:5000 (make ui PORT=5001)
	@# Of a folder that was moved; it fails where there are no runs yet.
	@$(BIN)/python -m kdpipe.sync --output-dir "$(OUTPUTS)" 2>/dev/null || true
	$(BIN)/mlflow ui --backend-store-uri "$(STORE)" $(LISTEN)

dashboard: setup  ## Optuna's pages on the trials of searches, on this machine alone: http://127.0.0.1:8080
	$(BIN)/optuna-dashboard "$(or $(call given,search.storage),sqlite:///$(abspath $(OUTPUTS))/search.db)" --host 127.0.0.1

server: setup  ## an MLflow server over PostgreSQL, for many machines (HOST=0.0.0.0 ALLOWED_HOSTS=… DATABASE=…)
	@mkdir -p $(OUTPUTS)
	@database="$(DATABASE)"; data="$(abspath $(OUTPUTS))/postgres"; \
	if [ -z "$$database" ] && [ -n "$(POSTGRES)" ] && [ "$$(id -u)" != 0 ]; then \
		[ -d "$$data" ] || "$(POSTGRES)/initdb" --auth=trust --username=mlflow --pgdata="$$data" >/dev/null || exit 1; \
		"$(POSTGRES)/pg_ctl" --pgdata="$$data" --log="$$data/log" --wait start \
			--options="-p 5433 -c listen_addresses= -c unix_socket_directories=$$data" || exit 1; \
		trap '"$(POSTGRES)/pg_ctl" --pgdata="'$$data'" stop >/dev/null' EXIT INT TERM; \
		database="postgresql+psycopg://mlflow@/postgres?host=$$data&port=5433"; \
	elif [ -z "$$database" ]; then \
		echo "make server: no PostgreSQL here that this user could start, so sqlite; DATABASE=postgresql://… names one"; \
		database="sqlite:///$(abspath $(OUTPUTS))/mlflow.db"; \
	fi; \
	echo "runs go there with tracking.uri=http://$(if $(filter 0.0.0.0 ::,$(HOST)),$(firstword $(own_names)),$(HOST)):$(PORT)"; \
	$(BIN)/mlflow server --backend-store-uri "$$database" --artifacts-destination "$(abspath $(OUTPUTS))/mlartifacts" \
		$(LISTEN)

bench: setup  ## speed compared with the tutorial's loop and the compute limit (ARGS="--root cifar10-jpeg --images 5000")
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-methods: setup  ## speed of each method compared with kd (ARGS="--root cifar10-jpeg --model student_cnn")
	$(BIN)/python benchmarks/methods.py $(ARGS)

bench-photos: setup  ## speed from JPEG files compared with torchvision's loop (ARGS="--root dogs-vs-cats --images 20000")
	$(BIN)/python benchmarks/photos.py $(ARGS)

results: setup  ## make the tables and pictures of docs/results from the runs beside them
	$(BIN)/python benchmarks/results.py

docs: setup  ## build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: setup  ## show it, and what changes in it, on http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

cache-info: setup  ## list cached images, teachers' outputs and features
	@$(BIN)/python -m kdpipe.clean --caches --output-dir "$(OUTPUTS)"

cache-clean: setup  ## remove them; the next run recomputes what it needs
	@$(BIN)/python -m kdpipe.clean --caches --yes --output-dir "$(OUTPUTS)"

lint: setup  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup  ## fix what ruff can fix
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove .venv and the files of tools; outputs/ stays
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
