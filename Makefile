# Every command sets up what it needs: uv in .uv if it is missing, the locked environment in .venv.
CIFAR10_SOURCE ?= synthetic
ifeq ($(origin SOURCE),command line)
override CIFAR10_SOURCE := $(SOURCE)
endif
FUZZ_MINUTES ?= 60
CHART := .cifar/chart
UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv),.uv/bin/uv)
RUN := $(UV) run --frozen --all-extras
PATHS := cifar_assets resources examples tests k8s

export CIFAR10_SOURCE

.PHONY: help setup demo demo-loop stop dev test lint minimal-imports types check format cluster-test cluster-test-all chart audit fuzz
.DEFAULT_GOAL := help

help: ## List the commands.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv==$(UV_VERSION)

# Compiled once here, because with PYTHONDONTWRITEBYTECODE set each of many processes would compile again.
setup: $(filter .uv/bin/uv,$(UV)) ## Install the locked environment.
	@$(UV) sync --frozen --all-extras --compile-bytecode --quiet

demo: setup ## From images to a served model. SOURCE=FOLDER takes your own pictures in class folders.
	@$(RUN) python -m cifar_assets.demo

demo-loop: setup ## After demo: darkened pictures are noticed, labeled, trained on, and a new version answers.
	@$(RUN) python -m cifar_assets.demo_loop

stop: setup ## Stop the local inference services of all data sets.
	@$(RUN) python -m resources.inference_service.local stop

dev: setup ## Open the Dagster UI and daemon on this checkout.
	$(RUN) dg dev

test: setup ## Run unit tests and local end-to-end tests.
	$(RUN) pytest -n 3 --dist loadfile --no-loadscope-reorder

# Every round uses new input. For tests marked fuzz, the profiles in tests/conftest.py set the number of examples.
fuzz: setup ## Test code that reads untrusted bytes, with new input for FUZZ_MINUTES.
	@end=$$(($$(date +%s) + 60 * $(FUZZ_MINUTES))); while [ $$(date +%s) -lt $$end ]; do \
	  $(RUN) pytest tests/unit -m fuzz --hypothesis-profile long -n 2 -q --durations 0 $(ARGUMENTS) || exit 1; done

lint: setup ## Check style, spelling and the lock file.
	$(RUN) ruff check $(PATHS)
	$(RUN) ruff format --check $(PATHS)
	$(RUN) codespell $(PATHS) docs README.md
	$(UV) lock --check

minimal-imports: $(filter .uv/bin/uv,$(UV)) ## Import what runs in each image with only its packages.
	$(UV) run --isolated --frozen --no-dev --extra trainer python -c "import cifar_assets.training.__main__"
	$(UV) run --isolated --frozen --no-dev --extra server python -c "import cifar_assets.serving.app"
	$(UV) run --isolated --frozen --no-dev --extra orchestration --extra kubernetes python -c \
	  "import cifar_assets.definitions, cifar_assets.exporter, cifar_assets.serving.classifier"

types: setup ## Check types.
	$(RUN) basedpyright $(PATHS)

format: setup ## Rewrite files in the project's style.
	$(RUN) ruff check --fix $(PATHS)
	$(RUN) ruff format $(PATHS)

cluster-test: setup ## Run tests on the cluster of KUBECONFIG, with the images loaded (see `make images`).
	$(RUN) pytest tests/cluster -m "not thorough" $(ARGUMENTS)

cluster-test-all: setup ## Also run the cluster tests that CI leaves out to save time.
	$(RUN) pytest tests/cluster $(ARGUMENTS)

chart: ## Write the Helm chart to .cifar/chart, with the objects of the kustomizations. Needs kubectl.
	@rm -rf $(CHART) && mkdir -p $(CHART)/files
	@cp -r k8s/chart/. $(CHART)
	kubectl kustomize --load-restrictor LoadRestrictionsNone k8s/chart > $(CHART)/files/objects.yaml

audit: $(filter .uv/bin/uv,$(UV)) ## Look up known vulnerabilities of the locked packages. Needs api.osv.dev.
	$(UV) audit --frozen

check: lint types test ## Run what CI runs without a cluster.

include images/images.mk
