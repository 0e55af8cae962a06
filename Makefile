# make        set up .venv, run the scripts of all exercises at small size on data it makes itself, name what was written
# make test   set up .venv, run all tests
# make lint   set up .venv, check style
# Another Python: make PYTHON=python3.12     Fetch the real data sets: see README.md

PYTHON ?= python3
RUN := .venv/bin/python
READY := .venv/requirements.txt

BEGUN := .venv/begun

.PHONY: exercises begin m27 m28 m29 test lint
exercises: m27 m28 m29
	@echo
	@echo "Every exercise ran and wrote:"
	@find "$${COURSE_RESULTS:-results}" -type f -newer $(BEGUN) | sort

# Files that are newer than this one were written by this run.
begin: $(READY)
	@touch $(BEGUN)

m27: begin
	$(RUN) m27_data_loading/cpu_layout.py
	$(RUN) m27_data_loading/lfw_dataset.py -quick
	$(RUN) m27_data_loading/lfw_dataset.py -quick -visualize_batch
	$(RUN) m27_data_loading/lfw_dataset.py -quick -get_timing -num_workers 0 1 2 -augment both
	$(RUN) m27_data_loading/loading_ladder.py -quick

m28: begin
	$(RUN) m28_distributed_training/dp_train.py -quick
	$(RUN) m28_distributed_training/ddp_train.py -quick
	$(RUN) m28_distributed_training/ddp_train.py -quick -benchmark
	$(RUN) m28_distributed_training/fsdp_train.py -quick

m29: begin
	$(RUN) m29_inference/architectures.py -quick
	$(RUN) m29_inference/quantize.py -quick
	$(RUN) m29_inference/quantize.py -quick -model student
	$(RUN) m29_inference/prune.py -quick
	$(RUN) m29_inference/prune.py -quick -accuracy
	$(RUN) m29_inference/prune.py -quick -formats
	$(RUN) m29_inference/prune.py -quick -structured
	$(RUN) m29_inference/student.py -quick
	$(RUN) m29_inference/distill.py -quick

test: $(READY)
	$(RUN) -m pytest

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The copy in .venv is written last: an interrupted set-up is done again, a finished one only when requirements.txt has changed.
$(READY): requirements.txt
	@cmp -s requirements.txt $@ && touch $@ || { \
	$(PYTHON) -c 'import sys; sys.version_info < (3, 11, 4) and sys.exit("Python 3.11.4 or newer is needed: make PYTHON=python3.12")' && \
	echo "Setting up .venv: the first time some minutes and several GB, most of it PyTorch" && \
	$(PYTHON) -m venv .venv && $(RUN) -m pip install --disable-pip-version-check -r requirements.txt && cp requirements.txt $@; }
