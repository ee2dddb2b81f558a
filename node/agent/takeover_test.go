package agent

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/cni"
	"tacit.dev/pod/netns"
	"tacit.dev/wire/handle"
	"tacit.dev/wire/xds"
)

// inPlace starts an agent with a captured pod a.
func inPlace(t *testing.T) (n *node, p *fakeProxy, ns *netns.NS) {
	t.Helper()
	n = startNode(t, t.TempDir(), nil)
	p = dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	return n, p, ns
}

// another starts another agent of the same node, whose proxy is to dial handle.
func another(t *testing.T, n *node, configure ...func(*Config)) (second *node, handle string) {
	t.Helper()
	handle = filepath.Join(t.TempDir(), "handle.sock")
	second = startWaiting(t, n.dir, func(c *Config) {
		c.Handle = handle
		for _, f := range configure {
			f(c)
		}
	})
	second.eventually("it waits", func() bool {
		err := second.agent.Ready()
		return err != nil && strings.Contains(err.Error(), "no proxy")
	})
	return second, handle
}

func (n *node) untilReady() {
	n.t.Helper()
	n.eventually("ready", func() bool { return n.agent.Ready() == nil })
}

// A second agent takes the place of the first as soon as its proxy is ready, and
// serves the same listeners.
func TestTakeOver(t *testing.T) {
	n, p, ns := inPlace(t)
	second, at := another(t, n)
	cookies := n.cookies("a")
	q := dialProxyAt(t, at, nil)
	second.untilReady()
	q.until(t, "the new proxy has the listeners", func() bool { return q.pods["a"] != nil && len(q.pods["a"].files) == 4 })
	p.until(t, "the old proxy stops accepting", func() bool { return p.yielded == 1 })
	if got := second.cookies("a"); got != cookies || got == "" {
		t.Errorf("sockets %s: want the ones before, %s", got, cookies)
	}
	second.reports.until(t, "a", xds.Captured)

	// The old proxy still gets sockets for what it has accepted.
	if err := p.conn.Send(handle.Message{Kind: handle.Need, UID: "a", Family: 4, Count: 3}); err != nil {
		t.Fatal(err)
	}
	p.until(t, "three sockets", func() bool { return p.sockets["a"] == 3 })

	// The plugin meets the new one, at the same socket.
	_, path := namespace(t, "b")
	second.agent.Apply([]mesh.Pod{word("a", true), word("b", true)})
	if err := second.ask(addOf("b", path)); err != nil {
		t.Fatal(err)
	}
	n.stop()
	p.kill()
	isCaptured(t, ns)
	for _, uid := range []string{"a", "b"} {
		if err := second.ask(delOf(uid)); err != nil {
			t.Fatal(err)
		}
	}
	isClean(t, ns)
	q.until(t, "the new proxy has nothing", func() bool { return len(q.pods) == 0 })
}

// cookies names the sockets that an agent has for a pod.
func (n *node) cookies(uid string) (all string) {
	n.agent.ask(func() string {
		for _, l := range n.agent.pods[uid].listeners {
			all += cookieOf(n.t, l.file) + " "
		}
		return ""
	})
	return all
}

// As long as the new proxy has no certificate, the old one goes on.
func TestNoTakeOverWithoutCertificates(t *testing.T) {
	n, p, _ := inPlace(t)
	second, at := another(t, n)
	q := newProxy()
	q.refuse = true
	q.dial(t, at, nil)
	second.eventually("it says what it waits for", func() bool {
		err := second.agent.Ready()
		return err != nil && strings.Contains(err.Error(), "no certificate for you")
	})
	if q.is(func() bool { return len(q.pods["a"].files) > 0 }) || p.is(func() bool { return p.yielded > 0 }) {
		t.Error("the listeners are handed over")
	}
	check := addOf("a", "/run/netns/a")
	check.Command = cni.Check
	if err := n.ask(check); err != nil {
		t.Errorf("the first agent: %v", err)
	}
	n.stop() // now the second one begins without being asked
	second.untilReady()
}

