package build

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

const (
	containerd = "github.com/containerd/containerd/v2"
	plugins    = "github.com/containernetworking/plugins/plugins"
	runc       = "github.com/opencontainers/runc"
)

// Programs are folders with the programs of a cluster.
type Programs struct {
	// Kubernetes has kubenode, coredns, containerd, its shim, ctr, runc, and in cni/
	// the plugins. It is bound into the nodes.
	Kubernetes string
	// Tools has kube, app and pause, made from this module alone.
	Tools string
}

// All makes the programs that are not in the cache. Progress goes to out.
func All(ctx context.Context, out io.Writer) (Programs, error) {
	m, err := findModule(ctx)
	if err != nil {
		return Programs{}, err
	}
	kubernetes, err := m.kubernetes(ctx, out)
	if err != nil {
		return Programs{}, err
	}
	tools, err := m.tools(ctx, out)
	return Programs{Kubernetes: kubernetes, Tools: tools}, err
}

// Load makes the program of load/, a module of its own, and returns its path.
func Load(ctx context.Context, out io.Writer) (string, error) {
	m, err := findModule(ctx)
	if err != nil {
		return "", err
	}
	m.dir = filepath.Join(m.dir, "load")
	key, err := m.key("*.go")
	if err != nil {
		return "", err
	}
	dir, err := Once(ctx, "load-"+key, func(dir string) error {
		return m.build(ctx, dir, []target{{what: "load", to: "load", packages: []string{"."}}}, out)
	})
	return filepath.Join(dir, "load"), err
}

// target is one run of go build.
type target struct {
	what     string // for people
	to       string // below the cached folder: a file, or a folder if it ends in /
	packages []string
	tags     string
	ldflags  string
	cgo      bool
}

func (m module) kubernetes(ctx context.Context, out io.Writer) (string, error) {
	key, err := m.key("kubenode/*.go", "coredns/*.go", "build/programs.go", "build/module.go")
	if err != nil {
		return "", err
	}
	return Once(ctx, "kubernetes-"+key, func(dir string) error {
		if err := buildPackages(); err != nil {
			return err
		}
		fmt.Fprintln(out, "building Kubernetes, containerd and runc, once: with an empty Go cache 5 to 10 minutes on 2 cores, and 2.4 GiB of memory")
		return m.build(ctx, dir, m.kubernetesTargets(), out)
	})
}

func (m module) tools(ctx context.Context, out io.Writer) (string, error) {
	key, err := m.key("*/*.go", "*/*.yaml", "cmd/*/*.go")
	if err != nil {
		return "", err
	}
	return Once(ctx, "tools-"+key, func(dir string) error {
		return m.build(ctx, dir, []target{{what: "kube, app, pause", to: "/", packages: []string{"./cmd/kube", "./app", "./pause"}}}, out)
	})
}

func (m module) kubernetesTargets() []target {
	version := m.versions["k8s.io/kubernetes"]
	return []target{
		{what: "containerd", to: "/", tags: "no_btrfs,no_zfs,no_devmapper,no_aufs",
			packages: []string{containerd + "/cmd/containerd", containerd + "/cmd/containerd-shim-runc-v2", containerd + "/cmd/ctr"},
			ldflags:  "-X " + containerd + "/version.Version=" + m.versions[containerd]},
		{what: "Kubernetes", to: "kubenode", packages: []string{"./kubenode"}, ldflags: stamp(version)},
		{what: "CNI plugins", to: "cni/", packages: []string{plugins + "/main/ptp", plugins + "/main/bridge",
			plugins + "/main/loopback", plugins + "/ipam/host-local", plugins + "/meta/portmap"}},
		{what: "CoreDNS", to: "coredns", packages: []string{"./coredns"}},
		// Pods with seccompProfile RuntimeDefault need the tag seccomp.
		{what: "runc", to: "runc", packages: []string{runc}, tags: "seccomp,netgo,osusergo", cgo: true,
			ldflags: "-extldflags -static -X main.version=" + strings.TrimPrefix(m.versions[runc], "v")},
	}
}

// stamp writes the version where Kubernetes looks for it; without it the API
// server calls itself v0.0.0 and kubectl refuses to compare.
func stamp(version string) string {
	minor := strings.Split(version, ".")[1]
	var flags []string
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, v := range []string{"gitVersion=" + version, "gitMajor=1", "gitMinor=" + minor, "gitTreeState=clean",
			"gitCommit=0000000000000000000000000000000000000000", "buildDate=1970-01-01T00:00:00Z"} {
			flags = append(flags, "-X "+p+"."+v)
		}
	}
	return strings.Join(flags, " ")
}

func (m module) build(ctx context.Context, dir string, targets []target, out io.Writer) error {
	begin := time.Now()
	if err := os.MkdirAll(filepath.Join(dir, "cni"), 0o755); err != nil {
		return err
	}
	for _, t := range targets {
		if err := m.goBuild(ctx, dir, t, out); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "built after %s on %d cores\n", time.Since(begin).Round(time.Second), runtime.NumCPU())
	return nil
}
