package tacit

import (
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode"
)

const module = "tacit.dev"

// layers: a package imports from lower layers only (docs/architecture.md). A folder
// ending in /... stands for all below it. A new package is entered here first.
var layers = [][]string{
	{"mesh", "pause", "socket"},
	{"policy", "identity", "relay", "admin", "memory", "pod/cni", "pod/netns", "pod/redirect",
		"wire/direct", "wire/hbone", "wire/xds", "wire/csr", "wire/handle", "wire/finding",
		"waypoint/route", "control/ca", "control/kube", "deploy"},
	{"node/agent", "node/proxy", "waypoint", "control"},
	{"cli", "ui", "lab"},
	{"cmd/...", "bench/..."},
}

// neighbors are the imports allowed within one layer.
var neighbors = map[string][]string{
	"pod/redirect": {"pod/netns"},
	"control/ca":   {"identity"},
	"wire/direct":  {"identity"},
	"wire/hbone":   {"identity"},
	"cli":          {"lab", "ui"},
}

// parts belong to the package named first, stand in its layer, and are imported by
// those named only.
var parts = map[string][]string{
	"wire/xds/message": {"wire/xds"},
	"wire/csr/message": {"wire/csr"},
	"wire/bearer":      {"wire/xds", "wire/csr"},
	"lab/app":          {"lab", "cli"},
}

// owner is the package that folder is a part of, or folder itself.
func owner(folder string) string {
	if p := parts[folder]; p != nil {
		return p[0]
	}
	return folder
}

// only: these modules are imported by these packages, and their parts, and by
// nobody else.
var only = map[string][]string{
	"google.golang.org/grpc":     {"wire/xds", "wire/csr", "bench/scale/fleet"},
	"google.golang.org/protobuf": {"wire/xds", "wire/csr", "bench/scale/fleet"},
	"k8s.io/":                    {"control/kube", "cli", "lab", "bench/scale", "bench/scale/api", "bench/scale/cluster"},
	"sigs.k8s.io/":               {"control/kube", "cli", "lab"},
	"istio.io/":                  {"control/kube", "cli", "lab"},
	"github.com/spf13/cobra":     {"cli", "cmd/tacit"},
	"helm.sh/":                   {"cli"},
}

// standard packages import the standard library and each other, nothing else.
var standard = []string{"mesh", "pause", "pod/cni", "cmd/tacit-cni", "policy"}

// pure packages decide: they import nothing that reads a clock, does I/O, or waits.
var (
	pure = []string{"policy", "waypoint/route"}
	acts = []string{"context", "io", "log", "log/slog", "net", "net/http", "os", "sync", "syscall", "time"}
)

// never: what a package must not import, whatever its layer allows.
var never = map[string][]string{
	"node/proxy": {"pod/"}, // it has no privilege to use it
}

// links is all of ours that a program may contain, however far down.
var links = map[string][]string{
	"cmd/tacit-cni": {"mesh", "pause", "pod/cni"},
	"cmd/tacit-node": {"mesh", "pause", "socket", "identity", "relay", "admin", "memory", "policy", "waypoint", "waypoint/route",
		"node/agent", "node/proxy", "pod/cni", "pod/netns", "pod/redirect",
		"wire/direct", "wire/hbone", "wire/handle", "wire/finding", "wire/xds", "wire/csr", "wire/bearer", "wire/xds/message", "wire/csr/message"},
}

// unreachable: modules that a program must not contain, however far down.
var unreachable = map[string][]string{
	"cmd/tacit-node": {"k8s.io/", "sigs.k8s.io/", "istio.io/", "github.com/envoyproxy/", "github.com/spf13/"},
}

// pack is one package, without its tests.
type pack struct {
	name    string   // as its files say
	imports []string // sorted
	comment string
	files   map[string]*ast.File
}

// packages parses the module's packages, by folder.
func packages(t *testing.T) map[string]*pack {
	t.Helper()
	found := map[string]*pack{}
	set := token.NewFileSet()
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return enterable(file, d)
		}
		if strings.HasSuffix(file, ".go") && !strings.HasSuffix(file, "_test.go") && !standalone(file) {
			f, err := parser.ParseFile(set, file, nil, parser.ParseComments)
			if err != nil {
				return err
			}
			add(found, filepath.ToSlash(filepath.Dir(file)), file, f)
		}
		return nil
	})
	if err != nil || len(found) < 10 {
		t.Fatalf("found %d packages: %v", len(found), err)
	}
	return found
}

