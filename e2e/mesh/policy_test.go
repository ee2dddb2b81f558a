package mesh_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const onlyFriend = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-friend}
spec:
  selector: {matchLabels: {app: server}}
  rules:
  - from: [{source: {serviceAccounts: [friend]}}]
`

// TestAuthorizationPolicy: a policy admits one client and refuses the other, its status says
// that it is enforced, and without it both are admitted.
func TestAuthorizationPolicy(t *testing.T) {
	s := enrolled(t)
	s.apply("policy.yaml")
	s.ready("friend", "stranger", "server")
	s.captured("friend", "stranger", "server")
	connect := func(pod string) error {
		_, err := s.try("exec", pod, "--", "/tacit", "lab", "app", "connect", "--timeout=2s", "server:80")
		return err
	}
	s.eventually("friend connects", func() error { return connect("friend") }) // rules of a new service may come late
	s.eventually("stranger connects", func() error { return connect("stranger") })

	s.applyText(onlyFriend)
	s.eventually("stranger is refused", func() error {
		if connect("stranger") == nil {
			return errors.New("it connects")
		}
		return nil
	})
	if err := connect("friend"); err != nil {
		t.Errorf("friend: %v", err)
	}
	s.eventually("the policy says that it is enforced", func() error {
		const path = `jsonpath={.status.conditions[?(@.type=="tacit.dev/Accepted")].status} {.status.conditions[?(@.type=="tacit.dev/Enforced")].reason}`
		is, err := s.try("get", "authorizationpolicy", "only-friend", "-o", path)
		if err == nil && is != "True AtDestination" {
			err = fmt.Errorf("its conditions are %q", is)
		}
		return err
	})

	file := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, []byte(strings.Replace(onlyFriend, "{name:", "{namespace: "+s.name+", name:", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Tacit(t.Context(), "policy", "check", "--cluster", file); err != nil || !strings.Contains(out, "AtDestination") {
		t.Errorf("tacit policy check: %s, %v", out, err)
	}

	s.kubectl("delete", "authorizationpolicy", "only-friend")
	for _, pod := range []string{"friend", "stranger"} {
		s.eventually(pod+" connects without the policy", func() error { return connect(pod) })
	}
}
