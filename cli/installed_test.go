package cli

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"helm.sh/helm/v4/pkg/action"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/release/common"
	release "helm.sh/helm/v4/pkg/release/v1"
	"helm.sh/helm/v4/pkg/storage"
	"helm.sh/helm/v4/pkg/storage/driver"
	appsv1 "k8s.io/api/apps/v1"
	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"tacit.dev/control/kube"
)

// clusterWith has these objects, and Helm's record of a release if recorded.
func clusterWith(t *testing.T, recorded bool, objects ...runtime.Object) *cluster {
	t.Helper()
	memory := driver.NewMemory()
	memory.SetNamespace(namespace)
	cfg := action.NewConfiguration()
	cfg.Releases = storage.Init(memory)
	if recorded {
		r := &release.Release{Name: releaseName, Namespace: namespace, Version: 1, Info: &release.Info{Status: common.StatusDeployed}, Chart: &chart.Chart{}}
		if err := cfg.Releases.Create(r); err != nil {
			t.Fatal(err)
		}
	}
	lists := map[schema.GroupVersionResource]string{kindResource: "CustomResourceDefinitionList", kube.MeshResource(): "MeshList"}
	c := &cluster{name: "the cluster of context kind (https://k)", client: fake.NewClientset(objects...), records: &releases{cfg},
		dynamic: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists)}
	c.meshes = c.dynamic.Resource(kube.MeshResource())
	return c
}

// controlOf is the Deployment of control with an annotation and a label, as KEY=VALUE.
func controlOf(annotation, label string) *appsv1.Deployment {
	split := func(s string) map[string]string {
		k, v, _ := strings.Cut(s, "=")
		return map[string]string{k: v}
	}
	return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: controlName, Namespace: namespace, Annotations: split(annotation), Labels: split(label)}}
}

// What another tool has installed is not taken apart: it would put back what was removed, and
// pods would be captured without a proxy. install and upgrade leave it alone, too.
func TestForeignInstallationsAreRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		recorded          bool
		annotation, label string
		want              string // "" for an installation of ours
	}{
		"ours":           {recorded: true, annotation: "meta.helm.sh/release-name=tacit"},
		"Argo CD":        {annotation: "argocd.argoproj.io/tracking-id=mesh:apps/Deployment:tacit-system/tacit-control", want: "3. delete Application mesh with Argo CD"},
		"Argo CD, label": {label: "argocd.argoproj.io/instance=mesh", want: "3. delete Application mesh with Argo CD"},
		"Flux, Helm":     {recorded: true, annotation: "meta.helm.sh/release-name=tacit", label: "helm.toolkit.fluxcd.io/name=t", want: "3. delete HelmRelease t with Flux"},
		"Flux":           {label: "kustomize.toolkit.fluxcd.io/name=infra", want: "3. delete Kustomization infra with Flux"},
		"other release":  {annotation: "meta.helm.sh/release-name=mesh", want: "3. helm uninstall --namespace tacit-system mesh"},
		"kubectl":        {label: "app.kubernetes.io/managed-by=Helm", want: "3. remove the objects, as they were applied"},
	} {
		t.Run(name, func(t *testing.T) {
			c := clusterWith(t, tt.recorded, controlOf(tt.annotation, tt.label))
			_, _, err := (&removal{}).look(t.Context(), c)
			_, errInstall := (&setup{}).before(t.Context(), c)
			if _, err := (&setup{dryRun: true}).before(t.Context(), c); err != nil {
				t.Errorf("install --dry-run: %v, want manifests for the tool to apply", err)
			}
			switch {
			case tt.want == "":
				if err != nil || errInstall != nil {
					t.Errorf("errors %v, %v, want none", err, errInstall)
				}
			case err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), `1. take every pod out of the mesh`):
				t.Errorf("uninstall: error %v, want one with %q", err, tt.want)
			case errInstall == nil || !strings.Contains(errInstall.Error(), "change it there"):
				t.Errorf("install: error %v, want that it is refused", errInstall)
			}
		})
	}
	if _, _, err := (&removal{}).look(t.Context(), clusterWith(t, false)); err != nil {
		t.Errorf("nothing is installed: %v, want that nodes may be cleaned", err)
	}
}

