# Every target sets up .venv by itself; all it needs is Python 3.11 or later with venv (choose one: make PYTHON=python3.12).
PYTHON ?= python3
.PHONY: train test lint sync speed reproduce site check-site clean

.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cleanmeta needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

train: .venv/.installed  ## MAML-TRPO on HalfCheetahDir, under 10 minutes on 2 cores
	.venv/bin/python algos/maml_trpo.py --env-id HalfCheetahDir-v0 --meta-batch-size 20 --episodes-per-task 10 --iterations 150

.venv/.installed-warp: .venv/.installed requirements-warp.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-warp.txt
	@touch $@

# One process a core; tests that share what is dear to make stay in one process (the marker xdist_group).
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadgroup
# Without these two, MKL and torch choose the kernels that suit the processor: with them, those of any processor.
OTHER_KERNELS = MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default
NUMERIC = $(wildcard tests/test_*_math.py tests/test_peer*.py) tests/test_golden.py tests/test_estimators.py

test: .venv/.installed-warp .venv-docs/.installed lint  ## the whole suite, and what depends on rounding with other kernels again
	$(PYTEST)
	$(OTHER_KERNELS) $(PYTEST) $(NUMERIC)

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

sync: .venv/.installed  ## copy the shared functions of FILE into the other files of algos/ (make sync FILE=algos/maml_trpo.py)
	.venv/bin/python tools/sync.py $(FILE)

speed: .venv/.installed  ## throughput beside the usual way of writing it, one JSON line
	.venv/bin/python benchmark/speed.py maml_trpo --peer

reproduce: .venv/.installed  ## a headline again, and whether its figure lies in its interval (make reproduce FILE=maml_trpo ROW="HalfCheetahDir first-order" SEED=2)
	.venv/bin/python benchmark/headlines.py reproduce "$(FILE)" $(if $(ROW),--row "$(ROW)") $(if $(SEED),--seed "$(SEED)")

.venv-docs/.installed: requirements-docs.txt tools/reader/fonts.py
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	.venv-docs/bin/python -m tools.reader.fonts
	@touch $@

site: .venv-docs/.installed  ## every algorithm as a page beside its paper, the docs, a map: open site/index.html
	.venv-docs/bin/python -m tools.reader

check-site: site  ## use the site in a headless Chromium (Debian: apt-get install chromium)
	.venv-docs/bin/python tools/check_site.py

clean:
	rm -rf .venv .venv-docs site
