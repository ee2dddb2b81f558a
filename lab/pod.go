package lab

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"tacit.dev/pod/netns"
)

// pod is a network namespace behind a node, with mounts of its own.
//
//	pending ── CNI ADD ──► running ── application listens ──► ready
//	                          │                                 │
//	                          └────────► terminating ◄──────────┘
//	                                         │ SIGTERM, grace, CNI DEL
//	                                         ▼ gone
//
// What is above the line is fixed when it is made; below, Cluster.mu guards it.
type pod struct {
	podSpec
	node      *node
	uid       string
	address   pair
	ns        *netns.NS
	path      string
	link      string
	hostsPath string
	created   time.Time
	// ------------------------------------------------------------------
	mounts  *os.File
	running bool
	ready   bool
	deleted time.Time
	app     *job
}

// podSpec is what a person or a story says about a pod.
type podSpec struct {
	namespace   string
	name        string
	account     string
	labels      map[string]string
	annotations map[string]string
	ports       []corev1.ContainerPort
	grace       time.Duration
	// host is the pod's number in its node's network; 0 for one that is free.
	host int
	// command is the application; none is a pod in which nothing runs but what
	// exec starts.
	command []string
	user    string
	// unready pods never get ready by themselves.
	unready bool
}

func (p *podSpec) key() string { return p.namespace + "/" + p.name }

// addPod makes a pod and returns when its application listens.
func (c *Cluster) addPod(ctx context.Context, nodeName string, spec podSpec) error {
	if err := c.ensureAccount(spec.namespace, spec.account); err != nil {
		return err
	}
	p, err := c.reservePod(nodeName, spec)
	if err != nil {
		return err
	}
	if err := c.createPod(ctx, p); err != nil {
		return errors.Join(fmt.Errorf("pod %s: %w", p.key(), err), c.destroyPod(context.WithoutCancel(ctx), p))
	}
	if err := c.awaitListening(ctx, p); err != nil {
		return err // it stays, not ready, for people to look at
	}
	return c.setReady(ctx, p, !p.unready)
}

// createPod does what a kubelet and its runtime do for a pod.
func (c *Cluster) createPod(ctx context.Context, p *pod) (err error) {
	if p.ns, err = netns.New(p.path); err != nil {
		return err
	}
	if err := plugPod(p); err != nil {
		return err
	}
	if err := c.writePod(p, nil); err != nil {
		return err
	}
	if err := c.cni(ctx, "ADD", p); err != nil {
		return err
	}
	if err := writeHosts(p.hostsPath, ""); err != nil {
		return err
	}
	mounts, err := c.privateMounts(p)
	if err != nil {
		return err
	}
	if err := c.writePod(p, func() { p.mounts, p.running = mounts, true }); err != nil {
		return err
	}
	if err := c.converge(ctx); err != nil {
		return err
	}
	return c.startApplication(p)
}

func (c *Cluster) reservePod(nodeName string, spec podSpec) (*pod, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[nodeName]
	if n == nil || n.bare {
		return nil, fmt.Errorf("pod %s: there is no node %s", spec.key(), nodeName)
	}
	if c.pods[spec.key()] != nil {
		return nil, fmt.Errorf("pod %s exists already", spec.key())
	}
	host, err := c.hostFor(n, spec)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%s.%s", spec.namespace, spec.name)
	p := &pod{
		podSpec: spec, node: n, uid: newUID(), address: podAddress(n.number, host),
		path: filepath.Join(netnsDir, "pod."+name), link: "pod" + strconv.Itoa(host),
		hostsPath: filepath.Join(c.dir, "hosts", name), created: time.Now(),
	}
	c.pods[p.key()] = p
	return p, nil
}

// hostFor gives addresses in turn, so that one that was just another pod's comes
// last, unless the pod is to have that one.
func (c *Cluster) hostFor(n *node, spec podSpec) (int, error) {
	used := map[string]bool{}
	for _, p := range c.pods {
		used[p.address.v4.String()] = true
	}
	if h := spec.host; h != 0 {
		if h < 2 || h > maxPods || used[podAddress(n.number, h).v4.String()] {
			return 0, fmt.Errorf("pod %s: host=%d: want a number from 2 to %d that no pod of node %s has", spec.key(), h, maxPods, n.name)
		}
		return h, nil
	}
	for range maxPods {
		h := n.nextHost
		if n.nextHost++; n.nextHost > maxPods {
			n.nextHost = 2
		}
		if !used[podAddress(n.number, h).v4.String()] {
			return h, nil
		}
	}
	return 0, fmt.Errorf("node %s is full: %d pods", n.name, maxPods)
}

func newUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // RFC 9562 §5.4
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// writePod changes a pod and writes it down.
func (c *Cluster) writePod(p *pod, change func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if change != nil {
		change()
	}
	return c.objects.put("Pod", p.namespace, p.name, podObject(p))
}

func (c *Cluster) setReady(ctx context.Context, p *pod, ready bool) error {
	if err := c.writePod(p, func() { p.ready = ready }); err != nil {
		return err
	}
	return c.converge(ctx)
}

