package kube

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// generator makes objects of few names and addresses, so that they meet often.
type generator struct{ random *rand.Rand }

func (g *generator) batch(known Set) (events []Event, said []Said) {
	now := make(map[Key]Event)
	for range 1 + g.random.IntN(1+g.random.IntN(12)) {
		e := g.event(known)
		now[e.Key] = e
	}
	for g.is(3) {
		said = append(said, g.said())
	}
	slices.SortFunc(said, func(x, y Said) int { return strings.Compare(x.UID, y.UID) })
	said = slices.CompactFunc(said, func(x, y Said) bool { return x.UID == y.UID })
	return slices.Collect(maps.Values(now)), said
}

// is tells, once in n times.
func (g *generator) is(n int) bool { return g.random.IntN(n) == 0 }

func (g *generator) of(list ...string) string { return list[g.random.IntN(len(list))] }

func (g *generator) namespace() string { return g.of("a", "a", "a", "b", "b", "kube-system") }

func (g *generator) podAddress() string {
	return fmt.Sprintf("10.1.0.%d", 1+g.random.IntN(5))
}

func (g *generator) anyAddress() string {
	return g.of(g.podAddress(), g.podAddress(), g.podAddress(), g.serviceAddress(), g.nodeAddress(), "192.0.2.1", "fd00::1", "nonsense")
}

func (g *generator) serviceAddress() string { return fmt.Sprintf("10.9.0.%d", 1+g.random.IntN(3)) }
func (g *generator) nodeAddress() string    { return fmt.Sprintf("10.8.0.%d", 1+g.random.IntN(3)) }

// event changes an object that is there as often as it makes a new one.
func (g *generator) event(known Set) Event {
	var o metav1.Object
	switch n := g.random.IntN(26); {
	case n >= 23:
		o = g.peer()
	case n >= 20:
		o = g.policy()
	case n < 9:
		o = g.pod()
	case n < 11:
		o = g.space()
	case n < 13:
		o = g.node()
	case n < 15:
		o = g.service()
	case n < 18:
		o = g.slice()
	case n < 19:
		o = &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: g.of("x", "y")}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{g.of("10.9.0.0/16", "10.1.0.0/24", "0.0.0.0/0", "?")}}}
	default:
		o = &Mesh{ObjectMeta: metav1.ObjectMeta{Name: g.of(MeshName, MeshName, "other"), Generation: g.random.Int64N(3)},
			Spec: MeshSpec{Enrollment: g.of("", "", Labeled, All, None, "odd"), Namespaces: []string{g.of("a", "b", "kube-system")}, NamespaceSelector: g.selector(),
				Revoked: []string{g.of("a/x", "a/y", "spiffe://lab/ns/a/sa/x", "odd")}, MaxConnectionAge: g.of("", "1h", "odd"), Mode: g.of("", "", PermissiveMode, StrictMode, "odd")}}
		if g.is(2) {
			o.(*Mesh).Spec.Outbound = &MeshOutbound{Mode: g.of("", StrictMode, "odd"), Outside: g.of("", OutsideListed, "odd"), Allowed: []string{g.of("10.9.0.1:443", "odd")}}
		}
		if g.is(2) {
			o.(*Mesh).Spec.Exceptions = []MeshException{{Namespace: g.namespace(), Workload: g.of("", "p1", "p2"), Selector: map[string]string{"app": g.of("1", "2")}, Ports: []int32{80}, From: []string{g.of("10.8.0.0/16", "odd")}[:g.random.IntN(2)]}}
		}
	}
	k, _ := keyOf(o)
	if g.is(5) {
		return Event{Key: k}
	}
	if p, is := known[k].(*PodObject); is && g.is(2) {
		o = g.changed(p)
	}
	return Event{k, o}
}

// selector selects namespaces: some, all, none, or it is none.
func (g *generator) selector() *metav1.LabelSelector {
	operator := metav1.LabelSelectorOperator(g.of("Exists", "DoesNotExist", "odd"))
	return []*metav1.LabelSelector{nil, nil, {}, {MatchLabels: map[string]string{LabelMesh: "on"}},
		{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: LabelMesh, Operator: operator}}}}[g.random.IntN(5)]
}

