package cluster

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"slices"
	"testing"

	"tacit.dev/e2e/machine"
)

func parsePEM(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("no PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

func TestParseHierarchies(t *testing.T) {
	const mountinfo = `24 1 0:22 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
25 24 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct
26 24 0:24 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
27 24 0:25 / /sys/fs/cgroup/systemd rw,relatime - cgroup systemd rw,xattr,release_agent=/lib/x,name=systemd
28 24 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
29 24 0:24 / /var/elsewhere/memory rw,relatime - cgroup cgroup rw,memory
`
	want := []machine.Hierarchy{{Name: "cpu,cpuacct", Options: "cpu,cpuacct"}, {Name: "memory", Options: "memory"},
		{Name: "systemd", Options: "none,name=systemd"}}
	if got := parseHierarchies(mountinfo); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestCNIConfigIsJSON: the template writes commas between ranges by hand.
func TestCNIConfigIsJSON(t *testing.T) {
	for _, s := range []settings{
		{Ranges: []string{"10.244.1.0/24"}, DefaultRoutes: []string{"0.0.0.0/0"}},
		{Ranges: []string{"10.244.1.0/24", "fd00:10:244:1::/64"}, DefaultRoutes: []string{"0.0.0.0/0", "::/0"}},
	} {
		text, err := render(cniConfig, s)
		if err != nil {
			t.Fatal(err)
		}
		var parsed struct {
			Plugins []struct {
				IPAM struct{ Ranges [][]struct{ Subnet string } }
			}
		}
		if err := json.Unmarshal([]byte(text), &parsed); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		if got := len(parsed.Plugins[0].IPAM.Ranges); got != len(s.Ranges) {
			t.Errorf("%d ranges, want %d", got, len(s.Ranges))
		}
	}
}

func TestAddresses(t *testing.T) {
	dual := Options{DualStack: true}
	if got, want := addresses(dual.nodeAddresses(2)), "172.30.0.12,fd00:172:30::c"; got != want {
		t.Errorf("node 2 has %s, want %s", got, want)
	}
	if got, want := (Options{}).nodePodCIDRs(3)[0].String(), "10.244.3.0/24"; got != want {
		t.Errorf("pods of node 3 have %s, want %s", got, want)
	}
}
