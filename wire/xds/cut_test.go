package xds

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"tacit.dev/mesh"
)

const insideEnv = "TACIT_XDS_TEST_INSIDE"

// A link that is cut without a word is noticed by both sides within about 10 s, and
// all comes back by itself. In a network namespace of its own.
func TestCutLinkIsNoticed(t *testing.T) {
	if os.Getenv(insideEnv) == "" {
		t.Parallel()
		inNamespace(t)
		return
	}
	command(t, "ip", "link", "set", "lo", "up")
	c := startControl(t, ServerConfig{})
	lost := make(chan string, 100)
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1", Log: recordLog(lost)}, func(mesh.Changes) <-chan struct{} { return nil }))
	c.connected(t, "n1")
	c.settle(t, c.Publish(workloads(1)))

	command(t, "nft", "add table inet cut; add chain inet cut in { type filter hook input priority 0; policy drop; }")
	cut := time.Now()
	receiveWithin(t, "the proxy's notice", lost)
	proxy := time.Since(cut)
	c.until(t, "control's notice", func() bool { return !c.Nodes()[0].GoneSince.IsZero() })
	control := c.Nodes()[0].GoneSince.Sub(cut)
	t.Logf("noticed by the proxy after %v, by control after %v", proxy, control)
	if limit := 15 * time.Second; proxy > limit || control > limit {
		t.Errorf("noticed by the proxy after %v, by control after %v: want about 10 s", proxy, control)
	}

	command(t, "nft", "delete table inet cut")
	healed := time.Now()
	c.settle(t, c.Publish(workloads(2)))
	t.Logf("back after %v", time.Since(healed))
}

// inNamespace runs the calling test again as root of new namespaces.
func inNamespace(t *testing.T) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", bytes.TrimSpace(out))
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("in its own namespace: %v", err)
	}
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}
