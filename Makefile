# Every job of the project. `make help` lists them.

GO       ?= go
PROGRAMS := tacit tacit-control tacit-node tacit-cni
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)
REGISTRY ?= tacit.dev
LDFLAGS  := -s -w -X main.version=$(VERSION)
# Without x/net/trace the linker drops what gRPC would show on a page of its own.
TAGS     := grpcnotrace
# Tests are compiled as the programs are: what they test is what is shipped, nothing is
# compiled for each of the two, and what one clone compiled serves another.
STATIC   := -trimpath -tags=$(TAGS)
export CGO_ENABLED = 0
export GOFLAGS := $(filter-out $(STATIC),$(GOFLAGS)) $(STATIC)
# Stories (lab/) are tests too, but take minutes; everything else is quick. What is vetted
# once is not vetted by each go test again, which compiles nothing but takes as long.
QUICK     = $(shell $(GO) list ./... | grep -v /lab$$)

.DEFAULT_GOAL := help

help: ## list the jobs
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build packages ## the main job: two pods, two nodes, plaintext first, then mutual TLS
	@lab/demo.sh

test: packages check race stories user-stories documented e2e ## everything that must pass

build: ## the programs, into bin/
	@mkdir -p bin
	@for p in $(PROGRAMS); do $(GO) build -ldflags '$(LDFLAGS)' -o bin/$$p ./cmd/$$p || exit 1; done
	@big=$$(find bin -name tacit-node -size +20000000c -o -name tacit-cni -size +4000000c); \
	 test -z "$$big" || { ls -l $$big; echo 'build: what is on every node is small: tacit-node at most 20 MB, tacit-cni 4 MB'; exit 1; }

check: ## format, vet, staticcheck, unit, kernel and architecture tests
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'gofmt: run gofmt -w on these'; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	.ci/noskip $(GO) test -vet=off -v $(QUICK)

race: export CGO_ENABLED = 1
race: ## the quick tests again, with the race detector
	.ci/noskip $(GO) test -vet=off -v -race $(QUICK)

stories: build ## the whole mesh, as stories in a lab
	TACIT_BIN=$(CURDIR)/bin .ci/noskip $(GO) test -vet=off -v -count=1 -parallel 2 -timeout 30m ./lab

user-stories: build ## the stories that need no root, as an ordinary user
	lab/as-user.sh

documented: build packages ## every command of the documentation, the demo among them
	.ci/documented

soak: build ## what takes long: an hour without agents, ten minutes of silence, many rounds, five minutes without an API server
	TACIT_SOAK=1 $(GO) test -count=1 -timeout 60m -v -run TestBuilderIsBuild ./control/kube
	TACIT_SOAK=1 TACIT_BIN=$(CURDIR)/bin $(GO) test -count=1 -timeout 120m -v ./lab
	$(subst GOFLAGS,TACIT_SOAK=1 GOFLAGS,$(E2E)) test -v -count=1 -timeout 30m -run TestUnderLoad ./rollout
	$(subst GOFLAGS,TACIT_SOAK=1 GOFLAGS,$(E2E)) test -v -count=1 -timeout 30m -run TestOriginal ./mesh

lab: build ## a lab to play with: then try bin/tacit lab --help
	bin/tacit lab up

# e2e/ is a module of its own, whose programs are built without our tags into a cache; built
# otherwise here, all that they depend on would be compiled twice.
E2E := cd e2e && GOFLAGS='$(filter-out $(STATIC),$(GOFLAGS)) -trimpath' $(GO)

kube: ## a real Kubernetes with two nodes to play with, as root
	@$(E2E) run ./cmd/kube up

kube-down: ## end it, leaving nothing
	@$(E2E) run ./cmd/kube down

e2e: packages ## tests on a real Kubernetes, as root; the first run builds it, which takes minutes
	@lab/packages.sh kubernetes
	@$(E2E) run ./cmd/kube build
	@$(E2E) vet ./...
	@$(subst cd e2e &&,cd e2e/compare && CGO_ENABLED=0,$(E2E)) vet ./...
	@$(subst $(GO),../.ci/noskip $(GO),$(E2E)) test -vet=off -v -count=1 -p 1 -parallel 1 -timeout 30m ./...

image: ## the images of tacit-node and tacit-control, as OCI tars in bin/
	@$(E2E) run ./cmd/image --to $(CURDIR)/bin --registry '$(REGISTRY)' --version '$(VERSION)' --revision '$(REVISION)'

bench: build packages ## compare Tacit with HAProxy, in under four minutes; fails if a bound is missed
	$(GO) run ./bench

bench-policies: build packages ## what 10,000 policies cost: Tacit with them and without, in under three minutes; fails if a bound is missed
	$(GO) run ./bench -policies 10000 -rounds 10 -seconds 1

scale: build ## what 100,000 pods on 1,000 nodes cost, as root; takes about half an hour (see docs/scale.md)
	@$(GO) build -o bin/scale ./bench/scale
	bin/scale $(SCALE)

fuzz: ## each fuzz target for FUZZTIME (10s)
	.ci/fuzz $(or $(FUZZTIME),10s)

reference: ## the generated parts of docs/: flags, values, Mesh, metrics, log messages, commands
	$(GO) test -vet=off . ./cli -run Reference -update

generate: ## the code made from .proto files (needs protoc)
	$(GO) generate ./...

packages: ## Debian packages that the stories use; installed if root, else named
	@lab/packages.sh

clean: ## what the jobs made
	rm -rf bin bench/result.json bench/scale/result.json

.PHONY: help demo test build check race stories user-stories documented soak lab kube kube-down e2e image bench bench-policies scale fuzz reference generate packages clean
