# Every target creates the virtual environment it needs; you only have to install Python >= 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo demo-text test test-lowest soak docs notebooks lint format

# From nothing to generated images in a few minutes; the results are in runs/demo/.
# DEMO_OPTIONS applies to both training runs, for example train.max_steps=100, and DEMO_DATA to the images, for example
# data.num_images=1000; DEMO sets another folder.
DEMO ?= runs/demo
demo: $(VENV)/.installed
	$(BIN)/twostage train-tokenizer configs/tokenizer/vqvae_shapes.yaml run.dir=$(DEMO)/tokenizer $(DEMO_DATA) $(DEMO_OPTIONS)
	$(BIN)/twostage encode $(DEMO)/tokenizer --out $(DEMO)/codes
	$(BIN)/twostage train-prior configs/prior/gpt_shapes.yaml codes=$(DEMO)/codes run.dir=$(DEMO)/prior $(DEMO_OPTIONS)
	$(BIN)/twostage reconstruct $(DEMO)/tokenizer --out $(DEMO)/reconstructions.png
	$(BIN)/twostage generate $(DEMO)/prior --num-images 64 --guidance-scale 1.75 --temperature 0.6 --out $(DEMO)/generated
	@echo "Look at $(DEMO)/: reconstructions.png, generated/grid.png, tokenizer/losses.png, prior/losses.png"

# From nothing to images by caption; the results are in runs/demo_text/.
DEMO_TEXT ?= runs/demo_text
demo-text: $(VENV)/.installed
	$(BIN)/twostage train-tokenizer configs/tokenizer/vqvae_captioned_shapes.yaml run.dir=$(DEMO_TEXT)/tokenizer $(DEMO_DATA) $(DEMO_OPTIONS)
	$(BIN)/twostage encode $(DEMO_TEXT)/tokenizer --out $(DEMO_TEXT)/codes
	$(BIN)/twostage train-prior configs/prior/gpt_captioned_shapes.yaml codes=$(DEMO_TEXT)/codes run.dir=$(DEMO_TEXT)/prior $(DEMO_OPTIONS)
	$(BIN)/twostage generate $(DEMO_TEXT)/prior --num-images 32 --temperature 0.5 --out $(DEMO_TEXT)/generated
	@echo "Look at $(DEMO_TEXT)/generated/grid.png, then ask for more: twostage generate $(DEMO_TEXT)/prior --prompt \"a large red ring in the centre, on black\" --num-images 8"

# Without a network if the system allows that: tests/offline.py.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-dev
	$(BIN)/python tests/offline.py $(BIN)/python $(PYTEST)

# The same with the lowest versions that pyproject.toml allows; their deprecation warnings are ignored.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python tests/offline.py $(LOWEST)/bin/python $(PYTEST) \
	  -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning -W ignore::FutureWarning

$(LOWEST)/.installed: pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  extras = p["optional-dependencies"]; names = ["app", "export", "imagenet", "docs", "dev"]; \
	  all = sum((extras[name] for name in names), p["dependencies"]); \
	  print("\n".join(line.replace(">=", "==") for line in all if not line.startswith("twostage")))' > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet 'setuptools>=77' -r $(LOWEST)/lowest.txt --editable .
	touch $@

# Hours: kills, damaged images, data layouts, configurations, memory. Writes docs/reliability.md; PARTS=kills runs one part.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.reliability $(PARTS)

# The site with all documents, for reading without a network: build/site/index.html.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html"

# Runs the notebooks and stores their outputs: about twenty minutes on one core. NOTEBOOKS="docs/notebooks/01*" runs one.
notebooks: $(VENV)/.installed-docs
	$(BIN)/python docs/site/run_notebooks.py $(NOTEBOOKS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps a torch that is already installed (in the environment, or next to $(PYTHON)); otherwise installs the pinned one.
$(VENV)/constraints.txt: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("twostage needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	if torch=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null); \
	then { echo "torch==$$torch"; grep -vE '^(torch|torchvision|triton|nvidia|cuda)[=-]' constraints.txt; }; \
	else cat constraints.txt; fi > $@.partial
	mv $@.partial $@

$(VENV)/.installed: $(VENV)/constraints.txt pyproject.toml
	$(PIP) --constraint $< --editable .
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --constraint $(VENV)/constraints.txt --editable '.[docs]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@
