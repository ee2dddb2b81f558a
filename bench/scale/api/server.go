package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
)

// The kinds that are served, by resource.
var (
	Pods       = corev1.SchemeGroupVersion.WithResource("pods")
	Namespaces = corev1.SchemeGroupVersion.WithResource("namespaces")
	Services   = corev1.SchemeGroupVersion.WithResource("services")
	Nodes      = corev1.SchemeGroupVersion.WithResource("nodes")
	Slices     = discoveryv1.SchemeGroupVersion.WithResource("endpointslices")
	ConfigMaps = corev1.SchemeGroupVersion.WithResource("configmaps")
	Leases     = coordinationv1.SchemeGroupVersion.WithResource("leases")
	Meshes     = schema.GroupVersionResource{Group: "tacit.dev", Version: "v1alpha1", Resource: "meshes"}
	secrets    = corev1.SchemeGroupVersion.WithResource("secrets")
	events     = corev1.SchemeGroupVersion.WithResource("events")
	ranges     = schema.GroupVersionResource{Group: "networking.k8s.io", Version: "v1", Resource: "servicecidrs"}
	reviews    = authv1.SchemeGroupVersion.WithResource("tokenreviews")
)

var served = map[schema.GroupVersionResource]string{
	Pods: "Pod", Namespaces: "Namespace", Services: "Service", Nodes: "Node", Slices: "EndpointSlice",
	ConfigMaps: "ConfigMap", Leases: "Lease", Meshes: "Mesh", secrets: "Secret", ranges: "ServiceCIDR",
}

// maxBody bounds a request, in bytes.
const maxBody = 3 << 20

// Config is what NewServer needs.
type Config struct {
	Store *Store
	// Review tells whose a token is: the audience, the user and the node. Required.
	Review func(token string) (audience, user, node string, ok bool)
	// Shown is called with each condition that control writes to a pod.
	Shown func(namespace, name string, c corev1.PodCondition)
}

// Server serves a Store.
type Server struct{ cfg Config }

// NewServer starts nothing.
func NewServer(cfg Config) *Server { return &Server{cfg} }

// Run serves until ctx ends, and closes l.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	h := &http.Server{Handler: s, BaseContext: func(net.Listener) context.Context { return ctx }, ReadHeaderTimeout: 10 * time.Second}
	var closing sync.WaitGroup
	defer closing.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	closing.Go(func() { <-ctx.Done(); h.Close() })
	if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the API at %s: %w", l.Addr(), err)
	}
	return nil
}

// target is what a path names.
type target struct {
	resource                     schema.GroupVersionResource
	namespace, name, subresource string
}

// parse reads /api/v1/… and /apis/GROUP/VERSION/….
func parse(path string) (t target, ok bool) {
	words := strings.Split(strings.Trim(path, "/"), "/")
	switch {
	case len(words) >= 3 && words[0] == "api":
		t.resource.Version, words = words[1], words[2:]
	case len(words) >= 4 && words[0] == "apis":
		t.resource.Group, t.resource.Version, words = words[1], words[2], words[3:]
	default:
		return t, false
	}
	if words[0] == "namespaces" && len(words) > 2 {
		t.namespace, words = words[1], words[2:]
	}
	t.resource.Resource = words[0]
	if len(words) > 1 {
		t.name = words[1]
	}
	if len(words) > 2 {
		t.subresource = words[2]
	}
	return t, len(words) <= 3
}

// BulkPath takes the conditions of many pods in one request, which no real API server does:
// at the rate that control keeps to, those of a whole cluster would take hours.
const BulkPath = "/bench/conditions"

// Conditions are those of a pod that are control's.
type Conditions struct {
	Namespace, Name string
	Conditions      []corev1.PodCondition
}

