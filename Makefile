# dl2lib: `make` alone lists the commands. The first one that needs it makes .venv from constraints.txt (.ci/venv); the
# stamp in it says that the installation was completed, and where. Nothing is installed again while the stamp holds.

BIN   := .venv/bin
STAMP := .venv/.dl2lib-installed
JOBS  ?= 2

.PHONY: help train test lab browser export update clean check-python
help:
	@echo "make <command>, with PYTHON=/path/to/python3.13 for another interpreter than the first of 3.11 to 3.14 found"; \
	sed -n 's/^\([a-z]*\):.*## /  \1	/p' Makefile

train: $(STAMP) ## train the lesson's CNN, or go on: DATA=folder EPOCHS= SIZE= BS= DEVICE= SEED= OUT=folder ARGS="other options of dl2lib-train"
	@$(BIN)/dl2lib-train $(if $(DATA),"$$DATA") $(if $(EPOCHS),--epochs "$$EPOCHS") $(if $(SIZE),--size "$$SIZE") \
	    $(if $(BS),--bs "$$BS") $(if $(DEVICE),--device "$$DEVICE") $(if $(SEED),--seed "$$SEED") $(if $(OUT),--out "$$OUT") $(ARGS)

# The cells run twice: here in forked processes as nbdev does it, and in tests/test_notebooks.py in real kernels. The first
# line makes the data that both workers would otherwise make at once. What nbdev_test said is one of pytest's tests, so
# that pytest's last line and exit status speak for all of it.
test: $(STAMP) ## run every notebook and every test: JOBS=2 notebooks at once, PYTEST="options for pytest, such as --slow"
	@$(BIN)/python -c "from dl2lib.datasets import shapes; shapes()" || true
	@if OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(JOBS); then said=passed; else said=failed; fi; \
	NBDEV_TEST=$$said $(BIN)/python -m pytest $(PYTEST)

lab: $(STAMP) ## open the notebooks in JupyterLab: LAB="options, such as --no-browser"
	cd nbs && PATH="$(CURDIR)/$(BIN):$$PATH" ../$(BIN)/jupyter-lab $(LAB)

# Needs a browser (Debian: apt-get install chromium) and the extra `browser`; takes some ten minutes, so it is no part of `make test`.
browser: $(STAMP) ## run every notebook in JupyterLab in a real browser, screenshots in out/browser: NB="00_first_program 09c_progress"
	@$(BIN)/python -c "import playwright" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt $$(sed -n 's/^browser_requirements = //p' settings.ini)
	@$(BIN)/python tests/browser.py $(NB)

export: $(STAMP) ## notebooks -> modules: clean nbs/, then write dl2lib/
	@$(BIN)/python .ci/check.py notebooks
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

update: $(STAMP) ## modules -> notebooks: bring what was edited in dl2lib/ back into nbs/
	@$(BIN)/python .ci/check.py modules
	@$(BIN)/python .ci/check.py notebooks
	$(BIN)/nbdev_update
	$(BIN)/nbdev_export

clean: ## remove what builds and tests leave behind; .venv, data and out/ stay
	rm -rf build dist .pytest_cache .ruff_cache .ipynb_checkpoints nbs/.ipynb_checkpoints nbs/engine/.ipynb_checkpoints
	find dl2lib tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# An environment installed elsewhere (a moved or copied folder) names its old place in every script: make it anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): constraints.txt settings.ini setup.py | $(if $(PYTHON),check-python)
	@sh .ci/venv

check-python:
	@sh .ci/venv check
