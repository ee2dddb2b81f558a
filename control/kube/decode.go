package kube

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// maxListDepth bounds lists inside of lists.
const maxListDepth = 4

// Decode reads a file of YAML documents, or of JSON. Objects of kinds that say
// nothing about the mesh are passed over, ServiceAccounts among them: an
// identity is made of their name alone, which pods have. The file is taken as a
// whole or not at all; one without any object is an error, too: it is more likely
// half written than meant.
func Decode(file []byte) (Objects, error) {
	var o Objects
	docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(file)))
	for n, seen := 1, 0; ; n++ {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			if seen == 0 {
				return Objects{}, errors.New("it holds no object")
			}
			return o, nil
		}
		if err != nil {
			return Objects{}, fmt.Errorf("document %d: %w", n, err)
		}
		found, err := o.document(doc)
		if err != nil {
			return Objects{}, fmt.Errorf("document %d: %w", n, err)
		}
		seen += found
	}
}

func (o *Objects) document(doc []byte) (found int, err error) {
	raw, err := yaml.YAMLToJSON(doc)
	if err != nil {
		return 0, err
	}
	if string(raw) == "null" { // comments only
		return 0, nil
	}
	return o.object(raw, 0)
}

func (o *Objects) object(raw []byte, depth int) (found int, err error) {
	var head struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        struct{ Name, Namespace, UID string }
		Items           []json.RawMessage
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return 0, fmt.Errorf("%w%s", err, hint(err))
	}
	if strings.HasSuffix(head.Kind, "List") && head.Items != nil {
		return o.list(head.Items, depth+1)
	}
	if head.Kind == "" || head.APIVersion == "" || head.Metadata.Name == "" {
		return 0, fmt.Errorf("want apiVersion, kind and metadata.name, got %q, %q, %q", head.APIVersion, head.Kind, head.Metadata.Name)
	}
	if m := head.Metadata; max(len(m.Name), len(m.Namespace), len(m.UID)) > maxName {
		return 0, fmt.Errorf("%.60s %.60q: name, namespace and uid have at most %d bytes each", head.Kind, m.Name, maxName)
	}
	switch head.APIVersion + " " + head.Kind {
	case "v1 Namespace":
		o.Namespaces, err = add(o.Namespaces, raw)
	case "v1 Pod":
		var pods []*corev1.Pod
		if pods, err = add(pods, raw); err == nil {
			o.Pods = append(o.Pods, KeepPod(pods[0]))
		}
	case "v1 Service":
		o.Services, err = add(o.Services, raw)
	case "discovery.k8s.io/v1 EndpointSlice":
		o.EndpointSlices, err = add(o.EndpointSlices, raw)
	case "v1 Node":
		o.Nodes, err = add(o.Nodes, raw)
	case "networking.k8s.io/v1 ServiceCIDR":
		o.ServiceCIDRs, err = add(o.ServiceCIDRs, raw)
	case "tacit.dev/v1alpha1 Mesh":
		o.Meshes, err = add(o.Meshes, raw)
	case "security.istio.io/v1 AuthorizationPolicy", "security.istio.io/v1beta1 AuthorizationPolicy":
		if o.Policies, err = add(o.Policies, raw); err == nil {
			err = checkSegments(head.Metadata.Name, head.Metadata.Namespace)
		}
	case "security.istio.io/v1 PeerAuthentication", "security.istio.io/v1beta1 PeerAuthentication":
		if o.Peers, err = add(o.Peers, raw); err == nil {
			err = checkSegments(head.Metadata.Name, head.Metadata.Namespace)
		}
	}
	if err != nil {
		return 0, fmt.Errorf("%s %s: %w%s", head.Kind, head.Metadata.Name, err, hint(err))
	}
	return 1, nil
}

// checkSegments: names of others are made of these.
func checkSegments(name, namespace string) error {
	if isSegment(name) && isSegment(cmp.Or(namespace, "default")) {
		return nil
	}
	return errors.New("want a name and a namespace of a-z 0-9 . -")
}

func (o *Objects) list(items []json.RawMessage, depth int) (found int, err error) {
	if depth > maxListDepth {
		return 0, fmt.Errorf("lists inside of lists, more than %d deep", maxListDepth)
	}
	for i, raw := range items {
		n, err := o.object(raw, depth)
		if err != nil {
			return 0, fmt.Errorf("item %d: %w", i, err)
		}
		found += n
	}
	// An empty list is meant as it is: kubectl writes it.
	return max(found, 1), nil
}

// hint helps with YAML 1.1, where an unquoted on is a boolean.
func hint(err error) string {
	if strings.Contains(err.Error(), "cannot unmarshal bool") {
		return ` (quote it: "on", "off"; or say enabled, disabled)`
	}
	return ""
}

func add[T any](list []*T, raw []byte) ([]*T, error) {
	v := new(T)
	if err := json.Unmarshal(raw, v); err != nil {
		return list, err
	}
	if m, ok := any(v).(metav1.Object); ok && m.GetNamespace() == "" && !clusterScoped(v) {
		m.SetNamespace("default")
	}
	return append(list, v), nil
}

func clusterScoped(v any) bool {
	switch v.(type) {
	case *corev1.Namespace, *corev1.Node, *networkingv1.ServiceCIDR, *Mesh:
		return true
	}
	return false
}

// append takes in the objects of another file, except those that are there
// already, which it names.
func (o *Objects) append(more Objects, seen map[string]bool) (twice []string) {
	o.Namespaces = merge(o.Namespaces, more.Namespaces, "Namespace", seen, &twice)
	o.Pods = merge(o.Pods, more.Pods, "Pod", seen, &twice)
	o.Services = merge(o.Services, more.Services, "Service", seen, &twice)
	o.EndpointSlices = merge(o.EndpointSlices, more.EndpointSlices, "EndpointSlice", seen, &twice)
	o.Nodes = merge(o.Nodes, more.Nodes, "Node", seen, &twice)
	o.ServiceCIDRs = merge(o.ServiceCIDRs, more.ServiceCIDRs, "ServiceCIDR", seen, &twice)
	o.Meshes = merge(o.Meshes, more.Meshes, "Mesh", seen, &twice)
	o.Policies = merge(o.Policies, more.Policies, "AuthorizationPolicy", seen, &twice)
	o.Peers = merge(o.Peers, more.Peers, PeerKind, seen, &twice)
	return twice
}

func merge[T metav1.Object](to, from []T, kind string, seen map[string]bool, twice *[]string) []T {
	for _, v := range from {
		key := kind + " " + v.GetNamespace() + "/" + v.GetName()
		if seen[key] {
			*twice = append(*twice, key)
			continue
		}
		seen[key] = true
		to = append(to, v)
	}
	return to
}

var _ = []metav1.Object{&corev1.Namespace{}, &PodObject{}, &corev1.Service{}, &discoveryv1.EndpointSlice{}, &corev1.Node{}, &networkingv1.ServiceCIDR{}, &Mesh{}, &AuthorizationPolicy{}, &PeerAuthentication{}}
