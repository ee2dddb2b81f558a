package xds

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

const (
	// chunkBytes bounds one response, if no single resource is larger: a stream
	// holds one at a time, whatever the size of the World. maxScan bounds how much of the
	// log is read for it at once.
	chunkBytes = 256 << 10
	maxScan    = 16 << 10
	// maxSeats bounds the streams that are told a whole World, or another great part, at once: each
	// of them takes memory and time from all others. seatFor is how long one has its turn, if its
	// client is slow.
	maxSeats = 32
	seatFor  = 10 * time.Second
	// maxUnapplied bounds the responses by which a node does not decide yet, as far as it
	// has said. Who is further behind is later told only what then still differs.
	maxUnapplied = 32
	// maxUnacked bounds those that it has not acknowledged: one dial under an old World
	// holds up all that follow, and is over before so many have come.
	maxUnacked = 1024
	// maxTypes bounds the subscriptions of one stream.
	maxTypes = 8
	// more ends the version of a response that others of its publication follow.
	more = "+"
)

type deltaStream = message.AggregatedDiscoveryService_DeltaAggregatedResourcesServer

// discovery serves deltas.
type discovery struct {
	message.UnimplementedAggregatedDiscoveryServiceServer
	server *Server
}

// stream is one connection of one node's proxy or agent.
type stream struct {
	from mesh.Process
	poke chan struct{} // one slot

	// Of the handler's goroutine: what it is told, and whether it has a seat to be told much, or
	// waits for one.
	subs          map[string]*subscription
	seated, waits bool
	stand         func() // not nil while it is seated

	// Guarded by Server.mu:
	refusals map[string]string // by type: what it refuses as yet
	standing *standing         // of a proxy that has asked for the World
}

// subscription is how far a stream has been told of one type: a place in the table's log,
// whatever the table's size.
//
//	                Update                    cut, until it is at the end of the log
//	position = last ───────► position < last ────────────────────────► unacked
//	   ▲                                                                 │ ack: has settled on its version
//	   └─────────────────────────────────────────────────────────────────┘ nack: has not
type subscription struct {
	typeURL string
	// position is the version up to which it was told everything.
	position uint64
	// claim is what it has said that it holds, until that was compared with all that there is.
	claim *claim
	// interest is what it asks for.
	interest *interest
	// whole: it is of ours, and told all that is in the table. Others are told one type.
	whole   bool
	packs   bool     // it takes what is packed
	greeted bool     // an answer went out, if an empty one
	open    bool     // others of the last response's publication follow
	nonce   uint64   // of the last response
	unacked []uint64 // versions of the last responses, 0 if others of the publication follow
	decided int      // so many of unacked the client decides by
}

func (d discovery) DeltaAggregatedResources(g deltaStream) error {
	s := d.server
	from, err := s.admit(g.Context())
	if err != nil {
		return err
	}
	defer s.dismiss(from)
	st := &stream{from: from, poke: make(chan struct{}, 1), subs: map[string]*subscription{}, refusals: map[string]string{}}
	s.join(st)
	defer s.leave(st)
	requests := make(chan *message.DeltaDiscoveryRequest)
	failed := make(chan error, 1)
	// receive ends when the handler returns, for gRPC then ends the stream; it
	// cannot be waited for before.
	go receive(g, requests, failed)
	return s.serve(g, st, requests, failed)
}

func receive(g deltaStream, requests chan<- *message.DeltaDiscoveryRequest, failed chan<- error) {
	for {
		req, err := g.Recv()
		if err != nil {
			failed <- err
			return
		}
		select {
		case requests <- req:
		case <-g.Context().Done():
			return
		}
	}
}

// serve is the loop of a stream: answer the client, and send what it lacks. Send
// blocks while the client does not read; meanwhile publications pile up nowhere.
func (s *Server) serve(g deltaStream, st *stream, requests <-chan *message.DeltaDiscoveryRequest, failed <-chan error) error {
	defer st.rise()
	for {
		var seat chan<- struct{}
		if st.waits {
			seat = s.seats
		}
		select {
		case seat <- struct{}{}:
			st.sit(s)
		case req := <-requests:
			if err := s.take(st, req); err != nil {
				s.metrics.refused.Inc()
				s.cfg.Log.Warn("node refused", "node", st.from.Node, "peer", peerAddr(g.Context()), "error", err)
				return err
			}
		case err := <-failed:
			s.cfg.Log.Debug("stream ended", "node", st.from.Node, "error", err)
			return nil
		case <-st.poke:
			if err := s.send(g, st); err != nil {
				return err
			}
		case <-g.Context().Done():
			return nil
		}
	}
}

