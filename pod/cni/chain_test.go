package cni

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	aList = `{"cniVersion":"1.0.0","name":"net","disableCheck":true,"plugins":[{"type":"ptp","mtu":1500},{"type":"portmap","capabilities":{"portMappings":true}}]}`
	aConf = `{"cniVersion":"0.4.0","name":"net","type":"bridge","ipam":{"type":"host-local"}}`
)

// node is a folder of network configurations.
type node struct {
	t     *testing.T
	chain Chain
}

func newNode(t *testing.T) *node {
	return &node{t, Chain{Dir: t.TempDir(), Plugin: map[string]any{"agent": "/run/tacit/cni.sock"}}}
}

func (n *node) put(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.chain.Dir, name), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) remove(name string) {
	n.t.Helper()
	if err := os.Remove(filepath.Join(n.chain.Dir, name)); err != nil {
		n.t.Fatal(err)
	}
}

// sync expects to follow base, what was followed before being away for long, and tells whether anything changed.
func (n *node) sync(base string) (changed bool) {
	n.t.Helper()
	got, changed, err := n.chain.Sync(true)
	if err != nil || got != base {
		n.t.Fatalf("follows %q, %v: want %q", got, err, base)
	}
	return changed
}

// taken is what the runtime takes: the first by name. It tells the file and the types
// of its plugins.
func (n *node) taken() string {
	n.t.Helper()
	entries, err := os.ReadDir(n.chain.Dir)
	if err != nil || len(entries) == 0 {
		n.t.Fatalf("%d files, %v", len(entries), err)
	}
	text, err := os.ReadFile(filepath.Join(n.chain.Dir, entries[0].Name()))
	if err != nil {
		n.t.Fatal(err)
	}
	var l struct {
		CNIVersion, Name string
		Plugins          []struct{ Type, Agent string }
	}
	if err := json.Unmarshal(text, &l); err != nil {
		n.t.Fatal(err)
	}
	words := []string{entries[0].Name(), l.CNIVersion, l.Name}
	for _, p := range l.Plugins {
		words = append(words, p.Type+p.Agent)
	}
	return strings.Join(words, " ")
}

func (n *node) takes(want string) {
	n.t.Helper()
	if got := n.taken(); got != want {
		n.t.Errorf("the runtime takes %q, want %q", got, want)
	}
}

func TestChainFollowsTheFirstFile(t *testing.T) {
	n := newNode(t)
	n.put("10-net.conflist", aList)
	n.put("20-other.conf", aConf)
	n.put("05-notes.txt", "not a configuration")
	n.sync("10-net.conflist")
	n.takes("00-multus-tacit.conflist 1.0.0 net ptp portmap tacit-cni/run/tacit/cni.sock")
	if n.sync("10-net.conflist") {
		t.Error("written again though nothing has changed")
	}
	n.put("10-net.conflist", strings.Replace(aList, `"ptp"`, `"bridge"`, 1))
	n.sync("10-net.conflist")
	n.takes("00-multus-tacit.conflist 1.0.0 net bridge portmap tacit-cni/run/tacit/cni.sock")
	n.remove("10-net.conflist")
	n.sync("20-other.conf")
	n.takes("00-multus-tacit.conflist 0.4.0 net bridge tacit-cni/run/tacit/cni.sock")
	n.remove("00-multus-tacit.conflist")
	if !n.sync("20-other.conf") {
		t.Error("not put back")
	}
}

func TestChainLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.put("10-net.conflist", aList)
	n.sync("10-net.conflist")
	if changed, err := n.chain.Remove(); !changed || err != nil {
		t.Errorf("removed %v, %v", changed, err)
	}
	n.takes("10-net.conflist 1.0.0 net ptp portmap")
	n.takes("10-net.conflist 1.0.0 net ptp portmap")
	if entries, _ := os.ReadDir(n.chain.Dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	empty := newNode(t)
	if _, changed, err := empty.chain.Sync(true); changed || !errors.Is(err, errNoBase) || errors.Is(err, ErrAway) {
		t.Errorf("changed %v, %v: want nothing written", changed, err)
	}
}

func TestChainIsNeverTwice(t *testing.T) {
	n := newNode(t)
	n.put("10-net.conflist", aList)
	n.sync("10-net.conflist")
	n.put("10-net.conflist", strings.Replace(aList, `{"type":"portmap"`, `{"type":"tacit-cni"},{"type":"portmap"`, 1))
	n.sync("10-net.conflist")
	n.takes("10-net.conflist 1.0.0 net ptp tacit-cni portmap")
}

