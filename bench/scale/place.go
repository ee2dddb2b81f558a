package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/bench/process"
	"tacit.dev/bench/scale/api"
	"tacit.dev/control/kube"
	"tacit.dev/lab"
	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// place is the network in which all processes are.
type place interface {
	// listen makes the listener of the API server.
	listen() (net.Listener, error)
	dial(ctx context.Context, network, address string) (net.Conn, error)
	start(cmd *exec.Cmd) error
	// replicas tells where those of control are; one without a process is to be started.
	replicas() ([]*replica, error)
	// owner tells whose a token is that is not of a simulated node.
	owner(token string) (mesh.Process, bool)
	// putBundle gives the roots to who is there besides simulated nodes.
	putBundle(pem []byte) error
	down() error
}

// loopback is this process's own network, without a real node.
type loopback struct{ ports []string }

// newLoopback finds ports that nobody listens at now.
func newLoopback() (*loopback, error) {
	var l loopback
	for range 4 {
		free, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer free.Close()
		_, port, err := net.SplitHostPort(free.Addr().String())
		if err != nil {
			return nil, err
		}
		l.ports = append(l.ports, port)
	}
	return &l, nil
}

func (l *loopback) listen() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }

func (l *loopback) dial(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, address)
}

func (l *loopback) start(cmd *exec.Cmd) error { return cmd.Start() }

func (l *loopback) replicas() ([]*replica, error) {
	return []*replica{
		{name: "a", listen: "127.0.0.1:" + l.ports[0], admin: "127.0.0.1:" + l.ports[1]},
		{name: "b", listen: "127.0.0.2:" + l.ports[2], admin: "127.0.0.1:" + l.ports[3]},
	}, nil
}

func (l *loopback) owner(string) (mesh.Process, bool) { return mesh.Process{}, false }

func (l *loopback) putBundle([]byte) error { return nil }

func (l *loopback) down() error { return nil }

// laboratory is a lab whose control is replica a, and whose one node is real.
type laboratory struct {
	dir     string // of the lab
	bin     string // programs, with ours in control's place
	started *lab.Started
	ns      *netns.NS

	following sync.WaitGroup
	unfollow  context.CancelFunc
}

// The real node, and its pod.
const (
	realNode = "n1"
	realPod  = "real/server"
)

// newLab starts a lab with this program in the place of tacit-control.
func (r *rig) newLab(ctx context.Context) (_ *laboratory, err error) {
	l := &laboratory{dir: lab.Folder(fmt.Sprintf("scale-%d", os.Getpid())), bin: filepath.Join(r.dir, "bin"), unfollow: func() {}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.down())
		}
	}()
	if err := os.Chmod(r.dir, 0o755); err != nil { // the proxy is another user
		return nil, err
	}
	if err := l.placePrograms(r.cfg.bin); err != nil {
		return nil, err
	}
	l.started, err = lab.Start(ctx, lab.StartConfig{
		Program: filepath.Join(r.cfg.bin, "tacit"), Dir: l.dir, Leashed: true, Stderr: os.Stderr,
		Options: []string{"bin=" + l.bin, "control.kubeconfig=" + r.kubeconfig(), "control.api=http://" + labAPI},
	})
	if err != nil {
		return nil, err
	}
	l.ns, err = netns.Open(fmt.Sprintf("/proc/%d/ns/net", l.started.Process.Pid))
	return l, err
}

// labAPI is where the API server is in a lab.
const labAPI = "127.0.0.1:16443"

func (l *laboratory) placePrograms(from string) error {
	own, err := os.Executable()
	if err != nil {
		return err
	}
	if from, err = filepath.Abs(from); err != nil {
		return err
	}
	return errors.Join(os.Mkdir(l.bin, 0o755), os.Symlink(own, filepath.Join(l.bin, "tacit-control")),
		os.Symlink(filepath.Join(from, "tacit-node"), filepath.Join(l.bin, "tacit-node")),
		os.Symlink(filepath.Join(from, "tacit-cni"), filepath.Join(l.bin, "tacit-cni")))
}

func (l *laboratory) listen() (listener net.Listener, err error) {
	err = l.ns.Do(func() (err error) {
		listener, err = net.Listen("tcp", labAPI)
		return err
	})
	return listener, err
}