// send sends one response, if one is due, and looks again after the requests that
// have come meanwhile.
func (s *Server) send(g deltaStream, st *stream) error {
	if st.isOpen() && !st.seated {
		st.waits = true
		return nil
	}
	resp, err := s.next(st)
	if resp == nil || err != nil {
		return err
	}
	if !st.isOpen() {
		st.rise()
	}
	s.metrics.sent.WithLabelValues(typeLabel(resp.TypeUrl)).Add(float64(resp.count()))
	st.wake()
	return g.SendMsg(resp)
}

// isOpen reports whether others of a publication follow what was sent last.
func (st *stream) isOpen() bool {
	for _, sub := range st.subs {
		if sub.open {
			return true
		}
	}
	return false
}

// sit takes a seat, until rise, or until the client has had time enough.
func (st *stream) sit(s *Server) {
	giveBack := sync.OnceFunc(func() { <-s.seats })
	late := time.AfterFunc(s.seatFor, giveBack)
	st.seated, st.waits = true, false
	st.stand = func() {
		late.Stop()
		giveBack()
	}
	st.wake()
}

// rise gives the seat back, if there is one.
func (st *stream) rise() {
	if st.seated {
		st.stand()
		st.seated, st.stand = false, nil
	}
}

func (st *stream) wake() {
	select {
	case st.poke <- struct{}{}:
	default:
	}
}

func (s *Server) join(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes[st.from.Node].streams[st] = true
}

func (s *Server) leave(st *stream) {
	for typeURL := range st.subs {
		s.metrics.streams.WithLabelValues(typeLabel(typeURL)).Dec()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.nodes[st.from.Node].streams, st)
	if st.standing != nil {
		s.depart(st.standing)
	}
}

// take handles one request.
func (s *Server) take(st *stream, req *message.DeltaDiscoveryRequest) error {
	if err := checkNode(st.from.Node, req.GetNode().GetId()); err != nil {
		return err
	}
	inward(req)
	sub := st.subs[req.GetTypeUrl()]
	if sub == nil {
		return s.subscribe(st, req)
	}
	if err := sub.interest.change(req); err != nil {
		return err
	}
	if i := sub.find(req.GetAppliedNonce()); i >= sub.decided {
		sub.decided = i + 1
		s.noteApplied(st, sub.unacked[i])
	}
	if i := sub.find(req.GetResponseNonce()); i >= 0 {
		version := sub.unacked[i]
		sub.unacked, sub.decided = sub.unacked[i+1:], max(sub.decided-i-1, 0)
		s.noteAnswer(st, sub.typeURL, version, req.GetErrorDetail())
	}
	st.wake()
	return nil
}

// find tells where in unacked the response is, or -1.
func (sub *subscription) find(nonce string) int {
	n, err := strconv.ParseUint(nonce, 10, 64)
	if first := sub.nonce - uint64(len(sub.unacked)); err == nil && n > first && n <= sub.nonce {
		return int(n - first - 1)
	}
	return -1
}

// isBehind reports whether too many answers are missing.
func (sub *subscription) isBehind() bool {
	return len(sub.unacked)-sub.decided >= maxUnapplied || len(sub.unacked) >= maxUnacked
}

// checkNode refuses who claims to be another node than the one it proved to be. A
// foreign proxy claims its pod ("ztunnel~IP~…"), and gets what its token proves.
func checkNode(proved, claimed string) error {
	if claimed == "" || claimed == proved || strings.Contains(claimed, "~") {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "the token proves node %q, not %q", proved, claimed)
}

// subscribe begins where the client says that it is.
func (s *Server) subscribe(st *stream, req *message.DeltaDiscoveryRequest) error {
	typeURL := req.GetTypeUrl()
	if forAgents := typeURL == podType || typeURL == namespaceType; forAgents != st.from.Agent {
		return status.Errorf(codes.PermissionDenied, "the token is that of the %s: it gets no %q", st.from, typeURL)
	}
	if typeURL == "" || len(st.subs) >= maxTypes {
		return status.Errorf(codes.InvalidArgument, "subscribe to type %q: want a type, and at most %d of them", typeURL, maxTypes)
	}
	if typeURL == podType {
		s.podsOf(st.from.Node) // from now on it remembers what is removed
	}
	only, err := newInterest(req)
	if err != nil {
		return err
	}
	sub := &subscription{typeURL: typeURL, interest: only}
	if err := s.begin(sub, st.from.Node, req); err != nil {
		return status.Errorf(codes.InvalidArgument, "subscribe to type %q: %v", typeURL, err)
	}
	st.subs[typeURL] = sub
	s.metrics.streams.WithLabelValues(typeLabel(typeURL)).Inc()
	if typeURL == addressType {
		s.mu.Lock()
		defer s.mu.Unlock()
		st.standing = s.arrive(st.from.Node)
	}
	st.wake()
	return nil
}

// noteApplied takes note that the client decides by a version, noteAnswer that it has
// settled on it or refuses something of it. A version of 0 is none yet.
func (s *Server) noteApplied(st *stream, version uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.standing != nil {
		s.note(st.standing, 0, version)
	}
}

