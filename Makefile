# On a fresh machine, with Python >= 3.10 and make: `make demo`, `make omniglot`, `make mini SOURCE=folder`, `make test`.

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
DEMO := runs/demo

.PHONY: demo test table omniglot mini

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: Python %d.%d found, 3.10 or newer expected" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	"$(BIN)/pip" install -q -r requirements.txt
	touch $@

.venv/test: .venv/run requirements-test.txt
	"$(BIN)/pip" install -q -r requirements-test.txt
	touch $@

test: .venv/test
	"$(BIN)/python" -m pytest -q -n 2 tests

table:
	$(PYTHON) results/table.py

# Our recipe in small, on the stand-in data set.
demo: .venv/run
	"$(BIN)/python" data/glyphs/prepare.py
	rm -rf $(DEMO)
	cd omniglot && "$(BIN)/python" main.py --data-dir ../data/glyphs --save-dir ../$(DEMO) --device cpu --sample-size 100 \
	    --train-mc-sample-size 1 --train-iters 400 --freq-iters 100 --kl-warmup-iters 200 --kl-weight 0.1 --lr-schedule cosine \
	    --ema-decay 0.97 --eval-episodes 300 --target canonical --warp affine --precision auto
	cd omniglot && "$(BIN)/python" figures.py --checkpoint ../$(DEMO)/5shot_best.pt --data-dir ../data/glyphs

# Omniglot, the whole chain: download (or `make omniglot SOURCE=folder` with the two official zips), train, test. Run again, it continues.
omniglot: .venv/run
	$(if $(SOURCE),,test -f data/omniglot/test.npy ||) "$(BIN)/python" data/omniglot/prepare.py $(if $(SOURCE),--source "$(SOURCE)")
	cd omniglot && "$(BIN)/python" main.py @recipes/canonical.txt --save-dir ../runs/omniglot --resume

# Mini-ImageNet, the whole chain: `make mini SOURCE=folder` with images (or zips of them) and the three CSVs. Run again, it continues.
# RECIPE=published: the paper's, a GPU's work.
RECIPE ?= prototypical
MINI := runs/mini-$(RECIPE)
mini: .venv/run
	@test -n "$(SOURCE)" || { echo "make mini: SOURCE is empty, SOURCE=<folder with images/ or zips and train.csv, val.csv, test.csv> expected" >&2; exit 2; }
	@test -f "mimgnet/recipes/$(RECIPE).txt" || { echo "make mini: RECIPE: $(RECIPE) found, prototypical or published expected" >&2; exit 2; }
	"$(BIN)/python" data/imgnet/prepare.py --source "$(SOURCE)" --if-changed again
	cd simclr && "$(BIN)/python" main.py @recipes/$(RECIPE).txt --save-dir ../$(MINI)-simclr --probe --resume
	cd mimgnet && "$(BIN)/python" main.py @recipes/$(RECIPE).txt --save-dir ../$(MINI) --resume