// changed is the same pod with one thing about it different.
func (g *generator) changed(p *PodObject) *PodObject {
	other, like := *p, g.pod()
	q := &other
	switch g.random.IntN(9) {
	case 0:
		q.Status.Conditions = like.Status.Conditions
	case 1:
		q.Labels = like.Labels
	case 2:
		q.DeletionTimestamp = like.DeletionTimestamp
	case 3:
		q.Status.PodIP = like.Status.PodIP
	case 4:
		q.Status.Phase = like.Status.Phase
	case 5:
		q.Annotations = like.Annotations
	case 6:
		q.UID = like.UID
	case 7:
		q.Spec.NodeName = like.Spec.NodeName
	case 8:
		q.Spec.HostNetwork = like.Spec.HostNetwork
	}
	return q
}

func (g *generator) labels(more ...string) map[string]string {
	labels := make(map[string]string)
	if g.is(2) {
		labels[LabelMesh] = g.of("on", "on", "off", "odd")
	}
	if g.is(5) {
		labels[LabelIstio] = g.of("ambient", "none", "odd")
	}
	for i := 0; i < len(more); i += 2 {
		labels[more[i]] = more[i+1]
	}
	if g.is(40) {
		for i := range maxPodLabels + 1 {
			labels[fmt.Sprint("l", i)] = ""
		}
	}
	return labels
}

// policy is for a namespace, for some of its pods, or for who serves a service; those of tacit
// are for the whole mesh.
func (g *generator) policy() *AuthorizationPolicy {
	p := &AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: g.of("a", "a", "b", labConfig.Namespace), Name: g.of("x", "y", "z"), Generation: g.random.Int64N(3)}}
	var fields []string
	if g.is(2) {
		fields = append(fields, `"selector":{"matchLabels":`+g.of(`{"app":"1"}`, `{"app":"2"}`, `{"app":"1","tacit.dev/mesh":"on"}`, `{}`, `{"*":""}`)+`}`)
	}
	if g.is(4) {
		fields = append(fields, `"targetRefs":[{"kind":"Service","name":"`+g.of("s1", "s2", "s3")+`"}`+g.of("", `,{"kind":"Gateway","name":"g"}`, `,{"kind":"Service","name":"s2"}`)+`]`)
	}
	fields = append(fields, `"action":"`+g.of("ALLOW", "DENY", "", "AUDIT", "CUSTOM", "?")+`"`)
	if g.is(2) {
		fields = append(fields, `"rules":[{"to":[{"operation":{`+g.of(`"ports":["80"]`, `"methods":["GET"]`, ``, `"ports":["x"]`)+`}}]}]`)
	}
	p.Spec = json.RawMessage("{" + strings.Join(fields, ",") + "}")
	if g.is(4) {
		p.Annotations = map[string]string{AnnotationDryRun: g.of("true", "false", "?")}
	}
	return p
}

// peer is for a namespace, or for some of its pods; those of tacit are for the whole mesh.
func (g *generator) peer() *PeerAuthentication {
	p := &PeerAuthentication{ObjectMeta: metav1.ObjectMeta{
		Namespace: g.of("a", "a", "b", labConfig.Namespace), Name: g.of("x", "y", "z"), Generation: g.random.Int64N(3),
		CreationTimestamp: metav1.Unix(g.random.Int64N(3), 0),
	}}
	mode := func() string {
		return `{"mode":"` + g.of("STRICT", "PERMISSIVE", "DISABLE", "UNSET", "", "?") + `"}`
	}
	var fields []string
	if g.is(2) {
		fields = append(fields, `"selector":{"matchLabels":`+g.of(`{"app":"1"}`, `{"app":"2"}`, `{}`)+`}`)
	}
	if g.is(3) {
		fields = append(fields, `"portLevelMtls":{"`+g.of("80", "81", "x")+`":`+mode()+`}`)
	}
	fields = append(fields, `"mtls":`+g.of(mode(), mode(), "null"))
	if g.is(9) {
		fields = append(fields, `"newer":1`)
	}
	p.Spec = json.RawMessage("{" + strings.Join(fields, ",") + "}")
	return p
}

