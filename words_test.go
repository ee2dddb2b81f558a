package tacit

import (
	"go/ast"
	"go/token"
	"go/types"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// namesIn are the names in backquotes that begin the rows of a page's tables. Without a heading
// the whole page is meant, otherwise the section under it.
func namesIn(t *testing.T, page, under string) map[string]bool {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	section := string(text)
	if under != "" {
		var found bool
		if _, section, found = strings.Cut(section, "\n## "+under+"\n"); !found {
			t.Fatalf("%s has no section %q", page, under)
		}
		section, _, _ = strings.Cut(section, "\n## ")
	}
	names := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)`").FindAllStringSubmatch(section, -1) {
		names[m[1]] = true
	}
	return names
}

// same tells what only one of both has.
func same(t *testing.T, page string, rows, source map[string]bool) {
	for _, name := range slices.Sorted(maps.Keys(source)) {
		if !rows[name] {
			t.Errorf("%s has no row for %s: add one by hand", page, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		if !source[name] {
			t.Errorf("%s has a row for %s, which the source does not know", page, name)
		}
	}
}

// TestReasonsAreDocumented: docs/reference/reasons.md has a row for each reason, and no other.
func TestReasonsAreDocumented(t *testing.T) {
	const page = "docs/reference/reasons.md"
	for section, source := range map[string]map[string]bool{
		"Refused connections": merged(constants(t, "node/proxy/*.go", "Why a connection was refused"),
			constants(t, "identity/*.go", "Reasons why a handshake failed")),
		"Response flags":                     constants(t, "node/proxy/*.go", "Envoy's response flags"),
		"Changed source ports":               constants(t, "node/proxy/*.go", "Why an application sees another source port"),
		"Condition tacit.dev/Protected":      constants(t, "control/kube/*.go", "Reasons of the condition"),
		"Condition tacit.dev/Accepted":       constants(t, "control/kube/*.go", "Reasons of faults"),
		"Condition tacit.dev/Enforced":       constants(t, "control/kube/*.go", "Reasons of PolicyEnforced"),
		"Exceptions":                         constants(t, "control/kube/*.go", "Reasons of exceptions"),
		"Conditions of the Mesh":             reasonsSetIn(t, "control/kube/show.go"),
		"Packets that the guard has dropped": kindsOfGuard(t),
	} {
		if len(source) < 2 {
			t.Errorf("found %d names for %q in the source", len(source), section)
		}
		same(t, page+", "+section, namesIn(t, page, section), source)
	}
}

func merged(a, b map[string]bool) map[string]bool {
	maps.Copy(a, b)
	return a
}

// constants are the values of the blocks of constants whose comment begins so.
func constants(t *testing.T, glob, comment string) map[string]bool {
	found, begins := map[string]bool{}, regexp.MustCompile("^("+comment+")")
	eachFileWithComments(t, glob, func(f *ast.File) {
		eachString(f, func(_ *ast.Ident, value string, in *ast.GenDecl) {
			if begins.MatchString(in.Doc.Text()) {
				found[value] = true
			}
		})
	})
	return found
}

// kindsOfGuard are the counters of pod/redirect.
func kindsOfGuard(t *testing.T) map[string]bool {
	found := map[string]bool{}
	eachFile(t, "pod/redirect/contents.go", func(f *ast.File) {
		ast.Inspect(f, func(n ast.Node) bool {
			if fn, ok := n.(*ast.FuncDecl); ok && fn.Name.Name == "Kinds" {
				eachLiteral(fn, func(text string) { found[text] = true })
			}
			return true
		})
	})
	return found
}

// reasonsSetIn are the texts that a file assigns to a field Reason.
func reasonsSetIn(t *testing.T, file string) map[string]bool {
	found := map[string]bool{}
	word := regexp.MustCompile(`^[A-Z][A-Za-z]+$`)
	eachFile(t, file, func(f *ast.File) {
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr:
				if k, ok := n.Key.(*ast.Ident); ok && k.Name == "Reason" {
					eachLiteral(n.Value, func(text string) { found[text] = word.MatchString(text) })
				}
			case *ast.AssignStmt:
				for i, l := range n.Lhs {
					if s, ok := l.(*ast.SelectorExpr); ok && s.Sel.Name == "Reason" && len(n.Rhs) == len(n.Lhs) {
						eachLiteral(n.Rhs[i], func(text string) { found[text] = word.MatchString(text) })
					}
				}
			}
			return true
		})
	})
	return found
}

// eachLiteral visits the literal strings below a node.
func eachLiteral(n ast.Node, visit func(text string)) {
	ast.Inspect(n, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if text, err := strconv.Unquote(lit.Value); err == nil {
				visit(text)
			}
		}
		return true
	})
}

// keyed is a name of ours on an object of Kubernetes.
var keyed = regexp.MustCompile(`\btacit\.dev/[A-Za-z](?:[A-Za-z0-9-]*[A-Za-z0-9])?`)

// onTheWire are extensions of messages (docs/wire.md) and a field of a network configuration:
// they are on no object.
var onTheWire = []string{"wire/xds/*.go", "pod/cni/*.go"}

// TestKeysAreDocumented: docs/reference/labels.md has a row for each label, annotation, taint,
// condition and type that the source names, and whatever text names one, there is one of that name.
func TestKeysAreDocumented(t *testing.T) {
	keys, wire := map[string]bool{}, map[string]bool{"tacit.dev/v1alpha1": true}
	collect := func(into map[string]bool, glob string) {
		eachFile(t, glob, func(f *ast.File) {
			for _, d := range f.Decls {
				if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.IMPORT {
					continue
				}
				eachLiteral(d, func(text string) {
					if keyed.FindString(text) == text && text != "" {
						into[text] = true
					}
				})
			}
		})
	}
	for _, glob := range []string{"control/*.go", "control/kube/*.go", "cli/*.go", "node/agent/*.go"} {
		collect(keys, glob)
	}
	for _, glob := range onTheWire {
		collect(wire, glob)
	}
	const page = "docs/reference/labels.md"
	rows := map[string]bool{}
	for name := range namesIn(t, page, "") {
		if strings.HasPrefix(name, "tacit.dev/") {
			rows[name] = true
		}
	}
	same(t, page, rows, keys)
	check := func(where, text string) {
		for _, key := range keyed.FindAllString(text, -1) {
			folder := strings.TrimPrefix(key, module+"/")
			if _, err := os.Stat(folder); err != nil && !keys[key] && !wire[key] {
				t.Errorf("%s names %s, which is nothing", where, key)
			}
		}
	}
	for _, page := range pages(t) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		check(page, strings.ReplaceAll(string(text), "tacit.dev/exclude-*", ""))
	}
	for _, glob := range []string{"*/*.go", "*/*/*.go"} {
		eachFile(t, glob, func(f *ast.File) {
			ast.Inspect(f, func(n ast.Node) bool {
				if _, ok := n.(*ast.ImportSpec); ok {
					return false
				}
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					check("the source", lit.Value)
				}
				return true
			})
		})
	}
}

// TestAccessLogIsDocumented: docs/reference/logs.md has a row for each attribute of the access log.
func TestAccessLogIsDocumented(t *testing.T) {
	source := map[string]bool{}
	eachFile(t, "node/proxy/telemetry.go", func(f *ast.File) {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !slices.Contains([]string{"logClosed", "appendPorts"}, fn.Name.Name) {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr: // slog.String("key", value)
					if s, ok := n.Fun.(*ast.SelectorExpr); ok && types.ExprString(s.X) == "slog" && len(n.Args) == 2 {
						eachLiteral(n.Args[0], func(text string) { source[text] = true })
					}
				case *ast.CompositeLit: // the keys of a party
					eachLiteral(n, func(text string) { source[text] = true })
				}
				return true
			})
		}
	})
	rows := map[string]bool{}
	text, err := os.ReadFile("docs/reference/logs.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Access log\n")
	section, _, _ = strings.Cut(section, "\n## ")
	for _, row := range strings.Split(section, "\n|")[1:] {
		first, _, _ := strings.Cut(row, " | ")
		for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(first, -1) {
			rows[m[1]] = true
		}
	}
	same(t, "docs/reference/logs.md, Access log", rows, source)
}

var (
	anyMetric = regexp.MustCompile(`\b(?:tacit|istio)_[a-z]+(?:_[a-z]+)+\b`)
	setValue  = regexp.MustCompile(`--set(?:-string|-json|-file)?[ =]([a-zA-Z]+(?:\.[a-zA-Z]+)*)=`)
)

// others are flags of other programs that the documentation names.
var others = []string{"--register-with-taints", "--service-node-port-range", "--sbom", "--nodes", "--dual-stack", "--image"}

// TestNamesInDocumentationExist: what a page calls a metric, a flag or a value is one.
func TestNamesInDocumentationExist(t *testing.T) {
	code, flags := sources(t), flagsOfPrograms(t)
	for _, page := range documents(t) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range anyMetric.FindAllString(string(text), -1) {
			if !strings.Contains(code, `"`+name+`"`) {
				t.Errorf("%s: there is no metric %s", page, name)
			}
		}
		for _, m := range flagName.FindAllStringSubmatch(string(text), -1) {
			if !flags[m[1]] && !slices.Contains(others, m[1]) {
				t.Errorf("%s: no program has a flag %s", page, m[1])
			}
		}
		for _, m := range setValue.FindAllStringSubmatch(string(text), -1) {
			parent := m[1][:max(0, strings.LastIndex(m[1], "."))] // of what the schema leaves open
			if m[1] != "KEY" && !isValue(t, m[1]) && !isValue(t, parent) {
				t.Errorf("%s: the chart has no value %s", page, m[1])
			}
		}
	}
}

// flagsOfPrograms are those that the reference lists, as --name.
func flagsOfPrograms(t *testing.T) map[string]bool {
	flags := map[string]bool{"--help": true}
	for _, page := range []string{"docs/reference/programs.md", "docs/reference/cli.md"} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("(?m)^\\| `(?:-[a-z], )?(--[a-z-]+)").FindAllStringSubmatch(string(text), -1) {
			flags[m[1]] = true
		}
	}
	return flags
}

// TestExamplesAreYAML: each block of YAML in the documentation can be read.
func TestExamplesAreYAML(t *testing.T) {
	block := regexp.MustCompile("(?ms)^ *```yaml$(.*?)^ *```$")
	found := 0
	for _, page := range pages(t) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range block.FindAllStringSubmatch(string(text), -1) {
			found++
			var doc any
			if err := yaml.Unmarshal([]byte(m[1]), &doc); err != nil {
				t.Errorf("%s: %v\n%s", page, err, m[1])
			}
		}
	}
	if found < 5 {
		t.Errorf("%d blocks of YAML were read, want at least 5", found)
	}
}
