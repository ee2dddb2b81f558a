package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const result = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.1.2.3/24"},{"address":"fd00::3/64"}]}`

// an agent that answers.
type agent struct {
	path string
	mu   sync.Mutex
	got  []Request
	say  func(context.Context, Request) error
}

func startAgent(t *testing.T, say func(context.Context, Request) error) *agent {
	t.Helper()
	a := &agent{path: filepath.Join(t.TempDir(), "cni.sock"), say: say}
	l, err := Listen(a.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, a.handle) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return a
}

func (a *agent) handle(ctx context.Context, r Request) error {
	a.mu.Lock()
	a.got = append(a.got, r)
	a.mu.Unlock()
	if a.say == nil {
		return nil
	}
	return a.say(ctx, r)
}

// run runs the plugin with the environment of a runtime, changed by env.
func run(t *testing.T, stdin string, env ...string) (code int, out Error, raw string) {
	t.Helper()
	e := map[string]string{
		"CNI_CONTAINERID": "box", "CNI_NETNS": "/run/netns/a", "CNI_IFNAME": "eth0",
		"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=box;K8S_POD_UID=u-1",
	}
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		e[k] = v
	}
	var stdout, stderr bytes.Buffer
	p := Plugin{Env: func(k string) string { return e[k] }, Stdin: strings.NewReader(stdin), Stdout: &stdout, Stderr: &stderr}
	code = p.Run(t.Context())
	if stdout.Len() > 0 {
		if err := json.Unmarshal(stdout.Bytes(), &out); err != nil {
			t.Fatalf("output %q: %v", stdout.String(), err)
		}
	}
	return code, out, stdout.String()
}

func conf(agent, more string) string {
	return `{"cniVersion":"1.0.0","name":"net","type":"tacit-cni","agent":"` + agent + `"` + more + `}`
}

func TestAdd(t *testing.T) {
	a := startAgent(t, nil)
	code, _, out := run(t, conf(a.path, `,"timeout":"7s","prevResult":`+result), "CNI_COMMAND=ADD")
	if code != 0 || strings.TrimSpace(out) != result {
		t.Errorf("exit %d, output %s: want 0 and the result as it came", code, out)
	}
	want := []Request{{
		Command: Add, ContainerID: "box", Netns: "/run/netns/a", IfName: "eth0",
		Namespace: "default", Name: "web-0", UID: "u-1", Timeout: 7 * time.Second,
		Addresses: []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00::3")},
	}}
	a.mu.Lock()
	defer a.mu.Unlock()
	if d := cmp.Diff(want, a.got, cmpopts.EquateComparable(netip.Addr{})); d != "" {
		t.Errorf("the agent is asked (-want +got):\n%s", d)
	}
}

