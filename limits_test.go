package tacit

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var (
	flagName   = regexp.MustCompile("`(--[a-z-]+)`")
	metricName = regexp.MustCompile("`(tacit_[a-z_]+)`")
)

// TestLimitsAreThoseOfTheCode keeps docs/limits.md honest: its flags, metrics and constants
// exist, and a row says the value that its constant has. A flag's default is in some row.
func TestLimitsAreThoseOfTheCode(t *testing.T) {
	text, err := os.ReadFile("docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	flags, code := defaults(t), sources(t)
	missing := map[string]string{} // flags whose default no row has said yet
	compared := 0
	for row := range strings.SplitSeq(string(text), "\n") {
		for _, m := range metricName.FindAllStringSubmatch(row, -1) {
			if !strings.Contains(code, `"`+m[1]+`"`) {
				t.Errorf("there is no metric %s: %s", m[1], row)
			}
		}
		for _, m := range name.FindAllStringSubmatch(row, -1) {
			if v := constantOf(t, m[1], m[2]); v != nil {
				compared++
				if !says(row, v) {
					t.Errorf("%s.%s is %v: %s", m[1], m[2], v, row)
				}
			}
		}
		for _, m := range flagName.FindAllStringSubmatch(row, -1) {
			values, is := flags[m[1]]
			if !is {
				t.Errorf("no program has a flag %s: %s", m[1], row)
			}
			if !slices.ContainsFunc(values, func(v any) bool { return says(row, v) }) && missing[m[1]] != "said" {
				missing[m[1]] = fmt.Sprint(values)
			} else {
				missing[m[1]] = "said"
			}
		}
	}
	for f, values := range missing {
		if values != "said" {
			t.Errorf("no row says the default of %s, which is one of %s", f, values)
		}
	}
	if compared < 30 {
		t.Errorf("%d constants were compared, want at least 30", compared)
	}
}

// says reports whether a row has a number or a duration, in one of the ways of writing it.
// What is no number, or 0, needs not be said.
func says(row string, value any) bool {
	var ways []string
	switch v := value.(type) {
	case time.Duration:
		for unit, name := range map[time.Duration]string{time.Hour: "h", time.Minute: "min", time.Second: "s", time.Millisecond: "ms"} {
			if v%unit == 0 {
				ways = append(ways, fmt.Sprintf("%d %s", v/unit, name))
			}
		}
		if v == time.Minute {
			ways = append(ways, "a minute")
		}
	case int64:
		ways = append(ways, strconv.FormatInt(v, 10), thousands(v))
		if v%(1<<20) == 0 {
			ways = append(ways, fmt.Sprintf("%d MiB", v>>20))
		}
		if v%(1<<10) == 0 {
			ways = append(ways, fmt.Sprintf("%d KiB", v>>10))
		}
		if v == 3 {
			ways = append(ways, "three")
		}
	default:
		return true
	}
	if value == int64(0) || value == time.Duration(0) {
		return true
	}
	return slices.ContainsFunc(ways, func(way string) bool {
		return regexp.MustCompile(`(^|[^\d,.])` + regexp.QuoteMeta(way) + `($|[^\d]$|[^\d,]|,[^\d])`).MatchString(row)
	})
}

func thousands(v int64) string {
	if v < 1000 {
		return strconv.FormatInt(v, 10)
	}
	return fmt.Sprintf("%s,%03d", thousands(v/1000), v%1000)
}

// constantOf is the value of a package's constant, nil if the name is none.
func constantOf(t *testing.T, folder, name string) any {
	var found any
	eachFile(t, filepath.Join(folder, "*.go"), func(f *ast.File) {
		ast.Inspect(f, func(n ast.Node) bool {
			s, ok := n.(*ast.ValueSpec)
			if !ok {
				return true
			}
			for i, id := range s.Names {
				if id.Name == name && i < len(s.Values) {
					found = valueOf(s.Values[i])
				}
			}
			return true
		})
	})
	return found
}

// valueOf evaluates an expression of numbers and units of time, nil if it is something else.
func valueOf(x ast.Expr) any {
	text := types.ExprString(x)
	isTime := strings.Contains(text, "time.")
	for unit, d := range map[string]time.Duration{"time.Hour": time.Hour, "time.Minute": time.Minute, "time.Second": time.Second, "time.Millisecond": time.Millisecond} {
		text = strings.ReplaceAll(text, unit, strconv.FormatInt(int64(d), 10))
	}
	tv, err := types.Eval(token.NewFileSet(), nil, token.NoPos, text)
	if err != nil || tv.Value == nil || tv.Value.Kind() != constant.Int {
		return nil
	}
	v, _ := constant.Int64Val(tv.Value)
	if isTime {
		return time.Duration(v)
	}
	return v
}

// defaults are those of the flags of all programs, by name.
func defaults(t *testing.T) map[string][]any {
	found := map[string][]any{}
	for _, glob := range []string{"cmd/*/*.go", "cli/*.go"} {
		eachFile(t, glob, func(f *ast.File) {
			ast.Inspect(f, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || len(call.Args) < 3 {
					return true
				}
				if lit, ok := call.Args[1].(*ast.BasicLit); ok && lit.Kind == token.STRING {
					name := "--" + strings.Trim(lit.Value, `"`)
					found[name] = append(found[name], valueOf(call.Args[2]))
				}
				return true
			})
		})
	}
	return found
}

func eachFile(t *testing.T, glob string, f func(*ast.File)) {
	t.Helper()
	parsed(t, glob, parser.SkipObjectResolution, f)
}

func eachFileWithComments(t *testing.T, glob string, f func(*ast.File)) {
	t.Helper()
	parsed(t, glob, parser.SkipObjectResolution|parser.ParseComments, f)
}

func parsed(t *testing.T, glob string, mode parser.Mode, f func(*ast.File)) {
	t.Helper()
	files, err := filepath.Glob(glob)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, mode)
		if err != nil {
			t.Fatal(err)
		}
		f(file)
	}
}

// sources are all files of the programs, as one text.
func sources(t *testing.T) string {
	var all strings.Builder
	for _, glob := range []string{"*/*.go", "*/*/*.go"} {
		files, err := filepath.Glob(glob)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range files {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasSuffix(path, "_test.go") {
				all.Write(text)
			}
		}
	}
	return all.String()
}
