package product

import (
	"context"
	"fmt"
	"io"
	"path/filepath"

	"tacit.dev/e2e/image"
)

const (
	// user is who the programs run as if nobody says otherwise. The agent has to be
	// root, and its DaemonSet says so.
	user = "65532:65532"
	// source is where the project is at home.
	source = "https://tacit.dev"
	// license is an SPDX expression, of our own programs. Those of Debian's packages stand beside them, in
	// usr/share/doc.
	license = "Apache-2.0"
	// nft is the one program that is not ours: the agent loads rules with it.
	nft = "/usr/sbin/nft"
)

// Options are what images are made for.
type Options struct {
	// Registry, if any, comes before the images' names.
	Registry string
	// Version is the images' tag, and what the programs say they are.
	Version string
	// Revision is the commit, for the label; "" if it is not known.
	Revision string
	// Progress is where a build reports to; nil for nowhere.
	Progress io.Writer
}

// Images are OCI tars.
type Images struct {
	Node, Control string
	// Programs is the folder of the programs in them, and of tacit.
	Programs string
}

// Build makes both images, unless they are in the cache.
func Build(ctx context.Context, o Options) (Images, error) {
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	dir, err := Programs(ctx, o.Version, o.Progress)
	if err != nil {
		return Images{}, err
	}
	made := Images{Programs: dir}
	node, err := nodeImage(ctx, o, dir)
	if err != nil {
		return made, err
	}
	control, err := controlImage(o, dir)
	if err != nil {
		return made, err
	}
	if made.Node, err = image.Build(ctx, node); err != nil {
		return made, err
	}
	made.Control, err = image.Build(ctx, control)
	return made, err
}

// nodeImage has agent, proxy, the CNI plugin, and nft with what it needs.
func nodeImage(ctx context.Context, o Options, dir string) (image.Spec, error) {
	files := []image.File{ours(dir, "tacit-node"), ours(dir, "tacit-cni")}
	foreign, err := image.Program(nft)
	if err != nil {
		return image.Spec{}, fmt.Errorf("%w (apt-get install nftables)", err)
	}
	packages, err := image.Packages(ctx, foreign)
	if err != nil {
		return image.Spec{}, err
	}
	files = append(files, foreign...)
	for _, p := range packages {
		files = append(files, image.File{Path: p.Copyright(), Source: p.Copyright(), Mode: 0o644})
	}
	return o.spec("tacit-node", "agent and proxy of a node", files, packages)
}

// controlImage has the control plane, and nothing else.
func controlImage(o Options, dir string) (image.Spec, error) {
	return o.spec("tacit-control", "control plane", []image.File{ours(dir, "tacit-control")}, nil)
}

func ours(dir, program string) image.File {
	return image.File{Path: "/" + program, Source: filepath.Join(dir, program), Mode: 0o755}
}

func (o Options) spec(name, about string, files []image.File, packages []image.Package) (image.Spec, error) {
	list, err := billOf(name, o.Version, files, packages)
	if err != nil {
		return image.Spec{}, err
	}
	return image.Spec{
		Name:       o.Reference(name),
		Files:      append(files, image.File{Path: "/usr/share/sbom/" + name + ".cdx.json", Text: list, Mode: 0o644}),
		Entrypoint: []string{"/" + name},
		User:       user,
		Labels:     o.labels(name, about),
	}, nil
}

// Reference is the name by which pods ask for an image.
func (o Options) Reference(name string) string {
	if o.Registry != "" {
		name = o.Registry + "/" + name
	}
	return name + ":" + o.Version
}

// labels are those of the OCI image specification.
func (o Options) labels(name, about string) map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       name,
		"org.opencontainers.image.description": "Tacit, mutual TLS for every pod: " + about,
		"org.opencontainers.image.version":     o.Version,
		"org.opencontainers.image.revision":    o.Revision,
		"org.opencontainers.image.source":      source,
		"org.opencontainers.image.licenses":    license,
	}
}
