# `make demo` sets up and renders with the embedded model; `make test` sets up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# test files side by side, a process a core
WORKERS := -n logical --maxprocesses 8 --dist loadfile
READY := $(VENV)/.ready

.PHONY: demo test check tiny wheel clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "pip>=25.1"
	$(BIN)/python -m pip install -q -c constraints.txt -e . --group dev
	touch $(READY)

demo: $(READY)
	$(BIN)/atlasvid render "a red ball moving right over a green checkerboard" \
		--res 3840x2160 --seconds 12 -o demo.mp4

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(WORKERS)

tiny: $(READY)
	$(BIN)/atlasvid train tiny --work training --output training/tiny

wheel: $(READY)
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf dist build
