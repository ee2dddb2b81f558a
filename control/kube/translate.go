package kube

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"tacit.dev/mesh"
)

// Effect is what follows from a fault of a policy.
type Effect string

const (
	// Denies: what it is about cannot be enforced as it was meant, and so lets nobody in.
	Denies Effect = "denies"
	// Ignored: nothing of it is enforced.
	Ignored Effect = "ignored"
	// Never: it is enforced, and never matches anything.
	Never Effect = "never matches"
)

// Reasons of faults, and of the condition PolicyAccepted.
const (
	// Accepted: all of it is understood.
	Accepted = "Accepted"
	// Invalid: a value or a field is not known.
	Invalid = "Invalid"
	// NeedsHTTP: nobody looks into HTTP at the destination.
	NeedsHTTP = "NeedsHTTP"
	// Unsupported: an action or a target that there is not.
	Unsupported = "Unsupported"
	// TooMuch: more than is read.
	TooMuch = "TooMuch"
)

// Fault is something of a policy that is not enforced as it stands there.
type Fault struct {
	// Path is where, as spec.rules[0].from[1].source.principals[0].
	Path   string
	Reason string // "" if the effect is Never
	Effect Effect
	Text   string
	// Remedy is what to do about it.
	Remedy string
}

func (f Fault) String() string { return f.Path + ": " + f.Text }

// maxPolicyFaults bounds the faults of one policy that are told.
const maxPolicyFaults = 50

// translation is what an AuthorizationPolicy comes to.
type translation struct {
	// policy is nil if there is nothing to enforce.
	policy *mesh.Policy
	// labels and services say to which pods a policy with mesh.Named applies: those with all
	// the labels, if there are any, and those that serve one of the services, by NAMESPACE/NAME.
	labels   map[string]string
	services []string
	faults   []Fault
}

// sameTargets tells whether both apply to the same pods.
func (x *translation) sameTargets(y *translation) bool {
	return x.isNamed() == y.isNamed() && maps.Equal(x.labels, y.labels) && slices.Equal(x.services, y.services)
}

// isNamed tells whether workloads have to name the policy.
func (x *translation) isNamed() bool { return x.policy != nil && x.policy.Scope == mesh.Named }

// translator makes a translation of one policy.
type translator struct {
	object      *AuthorizationPolicy
	trustDomain string
	refused     bool
	// why the rule that is being read cannot be enforced, "" if it can.
	why string
	translation
}

// translate reads a policy. It is pure; what it costs is bounded by the length of the spec.
func (r *reader) translate(p *AuthorizationPolicy) translation {
	t := translator{object: p, trustDomain: r.cfg.TrustDomain}
	t.policy = &mesh.Policy{Namespace: p.Namespace, Name: p.Name, Scope: mesh.WholeNamespace, Action: mesh.Allow, DryRun: t.dryRun()}
	if p.Namespace == r.cfg.RootNamespace {
		t.policy.Scope = mesh.WholeMesh
	}
	var spec policySpec
	if string(p.Spec) == tooLong || len(p.Spec) > maxPolicySpec {
		t.refuse("spec", TooMuch, fmt.Sprintf("more than %d bytes", maxPolicySpec), "split it into several policies")
	} else if err := decodeStrictly(orEmpty(p.Spec), &spec); err != nil {
		t.refuse("spec", Invalid, err.Error(), "correct or remove it: kubectl explain authorizationpolicy.spec")
	} else {
		t.spec(&spec)
	}
	if t.policy != nil {
		if err := t.policy.Check(); err != nil {
			t.refuse("spec", TooMuch, err.Error(), "split it into several policies")
		}
	}
	return t.translation
}

// CheckPolicy tells what of a policy is not enforced as it stands there.
func CheckPolicy(p *AuthorizationPolicy, cfg BuildConfig) []Fault {
	r := reader{cfg: cfg.withDefaults()}
	return r.translate(p).faults
}

// orEmpty: no spec is an empty one.
func orEmpty(spec json.RawMessage) json.RawMessage {
	if len(spec) == 0 {
		return json.RawMessage("{}")
	}
	return spec
}

// dryRun: whatever is not clearly true is enforced.
func (t *translator) dryRun() bool {
	text, is := t.object.Annotations[AnnotationDryRun]
	on, err := strconv.ParseBool(text)
	if is && err != nil {
		t.note(Fault{"metadata.annotations[" + AnnotationDryRun + "]", Invalid, Denies, fmt.Sprintf("%.80q is neither true nor false, so the policy is enforced", text), `use "true", or remove it`})
	}
	return on
}

// note leaves room for what denies.
func (t *translator) note(f Fault) {
	if len(t.faults) < maxPolicyFaults/2 || f.Effect != Never && len(t.faults) < maxPolicyFaults {
		t.faults = append(t.faults, f)
	}
}

// refuse has the policy deny everybody to whom it applies.
func (t *translator) refuse(path, reason, text, remedy string) {
	t.note(Fault{path, reason, Denies, text, remedy})
	t.policy, t.refused = t.policy.Refused(short(path+": "+text)), true
}