// It is not destroyed by chance: without a terminal --yes is needed, and at one a person says yes.
func TestUninstallAsks(t *testing.T) {
	c := clusterWith(t, true)
	plan := (&removal{}).plan(c, true)
	for _, want := range []string{"context kind (https://k)", "keys of the CA are destroyed", "every pod leaves the mesh"} {
		if !strings.Contains(plan, want) {
			t.Errorf("plan has no %q:\n%s", want, plan)
		}
	}
	if kept := (&removal{keepCA: true, keepCRD: true}).plan(c, true); strings.Contains(kept, "CA") || strings.Contains(kept, "kinds") {
		t.Errorf("plan with --keep-ca and --keep-crd:\n%s", kept)
	}
	cmd := &cobra.Command{}
	cmd.SetIn(strings.NewReader("y\n"))
	if err := confirm(cmd, false, plan); err == nil || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("no terminal: error %v, want one that names --yes", err)
	}
	if err := confirm(cmd, true, plan); err != nil {
		t.Errorf("--yes: %v", err)
	}
	for answer, want := range map[string]error{"y\n": nil, "YES\n": nil, "\n": errDeclined, "no\n": errDeclined, "": errDeclined} {
		var asked bytes.Buffer
		if err := ask(strings.NewReader(answer), &asked, plan); !errors.Is(err, want) || !strings.HasSuffix(asked.String(), "Continue? [y/N] ") {
			t.Errorf("answer %q: error %v, want %v", answer, err, want)
		}
	}
}

// What is left of Istio's ambient mesh is not enrolled unasked.
func TestLabelsOfIstioAreAskedAbout(t *testing.T) {
	ambient := map[string]string{kube.LabelIstio: "ambient"}
	both := map[string]string{kube.LabelIstio: "ambient", kube.LabelMesh: "off"}
	c := clusterWith(t, false, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "old", Labels: ambient}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "said", Labels: both}},
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "said", Labels: ambient}})
	cmd := &cobra.Command{}
	cmd.SetIn(&bytes.Buffer{})
	err := c.confirmLabeled(t.Context(), cmd, false)
	if err == nil || !strings.Contains(err.Error(), "2 objects") || !strings.Contains(err.Error(), "namespace old; pod said/p") {
		t.Errorf("error %v, want one that names namespace old and pod said/p", err)
	}
	if err := c.confirmLabeled(t.Context(), cmd, true); err != nil {
		t.Errorf("--yes: %v", err)
	}
	if err := clusterWith(t, false).confirmLabeled(t.Context(), cmd, false); err != nil {
		t.Errorf("without such labels: %v", err)
	}
}

// The kinds that the chart has brought go, and one that Istio has taken over stays.
func TestKindsAreRemoved(t *testing.T) {
	c := clusterWith(t, false)
	kinds := c.dynamic.Resource(kindResource)
	for name, by := range map[string]string{"meshes.tacit.dev": releaseName, "authorizationpolicies.security.istio.io": "istio-base"} {
		k := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}}
		k.SetName(name)
		k.SetLabels(map[string]string{"app.kubernetes.io/part-of": program})
		k.SetAnnotations(map[string]string{helmMark: by})
		if _, err := kinds.Create(t.Context(), k, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.removeKinds(t.Context(), newProgress(io.Discard)); err != nil {
		t.Fatal(err)
	}
	left, err := kinds.List(t.Context(), metav1.ListOptions{})
	if err != nil || len(left.Items) != 1 || left.Items[0].GetName() != "authorizationpolicies.security.istio.io" {
		t.Errorf("left: %v, %v, want the kind of Istio", left, err)
	}
}

