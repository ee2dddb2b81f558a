package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Helm never removes a kind, and with it what people have written: neither with the release, nor
// when crd.install is false later.
func TestKindsOutliveTheRelease(t *testing.T) {
	all := objects(t)
	for _, name := range []string{"meshes.tacit.dev", "authorizationpolicies.security.istio.io", "peerauthentications.security.istio.io"} {
		if got := all["CustomResourceDefinition "+name].GetAnnotations()["helm.sh/resource-policy"]; got != "keep" {
			t.Errorf("%s: resource policy %q, want keep", name, got)
		}
	}
}

// Kubernetes' recommended labels are on every object, and what selects pods stays what it was.
func TestObjectsHaveTheRecommendedLabels(t *testing.T) {
	for name, o := range objects(t, "monitoring.podMonitor.enabled=true,monitoring.rules.enabled=true,platform=OpenShift") {
		for _, key := range []string{"name", "instance", "component", "part-of", "version", "managed-by"} {
			if o.GetLabels()["app.kubernetes.io/"+key] == "" {
				t.Errorf("%s has no label app.kubernetes.io/%s", name, key)
			}
		}
		if selector, found, _ := unstructured.NestedStringMap(o.Object, "spec", "selector", "matchLabels"); found && len(selector) != 1 {
			t.Errorf("%s selects by %v, want one label", name, selector)
		}
	}
}

func TestMoreValuesArriveInTheManifests(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	const control, node = "Deployment tacit-control", "DaemonSet tacit-node"
	for set, want := range map[string]struct{ object, text string }{
		"image.digests.control=" + digest:           {control, "image:tacit.dev/tacit-control@" + digest},
		"image.digests.node=" + digest:              {node, "image:tacit.dev/tacit-node@" + digest},
		"image.registry=":                           {node, "image:tacit-node:v1.2.3-4-gabc"},
		"control.podLabels.team=a":                  {control, "team:a"},
		"control.podAnnotations.note=b":             {control, "note:b"},
		"node.podLabels.team=a":                     {node, "team:a"},
		"node.podAnnotations.note=b":                {node, "note:b"},
		"control.serviceAccount.annotations.role=c": {"ServiceAccount tacit-control", "role:c"},
		"node.serviceAccount.annotations.role=c":    {"ServiceAccount tacit-node", "role:c"},
		"control.affinity.nodeAffinity.x=y":         {control, "affinity:map[nodeAffinity:map[x:y]]"},
		"control.extraEnv[0].name=A":                {control, "env:[map[name:A]]"},
		"node.agent.extraEnv[0].name=A":             {node, "map[name:A]]"},
		"node.proxy.extraEnv[0].name=B":             {node, "map[name:B]]"},
		"control.logFormat=text":                    {control, "--log-format=text"},
		"node.logFormat=text":                       {node, "--log-format=text"},
		"node.proxy.accessLog=Refused":              {node, "--access-log=Refused"},
		"monitoring.podMonitor.enabled=true":        {"PodMonitor tacit", "port:metrics"},
		"monitoring.podMonitor.enabled=true,monitoring.podMonitor.labels.release=prom": {"PodMonitor tacit", "release:prom"},
		"monitoring.rules.enabled=true": {"PrometheusRule tacit", "alert:TacitPodUnprotected"},
	} {
		if got := fmt.Sprint(objects(t, set)[want.object]); !strings.Contains(got, want.text) {
			t.Errorf("--set %s: %s has no %q:\n%s", set, want.object, want.text, got)
		}
	}
	for set, want := range map[string]string{
		"image.digests.node=v1":     "digests",
		"platform=Azure":            "platform",
		"node.logFormat=xml":        "logFormat",
		"node.proxy.accessLog=Some": "accessLog",
		"crd.keep=true":             "keep",
	} {
		if _, err := rendered(t, set); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("--set %s: error %v, want one about %s", set, err, want)
		}
	}
	for name, o := range objects(t) {
		if o.GetKind() == "PodMonitor" || o.GetKind() == "PrometheusRule" {
			t.Errorf("%s is there unasked: clusters without the Prometheus Operator have no such kind", name)
		}
	}
}

// A label that the operator gives to pods takes away none by which they are selected.
func TestOwnLabelsOfPodsStay(t *testing.T) {
	o := objects(t, `control.podLabels.app\.kubernetes\.io/name=mine`)["Deployment tacit-control"]
	labels, _, _ := unstructured.NestedStringMap(o.Object, "spec", "template", "metadata", "labels")
	if labels["app.kubernetes.io/name"] != controlName {
		t.Errorf("labels %v, want the name %s", labels, controlName)
	}
}