func TestRefusalsAreTold(t *testing.T) {
	a := startAgent(t, func(context.Context, Request) error { return errors.New("no certificate") })
	typed := startAgent(t, func(context.Context, Request) error { return &Error{Code: CodeTryAgain, Msg: "not yet"} })
	full := `,"prevResult":` + result
	for name, c := range map[string]struct {
		stdin, env string
		code       int
		text       string
	}{
		"the agent's no":       {conf(a.path, full), "CNI_COMMAND=ADD", CodeTryAgain, "no certificate"},
		"the agent's own code": {conf(typed.path, full), "CNI_COMMAND=ADD", CodeTryAgain, "not yet"},
		"no agent":             {conf("/nowhere", `,"timeout":"300ms"`+full), "CNI_COMMAND=ADD", CodeTryAgain, "does not answer"},
		"no agent, CHECK":      {conf("/nowhere", `,"timeout":"300ms"`+full), "CNI_COMMAND=CHECK", CodeTryAgain, "does not answer"},
		"no prevResult":        {conf(a.path, ""), "CNI_COMMAND=ADD", CodeConfig, "prevResult"},
		"bad prevResult":       {conf(a.path, `,"prevResult":{"ips":[{"address":"10.0.0.1"}]}`), "CNI_COMMAND=ADD", CodeConfig, "address"},
		"bad timeout":          {conf(a.path, full+`,"timeout":"soon"`), "CNI_COMMAND=ADD", CodeConfig, "soon"},
		"no JSON":              {"{", "CNI_COMMAND=ADD", CodeDecode, "read"},
		"future":               {`{"cniVersion":"9.0.0"}`, "CNI_COMMAND=ADD", CodeVersion, "9.0.0"},
		"unknown command":      {conf(a.path, full), "CNI_COMMAND=DANCE", CodeEnv, "DANCE"},
		"no pod":               {conf(a.path, full), "CNI_ARGS=", CodeEnv, "K8S_POD_NAME"},
		"a path as id":         {conf(a.path, full), "CNI_CONTAINERID=../x", CodeEnv, "../x"},
		"relative netns":       {conf(a.path, full), "CNI_NETNS=netns", CodeEnv, "CNI_NETNS"},
	} {
		t.Run(name, func(t *testing.T) {
			env := []string{c.env}
			if !strings.HasPrefix(c.env, "CNI_COMMAND") {
				env = append(env, "CNI_COMMAND=ADD")
			}
			code, e, out := run(t, c.stdin, env...)
			if code == 0 || e.Code != c.code || !strings.Contains(e.Error(), c.text) {
				t.Errorf("exit %d, output %s: want code %d and %q", code, out, c.code, c.text)
			}
		})
	}
}

// Without an agent, a pod begins only if its namespace is surely not enrolled.
func TestAddWithoutAgent(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := filepath.Join(dir, "good")
	if changed, err := WriteNamespaces(good, []string{"in", "in-too"}); !changed || err != nil {
		t.Fatal(changed, err)
	}
	if changed, err := WriteNamespaces(good, []string{"in", "in-too"}); changed || err != nil {
		t.Fatal(changed, err)
	}
	none := filepath.Join(dir, "none")
	if _, err := WriteNamespaces(none, nil); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path, namespace string
		begins          bool
	}{
		"enrolled":            {good, "in-too", false},
		"not enrolled":        {good, "out", true},
		"nobody is":           {none, "out", true},
		"exempt":              {good, "kube-system", true},
		"exempt, and no file": {"", "kube-system", true},
		"no file is named":    {"", "out", false},
		"no file":             {filepath.Join(dir, "nowhere"), "out", false},
		"an empty file":       {file("empty", ""), "out", false},
		"no JSON":             {file("torn", `{"enrolled":["a`), "out", false},
		"another file":        {file("other", `{"cniVersion":"1.0.0"}`), "out", false},
	} {
		t.Run(name, func(t *testing.T) {
			stdin := conf("/nowhere", `,"timeout":"300ms","exempt":["kube-system"],"namespaces":"`+c.path+`","prevResult":`+result)
			code, e, out := run(t, stdin, "CNI_COMMAND=ADD", "CNI_ARGS=K8S_POD_NAMESPACE="+c.namespace+";K8S_POD_NAME=web-0")
			if begins := code == 0 && strings.TrimSpace(out) == result; begins != c.begins {
				t.Errorf("begins %v, want %v: %v", begins, c.begins, &e)
			}
		})
	}
}

// One agent ends, and the next is there a moment later.
func TestAsksAgain(t *testing.T) {
	var asked atomic.Int32
	ends := startAgent(t, func(context.Context, Request) error {
		if asked.Add(1) < 3 {
			return &Error{Code: CodeEnding, Msg: "ending"}
		}
		return nil
	})
	full := `,"prevResult":` + result
	for _, command := range []string{"ADD", "DEL", "CHECK"} {
		asked.Store(0)
		if code, e, _ := run(t, conf(ends.path, full), "CNI_COMMAND="+command); code != 0 || asked.Load() != 3 {
			t.Errorf("%s: exit %d after %d questions: %v", command, code, asked.Load(), &e)
		}
	}
	late := filepath.Join(t.TempDir(), "cni.sock")
	go func() {
		if err := os.Rename(ends.path, late); err != nil {
			t.Error(err)
		}
	}()
	if code, e, _ := run(t, conf(late, full), "CNI_COMMAND=ADD"); code != 0 {
		t.Errorf("exit %d: %v", code, &e)
	}
}

