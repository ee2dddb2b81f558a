package lab

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options are how a lab's own processes are run.
type Options struct {
	// Mesh false leaves out every process of Tacit: a plain cluster.
	Mesh bool
	// Bin is the folder of tacit-control, tacit-node and tacit-cni. "" means the
	// folder of this program.
	Bin string
	// TrustDomain of all identities; "" means lab.
	TrustDomain string
	// CNITimeout is how long the plugin waits for the agent at most.
	CNITimeout time.Duration
	// Flags are more flags for a process of Tacit, by role (control, agent, proxy).
	Flags map[string][]string
}

var roles = []string{"control", "agent", "proxy"}

// ParseOptions reads words: mesh=off, bin=FOLDER, trust-domain=NAME, cni-timeout=TIME,
// and ROLE.FLAG=VALUE for a flag of a process of Tacit, such as proxy.dial-timeout=2s.
func ParseOptions(words []string) (Options, error) {
	o := Options{Mesh: true, CNITimeout: 30 * time.Second, Flags: map[string][]string{}}
	var errs []error
	for _, w := range words {
		key, value, ok := strings.Cut(w, "=")
		role, flag, dotted := strings.Cut(key, ".")
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("option %q: want KEY=VALUE", w))
		case dotted && slices.Contains(roles, role):
			o.Flags[role] = append(o.Flags[role], "--"+flag+"="+value)
		case key == "mesh" && (value == "on" || value == "off"):
			o.Mesh = value == "on"
		case key == "bin":
			o.Bin = value
		case key == "trust-domain":
			o.TrustDomain = value
		case key == "cni-timeout":
			var err error
			o.CNITimeout, err = time.ParseDuration(value)
			errs = append(errs, err)
		default:
			errs = append(errs, fmt.Errorf("option %q: want mesh=on|off, bin=FOLDER, trust-domain=NAME, cni-timeout=TIME or %s.FLAG=VALUE",
				w, strings.Join(roles, "|")))
		}
	}
	program, err := os.Executable()
	errs = append(errs, err)
	o.Bin = cmp.Or(o.Bin, filepath.Dir(program))
	o.TrustDomain = cmp.Or(o.TrustDomain, "lab")
	return o, errors.Join(errs...)
}

// programs are those of Tacit that a lab runs.
var programs = []string{"tacit-control", "tacit-node", "tacit-cni"}

// placePrograms finds out before anything starts whether Tacit is there, and
// makes its programs reachable for every user of the lab: their own folder may be
// in somebody's home.
func (o *Options) placePrograms() error {
	const dir = "/run/bin"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, p := range programs {
		from, to := filepath.Join(o.Bin, p), filepath.Join(dir, p)
		if _, err := os.Stat(from); err != nil {
			return fmt.Errorf("%w: build it (make build), say where it is (bin=FOLDER), or do without (mesh=off)", err)
		}
		err := os.WriteFile(to, nil, 0o755)
		if err == nil {
			err = unix.Mount(from, to, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("bind %s to %s: %w", from, to, err)
		}
	}
	o.Bin = dir
	return nil
}
