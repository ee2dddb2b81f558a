package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"tacit.dev/mesh"
)

func policySuggestCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "suggest [NAMESPACE]",
		Short: "Write policies that allow what was observed",
		Long: `Writes one AuthorizationPolicy for each enrolled workload that was seen as a destination (see "tacit flows"). It
allows the identities and ports that were observed, and nothing else. Applied, the policies deny nothing that was
observed. A workload that was not seen as a destination gets no policy, and stays open.

Plaintext has no identity. A policy admits it by its addresses or, if these are the addresses of pods, by its port
alone; a comment says so. Enroll such clients first.

The order of the output is stable: keep it in Git, and review it. Nothing is applied.`,
		Example: `  tacit policy suggest shop > policies.yaml
  tacit policy check policies.yaml
  tacit policy suggest shop --network | kubectl apply --dry-run=server -f -`,
		Args: cobra.MaximumNArgs(1),
	}
	t := newTarget(cmd.Flags())
	network := cmd.Flags().Bool("network", false, "also write a NetworkPolicy for each workload")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := parseModeTarget(args)
		if err != nil || s.workload != "" {
			return fmt.Errorf("want at most one NAMESPACE: %v", args)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
		defer cancel()
		c, err := t.connect()
		if err != nil {
			return err
		}
		o, err := c.observed(ctx)
		if err != nil {
			return err
		}
		return o.suggest(cmd.OutOrStdout(), s, *network)
	}
	return cmd
}

// access is what was observed of one destination.
type access struct {
	name string // NAMESPACE/WORKLOAD
	// ports are those that each source used.
	ports map[mesh.Party]map[uint16]bool
	plain map[mesh.Party]map[uint16]bool
}

// suggest writes policies for the destinations in the scope.
func (o *observed) suggest(out io.Writer, s modeTarget, network bool) error {
	tellGaps(commented{out}, o.PairShard)
	seen := make(map[string]bool)
	accesses := o.accesses(s)
	for _, a := range accesses {
		seen[a.name] = true
	}
	for _, a := range accesses {
		w := &policyWriter{o: o, access: a, labels: labelsOf(o.pods[a.name]), out: out}
		if !o.isEnrolled(a.name) || len(w.labels) == 0 {
			w.line("# %s: no policy: it has no enrolled pods, or its pods have no labels in common", a.name)
			continue
		}
		others := slices.DeleteFunc(o.selected(w.labels, a.name), func(name string) bool { return seen[name] })
		if len(others) > 0 {
			w.line("# the selector of %s also selects pods of %s, which were not seen as destinations", a.name, strings.Join(others, ", "))
		}
		w.authorization()
		if network && len(others) == 0 {
			w.network()
		}
	}
	return nil
}