// pod finds a pod by NAME (of namespace default) or NAMESPACE/NAME.
func (c *Cluster) pod(name string) (*pod, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.pods[podKey(name)]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("there is no pod %s", podKey(name))
}

func podKey(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return "default/" + name
}

// privateMounts makes a mount namespace with the pod's own /etc/hosts in it. Bound
// namespaces are left out: a copy of their mounts would keep them alive.
func (c *Cluster) privateMounts(p *pod) (*os.File, error) {
	var f *os.File
	err := p.ns.Do(func() (err error) {
		runtime.LockOSThread() // once more than Do unlocks: the thread dies
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare mounts: %w", err)
		}
		if err := unix.Unmount(netnsDir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", netnsDir, err)
		}
		if err := unix.Mount(p.hostsPath, "/etc/hosts", "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind /etc/hosts: %w", err)
		}
		f, err = os.Open("/proc/thread-self/ns/mnt")
		return err
	})
	return f, err
}

// enter starts cmd in the pod's namespaces.
func (p *pod) enter(cmd *exec.Cmd) error {
	return p.ns.Do(func() error {
		runtime.LockOSThread() // once more than Do unlocks: the thread dies
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare working directory: %w", err)
		}
		if err := unix.Setns(int(p.mounts.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the mounts of pod %s: %w", p.key(), err)
		}
		return cmd.Start()
	})
}

// startApplication starts the pod's command; its words go to the pod's log.
func (c *Cluster) startApplication(p *pod) error {
	if len(p.command) == 0 {
		return nil
	}
	out, err := c.logFile("pod." + p.key())
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := c.podCommand(p, p.user, p.command)
	cmd.Stdout, cmd.Stderr = out, out
	app, err := c.startJob("pod "+p.key(), cmd, func() error { return p.enter(cmd) })
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p.app = app
	return nil
}

// application is the pod's running command, nil if it has none.
func (c *Cluster) application(p *pod) *job {
	c.mu.Lock()
	defer c.mu.Unlock()
	return p.app
}

// awaitListening waits until all ports of a pod with an application are open. It
// looks, and does not knock: a probe would be a connection among those that
// stories count.
func (c *Cluster) awaitListening(ctx context.Context, p *pod) error {
	app := c.application(p)
	if app == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return until(ctx, func() error {
		if app.ended() {
			cancel()
			return fmt.Errorf("the application of pod %s ended with code %d: see its log", p.key(), app.code())
		}
		open, err := listening(app.pid())
		for _, port := range p.ports {
			if err == nil && !slices.Contains(open, uint16(port.ContainerPort)) {
				err = fmt.Errorf("pod %s does not listen at port %d", p.key(), port.ContainerPort)
			}
		}
		return err
	})
}

// listening lists the TCP ports on which somebody listens in the network namespace
// of a process.
func listening(pid int) ([]uint16, error) {
	var ports []uint16
	for _, family := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, family))
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 4 || f[3] != "0A" {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			port, err := strconv.ParseUint(hex, 16, 16)
			if err == nil {
				ports = append(ports, uint16(port))
			}
		}
	}
	return ports, nil
}

// deletePod ends a pod as Kubernetes does: it is marked and leaves the services,
// its application is asked to end, and at last its network is taken down.
func (c *Cluster) deletePod(ctx context.Context, p *pod, grace time.Duration) error {
	c.mu.Lock()
	again := !p.deleted.IsZero()
	if !again {
		p.deleted, p.grace = time.Now(), cmp.Or(grace, p.grace)
	}
	c.mu.Unlock()
	if again {
		return fmt.Errorf("pod %s is terminating already", p.key())
	}
	if err := errors.Join(c.writePod(p, nil), c.converge(ctx)); err != nil {
		return err
	}
	return c.destroyPod(ctx, p)
}

// destroyPod takes away whatever there is of a pod, also of a half-made one.
func (c *Cluster) destroyPod(ctx context.Context, p *pod) error {
	var errs []error
	if app := c.application(p); app != nil {
		errs = append(errs, app.end(ctx, p.grace))
	}
	if p.ns != nil {
		errs = append(errs, c.killInside(p), c.cni(ctx, "DEL", p), c.unplugPod(p))
	}
	if p.mounts != nil {
		errs = append(errs, p.mounts.Close())
	}
	c.mu.Lock()
	delete(c.pods, p.key())
	errs = append(errs, c.objects.remove("Pod", p.namespace, p.name))
	c.mu.Unlock()
	if err := os.Remove(p.hostsPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, c.converge(ctx))...)
}

func (c *Cluster) unplugPod(p *pod) error {
	return errors.Join(
		withLinks(p.node.ns, func(l links) error { return l.remove(p.link) }),
		netns.Delete(p.path), p.ns.Close())
}

// killInside kills what exec left behind in the pod.
func (c *Cluster) killInside(p *pod) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !p.ns.Is(fmt.Sprintf("/proc/%d/ns/net", pid)) {
			continue
		}
		_ = unix.Kill(pid, unix.SIGKILL) // gone meanwhile is as good
	}
	return nil
}
