package redirect

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tacit.dev/mesh"
)

var update = flag.Bool("update", false, "write testdata/*.nft anew")

func configs() map[string]Config {
	return map[string]Config{
		"capture":    {},
		"drain":      {Drain: true, ExcludeInbound: []uint16{22}},
		"drain-kept": {Drain: true, kept: true},
		"exclude": {
			ExcludeOutbound: []mesh.Exclusion{
				{Prefix: netip.MustParsePrefix("10.1.2.3/8")},
				{Prefix: netip.MustParsePrefix("169.254.169.254/32"), Port: 80},
				{Prefix: netip.MustParsePrefix("fd00:9::/64"), Port: 443},
				{Port: 25},
				{}, // everything: refused
			},
			ExcludeInbound: []uint16{22, 9090},
		},
		"kept": {kept: true},
		"own": {
			Own: []netip.Addr{netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00::2")},
		},
		"probes": {
			ProbePorts: []uint16{8080, 9090},
			node:       []netip.Addr{netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("fd00::1")},
		},
	}
}

func TestRuleset(t *testing.T) {
	for name, c := range configs() {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join("testdata", name+".nft")
			got := Ruleset(c)
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("%s (-want +got):\n%s", file, d)
			}
		})
	}
}
