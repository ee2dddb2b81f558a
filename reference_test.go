package tacit

import (
	"flag"
	"fmt"
	"go/ast"
	"go/constant"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the generated parts of docs/ anew")

// generated is a part of a page that is made from the source. cli has one of its own.
var generated = regexp.MustCompile(`(?s)(<!-- generated: ([a-z -]+) -->\n).*?(<!-- end -->\n)`)

// generators make the generated parts, by name.
func generators(t *testing.T) map[string]func(*testing.T) string {
	all := map[string]func(*testing.T) string{"values": valuesTable, "mesh spec": meshTable("spec"), "mesh status": meshTable("status")}
	for _, set := range flagSets(t) {
		all["flags of "+set] = func(t *testing.T) string { return flagsTable(t, set) }
	}
	for _, p := range processes {
		all["metrics of "+p] = func(t *testing.T) string { return metricsTable(t, p) }
		all["messages of "+p] = func(t *testing.T) string { return messagesTable(t, p) }
	}
	return all
}

// TestReferenceIsTheSource compares the generated parts of docs/ with the source. With -update
// it writes them.
func TestReferenceIsTheSource(t *testing.T) {
	makers, made := generators(t), map[string]bool{}
	for _, doc := range markdown(t, "docs") {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		now := generated.ReplaceAllStringFunc(string(text), func(part string) string {
			m := generated.FindStringSubmatch(part)
			make, name := makers[m[2]], m[2]
			if make == nil { // of cli, whose test it is
				return part
			}
			made[name] = true
			return m[1] + "\n" + make(t) + "\n" + m[3]
		})
		switch {
		case now == string(text):
		case *update:
			if err := os.WriteFile(doc, []byte(now), 0o644); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("%s is not what the source says. Run: make reference\n%s", doc, firstDifference(string(text), now))
		}
	}
	for name := range makers {
		if !made[name] {
			t.Errorf("no page of docs/ has a part <!-- generated: %s -->", name)
		}
	}
}

// firstDifference is the first line that differs, of both.
func firstDifference(is, want string) string {
	a, b := strings.Split(is, "\n"), strings.Split(want, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf("line %d is:   %s\nand should: %s", i+1, a[i], b[i])
		}
	}
	return fmt.Sprintf("it has %d lines and should have %d", len(a), len(b))
}

// cell is text as a cell of a table has it.
func cell(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	return strings.ReplaceAll(strings.ReplaceAll(text, "|", `\|`), "<", "&lt;")
}

// code is text in backquotes, "" for "".
func code(text string) string {
	if text == "" {
		return ""
	}
	return "`" + strings.ReplaceAll(text, "|", `\|`) + "`"
}

// eachFlagSet visits the functions of cmd/ that make a flag set, with its name.
func eachFlagSet(t *testing.T, visit func(set string, f *ast.File, fn *ast.FuncDecl)) {
	for _, glob := range []string{"cmd/tacit-control/*.go", "cmd/tacit-node/*.go"} {
		eachFile(t, glob, func(f *ast.File) {
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok {
					if set := flagSetOf(t, f, fn); set != "" {
						visit(set, f, fn)
					}
				}
			}
		})
	}
}

// flagSets are the names of the flag sets of the programs, but of tacit.
func flagSets(t *testing.T) (names []string) {
	eachFlagSet(t, func(set string, _ *ast.File, _ *ast.FuncDecl) { names = append(names, set) })
	return names
}

// flagsTable lists the flags of a set, in the order of the source.
func flagsTable(t *testing.T, of string) string {
	var b strings.Builder
	b.WriteString("| flag | default | meaning |\n|---|---|---|\n")
	eachFlagSet(t, func(set string, f *ast.File, fn *ast.FuncDecl) {
		if set == of {
			ast.Inspect(fn, func(n ast.Node) bool {
				b.WriteString(flagRow(t, f, n))
				return true
			})
		}
	})
	return b.String()
}

// flagSetOf is the name of the flag set that a function makes, "" if it makes none. The role
// that is known at run time only is left out.
func flagSetOf(t *testing.T, f *ast.File, fn *ast.FuncDecl) (name string) {
	ast.Inspect(fn, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok && callee(call) == "NewFlagSet" {
			name = strings.TrimSpace(textOf(t, f, call.Args[0]))
		}
		return true
	})
	return name
}