func (g *generator) pod() *PodObject {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: g.namespace(), Name: g.of("p1", "p2", "p3"), UID: types.UID(g.of("u1", "u2", "u3", "u4", "u5", "u6", "")), Labels: g.labels("app", g.of("1", "2", "3")),
		},
		Spec:   corev1.PodSpec{NodeName: g.of("n1", "n1", "n2", "n3", ""), ServiceAccountName: g.of("", "sa", "sa", "sa", "not/one")},
		Status: corev1.PodStatus{PodIP: g.anyAddress()},
	}
	if g.is(6) {
		p.Spec.HostNetwork, p.Status.PodIP = true, g.nodeAddress()
	}
	if g.is(5) {
		p.Annotations = map[string]string{AnnotationOutboundMode: g.of("", StrictMode, PermissiveMode, "odd"), AnnotationOutboundAllowed: g.of("", "443", "x"), AnnotationAdmitNodes: g.of("", "80", "z")}
	}
	if g.is(4) {
		p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}, {IP: "fd00::" + g.of("1", "2")}}
	}
	if g.is(6) {
		p.Status.Phase = corev1.PodSucceeded
	}
	if g.is(5) {
		p.DeletionTimestamp = &metav1.Time{Time: time.Unix(9, 0)}
	}
	if g.is(2) {
		p.Status.StartTime = &metav1.Time{Time: time.Unix(g.random.Int64N(3), 0)}
	}
	if g.is(2) {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue})
	}
	if g.is(4) {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: ConditionProtected, Status: corev1.ConditionTrue})
	}
	if g.is(4) {
		p.Annotations = map[string]string{AnnotationExcludeOutbound: g.of("80", "x", "10.0.0.1:80,y"), AnnotationExcludeInbound: g.of("", "80", "z")}
	}
	if g.is(4) {
		p.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 80, HostPort: 8080}}}}
	}
	return KeepPod(p)
}

func (g *generator) space() *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: g.namespace(), Labels: g.labels()}}
	if g.is(3) {
		n.Annotations = map[string]string{AnnotationOutboundMode: g.of("", StrictMode, PermissiveMode, "odd"), AnnotationOutboundAllowed: g.of("", "443", "x")}
	}
	return n
}

func (g *generator) node() *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: g.of("n1", "n2", "n3"), Labels: map[string]string{corev1.LabelTopologyZone: g.of("", "z1", "z2")}}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: g.of(g.nodeAddress(), g.nodeAddress(), g.podAddress())}}
	n.Spec.PodCIDR = g.of("10.1.0.0/24", "10.1.0.0/24", "10.2.0.0/24", "", "0.0.0.0/1")
	if g.is(3) {
		n.Spec.Taints = []corev1.Taint{{Key: TaintNotReady}}
	}
	if g.is(3) {
		n.Annotations = map[string]string{AnnotationLost: g.of("once", "twice")}
	}
	return n
}

func (g *generator) service() *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: g.of("a", "b"), Name: g.of("s1", "s2")}}
	s.Spec.ClusterIP = g.of(g.serviceAddress(), g.serviceAddress(), g.podAddress(), "None")
	s.Spec.Ports = []corev1.ServicePort{{Name: "web", Port: 80, TargetPort: intstr.FromInt(8080)}}
	if g.is(2) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "more", Port: 81, NodePort: 30081})
	}
	if g.is(8) {
		s.Spec.Type = corev1.ServiceTypeExternalName
	}
	if g.is(4) {
		local := corev1.ServiceInternalTrafficPolicyLocal
		s.Spec.InternalTrafficPolicy = &local
	}
	if g.is(8) {
		s.Spec.ExternalIPs = slices.Repeat([]string{"192.0.2.9"}, maxExternal+1)
	}
	return s
}

func (g *generator) slice() *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Namespace: g.of("a", "b"), Name: g.of("e1", "e2", "e3"), Labels: map[string]string{discoveryv1.LabelServiceName: g.of("s1", "s1", "s2", "s3")},
	}}
	for _, name := range []string{"web", g.of("more", "other")} {
		port := int32(8000 + g.random.IntN(2))
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
	}
	for range g.random.IntN(4) {
		end := discoveryv1.Endpoint{Addresses: []string{g.anyAddress()}}
		if g.is(2) {
			end.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: g.of("p1", "p2", "p3"), Namespace: g.of("", "a", "b"), UID: types.UID(g.of("", "", "u1", "u2"))}
		}
		if g.is(2) {
			end.Conditions = discoveryv1.EndpointConditions{Ready: new(g.is(2)), Serving: new(g.is(2)), Terminating: new(g.is(2))}
		}
		s.Endpoints = append(s.Endpoints, end)
	}
	return s
}

func (g *generator) said() Said {
	s := Said{UID: g.of("u1", "u2", "u3", "u4", "u5", "u6"), Vouched: g.is(2)}
	if g.is(2) {
		s.Told = []netip.Addr{netip.MustParseAddr(g.podAddress())}
	}
	for g.is(2) {
		if a, err := netip.ParseAddr(g.anyAddress()); err == nil && !slices.Contains(s.Others, a) {
			s.Others = append(s.Others, a)
		}
	}
	return s
}
