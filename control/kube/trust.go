package kube

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"tacit.dev/mesh"
)

// leastAge and mostAge bound MeshSpec.MaxConnectionAge.
const leastAge, mostAge = time.Second, 365 * 24 * time.Hour

// trust reads whose identity counts no more, and for how long the others do. As long as one of
// the revoked cannot be understood, those that were revoked before are revoked, too: it may be meant.
func (r *reader) trust(s MeshSpec, f *faults) (t mesh.Trust) {
	var unsure bool
	for i, text := range s.Revoked {
		id, err := r.revoked(text)
		if err == nil && i >= mesh.MaxRevoked {
			err = fmt.Errorf("too many: want at most %d", mesh.MaxRevoked)
		}
		if err != nil {
			unsure = true
			f.add("revoked %.255q: %v", text, err)
			continue
		}
		t.Revoked = append(t.Revoked, id)
	}
	if unsure {
		t.Revoked = append(t.Revoked, r.cfg.Before.Trust.Revoked...)
	}
	slices.SortFunc(t.Revoked, func(a, b mesh.ID) int { return strings.Compare(a.String(), b.String()) })
	t.Revoked = slices.Compact(t.Revoked)
	t.Revoked = t.Revoked[:min(len(t.Revoked), mesh.MaxRevoked)]
	if s.MaxConnectionAge == "" {
		return t
	}
	age, err := time.ParseDuration(s.MaxConnectionAge)
	if err != nil || age < leastAge || age > mostAge {
		f.add("maxConnectionAge %.80q: want a duration of %s to %s, such as 12h; what held before holds", s.MaxConnectionAge, leastAge, mostAge)
		age = r.cfg.Before.Trust.MaxAge
	}
	t.MaxAge = age
	return t
}

func (r *reader) revoked(text string) (mesh.ID, error) {
	if namespace, account, ok := strings.Cut(text, "/"); ok && !strings.Contains(text, ":") {
		text = mesh.ID{TrustDomain: r.cfg.TrustDomain, Namespace: namespace, ServiceAccount: account}.String()
	}
	id, err := mesh.ParseID(text)
	if err != nil {
		return id, fmt.Errorf("want spiffe://%s/ns/NAMESPACE/sa/SERVICE-ACCOUNT, or NAMESPACE/SERVICE-ACCOUNT", r.cfg.TrustDomain)
	}
	if id.TrustDomain != r.cfg.TrustDomain {
		return id, fmt.Errorf("nobody of that trust domain is believed: want %s", r.cfg.TrustDomain)
	}
	return id, nil
}

// trustPlace tells the nodes; nil if there is nothing to tell.
func (r *reader) trustPlace() *mesh.Place {
	if r.policy.Trust.IsZero() {
		return nil
	}
	return &mesh.Place{Name: r.workloadUID("/Cluster", "mesh", MeshName), Trust: r.policy.Trust}
}
