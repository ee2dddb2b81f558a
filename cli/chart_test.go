package cli

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/common"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"tacit.dev/control/kube"
	"tacit.dev/wire/finding"
)

// rendered is what the chart makes of values KEY=VALUE.
func rendered(t *testing.T, set ...string) ([]*unstructured.Unstructured, error) {
	t.Helper()
	return renderedOf(t, "v1.2.3-4-gabc", set...)
}

// renderedNode is the DaemonSet in what is rendered.
func renderedNode(t *testing.T, set ...string) *appsv1.DaemonSet {
	t.Helper()
	list, err := rendered(t, set...)
	if err != nil {
		t.Fatal(err)
	}
	ds, err := daemonSetOf(list)
	if err != nil {
		t.Fatal(err)
	}
	return ds
}

// renderedOf is rendered, of a version.
func renderedOf(t *testing.T, version string, set ...string) ([]*unstructured.Unstructured, error) {
	t.Helper()
	charted, err := openChart(version)
	if err != nil {
		t.Fatal(err)
	}
	v := valueFlags{}
	v.options.Values = set
	vals, err := v.merge()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := render(t.Context(), charted, vals)
	if err != nil {
		return nil, err
	}
	return decode(manifest)
}

func objects(t *testing.T, set ...string) map[string]*unstructured.Unstructured {
	t.Helper()
	list, err := rendered(t, set...)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*unstructured.Unstructured{}
	for _, o := range list {
		all[o.GetKind()+" "+o.GetName()] = o
	}
	return all
}

// Control has the rights that docs/rights.md gives reasons for, and nobody else has any.
func TestRightsAreThoseOfTheDocumentation(t *testing.T) {
	text, err := os.ReadFile("../docs/rights.md")
	if err != nil {
		t.Fatal(err)
	}
	all := objects(t)
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	for i, kind := range []string{"ClusterRole", "Role"} {
		var want map[string]any
		if err := yaml.Unmarshal([]byte(blocks[i][1]), &want); err != nil {
			t.Fatal(err)
		}
		rules := inShort(t, all[kind+" tacit-control"].Object["rules"])
		if diff := cmp.Diff(want["rules"], rules); diff != "" {
			t.Errorf("%s (-docs/rights.md +chart):\n%s", kind, diff)
		}
	}
	for name, o := range all {
		if subjects, ok := o.Object["subjects"]; ok && strings.Contains(fmt.Sprint(subjects), "tacit-node") {
			t.Errorf("%s gives rights to nodes", name)
		}
	}
}

// inShort names the ConfigMaps of which there are many once. All of them have to be there.
func inShort(t *testing.T, rules any) any {
	for _, rule := range rules.([]any) {
		names, _ := rule.(map[string]any)["resourceNames"].([]any)
		for _, many := range []struct {
			short  string
			shards int
			name   func(int) string
		}{{"tacit-captured-SHARD", kube.Shards, kube.CapturedMap}, {"tacit-pairs-SHARD", kube.PairShards, kube.PairsMap}} {
			names = shortened(t, names, many.short, many.shards, many.name)
		}
		if names != nil {
			rule.(map[string]any)["resourceNames"] = names
		}
	}
	return rules
}

func shortened(t *testing.T, names []any, short string, shards int, name func(int) string) (others []any) {
	found := make(map[string]bool)
	for _, n := range names {
		if strings.HasPrefix(n.(string), strings.TrimSuffix(short, "SHARD")) {
			found[n.(string)] = true
		} else {
			others = append(others, n)
		}
	}
	if len(found) == 0 {
		return names
	}
	for shard := range shards {
		if !found[name(shard)] {
			t.Errorf("no right to %s", name(shard))
		}
	}
	return append(others, short)
}

func TestNodesHaveThePrivilegesOfTheDesign(t *testing.T) {
	ds := renderedNode(t)
	spec := ds.Spec.Template.Spec
	if spec.HostNetwork || spec.HostPID || spec.HostIPC || *spec.AutomountServiceAccountToken || spec.PriorityClassName != "system-node-critical" {
		t.Errorf("host network %v, pid %v, ipc %v, token %v, priority %q", spec.HostNetwork, spec.HostPID, spec.HostIPC, *spec.AutomountServiceAccountToken, spec.PriorityClassName)
	}
	rolling := ds.Spec.UpdateStrategy.RollingUpdate
	if rolling.MaxSurge.IntValue() != 1 || rolling.MaxUnavailable.IntValue() != 0 {
		t.Errorf("max surge %v, max unavailable %v", rolling.MaxSurge, rolling.MaxUnavailable)
	}
	onHost := map[string]bool{}
	for _, v := range spec.Volumes {
		onHost[v.Name] = v.HostPath != nil
	}
	capabilities := map[string]string{"agent": "[CHOWN NET_ADMIN NET_BIND_SERVICE SYS_ADMIN SYS_PTRACE]", "proxy": "[]"}
	for _, c := range spec.Containers {
		s := c.SecurityContext
		slices.Sort(s.Capabilities.Add)
		if got := fmt.Sprint(s.Capabilities.Add); got != capabilities[c.Name] || fmt.Sprint(s.Capabilities.Drop) != "[ALL]" {
			t.Errorf("%s: capabilities %s, dropped %v", c.Name, got, s.Capabilities.Drop)
		}
		if !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || s.Privileged != nil {
			t.Errorf("%s: security context %+v", c.Name, s)
		}
		if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() {
			t.Errorf("%s requests no resources", c.Name)
		}
		for _, m := range c.VolumeMounts {
			if c.Name == "proxy" && onHost[m.Name] {
				t.Errorf("the proxy has %s of the host", m.Name)
			}
		}
	}
}