// What each platform has where, compared with testdata/platforms.txt.
func TestPlatforms(t *testing.T) {
	var b strings.Builder
	for _, platform := range []string{"", "GKE", "EKS", "AKS", "OpenShift", "K3s", "RKE2", "Talos", "MicroK8s"} {
		list, err := rendered(t, "platform="+platform)
		if err != nil {
			t.Fatal(err)
		}
		ds, err := daemonSetOf(list)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s\n", platform)
		folders := map[string]string{}
		for _, v := range ds.Spec.Template.Spec.Volumes {
			if v.HostPath != nil {
				folders[v.Name] = v.HostPath.Path
			}
		}
		agent := ds.Spec.Template.Spec.Containers[0]
		for _, name := range []string{"cni-conf", "cni-bin", "netns"} {
			mounts := 0
			for _, m := range agent.VolumeMounts {
				if m.Name == name && (m.MountPath == folders[name] || name == "netns") {
					mounts++
				}
			}
			fmt.Fprintf(&b, "  %s %s, mounted %d times\n", name, folders[name], mounts)
		}
		if o := agent.SecurityContext.SELinuxOptions; o != nil {
			fmt.Fprintf(&b, "  SELinux type %s\n", o.Type)
		}
		for _, o := range list {
			if o.GetKind() == "RoleBinding" && o.GetName() != controlName {
				fmt.Fprintf(&b, "  RoleBinding %s: %v\n", o.GetName(), o.Object["roleRef"].(map[string]any)["name"])
			}
		}
	}
	file := filepath.Join("testdata", "platforms.txt")
	want, err := os.ReadFile(file)
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("%s, %v (-file +chart):\n%s", file, err, diff)
	}
	given := fmt.Sprint(objects(t, "platform=K3s,node.cni.binDir=/opt/mine")["DaemonSet tacit-node"])
	if !strings.Contains(given, "--cni-bin-dir=/opt/mine") || !strings.Contains(given, "--cni-dir=/var/lib/rancher/k3s/agent/etc/cni/net.d") {
		t.Errorf("a folder that is given does not count more than the platform's: %s", given)
	}
}

// Nodes find control before anybody answers names: CoreDNS may wait for the nodes.
func TestNodesNeedNoNames(t *testing.T) {
	ds := renderedNode(t)
	spec := ds.Spec.Template.Spec
	if spec.EnableServiceLinks == nil || !*spec.EnableServiceLinks {
		t.Error("the kubelet tells nodes no address of control's Service")
	}
	if !slices.ContainsFunc(spec.Tolerations, func(t corev1.Toleration) bool { return t.Key == "" && t.Operator == corev1.TolerationOpExists }) {
		t.Errorf("tolerations %v", spec.Tolerations)
	}
}

// The Job that keeps Helm and Argo CD from deleting under the feet of pods is a hook of both,
// reads only, and reaches the API server.
func TestDeletionIsGuarded(t *testing.T) {
	charted, err := openChart("v1")
	if err != nil {
		t.Fatal(err)
	}
	r, err := dryRun(t.Context(), charted, nil)
	if err != nil || len(r.Hooks) != 1 {
		t.Fatalf("hooks %v, %v, want one", r, err)
	}
	list, err := decode(r.Hooks[0].Manifest)
	if err != nil || len(list) != 1 {
		t.Fatalf("%d objects of a hook, %v, want one", len(list), err)
	}
	job := list[0]
	for key, want := range map[string]string{"helm.sh/hook": "pre-delete", "argocd.argoproj.io/hook": "PreDelete"} {
		if got := job.GetAnnotations()[key]; got != want {
			t.Errorf("%s is %q, want %s", key, got, want)
		}
	}
	if _, found, _ := unstructured.NestedFieldNoCopy(job.Object, "spec", "ttlSecondsAfterFinished"); !found {
		t.Error("the Job stays for good, and cannot be changed")
	}
	pod, _, _ := unstructured.NestedMap(job.Object, "spec", "template")
	labels, _, _ := unstructured.NestedStringMap(pod, "metadata", "labels")
	if text := fmt.Sprint(pod); !strings.Contains(text, "/tacit-control predelete") || labels["app.kubernetes.io/name"] == controlName {
		t.Errorf("pod %s: want predelete of control, and no label by which the Service finds control", text)
	}
	policy := fmt.Sprint(objects(t)["NetworkPolicy tacit-control"].Object["spec"])
	if !strings.Contains(policy, "values:[tacit-control "+labels["app.kubernetes.io/name"]+"]") {
		t.Errorf("no policy lets %v reach the API server: %s", labels, policy)
	}
}
