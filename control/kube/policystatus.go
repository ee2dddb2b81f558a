package kube

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"tacit.dev/mesh"
)

// Conditions of an AuthorizationPolicy. Others have conditions there, too.
const (
	// PolicyAccepted: all of it is enforced as it stands there.
	PolicyAccepted = "tacit.dev/Accepted"
	// PolicyEnforced: it is enforced at every pod that it is for.
	PolicyEnforced = "tacit.dev/Enforced"
)

// Reasons of PolicyEnforced.
const (
	// AtDestination: by the proxy of the pod's node.
	AtDestination = "AtDestination"
	// NotEnforced: there is nothing in it that could be.
	NotEnforced = "NotEnforced"
	// NoPods: it is for none that is there.
	NoPods = "NoPods"
	// OutsideMesh: it is for some that are not in the mesh, where nobody enforces anything.
	OutsideMesh = "OutsideMesh"
	// DryRun: it is told what it would do.
	DryRun = "DryRun"
	// Older: an older one counts in its stead.
	Older = "Older"
)

// PolicyFacts is what people should see of a policy, and what they see.
type PolicyFacts struct {
	// Kind is PeerKind, or "" for an AuthorizationPolicy.
	Kind            string
	Namespace, Name string
	Generation      int64
	Shown           PolicyStatus
	// Want are conditions without a time.
	Want [2]metav1.Condition
}

// Key is NAMESPACE/NAME, after the kind if that is another than AuthorizationPolicy.
func (f PolicyFacts) Key() string { return keyOfPolicy(f.Kind, f.Namespace, f.Name) }

func keyOfPolicy(kind, namespace, name string) string {
	if kind == "" {
		return namespace + "/" + name
	}
	return kind + " " + namespace + "/" + name
}

func (f PolicyFacts) compare(g PolicyFacts) int {
	return cmp.Or(cmp.Compare(f.Kind, g.Kind), cmp.Compare(f.Namespace, g.Namespace), cmp.Compare(f.Name, g.Name))
}

func factsOf(p *AuthorizationPolicy, t *translation, counts podCounts) PolicyFacts {
	return PolicyFacts{
		Namespace: p.Namespace, Name: p.Name, Generation: p.Generation, Shown: p.Status,
		Want: [2]metav1.Condition{accepted(t.faults), enforced(t, counts)},
	}
}

func accepted(list []Fault) metav1.Condition {
	c := metav1.Condition{Type: PolicyAccepted, Status: metav1.ConditionTrue, Reason: Accepted, Message: "the whole policy is enforced as written"}
	var told faults
	for _, f := range list {
		if f.Reason == "" {
			continue
		}
		if c.Status == metav1.ConditionTrue {
			c.Status, c.Reason = metav1.ConditionFalse, f.Reason
		}
		told.add("%s (%s; remedy: %s)", f, f.Effect, f.Remedy)
	}
	if texts := told.told(); len(texts) > 0 {
		c.Message = strings.Join(texts, "\n")
	}
	return c
}

func enforced(t *translation, counts podCounts) metav1.Condition {
	c := metav1.Condition{Type: PolicyEnforced, Status: metav1.ConditionFalse}
	if t.policy != nil && t.policy.Scope == mesh.WholeMesh { // which others are not part of
		counts = podCounts{all: counts.all - counts.outside}
	}
	switch {
	case t.policy == nil && len(t.faults) > 0 && t.faults[0].Effect == Denies: // one of too many
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, TooMuch, "every connection to its namespace is denied"
	case t.policy == nil:
		c.Reason, c.Message = NotEnforced, "no part of the policy is enforced"
	case t.policy.DryRun:
		c.Reason, c.Message = DryRun, "dry run: proxies only report what it would do"
	case counts.all == 0:
		c.Reason, c.Message = NoPods, "it applies to no existing pod; it is for "+t.where()
	case counts.outside > 0:
		c.Reason, c.Message = OutsideMesh, "it is not enforced at pods that are not in the mesh; it is for "+t.where()
	default:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, AtDestination, "the proxy of the pod's node enforces it, for "+t.where()
	}
	return c
}