func (l *laboratory) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = l.ns.Do(func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

func (l *laboratory) start(cmd *exec.Cmd) error { return l.ns.Do(cmd.Start) }

// replicas: the lab keeps the first one as a kubelet would.
func (l *laboratory) replicas() ([]*replica, error) {
	return []*replica{
		{
			name: "a", listen: "172.30.0.250:15010", admin: "127.0.0.1:15022", process: func() (process.Process, error) { return l.find("tacit-control", "") },
			kill: func(ctx context.Context) error { return l.do(ctx, "stop control KILL") }, revive: func(ctx context.Context) error { return l.do(ctx, "start control") },
		},
		{name: "b", listen: "127.0.0.2:15010", admin: "127.0.0.1:15023"},
	}, nil
}

// find finds a process of the lab by its program and role.
func (l *laboratory) find(program, role string) (process.Process, error) {
	all, err := process.Descendants(l.started.Process.Pid)
	if err != nil {
		return process.Process{}, err
	}
	for pid, words := range all {
		if len(words) > 1 && filepath.Base(words[0]) == program && (role == "" || words[1] == role) {
			return process.Process{PID: pid, Name: strings.TrimSpace(program + " " + role)}, nil
		}
	}
	return process.Process{}, fmt.Errorf("find %s %s in the lab: it does not run", program, role)
}

func (l *laboratory) run() string { return filepath.Join(l.dir, "run") }

func (l *laboratory) owner(token string) (mesh.Process, bool) {
	for _, p := range []mesh.Process{{Node: realNode}, {Node: realNode, Agent: true}} {
		folder := "proxies"
		if p.Agent {
			folder = "agents"
		}
		text, err := os.ReadFile(filepath.Join(l.run(), "tokens", folder, p.Node))
		if err == nil && string(bytes.TrimSpace(text)) == token {
			return p, true
		}
	}
	return mesh.Process{}, false
}

func (l *laboratory) putBundle(pem []byte) error {
	return os.WriteFile(filepath.Join(l.run(), "state", "bundle.pem"), pem, 0o644)
}

func (l *laboratory) down() error {
	l.unfollow()
	l.following.Wait()
	if l.ns != nil {
		l.ns.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	return lab.Down(ctx, l.dir)
}

// do has the lab carry out a verb.
func (l *laboratory) do(ctx context.Context, words string) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	code, err := lab.Do(ctx, lab.Call{Dir: l.dir, Args: strings.Fields(words), Stdin: null, Stdout: null, Stderr: os.Stderr})
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	if err != nil {
		return fmt.Errorf("lab: %s: %w", words, err)
	}
	return nil
}

// populate makes the real node with a pod of the mesh.
func (l *laboratory) populate(ctx context.Context, store *api.Store) error {
	store.Put(api.Nodes, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: realNode},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.30.1.0/24", "fd00:30:1::/64"}},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "172.30.0.1"}}},
	})
	following, unfollow := context.WithCancel(context.WithoutCancel(ctx))
	l.unfollow = unfollow
	source := kube.NewFolder(kube.FolderConfig{Dir: filepath.Join(l.run(), "objects")})
	l.following.Go(func() {
		if err := source.Run(following, func(e []kube.Event) { copyObjects(store, e) }); err != nil {
			fmt.Fprintln(os.Stderr, "scale:", err)
		}
	})
	namespace, _, _ := strings.Cut(realPod, "/")
	for _, verb := range []string{"node " + realNode, "label namespace " + namespace + " tacit.dev/mesh=on", "pod " + realNode + "/" + realPod} {
		if err := l.do(ctx, verb); err != nil {
			return err
		}
	}
	return nil
}

// copyObjects puts what the lab's kubelet has written beside the rest. What is gone
// there stays: the lab's one pod does not end.
func copyObjects(store *api.Store, events []kube.Event) {
	for _, e := range events {
		switch o := e.Object.(type) {
		case *corev1.Namespace:
			store.Put(api.Namespaces, o.DeepCopy())
		case *kube.PodObject:
			store.Put(api.Pods, podOf(o))
		}
	}
}

// podOf is a pod as an API server has it.
func podOf(o *kube.PodObject) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: *o.ObjectMeta.DeepCopy(),
		Spec: corev1.PodSpec{
			NodeName: o.Spec.NodeName, ServiceAccountName: o.Spec.ServiceAccountName, HostNetwork: o.Spec.HostNetwork,
			InitContainers: o.Spec.InitContainers, Containers: o.Spec.Containers,
		},
		Status: corev1.PodStatus{Phase: o.Status.Phase, StartTime: o.Status.StartTime, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs, Conditions: o.Status.Conditions},
	}
}