// enterable skips what is no folder of this module.
func enterable(folder string, d fs.DirEntry) error {
	_, err := os.Stat(filepath.Join(folder, "go.mod"))
	other := folder != "." && err == nil
	if other || d.Name() == "testdata" || d.Name() == "bin" || folder != "." && strings.HasPrefix(d.Name(), ".") {
		return fs.SkipDir
	}
	return nil
}

// standalone says that a file is left out of every build of its package.
func standalone(file string) bool {
	ok, err := build.Default.MatchFile(filepath.Dir(file), filepath.Base(file))
	return err == nil && !ok
}

func add(found map[string]*pack, folder, file string, f *ast.File) {
	p := found[folder]
	if p == nil {
		p = &pack{name: f.Name.Name, files: map[string]*ast.File{}}
		found[folder] = p
	}
	p.files[file] = f
	p.comment += f.Doc.Text()
	for _, i := range f.Imports {
		p.imports = append(p.imports, strings.Trim(i.Path.Value, `"`))
	}
	slices.Sort(p.imports)
	p.imports = slices.Compact(p.imports)
}

// ours is the folder of an import, if it is one of this module.
func ours(imported string) (folder string, ok bool) {
	return strings.CutPrefix(imported, module+"/")
}

func outside(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	return strings.Contains(first, ".")
}

func layerOf(folder string) (int, bool) {
	folder = owner(folder)
	for i, names := range layers {
		for _, n := range names {
			root, all := strings.CutSuffix(n, "/...")
			if folder == root || all && strings.HasPrefix(folder, root+"/") {
				return i, true
			}
		}
	}
	return 0, false
}

// Down only; roles never meet; what belongs to one package stays there.
func TestImportsGoDown(t *testing.T) {
	for folder, p := range packages(t) {
		layer, ok := layerOf(folder)
		if !ok {
			t.Errorf("%s stands in no layer of arch_test.go", folder)
			continue
		}
		for _, imported := range p.imports {
			to, ok := ours(imported)
			if !ok {
				continue
			}
			below, _ := layerOf(to)
			switch {
			case parts[to] != nil && !slices.Contains(parts[to], folder):
				t.Errorf("%s imports %s, which is for %v", folder, to, parts[to])
			case parts[to] != nil, below < layer, slices.Contains(neighbors[folder], to), strings.HasPrefix(folder+"/", "bench/") && strings.HasPrefix(to, "bench/"):
			default:
				t.Errorf("%s (layer %d) imports %s (layer %d): down only", folder, layer, to, below)
			}
		}
	}
}

func TestImportsOfModules(t *testing.T) {
	for folder, p := range packages(t) {
		for _, imported := range p.imports {
			for prefix, who := range only {
				if hasPrefix(imported, prefix) && !slices.Contains(who, owner(folder)) {
					t.Errorf("%s imports %s: only %v do", folder, imported, who)
				}
			}
			for _, prefix := range never[folder] {
				if to, ok := ours(imported); ok && strings.HasPrefix(to, prefix) {
					t.Errorf("%s imports %s: never", folder, to)
				}
			}
			if slices.Contains(pure, folder) && slices.Contains(acts, imported) {
				t.Errorf("%s imports %s: it only decides", folder, imported)
			}
			to, _ := ours(imported)
			if slices.Contains(standard, folder) && outside(imported) && !slices.Contains(standard, to) {
				t.Errorf("%s imports %s: the standard library only", folder, imported)
			}
		}
	}
}

// hasPrefix compares whole path elements.
func hasPrefix(imported, prefix string) bool {
	return imported == prefix || strings.HasPrefix(imported, strings.TrimSuffix(prefix, "/")+"/")
}

// What reads hostile bytes stays small, and what the runtime starts per pod too.
func TestWhatProgramsLink(t *testing.T) {
	cache := moduleCache(t)
	for program, allowed := range links {
		linked := map[string]string{}
		cache.walk(t, module+"/"+program, "", linked)
		for _, imported := range slices.Sorted(maps.Keys(linked)) {
			if to, ok := ours(imported); ok && to != program && !slices.Contains(allowed, to) {
				t.Errorf("%s links %s, through %s", program, to, linked[imported])
			}
			for _, prefix := range unreachable[program] {
				if hasPrefix(imported, prefix) {
					t.Errorf("%s links %s, through %s", program, imported, linked[imported])
				}
			}
		}
		if program == "cmd/tacit-node" && linked["google.golang.org/grpc"] == "" {
			t.Errorf("%s does not link gRPC: the walk must be broken", program)
		}
	}
}