// short bounds a reason that nodes are told.
func short(s string) string { return strings.ToValidUTF8(head(s, 200), "") }

func (t *translator) spec(s *policySpec) {
	t.targets(s)
	if t.policy != nil {
		t.action(s)
	}
	if t.policy == nil || t.refused {
		return
	}
	if len(s.Rules) > maxPolicyRules {
		t.refuse("spec.rules", TooMuch, fmt.Sprintf("%d rules: want at most %d", len(s.Rules), maxPolicyRules), "split it into several policies")
		return
	}
	for i, raw := range s.Rules {
		r := t.rule(fmt.Sprintf("spec.rules[%d]", i), raw)
		if s.Action == "CUSTOM" && r.Unenforceable == "" {
			r.Unenforceable = "action CUSTOM"
		}
		t.policy.Rules = append(t.policy.Rules, r)
	}
	if len(s.Rules) == 0 && t.policy.Action == mesh.Deny {
		t.note(Fault{"spec", "", Never, "the policy has no rules, so it denies nothing", "add a rule; an empty one, {}, matches everything"})
	}
}

func (t *translator) action(s *policySpec) {
	switch s.Action {
	case "", "ALLOW":
	case "DENY":
		t.policy.Action = mesh.Deny
	case "CUSTOM":
		t.note(Fault{"spec.action", Unsupported, Denies, "CUSTOM is not supported, so everything that the rules match is denied", "use ALLOW or DENY"})
		t.policy.Action = mesh.Deny
	case "AUDIT":
		t.note(Fault{"spec.action", Unsupported, Ignored, "AUDIT is not supported: the access log has every connection", "remove the policy, or use the annotation " + AnnotationDryRun})
		t.policy = nil
	default:
		t.refuse("spec.action", Invalid, fmt.Sprintf("%.80q is not an action", s.Action), "use ALLOW or DENY")
	}
}

// targets finds out to whom the policy applies. Where it cannot be known who was meant, it is
// refused for all who may be.
func (t *translator) targets(s *policySpec) {
	refs, path := s.TargetRefs, "spec.targetRefs"
	if s.TargetRef != nil {
		refs, path = append([]targetRef{*s.TargetRef}, refs...), "spec.targetRef"
	}
	named := t.selector(s)
	for i, ref := range refs[:min(len(refs), maxTargets)] {
		if len(s.TargetRefs) > 0 {
			path = fmt.Sprintf("spec.targetRefs[%d]", i)
		}
		t.target(path, ref)
	}
	if named && len(t.labels) == 0 {
		t.labels, t.services = nil, nil // everybody is meant
	} else if len(t.labels)+len(t.services) > 0 || len(refs) > 0 {
		t.policy.Scope = mesh.Named
	}
	switch {
	case len(refs) > maxTargets:
		t.refuse("spec.targetRefs", TooMuch, fmt.Sprintf("%d targets: want at most %d", len(refs), maxTargets), "split it into several policies")
	case len(refs) > 0 && s.Selector != nil:
		t.refuse("spec.selector", Invalid, "selector and targetRefs cannot be set together", "remove one of them")
	case len(refs) > 0 && len(t.services) == 0:
		t.policy = nil // nobody of ours was meant
	}
}

// selector reads it, and tells whether there is one. One without labels is every pod.
func (t *translator) selector(s *policySpec) bool {
	if s.Selector == nil {
		return false
	}
	labels := s.Selector.MatchLabels
	if len(labels) > maxPodLabels {
		t.refuse("spec.selector.matchLabels", TooMuch, fmt.Sprintf("%d labels: want at most %d", len(labels), maxPodLabels), "use fewer labels")
		return true
	}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if k == "" || strings.Contains(k+labels[k], "*") {
			t.refuse("spec.selector.matchLabels", Invalid, fmt.Sprintf("%.80q: %.80q is not a label, so every pod of the namespace is denied", k, labels[k]), "use complete labels; wildcards are not supported here")
			return true
		}
	}
	t.labels = labels
	return true
}

func (t *translator) target(path string, ref targetRef) {
	switch {
	case ref.Kind != "Service" || ref.Group != "" && ref.Group != "core":
		t.note(Fault{path, Unsupported, Ignored, fmt.Sprintf("%.80s %.80s: the mesh has no waypoints and no gateways", ref.Kind, ref.Name), "use a selector, or a target of kind Service"})
	case ref.Namespace != "" && ref.Namespace != t.policy.Namespace:
		t.note(Fault{path, Invalid, Ignored, fmt.Sprintf("Service %.80s is in another namespace, %.80s", ref.Name, ref.Namespace), "move the policy to the namespace of the Service"})
	case !isSegment(ref.Name):
		t.note(Fault{path, Invalid, Ignored, fmt.Sprintf("%.80q is not the name of a Service", ref.Name), "use the name of a Service in this namespace"})
	default:
		t.services = append(t.services, t.policy.Namespace+"/"+ref.Name)
	}
}
