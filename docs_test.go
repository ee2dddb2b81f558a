package tacit

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// name is what the documentation calls a piece of code: `folder/package.Name`
// or `folder/package.Type.Method`, in backquotes.
var name = regexp.MustCompile("`([a-z]+(?:/[a-z]+)*)\\.([A-Za-z]\\w*(?:\\.\\w+)?)`")

// foreign is what stands before the dot in names that are none of our code's: files
// of the CA, values of the chart, messages of others, fields of kinds.
var foreign = []string{"bundle", "cluster", "cni", "destination", "from", "google", "intermediate", "istio", "net", "root", "security", "source", "to", "when"}

// promised are the documents that there must be.
var promised = []string{"docs/architecture.md", "docs/wire.md", "docs/ports.md", "docs/threat-model.md", "README.md", "CONTRIBUTING.md"}

// TestDocumentationNamesExist keeps docs/ honest: whoever renames a function
// renames it there too.
func TestDocumentationNamesExist(t *testing.T) {
	declared := map[string]map[string]bool{}
	for _, doc := range documents(t) {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range name.FindAllStringSubmatch(string(text), -1) {
			folder, what := m[1], m[2]
			if slices.Contains(foreign, folder) || isFile(folder+"."+what) {
				continue
			}
			if info, err := os.Stat(folder); err != nil || !info.IsDir() {
				t.Errorf("%s: %s.%s: there is no folder %s", doc, folder, what, folder)
				continue
			}
			if declared[folder] == nil {
				declared[folder] = declarations(t, folder)
			}
			if !declared[folder][what] {
				t.Errorf("%s: %s has no %s", doc, folder, what)
			}
		}
	}
	if len(declared) < 8 {
		t.Errorf("the documentation follows a connection through %d packages, want at least 8", len(declared))
	}
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func documents(t *testing.T) []string {
	docs, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	docs = append(docs, promised...)
	slices.Sort(docs)
	return slices.Compact(docs)
}

// declarations lists what a package declares: Name, and Type.Method.
func declarations(t *testing.T, folder string) map[string]bool {
	files, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			declare(found, d)
		}
	}
	return found
}

func declare(found map[string]bool, d ast.Decl) {
	switch d := d.(type) {
	case *ast.FuncDecl:
		found[receiver(d)+d.Name.Name] = true
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				found[s.Name.Name] = true
			case *ast.ValueSpec:
				for _, n := range s.Names {
					found[n.Name] = true
				}
			}
		}
	}
}

// receiver is "Type." for a method, "" for a function.
func receiver(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	x := d.Recv.List[0].Type
	if p, ok := x.(*ast.StarExpr); ok {
		x = p.X
	}
	if g, ok := x.(*ast.IndexExpr); ok {
		x = g.X
	}
	if id, ok := x.(*ast.Ident); ok {
		return strings.TrimPrefix(id.Name, "*") + "."
	}
	return ""
}
