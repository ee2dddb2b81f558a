package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tacit.dev/e2e/cluster"
	"tacit.dev/e2e/product"
)

// Options are what a cluster with Tacit is made of.
type Options struct {
	cluster.Options
	// Bare leaves Tacit out; its images are there.
	Bare bool
	// Programs has ProgramsImage, Load has FortioImage.
	Programs, Load bool
	// Next has Tacit's images a second time, as NextVersion.
	Next bool
}

// Mesh is a cluster that has Tacit, or its images.
type Mesh struct {
	*cluster.Cluster
	programs, next string
}

// Up makes a cluster and installs Tacit in it. Down must be called.
func Up(ctx context.Context, o Options) (*Mesh, error) {
	made, err := product.Build(ctx, product.Options{Registry: registry, Version: version, Progress: o.Progress})
	if err != nil {
		return nil, err
	}
	tars, err := o.images(ctx, made)
	if err != nil {
		return nil, err
	}
	var next product.Images
	if o.Next {
		if next, err = product.Build(ctx, product.Options{Registry: registry, Version: NextVersion, Progress: o.Progress}); err != nil {
			return nil, err
		}
		tars = append(tars, next.Node, next.Control)
	}
	o.Images = append(o.Images, tars...)
	c, err := cluster.Up(ctx, o.Options)
	if err != nil {
		return nil, err
	}
	m := &Mesh{Cluster: c, programs: made.Programs, next: next.Programs}
	if o.Bare {
		return m, nil
	}
	if err := m.Install(ctx); err != nil {
		return nil, errors.Join(err, m.State(ctx), c.Down(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// Start is Up for one test, which ends the cluster.
func Start(t testing.TB, o Options) *Mesh {
	t.Helper()
	if o.Progress == nil {
		o.Progress = os.Stderr
	}
	m, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(m.State(context.Background()))
		}
		if err := m.Down(context.Background()); err != nil { // t.Context has ended
			t.Error(err)
		}
	})
	return m
}

// Install installs Tacit as users do, and returns when it is ready. Its pods have less time than by default to
// end in: those whose connections stay open take all of it.
func (m *Mesh) Install(ctx context.Context, more ...string) error {
	_, err := m.Tacit(ctx, append([]string{"install", "--set", "image.registry=" + registry + ",image.tag=" + version + ",image.pullPolicy=Never,node.terminationGracePeriodSeconds=10"}, more...)...)
	return err
}

// Tacit runs the program tacit on the cluster and returns what it printed.
func (m *Mesh) Tacit(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, m.TacitPath(), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+m.Kubeconfig())
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("tacit %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(complaint.Bytes()))
	}
	return out.String(), nil
}

// Next is the same mesh for who has the program tacit of NextVersion.
func (m *Mesh) Next() *Mesh { return &Mesh{Cluster: m.Cluster, programs: m.next} }

// TacitPath is the program tacit.
func (m *Mesh) TacitPath() string { return filepath.Join(m.programs, "tacit") }

// State is what one wants to see when something went wrong.
func (m *Mesh) State(ctx context.Context) error {
	var text strings.Builder
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
		{"logs", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-control", "--tail=30"},
		{"logs", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "--all-containers", "--prefix", "--tail=30"},
	} {
		out, err := m.Kubectl(ctx, args...)
		fmt.Fprintf(&text, "== kubectl %s\n%s", strings.Join(args, " "), out)
		if err != nil {
			fmt.Fprintln(&text, err)
		}
	}
	return errors.New(text.String())
}