func TestChainSortsFirst(t *testing.T) {
	n := newNode(t)
	n.put("10-net.conflist", aList)
	n.sync("10-net.conflist")
	n.put("00-multus.conf", aConf)
	n.sync("00-multus.conf")
	n.takes("00-multus-tacit.conflist 0.4.0 net bridge tacit-cni/run/tacit/cni.sock")
	n.put("00-early.conf", aConf)
	n.sync("00-early.conf")
	n.takes("00-00-tacit.conflist 0.4.0 net bridge tacit-cni/run/tacit/cni.sock")
	n.remove("00-early.conf")
	n.remove("00-multus.conf")
	n.sync("10-net.conflist")
	n.takes("00-multus-tacit.conflist 1.0.0 net ptp portmap tacit-cni/run/tacit/cni.sock")
	n.put("!.conf", aConf)
	if _, _, err := n.chain.Sync(true); !errors.Is(err, errNoPlace) {
		t.Errorf("%v: want that no name sorts before", err)
	}
}

// Files that the runtime cannot read either are passed over.
func TestChainPassesOverGarbage(t *testing.T) {
	for _, text := range []string{"", "{", "[]", "{}", `{"plugins":[]}`, `{"plugins":3}`, `"x"`} {
		n := newNode(t)
		n.put("01-bad.conflist", text)
		n.put("10-net.conflist", aList)
		n.sync("10-net.conflist")
	}
}

func TestInstall(t *testing.T) {
	from, dir := filepath.Join(t.TempDir(), "plugin"), t.TempDir()
	for _, text := range []string{"one", "another"} {
		if err := os.WriteFile(from, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, want := range []bool{true, false} {
			if changed, err := Install(from, dir); changed != want || err != nil {
				t.Errorf("changed %v, %v: want %v", changed, err, want)
			}
		}
		info, err := os.Stat(filepath.Join(dir, PluginType))
		if err != nil || info.Mode().Perm() != 0o755 || info.Size() != int64(len(text)) {
			t.Errorf("%v, %v: want %d bytes that may be run", info, err, len(text))
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	if _, err := Install(from+"-nowhere", dir); err == nil {
		t.Error("installed from nowhere")
	}
}

func FuzzParseConf(f *testing.F) {
	f.Add([]byte(aList))
	f.Add([]byte(aConf))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := parseConf(text)
		if err != nil {
			return
		}
		out, err := Chain{Plugin: map[string]any{"agent": "a"}}.extend("base", l)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseConf(out)
		if err != nil || len(again.plugins) != len(l.plugins)+1 || !holdsPlugin(again.plugins) {
			t.Errorf("%d plugins, %v", len(again.plugins), err)
		}
	})
}

const (
	calico = `{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"calico"},{"type":"portmap"}]}`
	dir    = "/host/etc/cni/net.d/"
)

func shim(to string) string {
	return `{"cniVersion":"1.0.0","name":"multus","type":"multus-shim","clusterNetwork":"` + dir + to + `"}`
}

// multus is Multus in the folder of a node: its daemon, which writes where the configuration
// is that it delegates to, or the one without a daemon, which writes what is in it.
type multus struct {
	*node
	thin bool
}

// starts does what Multus does first: it takes the first configuration that is not its own.
func (m multus) starts() {
	m.t.Helper()
	entries, err := os.ReadDir(m.chain.Dir)
	if err != nil {
		m.t.Fatal(err)
	}
	skip := "00-multus" // findMasterPlugin in its pkg/server/config
	if m.thin {
		skip = "00-multus.conf" // its cmd/thin_entrypoint
	}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext != ".conf" && ext != ".conflist" || strings.HasPrefix(e.Name(), skip) {
			continue
		}
		text := shim(e.Name())
		if m.thin {
			found, err := os.ReadFile(filepath.Join(m.chain.Dir, e.Name()))
			if err != nil {
				m.t.Fatal(err)
			}
			text = `{"cniVersion":"1.0.0","name":"multus","type":"multus","delegates":[` + string(found) + `]}`
		}
		m.put("00-multus.conf", text)
		return
	}
	m.t.Fatal("no configuration for Multus")
}

// check says what the runtime takes: once our plugin, at its end, and before it a Multus
// that delegates to Calico without it.
func (m multus) check(when string) {
	m.t.Helper()
	entries, err := os.ReadDir(m.chain.Dir)
	if err != nil {
		m.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(m.chain.Dir, entries[0].Name()))
	if err != nil {
		m.t.Fatal(err)
	}
	s := string(text)
	if strings.Count(s, PluginType) != 1 || !slices.Contains(ownFiles[:written], entries[0].Name()) {
		m.t.Fatalf("%s: the runtime takes %s: %s: want our plugin once", when, entries[0].Name(), s)
	}
	if !strings.Contains(s, "calico") {
		m.t.Fatalf("%s: Calico is lost: %s", when, s)
	}
	if strings.Count(s, `"delegates"`)+strings.Count(s, `"clusterNetwork"`) > 1 || strings.Contains(s, "tacit.conflist") {
		m.t.Fatalf("%s: a circle: %s", when, s)
	}
}

