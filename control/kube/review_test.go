package kube

import (
	"context"
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
	r := NewReviewer(ReviewerConfig{Client: client, Audience: "tacit"})
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

func TestJudgeOfTokens(t *testing.T) {
	const audience, agent = "tacit", "system:serviceaccount:tacit-system:tacit-node"
	r := NewReviewer(ReviewerConfig{Audience: audience, Users: []string{agent}})
	good := func() authv1.TokenReviewStatus {
		return authv1.TokenReviewStatus{
			Authenticated: true, Audiences: []string{audience},
			User: authv1.UserInfo{Username: agent, Extra: map[string]authv1.ExtraValue{nodeName: {"n1"}}},
		}
	}
	if node, err := r.judge(good()); node != "n1" || err != nil {
		t.Errorf("node %q, %v: want n1", node, err)
	}
	for name, c := range map[string]struct {
		spoil func(*authv1.TokenReviewStatus)
		want  string
	}{
		"not valid":        {func(s *authv1.TokenReviewStatus) { s.Authenticated, s.Error = false, "expired" }, "expired"},
		"for somebody":     {func(s *authv1.TokenReviewStatus) { s.Audiences = []string{"istio-ca"} }, "istio-ca"},
		"of somebody":      {func(s *authv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:default:app" }, "default:app"},
		"of no node":       {func(s *authv1.TokenReviewStatus) { s.User.Extra = nil }, "not bound"},
		"of several nodes": {func(s *authv1.TokenReviewStatus) { s.User.Extra[nodeName] = []string{"n1", "n2"} }, "not bound"},
	} {
		s := good()
		c.spoil(&s)
		if node, err := r.judge(s); err == nil || node != "" || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: node %q, %v: want an error with %q", name, node, err, c.want)
		}
	}
}