func (s *Server) bulk(w http.ResponseWriter, r *http.Request) {
	var all []Conditions
	if err := json.NewDecoder(r.Body).Decode(&all); err != nil {
		refuse(w, err)
		return
	}
	for _, c := range all {
		s.ShowPod(c.Namespace, c.Name, c.Conditions)
	}
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == BulkPath {
		s.bulk(w, r)
		return
	}
	t, ok := parse(r.URL.Path)
	known := served[t.resource] != "" || t.resource == reviews || t.resource == events
	var err error
	switch {
	case !ok || !known:
		err = apierrors.NewNotFound(t.resource.GroupResource(), t.name)
	case r.Method == http.MethodGet && t.name != "":
		err = s.get(w, t)
	case r.Method == http.MethodGet && r.URL.Query().Get("watch") != "":
		err = s.watch(w, r, t)
	case r.Method == http.MethodGet:
		err = s.list(w, t)
	case r.Method == http.MethodPost && t.resource == reviews:
		err = s.review(w, r)
	case r.Method == http.MethodPost && t.resource == events:
		answer(w, &corev1.Event{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Event"}})
	case r.Method == http.MethodPost, r.Method == http.MethodPut:
		err = s.put(w, r, t)
	case r.Method == http.MethodPatch:
		err = s.patch(w, r, t)
	default:
		err = apierrors.NewMethodNotSupported(t.resource.GroupResource(), r.Method)
	}
	if err != nil {
		refuse(w, err)
	}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a client that has gone needs no answer
}

func refuse(w http.ResponseWriter, err error) {
	var known apierrors.APIStatus
	if !errors.As(err, &known) {
		known = apierrors.NewBadRequest(err.Error())
	}
	status := known.Status()
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(w).Encode(status)
}

func (s *Server) get(w http.ResponseWriter, t target) error {
	o := s.cfg.Store.Get(t.resource, t.namespace, t.name)
	if o == nil {
		return apierrors.NewNotFound(t.resource.GroupResource(), t.name)
	}
	answer(w, o)
	return nil
}

func (s *Server) list(w http.ResponseWriter, t target) error {
	all, version := s.cfg.Store.all(t.resource)
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"apiVersion":%q,"kind":"%sList","metadata":{"resourceVersion":"%d"},"items":[`, t.resource.GroupVersion(), served[t.resource], version)
	comma := ""
	for _, o := range all {
		if t.namespace != "" && o.GetNamespace() != t.namespace {
			continue
		}
		b, err := json.Marshal(o)
		if err != nil {
			return err
		}
		fmt.Fprint(w, comma)
		if _, err := w.Write(b); err != nil {
			return nil // the client has gone
		}
		comma = ","
	}
	fmt.Fprint(w, "]}")
	return nil
}

// watch sends what is there, if it is asked for that, and then every event.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, t target) error {
	q := r.URL.Query()
	initial := q.Get("sendInitialEvents") == "true"
	after, _ := strconv.ParseUint(q.Get("resourceVersion"), 10, 64)
	mine := newWatch()
	now, version, ok := s.cfg.Store.begin(t.resource, mine, after, initial)
	if !ok {
		return apierrors.NewResourceExpired("too old")
	}
	defer s.cfg.Store.end(t.resource, mine)
	w.Header().Set("Content-Type", watchType(t.resource))
	for _, o := range now {
		if _, err := w.Write(encode(t.resource, "ADDED", o)); err != nil {
			return nil
		}
	}
	if initial {
		_, _ = w.Write(encode(t.resource, "BOOKMARK", bookmark(t.resource, version))) // the next write tells
	}
	s.follow(w, r, mine)
	return nil
}

func (s *Server) follow(w http.ResponseWriter, r *http.Request, mine *watch) {
	for {
		for _, line := range mine.take() {
			if _, err := w.Write(line); err != nil {
				return
			}
		}
		w.(http.Flusher).Flush()
		select {
		case <-mine.poke:
		case <-r.Context().Done():
			return
		}
	}
}

// review is what the API server does with a projected token.
func (s *Server) review(w http.ResponseWriter, r *http.Request) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return err
	}
	var review authv1.TokenReview
	if _, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, &review); err != nil {
		return err
	}
	review.TypeMeta = metav1.TypeMeta{APIVersion: authv1.SchemeGroupVersion.String(), Kind: "TokenReview"}
	if audience, user, node, ok := s.cfg.Review(review.Spec.Token); ok {
		review.Status = authv1.TokenReviewStatus{
			Authenticated: true, Audiences: []string{audience},
			User: authv1.UserInfo{Username: user, Extra: map[string]authv1.ExtraValue{"authentication.kubernetes.io/node-name": {node}}},
		}
	}
	answer(w, &review)
	return nil
}

// put creates (POST) or replaces.
func (s *Server) put(w http.ResponseWriter, r *http.Request, t target) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return apierrors.NewRequestEntityTooLargeError(err.Error())
	}
	o, err := decode(t.resource, body)
	if err != nil {
		return err
	}
	o.SetNamespace(t.namespace)
	if err := s.cfg.Store.write(t.resource, o, r.Method == http.MethodPost); err != nil {
		return err
	}
	answer(w, o)
	return nil
}

// patch applies a status: the condition of a pod, or what a Mesh shows.
func (s *Server) patch(w http.ResponseWriter, r *http.Request, t target) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return err
	}
	found := false
	switch {
	case t.subresource != "status":
		return apierrors.NewMethodNotSupported(t.resource.GroupResource(), r.Method)
	case t.resource == Pods:
		var p corev1.Pod
		if err := json.Unmarshal(body, &p); err != nil {
			return err
		}
		found = s.ShowPod(t.namespace, t.name, p.Status.Conditions)
	case t.resource == Meshes:
		var with map[string]any
		if err := json.Unmarshal(body, &with); err != nil {
			return err
		}
		found = Update(s.cfg.Store, Meshes, "", t.name, func(u *unstructured.Unstructured) { u.Object["status"] = with["status"] })
	}
	if !found {
		return apierrors.NewNotFound(t.resource.GroupResource(), t.name)
	}
	return s.get(w, t)
}

// protected is the type of the condition that control owns.
const protected = "tacit.dev/Protected"

// ShowPod replaces the conditions of a pod that are control's by those given.
func (s *Server) ShowPod(namespace, name string, owned []corev1.PodCondition) bool {
	return Update(s.cfg.Store, Pods, namespace, name, func(p *corev1.Pod) {
		var conditions []corev1.PodCondition
		for _, c := range p.Status.Conditions {
			if c.Type != protected {
				conditions = append(conditions, c)
			}
		}
		p.Status.Conditions = append(conditions, owned...)
		for _, c := range owned {
			if s.cfg.Shown != nil {
				s.cfg.Shown(namespace, name, c)
			}
		}
	})
}
