package build

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
)

// Original makes Istio's control plane, of the module istiod/, and the program that compares it with
// Tacit, of the module compare/, and returns their paths.
func Original(ctx context.Context, out io.Writer) (istiod, compare string, err error) {
	m, err := findModule(ctx)
	if err != nil {
		return "", "", err
	}
	istiod, err = m.nested("istiod", "go.mod").once(ctx, "istiod", "istio.io/istio/pilot/cmd/pilot-discovery", out)
	if err != nil {
		return "", "", err
	}
	// What it compares is made of these folders of the product.
	compare, err = m.nested("compare", "*.go", "../../go.mod", "../../go.sum", "../../mesh/*.go", "../../policy/*.go",
		"../../control/kube/*.go", "../../wire/xds/message/*.go").once(ctx, "compare", ".", out)
	return istiod, compare, err
}

// nested is a module in a folder of this one.
type nested struct {
	module
	sources []string
}

func (m module) nested(dir string, sources ...string) nested {
	m.dir = filepath.Join(m.dir, dir)
	return nested{m, sources}
}

// once makes its one program, if that is not in the cache.
func (n nested) once(ctx context.Context, name, pkg string, out io.Writer) (string, error) {
	key, err := n.key(n.sources...)
	if err != nil {
		return "", err
	}
	dir, err := Once(ctx, name+"-"+key, func(dir string) error {
		fmt.Fprintf(out, "building %s, once\n", name)
		return n.build(ctx, dir, []target{{what: name, to: name, packages: []string{pkg}}}, out)
	})
	return filepath.Join(dir, name), err
}
