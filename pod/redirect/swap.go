package redirect

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// memory is what Kernel remembers of a pod with rules. The next agent's begins without.
type memory struct {
	// rules are the last that were applied, older what was older than they.
	rules Config
	older []flow
	// sysctls are what those of ours were before.
	sysctls map[string]string
}

// remembered is k's memory of a pod, made if need be.
func (k *Kernel) remembered(ns *netns.NS) *memory {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.pods[ns.Key()]
	if m == nil {
		m = &memory{sysctls: make(map[string]string)}
		k.pods[ns.Key()] = m
	}
	return m
}

func (k *Kernel) forget(ns *netns.NS) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.pods, ns.Key())
}

// hold keeps back what begins, while it is found out what is there already: so nothing
// can begin between the census and the rules that are made of it. It is another table: the
// transaction of the rules takes it away.
func hold(c Config) string {
	return fmt.Sprintf(`add table inet tacit_hold
delete table inet tacit_hold
table inet tacit_hold {
	chain out {
		type filter hook output priority -320; policy accept;
		oifname "lo" accept
		meta mark %#x accept
		%s drop
	}
	chain in {
		type filter hook prerouting priority -320; policy accept;
		iifname "lo" accept
%s		%s drop
	}
}
`, mesh.Mark, begins, ports(c, "saddr", "dport"), begins)
}

const release = "add table inet tacit_hold\ndelete table inet tacit_hold\n"

// swap changes the rules.
func (k *Kernel) swap(ctx context.Context, ns *netns.NS, c Config, lost bool) (err error) {
	if err := k.load(ctx, ns, hold(c)); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.load(context.WithoutCancel(ctx), ns, release))
		}
	}()
	m := k.remembered(ns)
	in, err := gather(ns, c, m, lost)
	if err != nil {
		return err
	}
	held, others := most(in.captured)
	if err := destroy(ns, others); err != nil { // they would go on in clear
		return err
	}
	in.captured = held
	if err := k.load(ctx, ns, ruleset(c, in)); err != nil {
		return err
	}
	m.rules, m.older = c, in.older
	return nil
}

// gather finds out what the sets of new rules have to hold.
func gather(ns *netns.NS, c Config, m *memory, lost bool) (in contents, err error) {
	now, err := takeCensus(ns)
	if err != nil {
		return in, err
	}
	was, err := readHistory(ns)
	if err != nil {
		return in, err
	}
	in.former = now.former
	in.came, in.again = now.ofClients(was.came), now.ofClients(was.again)
	captured, through := now.through(was, m.rules)
	in.captured = append(now.behindProxy(was, m.rules), captured...)
	if c.Drain {
		return in, nil
	}
	in.captured = c.named(in.captured)
	free := slices.Concat(flowsOf(now.free), through)
	switch {
	case lost:
		in.older = within(free, m.older)
	case was.guarded:
		named := slices.Concat(m.rules.named(flowsOf(now.free)), m.rules.passing(through))
		in.older = slices.Concat(within(free, was.older), without(named, was.captured))
	case was.draining:
		in.older = without(free, was.captured)
	case was.present:
		in.older = without(free, flowsOf(now.left))
	default:
		in.older = free
	}
	return in, nil
}

// ofClients are those of flows that are clients of the proxy.
func (now census) ofClients(flows []flow) []flow {
	return slices.DeleteFunc(flows, func(f flow) bool { return !now.clients[f.remote] })
}

// behindProxy are the application's connections that went through the proxy, as far as can
// be known: its end may be gone. rules are those that were there.
func (now census) behindProxy(was history, rules Config) []flow {
	all := slices.Concat(flowsOf(now.captured), now.led, within(flowsOf(now.free), was.captured))
	if was.present && !was.draining {
		left := flowsOf(now.left)
		all = slices.Concat(all, without(without(left, was.older), rules.named(left)))
	}
	return all
}

// history is what the rules that are there have kept.
type history struct {
	// present: there are rules; guarded: that capture, with a guard; draining: that drain,
	// with one.
	present, guarded, draining bool
	older, captured            []flow
	came, again                []flow
}

func readHistory(ns *netns.NS) (h history, err error) {
	if h.present, err = hasTable(ns, tableName); err != nil || !h.present {
		return h, err
	}
	if h.older, h.guarded, err = held(ns, "older"); err != nil {
		return h, err
	}
	if h.came, _, err = held(ns, "came"); err != nil {
		return h, err
	}
	if h.again, _, err = held(ns, "again"); err != nil {
		return h, err
	}
	h.captured, h.draining, err = held(ns, "captured")
	h.draining = h.draining && !h.guarded
	return h, err
}

