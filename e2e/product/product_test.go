package product

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"tacit.dev/e2e/build"
)

var once = sync.OnceValues(func() (Images, error) {
	return Build(context.Background(), Options{Registry: "tacit.test", Version: "e2e", Progress: os.Stderr})
})

// both are the images that these tests look into.
func both(t *testing.T) map[string]string {
	t.Helper()
	made := must(once())(t)
	return map[string]string{"node": made.Node, "control": made.Control}
}

// open reads an image as whoever pulls it does.
func open(t *testing.T, file string) v1.Image {
	t.Helper()
	folder := t.TempDir()
	untar(t, must(os.Open(file))(t), folder)
	index, err := layout.ImageIndexFromPath(folder)
	if err != nil {
		t.Fatal(err)
	}
	manifest := must(index.IndexManifest())(t)
	return must(index.Image(manifest.Manifests[0].Digest))(t)
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// unpack makes the image's file system, and returns the paths of its files.
func unpack(t *testing.T, img v1.Image) (root string, files []string) {
	t.Helper()
	root = t.TempDir()
	for _, l := range must(img.Layers())(t) {
		files = append(files, untar(t, must(l.Uncompressed())(t), root)...)
	}
	slices.Sort(files)
	return root, files
}

func untar(t *testing.T, from io.ReadCloser, to string) (files []string) {
	t.Helper()
	defer from.Close()
	for r := tar.NewReader(from); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(to, h.Name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, 0o755)
		} else {
			files = append(files, "/"+h.Name)
			text := must(io.ReadAll(r))(t)
			if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
				err = os.WriteFile(path, text, os.FileMode(h.Mode))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// scripted is what the Dockerfile's stage takes along for nft.
func scripted(t *testing.T) []string {
	t.Helper()
	root := must(Sources())(t)
	text, err := exec.CommandContext(t.Context(), filepath.Join(root, "deploy/image/nft-files")).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(text))
}

// TestFiles: an image has our programs, what nft needs, and nothing else: no shell,
// no package manager, nothing that an intruder could use.
func TestFiles(t *testing.T) {
	for name, want := range map[string][]string{
		"node":    append(scripted(t), "/tacit-cni", "/tacit-node", "/usr/share/sbom/tacit-node.cdx.json"),
		"control": {"/tacit-control", "/usr/share/sbom/tacit-control.cdx.json"},
	} {
		slices.Sort(want)
		_, got := unpack(t, open(t, both(t)[name]))
		if !slices.Equal(got, want) {
			t.Errorf("files of %s:\n%s\nwant\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// ruleset has what ours have: names of protocols, sets, marks, conntrack.
const ruleset = `table inet tacit {
	set ports { type inet_service; elements = { 8080, 9090 } }
	chain output {
		type nat hook output priority -100; policy accept;
		meta mark 0x7ac17 return
		meta l4proto tcp tcp dport @ports ct state new redirect to :15101
	}
}
`

// TestNftRuns: in the image's file system nft loads rules, and lists them as the
// machine's own does.
func TestNftRuns(t *testing.T) {
	root, _ := unpack(t, open(t, both(t)["node"]))
	run := func(script string) string {
		cmd := exec.CommandContext(t.Context(), "unshare", "--net", "sh", "-c", script, "sh", root)
		cmd.Stdin = strings.NewReader(ruleset)
		text, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, text)
		}
		return string(text)
	}
	if got := run(`chroot "$1" /usr/sbin/nft --version`); !strings.HasPrefix(got, "nftables v") {
		t.Errorf("nft --version printed %q", got)
	}
	want := run(`PATH=$PATH:/usr/sbin; nft -f - && nft list ruleset`)
	got := run(`chroot "$1" /usr/sbin/nft -f - && chroot "$1" /usr/sbin/nft list ruleset`)
	if got != want || !strings.Contains(got, "redirect to :15101") {
		t.Errorf("the image's nft lists\n%s\nthe machine's\n%s", got, want)
	}
}

// TestProgramsRun: static, they run in an image that has no library of theirs.
func TestProgramsRun(t *testing.T) {
	for image, command := range map[string][]string{"node": {"/tacit-node", "proxy", "-h"}, "control": {"/tacit-control", "--version"}} {
		root, _ := unpack(t, open(t, both(t)[image]))
		text, err := exec.CommandContext(t.Context(), "chroot", append([]string{root}, command...)...).CombinedOutput()
		if err != nil || len(text) == 0 {
			t.Errorf("%q: %v: %s", command, err, text)
		}
	}
}

// TestBill: the list of what is inside names modules and Debian packages with
// their versions.
func TestBill(t *testing.T) {
	root, _ := unpack(t, open(t, both(t)["node"]))
	var b bill
	if err := json.Unmarshal(must(os.ReadFile(root+"/usr/share/sbom/tacit-node.cdx.json"))(t), &b); err != nil {
		t.Fatal(err)
	}
	has := map[string]string{}
	for _, c := range b.Components {
		has[c.Name] = c.Version
	}
	for _, name := range []string{"stdlib", "google.golang.org/grpc", "nftables", "libc6"} {
		if has[name] == "" {
			t.Errorf("no version of %s in %v", name, slices.Sorted(maps.Keys(has)))
		}
	}
}

// TestDockerfile: whoever has Docker gets the same images.
func TestDockerfile(t *testing.T) {
	text := must(os.ReadFile(filepath.Join(must(Sources())(t), "deploy/image/Dockerfile")))(t)
	for name, tar := range both(t) {
		img := open(t, tar)
		got, want := described(t, img), stageOf(t, string(text), name)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("image %s is\n%+v\nand by the Dockerfile\n%+v", name, got, want)
		}
	}
}

// recipe is what Dockerfile and image have in common.
type recipe struct {
	Programs               []string
	Entrypoint, User, Path string
	Labels                 map[string]string
}

func described(t *testing.T, img v1.Image) recipe {
	t.Helper()
	c := must(img.ConfigFile())(t).Config
	_, files := unpack(t, img)
	r := recipe{Entrypoint: strings.Join(c.Entrypoint, " "), User: c.User, Path: c.Env[0], Labels: c.Labels}
	for _, f := range files {
		if strings.HasPrefix(f, "/tacit-") {
			r.Programs = append(r.Programs, f)
		}
	}
	return r
}

// stageOf reads one stage of the Dockerfile, with the arguments that the test's
// images have.
func stageOf(t *testing.T, text, name string) recipe {
	t.Helper()
	_, stage, found := strings.Cut(text, "\nFROM scratch AS "+name+"\n")
	if !found {
		t.Fatalf("the Dockerfile has no stage %s", name)
	}
	stage, _, _ = strings.Cut(stage, "\nFROM ")
	stage = strings.NewReplacer("$VERSION", "e2e", "$REVISION", "", `"`, "", "[", "", "]", "").Replace(stage)
	r := recipe{Labels: map[string]string{}}
	for line := range strings.Lines(stage) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch word {
		case "LABEL":
			key, value, _ := strings.Cut(rest, "=")
			r.Labels[key] = value
		case "COPY":
			if to := rest[strings.LastIndex(rest, " ")+1:]; to != "/" {
				r.Programs = append(r.Programs, to)
			}
		case "USER":
			r.User = rest
		case "ENV":
			r.Path = rest
		case "ENTRYPOINT":
			r.Entrypoint = rest
		}
	}
	slices.Sort(r.Programs)
	return r
}

// TestDockerfileBuildsTheSame: flags are part of a program.
func TestDockerfileBuildsTheSame(t *testing.T) {
	root := must(Sources())(t)
	for _, file := range []string{"deploy/image/Dockerfile", "Makefile"} {
		text := must(os.ReadFile(filepath.Join(root, file)))(t)
		for _, flag := range []string{`-trimpath`, `grpcnotrace`, `-s -w -X main.version=`} {
			if !bytes.Contains(text, []byte(flag)) {
				t.Errorf("%s does not build with %s", file, flag)
			}
		}
	}
}

// TestKeyFollowsSources: other sources are other programs; tests are no part of them.
func TestKeyFollowsSources(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	key := func() string { return must(keyOf(context.Background(), root, "v1"))(t) }
	write("node/agent/agent.go", "package agent")
	first := key()
	write("node/agent/agent_test.go", "package agent")
	write("e2e/x.go", "package e2e")
	write("docs/x.md", "words")
	if key() != first {
		t.Error("tests and documents are part of the programs")
	}
	write("deploy/helm/values.yaml", "x: 1")
	if key() == first {
		t.Error("what is embedded is no part of the programs")
	}
}

var digest = regexp.MustCompile(`image-[0-9a-f]{16}`)

// TestTwiceTheSame: the same sources are the same images.
func TestTwiceTheSame(t *testing.T) {
	first := both(t)
	made := must(Build(t.Context(), Options{Registry: "tacit.test", Version: "e2e"}))(t)
	second := map[string]string{"node": made.Node, "control": made.Control}
	if !maps.Equal(first, second) || !digest.MatchString(first["node"]) {
		t.Errorf("built twice: %v, then %v", first, second)
	}
	if cache := must(build.Cache())(t); !strings.HasPrefix(first["node"], cache) {
		t.Errorf("%s is not in the cache", first["node"])
	}
}
