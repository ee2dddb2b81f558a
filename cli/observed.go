package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/policy"
)

// observed is what nodes saw, and what is in the cluster now.
type observed struct {
	kube.PairShard
	present
}

// present is what is in the cluster.
type present struct {
	objects kube.Objects
	cfg     kube.BuildConfig
	result  kube.Result
	// pods are those of each workload, by NAMESPACE/WORKLOAD.
	pods map[string][]podNow
}

// podNow is a pod that is not in its node's network.
type podNow struct {
	object   *kube.PodObject
	workload *mesh.Workload
	// enrolled is what its labels ask for, shown what control says of it.
	enrolled bool
	shown    kube.Condition
}

// isProtected tells whether control says so.
func (p *podNow) isProtected() bool { return p.enrolled && p.shown.Status == "True" }

func (c *cluster) observed(ctx context.Context) (o observed, err error) {
	o.PairShard, err = kube.ReadPairs(ctx, c.client, namespace)
	if errors.Is(err, fs.ErrNotExist) {
		return o, fmt.Errorf("nothing was observed yet: %w: wait for half a minute of traffic between enrolled pods", err)
	}
	if err == nil {
		o.present, err = c.present(ctx, "")
	}
	return o, err
}

// present reads all that decides about connections. A root namespace of "" is Tacit's own.
func (c *cluster) present(ctx context.Context, root string) (present, error) {
	objects, err := c.objects(ctx)
	if err != nil {
		return present{}, err
	}
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return present{}, fmt.Errorf("list nodes: %w", err)
	}
	objects.Nodes = pointers(nodes.Items)
	if objects.Policies, err = listAll[kube.AuthorizationPolicy](ctx, c, kube.PolicyResources()); err != nil {
		return present{}, err
	}
	if objects.Peers, err = listAll[kube.PeerAuthentication](ctx, c, kube.PeerResources()); err != nil {
		return present{}, err
	}
	return newPresent(objects, kube.BuildConfig{TrustDomain: trustDomainOf(objects), Namespace: namespace, RootNamespace: root}), nil
}

// trustDomainOf is that of the mesh, as its Mesh says.
func trustDomainOf(o kube.Objects) string {
	for _, m := range o.Meshes {
		if m.Status.TrustDomain != "" {
			return m.Status.TrustDomain
		}
	}
	return "cluster.local"
}

func newPresent(o kube.Objects, cfg kube.BuildConfig) present {
	p := present{objects: o, cfg: cfg, result: kube.Build(o, cfg), pods: make(map[string][]podNow)}
	objects := make(map[string]*kube.PodObject, len(o.Pods))
	for _, pod := range o.Pods {
		objects[pod.Namespace+"/"+pod.Name] = pod
	}
	known := make(map[*mesh.Workload]kube.Pod)
	for _, pod := range p.result.Pods {
		known[pod.Workload] = pod
	}
	for _, w := range p.result.Workloads {
		pod := objects[w.Namespace+"/"+w.Name]
		if w.Listed || w.HostNetwork || pod == nil {
			continue
		}
		is := known[w]
		name := w.Party().String()
		p.pods[name] = append(p.pods[name], podNow{pod, w, is.Enroll, is.Shown})
	}
	return p
}

// world is what nodes know of it.
func (p *present) world() *mesh.World {
	return new(mesh.World).With(mesh.Changes{
		Workloads: p.result.Workloads, Services: p.result.Services, Places: p.result.Places, Policies: p.result.Policies,
	}, time.Time{})
}

// setOf is what applies to a pod.
func setOf(w *mesh.World, pod *podNow) *policy.Set {
	all, unknown := w.PoliciesOf(pod.workload.Peer())
	return policy.Compile(all, unknown, pod.workload.Mode)
}

// addressesOf are those of a party, the one that is nobody's if there are none.
func (p *present) addressesOf(party mesh.Party) (all []netip.Addr) {
	if party.Block.IsValid() {
		return []netip.Addr{party.Block.Addr()}
	}
	for _, place := range p.result.Places {
		if party.Where == mesh.AtNode && place.Node == party.Node {
			all = append(all, place.Addresses...)
		}
	}
	for _, pod := range p.pods[party.String()] {
		all = append(all, pod.workload.Addresses...)
	}
	if len(all) == 0 {
		all = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	return all
}

// all tells whether there are pods of the workload, and each is so.
func (p *present) all(workload string, is func(*podNow) bool) bool {
	pods := p.pods[workload]
	return len(pods) > 0 && !slices.ContainsFunc(pods, func(pod podNow) bool { return !is(&pod) })
}

func (p *present) isEnrolled(workload string) bool {
	return slices.ContainsFunc(p.pods[workload], func(pod podNow) bool { return pod.enrolled })
}

// protectedSince is since when all pods of a workload are, zero if they are not.
func (p *present) protectedSince(workload string) (since time.Time) {
	if !p.all(workload, (*podNow).isProtected) {
		return since
	}
	for _, pod := range p.pods[workload] {
		if pod.shown.Since.After(since) {
			since = pod.shown.Since
		}
	}
	return since
}

// nodeOf names the node whose pods get the address, "" for none.
func (p *present) nodeOf(a netip.Addr) string {
	for _, n := range p.objects.Nodes {
		for _, text := range append(n.Spec.PodCIDRs, n.Spec.PodCIDR) {
			if r, err := netip.ParsePrefix(text); err == nil && r.Contains(a) {
				return n.Name
			}
		}
	}
	return ""
}

// listAll reads all objects of a kind, none if there is no such kind.
func listAll[T any](ctx context.Context, c *cluster, at []schema.GroupVersionResource) (all []*T, err error) {
	for _, r := range at {
		list, err := c.dynamic.Resource(r).List(ctx, metav1.ListOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", r.Resource, err)
		}
		for i := range list.Items {
			one := new(T)
			text, err := list.Items[i].MarshalJSON()
			if err == nil {
				err = json.Unmarshal(text, one)
			}
			if err != nil {
				return nil, fmt.Errorf("read %s %s/%s: %w", r.Resource, list.Items[i].GetNamespace(), list.Items[i].GetName(), err)
			}
			all = append(all, one)
		}
		return all, nil
	}
	return nil, nil
}

// has tells whether it is about the party.
func (t modeTarget) has(p mesh.Party) bool {
	if t.namespace == "" {
		return true
	}
	return p.Where == mesh.AtWorkload && p.Namespace == t.namespace && (t.workload == "" || p.Workload == t.workload)
}

// labelsOf are those that all pods of a workload have, and others of it will have: its selector.
func labelsOf(pods []podNow) map[string]string {
	var common map[string]string
	for _, p := range pods {
		if common == nil {
			common = maps.Clone(p.object.Labels)
		}
		maps.DeleteFunc(common, func(k, v string) bool { return p.object.Labels[k] != v || isPassing(k) })
	}
	return common
}

// isPassing tells whether the label differs between pods of one workload, or from one version of
// it to the next.
func isPassing(label string) bool {
	return slices.Contains([]string{
		"pod-template-hash", "controller-revision-hash", "pod-template-generation", "statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index",
		"controller-uid", "batch.kubernetes.io/controller-uid", "job-name", "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index",
		"version", "app.kubernetes.io/version", "helm.sh/chart",
	}, label)
}

// clock is how times are told.
func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// count is a number and what it counts.
func count(n uint64, one string) string {
	return fmt.Sprintf("%d %s%s", n, one, map[bool]string{true: "", false: "s"}[n == 1])
}
