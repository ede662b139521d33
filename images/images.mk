# Images of the pods, with buildah or docker: `make images`. Include from the top Makefile, or
# `make -f images/images.mk images` from the repository's root.
#   BUILDER     command that builds:  buildah bud  |  docker build
#   BUILD_ARGS  further arguments, such as --no-cache
#   TAG         tag of all images
#   PYTHON      base of all images, such as python:3.11-slim@sha256:...
#   LOAD        command that puts one image into the cluster, such as `minikube image load`; empty does nothing

TAG ?= dev
REGISTRY ?= localhost
BUILDER ?= $(if $(shell command -v buildah),buildah bud --layers --isolation chroot --network host,docker build)
BUILD_ARGS ?=
PYTHON ?= python:3.11-slim
LOAD ?=
IMAGES := trainer server dagster mlflow

.PHONY: images sbom test-images story-image postgres-image $(IMAGES:%=image-%) image-kfp

images: $(IMAGES:%=image-%) ## Build the images of all pods; LOAD puts each into the cluster. image-kfp builds one more.

$(IMAGES:%=image-%) image-kfp: image-%:
	$(BUILDER) $(BUILD_ARGS) --build-arg PYTHON=$(PYTHON) --target $* -t $(REGISTRY)/cifar-$*:$(TAG) -f images/Dockerfile .
	$(if $(LOAD),$(LOAD) $(REGISTRY)/cifar-$*:$(TAG))

sbom: $(filter .uv/bin/uv,$(UV)) ## Write the packages of each image, from the lock file, to .cifar/sbom as CycloneDX.
	@mkdir -p .cifar/sbom
	@for role in $(IMAGES) kfp; do \
		extras=$$(sed -n "/ AS $$role$$/,/^RUN/p" images/Dockerfile | grep -o -e '--extra [a-z]*'); \
		$(UV) export --quiet --frozen --no-dev --no-emit-project $$extras --format cyclonedx1.5 \
			--output-file .cifar/sbom/$$role.cdx.json || exit 1; \
	done

test-images: story-image postgres-image ## Build the images that only the cluster tests run.

story-image: ## Build the small image of the cluster tests.
	$(BUILDER) $(BUILD_ARGS) -t $(REGISTRY)/pytorch-job-story:test -f tests/cluster/story_image/Dockerfile .
	$(if $(LOAD),$(LOAD) $(REGISTRY)/pytorch-job-story:test)

postgres-image: ## Build Postgres for test clusters without a registry.
	$(BUILDER) $(BUILD_ARGS) -t $(REGISTRY)/cifar-postgres:test -f tests/cluster/postgres_image/Dockerfile .
	$(if $(LOAD),$(LOAD) $(REGISTRY)/cifar-postgres:test)
