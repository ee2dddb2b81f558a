package cli

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	release "helm.sh/helm/v4/pkg/release/v1"
	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
)

// installed is what a cluster has of Tacit, by its objects. Helm's record is a Secret, which
// many may not read, and tools other than Helm leave none.
type installed struct {
	control *appsv1.Deployment // nil if there is none
	nodes   *appsv1.DaemonSet  // nil if there is none
}

func (c *cluster) installed(ctx context.Context) (*installed, error) {
	i := &installed{}
	var err error
	if i.control, err = c.client.AppsV1().Deployments(namespace).Get(ctx, controlName, metav1.GetOptions{}); err != nil {
		i.control = nil
		if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("read Deployment %s: %w", controlName, err)
		}
	}
	if i.nodes, err = c.client.AppsV1().DaemonSets(namespace).Get(ctx, nodesName, metav1.GetOptions{}); err != nil {
		i.nodes = nil
		if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("read DaemonSet %s: %w", nodesName, err)
		}
	}
	return i, nil
}

func (i *installed) any() bool { return i.control != nil || i.nodes != nil }

// metas are those of the objects that are there.
func (i *installed) metas() (list []metav1.Object) {
	if i.control != nil {
		list = append(list, i.control)
	}
	if i.nodes != nil {
		list = append(list, i.nodes)
	}
	return list
}

// version is that of the chart, "" if the objects do not say.
func (i *installed) version() string {
	for _, m := range i.metas() {
		if v := m.GetLabels()["app.kubernetes.io/version"]; v != "" {
			return v
		}
	}
	return ""
}

// Marks of tools that keep objects as a repository has them, and apply again what somebody
// else removes.
var toolMarks = []struct{ key, tool, kind string }{
	{"argocd.argoproj.io/tracking-id", "Argo CD", "Application"},
	{"argocd.argoproj.io/instance", "Argo CD", "Application"},
	{"helm.toolkit.fluxcd.io/name", "Flux", "HelmRelease"},
	{"kustomize.toolkit.fluxcd.io/name", "Flux", "Kustomization"},
}

// helmMark is Helm's own, on each object that it has applied.
const helmMark = "meta.helm.sh/release-name"

// owner is who applied the objects.
type owner struct {
	// tool is Argo CD or Flux, and kind and name are its object; "" if neither is known.
	tool, kind, name string
	// helm is the name of the release, "" if Helm has not applied the objects.
	helm string
}

func (i *installed) owner() (o owner) {
	for _, m := range i.metas() {
		o.helm = cmp.Or(o.helm, m.GetAnnotations()[helmMark])
		for _, mark := range toolMarks {
			if o.tool == "" {
				name := cmp.Or(m.GetAnnotations()[mark.key], m.GetLabels()[mark.key])
				if name, _, _ = strings.Cut(name, ":"); name != "" { // a tracking id goes on with the object
					o.tool, o.kind, o.name = mark.tool, mark.kind, name
				}
			}
		}
	}
	return o
}

func (o owner) String() string {
	switch {
	case o.tool != "":
		return fmt.Sprintf("%s (%s %s)", o.tool, o.kind, o.name)
	case o.helm != "":
		return fmt.Sprintf("Helm (release %s)", o.helm)
	}
	return "manifests (helm template, kubectl apply)"
}

// foreign says that somebody else than this program's Helm has installed what is there: last is
// its record, nil if there is none.
func (i *installed) foreign(last *release.Release) bool {
	return i.any() && (last == nil || i.owner().tool != "")
}

// removal is what remove says of a foreign installation: the order in which its owner's tool
// can remove it. Without it, pods would stay captured by rules that lead to no proxy.
func (o owner) removal() string {
	remove := "remove the objects, as they were applied"
	switch {
	case o.tool != "":
		remove = fmt.Sprintf("delete %s %s with %s", o.kind, o.name, o.tool)
	case o.helm != "":
		remove = fmt.Sprintf("helm uninstall --namespace %s %s", namespace, o.helm)
	}
	const wait = "kubectl wait mesh/" + kube.MeshName + " --timeout=5m --for=jsonpath='{.status.pods.%s}'=0"
	return strings.Join([]string{
		"remove it in this order:",
		"1. take every pod out of the mesh: set enrollment: None in the Mesh where it is kept, or: " +
			"kubectl patch mesh " + kube.MeshName + ` --type=merge --patch '{"spec":{"enrollment":"None"}}'`,
		"2. wait until every pod has left: " + fmt.Sprintf(wait, "enrolled") + " && " + fmt.Sprintf(wait, "leaving"),
		"3. " + remove,
		"4. clean the nodes: tacit uninstall",
	}, "\n  ")
}
