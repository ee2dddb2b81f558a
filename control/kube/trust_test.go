package kube

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/mesh"
)

func TestTrust(t *testing.T) {
	id := func(namespace, account string) mesh.ID {
		return mesh.ID{TrustDomain: labConfig.TrustDomain, Namespace: namespace, ServiceAccount: account}
	}
	var many []string
	for i := range mesh.MaxRevoked + 1 {
		many = append(many, fmt.Sprintf("a/x%d", i))
	}
	before := mesh.Trust{Revoked: []mesh.ID{id("old", "one")}, MaxAge: time.Minute}
	for name, row := range map[string]struct {
		revoked []string
		age     string
		want    mesh.Trust
		fault   string
	}{
		"nothing":              {nil, "", mesh.Trust{}, ""},
		"both forms, twice":    {[]string{"b/y", "spiffe://lab/ns/a/sa/x", "a/x"}, "", mesh.Trust{Revoked: []mesh.ID{id("a", "x"), id("b", "y")}}, ""},
		"one is no identity":   {[]string{"a/x", "a/b/c"}, "", mesh.Trust{Revoked: []mesh.ID{id("a", "x"), id("old", "one")}}, `revoked "a/b/c"`},
		"one has no account":   {[]string{"a/"}, "", mesh.Trust{Revoked: []mesh.ID{id("old", "one")}}, `revoked "a/"`},
		"another trust domain": {[]string{"spiffe://other/ns/a/sa/x"}, "", mesh.Trust{Revoked: []mesh.ID{id("old", "one")}}, "nobody of that trust domain"},
		"an age":               {nil, "12h", mesh.Trust{MaxAge: 12 * time.Hour}, ""},
		"no age":               {nil, "soon", mesh.Trust{MaxAge: time.Minute}, "maxConnectionAge"},
		"too short an age":     {nil, "10ms", mesh.Trust{MaxAge: time.Minute}, "maxConnectionAge"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := labConfig
			cfg.Before.Trust = before
			m := &Mesh{ObjectMeta: metav1.ObjectMeta{Name: MeshName}, Spec: MeshSpec{Revoked: row.revoked, MaxConnectionAge: row.age}}
			r := Build(Objects{Meshes: []*Mesh{m}}, cfg)
			var got mesh.Trust
			for _, p := range r.Places {
				if strings.HasSuffix(p.Name, "/Cluster/mesh/default") {
					got = p.Trust
				}
			}
			if !slices.Equal(got.Revoked, row.want.Revoked) || got.MaxAge != row.want.MaxAge {
				t.Errorf("%+v: want %+v", got, row.want)
			}
			if faults := strings.Join(r.Mesh.Faults, "\n"); (faults == "") != (row.fault == "") || !strings.Contains(faults, row.fault) {
				t.Errorf("faults %q: want %q", faults, row.fault)
			}
		})
	}
	r := Build(Objects{Meshes: []*Mesh{{ObjectMeta: metav1.ObjectMeta{Name: MeshName}, Spec: MeshSpec{Revoked: many}}}}, labConfig)
	if n := len(r.Mesh.Policy.Trust.Revoked); n != mesh.MaxRevoked || len(r.Mesh.Faults) != 1 {
		t.Errorf("%d of too many are revoked, faults %q", n, r.Mesh.Faults)
	}
}

// Who is revoked, and for how long connections live, says nothing of pods: none is read again.
func TestTrustTouchesNoPod(t *testing.T) {
	b := NewBuilder(labConfig)
	m := func(revoked ...string) []Event {
		return []Event{{Key: Key{Kind: "Mesh", Name: MeshName}, Object: &Mesh{ObjectMeta: metav1.ObjectMeta{Name: MeshName}, Spec: MeshSpec{Revoked: revoked}}}}
	}
	b.Apply(m(), nil)
	d := b.Apply(m("a/x"), nil)
	if len(d.Places) != 1 || len(d.Workloads)+len(d.Pods) != 0 {
		t.Errorf("%+v: want one place", d)
	}
	if d = b.Apply(m(), nil); len(d.Gone) != 1 {
		t.Errorf("%+v: want it gone", d)
	}
}
