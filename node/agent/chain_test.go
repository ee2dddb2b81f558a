package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/cni"
)

// folder is a node's folder of network configurations.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	putConf(t, dir, "1500")
	return dir
}

func putConf(t *testing.T, dir, mtu string) {
	t.Helper()
	conf := `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ptp","mtu":` + mtu + `}]}`
	if err := os.WriteFile(filepath.Join(dir, "10-net.conflist"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
}

// holds waits until a file holds all words, and says how long that took.
func holds(t *testing.T, file string, words ...string) time.Duration {
	t.Helper()
	began := time.Now()
	for time.Since(began) < limit {
		b, err := os.ReadFile(file)
		missing := 0
		for _, w := range words {
			if !strings.Contains(string(b), w) {
				missing++
			}
		}
		if err == nil && missing == 0 {
			return time.Since(began)
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("%s does not hold %q", file, words)
	return 0
}

// Another plugin replaces or removes what the agent has put in place.
func TestPluginStaysInTheChain(t *testing.T) {
	dir := folder(t)
	own := filepath.Join(dir, "00-tacit.conflist")
	n := startNode(t, t.TempDir(), func(c *Config) { c.Chain.Dir, c.Exempt = dir, []string{"kube-system"} })
	holds(t, own, "ptp", "1500", cni.PluginType, filepath.Join(n.dir, "cni.sock"), filepath.Join(dir, cni.NamespacesName), "kube-system")
	quickest := make(map[string]time.Duration)
	within := func(what string, took time.Duration) {
		if best, ok := quickest[what]; !ok || took < best {
			quickest[what] = took
		}
	}
	for i, mtu := range []string{"1400", "1300", "1200"} {
		putConf(t, dir, mtu)
		within("a changed file", holds(t, own, "ptp", mtu, cni.PluginType))
		if err := os.Remove(own); err != nil {
			t.Fatal(err)
		}
		within("a removed file", holds(t, own, "ptp", mtu, cni.PluginType))
		foreign := filepath.Join(dir, []string{"05-a.conf", "04-b.conf", "03-c.conf"}[i])
		if err := os.WriteFile(foreign+".tmp", []byte(`{"cniVersion":"0.4.0","name":"other","type":"bridge"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(foreign+".tmp", foreign); err != nil {
			t.Fatal(err)
		}
		within("a new first file", holds(t, own, "bridge", cni.PluginType))
		if err := os.Remove(foreign); err != nil {
			t.Fatal(err)
		}
		within("the file before", holds(t, own, "ptp", cni.PluginType))
	}
	n.stop()
	holds(t, own, cni.PluginType)
	// A busy machine can delay one, but not each time.
	for what, took := range quickest {
		if took > time.Second {
			t.Errorf("%s: followed after %v at best, want 1 s at most", what, took)
		}
	}
}

// What the plugin needs to know without an agent is kept, and put back.
func TestEnrolledNamespacesAreKept(t *testing.T) {
	dir := folder(t)
	file := filepath.Join(dir, cni.NamespacesName)
	n := startNode(t, t.TempDir(), func(c *Config) { c.Chain.Dir = dir })
	holds(t, filepath.Join(dir, "00-tacit.conflist"), cni.PluginType)
	if _, err := os.Stat(file); err == nil {
		t.Error("there before control has told")
	}
	n.agent.ApplyNamespaces([]string{"shop"})
	holds(t, file, `"shop"`)
	n.agent.ApplyNamespaces([]string{"shop", "bank"})
	holds(t, file, `"shop"`, `"bank"`)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	holds(t, file, `"shop"`, `"bank"`)
}

// While control is silent a pod begins if its namespace has no enrolled pods.
func TestPodsOfOtherNamespacesBeginWithoutControl(t *testing.T) {
	dir := folder(t)
	n := startNode(t, t.TempDir(), func(c *Config) { c.Chain.Dir, c.WordPatience = dir, 50*time.Millisecond })
	p := dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	add := addOf("a", path)
	add.Timeout = 1500 * time.Millisecond
	refused := func(why string) {
		t.Helper()
		if err := n.ask(add); err == nil || !strings.Contains(err.Error(), "control has not told") {
			t.Errorf("%s: %v, want that control has not told", why, err)
		}
	}
	refused("nothing is known")
	n.agent.ApplyNamespaces([]string{"default"})
	holds(t, filepath.Join(dir, cni.NamespacesName), "default")
	refused("enrolled")
	n.agent.ApplyNamespaces([]string{"other"})
	holds(t, filepath.Join(dir, cni.NamespacesName), "other")
	if err := n.ask(add); err != nil {
		t.Fatal(err)
	}
	isClean(t, ns)
	n.agent.Apply([]mesh.Pod{word("a", true)}) // its own label, as it turns out
	n.untilState("a", "captured")
	p.until(t, "the proxy serves it", func() bool { return len(p.pods["a"].files) == 4 })
}

// A sandbox that began without us is none of our business, unless it is enrolled.
func TestCheckOfAStranger(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	check := addOf("a", "/run/netns/a")
	check.Command = cni.Check
	if err := n.ask(check); err != nil {
		t.Error(err)
	}
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(check); err == nil || !strings.Contains(err.Error(), "does not know") {
		t.Errorf("enrolled: %v", err)
	}
}
