package kube

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"tacit.dev/pause"
)

const (
	// leaseName is the Lease by which replicas find their leader.
	leaseName = "tacit-control"
	// leaseLife is how long a leader that was killed is missed: nodes go on
	// meanwhile, but no pod of the mesh can start.
	leaseLife = 6 * time.Second
	// renewLimit ends a lead before the lease ends that others see, whatever the
	// difference between our clock's speed and theirs.
	renewLimit = 4 * time.Second
	// leaseEvery is how often a lease is renewed, and looked at: so soon is one
	// taken over that was let go of.
	leaseEvery = 400 * time.Millisecond
	// leaseRequest bounds one request.
	leaseRequest = 2 * time.Second
	// again is the wait after a lead that failed.
	again = time.Second
)

// ElectionConfig is what NewElection needs.
type ElectionConfig struct {
	// Client needs create of leases in the namespace, and get and update of
	// tacit-control.
	Client kubernetes.Interface
	// Namespace of the Lease.
	Namespace string
	// Name of this process among the others. "" means the name of the host, which
	// in a pod is the pod's.
	Name string
	// Log may be nil: nowhere.
	Log *slog.Logger
}

// Election picks a leader by a Lease, whose holder is NAME@ADDRESS: the others
// find the leader by it. A process that starts again under the same name and
// address takes up its own lease at once.
type Election struct{ cfg ElectionConfig }

// NewElection starts nothing.
func NewElection(cfg ElectionConfig) *Election {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Election{cfg}
}

// Run takes part until ctx ends. It calls lead whenever this process has become the
// leader, and lets go of the lease after lead has returned, never before.
func (e *Election) Run(ctx context.Context, address string, lead func(ctx context.Context, leads func() bool) error, follow func(leader string)) error {
	name := e.cfg.Name
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return fmt.Errorf("take part in an election: %w", err)
		}
	}
	for {
		err := e.campaign(ctx, name+"@"+address, lead, follow)
		if ctx.Err() != nil {
			return nil
		}
		e.cfg.Log.Warn("leads no more, trying again", "error", err, "after", again)
		if !pause.For(ctx, again) {
			return nil
		}
	}
}

// campaign waits for the lead, leads, and lets go of the lease.
func (e *Election) campaign(ctx context.Context, identity string, lead func(ctx context.Context, leads func() bool) error, follow func(leader string)) error {
	c := &campaign{started: make(chan context.Context, 1), follow: follow}
	le, err := e.elector(identity, c)
	if err != nil {
		return err
	}
	c.elector = le
	// The lease outlives ctx: it is let go of when lead has returned.
	electing, stop := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), klog.Logger{}))
	var running sync.WaitGroup
	running.Go(func() { le.Run(electing) })
	defer c.end()
	defer running.Wait()
	defer stop()
	select {
	case <-ctx.Done():
		return nil
	case leading := <-c.started:
		e.cfg.Log.Info("leads", "identity", identity)
		both, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(leading, cancel)()
		return lead(both, func() bool { return leading.Err() == nil && le.IsLeader() && le.Check(renewLimit-leaseLife) == nil })
	}
}

func (e *Election) elector(identity string, c *campaign) (*leaderelection.LeaderElector, error) {
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: e.cfg.Namespace, Name: leaseName},
		Client:     e.cfg.Client.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
		Labels:     map[string]string{"app.kubernetes.io/part-of": "tacit"},
	}
	return leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: quickLock{lock}, LeaseDuration: leaseLife, RenewDeadline: renewLimit, RetryPeriod: leaseEvery, ReleaseOnCancel: true, Name: leaseName,
		Callbacks: leaderelection.LeaderCallbacks{OnStartedLeading: c.begin, OnStoppedLeading: func() {}, OnNewLeader: c.heard},
	})
}

// campaign is one run of an elector.
type campaign struct {
	elector *leaderelection.LeaderElector
	started chan context.Context
	follow  func(leader string)

	mu   sync.Mutex // held while follow is called: the last word is the latest
	over bool       // the elector has ended; another one may know more
}

func (c *campaign) begin(ctx context.Context) { c.started <- ctx }

// heard is called in goroutines of the elector's, in any order: what counts is what
// it knows now.
func (c *campaign) heard(string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return
	}
	_, address, _ := strings.Cut(c.elector.GetLeader(), "@")
	c.follow(address)
}

func (c *campaign) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
}

// quickLock bounds each request: a server that does not answer must not look like
// a lease that is held.
type quickLock struct{ resourcelock.Interface }

func (l quickLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseRequest)
	defer cancel()
	return l.Interface.Get(ctx)
}

func (l quickLock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	ctx, cancel := context.WithTimeout(ctx, leaseRequest)
	defer cancel()
	return l.Interface.Create(ctx, r)
}

func (l quickLock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	ctx, cancel := context.WithTimeout(ctx, leaseRequest)
	defer cancel()
	return l.Interface.Update(ctx, r)
}