// Multus starts, is killed and ends in any order with ours: never a circle, never twice,
// never without our plugin.
func TestMultusInAnyOrder(t *testing.T) {
	for _, thin := range []bool{false, true} {
		for _, steps := range [][]string{
			{"sync", "start", "sync", "start", "sync", "start", "sync"},                    // killed and started again
			{"start", "sync", "start", "sync", "end", "sync", "start", "sync"},             // ends in order
			{"sync", "start", "start", "end", "start", "sync", "end", "sync", "sync"},      // while no agent is there
			{"legacy", "start", "sync", "start", "sync", "end", "sync"},                    // an earlier version's file
			{"start", "legacy", "start", "sync", "end", "start", "sync", "start", "sync"},  // and with Multus before it
			{"start", "sync", "remove", "end", "sync", "start", "sync", "rewrite", "sync"}, // somebody removes ours
		} {
			m := multus{newNode(t), thin}
			m.put("10-calico.conflist", calico)
			m.put("87-podman.conflist", strings.ReplaceAll(calico, "calico", "bridge"))
			for i, step := range steps {
				switch step {
				case "start":
					m.starts()
				case "end":
					m.remove("00-multus.conf")
				case "legacy":
					m.put("00-tacit.conflist", strings.Replace(calico, `{"type":"portmap"}`, `{"type":"portmap"},{"type":"tacit-cni"}`, 1))
				case "remove":
					if _, err := m.chain.Remove(); err != nil {
						t.Fatal(err)
					}
				case "rewrite":
					m.put("10-calico.conflist", strings.Replace(calico, "portmap", "bandwidth", 1))
				case "sync":
					if _, _, err := m.chain.Sync(true); err != nil {
						t.Fatalf("thin %v, %v at %d: %v", thin, steps, i, err)
					}
					m.check(strings.Join(steps[:i+1], ", "))
				}
			}
		}
	}
}

// Where there is nothing else to delegate to, what was written stays.
func TestMultusAlone(t *testing.T) {
	n := newNode(t)
	n.put("10-calico.conflist", calico)
	n.put("00-multus.conf", shim("10-calico.conflist"))
	n.sync("00-multus.conf")
	before := n.taken()
	n.put("00-multus.conf", shim("00-00-tacit.conflist"))
	n.remove("10-calico.conflist")
	if _, changed, err := n.chain.Sync(true); changed || !errors.Is(err, errCircle) {
		t.Errorf("changed %v, %v: want %v", changed, err, errCircle)
	}
	n.takes(before)
}

// A configuration that is away, empty or half written: ours stays as it was, and another
// one is followed only if that lasts.
func TestChainStaysWhileItsBaseIsAway(t *testing.T) {
	for name, other := range map[string]bool{"alone": false, "beside another": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.put("10-net.conflist", aList)
			if other {
				n.put("20-other.conf", aConf)
			}
			n.sync("10-net.conflist")
			want := n.taken()
			for _, text := range []string{"-", "", aList[:1], aList[:len(aList)/2], aList[:len(aList)-1], "-"} {
				if text == "-" {
					n.remove("10-net.conflist")
				} else {
					n.put("10-net.conflist", text)
				}
				if base, changed, err := n.chain.Sync(false); changed || base != "10-net.conflist" || !errors.Is(err, ErrAway) {
					t.Errorf("%.20q: follows %s, changed %v, %v: want all as it was", text, base, changed, err)
				}
				n.takes(want)
			}
			base, changed, err := n.chain.Sync(true)
			if other && (base != "20-other.conf" || err != nil) || !other && (changed || !errors.Is(err, ErrAway)) {
				t.Errorf("after long: follows %s, changed %v, %v", base, changed, err)
			}
			n.put("10-net.conflist", aList)
			if got, _, err := n.chain.Sync(false); got != "10-net.conflist" || err != nil {
				t.Errorf("follows %s, %v: want what is there again", got, err)
			}
			n.takes(want)
		})
	}
}

// A base in a version that knows of no chains keeps it.
func TestOldVersionsOfTheBase(t *testing.T) {
	for _, v := range []string{`"cniVersion":"0.1.0",`, `"cniVersion":"0.2.0",`, `"cniVersion":"0.3.0",`, ""} {
		n := newNode(t)
		n.put("10-net.conf", `{`+v+`"name":"net","type":"bridge"}`)
		n.sync("10-net.conf")
		if got := n.taken(); !strings.HasPrefix(got, "00-multus-tacit.conflist "+strings.Trim(strings.TrimPrefix(v, `"cniVersion":`), `",`)+" net bridge tacit-cni") {
			t.Errorf("%s: the runtime takes %q", v, got)
		}
	}
}
