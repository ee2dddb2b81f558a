package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/version"

	"tacit.dev/control/kube"
	"tacit.dev/wire/finding"
)

// oldest is the Kubernetes that says on which node the pod of a token runs.
const oldest = "1.32.0"

// at is a finding and where it was made: a node, or "" for the cluster.
type at struct {
	node string
	finding.Finding
}

// report is what a check found.
type report struct {
	all []at
	// namespace is what was done to it to look at the nodes.
	namespace namespaceChange
}

func (r *report) add(node string, found ...finding.Finding) {
	for _, f := range found {
		r.all = append(r.all, at{node, f})
	}
}

// lacking is how many findings stand in the way.
func (r *report) lacking() int {
	n := 0
	for _, f := range r.all {
		if f.Lacks != "" {
			n++
		}
	}
	return n
}

func (r *report) print(out io.Writer) {
	for _, f := range r.all {
		where := "cluster"
		if f.node != "" {
			where = "node " + f.node
		}
		if f.Lacks == "" {
			fmt.Fprintf(out, "  ok      %s: %s: %s\n", where, f.What, f.Found)
			continue
		}
		fmt.Fprintf(out, "  LACKING %s: %s: %s\n", where, f.What, f.Lacks)
		if f.Remedy != "" {
			fmt.Fprintf(out, "          remedy: %s\n", f.Remedy)
		}
	}
}

// preflight looks whether the cluster has all that the objects need. It changes
// nothing that stays.
func (c *cluster) preflight(ctx context.Context, objects []*unstructured.Unstructured) (*report, error) {
	r := &report{}
	r.add("", c.checkVersion())
	rights, err := c.checkRights(ctx, objects)
	if err != nil {
		return nil, err
	}
	r.add("", rights)
	others, err := c.checkOthers(ctx)
	if err != nil {
		return nil, err
	}
	r.add("", others...)
	ds, err := daemonSetOf(objects)
	if err != nil {
		return nil, err
	}
	if r.lacking() > 0 { // visitors would fail for the same reasons, or disturb
		return r, nil
	}
	return r, c.checkNodes(ctx, ds, r)
}

func (c *cluster) checkVersion() finding.Finding {
	f := finding.Finding{What: "version"}
	info, err := c.client.Discovery().ServerVersion()
	if err != nil {
		f.Lacks, f.Remedy = err.Error(), "see whether the cluster answers: kubectl get nodes"
		return f
	}
	f.Found = "Kubernetes " + info.GitVersion
	v, err := version.ParseGeneric(info.GitVersion)
	if err == nil && v.LessThan(version.MustParseGeneric(oldest)) {
		f.Lacks, f.Remedy = "Kubernetes "+info.GitVersion+" does not say on which node a token's pod runs", "upgrade to Kubernetes "+oldest+" or later"
	}
	return f
}

