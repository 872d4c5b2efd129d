# Short names for the commands in CONTRIBUTING.md.
.PHONY: test lint types bench docs

test:
	pytest

lint:
	ruff check .
	ruff format --check .

types:
	mypy

bench:
	python benchmarks/gpu_suite.py --output benchmarks/results

docs:
	python docs/config_reference.py
