# make.py does the work, the same on every operating system. Words for a command: make test ARGS="-k tokenizer"
PYTHON ?= python3

setup demo test check docs figures bench faults soak:
	@$(PYTHON) make.py $@ $(ARGS)

.PHONY: setup demo test check docs figures bench faults soak