// checkRights asks whether this user may create every object of the release, and
// visit nodes.
func (c *cluster) checkRights(ctx context.Context, objects []*unstructured.Unstructured) (finding.Finding, error) {
	f := finding.Finding{What: "permissions", Found: "to install, upgrade and uninstall"}
	wanted := make(map[authv1.ResourceAttributes]bool)
	want := func(a authv1.ResourceAttributes, verbs ...string) {
		for _, a.Verb = range verbs {
			wanted[a] = true
		}
	}
	want(authv1.ResourceAttributes{Resource: "namespaces"}, "get", "list", "create", "patch", "delete")
	want(authv1.ResourceAttributes{Resource: "nodes"}, "list")
	want(authv1.ResourceAttributes{Resource: "pods"}, "list")
	want(authv1.ResourceAttributes{Resource: "pods", Namespace: namespace}, "get", "create", "delete")
	want(authv1.ResourceAttributes{Resource: "secrets", Namespace: namespace}, "get", "list", "create", "update", "delete") // Helm's record
	want(authv1.ResourceAttributes{Resource: kube.MeshResource().Resource, Group: kube.MeshResource().Group}, "get", "create", "patch")
	escalate, err := c.forbidden(ctx, []authv1.ResourceAttributes{{Verb: "escalate", Group: rbacv1.GroupName, Resource: "clusterroles"}})
	if err != nil {
		return f, err
	}
	for _, o := range objects {
		gvk := o.GroupVersionKind()
		m, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
		if err != nil {
			return f, fmt.Errorf("ask the API server for kind %s: %w", gvk.Kind, err)
		}
		want(authv1.ResourceAttributes{Group: gvk.Group, Resource: m.Resource.Resource, Namespace: o.GetNamespace()}, "get", "create", "patch", "delete")
		for _, a := range granted(o) {
			wanted[a] = len(escalate) > 0
		}
	}
	maps.DeleteFunc(wanted, func(_ authv1.ResourceAttributes, is bool) bool { return !is })
	missing, err := c.forbidden(ctx, slices.Collect(maps.Keys(wanted)))
	if err != nil {
		return f, err
	}
	if len(missing) > 0 {
		f.Lacks, f.Remedy = "this user may not "+inWords(missing), "install as a user with the role cluster-admin"
	}
	return f, nil
}

// inWords names rights by what they are to, with all verbs.
func inWords(rights []authv1.ResourceAttributes) string {
	verbs := make(map[string][]string)
	for _, a := range rights {
		what := a.Resource
		if a.Subresource != "" {
			what += "/" + a.Subresource
		}
		what = strings.TrimSuffix(what+"."+a.Group, ".")
		verbs[what] = append(verbs[what], a.Verb)
	}
	var list []string
	for _, what := range sortedNodes(verbs) {
		slices.Sort(verbs[what])
		list = append(list, strings.Join(slices.Compact(verbs[what]), "/")+" "+what)
	}
	return strings.Join(list, ", ")
}

// granted are the rights that a role of the release gives: whoever has not all of them may not
// create the role, but by escalate, which cluster-admin has.
func granted(o *unstructured.Unstructured) (list []authv1.ResourceAttributes) {
	if kind := o.GetKind(); kind != "ClusterRole" && kind != "Role" {
		return nil
	}
	var role rbacv1.ClusterRole
	if runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &role) != nil {
		return nil // the API server says what is wrong with it
	}
	for _, rule := range role.Rules {
		names := rule.ResourceNames
		if len(names) == 0 {
			names = []string{""}
		}
		for _, verb := range rule.Verbs {
			for _, resource := range rule.Resources {
				resource, sub, _ := strings.Cut(resource, "/")
				// One name stands for all of the rule.
				list = append(list, authv1.ResourceAttributes{Verb: verb, Group: rule.APIGroups[0], Resource: resource, Subresource: sub, Name: names[0], Namespace: o.GetNamespace()})
			}
		}
	}
	return list
}

// forbidden are those of the rights that this user has not.
func (c *cluster) forbidden(ctx context.Context, wanted []authv1.ResourceAttributes) ([]authv1.ResourceAttributes, error) {
	allowed := make([]bool, len(wanted))
	all, ctx := errgroup.WithContext(ctx)
	all.SetLimit(atOnce)
	for i, a := range wanted {
		all.Go(func() error {
			answer, err := c.client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authv1.SelfSubjectAccessReview{
				Spec: authv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &a},
			}, metav1.CreateOptions{})
			if err != nil {
				return fmt.Errorf("ask whether this user may %s %s: %w", a.Verb, a.Resource, err)
			}
			allowed[i] = answer.Status.Allowed
			return nil
		})
	}
	err := all.Wait()
	var missing []authv1.ResourceAttributes
	for i, a := range wanted {
		if !allowed[i] {
			missing = append(missing, a)
		}
	}
	return missing, err
}

// otherMeshes are DaemonSets that lead the connections of pods, too.
var otherMeshes = map[string]string{
	"istio-cni-node": "Istio", "ztunnel": "Istio's ambient mesh", "linkerd-cni": "Linkerd", "kuma-cni-node": "Kuma", "consul-cni": "Consul",
}

