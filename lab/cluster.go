package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Cluster is a running lab. New starts nothing; Run serves verbs until ctx ends.
type Cluster struct {
	options Options
	log     *slog.Logger
	dir     string // /run/lab
	objects folder
	program string // of tacit itself, for lab app
	// running counts every goroutine that waits for a process.
	running sync.WaitGroup
	// background takes what outlives a verb: kept processes.
	background chan func(context.Context)

	// mu guards what follows; it is not held while anything waits.
	mu         sync.Mutex
	nodes      map[string]*node
	pods       map[string]*pod // by namespace/name
	namespaces map[string]*corev1.Namespace
	accounts   map[string]bool // by namespace/name
	services   map[string]*corev1.Service
	sliced     map[string]*discoveryv1.EndpointSlice // as written, by file path
	keepers    map[string]*keeper
	jobs       map[string]*job
	captures   map[string]*capture
	virtuals   int // virtual addresses given away
	nodeCount  int

	// converging is held by the one goroutine that brings rules, slices and hosts
	// up to date.
	converging sync.Mutex
	// wiring is held while a node is plugged in: each has to know of the others.
	wiring sync.Mutex
}

// Serve is the lab proper, below Init. It writes "ready" to descriptor 3 when it
// takes verbs, and returns when ctx ends or a verb takes the lab down.
func Serve(ctx context.Context, words []string) error {
	ready := os.NewFile(3, "ready")
	defer ready.Close()
	c, err := newCluster(words)
	if err == nil {
		err = c.prepare()
	}
	var listener *net.UnixListener
	if err == nil {
		listener, err = listenLab()
	}
	if err != nil {
		fmt.Fprintln(ready, err)
		return err
	}
	return c.run(ctx, listener, ready)
}

func newCluster(words []string) (*Cluster, error) {
	options, err := ParseOptions(words)
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return &Cluster{
		options: options, dir: inside, program: program, objects: folder(filepath.Join(inside, "objects")),
		nodes: map[string]*node{}, pods: map[string]*pod{}, namespaces: map[string]*corev1.Namespace{},
		accounts: map[string]bool{}, services: map[string]*corev1.Service{},
		sliced: map[string]*discoveryv1.EndpointSlice{}, keepers: map[string]*keeper{},
		jobs: map[string]*job{}, captures: map[string]*capture{},
		background: make(chan func(context.Context)),
	}, nil
}

// prepare lays out folders and the underlay.
func (c *Cluster) prepare() error {
	// Ordinary users do not have nft in their path.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	out, err := c.logFile("lab")
	if err != nil {
		return err
	}
	c.log = slog.New(slog.NewTextHandler(out, nil))
	for _, d := range []string{"objects", "state", "tokens/proxies", "tokens/agents", "nodes", "hosts"} {
		if err := os.MkdirAll(filepath.Join(c.dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := c.closeResolver(); err != nil {
		return err
	}
	if err := makeUnderlay(); err != nil {
		return err
	}
	return c.ensureAccount("default", "default")
}

// closeResolver covers the host's name servers, which cannot be reached: nobody
// shall wait for them.
func (c *Cluster) closeResolver() error {
	const text = "# names are in /etc/hosts\nnameserver 127.0.0.1\noptions timeout:1 attempts:1\n"
	path, at := filepath.Join(c.dir, "hosts", "resolv.conf"), "/etc/resolv.conf"
	if _, err := os.Stat(at); errors.Is(err, fs.ErrNotExist) {
		return nil // nothing to cover
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return err
	}
	if err := unix.Mount(path, at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", at, err)
	}
	return nil
}

func listenLab() (*net.UnixListener, error) {
	path := filepath.Join(inside, socketName)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(path, 0o600)
}

func (c *Cluster) run(ctx context.Context, l *net.UnixListener, ready *os.File) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer c.running.Wait()
	defer cancel()
	c.running.Go(func() { c.spawner(ctx) })
	if err := c.startControl(ctx); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	if _, err := fmt.Fprintln(ready, "ready"); err != nil {
		return err
	}
	ready.Close()
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		c.running.Go(func() { c.answer(ctx, conn) })
	}
}

// spawner starts what outlives a verb, with the context of the lab.
func (c *Cluster) spawner(ctx context.Context) {
	for {
		select {
		case f := <-c.background:
			c.running.Go(func() { f(ctx) })
		case <-ctx.Done():
			return
		}
	}
}

// spawn has f run until the lab ends. ctx is the verb's.
func (c *Cluster) spawn(ctx context.Context, f func(context.Context)) error {
	select {
	case c.background <- f:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// logPath is the log of a process, a job or a pod: n1/proxy is n1-proxy.log.
func (c *Cluster) logPath(name string) string {
	return filepath.Join(c.dir, "logs", strings.ReplaceAll(name, "/", "-")+".log")
}

// ensureAccount writes the namespace and the service account if they are new.
func (c *Cluster) ensureAccount(namespace, account string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.namespaces[namespace] == nil {
		o := namespaceObject(namespace, map[string]string{"kubernetes.io/metadata.name": namespace})
		if err := c.objects.put("Namespace", "", namespace, o); err != nil {
			return err
		}
		c.namespaces[namespace] = o
	}
	key := namespace + "/" + account
	if account == "" || c.accounts[key] {
		return nil
	}
	c.accounts[key] = true
	return c.objects.put("ServiceAccount", namespace, account, accountObject(namespace, account))
}

// converge brings EndpointSlices, the nodes' rules and the pods' names to what
// pods and services are now. It returns when all of it is in force.
func (c *Cluster) converge(ctx context.Context) error {
	c.converging.Lock()
	defer c.converging.Unlock()
	c.mu.Lock()
	pods, nodes := sortedValues(c.pods), sortedValues(c.nodes)
	services := sortedValues(c.services)
	slicesNow, all := c.slicesLocked(services, pods)
	err := c.writeSlicesLocked(slicesNow)
	hosts := c.hostsLocked(services, pods)
	c.mu.Unlock()
	errs := []error{err}
	for p, text := range hosts {
		errs = append(errs, writeHosts(p.hostsPath, text))
	}
	rules := ruleset(all)
	for _, n := range nodes {
		if n.rules != rules {
			errs = append(errs, loadRules(ctx, n.ns, rules))
			n.rules = rules
		}
	}
	return errors.Join(errs...)
}

func (c *Cluster) slicesLocked(services []*corev1.Service, pods []*pod) ([]*discoveryv1.EndpointSlice, []virtual) {
	var out []*discoveryv1.EndpointSlice
	var all []virtual
	for _, s := range services {
		mine := sliceObjects(s, pods)
		out = append(out, mine...)
		all = append(all, virtuals(s, mine)...)
	}
	return out, all
}

func (c *Cluster) writeSlicesLocked(now []*discoveryv1.EndpointSlice) error {
	var errs []error
	keep := map[string]bool{}
	for _, s := range now {
		path := c.objects.path("EndpointSlice", s.Namespace, s.Name)
		keep[path], c.sliced[path] = true, s
		errs = append(errs, c.objects.put("EndpointSlice", s.Namespace, s.Name, s))
	}
	for path, s := range c.sliced {
		if !keep[path] {
			errs = append(errs, c.objects.remove("EndpointSlice", s.Namespace, s.Name))
			delete(c.sliced, path)
		}
	}
	return errors.Join(errs...)
}

func sortedValues[V any](m map[string]V) []V {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	out := make([]V, len(keys))
	for i, k := range keys {
		out[i] = m[k]
	}
	return out
}
