package agent

import (
	"context"
	"net/netip"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
	"tacit.dev/wire/handle"
)

const (
	// maxBinds bounds how many sockets with a privileged port a pod's proxy may wait for,
	// and bindRate how many it gets in a second: those who connect from such ports are few.
	maxBinds = 64
	bindRate = 256
)

// binds are the sources to which the proxy wants sockets of one pod to be bound. They belong
// to the loop.
type binds struct {
	asked []netip.AddrPort
	// busy: some are being made.
	busy bool
	// given counts those of the second that began at since.
	given int
	since time.Time
}

// ask takes a request, or reports false if there are too many.
func (b *binds) ask(source netip.AddrPort, now time.Time) bool {
	if now.Sub(b.since) >= time.Second {
		b.given, b.since = 0, now
	}
	if b.given >= bindRate || len(b.asked) >= maxBinds {
		return false
	}
	b.given++
	b.asked = append(b.asked, source)
	return true
}

// askBind takes a request of the proxy's.
func (a *Agent) askBind(p *pod, source netip.AddrPort) {
	if !p.binds.ask(source, time.Now()) {
		a.proxy.send(unbound(p.key, source, "too many at once"), nil)
	}
}

func unbound(key string, source netip.AddrPort, reason string) handle.Message {
	return handle.Message{Kind: handle.Bound, UID: key, Source: source, Reason: reason[:min(len(reason), 1000)]}
}

// bind makes the sockets that the proxy wants to be bound. This goes on beside any other job.
func (a *Agent) bind(ctx context.Context, p *pod) {
	if len(p.binds.asked) == 0 || p.binds.busy || a.proxy == nil {
		return
	}
	ns, d, key, asked := p.ns, a.proxy, p.key, p.binds.asked
	p.binds.asked = nil
	if ns == nil {
		for _, source := range asked {
			d.send(unbound(key, source, "the pod is not served"), nil)
		}
		return
	}
	p.binds.busy = true
	a.aside(ctx, func(ctx context.Context) error {
		for _, source := range asked {
			fd, err := ns.BindForeign(source, mesh.Mark)
			if err != nil {
				d.send(unbound(key, source, err.Error()), nil)
				a.metrics.binds.WithLabelValues(result(err)).Inc()
				continue
			}
			a.boundUnread(fd)
			d.send(handle.Message{Kind: handle.Bound, UID: key, Source: source}, []int{fd})
			a.metrics.binds.WithLabelValues(result(nil)).Inc()
		}
		return nil
	}, func(error) { p.binds.busy = false })
}

// ephemeralPorts are the first and the last port that the namespace gives to programs that ask
// for none; zeros if that cannot be read.
func ephemeralPorts(ns *netns.NS) [2]uint16 {
	first, last, err := ns.EphemeralPorts()
	if err != nil {
		return [2]uint16{}
	}
	return [2]uint16{first, last}
}

// hearPorts notes what ephemeralPorts has read, and tells the proxy if that is news. A runtime
// sets them when the pod has been captured already, so they are read again and again.
func (a *Agent) hearPorts(p *pod, ports [2]uint16) {
	if ports == [2]uint16{} {
		return
	}
	p.markedPorts = mesh.IsDirectPort(ports[1])
	if a.proxy != nil && p.proxy != unsaid && p.ports != ports {
		p.ports = ports
		a.proxy.send(handle.Message{Kind: handle.Ports, UID: p.key, Ports: ports}, nil)
	}
}