func (s *Server) noteAnswer(st *stream, typeURL string, version uint64, refused *message.Status) {
	refusal := ""
	if refused != nil {
		refusal = fmt.Sprintf("%.2048s", or(refused.GetMessage(), "no reason given"))
		s.metrics.rejected.WithLabelValues(typeLabel(typeURL)).Inc()
		s.cfg.Log.Error("node refuses resources", "node", st.from.Node, "type", typeURL, "error", refusal)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if refusal != st.refusals[typeURL] {
		delete(st.refusals, typeURL)
		s.notify()
	}
	if refusal != "" {
		st.refusals[typeURL] = refusal
	} else if typeURL == addressType {
		s.note(st.standing, version, version)
	}
}

// next makes the response that is due, or nil.
func (s *Server) next(st *stream) (*response, error) {
	for _, sub := range st.subs {
		for !sub.isBehind() {
			resp, done, err := s.cut(sub, st.from.Node)
			if resp != nil || err != nil {
				return resp, err
			}
			if done {
				break
			}
		}
	}
	return nil, nil
}

// tableFor scopes: the pods of a node are for that node only. A type that is not
// known has no resources, and is answered all the same: foreign clients wait for it.
// Called with told.
func (s *Server) tableFor(node, typeURL string) *table {
	switch typeURL {
	case addressType, policyType:
		return s.world
	case podType:
		return s.pods[node]
	case namespaceType:
		return s.namespaces
	}
	return nil
}

// cut takes the next response off the log, nil if none is due. It is done if it came to
// the end: the client has then what was published at that moment, no more and no less,
// since what changes while a large World is told has moved to the end of the log.
func (s *Server) cut(sub *subscription, node string) (resp *response, done bool, err error) {
	s.told.RLock()
	t, version := s.tableFor(node, sub.typeURL), s.version
	if sub.isOlder(t) {
		s.told.RUnlock()
		return nil, false, status.Error(codes.Aborted, "too far behind to be told what was removed: begin again")
	}
	k, found, position, done := sub.read(t, s.portion)
	if version != 0 {
		found = append(found, sub.interest.tell(t)...)
	}
	resp = &response{DeltaDiscoveryResponse: &message.DeltaDiscoveryResponse{TypeUrl: sub.typeURL, Origin: s.origin}, pack: k}
	resp.add(found)
	if done && sub.interest == nil {
		resp.Digest = t.digest()
	}
	s.told.RUnlock()
	if version == 0 {
		return nil, true, nil
	}
	sub.position = position
	if done {
		sub.position = version // also of a table that is younger than its position
	}
	if done {
		done = sub.claim.finish(resp.DeltaDiscoveryResponse)
	}
	if resp.count() == 0 && !(done && sub.owes()) {
		return nil, done, nil
	}
	return sub.sign(resp, version, done), done, outward(resp)
}

// read gives what is told next, packed if it is the same for all who are there. Called with told.
func (sub *subscription) read(t *table, size portion) (k *pack, found []*entry, upTo uint64, all bool) {
	if sub.packs && (sub.claim == nil || sub.claim.most) {
		if k = t.pack(sub.position, size); k != nil {
			return k, nil, k.upTo, k.all
		}
	}
	found, upTo, all = t.read(sub.position, size, func(a slot) bool { return !sub.has(a.entry) || sub.claim.holds(a) || sub.interest.passes(a.entry) })
	return nil, found, upTo, all
}

// has reports whether an entry of the table is of what the subscription is for.
func (sub *subscription) has(e *entry) bool {
	isWorld := sub.typeURL == addressType || sub.typeURL == policyType
	return sub.whole || !isWorld || typeOf(e.name) == sub.typeURL
}

// isOlder reports whether the client may have something that was removed and is not
// remembered.
func (sub *subscription) isOlder(t *table) bool {
	upTo := sub.position
	if sub.claim != nil {
		upTo = max(upTo, sub.claim.upTo)
	}
	return t != nil && upTo < t.since
}

// owes tells whether the client waits for a response, be it empty: the first, or the end
// of a publication.
func (sub *subscription) owes() bool { return !sub.greeted || sub.open }

// sign makes resp the next response.
func (sub *subscription) sign(resp *response, version uint64, done bool) *response {
	if !sub.greeted && sub.claim.isCompared() {
		resp.Compared = &message.Compared{Differing: sub.claim.differing}
	}
	resp.SystemVersionInfo = strconv.FormatUint(version, 10)
	sub.nonce++
	resp.Nonce = strconv.FormatUint(sub.nonce, 10)
	sub.greeted, sub.open = true, !done
	if !done {
		resp.SystemVersionInfo += more
		version = 0
	} else {
		sub.claim = nil
	}
	sub.unacked = append(sub.unacked, version)
	return resp
}