// flagRow is a row for a call that defines a flag, "" for another node.
func flagRow(t *testing.T, f *ast.File, n ast.Node) string {
	call, ok := n.(*ast.CallExpr)
	if !ok {
		return ""
	}
	at, byDefault, usageAt := 0, 1, 2
	switch callee(call) {
	case "StringVar", "DurationVar", "BoolVar", "IntVar", "Int64Var":
		at, byDefault, usageAt = 1, 2, 3
	case "String", "Duration", "Bool", "Int", "Int64":
	case "Func":
		byDefault, usageAt = -1, 1
	default:
		return ""
	}
	if len(call.Args) != max(usageAt+1, 3) {
		return ""
	}
	usage := textOf(t, f, call.Args[usageAt])
	value := "VALUE"
	if before, rest, quoted := strings.Cut(usage, "`"); quoted {
		var after string
		value, after, _ = strings.Cut(rest, "`")
		usage = before + value + after
	}
	name := "--" + textOf(t, f, call.Args[at])
	switch callee(call) {
	case "BoolVar", "Bool":
	default:
		name += " " + strings.ToUpper(value)
	}
	shown := ""
	if byDefault >= 0 {
		shown = defaultOf(t, f, call.Args[byDefault])
	}
	return fmt.Sprintf("| %s | %s | %s |\n", code(name), code(shown), cell(usage))
}

// defaultOf is a flag's default as a person writes it.
func defaultOf(t *testing.T, f *ast.File, x ast.Expr) string {
	v := valueOf(x)
	if s, ok := x.(*ast.SelectorExpr); ok && v == nil {
		v = constantOf(t, folderOf(f, s), s.Sel.Name)
	}
	switch {
	case v != nil:
		short := regexp.MustCompile(`^(.*?\d[hm])(0m)?0s$`).ReplaceAllString(fmt.Sprint(v), "$1")
		return map[string]string{"0s": "0"}[short] + strings.TrimPrefix(short, "0s")
	default:
		return strings.TrimPrefix(textOf(t, f, x), "false")
	}
}

// textOf is a string as far as the source says it: what is known at run time only is left out.
func textOf(t *testing.T, f *ast.File, x ast.Expr) string {
	switch x := x.(type) {
	case *ast.BasicLit:
		if x.Kind == token.STRING {
			s, err := strconv.Unquote(x.Value)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		return x.Value
	case *ast.BinaryExpr:
		return textOf(t, f, x.X) + textOf(t, f, x.Y)
	case *ast.Ident:
		if x.Name == "true" || x.Name == "false" {
			return x.Name
		}
		return stringOf(t, "", x.Name)
	case *ast.SelectorExpr:
		return stringOf(t, folderOf(f, x), x.Sel.Name)
	}
	return ""
}

// folderOf is the folder of a package of ours whose constant x is, "" for another one.
func folderOf(f *ast.File, x *ast.SelectorExpr) string {
	id, ok := x.X.(*ast.Ident)
	if !ok {
		return ""
	}
	for _, i := range f.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		if folder, ours := strings.CutPrefix(p, module+"/"); ours && filepath.Base(folder) == id.Name {
			return folder
		}
	}
	return ""
}

// stringOf is the value of a package's string constant, "" if there is none of that name.
func stringOf(t *testing.T, folder, name string) (found string) {
	if folder == "" {
		return ""
	}
	eachFile(t, filepath.Join(folder, "*.go"), func(f *ast.File) {
		eachString(f, func(n *ast.Ident, value string, _ *ast.GenDecl) {
			if n.Name == name {
				found = value
			}
		})
	})
	return found
}

// eachString visits the string constants of a file that are literals.
func eachString(f *ast.File, visit func(name *ast.Ident, value string, in *ast.GenDecl)) {
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			for i, n := range v.Names {
				if i >= len(v.Values) {
					continue
				}
				if lit, ok := v.Values[i].(*ast.BasicLit); ok && lit.Kind == token.STRING {
					visit(n, constant.StringVal(constant.MakeFromLiteral(lit.Value, token.STRING, 0)), g)
				}
			}
		}
	}
}

// callee is the name of the function or method that is called.
func callee(call *ast.CallExpr) string {
	switch fn := call.Fun.(type) {
	case *ast.SelectorExpr:
		return fn.Sel.Name
	case *ast.Ident:
		return fn.Name
	}
	return ""
}
