package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tacit.dev/wire/handle"
)

const (
	// minLevel is how many sockets a pod and family keep ready at least. They
	// cost the kernel about 4 kB each.
	minLevel = 8
	// maxLevel is how many at most.
	maxLevel = 64
	// maxAsked is how many are asked for or made at once, for those who wait already: as
	// many as one message carries.
	maxAsked = handle.MaxFiles
	// seedCount is how many the agent is asked for to make others from.
	seedCount = 2
	// firstPause and lastPause bound the time between two tries to make some for those who wait.
	firstPause, lastPause = 50 * time.Millisecond, 2 * time.Second
)

// sockets are the unconnected sockets of one pod and one family, which are in the
// pod's namespace: with them the proxy dials as if it were there. At most level wait
// ready. They are made from two that the agent gave; if that fails, the agent is
// asked for each of them. It is safe for concurrent use.
//
//	agent ──deliver──► seeds ──grow──► idle ──take──► a dial
//	  ▲  └─────if they make none───────►│ half empty
//	  └──────ask────────────────────────┘
type sockets struct {
	v6 bool
	// ask sends a request for n sockets to the agent, without blocking. False
	// means that there is no agent now; connected is called when there is.
	ask func(n int) bool
	// starved counts those who had to wait, of all pods.
	starved *atomic.Uint64
	log     *slog.Logger
	// sprout makes n sockets from the seeds. Tests replace it.
	sprout func(s *seeds, n int, v6 bool) ([]int, error)
	// gone is closed by close, which waits for growing.
	gone    chan struct{}
	growing sync.WaitGroup

	// mu guards all below.
	mu    sync.Mutex
	seeds *seeds
	// grows says that grow is at work. The seeds are its own then.
	grows bool
	// failed says that the log has been told of seeds that make nothing.
	failed  bool
	idle    []spare
	waiters []chan spare
	// asked is how many the agent was asked for and has not delivered. There
	// is one request at a time.
	asked int
	// level is how many to have at hand: doubled when there were none, halved
	// when few were taken for a while.
	level int
	// taken counts since the last trim.
	taken int
	// overdue counts the trims since the agent was asked.
	overdue int
	// behind says that what the agent told with its last sockets, the pod's range of ports, may
	// have changed: the pod's runtime sets it after the pod has begun to be served.
	behind bool
	closed bool
}

func newSockets(v6 bool, starved *atomic.Uint64, log *slog.Logger, ask func(n int) bool) *sockets {
	return &sockets{
		v6: v6, starved: starved, log: log, ask: ask, level: minLevel,
		sprout: (*seeds).sockets, gone: make(chan struct{}),
	}
}

// take returns a socket, which is the caller's. If there is none it waits for one
// until ctx ends.
func (s *sockets) take(ctx context.Context) (spare, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return spare{}, fmt.Errorf("%w: the pod is gone", errNoSocket)
	}
	s.taken++
	if s.behind && s.seeds != nil && s.asked == 0 {
		s.behind = false
		s.request(1)
	}
	if n := len(s.idle); n > 0 {
		got := s.idle[n-1]
		s.idle[n-1] = spare{}
		s.idle = s.idle[:n-1]
		s.refill()
		s.mu.Unlock()
		return got, nil
	}
	s.starved.Add(1)
	s.level = min(2*s.level, maxLevel)
	w := make(chan spare, 1)
	s.waiters = append(s.waiters, w)
	s.refill()
	s.mu.Unlock()
	return s.wait(ctx, w)
}

// wait returns what comes to w. A socket that comes as ctx ends is not lost.
func (s *sockets) wait(ctx context.Context, w chan spare) (spare, error) {
	select {
	case got, ok := <-w:
		if !ok {
			return spare{}, fmt.Errorf("%w: the agent has none to give, see its log", errNoSocket)
		}
		return got, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.waiters, w); i >= 0 {
		s.waiters = slices.Delete(s.waiters, i, i+1)
	} else if got, ok := <-w; ok {
		s.keep(got)
	}
	return spare{}, fmt.Errorf("%w: waited for one: %w", errNoSocket, ctx.Err())
}

// refill gets more at half empty. The caller holds mu.
func (s *sockets) refill() {
	switch {
	case s.closed || len(s.waiters) == 0 && len(s.idle) > s.level/2:
	case s.seeds == nil:
		s.request(seedCount)
	case !s.grows:
		s.grows = true
		s.growing.Go(s.grow)
	}
}

