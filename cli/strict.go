package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/policy"
)

func strictCommand() *cobra.Command {
	q := &strictness{}
	cmd := modeCommand("strict", kube.StrictMode, "refuse plaintext", `Refuses plaintext: pods of the mesh take none, and send none to addresses of the cluster. Open connections in plaintext
are reset.

With --dry-run, nothing is changed. The command reports what would break of the connections that nodes observed (see
"tacit flows"): for each client or server, since when it has been observed, and what to do about it. Exceptions are
taken into account. Plaintext of a workload whose pods are all protected by now does not count if it is older than that.

Exit codes: 0: the mode is set or, with --dry-run, nothing would break; 1: it failed; 2: something would break.`, q.check)
	cmd.Flags().BoolVar(&q.dryRun, "dry-run", false, "report what would break, and change nothing")
	cmd.Flags().DurationVar(&q.since, "since", 7*24*time.Hour, "with --dry-run, leave out what was last seen longer ago")
	return cmd
}

// strictness are the flags of strict.
type strictness struct {
	dryRun bool
	since  time.Duration
}

// check tells what would break, and whether the mode is to be set.
func (q *strictness) check(cmd *cobra.Command, c *cluster, of modeTarget, m modeChange) (goOn bool, err error) {
	if !q.dryRun {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
	defer cancel()
	o, err := c.observed(ctx)
	if err != nil {
		return false, err
	}
	if o.tellBreaks(cmd.OutOrStdout(), o.breaks(of, m, time.Now().Add(-q.since))) {
		return false, lacking
	}
	return false, nil
}

// strictly are the objects as they would be if the mode were strict.
func strictly(o kube.Objects, of modeTarget, m modeChange, labels map[string]string) kube.Objects {
	if of.namespace == "" {
		made := kube.Mesh{ObjectMeta: metav1.ObjectMeta{Name: kube.MeshName}}
		for _, is := range o.Meshes {
			made = *is
		}
		if m.inbound {
			made.Spec.Mode = kube.StrictMode
		}
		if m.outbound {
			var out kube.MeshOutbound
			if made.Spec.Outbound != nil {
				out = *made.Spec.Outbound
			}
			out.Mode = kube.StrictMode
			made.Spec.Outbound = &out
		}
		o.Meshes = []*kube.Mesh{&made}
		return o
	}
	if m.inbound { // of several, the oldest counts
		spec, _ := json.Marshal(map[string]any{"mtls": map[string]string{"mode": "STRICT"}})
		if of.workload != "" {
			spec, _ = json.Marshal(map[string]any{"mtls": map[string]string{"mode": "STRICT"}, "selector": map[string]any{"matchLabels": labels}})
		}
		o.Peers = append(slices.Clone(o.Peers), &kube.PeerAuthentication{ObjectMeta: metav1.ObjectMeta{Name: "-", Namespace: of.namespace}, Spec: spec})
	}
	for i, n := range o.Namespaces {
		if m.outbound && n.Name == of.namespace {
			o.Namespaces = slices.Clone(o.Namespaces)
			o.Namespaces[i] = n.DeepCopy()
			metav1.SetMetaDataAnnotation(&o.Namespaces[i].ObjectMeta, kube.AnnotationOutboundMode, kube.StrictMode)
		}
	}
	return o
}

// observedLate is how much later than a connection begins or ends it may be seen: a pod counts as
// protected a moment before its peers know.
const observedLate = 30 * time.Second

// broken is a client or a server of whose plaintext something would break.
type broken struct {
	who    string
	pairs  []mesh.Pair
	remedy string
}

// breaks are those that strict would break in the scope, by name.
func (o *observed) breaks(of modeTarget, m modeChange, since time.Time) (all []*broken) {
	labels := labelsOf(o.pods[of.namespace+"/"+of.workload])
	after := newPresent(strictly(o.objects, of, m, labels), o.cfg)
	w := after.world()
	by := make(map[string]*broken)
	for _, p := range o.Pairs {
		if p.Last.Before(since) || !of.has(*p.Own()) || o.isOver(p) {
			continue
		}
		var who, remedy string
		switch {
		case p.Crossing == mesh.PlaintextIn && m.inbound && after.refuses(w, p):
			who, remedy = o.client(p)
		case p.Crossing == mesh.PlaintextOut && m.outbound && after.refuses(w, p):
			who, remedy = o.server(p)
		default:
			continue
		}
		b := by[who]
		if b == nil {
			b = &broken{who: who, remedy: remedy}
			by[who], all = b, append(all, b)
		}
		b.pairs = append(b.pairs, p)
	}
	slices.SortFunc(all, func(x, y *broken) int { return cmp.Compare(x.who, y.who) })
	return all
}

// refuses tells whether the mode of a pod refuses plaintext like that of the pair.
func (p *present) refuses(w *mesh.World, pair mesh.Pair) bool {
	return slices.ContainsFunc(p.pods[pair.Own().String()], func(pod podNow) bool {
		if !pod.enrolled {
			return false
		}
		set := setOf(w, &pod)
		if pair.Crossing == mesh.PlaintextOut {
			return slices.ContainsFunc(p.addressesOf(pair.Destination), func(a netip.Addr) bool { return p.keepsFrom(set, netip.AddrPortFrom(a, pair.Port), pair.Destination) })
		}
		return slices.ContainsFunc(p.addressesOf(pair.Source), func(from netip.Addr) bool {
			return slices.ContainsFunc(pod.workload.Addresses, func(to netip.Addr) bool {
				c := &policy.Connection{Source: from, Destination: netip.AddrPortFrom(to, pair.Port), FromNode: w.IsNode(from)}
				return to.Is4() == from.Is4() && set.Decide(c).Reason == policy.Strict
			})
		})
	})
}

// keepsFrom tells whether plaintext to there is refused, however it was dialed: nodes do not tell
// by which Service.
func (p *present) keepsFrom(set *policy.Set, to netip.AddrPort, party mesh.Party) bool {
	dialed := []netip.AddrPort{to}
	for _, s := range p.result.Services {
		for _, port := range s.Ports {
			for _, a := range s.Addresses {
				if p.leadsTo(s, port.Service, to) {
					dialed = append(dialed, netip.AddrPortFrom(a, port.Service))
				}
			}
		}
	}
	return !slices.ContainsFunc(dialed, func(d netip.AddrPort) bool {
		return set.Leave(&policy.Departure{Dialed: d, To: to, Inside: party.Where != mesh.Outside}).Reason != policy.Strict
	})
}

func (p *present) leadsTo(s *mesh.Service, port uint16, to netip.AddrPort) bool {
	return slices.ContainsFunc(p.result.Workloads, func(w *mesh.Workload) bool {
		return slices.Contains(w.Addresses, to.Addr()) && slices.ContainsFunc(w.Services[s.Key()], func(x mesh.Port) bool { return x.Service == port && x.Target == to.Port() })
	})
}

// isOver tells whether both ends are workloads of the mesh by now, and were seen in plaintext
// before that only.
func (o *observed) isOver(p mesh.Pair) bool {
	from, to := o.protectedSince(p.Source.String()), o.protectedSince(p.Destination.String())
	if from.IsZero() || to.IsZero() {
		return false
	}
	if to.After(from) {
		from = to
	}
	return p.Last.Before(from.Add(observedLate))
}

// client says who the client of plaintext is that came in, and what to do about it.
func (o *observed) client(p mesh.Pair) (who, remedy string) {
	admit := fmt.Sprintf("admit nodes: annotate the pods of %s with tacit.dev/admit-nodes=%d", p.Destination, p.Port)
	switch p.Source.Where {
	case mesh.AtNode:
		return "client " + p.Source.String() + ": its host network", admit
	case mesh.InCluster:
		if node := o.nodeOf(p.Source.Block.Addr()); node != "" {
			return fmt.Sprintf("client %s: the host network of node %s, or a pod that is gone", p.Source, node), exceptionOf(p)
		}
		return fmt.Sprintf("client %s: no pod is known there", p.Source), exceptionOf(p)
	case mesh.Outside:
		return fmt.Sprintf("client %s: outside of the cluster", p.Source), exceptionOf(p)
	}
	name := p.Source.String()
	switch {
	case len(o.pods[name]) == 0:
		return fmt.Sprintf("client %s: it has no pods now", name), "enroll it before it runs again: " + o.enroll(p.Source)
	case !o.all(name, func(pod *podNow) bool { return pod.enrolled }):
		return fmt.Sprintf("client %s: not enrolled", name), o.enroll(p.Source)
	}
	return fmt.Sprintf("client %s: enrolled, and it still sends plaintext", name),
		"remove the annotation tacit.dev/exclude-outbound of its pods, or restart those with connections that are older than their enrollment"
}

// server says who the server of plaintext is that went out, and what to do about it.
func (o *observed) server(p mesh.Pair) (who, remedy string) {
	allow := fmt.Sprintf("or allow it: annotate the pods of %s with tacit.dev/outbound-allowed=", p.Source)
	name := p.Destination.String()
	switch {
	case p.Destination.Where == mesh.AtNode:
		return "server " + name + ": its host network", strings.TrimPrefix(allow, "or ") + fmt.Sprint(p.Port)
	case p.Destination.Where == mesh.Outside:
		return "server " + name + ": outside of the cluster, and not listed", fmt.Sprintf("list it in spec.outbound.allowed of the Mesh: [%s]:%d", p.Destination.Block, p.Port)
	case p.Destination.Where == mesh.InCluster:
		return "server " + name + ": no pod is known there", strings.TrimPrefix(allow, "or ") + netip.AddrPortFrom(p.Destination.Block.Addr(), p.Port).String()
	case len(o.pods[name]) == 0:
		return fmt.Sprintf("server %s: it has no pods now", name), "enroll it before it runs again: " + o.enroll(p.Destination)
	case !o.all(name, func(pod *podNow) bool { return pod.enrolled }):
		return fmt.Sprintf("server %s: not enrolled", name), o.enroll(p.Destination) + "; " + allow + fmt.Sprint(p.Port)
	}
	return fmt.Sprintf("server %s: enrolled, and port %d is excluded", name, p.Port),
		"remove the port from the annotation tacit.dev/exclude-inbound-ports of its pods; " + allow + fmt.Sprint(p.Port)
}

// enroll is the command that enrolls a workload.
func (o *observed) enroll(p mesh.Party) string {
	for _, e := range o.result.Exceptions {
		for _, pod := range o.pods[p.String()] {
			if e.Namespace == pod.object.Namespace && e.Name == pod.object.Name && e.Reason != "" && !pod.enrolled {
				return fmt.Sprintf("it is left out (%s): remove what says so, or exclude it", e.Reason)
			}
		}
	}
	return fmt.Sprintf("enroll it: kubectl label namespace %s tacit.dev/mesh=on", p.Namespace)
}

// exceptionOf is the exception of the Mesh that admits plaintext from a block.
func exceptionOf(p mesh.Pair) string {
	return fmt.Sprintf("admit it: in spec.exceptions of the Mesh {namespace: %s, workload: %s, ports: [%d], from: [%s]}",
		p.Destination.Namespace, p.Destination.Workload, p.Port, p.Source.Block)
}

// tellBreaks tells who would break, and whether that is anybody.
func (o *observed) tellBreaks(out io.Writer, all []*broken) bool {
	for _, b := range all {
		fmt.Fprintln(out, b.who)
		for _, p := range b.pairs {
			fmt.Fprintf(out, "    %s -> %s:%d, %s, first %s, last %s\n", p.Source, p.Destination, p.Port, count(p.Connections, "connection"), clock(p.First), clock(p.Last))
		}
		fmt.Fprintf(out, "    remedy: %s\n", b.remedy)
	}
	since := "nothing was observed"
	if first := o.firstSeen(); !first.IsZero() {
		since = "observed since " + clock(first)
	}
	fmt.Fprintf(out, "would break: %d (%s)\n", len(all), since)
	tellGaps(out, o.PairShard)
	return len(all) > 0
}

func (o *observed) firstSeen() (first time.Time) {
	for _, p := range o.Pairs {
		if first.IsZero() || p.First.Before(first) {
			first = p.First
		}
	}
	return first
}
