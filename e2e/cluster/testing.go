package cluster

import (
	"context"
	"os"
	"strings"
	"testing"
)

// Start makes a cluster for a test, ends it with the test, and fails the test if
// either does not work. A failed test prints the end of every log.
func Start(t testing.TB, o Options) *Cluster {
	t.Helper()
	if o.Progress == nil {
		o.Progress = os.Stderr // a cold build takes minutes: go test shows this at once only with -v
	}
	if o.Name == "" {
		o.Name = nameOf(t)
	}
	c, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.logs(10))
		}
		if err := c.Down(context.Background()); err != nil { // t.Context has ended
			t.Error(err)
		}
	})
	return c
}

// nameOf is for people who look at cgroups and folders while a test runs.
func nameOf(t testing.TB) string {
	words := strings.FieldsFunc(strings.ToLower(t.Name()), func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') })
	name := strings.TrimPrefix(strings.Join(words, "-"), "test")
	return strings.Trim(name[:min(len(name), 18)], "-") + "-" + randomUUID()[:8]
}
