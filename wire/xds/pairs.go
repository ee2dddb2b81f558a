package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/pause"
	"tacit.dev/wire/xds/message"
)

const (
	// pairsEvery is how often a proxy tells of its connections.
	pairsEvery = 10 * time.Second
	// pairsPause is how long control takes at least for one report: who does not wait for
	// the answer is not read sooner.
	pairsPause = 50 * time.Millisecond
	// pairsUnknown is how long a proxy leaves a control alone that does not take Pairs.
	pairsUnknown = 5 * time.Minute
)

// Observer has what a proxy saw. One goroutine calls it.
type Observer interface {
	// Take returns what was seen since the last that was Kept, of at most most pairs, and
	// whether there is more.
	Take(most int) (seen mesh.Pairs, more bool)
	// Kept says that control has what Take returned last.
	Kept()
}

// PairClient tells control what a proxy sees. What could not be told is told when control is
// back, summed up. If a report arrives and its answer does not, it counts twice.
type PairClient struct {
	cfg     ClientConfig
	metrics *clientMetrics
	from    Observer
	every   time.Duration // pairsEvery, but in tests
}

// NewPairClient starts nothing.
func NewPairClient(cfg ClientConfig, from Observer) *PairClient {
	d := newDelta[any](cfg, addressType) // for its defaults
	return &PairClient{cfg: d.cfg, metrics: d.metrics, from: from, every: pairsEvery}
}

// Run tells until ctx is done. It connects again for ever, and returns only ctx's error, or
// one of the configuration.
func (c *PairClient) Run(ctx context.Context) error {
	if c.cfg.Conn == nil {
		return fmt.Errorf("tell control of connections as node %q: want a connection", c.cfg.Node)
	}
	return keepTrying(ctx, c.cfg, "pair stream", c.metrics.failures.Inc, c.session)
}

func (c *PairClient) session(ctx context.Context, heard func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, err := message.NewObservationsClient(c.cfg.Conn).Observe(ctx)
	if err != nil {
		return err
	}
	for sequence := uint64(1); ; {
		seen, more := c.from.Take(mesh.MaxPairsTold)
		if len(seen.List) > 0 || seen.Other > 0 {
			if err := c.tell(g, seen, sequence); err != nil {
				if status.Code(err) == codes.Unimplemented {
					pause.For(ctx, pairsUnknown)
				}
				return err
			}
			heard()
			c.from.Kept()
			sequence++
		}
		if !more && !pause.For(ctx, c.every) {
			return ctx.Err()
		}
	}
}

// tell returns when control has taken seen.
func (c *PairClient) tell(g message.Observations_ObserveClient, seen mesh.Pairs, sequence uint64) error {
	err := g.Send(encodePairs(seen, sequence))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	ack, err := g.Recv() // tells also why it could not be sent
	if err == nil && ack.GetSequence() != sequence {
		err = fmt.Errorf("control took report %d: want %d", ack.GetSequence(), sequence)
	}
	return err
}

// observations takes what proxies see.
type observations struct {
	message.UnimplementedObservationsServer
	server *Server
}

func (o observations) Observe(g message.Observations_ObserveServer) error {
	s := o.server
	from, err := s.admit(g.Context())
	if err != nil {
		return err
	}
	defer s.dismiss(from)
	if from.Agent || !s.beginPairs(from.Node) {
		s.metrics.refused.Inc()
		err := status.Error(codes.PermissionDenied, "connections are told by the proxy, over one stream")
		s.cfg.Log.Warn("node refused", "node", from.Node, "agent", from.Agent, "peer", peerAddr(g.Context()), "error", err)
		return err
	}
	defer s.endPairs(from.Node)
	for {
		m, err := g.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		seen, err := decodePairs(m)
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		if s.cfg.OnPairs != nil {
			s.cfg.OnPairs(from.Node, seen)
		}
		pause.For(g.Context(), pairsPause)
		if err := g.Send(&message.ReportAck{Sequence: m.GetSequence()}); err != nil {
			return err
		}
	}
}

