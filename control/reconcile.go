package control

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
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

// statusPatience is how long somebody who asks for the status waits.
const statusPatience = 5 * time.Second

// publisher is what the reconciler needs of xds.Server.
type publisher interface {
	Update(xds.Update) (version uint64)
	Acked(version uint64) (waiting []string)
	Applied(counts func(node string) bool) uint64
	Changed() <-chan struct{}
	Agents() map[string]bool
	Gathering() bool
	Forget(node string) bool
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

	// objects is nil until they are known.
	objects *kube.Builder
	facts   facts
	// deposed: somebody else may lead. Nothing is saved or published any more.
	deposed bool
	// unsaved is why not everything is remembered, nil if it is; tried is when it was to be.
	unsaved error
	tried   time.Time
	// problems are those told by their topics.
	problems map[string]bool
	// shown is when people were shown something last.
	shown time.Time
	lags  lags

	// published is closed after the first publication. Before it nothing is served.
	published chan struct{}
	// asked has who wants to know the status, ended is closed when nobody answers any more.
	asked chan chan<- *Status
	ended chan struct{}
}

// facts are what the objects say besides pods, nodes and the World.
type facts struct {
	mesh       kube.MeshFacts
	exceptions []kube.Exception
	problems   []kube.Problem
	untold     int
	contested  int
}

