package xds

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

const (
	// chunkBytes bounds one response, if no single resource is larger: a stream
	// holds one at a time, whatever the size of the World.
	chunkBytes = 256 << 10
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

	subs  map[string]*subscription // guarded by Server.mu
	nonce uint64                   // of the handler's goroutine
}

// subscription is what a stream has been told of one type; guarded by Server.mu.
//
//	          Publish                 cut, until nothing is pending
//	at = now ─────────► at < now ─► pending ───────────────► unacked
//	   ▲                                                        │ ack: acked = its version
//	   └────────────────────────────────────────────────────────┘ nack: acked stays
type subscription struct {
	typeURL string
	at      uint64            // publication compared against last
	sent    map[string]string // name → version that the client has, or will
	pending []string          // names to send of publication at
	greeted bool              // an answer went out, if an empty one
	unacked []response        // oldest first
	decided int               // so many of unacked the client decides by
	acked   uint64            // the client has settled on it
	applied uint64            // the client decides by it, if it is later than acked
	nack    string            // what it refuses as yet, or ""
}

type response struct {
	nonce   string
	version uint64 // 0 if others of the publication follow
}

func (d discovery) DeltaAggregatedResources(g deltaStream) error {
	s := d.server
	from, err := s.admit(g.Context())
	if err != nil {
		return err
	}
	defer s.dismiss(from)
	st := &stream{from: from, poke: make(chan struct{}, 1), subs: map[string]*subscription{}}
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
	for {
		select {
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
	resp := s.next(st)
	if resp == nil {
		return nil
	}
	n := len(resp.Resources) + len(resp.RemovedResources)
	s.metrics.sent.WithLabelValues(typeLabel(resp.TypeUrl)).Add(float64(n))
	st.wake()
	return g.Send(resp)
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
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[st.from.Node]
	delete(n.streams, st)
	for typeURL := range st.subs {
		s.metrics.streams.WithLabelValues(typeLabel(typeURL)).Dec()
	}
	if st.subs[addressType] == nil {
		return
	}
	if _, proxy := n.acked(); !proxy {
		s.left(st.from.Node)
	}
	s.notify()
}

// take handles one request.
func (s *Server) take(st *stream, req *message.DeltaDiscoveryRequest) error {
	if err := checkNode(st.from.Node, req.GetNode().GetId()); err != nil {
		return err
	}
	for _, name := range req.GetResourceNamesSubscribe() {
		if name != "*" {
			return status.Errorf(codes.Unimplemented, "subscribe to %q: want everything", name)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sub := st.subs[req.GetTypeUrl()]
	if sub == nil {
		return s.subscribe(st, req)
	}
	if nonce := req.GetAppliedNonce(); nonce != "" && sub.apply(nonce) {
		st.wake()
		s.notify()
	}
	if req.GetResponseNonce() != "" {
		s.answered(st, sub, req)
	}
	return nil
}

// apply notes that the client decides by the response, and reports whether that is new.
func (sub *subscription) apply(nonce string) bool {
	i := slices.IndexFunc(sub.unacked, func(r response) bool { return r.nonce == nonce })
	if i < sub.decided {
		return false
	}
	sub.decided, sub.applied = i+1, max(sub.applied, sub.unacked[i].version)
	return true
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

// subscribe begins where the client says that it is. Called with mu.
func (s *Server) subscribe(st *stream, req *message.DeltaDiscoveryRequest) error {
	if forAgents := req.GetTypeUrl() == podType || req.GetTypeUrl() == namespaceType; forAgents != st.from.Agent {
		return status.Errorf(codes.PermissionDenied, "the token is that of the %s: it gets no %q", st.from, req.GetTypeUrl())
	}
	if req.GetTypeUrl() == "" || len(st.subs) >= maxTypes {
		return status.Errorf(codes.InvalidArgument, "subscribe to type %q: want a type, and at most %d of them", req.GetTypeUrl(), maxTypes)
	}
	sent := req.GetInitialResourceVersions()
	if sent == nil {
		sent = map[string]string{}
	}
	st.subs[req.GetTypeUrl()] = &subscription{typeURL: req.GetTypeUrl(), sent: sent}
	s.metrics.streams.WithLabelValues(typeLabel(req.GetTypeUrl())).Inc()
	if req.GetTypeUrl() == addressType {
		s.nodes[st.from.Node].returned()
		s.notify()
	}
	st.wake()
	return nil
}

// answered takes an ack or a nack. A nonce that is not known any more says
// nothing. Called with mu.
func (s *Server) answered(st *stream, sub *subscription, req *message.DeltaDiscoveryRequest) {
	i := 0
	for i < len(sub.unacked) && sub.unacked[i].nonce != req.GetResponseNonce() {
		i++
	}
	if i == len(sub.unacked) {
		return
	}
	version := sub.unacked[i].version
	sub.unacked, sub.decided = sub.unacked[i+1:], max(sub.decided-i-1, 0)
	sub.nack = ""
	if e := req.GetErrorDetail(); e != nil {
		sub.nack = fmt.Sprintf("%.2048s", or(e.GetMessage(), "no reason given"))
		s.metrics.rejected.WithLabelValues(typeLabel(sub.typeURL)).Inc()
		s.cfg.Log.Error("node refuses resources", "node", st.from.Node, "type", sub.typeURL, "error", sub.nack)
	} else if version != 0 {
		sub.acked = version
	}
	st.wake()
	s.notify()
}

// next makes the response that is due, or nil.
func (s *Server) next(st *stream) *message.DeltaDiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.version == 0 {
		return nil
	}
	for _, sub := range st.subs {
		t := s.tableFor(st.from.Node, sub.typeURL)
		if sub.compare(t, s.version) {
			s.notify()
		}
		if sub.due() {
			st.nonce++
			return sub.cut(t, strconv.FormatUint(st.nonce, 10))
		}
	}
	return nil
}

// tableFor scopes: the pods of a node are for that node only. A type that is not
// known has no resources, and is answered all the same: foreign clients wait for it.
func (s *Server) tableFor(node, typeURL string) *table {
	switch typeURL {
	case addressType:
		return s.world
	case podType:
		return s.pods[node]
	case namespaceType:
		return s.namespaces
	}
	return nil
}

// compare takes up a newer publication, once the last one is out and not too many
// answers are missing. It reports whether acked or applied moved: where nothing differs, what
// was settled for the last publication is so for this one.
func (sub *subscription) compare(t *table, version uint64) (moved bool) {
	if len(sub.pending) > 0 || sub.at == version || sub.isBehind() {
		return false
	}
	for _, name := range t.candidates(sub.at, sub.sent) {
		e := t.all()[name]
		had, known := sub.sent[name]
		if e == nil && known || e != nil && e.version != had {
			sub.pending = append(sub.pending, name)
		}
	}
	sub.at = version
	if len(sub.pending) > 0 || !sub.greeted {
		return false
	}
	if n := len(sub.unacked); n > 0 {
		sub.unacked[n-1].version = version
		if sub.decided < n {
			return false
		}
		sub.applied = version
		return true
	}
	if sub.nack == "" {
		sub.acked = version
	}
	return sub.nack == ""
}

func (sub *subscription) due() bool {
	return !sub.isBehind() && (len(sub.pending) > 0 || !sub.greeted)
}

// cut takes the next chunk off pending. The table may be newer than sub.at; what
// is sent is what it has now, and the next comparison finds it sent.
func (sub *subscription) cut(t *table, nonce string) *message.DeltaDiscoveryResponse {
	resp := &message.DeltaDiscoveryResponse{TypeUrl: sub.typeURL, Nonce: nonce}
	size := 0
	for len(sub.pending) > 0 && size < chunkBytes {
		name := sub.pending[0]
		sub.pending = sub.pending[1:]
		e := t.all()[name]
		if e == nil {
			delete(sub.sent, name)
			resp.RemovedResources = append(resp.RemovedResources, name)
			size += len(name) + 4
			continue
		}
		if sub.sent[name] == e.version {
			continue
		}
		sub.sent[name] = e.version
		resp.Resources = append(resp.Resources, &message.Resource{
			Name: name, Version: e.version, Resource: &anypb.Any{TypeUrl: sub.typeURL, Value: e.body}})
		size += len(e.body) + len(name) + len(e.version) + len(sub.typeURL) + 16
	}
	resp.SystemVersionInfo = strconv.FormatUint(sub.at, 10)
	sub.greeted = true
	r := response{nonce: nonce, version: sub.at}
	if len(sub.pending) > 0 {
		resp.SystemVersionInfo += more
		r.version = 0
	} else {
		sub.pending = nil
	}
	sub.unacked = append(sub.unacked, r)
	return resp
}
