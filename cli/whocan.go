package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/policy"
)

// whoCan are the flags of policy who-can.
type whoCan struct {
	target *target
	files  []string
	build  kube.BuildConfig
}

func policyWhoCanCommand() *cobra.Command {
	q := &whoCan{}
	cmd := &cobra.Command{
		Use:   "who-can CLIENT SERVER[:PORT]",
		Short: "Say whether a workload may connect to another one, and which rule decides",
		Long: `Decides by the policies of the cluster, as the server's node would, whether CLIENT may connect to SERVER.

  CLIENT  NAMESPACE/WORKLOAD, or an address, which has no identity
  SERVER  NAMESPACE/WORKLOAD. Without a PORT, all ports to which Services lead

A workload is named as in "tacit flows": by its Deployment, StatefulSet, DaemonSet, Job or CronJob, else by its pod.
With --filename, objects (namespaces, pods, policies) are read from files instead of the cluster.

Exit codes: 0: yes, at every port that was asked for; 1: no; 2: it cannot be decided.`,
		Example: `  tacit policy who-can shop/frontend shop/cart:8080
  kubectl get ns,pods,authorizationpolicies -A -o yaml | tacit policy who-can -f - shop/frontend shop/cart:8080`,
		Args: cobra.ExactArgs(2),
	}
	q.target = newTarget(cmd.Flags())
	cmd.Flags().StringSliceVarP(&q.files, "filename", "f", nil, `read objects from this `+"`file`"+` ("-" is standard input) instead of the cluster`)
	cmd.Flags().StringVar(&q.build.TrustDomain, "trust-domain", "cluster.local", "set the trust `domain` of the mesh, with --filename")
	cmd.Flags().StringVar(&q.build.RootNamespace, "root-namespace", namespace, "set the `namespace` whose policies apply to the whole mesh")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		yes, err := q.run(cmd, args[0], args[1])
		if err != nil {
			fmt.Fprintln(cmd.ErrOrStderr(), "tacit:", err)
			return exit(2)
		}
		if !yes {
			return exit(1)
		}
		return nil
	}
	return cmd
}

func (q *whoCan) run(cmd *cobra.Command, client, server string) (bool, error) {
	p, err := q.present(cmd)
	if err != nil {
		return false, err
	}
	server, port, err := cutPort(server)
	if err != nil {
		return false, err
	}
	return p.whoCan(cmd.OutOrStdout(), client, server, port)
}

func (q *whoCan) present(cmd *cobra.Command) (p present, err error) {
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
	defer cancel()
	if len(q.files) == 0 {
		c, err := q.target.connect()
		if err != nil {
			return p, err
		}
		return c.present(ctx, q.build.RootNamespace)
	}
	var text []byte
	for _, name := range q.files {
		one, err := readBounded(name, cmd.InOrStdin())
		if err != nil {
			return p, fmt.Errorf("read %s: %w", name, err)
		}
		text = append(append(text, "\n---\n"...), one...)
	}
	objects, err := kube.Decode(text)
	q.build.Namespace = namespace
	return newPresent(objects, q.build), err
}

// readBounded reads a file, - is in.
func readBounded(name string, in io.Reader) ([]byte, error) {
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, maxPolicyFile+1))
	if err == nil && len(text) > maxPolicyFile {
		err = fmt.Errorf("it has more than %d bytes", maxPolicyFile)
	}
	return text, err
}

// cutPort cuts :PORT off; 0 is none.
func cutPort(server string) (name string, port uint16, err error) {
	name, text, is := strings.Cut(server, ":")
	if !is {
		return name, 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return name, 0, fmt.Errorf("%q: want SERVER:PORT", server)
	}
	return name, uint16(n), nil
}

// asker is who asks: an enrolled pod with an identity, or only an address.
type asker struct {
	name string
	pod  *podNow // nil if it is not enrolled
	peer policy.Peer
	at   []netip.Addr
}

// whoCan tells for each port whether the client may, and what decides. Where the pods of one
// workload differ, each different answer is told.
func (p *present) whoCan(out io.Writer, client, server string, port uint16) (yes bool, err error) {
	askers, err := p.askers(client)
	if err != nil {
		return false, err
	}
	servers := p.pods[server]
	if len(servers) == 0 {
		return false, fmt.Errorf("no pod of %q: want NAMESPACE/WORKLOAD of pods that are there", server)
	}
	w := p.world()
	yes = true
	for _, at := range portsOf(servers, port) {
		told := make(map[string]bool)
		for _, s := range servers {
			for _, c := range askers {
				allowed, why := decide(w, c, &s, at)
				yes = yes && allowed
				told[fmt.Sprintf("%s: %s -> %s:%d: %s", map[bool]string{true: "yes", false: "no"}[allowed], c.name, server, at, why)] = true
			}
		}
		for _, line := range slices.Sorted(maps.Keys(told)) {
			fmt.Fprintln(out, line)
		}
	}
	if len(portsOf(servers, port)) == 0 {
		return false, errors.New("no Service leads to the server's pods: give SERVER:PORT")
	}
	return yes, nil
}

func (p *present) askers(client string) (all []asker, err error) {
	if a, err := netip.ParseAddr(client); err == nil {
		return []asker{{name: client + " (no identity)", at: []netip.Addr{a.Unmap().WithZone("")}}}, nil
	}
	for _, pod := range p.pods[client] {
		c := asker{name: client + " (not enrolled: no identity)", at: pod.workload.Addresses}
		if pod.enrolled {
			c.name, c.pod, c.peer = client+" ("+pod.workload.ID.String()+")", &pod, policy.Proved(pod.workload.ID)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no pod of %q: want NAMESPACE/WORKLOAD of pods that are there, or an address", client)
	}
	return all, nil
}

// decide says what the server's node would; where no node does, the client's.
func decide(w *mesh.World, c asker, s *podNow, port uint16) (allowed bool, why string) {
	open := ""
	switch {
	case !s.enrolled:
		open = "the server is not enrolled, so no policy is enforced there"
	case slices.Contains(s.workload.ExcludeInbound, port):
		open = "the server excludes this port, so no policy is enforced there"
	}
	if open != "" && c.pod == nil {
		return true, open
	}
	for _, to := range s.workload.Addresses {
		for _, from := range c.at {
			if from.Is4() != to.Is4() {
				continue
			}
			at := netip.AddrPortFrom(to, port)
			var v policy.Verdict
			if open != "" {
				v = setOf(w, c.pod).Leave(&policy.Departure{Dialed: at, To: at, Inside: true})
			} else {
				v = setOf(w, s).Decide(&policy.Connection{Peer: c.peer, Source: from, Destination: at, FromNode: w.IsNode(from)})
			}
			if why == "" || !v.Allowed {
				allowed, why = v.Allowed, v.String()
			}
		}
	}
	switch {
	case why == "":
		return false, "client and server have no addresses of one family"
	case allowed && open != "":
		return true, open
	}
	return allowed, why
}

// portsOf are the ports that pods serve, or the one that was asked for.
func portsOf(pods []podNow, asked uint16) []uint16 {
	if asked != 0 {
		return []uint16{asked}
	}
	ports := make(map[uint16]bool)
	for _, p := range pods {
		for _, served := range p.workload.Services {
			for _, s := range served {
				ports[s.Target] = true
			}
		}
	}
	delete(ports, 0)
	return slices.Sorted(maps.Keys(ports))
}
