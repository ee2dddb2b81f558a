package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"tacit.dev/e2e/image"
)

// The images that every node has, by the names for imagePullPolicy: Never.
const (
	PauseImage = "tacit.test/pause:1"
	DNSImage   = "tacit.test/coredns:1"
	// AppImage is the test application, e2e/app.
	AppImage = "tacit.test/app:1"
)

// chooseImages makes the cluster's own images and takes the caller's.
func (c *Cluster) chooseImages(ctx context.Context) error {
	own := []image.Spec{
		binary(PauseImage, filepath.Join(c.programs.Tools, "pause")),
		binary(AppImage, filepath.Join(c.programs.Tools, "app")),
	}
	if !c.options.NoDNS {
		own = append(own, binary(DNSImage, filepath.Join(c.programs.Kubernetes, "coredns")))
	}
	for _, spec := range own {
		tar, err := image.Build(ctx, spec)
		if err != nil {
			return err
		}
		c.images = append(c.images, tar)
	}
	for _, tar := range c.options.Images {
		path, err := filepath.Abs(tar)
		if err != nil {
			return err
		}
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("image: %w (image.Build makes one)", err)
		}
		c.images = append(c.images, path)
	}
	return nil
}

// binary is an image of one static program.
func binary(name, program string) image.Spec {
	inside := "/" + filepath.Base(program)
	return image.Spec{Name: name, Entrypoint: []string{inside}, Files: []image.File{{Path: inside, Source: program, Mode: 0o755}}}
}

// LoadImage gives an image to all nodes that there are, also under a name that
// they have: pods that start later have the new one.
func (c *Cluster) LoadImage(ctx context.Context, tar string) error {
	all, ctx := errgroup.WithContext(ctx)
	for _, n := range c.nodes {
		all.Go(func() error { return c.load(ctx, n.name, tar) })
	}
	c.images = append(c.images, tar) // for nodes that are added
	return all.Wait()
}

func (c *Cluster) load(ctx context.Context, node, tar string) error {
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer f.Close()
	out := &bytes.Buffer{}
	err = c.Enter(ctx, node, Streams{In: f, Out: out, Err: out}, "ctr", "-n", "k8s.io", "images", "import", "-")
	if err != nil {
		return fmt.Errorf("load %s on %s: %w: %s", tar, node, err, out)
	}
	return nil
}

func randomUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