// run reconciles whenever there is something new, until ctx ends, or somebody else
// may lead.
func (r *reconciler) run(ctx context.Context) error {
	defer close(r.ended)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case to := <-r.asked:
			to <- r.roster.status(r.facts, r.build.TrustDomain)
			continue
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

// status is what the roster knows, or nil if that is not to be had in a while.
func (r *reconciler) status() *Status {
	patience := time.NewTimer(statusPatience)
	defer patience.Stop()
	answer := make(chan *Status, 1)
	select {
	case r.asked <- answer:
		return <-answer // the loop is in it already
	case <-r.ended:
	case <-patience.C:
	}
	return nil
}

// reconcile takes in what is new, steps the enrollments that it touches, and publishes as long
// as something changes. It returns after how long to look again.
func (r *reconciler) reconcile(now time.Time) time.Duration {
	began := time.Now()
	defer func() { r.metrics.reconcile.Observe(time.Since(began).Seconds()) }()
	r.takeInbox(now)
	if r.objects == nil {
		return time.Hour // to publish without them would withdraw everybody
	}
	if r.unsaved != nil && now.Sub(r.tried) >= retryAfter {
		if r.save(now); r.deposed {
			return retryAfter
		}
	}
	r.roster.agents(r.server.Agents(), r.server.Gathering(), now)
	r.roster.forget(r.server.Forget)
	for r.roster.look(r.outlook(now)); r.advance(now) || !r.started(); r.roster.look(r.outlook(now)) {
		if r.save(now); r.deposed {
			return retryAfter
		}
		r.publish()
	}
	return r.observe(now)
}

// advance steps what is touched until nothing more follows from it, and tells whether
// something is to be told.
func (r *reconciler) advance(now time.Time) bool {
	for {
		stirred := r.roster.step(r.outlook(now))
		said := r.roster.takeSaid()
		if len(said) == 0 {
			return stirred
		}
		r.read(nil, said, now)
	}
}

// save keeps what must not be forgotten. Who has become the leader meanwhile has
// saved before it publishes, and so this fails before anything is published here. A pod of
// which something cannot be saved is not announced, and holds up no other.
func (r *reconciler) save(now time.Time) {
	if r.leads != nil && !r.leads() {
		r.deposed = true
		return
	}
	r.roster.remember(r.store)
	before := r.unsaved
	r.tried = now
	if r.unsaved = r.store.save(); r.unsaved != nil {
		r.metrics.failures.Inc()
		r.deposed = errors.Is(r.unsaved, fs.ErrExist)
		if before == nil || before.Error() != r.unsaved.Error() {
			r.log.Error("not everything is remembered, will try again", "error", r.unsaved, "every", retryAfter)
		}
	}
	r.roster.kept(r.store, now)
}

func (r *reconciler) takeInbox(now time.Time) {
	events, told, nodes := r.inbox.take()
	if told {
		if r.objects == nil {
			r.objects = kube.NewBuilder(r.build)
		}
		r.read(events, nil, now)
	}
	for node, n := range nodes {
		if n.full {
			r.roster.reports(node, n.list)
		}
		for _, said := range n.changes {
			r.roster.report(node, said)
		}
	}
}

// read takes in what is different in objects and in what agents say.
func (r *reconciler) read(events []kube.Event, said []kube.Said, now time.Time) {
	d := r.objects.Apply(events, said)
	r.roster.objects(d, now)
	if d.Mesh {
		r.facts.mesh = r.objects.Mesh()
		r.roster.allowed.revoke(r.facts.mesh.Policy.Trust.Revoked)
	}
	if d.Namespaces {
		r.roster.namespaces.put(r.objects.Namespaces())
	}
	if d.Exceptions {
		r.facts.exceptions = r.objects.Exceptions()
	}
	if d.Problems {
		r.facts.problems, r.facts.untold = r.objects.Problems()
		r.tellProblems()
	}
	if d.Disputed {
		r.facts.contested = 0
		for _, is := range r.objects.Disputed() {
			if is {
				r.facts.contested++
			}
		}
	}
}

// publish tells the nodes. A node may sign for a pod before it is told to enroll
// it, and so its proxy never asks in vain.
func (r *reconciler) publish() {
	r.roster.published(r.server.Update(r.roster.update()))
	if !r.started() {
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
	}
}

// observe shows the present state to metrics and people, and returns how long nothing has to be
// looked at: until the next time that matters, and while somebody is waited for not longer
// than recheck.
func (r *reconciler) observe(now time.Time) time.Duration {
	r.metrics.observe(r.roster.counts, r.facts)
	wait := time.Hour
	if r.roster.waiting() {
		wait = recheck
	}
	if next := r.roster.timers.next(); !next.IsZero() {
		wait = min(wait, max(next.Sub(now), time.Millisecond))
	}
	if r.unsaved != nil {
		wait = min(wait, retryAfter)
	}
	if r.presenter == nil {
		return wait
	}
	if !r.facts.mesh.Found {
		wait = min(wait, meshEvery)
	}
	if len(r.roster.views) > maxShown {
		wait = min(wait, recheck) // the others have their turn
	}
	if left := r.shown.Add(showEvery).Sub(now); left > 0 {
		return min(wait, left)
	}
	r.shown = now
	nodes := r.server.Nodes()
	behind, again := r.lags.behind(nodes, r.roster.isNode, now)
	if again {
		wait = min(wait, recheck)
	}
	var count kube.NodeCounts
	r.roster.ready(nodes, &count)
	r.metrics.observeNodes(count)
	r.presenter.put(r.roster.view(now, kube.Summary{
		Facts: r.facts.mesh, TrustDomain: r.build.TrustDomain, Exceptions: r.facts.exceptions, Unsaved: r.unsaved,
		Waiting: r.roster.waited(r.server.Acked, nodes, now), Behind: behind,
	}, nodes))
	return wait
}

// tellProblems logs what was not known to be a problem before, once for all objects of a
// namespace that have it.
func (r *reconciler) tellProblems() {
	now := make(map[string]bool, len(r.facts.problems))
	for _, p := range r.facts.problems {
		if now[p.Topic()] = true; !r.problems[p.Topic()] {
			r.log.Warn("object not understood", "object", p.Object, "more", p.More, "problem", p.Text)
		}
	}
	if r.facts.untold > 0 && !r.problems[""] {
		r.log.Warn("more problems than are told", "untold", r.facts.untold)
	}
	now[""] = r.facts.untold > 0
	r.problems = now
}
