# Each target does all its own set-up in .venv: nothing needs to be installed but Python 3.11 or newer and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A process a core, at most four: each takes gigabytes. A file's tests stay together: they share what is costly to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: help demo test test-slow lint results clean

help:
	@echo "make demo       steer the tiny world and picture the difference, in runs/demo"
	@echo "make test       the tests that run in seconds each"
	@echo "make test-slow  the long ones"
	@echo "make lint       ruff and pyright"
	@echo "make results    regenerate every committed figure and JSON"

demo: $(READY)
	$(BIN)/safedig demo tiny-sd3 --out runs/demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,compatibility,nudenet]'
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

results: $(READY)
	for model in tiny-flux tiny-sd3; do \
	  $(BIN)/safedig show $$model --quality --out docs/results && \
	  $(BIN)/safedig demo $$model --out runs/results/$$model && \
	  cp runs/results/$$model/demo.json docs/results/demo-$$model.json && \
	  cp runs/results/$$model/demo.png docs/results/demo-$$model.png || exit 1; \
	  $(BIN)/safedig record $$model 'sites=["txt.embed"]' --out runs/results/$$model/acts && \
	  $(BIN)/safedig train $$model 'sites=["txt.embed"]' sae.expansion=8 sae.k=20 sae.steps=1500 train.spliced=0 \
	    --store runs/results/$$model/acts --out runs/results/$$model/sae && \
	  $(BIN)/safedig show $$model --sae runs/results/$$model/sae/$$model/txt.embed/* --out docs/results || exit 1; \
	  $(BIN)/safedig evaluate $$model --quick --out runs/results/$$model/evaluate && \
	  mkdir -p docs/results/evaluate-$$model && \
	  (cd runs/results/$$model/evaluate && cp evaluate.json evaluate.md pareto.png forest-target.png contact-sheet.png \
	    $(CURDIR)/docs/results/evaluate-$$model) || exit 1; \
	  $(BIN)/safedig attack $$model 'attack.methods=[]' evaluate.sizes.pairs=48 evaluate.sizes.stand_ins=48 \
	    evaluate.sizes.tried=48 --out runs/results/$$model/evaluate && \
	  mkdir -p docs/results/attack-$$model && \
	  (cd runs/results/$$model/evaluate && cp attack.json attack.md methods-without-weights.png attacks-on-ours.png \
	    $(CURDIR)/docs/results/attack-$$model) || exit 1; \
	  $(BIN)/safedig attack $$model 'attack.methods=[]' 'attacks=["seed search", "synonyms", "paraphrases", "token search"]' \
	    evaluate.sizes.pairs=48 evaluate.sizes.stand_ins=48 evaluate.sizes.tried=48 --out runs/results/$$model/evaluate && \
	  mkdir -p docs/results/attack-words-$$model && \
	  cp runs/results/$$model/evaluate/attack.json runs/results/$$model/evaluate/attack.md \
	    docs/results/attack-words-$$model || exit 1; \
	  for risk in weapon poison fire sign composition; do \
	    $(BIN)/safedig route $$model target=$$risk || exit 1; \
	  done; \
	done

clean:
	rm -rf .venv runs build dist

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
