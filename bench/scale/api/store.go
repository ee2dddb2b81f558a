// Package api is an API server that is small enough to hold a hundred thousand pods on a
// machine that measures something else: lists, watches, and the few writes of Tacit's
// control, over plain HTTP, in memory. Like the real one it refuses a ConfigMap of more than
// 1 MiB, and a write that is based on an old version. It knows no defaults, no
// validation and no rights, and refuses whatever control does not need.
package api

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// Object is any Kubernetes object.
type Object interface {
	metav1.Object
	runtime.Object
}

// history is how many events of a kind are kept for watches that begin again.
const history = 50_000

// maxConfigMap is what the API server takes as the data of a ConfigMap, in bytes.
const maxConfigMap = 1 << 20

// Store holds the objects. An object that was put is not changed any more. It is safe for
// concurrent use.
type Store struct {
	mu      sync.Mutex // guards what follows
	version uint64
	kinds   map[schema.GroupVersionResource]*kind
}

// kind is all objects of a kind; guarded by Store.mu.
type kind struct {
	resource schema.GroupVersionResource
	name     string // Pod
	objects  map[string]Object
	events   []event // oldest first
	since    uint64  // events are complete after this version
	read     bool    // somebody has read it
	watches  map[*watch]bool
}

// event is as a watch sends it.
type event struct {
	version uint64
	encoded []byte
}

// NewStore returns one that is empty.
func NewStore() *Store {
	s := &Store{kinds: make(map[schema.GroupVersionResource]*kind)}
	for r, name := range served {
		s.kinds[r] = &kind{resource: r, name: name, objects: make(map[string]Object), watches: make(map[*watch]bool)}
	}
	return s
}

func key(namespace, name string) string { return namespace + "/" + name }

// Put creates an object or replaces it, whatever its version, and owns it from now on.
func (s *Store) Put(r schema.GroupVersionResource, o Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(s.kinds[r], o)
}

func (s *Store) put(k *kind, o Object) {
	what := "MODIFIED"
	name := key(o.GetNamespace(), o.GetName())
	if k.objects[name] == nil {
		what = "ADDED"
	}
	if o.GetUID() == "" {
		o.SetUID(types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012x", s.version)))
	}
	o.GetObjectKind().SetGroupVersionKind(k.resource.GroupVersion().WithKind(k.name))
	k.objects[name] = o
	s.tell(k, what, o)
}

// Delete removes an object, if it is there.
func (s *Store) Delete(r schema.GroupVersionResource, namespace, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.kinds[r]
	if o := k.objects[key(namespace, name)]; o != nil {
		delete(k.objects, key(namespace, name))
		s.tell(k, "DELETED", o.DeepCopyObject().(Object))
	}
}

// Update changes a copy of an object and puts it; it reports whether the object is there.
func Update[T Object](s *Store, r schema.GroupVersionResource, namespace, name string, change func(T)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.kinds[r]
	o, ok := k.objects[key(namespace, name)].(T)
	if ok {
		o = o.DeepCopyObject().(T)
		change(o)
		s.put(k, o)
	}
	return ok
}

// Get returns an object, nil if there is none of that kind and name.
func (s *Store) Get(r schema.GroupVersionResource, namespace, name string) Object {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kinds[r].objects[key(namespace, name)]
}

// write is what a client writes: it names the version that it has seen, or none if the
// object must not be there.
func (s *Store) write(r schema.GroupVersionResource, o Object, create bool) error {
	if m, ok := o.(*corev1.ConfigMap); ok && configMapSize(m) > maxConfigMap {
		return apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("ConfigMap %s: more than %d bytes", m.Name, maxConfigMap))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.kinds[r]
	had := k.objects[key(o.GetNamespace(), o.GetName())]
	switch {
	case create && had != nil:
		return apierrors.NewAlreadyExists(r.GroupResource(), o.GetName())
	case !create && had == nil:
		return apierrors.NewNotFound(r.GroupResource(), o.GetName())
	case !create && o.GetResourceVersion() != "" && o.GetResourceVersion() != had.GetResourceVersion():
		return apierrors.NewConflict(r.GroupResource(), o.GetName(), fmt.Errorf("it was changed meanwhile"))
	}
	s.put(k, o)
	return nil
}

func configMapSize(m *corev1.ConfigMap) (n int) {
	for name, v := range m.Data {
		n += len(name) + len(v)
	}
	for name, v := range m.BinaryData {
		n += len(name) + len(v)
	}
	return n
}

// tell gives o a version and the event to all watches. Called with mu.
func (s *Store) tell(k *kind, what string, o Object) {
	s.version++
	o.SetResourceVersion(strconv.FormatUint(s.version, 10))
	if !k.read {
		k.since = s.version // nobody can have seen an earlier one
		return
	}
	e := event{s.version, encode(k.resource, what, o)}
	k.events = append(k.events, e)
	if len(k.events) > history {
		k.since = k.events[history/4].version
		k.events = append([]event(nil), k.events[history/4+1:]...)
	}
	for w := range k.watches {
		w.add(e.encoded)
	}
}

// List returns copies of the objects of a kind, by namespace and name.
func (s *Store) List(r schema.GroupVersionResource) []Object {
	list, _ := s.all(r)
	slices.SortFunc(list, func(x, y Object) int {
		return strings.Compare(key(x.GetNamespace(), x.GetName()), key(y.GetNamespace(), y.GetName()))
	})
	for i, o := range list {
		list[i] = o.DeepCopyObject().(Object)
	}
	return list
}

// all returns the objects of a kind, and the version as of which they are so.
func (s *Store) all(r schema.GroupVersionResource) (list []Object, version uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kinds[r].list(), s.version
}

func (k *kind) list() []Object {
	k.read = true
	list := make([]Object, 0, len(k.objects))
	for _, o := range k.objects {
		list = append(list, o)
	}
	return list
}

// watch is a client that is told every event; what it has not taken yet waits here.
type watch struct {
	poke chan struct{} // one slot

	mu     sync.Mutex // guards events
	events [][]byte
}

func newWatch() *watch { return &watch{poke: make(chan struct{}, 1)} }

func (w *watch) add(event []byte) {
	w.mu.Lock()
	w.events = append(w.events, event)
	w.mu.Unlock()
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

func (w *watch) take() [][]byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	events := w.events
	w.events = nil
	return events
}

// begin registers w for what comes after a version, or for everything if initial. It returns
// what is there then; ok is false if that version is too old.
func (s *Store) begin(r schema.GroupVersionResource, w *watch, after uint64, initial bool) (now []Object, version uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.kinds[r]
	k.read = true
	if initial {
		now = k.list()
	} else if after < k.since {
		return nil, 0, false
	}
	if !initial {
		for _, e := range k.events {
			if e.version > after {
				w.add(e.encoded)
			}
		}
	}
	k.watches[w] = true
	return now, s.version, true
}

func (s *Store) end(r schema.GroupVersionResource, w *watch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.kinds[r].watches, w)
}
