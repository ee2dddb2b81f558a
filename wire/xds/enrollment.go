package xds

import (
	"context"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// maxReports bounds the opening list of one agent, far beyond the pods of a node.
const maxReports = 16 << 10

// enrollment takes the agents' reports.
type enrollment struct {
	message.UnimplementedEnrollmentServer
	server *Server
}

// reportStream is an agent's way back to control. A node has one: a newer one
// ends the older, which may belong to an agent that is dead already.
type reportStream struct {
	node    string
	replace context.CancelFunc

	// mu is held while a callback runs; over says that the successor is there,
	// so that no word of the older one comes after its first.
	mu   sync.Mutex
	over bool
}

func (e enrollment) Report(g message.Enrollment_ReportServer) error {
	s := e.server
	from, err := s.admit(g.Context())
	if err != nil {
		return err
	}
	defer s.dismiss(from)
	if !from.Agent {
		err := status.Errorf(codes.PermissionDenied, "the token is that of the %s: reports are the agent's", from)
		s.metrics.refused.Inc()
		s.cfg.Log.Warn("node refused", "node", from.Node, "peer", peerAddr(g.Context()), "error", err)
		return err
	}
	ctx, cancel := context.WithCancel(g.Context())
	defer cancel()
	rs := &reportStream{node: from.Node, replace: cancel}
	s.openReports(rs)
	defer s.closeReports(rs)
	done := make(chan error, 1)
	// reportLoop ends when the handler returns, for gRPC then ends the stream;
	// it cannot be waited for before.
	go s.reportLoop(g, rs, done)
	select {
	case err = <-done:
	case <-ctx.Done():
		err = status.Error(codes.Aborted, "another agent reports for this node")
	}
	return err
}

func (s *Server) openReports(rs *reportStream) {
	s.mu.Lock()
	n := s.node(rs.node)
	old := n.reports
	n.reports, s.movedAgents[rs.node] = rs, true
	s.mu.Unlock()
	if old != nil {
		s.cfg.Log.Info("agent replaced", "node", rs.node)
		old.end()
	}
	s.notify()
}

// end waits for a callback under way.
func (rs *reportStream) end() {
	rs.replace()
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.over = true
}

func (s *Server) closeReports(rs *reportStream) {
	rs.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.nodes[rs.node]; n.reports == rs {
		n.reports, s.movedAgents[rs.node] = nil, true
	}
	s.notify()
}

func (s *Server) reportLoop(g message.Enrollment_ReportServer, rs *reportStream, done chan<- error) {
	all, synced := []Report{}, false
	for {
		m, err := g.Recv()
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if m == nil || err != nil {
			done <- err
			return
		}
		r, err := decodeReport(m)
		switch {
		case err != nil:
		case m.GetSynced() && synced:
			err = status.Error(codes.InvalidArgument, "synced twice")
		case m.GetSynced():
			synced = true
			err = rs.call(func() { s.onReports(rs.node, all) })
			all = nil
		case synced:
			err = rs.call(func() { s.onReport(rs.node, r) })
		case len(all) == maxReports:
			err = status.Errorf(codes.ResourceExhausted, "more than %d pods", maxReports)
		default:
			all = append(all, r)
		}
		if err == nil && synced {
			err = g.Send(&message.ReportAck{Sequence: m.GetSequence()})
		}
		if err != nil {
			done <- err
			return
		}
	}
}

// call runs f unless the stream was replaced.
func (rs *reportStream) call(f func()) error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.over {
		return status.Error(codes.Aborted, "another agent reports for this node")
	}
	f()
	return nil
}

func (s *Server) onReports(node string, all []Report) {
	if s.cfg.OnReports != nil {
		s.cfg.OnReports(node, all)
	}
	s.notify()
}

func (s *Server) onReport(node string, r Report) {
	if s.cfg.OnReport != nil {
		s.cfg.OnReport(node, r)
	}
	s.notify()
}

func encodeReport(r Report, sequence uint64) *message.PodReport {
	state := message.PodState_POD_STATE_UNSPECIFIED
	switch r.State {
	case Captured:
		state = message.PodState_POD_STATE_CAPTURED
	case Released:
		state = message.PodState_POD_STATE_RELEASED
	case Unprotected:
		state = message.PodState_POD_STATE_UNPROTECTED
	}
	return &message.PodReport{Sequence: sequence, Uid: r.UID, Namespace: r.Namespace, Name: r.Name, State: state, Reason: r.Reason, Addresses: encodeAddresses(r.Addresses), MarkedPorts: r.MarkedPorts, Others: encodeAddresses(r.Others)}
}

func decodeReport(m *message.PodReport) (Report, error) {
	r := Report{UID: m.GetUid(), Namespace: m.GetNamespace(), Name: m.GetName(), Reason: m.GetReason(), MarkedPorts: m.GetMarkedPorts()}
	if m.GetSynced() {
		return r, nil
	}
	switch m.GetState() {
	case message.PodState_POD_STATE_CAPTURED:
		r.State = Captured
	case message.PodState_POD_STATE_RELEASED:
		r.State = Released
	case message.PodState_POD_STATE_UNPROTECTED:
		r.State = Unprotected
	default:
		return r, status.Errorf(codes.InvalidArgument, "report of pod %.64q in state %d: want 1 to 3", r.UID, m.GetState())
	}
	var err error
	if r.Addresses, err = decodeAddresses(m.GetAddresses()); err != nil {
		return r, status.Errorf(codes.InvalidArgument, "report of pod %.64q: %v", r.UID, err)
	}
	r.Addresses = mesh.OneOfEach(r.Addresses)
	if r.Others, err = decodeAddresses(m.GetOthers()); err != nil {
		return r, status.Errorf(codes.InvalidArgument, "report of pod %.64q: further %v", r.UID, err)
	}
	if r.UID == "" || max(len(r.UID), len(r.Namespace), len(r.Name)) > maxName || len(r.Reason) > 4*maxName {
		return r, status.Errorf(codes.InvalidArgument, "report of pod %.64q: want a uid, and names and a reason that are short", r.UID)
	}
	return r, nil
}
