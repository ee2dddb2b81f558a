package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pause"
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
	own := filepath.Join(dir, "00-multus-tacit.conflist")
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
		within("the file before", holds(t, own, "ptp", cni.PluginType)-chainPatience)
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

// takes looks at a folder as a runtime does, again and again: the first configuration by
// name that can be read is what a pod that begins now gets.
func takes(ctx context.Context, dir string, bare *[]string) {
	for ctx.Err() == nil {
		entries, err := os.ReadDir(dir)
		for _, e := range entries {
			var l struct {
				Plugins []struct{ Type string }
			}
			text, rerr := os.ReadFile(filepath.Join(dir, e.Name()))
			if ext := filepath.Ext(e.Name()); err != nil || rerr != nil || ext != ".conf" && ext != ".conflist" || json.Unmarshal(text, &l) != nil || len(l.Plugins) == 0 {
				continue
			}
			ours := 0
			for _, p := range l.Plugins {
				if p.Type == cni.PluginType {
					ours++
				}
			}
			if ours != 1 && len(*bare) < 10 {
				*bare = append(*bare, fmt.Sprintf("%s with the plugin %d times", e.Name(), ours))
			}
			break
		}
	}
}

// However a CNI writes its file anew, at no moment does the runtime take it without us.
func TestChainIsNeverBare(t *testing.T) {
	dir := folder(t)
	own, base := filepath.Join(dir, "00-multus-tacit.conflist"), filepath.Join(dir, "10-net.conflist")
	startNode(t, t.TempDir(), func(c *Config) { c.Chain.Dir = dir })
	holds(t, own, "1500", cni.PluginType)
	ctx, cancel := context.WithCancel(t.Context())
	var bare []string
	var looking sync.WaitGroup
	looking.Go(func() { takes(ctx, dir, &bare) })
	defer looking.Wait()
	defer cancel()
	for _, gap := range []time.Duration{0, 50 * time.Millisecond, 600 * time.Millisecond} {
		for how, write := range map[string]func(text string) error{
			"rename over": func(text string) error {
				return errors.Join(os.WriteFile(base+".tmp", []byte(text), 0o600), os.Rename(base+".tmp", base))
			},
			"truncate and write": func(text string) error {
				f, err := os.OpenFile(base, os.O_WRONLY|os.O_TRUNC, 0)
				if err != nil {
					return err
				}
				defer f.Close()
				pause.For(ctx, gap)
				_, err = f.WriteString(text[:len(text)/2])
				pause.For(ctx, gap)
				_, err2 := f.WriteString(text[len(text)/2:])
				return errors.Join(err, err2)
			},
			"remove and create": func(text string) error {
				err := os.Remove(base)
				pause.For(ctx, gap)
				return errors.Join(err, os.WriteFile(base, []byte(text), 0o600))
			},
		} {
			mtu := fmt.Sprint(1000 + rand.N(400))
			if err := write(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ptp","mtu":` + mtu + `}]}`); err != nil {
				t.Fatal(err)
			}
			holds(t, own, mtu, cni.PluginType)
			t.Logf("%s, gap %v: followed", how, gap)
		}
	}
	cancel()
	looking.Wait()
	if len(bare) > 0 {
		t.Errorf("the runtime took %v", bare)
	}
}

// What the plugin needs to know without an agent is kept, and put back.
func TestEnrolledNamespacesAreKept(t *testing.T) {
	dir := folder(t)
	file := filepath.Join(dir, cni.NamespacesName)
	n := startNode(t, t.TempDir(), func(c *Config) { c.Chain.Dir = dir })
	holds(t, filepath.Join(dir, "00-multus-tacit.conflist"), cni.PluginType)
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