// modules is where the source of each required module lies.
type modules struct {
	root    string
	version map[string]string
}

// moduleCache reads go.mod; a Go command would have the answer, and need a build.
func moduleCache(t *testing.T) modules {
	t.Helper()
	text, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	m := modules{root: os.Getenv("GOMODCACHE"), version: map[string]string{}}
	if m.root == "" {
		m.root = filepath.Join(filepath.SplitList(build.Default.GOPATH)[0], "pkg", "mod")
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(strings.TrimPrefix(line, "require "))
		if len(f) >= 2 && strings.HasPrefix(f[1], "v") && outside(f[0]) {
			m.version[f[0]] = f[1]
		}
	}
	return m
}

// folder is where a package of ours or of a required module lies.
func (m modules) folder(imported string) (string, bool) {
	if to, ok := ours(imported); ok {
		return to, true
	}
	for mod := imported; mod != "."; mod = path.Dir(mod) {
		if v := m.version[mod]; v != "" {
			return filepath.Join(m.root, escape(mod)+"@"+escape(v), strings.TrimPrefix(imported, mod)), true
		}
	}
	return "", false
}

// escape is how the module cache writes capitals.
func escape(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsUpper(r) {
			b.WriteByte('!')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// walk notes in linked every package below, the standard library aside, and who
// imports it first.
func (m modules) walk(t *testing.T, imported, by string, linked map[string]string) {
	t.Helper()
	if !outside(imported) || linked[imported] != "" {
		return
	}
	linked[imported] = by + " "
	folder, ok := m.folder(imported)
	if !ok {
		t.Fatalf("%s, imported by %s, is of no module of go.mod", imported, by)
	}
	p, err := build.Default.ImportDir(folder, 0)
	if err != nil {
		t.Fatalf("%s, imported by %s: %v", imported, by, err)
	}
	for _, next := range p.Imports {
		m.walk(t, next, imported, linked)
	}
}

// A package is one noun, and says what it is.
func TestPackagesAreNamedAndDescribed(t *testing.T) {
	banned := []string{"pkg", "internal", "util", "utils", "common", "types", "helper", "helpers", "manager"}
	for folder, p := range packages(t) {
		for _, element := range append(strings.Split(folder, "/"), p.name) {
			if slices.Contains(banned, element) {
				t.Errorf("%s (package %s): no package is called %s", folder, p.name, element)
			}
		}
		if p.name != "main" && p.name != path.Base(folder) {
			t.Errorf("%s holds package %s", folder, p.name)
		}
		if len(strings.Fields(p.comment)) < 8 {
			t.Errorf("%s has no package comment that says what it is, its station on the way, and what it refuses to do", folder)
		}
	}
}

// Code is read in one view: no function over 80 lines, no file over 600. Nothing
// happens before main.
func TestSizesAndInit(t *testing.T) {
	for _, p := range packages(t) {
		for file, f := range p.files {
			if ast.IsGenerated(f) {
				continue
			}
			lines, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(lines), "\n"); n > 600 {
				t.Errorf("%s has %d lines: at most 600", file, n)
			}
			for _, d := range f.Decls {
				fn, ok := d.(*ast.FuncDecl)
				if !ok {
					continue
				}
				if fn.Name.Name == "init" && fn.Recv == nil {
					t.Errorf("%s has an init function", file)
				}
				if n := strings.Count(string(lines[fn.Pos()-f.FileStart:fn.End()-f.FileStart]), "\n") + 1; n > 80 {
					t.Errorf("%s: %s has %d lines: at most 80", file, fn.Name.Name, n)
				}
			}
		}
	}
}

// A program's main.go is flags, Config, Run and the exit code.
func TestMainIsShort(t *testing.T) {
	mains, err := filepath.Glob("cmd/*/main.go")
	if err != nil || len(mains) == 0 {
		t.Fatalf("programs %v: %v", mains, err)
	}
	for _, file := range mains {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(text), "\n"); n > 60 {
			t.Errorf("%s has %d lines: at most 60", file, n)
		}
	}
}
