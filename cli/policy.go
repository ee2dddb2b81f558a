package cli

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
)

func policyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Check, suggest and question AuthorizationPolicies"}
	cmd.AddCommand(policyCheckCommand(), policySuggestCommand(), policyWhoCanCommand())
	return cmd
}

// policyCheck are the flags of policy check.
type policyCheck struct {
	target  *target
	cluster bool
	build   kube.BuildConfig
}

func policyCheckCommand() *cobra.Command {
	p := &policyCheck{}
	cmd := &cobra.Command{
		Use:   "check FILE...",
		Short: "Report what AuthorizationPolicies in files do not enforce",
		Long: `Reads YAML files ("-" is standard input). For each AuthorizationPolicy, reports every part that is not enforced
as written, with its line and a remedy:

  denies         the part cannot be enforced, so it admits no connection
  ignored        the part has no effect
  never matches  the part is enforced, but no connection ever matches it

With --cluster, also reports which pods each policy is for, and whether these pods are in the mesh. The cluster is
not changed.

Exit codes: 0: all policies are enforced as written; 1: a file or the cluster cannot be read; 2: at least one fault.`,
		Example: `  tacit policy check policies.yaml
  kubectl get authorizationpolicies -A -o yaml | tacit policy check --cluster -`,
		Args: cobra.MinimumNArgs(1),
	}
	p.target = newTarget(cmd.Flags())
	cmd.Flags().BoolVar(&p.cluster, "cluster", false, "also read the pods of the cluster")
	cmd.Flags().StringVar(&p.build.TrustDomain, "trust-domain", "cluster.local", "set the trust `domain` of the mesh")
	cmd.Flags().StringVar(&p.build.RootNamespace, "root-namespace", namespace, "set the `namespace` whose policies apply to the whole mesh")
	cmd.RunE = func(cmd *cobra.Command, files []string) error { return p.run(cmd, files) }
	return cmd
}

func (p *policyCheck) run(cmd *cobra.Command, files []string) error {
	p.build.Namespace = namespace
	var all []policyFile
	for _, name := range files {
		f, err := readPolicies(name, cmd.InOrStdin())
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		all = append(all, f)
	}
	facts, err := p.facts(cmd.Context(), all)
	if err != nil {
		return err
	}
	policies, faults := 0, 0
	for _, f := range all {
		for i, o := range f.policies {
			policies++
			n := f.print(cmd.OutOrStdout(), i, kube.CheckPolicy(o, p.build), facts[o.Namespace+"/"+o.Name])
			faults += n
		}
	}
	fmt.Fprintf(cmd.OutOrStdout(), "policies: %d, faults: %d\n", policies, faults)
	if faults > 0 {
		return lacking
	}
	return nil
}

// facts are what the cluster would show of the policies, by NAMESPACE/NAME; nothing without
// --cluster.
func (p *policyCheck) facts(ctx context.Context, files []policyFile) (map[string]kube.PolicyFacts, error) {
	if !p.cluster {
		return nil, nil
	}
	c, err := p.target.connect()
	if err != nil {
		return nil, err
	}
	objects, err := c.objects(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		objects.Policies = append(objects.Policies, f.policies...)
	}
	facts := make(map[string]kube.PolicyFacts)
	for _, f := range kube.Build(objects, p.build).Policed {
		facts[f.Key()] = f
	}
	return facts, nil
}

// objects are those that decide for which pods a policy is.
func (c *cluster) objects(ctx context.Context) (o kube.Objects, err error) {
	namespaces, err := c.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return o, fmt.Errorf("list namespaces: %w", err)
	}
	pods, err := c.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return o, fmt.Errorf("list pods: %w", err)
	}
	services, err := c.client.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return o, fmt.Errorf("list services: %w", err)
	}
	endpoints, err := c.client.DiscoveryV1().EndpointSlices("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return o, fmt.Errorf("list endpointslices: %w", err)
	}
	for i := range pods.Items {
		o.Pods = append(o.Pods, kube.KeepPod(&pods.Items[i]))
	}
	o.Namespaces = pointers(namespaces.Items)
	o.Services, o.EndpointSlices = pointers(services.Items), pointers(endpoints.Items)
	m, err := c.mesh(ctx)
	if m != nil {
		o.Meshes = append(o.Meshes, m)
	}
	return o, err
}

func pointers[T any](list []T) (all []*T) {
	for i := range list {
		all = append(all, &list[i])
	}
	return all
}

// print tells what is wrong with policy i of the file, and returns how much that is.
func (f *policyFile) print(out io.Writer, i int, faults []kube.Fault, facts kube.PolicyFacts) int {
	o := f.policies[i]
	name := o.Namespace + "/" + o.Name
	for _, x := range faults {
		fmt.Fprintf(out, "%s:%d: %s: %s: %s\n    remedy: %s\n", f.name, f.line(i, x.Path), name, x.Effect, x, x.Remedy)
	}
	n := len(faults)
	if n == 0 {
		fmt.Fprintf(out, "%s:%d: %s: ok\n", f.name, f.line(i, ""), name)
	}
	for _, c := range facts.Want {
		if c.Type != kube.PolicyEnforced {
			continue
		}
		fmt.Fprintf(out, "%s:%d: %s: %s: %s\n", f.name, f.line(i, "spec.selector"), name, c.Reason, c.Message)
		if c.Reason == kube.OutsideMesh {
			n++
		}
	}
	return n
}

// readPolicies reads a file, - is in.
func readPolicies(name string, in io.Reader) (f policyFile, err error) {
	f.name = name
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return f, err
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, maxPolicyFile+1))
	if err == nil && len(text) > maxPolicyFile {
		err = fmt.Errorf("it has more than %d bytes", maxPolicyFile)
	}
	if err != nil {
		return f, err
	}
	objects, err := kube.Decode(text)
	if err != nil {
		return f, err
	}
	f.policies = objects.Policies
	f.nodes, err = policyNodes(text)
	return f, err
}
