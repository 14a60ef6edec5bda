# The two commands a newcomer needs are `make demo` and `make test`; both set up everything they use in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/*/*.cu)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/*/*.cu tests/sanitizers/*.cpp tests/sanitizers/*.h tests/emulation/*.cpp tests/emulation/*.h examples/*/*.cpp benchmarks/*.cpp)
DEMO := runs/demo
NEWEST_TRITON := .newest-triton
# The lowest versions that pyproject.toml allows.
OLDEST := .oldest
OLDEST_TORCH := 2.8.0
OLDEST_TRITON := 3.5.0
# torchrec's metadata ask for fbgemm's CUDA package: it is installed without what it asks for, and that beside it.
TORCHREC := torchrec torchmetrics
TORCHREC_NEEDS := tensordict lightning-utilities pyre-extensions typing-inspect tqdm
# Options of benchmarks/gpu.py
GPU :=
# A worker a core and a thread a worker: two workers of two threads each wait for one another at every parallel region,
# which takes much longer. Tests of threads ask for several.
PYTEST_OPTIONS := -q -n auto --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)
# Of make mutants: files of which every line is changed; without, the lines that differ from the commit AGAINST.
FILES :=
AGAINST :=

.PHONY: demo test test-slow test-newest-triton test-oldest mutants fuzz sanitize lint format accuracy gpu clean

demo: $(VENV)/built
	$(BIN)/saml-rec doctor
	$(BIN)/saml-rec data ml-100k --out $(DEMO)/data
	$(BIN)/saml-rec compare --data $(DEMO)/data/ml-100k.csv --schema $(DEMO)/data/ml-100k-age.toml \
	  --models saml,shared_bottom --seeds 2 --reference-epoch --out $(DEMO)/compare

# Triton decides at import whether it compiles or interprets, so its two kinds of tests need processes of their own.
test: $(VENV)/built
	$(PYTEST) -m "not slow and not gpu and not interpreter and not races and not aot"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" tests/triton
	TRITON_INTERPRET=1 $(PYTEST) -m "races and not slow" tests/triton
	$(PYTEST) -m "aot and not slow" tests/triton

# Wheel and source distribution, the real data set, a whole run in a process that gets killed.
test-slow: $(VENV)/built
	$(PYTEST) -m slow

# The Triton kernels compiled with the newest Triton there is. The packages come from $(VENV), only Triton does not.
test-newest-triton: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(NEWEST_TRITON) triton
	PYTHONPATH=$(NEWEST_TRITON) $(BIN)/python -c "import triton; print('triton', triton.__version__)"
	PYTHONPATH=$(NEWEST_TRITON) TRITON_CACHE_DIR=$(NEWEST_TRITON)/cache $(BIN)/python -m pytest -q -m aot tests/triton

# The layers with the oldest torch, then the Triton kernels with the oldest Triton; several GB of packages.
test-oldest: $(VENV)/built
	$(PYTHON) -m venv $(OLDEST)
	grep -v "^torch==\|^triton==\|^setuptools==" constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(OLDEST_TORCH) "setuptools<80" wheel ninja
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
	  --no-build-isolation --editable ".[test]"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not gpu and not interpreter and not races and not aot" tests/kernels
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLDEST)/triton \
	  triton==$(OLDEST_TRITON)
	PYTHONPATH=$(OLDEST)/triton TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" tests/triton

# Changes the code one small step at a time and lists what no test notices (docs/building.md).
mutants: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/run.py $(if $(AGAINST),--against $(AGAINST)) $(FILES)

# The fuzzing targets and the property tests on so many times as many examples as in `make test`.
FUZZ := 20
fuzz: $(VENV)/built
	SAML_FUZZ_FACTOR=$(FUZZ) $(PYTEST) tests/fuzz tests/kernels/test_properties.py

# Address, undefined-behaviour and thread sanitizers over the CPU kernels of all instruction sets.
sanitize: $(VENV)/built
	tests/sanitizers/run.sh

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# All models on seven data sets; writes benchmarks/results/accuracy_*.json and the tables of docs/results.md. Two hours.
accuracy: $(VENV)/built
	$(BIN)/python benchmarks/accuracy.py

# What needs a GPU, with the machine's own Python and packages: nothing is installed, no network is needed. The first
# time: make gpu GPU="--command check --out FOLDER", then tune, then measure (docs/benchmarks.md).
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)

# torch comes first: the extension is built against the one that will be used.
$(VENV)/environment: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) setuptools wheel ninja build
	touch $@

$(VENV)/built: $(VENV)/environment $(SOURCES)
	$(INSTALL) --no-build-isolation --editable ".[triton,tables,tune,lightgbm,tensorboard,mlflow,test,bench,lint,mutation]"
	$(INSTALL) --no-deps $(TORCHREC)
	$(INSTALL) $(TORCHREC_NEEDS)
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST_TRITON) $(OLDEST) build dist *.egg-info saml_kernels/*.so
