package control

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/wire/xds"
)

const (
	// retryAfter is the wait after a file could not be written.
	retryAfter = time.Second
	// recheck is how often what waits for nodes is looked at if nothing is heard.
	recheck = time.Second
	// meshEvery is how often it is looked at whether there is no Mesh yet: nobody
	// says so when its kind is installed.
	meshEvery = 10 * time.Second
)

// publisher is what the reconciler needs of xds.Server.
type publisher interface {
	Publish(xds.Snapshot) (version uint64)
	Acked(version uint64) (waiting []string)
	Applied(counts func(node string) bool) uint64
	Changed() <-chan struct{}
	Nodes() []xds.NodeStatus
}

// viewer is what the reconciler needs of presenter.
type viewer interface{ put(kube.View) }

// saver is what the reconciler needs of store.
type saver interface {
	put(memory)
	drop(uid string)
	save() error
	keeps(uid string) bool
}

// reconciler brings objects, reports and acknowledgements together, and publishes
// what follows. One goroutine runs it and owns it, except for what others load.
type reconciler struct {
	build  kube.BuildConfig
	inbox  *inbox
	roster *roster
	server publisher
	store  saver
	// leads tells whether this process certainly leads; nil means always.
	leads     func() bool
	presenter viewer
	metrics   *metrics
	log       *slog.Logger

	// objects are all that there are, nil until they are known; told and vouched is what
	// agents said when the roster learned of them.
	objects kube.Set
	told    map[string][]netip.Addr
	vouched map[string]bool
	// dirty: the roster differs from what is published.
	dirty bool
	// deposed: somebody else may lead. Nothing is saved or published any more.
	deposed bool
	// unsaved is why not everything is remembered, nil if it is.
	unsaved error
	// problems are those told by their topics; untold is how many are not.
	problems map[string]bool
	untold   int

	// published is closed after the first publication. Before it nothing is served.
	published chan struct{}
	allowed   atomic.Pointer[map[allowance]bool]
	status    atomic.Pointer[Status]
}

// run reconciles whenever there is something new, until ctx ends, or somebody else
// may lead.
func (r *reconciler) run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.inbox.wake:
		case <-r.server.Changed():
		case <-timer.C:
		}
		timer.Reset(r.reconcile(time.Now()))
		if r.deposed {
			return errDeposed
		}
	}
}

// reconcile takes in what is new, steps every enrolment, and publishes as long as
// something changes. It returns after how long to look again.
func (r *reconciler) reconcile(now time.Time) time.Duration {
	began := time.Now()
	defer func() { r.metrics.reconcile.Observe(time.Since(began).Seconds()) }()
	r.takeInbox(now)
	if !r.dirty && !r.started() {
		return time.Hour // no objects yet: to publish without them would withdraw everybody
	}
	r.roster.away.see(r.roster.pods, r.outlook(now))
	for r.roster.advance(r.outlook(now)) || r.dirty {
		r.dirty = true
		if r.save(); r.deposed {
			return retryAfter
		}
		r.publish()
	}
	r.observe(now)
	if r.unsaved != nil {
		r.dirty = true
		return min(retryAfter, r.wait(now))
	}
	return r.wait(now)
}

// save keeps what must not be forgotten. Who has become the leader meanwhile has
// saved before it publishes, and so this fails before anything is published here. A pod of
// which something cannot be saved is not announced, and holds up no other.
func (r *reconciler) save() {
	if r.leads != nil && !r.leads() {
		r.deposed = true
		return
	}
	r.roster.remember(r.store)
	before := r.unsaved
	if r.unsaved = r.store.save(); r.unsaved != nil {
		r.metrics.failures.Inc()
		r.deposed = errors.Is(r.unsaved, fs.ErrExist)
		if before == nil || before.Error() != r.unsaved.Error() {
			r.log.Error("not everything is remembered, will try again", "error", r.unsaved, "every", retryAfter)
		}
	}
	r.roster.kept(r.store)
}

