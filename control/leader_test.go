package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
	"tacit.dev/wire/xds"
)

// ballot is an Election by hand.
type ballot struct {
	mu      sync.Mutex // guards what follows
	leader  string
	changed chan struct{}
}

func newBallot() *ballot { return &ballot{changed: make(chan struct{})} }

// elect makes who advertises address the leader, nobody if it is "".
func (b *ballot) elect(address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.changed)
	b.leader, b.changed = address, make(chan struct{})
}

func (b *ballot) now() (string, chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.leader, b.changed
}

func (b *ballot) Run(ctx context.Context, address string, lead func(context.Context, func() bool) error, follow func(string)) error {
	for ctx.Err() == nil {
		leader, changed := b.now()
		follow(leader)
		if leader == address {
			if err := b.lead(ctx, changed, address, lead); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	return nil
}

func (b *ballot) lead(ctx context.Context, changed chan struct{}, address string, lead func(context.Context, func() bool) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	watch.Go(func() {
		select {
		case <-changed:
			cancel()
		case <-ctx.Done():
		}
	})
	return lead(ctx, func() bool { leader, _ := b.now(); return leader == address })
}

// board is a Storage that several processes share, as they share the API server.
type board struct {
	bundle func([]byte) error

	mu      sync.Mutex // guards what follows
	content [kube.Shards][]byte
	version [kube.Shards]int
}

// sheet is one process's view of a board.
type sheet struct {
	*board
	known [kube.Shards]int
}

func (s *sheet) Load() ([kube.Shards][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = s.version
	return s.content, nil
}

func (s *sheet) Save(shard int, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known[shard] != s.version[shard] {
		return fmt.Errorf("version %d, not %d: %w", s.version[shard], s.known[shard], fs.ErrExist)
	}
	s.version[shard]++
	s.known[shard], s.content[shard] = s.version[shard], b
	return nil
}

func (s *sheet) LoadPairs() (none [kube.PairShards][]byte, err error) { return none, nil }
func (s *sheet) SavePairs(int, []byte) error                          { return nil }

func (s *sheet) PublishBundle(b []byte) error { return s.bundle(b) }
func (s *sheet) Close() error                 { return nil }
func (s *sheet) String() string               { return "board" }

// replica runs one more control over the same objects. It returns its address.
func (b *bench) replica(votes *ballot, shared *board) string {
	b.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	b.must(err)
	c, err := New(Config{
		Source: kube.NewFolder(kube.FolderConfig{Dir: b.source}), Keys: ca.Folder(filepath.Join(b.dir, "ca")), Storage: &sheet{board: shared}, Listener: l,
		Nodes: b.nodes(), TrustDomain: "lab", GoneAfter: b.gone, Election: votes,
		Log: slog.New(slog.NewTextHandler(b.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("replica", l.Addr().String()),
	})
	b.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go runControl(ctx, c, ended)
	b.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			b.t.Errorf("run: %v", err)
		}
	})
	return l.Addr().String()
}

func (b *bench) board() *board {
	s := b.storage()
	b.t.Cleanup(func() { s.Close() })
	return &board{bundle: s.PublishBundle}
}

// A node may come to any replica: one that does not lead passes it on.
func TestFollowerPassesNodesOn(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	votes, shared := newBallot(), b.board()
	first, second := b.replica(votes, shared), b.replica(votes, shared)
	votes.elect(first)
	b.addr = second
	n1 := b.node("n1", nil)
	n1.awaitEnroll("server", true)
	n1.report("server", xds.Captured)
	b.addr = first
	n2 := b.node("n2", nil)
	n2.awaitDirect("10.30.1.2", true)
	if _, err := n1.sign(labID("server")); err != nil {
		t.Errorf("signing through a follower: %v", err)
	}
}

// Who comes while nobody leads waits for the next leader.
func TestNodesWaitForALeader(t *testing.T) {
	b := newBench(t, "n1")
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	votes := newBallot()
	b.addr = b.replica(votes, b.board())
	n1 := b.node("n1", nil)
	votes.elect(b.addr)
	n1.awaitEnroll("server", true)
}

// A new leader withdraws nobody, though the pod's agent has not come to it yet; and
// who leads no more tells nodes nothing.
func TestNewLeaderWithdrawsNobody(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	votes, shared := newBallot(), b.board()
	first, second := b.replica(votes, shared), b.replica(votes, shared)
	votes.elect(first)
	b.addr = first
	n1 := b.node("n1", nil)
	b.addr = second
	n2 := b.node("n2", nil)
	n1.awaitEnroll("server", true)
	n1.report("server", xds.Captured)
	n2.awaitDirect("10.30.1.2", true)

	n1.leave()
	b.pod("other", "n2", "10.30.2.2")
	for w := range n2.world {
		if w.Workload(netip.MustParseAddr("10.30.2.2")) != nil {
			break
		}
	}
	votes.elect(second)
	b.pod("third", "n2", "10.30.2.3")
	for limit := time.After(patience); ; {
		select {
		case w := <-n2.world:
			if wl := w.Workload(netip.MustParseAddr("10.30.1.2")); wl == nil || !wl.Direct {
				t.Fatalf("under the new leader a World has %+v, want it direct", wl)
			}
			if w.Workload(netip.MustParseAddr("10.30.2.3")) != nil {
				return
			}
		case <-limit:
			t.Fatal("the new leader was not heard")
		}
	}
}

// Somebody else has saved: what we would publish may contradict it.
func TestDeposedLeaderPublishesNothing(t *testing.T) {
	for name, depose := range map[string]func(m *model){
		"by what is saved": func(m *model) { m.r.store = &brokenSaver{saver: m, err: fmt.Errorf("changed: %w", fs.ErrExist)} },
		"by its lease":     func(m *model) { m.r.leads = func() bool { return false } },
	} {
		m := newModel(t, false)
		m.labels["p1-1"] = true
		m.objects()
		m.reconcile()
		version := m.server.version
		depose(m)
		m.r.inbox.putReport(nodeOf("p1-1"), xds.Report{UID: "p1-1", State: xds.Captured})
		m.reconcile()
		if m.server.version != version || !m.r.deposed {
			t.Errorf("%s: published %d after %d, deposed %v: want nothing new, and the end", name, m.server.version, version, m.r.deposed)
		}
		m.r.inbox.ring()
		if err := m.r.run(t.Context()); !errors.Is(err, errDeposed) {
			t.Errorf("%s: run ends with %v, want that it is deposed", name, err)
		}
	}
}