// beginPairs tells whether nobody tells of the connections of that node already.
func (s *Server) beginPairs(node string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.node(node)
	if n.pairs {
		return false
	}
	n.pairs = true
	return true
}

func (s *Server) endPairs(node string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes[node].pairs = false
}

var crossings = map[mesh.Crossing]message.Crossing{
	mesh.CrossedByTLS: message.Crossing_CROSSING_MUTUAL_TLS, mesh.PlaintextIn: message.Crossing_CROSSING_PLAINTEXT_IN,
	mesh.PlaintextOut: message.Crossing_CROSSING_PLAINTEXT_OUT, mesh.Denied: message.Crossing_CROSSING_DENIED,
}

func encodePairs(seen mesh.Pairs, sequence uint64) *message.PairReport {
	m := &message.PairReport{Sequence: sequence, Other: seen.Other}
	for _, p := range seen.List {
		m.Pairs = append(m.Pairs, &message.Pair{
			Source: encodeParty(p.Source), Destination: encodeParty(p.Destination), Port: uint32(p.Port), Crossing: crossings[p.Crossing],
			BySource: p.Reporter == mesh.BySource, Connections: p.Connections, Bytes: p.Bytes, First: p.First.UnixMilli(), Last: p.Last.UnixMilli(),
		})
	}
	return m
}

func encodeParty(p mesh.Party) *message.Party {
	m := &message.Party{Namespace: p.Namespace, Workload: p.Workload, Account: p.Account, Node: p.Node, InCluster: p.Where == mesh.InCluster}
	if p.Block.IsValid() {
		m.Address, m.Length = p.Block.Addr().AsSlice(), uint32(p.Block.Bits())
	}
	return m
}

func decodePairs(m *message.PairReport) (mesh.Pairs, error) {
	seen := mesh.Pairs{Other: m.GetOther()}
	if n := len(m.GetPairs()); n > mesh.MaxPairsTold {
		return seen, fmt.Errorf("%d pairs: want at most %d", n, mesh.MaxPairsTold)
	}
	for _, one := range m.GetPairs() {
		p, err := decodePair(one)
		if err != nil {
			return seen, err
		}
		seen.List = append(seen.List, p)
	}
	return seen, nil
}

func decodePair(m *message.Pair) (p mesh.Pair, err error) {
	p.Connections, p.Bytes = m.GetConnections(), m.GetBytes()
	p.First, p.Last = time.UnixMilli(m.GetFirst()), time.UnixMilli(m.GetLast())
	if p.Reporter = mesh.ByDestination; m.GetBySource() {
		p.Reporter = mesh.BySource
	}
	for crossing, number := range crossings {
		if number == m.GetCrossing() {
			p.Crossing = crossing
		}
	}
	if m.GetPort() > 65535 {
		return p, fmt.Errorf("pair of port %d", m.GetPort())
	}
	p.Port = uint16(m.GetPort())
	if p.Source, err = decodeParty(m.GetSource()); err != nil {
		return p, err
	}
	if p.Destination, err = decodeParty(m.GetDestination()); err != nil {
		return p, err
	}
	return p, p.Check()
}

func decodeParty(m *message.Party) (mesh.Party, error) {
	p := mesh.Party{Namespace: m.GetNamespace(), Workload: m.GetWorkload(), Account: m.GetAccount(), Node: m.GetNode()}
	switch {
	case p.Node != "":
		p.Where = mesh.AtNode
	case p.Account != "":
		p.Where = mesh.AtWorkload
	case m.GetInCluster():
		p.Where = mesh.InCluster
	default:
		p.Where = mesh.Outside
	}
	if len(m.GetAddress()) == 0 {
		return p, nil
	}
	a, ok := netip.AddrFromSlice(m.GetAddress())
	if !ok || m.GetLength() > uint32(a.BitLen()) {
		return p, fmt.Errorf("block of %d bytes / %d bits: want an address and its prefix", len(m.GetAddress()), m.GetLength())
	}
	p.Block = netip.PrefixFrom(a, int(m.GetLength()))
	return p, nil
}