// where says for which pods it is.
func (t *translation) where() string {
	var of []string
	if t.labels != nil {
		of = append(of, fmt.Sprintf("pods with the labels of the selector (%d)", len(t.labels)))
	}
	for _, s := range t.services {
		of = append(of, "pods that serve "+s)
	}
	switch {
	case t.policy.Scope == mesh.WholeMesh:
		return "every pod of the mesh"
	case len(of) == 0:
		return "every pod of the namespace " + t.policy.Namespace
	}
	return strings.Join(of, ", ")
}

// Conditions are all that the status should have, and whether it has not. Those of others stay
// as they are. now is when a condition begins that was another before.
func (f PolicyFacts) Conditions(now time.Time) (all []json.RawMessage, differs bool) {
	size := 0
	had := make(map[string]metav1.Condition)
	for _, raw := range f.Shown.Conditions {
		var c metav1.Condition
		// Generation and times of others may be of another type.
		if json.Unmarshal(raw, &c) == nil && (c.Type == PolicyAccepted || c.Type == PolicyEnforced) {
			had[c.Type] = c
			continue
		}
		size += len(raw)
		all = append(all, raw)
	}
	if len(all) > maxConditions || size > maxPolicyStatus {
		return nil, false
	}
	for _, c := range f.Want {
		is, ok := had[c.Type]
		c.ObservedGeneration, c.LastTransitionTime = f.Generation, metav1.NewTime(now)
		if ok && is.Status == c.Status {
			c.LastTransitionTime = is.LastTransitionTime
		}
		differs = differs || !ok || is.Reason != c.Reason || is.Message != c.Message || is.Status != c.Status || is.ObservedGeneration != c.ObservedGeneration
		raw, err := json.Marshal(c)
		if err != nil {
			return nil, false
		}
		all = append(all, raw)
	}
	return slices.Clip(all), differs
}

// PolicyView is all the conditions of one policy, as they are and as they should be.
type PolicyView struct {
	Kind            string // as that of PolicyFacts
	Namespace, Name string
	Is, Want        []json.RawMessage
}

// Key is that of PolicyFacts.
func (v PolicyView) Key() string { return keyOfPolicy(v.Kind, v.Namespace, v.Name) }

// mostPolicies is how many policies are written before pods have their turn again. What is
// left comes with the next view: what was written comes back, and makes one.
const mostPolicies = 100

type writtenPolicy struct {
	want string
	at   time.Time
}

// showPolicies tells one of the errors: a server that refuses one refuses many.
func (d *Display) showPolicies(ctx context.Context, list []PolicyView) error {
	n := 0
	for _, v := range list {
		want := string(bytes.Join(asBytes(v.Want), nil))
		if d.policies[v.Key()].want == want {
			continue
		}
		if n++; n > mostPolicies {
			break
		}
		err := d.limit.Wait(ctx)
		if err == nil {
			err = d.showPolicy(ctx, v)
		}
		if err != nil {
			return fmt.Errorf("show conditions of policy %s: %w", v.Key(), err)
		}
		d.policies[v.Key()] = writtenPolicy{want, time.Now()}
	}
	return nil
}

func asBytes(list []json.RawMessage) (all [][]byte) {
	for _, raw := range list {
		all = append(all, raw)
	}
	return all
}

// showPolicy replaces the conditions if they are still those that we know: others write there,
// too, and the list has no keys that the server knows.
func (d *Display) showPolicy(ctx context.Context, v PolicyView) error {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	how, content := types.MergePatchType, any(map[string]any{"status": map[string]any{"conditions": v.Want}})
	if len(v.Is) > 0 {
		how, content = types.JSONPatchType, []map[string]any{
			{"op": "test", "path": "/status/conditions", "value": v.Is},
			{"op": "replace", "path": "/status/conditions", "value": v.Want},
		}
	}
	patch, err := json.Marshal(content)
	if err != nil {
		return err
	}
	versions := d.client.Policies
	if v.Kind == PeerKind {
		versions = d.client.Peers
	}
	_, err = firstFound(versions, func(r dynamic.NamespaceableResourceInterface) (*unstructured.Unstructured, error) {
		return r.Namespace(v.Namespace).Patch(ctx, v.Name, how, patch, metav1.PatchOptions{FieldManager: fieldManager}, "status")
	})
	if apierrors.IsNotFound(err) || apierrors.IsInvalid(err) || apierrors.IsConflict(err) {
		return nil // it is gone, or somebody else has written, of which we hear
	}
	return err
}
