package build

import (
	"errors"
	"os/exec"
	"strings"
)

// need is a program and the Debian package that has it.
type need struct{ program, pkg string }

// toRun is what a node takes from the machine's /usr: kube-proxy and portmap call
// nft, the kubelet calls mount.
func toRun() []need { return []need{{"nft", "nftables"}, {"mount", "mount"}} }

// toBuild is what runc needs: it is C where it enters namespaces, and libseccomp.
func toBuild() []need { return []need{{"gcc", "gcc libc6-dev"}, {"pkg-config", "pkg-config"}} }

// Packages names what is missing on this machine to run a cluster.
func Packages() error { return missing(toRun(), "") }

func buildPackages() error {
	if err := missing(toBuild(), ""); err != nil {
		return err
	}
	if exec.Command("pkg-config", "--exists", "libseccomp").Run() != nil {
		return missing(nil, "libseccomp-dev")
	}
	return nil
}

func missing(needs []need, also string) error {
	var names []string
	for _, n := range needs {
		if !found(n.program) {
			names = append(names, n.pkg)
		}
	}
	if also != "" {
		names = append(names, also)
	}
	if names == nil {
		return nil
	}
	return errors.New("packages are missing; as root: apt-get install " + strings.Join(names, " "))
}

// found looks in /usr/sbin too, which is not in every user's PATH.
func found(program string) bool {
	for _, p := range []string{program, "/usr/sbin/" + program} {
		if _, err := exec.LookPath(p); err == nil {
			return true
		}
	}
	return false
}
