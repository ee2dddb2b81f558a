package kube

import (
	"reflect"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxAlike bounds how many templates and strings are remembered: twice as many at most.
const maxAlike = 32 << 10

// alike lets pods share what is the same in all that were made of one template. Of a kept pod
// that is half of its memory, and a cluster has many. It is safe for concurrent use.
type alike struct {
	mu        sync.Mutex // guards what follows
	templates lately[maker, *template]
	strings   lately[string, string]
}

// maker is whose pods are alike.
type maker struct{ namespace, kind, name string }

// template is what they have in common.
type template struct {
	namespace, account         string
	labels, annotations        map[string]string
	owners                     []metav1.OwnerReference
	initContainers, containers []corev1.Container
}

// share puts what others have, too, in place of what is the same in p, which nobody else has
// yet.
func (a *alike) share(p *PodObject) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p.Spec.NodeName = a.one(p.Spec.NodeName)
	for i := range p.Status.Conditions {
		c := &p.Status.Conditions[i]
		c.Type, c.Status = corev1.PodConditionType(a.one(string(c.Type))), corev1.ConditionStatus(a.one(string(c.Status)))
		c.Reason, c.Message = a.one(c.Reason), a.one(c.Message)
	}
	if len(p.OwnerReferences) == 0 {
		return
	}
	owner := p.OwnerReferences[0]
	t := a.templates.get(maker{p.Namespace, owner.Kind, owner.Name})
	if t == nil {
		t = &template{namespace: p.Namespace}
		a.templates.put(maker{p.Namespace, owner.Kind, owner.Name}, t)
	}
	p.Namespace = t.namespace
	unify(&p.Spec.ServiceAccountName, &t.account)
	unify(&p.Labels, &t.labels)
	unify(&p.Annotations, &t.annotations)
	unify(&p.OwnerReferences, &t.owners)
	unify(&p.Spec.InitContainers, &t.initContainers)
	unify(&p.Spec.Containers, &t.containers)
}

// unify puts in place of own what is the same, else remembers own for those that follow.
func unify[T any](own, known *T) {
	if reflect.DeepEqual(*own, *known) {
		*own = *known
	} else {
		*known = *own
	}
}

// one returns the same string for the same string.
func (a *alike) one(s string) string {
	if s == "" {
		return ""
	}
	if had := a.strings.get(s); had != "" {
		return had
	}
	a.strings.put(s, s)
	return s
}

// lately is a table that forgets what was not asked for during the last maxAlike that were new.
type lately[K comparable, V comparable] struct{ recent, earlier map[K]V }

func (l *lately[K, V]) get(k K) (v V) {
	v, ok := l.recent[k]
	if ok {
		return v
	}
	if v, ok = l.earlier[k]; ok {
		l.put(k, v)
	}
	return v
}

func (l *lately[K, V]) put(k K, v V) {
	if l.recent == nil || len(l.recent) >= maxAlike {
		l.recent, l.earlier = make(map[K]V), l.recent
	}
	l.recent[k] = v
}