// selected are the workloads with pods that have the labels, in the namespace of one but without it.
func (o *observed) selected(labels map[string]string, one string) (names []string) {
	space, _, _ := strings.Cut(one, "/")
	for name, pods := range o.pods {
		has := func(p podNow) bool {
			for k, v := range labels {
				if p.object.Labels[k] != v {
					return false
				}
			}
			return p.object.Namespace == space
		}
		if name != one && slices.ContainsFunc(pods, has) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// commented writes each line as a comment.
type commented struct{ io.Writer }

func (c commented) Write(b []byte) (int, error) {
	if _, err := io.WriteString(c.Writer, "# "+string(b)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// accesses are the destinations that were seen, by name. Only their own nodes' word counts.
func (o *observed) accesses(s modeTarget) []*access {
	all := make(map[string]*access)
	for _, p := range o.Pairs {
		if p.Reporter != mesh.ByDestination || p.Crossing == mesh.Denied || !s.has(p.Destination) || p.Destination.Workload == "" {
			continue
		}
		name := p.Destination.String()
		if all[name] == nil {
			all[name] = &access{name, make(map[mesh.Party]map[uint16]bool), make(map[mesh.Party]map[uint16]bool)}
		}
		ports := all[name].ports
		if p.Crossing == mesh.PlaintextIn && !o.isOver(p) { // else it has an identity by now
			ports = all[name].plain
		}
		if ports[p.Source] == nil {
			ports[p.Source] = make(map[uint16]bool)
		}
		ports[p.Source][p.Port] = true
	}
	var list []*access
	for _, name := range slices.Sorted(maps.Keys(all)) {
		list = append(list, all[name])
	}
	return list
}

// policyWriter writes the policies of one workload.
type policyWriter struct {
	o *observed
	*access
	labels map[string]string
	out    io.Writer
}

func (w *policyWriter) line(format string, args ...any) { fmt.Fprintf(w.out, format+"\n", args...) }

func (w *policyWriter) head(api, kind string) {
	space, name, _ := strings.Cut(w.name, "/")
	w.line("---\napiVersion: %s\nkind: %s\nmetadata:\n  name: %s\n  namespace: %s\nspec:", api, kind, quoted(name), quoted(space))
}

func (w *policyWriter) matchLabels(indent string, labels map[string]string) {
	w.line("%smatchLabels:", indent)
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		w.line("%s  %s: %s", indent, quoted(k), quoted(labels[k]))
	}
}

// authorization writes the policy of identities.
func (w *policyWriter) authorization() {
	w.head("security.istio.io/v1", "AuthorizationPolicy")
	w.line("  selector:")
	w.matchLabels("    ", w.labels)
	w.line("  action: ALLOW\n  rules:")
	principals := make(map[string][]string) // by ports
	for p, ports := range w.ports {
		text := listed(ports)
		principals[text] = append(principals[text], quoted("cluster.local/ns/"+p.Namespace+"/sa/"+p.Account))
	}
	for _, ports := range slices.Sorted(maps.Keys(principals)) {
		w.line("  - from:\n    - source:\n        principals: [%s]\n    to:\n    - operation:\n        ports: [%s]", sorted(principals[ports]), ports)
	}
	for _, p := range slices.SortedFunc(maps.Keys(w.plain), compareParties) {
		blocks := w.o.blocksOf(p)
		w.line("  # plaintext from %s", p)
		if len(blocks) == 0 {
			w.line("  # its addresses change: everybody may use these ports in plaintext, until it is enrolled and this rule is removed")
		}
		w.line(`  - from:
    - source:
        notPrincipals: ["*"]`)
		if len(blocks) > 0 {
			w.line("        ipBlocks: [%s]", sorted(blocks))
		}
		w.line("    to:\n    - operation:\n        ports: [%s]", listed(w.plain[p]))
	}
}

// network writes the policy of addresses. What nodes do not see stays open: it is not about
// that.
func (w *policyWriter) network() {
	w.head("networking.k8s.io/v1", "NetworkPolicy")
	w.line("  podSelector:")
	w.matchLabels("    ", w.labels)
	w.line("  policyTypes: [Ingress]\n  ingress:\n  # not observed, so not restricted: UDP and SCTP%s", w.excluded())
	from := make(map[mesh.Party]map[uint16]bool)
	for _, seen := range []map[mesh.Party]map[uint16]bool{w.ports, w.plain} {
		for p, ports := range seen {
			p.Account = "" // the addresses of pods do not tell
			if from[p] == nil {
				from[p] = make(map[uint16]bool)
			}
			maps.Copy(from[p], ports)
		}
	}
	for _, p := range slices.SortedFunc(maps.Keys(from), compareParties) {
		w.line("  - from:")
		w.peer(p)
		w.line("    ports:")
		for _, port := range slices.Sorted(maps.Keys(from[p])) {
			w.line("    - {protocol: TCP, port: %d}", port)
		}
	}
}

// excluded writes the rule of what nodes do not see, and names the ports in it.
func (w *policyWriter) excluded() (text string) {
	ports := make(map[uint16]bool)
	for _, p := range w.o.pods[w.name] {
		for _, port := range p.workload.ExcludeInbound {
			ports[port] = true
		}
	}
	rule := "\n  - ports:\n    - {protocol: UDP}\n    - {protocol: SCTP}"
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		text += fmt.Sprintf(", port %d, which is excluded", port)
		rule += fmt.Sprintf("\n    - {protocol: TCP, port: %d}", port)
	}
	return text + rule
}

func (w *policyWriter) peer(p mesh.Party) {
	if p.Where == mesh.AtWorkload {
		w.line("    # %s\n    - namespaceSelector:", p)
		w.matchLabels("        ", map[string]string{corev1.LabelMetadataName: p.Namespace})
		if labels := labelsOf(w.o.pods[p.String()]); len(labels) > 0 {
			w.line("      podSelector:")
			w.matchLabels("        ", labels)
		}
		return
	}
	w.line("    # %s", p)
	blocks := w.o.blocksOf(p)
	for _, b := range blocks {
		w.line("    - ipBlock: {cidr: %s}", b)
	}
	if len(blocks) == 0 { // an empty list would be everybody
		w.line("    # it has no addresses now\n    - ipBlock: {cidr: %s}", quoted("192.0.2.0/32"))
	}
}

// blocksOf are the addresses that a party without an identity has, quoted; none for a workload.
func (o *observed) blocksOf(p mesh.Party) (all []string) {
	if p.Block.IsValid() {
		return []string{quoted(p.Block.String())}
	}
	for _, place := range o.result.Places {
		if p.Where == mesh.AtNode && place.Node == p.Node {
			for _, a := range place.Addresses {
				all = append(all, quoted(netip.PrefixFrom(a, a.BitLen()).String()))
			}
		}
	}
	return all
}

func compareParties(x, y mesh.Party) int {
	return strings.Compare(x.String()+" "+x.Account, y.String()+" "+y.Account)
}

func listed(ports map[uint16]bool) string {
	var all []string
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		all = append(all, quoted(strconv.Itoa(int(port))))
	}
	return strings.Join(all, ", ")
}

func sorted(list []string) string {
	slices.Sort(list)
	return strings.Join(slices.Compact(list), ", ")
}

// quoted is text as YAML takes it for text.
func quoted(s string) string { return strconv.Quote(s) }
