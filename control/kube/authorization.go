package kube

import (
	"bytes"
	"encoding/json"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Bounds of what is read of policies. Beyond each of them the policy denies.
const (
	// maxPolicySpec bounds the spec of one, in bytes of JSON.
	maxPolicySpec = 64 << 10
	// maxPolicyRules bounds its rules, maxRuleValues the values of one rule.
	maxPolicyRules, maxRuleValues = 512, 4096
	// maxPolicies bounds the policies of one namespace, maxTargets the targetRefs of one policy.
	maxPolicies, maxTargets = 500, 16
	// maxPodLabels bounds the labels of a pod that selectors are compared with.
	maxPodLabels = 64
	// maxConditions bounds the conditions of others that a status may have, and
	// maxPolicyStatus all of them, in bytes: beyond, no status is written.
	maxConditions, maxPolicyStatus = 32, 16 << 10
)

// AnnotationDryRun says true on a policy that is told and decides nothing.
const AnnotationDryRun = "istio.io/dry-run"

// PolicyResources are where the kind AuthorizationPolicy is served, the version that is
// preferred first: deploy/helm/tacit/crd/authorizationpolicy.yaml, or Istio's own.
func PolicyResources() []schema.GroupVersionResource {
	at := schema.GroupResource{Group: "security.istio.io", Resource: "authorizationpolicies"}
	return []schema.GroupVersionResource{at.WithVersion("v1"), at.WithVersion("v1beta1")}
}

// AuthorizationPolicy is Istio's kind. Its spec stays as it came: what in it is not known must
// not be lost, for it may be what keeps somebody out.
type AuthorizationPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              json.RawMessage `json:"spec,omitempty"`
	Status            PolicyStatus    `json:"status,omitempty"`
}

// PolicyStatus has the conditions as they came: other writers have other fields in theirs.
type PolicyStatus struct {
	Conditions []json.RawMessage `json:"conditions,omitempty"`
}

// UnmarshalJSON leaves out what is no list of conditions: it is somebody else's, and no reason
// to lose the policy.
func (s *PolicyStatus) UnmarshalJSON(b []byte) error {
	var plain struct{ Conditions []json.RawMessage }
	if json.Unmarshal(b, &plain) == nil {
		s.Conditions = plain.Conditions
	}
	return nil
}

// policySpec is what a spec says: the fields of Istio's, and no others.
type policySpec struct {
	Selector *struct {
		MatchLabels map[string]string `json:"matchLabels"`
	} `json:"selector"`
	TargetRef  *targetRef        `json:"targetRef"`
	TargetRefs []targetRef       `json:"targetRefs"`
	Action     string            `json:"action"`
	Provider   json.RawMessage   `json:"provider"`
	Rules      []json.RawMessage `json:"rules"`
}

type targetRef struct {
	Group     string `json:"group"`
	Kind      string `json:"kind"`
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
}

type policyRule struct {
	From []struct {
		Source *policySource `json:"source"`
	} `json:"from"`
	To []struct {
		Operation *policyOperation `json:"operation"`
	} `json:"to"`
	When []policyCondition `json:"when"`
}

type policySource struct {
	Principals           []string `json:"principals"`
	NotPrincipals        []string `json:"notPrincipals"`
	RequestPrincipals    []string `json:"requestPrincipals"`
	NotRequestPrincipals []string `json:"notRequestPrincipals"`
	Namespaces           []string `json:"namespaces"`
	NotNamespaces        []string `json:"notNamespaces"`
	ServiceAccounts      []string `json:"serviceAccounts"`
	NotServiceAccounts   []string `json:"notServiceAccounts"`
	IPBlocks             []string `json:"ipBlocks"`
	NotIPBlocks          []string `json:"notIpBlocks"`
	RemoteIPBlocks       []string `json:"remoteIpBlocks"`
	NotRemoteIPBlocks    []string `json:"notRemoteIpBlocks"`
	TrustDomains         []string `json:"trustDomains"`
	NotTrustDomains      []string `json:"notTrustDomains"`
}

type policyOperation struct {
	Hosts      []string `json:"hosts"`
	NotHosts   []string `json:"notHosts"`
	Ports      []string `json:"ports"`
	NotPorts   []string `json:"notPorts"`
	Methods    []string `json:"methods"`
	NotMethods []string `json:"notMethods"`
	Paths      []string `json:"paths"`
	NotPaths   []string `json:"notPaths"`
}

type policyCondition struct {
	Key       string   `json:"key"`
	Values    []string `json:"values"`
	NotValues []string `json:"notValues"`
}

// decodeStrictly refuses fields that v does not have. An error is short, whatever is in b.
func decodeStrictly(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%.200s", err)
	}
	return nil
}

// tooLong stands in the stead of a spec that is too long.
const tooLong = `"too long"`

// keepPolicy leaves of a policy what is read of it.
func keepPolicy(p *AuthorizationPolicy) *AuthorizationPolicy {
	kept := &AuthorizationPolicy{ObjectMeta: keepMesh(p.ObjectMeta), Spec: p.Spec, Status: p.Status}
	if v, ok := p.Annotations[AnnotationDryRun]; ok {
		metav1.SetMetaDataAnnotation(&kept.ObjectMeta, AnnotationDryRun, head(v, maxLabel+1))
	}
	if len(p.Spec) > maxPolicySpec {
		kept.Spec = json.RawMessage(tooLong)
	}
	return kept
}
