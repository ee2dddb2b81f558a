// Package agent is the privileged half of a node: it enrolls pods. It opens the
// listeners inside a pod's network namespace and hands them to the proxy, leads
// the pod's connections there by rules, hands out the sockets that the proxy
// dials with, and keeps reading the rules back. It is asked by the CNI plugin for
// pods that begin and end, and told by control which pods are to be enrolled.
//
// Its station is before the first byte: no byte of a connection ever passes it,
// and it refuses to read anything from the network. Rules and listeners stay
// where they are when it ends; the next agent finds them by its records.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"tacit.dev/mesh"
	"tacit.dev/pod/cni"
	"tacit.dev/pod/redirect"
	"tacit.dev/wire/handle"
	"tacit.dev/wire/xds"
)

// Reporter takes what the agent has made of its pods; an xds.PodClient is one.
// Report does not block, and is called by one goroutine.
type Reporter interface{ Report(xds.Report) }

// Config is the agent's.
type Config struct {
	// RunDir is the folder of the node's agents, made if need be: cni.sock, the
	// records of pods, and what one agent hands over to the next by. It should not
	// outlive a reboot. Required.
	RunDir string
	// Handle is the socket for our own proxy. Two agents of a node must have two, in
	// folders of their own. Default handle.sock in RunDir.
	Handle string
	// ProxyUID is who may connect to handle.sock. 0 or less means our own.
	ProxyUID int
	// Reporter may be nil.
	Reporter Reporter
	// Control brings control's words to Apply, and carries the reports, until its ctx
	// ends. It is run while the agent acts, again after each pause. It may be nil.
	Control func(ctx context.Context) error
	// CheckInterval is how often the rules of each pod are read back, besides
	// whenever somebody changes them. Default 10 s.
	CheckInterval time.Duration
	// ProtectWithin is how long a pod may be on its way into the mesh before it
	// is reported as unprotected. Default 10 s.
	ProtectWithin time.Duration
	// UnknownGrace is how long control may name an enrolled pod of which no
	// runtime has told us, before it is reported as unprotected. Default 1 min.
	UnknownGrace time.Duration
	// Proc is where a proc file system is mounted that shows all processes of the
	// node. Running pods of which no runtime has told us are found by it; "" means
	// that they are only reported as unprotected.
	Proc string
	// Chain is where the plugin is put into the node's chain of CNI plugins. Without
	// a folder that is somebody else's work. Without a Plugin it is told of our socket, of the
	// enrolled namespaces' file in the same folder, and of Exempt.
	Chain cni.Chain
	// Exempt are the namespaces whose pods the plugin lets pass without a question.
	Exempt []string
	// WordPatience is how long control is waited for to tell of a new pod whose
	// namespace is not enrolled; then it begins. Default 5 s.
	WordPatience time.Duration
	// KnownPatience is how long a pod of the mesh that is captured waits until every node
	// knows it; then it begins. Default 5 s.
	KnownPatience time.Duration
	// Program is the plugin, which is copied to ProgramDir. Empty: it is there already.
	Program, ProgramDir string
	// NodeAddresses are the node's own, from which its kubelet probes pods where the
	// pods' gateway is not the node.
	NodeAddresses []netip.Addr
	// UnreadPerSocket bounds the bytes of kernel memory for what waits unread in one socket of
	// the proxy's. 0 leaves it to the kernel.
	UnreadPerSocket int
	// Jobs is how many pods are worked on at once. Default 8.
	Jobs int
	// Registry takes the metrics; nil means nobody does.
	Registry *prometheus.Registry
	// Log may be nil.
	Log *slog.Logger
}

