package agent

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/cni"
	"tacit.dev/wire/finding"
	"tacit.dev/wire/xds"
)

// lacks joins what is wrong.
func lacks(all []finding.Finding) string {
	var b strings.Builder
	for _, f := range all {
		if f.Lacks != "" {
			b.WriteString(f.What + ": " + f.Lacks + "\n")
		}
	}
	return b.String()
}

// likeNode is a Config of a node with one running pod.
func likeNode(t *testing.T) Config {
	t.Helper()
	c := Config{RunDir: filepath.Join(t.TempDir(), "run"), Proc: t.TempDir(), Chain: cni.Chain{Dir: t.TempDir()}, ProgramDir: t.TempDir()}
	conf := `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ptp"},{"type":"portmap"}]}`
	if err := os.WriteFile(filepath.Join(c.Chain.Dir, "10-net.conflist"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Program = filepath.Join(t.TempDir(), cni.PluginType)
	if err := os.WriteFile(c.Program, []byte("a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestExamineFindsWhatIsThere(t *testing.T) {
	all := Examine(t.Context(), likeNode(t))
	if l := lacks(all); l != "" {
		t.Errorf("lacking: %s", l)
	}
	for _, f := range all {
		if f.What == "network" && f.Found != "10-net.conflist (ptp, portmap)" {
			t.Errorf("network: %q", f.Found)
		}
	}
}

func TestExamineFindsWhatIsLacking(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(*testing.T, *Config)
		want  string
	}{
		"no network":     {func(_ *testing.T, c *Config) { c.Chain.Dir = filepath.Join(c.Chain.Dir, "none") }, "network: "},
		"no folder":      {func(_ *testing.T, c *Config) { c.ProgramDir = filepath.Join(c.ProgramDir, "none") }, "folder of plugins: "},
		"no nft":         {func(t *testing.T, _ *Config) { withoutNft(t) }, "rules: "},
		"no processes":   {func(_ *testing.T, c *Config) { c.Proc = filepath.Join(c.Proc, "none") }, "running pods: "},
		"another plugin": {func(t *testing.T, c *Config) { putMesh(t, c.Chain.Dir) }, "other meshes: plugin istio-cni in 05-mesh.conflist"},
	} {
		t.Run(name, func(t *testing.T) {
			c := likeNode(t)
			tt.spoil(t, &c)
			all := Examine(t.Context(), c)
			if l := lacks(all); !strings.HasPrefix(l, tt.want) || strings.Count(l, "\n") != 1 {
				t.Errorf("lacking: %q, want %q alone", l, tt.want)
			}
			for _, f := range all {
				if f.Lacks != "" && f.Remedy == "" {
					t.Errorf("%s has no remedy", f.What)
				}
			}
		})
	}
}

// withoutNft puts a program that fails in nft's place, as on a kernel without nf_tables.
func withoutNft(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	script := "#!/bin/sh\necho 'Error: Could not process rule: Operation not supported' >&2\nexit 1\n"
	if err := os.WriteFile(filepath.Join(dir, "nft"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func putMesh(t *testing.T, dir string) {
	t.Helper()
	conf := `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ptp"},{"type":"istio-cni"}]}`
	if err := os.WriteFile(filepath.Join(dir, "05-mesh.conflist"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
}

// What an agent has left is removed: plugin, chain, rules, folder.
func TestSweepLeavesNothing(t *testing.T) {
	const uid = "11111111-2222-3333-4444-555555555555"
	c := likeNode(t)
	n := startNode(t, c.RunDir, func(own *Config) {
		own.Proc, own.Chain, own.Program, own.ProgramDir = c.Proc, c.Chain, c.Program, c.ProgramDir
	})
	p := dialProxy(t, n.dir, nil)
	n.agent.Apply([]mesh.Pod{word(uid, true)})
	ns, path := namespace(t, "a")
	putProcess(t, c.Proc, 7, "/kubepods/besteffort/pod"+uid+"/"+strings.Repeat("a", 64), path)
	n.reports.until(t, uid, xds.Captured)

	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if l := lacks(Sweep(short, c)); !strings.HasPrefix(l, "agent: ") {
		t.Errorf("with an agent that runs: %q, want that it is refused", l)
	}
	isCaptured(t, ns)
	ending := make(chan struct{})
	go func() { // an agent that is about to end is waited for
		defer close(ending)
		n.stop()
		p.kill()
	}()
	for range 2 { // it may be called again
		if l := lacks(Sweep(t.Context(), c)); l != "" {
			t.Errorf("lacking: %s", l)
		}
	}
	<-ending
	isClean(t, ns)
	for _, path := range []string{c.RunDir, filepath.Join(c.Chain.Dir, "00-multus-tacit.conflist"), filepath.Join(c.ProgramDir, cni.PluginType)} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left (%v)", path, err)
		}
	}
	if _, err := os.Stat(filepath.Join(c.Chain.Dir, "10-net.conflist")); err != nil {
		t.Error(err)
	}
}