// What is looked at are all rights that the release takes, also for its upgrade and its end, and those that
// it gives: a user who has them not may not give them.
func TestRightsAreAllThatIsNeeded(t *testing.T) {
	list, err := rendered(t)
	if err != nil {
		t.Fatal(err)
	}
	kinds := meta.NewDefaultRESTMapper(nil)
	for _, o := range list {
		scope := meta.RESTScopeRoot
		if o.GetNamespace() != "" {
			scope = meta.RESTScopeNamespace
		}
		kinds.Add(o.GroupVersionKind(), scope)
	}
	for name, tt := range map[string]struct{ denied, want string }{
		"all":              {want: ""},
		"no change":        {denied: "patch daemonsets", want: "this user may not patch daemonsets.apps"},
		"no end":           {denied: "delete deployments", want: "this user may not delete deployments.apps"},
		"a right to give":  {denied: "create tokenreviews", want: ""},
		"no right to give": {denied: "create tokenreviews, escalate clusterroles", want: "this user may not create tokenreviews.authentication.k8s.io"},
		"only to look":     {denied: "create clusterroles, delete clusterroles", want: "this user may not create/delete clusterroles.rbac.authorization.k8s.io"},
	} {
		c := clusterWith(t, false)
		c.mapper = kinds
		client := c.client.(*fake.Clientset)
		client.PrependReactor("create", "selfsubjectaccessreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
			review := a.(k8stesting.CreateAction).GetObject().(*authv1.SelfSubjectAccessReview).DeepCopy()
			right := review.Spec.ResourceAttributes
			review.Status.Allowed = !slices.Contains(strings.Split(tt.denied, ", "), right.Verb+" "+right.Resource)
			return true, review, nil
		})
		if f, err := c.checkRights(t.Context(), list); err != nil || f.Lacks != tt.want {
			t.Errorf("%s: %q, %v, want %q", name, f.Lacks, err, tt.want)
		}
	}
}

// A second installation would fight with the first over every pod.
func TestAnotherInstallationIsSeen(t *testing.T) {
	other := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: nodesName, Namespace: "mesh"}}
	own := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: nodesName, Namespace: namespace}}
	for _, tt := range []struct {
		there *appsv1.DaemonSet
		want  string
	}{{other, "Tacit is installed in namespace mesh"}, {own, ""}} {
		found, err := clusterWith(t, false, tt.there).checkOthers(t.Context())
		if err != nil || len(found) != 1 || found[0].Lacks != tt.want {
			t.Errorf("%s: %v, %v, want %q", tt.there.Namespace, found, err, tt.want)
		}
	}
}

// A node that was not cleaned is told by the exit code, too.
func TestUninstallTellsOfNodesThatAreAway(t *testing.T) {
	var out bytes.Buffer
	err := (&removal{limit: time.Second}).finish(t.Context(), clusterWith(t, false), newProgress(&out), []string{"n2"})
	if !errors.Is(err, lacking) || !strings.Contains(out.String(), "uninstalled, but for n2") {
		t.Errorf("error %v, want exit code 2: %s", err, out.String())
	}
}

// Each verb of the lab says that it takes --name.
func TestVerbsOfTheLabTellOfName(t *testing.T) {
	for _, cmd := range labCommand().Commands() {
		var out bytes.Buffer
		cmd.SetOut(&out)
		if err := cmd.Help(); !cmd.Hidden && (err != nil || !strings.Contains(out.String(), "--name")) {
			t.Errorf("tacit lab %s --help: %v, no --name in\n%s", cmd.Name(), err, out.String())
		}
	}
}

// What `make image` makes by default is what the chart asks for by default, and nothing is
// taken from a registry that only its user's configuration names.
func TestImagesAreThoseOfTheMakefile(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nREGISTRY ?= ")
	registry, _, _ := strings.Cut(rest, "\n")
	ds := renderedNode(t)
	if got, want := ds.Spec.Template.Spec.Containers[0].Image, registry+"/tacit-node:v1.2.3-4-gabc"; registry == "" || got != want {
		t.Errorf("image %s, want %s", got, want)
	}
}