// A pod may always end.
func TestDelWithoutAgentSucceeds(t *testing.T) {
	if code, _, out := run(t, conf("/nowhere", ""), "CNI_COMMAND=DEL", "CNI_NETNS=", "CNI_ARGS="); code != 0 || out != "" {
		t.Errorf("exit %d, output %q", code, out)
	}
}

func TestOtherCommands(t *testing.T) {
	a := startAgent(t, nil)
	full := conf(a.path, `,"prevResult":`+result)
	for _, c := range []string{"DEL", "CHECK", "STATUS", "GC"} {
		if code, _, out := run(t, full, "CNI_COMMAND="+c); code != 0 || out != "" {
			t.Errorf("%s: exit %d, output %q", c, code, out)
		}
	}
	// The agent is a pod: on a node that is not ready without it, it would never begin.
	for _, c := range []string{"STATUS", "GC"} {
		if code, _, out := run(t, conf("/nowhere", ""), "CNI_COMMAND="+c); code != 0 || out != "" {
			t.Errorf("%s without an agent: exit %d, output %q", c, code, out)
		}
	}
	if code, _, out := run(t, "", "CNI_COMMAND=VERSION"); code != 0 || !strings.Contains(out, `"1.1.0"`) {
		t.Errorf("VERSION: exit %d, output %q", code, out)
	}
}

// The agent gives up before the plugin does, so that its reason is heard.
func TestPatience(t *testing.T) {
	a := startAgent(t, func(ctx context.Context, _ Request) error { <-ctx.Done(); return errors.New("waited in vain") })
	code, e, _ := run(t, conf(a.path, `,"timeout":"3s","prevResult":`+result), "CNI_COMMAND=ADD")
	if code == 0 || !strings.Contains(e.Error(), "waited in vain") {
		t.Errorf("exit %d, %v", code, &e)
	}
}

func FuzzStdin(f *testing.F) {
	f.Add([]byte(conf("/a", `,"prevResult":`+result)), "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b")
	f.Add([]byte(`{"prevResult":{"ips":[{"address":"::1%eth0/64"}]}}`), ";;=;")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		c, e := readConfig(bytes.NewReader(stdin))
		if e != nil {
			return
		}
		env := map[string]string{"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "a", "CNI_NETNS": "/a", "CNI_ARGS": args}
		r, e := request(func(k string) string { return env[k] }, c)
		if e != nil {
			return
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var again Request
		if err := readJSON(bytes.NewReader(b), &again); err != nil && len(b) <= maxSentence {
			t.Fatal(err)
		}
		if len(b) <= maxSentence && again.Validate() != nil {
			t.Fatalf("the plugin sends what the agent refuses: %s", b)
		}
	})
}

// Versions before 0.3.0 tell addresses in another form; the result goes on as it came.
func TestOldVersions(t *testing.T) {
	for _, version := range []string{"0.1.0", "0.2.0", ""} {
		a := startAgent(t, nil)
		prev := `{"cniVersion":"0.2.0","ip4":{"ip":"10.1.2.3/24","gateway":"10.1.2.1"},"ip6":{"ip":"fd00::3/64"},"dns":{}}`
		stdin := `{"cniVersion":"` + version + `","name":"net","type":"tacit-cni","agent":"` + a.path + `","prevResult":` + prev + `}`
		code, e, out := run(t, stdin, "CNI_COMMAND=ADD")
		if code != 0 || strings.TrimSpace(out) != prev {
			t.Fatalf("version %q: exit %d, %v, output %s", version, code, e.Error(), out)
		}
		a.mu.Lock()
		got := fmt.Sprint(a.got[0].Addresses)
		a.mu.Unlock()
		if got != "[10.1.2.3 fd00::3]" {
			t.Errorf("version %q: the agent is told %s", version, got)
		}
	}
}