func TestSchemaRefuses(t *testing.T) {
	for set, want := range map[string]string{
		"color=red":                              "color",
		"node.agent.color=red":                   "color",
		"image.pullPolicy=Sometimes":             "pullPolicy",
		"control.replicas=0":                     "replicas",
		"trustDomain=a/b":                        "trustDomain",
		"node.runDir=run":                        "runDir",
		"certificates.ttl=tomorrow":              "ttl",
		"control.extraArgs[0]=rm":                "extraArgs",
		"node.updateStrategy.maxSurge=half":      "maxSurge",
		"node.updateStrategy.maxSurge=0":         "want one of them to be 0",
		"node.updateStrategy.maxUnavailable=10%": "want one of them to be 0",
		"node.terminationGracePeriodSeconds=1":   "terminationGracePeriodSeconds",
		"networkPolicy.enabled=perhaps":          "enabled",
	} {
		if _, err := rendered(t, set); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("--set %s: error %v, want one about %s", set, err, want)
		}
	}
}

func TestValuesArriveInTheManifests(t *testing.T) {
	for set, want := range map[string]struct{ object, text string }{
		"image.registry=r.example/t":       {"DaemonSet tacit-node", "image:r.example/t/tacit-node:v1.2.3-4-gabc"},
		"image.tag=x":                      {"Deployment tacit-control", "image:tacit.dev/tacit-control:x"},
		"node.cni.confDir=/etc/net":        {"DaemonSet tacit-node", "path:/etc/net"},
		"node.netnsDir=/var/run/netns":     {"DaemonSet tacit-node", "mountPath:/run/netns"},
		"trustDomain=example.org":          {"Deployment tacit-control", "--trust-domain=example.org"},
		"control.statusWrites=500":         {"Deployment tacit-control", "--status-writes=500"},
		"rootNamespace=istio-system":       {"Deployment tacit-control", "--root-namespace=istio-system"},
		"node.updateStrategy.maxSurge=25%": {"DaemonSet tacit-node", "maxSurge:25% maxUnavailable:0"},
		"node.updateStrategy.maxSurge=0,node.updateStrategy.maxUnavailable=3": {"DaemonSet tacit-node", "maxSurge:0 maxUnavailable:3"},
		"node.terminationGracePeriodSeconds=600":                              {"DaemonSet tacit-node", "terminationGracePeriodSeconds:600"},
		"node.proxy.extraArgs[0]=--ttl=1m":                                    {"DaemonSet tacit-node", "--ttl=1m"},
	} {
		if got := fmt.Sprint(objects(t, set)[want.object]); !strings.Contains(got, want.text) {
			t.Errorf("--set %s: %s has no %q", set, want.object, want.text)
		}
	}
	for name := range objects(t, "crd.install=false") {
		if strings.HasPrefix(name, "CustomResourceDefinition ") {
			t.Errorf("%s is there with crd.install=false", name)
		}
	}
	if objects(t, "networkPolicy.enabled=false")["NetworkPolicy tacit-default"] != nil {
		t.Error("there is a NetworkPolicy with networkPolicy.enabled=false")
	}
}

// The proxy drains within the time that the kubelet gives it, and the agent goes on for as long as the proxy accepts.
func TestDrainFitsTheGracePeriod(t *testing.T) {
	for grace, want := range map[string][]string{"10": {"--drain=3s", "--drain=5s"}, "30": {"--drain=19s", "--drain=25s"}, "600": {"--drain=589s", "--drain=595s"}} {
		list, err := rendered(t, "node.terminationGracePeriodSeconds="+grace)
		if err != nil {
			t.Fatal(err)
		}
		ds, err := daemonSetOf(list)
		if err != nil {
			t.Fatal(err)
		}
		spec := ds.Spec.Template.Spec
		for i, c := range spec.Containers {
			if !slices.Contains(c.Args, want[i]) || fmt.Sprint(*spec.TerminationGracePeriodSeconds) != grace {
				t.Errorf("%s s: %s has %v, want %s", grace, c.Name, c.Args, want[i])
			}
		}
	}
}

