# Tasks of this repository: `make help` lists them. The CI (.ci/run) runs the same commands in a fresh environment.
.DEFAULT_GOAL := help
PYTHON ?= python

help:  ## list the tasks
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install:  ## the package in place, with the CPU engines and the test tools
	$(PYTHON) -m pip install -e '.[cpu,triton,test]'

test:  ## the core suite
	$(PYTHON) -m pytest

test-slow:  ## the longer suites, and those on real data (OPTIN_EXPORT_SHARED)
	$(PYTHON) -m pytest -m "(slow or shared_data) and not (triton or ray or nightly)"

test-rtx:  ## every family's graph built with TensorRT for RTX (extra rtx, no GPU needed)
	$(PYTHON) -m pytest -m "rtx and not nightly"

test-ray:  ## clusters of Ray on this machine (extra ray)
	$(PYTHON) -m pytest -m "ray and not (slow or nightly)" -n 0

test-browser:  ## the report in a headless Chromium (extra browser)
	$(PYTHON) -m pytest -m browser -n 0 -rs

test-triton:  ## a real Triton Inference Server, in an environment of its own
	$(PYTHON) -m pytest -m triton -n 0 -rs

test-lowest:  ## the lowest versions that pyproject.toml allows, in an environment of their own (about 7 GB)
	tools/lowest_versions.sh

lint:  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

format:  ## what ruff can correct by itself
	ruff check --fix .
	ruff format .

pages:  ## generated pages: results, reference, schemas
	$(PYTHON) tools/studies/render_results.py
	$(PYTHON) tools/make_reference.py
	$(PYTHON) tools/make_schemas.py

docs:  ## the documentation as a site, in site/ (extra docs)
	mkdocs build --strict

ci:  ## everything but the nightly tests, in a fresh environment
	.ci/run

nightly:  ## everything, in a fresh environment
	.ci/run --nightly

.PHONY: help install test test-slow test-rtx test-ray test-browser test-triton test-lowest lint format pages docs ci nightly
