# Short names for the commands in CONTRIBUTING.md.
.PHONY: test coverage audit lint types bench docs plans site

test:
	pytest

coverage:
	OMP_NUM_THREADS=1 pytest -n 2 --cov --ignore tests/esd_peft/models/test_compilation.py

audit:
	pip check
	pip-audit --skip-editable

lint:
	ruff check .
	ruff format --check .

types:
	mypy

bench:
	python benchmarks/gpu_suite.py --output benchmarks/results

docs:
	python docs/config_reference.py

plans:
	python benchmarks/plans.py

site:
	mkdocs build --strict
