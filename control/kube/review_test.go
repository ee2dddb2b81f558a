package kube

import (
	"strings"
	"testing"

	authv1 "k8s.io/api/authentication/v1"
)

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
