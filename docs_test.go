package tacit

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
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
var foreign = []string{"bundle", "cluster", "cni", "destination", "from", "google", "intermediate", "istio", "net", "root", "security", "source", "spec", "status", "tacit", "to", "when"}

// promised are the documents that there must be.
var promised = []string{"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md",
	"docs/architecture.md", "docs/wire.md", "docs/ports.md", "docs/threat-model.md", "docs/getting-started.md", "docs/concepts.md",
	"docs/install/gitops.md", "docs/operate/uninstall.md", "docs/operate/monitoring.md", "docs/operate/upgrade.md",
	"docs/operate/troubleshooting.md", "docs/comparison.md", "docs/faq.md", "docs/compatibility.md", "docs/security/reporting.md"}

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
			if slices.Contains(foreign, folder) || isFile(folder+"."+what) || what == "yaml" || isValue(t, folder+"."+what) {
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

// isValue reports whether the chart has a value by that path.
func isValue(t *testing.T, path string) bool {
	return at(yamlFile(t, "deploy/helm/tacit/values.yaml"), strings.Split(path, ".")...) != nil
}

// documents are those that follow the code. A decision says what was so when it was made.
func documents(t *testing.T) []string {
	docs := slices.DeleteFunc(markdown(t, "docs"), func(doc string) bool { return strings.HasPrefix(doc, "docs/decisions/0") })
	docs = append(docs, promised...)
	slices.Sort(docs)
	return slices.Compact(docs)
}

// markdown is every Markdown file of a folder.
func markdown(t *testing.T, folder string) (docs []string) {
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".md") {
			docs = append(docs, filepath.ToSlash(path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return docs
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