// request asks the agent, once at a time. The caller holds mu.
func (s *sockets) request(n int) {
	if s.asked == 0 && n > 0 && s.ask(n) {
		s.asked, s.overdue = n, 0
	}
}

// lack is how many are to be made now. The caller holds mu.
func (s *sockets) lack() int {
	if s.closed {
		return 0
	}
	return min(s.level+len(s.waiters)-len(s.idle), maxAsked)
}

// grow makes sockets from the seeds until there are enough. If it cannot, the agent is
// asked, and it tries again for as long as somebody waits.
func (s *sockets) grow() {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		s.mu.Lock()
		n := s.lack()
		s.mu.Unlock()
		var made []int
		var err error
		if n > 0 {
			made, err = s.sprout(s.seeds, n, s.v6)
		}
		if !s.grown(made, err) {
			return
		}
		if err != nil {
			select {
			case <-s.gone:
			case <-time.After(pause):
			}
		}
	}
}

// grown takes over what was made, and reports whether more is to be.
func (s *sockets) grown(made []int, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hand(made)
	if err != nil {
		s.request(s.lack())
		if !s.failed {
			s.failed = true
			s.log.Warn("no socket could be made from others, the agent is asked for each", "ipv6", s.v6, "err", err)
		}
	}
	s.grows = s.lack() > 0 && (err == nil || len(s.waiters) > 0)
	return s.grows
}

// hand gives sockets to those who wait, and keeps the others. The caller holds mu.
func (s *sockets) hand(files []int) {
	for _, fd := range files {
		s.give(spare{fd: fd})
	}
}

// give gives a socket to the first who waits, or keeps it. The caller holds mu.
func (s *sockets) give(one spare) {
	if len(s.waiters) == 0 {
		s.keep(one)
		return
	}
	s.waiters[0] <- one // has room for one, and gets one
	s.waiters = s.waiters[1:]
}

// keep makes a socket ready for the next one. The caller holds mu.
func (s *sockets) keep(one spare) {
	if s.closed || len(s.idle) >= 2*maxLevel {
		one.close()
		return
	}
	s.idle = append(s.idle, one)
}

// again takes back a socket whose connection is over.
func (s *sockets) again(one spare) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.give(one)
}

// deliver takes over what the agent gave, the first two as seeds. Nothing at all means
// that it could not: those who wait are told so, and the next one asks again.
func (s *sockets) deliver(files []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = 0
	if len(files) == 0 {
		s.dismiss()
		return
	}
	if s.seeds == nil && !s.closed && len(files) >= seedCount {
		s.seeds = &seeds{listener: files[0], caller: files[1]}
		files = files[seedCount:]
		s.behind = true
	}
	if s.lack() <= 0 { // it came for what was told with it
		closeAll(files)
		files = nil
	}
	s.hand(files)
	s.refill()
}

// dismiss tells all who wait that nothing comes. The caller holds mu.
func (s *sockets) dismiss() {
	for _, w := range s.waiters {
		close(w)
	}
	s.waiters = nil
}

// connected is called when there is an agent, maybe another one than before:
// what the old one was asked for will not come.
func (s *sockets) connected() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = 0
	s.refill()
}

// trim gives back what a quiet pod does not need. It is called at intervals.
func (s *sockets) trim() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken < s.level && s.level > minLevel {
		s.level /= 2
	}
	s.taken, s.behind = 0, s.seeds != nil
	if s.overdue++; s.asked > 0 && s.overdue > 2 { // the agent did not hear it
		s.asked = 0
		s.refill()
	}
	for len(s.idle) > s.level {
		n := len(s.idle) - 1
		s.idle[n].close()
		s.idle[n] = spare{}
		s.idle = s.idle[:n]
	}
}

// close closes all sockets, and those that still come. More than once is once.
func (s *sockets) close() {
	if !s.closeIdle() {
		return
	}
	close(s.gone)
	s.growing.Wait()
	if s.seeds != nil {
		s.seeds.close()
	}
}

// closeIdle reports whether it was the first to close anything.
func (s *sockets) closeIdle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.closed = true
	for _, one := range s.idle {
		one.close()
	}
	s.idle = nil
	s.dismiss()
	return true
}

// ready tells how many wait ready, for the dump.
func (s *sockets) ready() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.idle)
}

var errNoSocket = errors.New("no socket of the pod's namespace")
