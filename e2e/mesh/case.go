package mesh

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"tacit.dev/e2e/build"
)

// patience bounds whatever a Case waits for.
const patience = 2 * time.Minute

// Case is a mesh as one test sees it: what fails when the case is asked, fails the
// test at once; its Mesh returns the error instead. Methods are for the goroutine of
// the test, and block for two minutes at most where nothing else is said.
type Case struct {
	// T is the test that fails. Subtests run one after the other: each puts itself here,
	// and after the last one the test puts itself back.
	T    *testing.T
	Mesh *Mesh
}

// Patiently is a context for asking the Mesh: the test's own, with the bound of whatever
// a Case waits for. It does not block, and ends with the test.
func (c Case) Patiently() context.Context {
	ctx, cancel := context.WithTimeout(c.T.Context(), patience)
	c.T.Cleanup(cancel)
	return ctx
}

// Kubectl waits for the end of kubectl and returns what it printed, without space at
// the ends. It fails the test if kubectl fails.
func (c Case) Kubectl(args ...string) string {
	c.T.Helper()
	out, err := c.Mesh.Kubectl(c.Patiently(), args...)
	if err != nil {
		c.T.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// Apply creates or changes the objects of a YAML text; it does not wait until they are
// ready. It fails the test if one of them is refused; a pod whose namespace is so young
// that it has no service account yet is waited for.
func (c Case) Apply(yaml string) {
	c.T.Helper()
	var refused error
	c.Await("the namespace has a service account", func(ctx context.Context) error {
		_, err := c.Mesh.Apply(ctx, yaml)
		if err != nil && strings.Contains(err.Error(), "error looking up service account") {
			return err
		}
		refused = err
		return nil
	})
	if refused != nil {
		c.T.Fatal(refused)
	}
}

// Await waits until the answer is no error, and fails the test with the last one if
// that does not come. ctx has the bound of the whole wait; what is asked without it
// may prolong that.
func (c Case) Await(what string, is func(ctx context.Context) error) {
	c.T.Helper()
	ctx := c.Patiently()
	if err := build.Poll(ctx, func() error { return is(ctx) }); err != nil {
		c.T.Fatalf("wait until %s: %v", what, err)
	}
}

// KubectlPrints waits until kubectl prints what is wanted, but for space at the ends,
// and fails the test if that does not come. A kubectl that fails is tried again.
func (c Case) KubectlPrints(want string, args ...string) {
	c.T.Helper()
	c.Await(fmt.Sprintf("kubectl %s prints %q", strings.Join(args, " "), want), func(ctx context.Context) error {
		out, err := c.Mesh.Kubectl(ctx, args...)
		if err == nil && strings.TrimSpace(out) != want {
			err = fmt.Errorf("it prints %q", out)
		}
		return err
	})
}

// Protected waits until a pod is protected, and fails the test if that does not come.
func (c Case) Protected(namespace, pod string) {
	c.T.Helper()
	c.condition("True", namespace, pod)
}

// NotEnrolled waits until a pod has no word about its protection, as one that is no
// part of the mesh, and fails the test if that does not come.
func (c Case) NotEnrolled(namespace, pod string) {
	c.T.Helper()
	c.condition("", namespace, pod)
}

func (c Case) condition(want, namespace, pod string) {
	c.T.Helper()
	c.KubectlPrints(want, "get", "pod", "-n", namespace, pod, "-o", `jsonpath={.status.conditions[?(@.type=="tacit.dev/Protected")].status}`)
}
