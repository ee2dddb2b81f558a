package finding

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReportArrives(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report")
	sent := []Finding{{What: "kernel", Found: "6.1"}, {What: "rules", Lacks: "no nft", Remedy: "load nf_tables"}}
	if err := Write(path, sent); err != nil {
		t.Fatal(err)
	}
	got := read(t, path)
	if diff := cmp.Diff(sent, got); diff != "" {
		t.Errorf("report (-sent +got):\n%s", diff)
	}
}

func TestLongTextIsCutBetweenLetters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report")
	if err := Write(path, []Finding{{What: "rules", Lacks: "x" + strings.Repeat("ü", 4000)}}); err != nil {
		t.Fatal(err)
	}
	got := read(t, path)[0].Lacks
	if len(got) > 400 || strings.Trim(got, "xü…") != "" {
		t.Errorf("got %d bytes, %q", len(got), got)
	}
}

func TestReadRefusesOtherText(t *testing.T) {
	if _, err := Read("exec: not found"); err == nil || !strings.Contains(err.Error(), "exec: not found") {
		t.Errorf("error %v, want one with the text", err)
	}
}

func read(t *testing.T, path string) []Finding {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all, err := Read(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return all
}