// within are those of flows that others has too.
func within(flows, others []flow) []flow {
	there := setOf(others)
	return slices.DeleteFunc(slices.Clone(flows), func(f flow) bool { return !there[f] })
}

// without are those that others has not.
func without(flows, others []flow) []flow {
	there := setOf(others)
	return slices.DeleteFunc(slices.Clone(flows), func(f flow) bool { return there[f] })
}

func setOf(flows []flow) map[flow]bool {
	set := make(map[flow]bool, len(flows))
	for _, f := range flows {
		set[f] = true
	}
	return set
}

// named are those of flows that rules of c leave alone: they go on under others.
func (c Config) named(flows []flow) []flow {
	return slices.DeleteFunc(slices.Clone(flows), func(f flow) bool {
		excluded := slices.ContainsFunc(c.ExcludeOutbound, func(e mesh.Exclusion) bool {
			return excludes(e, f.remote)
		})
		probed := slices.Contains(c.node, f.remote.Addr()) && slices.Contains(c.ProbePorts, f.local.Port())
		return !excluded && !probed && !slices.Contains(c.ExcludeInbound, f.local.Port())
	})
}

// excludes reports whether e leaves alone what goes to that end. An exclusion of everything is
// none.
func excludes(e mesh.Exclusion, to netip.AddrPort) bool {
	return (e.Prefix.IsValid() || e.Port != 0) && (!e.Prefix.IsValid() || e.Prefix.Contains(to.Addr())) && (e.Port == 0 || e.Port == to.Port())
}

// endCaptured resets what an application still has of captured connections, whose other
// end is gone: without rules it would go on in clear.
func (k *Kernel) endCaptured(ns *netns.NS) error {
	now, err := takeCensus(ns)
	if err != nil {
		return err
	}
	was, err := readHistory(ns)
	if err != nil || !was.present {
		return err
	}
	ends := now.behindProxy(was, k.remembered(ns).rules)
	for _, f := range now.led { // the pod has no other end of them
		ends = append(ends, f.reversed())
	}
	return destroy(ns, ends)
}

// A sysctl is one of the pod's own, with the value that the rules need.
type sysctl struct{ name, value string }

// sysctls are those of both families, or of IPv4 alone. Who accepts a connection takes the mark
// of its first packet, and who is no socket that of what it answers. And sockets are looked up
// last: a client may use one port for two ports of the pod, and conntrack then gives the
// second connection another one; what would be looked up before (early demux, also of IPv6)
// would find the first. What the pod forwards as its own comes to lo as from the network,
// from an address of the pod's.
func sysctls(six bool) []sysctl {
	all := []sysctl{{"net/ipv4/tcp_fwmark_accept", "1"}, {"net/ipv4/fwmark_reflect", "1"}, {"net/ipv4/tcp_early_demux", "0"}, {"net/ipv4/conf/lo/accept_local", "1"}}
	if six {
		all = append(all, sysctl{"net/ipv6/fwmark_reflect", "1"})
	}
	return all
}

func (k *Kernel) setSysctls(ns *netns.NS) error {
	m := k.remembered(ns)
	return eachSysctl(ns, func(s sysctl) error {
		old, err := ns.SetSysctl(s.name, s.value)
		if _, ok := m.sysctls[s.name]; !ok && err == nil {
			m.sysctls[s.name] = old
		}
		return err
	})
}

// restoreSysctls makes them what they were, where that is known.
func (k *Kernel) restoreSysctls(ns *netns.NS) error {
	var errs []error
	for name, old := range maps.Clone(k.remembered(ns).sysctls) {
		_, err := ns.SetSysctl(name, old)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func checkSysctls(ns *netns.NS) error {
	return eachSysctl(ns, func(s sysctl) error {
		value, err := ns.Sysctl(s.name)
		if err == nil && value != s.value {
			err = fmt.Errorf("namespace %d, sysctl %s is %s: %w", ns.Inode(), s.name, value, ErrRules)
		}
		return err
	})
}

func eachSysctl(ns *netns.NS, f func(sysctl) error) error {
	six, err := ns.HasIPv6()
	if err != nil {
		return err
	}
	for _, s := range sysctls(six) {
		if err := f(s); err != nil {
			return err
		}
	}
	return nil
}