// checkOthers looks for what would fight with us over a pod's connections, or over
// the node's network configuration.
func (c *cluster) checkOthers(ctx context.Context) ([]finding.Finding, error) {
	sets, err := c.client.AppsV1().DaemonSets(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list DaemonSets: %w", err)
	}
	var found []finding.Finding
	for _, s := range sets.Items {
		if s.Name == nodesName && s.Namespace != namespace {
			found = append(found, finding.Finding{What: "other meshes", Lacks: fmt.Sprintf("Tacit is installed in namespace %s", s.Namespace),
				Remedy: "uninstall that first: a cluster has one installation, in namespace " + namespace})
		}
		if mesh := otherMeshes[s.Name]; mesh != "" {
			found = append(found, finding.Finding{What: "other meshes", Lacks: fmt.Sprintf("DaemonSet %s/%s of %s leads the connections of pods, too", s.Namespace, s.Name, mesh),
				Remedy: fmt.Sprintf("uninstall %s first: two meshes cannot have the same pod", mesh)})
		}
	}
	if f, err := c.checkCilium(ctx); err != nil {
		return nil, err
	} else if f.Lacks != "" {
		found = append(found, f)
	}
	if len(found) == 0 {
		found = append(found, finding.Finding{What: "other meshes", Found: "none"})
	}
	return found, nil
}

// checkCilium asks whether Cilium renames the network configurations of others.
func (c *cluster) checkCilium(ctx context.Context) (finding.Finding, error) {
	m, err := c.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, "cilium-config", metav1.GetOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
		return finding.Finding{}, nil
	}
	if err != nil {
		return finding.Finding{}, fmt.Errorf("read ConfigMap kube-system/cilium-config: %w", err)
	}
	if m.Data["cni-exclusive"] != "true" {
		return finding.Finding{}, nil
	}
	return finding.Finding{What: "network", Lacks: "Cilium takes away every network configuration but its own (cni-exclusive)",
		Remedy: "helm upgrade cilium --reuse-values --set cni.exclusive=false"}, nil
}

// checkNodes visits the nodes that Tacit would run on.
func (c *cluster) checkNodes(ctx context.Context, ds *appsv1.DaemonSet, r *report) error {
	nodes, away, err := c.nodes(ctx, ds)
	if err != nil {
		return err
	}
	for _, node := range sortedNodes(away) {
		r.add(node, finding.Finding{What: "ready", Found: "not ready (" + away[node] + "): not looked at"})
	}
	if len(nodes) == 0 {
		r.add("", finding.Finding{What: "nodes", Lacks: "no node is ready", Remedy: "see kubectl describe nodes; nodes are not ready without a network (CNI)"})
		return nil
	}
	if r.namespace, err = c.ensureNamespace(ctx); err != nil {
		return err
	}
	found, err := c.visitNodes(ctx, ds, examination, nodes)
	if err != nil {
		return fmt.Errorf("look at the nodes: %w", err)
	}
	for _, node := range nodes {
		r.add(node, found[node]...)
	}
	return nil
}

// nodes are those that Tacit is meant for and that are ready, and why others of
// them are not.
func (c *cluster) nodes(ctx context.Context, ds *appsv1.DaemonSet) (ready []string, away map[string]string, err error) {
	list, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: labels.Set(ds.Spec.Template.Spec.NodeSelector).String()})
	if err != nil {
		return nil, nil, fmt.Errorf("list nodes: %w", err)
	}
	away = map[string]string{}
	for _, n := range list.Items {
		if why := notReady(n); why != "" {
			away[n.Name] = why
		} else {
			ready = append(ready, n.Name)
		}
	}
	slices.Sort(ready)
	return ready, away, nil
}

func notReady(n corev1.Node) string {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			return strings.TrimSpace(c.Reason + ": " + c.Message)
		}
	}
	return ""
}