// Metrics are open to nobody but the peers that the values name, and a flood of their port kills no proxy.
func TestMetricsAreClosedToStrangers(t *testing.T) {
	for set, want := range map[string]string{
		"":                               "[map[from:[map[podSelector:map[]]] ports:[map[port:15025 protocol:TCP]]]]",
		"networkPolicy.metricsFrom=null": "<nil>",
		"networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring": "[map[from:[map[namespaceSelector:map[matchLabels:map[name:monitoring]]]] ports:[map[port:15025 protocol:TCP]]]]",
	} {
		var values []string
		if set != "" {
			values = append(values, set)
		}
		spec := objects(t, values...)["NetworkPolicy tacit-node"].Object["spec"].(map[string]any)
		if got := fmt.Sprint(spec["ingress"]); got != want {
			t.Errorf("--set %q: ingress %s, want %s", set, got, want)
		}
	}
	ds := renderedNode(t)
	for _, c := range ds.Spec.Template.Spec.Containers {
		if c.LivenessProbe.Exec == nil {
			t.Errorf("%s: liveness is asked for over the network", c.Name)
		}
	}
}

// Pods of others in the namespace stay as they are, and the DNS of any platform is reached.
func TestPoliciesAreForPodsOfTacit(t *testing.T) {
	all := objects(t)
	for name, o := range all {
		if o.GetKind() != "NetworkPolicy" {
			continue
		}
		selector, _, _ := unstructured.NestedMap(o.Object, "spec", "podSelector") // matchLabels, or matchExpressions
		if len(selector) == 0 {
			t.Errorf("%s selects every pod of the namespace", name)
		}
	}
	for _, o := range []string{"Deployment tacit-control", "DaemonSet tacit-node"} {
		labels, _, _ := unstructured.NestedStringMap(all[o].Object, "spec", "template", "metadata", "labels")
		if labels["app.kubernetes.io/part-of"] != "tacit" {
			t.Errorf("%s: pods have labels %v, which no policy selects", o, labels)
		}
	}
	for _, o := range []string{"NetworkPolicy tacit-control", "NetworkPolicy tacit-node"} {
		if got := fmt.Sprint(all[o].Object["spec"]); !strings.Contains(got, "port:53 protocol:UDP") || !strings.Contains(got, "port:5353 protocol:UDP") {
			t.Errorf("%s: egress has no DNS at 53 and 5353: %s", o, got)
		}
	}
}

// Another version of the chart with the same images replaces no pod.
func TestOnlyWhatChangesAPodReplacesIt(t *testing.T) {
	templates := map[string]string{}
	for _, version := range []string{"v1.2.3", "v1.2.4"} {
		list, err := renderedOf(t, version, "image.tag=v1")
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range list {
			pod, ok, _ := unstructured.NestedMap(o.Object, "spec", "template")
			if !ok {
				continue
			}
			before := templates[o.GetName()]
			templates[o.GetName()] = fmt.Sprint(pod)
			if before != "" && before != fmt.Sprint(pod) {
				t.Errorf("%s: v1.2.3 and v1.2.4 of the chart have other pods:\n%s\n%v", o.GetName(), before, pod)
			}
		}
	}
	if len(templates) != 2 {
		t.Errorf("%d objects have pods, want 2", len(templates))
	}
}

// Control runs where its program does, and does not wait for nodes that wait for it.
func TestControlIsScheduledFirst(t *testing.T) {
	spec := fmt.Sprint(objects(t, "control.tolerations[0].operator=Exists", "control.nodeSelector.role=infra")["Deployment tacit-control"])
	for _, want := range []string{"kubernetes.io/os:linux", "role:infra", "key:" + kube.TaintNotReady + " operator:Exists"} {
		if !strings.Contains(spec, want) {
			t.Errorf("no %s in %s", want, spec)
		}
	}
}

// A chart that lost the kind Mesh is refused.
func TestChartWithoutMesh(t *testing.T) {
	charted, err := openChart("v1")
	if err != nil {
		t.Fatal(err)
	}
	charted.Files = slices.DeleteFunc(charted.Files, func(f *common.File) bool { return f.Name == "crd/mesh.yaml" })
	if _, err := render(t.Context(), charted, nil); err == nil || !strings.Contains(err.Error(), "crd/mesh.yaml") {
		t.Errorf("error %v, want one about crd/mesh.yaml", err)
	}
}

