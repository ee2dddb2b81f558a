package main

import (
	"encoding/json"
	"fmt"
	"net/netip"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"tacit.dev/mesh"
	"tacit.dev/policy"
	"tacit.dev/wire/xds/message"
)

// differences are deliberate: in each Tacit denies where istiod's policies let in compare-a/app at port
// 80. docs/policy.md has the same rows. A policy that is untold is one that istiod does not tell at all.
var differences = []struct {
	name, spec string
	untold     bool
}{
	{"a DENY with a field of HTTP", `{"action": "DENY", "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}`, false},
	{"a DENY of a namespace with a field of HTTP", `{"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["compare-a"]}}], "to": [{"operation": {"paths": ["/x"]}}]}]}`, false},
	{"an address that does not parse, allowed", `{"rules": [{"from": [{"source": {"namespaces": ["compare-a"], "ipBlocks": ["nonsense"]}}]}]}`, false},
	{"a port that does not parse, denied", `{"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["http"]}}]}]}`, false},
	{"a principal with a scheme, denied", `{"action": "DENY", "rules": [{"from": [{"source": {"principals": ["spiffe://cluster.local/ns/compare-a/sa/app"]}}]}]}`, false},
	{"a star in the middle, denied", `{"action": "DENY", "rules": [{"from": [{"source": {"principals": ["*/ns/compare-a/*"]}}]}]}`, false},
	{"a key that is not one of connections, denied", `{"action": "DENY", "rules": [{"when": [{"key": "request.auth.claims[iss]", "values": ["x"]}]}]}`, false},
	{"the action CUSTOM", `{"action": "CUSTOM", "provider": {"name": "x"}, "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]}`, true},
}

// differing are policies of the differences: each is for no pod.
func differing(namespace string) (list []*unstructured.Unstructured) {
	for i, d := range differences {
		spec := map[string]any{}
		if err := json.Unmarshal([]byte(d.spec), &spec); err != nil {
			panic(fmt.Sprintf("compare: %s: %v", d.name, err))
		}
		spec["selector"] = map[string]any{"matchLabels": map[string]any{"group": "none"}}
		list = append(list, newPolicy(namespace, fmt.Sprint("difference-", i), spec))
	}
	return list
}

func newPolicy(namespace, name string, spec map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
		"metadata": map[string]any{"namespace": namespace, "name": name}, "spec": spec,
	}}
}

// differences holds the list against what both make of it.
func (c *comparison) differences(t *town) {
	x := policy.Connection{
		Peer:   policy.Proved(mesh.ID{TrustDomain: trustDomain, Namespace: "compare-a", ServiceAccount: "app"}),
		Source: netip.MustParseAddr("10.77.1.7"), Destination: netip.AddrPortFrom(address(t.pods[0]), 80),
	}
	for i, d := range differences {
		k := key(t.differing[i])
		if p := c.ours.Policy(k); p == nil || policy.Compile([]*mesh.Policy{p}, nil, nil).Decide(&x).Allowed {
			c.differ("%s: Tacit lets it in, or does not know it", d.name)
		}
		var theirs []*message.Authorization
		if p := c.theirs.policies[k]; p != nil {
			theirs = append(theirs, p)
		}
		if (len(theirs) == 0) != d.untold || !ztunnel(theirs, x) {
			c.differ("%s: istiod does not differ, tells it %v: the row in docs/policy.md is wrong", d.name, len(theirs) > 0)
		}
	}
}
