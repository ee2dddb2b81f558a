package cluster

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"time"
)

const maxNodes = 99

// Options are what a cluster is made of.
type Options struct {
	// Name tells clusters apart; one is made up if it is empty.
	Name string
	// Nodes is their number, 2 if it is zero; named n1, n2, ….
	Nodes int
	// DualStack gives nodes, pods and services IPv6 addresses beside IPv4.
	DualStack bool
	// Images are OCI tars (package image) that every node has.
	Images []string
	// Taints are those with which every node registers, as KEY=VALUE:EFFECT.
	Taints []string
	// NoDNS leaves CoreDNS out.
	NoDNS bool
	// Patience is how long the cluster may take to be ready; 5 minutes if zero.
	Patience time.Duration
	// Progress is where a cold build and the start report to; nil for nowhere.
	Progress io.Writer
}

func (o Options) complete() (Options, error) {
	if o.Name == "" {
		o.Name = "c-" + strings.ToLower(rand.Text()[:8])
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.Patience == 0 {
		o.Patience = 5 * time.Minute
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	return o, o.validate()
}

func (o Options) validate() error {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("nodes need mount and cgroup namespaces: run it as root"))
	}
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`).MatchString(o.Name) {
		errs = append(errs, fmt.Errorf("name %q: want at most 31 small letters, digits and hyphens", o.Name))
	}
	if o.Nodes < 0 || o.Nodes > maxNodes {
		errs = append(errs, fmt.Errorf("%d nodes: want 1 to %d", o.Nodes, maxNodes))
	}
	return errors.Join(errs...)
}
