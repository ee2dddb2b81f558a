package kube

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"tacit.dev/mesh"
)

const (
	// nodeName is where the API server says on which node the pod of a bound
	// token runs (KEP-4193).
	nodeName = "authentication.kubernetes.io/node-name"
	// reviewAge is how long an answer of the API server is believed. A token
	// is revoked with its pod; what the pod's node may do ends with the stream.
	reviewAge = 10 * time.Second
	// maxReviews bounds how many answers are kept.
	maxReviews = 10_000
	// maxBearer bounds a token that is passed on to the API server, in bytes.
	maxBearer = 16 << 10
	// reviewRate is how many reviews a second the API server is asked for, and
	// maxReviewing how many may wait for it, each for reviewTime at most. Anybody who
	// reaches control can ask for one; a new leader asks for two per node at once.
	reviewRate   = 400
	maxReviewing = 4000
	reviewTime   = 10 * time.Second
)

// errBusy is for whoever comes when too many wait.
var errBusy = fmt.Errorf("more than %d tokens wait for their review by the API server", maxReviewing)

// ReviewerConfig is what NewReviewer needs.
type ReviewerConfig struct {
	// Client needs create for tokenreviews, and list for nodes.
	Client kubernetes.Interface
	// ProxyAudience and AgentAudience tell whose a token is: it must be meant for one
	// of them, and for one only.
	ProxyAudience, AgentAudience string
	// Users are the service accounts of the node's processes, as
	// system:serviceaccount:NAMESPACE:NAME.
	Users []string
}

// Reviewer knows nodes by projected service account tokens: the API server says
// whose a token is, and on which node its pod runs. It is safe for concurrent use.
type Reviewer struct {
	cfg ReviewerConfig
	// reviewing has one for each call that waits for the API server.
	reviewing chan struct{}
	// flights has one review of a token for all who come with it meanwhile, as the streams
	// of a node do.
	flights singleflight.Group

	mu    sync.Mutex // guards what follows
	known map[[sha256.Size]byte]review
}

// review is an answer of the API server.
type review struct {
	from mesh.Process
	err  error
	at   time.Time
}

// NewReviewer starts nothing.
func NewReviewer(cfg ReviewerConfig) *Reviewer {
	return &Reviewer{cfg: cfg, reviewing: make(chan struct{}, maxReviewing), known: make(map[[sha256.Size]byte]review)}
}

// Names names the nodes of the cluster.
func (r *Reviewer) Names(ctx context.Context) ([]string, error) {
	list, err := r.cfg.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	var names []string
	for _, n := range list.Items {
		names = append(names, n.Name)
	}
	return names, nil
}

// Authenticate tells on which node the pod runs that the token was made for, and which
// of its processes has it. It waits for the API server, for 10 seconds at most; when too
// many wait already it fails at once.
func (r *Reviewer) Authenticate(ctx context.Context, token string) (mesh.Process, error) {
	if token == "" || len(token) > maxBearer {
		return mesh.Process{}, fmt.Errorf("a token of %d bytes", len(token))
	}
	key := sha256.Sum256([]byte(token))
	if known, ok := r.remembered(key); ok {
		return known.from, known.err
	}
	select {
	case done := <-r.flights.DoChan(string(key[:]), func() (any, error) { return r.review(key, token) }):
		return done.Val.(mesh.Process), done.Err
	case <-ctx.Done():
		return mesh.Process{}, fmt.Errorf("review a token: %w", ctx.Err())
	}
}

// review asks the API server. Whoever began it may have left: it ends by itself.
func (r *Reviewer) review(key [sha256.Size]byte, token string) (mesh.Process, error) {
	if known, ok := r.remembered(key); ok { // since the caller has looked
		return known.from, known.err
	}
	select {
	case r.reviewing <- struct{}{}:
		defer func() { <-r.reviewing }()
	default:
		return mesh.Process{}, errBusy
	}
	ctx, cancel := context.WithTimeout(context.Background(), reviewTime)
	defer cancel()
	answer, err := r.cfg.Client.AuthenticationV1().TokenReviews().Create(ctx, &authv1.TokenReview{
		Spec: authv1.TokenReviewSpec{Token: token, Audiences: []string{r.cfg.ProxyAudience, r.cfg.AgentAudience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return mesh.Process{}, fmt.Errorf("review a token: %w", err)
	}
	from, err := r.judge(answer.Status)
	r.remember(key, review{from: from, err: err, at: time.Now()})
	return from, err
}

// judge reads an answer: it has to be a token for us, of a process of ours, and
// bound to a pod on a node.
func (r *Reviewer) judge(s authv1.TokenReviewStatus) (mesh.Process, error) {
	proxy, agent := slices.Contains(s.Audiences, r.cfg.ProxyAudience), slices.Contains(s.Audiences, r.cfg.AgentAudience)
	switch {
	case !s.Authenticated:
		return mesh.Process{}, fmt.Errorf("the token is not valid: %.500s", s.Error)
	case proxy == agent:
		return mesh.Process{}, fmt.Errorf("the token is for %q: want either %q or %q", s.Audiences, r.cfg.ProxyAudience, r.cfg.AgentAudience)
	case !slices.Contains(r.cfg.Users, s.User.Username):
		return mesh.Process{}, fmt.Errorf("the token is that of %.500s: want one of %q", s.User.Username, r.cfg.Users)
	}
	node := s.User.Extra[nodeName]
	if len(node) != 1 || node[0] == "" {
		return mesh.Process{}, errors.New("the token is not bound to a pod on a node (needs Kubernetes 1.32, and a projected token)")
	}
	return mesh.Process{Node: node[0], Agent: agent}, nil
}

func (r *Reviewer) remembered(key [sha256.Size]byte) (review, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	known, ok := r.known[key]
	return known, ok && time.Since(known.at) < reviewAge
}

func (r *Reviewer) remember(key [sha256.Size]byte, v review) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) >= maxReviews {
		clear(r.known)
	}
	r.known[key] = v
}