func TestChartVersions(t *testing.T) {
	for built, want := range map[string]string{"v1.2.3": "1.2.3", "v1.2.3-4-gabc-dirty": "1.2.3-4-gabc-dirty", "f4bbc59": "0.0.0+f4bbc59", "e2e/x": "0.0.0+e2e-x"} {
		if got := chartVersion(built); got != want {
			t.Errorf("chart of %s: version %s, want %s", built, got, want)
		}
	}
}

// Who looks at a node has what the agent has, and makes no folder there.
func TestVisitorIsLikeTheAgent(t *testing.T) {
	ds := renderedNode(t, "image.registry=r.example", "image.pullSecrets[0]=s")
	p, err := examination.pod(ds, "n1")
	if err != nil {
		t.Fatal(err)
	}
	agent, visitor := ds.Spec.Template.Spec.Containers[0], p.Spec.Containers[0]
	if diff := cmp.Diff(agent.SecurityContext, visitor.SecurityContext); diff != "" {
		t.Errorf("security context (-agent +visitor):\n%s", diff)
	}
	if visitor.Image != agent.Image || p.Spec.NodeName != "n1" || len(p.Spec.ImagePullSecrets) != 1 || len(p.Spec.Tolerations) != 1 {
		t.Errorf("visitor: %+v", p.Spec)
	}
	for _, v := range p.Spec.Volumes {
		if *v.HostPath.Type != corev1.HostPathDirectory {
			t.Errorf("volume %s may make a folder on the node", v.Name)
		}
	}
	sweeper, err := sweeping(ds).pod(ds, "n1")
	if err != nil || !slices.Contains(sweeper.Spec.Containers[0].Args, "--run=/host/run/tacit") {
		t.Errorf("sweeper: %v, %v", sweeper.Spec.Containers[0].Args, err)
	}
}

func TestMissingIsToldInTheOrderInWhichItComes(t *testing.T) {
	h := &health{control: "0 of 2", nodes: map[string]string{"n1": "", "n2": "pending"}, pods: map[string]podState{"a/b": {why: "Enrolling: soon"}}}
	for _, want := range []string{"control: 0 of 2", "nodes, 1 of 2 are ready: n2 (pending)", "pods, 0 of 1 are protected: a/b: Enrolling: soon", ""} {
		if got := h.missing(); got != want {
			t.Errorf("missing %q, want %q", got, want)
		}
		switch {
		case h.control != "":
			h.control = ""
		case h.nodes["n2"] != "":
			h.nodes["n2"] = ""
		default:
			h.pods["a/b"] = podState{protected: true}
		}
	}
}

func TestStateOfAPod(t *testing.T) {
	with := func(status corev1.ConditionStatus, reason, message string) *corev1.Pod {
		p := &corev1.Pod{}
		p.Status.Conditions = []corev1.PodCondition{{Type: kube.ConditionProtected, Status: status, Reason: reason, Message: message}}
		return p
	}
	for name, tt := range map[string]struct {
		pod  *corev1.Pod
		want podState
	}{
		"nothing said": {&corev1.Pod{}, podState{why: "no status reported by tacit-control yet"}},
		"protected":    {with("True", kube.Captured, ""), podState{protected: true, why: kube.Captured}},
		"partly":       {with("True", kube.PartlyProtected, "it forwards"), podState{protected: true, partly: true, why: "it forwards"}},
		"not":          {with("False", kube.NotCaptured, "no certificate"), podState{why: "NotCaptured: no certificate"}},
		"unknown":      {with("Unknown", kube.AgentAway, "away"), podState{why: "AgentAway: away"}},
	} {
		if got := stateOf(tt.pod); got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
}

// A pod of which something is refused is protected, and named with the remedy.
func TestStatusNamesPartlyProtectedPods(t *testing.T) {
	h := &health{pods: map[string]podState{"a/b": {protected: true, partly: true, why: "it forwards"}, "a/c": {protected: true}}}
	var status, check strings.Builder
	h.tellPods(&status)
	h.print(&check)
	if want := "namespace a\t2 of 2 enrolled pods protected\npartly protected\ta/b: it forwards\n"; status.String() != want {
		t.Errorf("status:\n%s, want\n%s", status.String(), want)
	}
	if !strings.Contains(check.String(), "note    pod a/b: partly protected: it forwards\n") || h.unprotected() != "" {
		t.Errorf("check:\n%s", check.String())
	}
}

func TestReportCounts(t *testing.T) {
	r := &report{}
	r.add("", finding.Finding{What: "version", Found: "1.36"})
	r.add("n1", finding.Finding{What: "rules", Lacks: "no nft", Remedy: "load it"})
	var b strings.Builder
	r.print(&b)
	if r.lacking() != 1 || !strings.Contains(b.String(), "LACKING node n1: rules: no nft") || !strings.Contains(b.String(), "remedy: load it") {
		t.Errorf("%d lacking:\n%s", r.lacking(), b.String())
	}
}
