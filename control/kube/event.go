package kube

import (
	"reflect"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Key names an object. Namespace is "" for kinds that are in none.
type Key struct{ Kind, Namespace, Name string }

// Event is an object as it is now, or that it is gone: then Object is nil.
type Event struct {
	Key
	Object metav1.Object
}

// keyOf names an object of a kind that Build reads; ok is false for others.
func keyOf(o metav1.Object) (k Key, ok bool) {
	switch o.(type) {
	case *corev1.Namespace:
		k.Kind = "Namespace"
	case *PodObject:
		k.Kind = "Pod"
	case *corev1.Service:
		k.Kind = "Service"
	case *discoveryv1.EndpointSlice:
		k.Kind = "EndpointSlice"
	case *corev1.Node:
		k.Kind = "Node"
	case *networkingv1.ServiceCIDR:
		k.Kind = "ServiceCIDR"
	case *Mesh:
		k.Kind = "Mesh"
	case *AuthorizationPolicy:
		k.Kind = "AuthorizationPolicy"
	case *PeerAuthentication:
		k.Kind = PeerKind
	default:
		return k, false
	}
	k.Namespace, k.Name = o.GetNamespace(), o.GetName()
	return k, true
}

// same tells whether Build reads the same of both.
func same(x, y metav1.Object) bool {
	p, isPod := x.(*PodObject)
	q, arePods := y.(*PodObject)
	if isPod && arePods {
		return samePod(p, q)
	}
	return x == y || equality.Semantic.DeepEqual(unversioned(x), unversioned(y))
}

// samePod copies no whole pods: each condition that is written comes back as a change of one.
func samePod(x, y *PodObject) bool {
	if x == y {
		return true
	}
	a, b := x.ObjectMeta, y.ObjectMeta
	a.ResourceVersion, b.ResourceVersion = "", ""
	equal := equality.Semantic.DeepEqual
	return equal(&x.Status, &y.Status) && equal(&a, &b) && equal(&x.Spec, &y.Spec)
}

// unversioned is a flat copy without the version, which differs after each write.
func unversioned(o metav1.Object) any {
	c := reflect.New(reflect.TypeOf(o).Elem())
	c.Elem().Set(reflect.ValueOf(o).Elem())
	c.Interface().(metav1.Object).SetResourceVersion("")
	return c.Interface()
}

// Set are objects by key. The zero Set can be read only.
type Set map[Key]metav1.Object

// Apply takes events in.
func (s Set) Apply(events []Event) {
	for _, e := range events {
		if e.Object == nil {
			delete(s, e.Key)
		} else {
			s[e.Key] = e.Object
		}
	}
}

// Events are what makes an empty set this one, in no order.
func (s Set) Events() []Event { return Set(nil).To(s) }

// To are the events that make s another set, in no order. What Build reads the same of
// in both is not among them.
func (s Set) To(next Set) []Event {
	events := make([]Event, 0, max(0, len(next)-len(s)))
	for k, o := range next {
		if had := s[k]; had == nil || !same(had, o) {
			events = append(events, Event{k, o})
		}
	}
	for k := range s {
		if next[k] == nil {
			events = append(events, Event{Key: k})
		}
	}
	return events
}

// Objects are those of the set, by kind, in no order.
func (s Set) Objects() (o Objects) {
	for _, v := range s {
		switch v := v.(type) {
		case *corev1.Namespace:
			o.Namespaces = append(o.Namespaces, v)
		case *PodObject:
			o.Pods = append(o.Pods, v)
		case *corev1.Service:
			o.Services = append(o.Services, v)
		case *discoveryv1.EndpointSlice:
			o.EndpointSlices = append(o.EndpointSlices, v)
		case *corev1.Node:
			o.Nodes = append(o.Nodes, v)
		case *networkingv1.ServiceCIDR:
			o.ServiceCIDRs = append(o.ServiceCIDRs, v)
		case *Mesh:
			o.Meshes = append(o.Meshes, v)
		case *AuthorizationPolicy:
			o.Policies = append(o.Policies, v)
		case *PeerAuthentication:
			o.Peers = append(o.Peers, v)
		}
	}
	return o
}

// Set are the same objects by key.
func (o Objects) Set() Set {
	s := make(Set, len(o.Pods))
	put(s, o.Namespaces)
	put(s, o.Pods)
	put(s, o.Services)
	put(s, o.EndpointSlices)
	put(s, o.Nodes)
	put(s, o.ServiceCIDRs)
	put(s, o.Meshes)
	put(s, o.Policies)
	put(s, o.Peers)
	return s
}

func put[T metav1.Object](s Set, list []T) {
	for _, o := range list {
		if k, ok := keyOf(o); ok {
			s[k] = o
		}
	}
}

// kept are the objects with what Build reads.
func (o Objects) kept() Objects {
	keep(o.Namespaces)
	keep(o.Pods)
	keep(o.Services)
	keep(o.EndpointSlices)
	keep(o.Nodes)
	keep(o.ServiceCIDRs)
	keep(o.Meshes)
	keep(o.Policies)
	keep(o.Peers)
	return o
}

func keep[T any](list []T) {
	for i, o := range list {
		if kept, err := keepRead(o); err == nil {
			list[i] = kept.(T)
		}
	}
}

// Pending are events that their reader has not taken yet: of each object the last, and
// nothing of one that came and went meanwhile. So there are never more than objects, now
// and when the reader looked last. The zero Pending is ready to use; whoever has one sees
// that it is used by one goroutine at a time.
type Pending struct{ events map[Key]pendingEvent }

type pendingEvent struct {
	object metav1.Object
	known  bool // the reader has taken the object before
}

// Put adds an event. known tells whether there was an event of the object before, and the
// object was not gone.
func (p *Pending) Put(e Event, known bool) {
	if had, is := p.events[e.Key]; is {
		known = had.known
	}
	if e.Object == nil && !known {
		delete(p.events, e.Key)
		return
	}
	if p.events == nil {
		p.events = make(map[Key]pendingEvent)
	}
	p.events[e.Key] = pendingEvent{e.Object, known}
}

// Take returns all, in no order, and forgets them.
func (p *Pending) Take() []Event {
	events := make([]Event, 0, len(p.events))
	for k, e := range p.events {
		events = append(events, Event{k, e.object})
	}
	p.events = nil
	return events
}
