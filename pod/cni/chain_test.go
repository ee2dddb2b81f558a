package cni

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
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

// sync expects to follow base, and tells whether anything changed.
func (n *node) sync(base string) (changed bool) {
	n.t.Helper()
	got, changed, err := n.chain.Sync()
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
	n.takes("00-tacit.conflist 1.0.0 net ptp portmap tacit-cni/run/tacit/cni.sock")
	if n.sync("10-net.conflist") {
		t.Error("written again though nothing has changed")
	}
	n.put("10-net.conflist", strings.Replace(aList, `"ptp"`, `"bridge"`, 1))
	n.sync("10-net.conflist")
	n.takes("00-tacit.conflist 1.0.0 net bridge portmap tacit-cni/run/tacit/cni.sock")
	n.remove("10-net.conflist")
	n.sync("20-other.conf")
	n.takes("00-tacit.conflist 0.4.0 net bridge tacit-cni/run/tacit/cni.sock")
	n.remove("00-tacit.conflist")
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
	n.sync("10-net.conflist")
	n.remove("10-net.conflist")
	if _, changed, err := n.chain.Sync(); !changed || !errors.Is(err, errNoBase) {
		t.Errorf("changed %v, %v: want our file removed, and that there is no other", changed, err)
	}
	if entries, _ := os.ReadDir(n.chain.Dir); len(entries) > 0 {
		t.Errorf("left: %v", entries)
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
	n.takes("00-00-tacit.conflist 0.4.0 net bridge tacit-cni/run/tacit/cni.sock")
	n.remove("00-multus.conf")
	n.sync("10-net.conflist")
	n.takes("00-tacit.conflist 1.0.0 net ptp portmap tacit-cni/run/tacit/cni.sock")
	n.put("!.conf", aConf)
	if _, _, err := n.chain.Sync(); !errors.Is(err, errNoPlace) {
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
		out, err := Chain{Plugin: map[string]any{"agent": "a"}}.extend(l)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseConf(out)
		if err != nil || len(again.plugins) != len(l.plugins)+1 || !holdsPlugin(again.plugins) {
			t.Errorf("%d plugins, %v", len(again.plugins), err)
		}
	})
}