func (c *Config) complete() error {
	if c.RunDir == "" {
		return errors.New("agent: Config.RunDir is empty")
	}
	c.Handle = cmp.Or(c.Handle, filepath.Join(c.RunDir, "handle.sock"))
	c.CheckInterval = orElse(c.CheckInterval, 10*time.Second)
	c.ProtectWithin = orElse(c.ProtectWithin, 10*time.Second)
	c.UnknownGrace = orElse(c.UnknownGrace, time.Minute)
	c.WordPatience = orElse(c.WordPatience, 5*time.Second)
	c.KnownPatience = orElse(c.KnownPatience, 5*time.Second)
	if c.Chain.Plugin == nil {
		c.Chain.Plugin = map[string]any{
			"agent":      filepath.Join(c.RunDir, "cni.sock"),
			"namespaces": filepath.Join(c.Chain.Dir, cni.NamespacesName),
			"exempt":     c.Exempt,
		}
	}
	if c.Jobs <= 0 {
		c.Jobs = 8
	}
	if c.ProxyUID <= 0 {
		c.ProxyUID = -1
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func orElse(d, otherwise time.Duration) time.Duration {
	if d <= 0 {
		return otherwise
	}
	return d
}

// Agent enrolls the pods of one node. All that changes belongs to one goroutine,
// the loop; others send it functions to run. The loop never blocks: what may
// take time is a job, at most one per pod, and comes back as a function too.
type Agent struct {
	cfg     Config
	kernel  *redirect.Kernel
	metrics *metrics

	// events is what the loop has to do next. It holds nothing: what is sent is run.
	events chan func()
	// ended is closed when the loop is; events are then taken by nobody.
	ended     chan struct{}
	recovered chan struct{}

	// jobs bounds the work at once, running counts it.
	jobs    chan struct{}
	running sync.WaitGroup
	// lateMu keeps the ends of jobs apart that come after the loop's.
	lateMu sync.Mutex
	// namespaces are those in which a pod may have to be enrolled; nil if control has
	// not told.
	namespaces atomic.Pointer[[]string]
	// rechain has one element when the chain's keeper has to look again.
	rechain chan struct{}
	// waitsFor is what keeps a fresh agent from acting; nil once it acts.
	waitsFor atomic.Pointer[string]
	// found and served are made by begin, which the goroutine of serve waits for. The
	// loop closes them, when all pods of the last agent's have been looked at and
	// when the proxy serves what it was ready for.
	found, served chan struct{}
	foundOnce     sync.Once

	// What follows belongs to the loop.

	duty duty
	// warm are the pods of the agent that acts, by key, while we are fresh and wait;
	// warmSince is when our proxy connected. nil once we have acted.
	warm      map[string]*warmPod
	warmSince time.Time
	// legacy are the listeners that the agent before us has given, by key of their
	// pods, which take copies.
	legacy map[string]map[handle.Role]*os.File
	// expected are the pods that must be served before the agent before us lets go.
	expected map[string]bool
	// still hear when no job is at work while we rest.
	still []chan struct{}
	// swept is when a waiting agent has last looked for pods that have ended.
	swept time.Time

	// pods are those that a runtime has told of, by key.
	pods map[string]*pod
	// words is control's last list, by UID, nil before its first.
	words map[string]mesh.Pod
	// missing says since when control names an enrolled pod that no runtime
	// has told of.
	missing   map[string]time.Time
	searching searching
	// left are the sandboxes that a runtime has said to be at their end, by UID of
	// their pod, as long as control names it: they are not found again.
	left map[string]string
	// proxy is nil while none is connected; alone hear when it has gone.
	proxy *door
	alone []chan struct{}
	// installed is keepChain's own: this process has put its plugin in place.
	installed bool
	// recovering counts the pods of the last agent's that are not yet checked.
	recovering int
}

// New starts nothing, but finds out whether nft is there.
func New(cfg Config) (*Agent, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	k, err := redirect.NewKernel(cfg.NodeAddresses...)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a := &Agent{
		cfg:       cfg,
		kernel:    k,
		metrics:   newMetrics(cfg.Registry),
		events:    make(chan func()),
		ended:     make(chan struct{}),
		recovered: make(chan struct{}),
		rechain:   make(chan struct{}, 1),
		jobs:      make(chan struct{}, cfg.Jobs),
		pods:      make(map[string]*pod),
		missing:   make(map[string]time.Time),
		left:      make(map[string]string),
		warm:      make(map[string]*warmPod),
		legacy:    make(map[string]map[handle.Role]*os.File),
	}
	a.waitsFor.Store(new("it has just begun"))
	return a, nil
}

// Recovered is closed when Run acts, has looked at every pod of the last agent's, and
// reported it.
func (a *Agent) Recovered() <-chan struct{} { return a.recovered }

// Drain returns when no proxy is connected, or when ctx ends: a proxy that is told to end
// together with its agent needs sockets, and the node an agent, for as long as
// it drains. It is for an end that is asked for: Run goes on meanwhile, its ctx ends after it.
func (a *Agent) Drain(ctx context.Context) {
	alone := make(chan struct{})
	a.run(func() {
		if a.alone = append(a.alone, alone); a.proxy == nil {
			a.alone = closeEach(a.alone)
		}
	})
	select {
	case <-alone:
	case <-a.ended:
	case <-ctx.Done():
	}
}

// Run serves its proxy, and as soon as no other agent of the node acts, or the one
// that does hands over, the CNI plugin; and keeps the pods as control wants them, until ctx
// ends. It is called once. Rules and listeners stay when it returns; an error is one
// of its folder or sockets, or a take-over that did not succeed.
func (a *Agent) Run(ctx context.Context) error {
	defer a.kernel.Close()
	if err := a.kernel.Gated(); err != nil {
		a.cfg.Log.Warn("no gates behind the rules of pods", "error", err)
	}
	if err := a.kernel.Leads(); err != nil {
		a.cfg.Log.Warn("what pods forward is refused, and not captured", "error", err)
	}
	if err := a.makeDir(); err != nil {
		close(a.ended)
		return fmt.Errorf("agent: %w", err)
	}
	proxies, err := handle.Listen(a.cfg.Handle, a.cfg.ProxyUID)
	if err != nil {
		close(a.ended)
		return fmt.Errorf("agent: %w", err)
	}
	defer proxies.Close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { a.loop(ctx); return nil })
	g.Go(func() error { return a.admit(ctx, proxies) })
	g.Go(func() error { return a.serve(ctx) })
	err = g.Wait()
	a.running.Wait()
	a.letGo()
	return err
}

func (a *Agent) makeDir() error {
	if err := os.MkdirAll(a.recordDir(), 0o700); err != nil {
		return err
	}
	// The proxy, which is another user, has to get through to its socket.
	return os.Chmod(a.cfg.RunDir, 0o711)
}

// loop runs events, and after each does what follows from it, until ctx ends.
func (a *Agent) loop(ctx context.Context) {
	defer close(a.ended)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-a.events:
			f()
		case <-timer.C:
		}
		timer.Reset(a.turn(ctx, time.Now()))
	}
}

// post has the loop run f soon, and reports false if it has ended.
func (a *Agent) post(f func()) bool {
	select {
	case a.events <- f:
		return true
	case <-a.ended:
		return false
	}
}

// Apply takes control's list of this node's pods; it replaces the one before. A
// pod that is in it no more stays as it is until the runtime deletes it. What
// the pods point to must not be changed. It waits for Run to begin.
func (a *Agent) Apply(pods []mesh.Pod) {
	words := make(map[string]mesh.Pod, len(pods))
	for _, p := range pods {
		words[p.UID] = p
	}
	a.post(func() { a.words = words })
}

// letGo closes what the loop held. No rule changes: what is captured stays so.
func (a *Agent) letGo() {
	for _, p := range a.pods {
		p.closeFiles()
	}
	a.dropLegacy()
	if a.proxy != nil {
		a.proxy.close()
	}
}
