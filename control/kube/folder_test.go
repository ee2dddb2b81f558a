package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func namespaceYAML(name string) string {
	return "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: " + name + "}\n"
}

// folderTest runs a Folder; await waits for a state of it.
type folderTest struct {
	t    *testing.T
	dir  string
	told chan string
	last string
}

func startFolder(t *testing.T, files map[string]string) *folderTest {
	t.Helper()
	ft := &folderTest{t: t, dir: t.TempDir(), told: make(chan string, 1000)}
	for name, content := range files {
		ft.write(name, content)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	f := NewFolder(FolderConfig{Dir: ft.dir, Grace: 50 * time.Millisecond, Quiet: time.Millisecond})
	go runFolder(ctx, f, ft.told, ended)
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return ft
}

func runFolder(ctx context.Context, f *Folder, told chan<- string, ended chan<- error) {
	objects := make(Set)
	ended <- f.Run(ctx, func(events []Event) {
		objects.Apply(events)
		told <- names(objects)
	})
}

func names(s Set) string {
	var all []string
	for k := range s {
		all = append(all, strings.TrimPrefix(k.Namespace+"/"+k.Name, "/"))
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func (ft *folderTest) path(name string) string { return filepath.Join(ft.dir, name) }

func (ft *folderTest) write(name, content string) {
	ft.t.Helper()
	if err := os.WriteFile(ft.path(name), []byte(content), 0o644); err != nil {
		ft.t.Fatal(err)
	}
}

func (ft *folderTest) do(errs ...error) {
	ft.t.Helper()
	if err := errors.Join(errs...); err != nil {
		ft.t.Fatal(err)
	}
}

// await waits until the folder tells want.
func (ft *folderTest) await(want string) {
	ft.t.Helper()
	limit := time.After(10 * time.Second)
	for {
		select {
		case ft.last = <-ft.told:
			if ft.last == want {
				return
			}
		case <-limit:
			ft.t.Fatalf("told %q last, want %q", ft.last, want)
		}
	}
}

func TestFolderFollowsItsFiles(t *testing.T) {
	ft := startFolder(t, map[string]string{"a.yaml": namespaceYAML("a"), "not-read.txt": namespaceYAML("x"), ".hidden.yaml": namespaceYAML("x")})
	ft.await("a")
	ft.write("b.yml", namespaceYAML("b")+"---\n"+namespaceYAML("c"))
	ft.await("a b c")
	ft.do(os.Rename(ft.path("a.yaml"), ft.path("z.yaml"))) // which changes no object
	ft.do(os.Remove(ft.path("b.yml")))
	ft.await("a")
	ft.write("j.json", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"}}`)
	ft.await("a default/p")
	// Moved over an old one, as one that must not be seen half written.
	ft.write(".new", namespaceYAML("d"))
	ft.do(os.Rename(ft.path(".new"), ft.path("z.yaml")))
	ft.await("d default/p")
}

// What is told is what has changed of what Build reads.
func TestFolderTellsOfChanges(t *testing.T) {
	dir := t.TempDir()
	f := NewFolder(FolderConfig{Dir: dir})
	const pod = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIP: 10.0.0.1, message: %s}\n"
	for _, row := range []struct{ content, want string }{
		{namespaceYAML("a") + namespaceYAML("b"), "a b"},
		{namespaceYAML("a") + namespaceYAML("b"), ""},
		{namespaceYAML("a") + fmt.Sprintf(pod, "one"), "-b default/p"},
		{namespaceYAML("a") + fmt.Sprintf(pod, "two"), ""},
		{strings.Replace(namespaceYAML("a"), "}", ", labels: {tacit.dev/mesh: \"on\"}}", 1) + fmt.Sprintf(pod, "two"), "a"},
		{strings.Replace(namespaceYAML("a"), "}", ", labels: {tacit.dev/mesh: \"on\", b: c}}", 1) + fmt.Sprintf(pod, "two"), ""},
	} {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(row.content), 0o644), f.read(all)); err != nil {
			t.Fatal(err)
		}
		if got := eventNames(f.changes()); got != row.want {
			t.Errorf("%s\ntold %q, want %q", row.content, got, row.want)
		}
	}
}

// eventNames are the names of what was told, with a minus before what is gone.
func eventNames(events []Event) string {
	var all []string
	for _, e := range events {
		name := strings.TrimPrefix(e.Namespace+"/"+e.Name, "/")
		if e.Object == nil {
			name = "-" + name
		}
		all = append(all, name)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// What cannot be read keeps what was there before, until it can be read again.
func TestFolderKeepsTheLastGood(t *testing.T) {
	ft := startFolder(t, map[string]string{"a.yaml": namespaceYAML("a"), "b.yaml": namespaceYAML("b")})
	ft.await("a b")
	for _, bad := range []string{"", "# nothing\n", "a: [", namespaceYAML("a") + "---\nkind: Pod\n", "{}", "- 1\n",
		"apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {tacit.dev/mesh: on}}\n"} {
		ft.write("a.yaml", bad)
		marker := fmt.Sprintf("m%d", len(bad))
		ft.write("c.yaml", namespaceYAML(marker))
		ft.await("a b " + marker)
	}
	ft.write("a.yaml", namespaceYAML("good"))
	ft.write("c.yaml", namespaceYAML("end"))
	ft.await("b end good")
}

// While a file is open for writing it is not read, also if another one changed.
func TestFolderWaitsForTheWriter(t *testing.T) {
	ft := startFolder(t, map[string]string{"a.yaml": namespaceYAML("a") + "---\n" + namespaceYAML("b")})
	ft.await("a b")
	w, err := os.OpenFile(ft.path("a.yaml"), os.O_WRONLY|os.O_TRUNC, 0)
	ft.do(err)
	_, err = w.WriteString(namespaceYAML("a"))
	ft.do(err)
	ft.write("c.yaml", namespaceYAML("c"))
	ft.await("a b c")
	_, err = w.WriteString("---\n" + namespaceYAML("changed"))
	ft.do(err, w.Close())
	ft.await("a c changed")
}

// A volume of Kubernetes (ConfigMap) swaps a link to a folder behind links.
func TestFolderFollowsLinks(t *testing.T) {
	ft := startFolder(t, nil)
	ft.await("")
	ft.do(os.Mkdir(ft.path("..1"), 0o755), os.Mkdir(ft.path("..2"), 0o755))
	ft.write("..1/a.yaml", namespaceYAML("one"))
	ft.write("..2/a.yaml", namespaceYAML("two"))
	ft.do(os.Symlink("..1", ft.path("..data")), os.Symlink("..data/a.yaml", ft.path("a.yaml")))
	ft.await("one")
	ft.do(os.Symlink("..2", ft.path("..new")), os.Rename(ft.path("..new"), ft.path("..data")))
	ft.await("two")
}

func TestFolderIgnoresWhatIsNoFile(t *testing.T) {
	ft := startFolder(t, map[string]string{"a.yaml": namespaceYAML("a")})
	ft.await("a")
	ft.do(os.Mkdir(ft.path("d.yaml"), 0o755), os.Symlink("nowhere", ft.path("l.yaml")))
	ft.write("b.yaml", namespaceYAML("b"))
	ft.await("a b")
}

func TestObjectInTwoFiles(t *testing.T) {
	ft := startFolder(t, map[string]string{"a.yaml": namespaceYAML("a"), "b.yaml": namespaceYAML("a") + "---\n" + namespaceYAML("b")})
	ft.await("a b")
}

// At the start there is no last good state: a file that cannot be read is waited
// for, but not for ever.
func TestFolderGrace(t *testing.T) {
	ft := startFolder(t, map[string]string{"a.yaml": namespaceYAML("a"), "b.yaml": "half: ["})
	ft.await("a")
	ft.write("b.yaml", namespaceYAML("b"))
	ft.await("a b")
}

func TestFolderThatIsNotThere(t *testing.T) {
	err := NewFolder(FolderConfig{Dir: filepath.Join(t.TempDir(), "none")}).Run(t.Context(), func([]Event) {})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want that it does not exist", err)
	}
}

func TestFolderThatGoes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "f")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	err := NewFolder(FolderConfig{Dir: dir}).Run(t.Context(), func([]Event) {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err == nil || !strings.Contains(err.Error(), "moved or removed") {
		t.Errorf("error %v, want that the folder is gone", err)
	}
}

func TestBadFilesAreCounted(t *testing.T) {
	dir := t.TempDir()
	r := prometheus.NewRegistry()
	f := NewFolder(FolderConfig{Dir: dir, Registerer: r})
	for content, want := range map[string]float64{"a: [": 1, namespaceYAML("a"): 0} {
		if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := f.read(all); err != nil {
			t.Fatal(err)
		}
		if got := testutil.ToFloat64(f.bad); got != want {
			t.Errorf("%q: %v bad files, want %v", content, got, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	paths, _ := filepath.Glob("testdata/*.txtar")
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(namespaceYAML("a") + "---\n{kind: PodList, apiVersion: v1, items: [{kind: Pod, apiVersion: v1, metadata: {name: x}}]}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if o, err := Decode(b); err == nil {
			Build(o, labConfig)
		}
	})
}
