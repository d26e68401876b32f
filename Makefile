# Every target makes what it needs, in .venv: Python 3.11 or newer and make are all it takes.
PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: demo dev test test-16 soak lint bench screenshots lock clean venv

demo: venv  # backups taken, proven and restored, on servers of its own
	@$(VENV) -m backup_pipeline.demo

dev: venv  # the same servers, and Dagster's UI beside them
	@$(VENV) -m backup_pipeline.demo dev

test: venv
	$(VENV) -m pytest -n 3 --dist worksteal

test-16: venv  # what depends on PostgreSQL's version, on 16; `test` has it on 15, 17 and 18
	$(VENV) -m pytest -m slow -k "[16" -n 2 --dist worksteal

soak: venv  # the slow campaigns
	$(VENV) -m pytest -m slow --timeout 3600 -n 2 --dist worksteal

lint: venv
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m mypy

bench: venv
	$(VENV) -m benchmarks

screenshots: venv  # docs/images anew; needs a chromium on PATH
	$(VENV) docs/take_screenshots.py

lock: venv  # both locks anew, after pyproject.toml changed; UPGRADE=--upgrade for the newest of all
	$(VENV) tools/lock.py $(UPGRADE)

clean:
	rm -rf .venv .venv.lock .demo .dagster_home build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

venv:
	@$(PYTHON) tools/setup_venv.py