func (r *reconciler) takeInbox(now time.Time) {
	events, told, nodes := r.inbox.take()
	if told {
		if r.objects == nil {
			r.objects = make(kube.Set, len(events))
		}
		r.objects.Apply(events)
		r.read(now)
	}
	for node, n := range nodes {
		if n.full {
			r.roster.reports(node, n.list)
		}
		for _, said := range n.changes {
			r.roster.report(node, said)
		}
	}
	if r.objects != nil && r.heardOtherwise(now) {
		r.read(now)
	}
}

// heardOtherwise tells whether agents say something else of addresses than when the objects
// were read. Whom they vouch for matters only where an address is disputed.
func (r *reconciler) heardOtherwise(now time.Time) bool {
	if !maps.EqualFunc(r.roster.told(now), r.told, slices.Equal) {
		return true
	}
	return len(r.roster.result.Disputed) > 0 && !maps.Equal(r.roster.vouched(now), r.vouched)
}

// read takes in what objects and agents say now.
func (r *reconciler) read(now time.Time) {
	r.told, r.vouched = r.roster.told(now), r.roster.vouched(now)
	objects := r.objects.Objects()
	objects.Told, objects.Vouched = r.told, r.vouched
	result := kube.Build(objects, r.build)
	r.build.Before = result.Mesh.Policy
	r.tellProblems(result.Problems, result.Untold)
	r.roster.objects(result, now)
	r.dirty = true
}

// publish tells the nodes. A node may sign for a pod before it is told to enrol
// it, and so its proxy never asks in vain.
func (r *reconciler) publish() {
	allowed := r.roster.allowed()
	r.allowed.Store(&allowed)
	r.roster.published(r.server.Publish(r.roster.snapshot()))
	r.dirty = false
	if !r.started() {
		clear(r.roster.away) // nobody could connect before
		close(r.published)
	}
}

func (r *reconciler) started() bool {
	select {
	case <-r.published:
		return true
	default:
		return false
	}
}

// outlook asks the server once per publication, not once per pod.
func (r *reconciler) outlook(now time.Time) outlook {
	acked := make(map[uint64]bool)
	var agents map[string]bool
	return outlook{
		now: now,
		acked: func(version uint64) bool {
			done, asked := acked[version]
			if !asked {
				done = len(r.server.Acked(version)) == 0
				acked[version] = done
			}
			return done
		},
		applied: sync.OnceValue(func() uint64 { return r.server.Applied(r.roster.isNode) }),
		connected: func(node string) bool {
			if agents == nil {
				agents = r.agents()
			}
			return agents[node]
		},
	}
}

// agents names the nodes whose agent is connected.
func (r *reconciler) agents() map[string]bool {
	set := make(map[string]bool)
	for _, n := range r.server.Nodes() {
		set[n.Node] = n.Agent
	}
	return set
}

// wait is how long nothing has to be looked at: until the next deadline, and
// while somebody is waited for not longer than recheck.
func (r *reconciler) wait(now time.Time) time.Duration {
	wait := time.Hour
	switch {
	case r.roster.waiting():
		wait = recheck
	case r.roster.unheard(now):
		wait = enrollingAfter
	}
	if r.presenter != nil && !r.roster.result.Mesh.Found {
		wait = min(wait, meshEvery)
	}
	if d := r.roster.deadline(); !d.IsZero() {
		if left := d.Sub(now); left > 0 {
			return min(wait, left)
		}
		return recheck
	}
	return wait
}

// tellProblems logs what was not known to be a problem before, once for all objects of a
// namespace that have it.
func (r *reconciler) tellProblems(list []kube.Problem, untold int) {
	now := make(map[string]bool, len(list))
	for _, p := range list {
		if now[p.Topic()] = true; !r.problems[p.Topic()] {
			r.log.Warn("object not understood", "object", p.Object, "more", p.More, "problem", p.Text)
		}
	}
	if untold > 0 && r.untold == 0 {
		r.log.Warn("more problems than are told", "untold", untold)
	}
	r.problems, r.untold = now, untold
}

// observe shows the present state to metrics and dumps.
func (r *reconciler) observe(now time.Time) {
	s := r.roster.status(r.build.TrustDomain)
	r.status.Store(&s)
	r.metrics.observe(s)
	if r.presenter != nil {
		r.presenter.put(r.roster.view(r.outlook(now), r.server.Nodes(), r.build.TrustDomain, r.unsaved))
	}
}