// A successor that dies half-way leaves everything as it was.
func TestSuccessorDies(t *testing.T) {
	n, p, ns := inPlace(t)
	for range 3 {
		c, err := handle.Dial(t.Context(), filepath.Join(n.dir, "agent.sock"))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Send(handle.Message{Kind: handle.Take}); err != nil {
			t.Fatal(err)
		}
		for m := (handle.Message{}); m.Kind != handle.Given; {
			var files []int
			if m, files, err = c.Receive(); err != nil {
				t.Fatal(err)
			}
			closeFDs(files)
		}
		c.Close()
		_, path := namespace(t, "b")
		n.agent.Apply([]mesh.Pod{word("a", true), word("b", true)})
		if err := n.ask(addOf("b", path)); err != nil { // waits in the socket meanwhile
			t.Fatal(err)
		}
		if err := n.ask(delOf("b")); err != nil {
			t.Fatal(err)
		}
	}
	isCaptured(t, ns)
	if p.is(func() bool { return p.yielded > 0 }) {
		t.Error("the proxy was told to yield")
	}
}

// The agent that has handed over takes the place again if nobody has it.
func TestTheOldAgentTakesItsPlaceAgain(t *testing.T) {
	n, p, ns := inPlace(t)
	second, at := another(t, n)
	q := dialProxyAt(t, at, nil)
	second.untilReady()
	p.until(t, "the old proxy stops accepting", func() bool { return p.yielded == 1 })
	second.stop()
	q.kill()
	p.until(t, "the old proxy serves again", func() bool { return len(p.pods["a"].files) == 4 })
	n.untilListening("a")
	isCaptured(t, ns)
}

// Who waits for an answer during a take-over is told to ask again.
func TestPluginAsksAgain(t *testing.T) {
	n, p, _ := inPlace(t)
	p.mu.Lock()
	p.refuse = true
	p.mu.Unlock()
	_, path := namespace(t, "b")
	n.agent.Apply([]mesh.Pod{word("a", true), word("b", true)})
	answer := make(chan cni.Answer, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		a, _ := cni.Ask(ctx, filepath.Join(n.dir, "cni.sock"), addOf("b", path))
		answer <- a
	}()
	p.until(t, "the pod is being made", func() bool { return p.pods["b"] != nil })
	second, at := another(t, n)
	dialProxyAt(t, at, nil)
	second.untilReady()
	var e *cni.Error
	if a := <-answer; !errors.As(a.Error, &e) || e.Code != cni.CodeEnding {
		t.Errorf("answer %v, want that it asks again", a.Error)
	}
	second.agent.Apply([]mesh.Pod{word("a", true), word("b", true)})
	if err := second.ask(addOf("b", path)); err != nil {
		t.Fatal(err)
	}
}

// Control is heard by the agent that acts, and by no other.
func TestOneAgentHearsControl(t *testing.T) {
	heard := make(chan string, 10)
	hear := func(name string) func(context.Context) error {
		return func(ctx context.Context) error {
			heard <- name
			<-ctx.Done()
			heard <- name + " ends"
			return nil
		}
	}
	n := startNode(t, t.TempDir(), func(c *Config) { c.Control = hear("first") })
	second, at := another(t, n, func(c *Config) { c.Control = hear("second") })
	dialProxyAt(t, at, nil)
	second.untilReady()
	second.stop()
	n.stop()
	for _, want := range []string{"first", "first ends", "second", "second ends"} {
		select {
		case got := <-heard:
			if got != want {
				t.Errorf("%s: want %s", got, want)
			}
		case <-time.After(limit):
			t.Fatalf("not heard: %s", want)
		}
	}
}

// An agent that is told to end together with its proxy goes on for as long as that drains:
// it acts, and gives sockets.
func TestDrainWaitsForTheProxy(t *testing.T) {
	n, p, _ := inPlace(t)
	ctx, cancel := context.WithCancel(t.Context())
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		n.agent.Drain(ctx)
	}()
	_, path := namespace(t, "b")
	n.agent.Apply([]mesh.Pod{word("a", true), word("b", true)})
	if err := n.ask(addOf("b", path)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-drained:
		t.Fatal("it does not wait for its proxy")
	default:
	}
	p.disconnect()
	<-drained
	n.agent.Drain(ctx) // nobody is there any more
	dialProxy(t, n.dir, nil)
	n.eventually("a proxy is there", func() bool { return n.metric("tacit_agent_proxy_connected") == 1 })
	cancel()
	n.agent.Drain(ctx)
}
