package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Plan is what a machine is to become. It travels as JSON.
type Plan struct {
	Name string
	// Root is nil for a machine that sees the host's files: the control plane.
	Root *Root
	// Sysctls below net/, in the machine's own network namespace.
	Sysctls map[string]string
	// Steps run in their order.
	Steps []Step
	// Path is the PATH of all steps.
	Path string
}

// Root describes a root file system: the host's /usr and what is bound, read-only;
// /var from disk; everything else in memory.
type Root struct {
	// At is an empty folder of the host where it is built.
	At string
	// Var is the machine's disk: overlayfs wants a real file system below it.
	Var string
	// Binds are read-only: place in the machine to folder of the host.
	Binds map[string]string
	// Copies are writable: place in the machine to folder of the host.
	Copies map[string]string
	// Kept are folders that outlive a reboot, as Var does, in which they are.
	Kept []string
	// Files are written: place in the machine to content.
	Files map[string]string
	// Cgroups are mounted below /sys/fs/cgroup; none means the unified hierarchy.
	Cgroups []Hierarchy
	// Kernel are files below /proc/sys that show this instead of the host's values.
	Kernel map[string]string
}

// Hierarchy is one cgroup v1 hierarchy.
type Hierarchy struct{ Name, Options string }

// Step is a process: kept running, or run once until it succeeds.
type Step struct {
	Name    string
	Command []string
	// Keep: the next step begins when it was started. Otherwise when it succeeded.
	Keep bool
	// Log is the file for its output, inside the machine.
	Log string
}

// Send writes the plan to a machine that waits for it.
func (p Plan) Send(to io.Writer) error {
	if err := json.NewEncoder(to).Encode(p); err != nil {
		return fmt.Errorf("send the plan of %s: %w", p.Name, err)
	}
	return nil
}

// receive reads a plan; an end before it means that the owner gave up.
func receive(from io.Reader) (Plan, error) {
	var p Plan
	err := json.NewDecoder(from).Decode(&p)
	if errors.Is(err, io.EOF) {
		return p, errors.New("the owner ended before it sent a plan")
	}
	return p, err
}
