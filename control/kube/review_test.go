package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	authv1 "k8s.io/api/authentication/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"tacit.dev/mesh"
)

// An API server that takes its time is waited for by so many, and by no more.
func TestReviewsThatWaitAreBounded(t *testing.T) {
	asked, answer := make(chan struct{}, maxReviewing+1), make(chan struct{})
	// Over a unix socket: so many connections of TCP would leave their ports to nobody
	// for a minute.
	path := filepath.Join(t.TempDir(), "api")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-answer
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1"}`)
	}))
	server.Listener.Close()
	server.Listener = l
	server.Start()
	defer server.Close()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	client, err := kubernetes.NewForConfig(&rest.Config{Host: "http://api", Dial: dial, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	r := NewReviewer(ReviewerConfig{Client: client, ProxyAudience: "tacit-proxy", AgentAudience: "tacit-agent"})
	var strangers sync.WaitGroup
	for i := range maxReviewing {
		strangers.Go(func() {
			if _, err := r.Authenticate(t.Context(), fmt.Sprint("token ", i)); err == nil {
				t.Error("a token of nobody was good")
			}
		})
	}
	for range maxReviewing {
		<-asked
	}
	if _, err := r.Authenticate(t.Context(), "one more"); !errors.Is(err, errBusy) {
		t.Errorf("one more: %v, want %v", err, errBusy)
	}
	close(answer)
	strangers.Wait()
	if _, err := r.Authenticate(t.Context(), "later"); err == nil || errors.Is(err, errBusy) {
		t.Errorf("later: %v, want that it was reviewed", err)
	}
}

// Who comes with a token that is being reviewed gets that answer.
func TestOneReviewForAll(t *testing.T) {
	asked, answer := make(chan struct{}, 10), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-answer
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": {"authenticated": true, "audiences": ["proxy"], "user": {"username": "node", "extra": {"`+nodeName+`": ["n1"]}}}}`)
	}))
	defer server.Close()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: server.URL, ContentConfig: rest.ContentConfig{ContentType: "application/json"}})
	if err != nil {
		t.Fatal(err)
	}
	r := NewReviewer(ReviewerConfig{Client: client, ProxyAudience: "proxy", AgentAudience: "agent", Users: []string{"node"}})
	impatient, cancel := context.WithCancel(t.Context())
	var left, streams sync.WaitGroup
	left.Go(func() {
		if _, err := r.Authenticate(impatient, "token"); !errors.Is(err, context.Canceled) {
			t.Errorf("who leaves gets %v", err)
		}
	})
	<-asked
	for range 6 {
		streams.Go(func() {
			if from, err := r.Authenticate(t.Context(), "token"); err != nil || from.Node != "n1" {
				t.Errorf("%v, %v: want n1", from, err)
			}
		})
	}
	cancel()
	left.Wait()
	close(answer)
	streams.Wait()
	if len(asked) > 0 {
		t.Errorf("the API server was asked %d times more", len(asked))
	}
}

// The API server is asked about both audiences, and what it said is remembered.
func TestReviewTellsAgentFromProxy(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		var review authv1.TokenReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			t.Error(err)
		}
		review.Status = authv1.TokenReviewStatus{Authenticated: true, User: authv1.UserInfo{Username: "node", Extra: map[string]authv1.ExtraValue{nodeName: {"n1"}}}}
		// As the API server: those of the audiences asked about that the token is for.
		for _, a := range review.Spec.Audiences {
			if a == review.Spec.Token {
				review.Status.Audiences = append(review.Status.Audiences, a)
			}
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(review); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: server.URL, ContentConfig: rest.ContentConfig{ContentType: "application/json"}})
	if err != nil {
		t.Fatal(err)
	}
	r := NewReviewer(ReviewerConfig{Client: client, ProxyAudience: "proxy", AgentAudience: "agent", Users: []string{"node"}})
	for _, token := range []string{"proxy", "agent", "agent", "proxy"} {
		want := mesh.Process{Node: "n1", Agent: token == "agent"}
		if got, err := r.Authenticate(t.Context(), token); got != want || err != nil {
			t.Errorf("the token for %s proves %v, %v: want %v", token, got, err, want)
		}
	}
	if asked != 2 {
		t.Errorf("the API server was asked %d times, want once for each token", asked)
	}
}

func TestJudgeOfTokens(t *testing.T) {
	const account = "system:serviceaccount:tacit-system:tacit-node"
	r := NewReviewer(ReviewerConfig{ProxyAudience: "tacit-proxy", AgentAudience: "tacit-agent", Users: []string{account}})
	good := func() authv1.TokenReviewStatus {
		return authv1.TokenReviewStatus{
			Authenticated: true, Audiences: []string{"tacit-proxy"},
			User: authv1.UserInfo{Username: account, Extra: map[string]authv1.ExtraValue{nodeName: {"n1"}}},
		}
	}
	for audience, want := range map[string]mesh.Process{"tacit-proxy": {Node: "n1"}, "tacit-agent": {Node: "n1", Agent: true}} {
		s := good()
		s.Audiences = []string{audience}
		if got, err := r.judge(s); got != want || err != nil {
			t.Errorf("a token for %s proves %+v, %v: want %+v", audience, got, err, want)
		}
	}
	for name, c := range map[string]struct {
		spoil func(*authv1.TokenReviewStatus)
		want  string
	}{
		"not valid":        {func(s *authv1.TokenReviewStatus) { s.Authenticated, s.Error = false, "expired" }, "expired"},
		"for somebody":     {func(s *authv1.TokenReviewStatus) { s.Audiences = []string{"istio-ca"} }, "istio-ca"},
		"for both":         {func(s *authv1.TokenReviewStatus) { s.Audiences = []string{"tacit-proxy", "tacit-agent"} }, "either"},
		"of somebody":      {func(s *authv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:default:app" }, "default:app"},
		"of no node":       {func(s *authv1.TokenReviewStatus) { s.User.Extra = nil }, "not bound"},
		"of several nodes": {func(s *authv1.TokenReviewStatus) { s.User.Extra[nodeName] = []string{"n1", "n2"} }, "not bound"},
	} {
		s := good()
		c.spoil(&s)
		if got, err := r.judge(s); err == nil || got != (mesh.Process{}) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %+v, %v: want an error with %q", name, got, err, c.want)
		}
	}
}
